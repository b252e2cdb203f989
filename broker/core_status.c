/* What `quiver status` prints, and the checks of the books. */
#include "broker/core_internal.h"

#include <string.h>

/* --- Status -----------------------------------------------------------------------------------*/

static qv_str text_of(const char *text)
{
    return qv_str_from(text != NULL ? text : "");
}

static qv_status no_memory(void)
{
    return qv_fail(QV_ERR_NOMEM, "no memory for the status");
}

static size_t count_list(const qv_list *list)
{
    size_t n = 0;
    for (const qv_list *node = list->next; node != list; node = node->next)
        n++;
    return n;
}

static qv_status fill_worker(qv_core *core, const qv_member *member, qv_msg_worker_status *out,
                             uint64_t now_us)
{
    out->id = qv_str_from(member->id);
    out->state = qv_str_from(qv_member_state_name(member->state));
    out->model = text_of(member->model);
    out->backend = text_of(member->backend);
    out->adapters.data = QV_ARENA_ARRAY(&core->arena, qv_str, count_list(&member->residents));
    if (out->adapters.data == NULL)
        return no_memory();
    QV_LIST_EACH(&member->residents, qv_resident, member_link, resident)
    if (resident->state == QV_RESIDENT_READY)
        out->adapters.data[out->adapters.count++] = qv_str_from(resident->group->name);
    out->running = member->running;
    out->waiting = member->waiting;
    out->capacity = member->capacity;
    out->in_flight = member->n_attempts;
    out->adapter_slots = member->adapter_slots;
    out->free_pages = member->free_pages;
    out->total_pages = member->total_pages;
    out->heartbeat_age_ms = (int64_t)((now_us - member->heard_us) / QV_MS);
    out->tokens_per_second = member->tokens_per_second;
    return QV_OK;
}

/* Digest and rank of an adapter: of any member that has it. */
static const qv_resident *any_ready(const qv_group *group)
{
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    if (resident->state == QV_RESIDENT_READY)
        return resident;
    return NULL;
}

static qv_status fill_adapter(qv_core *core, const qv_group *group, qv_msg_adapter_status *out)
{
    const qv_resident *ready = any_ready(group);
    const char *path = group->path != NULL ? group->path : ready != NULL ? ready->path : NULL;
    const char *reason = qv_group_reason(group);
    out->name = (qv_str){group->name, (uint32_t)group->name_size};
    out->state = qv_str_from(qv_group_state(group));
    if (path != NULL)
        qv_set(out, adapter_status, path, qv_str_from(path));
    if (ready != NULL && ready->digest[0] != '\0')
        qv_set(out, adapter_status, digest, qv_str_from(ready->digest));
    if (ready != NULL)
        qv_set(out, adapter_status, rank, ready->rank);
    out->replicas_wanted = group->replicas;
    out->pin = group->pin;
    out->workers.data = QV_ARENA_ARRAY(&core->arena, qv_str, count_list(&group->residents));
    if (out->workers.data == NULL)
        return no_memory();
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    if (resident->state == QV_RESIDENT_READY)
        out->workers.data[out->workers.count++] = qv_str_from(resident->member->id);
    out->queued = group->n_queued;
    if (reason != NULL)
        qv_set(out, adapter_status, reason, qv_str_from(reason));
    return QV_OK;
}

qv_status qv_core_fill_status(qv_core *core, qv_msg_status *out, uint64_t now_us)
{
    out->broker = qv_str_from(core->options.id);
    out->version = text_of(core->options.version);
    out->uptime_ms = (int64_t)((now_us - core->started_us) / QV_MS);
    out->redis = text_of(core->redis);
    out->queued = core->requests.n_queued;
    out->in_flight = core->requests.n_running;
    out->queue_limit = core->options.requests.max_queued;
    out->workers.data =
        QV_ARENA_ARRAY(&core->arena, qv_msg_worker_status, count_list(&core->pool.members));
    out->adapters.data =
        QV_ARENA_ARRAY(&core->arena, qv_msg_adapter_status, count_list(&core->pool.groups));
    if (out->workers.data == NULL || out->adapters.data == NULL)
        return no_memory();
    QV_LIST_EACH(&core->pool.members, qv_member, link, member)
    QV_TRY(fill_worker(core, member, &out->workers.data[out->workers.count++], now_us));
    QV_LIST_EACH(&core->pool.groups, qv_group, link, group)
    if (group != core->pool.base)
        QV_TRY(fill_adapter(core, group, &out->adapters.data[out->adapters.count++]));
    return QV_OK;
}

/* --- Checks -----------------------------------------------------------------------------------*/

#define CHECK(cond, ...)                                                                           \
    do {                                                                                           \
        if (!(cond))                                                                               \
            return qv_fail(QV_ERR_INTERNAL, __VA_ARGS__);                                          \
    } while (0)

static qv_status check_members(const qv_core *core, size_t *n_attempts)
{
    const qv_pool *pool = &core->pool;
    int64_t credit = 0;
    size_t n = 0;
    QV_LIST_EACH(&pool->members, qv_member, link, member)
    {
        size_t attempts = count_list(&member->attempts);
        int64_t slots = 0;
        CHECK((int64_t)attempts == member->n_attempts, "%s: %zu attempts, counted %lld", member->id,
              attempts, (long long)member->n_attempts);
        CHECK(member->n_attempts <= member->capacity, "%s: %lld attempts for a capacity of %lld",
              member->id, (long long)member->n_attempts, (long long)member->capacity);
        CHECK(member->state != QV_MEMBER_GONE, "%s: gone but here", member->id);
        CHECK(member->credit >= 0, "%s: credit %lld", member->id, (long long)member->credit);
        CHECK(qv_pool_find_peer(pool, &member->peer) == member, "%s: not found by peer",
              member->id);
        CHECK(qv_pool_find_id(pool, member->id) == member, "%s: not found by id", member->id);
        QV_LIST_EACH(&member->residents, qv_resident, member_link, resident)
        {
            slots += resident->state != QV_RESIDENT_FAILED;
            CHECK(qv_resident_find(resident->group, member) == resident, "%s: resident of %s lost",
                  member->id, resident->group->name);
        }
        CHECK(slots == member->n_slots, "%s: %lld slots, counted %lld", member->id,
              (long long)slots, (long long)member->n_slots);
        credit += member->credit;
        n++;
        *n_attempts += attempts;
    }
    CHECK(credit == pool->free_credit, "credit %lld, counted %lld", (long long)credit,
          (long long)pool->free_credit);
    size_t by_state = 0;
    for (int state = 0; state < QV_MEMBER_STATE_COUNT; state++)
        by_state += pool->n_members[state];
    CHECK(by_state == n, "%zu members, %zu by state", n, by_state);
    return QV_OK;
}

static qv_status check_groups(const qv_core *core)
{
    size_t queued = 0, jobs = 0;
    QV_LIST_EACH(&core->pool.groups, qv_group, link, group)
    {
        uint32_t n_ready = 0;
        QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
        {
            qv_member_state state = resident->member->state;
            n_ready += resident->state == QV_RESIDENT_READY &&
                       (state == QV_MEMBER_READY || state == QV_MEMBER_SUSPECT);
        }
        CHECK(n_ready == group->n_ready, "%s: %u ready, counted %u", group->name, n_ready,
              group->n_ready);
        CHECK(!qv_list_has(&group->woken) || core->pool.free_credit == 0 || group->n_queued == 0,
              "%s: woken but not looked at", group->name);
        CHECK(!qv_list_has(&group->dirty_link), "%s: not reconciled", group->name);
        queued += group->n_queued;
        jobs += group->n_jobs;
    }
    CHECK((int64_t)queued == core->requests.n_queued, "%zu queued, counted %lld", queued,
          (long long)core->requests.n_queued);
    CHECK((int64_t)jobs == qv_core_n_jobs(core), "%zu jobs in groups, counted %lld", jobs,
          (long long)qv_core_n_jobs(core));
    return QV_OK;
}

static qv_status check_jobs(const qv_core *core, size_t n_attempts)
{
    const qv_requests *requests = &core->requests;
    size_t running = 0, n = 0;
    int64_t bytes = 0;
    QV_MAP_EACH(requests->by_id, entry)
    {
        const qv_job *job = entry->value;
        bool is_running = job->state == QV_JOB_DISPATCHED || job->state == QV_JOB_STREAMING;
        CHECK(is_running || job->state == QV_JOB_QUEUED || job->state == QV_JOB_PARKED,
              "%s: %s but in flight", job->id, qv_job_state_name(job->state));
        CHECK(is_running == (job->attempt != NULL), "%s: %s, attempt %p", job->id,
              qv_job_state_name(job->state), (const void *)job->attempt);
        CHECK(!is_running || job->attempt->job == job, "%s: attempt of another", job->id);
        CHECK(job->n_finished < job->n, "%s: all streams ended but in flight", job->id);
        CHECK((job->state == QV_JOB_PARKED) == (job->park != QV_PARK_NONE), "%s: %s, parked %d",
              job->id, qv_job_state_name(job->state), job->park);
        CHECK(!job->caller->gone, "%s: its client is gone", job->id);
        running += is_running;
        bytes += (int64_t)job->bytes;
        n++;
    }
    CHECK((int64_t)n == qv_core_n_jobs(core), "%zu jobs, counted %lld", n,
          (long long)qv_core_n_jobs(core));
    CHECK((int64_t)running == requests->n_running, "%zu running, counted %lld", running,
          (long long)requests->n_running);
    CHECK(bytes == requests->bytes, "%lld bytes, counted %lld", (long long)bytes,
          (long long)requests->bytes);
    size_t orphans = count_list(&requests->orphans);
    CHECK(orphans == requests->n_orphans, "%zu orphans, counted %u", orphans, requests->n_orphans);
    CHECK(running + orphans == n_attempts, "%zu running and %zu orphans for %zu attempts", running,
          orphans, n_attempts);
    CHECK(n_attempts + requests->n_free == requests->n_slots, "%zu attempts, %u free of %u slots",
          n_attempts, requests->n_free, requests->n_slots);
    return QV_OK;
}

static qv_status check_callers(const qv_core *core)
{
    int64_t spill = 0, jobs = 0;
    QV_LIST_EACH(&core->callers.all, qv_caller, link, caller)
    {
        size_t n = count_list(&caller->jobs);
        CHECK((int64_t)n == caller->n_jobs, "a client has %zu jobs, counted %lld", n,
              (long long)caller->n_jobs);
        CHECK(n > 0 || !qv_list_is_empty(&caller->spill) || caller->serial == 0,
              "a client without anything is kept");
        CHECK((caller->spill_bytes > 0) == qv_list_has(&caller->spill_link),
              "a client with %lld bytes spilled, listed %d", (long long)caller->spill_bytes,
              qv_list_has(&caller->spill_link));
        spill += caller->spill_bytes;
        jobs += caller->n_jobs;
    }
    CHECK(spill == core->callers.spill_bytes, "%lld bytes spilled, counted %lld", (long long)spill,
          (long long)core->callers.spill_bytes);
    CHECK(jobs == qv_core_n_jobs(core), "%lld jobs of clients, counted %lld", (long long)jobs,
          (long long)qv_core_n_jobs(core));
    return QV_OK;
}

qv_status qv_core_check(const qv_core *core)
{
    size_t n_attempts = 0;
    QV_TRY(check_members(core, &n_attempts));
    QV_TRY(check_groups(core));
    QV_TRY(check_jobs(core, n_attempts));
    QV_TRY(check_callers(core));
    return qv_fair_check(&core->requests.fair);
}
