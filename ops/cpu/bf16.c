/* Arithmetic "bf16": every op of the float32 table, with what it stores rounded to numbers that
 * BF16 can hold. A table of its own around the chosen instruction set's, so that rounding is in one
 * place and float32 pays nothing for it.
 *
 * Activations are what other ops stored, so they are rounded already, and so are values that an op
 * copies: the inputs that a convolution keeps, and V in its pages. The stream is not rounded: the
 * residual, and what ops put on the way into it.
 */
#include "ops/cpu/cpu.h"

/* --- Rounding ----------------------------------------------------------------------------- */

static void round_row(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = qv_bf16_to_f32(qv_f32_to_bf16(x[i]));
}

static void round_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const qv_tensor *t = ctx;
    for (int64_t row = begin; row < end; row++)
        round_row(qv_row3(*t, row / t->shape[1], row % t->shape[1]), t->shape[2]);
}

/* [T, d] or [T, n, d], in place. */
static void round_tensor(qv_backend *be, qv_tensor t)
{
    if (t.n_dims == 2)
        t = qv_tensor_split(t, 1, t.shape[1]);
    qv_pool_run(qv_cpu(be)->pool, t.shape[0] * t.shape[1], 5 + t.shape[2] / 8, round_items, &t);
}

/* Rows of segments whose slot is active; the others were not written. */
static void round_segments(qv_backend *be, const uint8_t *active, int32_t n_segs,
                           const int32_t *seg_start, const int32_t *seg_slot, qv_tensor y)
{
    for (int32_t i = 0; i < n_segs; i++)
        if (seg_slot[i] >= 0 && active[seg_slot[i]])
            round_tensor(be, qv_tensor_rows(y, seg_start[i], seg_start[i + 1] - seg_start[i]));
}

typedef struct {
    const qv_batch *batch;
    const qv_kv_layer *kv;
} page_ctx;

/* The keys and values that these tokens wrote into their pages. */
static void round_pages(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const page_ctx *c = ctx;
    const qv_kv_layer *kv = c->kv;
    int64_t n = kv->k.shape[2] * kv->k.shape[3];
    for (int32_t t = (int32_t)begin; t < end; t++) {
        int32_t pos = c->batch->pos[t], seq = qv_batch_seq_of(c->batch, t);
        int64_t page =
            c->batch->page_table[(int64_t)seq * c->batch->page_stride + pos / kv->page_tokens];
        int64_t slot = (page * kv->page_tokens + pos % kv->page_tokens) * n;
        round_row((float *)kv->k.data + slot, n);
        round_row((float *)kv->v.data + slot, n);
    }
}

/* --- Ops ---------------------------------------------------------------------------------- */

/* bf16_NAME(args): the float32 op, then what follows. */
#define OPS(be) (qv_cpu(be)->f32)
#define ROUNDED(call, ...)                                                                         \
    do {                                                                                           \
        QV_TRY(call);                                                                              \
        __VA_ARGS__;                                                                               \
        return QV_OK;                                                                              \
    } while (0)

static qv_status bf16_lora(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                           const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                           qv_tensor scratch, qv_tensor y)
{
    ROUNDED(OPS(be)->lora(be, site, n_segs, seg_start, seg_slot, x, scratch, y),
            round_segments(be, site->slot_active, n_segs, seg_start, seg_slot, y));
}

static qv_status bf16_lora_f32(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                               const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                               qv_tensor scratch, qv_tensor y)
{
    return OPS(be)->lora(be, site, n_segs, seg_start, seg_slot, x, scratch, y);
}

static qv_status bf16_embed_lora(qv_backend *be, const qv_embed_lora_site *site, int32_t n_segs,
                                 const int32_t *seg_start, const int32_t *seg_slot,
                                 const int32_t *ids, qv_tensor y)
{
    return OPS(be)->embed_lora(be, site, n_segs, seg_start, seg_slot, ids, y);
}

static qv_status bf16_embed(qv_backend *be, qv_tensor table, int64_t first, const int32_t *ids,
                            qv_tensor y)
{
    return OPS(be)->embed(be, table, first, ids, y);
}

static qv_status bf16_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    ROUNDED(OPS(be)->linear(be, w, x, y), round_tensor(be, y));
}

typedef struct {
    qv_tensor x, rest;
} rest_ctx;

/* rest += x: 16 digits of the two, which float32 holds. */
static void add_rest(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const rest_ctx *c = ctx;
    for (int64_t t = begin; t < end; t++) {
        const float *x = qv_row2(c->x, t);
        float *rest = qv_row2(c->rest, t);
        for (int64_t i = 0; i < c->x.shape[1]; i++)
            rest[i] += x[i];
    }
}

/* x becomes rounded, rest what that took from it, rounded as well. */
static void split_rest(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const rest_ctx *c = ctx;
    for (int64_t t = begin; t < end; t++) {
        float *x = qv_row2(c->x, t), *rest = qv_row2(c->rest, t);
        for (int64_t i = 0; i < c->x.shape[1]; i++) {
            float rounded = qv_bf16_to_f32(qv_f32_to_bf16(x[i]));
            rest[i] = qv_bf16_to_f32(qv_f32_to_bf16(x[i] - rounded));
            x[i] = rounded;
        }
    }
}

static void run_rest(qv_backend *be, qv_tensor x, qv_tensor rest, qv_pool_fn *fn)
{
    rest_ctx c = {.x = x, .rest = rest};
    qv_pool_run(qv_cpu(be)->pool, x.shape[0], 5 + x.shape[1] / 4, fn, &c);
}

static qv_status bf16_linear_f32(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor rest,
                                 qv_tensor y)
{
    if (rest.data == NULL)
        return OPS(be)->linear(be, w, x, y);
    run_rest(be, x, rest, add_rest);
    return OPS(be)->linear(be, w, rest, y);
}

static qv_status bf16_rms_norm(qv_backend *be, qv_tensor x, qv_tensor w, float eps, bool plus_one,
                               qv_tensor y)
{
    ROUNDED(OPS(be)->rms_norm(be, x, w, eps, plus_one, y), round_tensor(be, y));
}

static qv_status bf16_add(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor gate)
{
    return OPS(be)->add(be, residual, delta, gate);
}

static qv_status bf16_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                                   float eps, bool plus_one, qv_tensor y, qv_tensor rest)
{
    QV_TRY(OPS(be)->add_rms_norm(be, residual, delta, w, eps, plus_one, y, rest));
    if (rest.data != NULL)
        run_rest(be, y, rest, split_rest);
    else
        round_tensor(be, y);
    return QV_OK;
}

static qv_status bf16_gated_rms_norm(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w,
                                     float eps, bool gate_first, qv_tensor y)
{
    ROUNDED(OPS(be)->gated_rms_norm(be, x, z, w, eps, gate_first, y), round_tensor(be, y));
}

static qv_status bf16_swiglu(qv_backend *be, qv_tensor gate, qv_tensor up, qv_tensor y)
{
    ROUNDED(OPS(be)->swiglu(be, gate, up, y), round_tensor(be, y));
}

static qv_status bf16_sigmoid_gate(qv_backend *be, qv_tensor x, qv_tensor gate)
{
    ROUNDED(OPS(be)->sigmoid_gate(be, x, gate), round_tensor(be, x));
}

static qv_status bf16_relu2(qv_backend *be, qv_tensor x, qv_tensor y)
{
    ROUNDED(OPS(be)->relu2(be, x, y), round_tensor(be, y));
}

static qv_status bf16_gather_rows(qv_backend *be, qv_tensor x, const int32_t *rows, qv_tensor y)
{
    return OPS(be)->gather_rows(be, x, rows, y);
}

static qv_status bf16_rope_kv_write(qv_backend *be, const qv_batch *batch, int rotary_dim,
                                    double theta, qv_tensor q, qv_tensor k, qv_tensor v,
                                    const qv_kv_layer *kv)
{
    QV_TRY(OPS(be)->rope_kv_write(be, batch, rotary_dim, theta, q, k, v, kv));
    round_tensor(be, q);
    page_ctx c = {.batch = batch, .kv = kv};
    int64_t ns = 10 + kv->k.shape[2] * kv->k.shape[3] / 4;
    qv_pool_run(qv_cpu(be)->pool, batch->n_tokens, ns, round_pages, &c);
    return QV_OK;
}

static qv_status bf16_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                                float scale, qv_tensor q, qv_tensor o)
{
    ROUNDED(OPS(be)->attention(be, batch, kv, scale, q, o), round_tensor(be, o));
}

static qv_status bf16_conv1d(qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                             qv_tensor bias, qv_tensor state, qv_tensor y)
{
    ROUNDED(OPS(be)->conv1d(be, batch, x, w, bias, state, y), round_tensor(be, y));
}

static qv_status bf16_gdn(qv_backend *be, const qv_batch *batch, const qv_gdn_args *args)
{
    ROUNDED(OPS(be)->gdn(be, batch, args), round_tensor(be, args->o));
}

static qv_status bf16_ssd(qv_backend *be, const qv_batch *batch, const qv_ssd_args *args)
{
    ROUNDED(OPS(be)->ssd(be, batch, args), round_tensor(be, args->y));
}

static qv_status bf16_router(qv_backend *be, const qv_router *router, qv_tensor logits,
                             qv_tensor ids, qv_tensor weights)
{
    return OPS(be)->router(be, router, logits, ids, weights);
}

static qv_status bf16_moe_route(qv_backend *be, qv_tensor ids, qv_moe_list *list)
{
    return OPS(be)->moe_route(be, ids, list);
}

/* The rows of pairs that are in the list. */
static qv_tensor listed(const qv_moe_list *list, qv_tensor y)
{
    return qv_tensor_rows(y, 0, list->expert_start[list->n_experts]);
}

static qv_status bf16_moe_linear(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                                 qv_tensor x, qv_moe_rows rows, qv_tensor y)
{
    ROUNDED(OPS(be)->moe_linear(be, w, list, x, rows, y), round_tensor(be, listed(list, y)));
}

static qv_status bf16_moe_lora(qv_backend *be, const qv_moe_lora_site *site,
                               const qv_moe_list *list, qv_tensor x, qv_moe_rows rows,
                               qv_tensor scratch, qv_tensor y)
{
    QV_TRY(OPS(be)->moe_lora(be, site, list, x, rows, scratch, y));
    for (int32_t i = 0; i < *list->n_runs; i++) {
        const qv_moe_run *run = &list->runs[i];
        if (site->slot_active[run->slot])
            round_tensor(be, qv_tensor_rows(y, run->first, run->n));
    }
    return QV_OK;
}

static qv_status bf16_moe_combine(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                                  qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                                  qv_tensor y)
{
    ROUNDED(OPS(be)->moe_combine(be, list, weights, o, site, scratch, y), round_tensor(be, y));
}

static qv_status bf16_moe_combine_f32(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                                      qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                                      qv_tensor shared, qv_tensor gate, qv_tensor y)
{
    return OPS(be)->moe_combine_f32(be, list, weights, o, site, scratch, shared, gate, y);
}

static qv_status bf16_sample_begin(qv_backend *be, qv_tensor logits, int32_t n_valid,
                                   const qv_sample_row *rows)
{
    return OPS(be)->sample_begin(be, logits, n_valid, rows);
}

static qv_status bf16_sample_end(qv_backend *be, qv_sample_result *results)
{
    return OPS(be)->sample_end(be, results);
}

static qv_status bf16_shortlist(qv_backend *be, qv_tensor part, const qv_shortlist_part *where,
                                const qv_sample_row *rows, qv_tensor lists)
{
    return OPS(be)->shortlist(be, part, where, rows, lists);
}

static qv_status bf16_merge_shortlists(qv_backend *be, qv_tensor lists, int32_t n_parts,
                                       const qv_shortlist_part *where, const qv_sample_row *rows,
                                       qv_sample_result *results)
{
    return OPS(be)->merge_shortlists(be, lists, n_parts, where, rows, results);
}

const qv_op_table qv_cpu_bf16_ops = {
#define QV_OP_ENTRY(name, args) .name = bf16_##name,
    QV_OP_LIST(QV_OP_ENTRY)
#undef QV_OP_ENTRY
};
