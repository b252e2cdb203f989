#include "ops/cpu/pool.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_THREADS  1024
#define HAND_OVER_NS 20000 /* a job shorter than this is done before a worker has noticed it */
#define WAKE_NS      60000 /* and one shorter than this before a sleeping worker is awake */
#define GRAIN_NS     8000  /* items taken at once last about this long */
#define SPINS        4000  /* looks at the gate before sleeping: some 50 us */
#define YIELD_EVERY  64    /* looks between two offers of the core to somebody else */

/* The gate says whether a worker may join the job: | generation : 47 | open : 1 | inside : 16 |.
 * A worker joins by counting itself in while the gate is open; the caller closes it when no item is
 * left and waits until nobody is inside. So a worker that wakes late delays nobody. */
#define GATE_INSIDE     UINT64_C(0xFFFF)
#define GATE_OPEN       UINT64_C(0x10000)
#define GATE_GENERATION 17

struct qv_pool {
    int n_threads;
    int n_started; /* workers running; workers have thread numbers 1 .. n_started */
    pthread_t *threads;

    /* The job. Written by the caller while the gate is closed and nobody is inside; read by those
     * inside. The gate orders both. */
    qv_pool_fn *fn;
    void *ctx;
    int64_t n_items, grain;

    _Alignas(64) _Atomic uint64_t gate;
    _Alignas(64) atomic_int_fast64_t next; /* first item not taken; items need no order */
    /* Sleeping: a worker counts itself in n_sleeping and then looks at the gate once more; the
     * caller opens the gate, changes `wake` and then looks at n_sleeping. Sequential consistency
     * makes one of them see the other. */
    _Alignas(64) _Atomic uint32_t wake; /* futex word */
    atomic_int n_sleeping;
    atomic_bool quit;
};

typedef struct {
    qv_pool *pool;
    int thread;
} worker_args;

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void take_items(qv_pool *pool, int thread)
{
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&pool->next, pool->grain, memory_order_relaxed);
        if (begin >= pool->n_items)
            return;
        int64_t left = pool->n_items - begin;
        pool->fn(pool->ctx, begin, begin + (left < pool->grain ? left : pool->grain), thread);
    }
}

/* --- Workers ------------------------------------------------------------------------------ */

static bool has_news(qv_pool *pool, uint64_t generation)
{
    uint64_t gate = atomic_load_explicit(&pool->gate, memory_order_seq_cst);
    return ((gate & GATE_OPEN) && gate >> GATE_GENERATION != generation) ||
           atomic_load_explicit(&pool->quit, memory_order_seq_cst);
}

/* Until a job other than `generation` is open, or the pool ends. */
static void wait_for_news(qv_pool *pool, uint64_t generation)
{
    for (int i = 1; i <= SPINS; i++) {
        if (has_news(pool, generation))
            return;
        relax();
        if (i % YIELD_EVERY == 0)
            sched_yield();
    }
    atomic_fetch_add_explicit(&pool->n_sleeping, 1, memory_order_seq_cst);
    for (;;) {
        uint32_t value = atomic_load_explicit(&pool->wake, memory_order_seq_cst);
        if (has_news(pool, generation))
            break;
        futex_wait(&pool->wake, value);
    }
    atomic_fetch_sub_explicit(&pool->n_sleeping, 1, memory_order_seq_cst);
}

/* Join the open job, if there still is one other than *generation. */
static bool enter(qv_pool *pool, uint64_t *generation)
{
    uint64_t gate = atomic_load_explicit(&pool->gate, memory_order_relaxed);
    while ((gate & GATE_OPEN) && gate >> GATE_GENERATION != *generation)
        if (atomic_compare_exchange_weak_explicit(&pool->gate, &gate, gate + 1,
                                                  memory_order_acquire, memory_order_relaxed)) {
            *generation = gate >> GATE_GENERATION;
            return true;
        }
    return false;
}

static void *worker_main(void *arg)
{
    worker_args args = *(worker_args *)arg;
    free(arg);
    qv_pool *pool = args.pool;
    uint64_t generation = 0;
    while (wait_for_news(pool, generation),
           !atomic_load_explicit(&pool->quit, memory_order_acquire))
        if (enter(pool, &generation)) {
            take_items(pool, args.thread);
            atomic_fetch_sub_explicit(&pool->gate, 1, memory_order_release);
        }
    return NULL;
}

static qv_status start_worker(qv_pool *pool)
{
    worker_args *args = malloc(sizeof *args);
    if (!args)
        return qv_fail(QV_ERR_NOMEM, "pool: no memory for thread %d", pool->n_started + 1);
    *args = (worker_args){.pool = pool, .thread = pool->n_started + 1};
    int err = pthread_create(&pool->threads[pool->n_started], NULL, worker_main, args);
    if (err) {
        free(args);
        return qv_fail(QV_ERR_LIMIT, "pool: cannot start thread %d of %d: %s", pool->n_started + 1,
                       pool->n_threads, strerror(err));
    }
    pool->n_started++;
    return QV_OK;
}

/* Signals are for the program's own threads: workers start with all of them blocked. */
static qv_status start_workers(qv_pool *pool)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    qv_status status = QV_OK;
    while (status == QV_OK && pool->n_started < pool->n_threads - 1)
        status = start_worker(pool);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}

/* --- Pool --------------------------------------------------------------------------------- */

static int n_allowed_cpus(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

qv_status qv_pool_new(int n_threads, qv_pool **out)
{
    if (n_threads < 0 || n_threads > MAX_THREADS)
        return qv_fail(QV_ERR_ARG, "pool: %d threads, but 0 to %d are possible", n_threads,
                       MAX_THREADS);
    qv_pool *pool = aligned_alloc(64, sizeof *pool);
    if (!pool)
        return qv_fail(QV_ERR_NOMEM, "pool: no memory");
    memset(pool, 0, sizeof *pool);
    pool->n_threads = n_threads ? n_threads : n_allowed_cpus();
    pool->threads = calloc((size_t)pool->n_threads, sizeof *pool->threads);
    qv_status status =
        pool->threads ? start_workers(pool) : qv_fail(QV_ERR_NOMEM, "pool: no memory");
    if (status != QV_OK) {
        qv_pool_free(pool);
        return status;
    }
    *out = pool;
    return QV_OK;
}

void qv_pool_free(qv_pool *pool)
{
    if (!pool)
        return;
    atomic_store_explicit(&pool->quit, true, memory_order_seq_cst);
    atomic_fetch_add_explicit(&pool->wake, 1, memory_order_seq_cst);
    futex_wake_all(&pool->wake);
    for (int i = 0; i < pool->n_started; i++)
        pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool);
}

int qv_pool_n_threads(const qv_pool *pool)
{
    return pool->n_threads;
}

/* About GRAIN_NS each, but at least four takes per thread, so that a slow one holds up little. */
static int64_t choose_grain(const qv_pool *pool, int64_t n_items, int64_t item_ns)
{
    int64_t by_time = item_ns > 0 ? GRAIN_NS / item_ns : GRAIN_NS;
    int64_t by_share = n_items / (4 * (int64_t)pool->n_threads);
    int64_t grain = by_time < by_share ? by_time : by_share;
    return grain > 0 ? grain : 1;
}

static void open_gate(qv_pool *pool, bool wake_sleepers)
{
    uint64_t generation =
        (atomic_load_explicit(&pool->gate, memory_order_relaxed) >> GATE_GENERATION) + 1;
    atomic_store_explicit(&pool->gate, generation << GATE_GENERATION | GATE_OPEN,
                          memory_order_seq_cst);
    if (!wake_sleepers)
        return;
    atomic_fetch_add_explicit(&pool->wake, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&pool->n_sleeping, memory_order_seq_cst) > 0)
        futex_wake_all(&pool->wake);
}

static void close_gate(qv_pool *pool)
{
    atomic_fetch_and_explicit(&pool->gate, ~GATE_OPEN, memory_order_acq_rel);
    for (int i = 1; atomic_load_explicit(&pool->gate, memory_order_acquire) & GATE_INSIDE; i++) {
        relax();
        if (i % YIELD_EVERY == 0)
            sched_yield();
    }
}

void qv_pool_run(qv_pool *pool, int64_t n_items, int64_t item_ns, qv_pool_fn *fn, void *ctx)
{
    if (n_items <= 0)
        return;
    int64_t total_ns =
        item_ns > INT64_MAX / n_items ? INT64_MAX : n_items * (item_ns > 0 ? item_ns : 1);
    if (n_items == 1 || pool->n_started == 0 || total_ns < HAND_OVER_NS) {
        fn(ctx, 0, n_items, 0);
        return;
    }
    pool->fn = fn;
    pool->ctx = ctx;
    pool->n_items = n_items;
    pool->grain = choose_grain(pool, n_items, item_ns);
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    open_gate(pool, total_ns >= WAKE_NS);
    take_items(pool, 0);
    close_gate(pool);
}
