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
#include "kernels/wgmma_shapes.cuh"

namespace
{

__device__ __forceinline__ const bf16 *x_of(const qv_k_list &list, const qv_k_moe_linear_args &c,
                                            int place)
{
    int64_t row = c.x_pairs ? place : list.pair[place] / list.top_k;
    return (const bf16 *)c.x + row * c.x_stride;
}

/* Columns of y. */
__host__ __device__ __forceinline__ int64_t y_columns(const qv_k_moe_linear_args &c)
{
    return c.act == QV_K_MOE_SWIGLU ? c.n_out / 2 : c.n_out;
}

/* Eight products of a row, rounded, with what is done to them; `up` of SWIGLU. */
__device__ __forceinline__ uint4 activate8(qv_k_moe_act act, uint4 v, uint4 up)
{
    if (act == QV_K_MOE_PLAIN)
        return v;
    bf16x8 out;
    float x[8], y[8];
    unpack8(*(const bf16x8 *)&v, x);
    unpack8(*(const bf16x8 *)&up, y);
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = act == QV_K_MOE_SWIGLU ? swiglu(x[i], y[i]) : relu2(x[i]);
    out = pack8(x);
    return *(const uint4 *)&out;
}

constexpr int EXPERT_MASK = (1 << QV_K_MOE_EXPERT_BITS) - 1;

/* --- Few pairs an expert ------------------------------------------------------------------ */

constexpr int FEW_ROWS = 64;   /* rows of the matrix of a block: 4 warps of 16 */
constexpr int FEW_SPLITS = 2;  /* ranges of k, beside each other */
constexpr int FEW_TOKENS = 32; /* pairs that share a pass over the weights */
constexpr int FEW_THREADS = 32 * (FEW_ROWS / 16) * FEW_SPLITS;

/* `w` is this warp's first row, `n_rows` what is left from there. */
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
    skinny_product<NT, ALIGNED>(w, c.n_in, n_rows, x, n_x, begin, end, acc);
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            sums[split][group + (lane >> 2) + (j >> 1) * 8][i * 8 + (lane & 3) * 2 + (j & 1)] =
                acc[i][j];
}

/* Grid (tiles of rows, experts with pairs). A tile of SWIGLU is 32 rows of the gate and the same of
 * the other half. */
template <bool ALIGNED>
__global__ void __launch_bounds__(FEW_THREADS, 2) few_kernel(qv_k_list list, qv_k_moe_linear_args c)
{
    __shared__ const bf16 *x[FEW_TOKENS];
    __shared__ float sums[FEW_SPLITS][FEW_ROWS][FEW_TOKENS + 1];
    if ((int)blockIdx.y >= list.work[0])
        return;
    int expert = list.work[2 + 2 * blockIdx.y] & EXPERT_MASK, thread = threadIdx.x;
    int first = list.expert_start[expert], n_pairs = list.expert_start[expert + 1] - first;
    int width = c.act == QV_K_MOE_SWIGLU ? FEW_ROWS / 2 : FEW_ROWS; /* columns of y */
    int group = (thread >> 5) % (FEW_ROWS / 16) * 16;
    int64_t col = (int64_t)blockIdx.x * width, row = col + group % width;
    int n_cols = (int)min((int64_t)width, y_columns(c) - col);
    int n_rows = (int)max((int64_t)0, min((int64_t)16, y_columns(c) - row));
    if (group >= width)
        row += c.n_out / 2;
    const bf16 *w = (const bf16 *)c.w + expert * c.w_expert + (n_rows > 0 ? row : 0) * c.n_in;
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
        for (int i = thread; i < n * width; i += FEW_THREADS) {
            int p = i / width, r = i % width;
            float sum = sums[0][r][p], up = sums[0][r + FEW_ROWS - width][p];
#pragma unroll
            for (int s = 1; s < FEW_SPLITS; s++) {
                sum += sums[s][r][p];
                up += sums[s][r + FEW_ROWS - width][p];
            }
            if (c.act == QV_K_MOE_SWIGLU)
                sum = swiglu(round_bf16(sum), round_bf16(up));
            else if (c.act == QV_K_MOE_RELU2)
                sum = relu2(round_bf16(sum));
            if (r < n_cols)
                ((bf16 *)c.y)[(first + done + p) * c.y_stride + col + r] = __float2bfloat16(sum);
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
                                          int64_t w_stride, int width, int64_t jump, int n_cols,
                                          int64_t k, int64_t n_in)
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
        bool valid = row % width < n_cols && inside;
        int64_t from = row + (row >= width ? jump : 0);
        copy16(m.w + tile_at<MANY_K>(row, col), valid ? w + from * w_stride + k + col : w, valid);
    }
}

/* Rows from `width` on lie `jump` further: a tile of SWIGLU is 64 rows of both halves.
 * Grid (tiles of rows, tiles of pairs), 8 warps as 2 x 4 over PAIRS x 128. */
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
    int width = c.act == QV_K_MOE_SWIGLU ? MANY_ROWS / 2 : MANY_ROWS; /* columns of y */
    int64_t y_col = (int64_t)blockIdx.x * width, jump = c.n_out / 2 - width;
    int n_cols = (int)min((int64_t)width, y_columns(c) - y_col);
    int expert = work[2 + 2 * low] & EXPERT_MASK, end = list.expert_start[expert + 1];
    int first = list.expert_start[expert] + (tile - work[3 + 2 * low]) * QV_K_MOE_TILE;
    int n = min(PAIRS, end - first);
    const bf16 *w = (const bf16 *)c.w + expert * c.w_expert + y_col * c.n_in;
    if (thread < PAIRS)
        x[thread] = thread < n ? x_of(list, c, first + thread) : nullptr;
    __syncthreads();

    int64_t steps = (c.n_in + MANY_K - 1) / MANY_K;
#pragma unroll
    for (int i = 0; i < MANY_STAGES - 1; i++) {
        if (i < steps)
            load_many<PAIRS>(stage[i], x, w, c.n_in, width, jump, n_cols, i * MANY_K, c.n_in);
        copies_commit();
    }
    int pair_row = (warp & 1) * (PAIRS / 2), w_row = (warp >> 1) * 32;
    float acc[MT][4][4] = {};
    for (int64_t step = 0; step < steps; step++) {
        copies_wait<MANY_STAGES - 2>();
        __syncthreads(); /* this stage is there, the one before has been read */
        if (step + MANY_STAGES - 1 < steps)
            load_many<PAIRS>(stage[(step + MANY_STAGES - 1) % MANY_STAGES], x, w, c.n_in, width,
                             jump, n_cols, (step + MANY_STAGES - 1) * MANY_K, c.n_in);
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
    for (int i = thread; i < n * (width / 8); i += MANY_THREADS) {
        int p = i / (width / 8), col = i % (width / 8) * 8;
        if (col < n_cols)
            *(uint4 *)((bf16 *)c.y + (first + p) * c.y_stride + y_col + col) =
                activate8(c.act, *(const uint4 *)(out + tile_at<MANY_ROWS>(p, col)),
                          *(const uint4 *)(out + tile_at<MANY_ROWS>(p, col + MANY_ROWS - width)));
    }
}

/* --- Many, on Hopper ---------------------------------------------------------------------- */

/* Blocks that stay, in clusters of two. An item is up to 256 pairs of an expert by 256 rows of its
 * matrix: each block has half of the pairs, and fetches half of the weights for both, because the
 * L2 cache is what bounds this (32 bytes a clock and multiprocessor at full size). The matrix is
 * wgmma's first operand, so that the number of pairs of a product can be any multiple of 16: an
 * expert's pairs are shared out evenly over items and blocks.
 *
 * A block has two warpgroups of workers with 128 rows each, and one that fetches: weights by the
 * copy engine, pairs gathered by cp.async, four stages ahead of the workers and on into the next
 * item while they store. */
constexpr int WIDE_PAIRS = 2 * QV_K_MOE_TILE; /* of a block */
constexpr int WIDE_CLUSTER = 2;
constexpr int WIDE_ROWS = 256;
constexpr int WIDE_UNIT = 64; /* rows of one wgmma */
constexpr int WIDE_K = 64;
constexpr int WIDE_STAGES = 4;
constexpr int WIDE_WORKERS = 256;
constexpr int WIDE_THREADS = WIDE_WORKERS + 128;
constexpr int WIDE_FETCH_REGISTERS = 72, WIDE_WORK_REGISTERS = 216; /* of a thread */
static_assert(2 * WIDE_WORK_REGISTERS + WIDE_FETCH_REGISTERS <= 3 * LAUNCH_REGISTERS,
              "who asks for more than there are waits for ever");

struct wide_stage {
    bf16 w[WIDE_ROWS * WIDE_K], x[WIDE_PAIRS * WIDE_K];
};

struct wide_shared {
    wide_stage stage[WIDE_STAGES];
    bf16 out[2][WIDE_PAIRS * WIDE_UNIT]; /* a warpgroup's results on their way, [pair][row] */
    uint64_t full[WIDE_STAGES], empty[WIDE_STAGES];
};

struct wide_item {
    int expert, col, units; /* columns of y; units of 64 rows of the matrix that make them */
    int first, n;           /* this block's pairs */
    int most;               /* pairs of the larger block */
};

/* Item `number`, by all lanes of a warp; false: there is none. `index` is the active expert of an
 * earlier item (-1 at first) and moves on. Tiles of rows go round from tile of pairs to tile of
 * pairs, so that every cluster meets the short last one equally often. */
[[maybe_unused]] __device__ __forceinline__ bool find_item(const qv_k_list &list,
                                                           const qv_k_moe_linear_args &c,
                                                           int number, int rank, int &index,
                                                           wide_item &out)
{
    const int32_t *work = list.work;
    int64_t n_cols = y_columns(c);
    int width = c.act == QV_K_MOE_SWIGLU ? WIDE_ROWS / 2 : WIDE_ROWS;
    int row_tiles = (int)((n_cols + width - 1) / width), lane = threadIdx.x & 31;
    int tile = number / row_tiles, n_active = work[0];
    for (unsigned passed = ~0u; passed == ~0u;) {
        int i = index + 1 + lane;
        passed =
            __ballot_sync(~0u, i < n_active && work[2 + 2 * i] >> QV_K_MOE_EXPERT_BITS <= tile);
        index += __popc(passed);
    }
    if (index < 0)
        return false; /* nobody has pairs */
    int entry = work[2 + 2 * index], part = tile - (entry >> QV_K_MOE_EXPERT_BITS);
    out.expert = entry & EXPERT_MASK;
    int start = list.expert_start[out.expert], n = list.expert_start[out.expert + 1] - start;
    int parts = (n + WIDE_CLUSTER * WIDE_PAIRS - 1) / (WIDE_CLUSTER * WIDE_PAIRS);
    if (part >= parts)
        return false;
    int begin = (int)((int64_t)n * part / parts), end = (int)((int64_t)n * (part + 1) / parts);
    out.most = (end - begin + 1) / 2;
    out.first = start + begin + rank * out.most;
    out.n = rank == 0 ? out.most : end - begin - out.most;
    out.col = (number + tile) % row_tiles * width;
    out.units = (int)((min((int64_t)width, n_cols - out.col) + WIDE_UNIT - 1) / WIDE_UNIT) *
                (WIDE_ROWS / width);
    return true;
}

/* The first row of the matrix of a unit: of SWIGLU, every second one is of the other half, so that
 * a warpgroup has both. */
[[maybe_unused]] __device__ __forceinline__ int row_of_unit(const qv_k_moe_linear_args &c,
                                                            const wide_item &item, int unit)
{
    if (c.act != QV_K_MOE_SWIGLU)
        return item.col + unit * WIDE_UNIT;
    return item.col + unit / 2 * WIDE_UNIT + unit % 2 * (int)(c.n_out / 2);
}

/* Columns of the products for so many pairs: what there are forms for. */
[[maybe_unused]] __device__ __forceinline__ int wide_columns(int n)
{
    return n <= 32 ? 32 : n <= 64 ? 64 : (n + 15) / 16 * 16;
}

[[maybe_unused]] __device__ __forceinline__ void workers_barrier(int id)
{
    named_barrier<128>(id);
}

/* The warpgroup that fetches. */
[[maybe_unused]] __device__ void wide_fetch(const qv_k_list &list, const qv_k_moe_linear_args &c,
                                            const void *map, wide_shared &m, int rank, int cluster,
                                            int n_clusters)
{
    int thread = threadIdx.x - WIDE_WORKERS, index = -1,
        steps = (int)((c.n_in + WIDE_K - 1) / WIDE_K);
    int col = thread % 8 * 8, row_0 = thread / 8;
    bf16 *const to = (bf16 *)m.stage[0].x + tile_at<WIDE_K>(row_0, col);
    uint32_t count = 0;
    wide_item item;
    for (int number = cluster; find_item(list, c, number, rank, index, item);
         number += n_clusters) {
        int columns = wide_columns(item.most);
        uint32_t from[WIDE_PAIRS / 16]; /* in pieces of 16 bytes */
#pragma unroll
        for (int i = 0; i < WIDE_PAIRS / 16; i++) {
            int place = item.first + min(row_0 + 16 * i, max(item.n - 1, 0));
            int row = c.x_pairs
                          ? place
                          : list.pair[min(place, list.n_tokens * list.top_k - 1)] / list.top_k;
            from[i] = (uint32_t)row * (uint32_t)(c.x_stride / 8);
        }
        for (int step = 0; step < steps; step++, count++) {
            int at = count % WIDE_STAGES, k = step * WIDE_K;
            if (count >= WIDE_STAGES)
                barrier_wait(&m.empty[at], (count / WIDE_STAGES - 1) & 1);
            if (thread == 0) {
                barrier_expect(&m.full[at], item.units * WIDE_UNIT * WIDE_K * (int)sizeof(bf16));
                for (int u = 2 * rank; u < min(item.units, 2 * rank + 2); u++)
                    copy_box(m.stage[at].w + u * WIDE_UNIT * WIDE_K, map, k,
                             row_of_unit(c, item, u), item.expert, &m.full[at], 3);
            }
            bool inside = k + col < c.n_in;
#pragma unroll
            for (int i = 0; i < WIDE_PAIRS / 16; i++)
                if (16 * i < columns)
                    copy16(to + at * (sizeof(wide_stage) / sizeof(bf16)) + i * 16 * WIDE_K,
                           (const uint4 *)c.x + from[i] + (k + col) / 8,
                           inside && row_0 + 16 * i < item.n);
            barrier_arrive_copies(&m.full[at]);
        }
    }
}

/* A stage has been read by this warpgroup: both blocks may write it. */
[[maybe_unused]] __device__ __forceinline__ void wide_release(wide_shared &m, int at)
{
    int thread = threadIdx.x & 127;
    if (thread % 32 == 0 && thread / 32 < WIDE_CLUSTER)
        barrier_arrive_at(&m.empty[at], thread / 32);
}

/* A warpgroup's part of an item: UNITS times 64 rows by N pairs. */
template <int UNITS, int N>
[[maybe_unused]] __device__ __forceinline__ void
wide_work(const qv_k_moe_linear_args &c, wide_shared &m, const wide_item &item, uint32_t &count)
{
    int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
    int group = threadIdx.x >> 7, steps = (int)((c.n_in + WIDE_K - 1) / WIDE_K);
    float acc[UNITS][N / 2] = {};
    for (int step = 0; step < steps; step++, count++) {
        int at = count % WIDE_STAGES;
        barrier_wait(&m.full[at], (count / WIDE_STAGES) & 1);
        wgmma_publish(); /* the gathered pairs */
        uint64_t a = wgmma_tile(m.stage[at].w + group * 2 * WIDE_UNIT * WIDE_K);
        uint64_t b = wgmma_tile(m.stage[at].x);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < WIDE_K / 16; k++)
#pragma unroll
            for (int u = 0; u < UNITS; u++)
                wgmma<N>(acc[u], a + u * (WIDE_UNIT * WIDE_K * 2 / 16) + 2 * k, b + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0)
            wide_release(m, (count - 1) % WIDE_STAGES);
    }
    wgmma_wait<0>();
    wide_release(m, (count - 1) % WIDE_STAGES);

    /* Store: fragments transposed into [pair][column], and out in pieces of 16 bytes. */
    bf16 *out = m.out[group];
    bool gated = UNITS == 2 && c.act == QV_K_MOE_SWIGLU;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        if (u > 0 && gated)
            break;
        int first_col = item.col + (gated ? group : group * 2 + u) * WIDE_UNIT;
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
            float f[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                f[i] = acc[u][4 * j + i];
                if (gated)
                    f[i] = swiglu(round_bf16(f[i]), round_bf16(acc[UNITS - 1][4 * j + i]));
                else if (c.act == QV_K_MOE_RELU2)
                    f[i] = relu2(round_bf16(f[i]));
            }
            stmatrix4_trans(out + tile_at<WIDE_UNIT>(j * 8 + (lane >> 4) * 8 + (lane & 7),
                                                     warp * 16 + ((lane >> 3) & 1) * 8),
                            pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]),
                            pack_bf16(f[6], f[7]));
        }
        workers_barrier(1 + group);
        int col = thread % 8 * 8;
        if (first_col + col < y_columns(c))
            for (int p = thread / 8; p < item.n; p += 16)
                *(uint4 *)((bf16 *)c.y + (int64_t)(item.first + p) * c.y_stride + first_col + col) =
                    *(const uint4 *)(out + tile_at<WIDE_UNIT>(p, col));
        workers_barrier(1 + group); /* before `out` is written again */
    }
}

/* Grid (2 x clusters). */
__global__ void QV_CLUSTER(WIDE_CLUSTER, 1, 1) __launch_bounds__(WIDE_THREADS, 1)
    wide_kernel(qv_k_list list, qv_k_moe_linear_args c, const __grid_constant__ CUtensorMap map)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char wide_memory[];
    wide_shared &m = *(wide_shared *)(((uintptr_t)wide_memory + 1023) / 1024 * 1024);
    int thread = threadIdx.x, rank = blockIdx.x % WIDE_CLUSTER;
    int cluster = blockIdx.x / WIDE_CLUSTER, n_clusters = gridDim.x / WIDE_CLUSTER;
    if (thread == 0) {
        for (int i = 0; i < WIDE_STAGES; i++) {
            barrier_init(&m.full[i], 1 + WIDE_THREADS - WIDE_WORKERS);
            barrier_init(&m.empty[i], 2 * WIDE_CLUSTER); /* warpgroups that read it */
        }
        barriers_publish();
    }
    __syncthreads();
    cluster_sync();

    if (thread >= WIDE_WORKERS) {
        fewer_registers<WIDE_FETCH_REGISTERS>();
        wide_fetch(list, c, &map, m, rank, cluster, n_clusters);
    } else {
        more_registers<WIDE_WORK_REGISTERS>();
        int index = -1, group = thread >> 7, steps = (int)((c.n_in + WIDE_K - 1) / WIDE_K);
        uint32_t count = 0;
        wide_item item;
        for (int number = cluster; find_item(list, c, number, rank, index, item);
             number += n_clusters) {
            int units = item.units - 2 * group;
            if (units >= 2) {
                switch (wide_columns(item.most)) {
                case 32:
                    wide_work<2, 32>(c, m, item, count);
                    break;
                case 64:
                    wide_work<2, 64>(c, m, item, count);
                    break;
                case 80:
                    wide_work<2, 80>(c, m, item, count);
                    break;
                case 96:
                    wide_work<2, 96>(c, m, item, count);
                    break;
                case 112:
                    wide_work<2, 112>(c, m, item, count);
                    break;
                default:
                    wide_work<2, 128>(c, m, item, count);
                }
            } else if (units == 1) {
                wide_work<1, 128>(c, m, item, count);
            } else { /* only let the stages pass */
                for (int step = 0; step < steps; step++, count++) {
                    barrier_wait(&m.full[count % WIDE_STAGES], (count / WIDE_STAGES) & 1);
                    wide_release(m, count % WIDE_STAGES);
                }
            }
        }
    }
    cluster_sync(); /* the other block's arrivals come here until its last step */
#else
    (void)list, (void)c, (void)map;
    __trap(); /* not launched on other devices */
#endif
}

/* The experts [E][n_out][n_in] in boxes of 64 rows by 64 columns. */
qv_status make_map(const qv_k_list &list, const qv_k_moe_linear_args &c, CUtensorMap *map)
{
    const cuuint64_t sizes[3] = {(cuuint64_t)c.n_in, (cuuint64_t)c.n_out,
                                 (cuuint64_t)list.n_experts};
    const cuuint64_t strides[2] = {(cuuint64_t)c.n_in * 2, (cuuint64_t)c.w_expert * 2};
    const cuuint32_t box[3] = {WIDE_K, WIDE_UNIT, 1};
    return qv_k_tensor_map("moe_linear", c.w, sizes, strides, box, map);
}

qv_status launch_wide(const qv_k_list &list, const qv_k_moe_linear_args &c, int64_t n_pairs,
                      int64_t n_active, cudaStream_t stream)
{
    const int bytes = (int)sizeof(wide_shared) + 1024;
    CUtensorMap map;
    QV_TRY(make_map(list, c, &map));
    int device = 0, n_sms = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    cudaFuncSetAttribute(wide_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int width = c.act == QV_K_MOE_SWIGLU ? WIDE_ROWS / 2 : WIDE_ROWS;
    int64_t most =
        (n_pairs / (WIDE_CLUSTER * WIDE_PAIRS) + n_active) * ((y_columns(c) + width - 1) / width);
    int64_t clusters = most < n_sms / WIDE_CLUSTER ? most : n_sms / WIDE_CLUSTER;
    wide_kernel<<<(unsigned)(WIDE_CLUSTER * clusters), WIDE_THREADS, bytes, stream>>>(list, c, map);
    return QV_OK;
}

template <int PAIRS>
void launch_many(const qv_k_list &list, const qv_k_moe_linear_args &c, int64_t n_pairs,
                 int64_t n_active, cudaStream_t stream)
{
    const int bytes = (int)sizeof(many_stage<PAIRS>) * MANY_STAGES;
    cudaFuncSetAttribute(many_kernel<PAIRS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int64_t tiles = n_pairs / PAIRS + n_active; /* each expert's last may be a part of one */
    int width = c.act == QV_K_MOE_SWIGLU ? MANY_ROWS / 2 : MANY_ROWS;
    dim3 grid((unsigned)((y_columns(c) + width - 1) / width), (unsigned)tiles);
    many_kernel<PAIRS><<<grid, MANY_THREADS, bytes, stream>>>(list, c);
}

} // namespace

/* The tiled form above 32 pairs an expert: from there on a second pass over the weights would cost
 * more than the padding of tiles. With one form, that for few pairs, pass after pass: it sums a
 * pair in the same order whatever is beside it. */
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
    bool tiles =
        aligned && y_columns(c) % 8 == 0 && c.y_stride % 8 == 0 && (uintptr_t)c.y % 16 == 0;
    bool near = (c.x_pairs ? n_pairs : list->n_tokens) * (c.x_stride / 8) <= UINT32_MAX;
    tiles = tiles && !list->one_form;
    if (tiles && near && n_pairs > 2 * QV_K_MOE_TILE * n_active && qv_k_is_hopper()) {
        QV_TRY(launch_wide(*list, c, n_pairs, n_active, on));
    } else if (tiles && n_pairs > FEW_TOKENS * n_active) {
        launch_many<QV_K_MOE_TILE>(*list, c, n_pairs, n_active, on);
    } else {
        int width = c.act == QV_K_MOE_SWIGLU ? FEW_ROWS / 2 : FEW_ROWS;
        dim3 grid((unsigned)((y_columns(c) + width - 1) / width), (unsigned)n_active);
        if (aligned)
            few_kernel<true><<<grid, FEW_THREADS, 0, on>>>(*list, c);
        else
            few_kernel<false><<<grid, FEW_THREADS, 0, on>>>(*list, c);
    }
    return qv_k_check_launch("moe_linear");
}
