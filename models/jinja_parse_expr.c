/* Expressions of templates, precedence by precedence, and targets of assignment. */
#include "models/jinja_parser.h"

#include <string.h>

/* ---- Expressions ----------------------------------------------------------------------------- */

static qv_status parse_unary(qv_jparser *p, bool with_filters, qv_jnode **out);

/* What ends a tuple written without parentheses. */
static bool at_tuple_end(const qv_jparser *p, const char *end_word)
{
    return qv_jp_is(p, QV_JT_VARIABLE_END) || qv_jp_is(p, QV_JT_BLOCK_END) ||
           qv_jp_is(p, QV_JT_RPAREN) || (end_word && qv_jp_is_word(qv_jp_current(p), end_word));
}

/* One expression, or several with commas: a tuple. `end_word` may follow a trailing comma. */
qv_status qv_jp_tuple(qv_jparser *p, qv_jparse_fn *parse_one, const char *end_word,
                      bool may_be_empty, qv_jnode **out)
{
    uint32_t line = qv_jp_current(p)->line;
    qv_jnodes items = {0};
    bool is_tuple = false;
    while (!at_tuple_end(p, end_word)) {
        qv_jnode *item;
        QV_TRY(parse_one(p, &item));
        QV_TRY(qv_jp_append(p, &items, item));
        if (!qv_jp_skip_if(p, QV_JT_COMMA))
            break;
        is_tuple = true;
    }
    if (!is_tuple && items.n == 1) {
        *out = items.nodes[0];
        return QV_OK;
    }
    if (items.n == 0 && !may_be_empty) {
        qv_jstr got = qv_jp_describe(qv_jp_current(p));
        return qv_jp_fail_at(p, line, QV_ERR_FORMAT, "expected an expression, got '%.*s'",
                             QV_JSTR_ARG(got));
    }
    QV_TRY(qv_jp_new_node(p, QV_JN_TUPLE, line, out));
    (*out)->items = items;
    return qv_jp_all_below(p, *out, items);
}

static qv_status parse_const(qv_jparser *p, qv_jvalue value, qv_jnode **out)
{
    QV_TRY(qv_jp_new_node(p, QV_JN_CONST, qv_jp_current(p)->line, out));
    (*out)->constant = value;
    qv_jp_skip(p);
    return QV_OK;
}

/* A variable, or one of the words for true, false and none. */
static qv_status parse_name(qv_jparser *p, qv_jnode **out)
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
        if (qv_jp_is_word(qv_jp_current(p), words[i].word))
            return parse_const(p, words[i].value, out);
    }
    QV_TRY(qv_jp_new_node(p, QV_JN_NAME, qv_jp_current(p)->line, out));
    QV_TRY(qv_jp_intern(p, qv_jp_current(p)->text, &(*out)->name));
    const qv_jprogram *program = p->program;
    uint32_t name = (*out)->name;
    if (p->macro) {
        p->macro->macro.uses_caller |= name == program->caller_name;
        p->macro->macro.uses_varargs |= name == program->varargs_name;
        p->macro->macro.uses_kwargs |= name == program->kwargs_name;
    }
    qv_jp_skip(p);
    return QV_OK;
}

/* Strings in a row are one string. */
static qv_status parse_string(qv_jparser *p, qv_jnode **out)
{
    qv_jstr text = qv_jp_current(p)->text;
    if (qv_jp_look_ahead(p)->type == QV_JT_STRING) {
        size_t len = 0, n = 0;
        for (size_t i = p->pos; p->tokens[i].type == QV_JT_STRING; i++)
            len += p->tokens[i].text.len;
        char *joined = qv_arena_alloc(&p->program->arena, len, 1);
        if (!joined)
            return qv_jp_no_memory(p);
        for (; qv_jp_look_ahead(p)->type == QV_JT_STRING; qv_jp_skip(p)) {
            memcpy(joined + n, qv_jp_current(p)->text.data, qv_jp_current(p)->text.len);
            n += qv_jp_current(p)->text.len;
        }
        memcpy(joined + n, qv_jp_current(p)->text.data, qv_jp_current(p)->text.len);
        text = (qv_jstr){joined, len};
    }
    return parse_const(p, qv_j_str(text.data, text.len), out);
}

static qv_status parse_list(qv_jparser *p, qv_jnode **out)
{
    QV_TRY(qv_jp_new_node(p, QV_JN_LIST, qv_jp_current(p)->line, out));
    qv_jp_skip(p);
    qv_jnodes items = {0};
    while (!qv_jp_is(p, QV_JT_RBRACKET)) {
        qv_jnode *item;
        if (items.n > 0)
            QV_TRY(qv_jp_expect(p, QV_JT_COMMA));
        if (qv_jp_is(p, QV_JT_RBRACKET))
            break;
        QV_TRY(qv_jp_expression(p, &item));
        QV_TRY(qv_jp_append(p, &items, item));
    }
    (*out)->items = items;
    QV_TRY(qv_jp_all_below(p, *out, items));
    return qv_jp_expect(p, QV_JT_RBRACKET);
}

static qv_status parse_dict(qv_jparser *p, qv_jnode **out)
{
    QV_TRY(qv_jp_new_node(p, QV_JN_DICT, qv_jp_current(p)->line, out));
    qv_jp_skip(p);
    qv_jnodes items = {0};
    while (!qv_jp_is(p, QV_JT_RBRACE)) {
        qv_jnode *key, *value;
        if (items.n > 0)
            QV_TRY(qv_jp_expect(p, QV_JT_COMMA));
        if (qv_jp_is(p, QV_JT_RBRACE))
            break;
        QV_TRY(qv_jp_expression(p, &key));
        QV_TRY(qv_jp_expect(p, QV_JT_COLON));
        QV_TRY(qv_jp_expression(p, &value));
        QV_TRY(qv_jp_append(p, &items, key));
        QV_TRY(qv_jp_append(p, &items, value));
    }
    (*out)->items = items;
    QV_TRY(qv_jp_all_below(p, *out, items));
    return qv_jp_expect(p, QV_JT_RBRACE);
}

static qv_status parse_primary(qv_jparser *p, qv_jnode **out)
{
    const qv_jtoken *token = qv_jp_current(p);
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
        qv_jp_skip(p);
        QV_TRY(qv_jp_tuple(p, qv_jp_expression, NULL, true, out));
        return qv_jp_expect(p, QV_JT_RPAREN);
    case QV_JT_LBRACKET:
        return parse_list(p, out);
    case QV_JT_LBRACE:
        return parse_dict(p, out);
    default: {
        qv_jstr got = qv_jp_describe(token);
        return qv_jp_fail_at(p, token->line, QV_ERR_FORMAT, "unexpected '%.*s'", QV_JSTR_ARG(got));
    }
    }
}

/* ---- Attributes, items, calls ---------------------------------------------------------------- */

/* One part of a slice, or NULL where it is left out. */
static qv_status parse_slice_part(qv_jparser *p, qv_jnode *slice, qv_jnode **out)
{
    *out = NULL;
    if (qv_jp_is(p, QV_JT_COLON) || qv_jp_is(p, QV_JT_RBRACKET) || qv_jp_is(p, QV_JT_COMMA))
        return QV_OK;
    QV_TRY(qv_jp_expression(p, out));
    return qv_jp_below(p, slice, *out);
}

/* What is in brackets behind an object. */
static qv_status parse_subscript(qv_jparser *p, qv_jnode *object, qv_jnode **out)
{
    uint32_t line = qv_jp_current(p)->line;
    qv_jnode *start = NULL, *slice;
    qv_jp_skip(p);
    if (!qv_jp_is(p, QV_JT_COLON))
        QV_TRY(qv_jp_tuple(p, qv_jp_expression, NULL, false, &start));
    if (!qv_jp_skip_if(p, QV_JT_COLON)) {
        QV_TRY(qv_jp_new_node(p, QV_JN_ITEM, line, out));
        (*out)->item.object = object;
        (*out)->item.key = start;
        QV_TRY(qv_jp_below(p, *out, object));
        QV_TRY(qv_jp_below(p, *out, start));
        return qv_jp_expect(p, QV_JT_RBRACKET);
    }
    QV_TRY(qv_jp_new_node(p, QV_JN_SLICE, line, &slice));
    slice->slice.object = object;
    slice->slice.start = start;
    QV_TRY(qv_jp_below(p, slice, object));
    QV_TRY(qv_jp_below(p, slice, start));
    QV_TRY(parse_slice_part(p, slice, &slice->slice.stop));
    if (qv_jp_skip_if(p, QV_JT_COLON))
        QV_TRY(parse_slice_part(p, slice, &slice->slice.step));
    *out = slice;
    return qv_jp_expect(p, QV_JT_RBRACKET);
}

/* What is behind a dot: a name, or a number, which is an index. */
static qv_status parse_attribute(qv_jparser *p, qv_jnode *object, qv_jnode **out)
{
    uint32_t line = qv_jp_current(p)->line;
    qv_jp_skip(p);
    if (qv_jp_is(p, QV_JT_INTEGER)) {
        QV_TRY(qv_jp_new_node(p, QV_JN_ITEM, line, out));
        (*out)->item.object = object;
        QV_TRY(parse_const(p, qv_j_int(qv_jp_current(p)->integer), &(*out)->item.key));
        QV_TRY(qv_jp_below(p, *out, (*out)->item.key));
    } else {
        QV_TRY(qv_jp_new_node(p, QV_JN_ATTRIBUTE, line, out));
        (*out)->attribute.object = object;
        QV_TRY(qv_jp_expect_name(p, &(*out)->attribute.name));
    }
    return qv_jp_below(p, *out, object);
}

static qv_status parse_named_argument(qv_jparser *p, qv_jnode *call, qv_jnode_args *args)
{
    qv_arena *arena = &p->program->arena;
    if ((args->n_named & (args->n_named - 1)) == 0) {
        size_t capacity = args->n_named ? 2 * args->n_named : 1;
        qv_jstr *names = QV_ARENA_ARRAY(arena, qv_jstr, capacity);
        qv_jnode **named = QV_ARENA_ARRAY(arena, qv_jnode *, capacity);
        if (!names || !named)
            return qv_jp_no_memory(p);
        if (args->n_named > 0) {
            memcpy(names, args->names, args->n_named * sizeof *names);
            memcpy(named, args->named, args->n_named * sizeof *named);
        }
        args->names = names;
        args->named = named;
    }
    qv_jstr name = qv_jp_current(p)->text;
    for (size_t i = 0; i < args->n_named; i++) {
        if (qv_j_str_equal(args->names[i], name))
            return qv_jp_fail_at(p, qv_jp_current(p)->line, QV_ERR_FORMAT,
                                 "argument '%.*s' is given twice", QV_JSTR_ARG(name));
    }
    qv_jp_skip(p);
    qv_jp_skip(p);
    args->names[args->n_named] = name;
    QV_TRY(qv_jp_expression(p, &args->named[args->n_named]));
    return qv_jp_below(p, call, args->named[args->n_named++]);
}

/* Arguments in parentheses, of the call `call`. */
static qv_status parse_arguments(qv_jparser *p, qv_jnode *call, qv_jnode_args *args)
{
    uint32_t line = qv_jp_current(p)->line;
    QV_TRY(qv_jp_expect(p, QV_JT_LPAREN));
    bool first = true;
    while (!qv_jp_is(p, QV_JT_RPAREN)) {
        if (!first)
            QV_TRY(qv_jp_expect(p, QV_JT_COMMA));
        if (qv_jp_is(p, QV_JT_RPAREN))
            break;
        first = false;
        if (qv_jp_is(p, QV_JT_MUL) || qv_jp_is(p, QV_JT_POW))
            return qv_jp_fail_at(p, line, QV_ERR_UNSUPPORTED,
                                 "argument lists ('%s') are not supported",
                                 qv_j_token_name(qv_jp_current(p)->type));
        if (qv_jp_is(p, QV_JT_NAME) && qv_jp_look_ahead(p)->type == QV_JT_ASSIGN) {
            QV_TRY(parse_named_argument(p, call, args));
            continue;
        }
        if (args->n_named > 0)
            return qv_jp_fail_at(p, line, QV_ERR_FORMAT,
                                 "invalid syntax for function call expression");
        qv_jnode *value;
        QV_TRY(qv_jp_expression(p, &value));
        QV_TRY(qv_jp_append(p, &args->values, value));
        QV_TRY(qv_jp_below(p, call, value));
    }
    return qv_jp_expect(p, QV_JT_RPAREN);
}

static qv_status parse_call(qv_jparser *p, qv_jnode *callee, qv_jnode **out)
{
    qv_jnode *node;
    QV_TRY(qv_jp_new_node(p, QV_JN_CALL, qv_jp_current(p)->line, &node));
    node->call.callee = callee;
    QV_TRY(qv_jp_below(p, node, callee));
    QV_TRY(parse_arguments(p, node, &node->call.args));
    if (callee->kind == QV_JN_NAME)
        QV_TRY(qv_jp_append(p, &p->called, callee));
    if (callee->kind == QV_JN_ATTRIBUTE && !qv_j_is_method(callee->attribute.name))
        return qv_jp_fail_at(p, callee->line, QV_ERR_UNSUPPORTED, "method '%.*s' is not supported",
                             QV_JSTR_ARG(callee->attribute.name));
    *out = node;
    return QV_OK;
}

static qv_status parse_postfix(qv_jparser *p, qv_jnode **node)
{
    for (;;) {
        if (qv_jp_is(p, QV_JT_DOT))
            QV_TRY(parse_attribute(p, *node, node));
        else if (qv_jp_is(p, QV_JT_LBRACKET))
            QV_TRY(parse_subscript(p, *node, node));
        else if (qv_jp_is(p, QV_JT_LPAREN))
            QV_TRY(parse_call(p, *node, node));
        else
            return QV_OK;
    }
}

/* ---- Filters and tests ----------------------------------------------------------------------- */

/* Check the arguments of a filter or test as far as they show. */
static qv_status check_call(qv_jparser *p, const char *kind, const qv_jnode *node)
{
    const qv_jnode_args *args = &node->apply.args;
    qv_status status =
        qv_j_check_args(kind, node->apply.callable, args->values.n, args->names, args->n_named);
    if (status != QV_OK)
        return qv_fail_prefix(QV_ERR_UNSUPPORTED, "%s, line %u", p->program->name, node->line);
    return QV_OK;
}

/* A name of a filter or test, which may have dots. */
static qv_status parse_dotted(qv_jparser *p, qv_jstr *name)
{
    QV_TRY(qv_jp_expect_name(p, name));
    while (qv_jp_skip_if(p, QV_JT_DOT)) {
        qv_jstr part;
        QV_TRY(qv_jp_expect_name(p, &part));
        name->len = (size_t)(part.data + part.len - name->data);
    }
    return QV_OK;
}

/* A filter behind its `|`, applied to `input`. */
qv_status qv_jp_filter(qv_jparser *p, qv_jnode *input, qv_jnode **out)
{
    qv_jnode *node;
    qv_jstr name;
    QV_TRY(qv_jp_new_node(p, QV_JN_FILTER, qv_jp_current(p)->line, &node));
    QV_TRY(parse_dotted(p, &name));
    node->apply.input = input;
    node->apply.callable = qv_j_find_filter(name);
    QV_TRY(qv_jp_below(p, node, input));
    if (!node->apply.callable)
        return qv_jp_fail_at(p, node->line, QV_ERR_UNSUPPORTED, "filter '%.*s' is not supported",
                             QV_JSTR_ARG(name));
    if (qv_jp_is(p, QV_JT_LPAREN))
        QV_TRY(parse_arguments(p, node, &node->apply.args));
    *out = node;
    return check_call(p, "filter", node);
}

/* Filters in a row: `a | b | c`. */
qv_status qv_jp_filter_chain(qv_jparser *p, qv_jnode *input, qv_jnode **out)
{
    *out = input;
    while (qv_jp_skip_if(p, QV_JT_PIPE))
        QV_TRY(qv_jp_filter(p, *out, out));
    return QV_OK;
}

/* Whether the token can begin the argument that a test takes without parentheses. */
static bool begins_argument(const qv_jtoken *token)
{
    switch (token->type) {
    case QV_JT_NAME:
        return !qv_jp_is_word(token, "else") && !qv_jp_is_word(token, "or") &&
               !qv_jp_is_word(token, "and");
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
static qv_status parse_test(qv_jparser *p, qv_jnode *input, qv_jnode **out)
{
    qv_jnode *node;
    qv_jstr name;
    uint32_t line = qv_jp_current(p)->line;
    bool negated = qv_jp_skip_word(p, "not");
    QV_TRY(qv_jp_new_node(p, QV_JN_TEST, line, &node));
    QV_TRY(parse_dotted(p, &name));
    node->apply.input = input;
    node->apply.callable = qv_j_find_test(name);
    QV_TRY(qv_jp_below(p, node, input));
    if (!node->apply.callable)
        return qv_jp_fail_at(p, line, QV_ERR_UNSUPPORTED, "test '%.*s' is not supported",
                             QV_JSTR_ARG(name));
    if (qv_jp_is(p, QV_JT_LPAREN)) {
        QV_TRY(parse_arguments(p, node, &node->apply.args));
    } else if (begins_argument(qv_jp_current(p))) {
        if (qv_jp_is_word(qv_jp_current(p), "is"))
            return qv_jp_fail_at(p, line, QV_ERR_FORMAT, "tests cannot be chained with 'is'");
        qv_jnode *value;
        QV_TRY(parse_primary(p, &value));
        QV_TRY(parse_postfix(p, &value));
        QV_TRY(qv_jp_append(p, &node->apply.args.values, value));
        QV_TRY(qv_jp_below(p, node, value));
    }
    QV_TRY(check_call(p, "test", node));
    *out = node;
    if (negated) {
        QV_TRY(qv_jp_new_node(p, QV_JN_NOT, line, out));
        (*out)->operand = node;
        QV_TRY(qv_jp_below(p, *out, node));
    }
    return QV_OK;
}

/* Filters, tests and calls behind an operand. */
static qv_status parse_applied(qv_jparser *p, qv_jnode **node)
{
    for (;;) {
        if (qv_jp_skip_if(p, QV_JT_PIPE))
            QV_TRY(qv_jp_filter(p, *node, node));
        else if (qv_jp_skip_word(p, "is"))
            QV_TRY(parse_test(p, *node, node));
        else if (qv_jp_is(p, QV_JT_LPAREN))
            QV_TRY(parse_call(p, *node, node));
        else
            return QV_OK;
    }
}

/* ---- Operators, by precedence ---------------------------------------------------------------- */

static qv_status parse_signed(qv_jparser *p, qv_jnode_kind kind, qv_jnode **out)
{
    QV_TRY(qv_jp_enter(p));
    QV_TRY(qv_jp_new_node(p, kind, qv_jp_current(p)->line, out));
    qv_jp_skip(p);
    QV_TRY(parse_unary(p, false, &(*out)->operand));
    qv_jp_leave(p);
    return qv_jp_below(p, *out, (*out)->operand);
}

static qv_status parse_unary(qv_jparser *p, bool with_filters, qv_jnode **out)
{
    if (qv_jp_is(p, QV_JT_SUB))
        QV_TRY(parse_signed(p, QV_JN_NEGATE, out));
    else if (qv_jp_is(p, QV_JT_ADD))
        QV_TRY(parse_signed(p, QV_JN_PLUS, out));
    else
        QV_TRY(parse_primary(p, out));
    QV_TRY(parse_postfix(p, out));
    return with_filters ? parse_applied(p, out) : QV_OK;
}

static qv_status parse_operand(qv_jparser *p, qv_jnode **out)
{
    return parse_unary(p, true, out);
}

static qv_status new_binary(qv_jparser *p, qv_jnode_kind kind, int op, uint32_t line,
                            qv_jnode *left, qv_jnode *right, qv_jnode **out)
{
    QV_TRY(qv_jp_new_node(p, kind, line, out));
    (*out)->binary.op = op;
    (*out)->binary.left = left;
    (*out)->binary.right = right;
    QV_TRY(qv_jp_below(p, *out, left));
    return qv_jp_below(p, *out, right);
}

/* Operands joined from the left by operators first..last of the token types. */
static qv_status parse_joined(qv_jparser *p, qv_jtoken_type first, qv_jtoken_type last,
                              qv_jparse_fn *parse_one, qv_jnode **out)
{
    QV_TRY(parse_one(p, out));
    while (qv_jp_current(p)->type >= first && qv_jp_current(p)->type <= last) {
        const qv_jtoken *op = qv_jp_current(p);
        qv_jnode *right;
        qv_jp_skip(p);
        QV_TRY(parse_one(p, &right));
        QV_TRY(new_binary(p, QV_JN_BINARY, op->type, op->line, *out, right, out));
    }
    return QV_OK;
}

static qv_status parse_power(qv_jparser *p, qv_jnode **out)
{
    return parse_joined(p, QV_JT_POW, QV_JT_POW, parse_operand, out);
}

static qv_status parse_product(qv_jparser *p, qv_jnode **out)
{
    return parse_joined(p, QV_JT_MUL, QV_JT_MOD, parse_power, out);
}

static qv_status parse_concat(qv_jparser *p, qv_jnode **out)
{
    qv_jnode *item;
    uint32_t line = qv_jp_current(p)->line;
    QV_TRY(parse_product(p, &item));
    *out = item;
    if (!qv_jp_is(p, QV_JT_TILDE))
        return QV_OK;
    QV_TRY(qv_jp_new_node(p, QV_JN_CONCAT, line, out));
    QV_TRY(qv_jp_append(p, &(*out)->items, item));
    while (qv_jp_skip_if(p, QV_JT_TILDE)) {
        QV_TRY(parse_product(p, &item));
        QV_TRY(qv_jp_append(p, &(*out)->items, item));
    }
    return qv_jp_all_below(p, *out, (*out)->items);
}

static qv_status parse_sum(qv_jparser *p, qv_jnode **out)
{
    return parse_joined(p, QV_JT_ADD, QV_JT_SUB, parse_concat, out);
}

/* The comparison at the current token, skipped; 0 if there is none. */
static int skip_comparison(qv_jparser *p)
{
    int op = (int)qv_jp_current(p)->type;
    if (op >= QV_JT_EQ && op <= QV_JT_GE) {
        qv_jp_skip(p);
        return op;
    }
    if (qv_jp_skip_word(p, "in"))
        return QV_JT_IN;
    if (qv_jp_is_word(qv_jp_current(p), "not") && qv_jp_is_word(qv_jp_look_ahead(p), "in")) {
        qv_jp_skip(p);
        qv_jp_skip(p);
        return QV_JT_NOT_IN;
    }
    return 0;
}

static qv_status parse_comparison(qv_jparser *p, qv_jnode **out)
{
    QV_TRY(parse_sum(p, out));
    uint32_t line = qv_jp_current(p)->line;
    qv_jnode *node = NULL;
    for (int op; (op = skip_comparison(p)) != 0;) {
        if (!node) {
            QV_TRY(qv_jp_new_node(p, QV_JN_COMPARE, line, &node));
            node->compare.left = *out;
            QV_TRY(qv_jp_below(p, node, *out));
            *out = node;
        }
        size_t n = node->compare.n;
        if ((n & (n - 1)) == 0) {
            qv_joperand *grown = QV_ARENA_ARRAY(&p->program->arena, qv_joperand, n ? 2 * n : 1);
            if (!grown)
                return qv_jp_no_memory(p);
            if (n > 0)
                memcpy(grown, node->compare.operands, n * sizeof *grown);
            node->compare.operands = grown;
        }
        qv_joperand *operand = &node->compare.operands[node->compare.n++];
        operand->op = op;
        QV_TRY(parse_sum(p, &operand->right));
        QV_TRY(qv_jp_below(p, node, operand->right));
    }
    return QV_OK;
}

static qv_status parse_not(qv_jparser *p, qv_jnode **out)
{
    if (!qv_jp_is_word(qv_jp_current(p), "not"))
        return parse_comparison(p, out);
    QV_TRY(qv_jp_enter(p));
    QV_TRY(qv_jp_new_node(p, QV_JN_NOT, qv_jp_current(p)->line, out));
    qv_jp_skip(p);
    QV_TRY(parse_not(p, &(*out)->operand));
    qv_jp_leave(p);
    return qv_jp_below(p, *out, (*out)->operand);
}

static qv_status parse_and(qv_jparser *p, qv_jnode **out)
{
    QV_TRY(parse_not(p, out));
    for (uint32_t line = qv_jp_current(p)->line; qv_jp_skip_word(p, "and");
         line = qv_jp_current(p)->line) {
        qv_jnode *right;
        QV_TRY(parse_not(p, &right));
        QV_TRY(new_binary(p, QV_JN_AND, 0, line, *out, right, out));
    }
    return QV_OK;
}

qv_status qv_jp_or(qv_jparser *p, qv_jnode **out)
{
    QV_TRY(qv_jp_enter(p));
    QV_TRY(parse_and(p, out));
    for (uint32_t line = qv_jp_current(p)->line; qv_jp_skip_word(p, "or");
         line = qv_jp_current(p)->line) {
        qv_jnode *right;
        QV_TRY(parse_and(p, &right));
        QV_TRY(new_binary(p, QV_JN_OR, 0, line, *out, right, out));
    }
    qv_jp_leave(p);
    return QV_OK;
}

/* `a if b else c`; without else it is undefined where b does not hold. */
qv_status qv_jp_expression(qv_jparser *p, qv_jnode **out)
{
    QV_TRY(qv_jp_enter(p));
    uint32_t line = qv_jp_current(p)->line;
    QV_TRY(qv_jp_or(p, out));
    while (qv_jp_skip_word(p, "if")) {
        qv_jnode *node;
        QV_TRY(qv_jp_new_node(p, QV_JN_CONDITION, line, &node));
        node->condition.then = *out;
        QV_TRY(qv_jp_or(p, &node->condition.test));
        if (qv_jp_skip_word(p, "else"))
            QV_TRY(qv_jp_expression(p, &node->condition.otherwise));
        QV_TRY(qv_jp_below(p, node, node->condition.then));
        QV_TRY(qv_jp_below(p, node, node->condition.test));
        QV_TRY(qv_jp_below(p, node, node->condition.otherwise));
        *out = node;
    }
    qv_jp_leave(p);
    return QV_OK;
}

/* ---- Targets of assignment ------------------------------------------------------------------- */

/* A name, a name with an attribute where allowed, or such in parentheses. */
static qv_status parse_one_target(qv_jparser *p, bool with_attribute, qv_jnode **out);

qv_status qv_jp_plain_target(qv_jparser *p, qv_jnode **out)
{
    return parse_one_target(p, false, out);
}

qv_status qv_jp_attribute_target(qv_jparser *p, qv_jnode **out)
{
    return parse_one_target(p, true, out);
}

static qv_status parse_one_target(qv_jparser *p, bool with_attribute, qv_jnode **out)
{
    uint32_t line = qv_jp_current(p)->line;
    if (qv_jp_skip_if(p, QV_JT_LPAREN)) {
        QV_TRY(qv_jp_enter(p));
        QV_TRY(qv_jp_tuple(p, with_attribute ? qv_jp_attribute_target : qv_jp_plain_target, NULL,
                           false, out));
        qv_jp_leave(p);
        return qv_jp_expect(p, QV_JT_RPAREN);
    }
    static const char *const reserved[] = {"true", "false", "none", "True", "False", "None"};
    for (size_t i = 0; i < sizeof reserved / sizeof reserved[0]; i++) {
        if (qv_jp_is_word(qv_jp_current(p), reserved[i]))
            return qv_jp_fail_at(p, line, QV_ERR_FORMAT, "can't assign to '%s'", reserved[i]);
    }
    qv_jstr name;
    QV_TRY(qv_jp_expect_name(p, &name));
    if (with_attribute && qv_jp_skip_if(p, QV_JT_DOT)) {
        QV_TRY(qv_jp_new_node(p, QV_JN_NAMESPACE_ATTRIBUTE, line, out));
        QV_TRY(qv_jp_intern(p, name, &(*out)->ns.name));
        return qv_jp_expect_name(p, &(*out)->ns.attribute);
    }
    QV_TRY(qv_jp_new_node(p, QV_JN_NAME, line, out));
    return qv_jp_intern_bound(p, name, &(*out)->name);
}
