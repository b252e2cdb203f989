/* Worker: an engine that serves the pool. One process, one model, many adapters.
 *
 * Two threads besides the caller's: the I/O thread has the DEALER to the broker, the lease in Redis
 * and every timer (worker/session.h, common/registry.h); the engine thread runs the steps
 * (worker/engine_thread.h). They meet at two rings. The caller starts, drains, stops and waits; the
 * functions here may be called from any thread, one at a time.
 */
#ifndef QV_WORKER_WORKER_H
#define QV_WORKER_WORKER_H

#include "common/options.h"
#include "worker/engine.h"

typedef struct qv_worker qv_worker;

/* Where a broker's --backend listens by default. */
#define QV_WORKER_DEFAULT_BROKER "tcp://127.0.0.1:5556"

/* Settings; the table in worker/main.c documents them. Texts must outlive the worker. */
typedef struct {
    qv_engine_options engine;
    const char *id;         /* NULL: host name, process id, random digits */
    const char *model_name; /* what the pool calls the model; NULL: last part of model_dir */
    qv_string_list brokers; /* endpoints of brokers, to register with all of them; none: those that
                               Redis knows, or without a Redis QV_WORKER_DEFAULT_BROKER */
    const char *key;        /* path of our key pair for CURVE; NULL = in the clear */
    const char *broker_key; /* the brokers' public key, or the path of a file that has it */
    qv_string_list adapter_roots; /* folders that adapters may come from; none: anywhere */
    const char *redis;            /* URL; NULL, "" or "none": no lease, no discovery */
    qv_string_list adapters;      /* NAME=DIR: loaded and pinned from the start */

    const char *metrics_address;
    int64_t metrics_port;        /* 0 = a free one, -1 = none */
    int64_t drain_timeout_ms;    /* how long a drain lets requests run; 0 = not at all */
    int64_t stall_timeout_ms;    /* a step that takes longer hangs: no heartbeats; 0 = never */
    int64_t register_timeout_ms; /* for one broker, before the next is tried */
    int64_t lease_ms;            /* of quiver:worker:<id> */
    int64_t max_message_bytes;   /* either way; no more than the broker's limit */
} qv_worker_options;

/* Check the options, serve metrics, start both threads. Loading the model and registering go on
 * after it. Errors: ARG (id, adapters, brokers, redis), IO (threads, metrics port), NOMEM. */
qv_status qv_worker_start(const qv_worker_options *options, qv_worker **out);

/* Take nothing new, finish what runs, say goodbye, end. A second call changes nothing. */
void qv_worker_drain(qv_worker *worker);

/* Say goodbye and end now; what runs goes on elsewhere. Also after drain. */
void qv_worker_stop(qv_worker *worker);

/* Readable once the worker has ended. */
int qv_worker_fd(const qv_worker *worker);

/* Wait for the end. OK: it was drained or stopped. Errors: BUSY (the drain ran out of time; what
 * was left goes on elsewhere), and why the engine failed: those of qv_engine_open and
 * qv_engine_step, TIMEOUT (a step never ended). */
qv_status qv_worker_wait(qv_worker *worker);

/* Stop, wait, free all. NULL is fine. False: the engine is still inside a load or a step and
 * nothing was freed; only the end of the process ends that (_exit). */
bool qv_worker_free(qv_worker *worker);

/* Facts: its id, and the port of its metrics (0 = none). */
const char *qv_worker_id(const qv_worker *worker);
uint16_t qv_worker_metrics_port(const qv_worker *worker);

#endif
