#include "worker/engine_internal.h"

#include <string.h>

const char *const qv_finish_reasons[QV_N_FINISH_REASONS] = {"stop", "length", "cancelled",
                                                            "deadline"};

/* --- Ends ------------------------------------------------------------------------------------ */

void qv_engine_park(qv_engine *engine, qv_request *request)
{
    request->parked = true;
    request->prev = engine->last_parked;
    request->next = NULL;
    *(request->prev != NULL ? &request->prev->next : &engine->parked) = request;
    engine->last_parked = request;
}

void qv_engine_unpark(qv_engine *engine, qv_request *request)
{
    if (!request->parked)
        return;
    *(request->prev != NULL ? &request->prev->next : &engine->parked) = request->next;
    *(request->next != NULL ? &request->next->prev : &engine->last_parked) = request->prev;
    request->prev = request->next = NULL;
    request->parked = false;
}

void qv_engine_end_request(qv_engine *engine, qv_request *request)
{
    qv_engine_unpark(engine, request);
    qv_engine_leave_prefixes(engine, request);
    if (request->version != NULL)
        qv_adapter_cache_release(engine->adapters, request->version);
    request->version = NULL;
    qv_map_remove_u64(engine->requests, request->number);
    qv_outbox_keep(&engine->outbox, request);
}

void qv_engine_end_stream(qv_engine *engine, qv_request_stream *stream)
{
    qv_request *request = stream->sequence.request;
    qv_engine_leave_flights(engine, &stream->sequence);
    if (stream->queued) {
        qv_scheduler_finish(engine->scheduler, &stream->sequence);
    } else {
        qv_state_cache_drop(engine->states, stream->sequence.snapshot);
        stream->sequence.snapshot = NULL;
        qv_sequence_apply(&stream->sequence, QV_SEQ_FINISH);
    }
    stream->finished = true;
    engine->n_sequences--;
    if (--request->n_unfinished == 0)
        qv_engine_end_request(engine, request);
}

void qv_engine_report_error(qv_engine *engine, uint64_t number, qv_code code, const char *message)
{
    qv_msg_delta *delta = qv_outbox_delta(&engine->outbox);
    qv_set(delta, delta, request, number);
    qv_set(delta, delta, error_code, qv_str_from(qv_code_name(code)));
    qv_set(delta, delta, error_message, qv_outbox_text(&engine->outbox, message, strlen(message)));
    qv_counter_add(engine->metrics.failed, 1);
}

void qv_engine_fail_request(qv_engine *engine, qv_request *request, qv_code code,
                            const char *message)
{
    qv_engine_report_error(engine, request->number, code, message);
    uint32_t n_streams = request->n_streams;
    for (uint32_t i = 0; i < n_streams; i++)
        if (!request->streams[i].finished)
            qv_engine_end_stream(engine, &request->streams[i]);
}

/* --- Deltas ---------------------------------------------------------------------------------- */

/* The alternatives of one row, as the tops of one token. */
static bool copy_tops(qv_outbox *box, const qv_sample_result *result, qv_tops *out)
{
    size_t n = (size_t)result->n_top;
    out->count = 1;
    out->start = qv_outbox_alloc(box, 2 * sizeof *out->start, _Alignof(uint32_t));
    out->token = qv_outbox_alloc(box, n * sizeof *out->token, _Alignof(int32_t));
    out->logprob = qv_outbox_alloc(box, n * sizeof *out->logprob, _Alignof(double));
    if (out->start == NULL || out->token == NULL || out->logprob == NULL)
        return false;
    out->start[0] = 0;
    out->start[1] = (uint32_t)n;
    for (size_t i = 0; i < n; i++) {
        out->token[i] = result->top_token[i];
        out->logprob[i] = result->top_logprob[i];
    }
    return true;
}

/* What a stream's last delta says beyond its tokens; the stream ends. */
static void add_finish(qv_engine *engine, qv_request_stream *stream, qv_msg_delta *delta,
                       const char *reason)
{
    const qv_request *request = stream->sequence.request;
    qv_engine_leave_flights(engine, &stream->sequence);
    qv_set(delta, delta, finish_reason, qv_outbox_text(&engine->outbox, reason, strlen(reason)));
    qv_msg_usage usage = {.prompt_tokens = request->n_prompt,
                          .completion_tokens = stream->stream.n_tokens,
                          .cached_tokens = stream->n_cached};
    qv_set(delta, delta, usage, usage);
    /* The scores are whole only when the prompt was; a cancelled stream may lack some. */
    if (request->prompt_logprobs != NULL && stream->sequence.next_score >= request->n_prompt - 1) {
        qv_reals logprobs = {request->prompt_logprobs, (uint32_t)request->n_prompt};
        qv_set(delta, delta, prompt_logprobs, logprobs);
        if (request->n_top_prompt > 0)
            qv_set(delta, delta, prompt_top_logprobs, request->prompt_tops);
    }
    if (request->version != NULL) {
        const char *digest = qv_adapter_version_digest(request->version);
        qv_set(delta, delta, digest, qv_outbox_text(&engine->outbox, digest, strlen(digest)));
    }
    for (size_t i = 0; i < QV_N_FINISH_REASONS; i++)
        if (strcmp(reason, qv_finish_reasons[i]) == 0)
            qv_counter_add(engine->metrics.finished[i], 1);
    qv_engine_keep_answer(engine, &stream->sequence);
    qv_engine_end_stream(engine, stream);
}

static qv_msg_delta *begin_delta(qv_engine *engine, qv_request_stream *stream)
{
    qv_msg_delta *delta = qv_outbox_delta(&engine->outbox);
    qv_set(delta, delta, request, stream->sequence.request->number);
    qv_set(delta, delta, index, stream->sequence.index);
    qv_set(delta, delta, seq, stream->next_seq);
    return delta;
}

void qv_engine_emit_token(qv_engine *engine, qv_request_stream *stream,
                          const qv_sample_result *result)
{
    qv_outbox *box = &engine->outbox;
    const qv_request *request = stream->sequence.request;
    const char *text;
    size_t size;
    qv_stream_status status = qv_stream_push(&stream->stream, result->token, &text, &size);

    qv_msg_delta *delta = begin_delta(engine, stream);
    stream->next_seq++;
    qv_set(delta, delta, text, qv_outbox_text(box, text, size));
    int32_t *token = qv_outbox_alloc(box, sizeof *token, _Alignof(int32_t));
    if (token != NULL) {
        *token = result->token;
        qv_ints tokens = {token, 1};
        qv_set(delta, delta, tokens, tokens);
    }
    if (request->sampling.n_top >= 0) {
        double *logprob = qv_outbox_alloc(box, sizeof *logprob, _Alignof(double));
        if (logprob != NULL) {
            *logprob = result->logprob;
            qv_reals logprobs = {logprob, 1};
            qv_set(delta, delta, logprobs, logprobs);
        }
        qv_tops tops;
        if (request->sampling.n_top > 0 && copy_tops(box, result, &tops))
            qv_set(delta, delta, top_logprobs, tops);
    }
    if (status != QV_STREAM_RUNS)
        add_finish(engine, stream, delta, status == QV_STREAM_STOP ? "stop" : "length");
}

void qv_engine_emit_end(qv_engine *engine, qv_request_stream *stream, const char *reason)
{
    const char *text;
    size_t size;
    qv_stream_end(&stream->stream, &text, &size);
    qv_msg_delta *delta = begin_delta(engine, stream);
    if (size > 0) {
        stream->next_seq++;
        qv_set(delta, delta, text, qv_outbox_text(&engine->outbox, text, size));
    }
    add_finish(engine, stream, delta, reason);
}
