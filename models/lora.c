#include "models/lora.h"

#include "common/arena.h"
#include "common/json.h"
#include "common/map.h"
#include "models/arch.h"
#include "models/lora_config.h"
#include "models/safetensors.h"
#include "models/weights.h"

#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#define CONFIG_MAX_BYTES (4u << 20)
#define ADDED_MAX_BYTES  (16u << 20)
#define BLOCK            4096 /* numbers converted and hashed at a time */

struct qv_adapter {
    qv_arena arena; /* items and their matrices */
    qv_lora_item *items;
    size_t n_items;
    int32_t max_rank;
    uint64_t bytes;
    char digest[33];
    char *notes;
};

/* --- Keys ------------------------------------------------------------------------------------- */

typedef enum {
    KEY_A,
    KEY_B,
    KEY_EMBEDDING_A, /* spelling of the embedding's and the head's pairs */
    KEY_EMBEDDING_B,
    KEY_BASE_COPY, /* a base weight saved beside a pair */
    KEY_REFUSED,
    KEY_UNKNOWN
} key_kind;

static const struct {
    const char *end;
    key_kind kind;
    const char *reason;
} key_ends[] = {
    {".lora_A.weight", KEY_A, NULL},
    {".lora_B.weight", KEY_B, NULL},
    {".lora_A.default.weight", KEY_A, NULL}, /* saved with the adapter's name */
    {".lora_B.default.weight", KEY_B, NULL},
    {".lora_embedding_A", KEY_EMBEDDING_A, NULL},
    {".lora_embedding_B", KEY_EMBEDDING_B, NULL},
    {".lora_embedding_A.default", KEY_EMBEDDING_A, NULL},
    {".lora_embedding_B.default", KEY_EMBEDDING_B, NULL},
    {".lora_magnitude_vector", KEY_REFUSED, "DoRA is not implemented"},
    {".lora_magnitude_vector.weight", KEY_REFUSED, "DoRA is not implemented"},
    {".lora_magnitude_vector.default.weight", KEY_REFUSED, "DoRA is not implemented"},
    {".modules_to_save.weight", KEY_REFUSED, "modules_to_save is not implemented"},
    {".modules_to_save.default.weight", KEY_REFUSED, "modules_to_save is not implemented"},
    {".trainable_tokens_delta", KEY_REFUSED, "trained tokens are not implemented"},
    {".trainable_tokens_indices", KEY_REFUSED, "trained tokens are not implemented"},
    {".bias", KEY_REFUSED, "trained biases are not implemented"},
    {".alpha", KEY_REFUSED, "an alpha for each layer is not implemented"},
    {".base_layer.weight", KEY_BASE_COPY, NULL},
    {".weight", KEY_BASE_COPY, NULL},
};

/* A tensor's name taken apart: what it is, and of which module (PEFT's name of it). */
typedef struct {
    key_kind kind;
    const char *module;
    size_t size;
    const char *reason; /* of KEY_REFUSED */
} parsed_key;

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

static parsed_key parse_key(const char *name)
{
    parsed_key key = {.kind = KEY_UNKNOWN, .module = name, .size = strlen(name)};
    skip_start(&key.module, &key.size, "base_model.model.");
    for (size_t i = 0; i < sizeof key_ends / sizeof *key_ends; i++) {
        size_t n = strlen(key_ends[i].end);
        if (key.size > n && memcmp(key.module + key.size - n, key_ends[i].end, n) == 0) {
            key.kind = key_ends[i].kind;
            key.reason = key_ends[i].reason;
            key.size -= n;
            if (key.kind == KEY_BASE_COPY && is_part_of_pair(key.module, key.size))
                key.kind = KEY_UNKNOWN; /* "X.lora_A.NAME.weight" */
            return key;
        }
    }
    return key;
}

/* --- Modules ---------------------------------------------------------------------------------- */

typedef enum {
    PLACE_TARGET, /* a matrix that adapters may target */
    PLACE_EMBEDDING,
    PLACE_NOT_SERVED, /* image and multi-token prediction parts, which Quiver does not run */
    PLACE_NONE
} place_kind;

typedef struct {
    place_kind kind;
    int64_t layer;
    qv_lora_target target;
    const char *reason; /* of PLACE_NONE */
} place;

static bool is_one_of(const char *text, size_t size, const char *const *names, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (strlen(names[i]) == size && memcmp(text, names[i], size) == 0)
            return true;
    }
    return false;
}

static place no_place(const char *reason)
{
    return (place){.kind = PLACE_NONE, .reason = reason};
}

/* "12." at the start of *text, as a layer number. */
static bool read_layer(const char **text, size_t *size, int64_t *layer)
{
    size_t n = 0;
    *layer = 0;
    while (n < *size && n < 6 && (*text)[n] >= '0' && (*text)[n] <= '9')
        *layer = *layer * 10 + (*text)[n++] - '0';
    bool canonical = n == 1 || (n > 1 && (*text)[0] != '0');
    if (!canonical || n == *size || (*text)[n] != '.')
        return false;
    *text += n + 1;
    *size -= n + 1;
    return true;
}

static place find_in_layer(const qv_layout *layout, const char *text, size_t size)
{
    place found = {.kind = PLACE_TARGET};
    if (!read_layer(&text, &size, &found.layer))
        return no_place("no layer number");
    if (found.layer >= layout->config->n_layers)
        return no_place("the model has no such layer");
    if (!qv_layout_find_target(layout, text, size, &found.target) ||
        layout->proj[found.target.proj].part == QV_PART_GLOBAL)
        return no_place("no such module");
    if (!qv_layout_has(layout, found.layer, found.target.proj))
        return no_place("a layer of this kind has no such module");
    if (!found.target.lora)
        return no_place("adapters of this module are not implemented");
    return found;
}

/* Where a module of any spelling is in the model. */
static place find_place(const qv_layout *layout, const char *text, size_t size)
{
    static const char *const starts[] = {"model.language_model.", "language_model.model.", "model.",
                                         "language_model.", "backbone."};
    static const char *const heads[] = {"lm_head", "unembed_tokens", "output"};
    static const char *const embeddings[] = {"embed_tokens", "embeddings", "word_embeddings",
                                             "vocab_emb"};
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        if (skip_start(&text, &size, starts[i]))
            break;
    }
    if (skip_start(&text, &size, "layers."))
        return find_in_layer(layout, text, size);
    if (skip_start(&text, &size, "visual.") || skip_start(&text, &size, "mtp."))
        return (place){.kind = PLACE_NOT_SERVED};
    if (is_one_of(text, size, embeddings, sizeof embeddings / sizeof *embeddings))
        return (place){.kind = PLACE_EMBEDDING, .layer = QV_GLOBAL};
    place head = {.kind = PLACE_TARGET, .layer = QV_GLOBAL};
    if (is_one_of(text, size, heads, sizeof heads / sizeof *heads) &&
        qv_layout_find_target(layout, "lm_head", strlen("lm_head"), &head.target))
        return head;
    return no_place("no such module");
}

/* --- Pairs ------------------------------------------------------------------------------------ */

typedef struct {
    int64_t layer;
    qv_lora_target target;
    const qv_stored_tensor *a, *b;
} pair;

/* What identifies a pair whatever its spelling; the key of the map of pairs. */
typedef struct {
    int64_t layer;
    int32_t proj, first, n, zero;
} pair_key;

typedef struct {
    const qv_adapter_spec *spec;
    const char *where;        /* the adapter, for messages */
    const char *config_where; /* its adapter_config.json */
    qv_lora_config config;
    const qv_safetensors *st;
    qv_safetensors *base; /* the model's own tensors, opened when a copy must be compared */
    FILE *notes;
    qv_map *by_key; /* pair_key to pair, owned by the arena below */
    pair **pairs;   /* the same, then sorted */
    size_t n_pairs;
    char misfits[512]; /* the first tensors that have no place, and why */
    size_t n_misfits, n_empty, n_not_served;
    qv_adapter *adapter;
} reader;

static void add_misfit(reader *r, const char *name, const char *reason)
{
    size_t used = strlen(r->misfits);
    if (r->n_misfits++ < 3)
        snprintf(r->misfits + used, sizeof r->misfits - used, "%s%.120s (%s)", used ? ", " : "",
                 name, reason);
}

static qv_status add_to_pair(reader *r, const place *found, bool is_a,
                             const qv_stored_tensor *tensor)
{
    pair_key key = {.layer = found->layer,
                    .proj = (int32_t)found->target.proj,
                    .first = found->target.first,
                    .n = found->target.n};
    qv_map_entry *entry = qv_map_require(r->by_key, &key, sizeof key);
    if (entry != NULL && entry->value == NULL) {
        pair *fresh = QV_ARENA_NEW(&r->adapter->arena, pair);
        if (fresh != NULL)
            *fresh = (pair){.layer = found->layer, .target = found->target};
        entry->value = fresh;
    }
    if (entry == NULL || entry->value == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for a list of pairs", r->where);
    pair *p = entry->value;
    const qv_stored_tensor **part = is_a ? &p->a : &p->b;
    if (*part != NULL)
        return qv_fail(QV_ERR_FORMAT, "%s: %.200s and %.200s are the same matrix twice", r->where,
                       (*part)->name, tensor->name);
    *part = tensor;
    return QV_OK;
}

/* A pair of a part that is not served may be skipped when it does nothing: when its B is zero. */
static qv_status skip_not_served(reader *r, const parsed_key *key, const qv_stored_tensor *tensor)
{
    bool is_b = key->kind == KEY_B || key->kind == KEY_EMBEDDING_B;
    for (int64_t first = 0; is_b && first < tensor->n_elems; first += BLOCK) {
        float block[BLOCK];
        int64_t n = tensor->n_elems - first < BLOCK ? tensor->n_elems - first : BLOCK;
        QV_TRY(qv_stored_tensor_f32(tensor, first, n, block));
        for (int64_t i = 0; i < n; i++) {
            if (block[i] != 0) /* NaN too */
                return qv_fail(QV_ERR_UNSUPPORTED,
                               "%s: %.200s changes a part of the model that is not served",
                               r->where, tensor->name);
        }
    }
    r->n_not_served++;
    return QV_OK;
}

/* --- Copies of base weights ------------------------------------------------------------------- */

/* The base tensor behind a copy of the head or the embedding; NULL if it cannot be found. */
static const qv_stored_tensor *find_base(const reader *r, bool head)
{
    const qv_layout *layout = r->spec->layout;
    if (head && !layout->config->tied_head)
        return qv_safetensors_find(r->base, "lm_head.weight");
    char name[256];
    for (const char *const *prefix = layout->config->arch->prefixes; *prefix != NULL; prefix++) {
        const qv_stored_tensor *tensor =
            qv_safetensors_find(r->base, qv_tensor_name(name, sizeof name, *prefix, QV_GLOBAL,
                                                        layout->vec[QV_VEC_EMBED].tensor, ""));
        if (tensor != NULL)
            return tensor;
    }
    return NULL;
}

static qv_status same_numbers(const qv_stored_tensor *x, const qv_stored_tensor *y, bool *same)
{
    *same = x->n_elems == y->n_elems;
    for (int64_t first = 0; *same && first < x->n_elems; first += BLOCK) {
        float a[BLOCK], b[BLOCK];
        int64_t n = x->n_elems - first < BLOCK ? x->n_elems - first : BLOCK;
        QV_TRY(qv_stored_tensor_f32(x, first, n, a));
        QV_TRY(qv_stored_tensor_f32(y, first, n, b));
        *same = memcmp(a, b, (size_t)n * sizeof *a) == 0;
    }
    return QV_OK;
}

/* PEFT saves the base embedding and head beside pairs that target them. Such a copy may be skipped
 * when it equals the model's own. */
static qv_status check_base_copy(reader *r, const place *found, const qv_stored_tensor *tensor)
{
    bool head = found->kind == PLACE_TARGET && found->target.proj == QV_PROJ_LM_HEAD;
    if (found->kind != PLACE_EMBEDDING && !head) {
        add_misfit(r, tensor->name, "a full copy of a weight, which is not implemented");
        return QV_OK;
    }
    bool same = false;
    if (r->spec->model_dir != NULL && r->base == NULL)
        QV_TRY(qv_safetensors_open_dir(r->spec->model_dir, &r->base));
    const qv_stored_tensor *base = r->base != NULL ? find_base(r, head) : NULL;
    if (base != NULL)
        QV_TRY(same_numbers(base, tensor, &same));
    if (!same)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: %.200s is not the same as the base model's: changed base weights are "
                       "not implemented",
                       r->where, tensor->name);
    fprintf(r->notes, "%s equals the base model's and was skipped\n", tensor->name);
    return QV_OK;
}

/* --- Sort every tensor into its place --------------------------------------------------------- */

static qv_status place_tensor(reader *r, const qv_stored_tensor *tensor)
{
    if (tensor->n_elems == 0) { /* some writers use these to say "no such module" */
        r->n_empty++;
        return QV_OK;
    }
    parsed_key key = parse_key(tensor->name);
    if (key.kind == KEY_REFUSED)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: %.200s: %s", r->where, tensor->name, key.reason);
    if (key.kind == KEY_UNKNOWN) {
        add_misfit(r, tensor->name, "neither a lora_A nor a lora_B that is known");
        return QV_OK;
    }
    place found = find_place(r->spec->layout, key.module, key.size);
    bool embedding_key = key.kind == KEY_EMBEDDING_A || key.kind == KEY_EMBEDDING_B;
    if (found.kind == PLACE_NOT_SERVED && key.kind != KEY_BASE_COPY)
        return skip_not_served(r, &key, tensor);
    if (key.kind == KEY_BASE_COPY)
        return check_base_copy(r, &found, tensor);
    if (found.kind == PLACE_EMBEDDING)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: %.200s: adapters of the embedding are not implemented", r->where,
                       tensor->name);
    if (found.kind == PLACE_NONE || (embedding_key && found.layer != QV_GLOBAL)) {
        add_misfit(r, tensor->name, found.reason ? found.reason : "not an embedding");
        return QV_OK;
    }
    return add_to_pair(r, &found, key.kind == KEY_A || key.kind == KEY_EMBEDDING_A, tensor);
}

static int by_place(const void *x, const void *y)
{
    const pair *a = *(pair *const *)x, *b = *(pair *const *)y;
    if (a->layer != b->layer)
        return a->layer < b->layer ? -1 : 1;
    if (a->target.proj != b->target.proj)
        return a->target.proj < b->target.proj ? -1 : 1;
    return a->target.first - b->target.first;
}

/* List the pairs in order. Pairs that change the same rows cannot both be meant. */
static qv_status sort_pairs(reader *r)
{
    r->pairs = QV_ARENA_ARRAY(&r->adapter->arena, pair *, qv_map_count(r->by_key) + 1);
    if (r->pairs == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for a list of pairs", r->where);
    QV_MAP_EACH(r->by_key, entry)
    {
        pair *p = entry->value;
        if (p->a == NULL || p->b == NULL)
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s has no lora_%c beside it", r->where,
                           (p->a ? p->a : p->b)->name, p->a ? 'B' : 'A');
        r->pairs[r->n_pairs++] = p;
    }
    qsort(r->pairs, r->n_pairs, sizeof *r->pairs, by_place);
    for (size_t i = 1; i < r->n_pairs; i++) {
        const pair *p = r->pairs[i - 1], *q = r->pairs[i];
        if (p->layer == q->layer && p->target.proj == q->target.proj &&
            p->target.first + p->target.n > q->target.first)
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s and %.200s change the same rows", r->where,
                           p->b->name, q->b->name);
    }
    return QV_OK;
}

static qv_status place_all(reader *r)
{
    for (size_t i = 0; i < qv_safetensors_count(r->st); i++)
        QV_TRY(place_tensor(r, qv_safetensors_at(r->st, i)));
    if (r->n_misfits > 0)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: %zu tensor%s no place in this model: %s%s",
                       r->where, r->n_misfits, r->n_misfits == 1 ? " has" : "s have", r->misfits,
                       r->n_misfits > 3 ? ", and more" : "");
    if (r->n_not_served > 0)
        fprintf(r->notes, "%zu tensors of parts that are not served are zero and were skipped\n",
                r->n_not_served);
    if (r->n_empty > 0)
        fprintf(r->notes, "%zu tensors without elements were skipped\n", r->n_empty);
    QV_TRY(sort_pairs(r));
    return r->n_pairs > 0 ? QV_OK
                          : qv_fail(QV_ERR_FORMAT, "%s: no pair of lora_A and lora_B", r->where);
}

/* --- Read the numbers ------------------------------------------------------------------------- */

static qv_status check_matrix(const reader *r, const qv_stored_tensor *tensor, int dim,
                              int64_t expected)
{
    char text[128];
    qv_stored_tensor_describe(tensor, text, sizeof text);
    if (tensor->dtype != QV_F32 && tensor->dtype != QV_BF16 && tensor->dtype != QV_F16)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: %.200s is %s: only F32, BF16 and F16 are implemented", r->where,
                       tensor->name, text);
    if (tensor->n_dims != 2 || tensor->shape[dim] != expected)
        return qv_fail(QV_ERR_SHAPE,
                       dim == 0 ? "%s: %.200s is %s; the model makes it [%" PRId64 ", rank]"
                                : "%s: %.200s is %s; the model makes it [rank, %" PRId64 "]",
                       r->where, tensor->name, text, expected);
    return QV_OK;
}

/* Check the shapes of a pair and find its rank and scale. */
static qv_status measure_pair(const reader *r, const pair *p, qv_lora_item *out)
{
    QV_TRY(check_matrix(r, p->a, 1, p->target.n_in));
    QV_TRY(check_matrix(r, p->b, 0, p->target.n_rows));
    int64_t rank = p->a->shape[0];
    if (rank != p->b->shape[1])
        return qv_fail(QV_ERR_SHAPE,
                       "%s: %.200s has rank %" PRId64 ", but its lora_B has rank %" PRId64,
                       r->where, p->a->name, rank, p->b->shape[1]);
    if (rank > r->spec->max_rank)
        return qv_fail(QV_ERR_LIMIT,
                       "%s: %.200s has rank %" PRId64 "; the adapter slots have room for %d",
                       r->where, p->a->name, rank, r->spec->max_rank);
    if (p->layer == QV_GLOBAL && r->config.weight_tying)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: ensure_weight_tying is true: adapters of the embedding are not "
                       "implemented",
                       r->config_where);
    *out = (qv_lora_item){.layer = p->layer, .target = p->target, .rank = (int32_t)rank};
    parsed_key key = parse_key(p->a->name);
    char module[512];
    snprintf(module, sizeof module, "%.*s", (int)key.size, key.module);
    return qv_lora_config_scale(&r->config, r->config_where, module, (int32_t)rank, &out->scale);
}

/* Convert a matrix to the pool's dtype in memory of the adapter; hash its float32 values. */
static qv_status read_matrix(reader *r, const qv_stored_tensor *tensor, XXH3_state_t *hash,
                             const void **out)
{
    size_t elem = qv_dtype_size(r->spec->dtype);
    uint8_t *data = qv_arena_alloc(&r->adapter->arena, (size_t)tensor->n_elems * elem, 64);
    if (data == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for %.200s", r->where, tensor->name);
    QV_TRY(qv_stored_tensor_require_finite(tensor, 0, tensor->n_elems));
    for (int64_t first = 0; first < tensor->n_elems; first += BLOCK) {
        float block[BLOCK];
        int64_t n = tensor->n_elems - first < BLOCK ? tensor->n_elems - first : BLOCK;
        QV_TRY(qv_stored_tensor_f32(tensor, first, n, block));
        XXH3_128bits_update(hash, block, (size_t)n * sizeof *block);
        QV_TRY(qv_dtype_from_f32(r->spec->dtype, block, data + (size_t)first * elem, n));
    }
    *out = data;
    r->adapter->bytes += (uint64_t)tensor->n_elems * elem;
    return QV_OK;
}

/* What of an item besides its numbers makes it what it is. */
static void hash_item(const reader *r, const qv_lora_item *item, XXH3_state_t *hash)
{
    const qv_proj_shape *shape = &r->spec->layout->proj[item->target.proj];
    char text[256];
    int n = snprintf(text, sizeof text, "%" PRId64 " %s %" PRId64 "+%" PRId64 " r%d s%08x\n",
                     item->layer, shape->slices[item->target.first].row->module,
                     shape->slices[item->target.first].dst_row, item->target.n_rows, item->rank,
                     qv_f32_bits(item->scale));
    XXH3_128bits_update(hash, text, (size_t)n);
}

static qv_status read_items(reader *r, XXH3_state_t *hash)
{
    qv_adapter *adapter = r->adapter;
    adapter->items = QV_ARENA_ARRAY(&adapter->arena, qv_lora_item, r->n_pairs);
    if (adapter->items == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for a list of pairs", r->where);
    for (size_t i = 0; i < r->n_pairs; i++) { /* all shapes before any number */
        QV_TRY(measure_pair(r, r->pairs[i], &adapter->items[i]));
        if (adapter->items[i].rank > adapter->max_rank)
            adapter->max_rank = adapter->items[i].rank;
    }
    XXH3_128bits_reset(hash);
    XXH3_128bits_update(hash, "quiver lora 1\n", 14);
    for (size_t i = 0; i < r->n_pairs; i++) {
        qv_lora_item *item = &adapter->items[i];
        hash_item(r, item, hash);
        QV_TRY(read_matrix(r, r->pairs[i]->a, hash, &item->a));
        QV_TRY(read_matrix(r, r->pairs[i]->b, hash, &item->b));
        adapter->n_items++;
    }
    XXH128_hash_t digest = XXH3_128bits_digest(hash);
    snprintf(adapter->digest, sizeof adapter->digest, "%016" PRIx64 "%016" PRIx64,
             (uint64_t)digest.high64, (uint64_t)digest.low64);
    return QV_OK;
}

/* --- Reading as a whole ----------------------------------------------------------------------- */

/* target_modules is only a cross-check: the tensors are the truth. */
static void note_untouched_targets(const reader *r, const json_t *config)
{
    const json_t *targets = json_object_get(config, "target_modules");
    for (size_t t = 0; t < json_array_size(targets); t++) {
        const char *target = json_string_value(json_array_get(targets, t));
        size_t size = target ? strlen(target) : 0;
        bool found = target == NULL;
        for (size_t i = 0; i < r->n_pairs && !found; i++) {
            parsed_key key = parse_key(r->pairs[i]->a->name);
            found = key.size >= size && memcmp(key.module + key.size - size, target, size) == 0 &&
                    (key.size == size || key.module[key.size - size - 1] == '.');
        }
        if (!found)
            fprintf(r->notes, "target_modules names %.100s, of which the file has no tensor\n",
                    target);
    }
}

static qv_status read_all(reader *r, const json_t *config)
{
    QV_TRY(qv_lora_config_parse(config, r->config_where, r->notes, &r->config));
    QV_TRY(place_all(r));
    note_untouched_targets(r, config);
    XXH3_state_t *hash = XXH3_createState();
    qv_status status =
        hash ? read_items(r, hash) : qv_fail(QV_ERR_NOMEM, "%s: no memory for a digest", r->where);
    XXH3_freeState(hash);
    return status;
}

static qv_status read_adapter(const qv_adapter_spec *spec, const char *where,
                              const char *config_where, const json_t *config,
                              const qv_safetensors *st, qv_adapter **out)
{
    reader r = {.spec = spec, .where = where, .config_where = config_where, .st = st};
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
                             "vocabulary are not implemented",
                             path, name, (long long)json_integer_value(value));
    }
    json_decref(tokens);
    return status;
}

/* Open adapter_model.safetensors, or say why there is none to open. */
static qv_status open_tensors(const qv_adapter_spec *spec, const char *dir, const char *path,
                              qv_safetensors **out)
{
    uint64_t max_bytes = spec->max_bytes ? spec->max_bytes : QV_ADAPTER_MAX_BYTES;
    char other[PATH_MAX];
    snprintf(other, sizeof other, "%s/adapter_model.bin", dir);
    if (access(path, F_OK) != 0 && access(other, F_OK) == 0)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: pickled weights are not read, because reading them runs their code: "
                       "save the adapter as safetensors",
                       other);
    return qv_safetensors_open_file(path, max_bytes, out);
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
        status = open_tensors(spec, dir, path, &st);
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
