/* What a sampling chose, for a step that is enqueued before the host has seen it: ids into the
 * step's tokens, and into the tokens that penalties count. A few numbers a row: bound by launches.
 */
#include "kernels/device.cuh"
#include "kernels/kernels_sample.h"

namespace
{

constexpr int THREADS = 256;

__device__ int32_t chosen_token(const qv_k_sample_result *chosen, int row)
{
    int32_t token = chosen[row].token;
    return token >= 0 ? token : 0; /* the row had no choice: what is computed from it is dropped */
}

__global__ void take_chosen_kernel(int32_t *token, int32_t n, const qv_k_sample_result *chosen)
{
    int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i < n && token[i] < 0)
        token[i] = chosen_token(chosen, -1 - token[i]);
}

/* A block a row. */
__global__ void settle_kernel(qv_k_sample_row *rows, qv_k_sample_seen *all_seen,
                              const qv_k_sample_result *chosen)
{
    __shared__ bool found;
    qv_k_sample_row *row = rows + blockIdx.x;
    if (row->after < 0)
        return;
    qv_k_sample_seen *seen = all_seen + row->seen;
    int n = row->n_seen - 1;
    int32_t token = chosen_token(chosen, row->after);
    if (threadIdx.x == 0)
        found = false;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS)
        if (seen[i].token == token) { /* one thread at most: each token is there once */
            seen[i].count++;
            found = true;
        }
    __syncthreads();
    if (threadIdx.x > 0)
        return;
    if (found) {
        row->n_seen = n;
    } else {
        seen[n].token = token;
        seen[n].count = 1;
    }
}

} // namespace

qv_status qv_k_take_chosen(int32_t *token, int32_t n, const qv_k_sample_result *chosen,
                           void *stream)
{
    unsigned blocks = (unsigned)((n + THREADS - 1) / THREADS);
    take_chosen_kernel<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(token, n, chosen);
    return qv_k_check_launch("take_chosen");
}

qv_status qv_k_sample_settle(qv_k_sample_row *rows, int32_t n_rows, qv_k_sample_seen *seen,
                             const qv_k_sample_result *chosen, void *stream)
{
    settle_kernel<<<(unsigned)n_rows, THREADS, 0, (cudaStream_t)stream>>>(rows, seen, chosen);
    return qv_k_check_launch("sample_settle");
}
