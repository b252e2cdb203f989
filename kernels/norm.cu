/* RMS norms over the last dimension: three kinds of one kernel, and the one of the residual stream,
 * which adds to it first. A row is read once, kept in
 * registers as up to NV vectors of 8 a thread, and written once: bound by bandwidth (4 bytes an
 * element, 6 when a second tensor is read, 14 of the residual), at decode by the latency of one
 * pass. Short rows (heads) take a warp or half of one each; long ones a block.
 */
#include "kernels/add_norm.cuh"
#include "kernels/norm_row.cuh"

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

/* What enters the sum of squares. */
template <qv_k_norm_kind KIND> __device__ __forceinline__ float enter(float x, float z)
{
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
    uint32_t row = blockIdx.x * ROWS + threadIdx.x / WIDTH, n = (uint32_t)c.n;
    bool alive = row < c.n_rows; /* no early exit: all threads meet in block_sum */
    uint32_t token = alive ? row / n : 0, head = alive ? row - token * n : 0;
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
    }
    squares = WIDTH <= 32 ? lanes_sum<WIDTH>(squares) : block_sum(squares, shared);
    float scale = norm_scale(squares, c.d, c.eps);
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
        __stwb((uint4 *)(y + i), pack8(out).u); /* of a plain store the compiler makes four */
    }
}

/* Any length and alignment. The entered values are computed again in the second pass. */
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
        squares = fmaf(v, v, squares);
    }
    squares = block_sum(squares, shared);
    float scale = norm_scale(squares, c.d, c.eps);
    for (int64_t i = threadIdx.x; i < c.d; i += 256) { /* each thread reads what it wrote itself */
        float zi = to_float(z[i]);
        float v = enter<KIND>(to_float(x[i]), zi);
        y[i] = __float2bfloat16(leave<KIND>(v * scale, c.plus_one ? 1.0f + w[i] : w[i], zi));
    }
}

/* --- The residual stream ------------------------------------------------------------------ */

/* A block a token. */
template <int NV>
__global__ void __launch_bounds__(256) add_norm_vector_kernel(qv_k_add_norm_args c)
{
    begin_add_norm<NV>(c);
    __shared__ float shared[8];
    int64_t t = blockIdx.x;
    float *residual = c.residual + t * c.residual_stride;
    const float *delta = c.delta ? c.delta + t * c.delta_stride : nullptr;
    float v[NV][8];
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (threadIdx.x + j * 256) * 8;
        if (i >= c.d)
            continue;
        load8(residual + i, v[j]);
        if (delta) {
            float add[8];
            load8(delta + i, add);
#pragma unroll
            for (int k = 0; k < 8; k++)
                v[j][k] += add[k];
            store8(residual + i, v[j]);
        }
    }
    finish_add_norm<NV>(c, t, v, shared);
}

/* Bit for bit add_norm_vector_kernel without a delta, and a product of y with one row. */
template <int NV>
__global__ void __launch_bounds__(256)
    norm_gate_kernel(const __grid_constant__ qv_k_add_norm_args c,
                     const __grid_constant__ qv_k_norm_gate gate)
{
    begin_add_norm<NV>(c);
    __shared__ float shared[8], more[8];
    int64_t t = blockIdx.x;
    const float *residual = c.residual + t * c.residual_stride;
    uint4 w[NV] = {}; /* on its way while the block adds up */
    float v[NV][8], sum = 0;
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (threadIdx.x + j * 256) * 8;
        if (i >= c.d)
            continue;
        load8(residual + i, v[j]);
        w[j] = *(const uint4 *)((const bf16 *)gate.w + i);
    }
    finish_add_norm<NV>(c, t, v, shared);
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (threadIdx.x + j * 256) * 8;
        if (i >= c.d)
            continue;
        float y[8], of[8];
        unpack8(*(const bf16x8 *)((const bf16 *)c.y + t * c.y_stride + i), y); /* its own */
        unpack8(bf16x8{w[j]}, of);
#pragma unroll
        for (int k = 0; k < 8; k++)
            sum = fmaf(y[k], of[k], sum);
    }
    sum = block_sum(sum, more);
    if (threadIdx.x == 0)
        ((bf16 *)gate.out)[t * gate.stride] = __float2bfloat16(sum);
}

/* Any length and alignment. Each thread reads what it wrote itself. */
__global__ void __launch_bounds__(256) add_norm_any_kernel(qv_k_add_norm_args c)
{
    __shared__ float shared[8];
    int64_t t = blockIdx.x;
    float *residual = c.residual + t * c.residual_stride, squares = 0;
    for (int64_t i = threadIdx.x; i < c.d; i += 256) {
        float v = residual[i] + (c.delta ? c.delta[t * c.delta_stride + i] : 0.0f);
        residual[i] = v;
        squares = fmaf(v, v, squares);
    }
    squares = block_sum(squares, shared);
    float scale = norm_scale(squares, c.d, c.eps);
    for (int64_t i = threadIdx.x; i < c.d; i += 256) {
        float out = residual[i] * scale * (c.plus_one ? 1.0f + c.w[i] : c.w[i]);
        bf16 rounded = __float2bfloat16(out);
        ((bf16 *)c.y)[t * c.y_stride + i] = rounded;
        if (c.rest)
            ((bf16 *)c.rest)[t * c.rest_stride + i] = __float2bfloat16(out - to_float(rounded));
    }
}

bool aligned(const qv_k_rows &r)
{
    return (uintptr_t)r.data % 16 == 0 && r.token % 8 == 0 && r.head % 8 == 0;
}

template <qv_k_norm_kind KIND> void launch(const norm_args &c, bool vector, cudaStream_t stream)
{
    unsigned rows = (unsigned)c.n_rows;
    if (!vector || c.n_rows > INT32_MAX || c.d > 8192)
        norm_any_kernel<KIND><<<rows, 256, 0, stream>>>(c);
    else if (c.d <= 128)
        norm_vector_kernel<KIND, 1, 16><<<(rows + 15) / 16, 256, 0, stream>>>(c);
    else if (c.d <= 256)
        norm_vector_kernel<KIND, 1, 8><<<(rows + 7) / 8, 256, 0, stream>>>(c);
    else if (c.d <= 512)
        norm_vector_kernel<KIND, 2, 8><<<(rows + 7) / 8, 256, 0, stream>>>(c);
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
    case QV_K_NORM_THEN_GATE:
        launch<QV_K_NORM_THEN_GATE>(c, vector, s);
        break;
    case QV_K_GATE_THEN_NORM:
        launch<QV_K_GATE_THEN_NORM>(c, vector, s);
        break;
    }
    return qv_k_check_launch("norm");
}

qv_status qv_k_add_norm(const qv_k_add_norm_args *args, void *stream)
{
    const qv_k_add_norm_args &c = *args;
    cudaStream_t on = (cudaStream_t)stream;
    unsigned rows = (unsigned)c.n_tokens;
    bool early = rows <= EARLY_ROWS;
    cudaError_t error = cudaSuccess;
    if (!add_norm_vectors(c))
        add_norm_any_kernel<<<rows, 256, 0, on>>>(c);
    else if (c.d <= 2048)
        error = launch_early(early, add_norm_vector_kernel<1>, rows, 256, 0, stream, c);
    else if (c.d <= 4096)
        error = launch_early(early, add_norm_vector_kernel<2>, rows, 256, 0, stream, c);
    else
        error = launch_early(early, add_norm_vector_kernel<4>, rows, 256, 0, stream, c);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: add_norm: %s", cudaGetErrorString(error));
    return qv_k_check_launch("add_norm");
}

bool qv_k_norm_gate_can(const qv_k_add_norm_args *args, const qv_k_norm_gate *gate)
{
    return add_norm_vectors(*args) && (uintptr_t)gate->w % 16 == 0;
}

qv_status qv_k_norm_with_gate(const qv_k_add_norm_args *args, const qv_k_norm_gate *gate,
                              void *stream)
{
    const qv_k_add_norm_args &c = *args;
    unsigned rows = (unsigned)c.n_tokens;
    auto kernel = c.d <= 2048   ? norm_gate_kernel<1>
                  : c.d <= 4096 ? norm_gate_kernel<2>
                                : norm_gate_kernel<4>;
    cudaError_t error = launch_early(rows <= EARLY_ROWS, kernel, rows, 256, 0, stream, c, *gate);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: norm_gate: %s", cudaGetErrorString(error));
    return qv_k_check_launch("norm_gate");
}
