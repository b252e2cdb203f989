/* A worker with the bundled model against a scripted broker: a ROUTER on loopback that the test
 * reads and answers by hand. */
#include "worker/worker.h"

#include "common/clock.h"
#include "common/mq.h"
#include "tests/support.h"
#include "worker/engine_thread.h"
#include "worker/model_digest.h"

#include <criterion/criterion.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEADLINE_MS  60000 /* for what must come */
#define MAX_TOKENS   512
#define MAX_STREAMS  4
#define HEARTBEAT_MS 100

/* --- a broker by hand ------------------------------------------------------------------------- */

typedef struct {
    qv_mq *mq;
    char endpoint[64];
    const char *endpoints[1]; /* the same for a worker's options */
    qv_worker *worker;
    qv_mq_peer peer; /* that spoke last */
    qv_arena arena;
    qv_mq_message frame;
    bool has_frame;
    qv_message message; /* that came last */
    uint64_t epoch;
    uint64_t last_ping_ms;
    bool silent; /* sends no pings */
    uint64_t n_heartbeats, steps, n_draining;
} broker;

/* What came of one stream. */
typedef struct {
    int32_t tokens[MAX_TOKENS];
    int n_tokens;
    int64_t first_seq, next_seq;
    char text[4096];
    char finish[32], error[32], message[256], digest[65];
    int64_t prompt_tokens, completion_tokens;
    int n_prompt_logprobs;
} answer;

/* A socket that was closed holds its port for a moment. */
static bool can_bind(void *user)
{
    broker *b = user;
    qv_mq_options options = qv_mq_default_options(QV_MQ_ROUTER, b->endpoint);
    return qv_mq_open(&options, &b->mq) == QV_OK;
}

static void broker_open(broker *b, const char *endpoint)
{
    snprintf(b->endpoint, sizeof b->endpoint, "%s", endpoint);
    cr_assert(qv_wait_until(can_bind, b, 5000), "%s", qv_error());
    snprintf(b->endpoint, sizeof b->endpoint, "%s", qv_mq_endpoint(b->mq));
}

static const char *need_model(void)
{
    return qv_demo_path("tiny-qwen3.5/config.json") != NULL ? qv_demo_path("tiny-qwen3.5") : NULL;
}

static qv_engine_options engine_options(void)
{
    static char model_dir[4096];
    const char *model = need_model();
    snprintf(model_dir, sizeof model_dir, "%s", model != NULL ? model : "");
    return (qv_engine_options){.model_dir = model_dir,
                               .backend = "cpu",
                               .gemm = "exact",
                               .threads = 1,
                               .max_running = 8,
                               .max_waiting = 64,
                               .step_tokens = 64,
                               .prefill_chunk = 32,
                               .page_tokens = 16,
                               .max_context = 1024,
                               .adapter_slots = 4,
                               .max_lora_rank = 16,
                               .max_adapter_bytes = 64 << 20,
                               .adapter_cache_bytes = 256 << 20,
                               .swap_bytes = 64 << 20};
}

static qv_worker_options worker_options(void)
{
    return (qv_worker_options){.engine = engine_options(),
                               .id = "w1",
                               .metrics_address = "127.0.0.1",
                               .metrics_port = 0,
                               .drain_timeout_ms = 60000,
                               .stall_timeout_ms = 60000,
                               .register_timeout_ms = DEADLINE_MS,
                               .lease_ms = 900,
                               .max_message_bytes = 8 << 20};
}

static void broker_release(broker *b)
{
    if (b->has_frame)
        qv_mq_message_release(&b->frame);
    b->has_frame = false;
}

static void broker_close(broker *b)
{
    broker_release(b);
    cr_expect(qv_worker_free(b->worker));
    qv_mq_close(b->mq);
    qv_arena_deinit(&b->arena);
}

static qv_status try_to_send(broker *b, const qv_message *message)
{
    const void *data;
    size_t size;
    qv_arena arena = {0};
    cr_assert_eq(qv_message_encode(message, &arena, &data, &size), QV_OK, "%s", qv_error());
    qv_status status = qv_mq_send(b->mq, &b->peer, data, size);
    qv_arena_deinit(&arena);
    return status;
}

static void send_to_worker(broker *b, const qv_message *message)
{
    cr_assert_eq(try_to_send(b, message), QV_OK, "%s", qv_error());
}

static void ping_when_due(broker *b)
{
    uint64_t now = qv_now_ms();
    if (b->silent || b->epoch == 0 || now - b->last_ping_ms < HEARTBEAT_MS)
        return;
    b->last_ping_ms = now;
    qv_message ping = {.type = QV_MSG_PING, .ping = {.epoch = b->epoch}};
    try_to_send(b, &ping); /* it may have said goodbye and be gone */
}

/* Say that we know no session of this worker, as a broker that restarted does. */
static void disown(broker *b)
{
    qv_message message = {.type = QV_MSG_UNKNOWN_SESSION};
    message.unknown_session.broker = qv_str_from("b1");
    try_to_send(b, &message); /* that socket may be gone already */
}

static void note_heartbeat(broker *b)
{
    const qv_msg_heartbeat *heartbeat = &b->message.heartbeat;
    if (heartbeat->epoch != b->epoch) {
        disown(b);
        return;
    }
    b->n_heartbeats++;
    cr_expect_geq(heartbeat->steps, b->steps, "the step counter never goes back");
    b->steps = heartbeat->steps;
    b->n_draining += heartbeat->draining;
}

/* The next message that is no heartbeat, in b->message; false after `ms` without one. */
static bool next_message(broker *b, uint64_t ms)
{
    uint64_t deadline = qv_now_ms() + ms;
    for (;;) {
        broker_release(b);
        ping_when_due(b);
        qv_status status = qv_mq_recv(b->mq, &b->frame);
        if (status == QV_OK) {
            b->has_frame = true;
            b->peer = b->frame.peer;
            qv_arena_reset(&b->arena);
            status = qv_message_decode(b->frame.data, b->frame.size, QV_FROM_WORKER,
                                       &qv_protocol_default_limits, &b->arena, &b->message);
            cr_assert_eq(status, QV_OK, "%s", qv_error());
            if (b->message.type != QV_MSG_HEARTBEAT)
                return true;
            note_heartbeat(b);
            continue;
        }
        if (qv_now_ms() >= deadline)
            return false;
        zmq_pollitem_t item = {.socket = zsock_resolve(qv_mq_socket(b->mq)), .events = ZMQ_POLLIN};
        zmq_poll(&item, 1, 10);
    }
}

static void expect_message(broker *b, qv_msg_type type)
{
    cr_assert(next_message(b, DEADLINE_MS), "no message of type %d", (int)type);
    cr_assert_eq(b->message.type, type, "type %d came instead of %d", (int)b->message.type,
                 (int)type);
}

static void welcome(broker *b, uint64_t epoch, int64_t timeout_ms)
{
    b->epoch = epoch;
    qv_message message = {.type = QV_MSG_WELCOME};
    message.welcome = (qv_msg_welcome){.broker = qv_str_from("b1"),
                                       .epoch = epoch,
                                       .heartbeat_ms = HEARTBEAT_MS,
                                       .timeout_ms = timeout_ms};
    send_to_worker(b, &message);
}

static void start_worker(broker *b, qv_worker_options options)
{
    b->endpoints[0] = b->endpoint;
    if (options.brokers.n == 0)
        options.brokers = (qv_string_list){.items = b->endpoints, .n = 1};
    cr_assert_eq(qv_worker_start(&options, &b->worker), QV_OK, "%s", qv_error());
    expect_message(b, QV_MSG_READY);
}

/* A broker and a worker that is registered with it. */
static void begin(broker *b)
{
    broker_open(b, "tcp://127.0.0.1:*");
    start_worker(b, worker_options());
    welcome(b, 1000, 60000);
}

#define NEEDS_MODEL()                                                                              \
    do {                                                                                           \
        const char *model = need_model();                                                          \
        QV_SKIP_WITHOUT(model);                                                                    \
    } while (0)

/* --- requests --------------------------------------------------------------------------------- */

static qv_msg_submit greedy(const char *prompt, const char *adapter, int64_t max_tokens)
{
    qv_msg_submit submit = {.id = qv_str_from("r")};
    qv_set(&submit, submit, prompt, qv_str_from(prompt));
    qv_set(&submit, submit, adapter, qv_str_from(adapter));
    qv_set(&submit, submit, max_tokens, max_tokens);
    qv_set(&submit, submit, temperature, 0);
    qv_set(&submit, submit, ignore_eos, true);
    return submit;
}

static void send_run(broker *b, uint64_t epoch, uint64_t number, const qv_msg_submit *submit,
                     const qv_msg_resume *resume, const char *digest)
{
    qv_message inner = {.type = QV_MSG_SUBMIT, .submit = *submit};
    qv_message message = {.type = QV_MSG_RUN};
    qv_arena arena = {0};
    const void *data;
    size_t size;
    cr_assert_eq(qv_message_encode(&inner, &arena, &data, &size), QV_OK, "%s", qv_error());
    message.run.epoch = epoch;
    message.run.request = number;
    message.run.submit = (qv_str){data, (uint32_t)size};
    message.run.seed = 7;
    if (digest != NULL)
        qv_set(&message.run, run, digest, qv_str_from(digest));
    if (resume != NULL) {
        message.run.resume.data = (qv_msg_resume *)resume;
        message.run.resume.count = 1;
        qv_mark(&message.run, run, resume);
    }
    send_to_worker(b, &message);
    qv_arena_deinit(&arena);
}

static void keep(char *out, size_t size, qv_str text)
{
    snprintf(out, size, "%.*s", (int)text.size, text.data != NULL ? text.data : "");
}

static void take_delta(answer *a, const qv_msg_delta *delta)
{
    cr_expect_eq(delta->seq, a->next_seq, "a seq is missing or twice there");
    if (delta->text.size > 0 || delta->tokens.count > 0)
        a->next_seq++;
    for (uint32_t i = 0; i < delta->tokens.count && a->n_tokens < MAX_TOKENS; i++)
        a->tokens[a->n_tokens++] = delta->tokens.data[i];
    snprintf(a->text + strlen(a->text), sizeof a->text - strlen(a->text), "%.*s",
             (int)delta->text.size, delta->text.data != NULL ? delta->text.data : "");
    keep(a->finish, sizeof a->finish, delta->finish_reason);
    keep(a->digest, sizeof a->digest, delta->digest);
    a->prompt_tokens = delta->usage.prompt_tokens;
    a->completion_tokens = delta->usage.completion_tokens;
    a->n_prompt_logprobs = (int)delta->prompt_logprobs.count;
}

/* Take the deltas of a request from the message that came; true when all `n` streams ended. Deltas
 * of other requests are not expected. */
static bool take_step(broker *b, uint64_t number, answer *streams, int n)
{
    cr_assert_eq(b->message.type, QV_MSG_STEP);
    cr_expect_eq(b->message.step.epoch, b->epoch, "nothing of another session");
    for (uint32_t i = 0; i < b->message.step.deltas.count; i++) {
        const qv_msg_delta *delta = &b->message.step.deltas.data[i];
        cr_assert_eq(delta->request, number);
        if (delta->error_code.size > 0) {
            keep(streams->error, sizeof streams->error, delta->error_code);
            keep(streams->message, sizeof streams->message, delta->error_message);
            return true;
        }
        cr_assert_lt(delta->index, n);
        take_delta(&streams[delta->index], delta);
    }
    for (int i = 0; i < n; i++)
        if (streams[i].finish[0] == 0)
            return false;
    return true;
}

static void finish(broker *b, uint64_t number, answer *streams, int n)
{
    do
        expect_message(b, QV_MSG_STEP);
    while (!take_step(b, number, streams, n));
}

static answer ask(broker *b, uint64_t number, const qv_msg_submit *submit)
{
    answer a = {0};
    send_run(b, b->epoch, number, submit, NULL, NULL);
    finish(b, number, &a, 1);
    return a;
}

static void send_abort(broker *b, uint64_t number, const char *reason)
{
    qv_message message = {.type = QV_MSG_ABORT};
    message.abort.epoch = b->epoch;
    message.abort.request = number;
    qv_set(&message.abort, abort, reason, qv_str_from(reason));
    send_to_worker(b, &message);
}

/* --- registering ------------------------------------------------------------------------------ */

static bool http_has(uint16_t port, const char *path, const char *text)
{
    char *reply = qv_http_get(port, path);
    bool found = reply != NULL && strstr(reply, text) != NULL;
    free(reply);
    return found;
}

static bool is_ready(void *user)
{
    return http_has(*(uint16_t *)user, "/readyz", "200 OK");
}

Test(worker, registers_with_what_it_is, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    broker_open(&b, "tcp://127.0.0.1:*");
    start_worker(&b, worker_options());
    const qv_msg_ready *ready = &b.message.ready;
    char digest[QV_MODEL_DIGEST_SIZE];
    cr_expect(qv_str_equal(ready->worker, "w1"));
    cr_expect_eq(ready->protocol, QV_PROTOCOL_VERSION);
    cr_expect(qv_str_equal(ready->model, "tiny-qwen3.5"));
    cr_expect(qv_str_equal(ready->backend, "cpu"));
    cr_expect_eq(ready->capacity, 8);
    cr_expect_gt(ready->adapter_slots, 4, "host memory holds more than the device");
    cr_expect_eq(ready->max_rank, 16);
    cr_expect_eq(ready->max_context, 1024);
    cr_expect_gt(ready->total_pages, 0);
    cr_expect_eq(ready->adapters.count, 0);
    cr_assert_eq(qv_model_digest(need_model(), digest), QV_OK);
    cr_expect(qv_str_equal(ready->model_digest, digest));

    uint16_t port = qv_worker_metrics_port(b.worker);
    cr_expect(http_has(port, "/healthz", "200 OK"));
    cr_expect(http_has(port, "/readyz", "not registered"));
    welcome(&b, 1000, 60000);
    cr_expect(qv_wait_until(is_ready, &port, DEADLINE_MS));
    next_message(&b, 500);
    cr_expect_geq(b.n_heartbeats, 3);
    cr_expect(http_has(port, "/metrics", "quiver_worker_registrations_total 1"));
    broker_close(&b);
}

Test(worker, answers_a_request_in_one_message_per_step, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    begin(&b);
    qv_msg_submit submit = greedy("The sea is", "", 12);
    answer first = ask(&b, 1, &submit);
    cr_expect_eq(first.n_tokens, 12, "%s", first.message);
    cr_expect_str_eq(first.finish, "length");
    cr_expect_eq(first.completion_tokens, 12);
    cr_expect_gt(first.prompt_tokens, 0);
    answer again = ask(&b, 2, &submit);
    cr_expect_arr_eq(first.tokens, again.tokens, sizeof(int32_t) * 12);
    cr_expect_str_eq(first.text, again.text);

    answer streams[MAX_STREAMS] = {0};
    qv_set(&submit, submit, n, MAX_STREAMS);
    qv_set(&submit, submit, temperature, 1.0);
    send_run(&b, b.epoch, 3, &submit, NULL, NULL);
    finish(&b, 3, streams, MAX_STREAMS);
    for (int i = 0; i < MAX_STREAMS; i++)
        cr_expect_eq(streams[i].n_tokens, 12);
    next_message(&b, 3 * HEARTBEAT_MS);
    cr_expect_gt(b.steps, 0, "heartbeats carry the step counter");
    broker_close(&b);
}

Test(worker, refuses_what_it_cannot_run_and_goes_on, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    begin(&b);
    qv_msg_submit good = greedy("a", "", 2);
    qv_msg_submit no_adapter = greedy("a", "nobody", 2);
    qv_msg_submit too_long = {.id = qv_str_from("r")};
    int32_t many[2000] = {0};
    qv_set(&too_long, submit, tokens, ((qv_ints){many, 2000}));
    qv_msg_submit bad_token = {.id = qv_str_from("r")};
    int32_t tokens[] = {1, 1000000};
    qv_set(&bad_token, submit, tokens, ((qv_ints){tokens, 2}));
    const struct {
        const qv_msg_submit *submit;
        const char *code;
    } rows[] = {{&no_adapter, "ADAPTER_NOT_FOUND"},
                {&too_long, "CONTEXT_TOO_LONG"},
                {&bad_token, "BAD_REQUEST"}};
    for (uint64_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        answer a = ask(&b, 10 + i, rows[i].submit);
        cr_expect_str_eq(a.error, rows[i].code, "row %d: %s %s", (int)i, a.error, a.message);
        cr_expect_gt(strlen(a.message), 0);
    }
    static const char *const garbage[] = {"", "\x81", "not msgpack", "\xdd\xff\xff\xff\xff"};
    for (uint64_t i = 1; i < sizeof garbage / sizeof *garbage; i++) {
        qv_message message = {.type = QV_MSG_RUN};
        answer a = {0};
        message.run.epoch = b.epoch;
        message.run.request = 20 + i;
        message.run.submit = qv_str_from(garbage[i]);
        send_to_worker(&b, &message);
        finish(&b, 20 + i, &a, 1);
        cr_expect(strcmp(a.error, "BAD_REQUEST") == 0 || strcmp(a.error, "TOO_LARGE") == 0,
                  "garbage %d: %s", (int)i, a.error);
    }
    for (size_t i = 0; i < sizeof garbage / sizeof *garbage; i++) /* not even a message */
        qv_mq_send(b.mq, &b.peer, garbage[i], strlen(garbage[i]));
    answer a = ask(&b, 30, &good);
    cr_expect_str_eq(a.finish, "length");
    broker_close(&b);
}

Test(worker, aborts_a_request, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    begin(&b);
    static const char *const reasons[] = {"cancelled", "deadline"};
    qv_msg_submit submit = greedy("The sea is", "", 900);
    for (uint64_t i = 0; i < 2; i++) {
        answer a = {0};
        send_run(&b, b.epoch, i, &submit, NULL, NULL);
        expect_message(&b, QV_MSG_STEP);
        take_step(&b, i, &a, 1);
        send_abort(&b, i + 77, "cancelled"); /* nobody's */
        send_abort(&b, i, reasons[i]);
        finish(&b, i, &a, 1);
        cr_expect_str_eq(a.finish, reasons[i]);
        cr_expect_lt(a.n_tokens, 900);
    }
    broker_close(&b);
}

/* --- adapters --------------------------------------------------------------------------------- */

static void send_load(broker *b, const char *name, const char *path)
{
    qv_message message = {.type = QV_MSG_LOAD_ADAPTER};
    message.load_adapter.epoch = b->epoch;
    message.load_adapter.name = qv_str_from(name);
    message.load_adapter.path = qv_str_from(path);
    send_to_worker(b, &message);
}

static void send_unload(broker *b, const char *name, const char *digest)
{
    qv_message message = {.type = QV_MSG_UNLOAD_ADAPTER};
    message.unload_adapter.epoch = b->epoch;
    message.unload_adapter.name = qv_str_from(name);
    if (digest != NULL)
        qv_set(&message.unload_adapter, unload_adapter, digest, qv_str_from(digest));
    send_to_worker(b, &message);
}

/* The next report about an adapter that is not "loading". */
static const qv_msg_adapter_state *expect_state(broker *b, const char *name, const char *state)
{
    do
        expect_message(b, QV_MSG_ADAPTER_STATE);
    while (qv_str_equal(b->message.adapter_state.state, "loading"));
    const qv_msg_adapter_state *got = &b->message.adapter_state;
    cr_expect(qv_str_equal(got->name, name), "%.*s", (int)got->name.size, got->name.data);
    cr_expect(qv_str_equal(got->state, state), "%.*s: %.*s", (int)got->state.size, got->state.data,
              (int)got->reason.size, got->reason.data);
    cr_expect_eq(got->epoch, b->epoch);
    return got;
}

Test(worker, loads_and_unloads_adapters, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    char path[4096], digest[65];
    begin(&b);
    snprintf(path, sizeof path, "%s/adapters/json", need_model());
    send_load(&b, "json", path);
    const qv_msg_adapter_state *state = expect_state(&b, "json", "ready");
    cr_expect_eq(state->digest.size, 32);
    cr_expect_gt(state->rank, 0);
    cr_expect_gt(state->bytes, 0);
    keep(digest, sizeof digest, state->digest);

    qv_msg_submit submit = greedy("The sea is", "json", 8);
    answer a = ask(&b, 1, &submit);
    cr_expect_eq(a.n_tokens, 8, "%s", a.message);
    cr_expect_str_eq(a.digest, digest);

    send_load(&b, "ghost", "/nonexistent");
    state = expect_state(&b, "ghost", "failed");
    cr_expect(qv_str_equal(state->error_code, "ADAPTER_NOT_FOUND"));
    cr_expect_gt(state->reason.size, 0);

    send_unload(&b, "json", "00000000000000000000000000000000");
    state = expect_state(&b, "json", "ready");
    cr_expect(qv_str_equal(state->digest, digest), "another version is not unloaded");
    send_unload(&b, "json", digest);
    expect_state(&b, "json", "unloaded");
    send_unload(&b, "json", NULL);
    expect_state(&b, "json", "unloaded");
    a = ask(&b, 2, &submit);
    cr_expect_str_eq(a.error, "ADAPTER_NOT_FOUND");
    broker_close(&b);
}

Test(worker, keeps_the_adapters_it_was_started_with, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    char json[4200], french[4200];
    snprintf(json, sizeof json, "json=%s/adapters/json", need_model());
    snprintf(french, sizeof french, "fr=%s/adapters/french", need_model());
    const char *items[] = {json, french, "ghost=/nonexistent"};
    qv_worker_options options = worker_options();
    options.adapters = (qv_string_list){.items = items, .n = 3};
    broker_open(&b, "tcp://127.0.0.1:*");
    start_worker(&b, options);
    welcome(&b, 1000, 60000);
    uint32_t known = b.message.ready.adapters.count;
    for (uint32_t seen = known; seen < 3; seen++) /* what was not ready yet is reported */
        do
            if (!next_message(&b, 2000))
                seen = 3;
        while (seen < 3 && qv_str_equal(b.message.adapter_state.state, "loading"));
    disown(&b);
    b.epoch = 0;
    do
        cr_assert(next_message(&b, DEADLINE_MS));
    while (b.message.type != QV_MSG_READY);
    cr_assert_eq(b.message.ready.adapters.count, 2);
    uint32_t n_json = 0, n_fr = 0; /* loads end in any order */
    for (uint32_t i = 0; i < 2; i++) {
        const qv_msg_held_adapter *held = &b.message.ready.adapters.data[i];
        n_json += qv_str_equal(held->name, "json");
        n_fr += qv_str_equal(held->name, "fr");
        cr_expect(qv_str_equal(held->state, "ready"));
        cr_expect_eq(held->digest.size, 32);
        cr_expect(held->pin);
    }
    cr_expect(n_json == 1 && n_fr == 1);
    broker_close(&b);
}

/* --- sessions --------------------------------------------------------------------------------- */

Test(worker, delivers_nothing_of_an_earlier_session, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    begin(&b);
    qv_msg_submit longer = greedy("Once upon a time", "", 900);
    qv_msg_submit submit = greedy("The sea is", "", 20);
    for (uint64_t number = 1; number <= 5; number++)
        send_run(&b, b.epoch, number, &longer, NULL, NULL);
    expect_message(&b, QV_MSG_STEP);
    qv_mq_peer before = b.peer;
    disown(&b);
    b.epoch = 0; /* a broker that restarted: it counts from 1 again */
    do
        cr_assert(next_message(&b, DEADLINE_MS));
    while (b.message.type != QV_MSG_READY);
    cr_expect_not(qv_mq_peer_equal(&before, &b.peer), "a fresh socket");
    welcome(&b, 2000, 60000);
    answer a = ask(&b, 1, &submit);
    cr_expect_eq(a.n_tokens, 20, "%s", a.message);
    cr_expect_not(next_message(&b, 300), "the old requests are over");

    send_run(&b, 1000, 2, &submit, NULL, NULL); /* a ghost of the broker's */
    cr_expect_not(next_message(&b, 300));
    a = ask(&b, 2, &submit);
    cr_expect_eq(a.n_tokens, 20);
    broker_close(&b);
}

Test(worker, registers_again_when_the_broker_falls_silent_or_restarts, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    broker_open(&b, "tcp://127.0.0.1:*");
    start_worker(&b, worker_options());
    b.silent = true;
    welcome(&b, 1000, 400);
    uint64_t start = qv_now_ms();
    expect_message(&b, QV_MSG_READY);
    cr_expect_geq(qv_now_ms() - start, 350);
    b.silent = false;
    welcome(&b, 1001, 2000); /* longer than a busy machine lets a thread wait */
    cr_expect_not(next_message(&b, 3000), "pings keep the session");

    broker_release(&b);
    qv_mq_close(b.mq);
    b.epoch = 0;
    char endpoint[64];
    snprintf(endpoint, sizeof endpoint, "%s", b.endpoint);
    broker_open(&b, endpoint);
    expect_message(&b, QV_MSG_READY);
    welcome(&b, 1002, 60000);
    qv_msg_submit submit = greedy("The sea is", "", 3);
    answer a = ask(&b, 1, &submit);
    cr_expect_eq(a.n_tokens, 3, "%s", a.message);
    broker_close(&b);
}

Test(worker, tries_the_next_broker_and_comes_back_to_one_that_refused, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    char dead[64];
    snprintf(dead, sizeof dead, "%s", qv_tcp_endpoint());
    broker_open(&b, "tcp://127.0.0.1:*");
    const char *endpoints[] = {dead, b.endpoint};
    qv_worker_options options = worker_options();
    options.register_timeout_ms = 1500;
    options.brokers = (qv_string_list){.items = endpoints, .n = 2};
    start_worker(&b, options);
    qv_message message = {.type = QV_MSG_REFUSED};
    message.refused.broker = qv_str_from("b1");
    message.refused.reason = qv_str_from("another model");
    qv_set(&message.refused, refused, retry_after_ms, 300);
    send_to_worker(&b, &message);
    uint64_t start = qv_now_ms();
    expect_message(&b, QV_MSG_READY);
    cr_expect_geq(qv_now_ms() - start, 300);
    expect_message(&b, QV_MSG_READY); /* unanswered, so again */
    welcome(&b, 1000, 60000);
    qv_msg_submit submit = greedy("a", "", 1);
    answer a = ask(&b, 1, &submit);
    cr_expect_eq(a.n_tokens, 1, "%s", a.message);
    broker_close(&b);
}

/* --- going on with what another worker began -------------------------------------------------- */

Test(worker, goes_on_exactly_where_another_worker_stopped, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    begin(&b);
    qv_msg_submit submit = greedy("The sea is", "", 24);
    qv_set(&submit, submit, temperature, 0.9);
    answer whole = ask(&b, 1, &submit);
    cr_assert_eq(whole.n_tokens, 24, "%s", whole.message);
    static const int cuts[] = {1, 7, 23};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        int cut = cuts[i];
        qv_msg_resume resume = {.index = 0, .seq = cut};
        resume.tokens = (qv_ints){whole.tokens, (uint32_t)cut};
        answer rest = {.next_seq = cut};
        send_run(&b, b.epoch, 10 + i, &submit, &resume, NULL);
        finish(&b, 10 + i, &rest, 1);
        cr_expect_eq(rest.n_tokens, 24 - cut, "cut %d: %s", cut, rest.message);
        cr_expect_arr_eq(rest.tokens, whole.tokens + cut, sizeof(int32_t) * (size_t)(24 - cut));
        cr_expect_eq(rest.completion_tokens, 24);
    }
    broker_close(&b);
}

Test(worker, does_not_go_on_with_another_version_of_the_adapter, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    char path[4096];
    begin(&b);
    snprintf(path, sizeof path, "%s/adapters/json", need_model());
    send_load(&b, "json", path);
    expect_state(&b, "json", "ready");
    int32_t tokens[] = {5, 6};
    qv_msg_submit submit = greedy("The sea is", "json", 8);
    qv_msg_resume resume = {.index = 0, .seq = 2, .tokens = {tokens, 2}};
    answer a = {.next_seq = 2};
    send_run(&b, b.epoch, 1, &submit, &resume, "00000000000000000000000000000000");
    finish(&b, 1, &a, 1);
    cr_expect_str_eq(a.error, "WORKER_LOST", "%s", a.message);
    broker_close(&b);
}

/* --- ends ------------------------------------------------------------------------------------- */

Test(worker, drains_finishing_what_runs, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    begin(&b);
    qv_msg_submit submit = greedy("The sea is", "", 200);
    answer a = {0};
    send_run(&b, b.epoch, 1, &submit, NULL, NULL);
    expect_message(&b, QV_MSG_STEP);
    take_step(&b, 1, &a, 1);
    qv_worker_drain(b.worker);
    finish(&b, 1, &a, 1);
    cr_expect_eq(a.n_tokens, 200);
    cr_expect_geq(b.n_draining, 1);
    expect_message(&b, QV_MSG_GOODBYE);
    cr_expect(qv_str_equal(b.message.goodbye.reason, "drained"));
    cr_expect_eq(b.message.goodbye.epoch, b.epoch);
    cr_expect_eq(poll(&(struct pollfd){.fd = qv_worker_fd(b.worker), .events = POLLIN}, 1, 5000),
                 1);
    cr_expect_eq(qv_worker_wait(b.worker), QV_OK);
    broker_close(&b);
}

Test(worker, gives_back_what_a_drain_has_no_time_for, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    qv_worker_options options = worker_options();
    options.drain_timeout_ms = 100;
    options.engine.preempt_every = 2;
    broker_open(&b, "tcp://127.0.0.1:*");
    start_worker(&b, options);
    welcome(&b, 1000, 60000);
    qv_msg_submit submit = greedy("The sea is", "", 1000);
    for (uint64_t number = 1; number <= 8; number++)
        send_run(&b, b.epoch, number, &submit, NULL, NULL);
    expect_message(&b, QV_MSG_STEP);
    qv_worker_drain(b.worker);
    do
        cr_assert(next_message(&b, DEADLINE_MS));
    while (b.message.type == QV_MSG_STEP);
    cr_assert_eq(b.message.type, QV_MSG_GOODBYE);
    cr_expect_eq(qv_worker_wait(b.worker), QV_ERR_BUSY);
    cr_expect(strstr(qv_error(), "given back") != NULL, "%s", qv_error());
    broker_close(&b);
}

Test(worker, stops_at_once_with_a_goodbye, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    begin(&b);
    qv_msg_submit submit = greedy("The sea is", "", 1000);
    send_run(&b, b.epoch, 1, &submit, NULL, NULL);
    expect_message(&b, QV_MSG_STEP);
    qv_worker_drain(b.worker);
    qv_worker_stop(b.worker);
    do
        cr_assert(next_message(&b, DEADLINE_MS));
    while (b.message.type == QV_MSG_STEP);
    cr_assert_eq(b.message.type, QV_MSG_GOODBYE);
    cr_expect(qv_str_equal(b.message.goodbye.reason, "stopped"));
    cr_expect_eq(qv_worker_wait(b.worker), QV_OK);
    broker_close(&b);
}

Test(worker, gives_up_when_a_step_does_not_end, .timeout = 120)
{
    NEEDS_MODEL();
    broker b = {0};
    qv_worker_options options = worker_options();
    options.stall_timeout_ms = 1; /* any step of this prompt takes longer than ten of these */
    options.engine.step_tokens = 8192;
    options.engine.max_context = 4096;
    options.engine.prefill_chunk = 0;
    broker_open(&b, "tcp://127.0.0.1:*");
    start_worker(&b, options);
    welcome(&b, 1000, 60000);
    qv_msg_submit submit = {.id = qv_str_from("r")};
    int32_t tokens[1000];
    for (int i = 0; i < 1000; i++)
        tokens[i] = 20 + i % 900;
    qv_set(&submit, submit, tokens, ((qv_ints){tokens, 1000}));
    for (uint64_t number = 1; number <= 2; number++)
        send_run(&b, b.epoch, number, &submit, NULL, NULL);
    do
        cr_assert(next_message(&b, DEADLINE_MS));
    while (b.message.type == QV_MSG_STEP);
    cr_assert_eq(b.message.type, QV_MSG_GOODBYE);
    cr_expect(qv_str_equal(b.message.goodbye.reason, "the engine hangs"));
    cr_expect_eq(qv_worker_wait(b.worker), QV_ERR_TIMEOUT);
    broker_close(&b);
}

Test(worker, can_be_stopped_before_it_found_a_broker)
{
    NEEDS_MODEL();
    broker b = {0};
    const char *endpoint = qv_tcp_endpoint();
    qv_worker_options options = worker_options();
    options.brokers = (qv_string_list){.items = &endpoint, .n = 1};
    cr_assert_eq(qv_worker_start(&options, &b.worker), QV_OK);
    cr_expect(http_has(qv_worker_metrics_port(b.worker), "/readyz", "503"));
    qv_worker_drain(b.worker);
    cr_expect_eq(qv_worker_wait(b.worker), QV_OK);
    cr_expect(qv_worker_free(b.worker));
}

Test(worker, says_why_a_model_does_not_load)
{
    const char *endpoint = "tcp://127.0.0.1:1";
    qv_worker_options options = worker_options();
    qv_worker *worker;
    options.engine.model_dir = "/nonexistent";
    options.brokers = (qv_string_list){.items = &endpoint, .n = 1};
    cr_assert_eq(qv_worker_start(&options, &worker), QV_OK);
    cr_expect_eq(qv_worker_wait(worker), QV_ERR_NOT_FOUND);
    cr_expect(strstr(qv_error(), "/nonexistent") != NULL, "%s", qv_error());
    cr_expect(qv_worker_free(worker));
    cr_expect(qv_worker_free(NULL));
}

Test(worker, refuses_options_that_make_no_sense)
{
    static const struct {
        const char *id, *broker, *redis, *adapter, *says;
    } rows[] = {
        {"a b", "tcp://h:1", NULL, NULL, "id 'a b'"},
        {"w", NULL, "http://h", NULL, "http://h"},
        {"w", "h:1", NULL, NULL, "cannot connect to h:1"},
        {"w", "", NULL, NULL, "an endpoint is empty"},
        {"w", "tcp://h:1", NULL, "json", "'json' is not NAME=DIR"},
        {"w", "tcp://h:1", NULL, "json=", "'json=' is not NAME=DIR"},
        {"w", "tcp://h:1", NULL, "json=\xff", "not UTF-8"},
        {"w", "tcp://h:1", NULL, "=dir", "adapter"},
        {"w", "tcp://h:1", NULL, "a b=dir", "adapter"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_worker_options options = worker_options();
        qv_worker *worker;
        options.engine.model_dir = "/nonexistent";
        options.id = rows[i].id;
        options.redis = rows[i].redis;
        options.brokers = (qv_string_list){(const char **)&rows[i].broker, rows[i].broker != NULL};
        options.adapters =
            (qv_string_list){(const char **)&rows[i].adapter, rows[i].adapter != NULL};
        cr_expect_eq(qv_worker_start(&options, &worker), QV_ERR_ARG, "row %zu", i);
        cr_expect(strstr(qv_error(), rows[i].says) != NULL, "row %zu: %s", i, qv_error());
    }
}

/* --- Redis ------------------------------------------------------------------------------------ */

static pid_t start_redis(uint16_t port)
{
    char text[8];
    const char *dir = qv_temp_dir();
    snprintf(text, sizeof text, "%u", port);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execlp("redis-server", "redis-server", "--port", text, "--bind", "127.0.0.1", "--save", "",
               "--dir", dir, "--logfile", "redis.log", (char *)NULL);
        _exit(127);
    }
    return pid;
}

typedef struct {
    uint16_t port;
    char command[256]; /* after redis-cli -p PORT */
    const char *wanted;
    char output[512];
} redis_cli;

static bool cli_says(void *user)
{
    redis_cli *cli = user;
    char command[320];
    snprintf(command, sizeof command, "redis-cli -p %u %s 2>&1", cli->port, cli->command);
    FILE *pipe = popen(command, "r");
    size_t n = pipe != NULL ? fread(cli->output, 1, sizeof cli->output - 1, pipe) : 0;
    cli->output[n] = 0;
    if (pipe != NULL)
        pclose(pipe);
    return strstr(cli->output, cli->wanted) != NULL;
}

static bool redis_says(uint16_t port, const char *command, const char *wanted)
{
    redis_cli cli = {.port = port, .wanted = wanted};
    snprintf(cli.command, sizeof cli.command, "%s", command);
    return qv_wait_until(cli_says, &cli, 20000);
}

Test(worker, finds_its_broker_in_redis_and_keeps_a_lease, .timeout = 120)
{
    NEEDS_MODEL();
    if (system("command -v redis-server redis-cli >/dev/null 2>&1") != 0)
        cr_skip_test("redis-server is not installed");
    broker b = {0};
    uint16_t port = qv_free_port();
    char url[64], command[256];
    pid_t redis = start_redis(port);
    snprintf(url, sizeof url, "redis://127.0.0.1:%u", port);
    cr_assert(redis_says(port, "PING", "PONG"));
    qv_worker_options options = worker_options();
    options.redis = url;
    cr_assert_eq(qv_worker_start(&options, &b.worker), QV_OK, "%s", qv_error());
    cr_expect(redis_says(port, "HGET quiver:worker:w1 state", "seeking"));

    broker_open(&b, "tcp://127.0.0.1:*");
    snprintf(command, sizeof command, "HSET quiver:broker:b1 frontend tcp://h:1 backend %s",
             b.endpoint);
    cr_assert(redis_says(port, command, "2"));
    expect_message(&b, QV_MSG_READY);
    b.silent = true; /* nobody pings while we look at Redis */
    welcome(&b, 1000, 60000);
    cr_expect(redis_says(port, "HGET quiver:worker:w1 state", "ready"));
    cr_expect(redis_says(port, "HGET quiver:worker:w1 broker", "b1"));
    cr_expect(redis_says(port, "HGET quiver:worker:w1 model", "tiny-qwen3.5"));

    char path[4096];
    snprintf(path, sizeof path, "%s/adapters/json", need_model());
    send_load(&b, "json", path);
    expect_state(&b, "json", "ready");
    cr_expect(redis_says(port, "HGET quiver:worker:w1 adapters", "json"));
    cr_expect(redis_says(port, "XRANGE quiver:events - +", "worker_started"));
    qv_worker_drain(b.worker);
    expect_message(&b, QV_MSG_GOODBYE);
    cr_expect_eq(qv_worker_wait(b.worker), QV_OK);
    cr_expect(redis_says(port, "EXISTS quiver:worker:w1", "0"));
    broker_close(&b);
    kill(redis, SIGKILL);
    waitpid(redis, NULL, 0);
}

/* --- the engine thread alone ------------------------------------------------------------------ */

typedef struct {
    qv_engine_thread *thread;
    answer streams[MAX_STREAMS];
    size_t n_messages, largest;
    bool failed;
} host;

static void host_start(host *h, size_t max_message_bytes)
{
    qv_engine_thread_options options = {.engine = engine_options(),
                                        .max_message_bytes = max_message_bytes};
    qv_report report;
    cr_assert_eq(qv_engine_thread_start(&options, &h->thread), QV_OK);
    while (!qv_engine_thread_pop(h->thread, &report))
        poll(&(struct pollfd){.fd = qv_engine_thread_fd(h->thread), .events = POLLIN}, 1, 100);
    cr_assert_eq(report.type, QV_REPORT_OPENED, "%s", report.text);
    cr_assert_not_null(qv_engine_thread_engine(h->thread));
    qv_report_deinit(&report);
    cr_assert(
        qv_engine_thread_push(h->thread, &(qv_command){.type = QV_COMMAND_SESSION, .epoch = 5}));
}

static void host_run(host *h, const qv_msg_submit *submit)
{
    qv_command command = {.type = QV_COMMAND_RUN,
                          .epoch = 5,
                          .number = 1,
                          .own_number = 1,
                          .n_streams = (uint32_t)(qv_has(submit, submit, n) ? submit->n : 1)};
    qv_code code;
    qv_msg_submit full = *submit; /* the fields that a decoder would fill with defaults */
    if (!qv_has(submit, submit, n))
        full.n = 1;
    full.top_p = 1;
    full.repetition_penalty = 1;
    cr_assert_eq(qv_request_new(qv_engine_thread_engine(h->thread), &full, 1, 7, NULL, 0,
                                &command.request, &code),
                 QV_OK, "%s", qv_error());
    cr_assert(qv_engine_thread_push(h->thread, &command));
}

/* Take reports until every stream has ended. */
static void host_finish(host *h, int n)
{
    qv_arena arena = {0};
    broker b = {.epoch = 5};
    bool done = false;
    while (!done) {
        qv_report report;
        if (!qv_engine_thread_pop(h->thread, &report)) {
            poll(&(struct pollfd){.fd = qv_engine_thread_fd(h->thread), .events = POLLIN}, 1, 100);
            continue;
        }
        cr_assert_eq(report.type, QV_REPORT_STEP, "%s", report.text);
        h->n_messages++;
        h->largest = report.size > h->largest ? report.size : h->largest;
        qv_arena_reset(&arena);
        cr_assert_eq(qv_message_decode(report.data, report.size, QV_FROM_WORKER,
                                       &qv_protocol_default_limits, &arena, &b.message),
                     QV_OK);
        done = take_step(&b, 1, h->streams, n);
        qv_report_deinit(&report);
    }
    qv_arena_deinit(&arena);
}

static bool is_blocked(void *user)
{
    const host *h = user;
    return atomic_load(&qv_engine_thread_view(h->thread)->activity) == QV_ACTIVITY_BLOCKED;
}

static bool is_done(void *user)
{
    const host *h = user;
    return qv_engine_thread_n_requests(h->thread) == 0;
}

Test(engine_thread, waits_until_its_reports_are_taken, .timeout = 120)
{
    NEEDS_MODEL();
    host h = {0};
    host_start(&h, 1 << 20);
    qv_msg_submit submit = greedy("The sea is", "", 500);
    host_run(&h, &submit);
    cr_assert(qv_wait_until(is_blocked, &h, DEADLINE_MS));
    cr_expect_eq(qv_engine_thread_n_requests(h.thread), 1);
    host_finish(&h, 1);
    cr_expect_eq(h.streams[0].n_tokens, 500, "nothing is lost");
    cr_expect(qv_wait_until(is_done, &h, DEADLINE_MS));
    qv_engine_thread_stop(h.thread);
    cr_expect(qv_engine_thread_join(h.thread, DEADLINE_MS));
}

Test(engine_thread, ends_although_nobody_takes_its_reports, .timeout = 120)
{
    NEEDS_MODEL();
    host h = {0};
    host_start(&h, 1 << 20);
    qv_msg_submit submit = greedy("The sea is", "", 900);
    host_run(&h, &submit);
    cr_assert(qv_wait_until(is_blocked, &h, DEADLINE_MS));
    qv_engine_thread_stop(h.thread);
    cr_expect(qv_engine_thread_join(h.thread, DEADLINE_MS));
}

Test(engine_thread, splits_a_step_that_is_too_large_for_a_message, .timeout = 120)
{
    NEEDS_MODEL();
    host h = {0};
    host_start(&h, 160);
    qv_msg_submit submit = greedy("The sea is", "", 6);
    qv_set(&submit, submit, n, MAX_STREAMS);
    qv_set(&submit, submit, temperature, 1.0);
    host_run(&h, &submit);
    host_finish(&h, MAX_STREAMS);
    for (int i = 0; i < MAX_STREAMS; i++)
        cr_expect_eq(h.streams[i].n_tokens, 6);
    cr_expect_leq(h.largest, 160);
    cr_expect_gt(h.n_messages, 6);
    qv_engine_thread_stop(h.thread);
    cr_expect(qv_engine_thread_join(h.thread, DEADLINE_MS));
}

Test(engine_thread, ends_a_request_whose_answer_fits_no_message, .timeout = 120)
{
    NEEDS_MODEL();
    host h = {0};
    host_start(&h, 400);
    qv_msg_submit submit = greedy("The sea is wide and the sea is deep and it is blue, it is said, "
                                  "and nobody knows why it should be so.",
                                  "", 4);
    qv_set(&submit, submit, prompt_logprobs, 8);
    host_run(&h, &submit);
    host_finish(&h, 1);
    cr_expect_str_eq(h.streams[0].error, "TOO_LARGE", "%s", h.streams[0].message);
    qv_engine_thread_stop(h.thread);
    cr_expect(qv_engine_thread_join(h.thread, DEADLINE_MS));
}

/* --- the digest of a model -------------------------------------------------------------------- */

Test(model_digest, depends_on_every_file_of_the_model)
{
    static const struct {
        const char *file, *text;
        bool counts;
    } rows[] = {{"config.json", "{}", true},
                {"model.safetensors", "weights", true},
                {"model.safetensors", "weightS", true},
                {"chat_template.jinja", "{{ x }}", true},
                {"README.md", "text", false}};
    char before[QV_MODEL_DIGEST_SIZE] = "", now[QV_MODEL_DIGEST_SIZE];
    const char *dir = qv_temp_dir();
    cr_expect_eq(qv_model_digest(dir, now), QV_ERR_NOT_FOUND);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_write_text(qv_path(dir, "%s", rows[i].file), rows[i].text);
        cr_assert_eq(qv_model_digest(dir, now), QV_OK, "%s", qv_error());
        cr_expect_eq(strlen(now), 32);
        cr_expect_eq(strcmp(before, now) != 0, rows[i].counts, "row %zu", i);
        strcpy(before, now);
    }
    cr_expect_eq(qv_model_digest("/nonexistent", now), QV_ERR_NOT_FOUND);
}
