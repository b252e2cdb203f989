/* Ops that the CUDA backend does not have. Each says so when it is called; one that gets its kernel
 * leaves this file. */
#include "ops/cuda/cuda.h"

#pragma GCC diagnostic ignored "-Wunused-parameter"

#define PENDING(name)                                                                              \
    return qv_fail(QV_ERR_UNSUPPORTED, "cuda: the op '%s' has no kernel in this build", name)

qv_status qv_cuda_sample(qv_backend *be, qv_tensor logits, int32_t n_valid,
                         const qv_sample_row *rows, qv_sample_result *results)
{
    PENDING("sample");
}
