/* One row of a norm, for norm.cu and for kernels with a norm in them that give the same bits. */
#ifndef QV_KERNELS_NORM_ROW_CUH
#define QV_KERNELS_NORM_ROW_CUH

#include "kernels/device.cuh"

namespace
{

__device__ __forceinline__ void load8(const float *p, float (&v)[8])
{
    float4 a = *(const float4 *)p, b = *(const float4 *)(p + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ __forceinline__ float silu(float x)
{
    return __fdividef(x, 1.0f + __expf(-x)); /* far closer than BF16 */
}

/* The sum over WIDTH lanes next to each other, given to all of them. */
template <int WIDTH> __device__ __forceinline__ float lanes_sum(float x)
{
#pragma unroll
    for (int i = WIDTH / 2; i > 0; i >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

__device__ __forceinline__ float norm_scale(float squares, int64_t d, float eps)
{
    return 1.0f / sqrtf(squares / (float)d + eps);
}

/* Eight numbers of a normed row to y, and with `has_rest` to rest what rounding takes off. */
__device__ __forceinline__ void store_normed(const float (&v)[8], const float (&gain)[8],
                                             float scale, bool plus_one, bf16 *y, bf16 *rest,
                                             bool has_rest)
{
    float out[8], rounded[8];
#pragma unroll
    for (int k = 0; k < 8; k++)
        out[k] = v[k] * scale * (plus_one ? 1.0f + gain[k] : gain[k]);
    bf16x8 packed = pack8(out);
    *(bf16x8 *)y = packed;
    if (!has_rest)
        return;
    unpack8(packed, rounded);
#pragma unroll
    for (int k = 0; k < 8; k++)
        out[k] -= rounded[k];
    *(bf16x8 *)rest = pack8(out);
}

} // namespace

#endif
