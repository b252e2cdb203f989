#include "models/blocks_internal.h"

/* --- Buffers ---------------------------------------------------------------------------------- */

static int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Bytes of each buffer. Every in-projection shares WIDE, every input of an out-projection INNER. */
static void measure(const qv_layout *layout, const qv_model_limits *limits, qv_dtype activation,
                    int64_t bytes[QV_BUF_COUNT])
{
    int64_t wide = 0, inner = 0, slices = 1, expert_slices = 0;
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        const qv_proj_shape *shape = &layout->proj[p];
        if (shape->experts) {
            expert_slices = max64(expert_slices, shape->n_slices);
            continue;
        }
        slices = max64(slices, shape->n_slices);
        if (shape->n_slices > 0 && shape->part != QV_PART_GLOBAL) {
            wide = max64(wide, shape->n_out);
            inner = max64(inner, shape->x_cols);
        }
    }
    const qv_model_config *c = layout->config;
    int64_t t = limits->max_tokens, l = limits->max_logits, hidden = c->hidden;
    int64_t pairs = t * c->moe_top_k; /* 0 without experts */
    int64_t rank = limits->n_adapter_slots > 0 ? limits->max_lora_rank : 0;
    int64_t act = (int64_t)qv_dtype_size(activation), f32 = sizeof(float);
    bytes[QV_BUF_RESIDUAL] = t * hidden * f32;
    bytes[QV_BUF_NORMED] = t * hidden * act;
    bytes[QV_BUF_REST] = c->n_experts > 0 ? t * hidden * act : 0;
    bytes[QV_BUF_DELTA] = t * hidden * f32;
    bytes[QV_BUF_WIDE] = t * wide * act;
    bytes[QV_BUF_CONV] = t * layout->vec[QV_VEC_CONV].n_rows * act;
    bytes[QV_BUF_INNER] = t * inner * act;
    bytes[QV_BUF_SHARED] = c->shared_ffn > 0 ? t * hidden * f32 : 0;
    bytes[QV_BUF_GATE] = c->shared_ffn > 0 ? t * act : 0;
    bytes[QV_BUF_LATENT] = 2 * t * c->moe_latent * act;
    bytes[QV_BUF_ROUTER] = t * c->n_experts * f32;
    bytes[QV_BUF_EXPERT] = pairs * (int64_t)sizeof(int32_t);
    bytes[QV_BUF_EXPERT_WEIGHT] = pairs * f32;
    bytes[QV_BUF_MOE_LIST] =
        pairs > 0 ? (int64_t)qv_moe_list_bytes((int32_t)layout->n_experts, (int32_t)c->moe_top_k,
                                               limits->max_tokens)
                  : 0;
    bytes[QV_BUF_EXPERT_WIDE] = pairs * layout->proj[QV_PROJ_EXPERT_IN].n_out * act;
    bytes[QV_BUF_EXPERT_OUT] = pairs * layout->proj[QV_PROJ_EXPERT_OUT].n_out * act;
    bytes[QV_BUF_HEAD_IN] = l * hidden * act;
    bytes[QV_BUF_LOGITS] = layout->shard.rank == 0 ? l * c->vocab * f32 : 0;
    bytes[QV_BUF_LOGITS_PART] =
        layout->shard.n_ranks > 1 ? l * layout->proj[QV_PROJ_LM_HEAD].n_out * f32 : 0;
    int64_t words = qv_shortlist_words(
        (qv_shortlist_shape){.k = QV_MAX_SHORTLIST, .n_top = QV_MAX_TOP_LOGPROBS});
    bytes[QV_BUF_SHORTLIST] = layout->shard.n_ranks > 1 ? l * words * f32 : 0;
    bytes[QV_BUF_SHORTLISTS] =
        layout->shard.rank == 0 ? bytes[QV_BUF_SHORTLIST] * layout->shard.n_ranks : 0;
    bytes[QV_BUF_LORA] = max64(max64(t, l) * slices, pairs * expert_slices) * rank * f32;
}

uint64_t qv_buffers_bytes(const qv_layout *layout, const qv_model_limits *limits,
                          qv_dtype activation)
{
    int64_t bytes[QV_BUF_COUNT], total = 0;
    measure(layout, limits, activation, bytes);
    for (int i = 0; i < QV_BUF_COUNT; i++)
        total += bytes[i];
    return (uint64_t)total;
}

qv_status qv_buffers_init(qv_buffers *buffers, qv_backend *be, const qv_layout *layout,
                          const qv_model_limits *limits)
{
    *buffers = (qv_buffers){.be = be};
    int64_t bytes[QV_BUF_COUNT];
    measure(layout, limits, qv_backend_activation_dtype(be), bytes);
    for (int i = 0; i < QV_BUF_COUNT; i++) {
        if (bytes[i] > 0)
            QV_TRY(qv_backend_alloc(be, (size_t)bytes[i], &buffers->data[i]));
    }
    if (bytes[QV_BUF_MOE_LIST] == 0)
        return QV_OK;
    QV_TRY(qv_moe_list_init(&buffers->list, (int32_t)layout->n_experts,
                            (int32_t)layout->config->moe_top_k, limits->max_tokens,
                            buffers->data[QV_BUF_MOE_LIST]));
    buffers->list.first_expert = (int32_t)layout->first_expert;
    return QV_OK;
}

void qv_buffers_deinit(qv_buffers *buffers)
{
    for (int i = 0; i < QV_BUF_COUNT && buffers->be != NULL; i++)
        qv_backend_free(buffers->be, buffers->data[i]);
    *buffers = (qv_buffers){.be = NULL};
}

qv_tensor qv_pass_residual(const qv_pass *pass)
{
    return stream_view(pass, QV_BUF_RESIDUAL);
}

qv_tensor qv_pass_normed(const qv_pass *pass)
{
    return view(pass, QV_BUF_NORMED, pass->config->hidden);
}

qv_tensor qv_pass_delta(const qv_pass *pass)
{
    return stream_view(pass, QV_BUF_DELTA);
}

qv_tensor qv_pass_shared(const qv_pass *pass)
{
    return stream_view(pass, QV_BUF_SHARED);
}

qv_tensor qv_pass_latent(const qv_pass *pass, int which)
{
    qv_tensor both =
        qv_tensor_2d(pass->buffers->data[QV_BUF_LATENT], qv_backend_activation_dtype(pass->be),
                     2 * (int64_t)pass->batch->n_tokens, pass->config->moe_latent);
    return qv_tensor_rows(both, which * (int64_t)pass->batch->n_tokens, pass->batch->n_tokens);
}

qv_tensor qv_pass_vec(const qv_pass *pass, int64_t layer, qv_vec vec)
{
    return qv_weights_layer(pass->weights, layer)->vec[vec];
}

/* --- Linear, embedding, norms ----------------------------------------------------------------- */

/* What rounding took from the last norm in front of a router; empty in models without one. */
static qv_tensor rest_of(const qv_pass *pass)
{
    return pass->buffers->data[QV_BUF_REST] != NULL ? view(pass, QV_BUF_REST, pass->config->hidden)
                                                    : (qv_tensor){.data = NULL};
}

/* Projections whose results are not rounded: logits, and those that end in the stream. */
static bool is_exact(qv_proj proj)
{
    switch (proj) {
    case QV_PROJ_LM_HEAD:
    case QV_PROJ_ROUTER:
    case QV_PROJ_ATTN_OUT:
    case QV_PROJ_GDN_OUT:
    case QV_PROJ_SSM_OUT:
    case QV_PROJ_MLP_OUT:
    case QV_PROJ_SHARED_OUT:
    case QV_PROJ_LATENT_OUT:
        return true;
    default:
        return false;
    }
}

/* Adapters on a projection; NULL without any. */
static const qv_lora_site *site_of(const qv_pass *pass, int64_t layer, qv_proj proj)
{
    return pass->lora != NULL ? qv_lora_pool_site(pass->lora, layer, proj) : NULL;
}

/* What a projection reads beside x. */
static qv_tensor rest_for(const qv_pass *pass, qv_proj proj)
{
    return proj == QV_PROJ_ROUTER ? rest_of(pass) : (qv_tensor){.data = NULL};
}

const qv_weight *qv_pass_plain(const qv_pass *pass, int64_t layer, qv_proj proj, qv_tensor *x)
{
    const qv_proj_shape *shape = &pass->layout->proj[proj];
    if (site_of(pass, layer, proj) != NULL)
        return NULL;
    if (shape->x_cols != shape->n_in)
        *x = qv_tensor_cols(*x, shape->x_col, shape->n_in);
    return qv_weights_layer(pass->weights, layer)->proj[proj];
}

/* The segments of a projection's rows: those of logits have their own. */
typedef struct {
    int32_t n;
    const int32_t *start, *slot;
} segments;

static segments segments_of(const qv_pass *pass, int64_t layer)
{
    const qv_batch *b = pass->batch;
    return layer == QV_GLOBAL ? (segments){b->n_logit_segs, b->logit_seg_start, b->logit_seg_slot}
                              : (segments){b->n_segs, b->seg_start, b->seg_slot};
}

static qv_tensor lora_scratch(const qv_pass *pass, const qv_lora_site *site, qv_tensor x)
{
    return qv_tensor_3d(pass->buffers->data[QV_BUF_LORA], QV_F32, x.shape[0], site->n_slices,
                        site->max_rank);
}

qv_status qv_linear(qv_pass *pass, int64_t layer, qv_proj proj, qv_tensor x, qv_tensor y)
{
    const qv_weight *weight = qv_weights_layer(pass->weights, layer)->proj[proj];
    const qv_proj_shape *shape = &pass->layout->proj[proj];
    bool exact = is_exact(proj);
    qv_tensor rest = rest_for(pass, proj);
    if (shape->x_cols != shape->n_in)
        x = qv_tensor_cols(x, shape->x_col, shape->n_in);
    const qv_lora_site *site = site_of(pass, layer, proj);
    if (site == NULL)
        return exact ? qv_op_linear_f32(pass->be, weight, x, rest, y)
                     : qv_op_linear(pass->be, weight, x, y);

    segments s = segments_of(pass, layer);
    qv_tensor scratch = lora_scratch(pass, site, x);
    if (rest.data == NULL)
        return qv_op_linear_lora(pass->be, weight, site, s.n, s.start, s.slot, x, scratch, y,
                                 exact);
    QV_TRY(qv_op_linear_f32(pass->be, weight, x, rest, y));
    return qv_op_lora_f32(pass->be, site, s.n, s.start, s.slot, x, scratch, y);
}

qv_status qv_linear_out(qv_pass *pass, int64_t layer, qv_proj proj, qv_tensor x, qv_tensor y)
{
    const qv_weight *weight = qv_weights_layer(pass->weights, layer)->proj[proj];
    const qv_proj_shape *shape = &pass->layout->proj[proj];
    const qv_lora_site *site = site_of(pass, layer, proj);
    segments s = segments_of(pass, layer);
    if (pass->probe == NULL && shape->x_cols == shape->n_in)
        QV_TRY(site == NULL
                   ? qv_op_linear_add(pass->be, weight, x, qv_pass_residual(pass), &pass->added)
                   : qv_op_linear_lora_add(pass->be, weight, site, s.n, s.start, s.slot, x,
                                           lora_scratch(pass, site, x), qv_pass_residual(pass),
                                           &pass->added));
    return pass->added ? QV_OK : qv_linear(pass, layer, proj, x, y);
}

static qv_status linear_act(qv_pass *pass, int64_t layer, const qv_proj_part *part, qv_tensor x)
{
    if (part->act == QV_ACT_NONE)
        return qv_linear(pass, layer, part->proj, x, part->y);
    QV_TRY(qv_linear(pass, layer, part->proj, x, part->wide));
    return qv_op_activate(pass->be, part->act, part->wide, part->y);
}

qv_status qv_linears(qv_pass *pass, int64_t layer, qv_tensor x, int32_t n_parts,
                     const qv_proj_part *parts)
{
    qv_linear_part joined[QV_MAX_LINEAR_PARTS];
    bool whole = true; /* no adapters between a product and its activation, nor parts of x */
    QV_ASSERT(n_parts <= QV_MAX_LINEAR_PARTS);
    for (int32_t i = 0; i < n_parts; i++) {
        const qv_proj_part *part = &parts[i];
        const qv_proj_shape *shape = &pass->layout->proj[part->proj];
        whole &= shape->x_cols == shape->n_in && site_of(pass, layer, part->proj) == NULL;
        joined[i] = (qv_linear_part){.w = qv_weights_layer(pass->weights, layer)->proj[part->proj],
                                     .f32 = is_exact(part->proj),
                                     .act = part->act,
                                     .rest = rest_for(pass, part->proj),
                                     .wide = part->wide,
                                     .y = part->y};
    }
    const qv_stream_norm norm = pass->norm;
    pass->norm = (qv_stream_norm){.y = {.data = NULL}};
    if (whole && norm.y.data != NULL)
        return qv_op_norm_linears(pass->be, &norm, n_parts, joined);
    if (norm.y.data != NULL)
        QV_TRY(qv_op_add_rms_norm(pass->be, norm.residual, (qv_tensor){.data = NULL}, norm.w,
                                  norm.eps, norm.plus_one, norm.y, norm.rest));
    if (whole)
        return qv_op_linears(pass->be, x, n_parts, joined);
    for (int32_t i = 0; i < n_parts; i++)
        QV_TRY(linear_act(pass, layer, &parts[i], x));
    return QV_OK;
}

qv_status qv_block_embed(qv_pass *pass, qv_tensor y)
{
    int64_t first = pass->layout->vec[QV_VEC_EMBED].slices[0].src_row;
    QV_TRY(qv_op_embed(pass->be, qv_pass_vec(pass, QV_GLOBAL, QV_VEC_EMBED), first,
                       pass->batch->token, y));
    QV_TRY(qv_op_all_reduce(pass->be, y)); /* one rank has the row, the others have zeros */
    if (pass->lora != NULL) {
        const qv_batch *batch = pass->batch;
        QV_TRY(qv_op_embed_lora(pass->be, qv_lora_parts_embedding(qv_lora_pool_parts(pass->lora)),
                                batch->n_segs, batch->seg_start, batch->seg_slot, batch->token, y));
    }
    probe(pass, QV_GLOBAL, "embed", y);
    return QV_OK;
}

static const char *norm_name(qv_vec norm)
{
    return norm == QV_VEC_FINAL_NORM ? "final_norm"
           : norm == QV_VEC_MLP_NORM ? "mlp_norm"
                                     : "mixer_norm";
}

/* Where the rest of a norm goes: nowhere but to a router, which reads the last norm of its layer.
 */
static qv_tensor rest_behind(const qv_pass *pass, int64_t layer, qv_vec norm)
{
    bool routed = qv_weights_layer(pass->weights, layer)->proj[QV_PROJ_ROUTER] != NULL;
    bool last = norm == QV_VEC_MLP_NORM || qv_pass_vec(pass, layer, QV_VEC_MLP_NORM).data == NULL;
    return routed && last ? rest_of(pass) : (qv_tensor){.data = NULL};
}

/* Without a delta, the residual as it is. */
static qv_status add_norm(qv_pass *pass, int64_t layer, qv_vec norm, qv_tensor residual,
                          qv_tensor delta, qv_tensor y)
{
    float eps = (float)pass->config->norm_eps;
    QV_TRY(qv_op_add_rms_norm(pass->be, residual, delta, qv_pass_vec(pass, layer, norm), eps,
                              pass->config->arch->norm_plus_one, y,
                              rest_behind(pass, layer, norm)));
    probe(pass, layer, norm_name(norm), y);
    return QV_OK;
}

qv_status qv_block_norm(qv_pass *pass, int64_t layer, qv_vec norm, qv_tensor residual, qv_tensor y)
{
    return add_norm(pass, layer, norm, residual, (qv_tensor){.data = NULL}, y);
}

/* Whether what comes next is qv_linears of y: in front of what is no mixer. */
static bool is_for_linears(const qv_pass *pass, int64_t layer, qv_vec norm)
{
    const uint32_t mixers = QV_PART_ATTENTION | QV_PART_GDN | QV_PART_SSM;
    return norm == QV_VEC_MLP_NORM ||
           (norm == QV_VEC_MIXER_NORM && !(pass->config->layer_parts[layer] & mixers));
}

qv_status qv_block_add_norm(qv_pass *pass, int64_t layer, qv_vec norm, qv_tensor residual,
                            qv_tensor delta, qv_tensor y)
{
    float eps = (float)pass->config->norm_eps;
    qv_tensor w = qv_pass_vec(pass, layer, norm), rest = rest_behind(pass, layer, norm);
    bool plus_one = pass->config->arch->norm_plus_one;
    if (pass->added) {
        pass->added = false;
        if (pass->probe == NULL && is_for_linears(pass, layer, norm)) {
            pass->norm = (qv_stream_norm){residual, w, eps, plus_one, y, rest};
            return QV_OK;
        }
        return add_norm(pass, layer, norm, residual, (qv_tensor){.data = NULL}, y);
    }
    /* every block ends in a split of its input */
    if (pass->sum.o.data != NULL)
        QV_TRY(qv_op_combine_add_rms_norm(pass->be, &pass->sum, residual, delta, w, eps, plus_one,
                                          y, rest));
    else
        QV_TRY(qv_op_sum_add_rms_norm(pass->be, residual, delta, w, eps, plus_one, y, rest));
    pass->sum = (qv_moe_sum){.list = NULL};
    probe(pass, layer, norm_name(norm), y);
    return QV_OK;
}

/* --- Head ------------------------------------------------------------------------------------- */

qv_status qv_block_head(qv_pass *pass, qv_tensor x)
{
    int64_t n = pass->batch->n_logits, n_part = pass->layout->proj[QV_PROJ_LM_HEAD].n_out;
    bool alone = pass->layout->shard.n_ranks == 1;
    void *data = pass->buffers->data[alone ? QV_BUF_LOGITS : QV_BUF_LOGITS_PART];
    pass->part = qv_tensor_2d(data, QV_F32, n, n_part);
    if (n == 0)
        return QV_OK;
    qv_tensor rows =
        qv_tensor_2d(pass->buffers->data[QV_BUF_HEAD_IN], x.dtype, n, pass->config->hidden);
    QV_TRY(qv_op_gather_rows(pass->be, x, pass->batch->logit_row, rows));
    return qv_linear(pass, QV_GLOBAL, QV_PROJ_LM_HEAD, rows, pass->part);
}
