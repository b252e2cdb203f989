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

static void draw(qv_pool *pool, const drawn *members, size_t n)
{
    cr_assert_eq(qv_pool_init(pool, 1), QV_OK);
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
        const qv_route_query query = {.pool = &pool, .group = group, .digest = q->digest};
        qv_route route = q->policy->choose(&query);
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
        qv_route_query query = {.pool = &pool, .group = pool.base, .digest = ""};
        qv_route base = qv_route_policies[i]->choose(&query);
        query.group = qv_pool_find_group(&pool, "a", 1);
        qv_route adapter = qv_route_policies[i]->choose(&query);
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

/* --- Score ------------------------------------------------------------------------------------*/

/* Run the next request of a worker to its end: so many prompt tokens, none of them cached. */
static void run_next(world *w, const char *worker, uint64_t epoch, int64_t prompt_tokens)
{
    const qv_msg_run *run = &world_expect(w, worker, QV_MSG_RUN)->run;
    qv_message message;
    qv_message_init(&message, QV_MSG_STEP);
    int32_t tokens[64] = {0};
    qv_msg_delta delta = {.request = run->request};
    qv_set(&delta, delta, index, 0);
    qv_set(&delta, delta, seq, 0);
    qv_set(&delta, delta, tokens, ((qv_ints){tokens, 64}));
    qv_set(&delta, delta, finish_reason, qv_str_from("stop"));
    qv_set(&delta, delta, usage, ((qv_msg_usage){.prompt_tokens = prompt_tokens}));
    message.step.epoch = epoch;
    message.step.deltas.data = &delta;
    message.step.deltas.count = 1;
    world_worker_message(w, worker, &message);
}

static const char *who_runs(world *w, const char *const *workers, size_t n)
{
    for (size_t i = 0; i < n; i++)
        for (const qv_message *m; (m = world_take(w, workers[i])) != NULL;)
            if (m->type == QV_MSG_RUN)
                return workers[i];
    return "-";
}

/* "prompt" as JSON: so many bytes of a letter. */
static const char *long_prompt(char *buffer, char letter, size_t n)
{
    buffer[0] = '"';
    memset(buffer + 1, letter, n);
    memcpy(buffer + 1 + n, "\"", 2);
    return buffer;
}

Test(score, a_prompt_goes_where_its_beginning_was_computed)
{
    world *w = world_new(NULL);
    static const char *const workers[] = {"w1", "w2", "w3"};
    uint64_t epochs[3];
    char a[2100], json[4096];
    for (int i = 0; i < 3; i++)
        epochs[i] = world_join(w, workers[i], 8, 2, NULL);
    for (int i = 0; i < 3; i++) { /* each measures its prefill rate with a prompt of its own */
        char id[8] = {'m', (char)('0' + i), 0};
        world_submit(w, "c1", id, NULL, NULL);
        w->now_us += 20000;
        run_next(w, workers[i], epochs[i], 500);
    }
    long_prompt(a, 'a', 2000);
    const char *first = NULL;
    for (int i = 0; i < 4; i++) {
        snprintf(json, sizeof json,
                 "{\"type\":\"submit\",\"id\":\"p%d\",\"max_tokens\":1,\"prompt\":%s}", i, a);
        world_client_json(w, "c1", json);
        const char *now = who_runs(w, workers, 3);
        first = first == NULL ? now : first;
        cr_assert_str_eq(now, first, "request %d with the same beginning", i);
    }
    world_free(w);
}

Test(score, a_slow_worker_gets_less)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 64, 2, NULL);
    world_join(w, "w2", 64, 2, NULL);
    qv_pool *pool = (qv_pool *)qv_core_pool(w->core);
    qv_pool_find_id(pool, "w1")->rate = 3000;
    qv_pool_find_id(pool, "w2")->rate = 1000;
    int n = 0;
    for (int i = 0; i < 40; i++) {
        char id[16];
        snprintf(id, sizeof id, "r%d", i);
        world_submit(w, "c1", id, NULL, NULL);
    }
    for (const qv_message *m; (m = world_take(w, "w1")) != NULL;)
        n += m->type == QV_MSG_RUN;
    cr_assert(n >= 28 && n <= 32, "%d of 40 went to the worker that is three times as fast", n);
    world_free(w);
}

Test(score, an_adapter_whose_holders_are_full_spills_over_when_a_load_is_quicker)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 2, 4, NULL);
    world_want(w, "a", "/a", 0);
    world_submit(w, "c1", "r0", "a", NULL);
    world_expect(w, "w1", QV_MSG_LOAD_ADAPTER);
    w->now_us += 50000;
    world_adapter_state(w, "w1", e1, "a", "ready", "d");
    world_expect(w, "w1", QV_MSG_RUN);
    world_join(w, "w2", 2, 4, NULL);
    ((qv_pool *)qv_core_pool(w->core))->rate = 1000;
    world_submit(w, "c1", "r1", "a", NULL);
    cr_assert(world_is_silent(w, "w2"));
    world_submit(w, "c1", "r2", "a", NULL); /* it would wait 256 ms and more; a load takes 50 */
    world_expect(w, "w2", QV_MSG_LOAD_ADAPTER);
    world_free(w);
}

/* --- Deadlines --------------------------------------------------------------------------------*/

Test(deadline, that_cannot_be_met_is_refused_at_once_with_the_estimate)
{
    world *w = world_new(NULL);
    world_join(w, "w1", 1, 2, NULL);
    ((qv_pool *)qv_core_pool(w->core))->full_rate = 100;
    for (int i = 0; i < 5; i++) {
        char id[8] = {'r', (char)('0' + i), 0};
        world_submit(w, "c1", id, NULL, NULL);
        world_expect(w, "c1", QV_MSG_ACCEPTED);
    }
    world_submit(w, "c1", "late", NULL, "deadline_ms", "1000", NULL);
    const qv_msg_error *error = &world_expect(w, "c1", QV_MSG_ERROR)->error;
    cr_assert(qv_str_equal(error->code, "DEADLINE"));
    cr_assert(memmem(error->message.data, error->message.size, "expected in", 11), "%.*s",
              (int)error->message.size, error->message.data);
    cr_assert_gt(error->retry_after_ms, 5000);
    world_submit(w, "c1", "soon", NULL, "deadline_ms", "60000", NULL);
    world_expect(w, "c1", QV_MSG_ACCEPTED);
    world_free(w);
}

/* --- explain ----------------------------------------------------------------------------------*/

static const qv_msg_explain *explain(world *w, const char *id)
{
    char json[128];
    snprintf(json, sizeof json, "{\"type\":\"explain\",\"id\":\"%s\"}", id);
    world_client_json(w, "asker", json);
    return &world_expect(w, "asker", QV_MSG_EXPLAIN)->explain;
}

Test(explain, tells_what_a_request_waited_for_and_where_it_went)
{
    world *w = world_new(NULL);
    uint64_t e1 = world_join(w, "w1", 1, 2, NULL);
    uint64_t e2 = world_join(w, "w2", 1, 2, NULL);
    world_want(w, "a", "/a", 0);
    world_submit(w, "c1", "r1", "a", "tenant", "\"acme\"", NULL);
    const qv_msg_explain *x = explain(w, "r1");
    cr_assert(qv_str_equal(x->state, "queued"));
    cr_assert(qv_str_equal(x->waits.data[x->waits.count - 1].reason, "load"));
    bool on_first = world_take(w, "w1") != NULL;
    const char *worker = on_first ? "w1" : "w2";
    w->now_us += 70000;
    world_adapter_state(w, worker, on_first ? e1 : e2, "a", "ready", "d");
    w->now_us += 10000;
    world_goodbye(w, worker, on_first ? e1 : e2);
    const char *other = on_first ? "w2" : "w1";
    world_expect(w, other, QV_MSG_LOAD_ADAPTER);
    w->now_us += 30000;
    world_adapter_state(w, other, on_first ? e2 : e1, "a", "ready", "d");
    const qv_msg_run *run = &world_expect(w, other, QV_MSG_RUN)->run;
    world_delta(w, other, on_first ? e2 : e1, run->request, 0, 0, "x", "stop");
    x = explain(w, "r1");
    cr_assert(qv_str_equal(x->state, "done"));
    cr_assert(qv_str_equal(x->tenant, "acme") && qv_str_equal(x->adapter, "a"));
    cr_assert_eq(x->attempts.count, 2);
    cr_assert(qv_str_equal(x->attempts.data[0].worker, worker));
    cr_assert(qv_str_equal(x->attempts.data[1].worker, other));
    cr_assert(qv_str_equal(x->attempts.data[1].end, "done"));
    double load_ms = 0;
    for (uint32_t i = 0; i < x->waits.count; i++)
        if (qv_str_equal(x->waits.data[i].reason, "load"))
            load_ms = x->waits.data[i].ms;
    cr_assert(load_ms >= 70 && load_ms <= 100, "%g ms", load_ms);
    cr_assert_eq(x->decisions.count, 2);
    cr_assert(qv_str_equal(x->decisions.data[1].verdict, "send"));
    cr_assert(qv_str_equal(x->decisions.data[1].candidates.data[0].worker, other));
    world_free(w);
}

Test(explain, remembers_the_latest_only_and_says_so)
{
    qv_core_options options = qv_core_default_options();
    options.max_explained = 4;
    world *w = world_new(&options);
    for (int i = 0; i < 6; i++) {
        char id[8] = {'r', (char)('0' + i), 0};
        world_submit(w, "c1", id, NULL, NULL);
    }
    cr_assert(qv_str_equal(explain(w, "r2")->waits.data[0].reason, "worker") ||
              qv_str_equal(explain(w, "r2")->waits.data[0].reason, "turn"));
    world_client_json(w, "asker", "{\"type\":\"explain\",\"id\":\"r1\"}");
    const qv_msg_error *error = &world_expect(w, "asker", QV_MSG_ERROR)->error;
    cr_assert(memmem(error->message.data, error->message.size, "latest 4", 8));
    world_free(w);
}
