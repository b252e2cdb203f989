/* Collectives of CPU ranks: they read each other's memory between barriers. */
#include "ops/comm.h"
#include "ops/cpu/cpu.h"

#include <string.h>

/* Tensors of a collective, as all ranks see them. */
typedef struct {
    qv_comm *comm;
    int32_t rank, n_ranks;
    qv_tensor *of[QV_MAX_RANKS];
} meeting;

/* Show `mine` to the others and see theirs. It must live until the last barrier. */
static qv_status meet(qv_backend *be, qv_tensor *mine, meeting *m)
{
    *m = (meeting){.comm = be->comm, .rank = be->rank, .n_ranks = qv_comm_n_ranks(be->comm)};
    qv_comm_publish(m->comm, m->rank, mine);
    QV_TRY(qv_comm_barrier(m->comm));
    for (int32_t r = 0; r < m->n_ranks; r++)
        m->of[r] = qv_comm_published(m->comm, r);
    return QV_OK;
}

/* Rank r adds up the r-th part of the columns of every row, in its own tensor, then all copy the
 * parts from each other. */
qv_status qv_cpu_all_reduce(qv_backend *be, qv_tensor x)
{
    meeting m;
    QV_TRY(meet(be, &x, &m));
    int64_t n = x.shape[1], first = n * m.rank / m.n_ranks, end = n * (m.rank + 1) / m.n_ranks;
    for (int64_t row = 0; row < x.shape[0]; row++) {
        float *sum = qv_row2(x, row);
        for (int64_t i = first; i < end; i++) {
            float s = 0;
            for (int32_t r = 0; r < m.n_ranks; r++)
                s += qv_row2(*m.of[r], row)[i];
            sum[i] = s;
        }
    }
    QV_TRY(qv_comm_barrier(m.comm));
    for (int32_t r = 0; r < m.n_ranks; r++) {
        int64_t from = n * r / m.n_ranks, to = n * (r + 1) / m.n_ranks;
        for (int64_t row = 0; row < x.shape[0] && r != m.rank; row++)
            memcpy(qv_row2(x, row) + from, qv_row2(*m.of[r], row) + from,
                   (size_t)(to - from) * sizeof(float));
    }
    return qv_comm_barrier(m.comm); /* nobody reads this tensor any more */
}

qv_status qv_cpu_gather_cols(qv_backend *be, qv_tensor part, qv_tensor whole)
{
    meeting m;
    QV_TRY(meet(be, &part, &m));
    int64_t col = 0;
    for (int32_t r = 0; r < m.n_ranks && m.rank == 0; r++) {
        for (int64_t row = 0; row < whole.shape[0]; row++)
            memcpy(qv_row2(whole, row) + col, qv_row2(*m.of[r], row),
                   (size_t)m.of[r]->shape[1] * sizeof(float));
        col += m.of[r]->shape[1];
    }
    return qv_comm_barrier(m.comm);
}
