/* Sums over the blocks of a cluster that share k, of products of up to 8 tokens (stream_linear.cu,
 * joined_linear.cu). A block sends what it has of each four rows to the block that finishes them,
 * whose barrier hears of it: nobody waits for all, nor reads from far, nor stays for others to
 * read. Sums are in the order of the blocks.
 *
 * Blocks of a group, a power of two and neighbours in a cluster, share the 64 rows of a tile.
 * Columns of y are as many, or half where a row of the gate and one of up, `width` further, make
 * one; block `share` finishes its part of the columns.
 */
#ifndef QV_KERNELS_CLUSTER_SUMS_CUH
#define QV_KERNELS_CLUSTER_SUMS_CUH

#include "kernels/linear_parts.cuh"
#include "kernels/ptx_hopper.cuh"

namespace
{

constexpr int SUM_TOKENS = 8, SUM_ROWS = 64;
constexpr int MAX_SHARES = 8;       /* blocks of a group */
constexpr int PITCH = SUM_ROWS + 4; /* of sums, by token: lanes of a fragment hit different banks */

/* What comes from others, of up to TOKENS. Static shared memory: no copy of W or x is ever there.
 */
template <int TOKENS> struct cluster_sums {
    float4 fours[TOKENS * SUM_ROWS / 4];
    uint64_t came;
};

struct sum_group {
    int n, share, base; /* blocks, which this is, rank of the first in the cluster */
    int n_tokens, width;
    int shift; /* a block finishes 1 << shift fours of a token, and of each half */
};

/* Without divisions, which would stand between the last product and the result. */
__device__ __forceinline__ sum_group make_group(int n, int share, int base, int n_tokens, int width)
{
    return {n, share, base, n_tokens, width, 31 - __clz(width / 4 / n)};
}

/* Four rows as the blocks that finish them count them. */
__device__ __forceinline__ int four_at(const sum_group &g, int share, int token, int half, int four)
{
    int row = share * g.n_tokens + token;
    row = g.width < SUM_ROWS ? 2 * row + half : row;
    return (row << g.shift) + four;
}

/* All threads of all blocks of a cluster, as early as possible; and await_cluster() later. */
template <int TOKENS>
__device__ __forceinline__ void begin_sums(cluster_sums<TOKENS> &m, const sum_group &g)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0 && g.n > 1) {
        barrier_init(&m.came, 1);
        barriers_publish();
        barrier_expect(&m.came, g.n_tokens * SUM_ROWS * (int)sizeof(float));
    }
    __syncwarp();
    cluster_arrive_relaxed();
#endif
}

__device__ __forceinline__ void await_cluster()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cluster_wait();
#endif
}

/* halves: the block's own sums, [token][row], of each half of k. */
template <int TOKENS>
__device__ __forceinline__ void send_sums(cluster_sums<TOKENS> &m, const sum_group &g,
                                          const float (*halves)[SUM_TOKENS][PITCH])
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    int each = 1 << g.shift;
    for (int i = threadIdx.x; i < g.n_tokens * (SUM_ROWS / 4); i += blockDim.x) {
        int token = i / (SUM_ROWS / 4), row = i % (SUM_ROWS / 4) * 4;
        int half = row >= g.width, four = (row - half * g.width) / 4;
        float4 v = *(const float4 *)&halves[0][token][row];
        add4(v, *(const float4 *)&halves[1][token][row]);
        send_four(&m.fours[four_at(g, g.share, token, half, four & (each - 1))], v, &m.came,
                  g.base + (four >> g.shift));
    }
    barrier_wait(&m.came, 0);
#endif
}

/* Four rows, number `four` of the block's own, from the first of its columns on; of a block by
 * itself from `halves`. */
template <int TOKENS>
__device__ __forceinline__ float4 sum_four(const cluster_sums<TOKENS> &m, const sum_group &g,
                                           const float (*halves)[SUM_TOKENS][PITCH], int token,
                                           int half, int four)
{
    if (g.n == 1) {
        int row = half * g.width + four * 4;
        float4 v = *(const float4 *)&halves[0][token][row];
        add4(v, *(const float4 *)&halves[1][token][row]);
        return v;
    }
    float4 v = m.fours[four_at(g, 0, token, half, four)];
    for (int share = 1; share < g.n; share++)
        add4(v, m.fours[four_at(g, share, token, half, four)]);
    return v;
}

} // namespace

#endif
