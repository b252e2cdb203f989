#include "ops/op_times.h"

#include "common/clock.h"
#include "ops/backend.h"

#include <stdlib.h>
#include <string.h>

struct qv_op_times {
    qv_backend *be;
    int32_t n_marks; /* of this step: op i is between marks i and i + 1 */
    bool full;
    int32_t kind[QV_MAX_MARKS]; /* of op i */
    double clock[QV_MAX_MARKS]; /* seconds, where the backend has no marks of its own */
    int n_kinds;
    qv_op_time kinds[QV_MAX_OP_KINDS];
};

qv_status qv_op_times_new(qv_backend *be, qv_op_times **out)
{
    qv_op_times *times = calloc(1, sizeof *times);
    if (times == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a clock of ops");
    times->be = be;
    *out = times;
    return QV_OK;
}

void qv_op_times_free(qv_op_times *times)
{
    if (times != NULL && times->be->times == times)
        times->be->times = NULL;
    free(times);
}

static qv_status mark(qv_op_times *times)
{
    if (times->n_marks == QV_MAX_MARKS) {
        times->full = true;
        return QV_OK;
    }
    int32_t i = times->n_marks++;
    times->clock[i] = (double)qv_now_ns() * 1e-9;
    return times->be->table->mark != NULL ? times->be->table->mark(times->be, i) : QV_OK;
}

qv_status qv_op_times_begin(qv_op_times *times, double head_start)
{
    times->n_marks = 0;
    times->full = false;
    if (times->be->table->hold != NULL)
        QV_TRY(times->be->table->hold(times->be, head_start));
    QV_TRY(mark(times));
    times->be->times = times;
    return QV_OK;
}

/* -1: there are too many. */
static int32_t find_kind(qv_op_times *times, const char *name, int64_t n_out, int64_t n_in)
{
    for (int i = 0; i < times->n_kinds; i++) {
        const qv_op_time *k = &times->kinds[i];
        if (k->n_out == n_out && k->n_in == n_in && strcmp(k->name, name) == 0)
            return i;
    }
    if (times->n_kinds == QV_MAX_OP_KINDS)
        return -1;
    times->kinds[times->n_kinds] = (qv_op_time){.name = name, .n_out = n_out, .n_in = n_in};
    return times->n_kinds++;
}

qv_status qv_op_times_note(qv_op_times *times, const char *name, int64_t n_out, int64_t n_in,
                           qv_status status)
{
    QV_TRY(status);
    int32_t op = times->n_marks - 1, kind = find_kind(times, name, n_out, n_in);
    if (kind < 0)
        times->full = true;
    if (times->full)
        return QV_OK;
    times->kind[op] = kind;
    return mark(times);
}

qv_status qv_op_times_end(qv_op_times *times)
{
    times->be->times = NULL;
    QV_TRY(qv_backend_sync(times->be));
    if (times->full)
        return qv_fail(QV_ERR_LIMIT, "a step of more than %d ops or %d kinds of them", QV_MAX_MARKS,
                       QV_MAX_OP_KINDS);
    for (int32_t i = 0; i + 1 < times->n_marks; i++) {
        double seconds = times->clock[i + 1] - times->clock[i];
        if (times->be->table->between != NULL)
            QV_TRY(times->be->table->between(times->be, i, &seconds));
        times->kinds[times->kind[i]].calls++;
        times->kinds[times->kind[i]].seconds += seconds;
    }
    return QV_OK;
}

static int longest_first(const void *a, const void *b)
{
    double x = ((const qv_op_time *)a)->seconds, y = ((const qv_op_time *)b)->seconds;
    return x > y ? -1 : x < y;
}

const qv_op_time *qv_op_times_sorted(qv_op_times *times, int *n)
{
    qsort(times->kinds, (size_t)times->n_kinds, sizeof *times->kinds, longest_first);
    *n = times->n_kinds;
    return times->kinds;
}
