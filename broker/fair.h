/* Fair: in which order waiting requests are served, so that every tenant gets its share.
 *
 *   tenant   on whose behalf requests come (`tenant` of a submit; "" is a tenant too): weight,
 *            limits, and a virtual counter of the tokens that it was served
 *   lane     the requests of one tenant for one adapter, by rank: arrival, with a head start for
 *            priority
 *
 * The tenant with the smallest counter is next, and of it the lane with the smallest counter: start
 * time fair queueing (Goyal, Vin, Cheng 1996) twice, with the virtual token counters of Sheng et
 * al. (2024) as tags. A counter grows by the cost of each request that is sent, divided by the
 * tenant's weight; the cost is an estimate at first and is set right when the request has ended.
 * Whoever comes back after a pause starts at the virtual time, the counter of who was served last:
 * a pause saves nothing up.
 *
 * An adapter that has to be loaded for a request costs its tenant what the worker would have done
 * meanwhile: the time of such a load by its rate, up to QV_FAIR_MAX_LAG. Who asks for ever other
 * adapters pays for that and not those whose adapters make room.
 *
 * Nobody starves, by construction: of two tenants that both have something to send, neither is ever
 * served more than one largest request (divided by its weight) beyond the other, and what the
 * requests that it runs were underestimated by, and the loads that it caused; a lane the same
 * within its tenant, plus a head start of priority that is a constant. Within a lane priority is a
 * head start in time, so that a request is overtaken only by those that arrive within it.
 *
 * A lane whose head cannot be sent now (no worker with room, its adapter is being loaded) is
 * blocked: out of the order until something happens that may help (pool->woken). So a waiting
 * request costs nothing, and blocks nobody else; what its tenant misses meanwhile it may catch up
 * within a bound. Pure; the broker's thread.
 */
#ifndef QV_BROKER_FAIR_H
#define QV_BROKER_FAIR_H

#include "broker/heap.h"
#include "broker/list.h"
#include "common/map.h"
#include "common/status.h"

#define QV_TENANT_MAX_NAME    64
#define QV_FAIR_MAX_TENANTS   4096 /* more share one, "(other)" */
#define QV_FAIR_OUTPUT_WEIGHT 2    /* cost of a token of an answer; one of a prompt costs 1 */

/* Cost by weight that a tenant may catch up after all that it had waiting was blocked. */
#define QV_FAIR_MAX_LAG 65536.0

/* Head starts of one step of priority, of -100 to 100. */
#define QV_FAIR_PRIORITY_US   INT64_C(10000000) /* within a lane, of waiting */
#define QV_FAIR_PRIORITY_COST 512.0             /* between lanes of a tenant, of cost */

typedef struct qv_fair qv_fair;
typedef struct qv_tenant qv_tenant;
typedef struct qv_lane qv_lane;
struct qv_group;
struct qv_job;

/* What people may set for a tenant (quiver:tenant:<name>); a limit of 0 is none. */
typedef struct {
    double weight;       /* share of the pool against other tenants, 1 = the default */
    int64_t max_queued;  /* requests that wait */
    int64_t max_running; /* requests that workers run; more wait */
} qv_tenant_policy;

extern const qv_tenant_policy qv_tenant_default_policy;

struct qv_tenant {
    qv_fair *fair;
    qv_list link; /* in fair->all */
    char name[QV_TENANT_MAX_NAME + 1];
    qv_tenant_policy policy;
    bool configured; /* has a policy of its own: kept while it is idle */

    double counter;     /* cost served by weight, lifted to the virtual time after a pause */
    double virtual_now; /* counter of the lane that was served last */
    uint64_t turn;      /* when it was served last, in turns: breaks ties */
    uint32_t place;     /* in fair->ready */
    qv_heap lanes;      /* not blocked, not empty */
    qv_list all_lanes;  /* of qv_lane.tenant_link */
    uint32_t n_lanes;

    int64_t n_queued, n_running;
    int64_t n_parked;   /* jobs that are neither, but will be */
    double queued_cost; /* of the requests that wait */
    double served;      /* cost of all requests ever, set right at their end */
    double loads;       /* cost of all loads of adapters that its requests caused */
};

struct qv_lane {
    qv_tenant *tenant;
    struct qv_group *group;
    qv_list tenant_link, group_link;
    qv_heap jobs; /* by rank */
    double counter;
    uint64_t turn;
    uint32_t place; /* in tenant->lanes */
    bool blocked;
};

struct qv_fair {
    qv_map *by_name; /* → qv_tenant */
    qv_list all;
    qv_heap ready; /* tenants with something to send, by counter */
    double virtual_now;
    uint64_t turn;
    int64_t n_queued;
    double queued_cost;
    double largest;      /* cost of the largest request so far: what bounds the gap, with */
    double largest_load; /* the same of a load */
};

/* What a request costs. */
static inline double qv_fair_cost(double prompt_tokens, double answer_tokens)
{
    return prompt_tokens + QV_FAIR_OUTPUT_WEIGHT * (answer_tokens > 0 ? answer_tokens : 0);
}

/* Errors: NOMEM. */
qv_status qv_fair_init(qv_fair *fair);

/* Free all tenants; no requests may be left. */
void qv_fair_deinit(qv_fair *fair);

/* The tenant of a name, made if need be; beyond the bound the one that they share. NULL: no
 * memory. */
qv_tenant *qv_fair_require_tenant(qv_fair *fair, const char *name, size_t size);

/* Set a tenant's policy, or (NULL) the default one again. Errors: NOMEM. */
qv_status qv_fair_set_policy(qv_fair *fair, const char *name, const qv_tenant_policy *policy);

/* Whether one more request may wait. Errors: BUSY. */
qv_status qv_tenant_check(const qv_tenant *tenant);

/* Put a waiting job (tenant, group and cost are set) into its lane; take it out. Errors: NOMEM. */
qv_status qv_fair_push(qv_fair *fair, struct qv_job *job);
void qv_fair_remove(qv_fair *fair, struct qv_job *job);

/* The job to send next; NULL: none can be. */
struct qv_job *qv_fair_next(const qv_fair *fair);

/* The first job that waits for a group, in no particular lane; NULL: none. */
struct qv_job *qv_fair_any(const struct qv_group *group);

/* Free the lanes of a group that is freed; they are empty. */
void qv_fair_forget_group(struct qv_group *group);

/* The job at the head of a lane cannot be sent now. */
void qv_fair_block(struct qv_job *job);

/* What blocked a group's lanes may be over. */
void qv_fair_unblock(struct qv_group *group);

/* A job was sent (after qv_fair_remove), ran on beyond its estimate by `cost`, or has ended with
 * this cost in all. A job that is sent again is charged once. */
void qv_fair_charge(struct qv_job *job);
void qv_fair_charge_more(struct qv_job *job, double cost);
void qv_fair_settle(struct qv_job *job, double cost);

/* A load that a tenant's request caused took so much. */
void qv_fair_charge_load(qv_tenant *tenant, struct qv_group *group, double cost);

/* The tenant of a job that waits for a group, as a name; NULL: none waits. */
const char *qv_fair_tenant_waiting(const struct qv_group *group);

/* A job begins to run or does no longer. */
void qv_fair_running(struct qv_job *job, int n);

/* How much cost is served before a new job of this tenant, and how far apart in cost by weight the
 * tenants that wait are: at most fair->largest by weight, twice, where all of them have something
 * to send, QV_FAIR_MAX_LAG more where one had to wait for workers that others do not need, and
 * fair->largest_load more for each load that is under way. */
double qv_fair_cost_ahead(const qv_fair *fair, const qv_tenant *tenant);
double qv_fair_gap(const qv_fair *fair);

/* Forget tenants and lanes that make no difference any more. About once a second. */
void qv_fair_tick(qv_fair *fair);

/* Errors: INTERNAL with what is wrong. For tests. */
qv_status qv_fair_check(const qv_fair *fair);

#endif
