/* What launch_lora.c and launch_moe.c share. */
#ifndef QV_OPS_CUDA_LAUNCH_LORA_H
#define QV_OPS_CUDA_LAUNCH_LORA_H

#include "kernels/kernels_lora.h"
#include "ops/cuda/cuda.h"

/* Where slices start, for kernels. Errors: LIMIT. */
qv_status qv_cuda_slices(const char *op, int32_t n, const int64_t *start, qv_k_slices *out);

/* Errors: UNSUPPORTED (A and B of another dtype). */
qv_status qv_cuda_lora_is_bf16(const char *op, qv_dtype dtype);

#endif
