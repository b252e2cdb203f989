/* Weights on the device: row-major as in checkpoints, BF16 or F32. */
#include "ops/cuda/cuda.h"

#include <stdlib.h>

void qv_cuda_weight_free(qv_backend *be, qv_weight *w)
{
    qv_cuda_weight *cw = (qv_cuda_weight *)w;
    if (cw->data != NULL)
        qv_cuda_free(be, cw->data);
    free(cw);
}

qv_status qv_cuda_weight_new(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in,
                             qv_dtype dtype, qv_weight **out)
{
    qv_cuda_weight *w = calloc(1, sizeof *w);
    if (w == NULL)
        return qv_fail(QV_ERR_NOMEM, "cuda: no memory for a weight");
    w->base = (qv_weight){
        .backend = be, .n_experts = n_experts, .n_out = n_out, .n_in = n_in, .dtype = dtype};
    size_t n = (size_t)(n_experts > 0 ? n_experts : 1), bytes = 0;
    qv_status status = QV_OK;
    if (__builtin_mul_overflow((size_t)n_out * (size_t)n_in, qv_dtype_size(dtype),
                               &w->expert_bytes) ||
        __builtin_mul_overflow(w->expert_bytes, n, &bytes))
        status = qv_fail(QV_ERR_NOMEM, "cuda: a weight of %zu matrices [%lld, %lld] is too large",
                         n, (long long)n_out, (long long)n_in);
    if (status == QV_OK)
        status = qv_cuda_alloc(be, bytes, &w->data);
    if (status != QV_OK) {
        free(w);
        return status;
    }
    *out = &w->base;
    return QV_OK;
}

void *qv_cuda_weight_rows(const qv_weight *w)
{
    return qv_cuda_weight_of(w)->data;
}

qv_status qv_cuda_weight_fill(qv_backend *be, qv_weight *w, float scale, uint64_t seed)
{
    int64_t n = (w->n_experts > 0 ? w->n_experts : 1) * w->n_out * w->n_in;
    return qv_k_fill(qv_cuda_weight_of(w)->data, w->dtype == QV_F32, n, 0, scale, seed,
                     qv_cuda(be)->stream);
}

/* Rows of another dtype or stride, through float32 where they must change. */
static qv_status convert_rows(const qv_weight *w, int64_t n_rows, const void *src,
                              qv_dtype src_dtype, int64_t src_stride, void *dst)
{
    float *row = malloc((size_t)w->n_in * sizeof *row);
    if (row == NULL)
        return qv_fail(QV_ERR_NOMEM, "cuda: no memory to load a weight");
    qv_status status = QV_OK;
    size_t src_bytes = (size_t)src_stride * qv_dtype_size(src_dtype);
    size_t dst_bytes = (size_t)w->n_in * qv_dtype_size(w->dtype);
    for (int64_t i = 0; i < n_rows && status == QV_OK; i++) {
        status =
            qv_dtype_to_f32(src_dtype, (const char *)src + (size_t)i * src_bytes, row, w->n_in);
        if (status == QV_OK)
            status = qv_dtype_from_f32(w->dtype, row, (char *)dst + (size_t)i * dst_bytes, w->n_in);
    }
    free(row);
    return status;
}

qv_status qv_cuda_weight_load(qv_backend *be, qv_weight *w, int64_t expert, int64_t row,
                              int64_t n_rows, const void *src, qv_dtype src_dtype,
                              int64_t src_stride)
{
    const qv_cuda_weight *cw = qv_cuda_weight_of(w);
    size_t row_bytes = (size_t)w->n_in * qv_dtype_size(w->dtype);
    size_t bytes = (size_t)n_rows * row_bytes;
    char *dst = (char *)cw->data + (size_t)expert * cw->expert_bytes + (size_t)row * row_bytes;
    if (src_dtype == w->dtype && (src_stride == w->n_in || n_rows == 1))
        return qv_cuda_upload(be, dst, src, bytes);
    void *rows = malloc(bytes);
    if (rows == NULL)
        return qv_fail(QV_ERR_NOMEM, "cuda: no memory to load a weight");
    qv_status status = convert_rows(w, n_rows, src, src_dtype, src_stride, rows);
    if (status == QV_OK)
        status = qv_cuda_upload(be, dst, rows, bytes);
    free(rows);
    return status;
}
