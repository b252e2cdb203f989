/* Redis: an asynchronous client on a zloop, made of hiredis contexts and the reconnecting, timing
 * out and giving up that hiredis leaves to its user.
 *
 * One object is one server as its owner sees it: a link for commands and, once something is
 * subscribed, a second one for subscriptions. A link that is lost comes back by itself, with
 * exponential back-off and jitter; a server that accepts connections but does not answer counts as
 * lost. Nothing here blocks the loop, host names are resolved beside it too. Commands are sent when
 * they are made (hiredis pipelines them) and answered in order; while the link is down they fail at
 * once, so an owner keeps what matters and sends it again in on_up.
 *
 * Everything belongs to the thread of the loop. Callbacks run from the loop or from the call that
 * failed at once; they may make commands.
 */
#ifndef QV_COMMON_REDIS_H
#define QV_COMMON_REDIS_H

#include "common/status.h"

#include <hiredis/hiredis.h>
#include <stdarg.h>
#include <stdint.h>

typedef struct _zloop_t zloop_t;
typedef struct qv_redis qv_redis;

#define QV_REDIS_MAX_SERVERS 8

typedef struct {
    /* redis://[[user]:password@]host[:port][/db], unix:///path[?db=n] or
     * unix://[user]:password@/path[?db=n]. Users and passwords may be percent-encoded. Several,
     * parted by commas, are a server and its replicas (the same database): the first that takes
     * writes is used, and another when that is lost and one of them was promoted. */
    const char *url;
    const char *name;           /* CLIENT SETNAME, so that CLIENT LIST reads well; NULL = none */
    int64_t connect_timeout_ms; /* to resolve, connect and authenticate; 0 = 3000 */
    int64_t command_timeout_ms; /* oldest unanswered command older than this: lost; 0 = 5000 */
    int64_t ping_ms;            /* ping after so long without an answer; 0 = 2000 */
    int64_t backoff_min_ms;     /* first wait before another try; 0 = 100 */
    int64_t backoff_max_ms;     /* longest wait; 0 = 5000 */
    int64_t max_outstanding;    /* commands without an answer; more fail with BUSY; 0 = 65536 */

    /* The command link is usable, the server is a writable one and has loaded its data. */
    void (*on_up)(void *user);
    /* It was usable and is no more, and why. Unanswered commands fail before this. */
    void (*on_down)(const char *reason, void *user);
    void *user;
} qv_redis_options;

/* Start connecting; a server that is away is no error. The options' texts are copied.
 * Errors: ARG (malformed url, said without the password), NOMEM, IO (no descriptor). */
qv_status qv_redis_new(zloop_t *loop, const qv_redis_options *options, qv_redis **out);

/* Close without waiting; unanswered commands fail with CANCELLED, on_down is not called. NULL is
 * fine. Only while the loop is not running (zloop_start has returned, or was not called yet). */
void qv_redis_free(qv_redis *redis);

/* Check a URL as qv_redis_new does. Errors: ARG. */
qv_status qv_redis_check_url(const char *url);

/* --- facts about the link -------------------------------------------------------------------- */

bool qv_redis_is_up(const qv_redis *redis);
int qv_redis_db(const qv_redis *redis);             /* number of the database */
const char *qv_redis_run_id(const qv_redis *redis); /* of the server last seen; "" if hidden */
const char *qv_redis_evicts(const qv_redis *redis); /* its eviction policy if it evicts any
                                                       key, else NULL */
uint64_t qv_redis_connects(const qv_redis *redis);  /* times that the link came up */
size_t qv_redis_room(const qv_redis *redis);        /* commands that it takes now; 0 = down */

/* --- commands -------------------------------------------------------------------------------- */

/* The answer to a command, once per command. `status` is
 *   OK         `reply` is the answer, not an error; borrowed for the call;
 *   ERR_STATE  the server refused: `reply` is its error, qv_error() the sentence;
 *   ERR_BUSY   not sent or not answered (link down, lost, too many outstanding); `reply` is NULL;
 *   ERR_CANCELLED  qv_redis_free; `reply` is NULL.
 * After BUSY a command may have been executed or not. */
typedef void qv_redis_fn(qv_status status, const redisReply *reply, void *user);

/* Send a command of binary-safe words; `sizes` NULL: they are strings. `fn` may be NULL: fire and
 * forget. A transaction is a row of commands: see first that there is room for all of them. */
void qv_redis_command(qv_redis *redis, int argc, const char *const *argv, const size_t *sizes,
                      qv_redis_fn *fn, void *user);

/* The same from a format in the manner of hiredis: words parted by blanks, %s a string, %b pointer
 * and size_t of bytes (each within one word), %d %lld %llu numbers. */
void qv_redis_commandf(qv_redis *redis, qv_redis_fn *fn, void *user, const char *format, ...);

/* --- subscriptions --------------------------------------------------------------------------- */

/* Receive what is published on the channels of a glob pattern (PSUBSCRIBE) over the second link,
 * again after each reconnect. Messages published while that link is down are lost: take them as
 * hints. `fn` gets channel and payload, borrowed; and NULL, NULL each time that the subscription
 * (again) holds. The pattern is copied. Errors: NOMEM, LIMIT (more than 8 patterns). */
typedef void qv_redis_message_fn(const char *channel, const char *payload, size_t payload_size,
                                 void *user);
qv_status qv_redis_subscribe(qv_redis *redis, const char *pattern, qv_redis_message_fn *fn,
                             void *user);

#endif
