/* The life of a request: every edge of its states, and each way that it can go. */
#include "broker/requests.h"
#include "tests/broker/world.h"

#include <criterion/criterion.h>
#include <string.h>

#define STR(s) (int)(s).size, (s).data

static bool contains(qv_str text, const char *part)
{
    return memmem(text.data, text.size, part, strlen(part)) != NULL;
}

static const qv_msg_error *expect_error(world *w, const char *client, const char *code)
{
    const qv_msg_error *error = &world_expect(w, client, QV_MSG_ERROR)->error;
    cr_assert(qv_str_equal(error->code, code), "%.*s: %.*s", STR(error->code), STR(error->message));
    return error;
}

static const qv_msg_done *expect_done(world *w, const char *client, int64_t seq, const char *reason)
{
    const qv_msg_done *done = &world_expect(w, client, QV_MSG_DONE)->done;
    cr_assert(qv_str_equal(done->finish_reason, reason), "%.*s", STR(done->finish_reason));
    cr_assert_eq(done->seq, seq);
    return done;
}

static const qv_msg_tokens *expect_tokens(world *w, const char *client, int64_t index, int64_t seq,
                                          const char *text)
{
    const qv_msg_tokens *tokens = &world_expect(w, client, QV_MSG_TOKENS)->tokens;
    cr_assert_eq(tokens->index, index);
    cr_assert_eq(tokens->seq, seq, "seq %lld, not %lld", (long long)tokens->seq, (long long)seq);
    cr_assert(qv_str_equal(tokens->text, text), "'%.*s'", STR(tokens->text));
    return tokens;
}

/* --- The table --------------------------------------------------------------------------------*/

#define Q QV_JOB_QUEUED
#define X QV_JOB_DISPATCHED
#define S QV_JOB_STREAMING
#define D QV_JOB_DONE
#define F QV_JOB_FAILED
#define C QV_JOB_CANCELLED
#define P QV_JOB_PARKED

Test(job, every_edge_of_the_transition_table)
{
    static const struct {
        qv_job_state from;
        qv_job_event event;
        qv_job_state to;
    } edges[] = {
        {Q, QV_JOB_DISPATCH, X}, {Q, QV_JOB_FINISH, D},   {Q, QV_JOB_CANCEL, C},
        {Q, QV_JOB_FAIL, F},     {X, QV_JOB_PROGRESS, S}, {X, QV_JOB_REQUEUE, Q},
        {X, QV_JOB_FINISH, D},   {X, QV_JOB_CANCEL, C},   {X, QV_JOB_FAIL, F},
        {S, QV_JOB_PROGRESS, S}, {S, QV_JOB_REQUEUE, Q},  {S, QV_JOB_FINISH, D},
        {S, QV_JOB_CANCEL, C},   {S, QV_JOB_FAIL, F},     {Q, QV_JOB_PARK, P},
        {X, QV_JOB_PARK, P},     {S, QV_JOB_PARK, P},     {P, QV_JOB_UNPARK, Q},
        {P, QV_JOB_FINISH, D},   {P, QV_JOB_CANCEL, C},   {P, QV_JOB_FAIL, F},
    };
    size_t n = 0;
    for (qv_job_state from = 0; from < QV_JOB_STATE_COUNT; from++) {
        for (qv_job_event event = 0; event < QV_JOB_EVENT_COUNT; event++) {
            qv_job_state to = QV_JOB_STATE_COUNT, want = QV_JOB_STATE_COUNT;
            for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++)
                if (edges[i].from == from && edges[i].event == event)
                    want = edges[i].to;
            n += qv_job_next(from, event, &to);
            cr_expect_eq(to, want, "%s, event %d", qv_job_state_name(from), event);
        }
    }
    cr_assert_eq(n, sizeof edges / sizeof edges[0]);
}

/* --- The straight way -------------------------------------------------------------------------*/

Test(request, is_accepted_run_streamed_and_done)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, "french:d1");
    world_submit(w, "c1", "a", "french", "seed", "77", NULL);
    const qv_msg_accepted *accepted = &world_expect(w, "c1", QV_MSG_ACCEPTED)->accepted;
    cr_assert(qv_str_equal(accepted->id, "a"));
    const qv_msg_run *run = &world_expect(w, "w1", QV_MSG_RUN)->run;
    cr_assert_eq(run->epoch, epoch);
    cr_assert_eq(run->seed, 77);
    cr_assert(qv_str_equal(run->digest, "d1"));
    cr_assert(!qv_has(run, run, resume));

    /* The worker gets the submit as the client wrote it. */
    qv_message submit;
    cr_assert_eq(qv_message_decode(run->submit.data, run->submit.size, QV_FROM_CLIENT, NULL,
                                   &w->arena, &submit),
                 QV_OK);
    cr_assert(qv_str_equal(submit.submit.prompt, "hello"));

    world_pass(w, 20);
    world_delta(w, "w1", epoch, run->request, 0, 0, "Bon", NULL);
    world_delta(w, "w1", epoch, run->request, 0, 1, "jour", NULL);
    world_delta(w, "w1", epoch, run->request, 0, 2, NULL, "stop");
    cr_assert_eq(expect_tokens(w, "c1", 0, 0, "Bon")->tokens.count, 1);
    expect_tokens(w, "c1", 0, 1, "jour");
    const qv_msg_done *done = expect_done(w, "c1", 2, "stop");
    cr_assert(qv_str_equal(done->worker, "w1"));
    cr_assert(qv_str_equal(done->adapter, "french"));
    cr_assert_eq(done->usage.prompt_tokens, 3);
    cr_assert_eq(done->timing.queue_ms, 0);
    cr_assert_eq(done->timing.first_token_ms, 20);
    cr_assert(!qv_has(done, done, text));
    cr_assert(world_is_silent(w, "c1") && world_is_silent(w, "w1"));
    cr_assert_eq(qv_core_n_jobs(w->core), 0);
    cr_assert_eq(qv_core_pool(w->core)->free_credit, 4);
    world_free(w);
}

Test(request, tokens_and_end_in_one_delta_are_two_messages)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "all", "length");
    expect_tokens(w, "c1", 0, 0, "all");
    expect_done(w, "c1", 1, "length");
    world_free(w);
}

Test(request, without_stream_gets_the_whole_answer_in_its_done)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, "stream", "false", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "one ", NULL);
    world_delta(w, "w1", epoch, request, 0, 1, "two", "stop");
    const qv_msg_done *done = expect_done(w, "c1", 0, "stop");
    cr_assert(qv_str_equal(done->text, "one two"));
    cr_assert_eq(done->tokens.count, 2);
    cr_assert_eq(done->tokens.data[1], 101);
    world_free(w);
}

Test(request, with_n_ends_when_all_its_streams_have_ended)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, "n", "3", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 2, 0, "c", "stop");
    world_delta(w, "w1", epoch, request, 0, 0, "a", NULL);
    world_delta(w, "w1", epoch, request, 1, 0, NULL, "length");
    expect_tokens(w, "c1", 2, 0, "c");
    cr_assert_eq(expect_done(w, "c1", 1, "stop")->index, 2);
    expect_tokens(w, "c1", 0, 0, "a");
    cr_assert_eq(expect_done(w, "c1", 0, "length")->index, 1);
    cr_assert_eq(qv_core_n_jobs(w->core), 1);
    world_delta(w, "w1", epoch, request, 0, 1, "b", "stop");
    expect_tokens(w, "c1", 0, 1, "b");
    expect_done(w, "c1", 2, "stop");
    cr_assert_eq(qv_core_n_jobs(w->core), 0);
    world_free(w);
}

Test(request, draws_a_seed_when_the_client_has_none)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_submit(w, "c1", "b", NULL, NULL);
    uint64_t a = world_expect(w, "w1", QV_MSG_RUN)->run.seed;
    uint64_t b = world_expect(w, "w1", QV_MSG_RUN)->run.seed;
    cr_assert_neq(a, b);
    world_free(w);
}

Test(request, keeps_prompt_logprobs_until_the_end)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, "prompt_logprobs", "1", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    double values[] = {-0.5, -1.5};
    uint32_t start[] = {0, 1, 3};
    int32_t token[] = {7, 8, 9};
    double logprob[] = {-0.1, -0.2, -0.3};
    qv_msg_delta delta = {.request = request};
    qv_set(&delta, delta, seq, 0);
    qv_set(&delta, delta, prompt_logprobs, ((qv_reals){values, 2}));
    qv_set(&delta, delta, prompt_top_logprobs, ((qv_tops){2, start, token, logprob}));
    qv_message step;
    qv_message_init(&step, QV_MSG_STEP);
    step.step.epoch = epoch;
    step.step.deltas.data = &delta;
    step.step.deltas.count = 1;
    world_worker_message(w, "w1", &step);
    world_delta(w, "w1", epoch, request, 0, 0, "x", "stop");
    expect_tokens(w, "c1", 0, 0, "x");
    const qv_msg_done *done = expect_done(w, "c1", 1, "stop");
    cr_assert_eq(done->prompt_logprobs.count, 2);
    cr_assert_eq(done->prompt_logprobs.data[1], -1.5);
    cr_assert_eq(done->prompt_top_logprobs.count, 2);
    cr_assert_eq(done->prompt_top_logprobs.token[2], 9);
    world_free(w);
}

Test(request, unknown_keys_are_named)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, "temprature", "0.5", NULL);
    const qv_msg_accepted *accepted = &world_expect(w, "c1", QV_MSG_ACCEPTED)->accepted;
    cr_assert_eq(accepted->warnings.count, 1);
    cr_assert(contains(accepted->warnings.data[0], "temprature"));

    /* A REQ socket sees no `accepted`: its `done` says it. */
    world_submit(w, "req1", "a", NULL, "temprature", "0.5", NULL);
    world_expect(w, "w1", QV_MSG_RUN);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "x", "stop");
    const qv_msg_done *done = expect_done(w, "req1", 0, "stop");
    cr_assert_eq(done->warnings.count, 1);
    cr_assert(contains(done->warnings.data[0], "temprature"));
    world_free(w);
}

/* --- REQ clients ------------------------------------------------------------------------------*/

Test(request, of_a_req_socket_gets_exactly_one_reply)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "req1", "a", NULL, NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    cr_assert(world_is_silent(w, "req1"));
    world_delta(w, "w1", epoch, request, 0, 0, "hi", "stop");
    cr_assert(qv_str_equal(expect_done(w, "req1", 0, "stop")->text, "hi"));
    cr_assert(world_is_silent(w, "req1"));

    world_submit(w, "req1", "b", NULL, "n", "2", NULL);
    cr_assert(contains(expect_error(w, "req1", "BAD_REQUEST")->message, "REQ"));
    world_submit(w, "req1", "c", "nosuch", NULL);
    expect_error(w, "req1", "ADAPTER_NOT_FOUND");
    world_client_json(w, "req1", "{\"type\":\"status\"}");
    world_expect(w, "req1", QV_MSG_STATUS);
    cr_assert(world_is_silent(w, "req1"));
    world_free(w);
}

Test(request, with_a_delimiter_streams_when_it_says_so)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "req1", "a", NULL, "stream", "true", NULL);
    world_expect(w, "req1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "hi", "stop");
    expect_tokens(w, "req1", 0, 0, "hi");
    expect_done(w, "req1", 1, "stop");
    world_free(w);
}

/* --- Bad input --------------------------------------------------------------------------------*/

Test(request, bad_ones_are_refused_with_the_reason)
{
    static const struct {
        const char *json, *code, *part;
    } rows[] = {
        {"{\"type\":\"submit\",\"id\":\"a\"}", "BAD_REQUEST", "prompt"},
        {"{\"type\":\"submit\",\"prompt\":\"x\"}", "BAD_REQUEST", "id"},
        {"{\"type\":\"submit\",\"id\":\"\",\"prompt\":\"x\"}", "BAD_REQUEST", "id"},
        {"{\"type\":\"submit\",\"id\":7,\"prompt\":\"x\"}", "BAD_REQUEST", "id"},
        {"{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"x\",\"n\":65}", "BAD_REQUEST", "n"},
        {"{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"x\",\"tokens\":[1]}", "BAD_REQUEST",
         "tokens"},
        {"{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"x\",\"temperature\":-1}", "BAD_REQUEST",
         "temperature"},
        {"{\"type\":\"submit\",\"id\":\"a\",\"prompt\":\"x\",\"adapter\":\"nosuch\"}",
         "ADAPTER_NOT_FOUND", "nosuch"},
        {"{\"type\":\"cancel\",\"id\":\"zzz\"}", "BAD_REQUEST", "zzz"},
        {"{\"type\":\"dance\"}", "BAD_REQUEST", "dance"},
        {"{\"type\":\"ready\"}", "BAD_REQUEST", "ready"},
        {"{\"id\":\"a\"}", "BAD_REQUEST", "type"},
        {"[1,2]", "BAD_REQUEST", "map"},
    };
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 2, NULL);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        world_client_json(w, "c1", rows[i].json);
        const qv_msg_error *error = expect_error(w, "c1", rows[i].code);
        cr_expect(contains(error->message, rows[i].part), "%s: %.*s", rows[i].json,
                  STR(error->message));
        cr_expect(world_is_silent(w, "c1"), "%s", rows[i].json);
    }
    world_client_bytes(w, "c1", "", 0);
    expect_error(w, "c1", "BAD_REQUEST");
    world_client_bytes(w, "c1", "\xdd\xff\xff\xff\xff", 5);
    cr_assert_not_null(world_take(w, "c1"));
    cr_assert(world_is_silent(w, "w1"));
    world_free(w);
}

Test(request, an_error_names_the_request_where_its_id_can_be_read)
{
    world *w = world_new(NULL);
    world_client_json(w, "c1", "{\"type\":\"submit\",\"id\":\"a\",\"prompt\":7}");
    cr_assert(qv_str_equal(expect_error(w, "c1", "BAD_REQUEST")->id, "a"));
    world_free(w);
}

Test(request, an_id_in_flight_is_refused_for_the_same_client_only)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_submit(w, "c2", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    cr_assert(contains(expect_error(w, "c1", "BAD_REQUEST")->message, "in flight"));
    world_expect(w, "c2", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_expect(w, "w1", QV_MSG_RUN);
    world_delta(w, "w1", epoch, request, 0, 0, "x", "stop");
    expect_tokens(w, "c1", 0, 0, "x");
    expect_done(w, "c1", 1, "stop");
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_free(w);
}

/* --- Limits -----------------------------------------------------------------------------------*/

Test(request, beyond_a_limit_is_refused_with_a_hint_when_to_retry)
{
    static const struct {
        size_t field;
        int64_t value;
        const char *adapter, *part;
    } rows[] = {
        {offsetof(qv_requests_limits, max_queued), 2, NULL, "queue is full"},
        {offsetof(qv_requests_limits, max_queued_per_adapter), 2, NULL, "base model"},
        {offsetof(qv_requests_limits, max_queued_per_adapter), 2, "french", "french"},
        {offsetof(qv_requests_limits, max_client_requests), 2, NULL, "in flight"},
        {offsetof(qv_requests_limits, max_client_bytes), 2600, NULL, "bytes"},
        {offsetof(qv_requests_limits, max_bytes), 2600, NULL, "bytes"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        qv_core_options options = qv_core_default_options();
        memcpy((char *)&options.requests + rows[i].field, &rows[i].value, sizeof rows[i].value);
        world *w = world_new(&options);
        world_want(w, "french", "/a/french", 1);
        int n_accepted = 0;
        const qv_message *message = NULL;
        for (int k = 0; k < 10; k++) {
            char id[8];
            snprintf(id, sizeof id, "r%d", k);
            world_submit(w, "c1", id, rows[i].adapter, NULL);
            message = world_take(w, "c1");
            if (message->type != QV_MSG_ACCEPTED)
                break;
            n_accepted++;
        }
        cr_expect(n_accepted >= 1 && n_accepted <= 4, "row %zu: %d accepted", i, n_accepted);
        cr_assert_eq(message->type, QV_MSG_ERROR);
        cr_expect(qv_str_equal(message->error.code, "OVERLOADED"), "row %zu", i);
        cr_expect(contains(message->error.message, rows[i].part), "row %zu: %.*s", i,
                  STR(message->error.message));
        cr_expect_gt(message->error.retry_after_ms, 0);
        world_free(w);
    }
}

Test(request, that_can_never_fit_is_too_large)
{
    qv_core_options options = qv_core_default_options();
    options.requests.max_client_bytes = 100;
    world *w = world_new(&options);
    world_submit(w, "c1", "a", NULL, NULL);
    expect_error(w, "c1", "TOO_LARGE");
    world_free(w);
}

Test(request, a_whole_answer_beyond_the_limit_fails_alone)
{
    qv_core_options options = qv_core_default_options();
    options.requests.max_answer_bytes = 64;
    world *w = world_new(&options);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, "stream", "false", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    for (int seq = 0; seq < 3; seq++)
        world_delta(w, "w1", epoch, request, 0, seq, "twenty bytes of text", NULL);
    expect_error(w, "c1", "TOO_LARGE");
    cr_assert_eq(world_expect(w, "w1", QV_MSG_ABORT)->abort.request, request);
    cr_assert_eq(qv_core_n_jobs(w->core), 0);
    world_free(w);
}

Test(request, while_stopping_is_refused_and_what_runs_ends)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 1, 2, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_submit(w, "c1", "b", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    qv_core_drain(w->core);
    world_submit(w, "c1", "c", NULL, NULL);
    cr_assert_gt(expect_error(w, "c1", "OVERLOADED")->retry_after_ms, 0);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "x", "stop");
    expect_tokens(w, "c1", 0, 0, "x");
    expect_done(w, "c1", 1, "stop");
    qv_core_fail_all(w->core, w->now_us);
    cr_assert(qv_str_equal(expect_error(w, "c1", "OVERLOADED")->id, "b"));
    cr_assert_eq(qv_core_n_jobs(w->core), 0);
    world_free(w);
}

/* --- Time -------------------------------------------------------------------------------------*/

Test(request, that_waits_past_its_deadline_is_refused)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "a", NULL, "deadline_ms", "100", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_pass(w, 90);
    cr_assert(world_is_silent(w, "c1"));
    world_pass(w, 20);
    expect_error(w, "c1", "DEADLINE");
    world_free(w);
}

Test(request, that_runs_past_its_deadline_is_stopped_by_its_worker)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 1, 2, NULL);
    world_submit(w, "c1", "a", NULL, "deadline_ms", "100", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "x", NULL);
    world_pass(w, 110);
    const qv_msg_abort *abort = &world_expect(w, "w1", QV_MSG_ABORT)->abort;
    cr_assert_eq(abort->request, request);
    cr_assert(qv_str_equal(abort->reason, "deadline"));
    world_delta(w, "w1", epoch, request, 0, 1, "y", NULL); /* was under way */
    world_delta(w, "w1", epoch, request, 0, 2, NULL, "deadline");
    expect_tokens(w, "c1", 0, 0, "x");
    expect_tokens(w, "c1", 0, 1, "y");
    expect_done(w, "c1", 2, "deadline");
    cr_assert_eq(qv_core_get_stats(w->core)->finished_deadline, 1);
    world_free(w);
}

Test(request, that_no_worker_takes_fails_after_the_longest_wait)
{
    qv_core_options options = qv_core_default_options();
    options.max_queue_wait_ms = 500;
    world *w = world_new(&options);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_pass(w, 520);
    cr_assert_gt(expect_error(w, "c1", "OVERLOADED")->retry_after_ms, 0);
    world_free(w);
}

/* --- Cancel -----------------------------------------------------------------------------------*/

Test(request, cancelled_in_the_queue_ends_at_once)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "a", NULL, "n", "2", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_cancel(w, "c1", "a");
    cr_assert_eq(expect_done(w, "c1", 0, "cancelled")->index, 0);
    cr_assert_eq(expect_done(w, "c1", 0, "cancelled")->index, 1);
    cr_assert_eq(qv_core_n_jobs(w->core), 0);
    world_join(w, "w1", 4, 0, NULL);
    cr_assert(world_is_silent(w, "w1"));
    world_free(w);
}

Test(request, cancelled_while_it_runs_is_confirmed_by_its_worker)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 1, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "x", NULL);
    expect_tokens(w, "c1", 0, 0, "x");
    world_cancel(w, "c1", "a");
    world_cancel(w, "c1", "a");
    cr_assert(qv_str_equal(world_expect(w, "w1", QV_MSG_ABORT)->abort.reason, "cancelled"));
    cr_assert(world_is_silent(w, "w1"), "one abort is enough");
    cr_assert(world_is_silent(w, "c1"), "the worker has the word");
    world_delta(w, "w1", epoch, request, 0, 1, NULL, "cancelled");
    expect_done(w, "c1", 1, "cancelled");
    cr_assert_eq(qv_core_get_stats(w->core)->ended[QV_JOB_CANCELLED], 1);
    world_free(w);
}

Test(request, cancelled_without_a_word_of_its_worker_is_confirmed_anyway)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 1, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_cancel(w, "c1", "a");
    world_pass(w, 2100);
    expect_done(w, "c1", 0, "cancelled");
    cr_assert_eq(qv_core_n_jobs(w->core), 0);

    /* The worker still runs it for all we know: its room is not given away. */
    world_beat(w, "w1", epoch, false);
    world_submit(w, "c1", "b", NULL, NULL);
    world_expect(w, "w1", QV_MSG_ABORT);
    world_expect(w, "w1", QV_MSG_PING);
    world_take(w, "w1");
    cr_assert(world_is_silent(w, "w1"));
    world_delta(w, "w1", epoch, request, 0, 0, "late", "stop");
    world_expect(w, "w1", QV_MSG_RUN);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    cr_assert(world_is_silent(w, "c1"), "what comes late is not delivered");
    world_free(w);
}

Test(request, that_its_idle_worker_does_not_know_goes_elsewhere_in_the_end)
{
    qv_core_options options = qv_core_default_options();
    options.orphan_timeout_ms = 3000;
    world *w = world_new(&options);
    uint64_t epoch = world_join(w, "w1", 1, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request; /* lost on the way */
    qv_message idle;
    qv_message_init(&idle, QV_MSG_HEARTBEAT);
    idle.heartbeat.epoch = epoch;
    qv_set(&idle.heartbeat, heartbeat, running, 0);
    qv_set(&idle.heartbeat, heartbeat, waiting, 0);
    for (int i = 0; i < 6; i++) {
        world_pass(w, 1000);
        world_worker_message(w, "w1", &idle);
    }
    const qv_message *message = world_take(w, "w1");
    while (message != NULL && message->type != QV_MSG_RUN)
        message = world_take(w, "w1");
    cr_assert_not_null(message);
    cr_assert_neq(message->run.request, request);
    world_free(w);
}

Test(request, an_attempt_that_is_never_confirmed_gives_its_credit_back_in_the_end)
{
    qv_core_options options = qv_core_default_options();
    options.orphan_timeout_ms = 3000;
    world *w = world_new(&options);
    uint64_t epoch = world_join(w, "w1", 1, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_cancel(w, "c1", "a");
    for (int i = 0; i < 6; i++) {
        world_pass(w, 1000);
        world_beat(w, "w1", epoch, false);
    }
    cr_assert_eq(qv_core_pool(w->core)->free_credit, 1);
    cr_assert(strstr(w->events, "attempt_abandoned"));
    world_free(w);
}

Test(request, can_be_cancelled_from_another_connection)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_cancel(w, "c2", "a");
    cr_assert(qv_str_equal(world_expect(w, "c2", QV_MSG_CANCELLED)->cancelled.id, "a"));
    expect_done(w, "c1", 0, "cancelled");

    /* Not when the id does not say which one. */
    world_submit(w, "c1", "b", NULL, NULL);
    world_submit(w, "c3", "b", NULL, NULL);
    world_cancel(w, "c2", "b");
    expect_error(w, "c2", "BAD_REQUEST");
    cr_assert_eq(qv_core_n_jobs(w->core), 2);
    world_free(w);
}

/* --- Lost workers -----------------------------------------------------------------------------*/

Test(request, goes_on_elsewhere_with_no_token_lost_or_repeated)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, "n", "2", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    const qv_msg_run *first = &world_expect(w, "w1", QV_MSG_RUN)->run;
    world_delta(w, "w1", e1, first->request, 0, 0, "a0", NULL);
    world_delta(w, "w1", e1, first->request, 1, 0, "b0", "stop");
    world_delta(w, "w1", e1, first->request, 0, 1, "a1", NULL);
    uint64_t e2 = world_join(w, "w2", 4, 0, NULL);
    world_pass(w, 4000);
    world_beat(w, "w2", e2, false);
    world_pass(w, 2000);
    cr_assert_eq(qv_core_get_stats(w->core)->moved, 1);

    const qv_msg_run *second = &world_expect(w, "w2", QV_MSG_RUN)->run;
    cr_assert_neq(second->request, first->request);
    cr_assert_eq(second->seed, first->seed);
    cr_assert_eq(second->resume.count, 2);
    cr_assert_eq(second->resume.data[0].seq, 2);
    cr_assert_eq(second->resume.data[0].tokens.count, 2);
    cr_assert_eq(second->resume.data[0].tokens.data[1], 101);
    cr_assert(!second->resume.data[0].finished);
    cr_assert(second->resume.data[1].finished);

    world_delta(w, "w1", e1, first->request, 0, 2, "ghost", "stop");
    world_delta(w, "w2", e2, second->request, 0, 1, "again", NULL); /* seen before */
    world_delta(w, "w2", e2, second->request, 0, 2, "a2", "stop");
    expect_tokens(w, "c1", 0, 0, "a0");
    expect_tokens(w, "c1", 1, 0, "b0");
    expect_done(w, "c1", 1, "stop");
    expect_tokens(w, "c1", 0, 1, "a1");
    expect_tokens(w, "c1", 0, 2, "a2");
    expect_done(w, "c1", 3, "stop");
    cr_assert(world_is_silent(w, "c1"));
    world_free(w);
}

Test(request, a_gap_in_the_deltas_moves_it)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "x", NULL);
    world_delta(w, "w1", epoch, request, 0, 2, "z", NULL);
    cr_assert_eq(world_expect(w, "w1", QV_MSG_ABORT)->abort.request, request);
    const qv_msg_run *again = &world_expect(w, "w1", QV_MSG_RUN)->run;
    cr_assert_eq(again->resume.data[0].seq, 1);
    world_delta(w, "w1", epoch, request, 0, 3, "late", "stop");
    world_delta(w, "w1", epoch, again->request, 0, 1, "y", "stop");
    expect_tokens(w, "c1", 0, 0, "x");
    expect_tokens(w, "c1", 0, 1, "y");
    expect_done(w, "c1", 2, "stop");
    world_free(w);
}

Test(request, cancelled_under_a_lost_worker_is_confirmed_at_once)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_cancel(w, "c1", "a");
    world_goodbye(w, "w1", epoch);
    expect_done(w, "c1", 0, "cancelled");
    world_free(w);
}

Test(request, that_its_worker_refuses_is_told_to_the_client)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta_error(w, "w1", epoch, request, "CONTEXT_TOO_LONG", "5000 tokens, 4096 fit");
    cr_assert(contains(expect_error(w, "c1", "CONTEXT_TOO_LONG")->message, "5000"));
    cr_assert_eq(qv_core_pool(w->core)->free_credit, 4);
    world_submit(w, "c1", "b", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta_error(w, "w1", epoch, request, "NO_SUCH_CODE", "?");
    expect_error(w, "c1", "INTERNAL");
    world_free(w);
}

Test(request, a_delta_for_a_stream_that_was_not_asked_for_ends_the_session)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 5, 0, "x", NULL);
    cr_assert(qv_list_is_empty(&qv_core_pool(w->core)->members));
    cr_assert_eq(qv_core_requests(w->core)->n_queued, 1);
    world_free(w);
}

/* --- Clients that are gone or slow ------------------------------------------------------------*/

Test(client, gone_has_its_requests_aborted)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 1, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_submit(w, "c1", "b", NULL, NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_set_reply(w, "c1", QV_ERR_NOT_FOUND);
    world_delta(w, "w1", epoch, request, 0, 0, "x", NULL);
    cr_assert_eq(world_expect(w, "w1", QV_MSG_ABORT)->abort.request, request);
    cr_assert_eq(qv_core_requests(w->core)->n_running, 0);
    cr_assert_eq(qv_core_get_stats(w->core)->clients_lost, 1);
    world_delta(w, "w1", epoch, request, 0, 1, NULL, "cancelled");
    cr_assert_eq(qv_core_pool(w->core)->free_credit, 1);
    world_pass(w, 30000);
    cr_assert_eq(qv_core_n_jobs(w->core), 0, "it did not come back");
    world_free(w);
}

Test(client, slow_gets_its_tokens_joined_and_in_order)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_submit(w, "c1", "b", NULL, "logprobs", "0", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t a = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    uint64_t b = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, a, 0, 0, "0", NULL);
    expect_tokens(w, "c1", 0, 0, "0");
    world_set_reply(w, "c1", QV_ERR_BUSY);
    world_delta(w, "w1", epoch, a, 0, 1, "1", NULL);
    world_delta(w, "w1", epoch, b, 0, 0, "B", NULL);
    world_delta(w, "w1", epoch, a, 0, 2, "2", NULL);
    world_delta(w, "w1", epoch, a, 0, 3, "3", "stop");
    cr_assert_gt(qv_core_spill_bytes(w->core), 0);
    world_set_reply(w, "c1", QV_OK);
    world_pass(w, 10);
    cr_assert_eq(qv_core_spill_bytes(w->core), 0);
    const qv_msg_tokens *joined = expect_tokens(w, "c1", 0, 1, "123");
    cr_assert_eq(joined->tokens.count, 3);
    cr_assert_eq(joined->tokens.data[2], 103);
    expect_tokens(w, "c1", 0, 0, "B");
    expect_done(w, "c1", 2, "stop");
    world_delta(w, "w1", epoch, b, 0, 1, "C", "stop");
    expect_tokens(w, "c1", 0, 1, "C");
    expect_done(w, "c1", 2, "stop");
    world_free(w);
}

Test(client, slow_stops_its_own_streams_only_and_loses_nothing)
{
    qv_core_options options = qv_core_default_options();
    options.max_spill_bytes = 20000;
    world *w = world_new(&options);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_submit(w, "c2", "b", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_expect(w, "c2", QV_MSG_ACCEPTED);
    uint64_t a = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    uint64_t b = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_set_reply(w, "c1", QV_ERR_BUSY);
    char text[101];
    memset(text, 'x', 100);
    text[100] = '\0';
    int seq = 0;
    while (qv_core_requests(w->core)->n_parked == 0 && seq < 1000) {
        world_delta(w, "w1", epoch, a, 0, seq++, text, NULL);
        cr_assert_leq(qv_core_spill_bytes(w->core), 20000);
    }
    cr_assert_lt(seq, 1000);
    cr_assert_gt(seq, 75, "joined tokens cost little more than their text");
    cr_assert_eq(world_expect(w, "w1", QV_MSG_ABORT)->abort.request, a, "the worker is free of it");
    world_delta(w, "w1", epoch, a, 0, seq, "late", NULL); /* was on its way */
    world_delta(w, "w1", epoch, b, 0, 0, "B", "stop");
    expect_tokens(w, "c2", 0, 0, "B");
    expect_done(w, "c2", 1, "stop");

    /* It reads: the request goes on behind what was delivered. */
    world_set_reply(w, "c1", QV_OK);
    world_pass(w, 10);
    const qv_msg_run *again = &world_expect(w, "w1", QV_MSG_RUN)->run;
    cr_assert_eq(again->resume.data[0].seq, seq);
    cr_assert_eq(again->resume.data[0].tokens.count, seq);
    world_delta(w, "w1", epoch, again->request, 0, seq, "end", "stop");
    size_t n_text = 0;
    int64_t next = 0;
    const qv_message *message;
    while ((message = world_take(w, "c1")) != NULL && message->type == QV_MSG_TOKENS) {
        cr_assert_eq(message->tokens.seq, next++);
        n_text += message->tokens.text.size;
    }
    cr_assert_eq(n_text, 100 * (size_t)seq + 3);
    cr_assert(message != NULL && message->type == QV_MSG_DONE);
    world_free(w);
}

/* What a message of this client is on the wire. */
static qv_str encoded(world *w, const qv_message *message)
{
    const void *data;
    size_t size;
    cr_assert_eq(qv_message_encode(message, &w->arena, &data, &size), QV_OK);
    return (qv_str){data, (uint32_t)size};
}

Test(client, what_comes_back_busy_after_it_was_taken_is_sent_later_in_order)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    qv_mq_peer peer = world_peer("c1");
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", epoch, request, 0, 0, "0", NULL);
    world_delta(w, "w1", epoch, request, 0, 1, "1", "stop");

    /* The sender took all three and found out at the end of its batch that there was no room. */
    world_set_reply(w, "c1", QV_ERR_BUSY);
    const qv_message *back;
    while ((back = world_take(w, "c1")) != NULL) {
        qv_str bytes = encoded(w, back);
        qv_core_client_busy(w->core, &peer, bytes.data, bytes.size, w->now_us);
        world_check(w);
    }
    cr_assert_gt(qv_core_spill_bytes(w->core), 0);
    world_set_reply(w, "c1", QV_OK);
    world_pass(w, 10);
    expect_tokens(w, "c1", 0, 0, "0");
    expect_tokens(w, "c1", 0, 1, "1");
    expect_done(w, "c1", 2, "stop");
    cr_assert_eq(qv_core_spill_bytes(w->core), 0);
    world_free(w);
}

Test(client, whose_messages_could_not_be_sent_after_all_is_gone)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 0, NULL);
    qv_mq_peer peer = world_peer("c1"), stranger = world_peer("c2");
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "w1", QV_MSG_RUN);
    qv_core_client_gone(w->core, &stranger, w->now_us);
    cr_assert_eq(qv_core_n_jobs(w->core), 1);
    qv_core_client_gone(w->core, &peer, w->now_us);
    world_expect(w, "w1", QV_MSG_ABORT);
    cr_assert_eq(qv_core_requests(w->core)->n_running, 0);
    qv_mq_peer worker = world_peer("w1");
    qv_core_worker_gone(w->core, &worker, w->now_us);
    world_check(w);
    cr_assert(qv_list_is_empty(&qv_core_pool(w->core)->members));
    world_free(w);
}

Test(client, that_takes_nothing_for_long_is_given_up)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_set_reply(w, "c1", QV_ERR_BUSY);
    world_delta(w, "w1", epoch, request, 0, 0, "x", NULL);
    for (int i = 0; i < 61; i++) {
        world_beat(w, "w1", epoch, false);
        world_pass(w, 1000);
    }
    cr_assert_eq(qv_core_n_jobs(w->core), 0);
    cr_assert_gt(qv_core_spill_bytes(w->core), 0, "the error waits for it");
    world_set_reply(w, "c1", QV_OK);
    world_pass(w, 10);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    expect_error(w, "c1", "OVERLOADED");
    cr_assert(world_is_silent(w, "c1"), "and nothing else does");
    cr_assert_eq(qv_core_spill_bytes(w->core), 0);
    world_free(w);
}

Test(client, that_does_not_even_read_the_error_is_given_up)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_set_reply(w, "c1", QV_ERR_BUSY);
    world_delta(w, "w1", epoch, request, 0, 0, "x", NULL);
    for (int i = 0; i < 122; i++) {
        world_beat(w, "w1", epoch, false);
        world_pass(w, 1000);
    }
    cr_assert_eq(qv_core_spill_bytes(w->core), 0);
    world_free(w);
}

Test(client, that_asks_without_reading_costs_a_bounded_spill)
{
    qv_core_options options = qv_core_default_options();
    options.max_spill_bytes = 10000;
    world *w = world_new(&options);
    world_set_reply(w, "c1", QV_ERR_BUSY);
    for (int i = 0; i < 1000; i++)
        world_client_json(w, "c1", "{\"type\":\"status\"}");
    cr_assert_leq(qv_core_spill_bytes(w->core), 10000);
    world_free(w);
}

/* --- Order ------------------------------------------------------------------------------------*/

Test(queue, goes_by_priority_then_arrival_and_a_moved_request_keeps_its_place)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 1, 0, NULL);
    world_submit(w, "c1", "moved", NULL, NULL);
    world_submit(w, "c1", "low", NULL, "priority", "-1", NULL);
    world_submit(w, "c1", "first", NULL, NULL);
    world_submit(w, "c1", "second", NULL, NULL);
    world_submit(w, "c1", "high", NULL, "priority", "5", NULL);
    world_goodbye(w, "w1", epoch);
    epoch = world_join(w, "w2", 1, 0, NULL);
    static const char *const order[] = {"high", "moved", "first", "second", "low"};
    for (size_t i = 0; i < 5; i++) {
        const qv_msg_run *run = &world_expect(w, "w2", QV_MSG_RUN)->run;
        cr_assert(contains(run->submit, order[i]), "place %zu is not %s", i, order[i]);
        world_delta(w, "w2", epoch, run->request, 0, 0, "x", "stop");
    }
    world_free(w);
}
