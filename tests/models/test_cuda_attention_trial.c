/* Trial `attention` in a whole model: its kernels give the bits of those that they stand for, so
 * the bundled model must have the same logits with it and without, in prompts, chunks and recorded
 * decode steps. */
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <stdlib.h>

enum { N = 150, N_SEQS = 5, N_STEPS = 4 };

typedef struct {
    qv_backend *be;
    qv_model *model;
} opened;

/* Skips the test where there is no device. */
static opened open_demo(const char *trials)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    opened o;
    const qv_backend_options options = {.name = "cuda", .trials = trials};
    if (qv_backend_open(&options, &o.be) != QV_OK)
        cr_skip_test("no CUDA device: %s", qv_error());
    qv_model_limits limits = fx_limits();
    limits.max_seq_pages = 20;
    limits.max_recorded = 8;
    o.model = fx_open(o.be, dir, &limits);
    return o;
}

static void close_demo(opened *o)
{
    qv_model_close(o->model);
    qv_backend_close(o->be);
}

static void check_bits(const char *what, float *got, float *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        cr_assert(got[i] == want[i], "%s: number %lld is %.9g, not %.9g", what, (long long)i,
                  (double)got[i], (double)want[i]);
    free(got);
    free(want);
}

/* Logits of decode steps of sequences that are i tokens apart. The caller frees. */
static float *decode(qv_model *model, const int32_t *tokens)
{
    int64_t vocab = qv_model_get_config(model)->vocab;
    float *out = malloc((size_t)(N_STEPS * N_SEQS * vocab) * sizeof *out);
    int32_t pages[N_SEQS][20];
    fx_seq seqs[N_SEQS];
    for (int i = 0; i < N_SEQS; i++) {
        for (int j = 0; j < 20; j++)
            pages[i][j] = i * 20 + j;
        seqs[i] = (fx_seq){.tokens = tokens,
                           .n = 20 + 17 * i,
                           .pages = pages[i],
                           .state_slot = i,
                           .adapter = -1,
                           .logits = 1};
        free(fx_step(model, &seqs[i], 1));
    }
    for (int step = 0; step < N_STEPS; step++) {
        for (int i = 0; i < N_SEQS; i++) {
            seqs[i].start = 20 + 17 * i + step;
            seqs[i].n = 1;
        }
        float *rows = fx_step(model, seqs, N_SEQS);
        memcpy(out + step * N_SEQS * vocab, rows, (size_t)(N_SEQS * vocab) * sizeof *out);
        free(rows);
    }
    return out;
}

Test(cuda_attention_trial, a_model_has_the_same_logits_with_it)
{
    opened without = open_demo(NULL), with = open_demo("attention");
    int64_t vocab = qv_model_get_config(with.model)->vocab;
    int32_t tokens[N];
    qv_rng rng = qv_rng_seed(1);
    for (int i = 0; i < N; i++)
        tokens[i] = (int32_t)qv_rng_range(&rng, 0, vocab);
    static const int32_t chunks[] = {0, 7, 1};
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
        int32_t n = chunks[i] == 1 ? 20 : N;
        check_bits("prompt", fx_run(with.model, tokens, n, chunks[i], -1, 100, 8),
                   fx_run(without.model, tokens, n, chunks[i], -1, 100, 8), n * vocab);
    }
    check_bits("decode", decode(with.model, tokens), decode(without.model, tokens),
               N_STEPS * N_SEQS * vocab);
    close_demo(&with);
    close_demo(&without);
}
