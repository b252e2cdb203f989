/* An item that moves is compared along one path only: up, or down. */
#include "broker/heap.h"

#include <stdlib.h>

static uint32_t *place_of(const qv_heap *heap, void *item)
{
    return (uint32_t *)(void *)((char *)item + heap->place);
}

static void put(qv_heap *heap, uint32_t i, void *item)
{
    heap->items[i] = item;
    *place_of(heap, item) = i;
}

static void sift_up(qv_heap *heap, uint32_t i, void *item)
{
    while (i > 0) {
        uint32_t parent = (i - 1) / 2;
        if (!heap->before(item, heap->items[parent]))
            break;
        put(heap, i, heap->items[parent]);
        i = parent;
    }
    put(heap, i, item);
}

static void sift_down(qv_heap *heap, uint32_t i, void *item)
{
    for (;;) {
        uint32_t child = 2 * i + 1;
        if (child >= heap->n)
            break;
        if (child + 1 < heap->n && heap->before(heap->items[child + 1], heap->items[child]))
            child++;
        if (!heap->before(heap->items[child], item))
            break;
        put(heap, i, heap->items[child]);
        i = child;
    }
    put(heap, i, item);
}

void qv_heap_init(qv_heap *heap, size_t place, bool (*before)(const void *a, const void *b))
{
    *heap = (qv_heap){.place = place, .before = before};
}

void qv_heap_deinit(qv_heap *heap)
{
    free(heap->items);
    heap->items = NULL;
    heap->n = heap->capacity = 0;
}

qv_status qv_heap_reserve(qv_heap *heap, uint32_t n)
{
    uint32_t capacity = heap->capacity ? heap->capacity : 4;
    if (n <= heap->capacity)
        return QV_OK;
    while (capacity < n)
        capacity *= 2;
    void **items = realloc(heap->items, capacity * sizeof *items);
    if (items == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a heap of %u items", capacity);
    heap->items = items;
    heap->capacity = capacity;
    return QV_OK;
}

qv_status qv_heap_push(qv_heap *heap, void *item)
{
    QV_ASSERT(*place_of(heap, item) == QV_HEAP_NONE);
    QV_TRY(qv_heap_reserve(heap, heap->n + 1));
    sift_up(heap, heap->n++, item);
    return QV_OK;
}

void qv_heap_remove(qv_heap *heap, void *item)
{
    uint32_t i = *place_of(heap, item);
    if (i == QV_HEAP_NONE)
        return;
    QV_ASSERT(i < heap->n && heap->items[i] == item);
    *place_of(heap, item) = QV_HEAP_NONE;
    void *last = heap->items[--heap->n];
    if (last == item)
        return;
    if (i > 0 && heap->before(last, heap->items[(i - 1) / 2]))
        sift_up(heap, i, last);
    else
        sift_down(heap, i, last);
}
