/* Routed experts: the choice, the list of pairs, the grouped GEMM and the weighted sum. */
#include "tests/ops/moe_test.h"

/* --- router -------------------------------------------------------------------------------------
 */

typedef struct {
    const char *name;
    qv_router_kind kind;
    int32_t n_experts, top_k, n_groups, topk_groups;
    bool normalize, bias;
    float scale;
} router_row;

static const router_row router_rows[] = {
    {"Qwen3.5-35B-A3B", QV_ROUTER_SOFTMAX, 256, 8, 1, 1, true, false, 1},
    {"Nemotron-3 Super", QV_ROUTER_SIGMOID, 512, 22, 1, 1, true, true, 5},
    {"Nemotron-3 Nano", QV_ROUTER_SIGMOID, 128, 6, 1, 1, true, true, 2.5f},
    {"tiny-nemotron3-super", QV_ROUTER_SIGMOID, 16, 4, 4, 2, true, true, 5},
    {"groups of one", QV_ROUTER_SIGMOID, 6, 2, 6, 3, true, true, 1},
    {"softmax with groups and bias", QV_ROUTER_SOFTMAX, 24, 5, 3, 2, false, true, 2},
    {"not normalised", QV_ROUTER_SIGMOID, 17, 3, 1, 1, false, false, 1},
    {"all of them", QV_ROUTER_SOFTMAX, 5, 5, 1, 1, true, false, 1},
    {"one", QV_ROUTER_SOFTMAX, 1, 1, 1, 1, true, false, 3},
};

static qv_router make_router(const router_row *row, float *bias)
{
    return (qv_router){
        .kind = row->kind,
        .top_k = row->top_k,
        .normalize = row->normalize,
        .scale = row->scale,
        .bias = row->bias ? qv_tensor_1d(bias, QV_F32, row->n_experts) : (qv_tensor){0},
        .n_groups = row->n_groups,
        .topk_groups = row->topk_groups,
    };
}

static void run_router(qv_backend *be, const qv_router *r, float *logits, int64_t n,
                       int64_t n_experts, int32_t *ids, float *weights)
{
    PASS(qv_op_router(be, r, qv_tensor_2d(logits, QV_F32, n, n_experts),
                      qv_tensor_2d(ids, QV_I32, n, r->top_k),
                      qv_tensor_2d(weights, QV_F32, n, r->top_k)));
}

/* How many of value[0 .. n) come before index i: larger, or equal and of a lower index. */
static int n_before(const double *value, int n, int i)
{
    int before = 0;
    for (int k = 0; k < n; k++)
        before += value[k] > value[i] || (value[k] == value[i] && k < i);
    return before;
}

/* Sum of the two highest of n values. */
static double best_two(const double *value, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += n_before(value, n, i) < 2 ? value[i] : 0;
    return sum;
}

/* One row by the definition, by counting what comes before instead of sorting. */
static void router_oracle(const router_row *row, const float *logits, const float *bias,
                          int32_t *ids, double *weights)
{
    double score[512], biased[512], group[512], max = -INFINITY, sum = 0;
    int n = row->n_experts, each = n / row->n_groups;
    for (int e = 0; e < n; e++)
        max = fmax(max, logits[e]);
    for (int e = 0; e < n; e++)
        sum += exp(logits[e] - max);
    for (int e = 0; e < n; e++) {
        score[e] =
            row->kind == QV_ROUTER_SOFTMAX ? exp(logits[e] - max) / sum : sigmoid_d(logits[e]);
        biased[e] = score[e] + (row->bias ? bias[e] : 0);
    }
    for (int g = 0; g < row->n_groups; g++)
        group[g] = best_two(biased + g * each, each);
    for (int e = 0; e < n; e++)
        if (n_before(group, row->n_groups, e / each) >= row->topk_groups)
            biased[e] = -INFINITY;
    sum = 0;
    for (int e = 0; e < n; e++) {
        int rank = n_before(biased, n, e);
        if (rank < row->top_k) {
            ids[rank] = e;
            weights[rank] = score[e];
            sum += score[e];
        }
    }
    for (int j = 0; j < row->top_k; j++)
        weights[j] *= row->scale / (row->normalize ? sum : 1);
}

Test(router, agrees_with_double)
{
    enum { T = 40 };
    FOR_EACH_ISA(be, 2)
    for (size_t i = 0; i < QV_ROWS(router_rows); i++) {
        const router_row *row = &router_rows[i];
        qv_rng rng = qv_rng_seed(1);
        int64_t n = row->n_experts, k = row->top_k;
        float *logits = random_floats(&rng, T * n, 6), *bias = random_floats(&rng, n, 0.3f);
        float *weights = filled_floats(T * k, NAN);
        int32_t ids[T * 22], want_ids[22];
        double *want = new_doubles(T * k);
        qv_router r = make_router(row, bias);
        run_router(be, &r, logits, T, n, ids, weights);
        for (int64_t t = 0; t < T; t++) {
            router_oracle(row, logits + t * n, bias, want_ids, want + t * k);
            for (int64_t j = 0; j < k; j++)
                cr_assert_eq(ids[t * k + j], want_ids[j],
                             "%s: token %lld, choice %lld is %d, not %d", row->name, (long long)t,
                             (long long)j, ids[t * k + j], want_ids[j]);
        }
        check_close(row->name, weights, want, T * k, 2e-6, 1e-9);
        free(logits);
        free(bias);
        free(weights);
        free(want);
    }
}

Test(router, the_lowest_index_wins_among_equals)
{
    static const struct {
        float logits[8];
        int32_t n_groups, topk_groups, ids[3];
    } rows[] = {
        {{0, 0, 0, 0, 0, 0, 0, 0}, 1, 1, {0, 1, 2}},
        {{0, 1, 0, 1, 0, 1, 0, 1}, 1, 1, {1, 3, 5}},
        {{-3, 0, 2, 0, 0, 0, 0, 0}, 1, 1, {2, 1, 3}},
        {{0, 0, 0, 0, 0, 0, 0, 0}, 4, 2, {0, 1, 2}},  /* groups 0 and 1 */
        {{0, 0, 1, 1, 0, 0, 1, 1}, 4, 2, {2, 3, 6}},  /* groups 1 and 3 */
        {{0, 0, 1, 1, 1, 1, 1, 1}, 4, 2, {2, 3, 4}},  /* groups 1 and 2 */
        {{3, -9, 2, 2, 1, 1, 0, 0}, 4, 2, {2, 3, 4}}, /* the best of all is in no good group */
    };
    FOR_EACH_ISA(be, 1)
    for (size_t i = 0; i < QV_ROWS(rows); i++) {
        qv_router r = {.kind = QV_ROUTER_SIGMOID,
                       .top_k = 3,
                       .scale = 1,
                       .n_groups = rows[i].n_groups,
                       .topk_groups = rows[i].topk_groups};
        float logits[8], weights[3];
        int32_t ids[3];
        memcpy(logits, rows[i].logits, sizeof logits);
        run_router(be, &r, logits, 1, 8, ids, weights);
        for (int j = 0; j < 3; j++)
            cr_assert_eq(ids[j], rows[i].ids[j], "row %zu: choice %d is %d", i, j, ids[j]);
    }
}

/* Scores of 0 have an order all the same: that of their logits. */
Test(router, softmax_chooses_by_logits_where_scores_round_to_the_same)
{
    FOR_EACH_ISA(be, 1)
    {
        qv_router r = {.kind = QV_ROUTER_SOFTMAX,
                       .top_k = 3,
                       .normalize = true,
                       .scale = 1,
                       .n_groups = 1,
                       .topk_groups = 1};
        float logits[8] = {-300, -299, -150, -200, 0, -200, -400, -120}, weights[3];
        int32_t ids[3];
        run_router(be, &r, logits, 1, 8, ids, weights);
        cr_assert(ids[0] == 4 && ids[1] == 7 && ids[2] == 2, "%d, %d, %d", ids[0], ids[1], ids[2]);
        cr_assert(weights[0] == 1 && weights[1] == 0 && weights[2] == 0);
    }
}

/* Neither NaN nor infinities may lead out of the experts. */
Test(router, choices_are_experts_whatever_the_logits)
{
    static const float odd[] = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f};
    FOR_EACH_ISA(be, 1)
    for (size_t i = 0; i < QV_ROWS(router_rows); i++)
        for (size_t k = 0; k < QV_ROWS(odd); k++)
            for (int all = 0; all < 2; all++) {
                const router_row *row = &router_rows[i];
                float *logits = filled_floats(row->n_experts, all ? odd[k] : 0.5f);
                float bias[512] = {0}, weights[22];
                int32_t ids[22];
                logits[row->n_experts / 2] = odd[k];
                qv_router r = make_router(row, bias);
                run_router(be, &r, logits, 1, row->n_experts, ids, weights);
                for (int j = 0; j < row->top_k; j++)
                    cr_assert(ids[j] >= 0 && ids[j] < row->n_experts, "%s: expert %d", row->name,
                              ids[j]);
                free(logits);
            }
}

Test(router, other_tokens_and_threads_change_no_bit)
{
    enum { T = 300 };
    for (size_t a = 0; a < QV_ROWS(isas); a++)
        for (size_t i = 0; i < QV_ROWS(router_rows); i++) {
            qv_backend *one = open_isa(isas[a], 1), *many = open_isa(isas[a], 3);
            if (!one || !many)
                continue;
            const router_row *row = &router_rows[i];
            qv_rng rng = qv_rng_seed(2);
            float *logits = random_floats(&rng, T * row->n_experts, 6);
            float *bias = random_floats(&rng, row->n_experts, 0.3f);
            float *weights = filled_floats(T * 22, NAN), *want = filled_floats(T * 22, NAN);
            static int32_t ids[T * 22], want_ids[T * 22];
            qv_router r = make_router(row, bias);
            run_router(many, &r, logits, T, row->n_experts, ids, weights);
            for (int64_t t = 0; t < T; t++)
                run_router(one, &r, logits + t * row->n_experts, 1, row->n_experts,
                           want_ids + t * row->top_k, want + t * row->top_k);
            check_same(row->name, weights, want, T * row->top_k);
            cr_assert_eq(memcmp(ids, want_ids, (size_t)(T * row->top_k) * sizeof *ids), 0);
            free(logits);
            free(bias);
            free(weights);
            free(want);
            qv_backend_close(one);
            qv_backend_close(many);
        }
}

Test(router, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    float logits[24] = {0}, weights[24];
    int32_t ids[24];
    qv_router r = {
        .kind = QV_ROUTER_SIGMOID, .top_k = 4, .scale = 1, .n_groups = 1, .topk_groups = 1};
    qv_tensor l = qv_tensor_2d(logits, QV_F32, 2, 12), i = qv_tensor_2d(ids, QV_I32, 2, 4);
    qv_tensor w = qv_tensor_2d(weights, QV_F32, 2, 4);
    PASS(qv_op_router(be, &r, l, i, w));
    FAIL_WITH(QV_ERR_SHAPE, "ids is i32[2, 3], but needs i32[2, 4]",
              qv_op_router(be, &r, l, qv_tensor_2d(ids, QV_I32, 2, 3), w));
    r.bias = qv_tensor_1d(logits, QV_F32, 11);
    FAIL_WITH(QV_ERR_SHAPE, "bias is f32[11]", qv_op_router(be, &r, l, i, w));
    r.bias = (qv_tensor){0};
    r.n_groups = 5;
    FAIL_WITH(QV_ERR_ARG, "12 experts in 5 groups", qv_op_router(be, &r, l, i, w));
    r.n_groups = 4;
    FAIL_WITH(QV_ERR_ARG, "4 experts from 1 of 4 groups of 3", qv_op_router(be, &r, l, i, w));
    r.topk_groups = 5;
    FAIL_WITH(QV_ERR_ARG, "from 5 of 4 groups", qv_op_router(be, &r, l, i, w));
    r.top_k = 13;
    FAIL_WITH(QV_ERR_ARG, "13 of 12 experts",
              qv_op_router(be, &r, l, qv_tensor_2d(ids, QV_I32, 2, 13), w));
    qv_backend_close(be);
}

/* --- moe_route ----------------------------------------------------------------------------------
 */

static void check_list(const qv_moe_list *l, const int32_t *ids)
{
    int64_t n_pairs = (int64_t)l->n_tokens * l->top_k, n_listed = 0;
    cr_assert_eq(l->expert_start[0], 0);
    for (int32_t e = 0; e < l->n_experts; e++)
        for (int32_t p = l->expert_start[e]; p < l->expert_start[e + 1]; p++) {
            cr_assert_eq(ids[l->pair[p]], e);
            cr_assert_eq(l->place[l->pair[p]], p);
            cr_assert(p == l->expert_start[e] || l->pair[p] > l->pair[p - 1], "not stable");
        }
    for (int64_t p = 0; p < n_pairs; p++) {
        bool in = ids[p] >= 0 && ids[p] < l->n_experts;
        n_listed += in;
        cr_assert(in || l->place[p] == -1, "pair %lld of expert %d is listed", (long long)p,
                  ids[p]);
    }
    cr_assert_eq(l->expert_start[l->n_experts], n_listed);
}

/* Runs are whole, in order, of one expert and one adapter, and hold every pair that has one. */
static void check_runs(const qv_moe_list *l, const int32_t *ids, const int32_t *slot_of)
{
    int64_t n_adapted = 0, n_in_runs = 0;
    for (int32_t p = 0; p < l->expert_start[l->n_experts]; p++)
        n_adapted += slot_of[l->pair[p] / l->top_k] >= 0;
    for (int32_t i = 0; i < *l->n_runs; i++) {
        const qv_moe_run *run = &l->runs[i];
        cr_assert(run->n > 0 && run->slot >= 0);
        for (int32_t p = run->first; p < run->first + run->n; p++) {
            cr_assert_eq(ids[l->pair[p]], run->expert);
            cr_assert_eq(slot_of[l->pair[p] / l->top_k], run->slot);
        }
        const qv_moe_run *before = i > 0 ? run - 1 : NULL;
        if (before) {
            cr_assert(run->first >= before->first + before->n);
            cr_assert(run->first > before->first + before->n || run->expert != before->expert ||
                          run->slot != before->slot,
                      "runs %d and %d are one", i - 1, i);
        }
        n_in_runs += run->n;
    }
    cr_assert_eq(n_in_runs, n_adapted);
}

Test(moe_route, lists_each_pair_once_by_expert_token_and_adapter)
{
    static const struct {
        int32_t n_experts, top_k, n_segs, start[8], slot[7];
    } rows[] = {
        {16, 4, 1, {0, 50}, {-1}},
        {16, 4, 1, {0, 50}, {2}},
        {8, 2, 3, {0, 10, 11, 50}, {-1, 0, 1}},
        {4, 4, 6, {0, 5, 5, 6, 20, 20, 50}, {-1, 3, 0, 1, 2, 1}}, /* empty and repeated */
        {1, 1, 2, {0, 1, 3}, {0, 5}},
        {64, 8, 2, {0, 0, 1}, {-1, 7}},
        {5, 3, 1, {0, 0}, {0}}, /* no tokens at all */
    };
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(rows); i++)
        for (int32_t shift = 0; shift <= 3; shift += 3) { /* some ids below 0, some too large */
            int32_t n = rows[i].start[rows[i].n_segs], slot_of[64];
            qv_rng rng = qv_rng_seed(i);
            int32_t *ids = random_ids(&rng, n, rows[i].n_experts, rows[i].top_k);
            for (int32_t p = 0; p < n * rows[i].top_k; p++)
                ids[p] = shift && p % 5 == 0 ? ids[p] + rows[i].n_experts : ids[p] - shift;
            for (int32_t seg = 0; seg < rows[i].n_segs; seg++)
                for (int32_t t = rows[i].start[seg]; t < rows[i].start[seg + 1]; t++)
                    slot_of[t] = rows[i].slot[seg];
            test_list l = new_list(rows[i].n_experts, rows[i].top_k, 50);
            route(be, &l.list, ids, n, rows[i].n_segs, rows[i].start, rows[i].slot);
            check_list(&l.list, ids);
            check_runs(&l.list, ids, slot_of);
            free(l.memory);
            free(ids);
        }
    qv_backend_close(be);
}

Test(moe_route, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    test_list l = new_list(8, 2, 3);
    int32_t ids[8] = {0}, start[] = {0, 4}, slot = -1;
    FAIL_WITH(QV_ERR_LIMIT, "4 tokens in a list for 3",
              qv_op_moe_route(be, qv_tensor_2d(ids, QV_I32, 4, 2), 1, start, &slot, &l.list));
    FAIL_WITH(QV_ERR_SHAPE, "ids is i32[2, 3], but needs i32[*, 2]",
              qv_op_moe_route(be, qv_tensor_2d(ids, QV_I32, 2, 3), 1, start, &slot, &l.list));
    cr_assert_eq(qv_moe_list_bytes(8, 22, INT32_MAX), SIZE_MAX);
    FAIL_WITH(QV_ERR_LIMIT, "22 of 8 experts for 2147483647 tokens",
              qv_moe_list_init(&l.list, 8, 22, INT32_MAX, l.memory));
    free(l.memory);
    qv_backend_close(be);
}

/* --- moe_linear ---------------------------------------------------------------------------------
 */

/* The same matrices as plain weights, which qv_op_linear takes. */
static void load_plain(qv_backend *be, const float *values, int64_t n_experts, int64_t n_out,
                       int64_t n_in, qv_dtype dtype, qv_weight **w)
{
    for (int64_t e = 0; e < n_experts; e++) {
        PASS(qv_weight_new(be, n_out, n_in, dtype, &w[e]));
        PASS(qv_weight_load(be, w[e], 0, n_out, values + e * n_out * n_in, QV_F32, n_in));
    }
}

/* Each pair against qv_op_linear of its row alone; what is left out stays NaN. */
static void check_pairs(qv_backend *be, qv_weight *const *plain, const qv_moe_list *l,
                        const int32_t *ids, const float *x, int64_t n_in, qv_moe_rows rows,
                        const float *y, int64_t n_out)
{
    float *want = filled_floats(n_out, NAN);
    int64_t n_pairs = (int64_t)l->n_tokens * l->top_k, n_listed = l->expert_start[l->n_experts];
    for (int64_t p = 0; p < n_listed; p++) {
        int64_t row = rows == QV_MOE_PAIRS ? p : l->pair[p] / l->top_k;
        PASS(qv_op_linear(be, plain[ids[l->pair[p]]],
                          qv_tensor_2d((void *)(x + row * n_in), QV_F32, 1, n_in),
                          qv_tensor_2d(want, QV_F32, 1, n_out)));
        check_same("pair", y + p * n_out, want, n_out);
    }
    for (int64_t i = n_listed * n_out; i < n_pairs * n_out; i++)
        cr_assert(isnan(y[i]), "a row beyond the list was written");
    free(want);
}

/* n tokens; with 450 an expert has more pairs than one block takes. */
static void check_grouped(const char *isa, const qv_moe_shape *s, qv_dtype dtype, int64_t n,
                          bool leave_out)
{
    qv_backend *one = open_isa(isa, 1), *many = open_isa(isa, 3);
    if (!one || !many)
        return;
    qv_rng rng = qv_rng_seed(4);
    int32_t *ids = random_ids(&rng, n, s->n_experts, s->top_k);
    for (int64_t p = 0; leave_out && p < n * s->top_k; p += 3)
        ids[p] = -1;
    float *values = random_floats(&rng, s->n_experts * s->ffn * s->d, 1);
    float *x = random_floats(&rng, n * s->top_k * s->d, 1);
    float *y = filled_floats(n * s->top_k * s->ffn, NAN);
    qv_weight *w = load_experts(many, values, s->n_experts, s->ffn, s->d, dtype), *plain[64];
    load_plain(one, values, s->n_experts, s->ffn, s->d, dtype, plain);
    test_list l = new_list(s->n_experts, s->top_k, (int32_t)n);
    int32_t start[] = {0, (int32_t)n}, slot = -1;
    route(many, &l.list, ids, n, 1, start, &slot);
    for (int kind = 0; kind < 2; kind++) {
        qv_moe_rows rows = kind ? QV_MOE_PAIRS : QV_MOE_TOKENS;
        int64_t n_rows = kind ? n * s->top_k : n;
        for (int64_t i = 0; i < n * s->top_k * s->ffn; i++)
            y[i] = NAN;
        PASS(qv_op_moe_linear(many, w, &l.list, qv_tensor_2d(x, QV_F32, n_rows, s->d), rows,
                              qv_tensor_2d(y, QV_F32, n * s->top_k, s->ffn)));
        check_pairs(one, plain, &l.list, ids, x, s->d, rows, y, s->ffn);
    }
    for (int32_t e = 0; e < s->n_experts; e++)
        qv_weight_free(one, plain[e]);
    qv_weight_free(many, w);
    free(l.memory);
    free(ids);
    free(values);
    free(x);
    free(y);
    qv_backend_close(one);
    qv_backend_close(many);
}

/* That qv_op_linear is right is test_linear.c's to show; here every pair equals it bit for bit. */
Test(moe_linear, gives_each_pair_what_linear_gives_it_alone, .timeout = 60)
{
    static const int64_t token_counts[] = {0, 1, 2, 7, 64, 450};
    for (size_t a = 0; a < QV_ROWS(isas); a++)
        for (size_t i = 0; i < QV_ROWS(qv_moe_shapes); i++)
            for (size_t k = 0; k < QV_ROWS(token_counts); k++) {
                check_grouped(isas[a], &qv_moe_shapes[i], QV_BF16, token_counts[k], false);
                check_grouped(isas[a], &qv_moe_shapes[i], QV_F32, token_counts[k], true);
            }
}

/* With OpenBLAS for plain matrices, experts stay with the exact kernel. */
Test(moe_linear, is_exact_beside_openblas)
{
    qv_backend *be;
    PASS(qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = 2, .gemm = "openblas"},
                         &be));
    qv_backend *exact = open_cpu(1);
    const qv_moe_shape *s = &qv_moe_shapes[0];
    qv_rng rng = qv_rng_seed(5);
    int32_t *ids = random_ids(&rng, 9, s->n_experts, s->top_k), start[] = {0, 9}, slot = -1;
    float *values = random_floats(&rng, s->n_experts * s->ffn * s->d, 1);
    float *x = random_floats(&rng, 9 * s->d, 1), *y = filled_floats(9 * s->top_k * s->ffn, NAN);
    qv_weight *w = load_experts(be, values, s->n_experts, s->ffn, s->d, QV_BF16), *plain[64];
    load_plain(exact, values, s->n_experts, s->ffn, s->d, QV_BF16, plain);
    test_list l = new_list(s->n_experts, s->top_k, 9);
    route(be, &l.list, ids, 9, 1, start, &slot);
    PASS(qv_op_moe_linear(be, w, &l.list, qv_tensor_2d(x, QV_F32, 9, s->d), QV_MOE_TOKENS,
                          qv_tensor_2d(y, QV_F32, 9 * s->top_k, s->ffn)));
    check_pairs(exact, plain, &l.list, ids, x, s->d, QV_MOE_TOKENS, y, s->ffn);
    for (int32_t e = 0; e < s->n_experts; e++)
        qv_weight_free(exact, plain[e]);
    qv_weight_free(be, w);
    free(l.memory);
    free(ids);
    free(values);
    free(x);
    free(y);
    qv_backend_close(be);
    qv_backend_close(exact);
}

/* Pieces of rows, wide strides and every source dtype give the same weight. */
Test(moe_linear, experts_load_in_pieces_from_any_dtype)
{
    enum { E = 3, OUT = 70, IN = 33, STRIDE = 40 };
    static const qv_dtype dtypes[] = {QV_F32, QV_BF16, QV_F16};
    qv_backend *be = open_cpu(1);
    qv_rng rng = qv_rng_seed(6);
    float *values = random_floats(&rng, E * OUT * IN, 1), *x = random_floats(&rng, E * IN, 1);
    for (int64_t i = 0; i < E * OUT * IN; i++) /* what BF16 and F16 both can hold */
        values[i] = (float)(int)(values[i] * 64) / 64;
    qv_weight *whole = load_experts(be, values, E, OUT, IN, QV_BF16);
    int32_t ids[E] = {0, 1, 2}, start[] = {0, E}, slot = -1;
    test_list l = new_list(E, 1, E);
    route(be, &l.list, ids, E, 1, start, &slot);
    float want[E * OUT], y[E * OUT];
    qv_tensor xt = qv_tensor_2d(x, QV_F32, E, IN);
    PASS(qv_op_moe_linear(be, whole, &l.list, xt, QV_MOE_TOKENS,
                          qv_tensor_2d(want, QV_F32, E, OUT)));
    for (size_t d = 0; d < QV_ROWS(dtypes); d++) {
        size_t size = qv_dtype_size(dtypes[d]);
        qv_weight *w;
        PASS(qv_weight_new_experts(be, E, OUT, IN, QV_BF16, &w));
        cr_assert_eq(qv_weight_n_experts(w), E);
        char *src = must(calloc(E * OUT * STRIDE, size));
        for (int64_t row = 0; row < E * OUT; row++)
            PASS(qv_dtype_from_f32(dtypes[d], values + row * IN,
                                   src + (size_t)(row * STRIDE) * size, IN));
        for (int64_t e = E - 1; e >= 0; e--) {
            static const int64_t cuts[] = {0, 1, 17, 64, OUT};
            for (size_t i = 0; i + 1 < QV_ROWS(cuts); i++)
                PASS(qv_weight_load_expert(be, w, e, cuts[i], cuts[i + 1] - cuts[i],
                                           src + (size_t)((e * OUT + cuts[i]) * STRIDE) * size,
                                           dtypes[d], STRIDE));
        }
        PASS(qv_op_moe_linear(be, w, &l.list, xt, QV_MOE_TOKENS, qv_tensor_2d(y, QV_F32, E, OUT)));
        check_same(qv_dtype_name(dtypes[d]), y, want, E * OUT);
        free(src);
        qv_weight_free(be, w);
    }
    qv_weight_free(be, whole);
    free(values);
    free(x);
    free(l.memory);
    qv_backend_close(be);
}

Test(moe_linear, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    qv_weight *w;
    float m[64] = {0};
    int32_t ids[] = {0, 1, 2, 0}, start[] = {0, 2}, slot = -1;
    PASS(qv_weight_new_experts(be, 3, 4, 5, QV_F32, &w));
    FAIL_WITH(QV_ERR_SHAPE, "expert 3 of 3", qv_weight_load_expert(be, w, 3, 0, 1, m, QV_F32, 5));
    FAIL_WITH(QV_ERR_SHAPE, "expert -1 of 3", qv_weight_load_expert(be, w, -1, 0, 1, m, QV_F32, 5));
    FAIL_WITH(QV_ERR_SHAPE, "rows 3 to 4 of a matrix of 4",
              qv_weight_load_expert(be, w, 0, 3, 2, m, QV_F32, 5));
    qv_weight *none;
    FAIL_WITH(QV_ERR_SHAPE, "weight: 0 experts", qv_weight_new_experts(be, 0, 4, 5, QV_F32, &none));
    FAIL_WITH(QV_ERR_UNSUPPORTED, "not F16", qv_weight_new_experts(be, 2, 4, 5, QV_F16, &none));
    FAIL_WITH(
        QV_ERR_NOMEM, "no memory",
        qv_weight_new_experts(be, INT32_MAX, INT64_C(1) << 31, INT64_C(1) << 31, QV_F32, &none));

    test_list l = new_list(3, 2, 2), other = new_list(4, 2, 2);
    route(be, &l.list, ids, 2, 1, start, &slot);
    route(be, &other.list, ids, 2, 1, start, &slot);
    qv_tensor x = qv_tensor_2d(m, QV_F32, 2, 5), y = qv_tensor_2d(m, QV_F32, 4, 4);
    FAIL_WITH(QV_ERR_SHAPE, "a weight of 3 experts, a list of 4",
              qv_op_moe_linear(be, w, &other.list, x, QV_MOE_TOKENS, y));
    FAIL_WITH(QV_ERR_SHAPE, "x is f32[2, 5], but needs f32[4, 5]",
              qv_op_moe_linear(be, w, &l.list, x, QV_MOE_PAIRS, y));
    FAIL_WITH(QV_ERR_SHAPE, "y is f32[2, 4], but needs f32[4, 4]",
              qv_op_moe_linear(be, w, &l.list, x, QV_MOE_TOKENS, qv_tensor_rows(y, 0, 2)));
    qv_weight_free(be, w);
    free(l.memory);
    free(other.memory);
    qv_backend_close(be);
}

/* --- moe_combine --------------------------------------------------------------------------------
 */

static void combine(qv_backend *be, const qv_moe_list *l, float *weights, float *o, int64_t d,
                    float *y)
{
    int64_t n = l->n_tokens, n_pairs = n * l->top_k;
    PASS(qv_op_moe_combine(be, l, qv_tensor_2d(weights, QV_F32, n, l->top_k),
                           qv_tensor_2d(o, QV_F32, n_pairs, d), NULL, (qv_tensor){0},
                           qv_tensor_2d(y, QV_F32, n, d)));
}

Test(moe_combine, agrees_with_double_and_with_each_token_alone)
{
    enum { T = 70, D = 37 };
    FOR_EACH_ISA(be, 3)
    for (size_t i = 0; i < QV_ROWS(qv_moe_shapes); i++) {
        const qv_moe_shape *s = &qv_moe_shapes[i];
        int32_t k = s->top_k, start[] = {0, T}, slot = -1;
        qv_rng rng = qv_rng_seed(7);
        int32_t *ids = random_ids(&rng, T, s->n_experts, k);
        ids[3 * k] = -1;
        for (int32_t j = 0; j < k; j++)
            ids[5 * k + j] = s->n_experts; /* none of this token's experts is here */
        float *weights = random_floats(&rng, T * k, 1), *o = random_floats(&rng, T * k * D, 1);
        float *y = filled_floats(T * D, NAN);
        double *want = new_doubles(T * D), *bound = new_doubles(T * D);
        test_list l = new_list(s->n_experts, k, T), single = new_list(s->n_experts, k, 1);
        route(be, &l.list, ids, T, 1, start, &slot);
        combine(be, &l.list, weights, o, D, y);
        for (int64_t t = 0; t < T; t++) {
            float *rows = filled_floats(k * D, NAN), alone[D];
            int32_t one[] = {0, 1};
            route(be, &single.list, ids + t * k, 1, 1, one, &slot);
            for (int32_t j = 0; j < k; j++) {
                int32_t p = l.list.place[t * k + j];
                for (int64_t x = 0; p >= 0 && x < D; x++) {
                    want[t * D + x] += (double)weights[t * k + j] * o[p * D + x];
                    rows[single.list.place[j] * D + x] = o[p * D + x];
                }
            }
            combine(be, &single.list, weights + t * k, rows, D, alone);
            check_same("alone", y + t * D, alone, D);
            free(rows);
        }
        for (int64_t x = 0; x < T * D; x++)
            bound[x] = 2 * k * U32;
        check_bound(s->name, y, want, bound, T * D);
        for (int64_t x = 0; x < D; x++)
            cr_assert(y[5 * D + x] == 0, "a token without experts");
        free(ids);
        free(weights);
        free(o);
        free(y);
        free(want);
        free(bound);
        free(l.memory);
        free(single.memory);
    }
}

Test(moe_combine, with_the_norm_behind_it_is_two_ops)
{
    enum { T = 7, D = 48, K = 3, N_EXPERTS = 6 };
    qv_backend *be;
    qv_backend_options options = {.name = "cpu", .n_threads = 2, .arithmetic = "bf16"};
    PASS(qv_backend_open(&options, &be));
    qv_rng rng = qv_rng_seed(8);
    int32_t *ids = random_ids(&rng, T, N_EXPERTS, K), start[] = {0, T}, slot = -1;
    ids[4] = -1;
    test_list l = new_list(N_EXPERTS, K, T);
    route(be, &l.list, ids, T, 1, start, &slot);
    float *o = random_floats(&rng, T * K * D, 1), *weights = random_floats(&rng, T * K, 1);
    float *shared = random_floats(&rng, T * D, 1), *gate = random_floats(&rng, T, 3);
    float *w = random_floats(&rng, D, 1), *residual = random_floats(&rng, T * D, 2);
    float *same = copied_floats(residual, T * D);
    float delta[T * D], y[T * D], want[T * D], rest[T * D], want_rest[T * D];
#define T_D(p) qv_tensor_2d(p, QV_F32, T, D)
    qv_moe_sum sum = {.list = &l.list,
                      .weights = qv_tensor_2d(weights, QV_F32, T, K),
                      .o = qv_tensor_2d(o, QV_F32, T * K, D),
                      .shared = T_D(shared),
                      .gate = qv_tensor_2d(gate, QV_F32, T, 1)};
    qv_tensor tw = qv_tensor_1d(w, QV_F32, D);
    PASS(qv_op_combine_add_rms_norm(be, &sum, T_D(residual), T_D(delta), tw, 1e-6f, true, T_D(y),
                                    T_D(rest)));
    PASS(qv_op_moe_combine_f32(be, sum.list, sum.weights, sum.o, NULL, sum.scratch, sum.shared,
                               sum.gate, T_D(delta)));
    PASS(qv_op_add_rms_norm(be, T_D(same), T_D(delta), tw, 1e-6f, true, T_D(want), T_D(want_rest)));
    check_same("residual", residual, same, T * D);
    check_same("y", y, want, T * D);
    check_same("rest", rest, want_rest, T * D);
    sum.gate = T_D(gate);
    FAIL_WITH(QV_ERR_SHAPE, "gate is f32[7, 48], but needs f32[7, 1]",
              qv_op_combine_add_rms_norm(be, &sum, T_D(residual), T_D(delta), tw, 1e-6f, true,
                                         T_D(y), T_D(rest)));
#undef T_D
    free(ids);
    free(o);
    free(weights);
    free(shared);
    free(gate);
    free(w);
    free(residual);
    free(same);
    free(l.memory);
    qv_backend_close(be);
}
