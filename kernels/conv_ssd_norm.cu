/* A Mamba-2 layer between its two products, for steps of one token a sequence: convolution,
 * recurrence and gated norm, which by a launch each cost three times the latency. The same bits as
 * conv1d.cu, ssd.cu and norm.cu. For heads of 64 in groups of eight, which the norm is over: a head
 * is the work of 256 threads, eight rows of S a warp.
 *
 * Two forms, bound by the state's 2 * 4 * 64 * 128 bytes a head and token, or by latency:
 * - few sequences: a block has one head, a cluster a group. The blocks tell each other what enters
 *   the norm. All read the state of the convolution of B and C; the first one writes it behind the
 *   barrier of the cluster.
 * - many: a block has a group, one head after the other, the next one on its way.
 */
#include "kernels/mixer_step.cuh"

namespace
{

constexpr int THREADS = 256;
constexpr int HEADS = 8;   /* of a group */
constexpr int HEAD_D = 64; /* 8 warps of STEP_ROWS rows */
constexpr int GROUP_D = HEADS * HEAD_D;

struct ssd_shared {
    bf16 b[STEP_STATE], c[STEP_STATE], x[GROUP_D]; /* x: of the block's heads */
    float gates[HEADS][3];                         /* decay, dt, D */
    __align__(16) float entered[GROUP_D];          /* what the norm is of */
};

/* Where the thread's rows of a head are: row warp + 8 i is i * 8 * STEP_STATE further. */
__device__ __forceinline__ float *rows_of(const qv_k_recurrent_args &c, int64_t slot, int head)
{
    return c.state + ((slot * c.n_v_heads + head) * HEAD_D + (threadIdx.x >> 5)) * STEP_STATE +
           (threadIdx.x & 31) * 4;
}

struct ssd_head {
    float4 cell[STEP_ROWS];
    float z; /* of the row whose sum the lane gets */
};

/* That row of a head. */
__device__ __forceinline__ int own_row()
{
    return (threadIdx.x >> 5) + HEADS * ((threadIdx.x & 31) >> 2);
}

__device__ __forceinline__ void load_head(const qv_k_mixer_args &a, const mixer_token &token,
                                          int group, int in_group, ssd_head &h)
{
    const float *from = rows_of(a.layer, token.slot, group * HEADS + in_group);
#pragma unroll
    for (int i = 0; i < STEP_ROWS; i++)
        h.cell[i] = token.fresh ? make_float4(0, 0, 0, 0)
                                : __ldcs((const float4 *)(from + i * 8 * STEP_STATE));
    h.z = to_float(row_of(a.z, token.t, group)[in_group * HEAD_D + own_row()]);
}

/* What enters the norm of the lane's own row. `x` are the head's. */
__device__ __forceinline__ float step_head(const ssd_shared &m, const bf16 *x,
                                           const float (&gates)[3], ssd_head &h)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint2 raw_b = *(const uint2 *)(m.b + lane * 4), raw_c = *(const uint2 *)(m.c + lane * 4);
    float b[4] = {bf16_low(raw_b.x), bf16_high(raw_b.x), bf16_low(raw_b.y), bf16_high(raw_b.y)};
    float r[4] = {bf16_low(raw_c.x), bf16_high(raw_c.x), bf16_low(raw_c.y), bf16_high(raw_c.y)};
    float sum[STEP_ROWS];
#pragma unroll
    for (int i = 0; i < STEP_ROWS; i++)
        sum[i] = update_row(h.cell[i], gates[1] * to_float(x[warp + 8 * i]), gates[0], b, r);
    fold_rows(sum);
    return round_bf16(fmaf(gates[2], to_float(x[own_row()]), sum[0])) * silu(h.z);
}

__device__ __forceinline__ void store_head(const qv_k_recurrent_args &c, const mixer_token &token,
                                           int head, const ssd_head &h)
{
    float *to = rows_of(c, token.slot, head);
#pragma unroll
    for (int i = 0; i < STEP_ROWS; i++)
        __stcs((float4 *)(to + i * 8 * STEP_STATE), h.cell[i]);
}

/* The sum of squares of a group, in the order of norm.cu. All lanes of a warp. */
__device__ __forceinline__ float group_squares(const float *entered)
{
    float squares = 0;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float v[8];
        load8(entered + ((threadIdx.x & 31) + j * 32) * 8, v);
#pragma unroll
        for (int i = 0; i < 8; i++)
            squares = fmaf(v[i], v[i], squares);
    }
    return lanes_sum<32>(squares);
}

struct ssd_place {
    mixer_token token;
    int group, in_group, head; /* the block's first head, of the group and of all */
    int channel;               /* the first of four that the thread convolves */
    bool convolves;
};

template <bool ONE> constexpr int N_HEADS = ONE ? 1 : HEADS; /* of a block */

template <bool ONE>
__device__ __forceinline__ ssd_place find_place(const qv_k_steps &s, const mixer_channels &first)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, part = threadIdx.x - 64;
    ssd_place p;
    p.token = find_token(s, blockIdx.z);
    p.group = blockIdx.y;
    p.in_group = ONE ? blockIdx.x : 0;
    p.head = p.group * HEADS + p.in_group;
    p.channel = warp < 2 ? (warp == 0 ? first.k : first.q) + p.group * STEP_STATE + lane * QUAD
                         : first.v + p.head * HEAD_D + part * QUAD;
    p.convolves = warp < 2 || part < N_HEADS<ONE> * HEAD_D / QUAD;
    return p;
}

/* Where the thread's four outputs of the convolution go. */
__device__ __forceinline__ bf16 *place_in(ssd_shared &m)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    return warp < 2 ? (warp == 0 ? m.b : m.c) + lane * QUAD : m.x + (threadIdx.x - 64) * QUAD;
}

/* Grid (blocks of a group, groups, sequences). */
template <bool ONE>
__global__ void __launch_bounds__(THREADS, 2)
    conv_ssd_norm_kernel(const qv_k_steps s, const __grid_constant__ qv_k_mixer_args a,
                         const mixer_channels first)
{
    constexpr int AT_ONCE = ONE ? 1 : 2; /* heads */
    __shared__ __align__(16) ssd_shared m;
    const qv_k_recurrent_args &c = a.layer;
    const ssd_place p = find_place<ONE>(s, first);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (!p.token.there) {
        wait_for_previous(); /* whoever waits for this kernel also waits for those before it */
        return;
    }
    if (ONE)
        cluster_arrive(); /* the block runs: its shared memory may be written */
    conv_gains gains;
    if (!p.token.fresh) /* 128 bytes a thread */
        prefetch(c.state + (p.token.slot * c.n_v_heads + p.head) * HEAD_D * STEP_STATE +
                 threadIdx.x * 32);
    if (p.convolves) {
        load_gains(a.conv, p.channel, gains);
        prefetch(past_of(a.conv, p.token.slot, p.channel));
    }
    bool has_gates = warp == 7 && lane < N_HEADS<ONE>; /* a head a lane */
    float d_skip = has_gates ? c.d_skip[p.head + lane] : 0;
    int column = p.in_group * HEAD_D + threadIdx.x * 2; /* of the norm, two a thread */
    float2 gain = {};
    if (threadIdx.x < N_HEADS<ONE> * HEAD_D / 2)
        gain = *(const float2 *)(a.w + p.group * GROUP_D + column);
    wait_for_previous();
    let_next_start();

    uint2 x = {};
    conv_past past = {};
    gate_inputs gates = {};
    ssd_head heads[AT_ONCE];
    if (p.convolves) {
        x = *(const uint2 *)((const bf16 *)a.conv.x + p.token.t * a.conv.x_stride + p.channel);
        if (!p.token.fresh)
            past = *past_of(a.conv, p.token.slot, p.channel);
    }
    if (has_gates)
        gates = gate_inputs_of<false>(c, p.token.t, p.head + lane);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
        load_head(a, p.token, p.group, p.in_group + i, heads[i]);
    if (p.convolves) {
        *(uint2 *)place_in(m) = conv_token(gains, past, x);
        if (warp >= 2 || !ONE)
            *past_of(a.conv, p.token.slot, p.channel) = past;
    }
    if (has_gates) {
        gate gt = gate_from<false>(c, gates);
        m.gates[lane][0] = expf(gt.g);
        m.gates[lane][1] = gt.beta;
        m.gates[lane][2] = d_skip;
    }
    __syncthreads();

    if (ONE) {
        cluster_wait(); /* all blocks run */
        float entered = step_head(m, m.x, m.gates[0], heads[0]);
#pragma unroll
        for (int i = 0; i < HEADS; i += 4) /* the four lanes of a row share out the blocks */
            store_to(&m.entered[p.in_group * HEAD_D + own_row()], (lane & 3) + i, entered);
        cluster_arrive();
        store_head(c, p.token, p.head, heads[0]);
        cluster_wait();
        if (blockIdx.x == 0 && warp < 2)
            *past_of(a.conv, p.token.slot, p.channel) = past; /* all have read the old one */
    } else {
        for (int i = 0; i < HEADS; i += AT_ONCE)
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                float entered = step_head(m, m.x + (i + j) * HEAD_D, m.gates[i + j], heads[j]);
                if ((lane & 3) == 0)
                    m.entered[(i + j) * HEAD_D + own_row()] = entered;
                store_head(c, p.token, p.head + i + j, heads[j]);
                if (i + AT_ONCE < HEADS)
                    load_head(a, p.token, p.group, i + AT_ONCE + j, heads[j]);
            }
        __syncthreads();
    }
    if (warp * 64 >= N_HEADS<ONE> * HEAD_D)
        return;
    float scale = norm_scale(group_squares(m.entered), GROUP_D, a.eps);
    float2 v = *(const float2 *)(m.entered + column);
    *(uint32_t *)(row_of<bf16>(a.y, p.token.t, p.group) + column) =
        pack_bf16(v.x * scale * gain.x, v.y * scale * gain.y);
}

/* Few: up to so many heads of all sequences (Nano, ms a step at 8 and 16 sequences of 64: a block a
 * head 8.97 and 13.04, a group 8.99 and 12.83). */
constexpr int64_t FEW_HEADS = 512;

} // namespace

bool qv_k_conv_ssd_norm_can(const qv_k_steps *steps, const qv_k_mixer_args *args)
{
    const qv_k_recurrent_args &c = args->layer;
    return c.d_k == STEP_STATE && c.d_v == HEAD_D && c.n_v_heads == c.n_k_heads * HEADS &&
           mixer_can(*steps, *args);
}

qv_status qv_k_conv_ssd_norm(const qv_k_steps *steps, const qv_k_mixer_args *args, void *stream)
{
    mixer_channels first = channels_of(*args);
    unsigned groups = (unsigned)args->layer.n_k_heads, n_seqs = (unsigned)steps->n_seqs;
    if ((int64_t)steps->n_seqs * args->layer.n_v_heads <= FEW_HEADS)
        return launch_mixer("conv_ssd_norm", conv_ssd_norm_kernel<true>,
                            dim3(HEADS, groups, n_seqs), THREADS, stream, *steps, *args, first);
    return launch_mixer("conv_ssd_norm", conv_ssd_norm_kernel<false>, dim3(1, groups, n_seqs),
                        THREADS, stream, *steps, *args, first);
}
