/* y = W x, and for the tokens of adapters + scale B (A x), for 9 to 64 tokens: a decode step of
 * several sequences, which is bound by reading W, A and B once.
 *
 * W is wgmma's first operand and tokens are its columns, so that only tokens are padded. A block
 * takes 64 rows of W, all tokens, and a share of k. One warp fetches W and x by the copy engine
 * into a ring of stages of 64 along k, whose full size is in flight always; a warpgroup multiplies.
 * Blocks of a cluster share k: they exchange sums through each other's shared memory, and each adds
 * up, in the order of the shares, and writes a part of the outputs.
 *
 * With adapters the first blocks compute x1 = A x (decode_shrink.cuh) while the others fetch W,
 * whose pairs of adapters follow in the same ring, as more of k: a unit is 16 ranks of one adapter
 * in one slice, B [16][rows] as the pool has it and x1 of its tokens. They go through mma.sync into
 * the accumulators of wgmma, which have its layout: a unit then costs the tiles of 8 tokens that
 * its adapter has, and x1 keeps 16 bits of its float32. What a unit gives for the tokens of others
 * is not used, so that an adapter of infinities or NaNs harms none but its own tokens.
 *
 * Launches in a row. This kernel lets the next one start at once, fetches W or A, and waits for the
 * kernel before it ahead of x. What is read ahead of the wait (W, A, B, segments, slices) does not
 * change in a step.
 *
 * Bytes: 2 n_out n_in + 2 r (n_in + n_out) an adapter. Rings of a third of the shared memory leave
 * room for three blocks to a multiprocessor, so that all of a product's are there at once and each
 * has the same part of the memory's rate; one may be the next product's.
 */
#include "kernels/decode_shrink.cuh"
#include "kernels/tensor_map.cuh"

namespace
{

struct maps {
    CUtensorMap w, x, b;
};

/* --- W and x: one thread ------------------------------------------------------------------- */

template <class F>
__device__ __forceinline__ void fetch_w(decode_shared<F> &m, const void *map, const place &p,
                                        int stage, int step)
{
    int at = stage % F::STAGES;
    barrier_expect(&m.full[at], (ROWS + F::N) * STEP * (int)sizeof(bf16));
    copy_box_here(m.w[at], map, (p.first_step + step) * STEP, p.row0, 0, &m.full[at]);
}

template <class F>
__device__ __forceinline__ void fetch_x(decode_shared<F> &m, const void *map, const place &p,
                                        int stage, int step)
{
    int at = stage % F::STAGES;
    copy_box_here(m.x[at], map, (p.first_step + step) * STEP, 0, 0, &m.full[at]);
}

/* Steps [first, end), `shift` stages further on. */
template <class F>
__device__ __forceinline__ void fetch_steps(decode_shared<F> &m, const maps &of, const place &p,
                                            int first, int end, int shift)
{
    for (int step = first; step < end; step++) {
        wait_for_stage(m, step + shift);
        fetch_w(m, &of.w, p, step + shift, step);
        fetch_x(m, &of.x, p, step + shift, step);
    }
}

/* --- Adapters ------------------------------------------------------------------------------ */

/* The entries of this block, in any order: they share no token in a column. Those of a cluster that
 * shares k are dealt out by segment. One warp. */
template <class F>
__device__ __forceinline__ void find_entries(decode_shared<F> &m, const qv_k_segments &s,
                                             const qv_k_lora_site &site, const place &p)
{
    int lane = (int)threadIdx.x & 31;
    int first_slice = 0;
    while (first_slice + 1 < site.ranges.n && site.ranges.start[first_slice + 1] <= p.row0)
        first_slice++;
    int slice = first_slice + lane % QV_K_STREAM_SLICES;
    bool overlaps = slice < site.ranges.n && site.ranges.start[slice] < p.row0 + ROWS &&
                    site.ranges.start[slice] < site.ranges.start[slice + 1];
    for (int seg = lane / QV_K_STREAM_SLICES; overlaps && seg < s.n_segs;
         seg += 32 / QV_K_STREAM_SLICES) {
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
        atomicAdd(&m.n_units, ceiling(of.rank, RANKS));
        atomicMax(&m.widest, ((end + 7) & ~7) - (first & ~7));
    }
    barrier_arrive(&m.found);
}

/* B of n units. One thread. */
template <class F>
__device__ __forceinline__ void fetch_b(decode_shared<F> &m, const void *map, const place &p,
                                        int at, int n, cursor &next)
{
    barrier_expect(&m.full[at], n * RANKS * ROWS * (int)sizeof(bf16));
    for (int u = 0; u < n; u++, advance(m, next))
        copy_box_here(m.w[at] + u * RANKS * ROWS, map, p.row0, next.rank,
                      m.entries[next.index].slot, &m.full[at]);
}

/* x1 of n units; ranks that the pool does not have as zeros. One warp. */
template <class F>
__device__ __forceinline__ void fetch_x1(decode_shared<F> &m, const qv_k_lora_site &site,
                                         const float *x1, int at, int n, cursor &next)
{
    for (int u = 0; u < n; u++, advance(m, next)) {
        const entry &e = m.entries[next.index];
        float *to = x1_of(m, at, u);
        int row0 = first_row(m, e);
        for (int i = (int)threadIdx.x & 31; i < e.n * (RANKS / 4); i += 32) {
            int token = e.first + i / (RANKS / 4), r = i % (RANKS / 4) * 4, rank = next.rank + r;
            const float *from =
                x1 + ((int64_t)token * site.ranges.n + e.plane) * site.max_rank + rank;
            copy16(to + x1_at(token - row0, r), rank < e.rank ? from : x1, rank < e.rank);
        }
    }
    barrier_arrive_copies(&m.x1_full[at]);
}

/* What of two neighbouring BF16 numbers exists, if `n` do. */
[[maybe_unused]] __device__ __forceinline__ uint32_t mask_of(int n)
{
    return n >= 2 ? 0xffffffffu : n == 1 ? 0xffffu : 0;
}

/* acc += scale B x1 of a unit for a warp's 16 rows from `row` on, which is `row_of_w` of W. x1 has
 * the tokens from `first` on. */
template <class F>
__device__ __forceinline__ void multiply_unit(const bf16 *b, const float *x1, const entry &e,
                                              int first, const qv_k_slices &ranges, int rank,
                                              int row, int row_of_w, float (&acc)[F::N / 2])
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
            float2 v = *(const float2 *)(x1 + x1_at(tile - first + g, 2 * t + 8 * j));
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

/* The stages of the units, from `stage` on. The whole warp. */
template <class F>
__device__ __forceinline__ void fetch_units(decode_shared<F> &m, const qv_k_stream_lora &lora,
                                            const maps &of, const place &p, const arrivals &a,
                                            int stage)
{
    bool leads = (threadIdx.x & 31) == 0;
    int units = units_of_stage(m);
    cursor b = {0, 0}, x1 = {0, 0};
    for (int i = 0; i * units < m.n_units; i++) {
        int at = (stage + i) % F::STAGES, n = min(units, m.n_units - i * units);
        if (leads) {
            wait_for_stage(m, stage + i);
            fetch_b(m, &of.b, p, at, n, b);
            if (i == 0)
                wait_for_x1(a);
        }
        __syncwarp();
        fetch_x1(m, lora.site, lora.x1, at, n, x1);
    }
}

/* The warp that fetches, from where the kernel's start has left off: W is on its way for the first
 * stages. */
template <class F>
__device__ __forceinline__ void fetch(decode_shared<F> &m, const qv_k_stream_lora &lora,
                                      const maps &of, const place &p, const arrivals &a)
{
    bool leads = (threadIdx.x & 31) == 0;
    if (leads) {
        wait_for_previous();
        for (int step = 0; step < min(F::STAGES, p.n_steps); step++)
            fetch_x(m, &of.x, p, step, step);
        fetch_steps(m, of, p, F::STAGES, p.units_at, 0);
    }
    __syncwarp();
    if (!F::LORA)
        return;
    barrier_wait(&m.found, 0);
    fetch_units(m, lora, of, p, a, p.units_at);
    if (!leads)
        return;
    fetch_steps(m, of, p, max(F::STAGES, p.units_at), p.n_steps,
                ceiling(m.n_units, units_of_stage(m)));
    if (m.n_units == 0)
        wait_for_x1(a);
}

template <class F>
__device__ __forceinline__ void multiply_steps(decode_shared<F> &m, int n, reader &r,
                                               float (&acc)[F::N / 2])
{
    wgmma_keep(acc);
#pragma unroll 1
    for (int step = 0; step < n; step++) {
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
}

/* The block's rows, to m.sums when the whole block has multiplied. */
template <class F>
__device__ __forceinline__ void multiply(decode_shared<F> &m, const qv_k_stream_lora &lora,
                                         const place &p, float (&acc)[F::N / 2])
{
    int row = ((int)threadIdx.x >> 5) * 16;
    reader r = {0, 0};
    multiply_steps(m, p.units_at, r, acc);
    if (!F::LORA)
        return;
    barrier_wait(&m.found, 0);
    int units = units_of_stage(m);
    cursor next = {0, 0};
    for (int i = 0; i * units < m.n_units; i++) {
        barrier_wait(&m.full[r.at], r.parity);
        barrier_wait(&m.x1_full[r.at], (i / F::STAGES) & 1);
        int n = min(units, m.n_units - i * units);
        for (int u = 0; u < n; u++, advance(m, next)) {
            const entry &e = m.entries[next.index];
            multiply_unit<F>(m.w[r.at] + u * RANKS * ROWS, x1_of(m, r.at, u), e, first_row(m, e),
                             lora.site.ranges, next.rank, row, p.row0 + row, acc);
        }
        __syncwarp();
        release(m, r);
    }
    multiply_steps(m, p.n_steps - p.units_at, r, acc);
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
    for (int i = n * p.share / p.n_shares + (int)threadIdx.x; i < end; i += F::THREADS) {
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

/* Grid (shares of k, blocks that shrink and tiles of rows), a cluster being all shares of one. */
template <class F>
__global__ void __launch_bounds__(F::THREADS, BLOCKS)
    decode_kernel(const __grid_constant__ qv_k_linear_args c,
                  const __grid_constant__ qv_k_stream_lora lora, const __grid_constant__ maps of,
                  int n_shrinks)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    let_next_start();
    extern __shared__ __align__(1024) char decode_memory[];
    decode_shared<F> &m =
        *(decode_shared<F> *)(decode_memory + (-shared_address(decode_memory) & 1023));
    place p;
    p.share = (int)blockIdx.x;
    p.n_shares = (int)gridDim.x;
    p.row0 = ((int)blockIdx.y - n_shrinks) * ROWS;
    p.n = (int)c.n_tokens;
    int all_steps = (int)((c.n_in + STEP - 1) / STEP);
    p.first_step = all_steps * p.share / p.n_shares;
    p.n_steps = all_steps * (p.share + 1) / p.n_shares - p.first_step;
    p.units_at = F::LORA && p.n_shares == 1
                     ? max(min(F::STAGES, p.n_steps), p.n_steps * UNITS_AT / 8)
                     : p.n_steps;
    const arrivals a = {lora.arrivals, (int)(gridDim.x * gridDim.y), n_shrinks * (int)gridDim.x};

    if (threadIdx.x == WORKERS) {
        for (int i = 0; i < F::STAGES; i++) {
            barrier_init(&m.full[i], 1);
            barrier_init(&m.x1_full[i], 32);
            barrier_init(&m.empty[i], WORKERS / 32);
        }
        barrier_init(&m.found, 32);
        barriers_publish();
        m.n_entries = m.n_units = m.widest = 0;
        for (int i = 0; p.row0 >= 0 && i < min(F::STAGES, p.n_steps); i++)
            fetch_w(m, &of.w, p, i, i);
    }
    __syncthreads();
    if (F::LORA && p.row0 < 0) {
        shrink(m, c, lora, p, (int)blockIdx.y, n_shrinks, a);
        return;
    }

    if (threadIdx.x >= WORKERS) {
        if (threadIdx.x < WORKERS + 32)
            fetch(m, lora, of, p, a);
        else if (F::LORA)
            find_entries(m, lora.segments, lora.site, p);
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
    (void)c, (void)lora, (void)of, (void)n_shrinks;
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

/* Blocks that shrink, times shares: as many as there may be items, so that no block has two, but
 * not so many that they keep those of W from starting. */
int choose_shrinks(const qv_k_stream_lora &lora, int shares, int n_sms)
{
    const qv_k_segments &s = lora.segments;
    int64_t groups = (lora.site.max_rank + RANKS - 1) / RANKS;
    int64_t items = groups * lora.site.ranges.n * (s.n_segs + s.n_tokens / ITEM_TOKENS);
    int64_t most = n_sms / shares;
    return (int)(items < most ? items : most < 1 ? 1 : most);
}

template <class F>
qv_status launch(const qv_k_linear_args &c, const qv_k_stream_lora &lora, int shares, int n_sms,
                 cudaStream_t stream)
{
    maps of = {};
    int shrinks = 0;
    QV_TRY(make_map(c.w, c.n_in, c.n_out, 1, c.n_in, ROWS, &of.w));
    QV_TRY(make_map(c.x, c.n_in, c.n_tokens, 1, c.x_stride, F::N, &of.x));
    if (F::LORA) {
        const qv_k_lora_site &s = lora.site;
        QV_TRY(make_map(s.b, c.n_out, s.max_rank, s.n_slots, c.n_out, RANKS, &of.b));
        shrinks = choose_shrinks(lora, shares, n_sms);
    }
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = (unsigned)shares;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)shares, (unsigned)(shrinks + (c.n_out + ROWS - 1) / ROWS));
    config.blockDim = dim3(F::THREADS);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    config.dynamicSmemBytes = sizeof(decode_shared<F>) + 1024;
    cudaError_t error =
        cudaFuncSetAttribute(decode_kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)config.dynamicSmemBytes);
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, decode_kernel<F>, c, lora, of, shrinks);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: decode_linear: %s", cudaGetErrorString(error));
    return qv_k_check_launch("decode_linear");
}

typedef qv_status launch_fn(const qv_k_linear_args &c, const qv_k_stream_lora &lora, int shares,
                            int n_sms, cudaStream_t stream);

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

/* Blocks that share k: so many that a multiprocessor has nearly two, with some steps each. The best
 * on an H100 (132 multiprocessors) at 16 and 64 tokens without adapters: 12352 x 2560, 10240 x 2560
 * and 18432 x 2560 1 and 1, 2560 x 4096 4 and 4, 2560 x 9216 4 and 5. With adapters two for the
 * first of them cost 1.4 % of a step of the 4B. */
int choose_shares(const qv_k_linear_args &c, int n_sms)
{
    int64_t tiles = (c.n_out + ROWS - 1) / ROWS, steps = (c.n_in + STEP - 1) / STEP;
    int shares = 1;
    while (shares < MAX_SHARES && tiles * (shares + 1) * 10 <= 2 * n_sms * 9 &&
           steps >= (shares + 1) * 4)
        shares++;
    return shares;
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
    return c->n_out % 8 == 0 && (uintptr_t)s->a % 16 == 0 && (uintptr_t)s->b % 16 == 0 &&
           s->max_rank % 4 == 0 && (uintptr_t)lora->x1 % 16 == 0 &&
           most_slices(s->ranges, ROWS) <= QV_K_STREAM_SLICES;
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
    int shares = tuning.shares > 0 ? tuning.shares : choose_shares(*c, n_sms);
    shares = shares > MAX_SHARES ? MAX_SHARES : shares > steps ? steps : shares;
    return launchers[form][lora != NULL](*c, lora != NULL ? *lora : none, shares, n_sms,
                                         (cudaStream_t)stream);
}
