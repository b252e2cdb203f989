/* What all kernels share on top of tensor_core.cuh: the check after a launch, vectors of BF16, sums
 * over a block.
 */
#ifndef QV_KERNELS_DEVICE_CUH
#define QV_KERNELS_DEVICE_CUH

#include "common/status.h"
#include "kernels/tensor_core.cuh"

#include <cuda_runtime.h>
#include <stdint.h>

/* QV_OK, or what the launch of `name` failed with. */
extern "C" qv_status qv_k_check_launch(const char *name);

/* Whether the device of the process is of compute capability 9, which has wgmma, clusters and
 * dependent launches. Earlier ones refuse the launch attributes of the latter two, and later ones
 * run the code for 8.0 (cmake/cuda.cmake), in which nothing waits for a cluster or the launch
 * before. */
extern "C" bool qv_k_is_hopper(void);

/* A launch that with `early` may begin before the one in front of it has ended, where there is such
 * a thing: the kernel calls wait_for_previous(). */
template <class... P, class... A>
cudaError_t launch_early(bool early, void (*kernel)(P...), dim3 grid, unsigned threads,
                         size_t bytes, void *stream, const A &...args)
{
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = &attribute;
    config.numAttrs = early && qv_k_is_hopper();
    return cudaLaunchKernelEx(&config, kernel, args...);
}

/* Eight BF16 numbers as one 16-byte access. (Of an array in its place the compiler makes four.) */
struct bf16x8 {
    uint4 u;
};

__device__ __forceinline__ void unpack8(bf16x8 v, float (&x)[8])
{
    const uint32_t u[4] = {v.u.x, v.u.y, v.u.z, v.u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = bf16_low(u[i]);
        x[2 * i + 1] = bf16_high(u[i]);
    }
}

__device__ __forceinline__ bf16x8 pack8(const float (&x)[8])
{
    return {make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                       pack_bf16(x[6], x[7]))};
}

/* Activations, one formula wherever they are applied. */
__device__ __forceinline__ float swiglu(float gate, float up)
{
    return quotient(gate, 1.0f + power_of_two(-1.44269504f * gate)) * up; /* far closer than BF16 */
}

__device__ __forceinline__ float relu2(float x)
{
    float positive = x < 0.0f ? 0.0f : x; /* NaN stays NaN */
    return positive * positive;
}

__device__ __forceinline__ float round_bf16(float x)
{
    return bf16_low(pack_bf16(x, 0.0f)); /* by itself it takes a slower unit */
}

__device__ __forceinline__ float warp_max(float x)
{
#pragma unroll
    for (int i = 16; i > 0; i >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

/* The sum over all threads of a block, given to all; `shared` has a float per warp. The order is
 * fixed: within warps by halves, then over warps by halves. Ends with a barrier behind the last
 * read of `shared` only if called once; call __syncthreads() before using `shared` again. */
__device__ __forceinline__ float block_sum(float x, float *shared)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, n_warps = (blockDim.x + 31) >> 5;
    x = warp_sum(x);
    if (n_warps == 1)
        return x;
    if (lane == 0)
        shared[warp] = x;
    __syncthreads();
    x = lane < n_warps ? shared[lane] : 0.0f;
    return warp_sum(x);
}

#endif
