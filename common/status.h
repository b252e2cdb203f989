/* Statuses: what a function that can fail returns.
 *
 * A failure carries a code and one sentence. The sentence is stored per thread by qv_fail() at the
 * place that knows most, and read with qv_error() by the place that handles it. Libraries neither
 * log errors nor exit; they return them. Any thread may call everything here.
 */
#ifndef QV_COMMON_STATUS_H
#define QV_COMMON_STATUS_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One row per status: name, default text. */
#define QV_STATUS_LIST(X)                                                                          \
    X(OK, "ok")                                                                                    \
    X(ERR_ARG, "invalid argument")               /* the caller passed something impossible */      \
    X(ERR_FORMAT, "malformed input")             /* bytes that do not parse */                     \
    X(ERR_SHAPE, "shape mismatch")               /* sizes or dtypes that do not fit together */    \
    X(ERR_UNSUPPORTED, "not supported")          /* well formed, but not something we do */        \
    X(ERR_NOT_FOUND, "not found")                                                                  \
    X(ERR_EXISTS, "already exists")                                                                \
    X(ERR_LIMIT, "limit exceeded")               /* larger than a documented limit */              \
    X(ERR_BUSY, "no capacity right now")         /* may succeed later */                           \
    X(ERR_TIMEOUT, "timed out")                                                                    \
    X(ERR_CANCELLED, "cancelled")                                                                  \
    X(ERR_STATE, "not allowed in this state")                                                      \
    X(ERR_IO, "input/output error")              /* disk or network */                             \
    X(ERR_NOMEM, "out of memory")                                                                  \
    X(ERR_DEVICE, "device error")                /* fatal to the worker process */                 \
    X(ERR_INTERNAL, "internal error")

typedef enum {
#define QV_STATUS_ENUM(name, text) QV_##name,
    QV_STATUS_LIST(QV_STATUS_ENUM)
#undef QV_STATUS_ENUM
    QV_STATUS_COUNT
} qv_status;

/* Longest stored sentence in bytes, terminator included; longer ones are cut at a UTF-8 boundary. */
#define QV_ERROR_MAX 1024

/* "ERR_FORMAT" and the default text of a status. Never NULL. */
const char *qv_status_name(qv_status status);
const char *qv_status_text(qv_status status);

/* Store the sentence for this thread and return `status`. */
qv_status qv_fail(qv_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

/* Put "prefix: " in front of this thread's sentence and return `status` (to add the file, the
 * adapter or the request on the way up). */
qv_status qv_fail_prefix(qv_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

/* This thread's last sentence. Borrowed; valid until the next qv_fail on this thread. */
const char *qv_error(void);

/* Pass a failure up. */
#define QV_TRY(expr)                                                                               \
    do {                                                                                           \
        qv_status qv_try_status = (expr);                                                          \
        if (qv_try_status != QV_OK)                                                                \
            return qv_try_status;                                                                  \
    } while (0)

/* Our own mistakes only; stays on in release builds. Never used on input. */
#define QV_ASSERT(cond)                                                                            \
    do {                                                                                           \
        if (!(cond))                                                                               \
            qv_assert_failed(#cond, __FILE__, __LINE__, __func__);                                 \
    } while (0)

void qv_assert_failed(const char *cond, const char *file, int line, const char *func)
    __attribute__((noreturn, cold));

#ifdef __cplusplus
}
#endif
#endif
