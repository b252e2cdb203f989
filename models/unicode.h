/* UTF-8, as the tokenizer and the template interpreter need it: strict (no surrogates, no overlong
 * forms, nothing above U+10FFFF). Pure functions; any thread.
 */
#ifndef QV_MODELS_UNICODE_H
#define QV_MODELS_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What starts at text[0]. */
typedef enum {
    QV_UNICODE_CHAR,    /* a whole character of *size bytes */
    QV_UNICODE_BROKEN,  /* *size bytes that can never become one: a maximal part of a character */
    QV_UNICODE_PARTIAL, /* all `len` bytes, *size = len: the beginning of a character */
} qv_unicode_kind;

/* Look at the first character of `len` > 0 bytes. `cp` gets the code point of a whole character. */
qv_unicode_kind qv_unicode_next(const char *text, size_t len, uint32_t *cp, size_t *size);

/* The code point at text[0] of text known to be valid, and its size in bytes. */
static inline uint32_t qv_unicode_get(const char *text, size_t *size)
{
    const uint8_t *p = (const uint8_t *)text;
    if (p[0] < 0x80) {
        *size = 1;
        return p[0];
    }
    if (p[0] < 0xE0) {
        *size = 2;
        return (uint32_t)(p[0] & 0x1F) << 6 | (p[1] & 0x3F);
    }
    if (p[0] < 0xF0) {
        *size = 3;
        return (uint32_t)(p[0] & 0x0F) << 12 | (uint32_t)(p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    }
    *size = 4;
    return (uint32_t)(p[0] & 0x07) << 18 | (uint32_t)(p[1] & 0x3F) << 12 |
           (uint32_t)(p[2] & 0x3F) << 6 | (p[3] & 0x3F);
}

/* The code point that ends at text[end] (end > 0) of valid text, and its size. */
uint32_t qv_unicode_before(const char *text, size_t end, size_t *size);

/* Write `cp` (a scalar value) to out[4]; returns its size. */
size_t qv_unicode_put(char *out, uint32_t cp);

/* Bytes of `text` that are valid UTF-8 from its start: `len` when all of it is. */
size_t qv_unicode_valid(const char *text, size_t len);

/* Characters in valid text. */
size_t qv_unicode_count(const char *text, size_t len);

/* White space as Unicode defines it (White_Space); a letter, mark, digit or connector: a character
 * of a word as regular expressions define it (`\w`). */
bool qv_unicode_is_space(uint32_t cp);
bool qv_unicode_is_word(uint32_t cp);

#endif
