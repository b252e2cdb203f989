/* Every family, as a tiny model, against itself: however a sequence is cut into steps, with
 * whatever it shares them, on however many threads, the bits are the same. */
#include "tests/models/fixtures_moe.h"
#include "tests/models/nemotron_reference.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 50, N = 131 };

static void draw_tokens(int32_t *tokens, int32_t n, uint64_t seed)
{
    qv_rng rng = qv_rng_seed(seed);
    for (int32_t i = 0; i < n; i++)
        tokens[i] = (int32_t)qv_rng_range(&rng, 0, VOCAB);
}

Test(families, give_the_same_bits_whatever_the_chunks)
{
    static const int32_t chunks[] = {1, 7, 64};
    for (int family = 0; family < FX_N_FAMILIES; family++) {
        qv_backend *be = fx_backend();
        qv_model_limits limits = fx_limits();
        qv_model *model = fx_open(be, fx_family_write(family, VOCAB, 1), &limits);
        int32_t tokens[N];
        draw_tokens(tokens, N, 2);
        float *whole = fx_run(model, tokens, N, 0, -1, 0, 0);
        for (int k = 0; k < 3; k++) {
            float *cut = fx_run(model, tokens, N, chunks[k], -1, 40, 1);
            cr_expect_arr_eq(cut, whole, sizeof *whole * N * VOCAB, "%s in chunks of %d",
                             fx_family_name(family), chunks[k]);
            free(cut);
        }
        free(whole);
        qv_model_close(model);
        qv_backend_close(be);
    }
}

/* A family's model on a backend of its own. */
typedef struct {
    qv_backend *be;
    qv_model *model;
} setup;

static setup open_family(fx_family family, int n_threads)
{
    setup s;
    qv_backend_options options = {.name = "cpu", .n_threads = n_threads};
    cr_assert_eq(qv_backend_open(&options, &s.be), QV_OK, "%s", qv_error());
    qv_model_limits limits = fx_limits();
    s.model = fx_open(s.be, fx_family_write(family, VOCAB, 1), &limits);
    return s;
}

static void close_family(setup *s)
{
    qv_model_close(s->model);
    qv_backend_close(s->be);
}

Test(families, give_the_same_bits_on_any_number_of_threads)
{
    int32_t tokens[N];
    draw_tokens(tokens, N, 3);
    for (int family = 0; family < FX_N_FAMILIES; family++) {
        float *want = NULL;
        for (int threads = 1; threads <= 3; threads++) {
            setup s = open_family(family, threads);
            float *got = fx_run(s.model, tokens, N, 0, -1, 0, 0);
            if (want != NULL)
                cr_expect_arr_eq(got, want, sizeof *got * N * VOCAB, "%s on %d threads",
                                 fx_family_name(family), threads);
            free(want);
            want = got;
            close_family(&s);
        }
        free(want);
    }
}

/* Long and short, beginning, in the middle and decoding: each as it would be alone. */
Test(families, give_the_same_bits_alone_and_in_a_mixed_batch)
{
    static const struct {
        int32_t n, start; /* the step runs [start, n) */
    } rows[] = {{131, 0}, {1, 0}, {40, 39}, {17, 5}, {64, 0}, {70, 69}, {3, 1}};
    enum { N_SEQS = sizeof rows / sizeof *rows };
    for (int family = 0; family < FX_N_FAMILIES; family++) {
        setup s = open_family(family, 2);
        int32_t tokens[N_SEQS][N], pages[N_SEQS][16], next_page = 0, n_logits = 0;
        fx_seq seqs[N_SEQS];
        for (int i = 0; i < N_SEQS; i++) {
            draw_tokens(tokens[i], N, 100 + (uint64_t)i);
            for (int p = 0; p < 16; p++)
                pages[i][p] = next_page++;
            seqs[i] = (fx_seq){.tokens = tokens[i],
                               .n = rows[i].start,
                               .pages = pages[i],
                               .state_slot = i,
                               .adapter = -1};
            if (rows[i].start > 0) /* what came before this step */
                free(fx_step(s.model, &seqs[i], 1));
            seqs[i].start = rows[i].start;
            seqs[i].n = seqs[i].logits = rows[i].n - rows[i].start;
            n_logits += seqs[i].logits;
        }
        float *mixed = fx_step(s.model, seqs, N_SEQS), *row = mixed;
        for (int i = 0; i < N_SEQS; i++) {
            float *alone = fx_run(s.model, tokens[i], rows[i].n, 0, -1, 150, 33);
            cr_expect_arr_eq(row, alone + rows[i].start * VOCAB,
                             sizeof *row * (size_t)seqs[i].logits * VOCAB, "%s, sequence %d",
                             fx_family_name(family), i);
            row += seqs[i].logits * VOCAB;
            free(alone);
        }
        cr_expect_eq(row - mixed, n_logits * VOCAB);
        free(mixed);
        close_family(&s);
    }
}

Test(families, resume_a_saved_sequence_in_other_pages_and_another_slot)
{
    static const int32_t cuts[] = {1, 2, 37, 48, 130};
    int32_t tokens[N], other[N], from[16], to[16];
    draw_tokens(tokens, N, 4);
    draw_tokens(other, N, 5);
    for (int i = 0; i < 16; i++)
        from[i] = 20 - i, to[i] = 30 + 3 * i;
    for (int family = 0; family < FX_N_FAMILIES; family++) {
        setup s = open_family(family, 2);
        float *whole = fx_run(s.model, tokens, N, 0, -1, 100, 0);
        for (size_t k = 0; k < sizeof cuts / sizeof *cuts; k++) {
            int32_t cut = cuts[k], n_pages = (cut + 15) / 16;
            fx_seq seq = {
                .tokens = tokens, .n = cut, .pages = from, .state_slot = 3, .adapter = -1};
            free(fx_step(s.model, &seq, 1));
            size_t bytes = qv_model_state_bytes(s.model, n_pages);
            void *saved = malloc(bytes);
            cr_assert_eq(qv_model_state_save(s.model, from, n_pages, 3, saved), QV_OK);
            free(fx_run(s.model, other, N, 0, -1, 5, 3)); /* another one takes its place */
            cr_assert_eq(qv_model_state_restore(s.model, to, n_pages, 7, saved), QV_OK);
            seq = (fx_seq){.tokens = tokens,
                           .start = cut,
                           .n = N - cut,
                           .pages = to,
                           .state_slot = 7,
                           .adapter = -1,
                           .logits = N - cut};
            float *rest = fx_step(s.model, &seq, 1);
            cr_expect_arr_eq(rest, whole + cut * VOCAB, sizeof *rest * (size_t)(N - cut) * VOCAB,
                             "%s, cut at %d", fx_family_name(family), cut);
            free(rest);
            free(saved);
        }
        free(whole);
        close_family(&s);
    }
}

/* --- Against the formulas --------------------------------------------------------------------- */

/* Routing depends on the scores' order, so seeds are such that no two scores are close. */
Test(families, nemotron_is_what_its_formulas_say)
{
    static const fx_family families[] = {FX_NANO, FX_SUPER};
    int32_t tokens[N];
    draw_tokens(tokens, N, 6);
    for (int i = 0; i < 2; i++) {
        for (uint64_t seed = 21; seed < 24; seed++) {
            fx_file file = {.n = 0};
            fx_family_model(&file, families[i], NULL, FX_ONE_BY_ONE, QV_BF16, VOCAB, seed);
            char *config = fx_family_config(families[i], VOCAB);
            qv_backend *be = fx_backend();
            qv_model_limits limits = fx_limits();
            qv_model *model = fx_open(be, fx_write_model(config, &file), &limits);
            float *got = fx_run(model, tokens, N, 50, -1, 0, 0);
            double *want = nemotron_reference(qv_model_get_config(model), &file, tokens, N);
            cr_expect(qv_close_f64(fx_family_name(families[i]), got, want, N * VOCAB, 2e-5),
                      "seed %d", (int)seed);
            free(got), free(want), free(config);
            qv_model_close(model);
            qv_backend_close(be);
            fx_free(&file);
        }
    }
}
