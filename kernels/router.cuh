/* What the kernels of moe.cu and choose.cu share: the order of experts, groups of them, and who is
 * where in a list.
 */
#ifndef QV_KERNELS_ROUTER_CUH
#define QV_KERNELS_ROUTER_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_moe.h"

namespace
{

constexpr int MAX_GROUPS = 256;
constexpr int RANK_EXPERTS = 1024; /* of choose_by_rank */
constexpr unsigned ALL = 0xffffffffu;

/* Whether logits stand for scores in the choice, as ops/ops.h has it. */
__device__ __forceinline__ bool by_logit(const qv_k_router_args &c)
{
    return !c.sigmoid && c.bias == nullptr && c.n_groups == 1;
}

/* --- One expert after the other ----------------------------------------------------------- */

struct best {
    float value;
    int id;
};

/* The higher value, the lower id among equals. */
__device__ __forceinline__ best better(best a, best b)
{
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ __forceinline__ best warp_best(best b)
{
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) {
        best other = {__shfl_xor_sync(ALL, b.value, i), __shfl_xor_sync(ALL, b.id, i)};
        b = better(b, other);
    }
    return b;
}

/* The lane's best of values[lane], values[lane + 32], ..; what has been taken is NaN and never
 * wins. */
__device__ __forceinline__ best lane_best(const float *values, int n)
{
    best b = {-INFINITY, INT32_MAX};
    for (int i = threadIdx.x & 31; i < n; i += 32) {
        best other = {values[i], i};
        b = better(b, other);
    }
    return b;
}

/* The sum of the two highest of a group. */
__device__ float best_two(const float *value, int n)
{
    float first = value[0], second = n > 1 ? -INFINITY : 0.0f;
    for (int i = 1; i < n; i++) {
        if (value[i] > first) {
            second = first;
            first = value[i];
        } else if (value[i] > second) {
            second = value[i];
        }
    }
    return first + second;
}

/* All but the best topk_groups groups become NaN. One warp. */
__device__ void keep_groups(const qv_k_router_args &c, float *value, float *group)
{
    int lane = threadIdx.x & 31, n_each = c.n_experts / c.n_groups;
    for (int i = lane; i < c.n_groups; i += 32) {
        float sum = best_two(value + i * n_each, n_each);
        group[i] = sum == sum ? sum : -INFINITY;
    }
    __syncwarp();
    for (int j = 0; j < c.topk_groups; j++) {
        best b = warp_best(lane_best(group, c.n_groups));
        if (lane == 0)
            group[b.id] = NAN; /* chosen */
        __syncwarp();
    }
    for (int i = lane; i < c.n_experts; i += 32)
        if (group[i / n_each] == group[i / n_each])
            value[i] = NAN;
    __syncwarp();
}

/* --- All experts at once ------------------------------------------------------------------ */

struct rank_shared {
    float chosen[RANK_EXPERTS], groups[MAX_GROUPS];
};

/* Of dynamic shared memory: values, padded with NaN; scores. */
__host__ __device__ constexpr size_t rank_bytes(int n_experts)
{
    return 2 * (size_t)(n_experts + 3) * sizeof(float);
}

/* The choice of token t by a block of THREADS threads: an expert's place in the order is the number
 * of experts before it, counted by all at once instead of choosing one after the other; SPLIT lanes
 * count for an expert. Bit for bit what choosing one after the other gives. */
template <int THREADS, int SPLIT>
__device__ __forceinline__ void choose_by_rank(const qv_k_router_args &c, int64_t t, float *memory,
                                               rank_shared &m)
{
    int thread = threadIdx.x, lane = thread & 31, n = c.n_experts, padded = (n + 3) & ~3;
    float *value = memory, *score = value + padded;
    const float *logits = c.logits + t * c.logits_stride;
    float most = -INFINITY, sum = 0;
    if (!c.sigmoid) { /* each warp by itself */
        for (int i = lane; i < n; i += 32)
            most = fmaxf(most, logits[i]);
#pragma unroll
        for (int i = 16; i > 0; i >>= 1)
            most = fmaxf(most, __shfl_xor_sync(ALL, most, i));
        for (int i = lane; i < n; i += 32)
            sum += expf(logits[i] - most);
        sum = warp_sum(sum);
    }
    for (int i = thread; i < padded; i += THREADS) {
        float s = i >= n ? NAN : c.sigmoid ? sigmoid(logits[i]) : expf(logits[i] - most) / sum;
        float v = i >= n ? NAN : by_logit(c) ? logits[i] : s + (c.bias ? c.bias[i] : 0.0f);
        score[i] = s;
        value[i] = i < n && v != v ? -INFINITY : v;
    }
    __syncthreads();
    if (c.n_groups > 1) {
        if (thread < 32)
            keep_groups(c, value, m.groups);
        __syncthreads();
    }
    for (int first = 0; first < n; first += THREADS / SPLIT) {
        int i = first + thread / SPLIT, before = 0;
        float mine = i < n ? value[i] : NAN; /* as is what may not be chosen */
        for (int j = thread % SPLIT * 4; j < padded; j += 4 * SPLIT) {
            float4 v = *(const float4 *)(value + j);
            before += v.x > mine || (v.x == mine && j < i);
            before += v.y > mine || (v.y == mine && j + 1 < i);
            before += v.z > mine || (v.z == mine && j + 2 < i);
            before += v.w > mine || (v.w == mine && j + 3 < i);
        }
#pragma unroll
        for (int j = SPLIT / 2; j > 0; j >>= 1)
            before += __shfl_xor_sync(ALL, before, j);
        if (mine == mine && before < c.top_k && thread % SPLIT == 0) {
            c.ids[t * c.top_k + before] = i;
            m.chosen[before] = score[i];
        }
    }
    __syncthreads();
    float total = 0;
    for (int j = 0; j < c.top_k; j++)
        total += m.chosen[j];
    if (c.sigmoid)
        total += 1e-20f;
    for (int j = thread; j < c.top_k; j += THREADS)
        c.weights[t * c.top_k + j] = (c.normalize ? m.chosen[j] / total : m.chosen[j]) * c.scale;
}

/* --- In registers ------------------------------------------------------------------------- */

/* A float's place in the order of floats, above 0, which is that of what was taken. */
__device__ __forceinline__ uint32_t order_of(float x)
{
    uint32_t u = __float_as_uint(x + 0.0f); /* one zero */
    return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}

/* Numbers lane, lane + 32, .. of a row; -inf behind its end. */
template <int PER>
__device__ __forceinline__ void load_lane(const float *row, int n, float (&v)[PER])
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < PER; j++)
        v[j] = lane + 32 * j < n ? row[lane + 32 * j] : -INFINITY;
}

/* Logits to scores. */
template <int PER>
__device__ __forceinline__ void score_lane(const qv_k_router_args &c, float (&score)[PER])
{
    int lane = threadIdx.x & 31, n = c.n_experts;
    float most = -INFINITY, sum = 0;
    if (c.sigmoid) {
#pragma unroll
        for (int j = 0; j < PER; j++)
            score[j] = sigmoid(score[j]);
        return;
    }
#pragma unroll
    for (int j = 0; j < PER; j++)
        most = fmaxf(most, score[j]);
    most = warp_max(most);
#pragma unroll
    for (int j = 0; j < PER; j++) {
        if (lane + 32 * j >= n)
            continue;
        score[j] = expf(score[j] - most);
        sum += score[j];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < PER; j++)
        score[j] /= sum;
}

/* Their places in the order of the choice; 0: taken, or no expert. */
template <int PER>
__device__ __forceinline__ void order_lane(const qv_k_router_args &c, const float (&v)[PER],
                                           uint32_t (&order)[PER])
{
    int lane = threadIdx.x & 31, n = c.n_experts;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        int i = lane + 32 * j;
        float of = v[j];
        if (c.bias && i < n)
            of += c.bias[i];
        order[j] = i < n ? order_of(of == of ? of : -INFINITY) : 0;
    }
}

/* The first of those left, which is taken. */
template <int PER> __device__ __forceinline__ int take_first(uint32_t (&order)[PER])
{
    int lane = threadIdx.x & 31;
    uint32_t mine = 0, mine_at = UINT32_MAX;
#pragma unroll
    for (int j = 0; j < PER; j++)
        mine = max(mine, order[j]);
    uint32_t top = __reduce_max_sync(ALL, mine);
#pragma unroll
    for (int j = PER - 1; j >= 0; j--)
        mine_at = order[j] == top ? (uint32_t)(lane + 32 * j) : mine_at;
    int chosen = (int)__reduce_min_sync(ALL, mine_at);
#pragma unroll
    for (int j = 0; j < PER; j++)
        order[j] = chosen - lane == 32 * j ? 0 : order[j];
    return chosen;
}

/* Of lane k: the expert chosen as number k, and its weight. */
struct warp_choice {
    int id;
    float weight;
};

/* The choice of a token by a warp, without groups, up to 32 PER experts and 32 chosen. Bit for bit
 * choose_by_rank. */
template <int PER>
__device__ __forceinline__ warp_choice choose_by_warp(const qv_k_router_args &c,
                                                      const float *logits)
{
    int lane = threadIdx.x & 31;
    const bool by = by_logit(c);
    float score[PER], value[PER];
    uint32_t order[PER];
    load_lane(logits, c.n_experts, value);
#pragma unroll
    for (int j = 0; j < PER; j++)
        score[j] = value[j];
    score_lane(c, score);
#pragma unroll
    for (int j = 0; j < PER; j++)
        value[j] = by ? value[j] : score[j];
    order_lane(c, value, order);
    int id = 0; /* of lane k: the expert chosen as number k */
#pragma unroll 1
    for (int k = 0; k < c.top_k; k++) {
        int chosen = take_first(order);
        id = lane == k ? chosen : id;
    }
    float weight = 0, total = 0;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        float other = __shfl_sync(ALL, score[j], id & 31);
        weight = id >> 5 == j ? other : weight;
    }
#pragma unroll 1
    for (int k = 0; k < c.top_k; k++)
        total += __shfl_sync(ALL, weight, k);
    if (c.sigmoid)
        total += 1e-20f;
    return {id, (c.normalize ? weight / total : weight) * c.scale};
}

/* --- Lists -------------------------------------------------------------------------------- */

/* Of a chosen one; -1: it lives elsewhere. */
__device__ __forceinline__ int expert_here(const qv_k_list &list, int id)
{
    int e = id - list.first_expert;
    return e >= 0 && e < list.n_experts ? e : -1;
}

__device__ __forceinline__ int expert_of(const int32_t *ids, const qv_k_list &list, int n_pairs,
                                         int p)
{
    return p < n_pairs ? expert_here(list, ids[p]) : -1;
}

/* Adapter of a pair. */
__device__ __forceinline__ int slot_of_pair(const qv_k_list &list, int pair)
{
    return list.seg_slot[range_of(list.seg_start, list.n_segs, pair / list.top_k)];
}

/* Pair p of one token: each expert has a pair at most. e -1: it lives elsewhere; slot: of the
 * token's adapter, -1: none. */
__device__ __forceinline__ void list_pair(const qv_k_list &list, int p, int e, int place, int slot)
{
    list.place[p] = e >= 0 ? place : -1;
    if (e < 0)
        return;
    list.pair[place] = p;
    list.work[2 + 2 * place] = place << QV_K_MOE_EXPERT_BITS | e;
    list.work[3 + 2 * place] = place;
    if (slot >= 0)
        list.runs[place] = {place, 1, e, slot};
}

/* And how many of them are here. One thread. */
__device__ __forceinline__ void list_counts(const qv_k_list &list, int n, int slot)
{
    list.work[0] = list.work[1] = n;
    *list.n_runs = slot >= 0 ? n : 0;
    *list.next_item = 0;
}

/* --- What comes next ---------------------------------------------------------------------- */

constexpr int AHEAD_PIECE = 16 << 10;

/* Bytes on their way to the L2 cache: blocks take pieces in turn, each thread one. */
__device__ __forceinline__ void call_ahead(const qv_k_ahead &ahead, int block, int n_blocks)
{
    int64_t at = ((int64_t)threadIdx.x * n_blocks + block) * AHEAD_PIECE;
    for (int i = 0; i < 2; i++)
        if (at < ahead.bytes[i])
            prefetch_to_stay((const char *)ahead.data[i] + at,
                             (uint32_t)min((int64_t)AHEAD_PIECE, ahead.bytes[i] - at));
}

} // namespace

#endif
