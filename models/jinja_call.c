/* Arguments and calls: how what a template writes in parentheses meets the parameters of filters,
 * tests, methods and functions.
 */
#include "models/jinja.h"

/* ---- Arguments ------------------------------------------------------------------------------- */

qv_status qv_j_text_arg(qv_jrun *run, qv_jvalue v, qv_jstr *out)
{
    *out = qv_j_text(v);
    if (v.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, v);
    if (v.type != QV_J_STR)
        return qv_j_fail(run, "expected a string, not '%s'", qv_j_type_name(v));
    return QV_OK;
}

qv_status qv_j_int_arg(qv_jrun *run, qv_jvalue v, int64_t *out)
{
    if (qv_j_is_absent(v))
        return QV_OK;
    if (v.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, v);
    if (!qv_j_as_int(v, out))
        return qv_j_fail(run, "'%s' object cannot be interpreted as an integer", qv_j_type_name(v));
    return QV_OK;
}

const qv_jcallable *qv_j_find_in(const qv_jcallable *table, size_t n, qv_jstr name)
{
    for (size_t i = 0; i < n; i++) {
        if (qv_j_str_is(name, table[i].name))
            return &table[i];
    }
    return NULL;
}

/* ---- Calling --------------------------------------------------------------------------------- */

static size_t n_params(const qv_jcallable *callable)
{
    size_t n = 0;
    while (n < QV_J_MAX_PARAMS && callable->params[n])
        n++;
    return n;
}

/* The index of a parameter that may be given by name, or n_params. */
static size_t find_param(const qv_jcallable *callable, qv_jstr name)
{
    size_t n = n_params(callable);
    for (size_t i = 0; i < n && !callable->positional; i++) {
        if (qv_j_str_is(name, callable->params[i]))
            return i;
    }
    return n;
}

qv_status qv_j_check_args(const char *kind, const qv_jcallable *callable, size_t n,
                          const qv_jstr *names, size_t n_names)
{
    size_t max = n_params(callable);
    bool given[QV_J_MAX_PARAMS] = {false};
    if (callable->rest)
        return QV_OK;
    if (n > max)
        return qv_fail(QV_ERR_ARG, "%s '%s' takes at most %zu arguments, got %zu", kind,
                       callable->name, max, n);
    for (size_t i = 0; i < n_names; i++) {
        size_t param = find_param(callable, names[i]);
        if (param == max)
            return qv_fail(QV_ERR_ARG, "%s '%s' takes no argument '%.*s'", kind, callable->name,
                           QV_JSTR_ARG(names[i]));
        if (param < n)
            return qv_fail(QV_ERR_ARG, "%s '%s' gets argument '%s' twice", kind, callable->name,
                           callable->params[param]);
        given[param] = true;
    }
    for (size_t i = n; i < callable->n_required; i++) {
        if (!given[i])
            return qv_fail(QV_ERR_ARG, "%s '%s' lacks argument '%s'", kind, callable->name,
                           callable->params[i]);
    }
    return QV_OK;
}

qv_status qv_j_call(qv_jrun *run, const char *kind, const qv_jcallable *callable, qv_jvalue self,
                    const qv_jargs *args, qv_jvalue *out)
{
    qv_jstr names[QV_J_MAX_PARAMS];
    qv_jcall call = {.self = self, .all = args, .negate = callable->negate};
    size_t max = n_params(callable);
    if (!callable->rest) {
        size_t n_names = args->n_named < QV_J_MAX_PARAMS ? args->n_named : QV_J_MAX_PARAMS;
        for (size_t i = 0; i < n_names; i++)
            names[i] = args->named[i].name;
        if (args->n + args->n_named > max ||
            qv_j_check_args(kind, callable, args->n, names, n_names) != QV_OK)
            return args->n + args->n_named > max
                       ? qv_j_fail(run, "%s '%s' takes at most %zu arguments", kind, callable->name,
                                   max)
                       : qv_j_fail(run, "%s", qv_error());
    }
    for (size_t i = 0; i < args->n && i < max; i++)
        call.args[i] = args->values[i];
    for (size_t i = 0; i < args->n_named; i++) {
        size_t param = find_param(callable, args->named[i].name);
        if (param < max)
            call.args[param] = args->named[i].value;
    }
    return callable->fn(run, &call, out);
}
