#include "models/unicode.h"

#include <string.h>
#include <utf8proc.h>

/* What may follow a lead byte: how many bytes, and the range of the first of them. The others are
 * 80..BF. This is table 3-7 of the Unicode standard. */
typedef struct {
    uint8_t more, lo, hi;
} lead_rule;

static lead_rule rule_of(uint8_t lead)
{
    if (lead < 0xC2)
        return (lead_rule){0};
    if (lead < 0xE0)
        return (lead_rule){1, 0x80, 0xBF};
    if (lead < 0xF0)
        return (lead_rule){2, lead == 0xE0 ? 0xA0 : 0x80, lead == 0xED ? 0x9F : 0xBF};
    if (lead < 0xF5)
        return (lead_rule){3, lead == 0xF0 ? 0x90 : 0x80, lead == 0xF4 ? 0x8F : 0xBF};
    return (lead_rule){0};
}

qv_unicode_kind qv_unicode_next(const char *text, size_t len, uint32_t *cp, size_t *size)
{
    const uint8_t *p = (const uint8_t *)text;
    *size = 1;
    if (p[0] < 0x80) {
        *cp = p[0];
        return QV_UNICODE_CHAR;
    }
    lead_rule rule = rule_of(p[0]);
    if (rule.more == 0)
        return QV_UNICODE_BROKEN;
    uint8_t lo = rule.lo, hi = rule.hi;
    for (size_t i = 1; i <= rule.more; i++) {
        *size = i;
        if (i == len)
            return QV_UNICODE_PARTIAL;
        if (p[i] < lo || p[i] > hi)
            return QV_UNICODE_BROKEN;
        lo = 0x80, hi = 0xBF;
    }
    *cp = qv_unicode_get(text, size);
    return QV_UNICODE_CHAR;
}

uint32_t qv_unicode_before(const char *text, size_t end, size_t *size)
{
    size_t start = end - 1;
    while (start > 0 && ((uint8_t)text[start] & 0xC0) == 0x80)
        start--;
    return qv_unicode_get(text + start, size);
}

size_t qv_unicode_put(char *out, uint32_t cp)
{
    if (cp < 0x80) {
        out[0] = (char)cp;
        return 1;
    }
    if (cp < 0x800) {
        out[0] = (char)(0xC0 | cp >> 6);
        out[1] = (char)(0x80 | (cp & 0x3F));
        return 2;
    }
    if (cp < 0x10000) {
        out[0] = (char)(0xE0 | cp >> 12);
        out[1] = (char)(0x80 | (cp >> 6 & 0x3F));
        out[2] = (char)(0x80 | (cp & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | cp >> 18);
    out[1] = (char)(0x80 | (cp >> 12 & 0x3F));
    out[2] = (char)(0x80 | (cp >> 6 & 0x3F));
    out[3] = (char)(0x80 | (cp & 0x3F));
    return 4;
}

size_t qv_unicode_valid(const char *text, size_t len)
{
    size_t i = 0;
    while (i < len) {
        /* Eight ASCII bytes at a time. */
        uint64_t word;
        while (len - i >= sizeof word) {
            memcpy(&word, text + i, sizeof word);
            if (word & 0x8080808080808080u)
                break;
            i += sizeof word;
        }
        if (i == len)
            break;
        uint32_t cp;
        size_t size;
        if (qv_unicode_next(text + i, len - i, &cp, &size) != QV_UNICODE_CHAR)
            break;
        i += size;
    }
    return i;
}

size_t qv_unicode_count(const char *text, size_t len)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += ((uint8_t)text[i] & 0xC0) != 0x80;
    return n;
}

bool qv_unicode_is_space(uint32_t cp)
{
    return (cp >= 0x09 && cp <= 0x0D) || cp == 0x20 || cp == 0x85 || cp == 0xA0 || cp == 0x1680 ||
           (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 || cp == 0x202F ||
           cp == 0x205F || cp == 0x3000;
}

bool qv_unicode_is_word(uint32_t cp)
{
    switch (utf8proc_category((utf8proc_int32_t)cp)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        /* The join controls, and the circled and squared letters that count as alphabetic. */
        return cp == 0x200C || cp == 0x200D || (cp >= 0x24B6 && cp <= 0x24E9) ||
               (cp >= 0x1F130 && cp <= 0x1F149) || (cp >= 0x1F150 && cp <= 0x1F169) ||
               (cp >= 0x1F170 && cp <= 0x1F189);
    }
}
