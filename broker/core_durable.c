/* Durable requests: what is said to Redis through the actions, and what comes back. */
#include "broker/core_internal.h"

#include <string.h>

static qv_durable durable_of(const qv_job *job)
{
    return (qv_durable){.tenant = {job->owner, job->owner_size},
                        .id = {job->id, job->id_size},
                        .submit = {job->submit, (uint32_t)job->submit_size},
                        .seed = job->seed,
                        .serial = job->serial};
}

static qv_job *find_serial(const qv_core *core, qv_str tenant, qv_str id, uint64_t serial)
{
    qv_job *job = qv_requests_find_name(&core->requests, tenant, id);
    while (job != NULL && job->serial != serial)
        job = job->name_next;
    return job;
}

qv_job *qv_core_find_durable(const qv_core *core, qv_str tenant, qv_str id)
{
    qv_job *job = qv_requests_find_name(&core->requests, tenant, id);
    while (job != NULL && !job->durable)
        job = job->name_next;
    return job;
}

void qv_core_begin_store(qv_core *core, qv_job *job, uint64_t now_us)
{
    qv_durable durable = durable_of(job);
    uint64_t until_us = now_us + (uint64_t)core->options.store_timeout_ms * QV_MS;
    qv_core_park(core, job, QV_PARK_STORING, until_us, now_us);
    if (job->state != QV_JOB_PARKED)
        return;
    qv_status status =
        core->actions.store != NULL
            ? core->actions.store(core->actions.user, &durable)
            : qv_fail(QV_ERR_UNSUPPORTED, "durable: this broker has no Redis to keep requests in");
    if (status == QV_OK)
        return;
    job->durable = false; /* there is nothing to take back */
    qv_core_fail_job(core, job, qv_code_of_status(status), qv_error(),
                     status == QV_ERR_BUSY ? 1000 : 0, now_us);
}

void qv_core_end_durable(qv_core *core, qv_job *job)
{
    if (!job->durable || core->actions.finish == NULL)
        return;
    const void *data = NULL;
    size_t size = 0;
    qv_arena_mark mark = qv_arena_get_mark(&core->arena);
    qv_durable durable = durable_of(job);
    if (qv_answer_pack(job, &core->arena, &data, &size) == QV_OK)
        core->actions.finish(core->actions.user, &durable, data, size);
    else
        qv_core_event(core, "answer_not_stored", job->group->name, NULL, qv_error());
    qv_arena_rewind(&core->arena, mark);
}

/* --- What Redis says --------------------------------------------------------------------------*/

typedef struct {
    qv_core *core;
    qv_caller *caller;
    uint64_t now_us;
} teller;

static qv_status tell(void *user, const qv_message *message)
{
    teller *t = user;
    qv_caller_send(t->caller, 0, message, true, t->now_us, NULL);
    return QV_OK;
}

/* Tell a client a stored answer. */
static void tell_stored(qv_core *core, const qv_mq_peer *peer, qv_str id, const int32_t *have,
                        uint32_t n_have, qv_str answer, uint64_t now_us)
{
    teller t = {core, qv_callers_require(&core->callers, peer), now_us};
    if (t.caller == NULL)
        return;
    qv_message accepted = {.type = QV_MSG_ACCEPTED};
    accepted.accepted.id = id;
    qv_set(&accepted.accepted, accepted, resumed, true);
    qv_caller_send(t.caller, 0, &accepted, true, now_us, NULL);
    core->stats.resumed++;
    qv_status status =
        qv_answer_unpack(answer.data, answer.size, have, n_have, &core->arena, tell, &t);
    if (status != QV_OK)
        qv_core_refuse(core, peer, id, QV_CODE_INTERNAL, qv_error(), 0, now_us);
    else
        qv_caller_release(t.caller);
}

static void on_stored_new(qv_core *core, qv_job *job, uint64_t now_us)
{
    qv_strs warnings = job->warnings;
    job->warnings = (qv_strs){0};
    bool told = qv_core_tell_accepted(core, job, &warnings, now_us);
    job->warnings = warnings; /* owned */
    job->warnings_told = true;
    if (told && job->state == QV_JOB_PARKED && job->park == QV_PARK_STORING)
        qv_core_unpark(core, job, now_us);
}

void qv_core_stored(qv_core *core, const qv_durable *durable, qv_stored how, qv_str detail,
                    uint64_t now_us)
{
    qv_arena_reset(&core->arena);
    qv_job *job = find_serial(core, durable->tenant, durable->id, durable->serial);
    if (job == NULL || job->park != QV_PARK_STORING || job->state != QV_JOB_PARKED) {
        /* It was given up meanwhile, but not in Redis. */
        if (how == QV_STORED_NEW && job == NULL && core->actions.finish != NULL)
            core->actions.finish(core->actions.user, durable, NULL, 0);
        return;
    }
    if (how == QV_STORED_NEW) {
        on_stored_new(core, job, now_us);
        qv_core_settle(core, now_us);
        return;
    }
    /* The id is another job's: this one was never there. */
    qv_mq_peer peer = job->caller->peer;
    bool has_peer = job->caller->serial != 0;
    qv_str id = qv_str_from(qv_str_dup(&core->arena, (qv_str){job->id, job->id_size}));
    job->durable = job->resumable = false;
    qv_job_end(job, QV_JOB_FAIL, now_us);
    qv_explain_ended(&core->explain, job, "the id is that of a job that there is", now_us);
    core->stats.ended[QV_JOB_FAILED]++;
    if (!has_peer || id.data == NULL)
        return;
    if (how == QV_STORED_FINISHED)
        tell_stored(core, &peer, id, NULL, 0, detail, now_us);
    else if (how == QV_STORED_ELSEWHERE)
        qv_core_refuse_unknown(core, &peer, id, qv_str_dup(&core->arena, detail), now_us);
    else
        qv_core_refuse(core, &peer, id, QV_CODE_OVERLOADED,
                       how == QV_STORED_LOST
                           ? "the broker of this request is lost: another takes it over"
                           : qv_str_dup(&core->arena, detail),
                       how == QV_STORED_LOST ? 250 : 1000, now_us);
    qv_core_settle(core, now_us);
}

void qv_core_looked_up(qv_core *core, const qv_mq_peer *peer, const qv_msg_resume_request *request,
                       qv_stored how, qv_str detail, uint64_t now_us)
{
    qv_arena_reset(&core->arena);
    if (qv_requests_find_name(&core->requests, request->tenant, request->id) != NULL) {
        qv_core_on_resume(core, peer, request, now_us); /* it came here meanwhile */
    } else if (how == QV_STORED_FINISHED) {
        int32_t one = (int32_t)request->seq;
        const int32_t *have = request->seqs.count > 0 ? request->seqs.data : &one;
        tell_stored(core, peer, request->id, have,
                    request->seqs.count > 0 ? request->seqs.count : 1, detail, now_us);
    } else if (how == QV_STORED_LOST || how == QV_STORED_FAILED) {
        const char *text = how == QV_STORED_LOST
                               ? "the broker of this request is lost: another takes it over"
                               : qv_str_dup(&core->arena, detail);
        qv_core_refuse(core, peer, request->id, QV_CODE_OVERLOADED, text != NULL ? text : "", 250,
                       now_us);
    } else {
        qv_core_refuse_unknown(core, peer, request->id,
                               how == QV_STORED_ELSEWHERE ? qv_str_dup(&core->arena, detail) : NULL,
                               now_us);
    }
    qv_core_settle(core, now_us);
}

qv_status qv_core_adopt(qv_core *core, const qv_durable *durable, uint64_t age_ms, uint64_t now_us)
{
    qv_message message = {0};
    qv_arena_reset(&core->arena);
    QV_TRY(qv_message_decode(durable->submit.data, durable->submit.size, QV_FROM_CLIENT,
                             &qv_callers_own_limits, &core->arena, &message));
    if (message.type != QV_MSG_SUBMIT)
        return qv_fail(QV_ERR_FORMAT, "what is stored is no submit");
    qv_msg_submit *submit = &message.submit;
    submit->tenant = durable->tenant;
    QV_TRY(qv_submit_check(submit));
    if (submit->id.size != durable->id.size ||
        memcmp(submit->id.data, durable->id.data, submit->id.size) != 0)
        return qv_fail(QV_ERR_FORMAT, "what is stored is the submit of another id");
    if (qv_core_find_durable(core, durable->tenant, durable->id) != NULL)
        return QV_OK;
    qv_status status = qv_core_readmit(core, submit, durable, age_ms, now_us);
    qv_core_settle(core, now_us);
    return status;
}

void qv_core_each_durable(qv_core *core, void (*each)(void *user, const qv_durable *durable),
                          void *user)
{
    QV_MAP_EACH(core->requests.by_id, entry)
    {
        const qv_job *job = entry->value;
        if (!job->durable || job->park == QV_PARK_STORING)
            continue;
        qv_durable durable = durable_of(job);
        each(user, &durable);
    }
}
