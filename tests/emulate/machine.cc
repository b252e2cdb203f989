/* Fibers, warps, barriers, blocks and clusters of the emulated device. See machine.h. */
#include "tests/emulate/machine_host.h"

#include <algorithm>
#include <errno.h>
#include <mutex>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n)   ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace emu
{

/* Goes on where `to` stopped, and keeps in *from where this goes on. What a call saves is saved,
 * the modes of floating point are not: nobody changes them. */
extern "C" void qv_emulate_switch(void **from, void *to);

#if !defined(__x86_64__)
#error "the emulated device switches stacks in the assembly of x86-64"
#endif
asm(R"(
.text
.p2align 4
.globl qv_emulate_switch
.type qv_emulate_switch, @function
qv_emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size qv_emulate_switch, . - qv_emulate_switch
)");

/* --- What there is ------------------------------------------------------------------------ */

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 512 << 10;
#else
constexpr size_t STACK_BYTES = 128 << 10;
#endif
constexpr int N_BARRIERS = 16, MAX_MEETS = 8, GROUP = 128;
constexpr size_t STATIC_BYTES = 48 << 10, RED_ZONE = 16;
constexpr double PATIENCE_S = 60; /* without anything but polling */

/* A thread with its stack. What it waits for, if it does, is for reports. */
struct fiber : thread {
    void *context; /* its stack pointer */
    char *stack;   /* lowest byte in use; a page without access is below */
    void *fake_stack;
    const char *waits_for;
    uint64_t where; /* the barrier or mask */
    bool (*ready)(void *);
    void *ready_ctx;
    uint64_t cluster_phase;
    fiber *next; /* at a barrier */
};

/* Threads that come together with the same mask (warps: of lanes; warpgroups: all). */
struct meet {
    void (*all)(void **, void *);
    uint32_t mask;
    int n;
    void *ctx;
    void *brought[GROUP];
    bool here[GROUP];
};

struct named_barrier {
    int arrived, expected; /* expected 0: all of the block */
    fiber *waiting;
};

struct warp_state {
    uint32_t alive;
    int n_meets;
    meet *meets[MAX_MEETS];
};

struct cluster;

struct block {
    launch *run;
    struct cluster *cluster;
    int rank;
    uint3 index;
    char *shared;
    int n_threads, n_alive;
    std::vector<fiber *> threads;
    std::vector<warp_state> warps;
    std::vector<meet> groups;
    named_barrier barriers[N_BARRIERS];
};

struct cluster {
    launch *run;
    std::vector<block> blocks;
    int n_alive, n_arrived; /* threads */
    uint64_t phase;
    fiber *waiting;
};

struct static_place {
    const void *key;
    size_t offset;
};

struct launch {
    std::shared_ptr<const kernel_call> call;
    std::vector<uint32_t> order; /* clusters that have not begun, the next one last */
    dim3 clusters;               /* of the grid */
    size_t n_running, n_wanted;  /* clusters at a time */
    size_t dynamic_at;           /* 0: not asked for yet */
    size_t static_end;
    std::vector<static_place> statics;
    std::vector<char *> unused_shared;
};

struct action {
    struct cluster *of;
    std::function<void()> run;
};

thread *current;
facts answered{""};

/* --- The environment ---------------------------------------------------------------------- */

[[noreturn]] static void refuse(const char *name, const char *text, const char *wanted)
{
    fprintf(stderr, "emulated device: %s is '%s', not %s\n", name, text, wanted);
    exit(2);
}

static int64_t number_from(const char *name, int64_t otherwise, int64_t most)
{
    const char *text = getenv(name);
    if (!text)
        return otherwise;
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    char wanted[64];
    snprintf(wanted, sizeof wanted, "a number from 0 to %lld", (long long)most);
    if (end == text || *end || errno || value < 0 || value > most)
        refuse(name, text, wanted);
    return value;
}

static int capability_from(const char *name)
{
    const char *text = getenv(name);
    if (!text || strcmp(text, "9.0") == 0)
        return 90;
    if (strcmp(text, "8.0") != 0 && strcmp(text, "10.0") != 0)
        refuse(name, text, "8.0, 9.0 or 10.0");
    return strcmp(text, "8.0") == 0 ? 80 : 100;
}

environment from_environment()
{
    return {number_from("QV_EMULATE_SEED", 1, INT64_MAX),
            (int)number_from("QV_EMULATE_DEVICES", 1, MAX_DEVICES),
            capability_from("QV_EMULATE_CAPABILITY")};
}

int capability()
{
    static const int value = from_environment().capability;
    return value;
}

int code()
{
    return capability() == 90 ? 90 : 80;
}

/* --- The machine -------------------------------------------------------------------------- */

namespace
{

struct machine {
    std::mutex lock;
    std::vector<std::shared_ptr<launch>> launches; /* that run */
    std::vector<fiber *> ready, polling, waiting;  /* waiting: in wait_until */
    std::vector<fiber *> unused;
    std::vector<meet *> unused_meets;
    std::vector<action> actions;
    std::vector<cluster *> running, ended; /* ended: to be freed by the host thread */
    fiber *host;                           /* as a fiber: the host thread that is inside */
    fiber *before;                         /* that ran before the last switch */
    uint64_t progress;
    uint64_t steady; /* a mask: the more bits, the more rarely it is any fiber's turn */
    uint64_t random;

    machine() : steady(1), random((uint64_t)from_environment().seed * 0x9e3779b97f4a7c15u + 1) {}
} m;

/* xorshift64: good enough to draw who is next. */
uint64_t draw()
{
    m.random ^= m.random << 13;
    m.random ^= m.random >> 7;
    m.random ^= m.random << 17;
    return m.random * 0x2545f4914f6cdd1du >> 11;
}

} // namespace

bool chance(unsigned n)
{
    return draw() % n == 0;
}

bool facts::answer() const
{
    answered = *this;
    return true;
}

/* --- Reports ------------------------------------------------------------------------------ */

static void print_thread(const thread *t)
{
    fprintf(stderr, "block (%u, %u, %u) thread (%u, %u, %u)", t->block_idx.x, t->block_idx.y,
            t->block_idx.z, t->thread_idx.x, t->thread_idx.y, t->thread_idx.z);
}

void fail(const char *format, ...)
{
    va_list args;
    fprintf(stderr, "emulated device: ");
    if (current) {
        fprintf(stderr, "%s: ", current->block->run->call->what.name);
        print_thread(current);
        fprintf(stderr, ": ");
    }
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    fflush(stderr);
    abort();
}

/* Neighbours that wait for the same are one line. */
static void print_block(const block &b)
{
    auto same = [](const fiber *a, const fiber *c) {
        return a->waits_for == c->waits_for && a->where == c->where;
    };
    for (size_t i = 0; i < b.threads.size();) {
        size_t end = i + 1;
        while (end < b.threads.size() && (b.threads[i] == NULL) == (b.threads[end] == NULL) &&
               (!b.threads[i] || same(b.threads[i], b.threads[end])))
            end++;
        fprintf(stderr, "  block (%u, %u, %u) threads %zu to %zu: ", b.index.x, b.index.y,
                b.index.z, i, end - 1);
        if (b.threads[i])
            fprintf(stderr, "%s %#llx\n", b.threads[i]->waits_for,
                    (unsigned long long)b.threads[i]->where);
        else
            fprintf(stderr, "have ended\n");
        i = end;
    }
}

static void fail_stuck(const char *why);

/* --- Fibers ------------------------------------------------------------------------------- */

static fiber *as_fiber(thread *t)
{
    return static_cast<fiber *>(t);
}

/* After a switch, on the stack of `me`. */
static void arrive(fiber *me)
{
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(me->fake_stack, &bottom, &size);
    if (m.before == m.host) { /* shows its stack */
        m.before->stack = (char *)const_cast<void *>(bottom);
        m.before->where = size;
    }
#else
    (void)me;
#endif
}

static void switch_to(fiber *next, bool for_good = false)
{
    fiber *me = current ? as_fiber(current) : m.host;
    current = next == m.host ? NULL : next;
    m.before = me;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? NULL : &me->fake_stack, next->stack,
                                   next == m.host ? next->where : STACK_BYTES);
#else
    (void)for_good;
#endif
    qv_emulate_switch(&me->context, next->context);
    arrive(me);
}

/* A stack whose fiber begins with run(), `stagger` bytes below its end. */
static void prepare_stack(fiber *f, size_t stagger, void (*run)())
{
    void **top = (void **)(f->stack + STACK_BYTES - stagger);
    *--top = NULL;        /* what run() would return to */
    *--top = (void *)run; /* at an odd multiple of 8, as after a call */
    for (int i = 0; i < 6; i++)
        *--top = NULL;
    f->context = top;
}

/* Who goes on now: often the last that became ready, so that one warp may run far ahead of the
 * others; otherwise any. The host thread where nobody can. */
static fiber *next_fiber()
{
    if (m.ready.empty())
        return m.host;
    if ((draw() & m.steady) == 0)
        std::swap(m.ready[draw() % m.ready.size()], m.ready.back());
    fiber *f = m.ready.back();
    m.ready.pop_back();
    return f;
}

/* Lets others go on until somebody wakes this one. */
static void give_way(const char *waits_for, uint64_t where)
{
    fiber *me = as_fiber(current);
    me->waits_for = waits_for;
    me->where = where;
    fiber *next = next_fiber();
    if (next != me)
        switch_to(next);
    me->waits_for = "runs";
    me->where = 0;
}

static void wake(fiber *f)
{
    m.ready.push_back(f);
}

/* Has just completed what others waited for: who is first now? */
static void maybe_give_way()
{
    if (!chance(4))
        return;
    wake(as_fiber(current));
    give_way("runs", 0);
}

static fiber *new_fiber()
{
    if (!m.unused.empty()) {
        fiber *f = m.unused.back();
        m.unused.pop_back();
        return f;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *memory = (char *)mmap(NULL, page + STACK_BYTES, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0)
        fail("no memory for the stack of a thread");
    fiber *f = new fiber();
    f->stack = memory + page;
    return f;
}

/* --- Threads that come together ----------------------------------------------------------- */

static uint32_t lanes_of_warp(const block &b, int warp)
{
    int n = b.n_threads - 32 * warp;
    return n >= 32 ? 0xffffffffu : (1u << n) - 1;
}

static meet *new_meet(warp_state &w, uint32_t mask, void (*all)(void **, void *))
{
    if (w.n_meets == MAX_MEETS)
        fail("lanes of this warp wait with %d different masks", MAX_MEETS);
    meet *t;
    if (m.unused_meets.empty()) {
        t = new meet();
    } else {
        t = m.unused_meets.back();
        m.unused_meets.pop_back();
    }
    t->all = all;
    t->mask = mask;
    t->n = 0;
    memset(t->brought, 0, 32 * sizeof *t->brought);
    memset(t->here, 0, 32 * sizeof *t->here);
    w.meets[w.n_meets++] = t;
    return t;
}

/* Wakes the `n` threads from `first` on that are here, but not the current one. */
static void wake_all(block &b, int first, int n, const bool *here)
{
    int start = (int)(draw() % (unsigned)n);
    for (int k = 0; k < n; k++) {
        int i = (start + k) % n;
        if (here[i] && b.threads[first + i] != current)
            wake(b.threads[first + i]);
    }
}

static void complete(block &b, int warp, int i)
{
    warp_state &w = b.warps[warp];
    meet *t = w.meets[i];
    w.meets[i] = w.meets[--w.n_meets];
    m.progress++;
    t->all(t->brought, t->ctx);
    wake_all(b, 32 * warp, 32, t->here);
    m.unused_meets.push_back(t);
}

void warp_meet(uint32_t mask, void *mine, void (*all)(void **, void *), void *ctx)
{
    fiber *me = as_fiber(current);
    block &b = *me->block;
    warp_state &w = b.warps[me->warp];
    if (!(mask >> me->lane & 1))
        fail("lane %d is not in its own mask %#x", me->lane, mask);
    int i = 0;
    while (i < w.n_meets && w.meets[i]->mask != mask)
        i++;
    meet *t = i < w.n_meets ? w.meets[i] : new_meet(w, mask, all);
    if (t->all != all)
        fail("lanes of the mask %#x are at different instructions that need them all", mask);
    t->brought[me->lane] = mine;
    t->here[me->lane] = true;
    t->ctx = ctx;
    t->n++;
    if (t->n < __builtin_popcount(mask & w.alive)) {
        give_way("wait for the lanes of mask", mask);
    } else {
        complete(b, me->warp, i);
        maybe_give_way();
    }
}

void group_meet(void *mine, void (*all)(void **, void *), void *ctx)
{
    fiber *me = as_fiber(current);
    block &b = *me->block;
    int group = me->index / GROUP, first = group * GROUP;
    if (first + GROUP > b.n_threads)
        fail("the warpgroup is not whole: the block has %d threads", b.n_threads);
    meet &t = b.groups[group];
    if (t.n == 0) {
        t.all = all;
        memset(t.here, 0, sizeof t.here);
    }
    if (t.all != all)
        fail("threads of the warpgroup are at different instructions that need them all");
    t.brought[me->index - first] = mine;
    t.here[me->index - first] = true;
    if (++t.n < GROUP) {
        give_way("wait for their warpgroup", (uint64_t)group);
        return;
    }
    t.n = 0;
    m.progress++;
    all(t.brought, ctx);
    wake_all(b, first, GROUP, t.here);
    maybe_give_way();
}

/* --- Barriers ----------------------------------------------------------------------------- */

/* Opens it if all have come that are expected. */
static bool open_if_full(block &b, named_barrier &bar)
{
    if (bar.arrived == 0 || bar.arrived < (bar.expected ? bar.expected : b.n_alive))
        return false;
    bar.arrived = 0;
    m.progress++;
    for (fiber *f = bar.waiting; f; f = f->next)
        wake(f);
    bar.waiting = NULL;
    return true;
}

static named_barrier &arrive_at(block &b, int id, int n_threads)
{
    if (id < 0 || id >= N_BARRIERS || n_threads % 32 != 0)
        fail("barrier %d of %d threads: there are %d, of whole warps", id, n_threads, N_BARRIERS);
    named_barrier &bar = b.barriers[id];
    if (bar.arrived == 0)
        bar.expected = n_threads;
    if (bar.expected != n_threads)
        fail("barrier %d of %d threads is used for %d at the same time", id, bar.expected,
             n_threads);
    bar.arrived++;
    return bar;
}

void barrier(int id, int n_threads)
{
    fiber *me = as_fiber(current);
    named_barrier &bar = arrive_at(*me->block, id, n_threads);
    if (open_if_full(*me->block, bar)) {
        maybe_give_way();
        return;
    }
    me->next = bar.waiting;
    bar.waiting = me;
    give_way("wait at barrier", (uint64_t)id);
}

void barrier_arrive(int id, int n_threads)
{
    block &b = *current->block;
    open_if_full(b, arrive_at(b, id, n_threads));
}

static void open_cluster_if_full(cluster &c)
{
    if (c.n_arrived == 0 || c.n_arrived < c.n_alive)
        return;
    c.n_arrived = 0;
    c.phase++;
    m.progress++;
    for (fiber *f = c.waiting; f; f = f->next)
        wake(f);
    c.waiting = NULL;
}

void cluster_arrive()
{
    fiber *me = as_fiber(current);
    cluster &c = *me->block->cluster;
    if (me->cluster_phase > c.phase)
        fail("arrives twice at the barrier of the cluster without waiting");
    me->cluster_phase = c.phase + 1;
    c.n_arrived++;
    open_cluster_if_full(c);
}

void cluster_wait()
{
    fiber *me = as_fiber(current);
    cluster &c = *me->block->cluster;
    if (me->cluster_phase <= c.phase) {
        maybe_give_way();
        return;
    }
    me->next = c.waiting;
    c.waiting = me;
    give_way("wait for the cluster in phase", c.phase);
}

/* --- Waits and actions -------------------------------------------------------------------- */

void yield()
{
    m.polling.push_back(as_fiber(current));
    give_way("poll memory", 0);
}

void wait_until(bool (*ready)(void *), void *ctx, const char *what)
{
    fiber *me = as_fiber(current);
    while (!ready(ctx)) {
        me->ready = ready;
        me->ready_ctx = ctx;
        m.waiting.push_back(me);
        give_way(what, (uint64_t)(uintptr_t)ctx);
    }
}

void later(std::function<void()> action)
{
    if (chance(4))
        action();
    else
        m.actions.push_back({current->block->cluster, std::move(action)});
}

/* Runs some of the actions, in any order; of one cluster all. */
static bool run_actions(const cluster *of)
{
    std::vector<action> now, rest;
    for (action &a : m.actions)
        ((of ? a.of == of : now.empty() || chance(2)) ? now : rest).push_back(std::move(a));
    m.actions = std::move(rest);
    for (size_t i = now.size(); i > 1; i--)
        std::swap(now[draw() % i], now[i - 1]);
    for (action &a : now)
        a.run();
    m.progress += now.size();
    return !now.empty();
}

static bool wake_waiting()
{
    size_t kept = 0;
    for (fiber *f : m.waiting)
        if (f->ready(f->ready_ctx))
            wake(f);
        else
            m.waiting[kept++] = f;
    bool some = kept < m.waiting.size();
    m.waiting.resize(kept);
    m.progress += some;
    return some;
}

/* --- Shared memory ------------------------------------------------------------------------ */

/* From the bottom: nothing, so that no variable has the address 0; what the launch asked for, not
 * aligned better than it is declared; from 1024 bytes further on static variables with gaps in
 * between. */
static size_t shared_bytes(const launch &run)
{
    return 1024 + (run.call->dynamic_bytes + 1023) / 1024 * 1024 + 1024 + STATIC_BYTES;
}

static char *new_shared(launch &run)
{
    size_t bytes = shared_bytes(run);
    char *memory;
    if (run.unused_shared.empty()) {
        memory = (char *)aligned_alloc(1024, bytes);
        if (!memory)
            fail("no memory for the shared memory of a block");
    } else {
        memory = run.unused_shared.back();
        run.unused_shared.pop_back();
    }
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
    memset(memory, 0xff, bytes); /* NaN, -1 */
    ASAN_POISON_MEMORY_REGION(memory, bytes);
    return memory;
}

char *dynamic_shared(size_t align)
{
    launch &run = *current->block->run;
    if (align < 16)
        align = 16;
    if (run.dynamic_at == 0)
        run.dynamic_at = align;
    if (run.dynamic_at % align != 0)
        fail("dynamic shared memory is declared with %zu and with %zu bytes of alignment",
             run.dynamic_at, align);
    char *p = current->block->shared + run.dynamic_at;
    ASAN_UNPOISON_MEMORY_REGION(p, run.call->dynamic_bytes);
    return p;
}

char *static_shared(const void *key, size_t bytes, size_t align)
{
    block &b = *current->block;
    launch &run = *b.run;
    for (const static_place &p : run.statics)
        if (p.key == key) {
            ASAN_UNPOISON_MEMORY_REGION(b.shared + p.offset, bytes);
            return b.shared + p.offset;
        }
    if (align < 16)
        align = 16;
    size_t offset = (run.static_end + RED_ZONE + align - 1) / align * align;
    run.static_end = offset + bytes;
    if (run.static_end > shared_bytes(run))
        fail("more than %zu bytes of static shared memory", STATIC_BYTES);
    run.statics.push_back({key, offset});
    ASAN_UNPOISON_MEMORY_REGION(b.shared + offset, bytes);
    return b.shared + offset;
}

char *shared_memory()
{
    return current->block->shared;
}

size_t shared_size()
{
    return shared_bytes(*current->block->run);
}

char *shared_memory_of(int rank)
{
    cluster &c = *current->block->cluster;
    if (rank < 0 || rank >= (int)c.blocks.size())
        fail("block %d of a cluster of %zu", rank, c.blocks.size());
    return c.blocks[(size_t)rank].shared;
}

int cluster_rank()
{
    return current->block->rank;
}

int cluster_size()
{
    return (int)current->block->cluster->blocks.size();
}

/* --- Threads, blocks, clusters ------------------------------------------------------------ */

/* What others waited for may be complete without it. */
[[noreturn]] static void end_thread(fiber *me)
{
    block &b = *me->block;
    cluster &c = *b.cluster;
    warp_state &w = b.warps[me->warp];
    w.alive &= ~(1u << me->lane);
    b.threads[me->index] = NULL;
    b.n_alive--;
    c.n_alive--;
    m.progress++;
    for (int i = 0; i < w.n_meets;) {
        meet *t = w.meets[i];
        if (t->n == __builtin_popcount(t->mask & w.alive))
            complete(b, me->warp, i);
        else
            i++;
    }
    for (named_barrier &bar : b.barriers)
        open_if_full(b, bar);
    open_cluster_if_full(c);
    if (c.n_alive == 0)
        m.ended.push_back(&c);
    m.unused.push_back(me); /* taken by the host thread only, which is not on this stack */
    switch_to(next_fiber(), true);
    abort();
}

static void run_thread()
{
    fiber *me = as_fiber(current);
    arrive(me);
    me->block->run->call->body();
    if (me->device)
        thread_ended(me);
    end_thread(me);
}

/* Stacks of neighbours begin at different offsets in a page, because they would meet in the same
 * few lines of the cache. */
static size_t stagger(int i)
{
    return (size_t)(i % 32) * 5 % 64 * 64;
}

static void start_block(block &b)
{
    const kernel_call &call = *b.run->call;
    const dim3 &n = call.block;
    b.n_threads = b.n_alive = (int)(n.x * n.y * n.z);
    b.shared = new_shared(*b.run);
    int n_warps = (b.n_threads + 31) / 32;
    b.warps.resize((size_t)n_warps);
    b.groups.resize((size_t)(b.n_threads / GROUP));
    for (int w = 0; w < n_warps; w++)
        b.warps[w] = {lanes_of_warp(b, w), 0, {}};
    for (int i = 0; i < b.n_threads; i++) {
        fiber *f = new_fiber();
        unsigned u = (unsigned)i;
        static_cast<thread &>(*f) = {{u % n.x, u / n.x % n.y, u / n.x / n.y},
                                     b.index,
                                     n,
                                     call.grid,
                                     i,
                                     i % 32,
                                     i / 32,
                                     &b,
                                     NULL};
        prepare_stack(f, stagger(i), run_thread);
        f->fake_stack = NULL;
        f->waits_for = "have not begun";
        f->where = 0;
        f->cluster_phase = 0;
        b.threads.push_back(f);
        wake(f);
    }
}

static void start_cluster(launch &run)
{
    uint32_t i = run.order.back();
    run.order.pop_back();
    run.n_running++;
    m.progress++;
    const dim3 &d = run.call->what.cluster_dim;
    uint3 at = {i % run.clusters.x * d.x, i / run.clusters.x % run.clusters.y * d.y,
                i / run.clusters.x / run.clusters.y * d.z};
    cluster *c = new cluster();
    m.running.push_back(c);
    c->run = &run;
    c->blocks.resize(d.x * d.y * d.z);
    for (unsigned r = 0; r < c->blocks.size(); r++) {
        block &b = c->blocks[r];
        b.run = &run;
        b.cluster = c;
        b.rank = (int)r;
        b.index = {at.x + r % d.x, at.y + r / d.x % d.y, at.z + r / d.x / d.y};
        start_block(b);
        c->n_alive += b.n_threads;
    }
}

static void end_cluster(cluster *c)
{
    launch &run = *c->run;
    run_actions(c);
    for (block &b : c->blocks)
        run.unused_shared.push_back(b.shared);
    run.n_running--;
    m.running.erase(std::find(m.running.begin(), m.running.end(), c));
    delete c;
    if (!has_ended(run))
        return;
    for (char *memory : run.unused_shared) {
        ASAN_UNPOISON_MEMORY_REGION(memory, shared_bytes(run));
        free(memory);
    }
    run.unused_shared.clear();
    for (size_t i = 0; i < m.launches.size(); i++)
        if (m.launches[i].get() == &run) {
            m.launches.erase(m.launches.begin() + (ptrdiff_t)i);
            break;
        }
}

/* Clusters of blocks as far as they are wanted at the same time; with `more` one beyond. */
static bool start_clusters(bool more)
{
    bool some = false;
    for (auto &run : m.launches) {
        if (more && !run->order.empty()) {
            run->n_wanted = run->n_running + 1;
            more = false;
        }
        while (!run->order.empty() && run->n_running < run->n_wanted) {
            start_cluster(*run);
            some = true;
        }
    }
    return some;
}

/* --- Launches, for the host --------------------------------------------------------------- */

static thread_local fiber this_host;

void enter()
{
    m.lock.lock();
    m.host = &this_host;
}

void leave()
{
    m.lock.unlock();
}

std::shared_ptr<launch> start(std::shared_ptr<const kernel_call> call)
{
    auto run = std::make_shared<launch>();
    const dim3 &grid = call->grid, &d = call->what.cluster_dim;
    run->call = call;
    run->clusters = dim3(grid.x / d.x, grid.y / d.y, grid.z / d.z);
    run->order.resize((size_t)run->clusters.x * run->clusters.y * run->clusters.z);
    for (size_t i = 0; i < run->order.size(); i++) {
        run->order[i] = (uint32_t)i;
        std::swap(run->order[i], run->order[draw() % (i + 1)]);
    }
    m.steady = ((uint64_t)1 << draw() % 6) - 1;
    run->n_wanted = chance(2) ? 1 : 1 + draw() % 3;
    run->static_end = 1024 + (call->dynamic_bytes + 1023) / 1024 * 1024;
    m.launches.push_back(run);
    return run;
}

bool has_ended(const launch &run)
{
    return run.n_running == 0 && run.order.empty();
}

static double now_s()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void fail_stuck(const char *why)
{
    fprintf(stderr, "emulated device: %s\n", why);
    for (auto &run : m.launches)
        fprintf(stderr, " %s: %zu clusters of blocks run, %zu have not begun\n",
                run->call->what.name, run->n_running, run->order.size());
    for (const cluster *c : m.running)
        for (const block &b : c->blocks)
            print_block(b);
    fflush(stderr);
    abort();
}

void run_until(const std::function<bool()> &done, const std::function<further()> &more)
{
    constexpr int ROUNDS = 64; /* of polling before others are started, and before sleeping */
    uint64_t seen = m.progress;
    double since = 0;
    int rounds = 0;
    for (;;) {
        while (!m.ready.empty())
            switch_to(next_fiber());
        for (size_t i = 0; i < m.ended.size(); i++)
            end_cluster(m.ended[i]);
        m.ended.clear();
        if (start_clusters(false))
            continue;
        if (done())
            return;
        if (run_actions(NULL) || wake_waiting())
            continue;
        if (seen != m.progress) {
            seen = m.progress;
            rounds = 0;
            since = 0;
        }
        if (!m.polling.empty() && rounds++ < ROUNDS) {
            m.ready.swap(m.polling);
            continue;
        }
        if (start_clusters(true))
            continue;
        further next = more();
        if (next == further::STARTED)
            continue;
        if (next == further::GIVE_UP)
            return;
        if (m.polling.empty())
            fail_stuck("all threads wait for each other");
        /* What is polled may be up to other host threads, or to the time. */
        if (since == 0)
            since = now_s();
        else if (now_s() - since > PATIENCE_S)
            fail_stuck("threads have polled memory for a minute in vain");
        leave();
        usleep(50);
        enter();
        m.ready.insert(m.ready.end(), m.polling.begin(), m.polling.end());
        m.polling.clear();
    }
}

} // namespace emu
