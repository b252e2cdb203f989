/* Ranks of one process that write into each other's memory: the sums, and the sums fused with what
 * follows, that kernels/all_reduce.cu does in one launch. Inside comm.c only.
 *
 * Every rank owns its slots, in a pool of its own that only the group's devices may reach: opening
 * all of a device's memory to the others (cudaDeviceEnablePeerAccess) would map every weight for
 * them too. A failure of any rank ends all waits on all devices, as does a rank that does not come
 * for QV_CUDA_PATIENCE_S seconds.
 */
#ifndef QV_OPS_CUDA_DIRECT_H
#define QV_OPS_CUDA_DIRECT_H

#include "ops/cuda/cuda.h"

#define QV_CUDA_PATIENCE_S 30

typedef struct qv_cuda_direct qv_cuda_direct;

/* Whether this rank's device can write to those of the others, and they are few enough.
 * `devices` has one for each rank. */
bool qv_cuda_direct_can(const qv_cuda_backend *cuda, const int *devices, int32_t n_ranks);

/* All ranks, at the same time. `devices` as above. Errors: NOMEM, DEVICE. Close also after one. */
qv_status qv_cuda_direct_open(qv_cuda_backend *cuda, const int *devices, qv_cuda_direct **out);
/* Frees what others write to: only when the group's streams are idle or its ranks have given up. */
void qv_cuda_direct_close(qv_cuda_backend *cuda, qv_cuda_direct *direct);

/* End the waits of this rank's kernels, now and from now on. Any thread. */
void qv_cuda_direct_stop(qv_cuda_direct *direct);
/* Errors: DEVICE (a rank did not come; names it). */
qv_status qv_cuda_direct_check(const qv_cuda_direct *direct);

/* On one device: wait for the other ranks' threads, around whatever launches kernels that wait for
 * each other. A call that waits for the device, as the first launch of some kernel may, would else
 * hold up the very thread that the device waits for. Nothing to do on several devices, where no
 * rank waits for another's device, nor while a step is recorded. */
qv_status qv_cuda_direct_together(qv_cuda_backend *cuda, const qv_cuda_direct *direct);

/* As the ops of the same names; x and part dense. Nothing to do for empty ones. */
qv_status qv_cuda_direct_all_reduce(qv_cuda_backend *cuda, qv_cuda_direct *direct, qv_tensor x);
qv_status qv_cuda_direct_gather_cols(qv_cuda_backend *cuda, qv_cuda_direct *direct, qv_tensor part,
                                     qv_tensor whole);
/* Sets *done to false, having done nothing, when sizes or alignments do not fit. */
qv_status qv_cuda_direct_sum_add_norm(qv_cuda_backend *cuda, qv_cuda_direct *direct,
                                      qv_tensor residual, qv_tensor delta, qv_tensor w, float eps,
                                      bool plus_one, qv_tensor y, qv_tensor rest, bool *done);

#endif
