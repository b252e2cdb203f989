/* Values as text: str and repr as Python writes them, and JSON as its json.dumps does.
 */
#include "models/jinja.h"
#include "models/unicode.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

/* ---- Text under construction ----------------------------------------------------------------- */

qv_status qv_j_add(qv_jbuilder *b, const char *data, size_t len)
{
    if (b->size - b->len < len) {
        size_t size = b->size < 64 ? 64 : 2 * b->size;
        size = size - b->len < len ? b->len + len : size;
        void *grown;
        QV_TRY(qv_j_alloc(b->run, size, 1, &grown));
        if (b->len > 0)
            memcpy(grown, b->data, b->len);
        b->data = grown;
        b->size = size;
    }
    if (len > 0)
        memcpy(b->data + b->len, data, len);
    b->len += len;
    return QV_OK;
}

qv_status qv_j_add_char(qv_jbuilder *b, uint32_t cp)
{
    char text[4];
    return qv_j_add(b, text, qv_unicode_put(text, cp));
}

__attribute__((format(printf, 2, 3))) static qv_status add_format(qv_jbuilder *b,
                                                                  const char *format, ...)
{
    char text[256];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return qv_j_add(b, text, n < (int)sizeof text ? (size_t)n : sizeof text - 1);
}

/* ---- Numbers as text ------------------------------------------------------------------------- */

size_t qv_j_float_text(double f, char out[QV_J_FLOAT_MAX])
{
    if (isnan(f) || isinf(f))
        return (size_t)snprintf(out, QV_J_FLOAT_MAX, "%s",
                                isnan(f) ? "nan"
                                : f > 0  ? "inf"
                                         : "-inf");
    /* The fewest digits that read back as f: d.ddde±xx */
    char text[QV_J_FLOAT_MAX];
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*e", digits - 1, f);
        if (strtod(text, NULL) == f)
            break;
    }
    const char *mantissa = text + (text[0] == '-');
    int exponent = atoi(strchr(text, 'e') + 1);
    char digits[20];
    size_t n = 0, len = 0;
    for (const char *p = mantissa; *p != 'e'; p++) {
        if (*p != '.')
            digits[n++] = *p;
    }
    if (text[0] == '-')
        out[len++] = '-';
    if (exponent < -4 || exponent >= 16) {
        out[len++] = digits[0];
        if (n > 1) {
            out[len++] = '.';
            memcpy(out + len, digits + 1, n - 1);
            len += n - 1;
        }
        return len + (size_t)snprintf(out + len, QV_J_FLOAT_MAX - len, "e%c%02d",
                                      exponent < 0 ? '-' : '+', abs(exponent));
    }
    if (exponent < 0) {
        len += (size_t)snprintf(out + len, QV_J_FLOAT_MAX - len, "0.%.*s", -exponent - 1, "0000");
        memcpy(out + len, digits, n);
        return len + n;
    }
    size_t whole = (size_t)exponent + 1;
    for (size_t i = 0; i < whole; i++)
        out[len++] = i < n ? digits[i] : '0';
    out[len++] = '.';
    if (n <= whole)
        out[len++] = '0';
    for (size_t i = whole; i < n; i++)
        out[len++] = digits[i];
    return len;
}

/* ---- repr and str ---------------------------------------------------------------------------- */

/* Whether repr shows a character as it is. */
static bool is_printable(uint32_t cp)
{
    switch (utf8proc_category((utf8proc_int32_t)cp)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
        return false;
    case UTF8PROC_CATEGORY_ZS:
        return cp == ' ';
    default:
        return true;
    }
}

static qv_status add_repr_char(qv_jbuilder *b, uint32_t cp, char quote)
{
    if (cp == (uint8_t)quote || cp == '\\')
        return add_format(b, "\\%c", (char)cp);
    if (cp == '\n' || cp == '\r' || cp == '\t')
        return qv_j_add(b, cp == '\n' ? "\\n" : cp == '\r' ? "\\r" : "\\t", 2);
    if (is_printable(cp))
        return qv_j_add_char(b, cp);
    if (cp < 0x100)
        return add_format(b, "\\x%02x", cp);
    return add_format(b, cp < 0x10000 ? "\\u%04x" : "\\U%08x", cp);
}

static qv_status add_repr_str(qv_jbuilder *b, qv_jvalue v)
{
    bool single = memchr(v.str, '\'', v.len), twice = memchr(v.str, '"', v.len);
    char quote = single && !twice ? '"' : '\'';
    if (v.safe)
        QV_TRY(qv_j_add_text(b, QV_JSTR("Markup(")));
    QV_TRY(qv_j_add(b, &quote, 1));
    for (size_t i = 0, size; i < v.len; i += size)
        QV_TRY(add_repr_char(b, qv_unicode_get(v.str + i, &size), quote));
    QV_TRY(qv_j_add(b, &quote, 1));
    return v.safe ? qv_j_add_text(b, QV_JSTR(")")) : QV_OK;
}

static qv_status add_repr_seq(qv_jbuilder *b, const qv_jseq *seq, const char *open,
                              const char *close)
{
    QV_TRY(qv_j_add(b, open, strlen(open)));
    for (size_t i = 0; i < seq->n; i++) {
        if (i > 0)
            QV_TRY(qv_j_add_text(b, QV_JSTR(", ")));
        QV_TRY(qv_j_add_repr(b, seq->items[i]));
    }
    return qv_j_add(b, close, strlen(close));
}

static qv_status add_repr_dict(qv_jbuilder *b, const qv_jdict *dict)
{
    QV_TRY(qv_j_add_text(b, QV_JSTR("{")));
    for (uint32_t i = 0; i < dict->n; i++) {
        if (i > 0)
            QV_TRY(qv_j_add_text(b, QV_JSTR(", ")));
        QV_TRY(qv_j_add_repr(b, dict->entries[i].key));
        QV_TRY(qv_j_add_text(b, QV_JSTR(": ")));
        QV_TRY(qv_j_add_repr(b, dict->entries[i].value));
    }
    return qv_j_add_text(b, QV_JSTR("}"));
}

static qv_status add_repr_range(qv_jbuilder *b, const qv_jseq *range)
{
    QV_TRY(add_format(b, "range(%" PRId64 ", %" PRId64, range->start, range->stop));
    return range->step == 1 ? qv_j_add_text(b, QV_JSTR(")"))
                            : add_format(b, ", %" PRId64 ")", range->step);
}

/* repr of what holds other values. */
static qv_status add_repr_container(qv_jbuilder *b, qv_jvalue v)
{
    switch ((qv_jtype)v.type) {
    case QV_J_LIST:
        return add_repr_seq(b, v.seq, "[", "]");
    case QV_J_TUPLE:
        return add_repr_seq(b, v.seq, "(", v.seq->n == 1 ? ",)" : ")");
    case QV_J_VIEW:
        QV_TRY(add_format(b, "%s(", v.seq->name));
        return add_repr_seq(b, v.seq, "[", "])");
    case QV_J_NAMESPACE:
        QV_TRY(qv_j_add_text(b, QV_JSTR("<Namespace ")));
        QV_TRY(add_repr_dict(b, v.dict));
        return qv_j_add_text(b, QV_JSTR(">"));
    default:
        return add_repr_dict(b, v.dict);
    }
}

qv_status qv_j_add_repr(qv_jbuilder *b, qv_jvalue v)
{
    char text[QV_J_FLOAT_MAX];
    QV_TRY(qv_j_charge(b->run, 0));
    switch ((qv_jtype)v.type) {
    case QV_J_NONE:
    case QV_J_ABSENT:
        return qv_j_add_text(b, QV_JSTR("None"));
    case QV_J_BOOL:
        return qv_j_add_text(b, v.boolean ? QV_JSTR("True") : QV_JSTR("False"));
    case QV_J_INT:
        return add_format(b, "%" PRId64, v.integer);
    case QV_J_FLOAT:
        return qv_j_add(b, text, qv_j_float_text(v.real, text));
    case QV_J_STR:
        return add_repr_str(b, v);
    case QV_J_UNDEFINED:
        return qv_j_add_text(b, QV_JSTR("Undefined"));
    case QV_J_RANGE:
        return add_repr_range(b, v.seq);
    case QV_J_MACRO: {
        qv_jstr name = b->run->program->names[v.macro->node->macro.name];
        return add_format(b, "<Macro '%.*s'>", QV_JSTR_ARG(name));
    }
    case QV_J_LIST:
    case QV_J_TUPLE:
    case QV_J_VIEW:
    case QV_J_DICT:
    case QV_J_NAMESPACE:
        QV_TRY(qv_j_enter(b->run));
        QV_TRY(add_repr_container(b, v));
        qv_j_leave(b->run);
        return QV_OK;
    default:
        return add_format(b, "<%s object>", qv_j_type_name(v));
    }
}

qv_status qv_j_repr(qv_jrun *run, qv_jvalue v, qv_jstr *out)
{
    qv_jbuilder b = {.run = run};
    QV_TRY(qv_j_add_repr(&b, v));
    *out = qv_j_text(qv_j_built(&b));
    return QV_OK;
}

qv_status qv_j_to_str(qv_jrun *run, qv_jvalue v, qv_jstr *out)
{
    if (v.type == QV_J_STR) {
        *out = qv_j_text(v);
        return QV_OK;
    }
    if (v.type == QV_J_UNDEFINED) {
        *out = QV_JSTR("");
        return QV_OK;
    }
    return qv_j_repr(run, v, out);
}

/* ---- JSON out -------------------------------------------------------------------------------- */

static qv_status add_json_str(qv_jbuilder *b, qv_jstr s, bool ascii)
{
    static const char letters[] = "\"\\\n\r\t\f\b", names[] = "\"\\nrtfb";
    QV_TRY(qv_j_add_text(b, QV_JSTR("\"")));
    size_t plain = 0; /* start of what needs no escape */
    for (size_t i = 0, size; i < s.len; i += size) {
        uint32_t cp = qv_unicode_get(s.data + i, &size);
        bool escape = cp < 0x20 || cp == '"' || cp == '\\' || (ascii && cp >= 0x7F);
        if (!escape)
            continue;
        QV_TRY(qv_j_add(b, s.data + plain, i - plain));
        plain = i + size;
        const char *letter = cp > 0 && cp < 0x80 ? strchr(letters, (int)cp) : NULL;
        if (letter)
            QV_TRY(add_format(b, "\\%c", names[letter - letters]));
        else if (cp < 0x10000)
            QV_TRY(add_format(b, "\\u%04x", cp));
        else
            QV_TRY(add_format(b, "\\u%04x\\u%04x", 0xD800 + ((cp - 0x10000) >> 10),
                              0xDC00 + ((cp - 0x10000) & 0x3FF)));
    }
    QV_TRY(qv_j_add(b, s.data + plain, s.len - plain));
    return qv_j_add_text(b, QV_JSTR("\""));
}

static qv_status add_json_float(qv_jbuilder *b, double f)
{
    char text[QV_J_FLOAT_MAX];
    if (isnan(f))
        return qv_j_add_text(b, QV_JSTR("NaN"));
    if (isinf(f))
        return qv_j_add_text(b, f > 0 ? QV_JSTR("Infinity") : QV_JSTR("-Infinity"));
    return qv_j_add(b, text, qv_j_float_text(f, text));
}

static qv_status add_json(qv_jbuilder *b, qv_jvalue v, const qv_jjson_style *style, size_t level);

/* A line end and the indentation of a level, where there are lines at all. */
static qv_status add_json_line(qv_jbuilder *b, const qv_jjson_style *style, size_t level)
{
    if (!style->indent.data)
        return QV_OK;
    QV_TRY(qv_j_add_text(b, QV_JSTR("\n")));
    for (size_t i = 0; i < level; i++)
        QV_TRY(qv_j_add_text(b, style->indent));
    return QV_OK;
}

static qv_status add_json_list(qv_jbuilder *b, const qv_jseq *seq, const qv_jjson_style *style,
                               size_t level)
{
    QV_TRY(qv_j_add_text(b, QV_JSTR("[")));
    for (size_t i = 0; i < seq->n; i++) {
        if (i > 0)
            QV_TRY(qv_j_add_text(b, style->item_separator));
        QV_TRY(add_json_line(b, style, level + 1));
        QV_TRY(add_json(b, seq->items[i], style, level + 1));
    }
    if (seq->n > 0)
        QV_TRY(add_json_line(b, style, level));
    return qv_j_add_text(b, QV_JSTR("]"));
}

/* A key is a string, or what JSON can say of the value as one. */
static qv_status add_json_key(qv_jbuilder *b, qv_jvalue key, const qv_jjson_style *style)
{
    if (key.type == QV_J_STR)
        return add_json_str(b, qv_j_text(key), style->ascii);
    if (key.type > QV_J_STR || key.type < QV_J_NONE)
        return qv_j_fail(b->run, "keys must be str, int, float, bool or None, not %s",
                         qv_j_type_name(key));
    QV_TRY(qv_j_add_text(b, QV_JSTR("\"")));
    QV_TRY(add_json(b, key, style, 0));
    return qv_j_add_text(b, QV_JSTR("\""));
}

/* The entries in the order of their keys. */
static qv_status sorted_entries(qv_jrun *run, const qv_jdict *dict, qv_jvalue **entries)
{
    void *keys_memory, *entries_memory;
    QV_TRY(qv_j_alloc(run, dict->n, sizeof(qv_jvalue), &keys_memory));
    QV_TRY(qv_j_alloc(run, dict->n, sizeof(qv_jvalue), &entries_memory));
    qv_jvalue *sorted = entries_memory, *by = keys_memory;
    for (uint32_t i = 0; i < dict->n; i++) {
        by[i] = dict->entries[i].key;
        sorted[i] = qv_j_int(i);
    }
    *entries = sorted;
    return qv_j_sort(run, sorted, by, dict->n, false);
}

static qv_status add_json_dict(qv_jbuilder *b, const qv_jdict *dict, const qv_jjson_style *style,
                               size_t level)
{
    qv_jvalue *order = NULL;
    if (style->sort_keys)
        QV_TRY(sorted_entries(b->run, dict, &order));
    QV_TRY(qv_j_add_text(b, QV_JSTR("{")));
    for (uint32_t i = 0; i < dict->n; i++) {
        const qv_jentry *entry = &dict->entries[order ? (uint32_t)order[i].integer : i];
        if (i > 0)
            QV_TRY(qv_j_add_text(b, style->item_separator));
        QV_TRY(add_json_line(b, style, level + 1));
        QV_TRY(add_json_key(b, entry->key, style));
        QV_TRY(qv_j_add_text(b, style->key_separator));
        QV_TRY(add_json(b, entry->value, style, level + 1));
    }
    if (dict->n > 0)
        QV_TRY(add_json_line(b, style, level));
    return qv_j_add_text(b, QV_JSTR("}"));
}

static qv_status add_json(qv_jbuilder *b, qv_jvalue v, const qv_jjson_style *style, size_t level)
{
    QV_TRY(qv_j_charge(b->run, 0));
    switch ((qv_jtype)v.type) {
    case QV_J_NONE:
        return qv_j_add_text(b, QV_JSTR("null"));
    case QV_J_BOOL:
        return qv_j_add_text(b, v.boolean ? QV_JSTR("true") : QV_JSTR("false"));
    case QV_J_INT:
        return add_format(b, "%" PRId64, v.integer);
    case QV_J_FLOAT:
        return add_json_float(b, v.real);
    case QV_J_STR:
        return add_json_str(b, qv_j_text(v), style->ascii);
    case QV_J_LIST:
    case QV_J_TUPLE:
    case QV_J_DICT:
        QV_TRY(qv_j_enter(b->run));
        QV_TRY(v.type == QV_J_DICT ? add_json_dict(b, v.dict, style, level)
                                   : add_json_list(b, v.seq, style, level));
        qv_j_leave(b->run);
        return QV_OK;
    default:
        return qv_j_fail(b->run, "Object of type %s is not JSON serializable", qv_j_type_name(v));
    }
}

qv_status qv_j_add_json(qv_jbuilder *b, qv_jvalue v, const qv_jjson_style *style)
{
    return add_json(b, v, style, 0);
}
