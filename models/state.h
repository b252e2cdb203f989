/* What sequences leave behind in a model: KV pages of attention layers, convolution tails and
 * recurrent states of the others. Allocated once for all sequences; which page or slot belongs to
 * whom is the engine's to know (worker/kv_cache.h, worker/state_cache.h).
 *
 * A sequence is saved and restored bit for bit. Engine thread only.
 */
#ifndef QV_MODELS_STATE_H
#define QV_MODELS_STATE_H

#include "models/model.h"
#include "models/proj.h"

typedef struct {
    qv_kv_layer kv;      /* k, v [n_pages, page_tokens, kv_heads, head_dim]; attention layers */
    qv_tensor conv;      /* [n_slots, channels, conv_kernel - 1], activation dtype */
    qv_tensor recurrent; /* F32: Gated DeltaNet [n_slots, value_heads, key_dim, value_dim], Mamba-2
                          * [n_slots, heads, head_dim, state] */
} qv_layer_state;

typedef struct {
    qv_backend *be; /* borrowed */
    int64_t n_layers;
    qv_layer_state *layers; /* [n_layers]; tensors that a layer does not have are zero */
} qv_state;

/* Bytes of one page and of one state slot over all layers. */
uint64_t qv_state_page_bytes(const qv_layout *layout, int32_t page_tokens, qv_dtype kv_dtype);
uint64_t qv_state_slot_bytes(const qv_layout *layout, qv_dtype conv_dtype);

/* Errors: NOMEM. */
qv_status qv_state_init(qv_state *state, qv_backend *be, const qv_layout *layout,
                        const qv_model_limits *limits);
void qv_state_deinit(qv_state *state);

/* Copy `n_pages` pages and one slot to host memory, and back: layer by layer, first the pages in
 * order (keys, then values of each), then the slot. Errors: DEVICE. */
qv_status qv_state_save(const qv_state *state, const int32_t *pages, int32_t n_pages, int32_t slot,
                        void *out);
qv_status qv_state_restore(const qv_state *state, const int32_t *pages, int32_t n_pages,
                           int32_t slot, const void *in);

/* Copy what slot `from` holds to slot `to`, another one, on the device. Errors: DEVICE. */
qv_status qv_state_copy_slot(const qv_state *state, int32_t from, int32_t to);

#endif
