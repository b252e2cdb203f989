#include "models/config_read.h"

#include "common/json.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

/* A field that is there and not null, or NULL. */
static const json_t *field(const json_t *obj, const char *key)
{
    const json_t *value = json_object_get(obj, key);
    return json_is_null(value) ? NULL : value;
}

/* "key is VALUE" for a field that is not supported. */
static qv_status unsupported(const json_t *value, const char *key, const char *where,
                             const char *only)
{
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
    qv_status status = qv_fail(QV_ERR_UNSUPPORTED, "%s: %s is %.200s: %s", where, key,
                               text ? text : "(unprintable)", only);
    free(text);
    return status;
}

qv_status qv_config_int(const json_t *obj, const char *key, const char *where, int64_t fallback,
                        int64_t min, int64_t max, int64_t *out)
{
    int64_t value = fallback;
    if (fallback == QV_CONFIG_REQUIRED)
        QV_TRY(qv_json_get_int(obj, key, where, &value));
    else
        QV_TRY(qv_json_opt_int(obj, key, where, &value));
    if (value < min || value > max)
        return qv_fail(QV_ERR_FORMAT,
                       "%s: %s is %" PRId64 ", which is not between %" PRId64 " and %" PRId64,
                       where, key, value, min, max);
    *out = value;
    return QV_OK;
}

qv_status qv_config_double(const json_t *obj, const char *key, const char *where, double min,
                           double max, double *out)
{
    double value = *out;
    QV_TRY(qv_json_opt_double(obj, key, where, &value));
    if (!(value >= min && value <= max))
        return qv_fail(QV_ERR_FORMAT, "%s: %s is %g, which is not between %g and %g", where, key,
                       value, min, max);
    *out = value;
    return QV_OK;
}

qv_status qv_config_expect_bool(const json_t *obj, const char *key, const char *where, bool value)
{
    bool found = value;
    QV_TRY(qv_json_opt_bool(obj, key, where, &found));
    if (found != value)
        return unsupported(json_object_get(obj, key), key, where,
                           value ? "only true is implemented" : "only false is implemented");
    return QV_OK;
}

qv_status qv_config_expect_str(const json_t *obj, const char *key, const char *where,
                               const char *value)
{
    const char *found = value;
    QV_TRY(qv_json_opt_str(obj, key, where, &found));
    if (strcmp(found, value) != 0) {
        char only[96];
        snprintf(only, sizeof only, "only \"%s\" is implemented", value);
        return unsupported(json_object_get(obj, key), key, where, only);
    }
    return QV_OK;
}

qv_status qv_config_expect_unset(const json_t *obj, const char *key, const char *where)
{
    const json_t *value = field(obj, key);
    bool unset = value == NULL || json_is_false(value) ||
                 (json_is_number(value) && json_number_value(value) == 0) ||
                 (json_is_string(value) && json_string_length(value) == 0) ||
                 (json_is_array(value) && json_array_size(value) == 0) ||
                 (json_is_object(value) && json_object_size(value) == 0);
    return unset ? QV_OK : unsupported(value, key, where, "not supported");
}

qv_status qv_config_expect_multiple(int64_t a, const char *a_name, int64_t b, const char *b_name,
                                    const char *where)
{
    if (a <= 0 || b <= 0 || a % b != 0)
        return qv_fail(QV_ERR_FORMAT, "%s: %s %" PRId64 " is not a multiple of %s %" PRId64, where,
                       a_name, a, b_name, b);
    return QV_OK;
}

qv_status qv_config_dims(const json_t *obj, const qv_config_dim *dims, size_t n, const char *where)
{
    for (size_t i = 0; i < n; i++)
        QV_TRY(qv_config_int(obj, dims[i].key, where, dims[i].fallback, dims[i].min, dims[i].max,
                             dims[i].out));
    return QV_OK;
}
