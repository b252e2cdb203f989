/* y = x W^T and the adapters of the tokens, for many tokens on Hopper: 2 n_tokens n_out n_in FLOP,
 * bound by the tensor cores.
 *
 * Blocks that stay, one to a multiprocessor, each with a ring of stages of shared memory that one
 * thread fills through the copy engine, on into the next tile while results are stored, and two
 * warpgroups that multiply. Per clock of the tensor cores' rate a tile of 128 x 256 reads 80 bytes
 * of shared memory and takes 48 in, of the 128 there are; in clusters of two, of which each block
 * fetches half of W for both, 32 of the 48 come from the L2 cache. Results leave through shared
 * memory by the copy engine, 128 bytes a row, and the copy engine leaves out what is not there: so
 * shapes need not be multiples of the tile's.
 *
 * The pairs of adapters follow in the same ring, as more of k (gemm_hopper.cuh): y is written once,
 * where expand would read and write it again.
 */
#include "kernels/gemm_hopper.cuh"

namespace
{

constexpr int FETCH_REGISTERS = 56, WORK_REGISTERS = 224; /* of a thread */
static_assert(GEMM_GROUPS * WORK_REGISTERS + FETCH_REGISTERS <=
                  (GEMM_GROUPS + 1) * LAUNCH_REGISTERS,
              "who asks for more than there are waits for ever");

/* Grid (cluster x clusters). Threads: two warpgroups that multiply, a warp of which one thread
 * fetches, a warp that plans, two that do nothing. */
template <class F>
__global__ void __launch_bounds__(GEMM_THREADS, 1)
    gemm_kernel(const __grid_constant__ gemm_args c, const __grid_constant__ qv_k_stream_lora lora,
                const __grid_constant__ gemm_maps maps)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char gemm_memory[];
    gemm_shared<F> &m = *(gemm_shared<F> *)(gemm_memory + (-shared_address(gemm_memory) & 1023));
    int thread = threadIdx.x, rank = blockIdx.x % F::CLUSTER;
    int cluster = blockIdx.x / F::CLUSTER, n_clusters = gridDim.x / F::CLUSTER;
    if (thread == 0) {
        for (int i = 0; i < F::STAGES; i++) {
            barrier_init(&m.full[i], 1);
            barrier_init(&m.empty[i], GEMM_GROUPS * F::CLUSTER);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&m.plan_full[i], 1);
            barrier_init(&m.plan_empty[i], 4 * GEMM_GROUPS + 1); /* warps, and who fetches */
        }
        barriers_publish();
    }
    __syncthreads();
    if (F::CLUSTER > 1)
        cluster_sync();

    if (warpgroup() == GEMM_GROUPS) {
        fewer_registers<FETCH_REGISTERS>();
        if (thread == GEMM_GROUPS * 128)
            gemm_fetch<F>(c, m, maps, cluster, n_clusters, rank);
        else if (thread / 32 == GEMM_GROUPS * 4 + 1)
            gemm_make_plans<F>(c, m, lora, cluster, n_clusters, rank);
    } else {
        more_registers<WORK_REGISTERS>();
        gemm_work<F>(c, m, &maps.y, cluster, n_clusters, rank);
    }
    if (F::CLUSTER > 1) {
        __syncwarp();
        cluster_sync(); /* the other block's arrivals come here until its last step */
    }
#else
    (void)c, (void)lora, (void)maps;
    __trap(); /* not launched on other devices */
#endif
}

/* --- Forms -------------------------------------------------------------------------------- */

/* Name, columns of a tile, stages, blocks of a cluster, steps that the first warpgroup is ahead;
 * the share of the best rate that one expects. */
#define GEMM_FORMS(X)                                                                              \
    X("128 x 256, pairs, lead of 2", 256, 4, 2, 2, 1.00)                                           \
    X("128 x 192, lead of 2", 192, 4, 1, 2, 0.94)                                                  \
    X("128 x 128, pairs, lead of 3", 128, 6, 2, 3, 0.85)

struct form_facts {
    const char *name;
    int columns, cluster;
    double share;
};

constexpr form_facts FORMS[] = {
#define GEMM_FACTS(name, columns, stages, cluster, lead, share) {name, columns, cluster, share},
    GEMM_FORMS(GEMM_FACTS)
#undef GEMM_FACTS
};
static_assert(sizeof FORMS / sizeof *FORMS == QV_K_GEMM_FORMS, "as many as the header says");

/* The form with the least time: rounds of tiles over the device, by what a tile takes. */
int choose_form(const qv_k_linear_args &c, int n_sms)
{
    int best = 0;
    double least = 0;
    for (int i = 0; i < QV_K_GEMM_FORMS; i++) {
        const form_facts &f = FORMS[i];
        int64_t rows = (int64_t)GEMM_ROWS * f.cluster, clusters = n_sms / f.cluster;
        int64_t tiles = (c.n_tokens + rows - 1) / rows * ((c.n_out + f.columns - 1) / f.columns);
        double time = (double)((tiles + clusters - 1) / clusters * f.columns) / f.share;
        if (i == 0 || time < least) {
            least = time;
            best = i;
        }
    }
    return best;
}

/* rows [n][n_in] in boxes of box_rows x 64. */
qv_status make_rows_map(const void *rows, int64_t n, int64_t n_in, int64_t stride, int box_rows,
                        CUtensorMap *map)
{
    const cuuint64_t sizes[3] = {(cuuint64_t)n_in, (cuuint64_t)n, 1};
    const cuuint64_t strides[2] = {(cuuint64_t)stride * 2, (cuuint64_t)(stride * n) * 2};
    const cuuint32_t box[3] = {GEMM_STEP, (cuuint32_t)box_rows, 1};
    return qv_k_tensor_map("linear", rows, sizes, strides, box, map);
}

/* y in boxes of 64 rows of 128 bytes. */
qv_status make_y_map(const qv_k_linear_args &c, CUtensorMap *map)
{
    cuuint64_t size = c.y_f32 ? 4 : 2;
    const cuuint64_t sizes[3] = {(cuuint64_t)c.n_out, (cuuint64_t)c.n_tokens, 1};
    const cuuint64_t strides[2] = {(cuuint64_t)c.y_stride * size,
                                   (cuuint64_t)(c.y_stride * c.n_tokens) * size};
    const cuuint32_t box[3] = {(cuuint32_t)(128 / size), GEMM_UNIT, 1};
    return qv_k_tensor_map_of(
        "linear", c.y_f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, c.y,
        sizes, strides, box, map);
}

/* x1 as shrink splits it, twice as many numbers as there are ranks, and B. */
qv_status make_adapter_maps(const qv_k_stream_lora &lora, int64_t n_tokens, CUtensorMap *x1,
                            CUtensorMap *b)
{
    const qv_k_lora_site &s = lora.site;
    cuuint64_t rank = (cuuint64_t)s.max_rank, planes = (cuuint64_t)s.ranges.n;
    cuuint64_t n = (cuuint64_t)n_tokens, n_out = (cuuint64_t)s.n_out;
    const cuuint64_t x1_sizes[3] = {2 * rank, planes, n};
    const cuuint64_t x1_strides[2] = {rank * 4, planes * rank * 4};
    const cuuint32_t x1_box[3] = {GEMM_STEP, 1, GEMM_ROWS};
    QV_TRY(qv_k_tensor_map("linear", lora.x1, x1_sizes, x1_strides, x1_box, x1));
    const cuuint64_t b_sizes[3] = {n_out, rank, (cuuint64_t)s.n_slots};
    const cuuint64_t b_strides[2] = {n_out * 2, rank * n_out * 2};
    const cuuint32_t b_box[3] = {64, GEMM_RANKS, 1};
    return qv_k_tensor_map("linear", s.b, b_sizes, b_strides, b_box, b);
}

template <class F>
qv_status launch(const qv_k_linear_args &c, const qv_k_stream_lora &lora, bool add, int n_sms,
                 cudaStream_t stream)
{
    gemm_maps maps;
    QV_TRY(make_rows_map(c.x, c.n_tokens, c.n_in, c.x_stride, GEMM_ROWS, &maps.x));
    QV_TRY(make_rows_map(c.w, c.n_out, c.n_in, c.n_in, F::COLUMNS / F::CLUSTER, &maps.w));
    QV_TRY(make_adapter_maps(lora, c.n_tokens, &maps.x1, &maps.b));
    QV_TRY(make_y_map(c, &maps.y));
    gemm_args args = {};
    constexpr int ROWS = GEMM_ROWS * F::CLUSTER;
    args.n_tokens = (int32_t)c.n_tokens;
    args.n_out = (int32_t)c.n_out;
    args.steps = (int32_t)((c.n_in + GEMM_STEP - 1) / GEMM_STEP);
    args.row_tiles = (int32_t)((c.n_tokens + ROWS - 1) / ROWS);
    args.col_tiles = (int32_t)((c.n_out + F::COLUMNS - 1) / F::COLUMNS);
    args.band = 2048 / ROWS; /* what runs at a time is about as many tokens as columns */
    args.y_f32 = c.y_f32;
    args.add = add;
    int64_t tiles = (int64_t)args.row_tiles * args.col_tiles, clusters = n_sms / F::CLUSTER;
    clusters = tiles < clusters ? tiles : clusters > 0 ? clusters : 1;

    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = F::CLUSTER;
    attributes[0].val.clusterDim.y = 1;
    attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(clusters * F::CLUSTER));
    config.blockDim = dim3(GEMM_THREADS);
    config.dynamicSmemBytes = GEMM_BYTES<F>;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    static_assert(GEMM_BYTES<F> <= 227 << 10, "what a block may have");
    cudaError_t error = cudaFuncSetAttribute(
        gemm_kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, GEMM_BYTES<F>);
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, gemm_kernel<F>, args, lora, maps);
    if (error != cudaSuccess)
        return qv_fail(QV_ERR_DEVICE, "cuda: linear: %s", cudaGetErrorString(error));
    return qv_k_check_launch("linear");
}

} // namespace

const char *qv_k_gemm_form_name(int form)
{
    return form >= 0 && form < QV_K_GEMM_FORMS ? FORMS[form].name : "any";
}

bool qv_k_gemm_can(const qv_k_linear_args *c, const qv_k_stream_lora *lora)
{
    /* Stores are of 16 bytes. */
    return qv_k_is_hopper() && !c->w_f32 && c->rest == nullptr && c->n_in % 8 == 0 &&
           c->x_stride % 8 == 0 && c->y_stride % (c->y_f32 ? 4 : 8) == 0 && c->n_out % 8 == 0 &&
           (uintptr_t)c->w % 16 == 0 && (uintptr_t)c->x % 16 == 0 && (uintptr_t)c->y % 16 == 0 &&
           c->n_tokens <= INT32_MAX && c->n_out <= INT32_MAX && (uintptr_t)lora->site.b % 16 == 0 &&
           (uintptr_t)lora->site.a % 16 == 0 && lora->site.max_rank % GEMM_RANKS_OF_UNIT == 0 &&
           (uintptr_t)lora->x1 % 16 == 0;
}

qv_status qv_k_gemm(const qv_k_linear_args *c, const qv_k_stream_lora *lora, bool add, int form,
                    int n_sms, void *stream)
{
    int i = form >= 0 && form < QV_K_GEMM_FORMS ? form : choose_form(*c, n_sms), n = 0;
#define GEMM_LAUNCH(name, columns, stages, cluster, lead, share)                                   \
    if (i == n++)                                                                                  \
        return launch<gemm_form<columns, stages, cluster, lead>>(*c, *lora, add, n_sms,            \
                                                                 (cudaStream_t)stream);
    GEMM_FORMS(GEMM_LAUNCH)
#undef GEMM_LAUNCH
    return QV_OK;
}
