/* What the parts of the worker share:
 *
 *   worker.c            options, metrics, start, stop, wait
 *   worker_io.c         the I/O thread: the loop that ties session, engine and registry together
 *   worker_adapters.c   which adapters there are, for the broker and for Redis
 */
#ifndef QV_WORKER_WORKER_INTERNAL_H
#define QV_WORKER_WORKER_INTERNAL_H

#include "common/map.h"
#include "common/registry.h"
#include "worker/engine_thread.h"
#include "worker/model_digest.h"
#include "worker/session.h"
#include "worker/worker.h"

#include <pthread.h>
#include <stdatomic.h>

typedef enum { ORDER_NONE, ORDER_DRAIN, ORDER_STOP } worker_order;

typedef struct {
    qv_counter *requests, *refused, *registrations, *loads, *failed_loads;
    qv_gauge *registered, *silence, *in_flight, *redis_up;
} worker_metrics;

/* A place for a session with one broker. */
typedef struct {
    struct qv_worker *worker;
    qv_session *session; /* NULL: not in use yet */
    uint32_t number;
    char *endpoint;             /* owned; NULL: of no broker now */
    char broker[QV_ID_MAX + 1]; /* its id while there is a session, else "" */
} worker_link;

struct qv_worker {
    qv_worker_options options;
    char id[QV_ID_MAX + 1];
    int64_t instance; /* drawn at the start: tells this process from others of the same id */
    char model[257];
    char model_digest[QV_MODEL_DIGEST_SIZE];
    qv_curve curve; /* if options.key is set */
    qv_metrics *metrics;
    qv_metrics_server *server;
    worker_metrics counts;
    qv_engine_thread *engine;
    pthread_t thread;
    bool thread_started, thread_joined;

    int order_fd;     /* eventfd: look at `order` */
    atomic_int order; /* relaxed: order_fd orders it */
    int ended_fd;     /* eventfd: the I/O thread is at its end */
    qv_status status; /* of the end; written by the I/O thread before ended_fd */
    char *text;

    /* For /readyz: written by the I/O thread, read by the server's; relaxed, each stands alone. */
    atomic_bool is_open, is_registered, is_draining, is_stalled;

    /* The I/O thread's. */
    zloop_t *loop;
    worker_link links[QV_MAX_SESSIONS];
    size_t n_links;        /* that were ever used */
    qv_registry *registry; /* NULL: no Redis */
    qv_map *held;          /* name -> held_adapter */
    qv_arena arena;        /* of one submit */
    uint64_t next_number;  /* of requests in the engine */
    bool discovering;
    bool draining, leaving, left; /* `left`: the lease is gone, or nobody is there to confirm it */
    bool ended;
    uint64_t drain_until_ms, leave_until_ms, record_ms, discover_ms;
    unsigned long long turns; /* of the engine, when last looked at */
    uint64_t turned_ms;       /* since when they are so */
    uint64_t tick_ms;         /* of the last tick */
    bool takes_reports;       /* the engine's fd is in the loop */
    uint64_t rate_ms, rate_tokens;
    double rate; /* tokens per second */
};

/* The thread that owns the loop, the session and the registry. `arg` is the qv_worker. */
void *qv_worker_io_main(void *arg);

/* Whether the options name a Redis. */
bool qv_worker_has_redis(const qv_worker_options *options);

/* Take an engine's event in: the list, the log, the counters and the broker. */
void qv_worker_on_adapter(qv_worker *worker, const qv_adapter_event *event);

/* Fill the list of `ready` from the arena. */
void qv_worker_fill_adapters(const qv_worker *worker, qv_msg_ready *ready, qv_arena *arena);

/* Names of the adapters that are ready, parted by blanks; cut when there are very many. */
void qv_worker_list_adapters(const qv_worker *worker, char *out, size_t size);

/* Frees a value of worker->held. */
void qv_worker_free_held(void *value);

#endif
