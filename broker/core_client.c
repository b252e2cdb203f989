/* Messages of clients: submit, cancel, status, explain. */
#include "broker/core_internal.h"

#include <stdlib.h>
#include <string.h>

/* --- submit -----------------------------------------------------------------------------------*/

/* Keys that no row of the protocol names, as sentences; each is a typing error more often than not.
 */
static qv_strs make_warnings(qv_core *core, const qv_strs *keys)
{
    qv_str *rows = QV_ARENA_ARRAY(&core->arena, qv_str, keys->count);
    uint32_t n = 0;
    for (uint32_t i = 0; rows != NULL && i < keys->count; i++) {
        const char *text = qv_arena_printf(&core->arena, "unknown key '%.*s' was ignored",
                                           (int)keys->data[i].size, keys->data[i].data);
        if (text != NULL)
            rows[n++] = qv_str_from(text);
    }
    return (qv_strs){rows, n};
}

/* Keep warnings with the job until its `done`; they are lost without memory. */
static void keep_warnings(qv_job *job, const qv_strs *warnings)
{
    size_t bytes = warnings->count * sizeof(qv_str);
    for (uint32_t i = 0; i < warnings->count; i++)
        bytes += warnings->data[i].size;
    qv_str *rows = warnings->count > 0 ? malloc(bytes) : NULL;
    if (rows == NULL || qv_job_grow(job, bytes) != QV_OK) {
        free(rows);
        return;
    }
    char *text = (char *)(rows + warnings->count);
    for (uint32_t i = 0; i < warnings->count; i++) {
        rows[i] = (qv_str){text, warnings->data[i].size};
        memcpy(text, warnings->data[i].data, warnings->data[i].size);
        text += warnings->data[i].size;
    }
    job->warnings = (qv_strs){rows, warnings->count};
}

/* An adapter that nobody knows: for good, or only not yet. */
static void refuse_unknown(qv_core *core, const qv_mq_peer *peer, const qv_msg_submit *submit,
                           uint64_t now_us)
{
    bool is_young = now_us - core->started_us < (uint64_t)core->options.startup_grace_ms * QV_MS;
    bool has_workers = core->pool.n_members[QV_MEMBER_READY] > 0;
    bool is_early = !core->wants_known || (is_young && !has_workers);
    const char *text = qv_arena_printf(
        &core->arena, "adapter '%.*s' %s", (int)submit->adapter.size, submit->adapter.data,
        is_early ? "is not known yet: the broker has not heard of all adapters since it started"
                 : "is neither wanted in the registry nor held by a worker");
    qv_core_refuse(core, peer, submit->id,
                   is_early ? QV_CODE_OVERLOADED : QV_CODE_ADAPTER_NOT_FOUND,
                   text != NULL ? text : "adapter not found", is_early ? 500 : 0, now_us);
}

/* A number that stays the same for a request that is submitted again. */
static uint64_t hash_of(qv_str alias, qv_str id)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (uint32_t i = 0; i < alias.size + id.size; i++) {
        char c = i < alias.size ? alias.data[i] : id.data[i - alias.size];
        hash = (hash ^ (unsigned char)c) * UINT64_C(0x100000001b3);
    }
    hash ^= hash >> 32;
    hash *= UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ hash >> 29;
}

/* What a name with a split stands for, this time: one of its adapters by weight, of those that can
 * answer now if there are any. The name itself where none of them is known. */
static qv_group *resolve_split(qv_core *core, qv_group *alias, const qv_msg_submit *submit,
                               uint64_t now_us)
{
    qv_group *groups[QV_WANT_MAX_SPLIT];
    int64_t weights[QV_WANT_MAX_SPLIT], total = 0, total_known = 0;
    qv_group *known = NULL;
    for (size_t i = 0; i < alias->n_split; i++) {
        const qv_want_share *share = &alias->split[i];
        qv_code code;
        const char *why;
        int64_t retry_ms;
        groups[i] = qv_pool_find_group(&core->pool, share->adapter, strlen(share->adapter));
        bool is_known = groups[i] != NULL && (groups[i] == alias || groups[i]->n_split == 0);
        bool can = is_known && qv_group_accepts(groups[i], now_us, &code, &why, &retry_ms);
        weights[i] = can ? share->weight : 0;
        total += weights[i];
        if (is_known && share->weight > total_known) {
            total_known = share->weight;
            known = groups[i];
        }
    }
    if (total == 0)
        return known != NULL ? known : alias;
    int64_t lot = (int64_t)(hash_of(submit->adapter, submit->id) % (uint64_t)total);
    size_t i = 0;
    for (; lot >= weights[i]; i++)
        lot -= weights[i];
    return groups[i];
}

static bool check_tenant(qv_core *core, const qv_mq_peer *peer, const qv_msg_submit *submit,
                         const qv_group *group, uint64_t now_us)
{
    char tenant[QV_TENANT_MAX_NAME + 1];
    qv_text_copy(tenant, sizeof tenant, submit->tenant.data, submit->tenant.size);
    if (qv_group_allows_tenant(group, tenant))
        return true;
    const char *text = qv_arena_printf(&core->arena, "adapter %s may not be used by tenant '%s'",
                                       group->name, tenant);
    qv_core_refuse(core, peer, submit->id, QV_CODE_UNAUTHORIZED,
                   text != NULL ? text : "not for this tenant", 0, now_us);
    return false;
}

/* The group to queue in, or NULL: refused. */
static qv_group *find_group(qv_core *core, const qv_mq_peer *peer, const qv_msg_submit *submit,
                            uint64_t now_us)
{
    qv_group *group = qv_pool_find_group(&core->pool, submit->adapter.data, submit->adapter.size);
    if (group == NULL) {
        refuse_unknown(core, peer, submit, now_us);
        return NULL;
    }
    if (!check_tenant(core, peer, submit, group, now_us))
        return NULL;
    if (group->n_split > 0) {
        group = resolve_split(core, group, submit, now_us);
        if (!check_tenant(core, peer, submit, group, now_us))
            return NULL;
    }
    qv_code code;
    const char *why;
    int64_t retry_ms;
    if (qv_group_accepts(group, now_us, &code, &why, &retry_ms))
        return group;
    const char *text = qv_arena_printf(&core->arena, "adapter %s: %s", group->name,
                                       why != NULL ? why : "not there");
    qv_core_refuse(core, peer, submit->id, code, text != NULL ? text : why, retry_ms, now_us);
    return NULL;
}

static void refuse_limit(qv_core *core, const qv_mq_peer *peer, qv_str id, qv_status status,
                         uint64_t now_us)
{
    qv_code code = status == QV_ERR_EXISTS  ? QV_CODE_BAD_REQUEST
                   : status == QV_ERR_LIMIT ? QV_CODE_TOO_LARGE
                                            : QV_CODE_OVERLOADED;
    int64_t retry_ms = code == QV_CODE_OVERLOADED ? qv_requests_retry_ms(&core->requests) : 0;
    qv_core_refuse(core, peer, id, code, qv_error(), retry_ms, now_us);
}

/* Whether the submit may be taken, apart from its adapter and the limits. */
static bool check_submit(qv_core *core, const qv_mq_peer *peer, const qv_msg_submit *submit,
                         bool stream, uint64_t now_us)
{
    /* First of all, so that whatever else is wrong with it, the error says that the id is taken. */
    const qv_caller *caller = qv_callers_find(&core->callers, peer);
    qv_status status = QV_OK;
    if (caller != NULL &&
        qv_requests_find(&core->requests, caller, submit->id.data, submit->id.size) != NULL)
        status = qv_fail(QV_ERR_ARG, "id '%.*s' is in flight already", (int)submit->id.size,
                         submit->id.data);
    if (status == QV_OK && (core->draining || core->drain_ordered)) {
        qv_core_refuse(core, peer, submit->id, QV_CODE_OVERLOADED, "the broker is stopping", 1000,
                       now_us);
        return false;
    }
    if (status == QV_OK)
        status = qv_submit_check(submit);
    if (status == QV_OK && submit->resume.count > 0 && !stream)
        status = qv_fail(QV_ERR_ARG, "resume: only an answer that is streamed can go on");
    if (status == QV_OK && peer->delimiter && !stream && submit->n > 1)
        status =
            qv_fail(QV_ERR_ARG, "n: %lld answers do not fit into the one reply of a REQ socket",
                    (long long)submit->n);
    if (status != QV_OK)
        qv_core_refuse(core, peer, submit->id, qv_code_of_status(status), qv_error(), 0, now_us);
    return status == QV_OK;
}

bool qv_core_tell_accepted(qv_core *core, qv_job *job, const qv_strs *warnings, uint64_t now_us)
{
    qv_message message = {.type = QV_MSG_ACCEPTED};
    message.accepted.id = (qv_str){job->id, job->id_size};
    qv_set(&message.accepted, accepted, seed, job->seed);
    qv_set(&message.accepted, accepted, broker, qv_str_from(core->options.id));
    if (warnings->count > 0)
        qv_set(&message.accepted, accepted, warnings, *warnings);
    return qv_core_deliver(core, job, &message, true, now_us, NULL);
}

/* A durable id that there is already names the same request: the client gets that one. */
static bool join_durable(qv_core *core, const qv_mq_peer *peer, const qv_msg_submit *submit,
                         uint64_t now_us)
{
    qv_msg_resume_request all = {.id = submit->id, .tenant = submit->tenant, .seq = -1};
    qv_job *job = qv_core_find_durable(core, submit->tenant, submit->id);
    const qv_caller *caller = qv_callers_find(&core->callers, peer);
    if (job != NULL && job->caller == caller) {
        qv_strs none = {0};
        if (job->park != QV_PARK_STORING)
            qv_core_tell_accepted(core, job, &none, now_us);
        return true;
    }
    if (job != NULL) {
        qv_core_attach(core, peer, job, &all, now_us);
        return true;
    }
    const qv_kept *kept = qv_keep_find(&core->keep, submit->tenant, submit->id);
    if (kept == NULL || !kept->durable)
        return false;
    qv_core_replay_kept(core, peer, kept, &all, now_us);
    return true;
}

static void refuse_poison(qv_core *core, const qv_mq_peer *peer, const qv_msg_submit *submit,
                          const char *fingerprint, uint64_t now_us)
{
    core->stats.refused_poison++;
    const char *text = qv_arena_printf(
        &core->arena, "workers were lost under a request like this: it is quarantined as %s",
        fingerprint);
    qv_core_refuse(core, peer, submit->id, QV_CODE_QUARANTINED, text != NULL ? text : "quarantined",
                   0, now_us);
}

static void on_submit(qv_core *core, const qv_mq_peer *peer, const qv_message *message,
                      const void *data, size_t size, uint64_t now_us)
{
    const qv_msg_submit *submit = &message->submit;
    core->stats.submits++;
    if (submit->durable && join_durable(core, peer, submit, now_us))
        return;

    /* A REQ socket reads one reply: unless it asks for a stream it gets the last message only. */
    bool stream = submit->stream && (!peer->delimiter || qv_has(submit, submit, stream));
    if (!check_submit(core, peer, submit, stream, now_us))
        return;
    char fingerprint[QV_FINGERPRINT_SIZE];
    if (qv_core_is_poison(core, submit, fingerprint)) {
        refuse_poison(core, peer, submit, fingerprint, now_us);
        return;
    }
    qv_group *group = find_group(core, peer, submit, now_us);
    if (group == NULL)
        return;
    qv_caller *caller = qv_callers_require(&core->callers, peer);
    if (caller == NULL)
        return; /* no memory to talk to it either */
    qv_tenant *tenant =
        qv_fair_require_tenant(&core->requests.fair, submit->tenant.data, submit->tenant.size);
    if (tenant == NULL)
        return;
    qv_job *job;
    qv_status status = qv_requests_accept(&core->requests, caller, group, tenant, submit, data,
                                          size, qv_core_random(core) >> 1, now_us, &job);
    if (status != QV_OK) {
        refuse_limit(core, peer, submit->id, status, now_us);
        return;
    }
    core->stats.accepted++;
    job->stream = stream;
    if (group != core->pool.base)
        group->n_ready > 0 ? core->stats.adapter_hits++ : core->stats.adapter_misses++;
    job->durable = submit->durable;
    job->resumable = job->durable || (core->options.resume_ms > 0 && !peer->delimiter);
    job->is_aliased = !qv_str_equal(submit->adapter, group->name);
    qv_core_estimate(core, job, submit, (qv_str){group->name, (uint32_t)group->name_size});
    qv_explain_accepted(&core->explain, job, submit->adapter);
    int64_t retry_ms;
    const char *hopeless = qv_core_is_hopeless(core, job, &retry_ms, now_us);
    if (hopeless != NULL) {
        qv_core_fail_job(core, job, QV_CODE_DEADLINE, hopeless, retry_ms, now_us);
        return;
    }
    qv_strs warnings = make_warnings(core, &message->unknown_keys);
    if (job->n_finished == job->n) {
        qv_core_fail_job(core, job, QV_CODE_BAD_REQUEST, "resume: every stream has ended", 0,
                         now_us);
        return;
    }
    bool is_one_shot = peer->delimiter && !stream;
    if (is_one_shot || job->durable)
        keep_warnings(job, &warnings);
    if (job->durable)
        qv_core_begin_store(core, job, now_us);
    else if (is_one_shot || qv_core_tell_accepted(core, job, &warnings, now_us))
        qv_core_begin_queue(core, job, now_us);
}

qv_status qv_core_readmit(qv_core *core, const qv_msg_submit *submit, const qv_durable *durable,
                          uint64_t age_ms, uint64_t now_us)
{
    qv_group *group = qv_pool_find_group(&core->pool, submit->adapter.data, submit->adapter.size);
    bool is_early =
        group == NULL && (!core->wants_known || core->pool.n_members[QV_MEMBER_READY] == 0);
    if (is_early)
        return qv_fail(QV_ERR_BUSY, "adapter '%.*s' is not known yet", (int)submit->adapter.size,
                       submit->adapter.data);
    if (group == NULL) /* it fails there, and its client is told */
        group = qv_pool_require_group(&core->pool, submit->adapter.data, submit->adapter.size);
    else if (group->n_split > 0)
        group = resolve_split(core, group, submit, now_us);
    qv_tenant *tenant =
        qv_fair_require_tenant(&core->requests.fair, submit->tenant.data, submit->tenant.size);
    if (group == NULL || tenant == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a stored request");
    qv_job *job;
    QV_TRY(qv_requests_accept(&core->requests, core->callers.nobody, group, tenant, submit,
                              durable->submit.data, durable->submit.size, durable->seed, now_us,
                              &job));
    core->stats.adopted++;
    job->durable = job->resumable = true;
    job->stream = submit->stream;
    job->is_aliased = !qv_str_equal(submit->adapter, group->name);
    if (job->deadline_us != 0)
        job->deadline_us =
            job->deadline_us > age_ms * QV_MS ? job->deadline_us - age_ms * QV_MS : 1;
    qv_core_estimate(core, job, submit, (qv_str){group->name, (uint32_t)group->name_size});
    qv_explain_accepted(&core->explain, job, submit->adapter);
    qv_core_begin_queue(core, job, now_us);
    return QV_OK;
}

/* --- cancel -----------------------------------------------------------------------------------*/

static void on_cancel(qv_core *core, const qv_mq_peer *peer, const qv_msg_cancel *cancel,
                      uint64_t now_us)
{
    const qv_caller *caller = qv_callers_find(&core->callers, peer);
    qv_job *own = caller != NULL
                      ? qv_requests_find(&core->requests, caller, cancel->id.data, cancel->id.size)
                      : NULL;
    if (own != NULL) {
        qv_core_begin_abort(core, own, QV_ABORT_CANCEL, now_us); /* its `done` confirms */
        return;
    }
    const char *of = core->sender != NULL && !core->sender->operate ? core->sender->tenant : NULL;
    qv_job *other = qv_requests_find_any(&core->requests, of, cancel->id.data, cancel->id.size);
    if (other == NULL) {
        const char *text =
            qv_arena_printf(&core->arena, "no request with id '%.*s' is in flight, or several are",
                            (int)cancel->id.size, cancel->id.data);
        qv_core_refuse(core, peer, cancel->id, QV_CODE_BAD_REQUEST,
                       text != NULL ? text : "no such request", 0, now_us);
        return;
    }
    qv_core_begin_abort(core, other, QV_ABORT_CANCEL, now_us);
    qv_message message = {.type = QV_MSG_CANCELLED};
    message.cancelled.id = cancel->id;
    qv_core_reply(core, peer, &message, now_us);
}

/* --- status -----------------------------------------------------------------------------------*/

static void on_status(qv_core *core, const qv_mq_peer *peer, uint64_t now_us)
{
    qv_message message = {.type = QV_MSG_STATUS};
    if (qv_core_fill_status(core, &message.status, now_us) != QV_OK)
        qv_core_refuse(core, peer, (qv_str){0}, QV_CODE_INTERNAL, qv_error(), 0, now_us);
    else
        qv_core_reply(core, peer, &message, now_us);
}

/* --- explain ----------------------------------------------------------------------------------*/

static void on_explain(qv_core *core, const qv_mq_peer *peer, qv_str id, uint64_t now_us)
{
    const qv_explain_record *record = qv_explain_find(&core->explain, id.data, id.size);
    qv_message message = {.type = QV_MSG_EXPLAIN};
    if (record == NULL) {
        const char *text = qv_arena_printf(
            &core->arena, "no request with id '%.*s' is remembered; the latest %u are",
            (int)id.size, id.data, core->explain.n);
        qv_core_refuse(core, peer, id, QV_CODE_BAD_REQUEST, text != NULL ? text : "no such request",
                       0, now_us);
    } else if (qv_core_fill_explain(core, record, &message.explain, now_us) != QV_OK) {
        qv_core_refuse(core, peer, id, QV_CODE_INTERNAL, qv_error(), 0, now_us);
    } else {
        qv_core_reply(core, peer, &message, now_us);
    }
}

/* --- rights -----------------------------------------------------------------------------------*/

/* What a sender may do, and on whose behalf; `tenant` NULL: the message has none. */
static bool authorize(qv_core *core, const qv_mq_peer *peer, qv_message *message, uint64_t now_us)
{
    const qv_identity *sender = core->sender;
    if (sender == NULL)
        return true;
    qv_msg_type type = message->type;
    bool of_all = type == QV_MSG_STATUS_REQUEST || type == QV_MSG_EXPLAIN_REQUEST;
    bool may =
        of_all ? sender->operate : sender->submit || (sender->operate && type == QV_MSG_CANCEL);
    qv_str *tenant = type == QV_MSG_SUBMIT   ? &message->submit.tenant
                     : type == QV_MSG_RESUME ? &message->resume_request.tenant
                                             : NULL;
    bool is_own = tenant == NULL || tenant->size == 0 || qv_str_equal(*tenant, sender->tenant);
    if (may && is_own) {
        if (tenant != NULL)
            *tenant = qv_str_from(sender->tenant);
        return true;
    }
    core->stats.unauthorized++;
    const char *text =
        !may ? qv_arena_printf(&core->arena, "this key may not %s", qv_message_type_name(type))
             : qv_arena_printf(&core->arena, "this key is of tenant '%s', not of '%.*s'",
                               sender->tenant, (int)tenant->size, tenant->data);
    qv_core_refuse(core, peer, message->id, QV_CODE_UNAUTHORIZED, text != NULL ? text : "refused",
                   0, now_us);
    return false;
}

void qv_core_handle_client(qv_core *core, const qv_mq_peer *peer, qv_message *message,
                           const void *data, size_t size, uint64_t now_us)
{
    if (!authorize(core, peer, message, now_us))
        return;
    switch (message->type) {
    case QV_MSG_SUBMIT:
        on_submit(core, peer, message, data, size, now_us);
        break;
    case QV_MSG_CANCEL:
        on_cancel(core, peer, &message->cancel, now_us);
        break;
    case QV_MSG_RESUME:
        qv_core_on_resume(core, peer, &message->resume_request, now_us);
        break;
    case QV_MSG_STATUS_REQUEST:
        on_status(core, peer, now_us);
        break;
    case QV_MSG_EXPLAIN_REQUEST:
        on_explain(core, peer, message->explain_request.id, now_us);
        break;
    default:
        QV_ASSERT(!"a message that the decoder does not take from clients");
    }
}
