/* A Gated DeltaNet layer between its two products, for steps of one token a sequence: convolution,
 * delta rule and gated norm, which by a launch each cost three times the latency. The same bits as
 * conv1d.cu, gdn.cu and norm.cu: a tile of 32 columns of S goes through the same steps as there.
 *
 * Two forms, bound by the state's 2 * 4 * 128 * 128 bytes a head and token, or by latency:
 * - few sequences: a block has one tile; the blocks of a head tell each other the squares of their
 *   outputs.
 * - many: a block has a head, one tile after the other, the next ones on their way.
 * A cluster has all heads of a key head. All its blocks read the state of the convolution of q and
 * k; the first one writes it behind a barrier.
 */
#include "kernels/mixer_step.cuh"

namespace
{

constexpr int THREADS = 128;
constexpr int HEAD_TILES = STEP_D / 32;
constexpr int MAX_CLUSTER = 8; /* blocks */

template <bool ONE> constexpr int N_TILES = ONE ? 1 : HEAD_TILES; /* of a block */

struct gdn_shared {
    float q[STEP_D], k[STEP_D];
    float sums[2][4][8][12];
    float squares[STEP_D / 8]; /* of eight outputs of the head each, by all blocks that have it */
    bf16 v[STEP_D], o[STEP_D]; /* from the block's first column on */
    float decay, beta;
};

struct gdn_place {
    mixer_token token;
    int head, column; /* the block's first one of the head */
    int channel;      /* the first of four that the thread convolves */
    bool convolves;
    bool norms; /* eight outputs from column + 8 thread on */
};

template <bool ONE>
__device__ __forceinline__ gdn_place find_place(const qv_k_steps &s, const qv_k_recurrent_args &c,
                                                const mixer_channels &first)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, tile = blockIdx.x * N_TILES<ONE>;
    gdn_place p;
    p.token = find_token(s, blockIdx.z);
    p.head = blockIdx.y * (c.n_v_heads / c.n_k_heads) + tile / HEAD_TILES;
    p.column = tile % HEAD_TILES * 32;
    p.channel = warp < 2 ? (warp == 0 ? first.q : first.k) + blockIdx.y * STEP_D
                         : first.v + p.head * STEP_D + p.column;
    p.channel += lane * QUAD;
    p.convolves = warp < 2 || (warp == 2 && lane < N_TILES<ONE> * 32 / QUAD);
    p.norms = threadIdx.x < N_TILES<ONE> * 32 / 8;
    return p;
}

/* --- The state ---------------------------------------------------------------------------- */

__device__ __forceinline__ float *tile_of(const qv_k_recurrent_args &c, const gdn_place &p,
                                          int tile)
{
    return c.state + (p.token.slot * c.n_v_heads + p.head) * STEP_D * STEP_D + p.column + tile * 32;
}

/* A row a thread. */
__device__ __forceinline__ void prefetch_tiles(const qv_k_recurrent_args &c, const gdn_place &p,
                                               int first, int end)
{
    if (!p.token.fresh)
#pragma unroll 1
        for (int tile = first; tile < end; tile++)
            prefetch(tile_of(c, p, tile) + threadIdx.x * STEP_D);
}

/* The thread's cells, as in gdn.cu. */
__device__ __forceinline__ float *cells_of(const qv_k_recurrent_args &c, const gdn_place &p,
                                           int tile)
{
    return tile_of(c, p, tile) + (threadIdx.x >> 3) * STEP_D + (threadIdx.x & 7) * 4;
}

__device__ __forceinline__ void load_cells(const qv_k_recurrent_args &c, const gdn_place &p,
                                           int tile, float4 (&cell)[8])
{
    const float *from = cells_of(c, p, tile);
#pragma unroll
    for (int i = 0; i < 8; i++)
        cell[i] = p.token.fresh ? make_float4(0, 0, 0, 0)
                                : __ldcs((const float4 *)(from + i * 16 * STEP_D));
}

/* Outputs of a tile to m.o, by threads of warp 0; e is what its state gains. */
__device__ __forceinline__ void read_tile(gdn_shared &m, const float4 (&cell)[8], int tile,
                                          float (&e)[4])
{
    float sum[9];
    int column = tile * 32 + (threadIdx.x & 7) * 4;
    delta_sums(cell, m.q, m.k, threadIdx.x, m.sums[tile & 1], sum);
    delta_error(sum, *(const uint2 *)(m.v + column), m.decay, m.beta, e);
    if (threadIdx.x < 8)
        *(uint2 *)(m.o + column) = delta_output(sum, m.decay, e);
}

__device__ __forceinline__ void write_tile(const gdn_shared &m, const qv_k_recurrent_args &c,
                                           const gdn_place &p, int tile, const float (&e)[4],
                                           float4 (&cell)[8])
{
    float *to = cells_of(c, p, tile);
    delta_update(cell, m.k, threadIdx.x >> 3, e, m.decay);
#pragma unroll
    for (int i = 0; i < 8; i++)
        __stcs((float4 *)(to + i * 16 * STEP_D), cell[i]);
}

/* --- Before and behind it ----------------------------------------------------------------- */

/* q and k scaled, v and the gates to m. What the convolution keeps of q and k is left in past where
 * other blocks of the cluster read it too. */
__device__ __forceinline__ void enter(gdn_shared &m, const qv_k_mixer_args &a, const gdn_place &p,
                                      const conv_gains &gains, conv_past &past, uint2 x,
                                      const gate_inputs &gates)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (p.convolves) {
        x = conv_token(gains, past, x);
        if (warp == 2)
            *(uint2 *)(m.v + lane * QUAD) = x;
        if (warp == 2 || gridDim.x == 1)
            *past_of(a.conv, p.token.slot, p.channel) = past;
    }
    if (warp == 0)
        put_unit(x, rsqrtf((float)STEP_D), m.q, lane);
    if (warp == 1)
        put_unit(x, 1, m.k, lane);
    if (threadIdx.x == 96) {
        gate gt = gate_from<true>(a.layer, gates);
        m.decay = expf(gt.g);
        m.beta = gt.beta;
    }
}

/* The sum of squares of the thread's outputs, in the order of norm.cu. */
__device__ __forceinline__ float own_squares(const gdn_shared &m, float (&o)[8])
{
    float squares = 0;
    unpack8(*(const bf16x8 *)(m.o + threadIdx.x * 8), o);
#pragma unroll
    for (int i = 0; i < 8; i++)
        squares = fmaf(o[i], o[i], squares);
    return squares;
}

__device__ __forceinline__ void load_gate(bf16x8 z, float (&gate)[8])
{
    unpack8(z, gate);
#pragma unroll
    for (int i = 0; i < 8; i++)
        gate[i] = silu(gate[i]);
}

/* Grid (blocks of a key head, key heads, sequences); `ahead`: all of the block's state is called to
 * the L2 cache at once. */
template <bool ONE>
__global__ void __launch_bounds__(THREADS, ONE ? 5 : 4)
    conv_gdn_norm_kernel(const qv_k_steps s, const __grid_constant__ qv_k_mixer_args a,
                         const mixer_channels first, bool ahead)
{
    constexpr int AT_ONCE = ONE ? 1 : 2; /* tiles */
    __shared__ __align__(16) gdn_shared m;
    const qv_k_recurrent_args &c = a.layer;
    const gdn_place p = find_place<ONE>(s, c, first);
    bool clusters = gridDim.x > 1;
    if (!p.token.there) {
        wait_for_previous(); /* whoever waits for this kernel also waits for those before it */
        return;
    }
    if (clusters)
        cluster_arrive(); /* the block runs: its shared memory may be written */
    conv_gains gains;
    float gain[8] = {};
    prefetch_tiles(c, p, 0, AT_ONCE);
    if (p.convolves) {
        load_gains(a.conv, p.channel, gains);
        prefetch(past_of(a.conv, p.token.slot, p.channel));
    }
    int column = p.column + threadIdx.x * 8; /* of the norm */
    if (p.norms)
        load8(a.w + column, gain);
    wait_for_previous();
    const bool later = ONE && gridDim.z == 1; /* what that asks for, behind the state */
    if (!later)
        let_next_start();

    uint2 x = {};
    conv_past past = {};
    gate_inputs gates = {};
    bf16x8 z = {};
    float4 cell[AT_ONCE][8];
    if (p.convolves) {
        x = *(const uint2 *)((const bf16 *)a.conv.x + p.token.t * a.conv.x_stride + p.channel);
        if (!p.token.fresh)
            past = *past_of(a.conv, p.token.slot, p.channel);
    }
    if (threadIdx.x == 96)
        gates = gate_inputs_of<true>(c, p.token.t, p.head);
    if (p.norms)
        z = *(const bf16x8 *)(row_of(a.z, p.token.t, p.head) + column);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
        load_cells(c, p, i, cell[i]);
    if (!ONE && ahead)
        prefetch_tiles(c, p, AT_ONCE, HEAD_TILES);
    enter(m, a, p, gains, past, x, gates);
    __syncthreads();
    if (later)
        let_next_start();
    if (clusters)
        cluster_wait(); /* all blocks run */

    float e[4], o[8], gate[8], squares = 0;
    load_gate(z, gate);
    if (ONE) {
        read_tile(m, cell[0], 0, e);
        __syncwarp();
        if (p.norms) {
            squares = own_squares(m, o);
#pragma unroll
            for (int i = 0; i < HEAD_TILES; i++)
                store_to(&m.squares[column / 8], blockIdx.x / HEAD_TILES * HEAD_TILES + i, squares);
        }
        __syncwarp();
        cluster_arrive();
        write_tile(m, c, p, 0, e, cell[0]);
        cluster_wait();
        squares = m.squares[threadIdx.x & 15];
    } else {
        if (clusters)
            cluster_arrive();
#pragma unroll 1
        for (int tile = 0; tile < HEAD_TILES; tile += AT_ONCE)
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                read_tile(m, cell[i], tile + i, e);
                write_tile(m, c, p, tile + i, e, cell[i]);
                if (tile + AT_ONCE < HEAD_TILES)
                    load_cells(c, p, tile + AT_ONCE + i, cell[i]);
            }
        if (clusters)
            cluster_wait();
        __syncwarp();
        if (p.norms)
            squares = own_squares(m, o);
    }
    if (clusters && blockIdx.x == 0 && threadIdx.x < 64)
        *past_of(a.conv, p.token.slot, p.channel) = past; /* all have read the old one */
    if (threadIdx.x >= 32)
        return;
    float scale = norm_scale(lanes_sum<16>(squares), STEP_D, a.eps);
    if (!p.norms)
        return;
#pragma unroll
    for (int i = 0; i < 8; i++)
        o[i] = o[i] * scale * gain[i] * gate[i];
    __stwb((uint4 *)(row_of<bf16>(a.y, p.token.t, p.head) + column), pack8(o).u);
}

/* Few: up to so many heads of all sequences (4B, ms a step at 8 and 12 sequences of 32: by tiles
 * 4.13 and 4.60, by heads 4.23 and 4.50). */
constexpr int64_t FEW_HEADS = 256;
/* From so many on, the whole state of a block is asked for at once (32, 64 and 256 sequences: 5.85,
 * 8.03 and 20.67 without, 5.86, 8.01 and 20.40 with). */
constexpr int64_t AHEAD_HEADS = 2048;

} // namespace

bool qv_k_conv_gdn_norm_can(const qv_k_steps *steps, const qv_k_mixer_args *args)
{
    const qv_k_recurrent_args &c = args->layer;
    return c.d_k == STEP_D && c.d_v == STEP_D && c.n_v_heads <= MAX_CLUSTER * c.n_k_heads &&
           mixer_can(*steps, *args);
}

qv_status qv_k_conv_gdn_norm(const qv_k_steps *steps, const qv_k_mixer_args *args, void *stream)
{
    const char *name = "conv_gdn_norm";
    const qv_k_recurrent_args &c = args->layer;
    int group = c.n_v_heads / c.n_k_heads;
    int64_t heads = (int64_t)steps->n_seqs * c.n_v_heads;
    dim3 grid((unsigned)group, (unsigned)c.n_k_heads, (unsigned)steps->n_seqs);
    if (heads > FEW_HEADS || group * HEAD_TILES > MAX_CLUSTER)
        return launch_mixer(name, conv_gdn_norm_kernel<false>, grid, THREADS, stream, *steps, *args,
                            channels_of(*args), heads >= AHEAD_HEADS);
    grid.x *= HEAD_TILES;
    return launch_mixer(name, conv_gdn_norm_kernel<true>, grid, THREADS, stream, *steps, *args,
                        channels_of(*args), false);
}
