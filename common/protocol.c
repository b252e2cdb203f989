#include "common/protocol.h"

#include "common/msgpack_io.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const qv_protocol_limits qv_protocol_default_limits = {
    .max_bytes = 8u << 20, .max_depth = 32, .max_nodes = 4u << 20};

/* Pairs in one map of the protocol; more than any message needs, few enough to compare unknown keys
 * with each other. */
#define MAX_PAIRS 256

#define MAX_UNKNOWN_KEYS      16
#define MAX_UNKNOWN_KEY_BYTES 64

/* --- tables ---------------------------------------------------------------------------------- */

typedef enum {
    KIND_BOOL,
    KIND_INT,
    KIND_UINT,
    KIND_REAL,
    KIND_STR,
    KIND_BIN,
    KIND_ANY,
    KIND_INTS,
    KIND_REALS,
    KIND_STRS,
    KIND_TOPS,
    KIND_OBJ,
    KIND_OBJS
} kind;

static const char *const kind_expected[] = {
    [KIND_BOOL] = "true or false was expected",
    [KIND_INT] = "an integer was expected",
    [KIND_UINT] = "an integer was expected",
    [KIND_REAL] = "a number was expected",
    [KIND_STR] = "a string was expected",
    [KIND_BIN] = "binary data was expected",
    [KIND_ANY] = "a value was expected",
    [KIND_INTS] = "an array of integers was expected",
    [KIND_REALS] = "an array of numbers was expected",
    [KIND_STRS] = "an array of strings was expected",
    [KIND_TOPS] = "an array of arrays of [token, logprob] was expected",
    [KIND_OBJ] = "a map was expected",
    [KIND_OBJS] = "an array of maps was expected",
};

typedef struct descriptor descriptor;

typedef struct {
    const char *name;
    size_t name_size;
    kind kind;
    const descriptor *nested; /* OBJ, OBJS */
    bool required;
    double min, max, def;
    size_t offset; /* in the struct */
} field;

struct descriptor {
    const field *fields; /* field i has bit i of `has`, which is the struct's first member */
    int n_fields;
    size_t size;
    uint64_t required; /* bit per field that must be there */
    uint64_t preset;   /* bit per field whose default is not all zero, or may not be */
};

/* What the kind column says beyond the C type: kind and nested struct. */
#define ROW_BOOL                KIND_BOOL, NULL
#define ROW_INT                 KIND_INT, NULL
#define ROW_UINT                KIND_UINT, NULL
#define ROW_REAL                KIND_REAL, NULL
#define ROW_STR                 KIND_STR, NULL
#define ROW_BIN                 KIND_BIN, NULL
#define ROW_ANY                 KIND_ANY, NULL
#define ROW_INTS                KIND_INTS, NULL
#define ROW_REALS               KIND_REALS, NULL
#define ROW_STRS                KIND_STRS, NULL
#define ROW_TOPS                KIND_TOPS, NULL
#define ROW_OBJ_usage           KIND_OBJ, &struct_usage
#define ROW_OBJ_timing          KIND_OBJ, &struct_timing
#define ROW_OBJS_worker_status  KIND_OBJS, &struct_worker_status
#define ROW_OBJS_adapter_status KIND_OBJS, &struct_adapter_status
#define ROW_OBJS_held_adapter   KIND_OBJS, &struct_held_adapter
#define ROW_OBJS_delta          KIND_OBJS, &struct_delta
#define ROW_OBJS_resume         KIND_OBJS, &struct_resume
#define ROW_OBJS_explain_attempt   KIND_OBJS, &struct_explain_attempt
#define ROW_OBJS_explain_decision   KIND_OBJS, &struct_explain_decision
#define ROW_OBJS_explain_candidate   KIND_OBJS, &struct_explain_candidate
#define ROW_OBJS_explain_wait   KIND_OBJS, &struct_explain_wait
#define REQUIRED_REQ            true
#define REQUIRED_OPT            false

/* Whether a default has to be set in a zeroed struct. */
#define PRESET_BOOL(def)                ((def) != 0)
#define PRESET_INT(def)                 ((def) != 0)
#define PRESET_UINT(def)                ((def) != 0)
#define PRESET_REAL(def)                ((def) != 0)
#define PRESET_STR(def)                 0
#define PRESET_BIN(def)                 0
#define PRESET_ANY(def)                 0
#define PRESET_INTS(def)                0
#define PRESET_REALS(def)               0
#define PRESET_STRS(def)                0
#define PRESET_TOPS(def)                0
#define PRESET_OBJ_usage(def)           1
#define PRESET_OBJ_timing(def)          1
#define PRESET_OBJS_worker_status(def)  0
#define PRESET_OBJS_adapter_status(def) 0
#define PRESET_OBJS_held_adapter(def)   0
#define PRESET_OBJS_delta(def)          0
#define PRESET_OBJS_resume(def)         0
#define PRESET_OBJS_explain_attempt(def)   0
#define PRESET_OBJS_explain_decision(def)   0
#define PRESET_OBJS_explain_candidate(def)   0
#define PRESET_OBJS_explain_wait(def)   0

/* clang-format off */
#define QV_STRUCT(name) static const uint64_t required_##name = 0
#define QV_FIELD(st, kind, name, need, min, max, def)                                              \
    | (uint64_t)REQUIRED_##need << QV_BIT_##st##_##name
#define QV_STRUCT_END(name) ;
#include "common/protocol.def"
#define QV_STRUCT(name) static const uint64_t preset_##name = 0
#define QV_FIELD(st, kind, name, need, min, max, def)                                              \
    | (uint64_t)(PRESET_##kind(def)) << QV_BIT_##st##_##name
#define QV_STRUCT_END(name) ;
#include "common/protocol.def"
#define QV_STRUCT(name) static const field fields_##name[] = {
#define QV_FIELD(st, kind, name, need, min, max, def)                                              \
    {#name, sizeof(#name) - 1, ROW_##kind, REQUIRED_##need, min, max, def,                         \
     offsetof(qv_msg_##st, name)},
#define QV_STRUCT_END(name)                                                                        \
    };                                                                                             \
    static const descriptor struct_##name = {fields_##name, QV_N_FIELDS_##name,                    \
                                             sizeof(qv_msg_##name), required_##name,               \
                                             preset_##name};                                       \
    _Static_assert(QV_N_FIELDS_##name <= 64, "`has` has 64 bits");                                 \
    _Static_assert(offsetof(qv_msg_##name, has) == 0, "`has` comes first");
#include "common/protocol.def"
/* clang-format on */

static const struct {
    const char *name;
    size_t name_size;
    const char *who;
    const descriptor *body;
} messages[] = {
#define QV_MESSAGE(NAME, wire, st, who)                                                            \
    [QV_MSG_##NAME] = {wire, sizeof(wire) - 1, who, &struct_##st},
#include "common/protocol.def"
};

static const char *const direction_names[] = {
    [QV_FROM_CLIENT] = "client to broker",
    [QV_TO_CLIENT] = "broker to client",
    [QV_FROM_WORKER] = "worker to broker",
    [QV_TO_WORKER] = "broker to worker",
};

static const char *const code_names[] = {
#define QV_CODE(name) [QV_CODE_##name] = #name,
#include "common/protocol.def"
};

/* An array of nested structs as the table sees it: any OBJS field has these two members. */
typedef struct {
    void *data;
    uint32_t count;
} objects;

/* All bodies lie at the same place of a qv_message, the union. */
static void *message_body(qv_message *message)
{
    return &message->submit;
}

static uint64_t get_has(const void *st)
{
    return *(const uint64_t *)st;
}

static void add_has(void *st, int bit)
{
    *(uint64_t *)st |= UINT64_C(1) << bit;
}

/* --- names and strings ----------------------------------------------------------------------- */

qv_str qv_str_from(const char *text)
{
    return (qv_str){text, text == NULL ? 0 : (uint32_t)strlen(text)};
}

bool qv_str_equal(qv_str a, const char *text)
{
    size_t size = strlen(text);
    return a.size == size && (size == 0 || memcmp(a.data, text, size) == 0);
}

char *qv_str_dup(qv_arena *arena, qv_str s)
{
    return qv_arena_strndup(arena, s.size > 0 ? s.data : "", s.size);
}

const char *qv_code_name(qv_code code)
{
    return (unsigned)code < QV_CODE_COUNT ? code_names[code] : "?";
}

bool qv_code_find(qv_str name, qv_code *out)
{
    for (int code = 0; code < QV_CODE_COUNT; code++)
        if (qv_str_equal(name, code_names[code])) {
            *out = (qv_code)code;
            return true;
        }
    return false;
}

qv_code qv_code_of_status(qv_status status)
{
    switch (status) {
    case QV_ERR_ARG:
    case QV_ERR_FORMAT:
    case QV_ERR_SHAPE:
    case QV_ERR_UNSUPPORTED:
    case QV_ERR_EXISTS:
        return QV_CODE_BAD_REQUEST;
    case QV_ERR_LIMIT:
        return QV_CODE_TOO_LARGE;
    case QV_ERR_NOT_FOUND:
        return QV_CODE_ADAPTER_NOT_FOUND;
    case QV_ERR_BUSY:
    case QV_ERR_NOMEM:
        return QV_CODE_OVERLOADED;
    case QV_ERR_TIMEOUT:
        return QV_CODE_DEADLINE;
    case QV_ERR_CANCELLED:
        return QV_CODE_CANCELLED;
    default:
        return QV_CODE_INTERNAL;
    }
}

const char *qv_message_type_name(qv_msg_type type)
{
    return (unsigned)type < QV_MSG_COUNT ? messages[type].name : "?";
}

/* --- errors that name the field -------------------------------------------------------------- */

/* Where the walk is: a chain on the stack, "deltas" [3] "seq". NULL is the message itself. */
typedef struct path {
    const struct path *parent;
    const char *name; /* NULL: the index below instead */
    size_t index;
} path;

static int path_text(const path *at, char *out, size_t size)
{
    int n = at->parent != NULL ? path_text(at->parent, out, size) : 0;
    if ((size_t)n >= size)
        return n;
    if (at->name == NULL)
        return n + snprintf(out + n, size - (size_t)n, "[%zu]", at->index);
    return n + snprintf(out + n, size - (size_t)n, "%s%s", n > 0 ? "." : "", at->name);
}

__attribute__((format(printf, 3, 4), cold)) static qv_status
fail_at(const path *at, qv_status status, const char *format, ...)
{
    char name[128], sentence[512];
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof(sentence), format, args);
    va_end(args);
    if (at == NULL)
        return qv_fail(status, "%s", sentence);
    path_text(at, name, sizeof(name));
    return qv_fail(status, "%s: %s", name, sentence);
}

__attribute__((cold)) static qv_status fail_kind(const path *at, const qv_item *item,
                                                 const char *expected)
{
    char text[QV_ITEM_TEXT_MAX];
    return fail_at(at, QV_ERR_FORMAT, "%s, %s", qv_item_describe(item, text), expected);
}

/* --- bounds, the same for decoder and encoder ------------------------------------------------- */

static bool has_lower(const field *f)
{
    return f->min != 0 || f->max != 0;
}

static bool has_upper(const field *f)
{
    return has_lower(f) && f->max >= f->min;
}

static qv_status check_number(const path *at, const field *f, double value)
{
    if (!isfinite(value))
        return fail_at(at, QV_ERR_ARG, "%g is not a finite number", value);
    if (has_lower(f) && value < f->min)
        return fail_at(at, QV_ERR_ARG, "%.15g is below %.15g", value, f->min);
    if (has_upper(f) && value > f->max)
        return fail_at(at, QV_ERR_ARG, "%.15g is above %.15g", value, f->max);
    return QV_OK;
}

static qv_status check_length(const path *at, const field *f, uint32_t length)
{
    const char *unit = f->kind == KIND_STR || f->kind == KIND_BIN ? "bytes" : "entries";
    if (has_lower(f) && length < f->min)
        return fail_at(at, QV_ERR_ARG, "%u %s, at least %.15g expected", length, unit, f->min);
    if (has_upper(f) && length > f->max)
        return fail_at(at, QV_ERR_ARG, "%u %s, at most %.15g allowed", length, unit, f->max);
    return QV_OK;
}

/* --- defaults -------------------------------------------------------------------------------- */

/* Set a zeroed struct's fields to their defaults; only numbers have defaults other than zero. */
static void set_defaults(const descriptor *d, void *st)
{
    for (uint64_t left = d->preset; left != 0; left &= left - 1) {
        const field *f = &d->fields[__builtin_ctzll(left)];
        void *at = (char *)st + f->offset;
        if (f->kind == KIND_BOOL)
            *(bool *)at = f->def != 0;
        else if (f->kind == KIND_INT)
            *(int64_t *)at = (int64_t)f->def;
        else if (f->kind == KIND_UINT)
            *(uint64_t *)at = (uint64_t)f->def;
        else if (f->kind == KIND_REAL)
            *(double *)at = f->def;
        else if (f->kind == KIND_OBJ)
            set_defaults(f->nested, at);
    }
}

void qv_message_init(qv_message *message, qv_msg_type type)
{
    QV_ASSERT((unsigned)type < QV_MSG_COUNT);
    memset(message, 0, sizeof(*message));
    message->type = type;
    set_defaults(messages[type].body, message_body(message));
}

/* --- decoding -------------------------------------------------------------------------------- */

typedef struct {
    qv_reader reader; /* over scanned bytes: lengths are known to fit */
    qv_arena *arena;
} decoder;

/* Memory for n items of a decoded array. */
static qv_status allocate(decoder *d, const path *at, size_t n, size_t size, void **out)
{
    *out = qv_arena_calloc(d->arena, n, size, _Alignof(max_align_t));
    if (*out == NULL)
        return fail_at(at, QV_ERR_LIMIT, "%zu entries need more memory than a message may use", n);
    return QV_OK;
}

static qv_status decode_int(const path *at, const qv_item *item, int64_t *out)
{
    switch (item->kind) {
    case QV_ITEM_INT:
        *out = item->integer;
        return QV_OK;
    case QV_ITEM_UINT:
        if (item->uint > INT64_MAX)
            return fail_at(at, QV_ERR_ARG, "%llu is above %lld", (unsigned long long)item->uint,
                           (long long)INT64_MAX);
        *out = (int64_t)item->uint;
        return QV_OK;
    case QV_ITEM_FLOAT: /* JavaScript has no other numbers */
        if (item->real != trunc(item->real) || fabs(item->real) >= 0x1p63)
            return fail_kind(at, item, kind_expected[KIND_INT]);
        *out = (int64_t)item->real;
        return QV_OK;
    default:
        return fail_kind(at, item, kind_expected[KIND_INT]);
    }
}

static qv_status decode_uint(const path *at, const qv_item *item, uint64_t *out)
{
    switch (item->kind) {
    case QV_ITEM_UINT:
        *out = item->uint;
        return QV_OK;
    case QV_ITEM_INT:
        return fail_at(at, QV_ERR_ARG, "%lld is below 0", (long long)item->integer);
    case QV_ITEM_FLOAT:
        if (item->real < 0)
            return fail_at(at, QV_ERR_ARG, "%.15g is below 0", item->real);
        if (item->real != trunc(item->real) || item->real >= 0x1p64)
            return fail_kind(at, item, kind_expected[KIND_UINT]);
        *out = (uint64_t)item->real;
        return QV_OK;
    default:
        return fail_kind(at, item, kind_expected[KIND_UINT]);
    }
}

static qv_status decode_real(const path *at, const qv_item *item, double *out)
{
    if (item->kind == QV_ITEM_FLOAT)
        *out = item->real;
    else if (item->kind == QV_ITEM_UINT)
        *out = (double)item->uint;
    else if (item->kind == QV_ITEM_INT)
        *out = (double)item->integer;
    else
        return fail_kind(at, item, kind_expected[KIND_REAL]);
    return QV_OK;
}

/* A token id: an integer that fits 32 bits. */
static qv_status decode_token(const path *at, const qv_item *item, int32_t *out)
{
    int64_t value;
    QV_TRY(decode_int(at, item, &value));
    if (value < INT32_MIN || value > INT32_MAX)
        return fail_at(at, QV_ERR_ARG, "%lld does not fit 32 bits", (long long)value);
    *out = (int32_t)value;
    return QV_OK;
}

/* A logprob: a number, or nil where there is none. */
static qv_status decode_logprob(const path *at, const qv_item *item, double *out)
{
    if (item->kind == QV_ITEM_NIL) {
        *out = NAN;
        return QV_OK;
    }
    QV_TRY(decode_real(at, item, out));
    if (!isfinite(*out))
        return fail_at(at, QV_ERR_ARG, "%g is not a finite number", *out);
    return QV_OK;
}

static qv_status decode_packed_ints(decoder *d, const path *at, const qv_item *item, qv_ints *out)
{
    if (item->size % sizeof(int32_t) != 0)
        return fail_at(at, QV_ERR_FORMAT,
                       "%u bytes of binary data are not a whole number of 32-bit integers",
                       item->size);
    void *data;
    out->count = item->size / (uint32_t)sizeof(int32_t);
    QV_TRY(allocate(d, at, out->count, sizeof(int32_t), &data));
    out->data = data;
    for (uint32_t i = 0; i < out->count; i++) {
        const unsigned char *p = (const unsigned char *)item->data + 4 * (size_t)i;
        out->data[i] = (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
                                 (uint32_t)p[3] << 24);
    }
    return QV_OK;
}

static qv_status decode_ints(decoder *d, const path *at, const qv_item *item, qv_ints *out)
{
    if (item->kind == QV_ITEM_BIN)
        return decode_packed_ints(d, at, item, out);
    if (item->kind != QV_ITEM_ARRAY)
        return fail_kind(at, item, kind_expected[KIND_INTS]);
    void *data;
    QV_TRY(allocate(d, at, item->size, sizeof(int32_t), &data));
    out->data = data;
    out->count = item->size;
    for (uint32_t i = 0; i < out->count; i++) {
        qv_item entry;
        path here = {at, NULL, i};
        QV_TRY(qv_reader_next(&d->reader, &entry));
        QV_TRY(decode_token(&here, &entry, &out->data[i]));
    }
    return QV_OK;
}

static qv_status decode_reals(decoder *d, const path *at, const qv_item *item, qv_reals *out)
{
    if (item->kind != QV_ITEM_ARRAY)
        return fail_kind(at, item, kind_expected[KIND_REALS]);
    void *data;
    QV_TRY(allocate(d, at, item->size, sizeof(double), &data));
    out->data = data;
    out->count = item->size;
    for (uint32_t i = 0; i < out->count; i++) {
        qv_item entry;
        path here = {at, NULL, i};
        QV_TRY(qv_reader_next(&d->reader, &entry));
        QV_TRY(decode_logprob(&here, &entry, &out->data[i]));
    }
    return QV_OK;
}

static qv_status decode_strs(decoder *d, const path *at, const qv_item *item, qv_strs *out)
{
    bool single = item->kind == QV_ITEM_STR; /* one string stands for an array of one */
    if (!single && item->kind != QV_ITEM_ARRAY)
        return fail_kind(at, item, kind_expected[KIND_STRS]);
    void *data;
    out->count = single ? 1 : item->size;
    QV_TRY(allocate(d, at, out->count, sizeof(qv_str), &data));
    out->data = data;
    if (single)
        out->data[0] = (qv_str){item->data, item->size};
    for (uint32_t i = 0; !single && i < out->count; i++) {
        qv_item entry;
        path here = {at, NULL, i};
        QV_TRY(qv_reader_next(&d->reader, &entry));
        if (entry.kind != QV_ITEM_STR)
            return fail_kind(&here, &entry, kind_expected[KIND_STR]);
        out->data[i] = (qv_str){entry.data, entry.size};
    }
    return QV_OK;
}

/* How many [token, logprob] pairs follow in `n_tokens` arrays. */
static qv_status count_pairs(const decoder *d, const path *at, uint32_t n_tokens, size_t *out)
{
    qv_reader ahead = d->reader;
    *out = 0;
    for (uint32_t i = 0; i < n_tokens; i++) {
        qv_item entry;
        path here = {at, NULL, i};
        QV_TRY(qv_reader_next(&ahead, &entry));
        if (entry.kind == QV_ITEM_NIL)
            continue; /* no alternatives, as for the first token of a prompt */
        if (entry.kind != QV_ITEM_ARRAY)
            return fail_kind(&here, &entry, "an array of [token, logprob] was expected");
        *out += entry.size;
        for (uint32_t k = 0; k < entry.size; k++)
            QV_TRY(qv_reader_skip(&ahead));
    }
    return QV_OK;
}

static qv_status decode_pair(decoder *d, const path *at, int32_t *token, double *logprob)
{
    qv_item item;
    QV_TRY(qv_reader_next(&d->reader, &item));
    if (item.kind != QV_ITEM_ARRAY || item.size != 2)
        return fail_kind(at, &item, "[token, logprob] was expected");
    path first = {at, NULL, 0}, second = {at, NULL, 1};
    QV_TRY(qv_reader_next(&d->reader, &item));
    QV_TRY(decode_token(&first, &item, token));
    QV_TRY(qv_reader_next(&d->reader, &item));
    return decode_logprob(&second, &item, logprob);
}

static qv_status decode_tops(decoder *d, const path *at, const qv_item *item, qv_tops *out)
{
    if (item->kind != QV_ITEM_ARRAY)
        return fail_kind(at, item, kind_expected[KIND_TOPS]);
    size_t n_pairs;
    void *start, *token, *logprob;
    QV_TRY(count_pairs(d, at, item->size, &n_pairs));
    QV_TRY(allocate(d, at, (size_t)item->size + 1, sizeof(uint32_t), &start));
    QV_TRY(allocate(d, at, n_pairs, sizeof(int32_t), &token));
    QV_TRY(allocate(d, at, n_pairs, sizeof(double), &logprob));
    *out = (qv_tops){item->size, start, token, logprob};

    uint32_t pair = 0;
    for (uint32_t i = 0; i < out->count; i++) {
        qv_item entry;
        path here = {at, NULL, i};
        QV_TRY(qv_reader_next(&d->reader, &entry));
        out->start[i] = pair;
        for (uint32_t k = 0; k < entry.size; k++, pair++) {
            path inner = {&here, NULL, k};
            QV_TRY(decode_pair(d, &inner, &out->token[pair], &out->logprob[pair]));
        }
    }
    out->start[out->count] = pair;
    return QV_OK;
}

/* The raw bytes of one value, whose header `item` was read from `begin`. */
static qv_status decode_any(decoder *d, const unsigned char *begin, qv_str *out)
{
    d->reader.next = begin;
    QV_TRY(qv_reader_skip(&d->reader));
    *out = (qv_str){(const char *)begin, (uint32_t)(d->reader.next - begin)};
    return QV_OK;
}

static qv_status decode_struct(decoder *d, const descriptor *desc, const path *at,
                               const qv_item *map, void *out, qv_strs *unknown);

/* Bytes that a struct takes on the wire at least: its header, and each required key with one byte.
 */
static size_t min_encoded_bytes(const descriptor *desc)
{
    size_t bytes = 1;
    for (int i = 0; i < desc->n_fields; i++)
        if (desc->fields[i].required)
            bytes += 1 + desc->fields[i].name_size + 1;
    return bytes;
}

static qv_status decode_objects(decoder *d, const field *f, const path *at, const qv_item *item,
                                void *out)
{
    if (item->kind != QV_ITEM_ARRAY)
        return fail_kind(at, item, kind_expected[KIND_OBJS]);
    /* Before memory is taken for them: could so many be there at all? */
    size_t left = (size_t)(d->reader.end - d->reader.next);
    if (item->size > left / min_encoded_bytes(f->nested))
        return fail_at(at, QV_ERR_FORMAT, "%u entries cannot be complete in the %zu bytes left",
                       item->size, left);
    objects array = {NULL, item->size};
    QV_TRY(allocate(d, at, array.count, f->nested->size, &array.data));
    memcpy(out, &array, sizeof(array));
    for (uint32_t i = 0; i < array.count; i++) {
        qv_item entry;
        path here = {at, NULL, i};
        QV_TRY(qv_reader_next(&d->reader, &entry));
        QV_TRY(decode_struct(d, f->nested, &here, &entry, (char *)array.data + i * f->nested->size,
                             NULL));
    }
    return QV_OK;
}

/* Decode the value that follows into its field. */
static qv_status decode_value(decoder *d, const field *f, const path *at, void *out)
{
    const unsigned char *begin = d->reader.next;
    qv_item item;
    QV_TRY(qv_reader_next(&d->reader, &item));
    switch (f->kind) {
    case KIND_BOOL:
        if (item.kind != QV_ITEM_BOOL)
            return fail_kind(at, &item, kind_expected[f->kind]);
        *(bool *)out = item.boolean;
        return QV_OK;
    case KIND_INT:
        QV_TRY(decode_int(at, &item, out));
        return check_number(at, f, (double)*(int64_t *)out);
    case KIND_UINT:
        QV_TRY(decode_uint(at, &item, out));
        return check_number(at, f, (double)*(uint64_t *)out);
    case KIND_REAL:
        QV_TRY(decode_real(at, &item, out));
        return check_number(at, f, *(double *)out);
    case KIND_STR:
    case KIND_BIN:
        if (item.kind != (f->kind == KIND_STR ? QV_ITEM_STR : QV_ITEM_BIN))
            return fail_kind(at, &item, kind_expected[f->kind]);
        *(qv_str *)out = (qv_str){item.data, item.size};
        return check_length(at, f, item.size);
    case KIND_ANY:
        return decode_any(d, begin, out);
    case KIND_INTS:
        QV_TRY(decode_ints(d, at, &item, out));
        return check_length(at, f, ((qv_ints *)out)->count);
    case KIND_REALS:
        QV_TRY(decode_reals(d, at, &item, out));
        return check_length(at, f, ((qv_reals *)out)->count);
    case KIND_STRS:
        QV_TRY(decode_strs(d, at, &item, out));
        return check_length(at, f, ((qv_strs *)out)->count);
    case KIND_TOPS:
        QV_TRY(decode_tops(d, at, &item, out));
        return check_length(at, f, ((qv_tops *)out)->count);
    case KIND_OBJ:
        return decode_struct(d, f->nested, at, &item, out, NULL);
    case KIND_OBJS:
        if (item.kind == QV_ITEM_ARRAY)
            QV_TRY(check_length(at, f, item.size));
        return decode_objects(d, f, at, &item, out);
    }
    return fail_at(at, QV_ERR_INTERNAL, "kind %d has no decoder", (int)f->kind);
}

/* The field with this key, or -1. Keys mostly come in the order of the table, so the search starts
 * after the last one found. */
static int find_field(const descriptor *desc, const qv_item *key, int after)
{
    for (int n = 0, i = after + 1; n < desc->n_fields; n++, i++) {
        if (i >= desc->n_fields)
            i = 0;
        const field *f = &desc->fields[i];
        if (f->name_size == key->size && memcmp(f->name, key->data, key->size) == 0)
            return i;
    }
    return -1;
}

/* An unknown key's value is passed over and its name kept, so that a second one is noticed. */
static qv_status decode_unknown(decoder *d, const path *at, const qv_item *key, qv_str *seen,
                                uint32_t *n_seen)
{
    for (uint32_t i = 0; i < *n_seen; i++)
        if (seen[i].size == key->size && memcmp(seen[i].data, key->data, key->size) == 0) {
            char text[QV_ITEM_TEXT_MAX];
            return fail_at(at, QV_ERR_FORMAT, "%s that is there twice as a key",
                           qv_item_describe(key, text));
        }
    seen[(*n_seen)++] = (qv_str){key->data, key->size};
    return qv_reader_skip(&d->reader);
}

static qv_status report_unknown(decoder *d, const qv_str *seen, uint32_t n_seen, qv_strs *out)
{
    static const path at = {NULL, "unknown keys", 0};
    void *data;
    uint32_t count = n_seen < MAX_UNKNOWN_KEYS ? n_seen : MAX_UNKNOWN_KEYS;
    if (count == 0)
        return QV_OK;
    QV_TRY(allocate(d, &at, count, sizeof(qv_str), &data));
    *out = (qv_strs){data, count};
    for (uint32_t i = 0; i < count; i++)
        out->data[i] = (qv_str){
            seen[i].data, (uint32_t)qv_utf8_cut(seen[i].data, seen[i].size, MAX_UNKNOWN_KEY_BYTES)};
    return QV_OK;
}

static qv_status check_required(const descriptor *desc, const path *at, uint64_t seen)
{
    if ((seen & desc->required) == desc->required)
        return QV_OK;
    for (int i = 0; i < desc->n_fields; i++)
        if (desc->fields[i].required && !(seen >> i & 1)) {
            path here = {at, desc->fields[i].name, 0};
            return fail_at(&here, QV_ERR_ARG, "missing");
        }
    return QV_OK;
}

/* Decode a map, whose header was read, into a zeroed struct. `at` is NULL for a message's body,
 * where the key `type` was handled before. `unknown` NULL: unknown keys are not reported. */
static qv_status decode_struct(decoder *d, const descriptor *desc, const path *at,
                               const qv_item *map, void *out, qv_strs *unknown)
{
    if (map->kind != QV_ITEM_MAP)
        return fail_kind(at, map, kind_expected[KIND_OBJ]);
    if (map->size > MAX_PAIRS)
        return qv_fail(QV_ERR_LIMIT, "a map of %u keys, at most %d are allowed", map->size,
                       MAX_PAIRS);
    set_defaults(desc, out);

    qv_str unknown_seen[MAX_PAIRS];
    uint32_t n_unknown = 0;
    uint64_t seen = 0;
    bool type_seen = false;
    int last = -1;
    for (uint32_t i = 0; i < map->size; i++) {
        qv_item key;
        QV_TRY(qv_reader_next(&d->reader, &key));
        if (at == NULL && key.size == 4 && memcmp(key.data, "type", 4) == 0) {
            if (type_seen)
                return qv_fail(QV_ERR_FORMAT, "type: the key is there twice");
            type_seen = true;
            QV_TRY(qv_reader_skip(&d->reader));
            continue;
        }
        int index = find_field(desc, &key, last);
        if (index < 0) {
            QV_TRY(decode_unknown(d, at, &key, unknown_seen, &n_unknown));
            continue;
        }
        last = index;
        const field *f = &desc->fields[index];
        path here = {at, f->name, 0};
        if (seen >> index & 1)
            return fail_at(&here, QV_ERR_FORMAT, "the key is there twice");
        seen |= UINT64_C(1) << index;
        if (!f->required && d->reader.next[0] == 0xc0) { /* nil: as if it were absent */
            d->reader.next++;
            continue;
        }
        QV_TRY(decode_value(d, f, &here, (char *)out + f->offset));
        add_has(out, index);
    }
    QV_TRY(check_required(desc, at, seen));
    return unknown != NULL ? report_unknown(d, unknown_seen, n_unknown, unknown) : QV_OK;
}

/* Read `type` and `id` as far as the bytes allow, without an error text. */
static void peek(const void *data, size_t size, const qv_msgpack_probe probes[2],
                 qv_direction direction, qv_message *out)
{
    qv_item item;
    qv_reader reader = qv_reader_init(data, size);
    reader.next += probes[0].value;
    if (probes[0].value > 0 && qv_reader_try(&reader, &item) && item.kind == QV_ITEM_STR)
        for (int type = 0; type < QV_MSG_COUNT; type++)
            if (item.size == messages[type].name_size &&
                memcmp(item.data, messages[type].name, item.size) == 0 &&
                strcmp(messages[type].who, direction_names[direction]) == 0)
                out->type = (qv_msg_type)type;

    reader = qv_reader_init(data, size);
    reader.next += probes[1].value;
    if (probes[1].value > 0 && qv_reader_try(&reader, &item) && item.kind == QV_ITEM_STR &&
        item.size <= 64 && qv_utf8_valid_prefix(item.data, item.size) == item.size)
        out->id = (qv_str){item.data, item.size};
}

/* Say why there is no type. */
__attribute__((cold)) static qv_status fail_type(const void *data, size_t size, size_t offset,
                                                 qv_direction direction)
{
    static const path at = {NULL, "type", 0};
    qv_item item;
    qv_reader reader = qv_reader_init(data, size);
    reader.next += offset;
    if (offset == 0)
        return fail_at(&at, QV_ERR_ARG, "missing");
    QV_TRY(qv_reader_next(&reader, &item));
    if (item.kind != QV_ITEM_STR)
        return fail_kind(&at, &item, kind_expected[KIND_STR]);
    uint32_t shown = (uint32_t)qv_utf8_cut(item.data, item.size, 40);
    return fail_at(&at, QV_ERR_ARG, "'%.*s' is not a message from %s", (int)shown, item.data,
                   direction_names[direction]);
}

qv_status qv_message_decode(const void *data, size_t size, qv_direction direction,
                            const qv_protocol_limits *limits, qv_arena *arena, qv_message *out)
{
    memset(out, 0, sizeof(*out));
    out->type = QV_MSG_COUNT;
    if (limits == NULL)
        limits = &qv_protocol_default_limits;
    if (size == 0)
        return qv_fail(QV_ERR_FORMAT, "the message is empty, a map was expected");

    /* Of a message that is too large, the part that may be read can still name the request. */
    size_t readable = size < limits->max_bytes ? size : limits->max_bytes;
    qv_msgpack_limits scan_limits = {limits->max_depth, limits->max_nodes};
    qv_msgpack_probe probes[2] = {{"type", 0}, {"id", 0}};
    qv_status status = qv_msgpack_scan(data, readable, scan_limits, probes, 2);
    peek(data, readable, probes, direction, out);
    if (size > limits->max_bytes)
        return qv_fail(QV_ERR_LIMIT, "the message has %zu bytes, at most %zu are allowed", size,
                       limits->max_bytes);
    QV_TRY(status);

    qv_item map;
    decoder d = {qv_reader_init(data, size), arena};
    QV_TRY(qv_reader_next(&d.reader, &map));
    if (map.kind != QV_ITEM_MAP) {
        char text[QV_ITEM_TEXT_MAX];
        return qv_fail(QV_ERR_FORMAT, "%s, a map was expected as the message",
                       qv_item_describe(&map, text));
    }
    if (out->type == QV_MSG_COUNT)
        return fail_type(data, size, probes[0].value, direction);
    return decode_struct(&d, messages[out->type].body, NULL, &map, message_body(out),
                         &out->unknown_keys);
}

/* --- encoding -------------------------------------------------------------------------------- */

/* A bit per field; bits of `has` beyond the last one mean nothing. */
static uint64_t fields_written(const descriptor *desc, const void *st)
{
    uint64_t all = desc->n_fields == 64 ? UINT64_MAX : (UINT64_C(1) << desc->n_fields) - 1;
    return (desc->required | get_has(st)) & all;
}

static void pack_logprob(msgpack_packer *packer, double value)
{
    if (isfinite(value))
        msgpack_pack_double(packer, value);
    else
        msgpack_pack_nil(packer);
}

static void pack_tops(msgpack_packer *packer, const qv_tops *tops)
{
    msgpack_pack_array(packer, tops->count);
    for (uint32_t i = 0; i < tops->count; i++) {
        msgpack_pack_array(packer, tops->start[i + 1] - tops->start[i]);
        for (uint32_t pair = tops->start[i]; pair < tops->start[i + 1]; pair++) {
            msgpack_pack_array(packer, 2);
            msgpack_pack_int32(packer, tops->token[pair]);
            pack_logprob(packer, tops->logprob[pair]);
        }
    }
}

/* A value that is packed already: it must be exactly one. */
static qv_status encode_any(qv_msgpack_writer *w, const path *at, qv_str raw)
{
    qv_msgpack_limits limits = {qv_protocol_default_limits.max_depth - 1,
                                qv_protocol_default_limits.max_nodes};
    if (raw.size == 0)
        return fail_at(at, QV_ERR_FORMAT, "there are no bytes of a value");
    qv_status status = qv_msgpack_scan(raw.data, raw.size, limits, NULL, 0);
    if (status != QV_OK) {
        char name[128];
        path_text(at, name, sizeof(name));
        return qv_fail_prefix(status, "%s", name);
    }
    qv_msgpack_writer_raw(w, raw.data, raw.size);
    return QV_OK;
}

static qv_status encode_struct(qv_msgpack_writer *w, const descriptor *desc, const path *at,
                               const void *st, const char *type);

static qv_status encode_objects(qv_msgpack_writer *w, const field *f, const path *at,
                                const void *value)
{
    objects array;
    memcpy(&array, value, sizeof(array));
    QV_TRY(check_length(at, f, array.count));
    msgpack_pack_array(&w->packer, array.count);
    for (uint32_t i = 0; i < array.count; i++) {
        path here = {at, NULL, i};
        QV_TRY(encode_struct(w, f->nested, &here, (const char *)array.data + i * f->nested->size,
                             NULL));
    }
    return QV_OK;
}

static qv_status encode_value(qv_msgpack_writer *w, const field *f, const path *at,
                              const void *value)
{
    msgpack_packer *packer = &w->packer;
    switch (f->kind) {
    case KIND_BOOL:
        if (*(const bool *)value)
            msgpack_pack_true(packer);
        else
            msgpack_pack_false(packer);
        return QV_OK;
    case KIND_INT:
        QV_TRY(check_number(at, f, (double)*(const int64_t *)value));
        msgpack_pack_int64(packer, *(const int64_t *)value);
        return QV_OK;
    case KIND_UINT:
        QV_TRY(check_number(at, f, (double)*(const uint64_t *)value));
        msgpack_pack_uint64(packer, *(const uint64_t *)value);
        return QV_OK;
    case KIND_REAL:
        QV_TRY(check_number(at, f, *(const double *)value));
        msgpack_pack_double(packer, *(const double *)value);
        return QV_OK;
    case KIND_STR: {
        const qv_str *s = value;
        QV_TRY(check_length(at, f, s->size));
        qv_msgpack_writer_str(w, s->data, s->size);
        return QV_OK;
    }
    case KIND_BIN: {
        const qv_str *s = value;
        QV_TRY(check_length(at, f, s->size));
        msgpack_pack_bin(packer, s->size);
        qv_msgpack_writer_raw(w, s->data, s->size);
        return QV_OK;
    }
    case KIND_ANY:
        return encode_any(w, at, *(const qv_str *)value);
    case KIND_INTS: {
        const qv_ints *ints = value;
        QV_TRY(check_length(at, f, ints->count));
        msgpack_pack_array(packer, ints->count);
        for (uint32_t i = 0; i < ints->count; i++)
            msgpack_pack_int32(packer, ints->data[i]);
        return QV_OK;
    }
    case KIND_REALS: {
        const qv_reals *reals = value;
        QV_TRY(check_length(at, f, reals->count));
        msgpack_pack_array(packer, reals->count);
        for (uint32_t i = 0; i < reals->count; i++)
            pack_logprob(packer, reals->data[i]);
        return QV_OK;
    }
    case KIND_STRS: {
        const qv_strs *strs = value;
        QV_TRY(check_length(at, f, strs->count));
        msgpack_pack_array(packer, strs->count);
        for (uint32_t i = 0; i < strs->count; i++)
            qv_msgpack_writer_str(w, strs->data[i].data, strs->data[i].size);
        return QV_OK;
    }
    case KIND_TOPS: {
        const qv_tops *tops = value;
        QV_TRY(check_length(at, f, tops->count));
        pack_tops(packer, tops);
        return QV_OK;
    }
    case KIND_OBJ:
        return encode_struct(w, f->nested, at, value, NULL);
    case KIND_OBJS:
        return encode_objects(w, f, at, value);
    }
    return fail_at(at, QV_ERR_INTERNAL, "kind %d has no encoder", (int)f->kind);
}

/* Write a struct as a map; `type` is the message's name at the top, NULL inside. */
static qv_status encode_struct(qv_msgpack_writer *w, const descriptor *desc, const path *at,
                               const void *st, const char *type)
{
    uint64_t written = fields_written(desc, st);
    msgpack_pack_map(&w->packer, (uint32_t)__builtin_popcountll(written) + (type != NULL));
    if (type != NULL) {
        qv_msgpack_writer_key(w, "type", 4);
        qv_msgpack_writer_key(w, type, strlen(type));
    }
    for (; written != 0; written &= written - 1) {
        const field *f = &desc->fields[__builtin_ctzll(written)];
        path here = {at, f->name, 0};
        qv_msgpack_writer_key(w, f->name, f->name_size);
        QV_TRY(encode_value(w, f, &here, (const char *)st + f->offset));
    }
    return QV_OK;
}

qv_status qv_message_encode(const qv_message *message, qv_arena *arena, const void **data,
                            size_t *size)
{
    QV_ASSERT((unsigned)message->type < QV_MSG_COUNT);
    if (message->encoded.size > 0) {
        *size = message->encoded.size;
        *data = qv_arena_memdup(arena, message->encoded.data, *size, 1);
        return *data != NULL ? QV_OK : qv_fail(QV_ERR_LIMIT, "no room for a message");
    }
    qv_msgpack_writer w;
    qv_msgpack_writer_init(&w, arena);
    QV_TRY(encode_struct(&w, messages[message->type].body, NULL, &message->submit,
                         messages[message->type].name));
    QV_TRY(qv_msgpack_writer_finish(&w));
    *data = w.data;
    *size = w.size;
    return QV_OK;
}
