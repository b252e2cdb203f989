/* Inside the emulated runtime: streams and what is put into them. The functions of the runtime API
 * are in runtime.cc (devices, memory, errors) and streams.cc (streams, copies, events, graphs,
 * launches).
 *
 * A stream is a queue. What is in it runs when a host thread waits for it or asks how far it is,
 * or, one time in four, at once: what forgets to wait mostly finds nothing done, and what counts on
 * that is wrong as well.
 */
#ifndef QV_EMULATE_RUNTIME_H
#define QV_EMULATE_RUNTIME_H

#include <cuda_runtime_api.h>
#include <functional>
#include <stddef.h>

namespace emu
{

/* Puts `work` into the stream, or into the graph that the stream is recorded to. */
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);

/* The error as the calling thread's last. */
cudaError_t result(cudaError_t error);

int current_device();
int n_devices();

/* Whether the thread records a stream, when nothing may be allocated or waited for. */
bool is_recording();

/* Waits for all streams of the device. Holds the machine. */
void drain_device(int device);

enum class memory { UNKNOWN, PINNED, DEVICE };

/* What the bytes at `p` are. UNKNOWN: of the host and pageable; or part of no allocation. Holds the
 * machine. */
memory kind_of(const void *p, size_t bytes);

/* Whether some allocation of the device has a part of the bytes. Holds the machine. */
bool touches_device(const void *p, size_t bytes);

/* The limit of a kernel's dynamic shared memory. Holds the machine. */
size_t shared_limit(const void *kernel);

} // namespace emu

#endif
