/* The products of attention on Hopper, wgmma.cuh's instruction in the two forms that it needs.
 *
 * S = Q K^T: both operands in shared memory, each row's numbers beside each other (K-major).
 * O += P V: P in registers, in the layout of mma()'s A fragment (warp w of the warpgroup has rows
 * 16 w ..), V [keys][64] tiles as loaded, so the summed index is the row: wgmma_values_tile().
 */
#ifndef QV_KERNELS_WGMMA_ATTENTION_CUH
#define QV_KERNELS_WGMMA_ATTENTION_CUH

#include "kernels/wgmma.cuh"
#include "kernels/wgmma_operands.cuh"

/* d [64 x N] = a [64 x 16] b [N x 16]^T, plus d unless `keep` is 0; both in shared memory. */
template <int N> __device__ void wgmma_scores(float (&d)[N / 2], uint64_t a, uint64_t b, int keep);

/* d [64 x N] += a [64 x 16] b [16 x N], a in registers. */
template <int N>
__device__ void wgmma_values(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);

/* clang-format off */
/* Columns, and the numbers of the operands behind d. */
#define QV_SCORES(N, A, B, KEEP)                                                                   \
    template <> __device__ __forceinline__ void                                                    \
    wgmma_scores<N>(float (&d)[N / 2], uint64_t a, uint64_t b, int keep)                           \
    {                                                                                              \
        asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #KEEP ", 0;\n"                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" QV_NAMES_##N     \
                     "}, %" #A ", %" #B ", keep, 1, 1, 0, 0;\n}\n"                                 \
                     : QV_CELLS_##N : "l"(a), "l"(b), "r"(keep));                                  \
    }
QV_SCORES(80, 40, 41, 42)
QV_SCORES(128, 64, 65, 66)
#undef QV_SCORES

#define QV_VALUES(N, A0, A1, A2, A3, B)                                                            \
    template <> __device__ __forceinline__ void                                                    \
    wgmma_values<N>(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b)                         \
    {                                                                                              \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" QV_NAMES_##N     \
                     "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, 1;\n"         \
                     : QV_CELLS_##N                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }
QV_VALUES(64, 32, 33, 34, 35, 36)
QV_VALUES(128, 64, 65, 66, 67, 68)
QV_VALUES(256, 128, 129, 130, 131, 132)
#undef QV_VALUES
/* clang-format on */

#endif
