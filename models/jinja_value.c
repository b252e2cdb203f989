/* What values are: construction, truth, equality, order, length, iteration, dicts, JSON in.
 */
#include "models/jinja.h"
#include "models/unicode.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* ---- Bounds and errors ----------------------------------------------------------------------- */

static void format_error(const qv_jrun *run, char *out, const char *format, va_list args)
{
    char text[QV_ERROR_MAX];
    vsnprintf(text, sizeof text, format, args);
    /* Who sent the messages need not know where the model lies. */
    const char *slash = strrchr(run->program->name, '/');
    /* Room for the line is kept at the end of a long sentence. */
    snprintf(out, QV_ERROR_MAX, "%.*s (%.64s, line %u)", QV_ERROR_MAX - 128, text,
             slash ? slash + 1 : run->program->name, run->line);
}

qv_status qv_j_fail(qv_jrun *run, const char *format, ...)
{
    char text[QV_ERROR_MAX];
    va_list args;
    va_start(args, format);
    format_error(run, text, format, args);
    va_end(args);
    return qv_fail(QV_ERR_ARG, "%s", text);
}

qv_status qv_j_limit(qv_jrun *run, const char *format, ...)
{
    char text[QV_ERROR_MAX];
    va_list args;
    va_start(args, format);
    format_error(run, text, format, args);
    va_end(args);
    return qv_fail(QV_ERR_LIMIT, "%s", text);
}

qv_status qv_j_charge(qv_jrun *run, size_t bytes)
{
    run->steps += 1 + bytes / 64;
    if (run->steps > run->limits.max_steps)
        return qv_j_limit(run, "the chat template takes more than %" PRIu64 " steps",
                          run->limits.max_steps);
    return QV_OK;
}

qv_status qv_j_enter(qv_jrun *run)
{
    if (run->depth >= run->limits.max_depth)
        return qv_j_limit(run, "the chat template nests deeper than %u", run->limits.max_depth);
    run->depth++;
    return QV_OK;
}

qv_status qv_j_alloc(qv_jrun *run, size_t n, size_t size, void **out)
{
    size_t bytes;
    *out = NULL;
    if (!__builtin_mul_overflow(n, size, &bytes))
        *out = qv_arena_alloc(&run->arena, bytes, _Alignof(max_align_t));
    if (!*out)
        return qv_j_limit(run, "the chat template needs more than %zu bytes of memory",
                          run->limits.max_memory_bytes);
    return qv_j_charge(run, bytes);
}

/* ---- Construction ---------------------------------------------------------------------------- */

qv_status qv_j_seq(qv_jrun *run, qv_jtype type, size_t n, qv_jvalue *out)
{
    void *seq, *items;
    QV_TRY(qv_j_alloc(run, 1, sizeof(qv_jseq), &seq));
    QV_TRY(qv_j_alloc(run, n, sizeof(qv_jvalue), &items));
    *(qv_jseq *)seq = (qv_jseq){.items = items, .n = n, .name = "generator"};
    *out = (qv_jvalue){.type = (uint8_t)type, .seq = seq};
    return QV_OK;
}

qv_status qv_j_pair(qv_jrun *run, qv_jvalue a, qv_jvalue b, qv_jvalue *out)
{
    QV_TRY(qv_j_seq(run, QV_J_TUPLE, 2, out));
    out->seq->items[0] = a;
    out->seq->items[1] = b;
    return QV_OK;
}

qv_status qv_j_range(qv_jrun *run, int64_t start, int64_t stop, int64_t step, qv_jvalue *out)
{
    if (step == 0)
        return qv_j_fail(run, "range() arg 3 must not be zero");
    /* In 128 bits the length cannot overflow. */
    __int128 n = step > 0 ? ((__int128)stop - start + step - 1) / step
                          : ((__int128)start - stop - step - 1) / -(__int128)step;
    n = n < 0 ? 0 : n;
    if (n > QV_J_MAX_RANGE)
        return qv_j_limit(run, "range() gives more than %d numbers", QV_J_MAX_RANGE);
    QV_TRY(qv_j_seq(run, QV_J_RANGE, (size_t)n, out));
    for (size_t i = 0; i < out->seq->n; i++)
        out->seq->items[i] = qv_j_int(start + (int64_t)i * step);
    out->seq->start = start;
    out->seq->stop = stop;
    out->seq->step = step;
    return QV_OK;
}

static qv_status new_undefined(qv_jrun *run, qv_jundefined why, qv_jvalue *out)
{
    void *u;
    QV_TRY(qv_j_alloc(run, 1, sizeof why, &u));
    *(qv_jundefined *)u = why;
    *out = (qv_jvalue){.type = QV_J_UNDEFINED, .undefined = u};
    return QV_OK;
}

qv_status qv_j_undefined_hint(qv_jrun *run, const char *hint, qv_jvalue *out)
{
    return new_undefined(run, (qv_jundefined){.hint = hint}, out);
}

qv_status qv_j_undefined(qv_jrun *run, const char *type, qv_jvalue name, qv_jvalue *out)
{
    return new_undefined(run, (qv_jundefined){.name = name, .type = type}, out);
}

qv_status qv_j_fail_undefined(qv_jrun *run, qv_jvalue v)
{
    const qv_jundefined *why = v.undefined;
    if (why->hint)
        return qv_j_fail(run, "%s", why->hint);
    qv_jstr name;
    QV_TRY(qv_j_repr(run, why->name, &name));
    if (!why->type)
        return qv_j_fail(run, "%.*s is undefined", QV_JSTR_ARG(name));
    if (why->name.type == QV_J_STR)
        return qv_j_fail(run, "'%s' has no attribute %.*s", why->type, QV_JSTR_ARG(name));
    return qv_j_fail(run, "%s has no element %.*s", why->type, QV_JSTR_ARG(name));
}

/* ---- Types ----------------------------------------------------------------------------------- */

const char *qv_j_type_name(qv_jvalue v)
{
    switch ((qv_jtype)v.type) {
    case QV_J_ABSENT:
    case QV_J_NONE:
        return "NoneType";
    case QV_J_UNDEFINED:
        return "Undefined";
    case QV_J_BOOL:
        return "bool";
    case QV_J_INT:
        return "int";
    case QV_J_FLOAT:
        return "float";
    case QV_J_STR:
        return v.safe ? "Markup" : "str";
    case QV_J_LIST:
        return "list";
    case QV_J_TUPLE:
        return "tuple";
    case QV_J_DICT:
        return "dict";
    case QV_J_VIEW:
    case QV_J_ITER:
        return v.seq->name;
    case QV_J_RANGE:
        return "range";
    case QV_J_NAMESPACE:
        return "Namespace";
    case QV_J_MACRO:
        return "Macro";
    case QV_J_FUNCTION:
        return "function";
    case QV_J_METHOD:
        return "builtin_function_or_method";
    case QV_J_LOOP:
        return "LoopContext";
    }
    return "object";
}

const char *qv_j_object_name(qv_jvalue v)
{
    static const struct {
        const char *type, *object;
    } names[] = {
        {"NoneType", "None"},
        {"bool", "bool object"},
        {"int", "int object"},
        {"float", "float object"},
        {"str", "str object"},
        {"Markup", "markupsafe.Markup object"},
        {"list", "list object"},
        {"tuple", "tuple object"},
        {"dict", "dict object"},
        {"range", "range object"},
        {"Namespace", "jinja2.utils.Namespace object"},
        {"Macro", "jinja2.runtime.Macro object"},
        {"LoopContext", "jinja2.runtime.LoopContext object"},
        {"generator", "generator object"},
    };
    const char *type = qv_j_type_name(v);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(names[i].type, type) == 0)
            return names[i].object;
    }
    return "object";
}

bool qv_j_truth(qv_jvalue v)
{
    switch ((qv_jtype)v.type) {
    case QV_J_ABSENT:
    case QV_J_UNDEFINED:
    case QV_J_NONE:
        return false;
    case QV_J_BOOL:
        return v.boolean;
    case QV_J_INT:
        return v.integer != 0;
    case QV_J_FLOAT:
        return v.real != 0;
    case QV_J_STR:
        return v.len > 0;
    case QV_J_LIST:
    case QV_J_TUPLE:
    case QV_J_VIEW:
    case QV_J_RANGE:
        return v.seq->n > 0;
    case QV_J_DICT:
        return v.dict->n > 0;
    default:
        return true;
    }
}

bool qv_j_as_int(qv_jvalue v, int64_t *i)
{
    *i = v.type == QV_J_INT ? v.integer : v.type == QV_J_BOOL ? v.boolean : 0;
    return v.type == QV_J_INT || v.type == QV_J_BOOL;
}

bool qv_j_as_float(qv_jvalue v, double *f)
{
    int64_t i;
    if (v.type == QV_J_FLOAT) {
        *f = v.real;
        return true;
    }
    bool is_int = qv_j_as_int(v, &i);
    *f = (double)i;
    return is_int;
}

static bool is_seq(qv_jvalue v)
{
    return v.type == QV_J_LIST || v.type == QV_J_TUPLE || v.type == QV_J_RANGE ||
           v.type == QV_J_VIEW || v.type == QV_J_ITER;
}

/* ---- Equality and order ---------------------------------------------------------------------- */

/* Order of two numbers, exactly. */
static int compare_numbers(qv_jvalue a, qv_jvalue b, bool *unordered)
{
    int64_t i, j;
    double x, y;
    *unordered = false;
    if (qv_j_as_int(a, &i) && qv_j_as_int(b, &j))
        return i < j ? -1 : i > j;
    qv_j_as_float(a, &x);
    qv_j_as_float(b, &y);
    *unordered = isnan(x) || isnan(y);
    if (x != y || a.type == b.type)
        return x < y ? -1 : x > y;
    /* Equal as floats, though an integer may have been rounded: compare in long double, which holds
     * 64 bits. */
    long double p = a.type == QV_J_FLOAT ? (long double)a.real : (long double)a.integer;
    long double q = b.type == QV_J_FLOAT ? (long double)b.real : (long double)b.integer;
    return p < q ? -1 : p > q;
}

static qv_status equal_dicts(qv_jrun *run, const qv_jdict *a, const qv_jdict *b, bool *out)
{
    *out = a->n == b->n;
    for (uint32_t i = 0; i < a->n && *out; i++) {
        qv_jentry *other;
        QV_TRY(qv_j_dict_find(run, b, a->entries[i].key, &other));
        *out = other != NULL;
        if (other)
            QV_TRY(qv_j_equal(run, a->entries[i].value, other->value, out));
    }
    return QV_OK;
}

static qv_status equal_seqs(qv_jrun *run, const qv_jseq *a, const qv_jseq *b, bool *out)
{
    *out = a->n == b->n;
    for (size_t i = 0; i < a->n && *out; i++)
        QV_TRY(qv_j_equal(run, a->items[i], b->items[i], out));
    return QV_OK;
}

qv_status qv_j_equal(qv_jrun *run, qv_jvalue a, qv_jvalue b, bool *out)
{
    double x, y;
    QV_TRY(qv_j_charge(run, 0));
    if (qv_j_as_float(a, &x) && qv_j_as_float(b, &y)) {
        bool unordered;
        *out = compare_numbers(a, b, &unordered) == 0 && !unordered;
        return QV_OK;
    }
    *out = false;
    if (a.type != b.type)
        return QV_OK;
    switch ((qv_jtype)a.type) {
    case QV_J_STR:
        *out = qv_j_str_equal(qv_j_text(a), qv_j_text(b));
        return qv_j_charge(run, *out ? a.len : 0);
    case QV_J_LIST:
    case QV_J_TUPLE:
    case QV_J_RANGE:
    case QV_J_DICT:
        QV_TRY(qv_j_enter(run));
        QV_TRY(a.type == QV_J_DICT ? equal_dicts(run, a.dict, b.dict, out)
                                   : equal_seqs(run, a.seq, b.seq, out));
        qv_j_leave(run);
        return QV_OK;
    case QV_J_UNDEFINED:
    case QV_J_NONE:
        *out = true;
        return QV_OK;
    default:
        *out = a.seq == b.seq;
        return QV_OK;
    }
}

static qv_status compare_seqs(qv_jrun *run, const qv_jseq *a, const qv_jseq *b, const char *op,
                              int *order, bool *unordered)
{
    for (size_t i = 0; i < a->n && i < b->n; i++) {
        bool equal;
        QV_TRY(qv_j_equal(run, a->items[i], b->items[i], &equal));
        if (!equal)
            return qv_j_compare(run, a->items[i], b->items[i], op, order, unordered);
    }
    *order = a->n < b->n ? -1 : a->n > b->n;
    return QV_OK;
}

qv_status qv_j_compare(qv_jrun *run, qv_jvalue a, qv_jvalue b, const char *op, int *order,
                       bool *unordered)
{
    double x, y;
    *unordered = false;
    QV_TRY(qv_j_charge(run, 0));
    if (a.type == QV_J_UNDEFINED || b.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, a.type == QV_J_UNDEFINED ? a : b);
    if (qv_j_as_float(a, &x) && qv_j_as_float(b, &y)) {
        *order = compare_numbers(a, b, unordered);
        return QV_OK;
    }
    if (a.type == QV_J_STR && b.type == QV_J_STR) {
        *order = qv_j_str_compare(qv_j_text(a), qv_j_text(b));
        return qv_j_charge(run, a.len < b.len ? a.len : b.len);
    }
    if (a.type == b.type && (a.type == QV_J_LIST || a.type == QV_J_TUPLE)) {
        QV_TRY(qv_j_enter(run));
        QV_TRY(compare_seqs(run, a.seq, b.seq, op, order, unordered));
        qv_j_leave(run);
        return QV_OK;
    }
    return qv_j_fail(run, "'%s' not supported between instances of '%s' and '%s'", op,
                     qv_j_type_name(a), qv_j_type_name(b));
}

qv_status qv_j_contains(qv_jrun *run, qv_jvalue container, qv_jvalue v, bool *out)
{
    *out = false;
    if (container.type == QV_J_STR) {
        if (v.type != QV_J_STR)
            return qv_j_fail(run, "'in <string>' requires string as left operand, not %s",
                             qv_j_type_name(v));
        *out = qv_j_find(qv_j_text(container), qv_j_text(v)) >= 0;
        return qv_j_charge(run, container.len);
    }
    if (container.type == QV_J_DICT) {
        qv_jentry *entry;
        QV_TRY(qv_j_dict_find(run, container.dict, v, &entry));
        *out = entry != NULL;
        return QV_OK;
    }
    if (container.type != QV_J_UNDEFINED && !is_seq(container))
        return qv_j_fail(run, "argument of type '%s' is not iterable", qv_j_type_name(container));
    if (container.type == QV_J_UNDEFINED)
        return QV_OK;
    qv_jseq *seq = container.seq;
    size_t i = container.type == QV_J_ITER ? seq->pos : 0;
    while (i < seq->n && !*out)
        QV_TRY(qv_j_equal(run, seq->items[i++], v, out));
    if (container.type == QV_J_ITER)
        seq->pos = i;
    return QV_OK;
}

qv_status qv_j_length(qv_jrun *run, qv_jvalue v, size_t *out)
{
    if (v.type == QV_J_STR) {
        *out = qv_unicode_count(v.str, v.len);
        return qv_j_charge(run, v.len);
    }
    *out = 0;
    if (v.type == QV_J_UNDEFINED)
        return QV_OK;
    if (v.type == QV_J_DICT)
        *out = v.dict->n;
    else if (is_seq(v) && v.type != QV_J_ITER)
        *out = v.seq->n;
    else
        return qv_j_fail(run, "object of type '%s' has no len()", qv_j_type_name(v));
    return QV_OK;
}

/* The characters of a string as strings, none of them safe. */
static qv_status characters(qv_jrun *run, qv_jvalue v, qv_jvalue **items, size_t *n)
{
    void *memory;
    *n = qv_unicode_count(v.str, v.len);
    QV_TRY(qv_j_alloc(run, *n, sizeof(qv_jvalue), &memory));
    *items = memory;
    for (size_t i = 0, pos = 0, size; i < *n; i++, pos += size) {
        qv_unicode_get(v.str + pos, &size);
        (*items)[i] = qv_j_str(v.str + pos, size);
    }
    return QV_OK;
}

static qv_status keys(qv_jrun *run, const qv_jdict *dict, qv_jvalue **items, size_t *n)
{
    void *memory;
    QV_TRY(qv_j_alloc(run, dict->n, sizeof(qv_jvalue), &memory));
    *items = memory;
    *n = dict->n;
    for (uint32_t i = 0; i < dict->n; i++)
        (*items)[i] = dict->entries[i].key;
    return QV_OK;
}

qv_status qv_j_iterate(qv_jrun *run, qv_jvalue v, qv_jvalue **items, size_t *n)
{
    *items = NULL;
    *n = 0;
    if (v.type == QV_J_STR)
        return characters(run, v, items, n);
    if (v.type == QV_J_DICT)
        return keys(run, v.dict, items, n);
    if (v.type == QV_J_UNDEFINED)
        return QV_OK;
    if (!is_seq(v))
        return qv_j_fail(run, "'%s' object is not iterable", qv_j_type_name(v));
    size_t from = v.type == QV_J_ITER ? v.seq->pos : 0;
    *items = v.seq->items + from;
    *n = v.seq->n - from;
    if (v.type == QV_J_ITER)
        v.seq->pos = v.seq->n;
    return QV_OK;
}

/* ---- Dicts ----------------------------------------------------------------------------------- */

enum { LINEAR_MAX = 8 };

/* Equal values have equal hashes, whatever their types. */
static qv_status hash_value(qv_jrun *run, qv_jvalue v, uint64_t *out)
{
    double x;
    if (v.type == QV_J_STR) {
        *out = XXH3_64bits_withSeed(v.str, v.len, run->hash_seed);
        return QV_OK;
    }
    if (qv_j_as_float(v, &x)) {
        x = x == 0 ? 0 : x; /* of both zeros */
        *out = XXH3_64bits_withSeed(&x, sizeof x, run->hash_seed);
        return QV_OK;
    }
    switch ((qv_jtype)v.type) {
    case QV_J_LIST:
    case QV_J_DICT:
        return qv_j_fail(run, "unhashable type: '%s'", qv_j_type_name(v));
    case QV_J_TUPLE:
        *out = run->hash_seed + v.seq->n;
        QV_TRY(qv_j_enter(run));
        for (size_t i = 0; i < v.seq->n; i++) {
            uint64_t item;
            QV_TRY(hash_value(run, v.seq->items[i], &item));
            *out = (*out ^ item) * 0x9E3779B97F4A7C15u;
        }
        qv_j_leave(run);
        return QV_OK;
    case QV_J_UNDEFINED:
    case QV_J_NONE:
        *out = v.type;
        return QV_OK;
    default:
        *out = XXH3_64bits_withSeed(&v.seq, sizeof v.seq, run->hash_seed);
        return QV_OK;
    }
}

static qv_status find_entry(qv_jrun *run, const qv_jdict *dict, qv_jvalue key, uint64_t hash,
                            qv_jentry **out)
{
    uint32_t mask = 2 * dict->capacity - 1;
    *out = NULL;
    for (uint32_t i = dict->index ? (uint32_t)hash & mask : 0;;) {
        uint32_t at = dict->index ? dict->index[i] : i < dict->n ? i + 1 : 0;
        if (at == 0)
            return QV_OK;
        qv_jentry *entry = &dict->entries[at - 1];
        bool equal = false;
        if (entry->hash == hash)
            QV_TRY(qv_j_equal(run, entry->key, key, &equal));
        if (equal) {
            *out = entry;
            return QV_OK;
        }
        i = dict->index ? (i + 1) & mask : i + 1;
    }
}

static void index_entry(qv_jdict *dict, uint32_t at)
{
    uint32_t mask = 2 * dict->capacity - 1;
    uint32_t i = (uint32_t)dict->entries[at].hash & mask;
    while (dict->index[i] != 0)
        i = (i + 1) & mask;
    dict->index[i] = at + 1;
}

/* Make room for `n` entries; the capacity is a power of two. */
static qv_status reserve(qv_jrun *run, qv_jdict *dict, size_t n)
{
    size_t capacity = dict->capacity ? dict->capacity : 4;
    while (capacity < n)
        capacity *= 2;
    if (capacity == dict->capacity)
        return QV_OK;
    if (capacity > UINT32_MAX / 4)
        return qv_j_limit(run, "a dict has more than %u entries", UINT32_MAX / 4);
    void *entries, *index = NULL;
    QV_TRY(qv_j_alloc(run, capacity, sizeof(qv_jentry), &entries));
    if (dict->n > 0)
        memcpy(entries, dict->entries, dict->n * sizeof(qv_jentry));
    if (capacity > LINEAR_MAX) {
        QV_TRY(qv_j_alloc(run, 2 * capacity, sizeof(uint32_t), &index));
        memset(index, 0, 2 * capacity * sizeof(uint32_t));
    }
    dict->entries = entries;
    dict->index = index;
    dict->capacity = (uint32_t)capacity;
    for (uint32_t i = 0; index && i < dict->n; i++)
        index_entry(dict, i);
    return QV_OK;
}

qv_status qv_j_dict(qv_jrun *run, qv_jtype type, size_t n, qv_jvalue *out)
{
    void *dict;
    QV_TRY(qv_j_alloc(run, 1, sizeof(qv_jdict), &dict));
    *(qv_jdict *)dict = (qv_jdict){0};
    *out = (qv_jvalue){.type = (uint8_t)type, .dict = dict};
    return n > 0 ? reserve(run, dict, n) : QV_OK;
}

qv_status qv_j_dict_set(qv_jrun *run, qv_jdict *dict, qv_jvalue key, qv_jvalue value)
{
    uint64_t hash;
    qv_jentry *entry;
    QV_TRY(hash_value(run, key, &hash));
    QV_TRY(find_entry(run, dict, key, hash, &entry));
    if (entry) {
        entry->value = value;
        return QV_OK;
    }
    QV_TRY(reserve(run, dict, (size_t)dict->n + 1));
    dict->entries[dict->n] = (qv_jentry){.key = key, .value = value, .hash = hash};
    if (dict->index)
        index_entry(dict, dict->n);
    dict->n++;
    return QV_OK;
}

qv_status qv_j_dict_find(qv_jrun *run, const qv_jdict *dict, qv_jvalue key, qv_jentry **out)
{
    uint64_t hash;
    QV_TRY(hash_value(run, key, &hash));
    return find_entry(run, dict, key, hash, out);
}

qv_jentry *qv_j_dict_find_str(const qv_jrun *run, const qv_jdict *dict, qv_jstr key)
{
    uint64_t hash = XXH3_64bits_withSeed(key.data, key.len, run->hash_seed);
    uint32_t mask = 2 * dict->capacity - 1;
    for (uint32_t i = dict->index ? (uint32_t)hash & mask : 0;;) {
        uint32_t at = dict->index ? dict->index[i] : i < dict->n ? i + 1 : 0;
        if (at == 0)
            return NULL;
        qv_jentry *entry = &dict->entries[at - 1];
        if (entry->hash == hash && entry->key.type == QV_J_STR &&
            qv_j_str_equal(qv_j_text(entry->key), key))
            return entry;
        i = dict->index ? (i + 1) & mask : i + 1;
    }
}

/* ---- JSON in --------------------------------------------------------------------------------- */

static qv_status array_from_json(qv_jrun *run, const json_t *json, qv_jvalue *out)
{
    QV_TRY(qv_j_seq(run, QV_J_LIST, json_array_size(json), out));
    for (size_t i = 0; i < out->seq->n; i++)
        QV_TRY(qv_j_from_json(run, json_array_get(json, i), &out->seq->items[i]));
    return QV_OK;
}

static qv_status object_from_json(qv_jrun *run, const json_t *json, qv_jvalue *out)
{
    const char *key;
    size_t len;
    json_t *value;
    QV_TRY(qv_j_dict(run, QV_J_DICT, json_object_size(json), out));
    /* The iteration does not change the object, though its signature says it might. */
    json_object_keylen_foreach((json_t *)json, key, len, value)
    {
        qv_jvalue v;
        QV_TRY(qv_j_from_json(run, value, &v));
        QV_TRY(qv_j_dict_set(run, out->dict, qv_j_str(key, len), v));
    }
    return QV_OK;
}

qv_status qv_j_from_json(qv_jrun *run, const json_t *json, qv_jvalue *out)
{
    switch (json_typeof(json)) {
    case JSON_STRING:
        *out = qv_j_str(json_string_value(json), json_string_length(json));
        return QV_OK;
    case JSON_INTEGER:
        *out = qv_j_int(json_integer_value(json));
        return QV_OK;
    case JSON_REAL:
        *out = qv_j_float(json_real_value(json));
        return QV_OK;
    case JSON_TRUE:
    case JSON_FALSE:
        *out = qv_j_bool(json_is_true(json));
        return QV_OK;
    case JSON_NULL:
        *out = qv_j_none();
        return QV_OK;
    case JSON_ARRAY:
    case JSON_OBJECT:
        break;
    }
    QV_TRY(qv_j_enter(run));
    QV_TRY(json_is_array(json) ? array_from_json(run, json, out)
                               : object_from_json(run, json, out));
    qv_j_leave(run);
    return QV_OK;
}

/* ---- Sorting --------------------------------------------------------------------------------- */

/* Whether y goes before x, which stands to its left. */
static qv_status goes_before(qv_jrun *run, qv_jvalue y, qv_jvalue x, bool reverse, bool *out)
{
    int order;
    bool unordered;
    QV_TRY(qv_j_compare(run, reverse ? x : y, reverse ? y : x, "<", &order, &unordered));
    *out = !unordered && order < 0;
    return QV_OK;
}

/* Merge the sorted runs [lo, mid) and [mid, hi) of `order` into `out`. */
static qv_status merge_runs(qv_jrun *run, const qv_jvalue *keys_of, const size_t *order, size_t lo,
                            size_t mid, size_t hi, bool reverse, size_t *out)
{
    size_t i = lo, j = mid;
    for (size_t k = lo; k < hi; k++) {
        bool right = i == mid;
        if (i < mid && j < hi)
            QV_TRY(goes_before(run, keys_of[order[j]], keys_of[order[i]], reverse, &right));
        out[k] = right ? order[j++] : order[i++];
    }
    return QV_OK;
}

qv_status qv_j_sort(qv_jrun *run, qv_jvalue *items, qv_jvalue *by, size_t n, bool reverse)
{
    void *a, *b, *copy;
    QV_TRY(qv_j_alloc(run, n, sizeof(size_t), &a));
    QV_TRY(qv_j_alloc(run, n, sizeof(size_t), &b));
    QV_TRY(qv_j_alloc(run, n, sizeof(qv_jvalue), &copy));
    size_t *order = a, *merged = b;
    for (size_t i = 0; i < n; i++)
        order[i] = i;
    for (size_t width = 1; width < n; width *= 2) {
        for (size_t lo = 0; lo < n; lo += 2 * width) {
            size_t mid = lo + width < n ? lo + width : n, hi = mid + width < n ? mid + width : n;
            QV_TRY(merge_runs(run, by, order, lo, mid, hi, reverse, merged));
        }
        size_t *swap = order;
        order = merged;
        merged = swap;
    }
    if (n > 0)
        memcpy(copy, items, n * sizeof *items);
    for (size_t i = 0; i < n; i++)
        items[i] = ((qv_jvalue *)copy)[order[i]];
    return QV_OK;
}
