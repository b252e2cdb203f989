/* kernels/ptx_hopper.cuh for the CPU: found in its place, with the same functions. What they mean
 * is said there; how they are done is in async.cc, wgmma.cc and tensor_core.cc.
 */
#ifndef QV_KERNELS_PTX_HOPPER_CUH
#define QV_KERNELS_PTX_HOPPER_CUH

#include "kernels/ptx.cuh"
#include "tests/emulate/wgmma.h"

/* --- Products ----------------------------------------------------------------------------- */

inline void wgmma_publish() {}

inline void wgmma_begin()
{
    emu::products_begin();
}

inline void wgmma_commit()
{
    emu::products_commit();
}

template <int N> inline void wgmma_wait()
{
    emu::products_wait(N);
}

template <int N> inline void wgmma_keep(float (&)[N]) {}

inline void stmatrix4_trans(void *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    const uint32_t fragments[4] = {a, b, c, d};
    emu::store_tiles(to, fragments, true);
}

constexpr int LAUNCH_REGISTERS = 65536 / 384 / 8 * 8;

template <int N> inline void more_registers()
{
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers of a thread");
}

template <int N> inline void fewer_registers()
{
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers of a thread");
}

/* --- Barriers in shared memory ------------------------------------------------------------- */

inline void barrier_init(uint64_t *barrier, int arrivals)
{
    emu::mbarrier_init(barrier, arrivals);
}

inline void barriers_publish() {}

inline void barrier_expect(uint64_t *barrier, int bytes)
{
    emu::mbarrier_arrive(barrier, bytes);
}

inline void barrier_arrive_copies(uint64_t *barrier)
{
    emu::mbarrier_arrive_copies(barrier);
}

inline void barrier_arrive_at(uint64_t *barrier, int rank)
{
    emu::mbarrier_arrive((uint64_t *)emu::shared_of(rank, barrier), 0);
}

inline void barrier_arrive(uint64_t *barrier)
{
    emu::mbarrier_arrive(barrier, 0);
}

inline void barrier_wait(uint64_t *barrier, int parity)
{
    emu::mbarrier_wait(barrier, parity);
}

inline void send_int(int *to, int value, uint64_t *barrier, int rank)
{
    emu::send_int((int *)emu::shared_of(rank, to), value,
                  (uint64_t *)emu::shared_of(rank, barrier));
}

inline void send_four(float4 *to, const float4 &v, uint64_t *barrier, int rank)
{
    emu::send_four((float *)emu::shared_of(rank, to), &v.x,
                   (uint64_t *)emu::shared_of(rank, barrier));
}

inline void cluster_arrive_relaxed()
{
    emu::cluster_arrive();
}

/* --- Tiles by the copy engine -------------------------------------------------------------- */

inline void copy_box(void *to, const void *map, int x, int y, int z, uint64_t *barrier,
                     uint16_t blocks)
{
    emu::copy_box(to, map, {{x, y, z, 0}}, barrier, blocks);
}

inline void copy_box_here(void *to, const void *map, int x, int y, int z, uint64_t *barrier)
{
    emu::copy_box(to, map, {{x, y, z, 0}}, barrier, (uint16_t)(1 << emu::cluster_rank()));
}

inline void copy_box_once(void *to, const void *map, int x, int y, int z, uint64_t *barrier)
{
    copy_box_here(to, map, x, y, z, barrier);
}

inline void copy_box4(void *to, const void *map, int x, int y, int z, int w, uint64_t *barrier,
                      uint16_t blocks)
{
    emu::copy_box(to, map, {{x, y, z, w}}, barrier, blocks);
}

inline void copy_box4_here(void *to, const void *map, int x, int y, int z, int w, uint64_t *barrier)
{
    emu::copy_box(to, map, {{x, y, z, w}}, barrier, (uint16_t)(1 << emu::cluster_rank()));
}

#endif
