#include "tests/models/fixtures_moe.h"

#include "common/json.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HIDDEN  24
#define MOE_FFN 10
#define SHARED  14
#define LATENT  16

/* --- Configs ---------------------------------------------------------------------------------- */

static const char moe_config[] =
    "{\"model_type\": \"qwen3_5_moe_text\", \"hidden_size\": 24, \"num_hidden_layers\": 3,"
    " \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 12,"
    " \"linear_num_key_heads\": 2, \"linear_num_value_heads\": 6, \"linear_key_head_dim\": 8,"
    " \"linear_value_head_dim\": 10, \"linear_conv_kernel_dim\": 4,"
    " \"max_position_embeddings\": 512, \"num_experts\": 6, \"num_experts_per_tok\": 2,"
    " \"moe_intermediate_size\": 10, \"shared_expert_intermediate_size\": 14,"
    " \"layer_types\": [\"linear_attention\", \"full_attention\", \"linear_attention\"],"
    " \"rope_parameters\": {\"rope_theta\": 10000, \"partial_rotary_factor\": 0.5},"
    " \"eos_token_id\": 2, \"tie_word_embeddings\": false}";

#define NEMOTRON                                                                                   \
    "{\"model_type\": \"nemotron_h\", \"hidden_size\": 24, \"num_attention_heads\": 4,"            \
    " \"num_key_value_heads\": 2, \"head_dim\": 12, \"mamba_num_heads\": 6,"                       \
    " \"mamba_head_dim\": 10, \"ssm_state_size\": 8, \"n_groups\": 2, \"conv_kernel\": 4,"         \
    " \"use_conv_bias\": true, \"max_position_embeddings\": 512, \"intermediate_size\": 40,"       \
    " \"mlp_hidden_act\": \"relu2\", \"moe_intermediate_size\": 10, \"n_shared_experts\": 1,"      \
    " \"moe_shared_expert_intermediate_size\": 14, \"norm_topk_prob\": true,"                      \
    " \"layer_norm_epsilon\": 1e-05, \"bos_token_id\": 1, \"eos_token_id\": 2,"                    \
    " \"pad_token_id\": 0, \"tie_word_embeddings\": false,"

static const char nano_config[] =
    NEMOTRON " \"hybrid_override_pattern\": \"ME*-EM\", \"num_hidden_layers\": 6,"
             " \"n_routed_experts\": 6, \"num_experts_per_tok\": 2, \"moe_latent_size\": null,"
             " \"routed_scaling_factor\": 2.5, \"n_group\": 1, \"topk_group\": 1}";

static const char super_config[] =
    NEMOTRON " \"layers_block_type\": [\"mamba\", \"moe\", \"attention\", \"moe\"],"
             " \"n_routed_experts\": 8, \"num_experts_per_tok\": 3, \"moe_latent_size\": 16,"
             " \"routed_scaling_factor\": 5.0, \"n_group\": 4, \"topk_group\": 2}";

const char *fx_family_name(fx_family family)
{
    static const char *const names[] = {"qwen3.5", "qwen3.5-moe", "nemotron3-nano",
                                        "nemotron3-super"};
    return names[family];
}

char *fx_family_config(fx_family family, int64_t vocab)
{
    const char *texts[] = {fx_config_text(false), moe_config, nano_config, super_config};
    char number[24];
    snprintf(number, sizeof number, "%" PRId64, vocab);
    return fx_edit_json(texts[family], "vocab_size", number);
}

char *fx_edit_json(const char *text, const char *key, const char *value)
{
    json_t *root, *parsed = NULL;
    QV_ASSERT(qv_json_load(text, strlen(text), "config", &root) == QV_OK);
    if (value != NULL)
        QV_ASSERT(qv_json_load(value, strlen(value), "value", &parsed) == QV_OK);
    json_t *object = root;
    const char *dot;
    for (; (dot = strchr(key, '.')) != NULL; key = dot + 1) {
        char *name = strndup(key, (size_t)(dot - key));
        json_t *inner = json_object_get(object, name);
        if (!json_is_object(inner))
            json_object_set_new(object, name, inner = json_object());
        object = inner;
        free(name);
    }
    if (value != NULL)
        json_object_set_new(object, key, parsed);
    else
        json_object_del(object, key);
    char *edited = json_dumps(root, JSON_ENCODE_ANY);
    json_decref(root);
    return edited;
}

/* --- Checkpoints ------------------------------------------------------------------------------ */

/* A checkpoint under construction: where names go, how numbers are stored. */
typedef struct {
    fx_file *file;
    const char *prefix;
    qv_dtype dtype;
    qv_rng rng;
    int layer;
} writer;

/* Sizes are written out below, not derived, so that the tables are tested against them. A size of
 * 0 ends the shape. */
static void add(writer *w, const char *name, int64_t a, int64_t b, int64_t c, float scale)
{
    char full[160];
    if (w->layer < 0)
        snprintf(full, sizeof full, "%s%s", w->prefix, name);
    else
        snprintf(full, sizeof full, "%slayers.%d.%s", w->prefix, w->layer, name);
    fx_add_random(w->file, full, w->dtype, c ? 3 : b ? 2 : 1, (int64_t[]){a, b, c}, &w->rng, scale);
}

/* The matrices [rows, cols] of `n` experts: one tensor `fused`, or one for each of the `parts` (one
 * or two names, which share the rows) of each expert. */
static void add_experts(writer *w, fx_experts form, const char *path, const char *fused,
                        const char *const parts[2], int64_t n, int64_t rows, int64_t cols)
{
    int n_parts = parts[1] ? 2 : 1;
    float *values = malloc((size_t)(n * rows * cols) * sizeof *values);
    qv_fill_normal(&w->rng, values, n * rows * cols, 0.3f);
    char name[160];
    if (form == FX_FUSED || (form == FX_BY_LAYER && w->layer % 2 == 0)) {
        snprintf(name, sizeof name, "%slayers.%d.%s.%s", w->prefix, w->layer, path, fused);
        fx_add(w->file, name, w->dtype, 3, (int64_t[]){n, rows, cols}, values);
    } else {
        int64_t part_rows = rows / n_parts;
        for (int64_t i = 0; i < n * n_parts; i++) {
            snprintf(name, sizeof name, "%slayers.%d.%s.%" PRId64 ".%s.weight", w->prefix, w->layer,
                     path, i / n_parts, parts[i % n_parts]);
            fx_add(w->file, name, w->dtype, 2, (int64_t[]){part_rows, cols},
                   values + i * part_rows * cols);
        }
    }
    free(values);
}

static void fill_moe(writer *w, fx_experts form, int64_t vocab)
{
    add(w, "embed_tokens.weight", vocab, HIDDEN, 0, 1);
    add(w, "norm.weight", HIDDEN, 0, 0, 0.2f);
    fx_add_random(w->file, "lm_head.weight", w->dtype, 2, (int64_t[]){vocab, HIDDEN}, &w->rng,
                  0.3f);
    for (w->layer = 0; w->layer < 3; w->layer++) {
        add(w, "input_layernorm.weight", HIDDEN, 0, 0, 0.2f);
        add(w, "post_attention_layernorm.weight", HIDDEN, 0, 0, 0.2f);
        if (w->layer == 1) {
            add(w, "self_attn.q_proj.weight", 96, HIDDEN, 0, 0.2f);
            add(w, "self_attn.k_proj.weight", 24, HIDDEN, 0, 0.2f);
            add(w, "self_attn.v_proj.weight", 24, HIDDEN, 0, 0.2f);
            add(w, "self_attn.o_proj.weight", HIDDEN, 48, 0, 0.2f);
            add(w, "self_attn.q_norm.weight", 12, 0, 0, 0.2f);
            add(w, "self_attn.k_norm.weight", 12, 0, 0, 0.2f);
        } else {
            add(w, "linear_attn.in_proj_qkv.weight", 92, HIDDEN, 0, 0.2f);
            add(w, "linear_attn.in_proj_z.weight", 60, HIDDEN, 0, 0.2f);
            add(w, "linear_attn.in_proj_b.weight", 6, HIDDEN, 0, 0.2f);
            add(w, "linear_attn.in_proj_a.weight", 6, HIDDEN, 0, 0.2f);
            add(w, "linear_attn.conv1d.weight", 92, 1, 4, 0.3f);
            add(w, "linear_attn.A_log", 6, 0, 0, 0.5f);
            add(w, "linear_attn.dt_bias", 6, 0, 0, 0.5f);
            add(w, "linear_attn.norm.weight", 10, 0, 0, 0.5f);
            add(w, "linear_attn.out_proj.weight", HIDDEN, 60, 0, 0.2f);
        }
        add(w, "mlp.gate.weight", 6, HIDDEN, 0, 0.5f);
        add_experts(w, form, "mlp.experts", "gate_up_proj",
                    (const char *const[]){"gate_proj", "up_proj"}, 6, 2 * MOE_FFN, HIDDEN);
        add_experts(w, form, "mlp.experts", "down_proj", (const char *const[]){"down_proj", NULL},
                    6, HIDDEN, MOE_FFN);
        add(w, "mlp.shared_expert.gate_proj.weight", SHARED, HIDDEN, 0, 0.2f);
        add(w, "mlp.shared_expert.up_proj.weight", SHARED, HIDDEN, 0, 0.2f);
        add(w, "mlp.shared_expert.down_proj.weight", HIDDEN, SHARED, 0, 0.2f);
        add(w, "mlp.shared_expert_gate.weight", 1, HIDDEN, 0, 0.3f);
    }
}

static void fill_mamba(writer *w)
{
    add(w, "mixer.in_proj.weight", 158, HIDDEN, 0, 0.2f); /* 60 z, 60 x, 16 B, 16 C, 6 dt */
    add(w, "mixer.conv1d.weight", 92, 1, 4, 0.3f);
    add(w, "mixer.conv1d.bias", 92, 0, 0, 0.2f);
    add(w, "mixer.A_log", 6, 0, 0, 0.5f);
    add(w, "mixer.D", 6, 0, 0, 0.5f);
    add(w, "mixer.dt_bias", 6, 0, 0, 0.5f);
    add(w, "mixer.norm.weight", 60, 0, 0, 0.5f);
    add(w, "mixer.out_proj.weight", HIDDEN, 60, 0, 0.2f);
}

static void fill_attention(writer *w)
{
    add(w, "mixer.q_proj.weight", 48, HIDDEN, 0, 0.2f);
    add(w, "mixer.k_proj.weight", 24, HIDDEN, 0, 0.2f);
    add(w, "mixer.v_proj.weight", 24, HIDDEN, 0, 0.2f);
    add(w, "mixer.o_proj.weight", HIDDEN, 48, 0, 0.2f);
}

static void fill_experts(writer *w, fx_experts form, int64_t n, int64_t latent)
{
    int64_t width = latent ? latent : HIDDEN;
    qv_dtype dtype = w->dtype;
    add(w, "mixer.gate.weight", n, HIDDEN, 0, 0.5f);
    w->dtype = QV_F32; /* as released, whatever the rest */
    add(w, "mixer.gate.e_score_correction_bias", n, 0, 0, 0.1f);
    w->dtype = dtype;
    add_experts(w, form, "mixer.experts", "up_proj", (const char *const[]){"up_proj", NULL}, n,
                MOE_FFN, width);
    add_experts(w, form, "mixer.experts", "down_proj", (const char *const[]){"down_proj", NULL}, n,
                width, MOE_FFN);
    add(w, "mixer.shared_experts.up_proj.weight", SHARED, HIDDEN, 0, 0.2f);
    add(w, "mixer.shared_experts.down_proj.weight", HIDDEN, SHARED, 0, 0.2f);
    if (latent > 0) {
        add(w, "mixer.fc1_latent_proj.weight", latent, HIDDEN, 0, 0.2f);
        add(w, "mixer.fc2_latent_proj.weight", HIDDEN, latent, 0, 0.2f);
    }
}

/* One letter a layer, as in hybrid_override_pattern. */
static void fill_nemotron(writer *w, fx_experts form, const char *pattern, int64_t n_experts,
                          int64_t latent, int64_t vocab)
{
    add(w, "embeddings.weight", vocab, HIDDEN, 0, 1);
    add(w, "norm_f.weight", HIDDEN, 0, 0, 0.5f);
    fx_add_random(w->file, "lm_head.weight", w->dtype, 2, (int64_t[]){vocab, HIDDEN}, &w->rng,
                  0.3f);
    for (w->layer = 0; pattern[w->layer] != '\0'; w->layer++) {
        add(w, "norm.weight", HIDDEN, 0, 0, 0.5f);
        switch (pattern[w->layer]) {
        case 'M':
            fill_mamba(w);
            break;
        case '*':
            fill_attention(w);
            break;
        case 'E':
            fill_experts(w, form, n_experts, latent);
            break;
        default:
            add(w, "mixer.up_proj.weight", 40, HIDDEN, 0, 0.2f);
            add(w, "mixer.down_proj.weight", HIDDEN, 40, 0, 0.2f);
        }
    }
}

void fx_family_model(fx_file *file, fx_family family, const char *prefix, fx_experts experts,
                     qv_dtype dtype, int64_t vocab, uint64_t seed)
{
    writer w = {.file = file, .dtype = dtype, .rng = qv_rng_seed(seed), .layer = -1};
    w.prefix = prefix ? prefix : family == FX_NANO || family == FX_SUPER ? "backbone." : "model.";
    switch (family) {
    case FX_MOE:
        fill_moe(&w, experts, vocab);
        break;
    case FX_NANO:
        fill_nemotron(&w, experts, "ME*-EM", 6, 0, vocab);
        break;
    case FX_SUPER:
        fill_nemotron(&w, experts, "ME*E", 8, LATENT, vocab);
        break;
    default:
        fx_random_model(file, w.prefix, false, dtype, seed);
        for (int i = 0; i < file->n; i++) { /* that one has 50 tokens */
            fx_tensor *t = &file->tensors[i];
            if (t->n_dims != 2 || t->shape[0] != 50 || vocab == 50)
                continue;
            char *name = strdup(t->name);
            fx_remove(file, name);
            fx_add_random(file, name, dtype, 2, (int64_t[]){vocab, HIDDEN}, &w.rng, 0.5f);
            free(name);
            i = -1;
        }
    }
}

const char *fx_family_write(fx_family family, int64_t vocab, uint64_t seed)
{
    fx_file file = {.n = 0};
    bool fused = family == FX_MOE;
    fx_family_model(&file, family, NULL, fused ? FX_FUSED : FX_ONE_BY_ONE, QV_BF16, vocab, seed);
    char *config = fx_family_config(family, vocab);
    const char *dir = fx_write_model(config, &file);
    free(config);
    fx_free(&file);
    return dir;
}

/* --- Changes ---------------------------------------------------------------------------------- */

static bool ends_with(const char *name, const char *suffix)
{
    size_t n = strlen(name), m = strlen(suffix);
    return n >= m && strcmp(name + n - m, suffix) == 0;
}

void fx_retype(fx_file *file, const char *suffix, qv_dtype dtype)
{
    int n_changed = 0;
    for (int i = 0; i < file->n; i++) {
        fx_tensor *t = &file->tensors[i];
        if (!ends_with(t->name, suffix))
            continue;
        int64_t n = 1;
        for (int d = 0; d < t->n_dims; d++)
            n *= t->shape[d];
        float *values = malloc((size_t)n * sizeof *values);
        void *data = malloc((size_t)n * qv_dtype_size(dtype));
        QV_ASSERT(qv_dtype_to_f32(t->dtype, t->data, values, n) == QV_OK);
        QV_ASSERT(qv_dtype_from_f32(dtype, values, data, n) == QV_OK);
        free(values);
        free(t->data);
        t->data = data;
        t->dtype = dtype;
        n_changed++;
    }
    QV_ASSERT(n_changed > 0);
}

void fx_rename(fx_file *file, const char *from, const char *to)
{
    fx_tensor *t = fx_find(file, from);
    free((char *)t->name);
    t->name = strdup(to);
}
