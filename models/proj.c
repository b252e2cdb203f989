#include "models/proj.h"

#include "models/arch.h"
#include "models/tensor_list.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* --- Names and sizes -------------------------------------------------------------------------- */

int64_t qv_dim_size(const qv_model_config *c, qv_dim dim)
{
    switch (dim) {
    case QV_DIM_NONE:
        return 0;
#define QV_DIM_VALUE(name, text, value)                                                            \
    case QV_DIM_##name:                                                                            \
        return value;
        QV_DIM_LIST(QV_DIM_VALUE)
#undef QV_DIM_VALUE
    }
    return 0;
}

const char *qv_dim_text(qv_dim dim)
{
    static const char *const texts[] = {"",
#define QV_DIM_TEXT(name, text, value) text,
                                        QV_DIM_LIST(QV_DIM_TEXT)
#undef QV_DIM_TEXT
    };
    return texts[dim];
}

const char *qv_proj_name(qv_proj proj)
{
    static const char *const names[] = {
#define QV_PROJ_TEXT(name) #name,
        QV_PROJ_LIST(QV_PROJ_TEXT)
#undef QV_PROJ_TEXT
    };
    return names[proj];
}

const char *qv_vec_name(qv_vec vec)
{
    static const char *const names[] = {
#define QV_VEC_TEXT(name) #name,
        QV_VEC_LIST(QV_VEC_TEXT)
#undef QV_VEC_TEXT
    };
    return names[vec];
}

const char *qv_tensor_name(char *buf, size_t size, const char *prefix, int64_t layer,
                           const char *name, const char *suffix)
{
    if (layer < 0)
        snprintf(buf, size, "%s%s%s", prefix, name, suffix);
    else
        snprintf(buf, size, "%slayers.%" PRId64 ".%s%s", prefix, layer, name, suffix);
    return buf;
}

const char *qv_expert_name(char *buf, size_t size, const char *prefix, int64_t layer,
                           const qv_proj_row *row, int64_t expert)
{
    char name[128];
    if (expert < 0) {
        snprintf(name, sizeof name, "%s.%s", row->experts, row->fused);
        return qv_tensor_name(buf, size, prefix, layer, name, "");
    }
    snprintf(name, sizeof name, "%s.%" PRId64 ".%s", row->experts, expert, row->module);
    return qv_tensor_name(buf, size, prefix, layer, name, ".weight");
}

/* --- This rank's piece ------------------------------------------------------------------------ */

/* One rank of those that share something out. */
typedef struct {
    int64_t rank, n_ranks;
} share;

static share all_ranks(const qv_layout *layout)
{
    return (share){layout->shard.rank, layout->shard.n_ranks};
}

/* The ranks that split the inside of an expert. */
static share expert_ranks(const qv_layout *layout)
{
    int32_t n = layout->shard.n_ranks / layout->shard.expert_groups;
    return (share){layout->shard.rank % n, n};
}

/* The range of [0, total) that belongs to a rank, in whole units. */
static qv_status cut(const qv_layout *layout, share s, const char *name, int64_t total,
                     qv_dim unit_dim, bool replicate, int64_t *start, int64_t *n)
{
    int64_t unit = qv_dim_size(layout->config, unit_dim);
    QV_ASSERT(unit > 0 && total % unit == 0);
    int64_t units = total / unit;
    if (units % s.n_ranks == 0) {
        *n = total / s.n_ranks;
        *start = s.rank * *n;
    } else if (replicate && s.n_ranks % units == 0) {
        *n = unit;
        *start = s.rank / (s.n_ranks / units) * unit;
    } else {
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: %" PRId64 " units (%s) cannot be shared out among %" PRId64 " ranks",
                       name, units, qv_dim_text(unit_dim), s.n_ranks);
    }
    return QV_OK;
}

/* Columns of a ROW slice. Ranks that share a unit take equal parts of it. */
static qv_status cut_columns(const qv_layout *layout, share s, const qv_proj_row *row,
                             qv_proj_slice *slice, qv_proj_shape *shape)
{
    int64_t start, n, in = slice->module_cols;
    QV_TRY(cut(layout, s, row->module, in, row->unit, row->replicate, &start, &n));
    int64_t own = in / s.n_ranks; /* less than a unit when it is shared */
    if (in % s.n_ranks != 0)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: %" PRId64 " columns cannot be shared out among %" PRId64 " ranks",
                       row->module, in, s.n_ranks);
    slice->n_cols = own;
    slice->src_col = s.rank * own;
    shape->x_col = slice->src_col - start;
    shape->x_cols = n;
    return QV_OK;
}

/* --- Projections ------------------------------------------------------------------------------ */

/* Append the slice of `row` to its projection. */
static qv_status add_proj_row(qv_layout *layout, const qv_proj_row *row)
{
    qv_proj_shape *shape = &layout->proj[row->proj];
    QV_ASSERT(shape->n_slices < QV_MAX_SLICES);
    int32_t index = shape->n_slices++;
    qv_proj_slice *slice = &shape->slices[index];
    int64_t out = qv_dim_size(layout->config, row->out), in = qv_dim_size(layout->config, row->in);
    *slice =
        (qv_proj_slice){.row = row, .n_rows = out, .n_cols = in, .module_cols = in, .plane = index};
    shape->x_cols = in;

    share s = row->experts != NULL ? expert_ranks(layout) : all_ranks(layout);
    if (row->split == QV_SPLIT_COLUMN)
        QV_TRY(cut(layout, s, row->module, out, row->unit, row->replicate, &slice->src_row,
                   &slice->n_rows));
    else if (row->split == QV_SPLIT_ROW)
        QV_TRY(cut_columns(layout, s, row, slice, shape));
    slice->part_row = slice->src_row;

    /* A module's slices stand next to each other, in the order of the checkpoint's rows. */
    int64_t module_rows = out;
    if (index > 0 && strcmp(row->module, shape->slices[index - 1].row->module) == 0) {
        slice->plane = shape->slices[index - 1].plane;
        module_rows += shape->slices[index - 1].module_rows;
        slice->src_row += module_rows - out;
    }
    for (int32_t i = slice->plane; i <= index; i++)
        shape->slices[i].module_rows = module_rows;

    /* In a fused tensor of experts, modules stand one after the other. */
    int64_t fused_rows = slice->module_rows;
    if (index > 0 && row->fused != NULL &&
        strcmp(row->fused, shape->slices[index - 1].row->fused) == 0) {
        slice->fused_row = shape->slices[index - 1].fused_rows;
        fused_rows += slice->fused_row;
    }
    for (int32_t i = 0; i <= index && row->fused != NULL; i++) {
        if (strcmp(row->fused, shape->slices[i].row->fused) == 0)
            shape->slices[i].fused_rows = fused_rows;
    }

    QV_ASSERT(index == 0 || (shape->n_in == slice->n_cols && shape->part == row->part));
    slice->dst_row = shape->n_out;
    shape->n_out += slice->n_rows;
    shape->n_in = slice->n_cols;
    shape->part = row->part;
    shape->lora |= row->lora;
    shape->experts = row->experts != NULL;
    return QV_OK;
}

static qv_status add_vec_row(qv_layout *layout, const qv_vec_row *row)
{
    qv_vec_shape *shape = &layout->vec[row->vec];
    QV_ASSERT(shape->n_slices < QV_MAX_SLICES);
    qv_vec_slice *slice = &shape->slices[shape->n_slices++];
    int64_t rows = qv_dim_size(layout->config, row->rows);
    *slice = (qv_vec_slice){.row = row, .n_rows = rows, .dst_row = shape->n_rows};
    if (row->split == QV_SPLIT_COLUMN)
        QV_TRY(cut(layout, all_ranks(layout), row->tensor, rows, row->unit, row->replicate,
                   &slice->src_row, &slice->n_rows));
    slice->src_row += shape->shape[0];

    shape->part = row->part;
    shape->tensor = row->tensor;
    shape->other = row->other;
    shape->as_stored = row->as_stored;
    shape->n_rows += slice->n_rows;
    shape->shape[0] += rows;
    shape->n_dims = 1;
    shape->row_elems = 1;
    for (int i = 0; i < 2 && row->tail[i] != QV_DIM_NONE; i++) {
        shape->shape[shape->n_dims++] = qv_dim_size(layout->config, row->tail[i]);
        shape->row_elems *= qv_dim_size(layout->config, row->tail[i]);
    }
    return QV_OK;
}

/* Whether the model has a layer, or the global part, that a row belongs to. */
static bool in_use(const qv_layout *layout, qv_part part)
{
    return qv_layout_part_count(layout, part) > 0;
}

/* The experts of a rank. */
static qv_status share_out_experts(qv_layout *layout)
{
    const qv_shard *s = &layout->shard;
    int64_t n = layout->config->n_experts;
    if (s->expert_groups < 1 || s->n_ranks % s->expert_groups != 0)
        return qv_fail(QV_ERR_UNSUPPORTED, "%d groups of experts do not divide %d ranks",
                       s->expert_groups, s->n_ranks);
    if (s->expert_groups > 1 && n == 0)
        return qv_fail(QV_ERR_UNSUPPORTED, "%d groups of experts: the model has no experts",
                       s->expert_groups);
    if (n % s->expert_groups != 0)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%" PRId64 " experts cannot be shared out among %d groups of ranks", n,
                       s->expert_groups);
    layout->n_experts = n / s->expert_groups;
    layout->first_expert = s->rank / (s->n_ranks / s->expert_groups) * layout->n_experts;
    return QV_OK;
}

qv_status qv_layout_init_shard(qv_layout *layout, const qv_model_config *config,
                               const qv_shard *shard)
{
    QV_ASSERT(shard->n_ranks >= 1 && shard->rank >= 0 && shard->rank < shard->n_ranks);
    *layout = (qv_layout){.config = config, .shard = *shard};
    QV_TRY(share_out_experts(layout));
    const qv_arch *arch = config->arch;
    for (size_t i = 0; i < arch->n_projs; i++) {
        if (in_use(layout, arch->projs[i].part))
            QV_TRY(add_proj_row(layout, &arch->projs[i]));
    }
    for (size_t i = 0; i < arch->n_vecs; i++) {
        if (in_use(layout, arch->vecs[i].part))
            QV_TRY(add_vec_row(layout, &arch->vecs[i]));
    }
    return QV_OK;
}

qv_status qv_layout_init(qv_layout *layout, const qv_model_config *config, int32_t rank,
                         int32_t n_ranks)
{
    return qv_layout_init_shard(layout, config,
                                &(qv_shard){.rank = rank, .n_ranks = n_ranks, .expert_groups = 1});
}

/* Units of a COLUMN slice that a rank has. */
static int64_t units_of(const qv_layout *layout, qv_proj proj, int32_t slice)
{
    const qv_proj_slice *s = &layout->proj[proj].slices[slice];
    return s->n_rows / qv_dim_size(layout->config, s->row->unit);
}

qv_model_config qv_layout_rank_config(const qv_layout *layout)
{
    qv_model_config c = *layout->config;
    if (layout->proj[QV_PROJ_ATTN_IN].n_slices > 0) { /* q, k, v in units of a head */
        c.n_heads = units_of(layout, QV_PROJ_ATTN_IN, 0);
        c.n_kv_heads = units_of(layout, QV_PROJ_ATTN_IN, 1);
    }
    if (layout->proj[QV_PROJ_GDN_IN].n_slices > 0) { /* q in key heads, v in groups of them */
        c.gdn_k_heads = units_of(layout, QV_PROJ_GDN_IN, 0);
        c.gdn_v_heads =
            units_of(layout, QV_PROJ_GDN_IN, 2) * qv_dim_size(layout->config, QV_DIM_GDN_GROUP);
    }
    if (layout->proj[QV_PROJ_SSM_IN].n_slices > 0) { /* z, x, B, C, dt in groups */
        c.ssm_groups = units_of(layout, QV_PROJ_SSM_IN, 2);
        c.ssm_heads = layout->proj[QV_PROJ_SSM_IN].slices[4].n_rows;
    }
    if (layout->proj[QV_PROJ_MLP_OUT].n_slices > 0)
        c.ffn = layout->proj[QV_PROJ_MLP_OUT].n_in;
    if (layout->proj[QV_PROJ_EXPERT_OUT].n_slices > 0)
        c.moe_ffn = layout->proj[QV_PROJ_EXPERT_OUT].n_in;
    if (layout->proj[QV_PROJ_SHARED_OUT].n_slices > 0)
        c.shared_ffn = layout->proj[QV_PROJ_SHARED_OUT].n_in;
    return c;
}

/* --- Counts ----------------------------------------------------------------------------------- */

int64_t qv_layout_part_count(const qv_layout *layout, qv_part part)
{
    return part == QV_PART_GLOBAL ? 1 : qv_model_config_count(layout->config, part);
}

bool qv_layout_has(const qv_layout *layout, int64_t layer, qv_proj proj)
{
    const qv_proj_shape *shape = &layout->proj[proj];
    uint32_t parts = layer < 0 ? QV_PART_GLOBAL : layout->config->layer_parts[layer];
    return shape->n_slices > 0 && (parts & shape->part) != 0;
}

typedef struct {
    int64_t params, tensors;
} tally;

static void count_tensor(const char *name, int32_t n_dims, const int64_t *shape, void *user)
{
    (void)name;
    tally *t = user;
    int64_t n = 1;
    for (int32_t i = 0; i < n_dims; i++)
        n *= shape[i];
    t->params += n;
    t->tensors++;
}

static tally count_all(const qv_layout *layout, bool fused_experts)
{
    tally t = {0, 0};
    for (int64_t layer = -1; layer < layout->config->n_layers; layer++)
        qv_layout_list(layout, "", layer, fused_experts, count_tensor, &t);
    return t;
}

int64_t qv_layout_params(const qv_layout *layout)
{
    return count_all(layout, true).params;
}

int64_t qv_layout_tensors(const qv_layout *layout, bool fused_experts)
{
    return count_all(layout, fused_experts).tensors;
}

/* --- LoRA targets ----------------------------------------------------------------------------- */

static bool same_name(const char *name, const char *text, size_t size)
{
    return strlen(name) == size && memcmp(name, text, size) == 0;
}

/* Slices [first, first + n) of a projection as a target. */
static qv_lora_target make_target(const qv_layout *layout, qv_proj proj, int32_t first, int32_t n)
{
    const qv_proj_shape *shape = &layout->proj[proj];
    QV_ASSERT(n > 0 && first + n <= shape->n_slices);
    qv_lora_target target = {.proj = proj, .first = first, .n = n, .n_in = shape->n_in};
    for (int32_t i = first; i < first + n; i++)
        target.n_rows += shape->slices[i].n_rows;
    target.lora = shape->slices[first].row->lora;
    return target;
}

/* Among the projections of experts, or among the others. */
static bool find_target(const qv_layout *layout, bool experts, const char *module, size_t size,
                        qv_lora_target *out)
{
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        const qv_proj_shape *shape = &layout->proj[p];
        for (int32_t i = 0; i < shape->n_slices && shape->experts == experts; i++) {
            if (!same_name(shape->slices[i].row->module, module, size))
                continue;
            int32_t n = 1;
            while (i + n < shape->n_slices && shape->slices[i + n].plane == i)
                n++;
            *out = make_target(layout, (qv_proj)p, i, n);
            return true;
        }
    }
    const qv_arch *arch = layout->config->arch;
    for (size_t i = 0; i < arch->n_aliases; i++) {
        const qv_lora_alias *alias = &arch->aliases[i];
        const qv_proj_shape *shape = &layout->proj[alias->proj];
        if (shape->n_slices > 0 && shape->experts == experts &&
            same_name(alias->module, module, size)) {
            *out = make_target(layout, alias->proj, alias->first, alias->n);
            return true;
        }
    }
    return false;
}

bool qv_layout_find_target(const qv_layout *layout, const char *module, size_t size,
                           qv_lora_target *out)
{
    return find_target(layout, false, module, size, out);
}

bool qv_layout_find_expert_target(const qv_layout *layout, const char *module, size_t size,
                                  qv_lora_target *out)
{
    return find_target(layout, true, module, size, out);
}

qv_lora_target qv_layout_whole_target(const qv_layout *layout, qv_proj proj)
{
    return make_target(layout, proj, 0, layout->proj[proj].n_slices);
}

const char *qv_layout_experts_path(const qv_layout *layout)
{
    const qv_proj_shape *shape = &layout->proj[QV_PROJ_EXPERT_IN];
    return shape->n_slices > 0 ? shape->slices[0].row->experts : NULL;
}
