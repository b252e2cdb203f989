/* The functions that every template finds: range, dict, namespace, raise_exception, strftime_now.
 */
#include "models/jinja.h"

#include <string.h>
#include <time.h>

#define FUNCTION(name) static qv_status name(qv_jrun *run, qv_jcall *call, qv_jvalue *out)

FUNCTION(global_range)
{
    int64_t start = 0, stop = 0, step = 1;
    bool one = qv_j_is_absent(call->args[1]);
    QV_TRY(qv_j_int_arg(run, call->args[0], one ? &stop : &start));
    QV_TRY(qv_j_int_arg(run, call->args[1], &stop));
    QV_TRY(qv_j_int_arg(run, call->args[2], &step));
    return qv_j_range(run, start, stop, step, out);
}

/* Put the entries of a mapping, or of pairs, into a dict. */
static qv_status add_entries(qv_jrun *run, qv_jdict *dict, qv_jvalue from)
{
    if (from.type == QV_J_DICT) {
        for (uint32_t i = 0; i < from.dict->n; i++)
            QV_TRY(
                qv_j_dict_set(run, dict, from.dict->entries[i].key, from.dict->entries[i].value));
        return QV_OK;
    }
    qv_jvalue *items, *pair;
    size_t n, n_pair;
    QV_TRY(qv_j_iterate(run, from, &items, &n));
    for (size_t i = 0; i < n; i++) {
        QV_TRY(qv_j_iterate(run, items[i], &pair, &n_pair));
        if (n_pair != 2)
            return qv_j_fail(
                run, "dictionary update sequence element #%zu has length %zu; 2 is required", i,
                n_pair);
        QV_TRY(qv_j_dict_set(run, dict, pair[0], pair[1]));
    }
    return QV_OK;
}

static qv_status make_dict(qv_jrun *run, qv_jcall *call, qv_jtype type, qv_jvalue *out)
{
    const qv_jargs *args = call->all;
    QV_TRY(qv_j_dict(run, type, args->n_named, out));
    if (args->n > 1)
        return qv_j_fail(run, "dict expected at most 1 argument, got %zu", args->n);
    if (args->n == 1)
        QV_TRY(add_entries(run, out->dict, args->values[0]));
    for (size_t i = 0; i < args->n_named; i++)
        QV_TRY(qv_j_dict_set(run, out->dict,
                             qv_j_str(args->named[i].name.data, args->named[i].name.len),
                             args->named[i].value));
    return QV_OK;
}

FUNCTION(global_dict)
{
    return make_dict(run, call, QV_J_DICT, out);
}

FUNCTION(global_namespace)
{
    return make_dict(run, call, QV_J_NAMESPACE, out);
}

/* The template's own refusal: its words are the whole error. */
FUNCTION(global_raise_exception)
{
    qv_jstr message;
    *out = qv_j_none();
    QV_TRY(qv_j_to_str(run, call->args[0], &message));
    return qv_fail(QV_ERR_ARG, "%.*s",
                   (int)(message.len < QV_ERROR_MAX ? message.len : QV_ERROR_MAX), message.data);
}

FUNCTION(global_strftime_now)
{
    qv_jstr format;
    char pattern[256], text[1024];
    struct tm tm;
    time_t now = run->limits.now_s ? (time_t)run->limits.now_s : time(NULL);
    QV_TRY(qv_j_text_arg(run, call->args[0], &format));
    if (format.len >= sizeof pattern || memchr(format.data, '\0', format.len))
        return qv_j_fail(run, "strftime_now: the format is too long");
    memcpy(pattern, format.data, format.len);
    pattern[format.len] = '\0';
    if (!localtime_r(&now, &tm))
        return qv_j_fail(run, "strftime_now: there is no such time");
    size_t n = strftime(text, sizeof text, pattern, &tm);
    if (n == 0 && format.len > 0)
        return qv_j_fail(run, "strftime_now: '%s' gives no text, or too much", pattern);
    qv_jbuilder b = {.run = run};
    QV_TRY(qv_j_add(&b, text, n));
    *out = qv_j_built(&b);
    return QV_OK;
}

static const qv_jcallable functions[] = {
    {.name = "dict", .fn = global_dict, .rest = true},
    {.name = "namespace", .fn = global_namespace, .rest = true},
    {.name = "raise_exception",
     .fn = global_raise_exception,
     .params = {"message"},
     .n_required = 1},
    {.name = "range",
     .fn = global_range,
     .params = {"start", "stop", "step"},
     .n_required = 1,
     .positional = true},
    {.name = "strftime_now", .fn = global_strftime_now, .params = {"format"}, .n_required = 1},
};

const qv_jcallable *qv_j_find_function(qv_jstr name)
{
    return qv_j_find_in(functions, sizeof functions / sizeof functions[0], name);
}
