/* Kernels on trial: right by the tests, but not yet timed on a device, so that they are used only
 * where they are asked for by name. One that has proved faster replaces what it was tried against
 * and leaves this list.
 */
#ifndef QV_OPS_TRIALS_H
#define QV_OPS_TRIALS_H

#include "common/status.h"

#include <stdint.h>

/* What is on trial: constant, name in options, what it does. */
#define QV_TRIALS(X)                                                                               \
    X(EXPERTS, "experts",                                                                          \
      "router and list of experts in one kernel, products of one input together")

typedef enum {
#define QV_TRIAL_INDEX(constant, name, what) QV_TRIAL_INDEX_##constant,
    QV_TRIALS(QV_TRIAL_INDEX)
#undef QV_TRIAL_INDEX
} qv_trial_index;

typedef enum {
#define QV_TRIAL_BIT(constant, name, what) QV_TRIAL_##constant = 1 << QV_TRIAL_INDEX_##constant,
    QV_TRIALS(QV_TRIAL_BIT)
#undef QV_TRIAL_BIT
} qv_trial;

/* Names with commas between them, or "all"; NULL and "" are none. *out: a bit each (qv_trial).
 * Errors: ARG (a name that is none, the message has it and those there are). */
qv_status qv_trials_read(const char *names, uint32_t *out);

#endif
