/* Uploads of many pieces: as many as fit half a lane go over in one copy, with the list that says
 * where each belongs, and a kernel takes them there (kernels/scatter.cu).
 */
#include "ops/cuda/cuda.h"

#define HALF_BYTES (QV_CUDA_LANE_BYTES / 2)
#define MAX_PIECES 4096
#define LIST_BYTES (MAX_PIECES * sizeof(qv_k_piece))

_Static_assert(LIST_BYTES + QV_MAX_UPLOAD_PIECE <= HALF_BYTES, "the largest piece fits");

static char *half_of(const qv_cuda_lane *lane, void *block)
{
    return (char *)block + (size_t)lane->half * HALF_BYTES;
}

/* Begin to fill the half, once what it held before has been taken to its places. */
static qv_status open_half(qv_cuda_lane *lane)
{
    QV_CUDA_TRY(cudaEventSynchronize(lane->free[lane->half]));
    lane->used = LIST_BYTES;
    lane->n_pieces = 0;
    return QV_OK;
}

/* Send the half on its way. */
static qv_status send_half(qv_cuda_lane *lane)
{
    if (lane->n_pieces == 0)
        return QV_OK;
    char *device = half_of(lane, lane->device);
    QV_CUDA_TRY(cudaMemcpyAsync(device, half_of(lane, lane->host), lane->used,
                                cudaMemcpyHostToDevice, lane->stream));
    QV_TRY(qv_k_scatter((const qv_k_piece *)(void *)device, lane->n_pieces, device, lane->stream));
    QV_CUDA_TRY(cudaEventRecord(lane->free[lane->half], lane->stream));
    lane->n_pieces = 0;
    return QV_OK;
}

static qv_status start(qv_cuda_backend *cuda, qv_cuda_lane *lane)
{
    if (lane->device == NULL)
        QV_CUDA_TRY(cudaMalloc(&lane->device, QV_CUDA_LANE_BYTES));
    QV_TRY(qv_cuda_start_lane(cuda, lane));
    lane->half = 0;
    return open_half(lane);
}

qv_status qv_cuda_upload_begin(qv_backend *be, void **out)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    qv_cuda_lane *lane = qv_cuda_take_lane(cuda);
    qv_status status = start(cuda, lane);
    if (status != QV_OK) {
        qv_cuda_give_lane(cuda, lane);
        return status;
    }
    *out = lane;
    return QV_OK;
}

/* One more piece in the list: `bytes` at `dst`, of which `stored` come with it. */
static qv_status add_piece(qv_cuda_lane *lane, void *dst, size_t bytes, size_t stored, char **at)
{
    if (lane->n_pieces == MAX_PIECES || lane->used + stored > HALF_BYTES) {
        QV_TRY(send_half(lane));
        lane->half = !lane->half;
        QV_TRY(open_half(lane));
    }
    char *host = half_of(lane, lane->host);
    qv_k_piece *list = (qv_k_piece *)(void *)host;
    list[lane->n_pieces++] = (qv_k_piece){
        .dst = dst, .from = stored > 0 ? (uint64_t)lane->used : QV_K_ZEROS, .bytes = bytes};
    *at = host + lane->used;
    lane->used += (stored + 15) / 16 * 16;
    return QV_OK;
}

qv_status qv_cuda_upload_piece(qv_backend *be, void *lane, void *dst, size_t bytes, void **out)
{
    (void)be;
    char *at;
    QV_TRY(add_piece(lane, dst, bytes, bytes, &at));
    *out = at;
    return QV_OK;
}

qv_status qv_cuda_upload_zero(qv_backend *be, void *lane, void *dst, size_t bytes)
{
    (void)be;
    char *at;
    return add_piece(lane, dst, bytes, 0, &at);
}

qv_status qv_cuda_upload_end(qv_backend *be, void *lane_of)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    qv_cuda_lane *lane = lane_of;
    qv_status status = send_half(lane);
    cudaError_t error = cudaStreamSynchronize(lane->stream);
    if (status == QV_OK && error != cudaSuccess)
        status = qv_cuda_fail(error, "waiting for an upload");
    qv_cuda_give_lane(cuda, lane);
    return status;
}
