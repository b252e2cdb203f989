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
    joined all; /* every thread for itself: chunks are few, and in the cache */
    if (!join_chunks(stats + (int64_t)blockIdx.x * n_chunks, n_chunks, all)) {
        give_up(c);
        return;
    }
    choose_row(c, p, ws, all.best, all.best_id, (double)all.max + log(all.sum),
               [&](row_state r) { return draw(r, ws, p, p.list < 0 ? nullptr : lists + p.list); });
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
    scan_kernel<<<dim3((unsigned)n_chunks, (unsigned)c->n_rows), SCAN_THREADS, 0, s>>>(*c,
                                                                                       parts.stats);
    choose_kernel<<<(unsigned)c->n_rows, THREADS, 0, s>>>(*c, parts.stats, parts.lists, n_chunks);
    return qv_k_check_launch("sample");
}
