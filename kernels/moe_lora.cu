/* LoRA of routed experts, over the runs of a list: pairs of one expert and one adapter. A block takes a run
 * (shrink: one plane and 32 ranks of it; expand: 256 columns) and walks its pairs. Where a slot
 * shares A between experts, A x is made once a token, over the adapter's segments, by blocks of the
 * same launch; where it shares B, the weighted sum adds the delta (qv_k_moe_combine).
 *
 * A x of pair t * k + j is row t * k + j of the scratch; A x of a whole token is row t * k.
 */
#include "kernels/kernels_moe.h"
#include "kernels/lora_tiles.cuh"

namespace
{

/* A slot's part, NULL if it has none. */
__device__ __forceinline__ const qv_k_moe_lora_slot *part_of(const qv_k_moe_lora_site &site, int slot)
{
    return slot >= 0 && site.slots[slot].a ? &site.slots[slot] : nullptr;
}

__device__ __forceinline__ const qv_k_lora_slice *slices_of(const qv_k_moe_lora_site &site,
                                                            const qv_k_moe_lora_slot *part,
                                                            int expert)
{
    return part->slices + (int64_t)expert * site.ranges.n;
}

struct moe_rows {
    const bf16 *x;
    int64_t x_stride;
    bool pairs; /* x has a row per place */
};

/* --- Shrink ------------------------------------------------------------------------------- */

template <bool ALIGNED>
__device__ void shrink_run(shrink_shared &m, const qv_k_list &list, const qv_k_moe_lora_site &site,
                           const moe_rows &rows, float *scratch, int index, int plane, int first)
{
    qv_k_run run = list.runs[index];
    const qv_k_moe_lora_slot *part = part_of(site, run.slot);
    if (!part || (part->a_shared && !rows.pairs))
        return;
    int rank = plane_rank(slices_of(site, part, run.expert), site.ranges.n, plane);
    if (first >= rank)
        return;
    int64_t expert = part->a_shared ? 0 : run.expert;
    const bf16 *a = (const bf16 *)part->a +
                    (expert * site.ranges.n + plane) * part->max_rank * site.n_in;
    for (int done = 0; done < run.n; done += SHRINK_ROWS) {
        int n = min(SHRINK_ROWS, run.n - done);
        if ((int)threadIdx.x < n) {
            int64_t place = run.first + done + threadIdx.x, pair = list.pair[place];
            m.x[threadIdx.x] = rows.x + (rows.pairs ? place : pair / list.top_k) * rows.x_stride;
            m.x1[threadIdx.x] = scratch + (pair * site.ranges.n + plane) * site.max_rank;
        }
        shrink_block<ALIGNED>(m, a, site.n_in, rank, first, n);
    }
}

/* Tokens [32 tile, ..) of a segment whose slot shares A. */
template <bool ALIGNED>
__device__ void shrink_tokens(shrink_shared &m, const qv_k_list &list,
                              const qv_k_moe_lora_site &site, const moe_rows &rows, float *scratch,
                              int place, int plane, int first)
{
    int low = 0, high = list.n_segs;
    while (high - low > 1) {
        int middle = (low + high) >> 1;
        if (list.seg_start[middle] / SHRINK_ROWS + middle <= place)
            low = middle;
        else
            high = middle;
    }
    int start = list.seg_start[low];
    int token = start + (place - (start / SHRINK_ROWS + low)) * SHRINK_ROWS;
    int n = min(SHRINK_ROWS, list.seg_start[low + 1] - token);
    const qv_k_moe_lora_slot *part = part_of(site, list.seg_slot[low]);
    if (n <= 0 || !part || !part->a_shared || rows.pairs)
        return;
    int rank = plane_rank(part->slices, site.ranges.n, plane);
    if (first >= rank)
        return;
    if ((int)threadIdx.x < n) {
        int64_t t = token + threadIdx.x;
        m.x[threadIdx.x] = rows.x + t * rows.x_stride;
        m.x1[threadIdx.x] = scratch + (t * list.top_k * site.ranges.n + plane) * site.max_rank;
    }
    shrink_block<ALIGNED>(m, (const bf16 *)part->a + (int64_t)plane * part->max_rank * site.n_in,
                          site.n_in, rank, first, n);
}

/* Grid (runs and then places of segments, planes x groups of ranks). */
template <bool ALIGNED>
__global__ void __launch_bounds__(SHRINK_THREADS, 2)
    moe_shrink_kernel(qv_k_list list, qv_k_moe_lora_site site, moe_rows rows, float *scratch,
                      int most_runs)
{
    __shared__ shrink_shared m;
    int plane = blockIdx.y % site.ranges.n, first = blockIdx.y / site.ranges.n * SHRINK_RANKS;
    int index = blockIdx.x;
    if (index >= most_runs)
        shrink_tokens<ALIGNED>(m, list, site, rows, scratch, index - most_runs, plane, first);
    else if (index < *list.n_runs)
        shrink_run<ALIGNED>(m, list, site, rows, scratch, index, plane, first);
}

/* --- Expand ------------------------------------------------------------------------------- */

/* Grid (runs, tiles of columns). */
__global__ void __launch_bounds__(EXPAND_THREADS)
    moe_expand_kernel(qv_k_list list, const __grid_constant__ qv_k_moe_lora_site site, bool pairs, const float *scratch,
                      bf16 *y, int64_t y_stride)
{
    extern __shared__ __align__(128) char expand_memory[];
    expand_shared &m = *(expand_shared *)expand_memory;
    if ((int)blockIdx.x >= *list.n_runs)
        return;
    qv_k_run run = list.runs[blockIdx.x];
    const qv_k_moe_lora_slot *part = part_of(site, run.slot);
    if (!part || (part->b_shared && pairs))
        return;
    bool by_token = part->a_shared && !pairs;
    int64_t expert = part->b_shared ? 0 : run.expert;
    const bf16 *b = (const bf16 *)part->b + expert * part->max_rank * site.n_out;
    const qv_k_lora_slice *slices = slices_of(site, part, run.expert);
    int64_t column = (int64_t)blockIdx.y * EXPAND_COLUMNS;
    for (int done = 0; done < run.n; done += EXPAND_ROWS) {
        int n = min(EXPAND_ROWS, run.n - done);
        __syncthreads();
        if ((int)threadIdx.x < n) {
            int64_t place = run.first + done + threadIdx.x, pair = list.pair[place];
            if (by_token)
                pair = pair / list.top_k * list.top_k;
            m.x1[threadIdx.x] = scratch + pair * site.ranges.n * site.max_rank;
            m.y[threadIdx.x] = y + place * y_stride;
        }
        __syncthreads();
        if (n <= 16)
            expand_block<1, float, bf16>(m, b, site.n_out, site.max_rank, site.ranges, slices, column,
                                         n);
        else
            expand_block<4, float, bf16>(m, b, site.n_out, site.max_rank, site.ranges, slices, column,
                                         n);
    }
}

} // namespace

qv_status qv_k_moe_lora(const qv_k_list *list, const qv_k_moe_lora_site *site, const void *x,
                        int64_t x_stride, bool x_pairs, float *scratch, void *y, int64_t y_stride,
                        void *stream)
{
    cudaStream_t on = (cudaStream_t)stream;
    if (site->ranges.n > QV_K_MAX_SLICES || site->max_rank > QV_K_MAX_RANK)
        return qv_fail(QV_ERR_LIMIT, "moe_lora: %d slices of rank %d, but %d of %d are possible",
                       site->ranges.n, site->max_rank, QV_K_MAX_SLICES, QV_K_MAX_RANK);
    int64_t n_pairs = (int64_t)list->n_tokens * list->top_k;
    int64_t most_runs = (int64_t)list->n_experts * list->n_segs;
    most_runs = most_runs < n_pairs ? most_runs : n_pairs;
    if (most_runs == 0)
        return QV_OK;
    int64_t places = x_pairs ? 0 : list->n_tokens / SHRINK_ROWS + list->n_segs;
    int groups = (site->max_rank + SHRINK_RANKS - 1) / SHRINK_RANKS;
    moe_rows rows = {(const bf16 *)x, x_stride, x_pairs};
    dim3 grid((unsigned)(most_runs + places), (unsigned)(site->ranges.n * groups));
    if (site->n_in % 8 == 0 && x_stride % 8 == 0 && (uintptr_t)x % 16 == 0)
        moe_shrink_kernel<true>
            <<<grid, SHRINK_THREADS, 0, on>>>(*list, *site, rows, scratch, (int)most_runs);
    else
        moe_shrink_kernel<false>
            <<<grid, SHRINK_THREADS, 0, on>>>(*list, *site, rows, scratch, (int)most_runs);
    cudaFuncSetAttribute(moe_expand_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         (int)sizeof(expand_shared));
    dim3 expand_grid((unsigned)most_runs,
                     (unsigned)((site->n_out + EXPAND_COLUMNS - 1) / EXPAND_COLUMNS));
    moe_expand_kernel<<<expand_grid, EXPAND_THREADS, sizeof(expand_shared), on>>>(
        *list, *site, x_pairs, scratch, (bf16 *)y, y_stride);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "moe_lora: %s", cudaGetErrorString(error));
    return QV_OK;
}
