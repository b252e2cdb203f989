/* Dense ops, what ranks add up, and adapters: checks, and what a backend does in one op or several.
 */
#include "ops/checks.h"

/* [T, d] as [T, 1, d]. */
static qv_tensor as_3d(qv_tensor t)
{
    return t.n_dims == 2 ? qv_tensor_split(t, 1, t.shape[1]) : t;
}

/* --- Dense ops ---------------------------------------------------------------------------- */

qv_status qv_op_embed(qv_backend *be, qv_tensor table, int64_t first, const int32_t *ids,
                      qv_tensor y)
{
    EXPECT("embed", table, table.dtype == QV_BF16 ? QV_BF16 : QV_F32, ANY, ANY);
    EXPECT("embed", y, QV_F32, ANY, table.shape[1]);
    return y.shape[0] ? CALL(embed, be, table, first, ids, y) : QV_OK;
}

qv_status qv_check_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y,
                          qv_dtype y_dtype)
{
    QV_ASSERT(w->backend == be && w->n_experts == 0);
    EXPECT("linear", x, be->table->activation_dtype, ANY, w->n_in);
    EXPECT("linear", y, y_dtype, x.shape[0], w->n_out);
    return QV_OK;
}

qv_status qv_op_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    QV_TRY(qv_check_linear(be, w, x, y, be->table->activation_dtype));
    return x.shape[0] ? CALL_SHAPED(linear, w->n_out, w->n_in, be, w, x, y) : QV_OK;
}

qv_status qv_op_linear_f32(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor rest,
                           qv_tensor y)
{
    QV_TRY(qv_check_linear(be, w, x, y, QV_F32));
    if (rest.data)
        EXPECT("linear", rest, be->table->activation_dtype, x.shape[0], w->n_in);
    return x.shape[0] ? CALL_SHAPED(linear_f32, w->n_out, w->n_in, be, w, x, rest, y) : QV_OK;
}

typedef bool takes_add_fn(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y);

static bool takes_add(takes_add_fn *takes, qv_backend *be, const qv_weight *w, qv_tensor x,
                      qv_tensor y)
{
    return x.shape[0] > 0 && !qv_has_peers(be) && takes != NULL && takes(be, w, x, y);
}

qv_status qv_op_linear_add(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y, bool *done)
{
    QV_TRY(qv_check_linear(be, w, x, y, QV_F32));
    *done = takes_add(be->table->takes_linear_add, be, w, x, y);
    return *done ? CALL_ON(be->table, linear_add, w->n_out, w->n_in, be, w, x, y) : QV_OK;
}

static qv_status check_linear_part(qv_backend *be, qv_tensor x, const qv_linear_part *part)
{
    qv_dtype act = be->table->activation_dtype;
    const qv_weight *w = part->w;
    const qv_tensor rest = part->rest;
    QV_ASSERT(part->act == QV_ACT_NONE || !part->f32);
    if (part->act == QV_ACT_NONE)
        QV_TRY(qv_check_linear(be, w, x, part->y, part->f32 ? QV_F32 : act));
    else
        QV_TRY(qv_check_linear(be, w, x, part->wide, act));
    if (rest.data)
        EXPECT("linear", rest, act, x.shape[0], w->n_in);
    return QV_OK;
}

static qv_status run_linear_part(qv_backend *be, qv_tensor x, const qv_linear_part *part)
{
    if (part->f32)
        return qv_op_linear_f32(be, part->w, x, part->rest, part->y);
    if (part->act == QV_ACT_NONE)
        return qv_op_linear(be, part->w, x, part->y);
    QV_TRY(qv_op_linear(be, part->w, x, part->wide));
    return qv_op_activate(be, part->act, part->wide, part->y);
}

/* The activated half or whole of a part's rows. */
static qv_status check_act(const qv_backend *be, const qv_linear_part *part)
{
    const qv_tensor y = part->y;
    int64_t n = part->w->n_out;
    if (part->act == QV_ACT_NONE)
        return QV_OK;
    if (part->act == QV_ACT_SWIGLU && n % 2 != 0)
        return qv_fail(QV_ERR_SHAPE, "linears: swiglu of %lld columns", (long long)n);
    EXPECT("linears", y, be->table->activation_dtype, part->wide.shape[0],
           part->act == QV_ACT_SWIGLU ? n / 2 : n);
    return QV_OK;
}

static qv_status check_linears(qv_backend *be, qv_tensor x, int32_t n_parts,
                               const qv_linear_part *parts, int64_t *n_out)
{
    *n_out = 0;
    QV_ASSERT(n_parts >= 1 && n_parts <= QV_MAX_LINEAR_PARTS);
    for (int32_t i = 0; i < n_parts; i++) {
        QV_TRY(check_linear_part(be, x, &parts[i]));
        QV_TRY(check_act(be, &parts[i]));
        *n_out += parts[i].w->n_out;
    }
    return QV_OK;
}

qv_status qv_op_linears(qv_backend *be, qv_tensor x, int32_t n_parts, const qv_linear_part *parts)
{
    int64_t n_out;
    QV_TRY(check_linears(be, x, n_parts, parts, &n_out));
    if (x.shape[0] > 0 && be->table->takes_linears != NULL &&
        be->table->takes_linears(be, x, n_parts, parts))
        return CALL_ON(be->table, linears, n_out, x.shape[1], be, x, n_parts, parts);
    for (int32_t i = 0; i < n_parts; i++)
        QV_TRY(run_linear_part(be, x, &parts[i]));
    return QV_OK;
}

qv_status qv_op_rms_norm(qv_backend *be, qv_tensor x, qv_tensor w, float eps, bool plus_one,
                         qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    if (x.n_dims == 2)
        EXPECT("rms_norm", y, act, x.shape[0], x.shape[1]);
    x = as_3d(x);
    y = as_3d(y);
    EXPECT("rms_norm", x, act, ANY, ANY, ANY);
    EXPECT("rms_norm", y, act, x.shape[0], x.shape[1], x.shape[2]);
    EXPECT("rms_norm", w, QV_F32, x.shape[2]);
    return qv_tensor_count(&x)
               ? CALL_SHAPED(rms_norm, x.shape[1], x.shape[2], be, x, w, eps, plus_one, y)
               : QV_OK;
}

qv_status qv_check_add_rms_norm(const qv_backend *be, qv_tensor residual, qv_tensor delta,
                                qv_tensor w, qv_tensor y, qv_tensor rest)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("add_rms_norm", residual, QV_F32, ANY, ANY);
    if (delta.data)
        EXPECT("add_rms_norm", delta, QV_F32, residual.shape[0], residual.shape[1]);
    if (rest.data)
        EXPECT("add_rms_norm", rest, act, residual.shape[0], residual.shape[1]);
    EXPECT("add_rms_norm", y, act, residual.shape[0], residual.shape[1]);
    EXPECT("add_rms_norm", w, QV_F32, residual.shape[1]);
    return QV_OK;
}

qv_status qv_op_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                             float eps, bool plus_one, qv_tensor y, qv_tensor rest)
{
    QV_TRY(qv_check_add_rms_norm(be, residual, delta, w, y, rest));
    return qv_tensor_count(&residual)
               ? CALL(add_rms_norm, be, residual, delta, w, eps, plus_one, y, rest)
               : QV_OK;
}

static bool takes_gate(qv_backend *be, const qv_stream_norm *norm, const qv_linear_part *part)
{
    return norm->y.shape[0] > 0 && part->w->n_out == 1 && part->act == QV_ACT_NONE && !part->f32 &&
           be->table->takes_norm_gate != NULL && be->table->takes_norm_gate(be, norm, part);
}

qv_status qv_op_norm_linears(qv_backend *be, const qv_stream_norm *norm, int32_t n_parts,
                             const qv_linear_part *parts)
{
    const qv_tensor none = {.data = NULL};
    int64_t n_out;
    QV_TRY(qv_check_add_rms_norm(be, norm->residual, none, norm->w, norm->y, norm->rest));
    QV_TRY(check_linears(be, norm->y, n_parts, parts, &n_out));
    if (norm->y.shape[0] > 0 && be->table->takes_norm_linears != NULL &&
        be->table->takes_norm_linears(be, norm, n_parts, parts))
        return CALL_ON(be->table, norm_linears, n_out, norm->y.shape[1], be, norm, n_parts, parts);
    qv_linear_part left[QV_MAX_LINEAR_PARTS];
    int32_t n_left = 0;
    bool normed = false;
    for (int32_t i = 0; i < n_parts; i++) {
        if (normed || !takes_gate(be, norm, &parts[i])) {
            left[n_left++] = parts[i];
            continue;
        }
        QV_TRY(CALL_ON(be->table, norm_gate, 1, norm->y.shape[1], be, norm, &parts[i]));
        normed = true;
    }
    if (!normed)
        QV_TRY(qv_op_add_rms_norm(be, norm->residual, none, norm->w, norm->eps, norm->plus_one,
                                  norm->y, norm->rest));
    return n_left > 0 ? qv_op_linears(be, norm->y, n_left, left) : QV_OK;
}

qv_status qv_check_gated_norm(const qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w,
                              bool gate_first, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("gated_rms_norm", x, act, ANY, ANY, ANY);
    EXPECT("gated_rms_norm", z, act, x.shape[0], x.shape[1], x.shape[2]);
    EXPECT("gated_rms_norm", y, act, x.shape[0], x.shape[1], x.shape[2]);
    EXPECT("gated_rms_norm", w, QV_F32, gate_first ? x.shape[1] * x.shape[2] : x.shape[2]);
    return QV_OK;
}

qv_status qv_op_gated_rms_norm(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w, float eps,
                               bool gate_first, qv_tensor y)
{
    QV_TRY(qv_check_gated_norm(be, x, z, w, gate_first, y));
    return qv_tensor_count(&x) ? CALL_SHAPED(gated_rms_norm, x.shape[1], x.shape[2], be, x, z, w,
                                             eps, gate_first, y)
                               : QV_OK;
}

qv_status qv_op_swiglu(qv_backend *be, qv_tensor gate, qv_tensor up, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("swiglu", gate, act, ANY, ANY);
    EXPECT("swiglu", up, act, gate.shape[0], gate.shape[1]);
    EXPECT("swiglu", y, act, gate.shape[0], gate.shape[1]);
    return qv_tensor_count(&y) ? CALL_SHAPED(swiglu, 1, y.shape[1], be, gate, up, y) : QV_OK;
}

qv_status qv_op_sigmoid_gate(qv_backend *be, qv_tensor x, qv_tensor gate)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("sigmoid_gate", x, act, ANY, ANY, ANY);
    EXPECT("sigmoid_gate", gate, act, x.shape[0], x.shape[1], x.shape[2]);
    return qv_tensor_count(&x) ? CALL(sigmoid_gate, be, x, gate) : QV_OK;
}

qv_status qv_op_relu2(qv_backend *be, qv_tensor x, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("relu2", x, act, ANY, ANY);
    EXPECT("relu2", y, act, x.shape[0], x.shape[1]);
    return qv_tensor_count(&y) ? CALL_SHAPED(relu2, 1, y.shape[1], be, x, y) : QV_OK;
}

qv_status qv_op_activate(qv_backend *be, qv_act act, qv_tensor wide, qv_tensor y)
{
    int64_t f = y.shape[1];
    QV_ASSERT(act != QV_ACT_NONE);
    return act == QV_ACT_RELU2
               ? qv_op_relu2(be, wide, y)
               : qv_op_swiglu(be, qv_tensor_cols(wide, 0, f), qv_tensor_cols(wide, f, f), y);
}

/* What qv_op_add adds: delta [n, d] F32, gate [n, 1] or empty. */
qv_status qv_check_delta(qv_backend *be, const char *op, qv_tensor delta, qv_tensor gate, int64_t n,
                         int64_t d)
{
    EXPECT(op, delta, QV_F32, n, d);
    if (gate.data)
        EXPECT(op, gate, be->table->activation_dtype, n, 1);
    return QV_OK;
}

qv_status qv_op_add(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor gate)
{
    EXPECT("add", residual, QV_F32, ANY, ANY);
    QV_TRY(qv_check_delta(be, "add", delta, gate, residual.shape[0], residual.shape[1]));
    return qv_tensor_count(&delta) ? CALL(add, be, residual, delta, gate) : QV_OK;
}

qv_status qv_backend_connect(qv_backend *be)
{
    return qv_has_peers(be) && be->table->connect != NULL ? be->table->connect(be) : QV_OK;
}

qv_status qv_op_all_reduce(qv_backend *be, qv_tensor x)
{
    EXPECT("all_reduce", x, QV_F32, ANY, ANY);
    return qv_has_peers(be) ? COLLECT(all_reduce, x) : QV_OK;
}

qv_status qv_op_sum_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                                 float eps, bool plus_one, qv_tensor y, qv_tensor rest)
{
    if (qv_has_peers(be) && be->table->sum_add_rms_norm != NULL) {
        QV_TRY(qv_check_add_rms_norm(be, residual, delta, w, y, rest));
        return qv_tensor_count(&y)
                   ? COLLECT(sum_add_rms_norm, residual, delta, w, eps, plus_one, y, rest)
                   : QV_OK;
    }
    QV_TRY(qv_op_all_reduce(be, delta));
    return qv_op_add_rms_norm(be, residual, delta, w, eps, plus_one, y, rest);
}

qv_status qv_op_gather_cols(qv_backend *be, qv_tensor part, qv_tensor whole)
{
    EXPECT("gather_cols", part, QV_F32, ANY, ANY);
    if (!qv_has_peers(be)) {
        QV_ASSERT(part.data == whole.data);
        return QV_OK;
    }
    if (be->rank == 0)
        EXPECT("gather_cols", whole, QV_F32, part.shape[0], ANY);
    return COLLECT(gather_cols, part, whole);
}

qv_status qv_op_gather_rows(qv_backend *be, qv_tensor x, const int32_t *rows, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("gather_rows", x, act, ANY, ANY);
    EXPECT("gather_rows", y, act, ANY, x.shape[1]);
    return qv_tensor_count(&y) ? CALL(gather_rows, be, x, rows, y) : QV_OK;
}

/* --- LoRA --------------------------------------------------------------------------------- */

qv_status qv_check_slices(const char *op, int32_t n_slices, const int64_t *start, int64_t n_out)
{
    int64_t last = 0;
    for (int32_t i = 0; i <= n_slices; i++) {
        if (start[i] < last || start[i] > n_out)
            return qv_fail(QV_ERR_SHAPE, "%s: slice %d starts at row %lld, after row %lld of %lld",
                           op, i, (long long)start[i], (long long)last, (long long)n_out);
        last = start[i];
    }
    return QV_OK;
}

qv_status qv_check_scratch(const char *op, qv_tensor scratch, const char *rows, int64_t n_rows,
                           int32_t n_slices, int32_t max_rank)
{
    EXPECT_CONTIGUOUS(op, scratch, QV_F32, ANY, n_slices, max_rank);
    if (scratch.shape[0] < n_rows)
        return qv_fail(QV_ERR_LIMIT, "%s: scratch for %lld %s, but there are %lld", op,
                       (long long)scratch.shape[0], rows, (long long)n_rows);
    return QV_OK;
}

static qv_status check_lora(qv_backend *be, const qv_lora_site *site, qv_tensor x,
                            qv_tensor scratch, qv_tensor y, qv_dtype y_dtype)
{
    qv_dtype dtype = site->a.dtype == QV_BF16 ? QV_BF16 : QV_F32;
    const qv_tensor a = site->a, b = site->b;
    EXPECT_CONTIGUOUS("lora", a, dtype, site->n_slots, site->n_slices, site->max_rank, site->n_in);
    EXPECT_CONTIGUOUS("lora", b, dtype, site->n_slots, site->max_rank, site->n_out);
    QV_TRY(qv_check_slices("lora", site->n_slices, site->slice_start, site->n_out));
    EXPECT("lora", x, be->table->activation_dtype, ANY, site->n_in);
    EXPECT("lora", y, y_dtype, x.shape[0], site->n_out);
    return qv_check_scratch("lora", scratch, "tokens", x.shape[0], site->n_slices, site->max_rank);
}

qv_status qv_op_lora(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                     const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                     qv_tensor scratch, qv_tensor y)
{
    QV_TRY(check_lora(be, site, x, scratch, y, be->table->activation_dtype));
    return x.shape[0] && n_segs > 0 ? CALL_SHAPED(lora, site->n_out, site->n_in, be, site, n_segs,
                                                  seg_start, seg_slot, x, scratch, y)
                                    : QV_OK;
}

qv_status qv_op_lora_f32(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                         const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                         qv_tensor scratch, qv_tensor y)
{
    QV_TRY(check_lora(be, site, x, scratch, y, QV_F32));
    return x.shape[0] && n_segs > 0 ? CALL_SHAPED(lora_f32, site->n_out, site->n_in, be, site,
                                                  n_segs, seg_start, seg_slot, x, scratch, y)
                                    : QV_OK;
}

qv_status qv_op_linear_lora(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                            int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                            qv_tensor x, qv_tensor scratch, qv_tensor y, bool f32)
{
    qv_dtype y_dtype = f32 ? QV_F32 : be->table->activation_dtype;
    QV_TRY(qv_check_linear(be, w, x, y, y_dtype));
    QV_TRY(check_lora(be, site, x, scratch, y, y_dtype));
    if (x.shape[0] > 0 && n_segs > 0 && be->table->linear_lora != NULL)
        return CALL_ON(be->table, linear_lora, w->n_out, w->n_in, be, w, site, n_segs, seg_start,
                       seg_slot, x, scratch, y);
    QV_TRY(f32 ? qv_op_linear_f32(be, w, x, (qv_tensor){.data = NULL}, y)
               : qv_op_linear(be, w, x, y));
    return (f32 ? qv_op_lora_f32 : qv_op_lora)(be, site, n_segs, seg_start, seg_slot, x, scratch,
                                               y);
}

qv_status qv_op_linear_lora_add(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                                int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                                qv_tensor x, qv_tensor scratch, qv_tensor y, bool *done)
{
    QV_TRY(qv_check_linear(be, w, x, y, QV_F32));
    QV_TRY(check_lora(be, site, x, scratch, y, QV_F32));
    *done = n_segs > 0 && takes_add(be->table->takes_linear_lora_add, be, w, x, y);
    return *done ? CALL_ON(be->table, linear_lora_add, w->n_out, w->n_in, be, w, site, n_segs,
                           seg_start, seg_slot, x, scratch, y)
                 : QV_OK;
}

qv_status qv_op_embed_lora(qv_backend *be, const qv_embed_lora_site *site, int32_t n_segs,
                           const int32_t *seg_start, const int32_t *seg_slot, const int32_t *ids,
                           qv_tensor y)
{
    EXPECT("embed_lora", y, QV_F32, ANY, site->n_out);
    if (!qv_is_weight_dtype(site->dtype))
        return qv_fail(QV_ERR_UNSUPPORTED, "embed_lora: A and B are F32 or BF16, not %s",
                       qv_dtype_name(site->dtype));
    return y.shape[0] && n_segs > 0
               ? CALL(embed_lora, be, site, n_segs, seg_start, seg_slot, ids, y)
               : QV_OK;
}
