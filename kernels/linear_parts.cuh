/* What products of few tokens share: what a warp takes of W straight from memory (linear.cu,
 * joined_linear.cu), and sums four rows at a time (joined_linear.cu, stream_linear.cu).
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

/* --- Results ------------------------------------------------------------------------------ */

__device__ __forceinline__ void add4(float4 &a, const float4 &b)
{
    a.x += b.x;
    a.y += b.y;
    a.z += b.z;
    a.w += b.w;
}

} // namespace

#endif
