/* The engine thread: runs an engine for the I/O thread. Commands go in and reports come out through
 * two rings; nothing else is shared but the numbers in qv_engine_view.
 *
 * A broker's numbers of requests are only unique within one session with it. So requests have
 * numbers of our own inside the engine, and this is where the two meet: what a step gave becomes
 * one encoded `step` message a session, with its broker's numbers and its epoch. When a session
 * changes, what still runs of it is aborted and whatever comes of it is dropped here.
 *
 * start, push, pop, stop and join belong to one thread, the I/O thread's or the one before and
 * after it. Reports are never dropped: while nobody takes them, the engine waits.
 */
#ifndef QV_WORKER_ENGINE_THREAD_H
#define QV_WORKER_ENGINE_THREAD_H

#include "common/options.h"
#include "worker/engine.h"

#include <stdatomic.h>

typedef struct qv_engine_thread qv_engine_thread;

/* Brokers that the worker is registered with at once; each has a number below this. */
#define QV_MAX_SESSIONS 8

/* --- Commands -------------------------------------------------------------------------------- */

typedef enum {
    QV_COMMAND_SESSION, /* of `session` `epoch` counts now; abort its requests (0 = it is over) */
    QV_COMMAND_RUN,     /* a request */
    QV_COMMAND_ABORT,   /* end the request that the broker calls `number` */
    QV_COMMAND_LOAD,    /* an adapter */
    QV_COMMAND_UNLOAD,
} qv_command_type;

typedef struct {
    qv_command_type type;
    uint32_t session; /* SESSION, RUN, ABORT */
    uint64_t epoch;
    uint64_t number;     /* RUN, ABORT: the broker's */
    uint64_t own_number; /* RUN: the request's in the engine; never used twice */
    uint32_t n_streams;  /* RUN: that have not ended elsewhere; at least 1 */
    qv_request *request; /* RUN; owned by the command */
    char *name;          /* LOAD, UNLOAD, RUN of a request that goes on: the adapter; owned */
    char *path;          /* LOAD; owned */
    char *digest;        /* RUN that goes on, UNLOAD: only this version (NULL = any); owned */
    bool pin;            /* LOAD */
    bool trusted;        /* LOAD: from our own options, not from a broker */
    const char *reason;  /* ABORT: "cancelled" or "deadline"; a literal */
} qv_command;

void qv_command_deinit(qv_command *command);

/* --- Reports --------------------------------------------------------------------------------- */

typedef enum {
    QV_REPORT_OPENED,  /* the model is loaded: qv_engine_thread_engine() is there from now on */
    QV_REPORT_STEP,    /* an encoded `step` message */
    QV_REPORT_ADAPTER, /* an adapter's state changed */
    QV_REPORT_FAILED,  /* the engine is of no use; the thread has ended. The last report */
} qv_report_type;

typedef struct {
    qv_report_type type;
    uint32_t session;          /* STEP: whose requests they are */
    uint64_t epoch;            /* STEP */
    void *data;                /* STEP; owned */
    size_t size;               /* STEP */
    qv_adapter_event *adapter; /* ADAPTER; one block of memory with its texts; owned */
    qv_status status;          /* FAILED */
    char *text;                /* FAILED: the sentence; owned, may be NULL */
} qv_report;

void qv_report_deinit(qv_report *report);

/* --- Numbers --------------------------------------------------------------------------------- */

typedef enum {
    QV_ACTIVITY_LOADING, /* the model */
    QV_ACTIVITY_WORKING, /* in a turn of the loop: every turn changes `turns` */
    QV_ACTIVITY_IDLE,    /* asleep until there is a command or a loaded adapter */
    QV_ACTIVITY_BLOCKED, /* waits for its reports to be taken */
    QV_ACTIVITY_ENDED
} qv_activity;

/* Written by the engine thread, read by any. All accesses are relaxed: each number stands for
 * itself. */
typedef struct {
    atomic_int activity; /* qv_activity */
    atomic_ullong turns, steps, generated;
    atomic_int running, waiting, free_pages, free_slots;
} qv_engine_view;

const qv_engine_view *qv_engine_thread_view(const qv_engine_thread *thread);

/* --- Life ------------------------------------------------------------------------------------ */

typedef struct {
    qv_engine_options engine; /* strings are borrowed until OPENED or FAILED was reported */
    size_t max_message_bytes; /* a larger `step` message is split; a stream that cannot be ends */
    qv_string_list adapter_roots; /* where the adapters of LOAD may lie; none: anywhere */
    qv_metrics *metrics;          /* may be NULL; outlives the thread */
} qv_engine_thread_options;

/* Start to load the model. Errors: NOMEM, IO. */
qv_status qv_engine_thread_start(const qv_engine_thread_options *options, qv_engine_thread **out);

/* NULL until OPENED was popped. For qv_request_new and the immutable facts. */
const qv_engine *qv_engine_thread_engine(const qv_engine_thread *thread);

/* Give a command and what it owns; false when there is no room, and nothing has changed. The last
 * few places are kept for commands that are not RUN. */
bool qv_engine_thread_push(qv_engine_thread *thread, const qv_command *command);

/* Room for another RUN? */
bool qv_engine_thread_has_room(const qv_engine_thread *thread);

/* Take the next report; false when there is none. The fd is readable when there may be some. */
bool qv_engine_thread_pop(qv_engine_thread *thread, qv_report *out);
int qv_engine_thread_fd(const qv_engine_thread *thread);

/* Requests that were pushed and whose last delta has not been reported. Once it is 0, every report
 * about them can be popped. */
size_t qv_engine_thread_n_requests(const qv_engine_thread *thread);

/* Ask it to end after the step in hand. */
void qv_engine_thread_stop(qv_engine_thread *thread);

/* Wait for its end, close the engine and free all. False: it is still in a step or a load after
 * `timeout_ms`, and nothing was freed; only the end of the process can end it. NULL is fine. */
bool qv_engine_thread_join(qv_engine_thread *thread, int64_t timeout_ms);

#endif
