#include "common/log.h"

#include "common/clock.h"
#include "common/utf8.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

const char *const qv_log_level_names[QV_LOG_LEVEL_COUNT + 1] = {"error", "warn", "info", "debug",
                                                                NULL};

static const char *const padded_names[QV_LOG_LEVEL_COUNT] = {"ERROR", "WARN ", "INFO ", "DEBUG"};

_Atomic int qv_log_threshold = QV_LOG_INFO;

static qv_log_options settings; /* set by qv_log_init before threads start, then only read */

void qv_log_init(const qv_log_options *options)
{
    settings = *options;
    qv_log_set_level(options->level);
}

void qv_log_set_level(qv_log_level level)
{
    atomic_store_explicit(&qv_log_threshold, (int)level, memory_order_relaxed);
}

/* --- the line buffer ------------------------------------------------------------------------ */

/* A text that ends early is marked "..."; these bytes are kept for that, and for what closes the
 * line: quote, brace, newline. */
#define RESERVE 8

typedef struct {
    char data[QV_LOG_LINE_MAX];
    size_t len;
    bool full; /* something did not fit; nothing more is added but the end */
} line;

/* Add n bytes, or nothing if they do not fit. */
static bool put(line *l, const char *text, size_t n)
{
    if (l->full || n > sizeof l->data - RESERVE - l->len) {
        l->full = true;
        return false;
    }
    memcpy(l->data + l->len, text, n);
    l->len += n;
    return true;
}

static bool put_str(line *l, const char *text)
{
    return put(l, text, strlen(text));
}

/* Close the line: allowed to use the reserve. */
static void put_end(line *l, const char *text)
{
    size_t n = strlen(text);
    memcpy(l->data + l->len, text, n);
    l->len += n;
}

/* --- escaping ------------------------------------------------------------------------------- */

/* What a terminal or a log reader could take for more than text: control characters, line and
 * paragraph separators, and what turns the direction of writing. */
static bool is_unsafe(uint32_t c)
{
    return c < 0x20 || (c >= 0x7F && c < 0xA0) || c == 0x2028 || c == 0x2029 ||
           (c >= 0x202A && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
}

/* Add text with everything unsafe escaped; `quoted` escapes '"' too. Cut text ends in "...". */
static void put_escaped(line *l, const char *text, bool quoted)
{
    const char *end = text + strlen(text);
    while (text < end && !l->full) {
        char escape[16];
        uint32_t c = 0;
        size_t n = qv_utf8_decode(text, (size_t)(end - text), &c);
        bool added;
        if (n == 0) {
            n = 1;
            snprintf(escape, sizeof escape, settings.json ? "\\ufffd" : "\\x%02x",
                     (unsigned char)*text);
            added = put_str(l, escape);
        } else if (c == '\n' || c == '\r' || c == '\t') {
            added = put_str(l, c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t");
        } else if (is_unsafe(c)) {
            snprintf(escape, sizeof escape, "\\u%04" PRIx32, c);
            added = put_str(l, escape);
        } else if (c == '\\' || (c == '"' && quoted)) {
            added = put_str(l, c == '"' ? "\\\"" : "\\\\");
        } else {
            added = put(l, text, n);
        }
        if (!added)
            put_end(l, "...");
        text += n;
    }
}

/* A value that stands after '=' as it is: not empty, nothing that could end or fake a pair. */
static bool is_plain(const char *text)
{
    for (const unsigned char *s = (const unsigned char *)text; *s != '\0'; s++)
        if (*s <= ' ' || *s == '"' || *s == '=' || *s == '\\' || *s >= 0x7F)
            return false;
    return *text != '\0';
}

static void put_quoted(line *l, const char *text)
{
    if (put_str(l, "\"")) {
        put_escaped(l, text, true);
        put_end(l, "\"");
    }
}

/* --- one line ------------------------------------------------------------------------------- */

static void put_value(line *l, const qv_log_field *field)
{
    char number[32];
    switch (field->type) {
    case QV_LOG_STR:
        if (field->value.s == NULL)
            put_str(l, "null");
        else if (!settings.json && is_plain(field->value.s))
            put_escaped(l, field->value.s, false);
        else
            put_quoted(l, field->value.s);
        return;
    case QV_LOG_INT:
        snprintf(number, sizeof number, "%" PRId64, field->value.i);
        break;
    case QV_LOG_UINT:
        snprintf(number, sizeof number, "%" PRIu64, field->value.u);
        break;
    case QV_LOG_DOUBLE:
        if (settings.json && !isfinite(field->value.d)) /* JSON has no word for these */
            snprintf(number, sizeof number, "\"%g\"", field->value.d);
        else
            snprintf(number, sizeof number, "%.9g", field->value.d);
        break;
    case QV_LOG_BOOL:
        snprintf(number, sizeof number, "%s", field->value.b ? "true" : "false");
        break;
    }
    put_str(l, number);
}

/* Add one pair, or nothing of it when not even its beginning fits. */
static void put_field(line *l, const qv_log_field *field)
{
    size_t start = l->len;
    bool begun = settings.json ? put_str(l, ",\"") && put_str(l, field->key) && put_str(l, "\":")
                               : put_str(l, " ") && put_str(l, field->key) && put_str(l, "=");
    size_t value_start = l->len;
    if (begun)
        put_value(l, field);
    if (l->len == value_start) /* cut before the value */
        l->len = start;
}

static void put_time(line *l)
{
    uint64_t now_ms = qv_wall_ms();
    time_t seconds = (time_t)(now_ms / 1000);
    struct tm utc;
    gmtime_r(&seconds, &utc);
    char text[40];
    size_t n = strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(text + n, sizeof text - n, ".%03uZ", (unsigned)(now_ms % 1000));
    put_str(l, text);
}

static void put_head(line *l, qv_log_level level, const char *id, const char *message)
{
    const char *program =
        settings.program != NULL ? settings.program : program_invocation_short_name;
    if (settings.json) {
        put_str(l, "{\"time\":\"");
        put_time(l);
        put_str(l, "\",\"level\":\"");
        put_str(l, qv_log_level_names[level]);
        put_str(l, "\"");
        put_field(l, &(qv_log_field){"program", QV_LOG_STR, {.s = program}});
        if (id != NULL)
            put_field(l, &(qv_log_field){"req", QV_LOG_STR, {.s = id}});
        put_field(l, &(qv_log_field){"message", QV_LOG_STR, {.s = message}});
        return;
    }
    put_time(l);
    put_str(l, " ");
    put_str(l, padded_names[level]);
    put_str(l, " ");
    put_escaped(l, program, false);
    if (id != NULL)
        put_field(l, &(qv_log_field){"req", QV_LOG_STR, {.s = id}});
    put_str(l, " ");
    put_escaped(l, message, false);
}

/* Close the line and write it at once. A reader that does not take it loses it: a program never
 * waits or fails for its log. */
static void write_line(line *l)
{
    put_end(l, settings.json ? "}\n" : "\n");
    int fd = settings.fd > 0 ? settings.fd : STDERR_FILENO;
    for (size_t done = 0; done < l->len;) {
        ssize_t n = write(fd, l->data + done, l->len - done);
        if (n < 0 && errno != EINTR)
            return;
        if (n > 0)
            done += (size_t)n;
    }
}

void qv_log_write(qv_log_level level, const char *id, uint64_t suppressed, const char *format, ...)
{
    int saved_errno = errno; /* first, and %m in the format still finds it */
    char message[QV_LOG_LINE_MAX];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(message, sizeof message, format, args);
    va_end(args);
    if (n < 0)
        message[0] = '\0';

    line l = {.len = 0};
    put_head(&l, level, id, message);
    if (suppressed != 0)
        put_field(&l, &(qv_log_field){"suppressed", QV_LOG_UINT, {.u = suppressed}});
    write_line(&l);
    errno = saved_errno;
}

void qv_log_write_fields(qv_log_level level, const char *id, const char *message,
                         const qv_log_field *fields, size_t n_fields)
{
    int saved_errno = errno;
    line l = {.len = 0};
    put_head(&l, level, id, message);
    for (size_t i = 0; i < n_fields; i++)
        put_field(&l, &fields[i]);
    write_line(&l);
    errno = saved_errno;
}

/* --- rate limit ----------------------------------------------------------------------------- */

bool qv_log_limiter_pass_at(qv_log_limiter *limiter, uint64_t now_ns, uint64_t interval_ms,
                            uint64_t burst, uint64_t *suppressed)
{
    uint64_t interval_ns = interval_ms * UINT64_C(1000000);
    uint64_t full_at = atomic_load_explicit(&limiter->full_at_ns, memory_order_relaxed);
    for (;;) {
        uint64_t next = (full_at > now_ns ? full_at : now_ns) + interval_ns;
        if (next - now_ns > burst * interval_ns) {
            atomic_fetch_add_explicit(&limiter->suppressed, 1, memory_order_relaxed);
            return false;
        }
        if (atomic_compare_exchange_weak_explicit(&limiter->full_at_ns, &full_at, next,
                                                  memory_order_relaxed, memory_order_relaxed))
            break;
    }
    *suppressed = atomic_exchange_explicit(&limiter->suppressed, 0, memory_order_relaxed);
    return true;
}

bool qv_log_limiter_pass(qv_log_limiter *limiter, uint64_t interval_ms, uint64_t burst,
                         uint64_t *suppressed)
{
    return qv_log_limiter_pass_at(limiter, qv_now_ns(), interval_ms, burst, suppressed);
}

/* --- secrets -------------------------------------------------------------------------------- */

const char *qv_log_mask_url(const char *url, char *out, size_t size)
{
    /* The last '@' of the whole text ends the password: one that holds '/' or '@' unescaped is
     * against the rules, but it must not leak for that. */
    const char *scheme = strstr(url, "://");
    const char *user = scheme != NULL ? scheme + 3 : url;
    const char *at = strrchr(user, '@');
    const char *colon = strchr(user, ':');
    if (at != NULL && colon != NULL && colon < at)
        snprintf(out, size, "%.*s***%s", (int)(colon + 1 - url), url, at);
    else
        snprintf(out, size, "%s", url);
    return out;
}
