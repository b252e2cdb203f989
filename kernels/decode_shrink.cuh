/* x1 = A x, by the first blocks of decode_linear.cu, while the others fetch W.
 *
 * An item is 16 ranks of a plane of one adapter by up to 8 of its tokens. Items are numbered over
 * segments and planes and dealt out to the blocks; blocks of a cluster have the same ones and share
 * k as they do for W. A stage holds 4 boxes of 64 along k, so that a block has its items long
 * before the others have W; each warp multiplies one. Sums are added over warps, then over shares,
 * in their order: x1 depends on the token and its adapter, and on how k is shared, alone.
 *
 * Blocks of W learn from a counter that x1 is complete. All blocks count themselves in: these when
 * they have written, the others when they have seen that, so that the last one, whichever it is,
 * leaves zero behind. Nobody counts before the kernel before this one is complete. Those that
 * shrink come first in the grid, and begin no later than others: where not all blocks have room at
 * once, the others wait for none that has yet to begin.
 */
#ifndef QV_KERNELS_DECODE_SHRINK_CUH
#define QV_KERNELS_DECODE_SHRINK_CUH

#include "kernels/decode_parts.cuh"
#include "kernels/lora_places.cuh"

namespace
{

constexpr int BOXES = WORKERS / 32; /* of a stage */

/* All ranks and tokens of a plane of a segment; none: n or rank is 0. */
__device__ __forceinline__ shrink_item plane_of(const qv_k_segments &s, const qv_k_lora_site &site,
                                                int number, int n_tokens)
{
    shrink_item all = {};
    int n_planes = site.ranges.n, seg = number / n_planes;
    int slot = s.seg_slot[seg], first = s.seg_start[seg];
    int n = min(s.seg_start[seg + 1], n_tokens) - first;
    if (slot < 0 || n <= 0)
        return all;
    all.plane = (uint16_t)(number % n_planes);
    all.matrix = slot * n_planes + all.plane;
    all.rank = (uint16_t)plane_rank(site.slices + (int64_t)slot * n_planes, n_planes, all.plane);
    all.first = (uint16_t)first;
    all.n = (uint16_t)n;
    return all;
}

__device__ __forceinline__ int ceiling(int a, int b)
{
    return (a + b - 1) / b;
}

/* The items of a block in a round, to m.items; returns how many there are from this round on. All
 * threads. */
template <class F>
__device__ __forceinline__ int find_items(decode_shared<F> &m, const qv_k_segments &s,
                                          const qv_k_lora_site &site, int n_tokens, int block,
                                          int n_blocks, int round)
{
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, total = 0;
    int n_planes = s.n_segs * site.ranges.n;
    for (int base = 0; base < n_planes; base += F::THREADS) {
        shrink_item all = {};
        if (base + (int)threadIdx.x < n_planes)
            all = plane_of(s, site, base + (int)threadIdx.x, n_tokens);
        int tiles = ceiling(all.n, ITEM_TOKENS), count = tiles * ceiling(all.rank, RANKS);
        int end = count; /* within the warp */
#pragma unroll
        for (int i = 1; i < 32; i <<= 1) {
            int before = __shfl_up_sync(0xffffffffu, end, i);
            end += lane >= i ? before : 0;
        }
        if (lane == 31)
            m.counts[warp] = end;
        __syncthreads();
        end += total;
        for (int i = 0; i < F::THREADS / 32; i++) {
            int n = m.counts[i];
            end += i < warp ? n : 0;
            total += n;
        }
        __syncthreads();
        int first = end - count, number = first + (block + n_blocks - first % n_blocks) % n_blocks;
        for (; number < end; number += n_blocks) {
            int index = number / n_blocks - round * ITEMS, of = number - first;
            if (index < 0 || index >= F::SHRINKS)
                continue;
            shrink_item item = all;
            item.first_rank = (uint16_t)(of / tiles * RANKS);
            item.first = (uint16_t)(all.first + of % tiles * ITEM_TOKENS);
            item.n = (uint16_t)min(ITEM_TOKENS, all.n - of % tiles * ITEM_TOKENS);
            m.items[index] = item;
        }
    }
    __syncthreads();
    return (total > block ? ceiling(total - block, n_blocks) : 0) - round * ITEMS;
}

/* --- Four warps fetch and multiply --------------------------------------------------------- */

/* By cp.async: the copy engine takes a multiprocessor's requests in turn, and these would come
 * behind all that blocks of W have asked it for. */

/* Stage `number` of a round's: which item, and where on k. */
struct shrink_stage {
    int item, step, n; /* steps of 64 along k */
};

__device__ __forceinline__ shrink_stage stage_at(const place &p, int number)
{
    int stages = ceiling(p.n_steps, BOXES), step = number % stages * BOXES;
    return {number / stages, p.first_step + step, min(BOXES, p.n_steps - step)};
}

/* Rows of 64 along k, 8 threads each, to a tile of so many rows for each step; those from `n` on as
 * zeros. */
template <int TILE_ROWS>
__device__ __forceinline__ void copy_tiles(bf16 *to, const bf16 *from, int64_t stride, int n,
                                           const shrink_stage &at, int64_t n_in)
{
    constexpr int AT_ONCE = WORKERS / 8; /* rows */
    int col = (int)threadIdx.x % 8 * 8, first = (int)threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < BOXES * TILE_ROWS / AT_ONCE; i++) {
        int all = first + i * AT_ONCE, row = all % TILE_ROWS, box = all / TILE_ROWS;
        int64_t k = (int64_t)(at.step + box) * STEP + col;
        bool there = box < at.n && row < n && k < n_in;
        copy16_stream(to + box * TILE_ROWS * STEP + tile_at<STEP>(row, col),
                      there ? from + row * stride + k : from, there);
    }
}

template <class F>
__device__ __forceinline__ void copy_a(decode_shared<F> &m, const qv_k_lora_site &site,
                                       const place &p, int number)
{
    const shrink_stage at = stage_at(p, number);
    const shrink_item &item = m.items[at.item];
    int64_t row = (int64_t)item.matrix * site.max_rank + item.first_rank;
    copy_tiles<RANKS>(m.w[number % F::STAGES], (const bf16 *)site.a + row * site.n_in, site.n_in,
                      item.rank - item.first_rank, at, site.n_in);
}

template <class F>
__device__ __forceinline__ void copy_tokens(decode_shared<F> &m, const qv_k_linear_args &c,
                                            const place &p, int number)
{
    const shrink_stage at = stage_at(p, number);
    const shrink_item &item = m.items[at.item];
    copy_tiles<ITEM_TOKENS>(m.x[number % F::STAGES], (const bf16 *)c.x + item.first * c.x_stride,
                            c.x_stride, item.n, at, c.n_in);
}

/* acc [16 ranks][8 tokens] += A x of a box. */
__device__ __forceinline__ void multiply_box(const bf16 *a, const bf16 *x, float (&acc)[4])
{
    int lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < STEP; k += 32) {
        uint32_t b[4], first[4], second[4];
        ldmatrix4(b, x + tile_at<STEP>(lane & 7, k + (lane >> 3) * 8));
        load_a<STEP>(first, a, 0, k);
        load_a<STEP>(second, a, 0, k + 16);
        mma(acc, first, b[0], b[1]);
        mma(acc, second, b[2], b[3]);
    }
}

/* An item's sums over this block's k, from those of its warps. */
template <class F>
__device__ __forceinline__ void add_warps(decode_shared<F> &m, int item, const float (&acc)[4])
{
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < 4; j++)
        m.parts[item & 1][warp][(2 * t + (j & 1)) * RANKS + g + 8 * (j >> 1)] = acc[j];
    named_barrier<WORKERS>(WORKERS_BARRIER);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < WORKERS / 32; j++)
        sum += m.parts[item & 1][j][threadIdx.x];
    m.x1[item][threadIdx.x] = sum;
}

/* The sums of a round's n items over this block's k, to m.x1. Workers. */
template <class F>
__device__ __forceinline__ void multiply_items(decode_shared<F> &m, const qv_k_linear_args &c,
                                               const qv_k_lora_site &site, const place &p, int n)
{
    constexpr int AHEAD = F::STAGES - 1;
    int stages = ceiling(p.n_steps, BOXES), all = n * stages, warp = (int)threadIdx.x >> 5;
    for (int i = 0; i < min(AHEAD, all); i++)
        copy_a(m, site, p, i);
    wait_for_previous();
    for (int i = 0; i < AHEAD; i++) {
        if (i < all)
            copy_tokens(m, c, p, i);
        copies_commit();
    }
    float acc[4] = {};
    for (int i = 0; i < all; i++) {
        copies_wait<AHEAD - 1>();
        named_barrier<WORKERS>(
            WORKERS_BARRIER); /* the stage is there; the last one has been read */
        if (i + AHEAD < all) {
            copy_a(m, site, p, i + AHEAD);
            copy_tokens(m, c, p, i + AHEAD);
        }
        copies_commit();
        if (warp < stage_at(p, i).n)
            multiply_box(m.w[i % F::STAGES] + warp * RANKS * STEP,
                         m.x[i % F::STAGES] + warp * ITEM_TOKENS * STEP, acc);
        if ((i + 1) % stages == 0) {
            add_warps(m, i / stages, acc);
            acc[0] = acc[1] = acc[2] = acc[3] = 0;
        }
    }
    copies_wait<0>();
}

/* The shares of a round's n items, added up in their order, to x1. */
template <class F>
__device__ __forceinline__ void finish_items(decode_shared<F> &m, const qv_k_lora_site &site,
                                             const place &p, int n, float *x1)
{
    constexpr int FOURS = ITEM_SUMS / 4;
    int end = n * FOURS * (p.share + 1) / p.n_shares;
    for (int i = n * FOURS * p.share / p.n_shares + (int)threadIdx.x; i < end; i += F::THREADS) {
        const shrink_item &item = m.items[i / FOURS];
        int token = i % FOURS / (RANKS / 4), rank = i % (RANKS / 4) * 4;
        const float *from = &m.x1[i / FOURS][token * RANKS + rank];
        float4 v = *(const float4 *)from;
        if (p.n_shares > 1) {
            v = load_from(from, 0);
            for (int share = 1; share < p.n_shares; share++)
                add4(v, load_from(from, share));
        }
        rank += item.first_rank;
        if (token < item.n && rank < item.rank) /* ranks beyond, up to the pool's, are not read */
            *(float4 *)(x1 +
                        ((int64_t)(item.first + token) * site.ranges.n + item.plane) *
                            site.max_rank +
                        rank) = v;
    }
}

/* --- The block ----------------------------------------------------------------------------- */

/* Blocks that have been counted in, of so many, and those that shrink. */
struct arrivals {
    uint32_t *count;
    int all, shrinks;
};

__device__ __forceinline__ void count_in(const arrivals &a)
{
    atomicInc(a.count, (unsigned)a.all - 1);
}

/* Waits until x1 is complete, and counts this block in. One thread, behind wait_for_previous(). */
__device__ __forceinline__ void wait_for_x1(const arrivals &a)
{
    while ((int)load_acquire(a.count) < a.shrinks) {
    }
    count_in(a);
}

/* A of the product that comes next, and which ranks it has, on their way to the L2 cache: there
 * they are found at once while all others wait for memory. By the blocks that would have the items.
 * All threads. */
template <class F>
__device__ __forceinline__ void fetch_ahead(decode_shared<F> &m, const qv_k_segments &s,
                                            const qv_k_lora_site &next, const place &p, int block,
                                            int n_blocks)
{
    for (int round = 0, left = 1; left > 0; round++) {
        left = find_items(m, s, next, p.n, block, n_blocks, round);
        int n = min(left, F::SHRINKS);
        if ((int)threadIdx.x < n && p.share == 0) {
            const shrink_item item = m.items[threadIdx.x];
            int64_t row = (int64_t)item.matrix * next.max_rank + item.first_rank;
            int rows = min(RANKS, item.rank - item.first_rank);
            prefetch_to_stay((const bf16 *)next.a + row * next.n_in,
                             (uint32_t)(rows * next.n_in * (int64_t)sizeof(bf16)));
            if (item.first_rank == 0 && item.plane == 0) {
                prefetch_line_to_stay(next.slices + item.matrix);
                prefetch_line_to_stay(next.slices + item.matrix + next.ranges.n - 1);
            }
        }
        left -= n;
    }
}

/* All of a block that shrinks. */
template <class F>
__device__ __forceinline__ void shrink(decode_shared<F> &m, const qv_k_linear_args &c,
                                       const qv_k_stream_lora &lora, const place &p, int block,
                                       int n_blocks, const arrivals &a)
{
    for (int round = 0, left = 1; left > 0; round++) {
        left = find_items(m, lora.segments, lora.site, p.n, block, n_blocks, round);
        int n = min(left, F::SHRINKS);
        if (n <= 0)
            break;
        if (threadIdx.x < WORKERS)
            multiply_items(m, c, lora.site, p, n);
        __syncthreads();
        if (p.n_shares > 1)
            cluster_sync();
        finish_items(m, lora.site, p, n, lora.x1);
        if (p.n_shares > 1)
            cluster_sync(); /* the others have read this block's sums */
        left -= n;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        wait_for_previous();
        __threadfence();
        count_in(a);
    }
    if (lora.next.a != nullptr)
        fetch_ahead(m, lora.segments, lora.next, p, block, n_blocks);
}

} // namespace

#endif
