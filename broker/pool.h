/* Pool: the workers as the broker sees them, and the groups of workers that hold the same adapter.
 *
 *   member    one session of a worker: liveness, credit, what it said about itself
 *   group     one adapter name: who holds it, what is wanted of it, which requests wait for it;
 *             the base model is the group with the empty name, which every member belongs to
 *   resident  one adapter on one member
 *
 * All workers of a broker serve the same model: a request names only an adapter, so the first
 * member decides and a worker with another model is refused until the pool is empty again.
 *
 * The pool keeps books and decides nothing: broker/core.c says what happens on which message,
 * broker/placement.c which adapter goes where, broker/route.c which member gets a request. No
 * sockets, no clock, no Redis: time is an argument, in microseconds. One thread at a time.
 */
#ifndef QV_BROKER_POOL_H
#define QV_BROKER_POOL_H

#include "broker/fair.h"
#include "broker/list.h"
#include "broker/prefix.h"
#include "common/map.h"
#include "common/mq.h"
#include "common/protocol.h"
#include "common/want.h"

#include <string.h>

#define QV_POOL_ID_MAX     64 /* bytes of a worker's id */
#define QV_POOL_DIGEST_MAX 64

typedef struct qv_pool qv_pool;
typedef struct qv_member qv_member;
typedef struct qv_group qv_group; /* broker/fair.h names it too */
typedef struct qv_resident qv_resident;

/* --- Members ----------------------------------------------------------------------------------*/

typedef enum {
    QV_MEMBER_JOINING,  /* said `ready`, has no `welcome` yet */
    QV_MEMBER_READY,    /* gets work */
    QV_MEMBER_SUSPECT,  /* quiet for longer than it should be: keeps its work, gets nothing new */
    QV_MEMBER_DRAINING, /* finishes its work, gets nothing new */
    QV_MEMBER_GONE,     /* lost or left; its session never comes back */
    QV_MEMBER_STATE_COUNT
} qv_member_state;

typedef enum {
    QV_MEMBER_WELCOMED, /* `welcome` was sent */
    QV_MEMBER_HEARD,    /* any message of this session */
    QV_MEMBER_QUIET,    /* half of the timeout without one */
    QV_MEMBER_DRAINS,   /* a heartbeat said so */
    QV_MEMBER_RESUMES,  /* a heartbeat says that it drains no more */
    QV_MEMBER_LOST,     /* timeout, unreachable, said goodbye, or replaced by a newer session */
    QV_MEMBER_EVENT_COUNT
} qv_member_event;

const char *qv_member_state_name(qv_member_state state); /* "ready" */

/* The transition table: the state after an event; false where the event changes nothing. */
bool qv_member_next(qv_member_state state, qv_member_event event, qv_member_state *next);

struct qv_member {
    qv_pool *pool;
    qv_list link; /* in pool->members */
    char id[QV_POOL_ID_MAX + 1];
    qv_mq_peer peer;
    uint64_t epoch; /* of this session; every message in either direction carries it */
    qv_member_state state;

    uint64_t joined_us, heard_us, told_us; /* `ready`; last message from it; last message to it */

    /* What `ready` said. */
    char *model, *model_digest, *backend, *devices, *version; /* owned */
    int64_t capacity, adapter_slots, max_rank, max_context, total_pages;
    int64_t instance; /* of the process; 0 = it does not say */

    /* What the last heartbeat said. */
    uint64_t steps;
    int64_t running, waiting, free_pages;
    double tokens_per_second;
    uint64_t idle_us; /* since when it has said that it runs nothing, and sent nothing; 0 = not */

    qv_list attempts;      /* of qv_attempt.member_link */
    uint32_t n_alone;      /* attempts of suspects, at most one */
    int64_t n_attempts;    /* never more than capacity */
    bool paused;           /* it refused work for lack of room: nothing new until its heartbeat */
    int64_t credit;        /* as counted in pool->free_credit */
    uint64_t n_dispatched; /* requests ever sent here */
    bool drained;          /* the same, and it was said that nothing runs on it any more */
    bool drain_ordered; /* people asked for it (quiver:drain): DRAINING whatever it says itself */

    /* What it has to do and how fast it is (broker/measure.h). */
    double work;         /* cost of what it runs, less what was delivered; about */
    double rate;         /* cost a second when it is busy; 0 = not known */
    double full_rate;    /* the same while it had no credit left; 0 = not known */
    double prefill_rate; /* prompt tokens a second; 0 = not known */
    double served;       /* cost delivered since window_us */
    uint64_t window_us;
    bool was_idle;            /* at some time since window_us */
    bool had_credit;          /* the same */
    qv_prefix_memory *prefix; /* owned; prompts that were sent here lately; NULL: no memory */

    qv_list residents; /* of qv_resident.member_link */
    int64_t n_slots;   /* residents that are loading, ready or unloading */

    qv_list lost_link;    /* found to be lost in the middle of an event: taken out at its end */
    const char *lost_why; /* borrowed for ever */
};

/* --- Groups -----------------------------------------------------------------------------------*/

typedef enum {
    QV_RESIDENT_LOADING,
    QV_RESIDENT_READY,
    QV_RESIDENT_FAILED,    /* not there; not asked for again before retry_us */
    QV_RESIDENT_UNLOADING, /* asked to leave; takes no new requests */
} qv_resident_state;

struct qv_resident {
    qv_member *member;
    qv_group *group;
    qv_list member_link, group_link;
    qv_resident_state state;
    char digest[QV_POOL_DIGEST_MAX + 1]; /* "" until it is ready */
    char *path;                          /* owned; as asked for, else as announced; or NULL */
    char *old_path;                      /* owned; asked for before that, or NULL */
    char *reason;                        /* owned; of a failure */
    qv_code code;                        /* of a failure */
    int64_t rank, bytes;
    bool asked;     /* LOADING since we asked for it */
    bool is_move;   /* the same, for demand or balance */
    bool is_caused; /* the same, for a request that waits: its tenant's name is in `cause` */
    char cause[QV_TENANT_MAX_NAME + 1];
    bool pin;            /* the worker itself keeps it: announced so, not by our wish */
    uint64_t since_us;   /* in this state */
    uint64_t retry_us;   /* FAILED: earliest next try */
    uint32_t n_failures; /* in a row */
};

struct qv_group {
    qv_pool *pool;
    qv_list link; /* in pool->groups */
    char *name;   /* owned; "" = base */
    size_t name_size;

    /* What is wanted (quiver:want:<name>). */
    bool wanted;
    bool deleted;         /* was wanted, is not any more: no new requests, unload everywhere */
    char *path;           /* owned; NULL where it is an alias only */
    int64_t replicas;     /* 0 = on demand only */
    int64_t max_replicas; /* 0 = no bound */
    bool pin;
    char **workers; /* [n_workers], owned; none = anywhere */
    size_t n_workers;
    char **tenants; /* [n_tenants], owned; none = all may use it */
    size_t n_tenants;
    qv_want_share *split; /* [n_split], owned with its names: requests for the name go to these */
    size_t n_split;
    char *invalid; /* owned; why the last wish makes no sense, or NULL */

    /* What is. */
    qv_list residents; /* of qv_resident.group_link */
    uint32_t n_ready;  /* residents READY on a member that is READY or SUSPECT */
    uint32_t n_loading;
    qv_code code;        /* why the last load failed */
    char *reason;        /* owned; the same in words, or why it is not as wanted; NULL */
    uint64_t used_us;    /* last request accepted */
    uint64_t surplus_us; /* more replicas than wanted since; 0 = not */
    uint64_t orphan_us;  /* not wanted and nowhere since; 0 = not */
    uint64_t demand_us;  /* no load on demand before this: the last try found no room */

    /* What demand asks for (broker/controller.h). */
    double demand;        /* requests at once, waiting and running, smoothed */
    double others_demand; /* the same, at other brokers */
    int64_t goal;         /* replicas for it; within what is wanted */
    uint64_t low_us;      /* demand asks for fewer since; 0 = not */

    /* Who waits (broker/fair.h), and what they need. */
    qv_list lanes; /* of qv_lane.group_link */
    uint32_t n_queued;
    double queued_cost;
    qv_list woken;      /* in pool->woken: its requests may have better luck now */
    uint32_t n_jobs;    /* requests that refer to this group, running ones too */
    double answer_mean; /* tokens of an answer; 0 = not known (broker/measure.h) */
    double load_ms;     /* how long a load takes; 0 = not known */
    qv_list dirty_link; /* in pool->dirty: placement looks at it and its record is published */
};

/* --- Pool -------------------------------------------------------------------------------------*/

struct qv_pool {
    qv_map *by_peer; /* routing id → member, GONE ones are not in it */
    qv_map *by_id;   /* worker id → member */
    qv_list members; /* in order of joining */
    qv_map *by_name; /* adapter name → group */
    qv_list groups;  /* in order of creation, base first */
    qv_list woken;   /* groups whose waiting requests are to be looked at again */
    qv_list dirty;   /* groups that changed */
    qv_group *base;
    uint64_t next_epoch;
    int64_t free_credit; /* sum over members that may get work */
    uint32_t n_members[QV_MEMBER_STATE_COUNT];
    double answer_mean, load_ms, prefill_rate, rate, full_rate; /* where one has no own yet */
};

/* `first_epoch` is random, so that no session of an earlier broker has an epoch of ours. Errors:
 * NOMEM. */
qv_status qv_pool_init(qv_pool *pool, uint64_t first_epoch);
void qv_pool_deinit(qv_pool *pool);

/* Open a session for a worker that said `ready`. The caller has taken an earlier session of the
 * same peer or the same id out. Errors: ARG (id, protocol version), UNSUPPORTED (another model than
 * the pool's), NOMEM; each with the sentence for the worker. */
qv_status qv_pool_join(qv_pool *pool, const qv_mq_peer *peer, const qv_msg_ready *ready,
                       uint64_t now_us, qv_member **out);

/* Apply an event; true when the state changed. Credit and the counts of groups follow. GONE takes
 * the member out of the maps; its residents go, its attempts are the caller's to move. */
bool qv_member_apply(qv_member *member, qv_member_event event);

/* Free a member that is GONE and has no attempts. */
void qv_member_free(qv_member *member);

qv_member *qv_pool_find_peer(const qv_pool *pool, const qv_mq_peer *peer);
qv_member *qv_pool_find_id(const qv_pool *pool, const char *id);

/* How many more requests this member may get now. */
static inline int64_t qv_member_credit(const qv_member *member)
{
    return member->credit;
}

/* Count an attempt in or out; refuse work until the next heartbeat, or end that. */
void qv_member_add_attempt(qv_member *member, int64_t n);
void qv_member_pause(qv_member *member, bool paused);

/* --- Groups and residents ---------------------------------------------------------------------*/

/* The group of a name; require makes it. NULL: absent, or no memory. */
qv_group *qv_pool_find_group(const qv_pool *pool, const char *name, size_t size);
qv_group *qv_pool_require_group(qv_pool *pool, const char *name, size_t size);

/* Whether nobody wants, holds, uses or waits for it; and free such a group. Never the base group.
 */
bool qv_group_is_idle(const qv_group *group);
void qv_group_free(qv_group *group);

/* Have its waiting requests be looked at again. */
void qv_group_wake(qv_group *group);

/* The same for whatever waits for this member. */
void qv_member_wake(qv_member *member);

/* Have placement look at it and its record be published. */
void qv_group_touch(qv_group *group);

/* Whether what is wanted lets this member hold the adapter. */
bool qv_group_allows(const qv_group *group, const qv_member *member);

/* The adapter on the member, or NULL; require makes it, FAILED with no reason yet. */
qv_resident *qv_resident_find(const qv_group *group, const qv_member *member);
qv_resident *qv_resident_require(qv_group *group, qv_member *member);

/* Change the state; counts follow and the group is touched. */
void qv_resident_set(qv_resident *resident, qv_resident_state state, uint64_t now_us);
void qv_resident_free(qv_resident *resident);

/* Whether a request of this group may be sent there now, credit aside. */
bool qv_resident_serves(const qv_resident *resident);

/* Whether two texts are equal; NULL equals only NULL. */
static inline bool qv_same_text(const char *a, const char *b)
{
    return a == b || (a != NULL && b != NULL && strcmp(a, b) == 0);
}

/* Replace an owned text; NULL or "" makes it NULL. Without memory it becomes NULL too: these texts
 * are for people. */
void qv_text_set(char **text, const char *value, size_t size);

/* Copy a text, cut to what fits, and terminate it. */
void qv_text_copy(char *out, size_t out_size, const char *text, size_t size);

#endif
