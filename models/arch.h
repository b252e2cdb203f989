/* Architectures: what Quiver knows about a model family, in one static record each.
 *
 * To add a model: a file with a config reader, tables and a forward pass, and one line in arch.c.
 */
#ifndef QV_MODELS_ARCH_H
#define QV_MODELS_ARCH_H

#include "models/proj.h"

#include <jansson.h>

typedef struct qv_pass qv_pass;

struct qv_arch {
    const char *name;
    const char *const *model_types; /* of config.json; NULL ends the list */
    const char *const *prefixes;    /* of tensor names, tried in this order; NULL ends the list */
    const char *const *skip;        /* beginnings of tensor names that are not loaded; NULL ends */
    bool norm_plus_one;             /* norms scale by 1 + w, not by w (gated norms: by w) */
    bool fused_experts;             /* released checkpoints hold all experts in one tensor */

    /* Fill the dimensions, layer_parts and rope fields from the text part of config.json (`text`);
     * `root` is the whole of it. `where` goes into errors. */
    qv_status (*read_config)(const json_t *text, const json_t *root, const char *where,
                             qv_model_config *out);

    const qv_proj_row *projs;
    size_t n_projs;
    const qv_vec_row *vecs;
    size_t n_vecs;
    const qv_lora_alias *aliases;
    size_t n_aliases;

    /* Run the layers of one step: pass->batch in, logits out (models/blocks.h). */
    qv_status (*forward)(qv_pass *pass);
};

/* The architecture of a config.json's model_type. Errors: UNSUPPORTED (names those there are). */
qv_status qv_arch_find(const char *model_type, const char *where, const qv_arch **out);

/* All architectures, for listings. */
const qv_arch *const *qv_arch_list(size_t *n);

extern const qv_arch qv_arch_qwen3_5;
extern const qv_arch qv_arch_nemotron3;

#endif
