/* Launchers of the recurrent layers: convolution, Gated DeltaNet, Mamba-2. What each computes is
 * said in ops/ops.h (qv_op_conv1d, qv_op_gdn, qv_op_ssd); shapes are checked there. All pointers
 * are device memory, activations are BF16, `stream` is a cudaStream_t. Nothing here waits,
 * allocates or reads device memory on the host, so every call may be captured into a graph: grids
 * are sized by the counts in qv_k_steps, and blocks without work leave at once.
 */
#ifndef QV_KERNELS_KERNELS_RECURRENT_H
#define QV_KERNELS_KERNELS_RECURRENT_H

#include "common/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A ragged batch, as in qv_batch. n_tokens and n_seqs bound what seq_start says. */
typedef struct {
    int32_t n_tokens, n_seqs;
    int32_t max_seq_tokens;    /* bound on the tokens of one sequence; 0: n_tokens */
    const int32_t *pos;        /* [n_tokens] */
    const int32_t *seq_start;  /* [n_seqs + 1] */
    const int32_t *state_slot; /* [n_seqs] */
    uint8_t one_form;          /* 1: token by token, however many a sequence has: gdn and ssd */
} qv_k_steps;

/* BF16 [tokens, heads, d]: element (t, h, i) at data[t * token + h * head + i]. */
typedef struct {
    void *data;
    int64_t token, head;
} qv_k_heads;

typedef struct {
    const void *x;     /* BF16 [n_tokens, n_channels], rows x_stride apart */
    void *y;           /* the same with y_stride; may be x */
    void *state;       /* BF16 [n_slots, n_channels, n_taps - 1] */
    const float *w;    /* [n_channels, n_taps] */
    const float *bias; /* [n_channels] or NULL */
    int64_t x_stride, y_stride, n_channels;
    int32_t n_taps; /* up to 16 */
} qv_k_conv1d_args;

/* Errors: LIMIT (taps), DEVICE. */
qv_status qv_k_conv1d(const qv_k_steps *steps, const qv_k_conv1d_args *args, void *stream);

/* Both recurrences in one form, S [d_k, d_v] per head:
 *   S = exp(g) S;  S += k e^T;  o = S^T q,  e = beta (v - S^T k) for the delta rule, dt v for SSD
 * so q, k, v are C, B, x of SSD. */
typedef struct {
    qv_k_heads q, k; /* [T, n_k_heads, d_k] */
    qv_k_heads v, o; /* [T, n_v_heads, d_v] */
    qv_k_heads a, b; /* [T, n_v_heads]: head 1; a is dt of SSD, which has no b */
    const float *a_log, *dt_bias, *d_skip; /* [n_v_heads]; d_skip of SSD only */
    float dt_min, dt_max;                  /* SSD only */
    float *state; /* GDN [n_slots, n_v_heads, d_k, d_v], SSD [n_slots, n_v_heads, d_v, d_k] */
    int32_t n_k_heads, n_v_heads, d_k, d_v;
} qv_k_recurrent_args;

/* `scratch` is for prefill; with less than all its chunks need, more launches do the same. At least
 * qv_k_recurrent_scratch(1, 1, heads); not needed when every sequence has one token.
 * Errors: LIMIT (d_k above 256; scratch), DEVICE. */
qv_status qv_k_gdn(const qv_k_steps *steps, const qv_k_recurrent_args *args, void *scratch,
                   size_t scratch_bytes, void *stream);
qv_status qv_k_ssd(const qv_k_steps *steps, const qv_k_recurrent_args *args, void *scratch,
                   size_t scratch_bytes, void *stream);

/* Bytes of scratch with which a step of such sizes takes the fewest launches. */
size_t qv_k_recurrent_scratch(int64_t n_tokens, int64_t n_seqs, int64_t n_v_heads);

/* A layer's convolution, its recurrence and the gated norm behind it. What q, k and v of the
 * recurrence are is where they lie in y of the convolution; neither that nor o is written. */
typedef struct {
    qv_k_conv1d_args conv;
    qv_k_recurrent_args layer;
    qv_k_heads z, y; /* [T, n, d] of the norm: heads of GDN, groups of heads of SSD */
    const float *w;  /* [d] of GDN, [n * d] of SSD */
    float eps;
} qv_k_mixer_args;

/* Whether the next two can do it, and are the fastest: on 9.0, every sequence with at most one
 * token. */
bool qv_k_conv_gdn_norm_can(const qv_k_steps *steps, const qv_k_mixer_args *args);
bool qv_k_conv_ssd_norm_can(const qv_k_steps *steps, const qv_k_mixer_args *args);

/* What three launches give, bit by bit. Errors: DEVICE. */
qv_status qv_k_conv_gdn_norm(const qv_k_steps *steps, const qv_k_mixer_args *args, void *stream);
qv_status qv_k_conv_ssd_norm(const qv_k_steps *steps, const qv_k_mixer_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
