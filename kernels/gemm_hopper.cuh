/* The parts of gemm_hopper.cu's matrix product: the shape of a form, what is in shared memory, the
 * order of tiles, and the parts that warps have. Only for sm_90a.
 *
 * A tile is 128 tokens by COLUMNS rows of W. Shared memory is a ring of stages, one for every 64 of
 * k: x [128][64] and W [COLUMNS][64]. Both blocks of a cluster have the same columns and tokens
 * of their own; each fetches half of W for both.
 *
 * Adapters are more of k. A step of theirs is one adapter in one slice of the columns and up to 32
 * of its ranks: B [32][COLUMNS], stored as the pool has it, where W would be, and scale * x1 of the
 * tile's tokens where x would be, as two BF16 numbers (16 bits): [128][32] high, [128][32] low.
 * The steps of a tile are those of all segments that have tokens in either block of the cluster, so
 * that both blocks go through the ring in step. What a step gives for the tokens of others is never
 * added, so that an adapter of infinities harms none but its own tokens.
 */
#ifndef QV_KERNELS_GEMM_HOPPER_CUH
#define QV_KERNELS_GEMM_HOPPER_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_gemm.h"
#include "kernels/ptx_gemm.cuh"
#include "kernels/tensor_map.cuh"
#include "kernels/wgmma_shapes.cuh"

namespace
{

constexpr int GEMM_STEP = 64;  /* of k, of a stage */
constexpr int GEMM_RANKS = 32; /* of a step of adapters */
constexpr int GEMM_UNIT = 64;  /* rows of one wgmma */
constexpr int GEMM_GROUPS = 2; /* warpgroups that multiply; one more fetches */
constexpr int GEMM_ROWS = GEMM_UNIT * GEMM_GROUPS;
constexpr int GEMM_THREADS = 128 * (GEMM_GROUPS + 1);
constexpr int GEMM_ENTRIES = 8;
constexpr int GEMM_FETCHERS = 96; /* threads that fetch for adapters: all of that but a warp */
constexpr int GEMM_OUT_BYTES = GEMM_UNIT * 128; /* results on their way: 64 rows of 128 bytes */

/* Barriers by name: 0 is __syncthreads, 1 and 2 are those of the warpgroups. */
constexpr int GEMM_LEAD_BARRIER = 3;
constexpr int GEMM_FETCH_BARRIER = 4;

/* The first warpgroup is LEAD steps ahead of the second, so that one stores while the other
 * multiplies. */
template <int COLUMNS_, int STAGES_, int CLUSTER_, int LEAD_> struct gemm_form {
    static constexpr int COLUMNS = COLUMNS_, STAGES = STAGES_, CLUSTER = CLUSTER_, LEAD = LEAD_;
    static constexpr int X = GEMM_ROWS * GEMM_STEP, W = COLUMNS * GEMM_STEP; /* numbers */
    static constexpr int STAGE_BYTES = (X + W) * (int)sizeof(bf16);
    static_assert(COLUMNS <= 256, "a box of the copy engine");
    static_assert(COLUMNS % (64 * CLUSTER) == 0, "parts of W begin at multiples of 1024 bytes");
    static_assert(LEAD > 0 && LEAD < STAGES, "a lead is within the ring");
};

/* Whom a step of adapters is for: tokens [first, end) of this block's tile and around it. */
struct gemm_step_info {
    int32_t first, end;
};

/* An adapter in a slice of the columns. */
struct gemm_entry {
    int32_t first, end; /* tokens */
    int32_t slot, col_first, col_end;
    qv_k_lora_slice slice;
};

template <class F> struct gemm_shared {
    struct {
        bf16 x[F::X], w[F::W];
    } stage[F::STAGES];
    char out[GEMM_GROUPS][2][GEMM_OUT_BYTES];
    uint64_t full[F::STAGES], empty[F::STAGES];
    uint64_t x_issued;    /* a phase a tile: the copies of its x and W are all on their way */
    uint64_t lora_issued; /* the same of its adapters */
    uint64_t plan_full[2], plan_empty[2];
    int32_t plan[2]; /* steps of adapters, of this tile and the next */
    gemm_step_info info[F::STAGES];
    gemm_entry entries[GEMM_ENTRIES]; /* of the tile whose adapters are fetched, if they fit */
};

template <class F> constexpr int GEMM_BYTES = (int)sizeof(gemm_shared<F>) + 1024;

/* By value into the kernel. */
struct gemm_args {
    int32_t n_tokens, n_out;
    int32_t steps; /* of k */
    int32_t row_tiles, col_tiles;
    int32_t band; /* row tiles that go through the columns together */
    bool y_f32;
};

/* Where a warp is in the ring. */
template <class F> struct gemm_ring {
    int at = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance()
    {
        if (++at == F::STAGES) {
            at = 0;
            phase ^= 1;
        }
    }

    __device__ __forceinline__ void skip(int n)
    {
        at += n;
        phase ^= at / F::STAGES & 1;
        at %= F::STAGES;
    }
};

/* --- Tiles -------------------------------------------------------------------------------- */

struct gemm_tile {
    int row0, col0; /* this block's first token, and first row of W */
};

/* Bands of row tiles, and within one column after column, so that what runs at a time shares rows
 * of x and of W that the L2 cache holds. `number` counts tiles of clusters. */
template <class F>
__device__ __forceinline__ gemm_tile find_tile(const gemm_args &c, int number, int rank)
{
    int of_band = c.band * c.col_tiles, first = number / of_band * c.band;
    int rows = min(c.band, c.row_tiles - first), within = number % of_band;
    return {((first + within % rows) * F::CLUSTER + rank) * GEMM_ROWS, within / rows * F::COLUMNS};
}

/* --- Fetch -------------------------------------------------------------------------------- */

/* Who waits for a stage by the parity of its phase must not be a whole round of the ring ahead of
 * what has been read: the phase before the last has the same parity. Who fetches step after step
 * never is. So who leaves steps to others goes on only when they have come so far. */

/* One thread: all of x and W. */
template <class F>
[[maybe_unused]] __device__ void gemm_fetch(const gemm_args &c, gemm_shared<F> &m,
                                            const CUtensorMap *x, const CUtensorMap *w, int cluster,
                                            int n_clusters, int rank)
{
    constexpr int PART = F::COLUMNS / F::CLUSTER; /* rows of W that this block fetches */
    constexpr uint16_t ALL = (1 << F::CLUSTER) - 1;
    gemm_ring<F> r;
    int turn = 0;
    for (int number = cluster; number < c.row_tiles * c.col_tiles; number += n_clusters, turn++) {
        gemm_tile tile = find_tile<F>(c, number, rank);
        for (int step = 0; step < c.steps; step++, r.advance()) {
            barrier_wait(&m.empty[r.at], r.phase ^ 1);
            barrier_expect(&m.full[r.at], F::STAGE_BYTES);
            copy_box_here(m.stage[r.at].x, x, step * GEMM_STEP, tile.row0, 0, &m.full[r.at]);
            bf16 *to = m.stage[r.at].w + rank * PART * GEMM_STEP;
            int row = tile.col0 + rank * PART;
            if (F::CLUSTER == 1)
                copy_box_here(to, w, step * GEMM_STEP, row, 0, &m.full[r.at]);
            else
                copy_box(to, w, step * GEMM_STEP, row, 0, &m.full[r.at], ALL);
        }
        barrier_arrive(&m.x_issued);
        barrier_wait(&m.plan_full[turn & 1], turn >> 1 & 1);
        int n_steps = m.plan[turn & 1];
        barrier_arrive(&m.plan_empty[turn & 1]);
        if (n_steps >= F::STAGES)
            barrier_wait(&m.lora_issued, turn & 1);
        r.skip(n_steps);
    }
}

/* f(entry) for the pairs that have tokens in [row0, row0 + n_rows) and columns in [col0, col0 +
 * n_cols), in the order of segments and slices. By a whole warp, all lanes alike. */
template <class Do>
__device__ __forceinline__ void for_each_entry(const qv_k_stream_lora &lora, int row0, int n_rows,
                                               int col0, int n_cols, Do f)
{
    const qv_k_segments &s = lora.segments;
    const qv_k_slices &ranges = lora.site.ranges;
    int lane = threadIdx.x & 31;
    for (int i = 0; i < s.n_segs; i += 32) {
        int start = s.n_tokens, end = 0, slot = -1;
        if (i + lane < s.n_segs) {
            start = s.seg_start[i + lane];
            end = s.seg_start[i + lane + 1];
            slot = s.seg_slot[i + lane];
        }
        bool here = slot >= 0 && start < end && start < row0 + n_rows && end > row0;
        for (unsigned left = __ballot_sync(~0u, here); left != 0; left &= left - 1) {
            gemm_entry e;
            int from = __ffs((int)left) - 1;
            e.first = __shfl_sync(~0u, start, from);
            e.end = __shfl_sync(~0u, end, from);
            e.slot = __shfl_sync(~0u, slot, from);
            for (int j = 0; j < ranges.n; j++) {
                e.col_first = ranges.start[j];
                e.col_end = ranges.start[j + 1];
                if (e.col_first >= col0 + n_cols || e.col_end <= col0)
                    continue;
                e.slice = lora.site.slices[(int64_t)e.slot * ranges.n + j];
                if (e.slice.rank > 0)
                    f(e);
            }
        }
        if (__shfl_sync(~0u, start, 31) >= row0 + n_rows) /* segments are in the order of tokens */
            break;
    }
}

/* B of an entry on its way to the L2 cache, while x and W are multiplied. */
template <class F>
__device__ __forceinline__ void call_b(const qv_k_lora_site &site, const gemm_entry &e, int col0,
                                       int thread)
{
    constexpr int LINES = F::COLUMNS / 64; /* of 128 bytes */
    const bf16 *b = (const bf16 *)site.b + (int64_t)e.slot * site.max_rank * site.n_out + col0;
    for (int i = thread; i < e.slice.rank * LINES; i += GEMM_FETCHERS) {
        int col = i % LINES * 64;
        if (col0 + col < site.n_out)
            prefetch(b + (int64_t)(i / LINES) * site.n_out + col);
    }
}

/* Ranks [rank0, rank0 + GEMM_RANKS) of B, in tiles of 64 columns side by side; zeros above the rank
 * and outside of the slice. */
template <class F>
__device__ __forceinline__ void fetch_b(const qv_k_lora_site &site, const gemm_entry &e, int rank0,
                                        int col0, bf16 *to, int thread)
{
    const bf16 *b =
        (const bf16 *)site.b + ((int64_t)e.slot * site.max_rank + rank0) * site.n_out + col0;
#pragma unroll 1
    for (int i = thread; i < GEMM_RANKS * (F::COLUMNS / 8); i += GEMM_FETCHERS) {
        int r = i / (F::COLUMNS / 8), col = i % (F::COLUMNS / 8) * 8, at = col0 + col;
        bf16 *piece = to + col / 64 * (GEMM_RANKS * 64) + tile_at<64>(r, col % 64);
        const bf16 *from = b + r * site.n_out + col;
        bool outside = rank0 + r >= e.slice.rank || at >= e.col_end || at + 8 <= e.col_first;
        if (outside || (at >= e.col_first && at + 8 <= e.col_end)) {
            copy16(piece, outside ? (const bf16 *)site.b : from, !outside);
        } else {
#pragma unroll 1
            for (int j = 0; j < 8; j++)
                piece[j] =
                    at + j >= e.col_first && at + j < e.col_end ? from[j] : __float2bfloat16(0.0f);
        }
    }
    copies_commit();
}

/* Numbers of x1 of the tokens of the tile that an entry has, by fours: item `i` is four ranks of a
 * token. */
constexpr int GEMM_FOURS = GEMM_RANKS / 4;
constexpr int GEMM_AHEAD = 6; /* items of a thread that fly together: 16 ranks of 128 tokens */

struct gemm_x1 {
    float4 item[GEMM_AHEAD];
};

__device__ __forceinline__ int tokens_here(const gemm_entry &e, int row0)
{
    return min(e.end, row0 + GEMM_ROWS) - max(e.first, row0);
}

__device__ __forceinline__ void load_x1(const qv_k_stream_lora &lora, const gemm_entry &e,
                                        int rank0, int row0, int first, gemm_x1 &x1)
{
    const qv_k_lora_site &site = lora.site;
    int fours = min(GEMM_RANKS, e.slice.rank - rank0 + 3) / 4; /* that hold anything */
    const float *from = lora.x1 + (int64_t)e.slice.plane * site.max_rank + rank0;
    int n = tokens_here(e, row0) * fours, token0 = max(e.first, row0);
#pragma unroll
    for (int j = 0; j < GEMM_AHEAD; j++) {
        int i = first + j * GEMM_FETCHERS;
        if (i < n)
            x1.item[j] =
                *(const float4 *)(from +
                                  (int64_t)(token0 + i / fours) * site.ranges.n * site.max_rank +
                                  i % fours * 4);
    }
}

/* scale * x1, high and low, and zeros above the rank. */
__device__ __forceinline__ void place_x1(const gemm_entry &e, int rank0, int row0, int first,
                                         const gemm_x1 &x1, bf16 *to)
{
    int fours = min(GEMM_RANKS, e.slice.rank - rank0 + 3) / 4;
    int n = tokens_here(e, row0) * fours, row_0 = max(e.first, row0) - row0;
    float scale = e.slice.scale;
#pragma unroll
    for (int j = 0; j < GEMM_AHEAD; j++) {
        int i = first + j * GEMM_FETCHERS, row = row_0 + i / fours, r = i % fours * 4;
        if (i >= n)
            break;
        float4 v = x1.item[j];
        int left = e.slice.rank - rank0 - r;
        uint32_t high[2], low[2];
        split_bf16(scale * v.x, left > 1 ? scale * v.y : 0, high[0], low[0]);
        split_bf16(left > 2 ? scale * v.z : 0, left > 3 ? scale * v.w : 0, high[1], low[1]);
        *(uint2 *)(to + tile_at<64>(row, r)) = make_uint2(high[0], high[1]);
        *(uint2 *)(to + tile_at<64>(row, GEMM_RANKS + r)) = make_uint2(low[0], low[1]);
    }
}

/* What no four holds. */
__device__ __forceinline__ void clear_x1(const gemm_entry &e, int rank0, int row0, bf16 *to,
                                         int thread)
{
    int fours = min(GEMM_RANKS, e.slice.rank - rank0 + 3) / 4, empty = GEMM_FOURS - fours;
    int row_0 = max(e.first, row0) - row0;
    for (int i = thread; i < tokens_here(e, row0) * empty; i += GEMM_FETCHERS) {
        int row = row_0 + i / empty, r = (fours + i % empty) * 4;
        *(uint2 *)(to + tile_at<64>(row, r)) = make_uint2(0, 0);
        *(uint2 *)(to + tile_at<64>(row, GEMM_RANKS + r)) = make_uint2(0, 0);
    }
}

/* `loaded`: the first items have been. */
__device__ __forceinline__ void fetch_x1(const qv_k_stream_lora &lora, const gemm_entry &e,
                                         int rank0, int row0, bf16 *to, int thread, bool loaded,
                                         gemm_x1 &x1)
{
    clear_x1(e, rank0, row0, to, thread);
    int n = tokens_here(e, row0) * GEMM_FOURS; /* or less */
    for (int i = thread; i < n; i += GEMM_AHEAD * GEMM_FETCHERS, loaded = false) {
        if (!loaded)
            load_x1(lora, e, rank0, row0, i, x1);
        place_x1(e, rank0, row0, i, x1, to);
    }
}

/* GEMM_FETCHERS threads: how many steps of adapters each tile has, and these. Which they are and
 * the first of x1 is looked up while x and W are multiplied. */
template <class F>
[[maybe_unused]] __device__ void gemm_fetch_adapters(const gemm_args &c, gemm_shared<F> &m,
                                                     const qv_k_stream_lora &lora, int cluster,
                                                     int n_clusters, int rank)
{
    int thread = threadIdx.x - (GEMM_THREADS - GEMM_FETCHERS), turn = 0;
    gemm_ring<F> r;
    wait_for_previous(); /* x1 is there */
    for (int number = cluster; number < c.row_tiles * c.col_tiles; number += n_clusters, turn++) {
        gemm_tile tile = find_tile<F>(c, number, rank);
        int all_row0 = tile.row0 - rank * GEMM_ROWS, n_steps = 0, n_entries = 0;
        bool loaded = false;
        gemm_x1 x1;
        auto is_here = [&](const gemm_entry &e) {
            return e.first < tile.row0 + GEMM_ROWS && e.end > tile.row0;
        };
        auto each = [&](auto f) {
            for_each_entry(lora, all_row0, F::CLUSTER * GEMM_ROWS, tile.col0, F::COLUMNS, f);
        };
        each([&](const gemm_entry &e) {
            n_steps += (e.slice.rank + GEMM_RANKS - 1) / GEMM_RANKS;
            if (thread == 0 && n_entries < GEMM_ENTRIES)
                m.entries[n_entries] = e;
            if (n_entries == 0 && is_here(e)) {
                load_x1(lora, e, 0, tile.row0, thread, x1);
                loaded = true;
            }
            n_entries++;
            call_b<F>(lora.site, e, tile.col0, thread);
        });
        if (thread == 0) {
            barrier_wait(&m.x_issued, turn & 1);
            barrier_wait(&m.plan_empty[turn & 1], (turn >> 1 & 1) ^ 1);
            m.plan[turn & 1] = n_steps;
            barrier_arrive(&m.plan_full[turn & 1]);
        }
        named_barrier<GEMM_FETCHERS>(GEMM_FETCH_BARRIER);
        r.skip(c.steps);
        auto fetch = [&](const gemm_entry &e) {
            for (int rank0 = 0; rank0 < e.slice.rank; rank0 += GEMM_RANKS, r.advance()) {
                barrier_wait(&m.empty[r.at], r.phase ^ 1);
                if (is_here(e)) {
                    fetch_b<F>(lora.site, e, rank0, tile.col0, m.stage[r.at].w, thread);
                    fetch_x1(lora, e, rank0, tile.row0, m.stage[r.at].x, thread, loaded, x1);
                    loaded = false;
                    copies_wait<0>();
                    wgmma_publish();
                }
                named_barrier<GEMM_FETCHERS>(GEMM_FETCH_BARRIER);
                if (thread == 0) {
                    m.info[r.at] = {e.first - tile.row0, e.end - tile.row0};
                    barrier_arrive(&m.full[r.at]);
                }
            }
        };
        if (n_entries <= GEMM_ENTRIES)
            for (int i = 0; i < n_entries; i++)
                fetch(gemm_entry(m.entries[i]));
        else
            each(fetch);
        if (thread == 0)
            barrier_arrive(&m.lora_issued);
    }
}

/* --- Multiply ----------------------------------------------------------------------------- */

/* A number that all lanes have, so that the compiler knows it too: products in branches that it
 * thinks lanes may part in would wait for each other. */
__device__ __forceinline__ int same(int x)
{
    return __shfl_sync(0xffffffffu, x, 0);
}

/* A stage has been read by this warpgroup: all blocks of the cluster may write it. */
template <class F> __device__ __forceinline__ void gemm_release(gemm_shared<F> &m, int at)
{
    int thread = threadIdx.x & 127;
    if (F::CLUSTER == 1) {
        if (thread == 0)
            barrier_arrive(&m.empty[at]);
    } else if (thread % 32 == 0 && thread / 32 < F::CLUSTER) {
        barrier_arrive_at(&m.empty[at], thread / 32);
    }
}

/* The sums over k of a warpgroup's rows, which begin at `row` of the tile. All products have
 * finished, and all stages but the last are released: that one's place is the result. */
template <class F>
__device__ __forceinline__ int gemm_multiply(gemm_shared<F> &m, gemm_ring<F> &r, int row, int steps,
                                             bool leads, float (&acc)[F::COLUMNS / 2])
{
    int last = 0;
    for (int step = 0; step < steps; step++) {
        barrier_wait(&m.full[r.at], r.phase);
        uint64_t a = wgmma_tile(m.stage[r.at].x + row * GEMM_STEP);
        uint64_t b = wgmma_tile(m.stage[r.at].w);
        wgmma_keep(acc);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < GEMM_STEP / 16; k++)
            wgmma<F::COLUMNS>(acc, a + 2 * k, b + 2 * k);
        wgmma_commit();
        if (leads && step == F::LEAD - 1)
            named_barrier_arrive<2 * 128>(GEMM_LEAD_BARRIER);
        wgmma_wait<1>();
        if (step > 0)
            gemm_release(m, last);
        last = r.at;
        r.advance();
    }
    wgmma_wait<0>();
    wgmma_keep(acc);
    return last;
}

/* A step's products for 64 rows that all have its adapter. */
template <int COLUMNS>
__device__ __forceinline__ void add_to_all(float (&acc)[COLUMNS / 2], const bf16 *x1, const bf16 *b)
{
    uint64_t high = wgmma_tile(x1), low = high + GEMM_RANKS * 2 / 16;
    uint64_t tile = wgmma_values_tile(b, GEMM_RANKS * 128);
    wgmma_keep(acc);
    wgmma_begin();
    wgmma_b_columns<COLUMNS>(acc, high, tile);
    wgmma_b_columns<COLUMNS>(acc, low, tile);
    wgmma_b_columns<COLUMNS>(acc, high + 2, tile + 128);
    wgmma_b_columns<COLUMNS>(acc, low + 2, tile + 128);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_keep(acc);
}

/* The same where [first, end) have it: by 64 columns, apart from the sums over k, so that what
 * others get is left out. */
template <int COLUMNS>
__device__ __forceinline__ void add_adapter(float (&acc)[COLUMNS / 2], const bf16 *x1,
                                            const bf16 *b, int first, int end)
{
    int row = (threadIdx.x >> 5 & 3) * 16 + ((threadIdx.x & 31) >> 2);
    bool has[2] = {row >= first && row < end, row + 8 >= first && row + 8 < end};
    uint64_t high = wgmma_tile(x1), low = high + GEMM_RANKS * 2 / 16;
    uint64_t tile = wgmma_tile(b);
#pragma unroll
    for (int slab = 0; slab < COLUMNS / 64; slab++, tile += GEMM_RANKS * 128 / 16) {
        float delta[32];
        wgmma_keep(delta);
        wgmma_begin();
        wgmma_b_trans<0>(delta, high, tile);
        wgmma_b_trans<1>(delta, low, tile);
        wgmma_b_trans<1>(delta, high + 2, tile + 128);
        wgmma_b_trans<1>(delta, low + 2, tile + 128);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(delta);
#pragma unroll
        for (int i = 0; i < 32; i++)
            if (has[i >> 1 & 1])
                acc[32 * slab + i] += delta[i];
    }
    wgmma_keep(acc);
}

/* The adapters' steps. */
template <class F>
__device__ __forceinline__ void gemm_add_adapters(gemm_shared<F> &m, gemm_ring<F> &r, int row,
                                                  int n_steps, int group,
                                                  float (&acc)[F::COLUMNS / 2])
{
    for (int step = 0; step < n_steps; step++) {
        barrier_wait(&m.full[r.at], r.phase);
        const gemm_step_info info = {same(m.info[r.at].first), same(m.info[r.at].end)};
        int first = info.first - row, end = info.end - row;
        if (first <= 0 && end >= GEMM_UNIT)
            add_to_all<F::COLUMNS>(acc, m.stage[r.at].x + row * GEMM_STEP, m.stage[r.at].w);
        else if (first < GEMM_UNIT && end > 0)
            add_adapter<F::COLUMNS>(acc, m.stage[r.at].x + row * GEMM_STEP, m.stage[r.at].w, first,
                                    end);
        named_barrier<128>(1 + group); /* all warps have read it, the step's description too */
        gemm_release(m, r.at);
        r.advance();
    }
}

/* --- Store -------------------------------------------------------------------------------- */

/* 64 rows by all columns of a tile, in pieces of 128 bytes a row: two of them may be on their way.
 */
template <int COLUMNS, bool F32>
__device__ __forceinline__ void
store_rows(const gemm_args &c, const CUtensorMap *y, char (&out)[2][GEMM_OUT_BYTES], int row,
           int col, int group, int &n_stored, const float (&acc)[COLUMNS / 2])
{
    constexpr int WIDTH = F32 ? 32 : 64; /* columns of 128 bytes */
    int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
    if (row >= c.n_tokens)
        return;
#pragma unroll
    for (int chunk = 0; chunk < COLUMNS / WIDTH; chunk++) {
        if (col + chunk * WIDTH >= c.n_out)
            return;
        char *to = out[n_stored & 1];
        if (thread == 0)
            stores_wait_read<1>();
        named_barrier<128>(1 + group);
        const float *f = acc + chunk * (WIDTH / 2);
        if (F32) {
            int t = lane & 3;
#pragma unroll
            for (int i = 0; i < WIDTH / 4; i++) { /* 8 columns, rows of one half */
                int r = warp * 16 + (lane >> 2) + 8 * (i & 1), piece = i / 2 * 2 + (t >> 1);
                *(float2 *)(to + r * 128 + ((piece ^ (r & 7)) << 4) + (t & 1) * 8) =
                    make_float2(f[4 * (i / 2) + 2 * (i & 1)], f[4 * (i / 2) + 2 * (i & 1) + 1]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j += 2)
                stmatrix4(
                    (bf16 *)to + tile_at<64>(warp * 16 + (lane & 15), j * 8 + (lane >> 4) * 8),
                    pack_bf16(f[4 * j], f[4 * j + 1]), pack_bf16(f[4 * j + 2], f[4 * j + 3]),
                    pack_bf16(f[4 * j + 4], f[4 * j + 5]), pack_bf16(f[4 * j + 6], f[4 * j + 7]));
        }
        wgmma_publish();
        named_barrier<128>(1 + group);
        if (thread == 0) {
            store_box(y, col + chunk * WIDTH, row, 0, to);
            stores_commit();
        }
        n_stored++;
    }
}

/* A warpgroup that multiplies. */
template <class F>
[[maybe_unused]] __device__ void gemm_work(const gemm_args &c, gemm_shared<F> &m,
                                           const CUtensorMap *y, int cluster, int n_clusters,
                                           int rank)
{
    int group = warpgroup(), row = group * GEMM_UNIT, turn = 0, n_stored = 0;
    bool leads = c.steps >= F::STAGES; /* or the first would be ahead by more than a tile */
    gemm_ring<F> r;
    auto adapters_of_tile = [&]() {
        barrier_wait(&m.plan_full[turn & 1], turn >> 1 & 1);
        int n = 0;
        if ((threadIdx.x & 31) == 0) {
            n = m.plan[turn & 1];
            barrier_arrive(&m.plan_empty[turn & 1]);
        }
        return same(n);
    };
    for (int number = cluster; number < c.row_tiles * c.col_tiles; number += n_clusters, turn++) {
        gemm_tile tile = find_tile<F>(c, number, rank);
        float acc[F::COLUMNS / 2] = {};
        if (leads && group == 1)
            named_barrier<2 * 128>(GEMM_LEAD_BARRIER);
        int last = gemm_multiply<F>(m, r, row, c.steps, leads && group == 0, acc);
        gemm_release(m, last);
        gemm_add_adapters<F>(m, r, row, adapters_of_tile(), group, acc);
        if (c.y_f32)
            store_rows<F::COLUMNS, true>(c, y, m.out[group], tile.row0 + row, tile.col0, group,
                                         n_stored, acc);
        else
            store_rows<F::COLUMNS, false>(c, y, m.out[group], tile.row0 + row, tile.col0, group,
                                          n_stored, acc);
    }
    stores_wait();
}

} // namespace

#endif
