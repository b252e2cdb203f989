/* A model that is watched runs op by op what is otherwise one kernel (norms, RoPE and the write of
 * pages; attention and its gate), and records no steps. The bits are to be the same, so the bundled
 * model must have the same logits with a probe and without, in prompts, chunks and decode steps. */
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

enum { N = 150, N_SEQS = 5, N_STEPS = 4 };

/* Skips the test where there is no device. */
static qv_model *open_demo(qv_backend **be)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    if (qv_backend_open(&(qv_backend_options){.name = "cuda"}, be) != QV_OK)
        cr_skip_test("no CUDA device: %s", qv_error());
    qv_model_limits limits = fx_limits();
    limits.max_seq_pages = 20;
    limits.max_recorded = 8;
    return fx_open(*be, dir, &limits);
}

static void count(int64_t layer, const char *name, const qv_tensor *value, void *user)
{
    (void)layer, (void)name, (void)value;
    (*(int *)user)++;
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

Test(cuda_probe, a_model_has_the_same_logits_when_it_is_watched)
{
    static const int32_t chunks[] = {0, 7, 1};
    enum { N_CHUNKS = sizeof chunks / sizeof *chunks };
    qv_backend *be;
    qv_model *model = open_demo(&be);
    int64_t vocab = qv_model_get_config(model)->vocab;
    int32_t tokens[N];
    qv_rng rng = qv_rng_seed(1);
    for (int i = 0; i < N; i++)
        tokens[i] = (int32_t)qv_rng_range(&rng, 0, vocab);
    int n_prompt = strstr(qv_backend_describe(be), "emulated") != NULL ? N / 3 : N;
    float *prompts[2][N_CHUNKS], *steps[2];
    int seen = 0;
    for (int watched = 0; watched < 2; watched++) {
        qv_model_set_probe(model, watched ? count : NULL, &seen);
        for (int i = 0; i < N_CHUNKS; i++)
            prompts[watched][i] =
                fx_run(model, tokens, chunks[i] == 1 ? 20 : n_prompt, chunks[i], -1, 100, 8);
        steps[watched] = decode(model, tokens);
    }
    cr_assert_gt(seen, 0);
    for (int i = 0; i < N_CHUNKS; i++)
        check_bits("prompt", prompts[0][i], prompts[1][i],
                   (chunks[i] == 1 ? 20 : n_prompt) * vocab);
    check_bits("decode", steps[0], steps[1], N_STEPS * N_SEQS * vocab);
    qv_model_close(model);
    qv_backend_close(be);
}
