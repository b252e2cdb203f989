/* kernels/wgmma_shapes.cuh for the CPU: found in its place, with the same functions. */
#ifndef QV_KERNELS_WGMMA_SHAPES_CUH
#define QV_KERNELS_WGMMA_SHAPES_CUH

#include "kernels/wgmma.cuh"

template <int N> inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b)
{
    static_assert(N % 8 == 0 && N >= 16 && N <= 256, "columns");
    emu::multiply({.d = d, .n = N, .a = a, .b = b});
}

inline void wgmma_64_trans(float (&d)[32], uint64_t a, uint64_t b)
{
    emu::multiply({.d = d, .n = 64, .a = a, .b = b, .a_by_columns = true});
}

template <int N> inline void wgmma_b_columns(float (&d)[N / 2], uint64_t a, uint64_t b)
{
    static_assert(N % 64 == 0 && N >= 128 && N <= 256, "columns");
    emu::multiply({.d = d, .n = N, .a = a, .b = b, .b_by_columns = true});
}

template <int KEEP> inline void wgmma_b_trans(float (&d)[32], uint64_t a, uint64_t b)
{
    emu::multiply({.d = d, .n = 64, .a = a, .b = b, .b_by_columns = true, .adds = KEEP != 0});
}

#endif
