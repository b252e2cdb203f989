// Sums over ranks that share a device. Bytes: (n + 1) * 4 an element; bound by memory.
#include "kernels/device.cuh"
#include "kernels/kernels_comm.h"

struct rank_pointers {
    const float *p[QV_K_MAX_RANKS];
};

__global__ void sum_ranks_kernel(rank_pointers in, int n, float *out, int64_t first, int64_t end)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = first + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < end; i += step) {
        float sum = 0.0f;
        for (int r = 0; r < n; r++)
            sum += in.p[r][i];
        out[i] = sum;
    }
}

extern "C" qv_status qv_k_sum_ranks(void *const *in, int32_t n, void *out, int64_t first,
                                    int64_t end, void *stream)
{
    if (end <= first)
        return QV_OK;
    rank_pointers pointers;
    for (int32_t r = 0; r < n; r++)
        pointers.p[r] = (const float *)in[r];
    int64_t blocks = (end - first + 255) / 256;
    sum_ranks_kernel<<<(unsigned)(blocks < 1024 ? blocks : 1024), 256, 0, (cudaStream_t)stream>>>(
        pointers, n, (float *)out, first, end);
    return qv_k_check_launch("sum_ranks");
}
