#include "worker/adapter_loader.h"

#include "common/ring.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

struct qv_adapter_loader {
    qv_adapter_source source;
    qv_ring *jobs, *results; /* of qv_loader_job *, to and from the thread */
    pthread_t thread;
    bool has_thread;
    atomic_bool stop; /* relaxed: it only tells the thread to look no further */
};

/* --- The thread ------------------------------------------------------------------------------ */

/* Read a folder, unless it is as it was. Files that change meanwhile may not belong together. */
static qv_status read_folder(const qv_adapter_source *source, qv_loader_job *job)
{
    void *user = source->user;
    qv_adapter_stamp before = source->stamp(user, job->dir);
    job->unchanged = job->stamp.settled && qv_adapter_stamp_equal(&before, &job->stamp);
    if (job->unchanged)
        return QV_OK;
    job->stamp = before;
    QV_TRY(source->open(user, job->dir, &job->adapter));
    qv_adapter_stamp after = source->stamp(user, job->dir);
    if (qv_adapter_stamp_equal(&before, &after))
        return QV_OK;
    source->close(user, job->adapter);
    job->adapter = NULL;
    return qv_fail(QV_ERR_IO, "%s: the files changed while they were read; load it again",
                   job->dir);
}

static void run_job(const qv_adapter_source *source, qv_loader_job *job)
{
    switch (job->kind) {
    case QV_LOADER_OPEN:
        job->status = read_folder(source, job);
        break;
    case QV_LOADER_INSTALL:
        job->status = source->install(source->user, job->slot, job->adapter);
        break;
    case QV_LOADER_CLEAR:
        job->status = source->clear(source->user, job->slot);
        break;
    }
    if (job->status != QV_OK)
        snprintf(job->reason, sizeof job->reason, "%s", qv_error());
}

static bool must_stop(qv_adapter_loader *loader)
{
    return atomic_load_explicit(&loader->stop, memory_order_relaxed);
}

static void *loader_main(void *user)
{
    qv_adapter_loader *loader = user;
    while (!must_stop(loader)) {
        qv_loader_job *job;
        qv_ring_wait(loader->jobs, -1);
        while (!must_stop(loader) && qv_ring_pop(loader->jobs, &job)) {
            run_job(&loader->source, job);
            bool pushed = qv_ring_push(loader->results, &job);
            QV_ASSERT(pushed); /* the ring has room for every job there can be */
        }
    }
    return NULL;
}

/* --- Life ------------------------------------------------------------------------------------ */

static qv_status start(qv_adapter_loader *loader, size_t max_jobs)
{
    QV_TRY(qv_ring_new(max_jobs, sizeof(qv_loader_job *), &loader->jobs));
    QV_TRY(qv_ring_new(max_jobs, sizeof(qv_loader_job *), &loader->results));
    if (pthread_create(&loader->thread, NULL, loader_main, loader) != 0)
        return qv_fail(QV_ERR_IO, "cannot start the adapter loader's thread");
    loader->has_thread = true;
    return QV_OK;
}

qv_status qv_adapter_loader_new(size_t max_jobs, const qv_adapter_source *source,
                                qv_adapter_loader **out)
{
    qv_adapter_loader *loader = calloc(1, sizeof *loader);
    if (loader == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the adapter loader");
    loader->source = *source;
    qv_status status = start(loader, max_jobs);
    if (status != QV_OK) {
        qv_adapter_loader_free(loader);
        return status;
    }
    *out = loader;
    return QV_OK;
}

void qv_adapter_loader_free(qv_adapter_loader *loader)
{
    if (loader == NULL)
        return;
    if (loader->has_thread) {
        atomic_store_explicit(&loader->stop, true, memory_order_relaxed);
        qv_ring_wake(loader->jobs);
        pthread_join(loader->thread, NULL);
        for (qv_loader_job *job; (job = qv_adapter_loader_pop(loader)) != NULL;)
            if (job->kind == QV_LOADER_OPEN && job->adapter != NULL)
                loader->source.close(loader->source.user, job->adapter);
    }
    qv_ring_free(loader->jobs);
    qv_ring_free(loader->results);
    free(loader);
}

/* --- Jobs ------------------------------------------------------------------------------------ */

void qv_adapter_loader_push(qv_adapter_loader *loader, qv_loader_job *job)
{
    bool pushed = qv_ring_push(loader->jobs, &job);
    QV_ASSERT(pushed);
}

qv_loader_job *qv_adapter_loader_pop(qv_adapter_loader *loader)
{
    qv_loader_job *job;
    return qv_ring_pop(loader->results, &job) ? job : NULL;
}

int qv_adapter_loader_fd(const qv_adapter_loader *loader)
{
    return qv_ring_fd(loader->results);
}

bool qv_adapter_loader_has_results(const qv_adapter_loader *loader)
{
    return qv_ring_count(loader->results) > 0;
}

/* --- The model as a source ------------------------------------------------------------------- */

static qv_adapter_stamp model_stamp(void *user, const char *dir)
{
    (void)user;
    return qv_adapter_stamp_of(dir);
}

static qv_status model_open(void *user, const char *dir, qv_adapter **out)
{
    return qv_adapter_open(user, dir, out);
}

static qv_status model_install(void *user, int32_t slot, const qv_adapter *adapter)
{
    return qv_model_adapter_install(user, slot, adapter);
}

static qv_status model_clear(void *user, int32_t slot)
{
    return qv_model_adapter_clear(user, slot);
}

static void model_close(void *user, qv_adapter *adapter)
{
    (void)user;
    qv_adapter_close(adapter);
}

static const char *model_digest(void *user, const qv_adapter *adapter)
{
    (void)user;
    return qv_adapter_digest(adapter);
}

static int32_t model_rank(void *user, const qv_adapter *adapter)
{
    (void)user;
    return qv_adapter_max_rank(adapter);
}

static uint64_t model_bytes(void *user, const qv_adapter *adapter)
{
    (void)user;
    return qv_adapter_bytes(adapter);
}

qv_adapter_source qv_adapter_source_of_model(qv_model *model)
{
    return (qv_adapter_source){
        .stamp = model_stamp,
        .open = model_open,
        .install = model_install,
        .clear = model_clear,
        .close = model_close,
        .digest = model_digest,
        .rank = model_rank,
        .bytes = model_bytes,
        .user = model,
    };
}
