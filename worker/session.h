/* Session: a worker's registration with a broker, over a DEALER; one at a time of those it is given.
 *
 *     SEEKING --> JOINING --> JOINED
 *        ^___________|___________|     lost: another socket, another broker if there is one
 *
 * It connects, says `ready`, is given an epoch by `welcome`, and keeps both sides' heartbeats. A
 * broker that is silent for the time it named itself, that refuses or that does not know us (any
 * more) is left: with a fresh socket, so that nothing of the old session can leak into the next,
 * after a wait that grows. What a session was to send and did not is dropped with it.
 *
 * It knows the wire but not what requests or adapters are: those messages go to its owner. One
 * thread: that of the loop, callbacks included.
 */
#ifndef QV_WORKER_SESSION_H
#define QV_WORKER_SESSION_H

#include "common/mq.h"
#include "common/protocol.h"

typedef struct _zloop_t zloop_t;
typedef struct qv_session qv_session;

typedef struct {
    int64_t register_timeout_ms; /* for a connection and a `welcome`; then the next broker */
    const qv_curve *curve;       /* NULL = in the clear; copied into each socket */
    size_t max_message_bytes;    /* a broker that sends a larger one is disconnected */
    size_t max_backlog_bytes;    /* a broker for which so much waits is given up; 0 = no limit */

    /* Fill what the worker is into `ready`; texts live until the next call into the session. */
    void (*fill_ready)(qv_msg_ready *ready, qv_arena *arena, void *user);
    /* Fill a heartbeat; false: do not send one (the engine hangs), so that the broker notices. */
    bool (*fill_heartbeat)(qv_msg_heartbeat *heartbeat, void *user);
    /* A session has begun; and it has ended, and why. */
    void (*joined)(const char *broker, void *user);
    void (*left)(const char *why, void *user);
    /* A message of this session for the owner; borrowed. */
    void (*message)(const qv_message *message, void *user);
    /* Whether another message can be taken now; while it cannot, the socket is not read. */
    bool (*has_room)(void *user);
    void *user;
} qv_session_options;

/* It does nothing until it has brokers. Errors: NOMEM. */
qv_status qv_session_new(zloop_t *loop, const qv_session_options *options, qv_session **out);

/* Close the socket at once. While the loop is not running. NULL is fine. */
void qv_session_free(qv_session *session);

/* The endpoints to try, in turn; copied. A session that there is goes on. Errors: NOMEM. */
qv_status qv_session_set_brokers(qv_session *session, const char *const *endpoints, size_t n);

/* Seeking a broker (and none may be known). */
bool qv_session_is_seeking(const qv_session *session);

/* The epoch of the session; 0 while there is none. */
uint64_t qv_session_epoch(const qv_session *session);

/* Milliseconds since the broker was last heard; 0 without a session. */
uint64_t qv_session_silence_ms(const qv_session *session);

/* Messages of ended sessions that came anyway and were ignored, and those that made no sense. */
uint64_t qv_session_n_ghosts(const qv_session *session);
uint64_t qv_session_n_malformed(const qv_session *session);

/* Send an encoded message of this session, in order. Takes `data`, made by malloc. What the socket
 * does not take now waits here. */
void qv_session_send(qv_session *session, void *data, size_t size);

/* Encode and send. Errors: as qv_message_encode, NOMEM. */
qv_status qv_session_send_message(qv_session *session, const qv_message *message);

/* Whether messages wait: give no more than what must not be delayed. */
bool qv_session_has_backlog(const qv_session *session);

/* Send a heartbeat now, since something changed. */
void qv_session_heartbeat(qv_session *session);

/* End the session with a goodbye and seek no other. Frames leave for up to 500 ms after free. */
void qv_session_close(qv_session *session, const char *reason);

#endif
