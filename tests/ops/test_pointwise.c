/* Norms, gates, rows: ops that treat every row by itself. */
#include "tests/ops/ops_test.h"

#define EPS 1e-6f

/* A [T, n, d] tensor in the middle of wider rows, so that every stride is exercised. */
typedef struct {
    int64_t n_tokens, n, d, stride;
    float *data;
} strided;

static strided new_strided(qv_rng *rng, const qv_row_shape *s, float scale)
{
    strided t = {.n_tokens = s->n_tokens, .n = s->n, .d = s->d, .stride = s->n * s->d + 5};
    t.data = random_floats(rng, s->n_tokens * t.stride, scale);
    return t;
}

static qv_tensor as_tensor(const strided *t)
{
    qv_tensor whole = qv_tensor_2d(t->data, QV_F32, t->n_tokens, t->stride);
    return qv_tensor_split(qv_tensor_cols(whole, 2, t->n * t->d), t->n, t->d);
}

static qv_tensor as_rows(const strided *t)
{
    qv_tensor whole = qv_tensor_2d(t->data, QV_F32, t->n_tokens, t->stride);
    return qv_tensor_cols(whole, 2, t->n * t->d);
}

static float *row_of(const strided *t, int64_t token, int64_t j)
{
    return t->data + token * t->stride + 2 + j * t->d;
}

static strided copy_of(const strided *t)
{
    strided c = *t;
    c.data = copied_floats(t->data, t->n_tokens * t->stride);
    return c;
}

static double rms_d(const double *x, int64_t d)
{
    double sum = 0;
    for (int64_t i = 0; i < d; i++)
        sum += x[i] * x[i];
    return 1.0 / sqrt(sum / (double)d + EPS);
}

/* A few roundings, and the sum of squares, whose terms all have one sign. */
#define NORM_ERROR (16 * U32)

static void check_rows(const char *op, qv_backend *be, const strided *got, const double *want,
                       double relative, double absolute)
{
    char what[160];
    for (int64_t t = 0; t < got->n_tokens; t++)
        for (int64_t j = 0; j < got->n; j++) {
            snprintf(what, sizeof what, "%s, %s, [%lld, %lld, %lld], row %lld, %lld",
                     qv_backend_describe(be), op, (long long)got->n_tokens, (long long)got->n,
                     (long long)got->d, (long long)t, (long long)j);
            check_close(what, row_of(got, t, j), want + (t * got->n + j) * got->d, got->d, relative,
                        absolute);
        }
}

/* What lies between the rows must be as before. */
static void check_gaps(const strided *got, const strided *before)
{
    for (int64_t t = 0; t < got->n_tokens; t++)
        for (int64_t i = 0; i < got->stride; i++)
            if (i < 2 || i >= 2 + got->n * got->d)
                cr_assert_eq(got->data[t * got->stride + i], before->data[t * got->stride + i]);
}

/* --- Norms -------------------------------------------------------------------------------- */

static void check_rms_norm(qv_backend *be, const qv_row_shape *s, bool plus_one, bool in_place)
{
    qv_rng rng = qv_rng_seed(1);
    strided x = new_strided(&rng, s, 3), y = in_place ? x : new_strided(&rng, s, 1);
    strided before = copy_of(&y);
    float *w = random_floats(&rng, s->d, 1);
    double *want = new_doubles(s->n_tokens * s->n * s->d), *row = new_doubles(s->d);
    for (int64_t r = 0; r < s->n_tokens * s->n; r++) {
        for (int64_t i = 0; i < s->d; i++)
            row[i] = row_of(&x, r / s->n, r % s->n)[i];
        double scale = rms_d(row, s->d);
        for (int64_t i = 0; i < s->d; i++)
            want[r * s->d + i] = row[i] * scale * (plus_one ? 1.0 + w[i] : w[i]);
    }
    qv_tensor xt = s->n == 1 ? as_rows(&x) : as_tensor(&x);
    qv_tensor yt = s->n == 1 ? as_rows(&y) : as_tensor(&y);
    PASS(qv_op_rms_norm(be, xt, qv_tensor_1d(w, QV_F32, s->d), EPS, plus_one, yt));
    check_rows("rms_norm", be, &y, want, NORM_ERROR, 4 * U32);
    check_gaps(&y, &before);
    if (!in_place)
        free(y.data);
    free(x.data);
    free(before.data);
    free(w);
    free(want);
    free(row);
}

Test(norm, rms_norm_agrees_with_double)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_row_shapes); i++)
        for (int mode = 0; mode < 4; mode++)
            check_rms_norm(be, &qv_row_shapes[i], mode & 1, mode & 2);
}

Test(norm, add_rms_norm_adds_into_the_residual_first)
{
    FOR_EACH_ISA(be, 2)
    for (size_t c = 0; c < QV_ROWS(qv_row_shapes); c++) {
        qv_row_shape s = {qv_row_shapes[c].n_tokens, 1, qv_row_shapes[c].d};
        qv_rng rng = qv_rng_seed(2);
        strided residual = new_strided(&rng, &s, 3), delta = new_strided(&rng, &s, 1);
        strided y = new_strided(&rng, &s, 1), sum = copy_of(&residual), normed = copy_of(&y);
        float *w = random_floats(&rng, s.d, 1);
        qv_tensor wt = qv_tensor_1d(w, QV_F32, s.d);
        PASS(qv_op_add(be, as_rows(&sum), as_rows(&delta), (qv_tensor){0}));
        PASS(qv_op_rms_norm(be, as_rows(&sum), wt, EPS, true, as_rows(&normed)));
        qv_tensor none = {.data = NULL};
        PASS(qv_op_add_rms_norm(be, as_rows(&residual), as_rows(&delta), wt, EPS, true, as_rows(&y),
                                none));
        check_same("residual", residual.data, sum.data, s.n_tokens * residual.stride);
        check_same("y", y.data, normed.data, s.n_tokens * y.stride);
        PASS(qv_op_add_rms_norm(be, as_rows(&residual), none, wt, EPS, true, as_rows(&y), none));
        check_same("residual, nothing added", residual.data, sum.data, s.n_tokens * sum.stride);
        check_same("y, nothing added", y.data, normed.data, s.n_tokens * y.stride);
        free(residual.data);
        free(delta.data);
        free(y.data);
        free(sum.data);
        free(normed.data);
        free(w);
    }
}

static void check_gated_norm(qv_backend *be, const qv_row_shape *s, bool gate_first, bool in_place)
{
    qv_rng rng = qv_rng_seed(3);
    strided x = new_strided(&rng, s, 3), z = new_strided(&rng, s, 6);
    strided y = in_place ? x : new_strided(&rng, s, 1), before = copy_of(&y);
    float *w = random_floats(&rng, s->n * s->d, 1);
    double *want = new_doubles(s->n_tokens * s->n * s->d), *row = new_doubles(s->d);
    for (int64_t r = 0; r < s->n_tokens * s->n; r++) {
        const float *xr = row_of(&x, r / s->n, r % s->n), *zr = row_of(&z, r / s->n, r % s->n);
        for (int64_t i = 0; i < s->d; i++)
            row[i] = gate_first ? xr[i] * silu_d(zr[i]) : xr[i];
        double scale = rms_d(row, s->d);
        for (int64_t i = 0; i < s->d; i++)
            want[r * s->d + i] = gate_first ? row[i] * scale * w[r % s->n * s->d + i]
                                            : row[i] * scale * w[i] * silu_d(zr[i]);
    }
    qv_tensor wt = qv_tensor_1d(w, QV_F32, gate_first ? s->n * s->d : s->d);
    PASS(
        qv_op_gated_rms_norm(be, as_tensor(&x), as_tensor(&z), wt, EPS, gate_first, as_tensor(&y)));
    check_rows("gated_rms_norm", be, &y, want, 2 * NORM_ERROR, 8 * U32);
    check_gaps(&y, &before);
    if (!in_place)
        free(y.data);
    free(x.data);
    free(z.data);
    free(before.data);
    free(w);
    free(want);
    free(row);
}

Test(norm, gated_rms_norm_agrees_with_double_in_both_orders)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_row_shapes); i++)
        for (int mode = 0; mode < 4; mode++)
            check_gated_norm(be, &qv_row_shapes[i], mode & 1, mode & 2);
}

/* --- Gates -------------------------------------------------------------------------------- */

Test(gate, swiglu_agrees_with_double)
{
    FOR_EACH_ISA(be, 2)
    for (size_t c = 0; c < QV_ROWS(qv_row_shapes); c++) {
        const qv_row_shape *s = &qv_row_shapes[c];
        qv_rng rng = qv_rng_seed(4);
        strided gate = new_strided(&rng, s, 12), up = new_strided(&rng, s, 2);
        strided y = new_strided(&rng, s, 1), before = copy_of(&y);
        double *want = new_doubles(s->n_tokens * s->n * s->d);
        for (int64_t r = 0; r < s->n_tokens * s->n; r++)
            for (int64_t i = 0; i < s->d; i++)
                want[r * s->d + i] = silu_d(row_of(&gate, r / s->n, r % s->n)[i]) *
                                     row_of(&up, r / s->n, r % s->n)[i];
        PASS(qv_op_swiglu(be, as_rows(&gate), as_rows(&up), as_rows(&y)));
        check_rows("swiglu", be, &y, want, 8 * U32, 1e-30);
        check_gaps(&y, &before);
        PASS(qv_op_swiglu(be, as_rows(&gate), as_rows(&up), as_rows(&gate))); /* in place */
        for (int64_t r = 0; r < s->n_tokens * s->n; r++)
            check_same("in place", row_of(&gate, r / s->n, r % s->n),
                       row_of(&y, r / s->n, r % s->n), s->d);
        free(gate.data);
        free(up.data);
        free(y.data);
        free(before.data);
        free(want);
    }
}

Test(gate, sigmoid_gate_agrees_with_double)
{
    FOR_EACH_ISA(be, 2)
    for (size_t c = 0; c < QV_ROWS(qv_row_shapes); c++) {
        const qv_row_shape *s = &qv_row_shapes[c];
        qv_rng rng = qv_rng_seed(5);
        strided x = new_strided(&rng, s, 2), gate = new_strided(&rng, s, 12), before = copy_of(&x);
        double *want = new_doubles(s->n_tokens * s->n * s->d);
        for (int64_t r = 0; r < s->n_tokens * s->n; r++)
            for (int64_t i = 0; i < s->d; i++)
                want[r * s->d + i] = sigmoid_d(row_of(&gate, r / s->n, r % s->n)[i]) *
                                     row_of(&x, r / s->n, r % s->n)[i];
        PASS(qv_op_sigmoid_gate(be, as_tensor(&x), as_tensor(&gate)));
        check_rows("sigmoid_gate", be, &x, want, 8 * U32, 1e-30);
        check_gaps(&x, &before);
        free(x.data);
        free(gate.data);
        free(before.data);
        free(want);
    }
}

/* The gate is a column of wider rows. */
Test(gate, add_by_a_gate_agrees_with_double)
{
    FOR_EACH_ISA(be, 2)
    for (size_t c = 0; c < QV_ROWS(qv_row_shapes); c++) {
        qv_row_shape s = {qv_row_shapes[c].n_tokens, 1, qv_row_shapes[c].n * qv_row_shapes[c].d};
        qv_rng rng = qv_rng_seed(6);
        strided x = new_strided(&rng, &s, 2), gate = new_strided(&rng, &s, 12);
        strided delta = new_strided(&rng, &s, 2), before = copy_of(&x);
        double *want = new_doubles(s.n_tokens * s.d);
        for (int64_t t = 0; t < s.n_tokens; t++) {
            double g = sigmoid_d(row_of(&gate, t, 0)[0]);
            for (int64_t i = 0; i < s.d; i++)
                want[t * s.d + i] = row_of(&x, t, 0)[i] + g * row_of(&delta, t, 0)[i];
        }
        PASS(qv_op_add(be, as_rows(&x), as_rows(&delta), qv_tensor_cols(as_rows(&gate), 0, 1)));
        check_rows("add", be, &x, want, 8 * U32, 8 * U32);
        check_gaps(&x, &before);
        free(x.data);
        free(delta.data);
        free(gate.data);
        free(before.data);
        free(want);
    }
}

Test(gate, relu2_agrees_with_double_and_shows_nan)
{
    FOR_EACH_ISA(be, 2)
    for (size_t c = 0; c < QV_ROWS(qv_row_shapes); c++)
        for (int in_place = 0; in_place < 2; in_place++) {
            qv_row_shape s = {qv_row_shapes[c].n_tokens, 1,
                              qv_row_shapes[c].n * qv_row_shapes[c].d};
            qv_rng rng = qv_rng_seed(7);
            strided x = new_strided(&rng, &s, 3), y = in_place ? x : new_strided(&rng, &s, 1);
            strided before = copy_of(&y);
            double *want = new_doubles(s.n_tokens * s.d);
            for (int64_t i = 0; i < s.n_tokens * s.d; i++) {
                double v = row_of(&x, i / s.d, 0)[i % s.d];
                want[i] = v > 0 ? v * v : 0;
            }
            PASS(qv_op_relu2(be, as_rows(&x), as_rows(&y)));
            check_rows("relu2", be, &y, want, U32, 0);
            check_gaps(&y, &before);
            row_of(&x, 0, 0)[s.d - 1] = NAN;
            PASS(qv_op_relu2(be, as_rows(&x), as_rows(&y)));
            cr_assert(isnan(row_of(&y, 0, 0)[s.d - 1]));
            if (!in_place)
                free(y.data);
            free(x.data);
            free(before.data);
            free(want);
        }
}

/* silu(x) at the ends of what float32 holds, where e^-x is 0, infinite, or not a number. */
Test(gate, silu_is_right_at_the_extremes)
{
    static const float x[] = {0.0f,   -0.0f,  1e-30f,   88.0f,   -88.0f,   89.0f,    -89.0f,
                              1e30f,  -1e30f, 87.33f,   -87.34f, INFINITY, -1000.0f, 20.0f,
                              -20.0f, 0.5f,   -103.97f, 3.4e38f, -3.4e38f, 1e-45f};
    enum { N = sizeof x / sizeof *x };
    FOR_EACH_ISA(be, 1)
    {
        float gate[N], up[N], y[N], nan = NAN;
        double want[N];
        for (int i = 0; i < N; i++) {
            gate[i] = x[i];
            up[i] = 1.0f;
            double e = exp(-(double)x[i]);
            want[i] = isinf(x[i]) ? x[i] : e > 3.4028235e38 ? 0.0 : x[i] / (1.0 + e);
        }
        PASS(qv_op_swiglu(be, qv_tensor_2d(gate, QV_F32, 1, N), qv_tensor_2d(up, QV_F32, 1, N),
                          qv_tensor_2d(y, QV_F32, 1, N)));
        for (int i = 0; i < N; i++)
            cr_assert(y[i] == want[i] || fabs(y[i] - want[i]) <= 8 * U32 * fabs(want[i]) + 1e-36,
                      "%s: silu(%g) is %g, wanted %g", qv_backend_describe(be), x[i], y[i],
                      want[i]);
        PASS(qv_op_swiglu(be, qv_tensor_2d(&nan, QV_F32, 1, 1), qv_tensor_2d(up, QV_F32, 1, 1),
                          qv_tensor_2d(y, QV_F32, 1, 1)));
        cr_assert(isnan(y[0]));
    }
}

/* --- Rows --------------------------------------------------------------------------------- */

Test(rows, embed_widens_bf16_and_copies_f32)
{
    enum { VOCAB = 11, D = 37, N = 6 };
    static const int32_t ids[N] = {0, 10, 3, 3, 7, 1};
    FOR_EACH_ISA(be, 2)
    {
        qv_rng rng = qv_rng_seed(6);
        float *table = random_floats(&rng, VOCAB * D, 1), y[N * D];
        round_to_bf16(table, VOCAB * D);
        uint16_t *table16 = to_bf16(table, VOCAB * D);
        for (int dtype = 0; dtype < 2; dtype++) {
            qv_tensor t = dtype ? qv_tensor_2d(table16, QV_BF16, VOCAB, D)
                                : qv_tensor_2d(table, QV_F32, VOCAB, D);
            memset(y, 0xFF, sizeof y);
            PASS(qv_op_embed(be, t, 0, ids, qv_tensor_2d(y, QV_F32, N, D)));
            for (int i = 0; i < N; i++)
                check_same("embed", y + i * D, table + ids[i] * D, D);
        }
        free(table);
        free(table16);
    }
}

Test(rows, gather_takes_rows_in_the_order_asked)
{
    enum { T = 9, D = 21, N = 4 };
    static const int32_t rows[N] = {8, 0, 5, 5};
    qv_backend *be = open_cpu(2);
    qv_rng rng = qv_rng_seed(7);
    float *x = random_floats(&rng, T * D, 1), y[N * D];
    PASS(qv_op_gather_rows(be, qv_tensor_2d(x, QV_F32, T, D), rows, qv_tensor_2d(y, QV_F32, N, D)));
    for (int i = 0; i < N; i++)
        check_same("gather_rows", y + i * D, x + rows[i] * D, D);
    PASS(qv_op_gather_rows(be, qv_tensor_2d(x, QV_F32, T, D), rows,
                           qv_tensor_2d(NULL, QV_F32, 0, D)));
    free(x);
    qv_backend_close(be);
}

/* --- Refusals ----------------------------------------------------------------------------- */

Test(norm, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    float m[64] = {0};
    qv_tensor x = qv_tensor_2d(m, QV_F32, 4, 6), w = qv_tensor_1d(m, QV_F32, 6);
    FAIL_WITH(QV_ERR_SHAPE, "rms_norm: w is f32[5], but needs f32[6]",
              qv_op_rms_norm(be, x, qv_tensor_1d(m, QV_F32, 5), EPS, true, x));
    FAIL_WITH(QV_ERR_SHAPE, "rms_norm: y is f32[4, 5], but needs f32[4, 6]",
              qv_op_rms_norm(be, x, w, EPS, true, qv_tensor_2d(m, QV_F32, 4, 5)));
    FAIL_WITH(QV_ERR_SHAPE, "w is bf16[6]",
              qv_op_rms_norm(be, x, qv_tensor_1d(m, QV_BF16, 6), EPS, true, x));
    FAIL_WITH(
        QV_ERR_SHAPE, "delta is f32[3, 6]",
        qv_op_add_rms_norm(be, x, qv_tensor_2d(m, QV_F32, 3, 6), w, EPS, true, x, (qv_tensor){0}));
    FAIL_WITH(QV_ERR_SHAPE, "rest is f32[4, 5]",
              qv_op_add_rms_norm(be, x, x, w, EPS, true, x, qv_tensor_2d(m, QV_F32, 4, 5)));
    FAIL_WITH(
        QV_ERR_SHAPE, "residual is bf16[4, 6]",
        qv_op_add_rms_norm(be, qv_tensor_2d(m, QV_BF16, 4, 6), x, w, EPS, true, x, (qv_tensor){0}));
    qv_tensor g = qv_tensor_3d(m, QV_F32, 2, 3, 4);
    FAIL_WITH(QV_ERR_SHAPE, "w is f32[4], but needs f32[12]",
              qv_op_gated_rms_norm(be, g, g, qv_tensor_1d(m, QV_F32, 4), EPS, true, g));
    FAIL_WITH(QV_ERR_SHAPE, "w is f32[12], but needs f32[4]",
              qv_op_gated_rms_norm(be, g, g, qv_tensor_1d(m, QV_F32, 12), EPS, false, g));
    qv_tensor turned = x;
    turned.stride[0] = 1;
    turned.stride[1] = 4;
    FAIL_WITH(QV_ERR_SHAPE, "stride 4", qv_op_add(be, x, turned, (qv_tensor){0}));
    FAIL_WITH(QV_ERR_SHAPE, "up is f32[4, 5]",
              qv_op_swiglu(be, x, qv_tensor_2d(m, QV_F32, 4, 5), x));
    FAIL_WITH(QV_ERR_SHAPE, "gate is f32[4, 2], but needs f32[4, 1]",
              qv_op_add(be, x, x, qv_tensor_2d(m, QV_F32, 4, 2)));
    FAIL_WITH(QV_ERR_SHAPE, "y is f32[4, 5], but needs f32[4, 6]",
              qv_op_relu2(be, x, qv_tensor_2d(m, QV_F32, 4, 5)));
    FAIL_WITH(QV_ERR_SHAPE, "table is f16[4, 6]",
              qv_op_embed(be, qv_tensor_2d(m, QV_F16, 4, 6), 0, NULL, x));
    qv_backend_close(be);
}
