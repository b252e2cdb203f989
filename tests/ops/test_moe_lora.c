/* Adapters on routed experts: the seven layout tests of test_lora.c for planes with experts in
 * front, in every form that adapter files come in, through whole layers: up, activation, down,
 * weighted sum.
 */
#include "tests/ops/moe_test.h"

#define N_SLOTS 4

/* How an adapter covers a layer's experts. */
typedef struct {
    const char *name;
    bool up_a, up_b, down_a, down_b; /* shared by all experts */
    bool one_plane;                  /* gate and up read one A */
    bool no_gate, no_up, no_down;    /* parts that the adapter lacks */
    int missing;                     /* every so manieth expert has nothing; 0: all have */
    bool varied;                     /* rank and scale differ from expert to expert */
} moe_form;

static const moe_form forms[] = {
    {.name = "per expert"},
    {.name = "shared outer", .up_a = true, .down_b = true},
    {.name = "merged gate_up", .one_plane = true},
    {.name = "merged gate_up, shared outer", .one_plane = true, .up_a = true, .down_b = true},
    {.name = "some experts", .missing = 3},
    {.name = "ranks by expert", .varied = true, .missing = 4},
    {.name = "up only", .no_gate = true, .no_down = true},
    {.name = "down only, shared outer", .no_gate = true, .no_up = true, .down_b = true},
    {.name = "the other sides shared", .up_b = true, .down_a = true},
    {.name = "everything shared", .up_a = true, .up_b = true, .down_a = true, .down_b = true},
};

/* --- One side of an adapter
 * ----------------------------------------------------------------------- */

typedef struct {
    int64_t n_in, n_out, slice_start[3];
    int32_t n_experts, n_slices, top_rank;
    bool a_shared, b_shared;
    qv_lora_slice *slices; /* [n_experts, n_slices] */
    float *a;              /* [n_experts or 1, n_slices, top_rank, n_in] */
    float *b;              /* [n_experts or 1, n_out, top_rank] */
} side;

static side new_side(qv_rng *rng, int32_t n_experts, int64_t n_in, int64_t n_out, int32_t n_slices,
                     int32_t rank, bool a_shared, bool b_shared, const moe_form *form,
                     const bool *lacking)
{
    side s = {.n_in = n_in,
              .n_out = n_out,
              .n_experts = n_experts,
              .n_slices = n_slices,
              .top_rank = rank,
              .a_shared = a_shared,
              .b_shared = b_shared};
    s.slice_start[1] = n_out / n_slices;
    s.slice_start[n_slices] = n_out;
    s.slices = must(calloc((size_t)(n_experts * n_slices), sizeof *s.slices));
    int64_t n_a = (a_shared ? 1 : n_experts) * (int64_t)n_slices * rank * n_in;
    int64_t n_b = (b_shared ? 1 : n_experts) * n_out * rank;
    s.a = random_floats(rng, n_a, 1.0f / sqrtf((float)n_in));
    s.b = random_floats(rng, n_b, 1);
    round_to_bf16(s.a, n_a);
    round_to_bf16(s.b, n_b);
    float scale[2] = {0.5f + (float)qv_rng_uniform(rng), 0.5f + (float)qv_rng_uniform(rng)};
    for (int32_t e = 0; e < n_experts; e++)
        for (int32_t i = 0; i < n_slices; i++) {
            bool none = lacking[i] || (form->missing > 0 && e % form->missing == 0);
            int32_t r = form->varied ? 1 + (rank + e) % rank : rank;
            s.slices[e * n_slices + i] = (qv_lora_slice){
                .plane = form->one_plane ? 0 : i,
                .rank = none ? 0 : r,
                .scale = form->varied ? scale[i] * (float)(e + 1) / (float)n_experts : scale[i],
            };
        }
    return s;
}

static void free_side(side *s)
{
    free(s->slices);
    free(s->a);
    free(s->b);
}

static const float *a_row(const side *s, int32_t e, int32_t plane, int32_t r)
{
    return s->a +
           (((s->a_shared ? 0 : e) * s->n_slices + plane) * (int64_t)s->top_rank + r) * s->n_in;
}

static const float *b_row(const side *s, int32_t e, int64_t row)
{
    return s->b + ((s->b_shared ? 0 : e) * s->n_out + row) * s->top_rank;
}

typedef struct {
    side up, down;
} adapter;

static adapter new_adapter(const qv_moe_shape *s, const moe_form *form, uint64_t seed, int32_t rank)
{
    qv_rng rng = qv_rng_seed(seed);
    int32_t n_slices = s->gated ? 2 : 1;
    bool lacks_up[2] = {s->gated ? form->no_gate : form->no_up, form->no_up};
    bool lacks_down[1] = {form->no_down};
    adapter ad;
    ad.up = new_side(&rng, s->n_experts, s->d, n_slices * s->ffn, n_slices, rank, form->up_a,
                     form->up_b, form, lacks_up);
    ad.down = new_side(&rng, s->n_experts, s->ffn, s->d, 1, rank, form->down_a, form->down_b, form,
                       lacks_down);
    return ad;
}

static void free_adapter(adapter *ad)
{
    free_side(&ad->up);
    free_side(&ad->down);
}

/* --- Sites
 * ---------------------------------------------------------------------------------------- */

typedef struct {
    qv_moe_lora_site site;
    int64_t slice_start[3];
    qv_moe_lora_slot slots[N_SLOTS];
    uint8_t active[N_SLOTS];
} pool;

static void init_pool(pool *p, const qv_moe_shape *s, bool up, int32_t max_rank, qv_dtype dtype)
{
    int32_t n_slices = up && s->gated ? 2 : 1;
    *p = (pool){.slice_start = {0, s->ffn, 2 * s->ffn}};
    if (!up)
        p->slice_start[1] = s->d;
    p->site = (qv_moe_lora_site){
        .n_in = up ? s->d : s->ffn,
        .n_out = p->slice_start[n_slices],
        .n_experts = s->n_experts,
        .n_slices = n_slices,
        .n_slots = N_SLOTS,
        .max_rank = max_rank,
        .dtype = dtype,
        .slice_start = p->slice_start,
        .slots = p->slots,
        .slot_active = p->active,
    };
}

static void clear_slot(pool *p, int32_t slot)
{
    free(p->slots[slot].a);
    free(p->slots[slot].b);
    free(p->slots[slot].slices);
    p->slots[slot] = (qv_moe_lora_slot){0};
    p->active[slot] = 0;
}

static void deinit_pool(pool *p)
{
    for (int32_t i = 0; i < N_SLOTS; i++)
        clear_slot(p, i);
}

static void put(qv_dtype dtype, void *data, int64_t i, float x)
{
    if (dtype == QV_F32)
        ((float *)data)[i] = x;
    else
        ((uint16_t *)data)[i] = qv_f32_to_bf16(x);
}

/* Write one pair of an expert: rank rows of A, rank columns of B. */
static void put_pair(const pool *p, qv_moe_lora_slot *slot, const side *s, int32_t e, int32_t i)
{
    const qv_lora_slice *slice = &s->slices[e * s->n_slices + i];
    int64_t ea = s->a_shared ? 0 : e, eb = s->b_shared ? 0 : e, spacing = slot->max_rank;
    for (int32_t r = 0; r < slice->rank; r++) {
        for (int64_t k = 0; k < s->n_in; k++)
            put(p->site.dtype, slot->a,
                ((ea * s->n_slices + slice->plane) * spacing + r) * s->n_in + k,
                a_row(s, e, slice->plane, r)[k]);
        for (int64_t row = s->slice_start[i]; row < s->slice_start[i + 1]; row++)
            put(p->site.dtype, slot->b, (eb * spacing + r) * s->n_out + row, b_row(s, e, row)[r]);
    }
}

/* Write a side into memory of its own with planes `spacing` apart; what no pair covers is zero, or
 * NaN when it is to be shown that it is not read. */
static void install(pool *p, int32_t slot_index, const side *s, int32_t spacing, bool poison)
{
    clear_slot(p, slot_index);
    qv_moe_lora_slot *slot = &p->slots[slot_index];
    size_t size = qv_dtype_size(p->site.dtype), n_slices = (size_t)(s->n_experts * s->n_slices);
    size_t n_a = (size_t)((s->a_shared ? 1 : s->n_experts) * s->n_slices * spacing * s->n_in);
    size_t n_b = (size_t)((s->b_shared ? 1 : s->n_experts) * s->n_out * spacing);
    *slot = (qv_moe_lora_slot){
        .a = must(malloc(n_a * size)),
        .b = must(malloc(n_b * size)),
        .slices = must(malloc(n_slices * sizeof *slot->slices)),
        .max_rank = spacing,
        .a_shared = s->a_shared,
        .b_shared = s->b_shared,
    };
    memset(slot->a, poison ? 0xFF : 0, n_a * size);
    memset(slot->b, poison ? 0xFF : 0, n_b * size);
    memcpy(slot->slices, s->slices, n_slices * sizeof *slot->slices);
    for (int32_t e = 0; e < s->n_experts; e++)
        for (int32_t i = 0; i < s->n_slices; i++)
            put_pair(p, slot, s, e, i);
    p->active[slot_index] = 1;
}

/* --- Layers
 * --------------------------------------------------------------------------------------- */

typedef struct {
    const qv_moe_shape *shape;
    int64_t n_up; /* rows of the up-projection */
    float *w_up, *w_down;
    pool up, down;
} layer;

static layer *new_layer(const qv_moe_shape *s, int32_t max_rank, qv_dtype dtype)
{
    qv_rng rng = qv_rng_seed(30);
    layer *l = must(calloc(1, sizeof *l));
    l->shape = s;
    l->n_up = s->gated ? 2 * s->ffn : s->ffn;
    l->w_up = random_floats(&rng, s->n_experts * l->n_up * s->d, 1.7f / sqrtf((float)s->d));
    l->w_down = random_floats(&rng, s->n_experts * s->d * s->ffn, 1.7f / sqrtf((float)s->ffn));
    init_pool(&l->up, s, true, max_rank, dtype);
    init_pool(&l->down, s, false, max_rank, dtype);
    return l;
}

static void free_layer(layer *l)
{
    deinit_pool(&l->up);
    deinit_pool(&l->down);
    free(l->w_up);
    free(l->w_down);
    free(l);
}

static void install_adapter(layer *l, int32_t slot, const adapter *ad, int32_t spacing, bool poison)
{
    install(&l->up, slot, &ad->up, spacing, poison);
    install(&l->down, slot, &ad->down, spacing, poison);
}

/* What goes through a layer. */
typedef struct {
    int32_t n, n_segs;
    const int32_t *seg_start, *seg_slot;
    int32_t *ids;
    float *x, *weights;
} tokens;

static tokens new_tokens(const qv_moe_shape *s, int32_t n, int32_t n_segs, const int32_t *seg_start,
                         const int32_t *seg_slot)
{
    qv_rng rng = qv_rng_seed(31);
    tokens t = {.n = n, .n_segs = n_segs, .seg_start = seg_start, .seg_slot = seg_slot};
    t.ids = random_ids(&rng, n, s->n_experts, s->top_k);
    t.x = random_floats(&rng, n * s->d, 1);
    t.weights = random_floats(&rng, n * s->top_k, 1);
    return t;
}

static void free_tokens(tokens *t)
{
    free(t->ids);
    free(t->x);
    free(t->weights);
}

static void activate(qv_backend *be, const layer *l, int64_t n_pairs, float *h, float *a)
{
    int64_t ffn = l->shape->ffn;
    qv_tensor ht = qv_tensor_2d(h, QV_F32, n_pairs, l->n_up),
              at = qv_tensor_2d(a, QV_F32, n_pairs, ffn);
    if (l->shape->gated)
        PASS(qv_op_swiglu(be, qv_tensor_cols(ht, 0, ffn), qv_tensor_cols(ht, ffn, ffn), at));
    else
        PASS(qv_op_relu2(be, ht, at));
}

/* y [n, d] of a whole layer; `with_lora` false leaves out the adapters' ops altogether.
 * Intermediates and scratch are NaN before, so that what is read was written. */
static void run_layer(qv_backend *be, const layer *l, const tokens *t, bool with_lora, float *y)
{
    const qv_moe_shape *s = l->shape;
    int64_t n_pairs = (int64_t)t->n * s->top_k;
    qv_weight *w_up = load_experts(be, l->w_up, s->n_experts, l->n_up, s->d, QV_F32);
    qv_weight *w_down = load_experts(be, l->w_down, s->n_experts, s->d, s->ffn, QV_F32);
    test_list list = new_list(s->n_experts, s->top_k, t->n);
    float *h = filled_floats(n_pairs * l->n_up, NAN), *a = filled_floats(n_pairs * s->ffn, NAN);
    float *o = filled_floats(n_pairs * s->d, NAN);
    float *scratch = filled_floats(n_pairs * 2 * l->up.site.max_rank, NAN);
    qv_tensor x = qv_tensor_2d(t->x, QV_F32, t->n, s->d);
    qv_tensor ht = qv_tensor_2d(h, QV_F32, n_pairs, l->n_up);
    qv_tensor at = qv_tensor_2d(a, QV_F32, n_pairs, s->ffn);
    qv_tensor ot = qv_tensor_2d(o, QV_F32, n_pairs, s->d);
    qv_tensor x1_up =
        qv_tensor_3d(scratch, QV_F32, n_pairs, l->up.site.n_slices, l->up.site.max_rank);
    qv_tensor x1_down = qv_tensor_3d(scratch, QV_F32, n_pairs, 1, l->up.site.max_rank);

    route(be, &list.list, t->ids, t->n, t->n_segs, t->seg_start, t->seg_slot);
    PASS(qv_op_moe_linear(be, w_up, &list.list, x, QV_MOE_TOKENS, ht));
    if (with_lora)
        PASS(qv_op_moe_lora(be, &l->up.site, &list.list, x, QV_MOE_TOKENS, x1_up, ht));
    activate(be, l, n_pairs, h, a);
    PASS(qv_op_moe_linear(be, w_down, &list.list, at, QV_MOE_PAIRS, ot));
    if (with_lora)
        PASS(qv_op_moe_lora(be, &l->down.site, &list.list, at, QV_MOE_PAIRS, x1_down, ot));
    PASS(qv_op_moe_combine(be, &list.list, qv_tensor_2d(t->weights, QV_F32, t->n, s->top_k), ot,
                           with_lora ? &l->down.site : NULL, with_lora ? x1_down : (qv_tensor){0},
                           qv_tensor_2d(y, QV_F32, t->n, s->d)));
    free(h);
    free(a);
    free(o);
    free(scratch);
    free(list.memory);
    qv_weight_free(be, w_up);
    qv_weight_free(be, w_down);
}

/* --- Oracle: experts with the delta merged in, in double
 * ------------------------------------------ */

/* out = (W + sum over slices of s B A) in */
static void merged_matvec(const float *w, const side *s, int32_t e, const double *in, int64_t n_in,
                          int64_t n_out, double *out)
{
    for (int64_t row = 0; row < n_out; row++) {
        out[row] = 0;
        for (int64_t k = 0; k < n_in; k++)
            out[row] += (double)w[(e * n_out + row) * n_in + k] * in[k];
    }
    for (int32_t i = 0; s && i < s->n_slices; i++) {
        const qv_lora_slice *slice = &s->slices[e * s->n_slices + i];
        for (int32_t r = 0; r < slice->rank; r++) {
            double x1 = 0;
            for (int64_t k = 0; k < n_in; k++)
                x1 += (double)a_row(s, e, slice->plane, r)[k] * in[k];
            for (int64_t row = s->slice_start[i]; row < s->slice_start[i + 1]; row++)
                out[row] += (double)slice->scale * b_row(s, e, row)[r] * x1;
        }
    }
}

static void oracle_token(const layer *l, const adapter *ad, const float *x, const int32_t *ids,
                         const float *weights, double *y)
{
    const qv_moe_shape *s = l->shape;
    double *in = new_doubles(s->d), *h = new_doubles(l->n_up), *a = new_doubles(s->ffn);
    double *o = new_doubles(s->d);
    for (int64_t i = 0; i < s->d; i++) {
        in[i] = x[i];
        y[i] = 0;
    }
    for (int32_t j = 0; j < s->top_k; j++) {
        merged_matvec(l->w_up, ad ? &ad->up : NULL, ids[j], in, s->d, l->n_up, h);
        for (int64_t i = 0; i < s->ffn; i++)
            a[i] = s->gated ? silu_d(h[i]) * h[s->ffn + i] : h[i] > 0 ? h[i] * h[i] : 0;
        merged_matvec(l->w_down, ad ? &ad->down : NULL, ids[j], a, s->ffn, s->d, o);
        for (int64_t i = 0; i < s->d; i++)
            y[i] += weights[j] * o[i];
    }
    free(in);
    free(h);
    free(a);
    free(o);
}

/* adapters[slot] may be NULL */
static void oracle(const layer *l, const adapter *const *adapters, const tokens *t, double *y)
{
    const qv_moe_shape *s = l->shape;
    for (int32_t seg = 0; seg < t->n_segs; seg++)
        for (int32_t i = t->seg_start[seg]; i < t->seg_start[seg + 1]; i++)
            oracle_token(l, t->seg_slot[seg] < 0 ? NULL : adapters[t->seg_slot[seg]],
                         t->x + i * s->d, t->ids + i * s->top_k, t->weights + i * s->top_k,
                         y + i * s->d);
}

/* --- Tests: values
 * -------------------------------------------------------------------------------- */

static const int32_t mixed_start[] = {0, 3, 8, 8, 15, 17, 20}, mixed_slot[] = {-1, 0, 1, 2, 3, 0};
enum { N_MIXED = 20, N_MIXED_SEGS = 6 };

static void check_form(qv_backend *be, const qv_moe_shape *shape, const moe_form *form,
                       qv_dtype dtype, int32_t rank)
{
    char what[160];
    snprintf(what, sizeof what, "%s, %s, %s, rank %d", qv_backend_describe(be), shape->name,
             form->name, rank);
    layer *l = new_layer(shape, 8, dtype);
    adapter one = new_adapter(shape, form, 32, rank), two = new_adapter(shape, &forms[0], 33, 2);
    install_adapter(l, 0, &one, 8, true);
    install_adapter(l, 2, &two, 8, true); /* slots 1 and 3 have no experts */
    tokens t = new_tokens(shape, N_MIXED, N_MIXED_SEGS, mixed_start, mixed_slot);
    float *y = filled_floats(N_MIXED * shape->d, NAN);
    double *want = new_doubles(N_MIXED * shape->d);
    run_layer(be, l, &t, true, y);
    oracle(l, (const adapter *[]){&one, NULL, &two, NULL}, &t, want);
    cr_assert(qv_close_f64(what, y, want, N_MIXED * shape->d, 2e-5), "%s", what);
    free(y);
    free(want);
    free_tokens(&t);
    free_adapter(&one);
    free_adapter(&two);
    free_layer(l);
}

Test(moe_lora, every_form_agrees_with_merged_experts, .timeout = 60)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_moe_shapes); i++)
        for (size_t f = 0; f < QV_ROWS(forms); f++) {
            check_form(be, &qv_moe_shapes[i], &forms[f], QV_F32, 8);
            check_form(be, &qv_moe_shapes[i], &forms[f], QV_BF16, 3);
        }
}

/* The adapter tiled to one matrix an expert: what sharing saves must not change what comes out. The
 * up-projection is the same bit for bit; the down-projection adds in another order. */
static side tiled(const side *s)
{
    side t = *s;
    int64_t n_a = s->n_slices * (int64_t)s->top_rank * s->n_in, n_b = s->n_out * s->top_rank;
    t.a_shared = t.b_shared = false;
    t.a = must(malloc((size_t)(s->n_experts * n_a) * sizeof(float)));
    t.b = must(malloc((size_t)(s->n_experts * n_b) * sizeof(float)));
    t.slices = must(malloc((size_t)(s->n_experts * s->n_slices) * sizeof *t.slices));
    memcpy(t.slices, s->slices, (size_t)(s->n_experts * s->n_slices) * sizeof *t.slices);
    for (int64_t e = 0; e < s->n_experts; e++) {
        memcpy(t.a + e * n_a, s->a + (s->a_shared ? 0 : e) * n_a, (size_t)n_a * sizeof(float));
        memcpy(t.b + e * n_b, s->b + (s->b_shared ? 0 : e) * n_b, (size_t)n_b * sizeof(float));
    }
    return t;
}

Test(moe_lora, shared_sides_equal_the_same_matrices_tiled)
{
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(qv_moe_shapes); i++)
        for (size_t f = 0; f < QV_ROWS(forms); f++) {
            const qv_moe_shape *shape = &qv_moe_shapes[i];
            layer *l = new_layer(shape, 8, QV_F32);
            adapter ad = new_adapter(shape, &forms[f], 34, 5);
            adapter tile = {.up = tiled(&ad.up), .down = tiled(&ad.down)};
            tokens t = new_tokens(shape, N_MIXED, N_MIXED_SEGS, mixed_start, mixed_slot);
            int64_t n = N_MIXED * shape->d;
            float *want = filled_floats(n, NAN), *y = filled_floats(n, NAN);
            install_adapter(l, 0, &tile, 8, false);
            run_layer(be, l, &t, true, want);
            install(&l->up, 0, &ad.up, 8, false);
            run_layer(be, l, &t, true, y);
            check_same(forms[f].name, y, want, n);
            install(&l->down, 0, &ad.down, 8, false);
            run_layer(be, l, &t, true, y);
            cr_assert(qv_close_f32(forms[f].name, y, want, n, 1e-5));
            if (!ad.down.b_shared)
                check_same(forms[f].name, y, want, n);
            free(want);
            free(y);
            free_tokens(&t);
            free_adapter(&ad);
            free_adapter(&tile);
            free_layer(l);
        }
}

/* Rows t * k + j of the scratch with j > 0 stay as they were: A x was computed once a token. */
Test(moe_lora, a_shared_a_shrinks_each_token_once)
{
    const qv_moe_shape *s = &qv_moe_shapes[0];
    static const int32_t start[] = {0, 3, 9}, slot[] = {-1, 0};
    qv_backend *be = open_cpu(2);
    layer *l = new_layer(s, 8, QV_F32);
    adapter ad = new_adapter(s, &forms[1], 35, 4);
    install_adapter(l, 0, &ad, 8, true);
    tokens t = new_tokens(s, 9, 2, start, slot);
    test_list list = new_list(s->n_experts, s->top_k, 9);
    route(be, &list.list, t.ids, 9, 2, start, slot);
    int64_t k = s->top_k;
    float *scratch = filled_floats(9 * k * 2 * 8, NAN), *h = filled_floats(9 * k * l->n_up, 1);
    PASS(qv_op_moe_lora(be, &l->up.site, &list.list, qv_tensor_2d(t.x, QV_F32, 9, s->d),
                        QV_MOE_TOKENS, qv_tensor_3d(scratch, QV_F32, 9 * k, 2, 8),
                        qv_tensor_2d(h, QV_F32, 9 * k, l->n_up)));
    for (int64_t pair = 0; pair < 9 * k; pair++)
        for (int64_t i = 0; i < 16; i++) {
            bool written = pair >= 3 * k && pair % k == 0 && i % 8 < 4;
            cr_assert_eq(!isnan(scratch[pair * 16 + i]), written, "pair %lld, %lld",
                         (long long)pair, (long long)i);
        }
    free(scratch);
    free(h);
    free(list.memory);
    free_tokens(&t);
    free_adapter(&ad);
    free_layer(l);
    qv_backend_close(be);
}

/* --- Tests: layout
 * -------------------------------------------------------------------------------- */

static const int32_t one_start[] = {0, 9}, one_slot[] = {1};
static const int32_t pool_ranks[] = {8, 16, 64};
static const size_t layout_shapes[] = {1, 2}; /* non-gated, and gated of odd sizes */

/* A clean slot, a poisoned one, and one as small as the rank agree bit for bit, whatever the site's
 * own rank is. */
static void check_layout(qv_backend *be, const qv_moe_shape *shape, const moe_form *form,
                         int32_t pool_rank, int32_t rank)
{
    adapter ad = new_adapter(shape, form, 36, rank);
    tokens t = new_tokens(shape, 9, 1, one_start, one_slot);
    int64_t n = 9 * shape->d;
    float *want = filled_floats(n, NAN), *y = filled_floats(n, NAN);
    for (int variant = 0; variant < 4; variant++) {
        int32_t spacing = variant >= 2 ? rank : pool_rank;
        layer *l = new_layer(shape, variant == 3 ? rank : pool_rank, QV_F32);
        install_adapter(l, 1, &ad, spacing, variant == 1);
        run_layer(be, l, &t, true, variant == 0 ? want : y);
        if (variant > 0)
            check_same(form->name, y, want, n);
        free_layer(l);
    }
    free(want);
    free(y);
    free_tokens(&t);
    free_adapter(&ad);
}

Test(moe_lora, what_lies_above_the_rank_is_never_read, .timeout = 60)
{
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(layout_shapes); i++)
        for (size_t f = 0; f < QV_ROWS(forms); f++)
            for (size_t p = 0; p < QV_ROWS(pool_ranks); p++) {
                int32_t r = pool_ranks[p];
                const int32_t ranks[] = {1, 2, 3, r / 2 - 1, r / 2, r / 2 + 1, r - 1, r};
                for (size_t k = 0; k < QV_ROWS(ranks); k++)
                    check_layout(be, &qv_moe_shapes[layout_shapes[i]], &forms[f], r, ranks[k]);
            }
    qv_backend_close(be);
}

Test(moe_lora, a_slot_forgets_the_adapter_before)
{
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(layout_shapes); i++)
        for (size_t f = 0; f < QV_ROWS(forms); f++) {
            const qv_moe_shape *shape = &qv_moe_shapes[layout_shapes[i]];
            layer *reused = new_layer(shape, 16, QV_F32), *fresh = new_layer(shape, 16, QV_F32);
            adapter large = new_adapter(shape, &forms[0], 37, 16);
            adapter small = new_adapter(shape, &forms[f], 38, 3);
            tokens t = new_tokens(shape, 9, 1, one_start, one_slot);
            float *want = filled_floats(9 * shape->d, NAN), *y = filled_floats(9 * shape->d, NAN);
            install_adapter(reused, 1, &large, 16, false);
            run_layer(be, reused, &t, true, y);
            install_adapter(reused, 1, &small, 16, false);
            install_adapter(fresh, 1, &small, 16, false);
            run_layer(be, reused, &t, true, y);
            run_layer(be, fresh, &t, true, want);
            check_same(forms[f].name, y, want, 9 * shape->d);
            clear_slot(&reused->up, 1); /* and none of it is left when it is gone */
            clear_slot(&reused->down, 1);
            run_layer(be, reused, &t, true, y);
            run_layer(be, reused, &t, false, want);
            check_same("cleared", y, want, 9 * shape->d);
            free(want);
            free(y);
            free_tokens(&t);
            free_adapter(&large);
            free_adapter(&small);
            free_layer(reused);
            free_layer(fresh);
        }
    qv_backend_close(be);
}

/* Running the loops to the slot's rank gives the same bits: the zero fill alone would be enough. */
Test(moe_lora, masked_and_unmasked_loops_agree)
{
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(layout_shapes); i++)
        for (size_t f = 0; f < QV_ROWS(forms); f++) {
            const qv_moe_shape *shape = &qv_moe_shapes[layout_shapes[i]];
            layer *l = new_layer(shape, 16, QV_F32);
            adapter ad = new_adapter(shape, &forms[f], 39, 5);
            tokens t = new_tokens(shape, 9, 1, one_start, one_slot);
            float *want = filled_floats(9 * shape->d, NAN), *y = filled_floats(9 * shape->d, NAN);
            install_adapter(l, 1, &ad, 16, false);
            run_layer(be, l, &t, true, want);
            for (int32_t e = 0; e < shape->n_experts; e++) {
                for (int32_t k = 0; k < l->up.site.n_slices; k++)
                    l->up.slots[1].slices[e * l->up.site.n_slices + k].rank = 16;
                l->down.slots[1].slices[e].rank = 16;
            }
            run_layer(be, l, &t, true, y);
            check_same(forms[f].name, y, want, 9 * shape->d);
            free(want);
            free(y);
            free_tokens(&t);
            free_adapter(&ad);
            free_layer(l);
        }
    qv_backend_close(be);
}

/* One token of `all` by itself. */
static void run_alone(qv_backend *be, const layer *l, const tokens *all, int32_t i, bool with_lora,
                      int32_t slot, float *y)
{
    const qv_moe_shape *s = l->shape;
    static const int32_t start[] = {0, 1};
    tokens t = {.n = 1,
                .n_segs = 1,
                .seg_start = start,
                .seg_slot = &slot,
                .ids = all->ids + i * s->top_k,
                .x = all->x + i * s->d,
                .weights = all->weights + i * s->top_k};
    run_layer(be, l, &t, with_lora, y);
}

/* Segments of more tokens than a tile has, several adapters of different forms, base tokens, a slot
 * without experts: every token as it is alone, with one thread; base tokens as without any LoRA. */
static void check_mixed(const char *isa, const qv_moe_shape *shape, const moe_form *form)
{
    static const int32_t start[] = {0, 11, 30, 31, 40, 120, 126}, slot[] = {-1, 0, 1, 2, 1, 3};
    enum { T = 126 };
    qv_backend *one = open_isa(isa, 1), *many = open_isa(isa, 3);
    if (!one || !many)
        return;
    layer *l = new_layer(shape, 16, QV_F32);
    adapter ads[3] = {new_adapter(shape, form, 40, 7), new_adapter(shape, &forms[1], 41, 16),
                      new_adapter(shape, &forms[5], 42, 2)};
    for (int i = 0; i < 3; i++)
        install_adapter(l, i, &ads[i], 16, true);
    tokens t = new_tokens(shape, T, 6, start, slot);
    float *y = filled_floats(T * shape->d, NAN), *want = filled_floats(shape->d, NAN);
    run_layer(many, l, &t, true, y);
    for (int32_t seg = 0; seg < 6; seg++)
        for (int32_t i = start[seg]; i < start[seg + 1]; i += seg == 0 || seg == 5 ? 1 : 7) {
            run_alone(one, l, &t, i, slot[seg] >= 0 && slot[seg] < 3, slot[seg], want);
            check_same(form->name, y + i * shape->d, want, shape->d);
        }
    for (int i = 0; i < 3; i++)
        free_adapter(&ads[i]);
    free(y);
    free(want);
    free_tokens(&t);
    free_layer(l);
    qv_backend_close(one);
    qv_backend_close(many);
}

Test(moe_lora, other_adapters_in_the_batch_change_no_bit, .timeout = 60)
{
    for (size_t a = 0; a < QV_ROWS(isas); a++)
        for (size_t i = 0; i < QV_ROWS(qv_moe_shapes); i++)
            for (size_t f = 0; f < QV_ROWS(forms); f += 4)
                check_mixed(isas[a], &qv_moe_shapes[i], &forms[f]);
}

/* Pairs whose expert is elsewhere add nothing, in any form. */
Test(moe_lora, pairs_that_are_left_out_add_nothing)
{
    const qv_moe_shape *s = &qv_moe_shapes[0];
    qv_backend *be = open_cpu(1);
    for (size_t f = 0; f < QV_ROWS(forms); f++) {
        layer *l = new_layer(s, 8, QV_F32);
        adapter ad = new_adapter(s, &forms[f], 43, 4);
        install_adapter(l, 1, &ad, 8, true);
        tokens t = new_tokens(s, 9, 1, one_start, one_slot);
        float *want = filled_floats(9 * s->d, NAN), *y = filled_floats(9 * s->d, NAN);
        for (int64_t p = 0; p < 9 * s->top_k; p += 3)
            t.weights[p] = 0; /* a weight of 0 is the same as not being there */
        run_layer(be, l, &t, true, want);
        for (int64_t p = 0; p < 9 * s->top_k; p += 3)
            t.ids[p] = -1;
        run_layer(be, l, &t, true, y);
        check_same(forms[f].name, y, want, 9 * s->d);
        free(want);
        free(y);
        free_tokens(&t);
        free_adapter(&ad);
        free_layer(l);
    }
    qv_backend_close(be);
}

Test(moe_lora, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    const qv_moe_shape *s = &qv_moe_shapes[2];
    layer *l = new_layer(s, 8, QV_F32);
    qv_moe_lora_site *site = &l->up.site;
    test_list list = new_list(s->n_experts, s->top_k, 2), other = new_list(6, s->top_k, 2);
    int32_t ids[] = {0, 1, 2, 3}, start[] = {0, 2}, slot = -1;
    route(be, &list.list, ids, 2, 1, start, &slot);
    route(be, &other.list, ids, 2, 1, start, &slot);
    float *m = filled_floats(10000, 0);
    qv_tensor x = qv_tensor_2d(m, QV_F32, 2, s->d), y = qv_tensor_2d(m, QV_F32, 4, l->n_up);
    qv_tensor x1 = qv_tensor_3d(m, QV_F32, 4, 2, 8);
    PASS(qv_op_moe_lora(be, site, &list.list, x, QV_MOE_TOKENS, x1, y));
    FAIL_WITH(QV_ERR_SHAPE, "a site of 5 experts, a list of 6",
              qv_op_moe_lora(be, site, &other.list, x, QV_MOE_TOKENS, x1, y));
    FAIL_WITH(QV_ERR_SHAPE, "x is f32[2, 37], but needs f32[4, 37]",
              qv_op_moe_lora(be, site, &list.list, x, QV_MOE_PAIRS, x1, y));
    FAIL_WITH(QV_ERR_LIMIT, "scratch for 3 pairs, but there are 4",
              qv_op_moe_lora(be, site, &list.list, x, QV_MOE_TOKENS, qv_tensor_rows(x1, 0, 3), y));
    FAIL_WITH(
        QV_ERR_SHAPE, "y is f32[4, 37], but needs f32[4, 38]",
        qv_op_moe_lora(be, site, &list.list, x, QV_MOE_TOKENS, x1, qv_tensor_2d(m, QV_F32, 4, 37)));
    site->dtype = QV_F16;
    FAIL_WITH(QV_ERR_UNSUPPORTED, "not F16",
              qv_op_moe_lora(be, site, &list.list, x, QV_MOE_TOKENS, x1, y));
    site->dtype = QV_F32;
    l->up.slice_start[1] = 99;
    FAIL_WITH(QV_ERR_SHAPE, "moe_lora: slice 1 starts at row 99",
              qv_op_moe_lora(be, site, &list.list, x, QV_MOE_TOKENS, x1, y));
    l->up.slice_start[1] = s->ffn;
    qv_tensor o = qv_tensor_2d(m, QV_F32, 4, s->d), w = qv_tensor_2d(m, QV_F32, 2, 2);
    FAIL_WITH(QV_ERR_SHAPE, "moe_combine: y is f32[2, 37], but needs f32[2, 38]",
              qv_op_moe_combine(be, &list.list, w, o, site, x1, x));
    FAIL_WITH(QV_ERR_SHAPE, "moe_combine: rows of 37 into rows of 38",
              qv_op_moe_combine(be, &list.list, w, o, site, x1, qv_tensor_2d(m, QV_F32, 2, 38)));
    site->max_rank = 600;
    FAIL_WITH(QV_ERR_LIMIT, "600, but 512",
              qv_op_moe_lora(be, site, &list.list, x, QV_MOE_TOKENS,
                             qv_tensor_3d(m, QV_F32, 4, 2, 600), y));
    free(m);
    free(list.memory);
    free(other.memory);
    free_layer(l);
    qv_backend_close(be);
}
