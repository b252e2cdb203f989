#include "ops/cpu/pool.h"

#include <criterion/criterion.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#define LONG_NS 1000000 /* an estimate that makes any job worth a hand-over */

typedef struct {
    atomic_int *times;       /* how often each item was computed */
    atomic_int threads_seen; /* bit per thread */
    int n_threads;
} count_ctx;

static void count_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    count_ctx *c = ctx;
    cr_assert(thread >= 0 && thread < c->n_threads);
    atomic_fetch_or(&c->threads_seen, 1 << thread);
    for (int64_t i = begin; i < end; i++)
        atomic_fetch_add(&c->times[i], 1);
}

Test(pool, computes_every_item_once)
{
    static const int64_t sizes[] = {0, 1, 2, 3, 7, 64, 1000, 12345};
    for (int n_threads = 1; n_threads <= 4; n_threads++) {
        qv_pool *pool;
        cr_assert_eq(qv_pool_new(n_threads, &pool), QV_OK);
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            for (int64_t item_ns = 1; item_ns <= LONG_NS; item_ns *= 100) {
                count_ctx c = {.times = calloc((size_t)sizes[s] + 1, sizeof(atomic_int)),
                               .n_threads = n_threads};
                qv_pool_run(pool, sizes[s], item_ns, count_items, &c);
                for (int64_t i = 0; i < sizes[s]; i++)
                    cr_assert_eq(c.times[i], 1, "item %lld of %lld, %d threads: %d times",
                                 (long long)i, (long long)sizes[s], n_threads, c.times[i]);
                cr_assert_eq(c.times[sizes[s]], 0);
                free(c.times);
            }
        qv_pool_free(pool);
    }
}

/* Jobs back to back, and after pauses in which the workers have gone to sleep. What a job writes
 * plainly, the caller and the next job read: the thread sanitizer watches the hand-overs. */
typedef struct {
    int64_t *values;
    int64_t add;
} chain_ctx;

static void add_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    chain_ctx *c = ctx;
    for (int64_t i = begin; i < end; i++)
        c->values[i] += c->add + i;
}

Test(pool, jobs_see_what_earlier_jobs_wrote)
{
    enum { N = 97, JOBS = 2000 };
    int64_t values[N] = {0};
    qv_pool *pool;
    cr_assert_eq(qv_pool_new(4, &pool), QV_OK);
    for (int job = 0; job < JOBS; job++) {
        chain_ctx c = {.values = values, .add = job};
        qv_pool_run(pool, N, LONG_NS, add_items, &c);
        if (job % 500 == 0)
            nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    }
    for (int64_t i = 0; i < N; i++)
        cr_assert_eq(values[i], (int64_t)JOBS * (JOBS - 1) / 2 + JOBS * i);
    qv_pool_free(pool);
}

/* Every thread waits inside its item until all have one: only possible if all take part. */
typedef struct {
    atomic_int arrived;
    int n_threads;
} meet_ctx;

static void meet(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)begin;
    (void)end;
    (void)thread;
    meet_ctx *c = ctx;
    atomic_fetch_add(&c->arrived, 1);
    while (atomic_load(&c->arrived) < c->n_threads)
        nanosleep(&(struct timespec){.tv_nsec = 10000}, NULL);
}

Test(pool, wakes_all_sleeping_workers_for_long_jobs)
{
    qv_pool *pool;
    cr_assert_eq(qv_pool_new(5, &pool), QV_OK);
    for (int round = 0; round < 3; round++) {
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
        meet_ctx c = {.n_threads = 5};
        qv_pool_run(pool, 5, LONG_NS, meet, &c);
        cr_assert_eq(c.arrived, 5);
    }
    qv_pool_free(pool);
}

Test(pool, keeps_short_jobs_on_the_caller)
{
    qv_pool *pool;
    cr_assert_eq(qv_pool_new(4, &pool), QV_OK);
    atomic_int times[10] = {0};
    for (int i = 0; i < 1000; i++) {
        count_ctx c = {.times = times, .n_threads = 4};
        qv_pool_run(pool, 10, 100, count_items, &c);
        cr_assert_eq(c.threads_seen, 1);
    }
    qv_pool_free(pool);
}

Test(pool, estimates_do_not_overflow)
{
    qv_pool *pool;
    cr_assert_eq(qv_pool_new(2, &pool), QV_OK);
    atomic_int times[3] = {0};
    count_ctx c = {.times = times, .n_threads = 2};
    qv_pool_run(pool, 3, INT64_MAX, count_items, &c);
    for (int i = 0; i < 3; i++)
        cr_assert_eq(times[i], 1);
    qv_pool_free(pool);
}

Test(pool, starts_and_stops_without_a_job)
{
    for (int i = 0; i < 50; i++) {
        qv_pool *pool;
        cr_assert_eq(qv_pool_new(1 + i % 8, &pool), QV_OK);
        qv_pool_free(pool);
    }
    qv_pool_free(NULL);
}

Test(pool, refuses_impossible_thread_counts)
{
    qv_pool *pool;
    cr_assert_eq(qv_pool_new(-1, &pool), QV_ERR_ARG);
    cr_assert_eq(qv_pool_new(1000000, &pool), QV_ERR_ARG);
}

Test(pool, zero_means_the_cpus_this_process_may_use)
{
    qv_pool *pool;
    cr_assert_eq(qv_pool_new(0, &pool), QV_OK);
    cr_assert_geq(qv_pool_n_threads(pool), 1);
    qv_pool_free(pool);
}
