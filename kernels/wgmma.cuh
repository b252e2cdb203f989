/* Hopper's matrix instruction, which a warpgroup (four warps) gives and which reads its operands
 * from shared memory while the warps go on. Only for sm_90a.
 *
 * Operands are tiles [rows][64] of BF16 in the arrangement of tile_at<64>, which is the one with a
 * swizzle of 128 bytes, at addresses that are multiples of 1024. Ordinary writes to them need
 * wgmma_publish() in each writing thread and a barrier before they are read. Accumulators have the
 * layout of mma(): d[4 j ..] is the tile of columns 8 j.., row 16 (warp % 4) + lane / 4.
 */
#ifndef QV_KERNELS_WGMMA_CUH
#define QV_KERNELS_WGMMA_CUH

#include "kernels/tensor_core.cuh"

/* The blocks of a cluster, where there are clusters: naming them is an error elsewhere. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define QV_CLUSTER(x, y, z)
#else
#define QV_CLUSTER(x, y, z) __cluster_dims__(x, y, z)
#endif

/* A tile's descriptor; 16 columns further on is + 2. */
__device__ __forceinline__ uint64_t wgmma_tile(const bf16 *tile)
{
    const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
    const uint64_t group_bytes = 1024; /* from 8 rows to the next */
    return address | (uint64_t)1 << 16 | group_bytes >> 4 << 32 | (uint64_t)1 << 62;
}

__device__ __forceinline__ void wgmma_publish()
{
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

/* Before the first of a series: what was done to the accumulators is done. */
__device__ __forceinline__ void wgmma_begin()
{
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

/* All but the last N series have finished. */
template <int N> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

/* Keeps the compiler from moving work on accumulators into a series of products. */
template <int N> __device__ __forceinline__ void wgmma_keep(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

/* Which warpgroup of its block a thread is in, so that the compiler knows it is the same in a warp.
 */
__device__ __forceinline__ int warpgroup()
{
    return __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0);
}

/* Registers of a warpgroup's threads, from what the launch gave them. */
template <int N> __device__ __forceinline__ void more_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}

template <int N> __device__ __forceinline__ void fewer_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

/* Four tiles of 8 x 8 from fragments, transposed: lane l says where row l % 8 of tile l / 8 goes.
 */
__device__ __forceinline__ void stmatrix4_trans(bf16 *to, uint32_t a, uint32_t b, uint32_t c,
                                                uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     shared_address(to)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* --- Tiles by the copy engine, to both blocks of a cluster --------------------------------- */

__device__ __forceinline__ void barrier_init(uint64_t *barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
                 "r"(arrivals));
}

/* One arrival, and `bytes` that copies will bring before the phase ends. */
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, int bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

/* An arrival when all cp.async of this thread so far have landed. Who waits for it calls
 * wgmma_publish() before wgmma reads them: a thread with copies on their way would wait there for
 * all of them. */
__device__ __forceinline__ void barrier_arrive_copies(uint64_t *barrier)
{
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(barrier))
        : "memory");
}

/* An arrival at the barrier that block `rank` of the cluster has in the same place. It orders what
 * the copy engine and wgmma did, not ordinary accesses of memory: a wider scope would flush the L1
 * cache at each wait. */
__device__ __forceinline__ void barrier_arrive_at(uint64_t *barrier, int rank)
{
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *barrier, int parity)
{
    asm volatile("{\n.reg .pred done;\nwaiting%=:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra waiting%=;\n}\n" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

__device__ __forceinline__ void cluster_sync()
{
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
            : "memory");
}

/* A box of the map at (x, y, z) into `to` of every block in `blocks` (a bit each), whose barriers
 * in the place of `barrier` hear of its bytes. One thread. */
__device__ __forceinline__ void copy_box(bf16 *to, const void *map, int x, int y, int z,
                                         uint64_t *barrier, uint16_t blocks)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "h"(blocks)
        : "memory");
}

/* The same for a block by itself. */
__device__ __forceinline__ void copy_box_here(bf16 *to, const void *map, int x, int y, int z,
                                              uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
                 : "memory");
}

#endif
