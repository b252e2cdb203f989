/* y = W x, and for the tokens of adapters + scale B (A x), for up to 64 tokens: a decode step,
 * which is bound by reading W, A and B once.
 *
 * W is wgmma's first operand and tokens are its columns, so that only tokens are padded. A block
 * takes 64 rows of W, all tokens, and a share of k. One warp fetches W and x by the copy engine
 * into a ring of stages of 64 along k, whose full size is in flight always; a warpgroup multiplies.
 * Blocks of a cluster share k: they exchange sums through each other's shared memory, and each adds
 * up, in the order of the shares, and writes a part of the outputs.
 *
 * With adapters the first blocks compute x1 = A x (decode_shrink.cuh) while the others fetch W, and
 * three more warps of those add scale B x1 (decode_units.cuh), on their own.
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
#include "kernels/decode_units.cuh"
#include "kernels/tensor_map.cuh"

namespace
{

struct maps {
    CUtensorMap w, x;
};

/* --- W x ----------------------------------------------------------------------------------- */

template <class F>
__device__ __forceinline__ void fetch_w(decode_shared<F> &m, const void *map, const place &p,
                                        int step)
{
    int at = step % F::STAGES;
    barrier_expect(&m.full[at], (ROWS + F::N) * STEP * (int)sizeof(bf16));
    int k = (p.first_step + step) * STEP;
    if (F::LORA) /* A and B that were called to the L2 cache stay there */
        copy_box_once(m.w[at], map, k, p.row0, 0, &m.full[at]);
    else
        copy_box_here(m.w[at], map, k, p.row0, 0, &m.full[at]);
}

template <class F>
__device__ __forceinline__ void fetch_x(decode_shared<F> &m, const void *map, const place &p,
                                        int step)
{
    int at = step % F::STAGES;
    copy_box_here(m.x[at], map, (p.first_step + step) * STEP, 0, 0, &m.full[at]);
}

/* Stages of W that may be on order. */
template <class F> __device__ __forceinline__ int stages_on_order(bool calm)
{
    return !F::LORA || calm ? F::STAGES : min(HURRY_STAGES, F::STAGES);
}

/* One thread, from where the kernel's start has left off: W is on its way for the first stages. */
template <class F>
__device__ __forceinline__ void fetch(decode_shared<F> &m, const maps &of, const place &p)
{
    int begun = stages_on_order<F>(false);
    wait_for_previous();
    for (int step = 0; step < p.n_steps; step++) {
        if (step >= begun) {
            int read = step - stages_on_order<F>(atomicAdd(&m.calm, 0) != 0);
            if (read >= 0)
                barrier_wait(&m.empty[read % F::STAGES], (read / F::STAGES) & 1);
            fetch_w(m, &of.w, p, step);
        }
        fetch_x(m, &of.x, p, step);
    }
}

/* The workers. */
template <class F>
__device__ __forceinline__ void multiply(decode_shared<F> &m, const place &p,
                                         float (&acc)[F::N / 2])
{
    wgmma_keep(acc);
#pragma unroll 1
    for (int step = 0; step < p.n_steps; step++) {
        int at = step % F::STAGES;
        barrier_wait(&m.full[at], (step / F::STAGES) & 1);
        uint64_t a = wgmma_tile(m.w[at]), b = wgmma_tile(m.x[at]);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < STEP / 16; k++)
            wgmma<F::N>(acc, a + 2 * k, b + 2 * k);
        wgmma_commit();
        wgmma_wait<0>();
        if ((threadIdx.x & 31) == 0)
            barrier_arrive(&m.empty[at]); /* this warp has read the stage */
    }
    wgmma_keep(acc);
}

/* --- Sums ---------------------------------------------------------------------------------- */

/* A warp's accumulators to m.sums, behind what adapters have there. */
template <class F>
__device__ __forceinline__ void put(decode_shared<F> &m, const float (&acc)[F::N / 2])
{
    int lane = (int)threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int row = ((int)threadIdx.x >> 5) * 16 + g;
#pragma unroll
    for (int i = 0; i < F::N / 2; i++) {
        float &sum = m.sums[i / 4 * 8 + 2 * t + (i & 1)][row + 8 * (i >> 1 & 1)];
        sum = F::LORA ? acc[i] + sum : acc[i];
    }
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
    const arrivals a = {lora.arrivals, (int)(gridDim.x * gridDim.y), n_shrinks * (int)gridDim.x};

    if (threadIdx.x == WORKERS) {
        for (int i = 0; i < F::STAGES; i++) {
            barrier_init(&m.full[i], 1);
            barrier_init(&m.empty[i], WORKERS / 32);
        }
        barriers_publish();
        m.n_entries = m.n_units = m.calm = 0;
        for (int i = 0; p.row0 >= 0 && i < min(stages_on_order<F>(false), p.n_steps); i++)
            fetch_w(m, &of.w, p, i);
    }
    __syncthreads();
    if (F::LORA && p.row0 < 0) {
        shrink(m, c, lora, p, (int)blockIdx.y, n_shrinks, a);
        return;
    }

    if (threadIdx.x >= WORKERS) {
        if (F::LORA)
            more_registers<ADD_REGISTERS>();
        if (F::LORA && threadIdx.x >= WORKERS + 32)
            add_adapters(m, lora, p, a);
        else if (threadIdx.x == WORKERS)
            fetch(m, of, p);
        __syncthreads();
    } else {
        if (F::LORA)
            fewer_registers<WORK_REGISTERS>();
        float acc[F::N / 2] = {};
        multiply(m, p, acc);
        __syncthreads(); /* the adapters' sums are there */
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

/* BF16 [n1][n0] with rows `stride` apart, in boxes of `rows` rows of 64. */
qv_status make_map(const void *data, int64_t n0, int64_t n1, int64_t stride, int rows,
                   CUtensorMap *map)
{
    const cuuint64_t sizes[3] = {(cuuint64_t)n0, (cuuint64_t)n1, 1};
    const cuuint64_t strides[2] = {(cuuint64_t)stride * 2, (cuuint64_t)(stride * n1) * 2};
    const cuuint32_t box[3] = {STEP, (cuuint32_t)rows, 1};
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
    QV_TRY(make_map(c.w, c.n_in, c.n_out, c.n_in, ROWS, &of.w));
    QV_TRY(make_map(c.x, c.n_in, c.n_tokens, c.x_stride, F::N, &of.x));
    if (F::LORA)
        shrinks = choose_shrinks(lora, shares, n_sms);
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

/* The forms there are: tokens, stages without and with adapters. */
#define QV_DECODE_FORMS(X) X(32, 5, 4) X(64, 3, 3)

const qv_k_decode_form forms[] = {
#define QV_DECODE_ROW(tokens, stages, lora_stages) {tokens, stages},
    QV_DECODE_FORMS(QV_DECODE_ROW)
#undef QV_DECODE_ROW
};

launch_fn *const launchers[][2] = {
#define QV_DECODE_ROW(tokens, stages, lora_stages)                                                 \
    {launch<form<tokens, stages, false>>, launch<form<tokens, lora_stages, true>>},
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
    for (int i = 0; i <= s->ranges.n; i++) /* 8 rows are of one slice */
        can = can && s->ranges.start[i] % 8 == 0;
    return can && c->n_out % 8 == 0 && (uintptr_t)s->a % 16 == 0 && (uintptr_t)s->b % 16 == 0 &&
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
