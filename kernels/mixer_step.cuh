/* What kernels of a whole recurrent layer at decode share (conv_gdn_norm.cu, conv_ssd_norm.cu): the
 * convolution of one token, four channels a thread, with the bits of conv1d.cu; what a sequence is;
 * how they are launched.
 *
 * Such a kernel is launched while the product in front still runs. Until that has ended it reads
 * only weights and the batch, and calls states to the L2 cache: nothing there can be stale.
 */
#ifndef QV_KERNELS_MIXER_STEP_CUH
#define QV_KERNELS_MIXER_STEP_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_recurrent.h"
#include "kernels/norm_row.cuh"
#include "kernels/recurrent_step.cuh"

namespace
{

constexpr int QUAD = 4; /* channels of a thread */

/* --- A token of the convolution, four taps ------------------------------------------------ */

struct conv_gains {
    float4 w[QUAD]; /* the taps of a channel */
    float bias[QUAD];
};

__device__ __forceinline__ void load_gains(const qv_k_conv1d_args &c, int channel, conv_gains &out)
{
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        out.w[i] = ((const float4 *)c.w)[channel + i];
        out.bias[i] = c.bias ? c.bias[channel + i] : 0.0f;
    }
}

/* The three inputs before, [channels][3] of BF16. */
struct conv_past {
    uint2 raw[3];
};

__device__ __forceinline__ conv_past *past_of(const qv_k_conv1d_args &c, int64_t slot, int channel)
{
    return (conv_past *)((bf16 *)c.state + (slot * c.n_channels + channel) * 3);
}

/* The token's outputs, and the window moves on. */
__device__ __forceinline__ uint2 conv_token(const conv_gains &g, conv_past &past, uint2 raw)
{
    float old[3 * QUAD], out[QUAD];
    const float now[QUAD] = {bf16_low(raw.x), bf16_high(raw.x), bf16_low(raw.y), bf16_high(raw.y)};
#pragma unroll
    for (int i = 0; i < 3; i++) {
        old[QUAD * i] = bf16_low(past.raw[i].x);
        old[QUAD * i + 1] = bf16_high(past.raw[i].x);
        old[QUAD * i + 2] = bf16_low(past.raw[i].y);
        old[QUAD * i + 3] = bf16_high(past.raw[i].y);
    }
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        float sum = fmaf(g.w[i].x, old[3 * i], g.bias[i]);
        sum = fmaf(g.w[i].y, old[3 * i + 1], sum);
        sum = fmaf(g.w[i].z, old[3 * i + 2], sum);
        out[i] = silu(fmaf(g.w[i].w, now[i], sum));
        old[3 * i] = old[3 * i + 1];
        old[3 * i + 1] = old[3 * i + 2];
        old[3 * i + 2] = now[i];
    }
#pragma unroll
    for (int i = 0; i < 3; i++)
        past.raw[i] = make_uint2(pack_bf16(old[QUAD * i], old[QUAD * i + 1]),
                                 pack_bf16(old[QUAD * i + 2], old[QUAD * i + 3]));
    return make_uint2(pack_bf16(out[0], out[1]), pack_bf16(out[2], out[3]));
}

/* --- The rest ----------------------------------------------------------------------------- */

/* A sequence's only token. */
struct mixer_token {
    int64_t t, slot;
    bool there, fresh;
};

__device__ __forceinline__ mixer_token find_token(const qv_k_steps &s, int seq)
{
    mixer_token token = {};
    int start = s.seq_start[seq];
    token.there = start < s.seq_start[seq + 1];
    if (token.there) {
        token.t = start;
        token.slot = s.state_slot[seq];
        token.fresh = s.pos[start] == 0;
    }
    return token;
}

/* First channels of q, k and v. */
struct mixer_channels {
    int q, k, v;
};

inline int64_t channel_of(const qv_k_conv1d_args &c, const qv_k_heads &part)
{
    return (const bf16 *)part.data - (const bf16 *)c.y;
}

inline mixer_channels channels_of(const qv_k_mixer_args &a)
{
    return {(int)channel_of(a.conv, a.layer.q), (int)channel_of(a.conv, a.layer.k),
            (int)channel_of(a.conv, a.layer.v)};
}

inline bool aligned16(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

/* Whether a part lies in the convolution's channels, head after head. */
inline bool is_part(const qv_k_conv1d_args &c, const qv_k_heads &part, int n, int d)
{
    int64_t first = channel_of(c, part);
    return first >= 0 && first % 8 == 0 && first + (int64_t)n * d <= c.n_channels &&
           part.token == c.y_stride && part.head == d;
}

inline bool aligned_rows(const qv_k_heads &r)
{
    return aligned16(r.data) && r.token % 8 == 0 && r.head % 8 == 0;
}

/* Of the shapes that both kernels are for. */
inline bool mixer_can(const qv_k_steps &s, const qv_k_mixer_args &a)
{
    const qv_k_conv1d_args &c = a.conv;
    const qv_k_recurrent_args &r = a.layer;
    return qv_k_is_hopper() && s.max_seq_tokens == 1 && s.n_seqs <= 65535 && c.n_taps == 4 &&
           c.n_channels % 8 == 0 && c.n_channels < (1 << 24) && c.x_stride % 8 == 0 &&
           aligned16(c.x) && aligned16(c.state) && aligned16(c.w) && aligned16(r.state) &&
           aligned16(a.w) && aligned_rows(a.z) && aligned_rows(a.y) &&
           is_part(c, r.q, r.n_k_heads, r.d_k) && is_part(c, r.k, r.n_k_heads, r.d_k) &&
           is_part(c, r.v, r.n_v_heads, r.d_v);
}

/* Blocks of one x are a cluster. */
template <class KERNEL, class... ARGS>
qv_status launch_mixer(const char *name, KERNEL *kernel, dim3 grid, unsigned threads, void *stream,
                       ARGS... args)
{
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = grid.x;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = (cudaStream_t)stream;
    config.attrs = attributes;
    config.numAttrs = grid.x > 1 ? 2 : 1;
    cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: %s: %s", name, cudaGetErrorString(error));
    return qv_k_check_launch(name);
}

} // namespace

#endif
