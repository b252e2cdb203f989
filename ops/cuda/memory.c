/* Memory of the CUDA backend: device blocks, uploads through pinned lanes, mirrors, scratch. */
#include "ops/cuda/cuda.h"

#include <string.h>

#define MIB ((double)(1 << 20))

/* --- Errors ------------------------------------------------------------------------------- */

qv_status qv_cuda_fail(cudaError_t error, const char *what)
{
    (void)cudaGetLastError(); /* an error of an allocation would otherwise be found again later */
    return qv_fail(error == cudaErrorMemoryAllocation ? QV_ERR_NOMEM : QV_ERR_DEVICE,
                   "cuda: %s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

qv_status qv_cuda_use(const qv_cuda_backend *cuda)
{
    QV_CUDA_TRY(cudaSetDevice(cuda->device));
    return QV_OK;
}

/* --- Blocks ------------------------------------------------------------------------------- */

qv_status qv_cuda_alloc(qv_backend *be, size_t bytes, void **out)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    void *block;
    cudaError_t error = cudaMalloc(&block, bytes ? bytes : 1);
    if (error == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, total = 0;
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&free_bytes, &total);
        return qv_fail(QV_ERR_NOMEM,
                       "cuda: no memory on device %d for %zu bytes: %.0f of %.0f MiB are free",
                       cuda->device, bytes, (double)free_bytes / MIB, (double)total / MIB);
    }
    QV_CUDA_TRY(error);
    error = cudaMemsetAsync(block, 0, bytes, cuda->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(cuda->stream);
    if (error != cudaSuccess) {
        (void)cudaFree(block);
        return qv_cuda_fail(error, "clearing new memory");
    }
    *out = block;
    return QV_OK;
}

void qv_cuda_free(qv_backend *be, void *ptr)
{
    if (qv_cuda_use(qv_cuda(be)) == QV_OK)
        (void)cudaFree(ptr);
}

uint64_t qv_cuda_free_memory(const qv_backend *be)
{
    size_t free_bytes = 0, total = 0;
    (void)cudaSetDevice(((const qv_cuda_backend *)be)->device);
    return cudaMemGetInfo(&free_bytes, &total) == cudaSuccess ? free_bytes : 0;
}

/* --- Copies ------------------------------------------------------------------------------- */

qv_cuda_lane *qv_cuda_take_lane(qv_cuda_backend *cuda)
{
    qv_cuda_lane *lane = NULL;
    pthread_mutex_lock(&cuda->lock);
    while (lane == NULL) {
        for (int i = 0; i < QV_CUDA_LANES && lane == NULL; i++)
            if (!cuda->lanes[i].taken)
                lane = &cuda->lanes[i];
        if (lane == NULL)
            pthread_cond_wait(&cuda->lane_free, &cuda->lock);
    }
    lane->taken = true;
    pthread_mutex_unlock(&cuda->lock);
    return lane;
}

void qv_cuda_give_lane(qv_cuda_backend *cuda, qv_cuda_lane *lane)
{
    pthread_mutex_lock(&cuda->lock);
    lane->taken = false;
    pthread_cond_signal(&cuda->lane_free);
    pthread_mutex_unlock(&cuda->lock);
}

qv_status qv_cuda_start_lane(qv_cuda_backend *cuda, qv_cuda_lane *lane)
{
    if (lane->host == NULL)
        QV_CUDA_TRY(cudaHostAlloc(&lane->host, QV_CUDA_LANE_BYTES, cudaHostAllocDefault));
    QV_CUDA_TRY(cudaEventRecord(lane->ready, cuda->stream));
    QV_CUDA_TRY(cudaStreamWaitEvent(lane->stream, lane->ready, 0));
    return QV_OK;
}

static qv_status copy_through(qv_cuda_backend *cuda, qv_cuda_lane *lane, void *dst, const void *src,
                              size_t bytes)
{
    QV_TRY(qv_cuda_start_lane(cuda, lane));
    for (size_t done = 0; done < bytes; done += QV_CUDA_LANE_BYTES) {
        size_t n = bytes - done < QV_CUDA_LANE_BYTES ? bytes - done : QV_CUDA_LANE_BYTES;
        memcpy(lane->host, (const char *)src + done, n);
        QV_CUDA_TRY(cudaMemcpyAsync((char *)dst + done, lane->host, n, cudaMemcpyHostToDevice,
                                    lane->stream));
        QV_CUDA_TRY(cudaStreamSynchronize(lane->stream));
    }
    return QV_OK;
}

qv_status qv_cuda_upload(qv_backend *be, void *dst, const void *src, size_t bytes)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    qv_cuda_lane *lane = qv_cuda_take_lane(cuda);
    qv_status status = copy_through(cuda, lane, dst, src, bytes);
    qv_cuda_give_lane(cuda, lane);
    return status;
}

qv_status qv_cuda_download(qv_backend *be, void *dst, const void *src, size_t bytes)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    QV_CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, cuda->stream));
    return qv_cuda_wait(cuda, NULL);
}

qv_status qv_cuda_zero(qv_backend *be, void *dst, size_t bytes)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    QV_CUDA_TRY(cudaMemsetAsync(dst, 0, bytes, cuda->stream));
    return qv_cuda_wait(cuda, NULL);
}

qv_status qv_cuda_copy(qv_backend *be, void *dst, const void *src, size_t bytes)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    QV_CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, cuda->stream));
    return QV_OK;
}

qv_status qv_cuda_fill(qv_backend *be, void *dst, qv_dtype dtype, int64_t n, float mean,
                       float scale, uint64_t seed)
{
    QV_TRY(qv_cuda_use(qv_cuda(be)));
    return qv_k_fill(dst, dtype == QV_F32, n, mean, scale, seed, qv_cuda(be)->stream);
}

qv_status qv_cuda_sync(qv_backend *be)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    return qv_cuda_wait(cuda, NULL);
}

/* --- Mirrors and scratch ------------------------------------------------------------------ */

/* Sizes grow by half at least, so that a slowly growing need allocates rarely. */
static size_t grown(size_t have, size_t want)
{
    size_t more = have + have / 2;
    return ((want > more ? want : more) + 255) / 256 * 256;
}

void qv_cuda_mirror_deinit(qv_cuda_mirror *mirror)
{
    (void)cudaFreeHost(mirror->host);
    (void)cudaFree(mirror->device);
    *mirror = (qv_cuda_mirror){.host = NULL};
}

qv_status qv_cuda_mirror_require(qv_cuda_backend *cuda, qv_cuda_mirror *mirror, size_t bytes)
{
    if (bytes <= mirror->bytes)
        return QV_OK;
    size_t room = grown(mirror->bytes, bytes);
    QV_CUDA_TRY(cudaStreamSynchronize(cuda->stream)); /* nothing may read what is freed */
    qv_cuda_mirror_deinit(mirror);
    QV_CUDA_TRY(cudaHostAlloc(&mirror->host, room, cudaHostAllocDefault));
    QV_CUDA_TRY(cudaMalloc(&mirror->device, room));
    mirror->bytes = room;
    return QV_OK;
}

qv_status qv_cuda_scratch_require(qv_cuda_backend *cuda, size_t bytes, void **out)
{
    if (bytes > cuda->scratch_bytes) {
        size_t room = grown(cuda->scratch_bytes, bytes);
        if (cuda->recording_now) /* before waiting, which a stream that is recorded refuses */
            return qv_fail(QV_ERR_INTERNAL,
                           "cuda: an op needs %zu bytes of scratch while it is "
                           "recorded, and %zu when it warmed up",
                           bytes, cuda->scratch_bytes);
        QV_CUDA_TRY(cudaStreamSynchronize(cuda->stream));
        if (cuda->n_recordings == 0 && cuda->comm == NULL)
            QV_CUDA_TRY(cudaFree(cuda->scratch));
        else if (cuda->n_retired < QV_CUDA_RETIRED) /* recorded kernels go on using it; and freeing
                                                     * may wait for other ranks */
            cuda->retired[cuda->n_retired++] = cuda->scratch;
        else
            return qv_fail(QV_ERR_LIMIT,
                           "cuda: scratch has grown %d times since steps were "
                           "recorded",
                           QV_CUDA_RETIRED);
        cuda->scratch = NULL;
        cuda->scratch_bytes = 0;
        QV_CUDA_TRY(cudaMalloc(&cuda->scratch, room));
        cuda->scratch_bytes = room;
    }
    *out = cuda->scratch;
    return QV_OK;
}
