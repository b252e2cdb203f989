/* Arithmetic "bf16": what every op stores is its float32 result rounded once, on any instruction
 * set and any number of threads; and what is to stay float32 stays so.
 */
#include "tests/ops/moe_test.h"

static qv_backend *open_bf16(const char *isa, int n_threads)
{
    qv_backend *be;
    qv_backend_options options = {
        .name = "cpu", .n_threads = n_threads, .isa = isa, .arithmetic = "bf16"};
    return qv_backend_open(&options, &be) == QV_OK ? be : NULL;
}

/* An instruction set's float32 backend on one thread and its bf16 backend on three. */
typedef struct {
    qv_backend *f32, *bf16;
} both;

#define FOR_BOTH(b)                                                                                \
    for (size_t isa_ = 0; isa_ < QV_ROWS(isas); isa_++)                                            \
        for (both b = {open_isa(isas[isa_], 1), open_bf16(isas[isa_], 3)}; b.f32;                  \
             qv_backend_close(b.f32), qv_backend_close(b.bf16), b.f32 = NULL)

/* Numbers that BF16 can hold. */
static float *activations(qv_rng *rng, int64_t n, float scale)
{
    float *x = random_floats(rng, n, scale);
    round_to_bf16(x, n);
    return x;
}

/* got is want rounded; frees both. */
static void check_rounded(const char *what, float *got, float *want, int64_t n)
{
    int64_t n_changed = 0;
    for (int64_t i = 0; i < n; i++)
        n_changed += qv_bf16_to_f32(qv_f32_to_bf16(want[i])) != want[i];
    cr_assert(n_changed > 0 || n < 10, "%s: nothing to round", what);
    round_to_bf16(want, n);
    check_same(what, got, want, n);
    free(got);
    free(want);
}

enum { T = 23, D = 70 };

/* --- The backend --------------------------------------------------------------------------------
 */

Test(bf16, is_an_option_of_the_backend)
{
    qv_backend *be = open_bf16("baseline", 1), *f32;
    cr_assert_str_eq(qv_backend_describe(be), "cpu, 1 thread, baseline, exact gemm, bf16");
    cr_assert_eq(qv_backend_lora_dtype(be), QV_BF16);
    cr_assert_eq(qv_backend_activation_dtype(be), QV_F32);
    qv_backend_close(be);
    PASS(qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = 1, .arithmetic = "f32"},
                         &f32));
    cr_assert_eq(qv_backend_lora_dtype(f32), QV_F32);
    cr_assert_null(strstr(qv_backend_describe(f32), "bf16"));
    qv_backend_close(f32);
    FAIL_WITH(QV_ERR_ARG, "arithmetic 'fp8'",
              qv_backend_open(&(qv_backend_options){.name = "cpu", .arithmetic = "fp8"}, &f32));
}

Test(bf16, rounds_to_nearest_even_and_keeps_what_is_no_number)
{
    static const struct {
        uint32_t from, to;
    } rows[] = {
        {0x3F800000, 0x3F800000}, {0x3F808000, 0x3F800000}, /* halfway, to even */
        {0x3F818000, 0x3F820000}, {0x3F808001, 0x3F810000}, {0x3F80FFFF, 0x3F810000},
        {0xBF818000, 0xBF820000}, {0x80000000, 0x80000000}, {0x00008000, 0x00000000},
        {0x00018000, 0x00020000}, {0x7F7FFFFF, 0x7F800000}, /* the largest becomes infinite */
        {0x7F7F7FFF, 0x7F7F0000}, {0x7F800000, 0x7F800000}, {0xFF800000, 0xFF800000},
        {0x7FC00000, 0x7FC00000}, {0x7F800001, 0x7FC00000}, {0xFFFFFFFF, 0xFFFF0000},
    };
    FOR_BOTH(b)
    for (size_t i = 0; i < QV_ROWS(rows); i++) {
        float y = qv_f32_from_bits(rows[i].from), open = 100; /* a gate that changes nothing */
        PASS(qv_op_sigmoid_gate(b.bf16, qv_tensor_3d(&y, QV_F32, 1, 1, 1),
                                qv_tensor_3d(&open, QV_F32, 1, 1, 1)));
        cr_assert_eq(qv_f32_bits(y), rows[i].to, "%08x became %08x, not %08x", rows[i].from,
                     qv_f32_bits(y), rows[i].to);
    }
}

/* --- Dense ops ----------------------------------------------------------------------------------
 */

Test(bf16, linear_rounds_and_linear_f32_and_the_embedding_do_not)
{
    FOR_BOTH(b)
    {
        qv_rng rng = qv_rng_seed(1);
        float *w = random_floats(&rng, 37 * D, 1), *x = activations(&rng, T * D, 1);
        float *y[3];
        for (int i = 0; i < 3; i++) {
            qv_backend *be = i == 0 ? b.f32 : b.bf16;
            qv_weight *weight;
            PASS(qv_weight_new(be, 37, D, QV_F32, &weight));
            PASS(qv_weight_load(be, weight, 0, 37, w, QV_F32, D));
            y[i] = filled_floats(T * 37, NAN);
            qv_tensor xt = qv_tensor_2d(x, QV_F32, T, D), yt = qv_tensor_2d(y[i], QV_F32, T, 37);
            PASS(i < 2 ? qv_op_linear(be, weight, xt, yt)
                       : qv_op_linear_f32(be, weight, xt, (qv_tensor){0}, yt));
            qv_weight_free(be, weight);
        }
        check_same("linear_f32", y[2], y[0], T * 37);
        check_rounded("linear", y[1], y[0], T * 37);
        free(y[2]);
        float *rows = filled_floats(T * D, NAN), *want = copied_floats(w, T * D);
        int32_t ids[T];
        for (int32_t i = 0; i < T; i++)
            ids[i] = i;
        PASS(qv_op_embed(b.bf16, qv_tensor_2d(w, QV_F32, 37, D), 0, ids,
                         qv_tensor_2d(rows, QV_F32, T, D)));
        check_same("embed", rows, want, T * D);
        free(rows);
        free(want);
        free(w);
        free(x);
    }
}

/* Which op of a row of numbers: y from x and z. */
typedef void row_op(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor gain, qv_tensor y);

static qv_tensor heads(qv_tensor t)
{
    return qv_tensor_split(t, 2, t.shape[1] / 2);
}

static void op_rms_norm(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor gain, qv_tensor y)
{
    (void)z;
    PASS(qv_op_rms_norm(be, x, gain, 1e-6f, true, y));
}

static void op_norm_gate(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor gain, qv_tensor y)
{
    qv_tensor half = qv_tensor_1d(gain.data, QV_F32, gain.shape[0] / 2);
    PASS(qv_op_gated_rms_norm(be, heads(x), heads(z), half, 1e-6f, false, heads(y)));
}

static void op_gate_norm(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor gain, qv_tensor y)
{
    PASS(qv_op_gated_rms_norm(be, heads(x), heads(z), gain, 1e-6f, true, heads(y)));
}

static void op_swiglu(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor gain, qv_tensor y)
{
    (void)gain;
    PASS(qv_op_swiglu(be, x, z, y));
}

static void op_relu2(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor gain, qv_tensor y)
{
    (void)z;
    (void)gain;
    PASS(qv_op_relu2(be, x, y));
}

static void copy_rows(qv_tensor x, qv_tensor y)
{
    memcpy(y.data, x.data, (size_t)qv_tensor_count(&x) * sizeof(float));
}

static void op_sigmoid_gate(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor gain, qv_tensor y)
{
    (void)gain;
    copy_rows(x, y);
    PASS(qv_op_sigmoid_gate(be, heads(y), heads(z)));
}

Test(bf16, ops_of_rows_round_once)
{
    static const struct {
        const char *name;
        row_op *op;
    } rows[] = {
        {"rms_norm", op_rms_norm},
        {"gated_rms_norm", op_norm_gate},
        {"gated_rms_norm, gate first", op_gate_norm},
        {"swiglu", op_swiglu},
        {"relu2", op_relu2},
        {"sigmoid_gate", op_sigmoid_gate},
    };
    FOR_BOTH(b)
    for (size_t i = 0; i < QV_ROWS(rows); i++) {
        qv_rng rng = qv_rng_seed(2);
        float *x = activations(&rng, T * D, 3), *z = activations(&rng, T * D, 3);
        float *gain = random_floats(&rng, D, 1);
        float *want = filled_floats(T * D, NAN), *y = filled_floats(T * D, NAN);
        qv_tensor xt = qv_tensor_2d(x, QV_F32, T, D), zt = qv_tensor_2d(z, QV_F32, T, D);
        qv_tensor gt = qv_tensor_1d(gain, QV_F32, D);
        rows[i].op(b.f32, xt, zt, gt, qv_tensor_2d(want, QV_F32, T, D));
        rows[i].op(b.bf16, xt, zt, gt, qv_tensor_2d(y, QV_F32, T, D));
        check_rounded(rows[i].name, y, want, T * D);
        free(x);
        free(z);
        free(gain);
    }
}

Test(bf16, the_stream_is_not_rounded)
{
    FOR_BOTH(b)
    {
        qv_rng rng = qv_rng_seed(3);
        float *x = random_floats(&rng, T * D, 3), *z = random_floats(&rng, T * D, 1);
        float *gate = activations(&rng, T, 1), *y[2];
        for (int i = 0; i < 2; i++) {
            qv_backend *be = i ? b.bf16 : b.f32;
            y[i] = copied_floats(x, T * D);
            qv_tensor yt = qv_tensor_2d(y[i], QV_F32, T, D);
            PASS(qv_op_add(be, yt, qv_tensor_2d(z, QV_F32, T, D), (qv_tensor){0}));
            PASS(
                qv_op_add(be, yt, qv_tensor_2d(z, QV_F32, T, D), qv_tensor_2d(gate, QV_F32, T, 1)));
        }
        check_same("add", y[1], y[0], T * D);
        free(x);
        free(z);
        free(gate);
        free(y[0]);
        free(y[1]);
    }
}

/* With a delta and without one, and the rest of y with and without being asked for. */
Test(bf16, add_rms_norm_rounds_y_and_keeps_what_that_takes_from_it)
{
    FOR_BOTH(b)
    for (int kind = 0; kind < 4; kind++) {
        qv_rng rng = qv_rng_seed(3);
        float *residual = random_floats(&rng, T * D, 3), *delta = random_floats(&rng, T * D, 1);
        float *gain = random_floats(&rng, D, 1), *sum = copied_floats(residual, T * D);
        float *y = filled_floats(T * D, NAN), *want = filled_floats(T * D, NAN);
        float *rest = filled_floats(T * D, NAN), *left = copied_floats(rest, T * D);
        qv_tensor none = {.data = NULL}, gt = qv_tensor_1d(gain, QV_F32, D);
        qv_tensor dt = kind & 1 ? qv_tensor_2d(delta, QV_F32, T, D) : none;
        qv_tensor lt = qv_tensor_2d(left, QV_F32, T, D);
        PASS(qv_op_add_rms_norm(b.f32, qv_tensor_2d(sum, QV_F32, T, D), dt, gt, 1e-6f, false,
                                qv_tensor_2d(want, QV_F32, T, D), lt));
        check_same("rest where nothing is rounded", left, rest, T * D);
        PASS(qv_op_add_rms_norm(b.bf16, qv_tensor_2d(residual, QV_F32, T, D), dt, gt, 1e-6f, false,
                                qv_tensor_2d(y, QV_F32, T, D),
                                kind & 2 ? qv_tensor_2d(rest, QV_F32, T, D) : none));
        check_same("residual", residual, sum, T * D);
        for (int64_t i = 0; i < T * D && kind & 2; i++)
            left[i] = want[i] - qv_bf16_to_f32(qv_f32_to_bf16(want[i]));
        round_to_bf16(left, T * D);
        check_same("rest", rest, left, T * D);
        check_rounded("y", y, want, T * D);
        free(residual);
        free(delta);
        free(gain);
        free(sum);
        free(rest);
        free(left);
    }
}

Test(bf16, linear_f32_reads_x_with_its_rest)
{
    FOR_BOTH(b)
    {
        qv_rng rng = qv_rng_seed(13);
        float *w = random_floats(&rng, 37 * D, 1), *x = random_floats(&rng, T * D, 1), *y[2];
        float *high = copied_floats(x, T * D), *rest = copied_floats(x, T * D);
        round_to_bf16(high, T * D);
        for (int64_t i = 0; i < T * D; i++)
            rest[i] -= high[i];
        round_to_bf16(rest, T * D);
        for (int64_t i = 0; i < T * D; i++)
            x[i] = high[i] + rest[i];
        for (int i = 0; i < 2; i++) {
            qv_backend *be = i ? b.bf16 : b.f32;
            qv_weight *weight;
            PASS(qv_weight_new(be, 37, D, QV_F32, &weight));
            PASS(qv_weight_load(be, weight, 0, 37, w, QV_F32, D));
            y[i] = filled_floats(T * 37, NAN);
            PASS(qv_op_linear_f32(be, weight, qv_tensor_2d(i ? high : x, QV_F32, T, D),
                                  i ? qv_tensor_2d(rest, QV_F32, T, D) : (qv_tensor){0},
                                  qv_tensor_2d(y[i], QV_F32, T, 37)));
            qv_weight_free(be, weight);
        }
        check_same("linear_f32", y[1], y[0], T * 37);
        free(w);
        free(x);
        free(high);
        free(rest);
        free(y[0]);
        free(y[1]);
    }
}

/* --- Sequences ----------------------------------------------------------------------------------
 */

enum { HEADS = 4, KV_HEADS = 2, HEAD = 16, PAGE = 8, N_PAGES = 6 };

static const int32_t seq_start[] = {0, 9, T}, state_slot[] = {2, 0}, tables[] = {4, 1, 0, 2};

static qv_batch two_sequences(int32_t *pos)
{
    for (int32_t t = 0; t < T; t++)
        pos[t] = t < 9 ? t : t - 9;
    return (qv_batch){.n_tokens = T,
                      .n_seqs = 2,
                      .pos = pos,
                      .seq_start = seq_start,
                      .page_table = tables,
                      .page_stride = 2,
                      .state_slot = state_slot};
}

Test(bf16, keys_and_values_are_rounded_in_their_pages)
{
    enum { PAGES_SIZE = N_PAGES * PAGE * KV_HEADS * HEAD };
    FOR_BOTH(b)
    {
        int32_t pos[T];
        qv_batch batch = two_sequences(pos);
        qv_rng rng = qv_rng_seed(4);
        float *q0 = activations(&rng, T * HEADS * HEAD, 2);
        float *k = activations(&rng, T * KV_HEADS * HEAD, 2);
        float *v = random_floats(&rng, T * KV_HEADS * HEAD, 1); /* not rounded, to see it done */
        float *q[2], *kp[2], *vp[2], *o[2];
        for (int i = 0; i < 2; i++) {
            qv_backend *be = i ? b.bf16 : b.f32;
            q[i] = copied_floats(q0, T * HEADS * HEAD);
            kp[i] = filled_floats(PAGES_SIZE, 0.1f); /* which BF16 cannot hold */
            vp[i] = filled_floats(PAGES_SIZE, 0.1f);
            o[i] = filled_floats(T * HEADS * HEAD, NAN);
            qv_kv_layer kv = {.k = qv_tensor_4d(kp[i], QV_F32, N_PAGES, PAGE, KV_HEADS, HEAD),
                              .v = qv_tensor_4d(vp[i], QV_F32, N_PAGES, PAGE, KV_HEADS, HEAD),
                              .page_tokens = PAGE};
            qv_tensor qt = qv_tensor_3d(q[i], QV_F32, T, HEADS, HEAD);
            PASS(qv_op_rope_kv_write(be, &batch, 8, 1e4, qt,
                                     qv_tensor_3d(k, QV_F32, T, KV_HEADS, HEAD),
                                     qv_tensor_3d(v, QV_F32, T, KV_HEADS, HEAD), &kv));
            if (i == 0) { /* from here on both see what the bf16 backend stored */
                round_to_bf16(q[0], T * HEADS * HEAD);
                for (int64_t x = 0; x < PAGES_SIZE; x++)
                    if (kp[0][x] != 0.1f || vp[0][x] != 0.1f) {
                        kp[0][x] = qv_bf16_to_f32(qv_f32_to_bf16(kp[0][x]));
                        vp[0][x] = qv_bf16_to_f32(qv_f32_to_bf16(vp[0][x]));
                    }
            }
            PASS(qv_op_attention(be, &batch, &kv, 0.25f, qt,
                                 qv_tensor_3d(o[i], QV_F32, T, HEADS, HEAD)));
        }
        check_same("q", q[1], q[0], T * HEADS * HEAD);
        check_same("keys", kp[1], kp[0], PAGES_SIZE);
        check_same("values", vp[1], vp[0], PAGES_SIZE);
        check_rounded("attention", o[1], o[0], T * HEADS * HEAD);
        for (int i = 0; i < 2; i++) {
            free(q[i]);
            free(kp[i]);
            free(vp[i]);
        }
        free(q0);
        free(k);
        free(v);
    }
}

Test(bf16, recurrent_state_stays_float32)
{
    enum { N_STATE = 3 * HEADS * HEAD * HEAD };
    FOR_BOTH(b)
    {
        int32_t pos[T];
        qv_batch batch = two_sequences(pos);
        qv_rng rng = qv_rng_seed(5);
        float *x = activations(&rng, T * HEADS * HEAD, 1), *gates = activations(&rng, T * HEADS, 2);
        float *head = random_floats(&rng, HEADS, 1);
        qv_tensor xt = qv_tensor_3d(x, QV_F32, T, HEADS, HEAD),
                  ht = qv_tensor_1d(head, QV_F32, HEADS);
        qv_tensor gt = qv_tensor_2d(gates, QV_F32, T, HEADS);
        for (int op = 0; op < 2; op++) {
            float *state[2], *y[2];
            for (int i = 0; i < 2; i++) {
                qv_backend *be = i ? b.bf16 : b.f32;
                state[i] = filled_floats(N_STATE, 0);
                y[i] = filled_floats(T * HEADS * HEAD, NAN);
                qv_tensor st = qv_tensor_4d(state[i], QV_F32, 3, HEADS, HEAD, HEAD);
                qv_tensor yt = qv_tensor_3d(y[i], QV_F32, T, HEADS, HEAD);
                if (op == 0)
                    PASS(qv_op_gdn(be, &batch,
                                   &(qv_gdn_args){.q = xt,
                                                  .k = xt,
                                                  .v = xt,
                                                  .a = gt,
                                                  .b = gt,
                                                  .a_log = ht,
                                                  .dt_bias = ht,
                                                  .state = st,
                                                  .o = yt}));
                else
                    PASS(qv_op_ssd(be, &batch,
                                   &(qv_ssd_args){.x = xt,
                                                  .b = xt,
                                                  .c = xt,
                                                  .dt = gt,
                                                  .a_log = ht,
                                                  .dt_bias = ht,
                                                  .d_skip = ht,
                                                  .dt_max = INFINITY,
                                                  .state = st,
                                                  .y = yt}));
            }
            check_same("state", state[1], state[0], N_STATE);
            check_rounded(op ? "ssd" : "gdn", y[1], y[0], T * HEADS * HEAD);
            free(state[0]);
            free(state[1]);
        }
        free(x);
        free(gates);
        free(head);
    }
}

Test(bf16, a_convolution_keeps_its_inputs_as_they_came)
{
    FOR_BOTH(b)
    {
        int32_t pos[T];
        qv_batch batch = two_sequences(pos);
        qv_rng rng = qv_rng_seed(6);
        float *x = activations(&rng, T * D, 1), *w = random_floats(&rng, D * 4, 1), *state[2],
              *y[2];
        for (int i = 0; i < 2; i++) {
            state[i] = filled_floats(3 * D * 3, 0);
            y[i] = filled_floats(T * D, NAN);
            PASS(qv_op_conv1d(i ? b.bf16 : b.f32, &batch, qv_tensor_2d(x, QV_F32, T, D),
                              qv_tensor_2d(w, QV_F32, D, 4), (qv_tensor){0},
                              qv_tensor_3d(state[i], QV_F32, 3, D, 3),
                              qv_tensor_2d(y[i], QV_F32, T, D)));
        }
        check_same("state", state[1], state[0], 3 * D * 3);
        check_rounded("conv1d", y[1], y[0], T * D);
        free(x);
        free(w);
        free(state[0]);
        free(state[1]);
    }
}

/* --- Adapters -----------------------------------------------------------------------------------
 */

Test(bf16, lora_rounds_the_sum_once_and_leaves_other_rows_alone)
{
    enum { R = 8, OUT = 37 };
    static const int64_t starts[] = {0, OUT};
    static const int32_t seg_start_[] = {0, 5, 12, 18, T}, seg_slot_[] = {-1, 0, 1, 0};
    FOR_BOTH(b)
    {
        qv_rng rng = qv_rng_seed(7);
        float *a = random_floats(&rng, 2 * R * D, 1), *bb = random_floats(&rng, 2 * OUT * R, 1);
        uint16_t *a16 = to_bf16(a, 2 * R * D), *b16 = to_bf16(bb, 2 * OUT * R);
        float *x = activations(&rng, T * D, 1), *y0 = random_floats(&rng, T * OUT, 1), *y[4];
        float *scratch = filled_floats(T * R, NAN);
        qv_lora_slice slices[] = {{.rank = 5, .scale = 0.7f}, {.rank = 5, .scale = 1}};
        static const uint8_t active[] = {1, 0};
        qv_lora_site site = {.n_in = D,
                             .n_out = OUT,
                             .n_slices = 1,
                             .n_slots = 2,
                             .max_rank = R,
                             .slice_start = starts,
                             .slices = slices,
                             .slot_active = active,
                             .a = qv_tensor_4d(a16, QV_BF16, 2, 1, R, D),
                             .b = qv_tensor_3d(b16, QV_BF16, 2, R, OUT)};
        qv_embed_lora_slot slot = {.a = a16, .b = b16, .max_rank = R, .rank = 5, .scale = 0.7f};
        qv_embed_lora_site embed = {.n_vocab = D,
                                    .n_out = OUT,
                                    .n_slots = 2,
                                    .max_rank = R,
                                    .dtype = QV_BF16,
                                    .slots = &slot,
                                    .slot_active = active};
        int32_t ids[T];
        for (int32_t t = 0; t < T; t++)
            ids[t] = 3 * t;
        for (int i = 0; i < 4; i++) {
            qv_tensor xt = qv_tensor_2d(x, QV_F32, T, D),
                      st = qv_tensor_3d(scratch, QV_F32, T, 1, R);
            y[i] = copied_floats(y0, T * OUT);
            qv_tensor yt = qv_tensor_2d(y[i], QV_F32, T, OUT);
            if (i < 2)
                PASS(qv_op_lora(i ? b.bf16 : b.f32, &site, 4, seg_start_, seg_slot_, xt, st, yt));
            else
                PASS(qv_op_embed_lora(i == 3 ? b.bf16 : b.f32, &embed, 4, seg_start_, seg_slot_,
                                      ids, yt));
        }
        float *f32 = copied_floats(y0, T * OUT);
        PASS(qv_op_lora_f32(b.bf16, &site, 4, seg_start_, seg_slot_, qv_tensor_2d(x, QV_F32, T, D),
                            qv_tensor_3d(scratch, QV_F32, T, 1, R),
                            qv_tensor_2d(f32, QV_F32, T, OUT)));
        check_same("lora_f32", f32, y[0], T * OUT);
        check_same("embed_lora", y[3], y[2], T * OUT);
        round_to_bf16(y[0] + 5 * OUT, 7 * OUT); /* the segments of slot 0 */
        round_to_bf16(y[0] + 18 * OUT, (T - 18) * OUT);
        check_same("lora", y[1], y[0], T * OUT);
        for (int i = 0; i < 4; i++)
            free(y[i]);
        free(f32);
        free(a);
        free(bb);
        free(a16);
        free(b16);
        free(x);
        free(y0);
        free(scratch);
    }
}

/* --- Experts ------------------------------------------------------------------------------------
 */

typedef struct {
    float *logits, *weights, *h, *o, *y, *stream;
    int32_t ids[T * 4];
} moe_result;

/* A layer of one projection and its weighted sum, with an adapter that shares B in slot 0 and one
 * that does not in slot 1. What an op reads is rounded, so that both backends see the same. */
static void run_experts(qv_backend *be, const qv_moe_shape *s, bool round_between, moe_result *r)
{
    enum { R = 4, SLOTS = 2 };
    static const int32_t start[] = {0, 5, 12, T}, slot_of[] = {-1, 0, 1};
    static const uint8_t active[] = {1, 1};
    qv_rng rng = qv_rng_seed(8);
    int64_t k = s->top_k, n_pairs = T * k, d = s->d;
    float *x = activations(&rng, T * d, 1), *w = random_floats(&rng, s->n_experts * d * d, 0.2f);
    float *a = random_floats(&rng, s->n_experts * R * d, 0.2f);
    float *b = random_floats(&rng, s->n_experts * d * R, 1);
    uint16_t *a16 = to_bf16(a, s->n_experts * R * d), *b16 = to_bf16(b, s->n_experts * d * R);
    qv_lora_slice *slices = must(calloc((size_t)s->n_experts, sizeof *slices));
    for (int32_t e = 0; e < s->n_experts; e++)
        slices[e] = (qv_lora_slice){.rank = 3, .scale = 0.7f};
    qv_moe_lora_slot slots[SLOTS];
    for (int i = 0; i < SLOTS; i++)
        slots[i] = (qv_moe_lora_slot){
            .a = a16, .b = b16, .slices = slices, .max_rank = R, .b_shared = i == 0};
    int64_t slice_start[] = {0, d};
    qv_moe_lora_site site = {.n_in = d,
                             .n_out = d,
                             .n_experts = s->n_experts,
                             .n_slices = 1,
                             .n_slots = SLOTS,
                             .max_rank = R,
                             .dtype = QV_BF16,
                             .slice_start = slice_start,
                             .slots = slots,
                             .slot_active = active};
    float *scratch = filled_floats(n_pairs * R, NAN), *pairs = filled_floats(n_pairs * d, NAN);
    qv_tensor st = qv_tensor_3d(scratch, QV_F32, n_pairs, 1, R);
    qv_tensor pt = qv_tensor_2d(pairs, QV_F32, n_pairs, d);
    qv_weight *gate, *experts = load_experts(be, w, s->n_experts, d, d, QV_BF16);
    PASS(qv_weight_new(be, s->n_experts, d, QV_F32, &gate));
    PASS(qv_weight_load(be, gate, 0, s->n_experts, w, QV_F32, d));

    r->logits = filled_floats(T * s->n_experts, NAN);
    r->weights = filled_floats(n_pairs, NAN);
    r->y = filled_floats(T * d, NAN);
    qv_tensor lt = qv_tensor_2d(r->logits, QV_F32, T, s->n_experts);
    qv_tensor wt = qv_tensor_2d(r->weights, QV_F32, T, k), xt = qv_tensor_2d(x, QV_F32, T, d);
    qv_router router = {.kind = QV_ROUTER_SIGMOID,
                        .top_k = s->top_k,
                        .normalize = true,
                        .scale = 2.5f,
                        .n_groups = 1,
                        .topk_groups = 1};
    PASS(qv_op_linear_f32(be, gate, xt, (qv_tensor){0}, lt));
    PASS(qv_op_router(be, &router, lt, qv_tensor_2d(r->ids, QV_I32, T, k), wt));
    test_list l = new_list(s->n_experts, s->top_k, T);
    route(be, &l.list, r->ids, T, 3, start, slot_of);
    PASS(qv_op_moe_linear(be, experts, &l.list, xt, QV_MOE_TOKENS, pt));
    r->h = copied_floats(pairs, n_pairs * d);
    if (round_between)
        round_to_bf16(pairs, n_pairs * d);
    float *rows = copied_floats(pairs, n_pairs * d); /* the down-projection's input */
    PASS(qv_op_moe_lora(be, &site, &l.list, qv_tensor_2d(rows, QV_F32, n_pairs, d), QV_MOE_PAIRS,
                        st, pt));
    r->o = copied_floats(pairs, n_pairs * d);
    if (round_between)
        round_to_bf16(pairs, n_pairs * d);
    r->stream = filled_floats(T * d, NAN);
    float *left = copied_floats(scratch, n_pairs * R); /* which the sum uses up */
    PASS(qv_op_moe_combine_f32(be, &l.list, wt, pt, &site,
                               qv_tensor_3d(left, QV_F32, n_pairs, 1, R), xt,
                               qv_tensor_cols(xt, 0, 1), qv_tensor_2d(r->stream, QV_F32, T, d)));
    PASS(qv_op_moe_combine(be, &l.list, wt, pt, &site, st, qv_tensor_2d(r->y, QV_F32, T, d)));

    void *mine[] = {left, x, w, a, b, a16, b16, slices, scratch, pairs, rows, l.memory};
    for (size_t i = 0; i < QV_ROWS(mine); i++)
        free(mine[i]);
    qv_weight_free(be, gate);
    qv_weight_free(be, experts);
}

Test(bf16, experts_round_what_they_store_and_routing_stays_float32)
{
    FOR_BOTH(b)
    for (size_t i = 0; i < 2; i++) {
        const qv_moe_shape *s = &qv_moe_shapes[i];
        int64_t n_pairs = T * s->top_k;
        moe_result f32, bf16;
        run_experts(b.f32, s, true, &f32);
        run_experts(b.bf16, s, false, &bf16);
        check_same("logits", bf16.logits, f32.logits, T * s->n_experts);
        check_same("weights", bf16.weights, f32.weights, n_pairs);
        cr_assert_eq(memcmp(bf16.ids, f32.ids, (size_t)n_pairs * sizeof *f32.ids), 0);
        check_rounded("moe_linear", bf16.h, f32.h, n_pairs * s->d);
        check_rounded("moe_lora", bf16.o, f32.o, n_pairs * s->d);
        check_same("moe_combine_f32", bf16.stream, f32.stream, T * s->d);
        check_rounded("moe_combine", bf16.y, f32.y, T * s->d);
        free(f32.stream);
        free(bf16.stream);
        free(f32.logits);
        free(f32.weights);
        free(bf16.logits);
        free(bf16.weights);
    }
}
