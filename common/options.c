#include "common/options.h"

#include "common/arena.h"

#include <ctype.h>
#include <czmq.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ENV_PREFIX        "QUIVER_"
#define NAME_MAX_BYTES    64
#define FILE_MAX_BYTES    ((size_t)1 << 20)
#define FILE_LINE_MAX     1000 /* zconfig cuts longer lines without a word */
#define STRINGS_MAX_BYTES ((size_t)64 << 20)

struct qv_options {
    qv_arena strings; /* everything the settings and args point at */
    const qv_option *table;
    size_t n;
    qv_option_source *sources; /* [n] */
    qv_string_list args;
    bool printed;
};

/* --- numbers -------------------------------------------------------------------------------- */

/* A suffix and what it multiplies by. */
typedef struct {
    const char *suffix;
    int64_t scale;
} unit;

/* clang-format off */
static const unit size_units[] = {
    {"", 1},                   {"b", 1},
    {"k", INT64_C(1) << 10},   {"kb", INT64_C(1) << 10},   {"kib", INT64_C(1) << 10},
    {"m", INT64_C(1) << 20},   {"mb", INT64_C(1) << 20},   {"mib", INT64_C(1) << 20},
    {"g", INT64_C(1) << 30},   {"gb", INT64_C(1) << 30},   {"gib", INT64_C(1) << 30},
    {"t", INT64_C(1) << 40},   {"tb", INT64_C(1) << 40},   {"tib", INT64_C(1) << 40},
    {NULL, 0},
};
static const unit duration_units[] = {
    {"", 1}, {"ms", 1}, {"s", 1000}, {"m", 60000}, {"min", 60000}, {"h", 3600000}, {"d", 86400000},
    {NULL, 0},
};
/* clang-format on */

/* Digits, at most one point, then a known suffix: digits * scale, the fraction of a unit cut off.
 */
static bool parse_scaled(const char *text, const unit *units, int64_t *out)
{
    int64_t whole = 0, scale = 0;
    double fraction = 0, place = 1;
    const char *s = text;
    bool any = false;
    for (; isdigit((unsigned char)*s); s++, any = true)
        if (__builtin_mul_overflow(whole, 10, &whole) ||
            __builtin_add_overflow(whole, *s - '0', &whole))
            return false;
    if (*s == '.')
        for (s++; isdigit((unsigned char)*s); s++, any = true)
            fraction += (*s - '0') * (place /= 10);
    while (*s == ' ')
        s++;
    for (const unit *u = units; u->suffix != NULL && scale == 0; u++)
        if (strcasecmp(s, u->suffix) == 0)
            scale = u->scale;
    if (scale == 1 && fraction != 0) /* there is nothing smaller than a byte or a millisecond */
        return false;
    /* The sum of decimal places may fall just short of a whole number, hence the 1e-6. */
    return any && scale != 0 && !__builtin_mul_overflow(whole, scale, &whole) &&
           !__builtin_add_overflow(whole, (int64_t)(fraction * (double)scale + 1e-6), out);
}

qv_status qv_parse_int(const char *text, int64_t *out)
{
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end != '\0' || isspace((unsigned char)*text))
        return qv_fail(QV_ERR_ARG, "\"%.200s\" is not an integer", text);
    if (errno == ERANGE)
        return qv_fail(QV_ERR_ARG, "\"%.200s\" does not fit in 64 bits", text);
    *out = value;
    return QV_OK;
}

qv_status qv_parse_size(const char *text, int64_t *out)
{
    if (!parse_scaled(text, size_units, out))
        return qv_fail(QV_ERR_ARG, "\"%.200s\" is not a size such as 4096, 64K, 2M or 1.5G", text);
    return QV_OK;
}

qv_status qv_parse_duration(const char *text, int64_t *out)
{
    if (!parse_scaled(text, duration_units, out))
        return qv_fail(QV_ERR_ARG, "\"%.200s\" is not a duration such as 250ms, 30s, 5m or 2h",
                       text);
    return QV_OK;
}

qv_status qv_parse_double(const char *text, double *out)
{
    char *end;
    double value = strtod(text, &end);
    /* strtod also reads hexadecimal, "inf" and "nan"; nobody means those here. */
    if (end == text || *end != '\0' || strspn(text, "0123456789.+-eE") != strlen(text) ||
        !isfinite(value))
        return qv_fail(QV_ERR_ARG, "\"%.200s\" is not a number", text);
    *out = value;
    return QV_OK;
}

qv_status qv_parse_bool(const char *text, bool *out)
{
    static const char *const words[] = {"false", "true", "no", "yes", "off", "on", "0", "1"};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        if (strcasecmp(text, words[i]) == 0) {
            *out = i % 2 == 1;
            return QV_OK;
        }
    }
    return qv_fail(QV_ERR_ARG, "\"%.200s\" is not true or false", text);
}

/* --- names ---------------------------------------------------------------------------------- */

/* "max-running" -> "QUIVER_MAX_RUNNING". */
static const char *env_name(const char *name, char out[static NAME_MAX_BYTES + sizeof ENV_PREFIX])
{
    size_t used = sizeof ENV_PREFIX - 1;
    memcpy(out, ENV_PREFIX, used);
    for (const char *s = name; *s != '\0'; s++)
        out[used++] = *s == '-' ? '_' : (char)toupper((unsigned char)*s);
    out[used] = '\0';
    return out;
}

static const qv_option *find_row(const qv_option *table, size_t n, const char *name, size_t size)
{
    for (size_t i = 0; i < n; i++)
        if (strlen(table[i].name) == size && memcmp(table[i].name, name, size) == 0)
            return &table[i];
    return NULL;
}

static const qv_option *find_short(const qv_option *table, size_t n, char short_name)
{
    for (size_t i = 0; i < n; i++)
        if (table[i].short_name != 0 && table[i].short_name == short_name)
            return &table[i];
    return NULL;
}

/* Insertions, deletions, changes and swaps of neighbours that turn a into b (optimal string
 * alignment); names are at most NAME_MAX_BYTES long. */
static size_t edit_distance(const char *a, size_t a_size, const char *b)
{
    size_t rows[3][NAME_MAX_BYTES + 1], *before = rows[0], *last = rows[1], *row = rows[2];
    size_t b_size = strlen(b);
    for (size_t j = 0; j <= b_size; j++)
        last[j] = j;
    for (size_t i = 1; i <= a_size; i++) {
        row[0] = i;
        for (size_t j = 1; j <= b_size; j++) {
            size_t best = last[j - 1] + (a[i - 1] != b[j - 1]);
            if (best > last[j] + 1)
                best = last[j] + 1;
            if (best > row[j - 1] + 1)
                best = row[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                best > before[j - 2] + 1)
                best = before[j - 2] + 1;
            row[j] = best;
        }
        size_t *oldest = before;
        before = last;
        last = row;
        row = oldest;
    }
    return last[b_size];
}

/* The name that was probably meant: one that continues the text, or the closest one if it is close.
 * NULL if nothing is. The command line knows a few names beside the table's. */
static const char *nearest_name(const qv_options *options, const char *text, size_t size,
                                qv_option_source source)
{
    static const char *const builtin[] = {"config", "help", "version"};
    size_t n = options->n;
    if (source == QV_OPTION_FROM_COMMAND_LINE)
        n += sizeof builtin / sizeof builtin[0];
    const char *nearest = NULL;
    size_t least = size / 4 + 2; /* a distance from here on is another word */
    if (size > NAME_MAX_BYTES)
        return NULL;
    for (size_t i = 0; i < n; i++) {
        const char *name = i < options->n ? options->table[i].name : builtin[i - options->n];
        size_t distance = edit_distance(text, size, name);
        if (size >= 3 && strncmp(name, text, size) == 0)
            distance = 1;
        if (distance < least) {
            least = distance;
            nearest = name;
        }
    }
    return nearest;
}

/* --- setting a value ------------------------------------------------------------------------ */

/* One text on its way into the settings: which row, what it says, and how a person would name the
 * place where it stands ("--bind", "QUIVER_BIND", "broker.cfg: bind"). */
typedef struct {
    const qv_option *row;
    const char *text;
    const char *place;
    qv_option_source source;
} assignment;

static const char *copy_text(qv_options *options, const char *text, size_t size)
{
    return qv_arena_strndup(&options->strings, text, size);
}

static qv_status no_memory(void)
{
    return qv_fail(QV_ERR_NOMEM, "no memory for the options");
}

/* Append; the array doubles whenever its size is a power of two. */
static qv_status append(qv_options *options, qv_string_list *list, const char *text, size_t size)
{
    if ((list->n & (list->n - 1)) == 0) {
        const char **items =
            QV_ARENA_ARRAY(&options->strings, const char *, list->n != 0 ? list->n * 2 : 1);
        if (items == NULL)
            return no_memory();
        for (size_t i = 0; i < list->n; i++)
            items[i] = list->items[i];
        list->items = items;
    }
    const char *copy = copy_text(options, text, size);
    if (copy == NULL)
        return no_memory();
    list->items[list->n++] = copy;
    return QV_OK;
}

/* "error, warn, info or debug" */
static const char *choices_text(const qv_option *row, char *out, size_t size)
{
    size_t used = 0;
    for (size_t i = 0; row->choices[i] != NULL && used < size; i++) {
        const char *joint = i == 0 ? "" : row->choices[i + 1] != NULL ? ", " : " or ";
        int n = snprintf(out + used, size - used, "%s%s", joint, row->choices[i]);
        used += n > 0 ? (size_t)n : 0;
    }
    return out;
}

static qv_status parse_choice(const qv_option *row, const char *text, int *out)
{
    char all[400];
    for (int i = 0; row->choices[i] != NULL; i++) {
        if (strcmp(row->choices[i], text) == 0) {
            *out = i;
            return QV_OK;
        }
    }
    return qv_fail(QV_ERR_ARG, "\"%.200s\" is not one of %s", text,
                   choices_text(row, all, sizeof all));
}

static qv_status parse_list(qv_options *options, const assignment *a, qv_string_list *list)
{
    if (options->sources[a->row - options->table] != a->source)
        *list = (qv_string_list){NULL, 0}; /* a later source replaces the list as a whole */
    if (a->source != QV_OPTION_FROM_ENVIRONMENT && a->source != QV_OPTION_FROM_DEFAULT)
        return append(options, list, a->text, strlen(a->text));
    for (const char *s = a->text;; s++) { /* one text holds all items */
        size_t n = strcspn(s, ",");
        if (n != 0)
            QV_TRY(append(options, list, s, n));
        s += n;
        if (*s == '\0')
            return QV_OK;
    }
}

/* A bound or a number in the form that the option's own text has. */
static const char *number_text(const qv_option *row, double value, char *out, size_t size)
{
    static const struct {
        double scale;
        const char *suffix;
    } sizes[] = {{0x1p40, "T"}, {0x1p30, "G"}, {0x1p20, "M"}, {0x1p10, "K"}},
      times[] = {{86400000, "d"}, {3600000, "h"}, {60000, "m"}, {1000, "s"}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0] && value != 0; i++) {
        double scale = row->type == QV_OPT_SIZE ? sizes[i].scale : times[i].scale;
        const char *suffix = row->type == QV_OPT_SIZE ? sizes[i].suffix : times[i].suffix;
        if ((row->type == QV_OPT_SIZE || row->type == QV_OPT_DURATION) && fmod(value, scale) == 0) {
            snprintf(out, size, "%.17g%s", value / scale, suffix);
            return out;
        }
    }
    snprintf(out, size, "%.15g%s", value, row->type == QV_OPT_DURATION && value != 0 ? "ms" : "");
    return out;
}

static bool has_bounds(const qv_option *row)
{
    return row->min != 0 || row->max != 0;
}

/* Only a lower bound was given. */
static bool is_open(const qv_option *row)
{
    return row->max == 0 && row->min > 0;
}

static bool in_bounds(const qv_option *row, double value)
{
    return !has_bounds(row) || (value >= row->min && (value <= row->max || is_open(row)));
}

/* "between 1 and 64", "at least 1" */
static const char *bounds_text(const qv_option *row, char *out, size_t size)
{
    char low[40], high[40];
    number_text(row, row->min, low, sizeof low);
    number_text(row, row->max, high, sizeof high);
    if (is_open(row))
        snprintf(out, size, "at least %s", low);
    else
        snprintf(out, size, "between %s and %s", low, high);
    return out;
}

static qv_status check_bounds(const qv_option *row, double value)
{
    char got[40], bounds[100];
    if (in_bounds(row, value))
        return QV_OK;
    return qv_fail(QV_ERR_ARG, "%s is not %s", number_text(row, value, got, sizeof got),
                   bounds_text(row, bounds, sizeof bounds));
}

/* Parse one text into the row's field. */
static qv_status parse_value(qv_options *options, const assignment *a, void *settings)
{
    const qv_option *row = a->row;
    void *field = (char *)settings + row->offset;
    double number = 0;
    switch (row->type) {
    case QV_OPT_STRING: {
        const char *copy = copy_text(options, a->text, strlen(a->text));
        if (copy == NULL)
            return no_memory();
        *(const char **)field = copy;
        return QV_OK;
    }
    case QV_OPT_INT:
        QV_TRY(qv_parse_int(a->text, field));
        number = (double)*(int64_t *)field;
        break;
    case QV_OPT_SIZE:
        QV_TRY(qv_parse_size(a->text, field));
        number = (double)*(int64_t *)field;
        break;
    case QV_OPT_DURATION:
        QV_TRY(qv_parse_duration(a->text, field));
        number = (double)*(int64_t *)field;
        break;
    case QV_OPT_DOUBLE:
        QV_TRY(qv_parse_double(a->text, field));
        number = *(double *)field;
        break;
    case QV_OPT_FLAG:
        return qv_parse_bool(a->text, field);
    case QV_OPT_ENUM:
        return parse_choice(row, a->text, field);
    case QV_OPT_LIST:
        return parse_list(options, a, field);
    case QV_OPT_TYPE_COUNT:
        break;
    }
    return check_bounds(row, number);
}

static qv_status assign(qv_options *options, const assignment *a, void *settings)
{
    qv_status status = parse_value(options, a, settings);
    if (status != QV_OK && a->row->secret)
        return qv_fail(status, "%s: the value is not accepted", a->place);
    if (status != QV_OK)
        return qv_fail_prefix(status, "%s", a->place);
    options->sources[a->row - options->table] = a->source;
    return QV_OK;
}

/* --- sources -------------------------------------------------------------------------------- */

static qv_status apply_defaults(qv_options *options, void *settings)
{
    for (size_t i = 0; i < options->n; i++) {
        const qv_option *row = &options->table[i];
        assignment a = {row, row->default_text, row->name, QV_OPTION_FROM_DEFAULT};
        if (row->default_text != NULL)
            QV_TRY(assign(options, &a, settings));
    }
    return QV_OK;
}

static qv_status apply_environment(qv_options *options, void *settings)
{
    for (size_t i = 0; i < options->n; i++) {
        char name[NAME_MAX_BYTES + sizeof ENV_PREFIX];
        env_name(options->table[i].name, name);
        assignment a = {&options->table[i], getenv(name), name, QV_OPTION_FROM_ENVIRONMENT};
        if (a.text != NULL && *a.text != '\0') /* an empty variable is an unset one */
            QV_TRY(assign(options, &a, settings));
    }
    return QV_OK;
}

/* Read a configuration file whole, with the checks that zconfig leaves out. The caller frees. */
static qv_status read_config(const char *path, char **out)
{
    FILE *file = fopen(path, "rbe");
    if (file == NULL)
        return qv_fail(errno == ENOENT ? QV_ERR_NOT_FOUND : QV_ERR_IO, "%s: %s", path,
                       strerror(errno));
    char *text = malloc(FILE_MAX_BYTES + 1);
    size_t size = text != NULL ? fread(text, 1, FILE_MAX_BYTES + 1, file) : 0;
    qv_status status = QV_OK;
    if (text == NULL)
        status = no_memory();
    else if (ferror(file))
        status = qv_fail(QV_ERR_IO, "%s: %s", path, strerror(errno));
    else if (size > FILE_MAX_BYTES)
        status = qv_fail(QV_ERR_LIMIT, "%s: larger than %zu bytes", path, FILE_MAX_BYTES);
    else if (memchr(text, '\0', size) != NULL)
        status = qv_fail(QV_ERR_FORMAT, "%s: holds a zero byte, this is not a text file", path);
    fclose(file);
    size_t line_size = 0, line = 1;
    for (size_t i = 0; status == QV_OK && i < size; i++) {
        line_size = text[i] == '\n' ? 0 : line_size + 1;
        line += text[i] == '\n';
        if (line_size > FILE_LINE_MAX)
            status = qv_fail(QV_ERR_LIMIT, "%s: line %zu is longer than %d bytes", path, line,
                             FILE_LINE_MAX);
    }
    if (status != QV_OK) {
        free(text);
        return status;
    }
    text[size] = '\0';
    *out = text;
    return QV_OK;
}

/* One node of the file whose full name is `key`. */
static qv_status apply_node(qv_options *options, const char *path, const char *key, zconfig_t *node,
                            void *settings)
{
    const char *text = zconfig_value(node);
    const qv_option *row = find_row(options->table, options->n, key, strlen(key));
    if (zconfig_child(node) != NULL && text[0] == '\0')
        return QV_OK; /* a section */
    if (row == NULL) {
        const char *nearest = nearest_name(options, key, strlen(key), QV_OPTION_FROM_FILE);
        return nearest != NULL ? qv_fail(QV_ERR_ARG, "%s: no option \"%s\", did you mean \"%s\"?",
                                         path, key, nearest)
                               : qv_fail(QV_ERR_ARG, "%s: no option \"%s\"", path, key);
    }
    if (row->type != QV_OPT_LIST && options->sources[row - options->table] == QV_OPTION_FROM_FILE)
        return qv_fail(QV_ERR_ARG, "%s: \"%s\" is set twice", path, key);
    char place[512];
    snprintf(place, sizeof place, "%s: %s", path, key);
    assignment a = {row, text, place, QV_OPTION_FROM_FILE};
    return assign(options, &a, settings);
}

/* The children of `parent`, whose names start with `prefix` (the section with a '-', or empty). */
static qv_status apply_tree(qv_options *options, const char *path, const char *prefix,
                            zconfig_t *parent, void *settings)
{
    for (zconfig_t *node = zconfig_child(parent); node != NULL; node = zconfig_next(node)) {
        char key[NAME_MAX_BYTES * 2], section[sizeof key + 1];
        int size = snprintf(key, sizeof key, "%s%s", prefix, zconfig_name(node));
        if (size >= (int)sizeof key)
            return qv_fail(QV_ERR_ARG, "%s: no option \"%s...\"", path, key);
        QV_TRY(apply_node(options, path, key, node, settings));
        snprintf(section, sizeof section, "%s-", key);
        QV_TRY(apply_tree(options, path, section, node, settings));
    }
    return QV_OK;
}

static qv_status apply_file(qv_options *options, const char *path, void *settings)
{
    char *text = NULL;
    QV_TRY(read_config(path, &text));
    zconfig_t *root = zconfig_str_load(text); /* prints the line and the reason when it fails */
    free(text);
    if (root == NULL)
        return qv_fail(QV_ERR_FORMAT, "%s: not a valid ZPL file", path);
    qv_status status = apply_tree(options, path, "", root, settings);
    zconfig_destroy(&root);
    return status;
}

/* --- command line --------------------------------------------------------------------------- */

/* What the command line says, in order, before any of it is parsed: the file it may name comes
 * first. */
typedef struct {
    assignment *items; /* room for one per byte of the arguments: flags may share one (-abc) */
    size_t n;
    const char *config;
    bool help, version;
} command_line;

static qv_status unknown_option(const qv_options *options, const char *arg, size_t name_size)
{
    const char *nearest = nearest_name(options, arg + 2, name_size, QV_OPTION_FROM_COMMAND_LINE);
    if (nearest != NULL)
        return qv_fail(QV_ERR_ARG, "no option %.*s, did you mean --%s?", (int)(name_size + 2), arg,
                       nearest);
    return qv_fail(QV_ERR_ARG, "no option %.*s (see --help)", (int)(name_size + 2), arg);
}

/* Whether an argument is an option of ours, so that it is not the value of the one before. */
static bool is_option(const qv_options *options, const char *arg)
{
    if (strncmp(arg, "--", 2) != 0)
        return false;
    size_t size = strcspn(arg + 2, "=");
    return size == 0 || find_row(options->table, options->n, arg + 2, size) != NULL ||
           strcmp(arg, "--help") == 0 || strcmp(arg, "--version") == 0 ||
           (size == strlen("config") && strncmp(arg, "--config", size + 2) == 0);
}

/* The value of the option at argv[*i]: after '=' or the next argument. */
static qv_status take_value(const qv_options *options, int argc, char *const *argv, int *i,
                            const char *attached, const char *place, const char *value_name,
                            const char **out)
{
    if (attached != NULL)
        *out = attached;
    else if (*i + 1 < argc && !is_option(options, argv[*i + 1]))
        *out = argv[++*i];
    else
        return qv_fail(QV_ERR_ARG, "%s needs a value (%s)", place, value_name);
    return QV_OK;
}

static qv_status add_assignment(qv_options *options, command_line *cl, const qv_option *row,
                                const char *text, const char *name)
{
    const char *place = qv_arena_printf(&options->strings, "--%s", name);
    if (place == NULL)
        return no_memory();
    cl->items[cl->n++] = (assignment){row, text, place, QV_OPTION_FROM_COMMAND_LINE};
    return QV_OK;
}

/* --name, --name=value, --name value, --no-flag */
static qv_status read_long(qv_options *options, int argc, char *const *argv, int *i,
                           command_line *cl)
{
    const char *arg = argv[*i];
    size_t size = strcspn(arg + 2, "=");
    const char *attached = arg[2 + size] == '=' ? arg + 3 + size : NULL;
    const qv_option *row = find_row(options->table, options->n, arg + 2, size);
    const char *text = NULL;
    if (row == NULL) {
        const qv_option *off = size > 3 && strncmp(arg + 2, "no-", 3) == 0
                                   ? find_row(options->table, options->n, arg + 5, size - 3)
                                   : NULL;
        if (off != NULL && off->type == QV_OPT_FLAG && attached == NULL)
            return add_assignment(options, cl, off, "false", off->name);
        if (strcmp(arg, "--help") == 0)
            cl->help = true;
        else if (strcmp(arg, "--version") == 0)
            cl->version = true;
        else if (size == strlen("config") && strncmp(arg + 2, "config", size) == 0)
            return take_value(options, argc, argv, i, attached, "--config", "FILE", &cl->config);
        else
            return unknown_option(options, arg, size);
        return QV_OK;
    }
    if (row->type == QV_OPT_FLAG)
        return add_assignment(options, cl, row, attached != NULL ? attached : "true", row->name);
    char place[NAME_MAX_BYTES + 3];
    snprintf(place, sizeof place, "--%s", row->name);
    QV_TRY(take_value(options, argc, argv, i, attached, place, row->value_name, &text));
    return add_assignment(options, cl, row, text, row->name);
}

/* -x, -xvalue, -x value, and flags in one: -abc */
static qv_status read_short(qv_options *options, int argc, char *const *argv, int *i,
                            command_line *cl)
{
    for (const char *s = argv[*i] + 1; *s != '\0' && !cl->help; s++) {
        const qv_option *row = find_short(options->table, options->n, *s);
        if (row == NULL && *s == 'h') {
            cl->help = true;
        } else if (row == NULL) {
            return qv_fail(QV_ERR_ARG, "no option %s (see --help)", argv[*i]);
        } else if (row->type == QV_OPT_FLAG) {
            QV_TRY(add_assignment(options, cl, row, "true", row->name));
        } else {
            const char place[] = {'-', *s, '\0'}, *text = NULL;
            QV_TRY(take_value(options, argc, argv, i, s[1] != '\0' ? s + 1 : NULL, place,
                              row->value_name, &text));
            return add_assignment(options, cl, row, text, row->name);
        }
    }
    return QV_OK;
}

static qv_status read_command_line(qv_options *options, const qv_program *program, int argc,
                                   char *const *argv, command_line *cl)
{
    bool only_args = false;
    for (int i = 1; i < argc && !cl->help && !cl->version; i++) {
        const char *arg = argv[i];
        if (!only_args && strcmp(arg, "--") == 0) {
            only_args = true;
        } else if (!only_args && strncmp(arg, "--", 2) == 0) {
            QV_TRY(read_long(options, argc, argv, &i, cl));
        } else if (!only_args && arg[0] == '-' && arg[1] != '\0') {
            QV_TRY(read_short(options, argc, argv, &i, cl));
        } else if (options->args.n == program->max_args) {
            return qv_fail(QV_ERR_ARG, "unexpected argument \"%s\"", arg);
        } else {
            QV_TRY(append(options, &options->args, arg, strlen(arg)));
        }
    }
    return QV_OK;
}

/* --- help ----------------------------------------------------------------------------------- */

#define HELP_COLUMNS 96

/* Print text wrapped between `indent` and HELP_COLUMNS, a newline at its end. */
static void print_wrapped(FILE *out, const char *text, int indent)
{
    int column = 0;
    while (*text != '\0') {
        int n = (int)strcspn(text, " \n");
        if (n > 0 && column > 0 && column + 1 + n > HELP_COLUMNS) {
            fputc('\n', out);
            column = 0;
        }
        if (n > 0) {
            fprintf(out, "%*s%.*s", column == 0 ? indent : 1, "", n, text);
            column = (column == 0 ? indent : column + 1) + n;
        }
        text += n;
        if (*text == '\n') {
            fputc('\n', out);
            column = 0;
        }
        text += *text != '\0';
    }
    if (column > 0)
        fputc('\n', out);
}

/* "[default: 64; 1 to 4096; QUIVER_MAX_RUNNING]" */
static void print_facts(FILE *out, const qv_option *row)
{
    char facts[600], env[NAME_MAX_BYTES + sizeof ENV_PREFIX], bounds[100];
    size_t used = 0;
#define ADD(...)                                                                                   \
    do {                                                                                           \
        if (used < sizeof facts)                                                                   \
            used += (size_t)snprintf(facts + used, sizeof facts - used, __VA_ARGS__);              \
    } while (0)
    ADD("[");
    if (row->required)
        ADD("required; ");
    else if (row->default_text != NULL)
        ADD("default: %s; ", row->default_text[0] != '\0' ? row->default_text : "empty");
    if (row->choices != NULL) {
        char all[400];
        ADD("%s; ", choices_text(row, all, sizeof all));
    }
    if (has_bounds(row))
        ADD("%s%s; ", bounds_text(row, bounds, sizeof bounds),
            row->type == QV_OPT_LIST ? " times" : "");
    else if (row->type == QV_OPT_LIST)
        ADD("may be repeated; ");
    ADD("%s]", env_name(row->name, env));
#undef ADD
    print_wrapped(out, facts, 10);
}

static void print_row(FILE *out, const qv_option *row)
{
    bool defaults_on = row->type == QV_OPT_FLAG && row->default_text != NULL &&
                       strcmp(row->default_text, "true") == 0;
    if (row->short_name != 0)
        fprintf(out, "  -%c, ", row->short_name);
    else
        fputs("      ", out);
    fprintf(out, "--%s%s%s%s\n", defaults_on ? "[no-]" : "", row->name,
            row->value_name != NULL ? " " : "", row->value_name != NULL ? row->value_name : "");
    print_wrapped(out, row->help, 10);
    print_facts(out, row);
}

static bool same_section(const qv_option *a, const qv_option *b)
{
    return a->section == b->section ||
           (a->section != NULL && b->section != NULL && strcmp(a->section, b->section) == 0);
}

/* A row and all later ones of its section, if it is the first of them. */
static void print_section(FILE *out, const qv_option *table, size_t n, size_t first)
{
    for (size_t i = 0; i < first; i++)
        if (same_section(&table[i], &table[first]))
            return;
    fprintf(out, "\n%s:\n", table[first].section != NULL ? table[first].section : "Options");
    for (size_t i = first; i < n; i++)
        if (same_section(&table[i], &table[first]))
            print_row(out, &table[i]);
}

void qv_options_help(const qv_option *table, size_t n, const qv_program *program, FILE *out)
{
    fprintf(out, "Usage: %s [OPTION...]%s%s\n\n", program->name, program->args != NULL ? " " : "",
            program->args != NULL ? program->args : "");
    if (program->summary != NULL)
        print_wrapped(out, program->summary, 0);
    for (size_t i = 0; i < n; i++)
        print_section(out, table, n, i);
    fprintf(out, "\nGeneral:\n      --config FILE\n");
    print_wrapped(out,
                  "Read options from a ZPL file: lines such as \"max-running = 64\"; the names of "
                  "nested sections are joined by '-'. The environment overrides the file, the "
                  "command line overrides both.",
                  10);
    print_wrapped(out, "[" ENV_PREFIX "CONFIG]", 10);
    fprintf(out, "  -h, --help\n          Print this text.\n"
                 "      --version\n          Print the version.\n");
    if (program->epilog != NULL)
        fprintf(out, "\n%s", program->epilog);
}

/* --- the whole ------------------------------------------------------------------------------ */

/* Mistakes in a table are ours. */
static void check_table(const qv_option *table, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const char *name = table[i].name;
        size_t size = strlen(name);
        QV_ASSERT(size > 0 && size <= NAME_MAX_BYTES && islower((unsigned char)name[0]));
        QV_ASSERT(strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == size);
        QV_ASSERT(find_row(table, n, name, size) == &table[i]);
        QV_ASSERT(table[i].short_name == 0 ||
                  find_short(table, n, table[i].short_name) == &table[i]);
        QV_ASSERT(strcmp(name, "config") != 0 && strcmp(name, "help") != 0 &&
                  strcmp(name, "version") != 0);
        QV_ASSERT((table[i].type == QV_OPT_FLAG) == (table[i].value_name == NULL));
        QV_ASSERT((table[i].type == QV_OPT_ENUM) == (table[i].choices != NULL));
        QV_ASSERT((table[i].min <= table[i].max || is_open(&table[i])) && table[i].help != NULL);
    }
}

/* What can only be said when all sources have spoken: required rows, lengths of lists. */
static qv_status check_settings(const qv_options *options, const void *settings)
{
    for (size_t i = 0; i < options->n; i++) {
        const qv_option *row = &options->table[i];
        char env[NAME_MAX_BYTES + sizeof ENV_PREFIX];
        if (row->required && options->sources[i] == QV_OPTION_FROM_DEFAULT)
            return qv_fail(QV_ERR_ARG, "--%s is required (or %s in the environment)", row->name,
                           env_name(row->name, env));
        if (row->type != QV_OPT_LIST)
            continue;
        size_t count = ((const qv_string_list *)((const char *)settings + row->offset))->n;
        char bounds[100];
        if (!in_bounds(row, (double)count))
            return qv_fail(QV_ERR_ARG, "--%s: given %zu times, not %s", row->name, count,
                           bounds_text(row, bounds, sizeof bounds));
    }
    return QV_OK;
}

static qv_status apply_all(qv_options *options, const command_line *cl, void *settings)
{
    const char *config = cl->config != NULL ? cl->config : getenv(ENV_PREFIX "CONFIG");
    QV_TRY(apply_defaults(options, settings));
    if (config != NULL && *config != '\0')
        QV_TRY(apply_file(options, config, settings));
    QV_TRY(apply_environment(options, settings));
    for (size_t i = 0; i < cl->n; i++)
        QV_TRY(assign(options, &cl->items[i], settings));
    return check_settings(options, settings);
}

/* Zero the fields of the table: the struct may have others, which stay the caller's. */
static void zero_fields(const qv_option *table, size_t n, void *settings)
{
    static const size_t sizes[QV_OPT_TYPE_COUNT] = {[QV_OPT_STRING] = sizeof(const char *),
                                                    [QV_OPT_INT] = sizeof(int64_t),
                                                    [QV_OPT_SIZE] = sizeof(int64_t),
                                                    [QV_OPT_DURATION] = sizeof(int64_t),
                                                    [QV_OPT_DOUBLE] = sizeof(double),
                                                    [QV_OPT_FLAG] = sizeof(bool),
                                                    [QV_OPT_ENUM] = sizeof(int),
                                                    [QV_OPT_LIST] = sizeof(qv_string_list)};
    for (size_t i = 0; i < n; i++)
        memset((char *)settings + table[i].offset, 0, sizes[table[i].type]);
}

qv_status qv_options_parse(const qv_option *table, size_t n, const qv_program *program, int argc,
                           char *const *argv, void *settings, qv_options **out)
{
    *out = NULL;
    check_table(table, n);
    zero_fields(table, n, settings);
    qv_options *options = calloc(1, sizeof *options);
    if (options == NULL)
        return no_memory();
    *options = (qv_options){.table = table, .n = n};
    qv_arena_init(&options->strings, 4096, STRINGS_MAX_BYTES);
    options->sources = QV_ARENA_ARRAY(&options->strings, qv_option_source, n);
    size_t room = 1;
    for (int i = 1; i < argc; i++)
        room += strlen(argv[i]);
    command_line cl = {.items = calloc(room, sizeof(assignment))};
    qv_status status = QV_OK;
    if (options->sources == NULL || cl.items == NULL)
        status = no_memory();
    if (status == QV_OK)
        status = read_command_line(options, program, argc, argv, &cl);

    FILE *print_to = program->out != NULL ? program->out : stdout;
    if (status == QV_OK && cl.help)
        qv_options_help(table, n, program, print_to);
    else if (status == QV_OK && cl.version)
        fprintf(print_to, "%s %s\n", program->name, QV_VERSION);
    else if (status == QV_OK)
        status = apply_all(options, &cl, settings);
    options->printed = cl.help || cl.version;
    free(cl.items);
    if (status != QV_OK) {
        qv_options_free(options);
        zero_fields(table, n, settings);
        return status;
    }
    *out = options;
    return QV_OK;
}

void qv_options_free(qv_options *options)
{
    if (options == NULL)
        return;
    qv_arena_deinit(&options->strings);
    free(options);
}

bool qv_options_printed(const qv_options *options)
{
    return options->printed;
}

const qv_string_list *qv_options_args(const qv_options *options)
{
    return &options->args;
}

qv_option_source qv_options_source(const qv_options *options, const char *name)
{
    const qv_option *row = find_row(options->table, options->n, name, strlen(name));
    QV_ASSERT(row != NULL);
    return options->sources[row - options->table];
}
