/* Callers: the clients as the broker sees them, and the messages that wait for slow ones.
 *
 * A message that the socket cannot take now is kept, encoded, in the caller's spill queue and sent
 * in order when there is room. Tokens of the same stream are joined while they wait, so that a slow
 * reader costs little more than its text. The queue is bounded in bytes; a message that does not
 * fit is refused, and its request is failed by the owner. It does not come to that as a rule: at
 * half of the bound the caller is choked, and its owner stops what runs for it until most of it was
 * read. A caller who takes nothing for a long time is stalled: its requests end, with an error that
 * it finds when it reads again in the place of their pieces. One whose connection is gone, or who
 * does not even take that, is given up.
 *
 * A caller exists while it has requests in flight or messages waiting. Peers with and without a
 * delimiter frame are different callers. `nobody` is the caller of requests that go on without a
 * client; what is sent to it is gone. Pure; one thread.
 */
#ifndef QV_BROKER_CALLERS_H
#define QV_BROKER_CALLERS_H

#include "broker/list.h"
#include "common/arena.h"
#include "common/map.h"
#include "common/mq.h"
#include "common/protocol.h"

typedef struct qv_callers qv_callers;
typedef struct qv_caller qv_caller;

struct qv_caller {
    qv_callers *callers;
    qv_list link; /* in callers->all */
    qv_mq_peer peer;
    uint64_t serial;   /* never used again */
    bool gone;         /* cannot be reached any more: its jobs are to be dropped */
    qv_list gone_link; /* in callers->gone */

    qv_list jobs; /* of qv_job.caller_link, for the owner */
    int64_t n_jobs;
    int64_t n_dead; /* jobs that have ended but still refer to it */
    int64_t bytes;  /* of its jobs */

    qv_list spill;      /* messages that wait */
    qv_list spill_link; /* in callers->spilling while there are any */
    int64_t spill_bytes;
    int64_t n_spilled;
    uint64_t stalled_us; /* since when nothing could be sent */
    bool stalled;        /* its requests were ended for that */
    bool choked;         /* nothing should run for it */
    qv_list flow_link;   /* in callers->flow: its state of choking or stalling changed */
};

/* How messages leave. OK: taken. BUSY: no room now. NOT_FOUND: the peer is gone. Anything else
 * counts as gone too. */
typedef qv_status qv_caller_send_fn(void *user, const qv_mq_peer *peer, const qv_message *message);

struct qv_callers {
    qv_map *by_peer; /* id and delimiter → caller */
    qv_list all, spilling, gone, flow;
    qv_caller *nobody;
    uint64_t next_serial;
    int64_t max_spill_bytes;       /* of one caller */
    int64_t max_spill_messages;    /* of one caller */
    int64_t max_total_spill_bytes; /* of all */
    int64_t spill_bytes;           /* of all, now */
    qv_caller_send_fn *send;
    void *user;
    qv_arena scratch; /* to encode and decode what spills */
};

/* For bytes that we encoded ourselves. */
extern const qv_protocol_limits qv_callers_own_limits;

/* Errors: NOMEM. */
qv_status qv_callers_init(qv_callers *callers, int64_t max_spill_bytes,
                          int64_t max_total_spill_bytes, qv_caller_send_fn *send, void *user);
void qv_callers_deinit(qv_callers *callers);

/* The caller of a peer; require makes it (NULL: no memory). */
qv_caller *qv_callers_find(const qv_callers *callers, const qv_mq_peer *peer);
qv_caller *qv_callers_require(qv_callers *callers, const qv_mq_peer *peer);

/* Free it if nothing refers to it: no jobs, no messages, and it is not about to be dropped. */
void qv_caller_release(qv_caller *caller);

/* Send a message, or keep it behind those that wait. `job` is the serial of the request that it
 * belongs to (0 = none). *joined (may be NULL) says that a `tokens` message was joined to one that
 * waits, which keeps its seq: the number of this one is free. `must` ignores the bound: for the few
 * messages that end requests. Errors: BUSY (no room in the spill queue), NOT_FOUND (gone), NOMEM.
 */
qv_status qv_caller_send(qv_caller *caller, uint64_t job, const qv_message *message, bool must,
                         uint64_t now_us, bool *joined);

/* Keep a message that was taken to be sent and came back BUSY; it goes behind what waits. Errors:
 * as qv_caller_send. */
qv_status qv_caller_keep(qv_caller *caller, uint64_t job, const qv_message *message, bool must,
                         uint64_t now_us);

/* Forget the waiting messages of a request. */
void qv_caller_drop_spill(qv_caller *caller, uint64_t job);

/* Send what waits, to everybody. Callers that were choked and have room again, and those that could
 * take nothing for `stalled_ms`, are put into callers->flow; stalled ones that still take nothing
 * after that are given up. */
void qv_callers_flush(qv_callers *callers, int64_t stalled_ms, uint64_t now_us);

/* Note that a caller is gone: the owner finds it in callers->gone. */
void qv_caller_lose(qv_caller *caller);

/* Free a caller that is gone and has no jobs. */
void qv_caller_free(qv_caller *caller);

#endif
