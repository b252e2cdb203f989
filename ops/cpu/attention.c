/* Causal attention over paged keys and values, by online softmax (Milakov and Gimelshein, 2018).
 *
 * Keys are walked in blocks of 64 positions that start at position 0, whatever the pages and the
 * chunk of the prompt, so that a token meets the same blocks in every batch. All query heads that
 * share a KV head, and neighbouring tokens of a sequence, form the rows of one item: a block of
 * keys is loaded once for all of them. Per block: scores (sixteen lanes along the head, then
 * folded), weights exp(score - running maximum), and the weighted sum of the values into o.
 */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

#define KEYS 64 /* positions of one block */
#define ROWS 64 /* query rows (token, head) of one item */

/* Register tiles: rows x keys of scores, rows x vectors of the output. */
#if QV_SIMD_REGISTERS == 32
#define TILE 4
#else
#define TILE 2
#endif

typedef struct {
    const qv_batch *batch;
    const qv_kv_layer *kv;
    float scale;
    qv_tensor q, o;
    int64_t group; /* query heads of one KV head */
} attention_ctx;

/* The rows of an item and what is known about them so far. */
typedef struct {
    int64_t n;
    const float *q[ROWS];
    float *o[ROWS];       /* sums of weighted values */
    int32_t n_keys[ROWS]; /* positions that the row may see */
    float max[ROWS];      /* of all scores so far */
    float sum[ROWS];      /* of all weights so far */
    float score[ROWS][KEYS];
    int32_t n_seen[ROWS]; /* keys of this block that the row may see */
    float fade[ROWS];     /* what earlier weights are multiplied with, the maximum having grown */
} query_rows;

typedef struct {
    int32_t first, n; /* positions [first, first + n) */
    const float *k[KEYS], *v[KEYS];
} key_block;

/* --- Scores ------------------------------------------------------------------------------- */

/* acc[i][j] += q[i] * k[j], elements [x, x + lanes) of each. */
QV_INLINE void score_step(int n_rows, int n_keys, const float *const *q, const float *const *k,
                          int64_t x, int64_t lanes, v16 (*acc)[TILE])
{
    v16 key[TILE];
#pragma GCC unroll 4
    for (int j = 0; j < n_keys; j++)
        key[j] = v_load_lanes(k[j] + x, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++) {
        v16 query = v_load_lanes(q[i] + x, lanes);
#pragma GCC unroll 4
        for (int j = 0; j < n_keys; j++)
            acc[i][j] = v_fma(query, key[j], acc[i][j]);
    }
}

QV_INLINE void score_tile(int n_rows, int n_keys, const float *const *q, const float *const *k,
                          int64_t d, float scale, float (*score)[KEYS])
{
    v16 acc[TILE][TILE];
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_keys; j++)
            acc[i][j] = v_zero();
    int64_t x = 0;
    for (; x + 16 <= d; x += 16)
        score_step(n_rows, n_keys, q, k, x, 16, acc);
    if (x < d)
        score_step(n_rows, n_keys, q, k, x, d - x, acc);
#if TILE == 4
    if (n_rows == 4 && n_keys == 4) {
        float sum[4][4];
        v_store(sum[0], v_mul(v_sum_4x4(acc), v_set1(scale)));
        for (int i = 0; i < 4; i++)
            memcpy(score[i], sum[i], sizeof sum[i]);
        return;
    }
#endif
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_keys; j++)
            score[i][j] = v_sum(acc[i][j]) * scale;
}

static void score_rows(query_rows *rows, const key_block *block, int64_t d, float scale)
{
    for (int64_t i = 0; i < rows->n;) {
        int64_t n = rows->n - i >= TILE ? TILE : 1;
        for (int32_t j = 0; j < block->n;) {
            int32_t n_keys = block->n - j >= TILE ? TILE : 1;
            float(*score)[KEYS] = (float(*)[KEYS]) & rows->score[i][j];
            if (n == TILE && n_keys == TILE)
                score_tile(TILE, TILE, rows->q + i, block->k + j, d, scale, score);
            else if (n == TILE)
                score_tile(TILE, 1, rows->q + i, block->k + j, d, scale, score);
            else if (n_keys == TILE)
                score_tile(1, TILE, rows->q + i, block->k + j, d, scale, score);
            else
                score_tile(1, 1, rows->q + i, block->k + j, d, scale, score);
            j += n_keys;
        }
        i += n;
    }
}

/* --- Weights ------------------------------------------------------------------------------ */

/* Turn the first n scores of a row into weights; the rest of its last vector becomes 0. */
static void weigh_row(query_rows *rows, int64_t i, int32_t n)
{
    float *score = rows->score[i];
    for (int32_t j = n; j % 16 != 0; j++)
        score[j] = -INFINITY;
    v16 max = v_set1(rows->max[i]);
    for (int32_t j = 0; j < n; j += 16)
        max = v_max(max, v_load(score + j));
    float new_max = v_max_lane(max);
    v16 sum = v_zero();
    for (int32_t j = 0; j < n; j += 16) {
        v16 weight = v_exp(v_sub(v_load(score + j), v_set1(new_max)));
        v_store(score + j, weight);
        sum = v_add(sum, weight);
    }
    rows->fade[i] = new_max == rows->max[i] ? 1.0f : expf(rows->max[i] - new_max);
    rows->sum[i] = rows->sum[i] * rows->fade[i] + v_sum(sum);
    rows->max[i] = new_max;
}

static void weigh_rows(query_rows *rows, const key_block *block)
{
    for (int64_t i = 0; i < rows->n; i++) {
        int32_t left = rows->n_keys[i] - block->first;
        int32_t n = left < 0 ? 0 : left < block->n ? left : block->n;
        rows->n_seen[i] = n;
        rows->fade[i] = 1.0f;
        if (n > 0)
            weigh_row(rows, i, n);
    }
}

/* --- Values ------------------------------------------------------------------------------- */

/* o[i][x ...] = o * fade + sum over keys of weight * v. The rows of a tile go together over the
 * keys that all may see, then each takes its own last ones: a row never touches a later token's
 * value. */
QV_INLINE void value_tile(int n_rows, int n_vectors, query_rows *rows, int64_t first,
                          const key_block *block, int64_t x, int64_t lanes)
{
    v16 acc[TILE][TILE];
    int32_t n_common = rows->n_seen[first];
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++) {
        n_common = rows->n_seen[first + i] < n_common ? rows->n_seen[first + i] : n_common;
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            acc[i][j] = v_mul(v_load_lanes(rows->o[first + i] + x + 16 * j, lanes),
                              v_set1(rows->fade[first + i]));
    }
    for (int32_t key = 0; key < n_common; key++) {
        v16 value[TILE];
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            value[j] = v_load_lanes(block->v[key] + x + 16 * j, lanes);
#pragma GCC unroll 4
        for (int i = 0; i < n_rows; i++) {
            v16 weight = v_set1(rows->score[first + i][key]);
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; j++)
                acc[i][j] = v_fma(weight, value[j], acc[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++) {
        for (int32_t key = n_common; key < rows->n_seen[first + i]; key++) {
            v16 weight = v_set1(rows->score[first + i][key]);
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; j++)
                acc[i][j] =
                    v_fma(weight, v_load_lanes(block->v[key] + x + 16 * j, lanes), acc[i][j]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            v_store_lanes(rows->o[first + i] + x + 16 * j, acc[i][j], lanes);
    }
}

static void add_values(query_rows *rows, const key_block *block, int64_t d)
{
    for (int64_t x = 0; x < d;) {
        bool wide = d - x >= 16 * TILE;
        int64_t lanes = d - x < 16 ? d - x : 16;
        for (int64_t i = 0; i < rows->n;) {
            bool tall = rows->n - i >= TILE;
            if (wide && tall)
                value_tile(TILE, TILE, rows, i, block, x, 16);
            else if (wide)
                value_tile(1, TILE, rows, i, block, x, 16);
            else if (tall)
                value_tile(TILE, 1, rows, i, block, x, lanes);
            else
                value_tile(1, 1, rows, i, block, x, lanes);
            i += tall ? TILE : 1;
        }
        x += wide ? 16 * TILE : lanes;
    }
}

/* --- Items -------------------------------------------------------------------------------- */

static void find_keys(const attention_ctx *c, int32_t seq, int64_t kv_head, key_block *block)
{
    const qv_kv_layer *kv = c->kv;
    const int32_t *pages = c->batch->page_table + (int64_t)seq * c->batch->page_stride;
    int64_t d = kv->k.shape[3], stride = kv->k.shape[2] * d;
    for (int32_t i = 0; i < block->n; i++) {
        int32_t pos = block->first + i;
        int64_t page = pages[pos / kv->page_tokens];
        int64_t offset = (page * kv->page_tokens + pos % kv->page_tokens) * stride + kv_head * d;
        block->k[i] = (const float *)kv->k.data + offset;
        block->v[i] = (const float *)kv->v.data + offset;
    }
}

/* Rows [first, first + n) of the (token, head) pairs of a sequence and KV head, token by token. */
static int32_t gather_rows(const attention_ctx *c, int32_t seq, int64_t kv_head, int64_t first,
                           int64_t n, query_rows *rows)
{
    int32_t most = 0;
    rows->n = n;
    for (int64_t i = 0; i < n; i++) {
        int64_t t = c->batch->seq_start[seq] + (first + i) / c->group;
        int64_t head = kv_head * c->group + (first + i) % c->group;
        rows->q[i] = qv_row3(c->q, t, head);
        rows->o[i] = qv_row3(c->o, t, head);
        memset(rows->o[i], 0, (size_t)c->o.shape[2] * sizeof(float));
        rows->n_keys[i] = c->batch->pos[t] + 1;
        rows->max[i] = -INFINITY;
        rows->sum[i] = 0;
        most = rows->n_keys[i] > most ? rows->n_keys[i] : most;
    }
    return most;
}

static void attend(const attention_ctx *c, int32_t seq, int64_t kv_head, int64_t first, int64_t n)
{
    int64_t d = c->q.shape[2];
    query_rows rows;
    int32_t n_keys = gather_rows(c, seq, kv_head, first, n, &rows);
    for (int32_t pos = 0; pos < n_keys; pos += KEYS) {
        key_block block = {.first = pos, .n = n_keys - pos < KEYS ? n_keys - pos : KEYS};
        find_keys(c, seq, kv_head, &block);
        score_rows(&rows, &block, d, c->scale);
        weigh_rows(&rows, &block);
        add_values(&rows, &block, d);
    }
    for (int64_t i = 0; i < n; i++) {
        v16 scale = v_set1(1.0f / rows.sum[i]);
        QV_FOR_LANES(x, lanes, d)
        v_store_lanes(rows.o[i] + x, v_mul(v_load_lanes(rows.o[i] + x, lanes), scale), lanes);
    }
}

static int64_t n_tiles_of(const attention_ctx *c, int32_t seq)
{
    int64_t n_tokens = c->batch->seq_start[seq + 1] - c->batch->seq_start[seq];
    return (n_tokens * c->group + ROWS - 1) / ROWS;
}

/* Items: sequences, in each KV heads, in each tiles of rows. */
static void attention_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const attention_ctx *c = ctx;
    int64_t n_kv = c->kv->k.shape[2], base = 0;
    for (int32_t seq = 0; seq < c->batch->n_seqs && base < end; seq++) {
        int64_t n_tiles = n_tiles_of(c, seq), n_items = n_tiles * n_kv;
        int64_t n_rows = (c->batch->seq_start[seq + 1] - c->batch->seq_start[seq]) * c->group;
        for (int64_t i = begin > base ? begin - base : 0; i < n_items && base + i < end; i++) {
            int64_t first = i % n_tiles * ROWS;
            attend(c, seq, i / n_tiles, first, n_rows - first < ROWS ? n_rows - first : ROWS);
        }
        base += n_items;
    }
}

qv_status QV_ISA(qv_cpu_attention)(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                                   float scale, qv_tensor q, qv_tensor o)
{
    int64_t n_kv = kv->k.shape[2];
    attention_ctx c = {
        .batch = batch, .kv = kv, .scale = scale, .q = q, .o = o, .group = q.shape[1] / n_kv};
    int64_t n_items = 0, n_scores = 0;
    for (int32_t seq = 0; seq < batch->n_seqs; seq++) {
        int64_t n_tokens = batch->seq_start[seq + 1] - batch->seq_start[seq];
        n_items += n_tiles_of(&c, seq) * n_kv;
        if (n_tokens > 0)
            n_scores += n_tokens * (batch->pos[batch->seq_start[seq + 1] - 1] + 1);
    }
    /* Two multiply-adds per element of a head and score, some 20 of them per ns. */
    int64_t ns = n_scores * q.shape[1] * (q.shape[2] / 10 + 1);
    qv_pool_run(qv_cpu(be)->pool, n_items, n_items ? ns / n_items : 0, attention_items, &c);
    return QV_OK;
}
