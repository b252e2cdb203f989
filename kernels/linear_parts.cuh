/* What the products of decode share: what a warp takes of W straight from memory (linear.cu,
 * joined_linear.cu), adapters in units of 16 ranks (stream_linear.cu, decode_linear.cu), and
 * results four rows at a time.
 */
#ifndef QV_KERNELS_LINEAR_PARTS_CUH
#define QV_KERNELS_LINEAR_PARTS_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_linear.h"

namespace
{

/* --- Pieces of W -------------------------------------------------------------------------- */

constexpr int PIECE = 128; /* of k: 8 loads of W a thread in flight */

/* What one warp takes of W at a time: 16 rows, PIECE of k. Thread t of four has k = 8 t .. 8 t + 7
 * of each 32. */
struct piece {
    uint4 upper[4], lower[4]; /* rows g and g + 8 */
};

template <typename INDEX>
__device__ __forceinline__ void load_piece(piece &to, const bf16 *upper, const bf16 *lower, INDEX k,
                                           INDEX n_in)
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        bool in = k + j * 32 < n_in; /* n_in is a multiple of 32 */
        to.upper[j] = in ? load_stream(upper + k + j * 32) : uint4{};
        to.lower[j] = in ? load_stream(lower + k + j * 32) : uint4{};
    }
}

/* acc += the piece's 32 of k number j times those of 8 tokens, of which x are this thread's. */
__device__ __forceinline__ void multiply_piece(const piece &w, int j, const bf16 *x,
                                               float (&acc)[4])
{
    const uint32_t first[4] = {w.upper[j].x, w.lower[j].x, w.upper[j].y, w.lower[j].y};
    const uint32_t second[4] = {w.upper[j].z, w.lower[j].z, w.upper[j].w, w.lower[j].w};
    uint4 b = *(const uint4 *)x;
    mma(acc, first, b.x, b.y);
    mma(acc, second, b.z, b.w);
}

/* --- Adapters ----------------------------------------------------------------------------- */

constexpr int RANKS = 16; /* of a unit */

/* The most slices that `rows` rows from a multiple of so many on touch. */
inline int most_slices(const qv_k_slices &s, int rows)
{
    int most = 0;
    for (int i = 0; i < s.n; i++) {
        int64_t row0 = s.start[i] / rows * rows;
        int first = i, last = i;
        while (first > 0 && s.start[first] > row0)
            first--;
        while (last + 1 < s.n && s.start[last + 1] < row0 + rows)
            last++;
        most = last - first + 1 > most ? last - first + 1 : most;
    }
    return most;
}

/* --- Results ------------------------------------------------------------------------------ */

__device__ __forceinline__ void add4(float4 &a, const float4 &b)
{
    a.x += b.x;
    a.y += b.y;
    a.z += b.z;
    a.w += b.w;
}

/* Rows from `row` on of a token, those that there are. */
__device__ __forceinline__ void store4(const qv_k_linear_args &c, int64_t token, int64_t row,
                                       const float4 &v)
{
    int64_t at = token * c.y_stride + row;
    const float f[4] = {v.x, v.y, v.z, v.w};
    bool whole = row + 4 <= c.n_out;
    if (c.y_f32) {
        float *y = (float *)c.y + at;
        if (whole && (uintptr_t)y % 16 == 0)
            *(float4 *)y = v;
        else
            for (int i = 0; i < 4 && row + i < c.n_out; i++)
                y[i] = f[i];
        return;
    }
    bf16 *y = (bf16 *)c.y + at;
    if (whole && (uintptr_t)y % 8 == 0)
        *(uint2 *)y = make_uint2(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]));
    else
        for (int i = 0; i < 4 && row + i < c.n_out; i++)
            y[i] = __float2bfloat16(f[i]);
}

} // namespace

#endif
