/* Every golden case of every model and adapter, in float32: the reference's logprobs and answers,
 * however a sequence is cut into steps and with whatever it shares them. */
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Agreement asked of a float32 engine with the reference: see the golden data's README. */
#define TOLERANCE 5e-4

static const char *const models[] = {"tiny-qwen3.5", "tiny-qwen3.5-moe", "tiny-nemotron3-nano",
                                     "tiny-nemotron3-super"};
enum { N_MODELS = 4, MAX_CASES = 64 };

/* For each model whose data is here; a test without any is skipped. */
#define EACH_MODEL(g, gemm_name)                                                                   \
    for (int m = 0, found = 0; m <= N_MODELS; m++)                                                 \
        if (m == N_MODELS) {                                                                       \
            if (found == 0)                                                                        \
                cr_skip_test("data not present: golden models");                                   \
        } else if (fx_golden_open(                                                                 \
                       &(g), models[m],                                                            \
                       &(qv_backend_options){.name = "cpu", .n_threads = 2, .gemm = gemm_name}) && \
                   ++found)

static double worst_difference(const float *x, const float *y, int32_t n)
{
    double worst = 0;
    for (int32_t i = 0; i < n; i++)
        worst = fmax(worst, fabs((double)x[i] - y[i]));
    return worst;
}

/* All cases of an adapter, which may stand in for another of the same meaning. */
static double check_cases(fx_golden *g, const char *adapter, const char *cases_of)
{
    double worst = 0;
    for (int i = 0; i < g->n; i++) {
        const fx_case *c = &g->cases[i];
        if (strcmp(c->adapter, cases_of) != 0)
            continue;
        float *logprobs = fx_golden_logprobs(g, c, fx_golden_slot(g, adapter), 0);
        double error = worst_difference(logprobs, c->logprobs, c->n - 1);
        cr_expect_lt(error, TOLERANCE, "%s, %s of %s: %g", g->dir, adapter, c->name, error);
        worst = fmax(worst, error);
        free(logprobs);
    }
    return worst;
}

static void check_all(fx_golden *g)
{
    fprintf(stderr, "%s: worst logprob error: base %.1e", strrchr(g->dir, '/') + 1,
            check_cases(g, "", ""));
    for (int a = 0; a < g->n_adapters; a++) {
        bool other = strcmp(g->adapters[a], "french-per-expert") == 0;
        fprintf(stderr, ", %s %.1e", g->adapters[a],
                check_cases(g, g->adapters[a], other ? "french" : g->adapters[a]));
    }
    fprintf(stderr, "\n");
}

Test(golden, every_case_has_the_logprobs_of_the_reference)
{
    fx_golden g;
    EACH_MODEL(g, "exact")
    {
        check_all(&g);
        fx_golden_close(&g);
    }
}

Test(golden, every_case_has_them_with_the_other_gemm_too)
{
    fx_golden g;
    EACH_MODEL(g, "openblas")
    {
        check_all(&g);
        fx_golden_close(&g);
    }
}

static int32_t argmax(const float *row, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        best = row[i] > row[best] ? i : best;
    return (int32_t)best;
}

/* Continue a case's prompt greedily; how many tokens were as the reference's. */
static int32_t continue_greedily(fx_golden *g, const fx_case *c)
{
    int32_t tokens[1024], pages[64], n = c->n_prompt, n_checked = 0;
    for (int32_t i = 0; i < 64; i++)
        pages[i] = i;
    memcpy(tokens, c->tokens, (size_t)n * sizeof *tokens);
    fx_seq seq = {.tokens = tokens, .n = n, .pages = pages, .logits = 1};
    seq.adapter = fx_golden_slot(g, c->adapter);
    for (; n_checked < c->n_greedy; n_checked++) {
        float *row = fx_step(g->model, &seq, 1);
        tokens[n++] = argmax(row, g->vocab);
        free(row);
        if (tokens[n - 1] != c->greedy[n_checked])
            break;
        seq.start = n - 1, seq.n = 1;
    }
    return n_checked;
}

Test(golden, prompts_continue_greedily_as_the_reference_does)
{
    fx_golden g;
    EACH_MODEL(g, "exact")
    {
        for (int i = 0; i < g.n; i++)
            cr_expect_eq(continue_greedily(&g, &g.cases[i]), g.cases[i].n_greedy, "%s %s", g.dir,
                         g.cases[i].name);
        fx_golden_close(&g);
    }
}

Test(golden, chunks_change_no_bit)
{
    static const int32_t chunks[] = {1, 7, 64};
    fx_golden g;
    EACH_MODEL(g, "exact")
    {
        for (int i = 0; i < g.n; i++) {
            const fx_case *c = &g.cases[i];
            int32_t slot = fx_golden_slot(&g, c->adapter);
            float *whole = fx_run(g.model, c->tokens, c->n, 0, slot, 0, 0);
            for (int k = 0; k < 3; k++) {
                float *cut = fx_run(g.model, c->tokens, c->n, chunks[k], slot, 40, 1);
                cr_expect_arr_eq(cut, whole, (size_t)(c->n * g.vocab) * sizeof *whole,
                                 "%s %s in chunks of %d", g.dir, c->name, chunks[k]);
                free(cut);
            }
            free(whole);
        }
        fx_golden_close(&g);
    }
}

/* All cases as one step; its logits, case by case. */
static float *run_mixed(fx_golden *g)
{
    static int32_t pages[MAX_CASES][64];
    fx_seq seqs[MAX_CASES];
    int32_t next_page = 40;
    cr_assert(g->n <= MAX_CASES);
    for (int i = 0; i < g->n; i++) {
        const fx_case *c = &g->cases[i];
        for (int32_t p = 0; p * 16 < c->n; p++)
            pages[i][p] = next_page++;
        seqs[i] = (fx_seq){.tokens = c->tokens,
                           .n = c->n,
                           .pages = pages[i],
                           .state_slot = i,
                           .adapter = fx_golden_slot(g, c->adapter),
                           .logits = c->n};
    }
    return fx_step(g->model, seqs, g->n);
}

Test(golden, a_mixed_batch_of_all_adapters_changes_no_bit)
{
    fx_golden g;
    EACH_MODEL(g, "exact")
    {
        float *mixed = run_mixed(&g), *row = mixed;
        for (int i = 0; i < g.n; i++) {
            const fx_case *c = &g.cases[i];
            int32_t slot = fx_golden_slot(&g, c->adapter);
            float *alone = fx_run(g.model, c->tokens, c->n, 0, slot, 0, 0);
            cr_expect_arr_eq(row, alone, (size_t)(c->n * g.vocab) * sizeof *alone, "%s %s", g.dir,
                             c->name);
            row += c->n * g.vocab;
            free(alone);
        }
        free(mixed);
        fx_golden_close(&g);
    }
}

Test(golden, one_pair_an_expert_equals_the_flat_pairs_it_was_made_from)
{
    fx_golden g;
    EACH_MODEL(g, "exact")
    {
        int32_t flat = -1, single = -1;
        for (int i = 0; i < g.n_adapters; i++) {
            flat = strcmp(g.adapters[i], "french") == 0 ? i : flat;
            single = strcmp(g.adapters[i], "french-per-expert") == 0 ? i : single;
        }
        for (int i = 0; i < g.n && flat >= 0 && single >= 0; i++) {
            const fx_case *c = &g.cases[i];
            float *x = fx_golden_logprobs(&g, c, flat, 0);
            float *y = fx_golden_logprobs(&g, c, single, 0);
            cr_expect_lt(worst_difference(x, y, c->n - 1), 2e-5, "%s %s", g.dir, c->name);
            free(x), free(y);
        }
        fx_golden_close(&g);
    }
}

Test(golden, adapter_slots_change_nothing_for_the_base_model)
{
    fx_golden g;
    EACH_MODEL(g, "exact")
    {
        qv_model_limits limits = fx_limits();
        limits.n_adapter_slots = 0;
        qv_model *plain = fx_open(g.be, g.dir, &limits);
        for (int i = 0; i < g.n; i++) {
            const fx_case *c = &g.cases[i];
            if (c->adapter[0] != '\0')
                continue;
            float *with = fx_run(g.model, c->tokens, c->n, 0, -1, 0, 0);
            float *without = fx_run(plain, c->tokens, c->n, 0, -1, 0, 0);
            cr_expect_arr_eq(with, without, (size_t)(c->n * g.vocab) * sizeof *with, "%s", c->name);
            free(with), free(without);
        }
        qv_model_close(plain);
        fx_golden_close(&g);
    }
}
