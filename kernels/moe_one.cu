/* Routed experts of one token: their choice and their two products, in two launches that read
 * weights without a pause. The numbers are those of choose.cu and moe_gemm.cu, to the same bit.
 *
 * Every block makes the choice by itself, from the logits, sooner than it would hear of it: so the
 * first product waits for the logits alone, and the second one not even for the first before it
 * asks for its weights. A block stands for the first chosen one, or the second, .. and asks for its
 * weights when it knows that one. A further block of the second makes the list for those who come
 * after.
 *
 * No multiprocessor has run this code since the layer before, and instructions come from the L2
 * cache as slowly as weights do: so the kernels are short, in loops that are not unrolled, and
 * there is one for each product and each way to choose.
 *
 * A block is 64 rows of an expert, half of them the gate's and half those of up with SwiGLU; a warp
 * 16 of them and half of k, whose numbers a thread copies to where it alone reads them. What of
 * both products is on its way at a time fits into the shared memory of a multiprocessor beside each
 * other: a block of the first and two of the second.
 *
 * While the first product waits nothing comes from memory, so it calls what a later kernel reads
 * into the L2 cache. A product that needs nothing of the choice goes beside the second.
 *
 * Memory bound: 2 n_out n_in bytes an expert.
 */
#include "kernels/moe_gemm.cuh"
#include "kernels/router.cuh"

namespace
{

constexpr int ROWS = 64;  /* of a block */
constexpr int STEP = 32;  /* of k */
constexpr int SPLITS = 2; /* of k */
constexpr int THREADS = 32 * (ROWS / 16) * SPLITS;
constexpr int AHEAD = 9; /* steps on their way */

struct one_args {
    qv_k_router_args router;
    qv_k_list list;
    qv_k_moe_linear_args c;
    qv_k_ahead ahead;        /* of the first */
    qv_k_linear_args beside; /* the second: y [1, n_out] in float32; no w: nothing */
    bool beside_first;       /* what stands beside begins in front of all */
    int tiles, width;        /* of an expert; columns of y of a tile */
    int beside_tiles;
};

struct one_shared {
    uint4 w[AHEAD][2][THREADS]; /* a thread's own */
    float sums[SPLITS][ROWS];
    int expert, place;
};

/* What follows in shared memory, on 16. */
__host__ __device__ constexpr int x_offset()
{
    return (int)(sizeof(one_shared) + 15) / 16 * 16;
}

constexpr int LONGEST = 8192; /* k */

/* --- Who is where ------------------------------------------------------------------------- */

/* Of the experts in lanes, as many as are here and in front of `expert`. */
__device__ __forceinline__ int count_before(int e, int expert)
{
    return __popc(__ballot_sync(ALL, e >= 0 && e < expert));
}

/* The list, as count_list() of choose.cu makes it, and the choice. One block. */
template <int PER> __device__ void write_list(const one_args &a)
{
    const qv_k_list &list = a.list;
    const warp_choice mine = choose_by_warp<PER>(a.router, a.router.logits);
    int lane = threadIdx.x & 31, e = lane < list.top_k ? expert_here(list, mine.id) : -1;
    int place = 0;
#pragma unroll 1
    for (int i = 0; i < list.n_experts + 1; i += THREADS) {
        int at = i + (int)threadIdx.x, before = 0;
        for (int k = 0; k < list.top_k; k++) {
            int other = __shfl_sync(ALL, e, k);
            before += other >= 0 && other < at;
            place += i == 0 && other >= 0 && other < e;
        }
        if (at <= list.n_experts)
            list.expert_start[at] = before;
    }
    if (threadIdx.x >= 32)
        return;
    int n = __popc(__ballot_sync(ALL, e >= 0));
    int slot = list.n_segs > 0 ? slot_of_pair(list, 0) : -1;
    if (lane < list.top_k) {
        a.router.ids[lane] = mine.id;
        a.router.weights[lane] = mine.weight;
        list_pair(list, lane, e, place, slot);
    }
    if (lane == 0)
        list_counts(list, n, slot);
}

/* --- A product ---------------------------------------------------------------------------- */

/* A matrix, of whose rows a tile has `width`, and as many `jump` further if that is half of ROWS.
 */
struct matrix {
    const bf16 *w;
    int n_cols, n_in, width, jump;
};

/* A thread's 8 numbers of each 32 of two rows, as skinny.cuh has them; NULL: there is no such row.
 */
struct thread_rows {
    const bf16 *low, *high;
    int at, end; /* its first k, and where the warp's range ends */
};

__device__ __forceinline__ thread_rows rows_of(const matrix &a, int tile)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int group = warp % (ROWS / 16) * 16, split = warp / (ROWS / 16);
    int col = tile * a.width + group % a.width, left = a.n_cols - col;
    int steps = (a.n_in + STEP - 1) / STEP;
    const bf16 *w = a.w + (int64_t)(col + (group >= a.width ? a.jump : 0)) * a.n_in;
    thread_rows r;
    r.at = steps * split / SPLITS * STEP + t * 8;
    r.end = min(a.n_in, steps * (split + 1) / SPLITS * STEP);
    r.low = g < left ? w + (int64_t)g * a.n_in + r.at : nullptr;
    r.high = g + 8 < left ? w + (int64_t)(g + 8) * a.n_in + r.at : nullptr;
    return r;
}

__device__ __forceinline__ void copy_step(one_shared &m, const thread_rows &r, const void *w,
                                          int slot, int step)
{
    bool there = r.at + step * STEP < r.end, low = there && r.low, high = there && r.high;
    copy16_stream(&m.w[slot][0][threadIdx.x], low ? r.low + step * STEP : w, low);
    copy16_stream(&m.w[slot][1][threadIdx.x], high ? r.high + step * STEP : w, high);
    copies_commit();
}

/* Sums of the block's rows over each half of k. */
__device__ __forceinline__ void multiply(one_shared &m, const thread_rows &r, const void *w,
                                         const bf16 *x)
{
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int steps = (r.end - r.at + t * 8 + STEP - 1) / STEP;
    float acc[4] = {};
#pragma unroll 1
    for (int step = 0, slot = 0; step < steps; step++) {
        copies_wait<AHEAD - 1>();
        int k = r.at + step * STEP;
        uint4 low = m.w[slot][0][threadIdx.x], high = m.w[slot][1][threadIdx.x];
        uint4 b = g == 0 && k < r.end ? *(const uint4 *)(x + k) : uint4{};
        const uint32_t first[4] = {low.x, high.x, low.y, high.y};
        const uint32_t second[4] = {low.z, high.z, low.w, high.w};
        mma(acc, first, b.x, b.y);
        mma(acc, second, b.z, b.w);
        copy_step(m, r, w, slot, step + AHEAD);
        slot = slot + 1 < AHEAD ? slot + 1 : 0;
    }
    if (t > 0)
        return;
    float *sums = m.sums[warp / (ROWS / 16)] + warp % (ROWS / 16) * 16;
    sums[g] = acc[0];
    sums[g + 8] = acc[2];
}

__device__ __forceinline__ float sum_of(const one_shared &m, int row)
{
    return m.sums[0][row] + m.sums[1][row];
}

/* place -1: of what stands beside. */
__device__ __forceinline__ void finish(const one_shared &m, const one_args &a, int place, int col,
                                       int n_cols)
{
    int r = threadIdx.x;
    if (r >= ROWS || col + r >= n_cols)
        return;
    float sum = sum_of(m, r);
    if (place < 0) {
        ((float *)a.beside.y)[col + r] = sum;
        return;
    }
    if (r >= a.width)
        return;
    if (a.c.act == QV_K_MOE_SWIGLU)
        sum = swiglu(round_bf16(sum), round_bf16(sum_of(m, r + a.width)));
    else if (a.c.act == QV_K_MOE_RELU2)
        sum = relu2(round_bf16(sum));
    ((bf16 *)a.c.y)[place * a.c.y_stride + col + r] = __float2bfloat16(sum);
}

/* --- The kernels -------------------------------------------------------------------------- */

/* The keys of the choice. SCORED: logits are not enough for its order. */
template <int PER, bool SCORED>
__device__ __forceinline__ void order_all(const qv_k_router_args &c, uint32_t (&order)[PER])
{
    float value[PER];
    load_lane(c.logits, c.n_experts, value);
    if (SCORED)
        score_lane(c, value);
    order_lane(c, value, order);
}

/* By one warp, from choice *k on up to `end`: e of lane k is the expert chosen as number k, if it
 * is here; else -1. */
template <int PER>
__device__ __forceinline__ void take(const qv_k_list &list, uint32_t (&order)[PER], int k, int end,
                                     int &e)
{
    int lane = threadIdx.x & 31;
#pragma unroll 1
    for (; k < end; k++) {
        int chosen = expert_here(list, take_first(order));
        e = lane == k ? chosen : e;
    }
}

/* x of a block's product, n numbers in vectors of 8, on its way. */
__device__ __forceinline__ void copy_x(bf16 *to, const bf16 *from, int n)
{
#pragma unroll 1
    for (int i = threadIdx.x * 8; i < n; i += THREADS * 8)
        copy16(to + i, from + i, true);
    copies_commit();
}

__device__ __forceinline__ void copy_first_steps(one_shared &m, const thread_rows &r, const void *w)
{
#pragma unroll 1
    for (int i = 0; i < AHEAD; i++)
        copy_step(m, r, w, i, i);
}

__device__ __forceinline__ matrix matrix_of(const one_args &a)
{
    return {(const bf16 *)a.c.w, (int)y_columns(a.c), (int)a.c.n_in, a.width, (int)a.c.n_out / 2};
}

/* The first product. It lets the next kernel start when the logits are there, so that they are for
 * that one, too. Blocks: tiles of experts. */
template <int PER, bool SCORED>
__global__ void __launch_bounds__(THREADS, 3) first_kernel(const __grid_constant__ one_args a)
{
    extern __shared__ __align__(16) char one_memory[];
    one_shared &m = *(one_shared *)one_memory;
    bf16 *x = (bf16 *)(one_memory + x_offset());
    const int k = (int)blockIdx.x / a.tiles, tile = (int)blockIdx.x - k * a.tiles;
    const bool chooses = threadIdx.x < 32;
    matrix w = matrix_of(a);
    call_ahead(a.ahead, (int)blockIdx.x, (int)gridDim.x);
    wait_for_previous();
    let_next_start();
    uint32_t order[PER];
    int e = -1;
    if (chooses) {
        order_all<PER, SCORED>(a.router, order);
        take(a.list, order, 0, k + 1, e);
        if ((int)threadIdx.x == k)
            m.expert = e;
    }
    copy_x(x, (const bf16 *)a.c.x, w.n_in);
    __syncthreads();
    const int expert = m.expert;
    if (expert < 0)
        return;
    w.w += expert * a.c.w_expert;
    const thread_rows r = rows_of(w, tile);
    copy_first_steps(m, r, w.w);
    if (chooses) {
        take(a.list, order, k + 1, a.list.top_k, e);
        int place = count_before(e, expert);
        if (threadIdx.x == 0)
            m.place = place;
    }
    copies_wait<AHEAD>(); /* x */
    __syncthreads();
    multiply(m, r, w.w, x);
    __syncthreads();
    finish(m, a, m.place, tile * w.width, w.n_cols);
}

/* The second. Blocks: tiles of experts; the one that makes the list; those beside. */
template <int PER, bool SCORED>
__global__ void __launch_bounds__(THREADS, 3) second_kernel(const __grid_constant__ one_args a)
{
    let_next_start();
    extern __shared__ __align__(16) char one_memory[];
    one_shared &m = *(one_shared *)one_memory;
    bf16 *x = (bf16 *)(one_memory + x_offset());
    int n_items = a.tiles * a.list.top_k, n_blocks = (int)gridDim.x;
    int block = (int)blockIdx.x + (a.beside_first ? n_items + 1 : 0);
    block -= block < n_blocks ? 0 : n_blocks;
    if (block == n_items) {
        write_list<PER>(a);
        wait_for_previous();
        return;
    }
    const int k = block / a.tiles;
    const bool beside = block > n_items;
    int tile = block - k * a.tiles, place = -1;
    const bf16 *from = (const bf16 *)a.beside.x;
    matrix w = {(const bf16 *)a.beside.w, (int)a.beside.n_out, (int)a.beside.n_in, ROWS, 0};
    if (beside) {
        tile = block - n_items - 1;
    } else {
        if (threadIdx.x < 32) {
            uint32_t order[PER];
            int e = -1;
            order_all<PER, SCORED>(a.router, order);
            take(a.list, order, 0, a.list.top_k, e);
            int expert = __shfl_sync(ALL, e, k), before = count_before(e, expert);
            if (threadIdx.x == 0) {
                m.expert = expert;
                m.place = before;
            }
        }
        __syncthreads();
        if (m.expert < 0) {
            wait_for_previous(); /* whoever waits for this kernel also waits for that one */
            return;
        }
        place = m.place;
        w = matrix_of(a);
        w.w += m.expert * a.c.w_expert;
        from = (const bf16 *)a.c.x + place * a.c.x_stride;
    }
    const thread_rows r = rows_of(w, tile);
    copy_first_steps(m, r, w.w);
    if (!beside) /* what stands beside is there; others wait for the kernel in front */
        wait_for_previous();
#pragma unroll 1
    for (int i = threadIdx.x * 8; i < w.n_in; i += THREADS * 8)
        *(uint4 *)(x + i) = *(const uint4 *)(from + i);
    __syncthreads();
    multiply(m, r, w.w, x);
    __syncthreads();
    finish(m, a, place, tile * w.width, w.n_cols);
}

/* --- Launch ------------------------------------------------------------------------------- */

typedef void one_kernel(one_args a);

template <int PER> one_kernel *kernel_of(const qv_k_router_args &c, bool first)
{
    if (c.sigmoid || c.bias)
        return first ? first_kernel<PER, true> : second_kernel<PER, true>;
    return first ? first_kernel<PER, false> : second_kernel<PER, false>;
}

cudaError_t launch(const one_args &a, bool first, void *stream)
{
    int n = a.router.n_experts;
    one_kernel *kernel = n <= 128   ? kernel_of<4>(a.router, first)
                         : n <= 256 ? kernel_of<8>(a.router, first)
                                    : kernel_of<16>(a.router, first);
    int64_t longest = a.c.n_in > a.beside.n_in ? a.c.n_in : a.beside.n_in;
    int bytes = x_offset() + (int)(longest * sizeof(bf16));
    unsigned blocks = (unsigned)(a.tiles * a.list.top_k + a.beside_tiles + (first ? 0 : 1));
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             x_offset() + LONGEST * (int)sizeof(bf16));
    return error == cudaSuccess ? launch_early(true, kernel, blocks, THREADS, bytes, stream, a)
                                : error;
}

/* Up to so many numbers come from the L2 cache, for which there is time behind the experts (a step
 * of the 35B, 1 M: first 2.652 ms, last 2.644; of Nano, 10 M: 2.254 and 2.382). */
constexpr int64_t BESIDE_LAST = 4 << 20;

qv_status run(const qv_k_moe_one_args &args, const qv_k_moe_linear_args &c, bool first,
              void *stream)
{
    one_args a = {*args.router, *args.list, c, {}, {}, false, 0, ROWS, 0};
    if (c.act == QV_K_MOE_SWIGLU)
        a.width = ROWS / 2;
    a.tiles = (int)((y_columns(c) + a.width - 1) / a.width);
    if (first) {
        a.ahead = args.ahead;
    } else if (args.beside != nullptr) {
        a.beside = *args.beside;
        a.beside_tiles = (int)((a.beside.n_out + ROWS - 1) / ROWS);
        a.beside_first = a.beside.n_out * a.beside.n_in > BESIDE_LAST;
    }
    cudaError_t error = launch(a, first, stream);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: experts of a token: %s", cudaGetErrorString(error));
    return qv_k_check_launch("experts of a token");
}

bool product_can(const void *w, const void *x, int64_t n_out, int64_t n_in)
{
    return n_in % 8 == 0 && n_in <= LONGEST && n_out <= 1 << 24 && (uintptr_t)x % 16 == 0 &&
           (uintptr_t)w % 16 == 0;
}

bool experts_can(const qv_k_moe_linear_args &c)
{
    return product_can(c.w, c.x, c.n_out, c.n_in) && c.x_stride % 8 == 0 && c.w_expert % 8 == 0;
}

} // namespace

bool qv_k_moe_one_can(const qv_k_moe_one_args *args)
{
    const qv_k_router_args &r = *args->router;
    return qv_k_is_hopper() && r.n_tokens == 1 && r.n_experts <= 512 && r.n_groups == 1 &&
           r.top_k <= 32 && experts_can(*args->in) && experts_can(*args->out);
}

bool qv_k_moe_one_can_beside(const qv_k_linear_args *c)
{
    return !c->w_f32 && c->y_f32 && c->n_tokens == 1 && product_can(c->w, c->x, c->n_out, c->n_in);
}

qv_status qv_k_moe_one(const qv_k_moe_one_args *args, void *stream)
{
    QV_TRY(run(*args, *args->in, true, stream));
    return run(*args, *args->out, false, stream);
}
