#include "models/weights.h"

#include "models/arch.h"

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME_MAX_SIZE 256
#define CHUNK_BYTES   (1 << 20) /* about what a piece of work reads */
#define MAX_HELPERS   15

/* Storage of a matrix or an embedding: BF16 as it is, anything else widened to F32. */
static qv_dtype storage_dtype(qv_dtype stored)
{
    return stored == QV_BF16 ? QV_BF16 : QV_F32;
}

/* Whether the embedding is the memory of the head. */
static bool is_shared(const qv_layout *layout, const qv_backend *be, int64_t layer, qv_vec vec)
{
    const qv_proj_shape *head = &layout->proj[QV_PROJ_LM_HEAD];
    const qv_vec_shape *embed = &layout->vec[QV_VEC_EMBED];
    return layer == QV_GLOBAL && vec == QV_VEC_EMBED && layout->config->tied_head &&
           qv_backend_keeps_rows(be) && head->n_slices == 1 && embed->n_slices == 1 &&
           head->n_out == embed->n_rows && head->n_in == embed->row_elems &&
           head->slices[0].src_row == embed->slices[0].src_row;
}

uint64_t qv_weights_bytes(const qv_layout *layout, const qv_backend *be)
{
    qv_dtype dtype = storage_dtype(layout->config->dtype);
    uint64_t total = 0;
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        const qv_proj_shape *shape = &layout->proj[p];
        if (shape->n_slices > 0)
            total += qv_weight_bytes(shape->n_out, shape->n_in, dtype) *
                     (uint64_t)(shape->experts ? layout->n_experts : 1) *
                     (uint64_t)qv_layout_part_count(layout, shape->part);
    }
    for (int v = 0; v < QV_VEC_COUNT; v++) {
        const qv_vec_shape *shape = &layout->vec[v];
        int64_t layer = v == QV_VEC_EMBED ? QV_GLOBAL : 0;
        if (shape->n_slices > 0 && !is_shared(layout, be, layer, (qv_vec)v))
            total += (uint64_t)(shape->n_rows * shape->row_elems) *
                     qv_dtype_size(shape->as_stored ? dtype : QV_F32) *
                     (uint64_t)qv_layout_part_count(layout, shape->part);
    }
    return total;
}

/* --- What the tables expect of a checkpoint --------------------------------------------------- */

typedef struct {
    const qv_layout *layout;
    const qv_safetensors *st;
    const char *prefix; /* the one that this checkpoint uses */
} checkpoint;

/* A tensor of the second table under the name that this checkpoint uses. */
static const char *vec_name(const checkpoint *ckpt, int64_t layer, qv_vec vec, char *buf)
{
    const qv_vec_shape *shape = &ckpt->layout->vec[vec];
    if (shape->other != NULL) {
        qv_tensor_name(buf, NAME_MAX_SIZE, ckpt->prefix, layer, shape->other, "");
        if (qv_safetensors_find(ckpt->st, buf) != NULL)
            return buf;
    }
    return qv_tensor_name(buf, NAME_MAX_SIZE, ckpt->prefix, layer, shape->tensor, "");
}

/* The checkpoint's prefix is the first under which its embedding is found. */
static qv_status open_checkpoint(checkpoint *ckpt, const qv_layout *layout,
                                 const qv_safetensors *st)
{
    *ckpt = (checkpoint){.layout = layout, .st = st};
    char name[NAME_MAX_SIZE], tried[NAME_MAX_SIZE] = "";
    size_t used = 0;
    for (const char *const *prefix = layout->config->arch->prefixes; *prefix != NULL; prefix++) {
        ckpt->prefix = *prefix;
        if (qv_safetensors_find(st, vec_name(ckpt, QV_GLOBAL, QV_VEC_EMBED, name)) != NULL)
            return QV_OK;
        used +=
            (size_t)snprintf(tried + used, sizeof tried - used, "%s%s", used ? " or " : "", name);
    }
    return qv_fail(QV_ERR_FORMAT, "the checkpoint has no %s", tried);
}

/* Whether a checkpoint holds the experts of slice `i` in one tensor; otherwise one by one. */
static bool is_fused(const checkpoint *ckpt, int64_t layer, qv_proj proj, int32_t i)
{
    const qv_proj_row *row = ckpt->layout->proj[proj].slices[i].row;
    char name[NAME_MAX_SIZE];
    return qv_safetensors_find(
               ckpt->st, qv_expert_name(name, sizeof name, ckpt->prefix, layer, row, -1)) != NULL;
}

/* The checkpoint tensor of slice `i` of a projection. A tied head is the embedding. */
static const char *matrix_name(const checkpoint *ckpt, int64_t layer, qv_proj proj, int32_t i,
                               char *buf)
{
    const qv_proj_row *row = ckpt->layout->proj[proj].slices[i].row;
    if (proj == QV_PROJ_LM_HEAD && ckpt->layout->config->tied_head)
        return vec_name(ckpt, QV_GLOBAL, QV_VEC_EMBED, buf);
    return qv_tensor_name(buf, NAME_MAX_SIZE, row->root ? "" : ckpt->prefix, layer, row->module,
                          ".weight");
}

static bool has_vec(const qv_layout *layout, int64_t layer, qv_vec vec)
{
    const qv_vec_shape *shape = &layout->vec[vec];
    uint32_t parts = layer < 0 ? QV_PART_GLOBAL : layout->config->layer_parts[layer];
    return shape->n_slices > 0 && (parts & shape->part) != 0;
}

/* --- Check ------------------------------------------------------------------------------------ */

typedef struct {
    checkpoint ckpt;
    uint8_t *used; /* [tensors of the checkpoint] */
    char missing[NAME_MAX_SIZE];
    int64_t n_missing;
} check;

static qv_status check_tensor(check *c, const char *name, int32_t n_dims, const int64_t *shape)
{
    const qv_stored_tensor *tensor = qv_safetensors_find(c->ckpt.st, name);
    if (tensor == NULL) {
        if (c->n_missing++ == 0)
            snprintf(c->missing, sizeof c->missing, "%s", name);
        return QV_OK;
    }
    c->used[tensor - qv_safetensors_at(c->ckpt.st, 0)] = 1;
    char text[128], wanted[128];
    qv_stored_tensor_describe(tensor, text, sizeof text);
    if (tensor->dtype != QV_BF16 && tensor->dtype != QV_F16 && tensor->dtype != QV_F32)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: %s is %s: only BF16, F16 and F32 are implemented",
                       tensor->file, name, text);
    if (tensor->n_dims == n_dims &&
        memcmp(tensor->shape, shape, (size_t)n_dims * sizeof *shape) == 0)
        return QV_OK;
    qv_stored_tensor expected = {.dtype = tensor->dtype, .n_dims = n_dims};
    memcpy(expected.shape, shape, (size_t)n_dims * sizeof *shape);
    return qv_fail(QV_ERR_SHAPE, "%s: %s is %s; config.json makes it %s", tensor->file, name, text,
                   qv_stored_tensor_describe(&expected, wanted, sizeof wanted));
}

/* The matrices of all experts for one slice: in one tensor, or one tensor each. */
static qv_status check_experts(check *c, int64_t layer, qv_proj proj, int32_t i)
{
    const qv_proj_slice *slice = &c->ckpt.layout->proj[proj].slices[i];
    int64_t n_experts = c->ckpt.layout->config->n_experts;
    const char *prefix = c->ckpt.prefix;
    char name[NAME_MAX_SIZE];
    if (is_fused(&c->ckpt, layer, proj, i))
        return check_tensor(c, qv_expert_name(name, sizeof name, prefix, layer, slice->row, -1), 3,
                            (int64_t[]){n_experts, slice->fused_rows, slice->module_cols});
    for (int64_t e = 0; e < n_experts; e++)
        QV_TRY(check_tensor(c, qv_expert_name(name, sizeof name, prefix, layer, slice->row, e), 2,
                            (int64_t[]){slice->module_rows, slice->module_cols}));
    return QV_OK;
}

static qv_status check_proj(check *c, int64_t layer, qv_proj proj)
{
    const qv_proj_shape *shape = &c->ckpt.layout->proj[proj];
    char name[NAME_MAX_SIZE];
    for (int32_t i = 0; i < shape->n_slices; i++) {
        const qv_proj_slice *slice = &shape->slices[i];
        if (shape->experts)
            QV_TRY(check_experts(c, layer, proj, i));
        else if (slice->plane == i)
            QV_TRY(check_tensor(c, matrix_name(&c->ckpt, layer, proj, i, name), 2,
                                (int64_t[]){slice->module_rows, slice->module_cols}));
    }
    return QV_OK;
}

static qv_status check_layer(check *c, int64_t layer)
{
    const qv_layout *layout = c->ckpt.layout;
    char name[NAME_MAX_SIZE];
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        if (qv_layout_has(layout, layer, (qv_proj)p))
            QV_TRY(check_proj(c, layer, (qv_proj)p));
    }
    for (int v = 0; v < QV_VEC_COUNT; v++) {
        if (has_vec(layout, layer, (qv_vec)v))
            QV_TRY(check_tensor(c, vec_name(&c->ckpt, layer, (qv_vec)v, name),
                                layout->vec[v].n_dims, layout->vec[v].shape));
    }
    return QV_OK;
}

/* Tensors that a checkpoint may hold and the engine does not read. */
static bool is_skipped(const qv_layout *layout, const char *name)
{
    for (const char *const *skip = layout->config->arch->skip; *skip != NULL; skip++) {
        if (strncmp(name, *skip, strlen(*skip)) == 0)
            return true;
    }
    return layout->config->tied_head && strcmp(name, "lm_head.weight") == 0;
}

static qv_status check_unexpected(const check *c)
{
    const qv_stored_tensor *first = NULL;
    size_t n_unexpected = 0;
    for (size_t i = 0; i < qv_safetensors_count(c->ckpt.st); i++) {
        const qv_stored_tensor *tensor = qv_safetensors_at(c->ckpt.st, i);
        if (c->used[i] || is_skipped(c->ckpt.layout, tensor->name))
            continue;
        first = first ? first : tensor;
        n_unexpected++;
    }
    if (first == NULL)
        return QV_OK;
    return qv_fail(QV_ERR_FORMAT,
                   "%s: %.200s has no place in the model that config.json describes (%zu such "
                   "tensor%s)",
                   first->file, first->name, n_unexpected, n_unexpected == 1 ? "" : "s");
}

static qv_status check_all(check *c)
{
    for (int64_t layer = QV_GLOBAL; layer < c->ckpt.layout->config->n_layers; layer++)
        QV_TRY(check_layer(c, layer));
    if (c->n_missing > 0)
        return qv_fail(QV_ERR_FORMAT, "the checkpoint lacks %s (%" PRId64 " missing tensor%s)",
                       c->missing, c->n_missing, c->n_missing == 1 ? "" : "s");
    return check_unexpected(c);
}

qv_status qv_weights_check(const qv_layout *layout, const qv_safetensors *st)
{
    check c = {.used = NULL};
    QV_TRY(open_checkpoint(&c.ckpt, layout, st));
    c.used = calloc(qv_safetensors_count(st), 1);
    qv_status status = c.used ? check_all(&c) : qv_fail(QV_ERR_NOMEM, "no memory for a check");
    free(c.used);
    return status;
}

/* --- Plan the load ---------------------------------------------------------------------------- */

/* A piece of work: some rows of one checkpoint tensor, to a matrix or to plain memory. */
typedef struct {
    const qv_stored_tensor *tensor;
    qv_weight *weight; /* rows go here from `dst_row` on (of `expert`, when >= 0), or, when NULL, */
    int64_t expert;
    uint8_t *dst; /* here, as `dtype` */
    qv_dtype dtype;
    int64_t src_row, n_rows, row_elems; /* in the tensor, as [rows, row_elems] */
    int64_t src_col, n_cols, dst_row;
} piece;

typedef struct {
    checkpoint ckpt;
    qv_weights *weights;
    piece *pieces; /* owned */
    size_t n_pieces, room;
    uint64_t total; /* bytes that all pieces read */
} plan;

static uint64_t piece_bytes(const piece *p)
{
    return (uint64_t)(p->n_rows * p->n_cols) * qv_dtype_size(p->tensor->dtype);
}

/* Cut `whole` into pieces of about CHUNK_BYTES, at least one row each. */
static qv_status add_pieces(plan *pl, piece whole)
{
    int64_t row_bytes = whole.row_elems * (int64_t)qv_dtype_size(whole.tensor->dtype);
    int64_t step = row_bytes < CHUNK_BYTES ? CHUNK_BYTES / row_bytes : 1;
    for (int64_t row = 0; row < whole.n_rows; row += step) {
        if (pl->n_pieces == pl->room) {
            size_t room = pl->room ? pl->room * 2 : 1024;
            piece *larger = realloc(pl->pieces, room * sizeof *larger);
            if (larger == NULL)
                return qv_fail(QV_ERR_NOMEM, "no memory to load weights");
            pl->pieces = larger;
            pl->room = room;
        }
        piece *p = &pl->pieces[pl->n_pieces++];
        *p = whole;
        p->src_row += row;
        p->dst_row += row;
        p->n_rows = step < whole.n_rows - row ? step : whole.n_rows - row;
        if (p->dst != NULL)
            p->dst += (size_t)(row * whole.row_elems) * qv_dtype_size(whole.dtype);
        pl->total += piece_bytes(p);
    }
    return QV_OK;
}

/* The tensor that holds slice `i` of expert `e`, and the row at which the slice begins there. */
static const qv_stored_tensor *expert_tensor(const checkpoint *ckpt, int64_t layer, qv_proj proj,
                                             int32_t i, int64_t e, int64_t *first_row)
{
    const qv_proj_slice *slice = &ckpt->layout->proj[proj].slices[i];
    bool fused = is_fused(ckpt, layer, proj, i);
    char name[NAME_MAX_SIZE];
    qv_expert_name(name, sizeof name, ckpt->prefix, layer, slice->row, fused ? -1 : e);
    const qv_stored_tensor *tensor = qv_safetensors_find(ckpt->st, name);
    QV_ASSERT(tensor != NULL);
    *first_row = fused ? e * slice->fused_rows + slice->fused_row : 0;
    return tensor;
}

/* One matrix in the backend for all experts, filled from one tensor or from many. */
static qv_status plan_experts(plan *pl, int64_t layer, qv_proj proj, qv_weight **out)
{
    const qv_proj_shape *shape = &pl->ckpt.layout->proj[proj];
    const qv_layout *layout = pl->ckpt.layout;
    int64_t n_experts = layout->n_experts, first_row;
    qv_dtype dtype = QV_BF16;
    for (int64_t j = 0; j < n_experts * shape->n_slices; j++) {
        const qv_stored_tensor *tensor =
            expert_tensor(&pl->ckpt, layer, proj, (int32_t)(j % shape->n_slices),
                          layout->first_expert + j / shape->n_slices, &first_row);
        if (storage_dtype(tensor->dtype) != QV_BF16)
            dtype = QV_F32;
    }
    QV_TRY(
        qv_weight_new_experts(pl->weights->be, n_experts, shape->n_out, shape->n_in, dtype, out));
    for (int64_t j = 0; j < n_experts * shape->n_slices; j++) {
        int32_t i = (int32_t)(j % shape->n_slices);
        int64_t expert = j / shape->n_slices;
        const qv_proj_slice *slice = &shape->slices[i];
        const qv_stored_tensor *tensor =
            expert_tensor(&pl->ckpt, layer, proj, i, layout->first_expert + expert, &first_row);
        QV_TRY(add_pieces(pl, (piece){.tensor = tensor,
                                      .weight = *out,
                                      .expert = expert,
                                      .src_row = first_row + slice->src_row,
                                      .n_rows = slice->n_rows,
                                      .row_elems = slice->module_cols,
                                      .src_col = slice->src_col,
                                      .n_cols = slice->n_cols,
                                      .dst_row = slice->dst_row}));
    }
    return QV_OK;
}

static qv_status plan_proj(plan *pl, int64_t layer, qv_proj proj, qv_weight **out)
{
    const qv_proj_shape *shape = &pl->ckpt.layout->proj[proj];
    const qv_stored_tensor *tensors[QV_MAX_SLICES];
    qv_dtype dtype = QV_BF16;
    char name[NAME_MAX_SIZE];
    if (shape->experts)
        return plan_experts(pl, layer, proj, out);
    for (int32_t i = 0; i < shape->n_slices; i++) {
        tensors[i] = qv_safetensors_find(pl->ckpt.st, matrix_name(&pl->ckpt, layer, proj, i, name));
        QV_ASSERT(tensors[i] != NULL);
        if (storage_dtype(tensors[i]->dtype) != QV_BF16)
            dtype = QV_F32;
    }
    QV_TRY(qv_weight_new(pl->weights->be, shape->n_out, shape->n_in, dtype, out));
    for (int32_t i = 0; i < shape->n_slices; i++) {
        const qv_proj_slice *slice = &shape->slices[i];
        QV_TRY(add_pieces(pl, (piece){.tensor = tensors[i],
                                      .weight = *out,
                                      .expert = -1,
                                      .src_row = slice->src_row,
                                      .n_rows = slice->n_rows,
                                      .row_elems = slice->module_cols,
                                      .src_col = slice->src_col,
                                      .n_cols = slice->n_cols,
                                      .dst_row = slice->dst_row}));
    }
    return QV_OK;
}

static qv_status plan_vec(plan *pl, int64_t layer, qv_vec vec, qv_tensor *out)
{
    const qv_vec_shape *shape = &pl->ckpt.layout->vec[vec];
    char name[NAME_MAX_SIZE];
    const qv_stored_tensor *tensor =
        qv_safetensors_find(pl->ckpt.st, vec_name(&pl->ckpt, layer, vec, name));
    QV_ASSERT(tensor != NULL);
    qv_dtype dtype = shape->as_stored ? storage_dtype(tensor->dtype) : QV_F32;
    size_t row_bytes = (size_t)shape->row_elems * qv_dtype_size(dtype);
    void *data;
    QV_TRY(qv_backend_alloc(pl->weights->be, (size_t)shape->n_rows * row_bytes, &data));
    *out = shape->row_elems == 1 ? qv_tensor_1d(data, dtype, shape->n_rows)
                                 : qv_tensor_2d(data, dtype, shape->n_rows, shape->row_elems);
    for (int32_t i = 0; i < shape->n_slices; i++) {
        const qv_vec_slice *slice = &shape->slices[i];
        QV_TRY(add_pieces(pl, (piece){.tensor = tensor,
                                      .dst = (uint8_t *)data + (size_t)slice->dst_row * row_bytes,
                                      .dtype = dtype,
                                      .src_row = slice->src_row,
                                      .n_rows = slice->n_rows,
                                      .row_elems = shape->row_elems,
                                      .n_cols = shape->row_elems}));
    }
    return QV_OK;
}

/* Allocate what a layer has and list the pieces that fill it. */
static qv_status plan_layer(plan *pl, int64_t layer)
{
    const qv_layout *layout = pl->ckpt.layout;
    qv_layer_weights *out = layer < 0 ? &pl->weights->global : &pl->weights->layers[layer];
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        if (qv_layout_has(layout, layer, (qv_proj)p))
            QV_TRY(plan_proj(pl, layer, (qv_proj)p, &out->proj[p]));
    }
    for (int v = 0; v < QV_VEC_COUNT; v++) {
        if (is_shared(layout, pl->weights->be, layer, (qv_vec)v))
            out->vec[v] = qv_weight_rows(out->proj[QV_PROJ_LM_HEAD]);
        else if (has_vec(layout, layer, (qv_vec)v))
            QV_TRY(plan_vec(pl, layer, (qv_vec)v, &out->vec[v]));
    }
    return QV_OK;
}

/* --- Load ------------------------------------------------------------------------------------- */

/* Shared by the threads of one load. Pieces are handed out in the order of the file's layers. */
typedef struct {
    const plan *plan;
    qv_backend *be;
    size_t staging_bytes;
    atomic_size_t next;    /* piece to take; its order with anything else does not matter */
    _Atomic uint64_t done; /* bytes loaded, for progress only */
    atomic_bool failed;    /* stop early; the text below is read after the threads are joined */
    qv_status status;      /* of the first failure; under `lock` */
    char error[QV_ERROR_MAX];
    pthread_mutex_t lock;
} load;

/* Rows are read where they are mapped unless the file leaves them unaligned. */
static qv_status load_matrix_piece(const load *l, const piece *p, void *staging)
{
    const qv_stored_tensor *t = p->tensor;
    size_t elem = qv_dtype_size(t->dtype);
    const uint8_t *src = (const uint8_t *)t->data + (size_t)(p->src_row * p->row_elems) * elem;
    if ((uintptr_t)src % elem != 0)
        src = memcpy(staging, src, (size_t)(p->n_rows * p->row_elems) * elem);
    src += (size_t)p->src_col * elem;
    if (p->expert >= 0)
        return qv_weight_load_expert(l->be, p->weight, p->expert, p->dst_row, p->n_rows, src,
                                     t->dtype, p->row_elems);
    return qv_weight_load(l->be, p->weight, p->dst_row, p->n_rows, src, t->dtype, p->row_elems);
}

static qv_status load_plain_piece(const load *l, const piece *p, void *staging)
{
    const qv_stored_tensor *t = p->tensor;
    int64_t first = p->src_row * p->row_elems, n = p->n_rows * p->row_elems;
    const void *src = (const uint8_t *)t->data + (size_t)first * qv_dtype_size(t->dtype);
    if (p->dtype != t->dtype) {
        QV_TRY(qv_stored_tensor_f32(t, first, n, staging));
        src = staging;
    }
    return qv_backend_upload(l->be, p->dst, src, (size_t)n * qv_dtype_size(p->dtype));
}

static qv_status load_piece(load *l, const piece *p, void *staging)
{
    QV_TRY(qv_stored_tensor_require_finite(p->tensor, p->src_row * p->row_elems,
                                           p->n_rows * p->row_elems));
    QV_TRY(p->weight != NULL ? load_matrix_piece(l, p, staging) : load_plain_piece(l, p, staging));
    atomic_fetch_add_explicit(&l->done, piece_bytes(p), memory_order_relaxed);
    return QV_OK;
}

static void keep_failure(load *l, qv_status status)
{
    pthread_mutex_lock(&l->lock);
    if (l->status == QV_OK) {
        l->status = status;
        snprintf(l->error, sizeof l->error, "%s", qv_error());
    }
    pthread_mutex_unlock(&l->lock);
    atomic_store_explicit(&l->failed, true, memory_order_relaxed);
}

/* Take pieces until there are no more. `progress` is NULL on all threads but the caller's. */
static void run_pieces(load *l, qv_progress_fn *progress, void *user)
{
    void *staging = aligned_alloc(64, l->staging_bytes);
    if (staging == NULL)
        keep_failure(l, qv_fail(QV_ERR_NOMEM, "no memory to load weights"));
    while (!atomic_load_explicit(&l->failed, memory_order_relaxed)) {
        size_t i = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        if (i >= l->plan->n_pieces)
            break;
        qv_status status = load_piece(l, &l->plan->pieces[i], staging);
        if (status != QV_OK)
            keep_failure(l, status);
        uint64_t done = atomic_load_explicit(&l->done, memory_order_relaxed);
        if (progress != NULL && done < l->plan->total) /* the end is told after the join */
            progress(done, l->plan->total, user);
    }
    free(staging);
}

static void *load_thread(void *arg)
{
    run_pieces(arg, NULL, NULL);
    return NULL;
}

/* Threads beside the caller's: the rest of the processors, within reason. */
static int count_helpers(size_t n_pieces)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) - 1 : 0;
    n = n < MAX_HELPERS ? n : MAX_HELPERS;
    return (size_t)n < n_pieces ? n : (int)n_pieces;
}

static qv_status run_plan(const plan *pl, qv_progress_fn *progress, void *user)
{
    load l = {.plan = pl, .be = pl->weights->be, .lock = PTHREAD_MUTEX_INITIALIZER};
    for (size_t i = 0; i < pl->n_pieces; i++) {
        size_t bytes = (size_t)(pl->pieces[i].n_rows * pl->pieces[i].row_elems) * sizeof(float);
        l.staging_bytes = bytes > l.staging_bytes ? bytes : l.staging_bytes;
    }
    l.staging_bytes = (l.staging_bytes + 63) / 64 * 64;
    pthread_t helpers[MAX_HELPERS];
    int n = 0, wanted = count_helpers(pl->n_pieces);
    while (n < wanted && pthread_create(&helpers[n], NULL, load_thread, &l) == 0)
        n++;
    run_pieces(&l, progress, user);
    while (n > 0)
        pthread_join(helpers[--n], NULL);
    pthread_mutex_destroy(&l.lock);
    if (l.status != QV_OK)
        return qv_fail(l.status, "%s", l.error);
    if (progress != NULL)
        progress(pl->total, pl->total, user);
    return QV_OK;
}

qv_status qv_weights_load(qv_weights *weights, qv_backend *be, const qv_layout *layout,
                          const qv_safetensors *st, qv_progress_fn *progress, void *user)
{
    *weights = (qv_weights){.be = be, .n_layers = layout->config->n_layers};
    QV_TRY(qv_weights_check(layout, st));
    plan pl = {.weights = weights};
    QV_TRY(open_checkpoint(&pl.ckpt, layout, st));
    weights->layers = calloc((size_t)weights->n_layers, sizeof *weights->layers);
    qv_status status = weights->layers ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory to load weights");
    for (int64_t layer = QV_GLOBAL; layer < weights->n_layers && status == QV_OK; layer++)
        status = plan_layer(&pl, layer);
    if (status == QV_OK)
        status = run_plan(&pl, progress, user);
    free(pl.pieces);
    return status;
}

/* --- Made-up weights -------------------------------------------------------------------------- */

/* Around what trained vectors hold: gains of norms at their rest (0 where 1 is added to them, else
 * 1), decays and steps of recurrent layers of ordinary length. */
static const struct {
    float mean, scale;
} made_up_vecs[QV_VEC_COUNT] = {
    [QV_VEC_EMBED] = {0, 0.05f},     [QV_VEC_CONV] = {0, 0.5f},
    [QV_VEC_A_LOG] = {0, 1},         [QV_VEC_DT_BIAS] = {-2, 1},
    [QV_VEC_D_SKIP] = {1, 0.1f},     [QV_VEC_ROUTER_BIAS] = {0, 0.01f},
    [QV_VEC_GATE_NORM] = {1, 0.1f},  [QV_VEC_FINAL_NORM] = {0, 0.1f},
    [QV_VEC_MIXER_NORM] = {0, 0.1f}, [QV_VEC_MLP_NORM] = {0, 0.1f},
    [QV_VEC_Q_NORM] = {0, 0.1f},     [QV_VEC_K_NORM] = {0, 0.1f},
    [QV_VEC_CONV_BIAS] = {0, 0.1f},
};

static qv_status make_up_proj(qv_weights *weights, const qv_layout *layout, qv_proj proj,
                              uint64_t seed, qv_weight **out)
{
    const qv_proj_shape *shape = &layout->proj[proj];
    qv_dtype dtype = storage_dtype(layout->config->dtype);
    if (shape->experts)
        QV_TRY(qv_weight_new_experts(weights->be, layout->n_experts, shape->n_out, shape->n_in,
                                     dtype, out));
    else
        QV_TRY(qv_weight_new(weights->be, shape->n_out, shape->n_in, dtype, out));
    /* Outputs about as large as inputs: variance scale^2 / 3 = 1 / n_in. */
    return qv_weight_fill(weights->be, *out, sqrtf(3.0f / (float)shape->n_in), seed);
}

static qv_status make_up_vec(qv_weights *weights, const qv_layout *layout, qv_vec vec,
                             uint64_t seed, qv_tensor *out)
{
    const qv_vec_shape *shape = &layout->vec[vec];
    qv_dtype dtype = shape->as_stored ? storage_dtype(layout->config->dtype) : QV_F32;
    int64_t n = shape->n_rows * shape->row_elems;
    void *data;
    QV_TRY(qv_backend_alloc(weights->be, (size_t)n * qv_dtype_size(dtype), &data));
    *out = shape->row_elems == 1 ? qv_tensor_1d(data, dtype, shape->n_rows)
                                 : qv_tensor_2d(data, dtype, shape->n_rows, shape->row_elems);
    return qv_backend_fill(weights->be, data, dtype, n, made_up_vecs[vec].mean,
                           made_up_vecs[vec].scale, seed);
}

qv_status qv_weights_make_up(qv_weights *weights, qv_backend *be, const qv_layout *layout)
{
    *weights = (qv_weights){.be = be, .n_layers = layout->config->n_layers};
    weights->layers = calloc((size_t)weights->n_layers, sizeof *weights->layers);
    if (weights->layers == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for weights");
    for (int64_t layer = QV_GLOBAL; layer < weights->n_layers; layer++) {
        qv_layer_weights *out = layer < 0 ? &weights->global : &weights->layers[layer];
        uint64_t seed = (uint64_t)(layer + 2) << 32;
        for (int p = 0; p < QV_PROJ_COUNT; p++)
            if (qv_layout_has(layout, layer, (qv_proj)p))
                QV_TRY(
                    make_up_proj(weights, layout, (qv_proj)p, seed + (uint64_t)p, &out->proj[p]));
        for (int v = 0; v < QV_VEC_COUNT; v++)
            if (is_shared(layout, be, layer, (qv_vec)v))
                out->vec[v] = qv_weight_rows(out->proj[QV_PROJ_LM_HEAD]);
            else if (has_vec(layout, layer, (qv_vec)v))
                QV_TRY(make_up_vec(weights, layout, (qv_vec)v, seed + 1000 + (uint64_t)v,
                                   &out->vec[v]));
    }
    return qv_backend_sync(be);
}

static void free_layer(qv_backend *be, qv_layer_weights *layer)
{
    const qv_weight *head = layer->proj[QV_PROJ_LM_HEAD];
    qv_tensor *embed = &layer->vec[QV_VEC_EMBED];
    if (head != NULL && qv_backend_keeps_rows(be) && embed->data == qv_weight_rows(head).data)
        embed->data = NULL; /* the head's memory */
    for (int p = 0; p < QV_PROJ_COUNT; p++)
        qv_weight_free(be, layer->proj[p]);
    for (int v = 0; v < QV_VEC_COUNT; v++)
        qv_backend_free(be, layer->vec[v].data);
}

void qv_weights_deinit(qv_weights *weights)
{
    if (weights->be == NULL)
        return;
    free_layer(weights->be, &weights->global);
    for (int64_t i = 0; i < weights->n_layers && weights->layers != NULL; i++)
        free_layer(weights->be, &weights->layers[i]);
    free(weights->layers);
    *weights = (qv_weights){.be = NULL};
}
