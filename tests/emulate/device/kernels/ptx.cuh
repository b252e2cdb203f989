/* kernels/ptx.cuh for the CPU: found in its place, with the same functions. What they mean is said
 * there; how they are done is in warp.cc, tensor_core.cc and async.cc.
 */
#ifndef QV_KERNELS_PTX_CUH
#define QV_KERNELS_PTX_CUH

#include "tests/emulate/async.h"
#include "tests/emulate/tensor_core.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <time.h>

typedef __nv_bfloat16 bf16;

inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* --- Copies to shared memory -------------------------------------------------------------- */

inline void copy16(void *dst, const void *src, bool valid)
{
    emu::copy_async(dst, src, valid);
}

inline void copy16_stream(void *dst, const void *src, bool valid)
{
    emu::copy_async(dst, src, valid);
}

inline void copies_commit()
{
    emu::copies_commit();
}

template <int N> inline void copies_wait()
{
    emu::copies_wait(N);
}

/* --- Global memory ------------------------------------------------------------------------ */

inline void prefetch(const void *) {}

inline void prefetch_line_to_stay(const void *p)
{
    prefetch(p);
}

inline void load_once(uint4 &v, const bf16 *p)
{
    v = *(const uint4 *)p;
}

inline uint4 load_stream(const bf16 *p)
{
    return *(const uint4 *)p;
}

/* A pair of a word and a flag is written and read at once; others may write them meanwhile. */
inline void put_line(uint4 *line, uint32_t a, uint32_t b, uint32_t flag)
{
    uint64_t *pairs = (uint64_t *)line;
    __atomic_store_n(&pairs[0], (uint64_t)flag << 32 | a, __ATOMIC_RELEASE);
    __atomic_store_n(&pairs[1], (uint64_t)flag << 32 | b, __ATOMIC_RELEASE);
}

inline uint4 look_at(const uint4 *line)
{
    emu::yield();
    const uint64_t *pairs = (const uint64_t *)line;
    uint64_t low = __atomic_load_n(&pairs[0], __ATOMIC_ACQUIRE);
    uint64_t high = __atomic_load_n(&pairs[1], __ATOMIC_ACQUIRE);
    return make_uint4((uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high, (uint32_t)(high >> 32));
}

inline uint32_t load_acquire(const uint32_t *p)
{
    emu::yield();
    return *p;
}

inline float2 load_of_others(const float *p)
{
    return *(const float2 *)p;
}

/* --- Tensor cores ------------------------------------------------------------------------- */

inline void ldmatrix4(uint32_t (&r)[4], const void *row)
{
    emu::load_tiles(r, row, false);
}

inline void ldmatrix4_trans(uint32_t (&r)[4], const void *row)
{
    emu::load_tiles(r, row, true);
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    emu::multiply_tile(c, a, b0, b1);
}

/* --- Other -------------------------------------------------------------------------------- */

template <int THREADS> inline void named_barrier(int id)
{
    emu::barrier(id, THREADS);
}

inline float power_of_two(float x)
{
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y; /* NaN stays NaN */
}

inline float quotient(float x, float y)
{
    float q = x / y;
    return fabsf(q) < 0x1p-126f ? 0.0f : q;
}

inline uint64_t now_ns()
{
    emu::yield();
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* --- Where there is 9.0 ------------------------------------------------------------------- */

/* Nothing, but what is called for must be there. */
inline void prefetch_to_stay(const void *p, uint32_t bytes)
{
    const volatile char *from = (const volatile char *)p;
    if (emu::code() >= 90 && bytes > 0)
        (void)from[0], (void)from[bytes - 1];
}

inline void let_next_start() {}

inline void wait_for_previous() {}

inline void cluster_sync()
{
    if (emu::code() >= 90) {
        emu::cluster_arrive();
        emu::cluster_wait();
    }
}

inline void cluster_arrive()
{
    if (emu::code() >= 90)
        emu::cluster_arrive();
}

inline void cluster_wait()
{
    if (emu::code() >= 90)
        emu::cluster_wait();
}

inline void store_to(float *p, int rank, float x)
{
    if (emu::code() >= 90)
        *(float *)emu::shared_of(rank, p) = x;
}

inline float4 load_from(const float *p, int rank)
{
    if (emu::code() < 90)
        return make_float4(0, 0, 0, 0);
    return *(const float4 *)emu::shared_of(rank, p);
}

#endif
