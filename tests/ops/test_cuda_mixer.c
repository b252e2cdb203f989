/* A recurrent layer between its two products on CUDA: in one op and in three the bits are the same,
 * and both agree with the CPU. Sequences of one token each, new ones and others that go on, with
 * states that are not in their order, and steps that are padded.
 */
#include "tests/ops/pair.h"

typedef struct {
    bool ssd;
    int64_t n_k, n_v, d_k, d_v; /* SSD: groups, heads, n_state, d */
    int32_t n_seqs, n_padded;   /* sequences, and what the counts say */
    bool one_launch;            /* on a device of 9.0 */
} mixer_case;

static const mixer_case cases[] = {
    {false, 2, 4, 48, 64, 3, 3, false},    /* tiny-qwen3.5 */
    {false, 16, 32, 128, 128, 1, 1, true}, /* Qwen3.5-4B and 35B-A3B */
    {false, 16, 16, 128, 128, 2, 4, true}, /* 0.8B and 2B */
    {false, 2, 6, 128, 128, 3, 3, true},   /* 27B, of two ranks less */
    {false, 2, 8, 128, 128, 3, 8, true},   /* 397B-A17B */
    {false, 2, 4, 128, 128, 5, 8, true},   /* several ranks */
    {false, 2, 4, 128, 128, 41, 48, true}, /* many sequences */
    {false, 1, 1, 128, 128, 41, 41, true}, {false, 1, 3, 128, 128, 33, 36, true},
    {false, 1, 4, 128, 128, 33, 36, true}, {true, 2, 8, 32, 32, 3, 3, false}, /* tiny-nemotron3 */
    {true, 8, 64, 128, 64, 1, 1, true},                                       /* Nemotron-3 Nano */
    {true, 2, 16, 128, 64, 5, 8, true},    {true, 1, 8, 128, 64, 41, 48, true},
    {true, 2, 24, 128, 80, 2, 2, false}, /* Nano-4B */
    {true, 2, 32, 128, 64, 2, 2, false}, /* Super */
};

enum { N_STEPS = 3, MAX_SEQS = 64, MAX_SLOTS = MAX_SEQS + 7 };

/* Weights and states of a layer; a second state of the device for the three ops. */
typedef struct {
    const mixer_case *c;
    int64_t n_key, n_value, n_conv, n_in, n_slots;
    both w, bias, a_log, dt_bias, skip, norm;
    both conv[2], state[2];
} rig;

static rig new_rig(pair *p, const mixer_case *c)
{
    qv_rng rng = qv_rng_seed(71);
    rig r = {.c = c, .n_key = c->n_k * c->d_k, .n_value = c->n_v * c->d_v};
    r.n_conv = 2 * r.n_key + r.n_value;
    r.n_in = r.n_conv + r.n_value + (c->ssd ? 1 : 2) * c->n_v;
    r.n_slots = c->n_padded + 7;
    r.w = random_f32(p, &rng, r.n_conv, 4, 1);
    r.bias = random_f32(p, &rng, 1, r.n_conv, 1);
    r.a_log = random_f32(p, &rng, 1, c->n_v, 1);
    r.dt_bias = random_f32(p, &rng, 1, c->n_v, 1);
    r.skip = random_f32(p, &rng, 1, c->n_v, 1);
    r.norm = random_f32(p, &rng, 1, c->ssd ? r.n_value : c->d_v, 1);
    float *conv = random_floats(&rng, r.n_slots * r.n_conv * 3, 1);
    float *state = random_floats(&rng, r.n_slots * c->n_v * c->d_k * c->d_v, 0.3f);
    for (int i = 0; i < 2; i++) {
        r.conv[i] = act_2d(p, conv, r.n_slots, r.n_conv * 3);
        r.state[i] = f32_2d(p, state, r.n_slots, c->n_v * c->d_k * c->d_v);
    }
    free(conv);
    free(state);
    return r;
}

static qv_tensor vec(both b, int side)
{
    return qv_tensor_1d(b.t[side].data, QV_F32, b.t[side].shape[1]);
}

typedef struct {
    qv_around around;
    qv_gdn_args gdn;
    qv_ssd_args ssd;
} args;

/* Of rows `in` of one side, and its state number `which`. */
static args args_of(const rig *r, int side, int which, qv_tensor in, qv_tensor mixed, qv_tensor out)
{
    const mixer_case *c = r->c;
    int64_t n_key = r->n_key, n_value = r->n_value, n_v = c->n_v;
    int64_t n_groups = c->ssd ? c->n_k : n_v, first = c->ssd ? n_value : 0;
    qv_tensor conv = r->conv[which].t[side], heads = qv_tensor_split(out, n_v, c->d_v);
    void *state = r->state[which].t[side].data;
    qv_tensor gates = qv_tensor_cols(in, r->n_conv + n_value, r->n_in - r->n_conv - n_value);
    args a = {.around = {.x = qv_tensor_cols(in, first, r->n_conv),
                         .mixed = mixed,
                         .w = r->w.t[side],
                         .bias = c->ssd ? vec(r->bias, side) : (qv_tensor){0},
                         .state = qv_tensor_3d(conv.data, conv.dtype, r->n_slots, r->n_conv, 3),
                         .groups = qv_tensor_split(out, n_groups, n_value / n_groups),
                         .z = qv_tensor_split(qv_tensor_cols(in, c->ssd ? 0 : r->n_conv, n_value),
                                              n_groups, n_value / n_groups),
                         .norm = vec(r->norm, side),
                         .eps = 1e-6f}};
    if (c->ssd)
        a.ssd = (qv_ssd_args){
            .x = qv_tensor_split(qv_tensor_cols(mixed, 0, n_value), n_v, c->d_v),
            .b = qv_tensor_split(qv_tensor_cols(mixed, n_value, n_key), c->n_k, c->d_k),
            .c = qv_tensor_split(qv_tensor_cols(mixed, n_value + n_key, n_key), c->n_k, c->d_k),
            .dt = gates,
            .a_log = vec(r->a_log, side),
            .dt_bias = vec(r->dt_bias, side),
            .d_skip = vec(r->skip, side),
            .dt_min = 0.05f,
            .dt_max = 4,
            .state = qv_tensor_4d(state, QV_F32, r->n_slots, n_v, c->d_v, c->d_k),
            .y = heads};
    else
        a.gdn = (qv_gdn_args){
            .q = qv_tensor_split(qv_tensor_cols(mixed, 0, n_key), c->n_k, c->d_k),
            .k = qv_tensor_split(qv_tensor_cols(mixed, n_key, n_key), c->n_k, c->d_k),
            .v = qv_tensor_split(qv_tensor_cols(mixed, 2 * n_key, n_value), n_v, c->d_v),
            .a = qv_tensor_cols(gates, 0, n_v),
            .b = qv_tensor_cols(gates, n_v, n_v),
            .a_log = vec(r->a_log, side),
            .dt_bias = vec(r->dt_bias, side),
            .state = qv_tensor_4d(state, QV_F32, r->n_slots, n_v, c->d_k, c->d_v),
            .o = heads};
    return a;
}

static void in_one_op(const rig *r, qv_backend *be, const qv_batch *batch, const args *a)
{
    PASS(r->c->ssd ? qv_op_conv_ssd_norm(be, batch, &a->around, &a->ssd)
                   : qv_op_conv_gdn_norm(be, batch, &a->around, &a->gdn));
}

static void in_three_ops(const rig *r, qv_backend *be, const qv_batch *batch, const args *a)
{
    const qv_around *s = &a->around;
    PASS(qv_op_conv1d(be, batch, s->x, s->w, s->bias, s->state, s->mixed));
    PASS(r->c->ssd ? qv_op_ssd(be, batch, &a->ssd) : qv_op_gdn(be, batch, &a->gdn));
    PASS(qv_op_gated_rms_norm(be, s->groups, s->z, s->norm, s->eps, r->c->ssd, s->groups));
}

static void check_takes(const rig *r, pair *p, const qv_batch *batch, const args *a)
{
#ifdef QV_WITH_CUDA
    if (is_hopper(p))
        cr_assert_eq(r->c->ssd
                         ? qv_cuda_takes_conv_ssd_norm(p->be[GPU], batch, &a->around, &a->ssd)
                         : qv_cuda_takes_conv_gdn_norm(p->be[GPU], batch, &a->around, &a->gdn),
                     r->c->one_launch);
#else
    (void)r, (void)p, (void)batch, (void)a;
#endif
}

/* The arrays of a step on both sides: every third sequence begins anew in its own step, and in the
 * last step sequence 1 has no token. Rows behind `*n_tokens` are padding. */
static void make_batch(pair *p, const rig *r, int step, qv_batch *out, int32_t *n_tokens)
{
    int32_t pos[MAX_SEQS] = {0}, start[MAX_SEQS + 1] = {0}, slot[MAX_SEQS] = {0}, n = 0;
    int32_t n_padded = r->c->n_padded;
    for (int i = 0; i < n_padded; i++) {
        bool there = i < r->c->n_seqs && !(step == N_STEPS - 1 && i == 1);
        slot[i] = i < r->c->n_seqs ? (int32_t)r->n_slots - 1 - (i ^ 1) - (i > 1 ? 3 : 0) : -1;
        if (there)
            pos[n++] = i % 3 == step ? 0 : 9;
        start[i + 1] = n;
    }
    both_memory at_pos = upload_both(p, pos, sizeof pos),
                at_slot = upload_both(p, slot, sizeof slot);
    both_memory at_start = upload_both(p, start, sizeof start);
    for (int side = 0; side < 2; side++)
        out[side] = (qv_batch){.n_tokens = n_padded,
                               .n_seqs = n_padded,
                               .max_seq_tokens = 1,
                               .pos = at_pos.at[side],
                               .seq_start = at_start.at[side],
                               .state_slot = at_slot.at[side]};
    *n_tokens = n;
}

static void check_bits(pair *p, const char *what, qv_tensor one, qv_tensor three)
{
    float *got = fetch(p, GPU, one), *want = fetch(p, GPU, three);
    check_same(what, got, want, one.shape[0] * one.shape[1]);
    free(got);
    free(want);
}

static both rows(both b, int32_t n)
{
    return (both){{qv_tensor_rows(b.t[CPU], 0, n), qv_tensor_rows(b.t[GPU], 0, n)}};
}

static void check_case(const mixer_case *c)
{
    pair *p = open_pair();
    rig r = new_rig(p, c);
    qv_rng rng = qv_rng_seed(72);
    char what[128];
    snprintf(what, sizeof what, "%s of %lld/%lld heads %lldx%lld, %d of %d sequences",
             c->ssd ? "ssd" : "gdn", (long long)c->n_k, (long long)c->n_v, (long long)c->d_k,
             (long long)c->d_v, c->n_seqs, c->n_padded);
    for (int step = 0; step < N_STEPS; step++) {
        int mark = p->n_blocks;
        int32_t n_padded = c->n_padded, n;
        qv_batch batch[2];
        make_batch(p, &r, step, batch, &n);
        both in = random_act(p, &rng, n_padded, (r.n_in + 7) / 8 * 8, 2),
             mixed = nan_act(p, n_padded, r.n_conv);
        both one = nan_act(p, n_padded, r.n_value), three = nan_act(p, n_padded, r.n_value);
        for (int side = 0; side < 2; side++) {
            args a = args_of(&r, side, 0, in.t[side], mixed.t[side], one.t[side]);
            if (side == GPU)
                check_takes(&r, p, &batch[GPU], &a);
            in_one_op(&r, p->be[side], &batch[side], &a);
        }
        args a = args_of(&r, GPU, 1, in.t[GPU], mixed.t[GPU], three.t[GPU]);
        in_three_ops(&r, p->be[GPU], &batch[GPU], &a);
        check_bits(p, what, qv_tensor_rows(one.t[GPU], 0, n), qv_tensor_rows(three.t[GPU], 0, n));
        compare(p, what, rows(one, n), 0.016, 0.03);
        release_to(p, mark);
    }
    check_bits(p, what, r.conv[0].t[GPU], r.conv[1].t[GPU]);
    check_bits(p, what, r.state[0].t[GPU], r.state[1].t[GPU]);
    compare(p, what, r.conv[0], 0, 0);
    compare(p, what, r.state[0], 0.005, 0.005);
    close_pair(p);
}

Test(cuda_mixer, one_op_has_the_bits_of_three, .timeout = 600)
{
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_case(&cases[i]);
}
