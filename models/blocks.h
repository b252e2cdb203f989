/* Parts that models are put together from, and qv_linear: a GEMM plus the batch's adapters.
 *
 * A qv_pass is one forward pass: the model's parts, the batch, and the buffers that intermediates
 * live in. Buffers are planned once, for the largest step; a pass allocates nothing. Shapes below:
 * T tokens of this step, L rows of logits. Engine thread only.
 */
#ifndef QV_MODELS_BLOCKS_H
#define QV_MODELS_BLOCKS_H

#include "models/arch.h"
#include "models/lora_pool.h"
#include "models/state.h"
#include "models/weights.h"

/* Where intermediates live: buffer, elements for a step of T tokens and L rows of logits. */
typedef enum {
    QV_BUF_RESIDUAL, /* [T, hidden] the residual stream */
    QV_BUF_NORMED,   /* [T, hidden] what a block reads */
    QV_BUF_DELTA,    /* [T, hidden] what a block adds */
    QV_BUF_WIDE,     /* [T, widest output of an in-projection] */
    QV_BUF_CONV,     /* [T, convolution channels] */
    QV_BUF_INNER,    /* [T, widest input of an out-projection] */
    QV_BUF_HEAD_IN,  /* [L, hidden] */
    QV_BUF_LOGITS,   /* [L, vocab] F32 */
    QV_BUF_LORA,     /* [max(T, L), most slices, max rank] F32 */
    QV_BUF_COUNT
} qv_buffer;

typedef struct {
    qv_backend *be; /* borrowed */
    void *data[QV_BUF_COUNT];
} qv_buffers;

/* Bytes of all buffers for these limits. */
uint64_t qv_buffers_bytes(const qv_layout *layout, const qv_model_limits *limits,
                          qv_dtype activation);
/* Errors: NOMEM. */
qv_status qv_buffers_init(qv_buffers *buffers, qv_backend *be, const qv_layout *layout,
                          const qv_model_limits *limits);
void qv_buffers_deinit(qv_buffers *buffers);

struct qv_pass {
    qv_backend *be;
    const qv_model_config *config;
    const qv_layout *layout;
    const qv_weights *weights;
    const qv_lora_pool *lora; /* NULL: no adapters */
    const qv_state *state;
    const qv_buffers *buffers;
    const qv_batch *batch;
    qv_probe_fn *probe; /* may be NULL */
    void *probe_user;
    qv_tensor logits; /* out: [L, vocab] F32 */
};

/* Views of the buffers for this step's T tokens: [T, hidden]. */
qv_tensor qv_pass_residual(const qv_pass *pass);
qv_tensor qv_pass_normed(const qv_pass *pass);
qv_tensor qv_pass_delta(const qv_pass *pass);

/* y = x W^T of a layer's projection (QV_GLOBAL for the head), plus the adapters of the batch.
 * x [T, n_in], y [T, n_out]; for the head, L rows. */
qv_status qv_linear(qv_pass *pass, int64_t layer, qv_proj proj, qv_tensor x, qv_tensor y);

/* y[t] = embedding of token t. */
qv_status qv_block_embed(qv_pass *pass, qv_tensor y);

/* One-plus RMS norm by a layer's norm weight. x, y [T, hidden]. */
qv_status qv_block_norm(qv_pass *pass, int64_t layer, qv_vec norm, qv_tensor x, qv_tensor y);

/* residual += delta; y = norm(residual). */
qv_status qv_block_add_norm(qv_pass *pass, int64_t layer, qv_vec norm, qv_tensor residual,
                            qv_tensor delta, qv_tensor y);

/* Mixers and feed-forward: x, y [T, hidden]. */
qv_status qv_block_gated_attention(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y);
qv_status qv_block_gdn(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y);
qv_status qv_block_swiglu_mlp(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y);

/* Logits of the rows that need them: x [T, hidden] after the final norm, into pass->logits. */
qv_status qv_block_head(qv_pass *pass, qv_tensor x);

#endif
