/* Mamba-2's recurrence, token by token. The rows of a head's state [d][n_state] never meet, so an
 * item is a head and up to 64 of its rows: 32 KiB of state at n_state = 128, which stay in the L1
 * cache while the tokens of the sequence pass. Lanes run along the state; each row adds up y in one
 * chain per lane and folds the lanes at the end.
 */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

#define ITEM_ROWS 64
#define TILE_ROWS 4  /* rows that share the loads of B and C */
#define FOLD_ROWS 16 /* rows whose lanes are added up together */

typedef struct {
    const qv_batch *batch;
    const qv_ssd_args *args;
    int64_t n_heads, d, n_state, heads_per_group, n_chunks;
} ssd_ctx;

/* What a token does to every row of a head. */
typedef struct {
    const float *b, *c;
    float dt, decay, d_skip;
} ssd_step;

/* S = decay S + in b^T for elements [k, k + lanes) of n_rows rows; acc += S c. */
QV_INLINE void step_lanes(int n_rows, const ssd_step *s, v16 decay, int64_t n_state, float *state,
                          const v16 *in, int64_t k, int64_t lanes, v16 *acc)
{
    v16 b = v_load_lanes(s->b + k, lanes), c = v_load_lanes(s->c + k, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++) {
        float *cell = state + i * n_state + k;
        v16 now = v_fma(in[i], b, v_mul(v_load_lanes(cell, lanes), decay));
        v_store_lanes(cell, now, lanes);
        acc[i] = v_fma(now, c, acc[i]);
    }
}

/* One token for n_rows rows: sum[i] becomes S c in sixteen lanes. */
QV_INLINE void step_rows(int n_rows, const ssd_step *s, int64_t n_state, float *state,
                         const float *x, v16 *sum)
{
    v16 in[TILE_ROWS], acc[TILE_ROWS], decay = v_set1(s->decay);
    int64_t k = 0;
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++) {
        in[i] = v_set1(s->dt * x[i]);
        acc[i] = v_zero();
    }
    for (; k + 16 <= n_state; k += 16)
        step_lanes(n_rows, s, decay, n_state, state, in, k, 16, acc);
    if (k < n_state)
        step_lanes(n_rows, s, decay, n_state, state, in, k, n_state - k, acc);
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; i++)
        sum[i] = acc[i];
}

/* out[i] = the sum of the lanes of sum[i] */
static void fold_lanes(v16 (*sum)[TILE_ROWS], int64_t n_rows, float *out)
{
#if QV_SIMD_REGISTERS == 32
    if (n_rows == FOLD_ROWS) {
        v_store(out, v_sum_4x4(sum));
        return;
    }
#endif
    for (int64_t i = 0; i < n_rows; i++)
        out[i] = v_sum(sum[i / TILE_ROWS][i % TILE_ROWS]);
}

/* One token for n_rows rows: y = S c + d_skip x. */
static void step(const ssd_ctx *c, const ssd_step *s, float *state, const float *x, float *y,
                 int64_t n_rows)
{
    for (int64_t first = 0; first < n_rows; first += FOLD_ROWS) {
        int64_t n = n_rows - first < FOLD_ROWS ? n_rows - first : FOLD_ROWS, i = 0;
        v16 sum[FOLD_ROWS / TILE_ROWS][TILE_ROWS];
        float *rows = state + first * c->n_state, folded[FOLD_ROWS];
        for (; i + TILE_ROWS <= n; i += TILE_ROWS)
            step_rows(TILE_ROWS, s, c->n_state, rows + i * c->n_state, x + first + i,
                      sum[i / TILE_ROWS]);
        for (; i < n; i++)
            step_rows(1, s, c->n_state, rows + i * c->n_state, x + first + i,
                      &sum[i / TILE_ROWS][i % TILE_ROWS]);
        fold_lanes(sum, n, folded);
        for (i = 0; i < n; i++)
            y[first + i] = folded[i] + s->d_skip * x[first + i];
    }
}

/* The tokens [start, end) of a sequence for rows [first, first + n_rows) of a head. */
static void run_rows(const ssd_ctx *c, int64_t start, int64_t end, int64_t head, int64_t first,
                     int64_t n_rows, float *state)
{
    const qv_ssd_args *a = c->args;
    int64_t group = head / c->heads_per_group;
    float rate = -expf(((const float *)a->a_log.data)[head]);
    float dt_bias = ((const float *)a->dt_bias.data)[head];
    for (int64_t t = start; t < end; t++) {
        float dt = qv_softplus(qv_row2(a->dt, t)[head] + dt_bias);
        dt = dt < a->dt_min ? a->dt_min : dt > a->dt_max ? a->dt_max : dt; /* NaN stays NaN */
        ssd_step s = {
            .b = qv_row3(a->b, t, group),
            .c = qv_row3(a->c, t, group),
            .dt = dt,
            .decay = expf(dt * rate),
            .d_skip = ((const float *)a->d_skip.data)[head],
        };
        step(c, &s, state, qv_row3(a->x, t, head) + first, qv_row3(a->y, t, head) + first, n_rows);
    }
}

/* Items: sequences, in each heads, in each chunks of rows. */
static void ssd_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const ssd_ctx *c = ctx;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % c->n_chunks * ITEM_ROWS, head = item / c->n_chunks % c->n_heads;
        int64_t seq = item / c->n_chunks / c->n_heads, left = c->d - first;
        int64_t n_rows = left < ITEM_ROWS ? left : ITEM_ROWS;
        int32_t start = c->batch->seq_start[seq], end_token = c->batch->seq_start[seq + 1];
        if (start == end_token)
            continue;
        int64_t slot = c->batch->state_slot[seq];
        float *state =
            (float *)c->args->state.data + ((slot * c->n_heads + head) * c->d + first) * c->n_state;
        if (c->batch->pos[start] == 0)
            memset(state, 0, (size_t)(n_rows * c->n_state) * sizeof *state);
        run_rows(c, start, end_token, head, first, n_rows, state);
    }
}

qv_status QV_ISA(qv_cpu_ssd)(qv_backend *be, const qv_batch *batch, const qv_ssd_args *args)
{
    ssd_ctx c = {
        .batch = batch,
        .args = args,
        .n_heads = args->x.shape[1],
        .d = args->x.shape[2],
        .n_state = args->b.shape[2],
        .heads_per_group = args->x.shape[1] / args->b.shape[1],
        .n_chunks = (args->x.shape[2] + ITEM_ROWS - 1) / ITEM_ROWS,
    };
    int64_t n_items = batch->n_seqs * c.n_heads * c.n_chunks;
    int64_t ns = batch->n_tokens * c.n_heads * (60 * c.n_chunks + c.d * (3 + c.n_state / 20));
    qv_pool_run(qv_cpu(be)->pool, n_items, n_items ? ns / n_items : 0, ssd_items, &c);
    return QV_OK;
}
