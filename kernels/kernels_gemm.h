/* Launcher of a matrix product for many tokens, prefill, with adapters inside, on devices of 9.0: y
 * = x W^T + scale B x1, rounded once. W and x BF16, y BF16 or float32, sums in float32. What is
 * computed for a token depends on its own row and adapter alone.
 *
 * There are several forms, which differ in the shapes of their tiles; they give the same numbers.
 */
#ifndef QV_KERNELS_KERNELS_GEMM_H
#define QV_KERNELS_KERNELS_GEMM_H

#include "kernels/kernels_linear.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { QV_K_GEMM_FORMS = 3, QV_K_GEMM_ANY = -1 };

/* What a form is, in a few words. */
const char *qv_k_gemm_form_name(int form);

/* n_in and all row strides are multiples of 16 bytes, all rows begin on 16; n_out is a multiple of
 * 8 and the pool's rank of 4; no rest. */
bool qv_k_gemm_can(const qv_k_linear_args *args, const qv_k_stream_lora *lora);

/* In that form, or QV_K_GEMM_ANY: in the one that should be fastest. To be launched right behind
 * qv_k_lora_shrink, beside whose last blocks it starts. Errors: DEVICE. */
qv_status qv_k_gemm(const qv_k_linear_args *args, const qv_k_stream_lora *lora, int form, int n_sms,
                    void *stream);

#ifdef __cplusplus
}
#endif
#endif
