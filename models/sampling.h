/* Sampling the rows of a step whose logits lie with several ranks, a part of the vocabulary each.
 *
 * Rows whose choice depends on few tokens (greedy, top-k, scored) cross over as shortlists; of the
 * others the logits are gathered on rank 0. Rank 0 has the results. Planned once a step, then run
 * by every rank, on its thread.
 */
#ifndef QV_MODELS_SAMPLING_H
#define QV_MODELS_SAMPLING_H

#include "models/blocks.h"

typedef struct {
    const qv_sample_row *rows; /* [n_rows], borrowed */
    qv_sample_result *results; /* [n_rows], borrowed */
    int32_t n_rows, n_valid;
    int32_t n_long;           /* rows that need all logits */
    qv_sample_row *long_rows; /* [n_long]; owned, as below: [most rows of a step] */
    int32_t *long_row;        /* [n_long] which they are */
    qv_sample_result *long_results;
    qv_shortlist_shape shape; /* of the others */
} qv_sampling;

/* For steps of up to max_rows. Errors: NOMEM. */
qv_status qv_sampling_init(qv_sampling *sampling, int32_t max_rows);
void qv_sampling_deinit(qv_sampling *sampling);

/* What this step's rows need. Errors: ARG (a parameter; names the row). */
qv_status qv_sampling_plan(qv_sampling *sampling, const qv_sample_row *rows, int32_t n_rows,
                           int32_t n_valid, int64_t n_vocab, qv_sample_result *results);

/* This rank's share, from its `part` of the logits (changed in place). A row that cannot be sampled
 * is no error: qv_sample_check_results finds it. Errors: DEVICE, LIMIT. */
qv_status qv_sampling_run(const qv_sampling *sampling, qv_backend *be, const qv_layout *layout,
                          const qv_buffers *buffers, qv_tensor part);

#endif
