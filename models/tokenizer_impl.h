/* What a tokenizer is made of: filled by tokenizer_open.c, used by tokenizer.c, seen by no one
 * else.
 */
#ifndef QV_MODELS_TOKENIZER_IMPL_H
#define QV_MODELS_TOKENIZER_IMPL_H

#include "models/bpe.h"
#include "models/split_pattern.h"

#include <utf8proc.h>

/* Most normalizers and pre-tokenizers in a row. */
#define QV_PIPELINE_MAX 16

/* What becomes of the matches of a split pattern and of the text between them. */
typedef enum {
    QV_SPLIT_ISOLATED,             /* pieces of their own */
    QV_SPLIT_REMOVED,              /* matches are dropped */
    QV_SPLIT_MERGED_WITH_PREVIOUS, /* a match ends the piece before it */
    QV_SPLIT_MERGED_WITH_NEXT,     /* a match begins the piece after it */
    QV_SPLIT_CONTIGUOUS,           /* matches in a row are one piece, so is what lies between */
} qv_split_behavior;

/* One pre-tokenizer. */
typedef struct {
    qv_split_pattern *pattern; /* owned; NULL: no cutting */
    qv_split_behavior behavior;
    bool invert;       /* what matches counts as between, and the other way round */
    bool prefix_space; /* first put a space before a piece that has none */
} qv_split_step;

/* The added tokens to look for in one kind of text. */
typedef struct {
    const char *content; /* as it is spelled in that text */
    size_t len;
    const qv_added_token *token;
} qv_added_pattern;

typedef struct {
    qv_added_pattern *sorted; /* [n] by content, bytewise; no two alike */
    size_t n;
    bool first_byte[256]; /* some content begins with it */
} qv_added_matcher;

struct qv_tokenizer {
    qv_arena arena;
    qv_bpe bpe;
    qv_added_token *added; /* [n_added] in the order of the file */
    size_t n_added;
    qv_added_matcher raw;                     /* those that match the text as given */
    qv_added_matcher normalized;              /* those that match it after normalization */
    utf8proc_option_t forms[QV_PIPELINE_MAX]; /* normalization, step by step */
    size_t n_forms;
    qv_split_step steps[QV_PIPELINE_MAX];
    size_t n_steps;
    int32_t *before, *after; /* ids that add_special puts around a text */
    size_t n_before, n_after;
    int32_t bos, eos, pad;
};

/* A text that grows. Zero-initialise; free data. */
typedef struct {
    char *data;
    size_t len, size;
} qv_text_buffer;

/* Make room for `n` more bytes. Errors: NOMEM. */
qv_status qv_text_buffer_reserve(qv_text_buffer *b, size_t n);

/* Replace `out` by the text in one normalization form: UTF8PROC_COMPOSE or _DECOMPOSE, with or
 * without _COMPAT. `text` is valid UTF-8. Errors: NOMEM. */
qv_status qv_normalize(const char *text, size_t len, utf8proc_option_t form, qv_text_buffer *out);

/* Replace `out` by the text after all of the tokenizer's normalizers. Errors: NOMEM. */
qv_status qv_tokenizer_normalize(const qv_tokenizer *tok, const char *text, size_t len,
                                 qv_text_buffer *out);

#endif
