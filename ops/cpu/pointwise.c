/* Ops that treat every element, or every row, by itself: embedding, gathers, gates, RoPE. */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

/* --- Rows: embed, gather_rows ------------------------------------------------------------- */

typedef struct {
    qv_tensor table, y;
    int64_t first; /* the table's first row is row `first` */
    const int32_t *row;
} rows_ctx;

static void copy_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const rows_ctx *c = ctx;
    int64_t d = c->y.shape[1];
    for (int64_t i = begin; i < end; i++) {
        int64_t row = c->row[i] - c->first;
        float *y = qv_row2(c->y, i);
        if (row < 0 || row >= c->table.shape[0]) {
            memset(y, 0, (size_t)d * sizeof *y);
            continue;
        }
        if (c->table.dtype == QV_F32) {
            memcpy(y, qv_row2(c->table, row), (size_t)d * sizeof *y);
            continue;
        }
        const uint16_t *x = (const uint16_t *)c->table.data + row * c->table.stride[0];
        for (int64_t j = 0; j < d; j++)
            y[j] = qv_bf16_to_f32(x[j]);
    }
}

qv_status QV_ISA(qv_cpu_embed)(qv_backend *be, qv_tensor table, int64_t first, const int32_t *ids,
                               qv_tensor y)
{
    rows_ctx c = {.table = table, .y = y, .row = ids, .first = first};
    qv_pool_run(qv_cpu(be)->pool, y.shape[0], 20 + y.shape[1] / 8, copy_rows, &c);
    return QV_OK;
}

qv_status QV_ISA(qv_cpu_gather_rows)(qv_backend *be, qv_tensor x, const int32_t *rows, qv_tensor y)
{
    return QV_ISA(qv_cpu_embed)(be, x, 0, rows, y);
}

/* --- Elements: swiglu, sigmoid_gate, add -------------------------------------------------- */

typedef struct {
    qv_tensor a, b, y; /* [T, n, d] */
} pair_ctx;

static void swiglu_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const pair_ctx *c = ctx;
    int64_t n = c->y.shape[1], d = c->y.shape[2];
    for (int64_t row = begin; row < end; row++) {
        const float *gate = qv_row3(c->a, row / n, row % n), *up = qv_row3(c->b, row / n, row % n);
        float *y = qv_row3(c->y, row / n, row % n);
        QV_FOR_LANES(i, lanes, d)
        {
            v16 u = v_silu(v_load_lanes(gate + i, lanes));
            v_store_lanes(y + i, v_mul(u, v_load_lanes(up + i, lanes)), lanes);
        }
    }
}

static void sigmoid_gate_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const pair_ctx *c = ctx;
    int64_t n = c->y.shape[1], d = c->y.shape[2];
    for (int64_t row = begin; row < end; row++) {
        const float *gate = qv_row3(c->a, row / n, row % n);
        float *x = qv_row3(c->y, row / n, row % n);
        QV_FOR_LANES(i, lanes, d)
        {
            v16 g = v_sigmoid(v_load_lanes(gate + i, lanes));
            v_store_lanes(x + i, v_mul(v_load_lanes(x + i, lanes), g), lanes);
        }
    }
}

/* b is [T, 1, 1], one gate a token, or empty. */
static void add_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const pair_ctx *c = ctx;
    for (int64_t t = begin; t < end; t++) {
        v16 g = v_set1(1.0f);
        if (c->b.data != NULL)
            g = v_sigmoid(v_set1(*qv_row3(c->b, t, 0)));
        const float *delta = qv_row3(c->a, t, 0);
        float *residual = qv_row3(c->y, t, 0);
        QV_FOR_LANES(i, lanes, c->y.shape[2])
        {
            v16 part = v_mul(v_load_lanes(delta + i, lanes), g);
            v_store_lanes(residual + i, v_add(v_load_lanes(residual + i, lanes), part), lanes);
        }
    }
}

static void relu2_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const pair_ctx *c = ctx;
    for (int64_t t = begin; t < end; t++) {
        const float *x = qv_row3(c->a, t, 0);
        float *y = qv_row3(c->y, t, 0);
        QV_FOR_LANES(i, lanes, c->y.shape[2])
        {
            v16 positive =
                v_max(v_zero(), v_load_lanes(x + i, lanes)); /* in this order NaN stays */
            v_store_lanes(y + i, v_mul(positive, positive), lanes);
        }
    }
}

/* `ns_per_16` is an estimate for the pool. */
static void run_rows(qv_backend *be, pair_ctx *c, int64_t ns_per_16, qv_pool_fn *fn)
{
    int64_t n_rows = c->y.shape[0] * c->y.shape[1];
    qv_pool_run(qv_cpu(be)->pool, n_rows, 5 + c->y.shape[2] * ns_per_16 / 16, fn, c);
}

static qv_tensor one_each(qv_tensor t)
{
    return qv_tensor_split(t, 1, t.shape[1]);
}

qv_status QV_ISA(qv_cpu_swiglu)(qv_backend *be, qv_tensor gate, qv_tensor up, qv_tensor y)
{
    pair_ctx c = {.a = one_each(gate), .b = one_each(up), .y = one_each(y)};
    run_rows(be, &c, 8, swiglu_rows);
    return QV_OK;
}

qv_status QV_ISA(qv_cpu_sigmoid_gate)(qv_backend *be, qv_tensor x, qv_tensor gate)
{
    pair_ctx c = {.a = gate, .y = x};
    run_rows(be, &c, 8, sigmoid_gate_rows);
    return QV_OK;
}

qv_status QV_ISA(qv_cpu_relu2)(qv_backend *be, qv_tensor x, qv_tensor y)
{
    pair_ctx c = {.a = one_each(x), .y = one_each(y)};
    run_rows(be, &c, 2, relu2_rows);
    return QV_OK;
}

qv_status QV_ISA(qv_cpu_add)(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor gate)
{
    pair_ctx c = {.a = one_each(delta), .y = one_each(residual)};
    if (gate.data != NULL)
        c.b = one_each(gate);
    run_rows(be, &c, 2, add_rows);
    return QV_OK;
}

/* --- rope_kv_write ------------------------------------------------------------------------ */

#define MAX_ROTARY 1024

typedef struct {
    const qv_batch *batch;
    const qv_kv_layer *kv;
    qv_tensor q, k, v;
    int rotary_dim;
    double inv_freq[MAX_ROTARY / 2]; /* theta^(-2i / rotary_dim) */
} rope_ctx;

/* dst = src with its first rotary dimensions turned in pairs (i, i + half); src may be dst. */
static void rotate(const float *src, float *dst, const float *cosine, const float *sine,
                   int rotary_dim, int64_t d)
{
    int half = rotary_dim / 2;
    QV_FOR_LANES(i, lanes, half)
    {
        v16 a = v_load_lanes(src + i, lanes), b = v_load_lanes(src + half + i, lanes);
        v16 co = v_load_lanes(cosine + i, lanes), si = v_load_lanes(sine + i, lanes);
        v_store_lanes(dst + i, v_sub(v_mul(a, co), v_mul(b, si)), lanes);
        v_store_lanes(dst + half + i, v_add(v_mul(b, co), v_mul(a, si)), lanes);
    }
    if (src != dst)
        memcpy(dst + rotary_dim, src + rotary_dim, (size_t)(d - rotary_dim) * sizeof *dst);
}

static void rope_token(const rope_ctx *c, int32_t t, int32_t seq)
{
    const qv_kv_layer *kv = c->kv;
    int64_t n_kv = kv->k.shape[2], d = kv->k.shape[3];
    int32_t pos = c->batch->pos[t];
    float cosine[MAX_ROTARY / 2], sine[MAX_ROTARY / 2];
    for (int i = 0; i < c->rotary_dim / 2; i++) {
        double angle = pos * c->inv_freq[i];
        cosine[i] = (float)cos(angle);
        sine[i] = (float)sin(angle);
    }
    for (int64_t h = 0; h < c->q.shape[1]; h++)
        rotate(qv_row3(c->q, t, h), qv_row3(c->q, t, h), cosine, sine, c->rotary_dim, d);

    int64_t page =
        c->batch->page_table[(int64_t)seq * c->batch->page_stride + pos / kv->page_tokens];
    QV_ASSERT(page >= 0 && page < kv->k.shape[0]);
    int64_t slot = (page * kv->page_tokens + pos % kv->page_tokens) * n_kv * d;
    for (int64_t h = 0; h < n_kv; h++) {
        rotate(qv_row3(c->k, t, h), (float *)kv->k.data + slot + h * d, cosine, sine, c->rotary_dim,
               d);
        memcpy((float *)kv->v.data + slot + h * d, qv_row3(c->v, t, h), (size_t)d * sizeof(float));
    }
}

static void rope_tokens(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const rope_ctx *c = ctx;
    int32_t seq = qv_batch_seq_of(c->batch, (int32_t)begin);
    for (int32_t t = (int32_t)begin; t < end; t++) {
        while (t >= c->batch->seq_start[seq + 1])
            seq++;
        rope_token(c, t, seq);
    }
}

qv_status QV_ISA(qv_cpu_rope_kv_write)(qv_backend *be, const qv_batch *batch, int rotary_dim,
                                       double theta, qv_tensor q, qv_tensor k, qv_tensor v,
                                       const qv_kv_layer *kv)
{
    if (rotary_dim > MAX_ROTARY)
        return qv_fail(QV_ERR_LIMIT, "rope_kv_write: %d rotary dimensions, but %d are possible",
                       rotary_dim, MAX_ROTARY);
    rope_ctx c = {.batch = batch, .kv = kv, .q = q, .k = k, .v = v, .rotary_dim = rotary_dim};
    for (int i = 0; i < rotary_dim / 2; i++)
        c.inv_freq[i] = pow(theta, -2.0 * i / rotary_dim);
    int64_t ns = 20 * rotary_dim + (q.shape[1] + 2 * k.shape[1]) * (10 + q.shape[2] / 8);
    qv_pool_run(qv_cpu(be)->pool, batch->n_tokens, ns, rope_tokens, &c);
    return QV_OK;
}
