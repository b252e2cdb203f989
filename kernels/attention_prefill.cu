/* Causal attention of sequences with several tokens in this step, over everything in their pages. A
 * block is 16 query tokens a warp of one head; it walks the keys in tiles, two tiles in flight,
 * with an online softmax. 4 * T^2 / 2 * head_dim FLOP a head: bound by the tensor cores, here by
 * the rate of mma.sync. Blocks find their sequence themselves; those of late tokens, which see most
 * keys, come first.
 */
#include "kernels/attention.cuh"

extern "C" qv_status qv_k_attention_decode(const qv_k_attention_args *c, bool large, void *stream);
extern "C" qv_status qv_k_attention_hopper(const qv_k_attention_args *c, void *stream);

namespace
{

template <int D, int WARPS, int KEYS> struct prefill_shape {
    static constexpr int QUERIES = 16 * WARPS;
    static constexpr int STAGE = 2 * KEYS * D;
    static constexpr int BYTES = (2 * STAGE + QUERIES * D) * (int)sizeof(bf16);
};

template <int D, int WARPS, int KEYS, bool GATED>
__global__ void __launch_bounds__(32 * WARPS) prefill_kernel(qv_k_attention_args c)
{
    using shape = prefill_shape<D, WARPS, KEYS>;
    constexpr int THREADS = 32 * WARPS, QUERIES = shape::QUERIES, N = KEYS / 8;
    extern __shared__ __align__(16) bf16 memory[];
    __shared__ int64_t row_at[2][KEYS];
    bf16 *q_tile = memory + 2 * shape::STAGE;
    int head = blockIdx.x, kv_head = head / (c.n_heads / c.n_kv_heads), in_seq;
    int seq = find_tile<QUERIES>(c, 1, gridDim.y - 1 - blockIdx.y, &in_seq);
    if (seq < 0)
        return;
    int token = c.seq_start[seq] + in_seq * QUERIES, stop = c.seq_start[seq + 1];
    int n_rows = stop - token < QUERIES ? stop - token : QUERIES;
    int pos = c.pos[token], end = pos + n_rows; /* keys that the last row sees */
    const int32_t *pages = c.page_table + (int64_t)seq * c.page_stride;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;

    /* Load: the queries with the first keys. */
    for (int i = threadIdx.x; i < QUERIES * D / 8; i += THREADS) {
        int row = i / (D / 8), col = i % (D / 8) * 8;
        const bf16 *q = (const bf16 *)c.q.data + (token + (row < n_rows ? row : 0)) * c.q.token +
                        head * c.q.head + col;
        copy16(q_tile + tile_at<D>(row, col), q, row < n_rows);
    }
    int n_tiles = (end + KEYS - 1) / KEYS;
    find_rows<KEYS>(row_at[0], c, pages, kv_head, 0, end);
    auto load = [&](int tile) {
        __syncthreads();
        if (tile < n_tiles) {
            bf16 *stage = memory + tile % 2 * shape::STAGE;
            load_rows<D, KEYS, THREADS>(stage, (const bf16 *)c.k_pages, row_at[tile & 1]);
            load_rows<D, KEYS, THREADS>(stage + KEYS * D, (const bf16 *)c.v_pages,
                                        row_at[tile & 1]);
            find_rows<KEYS>(row_at[(tile + 1) & 1], c, pages, kv_head, (tile + 1) * KEYS, end);
        }
        copies_commit();
    };
    load(0);

    /* Compute. */
    float o[D / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {}, keep[2];
    float scale = c.scale * LOG2_E;
    int first_row = pos + warp * 16 + g; /* the position of row g; row g + 8 is 8 later */
    for (int tile = 0; tile < n_tiles; tile++) {
        load(tile + 1); /* its barrier: all have left the stage that it writes */
        copies_wait<1>();
        __syncthreads();
        const bf16 *stage = memory + tile % 2 * shape::STAGE;
        /* Warps whose rows are all before this tile have nothing to do in it. */
        if (tile * KEYS <= pos + warp * 16 + 15) {
            float s[N][4];
            scores<D, N>(s, q_tile, warp * 16, stage, 0);
            if ((tile + 1) * KEYS > pos + warp * 16 + 1) {
#pragma unroll
                for (int i = 0; i < N; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        if (tile * KEYS + i * 8 + 2 * t + (j & 1) > first_row + (j >> 1) * 8)
                            s[i][j] = -INFINITY;
            }
            softmax_step<N>(s, scale, max, sum, keep);
#pragma unroll
            for (int i = 0; i < D / 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    o[i][j] *= keep[j >> 1];
            add_values<D, N>(o, s, stage + KEYS * D, 0);
        }
    }
    copies_wait<0>();

    /* Store. */
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        int row = warp * 16 + g + 8 * r;
        if (row >= n_rows)
            continue;
        bf16 *out = (bf16 *)c.o.data + (token + row) * c.o.token + head * c.o.head;
        const bf16 *gate = GATED ? gate_at(c, token + row, head) : nullptr;
        float inverse = 1.0f / sum[r];
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            uint32_t packed = pack_bf16(o[i][2 * r] * inverse, o[i][2 * r + 1] * inverse);
            *(uint32_t *)(out + i * 8 + 2 * t) =
                GATED ? gate_pair(packed, *(const uint32_t *)(gate + i * 8 + 2 * t)) : packed;
        }
    }
}

template <int D, int WARPS, int KEYS>
cudaError_t launch(const qv_k_attention_args &c, cudaStream_t s)
{
    using shape = prefill_shape<D, WARPS, KEYS>;
    auto *kernel =
        c.gate.data ? prefill_kernel<D, WARPS, KEYS, true> : prefill_kernel<D, WARPS, KEYS, false>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::BYTES);
    if (error != cudaSuccess)
        return error;
    int tiles = c.n_tokens / shape::QUERIES + c.n_seqs;
    dim3 grid((unsigned)c.n_heads, (unsigned)tiles);
    kernel<<<grid, 32 * WARPS, shape::BYTES, s>>>(c);
    return cudaSuccess;
}

/* Whether a block may have 200 KiB of shared memory (9.0 and later, but not 12.x). */
bool has_large_blocks()
{
    int device = 0, bytes = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
               cudaSuccess &&
           bytes >= 200 << 10;
}

/* --- Any head dim ------------------------------------------------------------------------- */

constexpr int MAX_D = 1024;

/* A warp a token and head; key after key. */
__global__ void __launch_bounds__(32) any_kernel(qv_k_attention_args c)
{
    int t = blockIdx.x, head = blockIdx.y, lane = threadIdx.x;
    if (t >= c.seq_start[c.n_seqs])
        return;
    int seq = range_of(c.seq_start, c.n_seqs, t), kv_head = head / (c.n_heads / c.n_kv_heads);
    const int32_t *pages = c.page_table + (int64_t)seq * c.page_stride;
    const bf16 *q = (const bf16 *)c.q.data + t * c.q.token + head * c.q.head;
    float o[MAX_D / 32] = {}, max = -INFINITY, sum = 0;
    for (int p = 0; p <= c.pos[t]; p++) {
        int64_t at = key_at(c, pages, p, kv_head);
        const bf16 *k = (const bf16 *)c.k_pages + at, *v = (const bf16 *)c.v_pages + at;
        float dot = 0;
        for (int i = lane; i < c.head_dim; i += 32)
            dot = fmaf(to_float(q[i]), to_float(k[i]), dot);
        dot = warp_sum(dot) * c.scale;
        float now = fmaxf(max, dot), keep = expf(max - now), weight = expf(dot - now);
        sum = sum * keep + weight;
        max = now;
#pragma unroll
        for (int i = 0; i < MAX_D / 32; i++)
            if (i * 32 + lane < c.head_dim)
                o[i] = o[i] * keep + weight * to_float(v[i * 32 + lane]);
    }
    bf16 *out = (bf16 *)c.o.data + t * c.o.token + head * c.o.head;
    const bf16 *gate = c.gate.data ? gate_at(c, t, head) : nullptr;
#pragma unroll
    for (int i = 0; i < MAX_D / 32; i++)
        if (i * 32 + lane < c.head_dim) {
            bf16 x = __float2bfloat16(o[i] / sum);
            if (gate)
                x = __float2bfloat16(to_float(x) * sigmoid(to_float(gate[i * 32 + lane])));
            out[i * 32 + lane] = x;
        }
}

bool aligned(const qv_k_rows &r)
{
    return (uintptr_t)r.data % 16 == 0 && r.token % 8 == 0 && r.head % 8 == 0;
}

} // namespace

bool qv_k_attention_can(const qv_k_attention_args *c)
{
    int32_t d = c->head_dim;
    return (d == 64 || d == 128 || d == 256) && c->n_heads / c->n_kv_heads <= 16 && aligned(c->q) &&
           aligned(c->o) && aligned(c->gate) && (uintptr_t)c->k_pages % 16 == 0 &&
           (uintptr_t)c->v_pages % 16 == 0;
}

qv_status qv_k_attention(const qv_k_attention_args *c, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    bool large = has_large_blocks();
    if (c->n_tokens > 0 && c->n_seqs > 0 && !c->one_form)
        QV_TRY(qv_k_attention_decode(c, large, stream));
    if (c->max_seq_tokens <= 1 && !c->one_form)
        return QV_OK;
    if (has_boxes(*c))
        return qv_k_attention_hopper(c, stream);
    cudaError_t error = cudaSuccess;
    switch (c->head_dim) {
    case 64:
        error = launch<64, 8, 64>(*c, s);
        break;
    case 128:
        error = launch<128, 8, 64>(*c, s);
        break;
    default:
        error = large ? launch<256, 8, 64>(*c, s) : launch<256, 4, 32>(*c, s);
        break;
    }
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: attention_prefill: %s", cudaGetErrorString(error));
    return qv_k_check_launch("attention_prefill");
}

qv_status qv_k_any_attention(const qv_k_attention_args *c, void *stream)
{
    if (c->head_dim > MAX_D)
        return qv_fail(QV_ERR_LIMIT, "attention: heads of %d, but %d are possible", c->head_dim,
                       MAX_D);
    dim3 grid((unsigned)c->n_tokens, (unsigned)c->n_heads);
    any_kernel<<<grid, 32, 0, (cudaStream_t)stream>>>(*c);
    return qv_k_check_launch("attention");
}
