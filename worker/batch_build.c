#include "worker/batch_build.h"

#include <stdlib.h>
#include <string.h>

struct qv_batch_builder {
    qv_batch_limits limits;
    qv_batch batch; /* what is handed out; its pointers are those below */

    int32_t *block;           /* owns all of them */
    int32_t *token, *pos;     /* [max_tokens] */
    int32_t *seq_start;       /* [max_seqs + 1] */
    int32_t *state_slot;      /* [max_seqs] */
    int32_t *seg_start;       /* [max_seqs + 1] */
    int32_t *seg_slot;        /* [max_seqs] */
    int32_t *logit_row;       /* [max_logits] */
    int32_t *logit_seg_start; /* [max_seqs + 1] */
    int32_t *logit_seg_slot;  /* [max_seqs] */
    int32_t *page_table;      /* [max_seqs, max_seq_pages] */
};

qv_status qv_batch_builder_new(const qv_batch_limits *limits, qv_batch_builder **out)
{
    qv_batch_builder *b = calloc(1, sizeof *b);
    if (b == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a batch builder");
    b->limits = *limits;

    size_t seqs = (size_t)limits->max_seqs;
    const struct {
        int32_t **array;
        size_t count;
    } parts[] = {
        {&b->token, (size_t)limits->max_tokens},
        {&b->pos, (size_t)limits->max_tokens},
        {&b->seq_start, seqs + 1},
        {&b->state_slot, seqs},
        {&b->seg_start, seqs + 1},
        {&b->seg_slot, seqs},
        {&b->logit_row, (size_t)limits->max_logits},
        {&b->logit_seg_start, seqs + 1},
        {&b->logit_seg_slot, seqs},
        {&b->page_table, seqs * (size_t)limits->max_seq_pages},
    };
    size_t total = 0;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        total += parts[i].count;
    b->block = calloc(total, sizeof *b->block);
    if (b->block == NULL) {
        free(b);
        return qv_fail(QV_ERR_NOMEM, "no memory for batches of %d tokens of %d sequences",
                       limits->max_tokens, limits->max_seqs);
    }
    int32_t *next = b->block;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        *parts[i].array = next;
        next += parts[i].count;
    }
    *out = b;
    return QV_OK;
}

void qv_batch_builder_free(qv_batch_builder *builder)
{
    if (builder == NULL)
        return;
    free(builder->block);
    free(builder);
}

/* The tokens of one item. */
static void add_tokens(qv_batch_builder *b, const qv_plan_item *item)
{
    const qv_sequence *seq = item->seq;
    qv_batch *batch = &b->batch;
    memcpy(b->token + batch->n_tokens, seq->tokens + seq->n_computed,
           (size_t)item->n_tokens * sizeof *b->token);
    for (int32_t i = 0; i < item->n_tokens; i++)
        b->pos[batch->n_tokens + i] = seq->n_computed + i;
    batch->n_tokens += item->n_tokens;
}

/* The rows of one item that need logits; its tokens start at `first`. */
static void add_logit_rows(qv_batch_builder *b, const qv_plan_item *item, int32_t first)
{
    qv_batch *batch = &b->batch;
    int32_t n_computed = item->seq->n_computed;
    for (int32_t pos = item->rows.score_from; pos < item->rows.score_to; pos++)
        b->logit_row[batch->n_logits++] = first + pos - n_computed;
    if (item->rows.choose)
        b->logit_row[batch->n_logits++] = first + item->n_tokens - 1;
}

/* Extend the last segment to `end` if it has the same slot, else begin one at `start`. */
static void add_segment(int32_t *seg_start, int32_t *seg_slot, int32_t *n_segs, int32_t start,
                        int32_t end, int32_t slot)
{
    if (start == end)
        return;
    if (*n_segs == 0 || seg_slot[*n_segs - 1] != slot) {
        seg_start[*n_segs] = start;
        seg_slot[(*n_segs)++] = slot;
    }
    seg_start[*n_segs] = end;
}

const qv_batch *qv_batch_build(qv_batch_builder *b, const qv_plan *plan)
{
    QV_ASSERT(plan->n_items <= b->limits.max_seqs && plan->n_tokens <= b->limits.max_tokens &&
              plan->n_logits <= b->limits.max_logits);
    qv_batch *batch = &b->batch;
    *batch = (qv_batch){
        .token = b->token,
        .pos = b->pos,
        .seq_start = b->seq_start,
        .page_table = b->page_table,
        .state_slot = b->state_slot,
        .seg_start = b->seg_start,
        .seg_slot = b->seg_slot,
        .logit_row = b->logit_row,
        .logit_seg_start = b->logit_seg_start,
        .logit_seg_slot = b->logit_seg_slot,
        .n_seqs = plan->n_items,
        .page_stride = 1,
    };
    b->seq_start[0] = b->seg_start[0] = b->logit_seg_start[0] = 0;
    for (int32_t i = 0; i < plan->n_items; i++)
        if (plan->items[i].seq->n_pages > batch->page_stride)
            batch->page_stride = plan->items[i].seq->n_pages;

    for (int32_t i = 0; i < plan->n_items; i++) {
        const qv_plan_item *item = &plan->items[i];
        const qv_sequence *seq = item->seq;
        QV_ASSERT(i == 0 || plan->items[i - 1].seq->adapter_slot <= seq->adapter_slot);
        int32_t first = batch->n_tokens, first_logit = batch->n_logits;
        add_tokens(b, item);
        add_logit_rows(b, item, first);
        add_segment(b->seg_start, b->seg_slot, &batch->n_segs, first, batch->n_tokens,
                    seq->adapter_slot);
        add_segment(b->logit_seg_start, b->logit_seg_slot, &batch->n_logit_segs, first_logit,
                    batch->n_logits, seq->adapter_slot);
        b->seq_start[i + 1] = batch->n_tokens;
        b->state_slot[i] = seq->state_slot;
        memcpy(b->page_table + (int64_t)i * batch->page_stride, seq->pages,
               (size_t)seq->n_pages * sizeof *b->page_table);
    }
    return batch;
}
