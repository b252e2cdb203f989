/* Messaging endpoints: ROUTER and DEALER sockets over CZMQ that move whole messages.
 *
 * A message on the wire is one body frame. A REQ client puts an empty delimiter frame in front of
 * it; a ROUTER notes that per message (qv_mq_peer) and mirrors it in the reply, so that ten lines
 * of any language can talk to a broker. Nothing here knows what a body means: see
 * common/protocol.h.
 *
 * Sending and receiving never block. Whoever must not lose a message keeps it and tries again; the
 * high-water mark is only a backstop, credit above this layer keeps queues short. Dead connections
 * are found by ZMTP heartbeats and TCP keepalive, which prove that the other *host* lives;
 * heartbeats that prove that the other *program* works are messages of the protocol.
 *
 * One thread makes, uses and frees an endpoint. It is used inside a zloop (or zmq_poll): register
 * qv_mq_socket() and, whenever it is readable, call qv_mq_recv until it says BUSY.
 */
#ifndef QV_COMMON_MQ_H
#define QV_COMMON_MQ_H

#include "common/keys.h"
#include "common/status.h"

#include <czmq.h>
#include <stdint.h>

typedef struct qv_mq qv_mq;

typedef enum { QV_MQ_ROUTER, QV_MQ_DEALER } qv_mq_type;

/* Encryption and authentication by CURVE. An endpoint that binds is the server: it asks ZAP about
 * each key, in this domain, and its messages say whose they are. */
typedef struct {
    qv_key_pair own;
    char server_key[QV_KEY_SIZE]; /* connecting: the public key that the peer must have */
    const char *domain;           /* binding; a literal */
} qv_curve;

/* How to make an endpoint; start from qv_mq_default_options(). All strings are copied. */
typedef struct {
    qv_mq_type type;
    const char *endpoint; /* "tcp://127.0.0.1:5555", "tcp://127.0.0.1:*", "ipc:///run/quiver.sock";
                           * a ROUTER that binds takes several, separated by commas */
    bool bind;            /* bind, else connect; default: a ROUTER binds, a DEALER connects */
    size_t max_message_bytes; /* a peer that sends a larger frame is disconnected without an answer,
                               * so keep it above qv_protocol_limits.max_bytes; default 32 MiB */
    int high_water_mark;      /* messages queued per peer and direction; default 10000 */
    int linger_ms;            /* how long closing goes on sending; default 0 */
    int handshake_ms;      /* a stranger who says nothing for this long is cut off; default 3000 */
    int heartbeat_ms;      /* ZMTP ping interval; silence of 3 intervals closes the connection;
                            * 0 = none; default 1000 */
    bool monitor;          /* connecting: tell when connections come and go (qv_mq_next_event) */
    const qv_curve *curve; /* NULL (the default): in the clear, from anybody; copied */
} qv_mq_options;

qv_mq_options qv_mq_default_options(qv_mq_type type, const char *endpoint);

/* Open an endpoint. A DEALER gets a fresh random routing id, so that a ROUTER can never mistake it
 * for an earlier session. Connecting to an endpoint where nobody listens yet is fine. Errors: ARG
 * (endpoint malformed), IO (cannot bind: the sentence has endpoint and reason), NOMEM. */
qv_status qv_mq_open(const qv_mq_options *options, qv_mq **out);

/* Close; queued messages get linger_ms. close(NULL) is fine. Take it out of the loop before. */
void qv_mq_close(qv_mq *mq);

/* Throw the socket of a connecting endpoint away and connect again with a new socket and a new
 * routing id (a DEALER that gave its peer up). What was queued in either direction is lost. The
 * handle of qv_mq_socket() changes: take the old one out of the loop before, put the new one in
 * after. After an error the endpoint has no socket: recv and send answer STATE, and reopen may be
 * called again. Errors: STATE (an endpoint that binds), else as qv_mq_open. */
qv_status qv_mq_reopen(qv_mq *mq);

/* For zloop_reader; zsock_resolve() of it for zmq_pollitem_t. Borrowed; NULL after a failed reopen.
 */
zsock_t *qv_mq_socket(const qv_mq *mq);

/* What the endpoint is really bound to, port wildcards resolved ("tcp://127.0.0.1:40123"), several
 * joined by commas; for a connecting one its endpoint as given. Borrowed. */
const char *qv_mq_endpoint(const qv_mq *mq);

/* --- Connections ------------------------------------------------------------------------------ */

typedef enum {
    QV_MQ_NO_EVENT,
    QV_MQ_CONNECTED,    /* and authenticated */
    QV_MQ_DISCONNECTED, /* it is tried again by itself */
} qv_mq_event;

/* The next event of an endpoint with `monitor`; NO_EVENT: there is none now. */
qv_mq_event qv_mq_next_event(qv_mq *mq);

/* Readable when there may be events; for zmq_pollitem_t. Borrowed; NULL without `monitor`. */
void *qv_mq_monitor(const qv_mq *mq);

/* --- Peers
 * --------------------------------------------------------------------------------------*/

#define QV_MQ_ID_MAX 255

/* Where a message came from and where a reply goes: a value, copy it freely. All zero for the one
 * peer of a DEALER. */
typedef struct {
    uint8_t size;   /* bytes of id */
    bool delimiter; /* the peer is a REQ socket: an empty frame goes in front of each body */
    unsigned char id[QV_MQ_ID_MAX];
} qv_mq_peer;

/* The same connection? (The delimiter does not count.) */
bool qv_mq_peer_equal(const qv_mq_peer *a, const qv_mq_peer *b);

/* The id as lower-case hex for logs and map keys; `text` holds 2 * QV_MQ_ID_MAX + 1. Returns text.
 */
char *qv_mq_peer_text(const qv_mq_peer *peer, char text[2 * QV_MQ_ID_MAX + 1]);

/* --- Messages
 * -----------------------------------------------------------------------------------*/

/* A received message. `data` points into the frame that libzmq received, without a copy, and lives
 * until qv_mq_message_release. A short body lies inside the struct itself: do not copy or move the
 * struct. */
typedef struct {
    qv_mq_peer peer;
    const void *data;
    size_t size;
    const char *user; /* the public key of its sender; NULL without CURVE */
    zmq_msg_t frame;  /* owns data */
} qv_mq_message;

/* Take the next message. OK: release it after use. BUSY: none is waiting (no error text is set).
 * FORMAT: the peer sent no body or more than one frame; that message is dropped and counted, `peer`
 * is filled so that it can be told, and the next call goes on; nothing to release. IO: the socket
 * is broken. */
qv_status qv_mq_recv(qv_mq *mq, qv_mq_message *out);
void qv_mq_message_release(qv_mq_message *message);

/* Send one body (copied) to a peer; a DEALER passes NULL. OK: libzmq has it. BUSY: the peer's queue
 * is full, or a DEALER has no connection now; try later. NOT_FOUND: the peer is gone for good (a
 * ROUTER's peer that comes back has another id). IO: the socket is broken. BUSY sets no error text.
 */
qv_status qv_mq_send(qv_mq *mq, const qv_mq_peer *peer, const void *data, size_t size);

/* Counters since qv_mq_open, for metrics. */
typedef struct {
    uint64_t received;
    uint64_t received_bytes;
    uint64_t sent;
    uint64_t sent_bytes;
    uint64_t malformed; /* received, refused as FORMAT */
    uint64_t busy;      /* sends answered BUSY */
    uint64_t gone;      /* sends answered NOT_FOUND */
} qv_mq_stats;

const qv_mq_stats *qv_mq_get_stats(const qv_mq *mq);

#endif
