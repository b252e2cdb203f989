#include "models/ranks.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

/* What a thread of the group is and how its part of the job ended. */
typedef struct {
    qv_ranks *ranks;
    int32_t rank;
    pthread_t thread;
    qv_status status;
    char error[QV_ERROR_MAX];
} worker;

struct qv_ranks {
    qv_comm *comm;
    int32_t n_ranks;
    worker workers[QV_MAX_RANKS]; /* [0] is the caller's and has no thread */
    int32_t n_threads;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    qv_rank_fn *fn; /* under `lock`, as all below */
    void *ctx;
    uint64_t job; /* counts jobs */
    int32_t n_running;
    bool stop;
};

/* Run the job on one rank. A failure is told to the group before anybody can wait for this rank. */
static void run_job(worker *w, qv_rank_fn *fn, void *ctx)
{
    qv_ranks *ranks = w->ranks;
    w->status = fn(w->rank, ctx);
    if (w->status == QV_OK)
        return;
    snprintf(w->error, sizeof w->error, "%s", qv_error());
    if (ranks->comm != NULL)
        qv_comm_fail(ranks->comm, w->rank, w->error);
}

static void *work(void *arg)
{
    worker *w = arg;
    qv_ranks *ranks = w->ranks;
    uint64_t done = 0;
    pthread_mutex_lock(&ranks->lock);
    for (;;) {
        while (ranks->job == done && !ranks->stop)
            pthread_cond_wait(&ranks->changed, &ranks->lock);
        if (ranks->stop)
            break;
        done = ranks->job;
        qv_rank_fn *fn = ranks->fn;
        void *ctx = ranks->ctx;
        pthread_mutex_unlock(&ranks->lock);
        run_job(w, fn, ctx);
        pthread_mutex_lock(&ranks->lock);
        if (--ranks->n_running == 0)
            pthread_cond_broadcast(&ranks->changed);
    }
    pthread_mutex_unlock(&ranks->lock);
    return NULL;
}

qv_status qv_ranks_new(qv_comm *comm, qv_ranks **out)
{
    qv_ranks *ranks = calloc(1, sizeof *ranks);
    if (ranks == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for ranks");
    ranks->comm = comm;
    ranks->n_ranks = comm != NULL ? qv_comm_n_ranks(comm) : 1;
    pthread_mutex_init(&ranks->lock, NULL);
    pthread_cond_init(&ranks->changed, NULL);
    ranks->workers[0] = (worker){.ranks = ranks};
    for (int32_t r = 1; r < ranks->n_ranks; r++) {
        ranks->workers[r] = (worker){.ranks = ranks, .rank = r};
        if (pthread_create(&ranks->workers[r].thread, NULL, work, &ranks->workers[r]) != 0) {
            qv_ranks_free(ranks);
            return qv_fail(QV_ERR_LIMIT, "the system refuses a thread for rank %d", r);
        }
        ranks->n_threads++;
    }
    *out = ranks;
    return QV_OK;
}

void qv_ranks_free(qv_ranks *ranks)
{
    if (ranks == NULL)
        return;
    pthread_mutex_lock(&ranks->lock);
    ranks->stop = true;
    pthread_cond_broadcast(&ranks->changed);
    pthread_mutex_unlock(&ranks->lock);
    for (int32_t r = 1; r <= ranks->n_threads; r++)
        pthread_join(ranks->workers[r].thread, NULL);
    pthread_cond_destroy(&ranks->changed);
    pthread_mutex_destroy(&ranks->lock);
    free(ranks);
}

qv_status qv_ranks_run(qv_ranks *ranks, qv_rank_fn *fn, void *ctx)
{
    if (ranks->n_ranks == 1)
        return fn(0, ctx);
    pthread_mutex_lock(&ranks->lock);
    ranks->fn = fn;
    ranks->ctx = ctx;
    ranks->n_running = ranks->n_threads;
    ranks->job++;
    pthread_cond_broadcast(&ranks->changed);
    pthread_mutex_unlock(&ranks->lock);

    run_job(&ranks->workers[0], fn, ctx);

    pthread_mutex_lock(&ranks->lock);
    while (ranks->n_running > 0)
        pthread_cond_wait(&ranks->changed, &ranks->lock);
    pthread_mutex_unlock(&ranks->lock);

    /* The rank that failed first; others may only have heard of it. */
    int32_t first = qv_comm_first_failed(ranks->comm);
    if (first < 0)
        return QV_OK;
    const worker *w = &ranks->workers[first];
    return qv_fail(w->status, "rank %d: %s", first, w->error);
}
