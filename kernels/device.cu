/* Launch checks of all kernels, and one that only waits. */
#include "kernels/device.cuh"
#include "kernels/kernels.h"

extern "C" qv_status qv_k_check_launch(const char *name)
{
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess)
        return QV_OK;
    return qv_fail(QV_ERR_DEVICE, "cuda: %s: %s (%s)", name, cudaGetErrorString(error),
                   cudaGetErrorName(error));
}

static int major_of_device(void)
{
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
        return 0;
    return major;
}

extern "C" bool qv_k_is_hopper(void)
{
    static const int major = major_of_device();
    return major == 9;
}

__global__ void hold_kernel(uint64_t ns)
{
    uint64_t start = now_ns();
    while (now_ns() - start < ns)
        ;
}

qv_status qv_k_hold(uint64_t ns, void *stream)
{
    hold_kernel<<<1, 1, 0, (cudaStream_t)stream>>>(ns);
    return qv_k_check_launch("hold");
}
