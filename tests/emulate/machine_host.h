/* The machine as the runtime sees it (runtime.cc, launch.h): what a launch is and how it is run.
 * One host thread at a time is inside; each function says whether the caller holds the machine. */
#ifndef QV_EMULATE_MACHINE_HOST_H
#define QV_EMULATE_MACHINE_HOST_H

#include "tests/emulate/machine.h"

#include <functional>
#include <memory>

namespace emu
{

constexpr int MAX_DEVICES = 64;

/* What QV_EMULATE_SEED, _DEVICES and _CAPABILITY say. A value that is none ends the program before
 * main() with a sentence that names it; the device is asked for later, so that a test can set it. */
struct environment {
    int64_t seed;   /* of what is drawn; 1 */
    int n_devices;  /* 0 to MAX_DEVICES; 1 */
    int capability; /* 10 * 8.0, 9.0 or 10.0; 9.0 is what there is without one */
};
environment from_environment();

/* What a kernel says of itself: translate.py writes the question into its first line. */
struct facts {
    const char *name;
    unsigned max_threads; /* __launch_bounds__; 1024 */
    dim3 cluster_dim;     /* __cluster_dims__; 1 x 1 x 1 */

    explicit facts(const char *kernel) : name(kernel), max_threads(1024), cluster_dim(1, 1, 1) {}
    facts &bounds(unsigned threads, unsigned = 0, unsigned = 0)
    {
        max_threads = threads;
        return *this;
    }
    facts &cluster(unsigned x, unsigned y = 1, unsigned z = 1)
    {
        cluster_dim = dim3(x, y, z);
        return *this;
    }
    /* True where the kernel is called from outside, which wants the answer and not its work. */
    bool asked() const { return current == nullptr && answer(); }

  private:
    bool answer() const;
};

/* What was answered last. */
extern facts answered;

/* A launch: set up by launch.h, kept by streams and graphs, run any number of times. */
struct kernel_call {
    facts what{""};
    dim3 grid, block;
    size_t dynamic_bytes = 0;
    bool early = false; /* may begin before what is in front of it has ended */
    std::function<void()> body;
};

/* A run of a call. */
struct launch;

/* The lock of the machine. While a run waits for other host threads, they get in. */
void enter();
void leave();

/* Holds the machine while it is in scope. */
struct inside {
    inside() { enter(); }
    ~inside() { leave(); }
};

/* These hold the machine. */
std::shared_ptr<launch> start(std::shared_ptr<const kernel_call> call);
bool has_ended(const launch &run);

/* Runs what has been started until done() is true, which is asked when nothing can go on at once.
 * When only memory is polled, more() is asked to start something else that is possible; after
 * NOTHING the polling goes on while other host threads get in, GIVE_UP ends it. */
enum class further { STARTED, NOTHING, GIVE_UP };
void run_until(const std::function<bool()> &done, const std::function<further()> &more);

/* For `static __shared__`: the place of a variable in the shared memory of this block; `key` stands
 * for the declaration. The dynamic part, for a declaration with that alignment. */
char *static_shared(const void *key, size_t bytes, size_t align);
char *dynamic_shared(size_t align);

template <typename T> T &shared_variable()
{
    static char key;
    return *reinterpret_cast<T *>(static_shared(&key, sizeof(T), alignof(T)));
}

} // namespace emu

#endif
