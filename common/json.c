#include "common/json.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- loading -------------------------------------------------------------------------------- */

static qv_status read_file(const char *path, size_t max_bytes, char **text, size_t *size)
{
    FILE *file = fopen(path, "rbe");
    if (file == NULL)
        return qv_fail(errno == ENOENT ? QV_ERR_NOT_FOUND : QV_ERR_IO, "%s: %s", path,
                       strerror(errno));
    char *data = NULL;
    size_t used = 0, room = 0;
    qv_status status = QV_OK;
    /* Read until the end rather than trust a size: the path may be a pipe. */
    for (;;) {
        if (used == room) {
            room = room != 0 ? room * 2 : 16384;
            char *larger = realloc(data, room);
            if (larger == NULL) {
                status = qv_fail(QV_ERR_NOMEM, "%s: no memory for %zu bytes", path, room);
                break;
            }
            data = larger;
        }
        size_t n = fread(data + used, 1, room - used, file);
        used += n;
        if (used > max_bytes) {
            status = qv_fail(QV_ERR_LIMIT, "%s: larger than %zu bytes", path, max_bytes);
            break;
        }
        if (n == 0) {
            if (ferror(file))
                status = qv_fail(QV_ERR_IO, "%s: %s", path, strerror(errno));
            break;
        }
    }
    fclose(file);
    if (status != QV_OK) {
        free(data);
        return status;
    }
    *text = data;
    *size = used;
    return QV_OK;
}

qv_status qv_json_load_file(const char *path, size_t max_bytes, json_t **out)
{
    char *text = NULL;
    size_t size = 0;
    QV_TRY(read_file(path, max_bytes, &text, &size));
    qv_status status = qv_json_load(text, size, path, out);
    free(text);
    return status;
}

/* Whether the `n` digits of an integer are more than an int64_t holds. */
static bool is_large_integer(const char *digits, size_t n, bool negative)
{
    const char *limit = negative ? "9223372036854775808" : "9223372036854775807";
    return n > strlen(limit) || (n == strlen(limit) && memcmp(digits, limit, n) > 0);
}

/* Copy a text with what JSON has no number for made readable: ".0" is put behind each integer that
 * an int64_t cannot hold, so that it is read as a real (some writers say "no limit" by 10^30,
 * written out), and a bare Infinity, as Python writes it, becomes the largest double. The caller
 * frees; NULL without memory. */
static char *widen_numbers(const char *text, size_t size, size_t *out_size)
{
    static const char infinity[] = "Infinity", largest[] = "1.7976931348623157e308";
    /* Such integers have at least 19 digits and get 2 characters, 8 become 22. */
    char *copy = malloc(size * 3 + 2);
    size_t used = 0;
    bool in_string = false;
    for (size_t i = 0, n; copy != NULL && i < size; i += n) {
        n = 1;
        bool large = false;
        char before = i > 0 ? text[i - 1] : ' ';
        if (text[i] == '"') {
            in_string = !in_string;
        } else if (in_string && text[i] == '\\' && i + 1 < size) {
            n = 2;
        } else if (!in_string && isdigit((unsigned char)text[i])) {
            while (i + n < size && isdigit((unsigned char)text[i + n]))
                n++;
            char after = i + n < size ? text[i + n] : ' ';
            bool is_integer = after != '.' && tolower(after) != 'e';
            bool is_fraction = before == '.' || before == '+' || tolower(before) == 'e';
            large = is_integer && !is_fraction && is_large_integer(text + i, n, before == '-');
        } else if (!in_string && size - i >= strlen(infinity) &&
                   memcmp(text + i, infinity, strlen(infinity)) == 0) {
            memcpy(copy + used, largest, strlen(largest));
            used += strlen(largest);
            n = strlen(infinity);
            continue;
        }
        memcpy(copy + used, text + i, n);
        used += n;
        if (large) {
            memcpy(copy + used, ".0", 2);
            used += 2;
        }
    }
    *out_size = used;
    return copy;
}

qv_status qv_json_load(const char *text, size_t size, const char *where, json_t **out)
{
    const size_t flags = JSON_REJECT_DUPLICATES | JSON_DECODE_ANY;
    json_error_t error;
    json_t *value = json_loadb(text, size, flags, &error);
    if (value == NULL && (json_error_code(&error) == json_error_numeric_overflow ||
                          memmem(text, size, "Infinity", strlen("Infinity")) != NULL)) {
        size_t wide_size;
        char *wide = widen_numbers(text, size, &wide_size);
        if (wide == NULL)
            return qv_fail(QV_ERR_NOMEM, "%s: no memory for %zu bytes", where, size);
        value = json_loadb(wide, wide_size, flags, &error);
        free(wide);
    }
    if (value == NULL)
        return qv_fail(QV_ERR_FORMAT, "%s: line %d, column %d: %s", where, error.line, error.column,
                       error.text);
    *out = value;
    return QV_OK;
}

/* --- fields --------------------------------------------------------------------------------- */

static const char *type_name(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    case JSON_NULL:
        return "null";
    }
    return "of no type";
}

/* The value of a key, or NULL when it is absent or null. */
static qv_status find(const json_t *obj, const char *key, const char *where, const json_t **value)
{
    if (!json_is_object(obj))
        return qv_fail(QV_ERR_FORMAT, "%s: \"%s\" is looked up in what is %s, not an object", where,
                       key, obj != NULL ? type_name(obj) : "absent");
    const json_t *found = json_object_get(obj, key);
    *value = found != NULL && !json_is_null(found) ? found : NULL;
    return QV_OK;
}

static qv_status wrong_type(const json_t *value, const char *key, const char *where,
                            const char *expected)
{
    return qv_fail(QV_ERR_FORMAT, "%s: \"%s\" is %s, expected %s", where, key, type_name(value),
                   expected);
}

static qv_status missing(const char *key, const char *where)
{
    return qv_fail(QV_ERR_FORMAT, "%s: \"%s\" is missing", where, key);
}

static qv_status read_int(const json_t *value, const char *key, const char *where, int64_t *out)
{
    if (json_is_integer(value)) {
        *out = json_integer_value(value);
        return QV_OK;
    }
    double real = json_real_value(value);
    if (!json_is_real(value))
        return wrong_type(value, key, where, "an integer");
    /* Both bounds are exact doubles; the upper one is already too large for an int64_t. */
    if (real != trunc(real) || real < -0x1p63 || real >= 0x1p63)
        return qv_fail(QV_ERR_FORMAT, "%s: \"%s\" is %.17g, expected an integer", where, key, real);
    *out = (int64_t)real;
    return QV_OK;
}

static qv_status read_double(const json_t *value, const char *key, const char *where, double *out)
{
    if (!json_is_number(value))
        return wrong_type(value, key, where, "a number");
    *out = json_number_value(value);
    return QV_OK;
}

static qv_status read_bool(const json_t *value, const char *key, const char *where, bool *out)
{
    if (!json_is_boolean(value))
        return wrong_type(value, key, where, "true or false");
    *out = json_is_true(value);
    return QV_OK;
}

static qv_status read_str(const json_t *value, const char *key, const char *where, const char **out)
{
    if (!json_is_string(value))
        return wrong_type(value, key, where, "a string");
    *out = json_string_value(value);
    return QV_OK;
}

/* get and opt of one type: they differ only in what an absent value means. */
#define QV_JSON_FIELD(name, type)                                                                  \
    qv_status qv_json_get_##name(const json_t *obj, const char *key, const char *where, type *out) \
    {                                                                                              \
        const json_t *value;                                                                       \
        QV_TRY(find(obj, key, where, &value));                                                     \
        return value != NULL ? read_##name(value, key, where, out) : missing(key, where);          \
    }                                                                                              \
                                                                                                   \
    qv_status qv_json_opt_##name(const json_t *obj, const char *key, const char *where, type *out) \
    {                                                                                              \
        const json_t *value;                                                                       \
        QV_TRY(find(obj, key, where, &value));                                                     \
        return value != NULL ? read_##name(value, key, where, out) : QV_OK;                        \
    }

QV_JSON_FIELD(int, int64_t)
QV_JSON_FIELD(double, double)
QV_JSON_FIELD(bool, bool)
QV_JSON_FIELD(str, const char *)
