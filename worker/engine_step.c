/* The step. Each is planned and enqueued, then taken in by the scheduler as if the tokens that it
 * chooses were known, and what it chose is read and told. With overlap that is after the next step
 * has been enqueued, so that the device finds that one when it has done this one: its sequences go
 * on from tokens that only the device knows yet (QV_TOKEN_OF_ROW), and of one that turns out to
 * have ended the row is computed for nothing and dropped. Its pages and slots may be given away at
 * once, because everything on the device is in order.
 *
 *     one at a time    plan 1  enqueue 1  take and read 1 | plan 2  enqueue 2  take and read 2 ...
 *     with overlap     plan 1  enqueue 1  take 1 | plan 2  enqueue 2  read 1  take 2 | plan 3 ...
 *
 * Both give the same tokens: what a step computes depends on nothing that the order changes.
 */
#include "worker/engine_internal.h"

#include "common/clock.h"

#include <stdio.h>
#include <string.h>

static qv_request_stream *stream_of(const qv_sequence *seq)
{
    return &seq->request->streams[seq->index];
}

/* --- Flights --------------------------------------------------------------------------------- */

/* What an item of a flight did to its sequence when it was taken in, undone. */
static void take_back(const qv_plan_item *item)
{
    qv_sequence *seq = item->seq;
    seq->n_computed -= item->n_tokens;
    seq->n_tokens -= item->rows.choose;
    if (item->rows.score_to > item->rows.score_from)
        seq->next_score = item->rows.score_from;
}

void qv_engine_leave_flights(qv_engine *engine, const qv_sequence *seq)
{
    for (int f = 0; f < 2; f++) {
        qv_flight *flight = &engine->flights[f];
        for (int32_t i = 0; i < flight->n_items; i++) {
            if (flight->items[i].seq != seq)
                continue;
            if (flight->taken)
                take_back(&flight->items[i]);
            flight->items[i].seq = NULL;
        }
    }
}

/* --- Enqueue --------------------------------------------------------------------------------- */

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
    for (int32_t i = 0; i < plan->n_loads; i++) /* a leader may have found all it was to compute */
        QV_TRY(qv_engine_fork(engine, plan->loads[i].seq));
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
}

static void clear_results(qv_engine *engine, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        engine->results[i].token = -1;
}

/* Over several ranks a step and its sampling are one, whose results are there at its end. */
static qv_status compute(qv_engine *engine, const qv_batch *batch, qv_flight *flight)
{
    qv_tensor logits;
    int32_t n_valid = engine->context.n_valid;
    flight->is_sampled = engine->options.tp > 1;
    if (flight->is_sampled) {
        clear_results(engine, batch->n_logits);
        return qv_model_step(engine->model, batch, n_valid, engine->rows, engine->results,
                             &flight->sampled);
    }
    QV_TRY(qv_model_forward(engine->model, batch, &logits));
    return batch->n_logits > 0 ? qv_op_sample_begin(engine->backend, logits, n_valid, engine->rows)
                               : QV_OK;
}

/* Run a plan on the model, as far as the device has come when this returns. */
static qv_status enqueue(qv_engine *engine, const qv_plan *plan, qv_flight *flight)
{
    const qv_batch *batch = qv_batch_build(engine->builder, plan);
    fill_rows(engine, plan);
    QV_TRY(compute(engine, batch, flight));
    if (engine->dump != NULL) {
        QV_TRY(qv_engine_dump_finish(engine->dump));
        qv_engine_dump_free(engine->dump);
        engine->dump = NULL;
    }
    memcpy(flight->items, plan->items, (size_t)plan->n_items * sizeof *flight->items);
    flight->n_items = plan->n_items;
    flight->n_logits = plan->n_logits;
    flight->taken = false;
    return QV_OK;
}

/* --- Take in --------------------------------------------------------------------------------- */

/* What follows from a step for one of its sequences whatever it chose: all but the last of its
 * tokens are known. The item's rows end at `rows_end`. */
static qv_status take_item(qv_engine *engine, const qv_plan_item *item, int32_t rows_end)
{
    qv_sequence *seq = item->seq;
    bool was_prefill = seq->state == QV_SEQ_PREFILL;
    *(was_prefill ? &engine->stats.tokens_prefilled : &engine->stats.tokens_decoded) +=
        (uint64_t)item->n_tokens;
    qv_scheduler_commit(engine->scheduler, item,
                        item->rows.choose ? QV_TOKEN_OF_ROW(rows_end - 1) : QV_NO_TOKEN);
    QV_TRY(qv_engine_keep_prefix(engine, seq, was_prefill && seq->state == QV_SEQ_DECODE));
    return qv_engine_fork(engine, seq);
}

static qv_status take_flight(qv_engine *engine, qv_flight *flight)
{
    int32_t row = 0;
    flight->taken = true;
    for (int32_t i = 0; i < flight->n_items; i++) {
        row += flight->items[i].rows.count;
        if (flight->items[i].seq != NULL)
            QV_TRY(take_item(engine, &flight->items[i], row));
    }
    return QV_OK;
}

/* --- Read ------------------------------------------------------------------------------------ */

/* What each row gave. One whose logits are not finite keeps a negative token and is its own
 * request's trouble; the others have their results. */
static qv_status read_rows(qv_engine *engine, const qv_flight *flight)
{
    if (flight->n_logits == 0)
        return QV_OK;
    if (!flight->is_sampled)
        clear_results(engine, flight->n_logits);
    qv_status status =
        flight->is_sampled ? flight->sampled : qv_op_sample_end(engine->backend, engine->results);
    if (status != QV_ERR_INTERNAL)
        return status;
    for (int32_t i = 0; i < flight->n_logits; i++)
        if (engine->results[i].token < 0)
            return QV_OK;
    return status;
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

static void fail_bad_row(qv_engine *engine, qv_sequence *seq)
{
    char message[160];
    snprintf(message, sizeof message,
             "the model gave logits that are not finite after %d tokens; its weights or those of "
             "the adapter may be broken",
             seq->n_computed);
    if (seq->scope != NULL) /* whatever went wrong, nobody shall begin from it */
        qv_prefix_cache_clear(engine->prefix, seq->scope);
    qv_engine_fail_request(engine, seq->request, QV_CODE_INTERNAL, message);
}

/* What one item of a flight gave, to its sequence and to its client. `results` are those of its
 * rows. */
static void read_item(qv_engine *engine, const qv_plan_item *item, const qv_sample_result *results)
{
    qv_sequence *seq = item->seq;
    if (has_bad_row(item, results)) {
        fail_bad_row(engine, seq);
        return;
    }
    keep_prompt_scores(item, results);
    if (item->rows.choose) {
        const qv_sample_result *chosen = &results[item->rows.count - 1];
        qv_sequence_settle(seq, chosen->token);
        engine->stats.tokens_generated++;
        qv_engine_emit_token(engine, stream_of(seq), chosen);
    } else if (seq->score_only && qv_sequence_remaining(seq) == 0) {
        qv_engine_emit_end(engine, stream_of(seq), "length");
    }
}

/* Wait for a step and tell what it gave. Its items are taken in one by one if they were not yet, so
 * that what one gives back is there for the next. */
static qv_status read_flight(qv_engine *engine, qv_flight *flight)
{
    QV_TRY(read_rows(engine, flight));
    int32_t row = 0;
    for (int32_t i = 0; i < flight->n_items; i++) {
        qv_plan_item item = flight->items[i];
        flight->items[i].seq = NULL; /* it has landed, and what ends it now is in what it gave */
        row += item.rows.count;
        if (item.seq == NULL)
            continue;
        if (!flight->taken)
            QV_TRY(take_item(engine, &item, row));
        read_item(engine, &item, engine->results + row - item.rows.count);
    }
    flight->n_items = flight->n_logits = 0;
    return QV_OK;
}

/* --- Step ------------------------------------------------------------------------------------ */

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

/* One step more, and with overlap the results of the one before. */
static qv_status run(qv_engine *engine, const qv_plan *plan)
{
    qv_flight *before = engine->unread, *now = &engine->flights[before == engine->flights];
    QV_TRY(swap(engine, plan));
    if (plan->n_items > 0)
        QV_TRY(enqueue(engine, plan, now));
    QV_TRY(read_flight(engine, before));
    engine->unread = now;
    if (plan->n_items == 0)
        return QV_OK;
    return engine->overlap ? take_flight(engine, now) : read_flight(engine, now);
}

qv_status qv_engine_step(qv_engine *engine, qv_step_result *result)
{
    uint64_t start_ns = qv_now_ns();
    qv_engine_stats before = engine->stats;
    qv_outbox_begin(&engine->outbox);
    QV_TRY(qv_engine_poll_adapters(engine));
    qv_engine_forget_prefixes(engine);
    /* Who loses its place is saved with all its tokens; and some may end and make room. */
    if (qv_scheduler_will_preempt(engine->scheduler))
        QV_TRY(read_flight(engine, engine->unread));
    const qv_plan *plan = qv_scheduler_plan(engine->scheduler);
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
    return qv_scheduler_has_work(engine->scheduler) || engine->unread->n_items > 0 ||
           !qv_outbox_is_empty(&engine->outbox) || qv_adapter_cache_has_results(engine->adapters);
}

void qv_engine_watch_gaps(qv_engine *engine, bool on)
{
    qv_backend_watch_gaps(engine->backend, on);
}

double qv_engine_gap(const qv_engine *engine)
{
    return qv_backend_gap(engine->backend);
}
