/* Replicas follow demand, adapters move to workers that join, aliases split requests, orders drain.
 */
#include "broker/controller.h"
#include "broker/peers.h"
#include "tests/broker/world.h"

#include <criterion/criterion.h>
#include <string.h>

/* --- Goals ------------------------------------------------------------------------------------*/

Test(controller, goals_follow_demand_with_hysteresis)
{
    static const struct {
        double demand;
        int64_t goal, next;
    } rows[] = {
        {0, 0, 0},   {0.01, 1, 0}, {1, 0, 1}, {6.9, 1, 1}, {7.1, 1, 2}, {13.9, 2, 2},
        {100, 2, 4}, {100, 0, 15}, {8, 2, 2}, {5.5, 2, 1}, {20, 4, 4},  {16, 4, 3},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        cr_expect_eq(qv_controller_goal(rows[i].demand, 10, rows[i].goal), rows[i].next,
                     "%g at once with %lld: %lld", rows[i].demand, (long long)rows[i].goal,
                     (long long)qv_controller_goal(rows[i].demand, 10, rows[i].goal));
    cr_expect_eq(qv_controller_goal(5, 0, 0), 0, "without a worker");
}

/* --- A pool that answers by itself ------------------------------------------------------------*/

typedef struct {
    world *w;
    char names[16][16];
    uint64_t epochs[16];
    int n;
} pool;

static void join(pool *p, int64_t capacity, int64_t slots)
{
    snprintf(p->names[p->n], sizeof p->names[0], "w%d", p->n + 1);
    p->epochs[p->n] = world_join(p->w, p->names[p->n], capacity, slots, NULL);
    p->n++;
}

/* Let time pass; every load succeeds with the path as digest, every unload too. Counts loads. */
static int live(pool *p, int64_t ms)
{
    int n_loads = 0;
    for (; ms > 0; ms -= 100) {
        world_pass(p->w, 100);
        for (int i = 0; i < p->n; i++) {
            world_beat(p->w, p->names[i], p->epochs[i], false);
            for (const qv_message *m; (m = world_take(p->w, p->names[i])) != NULL;) {
                char name[64], path[64];
                if (m->type == QV_MSG_LOAD_ADAPTER) {
                    snprintf(name, sizeof name, "%.*s", (int)m->load_adapter.name.size,
                             m->load_adapter.name.data);
                    snprintf(path, sizeof path, "%.*s", (int)m->load_adapter.path.size,
                             m->load_adapter.path.data);
                    world_adapter_state(p->w, p->names[i], p->epochs[i], name, "ready", path);
                    n_loads++;
                } else if (m->type == QV_MSG_UNLOAD_ADAPTER) {
                    snprintf(name, sizeof name, "%.*s", (int)m->unload_adapter.name.size,
                             m->unload_adapter.name.data);
                    world_adapter_state(p->w, p->names[i], p->epochs[i], name, "unloaded", NULL);
                }
            }
        }
    }
    return n_loads;
}

static const qv_group *group(pool *p, const char *name)
{
    return qv_pool_find_group(qv_core_pool(p->w->core), name, strlen(name));
}

Test(controller, replicas_grow_with_demand_and_fall_slowly)
{
    pool p = {.w = world_new(NULL)};
    for (int i = 0; i < 4; i++)
        join(&p, 10, 4);
    qv_want want = {.path = "/a", .replicas = 1, .max_replicas = 3};
    qv_core_want(p.w->core, "a", &want, p.w->now_us);
    live(&p, 1000);
    cr_assert_eq(group(&p, "a")->n_ready, 1);
    for (int i = 0; i < 35; i++) {
        char id[16];
        snprintf(id, sizeof id, "r%d", i);
        world_submit(p.w, "c1", id, "a", NULL);
    }
    live(&p, 10000);
    cr_assert_eq(group(&p, "a")->n_ready, 3, "%u: max_replicas bounds it", group(&p, "a")->n_ready);
    for (int i = 0; i < 35; i++) {
        char id[16];
        snprintf(id, sizeof id, "r%d", i);
        world_cancel(p.w, "c1", id);
    }
    live(&p, 20000);
    cr_assert_eq(group(&p, "a")->n_ready, 3, "not at once");
    live(&p, 100000);
    cr_assert_eq(group(&p, "a")->n_ready, 1);
    world_free(p.w);
}

Test(controller, a_worker_that_joins_gets_its_share_and_then_nothing_moves)
{
    enum { N = 24 };
    pool p = {.w = world_new(NULL)};
    for (int i = 0; i < 3; i++)
        join(&p, 10, 16);
    for (int i = 0; i < N; i++) {
        char name[16];
        snprintf(name, sizeof name, "a%d", i);
        world_want(p.w, name, "/a", 1);
    }
    live(&p, 20000);
    cr_assert_eq(live(&p, 10000), 0, "at rest nothing moves");
    join(&p, 10, 16);
    int n = live(&p, 10000);
    cr_assert(n >= 2 && n <= N / 3, "%d of %d adapters moved to one of four workers", n, N);
    live(&p, 20000);
    cr_assert_eq(live(&p, 10000), 0, "and then it rests");
    for (int i = 0; i < N; i++) {
        char name[16];
        snprintf(name, sizeof name, "a%d", i);
        cr_assert_eq(group(&p, name)->n_ready, 1, "%s is on %u", name, group(&p, name)->n_ready);
    }
    world_free(p.w);
}

/* --- Drains -----------------------------------------------------------------------------------*/

Test(drain, of_a_worker_by_order_moves_its_adapters_and_finishes_what_runs)
{
    pool p = {.w = world_new(NULL)};
    join(&p, 4, 4);
    world_want(p.w, "a", "/a", 1);
    live(&p, 500);
    world_submit(p.w, "c1", "r1", "a", NULL);
    const qv_msg_run *run = &world_expect(p.w, "w1", QV_MSG_RUN)->run;
    join(&p, 4, 4);
    qv_core_order_drain(p.w->core, "w1", true, p.w->now_us);
    live(&p, 500);
    world_submit(p.w, "c1", "r2", "a", NULL);
    world_expect(p.w, "w2", QV_MSG_RUN);
    cr_assert_null(strstr(p.w->events, "worker_drained"));
    world_delta(p.w, "w1", p.epochs[0], run->request, 0, 0, "x", "stop");
    live(&p, 200);
    cr_assert(strstr(p.w->events, "worker_drained - w1"), "%s", p.w->events);
    qv_core_order_drain(p.w->core, "w1", false, p.w->now_us);
    cr_assert(strstr(p.w->events, "worker_resumed - w1"));
    world_free(p.w);
}

Test(drain, holds_for_a_worker_that_comes_later_and_for_the_broker)
{
    pool p = {.w = world_new(NULL)};
    qv_core_order_drain(p.w->core, "w1", true, p.w->now_us);
    join(&p, 4, 4);
    world_submit(p.w, "c1", "r1", NULL, NULL);
    cr_assert(world_is_silent(p.w, "w1"));
    qv_core_order_drain(p.w->core, "broker", true, p.w->now_us);
    world_submit(p.w, "c2", "r2", NULL, NULL);
    cr_assert(qv_str_equal(world_expect(p.w, "c2", QV_MSG_ERROR)->error.code, "OVERLOADED"));
    qv_core_order_drain(p.w->core, "broker", false, p.w->now_us);
    world_submit(p.w, "c2", "r2", NULL, NULL);
    world_expect(p.w, "c2", QV_MSG_ACCEPTED);
    world_free(p.w);
}

/* --- Aliases ----------------------------------------------------------------------------------*/

/* How many of n requests for a name run with the adapter "v2". */
static int count_v2(pool *p, const char *name, int n, const char *prefix)
{
    int n_v2 = 0;
    for (int i = 0; i < n; i++) {
        char id[32];
        snprintf(id, sizeof id, "%s%d", prefix, i);
        world_submit(p->w, "c1", id, name, NULL);
        const qv_msg_run *run = &world_expect(p->w, "w1", QV_MSG_RUN)->run;
        n_v2 += qv_str_equal(run->adapter, "v2");
        world_delta(p->w, "w1", p->epochs[0], run->request, 0, 0, "x", "stop");
        while (world_take(p->w, "c1") != NULL)
            ;
    }
    return n_v2;
}

Test(alias, splits_by_weight_and_rolls_back_in_one_write)
{
    pool p = {.w = world_new(NULL)};
    join(&p, 4, 4);
    world_want(p.w, "v1", "/v1", 1);
    world_want(p.w, "v2", "/v2", 1);
    live(&p, 500);
    qv_want_share shares[] = {{"v1", 80}, {"v2", 20}};
    qv_want want = {.replicas = 1, .split = shares, .n_split = 2};
    qv_core_want(p.w->core, "chat", &want, p.w->now_us);
    cr_assert_str_eq(world_state(p.w, "chat"), "alias");
    int n = count_v2(&p, "chat", 500, "a");
    cr_assert(n > 60 && n < 140, "%d of 500 at 20 %%", n);
    cr_assert_eq(count_v2(&p, "chat", 500, "a"), n, "the same ids go the same way");
    want.n_split = 1;
    qv_core_want(p.w->core, "chat", &want, p.w->now_us);
    cr_assert_eq(count_v2(&p, "chat", 100, "b"), 0);
    world_want(p.w, "v1", NULL, 0);
    live(&p, 500);
    world_submit(p.w, "c1", "r", "chat", NULL);
    cr_assert(qv_str_equal(world_expect(p.w, "c1", QV_MSG_ERROR)->error.code, "ADAPTER_NOT_FOUND"));
    world_free(p.w);
}

Test(alias, a_name_may_split_off_a_part_of_itself)
{
    pool p = {.w = world_new(NULL)};
    join(&p, 4, 4);
    world_want(p.w, "v2", "/v2", 1);
    qv_want_share shares[] = {{"sql", 1}, {"v2", 1}};
    qv_want want = {.path = "/sql", .replicas = 1, .split = shares, .n_split = 2};
    qv_core_want(p.w->core, "sql", &want, p.w->now_us);
    live(&p, 500);
    int n = count_v2(&p, "sql", 200, "a");
    cr_assert(n > 60 && n < 140, "%d of 200 at 50 %%", n);
    world_want(p.w, "v2", NULL, 0); /* the canary is gone: all go to what can answer */
    live(&p, 500);
    cr_assert_eq(count_v2(&p, "sql", 50, "b"), 0);
    world_free(p.w);
}

Test(tenants, only_those_of_the_list_may_use_an_adapter)
{
    pool p = {.w = world_new(NULL)};
    join(&p, 4, 4);
    const char *list[] = {"acme", "zeta"};
    qv_want want = {.path = "/a", .replicas = 1, .tenants = list, .n_tenants = 2};
    qv_core_want(p.w->core, "a", &want, p.w->now_us);
    world_submit(p.w, "c1", "r1", "a", NULL);
    cr_assert(qv_str_equal(world_expect(p.w, "c1", QV_MSG_ERROR)->error.code, "UNAUTHORIZED"));
    world_submit(p.w, "c1", "r2", "a", "tenant", "\"zeta\"", NULL);
    world_expect(p.w, "c1", QV_MSG_ACCEPTED);
    world_free(p.w);
}

Test(tenants, limits_hold)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 8, 0, NULL);
    const qv_tenant_want want = {.weight = 1, .max_queued = 2, .max_running = 1};
    qv_core_tenant(w->core, "acme", &want, w->now_us);
    for (int i = 0; i < 3; i++) {
        char id[8] = {'r', (char)('0' + i), 0};
        world_submit(w, "c1", id, NULL, "tenant", "\"acme\"", NULL);
        world_expect(w, "c1", QV_MSG_ACCEPTED);
    }
    world_expect(w, "w1", QV_MSG_RUN);
    cr_assert(world_is_silent(w, "w1"));
    world_submit(w, "c1", "r3", NULL, "tenant", "\"acme\"", NULL);
    const qv_msg_error *error = &world_expect(w, "c1", QV_MSG_ERROR)->error;
    cr_assert(memmem(error->message.data, error->message.size, "'acme' has 2", 12), "%.*s",
              (int)error->message.size, error->message.data);
    qv_core_tenant(w->core, "acme", NULL, w->now_us);
    world_expect(w, "w1", QV_MSG_RUN);
    world_expect(w, "w1", QV_MSG_RUN);
    world_free(w);
}

/* --- Several brokers --------------------------------------------------------------------------*/

Test(peers, the_least_id_moves_adapters_by_the_demand_of_all)
{
    qv_core_options options = qv_core_default_options();
    options.id = "b2";
    pool p = {.w = world_new(&options)};
    for (int i = 0; i < 3; i++)
        join(&p, 10, 4);
    world_want(p.w, "a", "/a", 1);
    live(&p, 500);
    qv_peer_broker both[] = {{"b1", "a=18.0 unknown=5 a=x bad =3 a", 3}, {"b2", "a=99", 3}};
    qv_peers_update(p.w->core, both, 2);
    live(&p, 5000);
    cr_assert_eq(group(&p, "a")->goal, 3, "%lld", (long long)group(&p, "a")->goal);
    cr_assert_eq(group(&p, "a")->n_ready, 1, "b1 does it");
    world_adapter_state(p.w, "w1", p.epochs[0], "a", "ready", "/a");
    world_adapter_state(p.w, "w2", p.epochs[1], "a", "ready", "/a");
    world_want(p.w, "a", "/a", 1);
    qv_peers_update(p.w->core, (qv_peer_broker[]){{"b1", NULL, 3}}, 1);
    live(&p, 60000);
    cr_assert_geq(group(&p, "a")->n_ready, 2, "b1 takes surplus away, not b2");
    qv_peers_update(p.w->core, (qv_peer_broker[]){{"b1", NULL, 0}},
                    1); /* it has lost its workers */
    live(&p, 100000);
    cr_assert_eq(group(&p, "a")->n_ready, 1);
    cr_assert(strstr(p.w->events, "placement_leads"));
    world_free(p.w);
}

Test(peers, show_their_demand_greatest_first_and_cut_to_fit)
{
    pool p = {.w = world_new(NULL)};
    join(&p, 100, 8);
    char text[64], small[8];
    cr_assert_str_empty(qv_peers_show(p.w->core, text, sizeof text));
    world_want(p.w, "a", "/a", 1);
    world_want(p.w, "b", "/b", 1);
    ((qv_group *)group(&p, "a"))->demand = 1.25;
    ((qv_group *)group(&p, "b"))->demand = 7;
    cr_assert_str_eq(qv_peers_show(p.w->core, text, sizeof text), "b=7.0 a=1.2");
    cr_assert_str_eq(qv_peers_show(p.w->core, small, sizeof small), "b=7.0");
    world_free(p.w);
}
