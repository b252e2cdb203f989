/* The released sizes, from the configs in bench/configs alone: parameters, tensors by name and
 * shape, memory. The numbers are those of the releases, not of our tables. */
#include "models/proj.h"
#include "models/state.h"
#include "models/tensor_list.h"
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Bytes and tokens are of BF16 pages, BF16 convolution tails and float32 states. Counts are of the
 * text model, without multi-token prediction and vision. */
static const struct {
    const char *name;
    int64_t params;
    int64_t tensors[2]; /* experts one by one, experts in one tensor */
    int64_t kv_token, state, conv;
    double mtp_millions; /* 0: none */
    int n_attention;
    int attention[16]; /* the layers */
} released[] = {
    {"qwen3.5-0.8b",
     752393024,
     {320, 320},
     12288,
     18 << 20,
     663552,
     20.45,
     6,
     {3, 7, 11, 15, 19, 23}},
    {"qwen3.5-2b",
     1881825088,
     {320, 320},
     12288,
     18 << 20,
     663552,
     60.83,
     6,
     {3, 7, 11, 15, 19, 23}},
    {"qwen3.5-4b",
     4205751296,
     {426, 426},
     32768,
     48 << 20,
     1179648,
     120.6,
     8,
     {3, 7, 11, 15, 19, 23, 27, 31}},
    {"qwen3.5-9b",
     8953803264,
     {427, 427},
     32768,
     48 << 20,
     1179648,
     243.3,
     8,
     {3, 7, 11, 15, 19, 23, 27, 31}},
    {"qwen3.5-27b",
     26895998464,
     {851, 851},
     65536,
     144 << 20,
     2949120,
     424.7,
     16,
     {3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63}},
    {"qwen3.5-35b-a3b",
     34660610688,
     {31333, 693},
     20480,
     60 << 20,
     1474560,
     844.6,
     10,
     {3, 7, 11, 15, 19, 23, 27, 31, 35, 39}},
    {"qwen3.5-122b-a10b",
     122111526912,
     {37599, 831},
     24576,
     144 << 20,
     2654208,
     2524,
     12,
     {3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47}},
    {"qwen3.5-397b-a17b",
     396346350336,
     {93078, 1038},
     30720,
     180 << 20,
     3317760,
     6596,
     15,
     {3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59}},
    {"nemotron3-nano-4b", 3973556832, {263, 263}, 16384, 82575360, 1225728, 0, 4, {12, 17, 24, 32}},
    {"nemotron3-nano-30b-a3b",
     31577940288,
     {6243, 401},
     6144,
     46 << 20,
     847872,
     0,
     6,
     {5, 12, 19, 26, 33, 42}},
    {"nemotron3-super-120b-a12b",
     120668707840,
     {41643, 763},
     8192,
     160 << 20,
     2457600,
     2942.325248,
     8,
     {7, 16, 25, 36, 47, 58, 69, 78}},
    {"nemotron3.5-lightning-30b-a3b",
     31577940288,
     {6243, 401},
     6144,
     46 << 20,
     847872,
     0,
     6,
     {5, 12, 19, 26, 33, 42}},
};

#define N_RELEASED (sizeof released / sizeof *released)

static const char *config_dir(const char *name)
{
    return qv_path(qv_source_dir(), "bench/configs/%s", name);
}

static void open_release(const char *name, qv_model_config *config, qv_layout *layout)
{
    cr_assert_eq(qv_model_config_load(config_dir(name), config), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_layout_init(layout, config, 0, 1), QV_OK, "%s: %s", name, qv_error());
}

Test(released, sizes_have_the_parameters_and_tensors_that_were_published)
{
    for (size_t i = 0; i < N_RELEASED; i++) {
        qv_model_config config;
        qv_layout layout;
        open_release(released[i].name, &config, &layout);
        cr_expect_eq(qv_layout_params(&layout), released[i].params, "%s: %" PRId64 " parameters",
                     released[i].name, qv_layout_params(&layout));
        for (int fused = 0; fused < 2; fused++)
            cr_expect_eq(qv_layout_tensors(&layout, fused), released[i].tensors[fused],
                         "%s: %" PRId64 " tensors, fused %d", released[i].name,
                         qv_layout_tensors(&layout, fused), fused);
    }
}

Test(released, sizes_have_attention_where_it_was_published)
{
    for (size_t i = 0; i < N_RELEASED; i++) {
        qv_model_config config;
        qv_layout layout;
        open_release(released[i].name, &config, &layout);
        int n = 0;
        for (int64_t layer = 0; layer < config.n_layers; layer++) {
            if ((config.layer_parts[layer] & QV_PART_ATTENTION) == 0)
                continue;
            cr_assert_lt(n, released[i].n_attention, "%s", released[i].name);
            cr_expect_eq(layer, released[i].attention[n], "%s: layer %" PRId64, released[i].name,
                         layer);
            n++;
        }
        cr_expect_eq(n, released[i].n_attention, "%s", released[i].name);
    }
}

Test(released, sizes_take_the_memory_that_was_published)
{
    for (size_t i = 0; i < N_RELEASED; i++) {
        qv_model_config config;
        qv_layout layout;
        open_release(released[i].name, &config, &layout);
        uint64_t slot = (uint64_t)(released[i].state + released[i].conv);
        cr_expect_eq(qv_state_page_bytes(&layout, 1, QV_BF16), released[i].kv_token, "%s",
                     released[i].name);
        cr_expect_eq(qv_state_slot_bytes(&layout, QV_BF16), slot, "%s: %" PRIu64 " bytes a state",
                     released[i].name, qv_state_slot_bytes(&layout, QV_BF16));
    }
}

/* The CPU holds pages and convolution tails in float32, matrices as BF16 in whole panels, and a
 * tied embedding twice. */
Test(released, sizes_are_planned_from_a_config_alone)
{
    qv_backend *be = fx_backend();
    for (size_t i = 0; i < N_RELEASED; i++) {
        qv_model_config config;
        qv_layout layout;
        open_release(released[i].name, &config, &layout);
        qv_model_limits limits = fx_limits();
        qv_memory_plan plan;
        cr_assert_eq(qv_model_plan(&config, be, &limits, &plan), QV_OK, "%s", qv_error());
        cr_expect_eq(plan.kv_page, 16 * 2 * released[i].kv_token, "%s", released[i].name);
        cr_expect_eq(plan.kv, 200 * plan.kv_page, "%s", released[i].name);
        cr_expect_eq(plan.state_slot, released[i].state + 2 * released[i].conv, "%s",
                     released[i].name);
        int64_t stored = released[i].params + (config.tied_head ? config.vocab * config.hidden : 0);
        double ratio = (double)plan.weights / (2.0 * (double)stored);
        cr_expect(ratio >= 1 && ratio < 1.01, "%s: %g of the checkpoint's bytes", released[i].name,
                  ratio);
        cr_expect_eq(plan.total,
                     plan.weights + plan.kv + plan.state + plan.adapters + plan.activations);
    }
    qv_backend_close(be);
}

/* --- Multi-token prediction: what the files hold beside the text model ------------------------ */

typedef struct {
    int64_t params, tensors;
} tally;

static void count_tensor(const char *name, int32_t n_dims, const int64_t *shape, void *user)
{
    (void)name;
    tally *t = user;
    int64_t n = 1;
    for (int32_t i = 0; i < n_dims; i++)
        n *= shape[i];
    t->params += n;
    t->tensors++;
}

/* A layer of attention and one of experts, two projections of the stream into one, three norms; on
 * Qwen3.5 one layer has both. */
static tally count_mtp(const qv_layout *layout, int64_t attention, int64_t experts)
{
    int64_t hidden = layout->config->hidden;
    tally t = {.params = 2 * hidden * hidden + 3 * hidden, .tensors = 4};
    bool fused = experts < 0;
    qv_layout_list(layout, "mtp.", attention, fused, count_tensor, &t);
    if (experts >= 0)
        qv_layout_list(layout, "mtp.", experts, fused, count_tensor, &t);
    return t;
}

Test(released, sizes_make_up_the_whole_files_with_their_other_parts)
{
    for (size_t i = 0; i < N_RELEASED; i++) {
        qv_model_config config;
        qv_layout layout;
        if (released[i].mtp_millions == 0)
            continue;
        open_release(released[i].name, &config, &layout);
        bool nemotron = released[i].name[0] == 'n';
        tally t = count_mtp(&layout, released[i].attention[0], nemotron ? 1 : -1);
        double off = (double)t.params / 1e6 / released[i].mtp_millions - 1;
        cr_expect(off < 1e-3 && off > -1e-3, "%s: %" PRId64, released[i].name, t.params);
        if (nemotron) {
            /* Super to the byte: all BF16 but the 41 correction biases in float32. */
            int64_t params = qv_layout_params(&layout) + t.params;
            int64_t tensors = qv_layout_tensors(&layout, false) + t.tensors;
            cr_expect_eq(t.params, 2942325248);
            cr_expect_eq(params, 123611033088);
            cr_expect_eq(tensors, 42683);
            cr_expect_eq(2 * params + 2 * 41 * config.n_experts, 247222108160);
        }
    }
    /* Files of the nested releases: text, prediction, vision. */
    static const struct {
        const char *name;
        int64_t visual, total;
    } files[] = {
        {"qwen3.5-0.8b", 153, 488},     {"qwen3.5-4b", 297, 738},
        {"qwen3.5-9b", 333, 775},       {"qwen3.5-27b", 333, 1199},
        {"qwen3.5-35b-a3b", 333, 1045}, {"qwen3.5-122b-a10b", 333, 1183},
    };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        qv_model_config config;
        qv_layout layout;
        open_release(files[i].name, &config, &layout);
        int64_t n = qv_layout_tensors(&layout, true) + count_mtp(&layout, 3, -1).tensors;
        cr_expect_eq(n + files[i].visual, files[i].total, "%s: %" PRId64, files[i].name, n);
    }
}

/* --- Names and shapes ------------------------------------------------------------------------- */

/* The lines of one listing, to be compared as a set. */
typedef struct {
    char lines[64][128];
    int n;
    int64_t n_experts;
} listing;

static void add_line(const char *name, int32_t n_dims, const int64_t *shape, void *user)
{
    listing *l = user;
    const char *expert = strstr(name, ".experts.");
    int64_t number;
    /* Of experts one by one, the first and the last stand for all. */
    if (expert != NULL && sscanf(expert, ".experts.%" SCNd64, &number) == 1 && number > 0 &&
        number < l->n_experts - 1)
        return;
    cr_assert_lt(l->n, 64);
    char *line = l->lines[l->n++];
    int used = snprintf(line, 128, "%s", name);
    for (int32_t i = 0; i < n_dims; i++)
        used += snprintf(line + used, 128 - (size_t)used, " %" PRId64, shape[i]);
}

static int by_text(const void *a, const void *b)
{
    return strcmp(a, b);
}

static const struct {
    const char *model;
    int layer;
    bool fused;
    const char *prefix;
    const char *lines[40];
} listings[] = {
    {"qwen3.5-0.8b",
     -1,
     true,
     "model.language_model.",
     {"model.language_model.embed_tokens.weight 248320 1024",
      "model.language_model.norm.weight 1024"}},
    {"qwen3.5-9b",
     -1,
     true,
     "model.",
     {"model.embed_tokens.weight 248320 4096", "model.norm.weight 4096",
      "lm_head.weight 248320 4096"}},
    {"qwen3.5-4b",
     0,
     true,
     "model.language_model.",
     {"model.language_model.layers.0.input_layernorm.weight 2560",
      "model.language_model.layers.0.post_attention_layernorm.weight 2560",
      "model.language_model.layers.0.linear_attn.in_proj_qkv.weight 8192 2560",
      "model.language_model.layers.0.linear_attn.in_proj_z.weight 4096 2560",
      "model.language_model.layers.0.linear_attn.in_proj_b.weight 32 2560",
      "model.language_model.layers.0.linear_attn.in_proj_a.weight 32 2560",
      "model.language_model.layers.0.linear_attn.conv1d.weight 8192 1 4",
      "model.language_model.layers.0.linear_attn.A_log 32",
      "model.language_model.layers.0.linear_attn.dt_bias 32",
      "model.language_model.layers.0.linear_attn.norm.weight 128",
      "model.language_model.layers.0.linear_attn.out_proj.weight 2560 4096",
      "model.language_model.layers.0.mlp.gate_proj.weight 9216 2560",
      "model.language_model.layers.0.mlp.up_proj.weight 9216 2560",
      "model.language_model.layers.0.mlp.down_proj.weight 2560 9216"}},
    {"qwen3.5-4b",
     31,
     true,
     "model.",
     {"model.layers.31.input_layernorm.weight 2560",
      "model.layers.31.post_attention_layernorm.weight 2560",
      "model.layers.31.self_attn.q_proj.weight 8192 2560",
      "model.layers.31.self_attn.k_proj.weight 1024 2560",
      "model.layers.31.self_attn.v_proj.weight 1024 2560",
      "model.layers.31.self_attn.o_proj.weight 2560 4096",
      "model.layers.31.self_attn.q_norm.weight 256", "model.layers.31.self_attn.k_norm.weight 256",
      "model.layers.31.mlp.gate_proj.weight 9216 2560",
      "model.layers.31.mlp.up_proj.weight 9216 2560",
      "model.layers.31.mlp.down_proj.weight 2560 9216"}},
    {"qwen3.5-35b-a3b",
     2,
     true,
     "model.language_model.",
     {"model.language_model.layers.2.input_layernorm.weight 2048",
      "model.language_model.layers.2.post_attention_layernorm.weight 2048",
      "model.language_model.layers.2.linear_attn.in_proj_qkv.weight 8192 2048",
      "model.language_model.layers.2.linear_attn.in_proj_z.weight 4096 2048",
      "model.language_model.layers.2.linear_attn.in_proj_b.weight 32 2048",
      "model.language_model.layers.2.linear_attn.in_proj_a.weight 32 2048",
      "model.language_model.layers.2.linear_attn.conv1d.weight 8192 1 4",
      "model.language_model.layers.2.linear_attn.A_log 32",
      "model.language_model.layers.2.linear_attn.dt_bias 32",
      "model.language_model.layers.2.linear_attn.norm.weight 128",
      "model.language_model.layers.2.linear_attn.out_proj.weight 2048 4096",
      "model.language_model.layers.2.mlp.gate.weight 256 2048",
      "model.language_model.layers.2.mlp.experts.gate_up_proj 256 1024 2048",
      "model.language_model.layers.2.mlp.experts.down_proj 256 2048 512",
      "model.language_model.layers.2.mlp.shared_expert.gate_proj.weight 512 2048",
      "model.language_model.layers.2.mlp.shared_expert.up_proj.weight 512 2048",
      "model.language_model.layers.2.mlp.shared_expert.down_proj.weight 2048 512",
      "model.language_model.layers.2.mlp.shared_expert_gate.weight 1 2048"}},
    {"qwen3.5-35b-a3b",
     3,
     false,
     "model.",
     {"model.layers.3.input_layernorm.weight 2048",
      "model.layers.3.post_attention_layernorm.weight 2048",
      "model.layers.3.self_attn.q_proj.weight 8192 2048",
      "model.layers.3.self_attn.k_proj.weight 512 2048",
      "model.layers.3.self_attn.v_proj.weight 512 2048",
      "model.layers.3.self_attn.o_proj.weight 2048 4096",
      "model.layers.3.self_attn.q_norm.weight 256", "model.layers.3.self_attn.k_norm.weight 256",
      "model.layers.3.mlp.gate.weight 256 2048",
      "model.layers.3.mlp.experts.0.gate_proj.weight 512 2048",
      "model.layers.3.mlp.experts.0.up_proj.weight 512 2048",
      "model.layers.3.mlp.experts.0.down_proj.weight 2048 512",
      "model.layers.3.mlp.experts.255.gate_proj.weight 512 2048",
      "model.layers.3.mlp.experts.255.up_proj.weight 512 2048",
      "model.layers.3.mlp.experts.255.down_proj.weight 2048 512",
      "model.layers.3.mlp.shared_expert.gate_proj.weight 512 2048",
      "model.layers.3.mlp.shared_expert.up_proj.weight 512 2048",
      "model.layers.3.mlp.shared_expert.down_proj.weight 2048 512",
      "model.layers.3.mlp.shared_expert_gate.weight 1 2048"}},
    {"nemotron3-super-120b-a12b",
     -1,
     false,
     "backbone.",
     {"backbone.embeddings.weight 131072 4096", "backbone.norm_f.weight 4096",
      "lm_head.weight 131072 4096"}},
    {"nemotron3-super-120b-a12b",
     0,
     false,
     "backbone.",
     {"backbone.layers.0.norm.weight 4096", "backbone.layers.0.mixer.in_proj.weight 18560 4096",
      "backbone.layers.0.mixer.conv1d.weight 10240 1 4",
      "backbone.layers.0.mixer.conv1d.bias 10240", "backbone.layers.0.mixer.A_log 128",
      "backbone.layers.0.mixer.D 128", "backbone.layers.0.mixer.dt_bias 128",
      "backbone.layers.0.mixer.norm.weight 8192",
      "backbone.layers.0.mixer.out_proj.weight 4096 8192"}},
    {"nemotron3-super-120b-a12b",
     7,
     false,
     "backbone.",
     {"backbone.layers.7.norm.weight 4096", "backbone.layers.7.mixer.q_proj.weight 4096 4096",
      "backbone.layers.7.mixer.k_proj.weight 256 4096",
      "backbone.layers.7.mixer.v_proj.weight 256 4096",
      "backbone.layers.7.mixer.o_proj.weight 4096 4096"}},
    {"nemotron3-super-120b-a12b",
     1,
     false,
     "backbone.",
     {"backbone.layers.1.norm.weight 4096", "backbone.layers.1.mixer.gate.weight 512 4096",
      "backbone.layers.1.mixer.gate.e_score_correction_bias 512",
      "backbone.layers.1.mixer.experts.0.up_proj.weight 2688 1024",
      "backbone.layers.1.mixer.experts.0.down_proj.weight 1024 2688",
      "backbone.layers.1.mixer.experts.511.up_proj.weight 2688 1024",
      "backbone.layers.1.mixer.experts.511.down_proj.weight 1024 2688",
      "backbone.layers.1.mixer.shared_experts.up_proj.weight 5376 4096",
      "backbone.layers.1.mixer.shared_experts.down_proj.weight 4096 5376",
      "backbone.layers.1.mixer.fc1_latent_proj.weight 1024 4096",
      "backbone.layers.1.mixer.fc2_latent_proj.weight 4096 1024"}},
    {"nemotron3-nano-30b-a3b",
     0,
     false,
     "backbone.",
     {"backbone.layers.0.norm.weight 2688", "backbone.layers.0.mixer.in_proj.weight 10304 2688",
      "backbone.layers.0.mixer.conv1d.weight 6144 1 4", "backbone.layers.0.mixer.conv1d.bias 6144",
      "backbone.layers.0.mixer.A_log 64", "backbone.layers.0.mixer.D 64",
      "backbone.layers.0.mixer.dt_bias 64", "backbone.layers.0.mixer.norm.weight 4096",
      "backbone.layers.0.mixer.out_proj.weight 2688 4096"}},
    {"nemotron3-nano-30b-a3b",
     51,
     true,
     "model.",
     {"model.layers.51.norm.weight 2688", "model.layers.51.mixer.gate.weight 128 2688",
      "model.layers.51.mixer.gate.e_score_correction_bias 128",
      "model.layers.51.mixer.experts.up_proj 128 1856 2688",
      "model.layers.51.mixer.experts.down_proj 128 2688 1856",
      "model.layers.51.mixer.shared_experts.up_proj.weight 3712 2688",
      "model.layers.51.mixer.shared_experts.down_proj.weight 2688 3712"}},
    {"nemotron3-nano-4b",
     0,
     false,
     "backbone.",
     {"backbone.layers.0.norm.weight 3136", "backbone.layers.0.mixer.in_proj.weight 17504 3136",
      "backbone.layers.0.mixer.conv1d.weight 9728 1 4", "backbone.layers.0.mixer.conv1d.bias 9728",
      "backbone.layers.0.mixer.A_log 96", "backbone.layers.0.mixer.D 96",
      "backbone.layers.0.mixer.dt_bias 96", "backbone.layers.0.mixer.norm.weight 7680",
      "backbone.layers.0.mixer.out_proj.weight 3136 7680"}},
    {"nemotron3-nano-4b",
     1,
     false,
     "backbone.",
     {"backbone.layers.1.norm.weight 3136", "backbone.layers.1.mixer.up_proj.weight 12544 3136",
      "backbone.layers.1.mixer.down_proj.weight 3136 12544"}},
    {"nemotron3-nano-4b",
     12,
     false,
     "backbone.",
     {"backbone.layers.12.norm.weight 3136", "backbone.layers.12.mixer.q_proj.weight 5120 3136",
      "backbone.layers.12.mixer.k_proj.weight 1024 3136",
      "backbone.layers.12.mixer.v_proj.weight 1024 3136",
      "backbone.layers.12.mixer.o_proj.weight 3136 5120"}},
};

Test(released, layers_of_every_kind_have_exactly_the_published_tensors)
{
    for (size_t i = 0; i < sizeof listings / sizeof *listings; i++) {
        qv_model_config config;
        qv_layout layout;
        open_release(listings[i].model, &config, &layout);
        listing got = {.n_experts = config.n_experts}, want = {.n = 0};
        qv_layout_list(&layout, listings[i].prefix, listings[i].layer, listings[i].fused, add_line,
                       &got);
        while (want.n < 40 && listings[i].lines[want.n] != NULL) {
            snprintf(want.lines[want.n], sizeof *want.lines, "%s", listings[i].lines[want.n]);
            want.n++;
        }
        qsort(got.lines, (size_t)got.n, sizeof *got.lines, by_text);
        qsort(want.lines, (size_t)want.n, sizeof *want.lines, by_text);
        cr_expect_eq(got.n, want.n, "%s layer %d: %d tensors, not %d", listings[i].model,
                     listings[i].layer, got.n, want.n);
        for (int k = 0; k < got.n && k < want.n; k++)
            cr_expect_str_eq(got.lines[k], want.lines[k], "%s layer %d: %s, not %s",
                             listings[i].model, listings[i].layer, got.lines[k], want.lines[k]);
    }
}
