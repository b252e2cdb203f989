/* Store: durable requests and the quarantine in Redis, for the core. It knows these keys and
 * nothing else does:
 *
 *   quiver:jobs:<broker>        stream  requests that this broker has accepted and not answered
 *   quiver:jobs                 set     brokers that have such a stream
 *   quiver:job:<tenant>/<id>    hash    where a request is (state, broker, entry), then its answer
 *   quiver:quarantine           hash    fingerprint -> what is quarantined, as text
 *
 * What several keys must agree on is written by scripts, so it is there whole or not at all. The
 * requests of a broker whose lease (quiver:broker:<id>) is gone are taken over, by a script that
 * looks at the lease again; so are a broker's own when it starts. A record names its owner, and
 * only the owner can end it: a broker that comes back from the dead finds its requests fenced.
 *
 * It has a link to Redis of its own. What it cannot say now it says again later: answers and
 * quarantine wait in memory, and requests that a lost data set forgot are written anew. The loop's
 * thread.
 */
#ifndef QV_BROKER_STORE_H
#define QV_BROKER_STORE_H

#include "broker/core.h"

typedef struct _zloop_t zloop_t;
typedef struct qv_store qv_store;

typedef struct {
    const char *url;      /* as in common/redis.h */
    const char *broker;   /* our id */
    const char *frontend; /* where clients reach us */
    int64_t lease_ms;     /* of quiver:broker:<id> */
    int64_t keep_ms;      /* an answer stays for so long */
    qv_core *core;
} qv_store_options;

/* Start; a Redis that is away is no error. Texts are copied. Errors: ARG (url), NOMEM, IO. */
qv_status qv_store_new(zloop_t *loop, const qv_store_options *options, qv_store **out);

/* NULL is fine. While the loop is not running. */
void qv_store_free(qv_store *store);

/* The core's actions; `user` is the store. */
qv_status qv_store_put(void *store, const qv_durable *durable);
void qv_store_finish(void *store, const qv_durable *durable, const void *answer, size_t size);
bool qv_store_look_up(void *store, const qv_mq_peer *peer, const qv_msg_resume_request *request);
void qv_store_quarantine(void *store, const qv_poison *poison);

/* Whether everything that was said has been confirmed. */
bool qv_store_is_idle(const qv_store *store);

/* Write the key of a request: quiver:job:<tenant>/<id>, what is not a letter, a digit or one of
 * "._-" as %XX. */
#define QV_STORE_KEY_MAX 512
const char *qv_store_job_key(char key[QV_STORE_KEY_MAX], qv_str tenant, qv_str id);

#endif
