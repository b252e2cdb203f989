/* What CUDA C++ has built in, for kernels that are compiled as C++ for the CPU: where a thread is,
 * barriers, what the lanes of a warp exchange, atomics, arithmetic. Included in front of each
 * translated kernel, with the toolkit's headers for the host, which name the rest. Only what some
 * kernel uses: what the next one needs besides, the compiler names.
 */
#ifndef QV_EMULATE_CUDA_DEVICE_H
#define QV_EMULATE_CUDA_DEVICE_H

#include "tests/emulate/machine.h"

#include <cuda_runtime.h>
#include <functional>
#include <math.h>
#include <memory>
#include <stdint.h>
#include <string.h>
#include <tuple>

/* Behind the headers of C++, which have it between brackets. */
#undef __noinline__
#define __noinline__ [[gnu::noinline]]

namespace emu
{

/* One number of where the running thread is; a variable, since structs have fields of these names.
 */
template <auto VECTOR, auto AXIS> struct position_axis {
    operator unsigned() const { return current->*VECTOR.*AXIS; }
};

template <auto VECTOR, typename T> struct position {
    position_axis<VECTOR, &T::x> x;
    position_axis<VECTOR, &T::y> y;
    position_axis<VECTOR, &T::z> z;
};

} // namespace emu

constexpr emu::position<&emu::thread::thread_idx, uint3> threadIdx{};
constexpr emu::position<&emu::thread::block_idx, uint3> blockIdx{};
constexpr emu::position<&emu::thread::block_dim, dim3> blockDim{};
constexpr emu::position<&emu::thread::grid_dim, dim3> gridDim{};
constexpr int warpSize = 32;

/* --- Barriers and fences ------------------------------------------------------------------ */

void __syncwarp(unsigned mask = 0xffffffffu);
void __syncthreads();
int __syncthreads_or(int predicate);
[[noreturn]] void __trap();

/* Threads of a launch run on one thread of the host, those of other ranks on others. */
inline void __threadfence()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

inline void __threadfence_system()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* --- Lanes of a warp ---------------------------------------------------------------------- */

namespace emu
{

enum shuffle_mode { SHUFFLE_INDEX, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR };
enum reduce_mode { REDUCE_ADD, REDUCE_MIN, REDUCE_MAX };

/* The value of the lane that `mode` and `with` name, among `width` neighbours. */
uint64_t shuffle(shuffle_mode mode, unsigned mask, uint64_t value, int with, int width);

/* Over the lanes of the mask; minimum and maximum as signed numbers if `is_signed`. */
uint32_t reduce(reduce_mode mode, unsigned mask, uint32_t value, bool is_signed);

template <typename T> T shuffle_as(shuffle_mode mode, unsigned mask, T value, int with, int width)
{
    static_assert(sizeof(T) <= sizeof(uint64_t), "what a lane can give");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    word = shuffle(mode, mask, word, with, width);
    memcpy(&value, &word, sizeof value);
    return value;
}

} // namespace emu

template <typename T> T __shfl_sync(unsigned mask, T value, int lane, int width = 32)
{
    return emu::shuffle_as(emu::SHUFFLE_INDEX, mask, value, lane, width);
}

template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32)
{
    return emu::shuffle_as(emu::SHUFFLE_UP, mask, value, (int)delta, width);
}

template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32)
{
    return emu::shuffle_as(emu::SHUFFLE_DOWN, mask, value, (int)delta, width);
}

template <typename T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32)
{
    return emu::shuffle_as(emu::SHUFFLE_XOR, mask, value, bits, width);
}

unsigned __ballot_sync(unsigned mask, int predicate);
unsigned __match_any_sync(unsigned mask, uint64_t value);

inline int __any_sync(unsigned mask, int predicate)
{
    return __ballot_sync(mask, predicate) != 0;
}

/* Unsigned or signed, as the device has them. */
#define EMU_REDUCE(name, mode)                                                                     \
    inline unsigned name(unsigned mask, unsigned value)                                            \
    {                                                                                              \
        return emu::reduce(mode, mask, value, false);                                              \
    }                                                                                              \
    inline int name(unsigned mask, int value)                                                      \
    {                                                                                              \
        return (int)emu::reduce(mode, mask, (uint32_t)value, true);                                \
    }
EMU_REDUCE(__reduce_add_sync, emu::REDUCE_ADD)
EMU_REDUCE(__reduce_min_sync, emu::REDUCE_MIN)
EMU_REDUCE(__reduce_max_sync, emu::REDUCE_MAX)
#undef EMU_REDUCE

/* --- Atomics ------------------------------------------------------------------------------ */

namespace emu
{

/* *p = op(*p), in one step also for the threads of other ranks; what was there before. */
template <typename T, typename OP> T atomic(T *p, OP op)
{
    T before, after;
    __atomic_load(p, &before, __ATOMIC_RELAXED);
    do
        after = op(before);
    while (
        !__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return before;
}

template <typename T> struct same {
    typedef T type;
};
template <typename T> using same_t = typename same<T>::type; /* not deduced */

} // namespace emu

template <typename T> T atomicAdd(T *p, emu::same_t<T> v)
{
    return emu::atomic(p, [=](T x) { return x + v; });
}

template <typename T> T atomicMax(T *p, emu::same_t<T> v)
{
    return emu::atomic(p, [=](T x) { return x > v ? x : v; });
}

/* Counts from 0 to `last` and around. */
inline unsigned atomicInc(unsigned *p, unsigned last)
{
    return emu::atomic(p, [=](unsigned x) { return x >= last ? 0 : x + 1; });
}

/* --- Memory ------------------------------------------------------------------------------- */

template <typename T> T __ldg(const T *p)
{
    return *p;
}

template <typename T> T __ldcg(const T *p)
{
    return *p;
}

template <typename T> T __ldcs(const T *p)
{
    return *p;
}

template <typename T> void __stwb(T *p, emu::same_t<T> v)
{
    *p = v;
}

template <typename T> void __stcs(T *p, emu::same_t<T> v)
{
    *p = v;
}

/* The address that instructions have for it: bytes from the beginning of the block's. */
size_t __cvta_generic_to_shared(const void *p);

/* --- Arithmetic --------------------------------------------------------------------------- */

inline float __uint_as_float(unsigned bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

inline float __int_as_float(int bits)
{
    return __uint_as_float((unsigned)bits);
}

inline unsigned __float_as_uint(float f)
{
    unsigned bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

inline int __float_as_int(float f)
{
    return (int)__float_as_uint(f);
}

inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}

inline int __clz(int x)
{
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}

inline int __ffs(int x)
{
    return __builtin_ffs(x);
}

inline unsigned long long __float2ull_rn(float x)
{
    return (unsigned long long)rintf(x);
}

/* Apart, where a compiler could make one operation of two. */
inline double __dmul_rn(double x, double y)
{
    volatile double product = x * y;
    return product;
}

inline float __fmul_rn(float x, float y)
{
    volatile float product = x * y;
    return product;
}

inline float __fadd_rn(float x, float y)
{
    volatile float sum = x + y;
    return sum;
}

/* The device's quick forms, which are less exact there. */
inline float __fdividef(float x, float y)
{
    return x / y;
}

inline float __expf(float x)
{
    return expf(x);
}

inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}

/* Of pi x. */
inline void sincospif(float x, float *sine, float *cosine)
{
    double angle = M_PI * remainder((double)x, 2);
    *sine = (float)sin(angle);
    *cosine = (float)cos(angle);
}

/* Mixed integers meet as in an expression; floats with NaN give the other one. */
#define EMU_MIN_MAX(a, b)                                                                          \
    inline auto min(a x, b y)                                                                      \
    {                                                                                              \
        return (decltype(x + y))x < (decltype(x + y))y ? (decltype(x + y))x : (decltype(x + y))y;  \
    }                                                                                              \
    inline auto max(a x, b y)                                                                      \
    {                                                                                              \
        return (decltype(x + y))x > (decltype(x + y))y ? (decltype(x + y))x : (decltype(x + y))y;  \
    }
EMU_MIN_MAX(int, int)
EMU_MIN_MAX(int, unsigned)
EMU_MIN_MAX(unsigned, int)
EMU_MIN_MAX(unsigned, unsigned)
EMU_MIN_MAX(long, long)
EMU_MIN_MAX(long, unsigned long)
EMU_MIN_MAX(unsigned long, long)
EMU_MIN_MAX(unsigned long, unsigned long)
EMU_MIN_MAX(long long, long long)
EMU_MIN_MAX(unsigned long long, unsigned long long)
#undef EMU_MIN_MAX

inline float min(float x, float y)
{
    return fminf(x, y);
}

inline float max(float x, float y)
{
    return fmaxf(x, y);
}

#endif
