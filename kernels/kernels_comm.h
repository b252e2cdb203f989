/* Sums over tensors of several ranks on one device. Part of kernels.h. */
#ifndef QV_KERNELS_KERNELS_COMM_H
#define QV_KERNELS_KERNELS_COMM_H

#include "common/dtype.h"
#include "common/status.h"

#include <stdint.h>

#define QV_K_MAX_RANKS 64

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] = sum over r of in[r][i] for i in [first, end), in the order of r. Float32; `in` is a host
 * array of `n` device pointers; out may be one of them. */
qv_status qv_k_sum_ranks(void *const *in, int32_t n, void *out, int64_t first, int64_t end,
                         void *stream);

#ifdef __cplusplus
}
#endif

#endif
