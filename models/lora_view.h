/* Matrices inside stored tensors: adapters keep them one after the other, transposed, or with the
 * numbers of all experts side by side. Used by the reader of adapters alone; pure functions. */
#ifndef QV_MODELS_LORA_VIEW_H
#define QV_MODELS_LORA_VIEW_H

#include "models/safetensors.h"

/* `n` matrices [rows, cols] that are all of a tensor, each number once: element (m, i, j) stands at
 * m * stride[0] + i * stride[1] + j * stride[2]. */
typedef struct {
    const qv_stored_tensor *tensor; /* borrowed */
    int64_t n, rows, cols;
    int64_t stride[3];
} qv_lora_view;

/* n matrices [rows, cols], one after the other. */
static inline qv_lora_view qv_lora_view_plain(const qv_stored_tensor *tensor, int64_t n,
                                              int64_t rows, int64_t cols)
{
    return (qv_lora_view){
        .tensor = tensor, .n = n, .rows = rows, .cols = cols, .stride = {rows * cols, cols, 1}};
}

/* Each matrix transposed. */
static inline qv_lora_view qv_lora_view_transpose(qv_lora_view v)
{
    return (qv_lora_view){.tensor = v.tensor,
                          .n = v.n,
                          .rows = v.cols,
                          .cols = v.rows,
                          .stride = {v.stride[0], v.stride[2], v.stride[1]}};
}

/* Whether the matrices stand one after the other, row by row. */
static inline bool qv_lora_view_is_plain(const qv_lora_view *v)
{
    return (v->stride[2] == 1 || v->cols == 1) && (v->stride[1] == v->cols || v->rows == 1) &&
           (v->stride[0] == v->rows * v->cols || v->n == 1);
}

/* All matrices as float32, one after the other, row by row: `out` holds n * rows * cols numbers.
 * Errors: NOMEM, UNSUPPORTED (not a float dtype). */
qv_status qv_lora_view_f32(const qv_lora_view *v, float *out);

#endif
