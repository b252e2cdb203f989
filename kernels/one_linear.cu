/* Products of one token, y = W x, that read the same x: what a decode step of one sequence is made
 * of. With a norm in front, x is what that makes of the stream, by each block for itself: 2048
 * numbers come sooner than a kernel in between would start.
 *
 * A block takes 64 rows of W and a range of k; blocks of a cluster share the rows and split k. W
 * comes through a ring of stages of 64 along k by asynchronous copies, the first of which are on
 * their way before the kernel waits for the one in front. A warp has 16 of the rows and half of
 * every stage. What is computed is what stream_linear.cu computes, to the same bit; a rest of x is
 * multiplied behind x.
 *
 * With SwiGLU the rows of a block are half those of the gate and half those of up, so that the
 * activation is the block's own; it is computed of rounded numbers, as an op behind would.
 *
 * No multiprocessor has run this code since other kernels did, and instructions come from the L2
 * cache as W does: so loops are not unrolled, and there is one form for all.
 *
 * Memory bound: 2 n_out n_in bytes a part.
 */
#include "kernels/add_norm.cuh"
#include "kernels/cluster_sums.cuh"

#include <string.h>

namespace
{

constexpr int THREADS = 256;
constexpr int BLOCKS = 3; /* of a multiprocessor */
constexpr int TILE = 64;  /* rows of W, of a block */
constexpr int STEP = 64;  /* of k, of a stage */
constexpr int STAGES = 8;
constexpr int COPIES = TILE * STEP / 8 / THREADS; /* of a stage, of a thread */
static_assert(TILE == SUM_ROWS && COPIES == 2, "a thread copies of a row and the one 32 further");

struct one_part {
    const bf16 *w;
    void *y;
    int n_out, first_tile;
    qv_k_linear_act act;
    bool y_f32, rest;
};

struct one_args {
    int n_parts, n_in, n_steps; /* of all of k */
    int shift;                  /* 1 << shift blocks share rows */
    int stages;                 /* that a block has room for: STAGES or all of its steps */
    int x_is_there;
    const bf16 *x, *rest;    /* without a norm */
    qv_k_add_norm_args norm; /* its residual NULL: none */
    /* Last: in the emulator, GCC 12 clears padding behind such an array in wrong places. */
    one_part parts[QV_K_JOINED_PARTS];
};

/* What a block works on. */
struct place {
    int tile, share;
    int first_step, n_steps;
    int width; /* columns of y of a tile */
    int64_t n_columns;
};

/* Shared memory: the ring, where later the sums of both halves of a stage lie; x; rest. */
union ring {
    bf16 w[1][TILE * STEP];
    float halves[2][SUM_TOKENS][PITCH];
};

__host__ __device__ constexpr int ring_bytes(int stages)
{
    int bytes = stages * TILE * STEP * (int)sizeof(bf16);
    return bytes > (int)sizeof(ring) ? bytes : (int)(sizeof(ring) + 127) / 128 * 128;
}

__device__ __forceinline__ place find_place(const one_args &a, const one_part &p, int tile)
{
    place at;
    at.share = (int)blockIdx.x & ((1 << a.shift) - 1);
    at.tile = tile - p.first_tile;
    at.first_step = a.n_steps * at.share >> a.shift;
    at.n_steps = (a.n_steps * (at.share + 1) >> a.shift) - at.first_step;
    at.width = p.act == QV_K_LINEAR_SWIGLU ? TILE / 2 : TILE;
    at.n_columns = p.act == QV_K_LINEAR_SWIGLU ? p.n_out / 2 : p.n_out;
    return at;
}

/* --- W ------------------------------------------------------------------------------------ */

/* What a thread copies of a stage: 8 numbers of two rows. */
struct thread_copies {
    const bf16 *from[COPIES];
    bf16 *to[COPIES];
    bool there[COPIES];
    int left; /* of k, from its own on */
};

__device__ __forceinline__ thread_copies copies_of(const one_args &a, const one_part &p,
                                                   const place &at, ring &m)
{
    thread_copies c;
    int col = (int)threadIdx.x % 8 * 8, k = at.first_step * STEP + col;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        int row = (int)threadIdx.x / 8 + i * TILE / COPIES, up = row >= at.width;
        int64_t column = (int64_t)at.tile * at.width + row - up * at.width;
        c.there[i] = column < at.n_columns;
        c.from[i] = p.w + (column + up * at.n_columns) * a.n_in + k;
        c.to[i] = m.w[0] + tile_at<STEP>(row, col);
    }
    c.left = a.n_in - k;
    return c;
}

/* The next stage, into a slot of the ring. */
__device__ __forceinline__ void copy_stage(thread_copies &c, const bf16 *w, int slot)
{
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        bool valid = c.there[i] && c.left > 0;
        copy16_stream(c.to[i] + slot * (TILE * STEP), valid ? c.from[i] : w, valid);
        c.from[i] += STEP;
    }
    c.left -= STEP;
}

/* --- x ------------------------------------------------------------------------------------ */

/* A thread's gains of the first 2048 of its block's range of k, asked for before the stream is
 * there. */
__device__ __forceinline__ void load_gains(const one_args &a, int k, int n, float (&gain)[8])
{
    int i = (int)threadIdx.x * 8;
    if (a.norm.residual && i < n && k + i < a.n_in)
        load8(a.norm.w + k + i, gain);
}

__device__ __forceinline__ void copy8(const one_args &a, const bf16 *from, bf16 *to, int k)
{
    *(uint4 *)to = k < a.n_in ? *(const uint4 *)(from + k) : uint4{};
}

/* x and its rest at k .. k + n, zeros behind the end. Bit for bit add_norm_vector_kernel of
 * norm.cu. */
__device__ __forceinline__ void norm_range(const one_args &a, int k, int n, bool store,
                                           float (&gain)[8], bf16 *x, bf16 *rest, float *shared)
{
    const qv_k_add_norm_args &norm = a.norm;
    float squares = 0, v[8];
#pragma unroll 1
    for (int i = (int)threadIdx.x * 8; i < a.n_in; i += THREADS * 8) {
        load8(norm.residual + i, v);
        squares = add_squares(v, squares);
    }
    float scale = norm_scale(block_sum(squares, shared), a.n_in, norm.eps);
#pragma unroll 1
    for (int i = (int)threadIdx.x * 8; i < n; i += THREADS * 8) {
        if (k + i >= a.n_in) {
            *(uint4 *)(x + i) = *(uint4 *)(rest + i) = uint4{};
            continue;
        }
        load8(norm.residual + k + i, v);
        if (i >= THREADS * 8)
            load8(norm.w + k + i, gain);
        store_normed(v, gain, scale, norm.plus_one, x + i, rest + i, true);
        if (store)
            *(uint4 *)((bf16 *)norm.y + k + i) = *(const uint4 *)(x + i);
    }
}

__device__ __forceinline__ void copy_range(const one_args &a, int k, int n, bool with_rest, bf16 *x,
                                           bf16 *rest)
{
#pragma unroll 1
    for (int i = (int)threadIdx.x * 8; i < n; i += THREADS * 8) {
        copy8(a, a.x, x + i, k + i);
        if (with_rest)
            copy8(a, a.rest, rest + i, k + i);
    }
}

/* --- Sums --------------------------------------------------------------------------------- */

/* acc += a warp's 16 rows of a stage times 32 of x, in all eight columns of the product. */
__device__ __forceinline__ void multiply(const uint32_t (&w)[2][4], const bf16 *x, float (&acc)[4])
{
    uint32_t b[4];
    ldmatrix4(b, x + ((int)threadIdx.x & 31) / 8 * 8);
    mma(acc, w[0], b[0], b[1]);
    mma(acc, w[1], b[2], b[3]);
}

/* A row of the block's own columns, or of what gates them, number `i` of `half` of the tile's rows,
 * over all of k: blocks in their order. */
__device__ __forceinline__ float sum_row(const cluster_sums<1> &sums, const sum_group &g,
                                         const ring &m, int half, int i)
{
    if (g.n == 1)
        return m.halves[0][0][half * g.width + i] + m.halves[1][0][half * g.width + i];
    const float *from = (const float *)&sums.fours[four_at(g, 0, 0, half, 0)] + i;
    int apart = four_at(g, 1, 0, half, 0) - four_at(g, 0, 0, half, 0);
    float v[MAX_SHARES], sum = 0; /* all loads before the first sum */
#pragma unroll
    for (int share = 0; share < MAX_SHARES; share++)
        if (share < g.n)
            v[share] = from[share * apart * 4];
#pragma unroll
    for (int share = 0; share < MAX_SHARES; share++)
        if (share < g.n)
            sum = share > 0 ? sum + v[share] : v[share];
    return sum;
}

/* A column of y; `old` is what is added to. */
__device__ __forceinline__ void store(const one_part &p, int64_t col, float v, float up, float old)
{
    if (p.act == QV_K_LINEAR_SWIGLU)
        v = swiglu(round_bf16(v), round_bf16(up));
    else if (p.act == QV_K_LINEAR_RELU2)
        v = relu2(round_bf16(v));
    else if (p.act == QV_K_LINEAR_ADD)
        v += old;
    if (p.y_f32)
        ((float *)p.y)[col] = v;
    else
        ((bf16 *)p.y)[col] = __float2bfloat16(v);
}

/* --- The kernel --------------------------------------------------------------------------- */

__global__ void __launch_bounds__(THREADS, BLOCKS)
    one_linear_kernel(const __grid_constant__ one_args a)
{
    let_next_start();
    extern __shared__ __align__(128) char one_memory[];
    __shared__ cluster_sums<1> sums;
    __shared__ float shared[THREADS / 32];
    ring &m = *(ring *)one_memory;
    const int n_shares = 1 << a.shift, tile = (int)blockIdx.x >> a.shift;
    int index = 0;
    while (index + 1 < a.n_parts && a.parts[index + 1].first_tile <= tile)
        index++;
    const one_part &p = a.parts[index];
    const place at = find_place(a, p, tile);
    const sum_group group = make_group(n_shares, at.share, 0, 1, at.width);
    if (n_shares > 1)
        begin_sums(sums, group);

    thread_copies copies = copies_of(a, p, at, m);
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) {
        if (i < at.n_steps)
            copy_stage(copies, p.w, i);
        copies_commit();
    }
    const int k = at.first_step * STEP, n = at.n_steps * STEP;
    bf16 *x = (bf16 *)(one_memory + ring_bytes(a.stages)), *rest = x + n;
    float gain[8];
    load_gains(a, k, n, gain);
    if (!a.x_is_there)
        wait_for_previous();
    const int i = (int)threadIdx.x; /* a column of those that the block finishes */
    const int64_t col = (int64_t)at.tile * at.width + (at.share << group.shift) * 4 + i;
    const bool finishes = i < 4 << group.shift && col < at.n_columns;
    float old = 0;
    if (p.act == QV_K_LINEAR_ADD && finishes)
        old = ((const float *)p.y)[col];
    if (a.norm.residual)
        norm_range(a, k, n, tile == 0, gain, x, rest, shared);
    else
        copy_range(a, k, n, p.rest, x, rest);
    __syncthreads();

    int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    int half = warp >> 2, row = (warp & 3) * 16;
    float acc[4] = {};
#pragma unroll 1
    for (int step = 0; step < at.n_steps; step++) {
        if (step < STAGES)
            copies_wait<STAGES - 1>();
        else
            copies_wait<STAGES - 2>(); /* no stage was asked for in the first step */
        __syncthreads();
        if (step > 0 && step - 1 + STAGES < at.n_steps)
            copy_stage(copies, p.w, (step - 1) % STAGES);
        copies_commit();
        const bf16 *w = m.w[0] + step % STAGES * (TILE * STEP);
        uint32_t of[2][4];
        load_a<STEP>(of[0], w, row, half * 32);
        load_a<STEP>(of[1], w, row, half * 32 + 16);
        multiply(of, x + step * STEP + half * 32, acc);
        if (p.rest)
            multiply(of, rest + step * STEP + half * 32, acc);
    }
    __syncthreads(); /* the sums lie where stages were */
    if (lane % 4 == 0) {
        m.halves[half][0][row + lane / 4] = acc[0];
        m.halves[half][0][row + lane / 4 + 8] = acc[2];
    }
    __syncthreads();
    if (n_shares > 1) {
        await_cluster();
        send_sums(sums, group, m.halves);
    }
    if (finishes) {
        float v = sum_row(sums, group, m, 0, i), up = 0;
        if (p.act == QV_K_LINEAR_SWIGLU)
            up = sum_row(sums, group, m, 1, i);
        store(p, col, v, up, old);
    }
    if (a.x_is_there)
        wait_for_previous(); /* whoever waits for this kernel also waits for that one */
}

/* --- Launch ------------------------------------------------------------------------------- */

bool part_can(const qv_k_linear_part &part, const qv_k_linear_args &first)
{
    const qv_k_linear_args &c = part.args;
    bool whole = part.act != QV_K_LINEAR_SWIGLU || c.n_out % 2 == 0;
    bool adds = part.act != QV_K_LINEAR_ADD || c.y_f32;
    return whole && adds && !c.w_f32 && c.n_tokens == 1 && c.n_in == first.n_in && c.x == first.x &&
           c.n_in % 8 == 0 && c.n_in <= 1 << 24 && c.n_out <= 1 << 24 && (uintptr_t)c.w % 16 == 0 &&
           (uintptr_t)c.x % 16 == 0 && (uintptr_t)c.rest % 16 == 0;
}

int tiles_of(const qv_k_linear_part &part)
{
    int64_t n = part.args.n_out;
    return part.act == QV_K_LINEAR_SWIGLU ? (int)((n / 2 + TILE / 2 - 1) / (TILE / 2))
                                          : (int)((n + TILE - 1) / TILE);
}

/* As stream_linear.cu has it: as many as keep all blocks on the device at once, while each has some
 * steps. */
int shift_of(int64_t tiles, int n_steps, int n_sms)
{
    int shift = 0;
    while (1 << shift < MAX_SHARES && tiles << (shift + 1) <= BLOCKS * n_sms &&
           n_steps >= (1 << (shift + 1)) * 4)
        shift++;
    return shift;
}

/* What is launched. */
struct plan {
    one_args args;
    int n_blocks, bytes; /* of shared memory */
};

void make_plan(const qv_k_linear_part *parts, int n_parts, const qv_k_add_norm_args *norm,
               int n_sms, plan &out)
{
    one_args &a = out.args;
    memset(&out, 0, sizeof out);
    a.n_parts = n_parts;
    a.n_in = (int)parts[0].args.n_in;
    a.n_steps = (a.n_in + STEP - 1) / STEP;
    a.x = (const bf16 *)parts[0].args.x;
    a.x_is_there = parts[0].args.x_is_there;
    if (norm)
        a.norm = *norm;
    int tiles = 0;
    for (int i = 0; i < n_parts; i++) {
        const qv_k_linear_args &c = parts[i].args;
        one_part &p = a.parts[i];
        p.w = (const bf16 *)c.w;
        p.y = c.y;
        p.n_out = (int)c.n_out;
        p.first_tile = tiles;
        p.act = parts[i].act;
        p.y_f32 = c.y_f32;
        p.rest = c.rest != nullptr;
        if (p.rest)
            a.rest = (const bf16 *)c.rest;
        tiles += tiles_of(parts[i]);
    }
    a.shift = shift_of(tiles, a.n_steps, n_sms);
    int steps = (a.n_steps + (1 << a.shift) - 1) >> a.shift;
    a.stages = steps < STAGES ? steps : STAGES;
    out.n_blocks = tiles << a.shift;
    out.bytes = ring_bytes(a.stages) +
                steps * STEP * (int)sizeof(bf16) * (a.rest != nullptr || norm ? 2 : 1);
}

constexpr int MOST_BYTES = 224 << 10; /* of a block */

} // namespace

bool qv_k_one_linear_can(const qv_k_linear_part *parts, int n_parts, const qv_k_add_norm_args *norm,
                         int n_sms)
{
    if (n_parts < 1 || n_parts > QV_K_JOINED_PARTS || !qv_k_is_hopper())
        return false;
    const void *rest = nullptr;
    for (int i = 0; i < n_parts; i++) {
        const void *own = parts[i].args.rest;
        if (!part_can(parts[i], parts[0].args) || (rest && own && own != rest))
            return false;
        rest = own ? own : rest;
    }
    plan p;
    make_plan(parts, n_parts, norm, n_sms, p);
    if (p.bytes > MOST_BYTES)
        return false;
    return !norm || (p.n_blocks <= BLOCKS * n_sms && (uintptr_t)norm->residual % 16 == 0 &&
                     (uintptr_t)norm->w % 16 == 0 && (uintptr_t)norm->y % 16 == 0);
}

qv_status qv_k_one_linear(const qv_k_linear_part *parts, int n_parts,
                          const qv_k_add_norm_args *norm, int n_sms, void *stream)
{
    plan p;
    make_plan(parts, n_parts, norm, n_sms, p);
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = 1u << p.args.shift;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)p.n_blocks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = (size_t)p.bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = attributes;
    config.numAttrs = p.args.shift > 0 ? 2 : 1;
    cudaError_t error = cudaFuncSetAttribute(
        one_linear_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_BYTES);
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, one_linear_kernel, p.args);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: one_linear: %s", cudaGetErrorString(error));
    return qv_k_check_launch("one_linear");
}
