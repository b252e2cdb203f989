/* Filters: what stands behind `|`.
 */
#include "models/jinja.h"
#include "models/unicode.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILTER(name) static qv_status name(qv_jrun *run, qv_jcall *call, qv_jvalue *out)

/* ---- Arguments ------------------------------------------------------------------------------- */

/* Absent, or none, which is the default of many parameters. */
static bool is_default(qv_jvalue v)
{
    return v.type == QV_J_ABSENT || v.type == QV_J_NONE;
}

static bool is_set(qv_jvalue v)
{
    return !qv_j_is_absent(v) && qv_j_truth(v);
}

/* The input as text that stays safe if it was. */
static qv_status input_text(qv_jrun *run, qv_jcall *call, qv_jvalue *out)
{
    qv_jstr s;
    QV_TRY(qv_j_to_str(run, call->self, &s));
    *out = qv_j_str(s.data, s.len);
    out->safe = call->self.type == QV_J_STR && call->self.safe;
    return QV_OK;
}

static qv_status new_iter(qv_jrun *run, size_t n, qv_jvalue *out)
{
    return qv_j_seq(run, QV_J_ITER, n, out);
}

/* ---- Text ------------------------------------------------------------------------------------ */

static qv_status change_case(qv_jrun *run, qv_jcall *call, qv_jcase to, qv_jvalue *out)
{
    qv_jstr s;
    QV_TRY(input_text(run, call, out));
    QV_TRY(qv_j_change_case(run, qv_j_text(*out), to, &s));
    out->str = s.data;
    out->len = s.len;
    return QV_OK;
}

FILTER(filter_upper)
{
    return change_case(run, call, QV_J_UPPER, out);
}

FILTER(filter_lower)
{
    return change_case(run, call, QV_J_LOWER, out);
}

FILTER(filter_capitalize)
{
    return change_case(run, call, QV_J_CAPITALIZE, out);
}

/* Words begin after white space, dashes and opening brackets: not where str.title has them begin.
 */
FILTER(filter_title)
{
    qv_jbuilder b = {.run = run};
    QV_TRY(input_text(run, call, out));
    qv_jstr s = qv_j_text(*out), part;
    size_t i = 0, size;
    while (i < s.len) {
        size_t start = i;
        uint32_t cp = 0;
        bool separators = true;
        for (; i < s.len; i += size) {
            cp = qv_unicode_get(s.data + i, &size);
            bool separator = qv_j_is_space(cp) || (cp < 0x80 && cp && strchr("-({[<", (int)cp));
            if (i > start && separator != separators)
                break;
            separators = separator;
        }
        qv_unicode_get(s.data + start, &size);
        QV_TRY(qv_j_change_case(run, (qv_jstr){s.data + start, size}, QV_J_UPPER, &part));
        QV_TRY(qv_j_add_text(&b, part));
        QV_TRY(qv_j_change_case(run, (qv_jstr){s.data + start + size, i - start - size}, QV_J_LOWER,
                                &part));
        QV_TRY(qv_j_add_text(&b, part));
    }
    *out = qv_j_built(&b);
    return QV_OK;
}

FILTER(filter_trim)
{
    qv_jstr chars = {0};
    QV_TRY(input_text(run, call, out));
    if (!is_default(call->args[0])) {
        if (call->args[0].type != QV_J_STR)
            return qv_j_fail(run, "strip arg must be None or str");
        chars = qv_j_text(call->args[0]);
    }
    QV_TRY(qv_j_charge(run, out->len * (1 + chars.len)));
    qv_jstr s = qv_j_strip(qv_j_text(*out), chars, QV_J_BOTH);
    out->str = s.data;
    out->len = s.len;
    return QV_OK;
}

FILTER(filter_string)
{
    return input_text(run, call, out);
}

FILTER(filter_safe)
{
    QV_TRY(input_text(run, call, out));
    out->safe = true;
    return QV_OK;
}

FILTER(filter_escape)
{
    qv_jstr s;
    QV_TRY(input_text(run, call, out));
    if (!out->safe || call->negate) {
        QV_TRY(qv_j_escape(run, qv_j_text(*out), &s));
        *out = qv_j_str(s.data, s.len);
    }
    out->safe = true;
    return QV_OK;
}

FILTER(filter_replace)
{
    qv_jstr s, old, new;
    int64_t count = -1;
    QV_TRY(qv_j_to_str(run, call->self, &s));
    QV_TRY(qv_j_to_str(run, call->args[0], &old));
    QV_TRY(qv_j_to_str(run, call->args[1], &new));
    if (!is_default(call->args[2]))
        QV_TRY(qv_j_int_arg(run, call->args[2], &count));
    QV_TRY(qv_j_replace(run, s, old, new, count, &s));
    *out = qv_j_str(s.data, s.len);
    return QV_OK;
}

/* Every line but the first, and but blank ones, is indented. */
FILTER(filter_indent)
{
    qv_jstr indent = {0};
    bool first = is_set(call->args[1]), blank = is_set(call->args[2]);
    qv_jvalue lines;
    int64_t width = 4;
    qv_jbuilder b = {.run = run}, spaces = {.run = run};
    if (call->self.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, call->self);
    if (call->self.type != QV_J_STR)
        return qv_j_fail(run, "indent needs a string, not '%s'", qv_j_type_name(call->self));
    if (call->args[0].type == QV_J_STR) {
        indent = qv_j_text(call->args[0]);
    } else {
        QV_TRY(qv_j_int_arg(run, call->args[0], &width));
        for (int64_t i = 0; i < width; i++)
            QV_TRY(qv_j_add_text(&spaces, QV_JSTR(" ")));
        indent = qv_j_text(qv_j_built(&spaces));
    }
    /* A line end is added, so that a text that ends with one keeps it. */
    qv_jstr s = qv_j_text(call->self);
    qv_jbuilder text = {.run = run};
    QV_TRY(qv_j_add_text(&text, s));
    QV_TRY(qv_j_add_text(&text, QV_JSTR("\n")));
    QV_TRY(qv_j_splitlines(run, qv_j_text(qv_j_built(&text)), false, &lines));
    for (size_t i = 0; i < lines.seq->n; i++) {
        qv_jstr line = qv_j_text(lines.seq->items[i]);
        bool indented = i == 0 ? first : blank || line.len > 0;
        if (i > 0)
            QV_TRY(qv_j_add_text(&b, QV_JSTR("\n")));
        if (indented)
            QV_TRY(qv_j_add_text(&b, indent));
        QV_TRY(qv_j_add_text(&b, line));
    }
    *out = qv_j_built(&b);
    out->safe = call->self.safe;
    return QV_OK;
}

/* Cut to a length, at a word unless `killwords`; texts that are only a little longer stay. */
FILTER(filter_truncate)
{
    int64_t length = 255, leeway = 5, n_end;
    qv_jstr end = QV_JSTR("...");
    qv_jvalue cut;
    qv_jbuilder b = {.run = run};
    QV_TRY(qv_j_int_arg(run, call->args[0], &length));
    if (call->args[2].type == QV_J_STR)
        end = qv_j_text(call->args[2]);
    if (!is_default(call->args[3]))
        QV_TRY(qv_j_int_arg(run, call->args[3], &leeway));
    size_t n;
    QV_TRY(qv_j_length(run, call->self, &n));
    n_end = (int64_t)qv_unicode_count(end.data, end.len);
    if (length < n_end)
        return qv_j_fail(run, "expected length >= %" PRId64 ", got %" PRId64, n_end, length);
    if (leeway < 0)
        return qv_j_fail(run, "expected leeway >= 0, got %" PRId64, leeway);
    *out = call->self;
    if ((int64_t)n <= length || (int64_t)n - length <= leeway)
        return QV_OK;
    if (call->self.type != QV_J_STR)
        return qv_j_fail(run, "truncate needs a string, not '%s'", qv_j_type_name(call->self));
    QV_TRY(qv_j_slice(run, call->self, qv_j_none(), qv_j_int(length - n_end), qv_j_none(), &cut));
    qv_jstr s = qv_j_text(cut);
    ptrdiff_t space = is_set(call->args[1]) ? -1 : qv_j_rfind(s, QV_JSTR(" "));
    QV_TRY(qv_j_add(&b, s.data, space >= 0 ? (size_t)space : s.len));
    QV_TRY(qv_j_add_text(&b, end));
    *out = qv_j_built(&b);
    return QV_OK;
}

/* Words are runs of what regular expressions call word characters. */
FILTER(filter_wordcount)
{
    int64_t n = 0;
    bool in_word = false;
    QV_TRY(input_text(run, call, out));
    for (size_t i = 0, size; i < out->len; i += size) {
        bool word = qv_unicode_is_word(qv_unicode_get(out->str + i, &size));
        n += word && !in_word;
        in_word = word;
    }
    QV_TRY(qv_j_charge(run, out->len));
    *out = qv_j_int(n);
    return QV_OK;
}

FILTER(filter_center)
{
    qv_jvalue method, width = qv_j_is_absent(call->args[0]) ? qv_j_int(80) : call->args[0];
    QV_TRY(input_text(run, call, out));
    QV_TRY(qv_j_attribute(run, *out, QV_JSTR("center"), &method));
    return qv_j_call_value(run, method, &(qv_jargs){.values = &width, .n = 1}, out);
}

/* ---- JSON ------------------------------------------------------------------------------------ */

/* A pair of strings, as separators=(',', ':') gives. */
static qv_status separators(qv_jrun *run, qv_jvalue v, qv_jjson_style *style)
{
    qv_jvalue *items;
    size_t n;
    QV_TRY(qv_j_iterate(run, v, &items, &n));
    if (n != 2 || items[0].type != QV_J_STR || items[1].type != QV_J_STR)
        return qv_j_fail(run, "tojson: separators are not two strings");
    style->item_separator = qv_j_text(items[0]);
    style->key_separator = qv_j_text(items[1]);
    return QV_OK;
}

FILTER(filter_tojson)
{
    qv_jjson_style style = {.ascii = is_set(call->args[0]),
                            .sort_keys = is_set(call->args[3]),
                            .item_separator = QV_JSTR(", "),
                            .key_separator = QV_JSTR(": ")};
    qv_jvalue indent = call->args[1];
    qv_jbuilder b = {.run = run}, spaces = {.run = run};
    if (!is_default(indent)) {
        int64_t width = 0;
        style.item_separator = QV_JSTR(",");
        if (indent.type != QV_J_STR)
            QV_TRY(qv_j_int_arg(run, indent, &width));
        for (int64_t i = 0; i < width; i++)
            QV_TRY(qv_j_add_text(&spaces, QV_JSTR(" ")));
        style.indent = qv_j_text(indent.type == QV_J_STR ? indent : qv_j_built(&spaces));
    }
    if (!is_default(call->args[2]))
        QV_TRY(separators(run, call->args[2], &style));
    QV_TRY(qv_j_add_json(&b, call->self, &style));
    *out = qv_j_built(&b);
    return QV_OK;
}

/* ---- Numbers --------------------------------------------------------------------------------- */

/* A float cut to a whole number; false if it does not fit. */
static bool truncated(double f, int64_t *out)
{
    if (!(f > -9223372036854775808.0 && f < 9223372036854775808.0))
        return false;
    *out = (int64_t)f;
    return true;
}

FILTER(filter_int)
{
    qv_jvalue v = call->self;
    int64_t base = 10, i;
    double f;
    QV_TRY(qv_j_int_arg(run, call->args[1], &base));
    if (base != 0 && (base < 2 || base > 36))
        return qv_j_fail(run, "int() base must be >= 2 and <= 36, or 0");
    if (v.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, v);
    *out = qv_j_is_absent(call->args[0]) ? qv_j_int(0) : call->args[0];
    if (v.type == QV_J_STR ? qv_j_parse_int(qv_j_text(v), (int)base, &i) : qv_j_as_int(v, &i)) {
        *out = qv_j_int(i);
        return QV_OK;
    }
    bool is_float = v.type == QV_J_STR ? qv_j_parse_float(qv_j_text(v), &f) : qv_j_as_float(v, &f);
    if (!is_float || isnan(f) || (isinf(f) && v.type == QV_J_STR))
        return QV_OK;
    if (isinf(f))
        return qv_j_fail(run, "cannot convert float infinity to integer");
    if (!truncated(f, &i))
        return qv_j_limit(run, "a number is beyond 64 bits");
    *out = qv_j_int(i);
    return QV_OK;
}

FILTER(filter_float)
{
    qv_jvalue v = call->self;
    double f;
    if (v.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, v);
    if (v.type == QV_J_STR ? qv_j_parse_float(qv_j_text(v), &f) : qv_j_as_float(v, &f))
        *out = qv_j_float(f);
    else
        *out = qv_j_is_absent(call->args[0]) ? qv_j_float(0) : call->args[0];
    return QV_OK;
}

FILTER(filter_abs)
{
    int64_t i;
    qv_jvalue v = call->self;
    if (v.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, v);
    if (qv_j_as_int(v, &i)) {
        if (i == INT64_MIN)
            return qv_j_limit(run, "a number is beyond 64 bits");
        *out = qv_j_int(i < 0 ? -i : i);
        return QV_OK;
    }
    if (v.type != QV_J_FLOAT)
        return qv_j_fail(run, "bad operand type for abs(): '%s'", qv_j_type_name(v));
    *out = qv_j_float(fabs(v.real));
    return QV_OK;
}

/* Round to digits after (or, if negative, before) the point; ties go to the even digit. */
static double round_to(double f, int64_t digits)
{
    char text[400];
    if (!isfinite(f) || digits > 22)
        return f;
    if (digits >= 0) {
        snprintf(text, sizeof text, "%.*f", (int)digits, f);
        return strtod(text, NULL);
    }
    double scale = pow(10, (double)-digits);
    return isfinite(scale) ? nearbyint(f / scale) * scale : 0.0;
}

/* Whole numbers stay whole numbers. */
static qv_status round_int(qv_jrun *run, int64_t i, int64_t digits, qv_jvalue *out)
{
    *out = qv_j_int(digits >= 0 ? i : 0);
    if (digits >= 0 || digits < -18)
        return QV_OK;
    int64_t scale = 1;
    for (int64_t d = digits; d < 0; d++)
        scale *= 10;
    int64_t rest = i % scale, down = i - rest, half = scale / 2;
    rest = rest < 0 ? -rest : rest;
    bool away = rest > half || (rest == half && down / scale % 2 != 0);
    if (away && __builtin_add_overflow(down, i < 0 ? -scale : scale, &down))
        return qv_j_limit(run, "a number is beyond 64 bits");
    *out = qv_j_int(down);
    return QV_OK;
}

FILTER(filter_round)
{
    int64_t digits = 0, i;
    double f;
    qv_jstr method = QV_JSTR("common");
    if (!qv_j_is_absent(call->args[1]))
        QV_TRY(qv_j_to_str(run, call->args[1], &method));
    QV_TRY(qv_j_int_arg(run, call->args[0], &digits));
    bool up = qv_j_str_is(method, "ceil"), down = qv_j_str_is(method, "floor");
    if (!up && !down && !qv_j_str_is(method, "common"))
        return qv_j_fail(run, "method must be common, ceil or floor");
    if (call->self.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, call->self);
    if (!up && !down && qv_j_as_int(call->self, &i))
        return round_int(run, i, digits, out);
    if (!qv_j_as_float(call->self, &f))
        return qv_j_fail(run, "type %s doesn't define __round__ method",
                         qv_j_type_name(call->self));
    if (up || down) {
        double scale = pow(10, (double)digits), scaled = f * scale;
        f = (up ? ceil(scaled) : floor(scaled)) / scale;
    } else {
        f = round_to(f, digits);
    }
    *out = qv_j_float(f);
    return QV_OK;
}

/* ---- Attributes by path ---------------------------------------------------------------------- */

/* "a.b.0": items within items; a whole number is an index. */
static qv_status attribute_path(qv_jrun *run, qv_jvalue v, qv_jvalue path, qv_jvalue fallback,
                                qv_jvalue *out)
{
    *out = v;
    if (is_default(path))
        return QV_OK;
    if (path.type != QV_J_STR) {
        QV_TRY(qv_j_item(run, v, path, out));
        if (out->type == QV_J_UNDEFINED && !is_default(fallback))
            *out = fallback;
        return QV_OK;
    }
    qv_jstr rest = qv_j_text(path);
    for (bool more = true; more;) {
        ptrdiff_t dot = qv_j_find(rest, QV_JSTR("."));
        qv_jstr part = {rest.data, dot >= 0 ? (size_t)dot : rest.len};
        qv_jvalue key = qv_j_str(part.data, part.len);
        int64_t index;
        bool digits = part.len > 0;
        for (size_t i = 0; i < part.len; i++)
            digits &= part.data[i] >= '0' && part.data[i] <= '9';
        if (digits && qv_j_parse_int(part, 10, &index))
            key = qv_j_int(index);
        QV_TRY(qv_j_item(run, *out, key, out));
        if (out->type == QV_J_UNDEFINED && !is_default(fallback))
            *out = fallback;
        more = dot >= 0;
        rest.data += more ? (size_t)dot + 1 : rest.len;
        rest.len -= more ? (size_t)dot + 1 : rest.len;
    }
    return QV_OK;
}

/* What an item is compared by: an attribute of it, in lower case unless `case_sensitive`. */
static qv_status comparison_key(qv_jrun *run, qv_jvalue item, qv_jvalue path,
                                qv_jvalue case_sensitive, qv_jvalue *out)
{
    qv_jstr s;
    QV_TRY(attribute_path(run, item, path, (qv_jvalue){0}, out));
    if (out->type == QV_J_STR && !is_set(case_sensitive)) {
        QV_TRY(qv_j_change_case(run, qv_j_text(*out), QV_J_LOWER, &s));
        *out = qv_j_str(s.data, s.len);
    }
    return QV_OK;
}

/* ---- Sequences ------------------------------------------------------------------------------- */

FILTER(filter_length)
{
    size_t n;
    QV_TRY(qv_j_length(run, call->self, &n));
    *out = qv_j_int((int64_t)n);
    return QV_OK;
}

FILTER(filter_first)
{
    qv_jvalue *items;
    size_t n;
    qv_jvalue v = call->self;
    if (v.type == QV_J_ITER && v.seq->pos < v.seq->n) {
        *out = v.seq->items[v.seq->pos++];
        return QV_OK;
    }
    QV_TRY(qv_j_iterate(run, v, &items, &n));
    if (n == 0)
        return qv_j_undefined_hint(run, "No first item, sequence was empty.", out);
    *out = items[0];
    return QV_OK;
}

FILTER(filter_last)
{
    qv_jvalue *items;
    size_t n;
    if (call->self.type == QV_J_ITER)
        return qv_j_fail(run, "'%s' object is not reversible", qv_j_type_name(call->self));
    QV_TRY(qv_j_iterate(run, call->self, &items, &n));
    if (n == 0)
        return qv_j_undefined_hint(run, "No last item, sequence was empty.", out);
    *out = items[n - 1];
    return QV_OK;
}

FILTER(filter_list)
{
    qv_jvalue *items;
    size_t n;
    QV_TRY(qv_j_iterate(run, call->self, &items, &n));
    QV_TRY(qv_j_seq(run, QV_J_LIST, n, out));
    if (n > 0)
        memcpy(out->seq->items, items, n * sizeof *items);
    return QV_OK;
}

FILTER(filter_join)
{
    qv_jvalue *items, item;
    size_t n;
    qv_jstr separator = {"", 0}, text;
    qv_jbuilder b = {.run = run};
    if (!qv_j_is_absent(call->args[0]))
        QV_TRY(qv_j_to_str(run, call->args[0], &separator));
    QV_TRY(qv_j_iterate(run, call->self, &items, &n));
    for (size_t i = 0; i < n; i++) {
        if (i > 0)
            QV_TRY(qv_j_add_text(&b, separator));
        QV_TRY(attribute_path(run, items[i], call->args[1], (qv_jvalue){0}, &item));
        QV_TRY(qv_j_to_str(run, item, &text));
        QV_TRY(qv_j_add_text(&b, text));
    }
    *out = qv_j_built(&b);
    return QV_OK;
}

FILTER(filter_reverse)
{
    qv_jvalue *items;
    size_t n;
    if (call->self.type == QV_J_STR)
        return qv_j_slice(run, call->self, qv_j_none(), qv_j_none(), qv_j_int(-1), out);
    QV_TRY(qv_j_iterate(run, call->self, &items, &n));
    /* What may be walked once cannot be walked backwards without a copy, which is a list. */
    QV_TRY(qv_j_seq(run, call->self.type == QV_J_ITER ? QV_J_LIST : QV_J_ITER, n, out));
    out->seq->name = "list_reverseiterator";
    for (size_t i = 0; i < n; i++)
        out->seq->items[i] = items[n - 1 - i];
    return QV_OK;
}

/* The keys that several attributes, parted by commas, sort by: one list an item. */
static qv_status sort_key(qv_jrun *run, qv_jvalue item, qv_jvalue paths, qv_jvalue case_sensitive,
                          qv_jvalue *out)
{
    if (paths.type != QV_J_STR || qv_j_find(qv_j_text(paths), QV_JSTR(",")) < 0)
        return comparison_key(run, item, paths, case_sensitive, out);
    qv_jvalue parts;
    QV_TRY(qv_j_split(run, qv_j_text(paths), QV_JSTR(","), -1, false, &parts));
    QV_TRY(qv_j_seq(run, QV_J_LIST, parts.seq->n, out));
    for (size_t i = 0; i < parts.seq->n; i++)
        QV_TRY(comparison_key(run, item, parts.seq->items[i], case_sensitive, &out->seq->items[i]));
    return QV_OK;
}

FILTER(filter_sort)
{
    qv_jvalue keys;
    qv_jcall list = {.self = call->self};
    QV_TRY(filter_list(run, &list, out));
    QV_TRY(qv_j_seq(run, QV_J_LIST, out->seq->n, &keys));
    for (size_t i = 0; i < out->seq->n; i++)
        QV_TRY(
            sort_key(run, out->seq->items[i], call->args[2], call->args[1], &keys.seq->items[i]));
    return qv_j_sort(run, out->seq->items, keys.seq->items, out->seq->n, is_set(call->args[0]));
}

FILTER(filter_unique)
{
    qv_jvalue *items, seen;
    size_t n;
    QV_TRY(qv_j_iterate(run, call->self, &items, &n));
    QV_TRY(new_iter(run, n, out));
    QV_TRY(qv_j_dict(run, QV_J_DICT, n, &seen));
    out->seq->n = 0;
    for (size_t i = 0; i < n; i++) {
        qv_jvalue key;
        uint32_t n_seen = seen.dict->n;
        QV_TRY(comparison_key(run, items[i], call->args[1], call->args[0], &key));
        QV_TRY(qv_j_dict_set(run, seen.dict, key, qv_j_none()));
        if (seen.dict->n > n_seen)
            out->seq->items[out->seq->n++] = items[i];
    }
    return QV_OK;
}

/* min and, negated, max: the first of those that are least or greatest. */
FILTER(filter_min)
{
    qv_jvalue *items, best, key;
    size_t n;
    int order;
    bool unordered;
    QV_TRY(qv_j_iterate(run, call->self, &items, &n));
    if (n == 0)
        return qv_j_undefined_hint(run, "No aggregated item, sequence was empty.", out);
    *out = items[0];
    QV_TRY(comparison_key(run, items[0], call->args[1], call->args[0], &best));
    for (size_t i = 1; i < n; i++) {
        QV_TRY(comparison_key(run, items[i], call->args[1], call->args[0], &key));
        QV_TRY(qv_j_compare(run, key, best, call->negate ? ">" : "<", &order, &unordered));
        if (!unordered && (call->negate ? order > 0 : order < 0)) {
            *out = items[i];
            best = key;
        }
    }
    return QV_OK;
}

FILTER(filter_sum)
{
    qv_jvalue *items, item;
    size_t n;
    *out = qv_j_is_absent(call->args[1]) ? qv_j_int(0) : call->args[1];
    if (out->type == QV_J_STR)
        return qv_j_fail(run, "sum() can't sum strings [use ''.join(seq) instead]");
    QV_TRY(qv_j_iterate(run, call->self, &items, &n));
    for (size_t i = 0; i < n; i++) {
        QV_TRY(attribute_path(run, items[i], call->args[0], (qv_jvalue){0}, &item));
        QV_TRY(qv_j_binary(run, QV_JT_ADD, *out, item, out));
    }
    return QV_OK;
}

/* ---- Mapping and selecting ------------------------------------------------------------------- */

/* The arguments from `from` on. */
static qv_jargs rest_of(const qv_jargs *args, size_t from)
{
    return (qv_jargs){.values = args->values + from,
                      .n = args->n - from,
                      .named = args->named,
                      .n_named = args->n_named};
}

static qv_jvalue named_arg(const qv_jargs *args, const char *name)
{
    for (size_t i = 0; i < args->n_named; i++) {
        if (qv_j_str_is(args->named[i].name, name))
            return args->named[i].value;
    }
    return (qv_jvalue){0};
}

/* The filter or test that an argument names. */
static qv_status named_callable(qv_jrun *run, qv_jvalue name, bool filter, const qv_jcallable **out)
{
    qv_jstr text;
    QV_TRY(qv_j_to_str(run, name, &text));
    *out = filter ? qv_j_find_filter(text) : qv_j_find_test(text);
    if (!*out)
        return qv_j_fail(run, "No %s named '%.*s'.", filter ? "filter" : "test", QV_JSTR_ARG(text));
    return QV_OK;
}

static qv_status map_attribute(qv_jrun *run, const qv_jargs *args, qv_jvalue *items, size_t n,
                               qv_jvalue *out)
{
    qv_jvalue path = named_arg(args, "attribute"), fallback = named_arg(args, "default");
    for (size_t i = 0; i < args->n_named; i++) {
        qv_jstr name = args->named[i].name;
        if (!qv_j_str_is(name, "attribute") && !qv_j_str_is(name, "default"))
            return qv_j_fail(run, "Unexpected keyword argument '%.*s'", QV_JSTR_ARG(name));
    }
    QV_TRY(new_iter(run, n, out));
    for (size_t i = 0; i < n; i++)
        QV_TRY(attribute_path(run, items[i], path, fallback, &out->seq->items[i]));
    return QV_OK;
}

FILTER(filter_map)
{
    qv_jvalue *items;
    size_t n;
    const qv_jcallable *filter;
    QV_TRY(qv_j_iterate(run, call->self, &items, &n));
    if (call->all->n == 0 && !qv_j_is_absent(named_arg(call->all, "attribute")))
        return map_attribute(run, call->all, items, n, out);
    if (call->all->n == 0)
        return qv_j_fail(run, "map requires a filter argument");
    QV_TRY(named_callable(run, call->all->values[0], true, &filter));
    qv_jargs args = rest_of(call->all, 1);
    QV_TRY(new_iter(run, n, out));
    QV_TRY(qv_j_enter(run));
    for (size_t i = 0; i < n; i++)
        QV_TRY(qv_j_call(run, "filter", filter, items[i], &args, &out->seq->items[i]));
    qv_j_leave(run);
    return QV_OK;
}

/* Keep the items (by an attribute, if `path` is given) for which a test, or truth, holds. */
static qv_status select_items(qv_jrun *run, qv_jcall *call, bool by_attribute, qv_jvalue *out)
{
    qv_jvalue *items;
    size_t n, n_fixed = by_attribute ? 1 : 0;
    const qv_jcallable *test = NULL;
    qv_jargs args = {0};
    qv_jvalue path = {0};
    QV_TRY(qv_j_iterate(run, call->self, &items, &n));
    if (call->all->n < n_fixed)
        return qv_j_fail(run, "Missing parameter for attribute name");
    if (by_attribute)
        path = call->all->values[0];
    if (call->all->n > n_fixed) {
        QV_TRY(named_callable(run, call->all->values[n_fixed], false, &test));
        args = rest_of(call->all, n_fixed + 1);
    }
    QV_TRY(new_iter(run, n, out));
    out->seq->n = 0;
    for (size_t i = 0; i < n; i++) {
        qv_jvalue v, holds;
        QV_TRY(attribute_path(run, items[i], path, (qv_jvalue){0}, &v));
        holds = v;
        if (test)
            QV_TRY(qv_j_call(run, "test", test, v, &args, &holds));
        if (qv_j_truth(holds) != call->negate)
            out->seq->items[out->seq->n++] = items[i];
    }
    return QV_OK;
}

FILTER(filter_select)
{
    return select_items(run, call, false, out);
}

FILTER(filter_selectattr)
{
    return select_items(run, call, true, out);
}

/* ---- Mappings and defaults ------------------------------------------------------------------- */

FILTER(filter_items)
{
    if (call->self.type == QV_J_UNDEFINED)
        return new_iter(run, 0, out);
    if (call->self.type != QV_J_DICT)
        return qv_j_fail(run, "Can only get item pairs from a mapping.");
    const qv_jdict *dict = call->self.dict;
    QV_TRY(new_iter(run, dict->n, out));
    for (uint32_t i = 0; i < dict->n; i++)
        QV_TRY(qv_j_pair(run, dict->entries[i].key, dict->entries[i].value, &out->seq->items[i]));
    return QV_OK;
}

FILTER(filter_dictsort)
{
    qv_jstr by = QV_JSTR("key");
    qv_jvalue keys;
    if (call->self.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, call->self);
    if (call->self.type != QV_J_DICT)
        return qv_j_fail(run, "'%s' object has no attribute 'items'", qv_j_type_name(call->self));
    if (!qv_j_is_absent(call->args[1]))
        QV_TRY(qv_j_to_str(run, call->args[1], &by));
    bool by_value = qv_j_str_is(by, "value");
    if (!by_value && !qv_j_str_is(by, "key"))
        return qv_j_fail(run, "You can only sort by either \"key\" or \"value\"");
    QV_TRY(filter_items(run, call, out));
    out->type = QV_J_LIST;
    size_t n = out->seq->n;
    QV_TRY(qv_j_seq(run, QV_J_LIST, n, &keys));
    for (size_t i = 0; i < n; i++)
        QV_TRY(comparison_key(run, out->seq->items[i].seq->items[by_value], (qv_jvalue){0},
                              call->args[0], &keys.seq->items[i]));
    return qv_j_sort(run, out->seq->items, keys.seq->items, n, is_set(call->args[2]));
}

FILTER(filter_default)
{
    bool missing =
        call->self.type == QV_J_UNDEFINED || (is_set(call->args[1]) && !qv_j_truth(call->self));
    qv_jvalue fallback = qv_j_is_absent(call->args[0]) ? qv_j_str("", 0) : call->args[0];
    *out = missing ? fallback : call->self;
    return qv_j_charge(run, 0);
}

/* Like obj.name, but an item of that name does not count. */
FILTER(filter_attr)
{
    qv_jstr name;
    QV_TRY(qv_j_to_str(run, call->args[0], &name));
    if (call->self.type == QV_J_DICT) {
        qv_jvalue empty;
        QV_TRY(qv_j_dict(run, QV_J_DICT, 0, &empty));
        QV_TRY(qv_j_attribute(run, empty, name, out));
        if (out->type == QV_J_METHOD)
            return qv_j_attribute(run, call->self, name, out);
        return QV_OK;
    }
    return qv_j_attribute(run, call->self, name, out);
}

/* ---- The table ------------------------------------------------------------------------------- */

static const qv_jcallable filters[] = {
    {.name = "abs", .fn = filter_abs},
    {.name = "attr", .fn = filter_attr, .params = {"name"}, .n_required = 1},
    {.name = "capitalize", .fn = filter_capitalize},
    {.name = "center", .fn = filter_center, .params = {"width"}},
    {.name = "count", .fn = filter_length},
    {.name = "d", .fn = filter_default, .params = {"default_value", "boolean"}},
    {.name = "default", .fn = filter_default, .params = {"default_value", "boolean"}},
    {.name = "dictsort", .fn = filter_dictsort, .params = {"case_sensitive", "by", "reverse"}},
    {.name = "e", .fn = filter_escape},
    {.name = "escape", .fn = filter_escape},
    {.name = "first", .fn = filter_first},
    {.name = "float", .fn = filter_float, .params = {"default"}},
    {.name = "forceescape", .fn = filter_escape, .negate = true},
    {.name = "indent", .fn = filter_indent, .params = {"width", "first", "blank"}},
    {.name = "int", .fn = filter_int, .params = {"default", "base"}},
    {.name = "items", .fn = filter_items},
    {.name = "join", .fn = filter_join, .params = {"d", "attribute"}},
    {.name = "last", .fn = filter_last},
    {.name = "length", .fn = filter_length},
    {.name = "list", .fn = filter_list},
    {.name = "lower", .fn = filter_lower},
    {.name = "map", .fn = filter_map, .rest = true},
    {.name = "max", .fn = filter_min, .params = {"case_sensitive", "attribute"}, .negate = true},
    {.name = "min", .fn = filter_min, .params = {"case_sensitive", "attribute"}},
    {.name = "reject", .fn = filter_select, .rest = true, .negate = true},
    {.name = "rejectattr", .fn = filter_selectattr, .rest = true, .negate = true},
    {.name = "replace", .fn = filter_replace, .params = {"old", "new", "count"}, .n_required = 2},
    {.name = "reverse", .fn = filter_reverse},
    {.name = "round", .fn = filter_round, .params = {"precision", "method"}},
    {.name = "safe", .fn = filter_safe},
    {.name = "select", .fn = filter_select, .rest = true},
    {.name = "selectattr", .fn = filter_selectattr, .rest = true},
    {.name = "sort", .fn = filter_sort, .params = {"reverse", "case_sensitive", "attribute"}},
    {.name = "string", .fn = filter_string},
    {.name = "sum", .fn = filter_sum, .params = {"attribute", "start"}},
    {.name = "title", .fn = filter_title},
    {.name = "tojson",
     .fn = filter_tojson,
     .params = {"ensure_ascii", "indent", "separators", "sort_keys"}},
    {.name = "trim", .fn = filter_trim, .params = {"chars"}},
    {.name = "truncate", .fn = filter_truncate, .params = {"length", "killwords", "end", "leeway"}},
    {.name = "unique", .fn = filter_unique, .params = {"case_sensitive", "attribute"}},
    {.name = "upper", .fn = filter_upper},
    {.name = "wordcount", .fn = filter_wordcount},
};

const qv_jcallable *qv_j_find_filter(qv_jstr name)
{
    return qv_j_find_in(filters, sizeof filters / sizeof filters[0], name);
}
