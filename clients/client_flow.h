/* Flow: which request is at which broker, and what to say to whom when a connection comes or goes.
 *
 * A request whose connection is lost is asked for again with `resume`, at the same broker when it
 * is back or at another. Where none has it, it is submitted anew with what was received so far, so
 * that it goes on there. No sockets and no clock: its owner tells it of connections and messages
 * and sends what it asks to be sent. One thread.
 */
#ifndef QV_CLIENTS_CLIENT_FLOW_H
#define QV_CLIENTS_CLIENT_FLOW_H

#include "common/protocol.h"

#define QV_FLOW_MAX_LINKS 32

typedef struct qv_flow qv_flow;

typedef struct {
    /* Send over a connection. False: it cannot take it now; then it counts as lost. */
    bool (*send)(void *user, uint32_t link, const qv_message *message);
    void *user;
} qv_flow_actions;

/* Endpoints [n] are those of the connections, to know them in `broker` of an error; copied.
 * Errors: LIMIT, NOMEM. */
qv_status qv_flow_new(const char *const *endpoints, uint32_t n, const qv_flow_actions *actions,
                      qv_flow **out);
void qv_flow_free(qv_flow *flow); /* NULL is fine */

/* A request; `data` is its encoded submit. Errors: EXISTS (its id is in flight), NOMEM. */
qv_status qv_flow_submit(qv_flow *flow, const qv_msg_submit *submit, const void *data, size_t size,
                         uint64_t now_ms);

/* A request that was submitted elsewhere or earlier: `have` [n] is the last seq of each stream.
 * Errors: as above, ARG. */
qv_status qv_flow_resume(qv_flow *flow, qv_str id, qv_str tenant, const int32_t *have, uint32_t n,
                         uint64_t now_ms);

/* Cancel a request where it is, or any broker's. False: no broker is there. */
bool qv_flow_cancel(qv_flow *flow, qv_str id);

/* Connections. */
void qv_flow_connected(qv_flow *flow, uint32_t link, uint64_t now_ms);
void qv_flow_disconnected(qv_flow *flow, uint32_t link, uint64_t now_ms);
bool qv_flow_is_up(const qv_flow *flow, uint32_t link);

/* A connection that is up, in turns; -1: none. */
int qv_flow_any_link(qv_flow *flow);

/* Whether a message is for the user; false: it was dealt with, or is of the past. */
bool qv_flow_take(qv_flow *flow, uint32_t link, const qv_message *message, uint64_t now_ms);

/* Place what waits. Returns when to call this again, 0 = when something happens. */
uint64_t qv_flow_poll(qv_flow *flow, uint64_t now_ms);

#endif
