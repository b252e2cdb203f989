/* Two free-running counters over a power of two of items: `tail` is written by the producer, `head`
 * by the consumer.
 *
 * Memory ordering. The producer copies the item, then stores `tail` with release; the consumer
 * loads `tail` with acquire before it copies the item out. The other way round, the consumer stores
 * `head` with release after its copy, and the producer loads it with acquire before it reuses the
 * place.
 *
 * Wake-up. `armed` says that the consumer found the ring empty and may go to sleep. Consumer: set
 * armed, then look at tail again; producer: set tail, then look at armed. All four are sequentially
 * consistent, so at least one side sees the other and no item is left behind a sleeping consumer.
 * `signals` counts writes to the eventfd, `drained` what was read back: the consumer reads the
 * eventfd only when the two differ. */
#include "common/ring.h"

#include "common/clock.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define CACHE_LINE 64

struct qv_ring {
    unsigned char *items; /* [capacity][item_size], owned */
    size_t capacity;      /* a power of two */
    size_t item_size;
    int fd;

    /* Written by the producer. */
    _Alignas(CACHE_LINE) _Atomic size_t tail; /* items pushed ever */
    size_t head_seen;                         /* head as last loaded; saves cache misses */

    /* Written by the consumer. */
    _Alignas(CACHE_LINE) _Atomic size_t head; /* items popped ever */
    uint64_t drained;                         /* signals read back from the eventfd */

    /* Written by both. */
    _Alignas(CACHE_LINE) atomic_bool armed;
    _Atomic uint64_t signals;
    atomic_bool woken; /* qv_ring_wake was called; the next wait that is empty returns */
};

qv_status qv_ring_new(size_t capacity, size_t item_size, qv_ring **out)
{
    size_t bytes, n = 1;
    while (n < capacity && n <= SIZE_MAX / 4)
        n *= 2;
    if (capacity == 0 || item_size == 0 || n < capacity ||
        __builtin_mul_overflow(n, item_size, &bytes))
        return qv_fail(QV_ERR_ARG, "ring: %zu items of %zu bytes is not a size", capacity,
                       item_size);

    qv_ring *ring = aligned_alloc(CACHE_LINE, sizeof *ring);
    if (ring == NULL)
        return qv_fail(QV_ERR_NOMEM, "ring: no memory");
    *ring = (qv_ring){.capacity = n, .item_size = item_size, .fd = -1};
    atomic_init(&ring->armed, true); /* the first push wakes a consumer that polls right away */
    ring->items = malloc(bytes);
    if (ring->items == NULL) {
        qv_ring_free(ring);
        return qv_fail(QV_ERR_NOMEM, "ring: no memory for %zu items of %zu bytes", n, item_size);
    }
    ring->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ring->fd < 0) {
        qv_status status = qv_fail(QV_ERR_IO, "ring: eventfd: %s", strerror(errno));
        qv_ring_free(ring);
        return status;
    }
    *out = ring;
    return QV_OK;
}

void qv_ring_free(qv_ring *ring)
{
    if (ring == NULL)
        return;
    if (ring->fd >= 0)
        close(ring->fd);
    free(ring->items);
    free(ring);
}

static void *item_at(const qv_ring *ring, size_t index)
{
    return ring->items + (index & (ring->capacity - 1)) * ring->item_size;
}

/* Make the eventfd readable. It holds 2^64 - 2 signals, so the write never blocks; EINTR cannot
 * happen on a non-blocking one. */
static void signal_consumer(qv_ring *ring)
{
    uint64_t one = 1;
    ssize_t n = write(ring->fd, &one, sizeof one);
    QV_ASSERT(n == (ssize_t)sizeof one);
    /* Relaxed: a consumer that does not see the count yet reads the eventfd one pop later. */
    atomic_fetch_add_explicit(&ring->signals, 1, memory_order_relaxed);
}

/* --- producer ------------------------------------------------------------------------------- */

bool qv_ring_push(qv_ring *ring, const void *item)
{
    size_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    if (tail - ring->head_seen == ring->capacity) {
        ring->head_seen = atomic_load_explicit(&ring->head, memory_order_acquire);
        if (tail - ring->head_seen == ring->capacity)
            return false;
    }
    memcpy(item_at(ring, tail), item, ring->item_size);
    atomic_store_explicit(&ring->tail, tail + 1, memory_order_seq_cst);
    if (atomic_load_explicit(&ring->armed, memory_order_seq_cst) &&
        atomic_exchange_explicit(&ring->armed, false, memory_order_seq_cst))
        signal_consumer(ring);
    return true;
}

void qv_ring_wake(qv_ring *ring)
{
    atomic_store_explicit(&ring->woken, true, memory_order_release);
    signal_consumer(ring);
}

/* --- consumer ------------------------------------------------------------------------------- */

static bool is_empty(const qv_ring *ring, memory_order order)
{
    return atomic_load_explicit(&ring->tail, order) ==
           atomic_load_explicit(&ring->head, memory_order_relaxed);
}

/* The ring looks empty: take back old signals and ask for the next one. True if it is still empty,
 * so that sleeping on the eventfd is safe. */
static bool arm(qv_ring *ring)
{
    if (atomic_load_explicit(&ring->signals, memory_order_relaxed) != ring->drained) {
        uint64_t n;
        if (read(ring->fd, &n, sizeof n) == (ssize_t)sizeof n)
            ring->drained += n;
    }
    atomic_store_explicit(&ring->armed, true, memory_order_seq_cst);
    return is_empty(ring, memory_order_seq_cst);
}

bool qv_ring_pop(qv_ring *ring, void *item)
{
    if (is_empty(ring, memory_order_acquire) && arm(ring))
        return false;
    size_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
    memcpy(item, item_at(ring, head), ring->item_size);
    atomic_store_explicit(&ring->head, head + 1, memory_order_release);
    return true;
}

bool qv_ring_wait(qv_ring *ring, int timeout_ms)
{
    uint64_t start = qv_now_ms();
    while (is_empty(ring, memory_order_acquire) && arm(ring)) {
        if (atomic_exchange_explicit(&ring->woken, false, memory_order_acquire))
            return false;
        int left = -1;
        if (timeout_ms >= 0) {
            uint64_t gone = qv_now_ms() - start;
            if (gone >= (uint64_t)timeout_ms)
                return false;
            left = timeout_ms - (int)gone;
        }
        struct pollfd poller = {.fd = ring->fd, .events = POLLIN};
        if (poll(&poller, 1, left) < 0)
            QV_ASSERT(errno == EINTR);
    }
    return true;
}

int qv_ring_fd(const qv_ring *ring)
{
    return ring->fd;
}

size_t qv_ring_capacity(const qv_ring *ring)
{
    return ring->capacity;
}

size_t qv_ring_count(const qv_ring *ring)
{
    /* head first: tail only grows, so the difference is never negative. */
    size_t head = atomic_load_explicit(&ring->head, memory_order_acquire);
    size_t count = atomic_load_explicit(&ring->tail, memory_order_acquire) - head;
    return count < ring->capacity ? count : ring->capacity;
}
