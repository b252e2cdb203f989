/* Hopper's matrix instruction for several numbers of columns: d [64 x N] += a [64 x 16] b [16 x N],
 * both in shared memory as wgmma.cuh says. Only for sm_90a.
 */
#ifndef QV_KERNELS_WGMMA_SHAPES_CUH
#define QV_KERNELS_WGMMA_SHAPES_CUH

#include "kernels/wgmma.cuh"

/* clang-format off */
#define QV_WGMMA_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QV_WGMMA_NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QV_WGMMA_NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define QV_WGMMA_NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define QV_WGMMA_NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define QV_WGMMA_NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define QV_WGMMA_NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define QV_WGMMA_NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define QV_WGMMA_CELLS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
    "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

template <int N> __device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b)
{
    static_assert(N % 16 == 0 && N >= 32 && N <= 128, "columns");
    if constexpr (N == 32)
        asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                     QV_WGMMA_NAMES_0 QV_WGMMA_NAMES_1
                     "}, %16, %17, 1, 1, 1, 0, 0;\n"
                     : QV_WGMMA_CELLS(0),
                       QV_WGMMA_CELLS(8)
                     : "l"(a), "l"(b));
    else if constexpr (N == 64)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                     QV_WGMMA_NAMES_0 QV_WGMMA_NAMES_1 QV_WGMMA_NAMES_2 QV_WGMMA_NAMES_3
                     "}, %32, %33, 1, 1, 1, 0, 0;\n"
                     : QV_WGMMA_CELLS(0),
                       QV_WGMMA_CELLS(8),
                       QV_WGMMA_CELLS(16),
                       QV_WGMMA_CELLS(24)
                     : "l"(a), "l"(b));
    else if constexpr (N == 80)
        asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
                     QV_WGMMA_NAMES_0 QV_WGMMA_NAMES_1 QV_WGMMA_NAMES_2 QV_WGMMA_NAMES_3 QV_WGMMA_NAMES_4
                     "}, %40, %41, 1, 1, 1, 0, 0;\n"
                     : QV_WGMMA_CELLS(0),
                       QV_WGMMA_CELLS(8),
                       QV_WGMMA_CELLS(16),
                       QV_WGMMA_CELLS(24),
                       QV_WGMMA_CELLS(32)
                     : "l"(a), "l"(b));
    else if constexpr (N == 96)
        asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
                     QV_WGMMA_NAMES_0 QV_WGMMA_NAMES_1 QV_WGMMA_NAMES_2 QV_WGMMA_NAMES_3 QV_WGMMA_NAMES_4 QV_WGMMA_NAMES_5
                     "}, %48, %49, 1, 1, 1, 0, 0;\n"
                     : QV_WGMMA_CELLS(0),
                       QV_WGMMA_CELLS(8),
                       QV_WGMMA_CELLS(16),
                       QV_WGMMA_CELLS(24),
                       QV_WGMMA_CELLS(32),
                       QV_WGMMA_CELLS(40)
                     : "l"(a), "l"(b));
    else if constexpr (N == 112)
        asm volatile("wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {"
                     QV_WGMMA_NAMES_0 QV_WGMMA_NAMES_1 QV_WGMMA_NAMES_2 QV_WGMMA_NAMES_3 QV_WGMMA_NAMES_4 QV_WGMMA_NAMES_5 QV_WGMMA_NAMES_6
                     "}, %56, %57, 1, 1, 1, 0, 0;\n"
                     : QV_WGMMA_CELLS(0),
                       QV_WGMMA_CELLS(8),
                       QV_WGMMA_CELLS(16),
                       QV_WGMMA_CELLS(24),
                       QV_WGMMA_CELLS(32),
                       QV_WGMMA_CELLS(40),
                       QV_WGMMA_CELLS(48)
                     : "l"(a), "l"(b));
    else if constexpr (N == 128)
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                     QV_WGMMA_NAMES_0 QV_WGMMA_NAMES_1 QV_WGMMA_NAMES_2 QV_WGMMA_NAMES_3 QV_WGMMA_NAMES_4 QV_WGMMA_NAMES_5 QV_WGMMA_NAMES_6 QV_WGMMA_NAMES_7
                     "}, %64, %65, 1, 1, 1, 0, 0;\n"
                     : QV_WGMMA_CELLS(0),
                       QV_WGMMA_CELLS(8),
                       QV_WGMMA_CELLS(16),
                       QV_WGMMA_CELLS(24),
                       QV_WGMMA_CELLS(32),
                       QV_WGMMA_CELLS(40),
                       QV_WGMMA_CELLS(48),
                       QV_WGMMA_CELLS(56)
                     : "l"(a), "l"(b));
}

/* d [64 x 64] += a [64 x 16] b [16 x 64] with a tile of a stored [k][64]; 16 rows further is + 128. */
__device__ __forceinline__ void wgmma_64_trans(float (&d)[32], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 QV_WGMMA_NAMES_0 QV_WGMMA_NAMES_1 QV_WGMMA_NAMES_2 QV_WGMMA_NAMES_3
                 "}, %32, %33, 1, 1, 1, 1, 0;\n"
                 : QV_WGMMA_CELLS(0),
                   QV_WGMMA_CELLS(8),
                   QV_WGMMA_CELLS(16),
                   QV_WGMMA_CELLS(24)
                 : "l"(a), "l"(b));
}
/* clang-format on */

#undef QV_WGMMA_CELLS
#undef QV_WGMMA_NAMES_0
#undef QV_WGMMA_NAMES_1
#undef QV_WGMMA_NAMES_2
#undef QV_WGMMA_NAMES_3
#undef QV_WGMMA_NAMES_4
#undef QV_WGMMA_NAMES_5
#undef QV_WGMMA_NAMES_6
#undef QV_WGMMA_NAMES_7

#endif
