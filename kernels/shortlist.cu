/* Shortlists of a part of the vocabulary, and their merging. A list is made like a sample: the scan
 * of all rows, then a block a row, which writes what the row's choice depends on instead of
 * choosing. Merging is a block a row over some hundred numbers, with the same functions over the
 * same numbers as choosing from the whole row has them, so the choice is the same.
 */
#include "kernels/sample.cuh"
#include "kernels/shortlist.h"

namespace
{

__device__ __forceinline__ int32_t word_of(float x)
{
    return __float_as_int(x);
}

/* --- One part ----------------------------------------------------------------------------- */

/* The tokens that the cut keeps and that are not banned, in the order of ids. Returns how many. */
__device__ int list_kept(const row_state &r, workspace &ws, cut k, const qv_k_shortlist_args &c,
                         int32_t *list)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint32_t own = 0;
    for_each(r, ws, k, [&](int, float x, uint32_t, bool kept) {
        own += __popc(__ballot_sync(0xffffffffu, kept && x > -INFINITY));
    });
    if (lane == 0)
        ws.of_warp[warp] = own;
    __syncthreads();
    int at = 0, total = 0;
    for (int i = 0; i < WARPS; i++) {
        at += i < warp ? (int)ws.of_warp[i] : 0;
        total += (int)ws.of_warp[i];
    }
    for_each(r, ws, k, [&](int id, float x, uint32_t, bool kept) {
        bool in = kept && x > -INFINITY;
        unsigned lanes = __ballot_sync(0xffffffffu, in);
        int place = at + __popc(lanes & ((1u << lane) - 1));
        if (in && place < c.k) {
            list[QV_SHORT_LOGIT(c.k) + place] = list[QV_SHORT_RAW(c.k) + place] = word_of(x);
            list[QV_SHORT_ID(c.k) + place] = (int32_t)(c.first + id);
        }
        at += __popc(lanes);
    });
    return total < c.k ? total : c.k;
}

__global__ void __launch_bounds__(THREADS)
    shortlist_kernel(qv_k_shortlist_args c, const chunk_stats *stats, int n_chunks)
{
    __shared__ workspace ws;
    const qv_k_sample_row p = c.part.rows[blockIdx.x];
    float *logit = c.part.logits + blockIdx.x * c.part.stride;
    int32_t *list = c.lists + (int64_t)blockIdx.x * QV_SHORT_WORDS(c.k, c.n_top);
    joined all = {};
    bool fine = p.keep >= 0 && join_chunks(stats + (int64_t)blockIdx.x * n_chunks, n_chunks, all);
    if (threadIdx.x == 0) {
        list[QV_SHORT_BAD] = p.keep >= 0 && !fine;
        list[QV_SHORT_N] = list[QV_SHORT_N_TOP] = list[QV_SHORT_HAS_TARGET] = 0;
        list[QV_SHORT_MAX] = word_of(all.max);
        list[QV_SHORT_SUM] = word_of((float)all.sum);
        list[QV_SHORT_SUM_REST] = word_of((float)(all.sum - (double)(float)all.sum));
    }
    if (!fine)
        return;

    row_state r = {logit, c.part.n_valid, all.best, 1.0f, 0, 0};
    share_out(r, c.part.n_valid);
    int n_top = p.n_top > 0 ? find_top(r, ws, p.n_top) : 0;
    for (int i = threadIdx.x; i < n_top; i += THREADS) {
        list[QV_SHORT_TOP(c.k) + i] = word_of(ws.ranked[i]);
        list[QV_SHORT_TOP_ID(c.k, c.n_top) + i] = (int32_t)(c.first + ws.ranked_id[i]);
    }
    if (threadIdx.x == 0)
        list[QV_SHORT_N_TOP] = n_top;
    if (p.keep == 0) {
        if (threadIdx.x == 0 && p.target >= 0) {
            list[QV_SHORT_HAS_TARGET] = 1;
            list[QV_SHORT_TARGET] = word_of(logit[p.target]);
        }
        return;
    }

    float best = all.best;
    int32_t best_id = all.best_id;
    change_row(c.part, p, logit, r, ws, best, best_id);
    int n = 0;
    if (best == -INFINITY) { /* nothing here may be chosen */
        n = 0;
    } else if (p.temperature > 0) {
        r.max = best;
        r.temperature = p.temperature;
        int most = p.keep < r.n ? p.keep : r.n;
        n = list_kept(r, ws, shorten(r, ws, keep_all(ws), false, (mass)most), c, list);
    } else {
        n = 1;
        if (threadIdx.x == 0) {
            list[QV_SHORT_LOGIT(c.k)] = list[QV_SHORT_RAW(c.k)] = word_of(best);
            list[QV_SHORT_ID(c.k)] = (int32_t)(c.first + best_id);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0)
        list[QV_SHORT_N] = n;
    const qv_k_sample_seen *seen = c.part.seen + p.seen;
    for (int i = threadIdx.x; i < p.n_seen; i += THREADS)
        for (int j = 0; j < n; j++)
            if (list[QV_SHORT_ID(c.k) + j] == c.first + seen[i].token)
                list[QV_SHORT_RAW(c.k) + j] = word_of(seen[i].raw);
}

/* --- Merge -------------------------------------------------------------------------------- */

/* Place of an alternative among those of all parts: parts come in the order of ids, so among equals
 * the earlier part, and within a part the earlier one, ranks first. */
__device__ int rank_of(const qv_k_merge_args &c, const int32_t *lists, int words, int part, int i)
{
    const int32_t *own = lists + part * words + QV_SHORT_TOP(c.k);
    float x = __int_as_float(own[i]);
    int rank = i;
    for (int q = 0; q < c.n_parts; q++) {
        const int32_t *list = lists + q * words;
        for (int j = 0; j < list[QV_SHORT_N_TOP] && q != part; j++) {
            float other = __int_as_float(list[QV_SHORT_TOP(c.k) + j]);
            rank += other > x || (other == x && q < part);
        }
    }
    return rank;
}

__device__ void merge_top(const qv_k_merge_args &c, const int32_t *lists, int words, int n,
                          double log_sum, qv_k_sample_result *out)
{
    int total = 0;
    for (int q = 0; q < c.n_parts; q++)
        total += lists[q * words + QV_SHORT_N_TOP];
    for (int t = threadIdx.x; t < c.n_parts * c.n_top; t += THREADS) {
        int part = t / c.n_top, i = t % c.n_top;
        const int32_t *list = lists + part * words;
        if (i >= list[QV_SHORT_N_TOP])
            continue;
        int rank = rank_of(c, lists, words, part, i);
        if (rank >= n)
            continue;
        double x = (double)__int_as_float(list[QV_SHORT_TOP(c.k) + i]);
        out->top_token[rank] = list[QV_SHORT_TOP_ID(c.k, c.n_top) + i];
        out->top_logprob[rank] = (float)(x - log_sum);
    }
    if (threadIdx.x == 0)
        out->n_top = n <= 0 ? 0 : total < n ? total : n;
}

__global__ void __launch_bounds__(THREADS) merge_kernel(qv_k_merge_args c)
{
    __shared__ workspace ws;
    const qv_k_sample_row p = c.rows[blockIdx.x];
    int words = QV_SHORT_WORDS(c.k, c.n_top), room = c.n_parts * c.k;
    const int32_t *lists = c.lists + (int64_t)blockIdx.x * c.n_parts * words;
    qv_k_sample_result *out = &c.results[blockIdx.x];
    if (p.keep < 0)
        return;
    float max = -INFINITY;
    int bad = 0;
    for (int q = 0; q < c.n_parts; q++) {
        bad |= lists[q * words + QV_SHORT_BAD];
        max = fmaxf(max, __int_as_float(lists[q * words + QV_SHORT_MAX]));
    }
    if (bad) {
        if (threadIdx.x == 0) {
            out->token = QV_K_SAMPLE_NOT_FINITE;
            out->n_top = 0;
        }
        return;
    }
    double sum = 0;
    for (int q = 0; q < c.n_parts; q++) {
        const int32_t *list = lists + q * words;
        sum += ((double)__int_as_float(list[QV_SHORT_SUM]) +
                (double)__int_as_float(list[QV_SHORT_SUM_REST])) *
               exp((double)__int_as_float(list[QV_SHORT_MAX]) - (double)max);
    }
    double log_sum = (double)max + log(sum);
    merge_top(c, lists, words, p.n_top, log_sum, out);
    if (p.keep == 0) {
        if (threadIdx.x == 0)
            out->token = p.target;
        for (int q = threadIdx.x; q < c.n_parts; q += THREADS)
            if (lists[q * words + QV_SHORT_HAS_TARGET])
                out->logprob =
                    (float)((double)__int_as_float(lists[q * words + QV_SHORT_TARGET]) - log_sum);
        return;
    }

    /* All choices, in the order of ids. */
    float *logit = (float *)c.scratch + (int64_t)blockIdx.x * 3 * room, *raw = logit + room;
    int32_t *id = (int32_t *)(raw + room);
    int n = 0;
    for (int q = 0; q < c.n_parts; q++) {
        const int32_t *list = lists + q * words;
        for (int i = threadIdx.x; i < list[QV_SHORT_N]; i += THREADS) {
            logit[n + i] = __int_as_float(list[QV_SHORT_LOGIT(c.k) + i]);
            raw[n + i] = __int_as_float(list[QV_SHORT_RAW(c.k) + i]);
            id[n + i] = list[QV_SHORT_ID(c.k) + i];
        }
        n += list[QV_SHORT_N];
    }
    __syncthreads();
    row_state r = {logit, n, 0, p.temperature, 0, 0};
    share_out(r, n);
    float best = -INFINITY;
    int32_t best_at = INT32_MAX;
    for (int i = r.begin + (int)(threadIdx.x & 31); i < r.end; i += 32)
        keep_best(best, best_at, logit[i], i);
    warp_best(best, best_at);
    if ((threadIdx.x & 31) == 0) {
        ws.best[threadIdx.x >> 5] = best;
        ws.best_id[threadIdx.x >> 5] = best_at;
    }
    __syncthreads();
    for (int i = 0; i < WARPS; i++)
        keep_best(best, best_at, ws.best[i], ws.best_id[i]);
    if (n > 0 && p.temperature > 0) {
        r.max = best;
        best_at = draw(r, ws, p, nullptr);
    }
    if (threadIdx.x == 0) {
        out->token = n > 0 ? id[best_at] : QV_K_SAMPLE_ALL_BANNED;
        if (n > 0)
            out->logprob = (float)((double)raw[best_at] - log_sum);
    }
}

} // namespace

qv_status qv_k_shortlist(const qv_k_shortlist_args *c, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    int n_chunks = count_chunks(c->part.n_vocab);
    chunk_stats *stats = (chunk_stats *)c->part.scratch;
    dim3 grid((unsigned)n_chunks, (unsigned)c->part.n_rows);
    scan_kernel<<<grid, SCAN_THREADS, 0, s>>>(c->part, stats);
    shortlist_kernel<<<(unsigned)c->part.n_rows, THREADS, 0, s>>>(*c, stats, n_chunks);
    return qv_k_check_launch("shortlist");
}

size_t qv_k_merge_scratch(int32_t n_rows, int32_t n_parts, int32_t k)
{
    return (size_t)n_rows * (size_t)n_parts * (size_t)k * 3 * sizeof(float);
}

qv_status qv_k_merge_shortlists(const qv_k_merge_args *c, void *stream)
{
    merge_kernel<<<(unsigned)c->n_rows, THREADS, 0, (cudaStream_t)stream>>>(*c);
    return qv_k_check_launch("merge_shortlists");
}
