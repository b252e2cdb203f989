#include "models/lora_parts.h"

#include "models/weights.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Experts' projections of a layer; the sites are listed two a layer. */
static const qv_proj expert_projs[] = {QV_PROJ_EXPERT_IN, QV_PROJ_EXPERT_OUT};
enum { N_EXPERT_PROJS = 2 };

typedef struct {
    void *data; /* of the backend; NULL: the slot has no part */
    uint64_t bytes;
} block;

struct qv_lora_parts {
    qv_backend *be; /* borrowed */
    const qv_layout *layout;
    int32_t n_slots, max_rank;
    qv_dtype dtype;
    uint64_t max_bytes;
    _Atomic uint64_t used; /* bytes of all blocks; a sum that orders nothing */
    block *blocks;         /* [n_slots] */
    int64_t slice_start[N_EXPERT_PROJS][QV_MAX_SLICES + 1];
    qv_moe_lora_site *experts; /* [n_layers, N_EXPERT_PROJS]; n_slots 0 = none */
    qv_embed_lora_site embedding;
    uint8_t *active; /* [n_layers * N_EXPERT_PROJS + 1, n_slots], the embedding last */
};

/* --- Groups ----------------------------------------------------------------------------------- */

/* The items of one site, which stand next to each other in an adapter, and what they need. */
typedef struct {
    size_t first, n; /* items */
    int32_t rank;    /* largest of them: spacing of planes */
    bool a_shared, b_shared;
    int64_t a_elems, b_elems; /* of all planes */
    int64_t n_slices;         /* entries of slices */
} group;

static bool has_part(const qv_layout *layout, const qv_lora_item *item)
{
    return item->embedding || layout->proj[item->target.proj].experts;
}

static bool same_site(const qv_lora_item *x, const qv_lora_item *y)
{
    return x->layer == y->layer && x->embedding == y->embedding && x->target.proj == y->target.proj;
}

static void size_group(const qv_layout *layout, const qv_lora_item *item, group *g)
{
    if (item->embedding) {
        g->a_elems = item->target.n_in * g->rank;
        g->b_elems = item->target.n_rows * g->rank;
        return;
    }
    const qv_proj_shape *shape = &layout->proj[item->target.proj];
    int64_t n_experts = layout->n_experts;
    g->a_elems = (g->a_shared ? 1 : n_experts) * shape->n_slices * g->rank * shape->n_in;
    g->b_elems = (g->b_shared ? 1 : n_experts) * shape->n_out * g->rank;
    g->n_slices = n_experts * shape->n_slices;
}

/* The next group from item *at on; false when there is none. A side is stored once when every item
 * of the site shares it. */
static bool next_group(const qv_layout *layout, const qv_adapter *adapter, size_t *at, group *g)
{
    size_t n = qv_adapter_n_items(adapter);
    while (*at < n && !has_part(layout, qv_adapter_item(adapter, *at)))
        (*at)++;
    if (*at == n)
        return false;
    const qv_lora_item *first = qv_adapter_item(adapter, *at);
    *g = (group){.first = *at, .a_shared = true, .b_shared = true};
    for (; *at < n && same_site(first, qv_adapter_item(adapter, *at)); (*at)++) {
        const qv_lora_item *item = qv_adapter_item(adapter, *at);
        bool all = item->expert < 0;
        g->n++;
        g->rank = item->rank > g->rank ? item->rank : g->rank;
        g->a_shared &= all && item->n_a == 1;
        g->b_shared &= all && item->n_b == 1;
    }
    size_group(layout, first, g);
    return true;
}

/* Parts of a block begin at multiples of 64. */
static uint64_t padded(uint64_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

static uint64_t group_bytes(const group *g, qv_dtype dtype)
{
    size_t elem = qv_dtype_size(dtype);
    return padded((uint64_t)g->a_elems * elem) + padded((uint64_t)g->b_elems * elem) +
           padded((uint64_t)g->n_slices * sizeof(qv_lora_slice));
}

uint64_t qv_lora_parts_bytes(const qv_layout *layout, const qv_adapter *adapter, qv_dtype dtype)
{
    uint64_t total = 0;
    group g;
    for (size_t at = 0; next_group(layout, adapter, &at, &g);)
        total += group_bytes(&g, dtype);
    return total;
}

uint64_t qv_lora_parts_most(const qv_layout *layout, int32_t rank, qv_dtype dtype)
{
    group embedding = {.a_elems = layout->config->vocab * rank,
                       .b_elems = layout->config->hidden * rank};
    uint64_t total = group_bytes(&embedding, dtype);
    for (int i = 0; i < N_EXPERT_PROJS; i++) {
        const qv_proj_shape *shape = &layout->proj[expert_projs[i]];
        qv_lora_item item = {.target = {.proj = expert_projs[i]}};
        group g = {.rank = rank};
        if (shape->n_slices == 0 || !shape->lora)
            continue;
        size_group(layout, &item, &g);
        total += group_bytes(&g, dtype) * (uint64_t)qv_layout_part_count(layout, shape->part);
    }
    return total;
}

/* --- Life ------------------------------------------------------------------------------------- */

static size_t n_expert_sites(const qv_lora_parts *parts)
{
    return (size_t)parts->layout->config->n_layers * N_EXPERT_PROJS;
}

static uint8_t *active_of(const qv_lora_parts *parts, size_t site)
{
    return parts->active + site * (size_t)parts->n_slots;
}

static qv_status new_expert_site(qv_lora_parts *parts, int64_t layer, int which)
{
    const qv_proj_shape *shape = &parts->layout->proj[expert_projs[which]];
    size_t index = (size_t)layer * N_EXPERT_PROJS + (size_t)which;
    qv_moe_lora_site *site = &parts->experts[index];
    void *slots;
    *site = (qv_moe_lora_site){.n_in = shape->n_in,
                               .n_out = shape->n_out,
                               .n_experts = (int32_t)parts->layout->n_experts,
                               .n_slices = shape->n_slices,
                               .n_slots = parts->n_slots,
                               .max_rank = parts->max_rank,
                               .dtype = parts->dtype,
                               .slice_start = parts->slice_start[which],
                               .slot_active = active_of(parts, index)};
    QV_TRY(qv_backend_alloc(parts->be, (size_t)parts->n_slots * sizeof *site->slots, &slots));
    site->slots = slots;
    return QV_OK;
}

static qv_status new_sites(qv_lora_parts *parts)
{
    const qv_layout *layout = parts->layout;
    for (int i = 0; i < N_EXPERT_PROJS; i++) {
        const qv_proj_shape *shape = &layout->proj[expert_projs[i]];
        for (int32_t s = 0; s < shape->n_slices; s++)
            parts->slice_start[i][s] = shape->slices[s].dst_row;
        parts->slice_start[i][shape->n_slices] = shape->n_out;
        for (int64_t layer = 0; layer < layout->config->n_layers; layer++) {
            if (qv_layout_has(layout, layer, expert_projs[i]) && shape->lora)
                QV_TRY(new_expert_site(parts, layer, i));
        }
    }
    qv_embed_lora_site *site = &parts->embedding;
    void *slots;
    *site = (qv_embed_lora_site){.n_vocab = layout->config->vocab,
                                 .n_out = layout->config->hidden,
                                 .n_slots = parts->n_slots,
                                 .max_rank = parts->max_rank,
                                 .dtype = parts->dtype,
                                 .slot_active = active_of(parts, n_expert_sites(parts))};
    QV_TRY(qv_backend_alloc(parts->be, (size_t)parts->n_slots * sizeof *site->slots, &slots));
    site->slots = slots;
    return QV_OK;
}

qv_status qv_lora_parts_new(qv_backend *be, const qv_layout *layout, int32_t n_slots,
                            int32_t max_rank, uint64_t max_bytes, qv_lora_parts **out)
{
    qv_lora_parts *parts = calloc(1, sizeof *parts);
    if (parts == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for adapter slots");
    parts->be = be;
    parts->layout = layout;
    parts->n_slots = n_slots;
    parts->max_rank = max_rank;
    parts->dtype = qv_backend_lora_dtype(be);
    parts->max_bytes = max_bytes;
    parts->blocks = calloc((size_t)n_slots, sizeof *parts->blocks);
    parts->experts = calloc(n_expert_sites(parts), sizeof *parts->experts);
    parts->active = calloc(n_expert_sites(parts) + 1, (size_t)n_slots);
    qv_status status = parts->blocks && parts->experts && parts->active
                           ? new_sites(parts)
                           : qv_fail(QV_ERR_NOMEM, "no memory for adapter slots");
    if (status != QV_OK) {
        qv_lora_parts_free(parts);
        return status;
    }
    *out = parts;
    return QV_OK;
}

void qv_lora_parts_free(qv_lora_parts *parts)
{
    if (parts == NULL)
        return;
    for (size_t i = 0; parts->experts != NULL && i < n_expert_sites(parts); i++)
        qv_backend_free(parts->be, parts->experts[i].slots);
    for (int32_t i = 0; parts->blocks != NULL && i < parts->n_slots; i++)
        qv_backend_free(parts->be, parts->blocks[i].data);
    qv_backend_free(parts->be, parts->embedding.slots);
    free(parts->experts);
    free(parts->blocks);
    free(parts->active);
    free(parts);
}

const qv_moe_lora_site *qv_lora_parts_experts(const qv_lora_parts *parts, int64_t layer,
                                              qv_proj proj)
{
    QV_ASSERT(layer >= 0);
    const qv_moe_lora_site *site =
        &parts->experts[layer * N_EXPERT_PROJS + (proj == QV_PROJ_EXPERT_OUT)];
    return site->n_slots > 0 ? site : NULL;
}

const qv_embed_lora_site *qv_lora_parts_embedding(const qv_lora_parts *parts)
{
    return &parts->embedding;
}

uint64_t qv_lora_parts_used(const qv_lora_parts *parts)
{
    return atomic_load_explicit(&parts->used, memory_order_relaxed);
}

/* --- Fill a group ----------------------------------------------------------------------------- */

/* A group while it is put together on the host. */
typedef struct {
    uint8_t *a, *b;
    qv_lora_slice *slices;
} image;

/* [rows, cols] to [cols, rows], rows of the result `to_stride` apart. */
static void transpose(size_t elem, const void *from, int64_t rows, int64_t cols, void *to,
                      int64_t to_stride)
{
    const uint16_t *from16 = from;
    const uint32_t *from32 = from;
    uint16_t *to16 = to;
    uint32_t *to32 = to;
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) {
            if (elem == 2)
                to16[j * to_stride + i] = from16[i * cols + j];
            else
                to32[j * to_stride + i] = from32[i * cols + j];
        }
    }
}

/* Matrix m of an item's side, of which there are n. */
static const uint8_t *matrix(const void *data, int64_t m, int32_t n, int64_t elems, size_t elem)
{
    return (const uint8_t *)data + (size_t)((n > 1 ? m : 0) * elems) * elem;
}

/* One item's A, B and entries for the experts that it has. */
static void draw_item(const qv_lora_parts *parts, const group *g, const qv_lora_item *item,
                      const image *out)
{
    const qv_proj_shape *shape = &parts->layout->proj[item->target.proj];
    const qv_lora_target *target = &item->target;
    size_t elem = qv_dtype_size(parts->dtype);
    int64_t n_experts = parts->layout->n_experts, rank = item->rank;
    int64_t first = item->expert < 0 ? 0 : item->expert;
    int64_t end = item->expert < 0 ? n_experts : first + 1;
    int64_t first_row = shape->slices[target->first].dst_row;
    for (int64_t e = first; e < (g->a_shared ? 1 : end); e++) {
        int64_t plane = (e * shape->n_slices + target->first) * g->rank * shape->n_in;
        memcpy(out->a + (size_t)plane * elem,
               matrix(item->a, e, item->n_a, rank * shape->n_in, elem),
               (size_t)(rank * shape->n_in) * elem);
    }
    for (int64_t e = first; e < (g->b_shared ? 1 : end); e++)
        transpose(elem, matrix(item->b, e, item->n_b, target->n_rows * rank, elem), target->n_rows,
                  rank, out->b + (size_t)(e * g->rank * shape->n_out + first_row) * elem,
                  shape->n_out);
    for (int64_t e = first; e < end; e++) {
        for (int32_t i = target->first; i < target->first + target->n; i++)
            out->slices[e * shape->n_slices + i] =
                (qv_lora_slice){.plane = target->first, .rank = item->rank, .scale = item->scale};
    }
}

/* The entry of a slot, which the ops read, once its parts are in place. */
static qv_status enter(qv_lora_parts *parts, qv_upload *up, int32_t slot, const group *g,
                       const qv_lora_item *item, const image *device)
{
    if (item->embedding) {
        qv_embed_lora_slot entry = {.a = device->a,
                                    .b = device->b,
                                    .max_rank = g->rank,
                                    .rank = item->rank,
                                    .scale = item->scale};
        QV_TRY(qv_upload_copy(up, &parts->embedding.slots[slot], &entry, sizeof entry));
        active_of(parts, n_expert_sites(parts))[slot] = 1;
        return QV_OK;
    }
    qv_moe_lora_slot entry = {.a = device->a,
                              .b = device->b,
                              .slices = device->slices,
                              .max_rank = g->rank,
                              .a_shared = g->a_shared,
                              .b_shared = g->b_shared};
    size_t index =
        (size_t)(item->layer * N_EXPERT_PROJS) + (item->target.proj == QV_PROJ_EXPERT_OUT);
    QV_TRY(qv_upload_copy(up, &parts->experts[index].slots[slot], &entry, sizeof entry));
    active_of(parts, index)[slot] = 1;
    return QV_OK;
}

static image image_at(const group *g, qv_dtype dtype, uint8_t *data)
{
    size_t elem = qv_dtype_size(dtype);
    uint8_t *b = data + padded((uint64_t)g->a_elems * elem);
    uint8_t *slices = b + padded((uint64_t)g->b_elems * elem);
    return (image){.a = data, .b = b, .slices = (qv_lora_slice *)(void *)slices};
}

/* Put a group together in `staging`, copy it to `device`, and enter it. */
static qv_status write_group(qv_lora_parts *parts, qv_upload *up, int32_t slot,
                             const qv_adapter *adapter, const group *g, uint8_t *staging,
                             uint8_t *device)
{
    const qv_lora_item *first = qv_adapter_item(adapter, g->first);
    image out = image_at(g, parts->dtype, staging);
    QV_ASSERT(g->rank <= parts->max_rank);
    memset(staging, 0, group_bytes(g, parts->dtype));
    for (size_t i = g->first; i < g->first + g->n && !first->embedding; i++)
        draw_item(parts, g, qv_adapter_item(adapter, i), &out);
    if (first->embedding) { /* A by token, B along the output */
        size_t elem = qv_dtype_size(parts->dtype);
        transpose(elem, first->a, first->rank, first->target.n_in, out.a, first->rank);
        transpose(elem, first->b, first->target.n_rows, first->rank, out.b, first->target.n_rows);
    }
    QV_TRY(qv_upload_copy(up, device, staging, group_bytes(g, parts->dtype)));
    image there = image_at(g, parts->dtype, device);
    return enter(parts, up, slot, g, first, &there);
}

/* --- Slots ------------------------------------------------------------------------------------ */

static qv_status reserve(qv_lora_parts *parts, uint64_t bytes)
{
    uint64_t before = atomic_fetch_add_explicit(&parts->used, bytes, memory_order_relaxed);
    if (bytes <= parts->max_bytes && before <= parts->max_bytes - bytes)
        return QV_OK;
    atomic_fetch_sub_explicit(&parts->used, bytes, memory_order_relaxed);
    return qv_fail(QV_ERR_LIMIT,
                   "the adapter's pairs of experts and of the embedding take %" PRIu64
                   " bytes; those of other slots take %" PRIu64 " of the %" PRIu64
                   " that adapter-memory allows",
                   bytes, before, parts->max_bytes);
}

qv_status qv_lora_parts_check(const qv_lora_parts *parts, const qv_adapter *adapter)
{
    uint64_t bytes = qv_lora_parts_bytes(parts->layout, adapter, parts->dtype);
    return bytes <= parts->max_bytes
               ? QV_OK
               : qv_fail(QV_ERR_LIMIT,
                         "its pairs of experts and of the embedding take %" PRIu64
                         " bytes, but adapter-memory allows %" PRIu64 " for all slots",
                         bytes, parts->max_bytes);
}

qv_status qv_lora_parts_reserve(qv_lora_parts *parts, int32_t slot, const qv_adapter *adapter)
{
    block *b = &parts->blocks[slot];
    QV_ASSERT(b->data == NULL);
    uint64_t bytes = qv_lora_parts_bytes(parts->layout, adapter, parts->dtype);
    if (bytes == 0)
        return QV_OK;
    QV_TRY(reserve(parts, bytes));
    b->bytes = bytes;
    return qv_backend_alloc(parts->be, bytes, &b->data);
}

qv_status qv_lora_parts_install(qv_lora_parts *parts, qv_upload *up, int32_t slot,
                                const qv_adapter *adapter)
{
    uint64_t largest = 0;
    group g;
    if (parts->blocks[slot].bytes == 0)
        return QV_OK;
    for (size_t at = 0; next_group(parts->layout, adapter, &at, &g);)
        largest = group_bytes(&g, parts->dtype) > largest ? group_bytes(&g, parts->dtype) : largest;
    uint8_t *staging = aligned_alloc(64, largest), *device = parts->blocks[slot].data;
    qv_status status = staging ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory to install an adapter");
    for (size_t at = 0; status == QV_OK && next_group(parts->layout, adapter, &at, &g);) {
        status = write_group(parts, up, slot, adapter, &g, staging, device);
        device += group_bytes(&g, parts->dtype);
    }
    free(staging);
    return status;
}

qv_status qv_lora_parts_leave(qv_lora_parts *parts, qv_upload *up, int32_t slot)
{
    size_t n = n_expert_sites(parts);
    for (size_t i = 0; i <= n; i++)
        active_of(parts, i)[slot] = 0;
    if (parts->blocks[slot].bytes == 0)
        return QV_OK;
    for (size_t i = 0; i < n; i++) {
        qv_moe_lora_slot *slots = parts->experts[i].slots;
        if (slots != NULL)
            QV_TRY(qv_upload_zero(up, &slots[slot], sizeof *slots));
    }
    return qv_upload_zero(up, &parts->embedding.slots[slot], sizeof *parts->embedding.slots);
}

void qv_lora_parts_free_block(qv_lora_parts *parts, int32_t slot)
{
    block *b = &parts->blocks[slot];
    if (b->data != NULL)
        qv_backend_free(parts->be, b->data);
    atomic_fetch_sub_explicit(&parts->used, b->bytes, memory_order_relaxed);
    *b = (block){.data = NULL};
}
