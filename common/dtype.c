#include "common/dtype.h"

static const struct {
    const char *name;
    size_t bytes;
} dtypes[QV_DTYPE_COUNT] = {
#define QV_DTYPE_ROW(name, bytes) {#name, bytes},
    QV_DTYPE_LIST(QV_DTYPE_ROW)
#undef QV_DTYPE_ROW
};

const char *qv_dtype_name(qv_dtype dtype)
{
    return (unsigned)dtype < QV_DTYPE_COUNT ? dtypes[dtype].name : "unknown";
}

qv_status qv_dtype_parse(const char *name, qv_dtype *out)
{
    for (int i = 0; i < QV_DTYPE_COUNT; i++) {
        if (strcmp(dtypes[i].name, name) == 0) {
            *out = (qv_dtype)i;
            return QV_OK;
        }
    }
    return qv_fail(QV_ERR_UNSUPPORTED, "dtype \"%.64s\" is not one that is known", name);
}

size_t qv_dtype_size(qv_dtype dtype)
{
    return (unsigned)dtype < QV_DTYPE_COUNT ? dtypes[dtype].bytes : 0;
}

bool qv_dtype_is_float(qv_dtype dtype)
{
    switch (dtype) {
    case QV_F32:
    case QV_F16:
    case QV_BF16:
    case QV_F64:
    case QV_F8_E4M3:
    case QV_F8_E5M2:
        return true;
    default:
        return false;
    }
}

/* One loop per dtype: a load or store through memcpy, since tensors in a file may be unaligned, and
 * a conversion that the compiler inlines and vectorises. */
#define CONVERT(type, convert_expr, dst_type)                                                      \
    for (int64_t i = 0; i < n; i++) {                                                              \
        type x;                                                                                    \
        memcpy(&x, (const char *)src + (size_t)i * sizeof x, sizeof x);                            \
        dst_type y = (convert_expr);                                                               \
        memcpy((char *)dst + (size_t)i * sizeof y, &y, sizeof y);                                  \
    }                                                                                              \
    return QV_OK

qv_status qv_dtype_to_f32(qv_dtype from, const void *restrict src, float *restrict dst, int64_t n)
{
    switch (from) {
    case QV_F32:
        CONVERT(float, x, float);
    case QV_F16:
        CONVERT(uint16_t, qv_f16_to_f32(x), float);
    case QV_BF16:
        CONVERT(uint16_t, qv_bf16_to_f32(x), float);
    case QV_F64:
        CONVERT(double, (float)x, float);
    case QV_F8_E4M3:
        CONVERT(uint8_t, qv_f8e4m3_to_f32(x), float);
    case QV_F8_E5M2:
        CONVERT(uint8_t, qv_f8e5m2_to_f32(x), float);
    default:
        return qv_fail(QV_ERR_UNSUPPORTED, "%s does not convert to F32", qv_dtype_name(from));
    }
}

qv_status qv_dtype_from_f32(qv_dtype to, const float *restrict src, void *restrict dst, int64_t n)
{
    switch (to) {
    case QV_F32:
        CONVERT(float, x, float);
    case QV_F16:
        CONVERT(float, qv_f32_to_f16(x), uint16_t);
    case QV_BF16:
        CONVERT(float, qv_f32_to_bf16(x), uint16_t);
    case QV_F64:
        CONVERT(float, (double)x, double);
    case QV_F8_E4M3:
        CONVERT(float, qv_f32_to_f8e4m3(x), uint8_t);
    case QV_F8_E5M2:
        CONVERT(float, qv_f32_to_f8e5m2(x), uint8_t);
    default:
        return qv_fail(QV_ERR_UNSUPPORTED, "F32 does not convert to %s", qv_dtype_name(to));
    }
}
