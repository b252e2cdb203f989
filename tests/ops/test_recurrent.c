/* conv1d and gdn: ops that carry a state from step to step. */
#include "tests/ops/ops_test.h"
#include "tests/ops/steps.h"

/* --- conv1d ------------------------------------------------------------------------------- */

typedef struct {
    qv_conv_shape shape;
    float *x, *w, *bias;
} conv_case;

static conv_case new_conv(const qv_conv_shape *shape, bool with_bias)
{
    qv_rng rng = qv_rng_seed(1);
    conv_case c = {.shape = *shape};
    c.x = random_floats(&rng, n_all() * shape->n_channels, 2);
    c.w = random_floats(&rng, shape->n_channels * shape->n_taps, 1);
    c.bias = with_bias ? random_floats(&rng, shape->n_channels, 1) : NULL;
    return c;
}

static void free_conv(conv_case *c)
{
    free(c->x);
    free(c->w);
    free(c->bias);
}

/* All sequences in chunks; every slot starts as NaN, because a fresh sequence must not read it. */
static void run_conv(qv_backend *be, const conv_case *c, int32_t chunk, bool in_place, float *y,
                     float *state)
{
    int64_t n_channels = c->shape.n_channels,
            n_state = N_SLOTS * n_channels * (c->shape.n_taps - 1);
    for (int64_t i = 0; i < n_state; i++)
        state[i] = NAN;
    float *step_x = filled_floats(n_all() * n_channels, NAN);
    float *step_y = in_place ? step_x : filled_floats(n_all() * n_channels, NAN);
    qv_tensor w = qv_tensor_2d(c->w, QV_F32, n_channels, c->shape.n_taps);
    qv_tensor bias = c->bias ? qv_tensor_1d(c->bias, QV_F32, n_channels) : (qv_tensor){0};
    qv_tensor st = qv_tensor_3d(state, QV_F32, N_SLOTS, n_channels, c->shape.n_taps - 1);
    step s;
    for (int32_t done[MAX_SEQS] = {0}, n; (n = next_step(&s, done, chunk)) > 0;) {
        take_rows(step_x, c->x, s.from, n, n_channels);
        PASS(qv_op_conv1d(be, &s.batch, qv_tensor_2d(step_x, QV_F32, n, n_channels), w, bias, st,
                          qv_tensor_2d(step_y, QV_F32, n, n_channels)));
        put_rows(y, step_y, s.from, n, n_channels);
    }
    if (!in_place)
        free(step_y);
    free(step_x);
}

static void conv_oracle(const conv_case *c, double *y)
{
    int64_t n_channels = c->shape.n_channels, n_taps = c->shape.n_taps, base = 0;
    for (int i = 0; i < MAX_SEQS; base += lengths[i++])
        for (int64_t t = 0; t < lengths[i]; t++)
            for (int64_t ch = 0; ch < n_channels; ch++) {
                double sum = c->bias ? c->bias[ch] : 0;
                for (int64_t j = 0; j < n_taps; j++)
                    if (t - (n_taps - 1) + j >= 0)
                        sum += (double)c->w[ch * n_taps + j] *
                               c->x[(base + t - (n_taps - 1) + j) * n_channels + ch];
                y[(base + t) * n_channels + ch] = silu_d(sum);
            }
}

Test(conv1d, agrees_with_double)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_conv_shapes); i++)
        for (int bias = 0; bias < 2; bias++) {
            conv_case c = new_conv(&qv_conv_shapes[i], bias);
            int64_t n = n_all() * c.shape.n_channels;
            float *y = filled_floats(n, NAN);
            float *state = filled_floats(N_SLOTS * c.shape.n_channels * c.shape.n_taps, NAN);
            double *want = new_doubles(n);
            run_conv(be, &c, 1000, false, y, state);
            conv_oracle(&c, want);
            check_close(qv_backend_describe(be), y, want, n, 8 * U32,
                        8 * U32 * (double)c.shape.n_taps);
            free(y);
            free(state);
            free(want);
            free_conv(&c);
        }
}

Test(conv1d, chunks_threads_and_working_in_place_change_no_bit)
{
    static const int32_t chunks[] = {1, 2, 7, 64};
    for (size_t a = 0; a < QV_ROWS(isas); a++)
        for (size_t i = 0; i < QV_ROWS(qv_conv_shapes); i++) {
            qv_backend *one = open_isa(isas[a], 1), *many = open_isa(isas[a], 3);
            if (!one || !many)
                continue;
            conv_case c = new_conv(&qv_conv_shapes[i], true);
            int64_t n = n_all() * c.shape.n_channels;
            int64_t n_state = N_SLOTS * c.shape.n_channels * (c.shape.n_taps - 1);
            float *want = filled_floats(n, NAN), *y = filled_floats(n, NAN);
            float *want_state = filled_floats(n_state, NAN), *state = filled_floats(n_state, NAN);
            run_conv(one, &c, 1000, false, want, want_state);
            for (size_t k = 0; k < QV_ROWS(chunks); k++)
                for (int in_place = 0; in_place < 2; in_place++) {
                    run_conv(many, &c, chunks[k], in_place, y, state);
                    check_same("y", y, want, n);
                    check_same("state", state, want_state, n_state);
                }
            free(want);
            free(y);
            free(want_state);
            free(state);
            free_conv(&c);
            qv_backend_close(one);
            qv_backend_close(many);
        }
}

Test(conv1d, state_holds_the_last_inputs_oldest_first)
{
    static const qv_conv_shape shape = {5, 4};
    qv_backend *be = open_cpu(1);
    conv_case c = new_conv(&shape, false);
    float y[186 * 5], state[N_SLOTS * 5 * 3];
    run_conv(be, &c, 7, false, y, state);
    for (int64_t ch = 0; ch < 5; ch++) {
        for (int64_t j = 0; j < 3; j++) /* the sequence of 150 tokens, behind one of 1, in slot 0 */
            cr_assert_eq(state[ch * 3 + j], c.x[(1 + 147 + j) * 5 + ch]);
        const float *one = state + (4 * 5 + ch) * 3; /* the sequence of one token, in slot 4 */
        cr_assert(one[0] == 0 && one[1] == 0 && one[2] == c.x[ch]);
    }
    free_conv(&c);
    qv_backend_close(be);
}

/* --- gdn ---------------------------------------------------------------------------------- */

typedef struct {
    qv_gdn_shape shape;
    float *q, *k, *v, *a, *b, *a_log, *dt_bias;
} gdn_case;

static gdn_case new_gdn(const qv_gdn_shape *s)
{
    qv_rng rng = qv_rng_seed(2);
    gdn_case c = {.shape = *s};
    c.q = random_floats(&rng, n_all() * s->n_k_heads * s->d_k, 1);
    c.k = random_floats(&rng, n_all() * s->n_k_heads * s->d_k, 1);
    c.v = random_floats(&rng, n_all() * s->n_v_heads * s->d_v, 1);
    c.a = random_floats(&rng, n_all() * s->n_v_heads, 3);
    c.b = random_floats(&rng, n_all() * s->n_v_heads, 3);
    c.a_log = random_floats(&rng, s->n_v_heads, 2);
    c.dt_bias = random_floats(&rng, s->n_v_heads, 2);
    c.a[0] = 50.0f; /* beyond where softplus is a line */
    c.a[1 % s->n_v_heads] = -60.0f;
    return c;
}

static void free_gdn(gdn_case *c)
{
    free(c->q);
    free(c->k);
    free(c->v);
    free(c->a);
    free(c->b);
    free(c->a_log);
    free(c->dt_bias);
}

static int64_t n_gdn_state(const qv_gdn_shape *s)
{
    return N_SLOTS * s->n_v_heads * s->d_k * s->d_v;
}

static void run_gdn(qv_backend *be, const gdn_case *c, int32_t chunk, float *o, float *state)
{
    const qv_gdn_shape *s = &c->shape;
    int64_t qk = s->n_k_heads * s->d_k, vo = s->n_v_heads * s->d_v, stride = 2 * qk + vo + 3;
    for (int64_t i = 0; i < n_gdn_state(s); i++)
        state[i] = NAN;
    float *qkv = filled_floats(n_all() * stride, NAN), *step_o = filled_floats(n_all() * vo, NAN);
    float *a = filled_floats(n_all() * s->n_v_heads, NAN),
          *b = filled_floats(n_all() * s->n_v_heads, NAN);
    step st;
    for (int32_t done[MAX_SEQS] = {0}, n; (n = next_step(&st, done, chunk)) > 0;) {
        for (int32_t i = 0; i < n; i++) { /* q, k and v lie side by side, as the model has them */
            memcpy(qkv + i * stride, c->q + st.from[i] * qk, (size_t)qk * sizeof(float));
            memcpy(qkv + i * stride + qk, c->k + st.from[i] * qk, (size_t)qk * sizeof(float));
            memcpy(qkv + i * stride + 2 * qk, c->v + st.from[i] * vo, (size_t)vo * sizeof(float));
        }
        take_rows(a, c->a, st.from, n, s->n_v_heads);
        take_rows(b, c->b, st.from, n, s->n_v_heads);
        qv_tensor all = qv_tensor_2d(qkv, QV_F32, n, stride);
        qv_gdn_args args = {
            .q = qv_tensor_split(qv_tensor_cols(all, 0, qk), s->n_k_heads, s->d_k),
            .k = qv_tensor_split(qv_tensor_cols(all, qk, qk), s->n_k_heads, s->d_k),
            .v = qv_tensor_split(qv_tensor_cols(all, 2 * qk, vo), s->n_v_heads, s->d_v),
            .a = qv_tensor_2d(a, QV_F32, n, s->n_v_heads),
            .b = qv_tensor_2d(b, QV_F32, n, s->n_v_heads),
            .a_log = qv_tensor_1d(c->a_log, QV_F32, s->n_v_heads),
            .dt_bias = qv_tensor_1d(c->dt_bias, QV_F32, s->n_v_heads),
            .state = qv_tensor_4d(state, QV_F32, N_SLOTS, s->n_v_heads, s->d_k, s->d_v),
            .o = qv_tensor_3d(step_o, QV_F32, n, s->n_v_heads, s->d_v),
        };
        PASS(qv_op_gdn(be, &st.batch, &args));
        put_rows(o, step_o, st.from, n, vo);
    }
    free(qkv);
    free(step_o);
    free(a);
    free(b);
}

static void normalise_d(const float *x, double factor, double *y, int64_t d)
{
    double sum = 0;
    for (int64_t i = 0; i < d; i++)
        sum += (double)x[i] * x[i];
    for (int64_t i = 0; i < d; i++)
        y[i] = x[i] * factor / sqrt(sum + 1e-6);
}

/* One head of one sequence, tokens [base, base + n). */
static void gdn_oracle(const gdn_case *c, int64_t base, int64_t n, int64_t h, double *state,
                       double *o)
{
    const qv_gdn_shape *s = &c->shape;
    int64_t kh = h / (s->n_v_heads / s->n_k_heads);
    double *q = new_doubles(s->d_k), *k = new_doubles(s->d_k), *e = new_doubles(s->d_v);
    for (int64_t t = base; t < base + n; t++) {
        normalise_d(c->q + (t * s->n_k_heads + kh) * s->d_k, 1 / sqrt((double)s->d_k), q, s->d_k);
        normalise_d(c->k + (t * s->n_k_heads + kh) * s->d_k, 1, k, s->d_k);
        double g =
            -exp(c->a_log[h]) * softplus_d((double)c->a[t * s->n_v_heads + h] + c->dt_bias[h]);
        double beta = sigmoid_d(c->b[t * s->n_v_heads + h]);
        for (int64_t i = 0; i < s->d_k * s->d_v; i++)
            state[i] *= exp(g);
        for (int64_t j = 0; j < s->d_v; j++) {
            e[j] = c->v[(t * s->n_v_heads + h) * s->d_v + j];
            for (int64_t i = 0; i < s->d_k; i++)
                e[j] -= state[i * s->d_v + j] * k[i];
            e[j] *= beta;
        }
        for (int64_t j = 0; j < s->d_v; j++) {
            double sum = 0;
            for (int64_t i = 0; i < s->d_k; i++) {
                state[i * s->d_v + j] += k[i] * e[j];
                sum += state[i * s->d_v + j] * q[i];
            }
            o[(t * s->n_v_heads + h) * s->d_v + j] = sum;
        }
    }
    free(q);
    free(k);
    free(e);
}

Test(gdn, agrees_with_double)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_gdn_shapes); i++) {
        gdn_case c = new_gdn(&qv_gdn_shapes[i]);
        const qv_gdn_shape *s = &c.shape;
        int64_t n = n_all() * s->n_v_heads * s->d_v, n_head = s->d_k * s->d_v, base = 0;
        float *o = filled_floats(n, NAN), *state = filled_floats(n_gdn_state(s), NAN);
        double *want = new_doubles(n);
        run_gdn(be, &c, 1000, o, state);
        for (int seq = 0; seq < MAX_SEQS; base += lengths[seq++])
            for (int64_t h = 0; h < s->n_v_heads; h++) {
                double *want_state = new_doubles(n_head);
                gdn_oracle(&c, base, lengths[seq], h, want_state, want);
                check_close("state", state + (slots[seq] * s->n_v_heads + h) * n_head, want_state,
                            n_head, 1e-5, 1e-5);
                free(want_state);
            }
        check_close(qv_backend_describe(be), o, want, n, 1e-5, 1e-5);
        free(o);
        free(state);
        free(want);
        free_gdn(&c);
    }
}

Test(gdn, chunks_and_threads_change_no_bit)
{
    static const int32_t chunks[] = {1, 7, 64};
    for (size_t a = 0; a < QV_ROWS(isas); a++)
        for (size_t i = 0; i < QV_ROWS(qv_gdn_shapes); i++) {
            qv_backend *one = open_isa(isas[a], 1), *many = open_isa(isas[a], 3);
            if (!one || !many)
                continue;
            gdn_case c = new_gdn(&qv_gdn_shapes[i]);
            int64_t n = n_all() * c.shape.n_v_heads * c.shape.d_v, n_state = n_gdn_state(&c.shape);
            float *want = filled_floats(n, NAN), *o = filled_floats(n, NAN);
            float *want_state = filled_floats(n_state, NAN), *state = filled_floats(n_state, NAN);
            run_gdn(one, &c, 1000, want, want_state);
            for (size_t k = 0; k < QV_ROWS(chunks); k++) {
                run_gdn(many, &c, chunks[k], o, state);
                check_same("o", o, want, n);
                check_same("state", state, want_state, n_state);
            }
            free(want);
            free(o);
            free(want_state);
            free(state);
            free_gdn(&c);
            qv_backend_close(one);
            qv_backend_close(many);
        }
}

Test(recurrent, avx2_and_avx512_give_the_same_bits)
{
    qv_backend *wide = open_isa("avx512", 1), *narrow = open_isa("avx2", 1);
    if (!wide || !narrow)
        cr_skip_test("this processor has no AVX-512");
    for (size_t i = 0; i < QV_ROWS(qv_gdn_shapes); i++) {
        gdn_case c = new_gdn(&qv_gdn_shapes[i]);
        int64_t n = n_all() * c.shape.n_v_heads * c.shape.d_v, n_state = n_gdn_state(&c.shape);
        float *o = filled_floats(n, NAN), *o2 = filled_floats(n, NAN);
        float *state = filled_floats(n_state, NAN), *state2 = filled_floats(n_state, NAN);
        run_gdn(wide, &c, 64, o, state);
        run_gdn(narrow, &c, 64, o2, state2);
        check_same("o", o2, o, n);
        check_same("state", state2, state, n_state);
        free(o);
        free(o2);
        free(state);
        free(state2);
        free_gdn(&c);
    }
    for (size_t i = 0; i < QV_ROWS(qv_conv_shapes); i++) {
        conv_case c = new_conv(&qv_conv_shapes[i], true);
        int64_t n = n_all() * c.shape.n_channels;
        float *y = filled_floats(n, NAN), *y2 = filled_floats(n, NAN);
        float *state = filled_floats(N_SLOTS * c.shape.n_channels * c.shape.n_taps, NAN);
        run_conv(wide, &c, 64, false, y, state);
        run_conv(narrow, &c, 64, false, y2, state);
        check_same("y", y2, y, n);
        free(y);
        free(y2);
        free(state);
        free_conv(&c);
    }
    qv_backend_close(wide);
    qv_backend_close(narrow);
}

/* --- Refusals ----------------------------------------------------------------------------- */

Test(recurrent, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    float m[512] = {0};
    int32_t zero = 0, start[2] = {0, 2};
    qv_batch batch = {.n_tokens = 2,
                      .n_seqs = 1,
                      .pos = (int32_t[]){0, 1},
                      .seq_start = start,
                      .state_slot = &zero};
    qv_tensor x = qv_tensor_2d(m, QV_F32, 2, 6), w = qv_tensor_2d(m, QV_F32, 6, 4), none = {0};
    qv_tensor state = qv_tensor_3d(m, QV_F32, 1, 6, 3);
    FAIL_WITH(QV_ERR_SHAPE, "conv1d: w is f32[5, 4], but needs f32[6, *]",
              qv_op_conv1d(be, &batch, x, qv_tensor_2d(m, QV_F32, 5, 4), none, state, x));
    FAIL_WITH(QV_ERR_SHAPE, "state is f32[1, 6, 4], but needs f32[*, 6, 3]",
              qv_op_conv1d(be, &batch, x, w, none, qv_tensor_3d(m, QV_F32, 1, 6, 4), x));
    FAIL_WITH(QV_ERR_SHAPE, "bias is f32[5]",
              qv_op_conv1d(be, &batch, x, w, qv_tensor_1d(m, QV_F32, 5), state, x));
    FAIL_WITH(QV_ERR_LIMIT, "17 taps",
              qv_op_conv1d(be, &batch, x, qv_tensor_2d(m, QV_F32, 6, 17), none,
                           qv_tensor_3d(m, QV_F32, 1, 6, 16), x));
    qv_gdn_args args = {
        .q = qv_tensor_3d(m, QV_F32, 2, 2, 4),
        .k = qv_tensor_3d(m, QV_F32, 2, 2, 4),
        .v = qv_tensor_3d(m, QV_F32, 2, 3, 5),
        .a = qv_tensor_2d(m, QV_F32, 2, 3),
        .b = qv_tensor_2d(m, QV_F32, 2, 3),
        .a_log = qv_tensor_1d(m, QV_F32, 3),
        .dt_bias = qv_tensor_1d(m, QV_F32, 3),
        .state = qv_tensor_4d(m, QV_F32, 1, 3, 4, 5),
        .o = qv_tensor_3d(m, QV_F32, 2, 3, 5),
    };
    FAIL_WITH(QV_ERR_SHAPE, "3 heads do not share 2 heads evenly", qv_op_gdn(be, &batch, &args));
    args.state = qv_tensor_4d(m, QV_F32, 1, 3, 5, 4);
    FAIL_WITH(QV_ERR_SHAPE, "state is f32[1, 3, 5, 4], but needs f32[*, 3, 4, 5]",
              qv_op_gdn(be, &batch, &args));
    qv_backend_close(be);
}
