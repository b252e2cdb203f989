/* Attention and recurrent layers: checks, and what a backend does in one op or several. */
#include "ops/checks.h"

#include <math.h>

/* --- Attention ---------------------------------------------------------------------------- */

static qv_status check_kv(const char *op, const qv_backend *be, const qv_kv_layer *kv)
{
    qv_dtype dtype = be->table->kv_dtype;
    const qv_tensor k = kv->k, v = kv->v;
    EXPECT_CONTIGUOUS(op, k, dtype, ANY, kv->page_tokens, ANY, ANY);
    EXPECT_CONTIGUOUS(op, v, dtype, k.shape[0], k.shape[1], k.shape[2], k.shape[3]);
    if (kv->page_tokens <= 0)
        return qv_fail(QV_ERR_ARG, "%s: pages of %d tokens", op, kv->page_tokens);
    return QV_OK;
}

qv_status qv_check_head_groups(const char *op, int64_t n_heads, int64_t n_groups)
{
    if (n_groups <= 0 || n_heads % n_groups != 0)
        return qv_fail(QV_ERR_SHAPE, "%s: %lld heads do not share %lld heads evenly", op,
                       (long long)n_heads, (long long)n_groups);
    return QV_OK;
}

static qv_status check_rope(const char *op, const qv_backend *be, const qv_batch *batch,
                            int rotary_dim, double theta, qv_tensor q, qv_tensor k, qv_tensor v,
                            const qv_kv_layer *kv)
{
    qv_dtype act = be->table->activation_dtype;
    QV_TRY(check_kv(op, be, kv));
    int64_t n_tokens = batch->n_tokens, n_kv = kv->k.shape[2], d = kv->k.shape[3];
    EXPECT(op, q, act, n_tokens, ANY, d);
    EXPECT(op, k, act, n_tokens, n_kv, d);
    EXPECT(op, v, act, n_tokens, n_kv, d);
    if (rotary_dim < 0 || rotary_dim > d || rotary_dim % 2 != 0)
        return qv_fail(QV_ERR_SHAPE, "%s: %d rotary dimensions of %lld", op, rotary_dim,
                       (long long)d);
    if (rotary_dim > 0 && !(theta > 0 && isfinite(theta)))
        return qv_fail(QV_ERR_ARG, "%s: theta %g", op, theta);
    return QV_OK;
}

qv_status qv_op_rope_kv_write(qv_backend *be, const qv_batch *batch, int rotary_dim, double theta,
                              qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv)
{
    QV_TRY(check_rope("rope_kv_write", be, batch, rotary_dim, theta, q, k, v, kv));
    return batch->n_tokens ? CALL(rope_kv_write, be, batch, rotary_dim, theta, q, k, v, kv) : QV_OK;
}

qv_status qv_op_norm_rope_kv_write(qv_backend *be, const qv_batch *batch, const qv_norm_rope *how,
                                   qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv)
{
    const char *op = "norm_rope_kv_write";
    if (be->table->norm_rope_kv_write == NULL) {
        QV_TRY(qv_op_rms_norm(be, q, how->q_norm, how->eps, how->plus_one, q));
        QV_TRY(qv_op_rms_norm(be, k, how->k_norm, how->eps, how->plus_one, k));
        return qv_op_rope_kv_write(be, batch, how->rotary_dim, how->theta, q, k, v, kv);
    }
    QV_TRY(check_rope(op, be, batch, how->rotary_dim, how->theta, q, k, v, kv));
    EXPECT(op, how->q_norm, QV_F32, q.shape[2]);
    EXPECT(op, how->k_norm, QV_F32, k.shape[2]);
    return batch->n_tokens
               ? CALL_ON(be->table, norm_rope_kv_write, 0, 0, be, batch, how, q, k, v, kv)
               : QV_OK;
}

static qv_status check_attention(const char *op, const qv_backend *be, const qv_batch *batch,
                                 const qv_kv_layer *kv, qv_tensor q, qv_tensor o)
{
    qv_dtype act = be->table->activation_dtype;
    QV_TRY(check_kv(op, be, kv));
    EXPECT(op, q, act, batch->n_tokens, ANY, kv->k.shape[3]);
    EXPECT(op, o, act, batch->n_tokens, q.shape[1], q.shape[2]);
    return qv_check_head_groups(op, q.shape[1], kv->k.shape[2]);
}

qv_status qv_op_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv, float scale,
                          qv_tensor q, qv_tensor o)
{
    QV_TRY(check_attention("attention", be, batch, kv, q, o));
    return qv_tensor_count(&q) ? CALL(attention, be, batch, kv, scale, q, o) : QV_OK;
}

qv_status qv_op_gated_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                                float scale, qv_tensor q, qv_tensor gate, qv_tensor o)
{
    const char *op = "gated_attention";
    if (be->table->gated_attention == NULL) {
        QV_TRY(qv_op_attention(be, batch, kv, scale, q, o));
        return qv_op_sigmoid_gate(be, o, gate);
    }
    QV_TRY(check_attention(op, be, batch, kv, q, o));
    EXPECT(op, gate, be->table->activation_dtype, q.shape[0], q.shape[1], q.shape[2]);
    return qv_tensor_count(&q)
               ? CALL_ON(be->table, gated_attention, 0, 0, be, batch, kv, scale, q, gate, o)
               : QV_OK;
}

/* --- Recurrent layers --------------------------------------------------------------------- */

static qv_status check_conv(const qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                            qv_tensor bias, qv_tensor state, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("conv1d", x, act, batch->n_tokens, ANY);
    EXPECT("conv1d", y, act, batch->n_tokens, x.shape[1]);
    EXPECT_CONTIGUOUS("conv1d", w, QV_F32, x.shape[1], ANY);
    if (w.shape[1] < 1)
        return qv_fail(QV_ERR_SHAPE, "conv1d: a kernel without taps");
    EXPECT_CONTIGUOUS("conv1d", state, act, ANY, x.shape[1], w.shape[1] - 1);
    if (bias.data)
        EXPECT("conv1d", bias, QV_F32, x.shape[1]);
    return QV_OK;
}

qv_status qv_op_conv1d(qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                       qv_tensor bias, qv_tensor state, qv_tensor y)
{
    QV_TRY(check_conv(be, batch, x, w, bias, state, y));
    return qv_tensor_count(&x) ? CALL(conv1d, be, batch, x, w, bias, state, y) : QV_OK;
}

static qv_status check_gdn(const qv_backend *be, const qv_batch *batch, const qv_gdn_args *args)
{
    qv_dtype act = be->table->activation_dtype;
    int64_t n_tokens = batch->n_tokens;
    const qv_tensor q = args->q, k = args->k, v = args->v, a = args->a, b = args->b, o = args->o;
    const qv_tensor a_log = args->a_log, dt_bias = args->dt_bias, state = args->state;
    EXPECT("gdn", q, act, n_tokens, ANY, ANY);
    EXPECT("gdn", k, act, n_tokens, q.shape[1], q.shape[2]);
    EXPECT("gdn", v, act, n_tokens, ANY, ANY);
    EXPECT("gdn", o, act, n_tokens, v.shape[1], v.shape[2]);
    EXPECT("gdn", a, act, n_tokens, v.shape[1]);
    EXPECT("gdn", b, act, n_tokens, v.shape[1]);
    EXPECT("gdn", a_log, QV_F32, v.shape[1]);
    EXPECT("gdn", dt_bias, QV_F32, v.shape[1]);
    EXPECT_CONTIGUOUS("gdn", state, QV_F32, ANY, v.shape[1], q.shape[2], v.shape[2]);
    return qv_check_head_groups("gdn", v.shape[1], q.shape[1]);
}

qv_status qv_op_gdn(qv_backend *be, const qv_batch *batch, const qv_gdn_args *args)
{
    QV_TRY(check_gdn(be, batch, args));
    return qv_tensor_count(&args->v) ? CALL(gdn, be, batch, args) : QV_OK;
}

static qv_status check_ssd(const qv_backend *be, const qv_batch *batch, const qv_ssd_args *args)
{
    qv_dtype act = be->table->activation_dtype;
    int64_t n_tokens = batch->n_tokens;
    const qv_tensor x = args->x, b = args->b, c = args->c, dt = args->dt, y = args->y;
    const qv_tensor a_log = args->a_log, dt_bias = args->dt_bias, d_skip = args->d_skip;
    const qv_tensor state = args->state;
    EXPECT("ssd", x, act, n_tokens, ANY, ANY);
    EXPECT("ssd", y, act, n_tokens, x.shape[1], x.shape[2]);
    EXPECT("ssd", b, act, n_tokens, ANY, ANY);
    EXPECT("ssd", c, act, n_tokens, b.shape[1], b.shape[2]);
    EXPECT("ssd", dt, act, n_tokens, x.shape[1]);
    EXPECT("ssd", a_log, QV_F32, x.shape[1]);
    EXPECT("ssd", dt_bias, QV_F32, x.shape[1]);
    EXPECT("ssd", d_skip, QV_F32, x.shape[1]);
    EXPECT_CONTIGUOUS("ssd", state, QV_F32, ANY, x.shape[1], x.shape[2], b.shape[2]);
    QV_TRY(qv_check_head_groups("ssd", x.shape[1], b.shape[1]));
    if (!(args->dt_min >= 0 && args->dt_min <= args->dt_max))
        return qv_fail(QV_ERR_ARG, "ssd: dt from %g to %g", (double)args->dt_min,
                       (double)args->dt_max);
    return QV_OK;
}

qv_status qv_op_ssd(qv_backend *be, const qv_batch *batch, const qv_ssd_args *args)
{
    QV_TRY(check_ssd(be, batch, args));
    return qv_tensor_count(&args->x) ? CALL(ssd, be, batch, args) : QV_OK;
}

/* What stands around a recurrence. */
static qv_status check_around(const qv_backend *be, const qv_batch *batch, const qv_around *a,
                              bool gate_first)
{
    QV_TRY(check_conv(be, batch, a->x, a->w, a->bias, a->state, a->mixed));
    return qv_check_gated_norm(be, a->groups, a->z, a->norm, gate_first, a->groups);
}

qv_status qv_op_conv_gdn_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                              const qv_gdn_args *args)
{
    const qv_around *a = around;
    QV_TRY(check_around(be, batch, a, false));
    QV_TRY(check_gdn(be, batch, args));
    if (batch->n_tokens > 0 && be->table->takes_conv_gdn_norm != NULL &&
        be->table->takes_conv_gdn_norm(be, batch, a, args))
        return CALL_ON(be->table, conv_gdn_norm, 0, 0, be, batch, a, args);
    QV_TRY(qv_op_conv1d(be, batch, a->x, a->w, a->bias, a->state, a->mixed));
    QV_TRY(qv_op_gdn(be, batch, args));
    return qv_op_gated_rms_norm(be, a->groups, a->z, a->norm, a->eps, false, a->groups);
}

qv_status qv_op_conv_ssd_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                              const qv_ssd_args *args)
{
    const qv_around *a = around;
    QV_TRY(check_around(be, batch, a, true));
    QV_TRY(check_ssd(be, batch, args));
    if (batch->n_tokens > 0 && be->table->takes_conv_ssd_norm != NULL &&
        be->table->takes_conv_ssd_norm(be, batch, a, args))
        return CALL_ON(be->table, conv_ssd_norm, 0, 0, be, batch, a, args);
    QV_TRY(qv_op_conv1d(be, batch, a->x, a->w, a->bias, a->state, a->mixed));
    QV_TRY(qv_op_ssd(be, batch, args));
    return qv_op_gated_rms_norm(be, a->groups, a->z, a->norm, a->eps, true, a->groups);
}
