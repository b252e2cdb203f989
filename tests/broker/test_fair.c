/* Who is served next: shares of tenants by weight, turns of lanes, priority as a head start, and
 * that nobody starves whatever the others send. */
#include "broker/requests.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TENANTS 8
#define MAX_GROUPS  6

/* One worker that serves a request at a time, as fast as the test asks. */
typedef struct {
    qv_fair fair;
    qv_rng rng;
    qv_group groups[MAX_GROUPS];
    uint64_t serial;
    int64_t now_us;
    double served; /* in all */
} bench;

static void bench_init(bench *b, uint64_t seed)
{
    *b = (bench){.rng = qv_rng_seed(seed), .now_us = 1000000000};
    cr_assert_eq(qv_fair_init(&b->fair), QV_OK);
    for (int i = 0; i < MAX_GROUPS; i++) {
        b->groups[i].name = (char *)"g";
        qv_list_init(&b->groups[i].lanes);
    }
}

static qv_tenant *tenant(bench *b, const char *name, double weight)
{
    const qv_tenant_policy policy = {.weight = weight};
    cr_assert_eq(qv_fair_set_policy(&b->fair, name, &policy), QV_OK);
    return qv_fair_require_tenant(&b->fair, name, strlen(name));
}

static qv_job *submit(bench *b, qv_tenant *t, int group, double cost, int32_t priority)
{
    qv_job *job = calloc(1, sizeof *job);
    job->tenant = t;
    job->group = &b->groups[group];
    job->cost = cost;
    job->priority = priority;
    job->serial = ++b->serial;
    job->rank_us = b->now_us - priority * QV_FAIR_PRIORITY_US;
    job->queue_place = QV_HEAP_NONE;
    cr_assert_eq(qv_fair_push(&b->fair, job), QV_OK);
    return job;
}

/* Take the next one out and charge it; the caller frees it. */
static qv_job *serve(bench *b)
{
    qv_job *job = qv_fair_next(&b->fair);
    if (job == NULL)
        return NULL;
    qv_fair_remove(&b->fair, job);
    qv_fair_charge(job);
    b->served += job->cost;
    cr_assert_eq(qv_fair_check(&b->fair), QV_OK, "%s", qv_error());
    return job;
}

static void finish(bench *b)
{
    for (int i = 0; i < MAX_GROUPS; i++)
        qv_fair_unblock(&b->groups[i]);
    qv_job *job;
    while ((job = serve(b)) != NULL)
        free(job);
    qv_fair_deinit(&b->fair);
}

/* --- Shares -----------------------------------------------------------------------------------*/

/* The bound of start time fair queueing: of two tenants that always have something to send, at
 * every moment, service by weight differs by one largest request of each at most. */
static void check_shares(uint64_t seed, bool is_estimate)
{
    static const double weights[] = {1, 2, 0.5, 1, 4};
    const int n = sizeof weights / sizeof weights[0];
    const double largest = 1000;
    bench b;
    bench_init(&b, seed);
    qv_tenant *tenants[MAX_TENANTS];
    double served[MAX_TENANTS] = {0};
    for (int i = 0; i < n; i++) {
        char name[8];
        snprintf(name, sizeof name, "t%d", i);
        tenants[i] = tenant(&b, name, weights[i]);
        for (int k = 0; k < 3; k++)
            submit(&b, tenants[i], k % 2, 1 + (double)qv_rng_range(&b.rng, 0, (int64_t)largest), 0);
    }
    for (int step = 0; step < 20000; step++) {
        qv_job *job = serve(&b);
        int who = job->tenant->name[1] - '0';
        double actual =
            is_estimate ? 1 + (double)qv_rng_range(&b.rng, 0, (int64_t)largest) : job->cost;
        qv_fair_settle(job, actual);
        served[who] += actual;
        free(job);
        submit(&b, tenants[who], (int)qv_rng_range(&b.rng, 0, 3),
               1 + (double)qv_rng_range(&b.rng, 0, (int64_t)largest),
               (int32_t)qv_rng_range(&b.rng, 0, 5));
        for (int i = 0; i < n; i++)
            for (int j = 0; j < i; j++) {
                double gap = fabs(served[i] / weights[i] - served[j] / weights[j]);
                double bound = largest / weights[i] + largest / weights[j];
                cr_assert_leq(gap, bound + 1e-6, "seed %llu step %d: t%d and t%d are %g apart",
                              (unsigned long long)seed, step, i, j, gap);
            }
    }
    cr_assert_gt(served[4], 6 * served[2], "shares follow weights: %g and %g", served[4],
                 served[2]);
    finish(&b);
}

Test(fair, shares_differ_by_one_largest_request_at_most)
{
    for (uint64_t seed = 1; seed <= 5; seed++)
        check_shares(seed, false);
}

Test(fair, shares_hold_when_costs_were_guessed_wrong)
{
    for (uint64_t seed = 1; seed <= 5; seed++)
        check_shares(seed, true);
}

Test(fair, a_pause_saves_nothing_up)
{
    bench b;
    bench_init(&b, 1);
    qv_tenant *busy = tenant(&b, "busy", 1), *late = tenant(&b, "late", 1);
    for (int i = 0; i < 100; i++)
        submit(&b, busy, 0, 10, 0);
    for (int i = 0; i < 50; i++)
        free(serve(&b));
    for (int i = 0; i < 20; i++)
        submit(&b, late, 0, 10, 0);
    int n_late = 0;
    for (int i = 0; i < 20; i++) {
        qv_job *job = serve(&b);
        n_late += job->tenant == late;
        free(job);
    }
    cr_assert(n_late >= 9 && n_late <= 11, "%d of 20 after a pause", n_late);
    finish(&b);
}

/* --- Starvation -------------------------------------------------------------------------------*/

/* One request of the least priority among tenants, lanes and priorities that are drawn anew at each
 * step to be as bad for it as they can: it is sent before more than a bound, that follows from the
 * numbers of tenants and lanes alone, was served to others. */
static void check_victim(uint64_t seed)
{
    bench b;
    bench_init(&b, seed);
    const double largest = 500, step_us = 50000; /* of time per request: 20 a second */
    int n_tenants = 2 + (int)qv_rng_range(&b.rng, 0, MAX_TENANTS - 2);
    qv_tenant *tenants[MAX_TENANTS];
    for (int i = 0; i < n_tenants; i++) {
        char name[8];
        snprintf(name, sizeof name, "t%d", i);
        tenants[i] = tenant(&b, name, 1);
    }
    for (int i = 0; i < 200; i++)
        submit(&b, tenants[qv_rng_range(&b.rng, 0, n_tenants)],
               (int)qv_rng_range(&b.rng, 0, MAX_GROUPS), largest, 100);
    double before = b.served;
    qv_job *victim = submit(&b, tenants[0], 0, largest, -100);
    double in_lane = 200 * (double)QV_FAIR_PRIORITY_US / step_us * largest; /* head start in time */
    double in_tenant = MAX_GROUPS * (in_lane + 200 * QV_FAIR_PRIORITY_COST + 2 * largest);
    double bound = n_tenants * (in_tenant + 200 * largest + 2 * largest);
    for (;;) {
        b.now_us += (int64_t)step_us;
        qv_job *job = serve(&b);
        bool is_victim = job == victim;
        free(job);
        if (is_victim)
            break;
        cr_assert_leq(b.served - before, bound, "seed %llu: it starves", (unsigned long long)seed);
        for (int i = 0; i < 2; i++) /* the queue grows for ever */
            submit(&b, tenants[qv_rng_range(&b.rng, 0, n_tenants)],
                   (int)qv_rng_range(&b.rng, 0, MAX_GROUPS), largest, 100);
    }
    finish(&b);
}

Test(fair, nobody_starves_whatever_the_others_send)
{
    for (uint64_t seed = 1; seed <= 3; seed++)
        check_victim(seed);
}

/* Twenty requests of cost 100 after a load that cost one tenant as much as ten. */
Test(fair, a_load_is_paid_by_the_tenant_that_caused_it)
{
    bench b;
    bench_init(&b, 1);
    qv_tenant *a = tenant(&b, "a", 1), *c = tenant(&b, "c", 1);
    for (int i = 0; i < 40; i++)
        submit(&b, i % 2 == 0 ? a : c, 0, 100, 0);
    qv_fair_charge_load(a, &b.groups[0], 1000);
    cr_assert_str_eq(qv_fair_tenant_waiting(&b.groups[0]), "a");
    cr_assert_null(qv_fair_tenant_waiting(&b.groups[1]));
    int n_of_a = 0;
    for (int i = 0; i < 20; i++) {
        qv_job *job = serve(&b);
        n_of_a += job->tenant == a;
        free(job);
    }
    cr_assert_eq(n_of_a, 5);
    cr_assert_float_eq(a->loads, 1000, 1e-9);
    cr_assert_float_eq(a->served, 500, 1e-9);
    finish(&b);
}

/* Time passes while nobody waits: a pause saves nothing up, and forgives nothing either. */
Test(fair, a_load_that_ends_after_its_requests_is_paid_too)
{
    bench b;
    bench_init(&b, 1);
    qv_tenant *a = tenant(&b, "a", 1), *c = tenant(&b, "c", 1);
    submit(&b, c, 0, 5000, 0);
    free(serve(&b));
    qv_fair_charge_load(a, &b.groups[0], 1000); /* nothing of it waits */
    for (int i = 0; i < 40; i++)
        submit(&b, i % 2 == 0 ? a : c, 0, 100, 0);
    double ahead = a->counter - c->counter;
    cr_assert_float_eq(ahead + 5000, 1000, 1e-9, "a is %g ahead", ahead);
    finish(&b);
}

/* --- Order ------------------------------------------------------------------------------------*/

Test(fair, priority_is_a_head_start_within_a_lane_and_between_lanes)
{
    bench b;
    bench_init(&b, 1);
    qv_tenant *t = tenant(&b, "", 1);
    qv_job *low = submit(&b, t, 0, 10, -1), *normal = submit(&b, t, 0, 10, 0);
    qv_job *high = submit(&b, t, 0, 10, 1), *other = submit(&b, t, 1, 10, 2);
    qv_job *order[] = {other, high, normal, low};
    for (int i = 0; i < 4; i++) {
        qv_job *job = serve(&b);
        cr_assert_eq(job, order[i], "place %d is the one of priority %d", i, job->priority);
        free(job);
    }
    finish(&b);
}

Test(fair, a_blocked_lane_holds_up_nobody_and_comes_back)
{
    bench b;
    bench_init(&b, 1);
    qv_tenant *a = tenant(&b, "a", 1), *c = tenant(&b, "c", 1);
    qv_job *stuck = submit(&b, a, 0, 10, 0), *behind = submit(&b, a, 0, 10, 0);
    qv_job *free_one = submit(&b, a, 1, 10, 0), *of_c = submit(&b, c, 0, 10, 0);
    cr_assert_eq(qv_fair_next(&b.fair), stuck);
    qv_fair_block(stuck);
    const qv_job *first = serve(&b), *second = serve(&b);
    cr_assert((first == free_one && second == of_c) || (first == of_c && second == free_one));
    cr_assert_null(qv_fair_next(&b.fair));
    qv_job *urgent = submit(&b, a, 0, 10, 50); /* a new head may have better luck */
    cr_assert_eq(qv_fair_next(&b.fair), urgent);
    qv_fair_block(urgent);
    qv_fair_unblock(&b.groups[0]);
    cr_assert_eq(serve(&b), urgent);
    cr_assert_eq(serve(&b), stuck);
    cr_assert_eq(serve(&b), behind);
    free(free_one), free(of_c), free(urgent), free(stuck), free(behind);
    finish(&b);
}

Test(fair, a_tenant_at_its_limit_waits_and_others_go_on)
{
    bench b;
    bench_init(&b, 1);
    qv_tenant *a = tenant(&b, "a", 1), *c = tenant(&b, "c", 1);
    a->policy = (qv_tenant_policy){.weight = 1, .max_queued = 3, .max_running = 1};
    for (int i = 0; i < 3; i++)
        submit(&b, a, 0, 10, 0);
    cr_assert_eq(qv_tenant_check(a), QV_ERR_BUSY);
    cr_assert_eq(qv_tenant_check(c), QV_OK);
    qv_job *running = serve(&b);
    qv_fair_running(running, 1);
    cr_assert_null(qv_fair_next(&b.fair));
    qv_job *of_c = submit(&b, c, 0, 10, 0);
    cr_assert_eq(serve(&b), of_c);
    qv_fair_running(running, -1);
    cr_assert_not_null(qv_fair_next(&b.fair));
    free(running), free(of_c);
    finish(&b);
}

Test(fair, idle_tenants_are_forgotten_and_their_number_is_bounded)
{
    bench b;
    bench_init(&b, 1);
    tenant(&b, "kept", 2);
    for (int i = 0; i < 2 * QV_FAIR_MAX_TENANTS; i++) {
        char name[16];
        snprintf(name, sizeof name, "n%d", i);
        cr_assert_not_null(qv_fair_require_tenant(&b.fair, name, strlen(name)));
    }
    cr_assert_leq(qv_map_count(b.fair.by_name), QV_FAIR_MAX_TENANTS + 1);
    qv_fair_tick(&b.fair);
    cr_assert_eq(qv_map_count(b.fair.by_name), 1);
    cr_assert_eq(qv_fair_require_tenant(&b.fair, "kept", 4)->policy.weight, 2);
    finish(&b);
}
