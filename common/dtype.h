/* Dtypes: the element types of tensors, their names and sizes, and conversions of single numbers.
 *
 * Plain values and pure functions: any thread, host and device. The inline conversions work in C
 * and in CUDA and give the same bits on both. They round to nearest even and keep NaN a NaN; what
 * is too large becomes infinity where the type has one and the largest finite number where it has
 * not.
 */
#ifndef QV_COMMON_DTYPE_H
#define QV_COMMON_DTYPE_H

#include "common/status.h"

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define QV_HD __host__ __device__
#else
#define QV_HD
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* One row per dtype: name (as in safetensors), bytes of an element. */
#define QV_DTYPE_LIST(X)                                                                           \
    X(F32, 4)                                                                                      \
    X(F16, 2)                                                                                      \
    X(BF16, 2)                                                                                     \
    X(F64, 8)                                                                                      \
    X(F8_E4M3, 1) /* 1-4-3, bias 7, no infinity, largest 448 */                                    \
    X(F8_E5M2, 1) /* 1-5-2, bias 15, infinities, largest 57344 */                                  \
    X(I64, 8)                                                                                      \
    X(I32, 4)                                                                                      \
    X(I16, 2)                                                                                      \
    X(I8, 1)                                                                                       \
    X(U64, 8)                                                                                      \
    X(U32, 4)                                                                                      \
    X(U16, 2)                                                                                      \
    X(U8, 1)                                                                                       \
    X(BOOL, 1) /* 0 or 1 in a byte */

typedef enum {
#define QV_DTYPE_ENUM(name, bytes) QV_##name,
    QV_DTYPE_LIST(QV_DTYPE_ENUM)
#undef QV_DTYPE_ENUM
        QV_DTYPE_COUNT
} qv_dtype;

/* "BF16" and so on; "unknown" for a value that is no dtype. Never NULL. */
const char *qv_dtype_name(qv_dtype dtype);

/* Find a dtype by its exact safetensors name. Errors: UNSUPPORTED (names the text). */
qv_status qv_dtype_parse(const char *name, qv_dtype *out);

/* Bytes of one element; 0 for a value that is no dtype. */
size_t qv_dtype_size(qv_dtype dtype);

/* F32, F16, BF16, F64 and the F8 types. */
bool qv_dtype_is_float(qv_dtype dtype);

/* Arrays of n numbers between a float dtype and f32. Source and destination do not overlap and need
 * no alignment beyond their element. Errors: UNSUPPORTED (a dtype that is not a float). */
qv_status qv_dtype_to_f32(qv_dtype from, const void *src, float *dst, int64_t n);
qv_status qv_dtype_from_f32(qv_dtype to, const float *src, void *dst, int64_t n);

/* --- bits ----------------------------------------------------------------------------------- */

QV_HD static inline uint32_t qv_f32_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

QV_HD static inline float qv_f32_from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A number in [-1, 1) that looks random, at place i of the stream `seed` (SplitMix64, 24 bits). */
QV_HD static inline float qv_made_up(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (i + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    z ^= z >> 31;
    return (float)(z >> 40) * (1.0f / 8388608.0f) - 1.0f;
}

/* v / 2^shift to nearest, ties to even; 1 <= shift <= 31 and v < 2^31. */
QV_HD static inline uint32_t qv_round_shift(uint32_t v, int shift)
{
    uint32_t half = UINT32_C(1) << (shift - 1);
    uint32_t odd = (v >> shift) & 1;
    return (v + half - 1 + odd) >> shift;
}

/* --- bf16: the upper half of an f32 --------------------------------------------------------- */

QV_HD static inline float qv_bf16_to_f32(uint16_t x)
{
    return qv_f32_from_bits((uint32_t)x << 16);
}

QV_HD static inline uint16_t qv_f32_to_bf16(float x)
{
    uint32_t bits = qv_f32_bits(x);
    if ((bits & UINT32_C(0x7FFFFFFF)) >
        UINT32_C(0x7F800000)) /* NaN: keep the sign, make it quiet */
        return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* --- small floats with e exponent bits and m mantissa bits ---------------------------------- */

/* Widen sign | exponent | mantissa to f32, exactly. Infinities and NaNs are the caller's. */
QV_HD static inline float qv_small_to_f32(uint32_t x, int exp_bits, int man_bits)
{
    uint32_t sign = (x >> (exp_bits + man_bits)) << 31;
    uint32_t exp = (x >> man_bits) & ((UINT32_C(1) << exp_bits) - 1);
    uint32_t man = x & ((UINT32_C(1) << man_bits) - 1);
    int bias = (1 << (exp_bits - 1)) - 1;
    if (exp == 0) { /* subnormal: man * 2^(1 - bias - man_bits), a product without rounding */
        float scale = qv_f32_from_bits((uint32_t)(127 + 1 - bias - man_bits) << 23);
        return qv_f32_from_bits(sign | qv_f32_bits((float)man * scale));
    }
    uint32_t exp32 = (uint32_t)((int)exp - bias + 127);
    return qv_f32_from_bits(sign | exp32 << 23 | man << (23 - man_bits));
}

/* Round the finite magnitude `bits` (an f32 without its sign) to exponent | mantissa. A result
 * above the type's largest finite code is the caller's to map. */
QV_HD static inline uint32_t qv_f32_to_small(uint32_t bits, int exp_bits, int man_bits)
{
    int bias = (1 << (exp_bits - 1)) - 1;
    int exp = (int)(bits >> 23) - 127 + bias;
    int drop = 23 - man_bits;
    if (exp > 0) /* the exponent sits above the mantissa, so a carry rounds into it */
        return qv_round_shift(bits - ((uint32_t)(127 - bias) << 23), drop);
    uint32_t man = (bits & UINT32_C(0x7FFFFF)) | UINT32_C(0x800000);
    int shift = drop + 1 - exp;
    return shift > 25 ? 0
                      : qv_round_shift(man, shift); /* beyond 25 it is below half of the least */
}

/* --- f16: 1-5-10 ---------------------------------------------------------------------------- */

QV_HD static inline float qv_f16_to_f32(uint16_t x)
{
    if ((x & 0x7C00) == 0x7C00) /* infinity or NaN, the payload kept */
        return qv_f32_from_bits((uint32_t)(x & 0x8000) << 16 | UINT32_C(0x7F800000) |
                                (uint32_t)(x & 0x3FF) << 13);
    return qv_small_to_f32(x, 5, 10);
}

QV_HD static inline uint16_t qv_f32_to_f16(float x)
{
    uint32_t bits = qv_f32_bits(x);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= UINT32_C(0x7FFFFFFF);
    if (bits > UINT32_C(0x7F800000))
        return (uint16_t)(sign | 0x7E00 | (bits >> 13 & 0x3FF));
    if (bits >= UINT32_C(0x47800000)) /* 65536 and above, infinity too */
        return sign | 0x7C00;
    return (uint16_t)(sign | qv_f32_to_small(bits, 5, 10)); /* 65520 and above carry to infinity */
}

/* --- fp8 ------------------------------------------------------------------------------------ */

QV_HD static inline float qv_f8e4m3_to_f32(uint8_t x)
{
    if ((x & 0x7F) == 0x7F)
        return qv_f32_from_bits((uint32_t)(x & 0x80) << 24 | UINT32_C(0x7FC00000));
    return qv_small_to_f32(x, 4, 3);
}

/* Saturates: beyond 448, and infinity, become 448. */
QV_HD static inline uint8_t qv_f32_to_f8e4m3(float x)
{
    uint32_t bits = qv_f32_bits(x);
    uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
    bits &= UINT32_C(0x7FFFFFFF);
    if (bits > UINT32_C(0x7F800000))
        return sign | 0x7F;
    if (bits >= UINT32_C(0x43E00000)) /* 448 and above */
        return sign | 0x7E;
    return (uint8_t)(sign | qv_f32_to_small(bits, 4, 3));
}

QV_HD static inline float qv_f8e5m2_to_f32(uint8_t x)
{
    return qv_f16_to_f32((uint16_t)(x << 8)); /* the upper half of an f16 */
}

/* Overflow becomes infinity. */
QV_HD static inline uint8_t qv_f32_to_f8e5m2(float x)
{
    uint32_t bits = qv_f32_bits(x);
    uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
    bits &= UINT32_C(0x7FFFFFFF);
    if (bits > UINT32_C(0x7F800000))
        return sign | 0x7E;
    if (bits >= UINT32_C(0x47800000))
        return sign | 0x7C;
    return (uint8_t)(sign | qv_f32_to_small(bits, 5, 2));
}

#ifdef __cplusplus
}
#endif
#endif
