/* What the broker costs: client → broker → worker → client, against the least that any ZeroMQ
 * broker can do, a ROUTER–ROUTER echo that passes bodies of the same sizes on without looking at
 * them, all over loopback, in the clear and with CURVE.
 *
 *   windows   a client that keeps so many requests in flight: requests a second, round trips, CPU
 *             time of the broker's process
 *   loads     a client that sends at random times whatever comes back, at parts of what the broker
 *             was seen to do; the echo at the same rates. Latency counts from when a request was
 * due tokens    as many tokens as 256 streams can get streams   many streams open at once, with a
 * token each ten times a second; memory
 *
 * Rounds of the variants are interleaved. The machine does the client's and the workers' work
 * besides: requests per second of the broker's CPU time say what one core would do for it alone.
 */
#include "bench/broker_bench.h"

#include "common/clock.h"
#include "common/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ALL, WINDOWS, LOADS, TOKENS, STREAMS };

static const char *const parts[] = {"all", "windows", "loads", "tokens", "streams", NULL};

static const qv_option table[] = {
    QV_OPTION(bench_settings, quick, FLAG, "quick", NULL, NULL,
              "Shorter rounds: figures are rougher."),
    QV_OPTION(bench_settings, only, ENUM, "only", "PART", "all", "One part of the figures.",
              .choices = parts),
    QV_OPTION(bench_settings, rounds, INT, "rounds", "N", "5", "Rounds of each variant.", .min = 1,
              .max = 1000),
    QV_OPTION(bench_settings, round_ms, DURATION, "time", "TIME", "1s", "Length of a round.",
              .min = 10),
    QV_OPTION(bench_settings, window, INT, "window", "N", "0",
              "Requests in flight, for windows; 0 = 1, 16, 64, 256 and 1024.", .min = 0,
              .max = BENCH_MAX_WINDOW),
    QV_OPTION(bench_settings, prompt_bytes, SIZE, "prompt", "SIZE", "192", "Size of the prompts.",
              .min = 1, .max = 1 << 20),
    QV_OPTION(bench_settings, n_streams, INT, "streams", "N", "10000", "Streams open at once.",
              .min = 1, .max = 100000),
    QV_OPTION(bench_settings, stream_tokens, INT, "stream-tokens", "N", "100",
              "Tokens of each of these streams.", .min = 2, .max = 10000),
    QV_OPTION(bench_settings, step_ms, DURATION, "step", "TIME", "100ms",
              "How often a worker makes a token for each of its streams.", .min = 1),
    QV_OPTION(bench_settings, transport, ENUM, "transport", "NAME", "tcp",
              "How processes are connected.", .choices = bench_transports),
};

static const qv_program program = {
    .name = "bench_broker",
    .summary = "Throughput, latency and memory of the broker against a bare ROUTER-ROUTER echo.",
};

/* --- Variants ---------------------------------------------------------------------------------*/

#define N_VARIANTS 3

static const struct {
    const char *name[2]; /* in the clear, with CURVE */
    bool is_bare, stream;
} kinds[N_VARIANTS] = {
    {{"bare echo", "bare echo, curve"}, true, false},
    {{"quiver, whole", "whole, curve"}, false, false},
    {{"quiver, stream", "stream, curve"}, false, true},
};

static void open_variants(const bench_settings *set, const bench_broker *bare,
                          const bench_broker *quiver, bench_variant variants[N_VARIANTS])
{
    for (int i = 0; i < N_VARIANTS; i++) {
        const bench_broker *broker = kinds[i].is_bare ? bare : quiver;
        variants[i] = (bench_variant){.name = kinds[i].name[broker->keys != NULL],
                                      .is_bare = kinds[i].is_bare,
                                      .broker = broker->pid,
                                      .mq = bench_connect(broker),
                                      .submit = bench_make_submit(set, kinds[i].stream, 1)};
    }
    zclock_sleep(300); /* connections */
}

static void close_variants(bench_variant variants[N_VARIANTS])
{
    for (int i = 0; i < N_VARIANTS; i++) {
        qv_mq_close(variants[i].mq);
        free(variants[i].submit.data);
    }
}

/* --- Windows ----------------------------------------------------------------------------------*/

/* Returns the requests a second of the last variant, the streaming one. */
static double bench_window(const bench_settings *set, bench_variant *variants, uint32_t window)
{
    bench_samples all[N_VARIANTS];
    double rates[N_VARIANTS];
    for (int i = 0; i < N_VARIANTS; i++) {
        bench_samples_init(&all[i]);
        bench_closed_loop(&variants[i], window, set->round_ms / 5, NULL); /* warm up */
    }
    for (int64_t round = 0; round < set->rounds; round++)
        for (int i = 0; i < N_VARIANTS; i++)
            bench_closed_loop(&variants[i], window, set->round_ms, &all[i]);
    for (int i = 0; i < N_VARIANTS; i++) {
        bench_samples *s = &all[i];
        bench_samples_sort(s);
        rates[i] = (double)s->done / s->seconds;
        double p50 = bench_percentile(s, 0.5), cpu_us = s->cpu_us / (double)s->done;
        printf("%6u  %-16s %9.0f  %7.3f  %7.3f  %7.1f  %9.0f", window, variants[i].name, rates[i],
               p50 / 1e3, bench_percentile(s, 0.99) / 1e3, cpu_us, 1e6 / cpu_us);
        if (i > 0)
            printf("  %+9.3f  %6.0f%%  %6.0f%%", (p50 - bench_percentile(&all[0], 0.5)) / 1e3,
                   100 * rates[i] / rates[0], 100 * (all[0].cpu_us / (double)all[0].done) / cpu_us);
        printf("\n");
    }
    for (int i = 0; i < N_VARIANTS; i++)
        bench_samples_free(&all[i]);
    fflush(stdout);
    return rates[N_VARIANTS - 1];
}

static void bench_windows(const bench_settings *set, bench_variant *variants)
{
    printf("%6s  %-16s %9s  %7s  %7s  %7s  %9s  %9s  %7s  %7s\n", "window", "variant", "req/s",
           "p50 ms", "p99 ms", "cpu us", "req/cpu s", "added p50", "of bare", "by cpu");
    static const uint32_t windows[] = {1, 16, 64, 256, BENCH_MAX_WINDOW};
    for (size_t i = 0; i < sizeof windows / sizeof windows[0]; i++)
        if (set->window == 0)
            bench_window(set, variants, windows[i]);
    if (set->window > 0)
        bench_window(set, variants, (uint32_t)set->window);
    printf("\n");
}

/* --- Loads ------------------------------------------------------------------------------------*/

static const double ranks[] = {0.5, 0.99, 0.999};

static void print_load(const char *load, const bench_variant *v, const bench_samples *s,
                       const bench_samples *bare)
{
    printf("%6s  %-16s %9.0f", load, v->name, (double)s->done / s->seconds);
    for (size_t i = 0; i < sizeof ranks / sizeof ranks[0]; i++)
        printf("  %7.3f", bench_percentile(s, ranks[i]) / 1e3);
    for (size_t i = 0; bare != NULL && i < sizeof ranks / sizeof ranks[0]; i++)
        printf("  %+8.3f",
               (bench_percentile(s, ranks[i]) - bench_percentile(bare, ranks[i])) / 1e3);
    printf("\n");
}

/* The bare echo and the streaming variant at the same rate. */
static void bench_load(const bench_settings *set, bench_variant *variants, const char *load,
                       double per_second)
{
    bench_variant *const both[] = {&variants[0], &variants[N_VARIANTS - 1]};
    bench_samples all[2];
    for (int i = 0; i < 2; i++) {
        bench_samples_init(&all[i]);
        bench_open_loop(both[i], per_second, set->round_ms / 5, NULL); /* warm up */
    }
    for (int64_t round = 0; round < set->rounds; round++)
        for (int i = 0; i < 2; i++)
            bench_open_loop(both[i], per_second, set->round_ms, &all[i]);
    for (int i = 0; i < 2; i++) {
        bench_samples_sort(&all[i]);
        print_load(load, both[i], &all[i], i > 0 ? &all[0] : NULL);
    }
    for (int i = 0; i < 2; i++)
        bench_samples_free(&all[i]);
    fflush(stdout);
}

static void bench_loads(const bench_settings *set, bench_variant *variants)
{
    bench_variant *stream = &variants[N_VARIANTS - 1];
    double capacity = 0; /* of the slowest round: more could not be kept up */
    for (int64_t round = 0; round < set->rounds; round++) {
        bench_samples s;
        bench_samples_init(&s);
        bench_closed_loop(stream, 256, set->round_ms, &s);
        double rate = (double)s.done / s.seconds;
        capacity = round == 0 || rate < capacity ? rate : capacity;
        bench_samples_free(&s);
    }
    printf("%s: %.0f requests a second at window 256 are 100 %%\n", stream->name, capacity);
    printf("%6s  %-16s %9s  %7s  %7s  %7s  %8s  %8s  %8s\n", "load", "variant", "req/s", "p50 ms",
           "p99 ms", "p999 ms", "added 50", "added 99", "added999");
    static const struct {
        const char *name;
        double part, per_second;
    } loads[] = {{"5000/s", 0, 5000}, {"10%", 0.1, 0}, {"50%", 0.5, 0}, {"90%", 0.9, 0}};
    for (size_t i = 0; i < sizeof loads / sizeof loads[0]; i++)
        bench_load(set, variants, loads[i].name, loads[i].per_second + loads[i].part * capacity);
    printf("\n");
}

/* --- Tokens and streams -----------------------------------------------------------------------*/

static void bench_tokens(const bench_settings *set, const bench_broker *broker)
{
    bench_streams s;
    bench_many_streams(set, broker, BENCH_STREAM_CAPACITY, &s);
    double n = (double)s.n_tokens;
    printf("%d streams as fast as they go: %.0f tokens/s, %.2f us of the broker's CPU time a "
           "token, %.0f tokens a CPU second\n",
           BENCH_STREAM_CAPACITY, n / s.seconds, s.cpu_us / n, n / s.cpu_us * 1e6);
    fflush(stdout);
    bench_samples_free(&s.pieces);
}

static void bench_open_streams(const bench_settings *set, const bench_broker *broker)
{
    bench_streams s;
    uint32_t n_streams = (uint32_t)set->n_streams;
    bench_many_streams(set, broker, n_streams, &s);
    bench_samples_sort(&s.pieces);
    double n = (double)s.n_tokens;
    printf("%u streams open at once, a token each %lld ms: %.0f tokens/s, %.0f %% of a core, %.2f "
           "us of the broker's CPU time a token\n",
           n_streams, (long long)set->step_ms, n / s.seconds, 100 * s.cpu_us / (s.seconds * 1e6),
           s.cpu_us / n);
    printf("  step to client p50 %.3f ms, p99 %.3f ms, p999 %.3f ms; %llu of %u ended\n",
           bench_percentile(&s.pieces, 0.5) / 1e3, bench_percentile(&s.pieces, 0.99) / 1e3,
           bench_percentile(&s.pieces, 0.999) / 1e3, (unsigned long long)s.n_done, n_streams);
    printf("  memory of an open request with a prompt of %lld bytes: %.0f bytes, with %lld tokens "
           "delivered %.0f\n",
           (long long)set->prompt_bytes, (s.rss_open - s.rss_before) / n_streams,
           (long long)set->stream_tokens / 2, (s.rss_end - s.rss_before) / n_streams);
    fflush(stdout);
    bench_samples_free(&s.pieces);
}

/* --- Main -------------------------------------------------------------------------------------*/

static bool wants(const bench_settings *set, int part)
{
    return set->only == ALL || set->only == part;
}

static void run_clients(const bench_settings *set, const bench_broker brokers[2][2])
{
    for (int curve = 0; curve < 2; curve++) {
        bench_variant variants[N_VARIANTS];
        open_variants(set, &brokers[curve][0], &brokers[curve][1], variants);
        if (curve == 0)
            printf("submit of %zu bytes over %s; bare echo and broker are processes of their own\n",
                   variants[0].submit.size, bench_transports[set->transport]);
        if (wants(set, WINDOWS))
            bench_windows(set, variants);
        if (wants(set, LOADS))
            bench_loads(set, variants);
        close_variants(variants);
    }
}

int main(int argc, char **argv)
{
    bench_settings set;
    qv_options *options;
    if (qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv, &set,
                         &options) != QV_OK) {
        fprintf(stderr, "bench_broker: %s\n", qv_error());
        return 2;
    }
    if (qv_options_printed(options)) {
        qv_options_free(options);
        return 0;
    }
    if (set.quick) {
        set.rounds = 3;
        set.round_ms = 250;
        set.stream_tokens = 30;
    }
    uint32_t n_workers = (uint32_t)(set.n_streams / BENCH_STREAM_CAPACITY) + 2;
    bench_keys keys;
    bench_make_keys(&keys);
    /* All processes start before this one touches ZeroMQ. */
    const bench_broker brokers[2][2] = {
        {bench_start_bare(&set, NULL), bench_start_quiver(&set, NULL)},
        {bench_start_bare(&set, &keys), bench_start_quiver(&set, &keys)},
    };
    const bench_broker fast = bench_start_streams(&set, 1, 0);
    const bench_broker slow = bench_start_streams(&set, n_workers, (uint64_t)set.step_ms * 1000);
    zsys_handler_set(NULL);
    if (wants(&set, WINDOWS) || wants(&set, LOADS))
        run_clients(&set, brokers);
    if (wants(&set, TOKENS))
        bench_tokens(&set, &fast);
    if (wants(&set, STREAMS))
        bench_open_streams(&set, &slow);
    for (int i = 0; i < 4; i++)
        bench_stop(&brokers[i / 2][i % 2]);
    bench_stop(&fast);
    bench_stop(&slow);
    unlink(keys.list);
    qv_options_free(options);
    return 0;
}
