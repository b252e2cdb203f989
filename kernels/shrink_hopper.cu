/* x1 = scale A x for the tokens of adapters, for many tokens on Hopper: bound by reading x once.
 *
 * An item is 128 tokens of a segment and up to four units of 16 ranks, which may belong to several
 * planes, so that x is read once where ranks are small. Blocks stay, one to a multiprocessor: two
 * threads fetch through the copy engine, on into the next item, x and A apart since a thread takes
 * some 170 clocks for a box, and two warpgroups multiply. x1 leaves as the product reads it
 * (gemm_hopper.cuh).
 */
#include "kernels/kernels_gemm.h"
#include "kernels/lora_places.cuh"
#include "kernels/tensor_map.cuh"
#include "kernels/wgmma_shapes.cuh"

namespace
{

constexpr int ROWS = 64;         /* of a warpgroup */
constexpr int TOKENS = 2 * ROWS; /* of an item */
constexpr int UNIT = 16;         /* ranks */
constexpr int UNITS = 4;         /* of an item */
constexpr int STEP = 64;         /* of k */
constexpr int STAGES = 8;
constexpr int WARPS = 10;
constexpr int ITEMS = 64; /* of a block */

/* 16 ranks of a plane. */
struct shrink_unit {
    int32_t plane, first;
    float scale;
};

struct shrink_item {
    int32_t slot, first, n; /* tokens */
    int32_t n_units;
    shrink_unit units[UNITS];
};

struct shrink_shared {
    bf16 x[STAGES][TOKENS * STEP], a[STAGES][UNITS * UNIT * STEP];
    uint64_t full[STAGES], empty[STAGES];
    shrink_item items[ITEMS];
};

constexpr int BYTES = (int)sizeof(shrink_shared) + 1024;

/* Where a role is in the ring of stages. */
struct shrink_ring {
    int at = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance()
    {
        if (++at == STAGES) {
            at = 0;
            phase ^= 1;
        }
    }
};

/* Units [first, first + UNITS) of an adapter, plane after plane. A warp. */
__device__ __forceinline__ void choose_units(shrink_item &item, const qv_k_lora_slice *slices,
                                             int n, int first)
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
            item.units[lane] = {plane, at * UNIT, scale};
        begin += units;
    }
    if (lane == 0)
        item.n_units = max(0, min(UNITS, begin - first));
}

/* Item `number` of the grid's. A warp. */
[[maybe_unused]] __device__ __forceinline__ void find_item(shrink_item &item,
                                                           const qv_k_segments &s,
                                                           const qv_k_lora_site &site, int number,
                                                           int places)
{
    tokens_of_place p = find_tokens(s, number % places, TOKENS);
    int lane = threadIdx.x & 31;
    if (p.n > 0 && p.slot >= 0)
        choose_units(item, site.slices + (int64_t)p.slot * site.ranges.n, site.ranges.n,
                     number / places * UNITS);
    else if (lane == 0)
        item.n_units = 0;
    if (lane == 0) {
        item.slot = p.slot;
        item.first = p.first;
        item.n = p.n;
    }
}

/* One thread: x. */
[[maybe_unused]] __device__ __forceinline__ void
fetch_x(shrink_shared &m, shrink_ring &r, const shrink_item &item, const CUtensorMap *x, int steps)
{
    for (int step = 0; step < steps; step++, r.advance()) {
        barrier_wait(&m.empty[r.at], r.phase ^ 1);
        barrier_expect(&m.full[r.at], TOKENS * STEP * (int)sizeof(bf16));
        copy_box_here(m.x[r.at], x, step * STEP, item.first, 0, &m.full[r.at]);
    }
}

/* Another: A. */
[[maybe_unused]] __device__ __forceinline__ void fetch_a(shrink_shared &m, shrink_ring &r,
                                                         const shrink_item &item,
                                                         const qv_k_lora_site &site,
                                                         const CUtensorMap *a, int steps)
{
    int n = item.n_units;
    for (int step = 0; step < steps; step++, r.advance()) {
        barrier_wait(&m.empty[r.at], r.phase ^ 1);
        barrier_expect(&m.full[r.at], n * UNIT * STEP * (int)sizeof(bf16));
        for (int i = 0; i < n; i++) {
            const shrink_unit &u = item.units[i];
            copy_box_here(m.a[r.at] + i * UNIT * STEP, a, step * STEP, u.first,
                          item.slot * site.ranges.n + u.plane, &m.full[r.at]);
        }
    }
}

/* The sums over k; columns of units that are not there hold anything. A warpgroup. */
template <int RANKS>
__device__ __forceinline__ void multiply(shrink_shared &m, shrink_ring &r, int steps, int row,
                                         float (&acc)[RANKS / 2])
{
    int last = 0;
    for (int step = 0; step < steps; step++, r.advance()) {
        barrier_wait(&m.full[r.at], r.phase);
        uint64_t x = wgmma_tile(m.x[r.at] + row * STEP), a = wgmma_tile(m.a[r.at]);
        wgmma_keep(acc);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < STEP / 16; k++)
            wgmma<RANKS>(acc, x + 2 * k, a + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0 && threadIdx.x % 128 == 0)
            barrier_arrive(&m.empty[last]);
        last = r.at;
    }
    wgmma_wait<0>();
    wgmma_keep(acc);
    if (threadIdx.x % 128 == 0)
        barrier_arrive(&m.empty[last]);
}

/* High and low parts of scale * acc. */
template <int RANKS>
__device__ __forceinline__ void store_x1(const shrink_item &item, const qv_k_lora_site &site,
                                         bf16 *x1, const float (&acc)[RANKS / 2])
{
    int row = (threadIdx.x >> 5) * 16 + (threadIdx.x >> 2 & 7), col = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        if (row >= item.n)
            return;
#pragma unroll
        for (int i = 0; i < RANKS / 8; i++) {
            if (i / 2 >= item.n_units)
                break;
            const shrink_unit &u = item.units[i / 2];
            int64_t plane = (int64_t)(item.first + row) * site.ranges.n + u.plane;
            bf16 *to = x1 + (plane * site.max_rank + u.first) * 2 + i % 2 * 8 + col;
            uint32_t high, low;
            split_bf16(u.scale * acc[4 * i + 2 * half], u.scale * acc[4 * i + 2 * half + 1], high,
                       low);
            *(uint32_t *)to = high;
            *(uint32_t *)(to + UNIT) = low;
        }
    }
}

/* A warpgroup. */
template <int RANKS>
__device__ __forceinline__ void shrink(shrink_shared &m, shrink_ring &r, const shrink_item &item,
                                       const qv_k_lora_site &site, int steps, bf16 *x1)
{
    float acc[RANKS / 2] = {};
    multiply<RANKS>(m, r, steps, threadIdx.x / 128 * ROWS, acc);
    store_x1<RANKS>(item, site, x1, acc);
}

/* Grid (blocks). Threads: a warpgroup that multiplies and a warp of which one thread fetches. Which
 * work there is is looked up while the kernel before still runs. No block lets the next kernel
 * start, or ends, before that one is complete: what starts behind this may rely on it. */
__global__ void __launch_bounds__(WARPS * 32, 1)
    shrink_split_kernel(qv_k_segments s, const __grid_constant__ qv_k_lora_site site, bf16 *x1,
                        int steps, int places, int n_items, const __grid_constant__ CUtensorMap x,
                        const __grid_constant__ CUtensorMap a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char shrink_memory[];
    shrink_shared &m = *(shrink_shared *)(((uintptr_t)shrink_memory + 1023) / 1024 * 1024);
    bool multiplies = warpgroup() < TOKENS / ROWS;
    int n = (n_items - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    for (int i = threadIdx.x / 32; i < n; i += WARPS)
        find_item(m.items[i], s, site, blockIdx.x + i * gridDim.x, places);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&m.full[i], 2);
            barrier_init(&m.empty[i], TOKENS / ROWS);
        }
        barriers_publish();
    }
    wait_for_previous();
    let_next_start();
    __syncthreads();
    shrink_ring r;
    for (int i = 0; i < n; i++) {
        const shrink_item &item = m.items[i];
        if (item.n_units == 0)
            continue;
        if (!multiplies && threadIdx.x == TOKENS / ROWS * 128)
            fetch_x(m, r, item, &x, steps);
        else if (!multiplies && threadIdx.x == TOKENS / ROWS * 128 + 32)
            fetch_a(m, r, item, site, &a, steps);
        else if (multiplies && item.n_units <= 2)
            shrink<2 * UNIT>(m, r, item, site, steps, x1);
        else if (multiplies)
            shrink<UNITS * UNIT>(m, r, item, site, steps, x1);
    }
#else
    (void)s, (void)site, (void)x1, (void)steps, (void)places, (void)n_items, (void)x, (void)a;
    __trap(); /* not launched on other devices */
#endif
}

/* --- Launch ------------------------------------------------------------------------------- */

} // namespace

qv_status qv_k_gemm_shrink(const qv_k_linear_args *args, const qv_k_stream_lora *lora, int n_sms,
                           void *stream)
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

    int groups = (site.ranges.n * site.max_rank / UNIT + UNITS - 1) / UNITS;
    int places = (int)n_places(s, TOKENS), n_items = places * groups;
    int blocks = max(min(n_items, n_sms), (n_items + ITEMS - 1) / ITEMS);
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension; /* leaves room for the product's */
    attributes[1].val.clusterDim.x = 2;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(blocks + 1) / 2 * 2);
    config.blockDim = dim3(WARPS * 32);
    config.dynamicSmemBytes = BYTES;
    config.stream = (cudaStream_t)stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    cudaError_t error = cudaFuncSetAttribute(shrink_split_kernel,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, shrink_split_kernel, s, site, (bf16 *)(void *)lora->x1,
                                   (int)((site.n_in + STEP - 1) / STEP), places, n_items, x, a);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: lora_shrink: %s", cudaGetErrorString(error));
    return qv_k_check_launch("lora_shrink");
}
