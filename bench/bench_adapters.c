/* What it costs to have more adapters than slots: requests that come at random (Poisson), each for
 * an adapter drawn from a Zipf distribution, at the same rate with as many adapters as slots, twice
 * and eight times as many. Where the adapter was when its request came, time to the first token,
 * tokens per second when requests queue up, and how often adapters were copied and read.
 *
 * Adapters are made here, in a temporary folder: the shapes of one of the model's own, with random
 * numbers. The rate is a share of what the first row can do, measured first. Each row has an engine
 * of its own; repetitions of all rows take turns, so that a machine that slows down slows all.
 */
#include "bench/engine_bench.h"
#include "common/clock.h"
#include "common/log.h"
#include "models/safetensors.h"
#include "worker/engine_options.h"

#include <dirent.h>
#include <ftw.h>
#include <inttypes.h>
#include <math.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_REPS = 32, MAX_ADAPTERS = 4096, N_ROWS = 5, N_IN_FLIGHT = 32 };

typedef struct {
    qv_engine_options engine;
    const char *adapter;
    int64_t reps, requests, prompt, answer;
    double load, zipf;
    bool quick;
} settings;

static const qv_option option_table[] = {
    QV_OPTION(settings, adapter, STRING, "adapter", "DIR", NULL,
              "Adapter whose shapes the others get; default: the largest in adapters/ of the "
              "model's folder.",
              .section = "Measurement"),
    QV_OPTION(settings, reps, INT, "reps", "N", "11", "Repetitions of each row.", .min = 1,
              .max = MAX_REPS, .section = "Measurement"),
    QV_OPTION(settings, requests, INT, "requests", "N", "120", "Requests of each repetition.",
              .min = 16, .max = 100000, .section = "Measurement"),
    QV_OPTION(settings, prompt, INT, "prompt-tokens", "N", "32", "Tokens of each prompt.", .min = 1,
              .max = 1 << 20, .section = "Measurement"),
    QV_OPTION(settings, answer, INT, "answer-tokens", "N", "16", "Tokens of each answer.", .min = 1,
              .max = 1 << 20, .section = "Measurement"),
    QV_OPTION(settings, load, DOUBLE, "load", "SHARE", "0.5",
              "Rate of requests, as a share of what as many adapters as slots can do.", .min = 0.01,
              .max = 1, .section = "Measurement"),
    QV_OPTION(settings, zipf, DOUBLE, "zipf", "S", "1",
              "The n-th adapter is asked for in proportion to 1/n^S.", .min = 0, .max = 4,
              .section = "Measurement"),
    QV_OPTION(settings, quick, FLAG, "quick", NULL, NULL,
              "One repetition of few requests, to see that it works.", .section = "Measurement"),
    QV_ENGINE_OPTIONS(settings, engine),
};

static const qv_program program = {
    .name = "bench_adapters",
    .summary = "Hit rate, time to first token and throughput with more adapters than slots.",
};

static void die(const char *what)
{
    fprintf(stderr, "bench_adapters: %s: %s\n", what, qv_error());
    exit(1);
}

static void *must(void *pointer)
{
    if (pointer == NULL)
        die("no memory");
    return pointer;
}

/* --- Random numbers --------------------------------------------------------------------------- */

static uint64_t random_u64(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9E3779B97F4A7C15)); /* splitmix64 */
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static double random_uniform(uint64_t *state)
{
    return (double)(random_u64(state) >> 11) * 0x1p-53;
}

/* --- Adapters --------------------------------------------------------------------------------- */

static char scratch[] = "/tmp/quiver-bench-XXXXXX";

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *ftw)
{
    (void)info, (void)type, (void)ftw;
    return remove(path);
}

static void remove_scratch(void)
{
    nftw(scratch, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

typedef struct {
    char *weights, *config;           /* whole files */
    size_t weights_size, config_size; /* the numbers of `weights` begin at data_start */
    size_t data_start;
    qv_dtype dtype;
} template;

static char *read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        qv_fail(QV_ERR_IO, "%s cannot be read", path);
        die("adapter");
    }
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *data = must(malloc(*size + 1));
    if (fread(data, 1, *size, file) != *size)
        die(path);
    fclose(file);
    return data;
}

static void write_file(const char *path, const char *data, size_t size)
{
    FILE *file = fopen(path, "wb");
    if (file == NULL || fwrite(data, 1, size, file) != size || fclose(file) != 0) {
        qv_fail(QV_ERR_IO, "%s cannot be written", path);
        die("adapter");
    }
}

static template read_template(const char *dir)
{
    template t = {0};
    char path[4096];
    uint64_t header;
    qv_safetensors *st;
    snprintf(path, sizeof path, "%s/adapter_config.json", dir);
    t.config = read_file(path, &t.config_size);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
    if (qv_safetensors_open_file(path, INT64_MAX, &st) != QV_OK)
        die("adapter");
    t.dtype = qv_safetensors_at(st, 0)->dtype;
    for (size_t i = 0; i < qv_safetensors_count(st); i++)
        if (qv_safetensors_at(st, i)->dtype != t.dtype) {
            qv_fail(QV_ERR_UNSUPPORTED, "%s has tensors of several dtypes", path);
            die("adapter");
        }
    qv_safetensors_close(st);
    t.weights = read_file(path, &t.weights_size);
    memcpy(&header, t.weights, sizeof header);
    t.data_start = sizeof header + header;
    return t;
}

/* Adapter i of the scratch folder: the template's shapes, small random numbers. */
static void write_adapter(const template *t, int i)
{
    enum { BLOCK = 4096 };
    char path[4096];
    float block[BLOCK];
    uint64_t state = (uint64_t)i + 1;
    size_t elem = qv_dtype_size(t->dtype);
    for (size_t at = t->data_start; at < t->weights_size;) {
        size_t n = (t->weights_size - at) / elem < BLOCK ? (t->weights_size - at) / elem : BLOCK;
        for (size_t k = 0; k < n; k++)
            block[k] = (float)(0.02 * random_uniform(&state) - 0.01);
        if (n == 0 || qv_dtype_from_f32(t->dtype, block, t->weights + at, (int64_t)n) != QV_OK)
            die("adapter");
        at += n * elem;
    }
    snprintf(path, sizeof path, "%s/%d", scratch, i);
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/%d/adapter_config.json", scratch, i);
    write_file(path, t->config, t->config_size);
    snprintf(path, sizeof path, "%s/%d/adapter_model.safetensors", scratch, i);
    write_file(path, t->weights, t->weights_size);
}

/* The adapter of the model's folder with the largest file. */
static const char *largest_adapter(const char *model_dir)
{
    static char best[4096];
    char path[4096], file[4352];
    off_t best_size = -1;
    snprintf(path, sizeof path, "%s/adapters", model_dir);
    DIR *dir = opendir(path);
    for (struct dirent *entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
        struct stat info;
        snprintf(file, sizeof file, "%.3800s/%s/adapter_model.safetensors", path, entry->d_name);
        if (stat(file, &info) == 0 && info.st_size > best_size) {
            best_size = info.st_size;
            snprintf(best, sizeof best, "%.3800s/%s", path, entry->d_name);
        }
    }
    if (dir != NULL)
        closedir(dir);
    if (best_size < 0) {
        qv_fail(QV_ERR_NOT_FOUND, "no adapter in %s; name one with --adapter", path);
        die("adapter");
    }
    return best;
}

/* --- One copy --------------------------------------------------------------------------------- */

static double median_of(double *values, int n);

/* Reading an adapter and copying it into a slot, beside a copy of as many bytes. */
static void print_copies(const settings *s)
{
    enum { N = 21 };
    char dir[4096];
    qv_backend *be;
    qv_model *model;
    qv_adapter *adapter[2];
    qv_model_config config;
    qv_memory_plan plan;
    qv_backend_options backend = {
        .name = s->engine.backend, .n_threads = (int)s->engine.threads, .gemm = s->engine.gemm};
    qv_model_limits limits = {.max_tokens = 16,
                              .max_seqs = 1,
                              .max_logits = 1,
                              .page_tokens = 16,
                              .n_pages = 1,
                              .n_state_slots = 1,
                              .n_adapter_slots = 2,
                              .max_lora_rank = (int32_t)s->engine.max_lora_rank,
                              .made_up_weights = strcmp(s->engine.load_format, "dummy") == 0};
    if (qv_backend_open(&backend, &be) != QV_OK ||
        qv_model_config_load(s->engine.model_dir, &config) != QV_OK ||
        qv_model_plan(&config, be, &limits, &plan) != QV_OK ||
        qv_model_open(s->engine.model_dir, be, &limits, NULL, NULL, &model) != QV_OK)
        die("model");
    double read_s[N], install_s[N], copy_s[N];
    for (int i = 0; i < N; i++) {
        uint64_t start = qv_now_ns();
        snprintf(dir, sizeof dir, "%s/%d", scratch, i % 2);
        if (qv_adapter_open(model, dir, &adapter[i % 2]) != QV_OK)
            die(dir);
        read_s[i] = (double)(qv_now_ns() - start) * 1e-9;
        if (i < N - 2)
            qv_adapter_close(adapter[i % 2]);
    }
    size_t bytes = qv_adapter_bytes(adapter[0]);
    char *from = must(malloc(bytes)), *to = must(malloc(bytes));
    memset(from, 1, bytes), memset(to, 2, bytes);
    for (int i = 0; i < N; i++) {
        uint64_t start = qv_now_ns();
        if (qv_model_adapter_install(model, i % 2, adapter[i / 2 % 2]) != QV_OK)
            die("install");
        uint64_t mid = qv_now_ns();
        memcpy(to, from, bytes);
        __asm__ volatile("" ::"r"(to) : "memory");
        install_s[i] = (double)(mid - start) * 1e-9;
        copy_s[i] = (double)(qv_now_ns() - mid) * 1e-9;
    }
    double install = median_of(install_s, N), copy = median_of(copy_s, N);
    printf("one adapter: %.2f MB in host memory, a slot has room for %.2f MB; read and checked in "
           "%.2f ms,\ncopied into a slot in %.3f ms (%.1f GB/s), a plain copy takes %.3f ms: "
           "x %.1f\n\n",
           (double)bytes * 1e-6, (double)plan.adapter_slot * 1e-6, 1e3 * median_of(read_s, N),
           1e3 * install, (double)bytes / install * 1e-9, 1e3 * copy, install / copy);
    free(from), free(to);
    qv_adapter_close(adapter[0]);
    qv_adapter_close(adapter[1]);
    qv_model_close(model);
    qv_backend_close(be);
}

/* --- Traffic ---------------------------------------------------------------------------------- */

typedef struct {
    int n_adapters;
    bool small_host; /* host memory for twice the slots only */
} row_kind;

/* Of one repetition of a row. */
typedef struct {
    double slot_hits, host_hits; /* shares of the requests */
    double ttft_p50, ttft_p95;   /* seconds */
    double tokens_per_s;         /* queued up; prompts and answers */
    double requests_per_s;       /* the same in requests */
    double installs, reads;      /* a hundred requests */
} outcome;

typedef struct {
    const settings *s;
    qv_engine *engine;
    int n_adapters;
    double *cumulative; /* [n_adapters] of the Zipf distribution */
    uint64_t random, number;
    uint64_t *due_ns; /* [requests] */
    double *ttft;     /* [requests]; -1 until its first token */
    int n_done, n_started;
} traffic;

static int draw_adapter(traffic *t)
{
    double u = random_uniform(&t->random) * t->cumulative[t->n_adapters - 1];
    int low = 0, high = t->n_adapters - 1;
    while (low < high) {
        int mid = (low + high) / 2;
        if (t->cumulative[mid] > u)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

static void submit(traffic *t, uint64_t number)
{
    const settings *s = t->s;
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    qv_msg_submit *m = &message.submit;
    char name[16];
    snprintf(name, sizeof name, "%d", draw_adapter(t));
    int32_t vocab = (int32_t)qv_tokenizer_vocab_size(qv_engine_tokenizer(t->engine));
    int32_t *tokens = must(malloc((size_t)s->prompt * sizeof *tokens));
    for (int64_t i = 0; i < s->prompt; i++)
        tokens[i] = vocab / 4 + (int32_t)(random_u64(&t->random) % (uint64_t)(vocab / 2));
    qv_ints ints = {tokens, (uint32_t)s->prompt};
    qv_set(m, submit, id, qv_str_from("bench"));
    qv_set(m, submit, adapter, qv_str_from(name));
    qv_set(m, submit, tokens, ints);
    qv_set(m, submit, max_tokens, s->answer);
    qv_set(m, submit, temperature, 0);
    qv_set(m, submit, ignore_eos, true);
    qv_request *request;
    qv_code code;
    if (qv_request_new(t->engine, m, number, 0, NULL, 0, &request, &code) != QV_OK ||
        qv_engine_submit(t->engine, request) != QV_OK)
        die("submit");
    free(tokens);
}

static void take_result(traffic *t, const qv_step_result *result)
{
    uint64_t now = qv_now_ns();
    for (uint32_t i = 0; i < result->n_deltas; i++) {
        const qv_msg_delta *delta = &result->deltas[i];
        if (qv_has(delta, delta, error_code)) {
            qv_fail(QV_ERR_INTERNAL, "%.*s", (int)delta->error_message.size,
                    delta->error_message.data);
            die("a request failed");
        }
        if (t->ttft[delta->request] < 0)
            t->ttft[delta->request] = (double)(now - t->due_ns[delta->request]) * 1e-9;
        t->n_done += qv_has(delta, delta, finish_reason);
    }
}

static void step(traffic *t, int timeout_ms)
{
    qv_step_result result;
    if (!qv_engine_has_work(t->engine)) {
        struct pollfd pfd = {.fd = qv_engine_fd(t->engine), .events = POLLIN};
        poll(&pfd, 1, timeout_ms);
        if (!qv_engine_has_work(t->engine))
            return;
    }
    if (qv_engine_step(t->engine, &result) != QV_OK)
        die("step");
    take_result(t, &result);
}

static void start_over(traffic *t)
{
    t->n_done = t->n_started = 0;
    for (int64_t i = 0; i < t->s->requests; i++)
        t->ttft[i] = -1;
}

/* N_IN_FLIGHT requests at any time. Seconds for all. */
static double run_queued(traffic *t)
{
    start_over(t);
    uint64_t start = qv_now_ns();
    while (t->n_done < t->s->requests) {
        while (t->n_started < t->s->requests && t->n_started - t->n_done < N_IN_FLIGHT) {
            t->due_ns[t->n_started] = qv_now_ns();
            submit(t, (uint64_t)t->n_started++);
        }
        step(t, -1);
    }
    return (double)(qv_now_ns() - start) * 1e-9;
}

/* Requests at random times, `rate` a second on average. */
static void run_poisson(traffic *t, double rate)
{
    start_over(t);
    double at = 0;
    uint64_t start = qv_now_ns();
    for (int64_t i = 0; i < t->s->requests; i++) {
        at -= log(1 - random_uniform(&t->random)) / rate;
        t->due_ns[i] = start + (uint64_t)(at * 1e9);
    }
    while (t->n_done < t->s->requests) {
        uint64_t now = qv_now_ns();
        while (t->n_started < t->s->requests && t->due_ns[t->n_started] <= now)
            submit(t, (uint64_t)t->n_started++);
        int wait_ms = -1;
        if (t->n_started < t->s->requests)
            wait_ms = (int)((t->due_ns[t->n_started] - now) / 1000000);
        step(t, wait_ms);
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double quantile_of(double *values, int n, double q)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return values[(int)(q * (n - 1) + 0.5)];
}

static double median_of(double *values, int n)
{
    return quantile_of(values, n, 0.5);
}

static void open_traffic(traffic *t, const settings *s, row_kind kind, uint64_t adapter_bytes)
{
    qv_engine_options options = s->engine;
    size_t n = (size_t)s->requests;
    *t = (traffic){.s = s, .n_adapters = kind.n_adapters, .random = 1};
    t->cumulative = must(malloc((size_t)kind.n_adapters * sizeof(double)));
    t->due_ns = must(malloc(n * sizeof *t->due_ns));
    t->ttft = must(malloc(n * sizeof *t->ttft));
    for (int i = 0; i < kind.n_adapters; i++)
        t->cumulative[i] = (i > 0 ? t->cumulative[i - 1] : 0) + pow(i + 1, -s->zipf);
    if (kind.small_host)
        options.adapter_cache_bytes = 2 * s->engine.adapter_slots * (int64_t)adapter_bytes;
    if (qv_engine_open(&options, NULL, &t->engine) != QV_OK)
        die("open");
    char name[16], dir[4096];
    for (int i = 0; i < kind.n_adapters; i++) {
        snprintf(name, sizeof name, "%d", i);
        snprintf(dir, sizeof dir, "%s/%d", scratch, i);
        if (qv_engine_load_adapter(t->engine, name, dir, false) != QV_OK)
            die(dir);
    }
    for (int n_ready = 0; n_ready < kind.n_adapters;) {
        qv_step_result result;
        struct pollfd pfd = {.fd = qv_engine_fd(t->engine), .events = POLLIN};
        if (!qv_engine_has_work(t->engine))
            poll(&pfd, 1, -1);
        if (qv_engine_step(t->engine, &result) != QV_OK)
            die("step");
        for (uint32_t i = 0; i < result.n_adapters; i++, n_ready++)
            if (result.adapters[i].phase != QV_ADAPTER_READY) {
                qv_fail(QV_ERR_INTERNAL, "%s", result.adapters[i].reason);
                die("load");
            }
    }
}

static void close_traffic(traffic *t)
{
    qv_engine_close(t->engine);
    free(t->cumulative);
    free(t->due_ns);
    free(t->ttft);
}

/* One repetition: warm up, requests at random, requests queued up. `rate` 0: the last alone. */
static outcome run_once(const settings *s, row_kind kind, double rate, int rep,
                        uint64_t adapter_bytes)
{
    traffic t;
    outcome out = {0};
    open_traffic(&t, s, kind, adapter_bytes);
    t.random = (uint64_t)rep * 1000 + 7;
    double n = (double)s->requests;
    run_queued(&t);
    if (rate > 0) {
        qv_adapter_stats before, after;
        qv_engine_get_adapter_stats(t.engine, &before);
        run_poisson(&t, rate);
        qv_engine_get_adapter_stats(t.engine, &after);
        out.slot_hits = (double)(after.slot_hits - before.slot_hits) / n;
        out.host_hits = (double)(after.host_hits - before.host_hits) / n;
        out.installs = 100 * (double)(after.installs - before.installs) / n;
        out.reads = 100 * (double)(after.reads - before.reads) / n;
        out.ttft_p50 = quantile_of(t.ttft, (int)s->requests, 0.5);
        out.ttft_p95 = quantile_of(t.ttft, (int)s->requests, 0.95);
    }
    out.requests_per_s = n / run_queued(&t);
    out.tokens_per_s = out.requests_per_s * (double)(s->prompt + s->answer);
    close_traffic(&t);
    return out;
}

/* --- Table ------------------------------------------------------------------------------------ */

static outcome outcomes[N_ROWS][MAX_REPS];

/* Over the repetitions of a row: the median of a field of outcome, given by its offset, or of its
 * ratio to the first row's in the same repetition, when the machine was as busy. */
static double median_over(int row, size_t field, int reps, bool ratio)
{
    double values[MAX_REPS];
    for (int k = 0; k < reps; k++) {
        values[k] = *(const double *)((const char *)&outcomes[row][k] + field);
        if (ratio)
            values[k] /= *(const double *)((const char *)&outcomes[0][k] + field);
    }
    return median_of(values, reps);
}

#define MEDIAN(field) median_over(i, offsetof(outcome, field), (int)s->reps, false)
#define RATIO(field)  median_over(i, offsetof(outcome, field), (int)s->reps, true)

static void print_table(const settings *s, uint64_t adapter_bytes)
{
    int slots = (int)s->engine.adapter_slots;
    const row_kind rows[N_ROWS] = {
        {slots, false},    {2 * slots, false}, {8 * slots, false},
        {2 * slots, true}, {8 * slots, true},
    };
    double capacity[3];
    for (int i = 0; i < 3; i++)
        capacity[i] = run_once(s, rows[0], 0, i, adapter_bytes).requests_per_s;
    double rate = s->load * median_of(capacity, 3);
    printf("%d slots; %d requests of %d + %d tokens, Zipf %.2g, %.0f a second (%.0f %% of what "
           "%d adapters allow);\nmedians of %d repetitions\n\n",
           slots, (int)s->requests, (int)s->prompt, (int)s->answer, s->zipf, rate, 100 * s->load,
           slots, (int)s->reps);
    for (int rep = 0; rep < s->reps; rep++)
        for (int i = 0; i < N_ROWS; i++)
            outcomes[i][rep] = run_once(s, rows[i], rate, rep, adapter_bytes);
    printf("%8s %6s | %6s %6s %6s | %9s %9s %7s | %9s %7s | %9s %9s\n", "adapters", "host", "slot",
           "host", "disk", "ttft p50", "ttft p95", "x p50", "tokens/s", "x", "installs", "reads");
    for (int i = 0; i < N_ROWS; i++) {
        double slot = MEDIAN(slot_hits), host = MEDIAN(host_hits);
        char room[16] = "all";
        if (rows[i].small_host)
            snprintf(room, sizeof room, "%d", 2 * slots);
        printf("%8d %6s | %5.1f%% %5.1f%% %5.1f%% | %6.2f ms %6.2f ms %7.2f | %9.0f %7.2f | %9.1f "
               "%9.1f\n",
               rows[i].n_adapters, room, 100 * slot, 100 * host, 100 * fabs(1 - slot - host),
               1e3 * MEDIAN(ttft_p50), 1e3 * MEDIAN(ttft_p95), RATIO(ttft_p50),
               MEDIAN(tokens_per_s), RATIO(tokens_per_s), MEDIAN(installs), MEDIAN(reads));
    }
    printf("\nhost: adapters that host memory has room for. slot, host, disk: where the adapter "
           "was when its request came.\nttft: from the time a request was due to its first token. "
           "tokens/s: prompts and answers, %d requests in flight.\nx: over the first row in the "
           "same repetition. installs, reads: a hundred requests.\n",
           N_IN_FLIGHT);
}

/* --- Main ------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    settings s;
    qv_options *options;
    qv_log_init(&(qv_log_options){.level = QV_LOG_WARN, .program = "bench_adapters"});
    if (bench_parse(option_table, sizeof option_table / sizeof *option_table, &program, argc, argv,
                    &s, &options) != QV_OK)
        die("options");
    if (qv_options_printed(options)) {
        qv_options_free(options);
        return EXIT_SUCCESS;
    }
    if (s.engine.adapter_slots < 1 || 8 * s.engine.adapter_slots > MAX_ADAPTERS) {
        qv_fail(QV_ERR_ARG, "adapter-slots is %d; 1 to %d are measured",
                (int)s.engine.adapter_slots, MAX_ADAPTERS / 8);
        die("options");
    }
    if (s.quick) {
        s.reps = 1;
        s.requests = 40;
    }
    template t = read_template(s.adapter != NULL ? s.adapter : largest_adapter(s.engine.model_dir));
    if (mkdtemp(scratch) == NULL)
        die(scratch);
    atexit(remove_scratch);
    for (int i = 0; i < 8 * s.engine.adapter_slots; i++)
        write_adapter(&t, i);
    free(t.weights);
    free(t.config);
    print_copies(&s);
    fflush(stdout);
    /* In host memory numbers are float32 at most. */
    print_table(&s, (uint64_t)(t.weights_size - t.data_start) / qv_dtype_size(t.dtype) * 4);
    qv_options_free(options);
    return EXIT_SUCCESS;
}
