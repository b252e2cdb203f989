/* Mirror: hashes in Redis kept equal to what their owner says. It remembers each hash that was put,
 * sends what changed, sends everything in full when the link has come back, repairs what somebody
 * else changed or deleted, and renews leases. Puts while the link is down are remembered.
 *
 * Belongs to one qv_redis and its thread. Free the qv_redis first: its last answers come here.
 */
#ifndef QV_COMMON_MIRROR_H
#define QV_COMMON_MIRROR_H

#include "common/redis.h"

typedef struct qv_mirror qv_mirror;

typedef struct {
    const char *name;
    const char *value; /* NULL: the hash does not have this field */
} qv_mirror_field;

/* Errors: NOMEM. */
qv_status qv_mirror_new(qv_redis *redis, qv_mirror **out);
void qv_mirror_free(qv_mirror *mirror); /* NULL is fine */

/* The hash at `key` has exactly these fields; without any the key does not exist. With lease_ms > 0
 * the key lives so long after each renewal. Texts are copied. Out of memory leaves the hash as it
 * was and says so in the log. */
void qv_mirror_put(qv_mirror *mirror, const char *key, const qv_mirror_field *fields, size_t n,
                   int64_t lease_ms);

/* Whether `key` was put and not deleted since. */
bool qv_mirror_holds(const qv_mirror *mirror, const char *key, size_t size);

/* Forget what Redis is known to have and send everything (the link came up, or data was lost). */
void qv_mirror_resend(qv_mirror *mirror);

/* Send again what Redis refused or lost since. Once a second, say. */
void qv_mirror_retry(qv_mirror *mirror);

/* Extend all leases; one that had run out is sent in full. */
void qv_mirror_renew(qv_mirror *mirror);

/* Ask Redis whether the hashes are still complete; what is not is sent again. Now and then. */
void qv_mirror_check(qv_mirror *mirror);

#endif
