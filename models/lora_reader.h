/* Shared by the files that read an adapter: lora.c reads it as a whole, lora_pairs.c gathers pairs,
 * lora_experts.c finds out what wrapped experts stand for, lora_items.c turns pairs into items. */
#ifndef QV_MODELS_LORA_READER_H
#define QV_MODELS_LORA_READER_H

#include "common/arena.h"
#include "common/map.h"
#include "models/lora.h"
#include "models/lora_config.h"
#include "models/lora_keys.h"
#include "models/lora_view.h"

#include <stdio.h>

struct qv_adapter {
    qv_arena arena; /* items and their matrices */
    qv_lora_item *items;
    size_t n_items;
    int32_t max_rank;
    uint64_t bytes;
    char digest[33];
    char *notes;
};

/* The two tensors of a pair, and what they say once they have been measured: A is n_a matrices
 * [rank, n_in], B is n_b matrices [n_rows, rank]. */
typedef struct {
    qv_lora_place place;
    const qv_stored_tensor *a, *b;
    qv_lora_view a_view, b_view;
    int32_t rank;
    float scale;
} qv_lora_pair;

typedef struct {
    const qv_adapter_spec *spec;
    const char *where;        /* the adapter, for messages */
    const char *config_where; /* its adapter_config.json */
    qv_lora_config config;
    const qv_safetensors *st;
    qv_safetensors *base; /* the model's own tensors, opened when a copy must be compared */
    FILE *notes;
    qv_map *by_key;       /* what identifies a pair to the pair, owned by the arena below */
    qv_lora_pair **pairs; /* the same, then sorted */
    size_t n_pairs;
    char misfits[512]; /* the first tensors that have no place, and why */
    size_t n_misfits, n_empty, n_not_served;
    qv_adapter *adapter;
} qv_lora_reader;

/* Sort every tensor of the file into its pair, and the pairs in order. Errors: FORMAT, SHAPE,
 * UNSUPPORTED. */
qv_status qv_lora_gather_pairs(qv_lora_reader *r);

/* Turn pairs of wrappers into pairs of a matrix of all experts: places, views. Errors: FORMAT,
 * SHAPE. */
qv_status qv_lora_resolve_wrappers(qv_lora_reader *r);

/* Check the shapes of every pair, find its rank and scale. Errors: SHAPE, FORMAT, UNSUPPORTED,
 * LIMIT.
 */
qv_status qv_lora_measure_pairs(qv_lora_reader *r);

/* With ensure_weight_tying, a measured pair of the embedding or the head of a model in which they
 * are one matrix becomes two. Errors: FORMAT (there are two, and they differ), NOMEM. */
qv_status qv_lora_tie_vocabulary(qv_lora_reader *r);

/* Read the numbers of all measured pairs, in order, into the adapter's items; its digest. Errors:
 * FORMAT (a number that is not finite), NOMEM. */
qv_status qv_lora_read_items(qv_lora_reader *r);

/* F32, BF16 or F16, of n_dims dimensions. `shape` says what the model makes it. Errors:
 * UNSUPPORTED, SHAPE. */
qv_status qv_lora_check_dims(const qv_lora_reader *r, const qv_stored_tensor *tensor, int n_dims,
                             const char *shape);

#endif
