/* Every family, as a tiny model, against itself: however a sequence is cut into steps, with
 * whatever it shares them, on however many threads, the bits are the same. */
#include "tests/models/fixtures_moe.h"

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
