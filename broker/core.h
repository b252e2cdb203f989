/* The core of the broker: pool, requests, placement and routing tied into one object. Messages,
 * wishes and time go in; messages, published facts and events come out through the actions. It has
 * no sockets, no clock and no Redis, and draws its random numbers from a seed: the same inputs give
 * the same outputs, so that a simulator can drive it as the event loop in broker/broker.c does.
 *
 * What it promises: an accepted request ends exactly once, by a `done` per stream or by one
 * `error`; the `seq` of each stream has no gap and no repetition, whatever happens to workers; a
 * member never has more attempts than its capacity; memory is bounded by the limits.
 *
 * Time is monotonic, in microseconds. One thread.
 */
#ifndef QV_BROKER_CORE_H
#define QV_BROKER_CORE_H

#include "broker/placement.h"
#include "broker/pool.h"
#include "broker/requests.h"
#include "broker/route.h"

typedef struct qv_core qv_core;

/* Settings; start from qv_core_default_options(). Texts are borrowed and must outlive the core. */
typedef struct {
    const char *id;      /* of this broker */
    const char *version; /* shown in status */
    uint64_t seed;       /* of epochs and of the seeds of requests that bring none */
    const qv_route_policy *policy;
    qv_requests_limits requests;
    qv_placement_options placement;
    qv_protocol_limits client_limits; /* of messages from clients */
    qv_protocol_limits worker_limits; /* of messages from workers */

    int64_t heartbeat_ms; /* how often each side speaks at least */
    int64_t timeout_ms;   /* a worker that is silent for so long is lost; for half of it, suspect */
    int64_t max_worker_losses; /* a request that loses so many workers fails with WORKER_LOST */

    int64_t max_queue_wait_ms; /* a request that waits longer for a worker fails */
    int64_t cancel_confirm_ms; /* a cancel that the worker does not confirm is confirmed by us */
    int64_t orphan_timeout_ms; /* an aborted attempt that is never confirmed gives its credit back;
                                * so long too must a worker be idle before what it should be
                                * running counts as lost on the way */
    int64_t max_spill_bytes;   /* waiting for one slow client */
    int64_t max_total_spill_bytes;
    int64_t stalled_client_ms; /* a client that takes nothing for so long is given up */
    int64_t startup_grace_ms;  /* an unknown adapter may be one whose worker is not back yet */
    int64_t max_explained;     /* requests that `explain` remembers */
} qv_core_options;

qv_core_options qv_core_default_options(void);

/* Durations that the core measures. */
typedef enum {
    QV_CORE_QUEUE,       /* receipt to first dispatch */
    QV_CORE_FIRST_TOKEN, /* receipt to first delta */
    QV_CORE_TOTAL,       /* receipt to end */
    QV_CORE_DURATION_COUNT
} qv_core_duration;

/* What the core asks for. Everything passed is borrowed for the call; none may call the core. */
typedef struct {
    void *user;

    /* OK: taken, for now at least (qv_core_client_busy). BUSY: no room now (clients are tried again
     * later). NOT_FOUND or other: gone. */
    qv_status (*send_client)(void *user, const qv_mq_peer *peer, const qv_message *message);
    qv_status (*send_worker)(void *user, const qv_mq_peer *peer, const qv_message *message);

    /* How an adapter is, after each change; and that nothing is known of it any more. */
    void (*publish)(void *user, const qv_group *group);
    void (*retract)(void *user, const char *adapter);

    /* Something happened that people may want to know: to which adapter and worker (NULL = does not
     * apply), and why (NULL = no more to say). */
    void (*event)(void *user, const char *what, const char *adapter, const char *worker,
                  const char *why);

    /* A request took so long. */
    void (*observe)(void *user, qv_core_duration duration, uint64_t us);
} qv_core_actions;

/* Counts since the start. */
typedef struct {
    uint64_t submits; /* received and well formed */
    uint64_t accepted;
    uint64_t ended[QV_JOB_STATE_COUNT]; /* of those accepted: DONE, FAILED, CANCELLED */
    uint64_t errors[QV_CODE_COUNT];     /* `error` messages by code */
    uint64_t finished_deadline;         /* requests that ended with finish_reason deadline */
    uint64_t tokens;                    /* delivered by workers */
    uint64_t steps;                     /* messages of workers with deltas */
    uint64_t dispatched;                /* attempts */
    uint64_t moved;                     /* requests that went on after their worker was lost */
    uint64_t ghosts;                    /* messages of a session that is over */
    uint64_t late;                      /* deltas of attempts that are over, or seen before */
    uint64_t gaps;                      /* deltas that were missing */
    uint64_t malformed_client, malformed_worker;
    uint64_t adapter_hits, adapter_misses; /* submits for an adapter that was ready, or was not */
    uint64_t loads, unloads;               /* asked of workers */
    uint64_t workers_lost;
    uint64_t clients_lost; /* gone or stalled with requests in flight */
} qv_core_stats;

/* Errors: NOMEM. */
qv_status qv_core_new(const qv_core_options *options, const qv_core_actions *actions,
                      uint64_t now_us, qv_core **out);
void qv_core_free(qv_core *core);

/* --- Inputs -----------------------------------------------------------------------------------*/

/* Bytes from a client or a worker: decoded, checked, answered. Never fails: what is wrong with them
 * is said to the peer. */
void qv_core_from_client(qv_core *core, const qv_mq_peer *peer, const void *data, size_t size,
                         uint64_t now_us);
void qv_core_from_worker(qv_core *core, const qv_mq_peer *peer, const void *data, size_t size,
                         uint64_t now_us);

/* A message that is no message: the sentence is this thread's qv_error(). */
void qv_core_client_garbage(qv_core *core, const qv_mq_peer *peer, uint64_t now_us);
void qv_core_worker_garbage(qv_core *core, const qv_mq_peer *peer, uint64_t now_us);

/* A message that an action took could not be sent after all: the peer is gone, or a client has no
 * room now. The latter's bytes come back, in order with any that followed. */
void qv_core_client_gone(qv_core *core, const qv_mq_peer *peer, uint64_t now_us);
void qv_core_client_busy(qv_core *core, const qv_mq_peer *peer, const void *data, size_t size,
                         uint64_t now_us);
void qv_core_worker_gone(qv_core *core, const qv_mq_peer *peer, uint64_t now_us);

/* What is wanted (want NULL: not any more), and a wish that makes no sense. */
void qv_core_want(qv_core *core, const char *name, const qv_want *want, uint64_t now_us);
void qv_core_invalid_want(qv_core *core, const char *name, const char *reason, uint64_t now_us);

/* People want a worker, or this broker, to take nothing new (quiver:drain:<id>), or no longer so. A
 * worker that is not here is drained when it comes. */
void qv_core_order_drain(qv_core *core, const char *id, bool drain, uint64_t now_us);

/* What people set for a tenant (quiver:tenant:<name>); NULL: nothing any more. */
void qv_core_tenant(qv_core *core, const char *name, const qv_tenant_want *want, uint64_t now_us);

/* All wishes have been told once, or there is nobody to ask. Before this an unknown adapter is not
 * refused for good. */
void qv_core_wants_known(qv_core *core);

/* Time passes: timeouts, deadlines, heartbeats, slow clients. About every 10 ms. */
void qv_core_tick(qv_core *core, uint64_t now_us);

/* Take no new requests from now on. */
void qv_core_drain(qv_core *core);

/* End every request with OVERLOADED: the broker stops. */
void qv_core_fail_all(qv_core *core, uint64_t now_us);

/* --- Views ------------------------------------------------------------------------------------*/

/* For `status`: how Redis is ("up", "down: why", "none"); copied. */
void qv_core_set_redis(qv_core *core, const char *text);

const qv_core_stats *qv_core_get_stats(const qv_core *core);
const qv_pool *qv_core_pool(const qv_core *core);
const qv_requests *qv_core_requests(const qv_core *core);
int64_t qv_core_spill_bytes(const qv_core *core);

/* Requests queued and running. */
int64_t qv_core_n_jobs(const qv_core *core);

/* Check every count against the lists that it counts, and the promises that can be seen from here.
 * Slow; for tests and simulators. Errors: INTERNAL with what is wrong. */
qv_status qv_core_check(const qv_core *core);

#endif
