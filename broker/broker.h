/* The broker as a process: an event loop around the core. It owns the two ROUTER sockets (frontend
 * for clients, backend for workers), the timers, the registry in Redis and what the metrics show;
 * every decision is the core's. One thread opens, runs and closes it; qv_broker_stop is for any
 * thread and for signal handlers.
 */
#ifndef QV_BROKER_BROKER_H
#define QV_BROKER_BROKER_H

#include "broker/core.h"
#include "common/keys.h"
#include "common/metrics.h"

typedef struct qv_broker qv_broker;

/* Texts are borrowed and must outlive the broker. */
typedef struct {
    qv_core_options core;
    const char *frontend; /* where clients connect; several parted by commas; port * = a free one */
    const char *backend;  /* where workers connect */
    const char *redis;    /* URL; NULL = no registry: workers' own adapters only */
    const qv_key_pair *key;    /* CURVE for both sockets; NULL = in the clear, for anybody */
    const char *access;        /* path of the list of keys; with key */
    int64_t durable_keep_ms;   /* the answer of a durable request stays in Redis for so long */
    int64_t drain_timeout_ms;  /* a stop waits so long for what is in flight */
    int64_t max_message_bytes; /* a peer that sends more is cut off; above the core's own limits */
    int64_t client_queue; /* messages that ZeroMQ holds for a client before it counts as slow */
    qv_metrics *metrics;  /* NULL = none; the caller's */
} qv_broker_options;

/* Bind the sockets, start to connect to Redis. A URL that makes no sense is an error, a Redis that
 * is away is not. Errors: ARG, IO (an address is in use), NOMEM. */
qv_status qv_broker_open(const qv_broker_options *options, qv_broker **out);

/* Serve until a stop. Errors: IO (a socket broke). */
qv_status qv_broker_run(qv_broker *broker);

/* The first call: refuse new requests, finish those in flight until the drain timeout, fail the
 * rest, and end. The second: end at once. Any thread; safe in a signal handler. */
void qv_broker_stop(qv_broker *broker);

/* close(NULL) is fine. */
void qv_broker_close(qv_broker *broker);

/* Endpoints as they are bound. Borrowed. */
const char *qv_broker_frontend(const qv_broker *broker);
const char *qv_broker_backend(const qv_broker *broker);

/* For /readyz: whether a request could run now, else why not into reason[size]. Any thread. */
bool qv_broker_is_ready(void *broker, char *reason, size_t size);

#endif
