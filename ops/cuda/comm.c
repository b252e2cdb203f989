/* Collectives of CUDA ranks. Ranks on devices of their own go through NCCL, on the compute stream,
 * so that they may be recorded into graphs; or, as the option all_reduce asks, write into each
 * other's memory (direct.h), always or for messages that are short. Ranks that share a device,
 * which NCCL refuses, read each other's memory: events order their streams, barriers of the host
 * the recording of the events.
 *
 * A rank that fails must not leave the others waiting on their devices: whoever waits looks whether
 * the group has failed, and then aborts its communicator.
 */
#include "common/log.h"
#include "kernels/kernels_comm.h"
#include "ops/cuda/direct.h"
#include "ops/cuda/nccl.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* With "auto" and two ranks, longer messages go through NCCL; docs/performance.md has the times. */
#define DIRECT_BYTES ((size_t)4 << 20)

/* What it shows them in a collective of ranks that share a device. */
typedef struct {
    qv_tensor x;
    cudaEvent_t events[3]; /* x is there; its part of the sum is; it has read the others' parts */
} exhibit;

struct qv_cuda_comm {
    const qv_nccl *nccl;
    qv_nccl_comm *comm;     /* NULL: none, or aborted */
    qv_cuda_direct *direct; /* NULL: none */
    bool by_events;         /* all ranks share a device, and there is no `direct` */
    bool met;               /* the backends of all ranks are published */
    bool failed;            /* some rank of the group: nothing is to be waited for */
    exhibit mine;
    exhibit *of[QV_MAX_RANKS];
};

/* --- Connect ------------------------------------------------------------------------------ */

/* The devices of all ranks. *shared: they are all on one; if not, each has its own. */
static qv_status meet(qv_cuda_backend *cuda, int *devices, bool *shared)
{
    qv_comm *comm = cuda->base.comm;
    int32_t n = qv_comm_n_ranks(comm), n_same = 0;
    qv_comm_publish(comm, cuda->base.rank, &cuda->device);
    QV_TRY(qv_comm_barrier(comm));
    for (int32_t r = 0; r < n; r++) {
        devices[r] = *(const int *)qv_comm_published(comm, r);
        for (int32_t q = 0; q < r; q++)
            n_same += devices[r] == devices[q];
    }
    QV_TRY(qv_comm_barrier(comm));
    *shared = n_same > 0;
    if (n_same > 0 && n_same != n * (n - 1) / 2)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "cuda: %d ranks share some devices: each needs its own, or all the same", n);
    return QV_OK;
}

/* *all: whether `mine` is true on every rank. */
static qv_status agree(qv_cuda_backend *cuda, bool mine, bool *all)
{
    qv_comm *comm = cuda->base.comm;
    qv_comm_publish(comm, cuda->base.rank, &mine);
    QV_TRY(qv_comm_barrier(comm));
    *all = true;
    for (int32_t r = 0; r < qv_comm_n_ranks(comm); r++)
        *all = *all && *(const bool *)qv_comm_published(comm, r);
    return qv_comm_barrier(comm); /* `mine` is on the stack */
}

static qv_status connect_nccl(qv_cuda_backend *cuda, struct qv_cuda_comm *c)
{
    qv_comm *comm = cuda->base.comm;
    qv_nccl_id mine = {{0}}, id;
    QV_TRY(qv_nccl_load(&c->nccl));
    if (cuda->base.rank == 0)
        QV_TRY(qv_nccl_check(c->nccl, c->nccl->get_unique_id(&mine), "ncclGetUniqueId"));
    qv_comm_publish(comm, cuda->base.rank, &mine);
    QV_TRY(qv_comm_barrier(comm));
    id = *(const qv_nccl_id *)qv_comm_published(comm, 0);
    QV_TRY(qv_comm_barrier(comm));
    int result = c->nccl->comm_init_rank(&c->comm, qv_comm_n_ranks(comm), id, cuda->base.rank);
    return qv_nccl_check(c->nccl, result, "ncclCommInitRank");
}

static qv_status connect_events(qv_cuda_backend *cuda, struct qv_cuda_comm *c)
{
    c->by_events = true;
    cuda->base.not_recordable = true; /* barriers of the host order it */
    for (int i = 0; i < 3; i++)
        QV_CUDA_TRY(cudaEventCreateWithFlags(&c->mine.events[i], cudaEventDisableTiming));
    qv_comm_publish(cuda->base.comm, cuda->base.rank, &c->mine);
    QV_TRY(qv_comm_barrier(cuda->base.comm));
    for (int32_t r = 0; r < qv_comm_n_ranks(cuda->base.comm); r++)
        c->of[r] = qv_comm_published(cuda->base.comm, r);
    return qv_comm_barrier(cuda->base.comm);
}

/* Which ways this group has; the direct one alone where tokens must get the same bits in any step,
 * as it adds up in the order of ranks always. On one device the direct way is taken only when it is
 * asked for by name: kernels that wait for each other there must find room beside all others. */
static qv_status connect(qv_cuda_backend *cuda, struct qv_cuda_comm *c)
{
    int devices[QV_MAX_RANKS];
    bool shared, direct = cuda->sums != QV_CUDA_SUMS_NCCL;
    int32_t n_ranks = qv_comm_n_ranks(cuda->base.comm);
    QV_TRY(meet(cuda, devices, &shared));
    if (direct && (!shared || cuda->sums == QV_CUDA_SUMS_DIRECT)) {
        QV_TRY(agree(cuda, qv_cuda_direct_can(cuda, devices, n_ranks), &direct));
        if (!direct && cuda->base.rank == 0)
            qv_warn("all-reduce: these devices do not reach each other's memory; sums go through "
                    "%s",
                    shared ? "events" : "NCCL");
    } else {
        direct = false;
    }
    if (direct)
        QV_TRY(qv_cuda_direct_open(cuda, devices, &c->direct));
    if (shared)
        return direct ? QV_OK : connect_events(cuda, c);
    const qv_nccl *nccl;
    bool alone = cuda->sums == QV_CUDA_SUMS_DIRECT || cuda->deterministic;
    if (direct && (alone || qv_nccl_load(&nccl) != QV_OK))
        return QV_OK;
    if (cuda->deterministic && n_ranks > 2)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "cuda: %d ranks cannot be deterministic through NCCL, which adds them up in "
                       "an order that depends on how many tokens a step has; it takes devices that "
                       "reach each other's memory, and an all-reduce that is not nccl",
                       n_ranks);
    return connect_nccl(cuda, c);
}

qv_status qv_cuda_connect(qv_backend *be)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    cuda->comm = calloc(1, sizeof *cuda->comm);
    if (cuda->comm == NULL)
        return qv_fail(QV_ERR_NOMEM, "cuda: no memory for a group of ranks");
    QV_TRY(qv_cuda_use(cuda));
    QV_TRY(connect(cuda, cuda->comm));
    qv_comm_publish(be->comm, be->rank, cuda); /* the last thing that is: for wait_for_all */
    QV_TRY(qv_comm_barrier(be->comm));
    cuda->comm->met = true;
    return QV_OK;
}

static void disconnect(qv_cuda_backend *cuda)
{
    struct qv_cuda_comm *c = cuda->comm;
    /* Destroying waits for the other ranks, which may have given up. The stream is idle only after
     * that. */
    if (c->comm != NULL)
        (void)(c->failed ? c->nccl->comm_abort(c->comm) : c->nccl->comm_destroy(c->comm));
    qv_cuda_direct_close(cuda, c->direct);
    for (int i = 0; i < 3; i++)
        if (c->mine.events[i] != NULL)
            (void)cudaEventDestroy(c->mine.events[i]);
    free(c);
    cuda->comm = NULL;
}

/* Nobody writes to this rank's slots any more once the streams of all that are still there are
 * idle. A failed group's kernels have been told to give up; one that hangs for another reason is
 * not waited for. */
static void wait_for_all(qv_cuda_backend *cuda)
{
    qv_comm *comm = cuda->base.comm;
    for (int32_t r = 0; r < qv_comm_n_ranks(comm); r++) {
        const qv_cuda_backend *other = qv_comm_published(comm, r);
        if (other == NULL || qv_cuda_use(other) != QV_OK)
            continue;
        for (int i = 0; i < 1000 && cudaStreamQuery(other->stream) == cudaErrorNotReady; i++)
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    qv_comm_publish(comm, cuda->base.rank, NULL);
    (void)qv_cuda_use(cuda);
}

/* The group ends: whoever has failed in it, itself included, waits for nobody any more. */
void qv_cuda_leave(qv_backend *be)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    struct qv_cuda_comm *c = cuda->comm;
    if (c == NULL)
        return;
    (void)cudaSetDevice(cuda->device);
    c->failed = qv_comm_first_failed(be->comm) >= 0;
    if (c->direct != NULL && c->failed)
        qv_cuda_direct_stop(c->direct);
    if (c->direct != NULL && c->met)
        wait_for_all(cuda);
    if (!c->failed)
        (void)cudaStreamSynchronize(cuda->stream);
    disconnect(cuda);
}

/* --- Wait --------------------------------------------------------------------------------- */

/* The group has failed: give up what waits on the device, and say why. */
static qv_status give_up(qv_cuda_backend *cuda)
{
    struct qv_cuda_comm *c = cuda->comm;
    if (c->comm != NULL) {
        (void)c->nccl->comm_abort(c->comm);
        c->comm = NULL;
    }
    (void)cudaStreamSynchronize(cuda->stream);
    return qv_comm_barrier(cuda->base.comm); /* which says who failed and why */
}

static bool has_failed(const qv_cuda_backend *cuda)
{
    return qv_comm_first_failed(cuda->base.comm) >= 0;
}

qv_status qv_cuda_wait(qv_cuda_backend *cuda, cudaEvent_t event)
{
    const struct qv_cuda_comm *c = cuda->comm;
    if (c == NULL || (c->comm == NULL && c->direct == NULL)) {
        QV_CUDA_TRY(event != NULL ? cudaEventSynchronize(event)
                                  : cudaStreamSynchronize(cuda->stream));
        return QV_OK;
    }
    for (int64_t i = 0;; i++) {
        cudaError_t error = event != NULL ? cudaEventQuery(event) : cudaStreamQuery(cuda->stream);
        if (error != cudaSuccess && error != cudaErrorNotReady)
            return qv_cuda_fail(error, "waiting for the device");
        if (c->direct != NULL && has_failed(cuda)) /* its kernels end by themselves, with nothing */
            return give_up(cuda);
        if (error == cudaSuccess)
            return c->direct != NULL ? qv_cuda_direct_check(c->direct) : QV_OK;
        if (has_failed(cuda))
            return give_up(cuda);
        if (i > 20000) /* some milliseconds: this is no step of decoding */
            nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
}

qv_status qv_cuda_meet_ranks(qv_cuda_backend *cuda)
{
    const struct qv_cuda_comm *c = cuda->comm;
    return c != NULL && c->direct != NULL ? qv_cuda_direct_together(cuda, c->direct) : QV_OK;
}

/* --- Collectives -------------------------------------------------------------------------- */

static bool is_dense(const qv_tensor *t)
{
    return t->n_dims == 2 && (t->shape[0] <= 1 || t->stride[0] == t->shape[1]);
}

/* Record event `i`, and let the stream wait for everybody's. */
static qv_status pass_point(qv_cuda_backend *cuda, int i)
{
    struct qv_cuda_comm *c = cuda->comm;
    QV_CUDA_TRY(cudaEventRecord(c->mine.events[i], cuda->stream));
    QV_TRY(qv_comm_barrier(cuda->base.comm));
    for (int32_t r = 0; r < qv_comm_n_ranks(cuda->base.comm); r++)
        if (r != cuda->base.rank)
            QV_CUDA_TRY(cudaStreamWaitEvent(cuda->stream, c->of[r]->events[i], 0));
    return QV_OK;
}

/* Everybody sends all to everybody, which NCCL does not: the more ranks, the sooner it wins. */
static bool goes_direct(const qv_cuda_backend *cuda, size_t bytes)
{
    const struct qv_cuda_comm *c = cuda->comm;
    size_t others = (size_t)qv_comm_n_ranks(cuda->base.comm) - 1;
    return c->direct != NULL && (c->nccl == NULL || bytes <= DIRECT_BYTES / (others * others));
}

/* The communicator was aborted because a rank has failed: say which. */
static qv_status has_left(qv_cuda_backend *cuda)
{
    QV_TRY(qv_comm_barrier(cuda->base.comm));
    return qv_fail(QV_ERR_INTERNAL, "cuda: rank %d has left its group", cuda->base.rank);
}

/* As CPU ranks do: each sums its part of the elements in its own tensor, then all copy the parts.
 */
static qv_status reduce_shared(qv_cuda_backend *cuda, qv_tensor x)
{
    struct qv_cuda_comm *c = cuda->comm;
    int32_t n_ranks = qv_comm_n_ranks(cuda->base.comm), rank = cuda->base.rank;
    int64_t n = x.shape[0] * x.shape[1];
    void *data[QV_MAX_RANKS];
    c->mine.x = x;
    QV_TRY(pass_point(cuda, 0));
    for (int32_t r = 0; r < n_ranks; r++)
        data[r] = c->of[r]->x.data;
    QV_TRY(qv_k_sum_ranks(data, n_ranks, x.data, n * rank / n_ranks, n * (rank + 1) / n_ranks,
                          cuda->stream));
    QV_TRY(pass_point(cuda, 1));
    for (int32_t r = 0; r < n_ranks; r++) {
        int64_t first = n * r / n_ranks, end = n * (r + 1) / n_ranks;
        if (r != rank && end > first)
            QV_CUDA_TRY(cudaMemcpyAsync((float *)x.data + first, (float *)data[r] + first,
                                        (size_t)(end - first) * sizeof(float),
                                        cudaMemcpyDeviceToDevice, cuda->stream));
    }
    return pass_point(cuda, 2);
}

qv_status qv_cuda_all_reduce(qv_backend *be, qv_tensor x)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    struct qv_cuda_comm *c = cuda->comm;
    size_t n = (size_t)(x.shape[0] * x.shape[1]);
    if (!is_dense(&x))
        return qv_fail(QV_ERR_SHAPE, "cuda: all_reduce: rows must follow each other");
    if (n == 0)
        return QV_OK;
    if (goes_direct(cuda, n * sizeof(float)))
        return qv_cuda_direct_all_reduce(cuda, c->direct, x);
    if (c->by_events)
        return reduce_shared(cuda, x);
    if (c->comm == NULL)
        return has_left(cuda);
    return qv_nccl_check(
        c->nccl,
        c->nccl->all_reduce(x.data, x.data, n, QV_NCCL_FLOAT32, QV_NCCL_SUM, c->comm, cuda->stream),
        "ncclAllReduce");
}

/* Columns [col, col + width) of `whole` from a dense block [rows, width]. */
static qv_status put_columns(qv_cuda_backend *cuda, qv_tensor whole, int64_t col, const void *block,
                             int64_t width)
{
    QV_CUDA_TRY(cudaMemcpy2DAsync((float *)whole.data + col,
                                  (size_t)whole.stride[0] * sizeof(float), block,
                                  (size_t)width * sizeof(float), (size_t)width * sizeof(float),
                                  (size_t)whole.shape[0], cudaMemcpyDeviceToDevice, cuda->stream));
    return QV_OK;
}

static qv_status gather_shared(qv_cuda_backend *cuda, qv_tensor part, qv_tensor whole)
{
    struct qv_cuda_comm *c = cuda->comm;
    c->mine.x = part;
    QV_TRY(pass_point(cuda, 0));
    int64_t col = 0;
    for (int32_t r = 0; r < qv_comm_n_ranks(cuda->base.comm) && cuda->base.rank == 0; r++) {
        QV_TRY(put_columns(cuda, whole, col, c->of[r]->x.data, c->of[r]->x.shape[1]));
        col += c->of[r]->x.shape[1];
    }
    return pass_point(cuda, 1);
}

/* All parts have the same width: the vocabulary is shared out evenly. */
static qv_status gather_nccl(qv_cuda_backend *cuda, qv_tensor part, qv_tensor whole)
{
    struct qv_cuda_comm *c = cuda->comm;
    const qv_nccl *nccl = c->nccl;
    int32_t n_ranks = qv_comm_n_ranks(cuda->base.comm);
    size_t n = (size_t)(part.shape[0] * part.shape[1]);
    if (cuda->base.rank != 0)
        return qv_nccl_check(
            nccl, nccl->send(part.data, n, QV_NCCL_FLOAT32, 0, c->comm, cuda->stream), "ncclSend");
    void *scratch;
    QV_TRY(qv_cuda_scratch_require(cuda, n * sizeof(float) * (size_t)(n_ranks - 1), &scratch));
    QV_TRY(qv_nccl_check(nccl, nccl->group_start(), "ncclGroupStart"));
    int result = 0;
    for (int32_t r = 1; r < n_ranks && result == 0; r++)
        result = nccl->recv((float *)scratch + (size_t)(r - 1) * n, n, QV_NCCL_FLOAT32, r, c->comm,
                            cuda->stream);
    int end = nccl->group_end();
    QV_TRY(qv_nccl_check(nccl, result ? result : end, "ncclRecv"));
    QV_TRY(put_columns(cuda, whole, 0, part.data, part.shape[1]));
    for (int32_t r = 1; r < n_ranks; r++)
        QV_TRY(put_columns(cuda, whole, r * part.shape[1], (float *)scratch + (size_t)(r - 1) * n,
                           part.shape[1]));
    return QV_OK;
}

qv_status qv_cuda_gather_cols(qv_backend *be, qv_tensor part, qv_tensor whole)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    if (!is_dense(&part))
        return qv_fail(QV_ERR_SHAPE, "cuda: gather_cols: rows must follow each other");
    if (part.shape[0] * part.shape[1] == 0)
        return QV_OK;
    const struct qv_cuda_comm *c = cuda->comm;
    size_t bytes = (size_t)(part.shape[0] * part.shape[1]) * sizeof(float);
    if (goes_direct(cuda, bytes))
        return qv_cuda_direct_gather_cols(cuda, c->direct, part, whole);
    if (c->by_events)
        return gather_shared(cuda, part, whole);
    return c->comm != NULL ? gather_nccl(cuda, part, whole) : has_left(cuda);
}

qv_status qv_cuda_sum_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                                   float eps, bool plus_one, qv_tensor y, qv_tensor rest)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    const struct qv_cuda_comm *c = cuda->comm;
    bool done = false;
    if (goes_direct(cuda, (size_t)(delta.shape[0] * delta.shape[1]) * sizeof(float)))
        QV_TRY(qv_cuda_direct_sum_add_norm(cuda, c->direct, residual, delta, w, eps, plus_one, y,
                                           rest, &done));
    if (done)
        return QV_OK;
    QV_TRY(qv_cuda_all_reduce(be, delta));
    return qv_cuda_add_rms_norm(be, residual, delta, w, eps, plus_one, y, rest);
}
