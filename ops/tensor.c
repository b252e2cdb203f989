#include "ops/tensor.h"

#include <stdio.h>

static qv_tensor contiguous(void *data, qv_dtype dtype, int n_dims, const int64_t *shape)
{
    qv_tensor t = {.data = data, .dtype = dtype, .n_dims = n_dims};
    int64_t stride = 1;
    for (int i = n_dims - 1; i >= 0; i--) {
        t.shape[i] = shape[i];
        t.stride[i] = stride;
        stride *= shape[i];
    }
    return t;
}

qv_tensor qv_tensor_1d(void *data, qv_dtype dtype, int64_t n0)
{
    return contiguous(data, dtype, 1, (const int64_t[]){n0});
}

qv_tensor qv_tensor_2d(void *data, qv_dtype dtype, int64_t n0, int64_t n1)
{
    return contiguous(data, dtype, 2, (const int64_t[]){n0, n1});
}

qv_tensor qv_tensor_3d(void *data, qv_dtype dtype, int64_t n0, int64_t n1, int64_t n2)
{
    return contiguous(data, dtype, 3, (const int64_t[]){n0, n1, n2});
}

qv_tensor qv_tensor_4d(void *data, qv_dtype dtype, int64_t n0, int64_t n1, int64_t n2, int64_t n3)
{
    return contiguous(data, dtype, 4, (const int64_t[]){n0, n1, n2, n3});
}

/* Move the start by `n` elements; an empty tensor may have no memory to move in. */
static void advance(qv_tensor *t, int64_t n)
{
    if (t->data)
        t->data = (char *)t->data + n * (int64_t)qv_dtype_size(t->dtype);
}

qv_tensor qv_tensor_rows(qv_tensor t, int64_t start, int64_t n)
{
    QV_ASSERT(t.n_dims >= 1 && start >= 0 && n >= 0 && start + n <= t.shape[0]);
    advance(&t, start * t.stride[0]);
    t.shape[0] = n;
    return t;
}

qv_tensor qv_tensor_cols(qv_tensor t, int64_t start, int64_t n)
{
    QV_ASSERT(t.n_dims == 2 && start >= 0 && n >= 0 && start + n <= t.shape[1]);
    advance(&t, start);
    t.shape[1] = n;
    return t;
}

qv_tensor qv_tensor_split(qv_tensor t, int64_t a, int64_t b)
{
    QV_ASSERT(t.n_dims == 2 && a >= 0 && b >= 0 && a * b == t.shape[1]);
    t.n_dims = 3;
    t.shape[1] = a;
    t.shape[2] = b;
    t.stride[1] = b;
    t.stride[2] = 1;
    return t;
}

qv_tensor qv_tensor_last(qv_tensor t, int64_t start, int64_t n)
{
    QV_ASSERT(t.n_dims == 3 && start >= 0 && n >= 0 && start + n <= t.shape[2]);
    advance(&t, start);
    t.shape[2] = n;
    return t;
}

int64_t qv_tensor_count(const qv_tensor *t)
{
    int64_t count = 1;
    for (int i = 0; i < t->n_dims; i++)
        count *= t->shape[i];
    return t->n_dims > 0 ? count : 0;
}

bool qv_tensor_is_contiguous(const qv_tensor *t)
{
    int64_t stride = 1;
    for (int i = t->n_dims - 1; i >= 0; i--) {
        if (t->shape[i] != 1 && t->stride[i] != stride)
            return false;
        stride *= t->shape[i];
    }
    return true;
}

const char *qv_tensor_describe(const qv_tensor *t, char *buf, size_t size)
{
    size_t used = 0;
#define APPEND(...)                                                                                \
    do {                                                                                           \
        if (used < size) {                                                                         \
            int n = snprintf(buf + used, size - used, __VA_ARGS__);                                \
            used += n > 0 ? (size_t)n : 0;                                                         \
        }                                                                                          \
    } while (0)
    const char *name = qv_dtype_name(t->dtype);
    for (const char *c = name; *c; c++)
        APPEND("%c", *c >= 'A' && *c <= 'Z' ? *c - 'A' + 'a' : *c);
    APPEND("[");
    for (int i = 0; i < t->n_dims && i < QV_MAX_DIMS; i++)
        APPEND("%s%lld", i ? ", " : "", (long long)t->shape[i]);
    APPEND("]");
#undef APPEND
    return buf;
}
