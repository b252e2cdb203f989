/* Layers with a state on CUDA: with `deterministic`, a token's bits do not depend on how sequences
 * are cut into steps, nor on whether others go along. And always, counts of a batch are bounds.
 */
#include "tests/ops/pair.h"
#include "tests/ops/steps.h"

/* One sequence alone is the second of steps.h, which is longer than two chunks. */
static const int32_t cuts[] = {1, 2, 3, 5, 7, 64, 65, 1000};
enum { REFERENCE = 1, LONGEST = 1, MAX_CUT = 1000 };

typedef enum { CONV, GDN, SSD } layer;

/* A layer over all tokens of all sequences: rows [n_all, d], of which the last `n_gates` numbers
 * are gates; results [n_all, d_out]. */
typedef struct {
    layer kind;
    int64_t heads[2], size[2]; /* of keys and of values: GDN d_k, d_v; SSD n_state, d */
    int64_t n_channels, n_taps;
    int64_t d, n_gates, d_out, n_state;
    float *x;
    both w, bias, a_log, skip;
} rig;

static rig new_rig(pair *p, layer kind, int64_t hk, int64_t hv, int64_t dk, int64_t dv)
{
    qv_rng rng = qv_rng_seed(41);
    rig r = {.kind = kind, .heads = {hk, hv}, .size = {dk, dv}, .n_channels = hk, .n_taps = hv};
    r.n_gates = kind == GDN ? 2 * hv : kind == SSD ? hv : 0;
    r.d_out = kind == CONV ? hk : hv * dv;
    r.d = kind == CONV ? hk : 2 * hk * dk + hv * dv + r.n_gates;
    r.n_state = kind == CONV ? hk * (hv - 1) : hv * dk * dv;
    r.x = random_floats(&rng, n_all() * r.d, 1.5f);
    r.w = random_f32(p, &rng, r.n_channels, kind == CONV ? hv : 1, 1);
    r.bias = random_f32(p, &rng, 1, kind == CONV ? hk : hv, 1);
    r.a_log = random_f32(p, &rng, 1, hv, 1);
    r.skip = random_f32(p, &rng, 1, hv, 1);
    return r;
}

/* The op over rows `in` of a batch on the device. */
static void run_op(pair *p, const rig *r, const qv_batch *batch, qv_tensor in, qv_tensor state,
                   qv_tensor out)
{
    qv_backend *be = p->be[GPU];
    int64_t hk = r->heads[0], hv = r->heads[1], dk = r->size[0], dv = r->size[1];
    int64_t n_key = hk * dk, n_value = hv * dv;
    if (r->kind == CONV) {
        PASS(qv_op_conv1d(be, batch, in, r->w.t[GPU],
                          qv_tensor_1d(r->bias.t[GPU].data, QV_F32, r->n_channels),
                          qv_tensor_3d(state.data, state.dtype, N_SLOTS, hk, hv - 1), out));
        return;
    }
    qv_tensor k = qv_tensor_split(qv_tensor_cols(in, 0, n_key), hk, dk);
    qv_tensor q = qv_tensor_split(qv_tensor_cols(in, n_key, n_key), hk, dk);
    qv_tensor v = qv_tensor_split(qv_tensor_cols(in, 2 * n_key, n_value), hv, dv);
    qv_tensor a = qv_tensor_cols(in, 2 * n_key + n_value, hv);
    qv_tensor a_log = qv_tensor_1d(r->a_log.t[GPU].data, QV_F32, hv);
    qv_tensor dt_bias = qv_tensor_1d(r->bias.t[GPU].data, QV_F32, hv);
    if (r->kind == GDN)
        PASS(
            qv_op_gdn(be, batch,
                      &(qv_gdn_args){.q = q,
                                     .k = k,
                                     .v = v,
                                     .a = a,
                                     .b = qv_tensor_cols(in, 2 * n_key + n_value + hv, hv),
                                     .a_log = a_log,
                                     .dt_bias = dt_bias,
                                     .state = qv_tensor_4d(state.data, QV_F32, N_SLOTS, hv, dk, dv),
                                     .o = qv_tensor_split(out, hv, dv)}));
    else
        PASS(
            qv_op_ssd(be, batch,
                      &(qv_ssd_args){.x = v,
                                     .b = k,
                                     .c = q,
                                     .dt = a,
                                     .a_log = a_log,
                                     .dt_bias = dt_bias,
                                     .d_skip = qv_tensor_1d(r->skip.t[GPU].data, QV_F32, hv),
                                     .dt_min = 0.05f,
                                     .dt_max = 4,
                                     .state = qv_tensor_4d(state.data, QV_F32, N_SLOTS, hv, dv, dk),
                                     .y = qv_tensor_split(out, hv, dv)}));
}

static void upload_batch(pair *p, const qv_batch *b, qv_batch *out)
{
    *out = *b;
    out->pos = upload_both(p, b->pos, (size_t)b->n_tokens * 4).at[GPU];
    out->seq_start = upload_both(p, b->seq_start, (size_t)(b->n_seqs + 1) * 4).at[GPU];
    out->state_slot = upload_both(p, b->state_slot, (size_t)b->n_seqs * 4).at[GPU];
}

static both new_state(pair *p, const rig *r)
{
    return r->kind == CONV ? nan_act(p, N_SLOTS, r->n_state) : nan_f32(p, N_SLOTS, r->n_state);
}

/* Results [n_all, d_out] and then the states of all slots, in steps of up to `cut` tokens of each
 * sequence, or of the longest alone; owned. */
static float *run_cut(pair *p, const rig *r, int32_t cut, bool alone)
{
    int mark = p->n_blocks;
    float *all = filled_floats(n_all() * r->d_out + N_SLOTS * r->n_state, 0);
    both state = new_state(p, r);
    int32_t done[MAX_SEQS] = {0}, n;
    for (int i = 0; alone && i < MAX_SEQS; i++)
        done[i] = i == LONGEST ? 0 : lengths[i];
    for (step s; (n = next_step(&s, done, cut)) > 0;) {
        int before = p->n_blocks;
        qv_batch batch;
        upload_batch(p, &s.batch, &batch);
        float *rows = must(malloc((size_t)(n * r->d) * sizeof *rows));
        take_rows(rows, r->x, s.from, n, r->d);
        both in = act_2d(p, rows, n, r->d), out = nan_act(p, n, r->d_out);
        run_op(p, r, &batch, in.t[GPU], state.t[GPU], out.t[GPU]);
        float *results = fetch(p, GPU, out.t[GPU]);
        put_rows(all, results, s.from, n, r->d_out);
        free(results);
        free(rows);
        release_to(p, before);
    }
    float *states = fetch(p, GPU, state.t[GPU]);
    memcpy(all + n_all() * r->d_out, states, (size_t)(N_SLOTS * r->n_state) * sizeof *all);
    free(states);
    release_to(p, mark);
    return all;
}

static void check_cuts(layer kind, int64_t hk, int64_t hv, int64_t dk, int64_t dv)
{
    static const char *const names[] = {"conv1d", "gdn", "ssd"};
    pair *p = open_pair_as(true);
    rig r = new_rig(p, kind, hk, hv, dk, dv);
    float *want = run_cut(p, &r, REFERENCE, false);
    for (size_t i = 0; i < QV_ROWS(cuts); i++)
        for (int alone = 0; alone < 2; alone++) {
            char what[128];
            float *got = run_cut(p, &r, cuts[i], alone);
            int64_t first = alone ? lengths[0] : 0, n = alone ? lengths[LONGEST] : n_all();
            int64_t slot = slots[LONGEST], in_states = n_all() * r.d_out + slot * r.n_state;
            snprintf(what, sizeof what, "%s of %lld, %lld heads %lldx%lld, steps of %d%s",
                     names[kind], (long long)hk, (long long)hv, (long long)dk, (long long)dv,
                     cuts[i], alone ? ", alone" : "");
            for (int64_t k = 0; k < n * r.d_out; k++)
                cr_assert(isfinite(got[first * r.d_out + k]), "%s: not finite", what);
            check_same(what, got + first * r.d_out, want + first * r.d_out, n * r.d_out);
            check_same(what, got + in_states, want + in_states, r.n_state);
            free(got);
        }
    free(want);
    free(r.x);
    close_pair(p);
}

Test(cuda_cuts, conv1d_has_the_same_bits_however_it_is_cut, .timeout = 600)
{
    for (size_t i = 0; i < QV_ROWS(qv_conv_shapes); i++)
        check_cuts(CONV, qv_conv_shapes[i].n_channels, qv_conv_shapes[i].n_taps, 1, 1);
}

Test(cuda_cuts, gdn_has_the_same_bits_however_it_is_cut, .timeout = 600)
{
    for (size_t i = 0; i < QV_ROWS(qv_gdn_shapes); i++)
        check_cuts(GDN, qv_gdn_shapes[i].n_k_heads, qv_gdn_shapes[i].n_v_heads,
                   qv_gdn_shapes[i].d_k, qv_gdn_shapes[i].d_v);
}

Test(cuda_cuts, ssd_has_the_same_bits_however_it_is_cut, .timeout = 600)
{
    for (size_t i = 0; i < QV_ROWS(qv_ssd_shapes); i++)
        check_cuts(SSD, qv_ssd_shapes[i].n_groups, qv_ssd_shapes[i].n_heads,
                   qv_ssd_shapes[i].n_state, qv_ssd_shapes[i].d);
}

/* --- Counts are bounds -------------------------------------------------------------------- */

/* One sequence of 3 tokens in a step for 9, as a padded one may be: it was left out where the
 * counts allowed chunks and the sequence was too short for them. */
static void check_padding(layer kind, int64_t hk, int64_t hv, int64_t dk, int64_t dv)
{
    enum { REAL = 3, PADDED = 9 };
    static const int32_t pos[PADDED] = {0, 1, 2}, start[] = {0, REAL}, slot[] = {2};
    pair *p = open_pair();
    rig r = new_rig(p, kind, hk, hv, dk, dv);
    float *got[2], *states[2];
    for (int padded = 0; padded < 2; padded++) {
        int32_t n = padded ? PADDED : REAL;
        qv_batch host = {.n_tokens = n,
                         .n_seqs = 1,
                         .pos = pos,
                         .seq_start = start,
                         .state_slot = slot,
                         .max_seq_tokens = padded ? 0 : REAL},
                 batch;
        upload_batch(p, &host, &batch);
        both in = act_2d(p, r.x, n, r.d), out = nan_act(p, n, r.d_out), state = new_state(p, &r);
        run_op(p, &r, &batch, in.t[GPU], state.t[GPU], out.t[GPU]);
        got[padded] = fetch(p, GPU, out.t[GPU]);
        states[padded] = fetch(p, GPU, qv_tensor_rows(state.t[GPU], slot[0], 1));
    }
    check_same("padded", got[1], got[0], REAL * r.d_out);
    check_same("padded, state", states[1], states[0], r.n_state);
    for (int i = 0; i < 2; i++) {
        free(got[i]);
        free(states[i]);
    }
    free(r.x);
    close_pair(p);
}

Test(cuda_cuts, a_sequence_shorter_than_its_step_is_not_left_out)
{
    check_padding(GDN, 4, 8, 128, 128);
    check_padding(GDN, 2, 4, 48, 64);
    check_padding(SSD, 2, 16, 128, 64);
    check_padding(CONV, 448, 4, 1, 1);
}
