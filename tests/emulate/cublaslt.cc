/* The part of cuBLASLt that ops/cuda calls: D = alpha A^T B + beta C with A and B in BF16, C and D
 * the same array in BF16 or float32, sums in float32.
 */
#include "tests/emulate/runtime.h"

#include "common/dtype.h"

#include <algorithm>
#include <cublasLt.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <vector>

namespace
{

struct layout {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld;
};

struct operation {
    cublasOperation_t transpose_a;
};

/* As the device rounds: any NaN becomes 0x7fff. */
uint16_t to_bf16(float f)
{
    return isnan(f) ? 0x7fff : qv_f32_to_bf16(f);
}

struct product {
    layout a, b, d;
    const uint16_t *a_data, *b_data;
    void *d_data;
    float alpha, beta;
};

constexpr uint64_t STEP = 16; /* of k; as many sums */

/* Columns of a matrix as floats, each with zeros to a multiple of STEP. */
std::vector<float> columns_of(const layout &m, const uint16_t *data, uint64_t first, uint64_t n)
{
    uint64_t pitch = (m.rows + STEP - 1) / STEP * STEP;
    std::vector<float> out(n * pitch);
    for (uint64_t col = 0; col < n; col++)
        for (uint64_t row = 0; row < m.rows; row++)
            out[col * pitch + row] = qv_bf16_to_f32(data[(first + col) * (uint64_t)m.ld + row]);
    return out;
}

float dot(const float *a, const float *b, uint64_t n)
{
    float sums[STEP] = {}, sum = 0;
    for (uint64_t k = 0; k < n; k += STEP)
        for (uint64_t i = 0; i < STEP; i++)
            sums[i] = __builtin_fmaf(a[k + i], b[k + i], sums[i]);
    for (float s : sums)
        sum += s;
    return sum;
}

void store(const product &p, uint64_t row, uint64_t col, float sum)
{
    uint64_t at = col * (uint64_t)p.d.ld + row;
    if (p.d.type == CUDA_R_32F) {
        float *d = (float *)p.d_data + at;
        *d = p.alpha * sum + (p.beta != 0 ? p.beta * *d : 0);
    } else {
        uint16_t *d = (uint16_t *)p.d_data + at;
        *d = to_bf16(p.alpha * sum + (p.beta != 0 ? p.beta * qv_bf16_to_f32(*d) : 0));
    }
}

void multiply(const product &p)
{
    constexpr uint64_t BLOCK = 64; /* columns of a: they stay in the cache */
    const std::vector<float> b = columns_of(p.b, p.b_data, 0, p.b.cols);
    uint64_t pitch = (p.a.rows + STEP - 1) / STEP * STEP;
    for (uint64_t first = 0; first < p.a.cols; first += BLOCK) {
        uint64_t n = std::min(BLOCK, p.a.cols - first);
        const std::vector<float> a = columns_of(p.a, p.a_data, first, n);
        for (uint64_t col = 0; col < p.b.cols; col++)
            for (uint64_t i = 0; i < n; i++)
                store(p, first + i, col, dot(&a[i * pitch], &b[col * pitch], pitch));
    }
}

bool can(const operation &op, const layout &a, const layout &b, const layout &c, const layout &d)
{
    return op.transpose_a == CUBLAS_OP_T && a.type == CUDA_R_16BF && b.type == CUDA_R_16BF &&
           (d.type == CUDA_R_16BF || d.type == CUDA_R_32F) && a.rows == b.rows &&
           d.rows == a.cols && d.cols == b.cols && memcmp(&c, &d, sizeof d) == 0 &&
           a.ld >= (int64_t)a.rows && b.ld >= (int64_t)b.rows && d.ld >= (int64_t)d.rows;
}

} // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    static int only_one;
    *handle = (cublasLtHandle_t)&only_one;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t)
{
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasLtGetStatusString(cublasStatus_t status)
{
    switch (status) {
    case CUBLAS_STATUS_SUCCESS:
        return "success";
    case CUBLAS_STATUS_NOT_SUPPORTED:
        return "not supported by the emulated device";
    case CUBLAS_STATUS_INVALID_VALUE:
        return "invalid value";
    default:
        return "error";
    }
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *op, cublasComputeType_t compute,
                                        cudaDataType_t scale)
{
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    *op = (cublasLtMatmulDesc_t) new operation{CUBLAS_OP_N};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t op)
{
    delete (operation *)op;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t op,
                                              cublasLtMatmulDescAttributes_t which,
                                              const void *value, size_t size)
{
    if (which != CUBLASLT_MATMUL_DESC_TRANSA || size != sizeof(cublasOperation_t))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    memcpy(&((operation *)op)->transpose_a, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *m, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld)
{
    *m = (cublasLtMatrixLayout_t) new layout{type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t m)
{
    delete (layout *)m;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    *preference = (cublasLtMatmulPreference_t) new char;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    delete (char *)preference;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t,
                                                    const void *, size_t)
{
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t op,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t, int n_wanted,
                                              cublasLtMatmulHeuristicResult_t *results, int *n)
{
    *n = 0;
    if (n_wanted < 1 || !can(*(const operation *)op, *(const layout *)a, *(const layout *)b,
                             *(const layout *)c, *(const layout *)d))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    memset(results, 0, sizeof *results);
    results->state = CUBLAS_STATUS_SUCCESS;
    *n = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t op, const void *alpha,
                              const void *a_data, cublasLtMatrixLayout_t a_layout,
                              const void *b_data, cublasLtMatrixLayout_t b_layout, const void *beta,
                              const void *c_data, cublasLtMatrixLayout_t c_layout, void *d_data,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *, void *,
                              size_t, cudaStream_t stream)
{
    const layout &a = *(const layout *)a_layout, &b = *(const layout *)b_layout;
    const layout &c = *(const layout *)c_layout, &d = *(const layout *)d_layout;
    if (c_data != d_data || !can(*(const operation *)op, a, b, c, d))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    const product p = {a,
                       b,
                       d,
                       (const uint16_t *)a_data,
                       (const uint16_t *)b_data,
                       d_data,
                       *(const float *)alpha,
                       *(const float *)beta};
    return emu::enqueue(stream, [p] { multiply(p); }) == cudaSuccess
               ? CUBLAS_STATUS_SUCCESS
               : CUBLAS_STATUS_EXECUTION_FAILED;
}

} /* extern "C" */
