/* Registry: the adapter directory in Redis. It knows every key of Quiver's and nothing else does:
 *
 *   quiver:want:<adapter>     hash    people     desired state: path, replicas, pin, workers ...
 *   quiver:tenant:<name>      hash    people     a tenant's weight and limits
 *   quiver:drain:<id>         hash    people     a worker or broker that shall take nothing new
 *   quiver:adapter:<adapter>  hash    broker     what is: state, rank, digest, bytes, replicas ...
 *   quiver:place:<adapter>    hash    broker     worker id -> gpu, cpu or loading
 *   quiver:worker:<id>        hash    worker     a lease: what a worker is and does
 *   quiver:broker:<id>        hash    broker     a lease: where to connect
 *   quiver:events             stream  all        one entry per change: who, what, why
 *   quiver:schema, quiver:doc string  broker     version of the keys; a text that explains them
 *
 * A broker watches what is wanted and publishes what is; a worker publishes its lease; workers and
 * clients find brokers. What is published is kept here too: only changes are sent, and all of it is
 * sent again when Redis comes back, so the owner just says how things are and never looks whether
 * Redis is up. While it is down nothing is reported as changed. docs/redis.md is the operator's
 * view of the same.
 *
 * One thread: the one of the loop, callbacks included.
 */
#ifndef QV_COMMON_REGISTRY_H
#define QV_COMMON_REGISTRY_H

#include "common/status.h"
#include "common/want.h"

#include <stdint.h>

typedef struct _zloop_t zloop_t;
typedef struct qv_registry qv_registry;

#define QV_REGISTRY_PREFIX  "quiver:"
#define QV_REGISTRY_SCHEMA  "1" /* value of quiver:schema */
#define QV_REGISTRY_MAX_KEY 192 /* bytes of any key, terminator included */

/* --- start and stop -------------------------------------------------------------------------- */

typedef struct {
    const char *url;  /* as in common/redis.h */
    const char *who;  /* our id in quiver:events, in CLIENT LIST and in leases */
    int64_t scan_ms;  /* between reconciling scans of what is wanted; 0 = 2000 */
    int64_t lease_ms; /* life of quiver:worker and quiver:broker, renewed at a third; 0 = 6000 */

    bool watch; /* a broker: watch quiver:want, keep schema and doc, prune what nobody publishes */
    /* quiver:adapter and quiver:place keys that are not ours are left of an earlier broker; delete
     * them so long after the first scan, when the workers had time to register; 0 = 10000. */
    int64_t prune_ms;

    /* Redis is usable, or not any more and why. Either may be NULL. */
    void (*up)(void *user);
    void (*down)(const char *reason, void *user);

    /* What is wanted changed; `want` NULL: it was deleted (also one that was invalid all along).
     * Only on change, never while Redis is down, and not when a data set was lost: what was wanted
     * is written back then. `want` is borrowed for the call. */
    void (*want_changed)(const char *name, const qv_want *want, void *user);

    /* A quiver:want that makes no sense, with a sentence for people. What held for the name before
     * goes on to hold. Once per change. `name` is made printable if it was not. */
    void (*want_invalid)(const char *name, const char *reason, void *user);

    /* What people set for a tenant, or for a worker or broker to drain, changed; want NULL, drain
     * false: it was deleted. On the same terms as want_changed. Either may be NULL. */
    void (*tenant_changed)(const char *name, const qv_tenant_want *want, void *user);
    void (*drain_changed)(const char *id, bool drain, void *user);

    /* Redis functions to load when the link came up (FUNCTION LOAD REPLACE), borrowed for ever;
     * NULL: none. A server without functions goes without. */
    const char *functions;

    /* The first scan after the link came up is complete: what is wanted is now known. */
    void (*synced)(void *user);
    void *user;
} qv_registry_options;

/* Start; a Redis that is away is no error. Texts are copied. Errors: ARG (url, who), NOMEM, IO. */
qv_status qv_registry_new(zloop_t *loop, const qv_registry_options *options, qv_registry **out);

/* Close at once; leases run out by themselves. Use qv_registry_leave first for a clean goodbye.
 * NULL is fine. Not from a callback of this registry. */
void qv_registry_free(qv_registry *registry);

/* Delete our leases (worker, broker) and call `done` when Redis has confirmed, or at once when it
 * is down. Nothing is published after this. `done` may be NULL. */
void qv_registry_leave(qv_registry *registry, void (*done)(void *user), void *user);

bool qv_registry_is_up(const qv_registry *registry);

/* Scan quiver:want now instead of at the next turn. */
void qv_registry_scan(qv_registry *registry);

/* --- publishing: a broker -------------------------------------------------------------------- */

/* One quiver:adapter:<name>. NULL texts and negative numbers are left out. */
typedef struct {
    const char *state; /* "ready", "loading", "partial", "failed", "invalid", ... */
    const char *path;
    const char *digest;
    const char *reason; /* when it is not as wanted */
    int64_t rank;
    int64_t bytes;
    int64_t replicas; /* that there are */
    int64_t replicas_wanted;
    int64_t replicas_goal; /* what demand asks for */
    const char *split;     /* what it stands for */
} qv_adapter_record;

/* Say how an adapter is; NULL deletes its key. */
void qv_registry_put_adapter(qv_registry *registry, const char *name,
                             const qv_adapter_record *record);

typedef struct {
    const char *worker; /* id */
    const char *tier;   /* "gpu", "cpu" or "loading" */
} qv_place_row;

/* Say where an adapter is: all rows; n = 0 deletes the key. */
void qv_registry_put_place(qv_registry *registry, const char *adapter, const qv_place_row *rows,
                           size_t n);

/* Lease quiver:broker:<who>. Endpoints are what others connect to. */
typedef struct {
    const char *frontend; /* for clients */
    const char *backend;  /* for workers */
    const char *version;
    int64_t workers, in_flight, queued; /* negative = left out */
    const char *demand;                 /* for other brokers (broker/peers.h) */
} qv_broker_record;

void qv_registry_put_broker(qv_registry *registry, const qv_broker_record *record);

/* --- publishing: a worker -------------------------------------------------------------------- */

/* Lease quiver:worker:<who>. NULL texts and negative numbers are left out. */
typedef struct {
    const char *state; /* "starting", "ready", "draining" */
    const char *model, *backend, *devices, *version, *broker;
    int64_t capacity, adapter_slots, free_slots;
    int64_t total_pages, free_pages;
    int64_t running, waiting;
    const char *adapters; /* names of what it holds, parted by blanks */
} qv_worker_record;

void qv_registry_put_worker(qv_registry *registry, const qv_worker_record *record);

/* --- events ---------------------------------------------------------------------------------- */

/* Add to quiver:events: `what` happened ("adapter_loaded"), to which adapter and worker (NULL =
 * does not apply), and why. Kept while Redis is down (the latest 1000). */
void qv_registry_event(qv_registry *registry, const char *what, const char *adapter,
                       const char *worker, const char *why, ...)
    __attribute__((format(printf, 5, 6)));

/* --- discovery ------------------------------------------------------------------------------- */

typedef struct {
    const char *id, *frontend, *backend;
    const char *demand; /* "" = none */
    int64_t workers;    /* that are ready there */
} qv_broker_address;

/* Look up the brokers that hold a lease. `found` is called once: on success with n >= 0 rows,
 * borrowed for the call, ordered by id; with a failed status when Redis is down (at once) or goes
 * down, or the registry is freed. */
void qv_registry_find_brokers(qv_registry *registry,
                              void (*found)(qv_status status, const qv_broker_address *brokers,
                                            size_t n, void *user),
                              void *user);

/* --- editing desired state (tools) ----------------------------------------------------------- */

/* Set path, replicas, pin and workers of quiver:want:<name>, and max_replicas and tenants if there
 * are any; its other fields stay. Or delete it with want NULL. `done` (may be NULL) learns how it
 * went (BUSY, at once, while Redis is down) and whether the key was there before. Errors, without a
 * call of `done`: ARG (name, want). */
qv_status qv_registry_set_want(qv_registry *registry, const char *name, const qv_want *want,
                               void (*done)(qv_status status, bool existed, void *user),
                               void *user);

/* --- keys ------------------------------------------------------------------------------------ */

typedef enum {
    QV_KEY_WANT,
    QV_KEY_TENANT,
    QV_KEY_DRAIN,
    QV_KEY_ADAPTER,
    QV_KEY_PLACE,
    QV_KEY_WORKER,
    QV_KEY_BROKER,
    QV_KEY_EVENTS, /* the rest takes no name */
    QV_KEY_SCHEMA,
    QV_KEY_DOC
} qv_key_kind;

/* Write "quiver:want:<name>" into key[QV_REGISTRY_MAX_KEY] and return it. */
const char *qv_registry_key(char *key, qv_key_kind kind, const char *name);

#endif
