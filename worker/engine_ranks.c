#include "worker/engine_ranks.h"

#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* "0,2,3" into the devices of ranks 0, 1, 2; the text must have one for each rank. Empty: 0, 1, 2
 * and so on. */
static qv_status read_devices(const char *text, int32_t n_ranks, int *devices)
{
    for (int32_t i = 0; i < n_ranks; i++)
        devices[i] = i;
    if (text == NULL || text[0] == '\0')
        return QV_OK;
    const char *next = text;
    for (int32_t i = 0;; i++) {
        char *end;
        errno = 0;
        long device = strtol(next, &end, 10);
        if (end == next || errno != 0 || device < 0 || device > 1023 || (*end && *end != ','))
            return qv_fail(QV_ERR_ARG, "devices \"%s\" is not a list of numbers such as 0,1", text);
        if (i >= n_ranks)
            return qv_fail(QV_ERR_ARG, "devices \"%s\" names more devices than tp = %d", text,
                           n_ranks);
        devices[i] = (int)device;
        if (*end == '\0')
            return i + 1 == n_ranks ? QV_OK
                                    : qv_fail(QV_ERR_ARG, "devices \"%s\" names %d for tp = %d",
                                              text, i + 1, n_ranks);
        next = end + 1;
    }
}

/* Threads of one CPU rank: its part of those asked for, or of the processors. */
static int threads_of_rank(int64_t threads, int32_t n_ranks)
{
    cpu_set_t set;
    if (n_ranks == 1)
        return (int)threads;
    int64_t all = threads;
    if (all == 0)
        all = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return all / n_ranks > 0 ? (int)(all / n_ranks) : 1;
}

qv_status qv_engine_ranks_open(const qv_engine_options *o, qv_engine_ranks *out)
{
    int32_t n = o->tp > 0 ? (int32_t)o->tp : 1; /* 0: left out by a caller that has no options */
    *out = (qv_engine_ranks){.ranks = {.expert_groups = o->ep > 0 ? (int32_t)o->ep : 1}};
    int devices[QV_MAX_RANKS];
    QV_ASSERT(n <= QV_MAX_RANKS);
    if (n % out->ranks.expert_groups != 0)
        return qv_fail(QV_ERR_ARG, "ep = %" PRId64 " does not divide tp = %" PRId64, o->ep, o->tp);
    QV_TRY(read_devices(o->devices, n, devices));
    out->ranks.backends = out->backends;
    for (int32_t i = 0; i < n; i++) {
        qv_backend_options backend = {.name = o->backend,
                                      .n_threads = threads_of_rank(o->threads, n),
                                      .device = devices[i],
                                      .deterministic = o->deterministic,
                                      .gemm = o->gemm,
                                      .arithmetic = o->arithmetic,
                                      .all_reduce = o->all_reduce};
        QV_TRY(qv_backend_open(&backend, &out->backends[i]));
        out->ranks.n_ranks = i + 1;
    }
    if (n == 1)
        snprintf(out->device, sizeof out->device, "%s", qv_backend_describe(out->backends[0]));
    else
        snprintf(out->device, sizeof out->device, "%d ranks: %s", n,
                 qv_backend_describe(out->backends[0]));
    return QV_OK;
}

void qv_engine_ranks_close(qv_engine_ranks *ranks)
{
    for (int32_t i = 0; i < ranks->ranks.n_ranks; i++)
        qv_backend_close(ranks->backends[i]);
    *ranks = (qv_engine_ranks){.ranks = {.n_ranks = 0}};
}
