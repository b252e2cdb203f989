#include "models/sampling.h"

#include <stdlib.h>

qv_status qv_sampling_init(qv_sampling *s, int32_t max_rows)
{
    size_t n = (size_t)max_rows;
    *s = (qv_sampling){.long_rows = calloc(n, sizeof *s->long_rows),
                       .long_row = calloc(n, sizeof *s->long_row),
                       .long_results = calloc(n, sizeof *s->long_results)};
    if (s->long_rows == NULL || s->long_row == NULL || s->long_results == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the sampling of %d rows", max_rows);
    return QV_OK;
}

void qv_sampling_deinit(qv_sampling *s)
{
    free(s->long_rows);
    free(s->long_row);
    free(s->long_results);
    *s = (qv_sampling){.rows = NULL};
}

qv_status qv_sampling_plan(qv_sampling *s, const qv_sample_row *rows, int32_t n_rows,
                           int32_t n_valid, int64_t n_vocab, qv_sample_result *results)
{
    QV_TRY(qv_sample_check_rows(rows, n_rows, n_vocab));
    s->rows = rows;
    s->results = results;
    s->n_rows = n_rows;
    s->n_valid = n_valid;
    s->n_long = 0;
    s->shape = qv_shortlist_shape_of(rows, n_rows, n_valid);
    for (int32_t i = 0; i < n_rows; i++) {
        if (qv_sample_row_is_short(&rows[i], n_valid))
            continue;
        s->long_row[s->n_long] = i;
        s->long_rows[s->n_long++] = rows[i];
    }
    return QV_OK;
}

/* A row that cannot be sampled has said so in its result; anything else is an error. */
static qv_status but_for_rows(qv_status status, const qv_sample_result *results, int32_t n)
{
    if (status != QV_ERR_INTERNAL && status != QV_ERR_ARG)
        return status;
    for (int32_t i = 0; i < n; i++)
        if (results[i].token < 0)
            return QV_OK;
    return status;
}

/* The rows that need it, gathered on rank 0 one behind the other: a run of neighbours at a time. */
static qv_status gather_long(const qv_sampling *s, qv_backend *be, qv_tensor part, qv_tensor whole)
{
    for (int32_t i = 0, n; i < s->n_long; i += n) {
        for (n = 1; i + n < s->n_long && s->long_row[i + n] == s->long_row[i] + n;)
            n++;
        QV_TRY(qv_op_gather_cols(be, qv_tensor_rows(part, s->long_row[i], n),
                                 qv_tensor_rows(whole, i, n)));
    }
    return QV_OK;
}

qv_status qv_sampling_run(const qv_sampling *s, qv_backend *be, const qv_layout *layout,
                          const qv_buffers *buffers, qv_tensor part)
{
    int32_t n_ranks = layout->shard.n_ranks, rank = layout->shard.rank;
    int64_t n_vocab = layout->config->vocab, words = qv_shortlist_words(s->shape);
    const qv_shortlist_part where = {.first = layout->proj[QV_PROJ_LM_HEAD].slices[0].src_row,
                                     .n_vocab = n_vocab,
                                     .n_valid = s->n_valid,
                                     .shape = s->shape};
    qv_tensor list = qv_tensor_2d(buffers->data[QV_BUF_SHORTLIST], QV_F32, s->n_rows, words);
    qv_tensor lists =
        qv_tensor_2d(buffers->data[QV_BUF_SHORTLISTS], QV_F32, s->n_rows, words * n_ranks);
    qv_tensor whole = qv_tensor_2d(buffers->data[QV_BUF_LOGITS], QV_F32, s->n_long, n_vocab);
    bool any_short = s->n_long < s->n_rows;
    if (any_short) {
        QV_TRY(qv_op_shortlist(be, part, &where, s->rows, list));
        QV_TRY(qv_op_gather_cols(be, list, lists));
    }
    QV_TRY(gather_long(s, be, part, whole));
    if (rank > 0)
        return QV_OK;
    if (any_short)
        QV_TRY(but_for_rows(qv_op_merge_shortlists(be, lists, n_ranks, &where, s->rows, s->results),
                            s->results, s->n_rows));
    if (s->n_long > 0)
        QV_TRY(but_for_rows(qv_op_sample(be, whole, s->n_valid, s->long_rows, s->long_results),
                            s->long_results, s->n_long));
    for (int32_t i = 0; i < s->n_long; i++)
        s->results[s->long_row[i]] = s->long_results[i];
    return QV_OK;
}
