/* Router and list of experts for a step of one token, in one launch of one block, which ranks the
 * experts and then counts the list: each expert has a pair at most, so a pair's place is the number
 * of chosen experts before its own. The numbers are those of moe.cu's kernels. Bound by the launch
 * and by some ten barriers; for two tokens it is no faster than two launches, for eight slower.
 *
 * The memory has nothing to do meanwhile, so further blocks call what a later product reads into
 * the L2 cache, and leave.
 */
#include "kernels/device.cuh"
#include "kernels/kernels_moe.h"
#include "kernels/router.cuh"

namespace
{

constexpr int THREADS = 1024; /* four to an expert, if there are 256; one to a pair */
constexpr int SPLIT = 4;
static_assert(RANK_EXPERTS <= THREADS, "a token has no more pairs than there are experts");

/* `expert` has room for a number a pair. */
__device__ __forceinline__ void count_list(const int32_t *ids, const qv_k_list &list, int *expert)
{
    int p = threadIdx.x, n_pairs = list.top_k, e = -1;
    if (p < n_pairs)
        expert[p] = e = expert_of(ids, list, n_pairs, p);
    __syncthreads();
    int slot = list.n_segs > 0 ? slot_of_pair(list, 0) : -1, place = 0, places = 0;
    for (int i = 0; i < n_pairs; i++) {
        places += expert[i] >= 0;
        place += expert[i] >= 0 && expert[i] < e;
    }
    if (p < n_pairs)
        list_pair(list, p, e, place, slot);
    if (p == 0)
        list_counts(list, places, slot);
    for (int i = p; i <= list.n_experts; i += THREADS) {
        int before = 0;
        for (int j = 0; j < n_pairs; j++)
            before += expert[j] >= 0 && expert[j] < i;
        list.expert_start[i] = before;
    }
}

/* For call_ahead(), half a GB at most. 35B, a step in ms: 16 blocks 3.713, 33 3.704, 66 3.801;
 * pieces of 4 KiB 3.727, of 64 3.703. */
constexpr int AHEAD_BLOCKS = 33;

__global__ void __launch_bounds__(THREADS)
    choose_kernel(qv_k_router_args c, qv_k_list list, qv_k_ahead ahead)
{
    let_next_start();
    if (blockIdx.x > 0) {
        call_ahead(ahead, (int)blockIdx.x - 1, AHEAD_BLOCKS);
        return;
    }
    extern __shared__ __align__(16) float choose_memory[];
    __shared__ rank_shared scores;
    __shared__ int expert[RANK_EXPERTS];
    choose_by_rank<THREADS, SPLIT>(c, 0, choose_memory, scores);
    count_list(c.ids, list, expert); /* a barrier in between: the ids are there */
}

} // namespace

bool qv_k_choose_can(const qv_k_router_args *args)
{
    return args->n_tokens == 1 && args->n_experts <= RANK_EXPERTS && args->n_groups <= MAX_GROUPS;
}

qv_status qv_k_choose(const qv_k_router_args *args, const qv_k_list *list, qv_k_ahead ahead,
                      void *stream)
{
    unsigned more = ahead.bytes[0] + ahead.bytes[1] > 0 && qv_k_is_hopper() ? AHEAD_BLOCKS : 0;
    choose_kernel<<<1 + more, THREADS, rank_bytes(args->n_experts), (cudaStream_t)stream>>>(
        *args, *list, ahead);
    return qv_k_check_launch("choose");
}
