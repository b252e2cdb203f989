/* The threads of a model that is split over several ranks: rank 0 is the caller's thread, the
 * others have a thread each. A job is a function that every rank runs; it ends when all have.
 *
 * A rank whose function fails fails the group (ops/comm.h), so that no rank waits for it in a
 * collective; the job then returns the first failure, naming the rank. Engine thread only.
 */
#ifndef QV_MODELS_RANKS_H
#define QV_MODELS_RANKS_H

#include "ops/comm.h"

typedef struct qv_ranks qv_ranks;

/* `comm` is borrowed; NULL for a single rank, which needs no threads. Errors: NOMEM, LIMIT. */
qv_status qv_ranks_new(qv_comm *comm, qv_ranks **out);
/* Waits for the threads to end. */
void qv_ranks_free(qv_ranks *ranks);

typedef qv_status qv_rank_fn(int32_t rank, void *ctx);

/* Run `fn` on every rank. Errors: those of the first rank that failed. */
qv_status qv_ranks_run(qv_ranks *ranks, qv_rank_fn *fn, void *ctx);

#endif
