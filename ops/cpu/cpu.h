/* Inside the CPU backend: its object, its weights, and the names of functions that exist once per
 * instruction set. Engine thread only, except where ops.h says "any thread".
 */
#ifndef QV_OPS_CPU_CPU_H
#define QV_OPS_CPU_CPU_H

#include "ops/backend.h"
#include "ops/cpu/pool.h"

#include <math.h>

/* --- One build of the ops per instruction set ---------------------------------------------------
 *
 * The files compiled with QV_ISA_SUFFIX defined name their functions QV_ISA(qv_cpu_linear), which
 * becomes qv_cpu_linear_avx512 and so on. Each build ends in one table. */
#define QV_ISA_PASTE2(name, suffix) name##_##suffix
#define QV_ISA_PASTE(name, suffix)  QV_ISA_PASTE2(name, suffix)
#define QV_ISA(name)                QV_ISA_PASTE(name, QV_ISA_SUFFIX)

typedef struct {
    const char *name; /* "avx512" */
    qv_op_table ops;
} qv_cpu_isa;

extern const qv_op_table qv_cpu_bf16_ops; /* bf16.c */

extern const qv_cpu_isa qv_cpu_isa_baseline;
#if defined(__x86_64__)
extern const qv_cpu_isa qv_cpu_isa_avx2;
extern const qv_cpu_isa qv_cpu_isa_avx512;
#endif

#ifdef QV_ISA_SUFFIX
#define QV_OP_PROTOTYPE(name, args) qv_status QV_ISA(qv_cpu_##name) args;
QV_OP_LIST(QV_OP_PROTOTYPE)
#undef QV_OP_PROTOTYPE

/* One group of 64 output rows of a packed matrix (of expert `expert`; 0 of a plain one) for up to
 * QV_LINEAR_TOKENS rows of input: y[i][group * 64 ...] = W x[i]. What qv_op_linear and
 * qv_op_moe_linear are made of. */
#define QV_LINEAR_TOKENS 96 /* whose sums, 24 KiB, stay in the L2 cache */
void QV_ISA(qv_cpu_linear_group)(const qv_weight *w, int64_t expert, int64_t group,
                                 const float *const *x, int64_t n_tokens, float *const *y);

/* The part of qv_op_moe_combine for slots that share B: y += their delta. */
void QV_ISA(qv_cpu_moe_lora_shared)(qv_backend *be, const qv_moe_lora_site *site,
                                    const qv_moe_list *list, qv_tensor weights, qv_tensor scratch,
                                    qv_tensor y);
#endif

/* --- Backend ------------------------------------------------------------------------------ */

typedef enum {
    QV_CPU_GEMM_EXACT,
    QV_CPU_GEMM_OPENBLAS,
} qv_cpu_gemm;

/* Scratch of one thread for sampling one row; arrays of n_vocab. */
typedef struct {
    float *prob;     /* unnormalised probabilities, in the order of ids */
    float *raw;      /* logits before penalties, of the tokens that have a mark */
    uint32_t *mark;  /* how often a token was generated, and a bit for seen; all 0 between rows */
    int32_t *id;     /* candidates, ascending */
    float *id_prob;  /* their probabilities */
    float *id_logit; /* and logits */
    double *block;   /* [n_vocab / QV_SAMPLE_BLOCK + 1] sums of prob by blocks */
} qv_cpu_sample_scratch;

#define QV_SAMPLE_BLOCK 256

/* What one sampling chose. */
typedef struct {
    qv_sample_result *results; /* [room] */
    int64_t n_rows, room;
    double gap; /* before its step, in seconds; NaN: none */
} qv_cpu_sampling;

qv_status qv_cpu_sampling_require(qv_cpu_sampling *s, int64_t n_rows);

typedef struct {
    qv_backend base;
    const qv_op_table
        *f32; /* the chosen instruction set's ops, which bf16.c rounds the results of */
    qv_pool *pool;
    qv_cpu_gemm gemm;
    int32_t n_vocab;               /* sampling scratch is for rows up to this long */
    qv_cpu_sample_scratch *sample; /* [n_threads] */
    void *sample_memory;
    qv_cpu_sampling samplings[QV_MAX_SAMPLINGS]; /* in turn */
    uint64_t n_begun, n_ended;                   /* of them, ever */
    int32_t *token; /* [token_room] ids of a batch some of which the host did not know */
    int32_t token_room;
    uint64_t sampled_ns, began_ns; /* the last sampling's end, and the last batch; 0: none since */
    float *blas_tile; /* [n_threads, QV_BLAS_TILE] rows of a weight in float32; openblas only */
} qv_cpu_backend;

/* The id of a token, which may be one that the sampling begun last chose. */
static inline int32_t qv_cpu_token_id(const qv_cpu_sampling *last, int32_t token)
{
    int32_t id = token >= 0 ? token : last->results[QV_ROW_OF_TOKEN(token)].token;
    return id >= 0 ? id : 0;
}

/* The sampling begun last; without rows if there was none. */
static inline qv_cpu_sampling *qv_cpu_last_sampling(qv_cpu_backend *cpu)
{
    return &cpu->samplings[(cpu->n_begun + QV_MAX_SAMPLINGS - 1) % QV_MAX_SAMPLINGS];
}

/* From the last sampling's end to the batch after it, in seconds; NaN: not known. */
static inline double qv_cpu_gap(const qv_cpu_backend *cpu)
{
    return cpu->sampled_ns > 0 && cpu->began_ns > cpu->sampled_ns
               ? (double)(cpu->began_ns - cpu->sampled_ns) * 1e-9
               : NAN;
}

/* Floats of one thread's tile: 1 MiB, which leaves the other half of a usual L2 to x and y. */
#define QV_BLAS_TILE (256 * 1024)

static inline qv_cpu_backend *qv_cpu(qv_backend *be)
{
    return (qv_cpu_backend *)be;
}

/* --- Weights ------------------------------------------------------------------------------------
 *
 * exact: packed in groups of QV_GROUP output rows, each group [n_in][rows of the group], so that
 * the kernel reads one stream from start to end. The last group has its rows rounded up to 16, the
 * extra ones zero. openblas: row-major [n_out][n_in]. */
#define QV_GROUP 64

typedef struct {
    qv_weight base;
    bool packed;         /* experts always are */
    size_t expert_bytes; /* from one expert's matrix to the next; 0 for a plain matrix */
    void *data;
} qv_cpu_weight;

static inline void *qv_cpu_expert_data(const qv_cpu_weight *w, int64_t expert)
{
    return (char *)w->data + (size_t)expert * w->expert_bytes;
}

/* Rows of the group that starts at row `first`, padding included. */
static inline int64_t qv_cpu_group_rows(const qv_weight *w, int64_t first)
{
    int64_t left = w->n_out - first;
    return left >= QV_GROUP ? QV_GROUP : (left + 15) / 16 * 16;
}

qv_status qv_cpu_weight_new(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in,
                            qv_dtype dtype, qv_weight **out);
void qv_cpu_weight_free(qv_backend *be, qv_weight *w);
qv_status qv_cpu_weight_load(qv_backend *be, qv_weight *w, int64_t expert, int64_t row,
                             int64_t n_rows, const void *src, qv_dtype src_dtype,
                             int64_t src_stride);

/* qv_op_linear through OpenBLAS, for weights that are not packed. */
qv_status qv_cpu_linear_openblas(qv_cpu_backend *cpu, const qv_cpu_weight *w, qv_tensor x,
                                 qv_tensor y);

/* --- Ranks (comm.c) ----------------------------------------------------------------------- */

qv_status qv_cpu_all_reduce(qv_backend *be, qv_tensor x);
qv_status qv_cpu_gather_cols(qv_backend *be, qv_tensor part, qv_tensor whole);

/* --- Rows of tensors ---------------------------------------------------------------------- */

/* Float32 row of a tensor by its leading indices. */
static inline float *qv_row2(qv_tensor t, int64_t i)
{
    return (float *)t.data + i * t.stride[0];
}

static inline float *qv_row3(qv_tensor t, int64_t i, int64_t j)
{
    return (float *)t.data + i * t.stride[0] + j * t.stride[1];
}

/* Which of n ranges that begin at start[0], start[1] ... holds t: the last that begins at or before
 * it. */
static inline int32_t qv_range_of(const int32_t *start, int32_t n, int32_t t)
{
    int32_t low = 0, high = n - 1;
    while (low < high) {
        int32_t mid = low + (high - low + 1) / 2;
        if (start[mid] <= t)
            low = mid;
        else
            high = mid - 1;
    }
    return low;
}

/* The same for items of jobs, which are counted in int64. */
static inline int32_t qv_job_of(const int64_t *first_item, int32_t n, int64_t item)
{
    int32_t low = 0, high = n - 1;
    while (low < high) {
        int32_t mid = low + (high - low + 1) / 2;
        if (first_item[mid] <= item)
            low = mid;
        else
            high = mid - 1;
    }
    return low;
}

/* The sequence that token t belongs to. */
static inline int32_t qv_batch_seq_of(const qv_batch *batch, int32_t t)
{
    return qv_range_of(batch->seq_start, batch->n_seqs, t);
}

/* log(1 + e^x); above 20 the 1 is beyond float32 */
static inline float qv_softplus(float x)
{
    return x > 20.0f ? x : log1pf(expf(x));
}

#endif
