/* Ops that the CUDA backend does not have. Each says so when it is called; one that gets its kernel
 * leaves this file. */
#include "ops/cuda/cuda.h"

#pragma GCC diagnostic ignored "-Wunused-parameter"

#define PENDING(name)                                                                              \
    return qv_fail(QV_ERR_UNSUPPORTED, "cuda: the op '%s' has no kernel in this build", name)

qv_status qv_cuda_embed(qv_backend *be, qv_tensor table, int64_t first, const int32_t *ids,
                        qv_tensor y)
{
    PENDING("embed");
}

qv_status qv_cuda_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    PENDING("linear");
}

qv_status qv_cuda_linear_f32(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    PENDING("linear_f32");
}

qv_status qv_cuda_rms_norm(qv_backend *be, qv_tensor x, qv_tensor w, float eps, bool plus_one,
                           qv_tensor y)
{
    PENDING("rms_norm");
}

qv_status qv_cuda_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                               float eps, bool plus_one, qv_tensor y)
{
    PENDING("add_rms_norm");
}

qv_status qv_cuda_gated_rms_norm(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w, float eps,
                                 bool gate_first, qv_tensor y)
{
    PENDING("gated_rms_norm");
}

qv_status qv_cuda_swiglu(qv_backend *be, qv_tensor gate, qv_tensor up, qv_tensor y)
{
    PENDING("swiglu");
}

qv_status qv_cuda_sigmoid_gate(qv_backend *be, qv_tensor x, qv_tensor gate)
{
    PENDING("sigmoid_gate");
}

qv_status qv_cuda_sigmoid_scale(qv_backend *be, qv_tensor x, qv_tensor gate)
{
    PENDING("sigmoid_scale");
}

qv_status qv_cuda_relu2(qv_backend *be, qv_tensor x, qv_tensor y)
{
    PENDING("relu2");
}

qv_status qv_cuda_add(qv_backend *be, qv_tensor residual, qv_tensor delta)
{
    PENDING("add");
}

qv_status qv_cuda_gather_rows(qv_backend *be, qv_tensor x, const int32_t *rows, qv_tensor y)
{
    PENDING("gather_rows");
}

qv_status qv_cuda_rope_kv_write(qv_backend *be, const qv_batch *batch, int rotary_dim, double theta,
                                qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv)
{
    PENDING("rope_kv_write");
}

qv_status qv_cuda_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                            float scale, qv_tensor q, qv_tensor o)
{
    PENDING("attention");
}

qv_status qv_cuda_sample(qv_backend *be, qv_tensor logits, int32_t n_valid,
                         const qv_sample_row *rows, qv_sample_result *results)
{
    PENDING("sample");
}
