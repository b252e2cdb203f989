/* The clock of ops: an event behind each. */
#include "ops/cuda/cuda.h"
#include "ops/op_times.h"

#include <stdlib.h>

qv_status qv_cuda_mark(qv_backend *be, int32_t i)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    if (cuda->marks == NULL) {
        cuda->marks = calloc(QV_MAX_MARKS, sizeof *cuda->marks);
        if (cuda->marks == NULL)
            return qv_fail(QV_ERR_NOMEM, "cuda: no memory for %d marks", QV_MAX_MARKS);
    }
    if (cuda->marks[i] == NULL)
        QV_CUDA_TRY(cudaEventCreate(&cuda->marks[i]));
    QV_CUDA_TRY(cudaEventRecord(cuda->marks[i], cuda->stream));
    return QV_OK;
}

qv_status qv_cuda_between(qv_backend *be, int32_t i, double *seconds)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    float ms;
    QV_CUDA_TRY(cudaEventElapsedTime(&ms, cuda->marks[i], cuda->marks[i + 1]));
    *seconds = (double)ms * 1e-3;
    return QV_OK;
}

qv_status qv_cuda_hold(qv_backend *be, double seconds)
{
    QV_TRY(qv_cuda_use(qv_cuda(be)));
    return qv_k_hold((uint64_t)(seconds * 1e9), qv_cuda(be)->stream);
}

void qv_cuda_marks_free(qv_cuda_backend *cuda)
{
    for (int i = 0; cuda->marks != NULL && i < QV_MAX_MARKS && cuda->marks[i] != NULL; i++)
        (void)cudaEventDestroy(cuda->marks[i]);
    free(cuda->marks);
}
