/* Elements and rows: SwiGLU, gates, addition, squared ReLU, embedding. All bound by bandwidth: each
 * number is read once and written once, 16 bytes a thread where the rows allow it.
 */
#include "common/dtype.h"
#include "kernels/device.cuh"
#include "kernels/kernels_dense.h"

namespace
{

constexpr int THREADS = 256;

__device__ __forceinline__ int64_t offset(const qv_k_rows &r, int64_t token, int64_t head)
{
    return token * r.token + head * r.head;
}

template <qv_k_pointwise_kind KIND> __device__ __forceinline__ float apply(float a, float b)
{
    switch (KIND) {
    case QV_K_SWIGLU:
        return swiglu(a, b);
    case QV_K_SIGMOID_GATE:
        return b * sigmoid(a);
    default:
        return relu2(a);
    }
}

/* STEP numbers a thread: 8 as one vector, or 1. Divisions are what there is to compute, so INDEX is
 * of 32 bits where that is enough. */
template <qv_k_pointwise_kind KIND, int STEP, typename INDEX>
__global__ void __launch_bounds__(THREADS)
    pointwise_kernel(INDEX per_row, INDEX n, qv_k_rows a, qv_k_rows b, qv_k_rows y, INDEX total)
{
    let_next_start();
    INDEX i = (INDEX)blockIdx.x * THREADS + threadIdx.x;
    if (i >= total)
        return;
    INDEX row = i / per_row, at = (i - row * per_row) * STEP;
    INDEX token = row / n, head = row - token * n;
    const bf16 *pa = (const bf16 *)a.data + offset(a, token, head) + at;
    const bf16 *pb = KIND == QV_K_RELU2 ? pa : (const bf16 *)b.data + offset(b, token, head) + at;
    bf16 *py = (bf16 *)y.data + offset(y, token, head) + at;
    if constexpr (STEP == 1) {
        *py = __float2bfloat16(apply<KIND>(to_float(*pa), to_float(*pb)));
    } else {
        float va[8], vb[8];
        unpack8(*(const bf16x8 *)pa, va);
        unpack8(*(const bf16x8 *)pb, vb);
#pragma unroll
        for (int k = 0; k < 8; k++)
            va[k] = apply<KIND>(va[k], vb[k]);
        *(bf16x8 *)py = pack8(va);
    }
}

bool aligned(const qv_k_rows &r)
{
    return (uintptr_t)r.data % 16 == 0 && r.token % 8 == 0 && r.head % 8 == 0;
}

template <qv_k_pointwise_kind KIND, int STEP>
void launch_as(qv_k_extent e, qv_k_rows a, qv_k_rows b, qv_k_rows y, cudaStream_t stream)
{
    int64_t per_row = e.d / STEP, total = e.n_tokens * e.n * per_row;
    unsigned blocks = (unsigned)((total + THREADS - 1) / THREADS);
    if (total <= INT32_MAX) /* the last block counts further */
        pointwise_kernel<KIND, STEP, uint32_t><<<blocks, THREADS, 0, stream>>>(
            (uint32_t)per_row, (uint32_t)e.n, a, b, y, (uint32_t)total);
    else
        pointwise_kernel<KIND, STEP, uint64_t><<<blocks, THREADS, 0, stream>>>(
            (uint64_t)per_row, (uint64_t)e.n, a, b, y, (uint64_t)total);
}

template <qv_k_pointwise_kind KIND>
void launch(qv_k_extent e, qv_k_rows a, qv_k_rows b, qv_k_rows y, cudaStream_t stream)
{
    if (e.d % 8 == 0 && aligned(a) && aligned(b) && aligned(y))
        launch_as<KIND, 8>(e, a, b, y, stream);
    else
        launch_as<KIND, 1>(e, a, b, y, stream);
}

/* A block a token; STEP numbers a thread. */
template <int STEP>
__global__ void __launch_bounds__(THREADS)
    add_kernel(int64_t d, qv_k_rows x, qv_k_rows delta, qv_k_rows gate)
{
    float *row = (float *)x.data + blockIdx.x * x.token;
    const float *add = (const float *)delta.data + blockIdx.x * delta.token;
    let_next_start();
    float g = 1;
    if (gate.data)
        g = sigmoid(to_float(((const bf16 *)gate.data)[blockIdx.x * gate.token]));
    for (int64_t i = threadIdx.x * STEP; i < d; i += THREADS * STEP) {
        if constexpr (STEP == 1) {
            row[i] += add[i] * g;
        } else {
            float4 a = *(const float4 *)(row + i), b = *(const float4 *)(add + i);
            *(float4 *)(row + i) =
                make_float4(a.x + b.x * g, a.y + b.y * g, a.z + b.z * g, a.w + b.w * g);
        }
    }
}

bool aligned_f32(const qv_k_rows &r)
{
    return (uintptr_t)r.data % 16 == 0 && r.token % 4 == 0;
}

__device__ __forceinline__ void put(float *p, float v)
{
    *p = v;
}

__device__ __forceinline__ void put(bf16 *p, float v)
{
    *p = __float2bfloat16(v);
}

/* A block a row. Vectors: a BF16 table into rows as they are, or widened. */
template <typename TABLE, typename Y, bool VECTOR>
__global__ void __launch_bounds__(THREADS)
    embed_kernel(const TABLE *table, int64_t table_stride, int64_t n_rows, int64_t first,
                 const int32_t *ids, int64_t d, Y *y, int64_t y_stride)
{
    int64_t row = ids[blockIdx.x] - first;
    bool there = row >= 0 && row < n_rows;
    const TABLE *src = table + (there ? row : 0) * table_stride;
    Y *out = y + blockIdx.x * y_stride;
    if constexpr (VECTOR) {
        for (int64_t i = threadIdx.x * 8; i < d; i += THREADS * 8) {
            bf16x8 packed = there ? *(const bf16x8 *)(src + i) : bf16x8{};
            if constexpr (sizeof(Y) == 2) {
                *(bf16x8 *)(out + i) = packed;
            } else {
                float v[8];
                unpack8(packed, v);
                *(float4 *)(out + i) = make_float4(v[0], v[1], v[2], v[3]);
                *(float4 *)(out + i + 4) = make_float4(v[4], v[5], v[6], v[7]);
            }
        }
    } else {
        for (int64_t i = threadIdx.x; i < d; i += THREADS)
            put(out + i, there ? to_float(src[i]) : 0.0f);
    }
}

template <bool F32>
__global__ void __launch_bounds__(THREADS)
    fill_kernel(void *dst, int64_t n, float mean, float scale, uint64_t seed)
{
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * THREADS) {
        float v = __fadd_rn(mean, __fmul_rn(scale, qv_made_up(seed, (uint64_t)i)));
        if (F32)
            ((float *)dst)[i] = v;
        else
            ((bf16 *)dst)[i] = __float2bfloat16(v);
    }
}

} // namespace

qv_status qv_k_pointwise(qv_k_pointwise_kind kind, qv_k_extent extent, qv_k_rows a, qv_k_rows b,
                         qv_k_rows y, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    switch (kind) {
    case QV_K_SWIGLU:
        launch<QV_K_SWIGLU>(extent, a, b, y, s);
        break;
    case QV_K_SIGMOID_GATE:
        launch<QV_K_SIGMOID_GATE>(extent, a, b, y, s);
        break;
    case QV_K_RELU2:
        launch<QV_K_RELU2>(extent, a, a, y, s);
        break;
    }
    return qv_k_check_launch("pointwise");
}

qv_status qv_k_add(qv_k_extent extent, qv_k_rows x, qv_k_rows delta, qv_k_rows gate, void *stream)
{
    unsigned rows = (unsigned)extent.n_tokens;
    cudaStream_t on = (cudaStream_t)stream;
    if (extent.d % 4 == 0 && aligned_f32(x) && aligned_f32(delta))
        add_kernel<4><<<rows, THREADS, 0, on>>>(extent.d, x, delta, gate);
    else
        add_kernel<1><<<rows, THREADS, 0, on>>>(extent.d, x, delta, gate);
    return qv_k_check_launch("add");
}

qv_status qv_k_embed(const void *table, bool f32, int64_t table_stride, int64_t n_rows,
                     int64_t first, const int32_t *ids, int64_t n, int64_t d, void *y,
                     bool as_stored, int64_t y_stride, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    unsigned rows = (unsigned)n;
    bool vector = !f32 && d % 8 == 0 && table_stride % 8 == 0 && y_stride % 8 == 0 &&
                  (uintptr_t)table % 16 == 0 && (uintptr_t)y % 16 == 0;
#define EMBED(TABLE, Y, VECTOR)                                                                    \
    embed_kernel<TABLE, Y, VECTOR><<<rows, THREADS, 0, s>>>(                                       \
        (const TABLE *)table, table_stride, n_rows, first, ids, d, (Y *)y, y_stride)
    if (f32)
        EMBED(float, float, false);
    else if (as_stored && vector)
        EMBED(bf16, bf16, true);
    else if (as_stored)
        EMBED(bf16, bf16, false);
    else if (vector)
        EMBED(bf16, float, true);
    else
        EMBED(bf16, float, false);
#undef EMBED
    return qv_k_check_launch("embed");
}

qv_status qv_k_fill(void *dst, bool f32, int64_t n, float mean, float scale, uint64_t seed,
                    void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    if (f32)
        fill_kernel<true><<<2048, THREADS, 0, s>>>(dst, n, mean, scale, seed);
    else
        fill_kernel<false><<<2048, THREADS, 0, s>>>(dst, n, mean, scale, seed);
    return qv_k_check_launch("fill");
}
