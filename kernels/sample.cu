/* Sampling. Two launches: a scan of all rows by many blocks (maximum, sum of exponentials, whether
 * all is finite), which reads 4 n_vocab bytes a row once, and a block a row that does the rest. A
 * greedy row without penalties needs nothing but the scan; a drawn one reads its row from the L2
 * cache another few times.
 */
#include "kernels/sample.cuh"

namespace
{

__global__ void __launch_bounds__(THREADS)
    choose_kernel(qv_k_sample_args c, const chunk_stats *stats, candidates *lists, int n_chunks)
{
    __shared__ workspace ws;
    const qv_k_sample_row p = c.rows[blockIdx.x];
    float *logit = c.logits + blockIdx.x * c.stride;
    qv_k_sample_result *out = &c.results[blockIdx.x];
    joined all; /* every thread for itself: chunks are few, and in the cache */
    if (!join_chunks(stats + (int64_t)blockIdx.x * n_chunks, n_chunks, all)) {
        if (threadIdx.x == 0) {
            out->token = QV_K_SAMPLE_NOT_FINITE;
            out->n_top = 0;
        }
        return;
    }
    double log_sum = (double)all.max + log(all.sum);
    float best = all.best;
    int32_t best_id = all.best_id;

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
        token = draw(r, ws, p, p.list < 0 ? nullptr : lists + p.list);
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

} // namespace

size_t qv_k_sample_scratch(int32_t n_rows, int32_t n_vocab, int32_t n_lists)
{
    return (size_t)n_lists * sizeof(candidates) +
           (size_t)n_rows * (size_t)count_chunks(n_vocab) * sizeof(chunk_stats);
}

qv_status qv_k_sample(const qv_k_sample_args *c, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    int n_chunks = count_chunks(c->n_vocab);
    candidates *lists = (candidates *)c->scratch;
    chunk_stats *stats = (chunk_stats *)(lists + c->n_lists);
    scan_kernel<<<dim3((unsigned)n_chunks, (unsigned)c->n_rows), SCAN_THREADS, 0, s>>>(*c, stats);
    choose_kernel<<<(unsigned)c->n_rows, THREADS, 0, s>>>(*c, stats, lists, n_chunks);
    return qv_k_check_launch("sample");
}
