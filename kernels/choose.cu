/* Router and list of experts for a decode step of a few tokens, in one launch: a block a token
 * chooses its experts, and the block that is done last makes the list.
 *
 * With few pairs a list is counted, not sorted: a thread has a pair, and its place is the number of
 * pairs of experts before its own and of earlier pairs of that expert. The numbers are those of
 * moe.cu's kernels. Bound by the launch and by some ten barriers.
 */
#include "kernels/device.cuh"
#include "kernels/kernels_moe.h"
#include "kernels/router.cuh"

namespace
{

constexpr int THREADS = 1024; /* four to an expert, if there are 256 */
constexpr int SPLIT = 4;
constexpr int MAX_PAIRS = QV_K_CHOOSE_PAIRS;
constexpr int NOBODY = INT32_MAX; /* an expert after all others */
static_assert(MAX_PAIRS <= THREADS, "a thread a pair");

struct list_shared {
    int expert[MAX_PAIRS];                    /* of each pair; -1: it lives elsewhere */
    int leader[MAX_PAIRS];                    /* the expert whose first pair it is, or NOBODY */
    int by_place[MAX_PAIRS], slot[MAX_PAIRS]; /* at each place: expert, adapter */
    bool starts[MAX_PAIRS];                   /* a run, at each place */
};

/* Runs of adapters. Thread i has place i. */
__device__ __forceinline__ void count_runs(list_shared &m, const qv_k_list &list, int places)
{
    int i = threadIdx.x;
    bool mine = i < places && m.slot[i] >= 0;
    if (i < places)
        m.starts[i] =
            mine && (i == 0 || m.by_place[i - 1] != m.by_place[i] || m.slot[i - 1] != m.slot[i]);
    __syncthreads();
    if (mine && m.starts[i]) {
        int index = 0, end = i + 1;
        for (int j = 0; j < i; j++)
            index += m.starts[j];
        while (end < places && m.by_place[end] == m.by_place[i] && m.slot[end] == m.slot[i])
            end++;
        list.runs[index] = {i, end - i, m.by_place[i], m.slot[i]};
    }
    if (i == 0) {
        int n = 0;
        for (int j = 0; j < places; j++)
            n += m.starts[j];
        *list.n_runs = n;
    }
}

/* An expert has at most a pair a token, that is one tile. */
__device__ __forceinline__ void count_list(list_shared &m, const int32_t *ids,
                                           const qv_k_list &list, int n_pairs)
{
    int p = threadIdx.x, e = -1;
    if (p < n_pairs)
        m.expert[p] = e = expert_of(ids, list, n_pairs, p);
    __syncthreads();
    int place = 0, places = 0;
    bool leads = e >= 0;
    for (int i = 0; i < n_pairs; i++) {
        int other = m.expert[i];
        places += other >= 0;
        place += other >= 0 && (other < e || (other == e && i < p));
        leads = leads && (other != e || i >= p);
    }
    if (p < n_pairs) {
        list.place[p] = e >= 0 ? place : -1;
        m.leader[p] = leads ? e : NOBODY;
    }
    if (e >= 0) {
        list.pair[place] = p;
        m.by_place[place] = e;
        m.slot[place] = list.n_segs > 0 ? slot_of_pair(list, p) : -1;
    }
    for (int i = p; i <= list.n_experts; i += THREADS) {
        int before = 0;
        for (int j = 0; j < n_pairs; j++)
            before += m.expert[j] >= 0 && m.expert[j] < i;
        list.expert_start[i] = before;
    }
    __syncthreads();
    if (leads || p == 0) {
        int index = 0, active = 0;
        for (int i = 0; i < n_pairs; i++) {
            index += m.leader[i] < e;
            active += m.leader[i] != NOBODY;
        }
        if (leads) {
            list.work[2 + 2 * index] = index << QV_K_MOE_EXPERT_BITS | e;
            list.work[3 + 2 * index] = index;
        }
        if (p == 0)
            list.work[0] = list.work[1] = active;
    }
    count_runs(m, list, places);
}

/* Grid (tokens). `arrived` is 0 before and after. */
__global__ void __launch_bounds__(THREADS)
    choose_kernel(qv_k_router_args c, qv_k_list list, uint32_t *arrived)
{
    extern __shared__ __align__(16) float choose_memory[];
    __shared__ rank_shared scores;
    __shared__ list_shared places;
    __shared__ bool is_last;
    choose_by_rank<THREADS, SPLIT>(c, blockIdx.x, choose_memory, scores);
    __threadfence(); /* the ids, before the arrival that makes another block read them */
    __syncthreads();
    if (gridDim.x > 1) {
        if (threadIdx.x == 0)
            is_last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
        __syncthreads();
        if (!is_last)
            return;
        __threadfence();
    }
    count_list(places, c.ids, list, c.n_tokens * c.top_k);
}

} // namespace

bool qv_k_choose_can(const qv_k_router_args *args)
{
    return (int64_t)args->n_tokens * args->top_k <= MAX_PAIRS && args->n_tokens <= QV_K_MOE_TILE &&
           args->n_experts <= RANK_EXPERTS && args->n_groups <= MAX_GROUPS;
}

qv_status qv_k_choose(const qv_k_router_args *args, const qv_k_list *list, uint32_t *arrived,
                      void *stream)
{
    choose_kernel<<<args->n_tokens, THREADS, rank_bytes(args->n_experts), (cudaStream_t)stream>>>(
        *args, *list, arrived);
    return qv_k_check_launch("choose");
}
