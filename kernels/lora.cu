/* LoRA over adapter segments, and of the embedding: grids over (segment, tile of tokens) places,
 * numbered so that no prefix sum over the segments is needed (segment s owns the places from
 * seg_start[s] / tile + s). Halves and costs: lora_tiles.cuh.
 */
#include "kernels/lora_places.cuh"
#include "kernels/lora_tiles.cuh"

namespace
{

/* --- Dense sites -------------------------------------------------------------------------- */

/* Shrink finds its work, and has what it reads of A brought to the L2 cache, while the kernel
 * before it still runs. No block lets the next kernel start, or ends, before that one is complete:
 * what starts behind shrink may rely on it. */
__device__ __forceinline__ void begin_shrink()
{
    wait_for_previous();
    let_next_start();
}

/* Grid (planes x groups of ranks, places). */
template <bool ALIGNED, bool DEEP>
__global__ void __launch_bounds__(SHRINK_THREADS, ALIGNED && !DEEP ? 2 : 1)
    shrink_kernel(qv_k_segments s, const __grid_constant__ qv_k_lora_site site, const bf16 *x,
                  int64_t x_stride, float *scratch)
{
    __shared__ shrink_shared m;
    tokens_of_place p = find_tokens(s, blockIdx.y, SHRINK_ROWS);
    int plane = blockIdx.x % site.ranges.n, first = blockIdx.x / site.ranges.n * SHRINK_RANKS;
    int rank = p.n > 0 && p.slot >= 0
                   ? plane_rank(site.slices + (int64_t)p.slot * site.ranges.n, site.ranges.n, plane)
                   : 0;
    int64_t at = ((int64_t)p.slot * site.ranges.n + plane) * site.max_rank * site.n_in;
    const bf16 *a = (const bf16 *)site.a + at;
    int64_t end = min(first + SHRINK_RANKS, rank) * site.n_in;
    for (int64_t i = first * site.n_in + threadIdx.x * 64; i < end; i += SHRINK_THREADS * 64)
        prefetch(a + i);
    begin_shrink();
    if (first >= rank)
        return;
    if ((int)threadIdx.x < p.n) {
        int64_t t = p.first + threadIdx.x;
        m.x[threadIdx.x] = x + t * x_stride;
        m.x1[threadIdx.x] = scratch + (t * site.ranges.n + plane) * site.max_rank;
    }
    shrink_block<ALIGNED, DEEP>(m, a, site.n_in, rank, first, p.n);
}

/* Grid (blocks of ranks, places of 32 tokens). */
__global__ void __launch_bounds__(MANY_LORA_THREADS, 4)
    shrink_many_kernel(qv_k_segments s, qv_k_lora_site site, const bf16 *x, int64_t x_stride,
                       float *scratch)
{
    extern __shared__ __align__(128) char many_memory[];
    many_shared &m = *(many_shared *)many_memory;
    tokens_of_place p = find_tokens(s, blockIdx.y, MANY_X);
    begin_shrink();
    if (p.n <= 0 || p.slot < 0)
        return;
    if (threadIdx.x < MANY_X) {
        int64_t t = p.first + min((int)threadIdx.x, p.n - 1);
        m.x_row[threadIdx.x] = x + t * x_stride;
        m.x1[threadIdx.x] = scratch + t * site.ranges.n * site.max_rank;
    }
    int64_t slot = p.slot;
    if (choose_ranks(m, site.slices + slot * site.ranges.n, site.ranges.n,
                     (const bf16 *)site.a + slot * site.ranges.n * site.max_rank * site.n_in,
                     site.max_rank, site.max_rank, site.n_in, blockIdx.x * MANY_RANKS))
        shrink_many(m, site.n_in, p.n);
}

/* Grid (tiles of columns, places of 16 MT tokens). */
template <int MT, typename Y>
__global__ void __launch_bounds__(EXPAND_THREADS, MT == 1 ? 4 : 3)
    expand_kernel(qv_k_segments s, const __grid_constant__ qv_k_lora_site site,
                  const float *scratch, Y *y, int64_t y_stride)
{
    extern __shared__ __align__(128) char expand_memory[];
    expand_shared<MT> &m = *(expand_shared<MT> *)expand_memory;
    tokens_of_place p = find_tokens(s, blockIdx.y, 16 * MT);
    if (p.n <= 0 || p.slot < 0) {
        stay_behind();
        return;
    }
    if ((int)threadIdx.x < p.n) {
        int64_t t = p.first + threadIdx.x;
        m.x1[threadIdx.x] = scratch + t * site.ranges.n * site.max_rank;
        m.y[threadIdx.x] = y + t * y_stride;
    }
    __syncthreads();
    expand_block<MT, float, Y>(
        m, (const bf16 *)site.b + (int64_t)p.slot * site.max_rank * site.n_out, site.n_out,
        site.max_rank, site.ranges, site.slices + (int64_t)p.slot * site.ranges.n,
        (int64_t)blockIdx.x * EXPAND_COLUMNS, p.n);
    stay_behind();
}

/* --- Embedding ---------------------------------------------------------------------------- */

/* Grid (tiles of columns, places of 16 tokens). */
__global__ void __launch_bounds__(EXPAND_THREADS)
    embed_expand_kernel(qv_k_segments s, const qv_k_embed_lora_slot *slots, int64_t n_out,
                        const int32_t *ids, float *y, int64_t y_stride)
{
    extern __shared__ __align__(128) char expand_memory[];
    expand_shared<1> &m = *(expand_shared<1> *)expand_memory;
    __shared__ qv_k_lora_slice slice;
    __shared__ qv_k_slices ranges;
    tokens_of_place p = find_tokens(s, blockIdx.y, 16);
    if (p.n <= 0 || p.slot < 0)
        return;
    qv_k_embed_lora_slot slot = slots[p.slot];
    if (!slot.a || slot.rank == 0)
        return;
    if ((int)threadIdx.x < p.n) {
        int64_t t = p.first + threadIdx.x;
        m.x1[threadIdx.x] = (const bf16 *)slot.a + (int64_t)ids[t] * slot.max_rank;
        m.y[threadIdx.x] = y + t * y_stride;
    }
    if (threadIdx.x == 0) {
        slice.plane = 0;
        slice.rank = slot.rank;
        slice.scale = slot.scale;
        ranges.n = 1;
        ranges.start[0] = 0;
        ranges.start[1] = (int32_t)n_out;
    }
    __syncthreads();
    expand_block<1, bf16, float>(m, (const bf16 *)slot.b, n_out, slot.max_rank, ranges, &slice,
                                 (int64_t)blockIdx.x * EXPAND_COLUMNS, p.n);
}

/* --- Launch ------------------------------------------------------------------------------- */

/* From here on the form for many rows: a step with a prompt in it. Below, blocks of 16 rows fill
 * the device better, and a decode step is the same bit for bit whoever is in it. */
constexpr int MANY_TOKENS = 512;

/* Planes of all segments up to which a multiprocessor has one block of shrink: more loads of each
 * in flight help then (8 adapters: 9.6 to 9.4 ms a step of the 4B), and cost where blocks wait for
 * each other (64 adapters of 4B gdn in: 44 to 49 us). */
constexpr int DEEP_BLOCKS = 128;

unsigned column_tiles(int64_t n_out)
{
    return (unsigned)((n_out + EXPAND_COLUMNS - 1) / EXPAND_COLUMNS);
}

template <int MT, typename Y>
void launch_expand(const qv_k_segments &s, const qv_k_lora_site &site, const float *scratch,
                   void *y, int64_t y_stride, cudaStream_t stream)
{
    dim3 grid(column_tiles(site.n_out), n_places(s, 16 * MT));
    launch_early(true, expand_kernel<MT, Y>, grid, EXPAND_THREADS, sizeof(expand_shared<MT>),
                 stream, s, site, scratch, (Y *)y, y_stride);
}

template <typename Y>
void choose_expand(const qv_k_segments &s, const qv_k_lora_site &site, const float *scratch,
                   void *y, int64_t y_stride, cudaStream_t stream)
{
    /* Tiles of 32 tokens read B half as often; with few tokens a segment they would be empty. */
    if (s.n_tokens > 16 * s.n_segs)
        launch_expand<2, Y>(s, site, scratch, y, y_stride, stream);
    else
        launch_expand<1, Y>(s, site, scratch, y, y_stride, stream);
}

} // namespace

qv_status qv_k_lora_shrink(const qv_k_segments *segments, const qv_k_lora_site *site, const void *x,
                           int64_t x_stride, float *x1, void *stream)
{
    const qv_k_segments &s = *segments;
    cudaStream_t on = (cudaStream_t)stream;
    if (site->ranges.n > QV_K_MAX_SLICES || site->max_rank > QV_K_MAX_RANK)
        return qv_fail(QV_ERR_LIMIT, "lora: %d slices of rank %d, but %d of %d are possible",
                       site->ranges.n, site->max_rank, QV_K_MAX_SLICES, QV_K_MAX_RANK);
    int groups = (site->max_rank + SHRINK_RANKS - 1) / SHRINK_RANKS;
    bool aligned = site->n_in % 8 == 0 && x_stride % 8 == 0 && (uintptr_t)x % 16 == 0 &&
                   (uintptr_t)site->a % 16 == 0;
    const bf16 *rows = (const bf16 *)x;
    if (aligned && s.n_tokens >= MANY_TOKENS && s.n_tokens > SHRINK_ROWS * s.n_segs &&
        !s.one_form) {
        cudaFuncSetAttribute(shrink_many_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)sizeof(many_shared));
        dim3 grid(rank_blocks(site->ranges.n, site->max_rank), n_places(s, MANY_X));
        launch_early(true, shrink_many_kernel, grid, MANY_LORA_THREADS, sizeof(many_shared), on, s,
                     *site, rows, x_stride, x1);
    } else {
        dim3 grid((unsigned)(site->ranges.n * groups), n_places(s, SHRINK_ROWS));
        bool deep = s.n_segs * site->ranges.n <= DEEP_BLOCKS;
        launch_early(true,
                     !aligned ? shrink_kernel<false, false>
                     : deep   ? shrink_kernel<true, true>
                              : shrink_kernel<true, false>,
                     grid, SHRINK_THREADS, 0, on, s, *site, rows, x_stride, x1);
    }
    return qv_k_check_launch("lora_shrink");
}

qv_status qv_k_lora(const qv_k_segments *segments, const qv_k_lora_site *site, const void *x,
                    int64_t x_stride, float *scratch, void *y, int64_t y_stride, bool y_f32,
                    void *stream)
{
    QV_TRY(qv_k_lora_shrink(segments, site, x, x_stride, scratch, stream));
    if (y_f32)
        choose_expand<float>(*segments, *site, scratch, y, y_stride, (cudaStream_t)stream);
    else
        choose_expand<bf16>(*segments, *site, scratch, y, y_stride, (cudaStream_t)stream);
    return qv_k_check_launch("lora");
}

qv_status qv_k_embed_lora(const qv_k_segments *segments, const qv_k_embed_lora_slot *slots,
                          int32_t max_rank, int64_t n_out, const int32_t *ids, void *y,
                          int64_t y_stride, void *stream)
{
    if (max_rank > QV_K_MAX_RANK)
        return qv_fail(QV_ERR_LIMIT, "embed_lora: pool rank %d, but %d is possible", max_rank,
                       QV_K_MAX_RANK);
    dim3 grid(column_tiles(n_out), n_places(*segments, 16));
    embed_expand_kernel<<<grid, EXPAND_THREADS, sizeof(expand_shared<1>), (cudaStream_t)stream>>>(
        *segments, slots, n_out, ids, (float *)y, y_stride);
    return qv_k_check_launch("embed_lora");
}
