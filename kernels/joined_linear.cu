/* Products that read the same x, for a decode step of a few tokens, in one launch: what a routed
 * layer asks of its input (shared expert, its gate, router, latent) is a matrix of a few MB and
 * some small ones, each of which would wait for a launch longer than for its bytes.
 *
 * A block works on one part. Parts are computed as by the launches they stand for, to the same bit:
 *
 *   STREAM  qv_k_stream_linear: 64 rows and a range of k a block, through a ring of asynchronous
 *           copies; the blocks of a group, neighbours in a cluster, add up in their order.
 *   SKINNY  qv_k_skinny_linear: 16 rows a block, W straight into fragments. That kernel has 8 or 16
 *           warps, whose sums are added in their order; here 8 warps do the work of either.
 *   ROWS    few rows: a warp a token.
 *
 * Groups of several sizes, powers of two, share clusters of the largest: parts stand in the order
 * of their sizes, so that no group crosses a cluster. All blocks meet in the cluster's barriers,
 * also those that have nothing to add up.
 *
 * With SwiGLU the tile of a block is half rows of the gate and half those of up, so that the
 * activation is the block's own; it is computed of rounded numbers, as an op behind would.
 *
 * Memory bound: 2 n_out n_in bytes a part.
 */
#include "kernels/linear_parts.cuh"

namespace
{

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int TOKENS = QV_K_JOINED_TOKENS;
static_assert(TOKENS == 8, "tokens fill one tile of mma");

enum form { STREAM, SKINNY, ROWS };

struct part {
    qv_k_linear_args c;
    qv_k_linear_act act;
    form how;
    int splits; /* STREAM: blocks that share rows; SKINNY: warps that share k */
    int first_block;
};

struct joined {
    part parts[QV_K_JOINED_PARTS];
    int n_parts, n_blocks, cluster, bytes; /* of shared memory */
};

/* STREAM */
constexpr int TILE = 64; /* rows of W, of a block */
constexpr int STEP = 64; /* of k, of a stage */
constexpr int STAGES = 7;
constexpr int MAX_SHARES = 8;
constexpr int PITCH = TILE + 4; /* of sums, by token: lanes of a fragment hit different banks */

struct stream_stage {
    bf16 w[TILE * STEP], x[TOKENS * STEP];
};

/* SKINNY */
constexpr int SKINNY_TILE = 16;
constexpr int SKINNY_WARPS = 16; /* at most */

union joined_shared {
    stream_stage stages[STAGES];
    float halves[2][TOKENS][PITCH];
    float warps[SKINNY_WARPS][4][32];
};

constexpr size_t SMALL_BYTES = sizeof(float) * SKINNY_WARPS * 4 * 32; /* without STREAM */

/* --- Rows and results --------------------------------------------------------------------- */

/* Columns of y. */
__host__ __device__ __forceinline__ int64_t columns_of(const part &p)
{
    return p.act == QV_K_LINEAR_SWIGLU ? p.c.n_out / 2 : p.c.n_out;
}

/* Columns of y of a block whose tile has `n` rows. */
template <int N> __host__ __device__ __forceinline__ int width_of(const part &p)
{
    return p.act == QV_K_LINEAR_SWIGLU ? N / 2 : N;
}

/* The row of W behind row i of a tile of N, -1 where there is none. */
template <int N> __device__ __forceinline__ int64_t row_of(const part &p, int64_t tile, int i)
{
    int width = width_of<N>(p);
    int64_t col = tile * width + i % width, n = columns_of(p);
    return col >= n ? -1 : i < width ? col : n + col;
}

__device__ __forceinline__ float activated(const part &p, float v, float up)
{
    return p.act == QV_K_LINEAR_SWIGLU  ? swiglu(round_bf16(v), round_bf16(up))
           : p.act == QV_K_LINEAR_RELU2 ? relu2(round_bf16(v))
                                        : v;
}

__device__ __forceinline__ void store(const part &p, int64_t token, int64_t col, float v)
{
    int64_t at = token * p.c.y_stride + col;
    if (p.c.y_f32)
        ((float *)p.c.y)[at] = v;
    else
        ((bf16 *)p.c.y)[at] = __float2bfloat16(v);
}

/* --- STREAM ------------------------------------------------------------------------------- */

__device__ __forceinline__ void load_w(joined_shared &m, const part &p, int64_t tile,
                                       int first_step, int step)
{
    int col = threadIdx.x % 8 * 8;
    int k = (first_step + step) * STEP + col;
#pragma unroll
    for (int i = 0; i < TILE * STEP / 8 / THREADS; i++) {
        int row = threadIdx.x / 8 + i * (THREADS / 8);
        int64_t from = row_of<TILE>(p, tile, row);
        bool valid = from >= 0 && k < p.c.n_in;
        copy16_stream(m.stages[step % STAGES].w + tile_at<STEP>(row, col),
                      valid ? (const bf16 *)p.c.w + from * p.c.n_in + k : p.c.w, valid);
    }
}

__device__ __forceinline__ void load_x(joined_shared &m, const part &p, int first_step, int step)
{
    int token = threadIdx.x / 8, col = threadIdx.x % 8 * 8;
    int k = (first_step + step) * STEP + col;
    bool valid = token < p.c.n_tokens && k < p.c.n_in;
    if (token < TOKENS)
        copy16(m.stages[step % STAGES].x + tile_at<STEP>(token, col),
               valid ? (const bf16 *)p.c.x + token * p.c.x_stride + k : p.c.x, valid);
}

/* A warp has 16 of the rows, and half of every stage. Leaves the block's sums in halves[0]. */
__device__ __forceinline__ void stream_sums(joined_shared &m, const part &p, int block)
{
    int64_t tile = block / p.splits;
    int share = block % p.splits, all = (int)((p.c.n_in + STEP - 1) / STEP);
    int first = all * share / p.splits, steps = all * (share + 1) / p.splits - first;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        if (i < steps)
            load_w(m, p, tile, first, i);
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < steps)
            load_x(m, p, first, i);
        copies_commit();
    }
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, half = warp >> 2, row = (warp & 3) * 16;
    float acc[4] = {};
    for (int step = 0; step < steps; step++) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        int next = step + STAGES - 1;
        if (next < steps) {
            load_w(m, p, tile, first, next);
            load_x(m, p, first, next);
        }
        copies_commit();
        const stream_stage &at = m.stages[step % STAGES];
        uint32_t a[2][4], b[4];
        load_a<STEP>(a[0], at.w, row, half * 32);
        load_a<STEP>(a[1], at.w, row, half * 32 + 16);
        ldmatrix4(b, at.x + tile_at<STEP>(lane & 7, half * 32 + (lane >> 3) * 8));
        mma(acc, a[0], b[0], b[1]);
        mma(acc, a[1], b[2], b[3]);
    }
    copies_wait<0>();
    __syncthreads(); /* the sums lie where stages were */
#pragma unroll
    for (int j = 0; j < 4; j++)
        m.halves[half][2 * (lane & 3) + (j & 1)][row + (lane >> 2) + 8 * (j >> 1)] = acc[j];
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * TILE / 4; i += THREADS) {
        float4 *sum = (float4 *)&m.halves[0][i / (TILE / 4)][i % (TILE / 4) * 4];
        float4 v = *sum;
        add4(v, *(const float4 *)&m.halves[1][i / (TILE / 4)][i % (TILE / 4) * 4]);
        *sum = v;
    }
}

/* Four rows of a token, added up over the blocks of a group that begins at `base` of the cluster.
 */
__device__ __forceinline__ void sum_of_group(const joined_shared &m, int n_shares, int base,
                                             int token, int row, float (&sum)[4])
{
    float4 v[MAX_SHARES]; /* all loads before the first sum */
    if (n_shares == 1) {
        v[0] = *(const float4 *)&m.halves[0][token][row];
    } else {
#pragma unroll
        for (int i = 0; i < MAX_SHARES; i++)
            if (i < n_shares)
                v[i] = load_from(&m.halves[0][token][row], base + i);
    }
#pragma unroll
    for (int i = 1; i < MAX_SHARES; i++)
        if (i < n_shares)
            add4(v[0], v[i]);
    sum[0] = v[0].x, sum[1] = v[0].y, sum[2] = v[0].z, sum[3] = v[0].w;
}

/* A block finishes its share of the columns. */
__device__ __forceinline__ void stream_finish(const joined_shared &m, const part &p, int block,
                                              int cluster)
{
    int share = block % p.splits, width = width_of<TILE>(p), fours = width / 4 / p.splits;
    int base = (int)(blockIdx.x % cluster) - share;
    int64_t first = (int64_t)(block / p.splits) * width, n = columns_of(p);
    for (int i = threadIdx.x; i < (int)p.c.n_tokens * fours; i += THREADS) {
        int token = i / fours, row = (share * fours + i % fours) * 4;
        float v[4], up[4] = {};
        sum_of_group(m, p.splits, base, token, row, v);
        if (p.act == QV_K_LINEAR_SWIGLU)
            sum_of_group(m, p.splits, base, token, row + width, up);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (first + row + j < n)
                store(p, token, first + row + j, activated(p, v[j], up[j]));
    }
}

/* --- SKINNY ------------------------------------------------------------------------------- */

/* The pieces of warp `warp` of `n_warps`, added up one after the other; then those of warp + 8 by
 * themselves. The first is on its way before the kernel waits for the one before it, whose results
 * x and rest are. */
__device__ __forceinline__ void skinny_sums(joined_shared &m, const part &p, int block)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int n_in = (int)p.c.n_in, stride = p.splits * PIECE;
    int64_t upper = row_of<SKINNY_TILE>(p, block, g), lower = row_of<SKINNY_TILE>(p, block, g + 8);
    /* Rows beyond the end read another one, and are not stored. */
    const bf16 *w0 = (const bf16 *)p.c.w + (upper < 0 ? 0 : upper) * n_in + t * 8;
    const bf16 *w1 = (const bf16 *)p.c.w + (lower < 0 ? 0 : lower) * n_in + t * 8;
    int64_t token = g < p.c.n_tokens ? g : p.c.n_tokens - 1;
    const bf16 *x = (const bf16 *)p.c.x + token * p.c.x_stride + t * 8;
    const bf16 *rest =
        p.c.rest ? (const bf16 *)p.c.rest + token * p.c.rest_stride + t * 8 : nullptr;
    piece now, next;
    load_piece(now, w0, w1, warp * PIECE, n_in);
    wait_for_previous();
    for (int as = warp; as < p.splits; as += WARPS) {
        float acc[4] = {};
        for (int k = as * PIECE; k < n_in; k += stride) {
            int after = k + stride; /* or the first of the next sum */
            if (after >= n_in)
                after = as + WARPS < p.splits ? (as + WARPS) * PIECE : n_in;
            load_piece(next, w0, w1, after, n_in);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (k + j * 32 >= n_in)
                    break;
                multiply_piece(now, j, x + k + j * 32, acc);
                if (rest)
                    multiply_piece(now, j, rest + k + j * 32, acc);
            }
            now = next;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            m.warps[as][j][lane] = acc[j];
    }
}

/* Row `row` of the tile, added up over warps: number j of lane (g, t) is row g + 8 (j / 2) of token
 * 2 t + j % 2. */
__device__ __forceinline__ float skinny_sum(const joined_shared &m, int n_warps, int token, int row)
{
    float v = 0;
    for (int i = 0; i < n_warps; i++)
        v += m.warps[i][(row >> 3) * 2 + (token & 1)][(row & 7) * 4 + (token >> 1)];
    return v;
}

__device__ __forceinline__ void skinny_finish(const joined_shared &m, const part &p, int block)
{
    int width = width_of<SKINNY_TILE>(p), i = threadIdx.x;
    if (i >= (int)p.c.n_tokens * width)
        return;
    int token = i / width, row = i % width;
    int64_t col = (int64_t)block * width + row;
    float v = skinny_sum(m, p.splits, token, row), up = 0;
    if (p.act == QV_K_LINEAR_SWIGLU)
        up = skinny_sum(m, p.splits, token, row + width);
    if (col < columns_of(p))
        store(p, token, col, activated(p, v, up));
}

/* --- ROWS --------------------------------------------------------------------------------- */

__device__ __forceinline__ void few_rows(const part &p)
{
    int lane = threadIdx.x & 31, token = threadIdx.x >> 5;
    wait_for_previous();
    if (token >= p.c.n_tokens)
        return;
    const bf16 *x = (const bf16 *)p.c.x + token * p.c.x_stride;
    for (int64_t row = 0; row < p.c.n_out; row++) {
        const bf16 *w = (const bf16 *)p.c.w + row * p.c.n_in;
        float sum = 0;
#pragma unroll 4
        for (int64_t k = lane * 8; k < p.c.n_in; k += 256) {
            float a[8], b[8];
            unpack8(*(const bf16x8 *)(x + k), a);
            unpack8(*(const bf16x8 *)(w + k), b);
#pragma unroll
            for (int i = 0; i < 8; i++)
                sum = fmaf(a[i], b[i], sum);
        }
        sum = warp_sum(sum);
        if (lane == 0)
            store(p, token, row, activated(p, sum, 0));
    }
}

/* --- The kernel --------------------------------------------------------------------------- */

__global__ void __launch_bounds__(THREADS, 3) joined_kernel(const __grid_constant__ joined all)
{
    let_next_start();
    extern __shared__ __align__(128) char joined_memory[];
    joined_shared &m = *(joined_shared *)joined_memory;
    int index = 0;
    while (index + 1 < all.n_parts && all.parts[index + 1].first_block <= (int)blockIdx.x)
        index++;
    const part &p = all.parts[index];
    int block = (int)blockIdx.x - p.first_block;
    bool idle = (int)blockIdx.x >= all.n_blocks; /* it fills a cluster */

    if (idle)
        wait_for_previous();
    else if (p.how == STREAM)
        stream_sums(m, p, block);
    else if (p.how == SKINNY)
        skinny_sums(m, p, block);
    else
        few_rows(p);
    if (all.cluster > 1)
        cluster_sync();
    else
        __syncthreads();
    if (!idle && p.how == STREAM)
        stream_finish(m, p, block, all.cluster);
    else if (!idle && p.how == SKINNY)
        skinny_finish(m, p, block);
    if (all.cluster > 1)
        cluster_sync(); /* the others have read this block's sums */
}

/* --- Launch ------------------------------------------------------------------------------- */

/* How a launch of its own would do it; false where it would be another way. */
bool find_form(const qv_k_linear_part &from, bool stream, int n_sms, part *out)
{
    const qv_k_linear_args &c = from.args;
    bool vectors = !c.w_f32 && !c.rest && c.n_in % 8 == 0 && c.x_stride % 8 == 0 &&
                   (uintptr_t)c.w % 16 == 0 && (uintptr_t)c.x % 16 == 0;
    bool halves = from.act != QV_K_LINEAR_SWIGLU || c.n_out % 2 == 0;
    const int64_t longest = 1 << 24; /* k is counted in int */
    *out = {c, from.act, ROWS, 1, 0};
    if (!halves || c.n_tokens < 1 || c.n_tokens > TOKENS || c.n_in > longest)
        return false;
    if (c.n_out <= QV_K_FEW_ROWS)
        return vectors && from.act != QV_K_LINEAR_SWIGLU;
    if (stream && qv_k_stream_linear_can(&c, NULL)) {
        out->how = STREAM;
        out->splits = qv_k_stream_linear_shares(&c, n_sms);
        return true;
    }
    out->how = SKINNY;
    out->splits = qv_k_skinny_linear_warps(&c);
    return qv_k_skinny_linear_can(&c);
}

int blocks_of(const part &p)
{
    int width = p.how == STREAM ? width_of<TILE>(p) : width_of<SKINNY_TILE>(p);
    return p.how == ROWS
               ? 1
               : (int)((columns_of(p) + width - 1) / width) * (p.how == STREAM ? p.splits : 1);
}

/* Parts in the order of their groups, the largest first. */
bool plan(const qv_k_linear_part *parts, int n_parts, bool stream, int n_sms, joined *out)
{
    *out = {};
    if (n_parts < 1 || n_parts > QV_K_JOINED_PARTS)
        return false;
    part found[QV_K_JOINED_PARTS];
    for (int i = 0; i < n_parts; i++)
        if (!find_form(parts[i], stream, n_sms, &found[i]))
            return false;
    out->cluster = 1;
    out->bytes = SMALL_BYTES;
    for (int group = MAX_SHARES; group > 0; group /= 2)
        for (int i = 0; i < n_parts; i++) {
            if ((found[i].how == STREAM ? found[i].splits : 1) != group)
                continue;
            if (out->n_parts == 0)
                out->cluster = group;
            if (found[i].how == STREAM)
                out->bytes = sizeof(joined_shared);
            found[i].first_block = out->n_blocks;
            out->n_blocks += blocks_of(found[i]);
            out->parts[out->n_parts++] = found[i];
        }
    return true;
}

} // namespace

bool qv_k_joined_linear_can(const qv_k_linear_part *parts, int n_parts, bool stream, int n_sms)
{
    joined unused;
    return plan(parts, n_parts, stream, n_sms, &unused);
}

qv_status qv_k_joined_linear(const qv_k_linear_part *parts, int n_parts, bool stream, int n_sms,
                             void *on)
{
    joined all;
    if (!plan(parts, n_parts, stream, n_sms, &all))
        return qv_fail(QV_ERR_UNSUPPORTED, "joined_linear: %d products that cannot be joined",
                       n_parts);
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = (unsigned)all.cluster;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((all.n_blocks + all.cluster - 1) / all.cluster * all.cluster));
    config.blockDim = dim3(THREADS);
    config.stream = (cudaStream_t)on;
    config.attrs = attributes;
    config.numAttrs = !qv_k_is_hopper() ? 0 : all.cluster > 1 ? 2 : 1;
    config.dynamicSmemBytes = (size_t)all.bytes;
    cudaError_t error = cudaFuncSetAttribute(
        joined_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(joined_shared));
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, joined_kernel, all);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: joined_linear: %s", cudaGetErrorString(error));
    return qv_k_check_launch("joined_linear");
}
