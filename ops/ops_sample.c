/* Sampling: checks of rows, and the shortlists of several parts of a vocabulary. */
#include "kernels/shortlist.h"
#include "ops/checks.h"

#include <math.h>

static qv_status check_ids(const char *what, int64_t row, const int32_t *ids, int32_t n,
                           int64_t n_vocab)
{
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= n_vocab)
            return qv_fail(QV_ERR_ARG, "sample: row %lld: %s %d is not below %lld", (long long)row,
                           what, ids[i], (long long)n_vocab);
    return QV_OK;
}

/* Of a row that chooses: the last of its tokens may be one that a row of another sampling chose. */
static qv_status check_tokens(int64_t i, const qv_sample_row *row, int64_t n_vocab)
{
    int32_t n = row->tokens ? row->n_tokens : 0;
    return check_ids("token", i, row->tokens, n > 0 && row->tokens[n - 1] < 0 ? n - 1 : n, n_vocab);
}

static qv_status check_sample_row(int64_t i, const qv_sample_row *row, int64_t n_vocab)
{
#define CHECK(cond, format, value)                                                                 \
    if (!(cond))                                                                                   \
    return qv_fail(QV_ERR_ARG, "sample: row %lld: " format, (long long)i, value)
    CHECK(row->target < n_vocab, "target %d is not in the vocabulary", row->target);
    CHECK(row->n_top <= QV_MAX_TOP_LOGPROBS, "%d alternatives", row->n_top);
    if (row->target >= 0)
        return QV_OK;
    CHECK(row->temperature >= 0 && isfinite(row->temperature), "temperature %g",
          (double)row->temperature);
    CHECK(row->top_k >= 0, "top_k %d", row->top_k);
    CHECK(row->top_p >= 0, "top_p %g", (double)row->top_p);
    CHECK(row->min_p >= 0, "min_p %g", (double)row->min_p);
    CHECK(row->repetition_penalty > 0, "repetition_penalty %g", (double)row->repetition_penalty);
    CHECK(isfinite(row->presence_penalty), "presence_penalty %g", (double)row->presence_penalty);
    CHECK(isfinite(row->frequency_penalty), "frequency_penalty %g", (double)row->frequency_penalty);
    CHECK(row->n_prompt >= 0 && row->n_prompt <= row->n_tokens, "%d prompt tokens", row->n_prompt);
    CHECK(row->n_banned >= 0, "%d banned tokens", row->n_banned);
#undef CHECK
    QV_TRY(check_tokens(i, row, n_vocab));
    return check_ids("banned token", i, row->banned, row->n_banned, n_vocab);
}

qv_status qv_sample_check_rows(const qv_sample_row *rows, int64_t n_rows, int64_t n_vocab)
{
    for (int64_t i = 0; i < n_rows; i++)
        QV_TRY(check_sample_row(i, &rows[i], n_vocab));
    return QV_OK;
}

qv_status qv_op_sample_begin(qv_backend *be, qv_tensor logits, int32_t n_valid,
                             const qv_sample_row *rows)
{
    EXPECT("sample", logits, QV_F32, ANY, ANY);
    if (n_valid <= 0 || n_valid > logits.shape[1])
        return qv_fail(QV_ERR_SHAPE, "sample: %d valid tokens of %lld columns", n_valid,
                       (long long)logits.shape[1]);
    if (be->n_samplings == QV_MAX_SAMPLINGS)
        return qv_fail(QV_ERR_LIMIT, "sample: %d samplings have not ended", QV_MAX_SAMPLINGS);
    QV_TRY(qv_sample_check_rows(rows, logits.shape[0], logits.shape[1]));
    QV_TRY(CALL(sample_begin, be, logits, n_valid, rows));
    be->n_samplings++;
    return QV_OK;
}

qv_status qv_op_sample_end(qv_backend *be, qv_sample_result *results)
{
    QV_ASSERT(be->n_samplings > 0);
    be->n_samplings--;
    return CALL(sample_end, be, results);
}

qv_status qv_op_sample(qv_backend *be, qv_tensor logits, int32_t n_valid, const qv_sample_row *rows,
                       qv_sample_result *results)
{
    EXPECT("sample", logits, QV_F32, ANY, ANY);
    if (logits.shape[0] == 0)
        return QV_OK;
    if (be->n_samplings > 0)
        return qv_fail(QV_ERR_LIMIT, "sample: a sampling that was begun has not ended");
    QV_TRY(qv_op_sample_begin(be, logits, n_valid, rows));
    return qv_op_sample_end(be, results);
}

/* The first of the rows, or of those that are short with `n_valid`, that could not be sampled. */
static qv_status check_results(const qv_sample_result *results, int64_t n_rows,
                               const qv_sample_row *rows, int32_t n_valid)
{
    for (int64_t i = 0; i < n_rows; i++) {
        if (rows != NULL && !qv_sample_row_is_short(&rows[i], n_valid))
            continue;
        if (results[i].token == QV_SAMPLE_NOT_FINITE)
            return qv_fail(QV_ERR_INTERNAL, "sample: row %lld has logits that are not finite",
                           (long long)i);
        if (results[i].token == QV_SAMPLE_ALL_BANNED)
            return qv_fail(QV_ERR_ARG, "sample: row %lld has every token banned", (long long)i);
    }
    return QV_OK;
}

qv_status qv_sample_check_results(const qv_sample_result *results, int64_t n_rows)
{
    return check_results(results, n_rows, NULL, 0);
}

bool qv_sample_row_is_short(const qv_sample_row *row, int32_t n_valid)
{
    return row->target >= 0 || row->temperature == 0 ||
           (row->top_k > 0 && row->top_k <= QV_MAX_SHORTLIST && row->top_k < n_valid);
}

qv_shortlist_shape qv_shortlist_shape_of(const qv_sample_row *rows, int64_t n_rows, int32_t n_valid)
{
    qv_shortlist_shape shape = {0};
    for (int64_t i = 0; i < n_rows; i++) {
        if (!qv_sample_row_is_short(&rows[i], n_valid))
            continue;
        int32_t k = rows[i].target >= 0 ? 0 : rows[i].temperature > 0 ? rows[i].top_k : 1;
        shape.k = k > shape.k ? k : shape.k;
        shape.n_top = rows[i].n_top > shape.n_top ? rows[i].n_top : shape.n_top;
    }
    return shape;
}

int64_t qv_shortlist_words(qv_shortlist_shape shape)
{
    return QV_SHORT_WORDS(shape.k, shape.n_top);
}

static qv_status check_shortlist(const qv_shortlist_part *where, const qv_sample_row *rows,
                                 int64_t n_rows)
{
    if (where->shape.k < 0 || where->shape.k > QV_MAX_SHORTLIST || where->shape.n_top < 0 ||
        where->shape.n_top > QV_MAX_TOP_LOGPROBS)
        return qv_fail(QV_ERR_LIMIT, "shortlist: %d tokens, %d alternatives", where->shape.k,
                       where->shape.n_top);
    if (where->n_valid <= 0 || where->n_valid > where->n_vocab)
        return qv_fail(QV_ERR_SHAPE, "shortlist: %d valid tokens of %lld columns", where->n_valid,
                       (long long)where->n_vocab);
    for (int64_t i = 0; i < n_rows; i++)
        if (rows[i].target < 0 && rows[i].tokens != NULL && rows[i].n_tokens > 0 &&
            rows[i].tokens[rows[i].n_tokens - 1] < 0)
            return qv_fail(QV_ERR_ARG, "shortlist: the last token of row %lld is not known",
                           (long long)i);
    return qv_sample_check_rows(rows, n_rows, where->n_vocab);
}

qv_status qv_op_shortlist(qv_backend *be, qv_tensor part, const qv_shortlist_part *where,
                          const qv_sample_row *rows, qv_tensor lists)
{
    EXPECT("shortlist", part, QV_F32, ANY, ANY);
    EXPECT_CONTIGUOUS("shortlist", lists, QV_F32, part.shape[0], qv_shortlist_words(where->shape));
    if (part.shape[0] == 0)
        return QV_OK;
    if (where->first < 0 || where->first + part.shape[1] > where->n_vocab)
        return qv_fail(QV_ERR_SHAPE, "shortlist: columns %lld to %lld of %lld",
                       (long long)where->first, (long long)(where->first + part.shape[1]),
                       (long long)where->n_vocab);
    QV_TRY(check_shortlist(where, rows, part.shape[0]));
    return CALL(shortlist, be, part, where, rows, lists);
}

qv_status qv_op_merge_shortlists(qv_backend *be, qv_tensor lists, int32_t n_parts,
                                 const qv_shortlist_part *where, const qv_sample_row *rows,
                                 qv_sample_result *results)
{
    EXPECT_CONTIGUOUS("merge_shortlists", lists, QV_F32, ANY,
                      n_parts * qv_shortlist_words(where->shape));
    if (lists.shape[0] == 0)
        return QV_OK;
    QV_TRY(check_shortlist(where, rows, lists.shape[0]));
    QV_TRY(CALL(merge_shortlists, be, lists, n_parts, where, rows, results));
    return check_results(results, lists.shape[0], rows, where->n_valid);
}
