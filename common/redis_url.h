/* Where a Redis is: redis://user:password@host:port/db or unix:///path?db=N, or several with commas
 * between them. */
#ifndef QV_COMMON_REDIS_URL_H
#define QV_COMMON_REDIS_URL_H

#include "common/redis.h"

typedef struct {
    char *host; /* or the path of a socket, when `port` is 0 */
    char *user, *password;
    int port, db;
    char shown[256]; /* without the password */
} qv_redis_url;

/* On failure nothing is left to free. Errors: ARG (the message names the url without its password
 * and what is wrong with it), NOMEM. */
qv_status qv_redis_urls_parse(const char *text, qv_redis_url urls[QV_REDIS_MAX_SERVERS], size_t *n);
void qv_redis_urls_deinit(qv_redis_url *urls, size_t n);

#endif
