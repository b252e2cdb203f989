/* Unicode normalization in linear time, whatever the text.
 *
 * utf8proc decomposes and composes; the canonical ordering between the two is done here, because
 * utf8proc's takes quadratic time on long runs of combining marks, which anyone may send.
 */
#include "models/tokenizer_impl.h"
#include "models/unicode.h"

#include <stdlib.h>
#include <string.h>

qv_status qv_text_buffer_reserve(qv_text_buffer *b, size_t n)
{
    if (b->size - b->len >= n)
        return QV_OK;
    size_t size = b->size < 256 ? 256 : b->size;
    while (size - b->len < n)
        size *= 2;
    char *data = realloc(b->data, size);
    if (!data)
        return qv_fail(QV_ERR_NOMEM, "no memory for a text of %zu bytes", size);
    b->data = data;
    b->size = size;
    return QV_OK;
}

static qv_status append(qv_text_buffer *b, const char *text, size_t len)
{
    if (len == 0)
        return QV_OK;
    QV_TRY(qv_text_buffer_reserve(b, len));
    memcpy(b->data + b->len, text, len);
    b->len += len;
    return QV_OK;
}

/* Code points below this are the same in every form of this kind, and nothing after them changes
 * them or what lies before: text can be cut in front of them. */
static uint32_t inert_below(utf8proc_option_t form)
{
    bool composed_only = (form & UTF8PROC_COMPOSE) && !(form & UTF8PROC_COMPAT);
    return composed_only ? 0x300 : 0x80;
}

/* Characters whose classes or mappings came after Unicode 9. The tokenizers library normalizes by
 * that version: to it they neither decompose, nor compose, nor move. */
static bool is_after_unicode_9(uint32_t cp)
{
    static const struct {
        uint32_t first, last;
    } ranges[] = {
        {0x007FD, 0x007FD}, {0x00897, 0x0089F}, {0x008CA, 0x008D3}, {0x009FE, 0x009FE},
        {0x00C3C, 0x00C3C}, {0x00CF3, 0x00CF3}, {0x00D3B, 0x00D3C}, {0x00EBA, 0x00EBA},
        {0x00ECE, 0x00ECE}, {0x01715, 0x01715}, {0x01ABF, 0x01ACE}, {0x01DF6, 0x01DFA},
        {0x032FF, 0x032FF}, {0x0A7F2, 0x0A7F4}, {0x0A82C, 0x0A82C}, {0x0AB69, 0x0AB69},
        {0x105C0, 0x105F3}, {0x10781, 0x10785}, {0x10787, 0x107B0}, {0x107B2, 0x107BA},
        {0x10D24, 0x10D27}, {0x10D69, 0x10D6D}, {0x10EAB, 0x10EAC}, {0x10EFC, 0x10EFF},
        {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x11241, 0x11241},
        {0x1133B, 0x1133B}, {0x11380, 0x113E2}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
        {0x11930, 0x11930}, {0x11935, 0x11935}, {0x11938, 0x11938}, {0x1193D, 0x1193E},
        {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
        {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
        {0x11F00, 0x11F5A}, {0x13440, 0x13455}, {0x16100, 0x16139}, {0x16D40, 0x16D79},
        {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE},
        {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF}, {0x1F16C, 0x1F16C},
        {0x1FBF0, 0x1FBF9},
    };
    size_t lo = 0, hi = sizeof ranges / sizeof ranges[0];
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (cp > ranges[mid].last)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < sizeof ranges / sizeof ranges[0] && cp >= ranges[lo].first;
}

static int combining_class(utf8proc_int32_t cp)
{
    int class = utf8proc_get_property(cp)->combining_class;
    return class != 0 && is_after_unicode_9((uint32_t)cp) ? 0 : class;
}

static int compare_keys(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Put each run of combining marks in the order of their classes, equal ones staying in order.
 * `keys` has room for n. */
static void order_marks(utf8proc_int32_t *cps, size_t n, uint64_t *keys)
{
    for (size_t start = 0; start < n; start++) {
        if (combining_class(cps[start]) == 0)
            continue;
        size_t end = start, n_unordered = 0;
        int last = 0;
        for (int class; end < n && (class = combining_class(cps[end])) != 0; end++) {
            n_unordered += class < last;
            last = class;
            keys[end - start] =
                (uint64_t) class << 56 | (uint64_t)(end - start) << 21 | (uint64_t)cps[end];
        }
        if (n_unordered > 0) {
            qsort(keys, end - start, sizeof *keys, compare_keys);
            for (size_t i = start; i < end; i++)
                cps[i] = (utf8proc_int32_t)(keys[i - start] & 0x1FFFFF);
        }
        start = end - 1;
    }
}

/* Write the decomposition of a character to `out`, which has room for `max`; returns its length. */
static size_t decompose(uint32_t cp, utf8proc_option_t form, utf8proc_int32_t *out, size_t max)
{
    form = (form & ~UTF8PROC_COMPOSE) | UTF8PROC_DECOMPOSE;
    if (!is_after_unicode_9(cp))
        return (size_t)utf8proc_decompose_char((utf8proc_int32_t)cp, out, (utf8proc_ssize_t)max,
                                               form, NULL);
    out[0] = (utf8proc_int32_t)cp;
    return 1;
}

/* Compose in place; returns the new length. */
static size_t compose(utf8proc_int32_t *cps, size_t n, utf8proc_option_t form)
{
    size_t n_out = 0;
    for (size_t start = 0, end; start < n; start = end) {
        end = start;
        while (end < n && !is_after_unicode_9((uint32_t)cps[end]))
            end++;
        memmove(cps + n_out, cps + start, (end - start) * sizeof *cps);
        n_out +=
            (size_t)utf8proc_normalize_utf32(cps + n_out, (utf8proc_ssize_t)(end - start), form);
        if (end < n)
            cps[n_out++] = cps[end++];
    }
    return n_out;
}

/* Normalize one stretch of text and append it. */
static qv_status normalize_stretch(const char *text, size_t len, utf8proc_option_t form,
                                   qv_text_buffer *out)
{
    utf8proc_int32_t *cps = NULL;
    uint64_t *keys = NULL;
    size_t n = 0, capacity = 0;
    qv_status status = QV_OK;
    for (size_t i = 0, size; i < len; i += size) {
        /* The longest decomposition of one character has 18. */
        if (capacity - n < 32) {
            capacity = capacity ? capacity * 2 : len + 32;
            utf8proc_int32_t *grown = realloc(cps, capacity * sizeof *cps);
            if (!grown)
                goto no_memory;
            cps = grown;
        }
        n += decompose(qv_unicode_get(text + i, &size), form, cps + n, capacity - n);
    }
    keys = malloc((n + 1) * sizeof *keys);
    if (!keys)
        goto no_memory;
    order_marks(cps, n, keys);
    if (form & UTF8PROC_COMPOSE)
        n = compose(cps, n, form);
    status = qv_text_buffer_reserve(out, 4 * n);
    for (size_t i = 0; i < n && status == QV_OK; i++)
        out->len += qv_unicode_put(out->data + out->len, (uint32_t)cps[i]);
    free(keys);
    free(cps);
    return status;
no_memory:
    free(keys);
    free(cps);
    return qv_fail(QV_ERR_NOMEM, "no memory to normalize a text of %zu bytes", len);
}

/* The next stretch of text[from..len) that normalization may change, with the character before it.
 */
static void find_stretch(const char *text, size_t from, size_t len, uint32_t inert, size_t *start,
                         size_t *end)
{
    size_t i = from, size = 0, before = from;
    while (i < len && qv_unicode_get(text + i, &size) < inert) {
        before = i;
        i += size;
    }
    *start = i < len ? before : len;
    while (i < len && qv_unicode_get(text + i, &size) >= inert)
        i += size;
    *end = i;
}

qv_status qv_normalize(const char *text, size_t len, utf8proc_option_t form, qv_text_buffer *out)
{
    out->len = 0;
    uint32_t inert = inert_below(form);
    for (size_t pos = 0, start, end; pos < len; pos = end) {
        find_stretch(text, pos, len, inert, &start, &end);
        QV_TRY(append(out, text + pos, start - pos));
        if (start < end)
            QV_TRY(normalize_stretch(text + start, end - start, form, out));
    }
    return QV_OK;
}

qv_status qv_tokenizer_normalize(const qv_tokenizer *tok, const char *text, size_t len,
                                 qv_text_buffer *out)
{
    qv_text_buffer other = {0};
    qv_status status = QV_OK;
    out->len = 0;
    if (tok->n_forms == 0)
        status = append(out, text, len);
    for (size_t i = 0; i < tok->n_forms && status == QV_OK; i++) {
        status = qv_normalize(text, len, tok->forms[i], out);
        if (status == QV_OK && i + 1 < tok->n_forms) {
            qv_text_buffer swap = other;
            other = *out;
            *out = swap;
            text = other.data;
            len = other.len;
        }
    }
    free(other.data);
    return status;
}
