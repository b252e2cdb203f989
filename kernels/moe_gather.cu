/* Rows of tokens in the order of the experts' pairs: bound by writing them. A row is read once, for
 * all of its token's pairs. */
#include "kernels/device.cuh"
#include "kernels/kernels_moe.h"

namespace
{

constexpr int THREADS = 256;

/* A block a token. `n` and the strides are in pieces of 16 bytes. */
__global__ void __launch_bounds__(THREADS)
    gather_kernel(qv_k_list list, const uint4 *x, int64_t x_stride, uint4 *y, int64_t y_stride,
                  int32_t n)
{
    int64_t token = blockIdx.x;
    const int32_t *places = list.place + token * list.top_k;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        uint4 v = x[token * x_stride + i];
        for (int j = 0; j < list.top_k; j++) {
            int place = places[j];
            if (place >= 0)
                y[place * y_stride + i] = v;
        }
    }
}

} // namespace

qv_status qv_k_moe_gather(const qv_k_list *list, const void *x, int64_t x_stride, void *y,
                          int64_t y_stride, int64_t n, void *stream)
{
    gather_kernel<<<(unsigned)list->n_tokens, THREADS, 0, (cudaStream_t)stream>>>(
        *list, (const uint4 *)x, x_stride / 8, (uint4 *)y, y_stride / 8, (int32_t)(n / 8));
    return qv_k_check_launch("moe_gather");
}
