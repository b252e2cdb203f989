/* What the kernels of decode share: which piece of a context a block has, and how pieces join. */
#ifndef QV_KERNELS_ATTENTION_PIECES_CUH
#define QV_KERNELS_ATTENTION_PIECES_CUH

#include "kernels/attention.cuh"

constexpr int GROUP = 16; /* rows of a fragment: query heads of a KV head */
constexpr int MAX_PIECES = 64;
constexpr int MIN_PIECE = 128; /* keys; less is not worth a block */

/* Which keys a block has. */
struct piece_of_context {
    int token, begin, end, n_pieces;
};

/* Pieces are whole tiles. */
template <int TILE>
__device__ __forceinline__ piece_of_context find_piece(const qv_k_attention_args &c)
{
    int seq = blockIdx.z;
    piece_of_context p = {c.seq_start[seq], 0, 0, 0};
    if (c.seq_start[seq + 1] - p.token != 1)
        return p;
    int context = c.pos[p.token] + 1;
    int size = max(MIN_PIECE, (context + c.n_splits - 1) / c.n_splits);
    size = (size + TILE - 1) / TILE * TILE;
    p.begin = blockIdx.x * size;
    p.end = min(p.begin + size, context);
    p.n_pieces = (context + size - 1) / size;
    return p;
}

/* Where the pieces of one KV head of one sequence are: [n_splits] times [group][D] sums, the two
 * numbers of each row, and room to a multiple of 16 bytes. */
__device__ __forceinline__ float *piece_sums(const qv_k_attention_args &c, int seq, int kv_head,
                                             int piece)
{
    int64_t group = c.n_heads / c.n_kv_heads;
    int64_t at = ((int64_t)seq * c.n_kv_heads + kv_head) * c.n_splits + piece;
    return (float *)c.scratch + at * group * (c.head_dim + 4);
}

/* Add up the pieces of one KV head: out[row, col] = sum of piece * factor, gated where there is a
 * gate. `shared` has room for (2 * MAX_PIECES + 1) * GROUP numbers. A thread has columns four at a
 * time; AHEAD pieces of them are on their way at once, the first while the factors are found. */
template <int D, int THREADS, bool GATED>
__device__ __forceinline__ void join_pieces(const qv_k_attention_args &c, const float *all,
                                            int n_pieces, int group, float *shared,
                                            const bf16 *gate, bf16 *out)
{
    constexpr int AHEAD = 16;
    int64_t step = (int64_t)group * (D + 4);
    float *factor = shared, *sums = factor + MAX_PIECES * GROUP, *total = sums + MAX_PIECES * GROUP;
    float4 part[AHEAD];
    uint2 gates = {};
    auto load = [&](int i, int first) {
        if (GATED && first == 0)
            gates = *(const uint2 *)(gate + i * 4 / D * c.gate.head + i * 4 % D);
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (first + k < n_pieces)
                part[k] = __ldcg((const float4 *)(all + (first + k) * step) + i);
    };
    int i = threadIdx.x, n = group * D / 4;
    if (i < n)
        load(i, 0);
    for (int j = threadIdx.x; j < n_pieces * group; j += THREADS) {
        int piece = j / group, row = j % group;
        float2 both = __ldcg((const float2 *)(all + piece * step + group * D) + row);
        factor[piece * GROUP + row] = both.x;
        sums[piece * GROUP + row] = both.y;
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
            sum += sums[p * GROUP + row] * f;
        }
        total[row] = 1.0f / sum;
    }
    __syncthreads();
    for (; i < n; i += THREADS) {
        int row = i * 4 / D, col = i * 4 % D;
        float4 v = {0, 0, 0, 0};
        for (int first = 0; first < n_pieces; first += AHEAD) {
            if (first > 0 || i >= THREADS)
                load(i, first);
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                if (first + k < n_pieces) {
                    float f = factor[(first + k) * GROUP + row];
                    v.x = fmaf(part[k].x, f, v.x);
                    v.y = fmaf(part[k].y, f, v.y);
                    v.z = fmaf(part[k].z, f, v.z);
                    v.w = fmaf(part[k].w, f, v.w);
                }
        }
        float scale = total[row];
        uint2 packed = {pack_bf16(v.x * scale, v.y * scale), pack_bf16(v.z * scale, v.w * scale)};
        if (GATED)
            packed = {gate_pair(packed.x, gates.x), gate_pair(packed.y, gates.y)};
        *(uint2 *)(out + row * c.o.head + col) = packed;
    }
}

template <int WARPS> struct warp_ends {
    float max[WARPS][GROUP], sum[WARPS][GROUP];
};

/* Join what the warps of a block have of its piece, and the pieces if it is the last block of its
 * KV head. `joined` is [WARPS][GROUP][D] of shared memory and free, max[] times the scale. */
template <int D, int WARPS, bool GATED>
__device__ __forceinline__ void finish(const qv_k_attention_args &c, const piece_of_context &piece,
                                       float (&o)[D / 8][4], float (&max)[2], float (&sum)[2],
                                       float *joined, warp_ends<WARPS> &ends, bool &is_last)
{
    constexpr int THREADS = 32 * WARPS;
    int seq = blockIdx.z, kv_head = blockIdx.y, group = c.n_heads / c.n_kv_heads;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    float scale = c.scale * LOG2_E;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        if (t == 0) {
            ends.max[warp][g + 8 * r] = max[r] * scale;
            ends.sum[warp][g + 8 * r] = sum[r];
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float whole = -INFINITY;
        for (int w = 0; w < WARPS; w++)
            whole = fmaxf(whole, ends.max[w][g + 8 * r]);
        float factor = max[r] == -INFINITY ? 0.0f : exp2f(max[r] * scale - whole);
        float *row = joined + (warp * GROUP + g + 8 * r) * D;
        if (g + 8 * r < group)
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                *(float2 *)(row + i * 8 + 2 * t) =
                    make_float2(o[i][2 * r] * factor, o[i][2 * r + 1] * factor);
    }
    __syncthreads();

    /* Store: the result, or a piece of it. */
    float *sums = piece_sums(c, seq, kv_head, blockIdx.x);
    for (int i = threadIdx.x; i < group * D / 4; i += THREADS) {
        int row = i * 4 / D, col = i * 4 % D;
        float whole = -INFINITY, total = 0;
        float4 v = {0, 0, 0, 0};
        uint2 gates = {};
        if (GATED && piece.n_pieces == 1)
            gates = *(const uint2 *)(gate_at(c, piece.token, kv_head * group + row) + col);
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            whole = fmaxf(whole, ends.max[w][row]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (ends.max[w][row] != -INFINITY)
                total += ends.sum[w][row] * exp2f(ends.max[w][row] - whole);
            float4 part = *(const float4 *)(joined + (w * GROUP + row) * D + col);
            v.x += part.x;
            v.y += part.y;
            v.z += part.z;
            v.w += part.w;
        }
        if (piece.n_pieces == 1) {
            float f = 1.0f / total;
            uint2 packed = {pack_bf16(v.x * f, v.y * f), pack_bf16(v.z * f, v.w * f)};
            if (GATED)
                packed = {gate_pair(packed.x, gates.x), gate_pair(packed.y, gates.y)};
            *(uint2 *)((bf16 *)c.o.data + piece.token * c.o.token +
                       (kv_head * group + row) * c.o.head + col) = packed;
            continue;
        }
        *(float4 *)(sums + row * D + col) = v;
        if (col == 0) {
            sums[group * D + 2 * row] = whole;
            sums[group * D + 2 * row + 1] = total;
        }
    }
    if (piece.n_pieces == 1)
        return;

    /* The last block adds the pieces up. The counter wraps to 0 for the next launch. */
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        is_last = atomicInc(&c.counters[seq * c.n_kv_heads + kv_head],
                            (unsigned)piece.n_pieces - 1) == (unsigned)piece.n_pieces - 1;
    __syncthreads();
    if (!is_last)
        return;
    __threadfence();
    join_pieces<D, THREADS, GATED>(c, piece_sums(c, seq, kv_head, 0), piece.n_pieces, group, joined,
                                   GATED ? gate_at(c, piece.token, kv_head * group) : nullptr,
                                   (bf16 *)c.o.data + piece.token * c.o.token +
                                       kv_head * group * c.o.head);
}

/* A block for each piece of a sequence and KV head. */
template <typename... ARGS, typename... GIVEN>
cudaError_t launch_pieces(const qv_k_attention_args &c, void (*kernel)(ARGS...), int threads,
                          int bytes, cudaStream_t s, const GIVEN &...given)
{
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess)
        return error;
    dim3 grid((unsigned)c.n_splits, (unsigned)c.n_kv_heads, (unsigned)c.n_seqs);
    return launch_early(c.hopper, kernel, grid, (unsigned)threads, (size_t)bytes, s, given...);
}

#endif
