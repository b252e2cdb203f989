/* Where the client looks for its requests when connections come and go: scripted, without sockets.
 */
#include "clients/client_flow.h"

#include <criterion/criterion.h>
#include <string.h>

typedef struct {
    qv_flow *flow;
    qv_arena arena; /* of all messages */
    struct {
        uint32_t link;
        qv_message message;
    } sent[32];
    uint32_t n, taken;
    uint64_t now_ms;
} world;

static bool send_message(void *user, uint32_t link, const qv_message *message)
{
    world *w = user;
    const void *data;
    size_t size;
    cr_assert_lt(w->n, 32);
    cr_assert_eq(qv_message_encode(message, &w->arena, &data, &size), QV_OK, "%s", qv_error());
    w->sent[w->n].link = link;
    cr_assert_eq(
        qv_message_decode(data, size, QV_FROM_CLIENT, NULL, &w->arena, &w->sent[w->n].message),
        QV_OK, "%s", qv_error());
    w->n++;
    return true;
}

static world *new_world(uint32_t n)
{
    static world w;
    static const char *const endpoints[] = {"tcp://a:1", "tcp://b:1"};
    w = (world){.now_ms = 1000};
    const qv_flow_actions actions = {.send = send_message, .user = &w};
    cr_assert_eq(qv_flow_new(endpoints, n, &actions, &w.flow), QV_OK);
    for (uint32_t i = 0; i < n; i++)
        qv_flow_connected(w.flow, i, w.now_ms);
    return &w;
}

static void free_world(world *w)
{
    qv_flow_free(w->flow);
    qv_arena_deinit(&w->arena);
}

static void submit(world *w, const char *id, bool durable)
{
    qv_message message;
    const void *data;
    size_t size;
    qv_message_init(&message, QV_MSG_SUBMIT);
    message.submit.id = qv_str_from(id);
    qv_set(&message.submit, submit, prompt, qv_str_from("hi"));
    if (durable)
        qv_set(&message.submit, submit, durable, true);
    cr_assert_eq(qv_message_encode(&message, &w->arena, &data, &size), QV_OK);
    cr_assert_eq(qv_flow_submit(w->flow, &message.submit, data, size, w->now_ms), QV_OK, "%s",
                 qv_error());
}

/* The next message sent, which must be of this type; its connection in *link. */
static const qv_message *expect(world *w, qv_msg_type type, uint32_t *link)
{
    cr_assert_lt(w->taken, w->n, "nothing was sent");
    *link = w->sent[w->taken].link;
    const qv_message *message = &w->sent[w->taken++].message;
    cr_assert_eq(message->type, type, "a '%s'", qv_message_type_name(message->type));
    return message;
}

static bool accepted(world *w, uint32_t link, const char *id, uint64_t seed)
{
    qv_message message = {.type = QV_MSG_ACCEPTED, .id = qv_str_from(id)};
    message.accepted.id = message.id;
    qv_set(&message.accepted, accepted, seed, seed);
    return qv_flow_take(w->flow, link, &message, w->now_ms);
}

static bool tokens(world *w, uint32_t link, const char *id, int64_t seq, int32_t token)
{
    qv_message message = {.type = QV_MSG_TOKENS, .id = qv_str_from(id)};
    message.tokens.id = message.id;
    message.tokens.seq = seq;
    message.tokens.tokens = (qv_ints){&token, 1};
    qv_set(&message.tokens, tokens, digest, qv_str_from("v1"));
    return qv_flow_take(w->flow, link, &message, w->now_ms);
}

static bool failed(world *w, uint32_t link, const char *id, const char *code, const char *broker)
{
    qv_message message = {.type = QV_MSG_ERROR, .id = qv_str_from(id)};
    message.error.code = qv_str_from(code);
    message.error.message = qv_str_from("no");
    if (broker != NULL)
        qv_set(&message.error, error, broker, qv_str_from(broker));
    return qv_flow_take(w->flow, link, &message, w->now_ms);
}

Test(flow, a_broker_that_is_back_is_asked_for_the_rest)
{
    world *w = new_world(1);
    uint32_t link;
    submit(w, "r", false);
    expect(w, QV_MSG_SUBMIT, &link);
    cr_assert(accepted(w, link, "r", 7));
    cr_assert(tokens(w, link, "r", 0, 40));
    qv_flow_disconnected(w->flow, 0, w->now_ms);
    qv_flow_connected(w->flow, 0, w->now_ms);
    const qv_msg_resume_request *resume = &expect(w, QV_MSG_RESUME, &link)->resume_request;
    cr_assert_eq(resume->seqs.data[0], 0);
    cr_assert(qv_str_equal(resume->digest, "v1"));
    cr_assert(!tokens(w, link, "r", 0, 40), "it has this one");
    cr_assert(tokens(w, link, "r", 1, 41));
    free_world(w);
}

Test(flow, what_no_broker_has_goes_on_from_what_was_received)
{
    world *w = new_world(2);
    uint32_t first, link;
    submit(w, "r", false);
    expect(w, QV_MSG_SUBMIT, &first);
    accepted(w, first, "r", 7);
    tokens(w, first, "r", 0, 40);
    qv_flow_disconnected(w->flow, first, w->now_ms);
    w->now_ms += 600; /* it may come back for half a second */
    qv_flow_poll(w->flow, w->now_ms);
    expect(w, QV_MSG_RESUME, &link);
    cr_assert_neq(link, first);
    cr_assert(!failed(w, link, "r", "NOT_FOUND", NULL));
    const qv_msg_submit *again = &expect(w, QV_MSG_SUBMIT, &link)->submit;
    cr_assert_eq(again->seed, 7);
    cr_assert_eq(again->resume.count, 1);
    cr_assert_eq(again->resume.data[0].seq, 1);
    cr_assert_eq(again->resume.data[0].tokens.data[0], 40);
    cr_assert(qv_str_equal(again->digest, "v1"));
    free_world(w);
}

Test(flow, an_error_that_names_a_broker_leads_there)
{
    world *w = new_world(2);
    uint32_t first, link;
    submit(w, "r", true);
    expect(w, QV_MSG_SUBMIT, &first);
    uint32_t other = 1 - first;
    cr_assert(!failed(w, first, "r", "NOT_FOUND", other == 0 ? "tcp://a:1" : "tcp://b:1"));
    expect(w, QV_MSG_RESUME, &link);
    cr_assert_eq(link, other);
    free_world(w);
}

Test(flow, patience_is_shown_to_a_broker_that_takes_over_and_errors_to_the_user)
{
    world *w = new_world(1);
    uint32_t link;
    int32_t have = 4;
    cr_assert_eq(qv_flow_resume(w->flow, qv_str_from("r"), (qv_str){0}, &have, 1, w->now_ms),
                 QV_OK);
    cr_assert_eq(expect(w, QV_MSG_RESUME, &link)->resume_request.seqs.data[0], 4);
    qv_message message = {.type = QV_MSG_ERROR, .id = qv_str_from("r")};
    message.error.code = qv_str_from("OVERLOADED");
    qv_set(&message.error, error, retry_after_ms, 250);
    cr_assert(!qv_flow_take(w->flow, link, &message, w->now_ms));
    cr_assert_eq(qv_flow_poll(w->flow, w->now_ms), w->now_ms + 250);
    w->now_ms += 250;
    qv_flow_poll(w->flow, w->now_ms);
    expect(w, QV_MSG_RESUME, &link);
    cr_assert(failed(w, link, "r", "NOT_FOUND", NULL), "nobody has it and we do not know it");
    submit(w, "s", false);
    expect(w, QV_MSG_SUBMIT, &link);
    cr_assert(failed(w, link, "s", "TOO_LARGE", NULL));
    free_world(w);
}
