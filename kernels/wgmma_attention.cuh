/* The products of attention on Hopper, wgmma.cuh's instruction in the two forms that it needs.
 *
 * S = Q K^T: both operands in shared memory, each row's numbers beside each other (K-major).
 * O += P V: P in registers, in the layout of mma()'s A fragment (warp w of the warpgroup has rows
 * 16 w ..), V [keys][64] tiles as loaded, so the summed index is the row: wgmma_values_tile().
 */
#ifndef QV_KERNELS_WGMMA_ATTENTION_CUH
#define QV_KERNELS_WGMMA_ATTENTION_CUH

#include "kernels/wgmma.cuh"

/* The compiler keeps what it does to the registers of a product in flight on its side of this. */
template <int N> __device__ __forceinline__ void wgmma_hold(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

/* d [64 x N] = a [64 x 16] b [N x 16]^T, plus d unless `keep` is 0; both in shared memory. */
template <int N> __device__ void wgmma_scores(float (&d)[N / 2], uint64_t a, uint64_t b, int keep);

/* d [64 x N] += a [64 x 16] b [16 x N], a in registers. */
template <int N>
__device__ void wgmma_values(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);

/* Eight accumulators as operands. */
#define QV_EIGHT(d, i)                                                                             \
    "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3]), "+f"((d)[i + 4]),          \
        "+f"((d)[i + 5]), "+f"((d)[i + 6]), "+f"((d)[i + 7])

/* clang-format off */
template <> __device__ __forceinline__ void
wgmma_scores<80>(float (&d)[40], uint64_t a, uint64_t b, int keep)
{
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %42, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39}, "
        "%40, %41, keep, 1, 1, 0, 0;\n}\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32)
        : "l"(a), "l"(b), "r"(keep));
}

template <> __device__ __forceinline__ void
wgmma_scores<128>(float (&d)[64], uint64_t a, uint64_t b, int keep)
{
    asm volatile(
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63}, "
        "%64, %65, keep, 1, 1, 0, 0;\n}\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32), QV_EIGHT(d, 40), QV_EIGHT(d, 48), QV_EIGHT(d, 56)
        : "l"(a), "l"(b), "r"(keep));
}

template <> __device__ __forceinline__ void
wgmma_values<64>(float (&d)[32], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <> __device__ __forceinline__ void
wgmma_values<128>(float (&d)[64], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32), QV_EIGHT(d, 40), QV_EIGHT(d, 48), QV_EIGHT(d, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <> __device__ __forceinline__ void
wgmma_values<256>(float (&d)[128], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
        "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
        "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "
        "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "
        "%120, %121, %122, %123, %124, %125, %126, %127}, "
        "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32), QV_EIGHT(d, 40), QV_EIGHT(d, 48), QV_EIGHT(d, 56),
          QV_EIGHT(d, 64), QV_EIGHT(d, 72), QV_EIGHT(d, 80), QV_EIGHT(d, 88),
          QV_EIGHT(d, 96), QV_EIGHT(d, 104), QV_EIGHT(d, 112), QV_EIGHT(d, 120)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
/* clang-format on */

#undef QV_EIGHT

#endif
