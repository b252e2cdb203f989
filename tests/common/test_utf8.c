#include "common/utf8.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <string.h>

/* Encode by the definition, valid code point or not. */
static size_t encode(uint32_t code, char out[4])
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    size_t n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, code >>= 6)
        out[i] = (char)(0x80 | (code & 0x3F));
    out[0] = (char)((0xF00u >> n & 0xFF) | code);
    return n;
}

Test(utf8, accepts_every_code_point_and_no_surrogate)
{
    for (uint32_t code = 0; code < 0x120000; code++) {
        char text[4];
        uint32_t got = 0;
        size_t n = encode(code, text);
        bool valid = code <= 0x10FFFF && (code < 0xD800 || code > 0xDFFF);
        cr_assert_eq(qv_utf8_decode(text, n, &got), valid ? n : 0, "U+%04" PRIX32, code);
        cr_assert(!valid || got == code, "U+%04" PRIX32, code);
        for (size_t cut = 0; cut < n; cut++)
            cr_assert_eq(qv_utf8_decode(text, cut, &got), 0, "U+%04" PRIX32, code);
    }
}

Test(utf8, refuses_overlong_and_broken_sequences)
{
    static const char *const bad[] = {
        "\x80",
        "\xBF",
        "\xC0\x80",
        "\xC1\xBF",
        "\xE0\x80\x80",
        "\xE0\x9F\xBF",
        "\xF0\x80\x80",
        "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80",
        "\xF5\x80\x80\x80",
        "\xFF",
        "\xFE",
        "\xC3(",
        "\xE2\x82(",
        "\xE2(\xAC",
        "\xF0\x9F\x98(",
        "a\xFFz",
        "\xED\xA0\x80",
        "\xE2\x82\xAC\x80",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        cr_assert(!qv_utf8_valid(bad[i], strlen(bad[i])), "row %zu", i);
    cr_assert(qv_utf8_valid("", 0));
    cr_assert(qv_utf8_valid("a\0\xE2\x82\xAC", 5)); /* zero is a character like others */
}
