/* Methods of strings, lists and dicts: those of Python that read. Methods that would change their
 * object are known by name, because jinja2's sandbox refuses them in words of its own.
 */
#include "models/jinja.h"
#include "models/unicode.h"

#include <inttypes.h>
#include <string.h>
#include <utf8proc.h>

/* ---- Safety ---------------------------------------------------------------------------------- */

/* Marks the strings of a list as safe, when what they came from is. */
static void pass_safety(qv_jvalue list, bool safe)
{
    for (size_t i = 0; safe && i < list.seq->n; i++)
        list.seq->items[i].safe = true;
}

/* The other text of an operation on `self`: escaped if that is safe and the other is not. */
static qv_status joined_text(qv_jrun *run, qv_jvalue self, qv_jvalue other, qv_jstr *out)
{
    QV_TRY(qv_j_text_arg(run, other, out));
    return self.safe && !other.safe ? qv_j_escape(run, *out, out) : QV_OK;
}

/* ---- Methods of strings ---------------------------------------------------------------------- */

#define METHOD(name) static qv_status name(qv_jrun *run, qv_jcall *call, qv_jvalue *out)

static qv_status change_case(qv_jrun *run, qv_jcall *call, qv_jcase to, qv_jvalue *out)
{
    qv_jstr s;
    QV_TRY(qv_j_change_case(run, qv_j_text(call->self), to, &s));
    *out = qv_j_make_text(s, call->self.safe);
    return QV_OK;
}

METHOD(str_upper)
{
    return change_case(run, call, QV_J_UPPER, out);
}

METHOD(str_lower)
{
    return change_case(run, call, QV_J_LOWER, out);
}

METHOD(str_title)
{
    return change_case(run, call, QV_J_TITLE, out);
}

METHOD(str_capitalize)
{
    return change_case(run, call, QV_J_CAPITALIZE, out);
}

METHOD(str_swapcase)
{
    return change_case(run, call, QV_J_SWAPCASE, out);
}

static qv_status strip(qv_jrun *run, qv_jcall *call, qv_jside side, qv_jvalue *out)
{
    qv_jstr chars = {0};
    if (!qv_j_is_absent(call->args[0]) && call->args[0].type != QV_J_NONE)
        QV_TRY(qv_j_text_arg(run, call->args[0], &chars));
    *out = qv_j_make_text(qv_j_strip(qv_j_text(call->self), chars, side), call->self.safe);
    return qv_j_charge(run, call->self.len * (1 + chars.len));
}

METHOD(str_strip)
{
    return strip(run, call, QV_J_BOTH, out);
}

METHOD(str_lstrip)
{
    return strip(run, call, QV_J_LEFT, out);
}

METHOD(str_rstrip)
{
    return strip(run, call, QV_J_RIGHT, out);
}

static qv_status split(qv_jrun *run, qv_jcall *call, bool from_right, qv_jvalue *out)
{
    qv_jstr sep = {0};
    int64_t max = -1;
    if (!qv_j_is_absent(call->args[0]) && call->args[0].type != QV_J_NONE)
        QV_TRY(qv_j_text_arg(run, call->args[0], &sep));
    QV_TRY(qv_j_int_arg(run, call->args[1], &max));
    QV_TRY(qv_j_split(run, qv_j_text(call->self), sep, max, from_right, out));
    pass_safety(*out, call->self.safe);
    return QV_OK;
}

METHOD(str_split)
{
    return split(run, call, false, out);
}

METHOD(str_rsplit)
{
    return split(run, call, true, out);
}

METHOD(str_splitlines)
{
    bool keep_ends = !qv_j_is_absent(call->args[0]) && qv_j_truth(call->args[0]);
    QV_TRY(qv_j_splitlines(run, qv_j_text(call->self), keep_ends, out));
    pass_safety(*out, call->self.safe);
    return QV_OK;
}

static qv_status partition(qv_jrun *run, qv_jcall *call, bool from_right, qv_jvalue *out)
{
    qv_jstr s = qv_j_text(call->self), sep;
    QV_TRY(qv_j_text_arg(run, call->args[0], &sep));
    if (sep.len == 0)
        return qv_j_fail(run, "empty separator");
    QV_TRY(qv_j_charge(run, s.len));
    ptrdiff_t at = from_right ? qv_j_rfind(s, sep) : qv_j_find(s, sep);
    QV_TRY(qv_j_seq(run, QV_J_TUPLE, 3, out));
    qv_jvalue *items = out->seq->items;
    items[0] = items[1] = items[2] = qv_j_str("", 0);
    if (at < 0) {
        items[from_right ? 2 : 0] = call->self;
    } else {
        size_t after = (size_t)at + sep.len;
        items[0] = qv_j_str(s.data, (size_t)at);
        items[1] = qv_j_str(sep.data, sep.len);
        items[2] = qv_j_str(s.data + after, s.len - after);
    }
    pass_safety(*out, call->self.safe);
    return QV_OK;
}

METHOD(str_partition)
{
    return partition(run, call, false, out);
}

METHOD(str_rpartition)
{
    return partition(run, call, true, out);
}

METHOD(str_replace)
{
    qv_jstr old, new, s = qv_j_text(call->self);
    int64_t count = -1;
    QV_TRY(qv_j_text_arg(run, call->args[0], &old));
    QV_TRY(joined_text(run, call->self, call->args[1], &new));
    QV_TRY(qv_j_int_arg(run, call->args[2], &count));
    QV_TRY(qv_j_replace(run, s, old, new, count, &s));
    *out = qv_j_make_text(s, call->self.safe);
    return QV_OK;
}

METHOD(str_join)
{
    qv_jvalue *items;
    size_t n;
    qv_jbuilder b = {.run = run};
    QV_TRY(qv_j_iterate(run, call->args[0], &items, &n));
    for (size_t i = 0; i < n; i++) {
        if (items[i].type != QV_J_STR)
            return qv_j_fail(run, "sequence item %zu: expected str instance, %s found", i,
                             qv_j_type_name(items[i]));
        qv_jstr item;
        QV_TRY(joined_text(run, call->self, items[i], &item));
        if (i > 0)
            QV_TRY(qv_j_add_text(&b, qv_j_text(call->self)));
        QV_TRY(qv_j_add_text(&b, item));
    }
    *out = qv_j_built(&b);
    out->safe = call->self.safe;
    return QV_OK;
}

/* The part of a string that start and end arguments leave; *valid is false when start is beyond the
 * end. *offset gets where it begins. */
static qv_status window(qv_jrun *run, qv_jvalue self, qv_jvalue start, qv_jvalue end, qv_jstr *out,
                        size_t *offset, bool *valid)
{
    qv_jstr s = qv_j_text(self);
    int64_t from = 0, to = INT64_MAX;
    if (start.type != QV_J_NONE)
        QV_TRY(qv_j_int_arg(run, start, &from));
    if (end.type != QV_J_NONE)
        QV_TRY(qv_j_int_arg(run, end, &to));
    QV_TRY(qv_j_charge(run, s.len));
    size_t first = qv_j_offset(s, from), last = qv_j_offset(s, to);
    *valid = first <= last && (from <= 0 || from <= (int64_t)qv_unicode_count(s.data, s.len));
    *offset = first;
    *out = (qv_jstr){s.data + first, *valid ? last - first : 0};
    return QV_OK;
}

static qv_status find(qv_jrun *run, qv_jcall *call, bool from_right, bool required, qv_jvalue *out)
{
    qv_jstr s, needle;
    size_t offset;
    bool valid;
    QV_TRY(qv_j_text_arg(run, call->args[0], &needle));
    QV_TRY(window(run, call->self, call->args[1], call->args[2], &s, &offset, &valid));
    ptrdiff_t at = !valid ? -1 : from_right ? qv_j_rfind(s, needle) : qv_j_find(s, needle);
    if (at < 0 && required)
        return qv_j_fail(run, "substring not found");
    *out = qv_j_int(at < 0 ? -1 : (int64_t)qv_unicode_count(call->self.str, offset + (size_t)at));
    return QV_OK;
}

METHOD(str_find)
{
    return find(run, call, false, false, out);
}

METHOD(str_rfind)
{
    return find(run, call, true, false, out);
}

METHOD(str_index)
{
    return find(run, call, false, true, out);
}

METHOD(str_rindex)
{
    return find(run, call, true, true, out);
}

METHOD(str_count)
{
    qv_jstr s, needle;
    size_t offset;
    bool valid;
    int64_t n = 0;
    QV_TRY(qv_j_text_arg(run, call->args[0], &needle));
    QV_TRY(window(run, call->self, call->args[1], call->args[2], &s, &offset, &valid));
    if (valid && needle.len == 0)
        n = (int64_t)qv_unicode_count(s.data, s.len) + 1;
    for (ptrdiff_t at; valid && needle.len > 0 && (at = qv_j_find(s, needle)) >= 0; n++) {
        s.data += (size_t)at + needle.len;
        s.len -= (size_t)at + needle.len;
    }
    *out = qv_j_int(n);
    return QV_OK;
}

static bool has_affix(qv_jstr s, qv_jstr affix, bool at_end)
{
    return affix.len <= s.len &&
           memcmp(s.data + (at_end ? s.len - affix.len : 0), affix.data, affix.len) == 0;
}

/* startswith and endswith take one string or a tuple of them. */
static qv_status affix(qv_jrun *run, qv_jcall *call, bool at_end, qv_jvalue *out)
{
    qv_jstr s;
    size_t offset;
    bool valid, found = false;
    qv_jvalue one = call->args[0], *items = &one;
    size_t n = 1;
    if (one.type == QV_J_TUPLE)
        QV_TRY(qv_j_iterate(run, one, &items, &n));
    QV_TRY(window(run, call->self, call->args[1], call->args[2], &s, &offset, &valid));
    for (size_t i = 0; i < n; i++) {
        if (items[i].type != QV_J_STR)
            return qv_j_fail(run, "%s first arg must be str or a tuple of str, not %s",
                             at_end ? "endswith" : "startswith", qv_j_type_name(items[i]));
        found |= valid && has_affix(s, qv_j_text(items[i]), at_end);
    }
    *out = qv_j_bool(found);
    return QV_OK;
}

METHOD(str_startswith)
{
    return affix(run, call, false, out);
}

METHOD(str_endswith)
{
    return affix(run, call, true, out);
}

static qv_status remove_affix(qv_jrun *run, qv_jcall *call, bool at_end, qv_jvalue *out)
{
    qv_jstr s = qv_j_text(call->self), part;
    QV_TRY(qv_j_text_arg(run, call->args[0], &part));
    if (has_affix(s, part, at_end)) {
        s.data += at_end ? 0 : part.len;
        s.len -= part.len;
    }
    *out = qv_j_make_text(s, call->self.safe);
    return QV_OK;
}

METHOD(str_removeprefix)
{
    return remove_affix(run, call, false, out);
}

METHOD(str_removesuffix)
{
    return remove_affix(run, call, true, out);
}

/* Fill up to a width: `left` of the fill goes in front. */
static qv_status pad(qv_jrun *run, qv_jcall *call, int where, qv_jvalue *out)
{
    qv_jstr fill = QV_JSTR(" ");
    int64_t width = 0;
    size_t n = qv_unicode_count(call->self.str, call->self.len);
    QV_TRY(qv_j_int_arg(run, call->args[0], &width));
    if (!qv_j_is_absent(call->args[1]))
        QV_TRY(qv_j_text_arg(run, call->args[1], &fill));
    if (qv_unicode_count(fill.data, fill.len) != 1)
        return qv_j_fail(run, "The fill character must be exactly one character long");
    if (width > (int64_t)run->limits.max_output_bytes)
        return qv_j_limit(run, "a text of width %" PRId64 " is longer than any output", width);
    size_t total = width > (int64_t)n ? (size_t)width - n : 0;
    /* As CPython centers: an odd rest goes to the left where the width is odd. */
    size_t left = where < 0 ? 0 : where > 0 ? total : total / 2 + (total & (size_t)width & 1);
    qv_jbuilder b = {.run = run};
    for (size_t i = 0; i < total; i++) {
        if (i == left)
            QV_TRY(qv_j_add_text(&b, qv_j_text(call->self)));
        QV_TRY(qv_j_add_text(&b, fill));
    }
    if (left == total)
        QV_TRY(qv_j_add_text(&b, qv_j_text(call->self)));
    *out = qv_j_built(&b);
    out->safe = call->self.safe;
    return QV_OK;
}

METHOD(str_ljust)
{
    return pad(run, call, -1, out);
}

METHOD(str_rjust)
{
    return pad(run, call, 1, out);
}

METHOD(str_center)
{
    return pad(run, call, 0, out);
}

METHOD(str_zfill)
{
    bool sign = call->self.len > 0 && (call->self.str[0] == '-' || call->self.str[0] == '+');
    qv_jvalue self = call->self;
    call->args[1] = qv_j_str("0", 1);
    if (sign) {
        int64_t width = 0;
        QV_TRY(qv_j_int_arg(run, call->args[0], &width));
        call->args[0] = qv_j_int(width > 0 ? width - 1 : 0);
        call->self.str++;
        call->self.len--;
    }
    QV_TRY(pad(run, call, 1, out));
    if (!sign)
        return QV_OK;
    qv_jbuilder b = {.run = run};
    QV_TRY(qv_j_add(&b, self.str, 1));
    QV_TRY(qv_j_add_text(&b, qv_j_text(*out)));
    *out = qv_j_built(&b);
    out->safe = self.safe;
    return QV_OK;
}

/* ---- Classes of strings ---------------------------------------------------------------------- */

static bool is_decimal(uint32_t cp)
{
    return utf8proc_category((utf8proc_int32_t)cp) == UTF8PROC_CATEGORY_ND;
}

/* Decimals, and digits in places where they do not count: superscripts, circles, full stops. */
static bool is_digit(uint32_t cp)
{
    static const uint32_t ranges[][2] = {
        {0xB2, 0xB3},       {0xB9, 0xB9},       {0x1369, 0x1371},   {0x19DA, 0x19DA},
        {0x2070, 0x2070},   {0x2074, 0x2079},   {0x2080, 0x2089},   {0x2460, 0x2468},
        {0x2474, 0x247C},   {0x2488, 0x2490},   {0x24EA, 0x24EA},   {0x24F5, 0x24FD},
        {0x24FF, 0x24FF},   {0x2776, 0x277E},   {0x2780, 0x2788},   {0x278A, 0x2792},
        {0x10A40, 0x10A43}, {0x10E60, 0x10E68}, {0x11052, 0x1105A}, {0x1F100, 0x1F10A},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        if (cp >= ranges[i][0] && cp <= ranges[i][1])
            return true;
    }
    return is_decimal(cp);
}

static bool is_numeric(uint32_t cp)
{
    utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
    return c == UTF8PROC_CATEGORY_NL || c == UTF8PROC_CATEGORY_NO || is_digit(cp);
}

static bool is_alpha(uint32_t cp)
{
    utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
    return c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_LO;
}

static bool is_alnum(uint32_t cp)
{
    return is_alpha(cp) || is_numeric(cp);
}

static bool is_ascii(uint32_t cp)
{
    return cp < 0x80;
}

/* Whether the string is not empty and all of its characters are in a class. */
static qv_status all_in(qv_jrun *run, qv_jcall *call, bool (*in_class)(uint32_t cp), qv_jvalue *out)
{
    bool all = call->self.len > 0;
    for (size_t i = 0, size; i < call->self.len && all; i += size)
        all = in_class(qv_unicode_get(call->self.str + i, &size));
    *out = qv_j_bool(all);
    return qv_j_charge(run, call->self.len);
}

METHOD(str_isdecimal)
{
    return all_in(run, call, is_decimal, out);
}

METHOD(str_isdigit)
{
    return all_in(run, call, is_digit, out);
}

METHOD(str_isnumeric)
{
    return all_in(run, call, is_numeric, out);
}

METHOD(str_isalpha)
{
    return all_in(run, call, is_alpha, out);
}

METHOD(str_isalnum)
{
    return all_in(run, call, is_alnum, out);
}

METHOD(str_isspace)
{
    return all_in(run, call, qv_j_is_space, out);
}

METHOD(str_isascii)
{
    QV_TRY(all_in(run, call, is_ascii, out));
    out->boolean |= call->self.len == 0;
    return QV_OK;
}

/* Whether there are letters with case, and all of them have the one. */
static qv_status all_cased(qv_jrun *run, qv_jcall *call, utf8proc_category_t wanted, qv_jvalue *out)
{
    bool some = false, all = true;
    for (size_t i = 0, size; i < call->self.len; i += size) {
        uint32_t cp = qv_unicode_get(call->self.str + i, &size);
        if (!qv_j_is_cased(cp))
            continue;
        some = true;
        all &= utf8proc_category((utf8proc_int32_t)cp) == wanted;
    }
    *out = qv_j_bool(some && all);
    return qv_j_charge(run, call->self.len);
}

METHOD(str_islower)
{
    return all_cased(run, call, UTF8PROC_CATEGORY_LL, out);
}

METHOD(str_isupper)
{
    return all_cased(run, call, UTF8PROC_CATEGORY_LU, out);
}

METHOD(str_istitle)
{
    bool some = false, right = true, in_word = false;
    for (size_t i = 0, size; i < call->self.len; i += size) {
        uint32_t cp = qv_unicode_get(call->self.str + i, &size);
        bool cased = qv_j_is_cased(cp);
        bool lower = utf8proc_category((utf8proc_int32_t)cp) == UTF8PROC_CATEGORY_LL;
        right &= !cased || lower == in_word;
        some |= cased;
        in_word = cased;
    }
    *out = qv_j_bool(some && right);
    return qv_j_charge(run, call->self.len);
}

/* ---- Methods of lists, tuples and dicts ------------------------------------------------------ */

METHOD(seq_index)
{
    for (size_t i = 0; i < call->self.seq->n; i++) {
        bool equal;
        QV_TRY(qv_j_equal(run, call->self.seq->items[i], call->args[0], &equal));
        if (equal) {
            *out = qv_j_int((int64_t)i);
            return QV_OK;
        }
    }
    return qv_j_fail(run, "the value is not in the %s", qv_j_type_name(call->self));
}

METHOD(seq_count)
{
    int64_t n = 0;
    for (size_t i = 0; i < call->self.seq->n; i++) {
        bool equal;
        QV_TRY(qv_j_equal(run, call->self.seq->items[i], call->args[0], &equal));
        n += equal;
    }
    *out = qv_j_int(n);
    return QV_OK;
}

/* Values do not change, so a copy is the value. */
METHOD(copy)
{
    *out = call->self;
    return qv_j_charge(run, 0);
}

static qv_status dict_view(qv_jrun *run, const qv_jdict *dict, char what, qv_jvalue *out)
{
    QV_TRY(qv_j_seq(run, QV_J_VIEW, dict->n, out));
    out->seq->name = what == 'k' ? "dict_keys" : what == 'v' ? "dict_values" : "dict_items";
    for (uint32_t i = 0; i < dict->n; i++) {
        const qv_jentry *entry = &dict->entries[i];
        if (what == 'i')
            QV_TRY(qv_j_pair(run, entry->key, entry->value, &out->seq->items[i]));
        else
            out->seq->items[i] = what == 'k' ? entry->key : entry->value;
    }
    return QV_OK;
}

METHOD(dict_keys)
{
    return dict_view(run, call->self.dict, 'k', out);
}

METHOD(dict_values)
{
    return dict_view(run, call->self.dict, 'v', out);
}

METHOD(dict_items)
{
    return dict_view(run, call->self.dict, 'i', out);
}

METHOD(dict_get)
{
    qv_jentry *entry;
    QV_TRY(qv_j_dict_find(run, call->self.dict, call->args[0], &entry));
    *out = entry ? entry->value : qv_j_is_absent(call->args[1]) ? qv_j_none() : call->args[1];
    return QV_OK;
}

METHOD(loop_cycle)
{
    return qv_j_loop_cycle(run, call->self.loop, call->all, out);
}

METHOD(loop_changed)
{
    return qv_j_loop_changed(run, call->self.loop, call->all, out);
}

/* ---- Tables of methods ----------------------------------------------------------------------- */

/* A row without a function is a method that changes its object, which is refused when it is used.
 */
static const qv_jcallable str_methods[] = {
    {.name = "capitalize", .fn = str_capitalize},
    {.name = "center",
     .fn = str_center,
     .params = {"width", "fillchar"},
     .n_required = 1,
     .positional = true},
    {.name = "count",
     .fn = str_count,
     .params = {"sub", "start", "end"},
     .n_required = 1,
     .positional = true},
    {.name = "endswith",
     .fn = str_endswith,
     .params = {"suffix", "start", "end"},
     .n_required = 1,
     .positional = true},
    {.name = "find",
     .fn = str_find,
     .params = {"sub", "start", "end"},
     .n_required = 1,
     .positional = true},
    {.name = "index",
     .fn = str_index,
     .params = {"sub", "start", "end"},
     .n_required = 1,
     .positional = true},
    {.name = "isalnum", .fn = str_isalnum},
    {.name = "isalpha", .fn = str_isalpha},
    {.name = "isascii", .fn = str_isascii},
    {.name = "isdecimal", .fn = str_isdecimal},
    {.name = "isdigit", .fn = str_isdigit},
    {.name = "islower", .fn = str_islower},
    {.name = "isnumeric", .fn = str_isnumeric},
    {.name = "isspace", .fn = str_isspace},
    {.name = "istitle", .fn = str_istitle},
    {.name = "isupper", .fn = str_isupper},
    {.name = "join", .fn = str_join, .params = {"iterable"}, .n_required = 1, .positional = true},
    {.name = "ljust",
     .fn = str_ljust,
     .params = {"width", "fillchar"},
     .n_required = 1,
     .positional = true},
    {.name = "lower", .fn = str_lower},
    {.name = "lstrip", .fn = str_lstrip, .params = {"chars"}, .positional = true},
    {.name = "partition",
     .fn = str_partition,
     .params = {"sep"},
     .n_required = 1,
     .positional = true},
    {.name = "removeprefix",
     .fn = str_removeprefix,
     .params = {"prefix"},
     .n_required = 1,
     .positional = true},
    {.name = "removesuffix",
     .fn = str_removesuffix,
     .params = {"suffix"},
     .n_required = 1,
     .positional = true},
    {.name = "replace",
     .fn = str_replace,
     .params = {"old", "new", "count"},
     .n_required = 2,
     .positional = true},
    {.name = "rfind",
     .fn = str_rfind,
     .params = {"sub", "start", "end"},
     .n_required = 1,
     .positional = true},
    {.name = "rindex",
     .fn = str_rindex,
     .params = {"sub", "start", "end"},
     .n_required = 1,
     .positional = true},
    {.name = "rjust",
     .fn = str_rjust,
     .params = {"width", "fillchar"},
     .n_required = 1,
     .positional = true},
    {.name = "rpartition",
     .fn = str_rpartition,
     .params = {"sep"},
     .n_required = 1,
     .positional = true},
    {.name = "rsplit", .fn = str_rsplit, .params = {"sep", "maxsplit"}},
    {.name = "rstrip", .fn = str_rstrip, .params = {"chars"}, .positional = true},
    {.name = "split", .fn = str_split, .params = {"sep", "maxsplit"}},
    {.name = "splitlines", .fn = str_splitlines, .params = {"keepends"}},
    {.name = "startswith",
     .fn = str_startswith,
     .params = {"prefix", "start", "end"},
     .n_required = 1,
     .positional = true},
    {.name = "strip", .fn = str_strip, .params = {"chars"}, .positional = true},
    {.name = "swapcase", .fn = str_swapcase},
    {.name = "title", .fn = str_title},
    {.name = "upper", .fn = str_upper},
    {.name = "zfill", .fn = str_zfill, .params = {"width"}, .n_required = 1, .positional = true},
};

static const qv_jcallable list_methods[] = {
    {.name = "copy", .fn = copy},
    {.name = "count", .fn = seq_count, .params = {"value"}, .n_required = 1, .positional = true},
    {.name = "index", .fn = seq_index, .params = {"value"}, .n_required = 1, .positional = true},
    {.name = "append", .fn = NULL},
    {.name = "clear", .fn = NULL},
    {.name = "extend", .fn = NULL},
    {.name = "insert", .fn = NULL},
    {.name = "pop", .fn = NULL},
    {.name = "remove", .fn = NULL},
    {.name = "reverse", .fn = NULL},
    {.name = "sort", .fn = NULL},
};

static const qv_jcallable tuple_methods[] = {
    {.name = "count", .fn = seq_count, .params = {"value"}, .n_required = 1, .positional = true},
    {.name = "index", .fn = seq_index, .params = {"value"}, .n_required = 1, .positional = true},
};

static const qv_jcallable dict_methods[] = {
    {.name = "copy", .fn = copy},
    {.name = "get",
     .fn = dict_get,
     .params = {"key", "default"},
     .n_required = 1,
     .positional = true},
    {.name = "items", .fn = dict_items},
    {.name = "keys", .fn = dict_keys},
    {.name = "values", .fn = dict_values},
    {.name = "clear", .fn = NULL},
    {.name = "pop", .fn = NULL},
    {.name = "popitem", .fn = NULL},
    {.name = "setdefault", .fn = NULL},
    {.name = "update", .fn = NULL},
};

static const qv_jcallable loop_methods[] = {
    {.name = "changed", .fn = loop_changed, .rest = true},
    {.name = "cycle", .fn = loop_cycle, .rest = true},
};

#define TABLE(type, methods)                                                                       \
    {                                                                                              \
        type, methods, sizeof methods / sizeof methods[0]                                          \
    }

static const struct {
    qv_jtype type;
    const qv_jcallable *methods;
    size_t n;
} method_tables[] = {
    TABLE(QV_J_STR, str_methods),     TABLE(QV_J_LIST, list_methods),
    TABLE(QV_J_TUPLE, tuple_methods), TABLE(QV_J_RANGE, tuple_methods),
    TABLE(QV_J_DICT, dict_methods),   TABLE(QV_J_LOOP, loop_methods),
};

const qv_jcallable *qv_j_find_method(qv_jtype type, qv_jstr name)
{
    for (size_t i = 0; i < sizeof method_tables / sizeof method_tables[0]; i++) {
        if (method_tables[i].type == type)
            return qv_j_find_in(method_tables[i].methods, method_tables[i].n, name);
    }
    return NULL;
}

bool qv_j_is_method(qv_jstr name)
{
    for (size_t i = 0; i < sizeof method_tables / sizeof method_tables[0]; i++) {
        if (qv_j_find_in(method_tables[i].methods, method_tables[i].n, name))
            return true;
    }
    return false;
}
