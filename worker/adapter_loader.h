/* An adapter loader: a thread that reads adapters from disk and checks them, or copies them to the
 * device, beside the engine's steps. The adapter cache has some that read and one that copies, so
 * that a copy never waits for a disk.
 *
 * Jobs go to it by one ring and come back by another, in order. A job belongs to the loader's
 * thread from push to pop; its memory is the caller's. All functions here are the engine thread's.
 */
#ifndef QV_WORKER_ADAPTER_LOADER_H
#define QV_WORKER_ADAPTER_LOADER_H

#include "models/model.h"
#include "worker/adapter_stamp.h"

/* What loads adapters: the model's functions, or a test's. The first four are called on loaders'
 * threads, `close` on theirs and on the engine's, the others on the engine's. */
typedef struct {
    qv_adapter_stamp (*stamp)(void *user, const char *dir);
    qv_status (*open)(void *user, const char *dir, qv_adapter **out);
    qv_status (*install)(void *user, int32_t slot, const qv_adapter *adapter);
    qv_status (*clear)(void *user, int32_t slot);

    void (*close)(void *user, qv_adapter *adapter);
    const char *(*digest)(void *user, const qv_adapter *adapter);
    int32_t (*rank)(void *user, const qv_adapter *adapter);
    uint64_t (*bytes)(void *user, const qv_adapter *adapter);
    void *user;
} qv_adapter_source;

/* The functions of models/model.h; `model` is borrowed. */
qv_adapter_source qv_adapter_source_of_model(qv_model *model);

typedef enum {
    QV_LOADER_OPEN,    /* read and check a directory */
    QV_LOADER_INSTALL, /* copy an adapter into a slot */
    QV_LOADER_CLEAR    /* zero a slot */
} qv_loader_kind;

typedef struct {
    qv_loader_kind kind;
    const char *dir;        /* OPEN */
    qv_adapter_stamp stamp; /* OPEN: of an earlier read, unless it is not settled; the result */
    bool unchanged;         /* OPEN: the stamp is still the same, and nothing was read */
    int32_t slot;           /* INSTALL, CLEAR */
    qv_adapter *adapter;    /* INSTALL: which; OPEN: the result, which the caller owns, or NULL */
    void *owner;            /* whatever the caller hangs the job on */
    qv_status status;       /* the result */
    char reason[QV_ERROR_MAX]; /* of a failure */
} qv_loader_job;

typedef struct qv_adapter_loader qv_adapter_loader;

/* Starts the thread. `max_jobs` bounds the jobs that are pushed and not popped. `source` is copied.
 * Errors: NOMEM, IO (no thread). */
qv_status qv_adapter_loader_new(size_t max_jobs, const qv_adapter_source *source,
                                qv_adapter_loader **out);

/* Waits for the job in hand, drops those behind it and ends the thread. Adapters that were opened
 * and not popped are closed. free(NULL) is fine. */
void qv_adapter_loader_free(qv_adapter_loader *loader);

void qv_adapter_loader_push(qv_adapter_loader *loader, qv_loader_job *job);

/* The next job that is done; NULL if there is none yet. */
qv_loader_job *qv_adapter_loader_pop(qv_adapter_loader *loader);

/* Readable when a job may be popped; true when one can. */
int qv_adapter_loader_fd(const qv_adapter_loader *loader);
bool qv_adapter_loader_has_results(const qv_adapter_loader *loader);

#endif
