/* Launcher of a matrix product for many tokens, prefill, with adapters inside, on devices of 9.0: y
 * = x W^T + scale B x1, or added to a float32 y, rounded once. W and x BF16, y BF16 or float32,
 * sums in float32. What is computed for a token depends on its own row and adapter alone.
 *
 * There are several forms, which differ in the shapes of their tiles; they give the same numbers
 * but for the order in which an adapter's part is added at the edges of its tokens and slices.
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
 * 8 and the pool's rank of 16; no rest. */
bool qv_k_gemm_can(const qv_k_linear_args *args, const qv_k_stream_lora *lora);

/* The first half of the adapters: scale A x for their tokens, into lora->x1, as two BF16 numbers
 * (16 bits): [n_tokens, n_slices, max_rank / 16][16 high, 16 low]. Slices that share a plane have
 * one rank and scale. A kernel that is launched right behind may start once all before this is
 * complete. Errors: DEVICE. */
qv_status qv_k_gemm_shrink(const qv_k_linear_args *args, const qv_k_stream_lora *lora, int n_sms,
                           void *stream);

/* lora->x1 is what qv_k_gemm_shrink made; to be launched right behind it, beside whose last
 * blocks it starts. With `add`, of a float32 y, y += that. In that form, or QV_K_GEMM_ANY: in the
 * one that should be fastest. Errors: DEVICE. */
qv_status qv_k_gemm(const qv_k_linear_args *args, const qv_k_stream_lora *lora, bool add, int form,
                    int n_sms, void *stream);

#ifdef __cplusplus
}
#endif
#endif
