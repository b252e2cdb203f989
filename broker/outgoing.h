/* Outgoing: what a batch of events makes the broker send, encoded and kept until the end of the
 * batch, then sent in one go. Sending wakes ZeroMQ's I/O thread; a whole batch that wakes it once
 * costs half the CPU time of the same messages one by one, and a batch of one message costs nothing
 * more.
 *
 * Sends fail late, then: the owner is told who was gone or busy when the batch is flushed. What
 * follows for a busy peer in the same batch is handed back as well, so that its order holds. The
 * broker's thread.
 */
#ifndef QV_BROKER_OUTGOING_H
#define QV_BROKER_OUTGOING_H

#include "common/arena.h"
#include "common/mq.h"
#include "common/protocol.h"

typedef struct {
    qv_mq *mq;
    const qv_mq_peer *peer; /* in the arena, as is the data; of its id only what holds */
    const void *data;
    size_t size;
    qv_status
        status; /* of sending it; the first failure of a peer goes for its later messages too */
} qv_outgoing_message;

typedef struct {
    qv_outgoing_message *messages; /* [n], owned */
    size_t n, capacity;
    size_t bytes; /* of them all */
    qv_arena arena;
    bool has_failures;
} qv_outgoing;

/* A zeroed struct is empty. */
void qv_outgoing_deinit(qv_outgoing *outgoing);

/* Encode a message for a peer. Errors: NOMEM, LIMIT. */
qv_status qv_outgoing_add(qv_outgoing *outgoing, qv_mq *mq, const qv_mq_peer *peer,
                          const qv_message *message);

/* Whether it holds so much that it should be flushed before the batch ends. */
bool qv_outgoing_is_full(const qv_outgoing *outgoing);

/* Send everything. `failed` gets each message that was not taken, and its peer as a whole: BUSY or
 * NOT_FOUND and others; it may add messages, which are sent too. Empty afterwards. */
void qv_outgoing_flush(qv_outgoing *outgoing,
                       void (*failed)(void *user, const qv_mq_peer *peer,
                                      const qv_outgoing_message *message),
                       void *user);

#endif
