/* Instructions that CUDA C++ has no name for, one small function each: what 8.0 has, and what
 * kernels for it may call and only 9.0 does anything for. ptx_hopper.cuh, ptx_gemm.cuh,
 * wgmma_shapes.cuh and wgmma_attention.cuh hold the rest; no other file has inline assembly. They
 * contain nothing else, because tests/emulate has a second form of each for the CPU.
 */
#ifndef QV_KERNELS_PTX_CUH
#define QV_KERNELS_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* --- Copies to shared memory -------------------------------------------------------------- */

/* 16 bytes to shared memory; zeros where `valid` is false (the address is not read then). */
__device__ __forceinline__ void copy16(void *dst, const void *src, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(dst)),
                 "l"(src), "r"(valid ? 16 : 0));
}

/* The same for long rows that are read from end to end: 128 bytes come to the L2 cache at once. */
__device__ __forceinline__ void copy16_stream(void *dst, const void *src, bool valid)
{
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(dst)),
        "l"(src), "r"(valid ? 16 : 0));
}

__device__ __forceinline__ void copies_commit()
{
    asm volatile("cp.async.commit_group;\n" ::);
}

/* All copies of this thread but those of the last N groups have landed. */
template <int N> __device__ __forceinline__ void copies_wait()
{
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N));
}

/* --- Global memory ------------------------------------------------------------------------ */

/* The 128 bytes around `p` on their way into the L2 cache. */
__device__ __forceinline__ void prefetch(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p));
}

/* The same, to outlast there what is read without such a wish. */
__device__ __forceinline__ void prefetch_line_to_stay(const void *p)
{
    asm volatile("prefetch.global.L2::evict_last [%0];\n" ::"l"(p));
}

/* 16 bytes that nobody writes, read once: they do not stay in the L1 cache. Into v in place, which
 * is what the compiler does best with where the load is conditional. */
__device__ __forceinline__ void load_once(uint4 &v, const bf16 *p)
{
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
}

/* The same for long rows that are read from end to end: 128 bytes come to the L2 cache at once. */
__device__ __forceinline__ uint4 load_stream(const bf16 *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* Two pairs of a word and a flag, 16 bytes that arrive together wherever the memory is. */
__device__ __forceinline__ void put_line(uint4 *line, uint32_t a, uint32_t b, uint32_t flag)
{
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};\n" ::"l"(line), "r"(a),
                 "r"(flag), "r"(b)
                 : "memory");
}

/* What another device may have put there by now. */
__device__ __forceinline__ uint4 look_at(const uint4 *line)
{
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(line)
                 : "memory");
    return v;
}

/* What another block may have put there by now: what it wrote before that is to be seen then. */
__device__ __forceinline__ uint32_t load_acquire(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(v) : "l"(p) : "memory");
    return v;
}

/* What another block has written: not from the L1 cache. */
__device__ __forceinline__ float2 load_of_others(const float *p)
{
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];\n"
                 : "=f"(v.x), "=f"(v.y)
                 : "l"(p)
                 : "memory");
    return v;
}

/* --- Tensor cores ------------------------------------------------------------------------- */

/* Four tiles [8][8] of 16 bits, into fragments: lane l says where row l % 8 of tile l / 8 is. */
__device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

/* The same of the transposed tiles. */
__device__ __forceinline__ void ldmatrix4_trans(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

/* c [16 x 8] += a [16 x 16] b [16 x 8], in BF16 with float32 sums. */
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* --- Other -------------------------------------------------------------------------------- */

/* A barrier of THREADS threads, whole warps; 0 is that of __syncthreads(). */
template <int THREADS> __device__ __forceinline__ void named_barrier(int id)
{
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(THREADS) : "memory");
}

/* 2^x with a relative error of 2^-22, zero where it would be subnormal. */
__device__ __forceinline__ float power_of_two(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

/* x / y for y up to 2^126 with a relative error of 2^-22, zero where it would be subnormal. */
__device__ __forceinline__ float quotient(float x, float y)
{
    float q;
    asm("div.approx.ftz.f32 %0, %1, %2;\n" : "=f"(q) : "f"(x), "f"(y));
    return q;
}

/* Nanoseconds of a clock that all devices of the host share, in steps of up to a microsecond. */
__device__ __forceinline__ uint64_t now_ns()
{
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;\n" : "=l"(t));
    return t;
}

/* --- Where there is 9.0 ------------------------------------------------------------------- */

/* Bytes from `p` on, both multiples of 16, on their way into the L2 cache, where they outlast what
 * is read without such a wish. */
__device__ __forceinline__ void prefetch_to_stay(const void *p, uint32_t bytes)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;\n" : "=l"(policy));
    asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;\n" ::"l"(p),
                 "r"(bytes), "l"(policy));
#endif
}

/* Dependent launches (9.0 and later): a kernel that lets its successor start early, and a successor
 * that waits before it reads or writes what others may be working on. A successor that was launched
 * the ordinary way waits by itself. */
__device__ __forceinline__ void let_next_start()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

/* All threads of the blocks of a cluster; elsewhere a block is one by itself, and nothing waits. */
__device__ __forceinline__ void cluster_sync()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;\n" ::
                     : "memory");
#endif
}

/* Its two halves: what was written before the one is seen behind the other. */
__device__ __forceinline__ void cluster_arrive()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

/* A number to `p`, an address of this block's shared memory, in that of another of the cluster. */
__device__ __forceinline__ void store_to(float *p, int rank, float x)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "st.shared::cluster.f32 [there], %2;\n}\n" ::"r"(shared_address(p)),
                 "r"(rank), "f"(x)
                 : "memory");
#endif
}

/* Four numbers at `p`, an address of this block's shared memory, in that of another of the cluster;
 * zeros where there are no clusters. */
__device__ __forceinline__ float4 load_from(const float *p, int rank)
{
    float4 v = make_float4(0, 0, 0, 0);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
                 : "=r"(there)
                 : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];\n"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there)
                 : "memory");
#endif
    return v;
}

#endif
