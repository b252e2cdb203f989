/* Slots of recurrent state, and saved states of preempted sequences.
 *
 * A running sequence holds one slot: its place in every layer's convolution and recurrent state
 * tensors, which are the model's. A preempted sequence gives its slot and pages back; what they
 * held is saved in a snapshot on the host while the swap budget lasts, else it is computed again.
 * Snapshots are the only memory that a step allocates.
 * Pure accounting apart from the snapshots' memory. Engine thread.
 */
#ifndef QV_WORKER_STATE_CACHE_H
#define QV_WORKER_STATE_CACHE_H

#include "common/status.h"

#include <stddef.h>
#include <stdint.h>

typedef struct qv_state_cache qv_state_cache;

/* The saved state of a sequence: n_tokens computed tokens in n_pages pages and a slot. Sequences of
 * one request that begin with the same tokens may share it. */
typedef struct qv_snapshot {
    int32_t refs; /* sequences that hold it */
    size_t bytes;
    int32_t n_tokens, n_pages;
    void *data; /* [bytes], 64-byte aligned */
} qv_snapshot;

/* `swap_bytes` bounds what all snapshots hold at once. Errors: ARG, NOMEM. */
qv_status qv_state_cache_new(int32_t n_slots, uint64_t swap_bytes, qv_state_cache **out);

/* free(NULL) is fine. Every snapshot has been dropped. */
void qv_state_cache_free(qv_state_cache *cache);

/* A free slot, now held; -1 if there is none. */
int32_t qv_state_cache_acquire(qv_state_cache *cache);
void qv_state_cache_release(qv_state_cache *cache, int32_t slot);

int32_t qv_state_cache_n_free(const qv_state_cache *cache);
int32_t qv_state_cache_n_slots(const qv_state_cache *cache);

/* A snapshot with room for `bytes`, held once; NULL when the budget or the memory does not suffice.
 */
qv_snapshot *qv_state_cache_save(qv_state_cache *cache, size_t bytes, int32_t n_tokens,
                                 int32_t n_pages);

/* Hold a snapshot once more. */
qv_snapshot *qv_state_cache_share(qv_snapshot *snapshot);

/* Give up one hold; the last one frees the memory. drop(NULL) is fine. */
void qv_state_cache_drop(qv_state_cache *cache, qv_snapshot *snapshot);

/* Bytes held by snapshots now. */
uint64_t qv_state_cache_swapped(const qv_state_cache *cache);

#endif
