/* Any bytes, as an adapter of small models, dense and with experts: two bytes of the size of
 * adapter_config.json (little-endian), its text, then adapter_model.safetensors. What is read can
 * be installed. */
#include "models/lora.h"
#include "models/lora_pool.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define COMMON                                                                                     \
    "\"vocab_size\": 8, \"hidden_size\": 4, \"num_attention_heads\": 2, \"num_key_value_heads\": " \
    "1,"                                                                                           \
    " \"head_dim\": 4, "
#define QWEN                                                                                       \
    COMMON "\"num_hidden_layers\": 2, \"linear_num_key_heads\": 1, \"linear_num_value_heads\": 2," \
           " \"linear_key_head_dim\": 2, \"linear_value_head_dim\": 2, \"layer_types\":"           \
           " [\"linear_attention\", \"full_attention\"], \"rope_theta\": 10000,"                   \
           " \"partial_rotary_factor\": 0.5, "

static const char *const configs[] = {
    "{\"model_type\": \"qwen3_5_text\", " QWEN
    "\"intermediate_size\": 4, \"tie_word_embeddings\": true}",
    "{\"model_type\": \"qwen3_5_moe_text\", " QWEN
    "\"num_experts\": 2, \"num_experts_per_tok\": 1, \"moe_intermediate_size\": 3,"
    " \"shared_expert_intermediate_size\": 4}",
    "{\"model_type\": \"nemotron_h\", " COMMON
    "\"hybrid_override_pattern\": \"ME\", \"mamba_num_heads\": 2, \"mamba_head_dim\": 2,"
    " \"ssm_state_size\": 2, \"n_groups\": 1, \"n_routed_experts\": 2, \"num_experts_per_tok\": 1,"
    " \"moe_intermediate_size\": 3}",
};

enum { MAX_RANK = 4, N_MODELS = sizeof configs / sizeof *configs };

/* A model's layout and a pool for it, made once. */
typedef struct {
    qv_model_config config;
    qv_layout layout;
    qv_lora_pool *pool;
} target;

static void open_target(target *t, const char *config)
{
    qv_backend *be;
    QV_ASSERT(qv_model_config_parse(config, strlen(config), NULL, 0, "fuzz", &t->config) == QV_OK);
    QV_ASSERT(qv_layout_init(&t->layout, &t->config, 0, 1) == QV_OK);
    QV_ASSERT(qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = 1}, &be) == QV_OK);
    QV_ASSERT(qv_lora_pool_new(be, &t->layout, 1, MAX_RANK, UINT64_MAX, &t->pool) == QV_OK);
}

static void try_adapter(const target *t, const uint8_t *config, size_t config_size,
                        const uint8_t *tensors, size_t size)
{
    qv_adapter_spec spec = {.layout = &t->layout, .max_rank = MAX_RANK, .dtype = QV_F32};
    qv_adapter *adapter;
    if (qv_adapter_read_memory(&spec, config, config_size, tensors, size, &adapter) != QV_OK)
        return;
    QV_ASSERT(qv_adapter_n_items(adapter) > 0 && strlen(qv_adapter_digest(adapter)) == 32);
    QV_ASSERT(qv_adapter_max_rank(adapter) <= MAX_RANK);
    QV_ASSERT(qv_lora_pool_install(t->pool, 0, adapter) == QV_OK);
    uint64_t used = qv_lora_parts_used(qv_lora_pool_parts(t->pool));
    QV_ASSERT(used == qv_lora_parts_bytes(&t->layout, adapter, QV_F32));
    qv_adapter_close(adapter);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static target targets[N_MODELS];
    size_t config_size = size >= 2 ? (size_t)(data[0] | data[1] << 8) : 0;
    if (size < 2 || config_size > size - 2)
        return 0;
    for (int i = 0; i < N_MODELS; i++) {
        if (targets[i].pool == NULL)
            open_target(&targets[i], configs[i]);
        try_adapter(&targets[i], data + 2, config_size, data + 2 + config_size,
                    size - 2 - config_size);
    }
    return 0;
}
