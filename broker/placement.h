/* Placement: which adapter should be on which worker. It compares what is wanted with what is,
 * group by group, and says what to load and unload; the owner sends those messages and reports how
 * they went.
 *
 *   wanted replicas   loaded where rendezvous hashing says, on workers with a free slot that are
 * not fuller than the others, kept up as workers come and go; demand asks for more of them within
 * bounds (broker/controller.h); surplus replicas leave after a while on demand         a group with
 * waiting requests and no holder is loaded where there is room, or in the place of an idle,
 * unpinned adapter that was used longest ago deleted           unloaded everywhere; what runs
 * finishes path changed loaded again everywhere; requests wait for the new one, so that no two
 * versions of one name answer at the same time failed            not tried again on the same worker
 * before a back-off that doubles
 *
 * Repair uses free slots only and demand evicts only what is idle: two wishes can never push each
 * other out in turns. Pure; the broker's thread.
 */
#ifndef QV_BROKER_PLACEMENT_H
#define QV_BROKER_PLACEMENT_H

#include "broker/pool.h"

typedef struct {
    int64_t load_backoff_ms; /* after a failed load on one worker; doubles up to 32 times that */
    int64_t load_timeout_ms; /* a load without an answer counts as failed */
    int64_t surplus_ms;      /* more replicas than wanted are unloaded after this */
    int64_t rebalance_ms;    /* workers have come and gone no more for so long: adapters may move */
    int64_t grow_down_ms;    /* demand has asked for fewer replicas for so long: one leaves */
    int64_t max_moves;       /* loads at once for demand and balance, beyond what is wanted */
    int64_t orphan_ms; /* an adapter that nobody wants or holds any more is forgotten after this */
} qv_placement_options;

/* What placement asks for. */
typedef struct {
    void *user;
    void (*load)(void *user,
                 qv_resident *resident); /* group->path on the member; state is LOADING */
    void (*unload)(void *user, qv_resident *resident); /* state is UNLOADING */
    /* A load that a request caused (resident->cause) has succeeded. */
    void (*caused)(void *user, const qv_resident *resident);
    void (*event)(void *user, const char *what, const qv_group *group, const qv_member *member,
                  const char *why);
} qv_placement_actions;

typedef struct {
    qv_pool *pool;
    qv_placement_options options;
    qv_placement_actions actions;
    uint64_t changed_us; /* workers came or went */
    bool follows;        /* another broker moves adapters and takes surplus away (broker/peers.h) */
} qv_placement;

/* --- What is wanted ---------------------------------------------------------------------------*/

/* A wish came or changed, or (want NULL) was deleted. Errors: NOMEM. */
qv_status qv_placement_set_want(qv_placement *placement, const char *name, const qv_want *want);

/* A wish that makes no sense; an earlier one for the name goes on to hold. It is shown as the
 * reason, and whoever found it out has told people. Errors: NOMEM. */
qv_status qv_placement_invalid_want(qv_placement *placement, const char *name, const char *reason);

/* --- What is ----------------------------------------------------------------------------------*/

/* A member joined with these adapters. Errors: NOMEM. */
qv_status qv_placement_joined(qv_placement *placement, qv_member *member,
                              const qv_msg_held_adapter *held, uint32_t n, uint64_t now_us);

/* A member reports on an adapter. Errors: ARG (a state that is no state), NOMEM. */
qv_status qv_placement_report(qv_placement *placement, qv_member *member,
                              const qv_msg_adapter_state *report, uint64_t now_us);

/* A member turned out not to have an adapter that it was believed to hold. */
void qv_placement_missing(qv_placement *placement, qv_resident *resident, uint64_t now_us);

/* Look at every group again; and because members came, went or changed state. */
void qv_placement_touch_all(qv_placement *placement);
void qv_placement_members_changed(qv_placement *placement, uint64_t now_us);

/* --- Decisions --------------------------------------------------------------------------------*/

/* Bring one group nearer to what is wanted. */
void qv_placement_reconcile(qv_placement *placement, qv_group *group, uint64_t now_us);

/* A request of a tenant waits and nobody holds the adapter: load it, on `member` if that is given
 * and able. */
void qv_placement_demand(qv_placement *placement, qv_group *group, qv_member *member,
                         const char *tenant, uint64_t now_us);

/* Whether nobody has wanted or held the adapter for so long that nobody will: its requests fail. */
bool qv_placement_is_forgotten(const qv_placement *placement, const qv_group *group,
                               uint64_t now_us);

/* Timeouts, back-offs that ended, surplus, orphans: touches the groups that need a look. */
void qv_placement_tick(qv_placement *placement, uint64_t now_us);

/* Whether a member may be asked for the adapter now and has a free slot; and whether there may be
 * more replicas than there are. */
bool qv_placement_has_room(const qv_group *group, const qv_member *member, uint64_t now_us);
bool qv_group_may_grow(const qv_group *group);

/* --- For broker/controller.c ------------------------------------------------------------------*/

/* Ask a member to load the group's adapter, or to unload it. */
void qv_placement_load(qv_placement *placement, qv_group *group, qv_member *member, const char *why,
                       uint64_t now_us);
void qv_placement_unload(qv_placement *placement, qv_resident *resident, const char *why,
                         uint64_t now_us);

/* How well a member suits a group: rendezvous hashing, the same in every broker. The members with
 * the greatest weights should hold it, so that one that comes or goes moves only what is its own.
 */
uint64_t qv_placement_weight(const qv_group *group, const qv_member *member);

/* Replicas there are or will be on members that stay. */
int64_t qv_group_count_replicas(const qv_group *group);

/* A member with a free slot to load the group's adapter on, by weight, or NULL. */
qv_member *qv_placement_find_room(const qv_group *group, uint64_t now_us);

/* --- Views ------------------------------------------------------------------------------------*/

/* "sql-v1=95 sql-v2=5", or "" for a name that stands for itself. */
void qv_group_show_split(const qv_group *group, char *out, size_t size);

/* Whether what is wanted lets this tenant use the adapter. */
bool qv_group_allows_tenant(const qv_group *group, const char *tenant);

/* wanted, loading, ready, partial, failed, invalid, alias or unloading. */
const char *qv_group_state(const qv_group *group);

/* How many replicas there should be: bounded by the members that may hold it. */
int64_t qv_group_target(const qv_group *group);

/* Why it is not as wanted, or NULL. */
const char *qv_group_reason(const qv_group *group);

/* Whether a new request has a chance: *code and *why (borrowed) tell the client otherwise, and
 * *retry_ms is more than 0 where trying again can help. */
bool qv_group_accepts(const qv_group *group, uint64_t now_us, qv_code *code, const char **why,
                      int64_t *retry_ms);

#endif
