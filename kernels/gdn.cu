/* Gated DeltaNet. Decode reads and writes the state once, 2 * 4 * d_k * d_v bytes per head and
 * token, and is bound by that; prefill goes by chunks (recurrent.cuh).
 */
#include "kernels/recurrent.cuh"

namespace
{

/* Grid (4, heads, sequences), 128 threads: 32 columns of a head. Thread (rows r = 16 i + thread /
 * 8, columns 4 (thread % 8)..) keeps 8 x 4 cells in registers, all loaded before the first is used.
 */
__global__ void __launch_bounds__(128)
    gdn_step_kernel(qv_k_steps s, qv_k_recurrent_args c, int most_tokens)
{
    __shared__ __align__(16) float q[STEP_D], k[STEP_D], gates[2], sums[4][8][12];
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    int column = blockIdx.x * 32 + (thread & 7) * 4, head = blockIdx.y, seq = blockIdx.z;
    int start = s.seq_start[seq], end = s.seq_start[seq + 1], row = thread >> 3;
    if (start >= end || end - start > most_tokens)
        return;
    int key_head = head / (c.n_v_heads / c.n_k_heads);
    float *state = state_of(s, c, seq, head) + row * STEP_D + column;
    float4 cell[8];
    if (s.pos[start] == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            cell[i] = make_float4(0, 0, 0, 0);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            cell[i] = __ldcs((const float4 *)(state + i * 16 * STEP_D));
    }

    for (int t = start; t < end; t++) {
        uint2 raw = *(const uint2 *)(row_of(c.v, t, head) + column);
        if (warp == 0)
            load_unit(row_of(c.k, t, key_head), 1, k, lane);
        if (warp == 1)
            load_unit(row_of(c.q, t, key_head), rsqrtf((float)STEP_D), q, lane);
        if (thread == 64) {
            gate gt = gate_of<true>(c, t, head);
            gates[0] = expf(gt.g);
            gates[1] = gt.beta;
        }
        __syncthreads();
        float sum[9];
        delta_sums(cell, q, k, thread, sums, sum);
        float decay = gates[0], e[4];
        delta_error(sum, raw, decay, gates[1], e);
        if (row == 0)
            *(uint2 *)(row_of<bf16>(c.o, t, head) + column) = delta_output(sum, decay, e);
        delta_update(cell, k, row, e, decay);
        __syncthreads(); /* k, q, gates and sums have been read */
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        __stcs((float4 *)(state + i * 16 * STEP_D), cell[i]);
}

} // namespace

size_t qv_k_recurrent_scratch(int64_t n_tokens, int64_t n_seqs, int64_t n_v_heads)
{
    return (size_t)(n_places(n_tokens, n_seqs) * n_v_heads) * sizeof(chunk_record<true>);
}

qv_status qv_k_gdn(const qv_k_steps *steps, const qv_k_recurrent_args *args, void *scratch,
                   size_t scratch_bytes, void *stream)
{
    const qv_k_steps &s = *steps;
    const qv_k_recurrent_args &c = *args;
    cudaStream_t on = (cudaStream_t)stream;
    bool chunks = fits_chunks(c) && has_chunks(s);
    int most = chunks ? STEP_TOKENS : INT32_MAX;
    /* Also beside chunks: counts are bounds, and a single sequence may be shorter than they say. */
    if (fits_chunks(c) && c.d_k == STEP_D && c.d_v == STEP_D)
        gdn_step_kernel<<<dim3(STEP_D / 32, (unsigned)c.n_v_heads, (unsigned)s.n_seqs), 128, 0,
                          on>>>(s, c, most);
    else
        QV_TRY(launch_any<true>("gdn", s, c, most, on));
    if (chunks)
        QV_TRY(launch_chunks<true>("gdn", s, c, most, scratch, scratch_bytes, on));
    return qv_k_check_launch("gdn");
}
