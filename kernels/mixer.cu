/* A recurrent mixer of decode in one kernel: a token of the convolution, the recurrence and the
 * gated norm, with the bits that conv1d.cu, gdn.cu or ssd.cu and norm.cu give one after the other.
 * Bound by the state, which is read and written once; at few sequences by latency, of which three
 * launches have thrice as much.
 *
 * A cluster of up to 8 blocks is a sequence and a group: a key head with its value heads (delta
 * rule), a group of B and C with its heads (SSD). So all that share channels of the convolution or
 * a row of the norm are in one cluster, each channel is read by one thread, which moves its window
 * on at once, and blocks meet twice: with q and k (C and B) after the convolution, and with what
 * enters the norm. Both are written into the shared memory of all blocks.
 *
 * The values of a group are cut into tiles of 32, and a block into teams of 128 threads, a tile
 * each: 32 columns of S of a head, or 32 rows where S is stored the other way round. With few
 * blocks (before 9.0 there are no clusters) a team takes several tiles, one after the other.
 */
#include "kernels/cluster.cuh"
#include "kernels/device.cuh"
#include "kernels/norm_row.cuh"
#include "kernels/recurrent.cuh"

namespace
{

constexpr int TEAM = 128;
constexpr int TILE = 32;
constexpr int MAX_TEAMS = 8;  /* of a block */
constexpr int MAX_BLOCKS = 8; /* of a cluster */
constexpr int MAX_MIXER_BYTES = 48 * 1024;
constexpr int MIXER_TAPS = 4; /* of the forms for 128 */

enum mixer_form { DELTA_128, SSD_128, DELTA_ANY, SSD_ANY };

constexpr bool is_delta(mixer_form form)
{
    return form == DELTA_128 || form == DELTA_ANY;
}

constexpr bool is_any(mixer_form form)
{
    return form == DELTA_ANY || form == SSD_ANY;
}

struct mixer_plan {
    int n_blocks, teams, rounds;                   /* tiles of a team: rounds */
    int tiles, head_tiles;                         /* of a group, of a head */
    int n_heads, n_values;                         /* of a group */
    int norm_rows, norm_d, norm_lanes, norm_warps; /* of a group; norm_row.cuh */
    int q_channel, k_channel, v_channel;           /* where they begin in the convolution */
    int keys, unit, values, entered, gains, gates, squares, sums, states, bytes; /* shared memory */
};

/* --- Device: places ----------------------------------------------------------------------- */

struct mixer_shared {
    bf16 *keys;     /* [2, d_k] q and k after the convolution; all blocks write it */
    float *unit;    /* [2, d_k] what they are multiplied with */
    bf16 *values;   /* [teams, 32] of the tile, after the convolution */
    float *entered; /* [n_values] of the norm; all blocks write it */
    float *gains;   /* [teams, 2, 32] z and the norm's weight of the tile */
    float *gates;   /* [3, n_heads] decay, beta, d_skip */
    float *squares; /* [norm_rows, norm_warps] */
    float *sums;    /* of teams */
    float *states;  /* [teams, d_k, 32] of any shape */
};

__device__ __forceinline__ mixer_shared shared_of(char *memory, const mixer_plan &p)
{
    return {
        (bf16 *)(memory + p.keys),     (float *)(memory + p.unit),  (bf16 *)(memory + p.values),
        (float *)(memory + p.entered), (float *)(memory + p.gains), (float *)(memory + p.gates),
        (float *)(memory + p.squares), (float *)(memory + p.sums),  (float *)(memory + p.states)};
}

/* Values [first, first + width) of the group; of one head unless rows of S are what tiles are cut
 * from. width 0: none. */
struct tile_place {
    int first, width, head;
};

template <mixer_form FORM>
__device__ __forceinline__ tile_place place_of(const qv_k_mixer_args &c, const mixer_plan &p,
                                               int round)
{
    int team = blockIdx.x * p.teams + threadIdx.x / TEAM;
    int tile = round * p.n_blocks * p.teams + team;
    if (tile >= p.tiles)
        return {0, 0, 0};
    if (FORM == SSD_128)
        return {tile * TILE, min(TILE, p.n_values - tile * TILE), tile * TILE / c.step.d_v};
    int d_v = FORM == DELTA_128 ? STEP_D : c.step.d_v;
    int head_tiles = FORM == DELTA_128 ? STEP_D / TILE : p.head_tiles;
    int head = tile / head_tiles, column = tile % head_tiles * TILE;
    return {head * d_v + column, min(TILE, d_v - column), head};
}

struct mixer_token {
    int t, slot, group;
    bool fresh;
};

/* A number of the norm's other tensors, or where it goes: value i of the group. */
__device__ __forceinline__ bf16 *norm_at(const qv_k_heads &v, const mixer_plan &p,
                                         const mixer_token &now, int i)
{
    int row = i / p.norm_d;
    return row_of<bf16>(v, now.t, now.group * p.norm_rows + row) + (i - row * p.norm_d);
}

__device__ __forceinline__ void to_all(const mixer_plan &p, bf16 *to, bf16 x)
{
    for (int rank = 0; rank < p.n_blocks; rank++)
        store_at(rank, to, x);
}

template <typename T> __device__ __forceinline__ void to_all(const mixer_plan &p, float *to, T x)
{
    for (int rank = 0; rank < p.n_blocks; rank++)
        store_at(rank, to, x);
}

/* --- Device: convolution and gates -------------------------------------------------------- */

/* What the convolution gives for a channel, rounded as where it is stored; its window moves on. */
template <bool FOUR>
__device__ __forceinline__ bf16 convolve(const qv_k_conv1d_args &c, const mixer_token &now,
                                         int channel)
{
    const bf16 zero = __float2bfloat16(0.0f);
    int n_past = FOUR ? 3 : c.n_taps - 1;
    bf16 *state = (bf16 *)c.state + ((int64_t)now.slot * c.n_channels + channel) * n_past;
    const float *w = c.w + channel * (n_past + 1);
    bf16 newest = ((const bf16 *)c.x)[(int64_t)now.t * c.x_stride + channel];
    float sum = c.bias ? c.bias[channel] : 0.0f;
    if (FOUR) {
        bf16 a = state[0], b = state[1], d = state[2];
        float4 tap = *(const float4 *)w;
        a = now.fresh ? zero : a;
        b = now.fresh ? zero : b;
        d = now.fresh ? zero : d;
        sum = fmaf(tap.x, to_float(a), sum);
        sum = fmaf(tap.y, to_float(b), sum);
        sum = fmaf(tap.z, to_float(d), sum);
        sum = fmaf(tap.w, to_float(newest), sum);
        state[0] = b;
        state[1] = d;
        state[2] = newest;
    } else {
        for (int j = 0; j < n_past; j++) {
            bf16 old = now.fresh ? zero : state[j];
            sum = fmaf(w[j], to_float(old), sum);
            if (j > 0)
                state[j - 1] = old;
        }
        sum = fmaf(w[n_past], to_float(newest), sum);
        if (n_past > 0)
            state[n_past - 1] = newest;
    }
    return __float2bfloat16(silu(sum));
}

/* The team's first warp: the values of its tile, zeros behind them. */
template <mixer_form FORM>
__device__ __forceinline__ void load_values(const qv_k_mixer_args &c, const mixer_plan &p,
                                            const mixer_token &now, const tile_place &at,
                                            bf16 *values)
{
    int lane = threadIdx.x % TEAM;
    if (lane >= TILE)
        return;
    int channel = p.v_channel + now.group * p.n_values + at.first + lane;
    values[lane] =
        lane < at.width ? convolve<!is_any(FORM)>(c.conv, now, channel) : __float2bfloat16(0.0f);
}

/* This block's part of q and k, for all blocks. They have to have begun, which is waited for here
 * once the first channel is on its way. */
template <mixer_form FORM>
__device__ __forceinline__ void share_keys(const qv_k_mixer_args &c, const mixer_plan &p,
                                           const mixer_token &now, bf16 *keys)
{
    /* From the second warp on: the first is busy with values. */
    int thread = threadIdx.x < 32 ? threadIdx.x + blockDim.x - 32 : threadIdx.x - 32;
    int d_k = is_any(FORM) ? c.step.d_k : STEP_D, part = (2 * d_k + p.n_blocks - 1) / p.n_blocks;
    int i = blockIdx.x * part + thread, end = min((int)(blockIdx.x + 1) * part, 2 * d_k);
    int q = p.q_channel + now.group * d_k, k = p.k_channel + now.group * d_k;
    bf16 key = __float2bfloat16(0.0f);
    if (i < end)
        key = convolve<!is_any(FORM)>(c.conv, now, i < d_k ? q + i : k + i - d_k);
    cluster_wait();
    while (i < end) {
        to_all(p, keys + i, key);
        i += blockDim.x;
        if (i < end)
            key = convolve<!is_any(FORM)>(c.conv, now, i < d_k ? q + i : k + i - d_k);
    }
}

/* The team's third warp: what the norm needs of the tile beside the entered numbers. The first has
 * values, the second keys, the last gates, so that no load is issued behind a wait for another. */
__device__ __forceinline__ int norm_lane()
{
    int in_team = threadIdx.x % TEAM;
    return in_team >= 64 && in_team < 96 ? in_team - 64 : -1;
}

template <bool DELTA>
__device__ __forceinline__ void load_gain(const qv_k_mixer_args &c, const mixer_plan &p,
                                          const mixer_shared &m, const mixer_token &now,
                                          const tile_place &at)
{
    int lane = norm_lane(), i = at.first + lane;
    if (lane < 0 || lane >= at.width)
        return;
    float *to = m.gains + threadIdx.x / TEAM * 2 * TILE + lane;
    to[0] = to_float(*norm_at(c.z, p, now, i));
    to[TILE] = c.norm[DELTA ? i % p.norm_d : now.group * p.norm_d + i];
}

/* From the last thread on. */
template <bool DELTA>
__device__ __forceinline__ void load_all_gates(const qv_k_mixer_args &c, const mixer_plan &p,
                                               const mixer_token &now, float *gates)
{
    for (int i = blockDim.x - 1 - threadIdx.x; i < p.n_heads; i += blockDim.x) {
        int head = now.group * p.n_heads + i;
        gate gt = gate_of<DELTA>(c.step, now.t, head);
        gates[i] = expf(gt.g);
        gates[p.n_heads + i] = gt.beta;
        if (!DELTA)
            gates[2 * p.n_heads + i] = c.step.d_skip[head];
    }
}

/* q and k as they enter the products; the norm of a head is the warp's. */
template <mixer_form FORM>
__device__ __forceinline__ void load_units(const qv_k_mixer_args &c, const mixer_shared &m)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, d_k = c.step.d_k;
    if (FORM == SSD_128 || warp > 1)
        return; /* the rows of B and C are read as they are */
    const bf16 *from = m.keys + (warp == 0 ? d_k : 0);
    float *to = m.unit + (warp == 0 ? d_k : 0);
    float factor = warp == 0 ? 1.0f : rsqrtf((float)d_k);
    if (FORM == DELTA_128)
        load_unit(from, factor, to, lane);
    else
        load_any_key<is_delta(FORM)>(from, d_k, factor, to);
}

/* --- Device: the recurrence --------------------------------------------------------------- */

/* The thread's cells of S are eight rows `CELL_STEP` apart, from cells_of on. */
template <mixer_form FORM>
constexpr int CELL_STEP = FORM == DELTA_128 ? 16 * STEP_D : 4 * STEP_STATE;

template <mixer_form FORM>
__device__ __forceinline__ float *cells_of(const qv_k_mixer_args &c, const mixer_plan &p,
                                           const mixer_token &now, const tile_place &at)
{
    int in_team = threadIdx.x % TEAM, lane = threadIdx.x & 31, warp = in_team >> 5;
    int64_t head = (int64_t)now.slot * c.step.n_v_heads + now.group * p.n_heads;
    if (FORM == DELTA_128)
        return c.step.state + ((head + at.head) * STEP_D + (in_team >> 3)) * STEP_D +
               (at.first - at.head * STEP_D) + (in_team & 7) * 4;
    /* Row w + 4 i of the tile, all rows of a group behind each other. */
    return c.step.state + (head * c.step.d_v + at.first + warp) * STEP_STATE + lane * 4;
}

template <mixer_form FORM> __device__ __forceinline__ bool has_cell(const tile_place &at, int i)
{
    return FORM == DELTA_128 ? at.width > 0 : (threadIdx.x % TEAM >> 5) + 4 * i < at.width;
}

template <mixer_form FORM>
__device__ __forceinline__ void load_cells(const float *from, const tile_place &at,
                                           float4 (&cell)[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        cell[i] = has_cell<FORM>(at, i) ? __ldcs((const float4 *)(from + i * CELL_STEP<FORM>))
                                        : make_float4(0, 0, 0, 0);
}

/* A fresh sequence starts from zeros; known later than where the cells are. */
__device__ __forceinline__ void forget_cells(bool fresh, float4 (&cell)[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        cell[i] = fresh ? make_float4(0, 0, 0, 0) : cell[i];
}

template <mixer_form FORM>
__device__ __forceinline__ void store_cells(float *to, const tile_place &at,
                                            const float4 (&cell)[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (has_cell<FORM>(at, i))
            __stcs((float4 *)(to + i * CELL_STEP<FORM>), cell[i]);
}

/* The delta rule: o of a team's columns to all blocks, `cell` moved on once all have arrived. */
__device__ __forceinline__ void delta_tile(const mixer_plan &p, const mixer_shared &m,
                                           const tile_place &at, bool last_round, float4 (&cell)[8])
{
    int in_team = threadIdx.x % TEAM, team = threadIdx.x / TEAM;
    int row = in_team >> 3, column = (in_team & 7) * 4;
    const float *q = m.unit, *k = m.unit + STEP_D;
    float(*sums)[8][12] = (float(*)[8][12])m.sums + team * 4;
    float sum[9], e[4] = {}, decay = m.gates[at.head];
    delta_sums(cell, q, k, in_team, sums, sum);
    delta_error(sum, *(const uint2 *)(m.values + team * TILE + column), decay,
                m.gates[p.n_heads + at.head], e);
    if (in_team < 8 && at.width > 0) {
        uint2 o = delta_output(sum, decay, e);
        to_all(p, m.entered + at.first + column,
               make_float4(bf16_low(o.x), bf16_high(o.x), bf16_low(o.y), bf16_high(o.y)));
    }
    if (last_round)
        cluster_arrive();
    delta_update(cell, k, row, e, decay);
}

/* SSD: a warp's rows, which may be of several heads. */
__device__ __forceinline__ void ssd_tile(const qv_k_mixer_args &c, const mixer_plan &p,
                                         const mixer_shared &m, const tile_place &at,
                                         bool last_round, float4 (&cell)[8])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x % TEAM >> 5, d_v = c.step.d_v;
    const bf16 *values = m.values + threadIdx.x / TEAM * TILE;
    uint2 raw_c = *(const uint2 *)(m.keys + lane * 4);
    uint2 raw_b = *(const uint2 *)(m.keys + STEP_STATE + lane * 4);
    float b[4] = {bf16_low(raw_b.x), bf16_high(raw_b.x), bf16_low(raw_b.y), bf16_high(raw_b.y)};
    float r[4] = {bf16_low(raw_c.x), bf16_high(raw_c.x), bf16_low(raw_c.y), bf16_high(raw_c.y)};
    float sum[STEP_ROWS];
    int mine = warp + 4 * (lane >> 2), head = at.head, in_head = at.first + warp - head * d_v;
#pragma unroll
    for (int i = 0; i < STEP_ROWS; i++) {
        for (; in_head >= d_v; in_head -= d_v)
            head++;
        /* Rows behind the group's last have cells and values of zero. */
        int of = min(head, p.n_heads - 1);
        float in = m.gates[p.n_heads + of] * to_float(values[warp + 4 * i]);
        sum[i] = update_row(cell[i], in, m.gates[of], b, r);
        in_head += 4;
    }
    fold_rows(sum);
    if ((lane & 3) == 0 && mine < at.width) {
        float skip = m.gates[2 * p.n_heads + (at.first + mine) / d_v];
        float y = round_bf16(fmaf(skip, to_float(values[mine]), sum[0]));
        float z = m.gains[threadIdx.x / TEAM * 2 * TILE + mine];
        to_all(p, m.entered + at.first + mine, enter<QV_K_GATE_THEN_NORM>(y, z));
    }
    if (last_round)
        cluster_arrive();
}

/* Any shape: S of the tile in shared memory, which only the warp that has the row reads. */
template <mixer_form FORM>
__device__ __forceinline__ void any_tile(const qv_k_mixer_args &c, const mixer_plan &p,
                                         const mixer_shared &m, const mixer_token &now,
                                         const tile_place &at, bool last_round)
{
    constexpr bool DELTA = is_delta(FORM);
    int lane = threadIdx.x & 31, warp = threadIdx.x % TEAM >> 5, team = threadIdx.x / TEAM;
    int d_k = c.step.d_k, d_v = c.step.d_v;
    int64_t key_stride = DELTA ? d_v : 1, value_stride = DELTA ? 1 : d_k;
    int64_t head = (int64_t)now.slot * c.step.n_v_heads + now.group * p.n_heads + at.head;
    float *state =
        c.step.state + head * d_k * d_v + (at.first - at.head * d_v + lane) * value_stride;
    float *column = m.states + team * d_k * TILE + lane;
    float(*sums)[4][TILE] = (float(*)[4][TILE])m.sums + team * 2;
    const float *q = m.unit, *k = m.unit + d_k;
    bool mine = lane < at.width;
    for (int i = warp; i < d_k; i += 4)
        column[i * TILE] = mine && !now.fresh ? state[i * key_stride] : 0.0f;

    float decay = m.gates[at.head], v = to_float(m.values[team * TILE + lane]), seen = 0;
    if (DELTA) {
        sums[0][warp][lane] = any_seen(column, k, d_k, warp);
        __syncthreads();
        seen = decay * any_total(sums[0], lane);
    }
    float e = m.gates[p.n_heads + at.head] * (v - seen);
    sums[1][warp][lane] = any_update(column, q, k, d_k, warp, decay, e);
    __syncthreads();
    if (warp == 0 && mine) {
        float out = any_total(sums[1], lane);
        if (!DELTA)
            out += m.gates[2 * p.n_heads + at.head] * v;
        out = round_bf16(out);
        if (!DELTA)
            out = enter<QV_K_GATE_THEN_NORM>(out, m.gains[team * 2 * TILE + lane]);
        to_all(p, m.entered + at.first + lane, out);
    }
    if (last_round)
        cluster_arrive();
    if (mine)
        for (int i = warp; i < d_k; i += 4)
            state[i * key_stride] = column[i * TILE];
}

/* --- Device: the norm --------------------------------------------------------------------- */

template <bool DELTA>
__device__ __forceinline__ void store_norm(const qv_k_mixer_args &c, const mixer_plan &p,
                                           const mixer_shared &m, const mixer_token &now,
                                           const tile_place &at)
{
    constexpr qv_k_norm_kind KIND = DELTA ? QV_K_NORM_THEN_GATE : QV_K_GATE_THEN_NORM;
    int lane = norm_lane(), i = at.first + lane;
    if (lane < 0 || at.width == 0)
        return;
    const float *in = m.gains + threadIdx.x / TEAM * 2 * TILE + lane;
    float squares = norm_total(m.squares + at.first / p.norm_d * p.norm_warps, p.norm_warps);
    float scale = norm_scale(squares, p.norm_d, c.eps);
    if (lane < at.width)
        *norm_at(c.step.o, p, now, i) =
            __float2bfloat16(leave<KIND>(m.entered[i] * scale, in[TILE], in[0]));
}

/* --- Kernel ------------------------------------------------------------------------------- */

/* Grid (blocks of a cluster, groups, sequences), teams x 128 threads. */
template <mixer_form FORM>
__global__ void __launch_bounds__(TEAM *MAX_TEAMS)
    mixer_kernel(qv_k_steps s, qv_k_mixer_args c, mixer_plan p)
{
    constexpr bool DELTA = is_delta(FORM), ANY = is_any(FORM);
    extern __shared__ __align__(16) char mixer_memory[];
    mixer_shared m = shared_of(mixer_memory, p);
    int seq = blockIdx.z, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    let_next_start();
    mixer_token now = {s.seq_start[seq], s.state_slot[seq], (int)blockIdx.y, false};
    if (now.t >= s.seq_start[seq + 1])
        return; /* all blocks of the cluster */
    cluster_arrive();

    /* Load and convolve; where the cells are does not depend on whether they are used. */
    tile_place at = place_of<FORM>(c, p, 0);
    float4 cell[8];
    if (!ANY)
        load_cells<FORM>(cells_of<FORM>(c, p, now, at), at, cell);
    now.fresh = s.pos[now.t] == 0;
    load_gain<DELTA>(c, p, m, now, at);
    load_values<FORM>(c, p, now, at, m.values + threadIdx.x / TEAM * TILE);
    load_all_gates<DELTA>(c, p, now, m.gates);
    share_keys<FORM>(c, p, now, m.keys);
    cluster_arrive();
    cluster_wait(); /* all of q and k are here */
    load_units<FORM>(c, m);
    __syncthreads();

    /* Compute and store the state */
    for (int round = 0; round < p.rounds; round++) {
        bool last_round = round + 1 == p.rounds;
        at = place_of<FORM>(c, p, round); /* again, not kept in registers */
        if (round > 0) {
            __syncthreads(); /* values and sums of the round before have been read */
            if (!ANY)
                load_cells<FORM>(cells_of<FORM>(c, p, now, at), at, cell);
            load_gain<DELTA>(c, p, m, now, at);
            load_values<FORM>(c, p, now, at, m.values + threadIdx.x / TEAM * TILE);
            __syncthreads();
        }
        if (!ANY)
            forget_cells(now.fresh, cell);
        if (FORM == DELTA_128)
            delta_tile(p, m, at, last_round, cell);
        else if (FORM == SSD_128)
            ssd_tile(c, p, m, at, last_round, cell);
        else
            any_tile<FORM>(c, p, m, now, at, last_round);
        if (!ANY)
            store_cells<FORM>(cells_of<FORM>(c, p, now, at), at, cell);
    }

    /* Norm */
    cluster_wait(); /* all that enters is here; nobody writes into this block from now on */
    for (int i = warp; i < p.norm_rows * p.norm_warps; i += blockDim.x / 32) {
        float squares = norm_squares(m.entered + i / p.norm_warps * p.norm_d, p.norm_d,
                                     p.norm_lanes, i % p.norm_warps);
        if (lane == 0)
            m.squares[i] = squares;
    }
    __syncthreads();
    for (int round = 0; round < p.rounds; round++) {
        at = place_of<FORM>(c, p, round);
        if (p.rounds > 1)
            load_gain<DELTA>(c, p, m, now, at);
        store_norm<DELTA>(c, p, m, now, at);
    }
}

/* --- Launch ------------------------------------------------------------------------------- */

int round_up(int64_t bytes)
{
    return (int)((bytes + 15) / 16 * 16);
}

void plan_memory(const qv_k_recurrent_args &c, bool any, mixer_plan &p)
{
    p.keys = 0;
    p.unit = p.keys + round_up(2 * c.d_k * 2);
    p.values = p.unit + round_up(2 * c.d_k * 4);
    p.entered = p.values + round_up(p.teams * TILE * 2);
    p.gains = p.entered + round_up((int64_t)p.n_values * 4);
    p.gates = p.gains + p.teams * 2 * TILE * 4;
    p.squares = p.gates + round_up((int64_t)p.n_heads * 3 * 4);
    p.sums = p.squares + round_up((int64_t)p.norm_rows * p.norm_warps * 4);
    p.states = p.sums + p.teams * 4 * (any ? 2 * TILE : 8 * 12) * 4;
    p.bytes = p.states + (any ? p.teams * c.d_k * TILE * 4 : 0);
}

/* Fewest rounds, then fewest teams without a tile, then most blocks. */
void plan_blocks(const qv_k_recurrent_args &c, bool any, int most_blocks, mixer_plan &best)
{
    int64_t best_cost = INT64_MAX;
    mixer_plan p = best;
    for (p.n_blocks = 1; p.n_blocks <= most_blocks; p.n_blocks *= 2) {
        p.teams = (p.tiles + p.n_blocks - 1) / p.n_blocks;
        p.teams = p.teams < MAX_TEAMS ? p.teams : MAX_TEAMS;
        plan_memory(c, any, p);
        while (p.bytes > MAX_MIXER_BYTES && p.teams > 1) {
            p.teams--;
            plan_memory(c, any, p);
        }
        p.rounds = (p.tiles + p.n_blocks * p.teams - 1) / (p.n_blocks * p.teams);
        p.teams = (p.tiles + p.n_blocks * p.rounds - 1) / (p.n_blocks * p.rounds);
        plan_memory(c, any, p);
        int64_t cost = (int64_t)p.rounds << 32 | (p.n_blocks * p.teams * p.rounds - p.tiles);
        if (cost <= best_cost) {
            best = p;
            best_cost = cost;
        }
    }
}

/* Channels [first, first + n) of the convolution that the recurrence reads, head after head. */
struct channel_range {
    int64_t first, n;
};

channel_range channels_of(const qv_k_conv1d_args &conv, const qv_k_heads &v, int heads, int d)
{
    bool dense = v.token == conv.y_stride && (v.head == d || heads == 1);
    return {dense ? (const bf16 *)v.data - (const bf16 *)conv.y : -1, (int64_t)heads * d};
}

bool apart(const channel_range &a, const channel_range &b)
{
    return a.first + a.n <= b.first || b.first + b.n <= a.first;
}

/* Every channel has to be somebody's, or its window would stay behind. */
bool plan_channels(const qv_k_mixer_args &c, mixer_plan &p)
{
    const qv_k_recurrent_args &r = c.step;
    channel_range q = channels_of(c.conv, r.q, r.n_k_heads, r.d_k);
    channel_range k = channels_of(c.conv, r.k, r.n_k_heads, r.d_k);
    channel_range v = channels_of(c.conv, r.v, r.n_v_heads, r.d_v);
    p.q_channel = (int)q.first;
    p.k_channel = (int)k.first;
    p.v_channel = (int)v.first;
    return q.first >= 0 && k.first >= 0 && v.first >= 0 && apart(q, k) && apart(q, v) &&
           apart(k, v) && q.n + k.n + v.n == c.conv.n_channels &&
           c.conv.n_channels * c.conv.n_taps <= INT32_MAX;
}

/* False where there is no such kernel. */
template <bool DELTA> bool plan_mixer(const qv_k_mixer_args &c, mixer_plan &p, mixer_form &form)
{
    const qv_k_recurrent_args &r = c.step;
    bool fits = fits_chunks(r) && r.d_k == STEP_D && (!DELTA || r.d_v == STEP_D);
    if (!plan_channels(c, p) || r.d_k > MAX_D_K || c.conv.n_taps < 1 ||
        (fits && (c.conv.n_taps != MIXER_TAPS || (uintptr_t)c.conv.w % 16 != 0)))
        return false;
    form = DELTA ? fits ? DELTA_128 : DELTA_ANY : fits ? SSD_128 : SSD_ANY;
    int64_t n_values = (int64_t)r.n_v_heads / r.n_k_heads * r.d_v;
    if (n_values > MAX_MIXER_BYTES)
        return false;
    p.n_heads = r.n_v_heads / r.n_k_heads;
    p.n_values = (int)n_values;
    p.head_tiles = (r.d_v + TILE - 1) / TILE;
    p.tiles = form == SSD_128 ? (p.n_values + TILE - 1) / TILE : p.n_heads * p.head_tiles;
    p.norm_rows = DELTA ? p.n_heads : 1;
    p.norm_d = p.n_values / p.norm_rows;
    bool vector =
        p.norm_d % 8 == 0 && is_aligned(r.o) && is_aligned(c.z) && (uintptr_t)c.norm % 16 == 0;
    p.norm_lanes = vector ? norm_lanes(p.norm_d) : 0;
    p.norm_warps = norm_warps(p.norm_lanes);
    int most = c.most_blocks > 0 && c.most_blocks < MAX_BLOCKS ? c.most_blocks : MAX_BLOCKS;
    plan_blocks(r, !fits, qv_k_is_hopper() ? most : 1, p);
    return p.bytes <= MAX_MIXER_BYTES;
}

template <mixer_form FORM>
qv_status launch_mixer(const qv_k_steps &s, const qv_k_mixer_args &c, const mixer_plan &p,
                       cudaStream_t stream)
{
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)p.n_blocks;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)p.n_blocks, (unsigned)c.step.n_k_heads, (unsigned)s.n_seqs);
    config.blockDim = dim3((unsigned)(p.teams * TEAM));
    config.dynamicSmemBytes = (size_t)p.bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = p.n_blocks > 1 ? 1 : 0;
    (void)cudaLaunchKernelEx(&config, mixer_kernel<FORM>, s, c, p);
    return qv_k_check_launch("mixer");
}

} // namespace

bool qv_k_gdn_mixer_fits(const qv_k_mixer_args *args)
{
    mixer_plan p = {};
    mixer_form form;
    return plan_mixer<true>(*args, p, form);
}

bool qv_k_ssd_mixer_fits(const qv_k_mixer_args *args)
{
    mixer_plan p = {};
    mixer_form form;
    return plan_mixer<false>(*args, p, form);
}

qv_status qv_k_gdn_mixer(const qv_k_steps *steps, const qv_k_mixer_args *args, void *stream)
{
    mixer_plan p = {};
    mixer_form form;
    if (!plan_mixer<true>(*args, p, form))
        return qv_fail(QV_ERR_UNSUPPORTED, "gdn mixer: no kernel for %d x %d", args->step.d_k,
                       args->step.d_v);
    return form == DELTA_128 ? launch_mixer<DELTA_128>(*steps, *args, p, (cudaStream_t)stream)
                             : launch_mixer<DELTA_ANY>(*steps, *args, p, (cudaStream_t)stream);
}

qv_status qv_k_ssd_mixer(const qv_k_steps *steps, const qv_k_mixer_args *args, void *stream)
{
    mixer_plan p = {};
    mixer_form form;
    if (!plan_mixer<false>(*args, p, form))
        return qv_fail(QV_ERR_UNSUPPORTED, "ssd mixer: no kernel for %d x %d", args->step.d_k,
                       args->step.d_v);
    return form == SSD_128 ? launch_mixer<SSD_128>(*steps, *args, p, (cudaStream_t)stream)
                           : launch_mixer<SSD_ANY>(*steps, *args, p, (cudaStream_t)stream);
}
