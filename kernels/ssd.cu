/* Mamba-2's state space recurrence. Decode reads and writes the state once, 2 * 4 * d * n_state
 * bytes per head and token, and is bound by that; prefill goes by chunks (recurrent.cuh).
 */
#include "kernels/recurrent.cuh"

namespace
{

/* Grid (tiles of 32 rows, heads, sequences), 128 threads: warp w has rows w, w + 4, .. of its tile,
 * all loaded before the first is used. */
__global__ void __launch_bounds__(128)
    ssd_step_kernel(qv_k_steps s, qv_k_recurrent_args c, int most_tokens)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y, seq = blockIdx.z;
    int start = s.seq_start[seq], end = s.seq_start[seq + 1];
    if (start >= end || end - start > most_tokens)
        return;
    int group = head / (c.n_v_heads / c.n_k_heads), row = blockIdx.x * 32 + warp;
    float *state = state_of(s, c, seq, head) + (int64_t)row * STEP_STATE + lane * 4;
    bool fresh = s.pos[start] == 0;
    float4 cell[STEP_ROWS];
#pragma unroll
    for (int i = 0; i < STEP_ROWS; i++)
        cell[i] = !fresh && row + 4 * i < c.d_v
                      ? __ldcs((const float4 *)(state + i * 4 * STEP_STATE))
                      : make_float4(0, 0, 0, 0);

    for (int t = start; t < end; t++) {
        gate gt = gate_of<false>(c, t, head);
        float decay = expf(gt.g), d_skip = c.d_skip[head];
        uint2 raw_b = *(const uint2 *)(row_of(c.k, t, group) + lane * 4);
        uint2 raw_c = *(const uint2 *)(row_of(c.q, t, group) + lane * 4);
        float b[4] = {bf16_low(raw_b.x), bf16_high(raw_b.x), bf16_low(raw_b.y), bf16_high(raw_b.y)};
        float r[4] = {bf16_low(raw_c.x), bf16_high(raw_c.x), bf16_low(raw_c.y), bf16_high(raw_c.y)};
        const bf16 *x_row = row_of(c.v, t, head);
        float x[STEP_ROWS], sum[STEP_ROWS];
#pragma unroll
        for (int i = 0; i < STEP_ROWS; i++)
            x[i] = row + 4 * i < c.d_v ? to_float(x_row[row + 4 * i]) : 0.0f;
#pragma unroll
        for (int i = 0; i < STEP_ROWS; i++)
            sum[i] = update_row(cell[i], gt.beta * x[i], decay, b, r);
        fold_rows(sum);
        int mine = row + 4 * (lane >> 2);
        if ((lane & 3) == 0 && mine < c.d_v)
            row_of<bf16>(c.o, t, head)[mine] =
                __float2bfloat16(fmaf(d_skip, to_float(x_row[mine]), sum[0]));
    }
#pragma unroll
    for (int i = 0; i < STEP_ROWS; i++)
        if (row + 4 * i < c.d_v)
            __stcs((float4 *)(state + i * 4 * STEP_STATE), cell[i]);
}

} // namespace

qv_status qv_k_ssd(const qv_k_steps *steps, const qv_k_recurrent_args *args, void *scratch,
                   size_t scratch_bytes, void *stream)
{
    const qv_k_steps &s = *steps;
    const qv_k_recurrent_args &c = *args;
    cudaStream_t on = (cudaStream_t)stream;
    bool chunks = fits_chunks(c) && has_chunks(s);
    int most = chunks ? STEP_TOKENS : INT32_MAX;
    /* Also beside chunks: counts are bounds, and a single sequence may be shorter than they say. */
    if (fits_chunks(c) && c.d_k == STEP_STATE)
        ssd_step_kernel<<<dim3((unsigned)((c.d_v + 31) / 32), (unsigned)c.n_v_heads,
                               (unsigned)s.n_seqs),
                          128, 0, on>>>(s, c, most);
    else
        QV_TRY(launch_any<false>("ssd", s, c, most, on));
    if (chunks)
        QV_TRY(launch_chunks<false>("ssd", s, c, most, scratch, scratch_bytes, on));
    return qv_k_check_launch("ssd");
}
