/* Any bytes, as an adapter of a small model: two bytes of the size of adapter_config.json
 * (little-endian), its text, then adapter_model.safetensors. What is read can be installed. */
#include "models/lora.h"
#include "models/lora_pool.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char model_config[] =
    "{\"model_type\": \"qwen3_5_text\", \"vocab_size\": 8, \"hidden_size\": 4,"
    " \"intermediate_size\": 4, \"num_hidden_layers\": 2, \"num_attention_heads\": 2,"
    " \"num_key_value_heads\": 1, \"head_dim\": 4, \"linear_num_key_heads\": 1,"
    " \"linear_num_value_heads\": 2, \"linear_key_head_dim\": 2, \"linear_value_head_dim\": 2,"
    " \"layer_types\": [\"linear_attention\", \"full_attention\"], \"rope_theta\": 10000,"
    " \"partial_rotary_factor\": 0.5}";

enum { MAX_RANK = 4 };

/* The model's layout and a pool for it, made once. */
typedef struct {
    qv_model_config config;
    qv_layout layout;
    qv_lora_pool *pool;
} target;

static const target *get_target(void)
{
    static target t;
    if (t.pool != NULL)
        return &t;
    qv_backend *be;
    QV_ASSERT(qv_model_config_parse(model_config, strlen(model_config), NULL, 0, "fuzz",
                                    &t.config) == QV_OK);
    QV_ASSERT(qv_layout_init(&t.layout, &t.config, 0, 1) == QV_OK);
    QV_ASSERT(qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = 1}, &be) == QV_OK);
    QV_ASSERT(qv_lora_pool_new(be, &t.layout, 1, MAX_RANK, UINT64_MAX, &t.pool) == QV_OK);
    return &t;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const target *t = get_target();
    size_t config_size = size >= 2 ? (size_t)(data[0] | data[1] << 8) : 0;
    if (size < 2 || config_size > size - 2)
        return 0;
    const uint8_t *tensors = data + 2 + config_size;
    qv_adapter_spec spec = {.layout = &t->layout, .max_rank = MAX_RANK, .dtype = QV_F32};
    qv_adapter *adapter;
    if (qv_adapter_read_memory(&spec, data + 2, config_size, tensors, size - 2 - config_size,
                               &adapter) != QV_OK)
        return 0;
    QV_ASSERT(qv_adapter_n_items(adapter) > 0 && strlen(qv_adapter_digest(adapter)) == 32);
    QV_ASSERT(qv_adapter_max_rank(adapter) <= MAX_RANK);
    QV_ASSERT(qv_lora_pool_install(t->pool, 0, adapter) == QV_OK);
    qv_adapter_close(adapter);
    return 0;
}
