/* The parts of gemm_hopper.cu's matrix product: the shape of a form, what is in shared memory, the
 * order of tiles, and the parts that warps have. Only for sm_90a.
 *
 * A tile is 128 tokens by COLUMNS rows of W. Shared memory is a ring of stages, one for every 64 of
 * k: x [128][64] and W [COLUMNS][64]. Both blocks of a cluster have the same columns and tokens
 * of their own; each fetches half of W for both.
 *
 * Adapters are more of k. A step of theirs is one adapter in one slice of the columns and up to 32
 * of its ranks, in units of 16: B [32][COLUMNS], stored as the pool has it, where W would be, and
 * scale * x1 of the tile's tokens where x would be, [128][2][16 high, 16 low]: two BF16 numbers (16
 * bits) each, as qv_k_gemm_shrink leaves them. They come by the copy engine, which has what
 * it asks for within the time that the ring gives. A warp works out a tile ahead which steps there
 * are: those of all segments that have tokens in either block of the cluster, so that both blocks
 * go through the ring in step. What a step gives for the tokens and columns of others is never
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
constexpr int GEMM_RANKS_OF_UNIT = 16;
constexpr int GEMM_UNIT = 64;  /* rows of one wgmma */
constexpr int GEMM_GROUPS = 2; /* warpgroups that multiply; one more fetches */
constexpr int GEMM_ROWS = GEMM_UNIT * GEMM_GROUPS;
constexpr int GEMM_THREADS = 128 * (GEMM_GROUPS + 1);
constexpr int GEMM_PLANNED = 16;                /* steps of adapters that a plan has room for */
constexpr int GEMM_OUT_BYTES = GEMM_UNIT * 128; /* results on their way: 64 rows of 128 bytes */

/* Barriers by name: 0 is __syncthreads, 1 and 2 are those of the warpgroups. */
constexpr int GEMM_LEAD_BARRIER = 3;

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

/* A step of adapters: ranks of one adapter in a slice of the columns. */
struct gemm_step {
    int32_t first, end;         /* tokens */
    int32_t col_first, col_end; /* of y */
    int32_t slot, plane, rank0, units;
};

/* The adapters' steps of a tile, or some of them. */
struct gemm_plan {
    int32_t n;
    bool more; /* another plan has the next */
    gemm_step steps[GEMM_PLANNED];
};

template <class F> struct gemm_shared {
    struct {
        bf16 x[F::X], w[F::W];
    } stage[F::STAGES];
    char out[GEMM_GROUPS][2][GEMM_OUT_BYTES];
    uint64_t full[F::STAGES], empty[F::STAGES];
    uint64_t plan_full[2], plan_empty[2];
    gemm_plan plan[2];
};

template <class F> constexpr int GEMM_BYTES = (int)sizeof(gemm_shared<F>) + 1024;

/* By value into the kernel. */
struct gemm_args {
    int32_t n_tokens, n_out;
    int32_t steps; /* of k */
    int32_t row_tiles, col_tiles;
    int32_t band; /* row tiles that go through the columns together */
    bool y_f32, add;
};

/* What the copy engine reads and writes: x [tokens][k], W [columns][k], x1 [tokens][planes][ranks,
 * high and low], B [slots][ranks][columns], y [tokens][columns]. */
struct gemm_maps {
    CUtensorMap x, w, x1, b, y;
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

/* --- Plans -------------------------------------------------------------------------------- */

/* f(start, end, slot, column range, slice) for the pairs that have tokens in [row0, row0 + n_rows)
 * and columns in [col0, col0 + n_cols), in the order of segments and slices. By a whole warp, all
 * lanes alike. */
template <class Do>
__device__ __forceinline__ void for_each_pair(const qv_k_stream_lora &lora, int row0, int n_rows,
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
            int from = __ffs((int)left) - 1;
            gemm_step e = {};
            e.first = __shfl_sync(~0u, start, from);
            e.end = __shfl_sync(~0u, end, from);
            e.slot = __shfl_sync(~0u, slot, from);
            for (int j = 0; j < ranges.n; j++) {
                e.col_first = ranges.start[j];
                e.col_end = ranges.start[j + 1];
                if (e.col_first < col0 + n_cols && e.col_end > col0)
                    f(e, lora.site.slices[(int64_t)e.slot * ranges.n + j]);
            }
        }
        if (__shfl_sync(~0u, start, 31) >= row0 + n_rows) /* segments are in the order of tokens */
            break;
    }
}

/* A warp: the plans of all tiles, in turn. */
template <class F>
[[maybe_unused]] __device__ void gemm_make_plans(const gemm_args &c, gemm_shared<F> &m,
                                                 const qv_k_stream_lora &lora, int cluster,
                                                 int n_clusters, int rank)
{
    int lane = threadIdx.x & 31, turn = 0, n = 0;
    auto begin = [&]() {
        n = 0;
        barrier_wait(&m.plan_empty[turn & 1], (turn >> 1 & 1) ^ 1);
    };
    auto end = [&](bool more) {
        if (lane == 0) {
            m.plan[turn & 1].n = n;
            m.plan[turn & 1].more = more;
            barrier_arrive(&m.plan_full[turn & 1]);
        }
        turn++;
    };
    for (int number = cluster; number < c.row_tiles * c.col_tiles; number += n_clusters) {
        gemm_tile tile = find_tile<F>(c, number, rank);
        auto add = [&](gemm_step step, const qv_k_lora_slice &slice) {
            step.plane = slice.plane;
            for (step.rank0 = 0; step.rank0 < slice.rank; step.rank0 += GEMM_RANKS) {
                if (n == GEMM_PLANNED) {
                    end(true);
                    begin();
                }
                int units = (slice.rank - step.rank0 + GEMM_RANKS_OF_UNIT - 1) / GEMM_RANKS_OF_UNIT;
                step.units = min(units, GEMM_RANKS / GEMM_RANKS_OF_UNIT);
                if (lane == 0)
                    m.plan[turn & 1].steps[n] = step;
                n++;
            }
        };
        begin();
        for_each_pair(lora, tile.row0 - rank * GEMM_ROWS, F::CLUSTER * GEMM_ROWS, tile.col0,
                      F::COLUMNS, add);
        end(false);
    }
}

/* --- Fetch -------------------------------------------------------------------------------- */

/* x1 and B of a step of adapters, on their way. */
template <class F>
__device__ __forceinline__ void fetch_adapter(gemm_shared<F> &m, const gemm_maps &maps, int at,
                                              const gemm_step &step, const gemm_tile &tile,
                                              int rank)
{
    constexpr int TILES = F::COLUMNS / 64 / F::CLUSTER; /* of 64 columns, that this block fetches */
    constexpr uint16_t ALL = (1 << F::CLUSTER) - 1;
    barrier_expect(&m.full[at], (F::X + GEMM_RANKS * F::COLUMNS) * (int)sizeof(bf16));
    copy_box_here(m.stage[at].x, &maps.x1, 2 * step.rank0, step.plane, tile.row0, &m.full[at]);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        bf16 *to = m.stage[at].w + (rank * TILES + i) * GEMM_RANKS * 64;
        int col = tile.col0 + (rank * TILES + i) * 64;
        if (F::CLUSTER == 1)
            copy_box_here(to, &maps.b, col, step.rank0, step.slot, &m.full[at]);
        else
            copy_box(to, &maps.b, col, step.rank0, step.slot, &m.full[at], ALL);
    }
}

/* One thread: all that is multiplied. */
template <class F>
[[maybe_unused]] __device__ void gemm_fetch(const gemm_args &c, gemm_shared<F> &m,
                                            const gemm_maps &maps, int cluster, int n_clusters,
                                            int rank)
{
    constexpr int PART = F::COLUMNS / F::CLUSTER; /* rows of W that this block fetches */
    constexpr uint16_t ALL = (1 << F::CLUSTER) - 1;
    gemm_ring<F> r;
    int turn = 0;
    for (int number = cluster; number < c.row_tiles * c.col_tiles; number += n_clusters) {
        gemm_tile tile = find_tile<F>(c, number, rank);
        for (int step = 0; step < c.steps; step++, r.advance()) {
            barrier_wait(&m.empty[r.at], r.phase ^ 1);
            barrier_expect(&m.full[r.at], F::STAGE_BYTES);
            copy_box_here(m.stage[r.at].x, &maps.x, step * GEMM_STEP, tile.row0, 0, &m.full[r.at]);
            bf16 *to = m.stage[r.at].w + rank * PART * GEMM_STEP;
            int row = tile.col0 + rank * PART;
            if (F::CLUSTER == 1)
                copy_box_here(to, &maps.w, step * GEMM_STEP, row, 0, &m.full[r.at]);
            else
                copy_box(to, &maps.w, step * GEMM_STEP, row, 0, &m.full[r.at], ALL);
        }
        if (turn == 0)
            wait_for_previous(); /* x1 is there */
        for (bool more = true; more; turn++) {
            const gemm_plan &plan = m.plan[turn & 1];
            barrier_wait(&m.plan_full[turn & 1], turn >> 1 & 1);
            for (int i = 0; i < plan.n; i++, r.advance()) {
                barrier_wait(&m.empty[r.at], r.phase ^ 1);
                fetch_adapter<F>(m, maps, r.at, plan.steps[i], tile, rank);
            }
            more = plan.more;
            barrier_arrive(&m.plan_empty[turn & 1]);
        }
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

/* A step's products for 64 rows that all have its adapter, as all columns do. */
template <int COLUMNS>
__device__ __forceinline__ void add_to_all(float (&acc)[COLUMNS / 2], const bf16 *x1, const bf16 *b,
                                           int units)
{
    uint64_t high = wgmma_tile(x1), tile = wgmma_values_tile(b, GEMM_RANKS * 128);
#pragma unroll 1
    for (int unit = 0; unit < units; unit++, high += 4, tile += 128) {
        wgmma_keep(acc);
        wgmma_begin();
        wgmma_b_columns<COLUMNS>(acc, high, tile);
        wgmma_b_columns<COLUMNS>(acc, high + 2, tile);
        wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_keep(acc);
}

/* Rows and columns [first, end) of 64 rows of a tile. */
struct gemm_part {
    int first, end, col_first, col_end;
};

/* The same for a part of rows and columns: by 64 columns, apart from the sums over k, so that what
 * others get is left out. */
template <int COLUMNS>
__device__ __forceinline__ void add_to_some(float (&acc)[COLUMNS / 2], const bf16 *x1,
                                            const bf16 *b, int units, const gemm_part &part)
{
    int row = (threadIdx.x >> 5 & 3) * 16 + ((threadIdx.x & 31) >> 2), col = (threadIdx.x & 3) * 2;
    bool has[2] = {row >= part.first && row < part.end,
                   row + 8 >= part.first && row + 8 < part.end};
    uint64_t high = wgmma_tile(x1), tile = wgmma_tile(b);
#pragma unroll
    for (int at = 0; at < COLUMNS; at += 64, tile += GEMM_RANKS * 128 / 16) {
        if (part.col_first >= at + 64 || part.col_end <= at)
            continue;
        float delta[32] = {};
#pragma unroll 1
        for (int unit = 0; unit < units; unit++) {
            wgmma_keep(delta);
            wgmma_begin();
            wgmma_b_trans<1>(delta, high + 4 * unit, tile + 128 * unit);
            wgmma_b_trans<1>(delta, high + 4 * unit + 2, tile + 128 * unit);
            wgmma_commit();
        }
        wgmma_wait<0>();
        wgmma_keep(delta);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            int mine = at + col + i / 4 * 8 + (i & 1);
            if (has[i >> 1 & 1] && mine >= part.col_first && mine < part.col_end)
                acc[at / 2 + i] += delta[i];
        }
    }
    wgmma_keep(acc);
}

/* A step for 64 rows from `row` on. */
template <class F>
__device__ __forceinline__ void gemm_add_adapter(const gemm_args &c, gemm_shared<F> &m, int at,
                                                 const gemm_step &step, const gemm_tile &tile,
                                                 int row, int group, float (&acc)[F::COLUMNS / 2])
{
    int row0 = tile.row0 + row, col_end = same(step.col_end), units = same(step.units);
    gemm_part part = {same(step.first) - row0, same(step.end) - row0,
                      same(step.col_first) - tile.col0,
                      col_end < c.n_out ? col_end - tile.col0 : F::COLUMNS};
    const bf16 *x1 = m.stage[at].x + row * GEMM_STEP, *b = m.stage[at].w;
    if (part.first >= GEMM_UNIT || part.end <= 0)
        named_barrier<128>(1 + group); /* all warps have seen it before it goes */
    else if (part.first <= 0 && part.end >= GEMM_UNIT && part.col_first <= 0 &&
             part.col_end >= F::COLUMNS)
        add_to_all<F::COLUMNS>(acc, x1, b, units);
    else
        add_to_some<F::COLUMNS>(acc, x1, b, units, part);
}

/* The adapters' steps of a tile. */
template <class F>
__device__ __forceinline__ void
gemm_add_adapters(const gemm_args &c, gemm_shared<F> &m, gemm_ring<F> &r, const gemm_tile &tile,
                  int row, int group, int &turn, float (&acc)[F::COLUMNS / 2])
{
    for (bool more = true; more; turn++) {
        const gemm_plan &plan = m.plan[turn & 1];
        barrier_wait(&m.plan_full[turn & 1], turn >> 1 & 1);
        int n = same(plan.n);
        for (int i = 0; i < n; i++, r.advance()) {
            barrier_wait(&m.full[r.at], r.phase);
            gemm_add_adapter<F>(c, m, r.at, plan.steps[i], tile, row, group, acc);
            gemm_release(m, r.at);
        }
        more = same(plan.more) != 0;
        if ((threadIdx.x & 31) == 0)
            barrier_arrive(&m.plan_empty[turn & 1]);
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
            if (F32 && c.add)
                add_box(y, col + chunk * WIDTH, row, 0, to);
            else
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
    for (int number = cluster; number < c.row_tiles * c.col_tiles; number += n_clusters) {
        gemm_tile tile = find_tile<F>(c, number, rank);
        float acc[F::COLUMNS / 2] = {};
        if (leads && group == 1)
            named_barrier<2 * 128>(GEMM_LEAD_BARRIER);
        int last = gemm_multiply<F>(m, r, row, c.steps, leads && group == 0, acc);
        gemm_release(m, last);
        gemm_add_adapters<F>(c, m, r, tile, row, group, turn, acc);
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
