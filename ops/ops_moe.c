/* Routed experts: checks, and what a backend does in one op or several. */
#include "ops/checks.h"

static qv_status check_router(const qv_router *r, int64_t n_experts)
{
    if (r->top_k < 1 || r->top_k > n_experts)
        return qv_fail(QV_ERR_ARG, "router: %d of %lld experts", r->top_k, (long long)n_experts);
    if (r->n_groups < 1 || n_experts % r->n_groups != 0)
        return qv_fail(QV_ERR_ARG, "router: %lld experts in %d groups", (long long)n_experts,
                       r->n_groups);
    if (r->topk_groups < 1 || r->topk_groups > r->n_groups ||
        r->topk_groups * (n_experts / r->n_groups) < r->top_k)
        return qv_fail(QV_ERR_ARG, "router: %d experts from %d of %d groups of %lld", r->top_k,
                       r->topk_groups, r->n_groups, (long long)(n_experts / r->n_groups));
    return QV_OK;
}

static qv_status check_router_op(const qv_router *router, qv_tensor logits, qv_tensor ids,
                                 qv_tensor weights)
{
    EXPECT("router", logits, QV_F32, ANY, ANY);
    QV_TRY(check_router(router, logits.shape[1]));
    EXPECT_CONTIGUOUS("router", ids, QV_I32, logits.shape[0], router->top_k);
    EXPECT_CONTIGUOUS("router", weights, QV_F32, logits.shape[0], router->top_k);
    const qv_tensor bias = router->bias;
    if (bias.data)
        EXPECT("router", bias, QV_F32, logits.shape[1]);
    return QV_OK;
}

qv_status qv_op_router(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                       qv_tensor weights)
{
    QV_TRY(check_router_op(router, logits, ids, weights));
    return logits.shape[0] ? CALL(router, be, router, logits, ids, weights) : QV_OK;
}

/* Bytes of a list's arrays, each on a boundary of 64; with memory, the list points into it. */
static size_t lay_out_list(qv_moe_list *list, char *memory)
{
    size_t n_pairs = (size_t)list->max_tokens * (size_t)list->top_k;
    size_t n_experts = (size_t)list->n_experts, used = 0;
#define TAKE(field, n)                                                                             \
    do {                                                                                           \
        list->field = memory ? (void *)(memory + used) : NULL;                                     \
        used += ((n) * sizeof *list->field + 63) / 64 * 64;                                        \
    } while (0)
    TAKE(expert_start, n_experts + 1);
    TAKE(pair, n_pairs);
    TAKE(place, n_pairs);
    TAKE(n_runs, 1);
    TAKE(next_item, 1);
    TAKE(runs, n_pairs);
    TAKE(work, (n_pairs > n_experts ? n_pairs : n_experts) + n_pairs / 512 + 2);
#undef TAKE
    return used;
}

static bool is_list_size(int32_t n_experts, int32_t top_k, int32_t max_tokens)
{
    return n_experts >= 1 && top_k >= 1 && max_tokens >= 0 &&
           (int64_t)max_tokens * top_k <= INT32_MAX;
}

size_t qv_moe_list_bytes(int32_t n_experts, int32_t top_k, int32_t max_tokens)
{
    if (!is_list_size(n_experts, top_k, max_tokens))
        return SIZE_MAX;
    qv_moe_list list = {.n_experts = n_experts, .top_k = top_k, .max_tokens = max_tokens};
    return lay_out_list(&list, NULL);
}

qv_status qv_moe_list_init(qv_moe_list *list, int32_t n_experts, int32_t top_k, int32_t max_tokens,
                           void *memory)
{
    if (!is_list_size(n_experts, top_k, max_tokens))
        return qv_fail(QV_ERR_LIMIT, "moe list: %d of %d experts for %d tokens", top_k, n_experts,
                       max_tokens);
    *list = (qv_moe_list){.n_experts = n_experts, .top_k = top_k, .max_tokens = max_tokens};
    lay_out_list(list, memory);
    return QV_OK;
}

/* The list is for these tokens from here on. */
static qv_status begin_list(qv_moe_list *list, qv_tensor ids, int32_t n_segs,
                            const int32_t *seg_start, const int32_t *seg_slot)
{
    EXPECT_CONTIGUOUS("moe_route", ids, QV_I32, ANY, list->top_k);
    if (ids.shape[0] > list->max_tokens)
        return qv_fail(QV_ERR_LIMIT, "moe_route: %lld tokens in a list for %d",
                       (long long)ids.shape[0], list->max_tokens);
    list->n_tokens = (int32_t)ids.shape[0];
    list->n_segs = n_segs;
    list->seg_start = seg_start;
    list->seg_slot = seg_slot;
    return QV_OK;
}

qv_status qv_op_moe_route(qv_backend *be, qv_tensor ids, int32_t n_segs, const int32_t *seg_start,
                          const int32_t *seg_slot, qv_moe_list *list)
{
    QV_TRY(begin_list(list, ids, n_segs, seg_start, seg_slot));
    return CALL(moe_route, be, ids, list);
}

static qv_status check_choice(qv_backend *be, const qv_router *router, qv_tensor logits,
                              qv_tensor ids, qv_tensor weights, const qv_beside *beside)
{
    QV_TRY(check_router_op(router, logits, ids, weights));
    return beside->w != NULL ? qv_check_linear(be, beside->w, beside->x, beside->y, QV_F32) : QV_OK;
}

qv_status qv_op_choose(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                       qv_tensor weights, int32_t n_segs, const int32_t *seg_start,
                       const int32_t *seg_slot, qv_moe_list *list, const qv_beside *beside)
{
    const qv_beside nothing = {.w = NULL}, *b = beside != NULL ? beside : &nothing;
    if (be->table->choose != NULL && logits.shape[0] == 1) {
        QV_TRY(check_choice(be, router, logits, ids, weights, b));
        QV_TRY(begin_list(list, ids, n_segs, seg_start, seg_slot));
        return CALL_ON(be->table, choose, 0, 0, be, router, logits, ids, weights, list, b);
    }
    QV_TRY(qv_op_router(be, router, logits, ids, weights));
    QV_TRY(qv_op_moe_route(be, ids, n_segs, seg_start, seg_slot, list));
    return b->w != NULL ? qv_op_linear_f32(be, b->w, b->x, (qv_tensor){.data = NULL}, b->y) : QV_OK;
}

static int64_t n_pairs_of(const qv_moe_list *list)
{
    return (int64_t)list->n_tokens * list->top_k;
}

static int64_t n_rows_of(const qv_moe_list *list, qv_moe_rows rows)
{
    return rows == QV_MOE_TOKENS ? list->n_tokens : n_pairs_of(list);
}

qv_status qv_op_moe_gather(qv_backend *be, const qv_moe_list *list, qv_tensor room, qv_tensor *x,
                           qv_moe_rows *rows)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("moe_gather", *x, act, n_rows_of(list, QV_MOE_TOKENS), room.shape[1]);
    EXPECT("moe_gather", room, act, n_pairs_of(list), x->shape[1]);
    *rows = QV_MOE_TOKENS;
    if (list->n_tokens == 0 || be->table->wants_pairs == NULL ||
        !be->table->wants_pairs(be, list, *x, room))
        return QV_OK;
    QV_TRY(CALL_ON(be->table, moe_gather, 0, 0, be, list, *x, room));
    *x = room;
    *rows = QV_MOE_PAIRS;
    return QV_OK;
}

static qv_status check_moe_linear(const qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                                  qv_tensor x, qv_moe_rows rows, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    QV_ASSERT(w->backend == be);
    if (w->n_experts != list->n_experts)
        return qv_fail(QV_ERR_SHAPE, "moe_linear: a weight of %lld experts, a list of %d",
                       (long long)w->n_experts, list->n_experts);
    EXPECT("moe_linear", x, act, n_rows_of(list, rows), w->n_in);
    EXPECT("moe_linear", y, act, n_pairs_of(list), w->n_out);
    return QV_OK;
}

qv_status qv_op_moe_linear(qv_backend *be, const qv_weight *w, const qv_moe_list *list, qv_tensor x,
                           qv_moe_rows rows, qv_tensor y)
{
    QV_TRY(check_moe_linear(be, w, list, x, rows, y));
    return list->n_tokens ? CALL_SHAPED(moe_linear, w->n_out, w->n_in, be, w, list, x, rows, y)
                          : QV_OK;
}

qv_status qv_op_moe_linear_act(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                               qv_tensor x, qv_moe_rows rows, qv_act act, qv_tensor wide,
                               qv_tensor y)
{
    int64_t f = act == QV_ACT_SWIGLU ? w->n_out / 2 : w->n_out;
    QV_TRY(check_moe_linear(be, w, list, x, rows, wide));
    EXPECT("moe_linear", y, be->table->activation_dtype, n_pairs_of(list), f);
    if (be->table->moe_linear_act != NULL)
        return list->n_tokens ? CALL_ON(be->table, moe_linear_act, w->n_out, w->n_in, be, w, list,
                                        x, rows, act, wide, y)
                              : QV_OK;
    QV_TRY(qv_op_moe_linear(be, w, list, x, rows, wide));
    return qv_op_activate(be, act, wide, y);
}

/* Both products, from the list on. */
static qv_status run_experts(qv_backend *be, const qv_moe_list *list, const qv_experts *e)
{
    qv_tensor x = e->x;
    qv_moe_rows rows;
    QV_TRY(qv_op_moe_gather(be, list, e->y, &x, &rows)); /* as wide as what goes in */
    QV_TRY(qv_op_moe_linear_act(be, e->in, list, x, rows, e->act, e->wide, e->inner));
    return qv_op_moe_linear(be, e->out, list, e->inner, QV_MOE_PAIRS, e->y);
}

static qv_status check_experts(const qv_backend *be, const qv_moe_list *list, const qv_experts *e)
{
    QV_TRY(check_moe_linear(be, e->in, list, e->x, QV_MOE_TOKENS, e->wide));
    QV_TRY(check_moe_linear(be, e->out, list, e->inner, QV_MOE_PAIRS, e->y));
    if (e->out->n_in != (e->act == QV_ACT_SWIGLU ? e->in->n_out / 2 : e->in->n_out))
        return qv_fail(QV_ERR_SHAPE, "choose_experts: %lld rows, then %lld columns",
                       (long long)e->in->n_out, (long long)e->out->n_in);
    return QV_OK;
}

qv_status qv_op_choose_experts(qv_backend *be, const qv_router *router, qv_tensor logits,
                               qv_tensor ids, qv_tensor weights, int32_t n_segs,
                               const int32_t *seg_start, const int32_t *seg_slot, qv_moe_list *list,
                               const qv_beside *beside, const qv_experts *experts)
{
    const qv_beside nothing = {.w = NULL}, *b = beside != NULL ? beside : &nothing;
    if (be->table->takes_experts != NULL && logits.shape[0] == 1) {
        QV_TRY(check_choice(be, router, logits, ids, weights, b));
        QV_TRY(begin_list(list, ids, n_segs, seg_start, seg_slot));
        QV_TRY(check_experts(be, list, experts));
        if (be->table->takes_experts(be, router, logits, list, experts))
            return CALL_ON(be->table, choose_experts, experts->in->n_out, experts->in->n_in, be,
                           router, logits, ids, weights, list, b, experts);
    }
    QV_TRY(qv_op_choose(be, router, logits, ids, weights, n_segs, seg_start, seg_slot, list, b));
    return run_experts(be, list, experts);
}

static qv_status check_moe_site(const char *op, const qv_moe_lora_site *site,
                                const qv_moe_list *list, qv_tensor scratch)
{
    if (site->n_experts != list->n_experts)
        return qv_fail(QV_ERR_SHAPE, "%s: a site of %d experts, a list of %d", op, site->n_experts,
                       list->n_experts);
    if (!qv_is_weight_dtype(site->dtype))
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: A and B are F32 or BF16, not %s", op,
                       qv_dtype_name(site->dtype));
    QV_TRY(qv_check_slices(op, site->n_slices, site->slice_start, site->n_out));
    return qv_check_scratch(op, scratch, "pairs", n_pairs_of(list), site->n_slices, site->max_rank);
}

qv_status qv_op_moe_lora(qv_backend *be, const qv_moe_lora_site *site, const qv_moe_list *list,
                         qv_tensor x, qv_moe_rows rows, qv_tensor scratch, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    QV_TRY(check_moe_site("moe_lora", site, list, scratch));
    EXPECT("moe_lora", x, act, n_rows_of(list, rows), site->n_in);
    EXPECT("moe_lora", y, act, n_pairs_of(list), site->n_out);
    return list->n_tokens
               ? CALL_SHAPED(moe_lora, site->n_out, site->n_in, be, site, list, x, rows, scratch, y)
               : QV_OK;
}

static qv_status check_combine(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                               qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                               qv_tensor y, qv_dtype y_dtype)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT_CONTIGUOUS("moe_combine", weights, QV_F32, list->n_tokens, list->top_k);
    EXPECT("moe_combine", o, act, n_pairs_of(list), ANY);
    EXPECT("moe_combine", y, y_dtype, list->n_tokens, site ? site->n_out : o.shape[1]);
    if (o.shape[1] != y.shape[1])
        return qv_fail(QV_ERR_SHAPE, "moe_combine: rows of %lld into rows of %lld",
                       (long long)o.shape[1], (long long)y.shape[1]);
    return site ? check_moe_site("moe_combine", site, list, scratch) : QV_OK;
}

qv_status qv_op_moe_combine(qv_backend *be, const qv_moe_list *list, qv_tensor weights, qv_tensor o,
                            const qv_moe_lora_site *site, qv_tensor scratch, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    QV_TRY(check_combine(be, list, weights, o, site, scratch, y, act));
    return qv_tensor_count(&y) ? CALL(moe_combine, be, list, weights, o, site, scratch, y) : QV_OK;
}

static qv_status check_combine_f32(qv_backend *be, const qv_moe_sum *sum, qv_tensor y)
{
    QV_TRY(check_combine(be, sum->list, sum->weights, sum->o, sum->site, sum->scratch, y, QV_F32));
    return sum->shared.data
               ? qv_check_delta(be, "moe_combine", sum->shared, sum->gate, y.shape[0], y.shape[1])
               : QV_OK;
}

qv_status qv_op_moe_combine_f32(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                                qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                                qv_tensor shared, qv_tensor gate, qv_tensor y)
{
    const qv_moe_sum sum = {list, weights, o, site, scratch, shared, gate};
    QV_TRY(check_combine_f32(be, &sum, y));
    return qv_tensor_count(&y)
               ? CALL(moe_combine_f32, be, list, weights, o, site, scratch, shared, gate, y)
               : QV_OK;
}

qv_status qv_op_combine_add_rms_norm(qv_backend *be, const qv_moe_sum *sum, qv_tensor residual,
                                     qv_tensor delta, qv_tensor w, float eps, bool plus_one,
                                     qv_tensor y, qv_tensor rest)
{
    if (be->table->combine_add_rms_norm != NULL && !qv_has_peers(be) && residual.shape[0] > 0) {
        QV_TRY(check_combine_f32(be, sum, delta));
        QV_TRY(qv_check_add_rms_norm(be, residual, delta, w, y, rest));
        return CALL_ON(be->table, combine_add_rms_norm, 0, 0, be, sum, residual, delta, w, eps,
                       plus_one, y, rest);
    }
    QV_TRY(qv_op_moe_combine_f32(be, sum->list, sum->weights, sum->o, sum->site, sum->scratch,
                                 sum->shared, sum->gate, delta));
    return qv_op_sum_add_rms_norm(be, residual, delta, w, eps, plus_one, y, rest);
}
