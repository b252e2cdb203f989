/* Which worker gets a request: the policies on drawn pools, and the turns of the queues. */
#include "broker/route.h"
#include "tests/broker/world.h"

#include <criterion/criterion.h>
#include <string.h>

/* --- Policies on drawn pools ------------------------------------------------------------------*/

typedef struct {
    const char *id;
    int64_t capacity, busy, free_pages, slots;
    const char *adapters; /* "name:digest ..." */
    bool suspect;
} drawn;

static bool before(const void *a, const void *b)
{
    return a < b;
}

static void draw(qv_pool *pool, const drawn *members, size_t n)
{
    cr_assert_eq(qv_pool_init(pool, 1, 0, before), QV_OK);
    for (size_t i = 0; i < n; i++) {
        qv_mq_peer peer = world_peer(members[i].id);
        qv_msg_ready ready = {.worker = qv_str_from(members[i].id),
                              .protocol = QV_PROTOCOL_VERSION,
                              .model = qv_str_from("tiny"),
                              .capacity = members[i].capacity,
                              .adapter_slots = members[i].slots,
                              .max_context = 1};
        qv_member *member;
        cr_assert_eq(qv_pool_join(pool, &peer, &ready, 0, &member), QV_OK, "%s", qv_error());
        qv_member_apply(member, QV_MEMBER_WELCOMED);
        member->free_pages = members[i].free_pages;
        qv_member_add_attempt(member, members[i].busy);
        char list[128];
        snprintf(list, sizeof list, "%s", members[i].adapters ? members[i].adapters : "");
        for (char *name = strtok(list, " "); name != NULL; name = strtok(NULL, " ")) {
            char *digest = strchr(name, ':');
            qv_group *group = qv_pool_require_group(pool, name, (size_t)(digest - name));
            qv_resident *resident = qv_resident_require(group, member);
            strcpy(resident->digest, digest + 1);
            qv_resident_set(resident, QV_RESIDENT_READY, 0);
        }
        if (members[i].suspect)
            qv_member_apply(member, QV_MEMBER_QUIET);
    }
}

static void undraw(qv_pool *pool)
{
    QV_LIST_EACH(&pool->members, qv_member, link, member)
    qv_member_add_attempt(member, -member->n_attempts);
    qv_pool_deinit(pool);
}

typedef struct {
    const char *what;
    const qv_route_policy *policy;
    const char *adapter, *digest;
    qv_route_verdict verdict;
    const char *member;
} question;

static const drawn pool_a[] = {
    {"w1", 4, 3, 10, 2, "french:d1", false}, {"w2", 8, 4, 10, 2, "french:d1 json:j1", false},
    {"w3", 8, 4, 50, 1, "json:j2", false},   {"w4", 8, 0, 99, 2, "emoji:e1", true},
    {"w5", 2, 2, 99, 2, "full:f1", false},
};

static const question questions[] = {
    {"base goes to the least loaded, more free pages first", &qv_route_affinity, "", "",
     QV_ROUTE_SEND, "w3"},
    {"an adapter goes to its least loaded holder", &qv_route_affinity, "french", "", QV_ROUTE_SEND,
     "w2"},
    {"one that has begun goes on with its version only", &qv_route_affinity, "json", "j1",
     QV_ROUTE_SEND, "w2"},
    {"a version that nobody holds waits", &qv_route_affinity, "json", "j9", QV_ROUTE_WAIT, NULL},
    {"a suspect holder gets nothing new", &qv_route_affinity, "emoji", "", QV_ROUTE_WAIT, NULL},
    {"a full holder is waited for", &qv_route_affinity, "full", "", QV_ROUTE_WAIT, NULL},
    {"nobody holds it: load", &qv_route_affinity, "other", "", QV_ROUTE_LOAD, NULL},
    {"least loaded, base", &qv_route_least_loaded, "", "", QV_ROUTE_SEND, "w3"},
    {"least loaded holds it", &qv_route_least_loaded, "json", "", QV_ROUTE_SEND, "w3"},
    {"least loaded has no slot: a holder", &qv_route_least_loaded, "french", "", QV_ROUTE_SEND,
     "w2"},
    {"least loaded, nobody holds it", &qv_route_least_loaded, "other", "", QV_ROUTE_LOAD, "w3"},
};

Test(policy, chooses_as_drawn)
{
    qv_pool pool;
    draw(&pool, pool_a, sizeof pool_a / sizeof pool_a[0]);
    qv_pool_require_group(&pool, "other", 5);
    for (size_t i = 0; i < sizeof questions / sizeof questions[0]; i++) {
        const question *q = &questions[i];
        const qv_group *group = qv_pool_find_group(&pool, q->adapter, strlen(q->adapter));
        qv_route route = q->policy->choose(&pool, group, q->digest);
        cr_expect_eq(route.verdict, q->verdict, "%s: verdict %d", q->what, (int)route.verdict);
        cr_expect((q->member == NULL) == (route.member == NULL), "%s", q->what);
        if (route.member != NULL && q->member != NULL)
            cr_expect_str_eq(route.member->id, q->member, "%s: %s", q->what, route.member->id);
    }
    undraw(&pool);
}

Test(policy, every_policy_waits_when_nobody_has_room)
{
    static const drawn members[] = {{"w1", 2, 2, 0, 2, "a:d", false},
                                    {"w2", 1, 1, 0, 2, "a:d", false}};
    qv_pool pool;
    draw(&pool, members, 2);
    for (size_t i = 0; qv_route_policies[i] != NULL; i++) {
        qv_route base = qv_route_policies[i]->choose(&pool, pool.base, "");
        qv_route adapter =
            qv_route_policies[i]->choose(&pool, qv_pool_find_group(&pool, "a", 1), "");
        cr_expect_eq(base.verdict, QV_ROUTE_WAIT, "%s", qv_route_policies[i]->name);
        cr_expect_eq(adapter.verdict, QV_ROUTE_WAIT, "%s", qv_route_policies[i]->name);
    }
    undraw(&pool);
}

Test(policy, is_found_by_name_and_a_wrong_name_lists_them)
{
    const qv_route_policy *policy;
    cr_assert_eq(qv_route_find("affinity", &policy), QV_OK);
    cr_assert_eq(policy, &qv_route_affinity);
    cr_assert_eq(qv_route_find("random", &policy), QV_ERR_NOT_FOUND);
    cr_assert(strstr(qv_error(), "affinity, least-loaded"), "%s", qv_error());
}

/* --- Queues -----------------------------------------------------------------------------------*/

/* Which adapter the next request on a worker is for; "" = base, "-" = none. */
static const char *next_adapter(world *w, const char *worker, uint64_t epoch)
{
    const qv_message *run = world_take(w, worker);
    while (run != NULL && run->type != QV_MSG_RUN)
        run = world_take(w, worker);
    if (run == NULL)
        return "-";
    qv_message submit;
    cr_assert_eq(qv_message_decode(run->run.submit.data, run->run.submit.size, QV_FROM_CLIENT, NULL,
                                   &w->arena, &submit),
                 QV_OK);
    const char *adapter = qv_str_dup(&w->arena, submit.submit.adapter);
    world_delta(w, worker, epoch, run->run.request, 0, 0, "x", "stop");
    return adapter;
}

Test(queues, take_turns_so_that_none_blocks_another)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 1, 4, "a:1 b:1");
    world_submit(w, "c1", "plug", NULL, NULL);
    static const struct {
        const char *adapter;
        int n;
    } load[] = {{"a", 6}, {"b", 2}, {NULL, 2}};
    int k = 0;
    for (size_t i = 0; i < 3; i++) {
        for (int j = 0; j < load[i].n; j++) {
            char id[16];
            snprintf(id, sizeof id, "r%d", k++);
            world_submit(w, "c1", id, load[i].adapter, NULL);
        }
    }
    char order[64] = "";
    for (int i = 0; i < 11; i++) {
        const char *adapter = next_adapter(w, "w1", epoch);
        strcat(order, adapter[0] ? adapter : "0");
    }
    cr_assert_str_eq(order, "0ab0ab0aaaa", "%s", order);
    world_free(w);
}

Test(queues, a_request_does_not_wait_behind_a_load_that_it_does_not_need)
{
    world *w = world_new(NULL);
    uint64_t epoch = world_join(w, "w1", 1, 4, "a:1");
    world_want(w, "slow", "/slow", 0);
    world_submit(w, "c1", "s1", "slow", NULL);
    world_expect(w, "w1", QV_MSG_LOAD_ADAPTER);
    world_submit(w, "c1", "r1", "a", NULL);
    world_submit(w, "c1", "r2", NULL, NULL);
    cr_assert_str_eq(next_adapter(w, "w1", epoch), "a");
    cr_assert_str_eq(next_adapter(w, "w1", epoch), "");
    cr_assert_str_eq(next_adapter(w, "w1", epoch), "-");
    world_adapter_state(w, "w1", epoch, "slow", "ready", "s");
    cr_assert_str_eq(next_adapter(w, "w1", epoch), "slow");
    world_free(w);
}

Test(queues, requests_spread_over_the_replicas_of_their_adapter)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 4, 4, "a:1");
    world_join(w, "w2", 4, 4, "a:1");
    world_join(w, "w3", 4, 4, NULL);
    for (int i = 0; i < 6; i++) {
        char id[16];
        snprintf(id, sizeof id, "r%d", i);
        world_submit(w, "c1", id, "a", NULL);
    }
    for (int i = 0; i < 3; i++) {
        world_expect(w, "w1", QV_MSG_RUN);
        world_expect(w, "w2", QV_MSG_RUN);
    }
    cr_assert(world_is_silent(w, "w3"));
    world_free(w);
}

Test(queues, least_loaded_loads_where_there_is_room)
{
    qv_core_options options = qv_core_default_options();
    options.policy = &qv_route_least_loaded;
    world *w = world_new(&options);
    uint64_t e1 = world_join(w, "w1", 4, 1, NULL);
    world_want(w, "a", "/a", 1);
    world_expect(w, "w1", QV_MSG_LOAD_ADAPTER);
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_submit(w, "c1", "plug", NULL, NULL);
    world_expect(w, "w1", QV_MSG_RUN);
    uint64_t e2 = world_join(w, "w2", 4, 1, NULL);
    world_submit(w, "c1", "r1", "a", NULL);
    world_expect(w, "w2", QV_MSG_LOAD_ADAPTER);
    world_adapter_state(w, "w2", e2, "a", "ready", "d");
    world_expect(w, "w2", QV_MSG_RUN);
    world_free(w);
}
