/* Causal depthwise convolution with SiLU. Memory bound: each input and output once, and per
 * sequence the state read and written. Two forms: by sequence: a thread walks its channels through
 * a sequence with the window in registers. One launch; for decode, and for shapes or buffers that
 * the other does not take (y over x). by tile: tokens are cut into tiles beside each other; a tile
 * rereads the inputs before it. The state is written by a second launch, because tiles of the same
 * sequence still read the old one.
 */
#include "kernels/device.cuh"
#include "kernels/kernels_recurrent.h"
#include "kernels/norm_row.cuh"
#include "kernels/tensor_core.cuh"

namespace
{

constexpr int MAX_TAPS = 16;
constexpr int WIDE = 8;         /* channels of a thread: 16 bytes */
constexpr int WIDE_TAPS = 4;    /* taps that the wide form is made for */
constexpr int AHEAD = 4;        /* tokens of a tile that are on their way */
constexpr int TILE_TOKENS = 64; /* tokens of a tile: 3 / 64 of the inputs are read twice */

__device__ __forceinline__ void unpack(uint4 raw, float (&x)[WIDE])
{
    const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = bf16_low(w[i]);
        x[2 * i + 1] = bf16_high(w[i]);
    }
}

__device__ __forceinline__ uint4 pack(const float (&x)[WIDE])
{
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                      pack_bf16(x[6], x[7]));
}

/* --- Any shape ---------------------------------------------------------------------------- */

/* Grid (tiles of 128 channels, sequences): a channel a thread. */
__global__ void any_conv_kernel(qv_k_steps s, qv_k_conv1d_args c)
{
    int64_t channel = (int64_t)blockIdx.x * 128 + threadIdx.x;
    int seq = blockIdx.y, start = s.seq_start[seq], end = s.seq_start[seq + 1];
    int n_past = c.n_taps - 1;
    if (start >= end || channel >= c.n_channels)
        return;
    bf16 *state = (bf16 *)c.state + ((int64_t)s.state_slot[seq] * c.n_channels + channel) * n_past;
    bool fresh = s.pos[start] == 0;
    float past[MAX_TAPS], w[MAX_TAPS];
    for (int j = 0; j < n_past; j++)
        past[j] = fresh ? 0.0f : to_float(state[j]);
    for (int j = 0; j <= n_past; j++)
        w[j] = c.w[channel * c.n_taps + j];
    float bias = c.bias ? c.bias[channel] : 0.0f;
    for (int64_t t = start; t < end; t++) {
        float now = to_float(((const bf16 *)c.x)[t * c.x_stride + channel]), sum = bias;
        for (int j = 0; j < n_past; j++)
            sum = fmaf(w[j], past[j], sum);
        sum = fmaf(w[n_past], now, sum);
        for (int j = 0; j + 1 < n_past; j++)
            past[j] = past[j + 1];
        if (n_past > 0)
            past[n_past - 1] = now;
        ((bf16 *)c.y)[t * c.y_stride + channel] = __float2bfloat16(silu(sum));
    }
    for (int j = 0; j < n_past; j++)
        state[j] = __float2bfloat16(past[j]);
}

/* --- Four taps, eight channels a thread --------------------------------------------------- */

struct wide_weights {
    float w[WIDE_TAPS][WIDE], bias[WIDE];
};

__device__ __forceinline__ void load_weights(const qv_k_conv1d_args &c, int64_t channel,
                                             wide_weights &out)
{
#pragma unroll
    for (int i = 0; i < WIDE; i++) {
        float4 w = *(const float4 *)(c.w + (channel + i) * WIDE_TAPS);
        out.w[0][i] = w.x;
        out.w[1][i] = w.y;
        out.w[2][i] = w.z;
        out.w[3][i] = w.w;
        out.bias[i] = c.bias ? c.bias[channel + i] : 0.0f;
    }
}

/* State [channels][3] of eight channels: 48 bytes in a row. */
__device__ __forceinline__ void load_state(const bf16 *state, float (&past)[3][WIDE])
{
    float flat[3][WIDE];
#pragma unroll
    for (int i = 0; i < 3; i++)
        unpack(((const uint4 *)state)[i], flat[i]);
#pragma unroll
    for (int i = 0; i < WIDE; i++)
#pragma unroll
        for (int j = 0; j < 3; j++)
            past[j][i] = flat[(3 * i + j) / 8][(3 * i + j) % 8];
}

__device__ __forceinline__ void store_state(bf16 *state, const float (&past)[3][WIDE])
{
    float flat[3][WIDE];
#pragma unroll
    for (int i = 0; i < WIDE; i++)
#pragma unroll
        for (int j = 0; j < 3; j++)
            flat[(3 * i + j) / 8][(3 * i + j) % 8] = past[j][i];
#pragma unroll
    for (int i = 0; i < 3; i++)
        ((uint4 *)state)[i] = pack(flat[i]);
}

/* One token; the window moves on. */
__device__ __forceinline__ uint4 wide_token(const wide_weights &w, float (&past)[3][WIDE],
                                            uint4 raw)
{
    float now[WIDE], out[WIDE];
    unpack(raw, now);
#pragma unroll
    for (int i = 0; i < WIDE; i++) {
        float sum = fmaf(w.w[0][i], past[0][i], w.bias[i]);
        sum = fmaf(w.w[1][i], past[1][i], sum);
        sum = fmaf(w.w[2][i], past[2][i], sum);
        out[i] = silu(fmaf(w.w[3][i], now[i], sum));
        past[0][i] = past[1][i];
        past[1][i] = past[2][i];
        past[2][i] = now[i];
    }
    return pack(out);
}

__device__ __forceinline__ bf16 *wide_state(const qv_k_steps &s, const qv_k_conv1d_args &c, int seq,
                                            int64_t channel)
{
    return (bf16 *)c.state + ((int64_t)s.state_slot[seq] * c.n_channels + channel) * 3;
}

/* Grid (tiles of 128 x 8 channels, sequences). */
__global__ void __launch_bounds__(128) wide_conv_kernel(qv_k_steps s, qv_k_conv1d_args c)
{
    int64_t channel = ((int64_t)blockIdx.x * 128 + threadIdx.x) * WIDE;
    int seq = blockIdx.y, start = s.seq_start[seq], end = s.seq_start[seq + 1];
    if (start >= end || channel >= c.n_channels)
        return;
    bf16 *state = wide_state(s, c, seq, channel);
    const bf16 *x = (const bf16 *)c.x + channel;
    bf16 *y = (bf16 *)c.y + channel;
    float past[3][WIDE] = {};
    if (s.pos[start] != 0)
        load_state(state, past);
    wide_weights w;
    load_weights(c, channel, w);
    for (int64_t t = start; t < end; t++)
        *(uint4 *)(y + t * c.y_stride) = wide_token(w, past, *(const uint4 *)(x + t * c.x_stride));
    store_state(state, past);
}

/* The three inputs before token t of a sequence: from x, or from the state, or zero. */
__device__ __forceinline__ void load_past(const qv_k_steps &s, const qv_k_conv1d_args &c, int seq,
                                          int64_t start, int64_t t, int64_t channel,
                                          float (&past)[3][WIDE])
{
    float old[3][WIDE] = {};
    if (t - start < 3 && s.pos[start] != 0)
        load_state(wide_state(s, c, seq, channel), old);
#pragma unroll
    for (int j = 0; j < 3; j++) {
        int64_t from = t - 3 + j;
        if (from >= start) {
            unpack(*(const uint4 *)((const bf16 *)c.x + from * c.x_stride + channel), past[j]);
        } else {
            /* The state's last entry is token start - 1. */
            int at = (int)(from - start) + 3;
#pragma unroll
            for (int i = 0; i < WIDE; i++)
                past[j][i] = at == 0 ? old[0][i] : at == 1 ? old[1][i] : old[2][i];
        }
    }
}

/* Grid (tiles of 128 x 8 channels, tiles of tokens). */
__global__ void __launch_bounds__(128) tile_conv_kernel(qv_k_steps s, qv_k_conv1d_args c)
{
    int64_t channel = ((int64_t)blockIdx.x * 128 + threadIdx.x) * WIDE;
    int t = blockIdx.y * TILE_TOKENS, end = min(t + TILE_TOKENS, s.seq_start[s.n_seqs]);
    if (t >= end || channel >= c.n_channels)
        return;
    wide_weights w;
    load_weights(c, channel, w);
    const bf16 *x = (const bf16 *)c.x + channel;
    bf16 *y = (bf16 *)c.y + channel;
    for (int seq = range_of(s.seq_start, s.n_seqs, t); t < end; seq++) {
        int start = s.seq_start[seq], stop = min(s.seq_start[seq + 1], end);
        if (t >= stop)
            continue; /* empty */
        float past[3][WIDE];
        load_past(s, c, seq, start, t, channel, past);
        /* y is not x here, so that loads run ahead of stores: AHEAD tokens */
        uint4 ahead[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (t + i < stop)
                ahead[i] = __ldg((const uint4 *)(x + (int64_t)(t + i) * c.x_stride));
        for (; t < stop; t += AHEAD) {
            uint4 now[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                now[i] = ahead[i];
                if (t + AHEAD + i < stop)
                    ahead[i] = __ldg((const uint4 *)(x + (int64_t)(t + AHEAD + i) * c.x_stride));
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (t + i < stop)
                    *(uint4 *)(y + (int64_t)(t + i) * c.y_stride) = wide_token(w, past, now[i]);
        }
        t = stop;
    }
}

/* Grid (tiles of 128 x 8 channels, sequences): the last three inputs of each. */
__global__ void __launch_bounds__(128) keep_conv_kernel(qv_k_steps s, qv_k_conv1d_args c)
{
    int64_t channel = ((int64_t)blockIdx.x * 128 + threadIdx.x) * WIDE;
    int seq = blockIdx.y, start = s.seq_start[seq], end = s.seq_start[seq + 1];
    if (start >= end || channel >= c.n_channels)
        return;
    float past[3][WIDE];
    load_past(s, c, seq, start, end, channel, past);
    store_state(wide_state(s, c, seq, channel), past);
}

bool is_wide(const qv_k_conv1d_args &c)
{
    return c.n_taps == WIDE_TAPS && c.n_channels % WIDE == 0 && c.x_stride % WIDE == 0 &&
           c.y_stride % WIDE == 0 && (uintptr_t)c.x % 16 == 0 && (uintptr_t)c.y % 16 == 0 &&
           (uintptr_t)c.state % 16 == 0 && (uintptr_t)c.w % 16 == 0;
}

bool overlaps(const qv_k_steps &s, const qv_k_conv1d_args &c)
{
    uintptr_t x = (uintptr_t)c.x, y = (uintptr_t)c.y;
    uintptr_t x_bytes = (uintptr_t)((s.n_tokens - 1) * c.x_stride + c.n_channels) * 2;
    uintptr_t y_bytes = (uintptr_t)((s.n_tokens - 1) * c.y_stride + c.n_channels) * 2;
    return x < y + y_bytes && y < x + x_bytes;
}

} // namespace

qv_status qv_k_conv1d(const qv_k_steps *steps, const qv_k_conv1d_args *args, void *stream)
{
    const qv_k_steps &s = *steps;
    const qv_k_conv1d_args &c = *args;
    cudaStream_t on = (cudaStream_t)stream;
    if (c.n_taps > MAX_TAPS)
        return qv_fail(QV_ERR_LIMIT, "conv1d: %d taps, but %d are possible", c.n_taps, MAX_TAPS);
    unsigned tiles = (unsigned)((c.n_channels + 128 * WIDE - 1) / (128 * WIDE));
    if (!is_wide(c)) {
        any_conv_kernel<<<dim3((unsigned)((c.n_channels + 127) / 128), (unsigned)s.n_seqs), 128, 0,
                          on>>>(s, c);
    } else if (s.n_tokens <= s.n_seqs || s.max_seq_tokens == 1 || overlaps(s, c)) {
        wide_conv_kernel<<<dim3(tiles, (unsigned)s.n_seqs), 128, 0, on>>>(s, c);
    } else {
        unsigned token_tiles = (unsigned)((s.n_tokens + TILE_TOKENS - 1) / TILE_TOKENS);
        tile_conv_kernel<<<dim3(tiles, token_tiles), 128, 0, on>>>(s, c);
        keep_conv_kernel<<<dim3(tiles, (unsigned)s.n_seqs), 128, 0, on>>>(s, c);
    }
    return qv_k_check_launch("conv1d");
}
