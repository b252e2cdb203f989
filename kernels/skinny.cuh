/* A few rows of x against many rows of a matrix: what is memory bound on the matrix. The matrix is
 * the left operand of m16n8k16, so that its rows fill the tile and only the rows of x are padded,
 * to 8.
 *
 * Fragments come straight from global memory: a thread loads 16 bytes, eight neighbours along k, of
 * rows g and g + 8, and of row g of x. The tensor core then sums the k's in another order than they
 * stand in, which is fine as long as both operands agree.
 *
 * A row's sum is split into SPLITS ranges of k, one per warp, added up in their order. Neither
 * depends on how many rows of x or of the matrix go together: the result of a pair of rows is
 * always the same, bit for bit.
 */
#ifndef QV_KERNELS_SKINNY_CUH
#define QV_KERNELS_SKINNY_CUH

#include "kernels/tensor_core.cuh"

namespace
{

/* Eight numbers at p, of which the first `n` exist. */
template <bool ALIGNED> __device__ __forceinline__ uint4 load_x8(const bf16 *p, int64_t n)
{
    if (ALIGNED)
        return n > 0 ? *(const uint4 *)p : make_uint4(0, 0, 0, 0);
    uint32_t out[4] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < n)
            out[i / 2] |= (uint32_t)((const uint16_t *)p)[i] << (16 * (i & 1));
    return make_uint4(out[0], out[1], out[2], out[3]);
}

/* The same for what is read once: it does not stay in the L1 cache. */
template <bool ALIGNED> __device__ __forceinline__ uint4 load_w8(const bf16 *p, int64_t n)
{
    if (!ALIGNED)
        return load_x8<false>(p, n);
    uint4 v = make_uint4(0, 0, 0, 0);
    if (n > 0)
        load_once(v, p);
    return v;
}

/* acc [16 x 8 NT] += rows [0, n_rows) of w times rows [0, n_x) of x over k in [begin, end), begin a
 * multiple of 8. x is a table of row addresses. The loads of AHEAD steps of 32 fly together. One
 * warp. */
template <int NT, bool ALIGNED,
          int AHEAD = NT == 1   ? 8
                      : NT == 2 ? 4
                      : NT == 4 ? 2
                                : 1>
__device__ __forceinline__ void skinny_product(const bf16 *w, int64_t w_stride, int n_rows,
                                               const bf16 *const *x, int n_x, int64_t begin,
                                               int64_t end, float (&acc)[NT][4])
{
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const bf16 *w_low = g < n_rows ? w + g * w_stride + t * 8 : nullptr;
    const bf16 *w_high = g + 8 < n_rows ? w + (g + 8) * w_stride + t * 8 : nullptr;
    const bf16 *x_row[NT];
#pragma unroll
    for (int i = 0; i < NT; i++)
        x_row[i] = g + 8 * i < n_x ? x[g + 8 * i] + t * 8 : nullptr;
    int64_t left = end - t * 8;
    for (int64_t k = begin; k < end; k += 32 * AHEAD) {
        uint4 wl[AHEAD], wh[AHEAD], xv[AHEAD][NT];
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            int64_t at = k + 32 * s;
            wl[s] = load_w8<ALIGNED>(w_low + at, w_low ? left - at : 0);
            wh[s] = load_w8<ALIGNED>(w_high + at, w_high ? left - at : 0);
#pragma unroll
            for (int i = 0; i < NT; i++)
                xv[s][i] = load_x8<ALIGNED>(x_row[i] + at, x_row[i] ? left - at : 0);
        }
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            const uint32_t first[4] = {wl[s].x, wh[s].x, wl[s].y, wh[s].y};
            const uint32_t second[4] = {wl[s].z, wh[s].z, wl[s].w, wh[s].w};
#pragma unroll
            for (int i = 0; i < NT; i++) {
                mma(acc[i], first, xv[s][i].x, xv[s][i].y);
                mma(acc[i], second, xv[s][i].z, xv[s][i].w);
            }
        }
    }
}

/* Range `split` of `splits` of [0, n), cut at multiples of 32. */
__device__ __forceinline__ void split_range(int64_t n, int split, int splits, int64_t &begin,
                                            int64_t &end)
{
    int64_t steps = (n + 31) / 32;
    begin = min(n, steps * split / splits * 32);
    end = min(n, steps * (split + 1) / splits * 32);
}

} // namespace

#endif
