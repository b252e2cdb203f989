/* Names of tensors in adapters: what part of a pair a tensor is, and of which matrix of the model.
 * Used by the reader of adapters alone; pure functions. */
#ifndef QV_MODELS_LORA_KEYS_H
#define QV_MODELS_LORA_KEYS_H

#include "models/proj.h"

typedef enum {
    QV_KEY_A,
    QV_KEY_B,
    QV_KEY_EMBEDDING_A, /* spelling of the embedding's and the head's pairs */
    QV_KEY_EMBEDDING_B,
    QV_KEY_BASE_COPY, /* a base weight saved beside a pair */
    QV_KEY_REFUSED,
    QV_KEY_UNKNOWN
} qv_lora_key_kind;

/* A tensor's name taken apart: what it is, and of which module (PEFT's name of it). */
typedef struct {
    qv_lora_key_kind kind;
    const char *module; /* `size` bytes within the name */
    size_t size;
    const char *reason; /* of QV_KEY_REFUSED */
} qv_lora_key;

qv_lora_key qv_lora_key_parse(const char *name);

typedef enum {
    QV_PLACE_LINEAR,  /* a matrix that adapters may target */
    QV_PLACE_EXPERT,  /* a matrix of one expert, or of all of them */
    QV_PLACE_WRAPPER, /* a wrapper around all experts: of which matrix, shapes and config say */
    QV_PLACE_EMBEDDING,
    QV_PLACE_NOT_SERVED, /* image and multi-token prediction parts, which Quiver does not run */
    QV_PLACE_NONE
} qv_lora_place_kind;

#define QV_ALL_EXPERTS (-1)

typedef struct {
    qv_lora_place_kind kind;
    int64_t layer; /* QV_GLOBAL for the head and the embedding */
    qv_lora_target target;
    int32_t expert;     /* of QV_PLACE_EXPERT: its number, or QV_ALL_EXPERTS */
    bool inner;         /* of QV_PLACE_WRAPPER: the wrapper below another ("base_layer") */
    const char *reason; /* of QV_PLACE_NONE */
} qv_lora_place;

/* Where a module of any spelling is in the model. */
qv_lora_place qv_lora_place_find(const qv_layout *layout, const char *module, size_t size);

#endif
