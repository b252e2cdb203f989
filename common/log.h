/* Logging: one line per event, on stderr unless told otherwise.
 *
 *     2025-03-01T12:00:00.123Z INFO  quiver-broker worker joined worker=w1 slots=4
 *     2025-03-01T12:00:00.124Z WARN  quiver-worker req=abc123 adapter not found adapter="my ad"
 *
 * A line is time (UTC, milliseconds), level, program, request id if there is one, message, fields.
 * With `json` set it is one JSON object with the same facts. Control bytes, invalid UTF-8 and
 * quotes are escaped, so that no value can forge a line. Each line leaves by one write(2): lines of
 * several threads do not mix. Any thread may log; qv_log_init is called once, before threads start.
 *
 * An error is logged once, where it is handled. Engine steps do not log; they count (metrics.h).
 * Passwords, tokens and prompts are never logged; qv_log_mask_url hides the password of a URL.
 */
#ifndef QV_COMMON_LOG_H
#define QV_COMMON_LOG_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    QV_LOG_ERROR, /* something was lost or refused that should not have been */
    QV_LOG_WARN,  /* handled, but a person may want to act */
    QV_LOG_INFO,  /* life cycle: started, joined, loaded, drained */
    QV_LOG_DEBUG, /* per request */
    QV_LOG_LEVEL_COUNT
} qv_log_level;

/* "error", "warn", "info", "debug", NULL: indexed by qv_log_level, and the choices of an option. */
extern const char *const qv_log_level_names[QV_LOG_LEVEL_COUNT + 1];

typedef struct {
    qv_log_level level;  /* lines above this level are dropped */
    const char *program; /* borrowed for ever (a literal); NULL leaves the name of the executable */
    bool json;           /* one JSON object per line */
    int fd;              /* where lines go; 0 means stderr. Not closed by us */
} qv_log_options;

/* Before this call: level info, text, stderr. May be called again (tests do). */
void qv_log_init(const qv_log_options *options);

/* Change the level while running (any thread). */
void qv_log_set_level(qv_log_level level);

/* Longest line in bytes, newline included; longer ones are cut at a UTF-8 character and end in
 * "...". */
#define QV_LOG_LINE_MAX 4096

/* --- printf forms --------------------------------------------------------------------------- */

/* The format is a sentence without a full stop. `id` is the request's id, or NULL. The name of the
 * first is qv_err because qv_error() is this thread's failure text (status.h). */
#define qv_err(...)           QV_LOG_PRINTF(QV_LOG_ERROR, NULL, __VA_ARGS__)
#define qv_warn(...)          QV_LOG_PRINTF(QV_LOG_WARN, NULL, __VA_ARGS__)
#define qv_info(...)          QV_LOG_PRINTF(QV_LOG_INFO, NULL, __VA_ARGS__)
#define qv_debug(...)         QV_LOG_PRINTF(QV_LOG_DEBUG, NULL, __VA_ARGS__)
#define qv_err_req(id, ...)   QV_LOG_PRINTF(QV_LOG_ERROR, id, __VA_ARGS__)
#define qv_warn_req(id, ...)  QV_LOG_PRINTF(QV_LOG_WARN, id, __VA_ARGS__)
#define qv_info_req(id, ...)  QV_LOG_PRINTF(QV_LOG_INFO, id, __VA_ARGS__)
#define qv_debug_req(id, ...) QV_LOG_PRINTF(QV_LOG_DEBUG, id, __VA_ARGS__)

/* --- fields --------------------------------------------------------------------------------- */

/* A line with fields: message, then key=value pairs.
 *
 *     qv_log_event(QV_LOG_INFO, NULL, "worker joined", QV_KV("worker", id), QV_KV("slots", 4));
 *
 * The type of a value is seen by the compiler: strings (NULL prints as null), integers, doubles and
 * bools. Keys are literals. At least one field is given. */
#define qv_log_event(level, id, message, ...)                                                      \
    do {                                                                                           \
        if (qv_log_enabled(level)) {                                                               \
            const qv_log_field qv_log_fields[] = {__VA_ARGS__};                                    \
            qv_log_write_fields(level, id, message, qv_log_fields,                                 \
                                sizeof qv_log_fields / sizeof qv_log_fields[0]);                   \
        }                                                                                          \
    } while (0)

#define QV_KV(key, value)                                                                          \
    _Generic((value),                                                                              \
        bool: qv_log_field_bool,                                                                   \
        char *: qv_log_field_str,                                                                  \
        const char *: qv_log_field_str,                                                            \
        float: qv_log_field_double,                                                                \
        double: qv_log_field_double,                                                               \
        unsigned char: qv_log_field_uint,                                                          \
        unsigned short: qv_log_field_uint,                                                         \
        unsigned int: qv_log_field_uint,                                                           \
        unsigned long: qv_log_field_uint,                                                          \
        unsigned long long: qv_log_field_uint,                                                     \
        default: qv_log_field_int)(key, value)

typedef struct {
    const char *key;
    enum { QV_LOG_STR, QV_LOG_INT, QV_LOG_UINT, QV_LOG_DOUBLE, QV_LOG_BOOL } type;
    union {
        const char *s;
        int64_t i;
        uint64_t u;
        double d;
        bool b;
    } value;
} qv_log_field;

/* --- rate limit ----------------------------------------------------------------------------- */

/* A printf form for hot paths: this call site writes at most `burst` lines at once and on average
 * one line every `interval_ms` (both at least 1). What it swallows is counted, and the next line
 * that passes says suppressed=N.
 *
 *     QV_LOG_EVERY(1000, 5, QV_LOG_WARN, id, "reply dropped: %s", qv_error()); */
#define QV_LOG_EVERY(interval_ms, burst, level, id, ...)                                           \
    do {                                                                                           \
        static qv_log_limiter qv_log_site;                                                         \
        uint64_t qv_log_suppressed = 0;                                                            \
        if (qv_log_enabled(level) &&                                                               \
            qv_log_limiter_pass(&qv_log_site, interval_ms, burst, &qv_log_suppressed))             \
            qv_log_write(level, id, qv_log_suppressed, __VA_ARGS__);                               \
    } while (0)

/* A token bucket kept as one time (the generic cell rate algorithm). Zero is a full bucket. */
typedef struct {
    _Atomic uint64_t full_at_ns; /* when the bucket is full again; relaxed: it orders nothing */
    _Atomic uint64_t suppressed; /* lines swallowed since the last that passed; relaxed */
} qv_log_limiter;

/* Take one token. On success *suppressed is what was swallowed before. Any thread, lock-free. */
bool qv_log_limiter_pass(qv_log_limiter *limiter, uint64_t interval_ms, uint64_t burst,
                         uint64_t *suppressed);

/* The same with the time given, for tests. */
bool qv_log_limiter_pass_at(qv_log_limiter *limiter, uint64_t now_ns, uint64_t interval_ms,
                            uint64_t burst, uint64_t *suppressed);

/* --- secrets -------------------------------------------------------------------------------- */

/* Copy `url` into out[size] with its password replaced: redis://user:***@host:6379. A text without
 * a password is copied as it is. Cut to fit, always terminated. Returns `out`. */
const char *qv_log_mask_url(const char *url, char *out, size_t size);

/* --- what the macros use -------------------------------------------------------------------- */

extern _Atomic int qv_log_threshold; /* relaxed: a level change needs no order with other data */

static inline bool qv_log_enabled(qv_log_level level)
{
    return (int)level <= atomic_load_explicit(&qv_log_threshold, memory_order_relaxed);
}

#define QV_LOG_PRINTF(level, id, ...)                                                              \
    do {                                                                                           \
        if (qv_log_enabled(level))                                                                 \
            qv_log_write(level, id, 0, __VA_ARGS__);                                               \
    } while (0)

/* Write one line. `id` may be NULL; `suppressed` 0 prints nothing. errno is kept. */
void qv_log_write(qv_log_level level, const char *id, uint64_t suppressed, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
void qv_log_write_fields(qv_log_level level, const char *id, const char *message,
                         const qv_log_field *fields, size_t n_fields);

static inline qv_log_field qv_log_field_str(const char *key, const char *value)
{
    return (qv_log_field){key, QV_LOG_STR, {.s = value}};
}

static inline qv_log_field qv_log_field_int(const char *key, int64_t value)
{
    return (qv_log_field){key, QV_LOG_INT, {.i = value}};
}

static inline qv_log_field qv_log_field_uint(const char *key, uint64_t value)
{
    return (qv_log_field){key, QV_LOG_UINT, {.u = value}};
}

static inline qv_log_field qv_log_field_double(const char *key, double value)
{
    return (qv_log_field){key, QV_LOG_DOUBLE, {.d = value}};
}

static inline qv_log_field qv_log_field_bool(const char *key, bool value)
{
    return (qv_log_field){key, QV_LOG_BOOL, {.b = value}};
}

#endif
