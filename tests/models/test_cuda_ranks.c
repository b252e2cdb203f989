/* The golden cases through models that are split over CUDA ranks: on one device, and on several
 * where the machine has them, by every way that ranks add up. */
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Limits of the mean of 0.5 (logprob - reference)^2, as in test_cuda_golden.c: without the worst
 * TRIMMED of all tokens, since rounding takes some of a routed model to another expert, and with
 * them. */
static const struct {
    const char *name;
    double limit;
} models[] = {{"tiny-qwen3.5", 4e-3},
              {"tiny-qwen3.5-moe", 1e-3},
              {"tiny-nemotron3-nano", 2.5e-3},
              {"tiny-nemotron3-super", 2.5e-3}};
#define TRIMMED         0.02
#define MEAN_WITH_FLIPS 5e-2
/* A choice of the reference may lose to another by so much before it counts as wrong. */
#define MARGIN 0.3f

static const char *const adapters[] = {"", "french", "json"};

static bool has_adapter(const fx_golden *g, const char *name)
{
    for (int i = 0; i < g->n_adapters; i++)
        if (strcmp(g->adapters[i], name) == 0)
            return true;
    return name[0] == '\0';
}

typedef struct {
    double mean, trimmed;
} errors;

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static errors errors_of(fx_golden *g, const char *adapter)
{
    static double all[1 << 16];
    int32_t n = 0;
    for (int i = 0; i < g->n; i++) {
        const fx_case *c = &g->cases[i];
        if (strcmp(c->adapter, adapter) != 0)
            continue;
        float *logprobs = fx_golden_logprobs(g, c, fx_golden_slot(g, adapter), 0);
        for (int32_t t = 0; t + 1 < c->n; t++) {
            double d = (double)logprobs[t] - c->logprobs[t];
            cr_assert_lt(n, 1 << 16);
            all[n++] = 0.5 * d * d;
        }
        free(logprobs);
    }
    qsort(all, (size_t)n, sizeof *all, by_value);
    int32_t kept = n - (int32_t)(TRIMMED * n);
    errors e = {0, 0};
    for (int32_t i = 0; i < n; i++) {
        e.mean += all[i] / n;
        e.trimmed += i < kept ? all[i] / kept : 0;
    }
    return e;
}

static int32_t argmax(const float *row, int64_t n)
{
    int32_t best = 0;
    for (int64_t i = 1; i < n; i++)
        best = row[i] > row[best] ? (int32_t)i : best;
    return best;
}

/* Along the reference's greedy answer: the prompt, then one token a step, recorded where steps can
 * be. */
static void check_greedy(fx_golden *g, const fx_case *c)
{
    int32_t n = c->n_prompt + c->n_greedy - 1, pages[64];
    int32_t *tokens = malloc((size_t)(n + 1) * sizeof *tokens);
    memcpy(tokens, c->tokens, (size_t)c->n_prompt * sizeof *tokens);
    memcpy(tokens + c->n_prompt, c->greedy, (size_t)c->n_greedy * sizeof *tokens);
    for (int i = 0; i < 64; i++)
        pages[i] = i;
    for (int32_t i = 0; i < c->n_greedy; i++) {
        fx_seq seq = {.tokens = tokens,
                      .start = i == 0 ? 0 : c->n_prompt + i - 1,
                      .n = i == 0 ? c->n_prompt : 1,
                      .pages = pages,
                      .adapter = fx_golden_slot(g, c->adapter),
                      .logits = 1};
        float *row = fx_step(g->model, &seq, 1);
        int32_t best = argmax(row, g->vocab);
        float loss = row[best] - row[c->greedy[i]];
        cr_expect(loss <= MARGIN, "%s, %s: token %d of the answer is %d, not %d, by %g", g->dir,
                  c->name, i, best, c->greedy[i], (double)loss);
        free(row);
    }
    free(tokens);
}

/* All models, split like this. */
static void check_split(fx_split split, const char *all_reduce)
{
    int found = 0;
    for (size_t m = 0; m < sizeof models / sizeof *models; m++) {
        fx_golden g;
        qv_backend_options options = {.name = "cuda", .all_reduce = all_reduce};
        if (split.expert_groups > 1 && m == 0)
            continue; /* has no experts */
        if (!fx_golden_open_split(&g, models[m].name, &options, &split))
            continue;
        found++;
        fprintf(stderr, "%s, %d ranks%s, ep %d, %s:", models[m].name, split.n_ranks,
                split.own_devices ? "" : " on one device", split.expert_groups, all_reduce);
        for (size_t a = 0; a < sizeof adapters / sizeof *adapters; a++) {
            if (!has_adapter(&g, adapters[a]))
                continue;
            errors e = errors_of(&g, adapters[a]);
            fprintf(stderr, " %.1e (%.1e)", e.mean, e.trimmed);
            cr_expect_leq(e.trimmed, models[m].limit, "%s, %s: %g", models[m].name, adapters[a],
                          e.trimmed);
            cr_expect_leq(e.mean, MEAN_WITH_FLIPS, "%s, %s: %g", models[m].name, adapters[a],
                          e.mean);
        }
        fprintf(stderr, "\n");
        int checked = 0;
        for (int i = 0; i < g.n && checked < 3; i++)
            if (g.cases[i].greedy != NULL && has_adapter(&g, g.cases[i].adapter)) {
                check_greedy(&g, &g.cases[i]);
                checked++;
            }
        fx_golden_close(&g);
    }
    if (found == 0)
        cr_skip_test("fewer than %d CUDA devices, or no golden models: %s",
                     split.own_devices ? split.n_ranks : 1, qv_error());
}

Test(cuda_ranks, two_ranks_on_one_device_are_as_near_as_one, .timeout = 180)
{
    check_split((fx_split){2, 1, false}, "nccl");
}

Test(cuda_ranks, two_ranks_on_one_device_that_write_to_each_other_are_as_near, .timeout = 180)
{
    check_split((fx_split){2, 1, false}, "direct");
    check_split((fx_split){2, 2, false}, "direct");
}

Test(cuda_ranks, two_devices_through_nccl_are_as_near_as_one, .timeout = 180)
{
    check_split((fx_split){2, 1, true}, "nccl");
    check_split((fx_split){2, 2, true}, "nccl");
}

Test(cuda_ranks, two_devices_that_write_to_each_other_are_as_near_as_one, .timeout = 180)
{
    check_split((fx_split){2, 1, true}, "direct");
    check_split((fx_split){2, 2, true}, "auto");
}

Test(cuda_ranks, four_devices_are_as_near_as_one, .timeout = 180)
{
    check_split((fx_split){4, 1, true}, "direct");
    check_split((fx_split){4, 4, true}, "auto");
    check_split((fx_split){4, 2, true}, "nccl");
}
