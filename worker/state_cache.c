#include "worker/state_cache.h"

#include <stdlib.h>

struct qv_state_cache {
    int32_t n_slots, n_free;
    int32_t *free_list; /* [n_slots] a stack; the first n_free are free slots */
    bool *held;         /* [n_slots] */
    uint64_t swap_bytes, swapped;
};

qv_status qv_state_cache_new(int32_t n_slots, uint64_t swap_bytes, qv_state_cache **out)
{
    if (n_slots < 1)
        return qv_fail(QV_ERR_ARG, "a state cache of %d slots", n_slots);
    qv_state_cache *cache = calloc(1, sizeof *cache);
    if (cache != NULL) {
        cache->free_list = calloc((size_t)n_slots, sizeof *cache->free_list);
        cache->held = calloc((size_t)n_slots, sizeof *cache->held);
    }
    if (cache == NULL || cache->free_list == NULL || cache->held == NULL) {
        qv_state_cache_free(cache);
        return qv_fail(QV_ERR_NOMEM, "no memory for a table of %d state slots", n_slots);
    }
    cache->n_slots = cache->n_free = n_slots;
    cache->swap_bytes = swap_bytes;
    for (int32_t i = 0; i < n_slots; i++)
        cache->free_list[i] = n_slots - 1 - i; /* slot 0 on top */
    *out = cache;
    return QV_OK;
}

void qv_state_cache_free(qv_state_cache *cache)
{
    if (cache == NULL)
        return;
    QV_ASSERT(cache->swapped == 0);
    free(cache->free_list);
    free(cache->held);
    free(cache);
}

int32_t qv_state_cache_acquire(qv_state_cache *cache)
{
    if (cache->n_free == 0)
        return -1;
    int32_t slot = cache->free_list[--cache->n_free];
    cache->held[slot] = true;
    return slot;
}

void qv_state_cache_release(qv_state_cache *cache, int32_t slot)
{
    QV_ASSERT(slot >= 0 && slot < cache->n_slots && cache->held[slot]);
    cache->held[slot] = false;
    cache->free_list[cache->n_free++] = slot;
}

int32_t qv_state_cache_n_free(const qv_state_cache *cache)
{
    return cache->n_free;
}

int32_t qv_state_cache_n_slots(const qv_state_cache *cache)
{
    return cache->n_slots;
}

/* --- Snapshots ------------------------------------------------------------------------------- */

#define SNAPSHOT_ALIGN 64

qv_snapshot *qv_state_cache_save(qv_state_cache *cache, size_t bytes, int32_t n_tokens,
                                 int32_t n_pages)
{
    if (bytes > cache->swap_bytes - cache->swapped)
        return NULL;
    size_t header = (sizeof(qv_snapshot) + SNAPSHOT_ALIGN - 1) / SNAPSHOT_ALIGN * SNAPSHOT_ALIGN;
    size_t body = (bytes + SNAPSHOT_ALIGN - 1) / SNAPSHOT_ALIGN * SNAPSHOT_ALIGN;
    char *memory = aligned_alloc(SNAPSHOT_ALIGN, header + body);
    if (memory == NULL)
        return NULL;
    qv_snapshot *snapshot = (qv_snapshot *)memory;
    *snapshot = (qv_snapshot){.refs = 1,
                              .bytes = bytes,
                              .n_tokens = n_tokens,
                              .n_pages = n_pages,
                              .data = memory + header};
    cache->swapped += bytes;
    return snapshot;
}

qv_snapshot *qv_state_cache_share(qv_snapshot *snapshot)
{
    snapshot->refs++;
    return snapshot;
}

void qv_state_cache_drop(qv_state_cache *cache, qv_snapshot *snapshot)
{
    if (snapshot == NULL || --snapshot->refs > 0)
        return;
    QV_ASSERT(snapshot->refs == 0 && snapshot->bytes <= cache->swapped);
    cache->swapped -= snapshot->bytes;
    free(snapshot);
}

uint64_t qv_state_cache_swapped(const qv_state_cache *cache)
{
    return cache->swapped;
}
