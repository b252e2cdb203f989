/* The walk over chunks of recurrent.cuh on Hopper: the same arithmetic with wgmma, in three
 * warpgroups. One fetches chunks ahead. One walks: it keeps S in registers, gives it to the others
 * as two BF16 numbers and makes u and the next S. One makes the outputs, a little behind it.
 *
 * Per chunk the walk is five steps that wait for each other: S to shared memory, k S, T times the
 * right hand side, the new rows of S, S. What is not among them does not count for the time.
 */
#ifndef QV_KERNELS_RECURRENT_HOPPER_CUH
#define QV_KERNELS_RECURRENT_HOPPER_CUH

#include "kernels/wgmma_shapes.cuh"

namespace
{

constexpr int WALK_STAGES = 3;
constexpr int WALK_THREADS = 3 * 128;
constexpr int PANEL = CHUNK * 64; /* elements of a tile [64][64] */

/* Tiles as wgmma reads them: [token][64 keys] twice, [token][token]. */
template <bool DELTA> struct walk_stage {
    bf16 k[2 * PANEL], q[2 * PANEL], p[PANEL], l[DELTA ? PANEL : 512];
    bf16 v[CHUNK * TILE_V]; /* [token][column] */
    float gates[4][CHUNK];  /* g, beta, k_scale, q_scale */
};

template <bool DELTA> struct walk_shared {
    walk_stage<DELTA> stage[WALK_STAGES];
    bf16 s[2][2 * PANEL]; /* of every second chunk: [high halves of columns, low halves][key] */
    bf16 in[PANEL];       /* what goes into S: [high halves, low halves][token] */
    bf16 u[2][PANEL / 2]; /* [column][token] */
    bf16 rhs[PANEL / 2];  /* [column][token] */
    uint64_t full[WALK_STAGES], empty[WALK_STAGES], s_ready[2], u_ready[2], done[2];
};

/* Fragments d[4 j ..] of [64 tokens or keys x 32 columns] into rows of a tile [column][64], as
 * BF16, or as the high halves and below them the low halves. */
[[maybe_unused]] __device__ __forceinline__ void put_columns(bf16 *tile, const float *d,
                                                             bool halves)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
#pragma unroll
    for (int j = 0; j < TILE_V / 8; j += 2) {
        bf16 *to = tile + tile_at<64>(j * 8 + (lane >> 4) * 8 + (lane & 7),
                                      warp * 16 + ((lane >> 3) & 1) * 8);
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            split_bf16(d[4 * j + 2 * i], d[4 * j + 2 * i + 1], high[i], low[i]);
        stmatrix4_trans(to, high[0], high[1], high[2], high[3]);
        if (halves)
            stmatrix4_trans(to + TILE_V * 64, low[0], low[1], low[2], low[3]);
    }
}

/* d [64 x 64] += a [64 x 128] b [128 x 64], both in two panels. */
[[maybe_unused]] __device__ __forceinline__ void times_state(float (&d)[32], const bf16 *a,
                                                             const bf16 *b)
{
#pragma unroll
    for (int panel = 0; panel < 2; panel++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma<64>(d, wgmma_tile(a + panel * PANEL) + 2 * k,
                      wgmma_tile(b + panel * PANEL) + 2 * k);
}

/* d [64 x 32] += a [64 x 64] b [64 x 32] */
[[maybe_unused]] __device__ __forceinline__ void times_columns(float (&d)[16], const bf16 *a,
                                                               const bf16 *b)
{
#pragma unroll
    for (int k = 0; k < 4; k++)
        wgmma<32>(d, wgmma_tile(a) + 2 * k, wgmma_tile(b) + 2 * k);
}

[[maybe_unused]] __device__ __forceinline__ void group_barrier()
{
    named_barrier<128>(1);
}

/* What all three have in common. */
struct walk {
    int64_t first; /* token of the sequence */
    int n_tokens, begin, end, head, column;
};

template <bool DELTA>
__device__ void walk_fetch(const qv_k_recurrent_args &c, walk_shared<DELTA> &m, const walk &w,
                           const chunk_record<DELTA> *record)
{
    int thread = threadIdx.x & 127, key_head = w.head / (c.n_v_heads / c.n_k_heads);
    int key_row = thread / 16, key_col = thread % 16 * 8, v_row = thread / 4,
        v_col = thread % 4 * 8;
    bool key_valid = key_col < c.d_k, v_valid = w.column + v_col < c.d_v;
    int key_at = key_col / 64 * PANEL + tile_at<64>(key_row, key_col % 64);
    int v_at = tile_at<TILE_V>(v_row, v_col), square = thread / 8 * CHUNK + thread % 8 * 8;
    int square_at = tile_at<64>(thread / 8, thread % 8 * 8);
    int64_t start = w.first + (int64_t)w.begin * CHUNK;
    const bf16 *k = row_of(c.k, start + key_row, key_head) + key_col;
    const bf16 *q = row_of(c.q, start + key_row, key_head) + key_col;
    const bf16 *v = row_of(c.v, start + v_row, w.head) + w.column + v_col;
    for (int i = 0; i < w.end - w.begin; i++) {
        int at = i % WALK_STAGES, n = w.n_tokens - (w.begin + i) * CHUNK;
        walk_stage<DELTA> &to = m.stage[at];
        if (i >= WALK_STAGES)
            barrier_wait(&m.empty[at], (i / WALK_STAGES - 1) & 1);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            bool valid = key_valid && key_row + 8 * j < n;
            copy16(to.k + key_at + j * 8 * 64, valid ? k + 8 * j * c.k.token : record->p, valid);
            copy16(to.q + key_at + j * 8 * 64, valid ? q + 8 * j * c.q.token : record->p, valid);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            bool valid = v_valid && v_row + 32 * j < n;
            copy16(to.v + v_at + j * 32 * TILE_V, valid ? v + 32 * j * c.v.token : record->p,
                   valid);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            copy16(to.p + square_at + j * 16 * 64, record->p + square + j * 16 * CHUNK, true);
            if (DELTA)
                copy16(to.l + square_at + j * 16 * 64, record->l + square + j * 16 * CHUNK, true);
        }
        if (thread < CHUNK)
            copy16((char *)to.gates + thread * 16, (const char *)record->g + thread * 16, true);
        barrier_arrive_copies(&m.full[at]);
        k += CHUNK * c.k.token;
        q += CHUNK * c.q.token;
        v += CHUNK * c.v.token;
        record += c.n_v_heads;
    }
}

template <bool DELTA>
__device__ void walk_state(const qv_k_steps &s, const qv_k_recurrent_args &c, walk_shared<DELTA> &m,
                           const walk &w, float *state)
{
    int lane = threadIdx.x & 31, row = (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);
    int64_t key_stride = DELTA ? c.d_v : 1, value_stride = DELTA ? 1 : c.d_k;
    bool fresh = w.begin == 0 && s.pos[w.first] == 0;
    float acc[2][32]; /* keys 64 i + row; the second half is what the low halves add */
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 16; e++) {
            int key = i * 64 + row + (e >> 1 & 1) * 8;
            int value = w.column + (e >> 2) * 8 + (lane & 3) * 2 + (e & 1);
            acc[i][e] = !fresh && key < c.d_k && value < c.d_v
                            ? state[key * key_stride + value * value_stride]
                            : 0.0f;
        }

    for (int i = 0; i < w.end - w.begin; i++) {
        int at = i % WALK_STAGES, buffer = i & 1;
        walk_stage<DELTA> &in = m.stage[at];
        if (i >= 2)
            barrier_wait(&m.done[buffer], (i / 2 - 1) & 1);
#pragma unroll
        for (int j = 0; j < 2; j++)
            put_columns(m.s[buffer] + j * PANEL, acc[j], true);
        wgmma_publish();
        barrier_arrive(&m.s_ready[buffer]);
        group_barrier();
        barrier_wait(&m.full[at], (i / WALK_STAGES) & 1);
        wgmma_publish(); /* what was copied */

        /* u */
        float u[16], seen[32] = {};
        if (DELTA) {
            wgmma_keep(seen);
            wgmma_begin();
            times_state(seen, in.k, m.s[buffer]);
            wgmma_commit();
        }
        const float *g = in.gates[0], *beta = in.gates[1], *k_scale = in.gates[2];
        float last = g[CHUNK - 1], fade[2], grown[2], rate[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int r = row + 8 * e;
            rate[e] = beta[r];
            fade[e] = expf(last - g[r]) * (DELTA ? k_scale[r] : rate[e]);
            grown[e] = DELTA ? expf(g[r]) * k_scale[r] : 0.0f;
#pragma unroll
            for (int j = 0; j < TILE_V / 8; j++) {
                uint32_t v = *(const uint32_t *)(in.v + tile_at<TILE_V>(r, j * 8 + (lane & 3) * 2));
                u[4 * j + 2 * e] = bf16_low(v);
                u[4 * j + 2 * e + 1] = bf16_high(v);
            }
        }
        if (DELTA) {
            wgmma_wait<0>();
            wgmma_keep(seen);
#pragma unroll
            for (int e = 0; e < 16; e++)
                u[e] = rate[e >> 1 & 1] * (u[e] - grown[e >> 1 & 1] * (seen[e] + seen[16 + e]));
            put_columns(m.rhs, u, false);
            wgmma_publish();
            group_barrier();
            wgmma_keep(u);
            wgmma_begin();
            times_columns(u, in.l, m.rhs);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_keep(u);
        }

        /* What the outputs need of it, and what goes into S */
        put_columns(m.u[buffer], u, false);
#pragma unroll
        for (int e = 0; e < 16; e++)
            u[e] *= fade[e >> 1 & 1];
        put_columns(m.in, u, true);
        wgmma_publish();
        barrier_arrive(&m.u_ready[buffer]);
        group_barrier();

        /* The state */
        float kept = expf(last);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 16; e++) {
                acc[j][e] *= kept;
                acc[j][16 + e] = 0;
            }
        wgmma_keep(acc[0]);
        wgmma_keep(acc[1]);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                wgmma_64_trans(acc[j], wgmma_tile(in.k + j * PANEL) + k * (16 * 64 * 2 / 16),
                               wgmma_tile(m.in) + 2 * k);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(acc[0]);
        wgmma_keep(acc[1]);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 16; e++)
                acc[j][e] += acc[j][16 + e];
        barrier_arrive(&m.empty[at]);
    }

#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 16; e++) {
            int key = i * 64 + row + (e >> 1 & 1) * 8;
            int value = w.column + (e >> 2) * 8 + (lane & 3) * 2 + (e & 1);
            if (key < c.d_k && value < c.d_v)
                state[key * key_stride + value * value_stride] = acc[i][e];
        }
}

template <bool DELTA>
__device__ void walk_outputs(const qv_k_recurrent_args &c, walk_shared<DELTA> &m, const walk &w)
{
    int lane = threadIdx.x & 31, row = (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);
    float d_skip = DELTA ? 0.0f : c.d_skip[w.head];
    int64_t start = w.first + (int64_t)w.begin * CHUNK;
    bf16 *o = row_of<bf16>(c.o, start + row, w.head) + w.column + (lane & 3) * 2;
    for (int i = 0; i < w.end - w.begin; i++) {
        int at = i % WALK_STAGES, buffer = i & 1, n = w.n_tokens - (w.begin + i) * CHUNK;
        walk_stage<DELTA> &in = m.stage[at];
        barrier_wait(&m.full[at], (i / WALK_STAGES) & 1);
        wgmma_publish(); /* what was copied */
        barrier_wait(&m.s_ready[buffer], (i / 2) & 1);
        float seen[32] = {}, out[16];
        wgmma_keep(seen);
        wgmma_begin();
        times_state(seen, in.q, m.s[buffer]);
        wgmma_commit();
        float grown[2] = {expf(in.gates[0][row]) * in.gates[3][row],
                          expf(in.gates[0][row + 8]) * in.gates[3][row + 8]};
        wgmma_wait<0>();
        wgmma_keep(seen);
#pragma unroll
        for (int e = 0; e < 16; e++)
            out[e] = grown[e >> 1 & 1] * (seen[e] + seen[16 + e]);
        if (!DELTA) {
#pragma unroll
            for (int j = 0; j < TILE_V / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    uint32_t v =
                        *(const uint32_t *)(in.v +
                                            tile_at<TILE_V>(row + 8 * e, j * 8 + (lane & 3) * 2));
                    out[4 * j + 2 * e] += d_skip * bf16_low(v);
                    out[4 * j + 2 * e + 1] += d_skip * bf16_high(v);
                }
        }
        barrier_wait(&m.u_ready[buffer], (i / 2) & 1);
        wgmma_keep(out);
        wgmma_begin();
        times_columns(out, in.p, m.u[buffer]);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(out);
        barrier_arrive(&m.done[buffer]);
        barrier_arrive(&m.empty[at]);
#pragma unroll
        for (int j = 0; j < TILE_V / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (row + 8 * e < n && w.column + j * 8 + (lane & 3) * 2 < c.d_v)
                    *(uint32_t *)(o + 8 * e * c.o.token + 8 * j) =
                        pack_bf16(out[4 * j + 2 * e], out[4 * j + 2 * e + 1]);
        o += CHUNK * c.o.token;
    }
}

/* Grid (tiles of columns, heads, sequences). */
template <bool DELTA>
__global__ void __launch_bounds__(WALK_THREADS, 1)
    walk_kernel(qv_k_steps s, qv_k_recurrent_args c, int place_0, int places, int most_tokens,
                const chunk_record<DELTA> *records)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char walk_memory[];
    walk_shared<DELTA> &m = *(walk_shared<DELTA> *)(((uintptr_t)walk_memory + 1023) / 1024 * 1024);
    int thread = threadIdx.x, seq = blockIdx.z, base = first_place(s, seq);
    walk w;
    w.first = s.seq_start[seq];
    w.n_tokens = s.seq_start[seq + 1] - s.seq_start[seq];
    w.head = (int)blockIdx.y;
    w.column = (int)blockIdx.x * TILE_V;
    w.begin = max(place_0 - base, 0);
    w.end = min(place_0 + places - base, (w.n_tokens + CHUNK - 1) / CHUNK);
    if (w.n_tokens <= most_tokens || w.begin >= w.end)
        return;
    if (thread == 0) {
        for (int i = 0; i < WALK_STAGES; i++) {
            barrier_init(&m.full[i], 128);
            barrier_init(&m.empty[i], 256);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&m.s_ready[i], 128);
            barrier_init(&m.u_ready[i], 128);
            barrier_init(&m.done[i], 128);
        }
        barriers_publish();
    }
    __syncthreads();
    int group = warpgroup();
    if (group == 0)
        walk_state<DELTA>(s, c, m, w, state_of(s, c, seq, w.head));
    else if (group == 1)
        walk_outputs<DELTA>(c, m, w);
    else
        walk_fetch<DELTA>(c, m, w,
                          records + (int64_t)(base + w.begin - place_0) * c.n_v_heads + w.head);
#else
    (void)s, (void)c, (void)place_0, (void)places, (void)most_tokens, (void)records;
    __trap(); /* not launched on other devices */
#endif
}

} // namespace

#endif
