/* qv_comm: what the ranks of one model share, so that they can add up and gather their parts.
 *
 * A rank is one backend driven by one thread. Ranks of one process meet in memory: the collectives
 * of ops.h (qv_op_all_reduce and so on) are called by every rank, in the same order, and return
 * when the result is there. Sums run in the order of ranks, so every rank gets the same bits, run
 * after run.
 *
 * A rank that fails must say so (qv_comm_fail): the others, which may wait for it in a collective,
 * then return DEVICE with its reason. A group that has failed stays failed.
 */
#ifndef QV_OPS_COMM_H
#define QV_OPS_COMM_H

#include "common/status.h"

#include <stdbool.h>
#include <stdint.h>

#define QV_MAX_RANKS 64

typedef struct qv_comm qv_comm;
typedef struct qv_backend qv_backend;

/* Errors: ARG, NOMEM. */
qv_status qv_comm_new(int32_t n_ranks, qv_comm **out);
/* After the backends that joined are closed. */
void qv_comm_free(qv_comm *comm);
int32_t qv_comm_n_ranks(const qv_comm *comm);

/* Make `be` rank `rank` of a group, before its first collective. `comm` must outlive it. A backend
 * that never joined is alone: its collectives do nothing. */
void qv_backend_join(qv_backend *be, qv_comm *comm, int32_t rank);
void qv_backend_leave(qv_backend *be);

/* Any rank, any thread: nobody shall wait for this rank any more. `reason` is kept, the first one.
 */
void qv_comm_fail(qv_comm *comm, int32_t rank, const char *reason);
/* The first rank that failed; -1: none has. */
int32_t qv_comm_first_failed(const qv_comm *comm);

/* For backends: *flag becomes 1 when any rank fails (at once if one has), for waits that no barrier
 * ends, such as a device's. One flag a rank; NULL: forget it, after which it is not touched. */
void qv_comm_flag_failure(qv_comm *comm, int32_t rank, volatile int32_t *flag);

/* For backends: wait until every rank is here. What a rank wrote before is seen by all after.
 * Errors: DEVICE (a rank failed; says which and why). */
qv_status qv_comm_barrier(qv_comm *comm);

/* For backends: leave a pointer for the others before a barrier, and read theirs after it. */
void qv_comm_publish(qv_comm *comm, int32_t rank, void *data);
void *qv_comm_published(const qv_comm *comm, int32_t rank);

#endif
