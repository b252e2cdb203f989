/* Whole models on CUDA with `deterministic`: the logits of every token of a sequence have the same
 * bits token by token and in chunks, alone and beside other sequences with other adapters, in
 * recorded steps and others.
 *
 * Golden models with all of their adapters where they are at hand, and always the bundled one and
 * two tiny mixtures of experts of odd sizes. QV_PAIR=cpu puts the CPU in CUDA's place, which must
 * pass as well. On the emulated device (tests/emulate/), which is slow, with short texts and few
 * adapters.
 */
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_ADAPTERS = 16, MAX_LENGTH = 90, N_OTHERS = 12, PAGES_EACH = 8, N_TEXTS = 24 };

/* A model, its adapters (-1: base), and texts to run through it. */
typedef struct {
    qv_backend *be;
    qv_model *model;
    int64_t vocab;
    int n_adapters, most_adapters, n_others;
    bool slow;
    char names[MAX_ADAPTERS][32];
    int32_t text[N_TEXTS][MAX_LENGTH], length[N_TEXTS];
} subject;

/* --- Subjects ----------------------------------------------------------------------------- */

/* Skips the test where there is no device. */
static qv_backend *open_backend(void)
{
    const char *pair = getenv("QV_PAIR");
    qv_backend *be;
    const qv_backend_options cuda = {.name = "cuda", .deterministic = true}, cpu = {.name = "cpu"};
    bool on_cpu = pair != NULL && strcmp(pair, "cpu") == 0;
    if (qv_backend_open(on_cpu ? &cpu : &cuda, &be) != QV_OK)
        cr_skip_test("no CUDA device: %s", qv_error());
    return be;
}

static subject open_subject(const char *dir, int n_slots)
{
    subject s = {.be = open_backend()};
    qv_model_limits limits = fx_limits();
    s.slow = strstr(qv_backend_describe(s.be), "emulated") != NULL;
    s.most_adapters = s.slow ? (n_slots > 3 ? 1 : 2) : n_slots;
    s.n_others = s.slow ? 3 : N_OTHERS;
    limits.n_adapter_slots = n_slots;
    limits.n_pages = (N_OTHERS + 1) * PAGES_EACH;
    limits.n_state_slots = N_OTHERS + 1;
    limits.max_seq_pages = 64;
    limits.max_recorded = s.slow ? 4 : N_OTHERS + 4;
    s.model = fx_open(s.be, dir, &limits);
    s.vocab = qv_model_get_config(s.model)->vocab;
    qv_rng rng = qv_rng_seed(51);
    for (int i = 0; i < N_TEXTS; i++) {
        s.length[i] = i == 0 ? MAX_LENGTH : 20 + 11 * i % 60;
        s.length[i] = s.slow && s.length[i] > 18 ? 18 : s.length[i];
        for (int j = 0; j < s.length[i]; j++)
            s.text[i][j] = (int32_t)qv_rng_range(&rng, 0, s.vocab);
    }
    return s;
}

static void close_subject(subject *s)
{
    qv_model_close(s->model);
    qv_backend_close(s->be);
}

static void add_adapter(subject *s, const char *dir, const char *name)
{
    qv_adapter *adapter;
    cr_assert_eq(qv_adapter_open(s->model, qv_path(dir, "adapters/%s", name), &adapter), QV_OK,
                 "%s", qv_error());
    cr_assert_eq(qv_model_adapter_install(s->model, s->n_adapters, adapter), QV_OK, "%s",
                 qv_error());
    qv_adapter_close(adapter);
    snprintf(s->names[s->n_adapters++], sizeof s->names[0], "%s", name);
}

/* --- Steps -------------------------------------------------------------------------------- */

static void check_rows(const subject *s, const char *what, int32_t adapter, int32_t first,
                       int32_t n, const float *got, const float *want)
{
    for (int32_t i = 0; i < n; i++)
        for (int64_t v = 0; v < s->vocab; v++)
            cr_assert(qv_f32_bits(got[i * s->vocab + v]) ==
                          qv_f32_bits(want[(first + i) * s->vocab + v]),
                      "%s, %s: token %d, logit %lld is %.9g, alone and one by one %.9g", what,
                      adapter < 0 ? "base" : s->names[adapter], first + i, (long long)v,
                      (double)got[i * s->vocab + v], (double)want[(first + i) * s->vocab + v]);
}

/* Alone, in chunks. */
static void check_chunks(const subject *s, int32_t adapter, const float *want)
{
    static const int32_t chunks[] = {0, 7, 2, 64, 65};
    for (size_t i = 0; i < (s->slow ? 2 : sizeof chunks / sizeof *chunks); i++) {
        char what[32];
        float *got = fx_run(s->model, s->text[0], s->length[0], chunks[i], adapter, 0, 0);
        snprintf(what, sizeof what, "chunks of %d", chunks[i]);
        check_rows(s, what, adapter, 0, s->length[0], got, want);
        free(got);
    }
}

/* Beside other sequences of all adapters, which begin again when they are done. Every third step
 * has one token of each, as decode does; in the others chunks of several lengths meet. */
static void check_mixed(const subject *s, int32_t adapter, const float *want)
{
    static const int32_t cuts[] = {5, 1, 1, 16, 1, 3, 2, 1};
    fx_seq seqs[N_OTHERS + 1];
    int32_t pages[N_OTHERS + 1][PAGES_EACH], at[N_OTHERS + 1] = {0};
    for (int i = 0; i <= s->n_others; i++) {
        for (int j = 0; j < PAGES_EACH; j++)
            pages[i][j] = i * PAGES_EACH + j;
        seqs[i] = (fx_seq){.tokens = s->text[i],
                           .pages = pages[i],
                           .state_slot = i,
                           .adapter = i % (s->n_adapters + 1) - 1,
                           .logits = 1};
    }
    seqs[0].adapter = adapter;
    for (int step = 0; at[0] < s->length[0]; step++) {
        int n_seqs = 1 + (step < 3 ? step : s->n_others - step % 3);
        for (int i = 0; i < n_seqs; i++) {
            int32_t most = s->length[i] - at[i], n = step % 3 == 2 ? 1 : 1 + (7 * i + step) % 23;
            if (i == 0)
                n = step % 3 == 2 ? 1 : cuts[step % (int)(sizeof cuts / sizeof *cuts)];
            seqs[i].start = at[i];
            seqs[i].n = n < most ? n : most;
            at[i] += seqs[i].n;
            if (i > 0 && at[i] == s->length[i])
                at[i] = 0;
        }
        seqs[0].logits = seqs[0].n;
        float *rows = fx_step(s->model, seqs, n_seqs);
        check_rows(s, "beside others", adapter, seqs[0].start, seqs[0].n, rows, want);
        free(rows);
    }
}

static void check_subject(const subject *s)
{
    for (int32_t adapter = -1; adapter < s->n_adapters; adapter++) {
        float *want = fx_run(s->model, s->text[0], s->length[0], 1, adapter, 0, 0);
        check_chunks(s, adapter, want);
        check_mixed(s, adapter, want);
        free(want);
    }
}

/* --- Tests -------------------------------------------------------------------------------- */

/* Adapters that reach routed experts, the embedding and the head are among them. */
static void check_golden(const char *name)
{
    static const char *const adapters[] = {"emoji", "french",  "french-per-expert", "head",
                                           "json",  "partial", "shared-outer"};
    const char *dir = qv_golden_path(name);
    if (dir == NULL)
        cr_skip_test("no golden models");
    subject s = open_subject(dir, MAX_ADAPTERS);
    for (size_t i = 0; i < sizeof adapters / sizeof *adapters; i++)
        if (s.n_adapters < s.most_adapters &&
            access(qv_path(dir, "adapters/%s", adapters[i]), R_OK) == 0)
            add_adapter(&s, dir, adapters[i]);
    check_subject(&s);
    close_subject(&s);
}

Test(cuda_model_bits, of_the_golden_dense_model, .timeout = 600)
{
    check_golden("tiny-qwen3.5");
}

Test(cuda_model_bits, of_the_golden_mixture, .timeout = 600)
{
    check_golden("tiny-qwen3.5-moe");
}

Test(cuda_model_bits, of_the_golden_nano, .timeout = 600)
{
    check_golden("tiny-nemotron3-nano");
}

Test(cuda_model_bits, of_the_golden_super, .timeout = 600)
{
    check_golden("tiny-nemotron3-super");
}

Test(cuda_model_bits, of_the_bundled_model, .timeout = 600)
{
    const char *dir = getenv("QV_SOURCE_DIR") ? qv_demo_path("tiny-qwen3.5") : NULL;
    QV_SKIP_WITHOUT(dir); /* as on a machine that has the test program alone */
    subject s = open_subject(dir, 3);
    add_adapter(&s, dir, "json");
    add_adapter(&s, dir, "french");
    if (s.most_adapters > 2)
        add_adapter(&s, dir, "emoji");
    check_subject(&s);
    close_subject(&s);
}

Test(cuda_model_bits, of_mixtures_of_odd_sizes, .timeout = 600)
{
    for (int kind = FX_QWEN_MOE; kind <= FX_NEMOTRON; kind++) {
        fx_file file = {.n = 0};
        fx_random_moe(&file, (fx_moe_kind)kind, QV_BF16, 52);
        subject s = open_subject(fx_write_model(fx_moe_model((fx_moe_kind)kind).config, &file), 3);
        cr_assert_eq(qv_model_make_up_adapters(s.model, 7), QV_OK, "%s", qv_error());
        while (s.n_adapters < s.most_adapters)
            snprintf(s.names[s.n_adapters++], sizeof s.names[0], "made up");
        check_subject(&s);
        close_subject(&s);
        fx_free(&file);
    }
}
