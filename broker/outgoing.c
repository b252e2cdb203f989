/* Failures are rare: only after one is each message compared with those before it. */
#include "broker/outgoing.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define FULL_MESSAGES 1024
#define FULL_BYTES    ((size_t)1 << 20)

void qv_outgoing_deinit(qv_outgoing *outgoing)
{
    free(outgoing->messages);
    qv_arena_deinit(&outgoing->arena);
    *outgoing = (qv_outgoing){0};
}

/* Most ids have a few bytes of the many that they may have, and messages for one peer often follow
 * each other. */
static qv_status keep_peer(qv_outgoing *outgoing, const qv_mq_peer *peer, const qv_mq_peer **out)
{
    if (outgoing->n > 0) {
        *out = outgoing->messages[outgoing->n - 1].peer;
        if (qv_mq_peer_equal(*out, peer) && (*out)->delimiter == peer->delimiter)
            return QV_OK;
    }
    *out = qv_arena_memdup(&outgoing->arena, peer, offsetof(qv_mq_peer, id) + peer->size,
                           _Alignof(qv_mq_peer));
    return *out != NULL ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory for an outgoing message");
}

qv_status qv_outgoing_add(qv_outgoing *outgoing, qv_mq *mq, const qv_mq_peer *peer,
                          const qv_message *message)
{
    if (outgoing->n == outgoing->capacity) {
        size_t capacity = outgoing->capacity ? 2 * outgoing->capacity : 64;
        qv_outgoing_message *grown = realloc(outgoing->messages, capacity * sizeof *grown);
        if (grown == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for %zu outgoing messages", capacity);
        outgoing->messages = grown;
        outgoing->capacity = capacity;
    }
    qv_outgoing_message *next = &outgoing->messages[outgoing->n];
    QV_TRY(keep_peer(outgoing, peer, &next->peer));
    QV_TRY(qv_message_encode(message, &outgoing->arena, &next->data, &next->size));
    next->mq = mq;
    outgoing->n++;
    outgoing->bytes += next->size;
    return QV_OK;
}

bool qv_outgoing_is_full(const qv_outgoing *outgoing)
{
    return outgoing->n >= FULL_MESSAGES || outgoing->bytes >= FULL_BYTES;
}

/* What became of the peer's messages so far. */
static qv_status earlier_failure(const qv_outgoing *outgoing, size_t i)
{
    const qv_outgoing_message *message = &outgoing->messages[i];
    while (i-- > 0) {
        const qv_outgoing_message *earlier = &outgoing->messages[i];
        if (earlier->status != QV_OK && earlier->mq == message->mq &&
            qv_mq_peer_equal(earlier->peer, message->peer))
            return earlier->status;
    }
    return QV_OK;
}

void qv_outgoing_flush(qv_outgoing *outgoing,
                       void (*failed)(void *user, const qv_mq_peer *peer,
                                      const qv_outgoing_message *message),
                       void *user)
{
    for (size_t i = 0; i < outgoing->n; i++) {
        qv_outgoing_message *message = &outgoing->messages[i];
        message->status = outgoing->has_failures ? earlier_failure(outgoing, i) : QV_OK;
        if (message->status == QV_OK)
            message->status = qv_mq_send(message->mq, message->peer, message->data, message->size);
        if (message->status == QV_OK)
            continue;
        outgoing->has_failures = true;
        qv_outgoing_message copy = *message; /* `failed` may make the array move */
        qv_mq_peer peer = {0};
        memcpy(&peer, message->peer, offsetof(qv_mq_peer, id) + message->peer->size);
        failed(user, &peer, &copy);
    }
    outgoing->n = outgoing->bytes = 0;
    outgoing->has_failures = false;
    qv_arena_reset(&outgoing->arena);
}
