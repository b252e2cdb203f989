/* LoRA over adapter segments, in two passes: shrink, X1[t][plane] = A[plane] x[t], and expand,
 * y[t][rows of slice] += scale * B X1[t][plane] (lora_tiles.h). The result of a token does not
 * depend on its segment's length.
 */
#include "ops/cpu/lora_tiles.h"

typedef struct {
    const qv_lora_site *site;
    const int32_t *seg_start, *seg_slot;
    int32_t n_segs;
    qv_tensor x, y;
    float *scratch; /* X1 [n][n_slices][max_rank] */
} lora_ctx;

static const qv_lora_slice *slices_of(const lora_ctx *c, int32_t slot)
{
    return c->site->slices + (int64_t)slot * c->site->n_slices;
}

static bool is_active(const lora_ctx *c, int32_t seg)
{
    int32_t slot = c->seg_slot[seg];
    return slot >= 0 && c->site->slot_active[slot];
}

/* Ranks of a plane that some slice reads. */
static int32_t plane_rank(const lora_ctx *c, int32_t slot, int32_t plane)
{
    const qv_lora_slice *slices = slices_of(c, slot);
    int32_t rank = 0;
    for (int32_t i = 0; i < c->site->n_slices; i++)
        if (slices[i].plane == plane && slices[i].rank > rank)
            rank = slices[i].rank;
    return rank;
}

static float *x1_of(const lora_ctx *c, int64_t t, int32_t plane)
{
    return c->scratch + (t * c->site->n_slices + plane) * c->site->max_rank;
}

/* --- Shrink ------------------------------------------------------------------------------- */

static int64_t n_shrink_items(const lora_ctx *c, int32_t seg)
{
    int64_t n = c->seg_start[seg + 1] - c->seg_start[seg];
    return is_active(c, seg)
               ? (n + QV_LORA_SHRINK_TOKENS - 1) / QV_LORA_SHRINK_TOKENS * c->site->n_slices
               : 0;
}

static void shrink_item(const lora_ctx *c, int32_t seg, int64_t item)
{
    const qv_lora_site *site = c->site;
    int32_t slot = c->seg_slot[seg], plane = (int32_t)(item % site->n_slices);
    int64_t t = c->seg_start[seg] + item / site->n_slices * QV_LORA_SHRINK_TOKENS;
    int64_t left = c->seg_start[seg + 1] - t;
    int64_t n = left < QV_LORA_SHRINK_TOKENS ? left : QV_LORA_SHRINK_TOKENS;
    const float *x[QV_LORA_SHRINK_TOKENS];
    float *x1[QV_LORA_SHRINK_TOKENS];
    for (int64_t i = 0; i < n; i++) {
        x[i] = qv_row2(c->x, t + i);
        x1[i] = x1_of(c, t + i, plane);
    }
    int32_t rank = plane_rank(c, slot, plane);
    int64_t offset = ((int64_t)slot * site->n_slices + plane) * site->max_rank * site->n_in;
    const char *a = (const char *)site->a.data + offset * (site->a.dtype == QV_F32 ? 4 : 2);
    qv_lora_shrink(site->a.dtype, a, site->n_in, rank, n, x, x1);
}

/* --- Expand ------------------------------------------------------------------------------- */

static int64_t n_row_blocks(const lora_ctx *c)
{
    return (c->site->n_out + QV_LORA_EXPAND_ROWS - 1) / QV_LORA_EXPAND_ROWS;
}

static int64_t n_expand_items(const lora_ctx *c, int32_t seg)
{
    int64_t n = c->seg_start[seg + 1] - c->seg_start[seg];
    return is_active(c, seg)
               ? (n + QV_LORA_EXPAND_TOKENS - 1) / QV_LORA_EXPAND_TOKENS * n_row_blocks(c)
               : 0;
}

static void expand_item(const lora_ctx *c, int32_t seg, int64_t item)
{
    const qv_lora_site *site = c->site;
    int32_t slot = c->seg_slot[seg];
    const qv_lora_slice *slices = slices_of(c, slot);
    int64_t row = item % n_row_blocks(c) * QV_LORA_EXPAND_ROWS, row_end = row + QV_LORA_EXPAND_ROWS;
    int64_t t = c->seg_start[seg] + item / n_row_blocks(c) * QV_LORA_EXPAND_TOKENS;
    int64_t left = c->seg_start[seg + 1] - t;
    int64_t n = left < QV_LORA_EXPAND_TOKENS ? left : QV_LORA_EXPAND_TOKENS;
    const float *x1[QV_LORA_EXPAND_TOKENS];
    float *y[QV_LORA_EXPAND_TOKENS];
    for (int64_t i = 0; i < n; i++)
        y[i] = qv_row2(c->y, t + i);
    int64_t offset = (int64_t)slot * site->max_rank * site->n_out;
    const char *b = (const char *)site->b.data + offset * (site->b.dtype == QV_F32 ? 4 : 2);
    for (int32_t k = 0; k < site->n_slices; k++) {
        int64_t first = site->slice_start[k] > row ? site->slice_start[k] : row;
        int64_t end = site->slice_start[k + 1] < row_end ? site->slice_start[k + 1] : row_end;
        if (slices[k].rank == 0 || first >= end)
            continue;
        for (int64_t i = 0; i < n; i++)
            x1[i] = x1_of(c, t + i, slices[k].plane);
        qv_lora_expand(site->b.dtype, b, site->n_out, slices[k].rank, slices[k].scale, n, x1, y,
                       first, end);
    }
}

/* --- Items -------------------------------------------------------------------------------- */

/* Items: segments, in each what `count` says. */
static void run_items(const lora_ctx *c, int64_t begin, int64_t end,
                      int64_t (*count)(const lora_ctx *, int32_t),
                      void (*run)(const lora_ctx *, int32_t, int64_t))
{
    int64_t base = 0;
    for (int32_t seg = 0; seg < c->n_segs && base < end; seg++) {
        int64_t n = count(c, seg);
        for (int64_t i = begin > base ? begin - base : 0; i < n && base + i < end; i++)
            run(c, seg, i);
        base += n;
    }
}

static void shrink_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    run_items(ctx, begin, end, n_shrink_items, shrink_item);
}

static void expand_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    run_items(ctx, begin, end, n_expand_items, expand_item);
}

qv_status QV_ISA(qv_cpu_lora)(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                              const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                              qv_tensor scratch, qv_tensor y)
{
    if (site->max_rank > QV_LORA_MAX_RANK)
        return qv_fail(QV_ERR_LIMIT, "lora: pool rank %d, but %d is possible", site->max_rank,
                       QV_LORA_MAX_RANK);
    lora_ctx c = {
        .site = site,
        .seg_start = seg_start,
        .seg_slot = seg_slot,
        .n_segs = n_segs,
        .x = x,
        .y = y,
        .scratch = scratch.data,
    };
    int64_t n_shrink = 0, n_expand = 0, shrink_work = 0, expand_work = 0;
    for (int32_t seg = 0; seg < n_segs; seg++) {
        if (!is_active(&c, seg))
            continue;
        int64_t n_tokens = seg_start[seg + 1] - seg_start[seg];
        n_shrink += n_shrink_items(&c, seg);
        n_expand += n_expand_items(&c, seg);
        for (int32_t i = 0; i < site->n_slices; i++) {
            const qv_lora_slice *slice = &slices_of(&c, seg_slot[seg])[i];
            int64_t n_rows = site->slice_start[i + 1] - site->slice_start[i];
            shrink_work += slice->rank * site->n_in * (n_tokens + 2);
            expand_work += slice->rank * n_rows * (n_tokens + 10);
        }
    }
    qv_pool *pool = qv_cpu(be)->pool;
    qv_pool_run(pool, n_shrink, n_shrink ? shrink_work / 20 / n_shrink : 0, shrink_items, &c);
    qv_pool_run(pool, n_expand, n_expand ? expand_work / 20 / n_expand : 0, expand_items, &c);
    return QV_OK;
}

qv_status QV_ISA(qv_cpu_lora_f32)(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                                  const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                                  qv_tensor scratch, qv_tensor y)
{
    return QV_ISA(qv_cpu_lora)(be, site, n_segs, seg_start, seg_slot, x, scratch, y);
}
