/* RMS norms over the last dimension, four kinds of one kernel. A row is read once, kept in
 * registers as up to NV vectors of 8 a thread, and written once: bound by bandwidth (4 bytes an
 * element, 8 when a second tensor is read or the residual is written too), at decode by the latency
 * of one pass. Short rows (heads) take a warp each, 8 to a block; long ones a block.
 */
#include "kernels/device.cuh"
#include "kernels/kernels_dense.h"

namespace
{

struct norm_args {
    qv_k_rows x, z, y;
    const float *w;
    int64_t n_rows, n, d;
    float eps;
    bool plus_one;
};

__device__ __forceinline__ bf16 *row_of(const qv_k_rows &r, int64_t token, int64_t head)
{
    return (bf16 *)r.data + token * r.token + head * r.head;
}

__device__ __forceinline__ float silu(float x)
{
    return x / (1.0f + expf(-x));
}

__device__ __forceinline__ float round_bf16(float x)
{
    return __bfloat162float(__float2bfloat16(x));
}

/* What enters the sum of squares. */
template <qv_k_norm_kind KIND> __device__ __forceinline__ float enter(float x, float z)
{
    if (KIND == QV_K_NORM_ADD)
        return round_bf16(x + z);
    return KIND == QV_K_GATE_THEN_NORM ? x * silu(z) : x;
}

template <qv_k_norm_kind KIND> __device__ __forceinline__ float leave(float v, float w, float z)
{
    return KIND == QV_K_NORM_THEN_GATE ? v * w * silu(z) : v * w;
}

template <qv_k_norm_kind KIND>
__device__ __forceinline__ const float *gain_of(const norm_args &c, int64_t head)
{
    return KIND == QV_K_GATE_THEN_NORM ? c.w + head * c.d : c.w;
}

/* ROWS rows to a block of 256 threads, each row by 256 / ROWS threads. */
template <qv_k_norm_kind KIND, int NV, int ROWS>
__global__ void __launch_bounds__(256) norm_vector_kernel(norm_args c)
{
    constexpr int WIDTH = 256 / ROWS;
    let_next_start();
    __shared__ float shared[8];
    int lane = threadIdx.x % WIDTH;
    int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / WIDTH;
    bool alive = row < c.n_rows; /* no early exit: all threads meet in block_sum */
    int64_t token = alive ? row / c.n : 0, head = alive ? row % c.n : 0;
    bf16 *x = row_of(c.x, token, head);
    const bf16 *z = KIND == QV_K_NORM ? x : row_of(c.z, token, head);
    bf16 *y = row_of(c.y, token, head);
    const float *w = gain_of<KIND>(c, head);

    float v[NV][8], second[KIND == QV_K_NORM_THEN_GATE ? NV : 1][8], squares = 0;
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (lane + j * WIDTH) * 8;
        if (!alive || i >= c.d)
            continue;
        float zs[8] = {};
        unpack8(*(const bf16x8 *)(x + i), v[j]);
        if (KIND != QV_K_NORM)
            unpack8(*(const bf16x8 *)(z + i), zs);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            v[j][k] = enter<KIND>(v[j][k], zs[k]);
            squares = fmaf(v[j][k], v[j][k], squares);
            if (KIND == QV_K_NORM_THEN_GATE)
                second[j][k] = zs[k];
        }
        if (KIND == QV_K_NORM_ADD)
            *(bf16x8 *)(x + i) = pack8(v[j]);
    }
    squares = ROWS == 8 ? warp_sum(squares) : block_sum(squares, shared);
    float scale = 1.0f / sqrtf(squares / (float)c.d + c.eps);
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (lane + j * WIDTH) * 8;
        if (!alive || i >= c.d)
            continue;
        float out[8];
        float4 w0 = *(const float4 *)(w + i), w1 = *(const float4 *)(w + i + 4);
        float g[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
#pragma unroll
        for (int k = 0; k < 8; k++)
            out[k] = leave<KIND>(v[j][k] * scale, c.plus_one ? 1.0f + g[k] : g[k],
                                 KIND == QV_K_NORM_THEN_GATE ? second[j][k] : 0.0f);
        *(bf16x8 *)(y + i) = pack8(out);
    }
}

/* Any length and alignment. The entered values are computed again in the second pass, but for the
 * residual, which is there. */
template <qv_k_norm_kind KIND> __global__ void __launch_bounds__(256) norm_any_kernel(norm_args c)
{
    __shared__ float shared[8];
    int64_t token = blockIdx.x / c.n, head = blockIdx.x % c.n;
    bf16 *x = row_of(c.x, token, head);
    const bf16 *z = KIND == QV_K_NORM ? x : row_of(c.z, token, head);
    bf16 *y = row_of(c.y, token, head);
    const float *w = gain_of<KIND>(c, head);
    float squares = 0;
    for (int64_t i = threadIdx.x; i < c.d; i += 256) {
        float v = enter<KIND>(to_float(x[i]), to_float(z[i]));
        if (KIND == QV_K_NORM_ADD)
            x[i] = __float2bfloat16(v);
        squares = fmaf(v, v, squares);
    }
    squares = block_sum(squares, shared);
    float scale = 1.0f / sqrtf(squares / (float)c.d + c.eps);
    for (int64_t i = threadIdx.x; i < c.d; i += 256) { /* each thread reads what it wrote itself */
        float zi = to_float(z[i]);
        float v = KIND == QV_K_NORM_ADD ? to_float(x[i]) : enter<KIND>(to_float(x[i]), zi);
        y[i] = __float2bfloat16(leave<KIND>(v * scale, c.plus_one ? 1.0f + w[i] : w[i], zi));
    }
}

bool aligned(const qv_k_rows &r)
{
    return (uintptr_t)r.data % 16 == 0 && r.token % 8 == 0 && r.head % 8 == 0;
}

template <qv_k_norm_kind KIND> void launch(const norm_args &c, bool vector, cudaStream_t stream)
{
    unsigned rows = (unsigned)c.n_rows;
    if (!vector || c.d > 8192)
        norm_any_kernel<KIND><<<rows, 256, 0, stream>>>(c);
    else if (c.d <= 256)
        norm_vector_kernel<KIND, 1, 8><<<(rows + 7) / 8, 256, 0, stream>>>(c);
    else if (c.d <= 2048)
        norm_vector_kernel<KIND, 1, 1><<<rows, 256, 0, stream>>>(c);
    else if (c.d <= 4096)
        norm_vector_kernel<KIND, 2, 1><<<rows, 256, 0, stream>>>(c);
    else
        norm_vector_kernel<KIND, 4, 1><<<rows, 256, 0, stream>>>(c);
}

} // namespace

qv_status qv_k_norm(qv_k_norm_kind kind, qv_k_extent extent, qv_k_rows x, qv_k_rows z, qv_k_rows y,
                    const float *w, float eps, bool plus_one, void *stream)
{
    norm_args c = {x, z, y, w, extent.n_tokens * extent.n, extent.n, extent.d, eps, plus_one};
    bool vector = extent.d % 8 == 0 && aligned(x) && aligned(y) && (uintptr_t)w % 16 == 0 &&
                  (kind == QV_K_NORM || aligned(z));
    cudaStream_t s = (cudaStream_t)stream;
    switch (kind) {
    case QV_K_NORM:
        launch<QV_K_NORM>(c, vector, s);
        break;
    case QV_K_NORM_ADD:
        launch<QV_K_NORM_ADD>(c, vector, s);
        break;
    case QV_K_NORM_THEN_GATE:
        launch<QV_K_NORM_THEN_GATE>(c, vector, s);
        break;
    case QV_K_GATE_THEN_NORM:
        launch<QV_K_GATE_THEN_NORM>(c, vector, s);
        break;
    }
    return qv_k_check_launch("norm");
}
