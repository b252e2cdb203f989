/* qv_op_linear, exact: y[t, o] is one chain of fused multiply-adds over k = 0, 1, 2 ..., whatever
 * the number of tokens, so a token's result never depends on the batch.
 *
 * Weights come in groups of 64 output rows, [n_in][64] (cpu.h). A tile of some tokens and some
 * vectors of outputs lives in registers: per k it loads the vectors of the weight, broadcasts one x
 * per token, and multiplies all pairs. Few tokens: bound by the memory that streams in the weights,
 * which are widened from BF16 in registers, all of k in one go. Many tokens: bound by the
 * multipliers, so the group is widened once per block of k into the L1 cache and every tile of
 * tokens reads it there; the sums wait between blocks in a float32 tile, which changes no bit.
 */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

/* The largest tile: TOKENS x VECTORS sums, VECTORS weights and a broadcast take 29 registers of 32,
 * 15 of 16, or 11. With fewer tokens a tile is wider, up to MOST_VECTORS, because a chain of sums
 * waits four cycles for each step and a processor wants about eight of them under way. */
#define TOKENS       (QV_SIMD_REGISTERS == 8 ? 4 : 6)
#define VECTORS      (QV_SIMD_REGISTERS == 32 ? 4 : 2)
#define MOST_VECTORS (QV_SIMD_REGISTERS == 32 ? 4 : 8)

#define DIRECT_TOKENS 24   /* up to so many it does not pay to widen weights in the cache first */
#define DIRECT_K      1024 /* 64 x 1024 BF16 weights: 128 KiB, in L2 for the next tile of tokens */
#define WIDE_K        128  /* 64 x 128 widened weights: 32 KiB, the greater part of an L1 cache */

/* --- Register tile ------------------------------------------------------------------------ */

QV_INLINE vn load_weights(const void *w, qv_dtype dtype, int64_t i)
{
    return dtype == QV_BF16 ? vn_load_bf16((const uint16_t *)w + i) : vn_load((const float *)w + i);
}

/* sum[i][j] += x[i][first_k + k] * w[k][j] over all k of [0, n_k), for n_vectors vectors of j.
 * Sizes and dtype are constants at every call, so that the loops over tokens and vectors vanish. */
QV_INLINE void multiply_tile(int n_tokens, int n_vectors, qv_dtype dtype, const float *const *rows,
                             int64_t first_k, const void *w, int64_t w_stride, int64_t n_k,
                             float *sum, int64_t sum_stride)
{
    const float *x[TOKENS];
#pragma GCC unroll 8
    for (int i = 0; i < n_tokens; i++)
        x[i] = rows[i] + first_k;
    vn acc[TOKENS][MOST_VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < n_tokens; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; j++)
            acc[i][j] = vn_load(sum + i * sum_stride + j * QV_VN_LANES);
    for (int64_t k = 0; k < n_k; k++) {
        vn weight[MOST_VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; j++)
            weight[j] = load_weights(w, dtype, k * w_stride + j * QV_VN_LANES);
#pragma GCC unroll 8
        for (int i = 0; i < n_tokens; i++) {
            vn xi = vn_set1(x[i][k]);
#pragma GCC unroll 8
            for (int j = 0; j < n_vectors; j++)
                acc[i][j] = vn_fma(xi, weight[j], acc[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_tokens; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; j++)
            vn_store(sum + i * sum_stride + j * QV_VN_LANES, acc[i][j]);
}

/* Vectors of the next tile when `left` of them are left in the group. */
static int tile_vectors(int n_tokens, int64_t left)
{
    if (MOST_VECTORS == VECTORS)
        return left < VECTORS ? (int)left : VECTORS;
    return n_tokens == 1 && left >= 8 ? 8 : n_tokens <= 2 && left >= 4 ? 4 : 2;
}

/* The same with sizes known when running: one compiled tile for each that tile_vectors gives. */
QV_INLINE void multiply_any(int n_tokens, int n_vectors, qv_dtype dtype, const float *const *x,
                            int64_t first_k, const void *w, int64_t w_stride, int64_t n_k,
                            float *sum, int64_t sum_stride)
{
#define TILE(t, v)                                                                                 \
    case (t)*16 + (v):                                                                             \
        multiply_tile(t, v, dtype, x, first_k, w, w_stride, n_k, sum, sum_stride);                 \
        break;
#if QV_SIMD_REGISTERS == 32
#define TILES(t) TILE(t, 1) TILE(t, 2) TILE(t, 3) TILE(t, 4)
#else
#define TILES(t) TILE(t, 2)
#endif
    switch (n_tokens * 16 + n_vectors) {
        TILES(1)
        TILES(2)
        TILES(3)
        TILES(4)
#if QV_SIMD_REGISTERS != 8
        TILES(5)
        TILES(6)
#endif
#if QV_SIMD_REGISTERS != 32
        TILE(1, 4)
        TILE(1, 8)
        TILE(2, 4)
#endif
    }
#undef TILES
#undef TILE
}

/* Weights are written before a backend runs and never again, and the thread sanitizer would spend
 * four fifths of a test on reading them. It does not see these two read x either; y is written by
 * their caller, which it watches. */
#define UNWATCHED __attribute__((no_sanitize("thread")))

UNWATCHED
static void multiply_bf16(int n_tokens, int n_vectors, const float *const *x, int64_t first_k,
                          const void *w, int64_t w_stride, int64_t n_k, float *sum,
                          int64_t sum_stride)
{
    multiply_any(n_tokens, n_vectors, QV_BF16, x, first_k, w, w_stride, n_k, sum, sum_stride);
}

UNWATCHED
static void multiply_f32(int n_tokens, int n_vectors, const float *const *x, int64_t first_k,
                         const void *w, int64_t w_stride, int64_t n_k, float *sum,
                         int64_t sum_stride)
{
    multiply_any(n_tokens, n_vectors, QV_F32, x, first_k, w, w_stride, n_k, sum, sum_stride);
}

/* --- One group of rows for a block of tokens ---------------------------------------------- */

/* [n_tokens][QV_GROUP] += x[..][first_k ..] times n_k rows of the group in `dtype`. */
static void multiply_block(qv_dtype dtype, const float *const *x, int64_t n_tokens, int64_t first_k,
                           const void *w, int64_t width, int64_t n_k, float *sum)
{
    int64_t size = dtype == QV_BF16 ? 2 : 4;
    int64_t n_tiles = (n_tokens + TOKENS - 1) / TOKENS; /* of nearly the same number of tokens */
    for (int64_t t = 0; n_tiles > 0; n_tiles--) {
        int n = (int)((n_tokens - t + n_tiles - 1) / n_tiles), n_vectors;
        for (int64_t j = 0; j < width; j += n_vectors * QV_VN_LANES) {
            n_vectors = tile_vectors(n, (width - j) / QV_VN_LANES);
            (dtype == QV_BF16 ? multiply_bf16 : multiply_f32)(
                n, n_vectors, x + t, first_k, (const char *)w + j * size, width, n_k,
                sum + t * QV_GROUP + j, QV_GROUP);
        }
        t += n;
    }
}

static void widen(const uint16_t *src, float *dst, int64_t n)
{
    for (int64_t i = 0; i < n; i += 16)
        v_store(dst + i, v_load_bf16(src + i));
}

void QV_ISA(qv_cpu_linear_group)(const qv_weight *w, int64_t expert, int64_t group,
                                 const float *const *x, int64_t n_tokens, float *const *y)
{
    int64_t first = group * QV_GROUP, width = qv_cpu_group_rows(w, first), n_in = w->n_in;
    int64_t size = w->dtype == QV_BF16 ? 2 : 4;
    const char *data = qv_cpu_expert_data((const qv_cpu_weight *)w, expert);
    const char *rows = data + first * n_in * size;
    _Alignas(64) float sum[QV_LINEAR_TOKENS * QV_GROUP];
    memset(sum, 0, (size_t)n_tokens * QV_GROUP * sizeof *sum);

    bool many = n_tokens > DIRECT_TOKENS, widened = many && w->dtype == QV_BF16;
    int64_t block_k = many ? WIDE_K : n_tokens > TOKENS ? DIRECT_K : n_in;
    _Alignas(64) float wide[WIDE_K * QV_GROUP];
    for (int64_t k = 0; k < n_in; k += block_k) {
        int64_t n_k = n_in - k < block_k ? n_in - k : block_k;
        const void *block = rows + k * width * size;
        if (widened)
            widen(block, wide, n_k * width);
        multiply_block(widened ? QV_F32 : w->dtype, x, n_tokens, k, widened ? wide : block, width,
                       n_k, sum);
    }

    int64_t n_rows = w->n_out - first < width ? w->n_out - first : width;
    for (int64_t t = 0; t < n_tokens; t++)
        memcpy(y[t] + first, sum + t * QV_GROUP, (size_t)n_rows * sizeof(float));
}

typedef struct {
    const qv_weight *w;
    qv_tensor x, y;
    int64_t n_groups;
} linear_ctx;

/* Items go through the groups before the next block of tokens, whose x then stays in the cache. */
static void linear_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const linear_ctx *c = ctx;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item / c->n_groups * QV_LINEAR_TOKENS, left = c->x.shape[0] - first;
        int64_t n = left < QV_LINEAR_TOKENS ? left : QV_LINEAR_TOKENS;
        const float *x[QV_LINEAR_TOKENS];
        float *y[QV_LINEAR_TOKENS];
        for (int64_t t = 0; t < n; t++) {
            x[t] = qv_row2(c->x, first + t);
            y[t] = qv_row2(c->y, first + t);
        }
        QV_ISA(qv_cpu_linear_group)(c->w, 0, item % c->n_groups, x, n, y);
    }
}

qv_status QV_ISA(qv_cpu_linear)(qv_backend *be, const qv_weight *weight, qv_tensor x, qv_tensor y)
{
    const qv_cpu_weight *w = (const qv_cpu_weight *)weight;
    if (!w->packed)
        return qv_cpu_linear_openblas(qv_cpu(be), w, x, y);
    linear_ctx c = {
        .w = weight, .x = x, .y = y, .n_groups = (weight->n_out + QV_GROUP - 1) / QV_GROUP};
    int64_t n_blocks = (x.shape[0] + QV_LINEAR_TOKENS - 1) / QV_LINEAR_TOKENS;
    int64_t block = x.shape[0] < QV_LINEAR_TOKENS ? x.shape[0] : QV_LINEAR_TOKENS;
    /* 8 weights per ns from memory, or 50 multiply-adds per ns. */
    int64_t n_weights = weight->n_in * QV_GROUP;
    qv_pool_run(qv_cpu(be)->pool, n_blocks * c.n_groups, n_weights / 8 + n_weights * block / 50,
                linear_items, &c);
    return QV_OK;
}

qv_status QV_ISA(qv_cpu_linear_f32)(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor rest,
                                    qv_tensor y)
{
    (void)rest; /* nothing was rounded */
    return QV_ISA(qv_cpu_linear)(be, w, x, y);
}
