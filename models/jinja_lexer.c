/* Text to tokens. White space control happens here: `-` strips all white space on its side, `+`
 * keeps it, and by default (trim_blocks, lstrip_blocks) a block or comment takes the line end after
 * it and, where it begins its line, the indentation before it.
 */
#include "models/jinja.h"
#include "models/unicode.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum { MAX_BRACKETS = 256 };

typedef struct {
    qv_arena *arena;
    const char *name;
    const char *text;
    size_t len, pos;
    uint32_t line;
    bool line_starting; /* the token before ended with a line end (or there was none) */
    qv_jtoken *tokens;
    size_t n, capacity;
    char brackets[MAX_BRACKETS]; /* closing ones that are due */
    size_t n_brackets;
} lexer;

static qv_status no_memory(const lexer *lx)
{
    return qv_fail(QV_ERR_NOMEM, "%s: no memory for the template", lx->name);
}

/* ---- Characters ------------------------------------------------------------------------------ */

static uint32_t peek(const lexer *lx, size_t *size)
{
    if (lx->pos == lx->len) {
        *size = 0;
        return 0;
    }
    return qv_unicode_get(lx->text + lx->pos, size);
}

static bool at(const lexer *lx, size_t pos, const char *what)
{
    size_t len = strlen(what);
    return lx->len - pos >= len && memcmp(lx->text + pos, what, len) == 0;
}

static size_t skip_spaces(const lexer *lx, size_t pos)
{
    size_t size;
    while (pos < lx->len && qv_j_is_space(qv_unicode_get(lx->text + pos, &size)))
        pos += size;
    return pos;
}

/* Move to `pos`, counting lines. */
static void advance(lexer *lx, size_t pos)
{
    for (size_t i = lx->pos; i < pos; i++)
        lx->line += lx->text[i] == '\n';
    lx->line_starting = pos > lx->pos ? lx->text[pos - 1] == '\n' : lx->line_starting;
    lx->pos = pos;
}

static bool is_digit(const lexer *lx, size_t pos)
{
    return pos < lx->len && lx->text[pos] >= '0' && lx->text[pos] <= '9';
}

static bool starts_identifier(uint32_t cp)
{
    if (cp < 0x80)
        return (cp >= 'a' && cp <= 'z') || (cp >= 'A' && cp <= 'Z') || cp == '_';
    utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
    return (c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_LO) || c == UTF8PROC_CATEGORY_NL;
}

static bool continues_identifier(uint32_t cp)
{
    if (cp < 0x80)
        return starts_identifier(cp) || (cp >= '0' && cp <= '9');
    utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
    return starts_identifier(cp) || c == UTF8PROC_CATEGORY_MN || c == UTF8PROC_CATEGORY_MC ||
           c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_PC;
}

/* ---- Tokens ---------------------------------------------------------------------------------- */

static qv_status add_token(lexer *lx, qv_jtoken token)
{
    if (lx->n == lx->capacity) {
        size_t capacity = lx->capacity ? 2 * lx->capacity : 256;
        qv_jtoken *tokens = QV_ARENA_ARRAY(lx->arena, qv_jtoken, capacity);
        if (!tokens)
            return no_memory(lx);
        if (lx->n > 0)
            memcpy(tokens, lx->tokens, lx->n * sizeof *tokens);
        lx->tokens = tokens;
        lx->capacity = capacity;
    }
    token.line = token.line ? token.line : lx->line;
    lx->tokens[lx->n++] = token;
    return QV_OK;
}

/* Add a token of the next `len` bytes and move behind it. */
static qv_status take(lexer *lx, qv_jtoken_type type, size_t len)
{
    qv_jtoken token = {.type = type, .text = {lx->text + lx->pos, len}};
    QV_TRY(add_token(lx, token));
    advance(lx, lx->pos + len);
    return QV_OK;
}

static const struct {
    const char *text;
    qv_jtoken_type type;
} operators[] = {
    {"//", QV_JT_FLOORDIV}, {"**", QV_JT_POW},      {"==", QV_JT_EQ},      {"!=", QV_JT_NE},
    {"<=", QV_JT_LE},       {">=", QV_JT_GE},       {"+", QV_JT_ADD},      {"-", QV_JT_SUB},
    {"*", QV_JT_MUL},       {"/", QV_JT_DIV},       {"%", QV_JT_MOD},      {"~", QV_JT_TILDE},
    {"<", QV_JT_LT},        {">", QV_JT_GT},        {"=", QV_JT_ASSIGN},   {".", QV_JT_DOT},
    {",", QV_JT_COMMA},     {":", QV_JT_COLON},     {"|", QV_JT_PIPE},     {"(", QV_JT_LPAREN},
    {")", QV_JT_RPAREN},    {"[", QV_JT_LBRACKET},  {"]", QV_JT_RBRACKET}, {"{", QV_JT_LBRACE},
    {"}", QV_JT_RBRACE},    {";", QV_JT_SEMICOLON},
};

const char *qv_j_token_name(qv_jtoken_type type)
{
    switch (type) {
    case QV_JT_EOF:
        return "end of template";
    case QV_JT_DATA:
        return "template text";
    case QV_JT_VARIABLE_BEGIN:
        return "begin of print statement";
    case QV_JT_VARIABLE_END:
        return "end of print statement";
    case QV_JT_BLOCK_BEGIN:
        return "begin of statement block";
    case QV_JT_BLOCK_END:
        return "end of statement block";
    case QV_JT_NAME:
        return "name";
    case QV_JT_STRING:
        return "string";
    case QV_JT_INTEGER:
        return "integer";
    case QV_JT_FLOAT:
        return "float";
    default:
        for (size_t i = 0; i < sizeof operators / sizeof operators[0]; i++) {
            if (operators[i].type == type)
                return operators[i].text;
        }
        return "token";
    }
}

/* ---- Numbers --------------------------------------------------------------------------------- */

/* The end of a run of digits of a base, single underscores between them allowed. */
static size_t skip_digits(const lexer *lx, size_t pos, int base)
{
    size_t end = pos;
    for (size_t i = pos; i < lx->len; i++) {
        char c = lx->text[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : 99;
        if (digit < base)
            end = i + 1;
        else if (c != '_' || i != end || i == pos)
            break;
    }
    return end;
}

/* Copy a number without underscores into `out`. */
static void copy_number(const lexer *lx, size_t end, char *out, size_t size)
{
    size_t n = 0;
    for (size_t i = lx->pos; i < end && n + 1 < size; i++) {
        if (lx->text[i] != '_')
            out[n++] = lx->text[i];
    }
    out[n] = '\0';
}

/* The end of a float at the position, or the position itself: digits with a fraction, an exponent
 * or both. */
static size_t float_end(const lexer *lx)
{
    if (lx->pos > 0 && lx->text[lx->pos - 1] == '.')
        return lx->pos;
    size_t whole = skip_digits(lx, lx->pos, 10), end = whole;
    if (end < lx->len && lx->text[end] == '.' && is_digit(lx, end + 1))
        end = skip_digits(lx, end + 1, 10);
    if (end < lx->len && (lx->text[end] == 'e' || lx->text[end] == 'E')) {
        size_t digits = end + 1;
        if (digits < lx->len && (lx->text[digits] == '+' || lx->text[digits] == '-'))
            digits++;
        if (is_digit(lx, digits))
            end = skip_digits(lx, digits, 10);
    }
    return end == whole ? lx->pos : end;
}

static qv_status lex_number(lexer *lx)
{
    char text[512];
    size_t end = float_end(lx);
    qv_jtoken token = {.text = {lx->text + lx->pos, 0}};
    if (end > lx->pos) {
        copy_number(lx, end, text, sizeof text);
        token.type = QV_JT_FLOAT;
        token.real = strtod(text, NULL);
    } else {
        static const struct {
            const char *prefix, *upper;
            int base;
        } bases[] = {{"0b", "0B", 2}, {"0o", "0O", 8}, {"0x", "0X", 16}};
        int base = 10;
        size_t digits = lx->pos;
        for (size_t i = 0; i < 3; i++) {
            if ((at(lx, lx->pos, bases[i].prefix) || at(lx, lx->pos, bases[i].upper)) &&
                skip_digits(lx, lx->pos + 2, bases[i].base) > lx->pos + 2) {
                base = bases[i].base;
                digits = lx->pos + 2;
            }
        }
        /* A decimal number that begins with 0 has no other digits. */
        bool zero = base == 10 && lx->text[lx->pos] == '0';
        end = skip_digits(lx, digits, zero ? 1 : base);
        copy_number(lx, end, text, sizeof text);
        errno = 0;
        token.type = QV_JT_INTEGER;
        token.integer = strtoll(text + (digits - lx->pos), NULL, base);
        if (errno == ERANGE || end - lx->pos >= sizeof text)
            return qv_fail(QV_ERR_LIMIT, "%s, line %u: integer '%.*s' is beyond 64 bits", lx->name,
                           lx->line, (int)(end - lx->pos > 64 ? 64 : end - lx->pos),
                           lx->text + lx->pos);
    }
    token.text.len = end - lx->pos;
    QV_TRY(add_token(lx, token));
    advance(lx, end);
    return QV_OK;
}

/* ---- Strings --------------------------------------------------------------------------------- */

/* Read `n` hex digits. */
static bool read_hex(const char *s, const char *end, size_t n, uint32_t *value)
{
    *value = 0;
    if ((size_t)(end - s) < n)
        return false;
    for (size_t i = 0; i < n; i++) {
        char c = s[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            return false;
        *value = *value << 4 | (uint32_t)digit;
    }
    return true;
}

/* Decode the escape at s[0] == '\\' into `out`; returns the bytes read, 0 if it is malformed. */
static size_t unescape_one(const char *s, const char *end, char *out, size_t *n_out)
{
    static const char letters[] = "\\'\"abfnrtv", meanings[] = "\\'\"\a\b\f\n\r\t\v";
    const char *letter = s[1] ? strchr(letters, s[1]) : NULL;
    if (letter) {
        out[0] = meanings[letter - letters];
        *n_out = 1;
        return 2;
    }
    uint32_t cp = 0;
    size_t used = 2;
    if (s[1] == '\n') {
        *n_out = 0;
        return 2;
    }
    if (s[1] >= '0' && s[1] <= '7') {
        for (used = 1; used < 4 && s + used < end && s[used] >= '0' && s[used] <= '7'; used++)
            cp = cp * 8 + (uint32_t)(s[used] - '0');
    } else if (s[1] == 'x' || s[1] == 'u' || s[1] == 'U') {
        size_t digits = s[1] == 'x' ? 2 : s[1] == 'u' ? 4 : 8;
        if (!read_hex(s + 2, end, digits, &cp) || cp > 0x10FFFF || (cp >= 0xD800 && cp < 0xE000))
            return 0;
        used = 2 + digits;
    } else if (s[1] == 'N') {
        return 0;
    } else {
        /* Unknown escapes stand for themselves. */
        out[0] = '\\';
        *n_out = 1;
        return 1;
    }
    *n_out = qv_unicode_put(out, cp);
    return used;
}

static qv_status lex_string(lexer *lx)
{
    char quote = lx->text[lx->pos];
    size_t end = lx->pos + 1;
    bool escapes = false;
    while (end < lx->len && lx->text[end] != quote) {
        bool escape = lx->text[end] == '\\';
        escapes |= escape;
        end += escape ? 2 : 1;
    }
    if (end >= lx->len)
        return qv_fail(QV_ERR_FORMAT, "%s, line %u: string without end", lx->name, lx->line);
    qv_jtoken token = {.type = QV_JT_STRING, .text = {lx->text + lx->pos + 1, end - lx->pos - 1}};
    if (escapes) {
        /* An escape is never shorter than what it stands for. */
        char *out = qv_arena_alloc(lx->arena, token.text.len, 1);
        if (!out)
            return no_memory(lx);
        const char *s = token.text.data, *stop = s + token.text.len;
        size_t n = 0, n_out, used;
        for (; s < stop; s += used, n += n_out) {
            out[n] = *s;
            used = n_out = 1;
            if (*s == '\\' && (used = unescape_one(s, stop, out + n, &n_out)) == 0)
                return qv_fail(QV_ERR_FORMAT, "%s, line %u: malformed escape '%.*s' in a string",
                               lx->name, lx->line, (int)(stop - s > 10 ? 10 : stop - s), s);
        }
        token.text = (qv_jstr){out, n};
    }
    QV_TRY(add_token(lx, token));
    advance(lx, end + 1);
    return QV_OK;
}

/* ---- Inside tags ----------------------------------------------------------------------------- */

static qv_status check_bracket(lexer *lx, char c)
{
    static const char opening[] = "([{", closing[] = ")]}";
    const char *p;
    if ((p = strchr(opening, c))) {
        if (lx->n_brackets == MAX_BRACKETS)
            return qv_fail(QV_ERR_LIMIT, "%s, line %u: brackets nest deeper than %d", lx->name,
                           lx->line, MAX_BRACKETS);
        lx->brackets[lx->n_brackets++] = closing[p - opening];
    } else if (strchr(closing, c)) {
        if (lx->n_brackets == 0)
            return qv_fail(QV_ERR_FORMAT, "%s, line %u: unexpected '%c'", lx->name, lx->line, c);
        char due = lx->brackets[--lx->n_brackets];
        if (due != c)
            return qv_fail(QV_ERR_FORMAT, "%s, line %u: unexpected '%c', expected '%c'", lx->name,
                           lx->line, c, due);
    }
    return QV_OK;
}

static qv_status lex_operator(lexer *lx)
{
    for (size_t i = 0; i < sizeof operators / sizeof operators[0]; i++) {
        if (!at(lx, lx->pos, operators[i].text))
            continue;
        if (!operators[i].text[1])
            QV_TRY(check_bracket(lx, operators[i].text[0]));
        return take(lx, operators[i].type, strlen(operators[i].text));
    }
    size_t size;
    peek(lx, &size);
    return qv_fail(QV_ERR_FORMAT, "%s, line %u: unexpected character '%.*s'", lx->name, lx->line,
                   (int)size, lx->text + lx->pos);
}

/* The end of what closes a tag at `pos`, with the white space that it takes; 0 if nothing does.
 * `trim`: a line end after it goes too. */
static size_t closing_end(const lexer *lx, size_t pos, const char *close, bool trim)
{
    bool minus = at(lx, pos, "-"), plus = trim && at(lx, pos, "+");
    size_t end = pos + (minus || plus);
    if (!at(lx, end, close))
        return 0;
    end += 2;
    if (minus)
        return skip_spaces(lx, end);
    return end + (trim && !plus && at(lx, end, "\n"));
}

/* The tokens of a tag up to and with its end. */
static qv_status lex_tag(lexer *lx, bool block)
{
    lx->n_brackets = 0;
    while (lx->pos < lx->len) {
        size_t size,
            end = lx->n_brackets > 0 ? 0 : closing_end(lx, lx->pos, block ? "%}" : "}}", block);
        if (end > 0)
            return take(lx, block ? QV_JT_BLOCK_END : QV_JT_VARIABLE_END, end - lx->pos);
        uint32_t cp = peek(lx, &size);
        if (qv_j_is_space(cp)) {
            advance(lx, skip_spaces(lx, lx->pos));
        } else if (cp >= '0' && cp <= '9') {
            QV_TRY(lex_number(lx));
        } else if (starts_identifier(cp)) {
            size_t stop = lx->pos;
            for (size_t n;
                 stop < lx->len && continues_identifier(qv_unicode_get(lx->text + stop, &n));)
                stop += n;
            QV_TRY(take(lx, QV_JT_NAME, stop - lx->pos));
        } else if (cp == '\'' || cp == '"') {
            QV_TRY(lex_string(lx));
        } else {
            QV_TRY(lex_operator(lx));
        }
    }
    return QV_OK;
}

/* ---- Between tags ---------------------------------------------------------------------------- */

/* Add text[pos..end) as data, stripped as the sign and the kind of the tag after it ask. Moves to
 * `end`. */
static qv_status lex_data(lexer *lx, size_t end, char sign, bool variable)
{
    size_t stop = end;
    if (sign == '-') {
        for (size_t size; stop > lx->pos; stop -= size) {
            if (!qv_j_is_space(qv_unicode_before(lx->text, stop, &size)))
                break;
        }
    } else if (sign != '+' && !variable) {
        size_t line_start = end;
        while (line_start > lx->pos && lx->text[line_start - 1] != '\n')
            line_start--;
        bool begins_line = line_start > lx->pos || lx->line_starting;
        if (begins_line && skip_spaces(lx, line_start) >= end)
            stop = line_start;
    }
    if (stop > lx->pos) {
        qv_jtoken token = {.type = QV_JT_DATA, .text = {lx->text + lx->pos, stop - lx->pos}};
        QV_TRY(add_token(lx, token));
    }
    advance(lx, end);
    return QV_OK;
}

/* The `-` or `+` after the two characters of an opening, or 0. */
static char sign_at(const lexer *lx, size_t pos)
{
    return at(lx, pos + 2, "-") ? '-' : at(lx, pos + 2, "+") ? '+' : '\0';
}

/* The position after the word in "{%- word", or 0 if something else is there. */
static size_t after_word(const lexer *lx, size_t pos, const char *word)
{
    if (!at(lx, pos, "{%"))
        return 0;
    pos = skip_spaces(lx, pos + 2 + (sign_at(lx, pos) != '\0'));
    return at(lx, pos, word) ? skip_spaces(lx, pos + strlen(word)) : 0;
}

/* The end of a "{% raw %}" at `pos`, or 0. It does not take the line end after it. */
static size_t raw_begin_end(const lexer *lx, size_t pos)
{
    size_t close = after_word(lx, pos, "raw");
    return close ? closing_end(lx, close, "%}", false) : 0;
}

/* Everything from behind "{% raw %}" to behind "{% endraw %}", as data. */
static qv_status lex_raw(lexer *lx)
{
    uint32_t line = lx->line;
    for (size_t i = lx->pos; i + 1 < lx->len; i++) {
        size_t close = after_word(lx, i, "endraw");
        size_t end = close ? closing_end(lx, close, "%}", true) : 0;
        if (end == 0)
            continue;
        QV_TRY(lex_data(lx, i, sign_at(lx, i), false));
        advance(lx, end);
        return QV_OK;
    }
    return qv_fail(QV_ERR_FORMAT, "%s, line %u: raw block without end", lx->name, line);
}

static qv_status lex_comment(lexer *lx)
{
    for (size_t i = lx->pos; i + 1 < lx->len; i++) {
        size_t end = closing_end(lx, i, "#}", true);
        if (end == 0)
            continue;
        advance(lx, end);
        return QV_OK;
    }
    return qv_fail(QV_ERR_FORMAT, "%s, line %u: comment without end", lx->name, lx->line);
}

/* The next "{{", "{%" or "{#" at or after `pos`; the end of the text if there is none. */
static size_t find_opening(const lexer *lx, size_t pos)
{
    while (pos < lx->len) {
        const char *brace = memchr(lx->text + pos, '{', lx->len - pos);
        if (!brace)
            break;
        pos = (size_t)(brace - lx->text);
        if (pos + 1 < lx->len && memchr("{%#", lx->text[pos + 1], 3))
            return pos;
        pos++;
    }
    return lx->len;
}

static qv_status lex_all(lexer *lx)
{
    while (lx->pos < lx->len) {
        size_t open = find_opening(lx, lx->pos);
        if (open == lx->len)
            return lex_data(lx, open, '+', true);
        char kind = lx->text[open + 1], sign = sign_at(lx, open);
        QV_TRY(lex_data(lx, open, sign, kind == '{'));
        size_t after_raw = raw_begin_end(lx, open);
        size_t begin_len = 2 + (sign != '\0');
        if (after_raw > 0) {
            advance(lx, after_raw);
            QV_TRY(lex_raw(lx));
        } else if (kind == '#') {
            advance(lx, open + begin_len);
            QV_TRY(lex_comment(lx));
        } else {
            bool block = kind == '%';
            QV_TRY(take(lx, block ? QV_JT_BLOCK_BEGIN : QV_JT_VARIABLE_BEGIN, begin_len));
            QV_TRY(lex_tag(lx, block));
        }
    }
    return QV_OK;
}

qv_status qv_j_tokenize(qv_arena *arena, const char *name, qv_jstr text, qv_jtoken **tokens)
{
    lexer lx = {.arena = arena,
                .name = name,
                .text = text.data,
                .len = text.len,
                .line = 1,
                .line_starting = true};
    QV_TRY(lex_all(&lx));
    QV_TRY(add_token(&lx, (qv_jtoken){.type = QV_JT_EOF}));
    *tokens = lx.tokens;
    return QV_OK;
}
