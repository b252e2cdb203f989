/* Attention of sequences with one new token: every key and value is read once, 2 * 2 * context *
 * head_dim bytes a KV head, so it is bound by bandwidth. The query heads of a KV head are the 16
 * rows of one fragment. A context is cut into pieces that blocks take side by side; the last block
 * of a KV head to arrive adds the pieces up, in their order, so that the result does not depend on
 * who it was.
 *
 * A block walks its piece in tiles of 16 keys a warp, loaded ahead by asynchronous copies. Each
 * warp keeps a softmax of its own over its keys; they are joined at the end in shared memory.
 */
#include "kernels/attention.cuh"

namespace
{

constexpr int GROUP = 16; /* rows of a fragment: query heads of a KV head */
constexpr int MAX_PIECES = 64;
constexpr int MIN_PIECE = 128; /* keys; less is not worth a block */

template <int D, int WARPS, int STAGES> struct decode_shape {
    static constexpr int TILE = 16 * WARPS;    /* keys of a stage */
    static constexpr int STAGE = 2 * TILE * D; /* numbers: keys, then values */
    static constexpr int BYTES = (STAGES * STAGE + GROUP * D) * (int)sizeof(bf16);
    /* Afterwards the stages hold the sums of the warps. */
    static_assert(STAGES * STAGE * (int)sizeof(bf16) >= WARPS * GROUP * D * (int)sizeof(float), "");
};

/* Where the pieces of one KV head of one sequence are: [n_splits][group][D] sums, then the two
 * numbers of each row. */
__device__ __forceinline__ float *piece_sums(const qv_k_attention_args &c, int seq, int kv_head,
                                             int piece)
{
    int64_t group = c.n_heads / c.n_kv_heads;
    int64_t at = ((int64_t)seq * c.n_kv_heads + kv_head) * c.n_splits + piece;
    return (float *)c.scratch + at * group * (c.head_dim + 2);
}

/* Add up the pieces of one KV head: out[row, col] = sum of piece * factor. `shared` has room for
 * MAX_PIECES * GROUP factors. Columns four at a time, the pieces' loads independent of each other.
 */
template <int D, int THREADS>
__device__ __forceinline__ void join_pieces(const qv_k_attention_args &c, const float *all,
                                            int n_pieces, int group, float *shared, bf16 *out)
{
    int64_t step = (int64_t)group * (D + 2);
    float *factor = shared, *total = shared + MAX_PIECES * GROUP;
    for (int i = threadIdx.x; i < n_pieces * group; i += THREADS) {
        int piece = i / group, row = i % group;
        factor[piece * GROUP + row] = __ldcg(all + piece * step + group * D + 2 * row);
    }
    __syncthreads();
    for (int row = threadIdx.x; row < group; row += THREADS) {
        float whole = -INFINITY, sum = 0;
        for (int p = 0; p < n_pieces; p++)
            whole = fmaxf(whole, factor[p * GROUP + row]);
#pragma unroll 8
        for (int p = 0; p < n_pieces; p++) {
            float f = exp2f(factor[p * GROUP + row] - whole);
            factor[p * GROUP + row] = f;
            sum += __ldcg(all + p * step + group * D + 2 * row + 1) * f;
        }
        total[row] = 1.0f / sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * D / 4; i += THREADS) {
        int row = i * 4 / D, col = i * 4 % D;
        float4 v = {0, 0, 0, 0};
#pragma unroll 8
        for (int p = 0; p < n_pieces; p++) {
            float2 a = __ldcg((const float2 *)(all + p * step) + 2 * i);
            float2 b = __ldcg((const float2 *)(all + p * step) + 2 * i + 1);
            float f = factor[p * GROUP + row];
            v.x = fmaf(a.x, f, v.x);
            v.y = fmaf(a.y, f, v.y);
            v.z = fmaf(b.x, f, v.z);
            v.w = fmaf(b.y, f, v.w);
        }
        float scale = total[row];
        uint2 packed = {pack_bf16(v.x * scale, v.y * scale), pack_bf16(v.z * scale, v.w * scale)};
        *(uint2 *)(out + row * c.o.head + col) = packed;
    }
}

template <int D, int WARPS, int STAGES>
__global__ void __launch_bounds__(32 * WARPS) decode_kernel(qv_k_attention_args c)
{
    using shape = decode_shape<D, WARPS, STAGES>;
    constexpr int THREADS = 32 * WARPS, TILE = shape::TILE;
    extern __shared__ __align__(16) bf16 memory[];
    __shared__ float row_max[WARPS][GROUP], row_sum[WARPS][GROUP];
    __shared__ int64_t row_at[2][TILE];
    __shared__ bool is_last;

    int seq = blockIdx.z, kv_head = blockIdx.y, piece = blockIdx.x;
    int token = c.seq_start[seq];
    if (c.seq_start[seq + 1] - token != 1)
        return;
    int context = c.pos[token] + 1;
    int size = (context + c.n_splits - 1) / c.n_splits;
    size = size < MIN_PIECE ? MIN_PIECE : (size + TILE - 1) / TILE * TILE;
    int n_pieces = (context + size - 1) / size;
    if (piece >= n_pieces)
        return;
    int begin = piece * size, end = begin + size < context ? begin + size : context;
    int group = c.n_heads / c.n_kv_heads;
    const int32_t *pages = c.page_table + (int64_t)seq * c.page_stride;
    bf16 *q_tile = memory + STAGES * shape::STAGE;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;

    /* Load: the queries with the first stage. */
    for (int i = threadIdx.x; i < GROUP * D / 8; i += THREADS) {
        int row = i / (D / 8), col = i % (D / 8) * 8;
        const bf16 *q = (const bf16 *)c.q.data + token * c.q.token +
                        (kv_head * group + (row < group ? row : 0)) * c.q.head + col;
        copy16(q_tile + tile_at<D>(row, col), q, row < group);
    }
    int n_tiles = (end - begin + TILE - 1) / TILE;
    /* Rows of tile i are found one tile ahead of its copies. */
    find_rows<TILE>(row_at[0], c, pages, kv_head, begin, end);
    auto load = [&](int tile) {
        __syncthreads();
        if (tile < n_tiles) {
            bf16 *stage = memory + tile % STAGES * shape::STAGE;
            load_rows<D, TILE, THREADS>(stage, (const bf16 *)c.k_pages, row_at[tile & 1]);
            load_rows<D, TILE, THREADS>(stage + TILE * D, (const bf16 *)c.v_pages,
                                        row_at[tile & 1]);
            find_rows<TILE>(row_at[(tile + 1) & 1], c, pages, kv_head, begin + (tile + 1) * TILE,
                            end);
        }
        copies_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        load(i);

    /* Compute. */
    float o[D / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {}, keep[2];
    float scale = c.scale * LOG2_E;
    for (int tile = 0; tile < n_tiles; tile++) {
        load(tile + STAGES - 1); /* its barrier: all have left the stage that it writes */
        copies_wait<STAGES - 1>();
        __syncthreads();
        const bf16 *stage = memory + tile % STAGES * shape::STAGE;
        float s[2][4];
        scores<D, 2>(s, q_tile, 0, stage, warp * 16);
        int first = begin + tile * TILE + warp * 16 + 2 * t;
        if (begin + (tile + 1) * TILE > end) {
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (first + i * 8 + (j & 1) >= end)
                        s[i][j] = -INFINITY;
        }
        softmax_step<2>(s, scale, max, sum, keep);
#pragma unroll
        for (int i = 0; i < D / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                o[i][j] *= keep[j >> 1];
        add_values<D, 2>(o, s, stage + TILE * D, warp * 16);
    }

    /* Join the warps. */
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        if (t == 0) {
            row_max[warp][g + 8 * r] = max[r] * scale;
            row_sum[warp][g + 8 * r] = sum[r];
        }
    }
    copies_wait<0>();
    __syncthreads();
    float *joined = (float *)memory;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float whole = -INFINITY;
        for (int w = 0; w < WARPS; w++)
            whole = fmaxf(whole, row_max[w][g + 8 * r]);
        float factor = max[r] == -INFINITY ? 0.0f : exp2f(max[r] * scale - whole);
        float *row = joined + (warp * GROUP + g + 8 * r) * D;
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            *(float2 *)(row + i * 8 + 2 * t) =
                make_float2(o[i][2 * r] * factor, o[i][2 * r + 1] * factor);
    }
    __syncthreads();

    /* Store: the result, or a piece of it. */
    float *sums = piece_sums(c, seq, kv_head, piece);
    for (int i = threadIdx.x; i < group * D; i += THREADS) {
        int row = i / D, col = i % D;
        float whole = -INFINITY, total = 0, v = 0;
        for (int w = 0; w < WARPS; w++)
            whole = fmaxf(whole, row_max[w][row]);
        for (int w = 0; w < WARPS; w++) {
            if (row_max[w][row] != -INFINITY)
                total += row_sum[w][row] * exp2f(row_max[w][row] - whole);
            v += joined[(w * GROUP + row) * D + col];
        }
        if (n_pieces == 1) {
            ((bf16 *)c.o.data)[token * c.o.token + (kv_head * group + row) * c.o.head + col] =
                __float2bfloat16(v / total);
            continue;
        }
        sums[i] = v;
        if (col == 0) {
            sums[group * D + 2 * row] = whole;
            sums[group * D + 2 * row + 1] = total;
        }
    }
    if (n_pieces == 1)
        return;

    /* The last block adds the pieces up. The counter wraps to 0 for the next launch. */
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        is_last = atomicInc(&c.counters[seq * c.n_kv_heads + kv_head], (unsigned)n_pieces - 1) ==
                  (unsigned)n_pieces - 1;
    __syncthreads();
    if (!is_last)
        return;
    __threadfence();
    join_pieces<D, THREADS>(c, piece_sums(c, seq, kv_head, 0), n_pieces, group, (float *)memory,
                            (bf16 *)c.o.data + token * c.o.token + kv_head * group * c.o.head);
}

template <int D, int WARPS, int STAGES>
cudaError_t launch(const qv_k_attention_args &c, cudaStream_t s)
{
    constexpr int BYTES = decode_shape<D, WARPS, STAGES>::BYTES;
    auto *kernel = decode_kernel<D, WARPS, STAGES>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error != cudaSuccess)
        return error;
    dim3 grid((unsigned)c.n_splits, (unsigned)c.n_kv_heads, (unsigned)c.n_seqs);
    kernel<<<grid, 32 * WARPS, BYTES, s>>>(c);
    return cudaSuccess;
}

} // namespace

int32_t qv_k_attention_splits(int32_t n_seqs, int32_t n_kv_heads, int32_t n_sms)
{
    int64_t pairs = (int64_t)n_seqs * n_kv_heads;
    int64_t n = pairs > 0 ? (4 * (int64_t)n_sms + pairs - 1) / pairs : 1;
    return n < 8 ? 8 : n > MAX_PIECES ? MAX_PIECES : (int32_t)n;
}

size_t qv_k_attention_scratch(int32_t n_seqs, int32_t n_heads, int32_t head_dim, int32_t n_splits)
{
    return (size_t)n_seqs * (size_t)n_heads * (size_t)n_splits * ((size_t)head_dim + 2) *
           sizeof(float);
}

/* Declared in attention_prefill.cu. `large`: whether a block may have more than 100 KiB. */
extern "C" qv_status qv_k_attention_decode(const qv_k_attention_args *c, bool large, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    cudaError_t error = cudaSuccess;
    switch (c->head_dim) {
    case 64:
        error = launch<64, 4, 4>(*c, s);
        break;
    case 128:
        error = launch<128, 4, 3>(*c, s);
        break;
    default:
        error = large ? launch<256, 4, 3>(*c, s) : launch<256, 2, 2>(*c, s);
        break;
    }
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: attention_decode: %s", cudaGetErrorString(error));
    return qv_k_check_launch("attention_decode");
}
