/* Inside the CUDA backend: its object, its weights, its op functions. Plain C over the runtime API,
 * cuBLASLt and kernels/.
 *
 * Streams: `stream` carries every op and every copy of the step, in order. Uploads from other
 * threads (weights, adapters) go through lanes: a pinned buffer and a stream each; an upload starts
 * after what the compute stream held when it was called, and is complete when it returns.
 *
 * Every CUDA error becomes a status with a sentence. A fault in a kernel shows at the next call
 * that waits; after one, nothing on the device works any more, and the worker process has to end.
 */
#ifndef QV_OPS_CUDA_CUDA_H
#define QV_OPS_CUDA_CUDA_H

#include "kernels/kernels.h"
#include "ops/backend.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

#define QV_CUDA_LANES      4
#define QV_CUDA_LANE_BYTES ((size_t)8 << 20)

#define QV_CUDA_BLAS_WORKSPACE ((size_t)64 << 20)
#define QV_CUDA_COUNTERS       ((size_t)1 << 16)
#define QV_CUDA_RETIRED        16

/* A way for uploads: the thread that holds it fills `host` and copies from there. An upload of many
 * pieces fills it by halves, each a list of pieces and what goes there: one copy of that to
 * `device`, and a kernel that takes the pieces where they belong, while the other half is filled.
 */
typedef struct {
    void *host;   /* pinned, QV_CUDA_LANE_BYTES; NULL until first used */
    void *device; /* as much; NULL until pieces are uploaded */
    cudaStream_t stream;
    cudaEvent_t ready;   /* what the compute stream held when the upload began */
    cudaEvent_t free[2]; /* the half has been taken to its places */
    int half;            /* that is being filled */
    size_t used;         /* bytes of it, its list included */
    int32_t n_pieces;    /* of it */
    bool taken;
} qv_cuda_lane;

/* Pinned host memory and as much of the device, grown together when a step needs more. */
typedef struct {
    void *host, *device;
    size_t bytes;
} qv_cuda_mirror;

/* One sampling between its begin and its end; what it chose stays until its place is used again. */
typedef struct {
    qv_cuda_mirror params, results; /* of its rows */
    int64_t n_rows;
    cudaEvent_t done; /* the results are on the host */
    uint64_t step;    /* that it is of */
} qv_cuda_sampling;

/* Where steps begin and end on the device, of the last few: for the gaps between them. */
#define QV_CUDA_STEPS 4
typedef struct {
    cudaEvent_t start, stop; /* its batch is in place; its sampling is done. NULL until watched */
    uint64_t stopped;        /* the step that `stop` was recorded for */
} qv_cuda_step;

typedef struct qv_cuda_plans qv_cuda_plans; /* linear.c */
typedef struct qv_cuda_comm qv_cuda_comm;   /* comm.c */

/* How ranks on devices of their own add up: the option all_reduce. */
typedef enum {
    QV_CUDA_SUMS_NCCL,
    QV_CUDA_SUMS_DIRECT,
    QV_CUDA_SUMS_AUTO,
} qv_cuda_sums;

typedef struct {
    qv_backend base;
    int device, n_sms, major, minor;
    bool deterministic;
    bool list_is_new; /* no product of experts has been launched since a list of them was made */
    /* Of tests and benchmarks, { 0 } in use. A form: wherever qv_k_decode_linear can do a product
     * of so many tokens; -1: nowhere. */
    qv_k_decode_tuning decode_tuning;
    qv_cuda_sums sums;
    cudaStream_t stream;
    qv_cuda_lane lanes[QV_CUDA_LANES];
    pthread_mutex_t lock; /* of lanes[].taken */
    pthread_cond_t lane_free;

    qv_backend_limits limits; /* what was reserved */
    uint32_t *counters;       /* [QV_CUDA_COUNTERS] 0 between ops: blocks that have arrived */
    uint32_t *lora_arrivals;  /* the same of a product with adapters */
    void *scratch;            /* of ops, one at a time: what is in it is dead after the op */
    size_t scratch_bytes;
    void *retired[QV_CUDA_RETIRED]; /* earlier scratch that recordings still use */
    int n_retired, n_recordings;
    bool recording_now;
    qv_cuda_mirror batch;                         /* the arrays of the step */
    cudaEvent_t batch_sent;                       /* the host side may be written again */
    qv_cuda_sampling samplings[QV_MAX_SAMPLINGS]; /* in turn */
    uint64_t n_begun, n_ended;                    /* of them, ever */
    qv_cuda_mirror sample;                        /* parameters of rows to be shortlisted */
    qv_cuda_mirror merge;                         /* of rows whose shortlists are merged */
    qv_cuda_mirror result;                        /* of these */
    qv_cuda_step steps[QV_CUDA_STEPS];            /* their marks, in turn */
    uint64_t n_steps;                             /* ever; the current one's number */
    int32_t *seen_place;                          /* host [limits.n_vocab], all -1 between ops */

    cublasLtHandle_t blas;
    void *blas_workspace;
    qv_cuda_plans *plans;
    cudaEvent_t *marks; /* [QV_MAX_MARKS] made as they are needed; NULL: none yet */
    qv_cuda_comm *comm; /* NULL: alone, or not connected */
} qv_cuda_backend;

typedef struct {
    qv_weight base;
    void *data;          /* [max(n_experts, 1), n_out, n_in] row-major */
    size_t expert_bytes; /* from one expert's matrix to the next */
} qv_cuda_weight;

static inline qv_cuda_backend *qv_cuda(qv_backend *be)
{
    return (qv_cuda_backend *)be;
}

static inline const qv_cuda_weight *qv_cuda_weight_of(const qv_weight *w)
{
    return (const qv_cuda_weight *)w;
}

/* The failed call and what CUDA says of it, as DEVICE or NOMEM. */
qv_status qv_cuda_fail(cudaError_t error, const char *what);

#define QV_CUDA_TRY(expr)                                                                          \
    do {                                                                                           \
        cudaError_t cuda_try_error_ = (expr);                                                      \
        if (cuda_try_error_ != cudaSuccess)                                                        \
            return qv_cuda_fail(cuda_try_error_, #expr);                                           \
    } while (0)

/* --- memory.c ----------------------------------------------------------------------------- */

/* Make the backend's device the calling thread's: one new to CUDA would use device 0, and a thread
 * that works for several ranks the last one's. What begins a step, or runs outside of one, calls
 * it. */
qv_status qv_cuda_use(const qv_cuda_backend *cuda);
qv_status qv_cuda_alloc(qv_backend *be, size_t bytes, void **out);
void qv_cuda_free(qv_backend *be, void *ptr);
uint64_t qv_cuda_free_memory(const qv_backend *be);
qv_status qv_cuda_upload(qv_backend *be, void *dst, const void *src, size_t bytes);
qv_status qv_cuda_download(qv_backend *be, void *dst, const void *src, size_t bytes);
qv_status qv_cuda_zero(qv_backend *be, void *dst, size_t bytes);
qv_status qv_cuda_fill(qv_backend *be, void *dst, qv_dtype dtype, int64_t n, float mean,
                       float scale, uint64_t seed);
qv_status qv_cuda_copy(qv_backend *be, void *dst, const void *src, size_t bytes);
qv_status qv_cuda_sync(qv_backend *be);

/* Room for `bytes` in both halves; what they held is lost when they grow. */
qv_status qv_cuda_mirror_require(qv_cuda_backend *cuda, qv_cuda_mirror *mirror, size_t bytes);
void qv_cuda_mirror_deinit(qv_cuda_mirror *mirror);
/* Scratch for one op. Sizes known from the limits are planned at reserve, so that a step grows it
 * only when a shape was not foreseen. */
qv_status qv_cuda_scratch_require(qv_cuda_backend *cuda, size_t bytes, void **out);

/* For upload.c: a lane that nobody holds, and back. */
qv_cuda_lane *qv_cuda_take_lane(qv_cuda_backend *cuda);
void qv_cuda_give_lane(qv_cuda_backend *cuda, qv_cuda_lane *lane);
/* Its pinned memory; what it copies starts after what the compute stream holds now. */
qv_status qv_cuda_start_lane(qv_cuda_backend *cuda, qv_cuda_lane *lane);

/* --- upload.c ----------------------------------------------------------------------------- */

qv_status qv_cuda_upload_begin(qv_backend *be, void **lane);
qv_status qv_cuda_upload_piece(qv_backend *be, void *lane, void *dst, size_t bytes, void **out);
qv_status qv_cuda_upload_zero(qv_backend *be, void *lane, void *dst, size_t bytes);
qv_status qv_cuda_upload_end(qv_backend *be, void *lane);

/* --- comm.c ------------------------------------------------------------------------------- */

qv_status qv_cuda_connect(qv_backend *be);
void qv_cuda_leave(qv_backend *be);
qv_status qv_cuda_all_reduce(qv_backend *be, qv_tensor x);
qv_status qv_cuda_gather_cols(qv_backend *be, qv_tensor part, qv_tensor whole);
qv_status qv_cuda_sum_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                                   float eps, bool plus_one, qv_tensor y, qv_tensor rest);
/* After launching recorded collectives: see qv_cuda_direct_together. */
qv_status qv_cuda_meet_ranks(qv_cuda_backend *cuda);
/* Wait for an event, or with NULL for the whole compute stream. With other ranks, also until one of
 * them fails. */
qv_status qv_cuda_wait(qv_cuda_backend *cuda, cudaEvent_t event);

/* --- sample.c ----------------------------------------------------------------------------- */

/* Room for so many rows and bytes of their parameters. */
qv_status qv_cuda_sampling_require(qv_cuda_backend *cuda, qv_cuda_sampling *s, int64_t n_rows,
                                   size_t param_bytes);

/* Put ids in the place of those of a batch's tokens that the host did not know: `host` are its
 * tokens there, `device` where they have been sent. */
qv_status qv_cuda_take_chosen(qv_cuda_backend *cuda, const int32_t *host, int32_t n,
                              int32_t *device);

/* A step's batch is in place: where the gap between it and the one before ends. */
qv_status qv_cuda_mark_start(qv_cuda_backend *cuda);

/* --- batch.c, weight.c, linear.c ---------------------------------------------------------- */

qv_status qv_cuda_put_batch(qv_backend *be, const qv_batch *host, qv_batch *out);

qv_status qv_cuda_weight_new(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in,
                             qv_dtype dtype, qv_weight **out);
void qv_cuda_weight_free(qv_backend *be, qv_weight *w);
qv_status qv_cuda_weight_load(qv_backend *be, qv_weight *w, int64_t expert, int64_t row,
                              int64_t n_rows, const void *src, qv_dtype src_dtype,
                              int64_t src_stride);

void *qv_cuda_weight_rows(const qv_weight *w);
/* Whether qv_k_stream_linear is to do a product that it can do: few tokens, or deterministic. */
bool qv_cuda_streams(const qv_cuda_backend *cuda, const qv_k_linear_args *args);
/* Whether qv_k_gemm is to do a product with adapters: of prefill, where the bits of a token may
 * depend on how many there are. */
bool qv_cuda_gemms(const qv_cuda_backend *cuda, const qv_k_linear_args *args,
                   const qv_k_stream_lora *lora);
/* Whether qv_k_decode_linear is to do a product, with or without adapters. */
bool qv_cuda_decodes(const qv_cuda_backend *cuda, const qv_k_linear_args *args,
                     const qv_k_stream_lora *lora);
qv_k_linear_args qv_cuda_linear_args(const qv_weight *w, qv_tensor x, qv_tensor rest, qv_tensor y);
bool qv_cuda_takes_linear_add(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y);
bool qv_cuda_takes_linear_lora_add(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y);
qv_status qv_cuda_linear_add(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y);
bool qv_cuda_takes_norm_linears(qv_backend *be, const qv_stream_norm *norm, int32_t n_parts,
                                const qv_linear_part *parts);
qv_status qv_cuda_norm_linears(qv_backend *be, const qv_stream_norm *norm, int32_t n_parts,
                               const qv_linear_part *parts);
bool qv_cuda_takes_norm_gate(qv_backend *be, const qv_stream_norm *norm,
                             const qv_linear_part *part);
qv_status qv_cuda_norm_gate(qv_backend *be, const qv_stream_norm *norm, const qv_linear_part *part);
bool qv_cuda_takes_linears(qv_backend *be, qv_tensor x, int32_t n_parts,
                           const qv_linear_part *parts);
qv_status qv_cuda_linears(qv_backend *be, qv_tensor x, int32_t n_parts,
                          const qv_linear_part *parts);
qv_status qv_cuda_linear_lora(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                              int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                              qv_tensor x, qv_tensor scratch, qv_tensor y);
qv_status qv_cuda_linear_lora_add(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                                  int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                                  qv_tensor x, qv_tensor scratch, qv_tensor y);

qv_status qv_cuda_weight_fill(qv_backend *be, qv_weight *w, float scale, uint64_t seed);

/* --- recording.c -------------------------------------------------------------------------- */

qv_status qv_cuda_record(qv_backend *be, const qv_recording_shape *shape, qv_record_fn *fn,
                         void *ctx, qv_recording **out);
void qv_cuda_recording_free(qv_backend *be, qv_recording *recording);
qv_status qv_cuda_replay(qv_backend *be, qv_recording *recording, const qv_batch *host);

/* --- launch_dense.c, launch_attention.c --------------------------------------------------- */

qv_k_add_norm_args qv_cuda_add_norm_args(qv_tensor residual, qv_tensor delta, qv_tensor w,
                                         float eps, bool plus_one, qv_tensor y, qv_tensor rest);
qv_status qv_cuda_norm_rope_kv_write(qv_backend *be, const qv_batch *batch, const qv_norm_rope *how,
                                     qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv);
qv_status qv_cuda_gated_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                                  float scale, qv_tensor q, qv_tensor gate, qv_tensor o);

/* --- launch_recurrent.c ------------------------------------------------------------------- */

bool qv_cuda_takes_conv_gdn_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                 const qv_gdn_args *args);
qv_status qv_cuda_conv_gdn_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                const qv_gdn_args *args);
bool qv_cuda_takes_conv_ssd_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                 const qv_ssd_args *args);
qv_status qv_cuda_conv_ssd_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                const qv_ssd_args *args);

/* --- launch_moe.c ------------------------------------------------------------------------- */

qv_status qv_cuda_choose(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                         qv_tensor weights, qv_moe_list *list, const qv_beside *beside);
bool qv_cuda_takes_experts(qv_backend *be, const qv_router *router, qv_tensor logits,
                           const qv_moe_list *list, const qv_experts *experts);
qv_status qv_cuda_choose_experts(qv_backend *be, const qv_router *router, qv_tensor logits,
                                 qv_tensor ids, qv_tensor weights, qv_moe_list *list,
                                 const qv_beside *beside, const qv_experts *experts);

qv_status qv_cuda_combine_add_rms_norm(qv_backend *be, const qv_moe_sum *sum, qv_tensor residual,
                                       qv_tensor delta, qv_tensor w, float eps, bool plus_one,
                                       qv_tensor y, qv_tensor rest);
qv_status qv_cuda_moe_linear_act(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                                 qv_tensor x, qv_moe_rows rows, qv_act act, qv_tensor wide,
                                 qv_tensor y);

bool qv_cuda_wants_pairs(qv_backend *be, const qv_moe_list *list, qv_tensor x, qv_tensor room);
qv_status qv_cuda_moe_gather(qv_backend *be, const qv_moe_list *list, qv_tensor x, qv_tensor y);

/* --- clock.c ------------------------------------------------------------------------------ */

qv_status qv_cuda_mark(qv_backend *be, int32_t i);
qv_status qv_cuda_between(qv_backend *be, int32_t i, double *seconds);
qv_status qv_cuda_hold(qv_backend *be, double seconds);
void qv_cuda_marks_free(qv_cuda_backend *cuda);

void qv_cuda_plans_free(qv_cuda_plans *plans);

/* --- Ops ---------------------------------------------------------------------------------- */

#define QV_CUDA_OP_PROTOTYPE(name, args) qv_status qv_cuda_##name args;
QV_OP_LIST(QV_CUDA_OP_PROTOTYPE)
#undef QV_CUDA_OP_PROTOTYPE

extern const qv_op_table qv_cuda_ops; /* table.c */

#endif
