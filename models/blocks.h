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
    QV_BUF_RESIDUAL, /* [T, hidden] F32 the residual stream */
    QV_BUF_NORMED,   /* [T, hidden] what a block reads */
    QV_BUF_REST,     /* [T, hidden] what rounding took from that, where a router reads it */
    QV_BUF_DELTA,    /* [T, hidden] F32 what a block adds */
    QV_BUF_WIDE,     /* [T, widest output of an in-projection] */
    QV_BUF_CONV,     /* [T, convolution channels] */
    QV_BUF_INNER,    /* [T, widest input of an out-projection] */
    QV_BUF_SHARED,   /* [T, hidden] F32 what shared experts add */
    QV_BUF_GATE,     /* [T, 1] of a shared expert */
    QV_BUF_LATENT,   /* [2, T, latent] what routed experts read and write, where that is narrower */
    QV_BUF_ROUTER,   /* [T, experts] F32 */
    QV_BUF_EXPERT,   /* [T, k] I32 experts of each token */
    QV_BUF_EXPERT_WEIGHT, /* [T, k] F32 */
    QV_BUF_MOE_LIST,      /* memory of the list of pairs */
    QV_BUF_EXPERT_WIDE,   /* [T k, expert's wide output], then what its activation leaves */
    QV_BUF_EXPERT_OUT,    /* [T k, expert's output] */
    QV_BUF_HEAD_IN,       /* [L, hidden] */
    QV_BUF_LOGITS,        /* [L, vocab] F32; rank 0's */
    QV_BUF_LOGITS_PART,   /* [L, this rank's part of the vocabulary] F32, with several ranks */
    QV_BUF_SHORTLIST,     /* [L, words of the longest shortlist], with several ranks */
    QV_BUF_SHORTLISTS,    /* [L, ranks, words] of all ranks; rank 0's */
    QV_BUF_LORA,          /* F32 [max(T, L), most slices, max rank], of experts [T k, ...] */
    QV_BUF_COUNT
} qv_buffer;

typedef struct {
    qv_backend *be; /* borrowed */
    void *data[QV_BUF_COUNT];
    qv_moe_list list; /* pairs of (token, expert) of the layer that runs; in its buffer */
} qv_buffers;

/* Bytes of all buffers for these limits. */
uint64_t qv_buffers_bytes(const qv_layout *layout, const qv_model_limits *limits,
                          qv_dtype activation);
/* Errors: NOMEM. */
qv_status qv_buffers_init(qv_buffers *buffers, qv_backend *be, const qv_layout *layout,
                          const qv_model_limits *limits);
void qv_buffers_deinit(qv_buffers *buffers);

/* A layer's choice of experts. */
typedef struct {
    qv_router router;
    qv_tensor logits;
    qv_beside beside;
} qv_choice;

struct qv_pass {
    qv_backend *be;
    const qv_model_config *config; /* as this rank sees it: qv_layout_rank_config */
    const qv_layout *layout;
    const qv_weights *weights;
    const qv_lora_pool *lora; /* NULL: no adapters */
    const qv_state *state;
    const qv_buffers *buffers;
    qv_moe_list *list; /* the buffers' */
    const qv_batch *batch;
    qv_probe_fn *probe; /* may be NULL */
    void *probe_user;
    /* What qv_block_route left to the experts behind it; without logits, nothing. */
    qv_choice choice;
    /* What qv_block_experts left to the qv_block_add_norm behind it; without an o, nothing. */
    qv_moe_sum sum;
    bool added; /* the block before has added to the residual itself; its delta is not written */
    /* What qv_block_add_norm left to the qv_linears behind it; without a y, nothing. */
    qv_stream_norm norm;
    qv_tensor part; /* out: [L, n] F32, logits of this rank's part of the vocabulary */
};

/* Views of the buffers for this step's T tokens: [T, hidden]. Residual, delta and shared are the
 * stream: F32, never rounded (ops/ops.h). */
qv_tensor qv_pass_residual(const qv_pass *pass);
qv_tensor qv_pass_normed(const qv_pass *pass);
qv_tensor qv_pass_delta(const qv_pass *pass);
qv_tensor qv_pass_shared(const qv_pass *pass);
/* [T, latent]: 0, what routed experts read; 1, what they write. */
qv_tensor qv_pass_latent(const qv_pass *pass, int which);

/* A tensor of the second table; empty where the layer has none. */
qv_tensor qv_pass_vec(const qv_pass *pass, int64_t layer, qv_vec vec);

/* y = x W^T of a layer's projection (QV_GLOBAL for the head), plus the adapters of the batch.
 * x [T, n_in], y [T, n_out]; for the head, L rows. Logits, the head's and a router's, and what goes
 * into the stream are F32 and never rounded. A router reads the rest of x as well, which must be
 * what the last qv_block_norm or qv_block_add_norm of its layer gave. */
qv_status qv_linear(qv_pass *pass, int64_t layer, qv_proj proj, qv_tensor x, qv_tensor y);

/* The last projection of a block, whose y is what the block adds: by qv_linear, or, without
 * adapters and probes and where that is faster, added to the pass's residual. The qv_block_add_norm
 * that follows, with y as its delta, knows. */
qv_status qv_linear_out(qv_pass *pass, int64_t layer, qv_proj proj, qv_tensor x, qv_tensor y);

/* One of several projections that read the same x. */
typedef struct {
    qv_proj proj;
    qv_act act;     /* not of those whose results are not rounded */
    qv_tensor wide; /* with an act: [T, n_out], room for what it is done to */
    qv_tensor y;
} qv_proj_part;

/* Each as by qv_linear, and its activation; in fewer launches where that is possible. */
qv_status qv_linears(qv_pass *pass, int64_t layer, qv_tensor x, int32_t n_parts,
                     const qv_proj_part *parts);

/* y[t] = embedding of token t, plus the adapters of the batch. y [T, hidden] F32. */
qv_status qv_block_embed(qv_pass *pass, qv_tensor y);

/* y = norm(residual) by a layer's norm weight. residual [T, hidden] F32, y [T, hidden]. */
qv_status qv_block_norm(qv_pass *pass, int64_t layer, qv_vec norm, qv_tensor residual, qv_tensor y);

/* residual += delta, summed over ranks; y = norm(residual). residual, delta F32. */
qv_status qv_block_add_norm(qv_pass *pass, int64_t layer, qv_vec norm, qv_tensor residual,
                            qv_tensor delta, qv_tensor y);

/* Mixers and feed-forward: x [T, hidden], y [T, hidden] F32, which may be left to qv_linear_out. */
qv_status qv_block_gated_attention(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y);
qv_status qv_block_attention(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y);
qv_status qv_block_gdn(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y);
qv_status qv_block_ssm(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y);

qv_status qv_block_mlp(qv_pass *pass, int64_t layer, qv_act act, qv_tensor x, qv_tensor y);

/* The parts of a mixture of experts. */

/* What is made of its input first, for all that follows. What a layer does not have is empty. */
typedef struct {
    qv_tensor hidden; /* [T, width] activated: what the shared expert's last projection reads */
    qv_tensor gate;   /* [T, 1] of the shared expert */
    qv_tensor logits; /* [T, experts] F32, the router's */
    qv_tensor latent; /* [T, latent] what routed experts read */
} qv_moe_input;

/* x [T, hidden]. All of it is good until the next mixer or MLP. */
qv_status qv_block_moe_in(qv_pass *pass, int64_t layer, qv_act act, qv_tensor x, qv_moe_input *out);
/* Choose experts for each token by its logits, into the pass's list; and what comes out of experts
 * that every token goes through, shared [T, hidden] F32, empty where there are none. Without a
 * probe both may be left to the experts that follow. */
qv_status qv_block_route(qv_pass *pass, int64_t layer, const qv_router *router,
                         const qv_moe_input *in, qv_tensor shared);
/* y[t] = weighted sum of the chosen experts of x[t], with the adapters of the batch, in a latent
 * space. x, y [T, latent], not the same. */
qv_status qv_block_latent_experts(qv_pass *pass, int64_t layer, qv_act act, qv_tensor x,
                                  qv_tensor y);
/* The same for the stream, and y[t] += shared[t], times sigmoid(gate[t]). x [T, hidden], y [T,
 * hidden] F32; shared [T, hidden] F32 and gate [T, 1] may be empty. Without a probe, which would
 * see y, the sums are left to the qv_block_add_norm that follows with y as its delta. */
qv_status qv_block_experts(qv_pass *pass, int64_t layer, qv_act act, qv_tensor x, qv_tensor shared,
                           qv_tensor gate, qv_tensor y);
/* y += shared, [T, hidden] F32, where routed experts are in a latent space. */
qv_status qv_block_moe_sum(qv_pass *pass, int64_t layer, qv_tensor shared, qv_tensor y);

/* Logits of the rows that need them, of this rank's part of the vocabulary: x [T, hidden] after the
 * final norm, into pass->part. */
qv_status qv_block_head(qv_pass *pass, qv_tensor x);

#endif
