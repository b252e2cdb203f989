/* Plan to batch: the arrays that a step's ops read.
 *
 * All arrays lie in one block of staging memory, allocated once for the largest step, so that a
 * backend with memory of its own moves them in one copy. The page table is as wide as the step's
 * longest sequence needs. Engine thread.
 */
#ifndef QV_WORKER_BATCH_BUILD_H
#define QV_WORKER_BATCH_BUILD_H

#include "ops/batch.h"
#include "worker/scheduler.h"

typedef struct qv_batch_builder qv_batch_builder;

/* Bounds of one step. */
typedef struct {
    int32_t max_tokens, max_seqs, max_logits;
    int32_t max_seq_pages; /* pages of the longest sequence */
} qv_batch_limits;

/* Errors: NOMEM. */
qv_status qv_batch_builder_new(const qv_batch_limits *limits, qv_batch_builder **out);

/* free(NULL) is fine. */
void qv_batch_builder_free(qv_batch_builder *builder);

/* The batch of a plan, whose items are sorted by adapter slot. Rows of logits come item by item:
 * the rows that score the prompt, in order, then the one that chooses. Borrowed until the next
 * call. */
const qv_batch *qv_batch_build(qv_batch_builder *builder, const qv_plan *plan);

#endif
