/* Statements of templates: one function for each tag, and a table of them. */
#include "models/jinja_parser.h"

#include <stdio.h>
#include <string.h>

/* ---- Statements ------------------------------------------------------------------------------ */

static qv_status parse_body(qv_jparser *p, const char *const *end_words, qv_jnodes *body);

/* A body up to its end tag, whose word is skipped. */
static qv_status parse_body_to(qv_jparser *p, const char *end_word, qv_jnodes *body)
{
    const char *const end_words[] = {end_word, NULL};
    QV_TRY(parse_body(p, end_words, body));
    return qv_jp_expect_word(p, end_word);
}

/* A body whose text is captured: `break` does not leave it. */
static qv_status parse_captured_body(qv_jparser *p, const char *end_word, qv_jnodes *body)
{
    unsigned loops = p->loops;
    p->loops = 0;
    QV_TRY(parse_body_to(p, end_word, body));
    p->loops = loops;
    return QV_OK;
}

static qv_status parse_condition_tuple(qv_jparser *p, qv_jnode **out)
{
    return qv_jp_tuple(p, qv_jp_or, NULL, false, out);
}

static qv_status parse_if(qv_jparser *p, qv_jnode *node)
{
    static const char *const end_words[] = {"elif", "else", "endif", NULL};
    bool at_else = false;
    do {
        size_t n = node->choice.n;
        if ((n & (n - 1)) == 0) {
            qv_jbranch *grown = QV_ARENA_ARRAY(&p->program->arena, qv_jbranch, n ? 2 * n : 1);
            if (!grown)
                return qv_jp_no_memory(p);
            if (n > 0)
                memcpy(grown, node->choice.branches, n * sizeof *grown);
            node->choice.branches = grown;
        }
        qv_jbranch *branch = &node->choice.branches[node->choice.n++];
        if (!at_else)
            QV_TRY(parse_condition_tuple(p, &branch->test));
        QV_TRY(qv_jp_below(p, node, branch->test));
        QV_TRY(parse_body(p, at_else ? end_words + 2 : end_words, &branch->body));
        QV_TRY(qv_jp_all_below(p, node, branch->body));
        at_else = qv_jp_is_word(qv_jp_current(p), "else");
        if (qv_jp_skip_word(p, "endif"))
            return QV_OK;
        qv_jp_skip(p);
    } while (true);
}

static qv_status parse_for(qv_jparser *p, qv_jnode *node)
{
    static const char *const end_words[] = {"else", "endfor", NULL};
    QV_TRY(qv_jp_tuple(p, qv_jp_plain_target, "in", false, &node->loop.target));
    QV_TRY(qv_jp_expect_word(p, "in"));
    QV_TRY(qv_jp_tuple(p, qv_jp_or, "recursive", false, &node->loop.iterable));
    if (qv_jp_skip_word(p, "if"))
        QV_TRY(qv_jp_expression(p, &node->loop.test));
    if (qv_jp_is_word(qv_jp_current(p), "recursive"))
        return qv_jp_fail_at(p, qv_jp_current(p)->line, QV_ERR_UNSUPPORTED,
                             "recursive loops are not supported");
    size_t n_macros = p->n_macros;
    p->loops++;
    QV_TRY(parse_body(p, end_words, &node->loop.body));
    p->loops--;
    node->loop.has_macros = p->n_macros > n_macros;
    if (qv_jp_skip_word(p, "else"))
        QV_TRY(parse_body_to(p, "endfor", &node->loop.otherwise));
    else
        qv_jp_skip(p);
    QV_TRY(qv_jp_below(p, node, node->loop.target));
    QV_TRY(qv_jp_below(p, node, node->loop.iterable));
    QV_TRY(qv_jp_below(p, node, node->loop.test));
    QV_TRY(qv_jp_all_below(p, node, node->loop.body));
    return qv_jp_all_below(p, node, node->loop.otherwise);
}

/* `set a = b`, or `set a | filters` with a body. */
static qv_status parse_set(qv_jparser *p, qv_jnode *node)
{
    QV_TRY(qv_jp_tuple(p, qv_jp_attribute_target, NULL, false, &node->set.target));
    QV_TRY(qv_jp_below(p, node, node->set.target));
    if (qv_jp_skip_if(p, QV_JT_ASSIGN)) {
        QV_TRY(qv_jp_tuple(p, qv_jp_expression, NULL, false, &node->set.value));
        return qv_jp_below(p, node, node->set.value);
    }
    node->kind = QV_JN_SET_BLOCK;
    QV_TRY(qv_jp_filter_chain(p, NULL, &node->set.value));
    QV_TRY(qv_jp_below(p, node, node->set.value));
    QV_TRY(parse_captured_body(p, "endset", &node->set.body));
    return qv_jp_all_below(p, node, node->set.body);
}

/* The parameters of a macro or of a call block, in parentheses. */
static qv_status parse_params(qv_jparser *p, qv_jnode *node)
{
    QV_TRY(qv_jp_expect(p, QV_JT_LPAREN));
    bool fallbacks = false;
    while (!qv_jp_is(p, QV_JT_RPAREN)) {
        size_t n = node->macro.n;
        if (n > 0)
            QV_TRY(qv_jp_expect(p, QV_JT_COMMA));
        if ((n & (n - 1)) == 0) {
            qv_jparam *grown = QV_ARENA_ARRAY(&p->program->arena, qv_jparam, n ? 2 * n : 1);
            if (!grown)
                return qv_jp_no_memory(p);
            if (n > 0)
                memcpy(grown, node->macro.params, n * sizeof *grown);
            node->macro.params = grown;
        }
        qv_jparam *param = &node->macro.params[n];
        qv_jnode *target;
        uint32_t line = qv_jp_current(p)->line;
        if (qv_jp_is(p, QV_JT_LPAREN))
            return qv_jp_expect(p, QV_JT_NAME);
        QV_TRY(qv_jp_plain_target(p, &target));
        param->name = target->name;
        if (qv_jp_skip_if(p, QV_JT_ASSIGN)) {
            QV_TRY(qv_jp_expression(p, &param->fallback));
            QV_TRY(qv_jp_below(p, node, param->fallback));
            fallbacks = true;
        } else if (fallbacks) {
            return qv_jp_fail_at(p, line, QV_ERR_FORMAT,
                                 "non-default argument follows default argument");
        }
        node->macro.n++;
    }
    return qv_jp_expect(p, QV_JT_RPAREN);
}

/* The parameters and body of a macro or call block: a function of its own. */
static qv_status parse_function(qv_jparser *p, qv_jnode *node, bool with_params,
                                const char *end_word)
{
    qv_jnode *outer = p->macro;
    p->n_macros++;
    p->macro = node;
    if (with_params)
        QV_TRY(parse_params(p, node));
    if (node->kind == QV_JN_CALL_BLOCK) {
        /* What is called is evaluated outside of the function. */
        p->macro = outer;
        QV_TRY(qv_jp_expression(p, &node->macro.call));
        if (node->macro.call->kind != QV_JN_CALL)
            return qv_jp_fail_at(p, node->line, QV_ERR_FORMAT, "expected a call");
        QV_TRY(qv_jp_below(p, node, node->macro.call));
        p->macro = node;
    }
    QV_TRY(parse_captured_body(p, end_word, &node->macro.body));
    p->macro = outer;
    return qv_jp_all_below(p, node, node->macro.body);
}

static qv_status parse_macro(qv_jparser *p, qv_jnode *node)
{
    qv_jnode *target;
    if (!qv_jp_is(p, QV_JT_NAME))
        return qv_jp_expect(p, QV_JT_NAME);
    QV_TRY(qv_jp_plain_target(p, &target));
    node->macro.name = target->name;
    return parse_function(p, node, true, "endmacro");
}

static qv_status parse_call_block(qv_jparser *p, qv_jnode *node)
{
    node->macro.name = p->program->caller_name;
    return parse_function(p, node, qv_jp_is(p, QV_JT_LPAREN), "endcall");
}

static qv_status parse_filter_block(qv_jparser *p, qv_jnode *node)
{
    QV_TRY(qv_jp_filter(p, NULL, &node->block.filter));
    QV_TRY(qv_jp_filter_chain(p, node->block.filter, &node->block.filter));
    QV_TRY(qv_jp_below(p, node, node->block.filter));
    QV_TRY(parse_captured_body(p, "endfilter", &node->block.body));
    return qv_jp_all_below(p, node, node->block.body);
}

static qv_status parse_with(qv_jparser *p, qv_jnode *node)
{
    qv_jnodes targets = {0}, values = {0};
    while (!qv_jp_is(p, QV_JT_BLOCK_END)) {
        qv_jnode *target, *value;
        if (targets.n > 0)
            QV_TRY(qv_jp_expect(p, QV_JT_COMMA));
        QV_TRY(qv_jp_plain_target(p, &target));
        QV_TRY(qv_jp_expect(p, QV_JT_ASSIGN));
        QV_TRY(qv_jp_expression(p, &value));
        QV_TRY(qv_jp_append(p, &targets, target));
        QV_TRY(qv_jp_append(p, &values, value));
    }
    node->block.targets = targets.nodes;
    node->block.values = values.nodes;
    node->block.n = targets.n;
    QV_TRY(qv_jp_all_below(p, node, values));
    QV_TRY(parse_body_to(p, "endwith", &node->block.body));
    return qv_jp_all_below(p, node, node->block.body);
}

/* What an assistant says, marked for training: the text passes through. */
static qv_status parse_generation(qv_jparser *p, qv_jnode *node)
{
    QV_TRY(parse_captured_body(p, "endgeneration", &node->block.body));
    return qv_jp_all_below(p, node, node->block.body);
}

static qv_status parse_loop_control(qv_jparser *p, qv_jnode *node)
{
    if (p->loops > 0)
        return QV_OK;
    return qv_jp_fail_at(p, node->line, QV_ERR_FORMAT, "'%s' outside of a loop",
                         node->kind == QV_JN_BREAK ? "break" : "continue");
}

/* `print a, b` is `{{ a }}{{ b }}`. */
static qv_status parse_print(qv_jparser *p, qv_jnode *node)
{
    qv_jnode *item;
    while (!qv_jp_is(p, QV_JT_BLOCK_END)) {
        if (node->block.body.n > 0)
            QV_TRY(qv_jp_expect(p, QV_JT_COMMA));
        QV_TRY(qv_jp_new_node(p, QV_JN_PRINT, qv_jp_current(p)->line, &item));
        QV_TRY(qv_jp_expression(p, &item->operand));
        QV_TRY(qv_jp_below(p, item, item->operand));
        QV_TRY(qv_jp_append(p, &node->block.body, item));
    }
    return qv_jp_all_below(p, node, node->block.body);
}

static const struct {
    const char *word;
    qv_jnode_kind kind;
    qv_status (*parse)(qv_jparser *p, qv_jnode *node);
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

static qv_status parse_statement(qv_jparser *p, const char *const *end_words, qv_jnode **out)
{
    const qv_jtoken *token = qv_jp_current(p);
    if (token->type != QV_JT_NAME)
        return qv_jp_fail_at(p, token->line, QV_ERR_FORMAT, "tag name expected");
    for (size_t i = 0; i < sizeof statements / sizeof statements[0]; i++) {
        if (!qv_jp_is_word(token, statements[i].word))
            continue;
        QV_TRY(qv_jp_enter(p));
        QV_TRY(qv_jp_new_node(p, statements[i].kind, token->line, out));
        qv_jp_skip(p);
        QV_TRY(statements[i].parse(p, *out));
        qv_jp_leave(p);
        return QV_OK;
    }
    for (size_t i = 0; i < sizeof unsupported_tags / sizeof unsupported_tags[0]; i++) {
        if (qv_jp_is_word(token, unsupported_tags[i]))
            return qv_jp_fail_at(p, token->line, QV_ERR_UNSUPPORTED, "tag '%s' is not supported",
                                 unsupported_tags[i]);
    }
    char expected[128];
    list_words(end_words, expected, sizeof expected);
    return qv_jp_fail_at(p, token->line, QV_ERR_FORMAT, "unknown tag '%.*s'%s%s",
                         QV_JSTR_ARG(token->text), end_words ? ", looking for " : "", expected);
}

static bool at_end_word(const qv_jparser *p, const char *const *end_words)
{
    for (; end_words && *end_words; end_words++) {
        if (qv_jp_is_word(qv_jp_current(p), *end_words))
            return true;
    }
    return false;
}

/* Statements, prints and data up to one of the end words, which becomes the current token; or, with
 * NULL, up to the end of the template. */
qv_status qv_jp_parts(qv_jparser *p, const char *const *end_words, qv_jnodes *body)
{
    for (;;) {
        const qv_jtoken *token = qv_jp_current(p);
        qv_jnode *node = NULL;
        switch (token->type) {
        case QV_JT_DATA:
            QV_TRY(qv_jp_new_node(p, QV_JN_DATA, token->line, &node));
            node->data = token->text;
            qv_jp_skip(p);
            break;
        case QV_JT_VARIABLE_BEGIN:
            qv_jp_skip(p);
            QV_TRY(qv_jp_new_node(p, QV_JN_PRINT, token->line, &node));
            QV_TRY(qv_jp_tuple(p, qv_jp_expression, NULL, false, &node->operand));
            QV_TRY(qv_jp_below(p, node, node->operand));
            QV_TRY(qv_jp_expect(p, QV_JT_VARIABLE_END));
            break;
        case QV_JT_BLOCK_BEGIN:
            qv_jp_skip(p);
            if (at_end_word(p, end_words))
                return QV_OK;
            QV_TRY(parse_statement(p, end_words, &node));
            QV_TRY(qv_jp_expect(p, QV_JT_BLOCK_END));
            break;
        default: {
            if (!end_words)
                return QV_OK;
            char expected[128];
            list_words(end_words, expected, sizeof expected);
            return qv_jp_fail_at(p, token->line, QV_ERR_FORMAT,
                                 "unexpected end of template, looking for %s", expected);
        }
        }
        QV_TRY(qv_jp_append(p, body, node));
    }
}

/* The body of a tag: behind the end of the tag (a colon before it is allowed, as in Python). */
static qv_status parse_body(qv_jparser *p, const char *const *end_words, qv_jnodes *body)
{
    qv_jp_skip_if(p, QV_JT_COLON);
    QV_TRY(qv_jp_expect(p, QV_JT_BLOCK_END));
    return qv_jp_parts(p, end_words, body);
}
