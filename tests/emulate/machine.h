/* The emulated device: the threads of a CUDA launch as fibers of the CPU. Kernels are compiled as
 * C++ (translate.py) and call what a device offers through device/, which is written against this
 * header.
 *
 * One launch or several run at a time, all on whichever host thread is inside the machine; a lock
 * lets in one. A fiber runs until it waits for others; who runs next is drawn from a generator
 * (QV_EMULATE_SEED), so that what lacks a barrier goes wrong. Memory is that of the process, and
 * what a thread writes is seen by all at once; asynchronous copies are actions that run later().
 */
#ifndef QV_EMULATE_MACHINE_H
#define QV_EMULATE_MACHINE_H

#include <cuda_runtime_api.h>
#include <functional>
#include <stddef.h>
#include <stdint.h>
#include <vector_types.h>

namespace emu
{

struct block;

/* A thread of a kernel. */
struct thread {
    uint3 thread_idx, block_idx;
    dim3 block_dim, grid_dim;
    int index;      /* in its block */
    int lane, warp; /* warp: of its block */
    struct block *block;
    void *device; /* for device/: NULL when the thread starts */
};

/* The thread that runs; NULL outside of kernels. A plain global: only one host thread is inside. */
extern thread *current;

/* Lets all others that can go on do so first. For loops that poll memory. */
void yield();

/* Waits until ready(ctx), which has no effects, is true; `what` names the reason in reports of
 * deadlocks. Anything may have happened before it returns. */
void wait_until(bool (*ready)(void *ctx), void *ctx, const char *what);

/* All lanes of `mask` of the warp come together; the last to arrive runs all(lanes, ctx) with its
 * own ctx, lanes[i] = what lane i brought (NULL: not in the mask, or gone), then everybody goes on.
 * Those that meet must bring the same `all`; anything else is reported as divergence. */
void warp_meet(uint32_t mask, void *mine, void (*all)(void **lanes, void *ctx), void *ctx);

/* The same for the 128 threads of a warpgroup. */
void group_meet(void *mine, void (*all)(void **threads, void *ctx), void *ctx);

/* bar.sync id, n_threads. n_threads 0: all of the block that are not gone (__syncthreads). */
void barrier(int id, int n_threads);
/* bar.arrive: counts, and does not wait. */
void barrier_arrive(int id, int n_threads);

/* barrier.cluster.arrive and .wait; the second is what waits. */
void cluster_arrive();
void cluster_wait();

/* Shared memory of this block, aligned to 1024 bytes. PTX's 32-bit shared addresses are offsets
 * into it; what the launch asked for and the static variables lie somewhere in it. */
char *shared_memory();
size_t shared_size();
char *shared_memory_of(int rank); /* of a block of this cluster */
int cluster_rank(), cluster_size();

/* An asynchronous action of the current block (a copy that lands): runs at once or at any later
 * moment, at the latest when no thread of the launch can go on otherwise; `current` is anybody
 * then, or NULL. Actions are not ordered among each other. Those that are left run when the threads
 * of the cluster have ended. */
void later(std::function<void()> action);

/* Called for a thread that has ended and whose `device` is set, while it is still current. Defined
 * in thread_state.cc. */
void thread_ended(thread *t);

/* Whether something that may happen either way shall happen now: one of `n` draws says yes. */
bool chance(unsigned n);

/* A mistake of a kernel: prints where and what (printf) with the kernel, block and thread, aborts.
 */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* 10 * capability of the device that is shown: 90, or what QV_EMULATE_CAPABILITY says. */
int capability();
/* The code that it runs, of those that are built: for 9.0 on itself alone, elsewhere for 8.0. */
int code();

} // namespace emu

#endif
