/* What kernels over adapter segments ask of them: places of a grid over (segment, tile of tokens),
 * numbered so that no prefix sum over the segments is needed (segment s owns the places from
 * seg_start[s] / tile + s on), and how many ranks a plane has.
 */
#ifndef QV_KERNELS_LORA_PLACES_CUH
#define QV_KERNELS_LORA_PLACES_CUH

#include "kernels/device.cuh"
#include "kernels/kernels_lora.h"

namespace
{

/* The tokens of a place: n <= 0 if it has none. */
struct tokens_of_place {
    int seg, slot, first, n;
};

/* Every warp looks at all segments at once: a search would wait for memory at every step. */
__device__ __forceinline__ tokens_of_place find_tokens(const qv_k_segments &s, int place, int tile)
{
    int lane = threadIdx.x & 31;
    tokens_of_place out = {0, -1, 0, 0};
    for (int i = 0; i < s.n_segs; i += 32) {
        int seg = i + lane, start = 0, end = 0, slot = -1;
        if (seg < s.n_segs) {
            start = s.seg_start[seg];
            end = s.seg_start[seg + 1];
            slot = s.seg_slot[seg];
        }
        unsigned before = __ballot_sync(0xffffffffu, seg < s.n_segs && start / tile + seg <= place);
        if (before == 0)
            break;
        int last = 31 - __clz(before);
        start = __shfl_sync(0xffffffffu, start, last);
        end = __shfl_sync(0xffffffffu, end, last);
        out.seg = i + last;
        out.slot = __shfl_sync(0xffffffffu, slot, last);
        out.first = start + (place - (start / tile + out.seg)) * tile;
        out.n = min(tile, end - out.first);
    }
    return out;
}

inline unsigned n_places(const qv_k_segments &s, int tile)
{
    return (unsigned)(s.n_tokens / tile + s.n_segs);
}

/* Ranks of a plane that some slice reads. All loads at once: each may wait for memory. */
__device__ __forceinline__ int plane_rank(const qv_k_lora_slice *slices, int n, int plane)
{
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < n; i++) {
        int of = slices[i].plane, ranks = slices[i].rank;
        rank = of == plane ? max(rank, ranks) : rank;
    }
    return rank;
}

} // namespace

#endif
