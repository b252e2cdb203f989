/* qv_op_attention, with or without a gate: bounds, splits and scratch for the kernels. */
#include "ops/cuda/cuda.h"

static qv_k_rows rows3(qv_tensor t)
{
    return (qv_k_rows){.data = t.data, .token = t.stride[0], .head = t.stride[1]};
}

qv_status qv_cuda_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                            float scale, qv_tensor q, qv_tensor o)
{
    return qv_cuda_gated_attention(be, batch, kv, scale, q, (qv_tensor){.data = NULL}, o);
}

qv_status qv_cuda_gated_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                                  float scale, qv_tensor q, qv_tensor gate, qv_tensor o)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    qv_k_attention_args args = {
        .pos = batch->pos,
        .seq_start = batch->seq_start,
        .page_table = batch->page_table,
        .n_tokens = batch->n_tokens,
        .n_seqs = batch->n_seqs,
        .page_stride = batch->page_stride,
        .page_tokens = kv->page_tokens,
        .n_heads = (int32_t)q.shape[1],
        .n_kv_heads = (int32_t)kv->k.shape[2],
        .head_dim = (int32_t)q.shape[2],
        .scale = scale,
        .q = rows3(q),
        .o = rows3(o),
        .gate = rows3(gate),
        .k_pages = kv->k.data,
        .v_pages = kv->v.data,
        .n_pages = kv->k.shape[0],
        .hopper = cuda->major == 9,
        .max_seq_tokens = batch->max_seq_tokens ? batch->max_seq_tokens : batch->n_tokens,
        .max_context =
            batch->max_context ? batch->max_context : batch->page_stride * kv->page_tokens,
        .counters = cuda->counters,
        .one_form = cuda->deterministic,
    };
    bool fits = (size_t)args.n_seqs * (size_t)args.n_kv_heads <= QV_CUDA_COUNTERS;
    if (!qv_k_attention_can(&args) || (!fits && !args.one_form))
        return qv_k_any_attention(&args, cuda->stream);
    if (args.one_form)
        return qv_k_attention(&args, cuda->stream);
    args.n_splits = qv_k_attention_splits(args.n_seqs, args.n_kv_heads, cuda->n_sms);
    size_t bytes = qv_k_attention_scratch(args.n_seqs, args.n_heads, args.head_dim, args.n_splits);
    QV_TRY(qv_cuda_scratch_require(cuda, bytes, &args.scratch));
    return qv_k_attention(&args, cuda->stream);
}
