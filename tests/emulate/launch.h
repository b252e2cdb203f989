/* Launches as translated kernels write them: k<<<grid, block, bytes, stream>>>(...) has become
 * emu::configure(k, grid, block, bytes, stream)(...), and cudaLaunchKernelEx emu::launch_ex.
 * Included in front of each translated file, after cuda_device.h.
 */
#ifndef QV_EMULATE_LAUNCH_H
#define QV_EMULATE_LAUNCH_H

#include "tests/emulate/machine_host.h"

#include <tuple>
#include <type_traits>

/* Where `translate.py` has moved them: in the first line of a kernel. */
#undef __cluster_dims__
#define __cluster_dims__(...) .cluster(__VA_ARGS__)

namespace emu
{

/* streams.cc: puts it into the stream, or into the graph that the stream is recorded to. The error
 * is also the thread's last. */
cudaError_t submit(const cudaLaunchConfig_t &config, std::shared_ptr<kernel_call> call,
                   const void *kernel);

template <typename... PARAMETERS, typename... GIVEN>
cudaError_t launch_ex(const cudaLaunchConfig_t *config, void (*kernel)(PARAMETERS...),
                      GIVEN &&...given)
{
    auto call = std::make_shared<kernel_call>();
    std::tuple<std::remove_cv_t<PARAMETERS>...> parameters(static_cast<PARAMETERS>(given)...);
    call->body = [kernel, parameters] { std::apply(kernel, parameters); };
    return submit(*config, call, (const void *)kernel);
}

template <typename KERNEL> struct configured {
    KERNEL *kernel;
    cudaLaunchConfig_t config;

    template <typename... GIVEN> void operator()(GIVEN &&...given) const
    {
        launch_ex(&config, kernel, static_cast<GIVEN &&>(given)...);
    }
};

template <typename KERNEL>
configured<KERNEL> configure(KERNEL *kernel, dim3 grid, dim3 block, size_t bytes = 0,
                             cudaStream_t stream = 0)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    return {kernel, config};
}

} // namespace emu

/* As the toolkit has it for its own compiler. */
template <typename KERNEL>
cudaError_t cudaFuncSetAttribute(KERNEL *kernel, cudaFuncAttribute attribute, int value)
{
    return cudaFuncSetAttribute((const void *)kernel, attribute, value);
}

#endif
