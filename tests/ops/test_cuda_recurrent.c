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
            qv_tensor t = in.t[side];
            qv_gdn_args args = {
                .q = qv_tensor_split(qv_tensor_cols(t, 0, hk * dk), hk, dk),
                .k = qv_tensor_split(qv_tensor_cols(t, hk * dk, hk * dk), hk, dk),
                .v = qv_tensor_split(qv_tensor_cols(t, 2 * hk * dk, hv * dv), hv, dv),
                .a = qv_tensor_cols(g.t[side], 0, hv),
                .b = qv_tensor_cols(g.t[side], hv, hv),
                .a_log = qv_tensor_1d(a_log.t[side].data, QV_F32, hv),
                .dt_bias = qv_tensor_1d(dt_bias.t[side].data, QV_F32, hv),
                .state = qv_tensor_4d(state.t[side].data, QV_F32, N_SLOTS, hv, dk, dv),
                .o = qv_tensor_split(out.t[side], hv, dv),
            };
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

/* --- The three of a mixer in one kernel ------------------------------------------------------- */

/* SSD: keys are B and C, values x. */
typedef struct {
    bool is_ssd;
    int64_t n_k_heads, n_v_heads, d_k, d_v, n_taps;
    int32_t n_seqs;
} mixer_shape;

static const mixer_shape mixers[] = {
    {false, 2, 4, 48, 64, 4, 4},   /* tiny-qwen3.5 */
    {false, 2, 4, 32, 48, 4, 70},  /* tiny-qwen3.5-moe */
    {false, 2, 2, 128, 128, 4, 3}, /* Qwen3.5-0.8B: a value head a key head */
    {false, 2, 4, 128, 128, 4, 3}, /* 4B, 35B: two */
    {false, 1, 3, 128, 128, 4, 2}, /* 27B */
    {false, 1, 4, 128, 128, 4, 2}, /* 122B */
    {false, 1, 3, 5, 7, 4, 4},     {false, 2, 2, 33, 80, 2, 4},   {false, 1, 1, 128, 40, 7, 4},
    {false, 1, 2, 24, 8, 1, 4},    {false, 1, 1, 256, 600, 4, 1}, /* as much as there is room for */
    {true, 2, 8, 32, 32, 4, 70},                                  /* tiny-nemotron3 */
    {true, 2, 16, 128, 64, 4, 3},                                 /* Nemotron-3 Nano */
    {true, 1, 16, 128, 64, 4, 2},                                 /* Super */
    {true, 1, 12, 128, 80, 4, 2}, /* Nano-4B: tiles of rows of two heads */
    {true, 4, 4, 128, 80, 4, 4},   {true, 1, 5, 128, 8, 4, 4}, /* of four */
    {true, 1, 3, 7, 5, 4, 4},      {true, 2, 2, 33, 67, 3, 4},
};

enum { FUSED, APART, N_WAYS }; /* qv_op_mixer, and its three ops */

/* What a mixer changes. */
typedef struct {
    both conv, state, mixed, out;
} mixer_memory;

typedef struct {
    pair *p;
    const mixer_shape *shape;
    int64_t n_channels, n_values, n_in, n_slots;
    both w, bias, a_log, dt_bias, skip, norm;
    mixer_memory memory[N_WAYS];
} mixer_test;

static qv_tensor vector_of(const both *b, int side)
{
    return qv_tensor_1d(b->t[side].data, QV_F32, b->t[side].shape[0] * b->t[side].shape[1]);
}

/* The op's arguments on one side, of the first n rows of `in`. */
typedef struct {
    qv_gdn_args gdn;
    qv_ssd_args ssd;
    qv_mixer_args mixer;
} mixer_call;

static void make_call(const mixer_test *t, int side, int way, const both *in, int64_t n,
                      mixer_call *out)
{
    const mixer_shape *s = t->shape;
    const mixer_memory *m = &t->memory[way];
    int64_t hk = s->n_k_heads, hv = s->n_v_heads, dk = s->d_k, dv = s->d_v, nv = hv * dv;
    int64_t keys = s->is_ssd ? nv : 0, values = s->is_ssd ? 0 : 2 * hk * dk;
    qv_tensor x = in->t[side], mixed = m->mixed.t[side], y = m->out.t[side];
    x.shape[0] = mixed.shape[0] = y.shape[0] = n;
    qv_tensor first = qv_tensor_split(qv_tensor_cols(mixed, keys, hk * dk), hk, dk);
    qv_tensor second = qv_tensor_split(qv_tensor_cols(mixed, keys + hk * dk, hk * dk), hk, dk);
    qv_tensor v = qv_tensor_split(qv_tensor_cols(mixed, values, nv), hv, dv);
    qv_tensor z = qv_tensor_cols(x, t->n_channels, nv);
    qv_tensor a = qv_tensor_cols(x, t->n_channels + nv, hv);
    qv_tensor b = qv_tensor_cols(x, t->n_channels + nv + hv, hv);
    int64_t rows = s->is_ssd ? hk : hv;
    void *state = m->state.t[side].data;
    out->gdn = (qv_gdn_args){.q = first,
                             .k = second,
                             .v = v,
                             .a = a,
                             .b = b,
                             .a_log = vector_of(&t->a_log, side),
                             .dt_bias = vector_of(&t->dt_bias, side),
                             .state = qv_tensor_4d(state, QV_F32, t->n_slots, hv, dk, dv),
                             .o = qv_tensor_split(y, hv, dv)};
    out->ssd = (qv_ssd_args){.x = v,
                             .b = first,
                             .c = second,
                             .dt = a,
                             .a_log = vector_of(&t->a_log, side),
                             .dt_bias = vector_of(&t->dt_bias, side),
                             .d_skip = vector_of(&t->skip, side),
                             .dt_min = 0.1f,
                             .dt_max = 2.0f,
                             .state = qv_tensor_4d(state, QV_F32, t->n_slots, hv, dv, dk),
                             .y = qv_tensor_split(y, hv, dv)};
    out->mixer = (qv_mixer_args){
        .x = qv_tensor_cols(x, 0, t->n_channels),
        .conv = t->w.t[side],
        .bias = s->is_ssd ? vector_of(&t->bias, side) : (qv_tensor){0},
        .conv_state = qv_tensor_3d(m->conv.t[side].data, m->conv.t[side].dtype, t->n_slots,
                                   t->n_channels, s->n_taps - 1),
        .mixed = mixed,
        .gdn = s->is_ssd ? NULL : &out->gdn,
        .ssd = s->is_ssd ? &out->ssd : NULL,
        .y = qv_tensor_split(y, rows, nv / rows),
        .z = qv_tensor_split(z, rows, nv / rows),
        .norm = vector_of(&t->norm, side),
        .eps = 1e-6f,
    };
    if (!s->is_ssd)
        out->mixer.norm.shape[0] = dv;
}

static void run_apart(qv_backend *be, const qv_batch *batch, const qv_mixer_args *m)
{
    PASS(qv_op_conv1d(be, batch, m->x, m->conv, m->bias, m->conv_state, m->mixed));
    if (m->gdn != NULL)
        PASS(qv_op_gdn(be, batch, m->gdn));
    else
        PASS(qv_op_ssd(be, batch, m->ssd));
    PASS(qv_op_gated_rms_norm(be, m->y, m->z, m->norm, m->eps, m->ssd != NULL, m->y));
}

static void expect_same(const mixer_test *t, const char *what, both x, both y, int64_t rows)
{
    x.t[GPU].shape[0] = y.t[GPU].shape[0] = rows;
    float *a = fetch(t->p, GPU, x.t[GPU]), *b = fetch(t->p, GPU, y.t[GPU]);
    int64_t n = x.t[GPU].shape[1];
    for (int64_t i = 0; i < rows * n; i++)
        cr_assert(
            memcmp(&a[i], &b[i], sizeof *a) == 0 || (isnan(a[i]) && isnan(b[i])),
            "%s of %s, %lld/%lld heads %lldx%lld: row %lld, number %lld is %.9g, by three ops "
            "%.9g",
            what, t->shape->is_ssd ? "ssd" : "gdn", (long long)t->shape->n_k_heads,
            (long long)t->shape->n_v_heads, (long long)t->shape->d_k, (long long)t->shape->d_v,
            (long long)(i / n), (long long)(i % n), (double)a[i], (double)b[i]);
    free(a);
    free(b);
}

/* A step of a token a sequence, a padded sequence and its token behind them on the device. All but
 * every third sequence go on from their state. */
static void mixer_step(mixer_test *t, qv_rng *rng, int32_t number)
{
    enum { MOST = 128 };
    int32_t n = t->shape->n_seqs, pos[MOST], start[MOST + 1], slot[MOST];
    pair *p = t->p;
    for (int32_t i = 0; i <= n; i++) {
        pos[i] = number > 1 && i % 3 == 1 ? 0 : number;
        start[i] = i;
        slot[i] = i < n ? (i * 5 + 3) % (int32_t)t->n_slots : -1;
    }
    start[n + 1] = n;
    const qv_batch host = {.max_seq_tokens = 1, .pos = pos, .seq_start = start, .state_slot = slot};
    both_memory on_pos = upload_both(p, pos, sizeof pos),
                on_start = upload_both(p, start, sizeof start);
    both_memory on_slot = upload_both(p, slot, sizeof slot);
    float *x = random_floats(rng, (n + 1) * t->n_in, 1);
    for (int64_t i = n * t->n_in; i < (n + 1) * t->n_in; i++)
        x[i] = NAN;
    both in = act_2d(p, x, n + 1, t->n_in);
    free(x);
    for (int way = 0; way < N_WAYS; way++) {
        t->memory[way].mixed = nan_act(p, n + 1, t->n_channels);
        t->memory[way].out = nan_act(p, n + 1, t->n_values);
    }
    for (int side = 0; side < 2; side++) {
        qv_batch batch = host;
        batch.n_seqs = batch.n_tokens = side == CPU ? n : n + 1;
        batch.pos = on_pos.at[side];
        batch.seq_start = on_start.at[side];
        batch.state_slot = on_slot.at[side];
        for (int way = 0; way < N_WAYS; way++) {
            mixer_call call;
            make_call(t, side, way, &in, batch.n_tokens, &call);
            if (way == FUSED)
                PASS(qv_op_mixer(p->be[side], &batch, &call.mixer));
            else
                run_apart(p->be[side], &batch, &call.mixer);
        }
    }
}

static void check_mixer(const mixer_shape *s)
{
    mixer_test t = {.p = open_pair_with(false, "recurrent"), .shape = s};
    pair *p = t.p;
    qv_rng rng = qv_rng_seed(4);
    t.n_values = s->n_v_heads * s->d_v;
    t.n_channels = 2 * s->n_k_heads * s->d_k + t.n_values;
    t.n_in = t.n_channels + t.n_values + 2 * s->n_v_heads;
    t.n_in = (t.n_in + 7) / 8 * 8;
    t.n_slots = s->n_seqs + 6;
    while (t.n_slots % 5 == 0)
        t.n_slots++;
    t.w = random_f32(p, &rng, t.n_channels, s->n_taps, 1);
    t.bias = random_f32(p, &rng, 1, t.n_channels, 1);
    t.a_log = random_f32(p, &rng, 1, s->n_v_heads, 1);
    t.dt_bias = random_f32(p, &rng, 1, s->n_v_heads, 1);
    t.skip = random_f32(p, &rng, 1, s->n_v_heads, 1);
    t.norm = random_f32(p, &rng, 1, t.n_values, 1);
    for (int way = 0; way < N_WAYS; way++) {
        t.memory[way].conv = nan_act(p, t.n_slots, t.n_channels * (s->n_taps - 1));
        t.memory[way].state = nan_f32(p, t.n_slots, t.n_values * s->d_k);
    }
    for (int32_t number = 0; number < 4; number++) {
        int mark = p->n_blocks;
        mixer_step(&t, &rng, number);
        mixer_memory *fused = &t.memory[FUSED], *apart = &t.memory[APART];
        expect_same(&t, "output", fused->out, apart->out, s->n_seqs);
        fused->out.t[CPU].shape[0] = fused->out.t[GPU].shape[0] = s->n_seqs;
        compare(p, "mixer", fused->out, CHUNKED);
        /* It is one kernel where the convolution's output has not been written. */
        float *mixed = fetch(p, GPU, fused->mixed.t[GPU]);
        if (strcmp(qv_backend_name(p->be[GPU]), "cuda") == 0)
            cr_assert(isnan(mixed[0]), "three ops, not one kernel");
        free(mixed);
        release_to(p, mark);
    }
    if (s->n_taps > 1) {
        expect_same(&t, "window", t.memory[FUSED].conv, t.memory[APART].conv, t.n_slots);
        compare(p, "mixer: window", t.memory[FUSED].conv, 0, 0);
    }
    expect_same(&t, "state", t.memory[FUSED].state, t.memory[APART].state, t.n_slots);
    compare(p, "mixer: state", t.memory[FUSED].state, 0.01, 0.01);
    close_pair(p);
}

Test(cuda_recurrent, a_mixer_in_one_kernel_gives_the_bits_of_its_three_ops, .timeout = 600)
{
    for (size_t i = 0; i < QV_ROWS(mixers); i++)
        check_mixer(&mixers[i]);
}
