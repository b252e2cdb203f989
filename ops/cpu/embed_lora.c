/* LoRA of the embedding: A is looked up instead of multiplied, so there is only the expansion. */
#include "ops/cpu/lora_tiles.h"

typedef struct {
    const qv_embed_lora_site *site;
    const int32_t *seg_start, *seg_slot, *ids;
    int32_t n_segs;
    qv_tensor y;
} embed_ctx;

static int64_t n_row_blocks(const embed_ctx *c)
{
    return (c->site->n_out + QV_LORA_EXPAND_ROWS - 1) / QV_LORA_EXPAND_ROWS;
}

/* Items of a segment: blocks of tokens, in each blocks of rows. */
static int64_t n_seg_items(const embed_ctx *c, int32_t seg)
{
    int32_t slot = c->seg_slot[seg];
    if (slot < 0 || !c->site->slot_active[slot] || c->site->slots[slot].rank == 0)
        return 0;
    int64_t n = c->seg_start[seg + 1] - c->seg_start[seg];
    return (n + QV_LORA_EXPAND_TOKENS - 1) / QV_LORA_EXPAND_TOKENS * n_row_blocks(c);
}

/* Row `id` of A; BF16 is widened into `wide`. */
static const float *look_up(const embed_ctx *c, const qv_embed_lora_slot *slot, int32_t id,
                            float *wide)
{
    QV_ASSERT(id >= 0 && id < c->site->n_vocab);
    int64_t offset = (int64_t)id * slot->max_rank;
    if (c->site->dtype == QV_F32)
        return (const float *)slot->a + offset;
    for (int32_t r = 0; r < slot->rank; r++)
        wide[r] = qv_bf16_to_f32(((const uint16_t *)slot->a)[offset + r]);
    return wide;
}

static void expand_item(const embed_ctx *c, int32_t seg, int64_t item)
{
    const qv_embed_lora_slot *slot = &c->site->slots[c->seg_slot[seg]];
    int64_t row = item % n_row_blocks(c) * QV_LORA_EXPAND_ROWS, end = row + QV_LORA_EXPAND_ROWS;
    int64_t t = c->seg_start[seg] + item / n_row_blocks(c) * QV_LORA_EXPAND_TOKENS;
    int64_t left = c->seg_start[seg + 1] - t;
    int64_t n = left < QV_LORA_EXPAND_TOKENS ? left : QV_LORA_EXPAND_TOKENS;
    const float *x1[QV_LORA_EXPAND_TOKENS];
    float *y[QV_LORA_EXPAND_TOKENS];
    float wide[QV_LORA_EXPAND_TOKENS][QV_LORA_MAX_RANK];
    for (int64_t i = 0; i < n; i++) {
        x1[i] = look_up(c, slot, c->ids[t + i], wide[i]);
        y[i] = qv_row2(c->y, t + i);
    }
    qv_lora_expand(c->site->dtype, slot->b, c->site->n_out, slot->rank, slot->scale, n, x1, y, row,
                   end < c->site->n_out ? end : c->site->n_out);
}

static void expand_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const embed_ctx *c = ctx;
    int64_t base = 0;
    for (int32_t seg = 0; seg < c->n_segs && base < end; seg++) {
        int64_t n = n_seg_items(c, seg);
        for (int64_t i = begin > base ? begin - base : 0; i < n && base + i < end; i++)
            expand_item(c, seg, i);
        base += n;
    }
}

qv_status QV_ISA(qv_cpu_embed_lora)(qv_backend *be, const qv_embed_lora_site *site, int32_t n_segs,
                                    const int32_t *seg_start, const int32_t *seg_slot,
                                    const int32_t *ids, qv_tensor y)
{
    if (site->max_rank > QV_LORA_MAX_RANK)
        return qv_fail(QV_ERR_LIMIT, "embed_lora: pool rank %d, but %d is possible", site->max_rank,
                       QV_LORA_MAX_RANK);
    embed_ctx c = {.site = site,
                   .seg_start = seg_start,
                   .seg_slot = seg_slot,
                   .ids = ids,
                   .n_segs = n_segs,
                   .y = y};
    int64_t n_items = 0;
    for (int32_t seg = 0; seg < n_segs; seg++)
        n_items += n_seg_items(&c, seg);
    qv_pool_run(qv_cpu(be)->pool, n_items, site->max_rank * QV_LORA_EXPAND_ROWS / 4, expand_items,
                &c);
    return QV_OK;
}
