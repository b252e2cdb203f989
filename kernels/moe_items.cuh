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

constexpr int ITEM_CLUSTER = 2;
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

#endif
