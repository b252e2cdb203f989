/* With `deterministic`, a token gets the same bits in any company, op by op: it is computed alone
 * and then in steps with others, other adapters and other experts beside it, in the middle and at
 * either end. What is watched is one row; its own numbers come from a seed of their own.
 *
 * Attention, products with adapters and recurrent layers: test_cuda_attention.c,
 * test_cuda_linear_lora.c, test_cuda_cuts.c.
 */
#include "tests/ops/moe_pair.h"

/* Beyond what few tokens take, what one block takes, and what a router's first kernel takes. */
static const int32_t sizes[] = {1, 3, 17, 64, 200, 600};

/* --- Company ------------------------------------------------------------------------------ */

/* Rows [n, d] of which `place` follows from `seed` alone; owned. */
static float *company(uint64_t seed, int32_t n, int32_t place, int64_t d, float scale)
{
    qv_rng others = qv_rng_seed(1000 * seed + (uint64_t)n), own = qv_rng_seed(seed);
    float *x = random_floats(&others, n * d, scale), *row = random_floats(&own, d, scale);
    memcpy(x + place * d, row, (size_t)d * sizeof *row);
    free(row);
    return x;
}

static both company_act(pair *p, uint64_t seed, int32_t n, int32_t place, int64_t d, float scale)
{
    float *x = company(seed, n, place, d, scale);
    both b = act_2d(p, x, n, d);
    free(x);
    return b;
}

static both company_f32(pair *p, uint64_t seed, int32_t n, int32_t place, int64_t d, float scale)
{
    float *x = company(seed, n, place, d, scale);
    both b = f32_2d(p, x, n, d);
    free(x);
    return b;
}

/* A row of the device; owned. */
static float *row_of(pair *p, qv_tensor t, int64_t row)
{
    return fetch(p, GPU, qv_tensor_rows(t, row, 1));
}

/* The op over n tokens, of which `place` is watched: its results [n, any]. */
typedef qv_tensor run_fn(pair *p, const void *what, int32_t n, int32_t place);

static void check_company(pair *p, const char *name, run_fn *run, const void *what, int32_t most)
{
    float *alone = NULL;
    for (size_t i = 0; i < QV_ROWS(sizes) && sizes[i] <= most; i++) {
        const int32_t n = sizes[i], places[] = {n * 2 / 3, i % 2 ? n - 1 : 0};
        for (int j = 0; j < (n == 1 ? 1 : 2); j++) {
            int mark = p->n_blocks;
            char where[128];
            qv_tensor y = run(p, what, n, places[j]);
            float *row = row_of(p, y, places[j]);
            snprintf(where, sizeof where, "%s, token %d of %d", name, places[j], n);
            if (alone == NULL) {
                alone = row;
                for (int64_t k = 0; k < y.shape[1]; k++)
                    cr_assert(isfinite(row[k]), "%s: number %lld is not finite", where,
                              (long long)k);
            } else {
                check_same(where, row, alone, y.shape[1]);
                free(row);
            }
            release_to(p, mark);
        }
    }
    free(alone);
}

/* --- Products without adapters ------------------------------------------------------------ */

typedef struct {
    qv_weight *w;
    int64_t n_out, n_in;
    bool rest, f32;
} product;

static qv_tensor run_product(pair *p, const void *what, int32_t n, int32_t place)
{
    const product *c = what;
    qv_backend *be = p->be[GPU];
    qv_tensor none = {.data = NULL};
    qv_tensor x = company_act(p, 1, n, place, c->n_in, 1).t[GPU];
    qv_tensor y = (c->f32 ? nan_f32 : nan_act)(p, n, c->n_out).t[GPU];
    if (!c->f32) {
        PASS(qv_op_linear(be, c->w, x, y));
    } else {
        qv_tensor rest = c->rest ? company_act(p, 2, n, place, c->n_in, 0.01f).t[GPU] : none;
        PASS(qv_op_linear_f32(be, c->w, x, rest, y));
    }
    return y;
}

/* A router's and a gate's products among them: float32 with a rest, and a single row. */
Test(cuda_deterministic, products, .timeout = 600)
{
    static const product shapes[] = {
        {.n_out = 256, .n_in = 640, .rest = true, .f32 = true},
        {.n_out = 16, .n_in = 160, .rest = true, .f32 = true},
        {.n_out = 5, .n_in = 37, .rest = true, .f32 = true},
        {.n_out = 1, .n_in = 160},
        {.n_out = 520, .n_in = 192, .f32 = true},
        {.n_out = 712, .n_in = 96},
        {.n_out = 72, .n_in = 2240, .f32 = true},
        {.n_out = 37, .n_in = 129},
    };
    pair *p = open_pair_as(true);
    for (size_t i = 0; i < QV_ROWS(shapes); i++) {
        char name[96];
        product c = shapes[i];
        qv_rng rng = qv_rng_seed(31);
        float *values = random_floats(&rng, c.n_out * c.n_in, 1);
        PASS(qv_weight_new(p->be[GPU], c.n_out, c.n_in, QV_BF16, &c.w));
        PASS(qv_weight_load(p->be[GPU], c.w, 0, c.n_out, values, QV_F32, c.n_in));
        snprintf(name, sizeof name, "product %lldx%lld%s%s", (long long)c.n_out, (long long)c.n_in,
                 c.f32 ? ", f32" : "", c.rest ? ", with a rest" : "");
        check_company(p, name, run_product, &c, 200);
        qv_weight_free(p->be[GPU], c.w);
        free(values);
    }
    close_pair(p);
}

/* --- Rows by themselves ------------------------------------------------------------------- */

enum { ADD_NORM, NORM, GATED_NORM, SWIGLU, GATE, RELU2, ADD, N_ROW_OPS };

typedef struct {
    int op;
    int64_t n, d;
    both w;
} row_op;

static qv_tensor run_row_op(pair *p, const void *what, int32_t n, int32_t place)
{
    const row_op *c = what;
    qv_backend *be = p->be[GPU];
    int64_t d = c->n * c->d;
    qv_tensor w = qv_tensor_1d(c->w.t[GPU].data, QV_F32, c->d), none = {.data = NULL};
    qv_tensor x = company_act(p, 3, n, place, d, 2).t[GPU];
    qv_tensor z = company_act(p, 4, n, place, d, 2).t[GPU], y = nan_act(p, n, d).t[GPU];
    qv_tensor x3 = qv_tensor_split(x, c->n, c->d), z3 = qv_tensor_split(z, c->n, c->d),
              y3 = qv_tensor_split(y, c->n, c->d);
    qv_tensor r = company_f32(p, 5, n, place, d, 2).t[GPU];
    qv_tensor delta = company_f32(p, 6, n, place, d, 2).t[GPU];
    switch (c->op) {
    case ADD_NORM:
        w.shape[0] = d;
        PASS(qv_op_add_rms_norm(be, r, delta, w, 1e-6f, true, y, none));
        return y;
    case NORM:
        PASS(qv_op_rms_norm(be, x3, w, 1e-6f, true, y3));
        return y;
    case GATED_NORM:
        PASS(qv_op_gated_rms_norm(be, x3, z3, w, 1e-6f, false, y3));
        return y;
    case SWIGLU:
        PASS(qv_op_swiglu(be, x, z, y));
        return y;
    case GATE:
        PASS(qv_op_sigmoid_gate(be, x3, z3));
        return x;
    case RELU2:
        PASS(qv_op_relu2(be, x, y));
        return y;
    default:
        PASS(qv_op_add(be, r, delta, company_act(p, 7, n, place, 1, 2).t[GPU]));
        return r;
    }
}

Test(cuda_deterministic, norms_and_gates, .timeout = 600)
{
    static const row_op shapes[] = {{.n = 4, .d = 128}, {.n = 1, .d = 192}, {.n = 3, .d = 37}};
    pair *p = open_pair_as(true);
    qv_rng rng = qv_rng_seed(32);
    both w = random_f32(p, &rng, 1, 512, 1);
    for (size_t i = 0; i < QV_ROWS(shapes); i++)
        for (int op = 0; op < N_ROW_OPS; op++) {
            row_op c = shapes[i];
            char name[64];
            c.op = op;
            c.w = w;
            snprintf(name, sizeof name, "row op %d of [%lld, %lld]", op, (long long)c.n,
                     (long long)c.d);
            check_company(p, name, run_row_op, &c, 200);
        }
    close_pair(p);
}

/* --- Embedding of adapters ---------------------------------------------------------------- */

enum { N_VOCAB = 50 };

/* Segments: `slot` has the watched token and nothing else. */
typedef struct {
    int32_t start[5], slot[4];
} crowd;

static crowd crowd_around(int32_t n, int32_t place, int32_t slot)
{
    int32_t next = slot < 0 ? 0 : (slot + 1) % 3;
    return (crowd){.start = {0, place / 2, place, place + 1, n},
                   .slot = {slot < 0 ? 1 : -1, next, slot, (next + 1) % 3}};
}

typedef struct {
    qv_embed_lora_site site;
    int32_t slot;
} embedding;

static qv_tensor run_embedding(pair *p, const void *what, int32_t n, int32_t place)
{
    const embedding *c = what;
    qv_rng rng = qv_rng_seed((uint64_t)n);
    int32_t *ids = must(malloc((size_t)n * sizeof *ids));
    for (int32_t i = 0; i < n; i++)
        ids[i] = i == place ? 7 : (int32_t)qv_rng_range(&rng, 0, N_VOCAB);
    crowd s = crowd_around(n, place, c->slot);
    both_memory on = upload_both(p, ids, (size_t)n * sizeof *ids),
                start = upload_both(p, s.start, sizeof s.start),
                slot = upload_both(p, s.slot, sizeof s.slot);
    qv_tensor y = company_f32(p, 8, n, place, c->site.n_out, 1).t[GPU];
    PASS(qv_op_embed_lora(p->be[GPU], &c->site, 4, start.at[GPU], slot.at[GPU], on.at[GPU], y));
    free(ids);
    return y;
}

Test(cuda_deterministic, embeddings_of_adapters, .timeout = 600)
{
    static const int32_t ranks[] = {1, 70, 19};
    uint8_t active[N_SLOTS] = {1, 1, 1, 0};
    for (int64_t n_out = 192; n_out < 400; n_out += 139)
        for (int32_t watched = -1; watched < 3; watched++) {
            pair *p = open_pair_as(true);
            qv_rng rng = qv_rng_seed(33);
            qv_embed_lora_slot slots[N_SLOTS] = {0};
            for (int i = 0; i < 3; i++) {
                float *fa = random_floats(&rng, N_VOCAB * ranks[i], 1),
                      *fb = random_floats(&rng, ranks[i] * n_out, 1);
                both a = tensor_both(p, fa, QV_BF16, QV_BF16, N_VOCAB, ranks[i], 1),
                     b = tensor_both(p, fb, QV_BF16, QV_BF16, ranks[i], n_out, 1);
                free(fa);
                free(fb);
                slots[i] = (qv_embed_lora_slot){.a = a.t[GPU].data,
                                                .b = b.t[GPU].data,
                                                .max_rank = ranks[i],
                                                .rank = ranks[i],
                                                .scale = 0.75f};
            }
            both_memory memory = upload_both(p, slots, sizeof slots);
            const embedding c = {.site = {.n_vocab = N_VOCAB,
                                          .n_out = n_out,
                                          .n_slots = N_SLOTS,
                                          .max_rank = 70,
                                          .dtype = QV_BF16,
                                          .slots = memory.at[GPU],
                                          .slot_active = active},
                                 .slot = watched};
            check_company(p, "embed_lora", run_embedding, &c, 200);
            close_pair(p);
        }
}

/* --- Router ------------------------------------------------------------------------------- */

typedef struct {
    qv_router router;
    int64_t n_experts;
    bool ids; /* or weights */
} choice;

static qv_tensor run_router(pair *p, const void *what, int32_t n, int32_t place)
{
    const choice *c = what;
    int32_t k = c->router.top_k;
    qv_tensor logits = company_f32(p, 9, n, place, c->n_experts, 4).t[GPU];
    qv_tensor weights = nan_f32(p, n, k).t[GPU];
    both_memory memory = alloc_both(p, (size_t)(n * k) * 4, (size_t)(n * k) * 4);
    qv_tensor ids = qv_tensor_2d(memory.at[GPU], QV_I32, n, k);
    PASS(qv_op_router(p->be[GPU], &c->router, logits, ids, weights));
    if (!c->ids)
        return weights;
    int32_t *chosen = must(malloc((size_t)(n * k) * sizeof *chosen));
    PASS(qv_backend_download(p->be[GPU], chosen, ids.data, (size_t)(n * k) * sizeof *chosen));
    float *numbers = must(malloc((size_t)(n * k) * sizeof *numbers));
    for (int32_t i = 0; i < n * k; i++)
        numbers[i] = (float)chosen[i];
    both b = f32_2d(p, numbers, n, k);
    free(chosen);
    free(numbers);
    return b.t[GPU];
}

Test(cuda_deterministic, routers, .timeout = 600)
{
    static const struct {
        int64_t n_experts;
        qv_router router;
    } kinds[] = {
        {256, {.kind = QV_ROUTER_SOFTMAX, .top_k = 8, .normalize = true, .n_groups = 1}},
        {9, {.kind = QV_ROUTER_SOFTMAX, .top_k = 3, .n_groups = 1}},
        {128, {.kind = QV_ROUTER_SIGMOID, .top_k = 6, .normalize = true, .n_groups = 1}},
        {64, {.kind = QV_ROUTER_SIGMOID, .top_k = 4, .normalize = true, .n_groups = 8}},
        {2048, {.kind = QV_ROUTER_SIGMOID, .top_k = 22, .n_groups = 1}},
    };
    pair *p = open_pair_as(true);
    for (size_t i = 0; i < QV_ROWS(kinds); i++)
        for (int ids = 0; ids < 2; ids++) {
            choice c = {.router = kinds[i].router, .n_experts = kinds[i].n_experts, .ids = ids};
            c.router.scale = 2.5f;
            c.router.topk_groups = c.router.n_groups > 1 ? 3 : 1;
            check_company(p, ids ? "router, experts" : "router, weights", run_router, &c, 600);
        }
    close_pair(p);
}

/* --- Experts ------------------------------------------------------------------------------ */

typedef struct {
    const qv_moe_shape *shape;
    qv_weight *up[2], *down[2];
    part_pool *up_parts, *down_parts; /* NULL: a model without adapters */
    int32_t slot, max_rank;
    bool latent; /* the sum is rounded */
} experts;

/* Sums that nearly cancel, so that another order of additions shows in BF16: the second half of a
 * row of numbers is the first again, and of a row of weights the first with the other sign. What is
 * left is the last number's share, which is a little larger than its twin. */
static void repeat_half(float *x, int64_t n, int64_t d, float sign)
{
    for (int64_t i = 0; i < n; i++) {
        float *row = x + i * d;
        for (int64_t k = 0; k < d / 2; k++)
            row[d / 2 + k] = sign * row[k];
        if (sign > 0)
            row[d - 1] = row[d / 2 - 1] + (d / 2 > 1 ? 0.03f : 0);
    }
}

static void load_cancelling(pair *p, qv_rng *rng, int64_t n_experts, int64_t n_out, int64_t n_in,
                            qv_weight *w[2])
{
    float *values = random_floats(rng, n_experts * n_out * n_in, 1);
    repeat_half(values, n_experts * n_out, n_in, -1);
    for (int side = 0; side < 2; side++)
        w[side] = load_experts(p->be[side], values, n_experts, n_out, n_in, QV_BF16);
    free(values);
}

/* Half of the others choose the same experts, so that those have pairs by the hundred. */
static int32_t *crowded_ids(const qv_moe_shape *s, int32_t n, int32_t place)
{
    qv_rng rng = qv_rng_seed((uint64_t)n), own = qv_rng_seed(35);
    int32_t *ids = random_ids(&rng, n, s->n_experts, s->top_k);
    int32_t *watched = random_ids(&own, 1, s->n_experts, s->top_k);
    for (int32_t t = 0; t < n; t++)
        if (t == place || t % 2 == 0)
            memcpy(ids + t * s->top_k, watched, (size_t)s->top_k * sizeof *ids);
    free(watched);
    return ids;
}

static qv_tensor run_experts(pair *p, const void *what, int32_t n, int32_t place)
{
    const experts *c = what;
    const qv_moe_shape *s = c->shape;
    qv_backend *be = p->be[GPU];
    int64_t n_pairs = (int64_t)n * s->top_k, n_up = s->gated ? 2 * s->ffn : s->ffn;
    int32_t *ids = crowded_ids(s, n, place);
    crowd segs = crowd_around(n, place, c->slot);
    lists l = route_both(p, ids, s->n_experts, 0, s->top_k, n, 4, segs.start, segs.slot);
    const qv_moe_list *list = &l.list[GPU];
    float *numbers = company(10, n, place, s->d, 1);
    repeat_half(numbers, n, s->d, 1);
    qv_tensor x = act_2d(p, numbers, n, s->d).t[GPU];
    free(numbers);
    qv_tensor wide = nan_act(p, n_pairs, n_up).t[GPU], inner = qv_tensor_cols(wide, 0, s->ffn);
    qv_tensor out = nan_act(p, n_pairs, s->d).t[GPU];
    qv_tensor weights = company_f32(p, 11, n, place, s->top_k, 1).t[GPU];
    qv_tensor shared = company_f32(p, 12, n, place, s->d, 1).t[GPU];
    qv_tensor gate = company_act(p, 13, n, place, 1, 1).t[GPU], x1 = {.data = NULL};
    const qv_moe_lora_site *up = c->up_parts ? &c->up_parts->site[GPU] : NULL;
    const qv_moe_lora_site *down = c->down_parts ? &c->down_parts->site[GPU] : NULL;
    qv_tensor scratch = nan_f32(p, n_pairs, 2 * c->max_rank + 1).t[GPU];
    if (up == NULL) {
        PASS(qv_op_moe_linear_act(be, c->up[GPU], list, x, QV_MOE_TOKENS,
                                  s->gated ? QV_ACT_SWIGLU : QV_ACT_RELU2, wide, inner));
    } else {
        x1 = qv_tensor_3d(scratch.data, QV_F32, n_pairs, up->n_slices, c->max_rank);
        PASS(qv_op_moe_linear(be, c->up[GPU], list, x, QV_MOE_TOKENS, wide));
        PASS(qv_op_moe_lora(be, up, list, x, QV_MOE_TOKENS, x1, wide));
        PASS(s->gated ? qv_op_swiglu(be, inner, qv_tensor_cols(wide, s->ffn, s->ffn), inner)
                      : qv_op_relu2(be, wide, inner));
    }
    PASS(qv_op_moe_linear(be, c->down[GPU], list, inner, QV_MOE_PAIRS, out));
    if (down != NULL) {
        x1 = qv_tensor_3d(scratch.data, QV_F32, n_pairs, 1, c->max_rank);
        PASS(qv_op_moe_lora(be, down, list, inner, QV_MOE_PAIRS, x1, out));
    }
    free(ids);
    if (c->latent) {
        qv_tensor y = nan_act(p, n, s->d).t[GPU];
        PASS(qv_op_moe_combine(be, list, weights, out, down, x1, y));
        return y;
    }
    qv_tensor y = nan_f32(p, n, s->d).t[GPU];
    PASS(qv_op_moe_combine_f32(be, list, weights, out, down, x1, shared, gate, y));
    return y;
}

/* From the router's choice to the sum, with adapters of a form, or without. */
static void check_experts(const qv_moe_shape *s, int form, int32_t most)
{
    pair *p = open_pair_as(true);
    qv_rng rng = qv_rng_seed(34);
    experts c = {.shape = s, .max_rank = form == 2 ? 48 : 16};
    load_cancelling(p, &rng, s->n_experts, s->gated ? 2 * s->ffn : s->ffn, s->d, c.up);
    load_both(p, &rng, s->n_experts, s->d, s->ffn, c.down);
    if (form >= 0) {
        c.up_parts = new_pool(p, s, true, c.max_rank);
        c.down_parts = new_pool(p, s, false, c.max_rank);
        add_form(p, c.up_parts, c.down_parts, &rng, (size_t)form);
    }
    for (int with = 0; with <= (form >= 0); with++) { /* a base token, one of an adapter */
        char name[96];
        c.slot = with ? form : -1;
        c.latent = c.slot == 1;
        snprintf(name, sizeof name, "experts %s, adapters of form %d, slot %d", s->name, form,
                 c.slot);
        check_company(p, name, run_experts, &c, most);
    }
    for (int side = 0; side < 2; side++) {
        qv_weight_free(p->be[side], c.up[side]);
        qv_weight_free(p->be[side], c.down[side]);
    }
    free(c.up_parts);
    free(c.down_parts);
    close_pair(p);
}

static const qv_moe_shape crowded[] = {{"tiles", 4, 2, 264, 136, true},
                                       {"one of two", 2, 1, 128, 72, false}};

Test(cuda_deterministic, experts, .timeout = 600)
{
    for (size_t i = 0; i < QV_ROWS(qv_moe_shapes); i++)
        check_experts(&qv_moe_shapes[i], -1, 200);
    for (size_t i = 0; i < QV_ROWS(crowded); i++)
        check_experts(&crowded[i], -1, 600);
}

Test(cuda_deterministic, experts_with_adapters, .timeout = 600)
{
    for (size_t i = 0; i < QV_ROWS(qv_moe_shapes); i++)
        check_experts(&qv_moe_shapes[i], (int)i % 3, 200);
    for (int form = 0; form < 3; form++)
        check_experts(&crowded[form % 2], form, 600);
}

/* --- Sampling ----------------------------------------------------------------------------- */

/* More rows than get a list of candidates (ops/cuda/sample.c), so that the watched one has one when
 * it comes first and none when it comes last. */
enum { N_ROWS = 530, N_LOGITS = 900 };

static qv_sample_result sample_row(pair *p, int32_t n, int32_t place, int kind)
{
    static const int32_t seen[] = {3, 9, 3, 41};
    static qv_sample_result results[N_ROWS];
    qv_sample_row rows[N_ROWS];
    qv_tensor logits = company_f32(p, 14, n, place, N_LOGITS, 6).t[GPU];
    for (int32_t i = 0; i < n; i++)
        rows[i] = (qv_sample_row){.target = -1,
                                  .temperature = 0.9f,
                                  .top_p = 0.95f,
                                  .repetition_penalty = 1,
                                  .seed = i == place ? 5 : (uint64_t)i,
                                  .n_top = i == place ? 4 : 0};
    rows[place].top_k = kind == 1 ? 30 : 0;
    rows[place].temperature = kind == 2 ? 0 : 0.9f;
    rows[place].tokens = seen;
    rows[place].n_prompt = 2;
    rows[place].n_tokens = 4;
    rows[place].presence_penalty = 0.5f;
    PASS(qv_op_sample(p->be[GPU], logits, N_LOGITS - 7, rows, results));
    return results[place];
}

Test(cuda_deterministic, sampling, .timeout = 600)
{
    static const struct {
        int32_t n, place;
    } rows[] = {{3, 0}, {3, 2}, {40, 0}, {40, 39}, {N_ROWS, N_ROWS - 1}};
    pair *p = open_pair_as(true);
    PASS(qv_backend_reserve(p->be[GPU],
                            &(qv_backend_limits){.max_logits = N_ROWS, .n_vocab = N_LOGITS}));
    for (int kind = 0; kind < 3; kind++) {
        qv_sample_result alone = sample_row(p, 1, 0, kind);
        for (size_t i = 0; i < QV_ROWS(rows) - (kind > 0); i++) {
            qv_sample_result r = sample_row(p, rows[i].n, rows[i].place, kind);
            cr_assert(
                r.token == alone.token && r.logprob == alone.logprob && r.n_top == alone.n_top &&
                    memcmp(r.top_token, alone.top_token, 4 * sizeof(int32_t)) == 0 &&
                    memcmp(r.top_logprob, alone.top_logprob, 4 * sizeof(float)) == 0,
                "kind %d, row %d of %d: token %d (%.9g), alone %d (%.9g)", kind, rows[i].place,
                rows[i].n, r.token, (double)r.logprob, alone.token, (double)alone.logprob);
        }
    }
    close_pair(p);
}
