#include "ops/trials.h"

#include <string.h>

static const char *const trials[] = {
#define QV_TRIAL_NAME(constant, name, what) name,
    QV_TRIALS(QV_TRIAL_NAME)
#undef QV_TRIAL_NAME
};

#define QV_TRIAL_LISTED(constant, name, what) name ", "
static const char known[] = QV_TRIALS(QV_TRIAL_LISTED) "all";

enum { N_TRIALS = sizeof trials / sizeof *trials };

static bool is(const char *name, size_t length, const char *other)
{
    return strlen(other) == length && memcmp(name, other, length) == 0;
}

/* The bits of one name; 0: there is none of it. */
static uint32_t bits_of(const char *name, size_t length)
{
    if (is(name, length, "all"))
        return (UINT32_C(1) << N_TRIALS) - 1;
    for (int i = 0; i < N_TRIALS; i++)
        if (is(name, length, trials[i]))
            return UINT32_C(1) << i;
    return 0;
}

qv_status qv_trials_read(const char *names, uint32_t *out)
{
    *out = 0;
    if (names == NULL || *names == '\0')
        return QV_OK;
    for (const char *at = names;; at++) {
        size_t length = strcspn(at, ",");
        uint32_t bits = bits_of(at, length);
        if (bits == 0)
            return qv_fail(QV_ERR_ARG, "no kernel '%.*s' is on trial; there are: %s", (int)length,
                           at, known);
        *out |= bits;
        at += length;
        if (*at == '\0')
            return QV_OK;
    }
}
