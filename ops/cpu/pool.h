/* qv_pool: the CPU backend's threads. One job at a time: a range of items that the caller and the
 * workers take from a shared counter. Which thread computes an item never changes its result, so
 * that the number of threads changes no bit of an answer.
 *
 * The pool belongs to the thread that made it, and only that thread runs jobs. Workers spin for a
 * moment after a job, because ops follow each other within microseconds during a step, and sleep
 * between steps. Running a job allocates nothing.
 */
#ifndef QV_OPS_CPU_POOL_H
#define QV_OPS_CPU_POOL_H

#include "common/status.h"

#include <stdint.h>

typedef struct qv_pool qv_pool;

/* Compute items [begin, end). `thread` is in [0, n_threads), 0 being the caller's. */
typedef void qv_pool_fn(void *ctx, int64_t begin, int64_t end, int thread);

/* n_threads counts the caller, so 1 starts none; 0 = as many as this process may run on.
 * Errors: ARG, NOMEM, LIMIT (the system refuses another thread). */
qv_status qv_pool_new(int n_threads, qv_pool **out);
void qv_pool_free(qv_pool *pool);
int qv_pool_n_threads(const qv_pool *pool);

/* Run fn over [0, n_items) and return when all are done. `item_ns` is about how long one item
 * takes; work too small to be worth a hand-over stays on the caller. Not to be called from within
 * fn. */
void qv_pool_run(qv_pool *pool, int64_t n_items, int64_t item_ns, qv_pool_fn *fn, void *ctx);

#endif
