/* Gated DeltaNet and Mamba-2 in one form. Per head a state S [d_k, d_v] of float32 and per token
 *   S = exp(g) S;  e = beta (v - S^T k) (delta rule) or dt v (SSD);  S += k e^T;  o = S^T q
 *
 * Chunks of C = 64 tokens, for sequences of more than a few: with G the running sum of g in a
 * chunk, delta rule: A_ij = beta_i (k_i . k_j) exp(G_i - G_j) for j < i,  T = (I + A)^-1 u = T
 * (beta (v - exp(G) k S))          (the UT transform; SSD: u = v) o_i = exp(G_i) q_i S + sum_j<=i
 * P_ij u_j,  P_ij = (q_i . k_j) exp(G_i - G_j) (SSD: dt_j) S   = exp(G_last) S + sum_i k_i
 * (exp(G_last - G_i) u_i)^T (SSD: dt_i) T - I, P and the gates of a chunk do not depend on S, so a
 * first kernel makes them for all chunks beside each other, and a second one walks the chunks of a
 * sequence with S in registers: a block is a head and 32 of its columns, which never meet, 128
 * blocks for one sequence of the released models.
 *
 * Precision: raw q and k are BF16 and enter the products exactly; their norms scale rows of results
 * in float32. S, and u where it goes into S, are given to the tensor cores as two BF16 numbers, so
 * they keep 16 bits; P, T and u elsewhere are BF16. T's diagonal of ones stays exact, because the
 * right hand side enters the accumulator in float32.
 *
 * Cost of a chunk and head at 128 x 128: 4 C (C + 4 d) d FLOP on the tensor cores and about C (4 d)
 * 2 bytes; bound by the latency of walking, not by either.
 */
#ifndef QV_KERNELS_RECURRENT_CUH
#define QV_KERNELS_RECURRENT_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_recurrent.h"
#include "kernels/recurrent_step.cuh"
#include "kernels/tensor_core.cuh"

#include <stddef.h>

namespace
{

constexpr int CHUNK = 64;
constexpr int MAX_KEY = 128; /* d_k of the chunked form; a smaller one is filled up with zeros */
constexpr int TILE_V = 32;   /* columns of S of one block */
/* Sequences up to this many tokens go token by token, longer ones chunk by chunk. A chunk costs
 * about as much as four passes over the state. */
constexpr int STEP_TOKENS = 4;

/* --- Any shape, token by token ------------------------------------------------------------ */

/* Block (32, 4): 32 columns of S in shared memory, rows dealt to four warps. */
template <bool DELTA>
__global__ void any_step_kernel(qv_k_steps s, qv_k_recurrent_args c, int most_tokens)
{
    extern __shared__ float any_state[]; /* [d_k][32] */
    __shared__ float q[MAX_D_K], k[MAX_D_K], sums[2][4][32];
    int lane = threadIdx.x, warp = threadIdx.y, column = blockIdx.x * 32 + lane;
    int head = blockIdx.y, seq = blockIdx.z, key_head = head / (c.n_v_heads / c.n_k_heads);
    int start = s.seq_start[seq], end = s.seq_start[seq + 1];
    if (start >= end || end - start > most_tokens)
        return;
    int64_t key_stride = DELTA ? c.d_v : 1, value_stride = DELTA ? 1 : c.d_k;
    float *state = state_of(s, c, seq, head) + column * value_stride;
    bool fresh = s.pos[start] == 0, mine = column < c.d_v;
    for (int i = warp; i < c.d_k; i += 4)
        any_state[i * 32 + lane] = mine && !fresh ? state[i * key_stride] : 0.0f;

    for (int t = start; t < end; t++) {
        __syncthreads(); /* the token before has been read */
        if (warp < 2)
            load_any_key<DELTA>(row_of(warp ? c.q : c.k, t, key_head), c.d_k,
                                warp ? rsqrtf((float)c.d_k) : 1.0f, warp ? q : k);
        gate gt = gate_of<DELTA>(c, t, head);
        float decay = expf(gt.g), v = mine ? to_float(row_of(c.v, t, head)[column]) : 0.0f;
        __syncthreads();
        float seen = 0;
        if (DELTA) {
            sums[0][warp][lane] = any_seen(any_state + lane, k, c.d_k, warp);
            __syncthreads();
            seen = decay * any_total(sums[0], lane);
        }
        float e = gt.beta * (v - seen);
        sums[1][warp][lane] = any_update(any_state + lane, q, k, c.d_k, warp, decay, e);
        __syncthreads();
        if (warp == 0 && mine) {
            float out = any_total(sums[1], lane);
            if (!DELTA)
                out += c.d_skip[head] * v;
            row_of<bf16>(c.o, t, head)[column] = __float2bfloat16(out);
        }
    }
    if (mine)
        for (int i = warp; i < c.d_k; i += 4)
            state[i * key_stride] = any_state[i * 32 + lane];
}

/* --- Places of chunks --------------------------------------------------------------------- */

/* Sequence s owns places [first_place(s), first_place(s + 1)), enough for its chunks: a numbering
 * that needs no prefix sum over the sequences. */
__device__ __forceinline__ int first_place(const qv_k_steps &s, int seq)
{
    return s.seq_start[seq] / CHUNK + seq;
}

inline int64_t n_places(int64_t n_tokens, int64_t n_seqs)
{
    return n_tokens / CHUNK + n_seqs;
}

/* What the first kernel leaves for a chunk and head. */
template <bool DELTA> struct chunk_record {
    bf16 p[CHUNK * CHUNK];
    bf16 l[DELTA ? CHUNK * CHUNK : 8]; /* T - I */
    float g[CHUNK], beta[CHUNK], k_scale[CHUNK], q_scale[CHUNK];
};

/* --- First kernel: what does not depend on the state -------------------------------------- */

/* Heads of a block, which share the products of their keys. The delta rule's take so long to invert
 * that blocks of one head are faster (434 against 461 us for 8192 tokens of 32 heads). */
template <bool DELTA> constexpr int PREPARE_HEADS = DELTA ? 1 : 4;
constexpr int PITCH = CHUNK + 4; /* of float32 matrices in shared memory */

/* Rows [start, start + n) of keys as a tile [64][128], zeros around. */
__device__ __forceinline__ void load_keys(bf16 *tile, const qv_k_heads &keys, int64_t start, int n,
                                          int head, int d_k, int thread, int n_threads)
{
    for (int i = thread; i < CHUNK * (MAX_KEY / 8); i += n_threads) {
        int row = i / (MAX_KEY / 8), col = i % (MAX_KEY / 8) * 8;
        bool valid = row < n && col < d_k;
        copy16(tile + tile_at<MAX_KEY>(row, col),
               valid ? row_of(keys, start + row, head) + col : (const bf16 *)keys.data, valid);
    }
}

/* out [N, N] = a [N, N] b [N, N] times `sign`, all float32 in shared memory with pitch PITCH, by
 * `n_warps` warps: on the tensor cores, each number as two of BF16, of which the product of both
 * low halves is left out: up to 2^-16. */
template <int N>
__device__ __forceinline__ void small_product(const float *a, const float *b, float *out,
                                              float sign, int warp, int n_warps)
{
    int lane = threadIdx.x & 31, group = lane >> 2, pair = (lane & 3) * 2;
    for (int tile = warp; tile < N / 16 * (N / 8); tile += n_warps) {
        int row = tile / (N / 8) * 16 + group, col = tile % (N / 8) * 8;
        float acc[4] = {};
#pragma unroll
        for (int k = 0; k < N; k += 16) {
            uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 x = *(const float2 *)(a + (row + i % 2 * 8) * PITCH + k + pair + i / 2 * 8);
                split_bf16(x.x, x.y, a_high[i], a_low[i]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float *x = b + (k + pair + i * 8) * PITCH + col + group;
                split_bf16(x[0], x[PITCH], b_high[i], b_low[i]);
            }
            mma(acc, a_high, b_low[0], b_low[1]);
            mma(acc, a_low, b_high[0], b_high[1]);
            mma(acc, a_high, b_high[0], b_high[1]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            *(float2 *)(out + (row + i * 8) * PITCH + col + pair) =
                make_float2(sign * acc[2 * i], sign * acc[2 * i + 1]);
    }
}

/* t = (I + a)^-1 for a strictly lower triangular [64, 64]: the four diagonal blocks of 16 by
 * substitution, a column per lane, then [T11 0; -T22 A21 T11, T22] twice. 128 threads. */
__device__ __forceinline__ void invert(const float *a, float *t, float *spare)
{
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    if (lane < 16) {
        const float *block = a + warp * 16 * (PITCH + 1);
        float *out = t + warp * 16 * (PITCH + 1), x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float sum = i == lane ? 1.0f : 0.0f;
#pragma unroll
            for (int j = 0; j < i; j++)
                sum = fmaf(-block[i * PITCH + j], x[j], sum);
            x[i] = sum;
            out[i * PITCH + lane] = sum;
        }
    }
    __syncthreads();
    /* Pairs of blocks: two warps each. */
    int pair = warp >> 1, in_pair = thread & 63, corner = pair * 32 * (PITCH + 1);
    small_product<16>(a + corner + 16 * PITCH, t + corner, spare + pair * 16 * PITCH, 1, warp & 1,
                      2);
    __syncthreads();
    small_product<16>(t + corner + 16 * (PITCH + 1), spare + pair * 16 * PITCH,
                      t + corner + 16 * PITCH, -1, warp & 1, 2);
    /* Above the diagonal, within the halves: the next products read whole blocks. */
    for (int i = in_pair; i < 256; i += 64)
        t[corner + i / 16 * PITCH + 16 + i % 16] = 0;
    __syncthreads();
    small_product<32>(a + 32 * PITCH, t, spare, 1, warp, 4);
    __syncthreads();
    small_product<32>(t + 32 * (PITCH + 1), spare, t + 32 * PITCH, -1, warp, 4);
    __syncthreads();
}

/* Sums of squares of a tile's rows, scaled into what the row is multiplied with. */
__device__ __forceinline__ float row_scale(const bf16 *tile, int row)
{
    float sum = 0;
    for (int col = 0; col < MAX_KEY; col += 8) {
        uint4 v = *(const uint4 *)(tile + tile_at<MAX_KEY>(row, col));
        const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum += bf16_low(w[i]) * bf16_low(w[i]) + bf16_high(w[i]) * bf16_high(w[i]);
    }
    return rsqrtf(sum + 1e-6f);
}

template <bool DELTA> struct prepare_shared {
    union {
        struct {
            bf16 k[CHUNK * MAX_KEY], q[CHUNK * MAX_KEY];
        };
        struct {
            float a[CHUNK * PITCH], t[CHUNK * PITCH];
        };
    };
    float spare[32 * PITCH];
    float g[PREPARE_HEADS<DELTA>][CHUNK], beta[PREPARE_HEADS<DELTA>][CHUNK], k_scale[CHUNK],
        q_scale[CHUNK];
};

/* P and T - I of one head from the products of its keys, which lie in accumulators of rows 16
 * warp... The gates are in m. */
template <bool DELTA>
__device__ __forceinline__ void finish_head(prepare_shared<DELTA> &m, int head,
                                            const float (&kk)[8][4], const float (&qk)[8][4],
                                            int warp, chunk_record<DELTA> &record)
{
    const float *g = m.g[head], *beta = m.beta[head];
    int thread = threadIdx.x, lane = thread & 31;
    if (thread < CHUNK) {
        record.g[thread] = g[thread];
        record.beta[thread] = beta[thread];
        record.k_scale[thread] = m.k_scale[thread];
        record.q_scale[thread] = m.q_scale[thread];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp * 16 + (lane >> 2) + 8 * half, col = j * 8 + (lane & 3) * 2;
            float p[2] = {0, 0}, a[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int key = col + i;
                if (key > row)
                    continue; /* exp might be infinite */
                float decay = expf(g[row] - g[key]) * m.k_scale[key];
                p[i] = qk[j][2 * half + i] * decay * m.q_scale[row];
                if (!DELTA)
                    p[i] *= beta[key];
                if (DELTA && key < row)
                    a[i] = kk[j][2 * half + i] * decay * m.k_scale[row] * beta[row];
            }
            *(uint32_t *)(record.p + row * CHUNK + col) = pack_bf16(p[0], p[1]);
            if (DELTA)
                *(float2 *)(m.a + row * PITCH + col) = make_float2(a[0], a[1]);
        }
    }
    if (DELTA) {
        __syncthreads();
        invert(m.a, m.t, m.spare);
        for (int i = thread; i < CHUNK * CHUNK / 8; i += 128) {
            int row = i / 8, col = i % 8 * 8;
            uint32_t out[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int key = col + 2 * j;
                const float *t = m.t + row * PITCH + key;
                out[j] = pack_bf16(key < row ? t[0] : 0.0f, key + 1 < row ? t[1] : 0.0f);
            }
            *(uint4 *)(record.l + row * CHUNK + col) = make_uint4(out[0], out[1], out[2], out[3]);
        }
        __syncthreads(); /* before the next head writes a and t */
    }
}

/* The gates of a chunk, g summed up, of n tokens: a warp a head, two tokens a lane. */
template <bool DELTA>
__device__ __forceinline__ void store_gates(prepare_shared<DELTA> &m, const qv_k_recurrent_args &c,
                                            const gate_inputs (&in)[2], int n)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    gate gt[2] = {};
    float sum[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half * 32 + lane < n)
            gt[half] = gate_from<DELTA>(c, in[half]);
        sum[half] = gt[half].g;
#pragma unroll
        for (int i = 1; i < 32; i <<= 1) {
            float before = __shfl_up_sync(0xffffffffu, sum[half], i);
            sum[half] += lane >= i ? before : 0.0f;
        }
    }
    sum[1] += __shfl_sync(0xffffffffu, sum[0], 31);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        m.g[warp][half * 32 + lane] = sum[half];
        m.beta[warp][half * 32 + lane] = gt[half].beta;
    }
}

/* Grid (places, key heads x parts of their heads), 128 threads. */
template <bool DELTA>
__global__ void __launch_bounds__(128, DELTA ? 5 : 4)
    prepare_kernel(qv_k_steps s, qv_k_recurrent_args c, int place_0, int most_tokens,
                   chunk_record<DELTA> *records)
{
    extern __shared__ __align__(16) char prepare_memory[];
    prepare_shared<DELTA> &m = *(prepare_shared<DELTA> *)prepare_memory;
    /* Which rows a warp has: the last take the longest, so not on the same scheduler in all blocks
     * of a multiprocessor. */
    int block = (int)(blockIdx.y * gridDim.x + blockIdx.x);
    int thread = threadIdx.x, warp = ((thread >> 5) + (block >> 2)) & 3;
    int place = place_0 + blockIdx.x, low = 0, high = s.n_seqs;
    while (high - low > 1) {
        int middle = (low + high) >> 1;
        if (first_place(s, middle) <= place)
            low = middle;
        else
            high = middle;
    }
    int seq_tokens = s.seq_start[low + 1] - s.seq_start[low];
    int done = (place - first_place(s, low)) * CHUNK, n = min(CHUNK, seq_tokens - done);
    if (n <= 0 || seq_tokens <= most_tokens)
        return;
    int64_t start = s.seq_start[low] + done;
    int per_key = c.n_v_heads / c.n_k_heads,
        parts = (per_key + PREPARE_HEADS<DELTA> - 1) / PREPARE_HEADS<DELTA>;
    int key_head = blockIdx.y / parts, first = blockIdx.y % parts * PREPARE_HEADS<DELTA>;
    int n_heads = DELTA ? 1 : min(PREPARE_HEADS<DELTA>, per_key - first);

    /* Load: what the gates are made of comes first, because a single warp needs it. */
    int lane = thread & 31, gate_head = thread >> 5;
    gate_inputs gates[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++)
        if (gate_head < n_heads && half * 32 + lane < n)
            gates[half] = gate_inputs_of<DELTA>(c, start + half * 32 + lane,
                                                key_head * per_key + first + gate_head);
    load_keys(m.k, c.k, start, n, key_head, c.d_k, thread, 128);
    load_keys(m.q, c.q, start, n, key_head, c.d_k, thread, 128);
    copies_commit();
    if (gate_head < n_heads)
        store_gates<DELTA>(m, c, gates, n);
    copies_wait<0>();
    __syncthreads();
    if (DELTA) {
        float scale = row_scale(thread < CHUNK ? m.k : m.q, thread & 63);
        if (thread < CHUNK)
            m.k_scale[thread] = scale;
        else
            m.q_scale[thread - CHUNK] = scale * rsqrtf((float)c.d_k);
    } else if (thread < CHUNK) {
        m.k_scale[thread] = m.q_scale[thread] = 1;
    }

    /* Compute: columns up to the diagonal */
    float kk[8][4] = {}, qk[8][4] = {};
#pragma unroll
    for (int step = 0; step < MAX_KEY / 16; step++) {
        uint32_t ak[4], aq[4], b[4];
        if (DELTA)
            load_a<MAX_KEY>(ak, m.k, warp * 16, step * 16);
        load_a<MAX_KEY>(aq, m.q, warp * 16, step * 16);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j > warp)
                break;
            load_b<MAX_KEY>(b, m.k, j * 16, step * 16);
            if (DELTA) {
                mma(kk[2 * j], ak, b[0], b[1]);
                mma(kk[2 * j + 1], ak, b[2], b[3]);
            }
            mma(qk[2 * j], aq, b[0], b[1]);
            mma(qk[2 * j + 1], aq, b[2], b[3]);
        }
    }

    /* Store, head by head; a and t take the place of k and q. */
    __syncthreads();
    for (int i = 0; i < n_heads; i++)
        finish_head(m, i, kk, qk, warp,
                    records[(int64_t)blockIdx.x * c.n_v_heads + key_head * per_key + first + i]);
}

/* --- Second kernel: walk the chunks ------------------------------------------------------- */

template <bool DELTA> struct scan_stage {
    bf16 k[CHUNK * MAX_KEY], q[CHUNK * MAX_KEY];
    bf16 p[CHUNK * CHUNK], l[DELTA ? CHUNK * CHUNK : 8];
    bf16 v[CHUNK * TILE_V];
    float gates[4][CHUNK]; /* g, beta, k_scale, q_scale */
};

template <bool DELTA> struct scan_shared {
    scan_stage<DELTA> stage[2];
    bf16 s_high[MAX_KEY * TILE_V], s_low[MAX_KEY * TILE_V]; /* S [k][v] */
    bf16 rhs[CHUNK * TILE_V];                               /* what T is multiplied with */
    bf16 u[CHUNK * TILE_V], in_high[CHUNK * TILE_V], in_low[CHUNK * TILE_V];
};

/* What a thread copies of each chunk: its pieces of 16 bytes lie at fixed distances. */
template <bool DELTA> struct scan_copies {
    const bf16 *k, *q, *v, *record;
    int64_t k_step, q_step; /* 16 tokens */
    int64_t record_step;    /* elements to the record of the next chunk */
    int key_row, v_row;     /* the first piece's token */
    bool key_valid, v_valid;
    int key_at, v_at, square_at; /* offsets in tiles */
};

template <bool DELTA>
__device__ __forceinline__ scan_copies<DELTA> begin_copies(const qv_k_recurrent_args &c,
                                                           const chunk_record<DELTA> *record,
                                                           int64_t start, int head, int column)
{
    scan_copies<DELTA> out;
    int thread = threadIdx.x, key_head = head / (c.n_v_heads / c.n_k_heads);
    int key_col = thread % 16 * 8, v_col = thread % 4 * 8, square_col = thread % 8 * 8;
    out.key_row = thread / 16;
    out.v_row = thread / 4;
    out.key_valid = key_col < c.d_k;
    out.v_valid = column + v_col < c.d_v;
    out.key_at = tile_at<MAX_KEY>(out.key_row, key_col);
    out.v_at = tile_at<TILE_V>(out.v_row, v_col);
    out.square_at = tile_at<CHUNK>(thread / 8, square_col);
    out.k = row_of(c.k, start + out.key_row, key_head) + key_col;
    out.q = row_of(c.q, start + out.key_row, key_head) + key_col;
    out.v = row_of(c.v, start + out.v_row, head) + column + v_col;
    out.record = (const bf16 *)record + thread / 8 * CHUNK + square_col;
    out.k_step = 16 * c.k.token;
    out.q_step = 16 * c.q.token;
    out.record_step = (int64_t)c.n_v_heads * (int64_t)(sizeof *record / sizeof(bf16));
    return out;
}

/* The next chunk, of n tokens. */
template <bool DELTA>
__device__ __forceinline__ void load_stage(scan_stage<DELTA> &m, scan_copies<DELTA> &f,
                                           const qv_k_recurrent_args &c, int n)
{
    int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        bool valid = f.key_valid && f.key_row + 16 * i < n;
        copy16(m.k + f.key_at + i * 16 * MAX_KEY, valid ? f.k : f.record, valid);
        copy16(m.q + f.key_at + i * 16 * MAX_KEY, valid ? f.q : f.record, valid);
        f.k += f.k_step;
        f.q += f.q_step;
    }
    bool valid = f.v_valid && f.v_row < n;
    copy16(m.v + f.v_at, valid ? f.v : f.record, valid);
    f.v += CHUNK * c.v.token;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        copy16(m.p + f.square_at + i * 32 * CHUNK, f.record + i * 32 * CHUNK, true);
        if (DELTA)
            copy16(m.l + f.square_at + i * 32 * CHUNK,
                   f.record + offsetof(chunk_record<DELTA>, l) / 2 + i * 32 * CHUNK, true);
    }
    if (thread < CHUNK) {
        const bf16 *record = f.record - (thread / 8 * CHUNK + thread % 8 * 8);
        copy16((char *)m.gates + thread * 16,
               record + offsetof(chunk_record<DELTA>, g) / 2 + thread * 8, true);
    }
    f.record += f.record_step;
    copies_commit();
}

/* Barrier of the 128 threads that share columns. */
__device__ __forceinline__ void half_barrier(int half)
{
    named_barrier<128>(half + 1);
}

/* acc [16 x 16] += row block `block` of a lower triangular [64, 64] times columns [col, col + 16)
 * of b [64, 32]. */
__device__ __forceinline__ void times_chunk(float (&acc)[2][4], const bf16 *triangle, int block,
                                            const bf16 *b_tile, int col)
{
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) {
        if (step > block)
            break;
        uint32_t a[4], b[4];
        load_a<CHUNK>(a, triangle, block * 16, step * 16);
        load_b_trans<TILE_V>(b, b_tile, col, step * 16);
        mma(acc[0], a, b[0], b[1]);
        mma(acc[1], a, b[2], b[3]);
    }
}

/* Grid (tiles of columns, heads, sequences), 256 threads. Two halves of four warps have 16 columns
 * each and meet only where the next chunk's inputs arrive. In a half, warp w keeps keys 32 w.. of S
 * in accumulators, and makes rows 16 w.. of the chunk. */
template <bool DELTA>
__global__ void __launch_bounds__(256, 1)
    scan_kernel(qv_k_steps s, qv_k_recurrent_args c, int place_0, int places, int most_tokens,
                const chunk_record<DELTA> *records)
{
    extern __shared__ __align__(16) char scan_memory[];
    scan_shared<DELTA> &m = *(scan_shared<DELTA> *)scan_memory;
    int lane = threadIdx.x & 31, half = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3;
    int column = blockIdx.x * TILE_V, head = blockIdx.y, seq = blockIdx.z, col_0 = half * 16;
    int64_t first = s.seq_start[seq];
    int seq_tokens = s.seq_start[seq + 1] - (int)first, n_chunks = (seq_tokens + CHUNK - 1) / CHUNK;
    int base = first_place(s, seq);
    int begin = max(place_0 - base, 0), end = min(place_0 + places - base, n_chunks);
    if (seq_tokens <= most_tokens || begin >= end)
        return;

    scan_copies<DELTA> copies =
        begin_copies<DELTA>(c, records + (int64_t)(base + begin - place_0) * c.n_v_heads + head,
                            first + begin * CHUNK, head, column);
    load_stage(m.stage[0], copies, c, seq_tokens - begin * CHUNK);

    /* The state: acc[i][j] is keys 32 warp + 16 i.., columns col_0 + 8 j.. */
    int64_t key_stride = DELTA ? c.d_v : 1, value_stride = DELTA ? 1 : c.d_k;
    float *state = state_of(s, c, seq, head), acc[2][2][4];
    bool fresh = begin == 0 && s.pos[first] == 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = warp * 32 + i * 16 + (lane >> 2) + (e >> 1) * 8;
                int value = column + col_0 + j * 8 + (lane & 3) * 2 + (e & 1);
                acc[i][j][e] = !fresh && key < c.d_k && value < c.d_v
                                   ? state[key * key_stride + value * value_stride]
                                   : 0.0f;
            }
    float d_skip = DELTA ? 0.0f : c.d_skip[head];
    int row = warp * 16 + (lane >> 2); /* and row + 8 */
    bf16 *o =
        row_of<bf16>(c.o, first + begin * CHUNK + row, head) + column + col_0 + (lane & 3) * 2;
    bool o_valid[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
        o_valid[j] = column + col_0 + j * 8 + (lane & 3) * 2 < c.d_v;

    for (int chunk = begin; chunk < end; chunk++) {
        scan_stage<DELTA> &in = m.stage[(chunk - begin) & 1];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int key = warp * 32 + i * 16 + (lane >> 2) + e * 8;
                    int at = tile_at<TILE_V>(key, col_0 + j * 8 + (lane & 3) * 2);
                    uint32_t high, low;
                    split_bf16(acc[i][j][2 * e], acc[i][j][2 * e + 1], high, low);
                    *(uint32_t *)(m.s_high + at) = high;
                    *(uint32_t *)(m.s_low + at) = low;
                }
        copies_wait<0>();
        __syncthreads(); /* S and this chunk's inputs are there; the other stage has been read */
        if (chunk + 1 < end)
            load_stage(m.stage[(chunk + 1 - begin) & 1], copies, c,
                       seq_tokens - (chunk + 1) * CHUNK);

        /* k S and q S; the parts with the high and the low half of S do not wait for each other */
        float seen[2][2][4] = {}, out[2][2][4] = {}; /* [high, low][columns] */
#pragma unroll
        for (int step = 0; step < MAX_KEY / 16; step++) {
            uint32_t k[4], q[4], high[4], low[4];
            if (DELTA)
                load_a<MAX_KEY>(k, in.k, warp * 16, step * 16);
            load_a<MAX_KEY>(q, in.q, warp * 16, step * 16);
            load_b_trans<TILE_V>(high, m.s_high, col_0, step * 16);
            load_b_trans<TILE_V>(low, m.s_low, col_0, step * 16);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (DELTA) {
                    mma(seen[0][j], k, high[2 * j], high[2 * j + 1]);
                    mma(seen[1][j], k, low[2 * j], low[2 * j + 1]);
                }
                mma(out[0][j], q, high[2 * j], high[2 * j + 1]);
                mma(out[1][j], q, low[2 * j], low[2 * j + 1]);
            }
        }

        /* u, and what goes into S */
        const float *g = in.gates[0], *beta = in.gates[1], *k_scale = in.gates[2],
                    *q_scale = in.gates[3];
        float last = g[CHUNK - 1], u[2][4], faded[2];
        uint32_t v[2][2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int r = row + 8 * e;
            float grown = expf(g[r]);
            faded[e] = grown * q_scale[r];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int at = tile_at<TILE_V>(r, col_0 + j * 8 + (lane & 3) * 2);
                v[j][e] = *(const uint32_t *)(in.v + at);
                float *x = u[j] + 2 * e;
                x[0] = bf16_low(v[j][e]);
                x[1] = bf16_high(v[j][e]);
                if (DELTA) {
                    float scale = grown * k_scale[r];
                    x[0] = beta[r] * (x[0] - scale * (seen[0][j][2 * e] + seen[1][j][2 * e]));
                    x[1] =
                        beta[r] * (x[1] - scale * (seen[0][j][2 * e + 1] + seen[1][j][2 * e + 1]));
                    *(uint32_t *)(m.rhs + at) = pack_bf16(x[0], x[1]);
                }
            }
        }
        if (DELTA) {
            half_barrier(half); /* rhs */
            times_chunk(u, in.l, warp, m.rhs, col_0);
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int r = row + 8 * e;
            float fade = expf(last - g[r]) * (DELTA ? k_scale[r] : beta[r]);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int at = tile_at<TILE_V>(r, col_0 + j * 8 + (lane & 3) * 2);
                uint32_t high, low;
                if (DELTA)
                    *(uint32_t *)(m.u + at) = pack_bf16(u[j][2 * e], u[j][2 * e + 1]);
                split_bf16(u[j][2 * e] * fade, u[j][2 * e + 1] * fade, high, low);
                *(uint32_t *)(m.in_high + at) = high;
                *(uint32_t *)(m.in_low + at) = low;
            }
        }
        half_barrier(half); /* u, in_high and in_low; S has been read */

        /* The output */
        float sum[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[j][e] = faded[e >> 1] * (out[0][j][e] + out[1][j][e]);
        times_chunk(sum, in.p, warp, DELTA ? m.u : in.v, col_0);
        int n = seq_tokens - chunk * CHUNK;
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float low = sum[j][2 * e], high = sum[j][2 * e + 1];
                if (!DELTA) {
                    low += d_skip * bf16_low(v[j][e]);
                    high += d_skip * bf16_high(v[j][e]);
                }
                if (o_valid[j] && row + 8 * e < n)
                    *(uint32_t *)(o + 8 * e * c.o.token + 8 * j) = pack_bf16(low, high);
            }
        o += CHUNK * c.o.token;

        /* The state */
        float fade = expf(last), more[2][2][4] = {}; /* by in_low */
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][j][e] *= fade;
#pragma unroll
        for (int step = 0; step < CHUNK / 16; step++) {
            uint32_t k[2][4], high[4], low[4];
            load_b_trans<TILE_V>(high, m.in_high, col_0, step * 16);
            load_b_trans<TILE_V>(low, m.in_low, col_0, step * 16);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                load_a_trans<MAX_KEY>(k[i], in.k, warp * 32 + i * 16, step * 16);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    mma(acc[i][j], k[i], high[2 * j], high[2 * j + 1]);
                    mma(more[i][j], k[i], low[2 * j], low[2 * j + 1]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][j][e] += more[i][j][e];
    }

#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = warp * 32 + i * 16 + (lane >> 2) + (e >> 1) * 8;
                int value = column + col_0 + j * 8 + (lane & 3) * 2 + (e & 1);
                if (key < c.d_k && value < c.d_v)
                    state[key * key_stride + value * value_stride] = acc[i][j][e];
            }
}

} // namespace

#include "kernels/recurrent_hopper.cuh"

namespace
{

/* --- Launch ------------------------------------------------------------------------------- */

inline bool is_aligned(const qv_k_heads &v)
{
    return (uintptr_t)v.data % 16 == 0 && v.token % 8 == 0 && v.head % 8 == 0;
}

/* The rows of one head's keys or queries of all tokens; see walk_maps. */
inline qv_status map_keys(const char *name, const qv_k_heads &keys, const qv_k_steps &s,
                          const qv_k_recurrent_args &c, int rows, CUtensorMap *map)
{
    const cuuint64_t sizes[3] = {(cuuint64_t)c.d_k, (cuuint64_t)c.n_k_heads,
                                 (cuuint64_t)s.n_tokens};
    const cuuint64_t strides[2] = {(cuuint64_t)keys.head * sizeof(bf16),
                                   (cuuint64_t)keys.token * sizeof(bf16)};
    const cuuint32_t box[3] = {64, 1, (cuuint32_t)rows};
    return qv_k_tensor_map(name, keys.data, sizes, strides, box, map);
}

inline qv_status map_squares(const char *name, const void *first, int64_t n, size_t apart, int rows,
                             CUtensorMap *map)
{
    const cuuint64_t sizes[3] = {CHUNK, CHUNK, (cuuint64_t)n};
    const cuuint64_t strides[2] = {CHUNK * sizeof(bf16), apart};
    const cuuint32_t box[3] = {64, (cuuint32_t)rows, 1};
    return qv_k_tensor_map(name, first, sizes, strides, box, map);
}

template <bool DELTA>
qv_status launch_walk(const char *name, const qv_k_steps &s, const qv_k_recurrent_args &c,
                      dim3 grid, int place, int n, int most_tokens,
                      const chunk_record<DELTA> *records, cudaStream_t stream)
{
    int shares = grid.x % 2 == 0 ? 2 : 1, rows = CHUNK / shares;
    int64_t n_records = (int64_t)n * c.n_v_heads;
    walk_maps maps;
    QV_TRY(map_keys(name, c.k, s, c, rows, &maps.k));
    QV_TRY(map_keys(name, c.q, s, c, rows, &maps.q));
    QV_TRY(map_squares(name, records->p, n_records, sizeof *records, rows, &maps.p));
    QV_TRY(map_squares(name, DELTA ? records->l : records->p, n_records, sizeof *records, rows,
                       &maps.l));
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)shares;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(WALK_THREADS);
    config.dynamicSmemBytes = sizeof(walk_shared<DELTA>) + 1024;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaError_t error = cudaLaunchKernelEx(&config, walk_kernel<DELTA>, s, c, place, n, most_tokens,
                                           shares, maps, records);
    return error == cudaSuccess
               ? QV_OK
               : qv_fail(QV_ERR_DEVICE, "cuda: %s: %s", name, cudaGetErrorString(error));
}

/* Chunks of at most what the scratch holds at a time. */
template <bool DELTA>
qv_status launch_chunks(const char *name, const qv_k_steps &s, const qv_k_recurrent_args &c,
                        int most_tokens, void *scratch, size_t scratch_bytes, cudaStream_t stream)
{
    typedef chunk_record<DELTA> record;
    int64_t all = n_places(s.n_tokens, s.n_seqs);
    int64_t fit = (int64_t)(scratch_bytes / (sizeof(record) * (size_t)c.n_v_heads));
    if (fit < 1)
        return qv_fail(QV_ERR_LIMIT, "%s: %zu bytes of scratch, but %d heads need %zu", name,
                       scratch_bytes, c.n_v_heads, sizeof(record) * (size_t)c.n_v_heads);
    const int prepare_bytes = (int)sizeof(prepare_shared<DELTA>);
    const int scan_bytes = (int)sizeof(scan_shared<DELTA>);
    const int walk_bytes = (int)sizeof(walk_shared<DELTA>) + 1024;
    const bool hopper = qv_k_is_hopper();
    if (cudaFuncSetAttribute(prepare_kernel<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             prepare_bytes) != cudaSuccess ||
        cudaFuncSetAttribute(scan_kernel<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             scan_bytes) != cudaSuccess ||
        cudaFuncSetAttribute(walk_kernel<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             walk_bytes) != cudaSuccess)
        return qv_k_check_launch(name);
    int parts = (c.n_v_heads / c.n_k_heads + PREPARE_HEADS<DELTA> - 1) / PREPARE_HEADS<DELTA>;
    int64_t pieces = (all + fit - 1) / fit;
    fit = (all + pieces - 1) / pieces; /* of one size */
    for (int64_t place = 0; place < all; place += fit) {
        int n = (int)(all - place < fit ? all - place : fit);
        prepare_kernel<DELTA>
            <<<dim3((unsigned)n, (unsigned)(c.n_k_heads * parts)), 128, prepare_bytes, stream>>>(
                s, c, (int)place, most_tokens, (record *)scratch);
        dim3 grid((unsigned)((c.d_v + TILE_V - 1) / TILE_V), (unsigned)c.n_v_heads,
                  (unsigned)s.n_seqs);
        if (hopper)
            QV_TRY(launch_walk<DELTA>(name, s, c, grid, (int)place, n, most_tokens,
                                      (const record *)scratch, stream));
        else
            scan_kernel<DELTA><<<grid, 256, scan_bytes, stream>>>(s, c, (int)place, n, most_tokens,
                                                                  (const record *)scratch);
    }
    return qv_k_check_launch(name);
}

/* Whether some sequence may be long enough for chunks. */
inline bool has_chunks(const qv_k_steps &s)
{
    int32_t most = s.max_seq_tokens > 0 ? s.max_seq_tokens : s.n_tokens;
    return !s.one_form && s.n_tokens > s.n_seqs && s.n_tokens > STEP_TOKENS && most > STEP_TOKENS;
}

/* Whether shapes and strides allow copies of 16 bytes. */
inline bool fits_chunks(const qv_k_recurrent_args &c)
{
    return c.d_k <= MAX_KEY && c.d_k % 8 == 0 && c.d_v % 8 == 0 && is_aligned(c.q) &&
           is_aligned(c.k) && is_aligned(c.v) && is_aligned(c.o);
}

template <bool DELTA>
qv_status launch_any(const char *name, const qv_k_steps &s, const qv_k_recurrent_args &c,
                     int most_tokens, cudaStream_t stream)
{
    if (c.d_k > MAX_D_K)
        return qv_fail(QV_ERR_LIMIT, "%s: keys of %d, but %d is possible", name, c.d_k, MAX_D_K);
    dim3 grid((unsigned)((c.d_v + 31) / 32), (unsigned)c.n_v_heads, (unsigned)s.n_seqs);
    any_step_kernel<DELTA>
        <<<grid, dim3(32, 4), (size_t)c.d_k * 32 * sizeof(float), stream>>>(s, c, most_tokens);
    return qv_k_check_launch(name);
}

} // namespace

#endif
