/* The end of what adds to the residual stream and takes its norm, for kernels that have a token in
 * a block of THREADS threads: thread i has the numbers from 8 i on, from 8 (i + THREADS) on, and so
 * on.
 */
#ifndef QV_KERNELS_ADD_NORM_CUH
#define QV_KERNELS_ADD_NORM_CUH

#include "kernels/kernels_dense.h"
#include "kernels/norm_row.cuh"

namespace
{

__device__ __forceinline__ void store8(float *p, const float (&v)[8])
{
    *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]);
    *(float4 *)(p + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

constexpr unsigned EARLY_ROWS = 256; /* of a decode step; in prefill each block would pay for it */

/* In front of all else, of a launch that is early if it has no more than EARLY_ROWS blocks: gains,
 * which no cache has kept since the step before, are on their way while the kernel in front ends.
 */
template <int NV, int THREADS = 256>
__device__ __forceinline__ void begin_add_norm(const qv_k_add_norm_args &c)
{
    if (gridDim.x <= EARLY_ROWS) {
#pragma unroll
        for (int j = 0; j < NV; j++) {
            int i = (threadIdx.x + j * THREADS) * 8;
            if (i < c.d && threadIdx.x % 4 == 0)
                prefetch(c.w + i);
        }
        wait_for_previous();
    }
    let_next_start();
}

__device__ __forceinline__ float add_squares(const float (&v)[8], float sum)
{
#pragma unroll
    for (int k = 0; k < 8; k++)
        sum = fmaf(v[k], v[k], sum);
    return sum;
}

/* The sum of the squares of a row with a vector a thread, of more than 256 threads, in the order
 * of 256 threads: thread i goes on with the sum of thread i - 256, and its warp stands for that
 * one's. shared: 256 floats. */
template <int THREADS>
__device__ __forceinline__ float sum_squares_wide(const float (&v)[8], bool has, float *shared)
{
    constexpr int MORE = THREADS / 32 - 8; /* warps */
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    float squares = add_squares(v, 0);
    if (thread < MORE * 32)
        shared[thread] = squares;
    __syncthreads();
    if (thread >= 256) {
        squares = shared[thread - 256];
        if (has)
            squares = add_squares(v, squares);
    }
    squares = warp_sum(squares);
    __syncthreads();
    if (lane == 0 && warp >= MORE)
        shared[warp % 8] = squares;
    __syncthreads();
    return warp_sum(lane < 8 ? shared[lane] : 0.0f);
}

/* v is the new residual, which the caller has stored. shared: 8 floats, 256 of more threads. */
template <int NV, int THREADS = 256>
__device__ __forceinline__ void finish_add_norm(const qv_k_add_norm_args &c, int64_t t,
                                                const float (&v)[NV][8], float *shared)
{
    float g[NV][8], squares = 0; /* g is on its way while the block adds up */
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (threadIdx.x + j * THREADS) * 8;
        if (i < c.d)
            load8(c.w + i, g[j]);
    }
    if (THREADS > 256) {
        static_assert(THREADS <= 256 || NV == 1, "a vector a thread");
        squares = sum_squares_wide<THREADS>(v[0], threadIdx.x * 8 < c.d, shared);
    } else {
#pragma unroll
        for (int j = 0; j < NV; j++)
            if ((threadIdx.x + j * THREADS) * 8 < c.d)
                squares = add_squares(v[j], squares);
        squares = block_sum(squares, shared);
    }
    float scale = norm_scale(squares, c.d, c.eps);
    bf16 *y = (bf16 *)c.y + t * c.y_stride, *rest = (bf16 *)c.rest + t * c.rest_stride;
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (threadIdx.x + j * THREADS) * 8;
        if (i < c.d)
            store_normed(v[j], g[j], scale, c.plus_one, y + i, rest + i, c.rest != nullptr);
    }
}

/* Rows of numbers of `size` bytes on 16 bytes, NULL as well. */
inline bool rows_aligned(const void *data, int64_t stride, int size)
{
    return (uintptr_t)data % 16 == 0 && stride * size % 16 == 0;
}

/* Whether rows can be read and written in vectors of 8, and fit into registers. */
inline bool add_norm_vectors(const qv_k_add_norm_args &c)
{
    return c.d % 8 == 0 && c.d <= 8192 && rows_aligned(c.residual, c.residual_stride, 4) &&
           rows_aligned(c.delta, c.delta_stride, 4) && rows_aligned(c.y, c.y_stride, 2) &&
           rows_aligned(c.rest, c.rest_stride, 2) && (uintptr_t)c.w % 16 == 0;
}

} // namespace

#endif
