/* config.json and generation_config.json: the spellings, and what is refused. The released sizes
 * are in test_released.c. */
#include "tests/models/fixtures_moe.h"

#include "common/json.h"
#include "models/model_config.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static qv_status parse(const char *config, const char *generation, qv_model_config *out)
{
    return qv_model_config_parse(config, strlen(config), generation,
                                 generation ? strlen(generation) : 0, "test", out);
}

/* --- Fields ----------------------------------------------------------------------------------- */

/* A small config with field `key` set to the JSON `value`, or removed when `value` is NULL; a key
 * "rope_parameters.x" goes inside. The caller frees. */
static char *edited(const char *key, const char *value)
{
    static const char base[] =
        "{\"model_type\": \"qwen3_5_text\", \"vocab_size\": 100, \"hidden_size\": 32,"
        "\"intermediate_size\": 64, \"num_hidden_layers\": 8, \"num_attention_heads\": 4,"
        "\"num_key_value_heads\": 2, \"head_dim\": 16, \"linear_num_key_heads\": 2,"
        "\"linear_num_value_heads\": 4, \"linear_key_head_dim\": 8,"
        "\"linear_value_head_dim\": 8, \"max_position_embeddings\": 128, \"eos_token_id\": 3,"
        "\"rope_parameters\": {\"rope_theta\": 10000}}";
    json_t *root, *parsed = NULL;
    cr_assert_eq(qv_json_load(base, strlen(base), "base", &root), QV_OK, "%s", qv_error());
    if (value != NULL)
        cr_assert_eq(qv_json_load(value, strlen(value), "value", &parsed), QV_OK, "%s", value);
    const char *dot = strchr(key, '.');
    json_t *object = dot ? json_object_get(root, "rope_parameters") : root;
    if (value != NULL)
        json_object_set_new(object, dot ? dot + 1 : key, parsed);
    else
        json_object_del(object, dot ? dot + 1 : key);
    char *text = json_dumps(root, 0);
    json_decref(root);
    return text;
}

Test(config, takes_the_documented_spellings)
{
    static const struct {
        const char *key, *value;
    } rows[] = {
        {"unknown_field", "{\"a\": 1}"},
        {"num_experts", "8"}, /* by inheritance, in dense models */
        {"attention_bias", "null"},
        {"output_gate_type", "\"swish\""},
        {"mlp_only_layers", "[]"},
        {"sliding_window", "null"},
        {"quantization_config", "null"},
        {"rope_scaling", "null"},
        {"rope_parameters.rope_type", "\"default\""},
        {"rope_parameters.partial_rotary_factor", "1.0"},
        {"partial_rotary_factor", "0.5"},
        {"layer_types", "[\"mamba\", \"attention\", \"linear_attention\", \"full_attention\","
                        " \"mamba\", \"mamba\", \"mamba\", \"mamba\"]"},
        {"dtype", "\"float32\""},
        {"torch_dtype", "\"float16\""},
        {"eos_token_id", "[3, 7, 3]"},
        {"eos_token_id", "null"},
        {"bos_token_id", "null"},
        {"text_config", "null"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *text = edited(rows[i].key, rows[i].value);
        qv_model_config config;
        cr_expect_eq(parse(text, NULL, &config), QV_OK, "%s = %s: %s", rows[i].key, rows[i].value,
                     qv_error());
        free(text);
    }
}

Test(config, refuses_what_it_does_not_implement_and_names_it)
{
    static const struct {
        const char *key, *value;
        qv_status status;
        const char *says;
    } rows[] = {
        {"model_type", "\"llama\"", QV_ERR_UNSUPPORTED, "\"llama\""},
        {"model_type", "\"nemotron_h_puzzle\"", QV_ERR_UNSUPPORTED, "nemotron_h_puzzle"},
        {"model_type", "7", QV_ERR_FORMAT, "model_type"},
        {"model_type", NULL, QV_ERR_FORMAT, "model_type"},
        {"text_config", "[]", QV_ERR_FORMAT, "text_config"},
        {"vocab_size", NULL, QV_ERR_FORMAT, "vocab_size"},
        {"vocab_size", "\"100\"", QV_ERR_FORMAT, "vocab_size"},
        {"vocab_size", "0", QV_ERR_FORMAT, "vocab_size is 0"},
        {"hidden_size", "-32", QV_ERR_FORMAT, "hidden_size is -32"},
        {"hidden_size", "9223372036854775807", QV_ERR_FORMAT, "hidden_size"},
        {"intermediate_size", "1e30", QV_ERR_FORMAT, "intermediate_size"},
        {"num_hidden_layers", "100000", QV_ERR_FORMAT, "num_hidden_layers is 100000"},
        {"num_hidden_layers", "0", QV_ERR_FORMAT, "num_hidden_layers"},
        {"layer_types", "[\"full_attention\"]", QV_ERR_FORMAT, "layer_types"},
        {"layer_types", "[1, 2, 3, 4, 5, 6, 7, 8]", QV_ERR_UNSUPPORTED, "layer_types[0]"},
        {"layer_types",
         "[\"mamba\", \"sliding_attention\", \"mamba\", \"mamba\", \"mamba\", \"mamba\", \"mamba\","
         " \"mamba\"]",
         QV_ERR_UNSUPPORTED, "layer_types[1] is \"sliding_attention\""},
        {"full_attention_interval", "0", QV_ERR_FORMAT, "full_attention_interval"},
        {"num_attention_heads", "3", QV_ERR_FORMAT, "num_attention_heads 3"},
        {"linear_num_value_heads", "5", QV_ERR_FORMAT, "linear_num_value_heads 5"},
        {"head_dim", "100000", QV_ERR_FORMAT, "head_dim"},
        {"linear_conv_kernel_dim", "1", QV_ERR_FORMAT, "linear_conv_kernel_dim"},
        {"rms_norm_eps", "0", QV_ERR_FORMAT, "rms_norm_eps"},
        {"hidden_act", "\"gelu\"", QV_ERR_UNSUPPORTED, "hidden_act is \"gelu\""},
        {"attention_bias", "true", QV_ERR_UNSUPPORTED, "attention_bias is true"},
        {"attn_output_gate", "false", QV_ERR_UNSUPPORTED, "attn_output_gate is false"},
        {"output_gate_type", "\"sigmoid\"", QV_ERR_UNSUPPORTED, "output_gate_type"},
        {"mlp_only_layers", "[3]", QV_ERR_UNSUPPORTED, "mlp_only_layers is [3]"},
        {"sliding_window", "4096", QV_ERR_UNSUPPORTED, "sliding_window is 4096"},
        {"quantization_config", "{\"quant_method\": \"fp8\"}", QV_ERR_UNSUPPORTED, "\"fp8\""},
        {"rope_parameters", NULL, QV_ERR_FORMAT, "rope_theta"},
        {"rope_parameters", "7", QV_ERR_FORMAT, "rope_parameters"},
        {"rope_parameters.rope_type", "\"yarn\"", QV_ERR_UNSUPPORTED, "\"yarn\""},
        {"rope_parameters.type", "\"linear\"", QV_ERR_UNSUPPORTED, "\"linear\""},
        {"rope_parameters.factor", "4.0", QV_ERR_UNSUPPORTED, "rope_parameters.factor"},
        {"rope_parameters.rope_theta", "-1", QV_ERR_FORMAT, "rope_theta"},
        {"rope_parameters.partial_rotary_factor", "0.2", QV_ERR_FORMAT, "partial_rotary_factor"},
        {"rope_parameters.partial_rotary_factor", "2", QV_ERR_FORMAT, "partial_rotary_factor"},
        {"dtype", "\"int8\"", QV_ERR_UNSUPPORTED, "\"int8\""},
        {"eos_token_id", "100", QV_ERR_FORMAT, "eos_token_id 100"},
        {"eos_token_id", "\"</s>\"", QV_ERR_FORMAT, "eos_token_id"},
        {"eos_token_id", "[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]", QV_ERR_LIMIT,
         "eos_token_id"},
        {"tie_word_embeddings", "\"yes\"", QV_ERR_FORMAT, "tie_word_embeddings"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *text = edited(rows[i].key, rows[i].value);
        qv_model_config config;
        cr_expect_eq(parse(text, NULL, &config), rows[i].status, "%s = %s", rows[i].key,
                     rows[i].value);
        cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s = %s says: %s", rows[i].key,
                           rows[i].value, qv_error());
        free(text);
    }
    static const char *const broken[] = {"", "[]", "7", "{\"model_type\"", "{\"a\":1,\"a\":2}"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        qv_model_config config;
        cr_expect_eq(parse(broken[i], NULL, &config), QV_ERR_FORMAT, "%s", broken[i]);
    }
}

/* A row: the model whose config is changed, the field, its value, and what comes of it. */
typedef struct {
    fx_family family;
    const char *key, *value;
    qv_status status;
    const char *says;
} variant;

static void check_variants(const variant *rows, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char *base = fx_family_config(rows[i].family, 50);
        char *text = fx_edit_json(base, rows[i].key, rows[i].value);
        qv_model_config config;
        cr_expect_eq(parse(text, NULL, &config), rows[i].status, "%s: %s = %s: %s",
                     fx_family_name(rows[i].family), rows[i].key, rows[i].value, qv_error());
        if (rows[i].says != NULL)
            cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s = %s says: %s", rows[i].key,
                               rows[i].value, qv_error());
        free(base);
        free(text);
    }
}

Test(config, takes_the_spellings_of_experts_and_nemotron)
{
    static const variant rows[] = {
        {FX_MOE, "mlp_only_layers", "[]", QV_OK, NULL},
        {FX_MOE, "decoder_sparse_step", "1", QV_OK, NULL},
        {FX_MOE, "norm_topk_prob", "true", QV_OK, NULL},
        {FX_MOE, "intermediate_size", "64", QV_OK, NULL},
        {FX_MOE, "mamba_ssm_dtype", "\"float32\"", QV_OK, NULL},
        {FX_NANO, "num_hidden_layers", NULL, QV_OK, NULL},
        {FX_NANO, "layers_block_type",
         "[\"linear_attention\", \"moe\", \"full_attention\", \"mlp\", \"mamba\", \"attention\"]",
         QV_OK, NULL},
        {FX_NANO, "time_step_limit", "[0.0, {\"__float__\": \"Infinity\"}]", QV_OK, NULL},
        {FX_NANO, "time_step_limit", "[0.0, Infinity]", QV_OK, NULL},
        {FX_NANO, "time_step_min", "0.001", QV_OK, NULL},
        {FX_NANO, "rope_theta", "10000", QV_OK, NULL},
        {FX_NANO, "partial_rotary_factor", "1.0", QV_OK, NULL},
        {FX_NANO, "use_conv_bias", "false", QV_OK, NULL},
        {FX_NANO, "n_shared_experts", "0", QV_OK, NULL},
        {FX_NANO, "num_nextn_predict_layers", "1", QV_OK, NULL},
        {FX_NANO, "expand", "7", QV_OK, NULL}, /* heads x head_dim counts, not expand x hidden */
    };
    check_variants(rows, sizeof rows / sizeof *rows);
}

Test(config, reads_the_other_names_of_nemotron_fields)
{
    static const struct {
        const char *key, *other;
    } rows[] = {
        {"n_groups", "mamba_n_groups"},       {"conv_kernel", "mamba_d_conv"},
        {"use_conv_bias", "mamba_conv_bias"}, {"head_dim", "attention_head_dim"},
        {"layer_norm_epsilon", "norm_eps"},
    };
    static const char *const values[] = {"3", "5", "false", "16", "0.01"};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *base = fx_family_config(FX_NANO, 50);
        char *first = fx_edit_json(base, rows[i].key, values[i]);
        char *bare = fx_edit_json(base, rows[i].key, NULL);
        char *second = fx_edit_json(bare, rows[i].other, values[i]);
        qv_model_config a, b;
        cr_assert_eq(parse(first, NULL, &a), QV_OK, "%s", qv_error());
        cr_assert_eq(parse(second, NULL, &b), QV_OK, "%s", qv_error());
        cr_expect_eq(a.ssm_groups, b.ssm_groups, "%s", rows[i].other);
        cr_expect_eq(a.conv_kernel, b.conv_kernel, "%s", rows[i].other);
        cr_expect_eq(a.layer_parts[0], b.layer_parts[0], "%s", rows[i].other);
        cr_expect_eq(a.head_dim, b.head_dim, "%s", rows[i].other);
        cr_expect_eq(a.norm_eps, b.norm_eps, "%s", rows[i].other);
        free(base), free(first), free(bare), free(second);
    }
}

Test(config, never_clamps_the_time_step_by_what_training_started_with)
{
    char *base = fx_family_config(FX_NANO, 50);
    char *text = fx_edit_json(base, "time_step_min", "0.25");
    char *limited = fx_edit_json(base, "time_step_limit", "[0.125, 2.0]");
    qv_model_config config;
    cr_assert_eq(parse(text, NULL, &config), QV_OK, "%s", qv_error());
    cr_expect(config.dt_min == 0 && config.dt_max > 1e300, "%g %g", config.dt_min, config.dt_max);
    cr_assert_eq(parse(limited, NULL, &config), QV_OK, "%s", qv_error());
    cr_expect(config.dt_min == 0.125 && config.dt_max == 2);
    free(base), free(text), free(limited);
}

Test(config, refuses_variants_of_experts_and_nemotron_by_name)
{
    static const variant rows[] = {
        {FX_MOE, "num_experts", NULL, QV_ERR_FORMAT, "num_experts"},
        {FX_MOE, "num_experts", "0", QV_ERR_FORMAT, "num_experts is 0"},
        {FX_MOE, "num_experts_per_tok", "7", QV_ERR_FORMAT, "num_experts_per_tok 7"},
        {FX_MOE, "moe_intermediate_size", NULL, QV_ERR_FORMAT, "moe_intermediate_size"},
        {FX_MOE, "shared_expert_intermediate_size", "0", QV_ERR_FORMAT,
         "shared_expert_intermediate_size is 0"},
        {FX_MOE, "mlp_only_layers", "[1]", QV_ERR_UNSUPPORTED, "mlp_only_layers is [1]"},
        {FX_MOE, "decoder_sparse_step", "2", QV_ERR_FORMAT, "decoder_sparse_step is 2"},
        {FX_MOE, "norm_topk_prob", "false", QV_ERR_UNSUPPORTED, "norm_topk_prob is false"},
        {FX_MOE, "hidden_act", "\"relu\"", QV_ERR_UNSUPPORTED, "hidden_act is \"relu\""},
        {FX_MOE, "attention_bias", "true", QV_ERR_UNSUPPORTED, "attention_bias is true"},
        {FX_MOE, "rope_scaling", "{\"type\": \"yarn\", \"factor\": 4}", QV_ERR_UNSUPPORTED,
         "\"yarn\""},
        {FX_MOE, "quantization_config", "{\"quant_method\": \"modelopt\"}", QV_ERR_UNSUPPORTED,
         "\"modelopt\""},
        {FX_NANO, "model_type", "\"nemotron_h_puzzle\"", QV_ERR_UNSUPPORTED, "nemotron_h_puzzle"},
        {FX_NANO, "block_configs", "[{\"moe_intermediate_size\": 8}]", QV_ERR_UNSUPPORTED,
         "block_configs"},
        {FX_NANO, "hybrid_override_pattern", NULL, QV_ERR_FORMAT, "hybrid_override_pattern"},
        {FX_NANO, "hybrid_override_pattern", "\"\"", QV_ERR_FORMAT, "describes 0 layers"},
        {FX_NANO, "hybrid_override_pattern", "\"ME*-EX\"", QV_ERR_UNSUPPORTED, "'X' for layer 5"},
        {FX_NANO, "hybrid_override_pattern", "\"ME*-E\"", QV_ERR_FORMAT,
         "describes 5 layers, num_hidden_layers says 6"},
        {FX_NANO, "layers_block_type", "\"mamba\"", QV_ERR_FORMAT, "layers_block_type"},
        {FX_SUPER, "layers_block_type", "[\"mamba\", \"sliding\"]", QV_ERR_UNSUPPORTED,
         "layers_block_type[1] is \"sliding\""},
        {FX_SUPER, "layers_block_type", "[\"mamba\", 7]", QV_ERR_UNSUPPORTED,
         "layers_block_type[1]"},
        {FX_NANO, "attention_bias", "true", QV_ERR_UNSUPPORTED, "attention_bias is true"},
        {FX_NANO, "mlp_bias", "true", QV_ERR_UNSUPPORTED, "mlp_bias is true"},
        {FX_NANO, "use_bias", "true", QV_ERR_UNSUPPORTED, "use_bias is true"},
        {FX_NANO, "mamba_proj_bias", "true", QV_ERR_UNSUPPORTED, "mamba_proj_bias is true"},
        {FX_NANO, "residual_in_fp32", "true", QV_ERR_UNSUPPORTED, "residual_in_fp32 is true"},
        {FX_NANO, "mlp_hidden_act", "\"silu\"", QV_ERR_UNSUPPORTED, "mlp_hidden_act is \"silu\""},
        {FX_NANO, "mamba_hidden_act", "\"gelu\"", QV_ERR_UNSUPPORTED,
         "mamba_hidden_act is \"gelu\""},
        {FX_NANO, "sliding_window", "4096", QV_ERR_UNSUPPORTED, "sliding_window is 4096"},
        {FX_NANO, "quantization_config", "{\"quant_method\": \"modelopt\"}", QV_ERR_UNSUPPORTED,
         "\"modelopt\""},
        {FX_NANO, "n_groups", "4", QV_ERR_FORMAT, "mamba_num_heads 6"},
        {FX_NANO, "time_step_limit", "[1, 0]", QV_ERR_FORMAT, "time_step_limit"},
        {FX_NANO, "time_step_limit", "[-1, 1]", QV_ERR_FORMAT, "time_step_limit"},
        {FX_NANO, "time_step_limit", "[0, \"inf\"]", QV_ERR_FORMAT, "time_step_limit"},
        {FX_NANO, "num_key_value_heads", "3", QV_ERR_FORMAT, "num_attention_heads 4"},
        {FX_NANO, "intermediate_size", "[40, 50]", QV_ERR_FORMAT, "intermediate_size"},
        {FX_NANO, "intermediate_size", NULL, QV_ERR_FORMAT, "intermediate_size"},
        {FX_NANO, "routed_scaling_factor", "\"2.5\"", QV_ERR_FORMAT, "routed_scaling_factor"},
        {FX_SUPER, "n_group", "3", QV_ERR_FORMAT, "n_routed_experts 8"},
        {FX_SUPER, "topk_group", "5", QV_ERR_FORMAT, "topk_group 5"},
        {FX_SUPER, "num_experts_per_tok", "5", QV_ERR_FORMAT,
         "num_experts_per_tok 5 cannot be chosen from topk_group 2 of 4 groups of 2 experts"},
        {FX_SUPER, "moe_latent_size", "-1", QV_ERR_FORMAT, "moe_latent_size is -1"},
    };
    check_variants(rows, sizeof rows / sizeof *rows);
}

Test(config, inherits_tying_from_the_top_level)
{
    static const struct {
        const char *top, *inner;
        bool tied;
    } rows[] = {{"", "", false},
                {"\"tie_word_embeddings\": true,", "", true},
                {"\"tie_word_embeddings\": true,", "\"tie_word_embeddings\": null,", true},
                {"\"tie_word_embeddings\": true,", "\"tie_word_embeddings\": false,", false},
                {"", "\"tie_word_embeddings\": true,", true}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *text = NULL;
        cr_assert_gt(asprintf(&text,
                              "{%s \"model_type\": \"qwen3_5\", \"text_config\": {%s"
                              "\"vocab_size\": 100, \"hidden_size\": 32, \"intermediate_size\": 64,"
                              "\"num_hidden_layers\": 4, \"num_attention_heads\": 4,"
                              "\"num_key_value_heads\": 2, \"rope_theta\": 10000}}",
                              rows[i].top, rows[i].inner),
                     0);
        qv_model_config config;
        cr_assert_eq(parse(text, NULL, &config), QV_OK, "%s", qv_error());
        cr_expect_eq(config.tied_head, rows[i].tied, "row %zu", i);
        free(text);
    }
}

Test(config, joins_the_end_tokens_of_both_files)
{
    char *text = edited("eos_token_id", "3");
    qv_model_config config;
    cr_assert_eq(parse(text, "{\"eos_token_id\": [7, 3]}", &config), QV_OK, "%s", qv_error());
    cr_assert_eq(config.n_eos, 2);
    cr_expect(qv_model_config_is_eos(&config, 3) && qv_model_config_is_eos(&config, 7));
    cr_expect_not(qv_model_config_is_eos(&config, 0));
    free(text);
}

Test(config, reads_sampling_defaults_and_bounds_them)
{
    char *text = edited("eos_token_id", "3");
    qv_model_config config;
    cr_assert_eq(parse(text, NULL, &config), QV_OK);
    cr_expect_not(config.generation.given);
    cr_expect_eq(config.generation.temperature, 1.0f);
    cr_expect_eq(config.generation.top_p, 1.0f);
    cr_expect_eq(config.generation.repetition_penalty, 1.0f);
    cr_assert_eq(parse(text,
                       "{\"do_sample\": true, \"temperature\": 0.6, \"top_p\": 0.95,"
                       "\"top_k\": 20, \"pad_token_id\": 9}",
                       &config),
                 QV_OK, "%s", qv_error());
    cr_expect(config.generation.given && config.generation.do_sample);
    cr_expect_eq(config.generation.temperature, 0.6f);
    cr_expect_eq(config.generation.top_p, 0.95f);
    cr_expect_eq(config.generation.top_k, 20);

    static const char *const wrong[] = {
        "[]", "{\"temperature\": -1}", "{\"top_p\": 2}",     "{\"top_k\": 1.5}",
        "7",  "{\"temperature\": []}", "{\"do_sample\": 1}", "{\"repetition_penalty\": 0}"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cr_expect_eq(parse(text, wrong[i], &config), QV_ERR_FORMAT, "%s", wrong[i]);
    free(text);
}

Test(config, loads_a_directory_and_says_which_file_is_missing)
{
    qv_model_config config;
    cr_expect_eq(qv_model_config_load("/nonexistent", &config), QV_ERR_NOT_FOUND);
    cr_expect_not_null(strstr(qv_error(), "/nonexistent/config.json"));
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    cr_assert_eq(qv_model_config_load(dir, &config), QV_OK, "%s", qv_error());
    cr_expect_str_eq(qv_model_config_arch_name(&config), "qwen3_5");
    cr_expect_eq(config.n_layers, 8);
    cr_expect_eq(config.rotary_dim, 16);
    cr_expect(qv_model_config_is_eos(&config, 2));
}
