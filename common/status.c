#include "common/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[QV_STATUS_COUNT] = {
#define QV_STATUS_NAME(name, text) #name,
    QV_STATUS_LIST(QV_STATUS_NAME)
#undef QV_STATUS_NAME
};

static const char *const texts[QV_STATUS_COUNT] = {
#define QV_STATUS_TEXT(name, text) text,
    QV_STATUS_LIST(QV_STATUS_TEXT)
#undef QV_STATUS_TEXT
};

static _Thread_local char error_text[QV_ERROR_MAX];

const char *qv_status_name(qv_status status)
{
    return (unsigned)status < QV_STATUS_COUNT ? names[status] : "ERR_UNKNOWN";
}

const char *qv_status_text(qv_status status)
{
    return (unsigned)status < QV_STATUS_COUNT ? texts[status] : "unknown status";
}

/* Drop a UTF-8 character that the cut left incomplete, so that a sentence is always valid text. */
static void trim_partial_utf8(char *text)
{
    size_t len = strlen(text), i = len;
    while (i > 0 && len - i < 3 && ((unsigned char)text[i - 1] & 0xC0) == 0x80)
        i--;
    if (i == 0)
        return;
    unsigned char lead = (unsigned char)text[i - 1];
    size_t need = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
    if (len - (i - 1) < need)
        text[i - 1] = '\0';
}

qv_status qv_fail(qv_status status, const char *format, ...)
{
    /* Format into a copy first: an argument may be qv_error() itself. */
    char text[QV_ERROR_MAX];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n < 0)
        text[0] = '\0';
    if (n >= (int)sizeof text)
        trim_partial_utf8(text);
    memcpy(error_text, text, sizeof text);
    return status;
}

qv_status qv_fail_prefix(qv_status status, const char *format, ...)
{
    char prefix[QV_ERROR_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(prefix, sizeof prefix, format, args);
    va_end(args);
    return qv_fail(status, "%s: %s", prefix, qv_error());
}

const char *qv_error(void)
{
    return error_text;
}

void qv_assert_failed(const char *cond, const char *file, int line, const char *func)
{
    fprintf(stderr, "%s:%d: %s: assertion failed: %s\n", file, line, func, cond);
    abort();
}
