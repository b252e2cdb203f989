/* Access: who may connect to a broker, and what for. It answers libzmq's questions about CURVE keys
 * (ZAP) from a list of keys (common/keys.h), which is read again when its file changes: a key that
 * is taken out of it can do nothing more, also over a connection that it has. The loop's thread.
 */
#ifndef QV_BROKER_ACCESS_H
#define QV_BROKER_ACCESS_H

#include "broker/core.h"
#include "common/keys.h"

typedef struct _zloop_t zloop_t;
typedef struct qv_access qv_access;

/* ZAP domains of the two sockets. */
#define QV_ACCESS_CLIENTS "clients"
#define QV_ACCESS_WORKERS "workers"

typedef struct {
    uint64_t refused_unknown; /* connections with a key that is not in the list */
    uint64_t refused_rights;  /* with one that may not do what the socket is for */
    uint64_t refused_other;   /* that did not say who they are */
} qv_access_stats;

/* Read the list and answer questions from then on; before the sockets are bound. Errors: IO, FORMAT
 * and others (the list), STATE (something else answers already). */
qv_status qv_access_open(zloop_t *loop, const char *path, qv_access **out);
void qv_access_close(qv_access *access); /* NULL is fine; while the loop is not running */

/* What the sender of a message may do; never NULL. `user` is its User-Id (its key), or NULL. */
const qv_identity *qv_access_identity(const qv_access *access, const char *user);
bool qv_access_is_worker(const qv_access *access, const char *user);

/* Read the list again if its file changed; a list that makes no sense changes nothing. */
void qv_access_check(qv_access *access);

const qv_access_stats *qv_access_get_stats(const qv_access *access);

#endif
