/* The gated delta rule, token by token. The columns of a head's state [d_k][d_v] never meet, so an
 * item is a head and 64 of its columns: 32 KiB of state at d_k = 128, which stay in the L1 cache
 * while the tokens of the sequence pass.
 */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

#define COLUMNS 64
#define MAX_D_K 256

typedef struct {
    const qv_batch *batch;
    const qv_gdn_args *args;
    int64_t n_heads, d_k, d_v, heads_per_key, n_chunks;
} gdn_ctx;

/* x / sqrt(sum x^2 + 1e-6) * factor */
static void l2_norm(const float *x, float factor, float *y, int64_t d)
{
    v16 squares = v_zero();
    QV_FOR_LANES(i, lanes, d)
    {
        v16 xi = v_load_lanes(x + i, lanes);
        squares = v_fma(xi, xi, squares);
    }
    v16 scale = v_set1(factor / sqrtf(v_sum(squares) + 1e-6f));
    QV_FOR_LANES(i, lanes, d)
    v_store_lanes(y + i, v_mul(v_load_lanes(x + i, lanes), scale), lanes);
}

/* sum[j] += k S[i][j] for one row i of S. */
QV_INLINE void read_row(int n_vectors, int64_t lanes, const float *row, float k, v16 *sum)
{
    v16 ki = v_set1(k);
#pragma GCC unroll 4
    for (int j = 0; j < n_vectors; j++)
        sum[j] = v_fma(ki, v_load_lanes(row + 16 * j, lanes), sum[j]);
}

/* S[i][j] = decay S[i][j] + k delta[j]; sum[j] += q S[i][j]. */
QV_INLINE void update_row(int n_vectors, int64_t lanes, float *row, float k, float q, v16 decay,
                          const v16 *delta, v16 *sum)
{
    v16 ki = v_set1(k), qi = v_set1(q);
#pragma GCC unroll 4
    for (int j = 0; j < n_vectors; j++) {
        v16 faded = v_mul(v_load_lanes(row + 16 * j, lanes), decay);
        v16 s = v_fma(ki, delta[j], faded);
        v_store_lanes(row + 16 * j, s, lanes);
        sum[j] = v_fma(qi, s, sum[j]);
    }
}

/* One token for n_vectors * 16 columns (with one vector, the first `lanes` of it):
 *   e = beta (v - (decay S)^T k);  S = decay S + k e^T;  o = S^T q
 * Sums over the rows of S run in two chains, even and odd rows, because one chain would wait for
 * every addition. */
QV_INLINE void step_columns(int n_vectors, int64_t lanes, float *state, int64_t stride, int64_t d_k,
                            const float *q, const float *k, const float *v, float decay, float beta,
                            float *o)
{
    v16 even[4], odd[4], delta[4], fade = v_set1(decay);
    int64_t i;
#pragma GCC unroll 4
    for (int j = 0; j < n_vectors; j++)
        even[j] = odd[j] = v_zero();
    for (i = 0; i + 2 <= d_k; i += 2) {
        read_row(n_vectors, lanes, state + i * stride, k[i], even);
        read_row(n_vectors, lanes, state + (i + 1) * stride, k[i + 1], odd);
    }
    if (i < d_k)
        read_row(n_vectors, lanes, state + i * stride, k[i], even);
#pragma GCC unroll 4
    for (int j = 0; j < n_vectors; j++) {
        v16 seen = v_mul(v_add(even[j], odd[j]), fade);
        delta[j] = v_mul(v_set1(beta), v_sub(v_load_lanes(v + 16 * j, lanes), seen));
        even[j] = odd[j] = v_zero();
    }
    for (i = 0; i + 2 <= d_k; i += 2) {
        update_row(n_vectors, lanes, state + i * stride, k[i], q[i], fade, delta, even);
        update_row(n_vectors, lanes, state + (i + 1) * stride, k[i + 1], q[i + 1], fade, delta,
                   odd);
    }
    if (i < d_k)
        update_row(n_vectors, lanes, state + i * stride, k[i], q[i], fade, delta, even);
#pragma GCC unroll 4
    for (int j = 0; j < n_vectors; j++)
        v_store_lanes(o + 16 * j, v_add(even[j], odd[j]), lanes);
}

/* Columns of one head's state, [d_k][..] with `stride` between rows. */
typedef struct {
    int64_t head, first, n; /* columns [first, first + n) */
    float *data;
    int64_t stride;
} state_part;

static void step(const gdn_ctx *c, int64_t t, const state_part *part)
{
    const qv_gdn_args *a = c->args;
    int64_t head = part->head, key_head = head / c->heads_per_key;
    float q[MAX_D_K], k[MAX_D_K];
    l2_norm(qv_row3(a->q, t, key_head), 1.0f / sqrtf((float)c->d_k), q, c->d_k);
    l2_norm(qv_row3(a->k, t, key_head), 1.0f, k, c->d_k);
    float dt = qv_softplus(qv_row2(a->a, t)[head] + ((const float *)a->dt_bias.data)[head]);
    float decay = expf(-expf(((const float *)a->a_log.data)[head]) * dt);
    float beta = 1.0f / (1.0f + expf(-qv_row2(a->b, t)[head]));
    const float *v = qv_row3(a->v, t, head) + part->first;
    float *o = qv_row3(a->o, t, head) + part->first;
    if (part->n == COLUMNS)
        step_columns(4, 16, part->data, part->stride, c->d_k, q, k, v, decay, beta, o);
    else
        QV_FOR_LANES(x, lanes, part->n)
    step_columns(1, lanes, part->data + x, part->stride, c->d_k, q, k, v + x, decay, beta, o + x);
}

static void copy_state(float *dst, int64_t dst_stride, const float *src, int64_t src_stride,
                       int64_t d_k, int64_t n)
{
    for (int64_t i = 0; i < d_k; i++)
        memcpy(dst + i * dst_stride, src + i * src_stride, (size_t)n * sizeof *dst);
}

static void run_sequence(const gdn_ctx *c, int64_t seq, state_part *part)
{
    int32_t start = c->batch->seq_start[seq], end = c->batch->seq_start[seq + 1];
    if (start == end)
        return;
    int64_t slot = c->batch->state_slot[seq];
    float *state = (float *)c->args->state.data +
                   (slot * c->n_heads + part->head) * c->d_k * c->d_v + part->first;
    if (c->batch->pos[start] == 0)
        for (int64_t i = 0; i < c->d_k; i++)
            memset(state + i * c->d_v, 0, (size_t)part->n * sizeof *state);

    /* A state of many tokens moves next to itself: rows d_v apart would crowd into some of the sets
     * of the L1 cache. For one token that costs more than it brings. */
    _Alignas(64) float near[MAX_D_K * COLUMNS];
    bool move = end - start > 1;
    part->data = move ? near : state;
    part->stride = move ? COLUMNS : c->d_v;
    if (move)
        copy_state(near, COLUMNS, state, c->d_v, c->d_k, part->n);
    for (int64_t t = start; t < end; t++)
        step(c, t, part);
    if (move)
        copy_state(state, c->d_v, near, COLUMNS, c->d_k, part->n);
}

/* Items: sequences, in each heads, in each chunks of columns. */
static void gdn_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const gdn_ctx *c = ctx;
    for (int64_t item = begin; item < end; item++) {
        int64_t first = item % c->n_chunks * COLUMNS, left = c->d_v - first;
        state_part part = {.head = item / c->n_chunks % c->n_heads,
                           .first = first,
                           .n = left < COLUMNS ? left : COLUMNS};
        run_sequence(c, item / c->n_chunks / c->n_heads, &part);
    }
}

qv_status QV_ISA(qv_cpu_gdn)(qv_backend *be, const qv_batch *batch, const qv_gdn_args *args)
{
    gdn_ctx c = {
        .batch = batch,
        .args = args,
        .n_heads = args->v.shape[1],
        .d_k = args->q.shape[2],
        .d_v = args->v.shape[2],
        .heads_per_key = args->v.shape[1] / args->q.shape[1],
        .n_chunks = (args->v.shape[2] + COLUMNS - 1) / COLUMNS,
    };
    if (c.d_k > MAX_D_K)
        return qv_fail(QV_ERR_LIMIT, "gdn: keys of %lld, but %d are possible", (long long)c.d_k,
                       MAX_D_K);
    int64_t n_items = batch->n_seqs * c.n_heads * c.n_chunks;
    int64_t ns = batch->n_tokens * c.n_heads * (100 + c.d_k * c.d_v / 20);
    qv_pool_run(qv_cpu(be)->pool, n_items, n_items ? ns / n_items : 0, gdn_items, &c);
    return QV_OK;
}
