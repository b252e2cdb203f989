/* A model split over ranks: the same answers as on one, the same state, and a clean end when a rank
 * fails. */
#include "ops/backend.h"
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* How a run is split. */
typedef struct {
    int32_t tp, ep;
} split;

typedef struct {
    qv_backend *backends[8];
    int32_t n;
    qv_model *model;
    char installed[64]; /* adapter in slot 0 */
} split_model;

static split_model open_split(const char *dir, split how, const qv_model_limits *limits)
{
    split_model s = {.n = how.tp};
    for (int32_t i = 0; i < how.tp; i++)
        cr_assert_eq(
            qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = 1}, &s.backends[i]),
            QV_OK, "%s", qv_error());
    qv_model_ranks ranks = {.backends = s.backends, .n_ranks = how.tp, .expert_groups = how.ep};
    cr_assert_eq(qv_model_open_ranks(dir, &ranks, limits, NULL, NULL, &s.model), QV_OK, "%s",
                 qv_error());
    return s;
}

static void close_split(split_model *s)
{
    qv_model_close(s->model);
    for (int32_t i = 0; i < s->n; i++)
        qv_backend_close(s->backends[i]);
}

static const char *demo_dir(void)
{
    return qv_path(getenv("QV_SOURCE_DIR"), "demo/tiny-qwen3.5");
}

/* Put an adapter of a golden folder into slot 0, if it is not there. -1 for the base model. */
static int32_t install(split_model *s, const char *dir, const char *name)
{
    if (name[0] == '\0')
        return -1;
    if (strcmp(s->installed, name) == 0)
        return 0;
    qv_adapter *adapter;
    cr_assert_eq(qv_adapter_open(s->model, qv_path(dir, "adapters/%s", name), &adapter), QV_OK,
                 "%s", qv_error());
    cr_assert_eq(qv_model_adapter_install(s->model, 0, adapter), QV_OK, "%s", qv_error());
    qv_adapter_close(adapter);
    snprintf(s->installed, sizeof s->installed, "%s", name);
    return 0;
}

enum { N_TOKENS = 70 };

static void some_tokens(int32_t *tokens, int64_t vocab)
{
    qv_rng rng = qv_rng_seed(5);
    for (int i = 0; i < N_TOKENS; i++)
        tokens[i] = (int32_t)qv_rng_range(&rng, 0, vocab / 2);
}

Test(ranks, golden_cases_of_base_and_adapters_agree_however_the_model_is_split, .timeout = 300)
{
    static const struct {
        const char *model;
        split splits[6];
    } rows[] = {
        {"tiny-qwen3.5", {{2, 1}, {4, 1}}},
        {"tiny-qwen3.5-moe", {{2, 1}, {4, 1}, {2, 2}, {4, 4}, {4, 2}}},
        {"tiny-nemotron3-nano", {{2, 1}, {4, 1}, {2, 2}, {4, 4}, {4, 2}}},
        {"tiny-nemotron3-super", {{2, 1}, {4, 1}, {2, 2}, {4, 4}, {4, 2}}},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const char *dir = qv_golden_path(rows[i].model);
        QV_SKIP_WITHOUT(dir);
        int n;
        fx_case *cases = fx_cases(dir, &n);
        for (const split *how = rows[i].splits; how->tp > 0; how++) {
            qv_model_limits limits = fx_limits();
            split_model s = open_split(dir, *how, &limits);
            int64_t vocab = qv_model_get_config(s.model)->vocab;
            double worst = 0;
            for (int c = 0; c < n; c++) {
                if (c > 0 && strcmp(cases[c].adapter, cases[c - 1].adapter) == 0)
                    continue; /* one case of each adapter in a row */
                int32_t slot = install(&s, dir, cases[c].adapter);
                float *logits = fx_run(s.model, cases[c].tokens, cases[c].n, 0, slot, 0, 0);
                for (int32_t t = 0; t + 1 < cases[c].n; t++)
                    worst = fmax(
                        worst, fabs(fx_logprob(logits + t * vocab, vocab, cases[c].tokens[t + 1]) -
                                    cases[c].logprobs[t]));
                free(logits);
            }
            fprintf(stderr, "%s, tp %d ep %d: worst logprob error %.2g\n", rows[i].model, how->tp,
                    how->ep, worst);
            cr_expect_lt(worst, 5e-4, "%s, tp %d ep %d", rows[i].model, how->tp, how->ep);
            close_split(&s);
        }
        fx_cases_free(cases, n);
    }
}

Test(ranks, a_split_model_gives_the_same_bits_in_chunks_and_after_its_state_was_moved)
{
    qv_model_limits limits = fx_limits();
    for (int32_t tp = 2; tp <= 4; tp += 2) {
        split_model s = open_split(demo_dir(), (split){tp, 1}, &limits);
        int64_t vocab = qv_model_get_config(s.model)->vocab;
        int32_t tokens[N_TOKENS], from[8], to[8];
        some_tokens(tokens, vocab);
        for (int i = 0; i < 8; i++)
            from[i] = i, to[i] = 40 + i;
        float *whole = fx_run(s.model, tokens, N_TOKENS, 0, -1, 0, 0);
        float *chunked = fx_run(s.model, tokens, N_TOKENS, 7, -1, 20, 1);
        size_t bytes = (size_t)(N_TOKENS * vocab) * sizeof *whole;
        cr_expect_eq(memcmp(whole, chunked, bytes), 0, "%d ranks", tp);

        /* The state after 48 tokens, saved, and restored into other pages and another slot. */
        float *first = fx_run(s.model, tokens, 48, 0, -1, 0, 0);
        void *saved = malloc(qv_model_state_bytes(s.model, 3));
        cr_assert_eq(qv_model_state_save(s.model, from, 3, 0, saved), QV_OK);
        cr_assert_eq(qv_model_state_restore(s.model, to, 3, 9, saved), QV_OK);
        fx_seq rest = {.tokens = tokens,
                       .start = 48,
                       .n = N_TOKENS - 48,
                       .pages = to,
                       .state_slot = 9,
                       .adapter = -1,
                       .logits = N_TOKENS - 48};
        float *last = fx_step(s.model, &rest, 1);
        cr_expect_eq(
            memcmp(last, whole + 48 * vocab, (size_t)((N_TOKENS - 48) * vocab) * sizeof *last), 0,
            "%d ranks", tp);
        free(whole), free(chunked), free(first), free(last), free(saved);
        close_split(&s);
    }
}

Test(ranks, each_rank_plans_its_part_of_the_memory)
{
    qv_model_config config;
    cr_assert_eq(qv_model_config_load(demo_dir(), &config), QV_OK, "%s", qv_error());
    qv_model_limits limits = fx_limits();
    qv_backend *be = fx_backend();
    qv_backend *all[] = {be, be};
    qv_model_ranks two = {.backends = all, .n_ranks = 2, .expert_groups = 1};
    qv_memory_plan one, half;
    cr_assert_eq(qv_model_plan(&config, be, &limits, &one), QV_OK);
    cr_assert_eq(qv_model_plan_rank(&config, &two, 1, &limits, &half), QV_OK);
    cr_expect_eq(half.kv, one.kv / 2);
    cr_expect_eq(half.state, one.state / 2);
    cr_expect_lt(half.weights, one.weights * 51 / 100);
    cr_expect_geq(half.weights, one.weights / 2);
    qv_backend_close(be);
}

/* An op of rank 1 that stops working after some calls. */
static int calls_left;
static qv_status (*working_conv1d)(qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                                   qv_tensor bias, qv_tensor state, qv_tensor y);

static qv_status failing_conv1d(qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                                qv_tensor bias, qv_tensor state, qv_tensor y)
{
    if (calls_left-- > 0)
        return working_conv1d(be, batch, x, w, bias, state, y);
    return qv_fail(QV_ERR_DEVICE, "the device fell off the bus");
}

Test(ranks, a_step_ends_with_the_reason_when_one_rank_fails, .timeout = 30)
{
    qv_model_limits limits = fx_limits();
    split_model s = open_split(demo_dir(), (split){4, 1}, &limits);
    qv_op_table ops = *s.backends[1]->ops;
    working_conv1d = ops.conv1d;
    ops.conv1d = failing_conv1d;
    s.backends[1]->ops = &ops;
    calls_left = 2;

    int32_t token = 3, pos = 0, zero[2] = {0, 1}, none = -1, page = 0;
    qv_batch batch = {.n_tokens = 1,
                      .n_seqs = 1,
                      .token = &token,
                      .pos = &pos,
                      .seq_start = zero,
                      .page_table = &page,
                      .page_stride = 1,
                      .state_slot = &page,
                      .n_segs = 1,
                      .seg_start = zero,
                      .seg_slot = &none};
    qv_tensor logits;
    for (int i = 0; i < 2; i++) { /* and the model stays ended */
        cr_expect_eq(qv_model_forward(s.model, &batch, &logits), QV_ERR_DEVICE);
        cr_expect_not_null(strstr(qv_error(), "rank 1"), "%s", qv_error());
        cr_expect_not_null(strstr(qv_error(), "the device fell off the bus"), "%s", qv_error());
    }
    close_split(&s);
}

Test(ranks, refuses_a_split_that_does_not_come_out_even)
{
    static const struct {
        split how;
        const char *reason;
    } rows[] = {
        {{3, 1}, "cannot be shared out among 3 ranks"},
        {{2, 2}, "the model has no experts"},
        {{65, 1}, "65 ranks"},
        {{4, 3}, "3 groups of experts do not divide 4 ranks"},
    };
    qv_backend *be = fx_backend();
    qv_backend *all[65];
    for (int i = 0; i < 65; i++)
        all[i] = be;
    qv_model_limits limits = fx_limits();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_model *model;
        qv_model_ranks ranks = {
            .backends = all, .n_ranks = rows[i].how.tp, .expert_groups = rows[i].how.ep};
        cr_expect_neq(qv_model_open_ranks(demo_dir(), &ranks, &limits, NULL, NULL, &model), QV_OK);
        cr_expect_not_null(strstr(qv_error(), rows[i].reason), "%s", qv_error());
    }
    qv_backend_close(be);
}
