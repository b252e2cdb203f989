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

qv_status qv_engine_fork(qv_engine *engine, qv_sequence *seq)
{
    qv_request *request = seq->request;
    bool leads = request->leader != NULL && &request->leader->sequence == seq;
    return leads && seq->n_computed >= seq->fork_at ? fork_streams(engine, request) : QV_OK;
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

qv_status qv_engine_poll_adapters(qv_engine *engine)
{
    bool news;
    QV_TRY(qv_adapter_cache_poll(engine->adapters, &news));
    if (news) {
        fail_lost(engine);
        retry_parked(engine);
        qv_scheduler_notify(engine->scheduler);
    }
    return QV_OK;
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

int qv_engine_fd(const qv_engine *engine)
{
    return qv_adapter_cache_fd(engine->adapters);
}
