/* x1 = scale A x for the tokens of adapters, for many tokens on Hopper: bound by reading x once.
 *
 * A block has 64 tokens of a segment and up to four units of 16 ranks, which may belong to several
 * planes, so that x is read once where ranks are small. One thread fetches through the copy engine,
 * six steps of k ahead, and a warpgroup multiplies. x1 leaves as the product reads it
 * (gemm_hopper.cuh).
 */
#include "kernels/kernels_gemm.h"
#include "kernels/lora_places.cuh"
#include "kernels/tensor_map.cuh"
#include "kernels/wgmma_shapes.cuh"

namespace
{

constexpr int TOKENS = 64; /* of a block */
constexpr int UNIT = 16;   /* ranks */
constexpr int UNITS = 4;   /* of a block */
constexpr int STEP = 64;   /* of k */
constexpr int STAGES = 6;
constexpr int THREADS = 128 + 32;

/* 16 ranks of a plane. */
struct shrink_unit {
    int32_t plane, first;
    float scale;
};

struct shrink_shared {
    bf16 x[STAGES][TOKENS * STEP], a[STAGES][UNITS * UNIT * STEP];
    uint64_t full[STAGES], empty[STAGES];
    shrink_unit units[UNITS];
    int n_units;
};

constexpr int BYTES = (int)sizeof(shrink_shared) + 1024;

/* Units [first, first + UNITS) of an adapter, plane after plane. A warp. */
__device__ __forceinline__ void choose_units(shrink_shared &m, const qv_k_lora_slice *slices, int n,
                                             int first)
{
    int lane = threadIdx.x & 31, begin = 0;
    qv_k_lora_slice mine = {};
    if (lane < n)
        mine = slices[lane];
    for (int plane = 0; plane < n; plane++) {
        unsigned who = __ballot_sync(~0u, lane < n && mine.rank > 0 && mine.plane == plane);
        if (who == 0)
            continue;
        int from = __ffs((int)who) - 1, rank = __shfl_sync(~0u, mine.rank, from);
        float scale = __shfl_sync(~0u, mine.scale, from);
        int units = (rank + UNIT - 1) / UNIT, at = first + lane - begin;
        if (lane < UNITS && at >= 0 && at < units)
            m.units[lane] = {plane, at * UNIT, scale};
        begin += units;
    }
    if (lane == 0)
        m.n_units = max(0, min(UNITS, begin - first));
}

/* One thread. */
__device__ __forceinline__ void fetch(shrink_shared &m, const qv_k_lora_site &site,
                                      const CUtensorMap *x, const CUtensorMap *a, int slot,
                                      int token, int steps)
{
    int n = m.n_units, at = 0;
    uint32_t phase = 0;
    for (int step = 0; step < steps; step++) {
        barrier_wait(&m.empty[at], phase ^ 1);
        barrier_expect(&m.full[at], (TOKENS + n * UNIT) * STEP * (int)sizeof(bf16));
        copy_box_here(m.x[at], x, step * STEP, token, 0, &m.full[at]);
        for (int i = 0; i < n; i++) {
            const shrink_unit &u = m.units[i];
            copy_box_here(m.a[at] + i * UNIT * STEP, a, step * STEP, u.first,
                          slot * site.ranges.n + u.plane, &m.full[at]);
        }
        if (++at == STAGES) {
            at = 0;
            phase ^= 1;
        }
    }
}

/* The sums over k; columns of units that are not there hold anything. A warpgroup. */
__device__ __forceinline__ void multiply(shrink_shared &m, int steps,
                                         float (&acc)[UNITS * UNIT / 2])
{
    int at = 0, last = 0;
    uint32_t phase = 0;
    for (int step = 0; step < steps; step++) {
        barrier_wait(&m.full[at], phase);
        uint64_t x = wgmma_tile(m.x[at]), a = wgmma_tile(m.a[at]);
        wgmma_keep(acc);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < STEP / 16; k++)
            wgmma<UNITS * UNIT>(acc, x + 2 * k, a + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0 && threadIdx.x == 0)
            barrier_arrive(&m.empty[last]);
        last = at;
        if (++at == STAGES) {
            at = 0;
            phase ^= 1;
        }
    }
    wgmma_wait<0>();
    wgmma_keep(acc);
}

/* High and low parts of scale * acc for n tokens from `token` on. */
__device__ __forceinline__ void store_x1(const shrink_shared &m, const qv_k_lora_site &site,
                                         bf16 *x1, int64_t token, int n,
                                         const float (&acc)[UNITS * UNIT / 2])
{
    int row = (threadIdx.x >> 5) * 16 + (threadIdx.x >> 2 & 7), col = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        if (row >= n)
            return;
#pragma unroll
        for (int i = 0; i < UNITS * UNIT / 8; i++) {
            if (i / 2 >= m.n_units)
                break;
            const shrink_unit &u = m.units[i / 2];
            int64_t plane = (token + row) * site.ranges.n + u.plane;
            bf16 *to = x1 + (plane * site.max_rank + u.first) * 2 + i % 2 * 8 + col;
            uint32_t high, low;
            split_bf16(u.scale * acc[4 * i + 2 * half], u.scale * acc[4 * i + 2 * half + 1], high,
                       low);
            *(uint32_t *)to = high;
            *(uint32_t *)(to + UNIT) = low;
        }
    }
}

/* Grid (blocks of ranks, places of 64 tokens). Threads: a warpgroup that multiplies and a warp of
 * which one thread fetches. Which work there is is looked up while the kernel before still runs. No
 * block lets the next kernel start, or ends, before that one is complete: what starts behind this
 * may rely on it. */
__global__ void __launch_bounds__(THREADS, 2)
    shrink_split_kernel(qv_k_segments s, const __grid_constant__ qv_k_lora_site site, bf16 *x1,
                        int steps, const __grid_constant__ CUtensorMap x,
                        const __grid_constant__ CUtensorMap a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char shrink_memory[];
    shrink_shared &m = *(shrink_shared *)(((uintptr_t)shrink_memory + 1023) / 1024 * 1024);
    tokens_of_place p = find_tokens(s, blockIdx.y, TOKENS);
    bool any = p.n > 0 && p.slot >= 0, multiplies = warpgroup() == 0;
    if (any && threadIdx.x < 32)
        choose_units(m, site.slices + (int64_t)p.slot * site.ranges.n, site.ranges.n,
                     blockIdx.x * UNITS);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&m.full[i], 1);
            barrier_init(&m.empty[i], 1);
        }
        barriers_publish();
    }
    wait_for_previous();
    let_next_start();
    __syncthreads();
    if (!any || m.n_units == 0)
        return;
    if (multiplies) {
        float acc[UNITS * UNIT / 2] = {};
        multiply(m, steps, acc);
        store_x1(m, site, x1, p.first, p.n, acc);
    } else if (threadIdx.x == 128) {
        fetch(m, site, &x, &a, p.slot, p.first, steps);
    }
#else
    (void)s, (void)site, (void)x1, (void)steps, (void)x, (void)a;
    __trap(); /* not launched on other devices */
#endif
}

} // namespace

qv_status qv_k_gemm_shrink(const qv_k_linear_args *args, const qv_k_stream_lora *lora, void *stream)
{
    const qv_k_segments &s = lora->segments;
    const qv_k_lora_site &site = lora->site;
    CUtensorMap x, a;
    cuuint64_t n_in = (cuuint64_t)site.n_in, n = (cuuint64_t)args->n_tokens;
    cuuint64_t rank = (cuuint64_t)site.max_rank, x_stride = (cuuint64_t)args->x_stride;
    const cuuint64_t x_sizes[3] = {n_in, n, 1}, x_strides[2] = {x_stride * 2, n * x_stride * 2};
    const cuuint32_t x_box[3] = {STEP, TOKENS, 1}, a_box[3] = {STEP, UNIT, 1};
    const cuuint64_t a_sizes[3] = {n_in, rank, (cuuint64_t)site.n_slots * site.ranges.n};
    const cuuint64_t a_strides[2] = {n_in * 2, rank * n_in * 2};
    QV_TRY(qv_k_tensor_map("lora_shrink", args->x, x_sizes, x_strides, x_box, &x));
    QV_TRY(qv_k_tensor_map("lora_shrink", site.a, a_sizes, a_strides, a_box, &a));

    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((site.ranges.n * site.max_rank / UNIT + UNITS - 1) / UNITS),
                          n_places(s, TOKENS));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = BYTES;
    config.stream = (cudaStream_t)stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaError_t error = cudaFuncSetAttribute(shrink_split_kernel,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, shrink_split_kernel, s, site, (bf16 *)(void *)lora->x1,
                                   (int)((site.n_in + STEP - 1) / STEP), x, a);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: lora_shrink: %s", cudaGetErrorString(error));
    return qv_k_check_launch("lora_shrink");
}
