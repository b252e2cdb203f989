/* Shared by the files of blocks: views of buffers and probes. */
#ifndef QV_MODELS_BLOCKS_INTERNAL_H
#define QV_MODELS_BLOCKS_INTERNAL_H

#include "models/blocks.h"

/* The matrix of a projection that no adapter of the batch is on, and in *x what of it it reads;
 * NULL: there may be adapters. */
const qv_weight *qv_pass_plain(const qv_pass *pass, int64_t layer, qv_proj proj, qv_tensor *x);

/* A buffer seen as this step's [T, n]. */
static inline qv_tensor view(const qv_pass *pass, qv_buffer buffer, int64_t n)
{
    return qv_tensor_2d(pass->buffers->data[buffer], qv_backend_activation_dtype(pass->be),
                        pass->batch->n_tokens, n);
}

/* The same of the stream, which is F32 on every backend. */
static inline qv_tensor stream_view(const qv_pass *pass, qv_buffer buffer)
{
    return qv_tensor_2d(pass->buffers->data[buffer], QV_F32, pass->batch->n_tokens,
                        pass->config->hidden);
}

static inline void probe(const qv_pass *pass, int64_t layer, const char *name, qv_tensor value)
{
    if (pass->probe != NULL)
        pass->probe(layer, name, &value, pass->probe_user);
}

#endif
