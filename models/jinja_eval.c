/* Running a tree. Variables live in scopes that form a chain: a loop's body, a macro and a `with`
 * have scopes of their own, `if` has none; assignment goes to the innermost one, so that what a
 * loop sets is gone when it ends, as in jinja2.
 */
#include "models/jinja.h"

#include <stdlib.h>
#include <string.h>

static qv_status eval(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out);
static qv_status run_body(qv_jrun *run, qv_jscope *scope, qv_jnodes body);

/* ---- Scopes ---------------------------------------------------------------------------------- */

static qv_status new_scope(qv_jrun *run, qv_jscope *parent, qv_jscope **out)
{
    void *scope;
    QV_TRY(qv_j_alloc(run, 1, sizeof(qv_jscope), &scope));
    *out = scope;
    **out = (qv_jscope){.parent = parent};
    return QV_OK;
}

/* Forget the variables of a scope, but keep their memory. */
static void clear_scope(qv_jscope *scope)
{
    for (qv_jvariable *v = scope->variables; v; v = v->next)
        v->value.type = QV_J_ABSENT;
}

/* The variable as it is seen from a scope, or NULL. */
static qv_jvariable *find_variable(qv_jscope *scope, uint32_t name)
{
    for (; scope; scope = scope->parent) {
        for (qv_jvariable *v = scope->variables; v; v = v->next) {
            if (v->name == name && v->value.type != QV_J_ABSENT)
                return v;
        }
    }
    return NULL;
}

qv_status qv_j_set(qv_jrun *run, qv_jscope *scope, uint32_t name, qv_jvalue value)
{
    qv_jvariable *v = scope->variables;
    while (v && v->name != name)
        v = v->next;
    if (!v) {
        void *memory;
        QV_TRY(qv_j_alloc(run, 1, sizeof *v, &memory));
        v = memory;
        *v = (qv_jvariable){.next = scope->variables, .name = name};
        scope->variables = v;
    }
    v->value = value;
    return QV_OK;
}

static qv_jvalue name_value(const qv_jrun *run, uint32_t name)
{
    qv_jstr text = run->program->names[name];
    return qv_j_str(text.data, text.len);
}

static qv_status eval_name(qv_jrun *run, qv_jscope *scope, uint32_t name, qv_jvalue *out)
{
    const qv_jvariable *v = find_variable(scope, name);
    if (v) {
        *out = v->value;
        return QV_OK;
    }
    const qv_jcallable *function = qv_j_find_function(run->program->names[name]);
    if (!function)
        return qv_j_undefined(run, NULL, name_value(run, name), out);
    *out = (qv_jvalue){.type = QV_J_FUNCTION, .function = function};
    return QV_OK;
}

/* Assign a value to a target: a name, several, or an attribute of a namespace. */
static qv_status assign(qv_jrun *run, qv_jscope *scope, const qv_jnode *target, qv_jvalue value)
{
    if (target->kind == QV_JN_NAME)
        return qv_j_set(run, scope, target->name, value);
    if (target->kind == QV_JN_NAMESPACE_ATTRIBUTE) {
        const qv_jvariable *v = find_variable(scope, target->ns.name);
        if (!v || v->value.type != QV_J_NAMESPACE)
            return qv_j_fail(run, "cannot assign attribute on non-namespace object");
        qv_jstr name = target->ns.attribute;
        return qv_j_dict_set(run, v->value.dict, qv_j_str(name.data, name.len), value);
    }
    qv_jvalue *items;
    size_t n, want = target->items.n;
    if (value.type != QV_J_UNDEFINED && value.type < QV_J_STR)
        return qv_j_fail(run, "cannot unpack non-iterable %s object", qv_j_type_name(value));
    QV_TRY(qv_j_iterate(run, value, &items, &n));
    if (n < want)
        return qv_j_fail(run, "not enough values to unpack (expected %zu, got %zu)", want, n);
    if (n > want)
        return qv_j_fail(run, "too many values to unpack (expected %zu)", want);
    for (size_t i = 0; i < n; i++)
        QV_TRY(assign(run, scope, target->items.nodes[i], items[i]));
    return QV_OK;
}

/* ---- Output ---------------------------------------------------------------------------------- */

static qv_status print(qv_jrun *run, qv_jstr text)
{
    QV_TRY(qv_j_charge(run, text.len));
    if (text.len > run->limits.max_output_bytes - run->out_len)
        return qv_j_limit(run, "the chat template prints more than %zu bytes",
                          run->limits.max_output_bytes);
    if (run->out_size - run->out_len < text.len + 1) {
        size_t size = run->out_size < 4096 ? 4096 : 2 * run->out_size;
        size = size - run->out_len < text.len + 1 ? run->out_len + text.len + 1 : size;
        char *out = realloc(run->out, size);
        if (!out)
            return qv_fail(QV_ERR_NOMEM, "no memory for %zu bytes of prompt", size);
        run->out = out;
        run->out_size = size;
    }
    if (text.len > 0)
        memcpy(run->out + run->out_len, text.data, text.len);
    run->out_len += text.len;
    return QV_OK;
}

/* Run a body in a scope and take what it printed as a string. */
static qv_status capture(qv_jrun *run, qv_jscope *scope, qv_jnodes body, qv_jvalue *out)
{
    size_t start = run->out_len;
    QV_TRY(run_body(run, scope, body));
    qv_jbuilder b = {.run = run};
    if (run->out_len > start)
        QV_TRY(qv_j_add(&b, run->out + start, run->out_len - start));
    run->out_len = start;
    *out = qv_j_built(&b);
    return QV_OK;
}

/* ---- Operators ------------------------------------------------------------------------------- */

static qv_status eval_sign(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    qv_jvalue v;
    QV_TRY(eval(run, scope, node->operand, &v));
    return qv_j_sign(run, node->kind == QV_JN_NEGATE, v, out);
}

/* `a < b < c` holds when each neighbouring pair does. */
static qv_status eval_comparison(qv_jrun *run, qv_jscope *scope, const qv_jnode *node,
                                 qv_jvalue *out)
{
    qv_jvalue left, right;
    bool holds = true;
    QV_TRY(eval(run, scope, node->compare.left, &left));
    for (size_t i = 0; i < node->compare.n && holds; i++) {
        QV_TRY(eval(run, scope, node->compare.operands[i].right, &right));
        QV_TRY(qv_j_relation(run, node->compare.operands[i].op, left, right, &holds));
        left = right;
    }
    *out = qv_j_bool(holds);
    return QV_OK;
}

/* `and` and `or` give one of their operands. */
static qv_status eval_logic(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    QV_TRY(eval(run, scope, node->binary.left, out));
    if (qv_j_truth(*out) == (node->kind == QV_JN_OR))
        return QV_OK;
    return eval(run, scope, node->binary.right, out);
}

static qv_status eval_condition(qv_jrun *run, qv_jscope *scope, const qv_jnode *node,
                                qv_jvalue *out)
{
    qv_jvalue test;
    QV_TRY(eval(run, scope, node->condition.test, &test));
    if (qv_j_truth(test))
        return eval(run, scope, node->condition.then, out);
    if (node->condition.otherwise)
        return eval(run, scope, node->condition.otherwise, out);
    return qv_j_undefined_hint(
        run, "the inline if-expression evaluated to false and no else section was defined.", out);
}

/* ---- Literals and parts ---------------------------------------------------------------------- */

static qv_status eval_seq(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    QV_TRY(qv_j_seq(run, node->kind == QV_JN_LIST ? QV_J_LIST : QV_J_TUPLE, node->items.n, out));
    for (size_t i = 0; i < node->items.n; i++)
        QV_TRY(eval(run, scope, node->items.nodes[i], &out->seq->items[i]));
    return QV_OK;
}

static qv_status eval_dict(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    QV_TRY(qv_j_dict(run, QV_J_DICT, node->items.n / 2, out));
    for (size_t i = 0; i < node->items.n; i += 2) {
        qv_jvalue key, value;
        QV_TRY(eval(run, scope, node->items.nodes[i], &key));
        QV_TRY(eval(run, scope, node->items.nodes[i + 1], &value));
        QV_TRY(qv_j_dict_set(run, out->dict, key, value));
    }
    return QV_OK;
}

static qv_status eval_concat(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    qv_jbuilder b = {.run = run};
    for (size_t i = 0; i < node->items.n; i++) {
        qv_jvalue v;
        qv_jstr text;
        QV_TRY(eval(run, scope, node->items.nodes[i], &v));
        QV_TRY(qv_j_to_str(run, v, &text));
        QV_TRY(qv_j_add_text(&b, text));
    }
    *out = qv_j_built(&b);
    return QV_OK;
}

static qv_status eval_attribute(qv_jrun *run, qv_jscope *scope, const qv_jnode *node,
                                qv_jvalue *out)
{
    qv_jvalue object;
    QV_TRY(eval(run, scope, node->attribute.object, &object));
    return qv_j_attribute(run, object, node->attribute.name, out);
}

static qv_status eval_item(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    qv_jvalue object, key;
    QV_TRY(eval(run, scope, node->item.object, &object));
    QV_TRY(eval(run, scope, node->item.key, &key));
    return qv_j_item(run, object, key, out);
}

/* A part of a slice, absent where it is left out. */
static qv_status eval_optional(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    *out = (qv_jvalue){.type = QV_J_ABSENT};
    return node ? eval(run, scope, node, out) : QV_OK;
}

static qv_status eval_slice(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    qv_jvalue object, start, stop, step;
    QV_TRY(eval(run, scope, node->slice.object, &object));
    QV_TRY(eval_optional(run, scope, node->slice.start, &start));
    QV_TRY(eval_optional(run, scope, node->slice.stop, &stop));
    QV_TRY(eval_optional(run, scope, node->slice.step, &step));
    return qv_j_slice(run, object, start, stop, step, out);
}

/* ---- Calls ----------------------------------------------------------------------------------- */

/* Evaluate arguments, with room for `extra` named ones more. */
static qv_status eval_args(qv_jrun *run, qv_jscope *scope, const qv_jnode_args *nodes, size_t extra,
                           qv_jargs *out)
{
    void *values, *named;
    *out = (qv_jargs){.n = nodes->values.n, .n_named = nodes->n_named};
    QV_TRY(qv_j_alloc(run, nodes->values.n, sizeof(qv_jvalue), &values));
    QV_TRY(qv_j_alloc(run, nodes->n_named + extra, sizeof(qv_jnamed), &named));
    out->values = values;
    out->named = named;
    for (size_t i = 0; i < nodes->values.n; i++)
        QV_TRY(eval(run, scope, nodes->values.nodes[i], &out->values[i]));
    for (size_t i = 0; i < nodes->n_named; i++) {
        out->named[i].name = nodes->names[i];
        QV_TRY(eval(run, scope, nodes->named[i], &out->named[i].value));
    }
    return QV_OK;
}

/* The value of a named argument; marks it as used. */
static bool take_named(const qv_jargs *args, bool *used, qv_jstr name, qv_jvalue *out)
{
    for (size_t i = 0; i < args->n_named; i++) {
        if (qv_j_str_equal(args->named[i].name, name)) {
            used[i] = true;
            *out = args->named[i].value;
            return true;
        }
    }
    return false;
}

/* Bind the declared parameters of a macro. Those that are not given are evaluated in its scope,
 * where the ones before them are known already. */
static qv_status bind_params(qv_jrun *run, qv_jscope *scope, const qv_jnode *node,
                             const qv_jargs *args, bool *used)
{
    for (size_t i = 0; i < node->macro.n; i++) {
        const qv_jparam *param = &node->macro.params[i];
        qv_jvalue value;
        if (i < args->n) {
            value = args->values[i];
        } else if (take_named(args, used, run->program->names[param->name], &value)) {
            /* bound by name */
        } else if (param->fallback) {
            QV_TRY(eval(run, scope, param->fallback, &value));
        } else {
            qv_jbuilder b = {.run = run};
            QV_TRY(qv_j_add_text(&b, QV_JSTR("parameter ")));
            QV_TRY(qv_j_add_repr(&b, name_value(run, param->name)));
            QV_TRY(qv_j_add(&b, " was not provided", sizeof " was not provided"));
            QV_TRY(qv_j_undefined_hint(run, b.data, &value));
        }
        QV_TRY(qv_j_set(run, scope, param->name, value));
    }
    return QV_OK;
}

/* Bind what a macro uses without declaring it: caller, varargs and kwargs. */
static qv_status bind_extras(qv_jrun *run, qv_jscope *scope, const qv_jnode *node,
                             const qv_jargs *args, bool *used)
{
    const qv_jprogram *program = run->program;
    qv_jvalue value;
    if (node->macro.uses_caller) {
        if (!take_named(args, used, QV_JSTR("caller"), &value))
            QV_TRY(qv_j_undefined_hint(run, "No caller defined", &value));
        QV_TRY(qv_j_set(run, scope, program->caller_name, value));
    }
    if (node->macro.uses_varargs) {
        size_t declared = node->macro.n < args->n ? node->macro.n : args->n;
        QV_TRY(qv_j_seq(run, QV_J_TUPLE, args->n - declared, &value));
        for (size_t i = declared; i < args->n; i++)
            value.seq->items[i - declared] = args->values[i];
        QV_TRY(qv_j_set(run, scope, program->varargs_name, value));
    }
    if (node->macro.uses_kwargs) {
        QV_TRY(qv_j_dict(run, QV_J_DICT, 0, &value));
        for (size_t i = 0; i < args->n_named; i++) {
            qv_jstr name = args->named[i].name;
            if (!used[i])
                QV_TRY(qv_j_dict_set(run, value.dict, qv_j_str(name.data, name.len),
                                     args->named[i].value));
            used[i] = true;
        }
        QV_TRY(qv_j_set(run, scope, program->kwargs_name, value));
    }
    return QV_OK;
}

static qv_status call_macro(qv_jrun *run, const qv_jmacro *macro, const qv_jargs *args,
                            qv_jvalue *out)
{
    const qv_jnode *node = macro->node;
    qv_jstr name = run->program->names[node->macro.name];
    qv_jscope *scope;
    void *memory;
    uint32_t line = run->line;
    if (args->n > node->macro.n && !node->macro.uses_varargs)
        return qv_j_fail(run, "macro '%.*s' takes not more than %zu argument(s)", QV_JSTR_ARG(name),
                         node->macro.n);
    QV_TRY(qv_j_alloc(run, args->n_named, sizeof(bool), &memory));
    bool *used = memory;
    if (args->n_named > 0)
        memset(used, 0, args->n_named * sizeof *used);
    QV_TRY(new_scope(run, macro->scope, &scope));
    QV_TRY(bind_params(run, scope, node, args, used));
    QV_TRY(bind_extras(run, scope, node, args, used));
    for (size_t i = 0; i < args->n_named; i++) {
        qv_jstr given = args->named[i].name;
        if (!used[i])
            return qv_j_fail(run, "macro '%.*s' takes no keyword argument '%.*s'",
                             QV_JSTR_ARG(name), QV_JSTR_ARG(given));
    }
    QV_TRY(capture(run, scope, node->macro.body, out));
    run->line = line;
    return QV_OK;
}

qv_status qv_j_call_value(qv_jrun *run, qv_jvalue callee, const qv_jargs *args, qv_jvalue *out)
{
    switch ((qv_jtype)callee.type) {
    case QV_J_MACRO:
        QV_TRY(qv_j_enter(run));
        QV_TRY(call_macro(run, callee.macro, args, out));
        qv_j_leave(run);
        return QV_OK;
    case QV_J_FUNCTION:
        return qv_j_call(run, "function", callee.function, (qv_jvalue){0}, args, out);
    case QV_J_METHOD:
        return qv_j_call(run, "method", callee.method->callable, callee.method->self, args, out);
    case QV_J_UNDEFINED:
        return qv_j_fail_undefined(run, callee);
    default:
        return qv_j_fail(run, "'%s' object is not callable", qv_j_type_name(callee));
    }
}

static qv_status eval_call(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    qv_jvalue callee;
    qv_jargs args;
    QV_TRY(eval(run, scope, node->call.callee, &callee));
    QV_TRY(eval_args(run, scope, &node->call.args, 0, &args));
    return qv_j_call_value(run, callee, &args, out);
}

static qv_status eval_test(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    qv_jvalue input;
    qv_jargs args;
    QV_TRY(eval(run, scope, node->apply.input, &input));
    QV_TRY(eval_args(run, scope, &node->apply.args, 0, &args));
    return qv_j_call(run, "test", node->apply.callable, input, &args, out);
}

/* A chain of filters; the innermost one without an input gets `captured`. */
static qv_status eval_filter(qv_jrun *run, qv_jscope *scope, const qv_jnode *node,
                             const qv_jvalue *captured, qv_jvalue *out)
{
    qv_jvalue input;
    qv_jargs args;
    const qv_jnode *from = node->apply.input;
    QV_TRY(qv_j_enter(run));
    if (!from)
        input = *captured;
    else if (from->kind == QV_JN_FILTER)
        QV_TRY(eval_filter(run, scope, from, captured, &input));
    else
        QV_TRY(eval(run, scope, from, &input));
    qv_j_leave(run);
    QV_TRY(eval_args(run, scope, &node->apply.args, 0, &args));
    run->line = node->line;
    return qv_j_call(run, "filter", node->apply.callable, input, &args, out);
}

/* ---- Expressions ----------------------------------------------------------------------------- */

static qv_status eval_node(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    qv_jvalue left, right;
    switch ((qv_jnode_kind)node->kind) {
    case QV_JN_CONST:
        *out = node->constant;
        return QV_OK;
    case QV_JN_NAME:
        return eval_name(run, scope, node->name, out);
    case QV_JN_LIST:
    case QV_JN_TUPLE:
        return eval_seq(run, scope, node, out);
    case QV_JN_DICT:
        return eval_dict(run, scope, node, out);
    case QV_JN_ATTRIBUTE:
        return eval_attribute(run, scope, node, out);
    case QV_JN_ITEM:
        return eval_item(run, scope, node, out);
    case QV_JN_SLICE:
        return eval_slice(run, scope, node, out);
    case QV_JN_CALL:
        return eval_call(run, scope, node, out);
    case QV_JN_FILTER:
        return eval_filter(run, scope, node, NULL, out);
    case QV_JN_TEST:
        return eval_test(run, scope, node, out);
    case QV_JN_NOT:
        QV_TRY(eval(run, scope, node->operand, &left));
        *out = qv_j_bool(!qv_j_truth(left));
        return QV_OK;
    case QV_JN_NEGATE:
    case QV_JN_PLUS:
        return eval_sign(run, scope, node, out);
    case QV_JN_BINARY:
        QV_TRY(eval(run, scope, node->binary.left, &left));
        QV_TRY(eval(run, scope, node->binary.right, &right));
        return qv_j_binary(run, node->binary.op, left, right, out);
    case QV_JN_AND:
    case QV_JN_OR:
        return eval_logic(run, scope, node, out);
    case QV_JN_COMPARE:
        return eval_comparison(run, scope, node, out);
    case QV_JN_CONCAT:
        return eval_concat(run, scope, node, out);
    default:
        QV_ASSERT(node->kind == QV_JN_CONDITION);
        return eval_condition(run, scope, node, out);
    }
}

static qv_status eval(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    run->line = node->line;
    QV_TRY(qv_j_charge(run, 0));
    QV_TRY(qv_j_enter(run));
    QV_TRY(eval_node(run, scope, node, out));
    qv_j_leave(run);
    return QV_OK;
}

/* ---- Loops ----------------------------------------------------------------------------------- */

/* A loop that runs. Items pass the loop's condition when they are asked for, not before: the
 * condition may look at what the body does. */
struct qv_jloop {
    const qv_jnode *node;
    qv_jscope *scope;      /* around the loop */
    qv_jscope *test_scope; /* of its condition; NULL until that is needed */
    qv_jvalue *source;     /* [n_source] */
    size_t n_source, pos;
    qv_jvalue *items; /* those that passed: [n] so far */
    size_t n;
    size_t index;      /* of the current one */
    qv_jvalue changed; /* what loop.changed saw last, or absent */
};

/* Let items pass until `n` have, or none are left. */
static qv_status loop_fetch(qv_jrun *run, qv_jloop *loop, size_t n)
{
    const qv_jnode *test = loop->node->loop.test;
    if (!test)
        loop->n = loop->pos = loop->n_source;
    if (loop->n < n && !loop->test_scope)
        QV_TRY(new_scope(run, loop->scope, &loop->test_scope));
    while (loop->n < n && loop->pos < loop->n_source) {
        qv_jvalue item = loop->source[loop->pos++], passes;
        QV_TRY(assign(run, loop->test_scope, loop->node->loop.target, item));
        QV_TRY(eval(run, loop->test_scope, test, &passes));
        if (qv_j_truth(passes))
            loop->items[loop->n++] = item;
    }
    return QV_OK;
}

qv_status qv_j_loop_attribute(qv_jrun *run, qv_jloop *loop, qv_jstr name, qv_jvalue *out)
{
    int64_t index = (int64_t)loop->index;
    if (qv_j_str_is(name, "index0")) {
        *out = qv_j_int(index);
    } else if (qv_j_str_is(name, "index")) {
        *out = qv_j_int(index + 1);
    } else if (qv_j_str_is(name, "first")) {
        *out = qv_j_bool(index == 0);
    } else if (qv_j_str_is(name, "depth") || qv_j_str_is(name, "depth0")) {
        *out = qv_j_int(name.len == 5); /* loops are not recursive */
    } else if (qv_j_str_is(name, "previtem")) {
        if (index == 0)
            return qv_j_undefined_hint(run, "there is no previous item", out);
        *out = loop->items[index - 1];
    } else if (qv_j_str_is(name, "nextitem") || qv_j_str_is(name, "last")) {
        QV_TRY(loop_fetch(run, loop, loop->index + 2));
        bool last = loop->n < loop->index + 2;
        if (name.len == 4)
            *out = qv_j_bool(last);
        else if (last)
            return qv_j_undefined_hint(run, "there is no next item", out);
        else
            *out = loop->items[index + 1];
    } else if (qv_j_str_is(name, "length") || qv_j_str_is(name, "revindex") ||
               qv_j_str_is(name, "revindex0")) {
        QV_TRY(loop_fetch(run, loop, SIZE_MAX));
        int64_t n = (int64_t)loop->n;
        *out = qv_j_int(name.len == 6 ? n : name.len == 8 ? n - index : n - index - 1);
    }
    return QV_OK;
}

qv_status qv_j_loop_cycle(qv_jrun *run, qv_jloop *loop, const qv_jargs *args, qv_jvalue *out)
{
    if (args->n == 0)
        return qv_j_fail(run, "no items for cycling given");
    *out = args->values[loop->index % args->n];
    return QV_OK;
}

qv_status qv_j_loop_changed(qv_jrun *run, qv_jloop *loop, const qv_jargs *args, qv_jvalue *out)
{
    qv_jvalue now;
    bool same = false;
    QV_TRY(qv_j_seq(run, QV_J_TUPLE, args->n, &now));
    for (size_t i = 0; i < args->n; i++)
        now.seq->items[i] = args->values[i];
    QV_TRY(qv_j_equal(run, loop->changed, now, &same));
    loop->changed = now;
    *out = qv_j_bool(!same);
    return QV_OK;
}

/* Run the body for every item; `outer` holds the loop variable. Each item has a scope of its own,
 * but only macros keep theirs: without them, one serves all items. */
static qv_status run_loop(qv_jrun *run, qv_jscope *outer, qv_jloop *loop)
{
    const qv_jnode *node = loop->node;
    qv_jscope *scope = NULL;
    for (;; loop->index++) {
        QV_TRY(loop_fetch(run, loop, loop->index + 1));
        if (loop->index >= loop->n)
            return QV_OK;
        QV_TRY(qv_j_charge(run, 0));
        if (scope && !node->loop.has_macros)
            clear_scope(scope);
        else
            QV_TRY(new_scope(run, outer, &scope));
        QV_TRY(assign(run, scope, node->loop.target, loop->items[loop->index]));
        QV_TRY(run_body(run, scope, node->loop.body));
        qv_jflow flow = run->flow;
        run->flow = QV_J_GO_ON;
        if (flow == QV_J_BREAK)
            return QV_OK;
    }
}

static qv_status run_for(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    qv_jvalue iterable;
    qv_jscope *outer;
    void *memory;
    QV_TRY(eval(run, scope, node->loop.iterable, &iterable));
    QV_TRY(qv_j_alloc(run, 1, sizeof(qv_jloop), &memory));
    qv_jloop *loop = memory;
    *loop = (qv_jloop){.node = node, .scope = scope};
    QV_TRY(qv_j_iterate(run, iterable, &loop->source, &loop->n_source));
    loop->items = loop->source;
    if (node->loop.test) {
        QV_TRY(qv_j_alloc(run, loop->n_source, sizeof(qv_jvalue), &memory));
        loop->items = memory;
    }
    QV_TRY(new_scope(run, scope, &outer));
    QV_TRY(qv_j_set(run, outer, run->program->loop_name,
                    (qv_jvalue){.type = QV_J_LOOP, .loop = loop}));
    QV_TRY(run_loop(run, outer, loop));
    if (loop->n > 0 || node->loop.otherwise.n == 0)
        return QV_OK;
    QV_TRY(new_scope(run, scope, &outer));
    return run_body(run, outer, node->loop.otherwise);
}

/* ---- Statements ------------------------------------------------------------------------------ */

static qv_status run_if(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    for (size_t i = 0; i < node->choice.n; i++) {
        const qv_jbranch *branch = &node->choice.branches[i];
        qv_jvalue test = qv_j_bool(true);
        if (branch->test)
            QV_TRY(eval(run, scope, branch->test, &test));
        if (qv_j_truth(test))
            return run_body(run, scope, branch->body);
    }
    return QV_OK;
}

static qv_status run_print(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    qv_jvalue v;
    qv_jstr text;
    QV_TRY(eval(run, scope, node->operand, &v));
    QV_TRY(qv_j_to_str(run, v, &text));
    return print(run, text);
}

/* A body whose text goes through filters, if there are any. */
static qv_status capture_filtered(qv_jrun *run, qv_jscope *scope, qv_jnodes body,
                                  const qv_jnode *filter, qv_jvalue *out)
{
    qv_jscope *inner;
    QV_TRY(new_scope(run, scope, &inner));
    QV_TRY(capture(run, inner, body, out));
    return filter ? eval_filter(run, inner, filter, out, out) : QV_OK;
}

static qv_status run_set_block(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    qv_jvalue text;
    QV_TRY(capture_filtered(run, scope, node->set.body, node->set.value, &text));
    return assign(run, scope, node->set.target, text);
}

static qv_status run_filter_block(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    qv_jvalue v;
    qv_jstr text;
    QV_TRY(capture_filtered(run, scope, node->block.body, node->block.filter, &v));
    QV_TRY(qv_j_to_str(run, v, &text));
    return print(run, text);
}

static qv_status make_macro(qv_jrun *run, qv_jscope *scope, const qv_jnode *node, qv_jvalue *out)
{
    void *macro;
    QV_TRY(qv_j_alloc(run, 1, sizeof(qv_jmacro), &macro));
    *(qv_jmacro *)macro = (qv_jmacro){.node = node, .scope = scope};
    *out = (qv_jvalue){.type = QV_J_MACRO, .macro = macro};
    return QV_OK;
}

static qv_status run_macro(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    qv_jvalue macro;
    QV_TRY(make_macro(run, scope, node, &macro));
    return qv_j_set(run, scope, node->macro.name, macro);
}

/* `call f(x)`: f(x, caller=the body). */
static qv_status run_call_block(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    qv_jvalue callee, v;
    qv_jargs args;
    qv_jstr text;
    const qv_jnode *call = node->macro.call;
    QV_TRY(eval(run, scope, call->call.callee, &callee));
    QV_TRY(eval_args(run, scope, &call->call.args, 1, &args));
    args.named[args.n_named].name = QV_JSTR("caller");
    QV_TRY(make_macro(run, scope, node, &args.named[args.n_named++].value));
    QV_TRY(qv_j_call_value(run, callee, &args, &v));
    QV_TRY(qv_j_to_str(run, v, &text));
    return print(run, text);
}

/* `with` evaluates its values outside and its body inside of a scope of its own. */
static qv_status run_block(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    qv_jscope *inner;
    QV_TRY(new_scope(run, scope, &inner));
    for (size_t i = 0; i < node->block.n; i++) {
        qv_jvalue v;
        QV_TRY(eval(run, scope, node->block.values[i], &v));
        QV_TRY(assign(run, inner, node->block.targets[i], v));
    }
    return run_body(run, inner, node->block.body);
}

static qv_status run_set(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    qv_jvalue v;
    QV_TRY(eval(run, scope, node->set.value, &v));
    return assign(run, scope, node->set.target, v);
}

static qv_status run_statement(qv_jrun *run, qv_jscope *scope, const qv_jnode *node)
{
    run->line = node->line;
    QV_TRY(qv_j_charge(run, 0));
    switch ((qv_jnode_kind)node->kind) {
    case QV_JN_DATA:
        return print(run, node->data);
    case QV_JN_PRINT:
        return run_print(run, scope, node);
    case QV_JN_IF:
        return run_if(run, scope, node);
    case QV_JN_FOR:
        return run_for(run, scope, node);
    case QV_JN_SET:
        return run_set(run, scope, node);
    case QV_JN_SET_BLOCK:
        return run_set_block(run, scope, node);
    case QV_JN_MACRO:
        return run_macro(run, scope, node);
    case QV_JN_CALL_BLOCK:
        return run_call_block(run, scope, node);
    case QV_JN_FILTER_BLOCK:
        return run_filter_block(run, scope, node);
    case QV_JN_WITH:
    case QV_JN_SCOPE:
        return run_block(run, scope, node);
    default:
        QV_ASSERT(node->kind == QV_JN_BREAK || node->kind == QV_JN_CONTINUE);
        run->flow = node->kind == QV_JN_BREAK ? QV_J_BREAK : QV_J_CONTINUE;
        return QV_OK;
    }
}

static qv_status run_body(qv_jrun *run, qv_jscope *scope, qv_jnodes body)
{
    QV_TRY(qv_j_enter(run));
    for (size_t i = 0; i < body.n && run->flow == QV_J_GO_ON; i++)
        QV_TRY(run_statement(run, scope, body.nodes[i]));
    qv_j_leave(run);
    return QV_OK;
}

qv_status qv_j_run(qv_jrun *run)
{
    QV_TRY(run_body(run, run->globals, run->program->body));
    return print(run, (qv_jstr){"", 0});
}
