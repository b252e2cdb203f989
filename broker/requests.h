/* Requests: every request that the broker has accepted and not yet ended.
 *
 *   job      one `submit`: QUEUED in its adapter's group, DISPATCHED to a worker, STREAMING from
 * it, and at its end DONE, FAILED or CANCELLED; each of its n streams ends on its own attempt  one
 * `run` of a job on one member. Its number is all that a worker knows of the request, is never used
 * again, and so fences late messages. An attempt whose job has ended or moved on is an orphan: it
 * holds its member's credit until the worker confirms
 *
 * A job keeps what it needs to go on elsewhere: the submit's bytes, its seed, and per stream the
 * tokens delivered and the next seq. The table bounds the number of jobs and the bytes that they
 * hold. It keeps books and times; what happens on which event is decided in broker/core.c. Pure;
 * one thread.
 */
#ifndef QV_BROKER_REQUESTS_H
#define QV_BROKER_REQUESTS_H

#include "broker/callers.h"
#include "broker/fair.h"
#include "broker/heap.h"
#include "broker/list.h"
#include "broker/pool.h"
#include "common/answer.h"
#include "common/map.h"
#include "common/protocol.h"

#define QV_JOB_ID_MAX      64
#define QV_JOB_MAX_STREAMS 64

typedef struct qv_job qv_job;
typedef struct qv_attempt qv_attempt;
typedef struct qv_requests qv_requests;

/* --- States -----------------------------------------------------------------------------------*/

typedef enum {
    QV_JOB_QUEUED,
    QV_JOB_DISPATCHED, /* sent to a worker, nothing came back yet */
    QV_JOB_STREAMING,
    QV_JOB_PARKED,    /* it may not run now: see qv_job_park */
    QV_JOB_DONE,      /* every stream ended with `done` */
    QV_JOB_FAILED,    /* ended with `error`, or without anybody to tell */
    QV_JOB_CANCELLED, /* ended with `done`, finish_reason `cancelled` */
    QV_JOB_STATE_COUNT
} qv_job_state;

typedef enum {
    QV_JOB_DISPATCH, /* sent to a worker */
    QV_JOB_PROGRESS, /* a delta came */
    QV_JOB_REQUEUE,  /* its worker is lost or refused it: goes on elsewhere */
    QV_JOB_FINISH,   /* its last stream ended; in the queue too, by a deadline, once it has begun */
    QV_JOB_CANCEL,   /* its client's cancel took effect */
    QV_JOB_FAIL,
    QV_JOB_PARK,   /* it may not run for a while */
    QV_JOB_UNPARK, /* now it may: back to the queue */
    QV_JOB_EVENT_COUNT
} qv_job_event;

const char *qv_job_state_name(qv_job_state state); /* "queued" */

/* The transition table: false where an event must not happen. */
bool qv_job_next(qv_job_state state, qv_job_event event, qv_job_state *next);

/* Why a running job was asked to stop; it then ends with that finish_reason. */
/* Why a job is parked. */
typedef enum {
    QV_PARK_NONE,
    QV_PARK_STORING, /* durable: not yet known to be in Redis */
    QV_PARK_AWAY,    /* its client is gone and may come back (`resume`) */
    QV_PARK_SLOW,    /* its client does not read: too much waits for it */
} qv_job_park;

typedef enum { QV_ABORT_NONE, QV_ABORT_CANCEL, QV_ABORT_DEADLINE } qv_job_abort;

/* --- Jobs -------------------------------------------------------------------------------------*/

/* After a message to the client: how much of the answer it and those before it carried. */
typedef struct {
    uint32_t n_tokens, text_size;
} qv_bound;

typedef struct {
    int64_t seq_in;  /* the seq that the worker's next delta must carry */
    int64_t seq_out; /* the seq of the client's next message */
    bool finished;
    int64_t n_tokens; /* delivered */

    /* What was delivered: for a worker that takes over, for whole answers, and for a client that
     * comes back. A streamed job that cannot be resumed keeps tokens only. */
    qv_answer answer;

    /* What another broker delivered before (`resume` of a submit); the answer begins behind it. */
    int32_t *prior; /* [n_prior], owned */
    uint32_t n_prior;
    int64_t base_seq; /* of the answer's first message */

    int64_t have;     /* the client has messages up to this seq, from before; -1 = none */
    qv_bound *bounds; /* [n_bounds] one per message, from base_seq on; owned */
    uint32_t n_bounds, bounds_capacity;
    char *done; /* [done_size] the encoded `done`, once the stream has ended; owned */
    size_t done_size;

    /* Of the prompt; owned copies until `done`, NULL or 0 where not asked for. */
    qv_reals prompt_logprobs;
    qv_tops prompt_top_logprobs;
} qv_job_stream;

struct qv_job {
    qv_job_state state;
    qv_requests *requests;
    qv_caller *caller;
    qv_list caller_link;           /* in caller->jobs */
    qv_job *name_next, *name_prev; /* others of the same tenant and id, newest first */
    qv_map_entry *entry;           /* in requests->by_id */
    qv_group *group;
    qv_attempt *attempt; /* NULL unless DISPATCHED or STREAMING */

    qv_tenant *tenant;
    char owner[QV_TENANT_MAX_NAME + 1]; /* the tenant as it was named */
    qv_lane *lane;                      /* while it waits */
    int64_t rank_us;  /* its place in the lane: arrival, earlier by its priority */
    double cost;      /* expected (broker/fair.h) */
    double charged;   /* to the tenant so far */
    double n_prompt;  /* tokens, estimated until a worker has counted them */
    double n_answer;  /* tokens expected, of all streams */
    int64_t n_out;    /* tokens delivered, of all streams */
    qv_prefix prefix; /* of the prompt */
    uint32_t explain; /* its record in broker/explain.h, while that is of its serial */

    uint64_t serial; /* in order of arrival; never used again */
    uint64_t seed;   /* drawn if the submit has none, so that a replay draws the same */
    int32_t priority;
    uint32_t n, n_finished; /* streams */
    bool stream;
    bool durable;   /* it is in Redis, or about to be */
    bool resumable; /* what it delivers is kept, so that its client may come back */
    bool alone;     /* suspect: never beside another suspect (broker/core.c) */
    qv_job_park park;
    bool is_aliased; /* the submit names another adapter, which stands for the group's */
    qv_job_abort abort;
    uint32_t n_losses;                   /* workers lost under it */
    char killed[2 * (QV_ID_MAX + 1)];    /* the first of them */
    uint64_t blamed[2];                  /* sessions of the last of them; 0 = none, or acquitted */
    uint8_t n_acquitted;                 /* losses that were taken back */
    uint32_t n_refusals;                 /* workers that did not hold the adapter after all */
    char digest[QV_POOL_DIGEST_MAX + 1]; /* of the adapter that began to answer; "" before */
    bool held;        /* the client has tokens of this version: only that will do */
    qv_strs warnings; /* for `done` where nothing said them before; owned */
    bool warnings_told;

    uint64_t received_us, dispatched_us, first_token_us; /* 0 = not yet */
    uint64_t deadline_us;                                /* 0 = none */
    uint64_t timer_us;    /* when something must happen if nothing does */
    uint32_t timer_place; /* in requests->timers */
    uint32_t queue_place; /* in lane->jobs */
    char *error;          /* [error_size] the encoded `error` that ended it; owned */
    size_t error_size;
    qv_list dead_link; /* in requests->dead: ended, freed at the end of the event */

    size_t bytes;           /* counted for the caller and in all */
    qv_job_stream *streams; /* [n]; `one` or owned */
    qv_job_stream one;
    uint8_t id_size, owner_size;
    char id[QV_JOB_ID_MAX + 1];
    size_t submit_size;
    char submit[]; /* [submit_size] the client's message as it came */
};

struct qv_attempt {
    qv_requests *requests;
    uint64_t number; /* 0: the slot is free */
    qv_job *job;     /* NULL: an orphan */
    qv_member *member;
    qv_list member_link; /* in member->attempts */
    qv_list orphan_link; /* in requests->orphans, oldest first */
    uint64_t sent_us;    /* dispatched */
    uint64_t first_us;   /* its first delta; 0 = not yet */
    uint64_t active_us;  /* dispatched, or heard of last */
    double work;         /* counted in member->work */
    bool alone;          /* counted in member->n_alone */
    uint64_t orphan_us;
    uint64_t finished; /* bit per stream that ended in this attempt */
    uint32_t n_left;   /* streams that have not */
    uint32_t slot;     /* in requests->attempts */
};

/* --- Table ------------------------------------------------------------------------------------*/

typedef struct {
    int64_t max_queued;             /* jobs that wait for a worker */
    int64_t max_queued_per_adapter; /* of them for one adapter (base counts as one) */
    int64_t max_bytes;              /* held by all jobs and spilled messages */
    int64_t max_client_requests;    /* in flight for one client */
    int64_t max_client_bytes;       /* held by the jobs of one client */
    int64_t max_answer_bytes;       /* of one stream that is kept whole */
} qv_requests_limits;

struct qv_requests {
    qv_requests_limits limits;
    qv_fair fair;    /* who waits */
    qv_map *by_id;   /* caller serial and id → job; of one without a client: 0 and its serial */
    qv_map *by_name; /* tenant and id → the newest job, and from there the others */
    qv_heap timers;  /* jobs with a timer */
    qv_list dead;

    qv_attempt **attempts; /* [n_slots], owned; kept when they are free */
    uint32_t *free_slots;  /* [n_free] */
    uint32_t n_slots, n_free;
    uint64_t next_attempt;
    uint64_t next_serial;
    qv_list orphans;
    uint32_t n_orphans;

    int64_t n_queued, n_running, n_parked; /* running: DISPATCHED and STREAMING */
    int64_t bytes;                         /* held by all jobs */

    /* Throughput, for retry_after_ms: jobs ended in this second and, smoothed, per second before.
     */
    uint64_t window_us;
    uint64_t n_window;
    double per_second;
};

/* Errors: NOMEM. */
qv_status qv_requests_init(qv_requests *requests, const qv_requests_limits *limits);

/* Free everything that is left without telling anybody. */
void qv_requests_deinit(qv_requests *requests);

/* --- Life of a job ----------------------------------------------------------------------------*/

/* Take a submit of a client for a group, QUEUED, not in a queue yet. Limits are checked first,
 * those of the tenant too. Errors: EXISTS (id in flight), BUSY (a limit; retry can help), LIMIT
 * (can never fit), NOMEM. */
qv_status qv_requests_accept(qv_requests *requests, qv_caller *caller, qv_group *group,
                             qv_tenant *tenant, const qv_msg_submit *submit, const void *data,
                             size_t size, uint64_t seed, uint64_t now_us, qv_job **out);

/* The job of a client by its id, or of any client of a tenant (NULL: of all);
 * NULL if there are none or several. */
qv_job *qv_requests_find(const qv_requests *requests, const qv_caller *caller, const char *id,
                         size_t size);
qv_job *qv_requests_find_any(const qv_requests *requests, const char *tenant, const char *id,
                             size_t size);

/* Tenant and id in one key. */
typedef struct {
    char bytes[QV_TENANT_MAX_NAME + 1 + QV_JOB_ID_MAX];
    size_t size;
} qv_job_name;

qv_job_name qv_job_name_of(qv_str tenant, qv_str id);

/* The newest job of a tenant with this id, whoever its client is; NULL if there is none. */
qv_job *qv_requests_find_name(const qv_requests *requests, qv_str tenant, qv_str id);

/* Give a job to another client (callers->nobody: to none). Errors: EXISTS (the client has a job of
 * this id), NOMEM; nothing has changed then. */
qv_status qv_job_give(qv_job *job, qv_caller *caller);

/* Note that a message to the client carried the answer up to its present end; `joined`: together
 * with the one before. Errors: NOMEM, BUSY (max_bytes). */
qv_status qv_job_note_bound(qv_job *job, qv_job_stream *stream, bool joined);

/* Apply an event, which must be allowed. */
void qv_job_apply(qv_job *job, qv_job_event event);

/* Put it into its lane, or out. Errors: NOMEM. */
qv_status qv_job_enqueue(qv_job *job);
void qv_job_dequeue(qv_job *job);

/* When something must happen; 0 = never. Errors: NOMEM. */
qv_status qv_job_set_timer(qv_job *job, uint64_t at_us);

/* End it: out of every table, its attempt becomes an orphan. It stays readable until
 * qv_requests_bury, at the end of the event. */
void qv_job_end(qv_job *job, qv_job_event how, uint64_t now_us);
void qv_requests_bury(qv_requests *requests);

/* Count bytes that a job's answers grow by. Errors: BUSY (max_bytes). */
qv_status qv_job_grow(qv_job *job, size_t bytes);

/* --- Attempts ---------------------------------------------------------------------------------*/

/* Begin an attempt of a job on a member with credit. Errors: NOMEM. */
qv_status qv_attempt_new(qv_job *job, qv_member *member, uint64_t now_us, qv_attempt **out);

/* The attempt of a number, or NULL. */
qv_attempt *qv_requests_find_attempt(const qv_requests *requests, uint64_t number);

/* Part an attempt from its job, which ends or goes on elsewhere; the credit stays taken. */
void qv_attempt_orphan(qv_attempt *attempt, uint64_t now_us);

/* The worker is done with it: the credit returns. */
void qv_attempt_free(qv_attempt *attempt);

/* --- Views ------------------------------------------------------------------------------------*/

/* What to tell a client that was refused for a full queue: how long the queue needs. */
int64_t qv_requests_retry_ms(const qv_requests *requests);

/* Once a second or more often: measures throughput. */
void qv_requests_tick(qv_requests *requests, uint64_t now_us);

#endif
