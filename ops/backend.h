/* What a backend provides: inside the ops layer only. ops.c checks every call once and then goes
 * through these tables; a new backend fills them and adds one line to the registry in ops.c.
 *
 * The tables are constant and shared. A backend's own object starts with a qv_backend, its weights
 * with a qv_weight.
 */
#ifndef QV_OPS_BACKEND_H
#define QV_OPS_BACKEND_H

#include "ops/ops.h"

/* One row per op: name, arguments. Prototypes and tables of all backends come from this list. */
#define QV_OP_LIST(X)                                                                              \
    X(lora, (qv_backend * be, const qv_lora_site *site, int32_t n_segs, const int32_t *seg_start,  \
             const int32_t *seg_slot, qv_tensor x, qv_tensor scratch, qv_tensor y))                \
    X(lora_f32,                                                                                    \
      (qv_backend * be, const qv_lora_site *site, int32_t n_segs, const int32_t *seg_start,        \
       const int32_t *seg_slot, qv_tensor x, qv_tensor scratch, qv_tensor y))                      \
    X(embed_lora,                                                                                  \
      (qv_backend * be, const qv_embed_lora_site *site, int32_t n_segs, const int32_t *seg_start,  \
       const int32_t *seg_slot, const int32_t *ids, qv_tensor y))                                  \
    X(embed, (qv_backend * be, qv_tensor table, int64_t first, const int32_t *ids, qv_tensor y))   \
    X(linear, (qv_backend * be, const qv_weight *w, qv_tensor x, qv_tensor y))                     \
    X(linear_f32, (qv_backend * be, const qv_weight *w, qv_tensor x, qv_tensor rest, qv_tensor y)) \
    X(rms_norm,                                                                                    \
      (qv_backend * be, qv_tensor x, qv_tensor w, float eps, bool plus_one, qv_tensor y))          \
    X(add_rms_norm, (qv_backend * be, qv_tensor residual, qv_tensor delta, qv_tensor w, float eps, \
                     bool plus_one, qv_tensor y, qv_tensor rest))                                  \
    X(gated_rms_norm, (qv_backend * be, qv_tensor x, qv_tensor z, qv_tensor w, float eps,          \
                       bool gate_first, qv_tensor y))                                              \
    X(swiglu, (qv_backend * be, qv_tensor gate, qv_tensor up, qv_tensor y))                        \
    X(sigmoid_gate, (qv_backend * be, qv_tensor x, qv_tensor gate))                                \
    X(relu2, (qv_backend * be, qv_tensor x, qv_tensor y))                                          \
    X(add, (qv_backend * be, qv_tensor residual, qv_tensor delta, qv_tensor gate))                 \
    X(gather_rows, (qv_backend * be, qv_tensor x, const int32_t *rows, qv_tensor y))               \
    X(rope_kv_write, (qv_backend * be, const qv_batch *batch, int rotary_dim, double theta,        \
                      qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv))               \
    X(attention, (qv_backend * be, const qv_batch *batch, const qv_kv_layer *kv, float scale,      \
                  qv_tensor q, qv_tensor o))                                                       \
    X(conv1d, (qv_backend * be, const qv_batch *batch, qv_tensor x, qv_tensor w, qv_tensor bias,   \
               qv_tensor state, qv_tensor y))                                                      \
    X(gdn, (qv_backend * be, const qv_batch *batch, const qv_gdn_args *args))                      \
    X(ssd, (qv_backend * be, const qv_batch *batch, const qv_ssd_args *args))                      \
    X(router, (qv_backend * be, const qv_router *router, qv_tensor logits, qv_tensor ids,          \
               qv_tensor weights))                                                                 \
    X(moe_route, (qv_backend * be, qv_tensor ids, qv_moe_list * list))                             \
    X(moe_linear, (qv_backend * be, const qv_weight *w, const qv_moe_list *list, qv_tensor x,      \
                   qv_moe_rows rows, qv_tensor y))                                                 \
    X(moe_lora, (qv_backend * be, const qv_moe_lora_site *site, const qv_moe_list *list,           \
                 qv_tensor x, qv_moe_rows rows, qv_tensor scratch, qv_tensor y))                   \
    X(moe_combine, (qv_backend * be, const qv_moe_list *list, qv_tensor weights, qv_tensor o,      \
                    const qv_moe_lora_site *site, qv_tensor scratch, qv_tensor y))                 \
    X(moe_combine_f32, (qv_backend * be, const qv_moe_list *list, qv_tensor weights, qv_tensor o,  \
                        const qv_moe_lora_site *site, qv_tensor scratch, qv_tensor shared,         \
                        qv_tensor gate, qv_tensor y))                                              \
    X(sample_begin,                                                                                \
      (qv_backend * be, qv_tensor logits, int32_t n_valid, const qv_sample_row *rows))             \
    X(sample_end, (qv_backend * be, qv_sample_result * results))                                   \
    X(shortlist, (qv_backend * be, qv_tensor part, const qv_shortlist_part *where,                 \
                  const qv_sample_row *rows, qv_tensor lists))                                     \
    X(merge_shortlists,                                                                            \
      (qv_backend * be, qv_tensor lists, int32_t n_parts, const qv_shortlist_part *where,          \
       const qv_sample_row *rows, qv_sample_result *results))

/* Why a row has no token; in qv_sample_result.token. */
enum { QV_SAMPLE_NOT_FINITE = -1, QV_SAMPLE_ALL_BANNED = -2 };

typedef struct qv_op_times qv_op_times;

typedef struct {
#define QV_OP_ENTRY(name, args) qv_status(*name) args;
    QV_OP_LIST(QV_OP_ENTRY)
#undef QV_OP_ENTRY
} qv_op_table;

/* Everything else. Functions of ops.h with the same names say what each does. */
typedef struct {
    const char *name;
    qv_dtype activation_dtype, lora_dtype, kv_dtype;
    qv_status (*open)(const qv_backend_options *options, qv_backend **out);
    void (*close)(qv_backend *be);
    qv_status (*reserve)(qv_backend *be, const qv_backend_limits *limits);
    qv_status (*alloc)(qv_backend *be, size_t bytes, void **out);
    void (*free)(qv_backend *be, void *ptr);
    uint64_t (*free_memory)(const qv_backend *be); /* NULL: the host's */
    qv_status (*upload)(qv_backend *be, void *dst, const void *src, size_t bytes);
    qv_status (*download)(qv_backend *be, void *dst, const void *src, size_t bytes);
    qv_status (*zero)(qv_backend *be, void *dst, size_t bytes);
    /* NULL, all four: pieces are written where they belong. Sizes are not 0; zeros may have any. */
    qv_status (*upload_begin)(qv_backend *be, void **lane);
    qv_status (*upload_piece)(qv_backend *be, void *lane, void *dst, size_t bytes, void **out);
    qv_status (*upload_zero)(qv_backend *be, void *lane, void *dst, size_t bytes);
    qv_status (*upload_end)(qv_backend *be, void *lane);
    qv_status (*copy)(qv_backend *be, void *dst, const void *src, size_t bytes);
    qv_status (*sync)(qv_backend *be);
    qv_status (*put_batch)(qv_backend *be, const qv_batch *host, qv_batch *out);
    /* NULL: made on the host and uploaded. */
    qv_status (*fill)(qv_backend *be, void *dst, qv_dtype dtype, int64_t n, float mean, float scale,
                      uint64_t seed);
    qv_status (*weight_fill)(qv_backend *be, qv_weight *w, float scale, uint64_t seed);
    /* NULL: cannot record. */
    qv_status (*record)(qv_backend *be, const qv_recording_shape *shape, qv_record_fn *fn,
                        void *ctx, qv_recording **out);
    void (*recording_free)(qv_backend *be, qv_recording *recording);
    qv_status (*replay)(qv_backend *be, qv_recording *recording, const qv_batch *host);
    /* Only called on a backend that has joined a group of more than one. `connect` and `leave` may
     * be NULL; leave comes before the group is gone, also after a failed connect. */
    qv_status (*connect)(qv_backend *be);
    void (*leave)(qv_backend *be);
    qv_status (*all_reduce)(qv_backend *be, qv_tensor x);
    qv_status (*gather_cols)(qv_backend *be, qv_tensor part, qv_tensor whole);
    /* NULL: all_reduce, then add_rms_norm. */
    qv_status (*sum_add_rms_norm)(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                                  float eps, bool plus_one, qv_tensor y, qv_tensor rest);
    /* NULL: three ops, and two. */
    qv_status (*norm_rope_kv_write)(qv_backend *be, const qv_batch *batch, const qv_norm_rope *how,
                                    qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv);
    qv_status (*gated_attention)(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                                 float scale, qv_tensor q, qv_tensor gate, qv_tensor o);
    /* NULL, each pair: three ops, as where it does not take them. */
    bool (*takes_conv_gdn_norm)(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                const qv_gdn_args *args);
    qv_status (*conv_gdn_norm)(qv_backend *be, const qv_batch *batch, const qv_around *around,
                               const qv_gdn_args *args);
    bool (*takes_conv_ssd_norm)(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                const qv_ssd_args *args);
    qv_status (*conv_ssd_norm)(qv_backend *be, const qv_batch *batch, const qv_around *around,
                               const qv_ssd_args *args);
    /* NULL: two ops. */
    qv_status (*moe_linear_act)(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                                qv_tensor x, qv_moe_rows rows, qv_act act, qv_tensor wide,
                                qv_tensor y);
    /* NULL, both: linear reads rows of tokens. */
    bool (*wants_pairs)(qv_backend *be, const qv_moe_list *list, qv_tensor x, qv_tensor room);
    qv_status (*moe_gather)(qv_backend *be, const qv_moe_list *list, qv_tensor x, qv_tensor y);
    /* NULL, each with what it is about: never. */
    bool (*takes_linear_add)(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y);
    bool (*takes_linear_lora_add)(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y);
    qv_status (*linear_add)(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y);
    /* NULL, both: an op for each part, as where it does not take them. */
    bool (*takes_linears)(qv_backend *be, qv_tensor x, int32_t n_parts,
                          const qv_linear_part *parts);
    qv_status (*linears)(qv_backend *be, qv_tensor x, int32_t n_parts, const qv_linear_part *parts);
    /* NULL, both: add_rms_norm, then linears, as where it does not take them. */
    bool (*takes_norm_linears)(qv_backend *be, const qv_stream_norm *norm, int32_t n_parts,
                               const qv_linear_part *parts);
    qv_status (*norm_linears)(qv_backend *be, const qv_stream_norm *norm, int32_t n_parts,
                              const qv_linear_part *parts);
    /* The norm and one of the parts, a single row. NULL, both: as where it does not take them. */
    bool (*takes_norm_gate)(qv_backend *be, const qv_stream_norm *norm, const qv_linear_part *part);
    qv_status (*norm_gate)(qv_backend *be, const qv_stream_norm *norm, const qv_linear_part *part);
    /* Of one token. NULL: router, then moe_route, then the product, as for more. */
    qv_status (*choose)(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                        qv_tensor weights, qv_moe_list *list, const qv_beside *beside);
    /* Of one token. NULL, both: choose and the two products, as where it does not take them. */
    bool (*takes_experts)(qv_backend *be, const qv_router *router, qv_tensor logits,
                          const qv_moe_list *list, const qv_experts *experts);
    qv_status (*choose_experts)(qv_backend *be, const qv_router *router, qv_tensor logits,
                                qv_tensor ids, qv_tensor weights, qv_moe_list *list,
                                const qv_beside *beside, const qv_experts *experts);
    /* Of a backend without peers. NULL: moe_combine_f32, then add_rms_norm. */
    qv_status (*combine_add_rms_norm)(qv_backend *be, const qv_moe_sum *sum, qv_tensor residual,
                                      qv_tensor delta, qv_tensor w, float eps, bool plus_one,
                                      qv_tensor y, qv_tensor rest);
    /* Clock of ops (op_times.c). Mark i, of at most QV_MAX_MARKS, is behind what was enqueued
     * before; `between` is the time from mark i to mark i + 1, after a sync. `hold` keeps what is
     * enqueued afterwards waiting, so that the host gets ahead. NULL, all three: ops end before
     * they return. */
    qv_status (*mark)(qv_backend *be, int32_t i);
    qv_status (*between)(qv_backend *be, int32_t i, double *seconds);
    qv_status (*hold)(qv_backend *be, double seconds);
    /* NULL: the product, then the adapters. */
    qv_status (*linear_lora)(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                             int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                             qv_tensor x, qv_tensor scratch, qv_tensor y);
    /* What takes_linear_add says, with adapters. NULL: never. */
    qv_status (*linear_lora_add)(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                                 int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                                 qv_tensor x, qv_tensor scratch, qv_tensor y);
    /* n_experts 0: a plain matrix. Rows of one expert are loaded; a plain matrix is expert 0. */
    qv_status (*weight_new)(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in,
                            qv_dtype dtype, qv_weight **out);
    void (*weight_free)(qv_backend *be, qv_weight *w);
    qv_status (*weight_load)(qv_backend *be, qv_weight *w, int64_t expert, int64_t row,
                             int64_t n_rows, const void *src, qv_dtype src_dtype,
                             int64_t src_stride);
    void *(*weight_rows)(const qv_weight *w); /* NULL: not kept row after row */
} qv_backend_table;

struct qv_backend {
    const qv_backend_table *table;
    const qv_op_table *ops;
    qv_comm *comm;       /* borrowed; NULL: alone */
    int32_t rank;        /* in it */
    bool not_recordable; /* its collectives cannot be part of a recording */
    qv_op_times *times;  /* borrowed; NULL: ops are not timed */
    int n_samplings;     /* begun and not ended */
    bool watching;       /* gaps */
    double gap;          /* before the step whose sampling ended last; NaN: none */
    char description[128];
};

struct qv_weight {
    const qv_backend *backend; /* the one it belongs to */
    int64_t n_experts;         /* 0: a plain matrix */
    int64_t n_out, n_in;
    qv_dtype dtype; /* of storage */
};

extern const qv_backend_table qv_cpu_backend_table;
#ifdef QV_WITH_CUDA
extern const qv_backend_table qv_cuda_backend_table;
#endif

#endif
