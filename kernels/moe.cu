/* Router, list of pairs and weighted sum of routed experts. All small: what counts is the number of
 * launches (one for a router, one for a list of a decode step, one for a sum) and that nothing
 * depends on the order in which threads happen to run.
 */
#include "kernels/add_norm.cuh"
#include "kernels/device.cuh"
#include "kernels/kernels_moe.h"
#include "kernels/router.cuh"
#include "kernels/tensor_core.cuh"

namespace
{

constexpr int MAX_EXPERTS =
    2048; /* of a list: counts of its chunks fit into the memory of its runs */
constexpr int RANK_THREADS = 256;

/* --- Router ------------------------------------------------------------------------------- */

/* A warp a token. Shared: scores and biased scores of each. */
__global__ void router_kernel(qv_k_router_args c)
{
    extern __shared__ float router_memory[];
    __shared__ float groups[4][MAX_GROUPS];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n = c.n_experts;
    int64_t t = (int64_t)blockIdx.x * (blockDim.x >> 5) + warp;
    if (t >= c.n_tokens)
        return;
    float *score = router_memory + warp * 2 * n, *value = score + n;
    const float *logits = c.logits + t * c.logits_stride;
    if (c.sigmoid) {
        for (int i = lane; i < n; i += 32)
            score[i] = sigmoid(logits[i]);
    } else {
        float most = -INFINITY, sum = 0;
        for (int i = lane; i < n; i += 32)
            most = fmaxf(most, logits[i]);
#pragma unroll
        for (int i = 16; i > 0; i >>= 1)
            most = fmaxf(most, __shfl_xor_sync(ALL, most, i));
        for (int i = lane; i < n; i += 32) {
            score[i] = expf(logits[i] - most);
            sum += score[i];
        }
        sum = warp_sum(sum);
        for (int i = lane; i < n; i += 32)
            score[i] /= sum;
    }
    for (int i = lane; i < n; i += 32) {
        float v = by_logit(c) ? logits[i] : score[i] + (c.bias ? c.bias[i] : 0.0f);
        value[i] = v == v ? v : -INFINITY; /* NaN means taken */
    }
    __syncwarp();
    if (c.n_groups > 1)
        keep_groups(c, value, groups[warp]);

    float sum = 0;
    int32_t *ids = c.ids + t * c.top_k;
    float *weights = c.weights + t * c.top_k;
    best b = lane_best(value, n);
    for (int j = 0; j < c.top_k; j++) {
        best top = warp_best(b);
        float weight = score[top.id];
        sum += weight;
        if (lane == j % 32) {
            ids[j] = top.id;
            weights[j] = weight;
        }
        if (lane == (top.id & 31)) {
            value[top.id] = NAN;
            b = lane_best(value, n);
        }
        __syncwarp();
    }
    if (c.sigmoid)
        sum += 1e-20f;
    for (int j = lane; j < c.top_k; j += 32)
        weights[j] = (c.normalize ? weights[j] / sum : weights[j]) * c.scale;
}

/* A warp a token. */
template <int PER> __global__ void __launch_bounds__(128) router_warp_kernel(qv_k_router_args c)
{
    int lane = threadIdx.x & 31;
    int64_t t = (int64_t)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (t >= c.n_tokens)
        return;
    const warp_choice mine = choose_by_warp<PER>(c, c.logits + t * c.logits_stride);
    if (lane < c.top_k) {
        c.ids[t * c.top_k + lane] = mine.id;
        c.weights[t * c.top_k + lane] = mine.weight;
    }
}

/* A block a token, for decode. No groups. */
__global__ void __launch_bounds__(RANK_THREADS) router_rank_kernel(qv_k_router_args c)
{
    extern __shared__ __align__(16) float rank_memory[];
    __shared__ rank_shared m;
    choose_by_rank<RANK_THREADS, 1>(c, blockIdx.x, rank_memory, m);
}

/* --- List: a stable counting sort --------------------------------------------------------- */

constexpr int CHUNK = 1024;     /* pairs of a block in the form of many blocks */
constexpr int ONE_BLOCK = 2048; /* pairs up to which one block does it all */
constexpr int LAYOUT_THREADS = 1024;

/* Exclusive sum over a block of `n` threads, n a multiple of 32; total of all to everyone. */
__device__ __forceinline__ int block_sum_before(int x, int *warp_sums, int &total)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5, sum = x;
#pragma unroll
    for (int i = 1; i < 32; i <<= 1) {
        int before = __shfl_up_sync(ALL, sum, i);
        sum += lane >= i ? before : 0;
    }
    __syncthreads(); /* warp_sums of a call before have been read */
    if (lane == 31)
        warp_sums[warp] = sum;
    __syncthreads();
    int before = lane < n_warps ? warp_sums[lane] : 0;
#pragma unroll
    for (int i = 1; i < 32; i <<= 1) {
        int more = __shfl_up_sync(ALL, before, i);
        before += lane >= i ? more : 0;
    }
    total = __shfl_sync(ALL, before, 31);
    before = __shfl_sync(ALL, before, warp ? warp - 1 : 0);
    return (warp ? before : 0) + sum - x;
}

/* From how many pairs each expert has (shared), its first place, and the experts that have any. All
 * threads of one block. start[e] becomes where its next pair goes. */
__device__ void lay_out_experts(const qv_k_list &list, int *start, int *warp_sums)
{
    int places = 0, active = 0, tiles = 0, wide_tiles = 0;
    for (int first = 0; first < list.n_experts; first += blockDim.x) {
        int e = first + threadIdx.x, n = e < list.n_experts ? start[e] : 0, total;
        int n_tiles = (n + QV_K_MOE_TILE - 1) / QV_K_MOE_TILE;
        int at = places + block_sum_before(n, warp_sums, total);
        places += total;
        int index = active + block_sum_before(n > 0, warp_sums, total);
        active += total;
        int tile = tiles + block_sum_before(n_tiles, warp_sums, total);
        tiles += total;
        int wide = wide_tiles + block_sum_before((n_tiles + 3) / 4, warp_sums, total);
        wide_tiles += total;
        if (e < list.n_experts) {
            start[e] = at;
            list.expert_start[e] = at;
        }
        if (n > 0) {
            list.work[2 + 2 * index] = wide << QV_K_MOE_EXPERT_BITS | e;
            list.work[3 + 2 * index] = tile;
        }
    }
    if (threadIdx.x == 0) {
        list.expert_start[list.n_experts] = places;
        list.work[0] = active;
        list.work[1] = tiles;
        *list.next_item = 0;
    }
    __syncthreads();
}

/* Put the pairs [first, first + blockDim.x) at their places, in order: start[e] is where the next
 * pair of an expert goes, and moves on. counts [warps][n_experts] is zero before and after. */
__device__ void place_pairs(const int32_t *ids, const qv_k_list &list, int n_pairs, int first,
                            int *start, uint16_t *counts)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, p = first + threadIdx.x;
    int e = expert_of(ids, list, n_pairs, p);
    unsigned peers = __match_any_sync(ALL, e);
    int rank = __popc(peers & ((1u << lane) - 1));
    bool leads = e >= 0 && rank == 0;
    if (leads)
        counts[warp * list.n_experts + e] = (uint16_t)__popc(peers);
    __syncthreads();
    if (e >= 0) {
        int place = start[e] + rank;
        for (int w = 0; w < warp; w++)
            place += counts[w * list.n_experts + e];
        list.place[p] = place;
        list.pair[place] = p;
    } else if (p < n_pairs) {
        list.place[p] = -1;
    }
    __syncthreads();
    if (leads) {
        counts[warp * list.n_experts + e] = 0;
        atomicAdd(&start[e], __popc(peers)); /* sums of integers: the order is no matter */
    }
    __syncthreads();
}

/* Adapter of the pair at a place. */
__device__ __forceinline__ int slot_of(const qv_k_list &list, int place)
{
    return slot_of_pair(list, list.pair[place]);
}

/* Runs of the places [first, first + blockDim.x): where one starts its number is `before` + those
 * in front of it; where one ends, n holds its end for now. Returns how many start here. */
__device__ int find_runs(const qv_k_list &list, int first, int before, int *warp_sums, bool store)
{
    int p = first + threadIdx.x, places = list.expert_start[list.n_experts], total;
    int slot = -1, e = 0;
    bool starts = false, ends = false;
    if (p < places && (slot = slot_of(list, p)) >= 0) {
        e = range_of(list.expert_start, list.n_experts, p);
        /* The last of several experts that start here is the one that is not empty. */
        starts = p == list.expert_start[e] || slot_of(list, p - 1) != slot;
        ends = p + 1 == list.expert_start[e + 1] || slot_of(list, p + 1) != slot;
    }
    int index = before + block_sum_before(starts, warp_sums, total);
    if (starts && store) {
        list.runs[index].first = p;
        list.runs[index].expert = e;
        list.runs[index].slot = slot;
    }
    if (ends && store)
        list.runs[index + starts - 1].n = p + 1;
    return total;
}

/* Everything for up to ONE_BLOCK pairs. Shared: start [n_experts], counts [warps][n_experts]. */
__global__ void route_kernel(const int32_t *ids, qv_k_list list, int n_pairs)
{
    let_next_start();
    extern __shared__ int route_memory[];
    __shared__ int warp_sums[32];
    int *start = route_memory;
    uint16_t *counts = (uint16_t *)(start + list.n_experts);
    int n_counts = (blockDim.x >> 5) * list.n_experts;
    for (int i = threadIdx.x; i < list.n_experts; i += blockDim.x)
        start[i] = 0;
    for (int i = threadIdx.x; i < (n_counts + 1) / 2; i += blockDim.x)
        ((uint32_t *)counts)[i] = 0;
    __syncthreads();
    for (int p = threadIdx.x; p < n_pairs; p += blockDim.x) {
        int e = expert_of(ids, list, n_pairs, p);
        if (e >= 0)
            atomicAdd(&start[e], 1);
    }
    __syncthreads();
    lay_out_experts(list, start, warp_sums);
    for (int first = 0; first < n_pairs; first += blockDim.x)
        place_pairs(ids, list, n_pairs, first, start, counts);

    int n_runs = 0, places = list.expert_start[list.n_experts];
    for (int first = 0; first < places && list.n_segs > 0; first += blockDim.x)
        n_runs += find_runs(list, first, n_runs, warp_sums, true);
    __syncthreads();
    for (int i = threadIdx.x; i < n_runs; i += blockDim.x)
        list.runs[i].n -= list.runs[i].first;
    if (threadIdx.x == 0)
        *list.n_runs = n_runs;
}

/* Many blocks: counts of each chunk of pairs into the memory of the runs, which are found last. */
__device__ __forceinline__ int *chunk_counts(const qv_k_list &list, int chunk)
{
    return (int *)list.runs + (int64_t)chunk * list.n_experts;
}

__global__ void count_kernel(const int32_t *ids, qv_k_list list, int n_pairs)
{
    extern __shared__ int count_memory[];
    for (int i = threadIdx.x; i < list.n_experts; i += blockDim.x)
        count_memory[i] = 0;
    __syncthreads();
    int e = expert_of(ids, list, n_pairs, blockIdx.x * CHUNK + threadIdx.x);
    if (e >= 0)
        atomicAdd(&count_memory[e], 1);
    __syncthreads();
    for (int i = threadIdx.x; i < list.n_experts; i += blockDim.x)
        chunk_counts(list, blockIdx.x)[i] = count_memory[i];
}

constexpr int COUNTS_AT_ONCE = 16;

/* The sum of an expert's counts in chunks [first, last), and with `store` in their place `before`
 * and those in front of each. */
__device__ __forceinline__ int sum_counts(const qv_k_list &list, int e, int first, int last,
                                          int before, bool store)
{
    for (int chunk = first; chunk < last; chunk += COUNTS_AT_ONCE) {
        int n[COUNTS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < COUNTS_AT_ONCE; i++)
            n[i] = chunk + i < last ? chunk_counts(list, chunk + i)[e] : 0;
#pragma unroll
        for (int i = 0; i < COUNTS_AT_ONCE; i++) {
            if (store && chunk + i < last)
                chunk_counts(list, chunk + i)[e] = before;
            before += n[i];
        }
    }
    return before;
}

/* Threads of the block that lays out that share an expert's chunks. */
__host__ __device__ constexpr int layout_parts(int n_experts)
{
    return n_experts < LAYOUT_THREADS ? LAYOUT_THREADS / n_experts : 1;
}

/* One block: counts of chunks become what comes before each of them. Shared: sums of parts, start.
 */
__global__ void __launch_bounds__(LAYOUT_THREADS) layout_kernel(qv_k_list list, int n_chunks)
{
    extern __shared__ int layout_memory[];
    __shared__ int warp_sums[32];
    int n = list.n_experts, parts = layout_parts(n), each = (n_chunks + parts - 1) / parts;
    int *start = layout_memory + parts * n;
    for (int i = threadIdx.x; i < parts * n; i += LAYOUT_THREADS) {
        int first = i / n * each;
        layout_memory[i] = sum_counts(list, i % n, first, min(first + each, n_chunks), 0, false);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < parts * n; i += LAYOUT_THREADS) {
        int part = i / n, e = i % n, first = part * each, before = 0;
        for (int j = 0; j < part; j++)
            before += layout_memory[j * n + e];
        before = sum_counts(list, e, first, min(first + each, n_chunks), before, true);
        if (part == parts - 1)
            start[e] = before;
    }
    if (threadIdx.x == 0)
        *list.n_runs = 0; /* until they are found */
    __syncthreads();
    lay_out_experts(list, start, warp_sums);
}

__global__ void place_kernel(const int32_t *ids, qv_k_list list, int n_pairs)
{
    extern __shared__ int place_memory[];
    int *start = place_memory;
    uint16_t *counts = (uint16_t *)(start + list.n_experts);
    for (int i = threadIdx.x; i < list.n_experts; i += blockDim.x)
        start[i] = list.expert_start[i] + chunk_counts(list, blockIdx.x)[i];
    for (int i = threadIdx.x; i < ((int)(blockDim.x >> 5) * list.n_experts + 1) / 2;
         i += blockDim.x)
        ((uint32_t *)counts)[i] = 0;
    __syncthreads();
    for (int first = 0; first < CHUNK; first += blockDim.x)
        place_pairs(ids, list, n_pairs, blockIdx.x * CHUNK + first, start, counts);
}

/* How many runs start in each chunk of places; behind the experts in `work`. */
__device__ __forceinline__ int *run_counts(const qv_k_list &list)
{
    return list.work + 2 + 2 * list.n_experts;
}

__global__ void count_runs_kernel(qv_k_list list)
{
    __shared__ int warp_sums[32];
    int n = find_runs(list, blockIdx.x * CHUNK, 0, warp_sums, false);
    if (threadIdx.x == 0)
        run_counts(list)[blockIdx.x] = n;
}

__global__ void find_runs_kernel(qv_k_list list)
{
    __shared__ int warp_sums[32];
    int mine = 0, before, total;
    for (int i = threadIdx.x; i < blockIdx.x; i += blockDim.x)
        mine += run_counts(list)[i];
    block_sum_before(mine, warp_sums, total);
    before = total;
    int n = find_runs(list, blockIdx.x * CHUNK, before, warp_sums, true);
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0)
        *list.n_runs = before + n;
}

__global__ void finish_runs_kernel(qv_k_list list)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < *list.n_runs;
         i += gridDim.x * blockDim.x)
        list.runs[i].n -= list.runs[i].first;
}

qv_status route_many(const int32_t *ids, const qv_k_list &list, int n_pairs, cudaStream_t stream)
{
    int n_chunks = (n_pairs + CHUNK - 1) / CHUNK, threads = list.n_experts <= 1024 ? CHUNK : 256;
    size_t start_bytes = (size_t)list.n_experts * sizeof(int);
    size_t place_bytes = start_bytes + (size_t)(threads / 32) * list.n_experts * 2 + 4;
    if (cudaFuncSetAttribute(place_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)place_bytes) != cudaSuccess)
        return qv_k_check_launch("moe_route");
    count_kernel<<<n_chunks, CHUNK, start_bytes, stream>>>(ids, list, n_pairs);
    layout_kernel<<<1, LAYOUT_THREADS, (size_t)(layout_parts(list.n_experts) + 1) * start_bytes,
                    stream>>>(list, n_chunks);
    place_kernel<<<n_chunks, threads, place_bytes, stream>>>(ids, list, n_pairs);
    if (list.n_segs > 0) {
        count_runs_kernel<<<n_chunks, CHUNK, 0, stream>>>(list);
        find_runs_kernel<<<n_chunks, CHUNK, 0, stream>>>(list);
        finish_runs_kernel<<<64, 256, 0, stream>>>(list);
    }
    return qv_k_check_launch("moe_route");
}

/* --- Weighted sum ------------------------------------------------------------------------- */

__device__ __forceinline__ int slice_of(const qv_k_slices &ranges, int64_t col)
{
    int slice = 0;
    while (col >= ranges.start[slice + 1])
        slice++;
    return slice;
}

/* The delta of B shared by all experts for column `col`: scale * sum over ranks of B[r] folded[r].
 */
__device__ __forceinline__ float shared_delta(const qv_k_moe_lora_site &site,
                                              const qv_k_moe_lora_slot &part, const float *folded,
                                              int64_t col)
{
    qv_k_lora_slice s = part.slices[slice_of(site.ranges, col)];
    const bf16 *b = (const bf16 *)part.b + col;
    const float *x1 = folded + s.plane * site.max_rank;
    float sum = 0;
    for (int r = 0; r < s.rank; r++)
        sum = fmaf(to_float(b[r * site.n_out]), x1[r], sum);
    return s.scale * sum;
}

/* The same for eight columns, sum += delta; the order of a column's sum is the same. */
__device__ __forceinline__ void shared_deltas(const qv_k_moe_lora_site &site,
                                              const qv_k_moe_lora_slot &part, const float *folded,
                                              int64_t col, float (&sum)[8])
{
    int slice = slice_of(site.ranges, col);
    if (col + 8 > site.ranges.start[slice + 1] || ((uintptr_t)part.b & 15)) {
        for (int i = 0; i < 8; i++)
            sum[i] += shared_delta(site, part, folded, col + i);
        return;
    }
    qv_k_lora_slice s = part.slices[slice];
    const bf16 *b = (const bf16 *)part.b + col;
    const float *x1 = folded + s.plane * site.max_rank;
    float delta[8] = {};
#pragma unroll 4
    for (int r = 0; r < s.rank; r++) {
        uint4 raw = *(const uint4 *)(b + r * site.n_out);
        const uint32_t v[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            delta[2 * i] = fmaf(bf16_low(v[i]), x1[r], delta[2 * i]);
            delta[2 * i + 1] = fmaf(bf16_high(v[i]), x1[r], delta[2 * i + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        sum[i] += s.scale * delta[i];
}

__device__ __forceinline__ void put(float *p, float v)
{
    *p = v;
}

__device__ __forceinline__ void put(bf16 *p, float v)
{
    *p = __float2bfloat16(v);
}

__device__ __forceinline__ void put8(float *p, const float (&v)[8])
{
    *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]);
    *(float4 *)(p + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

__device__ __forceinline__ void put8(bf16 *p, const float (&v)[8])
{
    *(bf16x8 *)p = pack8(v);
}

/* The adapter whose B all experts share, of a token that has such a one; else NULL. folded
 * [n_slices][max_rank] becomes the weighted sums of its A x. All threads of a block. */
__device__ __forceinline__ const qv_k_moe_lora_slot *
fold_shared(const qv_k_list &list, const qv_k_moe_lora_site &site, int64_t t, const float *w,
            const int32_t *place, const float *scratch, float *folded)
{
    const qv_k_moe_lora_slot *part = nullptr;
    if (site.slots && list.n_segs > 0) {
        int slot = list.seg_slot[range_of(list.seg_start, list.n_segs, (int)t)];
        if (slot >= 0 && site.slots[slot].a && site.slots[slot].b_shared)
            part = &site.slots[slot];
    }
    if (part) {
        int n = site.ranges.n * site.max_rank;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            int plane = i / site.max_rank, rank = 0;
            for (int s = 0; s < site.ranges.n; s++)
                if (part->slices[s].plane == plane)
                    rank = max(rank, part->slices[s].rank);
            float sum = 0;
            for (int j = 0; j < list.top_k && i % site.max_rank < rank; j++)
                if (place[j] >= 0)
                    sum = fmaf(w[j], scratch[(t * list.top_k + j) * n + i], sum);
            folded[i] = sum;
        }
        __syncthreads();
    }
    return part;
}

/* A block a token. */
template <typename Y>
__global__ void __launch_bounds__(256)
    combine_kernel(qv_k_list list, const float *weights, const bf16 *o, int64_t o_stride,
                   const __grid_constant__ qv_k_moe_lora_site site, const float *scratch,
                   qv_k_shared_rows shared, Y *y, int64_t y_stride, int64_t d, bool wide)
{
    extern __shared__ float folded[];
    int64_t t = blockIdx.x;
    const int32_t *place = list.place + t * list.top_k;
    const float *w = weights + t * list.top_k;
    const qv_k_moe_lora_slot *part = fold_shared(list, site, t, w, place, scratch, folded);
    const float *more = shared.data ? shared.data + t * shared.stride : nullptr;
    float gate = 1;
    if (shared.gate)
        gate = sigmoid(to_float(((const bf16 *)shared.gate)[t * shared.gate_stride]));
    if (wide) {
        for (int64_t col = threadIdx.x * 8; col < d; col += blockDim.x * 8) {
            float sum[8] = {};
            for (int j = 0; j < list.top_k; j++) {
                if (place[j] < 0)
                    continue;
                uint4 raw = *(const uint4 *)(o + place[j] * o_stride + col);
                const uint32_t v[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum[2 * i] = fmaf(w[j], bf16_low(v[i]), sum[2 * i]);
                    sum[2 * i + 1] = fmaf(w[j], bf16_high(v[i]), sum[2 * i + 1]);
                }
            }
            if (part)
                shared_deltas(site, *part, folded, col, sum);
            if (more) {
                float4 a = *(const float4 *)(more + col), b = *(const float4 *)(more + col + 4);
                const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
                for (int i = 0; i < 8; i++)
                    sum[i] += v[i] * gate;
            }
            put8(y + t * y_stride + col, sum);
        }
    } else {
        for (int64_t col = threadIdx.x; col < d; col += blockDim.x) {
            float sum = 0;
            for (int j = 0; j < list.top_k; j++)
                if (place[j] >= 0)
                    sum = fmaf(w[j], to_float(o[place[j] * o_stride + col]), sum);
            if (part)
                sum += shared_delta(site, *part, folded, col);
            if (more)
                sum += more[col] * gate;
            put(y + t * y_stride + col, sum);
        }
    }
}

/* --- Weighted sum, residual and norm ------------------------------------------------------ */

struct sum_args {
    qv_k_list list;
    const float *weights;
    const bf16 *o;
    int64_t o_stride;
    qv_k_moe_lora_site site;
    const float *scratch;
    qv_k_shared_rows shared;
    qv_k_add_norm_args norm; /* its delta is the sum, and is not stored */
};

constexpr int SUM_AHEAD = 8; /* rows whose loads fly together */

/* Eight columns of the weighted sum; the order is that of combine_kernel. FEW: places and weights
 * are asked for ahead of the first branch, behind which a load would wait; in prefill others wait
 * meanwhile, and registers count. */
template <bool FEW>
__device__ __forceinline__ void sum_rows(const sum_args &c, const int32_t *place, const float *w,
                                         int64_t col, float (&sum)[8])
{
    for (int first = 0; first < c.list.top_k; first += SUM_AHEAD) {
        bf16x8 rows[SUM_AHEAD];
        bool there[SUM_AHEAD];
        int at[FEW ? SUM_AHEAD : 1];
        float weight[FEW ? SUM_AHEAD : 1];
#pragma unroll
        for (int j = 0; FEW && j < SUM_AHEAD; j++) {
            bool in = first + j < c.list.top_k;
            at[j] = in ? place[first + j] : -1;
            weight[j] = in ? w[first + j] : 0;
        }
#pragma unroll
        for (int j = 0; j < SUM_AHEAD; j++) {
            there[j] = first + j < c.list.top_k && (FEW ? at[j] : place[first + j]) >= 0;
            if (there[j])
                rows[j] =
                    *(const bf16x8 *)(c.o + (FEW ? at[j] : place[first + j]) * c.o_stride + col);
        }
#pragma unroll
        for (int j = 0; j < SUM_AHEAD; j++) {
            if (!there[j])
                continue;
            float v[8];
            unpack8(rows[j], v);
#pragma unroll
            for (int i = 0; i < 8; i++)
                sum[i] = fmaf(FEW ? weight[j] : w[first + j], v[i], sum[i]);
        }
    }
}

/* Columns of Nano, a vector of 8 a thread. */
constexpr int WIDE_SUM_THREADS = 352;

/* A block a token. Bit for bit combine_kernel in float32 and then the norm of norm.cu. */
template <int NV, int THREADS, bool FEW>
__global__ void __launch_bounds__(THREADS, FEW                         ? 1
                                           : NV == 1 && THREADS == 256 ? 3
                                                                       : 2)
    sum_add_norm_kernel(const __grid_constant__ sum_args c)
{
    begin_add_norm<NV, THREADS>(c.norm);
    extern __shared__ float sum_folded[];
    __shared__ float shared[THREADS > 256 ? 256 : 8];
    int64_t t = blockIdx.x;
    const int32_t *place = c.list.place + t * c.list.top_k;
    const float *w = c.weights + t * c.list.top_k;
    float *residual = c.norm.residual + t * c.norm.residual_stride;
    const float *more = c.shared.data ? c.shared.data + t * c.shared.stride : nullptr;
    float gate = 1, v[NV][8];
    if (c.shared.gate)
        gate = sigmoid(to_float(((const bf16 *)c.shared.gate)[t * c.shared.gate_stride]));
    const qv_k_moe_lora_slot *part =
        fold_shared(c.list, c.site, t, w, place, c.scratch, sum_folded);
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (threadIdx.x + j * THREADS) * 8;
        if (i >= c.norm.d)
            continue;
        float sum[8] = {}, also[8] = {};
        load8(residual + i, v[j]);
        if (more)
            load8(more + i, also);
        sum_rows<FEW>(c, place, w, i, sum);
        if (part)
            shared_deltas(c.site, *part, sum_folded, i, sum);
        if (more) {
#pragma unroll
            for (int k = 0; k < 8; k++)
                sum[k] += also[k] * gate;
        }
#pragma unroll
        for (int k = 0; k < 8; k++)
            v[j][k] += sum[k];
        store8(residual + i, v[j]);
    }
    finish_add_norm<NV, THREADS>(c.norm, t, v, shared);
}

} // namespace

/* --- Launch ------------------------------------------------------------------------------- */

qv_status qv_k_router(const qv_k_router_args *args, void *stream)
{
    int warps = args->n_experts <= 1024 ? 4 : 1;
    if (args->n_experts > 4096 || args->n_groups > MAX_GROUPS)
        return qv_fail(QV_ERR_LIMIT, "router: %d experts in %d groups, but 4096 in %d are possible",
                       args->n_experts, args->n_groups, MAX_GROUPS);
    size_t bytes = (size_t)warps * 2 * args->n_experts * sizeof(float);
    bool ranks = args->n_groups == 1 && args->n_experts <= RANK_EXPERTS;
    if (ranks && (args->n_tokens <= 512 || args->one_form)) {
        router_rank_kernel<<<args->n_tokens, RANK_THREADS, rank_bytes(args->n_experts),
                             (cudaStream_t)stream>>>(*args);
        return qv_k_check_launch("router");
    }
    if (args->n_groups == 1 && args->n_experts <= 512 && args->top_k <= 32) {
        unsigned blocks = (unsigned)((args->n_tokens + 3) / 4);
        if (args->n_experts <= 128)
            router_warp_kernel<4><<<blocks, 128, 0, (cudaStream_t)stream>>>(*args);
        else if (args->n_experts <= 256)
            router_warp_kernel<8><<<blocks, 128, 0, (cudaStream_t)stream>>>(*args);
        else
            router_warp_kernel<16><<<blocks, 128, 0, (cudaStream_t)stream>>>(*args);
        return qv_k_check_launch("router");
    }
    router_kernel<<<(args->n_tokens + warps - 1) / warps, warps * 32, bytes,
                    (cudaStream_t)stream>>>(*args);
    return qv_k_check_launch("router");
}

qv_status qv_k_moe_route(const int32_t *ids, const qv_k_list *list, void *stream)
{
    cudaStream_t on = (cudaStream_t)stream;
    int64_t n_pairs = (int64_t)list->n_tokens * list->top_k;
    if (list->n_experts > MAX_EXPERTS)
        return qv_fail(QV_ERR_LIMIT, "moe_route: %d experts, but %d are possible", list->n_experts,
                       MAX_EXPERTS);
    if (n_pairs > ONE_BLOCK)
        return route_many(ids, *list, (int)n_pairs, on);
    int threads = list->n_experts <= 1024 ? 1024 : 256;
    while (threads > 128 && threads / 2 >= n_pairs)
        threads /= 2;
    size_t bytes =
        (size_t)list->n_experts * sizeof(int) + (size_t)(threads / 32) * list->n_experts * 2 + 4;
    if (cudaFuncSetAttribute(route_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)bytes) != cudaSuccess)
        return qv_k_check_launch("moe_route");
    route_kernel<<<1, threads, bytes, on>>>(ids, *list, (int)n_pairs);
    return qv_k_check_launch("moe_route");
}

qv_status qv_k_moe_combine(const qv_k_list *list, const float *weights, const void *o,
                           int64_t o_stride, const qv_k_moe_lora_site *site, const float *scratch,
                           const qv_k_shared_rows *shared, void *y, bool y_f32, int64_t y_stride,
                           int64_t d, void *stream)
{
    qv_k_moe_lora_site none = {};
    qv_k_shared_rows more = {};
    if (shared)
        more = *shared;
    size_t bytes = site ? (size_t)site->ranges.n * site->max_rank * sizeof(float) : 0;
    if (bytes > 48 * 1024)
        return qv_fail(QV_ERR_LIMIT, "moe_combine: %d slices of rank %d", site->ranges.n,
                       site->max_rank);
    bool wide = d % 8 == 0 && o_stride % 8 == 0 && y_stride % 8 == 0 && (uintptr_t)o % 16 == 0 &&
                (uintptr_t)y % 16 == 0 && (uintptr_t)more.data % 16 == 0 && more.stride % 4 == 0;
    int threads = wide && d / 8 < 256 ? (int)((d / 8 + 31) / 32 * 32) : 256;
    cudaStream_t on = (cudaStream_t)stream;
    if (y_f32)
        combine_kernel<float><<<list->n_tokens, threads, bytes, on>>>(
            *list, weights, (const bf16 *)o, o_stride, site ? *site : none, scratch, more,
            (float *)y, y_stride, d, wide);
    else
        combine_kernel<bf16><<<list->n_tokens, threads, bytes, on>>>(
            *list, weights, (const bf16 *)o, o_stride, site ? *site : none, scratch, more,
            (bf16 *)y, y_stride, d, wide);
    return qv_k_check_launch("moe_combine");
}

static bool sum_can(const qv_k_moe_sum_args *args)
{
    const qv_k_shared_rows *more = args->shared;
    return add_norm_vectors(args->norm) && args->o_stride % 8 == 0 &&
           (uintptr_t)args->o % 16 == 0 &&
           (more == nullptr || ((uintptr_t)more->data % 16 == 0 && more->stride % 4 == 0));
}

template <int NV, int THREADS>
static cudaError_t launch_sum(unsigned n_tokens, size_t bytes, void *stream, const sum_args &c)
{
    bool few = n_tokens <= EARLY_ROWS;
    return launch_early(
        few, few ? sum_add_norm_kernel<NV, THREADS, true> : sum_add_norm_kernel<NV, THREADS, false>,
        n_tokens, THREADS, bytes, stream, c);
}

qv_status qv_k_moe_sum_add_norm(const qv_k_moe_sum_args *args, void *stream)
{
    const qv_k_moe_lora_site *site = args->site;
    sum_args c = {
        *args->list, args->weights, (const bf16 *)args->o, args->o_stride, {}, args->scratch,
        {},          args->norm};
    unsigned n_tokens = (unsigned)args->list->n_tokens;
    cudaError_t error;
    size_t bytes = site ? (size_t)site->ranges.n * site->max_rank * sizeof(float) : 0;
    if (!sum_can(args) || bytes > 40 * 1024) {
        QV_TRY(qv_k_moe_combine(args->list, args->weights, args->o, args->o_stride, site,
                                args->scratch, args->shared, (float *)args->norm.delta, true,
                                args->norm.delta_stride, args->norm.d, stream));
        return qv_k_add_norm(&args->norm, stream);
    }
    if (site)
        c.site = *site;
    if (args->shared)
        c.shared = *args->shared;
    if (c.norm.d <= 2048)
        error = launch_sum<1, 256>(n_tokens, bytes, stream, c);
    else if (c.norm.d <= WIDE_SUM_THREADS * 8)
        error = launch_sum<1, WIDE_SUM_THREADS>(n_tokens, bytes, stream, c);
    else if (c.norm.d <= 4096)
        error = launch_sum<2, 256>(n_tokens, bytes, stream, c);
    else
        error = launch_sum<4, 256>(n_tokens, bytes, stream, c);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: moe_sum_add_norm: %s", cudaGetErrorString(error));
    return qv_k_check_launch("moe_sum_add_norm");
}
