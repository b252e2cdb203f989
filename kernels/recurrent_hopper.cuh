/* The walk over chunks of recurrent.cuh on Hopper: the same arithmetic with wgmma, in three
 * warpgroups. One fetches chunks ahead. One walks: it keeps S in registers, gives it to the others
 * as two BF16 numbers and makes u and the next S. One makes the outputs, a little behind it.
 *
 * Per chunk the walk is five steps that wait for each other: S to shared memory, k S, T times the
 * right hand side, the new rows of S, S. What is not among them does not count for the time, but
 * for what it takes of shared memory, which the products of all three keep busy.
 *
 * Blocks of a cluster have columns of the same head: what is the same for them comes once to all.
 */
#ifndef QV_KERNELS_RECURRENT_HOPPER_CUH
#define QV_KERNELS_RECURRENT_HOPPER_CUH

#include "kernels/tensor_map.cuh"
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

/* Where the copy engine finds keys, queries, P and L, in boxes of a block's share of a tile. */
struct walk_maps {
    CUtensorMap k, q, p, l;
};

/* A stage has been read by this warp: every block of the cluster may write it. */
[[maybe_unused]] __device__ __forceinline__ void release_stage(uint64_t *empty, int shares)
{
    int lane = threadIdx.x & 31;
    __syncwarp();
    if (lane < shares)
        barrier_arrive_at(empty, lane);
}

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
    int shares, record; /* blocks of the cluster; the first chunk's record */
};

/* Keys, queries, P and L are the same for all blocks of the cluster: each asks for its share of the
 * rows, for all of them. Rows behind the sequence are whatever follows it. One thread. */
template <bool DELTA>
__device__ __forceinline__ void fetch_shared(const qv_k_recurrent_args &c, walk_shared<DELTA> &m,
                                             const walk &w, const walk_maps &maps, int i)
{
    constexpr int BYTES = (DELTA ? 6 : 5) * PANEL * (int)sizeof(bf16);
    int at = i % WALK_STAGES, key_head = w.head / (c.n_v_heads / c.n_k_heads);
    int row = (int)blockIdx.x % w.shares * (CHUNK / w.shares);
    int token = (int)w.first + (w.begin + i) * CHUNK + row, record = w.record + i * c.n_v_heads;
    uint16_t all = (uint16_t)((1 << w.shares) - 1);
    walk_stage<DELTA> &to = m.stage[at];
    uint64_t *full = &m.full[at];
    barrier_expect(full, BYTES);
#pragma unroll
    for (int panel = 0; panel < 2; panel++) {
        copy_box(to.k + panel * PANEL + row * 64, &maps.k, panel * 64, key_head, token, full, all);
        copy_box(to.q + panel * PANEL + row * 64, &maps.q, panel * 64, key_head, token, full, all);
    }
    copy_box(to.p + row * 64, &maps.p, 0, row, record, full, all);
    if (DELTA)
        copy_box(to.l + row * 64, &maps.l, 0, row, record, full, all);
}

template <bool DELTA>
__device__ void walk_fetch(const qv_k_recurrent_args &c, walk_shared<DELTA> &m, const walk &w,
                           const walk_maps &maps, const chunk_record<DELTA> *record)
{
    int thread = threadIdx.x & 127, v_row = thread / 4, v_col = thread % 4 * 8;
    bool v_valid = w.column + v_col < c.d_v;
    int v_at = tile_at<TILE_V>(v_row, v_col);
    int64_t start = w.first + (int64_t)w.begin * CHUNK;
    const bf16 *v = row_of(c.v, start + v_row, w.head) + w.column + v_col;
    record += w.record;
    for (int i = 0; i < w.end - w.begin; i++) {
        int at = i % WALK_STAGES, n = w.n_tokens - (w.begin + i) * CHUNK;
        walk_stage<DELTA> &to = m.stage[at];
        if (i >= WALK_STAGES)
            barrier_wait(&m.empty[at], (i / WALK_STAGES - 1) & 1);
        if (thread == 0)
            fetch_shared(c, m, w, maps, i);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            bool valid = v_valid && v_row + 32 * j < n;
            copy16(to.v + v_at + j * 32 * TILE_V, valid ? v + 32 * j * c.v.token : record->p,
                   valid);
        }
        if (thread < CHUNK)
            copy16((char *)to.gates + thread * 16, (const char *)record->g + thread * 16, true);
        barrier_arrive_copies(&m.full[at]);
        v += CHUNK * c.v.token;
        record += c.n_v_heads;
    }
}

/* Keys from row n on become zeros: what follows a sequence must not reach it, were it NaN. */
template <bool DELTA> __device__ __forceinline__ void clear_keys(walk_stage<DELTA> &in, int n)
{
    for (int i = threadIdx.x & 127; i < 2 * PANEL / 8; i += 128)
        if (i / 8 % CHUNK >= n)
            *(uint4 *)(in.k + i * 8) = make_uint4(0, 0, 0, 0);
    wgmma_publish();
    group_barrier();
}

/* What a thread that walks knows of a chunk before S comes, of rows `row` and row + 8. */
struct walk_rows {
    float rate[2], fade[2], grown[2], last;
    uint32_t v[2][TILE_V / 8];
};

template <bool DELTA>
__device__ __forceinline__ void read_rows(walk_rows &to, const walk_stage<DELTA> &in, int row)
{
    const float *g = in.gates[0], *beta = in.gates[1], *k_scale = in.gates[2];
    int lane = threadIdx.x & 31;
    to.last = g[CHUNK - 1];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        int r = row + 8 * e;
        to.rate[e] = beta[r];
        to.fade[e] = expf(to.last - g[r]) * (DELTA ? k_scale[r] : to.rate[e]);
        to.grown[e] = DELTA ? expf(g[r]) * k_scale[r] : 0.0f;
#pragma unroll
        for (int j = 0; j < TILE_V / 8; j++)
            to.v[e][j] = *(const uint32_t *)(in.v + tile_at<TILE_V>(r, j * 8 + (lane & 3) * 2));
    }
}

/* The same of chunk i of this walk, once it has come. */
template <bool DELTA>
__device__ __forceinline__ void meet_chunk(walk_rows &to, walk_shared<DELTA> &m, const walk &w,
                                           int i, int row)
{
    walk_stage<DELTA> &in = m.stage[i % WALK_STAGES];
    int n = w.n_tokens - (w.begin + i) * CHUNK;
    barrier_wait(&m.full[i % WALK_STAGES], (i / WALK_STAGES) & 1);
    if (n < CHUNK)
        clear_keys(in, n);
    read_rows(to, in, row);
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

    walk_rows rows;
    meet_chunk(rows, m, w, 0, row);
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

        /* u */
        float u[16], seen[32] = {};
        if (DELTA) {
            wgmma_keep(seen);
            wgmma_begin();
            times_state(seen, in.k, m.s[buffer]);
            wgmma_commit();
        }
#pragma unroll
        for (int e = 0; e < 16; e++) {
            uint32_t v = rows.v[e >> 1 & 1][e >> 2];
            u[e] = e & 1 ? bf16_high(v) : bf16_low(v);
        }
        if (DELTA) {
            wgmma_wait<0>();
            wgmma_keep(seen);
#pragma unroll
            for (int e = 0; e < 16; e++)
                u[e] = rows.rate[e >> 1 & 1] *
                       (u[e] - rows.grown[e >> 1 & 1] * (seen[e] + seen[16 + e]));
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
            u[e] *= rows.fade[e >> 1 & 1];
        put_columns(m.in, u, true);
        wgmma_publish();
        barrier_arrive(&m.u_ready[buffer]);
        group_barrier();

        /* The state */
        float kept = expf(rows.last);
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
        if (i + 1 < w.end - w.begin)
            meet_chunk(rows, m, w, i + 1, row); /* while the tensor cores work */
        wgmma_wait<0>();
        wgmma_keep(acc[0]);
        wgmma_keep(acc[1]);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 16; e++)
                acc[j][e] += acc[j][16 + e];
        release_stage(&m.empty[at], w.shares);
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
        release_stage(&m.empty[at], w.shares);
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

/* Grid (tiles of columns, heads, sequences), in clusters of `shares` tiles. */
template <bool DELTA>
__global__ void __launch_bounds__(WALK_THREADS, 1)
    walk_kernel(qv_k_steps s, qv_k_recurrent_args c, int place_0, int places, int most_tokens,
                int shares, const __grid_constant__ walk_maps maps,
                const chunk_record<DELTA> *records)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char walk_memory[];
    /* by an offset, so that the compiler knows that it is shared memory */
    walk_shared<DELTA> &m =
        *(walk_shared<DELTA> *)(walk_memory + (-shared_address(walk_memory) & 1023));
    int thread = threadIdx.x, seq = blockIdx.z, base = first_place(s, seq);
    walk w;
    w.first = s.seq_start[seq];
    w.n_tokens = s.seq_start[seq + 1] - s.seq_start[seq];
    w.head = (int)blockIdx.y;
    w.column = (int)blockIdx.x * TILE_V;
    w.begin = max(place_0 - base, 0);
    w.end = min(place_0 + places - base, (w.n_tokens + CHUNK - 1) / CHUNK);
    w.shares = shares;
    w.record = (base + w.begin - place_0) * c.n_v_heads + w.head;
    if (w.n_tokens <= most_tokens || w.begin >= w.end)
        return;
    if (thread == 0) {
        for (int i = 0; i < WALK_STAGES; i++) {
            barrier_init(&m.full[i], 129);
            barrier_init(&m.empty[i], 8 * shares);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&m.s_ready[i], 128);
            barrier_init(&m.u_ready[i], 128);
            barrier_init(&m.done[i], 128);
        }
        barriers_publish();
    }
    cluster_sync();
    int group = warpgroup();
    if (group == 0)
        walk_state<DELTA>(s, c, m, w, state_of(s, c, seq, w.head));
    else if (group == 1)
        walk_outputs<DELTA>(c, m, w);
    else
        walk_fetch<DELTA>(c, m, w, maps, records);
    cluster_sync(); /* what other blocks copy and arrive at comes here until their last chunk */
#else
    (void)s, (void)c, (void)place_0, (void)places, (void)most_tokens, (void)records;
    (void)shares, (void)maps;
    __trap(); /* not launched on other devices */
#endif
}

} // namespace

#endif
