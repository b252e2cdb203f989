/* LoRA over segments and of the embedding: sites to raw pointers. Which slots are active is read on
 * the device (a slot without a pair has rank 0, or an entry of zeros), so that a recorded step
 * serves any adapters; slot_active is not looked at.
 */
#include "ops/cuda/launch_lora.h"

#include <stddef.h>

/* The structs of ops.h go to kernels as they are. */
_Static_assert(sizeof(qv_lora_slice) == sizeof(qv_k_lora_slice) &&
                   offsetof(qv_lora_slice, scale) == offsetof(qv_k_lora_slice, scale),
               "slices");
_Static_assert(sizeof(qv_embed_lora_slot) == sizeof(qv_k_embed_lora_slot) &&
                   offsetof(qv_embed_lora_slot, scale) == offsetof(qv_k_embed_lora_slot, scale),
               "slots of the embedding");

qv_status qv_cuda_slices(const char *op, int32_t n, const int64_t *start, qv_k_slices *out)
{
    if (n > QV_K_MAX_SLICES)
        return qv_fail(QV_ERR_LIMIT, "%s: %d slices, but %d are possible", op, n, QV_K_MAX_SLICES);
    out->n = n;
    for (int32_t i = 0; i <= n; i++)
        out->start[i] = (int32_t)start[i];
    return QV_OK;
}

qv_status qv_cuda_lora_is_bf16(const char *op, qv_dtype dtype)
{
    if (dtype != QV_BF16)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: on CUDA A and B are BF16, not %s", op,
                       qv_dtype_name(dtype));
    return QV_OK;
}

/* What kernels want to know of a site and of segments over the rows of x. */
static qv_status describe(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                          const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                          qv_k_lora_site *out, qv_k_segments *segments)
{
    *out = (qv_k_lora_site){.a = site->a.data,
                            .b = site->b.data,
                            .slices = (const qv_k_lora_slice *)site->slices,
                            .n_in = site->n_in,
                            .n_out = site->n_out,
                            .max_rank = site->max_rank,
                            .n_slots = site->n_slots};
    *segments = (qv_k_segments){.n_tokens = (int32_t)x.shape[0],
                                .n_segs = n_segs,
                                .seg_start = seg_start,
                                .seg_slot = seg_slot,
                                .one_form = qv_cuda(be)->deterministic};
    QV_TRY(qv_cuda_lora_is_bf16("lora", site->a.dtype));
    return qv_cuda_slices("lora", site->n_slices, site->slice_start, &out->ranges);
}

static qv_status run_lora(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                          const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                          qv_tensor scratch, qv_tensor y)
{
    qv_k_lora_site s;
    qv_k_segments segments;
    QV_TRY(describe(be, site, n_segs, seg_start, seg_slot, x, &s, &segments));
    return qv_k_lora(&segments, &s, x.data, x.stride[0], scratch.data, y.data, y.stride[0],
                     y.dtype == QV_F32, qv_cuda(be)->stream);
}

/* Shrink and the product of prefill. */
static qv_status run_gemm(const qv_cuda_backend *cuda, const qv_k_linear_args *c,
                          const qv_k_stream_lora *lora, bool add)
{
    QV_TRY(qv_k_gemm_shrink(c, lora, cuda->n_sms, cuda->stream));
    return qv_k_gemm(c, lora, add, QV_K_GEMM_ANY, cuda->n_sms, cuda->stream);
}

/* B within the product where that is ours: the bits of a token are then its own. */
qv_status qv_cuda_linear_lora(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                              int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                              qv_tensor x, qv_tensor scratch, qv_tensor y)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    const qv_tensor none = {.data = NULL};
    const qv_k_linear_args c = qv_cuda_linear_args(w, x, none, y);
    qv_k_stream_lora lora = {.x1 = scratch.data, .arrivals = cuda->lora_arrivals};
    QV_TRY(describe(be, site, n_segs, seg_start, seg_slot, x, &lora.site, &lora.segments));
    if (qv_cuda_decodes(cuda, &c, &lora)) {
        qv_k_segments same;
        if (site->next != NULL && site->next->n_in % 8 == 0) /* whole pieces of 16 bytes */
            QV_TRY(describe(be, site->next, n_segs, seg_start, seg_slot, x, &lora.next, &same));
        return qv_k_decode_linear(&c, &lora, cuda->decode_tuning, cuda->n_sms, cuda->stream);
    }
    if (qv_cuda_streams(cuda, &c) && qv_k_stream_linear_can(&c, &lora)) {
        QV_TRY(qv_k_lora_shrink(&lora.segments, &lora.site, c.x, c.x_stride, scratch.data,
                                cuda->stream));
        return qv_k_stream_linear(&c, &lora, cuda->n_sms, cuda->stream);
    }
    if (qv_cuda_gemms(cuda, &c, &lora))
        return run_gemm(cuda, &c, &lora, false);
    QV_TRY(y.dtype == QV_F32 ? qv_cuda_linear_f32(be, w, x, none, y) : qv_cuda_linear(be, w, x, y));
    return qv_k_lora(&lora.segments, &lora.site, c.x, c.x_stride, scratch.data, c.y, c.y_stride,
                     c.y_f32, cuda->stream);
}

qv_status qv_cuda_linear_lora_add(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                                  int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                                  qv_tensor x, qv_tensor scratch, qv_tensor y)
{
    const qv_cuda_backend *cuda = qv_cuda(be);
    const qv_k_linear_args c = qv_cuda_linear_args(w, x, (qv_tensor){.data = NULL}, y);
    qv_k_stream_lora lora = {.x1 = scratch.data};
    QV_TRY(describe(be, site, n_segs, seg_start, seg_slot, x, &lora.site, &lora.segments));
    if (qv_cuda_gemms(cuda, &c, &lora))
        return run_gemm(cuda, &c, &lora, true);
    QV_TRY(qv_cuda_linear_add(be, w, x, y));
    return qv_k_lora(&lora.segments, &lora.site, c.x, c.x_stride, scratch.data, c.y, c.y_stride,
                     c.y_f32, cuda->stream);
}

qv_status qv_cuda_lora(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                       const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                       qv_tensor scratch, qv_tensor y)
{
    return run_lora(be, site, n_segs, seg_start, seg_slot, x, scratch, y);
}

qv_status qv_cuda_lora_f32(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                           const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                           qv_tensor scratch, qv_tensor y)
{
    return run_lora(be, site, n_segs, seg_start, seg_slot, x, scratch, y);
}

qv_status qv_cuda_embed_lora(qv_backend *be, const qv_embed_lora_site *site, int32_t n_segs,
                             const int32_t *seg_start, const int32_t *seg_slot, const int32_t *ids,
                             qv_tensor y)
{
    qv_k_segments segments = {.n_tokens = (int32_t)y.shape[0],
                              .n_segs = n_segs,
                              .seg_start = seg_start,
                              .seg_slot = seg_slot};
    QV_TRY(qv_cuda_lora_is_bf16("embed_lora", site->dtype));
    return qv_k_embed_lora(&segments, (const qv_k_embed_lora_slot *)site->slots, site->max_rank,
                           site->n_out, ids, y.data, y.stride[0], qv_cuda(be)->stream);
}
