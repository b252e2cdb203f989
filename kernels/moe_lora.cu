/* LoRA of routed experts, over the runs of a list: pairs of one expert and one adapter. A block
 * takes a run (shrink: one plane and 16 ranks of it; expand: 256 columns) and walks its pairs.
 * Where a slot shares A between experts, A x is made once a token, over the adapter's segments, by
 * blocks of the same launch; where it shares B, the weighted sum adds the delta (qv_k_moe_combine).
 *
 * A x of pair t * k + j is row t * k + j of the scratch; A x of a whole token is row t * k.
 */
#include "kernels/kernels_moe.h"
#include "kernels/lora_tiles.cuh"

namespace
{

/* A slot's part, NULL if it has none. */
__device__ __forceinline__ const qv_k_moe_lora_slot *part_of(const qv_k_moe_lora_site &site,
                                                             int slot)
{
    return slot >= 0 && site.slots[slot].a ? &site.slots[slot] : nullptr;
}

__device__ __forceinline__ const qv_k_lora_slice *
slices_of(const qv_k_moe_lora_site &site, const qv_k_moe_lora_slot *part, int expert)
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
    const bf16 *a =
        (const bf16 *)part->a + (expert * site.ranges.n + plane) * part->max_rank * site.n_in;
    for (int done = 0; done < run.n; done += SHRINK_ROWS) {
        int n = min(SHRINK_ROWS, run.n - done);
        if ((int)threadIdx.x < n) {
            int64_t place = run.first + done + threadIdx.x, pair = list.pair[place];
            m.x[threadIdx.x] = rows.x + (rows.pairs ? place : pair / list.top_k) * rows.x_stride;
            m.x1[threadIdx.x] = scratch + (pair * site.ranges.n + plane) * site.max_rank;
        }
        shrink_block<ALIGNED, false>(m, a, site.n_in, rank, first, n);
    }
}

/* The tokens of a place of segments, in tiles: segment s owns places from seg_start[s] / tile + s.
 */
__device__ __forceinline__ void find_segment(const qv_k_list &list, int place, int tile, int &seg,
                                             int &token, int &n)
{
    int lane = threadIdx.x & 31, n_before = 0;
    for (int i = 0; i < list.n_segs; i += 32) {
        bool before = i + lane < list.n_segs && list.seg_start[i + lane] / tile + i + lane <= place;
        n_before += __popc(__ballot_sync(0xffffffffu, before));
    }
    seg = n_before - 1;
    int start = list.seg_start[seg], end = list.seg_start[seg + 1];
    token = start + (place - (start / tile + seg)) * tile;
    n = min(tile, end - token);
}

/* Tokens of a segment whose slot shares A. */
template <bool ALIGNED>
__device__ void shrink_tokens(shrink_shared &m, const qv_k_list &list,
                              const qv_k_moe_lora_site &site, const moe_rows &rows, float *scratch,
                              int place, int plane, int first)
{
    int seg, token, n;
    find_segment(list, place, SHRINK_ROWS, seg, token, n);
    const qv_k_moe_lora_slot *part = part_of(site, list.seg_slot[seg]);
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
    shrink_block<ALIGNED, false>(
        m, (const bf16 *)part->a + (int64_t)plane * part->max_rank * site.n_in, site.n_in, rank,
        first, n);
}

/* Grid (runs and then places of segments, planes x groups of ranks). */
template <bool ALIGNED>
__global__ void __launch_bounds__(SHRINK_THREADS, 1)
    moe_shrink_kernel(qv_k_list list, qv_k_moe_lora_site site, moe_rows rows, float *scratch,
                      int most_runs)
{
    __shared__ shrink_shared m;
    let_next_start();
    int plane = blockIdx.y % site.ranges.n, first = blockIdx.y / site.ranges.n * SHRINK_RANKS;
    int index = blockIdx.x;
    if (index >= most_runs)
        shrink_tokens<ALIGNED>(m, list, site, rows, scratch, index - most_runs, plane, first);
    else if (index < *list.n_runs)
        shrink_run<ALIGNED>(m, list, site, rows, scratch, index, plane, first);
}

/* Grid (runs and then places of segments, blocks of ranks): runs in tiles of 64 pairs, and the
 * tokens of segments whose slot shares A. */
__device__ void shrink_run_many(many_shared &m, const qv_k_list &list,
                                const qv_k_moe_lora_site &site, const moe_rows &rows,
                                float *scratch, int index)
{
    qv_k_run run = list.runs[index];
    const qv_k_moe_lora_slot *part = part_of(site, run.slot);
    if (!part || (part->a_shared && !rows.pairs))
        return;
    int64_t expert = part->a_shared ? 0 : run.expert;
    const bf16 *a = (const bf16 *)part->a + expert * site.ranges.n * part->max_rank * site.n_in;
    if (!choose_ranks(m, slices_of(site, part, run.expert), site.ranges.n, a, part->max_rank,
                      site.max_rank, site.n_in, blockIdx.y * MANY_RANKS))
        return;
    for (int done = 0; done < run.n; done += MANY_X) {
        int n = min(MANY_X, run.n - done);
        if (threadIdx.x < MANY_X) {
            int64_t place = run.first + done + min((int)threadIdx.x, n - 1),
                    pair = list.pair[place];
            m.x_row[threadIdx.x] =
                rows.x + (rows.pairs ? place : pair / list.top_k) * rows.x_stride;
            m.x1[threadIdx.x] = scratch + pair * site.ranges.n * site.max_rank;
        }
        shrink_many(m, site.n_in, n);
    }
}

__device__ void shrink_tokens_many(many_shared &m, const qv_k_list &list,
                                   const qv_k_moe_lora_site &site, const moe_rows &rows,
                                   float *scratch, int place)
{
    int seg, token, n;
    find_segment(list, place, MANY_X, seg, token, n);
    const qv_k_moe_lora_slot *part = part_of(site, list.seg_slot[seg]);
    if (n <= 0 || !part || !part->a_shared || rows.pairs ||
        !choose_ranks(m, part->slices, site.ranges.n, (const bf16 *)part->a, part->max_rank,
                      site.max_rank, site.n_in, blockIdx.y * MANY_RANKS))
        return;
    if (threadIdx.x < MANY_X) {
        int64_t t = token + min((int)threadIdx.x, n - 1);
        m.x_row[threadIdx.x] = rows.x + t * rows.x_stride;
        m.x1[threadIdx.x] = scratch + t * list.top_k * site.ranges.n * site.max_rank;
    }
    shrink_many(m, site.n_in, n);
}

__global__ void __launch_bounds__(MANY_LORA_THREADS, 2)
    moe_shrink_many_kernel(qv_k_list list, qv_k_moe_lora_site site, moe_rows rows, float *scratch,
                           int most_runs)
{
    extern __shared__ __align__(128) char many_memory[];
    many_shared &m = *(many_shared *)many_memory;
    let_next_start();
    int index = blockIdx.x;
    if (index >= most_runs)
        shrink_tokens_many(m, list, site, rows, scratch, index - most_runs);
    else if (index < *list.n_runs)
        shrink_run_many(m, list, site, rows, scratch, index);
}

/* --- Expand ------------------------------------------------------------------------------- */

/* A run's pairs in tiles of 16 MT. */
template <int MT>
__device__ void expand_run(char *memory, const qv_k_list &list, const qv_k_moe_lora_site &site,
                           const qv_k_moe_lora_slot *part, const qv_k_run &run, bool by_token,
                           const float *scratch, bf16 *y, int64_t y_stride, int64_t column)
{
    expand_shared<MT> &m = *(expand_shared<MT> *)memory;
    int64_t expert = part->b_shared ? 0 : run.expert;
    const bf16 *b = (const bf16 *)part->b + expert * part->max_rank * site.n_out;
    const qv_k_lora_slice *slices = slices_of(site, part, run.expert);
    for (int done = 0; done < run.n; done += 16 * MT) {
        int n = min(16 * MT, run.n - done);
        __syncthreads();
        if ((int)threadIdx.x < n) {
            int64_t place = run.first + done + threadIdx.x, pair = list.pair[place];
            if (by_token)
                pair = pair / list.top_k * list.top_k;
            m.x1[threadIdx.x] = scratch + pair * site.ranges.n * site.max_rank;
            m.y[threadIdx.x] = y + place * y_stride;
        }
        __syncthreads();
        expand_block<MT, float, bf16>(m, b, site.n_out, site.max_rank, site.ranges, slices, column,
                                      n);
    }
}

/* Grid (runs, tiles of columns). MT 1 where runs are short: more blocks fit beside each other. */
template <int MT>
__global__ void __launch_bounds__(EXPAND_THREADS, MT == 1 ? 4 : 3)
    moe_expand_kernel(qv_k_list list, const __grid_constant__ qv_k_moe_lora_site site, bool pairs,
                      const float *scratch, bf16 *y, int64_t y_stride)
{
    extern __shared__ __align__(128) char expand_memory[];
    if ((int)blockIdx.x < *list.n_runs) {
        qv_k_run run = list.runs[blockIdx.x];
        const qv_k_moe_lora_slot *part = part_of(site, run.slot);
        if (part && !(part->b_shared && pairs))
            expand_run<MT>(expand_memory, list, site, part, run, part->a_shared && !pairs, scratch,
                           y, y_stride, (int64_t)blockIdx.y * EXPAND_COLUMNS);
    }
    stay_behind();
}

template <int MT>
void launch_expand(const qv_k_list &list, const qv_k_moe_lora_site &site, int64_t most_runs,
                   bool pairs, const float *scratch, void *y, int64_t y_stride, cudaStream_t stream)
{
    dim3 grid((unsigned)most_runs, (unsigned)((site.n_out + EXPAND_COLUMNS - 1) / EXPAND_COLUMNS));
    launch_early(true, moe_expand_kernel<MT>, grid, EXPAND_THREADS, sizeof(expand_shared<MT>),
                 stream, list, site, pairs, scratch, (bf16 *)y, y_stride);
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
    /* Runs of hundreds of pairs: a prompt. */
    bool aligned = site->n_in % 8 == 0 && x_stride % 8 == 0 && (uintptr_t)x % 16 == 0;
    bool many = n_pairs >= 32 * most_runs && !list->one_form;
    int tile = many && aligned ? MANY_X : SHRINK_ROWS;
    unsigned blocks = (unsigned)(most_runs + (x_pairs ? 0 : list->n_tokens / tile + list->n_segs));
    int groups = (site->max_rank + SHRINK_RANKS - 1) / SHRINK_RANKS;
    moe_rows rows = {(const bf16 *)x, x_stride, x_pairs};
    dim3 grid(blocks, (unsigned)(site->ranges.n * groups));
    if (many && aligned) {
        cudaFuncSetAttribute(moe_shrink_many_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)sizeof(many_shared));
        moe_shrink_many_kernel<<<dim3(blocks, rank_blocks(site->ranges.n, site->max_rank)),
                                 MANY_LORA_THREADS, sizeof(many_shared), on>>>(
            *list, *site, rows, scratch, (int)most_runs);
    } else if (aligned) {
        moe_shrink_kernel<true>
            <<<grid, SHRINK_THREADS, 0, on>>>(*list, *site, rows, scratch, (int)most_runs);
    } else {
        moe_shrink_kernel<false>
            <<<grid, SHRINK_THREADS, 0, on>>>(*list, *site, rows, scratch, (int)most_runs);
    }
    if (many)
        launch_expand<2>(*list, *site, most_runs, x_pairs, scratch, y, y_stride, on);
    else
        launch_expand<1>(*list, *site, most_runs, x_pairs, scratch, y, y_stride, on);
    return qv_k_check_launch("moe_lora");
}
