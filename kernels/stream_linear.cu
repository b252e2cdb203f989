/* y = W x, and for the tokens of adapters + scale B (A x), for few tokens: a decode step.
 *
 * A block takes 64 rows of W, 64 tokens at most, and a range of k; blocks of a cluster share the
 * rows and split k. W and x come through a ring of stages of 64 along k by asynchronous copies. The
 * pairs of adapters follow in the same ring, as more of k: a unit is 16 ranks of one adapter in one
 * slice, B [16 x 64] and x1 = A x of its tokens, so that B is on its way while W is still being
 * used, and y is written once. A segment belongs to one block of the cluster.
 *
 * The bits of a token depend on nothing but its own row and its own adapter. k is cut by the shape
 * of W alone; of eight warps four share the rows, and each half of them takes the same half of
 * every stage. An adapter's part is summed by itself, unit by unit, and added to the sum over k at
 * the end; what a unit's product gives for the tokens of others is not used, so that an adapter of
 * infinities or NaNs harms none but its own tokens.
 *
 * Memory bound: 2 n_out n_in + 2 r n_out bytes an adapter.
 */
#include "kernels/cluster_sums.cuh"

namespace
{

constexpr int THREADS = 256;
constexpr int ROWS = 64; /* of W, of a block */
constexpr int STEP = 64; /* of k, of a stage */
constexpr int MAX_TOKENS = QV_K_STREAM_TOKENS;
constexpr int MAX_ENTRIES = MAX_TOKENS * QV_K_STREAM_SLICES;
constexpr int UNITS = 2; /* of a stage */
constexpr uint8_t NOBODY = 255;

/* One adapter in one slice. Tokens count from the block's first. */
struct entry {
    uint8_t first, n;
    uint16_t rank;
    int32_t slot;
    uint16_t plane, slice;
    float scale;
};

template <int NT, int STAGES> struct stream_shared {
    union {
        struct {
            bf16 w[STAGES][ROWS * STEP];   /* or UNITS of B, [rank][row] */
            bf16 x[STAGES][NT * 8 * STEP]; /* or UNITS of x1, float32 [token][rank] */
        };
        struct {
            float base[2][NT * 8][PITCH], delta[NT * 8][PITCH]; /* [token][row] */
        };
    };
    entry entries[MAX_ENTRIES];
    int n_entries, n_units;
    uint8_t owner[MAX_TOKENS]; /* the block of the cluster that has the token's adapter; NOBODY */
};

/* --- W and x ------------------------------------------------------------------------------ */

/* What a block works on. */
struct place {
    int64_t row0;   /* first row of W */
    int64_t token0; /* first token */
    int n;          /* tokens */
    int share, n_shares;
    int first_step, n_steps;
};

/* What a thread copies of a stage: 8 numbers of each of some rows of W and of x, NULL where there
 * is no row. Addresses are worked out once: they stood between a wait and what it was for. */
template <int NT> struct thread_rows {
    static constexpr int OF_W = ROWS * STEP / 8 / THREADS;
    static constexpr int OF_X = (NT * 8 * STEP / 8 + THREADS - 1) / THREADS;
    const bf16 *w[OF_W], *x[OF_X];
    int left; /* of k, from its own first number on */
};

template <int NT>
__device__ __forceinline__ thread_rows<NT> rows_of(const qv_k_linear_args &c, const place &p)
{
    thread_rows<NT> r;
    int row = threadIdx.x / 8, k = p.first_step * STEP + threadIdx.x % 8 * 8;
    r.left = (int)c.n_in - k;
#pragma unroll
    for (int i = 0; i < r.OF_W; i++) {
        int64_t of = p.row0 + row + i * (THREADS / 8);
        r.w[i] = of < c.n_out ? (const bf16 *)c.w + of * c.n_in + k : nullptr;
    }
#pragma unroll
    for (int i = 0; i < r.OF_X; i++) {
        int token = row + i * (THREADS / 8);
        r.x[i] = token < p.n ? (const bf16 *)c.x + (p.token0 + token) * c.x_stride + k : nullptr;
    }
    return r;
}

template <int NT, int STAGES>
__device__ __forceinline__ void load_w(stream_shared<NT, STAGES> &m, const thread_rows<NT> &r,
                                       const void *any, int step)
{
#pragma unroll
    for (int i = 0; i < r.OF_W; i++) {
        bool valid = r.w[i] && step * STEP < r.left;
        copy16_stream(m.w[step % STAGES] +
                          tile_at<STEP>(threadIdx.x / 8 + i * (THREADS / 8), threadIdx.x % 8 * 8),
                      valid ? r.w[i] + step * STEP : any, valid);
    }
}

template <int NT, int STAGES>
__device__ __forceinline__ void load_x(stream_shared<NT, STAGES> &m, const thread_rows<NT> &r,
                                       const void *any, int step)
{
#pragma unroll
    for (int i = 0; i < r.OF_X; i++) {
        int token = threadIdx.x / 8 + i * (THREADS / 8);
        bool valid = r.x[i] && step * STEP < r.left;
        if (NT * 8 >= THREADS / 8 || token < NT * 8)
            copy16(m.x[step % STAGES] + tile_at<STEP>(token, threadIdx.x % 8 * 8),
                   valid ? r.x[i] + step * STEP : any, valid);
    }
}

/* A warp's 16 rows times all tokens, over its half of the stage. */
template <int NT>
__device__ __forceinline__ void multiply(const bf16 *w, const bf16 *x, int row, int k0,
                                         float (&acc)[NT][4])
{
    uint32_t a[2][4], b[4];
    load_a<STEP>(a[0], w, row, k0);
    load_a<STEP>(a[1], w, row, k0 + 16);
    if constexpr (NT == 1) {
        int lane = threadIdx.x & 31; /* 8 tokens by 32 of k */
        ldmatrix4(b, x + tile_at<STEP>(lane & 7, k0 + (lane >> 3) * 8));
        mma(acc[0], a[0], b[0], b[1]);
        mma(acc[0], a[1], b[2], b[3]);
    } else {
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < NT; i += 2) {
                load_b<STEP>(b, x, i * 8, k0 + j * 16);
                mma(acc[i], a[j], b[0], b[1]);
                mma(acc[i + 1], a[j], b[2], b[3]);
            }
    }
}

/* --- Adapters ----------------------------------------------------------------------------- */

/* The entries of this block, in any order: they share no token in a column. */
template <int NT, int STAGES>
__device__ void find_entries(stream_shared<NT, STAGES> &m, const qv_k_segments &s,
                             const qv_k_lora_site &site, const place &p)
{
    if (threadIdx.x == 0)
        m.n_entries = m.n_units = 0;
    if (threadIdx.x < MAX_TOKENS)
        m.owner[threadIdx.x] = NOBODY;
    __syncthreads();
    int first_slice = 0;
    while (first_slice + 1 < site.ranges.n && site.ranges.start[first_slice + 1] <= p.row0)
        first_slice++;
    int slice = first_slice + threadIdx.x % QV_K_STREAM_SLICES;
    bool overlaps = slice < site.ranges.n && site.ranges.start[slice] < p.row0 + ROWS &&
                    site.ranges.start[slice] < site.ranges.start[slice + 1];
    for (int seg = threadIdx.x / QV_K_STREAM_SLICES; seg < s.n_segs;
         seg += THREADS / QV_K_STREAM_SLICES) {
        int slot = s.seg_slot[seg];
        int64_t first = s.seg_start[seg] - p.token0, end = s.seg_start[seg + 1] - p.token0;
        first = first > 0 ? first : 0;
        end = end < p.n ? end : p.n;
        if (slot < 0 || first >= end)
            continue;
        int owner = seg % p.n_shares;
        for (int64_t i = first + threadIdx.x % QV_K_STREAM_SLICES; i < end; i += QV_K_STREAM_SLICES)
            m.owner[i] = (uint8_t)owner;
        if (owner != p.share || !overlaps)
            continue;
        qv_k_lora_slice of = site.slices[(int64_t)slot * site.ranges.n + slice];
        if (of.rank <= 0)
            continue;
        entry e = {(uint8_t)first,     (uint8_t)(end - first), (uint16_t)of.rank, slot,
                   (uint16_t)of.plane, (uint16_t)slice,        of.scale};
        m.entries[atomicAdd(&m.n_entries, 1)] = e;
        atomicAdd(&m.n_units, (of.rank + RANKS - 1) / RANKS);
    }
    __syncthreads();
}

/* A unit: 16 ranks of an entry, which is one adapter in one slice. */
struct cursor {
    int index, rank;
};

template <int NT, int STAGES>
__device__ __forceinline__ void advance(const stream_shared<NT, STAGES> &m, cursor &at)
{
    at.rank += RANKS;
    if (at.rank >= m.entries[at.index].rank) {
        at.rank = 0;
        at.index++;
    }
}

/* x1 of a unit: rows of 16 float32, pieces of 16 bytes permuted. */
__device__ __forceinline__ int x1_at(int token, int r)
{
    return token * RANKS + (((r >> 2) ^ (token >> 1 & 3)) << 2) + (r & 3);
}

/* B of a unit, columns outside of the slice and ranks above the adapter's as zeros. */
template <int NT, int STAGES>
__device__ __forceinline__ void load_b_unit(bf16 *to, const qv_k_lora_site &site, const place &p,
                                            const entry &e, int rank, int thread)
{
    int r = thread / 8, col = thread % 8 * 8;
    int64_t at = p.row0 + col, start = site.ranges.start[e.slice],
            end = site.ranges.start[e.slice + 1];
    const bf16 *b =
        (const bf16 *)site.b + ((int64_t)e.slot * site.max_rank + rank + r) * site.n_out;
    to += tile_at<ROWS>(r, col);
    bool outside = rank + r >= e.rank || at >= end || at + 8 <= start;
    if (outside || (at >= start && at + 8 <= end)) {
        copy16_stream(to, outside ? site.b : b + at, !outside);
    } else {
        for (int j = 0; j < 8; j++)
            to[j] = at + j >= start && at + j < end ? b[at + j] : __float2bfloat16(0.0f);
    }
}

__device__ __forceinline__ void load_x1_unit(float *to, const qv_k_lora_site &site, const float *x1,
                                             const place &p, const entry &e, int rank, int thread)
{
    for (int i = thread; i < e.n * (RANKS / 4); i += THREADS / UNITS) {
        int token = e.first + i / (RANKS / 4), r = i % (RANKS / 4) * 4;
        const float *from =
            x1 + ((p.token0 + token) * site.ranges.n + e.plane) * site.max_rank + rank + r;
        copy16(to + x1_at(token, r), rank + r < e.rank ? from : x1, rank + r < e.rank);
    }
}

/* The units of a stage from `at` on. Half of the threads each. */
template <int NT, int STAGES>
__device__ __forceinline__ void load_units(stream_shared<NT, STAGES> &m, const qv_k_lora_site &site,
                                           const float *x1, const place &p, int stage, cursor at)
{
    int unit = threadIdx.x / (THREADS / UNITS), thread = threadIdx.x % (THREADS / UNITS);
    if (unit == 1)
        advance(m, at);
    if (at.index >= m.n_entries)
        return;
    const entry e = m.entries[at.index];
    load_b_unit<NT, STAGES>(m.w[stage] + unit * RANKS * ROWS, site, p, e, at.rank, thread);
    load_x1_unit((float *)m.x[stage] + unit * NT * 8 * RANKS, site, x1, p, e, at.rank, thread);
}

/* Tiles of 8 tokens of a half of the warps. */
template <int NT> constexpr int HALF = NT == 1 ? 1 : NT / 2;

/* delta += scale B x1 of a unit, for a warp's 16 rows and its half of the tokens. */
template <int NT>
__device__ __forceinline__ void multiply_unit(const bf16 *b, const float *x1, const entry &e,
                                              int rank, int row, int first_tile,
                                              float (&delta)[HALF<NT>][4])
{
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, end = e.first + e.n;
    if (first_tile * 8 >= end || (first_tile + HALF<NT>)*8 <= e.first)
        return;
    uint32_t a[4];
    load_a_trans<ROWS>(a, b, row, 0);
#pragma unroll
    for (int i = 0; i < HALF<NT>; i++) {
        int tile = (first_tile + i) * 8, token = tile + g;
        if (tile >= end || tile + 8 <= e.first)
            continue;
        bool mine = token >= e.first && token < end;
        float v[4] = {};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int r = 2 * t + 8 * j;
            float2 of = mine ? *(const float2 *)(x1 + x1_at(token, r)) : make_float2(0, 0);
            v[2 * j] = rank + r < e.rank ? e.scale * of.x : 0;
            v[2 * j + 1] = rank + r + 1 < e.rank ? e.scale * of.y : 0;
        }
        uint32_t high[2], low[2];
        split_bf16(v[0], v[1], high[0], low[0]);
        split_bf16(v[2], v[3], high[1], low[1]);
        float d[4] = {};
        mma(d, a, high[0], high[1]);
        mma(d, a, low[0], low[1]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int column = tile + 2 * t + (j & 1);
            if (column >= e.first && column < end)
                delta[i][j] += d[j];
        }
    }
}

/* B of this block's units on their way into the L2 cache, ahead of most of W: else they would queue
 * behind all of it that is in flight. */
template <int NT, int STAGES>
__device__ void prefetch_units(const stream_shared<NT, STAGES> &m, const qv_k_lora_site &site,
                               const place &p)
{
    for (int i = threadIdx.x >> 5; i < m.n_entries; i += THREADS / 32) {
        const entry e = m.entries[i];
        const bf16 *b =
            (const bf16 *)site.b + (int64_t)e.slot * site.max_rank * site.n_out + p.row0;
        for (int rank = threadIdx.x & 31; rank < e.rank; rank += 32)
            prefetch(b + rank * site.n_out);
    }
}

/* --- Sums --------------------------------------------------------------------------------- */

/* A warp's fragment to [token][row]. */
__device__ __forceinline__ void put(float (*to)[PITCH], int row, int tile, const float (&acc)[4])
{
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < 4; j++)
        to[tile * 8 + 2 * t + (j & 1)][row + g + 8 * (j >> 1)] = acc[j];
}

/* Both halves of a block, then the blocks of the cluster in their order, then the adapters. A block
 * finishes its share of the rows. */
template <int NT, int STAGES, bool LORA>
__device__ void finish(stream_shared<NT, STAGES> &m, const qv_k_linear_args &c, const place &p)
{
    __syncthreads();
    if (p.n_shares > 1) {
        for (int i = threadIdx.x; i < NT * 8 * ROWS / 4; i += THREADS) {
            float4 *sum = (float4 *)&m.base[0][i / (ROWS / 4)][i % (ROWS / 4) * 4];
            float4 v = *sum;
            add4(v, *(const float4 *)&m.base[1][i / (ROWS / 4)][i % (ROWS / 4) * 4]);
            *sum = v;
        }
        cluster_sync();
    }
    int fours = ROWS / 4 / p.n_shares;
    for (int i = threadIdx.x; i < p.n * fours; i += THREADS) {
        int token = i / fours, row = (p.share * fours + i % fours) * 4;
        int owner = LORA ? m.owner[token] : NOBODY;
        float4 v[MAX_SHARES], delta = make_float4(0, 0, 0, 0); /* all loads before the first sum */
        if (p.n_shares == 1) {
            v[0] = *(const float4 *)&m.base[0][token][row];
            add4(v[0], *(const float4 *)&m.base[1][token][row]);
            if (owner != NOBODY)
                delta = *(const float4 *)&m.delta[token][row];
        } else {
#pragma unroll
            for (int rank = 0; rank < MAX_SHARES; rank++)
                if (rank < p.n_shares)
                    v[rank] = load_from(&m.base[0][token][row], rank);
            if (owner != NOBODY)
                delta = load_from(&m.delta[token][row], owner);
        }
#pragma unroll
        for (int rank = 1; rank < MAX_SHARES; rank++)
            if (rank < p.n_shares)
                add4(v[0], v[rank]);
        if (owner != NOBODY) /* -0 stays what it is where nothing is added */
            add4(v[0], delta);
        store4(c, p.token0 + token, p.row0 + row, v[0]);
    }
    if (p.n_shares > 1)
        cluster_sync(); /* the others have read this block's sums */
}

/* The same of up to 8 tokens without adapters. */
template <int NT, int STAGES, int TOKENS>
__device__ void finish_few(stream_shared<NT, STAGES> &m, cluster_sums<TOKENS> &sums,
                           const qv_k_linear_args &c, const place &p, const sum_group &g)
{
    __syncthreads();
    if (g.n > 1) {
        await_cluster();
        send_sums(sums, g, m.base);
    }
    int fours = 1 << g.shift;
    for (int i = threadIdx.x; i < p.n * fours; i += THREADS) {
        int token = i >> g.shift, four = i & (fours - 1);
        store4(c, p.token0 + token, p.row0 + (g.share * fours + four) * 4,
               sum_four(sums, g, m.base, token, 0, four));
    }
}

/* --- The kernel --------------------------------------------------------------------------- */

/* Grid (64 tokens, shares of k x 64 rows): blocks beside each other read the same rows of W. */
template <int NT, int STAGES, bool LORA>
__global__ void __launch_bounds__(THREADS, 3)
    stream_kernel(const __grid_constant__ qv_k_linear_args c,
                  const __grid_constant__ qv_k_stream_lora lora, int n_shares)
{
    let_next_start();
    extern __shared__ __align__(128) char stream_memory[];
    stream_shared<NT, STAGES> &m = *(stream_shared<NT, STAGES> *)stream_memory;
    place p;
    p.n_shares = n_shares;
    p.share = blockIdx.y % n_shares;
    p.row0 = (int64_t)(blockIdx.y / n_shares) * ROWS;
    p.token0 = (int64_t)blockIdx.x * MAX_TOKENS;
    p.n = (int)(c.n_tokens - p.token0 < MAX_TOKENS ? c.n_tokens - p.token0 : MAX_TOKENS);
    int all_steps = (int)((c.n_in + STEP - 1) / STEP);
    p.first_step = all_steps * p.share / n_shares;
    p.n_steps = all_steps * (p.share + 1) / n_shares - p.first_step;

    constexpr bool FEW = NT == 1 && !LORA;
    __shared__ cluster_sums<FEW ? SUM_TOKENS : 1> sums;
    const sum_group group = make_group(n_shares, p.share, 0, p.n, ROWS);
    if (FEW && n_shares > 1)
        begin_sums(sums, group);
    constexpr int FIRST = LORA ? 2 : STAGES - 1; /* stages of W ahead of the adapters */
    const thread_rows<NT> rows = rows_of<NT>(c, p);
#pragma unroll
    for (int i = 0; i < FIRST; i++)
        if (i < p.n_steps)
            load_w(m, rows, c.w, i);
    int unit_steps = 0;
    cursor loading = {0, 0};
    if (LORA) {
        find_entries(m, lora.segments, lora.site, p);
        unit_steps = (m.n_units + UNITS - 1) / UNITS;
        prefetch_units(m, lora.site, p);
    }
#pragma unroll
    for (int i = FIRST; i < STAGES - 1; i++)
        if (i < p.n_steps)
            load_w(m, rows, c.w, i);
    if (!c.x_is_there)
        wait_for_previous();
    int steps = p.n_steps + unit_steps;
    /* x of a step, or a step of units. */
    auto load = [&](int step) {
        if (step < p.n_steps) {
            load_x(m, rows, c.x, step);
        } else if (LORA && step < steps) {
            load_units(m, lora.site, lora.x1, p, step % STAGES, loading);
            for (int i = 0; i < UNITS && loading.index < m.n_entries; i++)
                advance(m, loading);
        }
        copies_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        load(i);

    int warp = threadIdx.x >> 5, half = warp >> 2, row = (warp & 3) * 16;
    int first_tile = NT == 1 ? half : half * HALF<NT>;
    float acc[NT][4] = {}, delta[HALF<NT>][4] = {};
    for (int step = 0; step < p.n_steps; step++) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < p.n_steps)
            load_w(m, rows, c.w, step + STAGES - 1);
        load(step + STAGES - 1);
        multiply<NT>(m.w[step % STAGES], m.x[step % STAGES], row, half * 32, acc);
    }
    cursor at = {0, 0};
    for (int step = p.n_steps; LORA && step < steps; step++) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);
        for (int i = 0; i < UNITS && at.index < m.n_entries; i++) {
            multiply_unit<NT>(m.w[step % STAGES] + i * RANKS * ROWS,
                              (const float *)m.x[step % STAGES] + i * NT * 8 * RANKS,
                              m.entries[at.index], at.rank, row, first_tile, delta);
            advance(m, at);
        }
    }
    copies_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < NT; i++)
        put(m.base[half], row, i, acc[i]);
#pragma unroll
    for (int i = 0; LORA && i < HALF<NT>; i++)
        if (first_tile + i < NT)
            put(m.delta, row, first_tile + i, delta[i]);
    if constexpr (FEW)
        finish_few(m, sums, c, p, group);
    else
        finish<NT, STAGES, LORA>(m, c, p);
    if (c.x_is_there)
        wait_for_previous(); /* whoever waits for this kernel also waits for that one */
}

/* --- Launch ------------------------------------------------------------------------------- */

/* Blocks that share 64 rows: as many as keep all blocks on the device at once, three to a
 * multiprocessor, while each has some steps. The choice depends on W alone. */
int shares_of(const qv_k_linear_args &c, int n_sms)
{
    int64_t tiles = (c.n_out + ROWS - 1) / ROWS, steps = (c.n_in + STEP - 1) / STEP;
    int shares = 1;
    while (shares < MAX_SHARES && tiles * shares * 2 <= 3 * n_sms && steps >= shares * 2 * 4)
        shares *= 2;
    return shares;
}

template <int NT, int STAGES, bool LORA>
cudaError_t launch(const qv_k_linear_args &c, const qv_k_stream_lora &lora, int n_sms,
                   cudaStream_t stream)
{
    cudaLaunchAttribute attributes[2];
    int shares = shares_of(c, n_sms);
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = 1;
    attributes[1].val.clusterDim.y = (unsigned)shares;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((c.n_tokens + MAX_TOKENS - 1) / MAX_TOKENS),
                          (unsigned)((c.n_out + ROWS - 1) / ROWS * shares));
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    config.dynamicSmemBytes = sizeof(stream_shared<NT, STAGES>);
    cudaError_t error = cudaFuncSetAttribute(stream_kernel<NT, STAGES, LORA>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)config.dynamicSmemBytes);
    return error == cudaSuccess
               ? cudaLaunchKernelEx(&config, stream_kernel<NT, STAGES, LORA>, c, lora, shares)
               : error;
}

template <bool LORA>
cudaError_t choose(const qv_k_linear_args &c, const qv_k_stream_lora &lora, int n_sms,
                   cudaStream_t stream)
{
    return c.n_tokens <= 8    ? launch<1, 7, LORA>(c, lora, n_sms, stream)
           : c.n_tokens <= 16 ? launch<2, 6, LORA>(c, lora, n_sms, stream)
           : c.n_tokens <= 32 ? launch<4, 5, LORA>(c, lora, n_sms, stream)
                              : launch<8, 4, LORA>(c, lora, n_sms, stream);
}

} // namespace

bool qv_k_stream_linear_can(const qv_k_linear_args *c, const qv_k_stream_lora *lora)
{
    bool can = !c->w_f32 && c->rest == NULL && c->n_in % 8 == 0 && c->n_in <= 1 << 24 &&
               c->x_stride % 8 == 0 && (uintptr_t)c->w % 16 == 0 && (uintptr_t)c->x % 16 == 0;
    if (!can || lora == NULL)
        return can;
    const qv_k_lora_site *s = &lora->site;
    return c->n_out % 8 == 0 && (uintptr_t)s->b % 16 == 0 && s->max_rank % 4 == 0 &&
           (uintptr_t)lora->x1 % 16 == 0 && most_slices(s->ranges, ROWS) <= QV_K_STREAM_SLICES;
}

int qv_k_stream_linear_shares(const qv_k_linear_args *c, int n_sms)
{
    return shares_of(*c, n_sms);
}

qv_status qv_k_stream_linear(const qv_k_linear_args *c, const qv_k_stream_lora *lora, int n_sms,
                             void *stream)
{
    qv_k_stream_lora none = {};
    cudaError_t error = lora != NULL ? choose<true>(*c, *lora, n_sms, (cudaStream_t)stream)
                                     : choose<false>(*c, none, n_sms, (cudaStream_t)stream);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: stream_linear: %s", cudaGetErrorString(error));
    return qv_k_check_launch("stream_linear");
}
