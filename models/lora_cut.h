/* A rank's part of an adapter: A and B cut as the projection tables cut the weights. A split by
 * output takes rows of B, a split by input columns of A; what an adapter adds is then a partial sum
 * like what the weights give, and joins the same all-reduce. Whole experts go where theirs are. Any
 * thread.
 */
#ifndef QV_MODELS_LORA_CUT_H
#define QV_MODELS_LORA_CUT_H

#include "models/lora.h"

/* `whole` was read against layout `from`, of a single rank; `to` is the layout of a rank of the
 * same config. Matrices that need no cut are borrowed from `whole`, which must outlive the result.
 * The caller closes it with qv_adapter_close. Errors: NOMEM. */
qv_status qv_adapter_cut(const qv_adapter *whole, const qv_layout *from, const qv_layout *to,
                         qv_dtype dtype, qv_adapter **out);

#endif
