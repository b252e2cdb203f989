/* Hopper's matrix instruction for several numbers of columns, both operands in shared memory as
 * wgmma.cuh says. Only for sm_90a.
 */
#ifndef QV_KERNELS_WGMMA_SHAPES_CUH
#define QV_KERNELS_WGMMA_SHAPES_CUH

#include "kernels/wgmma.cuh"
#include "kernels/wgmma_operands.cuh"

/* d [64 x N] += a [64 x 16] b [16 x N]: rows of a and columns of b have their 16 numbers beside
 * each other. */
template <int N> __device__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b);

/* The same with b in tiles stored [k][64], side by side (wgmma_values_tile). */
template <int N> __device__ void wgmma_b_columns(float (&d)[N / 2], uint64_t a, uint64_t b);

/* clang-format off */
/* Name, whether b is stored [k][64], columns, and the numbers of the operands behind d. */
#define QV_WGMMA(NAME, BY_COLUMNS, N, A, B)                                                        \
    template <> __device__ __forceinline__ void                                                    \
    NAME<N>(float (&d)[N / 2], uint64_t a, uint64_t b)                                             \
    {                                                                                              \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" QV_NAMES_##N     \
                     "}, %" #A ", %" #B ", 1, 1, 1, 0, " #BY_COLUMNS ";\n"                         \
                     : QV_CELLS_##N : "l"(a), "l"(b));                                             \
    }
QV_WGMMA(wgmma, 0, 16, 8, 9)
QV_WGMMA(wgmma, 0, 32, 16, 17)
QV_WGMMA(wgmma, 0, 48, 24, 25)
QV_WGMMA(wgmma, 0, 64, 32, 33)
QV_WGMMA(wgmma, 0, 72, 36, 37)
QV_WGMMA(wgmma, 0, 80, 40, 41)
QV_WGMMA(wgmma, 0, 88, 44, 45)
QV_WGMMA(wgmma, 0, 96, 48, 49)
QV_WGMMA(wgmma, 0, 104, 52, 53)
QV_WGMMA(wgmma, 0, 112, 56, 57)
QV_WGMMA(wgmma, 0, 120, 60, 61)
QV_WGMMA(wgmma, 0, 128, 64, 65)
QV_WGMMA(wgmma, 0, 136, 68, 69)
QV_WGMMA(wgmma, 0, 144, 72, 73)
QV_WGMMA(wgmma, 0, 160, 80, 81)
QV_WGMMA(wgmma, 0, 176, 88, 89)
QV_WGMMA(wgmma, 0, 192, 96, 97)
QV_WGMMA(wgmma, 0, 208, 104, 105)
QV_WGMMA(wgmma, 0, 224, 112, 113)
QV_WGMMA(wgmma, 0, 240, 120, 121)
QV_WGMMA(wgmma, 0, 256, 128, 129)
QV_WGMMA(wgmma_b_columns, 1, 128, 64, 65)
QV_WGMMA(wgmma_b_columns, 1, 192, 96, 97)
QV_WGMMA(wgmma_b_columns, 1, 256, 128, 129)
#undef QV_WGMMA

/* d [64 x 64] += a [64 x 16] b [16 x 64] with a tile of a stored [k][64]; 16 rows further is + 128. */
__device__ __forceinline__ void wgmma_64_trans(float (&d)[32], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" QV_NAMES_64
                 "}, %32, %33, 1, 1, 1, 1, 0;\n"
                 : QV_CELLS_64 : "l"(a), "l"(b));
}

/* d [64 x 64] = a [64 x 16] b [16 x 64], with KEEP plus d, b in such a tile. */
template <int KEEP> __device__ __forceinline__ void
wgmma_b_trans(float (&d)[32], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" QV_NAMES_64
                 "}, %32, %33, %34, 1, 1, 0, 1;\n"
                 : QV_CELLS_64 : "l"(a), "l"(b), "n"(KEEP));
}
/* clang-format on */

#endif
