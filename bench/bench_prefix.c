/* The prefix cache: what it costs when nothing hits, and how soon the first token comes when most
 * of a prompt was seen before. Two engines in one process, with the cache and without, take turns,
 * so that a machine that slows down slows both; ratios are of neighbours, medians over repetitions.
 *
 * The KV cache is small and full before anything is timed, so that in the first table every page of
 * a new prompt is taken from an old one, and most snapshots too.
 */
#include "bench/engine_bench.h"
#include "common/log.h"
#include "worker/engine_options.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_REPS = 256 };

typedef struct {
    qv_engine_options engine;
    int64_t reps, answer, shared;
    bool quick, cpu_time;
} settings;

static const qv_option option_table[] = {
    QV_OPTION(settings, reps, INT, "reps", "N", "21", "Repetitions of each row.", .min = 2,
              .max = MAX_REPS, .section = "Measurement"),
    QV_OPTION(settings, answer, INT, "answer-tokens", "N", "64",
              "Tokens of each answer of the first table.", .min = 1, .max = 1 << 20,
              .section = "Measurement"),
    QV_OPTION(settings, shared, INT, "shared", "PERCENT", "80",
              "Part of a prompt that was seen before, in the second table.", .min = 1, .max = 99,
              .section = "Measurement"),
    QV_OPTION(settings, cpu_time, FLAG, "cpu-time", NULL, NULL,
              "Count CPU time, not time: for a machine that others use, with --threads 1.",
              .section = "Measurement"),
    QV_OPTION(settings, quick, FLAG, "quick", NULL, NULL,
              "Few repetitions and short prompts, to see that it works.", .section = "Measurement"),
    QV_ENGINE_OPTIONS(settings, engine),
};

static const qv_program program = {
    .name = "bench_prefix",
    .summary =
        "Cost of the prefix cache when nothing hits, and its gain when most of a prompt does.",
};

static void die(const char *what)
{
    fprintf(stderr, "bench_prefix: %s: %s\n", what, qv_error());
    exit(1);
}

static clockid_t the_clock = CLOCK_MONOTONIC;

static double now(void) /* seconds */
{
    struct timespec t;
    clock_gettime(the_clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* --- Requests -------------------------------------------------------------------------------- */

/* A prompt of n tokens, the first n_shared of them the same for every request of a family. */
static void submit(qv_engine *engine, uint64_t number, uint64_t family, int32_t n, int32_t n_shared,
                   int64_t answer)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    qv_msg_submit *m = &message.submit;
    uint64_t vocab = qv_tokenizer_vocab_size(qv_engine_tokenizer(engine)) / 2;
    int32_t *tokens = malloc((size_t)n * sizeof *tokens);
    for (int32_t i = 0; i < n; i++) {
        uint64_t seed = i < n_shared ? family * 1000003 : number * 7919 + 17;
        tokens[i] = (int32_t)((seed + (uint64_t)i * (104729 + seed % 97)) % vocab);
    }
    qv_ints ints = {tokens, (uint32_t)n};
    qv_set(m, submit, id, qv_str_from("bench"));
    qv_set(m, submit, tokens, ints);
    qv_set(m, submit, max_tokens, answer);
    qv_set(m, submit, temperature, 0);
    qv_set(m, submit, ignore_eos, true);
    qv_request *request;
    qv_code code;
    if (qv_request_new(engine, m, number, 0, NULL, 0, &request, &code) != QV_OK ||
        qv_engine_submit(engine, request) != QV_OK)
        die("submit");
    free(tokens);
}

/* Run until n answers have ended; tokens of their prompts that were cached. */
static int64_t run(qv_engine *engine, int n)
{
    int64_t n_cached = 0;
    while (n > 0) {
        qv_step_result result;
        if (qv_engine_step(engine, &result) != QV_OK)
            die("step");
        for (uint32_t i = 0; i < result.n_deltas; i++) {
            if (qv_has(&result.deltas[i], delta, error_code))
                die("a request failed");
            if (!qv_has(&result.deltas[i], delta, finish_reason))
                continue;
            n--;
            n_cached += result.deltas[i].usage.cached_tokens;
        }
    }
    return n_cached;
}

static uint64_t next_number(void)
{
    static uint64_t number;
    return ++number;
}

/* --- Figures --------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

typedef struct {
    double median, spread; /* half the distance between the quartiles */
} figure;

static figure figure_of(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return (figure){(values[(n - 1) / 2] + values[n / 2]) / 2,
                    (values[(3 * n) / 4] - values[n / 4]) / 2};
}

/* --- Nothing hits ---------------------------------------------------------------------------- */

/* Seconds that n new prompts and their answers take. */
static double time_strangers(qv_engine *engine, int n, int32_t prompt, int64_t answer)
{
    for (int i = 0; i < n; i++)
        submit(engine, next_number(), 0, prompt, 0, answer);
    double start = now();
    if (run(engine, n) != 0)
        die("a new prompt was found in the cache");
    return now() - start;
}

/* New prompts until every page has been in use. */
static void fill(qv_engine *engine, int32_t prompt)
{
    qv_engine_stats stats;
    do {
        time_strangers(engine, 1, prompt, 1);
        qv_engine_get_stats(engine, &stats);
    } while (stats.prefix.pages_evicted == 0);
}

static void print_cost(qv_engine *const engines[2], const settings *s, int n, int32_t prompt)
{
    double seconds[2][MAX_REPS], ratio[MAX_REPS];
    for (int rep = -1; rep < s->reps; rep++) { /* -1 warms up */
        double both[2];
        for (int i = 0; i < 2; i++) { /* each is first as often as the other */
            int which = (i + rep) & 1;
            both[which] = time_strangers(engines[which], n, prompt, s->answer);
        }
        if (rep < 0)
            continue;
        seconds[0][rep] = both[0];
        seconds[1][rep] = both[1];
        ratio[rep] = 100 * (both[1] / both[0] - 1);
    }
    figure off = figure_of(seconds[0], (int)s->reps), on = figure_of(seconds[1], (int)s->reps),
           cost = figure_of(ratio, (int)s->reps);
    double tokens = n * ((double)prompt + (double)s->answer);
    printf("%9d %8d %14.0f %14.0f %9.2f%% +- %.2f%%\n", n, prompt, tokens / off.median,
           tokens / on.median, cost.median, cost.spread);
}

/* --- Most of it hits ------------------------------------------------------------------------- */

/* Milliseconds to the first token of a prompt that shares its beginning with its family. */
static double time_first_token(qv_engine *engine, uint64_t family, int32_t prompt, int32_t n_shared,
                               int64_t *n_cached)
{
    submit(engine, next_number(), family, prompt, n_shared, 1);
    double start = now();
    *n_cached = run(engine, 1);
    return (now() - start) * 1e3;
}

/* The first of a family knows nothing, the second shows where it leaves the first, from the third
 * on the beginning is skipped. */
static void print_gain(qv_engine *const engines[2], const settings *s, int32_t prompt)
{
    double off[MAX_REPS], sight[3][MAX_REPS], ratio[MAX_REPS];
    int32_t n_shared = (int32_t)(prompt * s->shared / 100);
    int64_t n_cached = 0, unused;
    for (int rep = 0; rep < s->reps; rep++) {
        uint64_t family = next_number();
        off[rep] = time_first_token(engines[0], family, prompt, n_shared, &unused);
        for (int i = 0; i < 3; i++)
            sight[i][rep] = time_first_token(engines[1], family, prompt, n_shared, &n_cached);
        ratio[rep] = sight[2][rep] / off[rep];
    }
    int reps = (int)s->reps;
    printf("%9d %8d %8d %11.2f %11.2f %11.2f %11.2f %9.2f\n", prompt, n_shared, (int)n_cached,
           figure_of(off, reps).median, figure_of(sight[0], reps).median,
           figure_of(sight[1], reps).median, figure_of(sight[2], reps).median,
           figure_of(ratio, reps).median);
}

/* --- Main ------------------------------------------------------------------------------------ */

/* The same engine without the cache and with it, with room for twice what runs at once. */
static void open_engines(settings *s, int32_t longest, qv_engine *engines[2])
{
    qv_engine_options *o = &s->engine;
    o->adapter_slots = 0;
    o->prefix_cache = false;
    if (o->max_context == 0)
        o->max_context = longest + s->answer;
    if (o->kv_bytes == 0) { /* the bytes of a page are known when the model is */
        if (qv_engine_open(o, NULL, &engines[0]) != QV_OK)
            die("open");
        int64_t n_pages = 2 * 64 * (128 + s->answer) / o->page_tokens;
        o->kv_bytes = n_pages * (int64_t)qv_engine_plan(engines[0])->kv_page;
        qv_engine_close(engines[0]);
    }
    for (int i = 0; i < 2; i++) {
        o->prefix_cache = i == 1;
        if (qv_engine_open(o, NULL, &engines[i]) != QV_OK)
            die("open");
    }
}

int main(int argc, char **argv)
{
    static const int32_t prompts[] = {128, 512, 1536};
    static const int concurrency[] = {1, 8, 64};
    settings s;
    qv_options *options;
    qv_log_init(&(qv_log_options){.level = QV_LOG_WARN, .program = "bench_prefix"});
    if (bench_parse(option_table, sizeof option_table / sizeof *option_table, &program, argc, argv,
                    &s, &options) != QV_OK)
        die("options");
    if (qv_options_printed(options)) {
        qv_options_free(options);
        return EXIT_SUCCESS;
    }
    if (s.cpu_time)
        the_clock = CLOCK_PROCESS_CPUTIME_ID;
    int n_prompts = 3;
    if (s.quick) {
        s.reps = 3;
        s.answer = 8;
        n_prompts = 2;
    }
    int32_t longest = prompts[n_prompts - 1];
    qv_engine *engines[2];
    open_engines(&s, longest, engines);
    fill(engines[1], longest);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("prefix cache: %s, %s\n", s.engine.model_dir, qv_engine_device(engines[0]));
    printf("%d repetitions, %s, medians, +- is half the distance between the quartiles\n\n",
           (int)s.reps, s.cpu_time ? "CPU time" : "wall time");
    printf("nothing hits; answers of %d tokens\n%9s %8s %14s %14s %20s\n", (int)s.answer,
           "requests", "prompt", "tokens/s off", "tokens/s on", "cost");
    for (int i = 0; i < 3; i++)
        for (int p = 0; p < n_prompts - i; p++) /* long prompts where few run */
            print_cost(engines, &s, concurrency[i], prompts[p]);
    printf("\nms to the first token, alone; of a prompt, %d %% are shared\n", (int)s.shared);
    printf("%9s %8s %8s %11s %11s %11s %11s %9s\n", "prompt", "shared", "cached", "off", "1st",
           "2nd", "3rd on", "3rd/off");
    for (int p = 0; p < n_prompts; p++)
        print_gain(engines, &s, prompts[p]);
    for (int i = 0; i < 2; i++)
        qv_engine_close(engines[i]);
    qv_options_free(options);
    return EXIT_SUCCESS;
}
