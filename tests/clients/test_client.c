/* The C client against a scripted broker end on loopback. */
#include "clients/quiver_client.h"

#include "common/mq.h"

#include <criterion/criterion.h>

typedef struct {
    qv_mq *router;
    qv_client *client;
    qv_arena arena;
    qv_mq_peer peer;
} fixture;

static void open_fixture(fixture *f)
{
    memset(f, 0, sizeof *f);
    qv_arena_init(&f->arena, 0, 1 << 20);
    qv_mq_options options = qv_mq_default_options(QV_MQ_ROUTER, "tcp://127.0.0.1:*");
    cr_assert_eq(qv_mq_open(&options, &f->router), QV_OK, "%s", qv_error());
    qv_client_options client = {.endpoint = qv_mq_endpoint(f->router)};
    cr_assert_eq(qv_client_open(&client, &f->client), QV_OK, "%s", qv_error());
}

static void close_fixture(fixture *f)
{
    qv_client_close(f->client);
    qv_mq_close(f->router);
    qv_arena_deinit(&f->arena);
}

/* Wait for the client's next message, decode it, and remember who it was. */
static qv_message broker_receive(fixture *f, qv_mq_message *raw)
{
    zmq_pollitem_t item = {.socket = zsock_resolve(qv_mq_socket(f->router)), .events = ZMQ_POLLIN};
    qv_message message;
    cr_assert_eq(zmq_poll(&item, 1, 10000), 1, "no message from the client");
    cr_assert_eq(qv_mq_recv(f->router, raw), QV_OK);
    f->peer = raw->peer;
    cr_assert_eq(qv_message_decode(raw->data, raw->size, QV_FROM_CLIENT,
                                   &qv_protocol_default_limits, &f->arena, &message),
                 QV_OK, "%s", qv_error());
    return message;
}

static void broker_send(fixture *f, const qv_message *message)
{
    const void *data;
    size_t size;
    cr_assert_eq(qv_message_encode(message, &f->arena, &data, &size), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_mq_send(f->router, &f->peer, data, size), QV_OK, "%s", qv_error());
}

static qv_msg_submit job(const char *id, const char *prompt)
{
    qv_msg_submit submit = {0};
    qv_set(&submit, submit, id, qv_str_from(id));
    qv_set(&submit, submit, prompt, qv_str_from(prompt));
    return submit;
}

Test(client, carries_a_submit_there_and_tokens_and_done_back)
{
    fixture f;
    open_fixture(&f);
    qv_msg_submit submit = job("1", "Hello");
    cr_assert_eq(qv_client_submit(f.client, &submit), QV_OK, "%s", qv_error());

    qv_mq_message raw;
    qv_message got = broker_receive(&f, &raw);
    cr_assert_eq(got.type, QV_MSG_SUBMIT);
    cr_assert(qv_str_equal(got.submit.prompt, "Hello"));
    qv_mq_message_release(&raw);

    int32_t ids[] = {4, 5};
    qv_message tokens = {
        .type = QV_MSG_TOKENS,
        .tokens = {.id = qv_str_from("1"), .text = qv_str_from("é!"), .tokens = {ids, 2}}};
    qv_message done = {
        .type = QV_MSG_DONE,
        .done = {.id = qv_str_from("1"), .seq = 1, .finish_reason = qv_str_from("stop")}};
    broker_send(&f, &tokens);
    broker_send(&f, &done);

    const qv_message *m;
    cr_assert_eq(qv_client_poll(f.client, 10000, &m), QV_OK, "%s", qv_error());
    cr_assert_eq(m->type, QV_MSG_TOKENS);
    cr_assert(qv_str_equal(m->tokens.text, "é!"));
    cr_assert_eq(m->tokens.tokens.data[1], 5);
    cr_assert_eq(qv_client_poll(f.client, 10000, &m), QV_OK, "%s", qv_error());
    cr_assert_eq(m->type, QV_MSG_DONE);
    cr_assert_eq(m->done.seq, 1);
    close_fixture(&f);
}

Test(client, refuses_a_job_that_breaks_the_protocol_before_sending_it)
{
    fixture f;
    open_fixture(&f);
    qv_msg_submit submit = job("1", "Hello");
    int32_t ids[] = {1};
    qv_set(&submit, submit, tokens, ((qv_ints){ids, 1}));
    cr_assert_neq(qv_client_submit(f.client, &submit), QV_OK);
    cr_assert(strstr(qv_error(), "tokens"), "%s", qv_error());
    close_fixture(&f);
}

Test(client, says_when_no_broker_is_there)
{
    qv_client *client;
    qv_client_options options = {.endpoint = "tcp://127.0.0.1:1", .send_ms = 50};
    cr_assert_eq(qv_client_open(&options, &client), QV_OK);
    cr_assert_eq(qv_client_cancel(client, "1"), QV_ERR_TIMEOUT);
    cr_assert(strstr(qv_error(), "127.0.0.1:1"), "%s", qv_error());
    qv_client_close(client);
}

Test(client, poll_times_out_and_the_client_goes_on)
{
    fixture f;
    open_fixture(&f);
    const qv_message *m;
    cr_assert_eq(qv_client_poll(f.client, 0, &m), QV_ERR_TIMEOUT);
    cr_assert_eq(qv_client_poll(f.client, 20, &m), QV_ERR_TIMEOUT);
    cr_assert_eq(qv_client_request_status(f.client), QV_OK, "%s", qv_error());
    qv_mq_message raw;
    cr_assert_eq(broker_receive(&f, &raw).type, QV_MSG_STATUS_REQUEST);
    qv_mq_message_release(&raw);
    close_fixture(&f);
}

Test(client, reports_bytes_that_are_no_message)
{
    fixture f;
    open_fixture(&f);
    cr_assert_eq(qv_client_request_status(f.client), QV_OK);
    qv_mq_message raw;
    broker_receive(&f, &raw);
    qv_mq_message_release(&raw);
    cr_assert_eq(qv_mq_send(f.router, &f.peer, "\xc1", 1), QV_OK);
    const qv_message *m;
    cr_assert_eq(qv_client_poll(f.client, 10000, &m), QV_ERR_FORMAT);
    close_fixture(&f);
}

Test(client, makes_ids_that_differ)
{
    char a[QV_CLIENT_ID_SIZE], b[QV_CLIENT_ID_SIZE];
    qv_client_new_id(a);
    qv_client_new_id(b);
    cr_assert_eq(strlen(a), 32);
    cr_assert_str_neq(a, b);
}
