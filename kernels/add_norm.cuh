/* The end of what adds to the residual stream and takes its norm, for kernels that have a token in
 * a block of 256 threads: thread i has the numbers from 8 i on, from 8 (i + 256) on, and so on.
 */
#ifndef QV_KERNELS_ADD_NORM_CUH
#define QV_KERNELS_ADD_NORM_CUH

#include "kernels/kernels_dense.h"
#include "kernels/norm_row.cuh"

namespace
{

__device__ __forceinline__ void load8(const float *p, float (&v)[8])
{
    float4 a = *(const float4 *)p, b = *(const float4 *)(p + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ __forceinline__ void store8(float *p, const float (&v)[8])
{
    *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]);
    *(float4 *)(p + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

/* v is the new residual, which the caller has stored, and `squares` the thread's part of the sum of
 * its squares. shared: 8 floats. */
template <int NV>
__device__ __forceinline__ void finish_add_norm(const qv_k_add_norm_args &c, int64_t t,
                                                const float (&v)[NV][8], float squares,
                                                float *shared)
{
    float g[NV][8]; /* on its way while the block adds up */
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (threadIdx.x + j * 256) * 8;
        if (i < c.d)
            load8(c.w + i, g[j]);
    }
    squares = block_sum(squares, shared);
    float scale = norm_scale(squares, c.d, c.eps);
    bf16 *y = (bf16 *)c.y + t * c.y_stride, *rest = (bf16 *)c.rest + t * c.rest_stride;
#pragma unroll
    for (int j = 0; j < NV; j++) {
        int i = (threadIdx.x + j * 256) * 8;
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
