/* The two halves of every LoRA op, for a few rows at a time: shrink, x1 = A x, in sixteen lanes
 * along the input; expand, y += scale * B x1, rank by rank, lanes along the rows of B. Neither
 * order depends on how many rows go together. Loops end at the loaded rank, so what lies above it
 * in a pool is never read. Rows are given by pointers, so that they may stand anywhere.
 */
#ifndef QV_OPS_CPU_LORA_TILES_H
#define QV_OPS_CPU_LORA_TILES_H

#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

#define QV_LORA_MAX_RANK      512
#define QV_LORA_SHRINK_TOKENS 4   /* rows that go through a shrink together */
#define QV_LORA_EXPAND_TOKENS 64  /* rows of one item of an expansion */
#define QV_LORA_EXPAND_ROWS   256 /* and output rows */

/* --- Shrink ------------------------------------------------------------------------------- */

/* Elements [i, i + lanes) of a factor, A or B. */
QV_INLINE v16 qv_lora_load(const void *a, qv_dtype dtype, int64_t i, int64_t lanes)
{
    if (dtype == QV_F32)
        return v_load_lanes((const float *)a + i, lanes);
    return lanes == 16 ? v_load_bf16((const uint16_t *)a + i)
                       : v_load_bf16_n((const uint16_t *)a + i, lanes);
}

/* Ranks of a tile with n rows: 16 sums, or 8 for one row, fill the registers of AVX-512. */
#define QV_LORA_TILE_RANKS(n) ((QV_SIMD_REGISTERS == 32 ? (n) == 1 ? 8 : 16 : 4) / (n))
#define QV_LORA_MOST_RANKS    8

/* acc[j][i] += A[r + i] * x[j], elements [k, k + lanes) of each. */
QV_INLINE void qv_lora_shrink_step(int n_ranks, int n_tokens, qv_dtype dtype, const void *a,
                                   int64_t n_in, int32_t r, const float *const *x, int64_t k,
                                   int64_t lanes, v16 (*acc)[QV_LORA_MOST_RANKS])
{
    v16 xk[QV_LORA_SHRINK_TOKENS];
#pragma GCC unroll 4
    for (int j = 0; j < n_tokens; j++)
        xk[j] = v_load_lanes(x[j] + k, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < n_ranks; i++) {
        v16 ak = qv_lora_load(a, dtype, (r + i) * n_in + k, lanes);
#pragma GCC unroll 4
        for (int j = 0; j < n_tokens; j++)
            acc[j][i] = v_fma(ak, xk[j], acc[j][i]);
    }
}

/* x1[j][r + i] = A[r + i] . x[j] for n_ranks rows of A and n_tokens rows of x. */
QV_INLINE void qv_lora_shrink_tile(int n_ranks, int n_tokens, qv_dtype dtype, const void *a,
                                   int64_t n_in, int32_t r, const float *const *x, float *const *x1)
{
    int64_t k = 0;
    v16 acc[QV_LORA_SHRINK_TOKENS][QV_LORA_MOST_RANKS];
#pragma GCC unroll 8
    for (int i = 0; i < n_ranks; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_tokens; j++)
            acc[j][i] = v_zero();
    for (; k + 16 <= n_in; k += 16)
        qv_lora_shrink_step(n_ranks, n_tokens, dtype, a, n_in, r, x, k, 16, acc);
    if (k < n_in)
        qv_lora_shrink_step(n_ranks, n_tokens, dtype, a, n_in, r, x, k, n_in - k, acc);
#if QV_SIMD_REGISTERS == 32
    if (n_ranks == 4 && n_tokens == 4) {
        float sum[4][4];
        v16 square[4][4];
        for (int j = 0; j < 4; j++)
            memcpy(square[j], acc[j], sizeof square[j]);
        v_store(sum[0], v_sum_4x4(square));
        for (int j = 0; j < 4; j++)
            memcpy(x1[j] + r, sum[j], sizeof sum[j]);
        return;
    }
#endif
#pragma GCC unroll 8
    for (int i = 0; i < n_ranks; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_tokens; j++)
            x1[j][r + i] = v_sum(acc[j][i]);
}

QV_INLINE void qv_lora_shrink_ranks(int n_tokens, qv_dtype dtype, const void *a, int64_t n_in,
                                    int32_t rank, const float *const *x, float *const *x1)
{
    const int n_ranks = QV_LORA_TILE_RANKS(n_tokens);
    int32_t r = 0;
    for (; r + n_ranks <= rank; r += n_ranks)
        qv_lora_shrink_tile(n_ranks, n_tokens, dtype, a, n_in, r, x, x1);
    for (; r < rank; r++)
        qv_lora_shrink_tile(1, n_tokens, dtype, a, n_in, r, x, x1);
}

QV_INLINE void qv_lora_shrink_rows(qv_dtype dtype, const void *a, int64_t n_in, int32_t rank,
                                   int64_t n_tokens, const float *const *x, float *const *x1)
{
    if (n_tokens == QV_LORA_SHRINK_TOKENS) {
        qv_lora_shrink_ranks(QV_LORA_SHRINK_TOKENS, dtype, a, n_in, rank, x, x1);
        return;
    }
    for (; n_tokens >= 2; n_tokens -= 2, x += 2, x1 += 2)
        qv_lora_shrink_ranks(2, dtype, a, n_in, rank, x, x1);
    if (n_tokens == 1)
        qv_lora_shrink_ranks(1, dtype, a, n_in, rank, x, x1);
}

/* x1[j][0 .. rank) = A x[j] for up to QV_LORA_SHRINK_TOKENS rows; A [rank or more, n_in]. */
static inline void qv_lora_shrink(qv_dtype dtype, const void *a, int64_t n_in, int32_t rank,
                                  int64_t n_tokens, const float *const *x, float *const *x1)
{
    if (dtype == QV_F32)
        qv_lora_shrink_rows(QV_F32, a, n_in, rank, n_tokens, x, x1);
    else
        qv_lora_shrink_rows(QV_BF16, a, n_in, rank, n_tokens, x, x1);
}

/* --- Expand ------------------------------------------------------------------------------- */

#define QV_LORA_EXPAND_TILE_TOKENS 4 /* rows of one register tile, and vectors of output rows */
#define QV_LORA_EXPAND_VECTORS     (QV_SIMD_REGISTERS == 32 ? 4 : 1)

/* y[i][row ...] += scale * x1[i] B for n_tokens rows and n_vectors vectors of output rows; with one
 * vector, for its first `lanes` rows. `b` is output row `row` at rank 0. */
QV_INLINE void qv_lora_expand_tile(int n_tokens, int n_vectors, qv_dtype dtype, const void *b,
                                   int64_t n_out, int32_t rank, float scale, const float *const *x1,
                                   float *const *y, int64_t row, int64_t lanes)
{
    v16 acc[QV_LORA_EXPAND_TILE_TOKENS][QV_LORA_EXPAND_VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < n_tokens; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            acc[i][j] = v_zero();
    for (int32_t r = 0; r < rank; r++) {
        v16 br[QV_LORA_EXPAND_VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            br[j] = qv_lora_load(b, dtype, r * n_out + 16 * j, lanes);
#pragma GCC unroll 4
        for (int i = 0; i < n_tokens; i++) {
            v16 xr = v_set1(x1[i][r]);
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; j++)
                acc[i][j] = v_fma(xr, br[j], acc[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n_tokens; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++) {
            float *cell = y[i] + row + 16 * j;
            v_store_lanes(cell, v_fma(v_set1(scale), acc[i][j], v_load_lanes(cell, lanes)), lanes);
        }
    }
}

/* One tile of output rows for any number of rows. */
QV_INLINE void qv_lora_expand_tokens(int n_vectors, qv_dtype dtype, const void *b, int64_t n_out,
                                     int32_t rank, float scale, int64_t n_tokens,
                                     const float *const *x1, float *const *y, int64_t row,
                                     int64_t lanes)
{
    int64_t i = 0;
    for (; i + QV_LORA_EXPAND_TILE_TOKENS <= n_tokens; i += QV_LORA_EXPAND_TILE_TOKENS)
        qv_lora_expand_tile(QV_LORA_EXPAND_TILE_TOKENS, n_vectors, dtype, b, n_out, rank, scale,
                            x1 + i, y + i, row, lanes);
    for (; i < n_tokens; i++)
        qv_lora_expand_tile(1, n_vectors, dtype, b, n_out, rank, scale, x1 + i, y + i, row, lanes);
}

QV_INLINE void qv_lora_expand_rows(qv_dtype dtype, const void *b, int64_t n_out, int32_t rank,
                                   float scale, int64_t n_tokens, const float *const *x1,
                                   float *const *y, int64_t row, int64_t end)
{
    const int64_t size = dtype == QV_F32 ? 4 : 2, wide = 16 * QV_LORA_EXPAND_VECTORS;
    const char *data = b;
    for (; row + wide <= end; row += wide)
        qv_lora_expand_tokens(QV_LORA_EXPAND_VECTORS, dtype, data + row * size, n_out, rank, scale,
                              n_tokens, x1, y, row, 16);
    for (; row + 16 <= end; row += 16)
        qv_lora_expand_tokens(1, dtype, data + row * size, n_out, rank, scale, n_tokens, x1, y, row,
                              16);
    if (row < end)
        qv_lora_expand_tokens(1, dtype, data + row * size, n_out, rank, scale, n_tokens, x1, y, row,
                              end - row);
}

/* y[i][row] += scale * sum over r of B[r][row] x1[i][r] for output rows [row, end) of B
 * [rank or more, n_out], and n_tokens rows of x1 and y. */
static inline void qv_lora_expand(qv_dtype dtype, const void *b, int64_t n_out, int32_t rank,
                                  float scale, int64_t n_tokens, const float *const *x1,
                                  float *const *y, int64_t row, int64_t end)
{
    if (dtype == QV_F32)
        qv_lora_expand_rows(QV_F32, b, n_out, rank, scale, n_tokens, x1, y, row, end);
    else
        qv_lora_expand_rows(QV_BF16, b, n_out, rank, scale, n_tokens, x1, y, row, end);
}

#endif
