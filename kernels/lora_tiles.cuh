/* The two halves of every LoRA op, for the rows of one adapter: shrink, x1 = A x, and expand,
 * y += scale B x1. Rows are given by address, so that they may stand anywhere. Shared by lora.cu and
 * moe_lora.cu, which differ in where a block finds its adapter and its rows.
 *
 * Loops end at the loaded rank, rounded up to the 16 of the tensor core with zeros in place of
 * what lies above it, which is never read. The result of a row does not depend on which rows share
 * its block, nor on the pool's rank: ranges of k and steps of rank are cut in the same way always.
 *
 * x1 is float32. Expand gives scale * x1 to the tensor cores as two BF16 numbers (16 bits).
 *
 * At decode both are bound by reading A and B once per adapter, 2 r (n_in + n_out) bytes; with many
 * rows an adapter by x, and by y read and written.
 */
#ifndef QV_KERNELS_LORA_TILES_CUH
#define QV_KERNELS_LORA_TILES_CUH

#include "kernels/kernels_lora.h"
#include "kernels/skinny.cuh"

namespace
{

/* --- Shrink ------------------------------------------------------------------------------- */

constexpr int SHRINK_RANKS = 32; /* rows of A of a block */
constexpr int SHRINK_SPLITS = 8; /* ranges of k, a warp each */
constexpr int SHRINK_ROWS = 32;  /* rows of x that share a pass over A */
constexpr int SHRINK_THREADS = 32 * SHRINK_SPLITS;

struct shrink_shared {
    const bf16 *x[SHRINK_ROWS];
    float *x1[SHRINK_ROWS];
    float sums[SHRINK_SPLITS][SHRINK_RANKS][SHRINK_ROWS + 1];
};

template <int NT, bool ALIGNED>
__device__ __forceinline__ void shrink_tiles(shrink_shared &m, const bf16 *a, int64_t n_in,
                                             int n_ranks, int n)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int64_t begin, end;
    split_range(n_in, warp, SHRINK_SPLITS, begin, end);
    for (int tile = 0; tile < n_ranks; tile += 16) {
        float acc[NT][4] = {};
        skinny_product<NT, ALIGNED>(a + tile * n_in, n_in, n_ranks - tile, m.x, n, begin, end, acc);
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                m.sums[warp][tile + (lane >> 2) + (j >> 1) * 8]
                      [i * 8 + (lane & 3) * 2 + (j & 1)] = acc[i][j];
    }
}

/* x1[i][first .. first + 32) below `rank` for n rows whose addresses stand in m: x1[i] is where the row's
 * plane begins. `a` is the plane. All threads of the block. */
template <bool ALIGNED>
__device__ void shrink_block(shrink_shared &m, const bf16 *a, int64_t n_in, int rank, int first,
                             int n)
{
    int n_ranks = min(SHRINK_RANKS, rank - first);
    a += first * n_in;
    __syncthreads();
    if (n <= 8)
        shrink_tiles<1, ALIGNED>(m, a, n_in, n_ranks, n);
    else if (n <= 16)
        shrink_tiles<2, ALIGNED>(m, a, n_in, n_ranks, n);
    else
        shrink_tiles<4, ALIGNED>(m, a, n_in, n_ranks, n);
    __syncthreads();
    for (int i = threadIdx.x; i < n * SHRINK_RANKS; i += SHRINK_THREADS) {
        int row = i / SHRINK_RANKS, r = i % SHRINK_RANKS;
        if (r >= n_ranks)
            continue;
        float sum = 0;
#pragma unroll
        for (int s = 0; s < SHRINK_SPLITS; s++)
            sum += m.sums[s][r][row];
        m.x1[row][first + r] = sum;
    }
    __syncthreads();
}

/* Ranks of a plane that some slice reads. */
__device__ __forceinline__ int plane_rank(const qv_k_lora_slice *slices, int n, int plane)
{
    int rank = 0;
    for (int i = 0; i < n; i++)
        if (slices[i].plane == plane)
            rank = max(rank, slices[i].rank);
    return rank;
}

/* --- Expand ------------------------------------------------------------------------------- */

constexpr int EXPAND_COLUMNS = 256; /* columns of y of a block, 32 a warp */
constexpr int EXPAND_RANKS = 64;    /* rows of B in shared memory */
constexpr int EXPAND_ROWS = 64;     /* rows of y, at most */
constexpr int EXPAND_THREADS = 256;

struct expand_shared {
    bf16 b[EXPAND_RANKS * EXPAND_COLUMNS];
    bf16 high[EXPAND_ROWS * EXPAND_RANKS], low[EXPAND_ROWS * EXPAND_RANKS];
    const void *x1[EXPAND_ROWS]; /* float32, or BF16 rows of an embedding's A */
    void *y[EXPAND_ROWS];
};

/* Rows [0, n_ranks) of b and columns [first, end) of the block's, which begin at col_0; zeros around. */
__device__ __forceinline__ void load_b_rows(expand_shared &m, const bf16 *b, int64_t n_out,
                                            int n_ranks, int padded, int64_t col_0, int64_t first,
                                            int64_t end)
{
    bool aligned = n_out % 8 == 0 && ((uintptr_t)b & 15) == 0;
    for (int i = threadIdx.x; i < padded * (EXPAND_COLUMNS / 8); i += EXPAND_THREADS) {
        int r = i / (EXPAND_COLUMNS / 8), col = i % (EXPAND_COLUMNS / 8) * 8;
        bf16 *to = m.b + tile_at<EXPAND_COLUMNS>(r, col);
        const bf16 *from = b + r * n_out + col_0 + col;
        bool outside = r >= n_ranks || col_0 + col >= end || col_0 + col + 8 <= first;
        if (outside || (aligned && col_0 + col >= first && col_0 + col + 8 <= end)) {
            copy16(to, outside ? b : from, !outside);
        } else {
            for (int j = 0; j < 8; j++) {
                int64_t at = col_0 + col + j;
                to[j] = at >= first && at < end ? from[j] : __float2bfloat16(0.0f);
            }
        }
    }
    copies_commit();
}

template <typename X1>
__device__ __forceinline__ void load_x1_rows(expand_shared &m, int rows, int n, int64_t offset,
                                             int n_ranks, int padded, float scale)
{
    for (int i = threadIdx.x; i < rows * padded / 2; i += EXPAND_THREADS) {
        int row = i / (padded / 2), r = i % (padded / 2) * 2;
        const X1 *x1 = (const X1 *)m.x1[row] + offset + r;
        float v[2] = {0, 0};
        if (row < n && r < n_ranks)
            v[0] = scale * to_float(x1[0]);
        if (row < n && r + 1 < n_ranks)
            v[1] = scale * to_float(x1[1]);
        uint32_t high, low;
        split_bf16(v[0], v[1], high, low);
        *(uint32_t *)(m.high + tile_at<EXPAND_RANKS>(row, r)) = high;
        *(uint32_t *)(m.low + tile_at<EXPAND_RANKS>(row, r)) = low;
    }
}

/* y[i][col] += acc where the column is touched. */
template <int MT, typename Y>
__device__ __forceinline__ void add_to_rows(const expand_shared &m, int n, int64_t col_0,
                                            uint32_t touched, const float (&acc)[MT][4][4])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = i * 16 + (lane >> 2) + half * 8;
            if (row >= n)
                continue;
            Y *y = (Y *)m.y[row] + col_0 + warp * 32 + (lane & 3) * 2;
            bool even = ((uintptr_t)y & (2 * sizeof(Y) - 1)) == 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t bits = touched >> (2 * j) & 3;
                const float *d = acc[i][j] + 2 * half;
                Y *to = y + 8 * j;
                if (sizeof(Y) == 2 && bits == 3 && even) {
                    uint32_t old = *(const uint32_t *)to;
                    *(uint32_t *)to = pack_bf16(bf16_low(old) + d[0], bf16_high(old) + d[1]);
                } else {
#pragma unroll
                    for (int k = 0; k < 2; k++)
                        if (bits >> k & 1)
                            to[k] = (Y)(to_float(to[k]) + d[k]);
                }
            }
        }
}

/* y[i][col_0 .. col_0 + 256) += delta for n <= 16 MT rows whose addresses stand in m; x1[i] is where the
 * row's planes begin, max_rank apart. All threads of the block. */
template <int MT, typename X1, typename Y>
__device__ void expand_block(expand_shared &m, const bf16 *b, int64_t n_out, int max_rank,
                             const qv_k_slices &ranges, const qv_k_lora_slice *slices,
                             int64_t col_0, int n)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float acc[MT][4][4] = {};
    uint32_t touched = 0; /* bit 2 j + i: column 8 j + 2 t + i of the warp's has a pair */
    for (int s = 0; s < ranges.n; s++) {
        int64_t first = max((int64_t)ranges.start[s], col_0);
        int64_t end = min((int64_t)ranges.start[s + 1], col_0 + EXPAND_COLUMNS);
        if (first >= end || slices[s].rank == 0)
            continue;
        qv_k_lora_slice slice = slices[s];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int64_t col = col_0 + warp * 32 + (j >> 1) * 8 + (lane & 3) * 2 + (j & 1);
            if (col >= first && col < end)
                touched |= 1u << j;
        }
        for (int done = 0; done < slice.rank; done += EXPAND_RANKS) {
            int n_ranks = min(EXPAND_RANKS, slice.rank - done), padded = (n_ranks + 15) & ~15;
            __syncthreads(); /* the tiles before have been read */
            load_b_rows(m, b + done * n_out, n_out, n_ranks, padded, col_0, first, end);
            load_x1_rows<X1>(m, MT * 16, n, (int64_t)slice.plane * max_rank + done, n_ranks, padded,
                             slice.scale);
            copies_wait<0>();
            __syncthreads();
            for (int k = 0; k < padded; k += 16) {
                uint32_t f[2][4];
#pragma unroll
                for (int j = 0; j < 2; j++)
                    load_b_trans<EXPAND_COLUMNS>(f[j], m.b, warp * 32 + j * 16, k);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    uint32_t high[4], low[4];
                    load_a<EXPAND_RANKS>(high, m.high, i * 16, k);
                    load_a<EXPAND_RANKS>(low, m.low, i * 16, k);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        mma(acc[i][j], high, f[j >> 1][(j & 1) * 2], f[j >> 1][(j & 1) * 2 + 1]);
                        mma(acc[i][j], low, f[j >> 1][(j & 1) * 2], f[j >> 1][(j & 1) * 2 + 1]);
                    }
                }
            }
        }
    }
    add_to_rows<MT, Y>(m, n, col_0, touched, acc);
}

} // namespace

#endif
