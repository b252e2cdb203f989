/* One row of a norm: what enters it and leaves it, and in which order its squares are added up, for
 * norm.cu and for kernels that end with a norm and give the same bits.
 */
#ifndef QV_KERNELS_NORM_ROW_CUH
#define QV_KERNELS_NORM_ROW_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_dense.h"

namespace
{

__device__ __forceinline__ float silu(float x)
{
    return __fdividef(x, 1.0f + __expf(-x)); /* far closer than BF16 */
}

/* What enters the sum of squares. */
template <qv_k_norm_kind KIND> __device__ __forceinline__ float enter(float x, float z)
{
    return KIND == QV_K_GATE_THEN_NORM ? x * silu(z) : x;
}

template <qv_k_norm_kind KIND> __device__ __forceinline__ float leave(float v, float w, float z)
{
    return KIND == QV_K_NORM_THEN_GATE ? v * w * silu(z) : v * w;
}

/* The sum over WIDTH lanes next to each other, given to all of them. */
template <int WIDTH> __device__ __forceinline__ float lanes_sum(float x)
{
#pragma unroll
    for (int i = WIDTH / 2; i > 0; i >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

/* Lanes that share a row of d numbers, d a multiple of 8 and all on 16 bytes: lane l takes eight
 * numbers from 8 l on, then from 8 (l + lanes) on. 0: 256 threads, every 256th number each. */
inline int norm_lanes(int64_t d)
{
    return d > 8192 ? 0 : d <= 128 ? 16 : d <= 512 ? 32 : 256;
}

/* Warps that norm_squares is for. */
inline int norm_warps(int lanes)
{
    return lanes == 16 || lanes == 32 ? 1 : 8;
}

/* What warp `part` of norm_warps(lanes) adds to the sum of squares of a row of entered numbers, on
 * 16 bytes where lanes is not 0. */
__device__ __forceinline__ float norm_squares(const float *v, int d, int lanes, int part)
{
    int thread = part * 32 + (threadIdx.x & 31);
    float sum = 0;
    if (lanes == 0) {
        for (int i = thread; i < d; i += 256)
            sum = fmaf(v[i], v[i], sum);
    } else if (thread < lanes) {
        for (int i = thread * 8; i < d; i += lanes * 8) {
            float4 a = *(const float4 *)(v + i), b = *(const float4 *)(v + i + 4);
            float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int k = 0; k < 8; k++)
                sum = fmaf(x[k], x[k], sum);
        }
    }
    return lanes == 16 ? lanes_sum<16>(sum) : warp_sum(sum);
}

/* The sum of squares of the row, from its parts: as block_sum of 256 threads has it. */
__device__ __forceinline__ float norm_total(const float *parts, int warps)
{
    int lane = threadIdx.x & 31;
    return warps == 1 ? parts[0] : warp_sum(lane < warps ? parts[lane] : 0.0f);
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
