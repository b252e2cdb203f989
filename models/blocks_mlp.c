#include "models/blocks_internal.h"

/* --- Dense ------------------------------------------------------------------------------------ */

/* The part of a feed-forward block that ends in its activation, which is left in INNER. */
static qv_proj_part first_part(const qv_pass *pass, qv_act act, qv_proj in, qv_proj out)
{
    return (qv_proj_part){.proj = in,
                          .act = act,
                          .wide = view(pass, QV_BUF_WIDE, pass->layout->proj[in].n_out),
                          .y = view(pass, QV_BUF_INNER, pass->layout->proj[out].n_in)};
}

qv_status qv_block_mlp(qv_pass *pass, int64_t layer, qv_act act, qv_tensor x, qv_tensor y)
{
    qv_proj_part first = first_part(pass, act, QV_PROJ_MLP_IN, QV_PROJ_MLP_OUT);
    QV_TRY(qv_linears(pass, layer, x, 1, &first));
    QV_TRY(qv_linear_out(pass, layer, QV_PROJ_MLP_OUT, first.y, y));
    probe(pass, layer, "mlp_out", y);
    return QV_OK;
}

/* --- Mixture of experts ----------------------------------------------------------------------- */

/* [T, k] of the router's choice. */
static qv_tensor chosen(const qv_pass *pass, qv_buffer buffer, qv_dtype dtype)
{
    return qv_tensor_2d(pass->buffers->data[buffer], dtype, pass->batch->n_tokens,
                        pass->config->moe_top_k);
}

static bool has(const qv_pass *pass, int64_t layer, qv_part part)
{
    return pass->config->layer_parts[layer] & part;
}

qv_status qv_block_moe_in(qv_pass *pass, int64_t layer, qv_act act, qv_tensor x, qv_moe_input *out)
{
    qv_proj_part parts[QV_MAX_LINEAR_PARTS];
    int32_t n = 0;
    *out = (qv_moe_input){.logits = qv_tensor_2d(pass->buffers->data[QV_BUF_ROUTER], QV_F32,
                                                 pass->batch->n_tokens, pass->config->n_experts)};
    if (has(pass, layer, QV_PART_SHARED)) {
        parts[n] = first_part(pass, act, QV_PROJ_SHARED_IN, QV_PROJ_SHARED_OUT);
        out->hidden = parts[n++].y;
    }
    if (has(pass, layer, QV_PART_SHARED) && pass->layout->proj[QV_PROJ_SHARED_GATE].n_out > 0) {
        out->gate = view(pass, QV_BUF_GATE, 1);
        parts[n++] = (qv_proj_part){.proj = QV_PROJ_SHARED_GATE, .y = out->gate};
    }
    parts[n++] = (qv_proj_part){.proj = QV_PROJ_ROUTER, .y = out->logits};
    if (has(pass, layer, QV_PART_LATENT)) {
        out->latent = qv_pass_latent(pass, 0);
        parts[n++] = (qv_proj_part){.proj = QV_PROJ_LATENT_IN, .y = out->latent};
    }
    QV_TRY(qv_linears(pass, layer, x, n, parts));
    return QV_OK;
}

/* The matrix that is read first behind a layer. */
static const qv_weight *first_behind(const qv_pass *pass, int64_t layer)
{
    static const qv_proj first[] = {QV_PROJ_ATTN_IN, QV_PROJ_GDN_IN, QV_PROJ_SSM_IN, QV_PROJ_MLP_IN,
                                    QV_PROJ_SHARED_IN};
    if (layer + 1 == pass->config->n_layers)
        return qv_weights_layer(pass->weights, QV_GLOBAL)->proj[QV_PROJ_LM_HEAD];
    const qv_layer_weights *next = qv_weights_layer(pass->weights, layer + 1);
    for (size_t i = 0; i < sizeof first / sizeof *first; i++)
        if (next->proj[first[i]] != NULL)
            return next->proj[first[i]];
    return NULL;
}

/* Pairs of adapters on a projection of experts; NULL without adapters. */
static const qv_moe_lora_site *expert_site(const qv_pass *pass, int64_t layer, qv_proj proj)
{
    return pass->lora != NULL ? qv_lora_parts_experts(qv_lora_pool_parts(pass->lora), layer, proj)
                              : NULL;
}

/* Of the list. Without adapters nobody reads its runs. */
static int32_t n_segs_of(const qv_pass *pass)
{
    return pass->lora != NULL ? pass->batch->n_segs : 0;
}

static qv_status choose(qv_pass *pass, const qv_choice *c)
{
    const qv_batch *batch = pass->batch;
    return qv_op_choose(pass->be, &c->router, c->logits, chosen(pass, QV_BUF_EXPERT, QV_I32),
                        chosen(pass, QV_BUF_EXPERT_WEIGHT, QV_F32), n_segs_of(pass),
                        batch->seg_start, batch->seg_slot, pass->list, &c->beside);
}

/* Adapters on the experts' first projection stand between the two products; a probe looks at what
 * is chosen before either. */
qv_status qv_block_route(qv_pass *pass, int64_t layer, const qv_router *router,
                         const qv_moe_input *in, qv_tensor shared)
{
    qv_choice choice = {
        .router = *router,
        .logits = in->logits,
        .beside = {.x = in->hidden, .y = shared, .next = first_behind(pass, layer)}};
    if (shared.data != NULL)
        choice.beside.w = qv_pass_plain(pass, layer, QV_PROJ_SHARED_OUT, &choice.beside.x);
    probe(pass, layer, "router_logits", in->logits);
    bool leave = pass->probe == NULL && expert_site(pass, layer, QV_PROJ_EXPERT_IN) == NULL;
    if (leave)
        pass->choice = choice;
    else
        QV_TRY(choose(pass, &choice));
    probe(pass, layer, "experts", chosen(pass, QV_BUF_EXPERT, QV_I32));
    probe(pass, layer, "expert_weights", chosen(pass, QV_BUF_EXPERT_WEIGHT, QV_F32));
    if (shared.data == NULL)
        return QV_OK;
    if (choice.beside.w == NULL)
        QV_TRY(qv_linear(pass, layer, QV_PROJ_SHARED_OUT, in->hidden, shared));
    probe(pass, layer, "shared_out", shared);
    return QV_OK;
}

/* A x of adapters, one row a pair. */
static qv_tensor expert_scratch(const qv_pass *pass, const qv_moe_lora_site *site)
{
    if (site == NULL)
        return (qv_tensor){.data = NULL};
    return qv_tensor_3d(pass->buffers->data[QV_BUF_LORA], QV_F32,
                        (int64_t)pass->batch->n_tokens * pass->config->moe_top_k, site->n_slices,
                        site->max_rank);
}

/* What adapters on a projection of experts add to y. */
static qv_status expert_lora(qv_pass *pass, const qv_moe_lora_site *site, qv_tensor x,
                             qv_moe_rows rows, qv_tensor y)
{
    return site != NULL
               ? qv_op_moe_lora(pass->be, site, pass->list, x, rows, expert_scratch(pass, site), y)
               : QV_OK;
}

/* Both products and the activation between them, of a choice that has been made. With adapters on
 * the first one. */
static qv_status run_apart(qv_pass *pass, const qv_experts *e, const qv_moe_lora_site *site)
{
    qv_tensor x = e->x;
    qv_moe_rows rows;
    QV_TRY(qv_op_moe_gather(pass->be, pass->list, e->y, &x, &rows)); /* as wide as what goes in */
    if (site == NULL) {
        QV_TRY(
            qv_op_moe_linear_act(pass->be, e->in, pass->list, x, rows, e->act, e->wide, e->inner));
    } else {
        QV_TRY(qv_op_moe_linear(pass->be, e->in, pass->list, x, rows, e->wide));
        QV_TRY(expert_lora(pass, site, x, rows, e->wide));
        QV_TRY(qv_op_activate(pass->be, e->act, e->wide, e->inner));
    }
    return qv_op_moe_linear(pass->be, e->out, pass->list, e->inner, QV_MOE_PAIRS, e->y);
}

/* With the choice that was left to it. */
static qv_status run_chosen(qv_pass *pass, const qv_experts *e)
{
    const qv_batch *batch = pass->batch;
    const qv_choice choice = pass->choice;
    pass->choice = (qv_choice){.logits = {.data = NULL}};
    return qv_op_choose_experts(pass->be, &choice.router, choice.logits,
                                chosen(pass, QV_BUF_EXPERT, QV_I32),
                                chosen(pass, QV_BUF_EXPERT_WEIGHT, QV_F32), n_segs_of(pass),
                                batch->seg_start, batch->seg_slot, pass->list, &choice.beside, e);
}

/* What experts give, a row a pair; *site: of the adapters on their last projection. */
static qv_status run_experts(qv_pass *pass, int64_t layer, qv_act act, qv_tensor x,
                             const qv_moe_lora_site **site, qv_tensor *out)
{
    int64_t n_pairs = (int64_t)pass->batch->n_tokens * pass->config->moe_top_k;
    qv_dtype dtype = qv_backend_activation_dtype(pass->be);
    const qv_weight *const *proj =
        (const qv_weight *const *)qv_weights_layer(pass->weights, layer)->proj;
    int64_t n_wide = pass->layout->proj[QV_PROJ_EXPERT_IN].n_out;
    int64_t n_inner = pass->layout->proj[QV_PROJ_EXPERT_OUT].n_in;
    int64_t n_out = pass->layout->proj[QV_PROJ_EXPERT_OUT].n_out;
    qv_experts e = {
        .in = proj[QV_PROJ_EXPERT_IN], .out = proj[QV_PROJ_EXPERT_OUT], .act = act, .x = x};
    e.wide = qv_tensor_2d(pass->buffers->data[QV_BUF_EXPERT_WIDE], dtype, n_pairs, n_wide);
    e.inner = qv_tensor_cols(e.wide, 0, n_inner); /* the activation works in place */
    *out = e.y = qv_tensor_2d(pass->buffers->data[QV_BUF_EXPERT_OUT], dtype, n_pairs, n_out);
    *site = expert_site(pass, layer, QV_PROJ_EXPERT_OUT);
    if (pass->choice.logits.data != NULL)
        QV_TRY(run_chosen(pass, &e));
    else
        QV_TRY(run_apart(pass, &e, expert_site(pass, layer, QV_PROJ_EXPERT_IN)));
    return expert_lora(pass, *site, e.inner, QV_MOE_PAIRS, *out);
}

qv_status qv_block_latent_experts(qv_pass *pass, int64_t layer, qv_act act, qv_tensor x,
                                  qv_tensor y)
{
    const qv_moe_lora_site *site;
    qv_tensor out, weights = chosen(pass, QV_BUF_EXPERT_WEIGHT, QV_F32);
    QV_TRY(run_experts(pass, layer, act, x, &site, &out));
    QV_TRY(
        qv_op_moe_combine(pass->be, pass->list, weights, out, site, expert_scratch(pass, site), y));
    probe(pass, layer, "experts_out", y);
    return QV_OK;
}

qv_status qv_block_experts(qv_pass *pass, int64_t layer, qv_act act, qv_tensor x, qv_tensor shared,
                           qv_tensor gate, qv_tensor y)
{
    qv_moe_sum sum = {.list = pass->list,
                      .weights = chosen(pass, QV_BUF_EXPERT_WEIGHT, QV_F32),
                      .shared = shared,
                      .gate = gate};
    QV_TRY(run_experts(pass, layer, act, x, &sum.site, &sum.o));
    sum.scratch = expert_scratch(pass, sum.site);
    if (pass->probe == NULL) {
        pass->sum = sum;
        return QV_OK;
    }
    QV_TRY(qv_op_moe_combine_f32(pass->be, sum.list, sum.weights, sum.o, sum.site, sum.scratch,
                                 shared, gate, y));
    probe(pass, layer, "moe_out", y);
    return QV_OK;
}

qv_status qv_block_moe_sum(qv_pass *pass, int64_t layer, qv_tensor shared, qv_tensor y)
{
    QV_TRY(qv_op_add(pass->be, y, shared, (qv_tensor){.data = NULL}));
    probe(pass, layer, "moe_out", y);
    return QV_OK;
}
