/* The projection table and everything that follows from it.
 *
 * An architecture is two static tables. A row of the first is one slice of a matrix: rows with the
 * same projection are fused, in order, into one GEMM; rows with the same module come from one
 * checkpoint tensor and share one LoRA pair. A row of the second is (a slice of) a smaller tensor
 * that is no GEMM operand: norm weights, convolution, the embedding. Sizes are symbols that a
 * config resolves.
 *
 * qv_layout is the tables resolved for one config and one rank of a tensor-parallel run: checkpoint
 * shapes, this rank's part of them, the place in the fused weight, LoRA targets, bytes. It is a
 * plain value, constant once made; any thread may read it.
 */
#ifndef QV_MODELS_PROJ_H
#define QV_MODELS_PROJ_H

#include "models/model_config.h"

/* Sizes that rows name: symbol, text, value in a config `c`. */
#define QV_DIM_LIST(X)                                                                             \
    X(ONE, "1", 1)                                                                                 \
    X(HIDDEN, "hidden", c->hidden)                                                                 \
    X(VOCAB, "vocab", c->vocab)                                                                    \
    X(HEAD_DIM, "head_dim", c->head_dim)                                                           \
    X(Q, "heads x head_dim", c->n_heads * c->head_dim)                                             \
    X(Q_GATE, "2 x heads x head_dim", 2 * c->n_heads * c->head_dim)                                \
    X(Q_GATE_HEAD, "2 x head_dim", 2 * c->head_dim)                                                \
    X(KV, "kv_heads x head_dim", c->n_kv_heads * c->head_dim)                                      \
    X(GDN_KEY, "key_heads x key_dim", c->gdn_k_heads * c->gdn_k_dim)                               \
    X(GDN_VALUE, "value_heads x value_dim", c->gdn_v_heads * c->gdn_v_dim)                         \
    X(GDN_V_HEADS, "value_heads", c->gdn_v_heads)                                                  \
    X(GDN_K_DIM, "key_dim", c->gdn_k_dim)                                                          \
    X(GDN_V_DIM, "value_dim", c->gdn_v_dim)                                                        \
    X(GDN_GROUP, "value heads of a key head", c->gdn_v_heads / c->gdn_k_heads)                     \
    X(GDN_GROUP_VALUE, "value rows of a key head", c->gdn_v_heads / c->gdn_k_heads * c->gdn_v_dim) \
    X(CONV_KERNEL, "conv_kernel", c->conv_kernel)                                                  \
    X(SSM_INNER, "mamba_heads x head_dim", c->ssm_heads * c->ssm_head_dim)                         \
    X(SSM_BC, "groups x state", c->ssm_groups * c->ssm_state)                                      \
    X(SSM_HEADS, "mamba_heads", c->ssm_heads)                                                      \
    X(SSM_STATE, "state", c->ssm_state)                                                            \
    X(SSM_GROUP_HEADS, "heads of a group", c->ssm_heads / c->ssm_groups)                           \
    X(SSM_GROUP_INNER, "rows of a group", c->ssm_heads / c->ssm_groups * c->ssm_head_dim)          \
    X(FFN, "ffn", c->ffn)                                                                          \
    X(EXPERTS, "experts", c->n_experts)                                                            \
    X(MOE_FFN, "expert_ffn", c->moe_ffn)                                                           \
    X(MOE_IN, "expert_in", c->moe_latent > 0 ? c->moe_latent : c->hidden)                          \
    X(SHARED_FFN, "shared_ffn", c->shared_ffn)

typedef enum {
    QV_DIM_NONE, /* no such dimension */
#define QV_DIM_ENUM(name, text, value) QV_DIM_##name,
    QV_DIM_LIST(QV_DIM_ENUM)
#undef QV_DIM_ENUM
} qv_dim;

/* Value of a symbol; 0 for NONE. The config has the part that the symbol belongs to. */
int64_t qv_dim_size(const qv_model_config *config, qv_dim dim);
const char *qv_dim_text(qv_dim dim);

/* Fused weights that a forward pass names. */
#define QV_PROJ_LIST(X)                                                                            \
    X(ATTN_IN)                                                                                     \
    X(ATTN_OUT)                                                                                    \
    X(GDN_IN)                                                                                      \
    X(GDN_OUT)                                                                                     \
    X(SSM_IN)                                                                                      \
    X(SSM_OUT)                                                                                     \
    X(MLP_IN)                                                                                      \
    X(MLP_OUT)                                                                                     \
    X(ROUTER)                                                                                      \
    X(LATENT_IN)                                                                                   \
    X(LATENT_OUT)                                                                                  \
    X(EXPERT_IN)                                                                                   \
    X(EXPERT_OUT)                                                                                  \
    X(SHARED_IN)                                                                                   \
    X(SHARED_OUT)                                                                                  \
    X(SHARED_GATE)                                                                                 \
    X(LM_HEAD)

typedef enum {
#define QV_PROJ_ENUM(name) QV_PROJ_##name,
    QV_PROJ_LIST(QV_PROJ_ENUM)
#undef QV_PROJ_ENUM
        QV_PROJ_COUNT
} qv_proj;

/* "ATTN_IN" */
const char *qv_proj_name(qv_proj proj);

/* Tensors of the second table. */
#define QV_VEC_LIST(X)                                                                             \
    X(EMBED)                                                                                       \
    X(FINAL_NORM)                                                                                  \
    X(MIXER_NORM)                                                                                  \
    X(MLP_NORM)                                                                                    \
    X(Q_NORM)                                                                                      \
    X(K_NORM)                                                                                      \
    X(CONV)                                                                                        \
    X(CONV_BIAS)                                                                                   \
    X(A_LOG)                                                                                       \
    X(DT_BIAS)                                                                                     \
    X(D_SKIP)                                                                                      \
    X(ROUTER_BIAS)                                                                                 \
    X(GATE_NORM)

typedef enum {
#define QV_VEC_ENUM(name) QV_VEC_##name,
    QV_VEC_LIST(QV_VEC_ENUM)
#undef QV_VEC_ENUM
        QV_VEC_COUNT
} qv_vec;

const char *qv_vec_name(qv_vec vec);

/* How a tensor is shared out among ranks, always in whole units. */
typedef enum {
    QV_SPLIT_NONE,   /* every rank has all of it */
    QV_SPLIT_COLUMN, /* by output rows */
    QV_SPLIT_ROW,    /* by input columns; partial results are summed over ranks */
} qv_split;

/* One slice of a projection. */
typedef struct {
    qv_proj proj;
    qv_part part;
    const char *module; /* checkpoint path below the layer, and the LoRA target name */
    qv_dim in, out;
    qv_split split;
    qv_dim unit;    /* smallest piece of out (COLUMN) or in (ROW) that one rank may have */
    bool replicate; /* with fewer units than ranks, ranks share a unit: COLUMN, all have all of it;
                     * ROW, each has a part of it */
    bool lora;      /* adapters may target it */
    bool root;      /* its name has no model prefix (lm_head) */
    /* A matrix of each expert: the path that `module` stands below, an expert's number between
     * them. Some checkpoints hold all experts in one tensor [experts, rows, in] instead, named
     * `fused` below that path; slices with the same name stand in it one after the other. */
    const char *experts; /* NULL: no expert */
    const char *fused;
} qv_proj_row;

/* (A slice of) a tensor that is no GEMM operand: [rows] or [rows, tail[0]] or [rows, tail[0],
 * tail[1]] in the checkpoint. */
typedef struct {
    qv_vec vec;
    qv_part part;
    const char *tensor; /* checkpoint name below the layer */
    const char *other;  /* another name that checkpoints use for it; NULL: none */
    qv_dim rows;
    qv_split split; /* NONE or COLUMN */
    qv_dim unit;
    bool replicate; /* with fewer units than ranks, ranks share a unit */
    qv_dim tail[2];
    bool as_stored; /* keeps BF16 or F32 as the checkpoint has it; otherwise widened to F32 */
} qv_vec_row;

/* Rows as they stand in models/<arch>.c; columns after `unit` are named. */
#define QV_PROJ_ROW(proj_, part_, module_, in_, out_, split_, unit_, ...)                          \
    {                                                                                              \
        .proj = QV_PROJ_##proj_, .part = QV_PART_##part_, .module = module_, .in = QV_DIM_##in_,   \
        .out = QV_DIM_##out_, .split = QV_SPLIT_##split_, .unit = QV_DIM_##unit_, __VA_ARGS__      \
    }
#define QV_VEC_ROW(vec_, part_, tensor_, rows_, split_, unit_, ...)                                \
    {                                                                                              \
        .vec = QV_VEC_##vec_, .part = QV_PART_##part_, .tensor = tensor_, .rows = QV_DIM_##rows_,  \
        .split = QV_SPLIT_##split_, .unit = QV_DIM_##unit_, __VA_ARGS__                            \
    }

/* Another name under which adapters may have a pair: slices [first, first + n) of one projection.
 * Of an expert projection, `module` stands below the experts' path, as in its rows. */
typedef struct {
    const char *module;
    qv_proj proj;
    int32_t first, n;
} qv_lora_alias;

#define QV_MAX_SLICES 8

/* A slice, resolved for one rank. */
typedef struct {
    const qv_proj_row *row;
    int64_t module_rows, module_cols; /* shape of the whole checkpoint tensor */
    int64_t src_row, src_col;         /* where this rank's piece begins in it */
    int64_t part_row;                 /* where it begins in the slice's own rows */
    int64_t n_rows, n_cols;           /* size of this rank's piece */
    int64_t dst_row;                  /* where it begins in the fused weight */
    int32_t plane; /* first slice of the same module: the LoRA plane that they share */
    int64_t fused_row, fused_rows; /* experts: where its module begins in `fused`, rows of that */
} qv_proj_slice;

typedef struct {
    qv_part part;
    bool lora;
    bool experts;        /* one matrix an expert: sizes are those of one */
    int64_t n_in, n_out; /* of the fused weight on this rank */
    /* What reads the input may have more of it than this rank's weight takes: ranks that share a
     * unit compute all of it and then use their parts, columns [x_col, x_col + n_in) of x_cols. */
    int64_t x_col, x_cols;
    int32_t n_slices; /* 0: the architecture has no such projection */
    qv_proj_slice slices[QV_MAX_SLICES];
} qv_proj_shape;

typedef struct {
    const qv_vec_row *row;
    int64_t src_row, n_rows, dst_row;
} qv_vec_slice;

typedef struct {
    qv_part part;
    const char *tensor, *other;
    bool as_stored;
    int32_t n_dims;
    int64_t shape[3];  /* of the whole checkpoint tensor */
    int64_t n_rows;    /* on this rank */
    int64_t row_elems; /* elements of one row */
    int32_t n_slices;  /* 0: the architecture has no such tensor */
    qv_vec_slice slices[QV_MAX_SLICES];
} qv_vec_shape;

/* One rank of a run. Experts go to groups of ranks: each group has n_experts / expert_groups whole
 * experts, whose insides are split over the ranks of the group. 1: every rank has a part of every
 * expert; n_ranks: every expert is whole on one rank. */
typedef struct {
    int32_t rank, n_ranks;
    int32_t expert_groups; /* divides n_ranks */
} qv_shard;

typedef struct {
    const qv_model_config *config; /* borrowed; of the whole model */
    qv_shard shard;
    int64_t first_expert, n_experts; /* that this rank has (a part of) */
    qv_proj_shape proj[QV_PROJ_COUNT];
    qv_vec_shape vec[QV_VEC_COUNT];
} qv_layout;

/* Resolve the tables of config->arch for one rank. `config` must outlive the layout.
 * Errors: UNSUPPORTED when a split does not come out in whole units (names row, units and ranks).
 */
qv_status qv_layout_init_shard(qv_layout *layout, const qv_model_config *config,
                               const qv_shard *shard);
/* The same with the inside of every expert split over all ranks. */
qv_status qv_layout_init(qv_layout *layout, const qv_model_config *config, int32_t rank,
                         int32_t n_ranks);

/* The config that a rank's forward pass sees: heads, groups and widths are this rank's, the hidden
 * size, the vocabulary and the number of experts stay the whole model's. */
qv_model_config qv_layout_rank_config(const qv_layout *layout);

/* Parameters of the text model as the checkpoint stores them (a tied head counts once). */
int64_t qv_layout_params(const qv_layout *layout);

/* Number of tensors of the text model in a checkpoint, experts in fused tensors or one by one. */
int64_t qv_layout_tensors(const qv_layout *layout, bool fused_experts);

/* How often a part occurs: the number of layers with it, 1 for GLOBAL. */
int64_t qv_layout_part_count(const qv_layout *layout, qv_part part);

/* Whether `layer` has projection `proj`; layer -1 stands for the global part. */
bool qv_layout_has(const qv_layout *layout, int64_t layer, qv_proj proj);

/* What an adapter's module name stands for. */
typedef struct {
    qv_proj proj;
    int32_t first, n; /* slices, contiguous in the fused weight */
    int64_t n_rows;   /* of the fused weight on this rank */
    int64_t n_in;
    bool lora; /* adapters may target it */
} qv_lora_target;

/* Find the slices of `module` (a path below the layer, or a global name such as "lm_head") among
 * the rows and aliases of the architecture, whatever the layer. False: no such matrix. */
bool qv_layout_find_target(const qv_layout *layout, const char *module, size_t size,
                           qv_lora_target *out);

/* The same for a matrix of each expert; `module` stands below qv_layout_experts_path. */
bool qv_layout_find_expert_target(const qv_layout *layout, const char *module, size_t size,
                                  qv_lora_target *out);

/* All slices of a projection as a target. */
qv_lora_target qv_layout_whole_target(const qv_layout *layout, qv_proj proj);

/* The path below a layer that experts stand at, "mlp.experts"; NULL for a model without experts. */
const char *qv_layout_experts_path(const qv_layout *layout);

/* Write the checkpoint name of slice `i` of an expert projection into `buf`: of one expert's
 * matrix, or of the tensor that holds all experts when `expert` is -1. Returns buf. */
const char *qv_expert_name(char *buf, size_t size, const char *prefix, int64_t layer,
                           const qv_proj_row *row, int64_t expert);

/* Write the checkpoint name of a tensor into `buf`: `prefix` "model." and so on, `layer` -1 for
 * global tensors, `suffix` ".weight" or "". Returns buf. */
const char *qv_tensor_name(char *buf, size_t size, const char *prefix, int64_t layer,
                           const char *name, const char *suffix);

#endif
