/* kernels/ptx_gemm.cuh for the CPU: found in its place, with the same functions. */
#ifndef QV_KERNELS_PTX_GEMM_CUH
#define QV_KERNELS_PTX_GEMM_CUH

#include "kernels/ptx_hopper.cuh"

inline void stmatrix4(void *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    const uint32_t fragments[4] = {a, b, c, d};
    emu::store_tiles(to, fragments, false);
}

inline void store_box(const void *map, int x, int y, int z, const void *from)
{
    emu::store_box(map, {{x, y, z, 0}}, from, false);
}

inline void add_box(const void *map, int x, int y, int z, const void *from)
{
    emu::store_box(map, {{x, y, z, 0}}, from, true);
}

inline void stores_commit()
{
    emu::stores_commit();
}

template <int N> inline void stores_wait_read()
{
    emu::stores_wait(N);
}

inline void stores_wait()
{
    emu::stores_wait(0);
}

template <int THREADS> inline void named_barrier_arrive(int id)
{
    emu::barrier_arrive(id, THREADS);
}

#endif
