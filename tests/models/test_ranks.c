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

/* --- Loading ------------------------------------------------------------------------------------
 */

/* How often the checkpoint is mapped while weights load, at most; and what rank 0 loads. */
typedef struct {
    int n_calls, most_maps;
    uint64_t total;
} loading;

static void look_at_maps(uint64_t done, uint64_t total, void *user)
{
    loading *l = user;
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[4096];
    int n = 0;
    cr_assert_not_null(maps);
    while (fgets(line, sizeof line, maps) != NULL)
        n += strstr(line, "/model.safetensors") != NULL;
    fclose(maps);
    l->n_calls++;
    l->most_maps = n > l->most_maps ? n : l->most_maps;
    l->total = total;
    (void)done;
}

/* All ranks copy from one mapping, which the system fills from the disk once, and each copies its
 * part. */
Test(ranks, the_checkpoint_is_mapped_once_for_all_ranks_and_each_takes_its_part)
{
    qv_model_limits limits = fx_limits();
    uint64_t alone = 0;
    for (int32_t tp = 1; tp <= 4; tp *= 2) {
        split_model s = {.n = tp};
        loading l = {0};
        for (int32_t i = 0; i < tp; i++)
            cr_assert_eq(qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = 1},
                                         &s.backends[i]),
                         QV_OK);
        qv_model_ranks ranks = {.backends = s.backends, .n_ranks = tp, .expert_groups = 1};
        cr_assert_eq(qv_model_open_ranks(demo_dir(), &ranks, &limits, look_at_maps, &l, &s.model),
                     QV_OK, "%s", qv_error());
        cr_expect_gt(l.n_calls, 0);
        cr_expect_eq(l.most_maps, 1, "%d ranks map it %d times", tp, l.most_maps);
        alone = tp == 1 ? l.total : alone;
        cr_expect_leq(l.total, alone / (uint64_t)tp * 13 / 10,
                      "rank 0 of %d loads %zu of %zu bytes", tp, (size_t)l.total, (size_t)alone);
        close_split(&s);
    }
}

/* --- Sampling -----------------------------------------------------------------------------------
 */

/* What rank 0 gathers: its own gather_cols, which counts. */
static int64_t gathered_logits, gathered_rows;
static qv_status (*real_gather)(qv_backend *be, qv_tensor part, qv_tensor whole);

static qv_status counting_gather(qv_backend *be, qv_tensor part, qv_tensor whole)
{
    gathered_rows += part.shape[0];
    gathered_logits += whole.shape[0] * whole.shape[1];
    return real_gather(be, part, whole);
}

/* One sequence of N_TOKENS, from its start, with logits of every token. */
static qv_batch whole_prompt(const int32_t *tokens, const int32_t *pages, const int32_t *slot)
{
    static int32_t pos[N_TOKENS], start[2] = {0, N_TOKENS}, none = -1;
    for (int i = 0; i < N_TOKENS; i++)
        pos[i] = i;
    return (qv_batch){.n_tokens = N_TOKENS,
                      .n_seqs = 1,
                      .max_seq_tokens = N_TOKENS,
                      .token = tokens,
                      .pos = pos,
                      .seq_start = start,
                      .page_table = pages,
                      .page_stride = 8,
                      .state_slot = slot,
                      .n_segs = 1,
                      .seg_start = start,
                      .seg_slot = &none,
                      .n_logits = N_TOKENS,
                      .logit_row = pos,
                      .n_logit_segs = 1,
                      .logit_seg_start = start,
                      .logit_seg_slot = &none};
}

/* Rows of all kinds; every `long_every`-th needs the whole distribution (0: none does). */
static void some_rows(qv_sample_row *rows, const int32_t *tokens, int long_every)
{
    static const int32_t banned[] = {3, 200, 77};
    for (int i = 0; i < N_TOKENS; i++) {
        rows[i] = (qv_sample_row){.target = i % 7 == 6 ? i : -1,
                                  .temperature = i % 3 == 0 ? 0 : 0.5f + (float)(i % 5),
                                  .top_k = 1 + i * 3,
                                  .top_p = i % 4 == 1 ? 0.8f : 1,
                                  .min_p = i % 8 == 2 ? 0.1f : 0,
                                  .repetition_penalty = i % 5 == 4 ? 1.5f : 1,
                                  .presence_penalty = i % 5 == 4 ? 0.5f : 0,
                                  .seed = (uint64_t)i,
                                  .n_top = i % 6 - 1,
                                  .tokens = tokens,
                                  .n_prompt = 20,
                                  .n_tokens = N_TOKENS,
                                  .banned = banned,
                                  .n_banned = i % 9 == 0 ? 3 : 0};
        if (long_every > 0 && i % long_every == 0) {
            rows[i].target = -1;
            rows[i].temperature = 1;
            rows[i].top_k = 0;
        }
    }
}

static void check_results(const char *what, const qv_sample_result *got,
                          const qv_sample_result *want)
{
    for (int i = 0; i < N_TOKENS; i++) {
        cr_assert_eq(got[i].token, want[i].token, "%s, row %d: %d, wanted %d", what, i,
                     got[i].token, want[i].token);
        cr_assert_float_eq(got[i].logprob, want[i].logprob, 1e-5, "%s, row %d", what, i);
        cr_assert_eq(got[i].n_top, want[i].n_top, "%s, row %d", what, i);
        for (int j = 0; j < want[i].n_top; j++) {
            cr_assert_eq(got[i].top_token[j], want[i].top_token[j], "%s, row %d", what, i);
            cr_assert_float_eq(got[i].top_logprob[j], want[i].top_logprob[j], 1e-5);
        }
    }
}

Test(ranks, a_step_samples_as_from_gathered_logits_and_gathers_only_rows_that_need_all)
{
    static const int long_every[] = {0, 1, 2, 9};
    for (int32_t tp = 1; tp <= 4; tp *= 2) {
        qv_model_limits limits = fx_limits();
        split_model s = open_split(demo_dir(), (split){tp, 1}, &limits);
        int64_t vocab = qv_model_get_config(s.model)->vocab;
        int32_t tokens[N_TOKENS], pages[8], slots[] = {0, 1}, n_valid = (int32_t)vocab - 5;
        some_tokens(tokens, vocab);
        for (int i = 0; i < 8; i++)
            pages[i] = i;
        qv_backend_table table = *s.backends[0]->table;
        real_gather = table.gather_cols;
        table.gather_cols = counting_gather;
        s.backends[0]->table = &table;
        for (size_t k = 0; k < sizeof long_every / sizeof *long_every; k++) {
            static qv_sample_result want[N_TOKENS], got[N_TOKENS];
            qv_sample_row rows[N_TOKENS];
            qv_batch batch = whole_prompt(tokens, pages, &slots[0]);
            qv_tensor logits;
            qv_status sampled;
            char what[64];
            snprintf(what, sizeof what, "%d ranks, every %d", tp, long_every[k]);
            some_rows(rows, tokens, long_every[k]);
            cr_assert_eq(qv_model_forward(s.model, &batch, &logits), QV_OK, "%s", qv_error());
            cr_assert_eq(qv_op_sample(s.backends[0], logits, n_valid, rows, want), QV_OK, "%s",
                         qv_error());
            gathered_logits = gathered_rows = 0;
            batch.state_slot = &slots[1];
            cr_assert_eq(qv_model_step(s.model, &batch, n_valid, rows, got, &sampled), QV_OK, "%s",
                         qv_error());
            cr_assert_eq(sampled, QV_OK, "%s", qv_error());
            check_results(what, got, want);
            if (tp == 1)
                continue;
            int64_t n_long = long_every[k] > 0 ? (N_TOKENS + long_every[k] - 1) / long_every[k] : 0;
            int64_t n_lists = n_long < N_TOKENS ? N_TOKENS : 0;
            cr_expect_eq(gathered_rows, n_long + n_lists, "%s: %ld rows", what,
                         (long)gathered_rows);
            cr_expect_leq(gathered_logits,
                          n_long * vocab + n_lists * tp * (8 + 3 * QV_MAX_SHORTLIST + 2 * 4), "%s",
                          what);
        }
        close_split(&s);
    }
}

Test(ranks, rows_that_cannot_be_sampled_leave_the_group_whole)
{
    qv_model_limits limits = fx_limits();
    split_model s = open_split(demo_dir(), (split){2, 1}, &limits);
    int64_t vocab = qv_model_get_config(s.model)->vocab;
    int32_t tokens[N_TOKENS], pages[8] = {0, 1, 2, 3, 4, 5, 6, 7}, slot = 0;
    int32_t *all = malloc((size_t)vocab * sizeof *all);
    static qv_sample_result results[N_TOKENS];
    qv_sample_row rows[N_TOKENS];
    for (int32_t i = 0; i < vocab; i++)
        all[i] = i;
    some_tokens(tokens, vocab);
    for (int longs = 0; longs < 2; longs++) {
        qv_batch batch = whole_prompt(tokens, pages, &slot);
        qv_status sampled;
        some_rows(rows, tokens, 0);
        rows[5].target = -1;
        rows[5].top_k = longs ? 0 : 10;
        rows[5].temperature = 1;
        rows[5].banned = all;
        rows[5].n_banned = (int32_t)vocab;
        cr_assert_eq(qv_model_step(s.model, &batch, (int32_t)vocab, rows, results, &sampled), QV_OK,
                     "%s", qv_error());
        cr_expect_eq(sampled, QV_ERR_ARG);
        cr_expect_not_null(strstr(qv_error(), "row 5 has every token banned"), "%s", qv_error());
        cr_expect_geq(results[4].token, 0);
        rows[5].top_k = -1; /* refused before any rank works */
        cr_expect_eq(qv_model_step(s.model, &batch, (int32_t)vocab, rows, results, &sampled),
                     QV_ERR_ARG);
    }
    free(all);
    close_split(&s);
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
