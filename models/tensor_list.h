/* What a checkpoint holds, from the tables of models/proj.h alone: every tensor of the text model,
 * by name and shape. Counts of parameters and tensors, and listings, are made from it.
 */
#ifndef QV_MODELS_TENSOR_LIST_H
#define QV_MODELS_TENSOR_LIST_H

#include "models/proj.h"

/* `name` is valid during the call. */
typedef void qv_tensor_list_fn(const char *name, int32_t n_dims, const int64_t *shape, void *user);

/* Call `fn` with each tensor that `layer` has (-1: the global ones; a tied head has none), names
 * below `prefix` ("model." and so on), in the order of the tables; with `fused_experts`, one tensor
 * holds all experts of a layer, otherwise each expert's matrices come one by one. */
void qv_layout_list(const qv_layout *layout, const char *prefix, int64_t layer, bool fused_experts,
                    qv_tensor_list_fn *fn, void *user);

#endif
