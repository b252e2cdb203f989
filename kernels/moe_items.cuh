/* Items of the experts' products that clusters of two blocks draw one by one.
 *
 * They are handed out in their order, so that those with rows of a matrix or pairs in common are
 * under way at the same time: by turns worked out ahead clusters drift apart, and fetch both anew
 * from memory. A cluster's first item is the one of its own number. Only for sm_90a.
 */
#ifndef QV_KERNELS_MOE_ITEMS_CUH
#define QV_KERNELS_MOE_ITEMS_CUH

#include "kernels/moe_gemm.cuh"
#include "kernels/ptx_hopper.cuh"
#include "kernels/tensor_map.cuh"

constexpr int ITEM_CLUSTER = 2;
constexpr int ITEM_K = 64;     /* of a stage */
constexpr int ITEM_TURNS = 32; /* items that warps are apart, at most, and more */

struct item_numbers {
    uint64_t there[ITEM_TURNS];
    int number[ITEM_TURNS]; /* of the items to come */
};

[[maybe_unused]] __device__ __forceinline__ void init_numbers(item_numbers &m)
{
    for (int i = 0; i < ITEM_TURNS; i++)
        barrier_init(&m.there[i], 1);
}

/* One thread of each block, once in an item: the number of the cluster's next one is on its way to
 * its blocks. It is drawn as often as there are items. */
[[maybe_unused]] __device__ __forceinline__ void
draw_number(const qv_k_list &list, item_numbers &m, int rank, int turn, int n_items, int n_clusters)
{
    int at = turn % ITEM_TURNS;
    barrier_expect(&m.there[at], (int)sizeof(int));
    if (rank != 0)
        return;
    int drawn = atomicAdd(list.next_item, 1);
    if (drawn == n_items - 1)
        *list.next_item = 0;
    for (int i = 0; i < ITEM_CLUSTER; i++)
        send_int(&m.number[at], n_clusters + drawn, &m.there[at], i);
}

[[maybe_unused]] __device__ __forceinline__ int next_number(item_numbers &m, int &turn)
{
    int at = turn % ITEM_TURNS;
    barrier_wait(&m.there[at], (turn / ITEM_TURNS) & 1);
    turn++;
    return *(volatile int *)&m.number[at];
}

/* A stage has been read by this warpgroup: both blocks may write it. */
[[maybe_unused]] __device__ __forceinline__ void release_stage(uint64_t *empty)
{
    int thread = threadIdx.x & 127;
    if (thread % 32 == 0 && thread / 32 < ITEM_CLUSTER)
        barrier_arrive_at(empty, thread / 32);
}

/* The rows of pairs, in boxes of so many by ITEM_K. */
static inline qv_status make_pairs_map(const qv_k_list &list, const qv_k_moe_linear_args &c,
                                       int rows, CUtensorMap *map)
{
    const cuuint64_t n_pairs = (cuuint64_t)list.n_tokens * (cuuint64_t)list.top_k;
    const cuuint64_t stride = (cuuint64_t)c.x_stride * 2;
    const cuuint64_t sizes[3] = {(cuuint64_t)c.n_in, n_pairs, 1};
    const cuuint64_t strides[2] = {stride, stride * n_pairs};
    const cuuint32_t box[3] = {ITEM_K, (cuuint32_t)rows, 1};
    return qv_k_tensor_map("moe_linear", c.x, sizes, strides, box, map);
}

/* As many clusters as there are items or there is room for. */
template <class SHARED, class MAPS>
static qv_status launch_items(void (*kernel)(qv_k_list, qv_k_moe_linear_args, MAPS),
                              const qv_k_list &list, const qv_k_moe_linear_args &c,
                              const MAPS &maps, int64_t n_items, int threads, void *stream)
{
    const int bytes = (int)sizeof(SHARED) + 1024;
    static_assert(sizeof(SHARED) + 1024 <= 227 << 10, "what a block may have");
    int device = 0, n_sms = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int64_t clusters = n_items < n_sms / ITEM_CLUSTER ? n_items : n_sms / ITEM_CLUSTER;
    kernel<<<(unsigned)(ITEM_CLUSTER * clusters), threads, bytes, (cudaStream_t)stream>>>(list, c,
                                                                                          maps);
    return qv_k_check_launch("moe_linear");
}

#endif
