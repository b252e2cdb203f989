/* Routed experts on CUDA against the CPU, op by op: router, list, grouped GEMM, adapters, weighted
 * sum.
 */
#include "tests/ops/moe_pair.h"

static bool device_is_emulated(void)
{
    pair *p = open_pair();
    bool emulated = is_emulated(p->be[GPU]);
    close_pair(p);
    return emulated;
}

/* --- Router ------------------------------------------------------------------------------- */

typedef enum {
    DIFFERENT,
    TIES, /* whole numbers: among equals the first expert is chosen */
    FAR,  /* all but one so far below it that their scores of softmax are 0 */
} logits_kind;

static void check_router(const qv_router *r, int64_t n, int64_t n_experts, bool with_bias,
                         logits_kind kind)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(11);
    float *x = random_floats(&rng, n * n_experts, 4);
    for (int64_t i = 0; i < n * n_experts; i++)
        x[i] = kind == TIES ? roundf(x[i]) : kind == FAR && i % n_experts > 0 ? x[i] - 300 : x[i];
    both logits = f32_2d(p, x, n, n_experts), bias = random_f32(p, &rng, 1, n_experts, 0.3f);
    free(x);
    both weights = nan_f32(p, n, r->top_k);
    both_memory ids = alloc_both(p, (size_t)(n * r->top_k) * 4, (size_t)(n * r->top_k) * 4);
    for (int side = 0; side < 2; side++) {
        qv_router router = *r;
        if (with_bias)
            router.bias = qv_tensor_1d(bias.t[side].data, QV_F32, n_experts);
        PASS(qv_op_router(p->be[side], &router, logits.t[side],
                          qv_tensor_2d(ids.at[side], QV_I32, n, r->top_k), weights.t[side]));
    }
    char what[96];
    snprintf(what, sizeof what, "router, %lld tokens, %d of %lld experts, %d groups%s",
             (long long)n, r->top_k, (long long)n_experts, r->n_groups,
             kind == TIES  ? ", ties"
             : kind == FAR ? ", far apart"
                           : "");
    compare_i32(p, what, ids.at[CPU], ids.at[GPU], n * r->top_k);
    compare(p, what, weights, 1e-5, 1e-6);
    close_pair(p);
}

Test(cuda_moe, router_agrees_with_the_cpu, .timeout = 600)
{
    const qv_router softmax = {.kind = QV_ROUTER_SOFTMAX,
                               .top_k = 8,
                               .normalize = true,
                               .scale = 1,
                               .n_groups = 1,
                               .topk_groups = 1};
    qv_router sigmoid = {.kind = QV_ROUTER_SIGMOID,
                         .top_k = 6,
                         .normalize = true,
                         .scale = 2.5f,
                         .n_groups = 1,
                         .topk_groups = 1};
    check_router(&softmax, 1, 256, false, DIFFERENT);
    check_router(&softmax, 1, 256, false, FAR);
    check_router(&softmax, 67, 256, false, TIES);
    check_router(&softmax, 67, 256, false, FAR);
    check_router(&softmax, 3, 9, true, DIFFERENT);
    check_router(&sigmoid, 67, 128, true, DIFFERENT);
    for (logits_kind kind = DIFFERENT; kind <= FAR; kind++) { /* of prompts */
        check_router(&softmax, 515, 256, false, kind);
        check_router(&softmax, 515, 9, kind == DIFFERENT, kind);
        if (kind != FAR)
            check_router(&sigmoid, 515, 128, kind == DIFFERENT, kind);
    }
    sigmoid.top_k = 22;
    check_router(&sigmoid, 33, 512, true, DIFFERENT);
    check_router(&sigmoid, 513, 512, true, DIFFERENT);
    sigmoid.top_k = 4;
    sigmoid.n_groups = 8;
    sigmoid.topk_groups = 3;
    check_router(&sigmoid, 33, 64, true, DIFFERENT);
    check_router(&sigmoid, 513, 64, true, DIFFERENT);
    sigmoid.normalize = false;
    sigmoid.top_k = 40;
    check_router(&sigmoid, 5, 2048, false, DIFFERENT);
}

/* --- Lists -------------------------------------------------------------------------------- */

static void check_list(pair *p, const char *what, const lists *l)
{
    const qv_moe_list *c = &l->list[CPU], *g = &l->list[GPU];
    int32_t n_pairs = c->n_tokens * c->top_k, n_places = c->expert_start[c->n_experts];
    PASS(qv_backend_sync(p->be[GPU]));
    compare_i32(p, what, c->expert_start, g->expert_start, c->n_experts + 1);
    compare_i32(p, what, c->pair, g->pair, n_places);
    compare_i32(p, what, c->place, g->place, n_pairs);
    compare_i32(p, what, c->n_runs, g->n_runs, 1);
    compare_i32(p, what, (const int32_t *)c->runs, (const int32_t *)g->runs, 4 * *c->n_runs);
}

static void check_route(int32_t n_experts, int32_t first, int32_t top_k, int32_t n)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(12);
    int32_t *ids = must(malloc((size_t)(n * top_k) * 4));
    for (int64_t i = 0; i < (int64_t)n * top_k;
         i++) /* some are elsewhere, some experts are crowded */
        ids[i] = (int32_t)(qv_rng_range(&rng, -2, n_experts + 3) % (i % 3 ? n_experts + 3 : 5));
    const int32_t start[] = {0, n / 4, n / 4, n / 2, n - 1, n}, slot[] = {-1, 3, 0, 2, 1};
    lists l = route_both(p, ids, n_experts, first, top_k, n, 5, start, slot);
    char what[96];
    snprintf(what, sizeof what, "list of %d tokens, %d of %d experts", n, top_k, n_experts);
    check_list(p, what, &l);
    free(ids);
    close_pair(p);
}

Test(cuda_moe, lists_are_the_cpus, .timeout = 600)
{
    static const int32_t sizes[] = {1, 2, 64, 129, 1024, 3001};
    for (size_t i = 0; i < QV_ROWS(sizes); i++) {
        check_route(256, 0, 8, sizes[i]);
        check_route(512, 0, 22, sizes[i]);
        check_route(5, 1, 2, sizes[i]);
        check_route(1500, 7, 6, sizes[i]);
    }
}

/* --- Grouped GEMM and weighted sum -------------------------------------------------------- */

static const qv_moe_shape more_shapes[] = {{"tiles", 4, 2, 264, 136, true},
                                           {"crowded", 2, 1, 128, 72, false}};

/* [n, d] of the device, as bits; owned. */
static uint16_t *bits_of(pair *p, qv_tensor t)
{
    size_t bytes = (size_t)qv_tensor_count(&t) * sizeof(uint16_t);
    uint16_t *bits = must(malloc(bytes + 1));
    PASS(qv_backend_download(p->be[GPU], bits, t.data, bytes));
    return bits;
}

/* Both at once against one after the other, on the device: bit for bit. */
static void check_act(pair *p, const char *name, qv_weight *const *w, const lists *l, both x,
                      bool pairs, qv_act act, int64_t n_pairs, int64_t n_out)
{
    qv_backend *be = p->be[GPU];
    if (act == QV_ACT_SWIGLU && n_out % 2 != 0)
        return;
    int64_t f = act == QV_ACT_SWIGLU ? n_out / 2 : n_out;
    both wide = nan_act(p, n_pairs, n_out), once = nan_act(p, n_pairs, f),
         twice = nan_act(p, n_pairs, f);
    qv_moe_rows rows = pairs ? QV_MOE_PAIRS : QV_MOE_TOKENS;
    PASS(qv_op_moe_linear(be, w[GPU], &l->list[GPU], x.t[GPU], rows, wide.t[GPU]));
    PASS(act == QV_ACT_RELU2 ? qv_op_relu2(be, wide.t[GPU], twice.t[GPU])
                             : qv_op_swiglu(be, qv_tensor_cols(wide.t[GPU], 0, f),
                                            qv_tensor_cols(wide.t[GPU], f, f), twice.t[GPU]));
    PASS(qv_op_moe_linear_act(be, w[GPU], &l->list[GPU], x.t[GPU], rows, act, wide.t[GPU],
                              once.t[GPU]));
    int64_t n_places = l->list[CPU].expert_start[l->list[CPU].n_experts];
    uint16_t *a = bits_of(p, once.t[GPU]), *b = bits_of(p, twice.t[GPU]);
    for (int64_t i = 0; i < n_places * f; i++)
        cr_assert(a[i] == b[i], "moe_linear_act %s, %d: row %lld, column %lld: %04x, not %04x",
                  name, (int)act, (long long)(i / f), (long long)(i % f), a[i], b[i]);
    free(a);
    free(b);
}

/* ids [n, top_k] */
static void check_linear_of(const qv_moe_shape *s, int32_t n, const int32_t *ids, bool pairs)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(13);
    int64_t n_pairs = (int64_t)n * s->top_k, n_out = s->gated ? 2 * s->ffn : s->ffn;
    const int32_t start[] = {0, n}, slot[] = {-1};
    lists l = route_both(p, ids, s->n_experts, 0, s->top_k, n, 1, start, slot);
    qv_weight *w[2];
    load_both(p, &rng, s->n_experts, n_out, s->d, w);
    both x = random_act(p, &rng, pairs ? n_pairs : n, s->d, 1), y = nan_act(p, n_pairs, n_out);
    both weights = random_f32(p, &rng, n, s->top_k, 1), sum = nan_act(p, n, n_out);
    both stream = random_f32(p, &rng, n, n_out, 1), shared = random_f32(p, &rng, n, n_out, 1);
    both gate = random_act(p, &rng, n, 1, 3);
    for (int side = 0; side < 2; side++) {
        PASS(qv_op_moe_linear(p->be[side], w[side], &l.list[side], x.t[side],
                              pairs ? QV_MOE_PAIRS : QV_MOE_TOKENS, y.t[side]));
        PASS(qv_op_moe_combine(p->be[side], &l.list[side], weights.t[side], y.t[side], NULL,
                               (qv_tensor){0}, sum.t[side]));
        PASS(qv_op_moe_combine_f32(p->be[side], &l.list[side], weights.t[side], y.t[side], NULL,
                                   (qv_tensor){0}, shared.t[side], gate.t[side], stream.t[side]));
    }
    for (int act = QV_ACT_SWIGLU; act <= QV_ACT_RELU2; act++)
        check_act(p, s->name, w, &l, x, pairs, act, n_pairs, n_out);
    char what[96];
    snprintf(what, sizeof what, "moe_linear %s, %d tokens by %s", s->name, n,
             pairs ? "pair" : "token");
    compare(p, what, y, ROUNDED_ONCE);
    /* Of millions of sums some are small where weighted rows, rounded by themselves, are not. */
    compare(p, "moe_combine", sum, 0.0079, 0.016);
    compare(p, "moe_combine_f32", stream, 0.0079, 0.016);
    for (int side = 0; side < 2; side++)
        qv_weight_free(p->be[side], w[side]);
    close_pair(p);
}

static void check_linear(const qv_moe_shape *s, int32_t n, bool pairs)
{
    qv_rng rng = qv_rng_seed(17);
    int32_t *ids = random_ids(&rng, n, s->n_experts, s->top_k);
    for (int64_t i = 0; i < (int64_t)n * s->top_k; i += 7)
        ids[i] = -1;
    check_linear_of(s, n, ids, pairs);
    free(ids);
}

Test(cuda_moe, linear_and_combine_agree_with_the_cpu, .timeout = 600)
{
    static const int32_t sizes[] = {1, 3, 40, 700};
    for (size_t j = 0; j < QV_ROWS(sizes); j++)
        for (int pairs = 0; pairs < 2; pairs++) {
            for (size_t i = 0; i < QV_ROWS(qv_moe_shapes); i++)
                check_linear(&qv_moe_shapes[i], sizes[j], pairs);
            for (size_t i = 0; i < QV_ROWS(more_shapes); i++)
                check_linear(&more_shapes[i], sizes[j], pairs);
        }
}

/* On Hopper an expert's pairs, a row each, are shared out over items of up to 256, multiplied in
 * products of 32 to 256 columns; rows end inside of its tiles, and k is one step or many. */
Test(cuda_moe, prefill_agrees_with_the_cpu_for_any_number_of_pairs, .timeout = 600)
{
    static const qv_moe_shape shapes[] = {{"two tiles of rows", 3, 1, 200, 320, false},
                                          {"a tile and 1/3", 3, 1, 64, 344, false},
                                          {"crowded", 6, 3, 72, 136, true},
                                          {"nine steps of k", 3, 1, 520, 328, false},
                                          {"nine steps of k, gated", 3, 1, 520, 200, true}};
    static const int32_t sizes[] = {60, 200, 390, 455, 480, 530, 600, 700, 790, 1000};
    for (size_t j = 0; j < QV_ROWS(sizes); j++)
        for (size_t i = 0; i < QV_ROWS(shapes); i++)
            check_linear(&shapes[i], sizes[j], true);
}

/* With k up to 512 and 192 pairs an expert on average, a cluster of Hopper's holds up to 288 pairs
 * while 1024 rows, 64 a tile, go past: passes over a matrix for more, none and one, tiles and pairs
 * that are odd in number, rows that end inside of a tile, and k of which the last step is short. */
Test(cuda_moe, short_k_agrees_with_the_cpu_for_any_number_of_pairs, .timeout = 600)
{
    enum { EXPERTS = 36, MOST = 8192 }; /* more experts than a warp looks at once */
    static const qv_moe_shape shapes[] = {{"all of k", EXPERTS, 1, 512, 208, false},
                                          {"an item of one tile", EXPERTS, 1, 72, 1072, false},
                                          {"one step of k, one tile", EXPERTS, 1, 64, 48, false},
                                          {"five tiles, gated", EXPERTS, 1, 328, 160, true}};
    static const int32_t counts[][EXPERTS] = {
        {0, 1, 289, 40, 0, 577, [20] = 5441, [33] = 288, 3, 287},
        {[7] = 41, 64, 129, 151, 0, 0, 175, 191, 207, [32] = 255, [35] = 5700},
        {[0] = 6865, [31] = 20, 77, [35] = 15},
    };
    static int32_t ids[MOST];
    bool few = device_is_emulated();
    for (size_t j = 0; j < QV_ROWS(counts); j++) {
        int32_t n = 0;
        for (int32_t expert = 0; expert < EXPERTS; expert++)
            for (int32_t i = 0; i < counts[j][expert]; i++)
                ids[n++] = expert;
        cr_assert(n >= 192 * EXPERTS && n <= MOST);
        for (int32_t i = 0; i < n; i++) { /* in no order */
            int32_t other = (int32_t)((int64_t)i * 7919 % n), id = ids[i];
            ids[i] = ids[other];
            ids[other] = id;
        }
        for (size_t i = 0; i < QV_ROWS(shapes); i++)
            if (!few || (i + j) % 2 == 0)
                check_linear_of(&shapes[i], n, ids, true);
    }
}

/* So many experts that each cluster has several items, of three tiles or one. */
Test(cuda_moe, short_k_agrees_with_the_cpu_item_after_item, .timeout = 600)
{
    enum { EXPERTS = 300, PAIRS = 192 * EXPERTS + 5 };
    static const qv_moe_shape shapes[] = {{"three tiles", EXPERTS, 1, 136, 176, false},
                                          {"a tile", EXPERTS, 1, 200, 64, false}};
    qv_rng rng = qv_rng_seed(18);
    int32_t *ids = random_ids(&rng, PAIRS, EXPERTS, 1);
    for (int32_t i = 0; i < PAIRS; i += 2)
        ids[i] += ids[i] % 3 == 0; /* some have half as many, some more than are held at once */
    for (size_t i = 0; i < QV_ROWS(shapes); i++)
        check_linear_of(&shapes[i], PAIRS, ids, true);
    free(ids);
}

/* 36 pairs an expert: on Hopper they get a row each, that of their token. */
Test(cuda_moe, gathered_rows_are_those_of_the_pairs)
{
    enum { TOKENS = 90, EXPERTS = 5, TOP_K = 2, D = 136 };
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(19);
    int32_t *ids = random_ids(&rng, TOKENS, EXPERTS, TOP_K);
    for (int i = 0; i < TOKENS * TOP_K; i += 7)
        ids[i] = -1;
    const int32_t start[] = {0, TOKENS}, slot[] = {-1};
    lists l = route_both(p, ids, EXPERTS, 0, TOP_K, TOKENS, 1, start, slot);
    both x = random_act(p, &rng, TOKENS, D, 1), room = nan_act(p, TOKENS * TOP_K, D);
    qv_tensor rows_of = x.t[GPU];
    qv_moe_rows rows;
    PASS(qv_op_moe_gather(p->be[GPU], &l.list[GPU], room.t[GPU], &rows_of, &rows));
    cr_assert_eq(rows, is_hopper(p) ? QV_MOE_PAIRS : QV_MOE_TOKENS);
    cr_assert(rows_of.data == (rows == QV_MOE_PAIRS ? room : x).t[GPU].data);
    uint16_t *from = bits_of(p, x.t[GPU]), *to = bits_of(p, room.t[GPU]);
    const qv_moe_list *list = &l.list[CPU];
    for (int32_t place = 0; place < TOKENS * TOP_K; place++) {
        bool taken = rows == QV_MOE_PAIRS && place < list->expert_start[EXPERTS];
        for (int i = 0; i < D; i++) {
            uint16_t value = to[place * D + i];
            if (taken)
                cr_assert(value == from[list->pair[place] / TOP_K * D + i], "place %d", place);
            else
                cr_assert((value & 0x7fff) > 0x7f80, "place %d has been written", place);
        }
    }
    free(from);
    free(to);
    free(ids);
    close_pair(p);
}

/* --- Adapters ----------------------------------------------------------------------------- */

static void check_adapters(const qv_moe_shape *s, size_t form, int32_t n)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(14);
    int64_t n_pairs = (int64_t)n * s->top_k, n_up = s->gated ? 2 * s->ffn : s->ffn;
    int32_t *ids = random_ids(&rng, n, s->n_experts, s->top_k), max_rank = form == 2 ? 48 : 16;
    for (int64_t i = 3; i < n_pairs; i += 11)
        ids[i] = -1;
    const int32_t start[] = {0, n / 5, n / 2, n / 2, n * 3 / 4, n - n / 6, n};
    const int32_t slot[] = {-1, 0, 1, 2, 1, 3};
    lists l = route_both(p, ids, s->n_experts, 0, s->top_k, n, 6, start, slot);
    part_pool *up = new_pool(p, s, true, max_rank), *down = new_pool(p, s, false, max_rank);
    add_form(p, up, down, &rng, form);
    both x = random_act(p, &rng, n, s->d, 1), h = random_act(p, &rng, n_pairs, n_up, 1);
    both a = random_act(p, &rng, n_pairs, s->ffn, 1), o = random_act(p, &rng, n_pairs, s->d, 1);
    both weights = random_f32(p, &rng, n, s->top_k, 1), y = nan_act(p, n, s->d);
    both scratch = nan_f32(p, n_pairs, 2 * max_rank);
    for (int side = 0; side < 2; side++) {
        qv_backend *be = p->be[side];
        const qv_moe_list *list = &l.list[side];
        qv_tensor x1 =
            qv_tensor_3d(scratch.t[side].data, QV_F32, n_pairs, up->site[side].n_slices, max_rank);
        PASS(qv_op_moe_lora(be, &up->site[side], list, x.t[side], QV_MOE_TOKENS, x1, h.t[side]));
        x1 = qv_tensor_3d(scratch.t[side].data, QV_F32, n_pairs, 1, max_rank);
        PASS(qv_op_moe_lora(be, &down->site[side], list, a.t[side], QV_MOE_PAIRS, x1, o.t[side]));
        PASS(qv_op_moe_combine(be, list, weights.t[side], o.t[side], &down->site[side], x1,
                               y.t[side]));
    }
    char what[96];
    snprintf(what, sizeof what, "moe_lora %s, form %zu, %d tokens", s->name, form, n);
    compare(p, what, h, ROUNDED_ONCE);
    compare(p, what, o, ROUNDED_ONCE);
    compare(p, what, y, 0.0079, 0.008);
    free(up);
    free(down);
    free(ids);
    close_pair(p);
}

Test(cuda_moe, adapters_agree_with_the_cpu, .timeout = 600)
{
    static const int32_t sizes[] = {1, 12, 170, 700};
    for (size_t i = 0; i < QV_ROWS(qv_moe_shapes); i++)
        for (size_t form = 0; form < QV_ROWS(forms); form++)
            for (size_t j = 0; j < QV_ROWS(sizes); j++)
                check_adapters(&qv_moe_shapes[i], form, sizes[j]);
    for (size_t i = 0; i < QV_ROWS(more_shapes); i++)
        for (size_t form = 0; form < QV_ROWS(forms); form++)
            check_adapters(&more_shapes[i], form, 900);
}

/* --- Router and list at once -------------------------------------------------------------- */

/* One token, of experts [first, first + n_here), which this rank has. n_segs 0: without segments;
 * else the token is in one of adapter `slot`. */
static void check_choose(const qv_router *r, int32_t n_experts, int32_t first, int32_t n_here,
                         bool with_bias, int32_t n_segs, int32_t slot)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(15);
    float *values = random_floats(&rng, n_experts + 3, 4);
    for (int64_t i = 0; i < n_experts + 3; i += 11)
        values[i] = i % 2 == 0 || r->kind == QV_ROUTER_SOFTMAX ? 1 : INFINITY; /* equals */
    both wide = f32_2d(p, values, 1, n_experts + 3);
    both bias = random_f32(p, &rng, 1, n_experts, 0.3f);
    both weights = nan_f32(p, 1, r->top_k), apart = nan_f32(p, 1, r->top_k);
    size_t bytes = qv_moe_list_bytes(n_here, r->top_k, 1), ids_bytes = (size_t)r->top_k * 4;
    char *garbage = must(malloc(bytes));
    memset(garbage, 0xA5, bytes);
    both_memory memory = upload_both(p, garbage, bytes);
    both_memory ids = alloc_both(p, ids_bytes, ids_bytes);
    both_memory ids_apart = alloc_both(p, ids_bytes, ids_bytes);
    const int32_t start[] = {0, 0, 1, 1}, slots[] = {3, slot, 1};
    both_memory starts = upload_both(p, start, sizeof start),
                of_segs = upload_both(p, slots, sizeof slots);
    lists l;
    for (int side = 0; side < 2; side++) {
        qv_router router = *r;
        qv_tensor logits = qv_tensor_cols(wide.t[side], 1, n_experts);
        if (with_bias)
            router.bias = qv_tensor_1d(bias.t[side].data, QV_F32, n_experts);
        PASS(qv_moe_list_init(&l.list[side], n_here, r->top_k, 1, memory.at[side]));
        l.list[side].first_expert = first;
        PASS(qv_op_choose(p->be[side], &router, logits,
                          qv_tensor_2d(ids.at[side], QV_I32, 1, r->top_k), weights.t[side], n_segs,
                          starts.at[side], of_segs.at[side], &l.list[side], NULL));
        PASS(qv_op_router(p->be[side], &router, logits,
                          qv_tensor_2d(ids_apart.at[side], QV_I32, 1, r->top_k), apart.t[side]));
    }
    char what[128];
    snprintf(what, sizeof what,
             "choose %d of %d experts from %d on, %d groups, %d segs, adapter in slot %d", r->top_k,
             n_experts, first, r->n_groups, n_segs, slot);
    compare_i32(p, what, ids.at[CPU], ids.at[GPU], r->top_k);
    check_list(p, what, &l);
    float *a = fetch(p, GPU, weights.t[GPU]), *b = fetch(p, GPU, apart.t[GPU]);
    check_same(what, a, b, r->top_k);
    free(a);
    free(b);
    free(garbage);
    free(values);
    close_pair(p);
}

Test(cuda_moe, router_and_list_at_once_are_those_of_two_ops, .timeout = 600)
{
    static const struct {
        int32_t n_experts, top_k, n_groups, topk_groups, first, n_here;
        bool sigmoid, bias;
    } cases[] = {
        {256, 8, 1, 1, 0, 256, false, false},  /* Qwen3.5-35B */
        {256, 8, 1, 1, 64, 64, false, false},  /* a rank of four */
        {128, 6, 1, 1, 0, 128, true, true},    /* Nano */
        {512, 22, 1, 1, 0, 512, true, true},   /* Super */
        {64, 4, 8, 3, 8, 40, true, true},      /* groups */
        {9, 3, 1, 1, 0, 9, false, true},       /* nothing is a multiple of anything */
        {1000, 30, 4, 2, 999, 1, true, false}, /* most of it elsewhere */
        {2000, 3, 1, 1, 0, 2000, true, false}, /* by two launches */
        {40, 40, 1, 1, 0, 40, false, false},   /* everybody */
        {1024, 300, 1, 1, 0, 1024, true, true},
    };
    for (size_t i = 0; i < QV_ROWS(cases); i++)
        for (int way = 0; way < 3;
             way++) { /* without segments; in one of the base; of an adapter */
            const qv_router r = {.kind = cases[i].sigmoid ? QV_ROUTER_SIGMOID : QV_ROUTER_SOFTMAX,
                                 .top_k = cases[i].top_k,
                                 .normalize = true,
                                 .scale = 2.5f,
                                 .n_groups = cases[i].n_groups,
                                 .topk_groups = cases[i].topk_groups};
            check_choose(&r, cases[i].n_experts, cases[i].first, cases[i].n_here, cases[i].bias,
                         way > 0 ? 3 : 0, way > 1 ? 2 : -1);
        }
}

/* --- A product beside the choice ---------------------------------------------------------- */

/* `next` numbers of a weight that is read later; 0: none. */
static void check_beside(int32_t n, int64_t n_out, int64_t n_in, int64_t next)
{
    enum { EXPERTS = 64, TOP_K = 4 };
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(16);
    const qv_router router = {.top_k = TOP_K, .scale = 1, .n_groups = 1, .topk_groups = 1};
    const qv_tensor none = {.data = NULL};
    both logits = random_f32(p, &rng, n, EXPERTS, 1), weights = nan_f32(p, n, TOP_K);
    both from = random_act(p, &rng, n, n_in, 1), x = nan_act(p, n, n_in);
    both y = nan_f32(p, n, n_out), apart = nan_f32(p, n, n_out);
    size_t bytes = qv_moe_list_bytes(EXPERTS, TOP_K, n), ids_bytes = (size_t)(n * TOP_K) * 4;
    both_memory memory = alloc_both(p, bytes, bytes), ids = alloc_both(p, ids_bytes, ids_bytes);
    for (int side = 0; side < 2; side++) {
        qv_backend *be = p->be[side];
        qv_moe_list list;
        qv_weight *w, *later = NULL;
        PASS(qv_weight_new(be, n_out, n_in, QV_BF16, &w));
        PASS(qv_weight_fill(be, w, 0.05f, 1));
        if (next > 0)
            PASS(qv_weight_new(be, next, 1, QV_BF16, &later));
        PASS(qv_moe_list_init(&list, EXPERTS, TOP_K, n, memory.at[side]));
        PASS(qv_op_relu2(be, from.t[side], x.t[side])); /* the launch right in front */
        PASS(qv_op_choose(be, &router, logits.t[side], qv_tensor_2d(ids.at[side], QV_I32, n, TOP_K),
                          weights.t[side], 0, NULL, NULL, &list,
                          &(qv_beside){.w = w, .x = x.t[side], .y = y.t[side], .next = later}));
        qv_weight_free(be, later); /* the launch is behind: nobody comes back to it */
        PASS(qv_op_linear_f32(be, w, x.t[side], none, apart.t[side]));
        float *a = fetch(p, side, y.t[side]), *b = fetch(p, side, apart.t[side]);
        check_same("beside", a, b, n * n_out);
        free(a);
        free(b);
        qv_weight_free(be, w);
    }
    compare_i32(p, "beside", ids.at[CPU], ids.at[GPU], n * TOP_K);
    close_pair(p);
}

Test(cuda_moe, a_product_beside_the_choice_is_that_of_its_op)
{
    static const int64_t shapes[][2] = {
        {2048, 512},
        {300, 3712},
        {64, 33}, /* not by the streaming kernel */
        {3, 64},  /* few rows */
    };
    static const int32_t sizes[] = {1, 2, 9};
    for (size_t i = 0; i < QV_ROWS(shapes); i++)
        for (size_t j = 0; j < QV_ROWS(sizes); j++)
            check_beside(sizes[j], shapes[i][0], shapes[i][1], 0);
    static const int64_t next[] = {1, 8, 8197, 16 << 20}; /* numbers, of two bytes */
    for (size_t i = 0; i < QV_ROWS(next); i++)
        check_beside(1, 512, 64, next[i]);
}

/* --- Choice and both products ------------------------------------------------------------- */

typedef struct {
    qv_router_kind kind;
    int32_t n_experts, top_k, first, n_here; /* of the router; from `first` on, here */
    int64_t d, ffn;
    qv_act act;
    bool bias;
    int64_t beside[2]; /* rows and columns of a product; 0: none */
} experts_case;

static qv_weight *made_up(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in)
{
    qv_weight *w;
    PASS(n_experts > 0 ? qv_weight_new_experts(be, n_experts, n_out, n_in, QV_BF16, &w)
                       : qv_weight_new(be, n_out, n_in, QV_BF16, &w));
    PASS(qv_weight_fill(be, w, 0.05f, (uint64_t)n_out));
    return w;
}

/* Memory of the device, `size` bytes at each. */
static void check_bytes(pair *p, const char *what, const void *got, const void *want, size_t size)
{
    uint8_t *a = must(malloc(size + 1)), *b = must(malloc(size + 1));
    if (size > 0) {
        PASS(qv_backend_download(p->be[GPU], a, got, size));
        PASS(qv_backend_download(p->be[GPU], b, want, size));
    }
    for (size_t i = 0; i < size; i++)
        cr_assert_eq(a[i], b[i], "%s: byte %zu of %zu is %02x, not %02x", what, i, size, a[i],
                     b[i]);
    free(a);
    free(b);
}

/* Both on the device. How many places they have. */
static int32_t check_lists(pair *p, const qv_moe_list *got, const qv_moe_list *want)
{
    int32_t n_places, n_runs;
    PASS(qv_backend_download(p->be[GPU], &n_places, want->expert_start + want->n_experts, 4));
    PASS(qv_backend_download(p->be[GPU], &n_runs, want->n_runs, 4));
    check_bytes(p, "starts", got->expert_start, want->expert_start,
                ((size_t)want->n_experts + 1) * 4);
    check_bytes(p, "pairs", got->pair, want->pair, (size_t)n_places * 4);
    check_bytes(p, "places", got->place, want->place, (size_t)want->top_k * 4);
    check_bytes(p, "number of runs", got->n_runs, want->n_runs, 4);
    check_bytes(p, "runs", got->runs, want->runs, (size_t)n_runs * sizeof *want->runs);
    check_bytes(p, "next item", got->next_item, want->next_item, 4);
    check_bytes(p, "work", got->work, want->work, 8 + (size_t)n_places * 8);
    return n_places;
}

/* What one token's step leaves. */
typedef struct {
    both weights, y, wide, more;
    both_memory ids, memory;
    qv_moe_list list;
} experts_step;

static experts_step new_step(pair *p, const experts_case *s, int64_t n_wide)
{
    size_t bytes = qv_moe_list_bytes(s->n_here, s->top_k, 1), ids = (size_t)s->top_k * 4;
    experts_step step = {.weights = nan_f32(p, 1, s->top_k),
                         .y = nan_act(p, s->top_k, s->d),
                         .wide = nan_act(p, s->top_k, n_wide),
                         .more = nan_f32(p, 1, s->beside[0] + 1),
                         .ids = alloc_both(p, ids, ids),
                         .memory = alloc_both(p, bytes, bytes)};
    PASS(qv_moe_list_init(&step.list, s->n_here, s->top_k, 1, step.memory.at[GPU]));
    step.list.first_expert = s->first;
    return step;
}

/* Of one token on the device, with and without the op of all. */
static void check_experts(const experts_case *s, int32_t n_segs)
{
    pair *p = open_pair();
    qv_backend *be = p->be[GPU];
    qv_rng rng = qv_rng_seed(17);
    int64_t n_wide = s->act == QV_ACT_SWIGLU ? 2 * s->ffn : s->ffn;
    qv_router router = {.kind = s->kind, .top_k = s->top_k, .normalize = true, .scale = 2.5f};
    router.n_groups = router.topk_groups = 1;
    qv_weight *in = made_up(be, s->n_here, n_wide, s->d),
              *out = made_up(be, s->n_here, s->d, s->ffn), *next = made_up(be, 0, 4096, 16),
              *side = s->beside[0] > 0 ? made_up(be, 0, s->beside[0], s->beside[1]) : NULL;
    both from = random_act(p, &rng, 1, s->d, 1), x = nan_act(p, 1, s->d);
    both logits = random_f32(p, &rng, 1, s->n_experts, 2);
    both bias = random_f32(p, &rng, 1, s->n_experts, 0.3f);
    if (s->bias)
        router.bias = qv_tensor_1d(bias.t[GPU].data, QV_F32, s->n_experts);
    both hidden = random_act(p, &rng, 1, s->beside[1] + 1, 1);
    const int32_t start[] = {0, 0, 1, 1}, slots[] = {3, 2, 1};
    both_memory starts = upload_both(p, start, sizeof start),
                of_segs = upload_both(p, slots, sizeof slots);
    experts_step steps[2];
    for (int apart = 0; apart < 2; apart++) {
        experts_step *step = &steps[apart];
        *step = new_step(p, s, n_wide);
        qv_tensor ids = qv_tensor_2d(step->ids.at[GPU], QV_I32, 1, s->top_k);
        const qv_experts e = {.in = in,
                              .out = out,
                              .act = s->act,
                              .x = x.t[GPU],
                              .wide = step->wide.t[GPU],
                              .inner = qv_tensor_cols(step->wide.t[GPU], 0, s->ffn),
                              .y = step->y.t[GPU]};
        const qv_beside beside = {.w = side,
                                  .x = qv_tensor_cols(hidden.t[GPU], 0, s->beside[1]),
                                  .y = qv_tensor_cols(step->more.t[GPU], 0, s->beside[0]),
                                  .next = next};
        PASS(qv_op_relu2(be, from.t[GPU], x.t[GPU])); /* the launch right in front */
        if (!apart) {
            PASS(qv_op_choose_experts(be, &router, logits.t[GPU], ids, step->weights.t[GPU], n_segs,
                                      starts.at[GPU], of_segs.at[GPU], &step->list, &beside, &e));
            continue;
        }
        PASS(qv_op_choose(be, &router, logits.t[GPU], ids, step->weights.t[GPU], n_segs,
                          starts.at[GPU], of_segs.at[GPU], &step->list, &beside));
        PASS(qv_op_moe_linear_act(be, in, &step->list, e.x, QV_MOE_TOKENS, e.act, e.wide, e.inner));
        PASS(qv_op_moe_linear(be, out, &step->list, e.inner, QV_MOE_PAIRS, e.y));
    }
    size_t chosen = (size_t)s->top_k * 4;
    check_bytes(p, "ids", steps[0].ids.at[GPU], steps[1].ids.at[GPU], chosen);
    check_bytes(p, "weights", steps[0].weights.t[GPU].data, steps[1].weights.t[GPU].data, chosen);
    size_t n_places = (size_t)check_lists(p, &steps[0].list, &steps[1].list);
    check_bytes(p, "y", steps[0].y.t[GPU].data, steps[1].y.t[GPU].data, n_places * s->d * 2);
    float *a = fetch(p, GPU, steps[0].more.t[GPU]), *b = fetch(p, GPU, steps[1].more.t[GPU]);
    for (int64_t i = 0; i < s->beside[0]; i++) /* in an order of its own */
        cr_assert(fabsf(a[i] - b[i]) <= 1e-4f * (1 + fabsf(b[i])), "beside, %lld: %g, not %g",
                  (long long)i, (double)a[i], (double)b[i]);
    free(a);
    free(b);
    qv_weight_free(be, in);
    qv_weight_free(be, out);
    qv_weight_free(be, next);
    qv_weight_free(be, side);
    close_pair(p);
}

Test(cuda_moe, one_tokens_experts_are_those_of_ops_apart, .timeout = 600)
{
    static const experts_case cases[] = {
        {QV_ROUTER_SOFTMAX, 256, 8, 0, 256, 2048, 512, QV_ACT_SWIGLU, false, {2048, 512}}, /* 35B */
        {QV_ROUTER_SIGMOID, 128, 6, 0, 128, 2688, 1856, QV_ACT_RELU2, true, {2688, 3712}}, /* Nano
                                                                                            */
        {QV_ROUTER_SIGMOID, 512, 22, 0, 512, 136, 72, QV_ACT_RELU2, true, {0, 0}},
        {QV_ROUTER_SOFTMAX, 64, 8, 16, 16, 136, 40, QV_ACT_SWIGLU, true, {100, 24}}, /* a rank */
        {QV_ROUTER_SOFTMAX, 64, 2, 63, 1, 64, 48, QV_ACT_SWIGLU, true, {70, 8}}, /* hardly any */
        {QV_ROUTER_SIGMOID, 9, 3, 0, 9, 64, 24, QV_ACT_RELU2, true, {3, 64}},
        {QV_ROUTER_SOFTMAX, 9, 9, 0, 9, 37, 19, QV_ACT_SWIGLU, false, {64, 33}},   /* no vectors */
        {QV_ROUTER_SOFTMAX, 600, 4, 0, 600, 64, 32, QV_ACT_SWIGLU, false, {0, 0}}, /* too many */
    };
    bool few = device_is_emulated();
    for (size_t i = 0; i < QV_ROWS(cases); i++)
        for (int32_t n_segs = 0; n_segs <= 3; n_segs += 3)
            if (!few || n_segs == (i % 2 ? 3 : 0))
                check_experts(&cases[i], n_segs);
}

/* --- Weighted sum, residual and norm at once ---------------------------------------------- */

typedef struct {
    int32_t top_k;
    int64_t d;
    bool shared, gate, rest, adapters;
} sum_case;

static void check_sum(const sum_case *s, int32_t n)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(16);
    const qv_moe_shape shape = {"sum", 40, s->top_k, s->d, 24, false};
    int64_t n_pairs = (int64_t)n * s->top_k;
    int32_t *ids = random_ids(&rng, n, shape.n_experts, s->top_k);
    for (int64_t i = 2; i < n_pairs; i += 7)
        ids[i] = -1;
    const int32_t start[] = {0, n / 4, n / 2, n}, slot[] = {-1, 0, 1};
    lists l = route_both(p, ids, shape.n_experts, 0, s->top_k, n, 3, start, slot);
    both o = random_act(p, &rng, n_pairs, s->d, 1), a = random_act(p, &rng, n_pairs, shape.ffn, 1);
    both weights = random_f32(p, &rng, n, s->top_k, 1), w = random_f32(p, &rng, 1, s->d, 1);
    both shared = random_f32(p, &rng, n, s->d, 1), gate = random_act(p, &rng, n, 1, 3);
    float *stream = random_floats(&rng, n * s->d, 2);
    both residual = f32_2d(p, stream, n, s->d), apart = f32_2d(p, stream, n, s->d);
    both delta = nan_f32(p, n, s->d), y = nan_act(p, n, s->d), y_apart = nan_act(p, n, s->d);
    both rest = nan_act(p, n, s->d), rest_apart = nan_act(p, n, s->d);
    part_pool *down = new_pool(p, &shape, false, 16);
    add_part(p, down, &rng, 0, 9, 12, false, true, 0);
    add_part(p, down, &rng, 1, 16, 16, false, false, 0);
    upload_slots(p, down);
    both scratch = nan_f32(p, n_pairs, 16), again = nan_f32(p, n_pairs, 16); /* it is used up */
    const qv_tensor none = {.data = NULL};
    for (int side = 0; side < 2; side++) {
        qv_backend *be = p->be[side];
        qv_moe_sum sum = {.list = &l.list[side], .weights = weights.t[side], .o = o.t[side]};
        qv_tensor gain = qv_tensor_1d(w.t[side].data, QV_F32, s->d);
        if (s->shared)
            sum.shared = shared.t[side];
        if (s->gate)
            sum.gate = gate.t[side];
        if (s->adapters) {
            sum.site = &down->site[side];
            sum.scratch = qv_tensor_3d(scratch.t[side].data, QV_F32, n_pairs, 1, 16);
            PASS(qv_op_moe_lora(be, sum.site, sum.list, a.t[side], QV_MOE_PAIRS, sum.scratch,
                                o.t[side]));
            PASS(qv_backend_copy(be, again.t[side].data, scratch.t[side].data,
                                 (size_t)n_pairs * 16 * sizeof(float)));
        }
        PASS(qv_op_combine_add_rms_norm(be, &sum, residual.t[side], delta.t[side], gain, 1e-6f,
                                        true, y.t[side], s->rest ? rest.t[side] : none));
        if (side == CPU)
            continue;
        if (strcmp(qv_backend_name(be), "cuda") == 0) {
            /* It is one kernel where the sum has not been written. */
            float *between = fetch(p, GPU, delta.t[GPU]);
            cr_assert_eq(isnan(between[0]) != 0, s->d % 8 == 0,
                         "%d tokens, %lld columns: sum and norm in %s", n, (long long)s->d,
                         isnan(between[0]) ? "one kernel" : "two");
            free(between);
        }
        sum.scratch.data = s->adapters ? again.t[side].data : NULL;
        PASS(qv_op_moe_combine_f32(be, sum.list, sum.weights, sum.o, sum.site, sum.scratch,
                                   sum.shared, sum.gate, delta.t[side]));
        PASS(qv_op_add_rms_norm(be, apart.t[side], delta.t[side], gain, 1e-6f, true,
                                y_apart.t[side], s->rest ? rest_apart.t[side] : none));
    }
    char what[128];
    snprintf(what, sizeof what, "sum of %d into %lld columns, %d tokens%s%s%s", s->top_k,
             (long long)s->d, n, s->shared ? ", shared" : "", s->gate ? ", gate" : "",
             s->adapters ? ", adapters" : "");
    const both got[] = {residual, y, rest}, want[] = {apart, y_apart, rest_apart};
    for (int i = 0; i < 3; i++) {
        float *x = fetch(p, GPU, got[i].t[GPU]), *z = fetch(p, GPU, want[i].t[GPU]);
        check_same(what, x, z, n * s->d);
        free(x);
        free(z);
    }
    compare(p, what, residual, 0.0079, 0.008);
    compare(p, what, y, 0.0079, 0.008);
    free(down);
    free(stream);
    free(ids);
    close_pair(p);
}

Test(cuda_moe, sum_and_norm_at_once_are_those_of_two_ops, .timeout = 600)
{
    static const sum_case cases[] = {
        {8, 2048, true, true, true, false},  /* Qwen3.5-35B */
        {6, 2688, true, false, true, false}, /* Nano */
        {10, 4096, true, true, true, true},  /* Qwen3.5-397B */
        {22, 5120, false, false, false, true}, {3, 136, true, true, false, true},
        {1, 37, true, true, true, true}, /* no vectors */
    };
    static const int32_t sizes[] = {1, 4, 9, 70};
    for (size_t i = 0; i < QV_ROWS(cases); i++)
        for (size_t j = 0; j < QV_ROWS(sizes); j++)
            check_sum(&cases[i], sizes[j]);
}
