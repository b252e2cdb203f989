/* qv_op_linear: cuBLASLt with plans kept by shape, or a kernel of our own for few tokens and for
 * shapes that it does not take. */
#include "ops/cuda/cuda.h"

#include <stdlib.h>
#include <string.h>

/* --- Plans -------------------------------------------------------------------------------- */

/* Everything that a choice of algorithm depends on. */
typedef struct {
    int64_t n_out, n_in, n_tokens, x_stride, y_stride;
    int64_t y_f32;
} plan_key;

typedef struct {
    plan_key key;
    bool used;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algo;
} plan;

/* Open addressing over a fixed table: a model has some ten shapes, times the numbers of tokens that
 * occur. A full neighbourhood gives its first place away. */
#define N_PLANS    4096
#define MAX_PROBES 8

struct qv_cuda_plans {
    plan plans[N_PLANS];
};

static void free_plan(plan *p)
{
    if (p->op != NULL)
        (void)cublasLtMatmulDescDestroy(p->op);
    if (p->w != NULL)
        (void)cublasLtMatrixLayoutDestroy(p->w);
    if (p->x != NULL)
        (void)cublasLtMatrixLayoutDestroy(p->x);
    if (p->y != NULL)
        (void)cublasLtMatrixLayoutDestroy(p->y);
    *p = (plan){.used = false};
}

void qv_cuda_plans_free(qv_cuda_plans *plans)
{
    for (int i = 0; plans != NULL && i < N_PLANS; i++)
        free_plan(&plans->plans[i]);
    free(plans);
}

#define BLAS_TRY(expr)                                                                             \
    do {                                                                                           \
        cublasStatus_t blas_status_ = (expr);                                                      \
        if (blas_status_ != CUBLAS_STATUS_SUCCESS)                                                 \
            return qv_fail(QV_ERR_DEVICE, "cuda: %s: %s", #expr,                                   \
                           cublasLtGetStatusString(blas_status_));                                 \
    } while (0)

/* cuBLASLt counts by columns: y^T [n_out, T] = (W^T)^T x^T. Sets *found to whether it has an
 * algorithm at all. */
static qv_status make_plan(qv_cuda_backend *cuda, const plan_key *k, plan *p, bool *found)
{
    const cublasOperation_t transpose = CUBLAS_OP_T;
    cudaDataType_t y_type = k->y_f32 ? CUDA_R_32F : CUDA_R_16BF;
    *p = (plan){.key = *k, .used = true};
    BLAS_TRY(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    BLAS_TRY(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                            sizeof transpose));
    BLAS_TRY(cublasLtMatrixLayoutCreate(&p->w, CUDA_R_16BF, (uint64_t)k->n_in, (uint64_t)k->n_out,
                                        k->n_in));
    BLAS_TRY(cublasLtMatrixLayoutCreate(&p->x, CUDA_R_16BF, (uint64_t)k->n_in,
                                        (uint64_t)k->n_tokens, k->x_stride));
    BLAS_TRY(cublasLtMatrixLayoutCreate(&p->y, y_type, (uint64_t)k->n_out, (uint64_t)k->n_tokens,
                                        k->y_stride));
    cublasLtMatmulPreference_t preference;
    BLAS_TRY(cublasLtMatmulPreferenceCreate(&preference));
    size_t workspace = QV_CUDA_BLAS_WORKSPACE;
    cublasStatus_t status = cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    cublasLtMatmulHeuristicResult_t result;
    int n = 0;
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulAlgoGetHeuristic(cuda->blas, p->op, p->w, p->x, p->y, p->y,
                                                preference, 1, &result, &n);
    (void)cublasLtMatmulPreferenceDestroy(preference);
    *found = status == CUBLAS_STATUS_SUCCESS && n > 0;
    if (*found)
        p->algo = result.algo;
    return QV_OK;
}

static uint64_t hash_key(const plan_key *k)
{
    const int64_t words[] = {k->n_out, k->n_in, k->n_tokens, k->x_stride, k->y_stride, k->y_f32};
    uint64_t h = 0;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        h = (h ^ (uint64_t)words[i]) * UINT64_C(0x9E3779B97F4A7C15) + (h >> 29);
    return h ^ h >> 32;
}

/* The plan for a shape, made if need be; NULL when cuBLASLt has none. */
static qv_status find_plan(qv_cuda_backend *cuda, const plan_key *key, const plan **out)
{
    if (cuda->plans == NULL && (cuda->plans = calloc(1, sizeof *cuda->plans)) == NULL)
        return qv_fail(QV_ERR_NOMEM, "cuda: no memory for plans of matrix products");
    uint64_t first = hash_key(key);
    plan *place = &cuda->plans->plans[first % N_PLANS];
    for (uint64_t i = 0; i < MAX_PROBES; i++) {
        plan *p = &cuda->plans->plans[(first + i) % N_PLANS];
        if (p->used && memcmp(&p->key, key, sizeof *key) == 0) {
            *out = p;
            return QV_OK;
        }
        if (!p->used) {
            place = p;
            break;
        }
    }
    free_plan(place);
    bool found = false;
    qv_status status = make_plan(cuda, key, place, &found);
    if (status != QV_OK || !found)
        free_plan(place);
    *out = found ? place : NULL;
    return status;
}

/* y = beta y + x W^T */
static qv_status run_plan(qv_cuda_backend *cuda, const plan *p, const qv_k_linear_args *c,
                          const void *x, float beta)
{
    const float one = 1;
    BLAS_TRY(cublasLtMatmul(cuda->blas, p->op, &one, c->w, p->w, x, p->x, &beta, c->y, p->y, c->y,
                            p->y, &p->algo, cuda->blas_workspace, QV_CUDA_BLAS_WORKSPACE,
                            cuda->stream));
    return QV_OK;
}

/* --- Choice ------------------------------------------------------------------------------- */

/* Up to this many tokens our own kernel streams the weights faster; docs/performance.md has the
 * measurement. */
#define SKINNY_TOKENS 8

static bool blas_can(const qv_k_linear_args *c)
{
    int64_t y_unit = c->y_f32 ? 4 : 8;
    return !c->w_f32 && c->n_in % 8 == 0 && c->x_stride % 8 == 0 && c->y_stride % y_unit == 0 &&
           (uintptr_t)c->w % 16 == 0 && (uintptr_t)c->x % 16 == 0 && (uintptr_t)c->y % 16 == 0 &&
           (c->rest == NULL || (c->rest_stride == c->x_stride && (uintptr_t)c->rest % 16 == 0));
}

qv_k_linear_args qv_cuda_linear_args(const qv_weight *w, qv_tensor x, qv_tensor rest, qv_tensor y)
{
    return (qv_k_linear_args){.w = qv_cuda_weight_of(w)->data,
                              .x = x.data,
                              .rest = rest.data,
                              .y = y.data,
                              .n_tokens = x.shape[0],
                              .n_out = w->n_out,
                              .n_in = w->n_in,
                              .x_stride = x.stride[0],
                              .rest_stride = rest.stride[0],
                              .y_stride = y.stride[0],
                              .w_f32 = w->dtype == QV_F32,
                              .y_f32 = y.dtype == QV_F32};
}

bool qv_cuda_streams(const qv_cuda_backend *cuda, const qv_k_linear_args *args)
{
    return cuda->major == 9 && (cuda->deterministic || args->n_tokens <= SKINNY_TOKENS);
}

/* More tokens than this are prefill. */
#define GEMM_TOKENS 256
/* Tokens that an adapter should have on average: each is a step of every tile that has any of them,
 * however few. */
#define GEMM_TOKENS_OF_ADAPTER 32

bool qv_cuda_gemms(const qv_cuda_backend *cuda, const qv_k_linear_args *args,
                   const qv_k_stream_lora *lora)
{
    return cuda->major == 9 && !cuda->deterministic && args->n_tokens > GEMM_TOKENS &&
           args->n_tokens >= GEMM_TOKENS_OF_ADAPTER * (int64_t)lora->segments.n_segs &&
           qv_k_gemm_can(args, lora);
}

/* Products of decode that our kernel does faster than cuBLASLt, on an H100.
 *
 * Without adapters: up to 32 tokens (behind a norm, 16 tokens, us: 18432 x 2560 39.5 to 37.2, 10240
 * x 2560 23.3 to 22.7, 2560 x 9216 22.6 to 22.0, 2560 x 4096 12.9 to 12.2), and not so many rows
 * that blocks come after others, nor the smallest (35B at 16 sequences 14.23 to 14.19 ms; cuBLASLt
 * for all products 14.05). With 64 tokens some are faster and some slower.
 *
 * With adapters: all tokens that it has room for. */
#define DECODE_BASE_TOKENS 32
#define DECODE_BASE_ROWS   25344
#define DECODE_BASE_LEAST  (4 << 20) /* numbers of W */

static bool is_faster_by_decode(const qv_k_linear_args *c)
{
    return c->n_tokens > SKINNY_TOKENS && c->n_tokens <= DECODE_BASE_TOKENS &&
           c->n_out <= DECODE_BASE_ROWS && c->n_out * c->n_in >= DECODE_BASE_LEAST;
}

bool qv_cuda_decodes(const qv_cuda_backend *cuda, const qv_k_linear_args *args,
                     const qv_k_stream_lora *lora)
{
    int form = cuda->decode_tuning.form;
    return cuda->major == 9 && !cuda->deterministic && form >= 0 &&
           (form > 0 || lora != NULL || is_faster_by_decode(args)) &&
           qv_k_decode_linear_can(args, lora);
}

/* Any number of tokens through the kernel for few, 64 at a time: each the same bits always. */
static qv_status run_by_64(qv_cuda_backend *cuda, const qv_k_linear_args *c)
{
    size_t y_size = c->y_f32 ? sizeof(float) : sizeof(uint16_t);
    for (int64_t first = 0; first < c->n_tokens; first += QV_K_SKINNY_TOKENS) {
        qv_k_linear_args part = *c;
        int64_t left = c->n_tokens - first;
        part.n_tokens = left < QV_K_SKINNY_TOKENS ? left : QV_K_SKINNY_TOKENS;
        part.x = (const uint16_t *)c->x + first * c->x_stride;
        if (c->rest != NULL)
            part.rest = (const uint16_t *)c->rest + first * c->rest_stride;
        part.y = (uint8_t *)c->y + (size_t)(first * c->y_stride) * y_size;
        if (!qv_k_skinny_linear_can(&part))
            return qv_k_any_linear(c, cuda->stream);
        QV_TRY(qv_k_skinny_linear(&part, cuda->stream));
    }
    return QV_OK;
}

/* The plan for a product, NULL if it is not one for cuBLASLt. */
static qv_status plan_of(qv_cuda_backend *cuda, const qv_k_linear_args *c, const plan **out)
{
    const plan_key key = {c->n_out, c->n_in, c->n_tokens, c->x_stride, c->y_stride, c->y_f32};
    *out = NULL;
    return blas_can(c) ? find_plan(cuda, &key, out) : QV_OK;
}

/* Of one token. Several parts, or one with a rest, are summed as no other number of tokens is. */
static bool is_one(const qv_cuda_backend *cuda, const qv_k_linear_part *parts, int n_parts,
                   const qv_k_add_norm_args *norm)
{
    bool as_others = n_parts == 1 && parts[0].args.rest == NULL;
    return cuda->major == 9 && (as_others || !cuda->deterministic) &&
           qv_k_one_linear_can(parts, n_parts, norm, cuda->n_sms);
}

static qv_status run_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor rest,
                            qv_tensor y)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    const qv_k_linear_args c = qv_cuda_linear_args(w, x, rest, y);
    if (c.n_out <= QV_K_FEW_ROWS) /* a gate: whatever the tokens, a row is summed in one order */
        return qv_k_any_linear(&c, cuda->stream);
    const qv_k_linear_part one = {.args = c};
    if (is_one(cuda, &one, 1, NULL))
        return qv_k_one_linear(&one, 1, NULL, cuda->n_sms, cuda->stream);
    if (qv_cuda_streams(cuda, &c) && qv_k_stream_linear_can(&c, NULL))
        return qv_k_stream_linear(&c, NULL, cuda->n_sms, cuda->stream);
    if (cuda->deterministic)
        return run_by_64(cuda, &c);
    if (qv_cuda_decodes(cuda, &c, NULL))
        return qv_k_decode_linear(&c, NULL, cuda->decode_tuning, cuda->n_sms, cuda->stream);
    bool skinny = qv_k_skinny_linear_can(&c);
    if (skinny && c.n_tokens <= SKINNY_TOKENS)
        return qv_k_skinny_linear(&c, cuda->stream);
    const plan *p = NULL;
    QV_TRY(plan_of(cuda, &c, &p));
    if (p != NULL) {
        QV_TRY(run_plan(cuda, p, &c, c.x, 0));
        return c.rest != NULL ? run_plan(cuda, p, &c, c.rest, 1) : QV_OK;
    }
    return skinny ? qv_k_skinny_linear(&c, cuda->stream) : qv_k_any_linear(&c, cuda->stream);
}

static qv_k_linear_part adding(const qv_weight *w, qv_tensor x, qv_tensor y)
{
    return (qv_k_linear_part){.args = qv_cuda_linear_args(w, x, (qv_tensor){.data = NULL}, y),
                              .act = QV_K_LINEAR_ADD};
}

bool qv_cuda_takes_linear_add(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    const qv_k_linear_part one = adding(w, x, y);
    return (w->n_out > QV_K_FEW_ROWS && is_one(qv_cuda(be), &one, 1, NULL)) ||
           qv_cuda_takes_linear_lora_add(be, w, x, y);
}

/* Of prefill: where the product reads and writes the stream besides, the norm behind it neither
 * adds to it nor reads what is added. */
bool qv_cuda_takes_linear_lora_add(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    const qv_k_linear_args c = qv_cuda_linear_args(w, x, (qv_tensor){.data = NULL}, y);
    const plan *p = NULL;
    return !cuda->deterministic && c.n_tokens > GEMM_TOKENS && c.n_out > QV_K_FEW_ROWS &&
           plan_of(cuda, &c, &p) == QV_OK && p != NULL;
}

qv_status qv_cuda_linear_add(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    const qv_k_linear_part one = adding(w, x, y);
    const qv_k_linear_args c = one.args;
    const plan *p;
    if (is_one(cuda, &one, 1, NULL))
        return qv_k_one_linear(&one, 1, NULL, cuda->n_sms, cuda->stream);
    QV_TRY(plan_of(cuda, &c, &p));
    return run_plan(cuda, p, &c, c.x, 1);
}

/* The parts of a joined product; whether they go by the streaming kernel. */
static bool join(const qv_cuda_backend *cuda, qv_tensor x, int32_t n_parts,
                 const qv_linear_part *parts, qv_k_linear_part *joined)
{
    static const qv_k_linear_act acts[] = {[QV_ACT_NONE] = QV_K_LINEAR_PLAIN,
                                           [QV_ACT_SWIGLU] = QV_K_LINEAR_SWIGLU,
                                           [QV_ACT_RELU2] = QV_K_LINEAR_RELU2};
    for (int32_t i = 0; i < n_parts; i++)
        joined[i] = (qv_k_linear_part){
            .args = qv_cuda_linear_args(parts[i].w, x, parts[i].rest, parts[i].y),
            .act = acts[parts[i].act]};
    return qv_cuda_streams(cuda, &joined[0].args);
}

bool qv_cuda_takes_linears(qv_backend *be, qv_tensor x, int32_t n_parts,
                           const qv_linear_part *parts)
{
    qv_k_linear_part joined[QV_MAX_LINEAR_PARTS];
    const qv_cuda_backend *cuda = qv_cuda(be);
    bool stream = join(cuda, x, n_parts, parts, joined);
    return is_one(cuda, joined, n_parts, NULL) ||
           qv_k_joined_linear_can(joined, n_parts, stream, cuda->n_sms);
}

qv_status qv_cuda_linears(qv_backend *be, qv_tensor x, int32_t n_parts, const qv_linear_part *parts)
{
    const qv_cuda_backend *cuda = qv_cuda(be);
    qv_k_linear_part joined[QV_MAX_LINEAR_PARTS];
    bool stream = join(cuda, x, n_parts, parts, joined);
    if (is_one(cuda, joined, n_parts, NULL))
        return qv_k_one_linear(joined, n_parts, NULL, cuda->n_sms, cuda->stream);
    return qv_k_joined_linear(joined, n_parts, stream, cuda->n_sms, cuda->stream);
}

static qv_k_add_norm_args norm_args(const qv_stream_norm *norm, qv_tensor rest)
{
    const qv_tensor none = {.data = NULL};
    return qv_cuda_add_norm_args(norm->residual, none, norm->w, norm->eps, norm->plus_one, norm->y,
                                 rest);
}

static qv_k_norm_gate gate_args(const qv_linear_part *part)
{
    return (qv_k_norm_gate){
        .w = qv_cuda_weight_of(part->w)->data, .out = part->y.data, .stride = part->y.stride[0]};
}

/* Of prefill: a decode step has the gate beside other products. */
bool qv_cuda_takes_norm_gate(qv_backend *be, const qv_stream_norm *norm, const qv_linear_part *part)
{
    const qv_k_add_norm_args args = norm_args(norm, norm->rest);
    const qv_k_norm_gate gate = gate_args(part);
    return !qv_cuda(be)->deterministic && args.n_tokens > GEMM_TOKENS &&
           part->w->dtype == QV_BF16 && qv_k_norm_gate_can(&args, &gate);
}

qv_status qv_cuda_norm_gate(qv_backend *be, const qv_stream_norm *norm, const qv_linear_part *part)
{
    const qv_k_add_norm_args args = norm_args(norm, norm->rest);
    const qv_k_norm_gate gate = gate_args(part);
    return qv_k_norm_with_gate(&args, &gate, qv_cuda(be)->stream);
}

bool qv_cuda_takes_norm_linears(qv_backend *be, const qv_stream_norm *norm, int32_t n_parts,
                                const qv_linear_part *parts)
{
    qv_k_linear_part joined[QV_MAX_LINEAR_PARTS];
    const qv_cuda_backend *cuda = qv_cuda(be);
    const qv_k_add_norm_args args = norm_args(norm, (qv_tensor){.data = NULL});
    join(cuda, norm->y, n_parts, parts, joined);
    return !cuda->deterministic && is_one(cuda, joined, n_parts, &args);
}

qv_status qv_cuda_norm_linears(qv_backend *be, const qv_stream_norm *norm, int32_t n_parts,
                               const qv_linear_part *parts)
{
    qv_k_linear_part joined[QV_MAX_LINEAR_PARTS];
    const qv_cuda_backend *cuda = qv_cuda(be);
    const qv_k_add_norm_args args = norm_args(norm, (qv_tensor){.data = NULL});
    join(cuda, norm->y, n_parts, parts, joined);
    return qv_k_one_linear(joined, n_parts, &args, cuda->n_sms, cuda->stream);
}

qv_status qv_cuda_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    return run_linear(be, w, x, (qv_tensor){.data = NULL}, y);
}

qv_status qv_cuda_linear_f32(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor rest,
                             qv_tensor y)
{
    return run_linear(be, w, x, rest, y);
}
