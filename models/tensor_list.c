#include "models/tensor_list.h"

#define NAME_MAX_SIZE 256

typedef struct {
    const qv_layout *layout;
    const char *prefix;
    int64_t layer;
    bool fused_experts;
    qv_tensor_list_fn *fn;
    void *user;
} list;

/* The matrices of all experts for one slice; a fused tensor belongs to the first slice in it. */
static void list_experts(const list *l, const qv_proj_slice *slice)
{
    char name[NAME_MAX_SIZE];
    int64_t n_experts = l->layout->config->n_experts;
    if (l->fused_experts && slice->fused_row > 0)
        return;
    if (l->fused_experts) {
        qv_expert_name(name, sizeof name, l->prefix, l->layer, slice->row, -1);
        l->fn(name, 3, (int64_t[]){n_experts, slice->fused_rows, slice->module_cols}, l->user);
        return;
    }
    for (int64_t e = 0; e < n_experts; e++) {
        qv_expert_name(name, sizeof name, l->prefix, l->layer, slice->row, e);
        l->fn(name, 2, (int64_t[]){slice->module_rows, slice->module_cols}, l->user);
    }
}

static void list_proj(const list *l, qv_proj proj)
{
    const qv_proj_shape *shape = &l->layout->proj[proj];
    char name[NAME_MAX_SIZE];
    if (proj == QV_PROJ_LM_HEAD && l->layout->config->tied_head)
        return;
    for (int32_t i = 0; i < shape->n_slices; i++) {
        const qv_proj_slice *slice = &shape->slices[i];
        if (slice->plane != i) /* the tensor of an earlier slice */
            continue;
        if (shape->experts) {
            list_experts(l, slice);
            continue;
        }
        qv_tensor_name(name, sizeof name, slice->row->root ? "" : l->prefix, l->layer,
                       slice->row->module, ".weight");
        l->fn(name, 2, (int64_t[]){slice->module_rows, slice->module_cols}, l->user);
    }
}

void qv_layout_list(const qv_layout *layout, const char *prefix, int64_t layer, bool fused_experts,
                    qv_tensor_list_fn *fn, void *user)
{
    const list l = {layout, prefix, layer, fused_experts, fn, user};
    uint32_t parts = layer < 0 ? QV_PART_GLOBAL : layout->config->layer_parts[layer];
    char name[NAME_MAX_SIZE];
    for (int v = 0; v < QV_VEC_COUNT; v++) {
        const qv_vec_shape *shape = &layout->vec[v];
        if (shape->n_slices == 0 || (parts & shape->part) == 0)
            continue;
        qv_tensor_name(name, sizeof name, prefix, layer, shape->tensor, "");
        fn(name, shape->n_dims, shape->shape, user);
    }
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        if (qv_layout_has(layout, layer, (qv_proj)p))
            list_proj(&l, (qv_proj)p);
    }
}
