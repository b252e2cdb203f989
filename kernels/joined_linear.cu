/* Products that read the same x, for a decode step of a few tokens, in one launch: what a routed
 * layer asks of its input (shared expert, its gate, router, latent) is a matrix of a few MB and
 * some small ones, each of which would wait for a launch longer than for its bytes.
 *
 * A block works on one part. Parts are computed as by the launches they stand for, to the same bit:
 *
 *   STREAM  qv_k_stream_linear: 64 rows and a range of k a block, through a ring of asynchronous
 *           copies; the blocks of a group, neighbours in a cluster, add up in their order.
 *   SKINNY  qv_k_skinny_linear: W straight into fragments. That kernel has 16 rows a block and 8 or
 *           16 warps, whose sums are added in their order; here it is 8 rows, the other half of a
 *           product being zeros, and 8 warps do the work of either.
 *   ROWS    few rows: a warp a token.
 *
 * Groups of several sizes, powers of two, share clusters of the largest: parts stand in the order
 * of their sizes, so that no group crosses a cluster. All blocks meet in the cluster's barrier,
 * also those that have nothing to add up.
 *
 * With SwiGLU the tile of a block is half rows of the gate and half those of up, so that the
 * activation is the block's own; it is computed of rounded numbers, as an op behind would.
 *
 * Memory bound: 2 n_out n_in bytes a part.
 */
#include "kernels/cluster_sums.cuh"

namespace
{

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int TOKENS = QV_K_JOINED_TOKENS;
static_assert(TOKENS == 8 && TOKENS == SUM_TOKENS, "tokens fill one tile of mma");

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
static_assert(TILE == SUM_ROWS, "a block finishes its part of a tile");

struct stream_stage {
    bf16 w[TILE * STEP], x[TOKENS * STEP];
};

/* SKINNY */
constexpr int SKINNY_TILE = 8;
constexpr int SKINNY_WARPS = 16; /* at most */
constexpr int SKINNY_AHEAD = 3;  /* pieces of a warp on their way */

struct skinny_shared {
    uint4 w[SKINNY_AHEAD][4][THREADS]; /* a thread's own */
    float warps[SKINNY_WARPS][2][32];
};

union joined_shared {
    stream_stage stages[STAGES];
    float halves[2][TOKENS][PITCH];
    skinny_shared skinny;
};

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

constexpr int OF_STAGE = TILE * STEP / 8 / THREADS; /* copies of W of a thread */

/* What a thread copies of W and x: its first numbers of each row, NULL where there is no row. */
struct thread_rows {
    const bf16 *from[OF_STAGE], *x;
};

__device__ __forceinline__ thread_rows rows_of(const part &p, int64_t tile, int first_step)
{
    thread_rows rows;
    int token = threadIdx.x / 8;
    rows.x = token < p.c.n_tokens ? (const bf16 *)p.c.x + token * p.c.x_stride + first_step * STEP +
                                        threadIdx.x % 8 * 8
                                  : nullptr;
#pragma unroll
    for (int i = 0; i < OF_STAGE; i++) {
        int64_t row = row_of<TILE>(p, tile, threadIdx.x / 8 + i * (THREADS / 8));
        rows.from[i] = row < 0 ? nullptr
                               : (const bf16 *)p.c.w + row * p.c.n_in + first_step * STEP +
                                     threadIdx.x % 8 * 8;
    }
    return rows;
}

/* left: what there is of k from the block's first step on. */
__device__ __forceinline__ void load_w(joined_shared &m, const thread_rows &rows, const void *w,
                                       int step, int left)
{
    int col = threadIdx.x % 8 * 8, k = step * STEP;
#pragma unroll
    for (int i = 0; i < OF_STAGE; i++) {
        bool valid = rows.from[i] && k + col < left;
        copy16_stream(m.stages[step % STAGES].w +
                          tile_at<STEP>(threadIdx.x / 8 + i * (THREADS / 8), col),
                      valid ? rows.from[i] + k : w, valid);
    }
}

__device__ __forceinline__ void load_x(joined_shared &m, const thread_rows &rows, const void *x,
                                       int step, int left)
{
    int token = threadIdx.x / 8, col = threadIdx.x % 8 * 8;
    bool valid = rows.x && step * STEP + col < left;
    if (token < TOKENS)
        copy16(m.stages[step % STAGES].x + tile_at<STEP>(token, col),
               valid ? rows.x + step * STEP : x, valid);
}

/* A warp has 16 of the rows, and half of every stage, whose sums it leaves in halves. */
__device__ __forceinline__ void stream_sums(joined_shared &m, const part &p, int block)
{
    int64_t tile = block / p.splits;
    int share = block % p.splits, all = (int)((p.c.n_in + STEP - 1) / STEP);
    int first = all * share / p.splits, steps = all * (share + 1) / p.splits - first;
    const thread_rows rows = rows_of(p, tile, first);
    int left = (int)p.c.n_in - first * STEP;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        if (i < steps)
            load_w(m, rows, p.c.w, i, left);
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < steps)
            load_x(m, rows, p.c.x, i, left);
        copies_commit();
    }
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, half = warp >> 2, row = (warp & 3) * 16;
    float acc[4] = {};
    for (int step = 0; step < steps; step++) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        int next = step + STAGES - 1;
        if (next < steps) {
            load_w(m, rows, p.c.w, next, left);
            load_x(m, rows, p.c.x, next, left);
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
}

__device__ __forceinline__ sum_group group_of(const part &p, int block, int cluster)
{
    int share = block % p.splits;
    return make_group(p.splits, share, (int)(blockIdx.x % cluster) - share, (int)p.c.n_tokens,
                      width_of<TILE>(p));
}

/* A block finishes its share of the columns. */
__device__ __forceinline__ void stream_finish(const joined_shared &m,
                                              const cluster_sums<TOKENS> &sums, const part &p,
                                              int block, const sum_group &g)
{
    int fours = 1 << g.shift;
    int64_t first = (int64_t)(block / g.n) * g.width + g.share * fours * 4, n = columns_of(p);
    for (int i = threadIdx.x; i < g.n_tokens * fours; i += THREADS) {
        int token = i >> g.shift, four = i & (fours - 1);
        float4 v = sum_four(sums, g, m.halves, token, 0, four), up = v;
        if (p.act == QV_K_LINEAR_SWIGLU)
            up = sum_four(sums, g, m.halves, token, 1, four);
        const float of[4] = {v.x, v.y, v.z, v.w}, with[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (first + four * 4 + j < n)
                store(p, token, first + four * 4 + j, activated(p, of[j], with[j]));
    }
}

/* --- SKINNY ------------------------------------------------------------------------------- */

/* A piece is eight rows, PIECE of k: thread (g, t) of a warp has k = 8 t .. 8 t + 7 of each 32 of
 * row g, which it alone copies and reads. A warp's pieces are those of sum `as`, as many apart as
 * there are sums, then those of sum as + 8. */
struct place {
    int as, k;
};

__device__ __forceinline__ void advance(place &p, int splits, int n_in)
{
    p.k += splits * PIECE;
    if (p.k >= n_in) {
        p.as += WARPS;
        p.k = p.as < splits ? p.as * PIECE : n_in;
    }
}

__device__ __forceinline__ void copy_piece(skinny_shared &m, int slot, const bf16 *w, int k,
                                           int n_in)
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (k + j * 32 < n_in)
            copy16_stream(&m.w[slot][j][threadIdx.x], w + k + j * 32, true);
    copies_commit();
}

__device__ __forceinline__ void multiply_thin(const uint4 &w, const uint4 &x, float (&acc)[4])
{
    const uint32_t first[4] = {w.x, 0, w.y, 0}, second[4] = {w.z, 0, w.w, 0};
    mma(acc, first, x.x, x.y);
    mma(acc, second, x.z, x.w);
}

/* All of x and rest flies together. */
template <bool REST>
__device__ __forceinline__ void multiply_piece(const skinny_shared &m, int slot, const bf16 *x,
                                               const bf16 *rest, int k, int n_in, float (&acc)[4])
{
    uint4 of_x[4], of_rest[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        of_x[j] = k + j * 32 < n_in ? *(const uint4 *)(x + k + j * 32) : uint4{};
        if (REST)
            of_rest[j] = k + j * 32 < n_in ? *(const uint4 *)(rest + k + j * 32) : uint4{};
    }
    copies_wait<SKINNY_AHEAD - 1>();
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (k + j * 32 >= n_in)
            break;
        uint4 w = m.w[slot][j][threadIdx.x];
        multiply_thin(w, of_x[j], acc);
        if (REST)
            multiply_thin(w, of_rest[j], acc);
    }
}

/* The first pieces are on their way before the kernel waits for the one before it, whose results x
 * and rest are. */
template <bool REST>
__device__ __forceinline__ void skinny_sums(skinny_shared &m, const part &p, int block)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int n_in = (int)p.c.n_in, splits = p.splits;
    int64_t row = row_of<SKINNY_TILE>(p, block, g);
    /* A row beyond the end reads another one, and is not stored. */
    const bf16 *w = (const bf16 *)p.c.w + (row < 0 ? 0 : row) * n_in + t * 8;
    place at = {warp, warp * PIECE}, ahead = at;
#pragma unroll
    for (int i = 0; i < SKINNY_AHEAD; i++) {
        copy_piece(m, i, w, ahead.k, n_in);
        advance(ahead, splits, n_in);
    }
    wait_for_previous();
    int64_t token = g < p.c.n_tokens ? g : p.c.n_tokens - 1;
    const bf16 *x = (const bf16 *)p.c.x + token * p.c.x_stride + t * 8;
    const bf16 *rest = (const bf16 *)p.c.rest + token * p.c.rest_stride + t * 8;
    float acc[4] = {};
    for (int slot = 0; at.as < splits; slot = slot + 1 < SKINNY_AHEAD ? slot + 1 : 0) {
        multiply_piece<REST>(m, slot, x, rest, at.k, n_in, acc);
        copy_piece(m, slot, w, ahead.k, n_in);
        advance(ahead, splits, n_in);
        int as = at.as;
        advance(at, splits, n_in);
        if (at.as != as) {
            m.warps[as][0][lane] = acc[0];
            m.warps[as][1][lane] = acc[1];
            acc[0] = acc[1] = acc[2] = acc[3] = 0;
        }
    }
}

/* Row `row` of the tile, added up over warps: number j of lane (g, t) is row g of token 2 t + j. */
__device__ __forceinline__ float skinny_sum(const skinny_shared &m, int n_warps, int token, int row)
{
    float v = 0;
    for (int i = 0; i < n_warps; i++)
        v += m.warps[i][token & 1][row * 4 + (token >> 1)];
    return v;
}

__device__ __forceinline__ void skinny_finish(const skinny_shared &m, const part &p, int block)
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

constexpr int ROW_VECTORS = 8; /* of a lane, that fly together */

/* A row of W a thread's own vectors of 256 numbers from one to the next: the first of them are on
 * their way before x is waited for. */
__device__ __forceinline__ void copy_row(skinny_shared &m, const bf16 *w, int64_t k, int64_t n)
{
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; i++)
        if (k + i * 256 < n)
            copy16_stream(&m.w[i / 4][i % 4][threadIdx.x], w + k + i * 256, true);
    copies_commit();
}

__device__ __forceinline__ float row_product(const skinny_shared &m, const bf16 *x, int64_t k,
                                             int64_t n, float sum)
{
    uint4 of_x[ROW_VECTORS];
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; i++)
        if (k + i * 256 < n)
            of_x[i] = *(const uint4 *)(x + k + i * 256);
    copies_wait<0>();
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; i++) {
        if (k + i * 256 >= n)
            break;
        float a[8], b[8];
        unpack8(bf16x8{of_x[i]}, a);
        unpack8(bf16x8{m.w[i / 4][i % 4][threadIdx.x]}, b);
#pragma unroll
        for (int j = 0; j < 8; j++)
            sum = fmaf(a[j], b[j], sum);
    }
    return sum;
}

__device__ __forceinline__ void few_rows(skinny_shared &m, const part &p)
{
    int lane = threadIdx.x & 31, token = threadIdx.x >> 5;
    const bf16 *w = (const bf16 *)p.c.w, *x = (const bf16 *)p.c.x + token * p.c.x_stride;
    if (token < p.c.n_tokens)
        copy_row(m, w, lane * 8, p.c.n_in);
    wait_for_previous();
    if (token >= p.c.n_tokens)
        return;
    for (int64_t row = 0; row < p.c.n_out; row++, w += p.c.n_in) {
        float sum = 0;
        for (int64_t k = lane * 8; k < p.c.n_in; k += ROW_VECTORS * 256) {
            if (row > 0 || k > lane * 8)
                copy_row(m, w, k, p.c.n_in);
            sum = row_product(m, x, k, p.c.n_in, sum);
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
    __shared__ cluster_sums<TOKENS> sums;
    joined_shared &m = *(joined_shared *)joined_memory;
    int index = 0;
    while (index + 1 < all.n_parts && all.parts[index + 1].first_block <= (int)blockIdx.x)
        index++;
    const part &p = all.parts[index];
    int block = (int)blockIdx.x - p.first_block;
    bool idle = (int)blockIdx.x >= all.n_blocks; /* it fills a cluster */

    bool streams = !idle && p.how == STREAM;
    sum_group group = make_group(1, 0, 0, 0, TILE);
    if (streams)
        group = group_of(p, block, all.cluster);
    if (all.cluster > 1)
        begin_sums(sums, group);

    if (idle)
        wait_for_previous();
    else if (streams)
        stream_sums(m, p, block);
    else if (p.how == SKINNY && p.c.rest)
        skinny_sums<true>(m.skinny, p, block);
    else if (p.how == SKINNY)
        skinny_sums<false>(m.skinny, p, block);
    else
        few_rows(m.skinny, p);
    __syncthreads();
    if (all.cluster > 1)
        await_cluster();
    if (group.n > 1)
        send_sums(sums, group, m.halves);
    if (streams)
        stream_finish(m, sums, p, block, group);
    else if (!idle && p.how == SKINNY)
        skinny_finish(m.skinny, p, block);
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
    out->bytes = sizeof(skinny_shared);
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
