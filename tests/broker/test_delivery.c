/* What outlives a connection, a worker or a broker: resuming, durable requests, poison. */
#include "tests/broker/world.h"

#include <criterion/criterion.h>
#include <string.h>

#define STR(s) (int)(s).size, (s).data

static void resume(world *w, const char *client, const char *id, const char *more)
{
    char json[256];
    snprintf(json, sizeof json, "{\"type\":\"resume\",\"id\":\"%s\"%s}", id, more);
    world_client_json(w, client, json);
}

static void expect_tokens(world *w, const char *client, int64_t index, int64_t seq,
                          const char *text)
{
    const qv_msg_tokens *tokens = &world_expect(w, client, QV_MSG_TOKENS)->tokens;
    cr_assert_eq(tokens->index, index);
    cr_assert_eq(tokens->seq, seq, "seq %lld, not %lld", (long long)tokens->seq, (long long)seq);
    cr_assert(qv_str_equal(tokens->text, text), "'%.*s', not '%s'", STR(tokens->text), text);
}

static void expect_done(world *w, const char *client, int64_t seq, const char *reason)
{
    const qv_msg_done *done = &world_expect(w, client, QV_MSG_DONE)->done;
    cr_assert(qv_str_equal(done->finish_reason, reason), "%.*s", STR(done->finish_reason));
    cr_assert_eq(done->seq, seq, "seq %lld, not %lld", (long long)done->seq, (long long)seq);
}

static void expect_error(world *w, const char *client, const char *code)
{
    const qv_msg_error *error = &world_expect(w, client, QV_MSG_ERROR)->error;
    cr_assert(qv_str_equal(error->code, code), "%.*s: %.*s", STR(error->code), STR(error->message));
}

static void expect_resumed(world *w, const char *client)
{
    cr_assert(world_expect(w, client, QV_MSG_ACCEPTED)->accepted.resumed);
}

static void lose(world *w, const char *client)
{
    qv_mq_peer peer = world_peer(client);
    qv_core_client_gone(w->core, &peer, w->now_us);
    while (world_take(w, client) != NULL)
        continue;
}

static int64_t count(const world *w)
{
    return qv_core_n_jobs(w->core);
}

/* --- resume -----------------------------------------------------------------------------------*/

Test(resume, another_connection_goes_on_behind_what_the_first_one_read)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "logprobs", "0", NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "x0", NULL);
    world_delta(w, "w1", epoch, request, 0, 1, "x1", NULL);
    world_delta(w, "w1", epoch, request, 0, 2, "x2", NULL);
    lose(w, "c1");
    cr_assert_eq(world_expect(w, "w1", QV_MSG_ABORT)->abort.request, request,
                 "no step is spent on a client that is away");
    cr_assert_eq(count(w), 1);

    resume(w, "c2", "a", ",\"seq\":0");
    expect_resumed(w, "c2");
    expect_tokens(w, "c2", 0, 1, "x1");
    expect_tokens(w, "c2", 0, 2, "x2");
    const qv_msg_run *run = &world_expect(w, "w1", QV_MSG_RUN)->run;
    cr_assert_eq(run->resume.data[0].seq, 3);
    cr_assert_eq(run->resume.data[0].tokens.count, 3);
    world_delta(w, "w1", epoch, run->request, 0, 3, "x3", "stop");
    expect_tokens(w, "c2", 0, 3, "x3");
    expect_done(w, "c2", 4, "stop");
    cr_assert(world_is_silent(w, "c1"));
    world_free(w);
}

Test(resume, takes_a_stream_from_a_connection_that_is_still_there)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "n", "2", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "a0", NULL);
    world_delta(w, "w1", epoch, request, 1, 0, "b0", "stop");
    resume(w, "c2", "a", ",\"seqs\":[0,-1]");
    expect_resumed(w, "c2");
    expect_tokens(w, "c2", 1, 0, "b0");
    expect_done(w, "c2", 1, "stop");
    world_delta(w, "w1", epoch, request, 0, 1, "a1", "stop");
    expect_tokens(w, "c2", 0, 1, "a1");
    expect_done(w, "c2", 2, "stop");
    expect_tokens(w, "c1", 0, 0, "a0");
    expect_tokens(w, "c1", 1, 0, "b0");
    expect_done(w, "c1", 1, "stop");
    cr_assert(world_is_silent(w, "c1"));
    world_free(w);
}

Test(resume, finds_an_answer_that_has_ended_for_the_stated_time)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "x0", NULL);
    world_delta(w, "w1", epoch, request, 0, 1, "x1", "stop");
    lose(w, "c1");
    resume(w, "c2", "a", "");
    expect_resumed(w, "c2");
    expect_tokens(w, "c2", 0, 0, "x0");
    expect_tokens(w, "c2", 0, 1, "x1");
    expect_done(w, "c2", 2, "stop");
    resume(w, "c3", "a", ",\"seq\":1");
    expect_resumed(w, "c3");
    expect_done(w, "c3", 2, "stop");
    for (int i = 0; i < 31; i++) {
        world_beat(w, "w1", epoch, false);
        world_pass(w, 1000);
    }
    resume(w, "c4", "a", "");
    cr_assert_eq(w->n_looked_up, 1, "only Redis may know it now");
    world_free(w);
}

Test(resume, an_error_is_told_again)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta_error(w, "w1", epoch, request, "CONTEXT_TOO_LONG", "too long");
    lose(w, "c1");
    resume(w, "c2", "a", "");
    expect_resumed(w, "c2");
    expect_error(w, "c2", "CONTEXT_TOO_LONG");
    world_free(w);
}

Test(resume, is_only_for_the_tenant)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "tenant", "\"acme\"", NULL);
    lose(w, "c1");
    resume(w, "c2", "a", "");
    cr_assert(world_is_silent(w, "c2"));
    cr_assert_eq(w->n_looked_up, 1);
    resume(w, "c2", "a", ",\"tenant\":\"acme\"");
    expect_resumed(w, "c2");
    world_free(w);
}

Test(resume, of_an_id_that_several_have_is_refused)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "1", NULL, NULL);
    world_submit(w, "c2", "1", NULL, NULL);
    resume(w, "c3", "1", "");
    expect_error(w, "c3", "BAD_REQUEST");
    lose(w, "c2");
    resume(w, "c3", "1", "");
    expect_resumed(w, "c3");
    world_free(w);
}

Test(resume, what_is_kept_for_clients_that_are_away_is_bounded)
{
    qv_core_options options = qv_core_default_options();
    options.max_kept_bytes = 20000;
    world *w = world_new(&options);
    char client[16];
    for (int i = 0; i < 100; i++) {
        snprintf(client, sizeof client, "c%d", i);
        world_submit(w, client, client, NULL, NULL);
        lose(w, client);
    }
    cr_assert_leq(qv_core_requests(w->core)->bytes, 20000);
    cr_assert_gt(count(w), 1);
    resume(w, "x", "c99", "");
    expect_resumed(w, "x");
    world_free(w);
}

Test(resume, a_submit_goes_on_where_another_broker_stopped)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "seed", "7", "resume",
                 "[{\"index\":0,\"seq\":2,\"tokens\":[5,6]}]", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    const qv_msg_run *run = &world_expect(w, "w1", QV_MSG_RUN)->run;
    cr_assert_eq(run->seed, 7);
    cr_assert_eq(run->resume.data[0].seq, 2);
    cr_assert_eq(run->resume.data[0].tokens.data[1], 6);
    world_delta(w, "w1", epoch, run->request, 0, 2, "x", NULL);
    expect_tokens(w, "c1", 0, 2, "x");

    /* And on again, after this worker. */
    qv_mq_peer peer = world_peer("w1");
    qv_core_worker_gone(w->core, &peer, w->now_us);
    world_join(w, "w2", 4, 0, NULL);
    run = &world_expect(w, "w2", QV_MSG_RUN)->run;
    cr_assert_eq(run->resume.data[0].seq, 3);
    cr_assert_eq(run->resume.data[0].tokens.count, 3);
    cr_assert_eq(run->resume.data[0].tokens.data[0], 5);

    /* What only the other broker had is not here. */
    resume(w, "c2", "a", ",\"seq\":0");
    expect_error(w, "c2", "NOT_FOUND");
    world_free(w);
}

Test(resume, of_a_submit_must_make_sense)
{
    static const struct {
        const char *seed, *rows, *durable;
    } cases[] = {
        {"1", "[{\"index\":1,\"seq\":0,\"tokens\":[]}]", NULL},
        {"1", "[{\"index\":0,\"seq\":0,\"tokens\":[]},{\"index\":0,\"seq\":0,\"tokens\":[]}]",
         NULL},
        {"1", "[{\"index\":0,\"seq\":1,\"tokens\":[-4]}]", NULL},
        {"1", "[{\"index\":0,\"seq\":1,\"tokens\":[4],\"finished\":true}]", NULL},
        {"null", "[{\"index\":0,\"seq\":1,\"tokens\":[4]}]", NULL},
        {"1", "[{\"index\":0,\"seq\":1,\"tokens\":[4]}]", "true"},
    };
    world *w = world_new(NULL);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        world_submit(w, "c1", "a", NULL, "seed", cases[i].seed, "resume", cases[i].rows,
                     cases[i].durable ? "durable" : NULL, cases[i].durable, NULL);
        expect_error(w, "c1", "BAD_REQUEST");
        cr_assert_eq(count(w), 0);
    }
    world_free(w);
}

Test(resume, never_mixes_two_versions_of_an_adapter)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, "a:v2");
    world_submit(w, "c1", "x", "a", "seed", "7", "digest", "\"v1\"", "resume",
                 "[{\"index\":0,\"seq\":1,\"tokens\":[5]}]", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    expect_error(w, "c1", "WORKER_LOST");
    world_submit(w, "c1", "y", "a", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "y0", NULL);
    cr_assert(qv_str_equal(world_expect(w, "c1", QV_MSG_TOKENS)->tokens.digest, "v2"));
    resume(w, "c2", "y", ",\"seq\":0,\"digest\":\"v1\"");
    expect_error(w, "c2", "WORKER_LOST");
    resume(w, "c2", "y", ",\"seq\":0,\"digest\":\"v2\"");
    expect_resumed(w, "c2");
    world_free(w);
}

/* --- Durable ----------------------------------------------------------------------------------*/

static void stored(world *w, qv_stored how, const char *detail)
{
    qv_core_stored(w->core, &w->stored, how, qv_str_from(detail), w->now_us);
}

Test(durable, is_accepted_when_redis_has_it_and_not_before)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "durable", "true", NULL);
    cr_assert_eq(w->n_stored, 1);
    cr_assert(world_is_silent(w, "c1"));
    cr_assert(world_is_silent(w, "w1"), "nothing runs that is not stored");
    stored(w, QV_STORED_NEW, "");
    cr_assert_eq(world_expect(w, "c1", QV_MSG_ACCEPTED)->accepted.seed, w->stored.seed);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "x", "stop");
    expect_tokens(w, "c1", 0, 0, "x");
    expect_done(w, "c1", 1, "stop");
    cr_assert_eq(w->n_finished, 1);
    cr_assert_not_null(w->answer.data);
    world_free(w);
}

Test(durable, that_redis_does_not_confirm_fails_and_is_taken_back_when_it_comes)
{
    qv_core_options options = qv_core_default_options();
    options.resume_ms = 0;
    world *w = world_new(&options);
    world_submit(w, "c1", "a", NULL, "durable", "true", NULL);
    world_pass(w, 5100);
    expect_error(w, "c1", "OVERLOADED");
    cr_assert_eq(count(w), 0);
    w->n_finished = 0;
    stored(w, QV_STORED_NEW, "");
    cr_assert_eq(w->n_finished, 1);
    cr_assert_null(w->answer.data);
    world_free(w);
}

Test(durable, without_redis_is_refused)
{
    world *w = world_new(NULL);
    w->store_reply = QV_ERR_BUSY;
    world_submit(w, "c1", "a", NULL, "durable", "true", NULL);
    expect_error(w, "c1", "OVERLOADED");
    w->store_reply = QV_ERR_UNSUPPORTED;
    world_submit(w, "c1", "b", NULL, "durable", "true", NULL);
    expect_error(w, "c1", "BAD_REQUEST");
    cr_assert_eq(count(w), 0);
    cr_assert_eq(w->n_finished, 0);
    world_free(w);
}

Test(durable, runs_on_without_its_client_and_is_told_to_whoever_submits_it_again)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "durable", "true", NULL);
    stored(w, QV_STORED_NEW, "");
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    lose(w, "c1");
    world_delta(w, "w1", epoch, request, 0, 0, "x0", NULL);
    world_submit(w, "c2", "a", NULL, "durable", "true", NULL);
    expect_resumed(w, "c2");
    expect_tokens(w, "c2", 0, 0, "x0");
    world_delta(w, "w1", epoch, request, 0, 1, "x1", "stop");
    expect_tokens(w, "c2", 0, 1, "x1");
    expect_done(w, "c2", 2, "stop");
    world_submit(w, "c3", "a", NULL, "durable", "true", NULL);
    expect_resumed(w, "c3");
    expect_tokens(w, "c3", 0, 0, "x0");
    expect_tokens(w, "c3", 0, 1, "x1");
    expect_done(w, "c3", 2, "stop");
    cr_assert_eq(w->n_stored, 1, "it is one request");
    cr_assert_eq(qv_core_get_stats(w->core)->dispatched, 1);
    world_free(w);
}

Test(durable, the_same_id_elsewhere_in_redis_is_that_request)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "a", NULL, "durable", "true", NULL);
    stored(w, QV_STORED_ELSEWHERE, "tcp://other:1");
    const qv_msg_error *error = &world_expect(w, "c1", QV_MSG_ERROR)->error;
    cr_assert(qv_str_equal(error->code, "NOT_FOUND"));
    cr_assert(qv_str_equal(error->broker, "tcp://other:1"));
    cr_assert_eq(count(w), 0);
    world_submit(w, "c1", "a", NULL, "durable", "true", NULL);
    stored(w, QV_STORED_LOST, "");
    cr_assert_gt(world_expect(w, "c1", QV_MSG_ERROR)->error.retry_after_ms, 0);
    cr_assert_eq(count(w), 0);
    world_free(w);
}

/* Make a stored answer: "x0", "x1", done. */
static void make_answer(world *w)
{
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "durable", "true", "logprobs", "0", NULL);
    stored(w, QV_STORED_NEW, "");
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "x0", NULL);
    world_delta(w, "w1", epoch, request, 0, 1, "x1", "stop");
    cr_assert_eq(w->n_finished, 1);
}

Test(durable, an_answer_in_redis_is_told_from_where_the_client_wants_it)
{
    world *w = world_new(NULL);
    make_answer(w);
    qv_msg_resume_request request = {.id = qv_str_from("a"), .seq = 0};
    qv_mq_peer peer = world_peer("c9");
    world *other = world_new(NULL); /* a broker that never ran it */
    qv_core_looked_up(other->core, &peer, &request, QV_STORED_FINISHED, w->answer, w->now_us);
    expect_resumed(other, "c9");
    expect_tokens(other, "c9", 0, 1, "x1");
    expect_done(other, "c9", 2, "stop");
    cr_assert(world_is_silent(other, "c9"));

    /* Bytes that are no answer hurt nobody. */
    qv_core_looked_up(other->core, &peer, &request, QV_STORED_FINISHED, qv_str_from("\x93zz"),
                      w->now_us);
    expect_resumed(other, "c9");
    expect_error(other, "c9", "INTERNAL");
    qv_core_looked_up(other->core, &peer, &request, QV_STORED_NONE, (qv_str){0}, w->now_us);
    expect_error(other, "c9", "NOT_FOUND");
    world_free(other);
    world_free(w);
}

Test(durable, after_a_restart_runs_again_with_its_seed_and_the_same_numbers)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "durable", "true", NULL);
    stored(w, QV_STORED_NEW, "");

    world *other = world_new(NULL);
    uint64_t epoch = world_join(other, "w1", 4, 0, NULL);
    cr_assert_eq(qv_core_adopt(other->core, &w->stored, 1000, other->now_us), QV_OK);
    cr_assert_eq(qv_core_adopt(other->core, &w->stored, 1000, other->now_us), QV_OK, "once only");
    cr_assert_eq(count(other), 1);
    const qv_msg_run *run = &world_expect(other, "w1", QV_MSG_RUN)->run;
    cr_assert_eq(run->seed, w->stored.seed);
    world_delta(other, "w1", epoch, run->request, 0, 0, "x0", NULL);

    /* The client has three pieces from the broker before. */
    resume(other, "c1", "a", ",\"seq\":2");
    expect_resumed(other, "c1");
    world_delta(other, "w1", epoch, run->request, 0, 1, "x1", NULL);
    world_delta(other, "w1", epoch, run->request, 0, 2, "x2", NULL);
    cr_assert(world_is_silent(other, "c1"), "it has these");
    world_delta(other, "w1", epoch, run->request, 0, 3, "x3", "stop");
    expect_tokens(other, "c1", 0, 3, "x3");
    expect_done(other, "c1", 4, "stop");
    world_free(other);
    world_free(w);
}

Test(durable, pieces_are_never_joined_so_that_numbers_stay_the_same)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "durable", "true", NULL);
    stored(w, QV_STORED_NEW, "");
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_set_reply(w, "c1", QV_ERR_BUSY);
    for (int i = 0; i < 3; i++)
        world_delta(w, "w1", epoch, request, 0, i, "x", NULL);
    world_set_reply(w, "c1", QV_OK);
    world_pass(w, 10);
    for (int i = 0; i < 3; i++)
        expect_tokens(w, "c1", 0, i, "x");
    world_free(w);
}

Test(durable, survives_that_its_broker_stops)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "a", NULL, "durable", "true", NULL);
    stored(w, QV_STORED_NEW, "");
    world_submit(w, "c1", "b", NULL, NULL);
    qv_core_fail_all(w->core, w->now_us);
    cr_assert_eq(w->n_finished, 0);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    expect_error(w, "c1", "OVERLOADED");
    cr_assert(world_is_silent(w, "c1"));
    world_free(w);
}

/* --- Poison -----------------------------------------------------------------------------------*/

static void kill_worker(world *w, const char *name)
{
    qv_mq_peer peer = world_peer(name);
    qv_core_worker_gone(w->core, &peer, w->now_us);
    world_check(w);
}

Test(poison, a_request_that_killed_two_workers_is_quarantined_until_it_is_cleared)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_join(w, "w1", 4, 0, NULL);
    world_expect(w, "w1", QV_MSG_RUN);
    kill_worker(w, "w1");
    cr_assert_eq(count(w), 1);
    world_join(w, "w2", 4, 0, NULL);
    world_expect(w, "w2", QV_MSG_RUN);
    kill_worker(w, "w2");
    expect_error(w, "c1", "QUARANTINED");
    cr_assert_eq(count(w), 0);
    cr_assert_eq(w->n_quarantined, 1);

    world_join(w, "w3", 4, 0, NULL);
    world_submit(w, "c2", "again", NULL, "seed", "5", "priority", "3", NULL);
    expect_error(w, "c2", "QUARANTINED");
    world_submit(w, "c2", "other", NULL, "max_tokens", "3", NULL);
    world_expect(w, "c2", QV_MSG_ACCEPTED);
    world_expect(w, "w3", QV_MSG_RUN);
    qv_core_poison(w->core, w->fingerprint, false, w->now_us);
    world_submit(w, "c2", "again", NULL, NULL);
    world_expect(w, "c2", QV_MSG_ACCEPTED);
    world_free(w);
}

/* A process registers as this worker. */
static void join_as(world *w, const char *worker, int64_t instance)
{
    w->instance = instance;
    world_join(w, worker, 4, 0, NULL);
}

Test(poison, a_request_is_not_blamed_for_workers_that_turn_out_to_live)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    join_as(w, "w1", 71);
    world_expect(w, "w1", QV_MSG_RUN);
    kill_worker(w, "w1"); /* the network, in truth */
    join_as(w, "w2", 72);
    world_expect(w, "w2", QV_MSG_RUN);
    join_as(w, "w1", 71);
    cr_assert_not_null(strstr(w->events, "worker_alive - w1"), "%s", w->events);
    kill_worker(w, "w2");
    cr_assert_eq(count(w), 1, "it has lost one worker, not two");
    world_expect(w, "w1", QV_MSG_RUN);
    join_as(w, "w2", 73); /* another process: this one was dead */
    kill_worker(w, "w1");
    expect_error(w, "c1", "QUARANTINED");
    world_free(w);
}

Test(poison, a_process_that_opens_another_session_was_not_killed)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    for (int i = 0; i < 5; i++) {
        join_as(w, "w1", 71);
        world_expect(w, "w1", QV_MSG_RUN);
    }
    cr_assert_eq(count(w), 1);
    for (int i = 0; i < 2; i++) { /* a restart under the same id is a death */
        join_as(w, "w1", 80 + i);
        if (i == 0)
            world_expect(w, "w1", QV_MSG_RUN);
    }
    expect_error(w, "c1", "QUARANTINED");
    world_free(w);
}

Test(poison, a_request_that_hangs_workers_for_a_while_is_found_too)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    int n = 0;
    for (; count(w) == 1 && n < 100; n++) {
        join_as(w, "w1", 71);
        world_expect(w, "w1", QV_MSG_RUN);
        kill_worker(w, "w1");
    }
    expect_error(w, "c1", "QUARANTINED");
    cr_assert_eq(n, 10);
    world_free(w);
}

Test(poison, requests_that_share_the_blame_run_apart_until_one_is_it)
{
    world *w = world_new(NULL);
    static const char *const ids[] = {"1", "2", "3"};
    for (int i = 0; i < 3; i++) {
        world_submit(w, "c1", ids[i], NULL, "max_tokens", ids[i], NULL);
        world_expect(w, "c1", QV_MSG_ACCEPTED);
    }
    world_join(w, "w1", 4, 0, NULL);
    kill_worker(w, "w1");
    world_join(w, "w2", 4, 0, NULL);
    kill_worker(w, "w2");
    cr_assert_eq(count(w), 3, "nobody knows which one it was");
    uint64_t epoch = world_join(w, "w3", 4, 0, NULL);
    cr_assert_eq(qv_core_requests(w->core)->n_running, 1);
    world_join(w, "w4", 4, 0, NULL);
    cr_assert_eq(qv_core_requests(w->core)->n_running, 2, "one suspect a worker");
    kill_worker(w, "w4");
    expect_error(w, "c1", "QUARANTINED");
    uint64_t request = world_expect(w, "w3", QV_MSG_RUN)->run.request;
    world_delta(w, "w3", epoch, request, 0, 0, "x", "stop");
    world_expect(w, "w3", QV_MSG_RUN);
    cr_assert_eq(count(w), 1);
    world_free(w);
}

/* --- Rights -----------------------------------------------------------------------------------*/

Test(rights, a_key_speaks_for_its_tenant_and_does_what_it_may)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 0, NULL);
    const qv_identity acme = {.tenant = "acme", .submit = true};
    const qv_identity zeta = {.tenant = "zeta", .submit = true};
    const qv_identity boss = {.tenant = "", .operate = true};
    qv_core_set_sender(w->core, &acme);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_submit(w, "c1", "b", NULL, "tenant", "\"zeta\"", NULL);
    expect_error(w, "c1", "UNAUTHORIZED");
    world_client_json(w, "c1", "{\"type\":\"status\"}");
    expect_error(w, "c1", "UNAUTHORIZED");
    qv_core_set_sender(w->core, &zeta);
    world_cancel(w, "c2", "a");
    expect_error(w, "c2", "BAD_REQUEST");
    resume(w, "c2", "a", "");
    cr_assert_eq(w->n_looked_up, 1, "it is another tenant's");
    resume(w, "c2", "a", ",\"tenant\":\"acme\"");
    expect_error(w, "c2", "UNAUTHORIZED");
    qv_core_set_sender(w->core, &boss);
    world_submit(w, "c3", "c", NULL, NULL);
    expect_error(w, "c3", "UNAUTHORIZED");
    world_client_json(w, "c3", "{\"type\":\"status\"}");
    world_expect(w, "c3", QV_MSG_STATUS);
    world_cancel(w, "c3", "a");
    world_expect(w, "c3", QV_MSG_CANCELLED);
    cr_assert_eq(qv_core_get_stats(w->core)->unauthorized, 4);
    world_free(w);
}

/* --- Time in which the broker does not run ----------------------------------------------------*/

/* It hears those who spoke meanwhile before it looks at the clock: they were once taken for silent,
 * for the time of the pause was added to when they were heard and came to lie in the future. */
Test(pause, of_the_broker_is_no_silence_of_workers)
{
    for (int64_t pause_ms = 500; pause_ms <= 60000; pause_ms *= 5) {
        world *w = world_new(NULL);
        uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
        world_join(w, "w2", 4, 2, NULL);
        world_pass(w, 100);
        w->now_us += (uint64_t)pause_ms * 1000; /* without a tick */
        world_beat(w, "w1", e1, false);
        world_pass(w, 1000);
        const qv_pool *pool = qv_core_pool(w->core);
        cr_assert_not_null(qv_pool_find_id(pool, "w1"), "w1 after %lld ms", (long long)pause_ms);
        cr_assert_not_null(qv_pool_find_id(pool, "w2"), "w2 after %lld ms", (long long)pause_ms);
        cr_assert_eq(qv_core_get_stats(w->core)->workers_lost, 0);
        world_free(w);
    }
}
