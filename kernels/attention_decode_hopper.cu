/* Decode attention by Hopper's copy engine: what attention_decode.cu computes, for pages of a
 * multiple of 16 tokens; bound by bandwidth all the more.
 *
 * Each warp walks boxes of 16 keys by itself, every STREAM_WARPS-th of the piece: units of shared
 * memory take the keys and the values of a box in turn, and are filled again as soon as the warp
 * has read them. So a block waits for its other warps only at its end, and two blocks share a
 * multiprocessor: one streams while the other begins or ends.
 */
#include "kernels/attention_pieces.cuh"
#include "kernels/wgmma.cuh"

extern "C" qv_status qv_k_attention_decode_hopper(const qv_k_attention_args *c, void *stream);

namespace
{

constexpr int STREAM_WARPS = 4;

template <int D, int UNITS> struct stream_shape {
    static constexpr int UNIT = PAGE_BOX * D; /* numbers: [D / 64] tiles [16][64] */
    static constexpr int BYTES = STREAM_WARPS * UNITS * UNIT * (int)sizeof(bf16) + 1024;
    static_assert(UNITS >= 2, "afterwards the units hold the sums of the warps");
    static_assert(UNITS * UNIT * (int)sizeof(bf16) % 1024 == 0 && 2 * BYTES < 220 << 10, "");
};

/* Fills a warp's units, one after the other. */
template <int D, int UNITS> struct stream {
    const CUtensorMap *k_map, *v_map;
    const int32_t *pages;
    int page_tokens, kv_head, first; /* first: position of the warp's first box */
    int n;                           /* units in all */
    bf16 *units;
    uint64_t *full; /* [UNITS] */
    int next, slot; /* unit to be filled */
    int row;        /* of this lane's box, of the 32 that `next` is among */

    /* Before the first of 32 boxes: where they are. Reads nothing but the batch. */
    __device__ __forceinline__ void find()
    {
        int box = next / 2 + (threadIdx.x & 31), p = first + box * STREAM_WARPS * PAGE_BOX;
        int page = p / page_tokens;
        row = 2 * box < n ? pages[page] * page_tokens + p - page * page_tokens : 0;
    }

    /* The whole warp; it has read what was in the place. */
    __device__ __forceinline__ void fill()
    {
        if (next >= n)
            return;
        int lane = threadIdx.x & 31;
        if (next % 64 == 0 && next > 0)
            find();
        int at = __shfl_sync(0xffffffffu, row, next / 2 % 32);
        if (lane == 0)
            barrier_expect(&full[slot], PAGE_BOX * D * (int)sizeof(bf16));
        __syncwarp();
        if (lane < D / 64)
            copy_box_here(units + slot * PAGE_BOX * D + lane * PAGE_BOX * 64,
                          next & 1 ? v_map : k_map, lane * 64, kv_head, at, &full[slot]);
        next++;
        slot = slot + 1 < UNITS ? slot + 1 : 0;
    }
};

/* The queries of a KV head as fragments; rows that are not there are zero. */
template <int D>
__device__ __forceinline__ void load_queries(uint32_t (&q)[D / 16][4], const qv_k_attention_args &c,
                                             int token, int kv_head)
{
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, group = c.n_heads / c.n_kv_heads;
    const bf16 *from =
        (const bf16 *)c.q.data + token * c.q.token + (kv_head * group + g) * c.q.head + 2 * t;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            q[k][i] = g + i % 2 * 8 < group
                          ? *(const uint32_t *)(from + i % 2 * 8 * c.q.head + k * 16 + i / 2 * 8)
                          : 0;
}

template <int D, int UNITS, bool GATED>
__global__ void __launch_bounds__(32 * STREAM_WARPS, 2)
    stream_kernel(const qv_k_attention_args c, const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    using shape = stream_shape<D, UNITS>;
    extern __shared__ __align__(1024) char stream_memory[];
    __shared__ __align__(8) uint64_t full[STREAM_WARPS][UNITS];
    __shared__ warp_ends<STREAM_WARPS> ends;
    __shared__ bool is_last;
    bf16 *memory = (bf16 *)(stream_memory + (-shared_address(stream_memory) & 1023));

    piece_of_context piece = find_piece<STREAM_WARPS * PAGE_BOX>(c);
    if (piece.begin >= piece.end) {
        wait_for_previous(); /* whoever waits for this kernel also waits for those before it */
        return;
    }
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = lane & 3;
    int n_boxes = (piece.end - piece.begin + PAGE_BOX - 1) / PAGE_BOX;
    int n_own = (n_boxes - warp + STREAM_WARPS - 1) / STREAM_WARPS;
    stream<D, UNITS> in = {&k_map,
                           &v_map,
                           c.page_table + (int64_t)blockIdx.z * c.page_stride,
                           c.page_tokens,
                           (int)blockIdx.y,
                           piece.begin + warp * PAGE_BOX,
                           2 * n_own,
                           memory + warp * UNITS * shape::UNIT,
                           full[warp],
                           0,
                           0,
                           0};
    if (lane == 0) {
        for (int i = 0; i < UNITS; i++)
            barrier_init(&full[warp][i], 1);
        barriers_publish();
    }
    in.find();
    __syncwarp();
    wait_for_previous();
    let_next_start();
    for (int i = 0; i < UNITS; i++)
        in.fill();
    uint32_t q[D / 16][4];
    load_queries<D>(q, c, piece.token, blockIdx.y);

    float o[D / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {}, keep[2];
    float scale = c.scale * LOG2_E;
    int slot = 0, parity = 0;
    auto next_unit = [&]() {
        slot = slot + 1 < UNITS ? slot + 1 : 0;
        parity ^= slot == 0;
    };
    for (int box = 0; box < n_own; box++) {
        int first = in.first + box * STREAM_WARPS * PAGE_BOX;
        float s[2][2][4] = {}; /* two sums, so that products wait less for each other */
        barrier_wait(&full[warp][slot], parity);
        const bf16 *k_tile = in.units + slot * shape::UNIT;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t b[4];
            load_b<64>(b, k_tile + k / 4 * PAGE_BOX * 64, 0, k % 4 * 16);
            mma(s[k & 1][0], q[k], b[0], b[1]);
            mma(s[k & 1][1], q[k], b[2], b[3]);
        }
        __syncwarp();
        in.fill();
        next_unit();
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[0][i][j] += s[1][i][j];
                if (first + i * 8 + 2 * t + (j & 1) >= piece.end)
                    s[0][i][j] = -INFINITY;
            }
        softmax_step<2>(s[0], scale, max, sum, keep);
        if (__any_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f))
#pragma unroll
            for (int i = 0; i < D / 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    o[i][j] *= keep[j >> 1];
        const uint32_t p[4] = {pack_bf16(s[0][0][0], s[0][0][1]), pack_bf16(s[0][0][2], s[0][0][3]),
                               pack_bf16(s[0][1][0], s[0][1][1]),
                               pack_bf16(s[0][1][2], s[0][1][3])};

        barrier_wait(&full[warp][slot], parity);
        bf16 *v_tile = in.units + slot * shape::UNIT;
        if (first + PAGE_BOX > piece.end) { /* behind the context may be anything: 0 * NaN is NaN */
            int n_rows = piece.end - first;
            for (int i = lane; i < (PAGE_BOX - n_rows) * D / 8; i += 32) {
                int row = n_rows + i / (D / 8), col = i % (D / 8);
                *(uint4 *)(v_tile + col / 8 * PAGE_BOX * 64 + row * 64 + col % 8 * 8) =
                    make_uint4(0, 0, 0, 0);
            }
            __syncwarp();
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            load_b_trans<64>(b, v_tile + n / 4 * PAGE_BOX * 64, n % 4 * 16, 0);
            mma(o[2 * n], p, b[0], b[1]);
            mma(o[2 * n + 1], p, b[2], b[3]);
        }
        __syncwarp();
        in.fill();
        next_unit();
    }
    __syncthreads(); /* all have read their units */
    finish<D, STREAM_WARPS, GATED>(c, piece, o, max, sum, (float *)memory, ends, is_last);
#else
    (void)c, (void)k_map, (void)v_map;
    __trap(); /* not launched on other devices */
#endif
}

template <int D, int UNITS> qv_status launch(const qv_k_attention_args &c, cudaStream_t s)
{
    CUtensorMap k_map, v_map;
    QV_TRY(pages_map("attention_decode", c, c.k_pages, &k_map));
    QV_TRY(pages_map("attention_decode", c, c.v_pages, &v_map));
    auto *kernel = c.gate.data ? stream_kernel<D, UNITS, true> : stream_kernel<D, UNITS, false>;
    cudaError_t error = launch_pieces(c, kernel, 32 * STREAM_WARPS, stream_shape<D, UNITS>::BYTES,
                                      s, c, k_map, v_map);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: attention_decode: %s", cudaGetErrorString(error));
    return qv_k_check_launch("attention_decode");
}

} // namespace

qv_status qv_k_attention_decode_hopper(const qv_k_attention_args *c, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    switch (c->head_dim) {
    case 64:
        return launch<64, 8>(*c, s);
    case 128:
        return launch<128, 4>(*c, s);
    default:
        return launch<256, 2>(*c, s);
    }
}
