/* Tokens per second of the whole engine, in one process: prompts and answers apart, at 1, 8 and 64
 * requests at once, with 0, 1 and 4 adapters; and what a mixed batch of 4 adapters costs against
 * the base model. Medians over repetitions; `+-` is half the distance between the quartiles. The
 * gap is how long the device had nothing to do between two steps of answers, in the median.
 *
 * Answers ignore EOS, so that every request makes the same number of tokens. Four adapters are the
 * model's own ones, loaded again under other names where there are fewer; a copy with the same
 * content would share its slot, so copies get another lora_alpha.
 */
#include "bench/engine_bench.h"
#include "common/clock.h"
#include "common/json.h"
#include "common/log.h"
#include "worker/engine_options.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N_ADAPTERS = 4, MAX_REPS = 64 };

typedef struct {
    qv_engine_options engine;
    const char *adapters; /* folder of adapters; NULL = <model>/adapters */
    int64_t reps, prompt, answer;
    bool quick;
} settings;

static const qv_option option_table[] = {
    QV_OPTION(settings, adapters, STRING, "adapters", "DIR", NULL,
              "Folder of adapters; default: adapters/ in the model's folder.",
              .section = "Measurement"),
    QV_OPTION(settings, reps, INT, "reps", "N", "7", "Repetitions of each row.", .min = 1,
              .max = MAX_REPS, .section = "Measurement"),
    QV_OPTION(settings, prompt, INT, "prompt-tokens", "N", "128", "Tokens of each prompt.",
              .min = 1, .max = 1 << 20, .section = "Measurement"),
    QV_OPTION(settings, answer, INT, "answer-tokens", "N", "64", "Tokens of each answer.", .min = 2,
              .max = 1 << 20, .section = "Measurement"),
    QV_OPTION(settings, quick, FLAG, "quick", NULL, NULL,
              "Two repetitions with short prompts and answers, to see that it works.",
              .section = "Measurement"),
    QV_ENGINE_OPTIONS(settings, engine),
};

static const qv_program program = {
    .name = "bench_engine",
    .summary = "Tokens per second of the engine at 1, 8 and 64 requests with 0, 1 and 4 adapters.",
};

static void die(const char *what)
{
    fprintf(stderr, "bench_engine: %s: %s\n", what, qv_error());
    exit(1);
}

/* --- Adapters -------------------------------------------------------------------------------- */

/* A path; lives until the arena of paths is given back. */
static qv_arena paths;

#define PATH(...) must(qv_arena_printf(&paths, __VA_ARGS__))

static const char *must(const char *path)
{
    if (path == NULL)
        die("no memory");
    return path;
}

/* Copy an adapter's folder with another lora_alpha, which makes it another content. */
static void copy_adapter(const char *from, const char *to, int n)
{
    json_t *config;
    if (qv_json_load_file(PATH("%s/adapter_config.json", from), 1 << 20, &config) != QV_OK)
        die(from);
    int64_t alpha = json_integer_value(json_object_get(config, "lora_alpha"));
    json_object_set_new(config, "lora_alpha", json_integer(alpha + n));
    if (mkdir(to, 0700) != 0 || json_dump_file(config, PATH("%s/adapter_config.json", to), 0) != 0)
        die(to);
    json_decref(config);
    char *weights = realpath(PATH("%s/adapter_model.safetensors", from), NULL);
    if (weights == NULL || symlink(weights, PATH("%s/adapter_model.safetensors", to)) != 0)
        die(from);
    free(weights);
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static int is_visible(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

static void step(qv_engine *engine, qv_step_result *result)
{
    if (!qv_engine_has_work(engine)) {
        struct pollfd pfd = {.fd = qv_engine_fd(engine), .events = POLLIN};
        poll(&pfd, 1, -1);
    }
    if (qv_engine_step(engine, result) != QV_OK)
        die("step");
}

/* Load N_ADAPTERS adapters as "0", "1", ...; false if there is none to load. */
static bool load_adapters(qv_engine *engine, const char *dir)
{
    struct dirent **entries;
    int n = scandir(dir, &entries, is_visible, by_name);
    if (n <= 0)
        return false;
    char scratch[] = "/tmp/quiver-bench-XXXXXX";
    if (mkdtemp(scratch) == NULL)
        die(scratch);
    for (int i = 0; i < N_ADAPTERS; i++) {
        const char *from = PATH("%s/%s", dir, entries[i % n]->d_name);
        const char *to = PATH("%s/%d", scratch, i);
        copy_adapter(from, to, i / n);
        if (qv_engine_load_adapter(engine, PATH("%d", i), to, false) != QV_OK)
            die(from);
    }
    int n_loaded = 0;
    while (n_loaded < N_ADAPTERS) {
        qv_step_result result;
        step(engine, &result);
        for (uint32_t i = 0; i < result.n_adapters; i++, n_loaded++)
            if (result.adapters[i].phase != QV_ADAPTER_READY) {
                fprintf(stderr, "bench_engine: %s\n", result.adapters[i].reason);
                exit(1);
            }
    }
    for (int i = 0; i < N_ADAPTERS; i++) {
        remove(PATH("%s/%d/adapter_config.json", scratch, i));
        remove(PATH("%s/%d/adapter_model.safetensors", scratch, i));
        remove(PATH("%s/%d", scratch, i));
    }
    rmdir(scratch);
    for (int i = 0; i < n; i++)
        free(entries[i]);
    free(entries);
    return true;
}

/* --- Figures ------------------------------------------------------------------------------------
 */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

typedef struct {
    double median, spread; /* of the repetitions; half the distance between the quartiles */
} figure;

static figure figure_of(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    double median = n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
    return (figure){median, (values[(3 * n) / 4 < n ? (3 * n) / 4 : n - 1] - values[n / 4]) / 2};
}

/* --- One run --------------------------------------------------------------------------------- */

typedef struct {
    double prefill, decode; /* tokens per second */
    double gap;             /* between steps that decode all requests, in seconds; NaN: none seen */
} rates;

/* Gaps of one run. */
enum { MAX_GAPS = 4096 };
static double gaps[MAX_GAPS];

static void submit(qv_engine *engine, const settings *s, uint64_t number, int adapter)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    qv_msg_submit *m = &message.submit;
    char name[16] = "";
    if (adapter >= 0)
        snprintf(name, sizeof name, "%d", adapter);
    int32_t vocab = (int32_t)qv_tokenizer_vocab_size(qv_engine_tokenizer(engine));
    int32_t *tokens = malloc((size_t)s->prompt * sizeof *tokens);
    for (int64_t i = 0; i < s->prompt; i++)
        tokens[i] =
            vocab / 4 + (int32_t)((number * 7919 + (uint64_t)i * 104729) % (uint64_t)(vocab / 2));
    qv_ints ints = {tokens, (uint32_t)s->prompt};
    qv_set(m, submit, id, qv_str_from("bench"));
    qv_set(m, submit, adapter, qv_str_from(name));
    qv_set(m, submit, tokens, ints);
    qv_set(m, submit, max_tokens, s->answer);
    qv_set(m, submit, temperature, 0);
    qv_set(m, submit, ignore_eos, true);
    qv_request *request;
    qv_code code;
    if (qv_request_new(engine, m, number, 0, NULL, 0, &request, &code) != QV_OK ||
        qv_engine_submit(engine, request) != QV_OK)
        die("submit");
    free(tokens);
}

/* Run `n_requests` at once, spread over `n_adapters` (0 = base alone). The prompts' time ends with
 * the last first token, the answers' begins there. */
static rates run_once(qv_engine *engine, const settings *s, int n_requests, int n_adapters)
{
    static uint64_t number;
    for (int i = 0; i < n_requests; i++)
        submit(engine, s, ++number, n_adapters > 0 ? i % n_adapters : -1);
    int64_t n_first = 0, n_done = 0, n_prefill = 0, n_decode = 0;
    int n_gaps = 0;
    uint64_t start_ns = qv_now_ns(), first_ns = 0;
    while (n_done < n_requests) {
        qv_engine_stats before, after;
        qv_step_result result;
        qv_engine_get_stats(engine, &before);
        step(engine, &result);
        qv_engine_get_stats(engine, &after);
        double gap = qv_engine_gap(engine);
        if (first_ns != 0 && result.n_tokens == (uint32_t)n_requests && !isnan(gap) &&
            n_gaps < MAX_GAPS)
            gaps[n_gaps++] = gap;
        for (uint32_t i = 0; i < result.n_deltas; i++) {
            if (qv_has(&result.deltas[i], delta, error_code))
                die("a request failed");
            n_first += result.deltas[i].seq == 0;
            n_done += qv_has(&result.deltas[i], delta, finish_reason);
        }
        if (first_ns == 0)
            n_prefill += (int64_t)(after.tokens_prefilled - before.tokens_prefilled +
                                   after.tokens_decoded - before.tokens_decoded);
        else
            n_decode += (int64_t)(after.tokens_generated - before.tokens_generated);
        if (first_ns == 0 && n_first == n_requests)
            first_ns = qv_now_ns();
    }
    uint64_t end_ns = qv_now_ns();
    return (rates){
        .prefill = (double)n_prefill / ((double)(first_ns - start_ns) * 1e-9),
        .decode = (double)n_decode / ((double)(end_ns - first_ns) * 1e-9),
        .gap = n_gaps > 0 ? figure_of(gaps, n_gaps).median : NAN,
    };
}

/* --- Tables ---------------------------------------------------------------------------------- */

static const int concurrency[] = {1, 8, 64};
static const int adapter_counts[] = {0, 1, N_ADAPTERS};
enum { N_CONCURRENCY = 3, N_COUNTS = 3 };

/* Repetitions of all adapter counts in turn, so that a machine that slows down slows all. */
static void measure(qv_engine *engine, const settings *s, int n_requests, int n_counts,
                    figure prefill[N_COUNTS], figure decode[N_COUNTS], figure gap[N_COUNTS])
{
    double p[N_COUNTS][MAX_REPS], d[N_COUNTS][MAX_REPS], g[N_COUNTS][MAX_REPS];
    int reps = (int)s->reps;
    for (int rep = -1; rep < reps; rep++) /* -1 warms up */
        for (int c = 0; c < n_counts; c++) {
            rates r = run_once(engine, s, n_requests, adapter_counts[c]);
            if (rep < 0)
                continue;
            p[c][rep] = r.prefill;
            d[c][rep] = r.decode;
            g[c][rep] = r.gap;
        }
    for (int c = 0; c < n_counts; c++) {
        prefill[c] = figure_of(p[c], reps);
        decode[c] = figure_of(d[c], reps);
        gap[c] = figure_of(g[c], reps);
    }
}

static void print_tables(qv_engine *engine, const settings *s, int n_counts)
{
    printf("engine: %s, %s\n", s->engine.model_dir, qv_engine_device(engine));
    printf("prompts of %d tokens, answers of %d, %d repetitions, median +- half the quartiles\n\n",
           (int)s->prompt, (int)s->answer, (int)s->reps);
    printf("%9s %9s %22s %22s %8s %12s %12s\n", "requests", "adapters", "prefill tokens/s",
           "decode tokens/s", "gap us", "prefill cost", "decode cost");
    for (int i = 0; i < N_CONCURRENCY; i++) {
        figure prefill[N_COUNTS], decode[N_COUNTS], gap[N_COUNTS];
        measure(engine, s, concurrency[i], n_counts, prefill, decode, gap);
        for (int c = 0; c < n_counts; c++) {
            if (adapter_counts[c] > concurrency[i])
                continue;
            printf("%9d %9d %14.0f +- %4.0f %14.0f +- %4.0f %8.1f", concurrency[i],
                   adapter_counts[c], prefill[c].median, prefill[c].spread, decode[c].median,
                   decode[c].spread, gap[c].median * 1e6);
            if (c > 0)
                printf(" %11.1f%% %11.1f%%", 100 * (prefill[0].median / prefill[c].median - 1),
                       100 * (decode[0].median / decode[c].median - 1));
            putchar('\n');
        }
    }
    printf("\ncost: time per token over that of the base model alone, at the same concurrency\n");
}

/* --- Main ------------------------------------------------------------------------------------ */

int main(int argc, char **argv)
{
    settings s;
    qv_options *options;
    qv_log_init(&(qv_log_options){.level = QV_LOG_WARN, .program = "bench_engine"});
    if (bench_parse(option_table, sizeof option_table / sizeof *option_table, &program, argc, argv,
                    &s, &options) != QV_OK)
        die("options");
    if (qv_options_printed(options)) {
        qv_options_free(options);
        return EXIT_SUCCESS;
    }
    if (s.quick) {
        s.reps = 2;
        s.prompt = 32;
        s.answer = 8;
    }
    qv_engine *engine;
    if (qv_engine_open(&s.engine, NULL, &engine) != QV_OK)
        die("open");
    qv_engine_watch_gaps(engine, true);
    const char *dir = s.adapters != NULL ? s.adapters : PATH("%s/adapters", s.engine.model_dir);
    bool has_adapters = s.engine.adapter_slots >= N_ADAPTERS && load_adapters(engine, dir);
    if (!has_adapters)
        fprintf(stderr, "bench_engine: no adapters in %s, or fewer than %d slots: base only\n", dir,
                N_ADAPTERS);
    print_tables(engine, &s, has_adapters ? N_COUNTS : 1);
    qv_engine_close(engine);
    qv_options_free(options);
    qv_arena_deinit(&paths);
    return EXIT_SUCCESS;
}
