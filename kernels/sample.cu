/* Sampling, a row by several blocks, chunk by chunk:
 *
 *   scan_kernel     all chunks: maximum, sum of exponentials, best, whether all is finite
 *   spread_kernel   all chunks of rows that are drawn: how many logits are how far below the best,
 *                   and their mass
 *   collect_kernel  all chunks of rows with top-k or top-p: those that are near enough, into a list
 *   choose_kernel   a block a row: goes on with the list, or with the chunk in which the draw ends
 *
 * A greedy row needs nothing but the scan, which reads 4 n_vocab bytes once; the others read from
 * the L2 cache. Masses are whole numbers, so sums over chunks are what one block would have had.
 * Rows whose logits penalties or bans change, and those that no list is long enough for, are left
 * to one block, as are alternatives: that one reads its row two or three times, some eighty
 * instructions for each 32 of its logits, 90 us a pass over 248320. What chunks have found is
 * joined by threads side by side: in double precision, where every thread for itself took some
 * microseconds.
 */
#include "kernels/sample.cuh"

namespace
{

/* --- Scratch ------------------------------------------------------------------------------ */

/* Of a chunk: how many logits are within each depth of the row's best, their mass, and that of all.
 */
struct chunk_spread {
    mass upto[N_DEPTHS], all;
    uint32_t count[N_DEPTHS];
};

/* Lists, then of each row and chunk its spread, then what the scan found. */
struct scratch_parts {
    candidates *lists;
    chunk_stats *stats;
    chunk_spread *spread;
};

inline scratch_parts parts_of(const qv_k_sample_args &c)
{
    size_t n = (size_t)c.n_rows * (size_t)count_chunks(c.n_vocab);
    candidates *lists = (candidates *)c.scratch;
    chunk_spread *spread = (chunk_spread *)(lists + c.n_lists);
    return {lists, (chunk_stats *)(spread + n), spread};
}

/* --- What is to be done with a row ---------------------------------------------------------- */

enum row_way {
    ALONE,
    LISTED,
    PLAIN
}; /* by one block; from a list; all logits, one after another */

__device__ __forceinline__ row_way way_of(const qv_k_sample_row &p, int n_valid)
{
    if (p.target >= 0 || !(p.temperature > 0) || p.n_seen > 0 || p.n_banned > 0)
        return ALONE;
    if ((p.top_k > 0 && p.top_k < n_valid) || p.top_p < 1.0f)
        return p.list >= 0 ? LISTED : ALONE;
    return PLAIN;
}

__device__ __forceinline__ bool cuts_by_k(const qv_k_sample_row &p, int n_valid)
{
    return p.top_k > 0 && p.top_k < n_valid;
}

__device__ __forceinline__ float least_of(const qv_k_sample_row &p)
{
    return p.min_p < 1.0f ? p.min_p : 1.0f;
}

/* The row's best logit; every warp for itself. */
__device__ __forceinline__ float find_best(const chunk_stats *stats, int n_chunks)
{
    float best = -INFINITY;
    for (int i = threadIdx.x & 31; i < n_chunks; i += 32)
        best = fmaxf(best, stats[i].best);
    return warp_max(best);
}

__device__ __forceinline__ float depth_of(const row_state &r, float x)
{
    return (r.max - x) / r.temperature;
}

/* --- Spread ------------------------------------------------------------------------------- */

constexpr int SCAN_WARPS = SCAN_THREADS / 32;
constexpr int EACH = CHUNK_LOGITS / SCAN_THREADS; /* logits of a thread */

__global__ void __launch_bounds__(SCAN_THREADS)
    spread_kernel(qv_k_sample_args c, const chunk_stats *all_stats, chunk_spread *all_spread)
{
    __shared__ chunk_spread of_warp[SCAN_WARPS];
    int n_chunks = gridDim.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const qv_k_sample_row p = c.rows[blockIdx.y];
    row_way way = way_of(p, c.n_valid);
    if (way == ALONE)
        return;
    const float *row = c.logits + blockIdx.y * c.stride;
    int first = blockIdx.x * CHUNK_LOGITS;
    float v[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int at = first + i * SCAN_THREADS + threadIdx.x;
        v[i] = at < c.n_valid ? row[at] : 0;
    }
    float best = find_best(all_stats + (int64_t)blockIdx.y * n_chunks, n_chunks);
    row_state r = {row, c.n_valid, best, p.temperature, 0, 0};
    bool by_mass = !cuts_by_k(p, c.n_valid);
    float min_p = way == PLAIN ? least_of(p) : 0.0f;
    chunk_spread own = {};
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        bool there = first + i * SCAN_THREADS + (int)threadIdx.x < c.n_valid;
        float probable = there && by_mass ? probability(r, v[i]) : -1.0f;
        mass m = probable >= min_p ? as_mass(probable) : 0;
        float depth = there ? depth_of(r, v[i]) : INFINITY;
        own.all += m;
#pragma unroll
        for (int j = 0; j < N_DEPTHS; j++) {
            own.count[j] += depth <= depths[j];
            own.upto[j] += depth <= depths[j] ? m : 0;
        }
    }
    own.all = warp_mass(own.all);
#pragma unroll
    for (int j = 0; j < N_DEPTHS; j++) {
        own.count[j] = __reduce_add_sync(0xffffffffu, own.count[j]);
        own.upto[j] = warp_mass(own.upto[j]);
    }
    if (lane == 0)
        of_warp[warp] = own;
    __syncthreads();
    if (threadIdx.x > 0)
        return;
    for (int i = 1; i < SCAN_WARPS; i++) {
        own.all += of_warp[i].all;
        for (int j = 0; j < N_DEPTHS; j++) {
            own.count[j] += of_warp[i].count[j];
            own.upto[j] += of_warp[i].upto[j];
        }
    }
    all_spread[(int64_t)blockIdx.y * n_chunks + blockIdx.x] = own;
}

/* --- Lists -------------------------------------------------------------------------------- */

/* How deep a row's list goes, -1 if there is none; how long it is, and the mass of the row. */
struct list_plan {
    int depth;
    uint32_t n;
    mass whole;
};

/* Every warp for itself. */
__device__ list_plan plan_list(const qv_k_sample_row &p, int n_valid, const chunk_spread *spread,
                               int n_chunks)
{
    uint32_t count[N_DEPTHS] = {};
    mass upto[N_DEPTHS] = {}, whole = 0;
    for (int i = threadIdx.x & 31; i < n_chunks; i += 32) {
        whole += spread[i].all;
#pragma unroll
        for (int j = 0; j < N_DEPTHS; j++) {
            count[j] += spread[i].count[j];
            upto[j] += spread[i].upto[j];
        }
    }
    whole = warp_mass(whole);
    double limit = (double)p.top_p * (double)whole;
    list_plan plan = {-1, 0, whole};
#pragma unroll
    for (int j = N_DEPTHS - 1; j >= 0; j--) { /* the least deep that has enough */
        uint32_t n = __reduce_add_sync(0xffffffffu, count[j]);
        mass m = warp_mass(upto[j]);
        bool enough = cuts_by_k(p, n_valid) ? n >= (uint32_t)p.top_k : (double)m >= limit;
        if (enough) {
            plan.depth = j;
            plan.n = n;
        }
    }
    if (plan.n > LIST)
        plan.depth = -1;
    return plan;
}

__global__ void __launch_bounds__(SCAN_THREADS)
    collect_kernel(qv_k_sample_args c, const chunk_stats *all_stats, const chunk_spread *all_spread,
                   candidates *lists)
{
    __shared__ uint32_t of_warp[SCAN_WARPS];
    int n_chunks = gridDim.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const qv_k_sample_row p = c.rows[blockIdx.y];
    if (way_of(p, c.n_valid) != LISTED)
        return;
    const chunk_spread *spread = all_spread + (int64_t)blockIdx.y * n_chunks;
    list_plan plan = plan_list(p, c.n_valid, spread, n_chunks);
    if (plan.depth < 0 || spread[blockIdx.x].count[plan.depth] == 0)
        return;
    uint32_t before = 0; /* candidates of earlier chunks */
    for (int i = lane; i < (int)blockIdx.x; i += 32)
        before += spread[i].count[plan.depth];
    before = __reduce_add_sync(0xffffffffu, before);

    const float *row = c.logits + blockIdx.y * c.stride;
    float best = find_best(all_stats + (int64_t)blockIdx.y * n_chunks, n_chunks);
    row_state r = {row, c.n_valid, best, p.temperature, 0, 0};
    int first = blockIdx.x * CHUNK_LOGITS + warp * EACH * 32 + lane; /* a warp has a stretch */
    float v[EACH], depth = depths[plan.depth];
    unsigned in[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        v[i] = first + i * 32 < c.n_valid ? row[first + i * 32] : 0;
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        in[i] =
            __ballot_sync(0xffffffffu, first + i * 32 < c.n_valid && depth_of(r, v[i]) <= depth);
        own += __popc(in[i]);
    }
    if (lane == 0)
        of_warp[warp] = own;
    __syncthreads();
    for (int i = 0; i < warp; i++)
        before += of_warp[i];
    candidates *list = lists + p.list;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        uint32_t place = before + __popc(in[i] & ((1u << lane) - 1));
        if (in[i] >> lane & 1) {
            list->logit[place] = v[i];
            list->id[place] = first + i * 32;
        }
        before += __popc(in[i]);
    }
}

/* --- Choice ------------------------------------------------------------------------------- */

/* Shared memory of join_together. */
struct join_space {
    double factor[THREADS];
    float sum[THREADS];
    double log_sum;
};

/* What a row gives whose logits are finite: its alternatives, then its token, which draw_token
 * finds where there is a temperature. All threads. */
template <typename DRAW>
__device__ void choose_row(const qv_k_sample_args &c, const qv_k_sample_row &p, workspace &ws,
                           float best, int32_t best_id, double log_sum, DRAW draw_token)
{
    float *logit = c.logits + blockIdx.x * c.stride;
    qv_k_sample_result *out = &c.results[blockIdx.x];
    row_state r = {logit, c.n_valid, best, 1.0f, 0, 0};
    share_out(r, c.n_valid);
    int n_top = p.n_top > 0 ? find_top(r, ws, p.n_top) : 0;
    for (int i = threadIdx.x; i < n_top; i += THREADS) {
        out->top_token[i] = ws.ranked_id[i];
        out->top_logprob[i] = (float)((double)ws.ranked[i] - log_sum);
    }
    if (threadIdx.x == 0)
        out->n_top = n_top;
    if (p.target >= 0) {
        if (threadIdx.x == 0) {
            out->token = p.target;
            out->logprob = (float)((double)logit[p.target] - log_sum);
        }
        return;
    }

    change_row(c, p, logit, r, ws, best, best_id);
    int token = best_id;
    if (best == -INFINITY) {
        token = QV_K_SAMPLE_ALL_BANNED;
    } else if (p.temperature > 0) {
        r.max = best;
        r.temperature = p.temperature;
        token = draw_token(r);
    }
    if (threadIdx.x == 0) {
        out->token = token;
        if (token >= 0)
            out->logprob = (float)((double)logit[token] - log_sum);
    }
    __syncthreads();
    const qv_k_sample_seen *seen = c.seen + p.seen;
    for (int i = threadIdx.x; i < p.n_seen; i += THREADS)
        if (seen[i].token == token)
            out->logprob = (float)((double)seen[i].raw - log_sum);
}

/* A row that something is wrong with. */
__device__ __forceinline__ void give_up(const qv_k_sample_args &c)
{
    if (threadIdx.x == 0) {
        c.results[blockIdx.x].token = QV_K_SAMPLE_NOT_FINITE;
        c.results[blockIdx.x].n_top = 0;
    }
}

/* join_chunks by all threads, the sum in the same order; *log_sum besides. */
__device__ bool join_together(const chunk_stats *stats, int n_chunks, join_space &js, joined &j,
                              double *log_sum)
{
    int bad = 0;
    j = {-INFINITY, -INFINITY, INT32_MAX, 0};
    for (int i = threadIdx.x & 31; i < n_chunks; i += 32) {
        j.max = fmaxf(j.max, stats[i].max);
        bad |= stats[i].bad;
        keep_best(j.best, j.best_id, stats[i].best, stats[i].best_id);
    }
    j.max = warp_max(j.max);
    warp_best(j.best, j.best_id);
    if (__any_sync(0xffffffffu, bad)) /* every warp has seen all chunks */
        return false;
    for (int first = 0; first < n_chunks; first += THREADS) {
        int n = n_chunks - first < THREADS ? n_chunks - first : THREADS, i = threadIdx.x;
        __syncthreads();
        if (i < n) {
            js.factor[i] = exp((double)stats[first + i].max - (double)j.max);
            js.sum[i] = stats[first + i].sum;
        }
        __syncthreads();
        for (int k = 0; k < n && threadIdx.x == 0; k++)
            j.sum += (double)js.sum[k] * js.factor[k];
    }
    if (threadIdx.x == 0)
        js.log_sum = (double)j.max + log(j.sum);
    __syncthreads();
    *log_sum = js.log_sum;
    return true;
}

/* From all logits: the chunk in which the running sum passes the draw, then that chunk. */
__device__ int draw_plain(row_state r, workspace &ws, const qv_k_sample_row &p,
                          const chunk_spread *spread, int n_chunks)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        mass total = 0, before = 0;
        for (int i = 0; i < n_chunks; i++)
            total += spread[i].all;
        mass target = (mass)(p.u * (double)total);
        int chunk = 0;
        while (chunk < n_chunks && before + spread[chunk].all <= target)
            before += spread[chunk++].all;
        ws.found = (uint32_t)chunk;
        ws.rest = target - before;
    }
    __syncthreads();
    int chunk = (int)ws.found, first = chunk * CHUNK_LOGITS;
    mass target = ws.rest;
    if (chunk == n_chunks)
        return 0;
    r.logit += first;
    share_out(r, r.n - first < CHUNK_LOGITS ? r.n - first : CHUNK_LOGITS);
    cut k = keep_all(ws);
    float min_p = least_of(p);
    kept_mass(r, ws, k, min_p);
    int at = pick(r, ws, k, min_p, target);
    return at < 0 ? 0 : first + at;
}

__global__ void __launch_bounds__(THREADS)
    choose_kernel(qv_k_sample_args c, const chunk_stats *all_stats, const chunk_spread *all_spread,
                  candidates *lists, int n_chunks)
{
    __shared__ workspace ws;
    __shared__ join_space js;
    const qv_k_sample_row p = c.rows[blockIdx.x];
    const chunk_spread *spread = all_spread + (int64_t)blockIdx.x * n_chunks;
    joined all;
    double log_sum;
    if (!join_together(all_stats + (int64_t)blockIdx.x * n_chunks, n_chunks, js, all, &log_sum)) {
        give_up(c);
        return;
    }
    choose_row(c, p, ws, all.best, all.best_id, log_sum, [&](row_state r) {
        row_way way = way_of(p, c.n_valid);
        if (way == PLAIN)
            return draw_plain(r, ws, p, spread, n_chunks);
        candidates *list = p.list < 0 ? nullptr : lists + p.list;
        if (way == ALONE)
            return draw(r, ws, p, list);
        list_plan plan = plan_list(p, c.n_valid, spread, n_chunks);
        if (plan.depth < 0)
            return draw(r, ws, p, (candidates *)nullptr);
        r.logit = list->logit;
        share_out(r, (int)plan.n);
        return draw_from(r, ws, p, keep_all(ws), cuts_by_k(p, c.n_valid), p.top_p < 1.0f,
                         plan.whole, list);
    });
}

} // namespace

size_t qv_k_sample_scratch(int32_t n_rows, int32_t n_vocab, int32_t n_lists)
{
    return (size_t)n_lists * sizeof(candidates) + (size_t)n_rows * (size_t)count_chunks(n_vocab) *
                                                      (sizeof(chunk_stats) + sizeof(chunk_spread));
}

qv_status qv_k_sample(const qv_k_sample_args *c, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    int n_chunks = count_chunks(c->n_vocab);
    scratch_parts parts = parts_of(*c);
    dim3 grid((unsigned)n_chunks, (unsigned)c->n_rows);
    scan_kernel<<<grid, SCAN_THREADS, 0, s>>>(*c, parts.stats);
    if (c->n_drawn > 0)
        spread_kernel<<<grid, SCAN_THREADS, 0, s>>>(*c, parts.stats, parts.spread);
    if (c->n_lists > 0)
        collect_kernel<<<grid, SCAN_THREADS, 0, s>>>(*c, parts.stats, parts.spread, parts.lists);
    choose_kernel<<<(unsigned)c->n_rows, THREADS, 0, s>>>(*c, parts.stats, parts.spread,
                                                          parts.lists, n_chunks);
    return qv_k_check_launch("sample");
}
