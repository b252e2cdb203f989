#include "ops/cuda/direct.h"

#include "kernels/kernels_comm.h"

#include <stdlib.h>
#include <string.h>

/* Most blocks of a kernel that waits for other ranks; enough to fill a link. */
#define MAX_SLOTS 128

struct qv_cuda_direct {
    qv_k_direct view; /* what kernels get; `slots` of all ranks */
    cudaMemPool_t pool;
    void *slots;    /* this rank's */
    int32_t *flags; /* host memory that kernels reach: [0] stop, [1] who was missed */
    bool flagged;   /* the group raises flags[0] */
    bool one_device;
};

/* --- Open --------------------------------------------------------------------------------- */

bool qv_cuda_direct_can(const qv_cuda_backend *cuda, const int *devices, int32_t n_ranks)
{
    int pools = 0;
    if (n_ranks > QV_K_DIRECT_RANKS ||
        cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, cuda->device) !=
            cudaSuccess ||
        !pools)
        return false;
    for (int32_t r = 0; r < n_ranks; r++) {
        int can = devices[r] == cuda->device;
        if (!can && (cudaDeviceCanAccessPeer(&can, cuda->device, devices[r]) != cudaSuccess))
            can = 0;
        if (!can)
            return false;
    }
    return true;
}

/* Blocks of all ranks run at once: one on a multiprocessor, and with one device for all, in half of
 * it, so that what a rank must do before it comes to the others finds room. */
static int32_t count_slots(const qv_cuda_backend *cuda, const int *devices, int32_t n_ranks)
{
    int32_t most = MAX_SLOTS;
    for (int32_t r = 0; r < n_ranks; r++) {
        int n_sms = 0;
        if (cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, devices[r]) !=
            cudaSuccess)
            n_sms = cuda->n_sms;
        most = n_sms < most ? n_sms : most;
    }
    if (devices[0] == devices[n_ranks - 1])
        most = most / (2 * n_ranks);
    return most > 0 ? most : 1;
}

/* Zeroed memory that all devices of the group may write to. */
static qv_status new_slots(qv_cuda_backend *cuda, qv_cuda_direct *direct, const int *devices,
                           int32_t n_ranks, size_t bytes)
{
    const struct cudaMemPoolProps props = {
        .allocType = cudaMemAllocationTypePinned,
        .location = {.type = cudaMemLocationTypeDevice, .id = cuda->device}};
    QV_CUDA_TRY(cudaMemPoolCreate(&direct->pool, &props));
    for (int32_t r = 0; r < n_ranks; r++) {
        const struct cudaMemAccessDesc access = {
            .location = {.type = cudaMemLocationTypeDevice, .id = devices[r]},
            .flags = cudaMemAccessFlagsProtReadWrite};
        if (devices[r] != cuda->device)
            QV_CUDA_TRY(cudaMemPoolSetAccess(direct->pool, &access, 1));
    }
    QV_CUDA_TRY(cudaMallocFromPoolAsync(&direct->slots, bytes, direct->pool, cuda->stream));
    QV_CUDA_TRY(cudaMemsetAsync(direct->slots, 0, bytes, cuda->stream));
    QV_CUDA_TRY(cudaStreamSynchronize(cuda->stream));
    return QV_OK;
}

qv_status qv_cuda_direct_open(qv_cuda_backend *cuda, const int *devices, qv_cuda_direct **out)
{
    qv_comm *comm = cuda->base.comm;
    qv_cuda_direct *direct = calloc(1, sizeof *direct);
    if (direct == NULL)
        return qv_fail(QV_ERR_NOMEM, "cuda: no memory for a group of ranks");
    *out = direct;
    qv_k_direct *view = &direct->view;
    int32_t n_ranks = qv_comm_n_ranks(comm);
    *view = (qv_k_direct){.n_ranks = n_ranks,
                          .rank = cuda->base.rank,
                          .n_slots = count_slots(cuda, devices, n_ranks),
                          .patience_ns = UINT64_C(1000000000) * QV_CUDA_PATIENCE_S,
                          .let_next = devices[0] != devices[n_ranks - 1]};
    direct->one_device = devices[0] == devices[n_ranks - 1];
    QV_TRY(new_slots(cuda, direct, devices, n_ranks, qv_k_direct_bytes(n_ranks, view->n_slots)));
    void *epoch, *flags;
    QV_TRY(qv_cuda_alloc(&cuda->base, (size_t)view->n_slots * sizeof *view->epoch, &epoch));
    view->epoch = epoch;
    QV_CUDA_TRY(cudaHostAlloc(&flags, 2 * sizeof *direct->flags, cudaHostAllocMapped));
    direct->flags = memset(flags, 0, 2 * sizeof *direct->flags);
    void *mapped;
    QV_CUDA_TRY(cudaHostGetDevicePointer(&mapped, direct->flags, 0));
    view->stop = mapped;
    view->missed = view->stop + 1;
    qv_comm_flag_failure(comm, cuda->base.rank, &direct->flags[0]);
    direct->flagged = true;

    qv_comm_publish(comm, cuda->base.rank, direct->slots);
    QV_TRY(qv_comm_barrier(comm));
    for (int32_t r = 0; r < n_ranks; r++)
        view->slots[r] = qv_comm_published(comm, r);
    return qv_comm_barrier(comm);
}

void qv_cuda_direct_close(qv_cuda_backend *cuda, qv_cuda_direct *direct)
{
    if (direct == NULL)
        return;
    if (direct->flagged)
        qv_comm_flag_failure(cuda->base.comm, cuda->base.rank, NULL);
    if (direct->slots != NULL)
        (void)cudaFreeAsync(direct->slots, cuda->stream);
    (void)cudaStreamSynchronize(cuda->stream);
    if (direct->pool != NULL)
        (void)cudaMemPoolDestroy(direct->pool);
    (void)cudaFree(direct->view.epoch);
    (void)cudaFreeHost(direct->flags);
    free(direct);
}

/* --- Failure ------------------------------------------------------------------------------ */

void qv_cuda_direct_stop(qv_cuda_direct *direct)
{
    *(volatile int32_t *)&direct->flags[0] = 1;
}

qv_status qv_cuda_direct_check(const qv_cuda_direct *direct)
{
    int32_t missed = *(volatile int32_t *)&direct->flags[1];
    return missed == 0
               ? QV_OK
               : qv_fail(QV_ERR_DEVICE, "cuda: rank %d waited %d s for rank %d in a collective",
                         direct->view.rank, QV_CUDA_PATIENCE_S, missed - 1);
}

/* --- Collectives -------------------------------------------------------------------------- */

qv_status qv_cuda_direct_together(qv_cuda_backend *cuda, const qv_cuda_direct *direct)
{
    return direct->one_device && !cuda->recording_now ? qv_comm_barrier(cuda->base.comm) : QV_OK;
}

/* Launch a kernel that waits for those of the other ranks. */
#define LAUNCH(cuda, direct, launch)                                                               \
    do {                                                                                           \
        QV_TRY(qv_cuda_direct_together(cuda, direct));                                             \
        QV_TRY(launch);                                                                            \
        return qv_cuda_direct_together(cuda, direct);                                              \
    } while (0)

qv_status qv_cuda_direct_all_reduce(qv_cuda_backend *cuda, qv_cuda_direct *direct, qv_tensor x)
{
    int64_t n = x.shape[0] * x.shape[1];
    if (n == 0)
        return QV_OK;
    LAUNCH(cuda, direct, qv_k_direct_sum(&direct->view, x.data, n, cuda->stream));
}

qv_status qv_cuda_direct_gather_cols(qv_cuda_backend *cuda, qv_cuda_direct *direct, qv_tensor part,
                                     qv_tensor whole)
{
    const qv_k_gather args = {.part = part.data,
                              .whole = direct->view.rank == 0 ? whole.data : NULL,
                              .part_stride = part.stride[0],
                              .whole_stride = direct->view.rank == 0 ? whole.stride[0] : 0,
                              .n_rows = part.shape[0],
                              .n = part.shape[1]};
    LAUNCH(cuda, direct, qv_k_direct_gather(&direct->view, &args, cuda->stream));
}

qv_status qv_cuda_direct_sum_add_norm(qv_cuda_backend *cuda, qv_cuda_direct *direct,
                                      qv_tensor residual, qv_tensor delta, qv_tensor w, float eps,
                                      bool plus_one, qv_tensor y, qv_tensor rest, bool *done)
{
    const qv_k_exchange args = {.x = delta.data,
                                .z = residual.data,
                                .y = y.data,
                                .rest = rest.data,
                                .x_stride = delta.stride[0],
                                .z_stride = residual.stride[0],
                                .y_stride = y.stride[0],
                                .rest_stride = rest.stride[0],
                                .n_rows = delta.shape[0],
                                .n = delta.shape[1],
                                .w = w.data,
                                .eps = eps,
                                .plus_one = plus_one};
    /* Each block a row at a time: with many rows the sum alone, in longer pieces, is faster. */
    *done = args.n_rows <= 2 * direct->view.n_slots && qv_k_direct_sum_add_norm_can(&args);
    if (!*done)
        return QV_OK;
    LAUNCH(cuda, direct, qv_k_direct_sum_add_norm(&direct->view, &args, cuda->stream));
}
