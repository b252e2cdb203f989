/* Python's string functions: on code points, with Python's white space, line ends and case mapping.
 */
#include "models/jinja.h"
#include "models/unicode.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <utf8proc.h>

/* ---- Comparing and finding ------------------------------------------------------------------- */

bool qv_j_str_equal(qv_jstr a, qv_jstr b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}

bool qv_j_str_is(qv_jstr a, const char *b)
{
    return a.len == strlen(b) && memcmp(a.data, b, a.len) == 0;
}

int qv_j_str_compare(qv_jstr a, qv_jstr b)
{
    /* UTF-8 sorts like its code points. */
    size_t len = a.len < b.len ? a.len : b.len;
    int order = len > 0 ? memcmp(a.data, b.data, len) : 0;
    return order ? order : a.len < b.len ? -1 : a.len > b.len;
}

ptrdiff_t qv_j_find(qv_jstr s, qv_jstr needle)
{
    if (needle.len == 0)
        return 0;
    const char *found = s.len ? memmem(s.data, s.len, needle.data, needle.len) : NULL;
    return found ? found - s.data : -1;
}

ptrdiff_t qv_j_rfind(qv_jstr s, qv_jstr needle)
{
    if (needle.len == 0)
        return (ptrdiff_t)s.len;
    for (size_t end = s.len; end >= needle.len;) {
        /* The last place where the needle's first byte may stand. */
        const char *first = memrchr(s.data, needle.data[0], end - needle.len + 1);
        if (!first)
            break;
        size_t at = (size_t)(first - s.data);
        if (memcmp(first, needle.data, needle.len) == 0)
            return (ptrdiff_t)at;
        end = at + needle.len - 1;
    }
    return -1;
}

size_t qv_j_offset(qv_jstr s, int64_t index)
{
    size_t pos = 0, size;
    if (index < 0) {
        index += (int64_t)qv_unicode_count(s.data, s.len);
        index = index < 0 ? 0 : index;
    }
    for (; index > 0 && pos < s.len; index--, pos += size)
        qv_unicode_get(s.data + pos, &size);
    return pos;
}

/* ---- Classes of characters ------------------------------------------------------------------- */

bool qv_j_is_space(uint32_t cp)
{
    return (cp >= 0x1C && cp <= 0x1F) || qv_unicode_is_space(cp);
}

bool qv_j_is_line_end(uint32_t cp)
{
    return (cp >= 0x0A && cp <= 0x0D) || (cp >= 0x1C && cp <= 0x1E) || cp == 0x85 || cp == 0x2028 ||
           cp == 0x2029;
}

bool qv_j_is_cased(uint32_t cp)
{
    switch (utf8proc_category((utf8proc_int32_t)cp)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
        return true;
    default:
        return false;
    }
}

/* ---- Stripping and splitting ----------------------------------------------------------------- */

static bool is_stripped(uint32_t cp, const char *text, size_t size, qv_jstr chars)
{
    return chars.data ? qv_j_find(chars, (qv_jstr){text, size}) >= 0 : qv_j_is_space(cp);
}

qv_jstr qv_j_strip(qv_jstr s, qv_jstr chars, qv_jside side)
{
    size_t size;
    while (side != QV_J_RIGHT && s.len > 0) {
        uint32_t cp = qv_unicode_get(s.data, &size);
        if (!is_stripped(cp, s.data, size, chars))
            break;
        s.data += size;
        s.len -= size;
    }
    while (side != QV_J_LEFT && s.len > 0) {
        uint32_t cp = qv_unicode_before(s.data, s.len, &size);
        if (!is_stripped(cp, s.data + s.len - size, size, chars))
            break;
        s.len -= size;
    }
    return s;
}

/* A list of strings that grows. */
typedef struct {
    qv_jrun *run;
    qv_jvalue list;
    size_t capacity;
} string_list;

static qv_status add_string(string_list *l, const char *data, size_t len)
{
    qv_jseq *seq = l->list.seq;
    if (seq->n == l->capacity) {
        void *grown;
        l->capacity *= 2;
        QV_TRY(qv_j_alloc(l->run, l->capacity, sizeof(qv_jvalue), &grown));
        memcpy(grown, seq->items, seq->n * sizeof(qv_jvalue));
        seq->items = grown;
    }
    seq->items[seq->n++] = qv_j_str(data, len);
    return QV_OK;
}

static qv_status start_list(qv_jrun *run, string_list *l)
{
    *l = (string_list){.run = run, .capacity = 8};
    QV_TRY(qv_j_seq(run, QV_J_LIST, l->capacity, &l->list));
    l->list.seq->n = 0;
    return QV_OK;
}

static void reverse_list(qv_jseq *seq)
{
    for (size_t i = 0; i < seq->n / 2; i++) {
        qv_jvalue swap = seq->items[i];
        seq->items[i] = seq->items[seq->n - 1 - i];
        seq->items[seq->n - 1 - i] = swap;
    }
}

/* Cut off the next word at the front or the back of `s`. */
static qv_jstr cut_word(qv_jstr *s, bool from_right)
{
    size_t size;
    qv_jstr word = *s;
    if (from_right) {
        while (s->len > 0 && !qv_j_is_space(qv_unicode_before(s->data, s->len, &size)))
            s->len -= size;
        return (qv_jstr){s->data + s->len, word.len - s->len};
    }
    while (s->len > 0 && !qv_j_is_space(qv_unicode_get(s->data, &size))) {
        s->data += size;
        s->len -= size;
    }
    word.len = (size_t)(s->data - word.data);
    return word;
}

static qv_status split_at_spaces(string_list *l, qv_jstr s, int64_t max, bool from_right)
{
    qv_jstr spaces = {0};
    qv_jside outer = from_right ? QV_J_RIGHT : QV_J_LEFT;
    for (;;) {
        s = qv_j_strip(s, spaces, outer);
        if (s.len == 0)
            return QV_OK;
        if (max == 0)
            return add_string(l, s.data, s.len);
        max -= max > 0;
        qv_jstr word = cut_word(&s, from_right);
        QV_TRY(add_string(l, word.data, word.len));
    }
}

static qv_status split_at(string_list *l, qv_jstr s, qv_jstr sep, int64_t max, bool from_right)
{
    for (; max != 0; max -= max > 0) {
        ptrdiff_t at = from_right ? qv_j_rfind(s, sep) : qv_j_find(s, sep);
        if (at < 0)
            break;
        size_t after = (size_t)at + sep.len;
        if (from_right) {
            QV_TRY(add_string(l, s.data + after, s.len - after));
            s.len = (size_t)at;
        } else {
            QV_TRY(add_string(l, s.data, (size_t)at));
            s.data += after;
            s.len -= after;
        }
    }
    return add_string(l, s.data, s.len);
}

qv_status qv_j_split(qv_jrun *run, qv_jstr s, qv_jstr sep, int64_t max, bool from_right,
                     qv_jvalue *out)
{
    string_list l;
    if (sep.data && sep.len == 0)
        return qv_j_fail(run, "empty separator");
    QV_TRY(qv_j_charge(run, s.len));
    QV_TRY(start_list(run, &l));
    QV_TRY(sep.data ? split_at(&l, s, sep, max, from_right)
                    : split_at_spaces(&l, s, max, from_right));
    if (from_right)
        reverse_list(l.list.seq);
    *out = l.list;
    return QV_OK;
}

qv_status qv_j_splitlines(qv_jrun *run, qv_jstr s, bool keep_ends, qv_jvalue *out)
{
    string_list l;
    QV_TRY(qv_j_charge(run, s.len));
    QV_TRY(start_list(run, &l));
    size_t start = 0;
    for (size_t i = 0, size; i < s.len;) {
        size_t end = i;
        uint32_t cp = qv_unicode_get(s.data + i, &size);
        i += size;
        if (!qv_j_is_line_end(cp))
            continue;
        if (cp == '\r' && i < s.len && s.data[i] == '\n')
            i++;
        QV_TRY(add_string(&l, s.data + start, (keep_ends ? i : end) - start));
        start = i;
    }
    if (start < s.len)
        QV_TRY(add_string(&l, s.data + start, s.len - start));
    *out = l.list;
    return QV_OK;
}

/* ---- Replacing ------------------------------------------------------------------------------- */

/* An empty string is found before every character and at the end. */
static qv_status replace_empty(qv_jbuilder *b, qv_jstr s, qv_jstr new, int64_t count)
{
    size_t i = 0, size;
    for (; count != 0; count -= count > 0, i += size) {
        QV_TRY(qv_j_add_text(b, new));
        if (i == s.len)
            return QV_OK;
        qv_unicode_get(s.data + i, &size);
        QV_TRY(qv_j_add(b, s.data + i, size));
    }
    return qv_j_add(b, s.data + i, s.len - i);
}

qv_status qv_j_replace(qv_jrun *run, qv_jstr s, qv_jstr old, qv_jstr new, int64_t count,
                       qv_jstr *out)
{
    qv_jbuilder b = {.run = run};
    QV_TRY(qv_j_charge(run, s.len));
    if (old.len == 0) {
        QV_TRY(replace_empty(&b, s, new, count));
    } else {
        for (ptrdiff_t at; count != 0 && (at = qv_j_find(s, old)) >= 0; count -= count > 0) {
            QV_TRY(qv_j_add(&b, s.data, (size_t)at));
            QV_TRY(qv_j_add_text(&b, new));
            s.data += (size_t)at + old.len;
            s.len -= (size_t)at + old.len;
        }
        QV_TRY(qv_j_add_text(&b, s));
    }
    *out = qv_j_text(qv_j_built(&b));
    return QV_OK;
}

qv_status qv_j_escape(qv_jrun *run, qv_jstr s, qv_jstr *out)
{
    static const struct {
        char c;
        qv_jstr text;
    } escapes[] = {
        {'&', {"&amp;", 5}}, {'<', {"&lt;", 4}},   {'>', {"&gt;", 4}},
        {'"', {"&#34;", 5}}, {'\'', {"&#39;", 5}},
    };
    qv_jbuilder b = {.run = run};
    QV_TRY(qv_j_charge(run, s.len));
    for (size_t i = 0; i < s.len; i++) {
        qv_jstr text = {s.data + i, 1};
        for (size_t k = 0; k < sizeof escapes / sizeof escapes[0]; k++) {
            if (s.data[i] == escapes[k].c)
                text = escapes[k].text;
        }
        QV_TRY(qv_j_add_text(&b, text));
    }
    *out = qv_j_text(qv_j_built(&b));
    return QV_OK;
}

/* ---- Case ------------------------------------------------------------------------------------ */

/* The characters whose upper case is more than one. */
static const struct {
    uint16_t cp;
    uint16_t upper[3];
} long_uppers[] = {
    {0x00DF, {0x53, 0x53}},          {0x0149, {0x2BC, 0x4E}},
    {0x01F0, {0x4A, 0x30C}},         {0x0390, {0x399, 0x308, 0x301}},
    {0x03B0, {0x3A5, 0x308, 0x301}}, {0x0587, {0x535, 0x552}},
    {0x1E96, {0x48, 0x331}},         {0x1E97, {0x54, 0x308}},
    {0x1E98, {0x57, 0x30A}},         {0x1E99, {0x59, 0x30A}},
    {0x1E9A, {0x41, 0x2BE}},         {0x1F50, {0x3A5, 0x313}},
    {0x1F52, {0x3A5, 0x313, 0x300}}, {0x1F54, {0x3A5, 0x313, 0x301}},
    {0x1F56, {0x3A5, 0x313, 0x342}}, {0x1F80, {0x1F08, 0x399}},
    {0x1F81, {0x1F09, 0x399}},       {0x1F82, {0x1F0A, 0x399}},
    {0x1F83, {0x1F0B, 0x399}},       {0x1F84, {0x1F0C, 0x399}},
    {0x1F85, {0x1F0D, 0x399}},       {0x1F86, {0x1F0E, 0x399}},
    {0x1F87, {0x1F0F, 0x399}},       {0x1F88, {0x1F08, 0x399}},
    {0x1F89, {0x1F09, 0x399}},       {0x1F8A, {0x1F0A, 0x399}},
    {0x1F8B, {0x1F0B, 0x399}},       {0x1F8C, {0x1F0C, 0x399}},
    {0x1F8D, {0x1F0D, 0x399}},       {0x1F8E, {0x1F0E, 0x399}},
    {0x1F8F, {0x1F0F, 0x399}},       {0x1F90, {0x1F28, 0x399}},
    {0x1F91, {0x1F29, 0x399}},       {0x1F92, {0x1F2A, 0x399}},
    {0x1F93, {0x1F2B, 0x399}},       {0x1F94, {0x1F2C, 0x399}},
    {0x1F95, {0x1F2D, 0x399}},       {0x1F96, {0x1F2E, 0x399}},
    {0x1F97, {0x1F2F, 0x399}},       {0x1F98, {0x1F28, 0x399}},
    {0x1F99, {0x1F29, 0x399}},       {0x1F9A, {0x1F2A, 0x399}},
    {0x1F9B, {0x1F2B, 0x399}},       {0x1F9C, {0x1F2C, 0x399}},
    {0x1F9D, {0x1F2D, 0x399}},       {0x1F9E, {0x1F2E, 0x399}},
    {0x1F9F, {0x1F2F, 0x399}},       {0x1FA0, {0x1F68, 0x399}},
    {0x1FA1, {0x1F69, 0x399}},       {0x1FA2, {0x1F6A, 0x399}},
    {0x1FA3, {0x1F6B, 0x399}},       {0x1FA4, {0x1F6C, 0x399}},
    {0x1FA5, {0x1F6D, 0x399}},       {0x1FA6, {0x1F6E, 0x399}},
    {0x1FA7, {0x1F6F, 0x399}},       {0x1FA8, {0x1F68, 0x399}},
    {0x1FA9, {0x1F69, 0x399}},       {0x1FAA, {0x1F6A, 0x399}},
    {0x1FAB, {0x1F6B, 0x399}},       {0x1FAC, {0x1F6C, 0x399}},
    {0x1FAD, {0x1F6D, 0x399}},       {0x1FAE, {0x1F6E, 0x399}},
    {0x1FAF, {0x1F6F, 0x399}},       {0x1FB2, {0x1FBA, 0x399}},
    {0x1FB3, {0x391, 0x399}},        {0x1FB4, {0x386, 0x399}},
    {0x1FB6, {0x391, 0x342}},        {0x1FB7, {0x391, 0x342, 0x399}},
    {0x1FBC, {0x391, 0x399}},        {0x1FC2, {0x1FCA, 0x399}},
    {0x1FC3, {0x397, 0x399}},        {0x1FC4, {0x389, 0x399}},
    {0x1FC6, {0x397, 0x342}},        {0x1FC7, {0x397, 0x342, 0x399}},
    {0x1FCC, {0x397, 0x399}},        {0x1FD2, {0x399, 0x308, 0x300}},
    {0x1FD3, {0x399, 0x308, 0x301}}, {0x1FD6, {0x399, 0x342}},
    {0x1FD7, {0x399, 0x308, 0x342}}, {0x1FE2, {0x3A5, 0x308, 0x300}},
    {0x1FE3, {0x3A5, 0x308, 0x301}}, {0x1FE4, {0x3A1, 0x313}},
    {0x1FE6, {0x3A5, 0x342}},        {0x1FE7, {0x3A5, 0x308, 0x342}},
    {0x1FF2, {0x1FFA, 0x399}},       {0x1FF3, {0x3A9, 0x399}},
    {0x1FF4, {0x38F, 0x399}},        {0x1FF6, {0x3A9, 0x342}},
    {0x1FF7, {0x3A9, 0x342, 0x399}}, {0x1FFC, {0x3A9, 0x399}},
    {0xFB00, {0x46, 0x46}},          {0xFB01, {0x46, 0x49}},
    {0xFB02, {0x46, 0x4C}},          {0xFB03, {0x46, 0x46, 0x49}},
    {0xFB04, {0x46, 0x46, 0x4C}},    {0xFB05, {0x53, 0x54}},
    {0xFB06, {0x53, 0x54}},          {0xFB13, {0x544, 0x546}},
    {0xFB14, {0x544, 0x535}},        {0xFB15, {0x544, 0x53B}},
    {0xFB16, {0x54E, 0x546}},        {0xFB17, {0x544, 0x53D}},
};

/* Write the upper case of a character; returns the number of code points. */
static size_t upper_of(uint32_t cp, uint32_t out[3])
{
    size_t lo = 0, hi = sizeof long_uppers / sizeof long_uppers[0];
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (cp > long_uppers[mid].cp)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == sizeof long_uppers / sizeof long_uppers[0] || long_uppers[lo].cp != cp) {
        out[0] = (uint32_t)utf8proc_toupper((utf8proc_int32_t)cp);
        return 1;
    }
    size_t n = 0;
    while (n < 3 && long_uppers[lo].upper[n]) {
        out[n] = long_uppers[lo].upper[n];
        n++;
    }
    return n;
}

/* Write the lower case. A sigma that ends a word has a form of its own. */
static size_t lower_of(uint32_t cp, qv_jstr s, size_t at, uint32_t out[3])
{
    if (cp == 0x130) {
        out[0] = 'i';
        out[1] = 0x307;
        return 2;
    }
    out[0] = (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp);
    if (cp == 0x3A3) {
        size_t size, after = at + 2;
        bool in_word = at > 0 && qv_j_is_cased(qv_unicode_before(s.data, at, &size));
        bool ends = after == s.len || !qv_j_is_cased(qv_unicode_get(s.data + after, &size));
        if (in_word && ends)
            out[0] = 0x3C2;
    }
    return 1;
}

/* Write the title case: a letter made for it, else the upper case with a small end. */
static size_t title_of(uint32_t cp, uint32_t out[3])
{
    size_t n = upper_of(cp, out);
    utf8proc_int32_t title = utf8proc_totitle((utf8proc_int32_t)cp);
    if (n == 1 || utf8proc_category(title) == UTF8PROC_CATEGORY_LT) {
        out[0] = (uint32_t)title;
        return 1;
    }
    for (size_t i = 1; i < n; i++)
        out[i] = (uint32_t)utf8proc_tolower((utf8proc_int32_t)out[i]);
    return n;
}

qv_status qv_j_change_case(qv_jrun *run, qv_jstr s, qv_jcase to, qv_jstr *out)
{
    qv_jbuilder b = {.run = run};
    bool in_word = false; /* TITLE: the character before has case; CAPITALIZE: there is one */
    QV_TRY(qv_j_charge(run, s.len));
    for (size_t i = 0, size; i < s.len; i += size) {
        uint32_t cp = qv_unicode_get(s.data + i, &size), mapped[3];
        bool upper = to == QV_J_UPPER || (to == QV_J_SWAPCASE &&
                                          (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp) == cp);
        bool title = (to == QV_J_TITLE || to == QV_J_CAPITALIZE) && !in_word;
        size_t n = upper   ? upper_of(cp, mapped)
                   : title ? title_of(cp, mapped)
                           : lower_of(cp, s, i, mapped);
        for (size_t k = 0; k < n; k++)
            QV_TRY(qv_j_add_char(&b, mapped[k]));
        in_word = to == QV_J_CAPITALIZE || qv_j_is_cased(cp);
    }
    *out = qv_j_text(qv_j_built(&b));
    return QV_OK;
}

/* ---- Numbers --------------------------------------------------------------------------------- */

/* Copy a number without white space around it and without the single underscores that may part its
 * digits. */
static bool clean_number(qv_jstr s, char *out, size_t size)
{
    s = qv_j_strip(s, (qv_jstr){0}, QV_J_BOTH);
    size_t n = 0;
    for (size_t i = 0; i < s.len; i++) {
        if (s.data[i] == '_') {
            bool between = i > 0 && i + 1 < s.len && s.data[i - 1] != '_' && s.data[i + 1] != '_' &&
                           !strchr("+-.", s.data[i - 1]) && !strchr("+-.", s.data[i + 1]);
            if (!between)
                return false;
            continue;
        }
        if (n + 1 == size || s.data[i] == '\0')
            return false;
        out[n++] = s.data[i];
    }
    out[n] = '\0';
    return n > 0;
}

bool qv_j_parse_int(qv_jstr s, int base, int64_t *out)
{
    char text[128], *end;
    if (!clean_number(s, text, sizeof text))
        return false;
    const char *digits = text + (text[0] == '+' || text[0] == '-');
    bool prefixed = digits[0] == '0' && digits[1];
    char letter = prefixed ? (char)(digits[1] | 0x20) : '\0';
    int prefix_base = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 0;
    if (prefix_base && (base == 0 || base == prefix_base)) {
        base = prefix_base;
        digits += 2;
    } else if (base == 0) {
        base = 10;
    }
    /* strtoll would take signs, spaces and prefixes of its own. */
    bool starts_right = (*digits >= '0' && *digits <= '9') || (*digits >= 'a' && *digits <= 'z') ||
                        (*digits >= 'A' && *digits <= 'Z');
    if (!starts_right || (base == 16 && digits[0] == '0' && (digits[1] | 0x20) == 'x'))
        return false;
    errno = 0;
    char number[130];
    number[0] = text[0] == '-' ? '-' : '+';
    strcpy(number + 1, digits);
    *out = strtoll(number, &end, base);
    return errno == 0 && *end == '\0';
}

bool qv_j_parse_float(qv_jstr s, double *out)
{
    static const char *const words[] = {"inf", "infinity", "nan"};
    char text[512], *end;
    if (!clean_number(s, text, sizeof text))
        return false;
    const char *body = text + (text[0] == '+' || text[0] == '-');
    bool is_word = false;
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        is_word |= strcasecmp(body, words[i]) == 0;
    if (!is_word && strspn(body, "0123456789.eE+-") != strlen(body))
        return false;
    *out = strtod(text, &end);
    return *end == '\0' && end > text;
}
