/* qv_op_linear on the device: every path of it against the CPU. */
#include "tests/ops/cuda_test.h"

#ifdef QV_WITH_CUDA
#include "ops/cuda/cuda.h"
#endif

/* Beyond the shared table: rows of whole vectors, and some layers of released models, cut down. */
static const qv_linear_shape more_shapes[] = {
    {"skinny, one block", 16, 32}, {"rows end in a tile", 41, 64},
    {"k ends in a step", 64, 160}, {"in_proj", 1024, 2560},
    {"down", 320, 9216},           {"router", 256, 2048},
    {"k in eights", 48, 200},
};

static const int64_t all_counts[] = {1, 3, 8, 9, 16, 17, 33, 64, 65, 130};

static qv_weight *new_weight(duo *d, qv_backend *be, const float *values, const qv_linear_shape *s,
                             qv_dtype dtype)
{
    (void)d;
    qv_weight *w;
    PASS(qv_weight_new(be, s->n_out, s->n_in, dtype, &w));
    PASS(qv_weight_load(be, w, 0, s->n_out, values, QV_F32, s->n_in));
    return w;
}

static void check_counts(duo *d, const qv_linear_shape *s, qv_dtype dtype, const int64_t *counts,
                         size_t n)
{
    float *values = random_floats(&d->rng, s->n_out * s->n_in, 1);
    if (dtype == QV_BF16)
        round_to_bf16(values, s->n_out * s->n_in);
    qv_weight *cpu = new_weight(d, d->cpu, values, s, dtype);
    qv_weight *dev = new_weight(d, d->dev, values, s, dtype);
    bool few = is_emulated(d->dev) && s->n_out * s->n_in > 1 << 18;
    for (size_t i = 0; i < n; i += few ? 3 : 1)
        for (int64_t pad = few ? 8 : 0; pad <= 8; pad += 8) {
            char what[128];
            snprintf(what, sizeof what, "%s, %s weights, %lld tokens, rows %lld apart", s->name,
                     qv_dtype_name(dtype), (long long)counts[i], (long long)(2 * pad));
            twin xw = wide_twin(d, counts[i], s->n_in, pad, 1), x = cols_of(xw, pad, s->n_in);
            twin yw = wide_twin(d, counts[i], s->n_out, pad, 1), y = cols_of(yw, pad, s->n_out);
            PASS(qv_op_linear(d->cpu, cpu, x.cpu, y.cpu));
            PASS(qv_op_linear(d->dev, dev, x.dev, y.dev));
            check_twin(d, what, &yw, CLOSE_RELATIVE, CLOSE_ULPS, CLOSE_NOISE);
            twin logits = NEW_TWIN(d, QV_F32, counts[i], s->n_out);
            poison_twin(d, &logits);
            twin rw = wide_twin(d, counts[i], s->n_in, pad, 1.0f / 512);
            twin rest = cols_of(rw, pad, s->n_in), none = {.n = 0};
            for (int with = 0; with < 2; with++) { /* the rest, which is used up */
                twin r = with ? rest : none;
                PASS(qv_op_linear_f32(d->cpu, cpu, x.cpu, r.cpu, logits.cpu));
                PASS(qv_op_linear_f32(d->dev, dev, x.dev, r.dev, logits.dev));
                check_twin(d, what, &logits, 1e-5, 0.01, 1e-5);
            }
            free_twin(d, &rw);
            free_twin(d, &xw);
            free_twin(d, &yw);
            free_twin(d, &logits);
        }
    qv_weight_free(d->cpu, cpu);
    qv_weight_free(d->dev, dev);
    free(values);
}

static void check_shape(duo *d, const qv_linear_shape *s, qv_dtype dtype)
{
    check_counts(d, s, dtype, all_counts, QV_ROWS(all_counts));
}

/* y += x W^T in one op, or refused and y left alone. */
static void check_add(duo *d, const qv_linear_shape *s, int64_t n_tokens, bool expected)
{
    char what[128];
    snprintf(what, sizeof what, "%s, %lld tokens added", s->name, (long long)n_tokens);
    float *values = random_floats(&d->rng, s->n_out * s->n_in, 1);
    round_to_bf16(values, s->n_out * s->n_in);
    qv_weight *cpu = new_weight(d, d->cpu, values, s, QV_BF16);
    qv_weight *dev = new_weight(d, d->dev, values, s, QV_BF16);
    twin x = wide_twin(d, n_tokens, s->n_in, 0, 1);
    twin y = NEW_TWIN(d, QV_F32, n_tokens, s->n_out),
         delta = NEW_TWIN(d, QV_F32, n_tokens, s->n_out);
    fill_twin(d, &y, 1);
    poison_twin(d, &delta);
    bool done;
    PASS(qv_op_linear_add(d->cpu, cpu, x.cpu, y.cpu, &done));
    cr_assert(!done, "%s: the CPU adds", what);
    PASS(qv_op_linear_add(d->dev, dev, x.dev, y.dev, &done));
    cr_assert_eq(done, expected, "%s: %s", what, done ? "it does" : "it does not");
    if (done) {
        PASS(qv_op_linear_f32(d->cpu, cpu, x.cpu, (qv_tensor){.data = NULL}, delta.cpu));
        PASS(qv_op_add(d->cpu, y.cpu, delta.cpu, (qv_tensor){.data = NULL}));
    }
    check_twin(d, what, &y, done ? 1e-5 : 0, done ? 0.01 : 0, done ? 1e-5 : 0);
    free_twin(d, &x), free_twin(d, &y), free_twin(d, &delta);
    qv_weight_free(d->cpu, cpu);
    qv_weight_free(d->dev, dev);
    free(values);
}

/* Devices with a kernel for one token. */
static bool has_one(const duo *d)
{
#ifdef QV_WITH_CUDA
    return qv_cuda(d->dev)->major == 9;
#else
    (void)d;
    return false;
#endif
}

Test(cuda_linear, a_product_of_prefill_or_of_one_token_can_add_to_its_y)
{
    static const qv_linear_shape shapes[] = {
        {"out", 256, 512}, {"odd rows", 41, 64}, {"a gate", 1, 64}};
    duo d = open_duo(9);
    for (size_t i = 0; i < QV_ROWS(shapes); i++) {
        check_add(&d, &shapes[i], 1, i < 2 && has_one(&d));
        check_add(&d, &shapes[i], 2, false);
        check_add(&d, &shapes[i], 64, false);
        check_add(&d, &shapes[i], 300, i == 0);
    }
    close_duo(&d);
}

Test(cuda_linear, agrees_with_the_cpu_on_every_shape)
{
    duo d = open_duo(1);
    for (size_t i = 0; i < QV_ROWS(qv_linear_shapes); i++)
        check_shape(&d, &qv_linear_shapes[i], QV_BF16);
    for (size_t i = 0; i < QV_ROWS(more_shapes); i++)
        check_shape(&d, &more_shapes[i], QV_BF16);
    check_shape(&d, &more_shapes[5], QV_F32);
    close_duo(&d);
}

/* An emulated device of another kind; on one that is there, no difference. */
static void check_few_tokens(const char *capability)
{
    static const int64_t counts[] = {1, 8};
    setenv("QV_EMULATE_CAPABILITY", capability, 1);
    duo d = open_duo(1);
    for (size_t i = 0; i < QV_ROWS(qv_linear_shapes); i++)
        check_counts(&d, &qv_linear_shapes[i], QV_BF16, counts, QV_ROWS(counts));
    check_counts(&d, &more_shapes[5], QV_BF16, counts, QV_ROWS(counts));
    close_duo(&d);
}

Test(cuda_linear, agrees_with_the_cpu_on_devices_before_clusters)
{
    check_few_tokens("8.0");
}

Test(cuda_linear, agrees_with_the_cpu_on_later_devices_which_run_the_code_of_earlier_ones)
{
    check_few_tokens("10.0");
}

/* --- The kernel for decode ----------------------------------------------------------------- */

#ifdef QV_WITH_CUDA
/* Rows that end in a tile, with steps of k that the blocks of a cluster cannot share evenly. */
static void check_forms(duo *d, qv_weight *const w[2], const qv_linear_shape *s, int64_t n)
{
    int n_forms;
    const qv_k_decode_form *forms = qv_k_decode_forms(&n_forms);
    twin xw = wide_twin(d, n, s->n_in, 8, 1), x = cols_of(xw, 8, s->n_in);
    twin yw = wide_twin(d, n, s->n_out, 3, 0), y = cols_of(yw, 3, s->n_out);
    PASS(qv_op_linear(d->cpu, w[0], x.cpu, y.cpu));
    for (int form = 1; form <= n_forms; form++)
        for (int shares = 1; shares <= 8; shares += shares < 3 ? 1 : 5) {
            char what[128];
            snprintf(what, sizeof what, "%s, %lld tokens, %d stages, %d shares", s->name,
                     (long long)n, forms[form - 1].stages, shares);
            if (forms[form - 1].tokens < n)
                break;
            qv_cuda(d->dev)->decode_tuning = (qv_k_decode_tuning){form, shares};
            PASS(qv_backend_zero(d->dev, yw.dev.data, (size_t)yw.n * sizeof(uint16_t)));
            PASS(qv_op_linear(d->dev, w[1], x.dev, y.dev));
            check_twin(d, what, &yw, CLOSE_RELATIVE, CLOSE_ULPS, CLOSE_NOISE);
        }
    free_twin(d, &xw);
    free_twin(d, &yw);
}

Test(cuda_linear, every_form_for_decode_agrees_with_the_cpu, .timeout = 600)
{
    static const qv_linear_shape shapes[] = {{"rows end in a tile", 200, 1112}, {"few", 24, 200}};
    static const int64_t counts[] = {9, 31, 50, 64};
    duo d = open_duo(4);
    for (size_t i = 0; i < QV_ROWS(shapes); i++) {
        const qv_linear_shape *s = &shapes[i];
        float *values = random_floats(&d.rng, s->n_out * s->n_in, 1);
        round_to_bf16(values, s->n_out * s->n_in);
        qv_weight *const w[2] = {new_weight(&d, d.cpu, values, s, QV_BF16),
                                 new_weight(&d, d.dev, values, s, QV_BF16)};
        for (size_t j = 0; j < QV_ROWS(counts); j++)
            check_forms(&d, w, s, counts[j]);
        qv_weight_free(d.cpu, w[0]);
        qv_weight_free(d.dev, w[1]);
        free(values);
    }
    close_duo(&d);
}

/* Whether a product is decode's on 9.0, of so many rows and tokens. */
Test(cuda_linear, nine_to_32_tokens_are_decodes_where_the_matrix_is_neither_wide_nor_small)
{
    duo d = open_duo(5);
    qv_cuda_backend *cuda = qv_cuda(d.dev);
    qv_weight *w;
    PASS(qv_weight_new(d.dev, 64, 64, QV_BF16, &w));
    for (int64_t n = 8; n <= 65; n++)
        for (int shape = 0; shape < 4; shape++) {
            static const int64_t rows[] = {12352, 18432, 32768, 1024},
                                 of[] = {2560, 2560, 2560, 2048};
            twin x = NEW_TWIN(&d, QV_BF16, n, 64), y = NEW_TWIN(&d, QV_BF16, n, 64);
            qv_k_linear_args c = qv_cuda_linear_args(w, x.dev, (qv_tensor){0}, y.dev);
            c.n_out = rows[shape];
            c.n_in = of[shape];
            for (int form = -1; form < 2; form++) {
                bool in_use = n > 8 && n <= 32 && shape < 2, there = n <= 64 && cuda->major == 9;
                cuda->decode_tuning.form = form;
                cr_expect_eq(
                    qv_cuda_decodes(cuda, &c, NULL), there && (form > 0 || (form == 0 && in_use)),
                    "%lld tokens, %lld rows, form %d", (long long)n, (long long)c.n_out, form);
            }
            free_twin(&d, &x);
            free_twin(&d, &y);
        }
    qv_weight_free(d.dev, w);
    close_duo(&d);
}
#endif

Test(cuda_linear, gives_a_token_the_same_bits_whatever_is_beside_it_while_few)
{
    duo d = open_duo(2);
    const qv_linear_shape s = {"in_proj", 1024, 2560};
    float *values = random_floats(&d.rng, s.n_out * s.n_in, 1);
    qv_weight *w = new_weight(&d, d.dev, values, &s, QV_BF16);
    twin x = NEW_TWIN(&d, QV_BF16, 8, s.n_in), y = NEW_TWIN(&d, QV_BF16, 8, s.n_out);
    fill_twin(&d, &x, 1);
    PASS(qv_op_linear(d.dev, w, x.dev, y.dev));
    float *all = fetch(&d, &y.dev);
    for (int64_t i = 0; i < 8; i += 3) {
        PASS(qv_op_linear(d.dev, w, qv_tensor_rows(x.dev, i, 1), qv_tensor_rows(y.dev, 0, 1)));
        qv_tensor first = qv_tensor_rows(y.dev, 0, 1);
        float *alone = fetch(&d, &first);
        check_same("linear", alone, all + i * s.n_out, s.n_out);
        free(alone);
    }
    free(all);
    free(values);
    qv_weight_free(d.dev, w);
    free_twin(&d, &x);
    free_twin(&d, &y);
    close_duo(&d);
}

/* --- Products of one input ---------------------------------------------------------------- */

typedef struct {
    int64_t n_out;
    bool f32, rest;
    qv_act act;
} joined_part;

/* Where they can be joined. */
typedef enum { ANYWHERE, ON_HOPPER, NOWHERE } joined_where;

/* n_out 0 ends the list. Cut down from released models where a product is large. */
static const struct {
    const char *name;
    int64_t n_in;
    joined_where where;
    joined_part parts[QV_MAX_LINEAR_PARTS];
} joined_cases[] = {
    {"35B: shared expert, gate, router",
     2048,
     ANYWHERE,
     {{512, false, false, QV_ACT_SWIGLU},
      {1, false, false, QV_ACT_NONE},
      {256, true, true, QV_ACT_NONE}}},
    {"Nano: shared expert, router",
     896,
     ANYWHERE,
     {{1240, false, false, QV_ACT_RELU2}, {128, true, true, QV_ACT_NONE}}},
    {"Super: shared expert, router, latent",
     1024,
     ANYWHERE,
     {{1344, false, false, QV_ACT_RELU2},
      {512, true, true, QV_ACT_NONE},
      {256, false, false, QV_ACT_NONE}}},
    {"dense", 640, ANYWHERE, {{2080, false, false, QV_ACT_SWIGLU}}},
    {"groups of three sizes",
     1024,
     ANYWHERE,
     {{64, false, false, QV_ACT_NONE},
      {16, true, true, QV_ACT_NONE},
      {6400, true, false, QV_ACT_NONE}}},
    {"rows end in a tile",
     160,
     ANYWHERE,
     {{82, false, false, QV_ACT_SWIGLU},
      {41, true, true, QV_ACT_NONE},
      {3, true, false, QV_ACT_NONE},
      {37, false, false, QV_ACT_RELU2}}},
    {"rows that nothing is a multiple of",
     200,
     ON_HOPPER,
     {{90, false, false, QV_ACT_SWIGLU}, {30, false, false, QV_ACT_NONE}}},
    {"a router that cannot be joined",
     200,
     NOWHERE,
     {{48, false, false, QV_ACT_SWIGLU}, {48, true, true, QV_ACT_NONE}}},
    {"a gate that cannot be joined",
     129,
     NOWHERE,
     {{10, false, false, QV_ACT_RELU2}, {1, false, false, QV_ACT_NONE}}},
};

enum { MOST_JOINED = 8 }; /* tokens */

static joined_where where_is(const duo *d)
{
    return has_one(d) ? ON_HOPPER : ANYWHERE;
}

/* Whether they are joined. One token has a kernel that takes rows of any number of vectors. */
static bool are_joined(const duo *d, size_t index, int64_t n)
{
    if (n == 1 && has_one(d))
        return joined_cases[index].n_in % 8 == 0;
    return n <= MOST_JOINED && joined_cases[index].where <= where_is(d);
}

/* Both forms on the device, to the bit but for one token, whose sums depend on what else there is;
 * and the joined one against the CPU. */
static void check_joined(duo *d, size_t index, int64_t n, int64_t pad)
{
    int64_t n_in = joined_cases[index].n_in;
    qv_linear_part cpu[QV_MAX_LINEAR_PARTS], dev[QV_MAX_LINEAR_PARTS], one[QV_MAX_LINEAR_PARTS];
    qv_weight *w[2][QV_MAX_LINEAR_PARTS];
    twin xw = wide_twin(d, n, n_in, pad, 1), x = cols_of(xw, pad, n_in);
    twin rest = NEW_TWIN(d, QV_BF16, n, n_in), y[QV_MAX_LINEAR_PARTS], alone[QV_MAX_LINEAR_PARTS],
         wide[QV_MAX_LINEAR_PARTS];
    int32_t n_parts = 0;
    fill_twin(d, &rest, 1.0f / 512);
    for (; n_parts < QV_MAX_LINEAR_PARTS; n_parts++) {
        const joined_part *p = &joined_cases[index].parts[n_parts];
        if (p->n_out == 0)
            break;
        const qv_linear_shape shape = {"", p->n_out, n_in};
        int64_t width = p->act == QV_ACT_SWIGLU ? p->n_out / 2 : p->n_out;
        float *values = random_floats(&d->rng, p->n_out * n_in, 2 / sqrtf((float)n_in));
        round_to_bf16(values, p->n_out * n_in);
        w[0][n_parts] = new_weight(d, d->cpu, values, &shape, QV_BF16);
        w[1][n_parts] = new_weight(d, d->dev, values, &shape, QV_BF16);
        free(values);
        y[n_parts] = NEW_TWIN(d, p->f32 ? QV_F32 : QV_BF16, n, width + pad);
        alone[n_parts] = NEW_TWIN(d, p->f32 ? QV_F32 : QV_BF16, n, width + pad);
        wide[n_parts] = NEW_TWIN(d, QV_BF16, n, p->n_out);
        poison_twin(d, &y[n_parts]);
        poison_twin(d, &alone[n_parts]);
        poison_twin(d, &wide[n_parts]);
        qv_linear_part part = {.f32 = p->f32, .act = p->act};
        cpu[n_parts] = dev[n_parts] = one[n_parts] = part;
        cpu[n_parts].w = w[0][n_parts];
        dev[n_parts].w = one[n_parts].w = w[1][n_parts];
        cpu[n_parts].y = qv_tensor_cols(y[n_parts].cpu, 0, width);
        dev[n_parts].y = qv_tensor_cols(y[n_parts].dev, 0, width);
        one[n_parts].y = qv_tensor_cols(alone[n_parts].dev, 0, width);
        cpu[n_parts].wide = wide[n_parts].cpu;
        dev[n_parts].wide = one[n_parts].wide = wide[n_parts].dev;
        if (p->rest) {
            cpu[n_parts].rest = rest.cpu;
            dev[n_parts].rest = one[n_parts].rest = rest.dev;
        }
    }
    PASS(qv_op_linears(d->dev, x.dev, n_parts, dev));
    /* They were one launch where what is in front of an activation has not been written. */
    for (int32_t i = 0; i < n_parts; i++) {
        float *between = fetch(d, &wide[i].dev);
        bool joined = isnan(between[0]);
        bool want = are_joined(d, index, n);
        cr_assert(dev[i].act == QV_ACT_NONE || joined == want, "%s, %lld tokens: %s",
                  joined_cases[index].name, (long long)n, joined ? "joined" : "not joined");
        free(between);
    }
    for (int32_t i = 0; i < n_parts; i++) {
        qv_linear_part *p = &one[i];
        int64_t f = p->y.shape[1];
        qv_tensor to = p->act == QV_ACT_NONE ? p->y : p->wide;
        PASS(p->f32 ? qv_op_linear_f32(d->dev, p->w, x.dev, p->rest, to)
                    : qv_op_linear(d->dev, p->w, x.dev, to));
        if (p->act == QV_ACT_SWIGLU)
            PASS(qv_op_swiglu(d->dev, qv_tensor_cols(to, 0, f), qv_tensor_cols(to, f, f), p->y));
        else if (p->act == QV_ACT_RELU2)
            PASS(qv_op_relu2(d->dev, to, p->y));
    }
    PASS(qv_op_linears(d->cpu, x.cpu, n_parts, cpu));
    for (int32_t i = 0; i < n_parts; i++) {
        char what[128];
        snprintf(what, sizeof what, "%s, part %d, %lld tokens, %lld apart",
                 joined_cases[index].name, i, (long long)n, (long long)pad);
        float *got = fetch(d, &y[i].dev), *want = fetch(d, &alone[i].dev);
        if (n > 1 || !has_one(d) || (n_parts == 1 && !dev[i].rest.data))
            check_same(what, got, want, n * (dev[i].y.shape[1] + pad));
        free(got);
        free(want);
        twin part = {.cpu = cpu[i].y, .dev = dev[i].y};
        if (dev[i].f32)
            check_twin(d, what, &part, 1e-5, 0.01, 1e-5);
        else
            check_twin(d, what, &part, 2 * CLOSE_RELATIVE, 2 * CLOSE_ULPS, 2 * CLOSE_NOISE);
        free_twin(d, &y[i]);
        free_twin(d, &alone[i]);
        free_twin(d, &wide[i]);
        qv_weight_free(d->cpu, w[0][i]);
        qv_weight_free(d->dev, w[1][i]);
    }
    free_twin(d, &rest);
    free_twin(d, &xw);
}

Test(cuda_linear, products_of_one_input_are_joined_on_devices_before_dependent_launches)
{
    setenv("QV_EMULATE_CAPABILITY", "8.0", 1);
    duo d = open_duo(3);
    for (size_t i = 0; i < QV_ROWS(joined_cases); i++)
        check_joined(&d, i, 3, 0);
    close_duo(&d);
}

Test(cuda_linear, products_of_one_input_are_the_same_bits_together_as_alone)
{
    static const int64_t n_tokens[] = {1, 3, 8, 9};
    duo d = open_duo(3);
    for (size_t i = 0; i < QV_ROWS(joined_cases); i++)
        for (size_t j = 0; j < QV_ROWS(n_tokens); j++)
            check_joined(&d, i, n_tokens[j], j % 2 == 0 ? 8 : 0);
    close_duo(&d);
}

/* --- Behind a norm -------------------------------------------------------------------------- */

/* x and products of it as by two ops: x to the bit. In one where nobody has written the rest. */
static void check_norm(duo *d, size_t index, int64_t n, bool plus_one)
{
    int64_t n_in = joined_cases[index].n_in;
    const joined_part *parts = joined_cases[index].parts;
    twin residual = NEW_TWIN(d, QV_F32, n, n_in), w = NEW_TWIN(d, QV_F32, n_in);
    twin x = NEW_TWIN(d, QV_BF16, n, n_in), rest = NEW_TWIN(d, QV_BF16, n, n_in);
    twin alone = NEW_TWIN(d, QV_BF16, n, n_in), y[QV_MAX_LINEAR_PARTS], wide[QV_MAX_LINEAR_PARTS];
    qv_weight *of[2][QV_MAX_LINEAR_PARTS];
    qv_linear_part list[2][QV_MAX_LINEAR_PARTS];
    int32_t n_parts = 0;
    fill_twin(d, &residual, 3);
    fill_twin(d, &w, 1);
    poison_twin(d, &rest);
    for (; n_parts < QV_MAX_LINEAR_PARTS && parts[n_parts].n_out > 0; n_parts++) {
        const joined_part *p = &parts[n_parts];
        const qv_linear_shape shape = {"", p->n_out, n_in};
        int64_t width = p->act == QV_ACT_SWIGLU ? p->n_out / 2 : p->n_out;
        float *values = random_floats(&d->rng, p->n_out * n_in, 2 / sqrtf((float)n_in));
        round_to_bf16(values, p->n_out * n_in);
        y[n_parts] = NEW_TWIN(d, p->f32 ? QV_F32 : QV_BF16, n, width);
        wide[n_parts] = NEW_TWIN(d, QV_BF16, n, p->n_out);
        poison_twin(d, &y[n_parts]);
        for (int side = 0; side < 2; side++) {
            of[side][n_parts] = new_weight(d, side ? d->dev : d->cpu, values, &shape, QV_BF16);
            list[side][n_parts] = (qv_linear_part){
                .w = of[side][n_parts],
                .f32 = p->f32,
                .act = p->act,
                .rest = p->rest ? (side ? rest.dev : rest.cpu) : (qv_tensor){.data = NULL},
                .wide = side ? wide[n_parts].dev : wide[n_parts].cpu,
                .y = side ? y[n_parts].dev : y[n_parts].cpu};
        }
        free(values);
    }
    const qv_tensor none = {.data = NULL};
    const qv_stream_norm on_cpu = {residual.cpu, w.cpu, 1e-6f, plus_one, x.cpu, rest.cpu},
                         on_dev = {residual.dev, w.dev, 1e-6f, plus_one, x.dev, rest.dev};
    PASS(qv_op_norm_linears(d->cpu, &on_cpu, n_parts, list[0]));
    PASS(qv_op_norm_linears(d->dev, &on_dev, n_parts, list[1]));
    PASS(qv_op_add_rms_norm(d->dev, residual.dev, none, w.dev, 1e-6f, plus_one, alone.dev, none));
    char what[128];
    snprintf(what, sizeof what, "%s behind a norm, %lld tokens", joined_cases[index].name,
             (long long)n);
    float *got = fetch(d, &x.dev), *want = fetch(d, &alone.dev), *left = fetch(d, &rest.dev);
    check_same(what, got, want, n * n_in);
    bool in_one = n == 1 && has_one(d) && n_in % 8 == 0;
    cr_assert_eq(isnan(left[0]), in_one, "%s: %s", what, in_one ? "not in one" : "in one");
    free(got), free(want), free(left);
    for (int32_t i = 0; i < n_parts; i++) {
        if (parts[i].f32)
            check_twin(d, what, &y[i], 1e-5, 0.01, 1e-5);
        else
            check_twin(d, what, &y[i], 2 * CLOSE_RELATIVE, 2 * CLOSE_ULPS, 2 * CLOSE_NOISE);
        free_twin(d, &y[i]), free_twin(d, &wide[i]);
        qv_weight_free(d->cpu, of[0][i]);
        qv_weight_free(d->dev, of[1][i]);
    }
    free_twin(d, &residual), free_twin(d, &w), free_twin(d, &x);
    free_twin(d, &rest), free_twin(d, &alone);
}

Test(cuda_linear, products_behind_a_norm_have_its_bits_in_their_input)
{
    duo d = open_duo(4);
    for (size_t i = 0; i < QV_ROWS(joined_cases); i++)
        for (int64_t n = 1; n < 3; n++)
            check_norm(&d, i, n, i % 2 == 0);
    check_norm(&d, 0, 260, true); /* of a prompt, the gate with the norm */
    close_duo(&d);
}
