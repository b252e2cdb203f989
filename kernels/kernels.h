/* The C API of the kernels: one launcher per kernel. Pointers are device memory unless said,
 * `stream` is a cudaStream_t. Nothing here waits, allocates or reads device memory on the host, so
 * every call may be recorded into a graph. Meanings of ops are in ops/ops.h, which also checks
 * shapes; here stand layouts, alignment and limits. Errors: DEVICE (the launch failed).
 *
 * Includes nothing but common/status.h and common/dtype.h, so that a kernel can be lifted out and
 * timed alone. The parts: kernels_dense.h, kernels_attention.h, kernels_linear.h, kernels_sample.h.
 */
#ifndef QV_KERNELS_KERNELS_H
#define QV_KERNELS_KERNELS_H

#include "common/dtype.h"
#include "common/status.h"
#include "kernels/kernels_attention.h"
#include "kernels/kernels_dense.h"
#include "kernels/kernels_gemm.h"
#include "kernels/kernels_linear.h"
#include "kernels/kernels_sample.h"
#include "kernels/kernels_upload.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Nothing, for so long: what is enqueued behind it collects meanwhile. */
qv_status qv_k_hold(uint64_t ns, void *stream);

#ifdef __cplusplus
}
#endif

#endif
