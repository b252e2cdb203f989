/* Encoding goes through the stages of the Hugging Face tokenizers library: find the added tokens
 * that match raw text; normalize what lies between; find those that match normalized text; cut the
 * rest into pieces, one pre-tokenizer after another; merge the bytes of each piece. No list of
 * pieces is kept: each one goes through the remaining stages as soon as it is found.
 */
#include "models/tokenizer.h"

#include "models/tokenizer_impl.h"
#include "models/unicode.h"

#include <stdlib.h>
#include <string.h>

/* What one encode works with. */
typedef struct {
    const qv_tokenizer *tok;
    bool parse_special;
    size_t max_tokens;
    qv_tokens *out;
    qv_bpe_scratch bpe;
    qv_text_buffer normalized;
    qv_split_matcher matchers[QV_PIPELINE_MAX];
    qv_text_buffer prefixed[QV_PIPELINE_MAX]; /* pieces that got a space in front, by step */
} encoder;

/* ---- Cutting into pieces --------------------------------------------------------------------- */

static qv_status cut(encoder *e, size_t step, const char *text, size_t len);

/* Hand a piece of step `step` on. */
static qv_status pass_on(encoder *e, size_t step, const char *text, size_t start, size_t end)
{
    return start < end ? cut(e, step + 1, text + start, end - start) : QV_OK;
}

/* The state of cutting one text: spans come in order, pieces go on when it is clear where they end.
 */
typedef struct {
    bool open;         /* there is a piece that the next span may join */
    size_t start, end; /* of it */
    bool last_matched; /* whether the span before was a match */
} piece;

/* Take in the span [start, end), a match or what lies between two. */
static qv_status take_span(encoder *e, size_t step, const char *text, piece *p, size_t start,
                           size_t end, bool matched)
{
    qv_split_behavior behavior = e->tok->steps[step].behavior;
    bool last_matched = p->last_matched, join = false;
    p->last_matched = matched;
    switch (behavior) {
    case QV_SPLIT_REMOVED:
        if (matched)
            return QV_OK;
        break;
    case QV_SPLIT_ISOLATED:
        break;
    case QV_SPLIT_MERGED_WITH_PREVIOUS:
        join = matched && !last_matched;
        break;
    case QV_SPLIT_MERGED_WITH_NEXT:
        join = !matched && last_matched;
        break;
    case QV_SPLIT_CONTIGUOUS:
        join = matched == last_matched;
        break;
    }
    if (p->open && join) {
        p->end = end;
        return QV_OK;
    }
    piece done = *p;
    p->open = true;
    p->start = start;
    p->end = end;
    return done.open ? pass_on(e, step, text, done.start, done.end) : QV_OK;
}

/* Cut a text by the pattern of a step. */
static qv_status cut_by_pattern(encoder *e, size_t step, const char *text, size_t len)
{
    const qv_split_step *s = &e->tok->steps[step];
    qv_split_matcher *m = &e->matchers[step];
    QV_TRY(qv_split_matcher_start(m, s->pattern, text, len));
    piece p = {0};
    size_t pos = 0, start, end;
    for (bool found;;) {
        QV_TRY(qv_split_matcher_next(m, &found, &start, &end));
        if (!found)
            break;
        if (start > pos)
            QV_TRY(take_span(e, step, text, &p, pos, start, s->invert));
        QV_TRY(take_span(e, step, text, &p, start, end, !s->invert));
        pos = end;
    }
    if (pos < len)
        QV_TRY(take_span(e, step, text, &p, pos, len, s->invert));
    return p.open ? pass_on(e, step, text, p.start, p.end) : QV_OK;
}

/* Put a space in front of a text that has none. */
static qv_status prefix_space(qv_text_buffer *b, const char **text, size_t *len)
{
    if ((*text)[0] == ' ')
        return QV_OK;
    b->len = 0;
    QV_TRY(qv_text_buffer_reserve(b, *len + 1));
    b->data[0] = ' ';
    memcpy(b->data + 1, *text, *len);
    *text = b->data;
    *len += 1;
    return QV_OK;
}

/* Run a text through the pre-tokenizers from `step` on, and encode what comes out. The recursion is
 * as deep as there are steps. */
static qv_status cut(encoder *e, size_t step, const char *text, size_t len)
{
    if (step == e->tok->n_steps)
        return qv_bpe_encode(&e->tok->bpe, text, len, &e->bpe, e->max_tokens, e->out);
    const qv_split_step *s = &e->tok->steps[step];
    if (s->prefix_space)
        QV_TRY(prefix_space(&e->prefixed[step], &text, &len));
    return s->pattern ? cut_by_pattern(e, step, text, len) : cut(e, step + 1, text, len);
}

/* ---- Added tokens ---------------------------------------------------------------------------- */

/* The longest added token that text[0..len) begins with, or NULL. The patterns are sorted, so those
 * that share a prefix are neighbours: each byte narrows the range. */
static const qv_added_pattern *match_added(const qv_added_matcher *m, const char *text, size_t len)
{
    const qv_added_pattern *best = NULL;
    size_t lo = 0, hi = m->n;
    for (size_t depth = 0; lo < hi; depth++) {
        if (m->sorted[lo].len == depth)
            best = &m->sorted[lo++];
        if (depth == len)
            break;
        /* Of those longer than `depth`, keep the ones with this byte at it. */
        uint8_t byte = (uint8_t)text[depth];
        size_t from = lo, to = hi;
        while (from < to) {
            size_t mid = (from + to) / 2;
            if ((uint8_t)m->sorted[mid].content[depth] < byte)
                from = mid + 1;
            else
                to = mid;
        }
        lo = from;
        to = hi;
        while (from < to) {
            size_t mid = (from + to) / 2;
            if ((uint8_t)m->sorted[mid].content[depth] <= byte)
                from = mid + 1;
            else
                to = mid;
        }
        hi = from;
    }
    return best;
}

/* Whether a token at [start, end) may match there. */
static bool may_match(const encoder *e, const qv_added_token *t, const char *text, size_t len,
                      size_t start, size_t end)
{
    size_t size;
    if (t->special && !e->parse_special)
        return false;
    if (!t->single_word)
        return true;
    return (start == 0 || !qv_unicode_is_word(qv_unicode_before(text, start, &size))) &&
           (end == len || !qv_unicode_is_word(qv_unicode_get(text + end, &size)));
}

/* Take in the white space around a token that asks for it, back to `from` at most. */
static void strip_around(const qv_added_token *t, const char *text, size_t len, size_t from,
                         size_t *start, size_t *end)
{
    size_t size;
    while (t->lstrip && *start > from &&
           qv_unicode_is_space(qv_unicode_before(text, *start, &size)))
        *start -= size;
    while (t->rstrip && *end < len && qv_unicode_is_space(qv_unicode_get(text + *end, &size)))
        *end += size;
}

static qv_status encode_plain(encoder *e, const char *text, size_t len)
{
    return len > 0 ? cut(e, 0, text, len) : QV_OK;
}

static qv_status encode_normalized(encoder *e, const char *text, size_t len);

/* Find the added tokens of a text, and encode what lies between with `encode_rest`. */
static qv_status encode_around_added(encoder *e, const qv_added_matcher *m, const char *text,
                                     size_t len,
                                     qv_status (*encode_rest)(encoder *, const char *, size_t))
{
    size_t done = 0; /* encoded up to here */
    for (size_t i = 0; i < len;) {
        const qv_added_pattern *p = NULL;
        if (m->first_byte[(uint8_t)text[i]])
            p = match_added(m, text + i, len - i);
        if (!p) {
            i++;
            continue;
        }
        size_t start = i, end = i + p->len;
        i = end;
        if (!may_match(e, p->token, text, len, start, end))
            continue;
        strip_around(p->token, text, len, done, &start, &end);
        if (done < start)
            QV_TRY(encode_rest(e, text + done, start - done));
        QV_TRY(qv_tokens_push(e->out, p->token->id, e->max_tokens));
        done = end;
    }
    return done < len ? encode_rest(e, text + done, len - done) : QV_OK;
}

/* Encode raw text that holds no raw-matching token. */
static qv_status encode_raw(encoder *e, const char *text, size_t len)
{
    if (e->tok->n_forms > 0) {
        QV_TRY(qv_tokenizer_normalize(e->tok, text, len, &e->normalized));
        text = e->normalized.data;
        len = e->normalized.len;
    }
    return encode_normalized(e, text, len);
}

static qv_status encode_normalized(encoder *e, const char *text, size_t len)
{
    if (e->tok->normalized.n == 0)
        return encode_plain(e, text, len);
    return encode_around_added(e, &e->tok->normalized, text, len, encode_plain);
}

/* ---- Encode ---------------------------------------------------------------------------------- */

static qv_status push_all(encoder *e, const int32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++)
        QV_TRY(qv_tokens_push(e->out, ids[i], e->max_tokens));
    return QV_OK;
}

static qv_status encode_all(encoder *e, const char *text, size_t len, bool add_special)
{
    if (add_special)
        QV_TRY(push_all(e, e->tok->before, e->tok->n_before));
    QV_TRY(encode_around_added(e, &e->tok->raw, text, len, encode_raw));
    if (add_special)
        QV_TRY(push_all(e, e->tok->after, e->tok->n_after));
    return QV_OK;
}

qv_status qv_tokenizer_encode(const qv_tokenizer *tok, const char *text, size_t len, unsigned flags,
                              size_t max_tokens, qv_tokens *out)
{
    out->count = 0;
    if (len > INT32_MAX / 4)
        return qv_fail(QV_ERR_LIMIT, "a text of %zu bytes is too long to encode", len);
    size_t valid = qv_unicode_valid(text, len);
    if (valid < len)
        return qv_fail(QV_ERR_FORMAT, "the text is not valid UTF-8 at byte %zu", valid);
    encoder e = {.tok = tok,
                 .parse_special = flags & QV_ENCODE_PARSE_SPECIAL,
                 .max_tokens = max_tokens,
                 .out = out};
    qv_status status = encode_all(&e, text, len, flags & QV_ENCODE_ADD_SPECIAL);
    qv_bpe_scratch_deinit(&e.bpe);
    free(e.normalized.data);
    for (size_t i = 0; i < tok->n_steps; i++) {
        qv_split_matcher_deinit(&e.matchers[i]);
        free(e.prefixed[i].data);
    }
    if (status != QV_OK)
        out->count = 0;
    return status;
}

/* ---- Decode ---------------------------------------------------------------------------------- */

static const char replacement[] = "\xEF\xBF\xBD"; /* U+FFFD */

/* The entry of an id that adds to the text, or NULL. */
static const qv_vocab_entry *visible_entry(const qv_tokenizer *tok, int32_t id, bool skip_special)
{
    if (id < 0 || (size_t)id >= tok->bpe.n_ids || !tok->bpe.entries[id].text)
        return NULL;
    const qv_vocab_entry *entry = &tok->bpe.entries[id];
    return skip_special && (entry->flags & QV_TOKEN_SPECIAL) ? NULL : entry;
}

void qv_detok_init(qv_detok *d, bool skip_special)
{
    *d = (qv_detok){.skip_special = skip_special};
}

/* Write what is complete of `len` bytes to `out`; returns its length. *rest gets the number of
 * bytes at the end that begin a character. */
static size_t write_complete(const char *bytes, size_t len, char *out, size_t *rest)
{
    size_t n = 0, size;
    uint32_t cp;
    for (size_t i = 0; i < len; i += size) {
        switch (qv_unicode_next(bytes + i, len - i, &cp, &size)) {
        case QV_UNICODE_CHAR:
            memcpy(out + n, bytes + i, size);
            n += size;
            break;
        case QV_UNICODE_BROKEN:
            memcpy(out + n, replacement, 3);
            n += 3;
            break;
        case QV_UNICODE_PARTIAL:
            *rest = size;
            return n;
        }
    }
    *rest = 0;
    return n;
}

size_t qv_detok_push(qv_detok *d, const qv_tokenizer *tok, int32_t token, char *out)
{
    const qv_vocab_entry *entry = visible_entry(tok, token, d->skip_special);
    if (!entry)
        return 0;
    const char *bytes = entry->bytes;
    size_t len = entry->bytes_len, n = 0, rest;
    if (d->n_held == 0 && (entry->flags & QV_TOKEN_UTF8)) {
        memcpy(out, bytes, len);
        return len;
    }
    /* Decide about the held bytes with as many of the new ones as one character can take. */
    while (d->n_held > 0 && len > 0) {
        char joined[sizeof d->held + 1];
        uint32_t cp;
        size_t size;
        memcpy(joined, d->held, d->n_held);
        joined[d->n_held] = *bytes;
        qv_unicode_kind kind = qv_unicode_next(joined, d->n_held + 1u, &cp, &size);
        if (kind == QV_UNICODE_PARTIAL) {
            d->held[d->n_held++] = (uint8_t)*bytes++;
            len--;
            continue;
        }
        if (kind == QV_UNICODE_CHAR) {
            memcpy(out + n, joined, size);
            n += size;
            bytes++;
            len--;
        } else {
            memcpy(out + n, replacement, 3);
            n += 3;
        }
        d->n_held = 0;
    }
    if (d->n_held > 0)
        return n;
    n += write_complete(bytes, len, out + n, &rest);
    memcpy(d->held, bytes + len - rest, rest);
    d->n_held = (uint8_t)rest;
    return n;
}

size_t qv_detok_flush(qv_detok *d, char *out)
{
    size_t n = d->n_held > 0 ? 3 : 0;
    memcpy(out, replacement, n);
    d->n_held = 0;
    return n;
}

size_t qv_tokenizer_max_text(const qv_tokenizer *tok)
{
    /* Every byte, held or new, may turn out broken. */
    return 3 * (tok->bpe.max_bytes + sizeof((qv_detok *)0)->held);
}

qv_status qv_tokenizer_decode(const qv_tokenizer *tok, const int32_t *tokens, size_t n,
                              bool skip_special, char **text, size_t *len)
{
    qv_text_buffer b = {0};
    qv_detok d;
    qv_detok_init(&d, skip_special);
    qv_status status = qv_text_buffer_reserve(&b, 1);
    for (size_t i = 0; i < n && status == QV_OK; i++) {
        const qv_vocab_entry *entry = visible_entry(tok, tokens[i], skip_special);
        if (!entry)
            continue;
        status = qv_text_buffer_reserve(&b, 3 * (entry->bytes_len + sizeof d.held));
        if (status == QV_OK)
            b.len += qv_detok_push(&d, tok, tokens[i], b.data + b.len);
    }
    if (status == QV_OK)
        status = qv_text_buffer_reserve(&b, 4);
    if (status != QV_OK) {
        free(b.data);
        return status;
    }
    b.len += qv_detok_flush(&d, b.data + b.len);
    b.data[b.len] = '\0';
    *text = b.data;
    *len = b.len;
    return QV_OK;
}

/* ---- Vocabulary ------------------------------------------------------------------------------ */

size_t qv_tokenizer_vocab_size(const qv_tokenizer *tok)
{
    return tok->bpe.n_ids;
}

const char *qv_tokenizer_token(const qv_tokenizer *tok, int32_t id, size_t *len)
{
    const qv_vocab_entry *entry = visible_entry(tok, id, false);
    if (entry && len)
        *len = entry->text_len;
    return entry ? entry->text : NULL;
}

const char *qv_tokenizer_bytes(const qv_tokenizer *tok, int32_t id, size_t *len)
{
    const qv_vocab_entry *entry = visible_entry(tok, id, false);
    if (entry)
        *len = entry->bytes_len;
    return entry ? entry->bytes : NULL;
}

int32_t qv_tokenizer_find(const qv_tokenizer *tok, const char *text, size_t len)
{
    return qv_bpe_find(&tok->bpe, text, len);
}

bool qv_tokenizer_is_special(const qv_tokenizer *tok, int32_t id)
{
    return visible_entry(tok, id, false) && (tok->bpe.entries[id].flags & QV_TOKEN_SPECIAL);
}

const qv_added_token *qv_tokenizer_added(const qv_tokenizer *tok, size_t *count)
{
    *count = tok->n_added;
    return tok->added;
}

int32_t qv_tokenizer_bos(const qv_tokenizer *tok)
{
    return tok->bos;
}

int32_t qv_tokenizer_eos(const qv_tokenizer *tok)
{
    return tok->eos;
}

int32_t qv_tokenizer_pad(const qv_tokenizer *tok)
{
    return tok->pad;
}
