#include "common/want.h"

#include "common/arena.h"
#include "common/utf8.h"

#include <stdlib.h>
#include <string.h>

struct qv_want_box {
    qv_want want;
    qv_arena arena; /* what `want` points to */
};

/* --- names ----------------------------------------------------------------------------------- */

qv_status qv_check_id(const char *id, size_t size)
{
    if (size == 0 || size > QV_ID_MAX)
        return qv_fail(QV_ERR_ARG, "an id has %zu bytes, not 1 to %d", size, QV_ID_MAX);
    for (size_t i = 0; i < size; i++) {
        char c = id[i];
        bool word = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!word && (c == 0 || strchr("._-:@", c) == NULL))
            return qv_fail(QV_ERR_ARG,
                           "an id has byte 0x%02X at %zu, only letters, digits and ._-:@ may be",
                           (unsigned char)c, i);
    }
    return QV_OK;
}

/* --- fields of a want ------------------------------------------------------------------------ */

static qv_status out_of_memory(void)
{
    return qv_fail(QV_ERR_NOMEM, "out of memory for what is wanted");
}

static const char *trim(const char *text, size_t *size)
{
    while (*size > 0 && (*text == ' ' || *text == '\t'))
        text++, (*size)--;
    while (*size > 0 && (text[*size - 1] == ' ' || text[*size - 1] == '\t'))
        (*size)--;
    return text;
}

static qv_status set_path(qv_want_box *box, const char *value, size_t size)
{
    value = trim(value, &size);
    if (size == 0)
        return qv_fail(QV_ERR_ARG, "path is empty");
    if (size > QV_WANT_MAX_PATH)
        return qv_fail(QV_ERR_ARG, "path has %zu bytes, more than %d", size, QV_WANT_MAX_PATH);
    if (!qv_utf8_valid(value, size) || memchr(value, 0, size) != NULL)
        return qv_fail(QV_ERR_ARG, "path is not UTF-8 or has a zero byte");
    box->want.path = qv_arena_strndup(&box->arena, value, size);
    return box->want.path != NULL ? QV_OK : out_of_memory();
}

static qv_status set_replicas(qv_want_box *box, const char *value, size_t size)
{
    int64_t n = 0;
    value = trim(value, &size);
    bool ok = size > 0 && size <= 6;
    for (size_t i = 0; ok && i < size; i++) {
        ok = value[i] >= '0' && value[i] <= '9';
        n = n * 10 + (value[i] - '0');
    }
    if (!ok || n > QV_WANT_MAX_REPLICAS)
        return qv_fail(QV_ERR_ARG, "replicas is '%.*s', not a number from 0 to %d",
                       (int)(size < 40 ? size : 40), value, QV_WANT_MAX_REPLICAS);
    box->want.replicas = n;
    return QV_OK;
}

static qv_status set_pin(qv_want_box *box, const char *value, size_t size)
{
    static const struct {
        const char *text;
        bool value;
    } texts[] = {{"0", false},  {"1", true},   {"false", false}, {"true", true},
                 {"no", false}, {"yes", true}, {"off", false},   {"on", true}};
    value = trim(value, &size);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (strlen(texts[i].text) == size && memcmp(texts[i].text, value, size) == 0) {
            box->want.pin = texts[i].value;
            return QV_OK;
        }
    return qv_fail(QV_ERR_ARG, "pin is '%.*s', not 0 or 1", (int)(size < 40 ? size : 40), value);
}

static bool is_separator(char c)
{
    return c == ',' || c == ' ' || c == '\t';
}

static qv_status set_workers(qv_want_box *box, const char *value, size_t size)
{
    const char **list =
        qv_arena_alloc(&box->arena, QV_WANT_MAX_WORKERS * sizeof *list, _Alignof(char *));
    size_t n = 0;
    if (list == NULL)
        return out_of_memory();
    for (size_t i = 0, end; i < size; i = end) {
        end = i + 1;
        if (is_separator(value[i]))
            continue;
        while (end < size && !is_separator(value[end]))
            end++;
        qv_status status = qv_check_id(value + i, end - i);
        if (status != QV_OK)
            return qv_fail_prefix(status, "workers");
        if (n == QV_WANT_MAX_WORKERS)
            return qv_fail(QV_ERR_ARG, "workers has more than %d ids", QV_WANT_MAX_WORKERS);
        if ((list[n++] = qv_arena_strndup(&box->arena, value + i, end - i)) == NULL)
            return out_of_memory();
    }
    box->want.workers = list;
    box->want.n_workers = n;
    return QV_OK;
}

static const struct {
    const char *name;
    qv_status (*set)(qv_want_box *box, const char *value, size_t size);
} rows[] = {
    {"path", set_path}, {"replicas", set_replicas}, {"pin", set_pin}, {"workers", set_workers}};

static qv_status set_field(qv_want_box *box, const qv_want_field *field)
{
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (strlen(rows[i].name) == field->name_size &&
            memcmp(rows[i].name, field->name, field->name_size) == 0)
            return rows[i].set(box, field->value, field->value_size);
    return QV_OK;
}

qv_status qv_want_parse(const qv_want_field *fields, size_t n, qv_want_box **out)
{
    qv_want_box *box = calloc(1, sizeof *box);
    if (box == NULL)
        return out_of_memory();
    qv_arena_init(&box->arena, 256, 0);
    box->want.replicas = 1;
    qv_status status = QV_OK;
    for (size_t i = 0; i < n && status == QV_OK; i++)
        status = set_field(box, &fields[i]);
    if (status == QV_OK && box->want.path == NULL)
        status = qv_fail(QV_ERR_ARG, "there is no path");
    if (status != QV_OK) {
        qv_want_free(box);
        return status;
    }
    *out = box;
    return QV_OK;
}

void qv_want_free(qv_want_box *box)
{
    if (box == NULL)
        return;
    qv_arena_deinit(&box->arena);
    free(box);
}

const qv_want *qv_want_get(const qv_want_box *box)
{
    return &box->want;
}

bool qv_want_equal(const qv_want *a, const qv_want *b)
{
    if (strcmp(a->path, b->path) != 0 || a->replicas != b->replicas || a->pin != b->pin ||
        a->n_workers != b->n_workers)
        return false;
    for (size_t i = 0; i < a->n_workers; i++)
        if (strcmp(a->workers[i], b->workers[i]) != 0)
            return false;
    return true;
}
