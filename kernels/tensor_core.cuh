/* What kernels on the tensor cores share: fragments of mma() in BF16, tiles of shared memory that
 * ldmatrix reads without bank conflicts, and small reductions.
 *
 * A tile is [rows][COLS] of BF16 with COLS 32, 64 or 128, rows unpadded; pieces of 16 bytes are
 * permuted within each row so that eight rows of one column of pieces fall into different banks.
 *
 * Fragment layout (g = lane / 4, t = lane % 4): an accumulator holds rows g and g + 8, columns 2t
 * and 2t + 1; c[0..1] belong to row g, c[2..3] to row g + 8.
 */
#ifndef QV_KERNELS_TENSOR_CORE_CUH
#define QV_KERNELS_TENSOR_CORE_CUH

#include "kernels/ptx.cuh"

/* --- Tiles -------------------------------------------------------------------------------- */

/* Element offset of (row, col) in a tile; col is a multiple of 8 for ldmatrix and 16-byte access.
 */
template <int COLS> __device__ __forceinline__ int tile_at(int row, int col)
{
    constexpr int PIECES = COLS / 8;
    int piece = col >> 3;
    if (PIECES >= 8)
        piece ^= row & 7;
    else
        piece ^= (row >> 1) & 3;
    return row * COLS + (piece << 3) + (col & 7);
}

/* --- Fragments ---------------------------------------------------------------------------- */

/* A [16 x 16] at (row, col) of a tile stored [m][k]. */
template <int COLS>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const bf16 *tile, int row, int col)
{
    int lane = threadIdx.x & 31;
    ldmatrix4(a, tile + tile_at<COLS>(row + (lane & 15), col + (lane >> 4) * 8));
}

/* A [16 x 16] at (m, k) of a tile stored [k][m]. */
template <int COLS>
__device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], const bf16 *tile, int m, int k)
{
    int lane = threadIdx.x & 31;
    ldmatrix4_trans(
        a, tile + tile_at<COLS>(k + (lane & 7) + (lane >> 4) * 8, m + ((lane >> 3) & 1) * 8));
}

/* B [16 x 16] at (k, n), two fragments b[0..1] and b[2..3] of 8 columns, of a tile stored [n][k].
 */
template <int COLS>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const bf16 *tile, int n, int k)
{
    int lane = threadIdx.x & 31;
    ldmatrix4(b, tile + tile_at<COLS>(n + (lane & 7) + (lane >> 4) * 8, k + ((lane >> 3) & 1) * 8));
}

/* The same of a tile stored [k][n]. */
template <int COLS>
__device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], const bf16 *tile, int n, int k)
{
    int lane = threadIdx.x & 31;
    ldmatrix4_trans(b, tile + tile_at<COLS>(k + (lane & 15), n + (lane >> 4) * 8));
}

/* --- Numbers ------------------------------------------------------------------------------ */

__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&v);
}

__device__ __forceinline__ float bf16_low(uint32_t v)
{
    return __uint_as_float(v << 16);
}

__device__ __forceinline__ float bf16_high(uint32_t v)
{
    return __uint_as_float(v & 0xffff0000u);
}

/* x = high + low up to 2^-17 of x: two BF16 numbers where one would lose too much. */
__device__ __forceinline__ void split_bf16(float x, float y, uint32_t &high, uint32_t &low)
{
    high = pack_bf16(x, y);
    low = pack_bf16(x - bf16_low(high), y - bf16_high(high));
}

__device__ __forceinline__ float to_float(bf16 x)
{
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(float x)
{
    return x;
}

/* In the order of ops/cpu: softplus and sigmoid in float32, exact for large numbers. */
__device__ __forceinline__ float softplus(float x)
{
    return x > 20.0f ? x : log1pf(expf(x));
}

__device__ __forceinline__ float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int i = 16; i > 0; i >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

/* The largest i with start[i] <= x, given start[0] <= x. */
__device__ __forceinline__ int range_of(const int32_t *start, int n, int32_t x)
{
    int low = 0, high = n;
    while (high - low > 1) {
        int middle = (low + high) >> 1;
        if (start[middle] <= x)
            low = middle;
        else
            high = middle;
    }
    return low;
}

#endif
