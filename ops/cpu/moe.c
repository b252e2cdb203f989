/* Mixture of experts: the list of pairs, the grouped GEMM over it, and the weighted sum at its end.
 *
 * The list is a counting sort of the pairs by expert; it keeps their order within an expert. The
 * GEMM takes an expert's pairs in blocks like the tokens of qv_op_linear and uses its inner part,
 * so that a pair's sums are the same chains whatever else its expert has to do.
 */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

/* --- Route -------------------------------------------------------------------------------- */

static bool is_here(const qv_moe_list *list, int32_t id)
{
    return id >= list->first_expert && id - list->first_expert < list->n_experts;
}

/* expert_start, pair and place. */
static void sort_pairs(const int32_t *ids, qv_moe_list *list)
{
    int64_t n_pairs = (int64_t)list->n_tokens * list->top_k, *next = list->work;
    memset(list->expert_start, 0, (size_t)(list->n_experts + 1) * sizeof *list->expert_start);
    for (int64_t p = 0; p < n_pairs; p++)
        if (is_here(list, ids[p]))
            list->expert_start[ids[p] - list->first_expert + 1]++;
    for (int32_t e = 0; e < list->n_experts; e++) {
        next[e] = list->expert_start[e];
        list->expert_start[e + 1] += list->expert_start[e];
    }
    for (int64_t p = 0; p < n_pairs; p++) {
        list->place[p] = -1;
        if (is_here(list, ids[p])) {
            list->place[p] = (int32_t)next[ids[p] - list->first_expert]++;
            list->pair[list->place[p]] = (int32_t)p;
        }
    }
}

static void find_runs(qv_moe_list *list)
{
    int32_t n_runs = 0;
    for (int32_t e = 0; e < list->n_experts && list->n_segs > 0; e++) {
        int32_t last = -1; /* slot of the place before */
        for (int32_t p = list->expert_start[e]; p < list->expert_start[e + 1]; p++) {
            int32_t t = list->pair[p] / list->top_k;
            int32_t slot = list->seg_slot[qv_range_of(list->seg_start, list->n_segs, t)];
            if (slot >= 0 && slot == last)
                list->runs[n_runs - 1].n++;
            else if (slot >= 0)
                list->runs[n_runs++] = (qv_moe_run){.first = p, .n = 1, .expert = e, .slot = slot};
            last = slot;
        }
    }
    *list->n_runs = n_runs;
}

qv_status QV_ISA(qv_cpu_moe_route)(qv_backend *be, qv_tensor ids, qv_moe_list *list)
{
    (void)be;
    QV_ASSERT(list->n_segs == 0 || list->seg_start[list->n_segs] == list->n_tokens);
    sort_pairs(ids.data, list);
    find_runs(list);
    return QV_OK;
}

/* --- Grouped GEMM ------------------------------------------------------------------------- */

typedef struct {
    const qv_weight *w;
    const qv_moe_list *list;
    qv_tensor x, y;
    qv_moe_rows rows;
    int64_t n_groups;
} linear_ctx;

/* Group `group` of an expert's matrix for its pairs at places [first, end). */
static void multiply_pairs(const linear_ctx *c, int32_t expert, int64_t group, int64_t first,
                           int64_t end)
{
    const float *x[QV_LINEAR_TOKENS];
    float *y[QV_LINEAR_TOKENS];
    for (int64_t p = first; p < end; p++) {
        int64_t row = c->rows == QV_MOE_PAIRS ? p : c->list->pair[p] / c->list->top_k;
        x[p - first] = qv_row2(c->x, row);
        y[p - first] = qv_row2(c->y, p);
    }
    QV_ISA(qv_cpu_linear_group)(c->w, expert, group, x, end - first, y);
}

/* Items: experts, in each blocks of pairs, in each groups of rows; work[e] is an expert's first. */
static void linear_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const linear_ctx *c = ctx;
    const qv_moe_list *list = c->list;
    int32_t expert = qv_job_of(list->work, list->n_experts, begin);
    for (int64_t item = begin; item < end; item++) {
        while (item >= list->work[expert + 1])
            expert++;
        int64_t block = (item - list->work[expert]) / c->n_groups;
        int64_t first = list->expert_start[expert] + block * QV_LINEAR_TOKENS;
        int64_t left = list->expert_start[expert + 1] - first;
        multiply_pairs(c, expert, (item - list->work[expert]) % c->n_groups, first,
                       first + (left < QV_LINEAR_TOKENS ? left : QV_LINEAR_TOKENS));
    }
}

qv_status QV_ISA(qv_cpu_moe_linear)(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                                    qv_tensor x, qv_moe_rows rows, qv_tensor y)
{
    linear_ctx c = {.w = w,
                    .list = list,
                    .x = x,
                    .y = y,
                    .rows = rows,
                    .n_groups = (w->n_out + QV_GROUP - 1) / QV_GROUP};
    int64_t n_items = 0;
    for (int32_t e = 0; e < list->n_experts; e++) {
        int64_t n = list->expert_start[e + 1] - list->expert_start[e];
        list->work[e] = n_items;
        n_items += (n + QV_LINEAR_TOKENS - 1) / QV_LINEAR_TOKENS * c.n_groups;
    }
    list->work[list->n_experts] = n_items;
    if (n_items == 0)
        return QV_OK;
    /* As in qv_op_linear: 8 weights per ns from memory, or 50 multiply-adds per ns. */
    int64_t n_weights = w->n_in * QV_GROUP;
    int64_t n_each = list->expert_start[list->n_experts] * c.n_groups / n_items;
    qv_pool_run(qv_cpu(be)->pool, n_items, n_weights / 8 + n_weights * n_each / 50, linear_items,
                &c);
    return QV_OK;
}

/* --- Combine ------------------------------------------------------------------------------ */

typedef struct {
    const qv_moe_list *list;
    qv_tensor weights, o, y;
} combine_ctx;

static void combine_token(const combine_ctx *c, int64_t t)
{
    const qv_moe_list *list = c->list;
    const int32_t *place = list->place + t * list->top_k;
    const float *weights = qv_row2(c->weights, t);
    float *y = qv_row2(c->y, t);
    QV_FOR_LANES(i, lanes, c->y.shape[1])
    {
        v16 sum = v_zero();
        for (int32_t j = 0; j < list->top_k; j++)
            if (place[j] >= 0)
                sum = v_fma(v_set1(weights[j]), v_load_lanes(qv_row2(c->o, place[j]) + i, lanes),
                            sum);
        v_store_lanes(y + i, sum, lanes);
    }
}

static void combine_tokens(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        combine_token(ctx, t);
}

qv_status QV_ISA(qv_cpu_moe_combine)(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                                     qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                                     qv_tensor y)
{
    combine_ctx c = {.list = list, .weights = weights, .o = o, .y = y};
    qv_pool_run(qv_cpu(be)->pool, list->n_tokens, 10 + list->top_k * y.shape[1] / 8, combine_tokens,
                &c);
    if (site)
        QV_ISA(qv_cpu_moe_lora_shared)(be, site, list, weights, scratch, y);
    return QV_OK;
}

qv_status QV_ISA(qv_cpu_moe_combine_f32)(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                                         qv_tensor o, const qv_moe_lora_site *site,
                                         qv_tensor scratch, qv_tensor shared, qv_tensor gate,
                                         qv_tensor y)
{
    QV_TRY(QV_ISA(qv_cpu_moe_combine)(be, list, weights, o, site, scratch, y));
    return shared.data != NULL ? QV_ISA(qv_cpu_add)(be, y, shared, gate) : QV_OK;
}
