/* The adapter slots of a model: A and B of every projection for every slot, allocated once; pairs
 * of experts and of the embedding in memory that a slot gets when it needs it
 * (models/lora_parts.h).
 *
 * The layout is that of qv_lora_site (ops/ops.h) and docs/lora.md: planes spaced by the pool's
 * rank, zero above a loaded rank and where an adapter has no pair. Install and clear may run on any
 * thread beside a step, provided that no step in flight or to come names the slot until they have
 * returned: every entry they write belongs to that slot alone. How the engine learns that a slot is
 * ready is what orders those writes before its next step (a queue or a lock:
 * worker/adapter_cache.h).
 */
#ifndef QV_MODELS_LORA_POOL_H
#define QV_MODELS_LORA_POOL_H

#include "models/lora.h"
#include "models/lora_parts.h"
#include "models/proj.h"
#include "ops/ops.h"

typedef struct qv_lora_pool qv_lora_pool;

/* Bytes of one slot over all layers, without what it gets on demand. */
uint64_t qv_lora_slot_bytes(const qv_layout *layout, int32_t max_rank, qv_dtype dtype);

/* `layout` must outlive the pool. All slots are empty. `max_parts` bounds the memory that all slots
 * together get on demand. Errors: NOMEM. */
qv_status qv_lora_pool_new(qv_backend *be, const qv_layout *layout, int32_t n_slots,
                           int32_t max_rank, uint64_t max_parts, qv_lora_pool **out);
void qv_lora_pool_free(qv_lora_pool *pool);

/* The site of a layer's projection (QV_GLOBAL for the head); NULL where there is none. */
const qv_lora_site *qv_lora_pool_site(const qv_lora_pool *pool, int64_t layer, qv_proj proj);

/* Pairs of experts and of the embedding: their sites, and their bytes. */
const qv_lora_parts *qv_lora_pool_parts(const qv_lora_pool *pool);

/* Write an adapter into a slot, whatever was there; or zero the slot. Errors: DEVICE, NOMEM, LIMIT
 * (beyond max_parts); the slot is then empty. */
qv_status qv_lora_pool_install(qv_lora_pool *pool, int32_t slot, const qv_adapter *adapter);
qv_status qv_lora_pool_clear(qv_lora_pool *pool, int32_t slot);

/* Made-up adapters of `rank` in every slot, on every projection of layers that slots have room for
 * but the router: for benchmarks. Errors: LIMIT (rank), DEVICE. */
qv_status qv_lora_pool_make_up(qv_lora_pool *pool, int32_t rank);

#endif
