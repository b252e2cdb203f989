/* Shortlists of parts, merged, against the sampler of whole rows: what the CPU's tests and the
 * device's share. */
#ifndef QV_TESTS_OPS_SHORTLIST_TEST_H
#define QV_TESTS_OPS_SHORTLIST_TEST_H

#include "tests/ops/ops_test.h"

/* Who samples whole rows and who makes and merges the lists; may be the same. Logprobs may differ
 * by `near`, relative to 1 and more: their sums are made in other pieces. */
typedef struct {
    qv_backend *whole, *parts;
    float near;
    int one_of; /* of so many rows one is checked */
} backend_pair;

typedef struct {
    const char *name;
    int32_t n_part, n_parts, n_valid; /* columns of a part; parts; ids that may be chosen */
    float scale;
    bool ties; /* logits of a few values only */
} shortlist_case;

static const shortlist_case shortlist_cases[] = {
    {"one part", 600, 1, 590, 8, false},     {"two parts", 500, 2, 990, 8, false},
    {"four parts", 300, 4, 1200, 3, false},  {"ties", 250, 4, 990, 2, true},
    {"all alike", 100, 4, 400, 0, true},     {"a part of padding", 64, 4, 180, 4, false},
    {"flat", 20000, 2, 39000, 0.01f, false}, {"parts smaller than top-k", 40, 8, 320, 4, true},
};

enum { SHORT_ROWS = 144, SHORT_TOKENS = 40 };

/* All combinations of what a row may ask for, and random numbers for the rest. */
static inline qv_sample_row short_row(qv_rng *rng, int i, int32_t n_valid, const int32_t *tokens,
                                      const int32_t *banned)
{
    static const int32_t top_k[] = {1, 5, 50, 256};
    static const float top_p[] = {1, 0.9f, 0.3f}, min_p[] = {0, 0.05f};
    static const int32_t n_top[] = {-1, 0, 5, QV_MAX_TOP_LOGPROBS};
    qv_sample_row row = {.target = i % 12 == 11 ? (int32_t)qv_rng_range(rng, 0, n_valid) : -1,
                         .temperature = i % 6 == 5 ? 0.0f : 0.2f + 0.3f * (float)(i % 5),
                         .top_k = top_k[i % 4],
                         .top_p = top_p[i / 4 % 3],
                         .min_p = min_p[i / 12 % 2],
                         .repetition_penalty = 1,
                         .seed = qv_rng_u64(rng),
                         .stream = (uint32_t)(i % 3),
                         .draw = (uint32_t)i,
                         .n_top = n_top[i / 24 % 4]};
    if (i % 5 >= 3) { /* so that penalties change who is in the list */
        row.presence_penalty = 0.5f;
        row.frequency_penalty = i % 2 ? 0.7f : -0.7f;
        row.repetition_penalty = i % 3 ? 1.3f : 0.8f;
        row.tokens = tokens;
        row.n_prompt = 15;
        row.n_tokens = SHORT_TOKENS;
    }
    if (i % 7 >= 5) {
        row.banned = banned;
        row.n_banned = 5;
    }
    return row;
}

static inline qv_tensor short_upload(qv_backend *be, const void *x, int64_t rows, int64_t cols)
{
    void *data;
    PASS(qv_backend_alloc(be, (size_t)(rows * cols) * sizeof(float), &data));
    if (x != NULL)
        PASS(qv_backend_upload(be, data, x, (size_t)(rows * cols) * sizeof(float)));
    return qv_tensor_2d(data, QV_F32, rows, cols);
}

/* Lists of every part side by side, as ranks gather them, and merged. */
static inline qv_status sample_parts(qv_backend *be, const float *logits, int64_t n_rows,
                                     const shortlist_case *c, const qv_sample_row *rows,
                                     qv_sample_result *results)
{
    int64_t n_vocab = (int64_t)c->n_part * c->n_parts;
    qv_shortlist_part where = {.n_vocab = n_vocab,
                               .n_valid = c->n_valid,
                               .shape = qv_shortlist_shape_of(rows, n_rows, c->n_valid)};
    int64_t words = qv_shortlist_words(where.shape);
    uint32_t *all = must(malloc((size_t)(n_rows * words * c->n_parts) * sizeof *all));
    uint32_t *some = must(malloc((size_t)(n_rows * words) * sizeof *some));
    qv_tensor x = short_upload(be, logits, n_rows, n_vocab);
    qv_tensor own = short_upload(be, NULL, n_rows, words);
    for (int32_t p = 0; p < c->n_parts; p++) {
        where.first = (int64_t)p * c->n_part;
        PASS(qv_op_shortlist(be, qv_tensor_cols(x, where.first, c->n_part), &where, rows, own));
        PASS(qv_backend_download(be, some, own.data, (size_t)(n_rows * words) * sizeof *some));
        for (int64_t i = 0; i < n_rows; i++)
            memcpy(all + (i * c->n_parts + p) * words, some + i * words,
                   (size_t)words * sizeof *all);
    }
    qv_tensor lists = short_upload(be, all, n_rows, words * c->n_parts);
    qv_status status = qv_op_merge_shortlists(be, lists, c->n_parts, &where, rows, results);
    qv_backend_free(be, x.data);
    qv_backend_free(be, own.data);
    qv_backend_free(be, lists.data);
    free(all), free(some);
    return status;
}

static inline void same_result(const char *what, int row, float tolerance,
                               const qv_sample_result *got, const qv_sample_result *want)
{
    cr_assert_eq(got->token, want->token, "%s, row %d: token %d, wanted %d", what, row, got->token,
                 want->token);
    float near = tolerance * (1 + fabsf(want->logprob));
    cr_assert(fabsf(got->logprob - want->logprob) <= near, "%s, row %d: logprob %.9g, wanted %.9g",
              what, row, (double)got->logprob, (double)want->logprob);
    cr_assert_eq(got->n_top, want->n_top, "%s, row %d: %d alternatives, wanted %d", what, row,
                 got->n_top, want->n_top);
    for (int i = 0; i < want->n_top; i++) {
        cr_assert_eq(got->top_token[i], want->top_token[i], "%s, row %d, alternative %d", what, row,
                     i);
        near = tolerance * (1 + fabsf(want->top_logprob[i]));
        cr_assert(fabsf(got->top_logprob[i] - want->top_logprob[i]) <= near,
                  "%s, row %d, alternative %d: %.9g, wanted %.9g", what, row, i,
                  (double)got->top_logprob[i], (double)want->top_logprob[i]);
    }
}

static inline void check_shortlists(const backend_pair *p, const shortlist_case *c)
{
    int32_t one_of = p->one_of, n_rows = SHORT_ROWS / one_of;
    int32_t n_vocab = c->n_part * c->n_parts;
    const qv_backend_limits limits = {.max_logits = n_rows, .n_vocab = n_vocab};
    PASS(qv_backend_reserve(p->whole, &limits));
    PASS(qv_backend_reserve(p->parts, &limits));
    qv_rng rng = qv_rng_seed((uint64_t)n_vocab + (uint64_t)c->n_parts);
    float *logits = random_floats(&rng, (int64_t)n_rows * n_vocab, c->scale);
    for (int64_t i = 0; c->ties && i < (int64_t)n_rows * n_vocab; i++)
        logits[i] = floorf(logits[i] * 2) / 2;
    int32_t tokens[SHORT_TOKENS], banned[5];
    for (int i = 0; i < SHORT_TOKENS; i++)
        tokens[i] = i < 30 ? (int32_t)qv_rng_range(&rng, 0, n_vocab) : tokens[i - 20];
    for (int i = 0; i < 5; i++)
        banned[i] = (int32_t)qv_rng_range(&rng, 0, n_vocab);
    qv_sample_row rows[SHORT_ROWS];
    static qv_sample_result want[SHORT_ROWS], got[SHORT_ROWS];
    for (int i = 0; i < n_rows; i++) {
        rows[i] = short_row(&rng, i * one_of + i % one_of, c->n_valid, tokens, banned);
        got[i].token = -7; /* what is not short stays */
    }
    qv_tensor x = short_upload(p->whole, logits, n_rows, n_vocab);
    PASS(qv_op_sample(p->whole, x, c->n_valid, rows, want));
    qv_backend_free(p->whole, x.data);
    PASS(sample_parts(p->parts, logits, n_rows, c, rows, got));
    for (int i = 0; i < n_rows; i++) {
        if (qv_sample_row_is_short(&rows[i], c->n_valid))
            same_result(c->name, i, p->near, &got[i], &want[i]);
        else
            cr_assert_eq(got[i].token, -7, "%s, row %d", c->name, i);
    }
    free(logits);
}

/* One row with a logit that is not finite in the second part, one with everything banned. */
static inline void check_bad_rows(const backend_pair *p)
{
    enum { N = 5, V = 40 };
    static const shortlist_case halves = {"halves", V / 2, 2, V, 1, false};
    PASS(qv_backend_reserve(p->parts, &(qv_backend_limits){.max_logits = N, .n_vocab = V}));
    int32_t all[V];
    qv_sample_row rows[N];
    qv_sample_result results[N];
    float *logits = filled_floats(N * V, 1);
    for (int i = 0; i < V; i++)
        all[i] = i;
    for (int i = 0; i < N; i++) {
        rows[i] = (qv_sample_row){.target = -1, .top_p = 1, .repetition_penalty = 1, .n_top = 2};
        rows[i].temperature = (float)(i % 2);
        rows[i].top_k = 1;
        logits[i * V + 5 * i + 3] = 2;
        results[i].token = -1;
    }
    logits[1 * V + 33] = NAN;
    rows[3].banned = all;
    rows[3].n_banned = V;
    FAIL_WITH(QV_ERR_INTERNAL, "row 1 ", sample_parts(p->parts, logits, N, &halves, rows, results));
    for (int i = 0; i < N; i++)
        cr_assert(i == 1 || i == 3 ? results[i].token < 0 : results[i].token == 5 * i + 3,
                  "row %d: %d", i, results[i].token);
    logits[1 * V + 33] = 0;
    FAIL_WITH(QV_ERR_ARG, "row 3 has every token banned",
              sample_parts(p->parts, logits, N, &halves, rows, results));
    free(logits);
}

#endif
