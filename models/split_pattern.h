/* The regular expressions by which tokenizers cut text into pieces, matched with PCRE2.
 *
 * The patterns are written for Oniguruma. What both engines read alike is accepted, the rest is
 * refused when the pattern is compiled; characters that the two classify differently are dealt with
 * when matching (see the source). A pattern is immutable; a matcher belongs to one encode.
 */
#ifndef QV_MODELS_SPLIT_PATTERN_H
#define QV_MODELS_SPLIT_PATTERN_H

#include "common/status.h"

typedef struct qv_split_pattern qv_split_pattern;

/* Compile a regular expression, or with `literal` a plain string.
 * Errors: UNSUPPORTED (a construct that the engines read differently), FORMAT, NOMEM. */
qv_status qv_split_pattern_compile(const char *pattern, size_t len, bool literal,
                                   qv_split_pattern **out);
void qv_split_pattern_free(qv_split_pattern *p);

/* Matching one text after another. Zero-initialise; the owner calls deinit. */
typedef struct {
    const qv_split_pattern *pattern;
    void *match;         /* pcre2_match_data */
    const char *subject; /* what is matched: the text, or `copy` */
    size_t len;
    size_t pos;      /* where the next match may begin */
    size_t last_end; /* of the match before; SIZE_MAX: none */
    char *copy;      /* [copy_size]; owned */
    size_t copy_size;
} qv_split_matcher;

/* Begin on `len` bytes of valid UTF-8, which stay as they are until the last match. Errors: NOMEM.
 */
qv_status qv_split_matcher_start(qv_split_matcher *m, const qv_split_pattern *pattern,
                                 const char *text, size_t len);

/* The next match, as offsets. *found is false after the last one. Errors: LIMIT. */
qv_status qv_split_matcher_next(qv_split_matcher *m, bool *found, size_t *start, size_t *end);

void qv_split_matcher_deinit(qv_split_matcher *m);

#endif
