/* A clock of ops: what each kind of op takes in a step, by marks on the device between ops. While
 * it runs, models do not replay recorded steps, and no kernel begins before the one in front of it
 * has ended, so the sum is above what a recorded step takes. The engine's thread only.
 */
#ifndef QV_OPS_OP_TIMES_H
#define QV_OPS_OP_TIMES_H

#include "ops/ops.h"

#define QV_MAX_MARKS    8192 /* ops of a step */
#define QV_MAX_OP_KINDS 64

/* All ops of a name and of a matrix [n_out, n_in] (0, 0 where there is none). */
typedef struct {
    const char *name; /* static */
    int64_t n_out, n_in, calls;
    double seconds;
} qv_op_time;

typedef struct qv_op_times qv_op_times;

/* Errors: NOMEM. The backend must outlive the clock. */
qv_status qv_op_times_new(qv_backend *be, qv_op_times **out);
void qv_op_times_free(qv_op_times *times);

/* Ops from here to the end are timed, and counted to what the clock has. The device is kept busy
 * for `head_start` seconds first, so that the host is ahead of it and its own time does not show.
 */
qv_status qv_op_times_begin(qv_op_times *times, double head_start);
/* Wait for them. Errors: those of the device, LIMIT (more ops than QV_MAX_MARKS, or more kinds). */
qv_status qv_op_times_end(qv_op_times *times);

/* What was counted, the longest kind first; borrowed until the next end. */
const qv_op_time *qv_op_times_sorted(qv_op_times *times, int *n);

/* For ops.c: an op was enqueued with this status, which is returned. */
qv_status qv_op_times_note(qv_op_times *times, const char *name, int64_t n_out, int64_t n_in,
                           qv_status status);

#endif
