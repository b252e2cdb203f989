/* kernels/wgmma_attention.cuh for the CPU: found in its place, with the same functions. */
#ifndef QV_KERNELS_WGMMA_ATTENTION_CUH
#define QV_KERNELS_WGMMA_ATTENTION_CUH

#include "kernels/wgmma.cuh"

template <int N> inline void wgmma_scores(float (&d)[N / 2], uint64_t a, uint64_t b, int keep)
{
    emu::product p = {d, N};
    p.a = a;
    p.b = b;
    p.adds = keep != 0;
    emu::multiply(p);
}

template <int N> inline void wgmma_values(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b)
{
    emu::product p = {d, N};
    p.a_in_registers = true;
    for (int i = 0; i < 4; i++)
        p.a_registers[i] = a[i];
    p.b = b;
    p.b_by_columns = true;
    emu::multiply(p);
}

#endif
