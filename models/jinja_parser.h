/* The parser's parts among each other: the state of one parse, the token stream, and what the files
 * jinja_parser.c (tokens, names, the whole template), jinja_parse_expr.c and jinja_parse_stmt.c use
 * of each other. Nothing else includes this.
 */
#ifndef QV_MODELS_JINJA_PARSER_H
#define QV_MODELS_JINJA_PARSER_H

#include "models/jinja.h"

typedef struct {
    qv_jprogram *program;
    qv_jtoken *tokens;
    size_t pos;
    unsigned nesting; /* of expressions and statements */
    unsigned loops;   /* that `break` may leave here */
    qv_jnode *macro;  /* the innermost one, or NULL */
    size_t n_macros;  /* macros and call blocks so far */
    size_t names_capacity;
    bool *bound;      /* [names_capacity] the template assigns it somewhere */
    qv_jnodes called; /* names that are called; checked at the end */
} qv_jparser;

/* Parses one thing at the current token. */
typedef qv_status qv_jparse_fn(qv_jparser *p, qv_jnode **out);

/* ---- jinja_parser.c ---- */

/* Fail with the template's name and `line` in front. */
qv_status qv_jp_fail_at(const qv_jparser *p, uint32_t line, qv_status status, const char *format,
                        ...) __attribute__((format(printf, 4, 5)));
qv_status qv_jp_no_memory(const qv_jparser *p);

/* A node without parts. */
qv_status qv_jp_new_node(qv_jparser *p, qv_jnode_kind kind, uint32_t line, qv_jnode **out);
/* Note that `child` (which may be NULL), or children, are below `node`. Errors: LIMIT (height). */
qv_status qv_jp_below(qv_jparser *p, qv_jnode *node, const qv_jnode *child);
qv_status qv_jp_all_below(qv_jparser *p, qv_jnode *node, qv_jnodes children);

/* Append to a list whose capacity is its length rounded up to a power of two. */
qv_status qv_jp_append(qv_jparser *p, qv_jnodes *list, qv_jnode *node);

/* One more level of nesting of the source; paired with leave. Errors: LIMIT. */
qv_status qv_jp_enter(qv_jparser *p);
void qv_jp_leave(qv_jparser *p);

/* The current token, the one behind it, and steps over tokens. EOF is never passed. */
const qv_jtoken *qv_jp_current(const qv_jparser *p);
const qv_jtoken *qv_jp_look_ahead(const qv_jparser *p);
void qv_jp_skip(qv_jparser *p);
bool qv_jp_is(const qv_jparser *p, qv_jtoken_type type);
bool qv_jp_is_word(const qv_jtoken *token, const char *word);
bool qv_jp_skip_if(qv_jparser *p, qv_jtoken_type type);
bool qv_jp_skip_word(qv_jparser *p, const char *word);

/* How a token appears in errors. */
qv_jstr qv_jp_describe(const qv_jtoken *token);

/* Skip a token, or fail by saying what is there instead. */
qv_status qv_jp_expect(qv_jparser *p, qv_jtoken_type type);
qv_status qv_jp_expect_name(qv_jparser *p, qv_jstr *name);
qv_status qv_jp_expect_word(qv_jparser *p, const char *word);

/* The index of a variable name, added if new; bound: the template assigns it. */
qv_status qv_jp_intern(qv_jparser *p, qv_jstr name, uint32_t *out);
qv_status qv_jp_intern_bound(qv_jparser *p, qv_jstr name, uint32_t *out);

/* ---- jinja_parse_expr.c ---- */

/* One expression, or several with commas: a tuple. `end_word` may follow a trailing comma. */
qv_status qv_jp_tuple(qv_jparser *p, qv_jparse_fn *parse_one, const char *end_word,
                      bool may_be_empty, qv_jnode **out);

/* Any expression; one without an inline if; a filter, or a chain of them, on `input` (NULL: the
 * text of a block). */
qv_status qv_jp_expression(qv_jparser *p, qv_jnode **out);
qv_status qv_jp_or(qv_jparser *p, qv_jnode **out);
qv_status qv_jp_filter(qv_jparser *p, qv_jnode *input, qv_jnode **out);
qv_status qv_jp_filter_chain(qv_jparser *p, qv_jnode *input, qv_jnode **out);

/* A target of assignment: names; with attributes of namespaces. */
qv_status qv_jp_plain_target(qv_jparser *p, qv_jnode **out);
qv_status qv_jp_attribute_target(qv_jparser *p, qv_jnode **out);

/* ---- jinja_parse_stmt.c ---- */

/* Statements, prints and data up to one of the end words, which becomes the current token; or, with
 * NULL, up to the end of the template. */
qv_status qv_jp_parts(qv_jparser *p, const char *const *end_words, qv_jnodes *body);

#endif
