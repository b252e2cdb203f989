/* One token of a recurrent layer, in the parts that the kernels of decode are made of: gdn.cu,
 * ssd.cu, and recurrent.cuh for any shape.
 */
#ifndef QV_KERNELS_RECURRENT_STEP_CUH
#define QV_KERNELS_RECURRENT_STEP_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_recurrent.h"
#include "kernels/tensor_core.cuh"

namespace
{

/* --- Gates -------------------------------------------------------------------------------- */

struct gate {
    float g, beta; /* log of the decay; beta of the delta rule, dt of SSD */
};

/* What a head's gates are made of at a token. */
struct gate_inputs {
    float a, b, a_log, dt_bias;
};

template <bool DELTA>
__device__ __forceinline__ gate_inputs gate_inputs_of(const qv_k_recurrent_args &c, int64_t t,
                                                      int head)
{
    gate_inputs in;
    in.a = to_float(((const bf16 *)c.a.data)[t * c.a.token + head]);
    in.b = DELTA ? to_float(((const bf16 *)c.b.data)[t * c.b.token + head]) : 0.0f;
    in.a_log = c.a_log[head];
    in.dt_bias = c.dt_bias[head];
    return in;
}

template <bool DELTA>
__device__ __forceinline__ gate gate_from(const qv_k_recurrent_args &c, const gate_inputs &in)
{
    float dt = softplus(in.a + in.dt_bias);
    gate out;
    if (DELTA) {
        out.beta = sigmoid(in.b);
    } else {
        dt = dt < c.dt_min ? c.dt_min : dt > c.dt_max ? c.dt_max : dt;
        out.beta = dt;
    }
    out.g = -expf(in.a_log) * dt;
    return out;
}

template <bool DELTA> __device__ gate gate_of(const qv_k_recurrent_args &c, int64_t t, int head)
{
    return gate_from<DELTA>(c, gate_inputs_of<DELTA>(c, t, head));
}

/* Where a head's state starts. */
__device__ __forceinline__ float *state_of(const qv_k_steps &s, const qv_k_recurrent_args &c,
                                           int seq, int head)
{
    int64_t slot = s.state_slot[seq];
    return c.state + (slot * c.n_v_heads + head) * c.d_k * c.d_v;
}

template <typename T = const bf16>
__device__ __forceinline__ T *row_of(const qv_k_heads &v, int64_t t, int head)
{
    return (T *)v.data + t * v.token + head * v.head;
}

/* --- Any shape: 32 columns of S in shared memory as [d_k][32], rows dealt to four warps ------ */

constexpr int MAX_D_K = 256;

/* q or k of a head by a warp; that of the delta rule is scaled to norm `factor`. */
template <bool DELTA>
__device__ __forceinline__ void load_any_key(const bf16 *from, int d_k, float factor, float *to)
{
    int lane = threadIdx.x & 31;
    float sum = 0, scale = 1;
    for (int i = lane; i < d_k; i += 32)
        sum += to_float(from[i]) * to_float(from[i]);
    if (DELTA)
        scale = factor / sqrtf(warp_sum(sum) + 1e-6f);
    for (int i = lane; i < d_k; i += 32)
        to[i] = to_float(from[i]) * scale;
}

/* A warp's part of S^T k before S has faded; `column` is the lane's. */
__device__ __forceinline__ float any_seen(const float *column, const float *k, int d_k, int warp)
{
    float seen = 0;
    for (int i = warp; i < d_k; i += 4)
        seen = fmaf(k[i], column[i * 32], seen);
    return seen;
}

/* S = decay S + k e; a warp's part of S^T q. */
__device__ __forceinline__ float any_update(float *column, const float *q, const float *k, int d_k,
                                            int warp, float decay, float e)
{
    float out = 0;
    for (int i = warp; i < d_k; i += 4) {
        float cell = fmaf(k[i], e, decay * column[i * 32]);
        column[i * 32] = cell;
        out = fmaf(q[i], cell, out);
    }
    return out;
}

__device__ __forceinline__ float any_total(const float (&parts)[4][32], int lane)
{
    return parts[0][lane] + parts[1][lane] + parts[2][lane] + parts[3][lane];
}

/* --- Delta rule, 128 x 128: 32 columns of S in registers ------------------------------------
 *
 * One pass over the state: with S' the faded state, e = beta (v - S'^T k) and o = S'^T q + (k . q)
 * e, so both products are sums over the same registers, and S' + k e^T is stored from them. Thread
 * (rows r = 16 i + thread / 8, columns 4 (thread % 8)..) of 128 has 8 x 4 cells. */

constexpr int STEP_D = 128; /* d_k and d_v of the fast step */

/* q or k of a head, four numbers a lane, scaled to norm `factor`. */
__device__ __forceinline__ void put_unit(uint2 raw, float factor, float *to, int lane)
{
    float x[4] = {bf16_low(raw.x), bf16_high(raw.x), bf16_low(raw.y), bf16_high(raw.y)};
    float scale =
        factor / sqrtf(warp_sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]) + 1e-6f);
    *(float4 *)(to + lane * 4) =
        make_float4(x[0] * scale, x[1] * scale, x[2] * scale, x[3] * scale);
}

__device__ __forceinline__ void load_unit(const bf16 *from, float factor, float *to, int lane)
{
    put_unit(*(const uint2 *)(from + lane * 4), factor, to, lane);
}

/* S^T k, S^T q and k . q over the rows of a warp: sum[0..3], [4..7], [8], in lanes 0 to 7. */
__device__ __forceinline__ void delta_products(const float4 (&cell)[8], const float *q,
                                               const float *k, int row, float (&sum)[9])
{
    float4 seen = make_float4(0, 0, 0, 0), read = seen;
    float kq = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float ki = k[i * 16 + row], qi = q[i * 16 + row];
        seen.x = fmaf(ki, cell[i].x, seen.x);
        seen.y = fmaf(ki, cell[i].y, seen.y);
        seen.z = fmaf(ki, cell[i].z, seen.z);
        seen.w = fmaf(ki, cell[i].w, seen.w);
        read.x = fmaf(qi, cell[i].x, read.x);
        read.y = fmaf(qi, cell[i].y, read.y);
        read.z = fmaf(qi, cell[i].z, read.z);
        read.w = fmaf(qi, cell[i].w, read.w);
        kq = fmaf(ki, qi, kq);
    }
    sum[0] = seen.x, sum[1] = seen.y, sum[2] = seen.z, sum[3] = seen.w;
    sum[4] = read.x, sum[5] = read.y, sum[6] = read.z, sum[7] = read.w;
    sum[8] = kq;
#pragma unroll
    for (int i = 0; i < 9; i++) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 8);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 16);
    }
}

/* The same over all rows, to all threads. All 128 threads, of whom it is `thread`, with `sums` of
 * shared memory of their own; one barrier of the block. */
__device__ __forceinline__ void delta_sums(const float4 (&cell)[8], const float *q, const float *k,
                                           int thread, float (*sums)[8][12], float (&sum)[9])
{
    int lane = thread & 31;
    delta_products(cell, q, k, thread >> 3, sum);
    if (lane < 8)
#pragma unroll
        for (int i = 0; i < 9; i++)
            sums[thread >> 5][lane][i] = sum[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 9; i++)
        sum[i] = sums[0][thread & 7][i] + sums[1][thread & 7][i] + sums[2][thread & 7][i] +
                 sums[3][thread & 7][i];
}

/* e of four columns from the sums over all rows and v, four BF16 numbers. */
__device__ __forceinline__ void delta_error(const float (&sum)[9], uint2 raw, float decay,
                                            float beta, float (&e)[4])
{
    float v[4] = {bf16_low(raw.x), bf16_high(raw.x), bf16_low(raw.y), bf16_high(raw.y)};
#pragma unroll
    for (int i = 0; i < 4; i++)
        e[i] = beta * (v[i] - decay * sum[i]);
}

/* o of four columns. */
__device__ __forceinline__ uint2 delta_output(const float (&sum)[9], float decay,
                                              const float (&e)[4])
{
    uint2 out;
    out.x = pack_bf16(fmaf(sum[8], e[0], decay * sum[4]), fmaf(sum[8], e[1], decay * sum[5]));
    out.y = pack_bf16(fmaf(sum[8], e[2], decay * sum[6]), fmaf(sum[8], e[3], decay * sum[7]));
    return out;
}

__device__ __forceinline__ void delta_update(float4 (&cell)[8], const float *k, int row,
                                             const float (&e)[4], float decay)
{
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float ki = k[i * 16 + row];
        cell[i].x = fmaf(ki, e[0], decay * cell[i].x);
        cell[i].y = fmaf(ki, e[1], decay * cell[i].y);
        cell[i].z = fmaf(ki, e[2], decay * cell[i].z);
        cell[i].w = fmaf(ki, e[3], decay * cell[i].w);
    }
}

/* --- Mamba-2, n_state 128: eight rows of S in the registers of a warp ------------------------ */

constexpr int STEP_STATE = 128; /* a row of S is one float4 a lane */
constexpr int STEP_ROWS = 8;    /* rows of S a warp keeps in registers */

/* A lane's part of a row: S = decay S + in B; of S C. */
__device__ __forceinline__ float update_row(float4 &cell, float in, float decay,
                                            const float (&b)[4], const float (&c)[4])
{
    cell.x = fmaf(in, b[0], decay * cell.x);
    cell.y = fmaf(in, b[1], decay * cell.y);
    cell.z = fmaf(in, b[2], decay * cell.z);
    cell.w = fmaf(in, b[3], decay * cell.w);
    return fmaf(cell.x, c[0], fmaf(cell.y, c[1], fmaf(cell.z, c[2], cell.w * c[3])));
}

/* Sums of eight rows over the lanes, which fold into eighths, one row each: lane l ends with row
 * l / 4's sum in sum[0]. */
__device__ __forceinline__ void fold_rows(float (&sum)[STEP_ROWS])
{
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int width = 4; width > 0; width >>= 1)
#pragma unroll
        for (int i = 0; i < width; i++) {
            bool upper = lane & (width * 4);
            float give = upper ? sum[i] : sum[i + width];
            float keep = upper ? sum[i + width] : sum[i];
            sum[i] = keep + __shfl_xor_sync(0xffffffffu, give, width * 4);
        }
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 2);
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 1);
}

} // namespace

#endif
