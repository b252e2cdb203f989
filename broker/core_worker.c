/* Messages of workers: ready, heartbeat, step, adapter_state, goodbye. */
#include "broker/core_internal.h"

#include <stdlib.h>
#include <string.h>

#define MAX_REFUSALS                                                                               \
    3 /* workers that turn out not to hold the adapter; then the client is told                    \
       */
#define REFUSED_RETRY_MS 5000 /* for a worker that does not fit this pool */

/* --- Sessions ---------------------------------------------------------------------------------*/

static void refuse_worker(qv_core *core, const qv_mq_peer *peer, const char *id)
{
    qv_core_event(core, "worker_refused", NULL, id, qv_error());
    qv_message message = {.type = QV_MSG_REFUSED};
    message.refused.broker = qv_str_from(core->options.id);
    message.refused.reason = qv_str_from(qv_error());
    qv_set(&message.refused, refused, retry_after_ms, REFUSED_RETRY_MS);
    core->actions.send_worker(core->actions.user, peer, &message);
}

static void welcome(qv_core *core, qv_member *member, uint64_t now_us)
{
    qv_message message = {.type = QV_MSG_WELCOME};
    message.welcome.broker = qv_str_from(core->options.id);
    message.welcome.epoch = member->epoch;
    message.welcome.heartbeat_ms = core->options.heartbeat_ms;
    message.welcome.timeout_ms = core->options.timeout_ms;
    if (!qv_core_tell(core, member, &message, now_us))
        return;
    qv_member_apply(member, QV_MEMBER_WELCOMED);
    qv_core_apply_orders(core, member, now_us);
}

/* A process that opened another session was not killed by what it ran. */
static bool is_same_process(const qv_member *old, const qv_msg_ready *ready)
{
    return qv_has(ready, ready, instance) && old->instance == ready->instance;
}

static void on_ready(qv_core *core, const qv_mq_peer *peer, const qv_msg_ready *ready,
                     uint64_t now_us)
{
    /* A worker that registers again has forgotten what it ran; so has one that started anew under
     * the same id. */
    char *id = qv_str_dup(&core->arena, ready->worker);
    if (id == NULL)
        return;
    qv_member *old = qv_pool_find_peer(&core->pool, peer);
    if (old != NULL)
        qv_core_remove_member(core, old, "worker_lost", "it registered again",
                              !is_same_process(old, ready), now_us);
    old = qv_pool_find_id(&core->pool, id);
    if (old != NULL)
        qv_core_remove_member(core, old, "worker_lost", "another session took its id",
                              !is_same_process(old, ready), now_us);
    if (qv_has(ready, ready, instance))
        qv_core_acquit(core, id, ready->instance);
    qv_member *member;
    if (qv_pool_join(&core->pool, peer, ready, now_us, &member) != QV_OK) {
        refuse_worker(core, peer, id);
        return;
    }
    if (qv_placement_joined(&core->placement, member, ready->adapters.data, ready->adapters.count,
                            now_us) != QV_OK) {
        refuse_worker(core, peer, id);
        qv_core_remove_member(core, member, "worker_left", "refused", false, now_us);
        return;
    }
    qv_core_event(core, "worker_joined", NULL, member->id, member->model);
    welcome(core, member, now_us);
}

static void on_heartbeat(qv_core *core, qv_member *member, const qv_msg_heartbeat *heartbeat)
{
    member->steps = heartbeat->steps;
    member->running = heartbeat->running;
    member->waiting = heartbeat->waiting;
    if (qv_has(heartbeat, heartbeat, free_pages))
        member->free_pages = heartbeat->free_pages;
    member->tokens_per_second = heartbeat->tokens_per_second;
    bool is_idle = qv_has(heartbeat, heartbeat, running) && qv_has(heartbeat, heartbeat, waiting) &&
                   heartbeat->running + heartbeat->waiting == 0;
    member->idle_us = !is_idle ? 0 : member->idle_us != 0 ? member->idle_us : member->heard_us;
    if (member->paused)
        qv_member_pause(member, false);
    bool drains = heartbeat->draining || member->drain_ordered;
    if (!qv_member_apply(member, drains ? QV_MEMBER_DRAINS : QV_MEMBER_RESUMES))
        return;
    qv_core_event(core, drains ? "worker_draining" : "worker_resumed", NULL, member->id, NULL);
    qv_placement_members_changed(&core->placement, member->heard_us);
}

/* --- Deltas -----------------------------------------------------------------------------------*/

static qv_code read_code(qv_str text)
{
    qv_code code;
    return qv_code_find(text, &code) ? code : QV_CODE_INTERNAL;
}

/* Of a request that has ended or gone elsewhere: only its end is of interest. */
static void on_orphan_delta(qv_core *core, qv_attempt *attempt, const qv_msg_delta *delta)
{
    core->stats.late++;
    uint64_t bit = UINT64_C(1) << delta->index;
    if (delta->error_code.size > 0) {
        attempt->n_left = 0;
    } else if (delta->finish_reason.size > 0 && !(attempt->finished & bit)) {
        attempt->finished |= bit;
        attempt->n_left--;
    }
    if (attempt->n_left == 0)
        qv_attempt_free(attempt);
}

/* The worker ended the whole request. Some reasons are about the worker, not about the request. */
static void on_error(qv_core *core, qv_job *job, const qv_msg_delta *delta, uint64_t now_us)
{
    qv_member *member = job->attempt->member;
    qv_code code = read_code(delta->error_code);
    job->attempt->n_left = 0;
    if (job->abort != QV_ABORT_NONE) {
        qv_core_finish_aborted(core, job, now_us);
        return;
    }
    if (code == QV_CODE_OVERLOADED) {
        qv_member_pause(member, true);
        qv_core_retry(core, job, false, now_us);
        return;
    }
    if (code == QV_CODE_ADAPTER_NOT_FOUND && ++job->n_refusals < MAX_REFUSALS) {
        qv_resident *resident = qv_resident_find(job->group, member);
        if (resident != NULL && resident->state == QV_RESIDENT_READY)
            qv_placement_missing(&core->placement, resident, now_us);
        qv_core_retry(core, job, false, now_us);
        return;
    }
    const char *text = qv_str_dup(&core->arena, delta->error_message);
    qv_core_fail_job(core, job, code, text != NULL ? text : "", 0, now_us);
}

static qv_reals copy_reals(const qv_reals *from)
{
    qv_reals to = {malloc(from->count * sizeof *to.data), from->count};
    if (to.data != NULL)
        memcpy(to.data, from->data, from->count * sizeof *to.data);
    return to;
}

static bool copy_tops(const qv_tops *from, qv_tops *to)
{
    uint32_t base = from->start[0], n = from->start[from->count] - base;
    *to = (qv_tops){.count = from->count,
                    .start = malloc((from->count + 1) * sizeof *to->start),
                    .token = malloc((n + 1) * sizeof *to->token),
                    .logprob = malloc((n + 1) * sizeof *to->logprob)};
    if (to->start == NULL || to->token == NULL || to->logprob == NULL) {
        free(to->start);
        free(to->token);
        free(to->logprob);
        *to = (qv_tops){0};
        return false;
    }
    for (uint32_t i = 0; i <= from->count; i++)
        to->start[i] = from->start[i] - base;
    memcpy(to->token, from->token + base, n * sizeof *to->token);
    memcpy(to->logprob, from->logprob + base, n * sizeof *to->logprob);
    return true;
}

/* Logprobs of the prompt come before the end of a stream: they wait for its `done`. */
static qv_status keep_prompt_logprobs(qv_job *job, qv_job_stream *stream, const qv_msg_delta *delta)
{
    const qv_reals *reals = &delta->prompt_logprobs;
    const qv_tops *tops = &delta->prompt_top_logprobs;
    if (reals->count > 0 && stream->prompt_logprobs.data == NULL) {
        QV_TRY(qv_job_grow(job, reals->count * sizeof *reals->data));
        stream->prompt_logprobs = copy_reals(reals);
        if (stream->prompt_logprobs.data == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for %u logprobs", reals->count);
    }
    if (tops->count > 0 && stream->prompt_top_logprobs.start == NULL) {
        uint32_t n = tops->start[tops->count] - tops->start[0];
        QV_TRY(qv_job_grow(job, tops->count * sizeof *tops->start +
                                    n * (sizeof *tops->token + sizeof *tops->logprob)));
        if (!copy_tops(tops, &stream->prompt_top_logprobs))
            return qv_fail(QV_ERR_NOMEM, "no memory for %u logprobs", n);
    }
    return QV_OK;
}

/* Keep what the job needs of a delta: all of it for a whole answer, else the tokens. */
static qv_status keep_delta(qv_job *job, qv_job_stream *stream, const qv_msg_delta *delta)
{
    bool is_last = delta->finish_reason.size > 0 && job->n_finished + 1 == job->n;
    if (job->stream && is_last && !job->resumable)
        return QV_OK; /* nobody will take over from here */
    qv_answer *answer = &stream->answer;
    size_t before = answer->used_bytes;
    qv_msg_delta kept = *delta;
    kept.seq = answer->next_seq;
    if (job->stream && !job->resumable) {
        kept.text = (qv_str){0};
        kept.logprobs = (qv_reals){0};
        kept.top_logprobs = (qv_tops){0};
    }
    QV_TRY(qv_answer_add_delta(answer, &kept));
    if (delta->finish_reason.size == 0)
        QV_TRY(keep_prompt_logprobs(job, stream, delta));
    return qv_job_grow(job, answer->used_bytes - before);
}

/* Pass the content of a delta on to a client that streams. False: the job has ended, or will. */
static bool forward(qv_core *core, qv_job *job, qv_job_stream *stream, const qv_msg_delta *delta,
                    uint64_t now_us)
{
    qv_message message = {.type = QV_MSG_TOKENS};
    qv_msg_tokens *tokens = &message.tokens;
    tokens->id = (qv_str){job->id, job->id_size};
    tokens->index = delta->index;
    tokens->seq = stream->seq_out;
    tokens->text = delta->text;
    tokens->tokens = delta->tokens;
    if (qv_has(delta, delta, logprobs))
        qv_set(tokens, tokens, logprobs, delta->logprobs);
    if (qv_has(delta, delta, top_logprobs))
        qv_set(tokens, tokens, top_logprobs, delta->top_logprobs);
    if (stream->seq_out == 0 && job->digest[0] != '\0')
        qv_set(tokens, tokens, digest, qv_str_from(job->digest));

    /* The numbers of a durable request must be the same when it runs again: a piece is a message.
     */
    bool joined = false;
    bool is_had = stream->seq_out <= stream->have;
    bool is_sent = is_had || qv_core_deliver(core, job, &message, false, now_us,
                                             job->durable ? NULL : &joined);
    if (!is_sent && (job->entry == NULL || !job->resumable))
        return false;
    /* A client that turns out to be gone may come back for this message. */
    stream->seq_out += !joined;
    if (job->resumable && qv_job_note_bound(job, stream, joined) != QV_OK) {
        qv_core_fail_job(core, job, QV_CODE_OVERLOADED, qv_error(), 0, now_us);
        return false;
    }
    return true;
}

/* Whether a delta is the next one of its stream; what is not is dealt with here. */
static bool is_next(qv_core *core, qv_job *job, const qv_msg_delta *delta, uint64_t now_us)
{
    const qv_job_stream *stream = &job->streams[delta->index];
    int64_t seq = qv_has(delta, delta, seq) ? delta->seq : stream->seq_in;
    if (stream->finished || seq < stream->seq_in) {
        core->stats.late++;
        return false;
    }
    if (seq == stream->seq_in)
        return true;
    core->stats.gaps++;
    qv_core_retry(core, job, true, now_us);
    return false;
}

/* Whether the answer goes on with the adapter that it began with. */
static bool is_same_adapter(qv_core *core, qv_job *job, const qv_msg_delta *delta, uint64_t now_us)
{
    if (delta->digest.size == 0 || delta->digest.size > QV_POOL_DIGEST_MAX)
        return true;
    if ((job->held || qv_job_has_begun(job)) && job->digest[0] != '\0' &&
        !qv_str_equal(delta->digest, job->digest)) {
        qv_core_fail_job(core, job, QV_CODE_WORKER_LOST,
                         "the adapter was replaced in the middle of the answer", 0, now_us);
        return false;
    }
    memset(job->digest, 0, sizeof job->digest);
    memcpy(job->digest, delta->digest.data, delta->digest.size);
    return true;
}

/* --- Measuring
 * ----------------------------------------------------------------------------------*/

#define CHARGE_STEP 64.0 /* cost that a request beyond its estimate is charged at once */

/* Tokens came: less to do for the member, more served to the tenant. */
static void measure_tokens(qv_attempt *attempt, uint32_t n, uint64_t now_us)
{
    qv_job *job = attempt->job;
    double cost = qv_fair_cost(0, n);
    if (attempt->first_us == 0) {
        attempt->first_us = now_us;
        cost += job->n_prompt;
    }
    job->n_out += n;
    qv_measure_served(attempt->member, cost);
    double less = cost < attempt->work ? cost : attempt->work;
    attempt->work -= less;
    attempt->member->work -= less;
    double served = qv_fair_cost(job->n_prompt, (double)job->n_out);
    if (served > job->charged)
        qv_fair_charge_more(job, served - job->charged + CHARGE_STEP);
}

/* A stream ended: now the worker has counted the prompt's tokens. */
static void measure_end(qv_attempt *attempt, const qv_job_stream *stream, const qv_msg_delta *delta)
{
    qv_job *job = attempt->job;
    qv_measure_answer(job->group, (double)stream->n_tokens);
    if (!qv_has(delta, delta, usage))
        return;
    double computed = (double)(delta->usage.prompt_tokens - delta->usage.cached_tokens);
    if (delta->usage.prompt_tokens > 0)
        job->n_prompt = (double)delta->usage.prompt_tokens;
    if (attempt->first_us != 0 && delta->index == 0)
        qv_measure_prefill(attempt->member, computed,
                           (double)(attempt->first_us - attempt->sent_us));
}

static void on_delta(qv_core *core, qv_member *member, const qv_msg_delta *delta, uint64_t now_us)
{
    qv_attempt *attempt = qv_requests_find_attempt(&core->requests, delta->request);
    if (attempt == NULL || attempt->member != member) {
        core->stats.late++;
        return;
    }
    attempt->active_us = now_us;
    qv_job *job = attempt->job;
    if (job == NULL) {
        on_orphan_delta(core, attempt, delta);
        return;
    }
    if (delta->error_code.size > 0) {
        on_error(core, job, delta, now_us);
        return;
    }
    if (delta->index >= job->n) {
        qv_core_note_lost(core, member, "it answered a stream that nobody asked for");
        return;
    }
    if (!is_next(core, job, delta, now_us) || !is_same_adapter(core, job, delta, now_us))
        return;

    qv_job_stream *stream = &job->streams[delta->index];
    qv_status status = keep_delta(job, stream, delta);
    if (status != QV_OK) {
        qv_code code = status == QV_ERR_FORMAT  ? QV_CODE_INTERNAL
                       : status == QV_ERR_LIMIT ? QV_CODE_TOO_LARGE
                                                : QV_CODE_OVERLOADED;
        qv_core_fail_job(core, job, code, qv_error(), 0, now_us);
        return;
    }
    qv_job_apply(job, QV_JOB_PROGRESS);
    if (job->first_token_us == 0) {
        job->first_token_us = now_us;
        core->actions.observe(core->actions.user, QV_CORE_FIRST_TOKEN, now_us - job->received_us);
    }
    if (delta->text.size > 0 || delta->tokens.count > 0) {
        stream->seq_in++;
        stream->n_tokens += delta->tokens.count;
        core->stats.tokens += delta->tokens.count;
        measure_tokens(attempt, delta->tokens.count, now_us);
        if (job->stream && !forward(core, job, stream, delta, now_us))
            return;
    }
    if (delta->finish_reason.size > 0) {
        attempt->finished |= UINT64_C(1) << delta->index;
        attempt->n_left--;
        measure_end(attempt, stream, delta);
        qv_core_finish_stream(core, job, (uint32_t)delta->index, delta->finish_reason, delta,
                              now_us);
    }
}

/* --- The handler ------------------------------------------------------------------------------*/

static uint64_t epoch_of(const qv_message *message)
{
    switch (message->type) {
    case QV_MSG_HEARTBEAT:
        return message->heartbeat.epoch;
    case QV_MSG_STEP:
        return message->step.epoch;
    case QV_MSG_ADAPTER_STATE:
        return message->adapter_state.epoch;
    case QV_MSG_GOODBYE:
        return message->goodbye.epoch;
    default:
        QV_ASSERT(!"a message that the decoder does not take from workers");
        return 0;
    }
}

/* A ghost of an earlier session, of ours or of a broker before us. */
static void on_ghost(qv_core *core, const qv_mq_peer *peer, const qv_message *message)
{
    core->stats.ghosts++;
    if (message->type == QV_MSG_GOODBYE)
        return;
    qv_message answer = {.type = QV_MSG_UNKNOWN_SESSION};
    answer.unknown_session.broker = qv_str_from(core->options.id);
    core->actions.send_worker(core->actions.user, peer, &answer);
}

void qv_core_handle_worker(qv_core *core, const qv_mq_peer *peer, const qv_message *message,
                           uint64_t now_us)
{
    if (message->type == QV_MSG_READY) {
        on_ready(core, peer, &message->ready, now_us);
        return;
    }
    qv_member *member = qv_pool_find_peer(&core->pool, peer);
    if (member == NULL || member->epoch != epoch_of(message)) {
        on_ghost(core, peer, message);
        return;
    }
    member->heard_us = now_us;
    if (member->state == QV_MEMBER_SUSPECT && qv_member_apply(member, QV_MEMBER_HEARD))
        qv_core_event(core, "worker_back", NULL, member->id, NULL);
    switch (message->type) {
    case QV_MSG_HEARTBEAT:
        on_heartbeat(core, member, &message->heartbeat);
        break;
    case QV_MSG_STEP:
        core->stats.steps++;
        member->idle_us = 0;
        for (uint32_t i = 0; i < message->step.deltas.count; i++)
            on_delta(core, member, &message->step.deltas.data[i], now_us);
        break;
    case QV_MSG_ADAPTER_STATE:
        if (qv_placement_report(&core->placement, member, &message->adapter_state, now_us) != QV_OK)
            qv_core_event(core, "report_ignored", NULL, member->id, qv_error());
        break;
    default: {
        const char *reason = qv_str_dup(&core->arena, message->goodbye.reason);
        qv_core_remove_member(core, member, "worker_left", reason, false, now_us);
        break;
    }
    }
}
