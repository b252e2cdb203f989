/* scale B x1, by three warps of a block of decode_linear.cu, beside those that multiply W.
 *
 * An entry is some tokens of one adapter; each warp has every third one. A unit is 16 ranks of it:
 * B [16][64 rows] as the pool has it goes straight from memory into registers, two units ahead,
 * whose 128-byte rows are whole and whose places are those of mma's first operand when rows 8 g and
 * 8 g + 1, and so on, are taken for g and g + 8 of it. x1 is the second, as two BF16 numbers (16
 * bits of its float32); of its 8 columns each slice that the block touches has as many, since B is
 * the same for all of them. An entry's sums begin and end in one warp: what is computed for a token
 * depends on its adapter alone, and what a unit gives for the tokens or rows of others is not used,
 * so that an adapter of infinities or NaNs harms none but its own.
 *
 * B needs no wait: until x1 is there, the first units are on their way, and some come to the L2
 * cache. More of them would keep A from coming.
 */
#ifndef QV_KERNELS_DECODE_UNITS_CUH
#define QV_KERNELS_DECODE_UNITS_CUH

#include "kernels/decode_shrink.cuh"

namespace
{

constexpr int ADD_WARPS = ADDERS / 32;
constexpr int UNITS_AHEAD = 2;  /* of a warp, in registers */
constexpr int UNITS_CALLED = 2; /* behind them, in the L2 cache */

/* What a thread has of a unit, with lane = 4 g + t: rows 8 g .. 8 g + 7 at ranks 2 t, 2 t + 1,
 * 2 t + 8 and 2 t + 9; and column g's x1 at these ranks. */
struct unit {
    uint4 b[4];
    float2 x1[2];
};

/* The slices of a block, which are parts of its entries. */
struct parts {
    int first, n;
    int shift; /* columns of each: 8, 4 or 2 */
};

__device__ __forceinline__ parts find_parts(const qv_k_slices &ranges, const place &p)
{
    parts all = {0, 1, 3};
    while (all.first + 1 < ranges.n && ranges.start[all.first + 1] <= p.row0)
        all.first++;
    while (all.first + all.n < ranges.n && ranges.start[all.first + all.n] < p.row0 + ROWS)
        all.n++;
    all.shift = all.n == 1 ? 3 : all.n == 2 ? 2 : 1;
    return all;
}

__device__ __forceinline__ int adder()
{
    return (int)threadIdx.x - WORKERS - 32;
}

/* The entries of this block, in any order. Those of a cluster that shares k are dealt out by
 * segment. */
template <class F>
__device__ __forceinline__ void find_entries(decode_shared<F> &m, const qv_k_segments &s,
                                             const qv_k_lora_site &site, const place &p,
                                             const parts &of)
{
    for (int seg = p.share + adder() * p.n_shares; seg < s.n_segs; seg += ADDERS * p.n_shares) {
        int slot = s.seg_slot[seg], first = s.seg_start[seg], end = min(s.seg_start[seg + 1], p.n);
        if (slot < 0 || first >= end)
            continue;
        entry e = {};
        e.slot = slot;
        for (int i = 0; i < QV_K_STREAM_SLICES; i++)
            if (i < of.n) {
                qv_k_lora_slice slice = site.slices[(int64_t)slot * site.ranges.n + of.first + i];
                e.parts[i] = {slice.scale, (uint16_t)slice.rank, (uint16_t)slice.plane};
                e.rank = max(e.rank, slice.rank);
            }
        if (e.rank == 0)
            continue;
        for (; first < end; first += 1 << of.shift) {
            e.first = (uint16_t)first;
            e.n = (uint16_t)min(1 << of.shift, end - first);
            m.entries[atomicAdd(&m.n_entries, 1)] = e;
            atomicAdd(&m.n_units, ceiling(e.rank, RANKS));
        }
    }
}

/* The part that a row of the block is of. */
__device__ __forceinline__ int part_of_row(const qv_k_slices &ranges, const parts &of, int row)
{
    int part = 0;
    while (part + 1 < of.n && ranges.start[of.first + part + 1] <= row)
        part++;
    return part;
}

/* Units of a warp in order. */
struct unit_at {
    int index, rank; /* of the entry, within it */
};

template <class F> __device__ __forceinline__ void next_unit(const decode_shared<F> &m, unit_at &at)
{
    at.rank += RANKS;
    if (at.rank >= m.entries[at.index].rank) {
        at.rank = 0;
        at.index += ADD_WARPS;
    }
}

/* What a thread's units are of. */
struct adding {
    const qv_k_lora_site &site;
    const float *x1;
    const bf16 *b; /* of its rows and first rank */
    parts of;
    int row0, part; /* the block's first row; the part of the thread's rows */
    int n_entries;
};

/* B of a unit; ranks that a slice does not have as zeros. */
template <class F>
__device__ __forceinline__ void load_b(const decode_shared<F> &m, const adding &c,
                                       const unit_at &at, unit &u)
{
    int lane = (int)threadIdx.x & 31, rank = at.rank + lane % 4 * 2, n_out = (int)c.site.n_out;
    const entry &e = m.entries[at.index];
    const bf16 *b = c.b + (int64_t)(e.slot * c.site.max_rank + at.rank) * n_out;
    int ranks = e.parts[c.part].rank;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int more = (i & 1) + 8 * (i >> 1);
        u.b[i] = uint4{};
        if (rank + more < ranks)
            load_once(u.b[i], b + more * n_out);
    }
}

/* Its rows on their way to the L2 cache: lane i has one. */
template <class F>
__device__ __forceinline__ void call_b(const decode_shared<F> &m, const adding &c,
                                       const unit_at &at)
{
    int lane = (int)threadIdx.x & 31, rank = at.rank + lane;
    const entry &e = m.entries[at.index];
    if (lane < RANKS && rank < e.rank)
        prefetch((const bf16 *)c.site.b +
                 ((int64_t)e.slot * c.site.max_rank + rank) * c.site.n_out + c.row0);
}

template <class F>
__device__ __forceinline__ void load_x1(const decode_shared<F> &m, const adding &c,
                                        const unit_at &at, unit &u)
{
    int lane = (int)threadIdx.x & 31, rank = at.rank + lane % 4 * 2;
    int part = lane / 4 >> c.of.shift, token = lane / 4 - (part << c.of.shift);
    const entry &e = m.entries[at.index];
    const float *from =
        c.x1 +
        ((int64_t)(e.first + token) * c.site.ranges.n + e.parts[part].plane) * c.site.max_rank +
        rank;
    int ranks = token < e.n ? e.parts[part].rank - rank : 0;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        u.x1[j] = make_float2(0, 0);
        if (8 * j < ranks)
            u.x1[j] = load_of_others(from + 8 * j);
        if (8 * j + 1 >= ranks)
            u.x1[j].y = 0;
    }
}

__device__ __forceinline__ uint32_t word_of(const uint4 &v, int i)
{
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/* acc += B x1 of a unit; acc[4 i + j + 2 h] is row 8 g + 2 i + h of column 2 t + j. */
__device__ __forceinline__ void multiply_unit(const unit &u, float (&acc)[16])
{
    uint32_t high[2], low[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
        split_bf16(u.x1[j].x, u.x1[j].y, high[j], low[j]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint32_t even = word_of(u.b[2 * j], i), odd = word_of(u.b[2 * j + 1], i);
            a[2 * j] = (even & 0xffff) | odd << 16;
            a[2 * j + 1] = even >> 16 | (odd & 0xffff0000);
        }
        float(&d)[4] = *(float(*)[4])(acc + 4 * i);
        mma(d, a, high[0], high[1]);
        mma(d, a, low[0], low[1]);
    }
}

/* An entry's sums, scaled, to its tokens' in m.sums: of each part the rows that are its own. */
template <class F>
__device__ __forceinline__ void put_entry(decode_shared<F> &m, const adding &c, const entry &e,
                                          const float (&acc)[16])
{
    int lane = (int)threadIdx.x & 31, row = lane / 4 * 8;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        int column = lane % 4 * 2 + j, part = column >> c.of.shift;
        int token = column - (part << c.of.shift);
        if (part != c.part || token >= e.n || e.parts[part].rank == 0)
            continue;
        float *to = &m.sums[e.first + token][row], scale = e.parts[part].scale, v[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            v[i] = scale * acc[i / 2 * 4 + (i & 1) * 2 + j];
        *(float4 *)to = make_float4(v[0], v[1], v[2], v[3]);
        *(float4 *)(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
    }
}

/* Where a warp multiplies, and which unit it asks for next. */
struct progress {
    unit_at at, ahead;
    float acc[16];
};

/* One unit, whose registers then wait for another; false: there is none. */
template <class F>
__device__ __forceinline__ bool add_unit(decode_shared<F> &m, const adding &c, unit &u,
                                         progress &now)
{
    if (now.at.index >= c.n_entries)
        return false;
    multiply_unit(u, now.acc);
    const entry &e = m.entries[now.at.index];
    if (now.at.rank + RANKS >= e.rank) {
        put_entry(m, c, e, now.acc);
#pragma unroll
        for (int i = 0; i < 16; i++)
            now.acc[i] = 0;
    }
    next_unit(m, now.at);
    if (now.ahead.index < c.n_entries) {
        load_b(m, c, now.ahead, u);
        load_x1(m, c, now.ahead, u);
        next_unit(m, now.ahead);
    }
    return true;
}

/* x1 is complete: the first of the three warps counts the block in. */
template <class F> __device__ __forceinline__ void meet_x1(decode_shared<F> &m, const arrivals &a)
{
    if (adder() == 0) {
        wait_for_previous();
        wait_for_x1(a);
        atomicMax(&m.calm, 1);
    }
    named_barrier<ADDERS>(ADDERS_BARRIER);
}

/* All of the three warps. m.sums has what adapters add, or -0, to which W's sums are added without
 * a change. */
template <class F>
__device__ __forceinline__ void add_adapters(decode_shared<F> &m, const qv_k_stream_lora &lora,
                                             const place &p, const arrivals &a)
{
    for (int i = adder(); i < F::N * (ROWS + 4); i += ADDERS)
        (&m.sums[0][0])[i] = -0.0f;
    const parts of = find_parts(lora.site.ranges, p);
    find_entries(m, lora.segments, lora.site, p, of);
    named_barrier<ADDERS>(ADDERS_BARRIER);
    if (adder() == 0 && m.n_units * p.n_shares <= HURRY_UNITS)
        atomicMax(&m.calm, 1);
    const qv_k_lora_site &site = lora.site;
    int lane = (int)threadIdx.x & 31, row = p.row0 + lane / 4 * 8;
    int part = row < site.n_out ? part_of_row(site.ranges, of, row) : QV_K_STREAM_SLICES;
    const adding c = {site,       lora.x1, (const bf16 *)site.b + lane % 4 * 2 * site.n_out + row,
                      of,         p.row0,  part,
                      m.n_entries};
    const unit_at first = {adder() / 32, 0};
    progress now = {first, first, {}};
    unit units[UNITS_AHEAD]; /* on their way */
#pragma unroll
    for (int i = 0; i < UNITS_AHEAD; i++)
        if (now.ahead.index < c.n_entries) {
            load_b(m, c, now.ahead, units[i]);
            next_unit(m, now.ahead);
        }
    unit_at at = now.ahead;
    for (int i = 0; i < UNITS_CALLED && at.index < c.n_entries; i++, next_unit(m, at))
        call_b(m, c, at);
    meet_x1(m, a);
    at = first;
#pragma unroll
    for (int i = 0; i < UNITS_AHEAD; i++)
        if (at.index < c.n_entries) {
            load_x1(m, c, at, units[i]);
            next_unit(m, at);
        }
    for (bool more = true; more;) {
#pragma unroll
        for (int i = 0; i < UNITS_AHEAD; i++)
            more = more && add_unit(m, c, units[i], now);
    }
}

} // namespace

#endif
