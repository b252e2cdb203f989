#include "models/lora_cut.h"

#include "models/lora_reader.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    const qv_layout *from, *to;
    size_t elem;
    qv_arena *arena; /* of the result */
} cut;

static void *take(const cut *c, int64_t n)
{
    return qv_arena_alloc(c->arena, (size_t)n * c->elem, 64);
}

/* This rank's experts of a side: `n` matrices of `elems` numbers, or one for all. */
static const uint8_t *own_experts(const cut *c, const qv_lora_item *item, const void *data,
                                  int32_t *n, int64_t elems)
{
    const uint8_t *first = data;
    if (item->expert >= 0 || *n == 1)
        return first;
    *n = (int32_t)c->to->n_experts;
    return first + (size_t)(c->to->first_expert * elems) * c->elem;
}

/* Columns of A for a projection that is split by its input. */
static bool cut_a(const cut *c, const qv_proj_shape *shape, qv_lora_item *item)
{
    int64_t n_in = item->target.n_in, n_own = shape->n_in, rows = item->n_a * (int64_t)item->rank;
    if (n_own == n_in)
        return true;
    const uint8_t *from =
        (const uint8_t *)item->a + (size_t)shape->slices[item->target.first].src_col * c->elem;
    uint8_t *to = take(c, rows * n_own);
    for (int64_t r = 0; to != NULL && r < rows; r++)
        memcpy(to + (size_t)(r * n_own) * c->elem, from + (size_t)(r * n_in) * c->elem,
               (size_t)n_own * c->elem);
    item->a = to;
    item->target.n_in = n_own;
    return to != NULL;
}

/* Rows of B for a projection that is split by its output: of every slice its part. */
static bool cut_b(const cut *c, const qv_proj_shape *whole, const qv_proj_shape *shape,
                  qv_lora_item *item)
{
    int32_t first = item->target.first, end = first + item->target.n;
    int64_t n_own = 0, n_rows = item->target.n_rows, rank = item->rank;
    for (int32_t i = first; i < end; i++)
        n_own += shape->slices[i].n_rows;
    if (n_own == n_rows)
        return true;
    uint8_t *copy = take(c, item->n_b * n_own * rank), *to = copy;
    for (int32_t m = 0; copy != NULL && m < item->n_b; m++) {
        int64_t row = m * n_rows; /* where the slice begins in all of B's rows */
        for (int32_t i = first; i < end; i++) {
            size_t bytes = (size_t)(shape->slices[i].n_rows * rank) * c->elem;
            memcpy(to,
                   (const uint8_t *)item->b +
                       (size_t)((row + shape->slices[i].part_row) * rank) * c->elem,
                   bytes);
            to += bytes;
            row += whole->slices[i].n_rows;
        }
    }
    item->b = copy;
    item->target.n_rows = n_own;
    return copy != NULL;
}

/* False: no memory. *has says whether the rank has anything of the item. */
static bool cut_item(const cut *c, const qv_lora_item *whole, qv_lora_item *out, bool *has)
{
    *out = *whole;
    *has = true;
    if (whole->embedding) /* ranks have the whole embedding's delta: its output is not split */
        return true;
    const qv_proj_shape *from = &c->from->proj[whole->target.proj];
    const qv_proj_shape *to = &c->to->proj[whole->target.proj];
    if (from->experts) {
        int64_t e = whole->expert - c->to->first_expert;
        *has = whole->expert < 0 || (e >= 0 && e < c->to->n_experts);
        if (!*has)
            return true;
        out->expert = whole->expert < 0 ? -1 : (int32_t)e;
        out->a = own_experts(c, whole, whole->a, &out->n_a, whole->rank * whole->target.n_in);
        out->b = own_experts(c, whole, whole->b, &out->n_b, whole->target.n_rows * whole->rank);
    }
    return cut_a(c, to, out) && cut_b(c, from, to, out);
}

qv_status qv_adapter_cut(const qv_adapter *whole, const qv_layout *from, const qv_layout *to,
                         qv_dtype dtype, qv_adapter **out)
{
    qv_adapter *adapter = calloc(1, sizeof *adapter);
    if (adapter == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a rank's part of an adapter");
    adapter->max_rank = whole->max_rank;
    memcpy(adapter->digest, whole->digest, sizeof adapter->digest);
    cut c = {.from = from, .to = to, .elem = qv_dtype_size(dtype), .arena = &adapter->arena};
    adapter->items = QV_ARENA_ARRAY(&adapter->arena, qv_lora_item, whole->n_items + 1);
    bool ok = adapter->items != NULL;
    for (size_t i = 0; ok && i < whole->n_items; i++) {
        bool has;
        ok = cut_item(&c, &whole->items[i], &adapter->items[adapter->n_items], &has);
        adapter->n_items += has;
    }
    if (!ok) {
        qv_adapter_close(adapter);
        return qv_fail(QV_ERR_NOMEM, "no memory for a rank's part of an adapter");
    }
    *out = adapter;
    return QV_OK;
}
