/* What clients are told, and how requests end. */
#include "broker/core_internal.h"

#include <stdlib.h>
#include <string.h>

/* --- Outside of requests ----------------------------------------------------------------------*/

void qv_core_reply(qv_core *core, const qv_mq_peer *peer, const qv_message *message,
                   uint64_t now_us)
{
    qv_caller *caller = qv_callers_require(&core->callers, peer);
    if (caller == NULL)
        return;
    /* Whoever asks without reading the answers loses answers, not our memory. */
    qv_caller_send(caller, 0, message, false, now_us, NULL);
    qv_caller_release(caller);
}

qv_message qv_core_make_error(qv_core *core, qv_str id, qv_code code, const char *text,
                              int64_t retry_ms)
{
    qv_message message = {.type = QV_MSG_ERROR};
    if (id.size > 0)
        qv_set(&message.error, error, id, id);
    message.error.code = qv_str_from(qv_code_name(code));
    message.error.message = qv_str_from(text);
    if (retry_ms > 0)
        qv_set(&message.error, error, retry_after_ms, retry_ms);
    core->stats.errors[code]++;
    return message;
}

void qv_core_refuse(qv_core *core, const qv_mq_peer *peer, qv_str id, qv_code code,
                    const char *text, int64_t retry_ms, uint64_t now_us)
{
    qv_message message = qv_core_make_error(core, id, code, text, retry_ms);
    qv_core_reply(core, peer, &message, now_us);
}

/* --- Jobs -------------------------------------------------------------------------------------*/

static qv_str job_id(const qv_job *job)
{
    return (qv_str){job->id, job->id_size};
}

bool qv_job_has_begun(const qv_job *job)
{
    for (uint32_t i = 0; i < job->n; i++)
        if (job->streams[i].seq_in > 0 || job->streams[i].finished)
            return true;
    return false;
}

/* Keep the bytes of a message that ends a stream or a job; they are sent as well. */
static void keep_encoded(qv_core *core, qv_message *message, char **out, size_t *out_size)
{
    const void *data;
    size_t size;
    qv_arena_mark mark = qv_arena_get_mark(&core->arena);
    if (qv_message_encode(message, &core->arena, &data, &size) == QV_OK &&
        (*out = malloc(size)) != NULL) {
        memcpy(*out, data, size);
        *out_size = size;
        if (size <= UINT32_MAX)
            message->encoded = (qv_str){*out, (uint32_t)size};
    }
    qv_arena_rewind(&core->arena, mark);
}

static void end_job(qv_core *core, qv_job *job, qv_job_event how, uint64_t now_us)
{
    if (job->dispatched_us != 0)
        qv_fair_settle(job, qv_fair_cost(job->n_prompt, (double)job->n_out));
    core->stats.finished_deadline += job->abort == QV_ABORT_DEADLINE && how == QV_JOB_FINISH;
    qv_core_end_durable(core, job);
    qv_job_end(job, how, now_us);
    if (job->resumable && core->options.resume_ms > 0)
        qv_keep_add(&core->keep, job, now_us + (uint64_t)core->options.resume_ms * QV_MS);
    if (how != QV_JOB_FAIL)
        qv_explain_ended(&core->explain, job, NULL, now_us);
    core->stats.ended[job->state]++;
    core->actions.observe(core->actions.user, QV_CORE_TOTAL, now_us - job->received_us);
}

bool qv_core_deliver(qv_core *core, qv_job *job, const qv_message *message, bool must,
                     uint64_t now_us, bool *joined)
{
    qv_status status = qv_caller_send(job->caller, job->serial, message, must, now_us, joined);
    if (status == QV_OK)
        return true;
    if (status != QV_ERR_NOT_FOUND)
        qv_core_fail_job(core, job, QV_CODE_OVERLOADED, qv_error(), 0, now_us);
    return false;
}

void qv_core_abort(qv_core *core, qv_job *job, const char *reason, uint64_t now_us)
{
    const qv_attempt *attempt = job->attempt;
    if (attempt == NULL || attempt->n_left == 0)
        return;
    qv_message message = {.type = QV_MSG_ABORT};
    message.abort.epoch = attempt->member->epoch;
    message.abort.request = attempt->number;
    qv_set(&message.abort, abort, reason, qv_str_from(reason));
    qv_core_tell(core, attempt->member, &message, now_us);
}

void qv_core_fail_job(qv_core *core, qv_job *job, qv_code code, const char *text, int64_t retry_ms,
                      uint64_t now_us)
{
    qv_core_abort(core, job, "cancelled", now_us);
    qv_caller_drop_spill(job->caller, job->serial);
    qv_message message = qv_core_make_error(core, job_id(job), code, text, retry_ms);
    if (job->resumable)
        keep_encoded(core, &message, &job->error, &job->error_size);
    qv_caller_send(job->caller, job->serial, &message, true, now_us, NULL);
    char error[sizeof((qv_explain_record *)0)->error];
    snprintf(error, sizeof error, "%s: %s", qv_code_name(code), text);
    end_job(core, job, QV_JOB_FAIL, now_us);
    qv_explain_ended(&core->explain, job, error, now_us);
}

/* --- Streams ----------------------------------------------------------------------------------*/

static double to_ms(uint64_t from_us, uint64_t to_us)
{
    return from_us != 0 && to_us > from_us ? (double)(to_us - from_us) / 1000.0 : 0;
}

/* The worker's warnings, and those that no `accepted` carried. */
static qv_status fill_warnings(qv_core *core, const qv_job *job, const qv_msg_delta *delta,
                               qv_msg_done *done)
{
    uint32_t n_delta = delta != NULL ? delta->warnings.count : 0;
    uint32_t n_own = job->warnings_told ? 0 : job->warnings.count;
    uint32_t n = n_own + n_delta;
    if (n == 0)
        return QV_OK;
    qv_str *rows = QV_ARENA_ARRAY(&core->arena, qv_str, n);
    if (rows == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for %u warnings", n);
    for (uint32_t i = 0; i < n; i++)
        rows[i] = i < n_own ? job->warnings.data[i] : delta->warnings.data[i - n_own];
    qv_set(done, done, warnings, ((qv_strs){rows, n}));
    return QV_OK;
}

static void fill_usage(const qv_job_stream *stream, const qv_msg_delta *delta, qv_msg_usage *usage)
{
    if (delta != NULL && qv_has(delta, delta, usage))
        *usage = delta->usage;
    else
        usage->completion_tokens = stream->n_tokens;
}

static void fill_prompt_logprobs(const qv_job_stream *stream, const qv_msg_delta *delta,
                                 qv_msg_done *done)
{
    if (stream->prompt_logprobs.data != NULL)
        qv_set(done, done, prompt_logprobs, stream->prompt_logprobs);
    else if (delta != NULL && qv_has(delta, delta, prompt_logprobs))
        qv_set(done, done, prompt_logprobs, delta->prompt_logprobs);
    if (stream->prompt_top_logprobs.start != NULL)
        qv_set(done, done, prompt_top_logprobs, stream->prompt_top_logprobs);
    else if (delta != NULL && qv_has(delta, delta, prompt_top_logprobs))
        qv_set(done, done, prompt_top_logprobs, delta->prompt_top_logprobs);
}

bool qv_core_finish_stream(qv_core *core, qv_job *job, uint32_t index, qv_str reason,
                           const qv_msg_delta *delta, uint64_t now_us)
{
    qv_job_stream *stream = &job->streams[index];
    QV_ASSERT(!stream->finished);
    qv_message message = {.type = QV_MSG_DONE};
    qv_msg_done *done = &message.done;
    done->id = job_id(job);
    done->index = index;
    done->seq = stream->seq_out;
    done->finish_reason = reason;
    fill_usage(stream, delta, &done->usage);
    if (!job->stream)
        qv_answer_fill_done(&stream->answer, done);
    fill_prompt_logprobs(stream, delta, done);
    if (job->attempt != NULL)
        qv_set(done, done, worker, qv_str_from(job->attempt->member->id));
    if (job->group->name_size > 0)
        qv_set(done, done, adapter, ((qv_str){job->group->name, (uint32_t)job->group->name_size}));
    uint64_t dispatched_us = job->dispatched_us != 0 ? job->dispatched_us : now_us;
    done->timing = (qv_msg_timing){.queue_ms = to_ms(job->received_us, dispatched_us),
                                   .first_token_ms = to_ms(job->received_us, job->first_token_us),
                                   .total_ms = to_ms(job->received_us, now_us)};
    qv_mark(done, done, timing);
    if (fill_warnings(core, job, delta, done) != QV_OK) {
        qv_core_fail_job(core, job, QV_CODE_INTERNAL, qv_error(), 0, now_us);
        return false;
    }
    /* A `done` that holds no answer is small, and there are few. */
    bool is_small = job->stream && !qv_has(done, done, prompt_logprobs);
    if (job->resumable)
        keep_encoded(core, &message, &stream->done, &stream->done_size);
    if (!qv_core_deliver(core, job, &message, is_small || job->resumable, now_us, NULL) &&
        (job->entry == NULL || !job->resumable))
        return false;
    stream->finished = true;
    stream->seq_out++;
    if (++job->n_finished < job->n)
        return true;
    end_job(core, job, job->abort == QV_ABORT_CANCEL ? QV_JOB_CANCEL : QV_JOB_FINISH, now_us);
    return false;
}

/* --- Aborting ---------------------------------------------------------------------------------*/

static const char *const abort_reasons[] = {
    [QV_ABORT_NONE] = "", [QV_ABORT_CANCEL] = "cancelled", [QV_ABORT_DEADLINE] = "deadline"};

void qv_core_finish_aborted(qv_core *core, qv_job *job, uint64_t now_us)
{
    qv_str reason = qv_str_from(abort_reasons[job->abort]);
    for (uint32_t i = 0; i < job->n; i++)
        if (!job->streams[i].finished && !qv_core_finish_stream(core, job, i, reason, NULL, now_us))
            return;
}

void qv_core_begin_abort(qv_core *core, qv_job *job, qv_job_abort reason, uint64_t now_us)
{
    if (job->abort != QV_ABORT_NONE)
        return;
    job->abort = reason;
    if (job->state == QV_JOB_QUEUED || job->state == QV_JOB_PARKED) {
        qv_core_finish_aborted(core, job, now_us);
        return;
    }
    qv_core_abort(core, job, abort_reasons[reason], now_us);
    uint64_t at = now_us + (uint64_t)core->options.cancel_confirm_ms * QV_MS;
    if (qv_job_set_timer(job, at) != QV_OK)
        qv_core_finish_aborted(core, job, now_us);
}
