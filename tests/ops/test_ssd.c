/* ssd: Mamba-2's recurrence with its state. */
#include "tests/ops/ops_test.h"
#include "tests/ops/steps.h"

typedef struct {
    qv_ssd_shape shape;
    float *x, *b, *c, *dt, *a_log, *dt_bias, *d_skip;
    float dt_min, dt_max;
} ssd_case;

static ssd_case new_ssd(const qv_ssd_shape *s)
{
    qv_rng rng = qv_rng_seed(3);
    ssd_case c = {.shape = *s, .dt_min = 0, .dt_max = INFINITY};
    c.x = random_floats(&rng, n_all() * s->n_heads * s->d, 1);
    c.b = random_floats(&rng, n_all() * s->n_groups * s->n_state, 1);
    c.c = random_floats(&rng, n_all() * s->n_groups * s->n_state, 1);
    c.dt = random_floats(&rng, n_all() * s->n_heads, 4);
    c.a_log = random_floats(&rng, s->n_heads, 2);
    c.dt_bias = random_floats(&rng, s->n_heads, 2);
    c.d_skip = random_floats(&rng, s->n_heads, 1);
    c.dt[0] = 50.0f; /* beyond where softplus is a line */
    c.dt[1] = -60.0f;
    return c;
}

static void free_ssd(ssd_case *c)
{
    float *all[] = {c->x, c->b, c->c, c->dt, c->a_log, c->dt_bias, c->d_skip};
    for (size_t i = 0; i < QV_ROWS(all); i++)
        free(all[i]);
}

static int64_t n_ssd_state(const qv_ssd_shape *s)
{
    return N_SLOTS * s->n_heads * s->d * s->n_state;
}

/* All sequences in chunks; every slot starts as NaN, because a fresh sequence must not read it. x,
 * B and C lie side by side, as the model has them. */
static void run_ssd(qv_backend *be, const ssd_case *c, int32_t chunk, float *y, float *state)
{
    const qv_ssd_shape *s = &c->shape;
    int64_t nx = s->n_heads * s->d, nb = s->n_groups * s->n_state, stride = nx + 2 * nb + 5;
    for (int64_t i = 0; i < n_ssd_state(s); i++)
        state[i] = NAN;
    float *xbc = filled_floats(n_all() * stride, NAN), *step_y = filled_floats(n_all() * nx, NAN);
    float *dt = filled_floats(n_all() * s->n_heads, NAN);
    step st;
    for (int32_t done[MAX_SEQS] = {0}, n; (n = next_step(&st, done, chunk)) > 0;) {
        for (int32_t i = 0; i < n; i++) {
            float *row = xbc + i * stride;
            memcpy(row, c->x + st.from[i] * nx, (size_t)nx * sizeof(float));
            memcpy(row + nx, c->b + st.from[i] * nb, (size_t)nb * sizeof(float));
            memcpy(row + nx + nb, c->c + st.from[i] * nb, (size_t)nb * sizeof(float));
        }
        take_rows(dt, c->dt, st.from, n, s->n_heads);
        qv_tensor all = qv_tensor_2d(xbc, QV_F32, n, stride);
        qv_ssd_args args = {
            .x = qv_tensor_split(qv_tensor_cols(all, 0, nx), s->n_heads, s->d),
            .b = qv_tensor_split(qv_tensor_cols(all, nx, nb), s->n_groups, s->n_state),
            .c = qv_tensor_split(qv_tensor_cols(all, nx + nb, nb), s->n_groups, s->n_state),
            .dt = qv_tensor_2d(dt, QV_F32, n, s->n_heads),
            .a_log = qv_tensor_1d(c->a_log, QV_F32, s->n_heads),
            .dt_bias = qv_tensor_1d(c->dt_bias, QV_F32, s->n_heads),
            .d_skip = qv_tensor_1d(c->d_skip, QV_F32, s->n_heads),
            .dt_min = c->dt_min,
            .dt_max = c->dt_max,
            .state = qv_tensor_4d(state, QV_F32, N_SLOTS, s->n_heads, s->d, s->n_state),
            .y = qv_tensor_3d(step_y, QV_F32, n, s->n_heads, s->d),
        };
        PASS(qv_op_ssd(be, &st.batch, &args));
        put_rows(y, step_y, st.from, n, nx);
    }
    free(xbc);
    free(step_y);
    free(dt);
}

/* One head of one sequence, tokens [base, base + n). */
static void ssd_oracle(const ssd_case *c, int64_t base, int64_t n, int64_t h, double *state,
                       double *y)
{
    const qv_ssd_shape *s = &c->shape;
    int64_t group = h / (s->n_heads / s->n_groups);
    for (int64_t t = base; t < base + n; t++) {
        double dt = softplus_d((double)c->dt[t * s->n_heads + h] + c->dt_bias[h]);
        dt = fmin(fmax(dt, c->dt_min), c->dt_max);
        double decay = exp(-exp(c->a_log[h]) * dt);
        const float *b = c->b + (t * s->n_groups + group) * s->n_state;
        const float *out = c->c + (t * s->n_groups + group) * s->n_state;
        for (int64_t i = 0; i < s->d; i++) {
            double x = c->x[(t * s->n_heads + h) * s->d + i], sum = c->d_skip[h] * x;
            for (int64_t j = 0; j < s->n_state; j++) {
                double *cell = state + i * s->n_state + j;
                *cell = *cell * decay + dt * x * b[j];
                sum += *cell * out[j];
            }
            y[(t * s->n_heads + h) * s->d + i] = sum;
        }
    }
}

static void check_against_double(qv_backend *be, const ssd_case *c)
{
    const qv_ssd_shape *s = &c->shape;
    int64_t n = n_all() * s->n_heads * s->d, n_head = s->d * s->n_state, base = 0;
    float *y = filled_floats(n, NAN), *state = filled_floats(n_ssd_state(s), NAN);
    double *want = new_doubles(n);
    run_ssd(be, c, 1000, y, state);
    for (int seq = 0; seq < MAX_SEQS; base += lengths[seq++])
        for (int64_t h = 0; h < s->n_heads; h++) {
            double *want_state = new_doubles(n_head);
            ssd_oracle(c, base, lengths[seq], h, want_state, want);
            check_close("state", state + (slots[seq] * s->n_heads + h) * n_head, want_state, n_head,
                        1e-5, 3e-5);
            free(want_state);
        }
    check_close(qv_backend_describe(be), y, want, n, 1e-5, 1e-4);
    free(y);
    free(state);
    free(want);
}

Test(ssd, agrees_with_double)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_ssd_shapes); i++) {
        ssd_case c = new_ssd(&qv_ssd_shapes[i]);
        check_against_double(be, &c);
        free_ssd(&c);
    }
}

/* Small steps are the long memory: nothing may lift them to a least size unless the limits say so.
 */
Test(ssd, dt_is_limited_by_its_limits_and_by_nothing_else)
{
    static const float limits[][2] = {{0, INFINITY}, {0.001f, 0.1f}, {0, 0}, {0.5f, INFINITY}};
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(limits); i++) {
        ssd_case c = new_ssd(&qv_ssd_shapes[0]);
        for (int64_t t = 0; t < n_all() * c.shape.n_heads; t++)
            c.dt[t] -= 9; /* dt of 1e-6 to 1 */
        c.dt_min = limits[i][0];
        c.dt_max = limits[i][1];
        check_against_double(be, &c);
        free_ssd(&c);
    }
    qv_backend_close(be);
}

Test(ssd, chunks_and_threads_change_no_bit)
{
    static const int32_t chunks[] = {1, 7, 64};
    for (size_t a = 0; a < QV_ROWS(isas); a++)
        for (size_t i = 0; i < QV_ROWS(qv_ssd_shapes); i++) {
            qv_backend *one = open_isa(isas[a], 1), *many = open_isa(isas[a], 3);
            if (!one || !many)
                continue;
            ssd_case c = new_ssd(&qv_ssd_shapes[i]);
            int64_t n = n_all() * c.shape.n_heads * c.shape.d, n_state = n_ssd_state(&c.shape);
            float *want = filled_floats(n, NAN), *y = filled_floats(n, NAN);
            float *want_state = filled_floats(n_state, NAN), *state = filled_floats(n_state, NAN);
            run_ssd(one, &c, 1000, want, want_state);
            for (size_t k = 0; k < QV_ROWS(chunks); k++) {
                run_ssd(many, &c, chunks[k], y, state);
                check_same("y", y, want, n);
                check_same("state", state, want_state, n_state);
            }
            free(want);
            free(y);
            free(want_state);
            free(state);
            free_ssd(&c);
            qv_backend_close(one);
            qv_backend_close(many);
        }
}

Test(ssd, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    float m[512] = {0};
    int32_t zero = 0, start[2] = {0, 2};
    qv_batch batch = {.n_tokens = 2,
                      .n_seqs = 1,
                      .pos = (int32_t[]){0, 1},
                      .seq_start = start,
                      .state_slot = &zero};
    qv_ssd_args args = {
        .x = qv_tensor_3d(m, QV_F32, 2, 3, 4),
        .b = qv_tensor_3d(m, QV_F32, 2, 2, 5),
        .c = qv_tensor_3d(m, QV_F32, 2, 2, 5),
        .dt = qv_tensor_2d(m, QV_F32, 2, 3),
        .a_log = qv_tensor_1d(m, QV_F32, 3),
        .dt_bias = qv_tensor_1d(m, QV_F32, 3),
        .d_skip = qv_tensor_1d(m, QV_F32, 3),
        .dt_max = INFINITY,
        .state = qv_tensor_4d(m, QV_F32, 1, 3, 4, 5),
        .y = qv_tensor_3d(m, QV_F32, 2, 3, 4),
    };
    FAIL_WITH(QV_ERR_SHAPE, "ssd: 3 heads do not share 2 heads evenly",
              qv_op_ssd(be, &batch, &args));
    args.b = args.c = qv_tensor_3d(m, QV_F32, 2, 3, 5);
    PASS(qv_op_ssd(be, &batch, &args));
    args.state = qv_tensor_4d(m, QV_F32, 1, 3, 5, 4);
    FAIL_WITH(QV_ERR_SHAPE, "state is f32[1, 3, 5, 4], but needs f32[*, 3, 4, 5]",
              qv_op_ssd(be, &batch, &args));
    args.state = qv_tensor_4d(m, QV_F32, 1, 3, 4, 5);
    args.d_skip = qv_tensor_1d(m, QV_F32, 4);
    FAIL_WITH(QV_ERR_SHAPE, "d_skip is f32[4]", qv_op_ssd(be, &batch, &args));
    args.d_skip = qv_tensor_1d(m, QV_F32, 3);
    args.dt_min = 1;
    args.dt_max = 0.5f;
    FAIL_WITH(QV_ERR_ARG, "dt from 1 to 0.5", qv_op_ssd(be, &batch, &args));
    args.dt_max = NAN;
    FAIL_WITH(QV_ERR_ARG, "dt from 1 to nan", qv_op_ssd(be, &batch, &args));
    qv_backend_close(be);
}
