/* kernels/wgmma_attention.cuh for the CPU: found in its place, with the same functions. */
#ifndef QV_KERNELS_WGMMA_ATTENTION_CUH
#define QV_KERNELS_WGMMA_ATTENTION_CUH

#include "kernels/wgmma.cuh"

template <int N> inline void wgmma_scores(float (&d)[N / 2], uint64_t a, uint64_t b, int keep)
{
    emu::multiply({.d = d, .n = N, .a = a, .b = b, .adds = keep != 0});
}

template <int N> inline void wgmma_values(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b)
{
    emu::multiply({.d = d,
                   .n = N,
                   .b = b,
                   .a_in_registers = true,
                   .a_registers = {a[0], a[1], a[2], a[3]},
                   .b_by_columns = true});
}

#endif
