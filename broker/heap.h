/* Heap: an intrusive binary heap of pointers, the first item on top. Each item keeps its own place,
 * so that it can leave from anywhere in O(log n). The heap owns its array, not the items. One
 * thread at a time.
 */
#ifndef QV_BROKER_HEAP_H
#define QV_BROKER_HEAP_H

#include "common/status.h"

#include <stdint.h>

#define QV_HEAP_NONE UINT32_MAX /* place of an item that is in no heap */

typedef struct {
    void **items; /* [n], owned */
    uint32_t n, capacity;
    size_t place;                                 /* offset of the item's uint32_t place */
    bool (*before)(const void *a, const void *b); /* strict order */
} qv_heap;

/* `place` is the offset of a uint32_t in the item, which holds QV_HEAP_NONE outside of heaps. */
void qv_heap_init(qv_heap *heap, size_t place, bool (*before)(const void *a, const void *b));
void qv_heap_deinit(qv_heap *heap);

/* The first item, or NULL. */
static inline void *qv_heap_top(const qv_heap *heap)
{
    return heap->n > 0 ? heap->items[0] : NULL;
}

/* Make room for n items in all, so that no push up to there can fail. Errors: NOMEM. */
qv_status qv_heap_reserve(qv_heap *heap, uint32_t n);

/* Add an item that is in no heap. Errors: NOMEM. */
qv_status qv_heap_push(qv_heap *heap, void *item);

/* Take an item out; one that is in no heap stays so. */
void qv_heap_remove(qv_heap *heap, void *item);

#endif
