#include "models/lora_pool.h"

#include "models/weights.h"

#include <stdlib.h>
#include <string.h>

struct qv_lora_pool {
    qv_backend *be; /* borrowed */
    const qv_layout *layout;
    int32_t n_slots, max_rank;
    qv_dtype dtype;
    int64_t slice_start[QV_PROJ_COUNT][QV_MAX_SLICES + 1]; /* output rows; shared by all layers */
    qv_lora_site
        *sites;         /* [n_layers + 1, QV_PROJ_COUNT], the global part first; n_slots 0 = none */
    uint8_t *active;    /* [n_layers + 1, QV_PROJ_COUNT, n_slots] */
    int32_t *used_rank; /* the same: every entry at and above this rank is zero */
    qv_lora_parts *parts;
};

/* --- Sizes and life --------------------------------------------------------------------------- */

static size_t a_bytes(const qv_proj_shape *shape, int32_t max_rank, qv_dtype dtype)
{
    return (size_t)(shape->n_slices * (int64_t)max_rank * shape->n_in) * qv_dtype_size(dtype);
}

static size_t b_bytes(const qv_proj_shape *shape, int32_t max_rank, qv_dtype dtype)
{
    return (size_t)(shape->n_out * max_rank) * qv_dtype_size(dtype);
}

static size_t slices_bytes(const qv_proj_shape *shape)
{
    return (size_t)shape->n_slices * sizeof(qv_lora_slice);
}

/* Whether every slot has room for pairs of a projection. */
static bool has_room(const qv_proj_shape *shape)
{
    return shape->n_slices > 0 && shape->lora && !shape->experts;
}

uint64_t qv_lora_slot_bytes(const qv_layout *layout, int32_t max_rank, qv_dtype dtype)
{
    uint64_t total = 0;
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        const qv_proj_shape *shape = &layout->proj[p];
        if (has_room(shape))
            total += (a_bytes(shape, max_rank, dtype) + b_bytes(shape, max_rank, dtype) +
                      slices_bytes(shape)) *
                     (uint64_t)qv_layout_part_count(layout, shape->part);
    }
    return total;
}

static size_t site_index(int64_t layer, qv_proj proj)
{
    return (size_t)((layer + 1) * QV_PROJ_COUNT + proj);
}

static qv_status new_site(qv_lora_pool *pool, int64_t layer, qv_proj proj)
{
    const qv_proj_shape *shape = &pool->layout->proj[proj];
    size_t index = site_index(layer, proj), n_slots = (size_t)pool->n_slots;
    qv_lora_site *site = &pool->sites[index];
    void *a, *b, *slices;
    *site = (qv_lora_site){.n_in = shape->n_in,
                           .n_out = shape->n_out,
                           .n_slices = shape->n_slices,
                           .n_slots = pool->n_slots,
                           .max_rank = pool->max_rank,
                           .slice_start = pool->slice_start[proj],
                           .slot_active = pool->active + index * n_slots};
    QV_TRY(qv_backend_alloc(pool->be, a_bytes(shape, pool->max_rank, pool->dtype) * n_slots, &a));
    site->a =
        qv_tensor_4d(a, pool->dtype, pool->n_slots, site->n_slices, site->max_rank, site->n_in);
    QV_TRY(qv_backend_alloc(pool->be, b_bytes(shape, pool->max_rank, pool->dtype) * n_slots, &b));
    site->b = qv_tensor_3d(b, pool->dtype, pool->n_slots, site->max_rank, site->n_out);
    QV_TRY(qv_backend_alloc(pool->be, slices_bytes(shape) * n_slots, &slices));
    site->slices = slices;
    return QV_OK;
}

static void list_slice_starts(qv_lora_pool *pool)
{
    for (int p = 0; p < QV_PROJ_COUNT; p++) {
        const qv_proj_shape *shape = &pool->layout->proj[p];
        for (int32_t i = 0; i < shape->n_slices; i++)
            pool->slice_start[p][i] = shape->slices[i].dst_row;
        pool->slice_start[p][shape->n_slices] = shape->n_out;
    }
}

/* Sites of layers in the order of a step, the first again behind the last. */
static void link_sites(qv_lora_pool *pool)
{
    size_t first = site_index(0, (qv_proj)0), end = site_index(pool->layout->config->n_layers, 0);
    const qv_lora_site *next = NULL;
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = end; i > first; i--)
            if (pool->sites[i - 1].n_slots > 0) {
                pool->sites[i - 1].next = next;
                next = &pool->sites[i - 1];
            }
}

qv_status qv_lora_pool_new(qv_backend *be, const qv_layout *layout, int32_t n_slots,
                           int32_t max_rank, uint64_t max_parts, qv_lora_pool **out)
{
    QV_ASSERT(n_slots > 0 && max_rank > 0);
    size_t n_sites = (size_t)(layout->config->n_layers + 1) * QV_PROJ_COUNT;
    qv_lora_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for adapter slots");
    *pool = (qv_lora_pool){.be = be,
                           .layout = layout,
                           .n_slots = n_slots,
                           .max_rank = max_rank,
                           .dtype = qv_backend_lora_dtype(be),
                           .sites = calloc(n_sites, sizeof *pool->sites),
                           .active = calloc(n_sites, (size_t)n_slots),
                           .used_rank = calloc(n_sites * (size_t)n_slots, sizeof(int32_t))};
    qv_status status = pool->sites != NULL && pool->active != NULL && pool->used_rank != NULL
                           ? QV_OK
                           : qv_fail(QV_ERR_NOMEM, "no memory for adapter slots");
    for (size_t i = 0; i < n_sites * (size_t)n_slots && pool->used_rank != NULL; i++)
        pool->used_rank[i] = max_rank; /* nothing is known yet: the first clear clears all */
    list_slice_starts(pool);
    for (int64_t layer = QV_GLOBAL; layer < layout->config->n_layers; layer++) {
        for (int p = 0; p < QV_PROJ_COUNT && status == QV_OK; p++) {
            if (qv_layout_has(layout, layer, (qv_proj)p) && has_room(&layout->proj[p]))
                status = new_site(pool, layer, (qv_proj)p);
        }
    }
    if (status == QV_OK)
        link_sites(pool);
    if (status == QV_OK)
        status = qv_lora_parts_new(be, layout, n_slots, max_rank, max_parts, &pool->parts);
    if (status != QV_OK) {
        qv_lora_pool_free(pool);
        return status;
    }
    *out = pool;
    return QV_OK;
}

void qv_lora_pool_free(qv_lora_pool *pool)
{
    if (pool == NULL)
        return;
    size_t n_sites = (size_t)(pool->layout->config->n_layers + 1) * QV_PROJ_COUNT;
    for (size_t i = 0; i < n_sites && pool->sites != NULL; i++) {
        qv_backend_free(pool->be, pool->sites[i].a.data);
        qv_backend_free(pool->be, pool->sites[i].b.data);
        qv_backend_free(pool->be, pool->sites[i].slices);
    }
    qv_lora_parts_free(pool->parts);
    free(pool->sites);
    free(pool->active);
    free(pool->used_rank);
    free(pool);
}

const qv_lora_site *qv_lora_pool_site(const qv_lora_pool *pool, int64_t layer, qv_proj proj)
{
    const qv_lora_site *site = &pool->sites[site_index(layer, proj)];
    return site->n_slots > 0 ? site : NULL;
}

const qv_lora_parts *qv_lora_pool_parts(const qv_lora_pool *pool)
{
    return pool->parts;
}

/* --- Slots ------------------------------------------------------------------------------------ */

/* Where a slot begins in a tensor whose dimension 0 is slots. */
static uint8_t *slot_data(const qv_tensor *tensor, int32_t slot)
{
    return (uint8_t *)tensor->data +
           (size_t)(slot * tensor->stride[0]) * qv_dtype_size(tensor->dtype);
}

static uint8_t *slot_active(const qv_lora_pool *pool, size_t index, int32_t slot)
{
    return &pool->active[index * (size_t)pool->n_slots + (size_t)slot];
}

static int32_t *slot_used_rank(const qv_lora_pool *pool, size_t index, int32_t slot)
{
    return &pool->used_rank[index * (size_t)pool->n_slots + (size_t)slot];
}

/* Zero what the last adapter wrote: of a slot with room for rank 64 and an adapter of rank 8, an
 * eighth. */
static qv_status clear_site(qv_lora_pool *pool, qv_upload *up, size_t index, int32_t slot)
{
    const qv_lora_site *site = &pool->sites[index];
    size_t elem = qv_dtype_size(pool->dtype), rank = (size_t)*slot_used_rank(pool, index, slot);
    *slot_active(pool, index, slot) = 0;
    if (rank == 0)
        return QV_OK;
    for (int32_t plane = 0; plane < site->n_slices; plane++)
        QV_TRY(qv_upload_zero(
            up, slot_data(&site->a, slot) + (size_t)(plane * site->a.stride[1]) * elem,
            rank * (size_t)site->n_in * elem));
    QV_TRY(qv_upload_zero(up, slot_data(&site->b, slot), rank * (size_t)site->n_out * elem));
    return qv_upload_zero(up, site->slices + (int64_t)slot * site->n_slices,
                          (size_t)site->n_slices * sizeof *site->slices);
}

static qv_status clear_sites(qv_lora_pool *pool, qv_upload *up, int32_t slot)
{
    size_t n_sites = (size_t)(pool->layout->config->n_layers + 1) * QV_PROJ_COUNT;
    for (size_t i = 0; i < n_sites; i++)
        if (pool->sites[i].n_slots > 0)
            QV_TRY(clear_site(pool, up, i, slot));
    return qv_lora_parts_leave(pool->parts, up, slot);
}

qv_status qv_lora_pool_clear(qv_lora_pool *pool, int32_t slot)
{
    QV_ASSERT(slot >= 0 && slot < pool->n_slots);
    size_t n_sites = (size_t)(pool->layout->config->n_layers + 1) * QV_PROJ_COUNT;
    qv_upload up;
    QV_TRY(qv_upload_begin(pool->be, &up));
    qv_status status = clear_sites(pool, &up, slot), end = qv_upload_end(&up);
    QV_TRY(status != QV_OK ? status : end);
    for (size_t i = 0; i < n_sites; i++)
        *slot_used_rank(pool, i, slot) = 0;
    qv_lora_parts_free_block(pool->parts, slot);
    return QV_OK;
}

/* out[column][row] = in[row][column], by tiles whose lines stay in the cache. */
#define DEFINE_TRANSPOSE(name, type)                                                               \
    static void name(const type *in, int64_t n_rows, int64_t n_columns, type *out)                 \
    {                                                                                              \
        enum { TILE = 16 };                                                                        \
        for (int64_t row0 = 0; row0 < n_rows; row0 += TILE) {                                      \
            int64_t row_end = row0 + TILE < n_rows ? row0 + TILE : n_rows;                         \
            for (int64_t column = 0; column < n_columns; column++)                                 \
                for (int64_t row = row0; row < row_end; row++)                                     \
                    out[column * n_rows + row] = in[row * n_columns + column];                     \
        }                                                                                          \
    }
DEFINE_TRANSPOSE(transpose_16, uint16_t)
DEFINE_TRANSPOSE(transpose_32, uint32_t)

/* B, [n_rows, rank] in the file, into the slot's transposed one: row r gets column r. `staging` has
 * room for all of it. */
static qv_status write_b(const qv_lora_pool *pool, qv_upload *up, const qv_lora_site *site,
                         int32_t slot, const qv_lora_item *item, uint8_t *staging)
{
    size_t elem = qv_dtype_size(pool->dtype);
    int64_t rank = item->rank, n_rows = item->target.n_rows;
    int64_t first_row = site->slice_start[item->target.first];
    if (elem == sizeof(uint16_t))
        transpose_16(item->b, n_rows, rank, (uint16_t *)staging);
    else
        transpose_32(item->b, n_rows, rank, (uint32_t *)staging);
    for (int64_t r = 0; r < rank; r++)
        QV_TRY(qv_upload_copy(
            up, slot_data(&site->b, slot) + (size_t)(r * site->n_out + first_row) * elem,
            staging + (size_t)(r * n_rows) * elem, (size_t)n_rows * elem));
    return QV_OK;
}

static bool is_in_pool(const qv_lora_pool *pool, const qv_lora_item *item)
{
    return !item->embedding && !pool->layout->proj[item->target.proj].experts;
}

/* One item into an empty slot: A into the plane of its first slice, B, and its slices' entries. */
static qv_status write_item(qv_lora_pool *pool, qv_upload *up, int32_t slot,
                            const qv_lora_item *item, uint8_t *staging)
{
    if (!is_in_pool(pool, item)) /* written with the other parts */
        return QV_OK;
    size_t index = site_index(item->layer, item->target.proj);
    const qv_lora_site *site = &pool->sites[index];
    const qv_lora_target *target = &item->target;
    QV_ASSERT(site->n_slots > 0 && item->rank <= pool->max_rank && target->n_in == site->n_in);

    int32_t *used = slot_used_rank(pool, index, slot);
    *used = item->rank > *used ? item->rank : *used; /* before anything is written */

    size_t elem = qv_dtype_size(pool->dtype);
    uint8_t *plane = slot_data(&site->a, slot) + (size_t)(target->first * site->a.stride[1]) * elem;
    QV_TRY(qv_upload_copy(up, plane, item->a, (size_t)(item->rank * site->n_in) * elem));
    QV_TRY(write_b(pool, up, site, slot, item, staging));

    qv_lora_slice slices[QV_MAX_SLICES];
    for (int32_t i = 0; i < target->n; i++)
        slices[i] =
            (qv_lora_slice){.plane = target->first, .rank = item->rank, .scale = item->scale};
    QV_TRY(qv_upload_copy(up, site->slices + (int64_t)slot * site->n_slices + target->first, slices,
                          (size_t)target->n * sizeof *slices));
    *slot_active(pool, index, slot) = 1;
    return QV_OK;
}

/* All of an adapter into an empty slot, in one upload. */
static qv_status write_adapter(qv_lora_pool *pool, int32_t slot, const qv_adapter *adapter,
                               uint8_t *staging)
{
    qv_upload up;
    QV_TRY(qv_lora_parts_reserve(pool->parts, slot, adapter));
    QV_TRY(qv_upload_begin(pool->be, &up));
    qv_status status = QV_OK;
    for (size_t i = 0; i < qv_adapter_n_items(adapter) && status == QV_OK; i++)
        status = write_item(pool, &up, slot, qv_adapter_item(adapter, i), staging);
    if (status == QV_OK)
        status = qv_lora_parts_install(pool->parts, &up, slot, adapter);
    qv_status end = qv_upload_end(&up);
    return status != QV_OK ? status : end;
}

qv_status qv_lora_pool_install(qv_lora_pool *pool, int32_t slot, const qv_adapter *adapter)
{
    QV_TRY(qv_lora_pool_clear(pool, slot));
    int64_t largest_b = 1;
    for (size_t i = 0; i < qv_adapter_n_items(adapter); i++) {
        const qv_lora_item *item = qv_adapter_item(adapter, i);
        int64_t n_elems = is_in_pool(pool, item) ? item->target.n_rows * item->rank : 0;
        largest_b = n_elems > largest_b ? n_elems : largest_b;
    }
    uint8_t *staging = malloc((size_t)largest_b * qv_dtype_size(pool->dtype));
    if (staging == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to install an adapter");
    qv_status status = write_adapter(pool, slot, adapter, staging);
    free(staging);
    if (status != QV_OK)
        (void)qv_lora_pool_clear(pool, slot); /* the first failure is the one to report */
    return status;
}

/* --- Made-up adapters ------------------------------------------------------------------------- */

static qv_status make_up_site(qv_lora_pool *pool, size_t index, const qv_proj_shape *shape,
                              int32_t rank)
{
    qv_lora_site *site = &pool->sites[index];
    int64_t n_a = (int64_t)pool->n_slots * site->a.stride[0];
    int64_t n_b = (int64_t)pool->n_slots * site->b.stride[0];
    QV_TRY(qv_backend_fill(pool->be, site->a.data, pool->dtype, n_a, 0, 0.02f, 2 * index));
    QV_TRY(qv_backend_fill(pool->be, site->b.data, pool->dtype, n_b, 0, 0.02f, 2 * index + 1));
    qv_lora_slice slices[QV_MAX_SLICES];
    for (int32_t i = 0; i < site->n_slices; i++)
        slices[i] = (qv_lora_slice){.plane = shape->slices[i].plane, .rank = rank, .scale = 1};
    for (int32_t slot = 0; slot < pool->n_slots; slot++) {
        QV_TRY(qv_backend_upload(pool->be, site->slices + (int64_t)slot * site->n_slices, slices,
                                 (size_t)site->n_slices * sizeof *slices));
        *slot_used_rank(pool, index, slot) = pool->max_rank;
        *slot_active(pool, index, slot) = 1;
    }
    return QV_OK;
}

qv_status qv_lora_pool_make_up(qv_lora_pool *pool, int32_t rank)
{
    if (rank < 1 || rank > pool->max_rank)
        return qv_fail(QV_ERR_LIMIT, "made-up adapters of rank %d in slots for rank %d", rank,
                       pool->max_rank);
    for (int64_t layer = 0; layer < pool->layout->config->n_layers; layer++)
        for (int p = 0; p < QV_PROJ_COUNT; p++) {
            size_t index = site_index(layer, (qv_proj)p);
            if (pool->sites[index].n_slots > 0 && p != QV_PROJ_ROUTER)
                QV_TRY(make_up_site(pool, index, &pool->layout->proj[p], rank));
        }
    return QV_OK;
}
