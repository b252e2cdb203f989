/* The whole model against its reference, and against itself: however a sequence is cut into steps,
 * with whatever it shares them, the bits are the same. */
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Agreement asked of a float32 engine with the reference: see the golden data's README. */
#define TOLERANCE 2e-4

static const char *const adapters[] = {"json", "french", "emoji", "partial", "head"};
enum { N_ADAPTERS = 5, MAX_CASES = 64 };

/* Put the adapters that `dir` has into the slots of their index. */
static void install_all(qv_model *model, const char *dir)
{
    for (int i = 0; i < N_ADAPTERS; i++) {
        const char *path = qv_path(dir, "adapters/%s", adapters[i]);
        qv_adapter *adapter;
        if (access(path, F_OK) != 0)
            continue;
        cr_assert_eq(qv_adapter_open(model, path, &adapter), QV_OK, "%s", qv_error());
        cr_assert_eq(qv_model_adapter_install(model, i, adapter), QV_OK);
        qv_adapter_close(adapter);
    }
}

static int32_t slot_of(const char *adapter)
{
    for (int i = 0; i < N_ADAPTERS; i++) {
        if (strcmp(adapters[i], adapter) == 0)
            return i;
    }
    return -1;
}

/* Largest difference of a case's logprobs from the golden ones. */
static double worst_logprob(const fx_case *c, const float *logits, int64_t vocab)
{
    double worst = 0;
    for (int32_t t = 0; t + 1 < c->n; t++) {
        double got = fx_logprob(logits + t * vocab, vocab, c->tokens[t + 1]);
        worst = fmax(worst, fabs(got - c->logprobs[t]));
    }
    return worst;
}

/* A model with all adapters installed, and its cases. */
typedef struct {
    const char *dir;
    qv_backend *be;
    qv_model *model;
    int64_t vocab;
    fx_case *cases;
    int n;
} setup;

static setup open_golden_with(const char *dir, const char *gemm)
{
    setup s = {.dir = dir};
    qv_backend_options options = {.name = "cpu", .n_threads = 2, .gemm = gemm};
    cr_assert_eq(qv_backend_open(&options, &s.be), QV_OK, "%s", qv_error());
    qv_model_limits limits = fx_limits();
    limits.max_tokens = limits.max_logits = 6000;
    limits.max_seqs = MAX_CASES;
    limits.n_pages = 1600;
    limits.n_state_slots = MAX_CASES;
    s.model = fx_open(s.be, dir, &limits);
    s.vocab = qv_model_get_config(s.model)->vocab;
    install_all(s.model, dir);
    s.cases = fx_cases(dir, &s.n);
    cr_assert(s.n > 0 && s.n <= MAX_CASES);
    return s;
}

static setup open_golden(const char *dir)
{
    return open_golden_with(dir, "exact");
}

static void close_golden(setup *s)
{
    fx_cases_free(s->cases, s->n);
    qv_model_close(s->model);
    qv_backend_close(s->be);
}

Test(forward, agrees_with_every_golden_case)
{
    static const char *const gemms[] = {"exact", "openblas"};
    const char *dir = qv_golden_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    for (int g = 0; g < 2; g++) {
        setup s = open_golden_with(dir, gemms[g]);
        double worst = 0;
        for (int i = 0; i < s.n; i++) {
            const fx_case *c = &s.cases[i];
            float *logits = fx_run(s.model, c->tokens, c->n, 0, slot_of(c->adapter), 0, 0);
            double error = worst_logprob(c, logits, s.vocab);
            cr_expect_lt(error, TOLERANCE, "%s, %s: %g", gemms[g], c->name, error);
            worst = fmax(worst, error);
            free(logits);
        }
        fprintf(stderr, "%s: %d golden cases, worst logprob error %.2g\n", gemms[g], s.n, worst);
        close_golden(&s);
    }
}

static int32_t argmax(const float *row, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        best = row[i] > row[best] ? i : best;
    return (int32_t)best;
}

Test(forward, continues_prompts_greedily_as_the_reference_does)
{
    const char *dir = qv_golden_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    setup s = open_golden(dir);
    int n_checked = 0;
    int32_t pages[64];
    for (int i = 0; i < 64; i++)
        pages[i] = i;
    for (int i = 0; i < s.n; i++) {
        const fx_case *c = &s.cases[i];
        int32_t tokens[1024], n = c->n_prompt;
        memcpy(tokens, c->tokens, (size_t)n * sizeof *tokens);
        fx_seq seq = {.tokens = tokens, .n = n, .pages = pages, .logits = 1};
        seq.adapter = slot_of(c->adapter);
        for (int32_t g = 0; g < c->n_greedy; g++) {
            float *row = fx_step(s.model, &seq, 1);
            tokens[n++] = argmax(row, s.vocab);
            free(row);
            cr_assert_eq(tokens[n - 1], c->greedy[g], "%s: token %d of the answer", c->name, g);
            seq.start = n - 1, seq.n = 1;
            n_checked++;
        }
    }
    cr_assert_gt(n_checked, 0);
    close_golden(&s);
}

Test(forward, gives_the_same_bits_whatever_the_chunks)
{
    const char *dir = qv_golden_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    setup s = open_golden(dir);
    static const int32_t chunks[] = {1, 7, 64};
    for (int i = 0; i < s.n; i++) {
        const fx_case *c = &s.cases[i];
        int32_t slot = slot_of(c->adapter);
        float *whole = fx_run(s.model, c->tokens, c->n, 0, slot, 0, 0);
        for (int k = 0; k < 3; k++) {
            float *cut = fx_run(s.model, c->tokens, c->n, chunks[k], slot, 40, 1);
            cr_expect_arr_eq(cut, whole, (size_t)(c->n * s.vocab) * sizeof *whole,
                             "%s in chunks of %d", c->name, chunks[k]);
            free(cut);
        }
        free(whole);
    }
    close_golden(&s);
}

Test(forward, gives_the_same_bits_alone_and_in_a_mixed_batch)
{
    const char *dir = qv_golden_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    setup s = open_golden(dir);
    fx_seq seqs[MAX_CASES];
    int32_t pages[MAX_CASES][64], next_page = 40;
    for (int i = 0; i < s.n; i++) {
        for (int32_t p = 0; p * 16 < s.cases[i].n; p++)
            pages[i][p] = next_page++;
        seqs[i] = (fx_seq){.tokens = s.cases[i].tokens,
                           .n = s.cases[i].n,
                           .pages = pages[i],
                           .state_slot = i,
                           .adapter = slot_of(s.cases[i].adapter),
                           .logits = s.cases[i].n};
    }
    float *mixed = fx_step(s.model, seqs, s.n), *row = mixed;
    for (int i = 0; i < s.n; i++) {
        const fx_case *c = &s.cases[i];
        float *alone = fx_run(s.model, c->tokens, c->n, 0, seqs[i].adapter, 0, 0);
        size_t bytes = (size_t)(c->n * s.vocab) * sizeof *alone;
        cr_expect_arr_eq(row, alone, bytes, "%s", c->name);
        row += c->n * s.vocab;
        free(alone);
    }
    free(mixed);
    close_golden(&s);
}

Test(forward, leaves_base_requests_as_they_are_without_adapter_slots)
{
    const char *dir = qv_golden_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    setup s = open_golden(dir);
    qv_model_limits limits = fx_limits();
    limits.n_adapter_slots = 0;
    qv_model *plain = fx_open(s.be, dir, &limits);
    for (int i = 0; i < s.n; i++) {
        const fx_case *c = &s.cases[i];
        if (c->adapter[0] != '\0')
            continue;
        float *with = fx_run(s.model, c->tokens, c->n, 0, -1, 0, 0);
        float *without = fx_run(plain, c->tokens, c->n, 0, -1, 0, 0);
        cr_expect_arr_eq(with, without, (size_t)(c->n * s.vocab) * sizeof *with, "%s", c->name);
        free(with);
        free(without);
    }
    qv_model_close(plain);
    close_golden(&s);
}

/* --- With the bundled model ------------------------------------------------------------------- */

/* Tokens that look like text to nobody, for tests that compare the model with itself. */
static void draw_tokens(int32_t *tokens, int32_t n, int64_t vocab, uint64_t seed)
{
    qv_rng rng = qv_rng_seed(seed);
    for (int32_t i = 0; i < n; i++)
        tokens[i] = (int32_t)qv_rng_range(&rng, 0, vocab);
}

Test(forward, resumes_a_saved_sequence_in_other_pages_and_another_slot)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, dir, &limits);
    int64_t vocab = qv_model_get_config(model)->vocab;
    install_all(model, dir);
    enum { N = 61, CUT = 37, PAGES = 3 };
    int32_t tokens[N], from[] = {5, 2, 9}, to[] = {30, 31, 12, 33};
    draw_tokens(tokens, N, vocab, 1);
    float *whole = fx_run(model, tokens, N, 0, 1, 100, 0);

    fx_seq head = {.tokens = tokens, .n = CUT, .pages = from, .state_slot = 3, .adapter = 1};
    head.logits = 1;
    free(fx_step(model, &head, 1));
    size_t bytes = qv_model_state_bytes(model, PAGES);
    void *saved = malloc(bytes), *again = malloc(bytes);
    cr_assert_eq(qv_model_state_save(model, from, PAGES, 3, saved), QV_OK);
    free(fx_run(model, tokens, N, 0, 2, 0, 3)); /* another sequence takes pages 0.. and slot 3 */
    cr_assert_eq(qv_model_state_restore(model, to, PAGES, 7, saved), QV_OK);
    cr_assert_eq(qv_model_state_save(model, to, PAGES, 7, again), QV_OK);
    cr_assert_arr_eq(saved, again, bytes);

    fx_seq tail = {.tokens = tokens,
                   .start = CUT,
                   .n = N - CUT,
                   .pages = to,
                   .state_slot = 7,
                   .adapter = 1,
                   .logits = N - CUT};
    float *rest = fx_step(model, &tail, 1);
    cr_assert_arr_eq(rest, whole + CUT * vocab, (size_t)((N - CUT) * vocab) * sizeof *rest);
    free(rest);
    free(whole);
    free(saved);
    free(again);
    qv_model_close(model);
    qv_backend_close(be);
}

Test(forward, starts_from_nothing_at_position_zero_whatever_the_slot_holds)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, dir, &limits);
    int64_t vocab = qv_model_get_config(model)->vocab;
    int32_t first[20], second[20];
    draw_tokens(first, 20, vocab, 1);
    draw_tokens(second, 20, vocab, 2);
    float *fresh = fx_run(model, first, 20, 0, -1, 0, 0);
    free(fx_run(model, second, 20, 0, -1, 0, 0));
    float *reused = fx_run(model, first, 20, 0, -1, 0, 0);
    cr_assert_arr_eq(fresh, reused, (size_t)(20 * vocab) * sizeof *fresh);
    free(fresh);
    free(reused);
    qv_model_close(model);
    qv_backend_close(be);
}

Test(forward, each_adapter_changes_the_answer)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, dir, &limits);
    int64_t vocab = qv_model_get_config(model)->vocab;
    install_all(model, dir);
    int32_t tokens[16];
    draw_tokens(tokens, 16, vocab, 3);
    float *base = fx_run(model, tokens, 16, 0, -1, 0, 0);
    for (int i = 0; i < 3; i++) {
        float *adapted = fx_run(model, tokens, 16, 0, i, 0, 0);
        cr_expect_arr_neq(base, adapted, (size_t)vocab * sizeof *base, "%s", adapters[i]);
        free(adapted);
    }
    float *empty_slot = fx_run(model, tokens, 16, 0, 5, 0, 0);
    cr_expect_arr_eq(base, empty_slot, (size_t)(16 * vocab) * sizeof *base);
    free(empty_slot);
    free(base);
    qv_model_close(model);
    qv_backend_close(be);
}

/* A loader that fills and clears slot 3 until it is told to stop. */
typedef struct {
    qv_model *model;
    const char *dir;
    atomic_bool stop;
    int n_loads;
} busy_loader;

static void *load_again_and_again(void *arg)
{
    busy_loader *loader = arg;
    do {
        qv_adapter *adapter;
        cr_assert_eq(qv_adapter_open(loader->model, loader->dir, &adapter), QV_OK);
        cr_assert_eq(qv_model_adapter_install(loader->model, 3, adapter), QV_OK);
        qv_adapter_close(adapter);
        cr_assert_eq(qv_model_adapter_clear(loader->model, 3), QV_OK);
        loader->n_loads++;
    } while (!atomic_load(&loader->stop));
    return NULL;
}

Test(forward, steps_are_untouched_by_loads_into_other_slots)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, dir, &limits);
    int64_t vocab = qv_model_get_config(model)->vocab;
    install_all(model, dir);
    int32_t tokens[24];
    draw_tokens(tokens, 24, vocab, 4);
    float *want[2] = {fx_run(model, tokens, 24, 0, -1, 0, 0),
                      fx_run(model, tokens, 24, 0, 1, 0, 0)};

    busy_loader loader = {.model = model, .dir = qv_path(dir, "adapters/emoji")};
    pthread_t thread;
    cr_assert_eq(pthread_create(&thread, NULL, load_again_and_again, &loader), 0);
    for (int i = 0; i < 20; i++) {
        float *got = fx_run(model, tokens, 24, 5, i % 2 ? 1 : -1, 0, 0);
        cr_expect_arr_eq(got, want[i % 2], (size_t)(24 * vocab) * sizeof *got);
        free(got);
    }
    atomic_store(&loader.stop, true);
    pthread_join(thread, NULL);
    cr_expect_gt(loader.n_loads, 0);
    free(want[0]);
    free(want[1]);
    qv_model_close(model);
    qv_backend_close(be);
}

static void count_probes(int64_t layer, const char *name, const qv_tensor *value, void *user)
{
    int *n = user;
    cr_assert(layer >= -1 && name[0] != '\0' && value->data != NULL);
    (*n)++;
}

Test(forward, shows_every_named_intermediate_to_a_probe)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, dir, &limits);
    int n = 0;
    qv_model_set_probe(model, count_probes, &n);
    free(fx_run(model, (int32_t[]){5, 6, 7}, 3, 0, -1, 0, 0));
    int64_t layers = qv_model_get_config(model)->n_layers;
    cr_assert_geq(n, layers * 6);
    qv_model_close(model);
    qv_backend_close(be);
}

Test(forward, refuses_steps_larger_than_planned)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    qv_backend *be = fx_backend();
    qv_model_limits limits = fx_limits();
    qv_model *model = fx_open(be, dir, &limits);
    const struct {
        qv_batch batch;
        qv_status status;
    } rows[] = {
        {{.n_tokens = 0, .n_seqs = 0}, QV_ERR_SHAPE},
        {{.n_tokens = limits.max_tokens + 1, .n_seqs = 1}, QV_ERR_LIMIT},
        {{.n_tokens = 1, .n_seqs = limits.max_seqs + 1}, QV_ERR_LIMIT},
        {{.n_tokens = 1, .n_seqs = 1, .n_logits = limits.max_logits + 1}, QV_ERR_LIMIT},
        {{.n_tokens = -1, .n_seqs = 1}, QV_ERR_LIMIT},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_tensor logits;
        cr_expect_eq(qv_model_forward(model, &rows[i].batch, &logits), rows[i].status, "row %zu",
                     i);
    }
    qv_model_close(model);
    qv_backend_close(be);
}

Test(forward, plans_the_memory_that_the_limits_ask_for)
{
    qv_backend *be = fx_backend();
    qv_model_config config;
    const char *text = fx_config_text(true);
    cr_assert_eq(qv_model_config_parse(text, strlen(text), NULL, 0, "test", &config), QV_OK, "%s",
                 qv_error());
    qv_model_limits limits = fx_limits();
    qv_memory_plan plan, twice;
    cr_assert_eq(qv_model_plan(&config, be, &limits, &plan), QV_OK);
    /* One layer of attention: keys and values of 2 heads of 12, 16 tokens a page, float32. */
    cr_expect_eq(plan.kv_page, 2 * 16 * 24 * 4);
    /* Two of DeltaNet: 3 columns of 92 channels, and 6 heads of 8 x 10. */
    cr_expect_eq(plan.state_slot, 2 * (3 * 92 + 6 * 8 * 10) * 4);
    limits.n_pages *= 2, limits.n_adapter_slots *= 2;
    cr_assert_eq(qv_model_plan(&config, be, &limits, &twice), QV_OK);
    cr_expect_eq(twice.kv, 2 * plan.kv);
    cr_expect_eq(twice.adapters, 2 * plan.adapters);
    cr_expect_eq(twice.total - plan.total, plan.kv + plan.adapters);
    limits.n_pages = 0;
    cr_expect_eq(qv_model_plan(&config, be, &limits, &plan), QV_ERR_LIMIT);
    qv_backend_close(be);
}
