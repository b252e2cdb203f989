/* Reading tokenizer.json. Each section has one function; each refuses what it does not know,
 * because a setting that is skipped gives ids that look right and are not.
 */
#include "common/json.h"
#include "models/tokenizer_impl.h"
#include "models/unicode.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define TOKENIZER_JSON_MAX ((size_t)256 << 20)
#define CONFIG_JSON_MAX    ((size_t)16 << 20)

/* ---- Sections and their types ---------------------------------------------------------------- */

/* Refuse keys other than those listed (NULL ends the list). */
static qv_status check_keys(json_t *obj, const char *where, ...)
{
    const char *key;
    json_t *value;
    json_object_foreach(obj, key, value)
    {
        va_list args;
        va_start(args, where);
        const char *known;
        do
            known = va_arg(args, const char *);
        while (known && strcmp(known, key) != 0);
        va_end(args);
        if (!known)
            return qv_fail(QV_ERR_UNSUPPORTED, "%s: setting '%s' is not supported", where, key);
    }
    return QV_OK;
}

/* The "type" of a section. */
static qv_status get_type(json_t *section, const char *where, const char **type)
{
    if (!json_is_object(section))
        return qv_fail(QV_ERR_FORMAT, "%s is not an object", where);
    return qv_json_get_str(section, "type", where, type);
}

static qv_status unsupported_type(const char *where, const char *type)
{
    return qv_fail(QV_ERR_UNSUPPORTED, "%s '%s' is not supported", where, type);
}

/* A list that "Sequence" sections hold under `key`. */
static qv_status get_list(json_t *section, const char *key, const char *where, json_t **list)
{
    *list = json_object_get(section, key);
    if (!json_is_array(*list))
        return qv_fail(QV_ERR_FORMAT, "%s: '%s' is not a list", where, key);
    return check_keys(section, where, "type", key, NULL);
}

static bool is_absent(const json_t *value)
{
    return value == NULL || json_is_null(value);
}

/* ---- model ----------------------------------------------------------------------------------- */

/* Refuse the settings of a BPE model that change what it does. */
static qv_status check_model(json_t *model)
{
    static const char *const where = "tokenizer.json: model";
    const char *type = "BPE", *prefix = "", *suffix = "";
    double dropout = 0;
    bool byte_fallback = false;
    if (!json_is_object(model))
        return qv_fail(QV_ERR_FORMAT, "%s is not an object", where);
    QV_TRY(qv_json_opt_str(model, "type", where, &type));
    if (strcmp(type, "BPE") != 0)
        return unsupported_type(where, type);
    QV_TRY(check_keys(model, where, "type", "dropout", "unk_token", "continuing_subword_prefix",
                      "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges", "vocab",
                      "merges", NULL));
    QV_TRY(qv_json_opt_str(model, "continuing_subword_prefix", where, &prefix));
    QV_TRY(qv_json_opt_str(model, "end_of_word_suffix", where, &suffix));
    QV_TRY(qv_json_opt_double(model, "dropout", where, &dropout));
    QV_TRY(qv_json_opt_bool(model, "byte_fallback", where, &byte_fallback));
    if (*prefix)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: continuing_subword_prefix '%s' is not supported",
                       where, prefix);
    if (*suffix)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: end_of_word_suffix '%s' is not supported", where,
                       suffix);
    if (dropout != 0)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: dropout %g is not supported", where, dropout);
    if (byte_fallback)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: byte_fallback is not supported", where);
    return QV_OK;
}

/* Check the ids of the vocabulary and the added tokens, and find the highest. */
static qv_status measure_ids(json_t *vocab, json_t *added, int64_t *max_id)
{
    const char *text;
    json_t *value;
    size_t i;
    *max_id = -1;
    json_object_foreach(vocab, text, value)
    {
        int64_t id = json_integer_value(value);
        if (!json_is_integer(value) || id < 0 || id >= QV_VOCAB_MAX)
            return qv_fail(QV_ERR_FORMAT, "tokenizer.json: token '%s' has no id in [0, %d)", text,
                           QV_VOCAB_MAX);
        *max_id = id > *max_id ? id : *max_id;
    }
    json_array_foreach(added, i, value)
    {
        int64_t id;
        if (!json_is_object(value))
            return qv_fail(QV_ERR_FORMAT, "tokenizer.json: added_tokens[%zu] is not an object", i);
        QV_TRY(qv_json_get_int(value, "id", "tokenizer.json: added_tokens", &id));
        if (id < 0 || id >= QV_VOCAB_MAX)
            return qv_fail(QV_ERR_FORMAT, "tokenizer.json: added token id %lld is not in [0, %d)",
                           (long long)id, QV_VOCAB_MAX);
        *max_id = id > *max_id ? id : *max_id;
    }
    return QV_OK;
}

/* A merge is "left right" or ["left", "right"]. */
static qv_status read_merge(qv_bpe *bpe, json_t *merge, size_t rank)
{
    json_t *left = json_array_get(merge, 0), *right = json_array_get(merge, 1);
    if (json_is_array(merge) && json_array_size(merge) == 2 && json_is_string(left) &&
        json_is_string(right))
        return qv_bpe_add_merge(bpe, json_string_value(left), json_string_length(left),
                                json_string_value(right), json_string_length(right),
                                (uint32_t)rank);
    const char *text = json_string_value(merge);
    const char *space = text ? strchr(text, ' ') : NULL;
    if (!space || strchr(space + 1, ' '))
        return qv_fail(QV_ERR_FORMAT, "merge %zu is neither \"left right\" nor a pair", rank);
    return qv_bpe_add_merge(bpe, text, (size_t)(space - text), space + 1, strlen(space + 1),
                            (uint32_t)rank);
}

static qv_status read_model(qv_tokenizer *tok, json_t *model, json_t *added)
{
    QV_TRY(check_model(model));
    json_t *vocab = json_object_get(model, "vocab"), *merges = json_object_get(model, "merges");
    if (!json_is_object(vocab) || !json_is_array(merges))
        return qv_fail(QV_ERR_FORMAT, "tokenizer.json: model lacks vocab or merges");
    int64_t max_id;
    QV_TRY(measure_ids(vocab, added, &max_id));
    QV_TRY(qv_bpe_init(&tok->bpe, &tok->arena, (size_t)(max_id + 1),
                       json_object_size(vocab) + json_array_size(added), json_array_size(merges)));
    const char *text;
    size_t len, rank;
    json_t *value;
    json_object_keylen_foreach(vocab, text, len, value) QV_TRY(
        qv_bpe_add(&tok->bpe, &tok->arena, text, len, (int32_t)json_integer_value(value), true));
    json_array_foreach(merges, rank, value) QV_TRY(read_merge(&tok->bpe, value, rank));
    return QV_OK;
}

/* ---- added_tokens ---------------------------------------------------------------------------- */

static qv_status read_added_token(qv_tokenizer *tok, json_t *obj)
{
    static const char *const where = "tokenizer.json: added_tokens";
    qv_added_token *t = &tok->added[tok->n_added];
    int64_t id;
    const char *content;
    QV_TRY(qv_json_get_int(obj, "id", where, &id));
    QV_TRY(qv_json_get_str(obj, "content", where, &content));
    QV_TRY(qv_json_opt_bool(obj, "special", where, &t->special));
    QV_TRY(qv_json_opt_bool(obj, "lstrip", where, &t->lstrip));
    QV_TRY(qv_json_opt_bool(obj, "rstrip", where, &t->rstrip));
    QV_TRY(qv_json_opt_bool(obj, "single_word", where, &t->single_word));
    t->normalized = !t->special;
    QV_TRY(qv_json_opt_bool(obj, "normalized", where, &t->normalized));
    QV_TRY(check_keys(obj, where, "id", "content", "special", "lstrip", "rstrip", "single_word",
                      "normalized", NULL));
    t->id = (int32_t)id;
    t->len = strlen(content);
    if (t->len == 0)
        return qv_fail(QV_ERR_FORMAT, "%s: token %d is empty", where, t->id);
    int32_t known = qv_bpe_find(&tok->bpe, content, t->len);
    if (known >= 0 && known != t->id)
        return qv_fail(QV_ERR_FORMAT, "%s: '%s' has id %d here and %d in the vocabulary", where,
                       content, t->id, known);
    if (known < 0)
        QV_TRY(qv_bpe_add(&tok->bpe, &tok->arena, content, t->len, t->id, false));
    qv_vocab_entry *entry = &tok->bpe.entries[t->id];
    t->content = entry->text;
    if (t->special)
        entry->flags |= QV_TOKEN_SPECIAL;
    tok->n_added++;
    return QV_OK;
}

static int compare_patterns(const void *a, const void *b)
{
    const qv_added_pattern *x = a, *y = b;
    size_t len = x->len < y->len ? x->len : y->len;
    int order = memcmp(x->content, y->content, len);
    if (order == 0)
        order = x->len < y->len ? -1 : x->len > y->len;
    /* Of two that look alike after normalization the later one counts. */
    return order ? order : x->token < y->token ? 1 : -1;
}

/* Collect the added tokens that match raw, or normalized, text. */
static qv_status make_matcher(qv_tokenizer *tok, bool normalized, qv_added_matcher *m)
{
    m->sorted = QV_ARENA_ARRAY(&tok->arena, qv_added_pattern, tok->n_added);
    if (!m->sorted)
        return qv_fail(QV_ERR_NOMEM, "no memory for %zu added tokens", tok->n_added);
    qv_text_buffer text = {0};
    qv_status status = QV_OK;
    for (size_t i = 0; i < tok->n_added && status == QV_OK; i++) {
        const qv_added_token *t = &tok->added[i];
        if (t->normalized != normalized)
            continue;
        qv_added_pattern pattern = {.content = t->content, .len = t->len, .token = t};
        if (normalized) {
            status = qv_tokenizer_normalize(tok, t->content, t->len, &text);
            pattern.content = qv_arena_strndup(&tok->arena, text.data ? text.data : "", text.len);
            pattern.len = text.len;
            if (status == QV_OK && !pattern.content)
                status = qv_fail(QV_ERR_NOMEM, "no memory for %zu added tokens", tok->n_added);
        }
        if (status != QV_OK || pattern.len == 0)
            continue;
        m->first_byte[(uint8_t)pattern.content[0]] = true;
        m->sorted[m->n++] = pattern;
    }
    free(text.data);
    QV_TRY(status);
    qsort(m->sorted, m->n, sizeof *m->sorted, compare_patterns);
    size_t n = 0;
    for (size_t i = 0; i < m->n; i++) {
        const qv_added_pattern *p = &m->sorted[i], *last = n > 0 ? &m->sorted[n - 1] : NULL;
        if (!last || last->len != p->len || memcmp(last->content, p->content, p->len) != 0)
            m->sorted[n++] = *p;
    }
    m->n = n;
    return QV_OK;
}

static qv_status read_added_tokens(qv_tokenizer *tok, json_t *added)
{
    tok->added = QV_ARENA_ARRAY(&tok->arena, qv_added_token, json_array_size(added));
    if (!tok->added)
        return qv_fail(QV_ERR_NOMEM, "no memory for %zu added tokens", json_array_size(added));
    size_t i;
    json_t *obj;
    json_array_foreach(added, i, obj) QV_TRY(read_added_token(tok, obj));
    QV_TRY(make_matcher(tok, false, &tok->raw));
    return make_matcher(tok, true, &tok->normalized);
}

/* ---- normalizer ------------------------------------------------------------------------------ */

static qv_status read_normalizer(qv_tokenizer *tok, json_t *section, unsigned depth)
{
    static const char *const where = "tokenizer.json: normalizer";
    static const struct {
        const char *type;
        utf8proc_option_t form;
    } forms[] = {
        {"NFC", UTF8PROC_STABLE | UTF8PROC_COMPOSE},
        {"NFD", UTF8PROC_STABLE | UTF8PROC_DECOMPOSE},
        {"NFKC", UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT},
        {"NFKD", UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT},
    };
    if (is_absent(section))
        return QV_OK;
    const char *type;
    QV_TRY(get_type(section, where, &type));
    if (strcmp(type, "Sequence") == 0 && depth == 0) {
        json_t *list, *part;
        size_t i;
        QV_TRY(get_list(section, "normalizers", where, &list));
        json_array_foreach(list, i, part) QV_TRY(read_normalizer(tok, part, depth + 1));
        return QV_OK;
    }
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++) {
        if (strcmp(type, forms[i].type) != 0)
            continue;
        if (tok->n_forms == QV_PIPELINE_MAX)
            return qv_fail(QV_ERR_LIMIT, "%s has more than %d steps", where, QV_PIPELINE_MAX);
        tok->forms[tok->n_forms++] = forms[i].form;
        return check_keys(section, where, "type", NULL);
    }
    return unsupported_type(where, type);
}

/* ---- pre_tokenizer --------------------------------------------------------------------------- */

#define PRE_TOKENIZER "tokenizer.json: pre_tokenizer"

/* The pattern of GPT-2, which ByteLevel has built in. */
#define GPT2_PATTERN                                                                               \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

static qv_status add_step(qv_tokenizer *tok, qv_split_behavior behavior, const char *pattern,
                          size_t len, bool literal, qv_split_step **out)
{
    if (tok->n_steps == QV_PIPELINE_MAX)
        return qv_fail(QV_ERR_LIMIT, PRE_TOKENIZER " has more than %d steps", QV_PIPELINE_MAX);
    qv_split_step *step = &tok->steps[tok->n_steps];
    *step = (qv_split_step){.behavior = behavior};
    if (pattern)
        QV_TRY(qv_split_pattern_compile(pattern, len, literal, &step->pattern));
    tok->n_steps++;
    *out = step;
    return QV_OK;
}

static qv_status read_split(qv_tokenizer *tok, json_t *section)
{
    static const char *const where = PRE_TOKENIZER " Split";
    static const char *const behaviors[] = {
        [QV_SPLIT_ISOLATED] = "Isolated",
        [QV_SPLIT_REMOVED] = "Removed",
        [QV_SPLIT_MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
        [QV_SPLIT_MERGED_WITH_NEXT] = "MergedWithNext",
        [QV_SPLIT_CONTIGUOUS] = "Contiguous",
    };
    const char *name;
    bool invert = false;
    QV_TRY(qv_json_get_str(section, "behavior", where, &name));
    QV_TRY(qv_json_opt_bool(section, "invert", where, &invert));
    QV_TRY(check_keys(section, where, "type", "pattern", "behavior", "invert", NULL));
    json_t *pattern = json_object_get(section, "pattern");
    json_t *regex = json_object_get(pattern, "Regex"), *string = json_object_get(pattern, "String");
    json_t *text = regex ? regex : string;
    if (!json_is_string(text) || json_object_size(pattern) != 1)
        return qv_fail(QV_ERR_FORMAT, "%s: 'pattern' is neither a Regex nor a String", where);
    for (size_t i = 0; i < sizeof behaviors / sizeof behaviors[0]; i++) {
        if (strcmp(name, behaviors[i]) != 0)
            continue;
        qv_split_step *step;
        QV_TRY(add_step(tok, (qv_split_behavior)i, json_string_value(text),
                        json_string_length(text), text == string, &step));
        step->invert = invert;
        return QV_OK;
    }
    return unsupported_type(PRE_TOKENIZER " Split behavior", name);
}

static qv_status read_digits(qv_tokenizer *tok, json_t *section)
{
    bool individual = false;
    QV_TRY(qv_json_opt_bool(section, "individual_digits", PRE_TOKENIZER " Digits", &individual));
    QV_TRY(check_keys(section, PRE_TOKENIZER " Digits", "type", "individual_digits", NULL));
    qv_split_step *step;
    return add_step(tok, individual ? QV_SPLIT_ISOLATED : QV_SPLIT_CONTIGUOUS, "\\p{N}", 5, false,
                    &step);
}

static qv_status read_byte_level(qv_tokenizer *tok, json_t *section)
{
    static const char *const where = PRE_TOKENIZER " ByteLevel";
    bool add_prefix_space = true, use_regex = true;
    QV_TRY(qv_json_opt_bool(section, "add_prefix_space", where, &add_prefix_space));
    QV_TRY(qv_json_opt_bool(section, "use_regex", where, &use_regex));
    QV_TRY(
        check_keys(section, where, "type", "add_prefix_space", "trim_offsets", "use_regex", NULL));
    if (!add_prefix_space && !use_regex)
        return QV_OK;
    qv_split_step *step;
    QV_TRY(add_step(tok, QV_SPLIT_ISOLATED, use_regex ? GPT2_PATTERN : NULL, strlen(GPT2_PATTERN),
                    false, &step));
    step->prefix_space = add_prefix_space;
    return QV_OK;
}

/* Read one pre-tokenizer. ByteLevel spells out the bytes, so nothing can come after it, and without
 * it the vocabulary is not a byte-level one. */
static qv_status read_pre_tokenizer(qv_tokenizer *tok, json_t *section, unsigned depth,
                                    bool *byte_level)
{
    const char *type;
    QV_TRY(get_type(section, PRE_TOKENIZER, &type));
    if (*byte_level)
        return qv_fail(QV_ERR_UNSUPPORTED, PRE_TOKENIZER " '%s' after ByteLevel is not supported",
                       type);
    if (strcmp(type, "Split") == 0)
        return read_split(tok, section);
    if (strcmp(type, "Digits") == 0)
        return read_digits(tok, section);
    if (strcmp(type, "ByteLevel") == 0) {
        *byte_level = true;
        return read_byte_level(tok, section);
    }
    if (strcmp(type, "Sequence") == 0 && depth == 0) {
        json_t *list, *part;
        size_t i;
        QV_TRY(get_list(section, "pretokenizers", PRE_TOKENIZER, &list));
        json_array_foreach(list, i, part)
            QV_TRY(read_pre_tokenizer(tok, part, depth + 1, byte_level));
        return QV_OK;
    }
    return unsupported_type(PRE_TOKENIZER, type);
}

/* ---- post_processor and decoder -------------------------------------------------------------- */

#define POST_PROCESSOR "tokenizer.json: post_processor"

/* Append the ids of a special token of a template. */
static qv_status read_template_token(qv_tokenizer *tok, json_t *specials, const char *name,
                                     int32_t *ids, size_t *n, size_t max)
{
    json_t *list = json_object_get(json_object_get(specials, name), "ids"), *value;
    size_t i;
    if (!json_is_array(list))
        return qv_fail(QV_ERR_FORMAT, POST_PROCESSOR " has no ids for special token '%s'", name);
    json_array_foreach(list, i, value)
    {
        int64_t id = json_integer_value(value);
        if (!json_is_integer(value) || id < 0 || (size_t)id >= tok->bpe.n_ids)
            return qv_fail(QV_ERR_FORMAT, POST_PROCESSOR " special token '%s' has no valid id",
                           name);
        if (*n == max)
            return qv_fail(QV_ERR_LIMIT, POST_PROCESSOR " adds more than %zu tokens", max);
        ids[(*n)++] = (int32_t)id;
    }
    return QV_OK;
}

enum { TEMPLATE_MAX = 64 };

/* Put what one template adds around what is added already. */
static qv_status wrap_template(qv_tokenizer *tok, const int32_t *ids, size_t n_before, size_t n)
{
    size_t n_after = n - n_before;
    int32_t *before = QV_ARENA_ARRAY(&tok->arena, int32_t, n_before + tok->n_before);
    int32_t *after = QV_ARENA_ARRAY(&tok->arena, int32_t, n_after + tok->n_after);
    if (!before || !after)
        return qv_fail(QV_ERR_NOMEM, "no memory for the post-processor");
    memcpy(before, ids, n_before * sizeof *ids);
    if (tok->n_before > 0)
        memcpy(before + n_before, tok->before, tok->n_before * sizeof *ids);
    if (tok->n_after > 0)
        memcpy(after, tok->after, tok->n_after * sizeof *ids);
    memcpy(after + tok->n_after, ids + n_before, n_after * sizeof *ids);
    tok->before = before;
    tok->after = after;
    tok->n_before += n_before;
    tok->n_after += n_after;
    return QV_OK;
}

static qv_status read_template(qv_tokenizer *tok, json_t *section)
{
    static const char *const where = POST_PROCESSOR " TemplateProcessing";
    json_t *single = json_object_get(section, "single"), *part;
    json_t *specials = json_object_get(section, "special_tokens");
    int32_t ids[TEMPLATE_MAX];
    size_t i, n = 0, n_before = 0, n_sequences = 0;
    if (!json_is_array(single))
        return qv_fail(QV_ERR_FORMAT, "%s: 'single' is not a list", where);
    QV_TRY(check_keys(section, where, "type", "single", "pair", "special_tokens", NULL));
    json_array_foreach(single, i, part)
    {
        json_t *special = json_object_get(part, "SpecialToken");
        if (special) {
            const char *name;
            QV_TRY(qv_json_get_str(special, "id", where, &name));
            QV_TRY(read_template_token(tok, specials, name, ids, &n, TEMPLATE_MAX));
        } else if (json_object_get(part, "Sequence")) {
            n_before = n;
            n_sequences++;
        } else {
            return qv_fail(QV_ERR_FORMAT, "%s: 'single' holds neither SpecialToken nor Sequence",
                           where);
        }
    }
    if (n_sequences != 1)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: 'single' holds %zu sequences", where, n_sequences);
    return wrap_template(tok, ids, n_before, n);
}

static qv_status read_post_processor(qv_tokenizer *tok, json_t *section, unsigned depth)
{
    if (is_absent(section))
        return QV_OK;
    const char *type;
    QV_TRY(get_type(section, POST_PROCESSOR, &type));
    if (strcmp(type, "ByteLevel") == 0) /* only moves offsets, which are not kept here */
        return check_keys(section, POST_PROCESSOR, "type", "add_prefix_space", "trim_offsets",
                          "use_regex", NULL);
    if (strcmp(type, "TemplateProcessing") == 0)
        return read_template(tok, section);
    if (strcmp(type, "Sequence") == 0 && depth == 0) {
        json_t *list, *part;
        size_t i;
        QV_TRY(get_list(section, "processors", POST_PROCESSOR, &list));
        json_array_foreach(list, i, part) QV_TRY(read_post_processor(tok, part, depth + 1));
        return QV_OK;
    }
    return unsupported_type(POST_PROCESSOR, type);
}

static qv_status check_decoder(json_t *section)
{
    static const char *const where = "tokenizer.json: decoder";
    const char *type;
    QV_TRY(get_type(section, where, &type));
    if (strcmp(type, "Sequence") == 0) {
        json_t *list;
        QV_TRY(get_list(section, "decoders", where, &list));
        if (json_array_size(list) != 1)
            return qv_fail(QV_ERR_UNSUPPORTED, "%s has %zu steps", where, json_array_size(list));
        section = json_array_get(list, 0);
        QV_TRY(get_type(section, where, &type));
    }
    if (strcmp(type, "ByteLevel") != 0)
        return unsupported_type(where, type);
    return check_keys(section, where, "type", "add_prefix_space", "trim_offsets", "use_regex",
                      NULL);
}

/* ---- The file, and the directory ------------------------------------------------------------- */

/* Truncation and padding belong to training batches; callers bound their texts themselves. */
static qv_status read_root(qv_tokenizer *tok, json_t *root)
{
    if (!json_is_object(root))
        return qv_fail(QV_ERR_FORMAT, "tokenizer.json is not an object");
    QV_TRY(check_keys(root, "tokenizer.json", "version", "truncation", "padding", "added_tokens",
                      "normalizer", "pre_tokenizer", "post_processor", "decoder", "model", NULL));
    json_t *added = json_object_get(root, "added_tokens"), *model = json_object_get(root, "model");
    if (!is_absent(added) && !json_is_array(added))
        return qv_fail(QV_ERR_FORMAT, "tokenizer.json: added_tokens is not a list");
    bool byte_level = false, ignore_merges = false;
    QV_TRY(read_model(tok, model, added));
    QV_TRY(read_normalizer(tok, json_object_get(root, "normalizer"), 0));
    QV_TRY(read_added_tokens(tok, added));
    QV_TRY(read_pre_tokenizer(tok, json_object_get(root, "pre_tokenizer"), 0, &byte_level));
    if (!byte_level)
        return qv_fail(QV_ERR_UNSUPPORTED, PRE_TOKENIZER " has no ByteLevel: not a byte-level BPE");
    QV_TRY(read_post_processor(tok, json_object_get(root, "post_processor"), 0));
    QV_TRY(check_decoder(json_object_get(root, "decoder")));
    QV_TRY(qv_json_opt_bool(model, "ignore_merges", "tokenizer.json: model", &ignore_merges));
    return qv_bpe_finish(&tok->bpe, ignore_merges);
}

/* A token that tokenizer_config.json names, as a string or as {"content": ...}. */
static qv_status read_named_token(qv_tokenizer *tok, json_t *config, const char *key, int32_t *id)
{
    json_t *value = json_object_get(config, key);
    if (is_absent(value))
        return QV_OK;
    if (json_is_object(value))
        value = json_object_get(value, "content");
    if (!json_is_string(value))
        return qv_fail(QV_ERR_FORMAT, "%s is neither a string nor an added token", key);
    *id = qv_bpe_find(&tok->bpe, json_string_value(value), json_string_length(value));
    if (*id < 0)
        return qv_fail(QV_ERR_FORMAT, "%s '%s' is not in the vocabulary", key,
                       json_string_value(value));
    return QV_OK;
}

static qv_status read_config(qv_tokenizer *tok, const char *dir)
{
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/tokenizer_config.json", dir) >= (int)sizeof path)
        return qv_fail(QV_ERR_LIMIT, "%s: path too long", dir);
    json_t *config;
    qv_status status = qv_json_load_file(path, CONFIG_JSON_MAX, &config);
    if (status == QV_ERR_NOT_FOUND)
        return QV_OK;
    QV_TRY(status);
    status = read_named_token(tok, config, "bos_token", &tok->bos);
    if (status == QV_OK)
        status = read_named_token(tok, config, "eos_token", &tok->eos);
    if (status == QV_OK)
        status = read_named_token(tok, config, "pad_token", &tok->pad);
    json_decref(config);
    return status == QV_OK ? QV_OK : qv_fail_prefix(status, "%s", path);
}

static qv_status open_file(const char *path, qv_tokenizer *tok)
{
    json_t *root;
    QV_TRY(qv_json_load_file(path, TOKENIZER_JSON_MAX, &root));
    qv_status status = read_root(tok, root);
    json_decref(root);
    return status == QV_OK ? QV_OK : qv_fail_prefix(status, "%s", path);
}

qv_status qv_tokenizer_open(const char *path, qv_tokenizer **out)
{
    struct stat st;
    if (stat(path, &st) != 0)
        return qv_fail(errno == ENOENT ? QV_ERR_NOT_FOUND : QV_ERR_IO, "%s: %s", path,
                       strerror(errno));
    char file[PATH_MAX];
    bool is_dir = S_ISDIR(st.st_mode);
    if (snprintf(file, sizeof file, is_dir ? "%s/tokenizer.json" : "%s", path) >= (int)sizeof file)
        return qv_fail(QV_ERR_LIMIT, "%s: path too long", path);
    qv_tokenizer *tok = calloc(1, sizeof *tok);
    if (!tok)
        return qv_fail(QV_ERR_NOMEM, "no memory for a tokenizer");
    qv_arena_init(&tok->arena, 1 << 20, 0);
    tok->bos = tok->eos = tok->pad = -1;
    qv_status status = open_file(file, tok);
    if (status == QV_OK && is_dir)
        status = read_config(tok, path);
    if (status != QV_OK) {
        qv_tokenizer_close(tok);
        return status;
    }
    *out = tok;
    return QV_OK;
}

void qv_tokenizer_close(qv_tokenizer *tok)
{
    if (!tok)
        return;
    for (size_t i = 0; i < tok->n_steps; i++)
        qv_split_pattern_free(tok->steps[i].pattern);
    qv_arena_deinit(&tok->arena);
    free(tok);
}
