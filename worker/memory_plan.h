/* From settings to sizes: how many pages, how long a context, how many rows of logits a worker can
 * afford, decided once before anything is allocated, and said in one line of the log.
 */
#ifndef QV_WORKER_MEMORY_PLAN_H
#define QV_WORKER_MEMORY_PLAN_H

#include "worker/engine.h"

typedef struct {
    qv_model_limits limits;
    qv_memory_plan plan;
    int32_t max_context; /* prompt and answer together */
} qv_engine_sizes;

/* Bytes of memory that this process may still take: what the system has available, or what its
 * control group leaves, whichever is less. */
uint64_t qv_available_memory(void);

/* The plan is that of all ranks together. `available` bounds it and, with kv_bytes 0, twice the KV
 * cache.
 * Errors: ARG (a context longer than the model's), LIMIT (the plan does not fit; says what to
 * lower), those of qv_model_plan. */
qv_status qv_engine_sizes_plan(const qv_engine_options *options, const qv_model_config *config,
                               const qv_model_ranks *ranks, uint64_t available,
                               qv_engine_sizes *out);

/* One line at info level. */
void qv_engine_sizes_log(const qv_engine_sizes *sizes);

#endif
