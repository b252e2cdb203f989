/* The two halves of every LoRA op, for the rows of one adapter: shrink, x1 = A x, and expand,
 * y += scale B x1. Rows are given by address, so that they may stand anywhere. Shared by lora.cu
 * and moe_lora.cu, which differ in where a block finds its adapter and its rows.
 *
 * Loops end at the loaded rank, rounded up to the 16 of the tensor core with zeros in place of
 * what lies above it, which is never read. The result of a row does not depend on which rows share
 * its block, nor on the pool's rank: ranges of k and steps of rank are cut in the same way always.
 * Shrink has a second form for hundreds of rows, which sums in another order.
 *
 * x1 is float32. Expand gives scale * x1 to the tensor cores as two BF16 numbers (16 bits).
 *
 * At decode both are bound by reading A and B once per adapter, 2 r (n_in + n_out) bytes; with many
 * rows an adapter by x, and by y read and written.
 */
#ifndef QV_KERNELS_LORA_TILES_CUH
#define QV_KERNELS_LORA_TILES_CUH

#include "kernels/device.cuh"
#include "kernels/lora_places.cuh"
#include "kernels/skinny.cuh"

namespace
{

/* --- Two launches in a row ----------------------------------------------------------------- */

/* Expand is launched while shrink runs: it finds its rows and loads B and y, and waits before it
 * reads x1. Everything else that it reads is complete by then: the shrink of experts is launched in
 * the ordinary way, the other lets expand start when all before it is complete. */
/* What comes next in the stream waits for this grid alone, so this grid must not end before the one
 * before: its first block waits even where it has nothing to do. */
__device__ __forceinline__ void stay_behind()
{
    if (blockIdx.x == 0 && blockIdx.y == 0)
        wait_for_previous();
}

/* --- Shrink, few rows ---------------------------------------------------------------------- */

constexpr int SHRINK_RANKS = 16; /* rows of A of a block */
constexpr int SHRINK_SPLITS =
    16; /* ranges of k, a warp each: enough loads in flight for one adapter */
constexpr int SHRINK_ROWS = 16; /* rows of x that share a pass over A */
constexpr int SHRINK_THREADS = 32 * SHRINK_SPLITS;

struct shrink_shared {
    const bf16 *x[SHRINK_ROWS];
    float *x1[SHRINK_ROWS];
    float sums[SHRINK_SPLITS][SHRINK_RANKS][SHRINK_ROWS + 1];
};

/* DEEP, for few blocks: so many loads in flight that only one is on a multiprocessor. */
template <int NT, bool ALIGNED, bool DEEP>
__device__ __forceinline__ void shrink_tiles(shrink_shared &m, const bf16 *a, int64_t n_in,
                                             int n_ranks, int n)
{
    constexpr int AHEAD = DEEP && ALIGNED ? (NT == 1 ? 8 : 5) : 4;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int64_t begin, end;
    split_range(n_in, warp, SHRINK_SPLITS, begin, end);
    for (int tile = 0; tile < n_ranks; tile += 16) {
        float acc[NT][4] = {};
        skinny_product<NT, ALIGNED, AHEAD>(a + tile * n_in, n_in, n_ranks - tile, m.x, n, begin,
                                           end, acc);
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                m.sums[warp][tile + (lane >> 2) + (j >> 1) * 8][i * 8 + (lane & 3) * 2 + (j & 1)] =
                    acc[i][j];
    }
}

/* x1[i][first .. first + 16) below `rank` for n rows whose addresses stand in m: x1[i] is where the
 * row's plane begins. `a` is the plane. All threads of the block. */
template <bool ALIGNED, bool DEEP>
__device__ void shrink_block(shrink_shared &m, const bf16 *a, int64_t n_in, int rank, int first,
                             int n)
{
    int n_ranks = min(SHRINK_RANKS, rank - first);
    a += first * n_in;
    __syncthreads();
    if (n <= 8)
        shrink_tiles<1, ALIGNED, DEEP>(m, a, n_in, n_ranks, n);
    else
        shrink_tiles<2, ALIGNED, DEEP>(m, a, n_in, n_ranks, n);
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

/* --- Shrink, many rows --------------------------------------------------------------------- */

/* 32 rows of x by 64 ranks, which may belong to several planes, so that x is read once where ranks
 * are small. Four stages of 64 along k; 8 warps as 2 x 4. n_in is a multiple of 8. */
constexpr int MANY_X = 32;
constexpr int MANY_RANKS = 64;
constexpr int MANY_STEP = 64;
constexpr int MANY_DEPTH = 4;
constexpr int MANY_LORA_THREADS = 256;

struct many_shared {
    bf16 x[MANY_DEPTH][MANY_X * MANY_STEP], a[MANY_DEPTH][MANY_RANKS * MANY_STEP];
    const bf16 *x_row[MANY_X];
    float *x1[MANY_X];             /* where a row's planes begin */
    const bf16 *a_row[MANY_RANKS]; /* NULL: no such rank */
    int place[MANY_RANKS];         /* plane * max_rank + rank */
};

/* Which ranks stand in columns [first, first + 64): tiles of 16 ranks, plane after plane. `a` is
 * the first plane of A; planes lie a_spacing ranks apart there and x1_spacing in x1. False: none.
 */
__device__ __forceinline__ bool choose_ranks(many_shared &m, const qv_k_lora_slice *slices,
                                             int n_slices, const bf16 *a, int a_spacing,
                                             int x1_spacing, int64_t n_in, int first)
{
    int column = first + (threadIdx.x & (MANY_RANKS - 1)), begin = 0, all = 0;
    const bf16 *row = nullptr;
    int place = 0;
    for (int plane = 0; plane < n_slices; plane++) {
        int rank = plane_rank(slices, n_slices, plane), padded = (rank + 15) & ~15;
        if (column >= begin && column < begin + padded && column - begin < rank) {
            row = a + ((int64_t)plane * a_spacing + column - begin) * n_in;
            place = plane * x1_spacing + column - begin;
        }
        begin += padded;
        all += padded;
    }
    if (threadIdx.x < MANY_RANKS) {
        m.a_row[threadIdx.x] = row;
        m.place[threadIdx.x] = place;
    }
    return first < all;
}

__device__ __forceinline__ void load_many_step(many_shared &m, int stage, int n, int64_t k,
                                               int64_t n_in)
{
    int col = threadIdx.x % 8 * 8;
    bool inside = k + col < n_in;
    int row = threadIdx.x / 8;
    const bf16 *x = row < n ? m.x_row[row] : nullptr;
    copy16(m.x[stage] + tile_at<MANY_STEP>(row, col), x && inside ? x + k + col : m.x_row[0],
           x && inside);
#pragma unroll
    for (int i = 0; i < MANY_RANKS / MANY_X; i++, row += MANY_X) {
        const bf16 *a = m.a_row[row];
        copy16(m.a[stage] + tile_at<MANY_STEP>(row, col), a && inside ? a + k + col : m.x_row[0],
               a && inside);
    }
}

/* x1 of n <= 32 rows, whose addresses stand in m, for the ranks chosen. All threads of the block.
 */
__device__ __forceinline__ void shrink_many(many_shared &m, int64_t n_in, int n)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int steps = (int)((n_in + MANY_STEP - 1) / MANY_STEP);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MANY_DEPTH - 1; i++) {
        if (i < steps)
            load_many_step(m, i, n, i * MANY_STEP, n_in);
        copies_commit();
    }
    int row = (warp & 1) * 16, column = (warp >> 1) * 16;
    float acc[2][4] = {};
    for (int step = 0; step < steps; step++) {
        copies_wait<MANY_DEPTH - 2>();
        __syncthreads();
        if (step + MANY_DEPTH - 1 < steps)
            load_many_step(m, (step + MANY_DEPTH - 1) % MANY_DEPTH, n,
                           (int64_t)(step + MANY_DEPTH - 1) * MANY_STEP, n_in);
        copies_commit();
#pragma unroll
        for (int k = 0; k < MANY_STEP; k += 16) {
            uint32_t x[4], a[4];
            load_a<MANY_STEP>(x, m.x[step % MANY_DEPTH], row, k);
            load_b<MANY_STEP>(a, m.a[step % MANY_DEPTH], column, k);
            mma(acc[0], x, a[0], a[1]);
            mma(acc[1], x, a[2], a[3]);
        }
    }
    copies_wait<0>();
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = row + (lane >> 2) + (i >> 1) * 8, c = column + j * 8 + (lane & 3) * 2 + (i & 1);
            if (r < n && m.a_row[c])
                m.x1[r][m.place[c]] = acc[j][i];
        }
    __syncthreads();
}

/* Blocks along ranks that a site may need. */
inline unsigned rank_blocks(int n_slices, int max_rank)
{
    return (unsigned)((n_slices * ((max_rank + 15) / 16 * 16) + MANY_RANKS - 1) / MANY_RANKS);
}

/* --- Expand ------------------------------------------------------------------------------- */

constexpr int EXPAND_COLUMNS = 256; /* columns of y of a block, 32 a warp */
constexpr int EXPAND_RANKS = 64;    /* rows of B in shared memory at a time */
constexpr int EXPAND_THREADS = 256;

/* For 16 MT rows of y. */
template <int MT> struct expand_shared {
    bf16 b[EXPAND_RANKS * EXPAND_COLUMNS];
    bf16 high[16 * MT * EXPAND_RANKS], low[16 * MT * EXPAND_RANKS];
    const void *x1[16 * MT]; /* float32, or BF16 rows of an embedding's A */
    void *y[16 * MT];
    qv_k_lora_slice slices[QV_K_MAX_SLICES];
};

/* Rows [0, n_ranks) of b and columns [first, end) of the block's, which begin at col_0; zeros
 * around. */
template <int MT>
__device__ __forceinline__ void load_b_rows(expand_shared<MT> &m, const bf16 *b, int64_t n_out,
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

template <int MT, typename X1>
__device__ __forceinline__ void load_x1_rows(expand_shared<MT> &m, int n, int64_t offset,
                                             int n_ranks, int padded, float scale)
{
    for (int i = threadIdx.x; i < 16 * MT * padded / 2; i += EXPAND_THREADS) {
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

/* Of each 16 columns an accumulator gives a lane two pairs eight columns apart. Neighbouring lanes
 * swap a pair, so that a lane holds four columns in a row, 8 bytes, and four lanes the 32 bytes
 * that memory moves at least: even lanes have columns 2 t.. of the first eight, odd ones those of
 * the last eight. */
__device__ __forceinline__ int64_t first_of_four(int64_t col_0, int pair)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    return col_0 + warp * 32 + pair * 16 + (lane & 1) * 8 + (lane & 2) * 2;
}

/* What rows of y hold before; loaded while B is. */
template <int MT, typename Y> struct old_rows {
    uint2 value[MT][2][2]; /* of BF16; float32 is read when it is added to */
};

/* Four columns that can be read and written as one. */
template <typename Y>
__device__ __forceinline__ bool is_whole(const Y *y, int64_t column, int64_t n_out)
{
    return sizeof(Y) == 2 && ((uintptr_t)y & 7) == 0 && column + 4 <= n_out;
}

template <int MT, typename Y>
__device__ __forceinline__ void load_old(const expand_shared<MT> &m, int n, int64_t n_out,
                                         int64_t col_0, old_rows<MT, Y> &old)
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = i * 16 + (lane >> 2) + half * 8;
            const Y *y = row < n ? (const Y *)m.y[row] : nullptr;
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                int64_t column = first_of_four(col_0, pair);
                old.value[i][half][pair] = y && is_whole(y + column, column, n_out)
                                               ? *(const uint2 *)(y + column)
                                               : make_uint2(0, 0);
            }
        }
}

/* y[i][col] += acc where the column has a pair of A and B: bit c of `touched[pair]` for four
 * columns. */
template <int MT, typename Y>
__device__ __forceinline__ void
add_to_rows(const expand_shared<MT> &m, int n, int64_t n_out, int64_t col_0,
            const uint32_t (&touched)[2], const old_rows<MT, Y> &old, const float (&acc)[MT][4][4])
{
    int lane = threadIdx.x & 31;
    bool odd = lane & 1;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = i * 16 + (lane >> 2) + half * 8;
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const float *a = acc[i][2 * pair] + 2 * half, *b = acc[i][2 * pair + 1] + 2 * half;
                float other[2], d[4];
                other[0] = __shfl_xor_sync(0xffffffffu, odd ? a[0] : b[0], 1);
                other[1] = __shfl_xor_sync(0xffffffffu, odd ? a[1] : b[1], 1);
                d[0] = odd ? other[0] : a[0];
                d[1] = odd ? other[1] : a[1];
                d[2] = odd ? b[0] : other[0];
                d[3] = odd ? b[1] : other[1];
                if (row >= n)
                    continue;
                int64_t column = first_of_four(col_0, pair);
                Y *y = (Y *)m.y[row] + column;
                uint2 before = old.value[i][half][pair];
                if (touched[pair] == 15 && is_whole(y, column, n_out)) {
                    *(uint2 *)y = make_uint2(
                        pack_bf16(bf16_low(before.x) + d[0], bf16_high(before.x) + d[1]),
                        pack_bf16(bf16_low(before.y) + d[2], bf16_high(before.y) + d[3]));
                } else {
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        if (touched[pair] >> k & 1)
                            y[k] = (Y)(to_float(y[k]) + d[k]);
                }
            }
        }
}

/* y[i][col_0 .. col_0 + 256) += delta for n <= 16 MT rows whose addresses stand in m; x1[i] is
 * where the row's planes begin, max_rank apart. All threads of the block. */
template <int MT, typename X1, typename Y>
__device__ void expand_block(expand_shared<MT> &m, const bf16 *b, int64_t n_out, int max_rank,
                             const qv_k_slices &ranges, const qv_k_lora_slice *slices,
                             int64_t col_0, int n)
{
    int warp = threadIdx.x >> 5;
    float acc[MT][4][4] = {};
    old_rows<MT, Y> old;
    if (threadIdx.x < ranges.n)
        m.slices[threadIdx.x] = slices[threadIdx.x];
    load_old<MT, Y>(m, n, n_out, col_0, old);
    __syncthreads();
    uint32_t touched[2] = {};
    for (int s = 0; s < ranges.n; s++) {
        int64_t first = max((int64_t)ranges.start[s], col_0);
        int64_t end = min((int64_t)ranges.start[s + 1], col_0 + EXPAND_COLUMNS);
        qv_k_lora_slice slice = m.slices[s];
        if (first >= end || slice.rank == 0)
            continue;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int64_t col = first_of_four(col_0, j >> 2) + (j & 3);
            if (col >= first && col < end)
                touched[j >> 2] |= 1u << (j & 3);
        }
        for (int done = 0; done < slice.rank; done += EXPAND_RANKS) {
            int n_ranks = min(EXPAND_RANKS, slice.rank - done), padded = (n_ranks + 15) & ~15;
            __syncthreads(); /* the tiles before have been read */
            load_b_rows(m, b + done * n_out, n_out, n_ranks, padded, col_0, first, end);
            wait_for_previous();
            load_x1_rows<MT, X1>(m, n, (int64_t)slice.plane * max_rank + done, n_ranks, padded,
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
    add_to_rows<MT, Y>(m, n, n_out, col_0, touched, old, acc);
}

} // namespace

#endif
