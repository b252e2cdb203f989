/* Tokens to a tree: a recursive descent over jinja2's grammar, precedence by precedence. Names of
 * filters, tests, functions and methods are resolved here, so that a template that asks for
 * something we do not have fails when the model is opened and not on somebody's request.
 */
#include "models/jinja.h"
#include "models/unicode.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_NESTING = 150, MAX_NAMES = 4096 };

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
} parser;

/* ---- Errors and memory ----------------------------------------------------------------------- */

static qv_status fail_at(const parser *p, uint32_t line, qv_status status, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static qv_status fail_at(const parser *p, uint32_t line, qv_status status, const char *format, ...)
{
    char text[QV_ERROR_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return qv_fail(status, "%s, line %u: %s", p->program->name, line, text);
}

static qv_status no_memory(const parser *p)
{
    return qv_fail(QV_ERR_NOMEM, "%s: no memory for the template", p->program->name);
}

static qv_status new_node(parser *p, qv_jnode_kind kind, uint32_t line, qv_jnode **out)
{
    *out = QV_ARENA_NEW(&p->program->arena, qv_jnode);
    if (!*out)
        return no_memory(p);
    (*out)->kind = (uint8_t)kind;
    (*out)->line = line;
    (*out)->height = 1;
    return QV_OK;
}

/* Note that `child` (which may be NULL) is below `node`. Trees are bounded in height because they
 * are walked by recursion. */
static qv_status below(parser *p, qv_jnode *node, const qv_jnode *child)
{
    if (!child || child->height < node->height)
        return QV_OK;
    if (child->height >= QV_J_MAX_HEIGHT)
        return fail_at(p, node->line, QV_ERR_LIMIT, "nested deeper than %d", QV_J_MAX_HEIGHT);
    node->height = child->height + 1;
    return QV_OK;
}

static qv_status all_below(parser *p, qv_jnode *node, qv_jnodes children)
{
    for (size_t i = 0; i < children.n; i++)
        QV_TRY(below(p, node, children.nodes[i]));
    return QV_OK;
}

/* Append to a list whose capacity is its length rounded up to a power of two. */
static qv_status append(parser *p, qv_jnodes *list, qv_jnode *node)
{
    if ((list->n & (list->n - 1)) == 0) {
        qv_jnode **nodes =
            QV_ARENA_ARRAY(&p->program->arena, qv_jnode *, list->n ? 2 * list->n : 1);
        if (!nodes)
            return no_memory(p);
        if (list->n > 0)
            memcpy(nodes, list->nodes, list->n * sizeof *nodes);
        list->nodes = nodes;
    }
    list->nodes[list->n++] = node;
    return QV_OK;
}

static qv_status enter(parser *p)
{
    if (++p->nesting > MAX_NESTING)
        return fail_at(p, p->tokens[p->pos].line, QV_ERR_LIMIT, "nested deeper than %d",
                       MAX_NESTING);
    return QV_OK;
}

static void leave(parser *p)
{
    p->nesting--;
}

/* ---- The token stream ------------------------------------------------------------------------ */

static const qv_jtoken *current(const parser *p)
{
    return &p->tokens[p->pos];
}

static const qv_jtoken *look_ahead(const parser *p)
{
    return current(p)->type == QV_JT_EOF ? current(p) : &p->tokens[p->pos + 1];
}

static void skip(parser *p)
{
    if (current(p)->type != QV_JT_EOF)
        p->pos++;
}

static bool is(const parser *p, qv_jtoken_type type)
{
    return current(p)->type == type;
}

static bool is_word(const qv_jtoken *token, const char *word)
{
    return token->type == QV_JT_NAME && qv_j_str_is(token->text, word);
}

static bool skip_if(parser *p, qv_jtoken_type type)
{
    bool found = is(p, type);
    if (found)
        skip(p);
    return found;
}

static bool skip_word(parser *p, const char *word)
{
    bool found = is_word(current(p), word);
    if (found)
        skip(p);
    return found;
}

/* How a token appears in errors. */
static qv_jstr describe(const qv_jtoken *token)
{
    if (token->type == QV_JT_NAME)
        return token->text;
    const char *name = qv_j_token_name(token->type);
    return (qv_jstr){name, strlen(name)};
}

static qv_status expect(parser *p, qv_jtoken_type type)
{
    if (skip_if(p, type))
        return QV_OK;
    qv_jstr got = describe(current(p));
    return fail_at(p, current(p)->line, QV_ERR_FORMAT, "expected '%s', got '%.*s'",
                   qv_j_token_name(type), QV_JSTR_ARG(got));
}

static qv_status expect_name(parser *p, qv_jstr *name)
{
    *name = current(p)->text;
    return expect(p, QV_JT_NAME);
}

static qv_status expect_word(parser *p, const char *word)
{
    if (skip_word(p, word))
        return QV_OK;
    qv_jstr got = describe(current(p));
    return fail_at(p, current(p)->line, QV_ERR_FORMAT, "expected '%s', got '%.*s'", word,
                   QV_JSTR_ARG(got));
}

/* ---- Names ----------------------------------------------------------------------------------- */

/* The index of a variable name, added if new. */
static qv_status intern(parser *p, qv_jstr name, uint32_t *out)
{
    qv_jprogram *program = p->program;
    *out = qv_jprogram_find_name(program, name);
    if (*out != UINT32_MAX)
        return QV_OK;
    if (program->n_names == MAX_NAMES)
        return fail_at(p, current(p)->line, QV_ERR_LIMIT, "more than %d variables", MAX_NAMES);
    if (program->n_names == p->names_capacity) {
        size_t capacity = p->names_capacity ? 2 * p->names_capacity : 32;
        qv_jstr *names = QV_ARENA_ARRAY(&program->arena, qv_jstr, capacity);
        bool *bound = QV_ARENA_ARRAY(&program->arena, bool, capacity);
        if (!names || !bound)
            return no_memory(p);
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

static qv_status intern_bound(parser *p, qv_jstr name, uint32_t *out)
{
    QV_TRY(intern(p, name, out));
    p->bound[*out] = true;
    return QV_OK;
}

/* ---- Expressions ----------------------------------------------------------------------------- */

static qv_status parse_expression(parser *p, qv_jnode **out);
static qv_status parse_or(parser *p, qv_jnode **out);
static qv_status parse_unary(parser *p, bool with_filters, qv_jnode **out);

/* What ends a tuple written without parentheses. */
static bool at_tuple_end(const parser *p, const char *end_word)
{
    return is(p, QV_JT_VARIABLE_END) || is(p, QV_JT_BLOCK_END) || is(p, QV_JT_RPAREN) ||
           (end_word && is_word(current(p), end_word));
}

typedef qv_status parse_fn(parser *p, qv_jnode **out);

/* One expression, or several with commas: a tuple. `end_word` may follow a trailing comma. */
static qv_status parse_tuple(parser *p, parse_fn *parse_one, const char *end_word,
                             bool may_be_empty, qv_jnode **out)
{
    uint32_t line = current(p)->line;
    qv_jnodes items = {0};
    bool is_tuple = false;
    while (!at_tuple_end(p, end_word)) {
        qv_jnode *item;
        QV_TRY(parse_one(p, &item));
        QV_TRY(append(p, &items, item));
        if (!skip_if(p, QV_JT_COMMA))
            break;
        is_tuple = true;
    }
    if (!is_tuple && items.n == 1) {
        *out = items.nodes[0];
        return QV_OK;
    }
    if (items.n == 0 && !may_be_empty) {
        qv_jstr got = describe(current(p));
        return fail_at(p, line, QV_ERR_FORMAT, "expected an expression, got '%.*s'",
                       QV_JSTR_ARG(got));
    }
    QV_TRY(new_node(p, QV_JN_TUPLE, line, out));
    (*out)->items = items;
    return all_below(p, *out, items);
}

static qv_status parse_const(parser *p, qv_jvalue value, qv_jnode **out)
{
    QV_TRY(new_node(p, QV_JN_CONST, current(p)->line, out));
    (*out)->constant = value;
    skip(p);
    return QV_OK;
}

/* A variable, or one of the words for true, false and none. */
static qv_status parse_name(parser *p, qv_jnode **out)
{
    static const struct {
        const char *word;
        qv_jvalue value;
    } words[] = {
        {"true", {.type = QV_J_BOOL, .boolean = true}},
        {"True", {.type = QV_J_BOOL, .boolean = true}},
        {"false", {.type = QV_J_BOOL, .boolean = false}},
        {"False", {.type = QV_J_BOOL, .boolean = false}},
        {"none", {.type = QV_J_NONE}},
        {"None", {.type = QV_J_NONE}},
    };
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        if (is_word(current(p), words[i].word))
            return parse_const(p, words[i].value, out);
    }
    QV_TRY(new_node(p, QV_JN_NAME, current(p)->line, out));
    QV_TRY(intern(p, current(p)->text, &(*out)->name));
    const qv_jprogram *program = p->program;
    uint32_t name = (*out)->name;
    if (p->macro) {
        p->macro->macro.uses_caller |= name == program->caller_name;
        p->macro->macro.uses_varargs |= name == program->varargs_name;
        p->macro->macro.uses_kwargs |= name == program->kwargs_name;
    }
    skip(p);
    return QV_OK;
}

/* Strings in a row are one string. */
static qv_status parse_string(parser *p, qv_jnode **out)
{
    qv_jstr text = current(p)->text;
    if (look_ahead(p)->type == QV_JT_STRING) {
        size_t len = 0, n = 0;
        for (size_t i = p->pos; p->tokens[i].type == QV_JT_STRING; i++)
            len += p->tokens[i].text.len;
        char *joined = qv_arena_alloc(&p->program->arena, len, 1);
        if (!joined)
            return no_memory(p);
        for (; look_ahead(p)->type == QV_JT_STRING; skip(p)) {
            memcpy(joined + n, current(p)->text.data, current(p)->text.len);
            n += current(p)->text.len;
        }
        memcpy(joined + n, current(p)->text.data, current(p)->text.len);
        text = (qv_jstr){joined, len};
    }
    return parse_const(p, qv_j_str(text.data, text.len), out);
}

static qv_status parse_list(parser *p, qv_jnode **out)
{
    QV_TRY(new_node(p, QV_JN_LIST, current(p)->line, out));
    skip(p);
    qv_jnodes items = {0};
    while (!is(p, QV_JT_RBRACKET)) {
        qv_jnode *item;
        if (items.n > 0)
            QV_TRY(expect(p, QV_JT_COMMA));
        if (is(p, QV_JT_RBRACKET))
            break;
        QV_TRY(parse_expression(p, &item));
        QV_TRY(append(p, &items, item));
    }
    (*out)->items = items;
    QV_TRY(all_below(p, *out, items));
    return expect(p, QV_JT_RBRACKET);
}

static qv_status parse_dict(parser *p, qv_jnode **out)
{
    QV_TRY(new_node(p, QV_JN_DICT, current(p)->line, out));
    skip(p);
    qv_jnodes items = {0};
    while (!is(p, QV_JT_RBRACE)) {
        qv_jnode *key, *value;
        if (items.n > 0)
            QV_TRY(expect(p, QV_JT_COMMA));
        if (is(p, QV_JT_RBRACE))
            break;
        QV_TRY(parse_expression(p, &key));
        QV_TRY(expect(p, QV_JT_COLON));
        QV_TRY(parse_expression(p, &value));
        QV_TRY(append(p, &items, key));
        QV_TRY(append(p, &items, value));
    }
    (*out)->items = items;
    QV_TRY(all_below(p, *out, items));
    return expect(p, QV_JT_RBRACE);
}

static qv_status parse_primary(parser *p, qv_jnode **out)
{
    const qv_jtoken *token = current(p);
    switch (token->type) {
    case QV_JT_NAME:
        return parse_name(p, out);
    case QV_JT_STRING:
        return parse_string(p, out);
    case QV_JT_INTEGER:
        return parse_const(p, qv_j_int(token->integer), out);
    case QV_JT_FLOAT:
        return parse_const(p, qv_j_float(token->real), out);
    case QV_JT_LPAREN:
        skip(p);
        QV_TRY(parse_tuple(p, parse_expression, NULL, true, out));
        return expect(p, QV_JT_RPAREN);
    case QV_JT_LBRACKET:
        return parse_list(p, out);
    case QV_JT_LBRACE:
        return parse_dict(p, out);
    default: {
        qv_jstr got = describe(token);
        return fail_at(p, token->line, QV_ERR_FORMAT, "unexpected '%.*s'", QV_JSTR_ARG(got));
    }
    }
}

/* ---- Attributes, items, calls ---------------------------------------------------------------- */

/* One part of a slice, or NULL where it is left out. */
static qv_status parse_slice_part(parser *p, qv_jnode *slice, qv_jnode **out)
{
    *out = NULL;
    if (is(p, QV_JT_COLON) || is(p, QV_JT_RBRACKET) || is(p, QV_JT_COMMA))
        return QV_OK;
    QV_TRY(parse_expression(p, out));
    return below(p, slice, *out);
}

/* What is in brackets behind an object. */
static qv_status parse_subscript(parser *p, qv_jnode *object, qv_jnode **out)
{
    uint32_t line = current(p)->line;
    qv_jnode *start = NULL, *slice;
    skip(p);
    if (!is(p, QV_JT_COLON))
        QV_TRY(parse_tuple(p, parse_expression, NULL, false, &start));
    if (!skip_if(p, QV_JT_COLON)) {
        QV_TRY(new_node(p, QV_JN_ITEM, line, out));
        (*out)->item.object = object;
        (*out)->item.key = start;
        QV_TRY(below(p, *out, object));
        QV_TRY(below(p, *out, start));
        return expect(p, QV_JT_RBRACKET);
    }
    QV_TRY(new_node(p, QV_JN_SLICE, line, &slice));
    slice->slice.object = object;
    slice->slice.start = start;
    QV_TRY(below(p, slice, object));
    QV_TRY(below(p, slice, start));
    QV_TRY(parse_slice_part(p, slice, &slice->slice.stop));
    if (skip_if(p, QV_JT_COLON))
        QV_TRY(parse_slice_part(p, slice, &slice->slice.step));
    *out = slice;
    return expect(p, QV_JT_RBRACKET);
}

/* What is behind a dot: a name, or a number, which is an index. */
static qv_status parse_attribute(parser *p, qv_jnode *object, qv_jnode **out)
{
    uint32_t line = current(p)->line;
    skip(p);
    if (is(p, QV_JT_INTEGER)) {
        QV_TRY(new_node(p, QV_JN_ITEM, line, out));
        (*out)->item.object = object;
        QV_TRY(parse_const(p, qv_j_int(current(p)->integer), &(*out)->item.key));
        QV_TRY(below(p, *out, (*out)->item.key));
    } else {
        QV_TRY(new_node(p, QV_JN_ATTRIBUTE, line, out));
        (*out)->attribute.object = object;
        QV_TRY(expect_name(p, &(*out)->attribute.name));
    }
    return below(p, *out, object);
}

static qv_status parse_named_argument(parser *p, qv_jnode *call, qv_jnode_args *args)
{
    qv_arena *arena = &p->program->arena;
    if ((args->n_named & (args->n_named - 1)) == 0) {
        size_t capacity = args->n_named ? 2 * args->n_named : 1;
        qv_jstr *names = QV_ARENA_ARRAY(arena, qv_jstr, capacity);
        qv_jnode **named = QV_ARENA_ARRAY(arena, qv_jnode *, capacity);
        if (!names || !named)
            return no_memory(p);
        if (args->n_named > 0) {
            memcpy(names, args->names, args->n_named * sizeof *names);
            memcpy(named, args->named, args->n_named * sizeof *named);
        }
        args->names = names;
        args->named = named;
    }
    qv_jstr name = current(p)->text;
    for (size_t i = 0; i < args->n_named; i++) {
        if (qv_j_str_equal(args->names[i], name))
            return fail_at(p, current(p)->line, QV_ERR_FORMAT, "argument '%.*s' is given twice",
                           QV_JSTR_ARG(name));
    }
    skip(p);
    skip(p);
    args->names[args->n_named] = name;
    QV_TRY(parse_expression(p, &args->named[args->n_named]));
    return below(p, call, args->named[args->n_named++]);
}

/* Arguments in parentheses, of the call `call`. */
static qv_status parse_arguments(parser *p, qv_jnode *call, qv_jnode_args *args)
{
    uint32_t line = current(p)->line;
    QV_TRY(expect(p, QV_JT_LPAREN));
    bool first = true;
    while (!is(p, QV_JT_RPAREN)) {
        if (!first)
            QV_TRY(expect(p, QV_JT_COMMA));
        if (is(p, QV_JT_RPAREN))
            break;
        first = false;
        if (is(p, QV_JT_MUL) || is(p, QV_JT_POW))
            return fail_at(p, line, QV_ERR_UNSUPPORTED, "argument lists ('%s') are not supported",
                           qv_j_token_name(current(p)->type));
        if (is(p, QV_JT_NAME) && look_ahead(p)->type == QV_JT_ASSIGN) {
            QV_TRY(parse_named_argument(p, call, args));
            continue;
        }
        if (args->n_named > 0)
            return fail_at(p, line, QV_ERR_FORMAT, "invalid syntax for function call expression");
        qv_jnode *value;
        QV_TRY(parse_expression(p, &value));
        QV_TRY(append(p, &args->values, value));
        QV_TRY(below(p, call, value));
    }
    return expect(p, QV_JT_RPAREN);
}

static qv_status parse_call(parser *p, qv_jnode *callee, qv_jnode **out)
{
    qv_jnode *node;
    QV_TRY(new_node(p, QV_JN_CALL, current(p)->line, &node));
    node->call.callee = callee;
    QV_TRY(below(p, node, callee));
    QV_TRY(parse_arguments(p, node, &node->call.args));
    if (callee->kind == QV_JN_NAME)
        QV_TRY(append(p, &p->called, callee));
    if (callee->kind == QV_JN_ATTRIBUTE && !qv_j_is_method(callee->attribute.name))
        return fail_at(p, callee->line, QV_ERR_UNSUPPORTED, "method '%.*s' is not supported",
                       QV_JSTR_ARG(callee->attribute.name));
    *out = node;
    return QV_OK;
}

static qv_status parse_postfix(parser *p, qv_jnode **node)
{
    for (;;) {
        if (is(p, QV_JT_DOT))
            QV_TRY(parse_attribute(p, *node, node));
        else if (is(p, QV_JT_LBRACKET))
            QV_TRY(parse_subscript(p, *node, node));
        else if (is(p, QV_JT_LPAREN))
            QV_TRY(parse_call(p, *node, node));
        else
            return QV_OK;
    }
}

/* ---- Filters and tests ----------------------------------------------------------------------- */

/* Check the arguments of a filter or test as far as they show. */
static qv_status check_call(parser *p, const char *kind, const qv_jnode *node)
{
    const qv_jnode_args *args = &node->apply.args;
    qv_status status =
        qv_j_check_args(kind, node->apply.callable, args->values.n, args->names, args->n_named);
    if (status != QV_OK)
        return qv_fail_prefix(QV_ERR_UNSUPPORTED, "%s, line %u", p->program->name, node->line);
    return QV_OK;
}

/* A name of a filter or test, which may have dots. */
static qv_status parse_dotted(parser *p, qv_jstr *name)
{
    QV_TRY(expect_name(p, name));
    while (skip_if(p, QV_JT_DOT)) {
        qv_jstr part;
        QV_TRY(expect_name(p, &part));
        name->len = (size_t)(part.data + part.len - name->data);
    }
    return QV_OK;
}

/* A filter behind its `|`, applied to `input`. */
static qv_status parse_filter(parser *p, qv_jnode *input, qv_jnode **out)
{
    qv_jnode *node;
    qv_jstr name;
    QV_TRY(new_node(p, QV_JN_FILTER, current(p)->line, &node));
    QV_TRY(parse_dotted(p, &name));
    node->apply.input = input;
    node->apply.callable = qv_j_find_filter(name);
    QV_TRY(below(p, node, input));
    if (!node->apply.callable)
        return fail_at(p, node->line, QV_ERR_UNSUPPORTED, "filter '%.*s' is not supported",
                       QV_JSTR_ARG(name));
    if (is(p, QV_JT_LPAREN))
        QV_TRY(parse_arguments(p, node, &node->apply.args));
    *out = node;
    return check_call(p, "filter", node);
}

/* Filters in a row: `a | b | c`. */
static qv_status parse_filter_chain(parser *p, qv_jnode *input, qv_jnode **out)
{
    *out = input;
    while (skip_if(p, QV_JT_PIPE))
        QV_TRY(parse_filter(p, *out, out));
    return QV_OK;
}

/* Whether the token can begin the argument that a test takes without parentheses. */
static bool begins_argument(const qv_jtoken *token)
{
    switch (token->type) {
    case QV_JT_NAME:
        return !is_word(token, "else") && !is_word(token, "or") && !is_word(token, "and");
    case QV_JT_STRING:
    case QV_JT_INTEGER:
    case QV_JT_FLOAT:
    case QV_JT_LBRACKET:
    case QV_JT_LBRACE:
        return true;
    default:
        return false;
    }
}

/* A test behind its `is`. */
static qv_status parse_test(parser *p, qv_jnode *input, qv_jnode **out)
{
    qv_jnode *node;
    qv_jstr name;
    uint32_t line = current(p)->line;
    bool negated = skip_word(p, "not");
    QV_TRY(new_node(p, QV_JN_TEST, line, &node));
    QV_TRY(parse_dotted(p, &name));
    node->apply.input = input;
    node->apply.callable = qv_j_find_test(name);
    QV_TRY(below(p, node, input));
    if (!node->apply.callable)
        return fail_at(p, line, QV_ERR_UNSUPPORTED, "test '%.*s' is not supported",
                       QV_JSTR_ARG(name));
    if (is(p, QV_JT_LPAREN)) {
        QV_TRY(parse_arguments(p, node, &node->apply.args));
    } else if (begins_argument(current(p))) {
        if (is_word(current(p), "is"))
            return fail_at(p, line, QV_ERR_FORMAT, "tests cannot be chained with 'is'");
        qv_jnode *value;
        QV_TRY(parse_primary(p, &value));
        QV_TRY(parse_postfix(p, &value));
        QV_TRY(append(p, &node->apply.args.values, value));
        QV_TRY(below(p, node, value));
    }
    QV_TRY(check_call(p, "test", node));
    *out = node;
    if (negated) {
        QV_TRY(new_node(p, QV_JN_NOT, line, out));
        (*out)->operand = node;
        QV_TRY(below(p, *out, node));
    }
    return QV_OK;
}

/* Filters, tests and calls behind an operand. */
static qv_status parse_applied(parser *p, qv_jnode **node)
{
    for (;;) {
        if (skip_if(p, QV_JT_PIPE))
            QV_TRY(parse_filter(p, *node, node));
        else if (skip_word(p, "is"))
            QV_TRY(parse_test(p, *node, node));
        else if (is(p, QV_JT_LPAREN))
            QV_TRY(parse_call(p, *node, node));
        else
            return QV_OK;
    }
}

/* ---- Operators, by precedence ---------------------------------------------------------------- */

static qv_status parse_signed(parser *p, qv_jnode_kind kind, qv_jnode **out)
{
    QV_TRY(enter(p));
    QV_TRY(new_node(p, kind, current(p)->line, out));
    skip(p);
    QV_TRY(parse_unary(p, false, &(*out)->operand));
    leave(p);
    return below(p, *out, (*out)->operand);
}

static qv_status parse_unary(parser *p, bool with_filters, qv_jnode **out)
{
    if (is(p, QV_JT_SUB))
        QV_TRY(parse_signed(p, QV_JN_NEGATE, out));
    else if (is(p, QV_JT_ADD))
        QV_TRY(parse_signed(p, QV_JN_PLUS, out));
    else
        QV_TRY(parse_primary(p, out));
    QV_TRY(parse_postfix(p, out));
    return with_filters ? parse_applied(p, out) : QV_OK;
}

static qv_status parse_operand(parser *p, qv_jnode **out)
{
    return parse_unary(p, true, out);
}

static qv_status new_binary(parser *p, qv_jnode_kind kind, int op, uint32_t line, qv_jnode *left,
                            qv_jnode *right, qv_jnode **out)
{
    QV_TRY(new_node(p, kind, line, out));
    (*out)->binary.op = op;
    (*out)->binary.left = left;
    (*out)->binary.right = right;
    QV_TRY(below(p, *out, left));
    return below(p, *out, right);
}

/* Operands joined from the left by operators first..last of the token types. */
static qv_status parse_joined(parser *p, qv_jtoken_type first, qv_jtoken_type last,
                              parse_fn *parse_one, qv_jnode **out)
{
    QV_TRY(parse_one(p, out));
    while (current(p)->type >= first && current(p)->type <= last) {
        const qv_jtoken *op = current(p);
        qv_jnode *right;
        skip(p);
        QV_TRY(parse_one(p, &right));
        QV_TRY(new_binary(p, QV_JN_BINARY, op->type, op->line, *out, right, out));
    }
    return QV_OK;
}

static qv_status parse_power(parser *p, qv_jnode **out)
{
    return parse_joined(p, QV_JT_POW, QV_JT_POW, parse_operand, out);
}

static qv_status parse_product(parser *p, qv_jnode **out)
{
    return parse_joined(p, QV_JT_MUL, QV_JT_MOD, parse_power, out);
}

static qv_status parse_concat(parser *p, qv_jnode **out)
{
    qv_jnode *item;
    uint32_t line = current(p)->line;
    QV_TRY(parse_product(p, &item));
    *out = item;
    if (!is(p, QV_JT_TILDE))
        return QV_OK;
    QV_TRY(new_node(p, QV_JN_CONCAT, line, out));
    QV_TRY(append(p, &(*out)->items, item));
    while (skip_if(p, QV_JT_TILDE)) {
        QV_TRY(parse_product(p, &item));
        QV_TRY(append(p, &(*out)->items, item));
    }
    return all_below(p, *out, (*out)->items);
}

static qv_status parse_sum(parser *p, qv_jnode **out)
{
    return parse_joined(p, QV_JT_ADD, QV_JT_SUB, parse_concat, out);
}

/* The comparison at the current token, skipped; 0 if there is none. */
static int skip_comparison(parser *p)
{
    int op = (int)current(p)->type;
    if (op >= QV_JT_EQ && op <= QV_JT_GE) {
        skip(p);
        return op;
    }
    if (skip_word(p, "in"))
        return QV_JT_IN;
    if (is_word(current(p), "not") && is_word(look_ahead(p), "in")) {
        skip(p);
        skip(p);
        return QV_JT_NOT_IN;
    }
    return 0;
}

static qv_status parse_comparison(parser *p, qv_jnode **out)
{
    QV_TRY(parse_sum(p, out));
    uint32_t line = current(p)->line;
    qv_jnode *node = NULL;
    for (int op; (op = skip_comparison(p)) != 0;) {
        if (!node) {
            QV_TRY(new_node(p, QV_JN_COMPARE, line, &node));
            node->compare.left = *out;
            QV_TRY(below(p, node, *out));
            *out = node;
        }
        size_t n = node->compare.n;
        if ((n & (n - 1)) == 0) {
            qv_joperand *grown = QV_ARENA_ARRAY(&p->program->arena, qv_joperand, n ? 2 * n : 1);
            if (!grown)
                return no_memory(p);
            if (n > 0)
                memcpy(grown, node->compare.operands, n * sizeof *grown);
            node->compare.operands = grown;
        }
        qv_joperand *operand = &node->compare.operands[node->compare.n++];
        operand->op = op;
        QV_TRY(parse_sum(p, &operand->right));
        QV_TRY(below(p, node, operand->right));
    }
    return QV_OK;
}

static qv_status parse_not(parser *p, qv_jnode **out)
{
    if (!is_word(current(p), "not"))
        return parse_comparison(p, out);
    QV_TRY(enter(p));
    QV_TRY(new_node(p, QV_JN_NOT, current(p)->line, out));
    skip(p);
    QV_TRY(parse_not(p, &(*out)->operand));
    leave(p);
    return below(p, *out, (*out)->operand);
}

static qv_status parse_and(parser *p, qv_jnode **out)
{
    QV_TRY(parse_not(p, out));
    for (uint32_t line = current(p)->line; skip_word(p, "and"); line = current(p)->line) {
        qv_jnode *right;
        QV_TRY(parse_not(p, &right));
        QV_TRY(new_binary(p, QV_JN_AND, 0, line, *out, right, out));
    }
    return QV_OK;
}

static qv_status parse_or(parser *p, qv_jnode **out)
{
    QV_TRY(enter(p));
    QV_TRY(parse_and(p, out));
    for (uint32_t line = current(p)->line; skip_word(p, "or"); line = current(p)->line) {
        qv_jnode *right;
        QV_TRY(parse_and(p, &right));
        QV_TRY(new_binary(p, QV_JN_OR, 0, line, *out, right, out));
    }
    leave(p);
    return QV_OK;
}

/* `a if b else c`; without else it is undefined where b does not hold. */
static qv_status parse_expression(parser *p, qv_jnode **out)
{
    QV_TRY(enter(p));
    uint32_t line = current(p)->line;
    QV_TRY(parse_or(p, out));
    while (skip_word(p, "if")) {
        qv_jnode *node;
        QV_TRY(new_node(p, QV_JN_CONDITION, line, &node));
        node->condition.then = *out;
        QV_TRY(parse_or(p, &node->condition.test));
        if (skip_word(p, "else"))
            QV_TRY(parse_expression(p, &node->condition.otherwise));
        QV_TRY(below(p, node, node->condition.then));
        QV_TRY(below(p, node, node->condition.test));
        QV_TRY(below(p, node, node->condition.otherwise));
        *out = node;
    }
    leave(p);
    return QV_OK;
}

/* ---- Targets of assignment ------------------------------------------------------------------- */

/* A name, a name with an attribute where allowed, or such in parentheses. */
static qv_status parse_one_target(parser *p, bool with_attribute, qv_jnode **out);

static qv_status parse_plain_target(parser *p, qv_jnode **out)
{
    return parse_one_target(p, false, out);
}

static qv_status parse_attribute_target(parser *p, qv_jnode **out)
{
    return parse_one_target(p, true, out);
}

static qv_status parse_one_target(parser *p, bool with_attribute, qv_jnode **out)
{
    uint32_t line = current(p)->line;
    if (skip_if(p, QV_JT_LPAREN)) {
        QV_TRY(enter(p));
        QV_TRY(parse_tuple(p, with_attribute ? parse_attribute_target : parse_plain_target, NULL,
                           false, out));
        leave(p);
        return expect(p, QV_JT_RPAREN);
    }
    static const char *const reserved[] = {"true", "false", "none", "True", "False", "None"};
    for (size_t i = 0; i < sizeof reserved / sizeof reserved[0]; i++) {
        if (is_word(current(p), reserved[i]))
            return fail_at(p, line, QV_ERR_FORMAT, "can't assign to '%s'", reserved[i]);
    }
    qv_jstr name;
    QV_TRY(expect_name(p, &name));
    if (with_attribute && skip_if(p, QV_JT_DOT)) {
        QV_TRY(new_node(p, QV_JN_NAMESPACE_ATTRIBUTE, line, out));
        QV_TRY(intern(p, name, &(*out)->ns.name));
        return expect_name(p, &(*out)->ns.attribute);
    }
    QV_TRY(new_node(p, QV_JN_NAME, line, out));
    return intern_bound(p, name, &(*out)->name);
}

/* ---- Statements ------------------------------------------------------------------------------ */

static qv_status parse_body(parser *p, const char *const *end_words, qv_jnodes *body);

/* A body up to its end tag, whose word is skipped. */
static qv_status parse_body_to(parser *p, const char *end_word, qv_jnodes *body)
{
    const char *const end_words[] = {end_word, NULL};
    QV_TRY(parse_body(p, end_words, body));
    return expect_word(p, end_word);
}

/* A body whose text is captured: `break` does not leave it. */
static qv_status parse_captured_body(parser *p, const char *end_word, qv_jnodes *body)
{
    unsigned loops = p->loops;
    p->loops = 0;
    QV_TRY(parse_body_to(p, end_word, body));
    p->loops = loops;
    return QV_OK;
}

static qv_status parse_condition_tuple(parser *p, qv_jnode **out)
{
    return parse_tuple(p, parse_or, NULL, false, out);
}

static qv_status parse_if(parser *p, qv_jnode *node)
{
    static const char *const end_words[] = {"elif", "else", "endif", NULL};
    bool at_else = false;
    do {
        size_t n = node->choice.n;
        if ((n & (n - 1)) == 0) {
            qv_jbranch *grown = QV_ARENA_ARRAY(&p->program->arena, qv_jbranch, n ? 2 * n : 1);
            if (!grown)
                return no_memory(p);
            if (n > 0)
                memcpy(grown, node->choice.branches, n * sizeof *grown);
            node->choice.branches = grown;
        }
        qv_jbranch *branch = &node->choice.branches[node->choice.n++];
        if (!at_else)
            QV_TRY(parse_condition_tuple(p, &branch->test));
        QV_TRY(below(p, node, branch->test));
        QV_TRY(parse_body(p, at_else ? end_words + 2 : end_words, &branch->body));
        QV_TRY(all_below(p, node, branch->body));
        at_else = is_word(current(p), "else");
        if (skip_word(p, "endif"))
            return QV_OK;
        skip(p);
    } while (true);
}

static qv_status parse_for(parser *p, qv_jnode *node)
{
    static const char *const end_words[] = {"else", "endfor", NULL};
    QV_TRY(parse_tuple(p, parse_plain_target, "in", false, &node->loop.target));
    QV_TRY(expect_word(p, "in"));
    QV_TRY(parse_tuple(p, parse_or, "recursive", false, &node->loop.iterable));
    if (skip_word(p, "if"))
        QV_TRY(parse_expression(p, &node->loop.test));
    if (is_word(current(p), "recursive"))
        return fail_at(p, current(p)->line, QV_ERR_UNSUPPORTED,
                       "recursive loops are not supported");
    size_t n_macros = p->n_macros;
    p->loops++;
    QV_TRY(parse_body(p, end_words, &node->loop.body));
    p->loops--;
    node->loop.has_macros = p->n_macros > n_macros;
    if (skip_word(p, "else"))
        QV_TRY(parse_body_to(p, "endfor", &node->loop.otherwise));
    else
        skip(p);
    QV_TRY(below(p, node, node->loop.target));
    QV_TRY(below(p, node, node->loop.iterable));
    QV_TRY(below(p, node, node->loop.test));
    QV_TRY(all_below(p, node, node->loop.body));
    return all_below(p, node, node->loop.otherwise);
}

/* `set a = b`, or `set a | filters` with a body. */
static qv_status parse_set(parser *p, qv_jnode *node)
{
    QV_TRY(parse_tuple(p, parse_attribute_target, NULL, false, &node->set.target));
    QV_TRY(below(p, node, node->set.target));
    if (skip_if(p, QV_JT_ASSIGN)) {
        QV_TRY(parse_tuple(p, parse_expression, NULL, false, &node->set.value));
        return below(p, node, node->set.value);
    }
    node->kind = QV_JN_SET_BLOCK;
    QV_TRY(parse_filter_chain(p, NULL, &node->set.value));
    QV_TRY(below(p, node, node->set.value));
    QV_TRY(parse_captured_body(p, "endset", &node->set.body));
    return all_below(p, node, node->set.body);
}

/* The parameters of a macro or of a call block, in parentheses. */
static qv_status parse_params(parser *p, qv_jnode *node)
{
    QV_TRY(expect(p, QV_JT_LPAREN));
    bool fallbacks = false;
    while (!is(p, QV_JT_RPAREN)) {
        size_t n = node->macro.n;
        if (n > 0)
            QV_TRY(expect(p, QV_JT_COMMA));
        if ((n & (n - 1)) == 0) {
            qv_jparam *grown = QV_ARENA_ARRAY(&p->program->arena, qv_jparam, n ? 2 * n : 1);
            if (!grown)
                return no_memory(p);
            if (n > 0)
                memcpy(grown, node->macro.params, n * sizeof *grown);
            node->macro.params = grown;
        }
        qv_jparam *param = &node->macro.params[n];
        qv_jnode *target;
        uint32_t line = current(p)->line;
        if (is(p, QV_JT_LPAREN))
            return expect(p, QV_JT_NAME);
        QV_TRY(parse_plain_target(p, &target));
        param->name = target->name;
        if (skip_if(p, QV_JT_ASSIGN)) {
            QV_TRY(parse_expression(p, &param->fallback));
            QV_TRY(below(p, node, param->fallback));
            fallbacks = true;
        } else if (fallbacks) {
            return fail_at(p, line, QV_ERR_FORMAT, "non-default argument follows default argument");
        }
        node->macro.n++;
    }
    return expect(p, QV_JT_RPAREN);
}

/* The parameters and body of a macro or call block: a function of its own. */
static qv_status parse_function(parser *p, qv_jnode *node, bool with_params, const char *end_word)
{
    qv_jnode *outer = p->macro;
    p->n_macros++;
    p->macro = node;
    if (with_params)
        QV_TRY(parse_params(p, node));
    if (node->kind == QV_JN_CALL_BLOCK) {
        /* What is called is evaluated outside of the function. */
        p->macro = outer;
        QV_TRY(parse_expression(p, &node->macro.call));
        if (node->macro.call->kind != QV_JN_CALL)
            return fail_at(p, node->line, QV_ERR_FORMAT, "expected a call");
        QV_TRY(below(p, node, node->macro.call));
        p->macro = node;
    }
    QV_TRY(parse_captured_body(p, end_word, &node->macro.body));
    p->macro = outer;
    return all_below(p, node, node->macro.body);
}

static qv_status parse_macro(parser *p, qv_jnode *node)
{
    qv_jnode *target;
    if (!is(p, QV_JT_NAME))
        return expect(p, QV_JT_NAME);
    QV_TRY(parse_plain_target(p, &target));
    node->macro.name = target->name;
    return parse_function(p, node, true, "endmacro");
}

static qv_status parse_call_block(parser *p, qv_jnode *node)
{
    node->macro.name = p->program->caller_name;
    return parse_function(p, node, is(p, QV_JT_LPAREN), "endcall");
}

static qv_status parse_filter_block(parser *p, qv_jnode *node)
{
    QV_TRY(parse_filter(p, NULL, &node->block.filter));
    QV_TRY(parse_filter_chain(p, node->block.filter, &node->block.filter));
    QV_TRY(below(p, node, node->block.filter));
    QV_TRY(parse_captured_body(p, "endfilter", &node->block.body));
    return all_below(p, node, node->block.body);
}

static qv_status parse_with(parser *p, qv_jnode *node)
{
    qv_jnodes targets = {0}, values = {0};
    while (!is(p, QV_JT_BLOCK_END)) {
        qv_jnode *target, *value;
        if (targets.n > 0)
            QV_TRY(expect(p, QV_JT_COMMA));
        QV_TRY(parse_plain_target(p, &target));
        QV_TRY(expect(p, QV_JT_ASSIGN));
        QV_TRY(parse_expression(p, &value));
        QV_TRY(append(p, &targets, target));
        QV_TRY(append(p, &values, value));
    }
    node->block.targets = targets.nodes;
    node->block.values = values.nodes;
    node->block.n = targets.n;
    QV_TRY(all_below(p, node, values));
    QV_TRY(parse_body_to(p, "endwith", &node->block.body));
    return all_below(p, node, node->block.body);
}

/* What an assistant says, marked for training: the text passes through. */
static qv_status parse_generation(parser *p, qv_jnode *node)
{
    QV_TRY(parse_captured_body(p, "endgeneration", &node->block.body));
    return all_below(p, node, node->block.body);
}

static qv_status parse_loop_control(parser *p, qv_jnode *node)
{
    if (p->loops > 0)
        return QV_OK;
    return fail_at(p, node->line, QV_ERR_FORMAT, "'%s' outside of a loop",
                   node->kind == QV_JN_BREAK ? "break" : "continue");
}

/* `print a, b` is `{{ a }}{{ b }}`. */
static qv_status parse_print(parser *p, qv_jnode *node)
{
    qv_jnode *item;
    while (!is(p, QV_JT_BLOCK_END)) {
        if (node->block.body.n > 0)
            QV_TRY(expect(p, QV_JT_COMMA));
        QV_TRY(new_node(p, QV_JN_PRINT, current(p)->line, &item));
        QV_TRY(parse_expression(p, &item->operand));
        QV_TRY(below(p, item, item->operand));
        QV_TRY(append(p, &node->block.body, item));
    }
    return all_below(p, node, node->block.body);
}

static const struct {
    const char *word;
    qv_jnode_kind kind;
    qv_status (*parse)(parser *p, qv_jnode *node);
} statements[] = {
    {"if", QV_JN_IF, parse_if},
    {"for", QV_JN_FOR, parse_for},
    {"set", QV_JN_SET, parse_set},
    {"macro", QV_JN_MACRO, parse_macro},
    {"call", QV_JN_CALL_BLOCK, parse_call_block},
    {"filter", QV_JN_FILTER_BLOCK, parse_filter_block},
    {"with", QV_JN_WITH, parse_with},
    {"generation", QV_JN_SCOPE, parse_generation},
    {"print", QV_JN_SCOPE, parse_print},
    {"break", QV_JN_BREAK, parse_loop_control},
    {"continue", QV_JN_CONTINUE, parse_loop_control},
};

/* Tags of jinja2 that make no sense in, or are not provided to, a chat template. */
static const char *const unsupported_tags[] = {"block",     "extends",    "include", "import",
                                               "from",      "autoescape", "do",      "trans",
                                               "pluralize", "debug"};

/* "elif", "else" or "endif" */
static void list_words(const char *const *words, char *out, size_t size)
{
    size_t n = 0;
    out[0] = '\0';
    for (size_t i = 0; words && words[i] && n < size; i++) {
        const char *joint = i == 0 ? "" : words[i + 1] ? ", " : " or ";
        n += (size_t)snprintf(out + n, size - n, "%s'%s'", joint, words[i]);
    }
}

static qv_status parse_statement(parser *p, const char *const *end_words, qv_jnode **out)
{
    const qv_jtoken *token = current(p);
    if (token->type != QV_JT_NAME)
        return fail_at(p, token->line, QV_ERR_FORMAT, "tag name expected");
    for (size_t i = 0; i < sizeof statements / sizeof statements[0]; i++) {
        if (!is_word(token, statements[i].word))
            continue;
        QV_TRY(enter(p));
        QV_TRY(new_node(p, statements[i].kind, token->line, out));
        skip(p);
        QV_TRY(statements[i].parse(p, *out));
        leave(p);
        return QV_OK;
    }
    for (size_t i = 0; i < sizeof unsupported_tags / sizeof unsupported_tags[0]; i++) {
        if (is_word(token, unsupported_tags[i]))
            return fail_at(p, token->line, QV_ERR_UNSUPPORTED, "tag '%s' is not supported",
                           unsupported_tags[i]);
    }
    char expected[128];
    list_words(end_words, expected, sizeof expected);
    return fail_at(p, token->line, QV_ERR_FORMAT, "unknown tag '%.*s'%s%s",
                   QV_JSTR_ARG(token->text), end_words ? ", looking for " : "", expected);
}

static bool at_end_word(const parser *p, const char *const *end_words)
{
    for (; end_words && *end_words; end_words++) {
        if (is_word(current(p), *end_words))
            return true;
    }
    return false;
}

/* Statements, prints and data up to one of the end words, which becomes the current token; or, with
 * NULL, up to the end of the template. */
static qv_status parse_parts(parser *p, const char *const *end_words, qv_jnodes *body)
{
    for (;;) {
        const qv_jtoken *token = current(p);
        qv_jnode *node = NULL;
        switch (token->type) {
        case QV_JT_DATA:
            QV_TRY(new_node(p, QV_JN_DATA, token->line, &node));
            node->data = token->text;
            skip(p);
            break;
        case QV_JT_VARIABLE_BEGIN:
            skip(p);
            QV_TRY(new_node(p, QV_JN_PRINT, token->line, &node));
            QV_TRY(parse_tuple(p, parse_expression, NULL, false, &node->operand));
            QV_TRY(below(p, node, node->operand));
            QV_TRY(expect(p, QV_JT_VARIABLE_END));
            break;
        case QV_JT_BLOCK_BEGIN:
            skip(p);
            if (at_end_word(p, end_words))
                return QV_OK;
            QV_TRY(parse_statement(p, end_words, &node));
            QV_TRY(expect(p, QV_JT_BLOCK_END));
            break;
        default: {
            if (!end_words)
                return QV_OK;
            char expected[128];
            list_words(end_words, expected, sizeof expected);
            return fail_at(p, token->line, QV_ERR_FORMAT,
                           "unexpected end of template, looking for %s", expected);
        }
        }
        QV_TRY(append(p, body, node));
    }
}

/* The body of a tag: behind the end of the tag (a colon before it is allowed, as in Python). */
static qv_status parse_body(parser *p, const char *const *end_words, qv_jnodes *body)
{
    skip_if(p, QV_JT_COLON);
    QV_TRY(expect(p, QV_JT_BLOCK_END));
    return parse_parts(p, end_words, body);
}

/* ---- The whole template ---------------------------------------------------------------------- */

/* A name can only be called if the template binds it or it is a function of ours: what comes in as
 * variables is data. */
static qv_status check_called(const parser *p)
{
    const qv_jprogram *program = p->program;
    for (size_t i = 0; i < p->called.n; i++) {
        const qv_jnode *node = p->called.nodes[i];
        qv_jstr name = program->names[node->name];
        if (node->name == program->loop_name)
            return fail_at(p, node->line, QV_ERR_UNSUPPORTED, "recursive loops are not supported");
        if (!p->bound[node->name] && node->name != program->caller_name &&
            !qv_j_find_function(name))
            return fail_at(p, node->line, QV_ERR_UNSUPPORTED, "function '%.*s' is not supported",
                           QV_JSTR_ARG(name));
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
    parser p = {.program = program};
    QV_TRY(qv_j_tokenize(&program->arena, program->name, program->text, &p.tokens));
    QV_TRY(intern(&p, QV_JSTR("loop"), &program->loop_name));
    QV_TRY(intern(&p, QV_JSTR("caller"), &program->caller_name));
    QV_TRY(intern(&p, QV_JSTR("varargs"), &program->varargs_name));
    QV_TRY(intern(&p, QV_JSTR("kwargs"), &program->kwargs_name));
    QV_TRY(parse_parts(&p, NULL, &program->body));
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
