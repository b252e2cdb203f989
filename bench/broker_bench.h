/* What the parts of bench_broker share:
 *
 *   bench_broker.c   options and tables
 *   broker_peers.c   the processes: brokers, bare echoes, workers
 *   broker_load.c    the client: closed loop, open loop, many streams
 *
 * Brokers and workers are processes of their own, started before the first one touches ZeroMQ. The
 * messages are patched templates, and whoever is not the broker looks only at the few bytes that it
 * needs, so that what is measured is the broker.
 */
#ifndef QV_BENCH_BROKER_BENCH_H
#define QV_BENCH_BROKER_BENCH_H

#include "common/mq.h"
#include "common/protocol.h"

#include <stdint.h>
#include <sys/types.h>

#define BENCH_MAX_WINDOW  1024 /* requests in flight of the closed loop */
#define BENCH_MAX_OPEN    4000 /* the same of the open loop; a client may have 4096 */
#define BENCH_ID_DIGITS   8
#define BENCH_SAMPLES_MAX (1 << 21)

#define BENCH_STREAM_CAPACITY 256 /* requests that a worker with streams runs at once */

typedef struct {
    bool quick;
    int64_t rounds, round_ms, prompt_bytes;
    int64_t window, n_streams, stream_tokens, step_ms;
    int transport, only;
} bench_settings;

extern const char *const bench_transports[]; /* "tcp", "ipc" */

_Noreturn void bench_die(const char *what);

/* --- broker_peers.c ---------------------------------------------------------------------------*/

typedef struct {
    unsigned char *data;
    size_t size;
    size_t patch; /* where the id, or the number of the request, is */
} bench_template;

/* A submit of so many tokens; the id is patched in. */
bench_template bench_make_submit(const bench_settings *set, bool stream, int64_t n_tokens);

/* Keys of everybody, and the list of them in a file; NULL where nothing is encrypted. */
typedef struct {
    qv_key_pair broker, client, worker;
    char list[64]; /* path */
} bench_keys;

void bench_make_keys(bench_keys *keys);

typedef struct {
    pid_t pid, worker;
    const bench_keys *keys;
    char frontend[256], backend[256];
} bench_broker;

/* Start a broker, or what does the least that one can do, with its worker, which answers each
 * request at once with one token that ends it. */
bench_broker bench_start_quiver(const bench_settings *set, const bench_keys *keys);
bench_broker bench_start_bare(const bench_settings *set, const bench_keys *keys);

/* Start a broker with n workers (one process) that make a token for each of their requests every
 * step_us (0 = as fast as they can); its text is the time, qv_now_us, in 16 digits. */
bench_broker bench_start_streams(const bench_settings *set, uint32_t n_workers, uint64_t step_us);

void bench_stop(const bench_broker *broker);

/* A client's socket. */
qv_mq *bench_connect(const bench_broker *broker);

/* Wait until something can be read; false after the time. */
bool bench_wait(qv_mq *mq, long ms);

/* CPU time that a process has used, all threads; and its resident memory. */
double bench_cpu_us(pid_t pid);
double bench_rss_bytes(pid_t pid);

/* --- broker_load.c ----------------------------------------------------------------------------*/

/* Whom the client talks to. */
typedef struct {
    const char *name;
    bool is_bare;
    pid_t broker;
    qv_mq *mq;
    bench_template submit;
} bench_variant;

typedef struct {
    uint32_t *us; /* [n] from `submit`, or when it was due, to `done` */
    size_t n;
    uint64_t done;
    double seconds;
    double cpu_us; /* that the broker's process used */
} bench_samples;

void bench_samples_init(bench_samples *samples);
void bench_samples_free(bench_samples *samples);
void bench_samples_sort(bench_samples *samples);
double bench_percentile(const bench_samples *sorted, double p); /* us */

/* Keep `window` requests in flight for a while. Samples are added; NULL: only to warm up. */
void bench_closed_loop(bench_variant *v, uint32_t window, int64_t ms, bench_samples *out);

/* Send requests at random times (Poisson), so many a second on average, whatever becomes of them.
 * Latency counts from the time at which a request was due, so that one that the client could not
 * send in time, because answers were late, counts as late too. */
void bench_open_loop(bench_variant *v, double per_second, int64_t ms, bench_samples *out);

typedef struct {
    bench_samples pieces; /* from a worker's step to the client */
    uint64_t n_tokens, n_done;
    double seconds, cpu_us;
    double rss_before, rss_open, rss_end; /* no request; all open; all but ended */
} bench_streams;

/* Open n streams of n_tokens at once, from several clients, and read them to their ends. */
void bench_many_streams(const bench_settings *set, const bench_broker *broker, uint32_t n,
                        bench_streams *out);

#endif
