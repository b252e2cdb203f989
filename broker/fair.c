/* Tenants lie in one heap by counter, the lanes of a tenant in another. Counters change only while
 * their owner is out of its heap, or the owner is put in anew. */
#include "broker/fair.h"

#include "broker/requests.h"

#include <stdlib.h>
#include <string.h>

#define OTHER      "(other)"
#define MIN_WEIGHT 0.001

const qv_tenant_policy qv_tenant_default_policy = {.weight = 1};

/* --- Orders -----------------------------------------------------------------------------------*/

static bool tenant_before(const void *a, const void *b)
{
    const qv_tenant *x = a, *y = b;
    return x->counter != y->counter ? x->counter < y->counter : x->turn < y->turn;
}

static double lane_key(const qv_lane *lane)
{
    const qv_job *head = qv_heap_top(&lane->jobs);
    double priority = head != NULL ? head->priority : 0;
    return lane->counter - priority * QV_FAIR_PRIORITY_COST;
}

static bool lane_before(const void *a, const void *b)
{
    const qv_lane *x = a, *y = b;
    double key_x = lane_key(x), key_y = lane_key(y);
    return key_x != key_y ? key_x < key_y : x->turn < y->turn;
}

/* --- Places -----------------------------------------------------------------------------------*/

static bool is_held(const qv_tenant *tenant)
{
    return tenant->policy.max_running > 0 && tenant->n_running >= tenant->policy.max_running;
}

/* Room was made when the tenant or lane was made. */
static void must_push(qv_heap *heap, void *item)
{
    qv_status status = qv_heap_push(heap, item);
    QV_ASSERT(status == QV_OK);
}

static void place_tenant(qv_tenant *tenant)
{
    qv_heap *ready = &tenant->fair->ready;
    qv_heap_remove(ready, tenant);
    if (tenant->lanes.n > 0 && !is_held(tenant))
        must_push(ready, tenant);
}

static void place_lane(qv_lane *lane)
{
    qv_tenant *tenant = lane->tenant;
    qv_heap_remove(&tenant->lanes, lane);
    if (lane->jobs.n > 0 && !lane->blocked)
        must_push(&tenant->lanes, lane);
    place_tenant(tenant);
}

/* --- Tenants ----------------------------------------------------------------------------------*/

qv_status qv_fair_init(qv_fair *fair)
{
    *fair = (qv_fair){0};
    qv_list_init(&fair->all);
    qv_heap_init(&fair->ready, offsetof(qv_tenant, place), tenant_before);
    fair->by_name = qv_map_new(0);
    return fair->by_name != NULL ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory for tenants");
}

static void free_lane(qv_lane *lane)
{
    QV_ASSERT(lane->jobs.n == 0);
    lane->tenant->n_lanes--;
    qv_heap_remove(&lane->tenant->lanes, lane);
    qv_list_remove(&lane->tenant_link);
    qv_list_remove(&lane->group_link);
    qv_heap_deinit(&lane->jobs);
    free(lane);
}

static void free_tenant(qv_tenant *tenant)
{
    QV_LIST_EACH(&tenant->all_lanes, qv_lane, tenant_link, lane)
    free_lane(lane);
    qv_heap_remove(&tenant->fair->ready, tenant);
    qv_heap_deinit(&tenant->lanes);
    qv_map_remove_str(tenant->fair->by_name, tenant->name);
    qv_list_remove(&tenant->link);
    free(tenant);
}

void qv_fair_deinit(qv_fair *fair)
{
    if (fair->all.next == NULL)
        return;
    QV_LIST_EACH(&fair->all, qv_tenant, link, tenant)
    free_tenant(tenant);
    qv_heap_deinit(&fair->ready);
    qv_map_free(fair->by_name, NULL);
    *fair = (qv_fair){0};
}

static qv_tenant *new_tenant(qv_fair *fair, const char *name)
{
    qv_tenant *tenant = calloc(1, sizeof *tenant);
    if (tenant == NULL)
        return NULL;
    tenant->fair = fair;
    tenant->place = QV_HEAP_NONE;
    tenant->policy = qv_tenant_default_policy;
    tenant->counter = fair->virtual_now;
    snprintf(tenant->name, sizeof tenant->name, "%s", name);
    qv_list_init(&tenant->all_lanes);
    qv_heap_init(&tenant->lanes, offsetof(qv_lane, place), lane_before);
    if (qv_heap_reserve(&fair->ready, (uint32_t)qv_map_count(fair->by_name) + 1) != QV_OK ||
        qv_map_set_str(fair->by_name, tenant->name, tenant) != QV_OK) {
        free(tenant);
        return NULL;
    }
    qv_list_append(&fair->all, &tenant->link);
    return tenant;
}

qv_tenant *qv_fair_require_tenant(qv_fair *fair, const char *name, size_t size)
{
    char text[QV_TENANT_MAX_NAME + 1];
    qv_text_copy(text, sizeof text, name, size);
    qv_tenant *tenant = qv_map_get_str(fair->by_name, text);
    if (tenant != NULL)
        return tenant;
    if (qv_map_count(fair->by_name) >= QV_FAIR_MAX_TENANTS) {
        tenant = qv_map_get_str(fair->by_name, OTHER);
        return tenant != NULL ? tenant : new_tenant(fair, OTHER);
    }
    return new_tenant(fair, text);
}

qv_status qv_fair_set_policy(qv_fair *fair, const char *name, const qv_tenant_policy *policy)
{
    qv_tenant *tenant = qv_map_get_str(fair->by_name, name);
    if (tenant == NULL && policy == NULL)
        return QV_OK;
    if (tenant == NULL)
        tenant = new_tenant(fair, name);
    if (tenant == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for tenant %s", name);
    tenant->policy = policy != NULL ? *policy : qv_tenant_default_policy;
    if (!(tenant->policy.weight >= MIN_WEIGHT))
        tenant->policy.weight = MIN_WEIGHT;
    tenant->configured = policy != NULL;
    place_tenant(tenant);
    return QV_OK;
}

qv_status qv_tenant_check(const qv_tenant *tenant)
{
    int64_t limit = tenant->policy.max_queued;
    if (limit > 0 && tenant->n_queued >= limit)
        return qv_fail(QV_ERR_BUSY, "tenant '%s' has %lld requests waiting, its limit",
                       tenant->name, (long long)tenant->n_queued);
    return QV_OK;
}

/* --- Lanes ------------------------------------------------------------------------------------*/

static bool job_before(const void *a, const void *b)
{
    const qv_job *x = a, *y = b;
    return x->rank_us != y->rank_us ? x->rank_us < y->rank_us : x->serial < y->serial;
}

/* The lane of a tenant and a group; whichever of the two has fewer is searched. */
static qv_lane *find_lane(const qv_tenant *tenant, const qv_group *group)
{
    const qv_list *a = tenant->all_lanes.next, *b = group->lanes.next;
    for (; a != &tenant->all_lanes && b != &group->lanes; a = a->next, b = b->next) {
        qv_lane *by_tenant = QV_LIST_ITEM(a, qv_lane, tenant_link);
        qv_lane *by_group = QV_LIST_ITEM(b, qv_lane, group_link);
        if (by_tenant->group == group)
            return by_tenant;
        if (by_group->tenant == tenant)
            return by_group;
    }
    return NULL;
}

static qv_lane *require_lane(qv_tenant *tenant, qv_group *group)
{
    qv_lane *lane = find_lane(tenant, group);
    if (lane != NULL)
        return lane;
    lane = calloc(1, sizeof *lane);
    if (lane == NULL)
        return NULL;
    lane->tenant = tenant;
    lane->group = group;
    lane->place = QV_HEAP_NONE;
    lane->counter = tenant->virtual_now;
    qv_heap_init(&lane->jobs, offsetof(qv_job, queue_place), job_before);
    if (qv_heap_reserve(&tenant->lanes, tenant->n_lanes + 1) != QV_OK) {
        free(lane);
        return NULL;
    }
    tenant->n_lanes++;
    qv_list_append(&tenant->all_lanes, &lane->tenant_link);
    qv_list_append(&group->lanes, &lane->group_link);
    return lane;
}

/* Who comes back after a pause starts at the virtual time. */
static void lift(double *counter, double virtual_now)
{
    if (*counter < virtual_now)
        *counter = virtual_now;
}

qv_status qv_fair_push(qv_fair *fair, qv_job *job)
{
    qv_tenant *tenant = job->tenant;
    qv_lane *lane = require_lane(tenant, job->group);
    if (lane == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the queue of a tenant");
    bool was_empty = lane->jobs.n == 0;
    QV_TRY(qv_heap_push(&lane->jobs, job));
    job->lane = lane;
    if (tenant->n_queued++ == 0)
        lift(&tenant->counter, fair->virtual_now);
    if (was_empty)
        lift(&lane->counter, tenant->virtual_now);
    if (qv_heap_top(&lane->jobs) == job) /* another head may have better luck */
        lane->blocked = false;
    fair->n_queued++;
    fair->queued_cost += job->cost;
    tenant->queued_cost += job->cost;
    job->group->n_queued++;
    job->group->queued_cost += job->cost;
    place_lane(lane);
    return QV_OK;
}

void qv_fair_remove(qv_fair *fair, qv_job *job)
{
    qv_lane *lane = job->lane;
    if (lane == NULL)
        return;
    if (qv_heap_top(&lane->jobs) == job)
        lane->blocked = false;
    qv_heap_remove(&lane->jobs, job);
    job->lane = NULL;
    fair->n_queued--;
    fair->queued_cost -= job->cost;
    lane->tenant->n_queued--;
    lane->tenant->queued_cost -= job->cost;
    job->group->n_queued--;
    job->group->queued_cost -= job->cost;
    if (fair->n_queued == 0) /* sums of floats drift */
        fair->queued_cost = 0;
    if (lane->tenant->n_queued == 0)
        lane->tenant->queued_cost = 0;
    if (job->group->n_queued == 0)
        job->group->queued_cost = 0;
    place_lane(lane);
}

qv_job *qv_fair_next(const qv_fair *fair)
{
    const qv_tenant *tenant = qv_heap_top(&fair->ready);
    const qv_lane *lane = tenant != NULL ? qv_heap_top(&tenant->lanes) : NULL;
    return lane != NULL ? qv_heap_top(&lane->jobs) : NULL;
}

qv_job *qv_fair_any(const qv_group *group)
{
    QV_LIST_EACH(&group->lanes, qv_lane, group_link, lane)
    if (lane->jobs.n > 0)
        return qv_heap_top(&lane->jobs);
    return NULL;
}

void qv_fair_forget_group(qv_group *group)
{
    QV_LIST_EACH(&group->lanes, qv_lane, group_link, lane)
    free_lane(lane);
}

void qv_fair_block(qv_job *job)
{
    job->lane->blocked = true;
    place_lane(job->lane);
}

void qv_fair_unblock(qv_group *group)
{
    QV_LIST_EACH(&group->lanes, qv_lane, group_link, lane)
    {
        if (!lane->blocked)
            continue;
        lane->blocked = false;
        place_lane(lane);
    }
}

/* --- Charges ----------------------------------------------------------------------------------*/

/* Cost by weight to a tenant and to its lane for the group. */
static void add_cost(qv_job *job, double cost)
{
    qv_tenant *tenant = job->tenant;
    qv_lane *lane = find_lane(tenant, job->group);
    job->charged += cost;
    tenant->served += cost;
    tenant->counter += cost / tenant->policy.weight;
    if (lane != NULL) {
        lane->counter += cost;
        place_lane(lane);
    } else {
        place_tenant(tenant);
    }
}

void qv_fair_charge(qv_job *job)
{
    qv_tenant *tenant = job->tenant;
    qv_fair *fair = tenant->fair;
    qv_lane *lane = find_lane(tenant, job->group);
    lift(&tenant->counter, fair->virtual_now - QV_FAIR_MAX_LAG);
    lift(&fair->virtual_now, tenant->counter);
    tenant->turn = ++fair->turn;
    if (lane != NULL) {
        lift(&tenant->virtual_now, lane->counter);
        lane->turn = fair->turn;
    }
    if (job->cost > fair->largest)
        fair->largest = job->cost;
    add_cost(job, job->charged < job->cost ? job->cost - job->charged : 0);
}

void qv_fair_charge_more(qv_job *job, double cost)
{
    add_cost(job, cost);
    if (job->charged > job->tenant->fair->largest)
        job->tenant->fair->largest = job->charged;
}

void qv_fair_settle(qv_job *job, double cost)
{
    add_cost(job, cost - job->charged);
}

void qv_fair_charge_load(qv_tenant *tenant, qv_group *group, double cost)
{
    qv_fair *fair = tenant->fair;
    qv_lane *lane = find_lane(tenant, group);
    cost = cost < QV_FAIR_MAX_LAG ? cost : QV_FAIR_MAX_LAG;
    /* What it might have been lifted by later would swallow the charge. */
    lift(&tenant->counter, fair->virtual_now - (tenant->n_queued > 0 ? QV_FAIR_MAX_LAG : 0));
    tenant->counter += cost / tenant->policy.weight;
    tenant->loads += cost;
    if (cost > fair->largest_load)
        fair->largest_load = cost;
    if (lane != NULL) {
        if (lane->jobs.n == 0)
            lift(&lane->counter, tenant->virtual_now);
        lane->counter += cost;
        place_lane(lane);
    } else {
        place_tenant(tenant);
    }
}

const char *qv_fair_tenant_waiting(const qv_group *group)
{
    const qv_job *job = qv_fair_any(group);
    return job != NULL ? job->tenant->name : NULL;
}

void qv_fair_running(qv_job *job, int n)
{
    job->tenant->n_running += n;
    place_tenant(job->tenant);
}

/* --- Views ------------------------------------------------------------------------------------*/

/* Of what waits, a new request of this tenant goes behind its own, and behind so much of others as
 * their share allows them meanwhile. */
double qv_fair_cost_ahead(const qv_fair *fair, const qv_tenant *tenant)
{
    double weights = 0;
    QV_LIST_EACH(&fair->all, qv_tenant, link, other)
    if (other != tenant && other->n_queued > 0)
        weights += other->policy.weight;
    double others = fair->queued_cost - tenant->queued_cost;
    double their_share = tenant->queued_cost * weights / tenant->policy.weight;
    return tenant->queued_cost + (others < their_share ? others : their_share);
}

double qv_fair_gap(const qv_fair *fair)
{
    double least = 0, most = 0;
    size_t n = 0;
    QV_LIST_EACH(&fair->all, qv_tenant, link, tenant)
    {
        if (tenant->n_queued == 0)
            continue;
        double counter = tenant->counter;
        lift(&counter, fair->virtual_now - QV_FAIR_MAX_LAG);
        if (n == 0 || counter < least)
            least = counter;
        if (n == 0 || tenant->counter > most)
            most = tenant->counter;
        n++;
    }
    return most - least;
}

/* One that is idle and not ahead of the virtual time would come back just there: it can go. */
void qv_fair_tick(qv_fair *fair)
{
    QV_LIST_EACH(&fair->all, qv_tenant, link, tenant)
    {
        bool is_idle = tenant->n_queued + tenant->n_running + tenant->n_parked == 0;
        QV_LIST_EACH(&tenant->all_lanes, qv_lane, tenant_link, lane)
        if (lane->jobs.n == 0 && (is_idle || lane->counter <= tenant->virtual_now))
            free_lane(lane);
        if (is_idle && !tenant->configured &&
            (fair->n_queued == 0 || tenant->counter <= fair->virtual_now))
            free_tenant(tenant);
    }
}

qv_status qv_fair_check(const qv_fair *fair)
{
    int64_t n_queued = 0;
    QV_LIST_EACH(&fair->all, qv_tenant, link, tenant)
    {
        int64_t n = 0;
        QV_LIST_EACH(&tenant->all_lanes, qv_lane, tenant_link, lane)
        {
            n += lane->jobs.n;
            bool is_placed = lane->place != QV_HEAP_NONE;
            if (is_placed != (lane->jobs.n > 0 && !lane->blocked))
                return qv_fail(QV_ERR_INTERNAL, "tenant '%s': a lane of %u is placed %d",
                               tenant->name, lane->jobs.n, is_placed);
        }
        bool is_ready = tenant->place != QV_HEAP_NONE;
        if (n != tenant->n_queued || tenant->n_running < 0 ||
            is_ready != (tenant->lanes.n > 0 && !is_held(tenant)))
            return qv_fail(QV_ERR_INTERNAL, "tenant '%s': %lld wait, counted %lld, ready %d",
                           tenant->name, (long long)n, (long long)tenant->n_queued, is_ready);
        n_queued += n;
    }
    if (n_queued != fair->n_queued)
        return qv_fail(QV_ERR_INTERNAL, "%lld wait, counted %lld", (long long)n_queued,
                       (long long)fair->n_queued);
    return QV_OK;
}
