#include "ops/comm.h"

#include "ops/backend.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

/* How long a rank that waits watches before it sleeps. Collectives follow each other within
 * microseconds during a step, if every rank has a processor; if not, watching only steals time. */
#define SPINS 4000

struct qv_comm {
    int32_t n_ranks;
    int spins;
    void *published[QV_MAX_RANKS]; /* ordered by the barriers around their use */
    pthread_mutex_t lock;
    pthread_cond_t moved;   /* the round is over, or a rank has failed */
    int32_t arrived;        /* under `lock` */
    _Atomic uint32_t round; /* release: what ranks wrote before the barrier is seen after it */
    volatile int32_t *flag[QV_MAX_RANKS]; /* under `lock`; raised by a failure */
    atomic_bool failed;
    int32_t loser;             /* of the first failure; written before `failed` is */
    char reason[QV_ERROR_MAX]; /* likewise */
};

qv_status qv_comm_new(int32_t n_ranks, qv_comm **out)
{
    if (n_ranks < 1 || n_ranks > QV_MAX_RANKS)
        return qv_fail(QV_ERR_ARG, "%d ranks: between 1 and %d are possible", n_ranks,
                       QV_MAX_RANKS);
    qv_comm *comm = calloc(1, sizeof *comm);
    if (comm == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a group of ranks");
    cpu_set_t set;
    bool room = sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) >= n_ranks;
    comm->n_ranks = n_ranks;
    comm->spins = room ? SPINS : 0;
    pthread_mutex_init(&comm->lock, NULL);
    pthread_cond_init(&comm->moved, NULL);
    *out = comm;
    return QV_OK;
}

void qv_comm_free(qv_comm *comm)
{
    if (comm == NULL)
        return;
    pthread_cond_destroy(&comm->moved);
    pthread_mutex_destroy(&comm->lock);
    free(comm);
}

int32_t qv_comm_n_ranks(const qv_comm *comm)
{
    return comm->n_ranks;
}

void qv_backend_join(qv_backend *be, qv_comm *comm, int32_t rank)
{
    QV_ASSERT(rank >= 0 && rank < comm->n_ranks);
    be->comm = comm;
    be->rank = rank;
}

void qv_backend_leave(qv_backend *be)
{
    if (be->comm != NULL && be->comm->n_ranks > 1 && be->table->leave != NULL)
        be->table->leave(be);
    be->comm = NULL;
    be->rank = 0;
}

void qv_comm_fail(qv_comm *comm, int32_t rank, const char *reason)
{
    pthread_mutex_lock(&comm->lock);
    if (!atomic_load_explicit(&comm->failed, memory_order_relaxed)) {
        comm->loser = rank;
        snprintf(comm->reason, sizeof comm->reason, "rank %d failed: %.400s", rank, reason);
    }
    atomic_store_explicit(&comm->failed, true, memory_order_release);
    for (int32_t r = 0; r < comm->n_ranks; r++)
        if (comm->flag[r] != NULL)
            *comm->flag[r] = 1;
    pthread_cond_broadcast(&comm->moved);
    pthread_mutex_unlock(&comm->lock);
}

void qv_comm_flag_failure(qv_comm *comm, int32_t rank, volatile int32_t *flag)
{
    pthread_mutex_lock(&comm->lock);
    comm->flag[rank] = flag;
    if (flag != NULL && atomic_load_explicit(&comm->failed, memory_order_relaxed))
        *flag = 1;
    pthread_mutex_unlock(&comm->lock);
}

int32_t qv_comm_first_failed(const qv_comm *comm)
{
    bool failed = atomic_load_explicit(&comm->failed, memory_order_acquire);
    return failed ? comm->loser : -1;
}

/* Watch for a moment whether the round ends. */
static bool round_ended(qv_comm *comm, uint32_t round)
{
    for (int i = 0; i < comm->spins; i++) {
        if (atomic_load_explicit(&comm->round, memory_order_acquire) != round)
            return true;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    return false;
}

qv_status qv_comm_barrier(qv_comm *comm)
{
    pthread_mutex_lock(&comm->lock);
    uint32_t round = atomic_load_explicit(&comm->round, memory_order_relaxed);
    if (atomic_load_explicit(&comm->failed, memory_order_relaxed)) {
        pthread_mutex_unlock(&comm->lock);
        return qv_fail(QV_ERR_DEVICE, "%s", comm->reason); /* which nobody changes any more */
    }
    if (++comm->arrived == comm->n_ranks) {
        comm->arrived = 0;
        atomic_store_explicit(&comm->round, round + 1, memory_order_release);
        pthread_cond_broadcast(&comm->moved);
        pthread_mutex_unlock(&comm->lock);
        return QV_OK;
    }
    pthread_mutex_unlock(&comm->lock);
    if (round_ended(comm, round))
        return QV_OK;

    pthread_mutex_lock(&comm->lock);
    while (atomic_load_explicit(&comm->round, memory_order_acquire) == round &&
           !atomic_load_explicit(&comm->failed, memory_order_relaxed))
        pthread_cond_wait(&comm->moved, &comm->lock);
    qv_status status = QV_OK;
    if (atomic_load_explicit(&comm->round, memory_order_acquire) == round)
        status = qv_fail(QV_ERR_DEVICE, "%s", comm->reason);
    pthread_mutex_unlock(&comm->lock);
    return status;
}

void qv_comm_publish(qv_comm *comm, int32_t rank, void *data)
{
    comm->published[rank] = data;
}

void *qv_comm_published(const qv_comm *comm, int32_t rank)
{
    return comm->published[rank];
}
