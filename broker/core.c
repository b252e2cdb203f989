/* Life, dispatch, time, and what is lost. */
#include "broker/controller.h"
#include "broker/core_internal.h"

#include <stdlib.h>
#include <string.h>

#define MIB               (INT64_C(1) << 20)
#define PLACEMENT_TICK_US (100 * QV_MS)

qv_core_options qv_core_default_options(void)
{
    return (qv_core_options){
        .id = "broker",
        .version = QV_VERSION,
        .seed = 1,
        .policy = &qv_route_score,
        .requests = {.max_queued = 16384,
                     .max_queued_per_adapter = 4096,
                     .max_bytes = 2048 * MIB,
                     .max_client_requests = 4096,
                     .max_client_bytes = 512 * MIB,
                     .max_answer_bytes = 64 * MIB},
        .placement = {.load_backoff_ms = 10000,
                      .load_timeout_ms = 120000,
                      .surplus_ms = 5000,
                      .rebalance_ms = 2000,
                      .grow_down_ms = 30000,
                      .max_moves = 4,
                      .orphan_ms = 30000},
        .client_limits = qv_protocol_default_limits,
        .worker_limits = {.max_bytes = 64 * MIB, .max_depth = 16, .max_nodes = 16 << 20},
        .heartbeat_ms = 1000,
        .timeout_ms = 5000,
        .max_worker_losses = 2,
        .max_queue_wait_ms = 300000,
        .cancel_confirm_ms = 2000,
        .orphan_timeout_ms = 60000,
        .max_spill_bytes = 8 * MIB,
        .max_spill_messages = 16384,
        .max_total_spill_bytes = 512 * MIB,
        .stalled_client_ms = 60000,
        .startup_grace_ms = 3000,
        .max_explained = 4096,
        .resume_ms = 30000,
        .max_kept_bytes = 256 * MIB,
        .store_timeout_ms = 5000,
    };
}

/* --- What placement asks for ------------------------------------------------------------------*/

static void send_load(void *user, qv_resident *resident)
{
    qv_core *core = user;
    const qv_group *group = resident->group;
    qv_message message = {.type = QV_MSG_LOAD_ADAPTER};
    message.load_adapter.epoch = resident->member->epoch;
    message.load_adapter.name = (qv_str){group->name, (uint32_t)group->name_size};
    message.load_adapter.path = qv_str_from(group->path);
    qv_set(&message.load_adapter, load_adapter, pin, group->pin);
    core->stats.loads++;
    qv_core_tell(core, resident->member, &message, core->ticked_us);
}

static void send_unload(void *user, qv_resident *resident)
{
    qv_core *core = user;
    const qv_group *group = resident->group;
    qv_message message = {.type = QV_MSG_UNLOAD_ADAPTER};
    message.unload_adapter.epoch = resident->member->epoch;
    message.unload_adapter.name = (qv_str){group->name, (uint32_t)group->name_size};
    if (resident->digest[0] != '\0')
        qv_set(&message.unload_adapter, unload_adapter, digest, qv_str_from(resident->digest));
    core->stats.unloads++;
    qv_core_tell(core, resident->member, &message, core->ticked_us);
}

/* What the worker would have done meanwhile; nothing as long as its rate is not known. The time is
 * the mean of such loads: that one was slow is not the tenant's fault. */
static void charge_load(void *user, const qv_resident *resident)
{
    qv_core *core = user;
    double cost = qv_expect_load_ms(resident->group) * qv_expect_rate(resident->member) / 1000;
    qv_tenant *tenant =
        qv_fair_require_tenant(&core->requests.fair, resident->cause, strlen(resident->cause));
    if (tenant != NULL && cost > 0)
        qv_fair_charge_load(tenant, resident->group, cost);
}

static void placement_event(void *user, const char *what, const qv_group *group,
                            const qv_member *member, const char *why)
{
    qv_core_event(user, what, group != NULL ? group->name : NULL,
                  member != NULL ? member->id : NULL, why);
}

void qv_core_event(qv_core *core, const char *what, const char *adapter, const char *worker,
                   const char *why)
{
    core->actions.event(core->actions.user, what, adapter, worker, why);
}

/* --- Life -------------------------------------------------------------------------------------*/

/* splitmix64 (Steele, Lea, Flood 2014): every state gives another number. */
uint64_t qv_core_random(qv_core *core)
{
    uint64_t z = core->random += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static qv_status send_to_client(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    qv_core *core = user;
    return core->actions.send_client(core->actions.user, peer, message);
}

qv_status qv_core_new(const qv_core_options *options, const qv_core_actions *actions,
                      uint64_t now_us, qv_core **out)
{
    qv_core *core = calloc(1, sizeof *core);
    if (core == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the broker");
    core->options = *options;
    core->actions = *actions;
    core->random = options->seed;
    core->started_us = core->ticked_us = now_us;
    qv_list_init(&core->lost);
    qv_arena_init(&core->arena, 0, 0);
    core->placement = (qv_placement){
        .pool = &core->pool,
        .options = options->placement,
        .actions = {.user = core,
                    .load = send_load,
                    .unload = send_unload,
                    .caused = charge_load,
                    .event = placement_event},
    };
    qv_core_set_redis(core, "none");
    core->drains = qv_map_new(0);
    core->poison = qv_map_new(0);
    if (core->drains == NULL || core->poison == NULL) {
        qv_core_free(core);
        return qv_fail(QV_ERR_NOMEM, "no memory for the broker");
    }
    /* Epochs stay below 2^63, so that any msgpack library of a worker can hold them. */
    qv_status status = qv_pool_init(&core->pool, qv_core_random(core) >> 2);
    if (status == QV_OK)
        status = qv_requests_init(&core->requests, &options->requests);
    if (status == QV_OK)
        status = qv_callers_init(&core->callers, options->max_spill_bytes,
                                 options->max_total_spill_bytes, send_to_client, core);
    core->callers.max_spill_messages = options->max_spill_messages;
    if (status == QV_OK)
        status = qv_keep_init(&core->keep, options->max_kept_bytes);
    if (status == QV_OK)
        status = qv_explain_init(&core->explain, (uint32_t)options->max_explained);
    if (status != QV_OK) {
        qv_core_free(core);
        return status;
    }
    *out = core;
    return QV_OK;
}

void qv_core_free(qv_core *core)
{
    if (core == NULL)
        return;
    qv_requests_deinit(&core->requests);
    qv_pool_deinit(&core->pool);
    qv_callers_deinit(&core->callers);
    qv_explain_deinit(&core->explain);
    qv_keep_deinit(&core->keep);
    qv_map_free(core->drains, NULL);
    qv_map_free(core->poison, NULL);
    qv_arena_deinit(&core->arena);
    free(core->redis);
    free(core);
}

void qv_core_set_redis(qv_core *core, const char *text)
{
    qv_text_set(&core->redis, text, strlen(text));
}

void qv_core_wants_known(qv_core *core)
{
    core->wants_known = true;
}

/* Apply or lift an order of people on a member. */
static void order_drain(qv_core *core, qv_member *member, bool drain, uint64_t now_us)
{
    member->drain_ordered = drain;
    member->drained = false;
    if (!qv_member_apply(member, drain ? QV_MEMBER_DRAINS : QV_MEMBER_RESUMES))
        return;
    qv_core_event(core, drain ? "worker_draining" : "worker_resumed", NULL, member->id,
                  drain ? "quiver:drain asks for it" : "quiver:drain does not ask for it any more");
    qv_placement_members_changed(&core->placement, now_us);
}

void qv_core_order_drain(qv_core *core, const char *id, bool drain, uint64_t now_us)
{
    qv_arena_reset(&core->arena);
    if (drain && qv_map_set_str(core->drains, id, core) != QV_OK)
        qv_core_event(core, "drain_ignored", NULL, id, qv_error());
    else if (!drain)
        qv_map_remove_str(core->drains, id);
    if (strcmp(id, core->options.id) == 0) {
        core->drain_ordered = drain;
        qv_core_event(core, drain ? "broker_draining" : "broker_resumed", NULL, NULL,
                      drain ? "quiver:drain asks for it" : NULL);
    }
    qv_member *member = qv_pool_find_id(&core->pool, id);
    if (member != NULL && member->drain_ordered != drain)
        order_drain(core, member, drain, now_us);
    qv_core_settle(core, now_us);
}

void qv_core_apply_orders(qv_core *core, qv_member *member, uint64_t now_us)
{
    if (qv_map_get_str(core->drains, member->id) != NULL)
        order_drain(core, member, true, now_us);
}

void qv_core_tenant(qv_core *core, const char *name, const qv_tenant_want *want, uint64_t now_us)
{
    qv_arena_reset(&core->arena);
    qv_tenant_policy policy = qv_tenant_default_policy;
    if (want != NULL)
        policy = (qv_tenant_policy){.weight = want->weight,
                                    .max_queued = want->max_queued,
                                    .max_running = want->max_running};
    if (qv_fair_set_policy(&core->requests.fair, name, want != NULL ? &policy : NULL) != QV_OK)
        qv_core_event(core, "tenant_ignored", NULL, NULL, qv_error());
    qv_core_settle(core, now_us);
}

void qv_core_set_sender(qv_core *core, const qv_identity *sender)
{
    core->sender = sender;
}

void qv_core_drain(qv_core *core)
{
    core->draining = true;
}

const qv_core_stats *qv_core_get_stats(const qv_core *core)
{
    return &core->stats;
}

const qv_pool *qv_core_pool(const qv_core *core)
{
    return &core->pool;
}

const qv_requests *qv_core_requests(const qv_core *core)
{
    return &core->requests;
}

int64_t qv_core_spill_bytes(const qv_core *core)
{
    return core->callers.spill_bytes;
}

int64_t qv_core_n_jobs(const qv_core *core)
{
    return core->requests.n_queued + core->requests.n_running + core->requests.n_parked;
}

/* --- Members ----------------------------------------------------------------------------------*/

void qv_core_note_lost(qv_core *core, qv_member *member, const char *why)
{
    if (qv_list_has(&member->lost_link))
        return;
    member->lost_why = why;
    qv_member_pause(member, true);
    qv_list_append(&core->lost, &member->lost_link);
}

bool qv_core_tell(qv_core *core, qv_member *member, const qv_message *message, uint64_t now_us)
{
    if (qv_list_has(&member->lost_link))
        return false;
    qv_status status = core->actions.send_worker(core->actions.user, &member->peer, message);
    if (status != QV_OK) {
        qv_core_note_lost(core, member,
                          status == QV_ERR_BUSY ? "it does not read" : "its connection is gone");
        return false;
    }
    member->told_us = now_us;
    return true;
}

static void requeue(qv_core *core, qv_job *job, uint64_t now_us)
{
    qv_job_apply(job, QV_JOB_REQUEUE);
    qv_explain_returned(&core->explain, job, "given back", now_us);
    /* One that workers refuse again and again has waited since it came. */
    uint64_t since_us = qv_job_has_begun(job) ? now_us : job->received_us;
    uint64_t at = since_us + (uint64_t)core->options.max_queue_wait_ms * QV_MS;
    if (job->deadline_us != 0 && job->deadline_us < at)
        at = job->deadline_us;
    if (qv_job_enqueue(job) != QV_OK || qv_job_set_timer(job, at) != QV_OK)
        qv_core_fail_job(core, job, QV_CODE_INTERNAL, qv_error(), 0, now_us);
    else
        qv_group_touch(job->group);
}

/* A job has lost its attempt: back to the queue, unless it was to end anyway or has lost too many.
 */
static void move_job(qv_core *core, qv_job *job, bool is_loss, uint32_t n_suspects, uint64_t now_us)
{
    if (job->abort != QV_ABORT_NONE) {
        qv_core_finish_aborted(core, job, now_us);
        return;
    }
    job->n_losses += is_loss;
    if (is_loss && n_suspects > 0 && !qv_core_may_go_on(core, job, n_suspects)) {
        qv_core_quarantine(core, job, now_us);
        return;
    }
    if (is_loss && n_suspects == 0 && job->n_losses >= (uint64_t)core->options.max_worker_losses) {
        char text[128];
        snprintf(text, sizeof text,
                 "%u workers were lost, or parts of their answers, while they ran this request",
                 job->n_losses);
        qv_core_fail_job(core, job, QV_CODE_WORKER_LOST, text, 0, now_us);
        return;
    }
    core->stats.moved += is_loss;
    requeue(core, job, now_us);
}

void qv_core_retry(qv_core *core, qv_job *job, bool is_loss, uint64_t now_us)
{
    qv_core_abort(core, job, "cancelled", now_us);
    if (job->attempt->n_left == 0)
        qv_attempt_free(job->attempt);
    else
        qv_attempt_orphan(job->attempt, now_us);
    move_job(core, job, is_loss, 0, now_us);
}

void qv_core_remove_member(qv_core *core, qv_member *member, const char *what, const char *why,
                           bool is_loss, uint64_t now_us)
{
    core->stats.workers_lost += is_loss;
    qv_core_event(core, what, NULL, member->id, why);
    qv_list_remove(&member->lost_link);
    qv_member_apply(member, QV_MEMBER_LOST);
    uint32_t n_suspects = is_loss ? qv_core_count_suspects(core, member) : 0;
    if (is_loss)
        qv_core_note_loss(core, member);
    while (!qv_list_is_empty(&member->attempts)) {
        qv_attempt *attempt = QV_LIST_ITEM(member->attempts.next, qv_attempt, member_link);
        qv_job *job = attempt->job;
        qv_attempt_free(attempt);
        if (job != NULL && is_loss)
            qv_core_blame(job, member);
        if (job != NULL)
            move_job(core, job, is_loss, n_suspects, now_us);
    }
    qv_member_free(member);
    qv_placement_members_changed(&core->placement, now_us);
}

/* --- Dispatch ---------------------------------------------------------------------------------*/

/* All tokens of a stream, from other brokers too. Count 0 without memory. */
static qv_ints delivered(qv_core *core, const qv_job_stream *stream)
{
    qv_ints own = qv_answer_tokens(&stream->answer);
    if (stream->n_prior == 0)
        return own;
    int32_t *all = QV_ARENA_ARRAY(&core->arena, int32_t, stream->n_prior + own.count);
    if (all == NULL)
        return (qv_ints){0};
    memcpy(all, stream->prior, stream->n_prior * sizeof *all);
    if (own.count > 0)
        memcpy(all + stream->n_prior, own.data, own.count * sizeof *all);
    return (qv_ints){all, stream->n_prior + own.count};
}

/* What each stream of a job that moves has delivered. Empty for one that has not begun. */
static qv_status fill_resume(qv_core *core, const qv_job *job, qv_msg_run *run)
{
    if (!qv_job_has_begun(job))
        return QV_OK;
    qv_msg_resume *rows = QV_ARENA_ARRAY(&core->arena, qv_msg_resume, job->n);
    if (rows == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to move a request");
    for (uint32_t i = 0; i < job->n; i++) {
        const qv_job_stream *stream = &job->streams[i];
        rows[i].index = i;
        rows[i].seq = stream->seq_in;
        rows[i].tokens = delivered(core, stream);
        qv_set(&rows[i], resume, finished, stream->finished);
    }
    run->resume.data = rows;
    run->resume.count = job->n;
    qv_mark(run, run, resume);
    return QV_OK;
}

/* Send a queued job to a member with credit. False: it is still queued, or has failed. */
static bool run_job(qv_core *core, qv_job *job, qv_member *member, uint64_t now_us)
{
    const qv_resident *resident =
        job->group != core->pool.base ? qv_resident_find(job->group, member) : NULL;
    qv_attempt *attempt;
    qv_message message = {.type = QV_MSG_RUN};
    qv_msg_run *run = &message.run;
    if (fill_resume(core, job, run) != QV_OK ||
        qv_attempt_new(job, member, now_us, &attempt) != QV_OK) {
        qv_core_fail_job(core, job, QV_CODE_INTERNAL, qv_error(), 0, now_us);
        return false;
    }
    run->epoch = member->epoch;
    run->request = attempt->number;
    run->submit = (qv_str){job->submit, (uint32_t)job->submit_size};
    run->seed = job->seed;
    if (resident != NULL && resident->digest[0] != '\0')
        qv_set(run, run, digest, qv_str_from(resident->digest));
    if (job->is_aliased)
        qv_set(run, run, adapter, ((qv_str){job->group->name, (uint32_t)job->group->name_size}));
    if (!qv_core_tell(core, member, &message, now_us)) {
        qv_attempt_free(attempt);
        return false;
    }
    qv_job_dequeue(job);
    qv_job_apply(job, QV_JOB_DISPATCH);
    if (resident != NULL)
        memcpy(job->digest, resident->digest, sizeof job->digest);
    qv_fair_charge(job);
    attempt->work = qv_fair_cost(job->n_prompt, job->n_answer - (double)job->n_out);
    member->work += attempt->work;
    qv_prefix_remember(member->prefix, &job->prefix);
    qv_explain_sent(&core->explain, job, member, now_us);
    core->stats.dispatched++;
    if (job->dispatched_us == 0) {
        job->dispatched_us = now_us;
        core->actions.observe(core->actions.user, QV_CORE_QUEUE, now_us - job->received_us);
    }
    if (qv_job_set_timer(job, job->deadline_us) != QV_OK)
        qv_core_fail_job(core, job, QV_CODE_INTERNAL, qv_error(), 0, now_us);
    return true;
}

/* Whether a job that has begun can never go on, since the adapter that began it was replaced. */
static bool is_stranded(const qv_job *job)
{
    if (job->group->n_ready == 0)
        return false;
    QV_LIST_EACH(&job->group->residents, qv_resident, group_link, resident)
    if (resident->state == QV_RESIDENT_READY && strcmp(resident->digest, job->digest) == 0)
        return false;
    return true;
}

static qv_route choose(qv_core *core, qv_job *job, bool has_begun, uint64_t now_us)
{
    qv_route_trace trace = {0};
    const qv_route_query query = {.pool = &core->pool,
                                  .group = job->group,
                                  .digest = has_begun ? job->digest : "",
                                  .prompt_tokens = job->n_prompt,
                                  .prefix = &job->prefix,
                                  .random = qv_core_random(core),
                                  .now_us = now_us,
                                  .trace = &trace};
    qv_route route = core->options.policy->choose(&query);
    qv_explain_decided(&core->explain, job, &route, &trace, now_us);
    return route;
}

static qv_wait reason_to_wait(const qv_core *core, const qv_group *group)
{
    if (core->pool.n_members[QV_MEMBER_READY] == 0)
        return QV_WAIT_WORKER;
    return group == core->pool.base || group->n_ready > 0 ? QV_WAIT_CREDIT : QV_WAIT_LOAD;
}

/* Give the first request of a lane to a member, or block the lane. */
static void dispatch_job(qv_core *core, qv_job *job, uint64_t now_us)
{
    qv_group *group = job->group;
    bool has_begun = job->digest[0] != '\0' && (job->held || qv_job_has_begun(job));
    if (has_begun && is_stranded(job)) {
        qv_core_fail_job(core, job, QV_CODE_WORKER_LOST,
                         "the worker was lost, and its version of the adapter with it", 0, now_us);
        return;
    }
    qv_route route = choose(core, job, has_begun, now_us);
    if (route.verdict == QV_ROUTE_SEND && job->alone)
        route.member = qv_core_place_alone(core, job, route.member);
    if (route.verdict == QV_ROUTE_SEND && route.member != NULL) {
        QV_ASSERT(qv_member_credit(route.member) > 0);
        run_job(core, job, route.member, now_us);
        return;
    }
    if (route.verdict == QV_ROUTE_LOAD)
        qv_placement_demand(&core->placement, group, route.member, job->tenant->name, now_us);
    qv_explain_waits(&core->explain, job, reason_to_wait(core, group), now_us);
    qv_fair_block(job);
}

/* Send what can be sent, in the order of broker/fair.h. Without any credit everything waits as it
 * is: the first credit to come back wakes whoever waits for it. */
static void dispatch(qv_core *core, uint64_t now_us)
{
    qv_list *woken = &core->pool.woken;
    while (!qv_list_is_empty(woken)) {
        qv_group *group = QV_LIST_ITEM(woken->next, qv_group, woken);
        qv_list_remove(&group->woken);
        qv_fair_unblock(group);
    }
    qv_job *job;
    while (core->pool.free_credit > 0 && (job = qv_fair_next(&core->requests.fair)) != NULL)
        dispatch_job(core, job, now_us);
}

/* --- Settling ---------------------------------------------------------------------------------*/

/* Requests that wait for an adapter that will not come. */
static void fail_hopeless(qv_core *core, qv_group *group, uint64_t now_us)
{
    qv_code code;
    const char *why;
    int64_t retry_ms;
    bool is_forgotten = qv_placement_is_forgotten(&core->placement, group, now_us);
    if (group->n_queued == 0 ||
        (qv_group_accepts(group, now_us, &code, &why, &retry_ms) && !is_forgotten))
        return;
    char text[512];
    snprintf(text, sizeof text, "adapter %s: %s", group->name, why != NULL ? why : "not there");
    qv_job *job;
    while ((job = qv_fair_any(group)) != NULL)
        qv_core_fail_job(core, job, code, text, retry_ms, now_us);
}

static void reconcile(qv_core *core, qv_group *group, uint64_t now_us)
{
    qv_list_remove(&group->dirty_link);
    qv_placement_reconcile(&core->placement, group, now_us);
    fail_hopeless(core, group, now_us);
    qv_group_wake(group);
    bool is_forgotten = group->orphan_us == 0 || group->deleted ||
                        qv_placement_is_forgotten(&core->placement, group, now_us);
    if (qv_group_is_idle(group) && is_forgotten) {
        core->actions.retract(core->actions.user, group->name);
        qv_group_free(group);
    } else {
        core->actions.publish(core->actions.user, group);
    }
}

static void drop_caller(qv_core *core, qv_caller *caller, uint64_t now_us)
{
    core->stats.clients_lost += caller->n_jobs > 0;
    qv_list_remove(&caller->gone_link);
    qv_list_remove(&caller->flow_link);
    qv_core_lose_client(core, caller, now_us);
    qv_requests_bury(&core->requests);
    qv_caller_free(caller);
}

void qv_core_settle(qv_core *core, uint64_t now_us)
{
    qv_list *flow = &core->callers.flow;
    qv_list *gone = &core->callers.gone, *lost = &core->lost, *dirty = &core->pool.dirty;
    for (;;) {
        dispatch(core, now_us);
        if (!qv_list_is_empty(gone)) {
            drop_caller(core, QV_LIST_ITEM(gone->next, qv_caller, gone_link), now_us);
        } else if (!qv_list_is_empty(flow)) {
            qv_core_on_flow(core, QV_LIST_ITEM(flow->next, qv_caller, flow_link), now_us);
        } else if (!qv_list_is_empty(lost)) {
            qv_member *member = QV_LIST_ITEM(lost->next, qv_member, lost_link);
            qv_core_remove_member(core, member, "worker_lost", member->lost_why, true, now_us);
        } else if (!qv_list_is_empty(dirty)) {
            reconcile(core, QV_LIST_ITEM(dirty->next, qv_group, dirty_link), now_us);
        } else {
            break;
        }
    }
    qv_requests_bury(&core->requests);
}

/* --- Time -------------------------------------------------------------------------------------*/

static void on_timer(qv_core *core, qv_job *job, uint64_t now_us)
{
    bool is_late = job->deadline_us != 0 && job->deadline_us <= now_us;
    qv_job_set_timer(job,
                     0); /* a job whose client turns out to be gone stays until it is settled */
    if (job->abort != QV_ABORT_NONE) {
        qv_core_finish_aborted(core, job, now_us);
    } else if (job->state == QV_JOB_PARKED && !is_late) {
        qv_core_on_parked_timer(core, job, now_us);
    } else if ((job->state != QV_JOB_QUEUED && job->state != QV_JOB_PARKED) ||
               (is_late && qv_job_has_begun(job))) {
        qv_core_begin_abort(core, job, QV_ABORT_DEADLINE, now_us);
    } else if (is_late) {
        qv_core_fail_job(core, job, QV_CODE_DEADLINE,
                         "the deadline passed while the request waited for a worker", 0, now_us);
    } else {
        char text[160];
        snprintf(text, sizeof text, "no worker could take the request within %lld ms",
                 (long long)core->options.max_queue_wait_ms);
        qv_core_fail_job(core, job, QV_CODE_OVERLOADED, text, qv_requests_retry_ms(&core->requests),
                         now_us);
    }
}

static void tick_member(qv_core *core, qv_member *member, uint64_t now_us)
{
    uint64_t timeout_us = (uint64_t)core->options.timeout_ms * QV_MS;
    uint64_t quiet_us = now_us - member->heard_us;
    if (quiet_us >= timeout_us) {
        qv_core_note_lost(core, member, "it was silent for too long");
        return;
    }
    if (quiet_us >= timeout_us / 2 && qv_member_apply(member, QV_MEMBER_QUIET))
        qv_core_event(core, "worker_suspect", NULL, member->id, "it is silent");
    if (now_us - member->told_us >= (uint64_t)core->options.heartbeat_ms * QV_MS) {
        qv_message message = {.type = QV_MSG_PING};
        message.ping.epoch = member->epoch;
        qv_core_tell(core, member, &message, now_us);
    }
}

/* An attempt that its worker neither ends nor forgets must not hold credit for ever. */
static void tick_orphans(qv_core *core, uint64_t now_us)
{
    uint64_t timeout_us = (uint64_t)core->options.orphan_timeout_ms * QV_MS;
    QV_LIST_EACH(&core->requests.orphans, qv_attempt, orphan_link, attempt)
    {
        if (now_us - attempt->orphan_us < timeout_us)
            break;
        qv_core_event(core, "attempt_abandoned", NULL, attempt->member->id,
                      "the worker did not confirm that a request stopped");
        qv_attempt_free(attempt);
    }
}

/* Messages can be lost when a connection breaks and comes back unnoticed. A worker that has been
 * idle for long does not run what was sent to it before. */
static void tick_idle(qv_core *core, qv_member *member, uint64_t now_us)
{
    uint64_t timeout_us = (uint64_t)core->options.orphan_timeout_ms * QV_MS;
    if (member->idle_us == 0 || now_us - member->idle_us < timeout_us)
        return;
    QV_LIST_EACH(&member->attempts, qv_attempt, member_link, attempt)
    {
        if (attempt->active_us > member->idle_us)
            continue;
        qv_core_event(core, "attempt_abandoned", NULL, member->id,
                      "the worker is idle and does not run what it was sent");
        attempt->n_left = 0;
        if (attempt->job != NULL)
            qv_core_retry(core, attempt->job, true, now_us);
        else
            qv_attempt_free(attempt);
    }
}

void qv_core_tick(qv_core *core, uint64_t now_us)
{
    /* Time in which we did not run ourselves says nothing about the workers. */
    uint64_t gap_us = now_us - core->ticked_us;
    bool was_stopped = gap_us > (uint64_t)core->options.heartbeat_ms * QV_MS;
    core->ticked_us = now_us;
    qv_arena_reset(&core->arena);

    qv_callers_flush(&core->callers, core->options.stalled_client_ms, now_us);
    qv_job *job;
    while ((job = qv_heap_top(&core->requests.timers)) != NULL && job->timer_us <= now_us)
        on_timer(core, job, now_us);
    QV_LIST_EACH(&core->pool.members, qv_member, link, member)
    {
        if (was_stopped) /* some have been heard since, before this tick */
            member->heard_us =
                member->heard_us + gap_us < now_us ? member->heard_us + gap_us : now_us;
        tick_member(core, member, now_us);
        tick_idle(core, member, now_us);
        if (member->drain_ordered && !member->drained && member->n_attempts == 0) {
            member->drained = true;
            qv_core_event(core, "worker_drained", NULL, member->id,
                          "nothing runs on it any more: it may be stopped");
        }
    }
    tick_orphans(core, now_us);
    qv_keep_tick(&core->keep, now_us);
    qv_requests_tick(&core->requests, now_us);
    qv_measure_tick(&core->pool, now_us);
    if (now_us - core->second_us >= 1000 * QV_MS) {
        core->second_us = now_us;
        qv_fair_tick(&core->requests.fair);
        qv_controller_tick(&core->placement, now_us);
    }
    if (now_us - core->placed_us >= PLACEMENT_TICK_US) {
        core->placed_us = now_us;
        qv_placement_tick(&core->placement, now_us);
    }
    qv_core_settle(core, now_us);
}

void qv_core_fail_all(qv_core *core, uint64_t now_us)
{
    QV_MAP_EACH(core->requests.by_id, entry)
    {
        qv_job *job = entry->value;
        if (!job->durable || job->park == QV_PARK_STORING)
            qv_core_fail_job(core, job, QV_CODE_OVERLOADED, "the broker is stopping", 1000, now_us);
    }
    qv_core_settle(core, now_us);
}

/* --- Inputs -----------------------------------------------------------------------------------*/

void qv_core_from_client(qv_core *core, const qv_mq_peer *peer, const void *data, size_t size,
                         uint64_t now_us)
{
    qv_arena_reset(&core->arena);
    qv_message message = {0};
    qv_status status = qv_message_decode(data, size, QV_FROM_CLIENT, &core->options.client_limits,
                                         &core->arena, &message);
    if (status == QV_OK) {
        qv_core_handle_client(core, peer, &message, data, size, now_us);
    } else {
        core->stats.malformed_client++;
        qv_core_refuse(core, peer, message.id, qv_code_of_status(status), qv_error(), 0, now_us);
    }
    qv_core_settle(core, now_us);
}

void qv_core_client_garbage(qv_core *core, const qv_mq_peer *peer, uint64_t now_us)
{
    qv_arena_reset(&core->arena);
    core->stats.malformed_client++;
    qv_core_refuse(core, peer, (qv_str){0}, QV_CODE_BAD_REQUEST, qv_error(), 0, now_us);
    qv_core_settle(core, now_us);
}

void qv_core_from_worker(qv_core *core, const qv_mq_peer *peer, const void *data, size_t size,
                         uint64_t now_us)
{
    qv_arena_reset(&core->arena);
    qv_message message;
    if (qv_message_decode(data, size, QV_FROM_WORKER, &core->options.worker_limits, &core->arena,
                          &message) != QV_OK) {
        qv_core_worker_garbage(core, peer, now_us);
        return;
    }
    qv_core_handle_worker(core, peer, &message, now_us);
    qv_core_settle(core, now_us);
}

/* It may have carried tokens: what the member runs goes on elsewhere, and it has to register again.
 */
void qv_core_worker_garbage(qv_core *core, const qv_mq_peer *peer, uint64_t now_us)
{
    core->stats.malformed_worker++;
    qv_member *member = qv_pool_find_peer(&core->pool, peer);
    qv_core_event(core, "worker_malformed", NULL, member != NULL ? member->id : NULL, qv_error());
    if (member != NULL)
        qv_core_note_lost(core, member, "it sent a malformed message");
    qv_core_settle(core, now_us);
}

void qv_core_client_gone(qv_core *core, const qv_mq_peer *peer, uint64_t now_us)
{
    qv_caller *caller = qv_callers_find(&core->callers, peer);
    if (caller != NULL)
        qv_caller_lose(caller);
    qv_core_settle(core, now_us);
}

void qv_core_client_busy(qv_core *core, const qv_mq_peer *peer, const void *data, size_t size,
                         uint64_t now_us)
{
    qv_message message;
    qv_arena_reset(&core->arena);
    qv_status status =
        qv_message_decode(data, size, QV_TO_CLIENT, &qv_callers_own_limits, &core->arena, &message);
    QV_ASSERT(status == QV_OK);
    qv_caller *caller = qv_callers_require(&core->callers, peer);
    if (caller == NULL || caller->gone)
        return;
    qv_job *job = message.id.size > 0
                      ? qv_requests_find(&core->requests, caller, message.id.data, message.id.size)
                      : NULL;
    /* What a request said last is kept in any case; of one that goes on there may be too much. */
    bool must = job == NULL && message.id.size > 0;
    status = qv_caller_keep(caller, job != NULL ? job->serial : 0, &message, must, now_us);
    if (status != QV_OK && job != NULL)
        qv_core_fail_job(core, job, QV_CODE_OVERLOADED, qv_error(), 0, now_us);
    qv_caller_release(caller);
    qv_core_settle(core, now_us);
}

void qv_core_worker_gone(qv_core *core, const qv_mq_peer *peer, uint64_t now_us)
{
    qv_member *member = qv_pool_find_peer(&core->pool, peer);
    if (member != NULL)
        qv_core_note_lost(core, member, "its connection is gone");
    qv_core_settle(core, now_us);
}

void qv_core_want(qv_core *core, const char *name, const qv_want *want, uint64_t now_us)
{
    qv_arena_reset(&core->arena);
    if (qv_placement_set_want(&core->placement, name, want) != QV_OK)
        qv_core_event(core, "want_ignored", name, NULL, qv_error());
    qv_core_settle(core, now_us);
}

void qv_core_invalid_want(qv_core *core, const char *name, const char *reason, uint64_t now_us)
{
    qv_arena_reset(&core->arena);
    if (qv_placement_invalid_want(&core->placement, name, reason) != QV_OK)
        qv_core_event(core, "want_ignored", name, NULL, qv_error());
    qv_core_settle(core, now_us);
}
