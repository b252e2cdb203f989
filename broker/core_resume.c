/* Requests that may not run for a while, clients that read slowly or lose their connection and come
 * back, and what they are told again. */
#include "broker/core_internal.h"

#include <stdlib.h>
#include <string.h>

/* --- Parking ----------------------------------------------------------------------------------*/

static uint64_t earlier(uint64_t a, uint64_t b)
{
    return a == 0 || (b != 0 && b < a) ? b : a;
}

void qv_core_park(qv_core *core, qv_job *job, qv_job_park why, uint64_t until_us, uint64_t now_us)
{
    if (job->state == QV_JOB_QUEUED) {
        qv_job_dequeue(job);
    } else if (job->attempt != NULL) {
        qv_core_abort(core, job, "cancelled", now_us);
        if (job->attempt->n_left == 0)
            qv_attempt_free(job->attempt);
        else
            qv_attempt_orphan(job->attempt, now_us);
        qv_explain_returned(&core->explain, job, "taken back", now_us);
    }
    if (job->state != QV_JOB_PARKED)
        qv_job_apply(job, QV_JOB_PARK);
    job->park = why;
    if (qv_job_set_timer(job, earlier(until_us, job->deadline_us)) != QV_OK)
        qv_core_fail_job(core, job, QV_CODE_INTERNAL, qv_error(), 0, now_us);
}

void qv_core_unpark(qv_core *core, qv_job *job, uint64_t now_us)
{
    job->park = QV_PARK_NONE;
    if (job->caller->choked) {
        qv_core_park(core, job, QV_PARK_SLOW, 0, now_us);
        return;
    }
    qv_job_apply(job, QV_JOB_UNPARK);
    uint64_t at = now_us + (uint64_t)core->options.max_queue_wait_ms * QV_MS;
    if (qv_job_set_timer(job, earlier(at, job->deadline_us)) != QV_OK ||
        qv_job_enqueue(job) != QV_OK)
        qv_core_fail_job(core, job, QV_CODE_INTERNAL, qv_error(), 0, now_us);
    else if (job->group->n_ready == 0)
        qv_group_touch(job->group);
}

void qv_core_begin_queue(qv_core *core, qv_job *job, uint64_t now_us)
{
    uint64_t at = now_us + (uint64_t)core->options.max_queue_wait_ms * QV_MS;
    if (job->caller->choked)
        qv_core_park(core, job, QV_PARK_SLOW, 0, now_us);
    else if (qv_job_set_timer(job, earlier(at, job->deadline_us)) != QV_OK ||
             qv_job_enqueue(job) != QV_OK)
        qv_core_fail_job(core, job, QV_CODE_INTERNAL, qv_error(), 0, now_us);
    else if (job->group->n_ready == 0)
        qv_group_touch(job->group);
}

/* --- Slow clients -----------------------------------------------------------------------------*/

/* Too much waits for it: what runs for it gives its place up, and goes on at the next token when
 * the client has read. */
static void on_choked(qv_core *core, qv_caller *caller, uint64_t now_us)
{
    core->stats.choked++;
    QV_LIST_EACH(&caller->jobs, qv_job, caller_link, job)
    if (job->state != QV_JOB_PARKED && job->abort == QV_ABORT_NONE)
        qv_core_park(core, job, QV_PARK_SLOW, 0, now_us);
}

static void on_room(qv_core *core, qv_caller *caller, uint64_t now_us)
{
    QV_LIST_EACH(&caller->jobs, qv_job, caller_link, job)
    if (job->state == QV_JOB_PARKED && job->park == QV_PARK_SLOW)
        qv_core_unpark(core, job, now_us);
}

/* It took nothing for long: an error for each request waits for it, in the place of the pieces. */
static void on_stalled(qv_core *core, qv_caller *caller, uint64_t now_us)
{
    char text[128];
    snprintf(text, sizeof text, "the client has read nothing for %lld ms",
             (long long)core->options.stalled_client_ms);
    core->stats.clients_lost++;
    QV_LIST_EACH(&caller->jobs, qv_job, caller_link, job)
    {
        if (job->durable && qv_job_give(job, core->callers.nobody) == QV_OK) {
            qv_caller_drop_spill(caller, job->serial);
            if (job->state == QV_JOB_PARKED && job->park == QV_PARK_SLOW)
                qv_core_unpark(core, job, now_us);
            qv_message message =
                qv_core_make_error(core, (qv_str){job->id, job->id_size}, QV_CODE_OVERLOADED,
                                   "the client has read nothing for long: resume the request", 0);
            qv_caller_send(caller, 0, &message, true, now_us, NULL);
            continue;
        }
        qv_core_fail_job(core, job, QV_CODE_OVERLOADED, text, 0, now_us);
    }
    caller->stalled = true;
    caller->choked = false;
}

void qv_core_on_flow(qv_core *core, qv_caller *caller, uint64_t now_us)
{
    qv_list_remove(&caller->flow_link);
    if (caller->gone)
        return;
    if (caller->stalled && caller->n_jobs > 0)
        on_stalled(core, caller, now_us);
    else if (caller->choked)
        on_choked(core, caller, now_us);
    else
        on_room(core, caller, now_us);
    qv_caller_release(caller);
}

/* --- Clients that are gone --------------------------------------------------------------------*/

static void forget(qv_core *core, qv_job *job, uint64_t now_us)
{
    qv_core_abort(core, job, "cancelled", now_us);
    qv_job_end(job, QV_JOB_FAIL, now_us);
    qv_explain_ended(&core->explain, job, "its client is gone", now_us);
    core->stats.ended[QV_JOB_FAILED]++;
}

/* What is kept for clients that are away has a bound: the oldest goes first. */
static void bound_away(qv_core *core, uint64_t now_us)
{
    QV_LIST_EACH(&core->callers.nobody->jobs, qv_job, caller_link, job)
    {
        if (core->callers.nobody->bytes <= core->options.max_kept_bytes)
            return;
        if (!job->durable)
            forget(core, job, now_us);
    }
}

void qv_core_lose_client(qv_core *core, qv_caller *caller, uint64_t now_us)
{
    uint64_t until_us = now_us + (uint64_t)core->options.resume_ms * QV_MS;
    QV_LIST_EACH(&caller->jobs, qv_job, caller_link, job)
    {
        bool keeps = job->resumable && !core->draining && job->abort == QV_ABORT_NONE;
        if (!keeps || qv_job_give(job, core->callers.nobody) != QV_OK)
            forget(core, job, now_us);
        else if (!job->durable)
            qv_core_park(core, job, QV_PARK_AWAY, until_us, now_us);
        else if (job->state == QV_JOB_PARKED && job->park == QV_PARK_SLOW)
            qv_core_unpark(core, job, now_us);
    }
    bound_away(core, now_us);
}

void qv_core_on_parked_timer(qv_core *core, qv_job *job, uint64_t now_us)
{
    switch (job->park) {
    case QV_PARK_AWAY:
        forget(core, job, now_us);
        break;
    case QV_PARK_STORING:
        qv_core_fail_job(core, job, QV_CODE_OVERLOADED,
                         "Redis did not confirm in time that the request is stored", 1000, now_us);
        break;
    default:
        qv_core_fail_job(core, job, QV_CODE_OVERLOADED, "the client does not read", 0, now_us);
        break;
    }
}

/* --- Telling again ----------------------------------------------------------------------------*/

static void send_encoded(qv_core *core, qv_caller *caller, uint64_t serial, const char *data,
                         size_t size, uint64_t now_us)
{
    qv_message message = {0};
    qv_arena_mark mark = qv_arena_get_mark(&core->arena);
    if (qv_message_decode(data, size, QV_TO_CLIENT, &qv_callers_own_limits, &core->arena,
                          &message) == QV_OK)
        qv_caller_send(caller, serial, &message, true, now_us, NULL);
    qv_arena_rewind(&core->arena, mark);
}

/* The messages of a stream behind `have`. They are bounded by what is kept. */
static void replay(qv_core *core, qv_caller *caller, uint64_t serial, qv_str id, bool stream,
                   const char *digest, uint32_t index, const qv_job_stream *from, int64_t have,
                   uint64_t now_us)
{
    int64_t first = have + 1 > from->base_seq ? have + 1 - from->base_seq : 0;
    for (int64_t i = first; stream && i < from->n_bounds && !caller->gone; i++) {
        qv_message message;
        qv_stream_message(from, id, digest, index, (uint32_t)i, &message);
        qv_caller_send(caller, serial, &message, true, now_us, NULL);
    }
    if (from->done != NULL && have < from->base_seq + (stream ? from->n_bounds : 0))
        send_encoded(core, caller, serial, from->done, from->done_size, now_us);
}

static void tell_resumed(qv_core *core, qv_caller *caller, uint64_t serial, qv_str id,
                         uint64_t now_us)
{
    qv_message message = {.type = QV_MSG_ACCEPTED};
    message.accepted.id = id;
    qv_set(&message.accepted, accepted, resumed, true);
    qv_set(&message.accepted, accepted, broker, qv_str_from(core->options.id));
    qv_caller_send(caller, serial, &message, true, now_us, NULL);
}

int64_t qv_core_have(const qv_msg_resume_request *request, uint32_t index)
{
    if (index < request->seqs.count)
        return request->seqs.data[index];
    return index == 0 ? request->seq : -1;
}

/* Whether every stream is kept from where the client wants it. */
static bool reaches_back(const qv_job_stream *streams, uint32_t n,
                         const qv_msg_resume_request *request)
{
    for (uint32_t i = 0; i < n; i++)
        if (qv_core_have(request, i) + 1 < streams[i].base_seq)
            return false;
    return true;
}

/* Whether what the client has is of another version of the adapter. */
static bool is_other(const char *digest, const qv_msg_resume_request *request)
{
    return request->digest.size > 0 && digest[0] != '\0' && !qv_str_equal(request->digest, digest);
}

static void refuse_other(qv_core *core, const qv_mq_peer *peer, qv_str id, uint64_t now_us)
{
    qv_core_refuse(core, peer, id, QV_CODE_WORKER_LOST,
                   "the adapter was replaced in the middle of the answer", 0, now_us);
}

static void refuse_gap(qv_core *core, const qv_mq_peer *peer, qv_str id, uint64_t now_us)
{
    qv_core_refuse(core, peer, id, QV_CODE_NOT_FOUND,
                   "this broker does not have the request from so early on: submit it again, with "
                   "`resume`",
                   0, now_us);
}

void qv_core_attach(qv_core *core, const qv_mq_peer *peer, qv_job *job,
                    const qv_msg_resume_request *request, uint64_t now_us)
{
    qv_str id = {job->id, job->id_size};
    qv_caller *caller = qv_callers_require(&core->callers, peer);
    if (caller == NULL)
        return;
    if (!job->resumable || !reaches_back(job->streams, job->n, request)) {
        refuse_gap(core, peer, id, now_us);
        return;
    }
    bool is_bound = job->held || qv_job_has_begun(job);
    if (is_bound && is_other(job->digest, request)) {
        refuse_other(core, peer, id, now_us);
        return;
    }
    if (!is_bound && request->digest.size > 0) { /* it runs again: only that version will do */
        job->held = true;
        memset(job->digest, 0, sizeof job->digest);
        memcpy(job->digest, request->digest.data, request->digest.size);
    }
    qv_caller_drop_spill(job->caller, job->serial);
    qv_caller *old = job->caller;
    qv_status status = qv_job_give(job, caller);
    if (status != QV_OK) {
        qv_core_refuse(core, peer, id, qv_code_of_status(status), qv_error(), 0, now_us);
        return;
    }
    if (old != caller)
        qv_caller_release(old);
    core->stats.resumed++;
    if (job->park == QV_PARK_STORING)
        return; /* accepted is said when it is stored */
    tell_resumed(core, caller, job->serial, id, now_us);
    for (uint32_t i = 0; i < job->n; i++) {
        int64_t have = qv_core_have(request, i);
        job->streams[i].have = have;
        replay(core, caller, job->serial, id, job->stream, job->digest, i, &job->streams[i], have,
               now_us);
    }
    if (job->state == QV_JOB_PARKED && job->park != QV_PARK_STORING && !caller->gone)
        qv_core_unpark(core, job, now_us);
}

void qv_core_replay_kept(qv_core *core, const qv_mq_peer *peer, const qv_kept *kept,
                         const qv_msg_resume_request *request, uint64_t now_us)
{
    qv_str id = {kept->id, kept->id_size};
    qv_caller *caller = qv_callers_require(&core->callers, peer);
    if (caller == NULL)
        return;
    if (!reaches_back(kept->streams, kept->n, request)) {
        refuse_gap(core, peer, id, now_us);
        return;
    }
    if (is_other(kept->digest, request)) {
        refuse_other(core, peer, id, now_us);
        return;
    }
    core->stats.resumed++;
    tell_resumed(core, caller, 0, id, now_us);
    for (uint32_t i = 0; i < kept->n; i++)
        replay(core, caller, 0, id, kept->stream, kept->digest, i, &kept->streams[i],
               qv_core_have(request, i), now_us);
    if (kept->error != NULL)
        send_encoded(core, caller, 0, kept->error, kept->error_size, now_us);
    qv_caller_release(caller);
}

void qv_core_on_resume(qv_core *core, const qv_mq_peer *peer, const qv_msg_resume_request *request,
                       uint64_t now_us)
{
    qv_job *job = qv_requests_find_name(&core->requests, request->tenant, request->id);
    const qv_kept *kept =
        job == NULL ? qv_keep_find(&core->keep, request->tenant, request->id) : NULL;
    if (job != NULL && job->name_next != NULL) {
        /* Ids are unique per connection only. One's own is meant, or the one without a client. */
        const qv_caller *caller = qv_callers_find(&core->callers, peer);
        qv_job *own = NULL, *away = NULL;
        uint32_t n_away = 0;
        for (; job != NULL; job = job->name_next) {
            own = caller != NULL && job->caller == caller ? job : own;
            bool is_away = job->caller == core->callers.nobody;
            away = is_away ? job : away;
            n_away += is_away;
        }
        job = own != NULL ? own : n_away == 1 ? away : NULL;
        if (job == NULL) {
            qv_core_refuse(core, peer, request->id, QV_CODE_BAD_REQUEST,
                           "several requests have this id: give each a random one, and it can be "
                           "resumed",
                           0, now_us);
            return;
        }
    }
    if (job != NULL) {
        qv_core_attach(core, peer, job, request, now_us);
    } else if (kept != NULL) {
        qv_core_replay_kept(core, peer, kept, request, now_us);
    } else if (core->actions.look_up == NULL ||
               !core->actions.look_up(core->actions.user, peer, request)) {
        qv_core_refuse_unknown(core, peer, request->id, NULL, now_us);
    }
}

void qv_core_refuse_unknown(qv_core *core, const qv_mq_peer *peer, qv_str id, const char *broker,
                            uint64_t now_us)
{
    const char *text =
        qv_arena_printf(&core->arena, "there is no request with id '%.*s' here%s%s", (int)id.size,
                        id.data, broker != NULL ? ": it is at " : "", broker != NULL ? broker : "");
    qv_message message =
        qv_core_make_error(core, id, QV_CODE_NOT_FOUND, text != NULL ? text : "no such request", 0);
    if (broker != NULL)
        qv_set(&message.error, error, broker, qv_str_from(broker));
    qv_core_reply(core, peer, &message, now_us);
}
