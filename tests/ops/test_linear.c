#include "tests/ops/ops_test.h"

/* --- Oracle ------------------------------------------------------------------------------- */

/* y = x W^T in double, and the bound of its float32 sum: each of n_in products and additions errs
 * by at most U32 of the sum of magnitudes; errors of random sign grow with the root of n_in. */
static void linear_oracle(const float *x, int64_t n_tokens, const float *w, int64_t n_out,
                          int64_t n_in, double *y, double *bound)
{
    double growth = U32 * (4 + 4 * sqrt((double)n_in));
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t o = 0; o < n_out; o++) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < n_in; k++) {
                double term = (double)x[t * n_in + k] * w[o * n_in + k];
                sum += term;
                size += fabs(term);
            }
            y[t * n_out + o] = sum;
            bound[t * n_out + o] = growth * size;
        }
}

static qv_weight *load_weight(qv_backend *be, qv_dtype dtype, const float *w, int64_t n_out,
                              int64_t n_in)
{
    qv_weight *weight;
    PASS(qv_weight_new(be, n_out, n_in, dtype, &weight));
    PASS(qv_weight_load(be, weight, 0, n_out, w, QV_F32, n_in));
    return weight;
}

static void run_linear(qv_backend *be, const qv_weight *w, const float *x, int64_t n_tokens,
                       float *y)
{
    PASS(qv_op_linear(be, w, qv_tensor_2d((void *)x, QV_F32, n_tokens, qv_weight_n_in(w)),
                      qv_tensor_2d(y, QV_F32, n_tokens, qv_weight_n_out(w))));
}

/* --- Values ------------------------------------------------------------------------------- */

static void check_values(qv_backend *be, const qv_linear_shape *shape, qv_dtype dtype)
{
    static const int64_t token_counts[] = {1, 2, 3, 5, 6, 7, 13, 97};
    qv_rng rng = qv_rng_seed(1);
    int64_t n_out = shape->n_out, n_in = shape->n_in, most = 97;
    float *w = random_floats(&rng, n_out * n_in, 1), *x = random_floats(&rng, most * n_in, 1);
    if (dtype == QV_BF16)
        round_to_bf16(w, n_out * n_in);
    double *want = new_doubles(most * n_out), *bound = new_doubles(most * n_out);
    linear_oracle(x, most, w, n_out, n_in, want, bound);
    qv_weight *weight = load_weight(be, dtype, w, n_out, n_in);
    for (size_t i = 0; i < QV_ROWS(token_counts); i++) {
        char what[128];
        snprintf(what, sizeof what, "%s, %s, %s, %lld tokens", qv_backend_describe(be), shape->name,
                 qv_dtype_name(dtype), (long long)token_counts[i]);
        float *y = filled_floats(token_counts[i] * n_out, NAN);
        run_linear(be, weight, x, token_counts[i], y);
        check_bound(what, y, want, bound, token_counts[i] * n_out);
        free(y);
    }
    qv_weight_free(be, weight);
    free(w);
    free(x);
    free(want);
    free(bound);
}

Test(linear, exact_gemm_agrees_with_double)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_linear_shapes); i++) {
        check_values(be, &qv_linear_shapes[i], QV_F32);
        check_values(be, &qv_linear_shapes[i], QV_BF16);
    }
}

Test(linear, openblas_gemm_agrees_with_double)
{
    qv_backend *be;
    qv_backend_options options = {.name = "cpu", .n_threads = 2, .gemm = "openblas"};
    PASS(qv_backend_open(&options, &be));
    for (size_t i = 0; i < QV_ROWS(qv_linear_shapes); i++) {
        check_values(be, &qv_linear_shapes[i], QV_F32);
        check_values(be, &qv_linear_shapes[i], QV_BF16);
    }
    qv_backend_close(be);
}

/* --- Exactness ---------------------------------------------------------------------------- */

/* Every token alone, then batches of every size, starting at various tokens, on more threads. */
static void check_invariance(const char *isa, int64_t n_out, int64_t n_in, qv_dtype dtype)
{
    enum { MOST = 70, POOL = 128 };
    qv_backend *one = open_isa(isa, 1), *many = open_isa(isa, 3);
    if (!one || !many)
        return;
    qv_rng rng = qv_rng_seed(7);
    float *w = random_floats(&rng, n_out * n_in, 1), *x = random_floats(&rng, POOL * n_in, 1);
    float *want = filled_floats(POOL * n_out, NAN), *y = filled_floats(MOST * n_out, NAN);
    qv_weight *w1 = load_weight(one, dtype, w, n_out, n_in);
    qv_weight *w3 = load_weight(many, dtype, w, n_out, n_in);
    for (int64_t t = 0; t < POOL; t++)
        run_linear(one, w1, x + t * n_in, 1, want + t * n_out);
    for (int64_t n = 1; n <= MOST; n++) {
        char what[128];
        snprintf(what, sizeof what, "%s, [%lld, %lld] %s, %lld tokens", isa, (long long)n_out,
                 (long long)n_in, qv_dtype_name(dtype), (long long)n);
        for (int64_t start = 0; start + n <= POOL; start += 1 + (POOL - n) / 3) {
            run_linear(one, w1, x + start * n_in, n, y);
            check_same(what, y, want + start * n_out, n * n_out);
            run_linear(many, w3, x + start * n_in, n, y);
            check_same(what, y, want + start * n_out, n * n_out);
        }
    }
    qv_weight_free(one, w1);
    qv_weight_free(many, w3);
    qv_backend_close(one);
    qv_backend_close(many);
    free(w);
    free(x);
    free(want);
    free(y);
}

Test(linear, exact_gemm_gives_a_token_the_same_bits_in_every_batch)
{
    for (size_t i = 0; i < QV_ROWS(isas); i++) {
        check_invariance(isas[i], 37, 129, QV_BF16);
        check_invariance(isas[i], 129, 301, QV_BF16);
        check_invariance(isas[i], 129, 301, QV_F32);
        check_invariance(isas[i], 896, 192, QV_BF16);
    }
}

Test(linear, exact_gemm_gives_the_same_bits_in_large_batches)
{
    enum { N_OUT = 200, N_IN = 140, N = 300 };
    qv_backend *one = open_cpu(1), *many = open_cpu(4);
    qv_rng rng = qv_rng_seed(9);
    float *w = random_floats(&rng, N_OUT * N_IN, 1), *x = random_floats(&rng, N * N_IN, 1);
    float *want = filled_floats(N * N_OUT, NAN), *y = filled_floats(N * N_OUT, NAN);
    qv_weight *w1 = load_weight(one, QV_BF16, w, N_OUT, N_IN);
    qv_weight *w4 = load_weight(many, QV_BF16, w, N_OUT, N_IN);
    for (int64_t t = 0; t < N; t++)
        run_linear(one, w1, x + t * N_IN, 1, want + t * N_OUT);
    run_linear(many, w4, x, N, y);
    check_same("300 tokens", y, want, N * N_OUT);
    qv_weight_free(one, w1);
    qv_weight_free(many, w4);
    qv_backend_close(one);
    qv_backend_close(many);
    free(w);
    free(x);
    free(want);
    free(y);
}

Test(linear, avx2_and_avx512_give_the_same_bits)
{
    enum { N_OUT = 130, N_IN = 333, N = 20 };
    qv_backend *a = open_isa("avx512", 1), *b = open_isa("avx2", 1);
    if (!a || !b)
        cr_skip_test("this processor has no AVX-512");
    qv_rng rng = qv_rng_seed(11);
    float *w = random_floats(&rng, N_OUT * N_IN, 1), *x = random_floats(&rng, N * N_IN, 1);
    float *ya = filled_floats(N * N_OUT, NAN), *yb = filled_floats(N * N_OUT, NAN);
    qv_weight *wa = load_weight(a, QV_BF16, w, N_OUT, N_IN);
    qv_weight *wb = load_weight(b, QV_BF16, w, N_OUT, N_IN);
    run_linear(a, wa, x, N, ya);
    run_linear(b, wb, x, N, yb);
    check_same("avx2", yb, ya, N * N_OUT);
    qv_weight_free(a, wa);
    qv_weight_free(b, wb);
    qv_backend_close(a);
    qv_backend_close(b);
    free(w);
    free(x);
    free(ya);
    free(yb);
}

/* --- Arrangement -------------------------------------------------------------------------- */

Test(linear, rows_of_x_and_y_may_be_strided)
{
    enum { N_OUT = 40, N_IN = 50, N = 9, X_STRIDE = 61, Y_STRIDE = 47 };
    static const char *const gemms[] = {"exact", "openblas"};
    for (size_t g = 0; g < QV_ROWS(gemms); g++) {
        qv_backend *be;
        PASS(qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = 1, .gemm = gemms[g]},
                             &be));
        qv_rng rng = qv_rng_seed(3);
        float *w = random_floats(&rng, N_OUT * N_IN, 1), *x = random_floats(&rng, N * X_STRIDE, 1);
        float *y = filled_floats(N * Y_STRIDE, 77.0f), *dense = filled_floats(N * N_OUT, NAN);
        float packed[N * N_IN];
        for (int64_t t = 0; t < N; t++)
            memcpy(packed + t * N_IN, x + t * X_STRIDE, N_IN * sizeof(float));
        qv_weight *weight = load_weight(be, QV_F32, w, N_OUT, N_IN);
        PASS(qv_op_linear(be, weight, qv_tensor_cols(qv_tensor_2d(x, QV_F32, N, X_STRIDE), 0, N_IN),
                          qv_tensor_cols(qv_tensor_2d(y, QV_F32, N, Y_STRIDE), 0, N_OUT)));
        run_linear(be, weight, packed, N, dense);
        for (int64_t t = 0; t < N; t++) {
            check_same(gemms[g], y + t * Y_STRIDE, dense + t * N_OUT, N_OUT);
            for (int64_t i = N_OUT; i < Y_STRIDE; i++)
                cr_assert_eq(y[t * Y_STRIDE + i], 77.0f, "%s wrote beyond row %lld", gemms[g],
                             (long long)t);
        }
        qv_weight_free(be, weight);
        qv_backend_close(be);
        free(w);
        free(x);
        free(y);
        free(dense);
    }
}

/* The same matrix loaded in pieces, in any order, from every dtype. */
Test(linear, weights_load_by_rows_in_any_order_from_any_dtype)
{
    enum { N_OUT = 150, N_IN = 67, STRIDE = 70, N = 3 };
    static const qv_dtype dtypes[] = {QV_F32, QV_BF16, QV_F16};
    static const int64_t cuts[] = {149, 150, 64, 100, 0, 1, 100, 149, 1, 64}; /* [from, to) pairs */
    qv_backend *be = open_cpu(1);
    qv_rng rng = qv_rng_seed(5);
    float *x = random_floats(&rng, N * N_IN, 1), *w = random_floats(&rng, N_OUT * STRIDE, 1);
    round_to_bf16(w, N_OUT * STRIDE); /* F16 holds these exactly too: at most 8 bits, near 1 */
    for (int64_t i = 0; i < N_OUT * STRIDE; i++)
        w[i] = qv_f16_to_f32(qv_f32_to_f16(w[i]));
    float *want = NULL;
    for (size_t d = 0; d < QV_ROWS(dtypes); d++) {
        uint16_t half[N_OUT * STRIDE];
        for (int64_t i = 0; i < N_OUT * STRIDE; i++)
            half[i] = dtypes[d] == QV_BF16 ? qv_f32_to_bf16(w[i]) : qv_f32_to_f16(w[i]);
        const char *src = dtypes[d] == QV_F32 ? (const char *)w : (const char *)half;
        qv_weight *weight;
        PASS(qv_weight_new(be, N_OUT, N_IN, QV_F32, &weight));
        for (size_t i = 0; i < QV_ROWS(cuts); i += 2)
            PASS(qv_weight_load(be, weight, cuts[i], cuts[i + 1] - cuts[i],
                                src + (size_t)(cuts[i] * STRIDE) * qv_dtype_size(dtypes[d]),
                                dtypes[d], STRIDE));
        float *y = filled_floats(N * N_OUT, NAN);
        run_linear(be, weight, x, N, y);
        if (want)
            check_same(qv_dtype_name(dtypes[d]), y, want, N * N_OUT);
        else
            want = copied_floats(y, N * N_OUT);
        free(y);
        qv_weight_free(be, weight);
    }
    free(want);
    free(w);
    free(x);
    qv_backend_close(be);
}

Test(linear, weights_start_as_zero)
{
    qv_backend *be = open_cpu(1);
    float x[] = {1, 2, 3}, y[] = {9, 9};
    qv_weight *weight;
    PASS(qv_weight_new(be, 2, 3, QV_BF16, &weight));
    run_linear(be, weight, x, 1, y);
    cr_assert(y[0] == 0 && y[1] == 0);
    qv_weight_free(be, weight);
    qv_backend_close(be);
}

Test(linear, no_tokens_is_no_work)
{
    qv_backend *be = open_cpu(1);
    qv_weight *weight;
    PASS(qv_weight_new(be, 2, 3, QV_BF16, &weight));
    PASS(qv_op_linear(be, weight, qv_tensor_2d(NULL, QV_F32, 0, 3),
                      qv_tensor_2d(NULL, QV_F32, 0, 2)));
    qv_weight_free(be, weight);
    qv_weight_free(be, NULL);
    qv_backend_close(be);
}

Test(linear, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    float memory[64] = {0};
    qv_weight *w;
    FAIL_WITH(QV_ERR_SHAPE, "[0, 3]", qv_weight_new(be, 0, 3, QV_F32, &w));
    FAIL_WITH(QV_ERR_UNSUPPORTED, "I32", qv_weight_new(be, 2, 3, QV_I32, &w));
    PASS(qv_weight_new(be, 2, 3, QV_F32, &w));
    FAIL_WITH(QV_ERR_SHAPE, "2 rows", qv_weight_load(be, w, 1, 2, memory, QV_F32, 3));
    FAIL_WITH(QV_ERR_SHAPE, "stride 2", qv_weight_load(be, w, 0, 2, memory, QV_F32, 2));
    FAIL_WITH(QV_ERR_UNSUPPORTED, "I8", qv_weight_load(be, w, 0, 2, memory, QV_I8, 3));
    FAIL_WITH(QV_ERR_SHAPE, "x is f32[4, 4], but needs f32[*, 3]",
              qv_op_linear(be, w, qv_tensor_2d(memory, QV_F32, 4, 4),
                           qv_tensor_2d(memory, QV_F32, 4, 2)));
    FAIL_WITH(QV_ERR_SHAPE, "y is f32[3, 2], but needs f32[4, 2]",
              qv_op_linear(be, w, qv_tensor_2d(memory, QV_F32, 4, 3),
                           qv_tensor_2d(memory, QV_F32, 3, 2)));
    FAIL_WITH(QV_ERR_SHAPE, "y is bf16[4, 2]",
              qv_op_linear(be, w, qv_tensor_2d(memory, QV_F32, 4, 3),
                           qv_tensor_2d(memory, QV_BF16, 4, 2)));
    FAIL_WITH(
        QV_ERR_ARG, "no memory",
        qv_op_linear(be, w, qv_tensor_2d(NULL, QV_F32, 4, 3), qv_tensor_2d(memory, QV_F32, 4, 2)));
    qv_weight_free(be, w);
    qv_backend_close(be);
}

/* --- Products of one input ---------------------------------------------------------------- */

Test(linear, products_of_one_input_are_those_of_one_op_each)
{
    enum { N = 5, N_IN = 96, F = 20, N_WIDE = 2 * F, N_LOGITS = 33 };
    qv_backend *be;
    qv_backend_options options = {.name = "cpu", .n_threads = 2, .arithmetic = "bf16"};
    PASS(qv_backend_open(&options, &be));
    qv_rng rng = qv_rng_seed(12);
    float *values = random_floats(&rng, N_WIDE * N_IN, 1), *x = random_floats(&rng, N * N_IN, 1);
    float *rest = random_floats(&rng, N * N_IN, 1.0f / 512), *copy = copied_floats(rest, N * N_IN);
    float wide[N * N_WIDE], act[N * F], want_act[N * F], logits[N * N_LOGITS],
        want_logits[N * N_LOGITS], squares[N * N_LOGITS], want_squares[N * N_LOGITS];
    qv_weight *in = load_weight(be, QV_BF16, values, N_WIDE, N_IN);
    qv_weight *router = load_weight(be, QV_BF16, values, N_LOGITS, N_IN);
    round_to_bf16(x, N * N_IN);
    qv_tensor tx = qv_tensor_2d(x, QV_F32, N, N_IN), none = {.data = NULL};
    qv_tensor h = qv_tensor_2d(wide, QV_F32, N, N_WIDE);
    qv_tensor narrow = qv_tensor_2d(wide, QV_F32, N, N_LOGITS);
    qv_linear_part parts[] = {
        {.w = in, .act = QV_ACT_SWIGLU, .wide = h, .y = qv_tensor_2d(act, QV_F32, N, F)},
        {.w = router,
         .f32 = true,
         .rest = qv_tensor_2d(rest, QV_F32, N, N_IN),
         .y = qv_tensor_2d(logits, QV_F32, N, N_LOGITS)},
        {.w = router,
         .act = QV_ACT_RELU2,
         .wide = narrow,
         .y = qv_tensor_2d(squares, QV_F32, N, N_LOGITS)},
    };
    PASS(qv_op_linears(be, tx, 3, parts));
    PASS(qv_op_linear(be, in, tx, h));
    PASS(qv_op_swiglu(be, qv_tensor_cols(h, 0, F), qv_tensor_cols(h, F, F),
                      qv_tensor_2d(want_act, QV_F32, N, F)));
    PASS(qv_op_linear(be, router, tx, narrow));
    PASS(qv_op_relu2(be, narrow, qv_tensor_2d(want_squares, QV_F32, N, N_LOGITS)));
    PASS(qv_op_linear_f32(be, router, tx, qv_tensor_2d(copy, QV_F32, N, N_IN),
                          qv_tensor_2d(want_logits, QV_F32, N, N_LOGITS)));
    check_same("swiglu", act, want_act, N * F);
    check_same("logits", logits, want_logits, N * N_LOGITS);
    check_same("relu2", squares, want_squares, N * N_LOGITS);

    parts[0].y = qv_tensor_2d(act, QV_F32, N, F - 1);
    FAIL_WITH(QV_ERR_SHAPE, "linears: y is f32[5, 19], but needs f32[5, 20]",
              qv_op_linears(be, tx, 1, parts));
    parts[0].wide = none;
    FAIL_WITH(QV_ERR_SHAPE, "linear", qv_op_linears(be, tx, 1, parts));
    parts[1].rest = h;
    FAIL_WITH(QV_ERR_SHAPE, "rest", qv_op_linears(be, tx, 1, &parts[1]));
    qv_weight_free(be, in);
    qv_weight_free(be, router);
    free(values);
    free(x);
    free(rest);
    free(copy);
    qv_backend_close(be);
}
