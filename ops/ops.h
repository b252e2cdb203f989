/* What every operation means, and the backends that do it.
 *
 * Each qv_op_* function checks its arguments once for all backends (shapes, dtypes, strides) and
 * then calls the backend's entry of the same name. The CPU backend is the definition: float32
 * throughout, measured against these formulas in double precision by its tests. A backend belongs
 * to one thread (the engine's) unless a function says otherwise. No op allocates: scratch is
 * planned when the backend and the model open.
 *
 * Exactness rule of the CPU backend: what is computed for a token depends on nothing but its own
 * sequence and adapter - not on the rest of the batch, the chunking of its prompt, or the number of
 * threads. Every reduction runs in an order fixed by its own length. So batches, chunks and
 * preemption change no bit of any answer.
 *
 * Arithmetic: with "bf16" the CPU keeps float32 storage, but what an op reads as activations and
 * what it writes are numbers that BF16 can hold, as between the kernels of a device that computes
 * in BF16. Inside an op everything stays float32 and is rounded once, when it is stored, to nearest
 * even. Keys and values in pages and the inputs that a convolution keeps are activations and are
 * rounded too, A and B of adapters are BF16.
 *
 * Not rounded: recurrent state, the router's weights, logits, and the stream: the residual and
 * everything on its way into it. Those tensors are F32 on every backend. What a router reads keeps
 * the part that rounding takes from it (`rest`), because experts whose scores are close change
 * places with it.
 */
#ifndef QV_OPS_OPS_H
#define QV_OPS_OPS_H

#include "ops/batch.h"
#include "ops/comm.h"
#include "ops/tensor.h"

typedef struct {
    const char *name;       /* "cpu" (or "cuda" when built in) */
    int n_threads;          /* CPU: threads including the caller's; 0 = all cores */
    int device;             /* CUDA: ordinal */
    bool deterministic;     /* CUDA: the bits of a token follow from its sequence and its adapter:
                             * not from what else is in the batch, nor from how its sequence was
                             * cut into steps. One form of every kernel, the price of which is
                             * paid by long prompts above all */
    const char *gemm;       /* CPU: "exact" (ours, default when NULL) or "openblas" (float32 GEMM by
                             * OpenBLAS: whether a row is computed alone or with others may change its
                             * last bits, so the exactness rule does not hold) */
    const char *isa;        /* CPU: "avx512", "avx2" or "baseline"; NULL = the widest there is */
    const char *arithmetic; /* CPU: "f32" (default when NULL) or "bf16": what a device that computes
                             * in BF16 does, see below */
    const char *all_reduce; /* CUDA: how ranks on devices of their own add up: "nccl", "direct"
                             * (into each other's memory, also on one device) or "auto" (direct
                             * when short, else NCCL; default when NULL) */
} qv_backend_options;

/* Errors: NOT_FOUND (no such backend in this build, names those there are), ARG and UNSUPPORTED (an
 * option), LIMIT (threads), DEVICE, NOMEM. */
qv_status qv_backend_open(const qv_backend_options *options, qv_backend **out);
void qv_backend_close(qv_backend *be);
const char *qv_backend_name(const qv_backend *be);
const char *qv_backend_describe(const qv_backend *be); /* "cpu, 2 threads, avx512, exact gemm" */
qv_dtype qv_backend_activation_dtype(const qv_backend *be); /* CPU: F32 */
qv_dtype qv_backend_lora_dtype(const qv_backend *be);       /* CPU: F32; with "bf16", BF16 */
qv_dtype qv_backend_kv_dtype(const qv_backend *be);         /* CPU: F32 */

/* Set aside the scratch of ops that need some, for steps of up to these sizes (each >= 0). Called
 * once the model's sizes are known and before its first step; again to grow. qv_op_sample beyond
 * what was reserved fails with LIMIT. Errors: ARG, NOMEM. */
typedef struct {
    int32_t max_tokens; /* tokens of one step */
    int32_t max_logits; /* rows of logits of one step */
    int32_t n_vocab;    /* columns of the logits */
} qv_backend_limits;

qv_status qv_backend_reserve(qv_backend *be, const qv_backend_limits *limits);

/* --- Memory: any thread ------------------------------------------------------------------- */

/* Zero-filled, 64-byte aligned memory of the backend. Errors: NOMEM (names the size). */
qv_status qv_backend_alloc(qv_backend *be, size_t bytes, void **out);
void qv_backend_free(qv_backend *be, void *ptr);
/* Bytes that could be allocated now; UINT64_MAX: memory is the host's (CPU). */
uint64_t qv_backend_free_memory(const qv_backend *be);
/* Host to backend, backend to host, fill. Complete when they return. */
qv_status qv_backend_upload(qv_backend *be, void *dst, const void *src, size_t bytes);
qv_status qv_backend_download(qv_backend *be, void *dst, const void *src, size_t bytes);
qv_status qv_backend_zero(qv_backend *be, void *dst, size_t bytes);
/* Backend to backend; the two do not overlap. In the order of ops: it sees what was enqueued before
 * and is seen by what comes after, without anybody waiting. Engine thread. */
qv_status qv_backend_copy(qv_backend *be, void *dst, const void *src, size_t bytes);
/* Made-up numbers, uniform in [-scale, scale) around `mean`: a function of `seed` and the place
 * alone, so that the same call gives the same numbers on any backend. F32 or BF16. */
qv_status qv_backend_fill(qv_backend *be, void *dst, qv_dtype dtype, int64_t n, float mean,
                          float scale, uint64_t seed);
/* Wait until everything enqueued so far has finished (CPU: nothing to wait for). */
qv_status qv_backend_sync(qv_backend *be);

/* An upload of many pieces, put together by the caller piece by piece, as an adapter is into its
 * slot. On a device they go through pinned memory in few copies, on a stream of their own: the
 * first starts when what was enqueued before begin has finished, so pieces may overwrite what those
 * steps read, and later steps, which must not name what is written until end has returned, neither
 * wait for it nor hold it up. Pieces between begin and end are written in no order. begin and end
 * in one thread, any. Errors: NOMEM, DEVICE; end is due also after one. */
typedef struct {
    qv_backend *be;
    void *lane; /* the backend's */
} qv_upload;

#define QV_MAX_UPLOAD_PIECE ((size_t)1 << 20)

qv_status qv_upload_begin(qv_backend *be, qv_upload *out);
/* Memory to put the piece together in that will be at `dst`: up to QV_MAX_UPLOAD_PIECE bytes,
 * 16-byte aligned if dst is, valid until the next call. */
qv_status qv_upload_piece(qv_upload *upload, void *dst, size_t bytes, void **out);
/* A copy of any size; zeros of any size. */
qv_status qv_upload_copy(qv_upload *upload, void *dst, const void *src, size_t bytes);
qv_status qv_upload_zero(qv_upload *upload, void *dst, size_t bytes);
/* All pieces are in place when this returns. */
qv_status qv_upload_end(qv_upload *upload);

/* Bring a step's batch, whose arrays are host memory, to where ops read it: *out is what to give
 * them, valid until the next call. CPU: the same arrays. CUDA: one copy through pinned memory, in
 * the order of the step's kernels; `host` may change once this returns. Also fills what ops choose
 * their variant by (max_seq_tokens, max_context). The backend's thread. Errors: NOMEM, DEVICE. */
qv_status qv_backend_put_batch(qv_backend *be, const qv_batch *host, qv_batch *out);

/* How long the device had nothing of a step to do: from the end of a step's sampling to where the
 * next one's batch is in place (CPU: as the host sees it). For benchmarks; watching costs a little.
 * The gap is that before the step whose sampling ended last, in seconds; NaN when not watched, or
 * when the step before it sampled nothing. The backend's thread. */
void qv_backend_watch_gaps(qv_backend *be, bool on);
double qv_backend_gap(const qv_backend *be);

/* --- Recorded steps: the backend's thread ----------------------------------------------------
 *
 * A decode step is hundreds of small kernels; recorded once and replayed, they cost one launch. A
 * recording is of steps of up to n_seqs sequences with one token each, one row of logits each: what
 * is shorter is padded (ops/batch.h). */
typedef struct qv_recording qv_recording;

typedef struct {
    int32_t n_seqs;
    int32_t n_segs;      /* adapter segments; 0: steps without adapters */
    int32_t page_stride; /* pages of a sequence at most */
} qv_recording_shape;

/* Not on the CPU, not over some groups of ranks, and not while ops are timed (ops/op_times.h). */
bool qv_backend_can_record(const qv_backend *be);

/* Enqueues a step's ops, reading `batch`; called twice: to warm up, and to be recorded. */
typedef qv_status qv_record_fn(void *ctx, const qv_batch *batch);

/* Errors: UNSUPPORTED, NOMEM, DEVICE, and what `fn` returns. */
qv_status qv_backend_record(qv_backend *be, const qv_recording_shape *shape, qv_record_fn *fn,
                            void *ctx, qv_recording **out);
void qv_recording_free(qv_backend *be, qv_recording *recording);
/* Run it for a batch in host memory that fits its shape. Errors: SHAPE, DEVICE. */
qv_status qv_backend_replay(qv_backend *be, qv_recording *recording, const qv_batch *host);

/* --- Weights ------------------------------------------------------------------------------ */

/* A matrix [n_out, n_in] in the backend's own arrangement: the right operand of qv_op_linear. It
 * has a format, not just a dtype, so that quantised formats can join. */
typedef struct qv_weight qv_weight;

/* dtype of storage: BF16 or F32. All zero. Errors: NOMEM. */
qv_status qv_weight_new(qv_backend *be, int64_t n_out, int64_t n_in, qv_dtype dtype,
                        qv_weight **out);
void qv_weight_free(qv_backend *be, qv_weight *w);
/* Fill rows [row, row + n_rows) from host memory `src` [n_rows, n_in] of `src_dtype` (F32, BF16,
 * F16), `src_stride` elements between rows. Any thread, disjoint rows at once. Errors: SHAPE,
 * UNSUPPORTED. */
qv_status qv_weight_load(qv_backend *be, qv_weight *w, int64_t row, int64_t n_rows, const void *src,
                         qv_dtype src_dtype, int64_t src_stride);
/* E matrices of one shape, the right operand of qv_op_moe_linear; qv_weight_load fills plain ones
 * only, qv_weight_load_expert the others, in the same way. Errors: as above, SHAPE (no such
 * expert). */
qv_status qv_weight_new_experts(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in,
                                qv_dtype dtype, qv_weight **out);
qv_status qv_weight_load_expert(qv_backend *be, qv_weight *w, int64_t expert, int64_t row,
                                int64_t n_rows, const void *src, qv_dtype src_dtype,
                                int64_t src_stride);
/* Made-up numbers for the whole weight, as qv_backend_fill in the order [expert, row, column]. */
qv_status qv_weight_fill(qv_backend *be, qv_weight *w, float scale, uint64_t seed);
/* Whether matrices are kept row after row, as they are stored, so that a table of rows and a matrix
 * can be the same memory. CUDA: true. */
bool qv_backend_keeps_rows(const qv_backend *be);
/* A plain matrix as a tensor [n_out, n_in] over its own memory, good as long as it is. Only where
 * qv_backend_keeps_rows. */
qv_tensor qv_weight_rows(const qv_weight *w);
int64_t qv_weight_n_experts(const qv_weight *w); /* 0: a plain matrix */
int64_t qv_weight_n_out(const qv_weight *w);
int64_t qv_weight_n_in(const qv_weight *w);
/* For the memory plan; SIZE_MAX when no size_t can say it. */
size_t qv_weight_bytes(int64_t n_out, int64_t n_in, qv_dtype dtype);

/* --- LoRA pool: one layout everywhere (reference: docs/lora.md) --------------------------------
 *
 * One qv_lora_site per fused projection of a layer. `n_slices` contiguous output ranges; adapter
 * slots `n_slots`; pool rank R. Planes are spaced by R, so no offset depends on a loaded rank; rows
 * of A at and above the rank, those of B (kept transposed, so that expand reads along the output)
 * and planes without a pair are zero.
 */
typedef struct {
    int32_t plane; /* of A that this slice reads; slices of a module share plane, rank, scale */
    int32_t rank;  /* 0: no delta for this slice */
    float scale;   /* applied in float32 when B is */
    int32_t reserved;
} qv_lora_slice;

typedef struct qv_lora_site {
    int64_t n_in, n_out;
    int32_t n_slices, n_slots, max_rank;
    const int64_t *slice_start; /* [n_slices + 1] output rows; host memory */
    qv_tensor a;                /* [n_slots, n_slices (planes), max_rank, n_in] */
    qv_tensor b;                /* [n_slots, max_rank, n_out] */
    qv_lora_slice *slices;      /* [n_slots, n_slices], backend memory */
    const uint8_t *slot_active; /* [n_slots] host memory: 0 = every rank of the slot is 0 here */
    /* Whose product comes next in a step, so that its A may be fetched ahead; NULL: not known. */
    const struct qv_lora_site *next;
} qv_lora_site;

/* y[t, rows of slice] += scale * B (A x[t]) for the tokens of each segment whose slot has a pair.
 *   x [n, n_in], y [n, n_out] activation dtype (any row stride)
 *   segments: seg_start [n_segs + 1], seg_slot [n_segs] (-1 = none, rows untouched bit for bit)
 *   scratch: float32 [n, n_slices, max_rank]
 * The intermediate is float32; y is read, added to in float32, and rounded once.
 * Source: LoRA, y = W x + s B (A x). Errors: SHAPE, LIMIT (scratch; pool ranks above 512). */
qv_status qv_op_lora(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                     const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                     qv_tensor scratch, qv_tensor y);
/* The same with y F32, never rounded: what qv_op_linear_f32 gave. */
qv_status qv_op_lora_f32(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                         const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                         qv_tensor scratch, qv_tensor y);

/* LoRA of the embedding. A is stored by token, so that a lookup reads one row. Slots have memory of
 * their own, because V rows of A are worth it only for adapters that have such a pair. */
typedef struct {
    void *a;          /* [n_vocab, max_rank] LoRA dtype: row id is column id of the adapter's A */
    void *b;          /* [max_rank, n_out] LoRA dtype */
    int32_t max_rank; /* spacing of rows of A; what is at and above the rank is never read */
    int32_t rank;
    float scale;
    int32_t reserved;
} qv_embed_lora_slot;

typedef struct {
    int64_t n_vocab, n_out;
    int32_t n_slots;
    int32_t max_rank;           /* no slot's is larger */
    qv_dtype dtype;             /* of A and B: F32 or BF16 */
    qv_embed_lora_slot *slots;  /* [n_slots], backend memory */
    const uint8_t *slot_active; /* [n_slots] host memory: 0 = no pair, its entry is all zero */
} qv_embed_lora_site;

/* y[t] += scale * B A[:, ids[t]] for the tokens of each segment whose slot has a pair. y [n,
 * n_out] F32, never rounded; ids in range (checked by the caller); segments as in qv_op_lora.
 * Errors: SHAPE, LIMIT. */
qv_status qv_op_embed_lora(qv_backend *be, const qv_embed_lora_site *site, int32_t n_segs,
                           const int32_t *seg_start, const int32_t *seg_slot, const int32_t *ids,
                           qv_tensor y);

/* --- Dense ops: T tokens, activation dtype unless said ------------------------------------ */

/* y[t, :] = table[ids[t] - first, :], or 0 where the table has no such row: it may be a rank's part
 * of the vocabulary, from id `first` on. table [n, d] BF16 or F32, y [T, d] F32. */
qv_status qv_op_embed(qv_backend *be, qv_tensor table, int64_t first, const int32_t *ids,
                      qv_tensor y);

/* y [T, n_out] = x [T, n_in] W^T. Sums in float32. x and y may have any row stride. */
qv_status qv_op_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y);
/* The same with y F32 whatever the activation dtype, never rounded: logits, and what a block adds
 * to the stream. With a `rest` [T, n_in] as qv_op_add_rms_norm gives it, y = (x + rest) W^T, and
 * the rest is used up. */
qv_status qv_op_linear_f32(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor rest,
                           qv_tensor y);

/* y [T, n_out] F32 += x W^T, where the backend has that and it pays; *done: whether it was. Where
 * ranks add up, each would add its y, so never. */
qv_status qv_op_linear_add(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y,
                           bool *done);

/* qv_op_linear and then qv_op_lora in one op, with `f32` qv_op_linear_f32 and qv_op_lora_f32. A
 * backend may round y once instead of twice. The segments cover all rows of x; rows behind them may
 * hold anything then. Errors: those of the two. */
qv_status qv_op_linear_lora(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                            int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                            qv_tensor x, qv_tensor scratch, qv_tensor y, bool f32);
/* qv_op_linear_add with adapters. */
qv_status qv_op_linear_lora_add(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                                int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                                qv_tensor x, qv_tensor scratch, qv_tensor y, bool *done);

/* The activation behind a product h. */
typedef enum {
    QV_ACT_NONE,
    QV_ACT_SWIGLU, /* [n, 2 f] to [n, f]: swiglu(h[.., :f], h[.., f:]) */
    QV_ACT_RELU2,  /* relu2(h) */
} qv_act;

/* y [n, f] = act(wide), which is not QV_ACT_NONE; wide [n, 2 f] or [n, f]; y may be its first
 * columns. */
qv_status qv_op_activate(qv_backend *be, qv_act act, qv_tensor wide, qv_tensor y);

typedef struct {
    const qv_weight *w;
    bool f32; /* qv_op_linear_f32, else qv_op_linear, which an act needs */
    qv_act act;
    qv_tensor rest; /* with f32: as there, or empty; of one part at most */
    qv_tensor wide; /* with an act: [T, n_out], room for h, which may be written or not */
    qv_tensor y;    /* [T, n_out], or what the act leaves; not wide */
} qv_linear_part;

#define QV_MAX_LINEAR_PARTS 4

/* Up to QV_MAX_LINEAR_PARTS products of the same x and what follows each: the same numbers as by an
 * op for each, in fewer launches where the backend can. Errors: those of the ops. */
qv_status qv_op_linears(qv_backend *be, qv_tensor x, int32_t n_parts, const qv_linear_part *parts);

/* y = x * rsqrt(mean(x^2) + eps) * g over the last dimension, g = w or 1 + w (`plus_one`).
 * x, y [T, d] or [T, n, d] (strided rows), w [d] F32. In place allowed. */
qv_status qv_op_rms_norm(qv_backend *be, qv_tensor x, qv_tensor w, float eps, bool plus_one,
                         qv_tensor y);

/* residual += delta; y = rms_norm(residual), and rest = what rounding took from y.
 *   residual [T, d] F32; delta [T, d] F32 or empty (nothing is added); y [T, d]
 *   rest [T, d] or empty: rounded itself, so that y + rest holds twice the digits; a backend that
 *   rounds nothing leaves it alone */
qv_status qv_op_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                             float eps, bool plus_one, qv_tensor y, qv_tensor rest);

/* A norm of the stream as it is. */
typedef struct {
    qv_tensor residual, w; /* as of qv_op_add_rms_norm, each of these */
    float eps;
    bool plus_one;
    qv_tensor y, rest;
} qv_stream_norm;

/* qv_op_add_rms_norm without a delta, then qv_op_linears of its y, whose rests are the norm's or
 * empty: in one where the backend can, and then nobody else has the rest. Errors: those of the two.
 */
qv_status qv_op_norm_linears(qv_backend *be, const qv_stream_norm *norm, int32_t n_parts,
                             const qv_linear_part *parts);

/* Gated RMS norm over groups of the last dimension. x, z, y [T, n, d] (strided), w [d] when every
 * row n shares it (Qwen: norm over d, weight, then * silu(z)), or [n * d] with `gate_first`
 * (Nemotron: u = x * silu(z), norm over each group d, weight). */
qv_status qv_op_gated_rms_norm(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w, float eps,
                               bool gate_first, qv_tensor y);

/* y[t, i] = silu(gate[t, i]) * up[t, i]. All [T, d], strided rows; y may be gate or up. */
qv_status qv_op_swiglu(qv_backend *be, qv_tensor gate, qv_tensor up, qv_tensor y);

/* x[t, n, i] *= sigmoid(gate[t, n, i]). x, gate [T, n, d], strided. */
qv_status qv_op_sigmoid_gate(qv_backend *be, qv_tensor x, qv_tensor gate);

/* y[t, i] = max(x[t, i], 0)^2. x, y [T, d], strided; in place allowed. */
qv_status qv_op_relu2(qv_backend *be, qv_tensor x, qv_tensor y);

/* residual += delta, times sigmoid(gate[t, 0]) where there is a gate. residual, delta [T, d] F32,
 * never rounded; gate [T, 1] or empty; strided. */
qv_status qv_op_add(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor gate);

/* y[i, :] = x[rows[i], :]. */
qv_status qv_op_gather_rows(qv_backend *be, qv_tensor x, const int32_t *rows, qv_tensor y);

/* --- Attention over paged KV -------------------------------------------------------------- */

typedef struct {
    qv_tensor k, v; /* [n_pages, page_tokens, n_kv_heads, head_dim] of one layer */
    int32_t page_tokens;
} qv_kv_layer;

/* Rotate q and k and write k, v into their pages.
 * q [T, n_heads, d] rotated in place; k [T, n_kv, d] (rotated on the way), v [T, n_kv, d]; strided.
 * The first rotary_dim of each head rotate in NeoX halves: pair (i, i + rotary_dim/2), angle
 * pos * theta^(-2i/rotary_dim), computed in double, applied in float32. rotary_dim 0: no rotation.
 */
qv_status qv_op_rope_kv_write(qv_backend *be, const qv_batch *batch, int rotary_dim, double theta,
                              qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv);

/* Norms of queries and keys, and the rotation that follows. */
typedef struct {
    qv_tensor q_norm, k_norm; /* [head_dim] F32 */
    float eps;
    bool plus_one; /* of the norms */
    int rotary_dim;
    double theta;
} qv_norm_rope;

/* qv_op_rms_norm of q by q_norm and of k by k_norm, over each head, then qv_op_rope_kv_write: the
 * same numbers, in one where the backend can. q is normed and rotated in place; what k holds
 * afterwards is not said. Errors: those of the three. */
qv_status qv_op_norm_rope_kv_write(qv_backend *be, const qv_batch *batch, const qv_norm_rope *how,
                                   qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv);

/* Causal attention of each token over positions 0..pos of its sequence, read from the pages (this
 * step's keys and values included). q, o [T, n_heads, d], head h reads KV head h / (n_heads /
 * n_kv). o = softmax(scale * q k^T) v. */
qv_status qv_op_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv, float scale,
                          qv_tensor q, qv_tensor o);

/* qv_op_attention, then qv_op_sigmoid_gate of o by gate [T, n_heads, d]: the same numbers, in one
 * where the backend can. Errors: those of the two. */
qv_status qv_op_gated_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                                float scale, qv_tensor q, qv_tensor gate, qv_tensor o);

/* --- Recurrent layers --------------------------------------------------------------------- */

/* Causal depthwise convolution over time with SiLU, per sequence, state carried across steps.
 * x [T, C] strided; w [C, K] F32 (w[:, K-1] meets the current token); bias [C] F32 or empty;
 * state [n_slots, C, K-1] activation dtype: the last K-1 inputs, oldest first; y [T, C]. */
qv_status qv_op_conv1d(qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                       qv_tensor bias, qv_tensor state, qv_tensor y);

typedef struct {
    qv_tensor q, k;    /* [T, n_k_heads, d_k] after the convolution, not yet normalised */
    qv_tensor v;       /* [T, n_v_heads, d_v] */
    qv_tensor a, b;    /* [T, n_v_heads] raw projections */
    qv_tensor a_log;   /* [n_v_heads] F32 */
    qv_tensor dt_bias; /* [n_v_heads] F32 */
    qv_tensor state;   /* [n_slots, n_v_heads, d_k, d_v] F32, in and out */
    qv_tensor o;       /* [T, n_v_heads, d_v] */
} qv_gdn_args;

/* Gated delta rule, one token after the other (value head i reads key head i / (n_v / n_k)):
 *   q^ = q / sqrt(sum q^2 + 1e-6) / sqrt(d_k),  k^ = k / sqrt(sum k^2 + 1e-6)
 *   g = -exp(a_log) softplus(a + dt_bias),  beta = sigmoid(b)
 *   S = exp(g) S;  e = beta (v - S^T k^);  S += k^ e^T;  o = S^T q^
 * Source: Gated DeltaNet as in Qwen3.5. */
qv_status qv_op_gdn(qv_backend *be, const qv_batch *batch, const qv_gdn_args *args);

typedef struct {
    qv_tensor x;              /* [T, n_heads, d] after the convolution */
    qv_tensor b, c;           /* [T, n_groups, n_state] after the convolution */
    qv_tensor dt;             /* [T, n_heads] raw projection */
    qv_tensor a_log, dt_bias; /* [n_heads] F32 */
    qv_tensor d_skip;         /* [n_heads] F32: D */
    float dt_min, dt_max;     /* limits of dt; Nemotron-3: 0 and INFINITY, no limit at all */
    qv_tensor state;          /* [n_slots, n_heads, d, n_state] F32, in and out */
    qv_tensor y;              /* [T, n_heads, d] */
} qv_ssd_args;

/* Mamba-2's state space recurrence, one token after the other (head h reads group
 * h / (n_heads / n_groups) of B and C):
 *   dt = min(max(softplus(dt + dt_bias), dt_min), dt_max),  A = -exp(a_log)
 *   S = exp(dt A) S + (dt x) B^T;  y = S C + D x
 * Source: Dao and Gu, "Transformers are SSMs", 2024, as in Nemotron-3. Errors: SHAPE, ARG. */
qv_status qv_op_ssd(qv_backend *be, const qv_batch *batch, const qv_ssd_args *args);

/* What stands before and behind a recurrence: qv_op_conv1d from x to `mixed`, which q, k, v or x,
 * b, c of the recurrence are parts of, and qv_op_gated_rms_norm of its output, seen as `groups`. */
typedef struct {
    qv_tensor x, mixed; /* [T, C] */
    qv_tensor w;        /* [C, K] F32 */
    qv_tensor bias;     /* [C] F32 or empty */
    qv_tensor state;    /* of the convolution */
    qv_tensor groups;   /* [T, n, d]: what o or y of the recurrence is; normed in place */
    qv_tensor z;        /* [T, n, d] */
    qv_tensor norm;     /* [d] F32, or [n * d] of ssd */
    float eps;
} qv_around;

/* conv1d, gdn or ssd, and gated_rms_norm (of ssd with the gate first): the same numbers, in one
 * where the backend can. What `mixed` holds afterwards is not said. Errors: those of the three. */
qv_status qv_op_conv_gdn_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                              const qv_gdn_args *args);
qv_status qv_op_conv_ssd_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                              const qv_ssd_args *args);

/* --- Mixture of experts ---------------------------------------------------------------------
 *
 * A token goes through k of E experts; token t and its j-th expert are the pair t * k + j. One
 * layer, with P = T k:
 *
 *   qv_op_linear_f32    x and its rest [T, d]        -> logits [T, E] then qv_op_lora_f32
 *   qv_op_router        logits                       -> ids, weights [T, k]
 *   qv_op_moe_route     ids, the batch's segments    -> list       (both: qv_op_choose, beside
 *                                                       the shared expert's last product)
 *   qv_op_moe_gather    x                            -> x, one row a pair, or left alone
 *   qv_op_moe_linear    x                            -> h [P, n]      then qv_op_moe_lora into h
 *   qv_op_swiglu/relu2  h                            -> a [P, f]   (both: qv_op_moe_linear_act)
 *   qv_op_moe_linear    a, one row a pair            -> o [P, d]      then qv_op_moe_lora into o
 *                       (from the router to here: qv_op_choose_experts, without adapters on h)
 *   qv_op_moe_combine   o, weights                   -> y [T, d], or _f32 into the stream
 *
 * Row p of a tensor of pairs belongs to the pair at place p of the list. Logits stay float32 in any
 * arithmetic, because experts whose scores are close change places when they are rounded.
 */

typedef enum {
    QV_ROUTER_SOFTMAX, /* score = softmax(logits) */
    QV_ROUTER_SIGMOID, /* score = sigmoid(logits) */
} qv_router_kind;

typedef struct {
    qv_router_kind kind;
    int32_t top_k;
    bool normalize; /* weights /= their sum (SIGMOID: + 1e-20) */
    float scale;    /* weights *= scale, last */
    qv_tensor bias; /* [E] F32, added to the score for the choice alone; empty: none */
    int32_t n_groups, topk_groups; /* experts in equal groups, of which the topk_groups best may be
                                    * chosen from: best by the sum of the two highest biased scores
                                    * in the group. 1 and 1: no groups */
} qv_router;

/* Choose top_k experts for each token by biased score, the lowest index first among equals; by
 * logits where their order is that of scores, SOFTMAX without bias and groups.
 *   logits [T, E] F32 (any row stride); ids [T, top_k] I32 and weights [T, top_k] F32, contiguous,
 *   in the order of the choice: best first
 * Weights are float32 in any arithmetic. ids are in range whatever the logits.
 * Source: Qwen3.5 (SOFTMAX, normalize, scale 1), Nemotron-3 (SIGMOID with bias, groups and scale).
 * Errors: SHAPE, ARG (k, groups), LIMIT (4096 experts, 256 groups). */
qv_status qv_op_router(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                       qv_tensor weights);

/* Pairs [first, first + n) of a list: one expert, one adapter. */
typedef struct {
    int32_t first, n, expert, slot;
} qv_moe_run;

/* Where the pairs of a step go: what the grouped GEMM, the adapters and the combination of a layer
 * share. Pairs stand expert by expert and within an expert by token, and so, because tokens are
 * sorted by adapter, adapter by adapter. Runs are the pieces that have an adapter; tokens without
 * one are in none. Pairs whose id is not in [first_expert, first_expert + n_experts) (experts that
 * live elsewhere) are left out and add nothing; everywhere else experts count from 0. Valid until
 * the next qv_op_moe_route; one list serves all layers. */
typedef struct {
    int32_t n_experts, top_k, max_tokens; /* what it has room for */
    int32_t first_expert; /* ids count from it: experts of another rank have others */
    int32_t n_tokens;     /* of this routing */
    int32_t n_segs;       /* the batch's adapter segments, borrowed */
    const int32_t *seg_start, *seg_slot;
    /* Backend memory */
    int32_t *expert_start; /* [n_experts + 1] places of each expert; the last entry ends the list */
    int32_t *pair;         /* [max_tokens * top_k] the pair at each place */
    int32_t *place;        /* [max_tokens * top_k] the place of each pair; -1 = left out */
    int32_t *n_runs;       /* [1] */
    int32_t *next_item;    /* [1] the ops' own, as is work */
    qv_moe_run *runs;      /* [max_tokens * top_k] in the order of the list */
    int64_t *work;         /* [max(n_experts, max_tokens * top_k) + max_tokens * top_k / 512 + 2] */
} qv_moe_list;

/* Bytes of backend memory for a list; SIZE_MAX when it cannot be. */
size_t qv_moe_list_bytes(int32_t n_experts, int32_t top_k, int32_t max_tokens);
/* Lay a list out in `memory` of that size, which stays the caller's and outlives the list.
 * Errors: LIMIT (more than 2^31 - 1 pairs), ARG. */
qv_status qv_moe_list_init(qv_moe_list *list, int32_t n_experts, int32_t top_k, int32_t max_tokens,
                           void *memory);

/* Make the list from ids [T, top_k] I32 contiguous and adapter segments that cover the T tokens, as
 * in qv_op_lora; seg_start and seg_slot are read by the ops that use the list. Errors: SHAPE, LIMIT
 * (more tokens than it has room for). */
qv_status qv_op_moe_route(qv_backend *be, qv_tensor ids, int32_t n_segs, const int32_t *seg_start,
                          const int32_t *seg_slot, qv_moe_list *list);

/* What needs nothing of a choice of experts. */
typedef struct {
    const qv_weight *w; /* NULL: no product */
    qv_tensor x, y;     /* y = x W^T as by qv_op_linear_f32 */
    /* What is read first behind the experts, for a backend that can call it into a cache; NULL:
     * nothing. Changes no result. */
    const qv_weight *next;
} qv_beside;

/* qv_op_router and then qv_op_moe_route of its choice, of one token in one launch where the backend
 * can; and what stands `beside` (NULL: nothing), at the same time where it can. Errors: those of
 * the three. */
qv_status qv_op_choose(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                       qv_tensor weights, int32_t n_segs, const int32_t *seg_start,
                       const int32_t *seg_slot, qv_moe_list *list, const qv_beside *beside);

/* What a tensor has one row of. */
typedef enum {
    QV_MOE_TOKENS, /* [T, ..]: a pair reads the row of its token */
    QV_MOE_PAIRS,  /* [P, ..] in the order of the list */
} qv_moe_rows;

/* Before qv_op_moe_linear of *x [T, n] with a row a token: where the backend is faster with a row a
 * pair, *x becomes room [P, n] with these rows, and *rows says so; else both stay. Rows of pairs
 * that are left out are untouched. */
qv_status qv_op_moe_gather(qv_backend *be, const qv_moe_list *list, qv_tensor room, qv_tensor *x,
                           qv_moe_rows *rows);

/* y [P, n_out]: y[p] = W_e x[row of p] for the pair at place p and its expert e. The sum of a row
 * is the one of qv_op_linear, bit for bit, whatever other pairs its expert has. x [T or P, n_in] as
 * `rows` says; any row strides. Rows of pairs that are left out are untouched. */
qv_status qv_op_moe_linear(qv_backend *be, const qv_weight *w, const qv_moe_list *list, qv_tensor x,
                           qv_moe_rows rows, qv_tensor y);

/* qv_op_moe_linear and the activation behind it, for steps without adapters on the projection: the
 * same numbers as by two ops. y [P, f]; wide [P, n_out] is room for h, which may be written or not;
 * y may be its first columns. */
qv_status qv_op_moe_linear_act(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                               qv_tensor x, qv_moe_rows rows, qv_act act, qv_tensor wide,
                               qv_tensor y);

/* Both products of routed experts. */
typedef struct {
    const qv_weight *in, *out;
    qv_act act;      /* between them */
    qv_tensor x;     /* [T, in's n_in] */
    qv_tensor wide;  /* [P, in's n_out]: room */
    qv_tensor inner; /* [P, out's n_in]: the first one's results; may be columns of wide */
    qv_tensor y;     /* [P, out's n_out] */
} qv_experts;

/* qv_op_choose, then qv_op_moe_linear_act and qv_op_moe_linear of the tokens it was for: as one for
 * one token where the backend can. Errors: those of the three. */
qv_status qv_op_choose_experts(qv_backend *be, const qv_router *router, qv_tensor logits,
                               qv_tensor ids, qv_tensor weights, int32_t n_segs,
                               const int32_t *seg_start, const int32_t *seg_slot, qv_moe_list *list,
                               const qv_beside *beside, const qv_experts *experts);

/* One adapter's part of a layer's experts, in memory of its own: experts are many, so slots get it
 * only when an adapter that has one is loaded into them. The layout is that of qv_lora_site with
 * experts in front: planes spaced by max_rank, B transposed, zero (or at least never read) at and
 * above a rank. An expert that the adapter does not have has rank 0 in `slices`, or zero planes.
 *
 * A side that all experts share ("shared outer" adapters: A of the up-projection, B of the
 * down-projection) is stored once, and then used once a token rather than once a pair. With either
 * side shared, the entries of `slices` are the same for all experts. */
typedef struct {
    void *a;                    /* [n_experts or 1, n_slices (planes), max_rank, n_in] LoRA dtype */
    void *b;                    /* [n_experts or 1, max_rank, n_out] LoRA dtype */
    qv_lora_slice *slices;      /* [n_experts, n_slices] */
    int32_t max_rank;           /* spacing of this slot's planes, at most the site's */
    uint8_t a_shared, b_shared; /* 1: one matrix stands for all experts */
    uint8_t reserved[2];
} qv_moe_lora_slot;

/* One per expert projection of a layer: up (two slices, gate and up, where there is a gate), down.
 */
typedef struct {
    int64_t n_in, n_out;
    int32_t n_experts, n_slices, n_slots;
    int32_t max_rank;           /* spacing of the scratch; no slot's is larger */
    qv_dtype dtype;             /* of A and B: F32 or BF16 */
    const int64_t *slice_start; /* [n_slices + 1] output rows; host memory */
    qv_moe_lora_slot *slots;    /* [n_slots], backend memory */
    const uint8_t *slot_active; /* [n_slots] host memory: 0 = no expert part here, entry all zero */
} qv_moe_lora_site;

/* y[p, rows of slice] += scale * B_e (A_e x[row of p]) for the pairs of each run whose slot has a
 * part; all other rows stay as they are, bit for bit. To be called after qv_op_moe_linear with the
 * same list, x and rows, before the activation (up) or the combination (down).
 *   scratch: float32 [P, n_slices, max_rank], indexed by pair; holds A x afterwards
 * With QV_MOE_TOKENS, a slot that shares A has A x computed once a token. With QV_MOE_PAIRS, a slot
 * that shares B leaves y alone: qv_op_moe_combine adds that delta, from the same scratch.
 * Errors: SHAPE, LIMIT. */
qv_status qv_op_moe_lora(qv_backend *be, const qv_moe_lora_site *site, const qv_moe_list *list,
                         qv_tensor x, qv_moe_rows rows, qv_tensor scratch, qv_tensor y);

/* y[t] = sum over j of weights[t, j] * o[place of t * k + j], in the order of j, float32.
 *   o [P, d], y [T, d] any row stride; weights [T, k] F32 contiguous
 *   site: of the down-projection, or NULL without adapters; where a token's slot shares B,
 *   y[t] += scale * B (sum over j of weights[t, j] * A_e a), with A_e a as qv_op_moe_lora left it
 * in `scratch`, which is used up A token none of whose experts are in the list gets 0. Errors:
 * SHAPE, LIMIT. */
qv_status qv_op_moe_combine(qv_backend *be, const qv_moe_list *list, qv_tensor weights, qv_tensor o,
                            const qv_moe_lora_site *site, qv_tensor scratch, qv_tensor y);
/* The same with y F32, never rounded, and after it y += shared, times sigmoid(gate[t, 0]) where
 * there is a gate: what experts give that every token goes through. shared [T, d] F32 or empty,
 * gate [T, 1] or empty. */
qv_status qv_op_moe_combine_f32(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                                qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                                qv_tensor shared, qv_tensor gate, qv_tensor y);

/* What qv_op_moe_combine_f32 takes. */
typedef struct {
    const qv_moe_list *list;
    qv_tensor weights, o;
    const qv_moe_lora_site *site; /* or NULL */
    qv_tensor scratch;
    qv_tensor shared, gate; /* each may be empty */
} qv_moe_sum;

/* qv_op_moe_combine_f32 into delta, then qv_op_sum_add_rms_norm, in one where the backend can; what
 * delta [T, d] F32 holds afterwards is not said. Errors: those of the two. */
qv_status qv_op_combine_add_rms_norm(qv_backend *be, const qv_moe_sum *sum, qv_tensor residual,
                                     qv_tensor delta, qv_tensor w, float eps, bool plus_one,
                                     qv_tensor y, qv_tensor rest);

/* --- Ranks: all of them call, in the same order (ops/comm.h) ---------------------------------- */

/* Meet the other ranks, before the first collective: on every rank's own thread at the same time.
 * Nothing to do without a group. Errors: DEVICE, UNSUPPORTED (devices that cannot meet). */
qv_status qv_backend_connect(qv_backend *be);

/* x becomes the sum over ranks of their x, everywhere. x [n, d] F32, any row stride, the same n and
 * d on all ranks. Sums in the order of ranks where ranks meet in memory. Nothing to do without a
 * group. Errors: DEVICE (a rank failed). */
qv_status qv_op_all_reduce(qv_backend *be, qv_tensor x);

/* qv_op_all_reduce of delta, then qv_op_add_rms_norm, in one where the backend can; what delta
 * holds afterwards is not said. Errors: as those. */
qv_status qv_op_sum_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                                 float eps, bool plus_one, qv_tensor y, qv_tensor rest);

/* Rank 0's `whole` [n, sum of d] becomes the parts of all ranks side by side, in the order of
 * ranks. part [n, d] F32, the same n; `whole` F32, ignored on other ranks; any row strides. Without
 * a group, whole is part: nothing is copied, and the two must be the same memory. Errors: DEVICE.
 */
qv_status qv_op_gather_cols(qv_backend *be, qv_tensor part, qv_tensor whole);

/* --- Sampling ----------------------------------------------------------------------------- */

#define QV_MAX_TOP_LOGPROBS 32

/* What to do with one row of logits. A pure function of these fields: replaying the same tokens
 * gives the same result on any worker, in any batch. */
typedef struct {
    int32_t target;                            /* >= 0: score this token instead of choosing one */
    float temperature;                         /* 0 = greedy (lowest id wins ties) */
    int32_t top_k;                             /* 0 = all */
    float top_p;                               /* 1 = all */
    float min_p;                               /* 0 = all; relative to the most likely token */
    float presence_penalty, frequency_penalty; /* over generated tokens */
    float repetition_penalty;                  /* over prompt and generated tokens; 1 = none */
    uint64_t seed;
    uint32_t stream;       /* index among the n answers of one request */
    uint32_t draw;         /* how many tokens this stream has generated before */
    int32_t n_top;         /* alternatives to report, <= QV_MAX_TOP_LOGPROBS; -1 = no logprobs */
    const int32_t *tokens; /* host: prompt and generated tokens, for penalties. The last may be
                            * QV_TOKEN_OF_ROW of the sampling begun before */
    int32_t n_prompt, n_tokens;
    const int32_t *banned; /* host: ids that may not be chosen (EOS under ignore_eos: not here) */
    int32_t n_banned;
} qv_sample_row;

typedef struct {
    int32_t token;
    float logprob; /* log softmax of the unmodified logits */
    int32_t n_top;
    int32_t top_token[QV_MAX_TOP_LOGPROBS]; /* most likely first, lowest id first among equals */
    float top_logprob[QV_MAX_TOP_LOGPROBS];
} qv_sample_result;

/* logits [n, n_vocab] F32 (changed in place), rows[n] and results[n] on the host; ids >= n_valid
 * are never chosen and never alternatives (padded rows of the head), but count in the softmax.
 *
 * In order: logprobs of the raw logits over all columns; repetition penalty p of each distinct
 * token of prompt and answer, x > 0 ? x / p : x * p; then x -= frequency_penalty * (times
 * generated) + presence_penalty * (generated at all); temperature; top-k; top-p, the shortest
 * prefix of what top-k left that holds top_p of its probability; min-p; one draw u from
 * Philox(seed, stream, draw): the first id, in the order of ids, at which the running sum of what
 * is left exceeds u times its total. Equal logits rank by id, lowest first. A row with a target is
 * scored and nothing else.
 *
 * Errors: SHAPE; LIMIT (more columns than reserved); ARG (a parameter out of range; names the row).
 * A row whose logits are not all finite (INTERNAL), or whose tokens are all banned (ARG), is an
 * error that names the first such row; each has a negative token then, and the other rows their
 * results. */
qv_status qv_op_sample(qv_backend *be, qv_tensor logits, int32_t n_valid, const qv_sample_row *rows,
                       qv_sample_result *results);

/* The same in two halves, so that the next step can be enqueued before anybody has seen what this
 * one chose (QV_TOKEN_OF_ROW): begin takes what it needs of `rows` and enqueues the work, end waits
 * for the oldest sampling that has not ended and gives its results [n]. At most QV_MAX_SAMPLINGS
 * are between the two. What is wrong with a row's logits is end's to say, all else begin's, which
 * then has begun nothing. The backend's thread. */
#define QV_MAX_SAMPLINGS 2
qv_status qv_op_sample_begin(qv_backend *be, qv_tensor logits, int32_t n_valid,
                             const qv_sample_row *rows);
qv_status qv_op_sample_end(qv_backend *be, qv_sample_result *results);

/* --- Sampling from parts of the vocabulary ------------------------------------------------------
 *
 * Ranks that have a part of the vocabulary each make a shortlist of every row of theirs, and one of
 * them merges the lists (side by side, as qv_op_gather_cols leaves them) into what qv_op_sample
 * would have given for the whole row. That works for rows whose choice depends on few tokens: those
 * that are scored, greedy ones, and those with a top_k of at most QV_MAX_SHORTLIST. */

#define QV_MAX_SHORTLIST 256

/* What the lists of a step have room for: the same on all ranks. */
typedef struct {
    int32_t k;     /* tokens to choose among, <= QV_MAX_SHORTLIST */
    int32_t n_top; /* alternatives to report, <= QV_MAX_TOP_LOGPROBS */
} qv_shortlist_shape;

/* Whether a shortlist is enough for a row. */
bool qv_sample_row_is_short(const qv_sample_row *row, int32_t n_valid);
/* The least room for all rows that are short. */
qv_shortlist_shape qv_shortlist_shape_of(const qv_sample_row *rows, int64_t n_rows,
                                         int32_t n_valid);
/* Numbers of 32 bits of one list. */
int64_t qv_shortlist_words(qv_shortlist_shape shape);

/* lists [n, words] from part [n, n_part] F32 (changed in place), which is columns [first, first +
 * n_part) of logits with n_valid valid columns in all; rows are as for qv_op_sample, with ids of
 * the whole vocabulary, which is n_vocab, and without tokens that are not known yet. Lists of rows
 * that are not short are left empty. `lists` is F32, dense, and opaque. Errors: SHAPE, LIMIT, ARG
 * as qv_op_sample. */
typedef struct {
    int64_t first, n_vocab;
    int32_t n_valid;
    qv_shortlist_shape shape;
} qv_shortlist_part;
qv_status qv_op_shortlist(qv_backend *be, qv_tensor part, const qv_shortlist_part *where,
                          const qv_sample_row *rows, qv_tensor lists);

/* Merge lists [n, n_parts * words], parts in the order of ids, into results on the host. Rows that
 * are not short keep the results they have. The same token, alternatives and order as qv_op_sample
 * on the whole rows; logprobs differ by the rounding of the sum over the vocabulary. Errors: those
 * of qv_op_sample. */
qv_status qv_op_merge_shortlists(qv_backend *be, qv_tensor lists, int32_t n_parts,
                                 const qv_shortlist_part *where, const qv_sample_row *rows,
                                 qv_sample_result *results);

/* Whether parameters make sense for a vocabulary of n_vocab: QV_OK, or ARG, which names the row. */
qv_status qv_sample_check_rows(const qv_sample_row *rows, int64_t n_rows, int64_t n_vocab);
/* What results say of rows that could not be sampled: QV_OK, or INTERNAL or ARG for the first. */
qv_status qv_sample_check_results(const qv_sample_result *results, int64_t n_rows);

#endif
