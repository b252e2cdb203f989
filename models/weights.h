/* The weights of a model on a backend, loaded from a checkpoint through the tables of
 * models/proj.h.
 *
 * The model owns them; they are constant once loaded, so any thread may read them.
 */
#ifndef QV_MODELS_WEIGHTS_H
#define QV_MODELS_WEIGHTS_H

#include "models/model.h"
#include "models/proj.h"
#include "models/safetensors.h"

/* Stands for the global part (embedding, final norm, head) where a layer is asked for. */
#define QV_GLOBAL (-1)

typedef struct {
    qv_weight *proj[QV_PROJ_COUNT]; /* [n_out, n_in] of the layout; NULL where the layer has none */
    qv_tensor vec[QV_VEC_COUNT]; /* [rows] or [rows, row_elems], F32, the embedding as stored; that
                                  * of a tied head may be the head's memory */
} qv_layer_weights;

typedef struct {
    qv_backend *be; /* borrowed */
    int64_t n_layers;
    qv_layer_weights *layers; /* [n_layers] */
    qv_layer_weights global;
} qv_weights;

static inline const qv_layer_weights *qv_weights_layer(const qv_weights *weights, int64_t layer)
{
    return layer < 0 ? &weights->global : &weights->layers[layer];
}

/* Bytes on the backend of all weights of a layout, matrices stored as the config says. A tied head
 * and the embedding are one memory where the backend keeps rows (qv_backend_keeps_rows). */
uint64_t qv_weights_bytes(const qv_layout *layout, const qv_backend *be);

/* Check the names, dtypes and shapes of a checkpoint against the layout: one message names the
 * first tensors that are missing, wrong or unexpected. Errors: FORMAT, SHAPE, UNSUPPORTED. */
qv_status qv_weights_check(const qv_layout *layout, const qv_safetensors *st);

/* Check, then load everything, with the help of as many threads as there are processors. A number
 * that is not finite stops the load. `progress` may be NULL; it is called on the calling thread.
 * Errors: as qv_weights_check; NOMEM, DEVICE. */
qv_status qv_weights_load(qv_weights *weights, qv_backend *be, const qv_layout *layout,
                          const qv_safetensors *st, qv_progress_fn *progress, void *user);

/* Make everything up instead, with the sizes of trained weights. Errors: NOMEM, DEVICE. */
qv_status qv_weights_make_up(qv_weights *weights, qv_backend *be, const qv_layout *layout);

/* Free everything; fine on a zeroed struct and after a failed load. */
void qv_weights_deinit(qv_weights *weights);

#endif
