#include "models/blocks.h"

#include <math.h>

/* --- Buffers ---------------------------------------------------------------------------------- */

static int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Bytes of each buffer. Every in-projection shares WIDE, every input of an out-projection INNER. */
static void measure(const qv_layout *layout, const qv_model_limits *limits, qv_dtype activation,
                    int64_t bytes[QV_BUF_COUNT])
{
    int64_t wide = 0, inner = 0, slices = 1;
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        const qv_proj_shape *shape = &layout->proj[p];
        slices = max64(slices, shape->n_slices);
        if (shape->n_slices > 0 && shape->part != QV_PART_GLOBAL) {
            wide = max64(wide, shape->n_out);
            inner = max64(inner, shape->n_in);
        }
    }
    int64_t t = limits->max_tokens, l = limits->max_logits, hidden = layout->config->hidden;
    int64_t rank = limits->n_adapter_slots > 0 ? limits->max_lora_rank : 0;
    int64_t act = (int64_t)qv_dtype_size(activation), f32 = sizeof(float);
    bytes[QV_BUF_RESIDUAL] = t * hidden * act;
    bytes[QV_BUF_NORMED] = t * hidden * act;
    bytes[QV_BUF_DELTA] = t * hidden * act;
    bytes[QV_BUF_WIDE] = t * wide * act;
    bytes[QV_BUF_CONV] = t * layout->vec[QV_VEC_CONV].n_rows * act;
    bytes[QV_BUF_INNER] = t * inner * act;
    bytes[QV_BUF_HEAD_IN] = l * hidden * act;
    bytes[QV_BUF_LOGITS] = l * layout->config->vocab * f32;
    bytes[QV_BUF_LORA] = max64(t, l) * slices * rank * f32;
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
    return QV_OK;
}

void qv_buffers_deinit(qv_buffers *buffers)
{
    for (int i = 0; i < QV_BUF_COUNT && buffers->be != NULL; i++)
        qv_backend_free(buffers->be, buffers->data[i]);
    *buffers = (qv_buffers){.be = NULL};
}

/* A buffer seen as this step's [T, n]. */
static qv_tensor view(const qv_pass *pass, qv_buffer buffer, int64_t n)
{
    return qv_tensor_2d(pass->buffers->data[buffer], qv_backend_activation_dtype(pass->be),
                        pass->batch->n_tokens, n);
}

qv_tensor qv_pass_residual(const qv_pass *pass)
{
    return view(pass, QV_BUF_RESIDUAL, pass->config->hidden);
}

qv_tensor qv_pass_normed(const qv_pass *pass)
{
    return view(pass, QV_BUF_NORMED, pass->config->hidden);
}

qv_tensor qv_pass_delta(const qv_pass *pass)
{
    return view(pass, QV_BUF_DELTA, pass->config->hidden);
}

static void probe(const qv_pass *pass, int64_t layer, const char *name, qv_tensor value)
{
    if (pass->probe != NULL)
        pass->probe(layer, name, &value, pass->probe_user);
}

static qv_tensor vec(const qv_pass *pass, int64_t layer, qv_vec id)
{
    return qv_weights_layer(pass->weights, layer)->vec[id];
}

/* --- Linear, embedding, norms ----------------------------------------------------------------- */

qv_status qv_linear(qv_pass *pass, int64_t layer, qv_proj proj, qv_tensor x, qv_tensor y)
{
    QV_TRY(qv_op_linear(pass->be, qv_weights_layer(pass->weights, layer)->proj[proj], x, y));
    const qv_lora_site *site =
        pass->lora != NULL ? qv_lora_pool_site(pass->lora, layer, proj) : NULL;
    if (site == NULL)
        return QV_OK;

    /* The head runs on the rows of logits, which have segments of their own. */
    const qv_batch *batch = pass->batch;
    qv_tensor scratch = qv_tensor_3d(pass->buffers->data[QV_BUF_LORA], QV_F32, x.shape[0],
                                     site->n_slices, site->max_rank);
    if (layer == QV_GLOBAL)
        return qv_op_lora(pass->be, site, batch->n_logit_segs, batch->logit_seg_start,
                          batch->logit_seg_slot, x, scratch, y);
    return qv_op_lora(pass->be, site, batch->n_segs, batch->seg_start, batch->seg_slot, x, scratch,
                      y);
}

qv_status qv_block_embed(qv_pass *pass, qv_tensor y)
{
    QV_TRY(qv_op_embed(pass->be, vec(pass, QV_GLOBAL, QV_VEC_EMBED), pass->batch->token, y));
    probe(pass, QV_GLOBAL, "embed", y);
    return QV_OK;
}

static const char *norm_name(qv_vec norm)
{
    return norm == QV_VEC_FINAL_NORM ? "final_norm"
           : norm == QV_VEC_MLP_NORM ? "mlp_norm"
                                     : "mixer_norm";
}

qv_status qv_block_norm(qv_pass *pass, int64_t layer, qv_vec norm, qv_tensor x, qv_tensor y)
{
    float eps = (float)pass->config->norm_eps;
    QV_TRY(qv_op_rms_norm(pass->be, x, vec(pass, layer, norm), eps, true, y));
    probe(pass, layer, norm_name(norm), y);
    return QV_OK;
}

qv_status qv_block_add_norm(qv_pass *pass, int64_t layer, qv_vec norm, qv_tensor residual,
                            qv_tensor delta, qv_tensor y)
{
    float eps = (float)pass->config->norm_eps;
    QV_TRY(qv_op_add_rms_norm(pass->be, residual, delta, vec(pass, layer, norm), eps, true, y));
    probe(pass, layer, norm_name(norm), y);
    return QV_OK;
}

/* --- Gated attention -------------------------------------------------------------------------- */

qv_status qv_block_gated_attention(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    const qv_model_config *c = pass->config;
    const qv_kv_layer *kv = &pass->state->layers[layer].kv;
    float eps = (float)c->norm_eps, scale = (float)(1 / sqrt((double)c->head_dim));
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
    QV_TRY(qv_op_rms_norm(pass->be, q, vec(pass, layer, QV_VEC_Q_NORM), eps, true, q));
    QV_TRY(qv_op_rms_norm(pass->be, k, vec(pass, layer, QV_VEC_K_NORM), eps, true, k));
    probe(pass, layer, "attn_q_normed", q);
    probe(pass, layer, "attn_k_normed", k);
    probe(pass, layer, "attn_v", v);

    QV_TRY(
        qv_op_rope_kv_write(pass->be, pass->batch, (int)c->rotary_dim, c->rope_theta, q, k, v, kv));
    qv_tensor attn = view(pass, QV_BUF_INNER, c->n_heads * c->head_dim);
    qv_tensor heads = qv_tensor_split(attn, c->n_heads, c->head_dim);
    QV_TRY(qv_op_attention(pass->be, pass->batch, kv, scale, q, heads));
    probe(pass, layer, "attn_heads", heads);
    QV_TRY(qv_op_sigmoid_gate(pass->be, heads, gate));
    QV_TRY(qv_linear(pass, layer, QV_PROJ_ATTN_OUT, attn, y));
    probe(pass, layer, "attn_out", y);
    return QV_OK;
}

/* --- Gated DeltaNet --------------------------------------------------------------------------- */

qv_status qv_block_gdn(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    const qv_model_config *c = pass->config;
    const qv_layer_state *state = &pass->state->layers[layer];
    int64_t n_key = c->gdn_k_heads * c->gdn_k_dim, n_value = c->gdn_v_heads * c->gdn_v_dim;
    int64_t n_conv = 2 * n_key + n_value, n_heads = c->gdn_v_heads;

    qv_tensor in = view(pass, QV_BUF_WIDE, n_conv + n_value + 2 * n_heads);
    QV_TRY(qv_linear(pass, layer, QV_PROJ_GDN_IN, x, in));
    qv_tensor qkv = qv_tensor_cols(in, 0, n_conv);
    qv_tensor z = qv_tensor_split(qv_tensor_cols(in, n_conv, n_value), n_heads, c->gdn_v_dim);
    qv_tensor b = qv_tensor_cols(in, n_conv + n_value, n_heads);
    qv_tensor a = qv_tensor_cols(in, n_conv + n_value + n_heads, n_heads);

    qv_tensor mixed = view(pass, QV_BUF_CONV, n_conv);
    QV_TRY(qv_op_conv1d(pass->be, pass->batch, qkv, vec(pass, layer, QV_VEC_CONV), (qv_tensor){0},
                        state->conv, mixed));
    probe(pass, layer, "gdn_conv", mixed);

    qv_tensor q = qv_tensor_cols(mixed, 0, n_key), k = qv_tensor_cols(mixed, n_key, n_key);
    qv_tensor v = qv_tensor_cols(mixed, 2 * n_key, n_value);
    qv_tensor out = view(pass, QV_BUF_INNER, n_value);
    qv_tensor heads = qv_tensor_split(out, n_heads, c->gdn_v_dim);
    QV_TRY(qv_op_gdn(pass->be, pass->batch,
                     &(qv_gdn_args){.q = qv_tensor_split(q, c->gdn_k_heads, c->gdn_k_dim),
                                    .k = qv_tensor_split(k, c->gdn_k_heads, c->gdn_k_dim),
                                    .v = qv_tensor_split(v, n_heads, c->gdn_v_dim),
                                    .a = a,
                                    .b = b,
                                    .a_log = vec(pass, layer, QV_VEC_A_LOG),
                                    .dt_bias = vec(pass, layer, QV_VEC_DT_BIAS),
                                    .state = state->recurrent,
                                    .o = heads}));
    probe(pass, layer, "gdn_heads", heads);
    QV_TRY(qv_op_gated_rms_norm(pass->be, heads, z, vec(pass, layer, QV_VEC_GATE_NORM),
                                (float)c->norm_eps, false, heads));
    probe(pass, layer, "gdn_gated", heads);
    QV_TRY(qv_linear(pass, layer, QV_PROJ_GDN_OUT, out, y));
    probe(pass, layer, "gdn_out", y);
    return QV_OK;
}

/* --- Feed-forward and head -------------------------------------------------------------------- */

qv_status qv_block_swiglu_mlp(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    int64_t ffn = pass->config->ffn;
    qv_tensor gate_up = view(pass, QV_BUF_WIDE, 2 * ffn);
    qv_tensor hidden = view(pass, QV_BUF_INNER, ffn);
    QV_TRY(qv_linear(pass, layer, QV_PROJ_MLP_IN, x, gate_up));
    QV_TRY(qv_op_swiglu(pass->be, qv_tensor_cols(gate_up, 0, ffn),
                        qv_tensor_cols(gate_up, ffn, ffn), hidden));
    QV_TRY(qv_linear(pass, layer, QV_PROJ_MLP_OUT, hidden, y));
    probe(pass, layer, "mlp_out", y);
    return QV_OK;
}

qv_status qv_block_head(qv_pass *pass, qv_tensor x)
{
    int64_t n = pass->batch->n_logits;
    pass->logits = qv_tensor_2d(pass->buffers->data[QV_BUF_LOGITS], QV_F32, n, pass->config->vocab);
    if (n == 0)
        return QV_OK;
    qv_tensor rows =
        qv_tensor_2d(pass->buffers->data[QV_BUF_HEAD_IN], x.dtype, n, pass->config->hidden);
    QV_TRY(qv_op_gather_rows(pass->be, x, pass->batch->logit_row, rows));
    QV_TRY(qv_linear(pass, QV_GLOBAL, QV_PROJ_LM_HEAD, rows, pass->logits));
    probe(pass, QV_GLOBAL, "logits", pass->logits);
    return QV_OK;
}
