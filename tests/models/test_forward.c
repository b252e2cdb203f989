/* The whole model against itself: saved states, reused slots, loads beside steps, limits. Agreement
 * with its reference is tested in test_golden.c. */
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const adapters[] = {"json", "french", "emoji"};
enum { N_ADAPTERS = 3 };

/* Put the adapters of the bundled model into the slots of their index. */
static void install_all(qv_model *model, const char *dir)
{
    for (int i = 0; i < N_ADAPTERS; i++) {
        const char *path = qv_path(dir, "adapters/%s", adapters[i]);
        qv_adapter *adapter;
        cr_assert_eq(qv_adapter_open(model, path, &adapter), QV_OK, "%s", qv_error());
        cr_assert_eq(qv_model_adapter_install(model, i, adapter), QV_OK);
        qv_adapter_close(adapter);
    }
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
