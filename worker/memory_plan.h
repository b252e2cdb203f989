/* From settings to sizes: how many pages, how long a context, how many rows of logits a worker can
 * afford, decided once before anything is allocated, and said in the log: a line for all, and with
 * several ranks one for each.
 */
#ifndef QV_WORKER_MEMORY_PLAN_H
#define QV_WORKER_MEMORY_PLAN_H

#include "worker/engine.h"

typedef struct {
    qv_model_limits limits;
    qv_memory_plan plan; /* of all ranks together */
    int32_t n_ranks;
    qv_memory_plan of_rank[QV_MAX_RANKS];
    int32_t max_context; /* prompt and answer together */
} qv_engine_sizes;

/* Bytes of memory that this process may still take: what the system has available, or what its
 * control group leaves, whichever is less. */
uint64_t qv_available_memory(void);

/* `available` bounds the plan of all ranks together and, with kv_bytes 0, twice the KV cache. Where
 * ranks have memory of their own, each one's plan must fit there as well.
 * Errors: ARG (a context longer than the model's), LIMIT (the plan does not fit, or that of a rank,
 * which it names; says what to lower), those of qv_model_plan. */
qv_status qv_engine_sizes_plan(const qv_engine_options *options, const qv_model_config *config,
                               const qv_model_ranks *ranks, uint64_t available,
                               qv_engine_sizes *out);

/* At info level: one line, and with several ranks one for each. */
void qv_engine_sizes_log(const qv_engine_sizes *sizes);

#endif
