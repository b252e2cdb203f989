/* Attributes and items of values, as jinja2's immutable sandbox gives them.
 */
#include "models/jinja.h"
#include "models/unicode.h"

#include <string.h>

/* ---- Attributes ------------------------------------------------------------------------------ */

/* Undefined, with the sandbox's reason. */
static qv_status unsafe_attribute(qv_jrun *run, qv_jvalue obj, qv_jstr name, qv_jvalue *out)
{
    qv_jbuilder b = {.run = run};
    const char *type = qv_j_type_name(obj);
    QV_TRY(qv_j_add_text(&b, QV_JSTR("access to attribute ")));
    QV_TRY(qv_j_add_repr(&b, qv_j_str(name.data, name.len)));
    QV_TRY(qv_j_add_text(&b, QV_JSTR(" of '")));
    QV_TRY(qv_j_add(&b, type, strlen(type)));
    QV_TRY(qv_j_add(&b, "' object is unsafe.", sizeof "' object is unsafe."));
    return qv_j_undefined_hint(run, b.data, out);
}

/* The attribute that a value has by its type; absent in *out if there is none. */
static qv_status own_attribute(qv_jrun *run, qv_jvalue obj, qv_jstr name, qv_jvalue *out)
{
    *out = (qv_jvalue){.type = QV_J_ABSENT};
    if (name.len > 4 && memcmp(name.data, "__", 2) == 0 &&
        memcmp(name.data + name.len - 2, "__", 2) == 0)
        return unsafe_attribute(run, obj, name, out);
    if (obj.type == QV_J_NAMESPACE) {
        qv_jentry *entry = qv_j_dict_find_str(run, obj.dict, name);
        if (entry)
            *out = entry->value;
        return QV_OK;
    }
    const qv_jcallable *method = qv_j_find_method(obj.type, name);
    if (method && !method->fn)
        return unsafe_attribute(run, obj, name, out);
    if (method) {
        void *bound;
        QV_TRY(qv_j_alloc(run, 1, sizeof(qv_jmethod), &bound));
        *(qv_jmethod *)bound = (qv_jmethod){.self = obj, .callable = method};
        *out = (qv_jvalue){.type = QV_J_METHOD, .method = bound};
        return QV_OK;
    }
    return obj.type == QV_J_LOOP ? qv_j_loop_attribute(run, obj.loop, name, out) : QV_OK;
}

qv_status qv_j_attribute(qv_jrun *run, qv_jvalue obj, qv_jstr name, qv_jvalue *out)
{
    QV_TRY(qv_j_charge(run, 0));
    if (obj.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, obj);
    QV_TRY(own_attribute(run, obj, name, out));
    if (!qv_j_is_absent(*out))
        return QV_OK;
    qv_jentry *entry = obj.type == QV_J_DICT ? qv_j_dict_find_str(run, obj.dict, name) : NULL;
    if (entry) {
        *out = entry->value;
        return QV_OK;
    }
    return qv_j_undefined(run, qv_j_object_name(obj), qv_j_str(name.data, name.len), out);
}

/* ---- Items ----------------------------------------------------------------------------------- */

static bool is_indexed(qv_jvalue v)
{
    return v.type == QV_J_LIST || v.type == QV_J_TUPLE || v.type == QV_J_RANGE;
}

/* Whether keys of this type can be looked up in a dict. */
static bool is_hashable(qv_jvalue key)
{
    if (key.type == QV_J_LIST || key.type == QV_J_DICT)
        return false;
    for (size_t i = 0; key.type == QV_J_TUPLE && i < key.seq->n; i++) {
        if (key.seq->items[i].type == QV_J_LIST || key.seq->items[i].type == QV_J_DICT)
            return false;
    }
    return true;
}

/* obj[key] where the type allows it; absent in *out otherwise. */
static qv_status own_item(qv_jrun *run, qv_jvalue obj, qv_jvalue key, qv_jvalue *out)
{
    int64_t i;
    *out = (qv_jvalue){.type = QV_J_ABSENT};
    if (obj.type == QV_J_DICT) {
        qv_jentry *entry = NULL;
        if (is_hashable(key))
            QV_TRY(qv_j_dict_find(run, obj.dict, key, &entry));
        if (entry)
            *out = entry->value;
        return QV_OK;
    }
    if (!qv_j_as_int(key, &i))
        return QV_OK;
    if (is_indexed(obj)) {
        i += i < 0 ? (int64_t)obj.seq->n : 0;
        if (i >= 0 && (size_t)i < obj.seq->n)
            *out = obj.seq->items[i];
    } else if (obj.type == QV_J_STR) {
        size_t n = qv_unicode_count(obj.str, obj.len), size;
        i += i < 0 ? (int64_t)n : 0;
        QV_TRY(qv_j_charge(run, obj.len));
        if (i >= 0 && (size_t)i < n) {
            size_t at = qv_j_offset(qv_j_text(obj), i);
            qv_unicode_get(obj.str + at, &size);
            *out = qv_j_make_text((qv_jstr){obj.str + at, size}, obj.safe);
        }
    }
    return QV_OK;
}

qv_status qv_j_item(qv_jrun *run, qv_jvalue obj, qv_jvalue key, qv_jvalue *out)
{
    QV_TRY(qv_j_charge(run, 0));
    if (obj.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, obj);
    QV_TRY(own_item(run, obj, key, out));
    if (qv_j_is_absent(*out) && key.type == QV_J_STR)
        QV_TRY(own_attribute(run, obj, qv_j_text(key), out));
    return qv_j_is_absent(*out) ? qv_j_undefined(run, qv_j_object_name(obj), key, out) : QV_OK;
}

/* ---- Slices ---------------------------------------------------------------------------------- */

/* A slice index; *given is false for none and absent. */
static qv_status slice_index(qv_jrun *run, qv_jvalue v, bool *given, int64_t *out)
{
    *given = !qv_j_is_absent(v) && v.type != QV_J_NONE;
    if (*given && !qv_j_as_int(v, out))
        return qv_j_fail(run, "slice indices must be integers or None or have an __index__ method");
    return QV_OK;
}

/* Bring an index into [lo, hi], counting from the end if negative. */
static int64_t clamp_index(int64_t i, int64_t n, int64_t lo, int64_t hi)
{
    if (i < 0)
        i += n;
    return i < lo ? lo : i > hi ? hi : i;
}

/* Every `step`-th character from `start`, n of them. */
static qv_status slice_text(qv_jrun *run, qv_jvalue obj, int64_t start, int64_t step, size_t n,
                            qv_jvalue *out)
{
    qv_jstr s = qv_j_text(obj);
    QV_TRY(qv_j_charge(run, s.len));
    if (step == 1) {
        size_t from = qv_j_offset(s, start), to = from;
        to += qv_j_offset((qv_jstr){s.data + from, s.len - from}, (int64_t)n);
        *out = qv_j_make_text((qv_jstr){s.data + from, to - from}, obj.safe);
        return QV_OK;
    }
    qv_jvalue *chars;
    size_t n_chars;
    qv_jbuilder b = {.run = run};
    QV_TRY(qv_j_iterate(run, obj, &chars, &n_chars));
    for (size_t i = 0; i < n; i++)
        QV_TRY(qv_j_add_text(&b, qv_j_text(chars[start + (int64_t)i * step])));
    *out = qv_j_built(&b);
    out->safe = obj.safe;
    return QV_OK;
}

qv_status qv_j_slice(qv_jrun *run, qv_jvalue obj, qv_jvalue start_v, qv_jvalue stop_v,
                     qv_jvalue step_v, qv_jvalue *out)
{
    int64_t start = 0, stop = 0, step = 1;
    bool has_start, has_stop, has_step;
    if (obj.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, obj);
    if (obj.type == QV_J_DICT)
        return qv_j_fail(run, "unhashable type: 'slice'");
    if (obj.type != QV_J_STR && !is_indexed(obj))
        return qv_j_fail(run, "'%s' object is not subscriptable", qv_j_type_name(obj));
    QV_TRY(slice_index(run, start_v, &has_start, &start));
    QV_TRY(slice_index(run, stop_v, &has_stop, &stop));
    QV_TRY(slice_index(run, step_v, &has_step, &step));
    if (step == 0)
        return qv_j_fail(run, "slice step cannot be zero");
    /* A step beyond any length takes one item; bounding it keeps the sums below in range. */
    step = step > INT32_MAX ? INT32_MAX : step < -INT32_MAX ? -INT32_MAX : step;
    size_t len;
    QV_TRY(qv_j_length(run, obj, &len));
    int64_t n = (int64_t)len, lo = step < 0 ? -1 : 0, hi = step < 0 ? n - 1 : n;
    start = has_start ? clamp_index(start, n, lo, hi) : step < 0 ? hi : lo;
    stop = has_stop ? clamp_index(stop, n, lo, hi) : step < 0 ? lo : hi;
    int64_t span = step > 0 ? stop - start : start - stop;
    int64_t stride = step > 0 ? step : -step;
    size_t count = span > 0 ? (size_t)((span + stride - 1) / stride) : 0;
    if (obj.type == QV_J_STR)
        return slice_text(run, obj, start, step, count, out);
    QV_TRY(qv_j_seq(run, obj.type == QV_J_TUPLE ? QV_J_TUPLE : QV_J_LIST, count, out));
    for (size_t i = 0; i < count; i++)
        out->seq->items[i] = obj.seq->items[start + (int64_t)i * step];
    return QV_OK;
}
