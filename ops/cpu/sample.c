/* Sampling one token from each row of logits: rows beside each other, each row on one thread. */
#include "ops/cpu/sample_row.h"

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

static void sample_row(const qv_sample_row *row, float *logit, int64_t n_vocab, int64_t n_valid,
                       qv_cpu_sample_scratch *s, qv_sample_result *result)
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
        apply_penalties(row, logit, s);
    int32_t token = choose(row, logit, n_valid, s);
    if (token >= 0)
        result->logprob = (float)((s->mark[token] ? s->raw[token] : logit[token]) - log_sum);
    if (penalties)
        clear_marks(row, s);
    result->token = token;
}

typedef struct {
    qv_cpu_backend *cpu;
    qv_tensor logits;
    int64_t n_valid;
    const qv_sample_row *rows;
    qv_sample_result *results;
} sample_ctx;

static void sample_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    const sample_ctx *c = ctx;
    for (int64_t i = begin; i < end; i++)
        sample_row(&c->rows[i], qv_row2(c->logits, i), c->logits.shape[1], c->n_valid,
                   &c->cpu->sample[thread], &c->results[i]);
}

qv_status QV_ISA(qv_cpu_sample)(qv_backend *be, qv_tensor logits, int32_t n_valid,
                                const qv_sample_row *rows, qv_sample_result *results)
{
    qv_cpu_backend *cpu = qv_cpu(be);
    int64_t n_rows = logits.shape[0], n_vocab = logits.shape[1];
    if (n_vocab > cpu->n_vocab)
        return qv_fail(QV_ERR_LIMIT, "sample: rows of %lld logits, but %d are reserved",
                       (long long)n_vocab, cpu->n_vocab);
    sample_ctx c = {
        .cpu = cpu, .logits = logits, .n_valid = n_valid, .rows = rows, .results = results};
    qv_pool_run(cpu->pool, n_rows, n_vocab, sample_rows, &c);
    return qv_sample_check_results(results, n_rows);
}
