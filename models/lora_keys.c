#include "models/lora_keys.h"

#include "models/weights.h"

#include <string.h>

/* --- Keys ------------------------------------------------------------------------------------- */

static const struct {
    const char *end;
    qv_lora_key_kind kind;
    const char *reason;
} key_ends[] = {
    {".lora_A.weight", QV_KEY_A, NULL},
    {".lora_B.weight", QV_KEY_B, NULL},
    {".lora_A.default.weight", QV_KEY_A, NULL}, /* saved with the adapter's name */
    {".lora_B.default.weight", QV_KEY_B, NULL},
    {".lora_A", QV_KEY_A, NULL}, /* merged experts, as parameters */
    {".lora_B", QV_KEY_B, NULL},
    {".lora_embedding_A", QV_KEY_EMBEDDING_A, NULL},
    {".lora_embedding_B", QV_KEY_EMBEDDING_B, NULL},
    {".lora_embedding_A.default", QV_KEY_EMBEDDING_A, NULL},
    {".lora_embedding_B.default", QV_KEY_EMBEDDING_B, NULL},
    {".lora_magnitude_vector", QV_KEY_REFUSED, "DoRA is not supported"},
    {".lora_magnitude_vector.weight", QV_KEY_REFUSED, "DoRA is not supported"},
    {".lora_magnitude_vector.default.weight", QV_KEY_REFUSED, "DoRA is not supported"},
    {".modules_to_save.weight", QV_KEY_REFUSED, "modules_to_save is not supported"},
    {".modules_to_save.default.weight", QV_KEY_REFUSED, "modules_to_save is not supported"},
    {".trainable_tokens_delta", QV_KEY_REFUSED, "trained tokens are not supported"},
    {".trainable_tokens_indices", QV_KEY_REFUSED, "trained tokens are not supported"},
    {".bias", QV_KEY_REFUSED, "trained biases are not supported"},
    {".alpha", QV_KEY_REFUSED, "an alpha for each layer is not supported"},
    {".base_layer.weight", QV_KEY_BASE_COPY, NULL},
    {".weight", QV_KEY_BASE_COPY, NULL},
};

static bool skip_start(const char **text, size_t *size, const char *start)
{
    size_t n = strlen(start);
    if (*size < n || memcmp(*text, start, n) != 0)
        return false;
    *text += n;
    *size -= n;
    return true;
}

/* Whether `text` holds ".lora_" anywhere: part of a pair, whatever its end. */
static bool is_part_of_pair(const char *text, size_t size)
{
    return memmem(text, size, ".lora_", 6) != NULL;
}

qv_lora_key qv_lora_key_parse(const char *name)
{
    qv_lora_key key = {.kind = QV_KEY_UNKNOWN, .module = name, .size = strlen(name)};
    skip_start(&key.module, &key.size, "base_model.model.");
    for (size_t i = 0; i < sizeof key_ends / sizeof *key_ends; i++) {
        size_t n = strlen(key_ends[i].end);
        if (key.size > n && memcmp(key.module + key.size - n, key_ends[i].end, n) == 0) {
            key.kind = key_ends[i].kind;
            key.reason = key_ends[i].reason;
            key.size -= n;
            if (key.kind == QV_KEY_BASE_COPY && is_part_of_pair(key.module, key.size))
                key.kind = QV_KEY_UNKNOWN; /* "X.lora_A.NAME.weight" */
            return key;
        }
    }
    return key;
}

/* --- Places ----------------------------------------------------------------------------------- */

static bool is_one_of(const char *text, size_t size, const char *const *names, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (strlen(names[i]) == size && memcmp(text, names[i], size) == 0)
            return true;
    }
    return false;
}

static qv_lora_place no_place(const char *reason)
{
    return (qv_lora_place){.kind = QV_PLACE_NONE, .reason = reason};
}

/* "12." at the start of *text, as a number. */
static bool read_number(const char **text, size_t *size, int64_t *number)
{
    size_t n = 0;
    *number = 0;
    while (n < *size && n < 6 && (*text)[n] >= '0' && (*text)[n] <= '9')
        *number = *number * 10 + (*text)[n++] - '0';
    bool canonical = n == 1 || (n > 1 && (*text)[0] != '0');
    if (!canonical || n == *size || (*text)[n] != '.')
        return false;
    *text += n + 1;
    *size -= n + 1;
    return true;
}

/* Below the path of the experts: a wrapper around them, one matrix of one expert, or one matrix of
 * all of them. */
static qv_lora_place find_expert(const qv_layout *layout, int64_t layer, const char *text,
                                 size_t size)
{
    qv_lora_place found = {.layer = layer, .expert = QV_ALL_EXPERTS};
    static const char *const base_layer[] = {"base_layer"};
    if (!qv_layout_has(layout, layer, QV_PROJ_EXPERT_IN))
        return no_place("a layer of this kind has no experts");
    if (size == 0 || is_one_of(text, size, base_layer, 1)) {
        found.kind = QV_PLACE_WRAPPER;
        found.inner = size > 0;
        return found;
    }
    if (skip_start(&text, &size, "shared."))
        return no_place("pairs of experts that are partly shared are not supported");
    found.kind = QV_PLACE_EXPERT;
    int64_t expert;
    if (read_number(&text, &size, &expert)) {
        if (expert >= layout->config->n_experts)
            return no_place("the model has no such expert");
        found.expert = (int32_t)expert;
    }
    if (!qv_layout_find_expert_target(layout, text, size, &found.target))
        return no_place("experts have no such matrix");
    if (!found.target.lora)
        return no_place("adapters of this module are not supported");
    return found;
}

/* Whether text is `path`, or something below it, which it then becomes. */
static bool skip_path(const char **text, size_t *size, const char *path)
{
    const char *below = *text;
    size_t left = *size;
    if (path == NULL || !skip_start(&below, &left, path) || (left > 0 && *below != '.'))
        return false;
    *text = left > 0 ? below + 1 : below;
    *size = left > 0 ? left - 1 : 0;
    return true;
}

static qv_lora_place find_in_layer(const qv_layout *layout, const char *text, size_t size)
{
    qv_lora_place found = {.kind = QV_PLACE_LINEAR, .expert = QV_ALL_EXPERTS};
    if (!read_number(&text, &size, &found.layer))
        return no_place("no layer number");
    if (found.layer >= layout->config->n_layers)
        return no_place("the model has no such layer");
    if (skip_path(&text, &size, qv_layout_experts_path(layout)))
        return find_expert(layout, found.layer, text, size);
    if (!qv_layout_find_target(layout, text, size, &found.target) ||
        layout->proj[found.target.proj].part == QV_PART_GLOBAL)
        return no_place("no such module");
    if (!qv_layout_has(layout, found.layer, found.target.proj))
        return no_place("a layer of this kind has no such module");
    if (!found.target.lora)
        return no_place("adapters of this module are not supported");
    return found;
}

qv_lora_place qv_lora_place_find(const qv_layout *layout, const char *text, size_t size)
{
    static const char *const starts[] = {"model.language_model.", "language_model.model.", "model.",
                                         "language_model.", "backbone."};
    static const char *const heads[] = {"lm_head", "unembed_tokens", "output"};
    static const char *const embeddings[] = {"embed_tokens", "embeddings", "embedding",
                                             "word_embeddings", "vocab_emb"};
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        if (skip_start(&text, &size, starts[i]))
            break;
    }
    if (skip_start(&text, &size, "layers."))
        return find_in_layer(layout, text, size);
    if (skip_start(&text, &size, "visual.") || skip_start(&text, &size, "mtp."))
        return (qv_lora_place){.kind = QV_PLACE_NOT_SERVED};
    if (is_one_of(text, size, embeddings, sizeof embeddings / sizeof *embeddings))
        return (qv_lora_place){.kind = QV_PLACE_EMBEDDING,
                               .layer = QV_GLOBAL,
                               .expert = QV_ALL_EXPERTS,
                               .target = {.proj = QV_PROJ_COUNT,
                                          .n = 1,
                                          .n_in = layout->config->vocab,
                                          .n_rows = layout->config->hidden,
                                          .lora = true}};
    qv_lora_place head = {.kind = QV_PLACE_LINEAR, .layer = QV_GLOBAL, .expert = QV_ALL_EXPERTS};
    if (is_one_of(text, size, heads, sizeof heads / sizeof *heads) &&
        qv_layout_find_target(layout, "lm_head", strlen("lm_head"), &head.target))
        return head;
    return no_place("no such module");
}
