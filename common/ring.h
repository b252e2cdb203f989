/* Ring: a bounded queue from one producer thread to one consumer thread, with an eventfd that wakes
 * the consumer.
 *
 * Items are copied by value; an item that is a pointer hands its ownership over with it. Neither
 * side takes a lock, and a push makes a system call only when the consumer may be asleep.
 *
 * A consumer with a poll loop pops until the ring is empty, and then polls qv_ring_fd for reading:
 * the pop that finds the ring empty also clears the eventfd and asks the producer for the next
 * wake-up. A consumer that does nothing else blocks in qv_ring_wait.
 */
#ifndef QV_COMMON_RING_H
#define QV_COMMON_RING_H

#include "common/status.h"

#include <stddef.h>

typedef struct qv_ring qv_ring;

/* A ring of at least `capacity` items (rounded up to a power of two) of `item_size` bytes.
 * Errors: ARG, NOMEM, IO (no eventfd). */
qv_status qv_ring_new(size_t capacity, size_t item_size, qv_ring **out);

/* free(NULL) is fine. Both threads are done with it; items left are dropped, so pop first what they
 * own. */
void qv_ring_free(qv_ring *ring);

/* Copy an item in; false when the ring is full. Producer thread. Everything the producer wrote
 * before is visible to the consumer once it has popped the item. */
bool qv_ring_push(qv_ring *ring, const void *item);

/* Copy the oldest item out; false when the ring is empty. Consumer thread. */
bool qv_ring_pop(qv_ring *ring, void *item);

/* Wait until there is an item to pop: true. False after `timeout_ms` (negative: no limit) or when
 * qv_ring_wake was called. Consumer thread. */
bool qv_ring_wait(qv_ring *ring, int timeout_ms);

/* Make a consumer that waits or polls come back, items or not (to stop it). Any thread. */
void qv_ring_wake(qv_ring *ring);

/* Readable when the consumer should pop. Owned by the ring; consumer thread; only for polling. */
int qv_ring_fd(const qv_ring *ring);

/* Items the ring can hold, and about how many it holds (exact on the side that does not race). Any
 * thread. */
size_t qv_ring_capacity(const qv_ring *ring);
size_t qv_ring_count(const qv_ring *ring);

#endif
