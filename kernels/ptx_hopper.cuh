/* Hopper's instructions that CUDA C++ has no name for, one small function each, as ptx.cuh has
 * those of all devices. Only for sm_90a.
 */
#ifndef QV_KERNELS_PTX_HOPPER_CUH
#define QV_KERNELS_PTX_HOPPER_CUH

#include "kernels/ptx.cuh"

/* --- Products ----------------------------------------------------------------------------- */

/* What this thread wrote to shared memory, for wgmma and the copy engine to see. */
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

/* Four tiles [8][8] of 16 bits from fragments, transposed: lane l says where row l % 8 of tile
 * l / 8 goes. */
__device__ __forceinline__ void stmatrix4_trans(void *to, uint32_t a, uint32_t b, uint32_t c,
                                                uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     shared_address(to)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* Registers of a warpgroup's threads, from what the launch gave them: of the 65536, as many for
 * each of 384 threads as a multiple of 8 allows. */
constexpr int LAUNCH_REGISTERS = 65536 / 384 / 8 * 8;

template <int N> __device__ __forceinline__ void more_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}

template <int N> __device__ __forceinline__ void fewer_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

/* --- Barriers in shared memory ------------------------------------------------------------- */

__device__ __forceinline__ void barrier_init(uint64_t *barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
                 "r"(arrivals));
}

/* After the barriers are initialised, for other blocks and the copy engine to see. */
__device__ __forceinline__ void barriers_publish()
{
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
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

/* A number to that place of block `rank`'s shared memory, whose barrier in the place of `barrier`
 * hears of its 4 bytes. */
__device__ __forceinline__ void send_int(int *to, int value, uint64_t *barrier, int rank)
{
    asm volatile(
        "{\n.reg .b32 there, hears;\nmapa.shared::cluster.u32 there, %0, %3;\n"
        "mapa.shared::cluster.u32 hears, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [there], %1, [hears];\n}\n" ::
            "r"(shared_address(to)),
        "r"(value), "r"(shared_address(barrier)), "r"(rank)
        : "memory");
}

/* The same of four numbers, 16 bytes. */
__device__ __forceinline__ void send_four(float4 *to, const float4 &v, uint64_t *barrier, int rank)
{
    asm volatile("{\n.reg .b32 there, hears;\nmapa.shared::cluster.u32 there, %0, %6;\n"
                 "mapa.shared::cluster.u32 hears, %5, %6;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], "
                 "{%1, %2, %3, %4}, [hears];\n}\n" ::"r"(shared_address(to)),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(shared_address(barrier)), "r"(rank)
                 : "memory");
}

/* cluster_arrive() that publishes nothing but initialised barriers. */
__device__ __forceinline__ void cluster_arrive_relaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}

/* --- Tiles by the copy engine -------------------------------------------------------------- */

/* A box of the map at (x, y, z) into `to` of every block in `blocks` (a bit each), whose barriers
 * in the place of `barrier` hear of its bytes. One thread. */
__device__ __forceinline__ void copy_box(void *to, const void *map, int x, int y, int z,
                                         uint64_t *barrier, uint16_t blocks)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "h"(blocks)
        : "memory");
}

/* The same for a block by itself. */
__device__ __forceinline__ void copy_box_here(void *to, const void *map, int x, int y, int z,
                                              uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
                 : "memory");
}

/* The same of what is read once: it leaves the L2 cache before all else. */
__device__ __forceinline__ void copy_box_once(void *to, const void *map, int x, int y, int z,
                                              uint64_t *barrier)
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "l"(policy)
                 : "memory");
}

/* The same of a map of four dimensions, for the blocks in `blocks`. */
__device__ __forceinline__ void copy_box4(void *to, const void *map, int x, int y, int z, int w,
                                          uint64_t *barrier, uint16_t blocks)
{
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], %7;\n" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier)), "h"(blocks)
        : "memory");
}

/* A copy for this block of a map of four dimensions. */
__device__ __forceinline__ void copy_box4_here(void *to, const void *map, int x, int y, int z,
                                               int w, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier))
                 : "memory");
}

#endif
