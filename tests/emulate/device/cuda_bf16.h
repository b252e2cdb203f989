/* BF16 numbers of the toolkit's cuda_bf16.h, as far as kernels use them, with the rounding of the
 * device: to nearest even, and any NaN becomes 0x7fff.
 */
#ifndef QV_EMULATE_CUDA_BF16_H
#define QV_EMULATE_CUDA_BF16_H

#include <stdint.h>
#include <string.h>

struct __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(float f)
    {
        uint32_t word;
        memcpy(&word, &f, sizeof word);
        bool is_nan = (word & 0x7fffffff) > 0x7f800000;
        bits = is_nan ? 0x7fff : (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
    }
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x)
{
    uint32_t word = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &word, sizeof f);
    return f;
}

inline __nv_bfloat16 __float2bfloat16(float f)
{
    return __nv_bfloat16(f);
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y)
{
    return {__float2bfloat16(x), __float2bfloat16(y)};
}

#endif
