/* Instructions that only matrix products of prefill use, one function each: Hopper's matrix
 * instruction with up to 256 columns, and tiles from shared memory out through the copy engine.
 * Only for sm_90a.
 */
#ifndef QV_KERNELS_PTX_GEMM_CUH
#define QV_KERNELS_PTX_GEMM_CUH

#include "kernels/ptx_hopper.cuh"

/* d [64 x N] += a [64 x 16] b [16 x N], both in shared memory as wgmma.cuh says: rows of a and
 * columns of b have their 16 numbers beside each other. */
template <int N> __device__ void wgmma_wide(float (&d)[N / 2], uint64_t a, uint64_t b);

/* Four tiles of 8 x 8 from fragments: lane l says where row l % 8 of tile l / 8 goes. */
__device__ __forceinline__ void stmatrix4(void *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     shared_address(to)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* A tile out to the box of the map at (x, y, z); what is outside of the array stays behind. One
 * thread, which commits and waits. */
__device__ __forceinline__ void store_box(const void *map, int x, int y, int z, const void *from)
{
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group"
                 " [%0, {%1, %2, %3}], [%4];\n" ::"l"(map),
                 "r"(x), "r"(y), "r"(z), "r"(shared_address(from))
                 : "memory");
}

__device__ __forceinline__ void stores_commit()
{
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

/* All but the last N series of stores have read what they store. */
template <int N> __device__ __forceinline__ void stores_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(N) : "memory");
}

/* All series of stores are complete. */
__device__ __forceinline__ void stores_wait()
{
    asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
}

/* One of the barriers of named_barrier(), for threads that only let others know. */
template <int THREADS> __device__ __forceinline__ void named_barrier_arrive(int id)
{
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "n"(THREADS) : "memory");
}

/* Eight accumulators as operands. */
#define QV_EIGHT(d, i)                                                                             \
    "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3]), "+f"((d)[i + 4]),          \
        "+f"((d)[i + 5]), "+f"((d)[i + 6]), "+f"((d)[i + 7])

/* clang-format off */
template <> __device__ __forceinline__ void
wgmma_wide<128>(float (&d)[64], uint64_t a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, 0, 0;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32), QV_EIGHT(d, 40), QV_EIGHT(d, 48), QV_EIGHT(d, 56)
        : "l"(a), "l"(b));
}

template <> __device__ __forceinline__ void
wgmma_wide<144>(float (&d)[72], uint64_t a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71}, "
        "%72, %73, 1, 1, 1, 0, 0;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32), QV_EIGHT(d, 40), QV_EIGHT(d, 48), QV_EIGHT(d, 56),
          QV_EIGHT(d, 64)
        : "l"(a), "l"(b));
}

template <> __device__ __forceinline__ void
wgmma_wide<160>(float (&d)[80], uint64_t a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n160k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
        "%72, %73, %74, %75, %76, %77, %78, %79}, "
        "%80, %81, 1, 1, 1, 0, 0;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32), QV_EIGHT(d, 40), QV_EIGHT(d, 48), QV_EIGHT(d, 56),
          QV_EIGHT(d, 64), QV_EIGHT(d, 72)
        : "l"(a), "l"(b));
}

template <> __device__ __forceinline__ void
wgmma_wide<176>(float (&d)[88], uint64_t a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n176k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
        "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
        "%84, %85, %86, %87}, "
        "%88, %89, 1, 1, 1, 0, 0;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32), QV_EIGHT(d, 40), QV_EIGHT(d, 48), QV_EIGHT(d, 56),
          QV_EIGHT(d, 64), QV_EIGHT(d, 72), QV_EIGHT(d, 80)
        : "l"(a), "l"(b));
}

template <> __device__ __forceinline__ void
wgmma_wide<192>(float (&d)[96], uint64_t a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
        "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
        "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "%96, %97, 1, 1, 1, 0, 0;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32), QV_EIGHT(d, 40), QV_EIGHT(d, 48), QV_EIGHT(d, 56),
          QV_EIGHT(d, 64), QV_EIGHT(d, 72), QV_EIGHT(d, 80), QV_EIGHT(d, 88)
        : "l"(a), "l"(b));
}

template <> __device__ __forceinline__ void
wgmma_wide<256>(float (&d)[128], uint64_t a, uint64_t b)
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
        "%128, %129, 1, 1, 1, 0, 0;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24),
          QV_EIGHT(d, 32), QV_EIGHT(d, 40), QV_EIGHT(d, 48), QV_EIGHT(d, 56),
          QV_EIGHT(d, 64), QV_EIGHT(d, 72), QV_EIGHT(d, 80), QV_EIGHT(d, 88),
          QV_EIGHT(d, 96), QV_EIGHT(d, 104), QV_EIGHT(d, 112), QV_EIGHT(d, 120)
        : "l"(a), "l"(b));
}

/* d [64 x 64] = a [64 x 16] b [16 x 64], with KEEP plus d, b in a tile [k][64] as wgmma_tile describes
 * it; 16 rows further is + 128. */
template <int KEEP> __device__ __forceinline__ void
wgmma_b_trans(float (&d)[32], uint64_t a, uint64_t b)
{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, %34, 1, 1, 0, 1;\n"
        : QV_EIGHT(d, 0), QV_EIGHT(d, 8), QV_EIGHT(d, 16), QV_EIGHT(d, 24)
        : "l"(a), "l"(b), "n"(KEEP));
}
/* clang-format on */

#undef QV_EIGHT

#endif
