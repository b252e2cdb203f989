#include "tests/models/fixtures.h"

#include "common/json.h"

#include <dirent.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(expr)                                                                                 \
    do {                                                                                           \
        if ((expr) != QV_OK) {                                                                     \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, qv_error());                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* --- Files ------------------------------------------------------------------------------------ */

static int64_t count(int n_dims, const int64_t *shape)
{
    int64_t n = 1;
    for (int i = 0; i < n_dims; i++)
        n *= shape[i];
    return n;
}

void fx_add(fx_file *file, const char *name, qv_dtype dtype, int n_dims, const int64_t *shape,
            const float *values)
{
    QV_ASSERT(file->n < (int)(sizeof file->tensors / sizeof *file->tensors));
    int64_t n = count(n_dims, shape);
    fx_tensor *tensor = &file->tensors[file->n++];
    *tensor = (fx_tensor){.name = strdup(name), .dtype = dtype, .n_dims = n_dims};
    memcpy(tensor->shape, shape, (size_t)n_dims * sizeof *shape);
    tensor->data = malloc((size_t)n * qv_dtype_size(dtype) + 1);
    if (qv_dtype_is_float(dtype))
        MUST(qv_dtype_from_f32(dtype, values, tensor->data, n));
    else
        memset(tensor->data, 0, (size_t)n * qv_dtype_size(dtype));
}

void fx_add_random(fx_file *file, const char *name, qv_dtype dtype, int n_dims,
                   const int64_t *shape, qv_rng *rng, float scale)
{
    int64_t n = count(n_dims, shape);
    float *values = malloc((size_t)(n + 1) * sizeof *values);
    qv_fill_normal(rng, values, n, scale);
    fx_add(file, name, dtype, n_dims, shape, values);
    free(values);
}

fx_tensor *fx_find(fx_file *file, const char *name)
{
    for (int i = 0; i < file->n; i++) {
        if (strcmp(file->tensors[i].name, name) == 0)
            return &file->tensors[i];
    }
    fprintf(stderr, "fixtures: no tensor %s\n", name);
    abort();
}

static void free_tensor(fx_tensor *tensor)
{
    free((char *)tensor->name);
    free(tensor->data);
}

void fx_remove(fx_file *file, const char *name)
{
    fx_tensor *tensor = fx_find(file, name);
    free_tensor(tensor);
    *tensor = file->tensors[--file->n];
}

void fx_free(fx_file *file)
{
    for (int i = 0; i < file->n; i++)
        free_tensor(&file->tensors[i]);
    file->n = 0;
}

uint8_t *fx_bytes(const fx_file *file, size_t *size)
{
    json_t *header = json_object();
    int64_t offset = 0;
    for (int i = 0; i < file->n; i++) {
        const fx_tensor *t = &file->tensors[i];
        int64_t bytes = count(t->n_dims, t->shape) * (int64_t)qv_dtype_size(t->dtype);
        json_t *shape = json_array();
        for (int d = 0; d < t->n_dims; d++)
            json_array_append_new(shape, json_integer(t->shape[d]));
        json_object_set_new(header, t->name,
                            json_pack("{s:s, s:o, s:[I, I]}", "dtype", qv_dtype_name(t->dtype),
                                      "shape", shape, "data_offsets", (json_int_t)offset,
                                      (json_int_t)(offset + bytes)));
        offset += bytes;
    }
    char *text = json_dumps(header, JSON_COMPACT);
    uint64_t length = strlen(text);
    *size = 8 + length + (size_t)offset;
    uint8_t *out = malloc(*size);
    memcpy(out, &length, 8);
    memcpy(out + 8, text, length);
    uint8_t *data = out + 8 + length;
    for (int i = 0; i < file->n; i++) {
        const fx_tensor *t = &file->tensors[i];
        size_t bytes = (size_t)count(t->n_dims, t->shape) * qv_dtype_size(t->dtype);
        memcpy(data, t->data, bytes);
        data += bytes;
    }
    free(text);
    json_decref(header);
    return out;
}

void fx_write(const fx_file *file, const char *path)
{
    size_t size;
    uint8_t *bytes = fx_bytes(file, &size);
    qv_write_file(path, bytes, size);
    free(bytes);
}

void fx_copy(fx_file *file, const qv_safetensors *st)
{
    for (size_t i = 0; i < qv_safetensors_count(st); i++) {
        const qv_stored_tensor *t = qv_safetensors_at(st, i);
        float *values = malloc((size_t)(t->n_elems + 1) * sizeof *values);
        MUST(qv_stored_tensor_f32(t, 0, t->n_elems, values));
        fx_add(file, t->name, t->dtype, t->n_dims, t->shape, values);
        free(values);
    }
}

/* --- Models ----------------------------------------------------------------------------------- */

#define HIDDEN 24
#define VOCAB  50
#define FFN    40

const char *fx_config_text(bool tied)
{
#define CONFIG(tied)                                                                               \
    "{\"model_type\": \"qwen3_5_text\", \"vocab_size\": 50, \"hidden_size\": 24,"                  \
    " \"intermediate_size\": 40, \"num_hidden_layers\": 3, \"num_attention_heads\": 4,"            \
    " \"num_key_value_heads\": 2, \"head_dim\": 12, \"linear_num_key_heads\": 2,"                  \
    " \"linear_num_value_heads\": 6, \"linear_key_head_dim\": 8, \"linear_value_head_dim\": 10,"   \
    " \"linear_conv_kernel_dim\": 4, \"max_position_embeddings\": 512,"                            \
    " \"layer_types\": [\"linear_attention\", \"full_attention\", \"linear_attention\"],"          \
    " \"rope_parameters\": {\"rope_theta\": 10000, \"partial_rotary_factor\": 0.5},"               \
    " \"eos_token_id\": 2, \"tie_word_embeddings\": " tied "}"
    return tied ? CONFIG("true") : CONFIG("false");
#undef CONFIG
}

static void add_layer(fx_file *file, const char *prefix, int layer, const char *name,
                      qv_dtype dtype, int64_t rows, int64_t cols, qv_rng *rng, float scale)
{
    char full[160];
    snprintf(full, sizeof full, "%slayers.%d.%s", prefix, layer, name);
    fx_add_random(file, full, dtype, cols ? 2 : 1, (int64_t[]){rows, cols}, rng, scale);
}

/* Sizes are written out here, not derived, so that the tables are tested against them. */
void fx_random_model(fx_file *file, const char *prefix, bool tied, qv_dtype dtype, uint64_t seed)
{
    qv_rng rng = qv_rng_seed(seed);
    char name[160];
    snprintf(name, sizeof name, "%sembed_tokens.weight", prefix);
    fx_add_random(file, name, dtype, 2, (int64_t[]){VOCAB, HIDDEN}, &rng, 1);
    snprintf(name, sizeof name, "%snorm.weight", prefix);
    fx_add_random(file, name, dtype, 1, (int64_t[]){HIDDEN}, &rng, 0.2f);
    if (!tied)
        fx_add_random(file, "lm_head.weight", dtype, 2, (int64_t[]){VOCAB, HIDDEN}, &rng, 0.3f);
    for (int i = 0; i < 3; i++) {
#define ADD(name, rows, cols, scale)                                                               \
    add_layer(file, prefix, i, name, dtype, rows, cols, &rng, scale)
        ADD("input_layernorm.weight", HIDDEN, 0, 0.2f);
        ADD("post_attention_layernorm.weight", HIDDEN, 0, 0.2f);
        ADD("mlp.gate_proj.weight", FFN, HIDDEN, 0.2f);
        ADD("mlp.up_proj.weight", FFN, HIDDEN, 0.2f);
        ADD("mlp.down_proj.weight", HIDDEN, FFN, 0.2f);
        if (i == 1) {
            ADD("self_attn.q_proj.weight", 96, HIDDEN, 0.2f);
            ADD("self_attn.k_proj.weight", 24, HIDDEN, 0.2f);
            ADD("self_attn.v_proj.weight", 24, HIDDEN, 0.2f);
            ADD("self_attn.o_proj.weight", HIDDEN, 48, 0.2f);
            ADD("self_attn.q_norm.weight", 12, 0, 0.2f);
            ADD("self_attn.k_norm.weight", 12, 0, 0.2f);
            continue;
        }
        ADD("linear_attn.in_proj_qkv.weight", 92, HIDDEN, 0.2f);
        ADD("linear_attn.in_proj_z.weight", 60, HIDDEN, 0.2f);
        ADD("linear_attn.in_proj_b.weight", 6, HIDDEN, 0.2f);
        ADD("linear_attn.in_proj_a.weight", 6, HIDDEN, 0.2f);
        ADD("linear_attn.out_proj.weight", HIDDEN, 60, 0.2f);
        ADD("linear_attn.A_log", 6, 0, 0.5f);
        ADD("linear_attn.dt_bias", 6, 0, 0.5f);
        ADD("linear_attn.norm.weight", 10, 0, 0.5f);
#undef ADD
        snprintf(name, sizeof name, "%slayers.%d.linear_attn.conv1d.weight", prefix, i);
        fx_add_random(file, name, dtype, 3, (int64_t[]){92, 1, 4}, &rng, 0.3f);
    }
}

fx_moe fx_moe_model(fx_moe_kind kind)
{
#define COMMON                                                                                     \
    "\"vocab_size\": 50, \"hidden_size\": 24, \"num_attention_heads\": 4,"                         \
    " \"num_key_value_heads\": 2, \"head_dim\": 12, \"max_position_embeddings\": 512,"             \
    " \"eos_token_id\": 2, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 10, "
    static const fx_moe models[] = {
        {.config = "{\"model_type\": \"qwen3_5_moe_text\", " COMMON
                   "\"num_hidden_layers\": 2, \"linear_num_key_heads\": 2,"
                   " \"linear_num_value_heads\": 6, \"linear_key_head_dim\": 8,"
                   " \"linear_value_head_dim\": 10, \"linear_conv_kernel_dim\": 4,"
                   " \"layer_types\": [\"linear_attention\", \"full_attention\"],"
                   " \"rope_parameters\": {\"rope_theta\": 10000, \"partial_rotary_factor\": 0.5},"
                   " \"num_experts\": 5, \"shared_expert_intermediate_size\": 14}",
         .prefix = "model.",
         .experts = "mlp.experts",
         .n_experts = 5,
         .n_in = 24,
         .n_ffn = 10,
         .gated = true,
         .layers = {0, 1}},
        {.config = "{\"model_type\": \"nemotron_h\", " COMMON
                   "\"hybrid_override_pattern\": \"ME*E-\", \"intermediate_size\": 20,"
                   " \"mamba_num_heads\": 6, \"mamba_head_dim\": 4, \"ssm_state_size\": 8,"
                   " \"n_groups\": 2, \"conv_kernel\": 4, \"n_routed_experts\": 6,"
                   " \"moe_latent_size\": 16, \"moe_shared_expert_intermediate_size\": 14,"
                   " \"routed_scaling_factor\": 2.5}",
         .prefix = "backbone.",
         .experts = "mixer.experts",
         .n_experts = 6,
         .n_in = 16,
         .n_ffn = 10,
         .layers = {1, 3}},
    };
#undef COMMON
    return models[kind];
}

typedef struct {
    const char *name;
    int64_t rows, cols;
    float scale;
} moe_tensor;

static void add_tensors(fx_file *file, const char *prefix, int layer, qv_dtype dtype,
                        const moe_tensor *tensors, size_t n, qv_rng *rng)
{
    for (size_t i = 0; i < n; i++)
        add_layer(file, prefix, layer, tensors[i].name, dtype, tensors[i].rows, tensors[i].cols,
                  rng, tensors[i].scale);
}

static void add_cube(fx_file *file, const char *prefix, int layer, const char *name, qv_dtype dtype,
                     const int64_t *shape, qv_rng *rng)
{
    char full[160];
    snprintf(full, sizeof full, "%slayers.%d.%s", prefix, layer, name);
    fx_add_random(file, full, dtype, 3, shape, rng, 0.3f);
}

static void add_qwen_moe(fx_file *file, qv_dtype dtype, qv_rng *rng)
{
    static const moe_tensor linear[] = {
        {"linear_attn.in_proj_qkv.weight", 92, HIDDEN, 0.2f},
        {"linear_attn.in_proj_z.weight", 60, HIDDEN, 0.2f},
        {"linear_attn.in_proj_b.weight", 6, HIDDEN, 0.2f},
        {"linear_attn.in_proj_a.weight", 6, HIDDEN, 0.2f},
        {"linear_attn.out_proj.weight", HIDDEN, 60, 0.2f},
        {"linear_attn.A_log", 6, 0, 0.5f},
        {"linear_attn.dt_bias", 6, 0, 0.5f},
        {"linear_attn.norm.weight", 10, 0, 0.5f},
    };
    static const moe_tensor full[] = {
        {"self_attn.q_proj.weight", 96, HIDDEN, 0.2f},
        {"self_attn.k_proj.weight", 24, HIDDEN, 0.2f},
        {"self_attn.v_proj.weight", 24, HIDDEN, 0.2f},
        {"self_attn.o_proj.weight", HIDDEN, 48, 0.2f},
        {"self_attn.q_norm.weight", 12, 0, 0.2f},
        {"self_attn.k_norm.weight", 12, 0, 0.2f},
    };
    static const moe_tensor every[] = {
        {"input_layernorm.weight", HIDDEN, 0, 0.2f},
        {"post_attention_layernorm.weight", HIDDEN, 0, 0.2f},
        {"mlp.gate.weight", 5, HIDDEN, 0.5f},
        {"mlp.shared_expert.gate_proj.weight", 14, HIDDEN, 0.2f},
        {"mlp.shared_expert.up_proj.weight", 14, HIDDEN, 0.2f},
        {"mlp.shared_expert.down_proj.weight", HIDDEN, 14, 0.2f},
        {"mlp.shared_expert_gate.weight", 1, HIDDEN, 0.2f},
    };
    add_tensors(file, "model.", 0, dtype, linear, sizeof linear / sizeof *linear, rng);
    add_cube(file, "model.", 0, "linear_attn.conv1d.weight", dtype, (int64_t[]){92, 1, 4}, rng);
    add_tensors(file, "model.", 1, dtype, full, sizeof full / sizeof *full, rng);
    for (int i = 0; i < 2; i++) {
        add_tensors(file, "model.", i, dtype, every, sizeof every / sizeof *every, rng);
        add_cube(file, "model.", i, "mlp.experts.gate_up_proj", dtype, (int64_t[]){5, 20, HIDDEN},
                 rng);
        add_cube(file, "model.", i, "mlp.experts.down_proj", dtype, (int64_t[]){5, HIDDEN, 10},
                 rng);
    }
}

static void add_nemotron(fx_file *file, qv_dtype dtype, qv_rng *rng)
{
    static const moe_tensor ssm[] = {
        {"mixer.in_proj.weight", 86, HIDDEN, 0.2f},
        {"mixer.out_proj.weight", HIDDEN, 24, 0.2f},
        {"mixer.conv1d.bias", 56, 0, 0.2f},
        {"mixer.A_log", 6, 0, 0.5f},
        {"mixer.dt_bias", 6, 0, 0.5f},
        {"mixer.D", 6, 0, 0.5f},
        {"mixer.norm.weight", 24, 0, 0.5f},
    };
    static const moe_tensor attention[] = {
        {"mixer.q_proj.weight", 48, HIDDEN, 0.2f},
        {"mixer.k_proj.weight", 24, HIDDEN, 0.2f},
        {"mixer.v_proj.weight", 24, HIDDEN, 0.2f},
        {"mixer.o_proj.weight", HIDDEN, 48, 0.2f},
    };
    static const moe_tensor moe[] = {
        {"mixer.gate.weight", 6, HIDDEN, 0.5f},
        {"mixer.gate.e_score_correction_bias", 6, 0, 0.1f},
        {"mixer.fc1_latent_proj.weight", 16, HIDDEN, 0.3f},
        {"mixer.fc2_latent_proj.weight", HIDDEN, 16, 0.3f},
        {"mixer.shared_experts.up_proj.weight", 14, HIDDEN, 0.2f},
        {"mixer.shared_experts.down_proj.weight", HIDDEN, 14, 0.2f},
    };
    static const moe_tensor mlp[] = {
        {"mixer.up_proj.weight", 20, HIDDEN, 0.2f},
        {"mixer.down_proj.weight", HIDDEN, 20, 0.2f},
    };
    add_tensors(file, "backbone.", 0, dtype, ssm, sizeof ssm / sizeof *ssm, rng);
    add_cube(file, "backbone.", 0, "mixer.conv1d.weight", dtype, (int64_t[]){56, 1, 4}, rng);
    add_tensors(file, "backbone.", 2, dtype, attention, sizeof attention / sizeof *attention, rng);
    add_tensors(file, "backbone.", 4, dtype, mlp, sizeof mlp / sizeof *mlp, rng);
    for (int i = 1; i <= 3; i += 2) {
        add_tensors(file, "backbone.", i, dtype, moe, sizeof moe / sizeof *moe, rng);
        for (int e = 0; e < 6; e++) {
            char up[64], down[64];
            snprintf(up, sizeof up, "mixer.experts.%d.up_proj.weight", e);
            snprintf(down, sizeof down, "mixer.experts.%d.down_proj.weight", e);
            add_layer(file, "backbone.", i, up, dtype, 10, 16, rng, 0.3f);
            add_layer(file, "backbone.", i, down, dtype, 16, 10, rng, 0.3f);
        }
    }
    for (int i = 0; i < 5; i++)
        add_layer(file, "backbone.", i, "norm.weight", dtype, HIDDEN, 0, rng, 1);
}

void fx_random_moe(fx_file *file, fx_moe_kind kind, qv_dtype dtype, uint64_t seed)
{
    bool qwen = kind == FX_QWEN_MOE;
    qv_rng rng = qv_rng_seed(seed);
    fx_add_random(file, qwen ? "model.embed_tokens.weight" : "backbone.embeddings.weight", dtype, 2,
                  (int64_t[]){VOCAB, HIDDEN}, &rng, 1);
    fx_add_random(file, qwen ? "model.norm.weight" : "backbone.norm_f.weight", dtype, 1,
                  (int64_t[]){HIDDEN}, &rng, qwen ? 0.2f : 1);
    fx_add_random(file, "lm_head.weight", dtype, 2, (int64_t[]){VOCAB, HIDDEN}, &rng, 0.3f);
    if (qwen)
        add_qwen_moe(file, dtype, &rng);
    else
        add_nemotron(file, dtype, &rng);
}

const char *fx_write_model(const char *config, const fx_file *file)
{
    const char *dir = qv_temp_dir();
    qv_write_text(qv_path(dir, "config.json"), config);
    fx_write(file, qv_path(dir, "model.safetensors"));
    return dir;
}

qv_backend *fx_backend(void)
{
    qv_backend *be;
    MUST(qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = 2}, &be));
    return be;
}

qv_model_limits fx_limits(void)
{
    return (qv_model_limits){.max_tokens = 640,
                             .max_seqs = 32,
                             .max_logits = 640,
                             .page_tokens = 16,
                             .n_pages = 200,
                             .n_state_slots = 34,
                             .n_adapter_slots = 6,
                             .max_lora_rank = 16};
}

qv_model *fx_open(qv_backend *be, const char *dir, const qv_model_limits *limits)
{
    qv_model *model;
    MUST(qv_model_open(dir, be, limits, NULL, NULL, &model));
    return model;
}

/* --- Steps ------------------------------------------------------------------------------------ */

#define MAX_STEP  8192
#define MAX_PAGES 64

typedef struct {
    int32_t token[MAX_STEP], pos[MAX_STEP], logit_row[MAX_STEP];
    int32_t seq_start[MAX_STEP], page_table[64 * MAX_PAGES], state_slot[MAX_STEP];
    int32_t seg_start[MAX_STEP], seg_slot[MAX_STEP];
    int32_t logit_seg_start[MAX_STEP], logit_seg_slot[MAX_STEP];
    int32_t out_row[MAX_STEP]; /* where each row of logits goes in the caller's order */
    qv_batch batch;
} step;

static void add_seq(step *s, const fx_seq *seq, int32_t page_tokens, int32_t first_out)
{
    qv_batch *b = &s->batch;
    int32_t q = b->n_seqs++;
    if (b->n_segs == 0 || s->seg_slot[b->n_segs - 1] != seq->adapter) {
        s->seg_start[b->n_segs] = b->n_tokens;
        s->seg_slot[b->n_segs++] = seq->adapter;
    }
    bool new_logit_seg =
        b->n_logit_segs == 0 || s->logit_seg_slot[b->n_logit_segs - 1] != seq->adapter;
    if (seq->logits > 0 && new_logit_seg) {
        s->logit_seg_start[b->n_logit_segs] = b->n_logits;
        s->logit_seg_slot[b->n_logit_segs++] = seq->adapter;
    }
    s->seq_start[q] = b->n_tokens;
    s->state_slot[q] = seq->state_slot;
    int32_t n_pages = (seq->start + seq->n + page_tokens - 1) / page_tokens;
    QV_ASSERT(n_pages <= MAX_PAGES && q < 64);
    memcpy(s->page_table + q * MAX_PAGES, seq->pages, (size_t)n_pages * sizeof(int32_t));
    for (int32_t i = 0; i < seq->n; i++) {
        s->token[b->n_tokens] = seq->tokens[seq->start + i];
        s->pos[b->n_tokens] = seq->start + i;
        if (i >= seq->n - seq->logits) {
            s->out_row[b->n_logits] = first_out + i - (seq->n - seq->logits);
            s->logit_row[b->n_logits++] = b->n_tokens;
        }
        b->n_tokens++;
    }
}

float *fx_step(qv_model *model, const fx_seq *seqs, int n_seqs)
{
    step *s = calloc(1, sizeof *s);
    int32_t page_tokens = qv_model_get_limits(model)->page_tokens;
    for (int adapter = -1; adapter < 64; adapter++) { /* base first, then by slot */
        int32_t first_out = 0;
        for (int i = 0; i < n_seqs; i++) {
            if (seqs[i].adapter == adapter)
                add_seq(s, &seqs[i], page_tokens, first_out);
            first_out += seqs[i].logits;
        }
    }
    qv_batch *b = &s->batch;
    s->seq_start[b->n_seqs] = s->seg_start[b->n_segs] = b->n_tokens;
    s->logit_seg_start[b->n_logit_segs] = b->n_logits;
    b->token = s->token, b->pos = s->pos, b->seq_start = s->seq_start;
    b->page_table = s->page_table, b->page_stride = MAX_PAGES, b->state_slot = s->state_slot;
    b->seg_start = s->seg_start, b->seg_slot = s->seg_slot;
    b->logit_row = s->logit_row, b->logit_seg_start = s->logit_seg_start;
    b->logit_seg_slot = s->logit_seg_slot;

    qv_tensor logits;
    MUST(qv_model_forward(model, b, &logits));
    int64_t vocab = qv_model_get_config(model)->vocab;
    float *out = malloc((size_t)(b->n_logits * vocab + 1) * sizeof *out);
    for (int32_t i = 0; i < b->n_logits; i++)
        MUST(qv_backend_download(qv_model_get_backend(model), out + s->out_row[i] * vocab,
                                 (float *)logits.data + i * logits.stride[0],
                                 (size_t)vocab * sizeof *out));
    free(s);
    return out;
}

float *fx_run(qv_model *model, const int32_t *tokens, int32_t n, int32_t chunk, int32_t adapter,
              int32_t first_page, int32_t state_slot)
{
    int64_t vocab = qv_model_get_config(model)->vocab;
    float *out = malloc((size_t)(n * vocab) * sizeof *out);
    int32_t pages[MAX_PAGES];
    for (int i = 0; i < MAX_PAGES; i++)
        pages[i] = first_page + i;
    for (int32_t start = 0; start < n;) {
        int32_t count_now = chunk == 0 || chunk > n - start ? n - start : chunk;
        fx_seq seq = {.tokens = tokens,
                      .start = start,
                      .n = count_now,
                      .pages = pages,
                      .state_slot = state_slot,
                      .adapter = adapter,
                      .logits = count_now};
        float *rows = fx_step(model, &seq, 1);
        memcpy(out + start * vocab, rows, (size_t)(count_now * vocab) * sizeof *out);
        free(rows);
        start += count_now;
    }
    return out;
}

double fx_logprob(const float *row, int64_t vocab, int32_t token)
{
    double max = row[0], sum = 0;
    for (int64_t i = 1; i < vocab; i++)
        max = row[i] > max ? row[i] : max;
    for (int64_t i = 0; i < vocab; i++)
        sum += exp(row[i] - max);
    return row[token] - max - log(sum);
}

/* --- Golden cases ----------------------------------------------------------------------------- */

static void *copy_tensor(const qv_safetensors *st, const char *name, const char *part, int32_t *n)
{
    char full[64];
    snprintf(full, sizeof full, "%s.%s", name, part);
    const qv_stored_tensor *t = qv_safetensors_find(st, full);
    *n = t ? (int32_t)t->n_elems : 0;
    return t ? memcpy(malloc(t->bytes + 1), t->data, t->bytes) : NULL;
}

fx_case *fx_cases(const char *dir, int *n)
{
    json_t *root;
    qv_safetensors *st;
    MUST(qv_json_load_file(qv_path(dir, "golden.json"), 64 << 20, &root));
    MUST(qv_safetensors_open_file(qv_path(dir, "golden.safetensors"), 0, &st));
    const json_t *list = json_object_get(root, "cases");
    *n = (int)json_array_size(list);
    fx_case *cases = calloc((size_t)*n, sizeof *cases);
    for (int i = 0; i < *n; i++) {
        const json_t *item = json_array_get(list, (size_t)i);
        const char *adapter = json_string_value(json_object_get(item, "adapter"));
        fx_case *c = &cases[i];
        int32_t n_logprobs;
        snprintf(c->name, sizeof c->name, "%s", json_string_value(json_object_get(item, "name")));
        snprintf(c->adapter, sizeof c->adapter, "%s", adapter ? adapter : "");
        c->n_prompt = (int32_t)json_integer_value(json_object_get(item, "prompt_tokens"));
        c->tokens = copy_tensor(st, c->name, "tokens", &c->n);
        c->logprobs = copy_tensor(st, c->name, "logprobs", &n_logprobs);
        c->bf16 = copy_tensor(st, c->name, "logprobs_hf_bf16", &(int32_t){0});
        c->greedy = copy_tensor(st, c->name, "greedy", &c->n_greedy);
        QV_ASSERT(c->tokens != NULL && n_logprobs == c->n - 1);
    }
    qv_safetensors_close(st);
    json_decref(root);
    return cases;
}

void fx_cases_free(fx_case *cases, int n)
{
    for (int i = 0; i < n; i++) {
        free(cases[i].tokens);
        free(cases[i].logprobs);
        free(cases[i].bf16);
        free(cases[i].greedy);
    }
    free(cases);
}

static int by_name(const void *x, const void *y)
{
    return strcmp(x, y);
}

/* Every adapter of the folder into the slot of its index, in the order of names. */
static void install_adapters(fx_golden *g)
{
    DIR *dir = opendir(qv_path(g->dir, "adapters"));
    for (struct dirent *entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
        if (entry->d_name[0] == '.')
            continue;
        QV_ASSERT(g->n_adapters < FX_MAX_ADAPTERS && strlen(entry->d_name) < 32);
        strcpy(g->adapters[g->n_adapters++], entry->d_name);
    }
    closedir(dir);
    qsort(g->adapters, (size_t)g->n_adapters, sizeof *g->adapters, by_name);
    for (int i = 0; i < g->n_adapters; i++) {
        qv_adapter *adapter;
        MUST(qv_adapter_open(g->model, qv_path(g->dir, "adapters/%s", g->adapters[i]), &adapter));
        MUST(qv_model_adapter_install(g->model, i, adapter));
        qv_adapter_close(adapter);
    }
}

bool fx_golden_open(fx_golden *g, const char *name, const qv_backend_options *options)
{
    return fx_golden_open_split(g, name, options, &(fx_split){.n_ranks = 1, .expert_groups = 1});
}

/* The backend of each rank; false when a device is missing. */
static bool open_backends(fx_golden *g, const qv_backend_options *options, const fx_split *split)
{
    for (int32_t r = 0; r < split->n_ranks; r++) {
        qv_backend_options mine = *options;
        mine.device = split->own_devices ? r : 0;
        qv_status status = qv_backend_open(&mine, r == 0 ? &g->be : &g->others[r - 1]);
        if (status != QV_OK && strcmp(options->name, "cuda") == 0)
            return false;
        MUST(status);
        g->n_others += r > 0;
    }
    return true;
}

static void close_backends(fx_golden *g)
{
    for (int32_t i = 0; i < g->n_others; i++)
        qv_backend_close(g->others[i]);
    qv_backend_close(g->be);
}

bool fx_golden_open_split(fx_golden *g, const char *name, const qv_backend_options *options,
                          const fx_split *split)
{
    *g = (fx_golden){.dir = qv_golden_path(name)};
    if (g->dir == NULL)
        return false;
    if (!open_backends(g, options, split)) {
        close_backends(g);
        return false;
    }
    g->cases = fx_cases(g->dir, &g->n);
    qv_model_limits limits = fx_limits();
    limits.max_tokens = limits.max_logits = 8192;
    limits.max_seqs = limits.n_state_slots = g->n;
    limits.n_pages = 40 + g->n * 40;
    limits.n_adapter_slots = FX_MAX_ADAPTERS;
    limits.max_seq_pages = 64;
    limits.max_recorded = 16;
    qv_backend *backends[16] = {g->be};
    memcpy(backends + 1, g->others, sizeof g->others);
    qv_model_ranks ranks = {
        .backends = backends, .n_ranks = split->n_ranks, .expert_groups = split->expert_groups};
    MUST(qv_model_open_ranks(g->dir, &ranks, &limits, NULL, NULL, &g->model));
    g->vocab = qv_model_get_config(g->model)->vocab;
    install_adapters(g);
    return true;
}

void fx_golden_close(fx_golden *g)
{
    fx_cases_free(g->cases, g->n);
    qv_model_close(g->model);
    close_backends(g);
}

bool fx_golden_has(const fx_golden *g, const char *adapter)
{
    bool has = adapter[0] == '\0';
    for (int i = 0; i < g->n_adapters; i++)
        has = has || strcmp(g->adapters[i], adapter) == 0;
    return has;
}

int32_t fx_golden_slot(const fx_golden *g, const char *adapter)
{
    for (int i = 0; i < g->n_adapters; i++) {
        if (strcmp(g->adapters[i], adapter) == 0)
            return i;
    }
    QV_ASSERT(adapter[0] == '\0');
    return -1;
}

float *fx_golden_logprobs(fx_golden *g, const fx_case *c, int32_t slot, int32_t chunk)
{
    float *logits = fx_run(g->model, c->tokens, c->n, chunk, slot, 0, 0);
    float *out = malloc((size_t)c->n * sizeof *out);
    for (int32_t t = 0; t + 1 < c->n; t++)
        out[t] = (float)fx_logprob(logits + t * g->vocab, g->vocab, c->tokens[t + 1]);
    free(logits);
    return out;
}
