/* The parts of adapters that are not worth room in every slot: pairs of routed experts, which are
 * many, and of the embedding, whose A has a row for each token of the vocabulary.
 *
 * A slot has one block of memory for them, allocated when an adapter that has any is installed and
 * freed when the slot is cleared. Its size follows the adapter: planes are spaced by the largest
 * rank of their projection, matrices that all experts share are stored once, projections without a
 * pair take nothing. The layouts are those of qv_moe_lora_site and qv_embed_lora_site (ops/ops.h).
 * All blocks together stay within a bound. Threads: as the pool's (models/lora_pool.h).
 */
#ifndef QV_MODELS_LORA_PARTS_H
#define QV_MODELS_LORA_PARTS_H

#include "models/lora.h"
#include "ops/ops.h"

typedef struct qv_lora_parts qv_lora_parts;

/* Bytes of an adapter with a pair of `rank` on every matrix of every expert, none shared, and on
 * the embedding: the most that one can take. */
uint64_t qv_lora_parts_most(const qv_layout *layout, int32_t rank, qv_dtype dtype);

/* Bytes that an adapter takes; 0 if it has no such pairs. */
uint64_t qv_lora_parts_bytes(const qv_layout *layout, const qv_adapter *adapter, qv_dtype dtype);

/* `max_bytes` bounds all blocks together. Errors: NOMEM. */
qv_status qv_lora_parts_new(qv_backend *be, const qv_layout *layout, int32_t n_slots,
                            int32_t max_rank, uint64_t max_bytes, qv_lora_parts **out);
void qv_lora_parts_free(qv_lora_parts *parts);

/* NULL where there is none. */
const qv_moe_lora_site *qv_lora_parts_experts(const qv_lora_parts *parts, int64_t layer,
                                              qv_proj proj);
const qv_embed_lora_site *qv_lora_parts_embedding(const qv_lora_parts *parts);

/* Fill a clear slot: memory for it, then what goes there, as pieces of an upload. Errors: LIMIT
 * (the bound), NOMEM, DEVICE; the slot is then to be cleared. */
qv_status qv_lora_parts_reserve(qv_lora_parts *parts, int32_t slot, const qv_adapter *adapter);
qv_status qv_lora_parts_install(qv_lora_parts *parts, qv_upload *up, int32_t slot,
                                const qv_adapter *adapter);
/* Clear a slot: its entries, as pieces of an upload, and when that has ended its memory. */
qv_status qv_lora_parts_leave(qv_lora_parts *parts, qv_upload *up, int32_t slot);
void qv_lora_parts_free_block(qv_lora_parts *parts, int32_t slot);

/* Whether an adapter fits an empty pool. Any thread. Errors: LIMIT. */
qv_status qv_lora_parts_check(const qv_lora_parts *parts, const qv_adapter *adapter);

/* Bytes of all blocks now. Any thread. */
uint64_t qv_lora_parts_used(const qv_lora_parts *parts);

#endif
