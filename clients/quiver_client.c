#include "clients/quiver_client.h"

#include "clients/client_flow.h"
#include "common/clock.h"
#include "common/mq.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#define DEFAULT_SEND_MS 5000
/* Largest answer that one message may carry, and what decoding it may take. */
#define MESSAGE_MAX ((size_t)64 << 20)
#define ARENA_MAX   ((size_t)512 << 20)

struct qv_client {
    qv_mq *links[QV_FLOW_MAX_LINKS]; /* [n_links], a connection a broker */
    uint32_t n_links, next_link;
    qv_flow *flow;
    char *endpoint; /* as given, for people; owned */
    int64_t send_ms;
    qv_arena out_arena; /* reset at each send */
    qv_arena in_arena;  /* reset at each poll */
    qv_mq_message raw;  /* what the last polled message points into */
    bool raw_held;
    qv_message message;
};

/* --- Opening ----------------------------------------------------------------------------------*/

static bool send_now(void *user, uint32_t link, const qv_message *message)
{
    qv_client *client = user;
    const void *data;
    size_t size;
    qv_arena_reset(&client->out_arena);
    return qv_message_encode(message, &client->out_arena, &data, &size) == QV_OK &&
           qv_mq_send(client->links[link], NULL, data, size) == QV_OK;
}

static qv_status open_link(qv_client *client, const char *endpoint, const qv_curve *curve)
{
    qv_mq_options mq = qv_mq_default_options(QV_MQ_DEALER, endpoint);
    mq.max_message_bytes = MESSAGE_MAX;
    mq.linger_ms = 500; /* a cancel sent just before the end still leaves */
    mq.monitor = true;
    mq.curve = curve;
    QV_TRY(qv_mq_open(&mq, &client->links[client->n_links]));
    client->n_links++;
    return QV_OK;
}

static qv_status open_links(qv_client *client, char *list, const qv_curve *curve)
{
    const char *endpoints[QV_FLOW_MAX_LINKS];
    const qv_flow_actions actions = {.send = send_now, .user = client};
    for (char *one; (one = strsep(&list, ",")) != NULL;) {
        if (client->n_links == QV_FLOW_MAX_LINKS)
            return qv_fail(QV_ERR_LIMIT, "more than %d brokers", QV_FLOW_MAX_LINKS);
        endpoints[client->n_links] = one;
        QV_TRY(open_link(client, one, curve));
    }
    return qv_flow_new(endpoints, client->n_links, &actions, &client->flow);
}

qv_status qv_client_open(const qv_client_options *options, qv_client **out)
{
    qv_client *client = calloc(1, sizeof *client);
    char *list = strdup(options->endpoint);
    qv_curve curve = {0};
    if (client == NULL || list == NULL || (client->endpoint = strdup(options->endpoint)) == NULL) {
        free(client);
        free(list);
        return qv_fail(QV_ERR_NOMEM, "client: out of memory");
    }
    client->send_ms = options->send_ms > 0 ? options->send_ms : DEFAULT_SEND_MS;
    qv_arena_init(&client->out_arena, 0, MESSAGE_MAX);
    qv_arena_init(&client->in_arena, 0, ARENA_MAX);
    qv_status status = (options->key != NULL) == (options->broker_key != NULL)
                           ? QV_OK
                           : qv_fail(QV_ERR_ARG, "a key and the brokers' public key go together");
    if (status == QV_OK && options->key != NULL)
        status = qv_key_pair_read(options->key, &curve.own);
    if (status == QV_OK && options->key != NULL)
        status = qv_public_key_get(options->broker_key, curve.server_key);
    if (status == QV_OK)
        status = open_links(client, list, options->key != NULL ? &curve : NULL);
    explicit_bzero(&curve, sizeof curve);
    free(list);
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
    qv_flow_free(client->flow);
    for (uint32_t i = 0; i < client->n_links; i++)
        qv_mq_close(client->links[i]);
    qv_arena_deinit(&client->out_arena);
    qv_arena_deinit(&client->in_arena);
    free(client->endpoint);
    free(client);
}

/* --- Connections ------------------------------------------------------------------------------*/

static void take_events(qv_client *client)
{
    for (uint32_t i = 0; i < client->n_links; i++)
        for (qv_mq_event event; (event = qv_mq_next_event(client->links[i])) != QV_MQ_NO_EVENT;)
            if (event == QV_MQ_CONNECTED)
                qv_flow_connected(client->flow, i, qv_now_ms());
            else
                qv_flow_disconnected(client->flow, i, qv_now_ms());
}

/* Wait until a message or an event is there, or what waits is due. Errors: TIMEOUT (of the caller's
 * deadline), CANCELLED (a signal), IO. */
static qv_status wait_for(qv_client *client, uint64_t deadline_ms)
{
    zmq_pollitem_t items[2 * QV_FLOW_MAX_LINKS];
    for (uint32_t i = 0; i < client->n_links; i++) {
        items[2 * i] = (zmq_pollitem_t){.socket = zsock_resolve(qv_mq_socket(client->links[i])),
                                        .events = ZMQ_POLLIN};
        items[2 * i + 1] =
            (zmq_pollitem_t){.socket = qv_mq_monitor(client->links[i]), .events = ZMQ_POLLIN};
    }
    uint64_t now_ms = qv_now_ms(), due_ms = qv_flow_poll(client->flow, now_ms);
    uint64_t until_ms = due_ms != 0 && due_ms < deadline_ms ? due_ms : deadline_ms;
    long wait_ms = until_ms == UINT64_MAX ? -1 : until_ms > now_ms ? (long)(until_ms - now_ms) : 0;
    int n = zmq_poll(items, (int)(2 * client->n_links), wait_ms);
    if (n < 0 && errno == EINTR)
        return qv_fail(QV_ERR_CANCELLED, "interrupted by a signal");
    if (n < 0)
        return qv_fail(QV_ERR_IO, "waiting for the broker: %s", zmq_strerror(errno));
    take_events(client);
    return n == 0 && qv_now_ms() >= deadline_ms ? QV_ERR_TIMEOUT : QV_OK;
}

/* Wait until some broker is there. */
static qv_status connect_any(qv_client *client)
{
    uint64_t deadline_ms = qv_now_ms() + (uint64_t)client->send_ms;
    take_events(client);
    for (;;) {
        for (uint32_t i = 0; i < client->n_links; i++)
            if (qv_flow_is_up(client->flow, i))
                return QV_OK;
        qv_status status = wait_for(client, deadline_ms);
        if (status == QV_ERR_TIMEOUT)
            return qv_fail(QV_ERR_TIMEOUT, "no broker answers at %s after %lld ms",
                           client->endpoint, (long long)client->send_ms);
        QV_TRY(status);
    }
}

/* Send a message that is of no request in flight. */
static qv_status ask(qv_client *client, const qv_message *message)
{
    uint64_t deadline_ms = qv_now_ms() + (uint64_t)client->send_ms;
    do {
        QV_TRY(connect_any(client));
        int link = qv_flow_any_link(client->flow);
        if (link >= 0 && send_now(client, (uint32_t)link, message))
            return QV_OK;
        if (link >= 0)
            qv_flow_disconnected(client->flow, (uint32_t)link, qv_now_ms());
    } while (qv_now_ms() < deadline_ms);
    return qv_fail(QV_ERR_TIMEOUT, "no broker answers at %s after %lld ms", client->endpoint,
                   (long long)client->send_ms);
}

/* --- Calls ------------------------------------------------------------------------------------*/

qv_status qv_client_submit(qv_client *client, const qv_msg_submit *job)
{
    QV_TRY(qv_submit_check(job));
    qv_message message = {.type = QV_MSG_SUBMIT, .submit = *job};
    const void *data;
    size_t size;
    QV_TRY(connect_any(client));
    qv_arena arena;
    qv_arena_init(&arena, 0, MESSAGE_MAX);
    qv_status status = qv_message_encode(&message, &arena, &data, &size);
    if (status == QV_OK)
        status = qv_flow_submit(client->flow, job, data, size, qv_now_ms());
    qv_arena_deinit(&arena);
    return status;
}

qv_status qv_client_resume(qv_client *client, const char *id, const char *tenant,
                           const int32_t *have, uint32_t n)
{
    QV_TRY(connect_any(client));
    return qv_flow_resume(client->flow, qv_str_from(id), qv_str_from(tenant), have, n, qv_now_ms());
}

qv_status qv_client_cancel(qv_client *client, const char *id)
{
    QV_TRY(connect_any(client));
    if (!qv_flow_cancel(client->flow, qv_str_from(id)))
        return qv_fail(QV_ERR_TIMEOUT, "no broker at %s takes the cancel of %s now",
                       client->endpoint, id);
    return QV_OK;
}

qv_status qv_client_request_status(qv_client *client)
{
    qv_message message = {.type = QV_MSG_STATUS_REQUEST};
    return ask(client, &message);
}

qv_status qv_client_request_explain(qv_client *client, const char *id)
{
    qv_message message = {.type = QV_MSG_EXPLAIN_REQUEST};
    qv_set(&message.explain_request, explain_request, id, qv_str_from(id));
    return ask(client, &message);
}

/* Receive without waiting, from each connection in turn. BUSY: nothing is there. */
static qv_status receive(qv_client *client)
{
    release_last(client);
    for (uint32_t i = 0; i < client->n_links; i++) {
        uint32_t link = client->next_link++ % client->n_links;
        qv_status status = qv_mq_recv(client->links[link], &client->raw);
        if (status == QV_ERR_BUSY)
            continue;
        QV_TRY(status);
        client->raw_held = true;
        qv_protocol_limits limits = qv_protocol_default_limits;
        limits.max_bytes = MESSAGE_MAX;
        qv_arena_reset(&client->in_arena);
        QV_TRY(qv_message_decode(client->raw.data, client->raw.size, QV_TO_CLIENT, &limits,
                                 &client->in_arena, &client->message));
        if (qv_flow_take(client->flow, link, &client->message, qv_now_ms()))
            return QV_OK;
        release_last(client);
        i = UINT32_MAX; /* look at all of them again */
    }
    return QV_ERR_BUSY;
}

qv_status qv_client_poll(qv_client *client, int64_t timeout_ms, const qv_message **out)
{
    uint64_t deadline_ms = timeout_ms < 0 ? UINT64_MAX : qv_now_ms() + (uint64_t)timeout_ms;
    take_events(client);
    for (;;) {
        qv_status status = receive(client);
        if (status != QV_ERR_BUSY) {
            *out = &client->message;
            return status;
        }
        status = wait_for(client, deadline_ms);
        if (status == QV_ERR_TIMEOUT)
            return qv_fail(QV_ERR_TIMEOUT, "no message from the broker at %s for %lld ms",
                           client->endpoint, (long long)timeout_ms);
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
