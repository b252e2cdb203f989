/* conv1d, gdn and ssd on CUDA against the CPU: sequences of several lengths that go through in
 * steps of a few tokens, so that chunks, single tokens and mixtures of them carry states to each
 * other.
 */
#include "tests/ops/pair.h"
#include "tests/ops/steps.h"

static const int32_t chunks[] = {1, 3, 7, 64, 65, 1000};

/* The step's arrays on both sides. */
static void upload_batch(pair *p, const step *s, qv_batch *out)
{
    const qv_batch *b = &s->batch;
    both_memory pos = upload_both(p, b->pos, (size_t)b->n_tokens * 4);
    both_memory start = upload_both(p, b->seq_start, (size_t)(b->n_seqs + 1) * 4);
    both_memory slot = upload_both(p, b->state_slot, (size_t)b->n_seqs * 4);
    for (int side = 0; side < 2; side++) {
        out[side] = *b;
        out[side].pos = pos.at[side];
        out[side].seq_start = start.at[side];
        out[side].state_slot = slot.at[side];
    }
}

/* Rows `from` of x [n_all, d] with `gap` columns of NaN behind each row. */
static both step_rows(pair *p, const float *x, const step *s, int64_t d, int64_t gap)
{
    int64_t n = s->batch.n_tokens;
    float *rows = filled_floats(n * (d + gap), NAN);
    for (int64_t i = 0; i < n; i++)
        memcpy(rows + i * (d + gap), x + s->from[i] * d, (size_t)d * sizeof *rows);
    both b = act_2d(p, rows, n, d + gap);
    for (int side = 0; side < 2; side++)
        b.t[side] = qv_tensor_cols(b.t[side], 0, d);
    free(rows);
    return b;
}

/* --- conv1d ------------------------------------------------------------------------------- */

static void check_conv(const qv_conv_shape *shape, bool with_bias, bool in_place, int32_t chunk)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(1);
    int64_t c = shape->n_channels, n_past = shape->n_taps - 1;
    float *x = random_floats(&rng, n_all() * c, 2);
    both w = random_f32(p, &rng, c, shape->n_taps, 1), bias = random_f32(p, &rng, 1, c, 1);
    both state = nan_act(p, N_SLOTS, c * n_past); /* a fresh sequence must not read it */
    char what[128];
    step s;
    for (int32_t done[MAX_SEQS] = {0}, n; (n = next_step(&s, done, chunk)) > 0;) {
        int mark = p->n_blocks;
        qv_batch batch[2];
        upload_batch(p, &s, batch);
        both in = step_rows(p, x, &s, c, 8), out = in_place ? in : nan_act(p, n, c);
        for (int side = 0; side < 2; side++) {
            qv_tensor b = with_bias ? qv_tensor_1d(bias.t[side].data, QV_F32, c) : (qv_tensor){0};
            PASS(qv_op_conv1d(
                p->be[side], &batch[side], in.t[side], w.t[side], b,
                qv_tensor_3d(state.t[side].data, state.t[side].dtype, N_SLOTS, c, n_past),
                out.t[side]));
        }
        snprintf(what, sizeof what, "conv1d of %lld channels, %lld taps, chunks of %d%s%s",
                 (long long)c, (long long)shape->n_taps, chunk, with_bias ? ", bias" : "",
                 in_place ? ", in place" : "");
        compare(p, what, out, ROUNDED_ONCE);
        release_to(p, mark);
    }
    if (n_past > 0)
        compare(p, "conv1d: state", state, 0, 0);
    free(x);
    close_pair(p);
}

Test(cuda_recurrent, conv1d_agrees_with_the_cpu, .timeout = 600)
{
    for (size_t i = 0; i < QV_ROWS(qv_conv_shapes); i++)
        for (size_t j = 0; j < QV_ROWS(chunks); j++)
            for (int form = 0; form < 3; form++)
                check_conv(&qv_conv_shapes[i], form != 1, form == 2, chunks[j]);
}

/* --- gdn ---------------------------------------------------------------------------------- */

static const qv_gdn_shape more_gdn[] = {{1, 1, 128, 40}, {2, 4, 128, 128}, {1, 2, 24, 8}};

/* Chunks are solved on the tensor cores with BF16 operands, so their outputs differ from the CPU's
 * by more than a rounding: 2^-9 of the terms of a sum of up to 64, which for single elements is 1
 * to 2 % of the root mean square of all. */
#define CHUNKED 0.016, 0.03

/* Of rows [n, q k v] and gates [n, a b]. */
static qv_gdn_args gdn_args(const qv_gdn_shape *shape, qv_tensor x, qv_tensor gates,
                            qv_tensor a_log, qv_tensor dt_bias, qv_tensor state, qv_tensor out)
{
    int64_t hk = shape->n_k_heads, hv = shape->n_v_heads, dk = shape->d_k, dv = shape->d_v;
    return (qv_gdn_args){
        .q = qv_tensor_split(qv_tensor_cols(x, 0, hk * dk), hk, dk),
        .k = qv_tensor_split(qv_tensor_cols(x, hk * dk, hk * dk), hk, dk),
        .v = qv_tensor_split(qv_tensor_cols(x, 2 * hk * dk, hv * dv), hv, dv),
        .a = qv_tensor_cols(gates, 0, hv),
        .b = qv_tensor_cols(gates, hv, hv),
        .a_log = qv_tensor_1d(a_log.data, QV_F32, hv),
        .dt_bias = qv_tensor_1d(dt_bias.data, QV_F32, hv),
        .state = qv_tensor_4d(state.data, QV_F32, N_SLOTS, hv, dk, dv),
        .o = qv_tensor_split(out, hv, dv),
    };
}

static void check_gdn(const qv_gdn_shape *shape, int32_t chunk)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(2);
    int64_t hk = shape->n_k_heads, hv = shape->n_v_heads, dk = shape->d_k, dv = shape->d_v;
    int64_t d = 2 * hk * dk + hv * dv, n_state = hv * dk * dv;
    float *x = random_floats(&rng, n_all() * d, 1),
          *gates = random_floats(&rng, n_all() * 2 * hv, 3);
    both a_log = random_f32(p, &rng, 1, hv, 1), dt_bias = random_f32(p, &rng, 1, hv, 1);
    both state = nan_f32(p, N_SLOTS, n_state);
    char what[128];
    step s;
    for (int32_t done[MAX_SEQS] = {0}, n; (n = next_step(&s, done, chunk)) > 0;) {
        int mark = p->n_blocks;
        qv_batch batch[2];
        upload_batch(p, &s, batch);
        both in = step_rows(p, x, &s, d, 8), g = step_rows(p, gates, &s, 2 * hv, 0);
        both out = nan_act(p, n, hv * dv);
        for (int side = 0; side < 2; side++) {
            const qv_gdn_args args = gdn_args(shape, in.t[side], g.t[side], a_log.t[side],
                                              dt_bias.t[side], state.t[side], out.t[side]);
            PASS(qv_op_gdn(p->be[side], &batch[side], &args));
        }
        snprintf(what, sizeof what, "gdn of %lld/%lld heads %lldx%lld, chunks of %d", (long long)hk,
                 (long long)hv, (long long)dk, (long long)dv, chunk);
        compare(p, what, out, CHUNKED);
        release_to(p, mark);
    }
    compare(p, "gdn: state", state, 0.005, 0.005);
    free(x);
    free(gates);
    close_pair(p);
}

Test(cuda_recurrent, gdn_agrees_with_the_cpu, .timeout = 600)
{
    for (size_t j = 0; j < QV_ROWS(chunks); j++) {
        for (size_t i = 0; i < QV_ROWS(qv_gdn_shapes); i++)
            check_gdn(&qv_gdn_shapes[i], chunks[j]);
        for (size_t i = 0; i < QV_ROWS(more_gdn); i++)
            check_gdn(&more_gdn[i], chunks[j]);
    }
}

/* Whole tiles of keys are read, so what follows a sequence must be kept from it. */
Test(cuda_recurrent, a_sequence_does_not_feel_the_ones_behind_it)
{
    enum { HEADS = 2, D = 64, WIDTH = 3 * HEADS * D, SPOILT = 151 };
    const qv_gdn_shape shape = {HEADS, HEADS, D, D};
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(4);
    float *x = random_floats(&rng, n_all() * WIDTH, 1), *got[2];
    float *gates = random_floats(&rng, n_all() * 2 * HEADS, 3);
    both a_log = random_f32(p, &rng, 1, HEADS, 1), dt_bias = random_f32(p, &rng, 1, HEADS, 1);
    step s;
    int32_t done[MAX_SEQS] = {0}, n = next_step(&s, done, 1000);
    qv_batch batch[2];
    upload_batch(p, &s, batch);
    for (int spoilt = 0; spoilt < 2; spoilt++) {
        for (int64_t i = SPOILT * WIDTH; i < n * WIDTH && spoilt; i++)
            x[i] = NAN;
        both in = step_rows(p, x, &s, WIDTH, 0), g = step_rows(p, gates, &s, 2 * HEADS, 0);
        both state = nan_f32(p, N_SLOTS, HEADS * D * D), out = nan_act(p, n, HEADS * D);
        const qv_gdn_args args = gdn_args(&shape, in.t[GPU], g.t[GPU], a_log.t[GPU], dt_bias.t[GPU],
                                          state.t[GPU], out.t[GPU]);
        PASS(qv_op_gdn(p->be[GPU], &batch[GPU], &args));
        got[spoilt] = fetch(p, GPU, out.t[GPU]);
    }
    for (int64_t i = 0; i < SPOILT * HEADS * D; i++)
        cr_assert_eq(got[1][i], got[0][i], "number %lld: %g, not %g", (long long)i, got[1][i],
                     got[0][i]);
    free(got[0]);
    free(got[1]);
    free(x);
    free(gates);
    close_pair(p);
}

/* --- ssd ---------------------------------------------------------------------------------- */

static void check_ssd(const qv_ssd_shape *shape, int32_t chunk, bool limited)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(3);
    int64_t h = shape->n_heads, dh = shape->d, g = shape->n_groups, ns = shape->n_state;
    int64_t d = h * dh + 2 * g * ns;
    float *x = random_floats(&rng, n_all() * d, 1), *dts = random_floats(&rng, n_all() * h, 2);
    both a_log = random_f32(p, &rng, 1, h, 1), dt_bias = random_f32(p, &rng, 1, h, 1);
    both skip = random_f32(p, &rng, 1, h, 1), state = nan_f32(p, N_SLOTS, h * dh * ns);
    char what[128];
    step s;
    for (int32_t done[MAX_SEQS] = {0}, n; (n = next_step(&s, done, chunk)) > 0;) {
        int mark = p->n_blocks;
        qv_batch batch[2];
        upload_batch(p, &s, batch);
        both in = step_rows(p, x, &s, d, 8), dt = step_rows(p, dts, &s, h, 0);
        both out = nan_act(p, n, h * dh);
        for (int side = 0; side < 2; side++) {
            qv_tensor t = in.t[side];
            qv_ssd_args args = {
                .x = qv_tensor_split(qv_tensor_cols(t, 0, h * dh), h, dh),
                .b = qv_tensor_split(qv_tensor_cols(t, h * dh, g * ns), g, ns),
                .c = qv_tensor_split(qv_tensor_cols(t, h * dh + g * ns, g * ns), g, ns),
                .dt = dt.t[side],
                .a_log = qv_tensor_1d(a_log.t[side].data, QV_F32, h),
                .dt_bias = qv_tensor_1d(dt_bias.t[side].data, QV_F32, h),
                .d_skip = qv_tensor_1d(skip.t[side].data, QV_F32, h),
                .dt_min = limited ? 0.5f : 0.0f,
                .dt_max = limited ? 1.5f : INFINITY,
                .state = qv_tensor_4d(state.t[side].data, QV_F32, N_SLOTS, h, dh, ns),
                .y = qv_tensor_split(out.t[side], h, dh),
            };
            PASS(qv_op_ssd(p->be[side], &batch[side], &args));
        }
        snprintf(what, sizeof what, "ssd of %lld heads %lld, %lld groups %lld, chunks of %d",
                 (long long)h, (long long)dh, (long long)g, (long long)ns, chunk);
        compare(p, what, out, CHUNKED);
        release_to(p, mark);
    }
    compare(p, "ssd: state", state, 0.001, 0.001);
    free(x);
    free(dts);
    close_pair(p);
}

Test(cuda_recurrent, ssd_agrees_with_the_cpu, .timeout = 600)
{
    for (size_t i = 0; i < QV_ROWS(qv_ssd_shapes); i++)
        for (size_t j = 0; j < QV_ROWS(chunks); j++)
            check_ssd(&qv_ssd_shapes[i], chunks[j], j % 2 == 1);
}
