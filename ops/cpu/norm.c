/* RMS norms. Each row is computed by one thread, its sum of squares in sixteen lanes. */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

#define NS_PER_16 2 /* an estimate for the pool: what sixteen elements of a row take */

static int64_t row_ns(int64_t d)
{
    return 10 + d / 16 * NS_PER_16;
}

static float inverse_rms(v16 sum_of_squares, int64_t d, float eps)
{
    return 1.0f / sqrtf(v_sum(sum_of_squares) / (float)d + eps);
}

QV_INLINE v16 gain(const float *w, int64_t lanes, bool plus_one)
{
    v16 g = v_load_lanes(w, lanes);
    return plus_one ? v_add(g, v_set1(1.0f)) : g;
}

static void norm_row(const float *x, const float *w, float eps, bool plus_one, float *y, int64_t d)
{
    v16 squares = v_zero();
    QV_FOR_LANES(i, lanes, d)
    {
        v16 xi = v_load_lanes(x + i, lanes);
        squares = v_fma(xi, xi, squares);
    }
    v16 scale = v_set1(inverse_rms(squares, d, eps));
    QV_FOR_LANES(i, lanes, d)
    {
        v16 normed = v_mul(v_load_lanes(x + i, lanes), scale);
        v_store_lanes(y + i, v_mul(normed, gain(w + i, lanes, plus_one)), lanes);
    }
}

/* --- rms_norm, add_rms_norm --------------------------------------------------------------- */

typedef struct {
    qv_tensor x, z, delta, y;
    const float *w;
    float eps;
    bool plus_one, gate_first;
} norm_ctx;

static void rms_norm_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const norm_ctx *c = ctx;
    int64_t n = c->x.shape[1], d = c->x.shape[2];
    for (int64_t row = begin; row < end; row++)
        norm_row(qv_row3(c->x, row / n, row % n), c->w, c->eps, c->plus_one,
                 qv_row3(c->y, row / n, row % n), d);
}

qv_status QV_ISA(qv_cpu_rms_norm)(qv_backend *be, qv_tensor x, qv_tensor w, float eps,
                                  bool plus_one, qv_tensor y)
{
    norm_ctx c = {.x = x, .y = y, .w = w.data, .eps = eps, .plus_one = plus_one};
    qv_pool_run(qv_cpu(be)->pool, x.shape[0] * x.shape[1], row_ns(x.shape[2]), rms_norm_rows, &c);
    return QV_OK;
}

static void add_rms_norm_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const norm_ctx *c = ctx;
    int64_t d = c->x.shape[1];
    for (int64_t t = begin; t < end; t++) {
        float *residual = qv_row2(c->x, t);
        const float *delta = c->delta.data ? qv_row2(c->delta, t) : NULL;
        QV_FOR_LANES(i, lanes, delta ? d : 0)
        {
            v16 sum = v_add(v_load_lanes(residual + i, lanes), v_load_lanes(delta + i, lanes));
            v_store_lanes(residual + i, sum, lanes);
        }
        norm_row(residual, c->w, c->eps, c->plus_one, qv_row2(c->y, t), d);
    }
}

qv_status QV_ISA(qv_cpu_add_rms_norm)(qv_backend *be, qv_tensor residual, qv_tensor delta,
                                      qv_tensor w, float eps, bool plus_one, qv_tensor y,
                                      qv_tensor rest)
{
    (void)rest; /* nothing is rounded */
    norm_ctx c = {
        .x = residual, .delta = delta, .y = y, .w = w.data, .eps = eps, .plus_one = plus_one};
    qv_pool_run(qv_cpu(be)->pool, residual.shape[0], row_ns(residual.shape[1]), add_rms_norm_rows,
                &c);
    return QV_OK;
}

/* --- gated_rms_norm ----------------------------------------------------------------------- */

/* norm(x) * w * silu(z) */
static void norm_then_gate(const float *x, const float *z, const float *w, float eps, float *y,
                           int64_t d)
{
    v16 squares = v_zero();
    QV_FOR_LANES(i, lanes, d)
    {
        v16 xi = v_load_lanes(x + i, lanes);
        squares = v_fma(xi, xi, squares);
    }
    v16 scale = v_set1(inverse_rms(squares, d, eps));
    QV_FOR_LANES(i, lanes, d)
    {
        v16 normed = v_mul(v_load_lanes(x + i, lanes), scale);
        v16 u = v_mul(normed, v_load_lanes(w + i, lanes));
        v_store_lanes(y + i, v_mul(u, v_silu(v_load_lanes(z + i, lanes))), lanes);
    }
}

/* norm(x * silu(z)) * w. The gated row waits in y, which may be x or z itself. */
static void gate_then_norm(const float *x, const float *z, const float *w, float eps, float *y,
                           int64_t d)
{
    v16 squares = v_zero();
    QV_FOR_LANES(i, lanes, d)
    {
        v16 u = v_mul(v_load_lanes(x + i, lanes), v_silu(v_load_lanes(z + i, lanes)));
        v_store_lanes(y + i, u, lanes);
        squares = v_fma(u, u, squares);
    }
    v16 scale = v_set1(inverse_rms(squares, d, eps));
    QV_FOR_LANES(i, lanes, d)
    {
        v16 normed = v_mul(v_load_lanes(y + i, lanes), scale);
        v_store_lanes(y + i, v_mul(normed, v_load_lanes(w + i, lanes)), lanes);
    }
}

static void gated_rms_norm_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const norm_ctx *c = ctx;
    int64_t n = c->x.shape[1], d = c->x.shape[2];
    for (int64_t row = begin; row < end; row++) {
        int64_t t = row / n, j = row % n;
        const float *x = qv_row3(c->x, t, j), *z = qv_row3(c->z, t, j);
        float *y = qv_row3(c->y, t, j);
        if (c->gate_first)
            gate_then_norm(x, z, c->w + j * d, c->eps, y, d);
        else
            norm_then_gate(x, z, c->w, c->eps, y, d);
    }
}

qv_status QV_ISA(qv_cpu_gated_rms_norm)(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w,
                                        float eps, bool gate_first, qv_tensor y)
{
    norm_ctx c = {.x = x, .z = z, .y = y, .w = w.data, .eps = eps, .gate_first = gate_first};
    qv_pool_run(qv_cpu(be)->pool, x.shape[0] * x.shape[1], 3 * row_ns(x.shape[2]),
                gated_rms_norm_rows, &c);
    return QV_OK;
}
