/* The grouped GEMM of routed experts, y[p] = W_e x[row of p].
 *
 * Few pairs an expert (decode): bound by reading the weights of the experts that have any, 2 n_out
 * n_in bytes each. A block is an expert and 64 of its rows; the weights go straight into fragments
 * (skinny.cuh) and are read once for up to 32 pairs.
 *
 * Many (prefill): tiles of 64 pairs by 128 rows through shared memory, three stages of asynchronous
 * copies, on the tensor cores. Pairs are gathered by row address while they are copied. On Hopper,
 * of pairs that have a row each, moe_gemm_hopper.cu, and with a short k moe_gemm_stay.cu.
 */
#include "kernels/moe_gemm.cuh"
#include "kernels/skinny.cuh"

namespace
{

/* The places of an expert. Of one token each expert has a pair at most, and the pairs stand in the
 * order of experts in both lists, so that nothing need be looked up. */
struct places {
    int first, n;
};

__device__ __forceinline__ places places_of(const qv_k_list &list, int index, int expert)
{
    if (list.n_tokens == 1)
        return {index, 1};
    int first = list.expert_start[expert];
    return {first, list.expert_start[expert + 1] - first};
}

__device__ __forceinline__ const bf16 *x_of(const qv_k_list &list, const qv_k_moe_linear_args &c,
                                            int place)
{
    int64_t row = c.x_pairs ? place : list.n_tokens == 1 ? 0 : list.pair[place] / list.top_k;
    return (const bf16 *)c.x + row * c.x_stride;
}

/* Eight products of a row, rounded, with what is done to them; `up` of SWIGLU. */
__device__ __forceinline__ uint4 activate8(qv_k_moe_act act, uint4 v, uint4 up)
{
    if (act == QV_K_MOE_PLAIN)
        return v;
    bf16x8 out;
    float x[8], y[8];
    unpack8(*(const bf16x8 *)&v, x);
    unpack8(*(const bf16x8 *)&up, y);
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = act == QV_K_MOE_SWIGLU ? swiglu(x[i], y[i]) : relu2(x[i]);
    out = pack8(x);
    return *(const uint4 *)&out;
}

/* --- Few pairs an expert ------------------------------------------------------------------ */

constexpr int FEW_ROWS = 64;   /* rows of the matrix of a block: 4 warps of 16 */
constexpr int FEW_SPLITS = 2;  /* ranges of k, beside each other */
constexpr int FEW_TOKENS = 32; /* pairs that share a pass over the weights */
constexpr int FEW_THREADS = 32 * (FEW_ROWS / 16) * FEW_SPLITS;

constexpr int FEW_EARLY = 4; /* tokens */

/* What a warp reads first of its rows, 128 numbers each, on their way into the L2 cache before its
 * pairs and their rows of x have been looked up, and where the list was there before, while the
 * product in front still runs. Only for a few tokens: with more blocks than the device has room for
 * it disturbs those that read (docs/performance.md). */
__device__ __forceinline__ void call_first(const qv_k_moe_linear_args &c, const bf16 *w, int n_rows)
{
    int lane = threadIdx.x & 31, row = lane & 15;
    int64_t begin, end;
    split_range(c.n_in, (threadIdx.x >> 5) / (FEW_ROWS / 16), FEW_SPLITS, begin, end);
    begin += (lane >> 4) * 64;
    if (row < n_rows && begin < end)
        prefetch(w + row * c.n_in + begin);
}

/* `w` is this warp's first row, `n_rows` what is left from there. */
template <int NT, bool ALIGNED>
__device__ __forceinline__ void few_product(const qv_k_moe_linear_args &c, const bf16 *w,
                                            int n_rows, const bf16 *const *x, int n_x,
                                            float (*sums)[FEW_ROWS][FEW_TOKENS + 1])
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int group = warp % (FEW_ROWS / 16) * 16, split = warp / (FEW_ROWS / 16);
    int64_t begin, end;
    split_range(c.n_in, split, FEW_SPLITS, begin, end);
    float acc[NT][4] = {};
    skinny_product<NT, ALIGNED>(w, c.n_in, n_rows, x, n_x, begin, end, acc);
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            sums[split][group + (lane >> 2) + (j >> 1) * 8][i * 8 + (lane & 3) * 2 + (j & 1)] =
                acc[i][j];
}

/* Grid (tiles of rows, experts with pairs). A tile of SWIGLU is 32 rows of the gate and the same of
 * the other half. */
template <bool ALIGNED>
__global__ void __launch_bounds__(FEW_THREADS, 2) few_kernel(qv_k_list list, qv_k_moe_linear_args c)
{
    __shared__ const bf16 *x[FEW_TOKENS];
    __shared__ float sums[FEW_SPLITS][FEW_ROWS][FEW_TOKENS + 1];
    let_next_start();
    int n_active = list.work[0], item = list.work[2 + 2 * blockIdx.y]; /* both on their way */
    if ((int)blockIdx.y >= n_active)
        return;
    int expert = item & EXPERT_MASK, thread = threadIdx.x;
    const places at = places_of(list, blockIdx.y, expert);
    int width = c.act == QV_K_MOE_SWIGLU ? FEW_ROWS / 2 : FEW_ROWS; /* columns of y */
    int group = (thread >> 5) % (FEW_ROWS / 16) * 16;
    int64_t col = (int64_t)blockIdx.x * width, row = col + group % width;
    int n_cols = (int)min((int64_t)width, y_columns(c) - col);
    int n_rows = (int)max((int64_t)0, min((int64_t)16, y_columns(c) - row));
    if (group >= width)
        row += c.n_out / 2;
    const bf16 *w = (const bf16 *)c.w + expert * c.w_expert + (n_rows > 0 ? row : 0) * c.n_in;
    if (list.n_tokens <= FEW_EARLY)
        call_first(c, w, n_rows);
    wait_for_previous(); /* for x */
    for (int done = 0; done < at.n; done += FEW_TOKENS) {
        int n = min(FEW_TOKENS, at.n - done);
        __syncthreads();
        if (thread < n)
            x[thread] = x_of(list, c, at.first + done + thread);
        __syncthreads();
        if (n <= 8)
            few_product<1, ALIGNED>(c, w, n_rows, x, n, sums);
        else if (n <= 16)
            few_product<2, ALIGNED>(c, w, n_rows, x, n, sums);
        else
            few_product<4, ALIGNED>(c, w, n_rows, x, n, sums);
        __syncthreads();
        for (int i = thread; i < n * width; i += FEW_THREADS) {
            int p = i / width, r = i % width;
            float sum = sums[0][r][p], up = sums[0][r + FEW_ROWS - width][p];
#pragma unroll
            for (int s = 1; s < FEW_SPLITS; s++) {
                sum += sums[s][r][p];
                up += sums[s][r + FEW_ROWS - width][p];
            }
            if (c.act == QV_K_MOE_SWIGLU)
                sum = swiglu(round_bf16(sum), round_bf16(up));
            else if (c.act == QV_K_MOE_RELU2)
                sum = relu2(round_bf16(sum));
            if (r < n_cols)
                ((bf16 *)c.y)[(at.first + done + p) * c.y_stride + col + r] = __float2bfloat16(sum);
        }
    }
}

/* --- Many, on any device ------------------------------------------------------------------ */

constexpr int MANY_PAIRS = QV_K_MOE_TILE; /* of a tile */
constexpr int MANY_ROWS = 128;            /* rows of the matrix of a tile */
constexpr int MANY_K = 64;
constexpr int MANY_STAGES = 3;
constexpr int MANY_THREADS = 256;

struct many_stage {
    bf16 x[MANY_PAIRS * MANY_K], w[MANY_ROWS * MANY_K];
};

__device__ __forceinline__ void load_many(many_stage &m, const bf16 *const *x, const bf16 *w,
                                          int64_t w_stride, int width, int64_t jump, int n_cols,
                                          int64_t k, int64_t n_in)
{
    int col = threadIdx.x % 8 * 8;
    bool inside = k + col < n_in;
#pragma unroll
    for (int i = 0; i < MANY_PAIRS / 32; i++) {
        int row = threadIdx.x / 8 + 32 * i;
        const bf16 *from = x[row];
        copy16(m.x + tile_at<MANY_K>(row, col), from ? from + k + col : w, from && inside);
    }
#pragma unroll
    for (int i = 0; i < MANY_ROWS / 32; i++) {
        int row = threadIdx.x / 8 + 32 * i;
        bool valid = row % width < n_cols && inside;
        int64_t from = row + (row >= width ? jump : 0);
        copy16(m.w + tile_at<MANY_K>(row, col), valid ? w + from * w_stride + k + col : w, valid);
    }
}

/* Rows from `width` on lie `jump` further: a tile of SWIGLU is 64 rows of both halves.
 * Grid (tiles of rows, tiles of pairs), 8 warps as 2 x 4 over MANY_PAIRS x 128. */
__global__ void __launch_bounds__(MANY_THREADS, 3)
    many_kernel(qv_k_list list, qv_k_moe_linear_args c)
{
    extern __shared__ __align__(128) char many_memory[];
    many_stage *stage = (many_stage *)many_memory;
    __shared__ const bf16 *x[MANY_PAIRS];
    constexpr int MT = MANY_PAIRS / 32; /* tiles of 16 pairs of a warp */
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;

    /* Which expert. */
    const int32_t *work = list.work;
    int tile = blockIdx.y, low = 0, high = work[0];
    if (tile >= work[1])
        return;
    while (high - low > 1) {
        int middle = (low + high) >> 1;
        if (work[3 + 2 * middle] <= tile)
            low = middle;
        else
            high = middle;
    }
    int width = c.act == QV_K_MOE_SWIGLU ? MANY_ROWS / 2 : MANY_ROWS; /* columns of y */
    int64_t y_col = (int64_t)blockIdx.x * width, jump = c.n_out / 2 - width;
    int n_cols = (int)min((int64_t)width, y_columns(c) - y_col);
    int expert = work[2 + 2 * low] & EXPERT_MASK, end = list.expert_start[expert + 1];
    int first = list.expert_start[expert] + (tile - work[3 + 2 * low]) * QV_K_MOE_TILE;
    int n = min(MANY_PAIRS, end - first);
    const bf16 *w = (const bf16 *)c.w + expert * c.w_expert + y_col * c.n_in;
    if (thread < MANY_PAIRS)
        x[thread] = thread < n ? x_of(list, c, first + thread) : nullptr;
    __syncthreads();

    int64_t steps = (c.n_in + MANY_K - 1) / MANY_K;
#pragma unroll
    for (int i = 0; i < MANY_STAGES - 1; i++) {
        if (i < steps)
            load_many(stage[i], x, w, c.n_in, width, jump, n_cols, i * MANY_K, c.n_in);
        copies_commit();
    }
    int pair_row = (warp & 1) * (MANY_PAIRS / 2), w_row = (warp >> 1) * 32;
    float acc[MT][4][4] = {};
    for (int64_t step = 0; step < steps; step++) {
        copies_wait<MANY_STAGES - 2>();
        __syncthreads(); /* this stage is there, the one before has been read */
        if (step + MANY_STAGES - 1 < steps)
            load_many(stage[(step + MANY_STAGES - 1) % MANY_STAGES], x, w, c.n_in, width, jump,
                      n_cols, (step + MANY_STAGES - 1) * MANY_K, c.n_in);
        copies_commit();
        const many_stage &m = stage[step % MANY_STAGES];
#pragma unroll
        for (int k = 0; k < MANY_K; k += 16) {
            uint32_t a[MT][4], b[2][4];
#pragma unroll
            for (int i = 0; i < MT; i++)
                load_a<MANY_K>(a[i], m.x, pair_row + i * 16, k);
#pragma unroll
            for (int j = 0; j < 2; j++)
                load_b<MANY_K>(b[j], m.w, w_row + j * 16, k);
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    mma(acc[i][j], a[i], b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
        }
    }

    /* Store through shared memory, so that rows leave in pieces of 16 bytes. */
    copies_wait<0>();
    __syncthreads();
    bf16 *out = (bf16 *)many_memory; /* [MANY_PAIRS][128], a tile */
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *(uint32_t *)(out + tile_at<MANY_ROWS>(pair_row + i * 16 + (lane >> 2) + 8 * half,
                                                       w_row + j * 8 + (lane & 3) * 2)) =
                    pack_bf16(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
    __syncthreads();
    for (int i = thread; i < n * (width / 8); i += MANY_THREADS) {
        int p = i / (width / 8), col = i % (width / 8) * 8;
        if (col < n_cols)
            *(uint4 *)((bf16 *)c.y + (first + p) * c.y_stride + y_col + col) =
                activate8(c.act, *(const uint4 *)(out + tile_at<MANY_ROWS>(p, col)),
                          *(const uint4 *)(out + tile_at<MANY_ROWS>(p, col + MANY_ROWS - width)));
    }
}

void launch_many(const qv_k_list &list, const qv_k_moe_linear_args &c, int64_t n_pairs,
                 int64_t n_active, cudaStream_t stream)
{
    const int bytes = (int)sizeof(many_stage) * MANY_STAGES;
    cudaFuncSetAttribute(many_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int64_t tiles = n_pairs / MANY_PAIRS + n_active; /* each expert's last may be a part of one */
    int width = c.act == QV_K_MOE_SWIGLU ? MANY_ROWS / 2 : MANY_ROWS;
    dim3 grid((unsigned)((y_columns(c) + width - 1) / width), (unsigned)tiles);
    many_kernel<<<grid, MANY_THREADS, bytes, stream>>>(list, c);
}

} // namespace

/* Below, the weights bound it, and reading them once into fragments does as well. */
static constexpr int WANTED_PAIRS = 8; /* an expert */

/* With fewer, the matrices bound it, of which moe_gemm_hopper.cu has more on their way. */
static constexpr int STAY_WANTED = 192; /* an expert */

bool qv_k_moe_wants_pairs(const qv_k_list *list)
{
    int64_t n_pairs = (int64_t)list->n_tokens * list->top_k;
    int64_t n_active = n_pairs < list->n_experts ? n_pairs : list->n_experts;
    return !list->one_form && n_pairs > WANTED_PAIRS * n_active && qv_k_is_hopper();
}

/* The tiled form above 32 pairs an expert: from there on a second pass over the weights would cost
 * more than the padding of tiles. With one form, that for few pairs, pass after pass: it sums a
 * pair in the same order whatever is beside it. */
qv_status qv_k_moe_linear(const qv_k_list *list, const qv_k_moe_linear_args *args, void *stream)
{
    const qv_k_moe_linear_args &c = *args;
    cudaStream_t on = (cudaStream_t)stream;
    int64_t n_pairs = (int64_t)list->n_tokens * list->top_k;
    int64_t n_active = n_pairs < list->n_experts ? n_pairs : list->n_experts;
    if (n_pairs == 0)
        return QV_OK;
    bool aligned = c.n_in % 8 == 0 && c.x_stride % 8 == 0 && c.w_expert % 8 == 0 &&
                   (uintptr_t)c.x % 16 == 0 && (uintptr_t)c.w % 16 == 0;
    bool tiles =
        aligned && y_columns(c) % 8 == 0 && c.y_stride % 8 == 0 && (uintptr_t)c.y % 16 == 0;
    tiles = tiles && !list->one_form;
    if (tiles && c.x_pairs && c.w_expert == c.n_out * c.n_in && qv_k_moe_wants_pairs(list)) {
        bool stay = n_pairs >= STAY_WANTED * n_active && c.n_in <= MOE_STAY_K &&
                    c.n_out % 16 == 0 && c.act == QV_K_MOE_PLAIN;
        return stay ? qv_k_moe_linear_stay(list, args, n_active, stream)
                    : qv_k_moe_linear_hopper(list, args, n_active, stream);
    }
    if (tiles && n_pairs > FEW_TOKENS * n_active) {
        launch_many(*list, c, n_pairs, n_active, on);
    } else {
        int width = c.act == QV_K_MOE_SWIGLU ? FEW_ROWS / 2 : FEW_ROWS;
        dim3 grid((unsigned)((y_columns(c) + width - 1) / width), (unsigned)n_active);
        bool early = c.list_is_there && list->n_tokens <= FEW_EARLY;
        cudaError_t error = launch_early(early, aligned ? few_kernel<true> : few_kernel<false>,
                                         grid, FEW_THREADS, 0, stream, *list, c);
        if (error != cudaSuccess)
            return qv_fail(QV_ERR_DEVICE, "cuda: moe_linear: %s", cudaGetErrorString(error));
    }
    return qv_k_check_launch("moe_linear");
}
