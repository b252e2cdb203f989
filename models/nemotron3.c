/* Nemotron-3 (Nemotron-H): one mixer a layer, which is Mamba-2, attention without positions,
 * experts or a dense MLP; formulas and traps in docs/models.md. */
#include "models/arch.h"

#include "common/json.h"
#include "models/blocks.h"
#include "models/config_read.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

/* --- Config ----------------------------------------------------------------------------------- */

/* Kinds of layers: the letter of hybrid_override_pattern, the names in layers_block_type. */
static const struct {
    char letter;
    const char *name, *other;
    uint16_t part;
} layer_kinds[] = {
    {'M', "mamba", "linear_attention", QV_PART_SSM},
    {'*', "attention", "full_attention", QV_PART_ATTENTION},
    {'E', "moe", "moe", QV_PART_MOE},
    {'-', "mlp", "mlp", QV_PART_MLP},
};

#define N_KINDS (sizeof layer_kinds / sizeof *layer_kinds)

static qv_status read_layer_name(const json_t *item, int64_t layer, const char *where,
                                 uint16_t *parts)
{
    const char *name = json_string_value(item);
    for (size_t i = 0; name != NULL && i < N_KINDS; i++) {
        if (strcmp(name, layer_kinds[i].name) == 0 || strcmp(name, layer_kinds[i].other) == 0) {
            *parts = QV_PART_LAYER | layer_kinds[i].part;
            return QV_OK;
        }
    }
    return qv_fail(QV_ERR_UNSUPPORTED,
                   "%s: layers_block_type[%" PRId64 "] is \"%.60s\": mamba, attention, moe and mlp "
                   "are implemented",
                   where, layer, name ? name : "(not a string)");
}

static qv_status read_layer_letter(char letter, size_t layer, const char *where, uint16_t *parts)
{
    for (size_t i = 0; i < N_KINDS; i++) {
        if (letter == layer_kinds[i].letter) {
            *parts = QV_PART_LAYER | layer_kinds[i].part;
            return QV_OK;
        }
    }
    return qv_fail(QV_ERR_UNSUPPORTED,
                   "%s: hybrid_override_pattern has '%c' for layer %zu: M, E, * and - are "
                   "implemented",
                   where, letter >= ' ' && letter <= '~' ? letter : '?', layer);
}

/* The number of layers is the length of the list or the pattern; when it is given too, it must
 * agree. */
static qv_status check_count(const json_t *text, const char *where, const char *key, size_t n,
                             qv_model_config *out)
{
    int64_t stated;
    if (n < 1 || n > QV_MAX_LAYERS)
        return qv_fail(QV_ERR_FORMAT, "%s: %s describes %zu layers, which is not between 1 and %d",
                       where, key, n, QV_MAX_LAYERS);
    QV_TRY(qv_config_int(text, "num_hidden_layers", where, (int64_t)n, 1, QV_MAX_LAYERS, &stated));
    if (stated != (int64_t)n)
        return qv_fail(QV_ERR_FORMAT,
                       "%s: %s describes %zu layers, num_hidden_layers says %" PRId64, where, key,
                       n, stated);
    out->n_layers = (int64_t)n;
    return QV_OK;
}

/* The list wins over the pattern. */
static qv_status read_layers(const json_t *text, const char *where, qv_model_config *out)
{
    const json_t *list = json_object_get(text, "layers_block_type");
    if (list != NULL && !json_is_null(list)) {
        if (!json_is_array(list))
            return qv_fail(QV_ERR_FORMAT, "%s: layers_block_type is not a list", where);
        QV_TRY(check_count(text, where, "layers_block_type", json_array_size(list), out));
        for (int64_t i = 0; i < out->n_layers; i++)
            QV_TRY(
                read_layer_name(json_array_get(list, (size_t)i), i, where, &out->layer_parts[i]));
        return QV_OK;
    }
    const char *pattern;
    QV_TRY(qv_json_get_str(text, "hybrid_override_pattern", where, &pattern));
    QV_TRY(check_count(text, where, "hybrid_override_pattern", strlen(pattern), out));
    for (size_t i = 0; pattern[i] != '\0'; i++)
        QV_TRY(read_layer_letter(pattern[i], i, where, &out->layer_parts[i]));
    return QV_OK;
}

/* Settings that would change the result and have one implemented value. Rotary settings do nothing:
 * attention has no positions. */
static qv_status refuse_variants(const json_t *text, const char *where)
{
    static const char *const off[] = {"attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias",
                                      "residual_in_fp32"};
    for (size_t i = 0; i < sizeof off / sizeof *off; i++)
        QV_TRY(qv_config_expect_bool(text, off[i], where, false));
    QV_TRY(qv_config_expect_str(text, "mlp_hidden_act", where, "relu2"));
    QV_TRY(qv_config_expect_str(text, "mamba_hidden_act", where, "silu"));
    QV_TRY(qv_config_expect_unset(text, "sliding_window", where));
    return qv_config_expect_unset(text, "block_configs", where);
}

/* The first of two spellings of a field that is there. */
static const char *spelling(const json_t *text, const char *key, const char *other)
{
    const json_t *value = json_object_get(text, key);
    return value == NULL && json_object_get(text, other) != NULL ? other : key;
}

/* A number, or infinity as some writers spell it: {"__float__": "Infinity"}, or a number beyond all
 * others (common/json.h reads a bare Infinity so). */
static bool read_limit(const json_t *value, double *out)
{
    const char *name = json_string_value(json_object_get(value, "__float__"));
    if (json_is_number(value))
        *out = json_number_value(value);
    else if (name != NULL && strcmp(name, "Infinity") == 0)
        *out = INFINITY;
    else
        return false;
    if (*out >= DBL_MAX)
        *out = INFINITY;
    return true;
}

/* The limits of the time step. time_step_min and time_step_max are no limits: they only say how
 * training started. */
static qv_status read_dt_limits(const json_t *text, const char *where, qv_model_config *out)
{
    const char *key = spelling(text, "time_step_limit", "mamba_dt_limit");
    const json_t *limit = json_object_get(text, key);
    out->dt_min = 0;
    out->dt_max = INFINITY;
    if (limit == NULL || json_is_null(limit))
        return QV_OK;
    if (json_array_size(limit) != 2 || !read_limit(json_array_get(limit, 0), &out->dt_min) ||
        !read_limit(json_array_get(limit, 1), &out->dt_max) || !(out->dt_min >= 0) ||
        !(out->dt_max >= out->dt_min))
        return qv_fail(QV_ERR_FORMAT, "%s: %s is not a list of two limits, the lower one first",
                       where, key);
    return QV_OK;
}

static qv_status read_ssm(const json_t *text, const char *where, qv_model_config *out)
{
    const char *groups = spelling(text, "n_groups", "mamba_n_groups");
    const qv_config_dim dims[] = {
        {"mamba_num_heads", 128, 1, 4096, &out->ssm_heads},
        {"mamba_head_dim", 64, 1, 1024, &out->ssm_head_dim},
        {"ssm_state_size", 128, 1, 1024, &out->ssm_state},
        {groups, 8, 1, 1024, &out->ssm_groups},
        {spelling(text, "conv_kernel", "mamba_d_conv"), 4, 2, 16, &out->conv_kernel},
    };
    QV_TRY(qv_config_dims(text, dims, sizeof dims / sizeof *dims, where));
    QV_TRY(read_dt_limits(text, where, out));
    bool bias = true;
    QV_TRY(
        qv_json_opt_bool(text, spelling(text, "use_conv_bias", "mamba_conv_bias"), where, &bias));
    for (int64_t i = 0; i < out->n_layers && bias; i++) {
        if (out->layer_parts[i] & QV_PART_SSM)
            out->layer_parts[i] |= QV_PART_CONV_BIAS;
    }
    return qv_config_expect_multiple(out->ssm_heads, "mamba_num_heads", out->ssm_groups, groups,
                                     where);
}

static qv_status read_moe(const json_t *text, const char *where, qv_model_config *out)
{
    int64_t n_shared, shared_width;
    const qv_config_dim dims[] = {
        {"n_routed_experts", QV_CONFIG_REQUIRED, 1, 4096, &out->n_experts},
        {"num_experts_per_tok", QV_CONFIG_REQUIRED, 1, 1024, &out->moe_top_k},
        {"moe_intermediate_size", QV_CONFIG_REQUIRED, 1, 1 << 20, &out->moe_ffn},
        {"moe_latent_size", 0, 0, 1 << 16, &out->moe_latent},
        {"n_shared_experts", 1, 0, 64, &n_shared},
        {"moe_shared_expert_intermediate_size", out->moe_ffn, 0, 1 << 20, &shared_width},
        {"n_group", 1, 1, 256, &out->router_groups},
        {"topk_group", 1, 1, 256, &out->router_topk_groups},
    };
    QV_TRY(qv_config_dims(text, dims, sizeof dims / sizeof *dims, where));
    out->shared_ffn = n_shared * shared_width;
    out->router_normalize = true;
    out->router_scale = 1;
    QV_TRY(qv_json_opt_bool(text, "norm_topk_prob", where, &out->router_normalize));
    QV_TRY(qv_config_double(text, "routed_scaling_factor", where, 0, 1e6, &out->router_scale));
    for (int64_t i = 0; i < out->n_layers; i++) {
        if (out->layer_parts[i] & QV_PART_MOE)
            out->layer_parts[i] |= (out->shared_ffn > 0 ? QV_PART_SHARED : 0) |
                                   (out->moe_latent > 0 ? QV_PART_LATENT : 0);
    }
    QV_TRY(qv_config_expect_multiple(out->n_experts, "n_routed_experts", out->router_groups,
                                     "n_group", where));
    int64_t reachable = out->n_experts / out->router_groups * out->router_topk_groups;
    if (out->router_topk_groups > out->router_groups || out->moe_top_k > reachable)
        return qv_fail(QV_ERR_FORMAT,
                       "%s: num_experts_per_tok %" PRId64
                       " cannot be chosen from topk_group %" PRId64 " of %" PRId64
                       " groups of %" PRId64 " experts",
                       where, out->moe_top_k, out->router_topk_groups, out->router_groups,
                       out->n_experts / out->router_groups);
    return QV_OK;
}

static qv_status read_config(const json_t *text, const json_t *root, const char *where,
                             qv_model_config *out)
{
    (void)root;
    QV_TRY(refuse_variants(text, where));
    QV_TRY(read_layers(text, where, out));
    const qv_config_dim dims[] = {
        {"num_attention_heads", 32, 1, 1024, &out->n_heads},
        {"num_key_value_heads", 8, 1, 1024, &out->n_kv_heads},
        {spelling(text, "head_dim", "attention_head_dim"), 128, 2, 1024, &out->head_dim},
    };
    QV_TRY(qv_config_dims(text, dims, sizeof dims / sizeof *dims, where));
    QV_TRY(qv_config_expect_multiple(out->n_heads, "num_attention_heads", out->n_kv_heads,
                                     "num_key_value_heads", where));
    out->norm_eps = 1e-5;
    QV_TRY(qv_config_double(text, spelling(text, "layer_norm_epsilon", "norm_eps"), where, 1e-12,
                            0.1, &out->norm_eps));
    if (qv_model_config_count(out, QV_PART_SSM) > 0)
        QV_TRY(read_ssm(text, where, out));
    if (qv_model_config_count(out, QV_PART_MLP) > 0)
        QV_TRY(qv_config_int(text, "intermediate_size", where, QV_CONFIG_REQUIRED, 1, 1 << 20,
                             &out->ffn));
    return qv_model_config_count(out, QV_PART_MOE) > 0 ? read_moe(text, where, out) : QV_OK;
}

/* --- Tables ----------------------------------------------------------------------------------- */

#define PROJ          QV_PROJ_ROW
#define VEC           QV_VEC_ROW
#define LORA          .lora = true
#define REPLICATE     .replicate = true
#define EXPERTS(name) .experts = "mixer.experts", .fused = name

/* clang-format off */
static const qv_proj_row projs[] = {
    /*   projection   part       module                            in          out         split   unit */
    PROJ(ATTN_IN,     ATTENTION, "mixer.q_proj",                   HIDDEN,     Q,          COLUMN, HEAD_DIM,        LORA),
    PROJ(ATTN_IN,     ATTENTION, "mixer.k_proj",                   HIDDEN,     KV,         COLUMN, HEAD_DIM,        LORA, REPLICATE),
    PROJ(ATTN_IN,     ATTENTION, "mixer.v_proj",                   HIDDEN,     KV,         COLUMN, HEAD_DIM,        LORA, REPLICATE),
    PROJ(ATTN_OUT,    ATTENTION, "mixer.o_proj",                   Q,          HIDDEN,     ROW,    HEAD_DIM,        LORA),
    /* in_proj: gate z, then x, B and C, which the convolution reads, then the time steps. Heads of a
     * group share B, C and the gated norm, so a group is the unit. */
    PROJ(SSM_IN,      SSM,       "mixer.in_proj",                  HIDDEN,     SSM_INNER,  COLUMN, SSM_GROUP_INNER, LORA, REPLICATE),
    PROJ(SSM_IN,      SSM,       "mixer.in_proj",                  HIDDEN,     SSM_INNER,  COLUMN, SSM_GROUP_INNER, LORA, REPLICATE),
    PROJ(SSM_IN,      SSM,       "mixer.in_proj",                  HIDDEN,     SSM_BC,     COLUMN, SSM_STATE,       LORA, REPLICATE),
    PROJ(SSM_IN,      SSM,       "mixer.in_proj",                  HIDDEN,     SSM_BC,     COLUMN, SSM_STATE,       LORA, REPLICATE),
    PROJ(SSM_IN,      SSM,       "mixer.in_proj",                  HIDDEN,     SSM_HEADS,  COLUMN, SSM_GROUP_HEADS, LORA, REPLICATE),
    PROJ(SSM_OUT,     SSM,       "mixer.out_proj",                 SSM_INNER,  HIDDEN,     ROW,    SSM_GROUP_INNER, LORA, REPLICATE),
    PROJ(MLP_IN,      MLP,       "mixer.up_proj",                  HIDDEN,     FFN,        COLUMN, ONE,             LORA),
    PROJ(MLP_OUT,     MLP,       "mixer.down_proj",                FFN,        HIDDEN,     ROW,    ONE,             LORA),
    PROJ(ROUTER,      MOE,       "mixer.gate",                     HIDDEN,     EXPERTS,    NONE,   NONE,            LORA),
    PROJ(LATENT_IN,   LATENT,    "mixer.fc1_latent_proj",          HIDDEN,     MOE_IN,     NONE,   NONE,            LORA),
    PROJ(LATENT_OUT,  LATENT,    "mixer.fc2_latent_proj",          MOE_IN,     HIDDEN,     NONE,   NONE,            LORA),
    PROJ(EXPERT_IN,   MOE,       "up_proj",                        MOE_IN,     MOE_FFN,    COLUMN, ONE,             LORA, EXPERTS("up_proj")),
    PROJ(EXPERT_OUT,  MOE,       "down_proj",                      MOE_FFN,    MOE_IN,     ROW,    ONE,             LORA, EXPERTS("down_proj")),
    PROJ(SHARED_IN,   SHARED,    "mixer.shared_experts.up_proj",   HIDDEN,     SHARED_FFN, COLUMN, ONE,             LORA),
    PROJ(SHARED_OUT,  SHARED,    "mixer.shared_experts.down_proj", SHARED_FFN, HIDDEN,     ROW,    ONE,             LORA),
    PROJ(LM_HEAD,     GLOBAL,    "lm_head",                        HIDDEN,     VOCAB,      COLUMN, ONE,             LORA, .root = true),
};

#define CONV_TAIL .tail = {QV_DIM_ONE, QV_DIM_CONV_KERNEL}

static const qv_vec_row vecs[] = {
    /*  tensor       part       name                                 rows       split   unit */
    VEC(EMBED,       GLOBAL,    "embeddings.weight",                 VOCAB,     COLUMN, ONE, .other = "embedding.weight", .tail = {QV_DIM_HIDDEN}, .as_stored = true),
    VEC(FINAL_NORM,  GLOBAL,    "norm_f.weight",                     HIDDEN,    NONE,   NONE),
    VEC(MIXER_NORM,  LAYER,     "norm.weight",                       HIDDEN,    NONE,   NONE),
    VEC(CONV,        SSM,       "mixer.conv1d.weight",               SSM_INNER, COLUMN, SSM_GROUP_INNER, CONV_TAIL, REPLICATE),
    VEC(CONV,        SSM,       "mixer.conv1d.weight",               SSM_BC,    COLUMN, SSM_STATE,       CONV_TAIL, REPLICATE),
    VEC(CONV,        SSM,       "mixer.conv1d.weight",               SSM_BC,    COLUMN, SSM_STATE,       CONV_TAIL, REPLICATE),
    VEC(CONV_BIAS,   CONV_BIAS, "mixer.conv1d.bias",                 SSM_INNER, COLUMN, SSM_GROUP_INNER, REPLICATE),
    VEC(CONV_BIAS,   CONV_BIAS, "mixer.conv1d.bias",                 SSM_BC,    COLUMN, SSM_STATE, REPLICATE),
    VEC(CONV_BIAS,   CONV_BIAS, "mixer.conv1d.bias",                 SSM_BC,    COLUMN, SSM_STATE, REPLICATE),
    VEC(A_LOG,       SSM,       "mixer.A_log",                       SSM_HEADS, COLUMN, SSM_GROUP_HEADS, REPLICATE),
    VEC(DT_BIAS,     SSM,       "mixer.dt_bias",                     SSM_HEADS, COLUMN, SSM_GROUP_HEADS, REPLICATE),
    VEC(D_SKIP,      SSM,       "mixer.D",                           SSM_HEADS, COLUMN, SSM_GROUP_HEADS, REPLICATE),
    VEC(GATE_NORM,   SSM,       "mixer.norm.weight",                 SSM_INNER, COLUMN, SSM_GROUP_INNER, REPLICATE),
    VEC(ROUTER_BIAS, MOE,       "mixer.gate.e_score_correction_bias", EXPERTS,  NONE,   NONE),
};

/* Other names in adapters: fused projections, the parts of in_proj that some trainers name one by
 * one, and what they call the matrices of experts (w3 would be a gate, which these do not have). */
static const qv_lora_alias aliases[] = {
    {"mixer.qkv_proj", QV_PROJ_ATTN_IN, 0, 3},
    {"mixer.gate_proj", QV_PROJ_SSM_IN, 0, 1},
    {"mixer.x_proj", QV_PROJ_SSM_IN, 1, 1},
    {"w1", QV_PROJ_EXPERT_IN, 0, 1},
    {"w2", QV_PROJ_EXPERT_OUT, 0, 1},
};
/* clang-format on */

/* --- Forward ---------------------------------------------------------------------------------- */

/* Routed experts, in a narrower space where the model has one, beside shared experts that read what
 * the router reads. */
static qv_status moe(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    const qv_model_config *config = pass->config;
    qv_router router = {.kind = QV_ROUTER_SIGMOID,
                        .top_k = (int32_t)config->moe_top_k,
                        .normalize = config->router_normalize,
                        .scale = (float)config->router_scale,
                        .bias = qv_pass_vec(pass, layer, QV_VEC_ROUTER_BIAS),
                        .n_groups = (int32_t)config->router_groups,
                        .topk_groups = (int32_t)config->router_topk_groups};
    bool has_shared = config->layer_parts[layer] & QV_PART_SHARED;
    qv_tensor none = {.data = NULL}, shared = has_shared ? qv_pass_shared(pass) : none;
    qv_moe_input in;
    QV_TRY(qv_block_moe_in(pass, layer, QV_ACT_RELU2, x, &in));
    QV_TRY(qv_block_route(pass, layer, &router, &in, shared));
    if (!(config->layer_parts[layer] & QV_PART_LATENT))
        return qv_block_experts(pass, layer, QV_ACT_RELU2, x, shared, none, y);
    qv_tensor routed = qv_pass_latent(pass, 1); /* [T, latent] */
    QV_TRY(qv_block_latent_experts(pass, layer, QV_ACT_RELU2, in.latent, routed));
    QV_TRY(qv_linear(pass, layer, QV_PROJ_LATENT_OUT, routed, y));
    return has_shared ? qv_block_moe_sum(pass, layer, shared, y) : QV_OK;
}

static qv_status mixer(qv_pass *pass, int64_t layer, qv_tensor x, qv_tensor y)
{
    uint32_t parts = pass->config->layer_parts[layer];
    if (parts & QV_PART_SSM)
        return qv_block_ssm(pass, layer, x, y);
    if (parts & QV_PART_ATTENTION)
        return qv_block_attention(pass, layer, x, y);
    if (parts & QV_PART_MOE)
        return moe(pass, layer, x, y);
    return qv_block_mlp(pass, layer, QV_ACT_RELU2, x, y);
}

static qv_status forward(qv_pass *pass)
{
    int64_t n_layers = pass->config->n_layers;
    qv_tensor residual = qv_pass_residual(pass); /* [T, hidden] F32 */
    qv_tensor normed = qv_pass_normed(pass);     /* [T, hidden]: what a mixer reads */
    qv_tensor delta = qv_pass_delta(pass);       /* [T, hidden]: what it adds */

    QV_TRY(qv_block_embed(pass, residual));
    QV_TRY(qv_block_norm(pass, 0, QV_VEC_MIXER_NORM, residual, normed));
    for (int64_t layer = 0; layer < n_layers; layer++) {
        QV_TRY(mixer(pass, layer, normed, delta));
        if (layer + 1 < n_layers)
            QV_TRY(qv_block_add_norm(pass, layer + 1, QV_VEC_MIXER_NORM, residual, delta, normed));
        else
            QV_TRY(qv_block_add_norm(pass, QV_GLOBAL, QV_VEC_FINAL_NORM, residual, delta, normed));
    }
    return qv_block_head(pass, normed);
}

/* --- Registration ----------------------------------------------------------------------------- */

static const char *const model_types[] = {"nemotron_h", NULL};
static const char *const prefixes[] = {"backbone.", "model.", NULL};
static const char *const skip[] = {"mtp.", NULL};

const qv_arch qv_arch_nemotron3 = {
    .name = "nemotron3",
    .model_types = model_types,
    .prefixes = prefixes,
    .skip = skip,
    .read_config = read_config,
    .projs = projs,
    .n_projs = sizeof projs / sizeof *projs,
    .vecs = vecs,
    .n_vecs = sizeof vecs / sizeof *vecs,
    .aliases = aliases,
    .n_aliases = sizeof aliases / sizeof *aliases,
    .forward = forward,
};
