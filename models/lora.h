/* LoRA adapters: a PEFT directory read, checked and brought into one canonical form.
 *
 * An adapter becomes a list of items: a pair (A, B) with its rank and scale for some neighbouring
 * slices of one projection of one layer, of one expert of it or all, or for the embedding. Names
 * and shapes in the file are the truth; every tensor finds its place or the load fails and names
 * it; every field of adapter_config.json that changes the result is honoured or refused. What files
 * look like is in docs/lora.md.
 *
 * Adapters are untrusted input. An open adapter is immutable and owned by whoever opened it;
 * reading may run on any thread.
 */
#ifndef QV_MODELS_LORA_H
#define QV_MODELS_LORA_H

#include "models/model.h"
#include "models/proj.h"

/* What an adapter is read for. */
typedef struct {
    const qv_layout *layout; /* must outlive the adapters */
    int32_t max_rank;        /* of the pool */
    qv_dtype dtype;          /* of the pool: BF16 or F32 */
    uint64_t max_bytes;      /* of the file; 0 = QV_ADAPTER_MAX_BYTES */
    const char *model_dir;   /* to compare copies of base weights with; NULL: they are refused */
} qv_adapter_spec;

typedef struct {
    int64_t layer;  /* QV_GLOBAL for the head and the embedding */
    bool embedding; /* of the embedding: n_in is the vocabulary, n_rows hidden, target.proj nothing
                     */
    qv_lora_target target;
    int32_t expert; /* of a projection of experts: which one; -1 = all, some matrix being shared */
    int32_t n_a, n_b; /* matrices: of all experts, as many as there are or 1 for all; else 1 */
    int32_t rank;
    float scale;
    const void *a; /* [n_a, rank, n_in] */
    const void *b; /* [n_b, n_rows, rank] */
} qv_lora_item;

/* Errors: as qv_adapter_open of models/model.h. */
qv_status qv_adapter_read(const qv_adapter_spec *spec, const char *dir, qv_adapter **out);

/* The same from memory, for fuzzing: the texts of adapter_config.json and
 * adapter_model.safetensors. */
qv_status qv_adapter_read_memory(const qv_adapter_spec *spec, const void *config,
                                 size_t config_size, const void *tensors, size_t tensors_size,
                                 qv_adapter **out);

/* Items in the order of layers (head and embedding first), projections, slices and experts. */
size_t qv_adapter_n_items(const qv_adapter *adapter);
const qv_lora_item *qv_adapter_item(const qv_adapter *adapter, size_t i);

/* What was skipped or ignored, one sentence a line; "" when nothing was. */
const char *qv_adapter_notes(const qv_adapter *adapter);

#endif
