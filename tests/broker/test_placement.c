/* Which adapter goes where: wishes, workers that come and go, failures, demand. */
#include "broker/placement.h"
#include "tests/broker/world.h"

#include <criterion/criterion.h>
#include <string.h>

static void expect_state(world *w, const char *name, const char *state)
{
    cr_assert_str_eq(world_state(w, name), state, "%s is '%s': %s", name, world_state(w, name),
                     world_reason(w, name));
}

static void expect_load(world *w, const char *worker, const char *name, const char *path)
{
    const qv_msg_load_adapter *load = &world_expect(w, worker, QV_MSG_LOAD_ADAPTER)->load_adapter;
    cr_assert(qv_str_equal(load->name, name), "%.*s", (int)load->name.size, load->name.data);
    cr_assert(qv_str_equal(load->path, path), "%.*s", (int)load->path.size, load->path.data);
}

static void expect_unload(world *w, const char *worker, const char *name)
{
    const qv_msg_unload_adapter *unload =
        &world_expect(w, worker, QV_MSG_UNLOAD_ADAPTER)->unload_adapter;
    cr_assert(qv_str_equal(unload->name, name), "%.*s", (int)unload->name.size, unload->name.data);
}

static void expect_error(world *w, const char *client, const char *code, const char *part)
{
    const qv_msg_error *error = &world_expect(w, client, QV_MSG_ERROR)->error;
    cr_assert(qv_str_equal(error->code, code), "%.*s: %.*s", (int)error->code.size,
              error->code.data, (int)error->message.size, error->message.data);
    cr_assert(memmem(error->message.data, error->message.size, part, strlen(part)), "%.*s",
              (int)error->message.size, error->message.data);
}

/* Let time pass with these workers alive. */
static void pass(world *w, int64_t ms, const char *w1, uint64_t e1, const char *w2, uint64_t e2)
{
    for (; ms > 0; ms -= 1000) {
        world_pass(w, ms < 1000 ? ms : 1000);
        if (w1 != NULL)
            world_beat(w, w1, e1, false);
        if (w2 != NULL)
            world_beat(w, w2, e2, false);
    }
}

/* --- Wishes -----------------------------------------------------------------------------------*/

Test(placement, two_replicas_go_to_the_two_workers_with_most_room)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, "x:1 y:1");
    uint64_t e2 = world_join(w, "w2", 4, 2, NULL);
    uint64_t e3 = world_join(w, "w3", 4, 2, "x:1");
    (void)e1;
    world_want(w, "french", "/a/french", 2);
    expect_state(w, "french", "loading");
    expect_load(w, "w2", "french", "/a/french");
    expect_load(w, "w3", "french", "/a/french");
    cr_assert(world_is_silent(w, "w1"));
    world_adapter_state(w, "w2", e2, "french", "ready", "d1");
    expect_state(w, "french", "partial");
    world_adapter_state(w, "w3", e3, "french", "ready", "d1");
    expect_state(w, "french", "ready");
    cr_assert_str_empty(world_reason(w, "french"));
    world_free(w);
}

Test(placement, a_wish_waits_for_workers_and_says_so)
{
    world *w = world_new(NULL);
    world_want(w, "a", "/a", 2);
    expect_state(w, "a", "wanted");
    cr_assert(strstr(world_reason(w, "a"), "no worker"), "%s", world_reason(w, "a"));
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    expect_load(w, "w1", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    expect_state(w, "a", "partial");
    cr_assert(strstr(world_reason(w, "a"), "more replicas wanted"), "%s", world_reason(w, "a"));
    world_join(w, "w2", 4, 2, NULL);
    expect_load(w, "w2", "a", "/a");
    world_free(w);
}

Test(placement, a_lost_replica_is_made_up_elsewhere)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    world_want(w, "a", "/a", 1);
    expect_load(w, "w1", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_join(w, "w2", 4, 2, NULL);
    cr_assert(world_is_silent(w, "w2"));
    world_goodbye(w, "w1", e1);
    expect_load(w, "w2", "a", "/a");
    world_free(w);
}

Test(placement, a_draining_worker_counts_as_gone)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    world_want(w, "a", "/a", 1);
    expect_load(w, "w1", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_join(w, "w2", 4, 2, NULL);
    world_beat(w, "w1", e1, true);
    expect_load(w, "w2", "a", "/a");
    world_free(w);
}

Test(placement, fewer_replicas_are_unloaded_at_once_but_an_accident_after_a_while)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    uint64_t e2 = world_join(w, "w2", 4, 2, NULL);
    world_want(w, "a", "/a", 2);
    expect_load(w, "w1", "a", "/a");
    expect_load(w, "w2", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_adapter_state(w, "w2", e2, "a", "ready", "d");
    world_want(w, "a", "/a", 1);
    const qv_message *m1 = world_take(w, "w1"), *m2 = world_take(w, "w2");
    cr_assert((m1 == NULL) != (m2 == NULL), "one of them unloads it");
    bool first = m1 != NULL;
    world_adapter_state(w, first ? "w1" : "w2", first ? e1 : e2, "a", "unloaded", NULL);
    expect_state(w, "a", "ready");

    /* A third worker brings it along: surplus by accident. */
    uint64_t e3 = world_join(w, "w3", 4, 2, "a:d");
    for (int i = 0; i < 4; i++) {
        pass(w, 1000, "w1", e1, "w2", e2);
        world_beat(w, "w3", e3, false);
    }
    cr_assert_not(strstr(strstr(w->events, "worker_joined - w3"), "adapter_unloading"));
    pass(w, 2000, "w1", e1, "w2", e2);
    cr_assert(strstr(strstr(w->events, "worker_joined - w3"), "adapter_unloading"));
    world_free(w);
}

Test(placement, only_the_workers_of_the_list_get_it)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 8, NULL);
    uint64_t e2 = world_join(w, "w2", 4, 1, NULL);
    const char *list[] = {"w2"};
    qv_want want = {.path = "/a", .replicas = 2, .workers = list, .n_workers = 1};
    qv_core_want(w->core, "a", &want, w->now_us);
    expect_load(w, "w2", "a", "/a");
    world_adapter_state(w, "w2", e2, "a", "ready", "d");
    cr_assert(world_is_silent(w, "w1"));

    /* The list changes: first there, then no more here. */
    const char *other[] = {"w1"};
    want = (qv_want){.path = "/a", .replicas = 1, .workers = other, .n_workers = 1};
    qv_core_want(w->core, "a", &want, w->now_us);
    expect_load(w, "w1", "a", "/a");
    cr_assert(world_is_silent(w, "w2"), "until the other has it");
    world_adapter_state(w, "w1", qv_pool_find_id(qv_core_pool(w->core), "w1")->epoch, "a", "ready",
                        "d");
    expect_unload(w, "w2", "a");
    world_free(w);
}

Test(placement, deleting_a_wish_unloads_it_everywhere_after_what_runs)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 1, 2, NULL);
    world_want(w, "a", "/a", 1);
    expect_load(w, "w1", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_submit(w, "c1", "runs", "a", NULL);
    world_submit(w, "c1", "waits", "a", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;

    world_want(w, "a", NULL, 0);
    expect_unload(w, "w1", "a");
    expect_state(w, "a", "unloading");
    expect_error(w, "c1", "ADAPTER_NOT_FOUND", "a");
    world_submit(w, "c1", "late", "a", NULL);
    expect_error(w, "c1", "ADAPTER_NOT_FOUND", "a");
    world_delta(w, "w1", e1, request, 0, 0, "x", "stop");
    world_expect(w, "c1", QV_MSG_TOKENS);
    world_expect(w, "c1", QV_MSG_DONE);
    world_adapter_state(w, "w1", e1, "a", "unloaded", NULL);
    expect_state(w, "a", "");
    world_submit(w, "c1", "later", "a", NULL);
    expect_error(w, "c1", "ADAPTER_NOT_FOUND", "'a'");
    world_free(w);
}

Test(placement, a_wish_that_comes_back_while_it_unloads_is_loaded_again)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 1, 1, NULL);
    world_want(w, "a", "/a", 1);
    expect_load(w, "w1", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_want(w, "a", NULL, 0);
    expect_unload(w, "w1", "a");
    world_want(w, "a", "/a", 1);
    expect_load(w, "w1", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "unloaded", NULL); /* of the first order */
    expect_state(w, "a", "loading");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    expect_state(w, "a", "ready");
    world_free(w);
}

Test(placement, another_path_is_loaded_in_its_place_and_requests_wait_for_it)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    world_want(w, "a", "/old", 1);
    expect_load(w, "w1", "a", "/old");
    world_adapter_state(w, "w1", e1, "a", "ready", "d1");
    world_want(w, "a", "/new", 1);
    expect_load(w, "w1", "a", "/new");
    world_submit(w, "c1", "r", "a", NULL);
    cr_assert(world_is_silent(w, "w1"), "never the old one");
    world_adapter_state(w, "w1", e1, "a", "ready", "d2");
    cr_assert(qv_str_equal(world_expect(w, "w1", QV_MSG_RUN)->run.digest, "d2"));
    world_free(w);
}

Test(placement, a_request_in_the_middle_never_goes_on_with_another_version)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, "a:d1");
    world_submit(w, "c1", "r", "a", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta(w, "w1", e1, request, 0, 0, "x", NULL);
    world_expect(w, "c1", QV_MSG_TOKENS);
    world_join(w, "w2", 4, 2, "a:d2");
    world_goodbye(w, "w1", e1);
    expect_error(w, "c1", "WORKER_LOST", "version");
    cr_assert(world_is_silent(w, "w2"));
    world_free(w);
}

Test(placement, an_invalid_wish_is_shown_and_the_one_before_it_holds)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    qv_core_invalid_want(w->core, "b", "path is missing", w->now_us);
    expect_state(w, "b", "invalid");
    cr_assert_str_eq(world_reason(w, "b"), "path is missing");
    world_submit(w, "c1", "r", "b", NULL);
    expect_error(w, "c1", "ADAPTER_INVALID", "path is missing");
    world_want(w, "b", NULL, 0);
    expect_state(w, "b", "");

    world_want(w, "a", "/a", 1);
    expect_load(w, "w1", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    qv_core_invalid_want(w->core, "a", "replicas: 'many' is no number", w->now_us);
    expect_state(w, "a", "ready");
    cr_assert(strstr(world_reason(w, "a"), "many"));
    cr_assert(world_is_silent(w, "w1"));
    world_want(w, "a", "/a", 1);
    cr_assert_str_empty(world_reason(w, "a"));
    world_free(w);
}

/* --- Failures ---------------------------------------------------------------------------------*/

Test(placement, a_failed_load_is_tried_elsewhere_then_after_a_back_off)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    uint64_t e2 = world_join(w, "w2", 4, 1, NULL);
    world_want(w, "a", "/a", 1);
    expect_load(w, "w1", "a", "/a");
    world_submit(w, "c1", "r", "a", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_adapter_state(w, "w1", e1, "a", "failed", "rank 128 above 64");
    expect_load(w, "w2", "a", "/a");
    expect_state(w, "a", "loading");
    cr_assert(world_is_silent(w, "c1"), "there is hope");
    world_adapter_state(w, "w2", e2, "a", "failed", "rank 128 above 64");
    expect_error(w, "c1", "ADAPTER_INVALID", "rank 128");
    expect_state(w, "a", "invalid");
    cr_assert_str_eq(world_reason(w, "a"), "rank 128 above 64");
    world_submit(w, "c1", "r2", "a", NULL);
    expect_error(w, "c1", "ADAPTER_INVALID", "rank 128");

    pass(w, 9000, "w1", e1, "w2", e2);
    cr_assert_not(strstr(strstr(w->events, "adapter_load_failed a w2"), "adapter_loading"));
    pass(w, 2000, "w1", e1, "w2", e2);
    const char *again = strstr(strstr(w->events, "adapter_load_failed a w2"), "adapter_loading");
    cr_assert_not_null(again);

    /* The second time it takes twice as long. */
    world_adapter_state(w, "w1", e1, "a", "failed", "still");
    world_adapter_state(w, "w2", e2, "a", "failed", "still");
    pass(w, 15000, "w1", e1, "w2", e2);
    cr_assert_str_eq(world_reason(w, "a"), "still");
    world_free(w);
}

Test(placement, a_new_path_is_tried_at_once_after_a_failure)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    world_want(w, "a", "/wrong", 1);
    expect_load(w, "w1", "a", "/wrong");
    world_adapter_state(w, "w1", e1, "a", "failed", "no such folder");
    world_want(w, "a", "/right", 1);
    expect_load(w, "w1", "a", "/right");
    world_free(w);
}

Test(placement, a_load_without_an_answer_has_failed)
{
    qv_core_options options = qv_core_default_options();
    options.placement.load_timeout_ms = 2000;
    world *w = world_new(&options);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    world_want(w, "a", "/a", 1);
    pass(w, 3000, "w1", e1, NULL, 0);
    expect_state(w, "a", "failed");
    world_submit(w, "c1", "r", "a", NULL);
    const qv_msg_error *error = &world_expect(w, "c1", QV_MSG_ERROR)->error;
    cr_assert(qv_str_equal(error->code, "INTERNAL"));
    cr_assert_gt(error->retry_after_ms, 0);
    world_free(w);
}

Test(placement, a_worker_that_does_not_hold_what_it_said_is_no_holder)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, "a:d");
    world_join(w, "w2", 4, 2, "a:d");
    world_submit(w, "c1", "r", "a", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_delta_error(w, "w1", e1, request, "ADAPTER_NOT_FOUND", "evicted");
    world_expect(w, "w2", QV_MSG_RUN);
    cr_assert(world_is_silent(w, "c1"));
    world_free(w);
}

/* --- Demand -----------------------------------------------------------------------------------*/

Test(placement, zero_replicas_load_when_a_request_asks)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    world_want(w, "a", "/a", 0);
    expect_state(w, "a", "wanted");
    cr_assert(world_is_silent(w, "w1"));
    world_submit(w, "c1", "r", "a", NULL);
    expect_load(w, "w1", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_expect(w, "w1", QV_MSG_RUN);
    expect_state(w, "a", "ready");
    world_free(w);
}

/* What the worker would have done while it loaded. */
Test(placement, a_load_that_a_request_asks_for_is_charged_to_its_tenant)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, NULL);
    for (int i = 0; i < 4; i++) { /* so that its rate is known */
        char id[8];
        snprintf(id, sizeof id, "%d", i);
        world_submit(w, "c1", id, NULL, NULL);
        uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
        world_delta(w, "w1", e1, request, 0, 0, "x", "stop");
        pass(w, 500, "w1", e1, NULL, 0);
    }
    const qv_fair *fair = &qv_core_requests(w->core)->fair;
    const qv_member *member = qv_pool_find_id(qv_core_pool(w->core), "w1");
    cr_assert_gt(member->rate, 0);
    world_want(w, "wanted", "/w", 1); /* nobody's request */
    expect_load(w, "w1", "wanted", "/w");
    world_want(w, "a", "/a", 0);
    world_submit(w, "c1", "r", "a", "tenant", "\"acme\"", NULL);
    expect_load(w, "w1", "a", "/a");
    world_pass(w, 400);
    world_adapter_state(w, "w1", e1, "wanted", "ready", "d");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_expect(w, "w1", QV_MSG_RUN);
    const qv_tenant *acme = qv_map_get_str(fair->by_name, "acme");
    const qv_tenant *nobody = qv_map_get_str(fair->by_name, "");
    cr_assert_float_eq(acme->loads, member->rate * 0.4, 1e-6);
    cr_assert(nobody == NULL || nobody->loads == 0);
    world_free(w);
}

Test(placement, demand_evicts_the_idle_adapter_that_was_used_longest_ago)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 8, 3, NULL);
    static const char *const names[] = {"old", "pinned", "young"};
    for (int i = 0; i < 3; i++) {
        qv_want want = {.path = "/x", .replicas = 1, .pin = i == 1};
        qv_core_want(w->core, names[i], &want, w->now_us);
        world_expect(w, "w1", QV_MSG_LOAD_ADAPTER);
        world_adapter_state(w, "w1", e1, names[i], "ready", "d");
        world_pass(w, 100);
        world_submit(w, "c1", names[i], names[i], NULL);
        uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
        world_delta(w, "w1", e1, request, 0, 0, "x", "stop");
    }
    world_want(w, "new", "/new", 1);
    cr_assert(world_is_silent(w, "w1"), "a wish alone pushes nothing out");
    cr_assert(strstr(world_reason(w, "new"), "no worker has a free adapter slot"));
    world_submit(w, "c1", "r", "new", NULL);
    expect_unload(w, "w1", "old");
    expect_load(w, "w1", "new", "/new");
    world_adapter_state(w, "w1", e1, "old", "unloaded", NULL);
    world_adapter_state(w, "w1", e1, "new", "ready", "n");
    world_expect(w, "w1", QV_MSG_RUN);
    expect_state(w, "old", "wanted");
    pass(w, 3000, "w1", e1, NULL, 0);
    expect_state(w, "old", "wanted"); /* it does not push back */
    world_free(w);
}

Test(placement, demand_waits_while_every_adapter_is_in_use)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 8, 1, NULL);
    world_want(w, "a", "/a", 1);
    world_want(w, "b", "/b", 0);
    expect_load(w, "w1", "a", "/a");
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_submit(w, "c1", "r1", "a", NULL);
    uint64_t request = world_expect(w, "w1", QV_MSG_RUN)->run.request;
    world_submit(w, "c1", "r2", "b", NULL);
    cr_assert(world_is_silent(w, "w1"));
    world_delta(w, "w1", e1, request, 0, 0, "x", "stop");
    world_pass(w, 200);
    expect_unload(w, "w1", "a");
    expect_load(w, "w1", "b", "/b");
    world_free(w);
}

/* --- What workers bring -----------------------------------------------------------------------*/

Test(placement, an_adapter_that_nobody_wants_but_a_worker_holds_is_served)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, "own:d");
    expect_state(w, "own", "ready");
    world_submit(w, "c1", "r", "own", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_expect(w, "w1", QV_MSG_RUN);

    /* With its worker it is gone, but may come back. */
    world_goodbye(w, "w1", e1);
    expect_state(w, "own", "wanted");
    world_submit(w, "c1", "r2", "own", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_pass(w, 10000);
    world_join(w, "w2", 4, 2, "own:d");
    world_expect(w, "w2", QV_MSG_RUN);
    world_expect(w, "w2", QV_MSG_RUN);
    world_free(w);
}

Test(placement, an_adapter_whose_worker_stays_away_is_forgotten)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, "own:d");
    world_goodbye(w, "w1", e1);
    world_submit(w, "c1", "r", "own", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_pass(w, 31000);
    expect_error(w, "c1", "ADAPTER_NOT_FOUND", "own");
    expect_state(w, "own", "");
    world_free(w);
}

Test(placement, an_unknown_adapter_is_refused_for_good_only_once_everything_is_known)
{
    world *w = world_new(NULL);
    world_submit(w, "c1", "r", "a", NULL);
    expect_error(w, "c1", "OVERLOADED", "not known yet");
    world_join(w, "w1", 4, 2, NULL);
    world_submit(w, "c1", "r", "a", NULL);
    expect_error(w, "c1", "ADAPTER_NOT_FOUND", "'a'");
    world_free(w);
}

Test(placement, odd_reports_of_a_worker_change_nothing)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 4, 2, "a:d");
    world_adapter_state(w, "w1", e1, "a", "dancing", NULL);
    world_adapter_state(w, "w1", e1, "never", "failed", "x");
    world_adapter_state(w, "w1", e1, "never", "unloaded", NULL);
    world_adapter_state(w, "w1", e1, "bad name\n", "ready", "d");
    expect_state(w, "a", "ready");
    expect_state(w, "never", "");
    cr_assert_eq(qv_core_pool(w->core)->n_members[QV_MEMBER_READY], 1);
    cr_assert(strstr(w->events, "report_ignored"));

    /* Loaded by itself: it is served. */
    world_adapter_state(w, "w1", e1, "gift", "ready", "g");
    expect_state(w, "gift", "ready");
    world_free(w);
}
