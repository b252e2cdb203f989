/* What both attention kernels share: where a key is, and the online softmax. */
#ifndef QV_KERNELS_ATTENTION_CUH
#define QV_KERNELS_ATTENTION_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_attention.h"
#include "kernels/tensor_map.cuh"

#define LOG2_E 1.4426950408889634f

/* Offset of the key (or value) of position p for a KV head: elements from the start of the pages.
 */
__device__ __forceinline__ int64_t key_at(const qv_k_attention_args &c, const int32_t *pages, int p,
                                          int kv_head)
{
    int page = p / c.page_tokens, slot = p - page * c.page_tokens;
    int64_t row = (int64_t)pages[page] * c.page_tokens + slot;
    return (row * c.n_kv_heads + kv_head) * c.head_dim;
}

/* Hopper's copy engine brings pages in boxes of so many tokens by 64 columns of a KV head. */
constexpr int PAGE_BOX = 16;

/* Whether it can: pages are whole boxes. */
static inline bool has_boxes(const qv_k_attention_args &c)
{
    return c.hopper && c.page_tokens % PAGE_BOX == 0 && c.n_pages > 0 &&
           c.n_pages * c.page_tokens <= INT32_MAX;
}

/* The pages as [n_pages * page_tokens][n_kv_heads][head_dim]. */
static inline qv_status pages_map(const char *name, const qv_k_attention_args &c, const void *pages,
                                  CUtensorMap *map)
{
    const cuuint64_t d = (cuuint64_t)c.head_dim, heads = (cuuint64_t)c.n_kv_heads;
    const cuuint64_t sizes[3] = {d, heads, (cuuint64_t)(c.n_pages * c.page_tokens)};
    const cuuint64_t strides[2] = {d * 2, d * heads * 2};
    const cuuint32_t box[3] = {64, 1, PAGE_BOX};
    return qv_k_tensor_map(name, pages, sizes, strides, box, map);
}

/* Prefill: the sequence of tile number `tile`, and which of its tiles; -1 when there are fewer. A
 * token is `per_token` rows, a tile is ROWS of them, of one sequence. Sequences with one token are
 * decode's, unless there is one form. One warp's work. */
template <int ROWS>
__device__ __forceinline__ int find_tile(const qv_k_attention_args &c, int per_token, int tile,
                                         int *in_seq)
{
    int lane = threadIdx.x & 31, before = 0;
    for (int first = 0; first < c.n_seqs; first += 32) {
        int seq = first + lane, n = 0;
        if (seq < c.n_seqs) {
            int tokens = c.seq_start[seq + 1] - c.seq_start[seq];
            n = tokens > 1 || c.one_form ? (tokens * per_token + ROWS - 1) / ROWS : 0;
        }
        int upto = n; /* tiles of this lane's sequence and of those before it in the group */
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            int v = __shfl_up_sync(0xffffffffu, upto, i);
            upto += lane >= i ? v : 0;
        }
        unsigned beyond = __ballot_sync(0xffffffffu, before + upto > tile);
        if (beyond != 0) {
            int found = __ffs(beyond) - 1;
            *in_seq = tile - before - __shfl_sync(0xffffffffu, upto - n, found);
            return first + found;
        }
        before += __shfl_sync(0xffffffffu, upto, 31);
    }
    return -1;
}

/* Where the rows of a tile are: finding one takes a division and a look into the page table, so
 * each is found once, by one thread, and read by the many that copy its pieces. */
template <int ROWS>
__device__ __forceinline__ void find_rows(int64_t *at, const qv_k_attention_args &c,
                                          const int32_t *pages, int kv_head, int first, int end)
{
    int row = threadIdx.x;
    if (row < ROWS)
        at[row] = first + row < end ? key_at(c, pages, first + row, kv_head) : -1;
}

/* Rows of keys or values into a tile, by all THREADS threads; rows that are nowhere become zero. */
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_rows(bf16 *tile, const bf16 *pool, const int64_t *at)
{
    constexpr int PIECES = D / 8; /* of a row, 16 bytes each */
#pragma unroll
    for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
        int place = i * THREADS + threadIdx.x, row = place / PIECES, piece = place % PIECES;
        int64_t from = at[row];
        copy16(tile + tile_at<D>(row, piece * 8), pool + (from < 0 ? 0 : from) + piece * 8,
               from >= 0);
    }
}

/* The gate of a head, and two numbers of a result as they would have been stored times the sigmoid
 * of theirs: what sigmoid_gate would make of them. */
__device__ __forceinline__ const bf16 *gate_at(const qv_k_attention_args &c, int64_t token,
                                               int head)
{
    return (const bf16 *)c.gate.data + token * c.gate.token + head * c.gate.head;
}

__device__ __forceinline__ uint32_t gate_pair(uint32_t x, uint32_t gate)
{
    return pack_bf16(bf16_low(x) * sigmoid(bf16_low(gate)),
                     bf16_high(x) * sigmoid(bf16_high(gate)));
}

/* One step of the online softmax for the scores of a warp's 16 rows: s in, probabilities out. Row g
 * of the fragment is number 0, row g + 8 number 1. `scale` has log2(e) in it. Returns what the sums
 * so far must be multiplied by. */
template <int N>
__device__ __forceinline__ void softmax_step(float (&s)[N][4], float scale, float (&max)[2],
                                             float (&sum)[2], float (&keep)[2])
{
    float now[2] = {max[0], max[1]};
#pragma unroll
    for (int i = 0; i < N; i++) {
        now[0] = fmaxf(now[0], fmaxf(s[i][0], s[i][1]));
        now[1] = fmaxf(now[1], fmaxf(s[i][2], s[i][3]));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffffu, now[r], 1));
        now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffffu, now[r], 2));
        /* A row without any key so far has -inf: use 0 in its place, so that nothing is NaN. */
        float base = now[r] == -INFINITY ? 0.0f : now[r] * scale;
        /* Exactly 1 where the maximum stays: a tile that a row sees nothing of leaves it as it was.
         */
        keep[r] = max[r] == now[r] ? 1.0f : exp2f((max[r] - now[r]) * scale);
        sum[r] *= keep[r];
        max[r] = now[r];
        now[r] = base;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            s[i][j] = exp2f(s[i][j] * scale - now[j >> 1]);
            sum[j >> 1] += s[i][j];
        }
}

/* S [16, 8 N] = Q K^T: q_tile has the 16 rows at q_row, k_tile the keys at `key`. */
template <int D, int N>
__device__ __forceinline__ void scores(float (&s)[N][4], const bf16 *q_tile, int q_row,
                                       const bf16 *k_tile, int key)
{
#pragma unroll
    for (int i = 0; i < N; i++)
        s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t a[4];
        load_a<D>(a, q_tile, q_row, k);
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            uint32_t b[4];
            load_b<D>(b, k_tile, key + i * 8, k);
            mma(s[i], a, b[0], b[1]);
            mma(s[i + 1], a, b[2], b[3]);
        }
    }
}

/* O [16, D] += P [16, 8 N] V. */
template <int D, int N>
__device__ __forceinline__ void add_values(float (&o)[D / 8][4], const float (&p)[N][4],
                                           const bf16 *v_tile, int key)
{
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        const uint32_t a[4] = {pack_bf16(p[i][0], p[i][1]), pack_bf16(p[i][2], p[i][3]),
                               pack_bf16(p[i + 1][0], p[i + 1][1]),
                               pack_bf16(p[i + 1][2], p[i + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            load_b_trans<D>(b, v_tile, n * 8, key + i * 8);
            mma(o[n], a, b[0], b[1]);
            mma(o[n + 1], a, b[2], b[3]);
        }
    }
}

#endif
