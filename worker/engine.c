#include "worker/engine_internal.h"

#include "common/clock.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Shortest prompt, in tokens, that the n streams of a request share. */
#define MIN_SHARED_PROMPT 16

/* --- Requests -------------------------------------------------------------------------------- */

/* A stream that has nothing to run: it only scores a prompt of which nothing is asked, or the
 * worker that it comes from was lost between its last token and the word that it is done. */
static const char *finished_before_it_runs(const qv_request_stream *stream)
{
    const qv_sequence *seq = &stream->sequence;
    if (seq->score_only)
        return seq->score_prompt && seq->n_prompt > 1 ? NULL : "length";
    switch (stream->stream.status) {
    case QV_STREAM_STOP:
        return "stop";
    case QV_STREAM_LENGTH:
        return "length";
    case QV_STREAM_RUNS:
        break;
    }
    return NULL;
}

static void queue_stream(qv_engine *engine, qv_request_stream *stream)
{
    stream->queued = true;
    qv_scheduler_add(engine->scheduler, &stream->sequence, stream->sequence.request->arrival_ms);
}

/* Where the streams of a request part: with the prefix cache at the end of a page, so that they
 * share pages, else at the prompt's last token. */
static int32_t fork_point(const qv_engine *engine, const qv_request *request)
{
    int32_t last = request->n_prompt - 1;
    int32_t page_end = last - last % engine->sizes.limits.page_tokens;
    return request->scope != NULL && page_end > 0 ? page_end : last;
}

/* Queue the streams; those that need not run end at once. When there are several and a prompt worth
 * it, the first of them goes ahead. */
static void start_streams(qv_engine *engine, qv_request *request)
{
    uint32_t n_streams = request->n_streams;
    bool share = request->n_unfinished > 1 && request->n_prompt >= MIN_SHARED_PROMPT;
    for (uint32_t i = 0; i < n_streams; i++) {
        qv_request_stream *stream = &request->streams[i];
        if (stream->finished)
            continue;
        const char *reason = finished_before_it_runs(stream);
        if (reason != NULL) {
            qv_engine_emit_end(engine, stream, reason);
        } else if (!share) {
            queue_stream(engine, stream);
        } else if (request->leader == NULL) {
            request->leader = stream;
            stream->sequence.fork_at = fork_point(engine, request);
            queue_stream(engine, stream);
        }
    }
}

/* Whether the prefix cache has what the leader has computed, for the others to find. */
static bool others_will_find(const qv_engine *engine, const qv_sequence *leader)
{
    if (leader->scope == NULL)
        return false;
    int32_t n = leader->fork_at;
    qv_prefix_match match =
        qv_prefix_cache_find(engine->prefix, leader->scope, leader->tokens, n, n);
    return match.n_pages * engine->sizes.limits.page_tokens == n;
}

/* Save the leader's state where the streams part. NULL: there is no room. */
static qv_status save_leader(qv_engine *engine, const qv_sequence *from, qv_snapshot **out)
{
    int32_t n_pages = qv_kv_cache_pages_for(engine->pages, from->n_computed);
    *out = qv_state_cache_save(engine->states, qv_model_state_bytes(engine->model, n_pages),
                               from->n_computed, n_pages);
    if (*out == NULL)
        return QV_OK;
    qv_status status =
        qv_model_state_save(engine->model, from->pages, n_pages, from->state_slot, (*out)->data);
    if (status != QV_OK)
        qv_state_cache_drop(engine->states, *out);
    return status;
}

/* The leader has come to where the streams part: those that waited for it begin there, from the
 * prefix cache or each from the same snapshot. Without either they compute the prompt themselves.
 */
static qv_status fork_streams(qv_engine *engine, qv_request *request)
{
    qv_sequence *from = &request->leader->sequence;
    qv_snapshot *snapshot = NULL;
    if (from->n_computed == from->fork_at && !others_will_find(engine, from))
        QV_TRY(save_leader(engine, from, &snapshot));
    request->leader = NULL;
    from->fork_at = 0;
    uint32_t n_streams = request->n_streams;
    for (uint32_t i = 0; i < n_streams; i++) {
        qv_request_stream *stream = &request->streams[i];
        qv_sequence *seq = &stream->sequence;
        if (stream->queued || stream->finished)
            continue;
        seq->next_score = from->next_score;
        if (snapshot != NULL) {
            seq->n_computed = stream->n_cached = from->n_computed;
            seq->snapshot = qv_state_cache_share(snapshot);
        }
        queue_stream(engine, stream);
    }
    qv_state_cache_drop(engine->states, snapshot);
    return QV_OK;
}

/* Hold the request's adapter and start it. If the adapter's first load has not ended, the request
 * is parked until it has. Errors: what the load failed with. */
static qv_status start_request(qv_engine *engine, qv_request *request, qv_code *code)
{
    if (request->adapter.size > 0) {
        qv_status status =
            qv_adapter_cache_acquire(engine->adapters, request->adapter, &request->version, code);
        if (status == QV_ERR_BUSY && !request->parked) {
            qv_engine_park(engine, request);
            for (uint32_t i = 0; i < request->n_streams; i++)
                request->streams[i].sequence.state = QV_SEQ_WAIT_ADAPTER;
        }
        if (status != QV_OK)
            return status == QV_ERR_BUSY ? QV_OK : status;
    }
    qv_engine_unpark(engine, request);
    qv_engine_join_prefixes(engine, request);
    start_streams(engine, request);
    return QV_OK;
}

/* The loader has news: parked requests try again. */
static void retry_parked(qv_engine *engine)
{
    for (qv_request *request = engine->parked, *next; request != NULL; request = next) {
        next = request->next;
        qv_code code;
        if (start_request(engine, request, &code) != QV_OK)
            qv_engine_fail_request(engine, request, code, qv_error());
    }
}

/* End the requests whose version cannot be had any more. */
static void fail_lost(qv_engine *engine)
{
    if (qv_adapter_cache_n_lost(engine->adapters) == 0)
        return;
    QV_MAP_EACH(engine->requests, entry)
    {
        qv_request *request = entry->value;
        qv_code code;
        const char *reason;
        if (request->version == NULL ||
            !qv_adapter_version_is_lost(request->version, &code, &reason))
            continue;
        char message[QV_ERROR_MAX];
        snprintf(message, sizeof message, "adapter '%.*s': %s", (int)request->adapter.size,
                 request->adapter.data, reason);
        qv_engine_fail_request(engine, request, code, message);
    }
}

/* Whether the engine can take the request at all. */
static qv_status check_room(const qv_engine *engine, const qv_request *request)
{
    int64_t limit = engine->options.max_running + engine->options.max_waiting;
    if (engine->n_sequences + request->n_unfinished > limit)
        return qv_fail(QV_ERR_BUSY,
                       "%" PRId64 " answers are running or queued, and %" PRId64
                       " is the limit (max-running and max-waiting)",
                       engine->n_sequences, limit);
    return QV_OK;
}

qv_status qv_engine_submit(qv_engine *engine, qv_request *request)
{
    if (qv_map_get_u64(engine->requests, request->number) != NULL) {
        qv_status status =
            qv_fail(QV_ERR_EXISTS, "request %" PRIu64 " is running already", request->number);
        qv_request_free(request);
        return status;
    }
    qv_code code = QV_CODE_OVERLOADED;
    qv_status status = check_room(engine, request);
    if (status == QV_OK)
        status = qv_map_set_u64(engine->requests, request->number, request);
    if (status != QV_OK) {
        qv_engine_report_error(engine, request->number, code, qv_error());
        qv_request_free(request);
        return status;
    }
    request->arrival_ms = qv_now_ms();
    engine->n_sequences += request->n_unfinished;
    if (request->n_unfinished == 0) { /* every stream has ended on an earlier worker */
        qv_engine_end_request(engine, request);
        return QV_OK;
    }
    status = start_request(engine, request, &code);
    if (status != QV_OK)
        qv_engine_fail_request(engine, request, code, qv_error());
    return status;
}

void qv_engine_abort(qv_engine *engine, uint64_t number, const char *reason)
{
    qv_request *request = qv_map_get_u64(engine->requests, number);
    if (request == NULL)
        return;
    uint32_t n_streams = request->n_streams;
    for (uint32_t i = 0; i < n_streams; i++)
        if (!request->streams[i].finished)
            qv_engine_emit_end(engine, &request->streams[i], reason);
}

/* --- Adapters -------------------------------------------------------------------------------- */

qv_status qv_engine_load_adapter(qv_engine *engine, const char *name, const char *dir, bool pin)
{
    return qv_adapter_cache_load(engine->adapters, name, dir, pin);
}

qv_status qv_engine_unload_adapter(qv_engine *engine, const char *name)
{
    qv_status status = qv_adapter_cache_unload(engine->adapters, name);
    retry_parked(engine); /* those that waited for it are refused */
    return status;
}

bool qv_engine_find_adapter(const qv_engine *engine, const char *name, qv_adapter_event *out)
{
    return qv_adapter_cache_find(engine->adapters, name, out);
}

void qv_engine_each_adapter(const qv_engine *engine, void (*each)(const qv_adapter_event *, void *),
                            void *user)
{
    qv_adapter_cache_each(engine->adapters, each, user);
}

void qv_engine_on_adapter_event(void *user, const qv_adapter_event *event)
{
    qv_engine *engine = user;
    qv_outbox_event(&engine->outbox, event);
    engine->adapters_changed = true;
}

/* What the scheduler asks about adapters. */

static int32_t enter_slot(void *user, qv_sequence *seq, bool must)
{
    qv_engine *engine = user;
    return qv_adapter_cache_enter(engine->adapters, seq->request->version, must);
}

static bool prefetch(void *user, qv_sequence *seq)
{
    qv_engine *engine = user;
    return qv_adapter_cache_prefetch(engine->adapters, seq->request->version);
}

static void leave_slot(void *user, qv_sequence *seq)
{
    qv_engine *engine = user;
    qv_adapter_cache_leave(engine->adapters, seq->request->version);
}

static bool slot_is_pinned(void *user, int32_t slot)
{
    const qv_engine *engine = user;
    return qv_adapter_cache_slot_state(engine->adapters, slot) == QV_SLOT_PINNED;
}

const qv_adapter_slots qv_engine_adapter_slots = {
    .acquire = enter_slot,
    .prefetch = prefetch,
    .release = leave_slot,
    .is_pinned = slot_is_pinned,
};

/* --- Step ------------------------------------------------------------------------------------ */

static qv_request_stream *stream_of(const qv_sequence *seq)
{
    return &seq->request->streams[seq->index];
}

/* Whether this sequence is one that others wait for, and has come to where they begin. */
static bool leads_to_fork(const qv_request *request, const qv_sequence *seq)
{
    return request->leader == stream_of(seq) && seq->n_computed >= seq->fork_at;
}

/* Save what lost its place, as far as the swap budget lasts; copy known beginnings to those that
 * were admitted with one, and bring back what got its place again. */
static qv_status swap(qv_engine *engine, const qv_plan *plan)
{
    for (int32_t i = 0; i < plan->n_preempted; i++) {
        const qv_preemption *lost = &plan->preempted[i];
        qv_sequence *seq = lost->seq;
        if (seq->n_computed == 0)
            continue;
        size_t bytes = qv_model_state_bytes(engine->model, lost->n_pages);
        seq->snapshot = qv_state_cache_save(engine->states, bytes, seq->n_computed, lost->n_pages);
        if (seq->snapshot != NULL)
            QV_TRY(qv_model_state_save(engine->model, seq->pages, lost->n_pages, lost->state_slot,
                                       seq->snapshot->data));
        else
            seq->n_computed = 0; /* to be computed again */
    }
    QV_TRY(qv_engine_load_prefixes(engine, plan));
    for (int32_t i = 0; i < plan->n_restored; i++) {
        qv_sequence *seq = plan->restored[i];
        QV_TRY(qv_model_state_restore(engine->model, seq->pages, seq->snapshot->n_pages,
                                      seq->state_slot, seq->snapshot->data));
        qv_state_cache_drop(engine->states, seq->snapshot);
        seq->snapshot = NULL;
    }
    for (int32_t i = 0; i < plan->n_loads;
         i++) { /* a leader that found all that it was to compute */
        qv_request *request = plan->loads[i].seq->request;
        if (leads_to_fork(request, plan->loads[i].seq))
            QV_TRY(fork_streams(engine, request));
    }
    return QV_OK;
}

/* What to do with each row of logits, in the order of the batch. */
static void fill_rows(qv_engine *engine, const qv_plan *plan)
{
    qv_sample_row *row = engine->rows;
    for (int32_t i = 0; i < plan->n_items; i++) {
        const qv_plan_item *item = &plan->items[i];
        const qv_sequence *seq = item->seq;
        const qv_request *request = seq->request;
        for (int32_t pos = item->rows.score_from; pos < item->rows.score_to; pos++)
            *row++ =
                (qv_sample_row){.target = seq->tokens[pos + 1], .n_top = request->n_top_prompt};
        if (!item->rows.choose)
            continue;
        *row = request->sampling;
        row->stream = seq->index;
        row->draw = (uint32_t)(seq->n_tokens - seq->n_prompt);
        row->tokens = seq->tokens;
        row->n_prompt = seq->n_prompt;
        row->n_tokens = seq->n_tokens;
        row++;
    }
    for (int32_t i = 0; i < plan->n_logits; i++)
        engine->results[i].token = -1;
}

/* Run the step and sample every row. A row whose logits are not finite keeps a negative token and
 * is its own request's trouble; the others have their results. */
static qv_status step_and_sample(qv_engine *engine, const qv_plan *plan, const qv_batch *batch)
{
    qv_status sampled;
    QV_TRY(qv_model_step(engine->model, batch, engine->context.n_valid, engine->rows,
                         engine->results, &sampled));
    if (sampled != QV_ERR_INTERNAL)
        return sampled;
    for (int32_t i = 0; i < plan->n_logits; i++)
        if (engine->results[i].token < 0)
            return QV_OK;
    return sampled;
}

static void keep_prompt_scores(const qv_plan_item *item, const qv_sample_result *results)
{
    qv_request *request = item->seq->request;
    for (int32_t pos = item->rows.score_from; pos < item->rows.score_to; pos++, results++) {
        request->prompt_logprobs[pos + 1] = results->logprob;
        if (request->n_top_prompt == 0)
            continue;
        uint32_t start = request->prompt_tops.start[pos + 1];
        for (int32_t i = 0; i < results->n_top; i++) {
            request->prompt_tops.token[start + (uint32_t)i] = results->top_token[i];
            request->prompt_tops.logprob[start + (uint32_t)i] = results->top_logprob[i];
        }
    }
}

static bool has_bad_row(const qv_plan_item *item, const qv_sample_result *results)
{
    for (int32_t i = 0; i < item->rows.count; i++)
        if (results[i].token < 0)
            return true;
    return false;
}

/* Take in what one item of the plan gave. `results` are those of its rows. */
static qv_status commit(qv_engine *engine, const qv_plan_item *item,
                        const qv_sample_result *results)
{
    qv_sequence *seq = item->seq;
    if (seq->state == QV_SEQ_FINISHED) /* another stream of its request failed in this step */
        return QV_OK;
    if (has_bad_row(item, results)) {
        char message[160];
        snprintf(message, sizeof message,
                 "the model gave logits that are not finite after %d tokens; its weights or those "
                 "of the adapter may be broken",
                 seq->n_computed + item->n_tokens);
        if (seq->scope != NULL) /* whatever went wrong, nobody shall begin from it */
            qv_prefix_cache_clear(engine->prefix, seq->scope);
        qv_engine_fail_request(engine, seq->request, QV_CODE_INTERNAL, message);
        return QV_OK;
    }
    keep_prompt_scores(item, results);
    *(seq->state == QV_SEQ_PREFILL ? &engine->stats.tokens_prefilled
                                   : &engine->stats.tokens_decoded) += (uint64_t)item->n_tokens;
    const qv_sample_result *chosen = item->rows.choose ? &results[item->rows.count - 1] : NULL;
    bool was_prefill = seq->state == QV_SEQ_PREFILL;
    qv_scheduler_commit(engine->scheduler, item, chosen != NULL ? chosen->token : -1);
    QV_TRY(qv_engine_keep_prefix(engine, seq, was_prefill && seq->state == QV_SEQ_DECODE));
    if (leads_to_fork(seq->request, seq))
        QV_TRY(fork_streams(engine, seq->request));
    if (chosen != NULL) {
        engine->stats.tokens_generated++;
        qv_engine_emit_token(engine, stream_of(seq), chosen);
    } else if (seq->score_only && qv_sequence_remaining(seq) == 0) {
        qv_engine_emit_end(engine, stream_of(seq), "length");
    }
    return QV_OK;
}

/* Run one plan on the model and take in its results. */
static qv_status run(qv_engine *engine, const qv_plan *plan)
{
    const qv_batch *batch = qv_batch_build(engine->builder, plan);
    fill_rows(engine, plan);
    QV_TRY(step_and_sample(engine, plan, batch));
    if (engine->dump != NULL) {
        QV_TRY(qv_engine_dump_finish(engine->dump));
        qv_engine_dump_free(engine->dump);
        engine->dump = NULL;
    }
    const qv_sample_result *results = engine->results;
    for (int32_t i = 0; i < plan->n_items; i++) {
        QV_TRY(commit(engine, &plan->items[i], results));
        results += plan->items[i].rows.count;
    }
    return QV_OK;
}

static void count_prefixes(qv_engine *engine, const qv_engine_stats *before)
{
    const qv_engine_metrics *m = &engine->metrics;
    const qv_prefix_stats *now = &engine->stats.prefix, *old = &before->prefix;
    if (engine->prefix == NULL)
        return;
    engine->stats.prefix = qv_prefix_cache_stats(engine->prefix);
    qv_counter_add(m->prefix_lookups, now->lookups - old->lookups);
    qv_counter_add(m->prefix_hits, now->hits - old->hits);
    qv_counter_add(m->prefix_tokens, now->hit_tokens - old->hit_tokens);
    qv_counter_add(m->prefix_snapshots_evicted, now->snapshots_evicted - old->snapshots_evicted);
    qv_counter_add(m->prefix_pages_evicted, now->pages_evicted - old->pages_evicted);
    qv_gauge_set(m->prefix_snapshots, now->n_snapshots);
    qv_gauge_set(m->prefix_pages, now->n_pages);
}

/* The numbers that the adapter cache keeps go to the metrics. */
static void count_adapters(qv_engine *engine)
{
    const qv_engine_metrics *m = &engine->metrics;
    qv_adapter_stats now, *before = &engine->adapter_stats;
    qv_adapter_cache_get_stats(engine->adapters, &now);
    qv_counter_add(m->slot_hits, now.slot_hits - before->slot_hits);
    qv_counter_add(m->host_hits, now.host_hits - before->host_hits);
    qv_counter_add(m->misses, now.misses - before->misses);
    qv_counter_add(m->reads, now.reads - before->reads);
    qv_counter_add(m->installs, now.installs - before->installs);
    qv_counter_add(m->slot_evictions, now.slot_evictions - before->slot_evictions);
    qv_counter_add(m->host_evictions, now.host_evictions - before->host_evictions);
    qv_gauge_set(m->adapters, (double)now.n_names);
    qv_gauge_set(m->host_bytes, (double)now.host_bytes);
    *before = now;
}

static void count_step(qv_engine *engine, const qv_engine_stats *before, int32_t n_tokens,
                       uint64_t start_ns)
{
    qv_engine_stats *now = &engine->stats;
    const qv_engine_metrics *m = &engine->metrics;
    now->preemptions = qv_scheduler_n_preemptions(engine->scheduler);
    if (n_tokens > 0) {
        now->steps++;
        qv_counter_add(m->steps, 1);
        qv_histogram_observe(m->step_tokens, n_tokens);
        qv_histogram_observe(m->step_seconds, (double)(qv_now_ns() - start_ns) * 1e-9);
    }
    qv_counter_add(m->prefilled, now->tokens_prefilled - before->tokens_prefilled);
    qv_counter_add(m->generated, now->tokens_generated - before->tokens_generated);
    qv_counter_add(m->preemptions, now->preemptions - before->preemptions);
    count_prefixes(engine, before);

    qv_engine_stats stats;
    qv_engine_get_stats(engine, &stats);
    qv_gauge_set(m->running, stats.running);
    qv_gauge_set(m->waiting, stats.waiting);
    qv_gauge_set(m->free_pages, stats.free_pages);
    qv_gauge_set(m->empty_slots, stats.free_adapter_slots);
    count_adapters(engine);
}

qv_status qv_engine_step(qv_engine *engine, qv_step_result *result)
{
    uint64_t start_ns = qv_now_ns();
    qv_engine_stats before = engine->stats;
    qv_outbox_begin(&engine->outbox);

    bool news;
    QV_TRY(qv_adapter_cache_poll(engine->adapters, &news));
    if (news) {
        fail_lost(engine);
        retry_parked(engine);
        qv_scheduler_notify(engine->scheduler);
    }
    qv_engine_forget_prefixes(engine);
    const qv_plan *plan = qv_scheduler_plan(engine->scheduler);
    QV_TRY(swap(engine, plan));
    if (plan->n_items > 0)
        QV_TRY(run(engine, plan));
    count_step(engine, &before, plan->n_tokens, start_ns);

    const qv_outbox_side *out;
    QV_TRY(qv_outbox_flip(&engine->outbox, &out));
    *result = (qv_step_result){
        .deltas = out->deltas,
        .n_deltas = out->n_deltas,
        .adapters = out->events,
        .n_adapters = out->n_events,
        .n_tokens = (uint32_t)plan->n_tokens,
    };
    return QV_OK;
}

bool qv_engine_has_work(const qv_engine *engine)
{
    return qv_scheduler_has_work(engine->scheduler) || !qv_outbox_is_empty(&engine->outbox) ||
           qv_adapter_cache_has_results(engine->adapters);
}

int qv_engine_fd(const qv_engine *engine)
{
    return qv_adapter_cache_fd(engine->adapters);
}
