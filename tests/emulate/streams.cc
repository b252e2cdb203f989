/* The CUDA runtime API over the emulated device: streams, copies, events, graphs, launches. */
#include "tests/emulate/runtime.h"

#include "tests/emulate/launch.h"

#include <algorithm>
#include <deque>
#include <string.h>
#include <string>
#include <time.h>
#include <vector>

/* --- What there is ------------------------------------------------------------------------ */

namespace
{

struct graph;

/* One record of an event. */
struct moment {
    cudaStream_t stream;
    uint64_t number; /* of its operation in the stream */
    bool reached;
    double at_ms;
    graph *recorded; /* in a stream that is recorded: stands for its order alone */
};

/* What a stream holds: one of these is set. */
struct operation {
    std::function<void()> work = {};
    std::shared_ptr<const emu::kernel_call> call = {};
    std::shared_ptr<moment> record = {}, wait = {};
};

struct graph {
    std::vector<operation> operations; /* in the order in which they were recorded */
    std::vector<cudaStream_t> streams; /* that are recorded; the first one began */
};

} // namespace

struct CUstream_st {
    int device;
    std::deque<operation> queue;
    std::shared_ptr<emu::launch> running; /* of the first in the queue */
    uint64_t n_put, n_done, n_wanted;     /* operations ever; up to where somebody waits */
    graph *recorded_to;
};

struct CUevent_st {
    std::shared_ptr<moment> last;
};

struct CUgraph_st : graph {
};
struct CUgraphExec_st : graph {
};

namespace
{

std::vector<cudaStream_t> streams;
thread_local int n_recorded; /* streams that this thread has begun to record */

double now_ms()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

cudaStream_t new_stream(int device)
{
    cudaStream_t s = new CUstream_st();
    s->device = device;
    streams.push_back(s);
    return s;
}

/* --- Progress ----------------------------------------------------------------------------- */

/* One step of a stream: false if it waits for something, or is at its end. */
bool advance(cudaStream_t s)
{
    if (s->queue.empty())
        return false;
    operation &first = s->queue.front();
    if (first.call) {
        if (!s->running) {
            s->running = emu::start(first.call);
            return true;
        }
        if (!emu::has_ended(*s->running))
            return false;
        s->running.reset();
    } else if (first.wait) {
        moment &m = *first.wait;
        if (!m.reached) {
            m.stream->n_wanted = std::max(m.stream->n_wanted, m.number);
            return false;
        }
    } else if (first.record) {
        first.record->reached = true;
        first.record->at_ms = now_ms();
    } else {
        first.work();
    }
    s->queue.pop_front();
    s->n_done++;
    return true;
}

bool advance_wanted()
{
    bool some = false;
    for (cudaStream_t s : streams)
        while (s->n_done < s->n_wanted && advance(s))
            some = true;
    return some;
}

/* A step of some stream that nobody waits for. */
bool advance_other()
{
    size_t n = streams.size(), first = emu::chance(2) ? 0 : n / 2;
    for (size_t i = 0; i < n; i++)
        if (advance(streams[(first + i) % n]))
            return true;
    return false;
}

/* Until the streams are where somebody waits for them, as far as done() asks. With `patient` false
 * only as far as that does not need other host threads. */
void progress(const std::function<bool()> &done, bool patient)
{
    bool stalled = false;
    while (!stalled) {
        while (advance_wanted())
            ;
        if (done())
            return;
        auto may_advance = [&] { return done() || advance_wanted(); };
        auto more = [&] {
            if (advance_other())
                return emu::further::STARTED;
            stalled = !patient;
            return patient ? emu::further::NOTHING : emu::further::GIVE_UP;
        };
        emu::run_until(may_advance, more);
    }
}

bool is_at(cudaStream_t s, uint64_t number)
{
    return s->n_done >= number;
}

void drain(cudaStream_t s, uint64_t number, bool patient = true)
{
    s->n_wanted = std::max(s->n_wanted, number);
    progress([=] { return is_at(s, number); }, patient);
}

/* Stream 0, which waits for all others of the device and makes them wait. */
cudaStream_t default_stream()
{
    static std::vector<cudaStream_t> of_devices(emu::MAX_DEVICES);
    cudaStream_t &s = of_devices[(size_t)emu::current_device()];
    if (!s)
        s = new_stream(emu::current_device());
    return s;
}

uint64_t put(cudaStream_t s, operation op)
{
    if (s->recorded_to) {
        s->recorded_to->operations.push_back(std::move(op));
        return 0;
    }
    s->queue.push_back(std::move(op));
    uint64_t number = ++s->n_put;
    if (emu::chance(4))
        drain(s, number, false);
    return number;
}

/* With the stream that 0 stands for. */
cudaStream_t put_anywhere(cudaStream_t s, operation op)
{
    bool is_default = s == NULL;
    if (is_default) {
        s = default_stream();
        emu::drain_device(s->device);
    }
    put(s, std::move(op));
    if (is_default)
        drain(s, s->n_put);
    return s;
}

} // namespace

void emu::drain_device(int device)
{
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i]->device == device && !streams[i]->recorded_to)
            drain(streams[i], streams[i]->n_put);
}

bool emu::is_recording()
{
    return n_recorded > 0;
}

cudaError_t emu::enqueue(cudaStream_t stream, std::function<void()> work)
{
    emu::inside lock;
    put_anywhere(stream, {.work = std::move(work)});
    return cudaSuccess;
}

/* --- Launches ----------------------------------------------------------------------------- */

static cudaError_t check(const cudaLaunchConfig_t &config, const emu::kernel_call &call,
                         const void *kernel)
{
    const dim3 &g = call.grid, &b = call.block, &c = call.what.cluster_dim;
    if (g.x == 0 || g.y == 0 || g.z == 0 || g.y > 65535 || g.z > 65535 || b.x == 0 || b.y == 0 ||
        b.z == 0 || b.z > 64 || b.x * b.y * b.z > call.what.max_threads)
        return cudaErrorInvalidConfiguration;
    if (c.x * c.y * c.z > 8 || g.x % c.x != 0 || g.y % c.y != 0 || g.z % c.z != 0)
        return cudaErrorInvalidConfiguration;
    if (emu::capability() < 90 && (call.early || c.x * c.y * c.z > 1))
        return cudaErrorNotSupported;
    if (config.dynamicSmemBytes > emu::shared_limit(kernel))
        return cudaErrorInvalidValue;
    return cudaSuccess;
}

cudaError_t emu::submit(const cudaLaunchConfig_t &config, std::shared_ptr<kernel_call> call,
                        const void *kernel)
{
    emu::inside lock;
    call->body(); /* outside of a launch the kernel only answers */
    call->what = answered;
    call->grid = config.gridDim;
    call->block = config.blockDim;
    call->dynamic_bytes = config.dynamicSmemBytes;
    for (unsigned i = 0; i < config.numAttrs; i++) {
        const cudaLaunchAttribute &a = config.attrs[i];
        if (a.id == cudaLaunchAttributeClusterDimension)
            call->what.cluster_dim =
                dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
        else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
            call->early = a.val.programmaticStreamSerializationAllowed != 0;
        else
            return result(cudaErrorNotSupported);
    }
    cudaError_t error = check(config, *call, kernel);
    if (error == cudaSuccess)
        put_anywhere(config.stream, {.call = std::move(call)});
    return result(error);
}

/* --- Copies ------------------------------------------------------------------------------- */

static bool is_recorded(cudaStream_t s)
{
    return s && s->recorded_to;
}

/* The device's side of a copy must lie in one allocation, the host's in none of the device's. */
static bool is_possible(const void *p, size_t bytes, bool on_device)
{
    return on_device ? emu::kind_of(p, bytes) != emu::memory::UNKNOWN
                     : !emu::touches_device(p, bytes);
}

struct rows {
    size_t to_pitch, from_pitch, width, n;
};

static void copy_rows(void *to, const void *from, const rows &r)
{
    for (size_t i = 0; i < r.n; i++)
        memmove((char *)to + i * r.to_pitch, (const char *)from + i * r.from_pitch, r.width);
}

static cudaError_t copy(void *to, const void *from, const rows &r, enum cudaMemcpyKind kind,
                        cudaStream_t stream)
{
    if (r.width == 0 || r.n == 0)
        return cudaSuccess;
    size_t to_bytes = (r.n - 1) * r.to_pitch + r.width;
    size_t from_bytes = (r.n - 1) * r.from_pitch + r.width;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    emu::inside lock;
    if (!is_possible(to, to_bytes, to_device) || !is_possible(from, from_bytes, from_device))
        return emu::result(cudaErrorInvalidValue);
    bool recorded = is_recorded(stream);
    auto pageable = [](const void *p, size_t bytes) {
        return emu::kind_of(p, bytes) == emu::memory::UNKNOWN;
    };
    if (!from_device && !recorded && pageable(from, from_bytes)) {
        /* The call returns when it has read what may be overwritten then. */
        auto staged = std::make_shared<std::string>((const char *)from, from_bytes);
        put_anywhere(stream, {.work = [=] { copy_rows(to, staged->data(), r); }});
        return cudaSuccess;
    }
    cudaStream_t s = put_anywhere(stream, {.work = [=] { copy_rows(to, from, r); }});
    if (!to_device && !recorded && pageable(to, to_bytes))
        drain(s, s->n_put);
    return cudaSuccess;
}

extern "C" {

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    return copy(to, from, {bytes, bytes, bytes, 1}, kind, stream);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    if (width > to_pitch || width > from_pitch)
        return emu::result(cudaErrorInvalidValue);
    return copy(to, from, {to_pitch, from_pitch, width, n}, kind, stream);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    return copy(to, from, {bytes, bytes, bytes, 1}, kind, NULL);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    emu::inside lock;
    if (bytes == 0)
        return cudaSuccess;
    if (!is_possible(to, bytes, true))
        return emu::result(cudaErrorInvalidValue);
    put_anywhere(stream, {.work = [=] { memset(to, value, bytes); }});
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    return cudaMemsetAsync(to, value, bytes, NULL);
}

/* --- Streams ------------------------------------------------------------------------------ */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    emu::inside lock;
    *out = new_stream(emu::current_device());
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *out)
{
    return cudaStreamCreateWithFlags(out, cudaStreamDefault);
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    emu::inside lock;
    drain(s, s->n_put);
    streams.erase(std::find(streams.begin(), streams.end(), s));
    delete s;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    emu::inside lock;
    if (is_recorded(s))
        return emu::result(cudaErrorStreamCaptureUnsupported);
    if (s)
        drain(s, s->n_put);
    else
        emu::drain_device(emu::current_device());
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t s)
{
    emu::inside lock;
    if (is_recorded(s))
        return emu::result(cudaErrorStreamCaptureUnsupported);
    if (!is_at(s, s->n_put) && emu::chance(2))
        drain(s, s->n_put, false);
    return is_at(s, s->n_put) ? cudaSuccess : cudaErrorNotReady;
}

/* --- Events ------------------------------------------------------------------------------- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned)
{
    *out = new CUevent_st();
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *out)
{
    return cudaEventCreateWithFlags(out, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    emu::inside lock;
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s)
{
    emu::inside lock;
    if (!s)
        s = default_stream();
    auto now = std::make_shared<moment>(moment{s, s->n_put + 1, false, 0, s->recorded_to});
    event->last = now;
    if (!s->recorded_to)
        put(s, {.record = now});
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned)
{
    emu::inside lock;
    auto last = event->last;
    if (!last)
        return cudaSuccess;
    if (last->recorded) { /* a fork or a join of what is recorded */
        if (s->recorded_to && s->recorded_to != last->recorded)
            return emu::result(cudaErrorStreamCaptureIsolation);
        if (!s->recorded_to)
            last->recorded->streams.push_back(s);
        s->recorded_to = last->recorded;
        return cudaSuccess;
    }
    if (s->recorded_to)
        return emu::result(cudaErrorStreamCaptureIsolation);
    put(s, {.wait = last});
    return cudaSuccess;
}

/* Whether what the event stands for has happened, after waiting for it if that is wanted. */
static cudaError_t look_at(cudaEvent_t event, bool wait)
{
    emu::inside lock;
    auto last = event->last;
    if (!last || last->reached)
        return cudaSuccess;
    if (last->recorded)
        return emu::result(cudaErrorStreamCaptureUnsupported);
    if (wait || emu::chance(2))
        drain(last->stream, last->number, wait);
    return last->reached ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    return look_at(event, true);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    return look_at(event, false);
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t stop)
{
    emu::inside lock;
    if (!start->last || !stop->last)
        return emu::result(cudaErrorInvalidResourceHandle);
    if (!start->last->reached || !stop->last->reached)
        return emu::result(cudaErrorNotReady);
    *ms = (float)(stop->last->at_ms - start->last->at_ms);
    return cudaSuccess;
}

/* --- Graphs ------------------------------------------------------------------------------- */

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode)
{
    emu::inside lock;
    if (s->recorded_to)
        return emu::result(cudaErrorStreamCaptureUnsupported);
    s->recorded_to = new CUgraph_st();
    s->recorded_to->streams.push_back(s);
    n_recorded++;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *out)
{
    emu::inside lock;
    *out = NULL;
    if (!s->recorded_to || s->recorded_to->streams[0] != s)
        return emu::result(cudaErrorInvalidValue);
    *out = static_cast<cudaGraph_t>(s->recorded_to);
    for (cudaStream_t joined : (*out)->streams)
        joined->recorded_to = NULL;
    n_recorded--;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t g, unsigned long long)
{
    *out = new CUgraphExec_st();
    (*out)->operations = g->operations;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t g)
{
    delete g;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s)
{
    emu::inside lock;
    for (const operation &op : exec->operations)
        put_anywhere(s, op);
    return cudaSuccess;
}

} // extern "C"
