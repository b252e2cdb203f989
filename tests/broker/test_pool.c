/* Workers as the broker sees them: every edge of their states, sessions, liveness, credit. */
#include "broker/pool.h"
#include "tests/broker/world.h"

#include <criterion/criterion.h>
#include <string.h>

/* --- The table --------------------------------------------------------------------------------*/

#define J QV_MEMBER_JOINING
#define R QV_MEMBER_READY
#define S QV_MEMBER_SUSPECT
#define D QV_MEMBER_DRAINING
#define G QV_MEMBER_GONE

Test(member, every_edge_of_the_transition_table)
{
    static const struct {
        qv_member_state from;
        qv_member_event event;
        qv_member_state to;
    } edges[] = {
        {J, QV_MEMBER_WELCOMED, R}, {J, QV_MEMBER_LOST, G}, {R, QV_MEMBER_QUIET, S},
        {R, QV_MEMBER_DRAINS, D},   {R, QV_MEMBER_LOST, G}, {S, QV_MEMBER_HEARD, R},
        {S, QV_MEMBER_DRAINS, D},   {S, QV_MEMBER_LOST, G}, {D, QV_MEMBER_RESUMES, R},
        {D, QV_MEMBER_LOST, G},
    };
    size_t n = 0;
    for (qv_member_state from = 0; from < QV_MEMBER_STATE_COUNT; from++) {
        for (qv_member_event event = 0; event < QV_MEMBER_EVENT_COUNT; event++) {
            qv_member_state to = QV_MEMBER_STATE_COUNT, want = QV_MEMBER_STATE_COUNT;
            for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++)
                if (edges[i].from == from && edges[i].event == event)
                    want = edges[i].to;
            n += qv_member_next(from, event, &to);
            cr_expect_eq(to, want, "%s, event %d", qv_member_state_name(from), event);
        }
    }
    cr_assert_eq(n, sizeof edges / sizeof edges[0]);
}

/* --- Sessions ---------------------------------------------------------------------------------*/

Test(pool, opens_a_session_with_an_epoch_of_its_own)
{
    world *w = world_new(NULL);
    uint64_t first = world_join(w, "w1", 4, 2, NULL);
    uint64_t second = world_join(w, "w2", 4, 2, NULL);
    cr_assert_neq(first, second);
    cr_assert_eq(qv_core_pool(w->core)->n_members[QV_MEMBER_READY], 2);
    cr_assert_eq(qv_core_pool(w->core)->free_credit, 8);
    world_free(w);
}

Test(pool, epochs_of_two_brokers_do_not_meet)
{
    qv_core_options options = qv_core_default_options();
    uint64_t epochs[2];
    for (int i = 0; i < 2; i++) {
        options.seed = 1234 + (uint64_t)i;
        world *w = world_new(&options);
        epochs[i] = world_join(w, "w1", 1, 0, NULL);
        world_free(w);
    }
    uint64_t distance = epochs[0] > epochs[1] ? epochs[0] - epochs[1] : epochs[1] - epochs[0];
    cr_assert_gt(distance, UINT64_C(1) << 32);
}

Test(pool, ignores_a_ghost_and_tells_it_to_register)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;

    world_delta(w, "w1", epoch - 1, request, 0, 0, "ghost", "stop");
    world_expect(w, "w1", QV_MSG_UNKNOWN_SESSION);
    world_delta(w, "stranger", epoch, request, 0, 0, "ghost", "stop");
    world_expect(w, "stranger", QV_MSG_UNKNOWN_SESSION);
    cr_assert(world_is_silent(w, "c1"));
    cr_assert_eq(qv_core_get_stats(w->core)->ghosts, 2);
    world_free(w);
}

Test(pool, a_worker_that_registers_again_replaces_its_session)
{
    world *w = world_new(NULL);
    uint64_t first = world_join(w, "w1", 4, 2, NULL);
    uint64_t second = world_join(w, "w1", 4, 2, NULL);
    cr_assert_neq(first, second);
    cr_assert_eq(qv_core_pool(w->core)->n_members[QV_MEMBER_READY], 1);

    /* The same id from another connection: a worker that was restarted. */
    world_ready(w, "w1-again", "w1", "tiny", 4, 2, NULL);
    world_expect(w, "w1-again", QV_MSG_WELCOME);
    cr_assert_eq(qv_core_pool(w->core)->n_members[QV_MEMBER_READY], 1);
    world_beat(w, "w1", second, false);
    world_expect(w, "w1", QV_MSG_UNKNOWN_SESSION);
    world_free(w);
}

Test(pool, refuses_what_does_not_fit)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 2, NULL);
    world_ready(w, "w2", "w2", "another-model", 4, 2, NULL);
    const qv_message *refused = world_expect(w, "w2", QV_MSG_REFUSED);
    cr_assert(
        memmem(refused->refused.reason.data, refused->refused.reason.size, "another-model", 13),
        "%.*s", (int)refused->refused.reason.size, refused->refused.reason.data);
    cr_assert_gt(refused->refused.retry_after_ms, 0);
    world_ready(w, "w3", "bad id\n", "tiny", 4, 2, NULL);
    world_expect(w, "w3", QV_MSG_REFUSED);
    cr_assert_eq(qv_core_pool(w->core)->n_members[QV_MEMBER_READY], 1);

    qv_message message;
    qv_message_init(&message, QV_MSG_READY);
    message.ready.worker = qv_str_from("w4");
    message.ready.protocol = 99;
    message.ready.model = qv_str_from("tiny");
    message.ready.backend = qv_str_from("cpu");
    message.ready.capacity = message.ready.max_context = 1;
    world_worker_message(w, "w4", &message);
    world_expect(w, "w4", QV_MSG_REFUSED);
    world_free(w);
}

Test(pool, another_model_may_come_when_the_pool_is_empty)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_goodbye(w, "w1", epoch);
    world_ready(w, "w2", "w2", "another-model", 4, 2, NULL);
    world_expect(w, "w2", QV_MSG_WELCOME);
    world_free(w);
}

/* --- Liveness ---------------------------------------------------------------------------------*/

Test(pool, a_quiet_worker_gets_suspect_then_lost_and_any_traffic_counts)
{
    world *w = world_new(NULL);
    const qv_pool *pool = qv_core_pool(w->core);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_pass(w, 2600);
    cr_assert_eq(pool->n_members[QV_MEMBER_SUSPECT], 1);
    cr_assert_eq(pool->free_credit, 0, "a suspect worker gets nothing new");
    world_submit(w, "c1", "a", NULL, NULL);
    world_adapter_state(w, "w1", epoch, "x", "unloaded", NULL);
    cr_assert_eq(pool->n_members[QV_MEMBER_READY], 1, "any message of the session proves life");
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_pass(w, 5100);
    cr_assert(qv_list_is_empty(&pool->members));
    cr_assert_eq(qv_core_requests(w->core)->n_queued, 1, "its request waits for another worker");
    world_free(w);
}

Test(pool, pings_a_worker_that_it_has_nothing_to_say_to)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    for (int i = 0; i < 5; i++) {
        world_pass(w, 1000);
        world_beat(w, "w1", epoch, false);
        cr_assert_eq(world_expect(w, "w1", QV_MSG_PING)->ping.epoch, epoch);
    }
    cr_assert(world_is_silent(w, "w1"), "one ping in each interval");
    world_free(w);
}

Test(pool, time_in_which_the_broker_stood_still_is_not_held_against_workers)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 2, NULL);
    w->now_us += 60 * 1000000;
    qv_core_tick(w->core, w->now_us);
    cr_assert_eq(qv_core_pool(w->core)->n_members[QV_MEMBER_READY], 1);
    world_free(w);
}

Test(pool, a_draining_worker_finishes_what_it_has_and_gets_nothing_new)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_beat(w, "w1", epoch, true);
    world_submit(w, "c1", "b", NULL, NULL);
    cr_assert(world_is_silent(w, "w1"));
    world_delta(w, "w1", epoch, request, 0, 0, "x", "stop");
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_expect(w, "c1", QV_MSG_TOKENS);
    world_expect(w, "c1", QV_MSG_DONE);
    world_goodbye(w, "w1", epoch);
    world_join(w, "w2", 4, 2, NULL);
    world_expect(w, "w2", QV_MSG_RUN);
    cr_assert_eq(qv_core_get_stats(w->core)->workers_lost, 0, "leaving is not a loss");
    world_free(w);
}

/* --- Credit -----------------------------------------------------------------------------------*/

Test(pool, never_sends_more_than_the_capacity)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 3, 0, NULL);
    uint64_t requests[3];
    char id[8];
    for (int i = 0; i < 10; i++) {
        snprintf(id, sizeof id, "r%d", i);
        world_submit(w, "c1", id, NULL, NULL);
    }
    for (int i = 0; i < 3; i++)
        requests[i] = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    cr_assert(world_is_silent(w, "w1"));
    cr_assert_eq(qv_core_requests(w->core)->n_queued, 7);
    world_delta(w, "w1", epoch, requests[1], 0, 0, "x", "stop");
    world_expect(w, "w1", QV_MSG_RUN);
    cr_assert(world_is_silent(w, "w1"), "one ended, one more is sent");
    world_free(w);
}

Test(pool, a_worker_that_says_it_is_full_rests_until_its_heartbeat)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 8, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta_error(w, "w1", epoch, request, "OVERLOADED", "queue full");
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    cr_assert(world_is_silent(w, "c1"), "the client hears nothing of it");
    cr_assert(world_is_silent(w, "w1"));
    world_beat(w, "w1", epoch, false);
    cr_assert_neq(world_expect(w, "w1", QV_MSG_RUN)->run.request, request);
    world_free(w);
}

Test(pool, an_unreachable_worker_is_lost_at_once_and_the_request_goes_elsewhere)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 8, 0, NULL);
    world_set_reply(w, "w1", QV_ERR_NOT_FOUND);
    world_submit(w, "c1", "a", NULL, NULL);
    cr_assert(qv_list_is_empty(&qv_core_pool(w->core)->members));
    world_join(w, "w2", 8, 0, NULL);
    world_expect(w, "w2", QV_MSG_RUN);
    world_free(w);
}

Test(pool, malformed_bytes_end_a_session_since_tokens_may_be_among_them)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 8, 0, NULL);
    world_submit(w, "c1", "a", NULL, NULL);
    world_expect(w, "w1", QV_MSG_RUN);
    qv_mq_peer peer = world_peer("w1");
    qv_core_from_worker(w->core, &peer, "\xc1", 1, w->now_us);
    world_check(w);
    cr_assert(qv_list_is_empty(&qv_core_pool(w->core)->members));
    world_join(w, "w2", 8, 0, NULL);
    world_expect(w, "w2", QV_MSG_RUN);
    world_free(w);
}
