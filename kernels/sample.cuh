/* What sampling kernels are made of: the scan of all rows, prefixes of the order by logit, draws.
 *
 * Probabilities are summed as whole numbers of 2^-40 of the likeliest one: such sums are exact, so
 * neither the order of atomics nor the number of threads changes a choice. Prefixes of the order by
 * logit (top-k, top-p, the alternatives) are found by histograms: first over the distance from the
 * maximum, which spreads logits evenly, then over the bits of the logits in the bin where the
 * prefix ends. Ties end by id: each warp owns a stretch of ids, so the rank of a tied logit is what
 * the warps before it counted plus what it has counted itself.
 */
#ifndef QV_KERNELS_SAMPLE_CUH
#define QV_KERNELS_SAMPLE_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_sample.h"

#include <float.h>

namespace
{

typedef unsigned long long mass; /* in units of 2^-40 */

constexpr int SCAN_THREADS = 256;
constexpr int CHUNK_LOGITS = 8192; /* of one block of the scan */
constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr int BINS = 2048;
constexpr int AHEAD = 16;   /* loads of a lane in flight */
constexpr int LIST = 16384; /* candidates of a row that are worth a list */

struct chunk_stats {
    float max, sum;       /* sum of exp(logit - max), all columns */
    float best;           /* over ids that may be chosen */
    int32_t best_id, bad; /* bad: something is not finite */
};

/* --- Scan --------------------------------------------------------------------------------- */

/* The greater, and the lower id among equals. */
__device__ __forceinline__ void keep_best(float &best, int &id, float other, int other_id)
{
    if (other > best || (other == best && other_id < id)) {
        best = other;
        id = other_id;
    }
}

__device__ __forceinline__ void warp_best(float &best, int &id)
{
#pragma unroll
    for (int i = 16; i > 0; i >>= 1)
        keep_best(best, id, __shfl_xor_sync(0xffffffffu, best, i),
                  __shfl_xor_sync(0xffffffffu, id, i));
}

__global__ void __launch_bounds__(SCAN_THREADS) scan_kernel(qv_k_sample_args c, chunk_stats *stats)
{
    __shared__ float maxima[8], sums[8], bests[8];
    __shared__ int ids[8];
    const float *row = c.logits + blockIdx.y * c.stride;
    int first = blockIdx.x * CHUNK_LOGITS, end = first + CHUNK_LOGITS;
    end = end < c.n_vocab ? end : c.n_vocab;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

    float v[CHUNK_LOGITS / SCAN_THREADS], max = -INFINITY, best = -INFINITY;
    int best_id = INT32_MAX, bad = 0;
#pragma unroll
    for (int i = 0; i < CHUNK_LOGITS / SCAN_THREADS; i++) {
        int at = first + i * SCAN_THREADS + threadIdx.x;
        v[i] = at < end ? row[at] : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < CHUNK_LOGITS / SCAN_THREADS; i++) {
        int at = first + i * SCAN_THREADS + threadIdx.x;
        bad |= at < end && !isfinite(v[i]);
        max = fmaxf(max, v[i]);
        if (at < c.n_valid && v[i] > best) {
            best = v[i];
            best_id = at;
        }
    }
    max = warp_max(max);
    warp_best(best, best_id);
    if (lane == 0) {
        maxima[warp] = max;
        bests[warp] = best;
        ids[warp] = best_id;
    }
    bad = __syncthreads_or(bad);
    for (int i = 0; i < 8; i++) {
        max = fmaxf(max, maxima[i]);
        keep_best(best, best_id, bests[i], ids[i]);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNK_LOGITS / SCAN_THREADS; i++)
        sum += expf(v[i] - max);
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0)
        stats[(int64_t)blockIdx.y * gridDim.x + blockIdx.x] = {max, sum, best, best_id, bad};
}

inline int count_chunks(int32_t n_vocab)
{
    return (n_vocab + CHUNK_LOGITS - 1) / CHUNK_LOGITS;
}

/* --- Prefixes of the order by logit --------------------------------------------------------- */

/* A logit as an unsigned number of the same order; -0 and 0 are equal. */
__device__ __forceinline__ uint32_t order_key(float x)
{
    uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* What is kept of a row: logits above a key, and the first `quota` that equal it, by id. */
struct cut {
    uint32_t key, quota;
};

struct row_state {
    const float *logit;
    int n; /* ids that may be chosen */
    float max, temperature;
    int begin, end; /* this warp's ids */
};

/* All of a block's shared memory. */
struct workspace {
    mass bin[BINS];
    mass of_warp[WARPS];
    uint32_t ties[WARPS]; /* logits equal to the cut's key with ids of warps before */
    float best[WARPS];
    int best_id[WARPS];
    mass rest;
    uint32_t found;
    int chosen, n_top;
    float top[QV_K_MAX_TOP];
    int top_id[QV_K_MAX_TOP];
    float ranked[QV_K_MAX_TOP];
    int ranked_id[QV_K_MAX_TOP];
};

__device__ __forceinline__ float probability(const row_state &r, float x)
{
    float z = x - r.max;
    return expf(r.temperature == 1.0f ? z : z / r.temperature);
}

__device__ __forceinline__ mass as_mass(float probability)
{
    return __float2ull_rn(probability * 1099511627776.0f);
}

__device__ __forceinline__ mass mass_of(const row_state &r, float x)
{
    return as_mass(probability(r, x));
}

/* Call f(id, logit) for all that the cut keeps, each warp for its ids in their order, 32 at a time;
 * `all` is called for every group of 32 with whether the lane's is kept, so that f may use
 * shuffles. */
template <typename F>
__device__ __forceinline__ void for_each(const row_state &r, const workspace &ws, cut k, F all)
{
    int lane = threadIdx.x & 31;
    uint32_t ties = ws.ties[threadIdx.x >> 5];
    for (int first = r.begin; first < r.end; first += 32 * AHEAD) {
        float v[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int id = first + i * 32 + lane;
            v[i] = id < r.end ? r.logit[id] : 0;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int id = first + i * 32 + lane;
            if (first + i * 32 >= r.end)
                break;
            uint32_t key = order_key(v[i]);
            bool tied = id < r.end && key == k.key;
            unsigned tied_lanes = __ballot_sync(0xffffffffu, tied);
            uint32_t rank = ties + __popc(tied_lanes & ((1u << lane) - 1));
            bool kept = id < r.end && (key > k.key || (tied && rank < k.quota));
            all(id, v[i], key, kept);
            ties += __popc(tied_lanes);
        }
    }
}

/* Where the running sum of the bins, from the first or from the last on, reaches ws.rest: ws.found,
 * and ws.rest becomes what that bin has to give. The last bin that holds anything if it is never
 * reached. All threads, two bins each. */
__device__ void find_bin(workspace &ws, bool from_top)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, place = 2 * (int)threadIdx.x;
    int first = from_top ? BINS - 1 - place : place, second = from_top ? first - 1 : first + 1;
    mass a = ws.bin[first], own = a + ws.bin[second], upto = own, rest = ws.rest;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        mass v = __shfl_up_sync(0xffffffffu, upto, i);
        upto += lane >= i ? v : 0;
    }
    if (lane == 31)
        ws.of_warp[warp] = upto;
    __syncthreads();
    mass before = upto - own, total = 0;
    for (int i = 0; i < WARPS; i++) {
        before += i < warp ? ws.of_warp[i] : 0;
        total += ws.of_warp[i];
    }
    rest = rest < 1 ? 1 : rest > total ? total : rest;
    if (before < rest && rest <= before + own) { /* one thread, if there is anything at all */
        bool in_first = rest <= before + a;
        ws.found = (uint32_t)(in_first ? first : second);
        ws.rest = rest - before - (in_first ? 0 : a);
    }
    if (total == 0 && threadIdx.x == 0) {
        ws.found = 0;
        ws.rest = 0;
    }
    __syncthreads();
}

__device__ __forceinline__ void clear_bins(workspace &ws)
{
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        ws.bin[i] = 0;
    __syncthreads();
}

/* How far a logit is below the maximum, as a bin: 64 a unit of temperature, all beyond 32 in one.
 */
__device__ __forceinline__ uint32_t depth_bin(const row_state &r, float x)
{
    float at = (r.max - x) / r.temperature * 64.0f;
    return at < (float)(BINS - 1) ? (uint32_t)at : BINS - 1;
}

/* The shortest prefix of what `k` keeps whose weights sum to at least `limit`; weights are masses
 * or ones. ws.ties fits the new cut afterwards. All threads. */
__device__ cut shorten(const row_state &r, workspace &ws, cut k, bool by_mass, mass limit)
{
    auto weight = [&](float x) { return by_mass ? mass_of(r, x) : (mass)1; };
    if (threadIdx.x == 0)
        ws.rest = limit;
    clear_bins(ws);
    for_each(r, ws, k, [&](int, float x, uint32_t, bool kept) {
        mass w = kept ? weight(x) : 0;
        if (w > 0)
            atomicAdd(&ws.bin[depth_bin(r, x)], w);
    });
    __syncthreads();
    find_bin(ws, false);
    uint32_t depth = ws.found, key = 0, mask = 0;
    for (int shift = 21; shift >= -1; shift -= 11) { /* 11, 11 and 10 bits */
        int by = shift < 0 ? 0 : shift;
        uint32_t digits = shift < 0 ? 1023 : BINS - 1;
        clear_bins(ws);
        for_each(r, ws, k, [&](int, float x, uint32_t own, bool kept) {
            if (kept && depth_bin(r, x) == depth && (own & mask) == key) {
                mass w = weight(x);
                if (w > 0)
                    atomicAdd(&ws.bin[own >> by & digits], w);
            }
        });
        __syncthreads();
        find_bin(ws, true);
        key |= ws.found << by;
        mask |= digits << by;
    }
    /* How many of the equal ones are needed; each has the same weight. */
    float x = __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
    mass each = weight(x), needed = each > 0 ? (ws.rest + each - 1) / each : 1;
    uint32_t quota = needed < 1 ? 1 : needed < UINT32_MAX ? (uint32_t)needed : UINT32_MAX;
    if (key == k.key && quota > k.quota)
        quota = k.quota;

    uint32_t own = 0;
    for (int id = r.begin + (threadIdx.x & 31); id < r.end; id += 32)
        own += order_key(r.logit[id]) == key;
    own = __reduce_add_sync(0xffffffffu, own);
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        ws.ties[threadIdx.x >> 5] = own;
    __syncthreads();
    uint32_t before = 0;
    for (int i = 0; i < (int)(threadIdx.x >> 5); i++)
        before += ws.ties[i];
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        ws.ties[threadIdx.x >> 5] = before;
    __syncthreads();
    return {key, quota};
}

__device__ __forceinline__ cut keep_all(workspace &ws)
{
    __syncthreads();
    if (threadIdx.x < WARPS)
        ws.ties[threadIdx.x] = 0;
    __syncthreads();
    return {0, UINT32_MAX};
}

/* The mass of what is kept and has at least `min_p` of the likeliest; of_warp has each warp's. */
__device__ mass kept_mass(const row_state &r, workspace &ws, cut k, float min_p)
{
    mass own = 0;
    for_each(r, ws, k, [&](int, float x, uint32_t, bool kept) {
        float p = kept ? probability(r, x) : -1.0f;
        own += p >= min_p ? as_mass(p) : 0;
    });
#pragma unroll
    for (int i = 16; i > 0; i >>= 1)
        own += __shfl_xor_sync(0xffffffffu, own, i);
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        ws.of_warp[threadIdx.x >> 5] = own;
    __syncthreads();
    mass total = 0;
    for (int i = 0; i < WARPS; i++)
        total += ws.of_warp[i];
    return total;
}

/* --- A row -------------------------------------------------------------------------------- */

__device__ __forceinline__ mass warp_mass(mass x)
{
#pragma unroll
    for (int i = 16; i > 0; i >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

/* In the order of ids. */
struct candidates {
    float logit[LIST];
    int id[LIST];
};

/* How far below the maximum candidates are looked for, in units of temperature: the first of these
 * with enough of them wins. */
constexpr int N_DEPTHS = 4;
__constant__ float depths[N_DEPTHS] = {8, 11, 14, 20};

/* Candidates for what top-k or top-p will keep: the nearest few of the most likely one nearly
 * always do. True when they do and fit in `list`; r is then the list. *whole is the mass of the
 * row, if top-p alone asks for it. */
__device__ bool gather(row_state &r, workspace &ws, const qv_k_sample_row &p, candidates *list,
                       mass *whole)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    bool by_k = p.top_k > 0 && p.top_k < r.n;
    uint32_t count[N_DEPTHS] = {};
    mass upto[N_DEPTHS] = {}, all = 0;
    for_each(r, ws, {0, UINT32_MAX}, [&](int, float x, uint32_t, bool kept) {
        float depth = kept ? (r.max - x) / r.temperature : INFINITY;
        mass m = kept && !by_k ? mass_of(r, x) : 0;
        all += m;
#pragma unroll
        for (int j = 0; j < N_DEPTHS; j++) {
            count[j] += depth <= depths[j];
            upto[j] += depth <= depths[j] ? m : 0;
        }
    });
    /* The bins are free: numbers of each warp. */
    __syncthreads();
#pragma unroll
    for (int j = 0; j < N_DEPTHS; j++) {
        count[j] = __reduce_add_sync(0xffffffffu, count[j]);
        mass m = warp_mass(upto[j]);
        if (lane == 0) {
            ws.bin[j * WARPS + warp] = count[j];
            ws.bin[(N_DEPTHS + j) * WARPS + warp] = m;
        }
    }
    all = warp_mass(all);
    if (lane == 0)
        ws.bin[2 * N_DEPTHS * WARPS + warp] = all;
    __syncthreads();
    auto sum = [&](int row) {
        mass total = 0;
        for (int i = 0; i < WARPS; i++)
            total += ws.bin[row * WARPS + i];
        return total;
    };
    *whole = sum(2 * N_DEPTHS);
    double limit = (double)p.top_p * (double)*whole;
    int chosen = 0;
    while (chosen < N_DEPTHS &&
           (by_k ? sum(chosen) < (mass)p.top_k : (double)sum(N_DEPTHS + chosen) < limit))
        chosen++;
    if (chosen == N_DEPTHS || list == nullptr || sum(chosen) > LIST)
        return false;
    float depth = depths[chosen];
    mass n_candidates = sum(chosen);
    uint32_t at = 0;
    for (int i = 0; i < warp; i++)
        at += (uint32_t)ws.bin[chosen * WARPS + i];
    for_each(r, ws, {0, UINT32_MAX}, [&](int id, float x, uint32_t, bool kept) {
        bool in = kept && (r.max - x) / r.temperature <= depth;
        unsigned lanes = __ballot_sync(0xffffffffu, in);
        if (in) {
            uint32_t place = at + __popc(lanes & ((1u << lane) - 1));
            list->logit[place] = x;
            list->id[place] = id;
        }
        at += __popc(lanes);
    });
    __syncthreads();
    int n = (int)n_candidates, per_warp = ((n + WARPS - 1) / WARPS + 31) / 32 * 32;
    r.logit = list->logit;
    r.n = n;
    r.begin = warp * per_warp < n ? warp * per_warp : n;
    r.end = r.begin + per_warp < n ? r.begin + per_warp : n;
    return true;
}

/* The first of r's ids, in their order, at which the running sum of what is kept exceeds `target`;
 * -1: it never does. ws.of_warp has each warp's part of the sum, as kept_mass leaves it. */
__device__ int pick(const row_state &r, workspace &ws, cut k, float min_p, mass target)
{
    mass before = 0;
    for (int i = 0; i < (int)(threadIdx.x >> 5); i++)
        before += ws.of_warp[i];
    if (threadIdx.x == 0)
        ws.chosen = -1;
    __syncthreads();
    bool mine = before <= target && target < before + ws.of_warp[threadIdx.x >> 5];
    if (mine) { /* this warp alone; the others have nothing to do */
        int lane = threadIdx.x & 31;
        bool done = false;
        for_each(r, ws, k, [&](int id, float x, uint32_t, bool kept) {
            float probable = kept ? probability(r, x) : -1.0f;
            mass upto = probable >= min_p ? as_mass(probable) : 0;
#pragma unroll
            for (int i = 1; i < 32; i *= 2) {
                mass v = __shfl_up_sync(0xffffffffu, upto, i);
                upto += lane >= i ? v : 0;
            }
            unsigned past = __ballot_sync(0xffffffffu, before + upto > target);
            if (past && !done) {
                if (lane == __ffs(past) - 1)
                    ws.chosen = id;
                done = true;
            }
            before += __shfl_sync(0xffffffffu, upto, 31);
        });
    }
    __syncthreads();
    return ws.chosen;
}

/* A token of what `k` and then top-k and top-p keep of a row, or of its list. `whole` is the mass
 * of the row, if top-p alone asks for it. */
__device__ int draw_from(const row_state &r, workspace &ws, const qv_k_sample_row &p, cut k,
                         bool cut_k, bool cut_p, mass whole, const candidates *list)
{
    if (cut_k)
        k = shorten(r, ws, k, false, (mass)p.top_k);
    if (cut_p) {
        mass left = cut_k ? kept_mass(r, ws, k, 0.0f) : whole;
        k = shorten(r, ws, k, true, (mass)((double)p.top_p * (double)left));
    }
    float min_p = p.min_p < 1.0f ? p.min_p : 1.0f;
    mass total = kept_mass(r, ws, k, min_p);
    int at = pick(r, ws, k, min_p, (mass)(p.u * (double)total));
    return at < 0 ? 0 : list != nullptr ? list->id[at] : at;
}

__device__ int draw(row_state r, workspace &ws, const qv_k_sample_row &p, candidates *list)
{
    cut k = keep_all(ws);
    bool cut_k = p.top_k > 0 && p.top_k < r.n, cut_p = p.top_p < 1.0f, listed = false;
    mass whole = 0;
    if (cut_k || cut_p)
        listed = gather(r, ws, p, list, &whole);
    return draw_from(r, ws, p, k, cut_k, cut_p, whole, listed ? list : nullptr);
}

/* The n highest logits and their ids, highest first, lowest id first among equals, into ws.ranked.
 * Returns how many there are; ends with a barrier. */
__device__ int find_top(const row_state &r, workspace &ws, int n)
{
    n = n < r.n ? n : r.n;
    if (n == 0)
        return 0;
    cut k = shorten(r, ws, keep_all(ws), false, (mass)n);
    if (threadIdx.x == 0)
        ws.n_top = 0;
    __syncthreads();
    for_each(r, ws, k, [&](int id, float x, uint32_t, bool kept) {
        if (kept) {
            int at = atomicAdd(&ws.n_top, 1); /* in any order: sorted below */
            if (at < QV_K_MAX_TOP) {
                ws.top[at] = x;
                ws.top_id[at] = id;
            }
        }
    });
    __syncthreads();
    if (threadIdx.x < (unsigned)n) {
        float x = ws.top[threadIdx.x];
        int id = ws.top_id[threadIdx.x], rank = 0;
        for (int i = 0; i < n; i++)
            rank += ws.top[i] > x || (ws.top[i] == x && ws.top_id[i] < id);
        ws.ranked[rank] = x;
        ws.ranked_id[rank] = id;
    }
    __syncthreads();
    return n;
}

/* The row's chunks joined: the maximum over all columns, the logarithm of the sum of exponentials,
 * the best id; false when something is not finite. */
struct joined {
    float max, best;
    int32_t best_id;
    double sum; /* of exp(logit - max) */
};

__device__ __forceinline__ bool join_chunks(const chunk_stats *stats, int n_chunks, joined &j)
{
    int bad = 0;
    j = {-INFINITY, -INFINITY, INT32_MAX, 0};
    for (int i = 0; i < n_chunks; i++) {
        j.max = fmaxf(j.max, stats[i].max);
        bad |= stats[i].bad;
        keep_best(j.best, j.best_id, stats[i].best, stats[i].best_id);
    }
    if (bad)
        return false;
    for (int i = 0; i < n_chunks; i++)
        j.sum += (double)stats[i].sum * exp((double)stats[i].max - (double)j.max);
    return true;
}

/* Each warp its part of n ids, whole groups of 32. */
__device__ __forceinline__ void share_out(row_state &r, int n)
{
    int warp = threadIdx.x >> 5, per_warp = ((n + WARPS - 1) / WARPS + 31) / 32 * 32;
    r.n = n;
    r.begin = warp * per_warp < n ? warp * per_warp : n;
    r.end = r.begin + per_warp < n ? r.begin + per_warp : n;
}

__device__ __forceinline__ float penalise(float x, const qv_k_sample_row &p, int count)
{
    x = x > 0 ? x / p.repetition_penalty : x * p.repetition_penalty;
    x -= p.frequency_penalty * (float)count;
    x -= count > 0 ? p.presence_penalty : 0.0f;
    return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
}

/* Penalties and banned ids change the row, and with it the best. All threads. */
__device__ void change_row(const qv_k_sample_args &c, const qv_k_sample_row &p, float *logit,
                           const row_state &r, workspace &ws, float &best, int32_t &best_id)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    __syncthreads();
    qv_k_sample_seen *seen = c.seen + p.seen;
    for (int i = threadIdx.x; i < p.n_seen; i += THREADS) {
        float x = logit[seen[i].token];
        seen[i].raw = x;
        logit[seen[i].token] = penalise(x, p, seen[i].count);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.n_banned; i += THREADS)
        logit[c.banned[p.banned + i]] = -INFINITY;
    __syncthreads();
    if (p.n_seen == 0 && p.n_banned == 0)
        return;
    best = -INFINITY;
    best_id = INT32_MAX;
    for (int i = r.begin + lane; i < r.end; i += 32)
        keep_best(best, best_id, logit[i], i);
    warp_best(best, best_id);
    if (lane == 0) {
        ws.best[warp] = best;
        ws.best_id[warp] = best_id;
    }
    __syncthreads();
    for (int i = 0; i < WARPS; i++)
        keep_best(best, best_id, ws.best[i], ws.best_id[i]);
}

} // namespace

#endif
