#include "common/want.h"

#include "common/arena.h"
#include "common/protocol.h"
#include "common/utf8.h"

#include <stdio.h>
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

/* A number of up to 7 digits. */
static qv_status read_count(const char *name, const char *value, size_t size, int64_t most,
                            int64_t *out)
{
    int64_t n = 0;
    value = trim(value, &size);
    bool ok = size > 0 && size <= 7;
    for (size_t i = 0; ok && i < size; i++) {
        ok = value[i] >= '0' && value[i] <= '9';
        n = n * 10 + (value[i] - '0');
    }
    if (!ok || n > most)
        return qv_fail(QV_ERR_ARG, "%s is '%.*s', not a number from 0 to %lld", name,
                       (int)(size < 40 ? size : 40), value, (long long)most);
    *out = n;
    return QV_OK;
}

static qv_status set_replicas(qv_want_box *box, const char *value, size_t size)
{
    return read_count("replicas", value, size, QV_WANT_MAX_REPLICAS, &box->want.replicas);
}

static qv_status set_max_replicas(qv_want_box *box, const char *value, size_t size)
{
    return read_count("max_replicas", value, size, QV_WANT_MAX_REPLICAS, &box->want.max_replicas);
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

/* The next item of a list parted by commas and blanks: [*begin, *end). False: there is none. */
static bool next_item(const char *value, size_t size, size_t *begin, size_t *end)
{
    size_t i = *end;
    while (i < size && is_separator(value[i]))
        i++;
    *begin = i;
    while (i < size && !is_separator(value[i]))
        i++;
    *end = i;
    return *begin < *end;
}

/* A list of names that `check` passes. */
static qv_status read_list(qv_want_box *box, const char *name, const char *value, size_t size,
                           size_t most, qv_status (*check)(const char *, size_t),
                           const char *const **out, size_t *n_out)
{
    const char **list = qv_arena_alloc(&box->arena, most * sizeof *list, _Alignof(char *));
    size_t n = 0;
    if (list == NULL)
        return out_of_memory();
    for (size_t begin, end = 0; next_item(value, size, &begin, &end);) {
        qv_status status = check(value + begin, end - begin);
        if (status != QV_OK)
            return qv_fail_prefix(status, "%s", name);
        if (n == most)
            return qv_fail(QV_ERR_ARG, "%s has more than %zu entries", name, most);
        if ((list[n++] = qv_arena_strndup(&box->arena, value + begin, end - begin)) == NULL)
            return out_of_memory();
    }
    *out = list;
    *n_out = n;
    return QV_OK;
}

static qv_status set_workers(qv_want_box *box, const char *value, size_t size)
{
    return read_list(box, "workers", value, size, QV_WANT_MAX_WORKERS, qv_check_id,
                     &box->want.workers, &box->want.n_workers);
}

static qv_status check_tenant(const char *name, size_t size)
{
    if (size > QV_ID_MAX || !qv_utf8_valid(name, size) || memchr(name, 0, size) != NULL)
        return qv_fail(QV_ERR_ARG, "'%.*s' is no name of a tenant: up to %d bytes of UTF-8",
                       (int)(size < 40 ? size : 40), name, QV_ID_MAX);
    return QV_OK;
}

static qv_status set_tenants(qv_want_box *box, const char *value, size_t size)
{
    return read_list(box, "tenants", value, size, QV_WANT_MAX_TENANTS, check_tenant,
                     &box->want.tenants, &box->want.n_tenants);
}

/* "name" or "name=weight". */
static qv_status read_share(qv_want_box *box, const char *text, size_t size, qv_want_share *out)
{
    const char *equals = memchr(text, '=', size);
    size_t name_size = equals != NULL ? (size_t)(equals - text) : size;
    out->weight = 1;
    if (equals != NULL)
        QV_TRY(read_count("split: a weight", equals + 1, size - name_size - 1, QV_WANT_MAX_WEIGHT,
                          &out->weight));
    qv_status status =
        qv_adapter_name_check((qv_str){text, name_size < 1000 ? (uint32_t)name_size : 1000});
    if (status != QV_OK)
        return qv_fail_prefix(status, "split");
    out->adapter = qv_arena_strndup(&box->arena, text, name_size);
    return out->adapter != NULL ? QV_OK : out_of_memory();
}

static qv_status set_split(qv_want_box *box, const char *value, size_t size)
{
    qv_want_share *list =
        qv_arena_alloc(&box->arena, QV_WANT_MAX_SPLIT * sizeof *list, _Alignof(qv_want_share));
    int64_t total = 0;
    size_t n = 0;
    if (list == NULL)
        return out_of_memory();
    for (size_t begin, end = 0; next_item(value, size, &begin, &end); n++) {
        if (n == QV_WANT_MAX_SPLIT)
            return qv_fail(QV_ERR_ARG, "split has more than %d adapters", QV_WANT_MAX_SPLIT);
        QV_TRY(read_share(box, value + begin, end - begin, &list[n]));
        total += list[n].weight;
    }
    if (n > 0 && total == 0)
        return qv_fail(QV_ERR_ARG, "split: all weights are 0");
    box->want.split = list;
    box->want.n_split = n;
    return QV_OK;
}

static const struct {
    const char *name;
    qv_status (*set)(qv_want_box *box, const char *value, size_t size);
} rows[] = {{"path", set_path},  {"replicas", set_replicas}, {"max_replicas", set_max_replicas},
            {"pin", set_pin},    {"workers", set_workers},   {"tenants", set_tenants},
            {"split", set_split}};

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
    if (status == QV_OK && box->want.path == NULL && box->want.n_split == 0)
        status = qv_fail(QV_ERR_ARG, "there is no path");
    if (status == QV_OK && box->want.max_replicas > 0 &&
        box->want.max_replicas < box->want.replicas)
        status = qv_fail(QV_ERR_ARG, "max_replicas is %lld, below replicas, %lld",
                         (long long)box->want.max_replicas, (long long)box->want.replicas);
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

static bool same_text(const char *a, const char *b)
{
    return a == b || (a != NULL && b != NULL && strcmp(a, b) == 0);
}

static bool same_list(const char *const *a, size_t n_a, const char *const *b, size_t n_b)
{
    for (size_t i = 0; n_a == n_b && i < n_a; i++)
        if (strcmp(a[i], b[i]) != 0)
            return false;
    return n_a == n_b;
}

bool qv_want_equal(const qv_want *a, const qv_want *b)
{
    if (!same_text(a->path, b->path) || a->replicas != b->replicas ||
        a->max_replicas != b->max_replicas || a->pin != b->pin || a->n_split != b->n_split ||
        !same_list(a->workers, a->n_workers, b->workers, b->n_workers) ||
        !same_list(a->tenants, a->n_tenants, b->tenants, b->n_tenants))
        return false;
    for (size_t i = 0; i < a->n_split; i++)
        if (strcmp(a->split[i].adapter, b->split[i].adapter) != 0 ||
            a->split[i].weight != b->split[i].weight)
            return false;
    return true;
}

/* --- Tenants ----------------------------------------------------------------------------------*/

static qv_status set_weight(const char *value, size_t size, double *out)
{
    char text[32], *end;
    value = trim(value, &size);
    snprintf(text, sizeof text, "%.*s", (int)(size < sizeof text ? size : sizeof text - 1), value);
    double weight = strtod(text, &end);
    if (size == 0 || size >= sizeof text || *end != '\0' || !(weight >= 0.001 && weight <= 1e6))
        return qv_fail(QV_ERR_ARG, "weight is '%s', not a number from 0.001 to 1000000", text);
    *out = weight;
    return QV_OK;
}

qv_status qv_tenant_want_parse(const qv_want_field *fields, size_t n, qv_tenant_want *out)
{
    *out = (qv_tenant_want){.weight = 1};
    for (size_t i = 0; i < n; i++) {
        const qv_want_field *f = &fields[i];
        qv_str name = {f->name, (uint32_t)f->name_size};
        if (qv_str_equal(name, "weight"))
            QV_TRY(set_weight(f->value, f->value_size, &out->weight));
        else if (qv_str_equal(name, "max_queued"))
            QV_TRY(read_count("max_queued", f->value, f->value_size, 9999999, &out->max_queued));
        else if (qv_str_equal(name, "max_running"))
            QV_TRY(read_count("max_running", f->value, f->value_size, 9999999, &out->max_running));
    }
    return QV_OK;
}
