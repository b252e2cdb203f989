/* The C client: publish jobs to a broker and read the answers.
 *
 * One connection carries any number of requests; every message about a request carries its id. The
 * calls mirror the wire (docs/protocol.md): submit and cancel send, poll returns the next message.
 * With several brokers, requests are spread over them. When a connection breaks or a broker is
 * lost, the client asks for what is open again, at the same broker or at another, and goes on
 * behind what it has: poll shows each piece once. One thread at a time per client.
 *
 *     qv_client *client;
 *     qv_client_open(&(qv_client_options){.endpoint = "tcp://127.0.0.1:5555"}, &client);
 *     qv_msg_submit job = {0};
 *     qv_set(&job, submit, id, qv_str_from("1"));
 *     qv_set(&job, submit, prompt, qv_str_from("Once upon a time"));
 *     qv_client_submit(client, &job);
 *     const qv_message *m;
 *     while (qv_client_poll(client, 60000, &m) == QV_OK && m->type != QV_MSG_ERROR)
 *         if (m->type == QV_MSG_TOKENS)
 *             fwrite(m->tokens.text.data, 1, m->tokens.text.size, stdout);
 *         else if (m->type == QV_MSG_DONE)
 *             break;
 */
#ifndef QV_CLIENTS_QUIVER_CLIENT_H
#define QV_CLIENTS_QUIVER_CLIENT_H

#include "common/protocol.h"

typedef struct qv_client qv_client;

typedef struct {
    const char *endpoint;   /* a broker's client endpoint, or those of several parted by commas */
    const char *key;        /* path of our key pair, for brokers that ask for keys; or NULL */
    const char *broker_key; /* their public key, or the path of a file that has it */
    int64_t send_ms;        /* how long a send waits for a broker to be there; 0 = 5000 */
} qv_client_options;

/* Connecting is asynchronous: a broker that is not there shows at the first send.
 * Errors: ARG (malformed endpoint), NOMEM. */
qv_status qv_client_open(const qv_client_options *options, qv_client **out);

/* Requests still in flight wait for a while for somebody to resume them; durable ones go on. */
void qv_client_close(qv_client *client);

/* Send one message. Errors: TIMEOUT (no broker takes it: the sentence names the endpoint), ARG (the
 * job breaks a rule of the protocol), LIMIT. */
qv_status qv_client_submit(qv_client *client, const qv_msg_submit *job);
/* Go on with a request that was submitted elsewhere or earlier, behind the last seq that is known
 * of each of its n streams (-1: from the start). Errors: as above, ARG, EXISTS. */
qv_status qv_client_resume(qv_client *client, const char *id, const char *tenant,
                           const int32_t *have, uint32_t n);

qv_status qv_client_cancel(qv_client *client, const char *id);
qv_status qv_client_request_status(qv_client *client);
qv_status qv_client_request_explain(qv_client *client, const char *id);

/* The next message, waiting at most timeout_ms (0 = do not wait, -1 = for ever). *out is borrowed
 * until the next call. Errors: TIMEOUT, CANCELLED (a signal arrived while waiting), FORMAT (the
 * broker sent something that the protocol does not allow). */
qv_status qv_client_poll(qv_client *client, int64_t timeout_ms, const qv_message **out);

/* A fresh request id: 32 hex digits. */
#define QV_CLIENT_ID_SIZE 33
void qv_client_new_id(char id[QV_CLIENT_ID_SIZE]);

#endif
