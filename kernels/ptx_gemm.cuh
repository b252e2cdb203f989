/* Instructions that only matrix products of prefill use, one function each: tiles from fragments to
 * shared memory, and out from there through the copy engine. Only for sm_90a.
 */
#ifndef QV_KERNELS_PTX_GEMM_CUH
#define QV_KERNELS_PTX_GEMM_CUH

#include "kernels/ptx_hopper.cuh"

/* Four tiles of 8 x 8 from fragments: lane l says where row l % 8 of tile l / 8 goes. */
__device__ __forceinline__ void stmatrix4(void *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     shared_address(to)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* A tile out to the box of the map at (x, y, z); what is outside of the array stays behind. One
 * thread, which commits and waits. */
__device__ __forceinline__ void store_box(const void *map, int x, int y, int z, const void *from)
{
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group"
                 " [%0, {%1, %2, %3}], [%4];\n" ::"l"(map),
                 "r"(x), "r"(y), "r"(z), "r"(shared_address(from))
                 : "memory");
}

/* The same of float32, added to what is there: each number rounded once. */
__device__ __forceinline__ void add_box(const void *map, int x, int y, int z, const void *from)
{
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group"
                 " [%0, {%1, %2, %3}], [%4];\n" ::"l"(map),
                 "r"(x), "r"(y), "r"(z), "r"(shared_address(from))
                 : "memory");
}

__device__ __forceinline__ void stores_commit()
{
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

/* All but the last N series of stores have read what they store. */
template <int N> __device__ __forceinline__ void stores_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(N) : "memory");
}

/* All series of stores are complete. */
__device__ __forceinline__ void stores_wait()
{
    asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
}

/* One of the barriers of named_barrier(), for threads that only let others know. */
template <int THREADS> __device__ __forceinline__ void named_barrier_arrive(int id)
{
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "n"(THREADS) : "memory");
}

#endif
