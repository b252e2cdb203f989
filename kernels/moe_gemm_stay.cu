/* The grouped GEMM of routed experts for many pairs and a short k on Hopper, which their second
 * product is: 2 pairs n_out n_in FLOP.
 *
 * Blocks that stay, in clusters of two. An item is up to 288 pairs of an expert by 1024 rows of its
 * matrix: each block holds half of the pairs with all of their k, and tiles of 64 rows go past
 * both, which fetch half of them each for the two. So rows and pairs come from the L2 cache once
 * for 1024 rows and 288 pairs, and not for 256 and 256. The matrix is wgmma's first operand, so
 * that a block's pairs can be any multiple of 8; an expert's are shared out evenly over items.
 *
 * Two warpgroups have every second tile each, with a ring of stages and a warp that fetches of
 * their own, and half a tile apart: one stores while the other multiplies. What bounds it is how
 * long a stage is on its way, from when both blocks have left it, and how many there is room for.
 * The next item's pairs come in as the last tiles leave theirs, 64 of k at a time.
 *
 * Results leave from registers: of 16 rows of a tile the first 8 are those at even places, so that
 * a thread has two that lie beside each other, and a warp 32 bytes of a pair.
 */
#include "kernels/moe_items.cuh"
#include "kernels/wgmma_shapes.cuh"

namespace
{

constexpr int STAY_PAIRS = 144; /* of a block */
constexpr int STAY_GROUPS = 2;  /* warpgroups that multiply */
constexpr int STAY_UNIT = 64;   /* rows of a tile */
constexpr int STAY_TILES = 16;  /* of an item */
constexpr int STAY_HALF = STAY_UNIT / ITEM_CLUSTER;
constexpr int STAY_BOX = STAY_PAIRS / 2; /* pairs that the copy engine fetches at once */
constexpr int STAY_K = ITEM_K;
constexpr int STAY_STEPS = MOE_STAY_K / STAY_K;
constexpr int STAY_STAGES = 5; /* of a warpgroup */
constexpr int STAY_WORKERS = 128 * STAY_GROUPS;
constexpr int STAY_THREADS = STAY_WORKERS + 128;
constexpr int STAY_FETCHERS = 2; /* warps that fetch pairs */
constexpr int ROWS_BYTES = STAY_UNIT * STAY_K * (int)sizeof(bf16);
constexpr int BOX_BYTES = STAY_BOX * STAY_K * (int)sizeof(bf16);
static_assert(STAY_BOX % 8 == 0, "the swizzle is one of 8 rows");

struct stay_shared {
    bf16 x[STAY_STEPS][STAY_PAIRS * STAY_K];
    bf16 w[STAY_GROUPS][STAY_STAGES][STAY_UNIT * STAY_K];
    uint64_t full[STAY_GROUPS][STAY_STAGES], empty[STAY_GROUPS][STAY_STAGES];
    uint64_t there[STAY_STEPS], left[STAY_STEPS]; /* of x: it has come, it has been read */
    uint64_t turn[STAY_GROUPS];                   /* the warpgroup may go on to its next tile */
    item_numbers numbers;
};

struct stay_maps {
    CUtensorMap w, x;
};

struct stay_item {
    int expert;
    int row, tiles; /* of the matrix: the first one, and tiles of them */
    int first, n;   /* this block's pairs */
    int columns;    /* of the products */
};

/* Where a search for an item goes on: an expert, and passes over the matrices of those before. */
struct stay_cursor {
    int expert, passes;
};

__host__ __device__ __forceinline__ int count_tiles(const qv_k_moe_linear_args &c)
{
    return (int)((c.n_out + STAY_UNIT - 1) / STAY_UNIT);
}

/* Items of a pass over a matrix. */
__host__ __device__ __forceinline__ int count_parts(const qv_k_moe_linear_args &c)
{
    return (count_tiles(c) + STAY_TILES - 1) / STAY_TILES;
}

/* Passes over an expert's matrix for so many pairs. */
__device__ __forceinline__ int passes_for(int n)
{
    constexpr int MOST = ITEM_CLUSTER * STAY_PAIRS;
    return (n + MOST - 1) / MOST;
}

__device__ __forceinline__ int count_steps(const qv_k_moe_linear_args &c)
{
    return (int)((c.n_in + STAY_K - 1) / STAY_K);
}

/* Columns of the products for so many pairs: what there are forms for. */
__device__ __forceinline__ int stay_columns(int n)
{
    return n <= 64 ? (n + 15) / 16 * 16 : (n + 7) / 8 * 8;
}

/* Item `number`, by all lanes of a warp; false: there is none. Numbers only grow. */
[[maybe_unused]] __device__ __forceinline__ bool find_item(const qv_k_list &list,
                                                           const qv_k_moe_linear_args &c,
                                                           int number, int rank, stay_cursor &at,
                                                           stay_item &out)
{
    int lane = threadIdx.x & 31, parts = count_parts(c);
    int pass = number / parts, part = number % parts;
    for (; at.expert < list.n_experts; at.expert += 32) {
        int expert = at.expert + lane, start = 0, n = 0;
        if (expert < list.n_experts) {
            start = list.expert_start[expert];
            n = list.expert_start[expert + 1] - start;
        }
        int passes = passes_for(n), sum = passes; /* of the experts up to this lane's */
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int before = __shfl_up_sync(~0u, sum, d);
            if (lane >= d)
                sum += before;
        }
        unsigned beyond = __ballot_sync(~0u, at.passes + sum > pass);
        if (beyond == 0) {
            at.passes += __shfl_sync(~0u, sum, 31);
            continue;
        }
        int of = __ffs((int)beyond) - 1;
        start = __shfl_sync(~0u, start, of);
        n = __shfl_sync(~0u, n, of);
        passes = __shfl_sync(~0u, passes, of);
        int i = pass - (at.passes + __shfl_sync(~0u, sum, of) - passes);
        int begin = (int)((int64_t)n * i / passes), end = (int)((int64_t)n * (i + 1) / passes);
        int half = (end - begin + 1) / 2;
        out.expert = at.expert + of;
        out.row = part * STAY_TILES * STAY_UNIT;
        out.tiles = min(STAY_TILES, count_tiles(c) - part * STAY_TILES);
        out.first = start + begin + rank * half;
        out.n = rank == 0 ? half : end - begin - half;
        out.columns = stay_columns(half);
        return true;
    }
    return false;
}

/* How many there are. */
[[maybe_unused]] __device__ __forceinline__ int count_items(const qv_k_list &list,
                                                            const qv_k_moe_linear_args &c)
{
    int passes = 0;
    for (int i = threadIdx.x & 31; i < list.n_experts; i += 32)
        passes += passes_for(list.expert_start[i + 1] - list.expert_start[i]);
    return __reduce_add_sync(~0u, passes) * count_parts(c);
}

/* A warpgroup's ring. */
struct stay_place {
    int at, parity;
};

__device__ __forceinline__ void move_on(stay_place &p)
{
    p.at++;
    if (p.at == STAY_STAGES) {
        p.at = 0;
        p.parity ^= 1;
    }
}

/* --- Fetching ------------------------------------------------------------------------------ */

/* The warp that fetches a warpgroup's rows. */
[[maybe_unused]] __device__ void fetch_rows(const qv_k_list &list, const qv_k_moe_linear_args &c,
                                            const stay_maps &maps, stay_shared &m, int rank,
                                            int group, int cluster, int n_clusters)
{
    constexpr uint16_t BOTH = (1 << ITEM_CLUSTER) - 1;
    int lane = threadIdx.x & 31, steps = count_steps(c), n_items = count_items(list, c), turn = 0;
    uint32_t tiles = 0;
    stay_place p = {0, 1};
    stay_cursor cursor = {0, 0};
    stay_item item;
    for (int number = cluster; find_item(list, c, number, rank, cursor, item);
         number = next_number(m.numbers, turn)) {
        if (group == 0 && lane == 0)
            draw_number(list, m.numbers, rank, turn, n_items, n_clusters);
        for (int tile = (int)((tiles ^ (uint32_t)group) & 1); tile < item.tiles; tile += 2) {
            int row = item.row + tile * STAY_UNIT + rank * STAY_HALF;
            int group_of_16 = (int)((item.expert * c.n_out + row) / 16);
            for (int step = 0; step < steps; step++, move_on(p)) {
                barrier_wait(&m.empty[group][p.at], p.parity);
                if (lane == 0) {
                    barrier_expect(&m.full[group][p.at], ROWS_BYTES);
                    copy_box4(m.w[group][p.at] + rank * STAY_HALF * STAY_K, &maps.w, step * STAY_K,
                              0, 0, group_of_16, &m.full[group][p.at], BOTH);
                }
            }
        }
        __syncwarp();
        tiles += (uint32_t)item.tiles;
    }
}

/* The warps that fetch pairs, `part` of them: every second step of k. */
[[maybe_unused]] __device__ void fetch_pairs(const qv_k_list &list, const qv_k_moe_linear_args &c,
                                             const stay_maps &maps, stay_shared &m, int rank,
                                             int part, int cluster)
{
    int lane = threadIdx.x & 31, steps = count_steps(c), turn = 0;
    uint32_t done = 0;
    stay_cursor cursor = {0, 0};
    stay_item item;
    for (int number = cluster; find_item(list, c, number, rank, cursor, item); done++) {
        int boxes = (item.columns + STAY_BOX - 1) / STAY_BOX;
        for (int step = part; step < steps; step += STAY_FETCHERS) {
            barrier_wait(&m.left[step], (done + 1) & 1);
            if (lane == 0) {
                barrier_expect(&m.there[step], boxes * BOX_BYTES);
                for (int i = 0; i < boxes; i++)
                    copy_box_here(m.x[step] + i * STAY_BOX * STAY_K, &maps.x, step * STAY_K,
                                  item.first + i * STAY_BOX, 0, &m.there[step]);
            }
        }
        __syncwarp();
        number = next_number(m.numbers, turn);
    }
}

/* --- Multiplying --------------------------------------------------------------------------- */

/* A tile's results. */
template <int N>
[[maybe_unused]] __device__ __forceinline__ void stay_store(const qv_k_moe_linear_args &c,
                                                            const stay_item &item, int tile,
                                                            const float (&acc)[N / 2])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    int col = item.row + tile * STAY_UNIT + warp * 16 + (lane >> 2) * 2, pair = (lane & 3) * 2;
    if (col >= c.n_out)
        return;
    bf16 *y = (bf16 *)c.y + (int64_t)(item.first + pair) * c.y_stride + col;
#pragma unroll
    for (int i = 0; i < N / 8; i++, y += 8 * c.y_stride) {
        if (pair + 8 * i < item.n)
            *(uint32_t *)y = pack_bf16(acc[4 * i], acc[4 * i + 2]);
        if (pair + 8 * i + 1 < item.n)
            *(uint32_t *)(y + c.y_stride) = pack_bf16(acc[4 * i + 1], acc[4 * i + 3]);
    }
}

/* A warpgroup has multiplied by a stage, and is one of `n` readers of these pairs whose last tile
 * of the item it was. */
[[maybe_unused]] __device__ __forceinline__ void stay_release(stay_shared &m, int group, int at,
                                                              int step, int n)
{
    release_stage(&m.empty[group][at]);
    for (int i = 0; i < n && (threadIdx.x & 127) == 0; i++)
        barrier_arrive(&m.left[step]);
}

/* A warpgroup's tiles of the item `done`, whose first one is the tile `number` of all. The other
 * may begin with the next tile when half of this one's products have begun: all of them if it has
 * no tile of this item, and so may not have waited for its pairs. */
template <int N>
[[maybe_unused]] __device__ __forceinline__ void
stay_work(const qv_k_moe_linear_args &c, stay_shared &m, const stay_item &item, int group,
          uint32_t number, uint32_t done, stay_place &p)
{
    int steps = count_steps(c), lane = threadIdx.x & 31;
    int half = item.tiles == 1 ? steps - 1 : steps / 2;
    for (int tile = (int)((number ^ (uint32_t)group) & 1); tile < item.tiles; tile += 2) {
        uint32_t index = number + (uint32_t)tile;
        int readers = tile + 2 < item.tiles ? 0 : item.tiles == 1 ? 2 : 1, before = 0;
        float acc[N / 2] = {};
        if (index > 0)
            barrier_wait(&m.turn[group], ((index - 1) >> 1) & 1);
        for (int step = 0; step < steps; step++) {
            if (tile < STAY_GROUPS)
                barrier_wait(&m.there[step], done & 1);
            barrier_wait(&m.full[group][p.at], p.parity);
            uint64_t a = wgmma_tile(m.w[group][p.at]), b = wgmma_tile(m.x[step]);
            wgmma_keep(acc);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < STAY_K / 16; k++)
                wgmma<N>(acc, a + 2 * k, b + 2 * k);
            wgmma_commit();
            if (step == half && lane == 0)
                barrier_arrive(&m.turn[1 - group]);
            if (step > 0) {
                wgmma_wait<1>();
                stay_release(m, group, before, step - 1, readers);
            }
            before = p.at;
            move_on(p);
        }
        wgmma_wait<0>();
        stay_release(m, group, before, steps - 1, readers);
        wgmma_keep(acc);
        stay_store<N>(c, item, tile, acc);
    }
}

#define STAY_FORMS(X)                                                                              \
    X(16) X(32) X(48) X(64) X(72) X(80) X(88) X(96) X(104) X(112) X(120) X(128) X(136) X(144)

/* Grid (2 x clusters). */
__global__ void QV_CLUSTER(ITEM_CLUSTER, 1, 1) __launch_bounds__(STAY_THREADS, 1)
    stay_kernel(qv_k_list list, qv_k_moe_linear_args c, const __grid_constant__ stay_maps maps)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char stay_memory[];
    stay_shared &m = *(stay_shared *)(stay_memory + (-shared_address(stay_memory) & 1023));
    int thread = threadIdx.x, rank = blockIdx.x % ITEM_CLUSTER;
    int cluster = blockIdx.x / ITEM_CLUSTER, n_clusters = gridDim.x / ITEM_CLUSTER;
    if (thread == 0) {
        for (int group = 0; group < STAY_GROUPS; group++) {
            for (int i = 0; i < STAY_STAGES; i++) {
                barrier_init(&m.full[group][i], 1);
                barrier_init(&m.empty[group][i], ITEM_CLUSTER);
            }
            barrier_init(&m.turn[group], 4); /* warps */
        }
        for (int i = 0; i < STAY_STEPS; i++) {
            barrier_init(&m.there[i], 1);
            barrier_init(&m.left[i], STAY_GROUPS);
        }
        init_numbers(m.numbers);
        barriers_publish();
    }
    __syncthreads();
    cluster_sync();

    int group = warpgroup();
    if (group == STAY_GROUPS) {
        int warp = thread / 32 % 4;
        if (warp < STAY_GROUPS)
            fetch_rows(list, c, maps, m, rank, warp, cluster, n_clusters);
        else
            fetch_pairs(list, c, maps, m, rank, warp - STAY_GROUPS, cluster);
    } else {
        int turn = 0;
        uint32_t tiles = 0, done = 0;
        stay_place p = {0, 0};
        stay_cursor cursor = {0, 0};
        stay_item item;
        for (int number = cluster; find_item(list, c, number, rank, cursor, item);
             number = next_number(m.numbers, turn)) {
#define STAY_CASE(n)                                                                               \
    case n:                                                                                        \
        stay_work<n>(c, m, item, group, tiles, done, p);                                           \
        break;
            switch (item.columns) {
                STAY_FORMS(STAY_CASE)
            }
#undef STAY_CASE
            tiles += (uint32_t)item.tiles;
            done++;
        }
    }
    __syncwarp();
    cluster_sync(); /* the other block's arrivals come here until its last step */
#else
    (void)list, (void)c, (void)maps;
    __trap(); /* not launched on other devices */
#endif
}

/* The experts [E][n_out][n_in] as [E n_out / 16][2][8][n_in], from row to row of the 8 being two of
 * the matrix, in boxes of half a tile. */
qv_status make_w_map(const qv_k_list &list, const qv_k_moe_linear_args &c, CUtensorMap *map)
{
    const cuuint64_t n_in = (cuuint64_t)c.n_in,
                     n_rows = (cuuint64_t)c.n_out * (cuuint64_t)list.n_experts;
    const cuuint64_t sizes[4] = {n_in, 8, 2, n_rows / 16};
    const cuuint64_t strides[3] = {2 * n_in * 2, n_in * 2, 16 * n_in * 2};
    const cuuint32_t box[4] = {STAY_K, 8, 2, STAY_HALF / 16};
    return qv_k_tensor_map("moe_linear", c.w, sizes, strides, box, map);
}

} // namespace

qv_status qv_k_moe_linear_stay(const qv_k_list *list, const qv_k_moe_linear_args *args,
                               int64_t n_active, void *stream)
{
    const qv_k_moe_linear_args &c = *args;
    int64_t n_pairs = (int64_t)list->n_tokens * list->top_k;
    int64_t most = (n_pairs / (ITEM_CLUSTER * STAY_PAIRS) + n_active) * count_parts(c);
    stay_maps maps;
    QV_TRY(make_w_map(*list, c, &maps.w));
    QV_TRY(make_pairs_map(*list, c, STAY_BOX, &maps.x));
    return launch_items<stay_shared>(stay_kernel, *list, c, maps, most, STAY_THREADS, stream);
}
