/* The CUDA runtime API over the emulated device: devices, memory, errors. */
#include "tests/emulate/runtime.h"

#include "tests/emulate/machine_host.h"

#include <cuda.h>
#include <map>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace
{

constexpr size_t MEMORY_BYTES = (size_t)8 << 30; /* of a device */
constexpr size_t POISONED_BYTES = 4 << 20;       /* of each allocation; the rest is 0 */
constexpr size_t DEFAULT_SHARED = 48 << 10;

struct allocation {
    emu::memory kind;
    size_t bytes;
    int device;
};

struct state {
    std::map<const char *, allocation> allocations; /* by their beginning */
    std::map<const void *, size_t> shared_limits;   /* of kernels */
    size_t used[emu::MAX_DEVICES] = {};             /* of devices */
} s;

thread_local int device;
thread_local cudaError_t last_error;

size_t most_shared()
{
    return emu::capability() >= 90 ? 227 << 10 : 163 << 10;
}

cudaError_t allocate(void **out, size_t bytes, emu::memory kind)
{
    if (emu::is_recording())
        return emu::result(cudaErrorStreamCaptureUnsupported);
    emu::inside lock;
    *out = NULL;
    bool on_device = kind == emu::memory::DEVICE;
    if (on_device && s.used[device] + bytes > MEMORY_BYTES)
        return emu::result(cudaErrorMemoryAllocation);
    void *p;
    if (posix_memalign(&p, 256, bytes ? bytes : 1) != 0)
        return emu::result(cudaErrorMemoryAllocation);
    memset(p, 0xff, bytes < POISONED_BYTES ? bytes : POISONED_BYTES);
    s.allocations[(const char *)p] = {kind, bytes, device};
    if (on_device)
        s.used[device] += bytes;
    *out = p;
    return cudaSuccess;
}

cudaError_t release(void *p, emu::memory kind)
{
    if (!p)
        return cudaSuccess;
    if (emu::is_recording())
        return emu::result(cudaErrorStreamCaptureUnsupported);
    emu::inside lock;
    auto found = s.allocations.find((const char *)p);
    if (found == s.allocations.end() || found->second.kind != kind)
        return emu::result(cudaErrorInvalidValue);
    emu::drain_device(found->second.device);
    if (kind == emu::memory::DEVICE)
        s.used[found->second.device] -= found->second.bytes;
    s.allocations.erase(found);
    free(p);
    return cudaSuccess;
}

/* The allocation in front of or at `p`. */
const std::pair<const char *const, allocation> *allocation_at(const void *p)
{
    auto after = s.allocations.upper_bound((const char *)p);
    return after == s.allocations.begin() ? NULL : &*--after;
}

} // namespace

/* --- For the other files ------------------------------------------------------------------ */

cudaError_t emu::result(cudaError_t error)
{
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

int emu::current_device()
{
    return device;
}

int emu::n_devices()
{
    static const int n = from_environment().n_devices;
    return n;
}

emu::memory emu::kind_of(const void *p, size_t bytes)
{
    auto *a = allocation_at(p);
    if (!a || (const char *)p + bytes > a->first + a->second.bytes)
        return memory::UNKNOWN;
    return a->second.kind;
}

bool emu::touches_device(const void *p, size_t bytes)
{
    auto *a = allocation_at((const char *)p + bytes - 1);
    return a && a->second.kind == memory::DEVICE && (const char *)p < a->first + a->second.bytes;
}

size_t emu::shared_limit(const void *kernel)
{
    auto found = s.shared_limits.find(kernel);
    return found == s.shared_limits.end() ? DEFAULT_SHARED : found->second;
}

extern "C" {

/* --- Errors ------------------------------------------------------------------------------- */

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
};

const char *cudaGetErrorName(cudaError_t error)
{
    for (auto &e : errors)
        if (e.error == error)
            return e.name;
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error)
{
    for (auto &e : errors)
        if (e.error == error)
            return e.text;
    return "unrecognized error code";
}

/* --- Devices ------------------------------------------------------------------------------ */

cudaError_t cudaGetDeviceCount(int *n)
{
    *n = emu::n_devices();
    return *n > 0 ? cudaSuccess : emu::result(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int number)
{
    if (number < 0 || number >= emu::n_devices())
        return emu::result(cudaErrorInvalidDevice);
    device = number;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *number)
{
    *number = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int number)
{
    if (number < 0 || number >= emu::n_devices())
        return emu::result(cudaErrorInvalidDevice);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
        *value = emu::capability() / 10;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
        *value = emu::capability() % 10;
        return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
        *value = emu::capability() >= 90 ? 132 : 108;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)most_shared();
        return cudaSuccess;
    case cudaDevAttrMemoryPoolsSupported:
        *value = 1;
        return cudaSuccess;
    default:
        return emu::result(cudaErrorInvalidValue);
    }
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int number)
{
    if (number < 0 || number >= emu::n_devices())
        return emu::result(cudaErrorInvalidDevice);
    *prop = {};
    snprintf(prop->name, sizeof prop->name, "emulated device of %d.%d", emu::capability() / 10,
             emu::capability() % 10);
    prop->totalGlobalMem = MEMORY_BYTES;
    prop->major = emu::capability() / 10;
    prop->minor = emu::capability() % 10;
    cudaDeviceGetAttribute(&prop->multiProcessorCount, cudaDevAttrMultiProcessorCount, number);
    prop->sharedMemPerBlockOptin = most_shared();
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int number, int peer)
{
    if (number < 0 || number >= emu::n_devices() || peer < 0 || peer >= emu::n_devices())
        return emu::result(cudaErrorInvalidDevice);
    *can = number != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned)
{
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value)
{
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
        (size_t)value > most_shared())
        return emu::result(cudaErrorInvalidValue);
    emu::inside lock;
    size_t &limit = s.shared_limits[kernel];
    limit = (size_t)value > DEFAULT_SHARED ? (size_t)value : DEFAULT_SHARED;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *found)
{
    bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *function = known ? (void *)cuTensorMapEncodeTiled : NULL;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

/* --- Memory ------------------------------------------------------------------------------- */

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    return allocate(out, bytes, emu::memory::DEVICE);
}

cudaError_t cudaFree(void *p)
{
    return release(p, emu::memory::DEVICE);
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned)
{
    return allocate(out, bytes, emu::memory::PINNED);
}

cudaError_t cudaFreeHost(void *p)
{
    return release(p, emu::memory::PINNED);
}

cudaError_t cudaHostGetDevicePointer(void **out, void *host, unsigned)
{
    *out = host;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    emu::inside lock;
    *free_bytes = MEMORY_BYTES - s.used[device];
    *total = MEMORY_BYTES;
    return cudaSuccess;
}

/* Pools: all memory is everybody's. */
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *)
{
    static char one;
    *pool = (cudaMemPool_t)&one;
    return cudaSuccess;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t)
{
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const struct cudaMemAccessDesc *, size_t)
{
    return cudaSuccess;
}

cudaError_t cudaMallocFromPoolAsync(void **out, size_t bytes, cudaMemPool_t, cudaStream_t)
{
    return allocate(out, bytes, emu::memory::DEVICE);
}

cudaError_t cudaFreeAsync(void *p, cudaStream_t stream)
{
    cudaError_t error = cudaStreamSynchronize(stream);
    return error == cudaSuccess ? release(p, emu::memory::DEVICE) : error;
}

} // extern "C"
