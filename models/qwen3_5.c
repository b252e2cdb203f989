/* Qwen3.5, dense and mixture of experts. Layers of gated full attention and of Gated DeltaNet in
 * turn, each followed by a SwiGLU MLP or by routed experts beside a shared one; formulas and traps
 * in docs/models.md. */
#include "models/arch.h"

#include "common/json.h"
#include "models/blocks.h"
#include "models/config_read.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* --- Config ----------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    uint16_t mixer;
} layer_types[] = {
    {"full_attention", QV_PART_ATTENTION},
    {"attention", QV_PART_ATTENTION}, /* older spelling */
    {"linear_attention", QV_PART_GDN},
    {"mamba", QV_PART_GDN}, /* older spelling */
};

static qv_status read_layer_type(const json_t *item, int64_t layer, const char *where,
                                 uint16_t *parts)
{
    const char *name = json_string_value(item);
    for (size_t i = 0; name != NULL && i < sizeof layer_types / sizeof *layer_types; i++) {
        if (strcmp(name, layer_types[i].name) == 0) {
            *parts |= layer_types[i].mixer;
            return QV_OK;
        }
    }
    return qv_fail(QV_ERR_UNSUPPORTED,
                   "%s: layer_types[%" PRId64 "] is \"%.60s\": only full_attention and "
                   "linear_attention are implemented",
                   where, layer, name ? name : "(not a string)");
}

/* Dense configs may carry numbers of experts too: the type of the model decides. */
static bool is_moe(const qv_model_config *config)
{
    return strstr(config->model_type, "_moe") != NULL;
}

/* The list wins over the interval: layer i is full attention when (i + 1) % interval is 0. */
static qv_status read_layers(const json_t *text, const char *where, qv_model_config *out)
{
    QV_TRY(qv_config_int(text, "num_hidden_layers", where, QV_CONFIG_REQUIRED, 1, QV_MAX_LAYERS,
                         &out->n_layers));
    for (int64_t i = 0; i < out->n_layers; i++)
        out->layer_parts[i] =
            QV_PART_LAYER | (is_moe(out) ? QV_PART_MOE | QV_PART_SHARED : QV_PART_MLP);
    const json_t *list = json_object_get(text, "layer_types");
    if (list != NULL && !json_is_null(list)) {
        if (!json_is_array(list) || (int64_t)json_array_size(list) != out->n_layers)
            return qv_fail(QV_ERR_FORMAT,
                           "%s: layer_types is not a list of num_hidden_layers = %" PRId64
                           " entries",
                           where, out->n_layers);
        for (int64_t i = 0; i < out->n_layers; i++)
            QV_TRY(
                read_layer_type(json_array_get(list, (size_t)i), i, where, &out->layer_parts[i]));
        return QV_OK;
    }
    int64_t interval;
    QV_TRY(qv_config_int(text, "full_attention_interval", where, 4, 1, QV_MAX_LAYERS, &interval));
    for (int64_t i = 0; i < out->n_layers; i++)
        out->layer_parts[i] |= (i + 1) % interval == 0 ? QV_PART_ATTENTION : QV_PART_GDN;
    return QV_OK;
}

/* One of the objects that rotary settings may stand in. mrope sections only matter for images: for
 * text, all position rows are equal. */
static qv_status read_rope_object(const json_t *text, const char *key, const char *where,
                                  double *theta, double *factor)
{
    static const char *const known[] = {"rope_type",     "type",
                                        "rope_theta",    "partial_rotary_factor",
                                        "mrope_section", "mrope_interleaved"};
    const json_t *rope = json_object_get(text, key);
    if (rope == NULL || json_is_null(rope))
        return QV_OK;
    if (!json_is_object(rope))
        return qv_fail(QV_ERR_FORMAT, "%s: %s is not an object", where, key);
    QV_TRY(qv_config_expect_str(rope, "rope_type", where, "default"));
    if (json_object_get(rope, "rope_type") == NULL) /* the older spelling */
        QV_TRY(qv_config_expect_str(rope, "type", where, "default"));
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)rope, name, value)
    {
        bool found = json_is_null(value);
        for (size_t i = 0; i < sizeof known / sizeof *known && !found; i++)
            found = strcmp(name, known[i]) == 0;
        if (!found)
            return qv_fail(QV_ERR_UNSUPPORTED, "%s: %s.%.60s is not supported", where, key, name);
    }
    QV_TRY(qv_config_double(rope, "rope_theta", where, 0, 1e12, theta));
    return qv_config_double(rope, "partial_rotary_factor", where, 0, 1, factor);
}

/* Rotary settings stand directly in the text config, or in an object, which then wins. */
static qv_status read_rope(const json_t *text, const char *where, qv_model_config *out)
{
    double theta = 0, factor = 0.25;
    QV_TRY(qv_config_double(text, "rope_theta", where, 0, 1e12, &theta));
    QV_TRY(qv_config_double(text, "partial_rotary_factor", where, 0, 1, &factor));
    QV_TRY(read_rope_object(text, "rope_parameters", where, &theta, &factor));
    QV_TRY(read_rope_object(text, "rope_scaling", where, &theta, &factor)); /* the older name */
    if (theta < 1)
        return qv_fail(QV_ERR_FORMAT, "%s: rope_theta is missing or less than 1", where);
    out->rope_theta = theta;
    out->rotary_dim = (int64_t)((double)out->head_dim * factor);
    if (out->rotary_dim < 2 || out->rotary_dim % 2 != 0)
        return qv_fail(QV_ERR_FORMAT,
                       "%s: partial_rotary_factor %g of head_dim %" PRId64 " rotates %" PRId64
                       " dimensions, which is not a positive even number",
                       where, factor, out->head_dim, out->rotary_dim);
    return QV_OK;
}

/* Settings that would change the result and have one implemented value. */
static qv_status refuse_variants(const json_t *text, const char *where)
{
    QV_TRY(qv_config_expect_str(text, "hidden_act", where, "silu"));
    QV_TRY(qv_config_expect_bool(text, "attention_bias", where, false));
    QV_TRY(qv_config_expect_bool(text, "attn_output_gate", where, true));
    QV_TRY(qv_config_expect_str(text, "output_gate_type", where, "swish"));
    QV_TRY(qv_config_expect_unset(text, "mlp_only_layers", where));
    bool sliding = true; /* a window counts unless it is switched off */
    QV_TRY(qv_json_opt_bool(text, "use_sliding_window", where, &sliding));
    return sliding ? qv_config_expect_unset(text, "sliding_window", where) : QV_OK;
}

/* The router's weights are always divided by their sum, and every layer has experts. */
static qv_status read_moe(const json_t *text, const char *where, qv_model_config *out)
{
    const qv_config_dim dims[] = {
        {"num_experts", QV_CONFIG_REQUIRED, 1, 4096, &out->n_experts},
        {"num_experts_per_tok", QV_CONFIG_REQUIRED, 1, 1024, &out->moe_top_k},
        {"moe_intermediate_size", QV_CONFIG_REQUIRED, 1, 1 << 20, &out->moe_ffn},
        {"shared_expert_intermediate_size", QV_CONFIG_REQUIRED, 1, 1 << 20, &out->shared_ffn},
        {"decoder_sparse_step", 1, 1, 1, &(int64_t){0}},
    };
    QV_TRY(qv_config_expect_bool(text, "norm_topk_prob", where, true));
    QV_TRY(qv_config_dims(text, dims, sizeof dims / sizeof *dims, where));
    if (out->moe_top_k > out->n_experts)
        return qv_fail(QV_ERR_FORMAT,
                       "%s: num_experts_per_tok %" PRId64 " is more than num_experts %" PRId64,
                       where, out->moe_top_k, out->n_experts);
    out->router_groups = out->router_topk_groups = 1;
    out->router_normalize = true;
    out->router_scale = 1;
    return QV_OK;
}

static qv_status read_config(const json_t *text, const json_t *root, const char *where,
                             qv_model_config *out)
{
    (void)root;
    QV_TRY(refuse_variants(text, where));
    QV_TRY(read_layers(text, where, out));

    const qv_config_dim dims[] = {
        {"num_attention_heads", QV_CONFIG_REQUIRED, 1, 1024, &out->n_heads},
        {"num_key_value_heads", QV_CONFIG_REQUIRED, 1, 1024, &out->n_kv_heads},
        {"head_dim", 256, 2, 1024, &out->head_dim},
        {"linear_num_key_heads", 16, 1, 1024, &out->gdn_k_heads},
        {"linear_num_value_heads", 32, 1, 1024, &out->gdn_v_heads},
        {"linear_key_head_dim", 128, 1, 1024, &out->gdn_k_dim},
        {"linear_value_head_dim", 128, 1, 1024, &out->gdn_v_dim},
        {"linear_conv_kernel_dim", 4, 2, 16, &out->conv_kernel},
    };
    QV_TRY(qv_config_dims(text, dims, sizeof dims / sizeof *dims, where));
    QV_TRY(is_moe(out) ? read_moe(text, where, out)
                       : qv_config_int(text, "intermediate_size", where, QV_CONFIG_REQUIRED, 1,
                                       1 << 20, &out->ffn));
    out->norm_eps = 1e-6;
    QV_TRY(qv_config_double(text, "rms_norm_eps", where, 1e-12, 0.1, &out->norm_eps));
    QV_TRY(read_rope(text, where, out));

    QV_TRY(qv_config_expect_multiple(out->n_heads, "num_attention_heads", out->n_kv_heads,
                                     "num_key_value_heads", where));
    return qv_config_expect_multiple(out->gdn_v_heads, "linear_num_value_heads", out->gdn_k_heads,
                                     "linear_num_key_heads", where);
}

/* --- Tables ----------------------------------------------------------------------------------- */

#define PROJ          QV_PROJ_ROW
#define VEC           QV_VEC_ROW
#define LORA          .lora = true
#define REPLICATE     .replicate = true
#define EXPERTS(name) .experts = "mlp.experts", .fused = name

/* clang-format off */
static const qv_proj_row projs[] = {
    /*   projection part      module                     in         out          split   unit */
    /* q_proj: for each head, its query rows and then its gate rows. */
    PROJ(ATTN_IN,  ATTENTION, "self_attn.q_proj",        HIDDEN,    Q_GATE,      COLUMN, Q_GATE_HEAD,     LORA),
    PROJ(ATTN_IN,  ATTENTION, "self_attn.k_proj",        HIDDEN,    KV,          COLUMN, HEAD_DIM,        LORA, REPLICATE),
    PROJ(ATTN_IN,  ATTENTION, "self_attn.v_proj",        HIDDEN,    KV,          COLUMN, HEAD_DIM,        LORA, REPLICATE),
    PROJ(ATTN_OUT, ATTENTION, "self_attn.o_proj",        Q,         HIDDEN,      ROW,    HEAD_DIM,        LORA),
    /* in_proj_qkv: the queries of all heads, then all keys, then all values. */
    PROJ(GDN_IN,   GDN,       "linear_attn.in_proj_qkv", HIDDEN,    GDN_KEY,     COLUMN, GDN_K_DIM,       LORA, REPLICATE),
    PROJ(GDN_IN,   GDN,       "linear_attn.in_proj_qkv", HIDDEN,    GDN_KEY,     COLUMN, GDN_K_DIM,       LORA, REPLICATE),
    PROJ(GDN_IN,   GDN,       "linear_attn.in_proj_qkv", HIDDEN,    GDN_VALUE,   COLUMN, GDN_GROUP_VALUE, LORA, REPLICATE),
    PROJ(GDN_IN,   GDN,       "linear_attn.in_proj_z",   HIDDEN,    GDN_VALUE,   COLUMN, GDN_GROUP_VALUE, LORA, REPLICATE),
    PROJ(GDN_IN,   GDN,       "linear_attn.in_proj_b",   HIDDEN,    GDN_V_HEADS, COLUMN, GDN_GROUP,       LORA, REPLICATE),
    PROJ(GDN_IN,   GDN,       "linear_attn.in_proj_a",   HIDDEN,    GDN_V_HEADS, COLUMN, GDN_GROUP,       LORA, REPLICATE),
    PROJ(GDN_OUT,  GDN,       "linear_attn.out_proj",    GDN_VALUE, HIDDEN,      ROW,    GDN_GROUP_VALUE, LORA, REPLICATE),
    PROJ(MLP_IN,   MLP,       "mlp.gate_proj",           HIDDEN,    FFN,         COLUMN, ONE,             LORA),
    PROJ(MLP_IN,   MLP,       "mlp.up_proj",             HIDDEN,    FFN,         COLUMN, ONE,             LORA),
    PROJ(MLP_OUT,  MLP,       "mlp.down_proj",           FFN,       HIDDEN,      ROW,    ONE,             LORA),
    PROJ(ROUTER,     MOE,     "mlp.gate",                HIDDEN,    EXPERTS,     NONE,   NONE,            LORA),
    PROJ(EXPERT_IN,  MOE,     "gate_proj",               HIDDEN,    MOE_FFN,     COLUMN, ONE,             LORA, EXPERTS("gate_up_proj")),
    PROJ(EXPERT_IN,  MOE,     "up_proj",                 HIDDEN,    MOE_FFN,     COLUMN, ONE,             LORA, EXPERTS("gate_up_proj")),
    PROJ(EXPERT_OUT, MOE,     "down_proj",               MOE_FFN,   HIDDEN,      ROW,    ONE,             LORA, EXPERTS("down_proj")),
    PROJ(SHARED_IN,  SHARED,  "mlp.shared_expert.gate_proj", HIDDEN, SHARED_FFN, COLUMN, ONE,             LORA),
    PROJ(SHARED_IN,  SHARED,  "mlp.shared_expert.up_proj", HIDDEN,  SHARED_FFN,  COLUMN, ONE,             LORA),
    PROJ(SHARED_OUT, SHARED,  "mlp.shared_expert.down_proj", SHARED_FFN, HIDDEN, ROW,    ONE,             LORA),
    PROJ(SHARED_GATE, SHARED, "mlp.shared_expert_gate",  HIDDEN,    ONE,         NONE,   NONE,            LORA),
    PROJ(LM_HEAD,  GLOBAL,    "lm_head",                 HIDDEN,    VOCAB,       COLUMN, ONE,             LORA, .root = true),
};

#define CONV_TAIL .tail = {QV_DIM_ONE, QV_DIM_CONV_KERNEL}

static const qv_vec_row vecs[] = {
    /*  tensor      part       name                               rows         split   unit */
    VEC(EMBED, GLOBAL, "embed_tokens.weight", VOCAB, COLUMN, ONE, .tail = {QV_DIM_HIDDEN}, .as_stored = true),
    VEC(FINAL_NORM, GLOBAL,    "norm.weight",                     HIDDEN,      NONE,   NONE),
    VEC(MIXER_NORM, LAYER,     "input_layernorm.weight",          HIDDEN,      NONE,   NONE),
    VEC(MLP_NORM,   LAYER,     "post_attention_layernorm.weight", HIDDEN,      NONE,   NONE),
    VEC(Q_NORM,     ATTENTION, "self_attn.q_norm.weight",         HEAD_DIM,    NONE,   NONE),
    VEC(K_NORM,     ATTENTION, "self_attn.k_norm.weight",         HEAD_DIM,    NONE,   NONE),
    VEC(CONV,       GDN,       "linear_attn.conv1d.weight",       GDN_KEY,     COLUMN, GDN_K_DIM,       CONV_TAIL, REPLICATE),
    VEC(CONV,       GDN,       "linear_attn.conv1d.weight",       GDN_KEY,     COLUMN, GDN_K_DIM,       CONV_TAIL, REPLICATE),
    VEC(CONV,       GDN,       "linear_attn.conv1d.weight",       GDN_VALUE,   COLUMN, GDN_GROUP_VALUE, CONV_TAIL, REPLICATE),
    VEC(A_LOG,      GDN,       "linear_attn.A_log",               GDN_V_HEADS, COLUMN, GDN_GROUP, REPLICATE),
    VEC(DT_BIAS,    GDN,       "linear_attn.dt_bias",             GDN_V_HEADS, COLUMN, GDN_GROUP, REPLICATE),
    VEC(GATE_NORM,  GDN,       "linear_attn.norm.weight",         GDN_V_DIM,   NONE,   NONE),
};

/* Other names in adapters: fused projections, the parts of in_proj_qkv one by one, and what some
 * trainers call the matrices of experts. */
static const qv_lora_alias aliases[] = {
    {"self_attn.qkv_proj", QV_PROJ_ATTN_IN, 0, 3},
    {"linear_attn.in_proj_qkvz", QV_PROJ_GDN_IN, 0, 4},
    {"linear_attn.in_proj_q", QV_PROJ_GDN_IN, 0, 1},
    {"linear_attn.in_proj_k", QV_PROJ_GDN_IN, 1, 1},
    {"linear_attn.in_proj_v", QV_PROJ_GDN_IN, 2, 1},
    {"linear_attn.in_proj_ba", QV_PROJ_GDN_IN, 4, 2},
    {"mlp.gate_up_proj", QV_PROJ_MLP_IN, 0, 2},
    {"mlp.shared_expert.gate_up_proj", QV_PROJ_SHARED_IN, 0, 2},
    {"gate_up_proj", QV_PROJ_EXPERT_IN, 0, 2},
    {"w1", QV_PROJ_EXPERT_IN, 0, 1},
    {"w3", QV_PROJ_EXPERT_IN, 1, 1},
    {"w2", QV_PROJ_EXPERT_OUT, 0, 1},
};
/* clang-format on */

/* --- Forward ---------------------------------------------------------------------------------- */

/* Routed experts, and a shared one whose output a gate scales for each token. */
static qv_status moe(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    qv_router router = {.kind = QV_ROUTER_SOFTMAX,
                        .top_k = (int32_t)pass->config->moe_top_k,
                        .normalize = true,
                        .scale = 1,
                        .n_groups = 1,
                        .topk_groups = 1};
    qv_tensor shared = qv_pass_shared(pass); /* [T, hidden] F32 */
    qv_moe_input in;
    QV_TRY(qv_block_moe_in(pass, layer, QV_ACT_SWIGLU, x, &in));
    QV_TRY(qv_block_route(pass, layer, &router, &in, shared));
    return qv_block_experts(pass, layer, QV_ACT_SWIGLU, x, shared, in.gate, y);
}

static qv_status forward(qv_pass *pass)
{
    const qv_model_config *config = pass->config;
    qv_tensor residual = qv_pass_residual(pass); /* [T, hidden] F32 */
    qv_tensor normed = qv_pass_normed(pass);     /* [T, hidden]: what a block reads */
    qv_tensor delta = qv_pass_delta(pass);       /* [T, hidden]: what a block adds */

    QV_TRY(qv_block_embed(pass, residual));
    QV_TRY(qv_block_norm(pass, 0, QV_VEC_MIXER_NORM, residual, normed));
    for (int64_t layer = 0; layer < config->n_layers; layer++) {
        if (config->layer_parts[layer] & QV_PART_ATTENTION)
            QV_TRY(qv_block_gated_attention(pass, layer, normed, delta));
        else
            QV_TRY(qv_block_gdn(pass, layer, normed, delta));
        QV_TRY(qv_block_add_norm(pass, layer, QV_VEC_MLP_NORM, residual, delta, normed));

        if (config->layer_parts[layer] & QV_PART_MOE)
            QV_TRY(moe(pass, layer, normed, delta));
        else
            QV_TRY(qv_block_mlp(pass, layer, QV_ACT_SWIGLU, normed, delta));
        if (layer + 1 < config->n_layers)
            QV_TRY(qv_block_add_norm(pass, layer + 1, QV_VEC_MIXER_NORM, residual, delta, normed));
        else
            QV_TRY(qv_block_add_norm(pass, QV_GLOBAL, QV_VEC_FINAL_NORM, residual, delta, normed));
    }
    return qv_block_head(pass, normed);
}

/* --- Registration ----------------------------------------------------------------------------- */

static const char *const model_types[] = {"qwen3_5", "qwen3_5_text", "qwen3_5_moe",
                                          "qwen3_5_moe_text", NULL};
static const char *const prefixes[] = {"model.language_model.", "model.", NULL};
static const char *const skip[] = {"model.visual.", "visual.", "mtp.", NULL};

const qv_arch qv_arch_qwen3_5 = {
    .name = "qwen3_5",
    .model_types = model_types,
    .prefixes = prefixes,
    .skip = skip,
    .norm_plus_one = true,
    .fused_experts = true,
    .read_config = read_config,
    .projs = projs,
    .n_projs = sizeof projs / sizeof *projs,
    .vecs = vecs,
    .n_vecs = sizeof vecs / sizeof *vecs,
    .aliases = aliases,
    .n_aliases = sizeof aliases / sizeof *aliases,
    .forward = forward,
};
