#include "clients/quiver_client.h"

#include "common/clock.h"
#include "common/mq.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

#define DEFAULT_SEND_MS 5000
/* Largest answer that one message may carry, and what decoding it may take. */
#define MESSAGE_MAX ((size_t)64 << 20)
#define ARENA_MAX   ((size_t)512 << 20)

struct qv_client {
    qv_mq *mq;
    int64_t send_ms;
    qv_arena out_arena; /* reset at each send */
    qv_arena in_arena;  /* reset at each poll */
    qv_mq_message raw;  /* what the last polled message points into */
    bool raw_held;
    qv_message message;
};

qv_status qv_client_open(const qv_client_options *options, qv_client **out)
{
    qv_client *client = calloc(1, sizeof *client);
    if (!client)
        return qv_fail(QV_ERR_NOMEM, "client: out of memory");
    client->send_ms = options->send_ms > 0 ? options->send_ms : DEFAULT_SEND_MS;
    qv_arena_init(&client->out_arena, 0, MESSAGE_MAX);
    qv_arena_init(&client->in_arena, 0, ARENA_MAX);
    qv_mq_options mq = qv_mq_default_options(QV_MQ_DEALER, options->endpoint);
    mq.max_message_bytes = MESSAGE_MAX;
    mq.linger_ms = 500; /* a cancel sent just before the end still leaves */
    qv_status status = qv_mq_open(&mq, &client->mq);
    if (status != QV_OK) {
        qv_client_close(client);
        return status;
    }
    *out = client;
    return QV_OK;
}

static void release_last(qv_client *client)
{
    if (client->raw_held)
        qv_mq_message_release(&client->raw);
    client->raw_held = false;
}

void qv_client_close(qv_client *client)
{
    if (!client)
        return;
    release_last(client);
    qv_mq_close(client->mq);
    qv_arena_deinit(&client->out_arena);
    qv_arena_deinit(&client->in_arena);
    free(client);
}

/* Wait until the socket has `events`. Errors: TIMEOUT, CANCELLED (a signal). */
static qv_status wait_for(qv_client *client, short events, int64_t timeout_ms)
{
    zmq_pollitem_t item = {.socket = zsock_resolve(qv_mq_socket(client->mq)), .events = events};
    int n = zmq_poll(&item, 1, timeout_ms < 0 ? -1 : (long)timeout_ms);
    if (n < 0 && errno == EINTR)
        return qv_fail(QV_ERR_CANCELLED, "interrupted by a signal");
    if (n < 0)
        return qv_fail(QV_ERR_IO, "waiting for the broker: %s", zmq_strerror(errno));
    return n > 0 ? QV_OK : QV_ERR_TIMEOUT;
}

static qv_status send_message(qv_client *client, const qv_message *message)
{
    const void *data;
    size_t size;
    qv_arena_reset(&client->out_arena);
    QV_TRY(qv_message_encode(message, &client->out_arena, &data, &size));
    uint64_t deadline = qv_now_ms() + (uint64_t)client->send_ms;
    for (;;) {
        qv_status status = qv_mq_send(client->mq, NULL, data, size);
        if (status != QV_ERR_BUSY)
            return status;
        uint64_t now = qv_now_ms();
        if (now < deadline)
            status = wait_for(client, ZMQ_POLLOUT, (int64_t)(deadline - now));
        if (status == QV_ERR_CANCELLED || status == QV_ERR_IO)
            return status;
        if (qv_now_ms() >= deadline)
            return qv_fail(QV_ERR_TIMEOUT, "no broker answers at %s after %lld ms",
                           qv_mq_endpoint(client->mq), (long long)client->send_ms);
    }
}

qv_status qv_client_submit(qv_client *client, const qv_msg_submit *job)
{
    QV_TRY(qv_submit_check(job));
    qv_message message = {.type = QV_MSG_SUBMIT, .submit = *job};
    return send_message(client, &message);
}

qv_status qv_client_cancel(qv_client *client, const char *id)
{
    qv_message message = {.type = QV_MSG_CANCEL};
    qv_set(&message.cancel, cancel, id, qv_str_from(id));
    return send_message(client, &message);
}

qv_status qv_client_request_status(qv_client *client)
{
    qv_message message = {.type = QV_MSG_STATUS_REQUEST};
    return send_message(client, &message);
}

qv_status qv_client_request_explain(qv_client *client, const char *id)
{
    qv_message message = {.type = QV_MSG_EXPLAIN_REQUEST};
    qv_set(&message.explain_request, explain_request, id, qv_str_from(id));
    return send_message(client, &message);
}

/* Receive without waiting. BUSY: nothing is there. */
static qv_status receive(qv_client *client)
{
    release_last(client);
    QV_TRY(qv_mq_recv(client->mq, &client->raw));
    client->raw_held = true;
    qv_protocol_limits limits = qv_protocol_default_limits;
    limits.max_bytes = MESSAGE_MAX;
    qv_arena_reset(&client->in_arena);
    return qv_message_decode(client->raw.data, client->raw.size, QV_TO_CLIENT, &limits,
                             &client->in_arena, &client->message);
}

qv_status qv_client_poll(qv_client *client, int64_t timeout_ms, const qv_message **out)
{
    uint64_t deadline = qv_now_ms() + (uint64_t)(timeout_ms > 0 ? timeout_ms : 0);
    for (;;) {
        qv_status status = receive(client);
        if (status != QV_ERR_BUSY) {
            *out = &client->message;
            return status;
        }
        uint64_t now = qv_now_ms();
        int64_t left = timeout_ms < 0 ? -1 : now < deadline ? (int64_t)(deadline - now) : 0;
        status = wait_for(client, ZMQ_POLLIN, left);
        if (status == QV_ERR_TIMEOUT)
            return qv_fail(QV_ERR_TIMEOUT, "no message from the broker at %s for %lld ms",
                           qv_mq_endpoint(client->mq), (long long)timeout_ms);
        QV_TRY(status);
    }
}

void qv_client_new_id(char id[QV_CLIENT_ID_SIZE])
{
    unsigned char bytes[16];
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes) {
        uint64_t fallback[2] = {qv_now_ns(), (uint64_t)(uintptr_t)id};
        memcpy(bytes, fallback, sizeof bytes);
    }
    for (size_t i = 0; i < sizeof bytes; i++)
        snprintf(id + 2 * i, 3, "%02x", bytes[i]);
}
