#include "models/lora.h"

#include "common/json.h"
#include "models/lora_reader.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CONFIG_MAX_BYTES (4u << 20)
#define ADDED_MAX_BYTES  (16u << 20)

/* --- Reading as a whole ----------------------------------------------------------------------- */

/* target_modules is only a cross-check: the tensors are the truth. */
static void note_untouched_targets(const qv_lora_reader *r, const json_t *config)
{
    const json_t *targets = json_object_get(config, "target_modules");
    for (size_t t = 0; t < json_array_size(targets); t++) {
        const char *target = json_string_value(json_array_get(targets, t));
        size_t size = target ? strlen(target) : 0;
        bool found = target == NULL;
        for (size_t i = 0; i < r->n_pairs && !found; i++) {
            qv_lora_key key = qv_lora_key_parse(r->pairs[i]->a->name);
            found = key.size >= size && memcmp(key.module + key.size - size, target, size) == 0 &&
                    (key.size == size || key.module[key.size - size - 1] == '.');
        }
        if (!found)
            fprintf(r->notes, "target_modules names %.100s, of which the file has no tensor\n",
                    target);
    }
}

static qv_status read_all(qv_lora_reader *r, const json_t *config)
{
    QV_TRY(qv_lora_config_parse(config, r->config_where, r->notes, &r->config));
    QV_TRY(qv_lora_gather_pairs(r));
    note_untouched_targets(r, config);
    QV_TRY(qv_lora_measure_pairs(r));
    QV_TRY(qv_lora_tie_vocabulary(r));
    return qv_lora_read_items(r);
}

static qv_status read_adapter(const qv_adapter_spec *spec, const char *where,
                              const char *config_where, const json_t *config,
                              const qv_safetensors *st, qv_adapter **out)
{
    qv_lora_reader r = {.spec = spec, .where = where, .config_where = config_where, .st = st};
    size_t notes_size;
    char *notes = NULL;
    r.adapter = calloc(1, sizeof *r.adapter);
    r.by_key = qv_map_new(64);
    r.notes = open_memstream(&notes, &notes_size);
    qv_status status = r.adapter && r.by_key && r.notes
                           ? QV_OK
                           : qv_fail(QV_ERR_NOMEM, "%s: no memory for an adapter", where);
    if (status == QV_OK)
        status = read_all(&r, config);
    qv_lora_config_deinit(&r.config);
    qv_safetensors_close(r.base);
    qv_map_free(r.by_key, NULL);
    if (r.notes != NULL)
        fclose(r.notes);
    if (r.adapter != NULL)
        r.adapter->notes = notes;
    else
        free(notes);
    if (status != QV_OK) {
        qv_adapter_close(r.adapter);
        return status;
    }
    *out = r.adapter;
    return QV_OK;
}

/* Tokens that the adapter adds to the vocabulary cannot be served. Trainers often leave a copy of
 * the base tokenizer's list, which is fine. */
static qv_status check_added_tokens(const qv_adapter_spec *spec, const char *dir)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/added_tokens.json", dir);
    json_t *tokens;
    if (access(path, F_OK) != 0)
        return QV_OK;
    QV_TRY(qv_json_load_file(path, ADDED_MAX_BYTES, &tokens));
    qv_status status = QV_OK;
    const char *name;
    json_t *value;
    json_object_foreach(tokens, name, value)
    {
        if (status == QV_OK && json_integer_value(value) >= spec->layout->config->vocab)
            status = qv_fail(QV_ERR_UNSUPPORTED,
                             "%s: \"%.60s\" is token %lld; adapters that add tokens to the "
                             "vocabulary are not supported",
                             path, name, (long long)json_integer_value(value));
    }
    json_decref(tokens);
    return status;
}

static bool has_file(const char *dir, const char *name)
{
    char path[PATH_MAX];
    return snprintf(path, sizeof path, "%s/%s", dir, name) < (int)sizeof path &&
           access(path, F_OK) == 0;
}

/* Open adapter_model.safetensors or its shards, or say why there is nothing to open. */
static qv_status open_tensors(const qv_adapter_spec *spec, const char *dir, qv_safetensors **out)
{
    if (!has_file(dir, "adapter_model.safetensors") &&
        !has_file(dir, "adapter_model.safetensors.index.json") &&
        has_file(dir, "adapter_model.bin"))
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s/adapter_model.bin: pickled weights are not read, because reading them "
                       "runs their code: save the adapter as safetensors",
                       dir);
    uint64_t max_bytes = spec->max_bytes ? spec->max_bytes : QV_ADAPTER_MAX_BYTES;
    return qv_safetensors_open_set(dir, "adapter_model", max_bytes, out);
}

qv_status qv_adapter_read(const qv_adapter_spec *spec, const char *dir, qv_adapter **out)
{
    char config_path[PATH_MAX], path[PATH_MAX];
    if (snprintf(config_path, sizeof config_path, "%s/adapter_config.json", dir) + 32 >=
        (int)sizeof config_path)
        return qv_fail(QV_ERR_ARG, "%.80s...: path too long", dir);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
    json_t *config = NULL;
    qv_safetensors *st = NULL;
    qv_status status = qv_json_load_file(config_path, CONFIG_MAX_BYTES, &config);
    if (status == QV_OK)
        status = check_added_tokens(spec, dir);
    if (status == QV_OK)
        status = open_tensors(spec, dir, &st);
    if (status == QV_OK)
        status = read_adapter(spec, path, config_path, config, st, out);
    qv_safetensors_close(st);
    json_decref(config);
    return status;
}

qv_status qv_adapter_read_memory(const qv_adapter_spec *spec, const void *config,
                                 size_t config_size, const void *tensors, size_t tensors_size,
                                 qv_adapter **out)
{
    json_t *root = NULL;
    qv_safetensors *st = NULL;
    qv_status status = qv_json_load(config, config_size, "adapter_config.json", &root);
    if (status == QV_OK)
        status =
            qv_safetensors_open_memory(tensors, tensors_size, "adapter_model.safetensors", &st);
    if (status == QV_OK)
        status =
            read_adapter(spec, "adapter_model.safetensors", "adapter_config.json", root, st, out);
    qv_safetensors_close(st);
    json_decref(root);
    return status;
}

/* --- Public ----------------------------------------------------------------------------------- */

void qv_adapter_close(qv_adapter *adapter)
{
    if (adapter == NULL)
        return;
    qv_arena_deinit(&adapter->arena);
    free(adapter->notes);
    free(adapter);
}

const char *qv_adapter_digest(const qv_adapter *adapter)
{
    return adapter->digest;
}

int32_t qv_adapter_max_rank(const qv_adapter *adapter)
{
    return adapter->max_rank;
}

uint64_t qv_adapter_bytes(const qv_adapter *adapter)
{
    return adapter->bytes;
}

size_t qv_adapter_n_items(const qv_adapter *adapter)
{
    return adapter->n_items;
}

const qv_lora_item *qv_adapter_item(const qv_adapter *adapter, size_t i)
{
    QV_ASSERT(i < adapter->n_items);
    return &adapter->items[i];
}

const char *qv_adapter_notes(const qv_adapter *adapter)
{
    return adapter->notes ? adapter->notes : "";
}
