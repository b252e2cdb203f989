/* Tokens to a tree: a recursive descent over jinja2's grammar, precedence by precedence. Names of
 * filters, tests, functions and methods are resolved here, so that a template that asks for
 * something we do not have fails when the model is opened and not on somebody's request.
 */
#include "models/jinja_parser.h"
#include "models/unicode.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MAX_NESTING = 150, MAX_NAMES = 4096 };

/* ---- Errors and memory ----------------------------------------------------------------------- */

qv_status qv_jp_fail_at(const qv_jparser *p, uint32_t line, qv_status status, const char *format,
                        ...)
{
    char text[QV_ERROR_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return qv_fail(status, "%s, line %u: %s", p->program->name, line, text);
}

qv_status qv_jp_no_memory(const qv_jparser *p)
{
    return qv_fail(QV_ERR_NOMEM, "%s: no memory for the template", p->program->name);
}

qv_status qv_jp_new_node(qv_jparser *p, qv_jnode_kind kind, uint32_t line, qv_jnode **out)
{
    *out = QV_ARENA_NEW(&p->program->arena, qv_jnode);
    if (!*out)
        return qv_jp_no_memory(p);
    (*out)->kind = (uint8_t)kind;
    (*out)->line = line;
    (*out)->height = 1;
    return QV_OK;
}

/* Note that `child` (which may be NULL) is below `node`. Trees are bounded in height because they
 * are walked by recursion. */
qv_status qv_jp_below(qv_jparser *p, qv_jnode *node, const qv_jnode *child)
{
    if (!child || child->height < node->height)
        return QV_OK;
    if (child->height >= QV_J_MAX_HEIGHT)
        return qv_jp_fail_at(p, node->line, QV_ERR_LIMIT, "nested deeper than %d", QV_J_MAX_HEIGHT);
    node->height = child->height + 1;
    return QV_OK;
}

qv_status qv_jp_all_below(qv_jparser *p, qv_jnode *node, qv_jnodes children)
{
    for (size_t i = 0; i < children.n; i++)
        QV_TRY(qv_jp_below(p, node, children.nodes[i]));
    return QV_OK;
}

/* Append to a list whose capacity is its length rounded up to a power of two. */
qv_status qv_jp_append(qv_jparser *p, qv_jnodes *list, qv_jnode *node)
{
    if ((list->n & (list->n - 1)) == 0) {
        qv_jnode **nodes =
            QV_ARENA_ARRAY(&p->program->arena, qv_jnode *, list->n ? 2 * list->n : 1);
        if (!nodes)
            return qv_jp_no_memory(p);
        if (list->n > 0)
            memcpy(nodes, list->nodes, list->n * sizeof *nodes);
        list->nodes = nodes;
    }
    list->nodes[list->n++] = node;
    return QV_OK;
}

qv_status qv_jp_enter(qv_jparser *p)
{
    if (++p->nesting > MAX_NESTING)
        return qv_jp_fail_at(p, p->tokens[p->pos].line, QV_ERR_LIMIT, "nested deeper than %d",
                             MAX_NESTING);
    return QV_OK;
}

void qv_jp_leave(qv_jparser *p)
{
    p->nesting--;
}

/* ---- The token stream ------------------------------------------------------------------------ */

const qv_jtoken *qv_jp_current(const qv_jparser *p)
{
    return &p->tokens[p->pos];
}

const qv_jtoken *qv_jp_look_ahead(const qv_jparser *p)
{
    return qv_jp_current(p)->type == QV_JT_EOF ? qv_jp_current(p) : &p->tokens[p->pos + 1];
}

void qv_jp_skip(qv_jparser *p)
{
    if (qv_jp_current(p)->type != QV_JT_EOF)
        p->pos++;
}

bool qv_jp_is(const qv_jparser *p, qv_jtoken_type type)
{
    return qv_jp_current(p)->type == type;
}

bool qv_jp_is_word(const qv_jtoken *token, const char *word)
{
    return token->type == QV_JT_NAME && qv_j_str_is(token->text, word);
}

bool qv_jp_skip_if(qv_jparser *p, qv_jtoken_type type)
{
    bool found = qv_jp_is(p, type);
    if (found)
        qv_jp_skip(p);
    return found;
}

bool qv_jp_skip_word(qv_jparser *p, const char *word)
{
    bool found = qv_jp_is_word(qv_jp_current(p), word);
    if (found)
        qv_jp_skip(p);
    return found;
}

/* How a token appears in errors. */
qv_jstr qv_jp_describe(const qv_jtoken *token)
{
    if (token->type == QV_JT_NAME)
        return token->text;
    const char *name = qv_j_token_name(token->type);
    return (qv_jstr){name, strlen(name)};
}

qv_status qv_jp_expect(qv_jparser *p, qv_jtoken_type type)
{
    if (qv_jp_skip_if(p, type))
        return QV_OK;
    qv_jstr got = qv_jp_describe(qv_jp_current(p));
    return qv_jp_fail_at(p, qv_jp_current(p)->line, QV_ERR_FORMAT, "expected '%s', got '%.*s'",
                         qv_j_token_name(type), QV_JSTR_ARG(got));
}

qv_status qv_jp_expect_name(qv_jparser *p, qv_jstr *name)
{
    *name = qv_jp_current(p)->text;
    return qv_jp_expect(p, QV_JT_NAME);
}

qv_status qv_jp_expect_word(qv_jparser *p, const char *word)
{
    if (qv_jp_skip_word(p, word))
        return QV_OK;
    qv_jstr got = qv_jp_describe(qv_jp_current(p));
    return qv_jp_fail_at(p, qv_jp_current(p)->line, QV_ERR_FORMAT, "expected '%s', got '%.*s'",
                         word, QV_JSTR_ARG(got));
}

/* ---- Names ----------------------------------------------------------------------------------- */

/* The index of a variable name, added if new. */
qv_status qv_jp_intern(qv_jparser *p, qv_jstr name, uint32_t *out)
{
    qv_jprogram *program = p->program;
    *out = qv_jprogram_find_name(program, name);
    if (*out != UINT32_MAX)
        return QV_OK;
    if (program->n_names == MAX_NAMES)
        return qv_jp_fail_at(p, qv_jp_current(p)->line, QV_ERR_LIMIT, "more than %d variables",
                             MAX_NAMES);
    if (program->n_names == p->names_capacity) {
        size_t capacity = p->names_capacity ? 2 * p->names_capacity : 32;
        qv_jstr *names = QV_ARENA_ARRAY(&program->arena, qv_jstr, capacity);
        bool *bound = QV_ARENA_ARRAY(&program->arena, bool, capacity);
        if (!names || !bound)
            return qv_jp_no_memory(p);
        if (program->n_names > 0) {
            memcpy(names, program->names, program->n_names * sizeof *names);
            memcpy(bound, p->bound, program->n_names * sizeof *bound);
        }
        program->names = names;
        p->bound = bound;
        p->names_capacity = capacity;
    }
    program->names[program->n_names] = name;
    *out = program->n_names++;
    return QV_OK;
}

qv_status qv_jp_intern_bound(qv_jparser *p, qv_jstr name, uint32_t *out)
{
    QV_TRY(qv_jp_intern(p, name, out));
    p->bound[*out] = true;
    return QV_OK;
}

/* ---- The whole template ---------------------------------------------------------------------- */

/* A name can only be called if the template binds it or it is a function of ours: what comes in as
 * variables is data. */
static qv_status check_called(const qv_jparser *p)
{
    const qv_jprogram *program = p->program;
    for (size_t i = 0; i < p->called.n; i++) {
        const qv_jnode *node = p->called.nodes[i];
        qv_jstr name = program->names[node->name];
        if (node->name == program->loop_name)
            return qv_jp_fail_at(p, node->line, QV_ERR_UNSUPPORTED,
                                 "recursive loops are not supported");
        if (!p->bound[node->name] && node->name != program->caller_name &&
            !qv_j_find_function(name))
            return qv_jp_fail_at(p, node->line, QV_ERR_UNSUPPORTED,
                                 "function '%.*s' is not supported", QV_JSTR_ARG(name));
    }
    return QV_OK;
}

/* Copy the template with its line ends made "\n" and the last one dropped. */
static qv_status copy_text(qv_jprogram *program, const char *text, size_t len)
{
    char *copy = qv_arena_alloc(&program->arena, len + 1, 1);
    if (!copy)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for the template", program->name);
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (text[i] == '\r' && i + 1 < len && text[i + 1] == '\n')
            continue;
        copy[n++] = text[i] == '\r' ? '\n' : text[i];
    }
    program->text = (qv_jstr){copy, n > 0 && copy[n - 1] == '\n' ? n - 1 : n};
    return QV_OK;
}

static qv_status parse_program(qv_jprogram *program)
{
    qv_jparser p = {.program = program};
    QV_TRY(qv_j_tokenize(&program->arena, program->name, program->text, &p.tokens));
    QV_TRY(qv_jp_intern(&p, QV_JSTR("loop"), &program->loop_name));
    QV_TRY(qv_jp_intern(&p, QV_JSTR("caller"), &program->caller_name));
    QV_TRY(qv_jp_intern(&p, QV_JSTR("varargs"), &program->varargs_name));
    QV_TRY(qv_jp_intern(&p, QV_JSTR("kwargs"), &program->kwargs_name));
    QV_TRY(qv_jp_parts(&p, NULL, &program->body));
    return check_called(&p);
}

qv_status qv_jprogram_parse(qv_jprogram *program, const char *text, size_t len, const char *name)
{
    qv_arena_init(&program->arena, 0, 0);
    program->name = qv_arena_strdup(&program->arena, name);
    if (!program->name)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for the template", name);
    if (len > QV_CHAT_TEMPLATE_MAX)
        return qv_fail(QV_ERR_LIMIT, "%s: a template of %zu bytes is longer than %zu", name, len,
                       QV_CHAT_TEMPLATE_MAX);
    size_t valid = qv_unicode_valid(text, len);
    if (valid < len)
        return qv_fail(QV_ERR_FORMAT, "%s: not valid UTF-8 at byte %zu", name, valid);
    QV_TRY(copy_text(program, text, len));
    return parse_program(program);
}

void qv_jprogram_deinit(qv_jprogram *program)
{
    qv_arena_deinit(&program->arena);
}

uint32_t qv_jprogram_find_name(const qv_jprogram *program, qv_jstr name)
{
    for (uint32_t i = 0; i < program->n_names; i++) {
        if (qv_j_str_equal(program->names[i], name))
            return i;
    }
    return UINT32_MAX;
}
