/* The grouped GEMM of routed experts, y[p] = W_e x[row of p].
 *
 * Few pairs an expert (decode): bound by reading the weights of the experts that have any, 2 n_out
 * n_in bytes each. A block is an expert and 64 of its rows; the weights go straight into fragments
 * (skinny.cuh) and are read once for up to 32 pairs.
 *
 * Many (prefill): tiles of 64 or 128 pairs by 128 rows through shared memory, three stages of
 * asynchronous copies, on the tensor cores. Pairs are gathered by row address while they are
 * copied. Bound by the tensor cores above about 250 pairs an expert, by the weights below.
 */
#include "kernels/device.cuh"
#include "kernels/kernels_moe.h"
#include "kernels/skinny.cuh"
#include "kernels/tensor_map.cuh"
#include "kernels/wgmma.cuh"

namespace
{

__device__ __forceinline__ const bf16 *x_of(const qv_k_list &list, const qv_k_moe_linear_args &c,
                                            int place)
{
    int64_t row = c.x_pairs ? place : list.pair[place] / list.top_k;
    return (const bf16 *)c.x + row * c.x_stride;
}

constexpr int EXPERT_MASK = (1 << QV_K_MOE_EXPERT_BITS) - 1;

/* --- Few pairs an expert ------------------------------------------------------------------ */

constexpr int FEW_ROWS = 64;   /* rows of the matrix of a block: 4 warps of 16 */
constexpr int FEW_SPLITS = 2;  /* ranges of k, beside each other */
constexpr int FEW_TOKENS = 32; /* pairs that share a pass over the weights */
constexpr int FEW_THREADS = 32 * (FEW_ROWS / 16) * FEW_SPLITS;

template <int NT, bool ALIGNED>
__device__ __forceinline__ void few_product(const qv_k_moe_linear_args &c, const bf16 *w,
                                            int n_rows, const bf16 *const *x, int n_x,
                                            float (*sums)[FEW_ROWS][FEW_TOKENS + 1])
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int group = warp % (FEW_ROWS / 16) * 16, split = warp / (FEW_ROWS / 16);
    int64_t begin, end;
    split_range(c.n_in, split, FEW_SPLITS, begin, end);
    float acc[NT][4] = {};
    skinny_product<NT, ALIGNED>(w + group * c.n_in, c.n_in, n_rows - group, x, n_x, begin, end,
                                acc);
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            sums[split][group + (lane >> 2) + (j >> 1) * 8][i * 8 + (lane & 3) * 2 + (j & 1)] =
                acc[i][j];
}

/* Grid (tiles of rows, experts with pairs). */
template <bool ALIGNED>
__global__ void __launch_bounds__(FEW_THREADS, 2) few_kernel(qv_k_list list, qv_k_moe_linear_args c)
{
    __shared__ const bf16 *x[FEW_TOKENS];
    __shared__ float sums[FEW_SPLITS][FEW_ROWS][FEW_TOKENS + 1];
    if ((int)blockIdx.y >= list.work[0])
        return;
    int expert = list.work[2 + 2 * blockIdx.y] & EXPERT_MASK, thread = threadIdx.x;
    int first = list.expert_start[expert], n_pairs = list.expert_start[expert + 1] - first;
    int64_t row = (int64_t)blockIdx.x * FEW_ROWS;
    int n_rows = (int)min((int64_t)FEW_ROWS, c.n_out - row);
    const bf16 *w = (const bf16 *)c.w + expert * c.w_expert + row * c.n_in;
    for (int done = 0; done < n_pairs; done += FEW_TOKENS) {
        int n = min(FEW_TOKENS, n_pairs - done);
        __syncthreads();
        if (thread < n)
            x[thread] = x_of(list, c, first + done + thread);
        __syncthreads();
        if (n <= 8)
            few_product<1, ALIGNED>(c, w, n_rows, x, n, sums);
        else if (n <= 16)
            few_product<2, ALIGNED>(c, w, n_rows, x, n, sums);
        else
            few_product<4, ALIGNED>(c, w, n_rows, x, n, sums);
        __syncthreads();
        for (int i = thread; i < n * FEW_ROWS; i += FEW_THREADS) {
            int p = i / FEW_ROWS, r = i % FEW_ROWS;
            float sum = sums[0][r][p];
#pragma unroll
            for (int s = 1; s < FEW_SPLITS; s++)
                sum += sums[s][r][p];
            if (r < n_rows)
                ((bf16 *)c.y)[(first + done + p) * c.y_stride + row + r] = __float2bfloat16(sum);
        }
    }
}

/* --- Many, on any device ------------------------------------------------------------------ */

constexpr int MANY_ROWS = 128; /* rows of the matrix of a tile */
constexpr int MANY_K = 64;
constexpr int MANY_STAGES = 3;
constexpr int MANY_THREADS = 256;

template <int PAIRS> struct many_stage {
    bf16 x[PAIRS * MANY_K], w[MANY_ROWS * MANY_K];
};

template <int PAIRS>
__device__ __forceinline__ void load_many(many_stage<PAIRS> &m, const bf16 *const *x, const bf16 *w,
                                          int64_t w_stride, int n_rows, int64_t k, int64_t n_in)
{
    int col = threadIdx.x % 8 * 8;
    bool inside = k + col < n_in;
#pragma unroll
    for (int i = 0; i < PAIRS / 32; i++) {
        int row = threadIdx.x / 8 + 32 * i;
        const bf16 *from = x[row];
        copy16(m.x + tile_at<MANY_K>(row, col), from ? from + k + col : w, from && inside);
    }
#pragma unroll
    for (int i = 0; i < MANY_ROWS / 32; i++) {
        int row = threadIdx.x / 8 + 32 * i;
        bool valid = row < n_rows && inside;
        copy16(m.w + tile_at<MANY_K>(row, col), valid ? w + row * w_stride + k + col : w, valid);
    }
}

/* Grid (tiles of rows, tiles of pairs), 8 warps as 2 x 4 over PAIRS x 128. */
template <int PAIRS>
__global__ void __launch_bounds__(MANY_THREADS, PAIRS == 128 ? 2 : 3)
    many_kernel(qv_k_list list, qv_k_moe_linear_args c)
{
    extern __shared__ __align__(128) char many_memory[];
    many_stage<PAIRS> *stage = (many_stage<PAIRS> *)many_memory;
    __shared__ const bf16 *x[PAIRS];
    constexpr int MT = PAIRS / 32; /* tiles of 16 pairs of a warp */
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;

    /* Which expert: tiles of QV_K_MOE_TILE pairs are numbered; this kernel's may be two of them. */
    const int32_t *work = list.work;
    int tile = blockIdx.y * (PAIRS / QV_K_MOE_TILE), low = 0, high = work[0];
    if (tile >= work[1])
        return;
    while (high - low > 1) {
        int middle = (low + high) >> 1;
        if (work[3 + 2 * middle] <= tile)
            low = middle;
        else
            high = middle;
    }
    int64_t row = (int64_t)blockIdx.x * MANY_ROWS;
    int n_rows = (int)min((int64_t)MANY_ROWS, c.n_out - row);
    int expert = work[2 + 2 * low] & EXPERT_MASK, end = list.expert_start[expert + 1];
    int first = list.expert_start[expert] + (tile - work[3 + 2 * low]) * QV_K_MOE_TILE;
    int n = min(PAIRS, end - first);
    const bf16 *w = (const bf16 *)c.w + expert * c.w_expert + row * c.n_in;
    if (thread < PAIRS)
        x[thread] = thread < n ? x_of(list, c, first + thread) : nullptr;
    __syncthreads();

    int64_t steps = (c.n_in + MANY_K - 1) / MANY_K;
#pragma unroll
    for (int i = 0; i < MANY_STAGES - 1; i++) {
        if (i < steps)
            load_many<PAIRS>(stage[i], x, w, c.n_in, n_rows, i * MANY_K, c.n_in);
        copies_commit();
    }
    int pair_row = (warp & 1) * (PAIRS / 2), w_row = (warp >> 1) * 32;
    float acc[MT][4][4] = {};
    for (int64_t step = 0; step < steps; step++) {
        copies_wait<MANY_STAGES - 2>();
        __syncthreads(); /* this stage is there, the one before has been read */
        if (step + MANY_STAGES - 1 < steps)
            load_many<PAIRS>(stage[(step + MANY_STAGES - 1) % MANY_STAGES], x, w, c.n_in, n_rows,
                             (step + MANY_STAGES - 1) * MANY_K, c.n_in);
        copies_commit();
        const many_stage<PAIRS> &m = stage[step % MANY_STAGES];
#pragma unroll
        for (int k = 0; k < MANY_K; k += 16) {
            uint32_t a[MT][4], b[2][4];
#pragma unroll
            for (int i = 0; i < MT; i++)
                load_a<MANY_K>(a[i], m.x, pair_row + i * 16, k);
#pragma unroll
            for (int j = 0; j < 2; j++)
                load_b<MANY_K>(b[j], m.w, w_row + j * 16, k);
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    mma(acc[i][j], a[i], b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
        }
    }

    /* Store through shared memory, so that rows leave in pieces of 16 bytes. */
    copies_wait<0>();
    __syncthreads();
    bf16 *out = (bf16 *)many_memory; /* [PAIRS][128], a tile */
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *(uint32_t *)(out + tile_at<MANY_ROWS>(pair_row + i * 16 + (lane >> 2) + 8 * half,
                                                       w_row + j * 8 + (lane & 3) * 2)) =
                    pack_bf16(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
    __syncthreads();
    for (int i = thread; i < n * (MANY_ROWS / 8); i += MANY_THREADS) {
        int p = i / (MANY_ROWS / 8), col = i % (MANY_ROWS / 8) * 8;
        if (col < n_rows)
            *(uint4 *)((bf16 *)c.y + (first + p) * c.y_stride + row + col) =
                *(const uint4 *)(out + tile_at<MANY_ROWS>(p, col));
    }
}

/* --- Many, on Hopper ---------------------------------------------------------------------- */

/* Bound by what the L2 cache delivers unless tiles are large: a cluster of two blocks has 256 pairs
 * by 256 rows, 128 pairs each, and every block fetches half of the weights for both. In a block two
 * warpgroups have 64 pairs each; one rests where an expert has no more pairs, and the second block
 * leaves where the first is enough. Pairs are gathered by cp.async. */
constexpr int WIDE_PAIRS = 2 * QV_K_MOE_TILE;
constexpr int WIDE_CLUSTER = 2;
constexpr int WIDE_ROWS = 256;
constexpr int WIDE_K = 64;
constexpr int WIDE_STAGES = 4;
constexpr int WIDE_WORKERS = 256;               /* two warpgroups */
constexpr int WIDE_THREADS = WIDE_WORKERS + 32; /* and a warp that fetches weights */

struct wide_stage {
    bf16 x[WIDE_PAIRS * WIDE_K], w[WIDE_ROWS * WIDE_K];
};

[[maybe_unused]] __device__ __forceinline__ void
load_pairs(wide_stage &m, const bf16 *const *x, const void *none, int n, int64_t k, int64_t n_in)
{
    int col = threadIdx.x % 8 * 8;
    bool inside = k + col < n_in;
#pragma unroll
    for (int i = 0; i < WIDE_PAIRS / 32; i++) {
        int row = threadIdx.x / 8 + 32 * i;
        bool valid = row < n && inside;
        copy16(m.x + tile_at<WIDE_K>(row, col), valid ? x[row] + k + col : none, valid);
    }
    copies_commit();
}

/* This block's half of the weights at k, to both blocks; all of them if it is alone. One thread. */
[[maybe_unused]] __device__ __forceinline__ void fetch_rows(wide_stage &m, const void *map,
                                                            uint64_t *full, int k, int row,
                                                            int expert, int rank, bool alone)
{
    constexpr int HALF = WIDE_ROWS / WIDE_CLUSTER;
    barrier_expect(full, (int)sizeof m.w);
    for (int half = 0; half < WIDE_CLUSTER; half++)
        if (alone || half == rank)
            copy_box(m.w + half * HALF * WIDE_K, map, k, row + half * HALF, expert, full,
                     alone ? (uint16_t)(1 << rank) : 3);
}

[[maybe_unused]] __device__ __forceinline__ void workers_barrier(int id)
{
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(WIDE_WORKERS) : "memory");
}

/* Grid (tiles of rows, 2 x tiles of 256 pairs). */
__global__ void QV_CLUSTER(1, WIDE_CLUSTER, 1) __launch_bounds__(WIDE_THREADS, 1)
    wide_kernel(qv_k_list list, qv_k_moe_linear_args c, const __grid_constant__ CUtensorMap map)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char wide_memory[];
    wide_stage *stage = (wide_stage *)(((uintptr_t)wide_memory + 1023) / 1024 * 1024);
    __shared__ const bf16 *x[WIDE_PAIRS];
    __shared__ __align__(8) uint64_t full[WIDE_STAGES], empty[WIDE_STAGES];
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, group = thread >> 7;

    /* Which expert: all threads look at once, because a search would wait for memory at every step.
     */
    const int32_t *work = list.work;
    int tile = blockIdx.y / WIDE_CLUSTER, rank = blockIdx.y % WIDE_CLUSTER;
    int n_active = work[0], index = -1;
    for (int i = 0; i < n_active; i += WIDE_THREADS)
        index += __syncthreads_count(i + thread < n_active &&
                                     work[2 + 2 * (i + thread)] >> QV_K_MOE_EXPERT_BITS <= tile);
    int entry = work[2 + 2 * index], expert = entry & EXPERT_MASK;
    int first = list.expert_start[expert], left = list.expert_start[expert + 1] - first;
    int done = (tile - (entry >> QV_K_MOE_EXPERT_BITS)) * WIDE_CLUSTER * WIDE_PAIRS;
    bool alone = left - done <= WIDE_PAIRS;
    if (left <= done || (alone && rank > 0))
        return;
    first += done + rank * WIDE_PAIRS;
    int n = min(WIDE_PAIRS, left - done - rank * WIDE_PAIRS);
    int row = blockIdx.x * WIDE_ROWS, n_rows = (int)min((int64_t)WIDE_ROWS, c.n_out - row);
    if (thread < n)
        x[thread] = x_of(list, c, first + thread);
    if (thread == 0) {
        for (int i = 0; i < WIDE_STAGES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], alone ? 2 : 2 * WIDE_CLUSTER); /* warpgroups that read it */
        }
        asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    }
    __syncthreads();
    if (!alone)
        cluster_sync();

    int steps = (int)((c.n_in + WIDE_K - 1) / WIDE_K);
    float acc[WIDE_ROWS / 2] = {};
    if (warp == WIDE_WORKERS / 32) {
        for (int step = 0; lane == 0 && step < steps; step++) {
            int at = step % WIDE_STAGES;
            if (step >= WIDE_STAGES)
                barrier_wait(&empty[at], (step / WIDE_STAGES - 1) & 1);
            fetch_rows(stage[at], &map, &full[at], step * WIDE_K, row, expert, rank, alone);
        }
        __syncwarp();
    } else {
        bool works = group * QV_K_MOE_TILE < n;
        for (int i = 0; i < WIDE_STAGES - 1; i++)
            load_pairs(stage[i], x, c.w, i < steps ? n : 0, i * WIDE_K, c.n_in);
        for (int step = 0; step < steps; step++) {
            int at = step % WIDE_STAGES, ahead = step + WIDE_STAGES - 1;
            copies_wait<WIDE_STAGES - 2>();
            wgmma_publish();
            workers_barrier(1); /* the pairs of this step are there for both groups */
            barrier_wait(&full[at], (step / WIDE_STAGES) & 1);
            if (works) {
                uint64_t a = wgmma_tile(stage[at].x + group * QV_K_MOE_TILE * WIDE_K);
                uint64_t b = wgmma_tile(stage[at].w);
                wgmma_begin();
#pragma unroll
                for (int k = 0; k < WIDE_K / 16; k++)
                    wgmma_256(acc, a + 2 * k, b + 2 * k);
                wgmma_commit();
                wgmma_wait<1>();
            }
            if (step > 0 && (thread & 127) == 0) { /* the step before has been read */
                barrier_arrive_at(&empty[(step - 1) % WIDE_STAGES], rank);
                if (!alone)
                    barrier_arrive_at(&empty[(step - 1) % WIDE_STAGES], 1 - rank);
            }
            workers_barrier(2); /* both have read it: its pairs may be written over */
            load_pairs(stage[ahead % WIDE_STAGES], x, c.w, ahead < steps ? n : 0,
                       (int64_t)ahead * WIDE_K, c.n_in);
        }
        wgmma_wait<0>();
        copies_wait<0>();
    }
    __syncthreads();

    /* Store through shared memory, so that rows leave in pieces of 16 bytes. A warp has 16 rows to
     * itself. */
    bf16 *out = (bf16 *)stage; /* [128][256], a tile */
    if (thread < WIDE_WORKERS) {
        static_assert(WIDE_ROWS == 32 * 8, "a row is a piece a lane");
#pragma unroll
        for (int j = 0; j < WIDE_ROWS / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *(uint32_t *)(out + tile_at<WIDE_ROWS>(warp * 16 + (lane >> 2) + 8 * half,
                                                       j * 8 + (lane & 3) * 2)) =
                    pack_bf16(acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]);
        __syncwarp();
        for (int p = warp * 16; p < min(n, warp * 16 + 16); p++)
            if (lane * 8 < n_rows)
                *(uint4 *)((bf16 *)c.y + (first + p) * c.y_stride + row + lane * 8) =
                    *(const uint4 *)(out + tile_at<WIDE_ROWS>(p, lane * 8));
    }
    if (!alone)
        cluster_sync(); /* the other block's arrivals come here until its last step */
#else
    (void)list, (void)c, (void)map;
    __trap(); /* not launched on other devices */
#endif
}

/* The experts [E][n_out][n_in] in boxes of 128 rows by 64 columns; outside are zeros. */
qv_status make_map(const qv_k_list &list, const qv_k_moe_linear_args &c, CUtensorMap *map)
{
    const cuuint64_t sizes[3] = {(cuuint64_t)c.n_in, (cuuint64_t)c.n_out,
                                 (cuuint64_t)list.n_experts};
    const cuuint64_t strides[2] = {(cuuint64_t)c.n_in * 2, (cuuint64_t)c.w_expert * 2};
    const cuuint32_t box[3] = {WIDE_K, WIDE_ROWS / WIDE_CLUSTER, 1};
    return qv_k_tensor_map("moe_linear", c.w, sizes, strides, box, map);
}

qv_status launch_wide(const qv_k_list &list, const qv_k_moe_linear_args &c, int64_t n_pairs,
                      int64_t n_active, cudaStream_t stream)
{
    const int bytes = (int)sizeof(wide_stage) * WIDE_STAGES + 1024;
    CUtensorMap map;
    QV_TRY(make_map(list, c, &map));
    cudaFuncSetAttribute(wide_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int64_t tiles = n_pairs / (WIDE_CLUSTER * WIDE_PAIRS) + n_active;
    dim3 grid((unsigned)((c.n_out + WIDE_ROWS - 1) / WIDE_ROWS), (unsigned)(WIDE_CLUSTER * tiles));
    wide_kernel<<<grid, WIDE_THREADS, bytes, stream>>>(list, c, map);
    return QV_OK;
}

bool is_hopper()
{
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major == 9;
}

template <int PAIRS>
void launch_many(const qv_k_list &list, const qv_k_moe_linear_args &c, int64_t n_pairs,
                 int64_t n_active, cudaStream_t stream)
{
    const int bytes = (int)sizeof(many_stage<PAIRS>) * MANY_STAGES;
    cudaFuncSetAttribute(many_kernel<PAIRS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int64_t tiles = n_pairs / PAIRS + n_active; /* each expert's last may be a part of one */
    dim3 grid((unsigned)((c.n_out + MANY_ROWS - 1) / MANY_ROWS), (unsigned)tiles);
    many_kernel<PAIRS><<<grid, MANY_THREADS, bytes, stream>>>(list, c);
}

} // namespace

/* The tiled form above 32 pairs an expert: from there on a second pass over the weights would cost
 * more than the padding of tiles. */
qv_status qv_k_moe_linear(const qv_k_list *list, const qv_k_moe_linear_args *args, void *stream)
{
    const qv_k_moe_linear_args &c = *args;
    cudaStream_t on = (cudaStream_t)stream;
    int64_t n_pairs = (int64_t)list->n_tokens * list->top_k;
    int64_t n_active = n_pairs < list->n_experts ? n_pairs : list->n_experts;
    if (n_pairs == 0)
        return QV_OK;
    bool aligned = c.n_in % 8 == 0 && c.x_stride % 8 == 0 && c.w_expert % 8 == 0 &&
                   (uintptr_t)c.x % 16 == 0 && (uintptr_t)c.w % 16 == 0;
    bool tiles = aligned && c.n_out % 8 == 0 && c.y_stride % 8 == 0 && (uintptr_t)c.y % 16 == 0;
    if (tiles && n_pairs > 2 * QV_K_MOE_TILE * n_active && is_hopper()) {
        QV_TRY(launch_wide(*list, c, n_pairs, n_active, on));
    } else if (tiles && n_pairs > FEW_TOKENS * n_active) {
        launch_many<QV_K_MOE_TILE>(*list, c, n_pairs, n_active, on);
    } else {
        dim3 grid((unsigned)((c.n_out + FEW_ROWS - 1) / FEW_ROWS), (unsigned)n_active);
        if (aligned)
            few_kernel<true><<<grid, FEW_THREADS, 0, on>>>(*list, c);
        else
            few_kernel<false><<<grid, FEW_THREADS, 0, on>>>(*list, c);
    }
    return qv_k_check_launch("moe_linear");
}
