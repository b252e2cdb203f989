/* Instructions as in ptx.cuh, for blocks that run beside each other and write into each other's
 * shared memory. Before 9.0 a block is a cluster by itself, rank 0, and the same code runs.
 */
#ifndef QV_KERNELS_CLUSTER_CUH
#define QV_KERNELS_CLUSTER_CUH

#include "kernels/ptx.cuh"

/* cluster_sync in two halves; before 9.0 all threads of the block wait in the second. All arrive
 * and then wait, in turn. What was written before arriving, to any block, is seen behind the wait.
 * No block may write into another before that one has arrived once, nor end before the others have
 * written all they write into it. */
__device__ __forceinline__ void cluster_arrive()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
#else
    __syncthreads();
#endif
}

/* *p = x in the shared memory of block `rank`; p is an address of this block's. */
__device__ __forceinline__ void store_at(int rank, bf16 *p, bf16 x)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "st.shared::cluster.u16 [there], %2;\n}\n" ::"r"(shared_address(p)),
                 "r"(rank), "h"(__bfloat16_as_ushort(x))
                 : "memory");
#else
    (void)rank;
    *p = x;
#endif
}

__device__ __forceinline__ void store_at(int rank, float *p, float x)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "st.shared::cluster.f32 [there], %2;\n}\n" ::"r"(shared_address(p)),
                 "r"(rank), "f"(x)
                 : "memory");
#else
    (void)rank;
    *p = x;
#endif
}

/* Four of them, on 16 bytes. */
__device__ __forceinline__ void store_at(int rank, float *p, float4 x)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5};\n}\n" ::"r"(shared_address(p)),
        "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
        : "memory");
#else
    (void)rank;
    *(float4 *)p = x;
#endif
}

#endif
