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

#include "broker/keep.h"
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
    int64_t max_worker_losses; /* a request that loses so many workers is quarantined */

    int64_t max_queue_wait_ms;  /* a request that waits longer for a worker fails */
    int64_t cancel_confirm_ms;  /* a cancel that the worker does not confirm is confirmed by us */
    int64_t orphan_timeout_ms;  /* an aborted attempt that is never confirmed gives its credit back;
                                 * so long too must a worker be idle before what it should be
                                 * running counts as lost on the way */
    int64_t max_spill_bytes;    /* waiting for one slow client */
    int64_t max_spill_messages; /* the same in messages */
    int64_t max_total_spill_bytes;
    int64_t stalled_client_ms; /* a client that takes nothing for so long is given up */
    int64_t startup_grace_ms;  /* an unknown adapter may be one whose worker is not back yet */
    int64_t max_explained;     /* requests that `explain` remembers */
    int64_t resume_ms;         /* a client that lost its connection may come back for so long; and
                                * so long is kept what ended requests delivered. 0 = not at all */
    int64_t max_kept_bytes;    /* held for that; beyond it the oldest goes */
    int64_t store_timeout_ms;  /* Redis must confirm a durable request in this time */
} qv_core_options;

qv_core_options qv_core_default_options(void);

/* Durations that the core measures. */
typedef enum {
    QV_CORE_QUEUE,       /* receipt to first dispatch */
    QV_CORE_FIRST_TOKEN, /* receipt to first delta */
    QV_CORE_TOTAL,       /* receipt to end */
    QV_CORE_DURATION_COUNT
} qv_core_duration;

/* A durable request. All but the texts is for the core. */
typedef struct {
    qv_str tenant, id;
    qv_str submit;   /* the client's message as it came */
    uint64_t seed;   /* the same seed gives the same answer, and so the same numbers of messages */
    uint64_t serial; /* of the job; 0 = of none */
} qv_durable;

/* What Redis has under the name of a durable request. */
typedef enum {
    QV_STORED_NEW,       /* nothing was there: now it is ours */
    QV_STORED_ELSEWHERE, /* another broker runs it; the detail is its frontend */
    QV_STORED_FINISHED,  /* it has ended; the detail is the packed answer (broker/keep.h) */
    QV_STORED_LOST,      /* it has no broker at the moment: one will take it over */
    QV_STORED_NONE,      /* nothing (of a look-up) */
    QV_STORED_FAILED,    /* Redis is away or refuses; the detail is the sentence */
} qv_stored;

/* A request that is quarantined. */
typedef struct {
    const char *fingerprint; /* of what it asks for */
    const char *id, *tenant, *adapter, *workers;
    uint32_t n_losses;
} qv_poison;

#define QV_FINGERPRINT_SIZE 33

/* Who sent a message, where brokers authenticate their peers. */
typedef struct {
    const char *tenant;   /* requests are on its behalf */
    bool submit, operate; /* requests of its own; status, explain and cancelling those of others */
} qv_identity;

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

    /* Durable requests; each may be NULL: there is no store. `store` begins to write one, and
     * qv_core_stored says how that went. Errors: UNSUPPORTED, BUSY (Redis is away). `finish` stores
     * the packed answer, or (NULL) forgets the request. `look_up` asks for one that a client wants
     * to resume; qv_core_looked_up answers. False: there is no store. */
    qv_status (*store)(void *user, const qv_durable *durable);
    void (*finish)(void *user, const qv_durable *durable, const void *answer, size_t size);
    bool (*look_up)(void *user, const qv_mq_peer *peer, const qv_msg_resume_request *request);

    /* A request was quarantined. May be NULL. */
    void (*quarantine)(void *user, const qv_poison *poison);

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
    uint64_t resumed;      /* streams that a client came back for */
    uint64_t choked;       /* times that a client read too slowly and its streams were stopped */
    uint64_t quarantined, refused_poison;
    uint64_t adopted;      /* durable requests of brokers before us */
    uint64_t unauthorized; /* messages beyond the rights of their sender */
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

/* Who sends what is taken in next; NULL (as at the start): nobody is asked who he is, and everybody
 * may do everything. Borrowed until the next call. */
void qv_core_set_sender(qv_core *core, const qv_identity *sender);

/* What Redis says of a durable request that was to be stored; and of one that was looked up. */
void qv_core_stored(qv_core *core, const qv_durable *durable, qv_stored how, qv_str detail,
                    uint64_t now_us);
void qv_core_looked_up(qv_core *core, const qv_mq_peer *peer, const qv_msg_resume_request *request,
                       qv_stored how, qv_str detail, uint64_t now_us);

/* A stored request of a broker that is lost is ours from now on. It was accepted age_ms ago. The
 * bytes may come from anywhere. Errors: FORMAT and others (it cannot run), BUSY (not now). */
qv_status qv_core_adopt(qv_core *core, const qv_durable *durable, uint64_t age_ms, uint64_t now_us);

/* All durable requests that should be in Redis. `each` may not call the core. */
void qv_core_each_durable(qv_core *core, void (*each)(void *user, const qv_durable *durable),
                          void *user);

/* What asks for the same as this fingerprint is refused, or not any more. */
void qv_core_poison(qv_core *core, const char *fingerprint, bool present, uint64_t now_us);

/* Take no new requests from now on. */
void qv_core_drain(qv_core *core);

/* End every request with OVERLOADED: the broker stops. Durable ones are left for another. */
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
