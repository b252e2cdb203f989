/* Prefill attention on Hopper's matrix instruction: what attention_prefill.cu computes, for pages
 * of a multiple of 16 tokens. 4 * T^2 / 2 * head_dim FLOP a head, bound by the tensor cores.
 *
 * A block has 128 rows of one KV head of one sequence: a row is a query token and one of the heads
 * that share the KV head, token by token. One warp fetches keys and values, 16 tokens by 64 columns
 * a box (a page has whole boxes), into STAGES tiles each; two warpgroups have 64 rows each, and
 * drift into turns: one's softmax runs beside the other's products. To overlap a warpgroup's
 * softmax with its own products as well, or to make the turns strict, did not pay
 * (docs/performance.md).
 *
 * Tiles of keys are counted from position 0, and a tile that a row sees nothing of leaves its state
 * as it was to the bit: what a row gets does not depend on the rows beside it.
 */
#include "kernels/attention.cuh"
#include "kernels/wgmma_attention.cuh"

extern "C" qv_status qv_k_attention_hopper(const qv_k_attention_args *c, void *stream);

namespace
{

constexpr int ROWS = 128; /* of a block */
constexpr int GROUP_ROWS = 64;
constexpr int THREADS = 3 * 128;

/* Shared memory: queries [2][D / 64] tiles [64][64], then stages of keys, then of values, each
 * [D / 64] tiles [KEYS][64]; all tiles in the arrangement of tile_at<64>. */
template <int D, int KEYS, int STAGES> struct wide_shape {
    static constexpr int SLABS = D / 64;
    static constexpr int QUERIES = GROUP_ROWS * D; /* numbers, of a warpgroup */
    static constexpr int STAGE = KEYS * D;         /* numbers, of keys or of values */
    static constexpr int BYTES = (2 * QUERIES + 2 * STAGES * STAGE) * (int)sizeof(bf16) + 1024;
    static_assert(D % 64 == 0 && KEYS % PAGE_BOX == 0, "whole boxes");
    static_assert(KEYS / PAGE_BOX * SLABS <= 32, "a box of a stage a lane");
    static_assert(KEYS * 128 % 1024 == 0, "tiles begin at multiples of 1024 bytes");
    static_assert(BYTES + 1024 <= 227 << 10, "what a block may have, with the barriers");
};

template <int STAGES> struct wide_barriers {
    uint64_t full_k[STAGES], full_v[STAGES], empty_k[STAGES], empty_v[STAGES];
};

/* Of the 128 threads of a warpgroup. */
[[maybe_unused]] __device__ __forceinline__ void group_barrier(int id)
{
    named_barrier<128>(id);
}

/* --- Fetch -------------------------------------------------------------------------------- */

/* One warp: all tiles of keys and values, in the order in which they are used. */
template <int D, int KEYS, int STAGES>
__device__ __forceinline__ void fetch(const qv_k_attention_args &c, const CUtensorMap *k_map,
                                      const CUtensorMap *v_map, const int32_t *pages, int kv_head,
                                      int end, int n_tiles, bf16 *k_stages, bf16 *v_stages,
                                      wide_barriers<STAGES> &bars)
{
    using shape = wide_shape<D, KEYS, STAGES>;
    int lane = threadIdx.x & 31, box = lane / shape::SLABS, slab = lane % shape::SLABS;
    auto row_of = [&](int tile) { /* of this lane's box in the pool; -1: there is none */
                                  int p = tile * KEYS + box * PAGE_BOX;
                                  if (box >= KEYS / PAGE_BOX || p >= end)
                                      return -1;
                                  int page = p / c.page_tokens;
                                  return pages[page] * c.page_tokens + p - page * c.page_tokens;
    };
    auto copy = [&](int tile, int row, const CUtensorMap *map, bf16 *stages, uint64_t *full,
                    uint64_t *empty) {
        int at = tile % STAGES, round = tile / STAGES;
        if (round > 0)
            barrier_wait(&empty[at], (round - 1) & 1);
        int n_boxes = (min(KEYS, end - tile * KEYS) + PAGE_BOX - 1) / PAGE_BOX;
        if (lane == 0)
            barrier_expect(&full[at], n_boxes * shape::SLABS * PAGE_BOX * 64 * (int)sizeof(bf16));
        __syncwarp();
        if (row >= 0)
            copy_box_here(stages + at * shape::STAGE + slab * KEYS * 64 + box * PAGE_BOX * 64, map,
                          slab * 64, kv_head, row, &full[at]);
    };
    int row = row_of(0);
    copy(0, row, k_map, k_stages, bars.full_k, bars.empty_k);
    for (int tile = 0; tile < n_tiles; tile++) {
        int next = row_of(tile + 1);
        if (tile + 1 < n_tiles)
            copy(tile + 1, next, k_map, k_stages, bars.full_k, bars.empty_k);
        copy(tile, row, v_map, v_stages, bars.full_v, bars.empty_v);
        row = next;
    }
}

/* --- Compute ------------------------------------------------------------------------------ */

/* Start S = Q K^T of a warpgroup's rows: one series of products. */
template <int D, int KEYS>
__device__ __forceinline__ void start_scores(float (&s)[KEYS / 2], const bf16 *q, const bf16 *k)
{
    uint64_t a = wgmma_tile(q), b = wgmma_tile(k);
    wgmma_keep(s);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < D / 16; i++)
        wgmma_scores<KEYS>(s, a + i / 4 * (GROUP_ROWS * 128 >> 4) + i % 4 * 2,
                           b + i / 4 * (KEYS * 128 >> 4) + i % 4 * 2, i > 0);
    wgmma_commit();
}

/* Start O += P V. */
template <int D, int KEYS>
__device__ __forceinline__ void start_values(float (&o)[D / 2], const uint32_t (&p)[KEYS / 16][4],
                                             const bf16 *v)
{
    uint64_t b = wgmma_values_tile(v, KEYS * 128);
    wgmma_keep(o);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
        wgmma_values<D>(o, p[i], b + i * (16 * 128 >> 4));
    wgmma_commit();
}

/* A warpgroup's view of its rows: this thread's two, and the softmax so far. */
struct wide_rows {
    int pos[2];
    float max[2], sum[2], keep[2];
};

/* Scores to probabilities in place; keep[] is what earlier sums must be multiplied by. Keys behind
 * a row's own position count as -inf where `masked`. */
template <int KEYS>
__device__ __forceinline__ void softmax(float (&s)[KEYS / 2], wide_rows &rows, int first_key,
                                        bool masked, float scale)
{
    if (masked) {
        int column = first_key + (threadIdx.x & 3) * 2;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++)
            if (column + i / 4 * 8 + (i & 1) > rows.pos[(i >> 1) & 1])
                s[i] = -INFINITY;
    }
    float now[2] = {rows.max[0], rows.max[1]};
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        now[(i >> 1) & 1] = fmaxf(now[(i >> 1) & 1], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffffu, now[r], 1));
        now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffffu, now[r], 2));
        /* Every row sees key 0, so that from the first tile on this is a number. */
        rows.keep[r] = power_of_two((rows.max[r] - now[r]) * scale);
        rows.sum[r] *= rows.keep[r];
        rows.max[r] = now[r];
        now[r] *= scale;
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        s[i] = power_of_two(fmaf(s[i], scale, -now[(i >> 1) & 1]));
        rows.sum[(i >> 1) & 1] += s[i];
    }
}

template <int KEYS>
__device__ __forceinline__ void pack_rows(uint32_t (&p)[KEYS / 16][4], const float (&s)[KEYS / 2])
{
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++)
        p[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

/* In the last tile of values: rows that no query sees, which may hold anything (or, behind the last
 * box, what was in the stage before), become zero, since 0 times NaN is NaN. Both warpgroups write
 * the same zeros, each for itself. */
template <int D, int KEYS>
__device__ __forceinline__ void clear_rows(bf16 *v, int n_rows, int barrier)
{
    constexpr int SLABS = D / 64;
    for (int i = threadIdx.x & 127; i < (KEYS - n_rows) * SLABS * 8; i += 128) {
        int piece = i & 7, slab = (i >> 3) % SLABS, row = n_rows + (i >> 3) / SLABS;
        *(uint4 *)(v + slab * KEYS * 64 + row * 64 + piece * 8) = make_uint4(0, 0, 0, 0);
    }
    wgmma_publish();
    group_barrier(barrier);
}

/* --- Store -------------------------------------------------------------------------------- */

/* A warp's 16 rows from shared memory to their heads, times the sigmoid of the gates, which are all
 * on their way before the first is used. `first`: of the warpgroup's rows in the sequence. */
template <int D>
__device__ __forceinline__ void store_gated(const qv_k_attention_args &c, const bf16 *rows,
                                            int warp_row, int first, int n_rows, int token,
                                            int kv_head)
{
    constexpr int N = D / 16; /* pieces of 16 bytes a lane */
    int lane = threadIdx.x & 31, per_token = c.n_heads / c.n_kv_heads;
    uint4 gates[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        int place = i * 32 + lane, col = place % (D / 8) * 8;
        int at = first + warp_row + place / (D / 8), to = at / per_token;
        int head = kv_head * per_token + at - to * per_token;
        gates[i] = at < n_rows ? *(const uint4 *)(gate_at(c, token + to, head) + col)
                               : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        int place = i * 32 + lane, row = warp_row + place / (D / 8), col = place % (D / 8) * 8;
        int at = first + row, to = at / per_token;
        int head = kv_head * per_token + at - to * per_token;
        uint4 v = *(const uint4 *)(rows + col / 64 * GROUP_ROWS * 64 + tile_at<64>(row, col % 64));
        if (at < n_rows)
            *(uint4 *)((bf16 *)c.o.data + (token + to) * c.o.token + head * c.o.head + col) =
                make_uint4(gate_pair(v.x, gates[i].x), gate_pair(v.y, gates[i].y),
                           gate_pair(v.z, gates[i].z), gate_pair(v.w, gates[i].w));
    }
}

/* --- Kernel ------------------------------------------------------------------------------- */

/* Grid (KV heads, tiles of rows). */
template <int D, int KEYS, int STAGES, bool GATED>
__global__ void __launch_bounds__(THREADS, 1)
    wide_kernel(const qv_k_attention_args c, const __grid_constant__ CUtensorMap k_map,
                const __grid_constant__ CUtensorMap v_map)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using shape = wide_shape<D, KEYS, STAGES>;
    extern __shared__ __align__(1024) char wide_memory[];
    __shared__ __align__(8) wide_barriers<STAGES> bars;
    bf16 *q_tiles = (bf16 *)(wide_memory + (-shared_address(wide_memory) & 1023));
    bf16 *k_stages = q_tiles + 2 * shape::QUERIES, *v_stages = k_stages + STAGES * shape::STAGE;

    int kv_head = blockIdx.x, per_token = c.n_heads / c.n_kv_heads, in_seq;
    int seq = find_tile<ROWS>(c, per_token, gridDim.y - 1 - blockIdx.y, &in_seq);
    if (seq < 0)
        return;
    int token = c.seq_start[seq], n_rows = (c.seq_start[seq + 1] - token) * per_token;
    int first = in_seq * ROWS, before = c.pos[token];
    int end = before + (min(first + ROWS, n_rows) - 1) / per_token + 1; /* keys seen by any row */
    int n_tiles = (end + KEYS - 1) / KEYS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&bars.full_k[i], 1);
            barrier_init(&bars.full_v[i], 1);
            barrier_init(&bars.empty_k[i], 8); /* warps that read it */
            barrier_init(&bars.empty_v[i], 8);
        }
        barriers_publish();
        wgmma_publish();
    }
    __syncthreads();

    int group = (int)(threadIdx.x >> 7) - 1;
    if (group < 0) {
        fewer_registers<24>();
        if (threadIdx.x < 32)
            fetch<D, KEYS, STAGES>(c, &k_map, &v_map, c.page_table + (int64_t)seq * c.page_stride,
                                   kv_head, end, n_tiles, k_stages, v_stages, bars);
    } else {
        more_registers<240>();
        int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31;
        int own = 1 + group; /* barrier */
        bf16 *q = q_tiles + group * shape::QUERIES;
        first += group * GROUP_ROWS;

        /* Load the queries; rows that are not there are zero. */
        for (int i = thread; i < GROUP_ROWS * D / 8; i += 128) {
            int row = i / (D / 8), col = i % (D / 8) * 8, at = first + row;
            bool there = at < n_rows;
            int from = there ? at / per_token : 0, head = there ? at - from * per_token : 0;
            copy16(q + col / 64 * GROUP_ROWS * 64 + tile_at<64>(row, col % 64),
                   (const bf16 *)c.q.data + (token + from) * c.q.token +
                       (kv_head * per_token + head) * c.q.head + col,
                   there);
        }
        copies_commit();
        copies_wait<0>();
        wgmma_publish();
        group_barrier(own);

        float o[D / 2], s[KEYS / 2];
        uint32_t p[KEYS / 16][4];
        wide_rows rows;
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            o[i] = 0;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++)
            s[i] = 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            rows.pos[r] = before + (first + warp * 16 + (lane >> 2) + 8 * r) / per_token;
            rows.max[r] = -INFINITY;
            rows.sum[r] = 0;
        }
        int all_see = before + first / per_token; /* up to this key */
        float scale = c.scale * LOG2_E;
        auto k_of = [&](int tile) { return k_stages + tile % STAGES * shape::STAGE; };
        auto v_of = [&](int tile) { return v_stages + tile % STAGES * shape::STAGE; };
        auto wait = [&](uint64_t *full, int tile) {
            barrier_wait(&full[tile % STAGES], (tile / STAGES) & 1);
        };
        auto give_back = [&](uint64_t *empty, int tile) {
            if (lane == 0)
                barrier_arrive(&empty[tile % STAGES]);
        };
        /* While this warpgroup is at its softmax, the other's products have the tensor cores. */
        for (int tile = 0; tile < n_tiles; tile++) {
            wait(bars.full_k, tile);
            start_scores<D, KEYS>(s, q, k_of(tile));
            wgmma_wait<0>();
            wgmma_keep(s);
            give_back(bars.empty_k, tile);
            softmax<KEYS>(s, rows, tile * KEYS, (tile + 1) * KEYS - 1 > all_see, scale);
#pragma unroll
            for (int i = 0; i < D / 2; i++)
                o[i] *= rows.keep[(i >> 1) & 1];
            pack_rows<KEYS>(p, s);
            wait(bars.full_v, tile);
            if (end < (tile + 1) * KEYS)
                clear_rows<D, KEYS>(v_of(tile), end - tile * KEYS, own);
            start_values<D, KEYS>(o, p, v_of(tile));
            wgmma_wait<0>();
            wgmma_keep(o);
            give_back(bars.empty_v, tile);
        }

        /* Store through the place of the queries, so that rows leave in pieces of 16 bytes. A warp
         * has 16 rows to itself. */
        group_barrier(own); /* all products that read the queries are done */
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = rows.sum[r];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            float inverse = 1.0f / sum;
            int row = warp * 16 + (lane >> 2) + 8 * r;
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                *(uint32_t *)(q + i / 8 * GROUP_ROWS * 64 +
                              tile_at<64>(row, i % 8 * 8 + (lane & 3) * 2)) =
                    pack_bf16(o[4 * i + 2 * r] * inverse, o[4 * i + 2 * r + 1] * inverse);
        }
        __syncwarp();
        if constexpr (GATED) {
            store_gated<D>(c, q, warp * 16, first, n_rows, token, kv_head);
        } else {
            for (int i = lane; i < 16 * D / 8; i += 32) {
                int row = warp * 16 + i / (D / 8), col = i % (D / 8) * 8, at = first + row;
                if (at >= n_rows)
                    break;
                int to = at / per_token, head = at - to * per_token;
                *(uint4 *)((bf16 *)c.o.data + (token + to) * c.o.token +
                           (kv_head * per_token + head) * c.o.head + col) =
                    *(const uint4 *)(q + col / 64 * GROUP_ROWS * 64 + tile_at<64>(row, col % 64));
            }
        }
    }
#else
    (void)c, (void)k_map, (void)v_map;
    __trap(); /* not launched on other devices */
#endif
}

template <int D, int KEYS, int STAGES>
qv_status launch(const qv_k_attention_args &c, cudaStream_t s)
{
    constexpr int BYTES = wide_shape<D, KEYS, STAGES>::BYTES;
    CUtensorMap k_map, v_map;
    QV_TRY(pages_map("attention_prefill", c, c.k_pages, &k_map));
    QV_TRY(pages_map("attention_prefill", c, c.v_pages, &v_map));
    auto *kernel =
        c.gate.data ? wide_kernel<D, KEYS, STAGES, true> : wide_kernel<D, KEYS, STAGES, false>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: attention_prefill: %s", cudaGetErrorString(error));
    int64_t rows = (int64_t)c.n_tokens * (c.n_heads / c.n_kv_heads);
    dim3 grid((unsigned)c.n_kv_heads, (unsigned)(rows / ROWS + c.n_seqs));
    kernel<<<grid, THREADS, BYTES, s>>>(c, k_map, v_map);
    return qv_k_check_launch("attention_prefill");
}

} // namespace

qv_status qv_k_attention_hopper(const qv_k_attention_args *c, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    switch (c->head_dim) {
    case 64:
        return launch<64, 128, 2>(*c, s);
    case 128:
        return launch<128, 128, 2>(*c, s);
    default:
        return launch<256, 80, 2>(*c, s);
    }
}
