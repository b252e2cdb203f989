/* Launchers of matrix products that cuBLASLt does not do, or not well: y [T, n_out] = x [T, n_in]
 * W^T with W row-major [n_out, n_in], x BF16, y BF16 or float32, sums in float32. With a rest, x +
 * rest stands for x.
 */
#ifndef QV_KERNELS_KERNELS_LINEAR_H
#define QV_KERNELS_KERNELS_LINEAR_H

#include "common/status.h"
#include "kernels/kernels_dense.h"
#include "kernels/kernels_lora.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const void *w; /* BF16, or float32 with w_f32 */
    const void *x;
    const void *rest; /* BF16, or NULL: none */
    void *y;
    int64_t n_tokens, n_out, n_in;
    int64_t x_stride, rest_stride, y_stride; /* elements between rows */
    bool w_f32, y_f32;
    /* x was there before the kernel launched right ahead began, which was launched to begin behind
     * all others: qv_k_stream_linear does not wait for it. */
    bool x_is_there;
} qv_k_linear_args;

/* The most tokens of qv_k_skinny_linear. */
#define QV_K_SKINNY_TOKENS 64
/* Matrices of so many rows have a form of their own in qv_k_any_linear. */
#define QV_K_FEW_ROWS 4

/* For few tokens: streams W once at the speed of memory. W BF16 with n_in a multiple of 32, x rows
 * on 16 bytes. What is computed for a row does not depend on the others. Errors: DEVICE. */
bool qv_k_skinny_linear_can(const qv_k_linear_args *args);
qv_status qv_k_skinny_linear(const qv_k_linear_args *args, void *stream);

/* Warps that share k, whose sums are added in their order. */
int qv_k_skinny_linear_warps(const qv_k_linear_args *args);

/* Tokens of a block of qv_k_stream_linear, and slices that its rows may touch. */
#define QV_K_STREAM_TOKENS 64
#define QV_K_STREAM_SLICES 4

/* The adapters' part of a product. */
typedef struct {
    qv_k_segments segments;
    qv_k_lora_site site;
    /* [n_tokens, n_slices, max_rank]: A x, from qv_k_lora_shrink, or of qv_k_decode_linear itself
     */
    float *x1;
    /* Of qv_k_decode_linear: 0 before and after; and whose A may be fetched ahead (a NULL: none).
     */
    uint32_t *arrivals;
    qv_k_lora_site next;
} qv_k_stream_lora;

/* y = W x, and with `lora` + scale B x1 in one rounding, on devices of 9.0. Made for few
 * tokens, right for any number: what is computed for a token depends on its own row and adapter
 * alone. W BF16 with n_in a multiple of 8, x rows on 16 bytes; with adapters n_out a multiple of 8
 * and a pool's rank of 4. Errors: DEVICE. */
bool qv_k_stream_linear_can(const qv_k_linear_args *args, const qv_k_stream_lora *lora);
qv_status qv_k_stream_linear(const qv_k_linear_args *args, const qv_k_stream_lora *lora, int n_sms,
                             void *stream);

/* Blocks that share rows of W and split k. */
int qv_k_stream_linear_shares(const qv_k_linear_args *args, int n_sms);

/* What is done to a row of a product. */
typedef enum {
    QV_K_LINEAR_PLAIN,  /* y [T, n_out] */
    QV_K_LINEAR_SWIGLU, /* y [T, n_out / 2], the first half of the matrix's rows is the gate */
    QV_K_LINEAR_RELU2,  /* y [T, n_out] */
    QV_K_LINEAR_ADD,    /* y [T, n_out] float32 += it, of qv_k_one_linear alone */
} qv_k_linear_act;

typedef struct {
    qv_k_linear_args args;
    qv_k_linear_act act; /* of products that were rounded to BF16, as if it were an op of its own */
} qv_k_linear_part;

#define QV_K_JOINED_PARTS  4
#define QV_K_JOINED_TOKENS 8

/* Products for at most QV_K_JOINED_TOKENS tokens in one launch, each to the bit what
 * qv_k_any_linear gives for few rows, qv_k_stream_linear where `stream` (9.0) and it can,
 * qv_k_skinny_linear otherwise. Where none of them can, the parts cannot be joined. Errors: DEVICE,
 * UNSUPPORTED. */
bool qv_k_joined_linear_can(const qv_k_linear_part *parts, int n_parts, bool stream, int n_sms);
qv_status qv_k_joined_linear(const qv_k_linear_part *parts, int n_parts, bool stream, int n_sms,
                             void *on);

/* Products of one token that read the same x, on devices of 9.0; with a norm that adds nothing, of
 * what it makes of its residual, and of its rest in those parts that have one: y is written, rest
 * is not. Sums are those of qv_k_stream_linear, if there is one part, otherwise in an order that
 * depends on all. Errors: DEVICE. */
bool qv_k_one_linear_can(const qv_k_linear_part *parts, int n_parts, const qv_k_add_norm_args *norm,
                         int n_sms);
qv_status qv_k_one_linear(const qv_k_linear_part *parts, int n_parts,
                          const qv_k_add_norm_args *norm, int n_sms, void *stream);

/* What qv_k_stream_linear does, for more tokens, up to so many: y = W x, with `lora` + scale B x1,
 * on devices of 9.0 with wgmma, where x1 is computed on the way. Conditions as above, and slices
 * begin at multiples of 8 rows. The sums of an output are taken in an order that depends on the
 * number of tokens and on whether there are adapters. */
#define QV_K_DECODE_TOKENS 64

/* The forms that the kernel exists in: room for so many tokens, stages of a block's ring. */
typedef struct {
    int tokens, stages;
} qv_k_decode_form;

/* What tests and benchmarks vary: a form, counted from 1, and blocks that share k, at most 8. 0:
 * the kernel chooses. */
typedef struct {
    int form, shares;
} qv_k_decode_tuning;

const qv_k_decode_form *qv_k_decode_forms(int *n);

bool qv_k_decode_linear_can(const qv_k_linear_args *args, const qv_k_stream_lora *lora);
/* Errors: LIMIT (form, tokens), DEVICE. */
qv_status qv_k_decode_linear(const qv_k_linear_args *args, const qv_k_stream_lora *lora,
                             qv_k_decode_tuning tuning, int n_sms, void *stream);

/* Any shape, alignment and dtype, slowly. */
qv_status qv_k_any_linear(const qv_k_linear_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
