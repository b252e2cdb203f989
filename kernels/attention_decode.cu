/* Attention of sequences with one new token: every key and value is read once, 2 * 2 * context *
 * head_dim bytes a KV head, so it is bound by bandwidth. The query heads of a KV head are the 16
 * rows of one fragment. A context is cut into pieces that blocks take side by side; the last block
 * of a KV head to arrive adds the pieces up, in their order, so that the result does not depend on
 * who it was.
 *
 * A block walks its piece in tiles of 16 keys a warp, loaded ahead by asynchronous copies. Each
 * warp keeps a softmax of its own over its keys; they are joined at the end in shared memory.
 */
#include "kernels/attention_pieces.cuh"

extern "C" qv_status qv_k_attention_decode_hopper(const qv_k_attention_args *c, void *stream);

namespace
{

template <int D, int WARPS, int STAGES> struct decode_shape {
    static constexpr int TILE = 16 * WARPS;    /* keys of a stage */
    static constexpr int STAGE = 2 * TILE * D; /* numbers: keys, then values */
    static constexpr int BYTES = (STAGES * STAGE + GROUP * D) * (int)sizeof(bf16);
    /* Afterwards the stages hold the sums of the warps. */
    static_assert(STAGES * STAGE * (int)sizeof(bf16) >= WARPS * GROUP * D * (int)sizeof(float), "");
};

template <int D, int WARPS, int STAGES, bool GATED>
__global__ void __launch_bounds__(32 * WARPS) decode_kernel(qv_k_attention_args c)
{
    using shape = decode_shape<D, WARPS, STAGES>;
    constexpr int THREADS = 32 * WARPS, TILE = shape::TILE;
    extern __shared__ __align__(16) bf16 memory[];
    __shared__ warp_ends<WARPS> ends;
    __shared__ int64_t row_at[2][TILE];
    __shared__ bool is_last;

    piece_of_context piece = find_piece<TILE>(c);
    if (piece.begin >= piece.end) {
        wait_for_previous(); /* whoever waits for this kernel also waits for those before it */
        return;
    }
    int kv_head = blockIdx.y, token = piece.token, begin = piece.begin, end = piece.end;
    int group = c.n_heads / c.n_kv_heads;
    const int32_t *pages = c.page_table + (int64_t)blockIdx.z * c.page_stride;
    bf16 *q_tile = memory + STAGES * shape::STAGE;
    int warp = threadIdx.x >> 5, t = threadIdx.x & 3;

    int n_tiles = (end - begin + TILE - 1) / TILE;
    /* Rows of tile i are found one tile ahead of its copies. So far only the batch has been read,
     * which was there before the kernel in front of this one began. */
    find_rows<TILE>(row_at[0], c, pages, kv_head, begin, end);
    wait_for_previous();
    let_next_start();

    /* Load: the queries with the first stage. */
    for (int i = threadIdx.x; i < GROUP * D / 8; i += THREADS) {
        int row = i / (D / 8), col = i % (D / 8) * 8;
        const bf16 *q = (const bf16 *)c.q.data + token * c.q.token +
                        (kv_head * group + (row < group ? row : 0)) * c.q.head + col;
        copy16(q_tile + tile_at<D>(row, col), q, row < group);
    }
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

    copies_wait<0>();
    finish<D, WARPS, GATED>(c, piece, o, max, sum, (float *)memory, ends, is_last);
}

template <int D, int WARPS, int STAGES>
cudaError_t launch(const qv_k_attention_args &c, cudaStream_t s)
{
    auto *kernel = c.gate.data ? decode_kernel<D, WARPS, STAGES, true>
                               : decode_kernel<D, WARPS, STAGES, false>;
    return launch_pieces(c, kernel, 32 * WARPS, decode_shape<D, WARPS, STAGES>::BYTES, s, c);
}

} // namespace

/* As many blocks as the device has room for (two to a multiprocessor): more only adds beginnings
 * and ends. At least 4, for the sake of contexts that are longer than others. */
int32_t qv_k_attention_splits(int32_t n_seqs, int32_t n_kv_heads, int32_t n_sms)
{
    int64_t pairs = (int64_t)n_seqs * n_kv_heads;
    int64_t n = pairs > 0 ? 2 * (int64_t)n_sms / pairs : 1;
    return n < 4 ? 4 : n > MAX_PIECES ? MAX_PIECES : (int32_t)n;
}

size_t qv_k_attention_scratch(int32_t n_seqs, int32_t n_heads, int32_t head_dim, int32_t n_splits)
{
    return (size_t)n_seqs * (size_t)n_heads * (size_t)n_splits * ((size_t)head_dim + 4) *
           sizeof(float);
}

/* Declared in attention_prefill.cu. `large`: whether a block may have more than 100 KiB. */
extern "C" qv_status qv_k_attention_decode(const qv_k_attention_args *c, bool large, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    cudaError_t error = cudaSuccess;
    if (has_boxes(*c))
        return qv_k_attention_decode_hopper(c, stream);
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
