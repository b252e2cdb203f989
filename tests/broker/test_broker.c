/* The broker on real sockets: its loop runs on a thread of the test, clients and workers are
 * scripted. What the core decides is tested in test_requests.c and its neighbours; here it is that
 * it arrives. The program itself is started for what only a process can show: options, signals,
 * exit codes, metrics.
 */
#include "broker/broker.h"
#include "common/clock.h"
#include "common/log.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define WAIT_MS 10000
#define STR(s)  (int)(s).size, (s).data

static qv_arena arena; /* holds every message of a test */

/* --- The broker -------------------------------------------------------------------------------*/

typedef struct {
    qv_broker *broker;
    pthread_t thread;
    qv_status status;
} server;

static qv_broker_options default_options(void)
{
    qv_broker_options options = {.core = qv_core_default_options(),
                                 .frontend = "tcp://127.0.0.1:*",
                                 .backend = "tcp://127.0.0.1:*",
                                 .drain_timeout_ms = 5000,
                                 .max_message_bytes = 64 << 20};
    options.core.startup_grace_ms = 0;
    return options;
}

/* For tests in which a worker falls silent. */
static qv_broker_options quick_options(void)
{
    qv_broker_options options = default_options();
    options.core.heartbeat_ms = 100;
    options.core.timeout_ms = 400;
    return options;
}

static void *serve(void *user)
{
    server *s = user;
    s->status = qv_broker_run(s->broker);
    return NULL;
}

static server start(const qv_broker_options *options)
{
    qv_broker_options defaults = default_options();
    server s = {0};
    qv_log_init(&(qv_log_options){.level = QV_LOG_ERROR});
    cr_assert_eq(qv_broker_open(options ? options : &defaults, &s.broker), QV_OK, "%s", qv_error());
    return s;
}

/* A server is moved into its place before its thread looks at it. */
static void go(server *s)
{
    pthread_create(&s->thread, NULL, serve, s);
}

static void stop(server *s)
{
    qv_broker_stop(s->broker);
    qv_broker_stop(s->broker);
    pthread_join(s->thread, NULL);
    cr_assert_eq(s->status, QV_OK, "%s", qv_error());
    qv_broker_close(s->broker);
}

/* --- Peers ------------------------------------------------------------------------------------*/

static qv_mq *connect_to(const char *endpoint)
{
    qv_mq_options options = qv_mq_default_options(QV_MQ_DEALER, endpoint);
    qv_mq *mq;
    options.linger_ms = 1000;
    cr_assert_eq(qv_mq_open(&options, &mq), QV_OK, "%s", qv_error());
    return mq;
}

static void send_bytes(qv_mq *mq, const void *data, size_t size)
{
    uint64_t until = qv_now_ms() + WAIT_MS;
    qv_status status;
    while ((status = qv_mq_send(mq, NULL, data, size)) == QV_ERR_BUSY && qv_now_ms() < until)
        zclock_sleep(1);
    cr_assert_eq(status, QV_OK, "%s", qv_error());
}

static void send_message(qv_mq *mq, const qv_message *message)
{
    const void *data;
    size_t size;
    cr_assert_eq(qv_message_encode(message, &arena, &data, &size), QV_OK, "%s", qv_error());
    send_bytes(mq, data, size);
}

static void send_json(qv_mq *mq, const char *format, ...)
{
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    json_t *object = json_loads(text, 0, NULL);
    qv_str raw;
    cr_assert_not_null(object, "%s", text);
    cr_assert_eq(qv_json_to_msgpack(object, &arena, &raw), QV_OK);
    json_decref(object);
    send_bytes(mq, raw.data, raw.size);
}

/* The next message within the time, or NULL. */
static const qv_message *receive(qv_mq *mq, qv_direction direction, int ms)
{
    uint64_t until = qv_now_ms() + (uint64_t)ms;
    for (;;) {
        qv_mq_message received;
        if (qv_mq_recv(mq, &received) == QV_OK) {
            void *data = qv_arena_memdup(&arena, received.data, received.size, 8);
            qv_message *message = QV_ARENA_NEW(&arena, qv_message);
            cr_assert_eq(qv_message_decode(data, received.size, direction, NULL, &arena, message),
                         QV_OK, "%s", qv_error());
            qv_mq_message_release(&received);
            return message;
        }
        uint64_t now = qv_now_ms();
        zmq_pollitem_t item = {.socket = zsock_resolve(qv_mq_socket(mq)), .events = ZMQ_POLLIN};
        if (now >= until || zmq_poll(&item, 1, (long)(until - now)) <= 0)
            return NULL;
    }
}

static const qv_message *expect(qv_mq *mq, qv_direction direction, qv_msg_type type)
{
    const qv_message *message = receive(mq, direction, WAIT_MS);
    while (message != NULL && message->type == QV_MSG_PING && type != QV_MSG_PING)
        message = receive(mq, direction, WAIT_MS);
    cr_assert_not_null(message, "no `%s` came", qv_message_type_name(type));
    cr_assert_eq(message->type, type, "`%s` came, not `%s`%s%.*s",
                 qv_message_type_name(message->type), qv_message_type_name(type),
                 message->type == QV_MSG_ERROR ? ": " : "",
                 message->type == QV_MSG_ERROR ? (int)message->error.message.size : 0,
                 message->type == QV_MSG_ERROR ? message->error.message.data : "");
    return message;
}

static void expect_error(qv_mq *mq, const char *code, const char *part)
{
    const qv_msg_error *error = &expect(mq, QV_TO_CLIENT, QV_MSG_ERROR)->error;
    cr_assert(qv_str_equal(error->code, code), "%.*s: %.*s", STR(error->code), STR(error->message));
    cr_assert(memmem(error->message.data, error->message.size, part, strlen(part)), "%.*s",
              STR(error->message));
}

static void expect_tokens(qv_mq *mq, int64_t seq, const char *text)
{
    const qv_msg_tokens *tokens = &expect(mq, QV_TO_CLIENT, QV_MSG_TOKENS)->tokens;
    cr_assert_eq(tokens->seq, seq);
    cr_assert(qv_str_equal(tokens->text, text), "%.*s", STR(tokens->text));
}

static const qv_msg_done *expect_done(qv_mq *mq, const char *reason)
{
    const qv_msg_done *done = &expect(mq, QV_TO_CLIENT, QV_MSG_DONE)->done;
    cr_assert(qv_str_equal(done->finish_reason, reason), "%.*s", STR(done->finish_reason));
    return done;
}

/* --- Workers ----------------------------------------------------------------------------------*/

typedef struct {
    qv_mq *mq;
    uint64_t epoch;
} worker;

static void register_worker(worker *w, const char *id, int64_t capacity)
{
    qv_msg_held_adapter french = {
        .name = qv_str_from("french"), .digest = qv_str_from("d1"), .state = qv_str_from("ready")};
    qv_message message;
    qv_message_init(&message, QV_MSG_READY);
    message.ready.worker = qv_str_from(id);
    message.ready.protocol = QV_PROTOCOL_VERSION;
    message.ready.model = qv_str_from("tiny");
    message.ready.backend = qv_str_from("cpu");
    message.ready.capacity = capacity;
    message.ready.adapter_slots = 4;
    message.ready.max_context = 100;
    message.ready.adapters.data = &french;
    message.ready.adapters.count = 1;
    send_message(w->mq, &message);
    w->epoch = expect(w->mq, QV_TO_WORKER, QV_MSG_WELCOME)->welcome.epoch;
}

static worker join(const server *s, const char *id, int64_t capacity)
{
    worker w = {.mq = connect_to(qv_broker_backend(s->broker))};
    register_worker(&w, id, capacity);
    return w;
}

static void beat(const worker *w)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_HEARTBEAT);
    message.heartbeat.epoch = w->epoch;
    send_message(w->mq, &message);
}

static const qv_msg_run *next_run(const worker *w)
{
    return &expect(w->mq, QV_TO_WORKER, QV_MSG_RUN)->run;
}

static void say(const worker *w, uint64_t request, int64_t seq, const char *text,
                const char *finish)
{
    int32_t token = (int32_t)seq;
    qv_msg_delta delta = {.request = request};
    qv_set(&delta, delta, seq, seq);
    if (text != NULL) {
        qv_set(&delta, delta, text, qv_str_from(text));
        qv_set(&delta, delta, tokens, ((qv_ints){&token, 1}));
    }
    if (finish != NULL) {
        qv_set(&delta, delta, finish_reason, qv_str_from(finish));
        qv_set(&delta, delta, usage, ((qv_msg_usage){.prompt_tokens = 1}));
    }
    qv_message message;
    qv_message_init(&message, QV_MSG_STEP);
    message.step.epoch = w->epoch;
    message.step.deltas.data = &delta;
    message.step.deltas.count = 1;
    send_message(w->mq, &message);
}

/* --- Requests ---------------------------------------------------------------------------------*/

Test(broker, streams_an_answer_from_worker_to_client)
{
    server s = start(NULL);
    go(&s);
    worker w = join(&s, "w1", 4);
    qv_mq *client = connect_to(qv_broker_frontend(s.broker));
    send_json(client,
              "{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"hi\",\"adapter\":\"french\"}");
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    const qv_msg_run *run = next_run(&w);
    cr_assert(qv_str_equal(run->digest, "d1"));
    say(&w, run->request, 0, "Bon", NULL);
    expect_tokens(client, 0, "Bon");
    say(&w, run->request, 1, "jour", "stop");
    expect_tokens(client, 1, "jour");
    const qv_msg_done *done = expect_done(client, "stop");
    cr_assert(qv_str_equal(done->worker, "w1"));
    cr_assert_gt(done->timing.total_ms, 0);

    send_json(client, "{\"type\":\"status\"}");
    const qv_msg_status *status = &expect(client, QV_TO_CLIENT, QV_MSG_STATUS)->status;
    cr_assert_eq(status->workers.count, 1);
    cr_assert(qv_str_equal(status->workers.data[0].id, "w1"));
    cr_assert_eq(status->adapters.count, 1);
    cr_assert(qv_str_equal(status->adapters.data[0].state, "ready"));
    cr_assert(qv_str_equal(status->redis, "none"));
    qv_mq_close(client);
    qv_mq_close(w.mq);
    stop(&s);
}

Test(broker, cancels_what_waits_and_what_runs)
{
    server s = start(NULL);
    go(&s);
    worker w = join(&s, "w1", 1);
    qv_mq *client = connect_to(qv_broker_frontend(s.broker));
    send_json(client, "{\"type\":\"submit\",\"id\":\"runs\",\"prompt\":\"hi\"}");
    send_json(client, "{\"type\":\"submit\",\"id\":\"waits\",\"prompt\":\"hi\"}");
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    uint64_t request = next_run(&w)->request;
    send_json(client, "{\"type\":\"cancel\",\"id\":\"waits\"}");
    cr_assert(qv_str_equal(expect_done(client, "cancelled")->id, "waits"));

    qv_mq *other = connect_to(qv_broker_frontend(s.broker));
    send_json(other, "{\"type\":\"cancel\",\"id\":\"runs\"}");
    expect(other, QV_TO_CLIENT, QV_MSG_CANCELLED);
    cr_assert_eq(expect(w.mq, QV_TO_WORKER, QV_MSG_ABORT)->abort.request, request);
    say(&w, request, 0, NULL, "cancelled");
    cr_assert(qv_str_equal(expect_done(client, "cancelled")->id, "runs"));
    qv_mq_close(other);
    qv_mq_close(client);
    qv_mq_close(w.mq);
    stop(&s);
}

Test(broker, keeps_deadlines_and_limits_and_ids_apart)
{
    qv_broker_options options = default_options();
    options.core.requests.max_queued = 2;
    server s = start(&options);
    go(&s);
    qv_mq *client = connect_to(qv_broker_frontend(s.broker));
    send_json(client, "{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"hi\",\"deadline_ms\":50}");
    send_json(client, "{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"hi\"}");
    send_json(client, "{\"type\":\"submit\",\"id\":\"b\",\"prompt\":\"hi\"}");
    send_json(client, "{\"type\":\"submit\",\"id\":\"c\",\"prompt\":\"hi\"}");
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    expect_error(client, "BAD_REQUEST", "in flight");
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    expect_error(client, "OVERLOADED", "queue is full");
    expect_error(client, "DEADLINE", "deadline");
    qv_mq_close(client);
    stop(&s);
}

Test(broker, answers_bad_bytes_and_goes_on)
{
    static const struct {
        const char *what;
        const char *bytes;
        size_t size;
        const char *code;
    } rows[] = {
        {"one zero byte", "\0", 1, "BAD_REQUEST"},
        {"a number", "\x2a", 1, "BAD_REQUEST"},
        {"a byte that msgpack never uses", "\xc1", 1, "BAD_REQUEST"},
        {"truncated map", "\x82\xa4type\xa6submit", 13, "BAD_REQUEST"},
        {"truncated string", "\x81\xa4type\xd9\xff", 8, "BAD_REQUEST"},
        {"array bomb", "\xdd\xff\xff\xff\xff", 5, "BAD_REQUEST"},
        {"map bomb", "\xdf\xff\xff\xff\xff", 5, "BAD_REQUEST"},
        {"deep arrays",
         "\x81\xa1x\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91"
         "\x91\x91\xc0",
         23, NULL},
        {"key twice", "\x82\xa4type\xa6status\xa4type\xa6status", 25, "BAD_REQUEST"},
        {"number as key", "\x81\x01\x02", 3, "BAD_REQUEST"},
        {"invalid UTF-8", "\x81\xa4type\xa3\xff\xfe\xfd", 10, "BAD_REQUEST"},
        {"bytes after the map", "\x81\xa4type\xa6status\x00", 14, "BAD_REQUEST"},
        {"unknown type",
         "\x81\xa4type\xa5"
         "dance",
         12, "BAD_REQUEST"},
        {"a worker's message",
         "\x82\xa4type\xa9heartbeat\xa5"
         "epoch\x01",
         23, "BAD_REQUEST"},
        {"empty map", "\x80", 1, "BAD_REQUEST"},
        {"extension type", "\x81\xa4type\xd4\x01\x00", 9, "BAD_REQUEST"},
    };
    server s = start(NULL);
    go(&s);
    qv_mq *client = connect_to(qv_broker_frontend(s.broker));
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        send_bytes(client, rows[i].bytes, rows[i].size);
        const qv_msg_error *error = &expect(client, QV_TO_CLIENT, QV_MSG_ERROR)->error;
        if (rows[i].code != NULL)
            cr_expect(qv_str_equal(error->code, rows[i].code), "%s: %.*s: %.*s", rows[i].what,
                      STR(error->code), STR(error->message));
        cr_expect_gt(error->message.size, 0);
    }

    /* Every truncation of a good message is answered, and the broker is still there. */
    qv_message message;
    const void *data;
    size_t size;
    qv_message_init(&message, QV_MSG_SUBMIT);
    message.submit.id = qv_str_from("a");
    qv_set(&message.submit, submit, prompt, qv_str_from("hi"));
    cr_assert_eq(qv_message_encode(&message, &arena, &data, &size), QV_OK);
    for (size_t n = 1; n < size; n++) {
        send_bytes(client, data, n);
        expect(client, QV_TO_CLIENT, QV_MSG_ERROR);
    }
    send_bytes(client, data, size);
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    qv_mq_close(client);
    stop(&s);
}

Test(broker, answers_what_is_no_single_frame)
{
    server s = start(NULL);
    go(&s);
    zsock_t *client = zsock_new_dealer(qv_broker_frontend(s.broker));
    zsock_set_rcvtimeo(client, WAIT_MS);
    static const int n_frames[] = {2, 3, 1};
    for (int i = 0; i < 3; i++) {
        zmsg_t *message = zmsg_new();
        for (int k = 0; k < n_frames[i]; k++)
            zmsg_addmem(message, "x", n_frames[i] == 1 ? 0 : 1);
        zmsg_send(&message, client);
        zmsg_t *reply = zmsg_recv(client);
        cr_assert_not_null(reply, "%d frames", n_frames[i]);
        zmsg_destroy(&reply);
    }
    zsock_destroy(&client);
    stop(&s);
}

Test(broker, too_large_a_message_is_answered)
{
    qv_broker_options options = default_options();
    options.core.client_limits.max_bytes = 4096;
    server s = start(&options);
    go(&s);
    qv_mq *client = connect_to(qv_broker_frontend(s.broker));
    char *big = calloc(1, 10000);
    memset(big, 'x', 9999);
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    message.submit.id = qv_str_from("big");
    qv_set(&message.submit, submit, prompt, qv_str_from(big));
    send_message(client, &message);
    const qv_msg_error *error = &expect(client, QV_TO_CLIENT, QV_MSG_ERROR)->error;
    cr_assert(qv_str_equal(error->code, "TOO_LARGE"));
    cr_assert(qv_str_equal(error->id, "big"), "the error names the request");
    free(big);
    qv_mq_close(client);
    stop(&s);
}

/* --- REQ sockets ------------------------------------------------------------------------------*/

Test(broker, a_req_socket_gets_one_reply_to_each_request)
{
    server s = start(NULL);
    go(&s);
    worker w = join(&s, "w1", 4);
    zsock_t *client = zsock_new_req(qv_broker_frontend(s.broker));
    zsock_set_rcvtimeo(client, WAIT_MS);
    for (int i = 0; i < 3; i++) {
        qv_message message;
        const void *data;
        size_t size;
        qv_message_init(&message, QV_MSG_SUBMIT);
        message.submit.id = qv_str_from("same");
        qv_set(&message.submit, submit, prompt, qv_str_from("hi"));
        cr_assert_eq(qv_message_encode(&message, &arena, &data, &size), QV_OK);
        zmq_send(zsock_resolve(client), data, size, 0);
        uint64_t request = next_run(&w)->request;
        say(&w, request, 0, "one ", NULL);
        say(&w, request, 1, "two", "stop");
        zframe_t *frame = zframe_recv(client);
        cr_assert_not_null(frame);
        qv_message reply;
        cr_assert_eq(qv_message_decode(zframe_data(frame), zframe_size(frame), QV_TO_CLIENT, NULL,
                                       &arena, &reply),
                     QV_OK);
        cr_assert_eq(reply.type, QV_MSG_DONE);
        cr_assert(qv_str_equal(reply.done.text, "one two"));
        zframe_destroy(&frame);
    }
    zsock_destroy(&client);
    qv_mq_close(w.mq);
    stop(&s);
}

/* --- Lost peers -------------------------------------------------------------------------------*/

Test(broker, a_worker_killed_in_the_middle_costs_no_token)
{
    qv_broker_options options = quick_options();
    server s = start(&options);
    go(&s);
    worker w1 = join(&s, "w1", 4);
    qv_mq *client = connect_to(qv_broker_frontend(s.broker));
    send_json(client, "{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"hi\",\"seed\":7}");
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    uint64_t request = next_run(&w1)->request;
    say(&w1, request, 0, "zero ", NULL);
    say(&w1, request, 1, "one ", NULL);
    expect_tokens(client, 0, "zero ");
    expect_tokens(client, 1, "one ");
    qv_mq_close(w1.mq); /* without a word */

    worker w2 = {.mq = connect_to(qv_broker_backend(s.broker))};
    register_worker(&w2, "w2", 4);
    const qv_message *message = NULL;
    for (uint64_t until = qv_now_ms() + WAIT_MS; qv_now_ms() < until;) {
        beat(&w2);
        message = receive(w2.mq, QV_TO_WORKER, 50);
        if (message != NULL && message->type == QV_MSG_RUN)
            break;
    }
    cr_assert(message != NULL && message->type == QV_MSG_RUN);
    const qv_msg_run *run = &message->run;
    cr_assert_eq(run->seed, 7);
    cr_assert_eq(run->resume.count, 1);
    cr_assert_eq(run->resume.data[0].seq, 2);
    cr_assert_eq(run->resume.data[0].tokens.count, 2);
    say(&w2, run->request, 2, "two", "stop");
    expect_tokens(client, 2, "two");
    cr_assert(qv_str_equal(expect_done(client, "stop")->worker, "w2"));
    qv_mq_close(client);
    qv_mq_close(w2.mq);
    stop(&s);
}

Test(broker, a_ghost_is_told_to_register_and_cannot_deliver)
{
    qv_broker_options options = quick_options();
    server s = start(&options);
    go(&s);
    worker w = join(&s, "w1", 1);
    qv_mq *client = connect_to(qv_broker_frontend(s.broker));
    send_json(client, "{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"hi\"}");
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    uint64_t request = next_run(&w)->request;
    zclock_sleep(600); /* stopped for longer than the timeout */
    say(&w, request, 0, "ghost", "stop");
    expect(w.mq, QV_TO_WORKER, QV_MSG_UNKNOWN_SESSION);
    cr_assert_null(receive(client, QV_TO_CLIENT, 50));
    register_worker(&w, "w1", 1);
    uint64_t again = next_run(&w)->request;
    cr_assert_neq(again, request);
    say(&w, request, 0, "ghost", "stop"); /* the old number in the new session */
    say(&w, again, 0, "real", "stop");
    expect_tokens(client, 0, "real");
    expect_done(client, "stop");
    qv_mq_close(client);
    qv_mq_close(w.mq);
    stop(&s);
}

Test(broker, workers_register_again_after_the_broker_was_restarted)
{
    server first = start(NULL);
    go(&first);
    char *frontend = strdup(qv_broker_frontend(first.broker));
    char *backend = strdup(qv_broker_backend(first.broker));
    worker w = join(&first, "w1", 4);
    uint64_t old_epoch = w.epoch;
    stop(&first);

    qv_broker_options options = default_options();
    options.frontend = frontend;
    options.backend = backend;
    options.core.seed = 99;
    server second = {0}; /* the addresses are free once ZeroMQ has closed them in the background */
    for (uint64_t until = qv_now_ms() + WAIT_MS;
         qv_broker_open(&options, &second.broker) != QV_OK && qv_now_ms() < until;)
        zclock_sleep(10);
    cr_assert_not_null(second.broker, "%s", qv_error());
    go(&second);
    const qv_message *message = NULL;
    for (uint64_t until = qv_now_ms() + WAIT_MS; qv_now_ms() < until;) {
        qv_message heartbeat;
        const void *data;
        size_t size;
        qv_message_init(&heartbeat, QV_MSG_HEARTBEAT);
        heartbeat.heartbeat.epoch = w.epoch;
        cr_assert_eq(qv_message_encode(&heartbeat, &arena, &data, &size), QV_OK);
        qv_mq_send(w.mq, NULL, data, size); /* BUSY until it is connected again */
        message = receive(w.mq, QV_TO_WORKER, 50);
        if (message != NULL && message->type == QV_MSG_UNKNOWN_SESSION)
            break;
    }
    cr_assert(message != NULL && message->type == QV_MSG_UNKNOWN_SESSION);
    register_worker(&w, "w1", 4);
    cr_assert_neq(w.epoch, old_epoch);
    qv_mq *client = connect_to(frontend);
    send_json(client, "{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"hi\"}");
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    say(&w, next_run(&w)->request, 0, "x", "stop");
    expect_tokens(client, 0, "x");
    expect_done(client, "stop");
    qv_mq_close(client);
    qv_mq_close(w.mq);
    stop(&second);
    free(frontend);
    free(backend);
}

Test(broker, a_client_that_does_not_read_loses_nothing_within_the_bound)
{
    qv_broker_options options = default_options();
    options.client_queue = 10;
    server s = start(&options);
    go(&s);
    worker w = join(&s, "w1", 4);
    zsock_t *client = zsock_new(ZMQ_DEALER);
    zsock_set_rcvhwm(client, 1);
    zsock_set_rcvbuf(client, 4096);
    zsock_set_rcvtimeo(client, WAIT_MS);
    zsock_attach(client, qv_broker_frontend(s.broker), false);
    qv_message message;
    const void *data;
    size_t size;
    qv_message_init(&message, QV_MSG_SUBMIT);
    message.submit.id = qv_str_from("a");
    qv_set(&message.submit, submit, prompt, qv_str_from("hi"));
    cr_assert_eq(qv_message_encode(&message, &arena, &data, &size), QV_OK);
    zmq_send(zsock_resolve(client), data, size, 0);
    uint64_t request = next_run(&w)->request;

    enum { N = 3000 };
    char *text = malloc(1001);
    memset(text, 'y', 1000);
    text[1000] = '\0';
    for (int seq = 0; seq < N; seq++) {
        say(&w, request, seq, text, seq + 1 == N ? "stop" : NULL);
        if (seq % 100 == 0)
            beat(&w);
    }
    /* Another client is not held up by it. */
    qv_mq *other = connect_to(qv_broker_frontend(s.broker));
    send_json(other, "{\"type\":\"submit\",\"id\":\"b\",\"prompt\":\"hi\"}");
    expect(other, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    say(&w, next_run(&w)->request, 0, "x", "stop");
    expect_tokens(other, 0, "x");
    expect_done(other, "stop");

    size_t n_bytes = 0, n_tokens = 0;
    int64_t next_seq = 0;
    bool is_done = false;
    while (!is_done) {
        zframe_t *frame = zframe_recv(client);
        cr_assert_not_null(frame, "after %zu bytes", n_bytes);
        cr_assert_eq(qv_message_decode(zframe_data(frame), zframe_size(frame), QV_TO_CLIENT, NULL,
                                       &arena, &message),
                     QV_OK);
        if (message.type == QV_MSG_TOKENS) {
            cr_assert_eq(message.tokens.seq, next_seq++);
            for (uint32_t i = 0; i < message.tokens.tokens.count; i++)
                cr_assert_eq(message.tokens.tokens.data[i], (int32_t)n_tokens++);
            n_bytes += message.tokens.text.size;
        }
        cr_assert_neq(message.type, QV_MSG_ERROR, "%.*s", STR(message.error.message));
        is_done = message.type == QV_MSG_DONE;
        zframe_destroy(&frame);
    }
    cr_assert_eq(message.done.seq, next_seq);
    cr_assert_eq(n_bytes, (size_t)N * 1000);
    cr_assert_lt(next_seq, N, "tokens were joined while they waited");
    free(text);
    zsock_destroy(&client);
    qv_mq_close(other);
    qv_mq_close(w.mq);
    stop(&s);
}

/* --- Stopping ---------------------------------------------------------------------------------*/

static bool is_stopping(void *broker)
{
    char reason[64];
    return !qv_broker_is_ready(broker, reason, sizeof reason) && strstr(reason, "stopping");
}

Test(broker, a_stop_lets_what_runs_end_and_takes_nothing_new)
{
    server s = start(NULL);
    go(&s);
    worker w = join(&s, "w1", 4);
    qv_mq *client = connect_to(qv_broker_frontend(s.broker));
    send_json(client, "{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"hi\"}");
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    uint64_t request = next_run(&w)->request;
    qv_broker_stop(s.broker);
    cr_assert(qv_wait_until(is_stopping, s.broker, WAIT_MS));
    send_json(client, "{\"type\":\"submit\",\"id\":\"b\",\"prompt\":\"hi\"}");
    expect_error(client, "OVERLOADED", "stopping");
    say(&w, request, 0, "x", "stop");
    expect_tokens(client, 0, "x");
    expect_done(client, "stop");
    pthread_join(s.thread, NULL);
    cr_assert_eq(s.status, QV_OK);
    qv_broker_close(s.broker);
    qv_mq_close(client);
    qv_mq_close(w.mq);
}

Test(broker, what_does_not_end_in_time_is_failed_before_it_stops)
{
    qv_broker_options options = default_options();
    options.drain_timeout_ms = 100;
    server s = start(&options);
    go(&s);
    qv_mq *client = connect_to(qv_broker_frontend(s.broker));
    send_json(client, "{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"hi\"}");
    expect(client, QV_TO_CLIENT, QV_MSG_ACCEPTED);
    qv_broker_stop(s.broker);
    expect_error(client, "OVERLOADED", "stopping");
    pthread_join(s.thread, NULL);
    qv_broker_close(s.broker);
    qv_mq_close(client);
}

Test(broker, an_address_in_use_is_an_error_that_names_it)
{
    server s = start(NULL);
    qv_broker_options options = default_options();
    options.frontend = qv_broker_frontend(s.broker);
    qv_broker *broker = NULL;
    cr_assert_eq(qv_broker_open(&options, &broker), QV_ERR_IO);
    cr_assert(strstr(qv_error(), options.frontend), "%s", qv_error());
    qv_broker_close(s.broker);
}

/* --- The program ------------------------------------------------------------------------------*/

/* Start quiver-broker with these arguments; its stderr goes to a file. */
static pid_t spawn(const char *log, char *const *argv)
{
    pid_t pid = fork();
    if (pid == 0) {
        if (freopen(log, "w", stderr) == NULL || freopen("/dev/null", "w", stdout) == NULL)
            _exit(126);
        execv(argv[0], argv);
        _exit(127);
    }
    return pid;
}

static int wait_for(pid_t pid)
{
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static char *program(void)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/bin/quiver-broker", qv_build_dir());
    return path;
}

Test(quiver_broker, refuses_what_makes_no_sense_and_says_why)
{
    static const struct {
        const char *option, *value, *part;
    } rows[] = {
        {"--frontend", "tcp://0.0.0.0:5555", "--allow-remote"},
        {"--backend", "tcp://*:5556", "--allow-remote"},
        {"--policy", "random", "affinity"},
        {"--worker-timeout", "1s", "heartbeats"},
        {"--redis", "http://x", "http://x"},
        {"--max-queued", "0", "max-queued"},
        {"--id", "bad id", "an id has"},
        {"--frontend", "tcp://127.0.0.1:70000", "65535"},
        {"--frontend", "tcp://127.0.0.1", "65535"},
        {"--backend", "nonsense", "nonsense"},
    };
    char *log = strdup(qv_path(qv_temp_dir(), "log"));
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char *argv[] = {program(),
                        "--redis",
                        "none",
                        "--frontend",
                        "tcp://127.0.0.1:*",
                        "--backend",
                        "tcp://127.0.0.1:*",
                        (char *)rows[i].option,
                        (char *)rows[i].value,
                        NULL};
        cr_expect_gt(wait_for(spawn(log, argv)), 0, "%s %s", rows[i].option, rows[i].value);
        size_t size;
        char *text = qv_read_file(log, &size);
        cr_expect(strstr(text, rows[i].part), "%s %s: %s", rows[i].option, rows[i].value, text);
        free(text);
    }
    char *help[] = {program(), "--help", NULL};
    cr_assert_eq(wait_for(spawn(log, help)), 0);
    free(log);
}

static bool answers(void *user)
{
    char *answer = qv_http_get(*(uint16_t *)user, "/healthz");
    bool ok = answer != NULL && strstr(answer, "200") != NULL;
    free(answer);
    return ok;
}

Test(quiver_broker, serves_metrics_and_ends_on_sigterm)
{
    uint16_t port = qv_free_port();
    char port_text[8], *log = strdup(qv_path(qv_temp_dir(), "log"));
    char *frontend = strdup(qv_tcp_endpoint()), *backend = strdup(qv_tcp_endpoint());
    snprintf(port_text, sizeof port_text, "%u", port);
    char *argv[] = {program(),   "--redis", "none",           "--frontend", frontend,
                    "--backend", backend,   "--metrics-port", port_text,    NULL};
    pid_t pid = spawn(log, argv);
    cr_assert(qv_wait_until(answers, &port, WAIT_MS));
    char *ready = qv_http_get(port, "/readyz");
    cr_assert(strstr(ready, "503") && strstr(ready, "no worker is ready"), "%s", ready);
    char *metrics = qv_http_get(port, "/metrics");
    static const char *const names[] = {"quiver_broker_queued 0",
                                        "quiver_broker_workers{state=\"ready\"} 0",
                                        "quiver_broker_requests_total{outcome=\"done\"} 0",
                                        "quiver_broker_errors_total{code=\"OVERLOADED\"} 0",
                                        "quiver_broker_handle_seconds_bucket",
                                        "quiver_broker_queue_depth{adapter=\"(base)\"} 0"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        cr_expect(strstr(metrics, names[i]), "%s is missing in:\n%s", names[i], metrics);
    kill(pid, SIGTERM);
    cr_assert_eq(wait_for(pid), 0);
    free(ready);
    free(metrics);
    free(log);
    free(frontend);
    free(backend);
}
