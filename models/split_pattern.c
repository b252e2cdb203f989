#include "models/split_pattern.h"

#include "models/unicode.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

struct qv_split_pattern {
    pcre2_code *code;
    pcre2_match_context *limits; /* for the interpreter, when the JIT stack does not do */
    bool jit;
};

/* ---- Characters that the engines classify differently ---------------------------------------- */

/* Letters, marks and numbers of Unicode 15 and 16, which PCRE2 before 10.43 does not know, and
 * U+180E, which it takes for white space. Each is matched as a stand-in of the same general
 * category and the same length in UTF-8. */
typedef struct {
    uint32_t first, last, stand_in;
} stand_in_range;

enum {
    LU3 = 0x1E00,
    LL3 = 0x1E01,
    MN3 = 0x0900,
    MC3 = 0x0903,
    CF3 = 0x200B,
    LU4 = 0x10400,
    LL4 = 0x10428,
    LM4 = 0x16B40,
    LO4 = 0x20000,
    MN4 = 0x10A01,
    MC4 = 0x11000,
    ND4 = 0x11066,
    NO4 = 0x10107,
};

static const stand_in_range stand_ins[] = {
    {0x00897, 0x00897, MN3}, {0x00CF3, 0x00CF3, MC3}, {0x00ECE, 0x00ECE, MN3},
    {0x0180E, 0x0180E, CF3}, {0x01C89, 0x01C89, LU3}, {0x01C8A, 0x01C8A, LL3},
    {0x0A7CB, 0x0A7CC, LU3}, {0x0A7CD, 0x0A7CD, LL3}, {0x0A7DA, 0x0A7DA, LU3},
    {0x0A7DB, 0x0A7DB, LL3}, {0x0A7DC, 0x0A7DC, LU3}, {0x105C0, 0x105F3, LO4},
    {0x10D40, 0x10D49, ND4}, {0x10D4A, 0x10D4D, LO4}, {0x10D4E, 0x10D4E, LM4},
    {0x10D4F, 0x10D4F, LO4}, {0x10D50, 0x10D65, LU4}, {0x10D69, 0x10D6D, MN4},
    {0x10D6F, 0x10D6F, LM4}, {0x10D70, 0x10D85, LL4}, {0x10EC2, 0x10EC4, LO4},
    {0x10EFC, 0x10EFF, MN4}, {0x1123F, 0x11240, LO4}, {0x11241, 0x11241, MN4},
    {0x11380, 0x11389, LO4}, {0x1138B, 0x1138B, LO4}, {0x1138E, 0x1138E, LO4},
    {0x11390, 0x113B5, LO4}, {0x113B7, 0x113B7, LO4}, {0x113B8, 0x113BA, MC4},
    {0x113BB, 0x113C0, MN4}, {0x113C2, 0x113C2, MC4}, {0x113C5, 0x113C5, MC4},
    {0x113C7, 0x113CA, MC4}, {0x113CC, 0x113CD, MC4}, {0x113CE, 0x113CE, MN4},
    {0x113CF, 0x113CF, MC4}, {0x113D0, 0x113D0, MN4}, {0x113D1, 0x113D1, LO4},
    {0x113D2, 0x113D2, MN4}, {0x113D3, 0x113D3, LO4}, {0x113E1, 0x113E2, MN4},
    {0x116D0, 0x116E3, ND4}, {0x11BC0, 0x11BE0, LO4}, {0x11BF0, 0x11BF9, ND4},
    {0x11F00, 0x11F01, MN4}, {0x11F02, 0x11F02, LO4}, {0x11F03, 0x11F03, MC4},
    {0x11F04, 0x11F10, LO4}, {0x11F12, 0x11F33, LO4}, {0x11F34, 0x11F35, MC4},
    {0x11F36, 0x11F3A, MN4}, {0x11F3E, 0x11F3F, MC4}, {0x11F40, 0x11F40, MN4},
    {0x11F41, 0x11F41, MC4}, {0x11F42, 0x11F42, MN4}, {0x11F50, 0x11F59, ND4},
    {0x11F5A, 0x11F5A, MN4}, {0x1342F, 0x1342F, LO4}, {0x13440, 0x13440, MN4},
    {0x13441, 0x13446, LO4}, {0x13447, 0x13455, MN4}, {0x13460, 0x143FA, LO4},
    {0x16100, 0x1611D, LO4}, {0x1611E, 0x16129, MN4}, {0x1612A, 0x1612C, MC4},
    {0x1612D, 0x1612F, MN4}, {0x16130, 0x16139, ND4}, {0x16D40, 0x16D42, LM4},
    {0x16D43, 0x16D6A, LO4}, {0x16D6B, 0x16D6C, LM4}, {0x16D70, 0x16D79, ND4},
    {0x18CFF, 0x18CFF, LO4}, {0x1B132, 0x1B132, LO4}, {0x1B155, 0x1B155, LO4},
    {0x1CCF0, 0x1CCF9, ND4}, {0x1D2C0, 0x1D2D3, NO4}, {0x1DF25, 0x1DF2A, LL4},
    {0x1E030, 0x1E06D, LM4}, {0x1E08F, 0x1E08F, MN4}, {0x1E4D0, 0x1E4EA, LO4},
    {0x1E4EB, 0x1E4EB, LM4}, {0x1E4EC, 0x1E4EF, MN4}, {0x1E4F0, 0x1E4F9, ND4},
    {0x1E5D0, 0x1E5ED, LO4}, {0x1E5EE, 0x1E5EF, MN4}, {0x1E5F0, 0x1E5F0, LO4},
    {0x1E5F1, 0x1E5FA, ND4}, {0x2B739, 0x2B739, LO4}, {0x2EBF0, 0x2EE5D, LO4},
    {0x31350, 0x323AF, LO4},
};

/* The character that `cp` is matched as. */
static uint32_t stand_in_for(uint32_t cp)
{
    size_t lo = 0, hi = sizeof stand_ins / sizeof stand_ins[0];
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (cp > stand_ins[mid].last)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo < sizeof stand_ins / sizeof stand_ins[0] && cp >= stand_ins[lo].first)
        return stand_ins[lo].stand_in;
    return cp;
}

/* Offset of the first character at or after `from` that has a stand-in; `len` if there is none. */
static size_t find_replaced(const char *text, size_t from, size_t len)
{
    for (size_t i = from; i < len; i++) {
        /* The lead bytes of all of them. */
        uint8_t lead = (uint8_t)text[i];
        if (lead < 0xE0 || (lead > 0xE1 && lead != 0xEA && lead != 0xF0))
            continue;
        size_t size;
        uint32_t cp = qv_unicode_get(text + i, &size);
        if (stand_in_for(cp) != cp)
            return i;
    }
    return len;
}

/* ---- Compiling ------------------------------------------------------------------------------- */

/* General categories, which are all the properties that split patterns need. */
static bool known_category(const char *name, size_t len)
{
    static const char *const minors[] = {"C",   "cfnos", "L",       "lmotu", "M",    "cen", "N",
                                         "dlo", "P",     "cdefios", "S",     "ckmo", "Z",   "lps"};
    for (size_t i = 0; i < sizeof minors / sizeof minors[0]; i += 2) {
        if (len > 0 && name[0] == minors[i][0])
            return len == 1 || (len == 2 && name[1] && strchr(minors[i + 1], name[1]));
    }
    return false;
}

/* Check the escape at p[0] == '\\' and return its length; 0 if it is not one that both engines read
 * alike. */
static size_t check_escape(const char *p, const char *end)
{
    if (end - p < 2 || p[1] == '\0')
        return 0;
    if (p[1] == 'p' || p[1] == 'P') {
        const char *close = end - p > 3 && p[2] == '{' ? memchr(p, '}', (size_t)(end - p)) : NULL;
        if (!close || !known_category(p + 3, (size_t)(close - p - 3)))
            return 0;
        return (size_t)(close + 1 - p);
    }
    return strchr("sSdDrnt", p[1]) || !strchr("0123456789abcdefghijklmnopqrstuvwxyz"
                                              "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
                                              p[1])
               ? 2
               : 0;
}

/* The length of a group's opening at p[0] == '('; 0 if the engines may read it differently. */
static size_t check_group(const char *p, const char *end)
{
    static const char *const openings[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    if (end - p < 2 || p[1] != '?')
        return p + 1 < end && p[1] == '*' ? 0 : 1;
    for (size_t i = 0; i < sizeof openings / sizeof openings[0]; i++) {
        size_t len = strlen(openings[i]);
        if ((size_t)(end - p) >= len && memcmp(p, openings[i], len) == 0)
            return len;
    }
    return 0;
}

/* Refuse what Oniguruma and PCRE2 read differently, or might: other escapes (`\w`, `\b`, `\h`),
 * properties that are not general categories, nested or intersected classes, inline options,
 * anchors, references, possessive, lazy and open counts. */
static qv_status check_pattern(const char *pattern, size_t len)
{
    const char *p = pattern, *end = pattern + len;
    bool in_class = false;
    while (p < end) {
        size_t n = 1;
        if (*p == '\\')
            n = check_escape(p, end);
        else if (in_class && (*p == '[' || (*p == '&' && p + 1 < end && p[1] == '&')))
            n = 0;
        else if (in_class && *p == ']')
            in_class = false;
        else if (!in_class && *p == '[') {
            in_class = true;
            if (p + 1 < end && p[1] == '^')
                n = 2;
            if (p + n < end && p[n] == ']')
                n = 0;
        } else if (!in_class && *p == '(')
            n = check_group(p, end);
        else if (!in_class && (*p == '^' || *p == '$'))
            n = 0;
        else if (!in_class && *p == '}' && p + 1 < end && (p[1] == '+' || p[1] == '?'))
            n = 0;
        else if (!in_class && *p == '{' && p + 1 < end && p[1] == ',')
            n = 0;
        else if (*p == '\0')
            n = 0;
        if (n == 0)
            return qv_fail(QV_ERR_UNSUPPORTED,
                           "split pattern: '%.*s' at offset %zu is not supported",
                           (int)(end - p > 8 ? 8 : end - p), p, (size_t)(p - pattern));
        p += n;
    }
    return QV_OK;
}

qv_status qv_split_pattern_compile(const char *pattern, size_t len, bool literal,
                                   qv_split_pattern **out)
{
    if (!literal)
        QV_TRY(check_pattern(pattern, len));
    qv_split_pattern *p = calloc(1, sizeof *p);
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (!p || !context)
        goto no_memory;
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    int error;
    PCRE2_SIZE offset;
    uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C);
    p->code = pcre2_compile((PCRE2_SPTR)pattern, len, options, &error, &offset, context);
    if (!p->code) {
        PCRE2_UCHAR message[128];
        pcre2_get_error_message(error, message, sizeof message);
        pcre2_compile_context_free(context);
        qv_split_pattern_free(p);
        return qv_fail(QV_ERR_FORMAT, "split pattern: %s at offset %zu", (char *)message, offset);
    }
    p->limits = pcre2_match_context_create(NULL);
    if (!p->limits)
        goto no_memory;
    pcre2_set_heap_limit(p->limits, 64 << 10); /* KiB */
    pcre2_compile_context_free(context);
    p->jit = pcre2_jit_compile(p->code, PCRE2_JIT_COMPLETE) == 0;
    *out = p;
    return QV_OK;
no_memory:
    pcre2_compile_context_free(context);
    qv_split_pattern_free(p);
    return qv_fail(QV_ERR_NOMEM, "no memory for a split pattern");
}

void qv_split_pattern_free(qv_split_pattern *p)
{
    if (!p)
        return;
    pcre2_code_free(p->code);
    pcre2_match_context_free(p->limits);
    free(p);
}

/* ---- Matching -------------------------------------------------------------------------------- */

/* Copy the text with every character that has a stand-in replaced, if there is one. */
static qv_status replace_characters(qv_split_matcher *m)
{
    size_t i = find_replaced(m->subject, 0, m->len);
    if (i == m->len)
        return QV_OK;
    if (m->copy_size < m->len) {
        char *copy = realloc(m->copy, m->len);
        if (!copy)
            return qv_fail(QV_ERR_NOMEM, "no memory to split a text of %zu bytes", m->len);
        m->copy = copy;
        m->copy_size = m->len;
    }
    memcpy(m->copy, m->subject, m->len);
    for (size_t size; i < m->len; i = find_replaced(m->subject, i + size, m->len))
        qv_unicode_put(m->copy + i, stand_in_for(qv_unicode_get(m->subject + i, &size)));
    m->subject = m->copy;
    return QV_OK;
}

qv_status qv_split_matcher_start(qv_split_matcher *m, const qv_split_pattern *pattern,
                                 const char *text, size_t len)
{
    if (m->pattern != pattern) {
        pcre2_match_data_free(m->match);
        m->pattern = pattern;
        m->match = pcre2_match_data_create_from_pattern(pattern->code, NULL);
        if (!m->match)
            return qv_fail(QV_ERR_NOMEM, "no memory to split a text");
    }
    m->subject = text;
    m->len = len;
    m->pos = 0;
    m->last_end = SIZE_MAX;
    return replace_characters(m);
}

/* Match from `pos`: with the JIT, and by interpretation where its stack is too small. */
static int match_at(qv_split_matcher *m, size_t pos)
{
    const qv_split_pattern *p = m->pattern;
    PCRE2_SPTR subject = (PCRE2_SPTR)m->subject;
    int rc = PCRE2_ERROR_JIT_STACKLIMIT;
    if (p->jit)
        rc = pcre2_jit_match(p->code, subject, m->len, pos, PCRE2_NO_UTF_CHECK, m->match, NULL);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(p->code, subject, m->len, pos, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, m->match,
                         p->limits);
    return rc;
}

qv_status qv_split_matcher_next(qv_split_matcher *m, bool *found, size_t *start, size_t *end)
{
    *found = false;
    while (m->pos <= m->len) {
        int rc = match_at(m, m->pos);
        if (rc == PCRE2_ERROR_NOMATCH)
            break;
        if (rc < 0) {
            PCRE2_UCHAR message[128];
            pcre2_get_error_message(rc, message, sizeof message);
            return qv_fail(QV_ERR_LIMIT, "split pattern fails at byte %zu of a text of %zu: %s",
                           m->pos, m->len, (char *)message);
        }
        const PCRE2_SIZE *offsets = pcre2_get_ovector_pointer(m->match);
        *start = offsets[0];
        *end = offsets[1];
        /* An empty match lets the search go on one character later, and does not count where the
         * match before ended. */
        bool counts = *end > *start || *end != m->last_end;
        m->pos = *end;
        if (*end == *start && *end < m->len) {
            size_t size;
            qv_unicode_get(m->subject + *end, &size);
            m->pos += size;
        } else if (*end == *start) {
            m->pos = m->len + 1;
        }
        m->last_end = *end;
        if (counts) {
            *found = true;
            return QV_OK;
        }
    }
    m->pos = m->len + 1;
    return QV_OK;
}

void qv_split_matcher_deinit(qv_split_matcher *m)
{
    pcre2_match_data_free(m->match);
    free(m->copy);
    *m = (qv_split_matcher){0};
}
