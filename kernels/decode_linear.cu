/* y = W x, and for the tokens of adapters + scale B (A x), for 9 to 64 tokens: a decode step of
 * several sequences, which is bound by reading W and B once.
 *
 * W is wgmma's first operand and tokens are its columns, so that only tokens are padded. A block
 * takes 64 rows of W, all tokens, and a share of k. One warp fetches W and x by the copy engine
 * into a ring of stages of 64 along k, whose full size is in flight always; a warpgroup multiplies.
 * Blocks of a cluster share k: they exchange sums through each other's shared memory, and each adds
 * up, in the order of the shares, and writes a part of the outputs.
 *
 * The pairs of adapters follow in the same ring, as more of k: a unit is 16 ranks of one adapter in
 * one slice, B [16][rows] as the pool has it and x1 = A x of its tokens. They go through mma.sync
 * into the accumulators of wgmma, which have its layout: a unit then costs the tiles of 8 tokens
 * that its adapter has, and x1 keeps 16 bits of its float32. What a unit gives for the tokens of
 * others is not used, so that an adapter of infinities or NaNs harms none but its own tokens.
 *
 * Launches in a row. This kernel lets the next one start at once. Without adapters it fetches W,
 * and waits for the kernel before it ahead of x. With adapters that kernel is shrink (lora.cu),
 * which lets this one start when all before shrink is complete: x may be read at once, and what
 * remains to wait for is x1, which comes last. y is written, and the grid ends, behind that wait:
 * who waits for this grid waits for shrink and all before it. Nobody writes x, x1 or y meanwhile:
 * who would, waits for this grid. What is read ahead of the wait (W, B, segments, slices) does not
 * change in a step.
 *
 * Bytes: 2 n_out n_in + 2 r n_out an adapter. Rings of a third of the shared memory leave room for
 * three blocks to a multiprocessor, so that all of a product's are there at once and each has the
 * same part of the memory's rate; one may be the next product's.
 */
#include "kernels/linear_parts.cuh"
#include "kernels/tensor_map.cuh"
#include "kernels/wgmma_shapes.cuh"

namespace
{

constexpr int STEP = 64;      /* of k, of a stage */
constexpr int MAX_SHARES = 8; /* blocks of a cluster */
constexpr int ROWS = 64;      /* of W, of a block */
constexpr int WORKERS = 128;
constexpr int THREADS = WORKERS + 32;
constexpr int BLOCKS = 3; /* of a multiprocessor */

/* One adapter in one slice. */
struct entry {
    int32_t slot;
    float scale;
    uint16_t first, n; /* tokens */
    uint16_t rank;
    uint8_t plane, slice;
};

/* Room for N tokens. */
template <int N_, int STAGES_, bool LORA_> struct form {
    static constexpr int N = N_, STAGES = STAGES_;
    static constexpr bool LORA = LORA_;
    static constexpr int ENTRIES = LORA ? N * QV_K_STREAM_SLICES : 1;
};

template <class F> struct decode_shared {
    union {
        struct {
            bf16 w[F::STAGES][ROWS * STEP]; /* or UNITS of B, each [rank][64] */
            bf16 x[F::STAGES][F::N * STEP]; /* or UNITS of x1, float32 [token][rank] */
        };
        float sums[F::N][ROWS + 4]; /* [token][row]: lanes of a fragment hit different banks */
    };
    /* full: W and x, or B, are there. x1_full: x1 is. empty: what the stage held has been read. */
    uint64_t full[F::STAGES], x1_full[F::STAGES], empty[F::STAGES];
    entry entries[F::ENTRIES];
    int n_entries, n_units;
};

/* What a block works on. */
struct place {
    int row0;                /* first row of W */
    int n;                   /* tokens */
    int share, n_shares;     /* of k */
    int first_step, n_steps; /* of k */
};

/* --- W and x: one thread ------------------------------------------------------------------- */

template <class F>
__device__ __forceinline__ void fetch_w(decode_shared<F> &m, const void *map, const place &p,
                                        int step)
{
    int at = step % F::STAGES;
    barrier_expect(&m.full[at], (ROWS + F::N) * STEP * (int)sizeof(bf16));
    copy_box_here(m.w[at], map, (p.first_step + step) * STEP, p.row0, 0, &m.full[at]);
}

template <class F>
__device__ __forceinline__ void fetch_x(decode_shared<F> &m, const void *map, const place &p,
                                        int step)
{
    int at = step % F::STAGES;
    copy_box_here(m.x[at], map, (p.first_step + step) * STEP, 0, 0, &m.full[at]);
}

/* --- Adapters ------------------------------------------------------------------------------ */

/* The entries of this block, in any order: they share no token in a column. Those of a cluster that
 * shares k are dealt out by segment. All threads. */
template <class F>
__device__ __forceinline__ void find_entries(decode_shared<F> &m, const qv_k_segments &s,
                                             const qv_k_lora_site &site, const place &p)
{
    if (threadIdx.x == 0)
        m.n_entries = m.n_units = 0;
    __syncthreads();
    int first_slice = 0;
    while (first_slice + 1 < site.ranges.n && site.ranges.start[first_slice + 1] <= p.row0)
        first_slice++;
    int slice = first_slice + (int)threadIdx.x % QV_K_STREAM_SLICES;
    bool overlaps = slice < site.ranges.n && site.ranges.start[slice] < p.row0 + ROWS &&
                    site.ranges.start[slice] < site.ranges.start[slice + 1];
    for (int seg = (int)threadIdx.x / QV_K_STREAM_SLICES; overlaps && seg < s.n_segs;
         seg += THREADS / QV_K_STREAM_SLICES) {
        int slot = s.seg_slot[seg], first = s.seg_start[seg], end = min(s.seg_start[seg + 1], p.n);
        if (slot < 0 || first >= end || seg % p.n_shares != p.share)
            continue;
        qv_k_lora_slice of = site.slices[(int64_t)slot * site.ranges.n + slice];
        if (of.rank <= 0)
            continue;
        entry e;
        e.slot = slot;
        e.scale = of.scale;
        e.first = (uint16_t)first;
        e.n = (uint16_t)(end - first);
        e.rank = (uint16_t)of.rank;
        e.plane = (uint8_t)of.plane;
        e.slice = (uint8_t)slice;
        m.entries[atomicAdd(&m.n_entries, 1)] = e;
        atomicAdd(&m.n_units, (of.rank + RANKS - 1) / RANKS);
    }
    __syncthreads();
}

/* B of a unit. One thread. */
template <class F>
__device__ __forceinline__ void fetch_b(decode_shared<F> &m, const void *map, const place &p,
                                        int at, int unit, const entry &e, int rank)
{
    copy_box_here(m.w[at] + unit * RANKS * ROWS, map, p.row0, rank, e.slot, &m.full[at]);
}

/* x1 of a unit; ranks that the pool does not have as zeros. One warp. */
template <class F>
__device__ __forceinline__ void fetch_x1(decode_shared<F> &m, const qv_k_lora_site &site,
                                         const float *x1, int at, int unit, const entry &e,
                                         int rank)
{
    float *to = (float *)m.x[at] + unit * F::N * RANKS;
    for (int i = (int)threadIdx.x & 31; i < e.n * (RANKS / 4); i += 32) {
        int token = e.first + i / (RANKS / 4), r = i % (RANKS / 4) * 4;
        const float *from =
            x1 + ((int64_t)token * site.ranges.n + e.plane) * site.max_rank + rank + r;
        copy16(to + x1_at(token, r), rank + r < e.rank ? from : x1, rank + r < e.rank);
    }
}

/* What of two neighbouring BF16 numbers exists, if `n` do. */
[[maybe_unused]] __device__ __forceinline__ uint32_t mask_of(int n)
{
    return n >= 2 ? 0xffffffffu : n == 1 ? 0xffffu : 0;
}

/* acc += scale B x1 of a unit for a warp's 16 rows from `row` on, which is `row_of_w` of W. */
template <class F>
__device__ __forceinline__ void multiply_unit(const bf16 *b, const float *x1, const entry &e,
                                              const qv_k_slices &ranges, int rank, int row,
                                              int row_of_w, float (&acc)[F::N / 2])
{
    int lane = (int)threadIdx.x & 31, g = lane >> 2, t = lane & 3, end = e.first + e.n;
    int start = ranges.start[e.slice] - row_of_w, stop = ranges.start[e.slice + 1] - row_of_w;
    if (start >= 16 || stop <= 0)
        return;
    bool own_row[2] = {g >= start && g < stop, g + 8 >= start && g + 8 < stop};
    uint32_t a[4], mask[2] = {mask_of(e.rank - rank - 2 * t), mask_of(e.rank - rank - 2 * t - 8)};
    load_a_trans<64>(a, b, row, 0);
#pragma unroll
    for (int i = 0; i < 4; i++)
        a[i] &= mask[i >> 1];
#pragma unroll
    for (int i = 0; i < F::N / 8; i++) {
        int tile = i * 8;
        if (tile >= end || tile + 8 <= e.first)
            continue;
        uint32_t high[2], low[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float2 v = *(const float2 *)(x1 + x1_at(tile + g, 2 * t + 8 * j));
            split_bf16(v.x, v.y, high[j], low[j]);
            high[j] &= mask[j];
            low[j] &= mask[j];
        }
        float d[4] = {};
        mma(d, a, high[0], high[1]);
        mma(d, a, low[0], low[1]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int column = tile + 2 * t + (j & 1);
            if (own_row[j >> 1] && column >= e.first && column < end) {
                float &sum = acc[tile / 2 + j];
                sum = fmaf(e.scale, d[j], sum);
            }
        }
    }
}

/* --- The two kinds of warps ---------------------------------------------------------------- */

/* Wait until what a stage held before `step` has been read. */
template <class F> __device__ __forceinline__ void wait_for_stage(decode_shared<F> &m, int step)
{
    if (step >= F::STAGES)
        barrier_wait(&m.empty[step % F::STAGES], (step / F::STAGES - 1) & 1);
}

/* The warp that fetches, from where the kernel's start has left off: W is on its way for the first
 * stages, and with adapters x. */
template <class F>
__device__ __forceinline__ void fetch(decode_shared<F> &m, const qv_k_stream_lora &lora,
                                      const void *w_map, const void *x_map, const void *b_map,
                                      const place &p)
{
    int lane = (int)threadIdx.x & 31;
    if (lane == 0) {
        if (!F::LORA)
            wait_for_previous();
        for (int step = 0; !F::LORA && step < min(F::STAGES, p.n_steps); step++)
            fetch_x(m, x_map, p, step);
        for (int step = F::STAGES; step < p.n_steps; step++) {
            wait_for_stage(m, step);
            fetch_w(m, w_map, p, step);
            fetch_x(m, x_map, p, step);
        }
    }
    __syncwarp();
    if (!F::LORA)
        return;
    cursor next = {0, 0};
    for (int i = 0; i * UNITS < m.n_units; i++) {
        int step = p.n_steps + i, at = step % F::STAGES, n = min(UNITS, m.n_units - i * UNITS);
        wait_for_stage(m, step);
        cursor first = next;
        if (lane == 0)
            barrier_expect(&m.full[at], n * RANKS * ROWS * (int)sizeof(bf16));
        for (int u = 0; u < n; u++, advance(m, next))
            if (lane == 0)
                fetch_b(m, b_map, p, at, u, m.entries[next.index], next.rank);
        if (i == 0)
            wait_for_previous(); /* from here on there is x1 */
        next = first;
        for (int u = 0; u < n; u++, advance(m, next))
            fetch_x1(m, lora.site, lora.x1, at, u, m.entries[next.index], next.rank);
        barrier_arrive_copies(&m.x1_full[at]);
    }
}

/* Where a warp reads: a stage, and the parity of its phase. */
struct reader {
    int at, parity;
};

/* This warp has read the stage: who fetches into it may go on. */
template <class F> __device__ __forceinline__ void release(decode_shared<F> &m, reader &r)
{
    if ((threadIdx.x & 31) == 0)
        barrier_arrive(&m.empty[r.at]);
    if (++r.at == F::STAGES) {
        r.at = 0;
        r.parity ^= 1;
    }
}

/* The block's rows, to m.sums when the whole block has multiplied. */
template <class F>
__device__ __forceinline__ void multiply(decode_shared<F> &m, const qv_k_stream_lora &lora,
                                         const place &p, float (&acc)[F::N / 2])
{
    int row = ((int)threadIdx.x >> 5) * 16;
    reader r = {0, 0};
    wgmma_keep(acc);
#pragma unroll 1
    for (int step = 0; step < p.n_steps; step++) {
        barrier_wait(&m.full[r.at], r.parity);
        uint64_t a = wgmma_tile(m.w[r.at]), b = wgmma_tile(m.x[r.at]);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < STEP / 16; k++)
            wgmma<F::N>(acc, a + 2 * k, b + 2 * k);
        wgmma_commit();
        wgmma_wait<0>();
        release(m, r);
    }
    wgmma_keep(acc);
    if (!F::LORA)
        return;
    cursor next = {0, 0};
    for (int i = 0; i * UNITS < m.n_units; i++) {
        barrier_wait(&m.full[r.at], r.parity);
        barrier_wait(&m.x1_full[r.at], (i / F::STAGES) & 1);
        int n = min(UNITS, m.n_units - i * UNITS);
        for (int u = 0; u < n; u++, advance(m, next))
            multiply_unit<F>(m.w[r.at] + u * RANKS * ROWS,
                             (const float *)m.x[r.at] + u * F::N * RANKS, m.entries[next.index],
                             lora.site.ranges, next.rank, row, p.row0 + row, acc);
        __syncwarp();
        release(m, r);
    }
}

/* --- Sums ---------------------------------------------------------------------------------- */

/* A warp's accumulators to [token][row]. */
template <class F>
__device__ __forceinline__ void put(decode_shared<F> &m, const float (&acc)[F::N / 2])
{
    int lane = (int)threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int row = ((int)threadIdx.x >> 5) * 16 + g;
#pragma unroll
    for (int i = 0; i < F::N / 2; i++)
        m.sums[i / 4 * 8 + 2 * t + (i & 1)][row + 8 * (i >> 1 & 1)] = acc[i];
}

/* The shares of a block's outputs, added up in their order: each block of them has as many. */
template <class F>
__device__ __forceinline__ void finish(decode_shared<F> &m, const qv_k_linear_args &c,
                                       const place &p)
{
    constexpr int FOURS = ROWS / 4;
    int n = p.n * FOURS, end = n * (p.share + 1) / p.n_shares;
    for (int i = n * p.share / p.n_shares + (int)threadIdx.x; i < end; i += THREADS) {
        int token = i / FOURS, row = i % FOURS * 4;
        const float *from = &m.sums[token][row];
        float4 v[MAX_SHARES]; /* all loads before the first sum */
        if (p.n_shares == 1) {
            v[0] = *(const float4 *)from;
        } else {
#pragma unroll
            for (int share = 0; share < MAX_SHARES; share++)
                if (share < p.n_shares)
                    v[share] = load_from(from, share);
        }
#pragma unroll
        for (int share = 1; share < MAX_SHARES; share++)
            if (share < p.n_shares)
                add4(v[0], v[share]);
        store4(c, token, p.row0 + row, v[0]);
    }
}

/* --- The kernel ---------------------------------------------------------------------------- */

/* Grid (shares of k, tiles of rows), a cluster being all shares of a tile. */
template <class F>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    decode_kernel(const __grid_constant__ qv_k_linear_args c,
                  const __grid_constant__ qv_k_stream_lora lora,
                  const __grid_constant__ CUtensorMap w_map,
                  const __grid_constant__ CUtensorMap x_map,
                  const __grid_constant__ CUtensorMap b_map)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    let_next_start();
    extern __shared__ __align__(1024) char decode_memory[];
    decode_shared<F> &m = *(decode_shared<F> *)(((uintptr_t)decode_memory + 1023) / 1024 * 1024);
    place p;
    p.share = (int)blockIdx.x;
    p.n_shares = (int)gridDim.x;
    p.row0 = (int)blockIdx.y * ROWS;
    p.n = (int)c.n_tokens;
    int all_steps = (int)((c.n_in + STEP - 1) / STEP);
    p.first_step = all_steps * p.share / p.n_shares;
    p.n_steps = all_steps * (p.share + 1) / p.n_shares - p.first_step;

    if (threadIdx.x == WORKERS) {
        for (int i = 0; i < F::STAGES; i++) {
            barrier_init(&m.full[i], 1);
            barrier_init(&m.x1_full[i], 32);
            barrier_init(&m.empty[i], WORKERS / 32);
        }
        barriers_publish();
        for (int i = 0; i < min(F::STAGES, p.n_steps); i++) {
            fetch_w(m, &w_map, p, i);
            if (F::LORA)
                fetch_x(m, &x_map, p, i);
        }
    }
    __syncthreads();
    if (F::LORA)
        find_entries(m, lora.segments, lora.site, p);

    if (threadIdx.x >= WORKERS) {
        fetch(m, lora, &w_map, &x_map, &b_map, p);
        __syncthreads();
    } else {
        float acc[F::N / 2] = {};
        multiply(m, lora, p, acc);
        __syncthreads(); /* nobody reads a stage any more */
        put(m, acc);
    }
    if (p.n_shares > 1)
        cluster_sync();
    else
        __syncthreads();
    wait_for_previous();
    finish(m, c, p);
    if (p.n_shares > 1)
        cluster_sync(); /* the others have read this block's sums */
#else
    (void)c, (void)lora, (void)w_map, (void)x_map, (void)b_map;
    __trap(); /* not launched on other devices */
#endif
}

/* --- Launch -------------------------------------------------------------------------------- */

/* BF16 [n2][n1][n0] with rows `stride` apart, in boxes of `rows` rows of 64. */
qv_status make_map(const void *data, int64_t n0, int64_t n1, int64_t n2, int64_t stride, int rows,
                   CUtensorMap *map)
{
    const cuuint64_t sizes[3] = {(cuuint64_t)n0, (cuuint64_t)n1, (cuuint64_t)n2};
    const cuuint64_t strides[2] = {(cuuint64_t)stride * 2, (cuuint64_t)(stride * n1) * 2};
    const cuuint32_t box[3] = {64, (cuuint32_t)rows, 1};
    return qv_k_tensor_map("decode_linear", data, sizes, strides, box, map);
}

template <class F>
qv_status launch(const qv_k_linear_args &c, const qv_k_stream_lora &lora, int shares,
                 cudaStream_t stream)
{
    CUtensorMap w, x, b = {};
    QV_TRY(make_map(c.w, c.n_in, c.n_out, 1, c.n_in, ROWS, &w));
    QV_TRY(make_map(c.x, c.n_in, c.n_tokens, 1, c.x_stride, F::N, &x));
    if (F::LORA)
        QV_TRY(make_map(lora.site.b, c.n_out, lora.site.max_rank, lora.site.n_slots, c.n_out, RANKS,
                        &b));
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = (unsigned)shares;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)shares, (unsigned)((c.n_out + ROWS - 1) / ROWS));
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    config.dynamicSmemBytes = sizeof(decode_shared<F>) + 1024;
    cudaError_t error =
        cudaFuncSetAttribute(decode_kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)config.dynamicSmemBytes);
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, decode_kernel<F>, c, lora, w, x, b);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: decode_linear: %s", cudaGetErrorString(error));
    return qv_k_check_launch("decode_linear");
}

typedef qv_status launch_fn(const qv_k_linear_args &c, const qv_k_stream_lora &lora, int shares,
                            cudaStream_t stream);

/* The forms there are: tokens, stages. */
#define QV_DECODE_FORMS(X) X(32, 5) X(64, 4)

const qv_k_decode_form forms[] = {
#define QV_DECODE_ROW(tokens, stages) {tokens, stages},
    QV_DECODE_FORMS(QV_DECODE_ROW)
#undef QV_DECODE_ROW
};

launch_fn *const launchers[][2] = {
#define QV_DECODE_ROW(tokens, stages)                                                              \
    {launch<form<tokens, stages, false>>, launch<form<tokens, stages, true>>},
    QV_DECODE_FORMS(QV_DECODE_ROW)
#undef QV_DECODE_ROW
};

constexpr int N_FORMS = sizeof forms / sizeof *forms;

int choose_form(const qv_k_linear_args &c)
{
    return c.n_tokens <= forms[0].tokens ? 0 : 1;
}

/* Blocks that share k: so many that a multiprocessor has nearly two, with some steps each; with
 * adapters, which they share too, at least two if all have room at once. The best on an H100 (132
 * multiprocessors) at 16 and 64 tokens:
 *
 *                  alone    8 adapters of rank 16
 *   12352 x 2560   1, 1     2, 2
 *   10240 x 2560   1, 1     1 (2 as good), 2
 *   18432 x 2560   1, 1     1, 1
 *    2560 x 4096   4, 4     8 (5: 1.5 % more), 4
 *    2560 x 9216   4, 5     4 (5 as good), 5
 */
int choose_shares(const qv_k_linear_args &c, bool lora, int n_sms)
{
    int64_t tiles = (c.n_out + ROWS - 1) / ROWS, steps = (c.n_in + STEP - 1) / STEP;
    int shares = 1;
    while (shares < MAX_SHARES && tiles * (shares + 1) * 10 <= 2 * n_sms * 9 &&
           steps >= (shares + 1) * 4)
        shares++;
    return shares == 1 && lora && 2 * tiles <= BLOCKS * n_sms && steps >= 2 * 4 ? 2 : shares;
}

} // namespace

const qv_k_decode_form *qv_k_decode_forms(int *n)
{
    *n = N_FORMS;
    return forms;
}

bool qv_k_decode_linear_can(const qv_k_linear_args *c, const qv_k_stream_lora *lora)
{
    bool can = c->n_tokens <= QV_K_DECODE_TOKENS && !c->w_f32 && c->rest == NULL &&
               c->n_in % 8 == 0 && c->x_stride % 8 == 0 && (uintptr_t)c->w % 16 == 0 &&
               (uintptr_t)c->x % 16 == 0 && c->n_out < INT32_MAX / 2 && qv_k_is_hopper();
    if (!can || lora == NULL)
        return can;
    const qv_k_lora_site *s = &lora->site;
    return c->n_out % 8 == 0 && (uintptr_t)s->b % 16 == 0 && s->max_rank % 4 == 0 &&
           (uintptr_t)lora->x1 % 16 == 0 && most_slices(s->ranges, ROWS) <= QV_K_STREAM_SLICES;
}

qv_status qv_k_decode_linear(const qv_k_linear_args *c, const qv_k_stream_lora *lora,
                             qv_k_decode_tuning tuning, int n_sms, void *stream)
{
    qv_k_stream_lora none = {};
    int form = tuning.form > 0 ? tuning.form - 1 : choose_form(*c);
    if (form >= N_FORMS || c->n_tokens > forms[form].tokens)
        return qv_fail(QV_ERR_LIMIT, "decode_linear: form %d of %d for %lld tokens", form + 1,
                       N_FORMS, (long long)c->n_tokens);
    int steps = (int)((c->n_in + STEP - 1) / STEP);
    int shares = tuning.shares > 0 ? tuning.shares : choose_shares(*c, lora != NULL, n_sms);
    shares = shares > MAX_SHARES ? MAX_SHARES : shares > steps ? steps : shares;
    return launchers[form][lora != NULL](*c, lora != NULL ? *lora : none, shares,
                                         (cudaStream_t)stream);
}
