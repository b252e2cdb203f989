#include "common/mq.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* A routing id of ours: 'q' (an id must not begin with a zero byte) and 16 random bytes. */
#define ROUTING_ID_BYTES 17

#define HEARTBEAT_LIVES 3 /* intervals without a sign of life until a connection counts as dead */

struct qv_mq {
    qv_mq_options options; /* its strings are NULL: see below */
    qv_curve curve;        /* if options.curve is set, which points here then */
    char *endpoint;        /* as given; owned */
    char *bound;           /* resolved endpoints, joined by commas; NULL when connecting; owned */
    zsock_t *socket;       /* NULL after a failed reopen; owned */
    zsock_t *monitor;      /* NULL: nobody wants to know; owned */
    void *handle;          /* the libzmq socket inside */
    qv_mq_stats stats;
};

qv_mq_options qv_mq_default_options(qv_mq_type type, const char *endpoint)
{
    return (qv_mq_options){.type = type,
                           .endpoint = endpoint,
                           .bind = type == QV_MQ_ROUTER,
                           .max_message_bytes = 32u << 20,
                           .high_water_mark = 10000,
                           .linger_ms = 0,
                           .handshake_ms = 3000,
                           .heartbeat_ms = 1000};
}

/* --- opening --------------------------------------------------------------------------------- */

static void set_random_routing_id(void *handle)
{
    unsigned char id[ROUTING_ID_BYTES] = {'q'};
    /* Requests of up to 256 bytes are neither interrupted nor cut short. */
    QV_ASSERT(getrandom(id + 1, sizeof(id) - 1, 0) == sizeof(id) - 1);
    zmq_setsockopt(handle, ZMQ_ROUTING_ID, id, sizeof(id));
}

static void set_int(void *handle, int option, int value)
{
    zmq_setsockopt(handle, option, &value, sizeof(value));
}

static void set_curve(void *handle, const qv_curve *curve, bool bind)
{
    zmq_setsockopt(handle, ZMQ_CURVE_PUBLICKEY, curve->own.public_key, QV_KEY_SIZE);
    zmq_setsockopt(handle, ZMQ_CURVE_SECRETKEY, curve->own.secret_key, QV_KEY_SIZE);
    if (bind) {
        set_int(handle, ZMQ_CURVE_SERVER, 1);
        zmq_setsockopt(handle, ZMQ_ZAP_DOMAIN, curve->domain, strlen(curve->domain));
    } else {
        zmq_setsockopt(handle, ZMQ_CURVE_SERVERKEY, curve->server_key, QV_KEY_SIZE);
    }
}

static void configure(void *handle, const qv_mq_options *options)
{
    int64_t max_bytes = options->max_message_bytes > 0 ? (int64_t)options->max_message_bytes : -1;
    zmq_setsockopt(handle, ZMQ_MAXMSGSIZE, &max_bytes, sizeof(max_bytes));
    set_int(handle, ZMQ_SNDHWM, options->high_water_mark);
    set_int(handle, ZMQ_RCVHWM, options->high_water_mark);
    set_int(handle, ZMQ_LINGER, options->linger_ms);
    set_int(handle, ZMQ_HANDSHAKE_IVL, options->handshake_ms);
    set_int(handle, ZMQ_TCP_KEEPALIVE, 1);
    if (options->heartbeat_ms > 0) {
        set_int(handle, ZMQ_HEARTBEAT_IVL, options->heartbeat_ms);
        set_int(handle, ZMQ_HEARTBEAT_TIMEOUT, HEARTBEAT_LIVES * options->heartbeat_ms);
        set_int(handle, ZMQ_HEARTBEAT_TTL, HEARTBEAT_LIVES * options->heartbeat_ms);
    }
    if (options->curve != NULL)
        set_curve(handle, options->curve, options->bind);
    if (options->type == QV_MQ_ROUTER) {
        /* Say so when a peer is gone or its queue is full; the default drops the message. */
        set_int(handle, ZMQ_ROUTER_MANDATORY, 1);
    } else {
        set_random_routing_id(handle);
        /* Queue only for a finished connection, never for a peer that may not come. */
        set_int(handle, ZMQ_IMMEDIATE, 1);
        set_int(handle, ZMQ_RECONNECT_IVL, 50);
        set_int(handle, ZMQ_RECONNECT_IVL_MAX, 2000);
    }
}

/* Append the endpoint that the socket was bound to last, ports resolved. */
static qv_status add_bound(qv_mq *mq)
{
    char last[1024];
    size_t size = sizeof(last);
    if (zmq_getsockopt(mq->handle, ZMQ_LAST_ENDPOINT, last, &size) != 0)
        return qv_fail(QV_ERR_IO, "no endpoint after binding: %s", zmq_strerror(errno));
    char *joined = NULL;
    if (asprintf(&joined, "%s%s%s", mq->bound != NULL ? mq->bound : "",
                 mq->bound != NULL ? "," : "", last) < 0)
        return qv_fail(QV_ERR_NOMEM, "no memory for the endpoint %s", last);
    free(mq->bound);
    mq->bound = joined;
    return QV_OK;
}

static qv_status attach_one(qv_mq *mq, const char *endpoint)
{
    if (strchr(endpoint, '[') != NULL) /* tcp://[::1]:5555 */
        set_int(mq->handle, ZMQ_IPV6, 1);
    int rc = mq->options.bind ? zmq_bind(mq->handle, endpoint) : zmq_connect(mq->handle, endpoint);
    if (rc != 0) {
        bool malformed = errno == EINVAL || errno == EPROTONOSUPPORT || errno == ENOCOMPATPROTO;
        return qv_fail(malformed ? QV_ERR_ARG : QV_ERR_IO, "cannot %s %s: %s",
                       mq->options.bind ? "bind" : "connect to", endpoint, zmq_strerror(errno));
    }
    return mq->options.bind ? add_bound(mq) : QV_OK;
}

static qv_status attach(qv_mq *mq)
{
    if (!mq->options.bind)
        return attach_one(mq, mq->endpoint);
    char *list = strdup(mq->endpoint), *rest = list;
    if (list == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the endpoint %s", mq->endpoint);
    qv_status status = QV_OK;
    for (char *one; status == QV_OK && (one = strsep(&rest, ",")) != NULL;)
        status = attach_one(mq, one);
    free(list);
    return status;
}

static qv_status open_monitor(qv_mq *mq)
{
    char name[64];
    snprintf(name, sizeof name, "inproc://quiver-monitor-%p", mq->handle);
    int events = ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED;
    if (zmq_socket_monitor(mq->handle, name, events) == 0 &&
        (mq->monitor = zsock_new(ZMQ_PAIR)) != NULL && zsock_connect(mq->monitor, "%s", name) == 0)
        return QV_OK;
    return qv_fail(QV_ERR_IO, "no monitor for %s: %s", mq->endpoint, zmq_strerror(errno));
}

static void close_socket(qv_mq *mq)
{
    if (mq->monitor != NULL)
        zmq_socket_monitor(mq->handle, NULL, 0);
    zsock_destroy(&mq->monitor);
    zsock_destroy(&mq->socket);
}

/* Make a new socket; on failure there is none. */
static qv_status open_socket(qv_mq *mq)
{
    /* CZMQ would take over SIGINT and SIGTERM; programs handle their own signals. */
    zsys_handler_set(NULL);
    mq->socket = zsock_new(mq->options.type == QV_MQ_ROUTER ? ZMQ_ROUTER : ZMQ_DEALER);
    if (mq->socket == NULL)
        return qv_fail(QV_ERR_IO, "no socket for %s: %s", mq->endpoint, zmq_strerror(errno));
    mq->handle = zsock_resolve(mq->socket);
    configure(mq->handle, &mq->options);
    qv_status status = mq->options.monitor ? open_monitor(mq) : QV_OK;
    if (status == QV_OK)
        status = attach(mq);
    if (status != QV_OK)
        close_socket(mq);
    return status;
}

qv_status qv_mq_open(const qv_mq_options *options, qv_mq **out)
{
    if (options->endpoint == NULL || options->endpoint[0] == 0)
        return qv_fail(QV_ERR_ARG, "an endpoint is empty, \"tcp://host:port\" was expected");
    if (!options->bind && strchr(options->endpoint, ',') != NULL)
        return qv_fail(QV_ERR_ARG, "cannot connect to %s: one endpoint was expected",
                       options->endpoint);
    qv_mq *mq = calloc(1, sizeof(*mq));
    char *endpoint = strdup(options->endpoint);
    if (mq == NULL || endpoint == NULL) {
        free(mq);
        free(endpoint);
        return qv_fail(QV_ERR_NOMEM, "no memory for the endpoint %s", options->endpoint);
    }
    mq->options = *options;
    mq->options.endpoint = NULL;
    if (options->curve != NULL) {
        mq->curve = *options->curve;
        mq->options.curve = &mq->curve;
    }
    mq->endpoint = endpoint;
    qv_status status = open_socket(mq);
    if (status == QV_OK)
        *out = mq;
    else
        qv_mq_close(mq);
    return status;
}

void qv_mq_close(qv_mq *mq)
{
    if (mq == NULL)
        return;
    close_socket(mq);
    free(mq->bound);
    free(mq->endpoint);
    explicit_bzero(&mq->curve, sizeof mq->curve);
    free(mq);
}

qv_status qv_mq_reopen(qv_mq *mq)
{
    /* libzmq lets go of an address some time after the socket is closed: binding it again would
     * race. */
    if (mq->options.bind)
        return qv_fail(QV_ERR_STATE, "%s: only a connecting endpoint can be reopened",
                       mq->endpoint);
    close_socket(mq);
    return open_socket(mq);
}

zsock_t *qv_mq_socket(const qv_mq *mq)
{
    return mq->socket;
}

const char *qv_mq_endpoint(const qv_mq *mq)
{
    return mq->bound != NULL ? mq->bound : mq->endpoint;
}

const qv_mq_stats *qv_mq_get_stats(const qv_mq *mq)
{
    return &mq->stats;
}

/* --- connections ----------------------------------------------------------------------------- */

void *qv_mq_monitor(const qv_mq *mq)
{
    return mq->monitor != NULL ? zsock_resolve(mq->monitor) : NULL;
}

qv_mq_event qv_mq_next_event(qv_mq *mq)
{
    qv_mq_event event = QV_MQ_NO_EVENT;
    void *handle = qv_mq_monitor(mq);
    while (handle != NULL && event == QV_MQ_NO_EVENT) {
        zmq_msg_t frame;
        zmq_msg_init(&frame);
        if (zmq_msg_recv(&frame, handle, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(&frame);
            break;
        }
        uint16_t number =
            0; /* the event, then its value; the address follows in a frame of its own */
        if (zmq_msg_size(&frame) >= sizeof number)
            memcpy(&number, zmq_msg_data(&frame), sizeof number);
        event = number == ZMQ_EVENT_HANDSHAKE_SUCCEEDED ? QV_MQ_CONNECTED
                : number == ZMQ_EVENT_DISCONNECTED      ? QV_MQ_DISCONNECTED
                                                        : QV_MQ_NO_EVENT;
        while (zmq_msg_more(&frame) && zmq_msg_recv(&frame, handle, ZMQ_DONTWAIT) >= 0)
            continue;
        zmq_msg_close(&frame);
    }
    return event;
}

/* --- peers ----------------------------------------------------------------------------------- */

bool qv_mq_peer_equal(const qv_mq_peer *a, const qv_mq_peer *b)
{
    return a->size == b->size && memcmp(a->id, b->id, a->size) == 0;
}

char *qv_mq_peer_text(const qv_mq_peer *peer, char text[2 * QV_MQ_ID_MAX + 1])
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < peer->size; i++) {
        text[2 * i] = digits[peer->id[i] >> 4];
        text[2 * i + 1] = digits[peer->id[i] & 15];
    }
    text[2 * (size_t)peer->size] = 0;
    return text;
}

/* --- receiving ------------------------------------------------------------------------------- */

static qv_status no_socket(const qv_mq *mq)
{
    return qv_fail(QV_ERR_STATE, "%s: there is no socket", mq->endpoint);
}

/* The next frame into `frame`, which is initialised. Waits for nothing: of a multipart message all
 * frames are there once the first one is. */
static qv_status next_frame(qv_mq *mq, zmq_msg_t *frame)
{
    int rc;
    do
        rc = zmq_msg_recv(frame, mq->handle, ZMQ_DONTWAIT);
    while (rc < 0 && errno == EINTR);
    if (rc >= 0)
        return QV_OK;
    if (errno == EAGAIN)
        return QV_ERR_BUSY;
    return qv_fail(QV_ERR_IO, "cannot receive at %s: %s", qv_mq_endpoint(mq), zmq_strerror(errno));
}

/* Pass over the rest of a message whose latest frame is in `frame`. */
static qv_status drop_rest(qv_mq *mq, zmq_msg_t *frame)
{
    while (zmq_msg_more(frame))
        QV_TRY(next_frame(mq, frame));
    return QV_OK;
}

/* Read the envelope, leaving the first frame after it in `frame`. */
static qv_status recv_envelope(qv_mq *mq, zmq_msg_t *frame, qv_mq_peer *peer)
{
    QV_TRY(next_frame(mq, frame));
    if (mq->options.type == QV_MQ_ROUTER) {
        peer->size = (uint8_t)zmq_msg_size(frame); /* libzmq's ids have at most 255 bytes */
        memcpy(peer->id, zmq_msg_data(frame), peer->size);
        if (!zmq_msg_more(frame))
            return qv_fail(QV_ERR_FORMAT, "a message without a body");
        QV_TRY(next_frame(mq, frame));
    }
    if (zmq_msg_size(frame) == 0 && zmq_msg_more(frame)) {
        peer->delimiter = true;
        QV_TRY(next_frame(mq, frame));
    }
    return QV_OK;
}

static qv_status recv_message(qv_mq *mq, qv_mq_message *out)
{
    QV_TRY(recv_envelope(mq, &out->frame, &out->peer));
    if (zmq_msg_more(&out->frame)) {
        QV_TRY(drop_rest(mq, &out->frame));
        return qv_fail(QV_ERR_FORMAT, "a message of several frames, one was expected");
    }
    if (zmq_msg_size(&out->frame) == 0)
        return qv_fail(QV_ERR_FORMAT, "a message without a body");
    return QV_OK;
}

qv_status qv_mq_recv(qv_mq *mq, qv_mq_message *out)
{
    if (mq->socket == NULL)
        return no_socket(mq);
    out->peer.size = 0;
    out->peer.delimiter = false;
    out->user = NULL;
    zmq_msg_init(&out->frame);
    qv_status status = recv_message(mq, out);
    if (status == QV_OK) {
        out->data = zmq_msg_data(&out->frame);
        out->size = zmq_msg_size(&out->frame);
        out->user = mq->options.curve != NULL && mq->options.bind
                        ? zmq_msg_gets(&out->frame, "User-Id")
                        : NULL;
        mq->stats.received++;
        mq->stats.received_bytes += out->size;
    } else {
        zmq_msg_close(&out->frame);
        mq->stats.malformed += status == QV_ERR_FORMAT;
    }
    return status;
}

void qv_mq_message_release(qv_mq_message *message)
{
    zmq_msg_close(&message->frame);
    message->data = NULL;
    message->size = 0;
}

/* --- sending --------------------------------------------------------------------------------- */

static int send_frame(void *handle, const void *data, size_t size, int flags)
{
    int rc;
    do
        rc = zmq_send(handle, data, size, ZMQ_DONTWAIT | flags);
    while (rc < 0 && errno == EINTR);
    return rc;
}

qv_status qv_mq_send(qv_mq *mq, const qv_mq_peer *peer, const void *data, size_t size)
{
    if (mq->socket == NULL)
        return no_socket(mq);
    QV_ASSERT((mq->options.type == QV_MQ_ROUTER) == (peer != NULL));
    /* libzmq decides at the first frame; once that is taken the others are as well. */
    int rc = 0;
    if (peer != NULL)
        rc = send_frame(mq->handle, peer->id, peer->size, ZMQ_SNDMORE);
    if (rc >= 0 && peer != NULL && peer->delimiter)
        rc = send_frame(mq->handle, "", 0, ZMQ_SNDMORE);
    if (rc >= 0)
        rc = send_frame(mq->handle, data, size, 0);
    if (rc >= 0) {
        mq->stats.sent++;
        mq->stats.sent_bytes += size;
        return QV_OK;
    }
    if (errno == EAGAIN) {
        mq->stats.busy++;
        return QV_ERR_BUSY;
    }
    if (errno == EHOSTUNREACH) {
        mq->stats.gone++;
        return qv_fail(QV_ERR_NOT_FOUND, "the peer is gone");
    }
    return qv_fail(QV_ERR_IO, "cannot send at %s: %s", qv_mq_endpoint(mq), zmq_strerror(errno));
}
