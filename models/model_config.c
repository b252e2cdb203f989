#include "models/model_config.h"

#include "common/json.h"
#include "models/arch.h"
#include "models/config_read.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>

/* A config.json that maps every quantised module of a large model is a few megabytes. */
#define CONFIG_MAX_BYTES (16u << 20)

/* --- Tokens ----------------------------------------------------------------------------------- */

static qv_status add_eos(qv_model_config *config, const json_t *value, const char *where)
{
    if (!json_is_integer(value))
        return qv_fail(QV_ERR_FORMAT, "%s: eos_token_id is neither an integer nor a list of them",
                       where);
    int64_t id = json_integer_value(value);
    if (id < 0 || id >= config->vocab)
        return qv_fail(QV_ERR_FORMAT,
                       "%s: eos_token_id %" PRId64 " is outside of the vocabulary of %" PRId64,
                       where, id, config->vocab);
    if (qv_model_config_is_eos(config, (int32_t)id))
        return QV_OK;
    if (config->n_eos == QV_MAX_EOS)
        return qv_fail(QV_ERR_LIMIT, "%s: more than %d different eos_token_id", where, QV_MAX_EOS);
    config->eos[config->n_eos++] = (int32_t)id;
    return QV_OK;
}

/* Join the eos_token_id of one object, an integer or a list, to the set. */
static qv_status read_eos(qv_model_config *config, const json_t *obj, const char *where)
{
    const json_t *value = json_object_get(obj, "eos_token_id");
    if (value == NULL || json_is_null(value))
        return QV_OK;
    if (!json_is_array(value))
        return add_eos(config, value, where);
    size_t i;
    const json_t *item;
    json_array_foreach(value, i, item) QV_TRY(add_eos(config, item, where));
    return QV_OK;
}

static qv_status read_token(const json_t *obj, const char *key, const char *where, int64_t vocab,
                            int32_t *out)
{
    int64_t id;
    QV_TRY(qv_config_int(obj, key, where, -1, -1, vocab - 1, &id));
    *out = (int32_t)id;
    return QV_OK;
}

/* --- config.json ------------------------------------------------------------------------------ */

static qv_status read_dtype(const json_t *text, const json_t *root, const char *where,
                            qv_dtype *out)
{
    static const struct {
        const char *name;
        qv_dtype dtype;
    } names[] = {{"bfloat16", QV_BF16}, {"float16", QV_F16}, {"float32", QV_F32}};
    static const char *const keys[] = {"torch_dtype", "dtype"}; /* the older spelling first */
    const char *found = "bfloat16";
    for (size_t i = 0; i < 2; i++) {
        QV_TRY(qv_json_opt_str(root, keys[i], where, &found));
        QV_TRY(qv_json_opt_str(text, keys[i], where, &found));
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(found, names[i].name) == 0) {
            *out = names[i].dtype;
            return QV_OK;
        }
    }
    return qv_fail(QV_ERR_UNSUPPORTED,
                   "%s: dtype is \"%.40s\": bfloat16, float16 and float32 are implemented", where,
                   found);
}

/* Quantised checkpoints are refused by the name of their method. */
static qv_status refuse_quantised(const json_t *obj, const char *where)
{
    const json_t *quant = json_object_get(obj, "quantization_config");
    if (quant == NULL || json_is_null(quant))
        return QV_OK;
    const char *method = json_string_value(json_object_get(quant, "quant_method"));
    return qv_fail(QV_ERR_UNSUPPORTED,
                   "%s: quantization_config asks for \"%.40s\": quantised weights are not "
                   "implemented",
                   where, method ? method : "a method without a name");
}

static qv_status read_config(const json_t *root, const char *where, qv_model_config *out)
{
    if (!json_is_object(root))
        return qv_fail(QV_ERR_FORMAT, "%s: not a JSON object", where);
    const json_t *text = json_object_get(root, "text_config");
    if (text == NULL || json_is_null(text))
        text = root;
    else if (!json_is_object(text))
        return qv_fail(QV_ERR_FORMAT, "%s: text_config is not an object", where);

    *out = (qv_model_config){.bos = -1, .pad = -1};
    const char *model_type;
    QV_TRY(qv_json_get_str(root, "model_type", where, &model_type));
    QV_TRY(qv_arch_find(model_type, where, &out->arch));
    snprintf(out->model_type, sizeof out->model_type, "%s", model_type);
    QV_TRY(refuse_quantised(root, where));
    QV_TRY(refuse_quantised(text, where));
    QV_TRY(read_dtype(text, root, where, &out->dtype));

    QV_TRY(qv_config_int(text, "vocab_size", where, QV_CONFIG_REQUIRED, 1, 1 << 24, &out->vocab));
    QV_TRY(qv_config_int(text, "hidden_size", where, QV_CONFIG_REQUIRED, 1, 1 << 16, &out->hidden));
    QV_TRY(qv_config_int(text, "max_position_embeddings", where, 32768, 1, 1 << 24,
                         &out->max_positions));
    QV_TRY(qv_json_opt_bool(root, "tie_word_embeddings", where, &out->tied_head));
    QV_TRY(qv_json_opt_bool(text, "tie_word_embeddings", where, &out->tied_head));
    QV_TRY(read_token(text, "bos_token_id", where, out->vocab, &out->bos));
    QV_TRY(read_token(text, "pad_token_id", where, out->vocab, &out->pad));
    QV_TRY(read_eos(out, text, where));
    if (text != root)
        QV_TRY(read_eos(out, root, where));
    return out->arch->read_config(text, root, where, out);
}

/* --- generation_config.json ------------------------------------------------------------------- */

static qv_status read_generation(const json_t *root, const char *where, qv_model_config *config)
{
    if (!json_is_object(root))
        return qv_fail(QV_ERR_FORMAT, "%s: not a JSON object", where);
    QV_TRY(read_eos(config, root, where));

    qv_generation_defaults *gen = &config->generation;
    double temperature = 1, top_p = 1, min_p = 0, repetition = 1;
    int64_t top_k;
    QV_TRY(qv_json_opt_bool(root, "do_sample", where, &gen->do_sample));
    QV_TRY(qv_config_double(root, "temperature", where, 0, 100, &temperature));
    QV_TRY(qv_config_double(root, "top_p", where, 0, 1, &top_p));
    QV_TRY(qv_config_double(root, "min_p", where, 0, 1, &min_p));
    QV_TRY(qv_config_double(root, "repetition_penalty", where, 1e-3, 100, &repetition));
    QV_TRY(qv_config_int(root, "top_k", where, 0, -1, INT32_MAX, &top_k));
    gen->temperature = (float)temperature;
    gen->top_p = (float)top_p;
    gen->min_p = (float)min_p;
    gen->repetition_penalty = (float)repetition;
    gen->top_k = top_k < 0 ? 0 : (int32_t)top_k;

    static const char *const keys[] = {"do_sample", "temperature",        "top_p",
                                       "min_p",     "repetition_penalty", "top_k"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const json_t *value = json_object_get(root, keys[i]);
        gen->given |= value != NULL && !json_is_null(value);
    }
    return QV_OK;
}

/* --- Public ----------------------------------------------------------------------------------- */

/* Both documents are parsed; `generation` may be NULL. Takes no reference. */
static qv_status read_both(const json_t *config, const char *where, const json_t *generation,
                           const char *generation_where, qv_model_config *out)
{
    qv_model_config read;
    QV_TRY(read_config(config, where, &read));
    read.generation =
        (qv_generation_defaults){.temperature = 1, .top_p = 1, .repetition_penalty = 1};
    if (generation != NULL)
        QV_TRY(read_generation(generation, generation_where, &read));
    *out = read;
    return QV_OK;
}

qv_status qv_model_config_parse(const char *config, size_t config_size, const char *generation,
                                size_t generation_size, const char *where, qv_model_config *out)
{
    json_t *root = NULL, *gen = NULL;
    qv_status status = qv_json_load(config, config_size, where, &root);
    if (status == QV_OK && generation != NULL)
        status = qv_json_load(generation, generation_size, where, &gen);
    if (status == QV_OK)
        status = read_both(root, where, gen, where, out);
    json_decref(gen);
    json_decref(root);
    return status;
}

qv_status qv_model_config_load(const char *dir, qv_model_config *out)
{
    char path[PATH_MAX], gen_path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/config.json", dir) >= (int)sizeof path ||
        snprintf(gen_path, sizeof gen_path, "%s/generation_config.json", dir) >=
            (int)sizeof gen_path)
        return qv_fail(QV_ERR_ARG, "%.80s...: path too long", dir);
    json_t *root = NULL, *gen = NULL;
    qv_status status = qv_json_load_file(path, CONFIG_MAX_BYTES, &root);
    if (status == QV_OK) {
        status = qv_json_load_file(gen_path, CONFIG_MAX_BYTES, &gen);
        if (status == QV_ERR_NOT_FOUND) /* optional: some releases ship none */
            status = QV_OK;
    }
    if (status == QV_OK)
        status = read_both(root, path, gen, gen_path, out);
    json_decref(gen);
    json_decref(root);
    return status;
}

const char *qv_model_config_arch_name(const qv_model_config *config)
{
    return config->arch->name;
}

bool qv_model_config_is_eos(const qv_model_config *config, int32_t token)
{
    for (int32_t i = 0; i < config->n_eos; i++) {
        if (config->eos[i] == token)
            return true;
    }
    return false;
}

int64_t qv_model_config_count(const qv_model_config *config, qv_part part)
{
    int64_t n = 0;
    for (int64_t layer = 0; layer < config->n_layers; layer++)
        n += (config->layer_parts[layer] & part) != 0;
    return n;
}
