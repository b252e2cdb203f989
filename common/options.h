/* Options: one table per program makes its command line, environment variables, configuration file
 * and help text.
 *
 *     typedef struct { int64_t max_running; const char *bind; } settings;
 *
 *     static const qv_option table[] = {
 *         QV_OPTION(settings, max_running, INT, "max-running", "N", "64",
 *                   "Most requests that run at once.", .min = 1, .max = 4096),
 *         QV_OPTION(settings, bind, STRING, "bind", "ENDPOINT", "tcp://127.0.0.1:5555",
 *                   "Where clients connect.", .section = "Sockets"),
 *     };
 *
 * A later source wins: default, configuration file (--config FILE or QUIVER_CONFIG), environment
 * (QUIVER_MAX_RUNNING), command line. The file is ZPL; the names of nested sections are joined by
 * '-', and a key that is no option is an error. Called once by main, before threads start.
 */
#ifndef QV_COMMON_OPTIONS_H
#define QV_COMMON_OPTIONS_H

#include "common/status.h"

#include <stdint.h>
#include <stdio.h>

/* Type in the table: type of the field, accepted text. */
typedef enum {
    QV_OPT_STRING,   /* const char *; NULL without a default */
    QV_OPT_INT,      /* int64_t */
    QV_OPT_SIZE,     /* int64_t bytes: 4096, 64K, 2M, 1.5G, 1T; binary units, KB and KiB too */
    QV_OPT_DURATION, /* int64_t milliseconds: 250ms, 30s, 5m, 2h, 1d; a bare number is ms */
    QV_OPT_DOUBLE,   /* double, finite */
    QV_OPT_FLAG,     /* bool; --name, --no-name; elsewhere true/false, yes/no, on/off, 1/0 */
    QV_OPT_ENUM,     /* int: index of the text in .choices */
    QV_OPT_LIST,     /* qv_string_list: repeat it; in environment and default: a,b,c */
    QV_OPT_TYPE_COUNT
} qv_option_type;

typedef struct {
    const char **items; /* owned by the qv_options */
    size_t n;
} qv_string_list;

typedef struct {
    const char *name;         /* "max-running": lower case, digits and '-' */
    const char *value_name;   /* "N" in the help text; NULL for a flag */
    const char *default_text; /* parsed like any other text; NULL: zero, NULL, false or empty */
    const char *help;         /* one or more sentences, wrapped by us */
    qv_option_type type;
    size_t offset;              /* of the field in the settings struct */
    const char *section;        /* heading in the help text; rows of one section stand together */
    double min;                 /* bounds of a number, or of the length of a LIST; both 0: none; */
    double max;                 /* 0 below a positive min: no upper bound */
    const char *const *choices; /* of an ENUM, ends with NULL */
    char short_name;            /* 'x' also accepts -x; 0 = none */
    bool required;              /* some source must set it */
    bool secret; /* never printed: an error does not repeat the value, logs do not show it */
} qv_option;

/* A row. The compiler checks that the field has the type's C type. Further columns follow as
 * designated initialisers (.section, .min, .max, .choices, .short_name, .required, .secret). */
#define QV_OPTION(settings, field, TYPE, name_, value_name_, default_, help_, ...)                 \
    {                                                                                              \
        .name = (name_), .value_name = (value_name_), .default_text = (default_), .help = (help_), \
        .type = QV_OPT_##TYPE,                                                                     \
        .offset = offsetof(settings, field) +                                                      \
                  0 * sizeof(char[QV_OPTION_FIELD_##TYPE(((settings *)0)->field) ? 1 : -1]),       \
        ##__VA_ARGS__                                                                              \
    }

#define QV_OPTION_FIELD_STRING(f)   _Generic((f), const char * : 1, default : 0)
#define QV_OPTION_FIELD_INT(f)      _Generic((f), int64_t : 1, default : 0)
#define QV_OPTION_FIELD_SIZE(f)     _Generic((f), int64_t : 1, default : 0)
#define QV_OPTION_FIELD_DURATION(f) _Generic((f), int64_t : 1, default : 0)
#define QV_OPTION_FIELD_DOUBLE(f)   _Generic((f), double : 1, default : 0)
#define QV_OPTION_FIELD_FLAG(f)     _Generic((f), bool : 1, default : 0)
#define QV_OPTION_FIELD_ENUM(f)     _Generic((f), int : 1, default : 0)
#define QV_OPTION_FIELD_LIST(f)     _Generic((f), qv_string_list : 1, default : 0)

/* What the help text says around the table. */
typedef struct {
    const char *name;    /* "quiver-broker" */
    const char *summary; /* one or more sentences below the usage line */
    const char *args;   /* positional arguments in the usage line: "COMMAND [ARG...]"; NULL: none */
    const char *epilog; /* printed as it is at the end (examples), or NULL */
    size_t max_args;    /* most positional arguments; 0 = none */
    FILE *out;          /* where help and version go; NULL = stdout */
} qv_program;

typedef enum {
    QV_OPTION_FROM_DEFAULT,
    QV_OPTION_FROM_FILE,
    QV_OPTION_FROM_ENVIRONMENT,
    QV_OPTION_FROM_COMMAND_LINE
} qv_option_source;

typedef struct qv_options qv_options;

/* Fill the fields of *settings that the table names, from all sources (they are zeroed first). On
 * success *out owns every string in them, until qv_options_free. When the command line asks for
 * --help or --version, that is printed, the fields stay zero, the result is QV_OK and
 * qv_options_printed(*out) is true: exit with 0.
 * Errors: ARG (a sentence that names option, value and place), NOT_FOUND or IO or LIMIT or FORMAT
 * (the configuration file), NOMEM; *out is NULL then. */
qv_status qv_options_parse(const qv_option *table, size_t n, const qv_program *program, int argc,
                           char *const *argv, void *settings, qv_options **out);

/* free(NULL) is fine; strings in the settings die with it. */
void qv_options_free(qv_options *options);

/* Whether --help or --version was printed, so that there is nothing left to do. */
bool qv_options_printed(const qv_options *options);

/* Positional arguments in order. Borrowed. */
const qv_string_list *qv_options_args(const qv_options *options);

/* Where the value of a row came from; the name must be in the table. */
qv_option_source qv_options_source(const qv_options *options, const char *name);

/* Print the help text as --help does. */
void qv_options_help(const qv_option *table, size_t n, const qv_program *program, FILE *out);

/* Read one value as an option of that type would ("64K", "30s", "2.5"). Errors: ARG. */
qv_status qv_parse_int(const char *text, int64_t *out);
qv_status qv_parse_size(const char *text, int64_t *out);
qv_status qv_parse_duration(const char *text, int64_t *out);
qv_status qv_parse_double(const char *text, double *out);
qv_status qv_parse_bool(const char *text, bool *out);

#endif
