/* The grouped GEMM of routed experts for many pairs on Hopper: 2 pairs n_out n_in FLOP, bound by
 * the tensor cores.
 *
 * Blocks that stay, in clusters of two. An item is up to 256 pairs of an expert by 256 rows of its
 * matrix: each block has half of the rows, a warpgroup 64 of them, and fetches half of the pairs
 * for both, which therefore lie one behind the other. The matrix is wgmma's first operand, so that
 * the number of pairs of a product can be any multiple of 16: an expert's pairs are shared out
 * evenly over items. With 256 pairs a clock of the tensor cores' rate reads 80 bytes of shared
 * memory and takes 48 in, of the 128 there are.
 *
 * One warp fetches, through the copy engine, which takes 60 to 90 clocks for each box however
 * small, four stages ahead of the workers and on into the next item while they store. Memory bounds
 * this about as much as tensor cores do, so a stage goes back as soon as both warpgroups have
 * multiplied by it: neither is ahead of the other, or asks for a step before the last has ended.
 * Clusters draw their items one by one (kernels/moe_items.cuh).
 *
 * SwiGLU: of a warpgroup's 64 rows every second 8 are of the other half of the matrix, so that a
 * thread has the gate and what it gates.
 */
#include "kernels/moe_items.cuh"
#include "kernels/ptx_gemm.cuh"
#include "kernels/wgmma_shapes.cuh"

namespace
{

constexpr int WIDE_PAIRS = 4 * QV_K_MOE_TILE; /* of an item */
constexpr int WIDE_GROUPS = 2;                /* warpgroups that multiply */
constexpr int WIDE_UNIT = 64;                 /* rows of one of them */
constexpr int WIDE_UNITS = ITEM_CLUSTER * WIDE_GROUPS;
constexpr int WIDE_BOX = 32; /* pairs that the copy engine fetches at once */
constexpr int WIDE_K = ITEM_K;
constexpr int WIDE_STAGES = 4;
constexpr int WIDE_OUT_PAIRS = 128; /* results that are on their way at once */
constexpr int WIDE_WORKERS = 128 * WIDE_GROUPS;
constexpr int WIDE_THREADS = WIDE_WORKERS + 128;
constexpr int WIDE_FETCH_REGISTERS = 40, WIDE_WORK_REGISTERS = 232; /* of a thread */
static_assert(WIDE_GROUPS * WIDE_WORK_REGISTERS + WIDE_FETCH_REGISTERS <=
                  (WIDE_GROUPS + 1) * LAUNCH_REGISTERS,
              "who asks for more than there are waits for ever");

struct wide_stage {
    bf16 w[WIDE_GROUPS * WIDE_UNIT * WIDE_K], x[WIDE_PAIRS * WIDE_K];
};

struct wide_shared {
    wide_stage stage[WIDE_STAGES];
    bf16 out[WIDE_GROUPS][WIDE_OUT_PAIRS * WIDE_UNIT]; /* [pair][row] */
    uint64_t full[WIDE_STAGES], empty[WIDE_STAGES];
    item_numbers numbers;
};

struct wide_maps {
    CUtensorMap w, x;
};

struct wide_item {
    int expert;
    int col, units; /* this block's first column of y; warpgroups that have any */
    int first, n;   /* pairs */
};

/* Columns of y that a warpgroup's rows give. */
__host__ __device__ __forceinline__ int unit_columns(const qv_k_moe_linear_args &c)
{
    return c.act == QV_K_MOE_SWIGLU ? WIDE_UNIT / 2 : WIDE_UNIT;
}

/* Tiles of rows of a cluster. */
__host__ __device__ __forceinline__ int count_row_tiles(const qv_k_moe_linear_args &c)
{
    int64_t columns = unit_columns(c) * WIDE_UNITS;
    return (int)((y_columns(c) + columns - 1) / columns);
}

/* Columns of the products for so many pairs: what there are forms for. */
__host__ __device__ __forceinline__ int wide_columns(int n)
{
    return n <= 32 ? 32 : n <= 128 ? (n + 31) / 32 * 32 : (n + 15) / 16 * 16;
}

/* Item `number`, by all lanes of a warp; false: there is none. `index` is the active expert of an
 * earlier item (-1 at first) and moves on. Tiles of rows go round from tile of pairs to tile of
 * pairs, so that every cluster meets the short last one equally often. */
[[maybe_unused]] __device__ __forceinline__ bool find_item(const qv_k_list &list,
                                                           const qv_k_moe_linear_args &c,
                                                           int number, int rank, int &index,
                                                           wide_item &out)
{
    const int32_t *work = list.work;
    int row_tiles = count_row_tiles(c), lane = threadIdx.x & 31;
    int tile = number / row_tiles, n_active = work[0];
    for (unsigned passed = ~0u; passed == ~0u;) {
        int i = index + 1 + lane;
        passed =
            __ballot_sync(~0u, i < n_active && work[2 + 2 * i] >> QV_K_MOE_EXPERT_BITS <= tile);
        index += __popc(passed);
    }
    if (index < 0)
        return false; /* nobody has pairs */
    int entry = work[2 + 2 * index], part = tile - (entry >> QV_K_MOE_EXPERT_BITS);
    out.expert = entry & EXPERT_MASK;
    int start = list.expert_start[out.expert], n = list.expert_start[out.expert + 1] - start;
    int parts = (n + WIDE_PAIRS - 1) / WIDE_PAIRS;
    if (part >= parts)
        return false;
    int begin = (int)((int64_t)n * part / parts), end = (int)((int64_t)n * (part + 1) / parts);
    out.first = start + begin;
    out.n = end - begin;
    int unit = (number + tile) % row_tiles * WIDE_UNITS;
    int all_units = (int)((y_columns(c) + unit_columns(c) - 1) / unit_columns(c));
    int units = min(WIDE_UNITS, all_units - unit), first_block = (units + 1) / 2;
    out.units = rank == 0 ? first_block : units - first_block;
    out.col = (unit + rank * first_block) * unit_columns(c);
    return true;
}

/* --- Items one after the other ------------------------------------------------------------- */

/* How many there are. */
[[maybe_unused]] __device__ __forceinline__ int count_items(const qv_k_list &list,
                                                            const qv_k_moe_linear_args &c)
{
    int n_active = list.work[0];
    if (n_active == 0)
        return 0;
    int entry = list.work[2 * n_active], expert = entry & EXPERT_MASK;
    int n = list.expert_start[expert + 1] - list.expert_start[expert];
    return ((entry >> QV_K_MOE_EXPERT_BITS) + (n + WIDE_PAIRS - 1) / WIDE_PAIRS) *
           count_row_tiles(c);
}

/* The warp that fetches: of a stage, a lane a box. */
[[maybe_unused]] __device__ void wide_fetch(const qv_k_list &list, const qv_k_moe_linear_args &c,
                                            const wide_maps &maps, wide_shared &m, int rank,
                                            int cluster, int n_clusters)
{
    constexpr uint16_t BOTH = (1 << ITEM_CLUSTER) - 1;
    int lane = threadIdx.x & 31, index = -1, steps = (int)((c.n_in + WIDE_K - 1) / WIDE_K);
    uint32_t count = 0;
    int turn = 0, n_items = count_items(list, c);
    wide_item item;
    for (int number = cluster; find_item(list, c, number, rank, index, item);
         number = next_number(m.numbers, turn)) {
        int boxes = (wide_columns(item.n) + WIDE_BOX - 1) / WIDE_BOX;
        int bytes = (item.units * WIDE_UNIT + boxes * WIDE_BOX) * WIDE_K * (int)sizeof(bf16);
        int unit = lane - WIDE_PAIRS / WIDE_BOX, col = item.col + unit * unit_columns(c);
        for (int step = 0; step < steps; step++, count++) {
            int at = count % WIDE_STAGES, k = step * WIDE_K;
            wide_stage &stage = m.stage[at];
            if (count >= WIDE_STAGES)
                barrier_wait(&m.empty[at], (count / WIDE_STAGES - 1) & 1);
            if (lane == 0)
                barrier_expect(&m.full[at], bytes);
            __syncwarp();
            if (unit < 0) {
                if (lane % ITEM_CLUSTER == rank && lane < boxes)
                    copy_box(stage.x + lane * WIDE_BOX * WIDE_K, &maps.x, k,
                             item.first + lane * WIDE_BOX, 0, &m.full[at], BOTH);
            } else if (unit < item.units) {
                bf16 *to = stage.w + unit * WIDE_UNIT * WIDE_K;
                if (c.act == QV_K_MOE_SWIGLU)
                    copy_box4_here(to, &maps.w, k, 0, 0,
                                   (int)(item.expert * (c.n_out / 8) + col / 8), &m.full[at]);
                else
                    copy_box_here(to, &maps.w, k, col, item.expert, &m.full[at]);
            }
            if (step == 0 && lane == 0)
                draw_number(list, m.numbers, rank, turn, n_items, n_clusters);
        }
    }
}

/* Results of 16 pairs, fragments transposed into [pair][row]. */
[[maybe_unused]] __device__ __forceinline__ void place_plain(qv_k_moe_act act, bf16 *out,
                                                             const float *acc)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    float f[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        f[i] = act == QV_K_MOE_RELU2 ? relu2(round_bf16(acc[i])) : acc[i];
    stmatrix4_trans(
        out + tile_at<WIDE_UNIT>((lane >> 4) * 8 + (lane & 7), warp * 16 + ((lane >> 3) & 1) * 8),
        pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]), pack_bf16(f[6], f[7]));
}

/* The same of 32 pairs by rows that are gated: 8 of a warp are left. With 16 pairs the second 16
 * are the first again. */
template <int PAIRS>
[[maybe_unused]] __device__ __forceinline__ void place_gated(bf16 *out, const float *acc)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    uint32_t f[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *a = acc + 4 * (i % (PAIRS / 8));
        f[i] = pack_bf16(swiglu(round_bf16(a[0]), round_bf16(a[2])),
                         swiglu(round_bf16(a[1]), round_bf16(a[3])));
    }
    stmatrix4_trans(out + tile_at<WIDE_UNIT>(lane % PAIRS, warp * 8), f[0], f[1], f[2], f[3]);
}

/* A warpgroup's results of an item. */
template <int N>
[[maybe_unused]] __device__ __forceinline__ void wide_store(const qv_k_moe_linear_args &c,
                                                            wide_shared &m, const wide_item &item,
                                                            int group, const float (&acc)[N / 2])
{
    int thread = threadIdx.x & 127;
    bool gated = c.act == QV_K_MOE_SWIGLU;
    int pieces = unit_columns(c) / 8, col = thread % pieces * 8;
    int64_t y_col = item.col + group * unit_columns(c) + col;
    bf16 *out = m.out[group], *y = (bf16 *)c.y + (int64_t)item.first * c.y_stride + y_col;
#pragma unroll
    for (int done = 0; done < N; done += WIDE_OUT_PAIRS) {
        constexpr int MOST = N < WIDE_OUT_PAIRS ? N : WIDE_OUT_PAIRS;
        named_barrier<128>(1 + group); /* of this warpgroup: `out` has been read */
        if (gated) {
#pragma unroll
            for (int p = 0; p < MOST; p += 32)
                if (done + p + 32 <= N)
                    place_gated<32>(out + p * WIDE_UNIT, acc + (done + p) / 2);
                else if (done + p < N)
                    place_gated<16>(out + p * WIDE_UNIT, acc + (done + p) / 2);
        } else {
#pragma unroll
            for (int p = 0; p < MOST; p += 16)
                if (done + p < N)
                    place_plain(c.act, out + p * WIDE_UNIT, acc + (done + p) / 2);
        }
        named_barrier<128>(1 + group);
        if (y_col < y_columns(c))
            for (int p = thread / pieces; p < min(MOST, item.n - done); p += 128 / pieces)
                *(uint4 *)(y + (done + p) * c.y_stride) =
                    *(const uint4 *)(out + tile_at<WIDE_UNIT>(p, col));
    }
}

/* A warpgroup's part of an item: 64 rows by N pairs. */
template <int N>
[[maybe_unused]] __device__ __forceinline__ void wide_work(const qv_k_moe_linear_args &c,
                                                           wide_shared &m, const wide_item &item,
                                                           int group, uint32_t &count)
{
    int steps = (int)((c.n_in + WIDE_K - 1) / WIDE_K);
    float acc[N / 2] = {};
    for (int step = 0; step < steps; step++, count++) {
        int at = count % WIDE_STAGES;
        barrier_wait(&m.full[at], (count / WIDE_STAGES) & 1);
        uint64_t a = wgmma_tile(m.stage[at].w + group * WIDE_UNIT * WIDE_K);
        uint64_t b = wgmma_tile(m.stage[at].x);
        wgmma_keep(acc);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < WIDE_K / 16; k++)
            wgmma<N>(acc, a + 2 * k, b + 2 * k);
        wgmma_commit();
        wgmma_wait<0>(); /* the other warpgroup's products go on */
        release_stage(&m.empty[at]);
    }
    wgmma_keep(acc);
    wide_store<N>(c, m, item, group, acc);
}

/* A warpgroup without rows of an item only lets the stages pass, its warps together: one that is
 * two rounds of the ring behind would wait for a phase of the same parity. */
[[maybe_unused]] __device__ __forceinline__ void
wide_pass(const qv_k_moe_linear_args &c, wide_shared &m, int group, uint32_t &count)
{
    int steps = (int)((c.n_in + WIDE_K - 1) / WIDE_K);
    for (int step = 0; step < steps; step++, count++) {
        barrier_wait(&m.full[count % WIDE_STAGES], (count / WIDE_STAGES) & 1);
        named_barrier<128>(1 + group);
        release_stage(&m.empty[count % WIDE_STAGES]);
    }
}

#define WIDE_FORMS(X)                                                                              \
    X(32) X(64) X(96) X(128) X(144) X(160) X(176) X(192) X(208) X(224) X(240) X(256)

/* Grid (2 x clusters). */
__global__ void QV_CLUSTER(ITEM_CLUSTER, 1, 1) __launch_bounds__(WIDE_THREADS, 1)
    wide_kernel(qv_k_list list, qv_k_moe_linear_args c, const __grid_constant__ wide_maps maps)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char wide_memory[];
    wide_shared &m = *(wide_shared *)(wide_memory + (-shared_address(wide_memory) & 1023));
    int thread = threadIdx.x, rank = blockIdx.x % ITEM_CLUSTER;
    int cluster = blockIdx.x / ITEM_CLUSTER, n_clusters = gridDim.x / ITEM_CLUSTER;
    if (thread == 0) {
        for (int i = 0; i < WIDE_STAGES; i++) {
            barrier_init(&m.full[i], 1);
            barrier_init(&m.empty[i], WIDE_GROUPS * ITEM_CLUSTER);
        }
        init_numbers(m.numbers);
        barriers_publish();
    }
    __syncthreads();
    cluster_sync();

    int group = warpgroup();
    if (group == WIDE_GROUPS) {
        fewer_registers<WIDE_FETCH_REGISTERS>();
        if (thread < WIDE_WORKERS + 32)
            wide_fetch(list, c, maps, m, rank, cluster, n_clusters);
    } else {
        more_registers<WIDE_WORK_REGISTERS>();
        int index = -1, turn = 0;
        uint32_t count = 0;
        wide_item item;
        for (int number = cluster; find_item(list, c, number, rank, index, item);
             number = next_number(m.numbers, turn)) {
            int columns = group < item.units ? wide_columns(item.n) : 0;
#define WIDE_CASE(n)                                                                               \
    case n:                                                                                        \
        wide_work<n>(c, m, item, group, count);                                                    \
        break;
            switch (columns) {
                WIDE_FORMS(WIDE_CASE)
            default:
                wide_pass(c, m, group, count);
            }
#undef WIDE_CASE
        }
    }
    __syncwarp();
    cluster_sync(); /* the other block's arrivals come here until its last step */
#else
    (void)list, (void)c, (void)maps;
    __trap(); /* not launched on other devices */
#endif
}

/* The experts [E][n_out][n_in] in boxes of 64 rows and 64 columns. For SWIGLU as [E n_out /
 * 8][2][8] [n_in], from the rows of a gate to those of what it gates being half a matrix. */
qv_status make_w_map(const qv_k_list &list, const qv_k_moe_linear_args &c, CUtensorMap *map)
{
    const cuuint64_t n_in = (cuuint64_t)c.n_in, n_out = (cuuint64_t)c.n_out,
                     n_experts = (cuuint64_t)list.n_experts;
    if (c.act != QV_K_MOE_SWIGLU) {
        const cuuint64_t sizes[3] = {n_in, n_out, n_experts};
        const cuuint64_t strides[2] = {n_in * 2, (cuuint64_t)c.w_expert * 2};
        const cuuint32_t box[3] = {WIDE_K, WIDE_UNIT, 1};
        return qv_k_tensor_map("moe_linear", c.w, sizes, strides, box, map);
    }
    const cuuint64_t sizes[4] = {n_in, 8, 2, n_experts * n_out / 8 - n_out / 16};
    const cuuint64_t strides[3] = {n_in * 2, n_out / 2 * n_in * 2, 8 * n_in * 2};
    const cuuint32_t box[4] = {WIDE_K, 8, 2, WIDE_UNIT / 16};
    return qv_k_tensor_map("moe_linear", c.w, sizes, strides, box, map);
}

} // namespace

qv_status qv_k_moe_linear_hopper(const qv_k_list *list, const qv_k_moe_linear_args *args,
                                 int64_t n_active, void *stream)
{
    const qv_k_moe_linear_args &c = *args;
    int64_t n_pairs = (int64_t)list->n_tokens * list->top_k;
    int64_t most = (n_pairs / WIDE_PAIRS + n_active) * count_row_tiles(c);
    wide_maps maps;
    QV_TRY(make_w_map(*list, c, &maps.w));
    QV_TRY(make_pairs_map(*list, c, WIDE_BOX, &maps.x));
    return launch_items<wide_shared>(wide_kernel, *list, c, maps, most, WIDE_THREADS, stream);
}
