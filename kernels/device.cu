// Launch checks of all kernels.
#include "kernels/device.cuh"

extern "C" qv_status qv_k_check_launch(const char *name)
{
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess)
        return QV_OK;
    return qv_fail(QV_ERR_DEVICE, "cuda: %s: %s (%s)", name, cudaGetErrorString(error),
                   cudaGetErrorName(error));
}
