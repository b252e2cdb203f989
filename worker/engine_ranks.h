/* The backends that an engine's model is split over: one a rank, as --tp, --ep and --devices ask.
 */
#ifndef QV_WORKER_ENGINE_RANKS_H
#define QV_WORKER_ENGINE_RANKS_H

#include "worker/engine.h"

typedef struct {
    qv_backend *backends[QV_MAX_RANKS]; /* owned; [0] is the engine thread's */
    qv_model_ranks ranks;               /* its backends point above */
    char device[256];                   /* "2 ranks: cpu, 1 thread, avx512, exact gemm" */
} qv_engine_ranks;

/* Open them all. Threads of the CPU are shared out among its ranks. Errors: ARG (tp, ep or devices
 * make no sense together; says which), those of qv_backend_open. Close also after a failure. */
qv_status qv_engine_ranks_open(const qv_engine_options *options, qv_engine_ranks *out);
void qv_engine_ranks_close(qv_engine_ranks *ranks);

#endif
