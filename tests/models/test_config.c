/* config.json and generation_config.json: the released sizes, the spellings, and what is refused.
 */
#include "models/proj.h"
#include "tests/support.h"

#include "common/json.h"
#include "models/arch.h"
#include "models/model_config.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- Released sizes --------------------------------------------------------------------------- */

static const struct {
    const char *name;
    int hidden, layers, n_linear, heads, kv_heads, v_heads, ffn;
    bool tied;
    int64_t params;  /* of the text model, as published */
    int64_t tensors; /* of the text model in the checkpoint */
} released[] = {
    {"0.8B", 1024, 24, 18, 8, 2, 16, 3584, true, 752393024, 320},
    {"2B", 2048, 24, 18, 8, 2, 16, 6144, true, 1881825088, 320},
    {"4B", 2560, 32, 24, 16, 4, 32, 9216, true, 4205751296, 426},
    {"9B", 4096, 32, 24, 16, 4, 32, 12288, false, 8953803264, 427},
    {"27B", 5120, 64, 48, 24, 4, 48, 17408, false, 26895998464, 851},
};

/* The config of a released size, nested as the releases are. The caller frees. */
static char *released_text(size_t i)
{
    char *text = NULL;
    cr_assert_gt(
        asprintf(&text,
                 "{\"model_type\": \"qwen3_5\", \"tie_word_embeddings\": %s,"
                 "\"architectures\": [\"Qwen3_5ForConditionalGeneration\"],"
                 "\"vision_config\": {\"depth\": 12}, \"text_config\": {"
                 "\"model_type\": \"qwen3_5_text\", \"vocab_size\": 248320, \"hidden_size\": %d,"
                 "\"intermediate_size\": %d, \"num_hidden_layers\": %d,"
                 "\"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"head_dim\": 256,"
                 "\"linear_num_key_heads\": 16, \"linear_num_value_heads\": %d,"
                 "\"linear_key_head_dim\": 128, \"linear_value_head_dim\": 128,"
                 "\"linear_conv_kernel_dim\": 4, \"hidden_act\": \"silu\", \"num_experts\": 8,"
                 "\"attention_bias\": false, \"attn_output_gate\": true, \"mlp_only_layers\": [],"
                 "\"mtp_num_hidden_layers\": 1, \"mamba_ssm_dtype\": \"float32\","
                 "\"max_position_embeddings\": 262144, \"eos_token_id\": 248044,"
                 "\"rms_norm_eps\": 1e-6, \"full_attention_interval\": 4,"
                 "\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 10000000,"
                 "\"partial_rotary_factor\": 0.25, \"mrope_section\": [11, 11, 10],"
                 "\"mrope_interleaved\": true}}}",
                 released[i].tied ? "true" : "false", released[i].hidden, released[i].ffn,
                 released[i].layers, released[i].heads, released[i].kv_heads, released[i].v_heads),
        0);
    return text;
}

static qv_status parse(const char *config, const char *generation, qv_model_config *out)
{
    return qv_model_config_parse(config, strlen(config), generation,
                                 generation ? strlen(generation) : 0, "test", out);
}

Test(config, counts_the_parameters_of_every_released_dense_size)
{
    for (size_t i = 0; i < sizeof released / sizeof *released; i++) {
        char *text = released_text(i);
        qv_model_config config;
        cr_assert_eq(parse(text, NULL, &config), QV_OK, "%s: %s", released[i].name, qv_error());
        qv_layout layout;
        cr_assert_eq(qv_layout_init(&layout, &config, 0, 1), QV_OK, "%s", qv_error());
        cr_expect_eq(qv_layout_params(&layout), released[i].params, "%s: %ld parameters",
                     released[i].name, (long)qv_layout_params(&layout));
        cr_expect_eq(qv_layout_tensors(&layout, layout.config->arch->fused_experts),
                     released[i].tensors, "%s: %ld tensors", released[i].name,
                     (long)qv_layout_tensors(&layout, layout.config->arch->fused_experts));
        cr_expect_eq(qv_model_config_count(&config, QV_PART_GDN), released[i].n_linear);
        cr_expect_eq(config.rotary_dim, 64);
        cr_expect_eq(config.tied_head, released[i].tied);
        free(text);
    }
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
