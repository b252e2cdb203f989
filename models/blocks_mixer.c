#include "models/blocks_internal.h"

#include <math.h>

/* --- Gated attention -------------------------------------------------------------------------- */

/* From q, k and v to the gated heads, op by op, so that a probe sees what is in between. */
static qv_status probed_attention(qv_pass *pass, int64_t layer, const qv_norm_rope *how,
                                  const qv_kv_layer *kv, qv_tensor q, qv_tensor gate, qv_tensor k,
                                  qv_tensor v, qv_tensor heads)
{
    QV_TRY(qv_op_rms_norm(pass->be, q, how->q_norm, how->eps, how->plus_one, q));
    QV_TRY(qv_op_rms_norm(pass->be, k, how->k_norm, how->eps, how->plus_one, k));
    probe(pass, layer, "attn_q_normed", q);
    probe(pass, layer, "attn_k_normed", k);
    probe(pass, layer, "attn_v", v);
    QV_TRY(qv_op_rope_kv_write(pass->be, pass->batch, how->rotary_dim, how->theta, q, k, v, kv));
    float scale = (float)(1 / sqrt((double)pass->config->head_dim));
    QV_TRY(qv_op_attention(pass->be, pass->batch, kv, scale, q, heads));
    probe(pass, layer, "attn_heads", heads);
    return qv_op_sigmoid_gate(pass->be, heads, gate);
}

qv_status qv_block_gated_attention(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    const qv_model_config *c = pass->config;
    const qv_kv_layer *kv = &pass->state->layers[layer].kv;
    float scale = (float)(1 / sqrt((double)c->head_dim));
    int64_t n_q = 2 * c->n_heads * c->head_dim, n_kv = c->n_kv_heads * c->head_dim;

    qv_tensor qkv = view(pass, QV_BUF_WIDE, n_q + 2 * n_kv);
    QV_TRY(qv_linear(pass, layer, QV_PROJ_ATTN_IN, x, qkv));

    /* Each query head stands before its gate. */
    qv_tensor q_gate = qv_tensor_split(qv_tensor_cols(qkv, 0, n_q), c->n_heads, 2 * c->head_dim);
    qv_tensor q = qv_tensor_last(q_gate, 0, c->head_dim);
    qv_tensor gate = qv_tensor_last(q_gate, c->head_dim, c->head_dim);
    qv_tensor k = qv_tensor_split(qv_tensor_cols(qkv, n_q, n_kv), c->n_kv_heads, c->head_dim);
    qv_tensor v =
        qv_tensor_split(qv_tensor_cols(qkv, n_q + n_kv, n_kv), c->n_kv_heads, c->head_dim);
    const qv_norm_rope how = {.q_norm = qv_pass_vec(pass, layer, QV_VEC_Q_NORM),
                              .k_norm = qv_pass_vec(pass, layer, QV_VEC_K_NORM),
                              .eps = (float)c->norm_eps,
                              .plus_one = true,
                              .rotary_dim = (int)c->rotary_dim,
                              .theta = c->rope_theta};
    qv_tensor attn = view(pass, QV_BUF_INNER, c->n_heads * c->head_dim);
    qv_tensor heads = qv_tensor_split(attn, c->n_heads, c->head_dim);
    if (pass->probe == NULL) {
        QV_TRY(qv_op_norm_rope_kv_write(pass->be, pass->batch, &how, q, k, v, kv));
        QV_TRY(qv_op_gated_attention(pass->be, pass->batch, kv, scale, q, gate, heads));
    } else {
        QV_TRY(probed_attention(pass, layer, &how, kv, q, gate, k, v, heads));
    }
    QV_TRY(qv_linear_out(pass, layer, QV_PROJ_ATTN_OUT, attn, y));
    probe(pass, layer, "attn_out", y);
    return QV_OK;
}

/* --- Attention without positions -------------------------------------------------------------- */

qv_status qv_block_attention(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    const qv_model_config *c = pass->config;
    const qv_kv_layer *kv = &pass->state->layers[layer].kv;
    float scale = (float)(1 / sqrt((double)c->head_dim));
    int64_t n_q = c->n_heads * c->head_dim, n_kv = c->n_kv_heads * c->head_dim;

    qv_tensor qkv = view(pass, QV_BUF_WIDE, n_q + 2 * n_kv);
    QV_TRY(qv_linear(pass, layer, QV_PROJ_ATTN_IN, x, qkv));
    qv_tensor q = qv_tensor_split(qv_tensor_cols(qkv, 0, n_q), c->n_heads, c->head_dim);
    qv_tensor k = qv_tensor_split(qv_tensor_cols(qkv, n_q, n_kv), c->n_kv_heads, c->head_dim);
    qv_tensor v =
        qv_tensor_split(qv_tensor_cols(qkv, n_q + n_kv, n_kv), c->n_kv_heads, c->head_dim);

    QV_TRY(qv_op_rope_kv_write(pass->be, pass->batch, 0, 1, q, k, v, kv));
    qv_tensor attn = view(pass, QV_BUF_INNER, n_q);
    qv_tensor heads = qv_tensor_split(attn, c->n_heads, c->head_dim);
    QV_TRY(qv_op_attention(pass->be, pass->batch, kv, scale, q, heads));
    probe(pass, layer, "attn_heads", heads);
    QV_TRY(qv_linear_out(pass, layer, QV_PROJ_ATTN_OUT, attn, y));
    probe(pass, layer, "attn_out", y);
    return QV_OK;
}

/* --- Gated DeltaNet --------------------------------------------------------------------------- */

/* What qv_op_conv_gdn_norm does, op by op, so that a probe sees what is in between. */
static qv_status probed_gdn(qv_pass *pass, int64_t layer, const qv_around *a,
                            const qv_gdn_args *args)
{
    QV_TRY(qv_op_conv1d(pass->be, pass->batch, a->x, a->w, a->bias, a->state, a->mixed));
    probe(pass, layer, "gdn_conv", a->mixed);
    QV_TRY(qv_op_gdn(pass->be, pass->batch, args));
    probe(pass, layer, "gdn_heads", a->groups);
    return qv_op_gated_rms_norm(pass->be, a->groups, a->z, a->norm, a->eps, false, a->groups);
}

qv_status qv_block_gdn(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    const qv_model_config *c = pass->config;
    const qv_layer_state *state = &pass->state->layers[layer];
    int64_t n_key = c->gdn_k_heads * c->gdn_k_dim, n_value = c->gdn_v_heads * c->gdn_v_dim;
    int64_t n_conv = 2 * n_key + n_value, n_heads = c->gdn_v_heads;

    qv_tensor in = view(pass, QV_BUF_WIDE, n_conv + n_value + 2 * n_heads);
    QV_TRY(qv_linear(pass, layer, QV_PROJ_GDN_IN, x, in));
    qv_tensor b = qv_tensor_cols(in, n_conv + n_value, n_heads);
    qv_tensor a = qv_tensor_cols(in, n_conv + n_value + n_heads, n_heads);

    qv_tensor mixed = view(pass, QV_BUF_CONV, n_conv);
    qv_tensor q = qv_tensor_cols(mixed, 0, n_key), k = qv_tensor_cols(mixed, n_key, n_key);
    qv_tensor v = qv_tensor_cols(mixed, 2 * n_key, n_value);
    qv_tensor out = view(pass, QV_BUF_INNER, n_value);
    qv_tensor heads = qv_tensor_split(out, n_heads, c->gdn_v_dim);
    qv_around around = {
        .x = qv_tensor_cols(in, 0, n_conv),
        .mixed = mixed,
        .w = qv_pass_vec(pass, layer, QV_VEC_CONV),
        .state = state->conv,
        .groups = heads,
        .z = qv_tensor_split(qv_tensor_cols(in, n_conv, n_value), n_heads, c->gdn_v_dim),
        .norm = qv_pass_vec(pass, layer, QV_VEC_GATE_NORM),
        .eps = (float)c->norm_eps};
    qv_gdn_args args = {.q = qv_tensor_split(q, c->gdn_k_heads, c->gdn_k_dim),
                        .k = qv_tensor_split(k, c->gdn_k_heads, c->gdn_k_dim),
                        .v = qv_tensor_split(v, n_heads, c->gdn_v_dim),
                        .a = a,
                        .b = b,
                        .a_log = qv_pass_vec(pass, layer, QV_VEC_A_LOG),
                        .dt_bias = qv_pass_vec(pass, layer, QV_VEC_DT_BIAS),
                        .state = state->recurrent,
                        .o = heads};
    QV_TRY(pass->probe == NULL ? qv_op_conv_gdn_norm(pass->be, pass->batch, &around, &args)
                               : probed_gdn(pass, layer, &around, &args));
    probe(pass, layer, "gdn_gated", heads);
    QV_TRY(qv_linear_out(pass, layer, QV_PROJ_GDN_OUT, out, y));
    probe(pass, layer, "gdn_out", y);
    return QV_OK;
}

/* --- Mamba-2 ---------------------------------------------------------------------------------- */

/* What qv_op_conv_ssd_norm does, op by op. */
static qv_status probed_ssd(qv_pass *pass, int64_t layer, const qv_around *a,
                            const qv_ssd_args *args)
{
    QV_TRY(qv_op_conv1d(pass->be, pass->batch, a->x, a->w, a->bias, a->state, a->mixed));
    probe(pass, layer, "ssm_conv", a->mixed);
    QV_TRY(qv_op_ssd(pass->be, pass->batch, args));
    probe(pass, layer, "ssm_heads", args->y);
    return qv_op_gated_rms_norm(pass->be, a->groups, a->z, a->norm, a->eps, true, a->groups);
}

qv_status qv_block_ssm(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    const qv_model_config *c = pass->config;
    const qv_layer_state *state = &pass->state->layers[layer];
    int64_t n_inner = c->ssm_heads * c->ssm_head_dim, n_bc = c->ssm_groups * c->ssm_state;
    int64_t n_conv = n_inner + 2 * n_bc;

    qv_tensor in = view(pass, QV_BUF_WIDE, n_inner + n_conv + c->ssm_heads);
    QV_TRY(qv_linear(pass, layer, QV_PROJ_SSM_IN, x, in));
    qv_tensor z = qv_tensor_cols(in, 0, n_inner);
    qv_tensor dt = qv_tensor_cols(in, n_inner + n_conv, c->ssm_heads);

    qv_tensor mixed = view(pass, QV_BUF_CONV, n_conv);
    qv_tensor inner = qv_tensor_cols(mixed, 0, n_inner);
    qv_tensor b = qv_tensor_cols(mixed, n_inner, n_bc);
    qv_tensor out = view(pass, QV_BUF_INNER, n_inner);
    qv_tensor groups = qv_tensor_split(out, c->ssm_groups, n_inner / c->ssm_groups);
    /* The gate first, then a norm over each group of heads. */
    qv_around around = {.x = qv_tensor_cols(in, n_inner, n_conv),
                        .mixed = mixed,
                        .w = qv_pass_vec(pass, layer, QV_VEC_CONV),
                        .bias = qv_pass_vec(pass, layer, QV_VEC_CONV_BIAS),
                        .state = state->conv,
                        .groups = groups,
                        .z = qv_tensor_split(z, c->ssm_groups, n_inner / c->ssm_groups),
                        .norm = qv_pass_vec(pass, layer, QV_VEC_GATE_NORM),
                        .eps = (float)c->norm_eps};
    qv_ssd_args args = {.x = qv_tensor_split(inner, c->ssm_heads, c->ssm_head_dim),
                        .b = qv_tensor_split(b, c->ssm_groups, c->ssm_state),
                        .c = qv_tensor_split(qv_tensor_cols(mixed, n_inner + n_bc, n_bc),
                                             c->ssm_groups, c->ssm_state),
                        .dt = dt,
                        .a_log = qv_pass_vec(pass, layer, QV_VEC_A_LOG),
                        .dt_bias = qv_pass_vec(pass, layer, QV_VEC_DT_BIAS),
                        .d_skip = qv_pass_vec(pass, layer, QV_VEC_D_SKIP),
                        .dt_min = (float)c->dt_min,
                        .dt_max = (float)c->dt_max,
                        .state = state->recurrent,
                        .y = qv_tensor_split(out, c->ssm_heads, c->ssm_head_dim)};
    QV_TRY(pass->probe == NULL ? qv_op_conv_ssd_norm(pass->be, pass->batch, &around, &args)
                               : probed_ssd(pass, layer, &around, &args));
    probe(pass, layer, "ssm_gated", groups);
    QV_TRY(qv_linear_out(pass, layer, QV_PROJ_SSM_OUT, out, y));
    probe(pass, layer, "ssm_out", y);
    return QV_OK;
}
