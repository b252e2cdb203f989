/* UTF-8: one character at a time, strictly. For what arrives as bytes and leaves as text (logs,
 * labels, messages). Pure; any thread. */
#ifndef QV_COMMON_UTF8_H
#define QV_COMMON_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Length (1..4) of the valid character at the start of text[size], its code point in *code; 0 when
 * there is none: empty, truncated, overlong, a surrogate or beyond U+10FFFF. */
static inline size_t qv_utf8_decode(const char *text, size_t size, uint32_t *code)
{
    const unsigned char *s = (const unsigned char *)text;
    if (size == 0)
        return 0;
    if (s[0] < 0x80) {
        *code = s[0];
        return 1;
    }
    size_t n = s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
    if (n == 0 || n > size)
        return 0;
    uint32_t c = s[0] & (0xFFu >> (n + 1));
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xC0) != 0x80)
            return 0;
        c = c << 6 | (s[i] & 0x3F);
    }
    if ((n == 3 && (c < 0x800 || (c >= 0xD800 && c <= 0xDFFF))) ||
        (n == 4 && (c < 0x10000 || c > 0x10FFFF)))
        return 0;
    *code = c;
    return n;
}

/* Whether text[size] is UTF-8 from end to end. The empty text is. */
static inline bool qv_utf8_valid(const char *text, size_t size)
{
    uint32_t code;
    for (size_t i = 0, n; i < size; i += n)
        if ((n = qv_utf8_decode(text + i, size - i, &code)) == 0)
            return false;
    return true;
}

#endif
