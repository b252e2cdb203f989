/* Norms, pointwise ops, embedding, RoPE: from tensors to the arguments of kernels. */
#include "ops/cuda/cuda.h"

static qv_k_rows rows3(qv_tensor t)
{
    return (qv_k_rows){.data = t.data, .token = t.stride[0], .head = t.stride[1]};
}

static qv_k_rows rows2(qv_tensor t)
{
    return (qv_k_rows){.data = t.data, .token = t.stride[0]};
}

static qv_k_extent extent3(qv_tensor t)
{
    return (qv_k_extent){.n_tokens = t.shape[0], .n = t.shape[1], .d = t.shape[2]};
}

static qv_k_extent extent2(qv_tensor t)
{
    return (qv_k_extent){.n_tokens = t.shape[0], .n = 1, .d = t.shape[1]};
}

static void *stream_of(qv_backend *be)
{
    return qv_cuda(be)->stream;
}

qv_status qv_cuda_embed(qv_backend *be, qv_tensor table, int64_t first, const int32_t *ids,
                        qv_tensor y)
{
    return qv_k_embed(table.data, table.dtype == QV_F32, table.stride[0], table.shape[0], first,
                      ids, y.shape[0], y.shape[1], y.data, false, y.stride[0], stream_of(be));
}

qv_status qv_cuda_gather_rows(qv_backend *be, qv_tensor x, const int32_t *rows, qv_tensor y)
{
    return qv_k_embed(x.data, false, x.stride[0], x.shape[0], 0, rows, y.shape[0], y.shape[1],
                      y.data, true, y.stride[0], stream_of(be));
}

qv_status qv_cuda_rms_norm(qv_backend *be, qv_tensor x, qv_tensor w, float eps, bool plus_one,
                           qv_tensor y)
{
    return qv_k_norm(QV_K_NORM, extent3(x), rows3(x), (qv_k_rows){0}, rows3(y), w.data, eps,
                     plus_one, stream_of(be));
}

qv_k_add_norm_args qv_cuda_add_norm_args(qv_tensor residual, qv_tensor delta, qv_tensor w,
                                         float eps, bool plus_one, qv_tensor y, qv_tensor rest)
{
    return (qv_k_add_norm_args){.residual = residual.data,
                                .delta = delta.data,
                                .y = y.data,
                                .rest = rest.data,
                                .w = w.data,
                                .residual_stride = residual.stride[0],
                                .delta_stride = delta.stride[0],
                                .y_stride = y.stride[0],
                                .rest_stride = rest.stride[0],
                                .n_tokens = residual.shape[0],
                                .d = residual.shape[1],
                                .eps = eps,
                                .plus_one = plus_one};
}

qv_status qv_cuda_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                               float eps, bool plus_one, qv_tensor y, qv_tensor rest)
{
    const qv_k_add_norm_args args =
        qv_cuda_add_norm_args(residual, delta, w, eps, plus_one, y, rest);
    return qv_k_add_norm(&args, stream_of(be));
}

qv_status qv_cuda_gated_rms_norm(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w, float eps,
                                 bool gate_first, qv_tensor y)
{
    return qv_k_norm(gate_first ? QV_K_GATE_THEN_NORM : QV_K_NORM_THEN_GATE, extent3(x), rows3(x),
                     rows3(z), rows3(y), w.data, eps, false, stream_of(be));
}

qv_status qv_cuda_swiglu(qv_backend *be, qv_tensor gate, qv_tensor up, qv_tensor y)
{
    return qv_k_pointwise(QV_K_SWIGLU, extent2(y), rows2(gate), rows2(up), rows2(y), stream_of(be));
}

qv_status qv_cuda_sigmoid_gate(qv_backend *be, qv_tensor x, qv_tensor gate)
{
    return qv_k_pointwise(QV_K_SIGMOID_GATE, extent3(x), rows3(gate), rows3(x), rows3(x),
                          stream_of(be));
}

qv_status qv_cuda_relu2(qv_backend *be, qv_tensor x, qv_tensor y)
{
    return qv_k_pointwise(QV_K_RELU2, extent2(y), rows2(x), rows2(x), rows2(y), stream_of(be));
}

qv_status qv_cuda_add(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor gate)
{
    return qv_k_add(extent2(delta), rows2(residual), rows2(delta), rows2(gate), stream_of(be));
}

static qv_k_rope_args rope_args(const qv_batch *batch, int rotary_dim, double theta, qv_tensor q,
                                qv_tensor k, qv_tensor v, const qv_kv_layer *kv)
{
    return (qv_k_rope_args){.pos = batch->pos,
                            .seq_start = batch->seq_start,
                            .page_table = batch->page_table,
                            .n_tokens = batch->n_tokens,
                            .n_seqs = batch->n_seqs,
                            .page_stride = batch->page_stride,
                            .n_heads = (int32_t)q.shape[1],
                            .n_kv_heads = (int32_t)k.shape[1],
                            .head_dim = (int32_t)q.shape[2],
                            .rotary_dim = rotary_dim,
                            .theta = theta,
                            .q = rows3(q),
                            .k = rows3(k),
                            .v = rows3(v),
                            .k_pages = kv->k.data,
                            .v_pages = kv->v.data,
                            .page_tokens = kv->page_tokens};
}

qv_status qv_cuda_rope_kv_write(qv_backend *be, const qv_batch *batch, int rotary_dim, double theta,
                                qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv)
{
    const qv_k_rope_args args = rope_args(batch, rotary_dim, theta, q, k, v, kv);
    return qv_k_rope_kv_write(&args, stream_of(be));
}

qv_status qv_cuda_norm_rope_kv_write(qv_backend *be, const qv_batch *batch, const qv_norm_rope *how,
                                     qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv)
{
    const qv_k_norm_rope_args args = {
        .rope = rope_args(batch, how->rotary_dim, how->theta, q, k, v, kv),
        .q_norm = how->q_norm.data,
        .k_norm = how->k_norm.data,
        .eps = how->eps,
        .plus_one = how->plus_one};
    if (qv_k_norm_rope_can(&args))
        return qv_k_norm_rope_kv_write(&args, stream_of(be));
    QV_TRY(qv_cuda_rms_norm(be, q, how->q_norm, how->eps, how->plus_one, q));
    QV_TRY(qv_cuda_rms_norm(be, k, how->k_norm, how->eps, how->plus_one, k));
    return qv_k_rope_kv_write(&args.rope, stream_of(be));
}
