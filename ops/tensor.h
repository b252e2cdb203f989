/* qv_tensor: a typed, strided view of memory that a backend owns. A small value type: copy it
 * freely; it owns nothing. Dimension 0 is the slowest. Strides are in elements, the last one is
 * always 1. Sizes are int64 wherever they multiply.
 */
#ifndef QV_OPS_TENSOR_H
#define QV_OPS_TENSOR_H

#include "common/dtype.h"
#include "common/status.h"

#include <stdint.h>

#define QV_MAX_DIMS 4

typedef struct {
    void *data; /* of the backend's device; NULL only when the tensor is empty */
    qv_dtype dtype;
    int n_dims;
    int64_t shape[QV_MAX_DIMS];
    int64_t stride[QV_MAX_DIMS]; /* elements between neighbours along each dimension */
} qv_tensor;

/* Contiguous tensors over `data`. */
qv_tensor qv_tensor_1d(void *data, qv_dtype dtype, int64_t n0);
qv_tensor qv_tensor_2d(void *data, qv_dtype dtype, int64_t n0, int64_t n1);
qv_tensor qv_tensor_3d(void *data, qv_dtype dtype, int64_t n0, int64_t n1, int64_t n2);
qv_tensor qv_tensor_4d(void *data, qv_dtype dtype, int64_t n0, int64_t n1, int64_t n2, int64_t n3);

/* Rows [start, start + n) along dimension 0. */
qv_tensor qv_tensor_rows(qv_tensor t, int64_t start, int64_t n);

/* Columns [start, start + n) of a 2-D tensor: [rows, n] with t's row stride. */
qv_tensor qv_tensor_cols(qv_tensor t, int64_t start, int64_t n);

/* A 2-D tensor [rows, a * b] (any row stride) seen as [rows, a, b]. */
qv_tensor qv_tensor_split(qv_tensor t, int64_t a, int64_t b);

/* Sub-range [start, start + n) of the last dimension of a 3-D tensor. */
qv_tensor qv_tensor_last(qv_tensor t, int64_t start, int64_t n);

int64_t qv_tensor_count(const qv_tensor *t);
bool qv_tensor_is_contiguous(const qv_tensor *t);

/* "bf16[4, 192]" into buf. Returns buf. */
const char *qv_tensor_describe(const qv_tensor *t, char *buf, size_t size);

#endif
