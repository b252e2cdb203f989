/* kernels/wgmma_shapes.cuh for the CPU: found in its place, with the same functions. */
#ifndef QV_KERNELS_WGMMA_SHAPES_CUH
#define QV_KERNELS_WGMMA_SHAPES_CUH

#include "kernels/wgmma.cuh"

template <int N> inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b)
{
    static_assert(N % 16 == 0 && N >= 32 && N <= 256, "columns");
    emu::product p = {d, N};
    p.a = a;
    p.b = b;
    emu::multiply(p);
}

inline void wgmma_64_trans(float (&d)[32], uint64_t a, uint64_t b)
{
    emu::product p = {d, 64};
    p.a = a;
    p.a_by_columns = true;
    p.b = b;
    emu::multiply(p);
}

template <int KEEP> inline void wgmma_b_trans(float (&d)[32], uint64_t a, uint64_t b)
{
    emu::product p = {d, 64};
    p.a = a;
    p.b = b;
    p.b_by_columns = true;
    p.adds = KEEP;
    emu::multiply(p);
}

#endif
