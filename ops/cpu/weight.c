/* Weights of the CPU backend: arranging rows for the kernel that will read them. */
#include "ops/cpu/cpu.h"

#include <stdlib.h>
#include <string.h>

qv_status qv_cpu_weight_new(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in,
                            qv_dtype dtype, qv_weight **out)
{
    bool packed = n_experts > 0 || qv_cpu(be)->gemm == QV_CPU_GEMM_EXACT;
    size_t matrix_bytes = qv_weight_bytes(n_out, n_in, dtype), bytes;
    if (__builtin_mul_overflow(matrix_bytes, (size_t)(n_experts > 0 ? n_experts : 1), &bytes))
        bytes = SIZE_MAX;
    if (!packed && n_in > QV_BLAS_TILE)
        return qv_fail(QV_ERR_LIMIT, "weight: %lld columns, but openblas takes up to %d",
                       (long long)n_in, QV_BLAS_TILE);
    qv_cpu_weight *w = calloc(1, sizeof *w);
    if (!w)
        return qv_fail(QV_ERR_NOMEM, "weight: no memory");
    *w = (qv_cpu_weight){
        .base =
            {.backend = be, .n_experts = n_experts, .n_out = n_out, .n_in = n_in, .dtype = dtype},
        .packed = packed,
        .expert_bytes = n_experts > 0 ? matrix_bytes : 0,
    };
    qv_status status = qv_backend_alloc(be, bytes, &w->data);
    if (status != QV_OK) {
        free(w);
        return status;
    }
    *out = &w->base;
    return QV_OK;
}

void qv_cpu_weight_free(qv_backend *be, qv_weight *weight)
{
    qv_cpu_weight *w = (qv_cpu_weight *)weight;
    qv_backend_free(be, w->data);
    free(w);
}

/* One number of `from` as one of `to`. A BF16 source stays as it is, bit for bit. */
static inline void convert(qv_dtype to, void *dst, qv_dtype from, const void *src)
{
    if (to == QV_BF16 && from == QV_BF16) {
        *(uint16_t *)dst = *(const uint16_t *)src;
        return;
    }
    float x = from == QV_F32    ? *(const float *)src
              : from == QV_BF16 ? qv_bf16_to_f32(*(const uint16_t *)src)
                                : qv_f16_to_f32(*(const uint16_t *)src);
    if (to == QV_F32)
        *(float *)dst = x;
    else
        *(uint16_t *)dst = qv_f32_to_bf16(x);
}

/* Columns at a time, so that a block of source and destination stays in the L1 cache. */
#define BLOCK 32

/* Transpose rows [row, row + n_rows), all of the group that starts at row `first`, into the group
 * of the matrix at `data`. Forced inline: each call has constant dtypes and becomes its own loop.
 */
static inline __attribute__((always_inline)) void
pack_rows(const qv_cpu_weight *w, char *data, int64_t first, int64_t row, int64_t n_rows,
          const char *src, qv_dtype from, int64_t src_stride, qv_dtype to)
{
    const size_t from_size = from == QV_F32 ? 4 : 2, to_size = to == QV_F32 ? 4 : 2;
    int64_t n_in = w->base.n_in, width = qv_cpu_group_rows(&w->base, first);
    char *dst = data + (first * n_in + row - first) * (int64_t)to_size;
    for (int64_t k0 = 0; k0 < n_in; k0 += BLOCK) {
        int64_t k1 = k0 + BLOCK < n_in ? k0 + BLOCK : n_in;
        for (int64_t r = 0; r < n_rows; r++)
            for (int64_t k = k0; k < k1; k++)
                convert(to, dst + (k * width + r) * (int64_t)to_size, from,
                        src + (r * src_stride + k) * (int64_t)from_size);
    }
}

static void pack(const qv_cpu_weight *w, char *data, int64_t first, int64_t row, int64_t n_rows,
                 const char *src, qv_dtype from, int64_t src_stride)
{
#define CASE(f, t)                                                                                 \
    if (from == (f) && w->base.dtype == (t))                                                       \
    pack_rows(w, data, first, row, n_rows, src, f, src_stride, t)
    CASE(QV_BF16, QV_BF16);
    CASE(QV_F32, QV_BF16);
    CASE(QV_F16, QV_BF16);
    CASE(QV_BF16, QV_F32);
    CASE(QV_F32, QV_F32);
    CASE(QV_F16, QV_F32);
#undef CASE
}

static void copy_rows(qv_cpu_weight *w, int64_t row, int64_t n_rows, const char *src, qv_dtype from,
                      int64_t src_stride)
{
    int64_t n_in = w->base.n_in;
    size_t from_size = qv_dtype_size(from), to_size = qv_dtype_size(w->base.dtype);
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t k = 0; k < n_in; k++)
            convert(w->base.dtype, (char *)w->data + (size_t)((row + r) * n_in + k) * to_size, from,
                    src + (size_t)(r * src_stride + k) * from_size);
}

qv_status qv_cpu_weight_load(qv_backend *be, qv_weight *weight, int64_t expert, int64_t row,
                             int64_t n_rows, const void *src, qv_dtype src_dtype,
                             int64_t src_stride)
{
    (void)be;
    qv_cpu_weight *w = (qv_cpu_weight *)weight;
    if (!w->packed) {
        copy_rows(w, row, n_rows, src, src_dtype, src_stride);
        return QV_OK;
    }
    size_t row_bytes = (size_t)src_stride * qv_dtype_size(src_dtype);
    for (int64_t end = row + n_rows, next; row < end; row = next) {
        int64_t first = row / QV_GROUP * QV_GROUP;
        next = first + QV_GROUP < end ? first + QV_GROUP : end;
        pack(w, qv_cpu_expert_data(w, expert), first, row, next - row, src, src_dtype, src_stride);
        src = (const char *)src + (size_t)(next - row) * row_bytes;
    }
    return QV_OK;
}
