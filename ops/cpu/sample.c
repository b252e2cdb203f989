/* Sampling one token from each row of logits: rows beside each other, each row on one thread. */
#include "common/clock.h"
#include "ops/cpu/sample_row.h"

#include <string.h>

/* --- Rows --------------------------------------------------------------------------------- */

static int32_t choose(const qv_sample_row *row, float *logit, int64_t n_valid,
                      qv_cpu_sample_scratch *s)
{
    for (int32_t i = 0; i < row->n_banned; i++)
        logit[row->banned[i]] = -INFINITY;
    bool finite; /* no longer: banned tokens are not */
    float max = scan(logit, n_valid, &finite);
    if (max == -INFINITY)
        return QV_SAMPLE_ALL_BANNED;
    return row->temperature > 0 ? draw(row, logit, n_valid, max, s)
                                : first_at_least(logit, n_valid, max);
}

static void sample_row(const qv_sample_row *row, const qv_cpu_sampling *before, float *logit,
                       int64_t n_vocab, int64_t n_valid, qv_cpu_sample_scratch *s,
                       qv_sample_result *result)
{
    result->n_top = 0;
    result->token = QV_SAMPLE_NOT_FINITE;
    bool finite;
    float max = scan(logit, n_vocab, &finite);
    if (!finite)
        return;
    double log_sum = max + log(sum_exp(logit, n_vocab, max, 1.0f, NULL, NULL));
    find_top(logit, n_valid, log_sum, row->n_top, result);
    if (row->target >= 0) {
        result->token = row->target;
        result->logprob = (float)(logit[row->target] - log_sum);
        return;
    }
    bool penalties = has_penalties(row);
    if (penalties)
        apply_penalties(row, before, logit, s);
    int32_t token = choose(row, logit, n_valid, s);
    if (token >= 0)
        result->logprob = (float)((s->mark[token] ? s->raw[token] : logit[token]) - log_sum);
    if (penalties)
        clear_marks(row, before, s);
    result->token = token;
}

typedef struct {
    qv_cpu_backend *cpu;
    qv_tensor logits;
    int64_t n_valid;
    const qv_sample_row *rows;
    const qv_cpu_sampling *before;
    qv_sample_result *results;
} sample_ctx;

static void sample_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    const sample_ctx *c = ctx;
    for (int64_t i = begin; i < end; i++)
        sample_row(&c->rows[i], c->before, qv_row2(c->logits, i), c->logits.shape[1], c->n_valid,
                   &c->cpu->sample[thread], &c->results[i]);
}

/* The last token of a row is one that the sampling before chose, or an id. */
static qv_status check_last_tokens(const qv_sample_row *rows, int64_t n_rows,
                                   const qv_cpu_sampling *before)
{
    for (int64_t i = 0; i < n_rows; i++) {
        int32_t last = rows[i].tokens && rows[i].n_tokens > 0 && rows[i].target < 0
                           ? rows[i].tokens[rows[i].n_tokens - 1]
                           : 0;
        if (last < 0 && QV_ROW_OF_TOKEN(last) >= before->n_rows)
            return qv_fail(QV_ERR_ARG,
                           "sample: the last token of row %lld is what row %d chose, of a sampling "
                           "of %lld rows",
                           (long long)i, QV_ROW_OF_TOKEN(last), (long long)before->n_rows);
    }
    return QV_OK;
}

qv_status QV_ISA(qv_cpu_sample_begin)(qv_backend *be, qv_tensor logits, int32_t n_valid,
                                      const qv_sample_row *rows)
{
    qv_cpu_backend *cpu = qv_cpu(be);
    int64_t n_rows = logits.shape[0], n_vocab = logits.shape[1];
    if (n_vocab > cpu->n_vocab)
        return qv_fail(QV_ERR_LIMIT, "sample: rows of %lld logits, but %d are reserved",
                       (long long)n_vocab, cpu->n_vocab);
    const qv_cpu_sampling *before = qv_cpu_last_sampling(cpu);
    QV_TRY(check_last_tokens(rows, n_rows, before));
    qv_cpu_sampling *s = &cpu->samplings[cpu->n_begun % QV_MAX_SAMPLINGS];
    QV_TRY(qv_cpu_sampling_require(s, n_rows));
    s->n_rows = n_rows;
    s->gap = qv_cpu_gap(cpu);
    cpu->n_begun++;
    sample_ctx c = {.cpu = cpu,
                    .logits = logits,
                    .n_valid = n_valid,
                    .rows = rows,
                    .before = before,
                    .results = s->results};
    qv_pool_run(cpu->pool, n_rows, n_vocab, sample_rows, &c);
    cpu->sampled_ns = qv_now_ns();
    return QV_OK;
}

qv_status QV_ISA(qv_cpu_sample_end)(qv_backend *be, qv_sample_result *results)
{
    qv_cpu_backend *cpu = qv_cpu(be);
    const qv_cpu_sampling *s = &cpu->samplings[cpu->n_ended++ % QV_MAX_SAMPLINGS];
    be->gap = s->gap;
    if (s->n_rows > 0)
        memcpy(results, s->results, (size_t)s->n_rows * sizeof *results);
    return qv_sample_check_results(results, s->n_rows);
}
