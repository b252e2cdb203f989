/* Metrics: counters, gauges and histograms, and the HTTP server that shows them to Prometheus.
 *
 * A registry is made at start and lives until its server is stopped and no thread updates any more.
 * Registration takes a lock; updates are lock-free and may come from any thread. Metrics are owned
 * by the registry and are borrowed by everyone else. Every update accepts NULL and does nothing
 * then, so code can run without metrics.
 */
#ifndef QV_COMMON_METRICS_H
#define QV_COMMON_METRICS_H

#include "common/status.h"

#include <stdint.h>

typedef struct qv_metrics qv_metrics;
typedef struct qv_counter qv_counter;
typedef struct qv_gauge qv_gauge;
typedef struct qv_histogram qv_histogram;

typedef struct {
    const char *name;  /* [a-zA-Z_][a-zA-Z0-9_]*, not starting with "__" */
    const char *value; /* any UTF-8 */
} qv_label;

/* Labels as two arguments of the functions below: QV_LABELS({"adapter", name}, {"code", "OK"}). */
#define QV_LABELS(...)                                                                             \
    (const qv_label[]){__VA_ARGS__}, sizeof((const qv_label[]){__VA_ARGS__}) / sizeof(qv_label)
#define QV_NO_LABELS NULL, 0

#define QV_METRICS_MAX_LABELS  8   /* labels of one series */
#define QV_METRICS_MAX_SERIES  256 /* label sets of one name; see below */
#define QV_METRICS_MAX_BUCKETS 64

/* --- registry ------------------------------------------------------------------------------- */

/* Errors: NOMEM. */
qv_status qv_metrics_new(qv_metrics **out);

/* free(NULL) is fine. */
void qv_metrics_free(qv_metrics *metrics);

/* Register a series: a name with a set of labels. The same name and labels give the same object
 * again. Names are [a-zA-Z_:][a-zA-Z0-9_:]*; those of counters end in _total by convention. `help`
 * is the first one given for the name. When a name has QV_METRICS_MAX_SERIES label sets, each
 * further set is folded into one series whose label values are all "other". Errors: ARG (bad name,
 * label or buckets), EXISTS (the name has another type, other label names or other buckets), NOMEM.
 */
qv_status qv_metrics_counter(qv_metrics *metrics, const char *name, const char *help,
                             const qv_label *labels, size_t n_labels, qv_counter **out);
qv_status qv_metrics_gauge(qv_metrics *metrics, const char *name, const char *help,
                           const qv_label *labels, size_t n_labels, qv_gauge **out);

/* `bounds` are the upper bounds of the buckets, finite and increasing; +Inf is added by us. */
qv_status qv_metrics_histogram(qv_metrics *metrics, const char *name, const char *help,
                               const double *bounds, size_t n_bounds, const qv_label *labels,
                               size_t n_labels, qv_histogram **out);

/* Bounds for latencies in seconds, 1 ms to 60 s, and for counts of tokens, 1 to 131072. */
extern const double qv_metrics_seconds[];
extern const size_t qv_metrics_n_seconds;
extern const double qv_metrics_tokens[];
extern const size_t qv_metrics_n_tokens;

/* Call `refresh` at the start of each scrape to set gauges. It runs on the thread that scrapes (the
 * server's), so it may touch only what is safe to read from there. It may register, but not render.
 * Errors: NOMEM. */
qv_status qv_metrics_on_scrape(qv_metrics *metrics, void (*refresh)(void *user), void *user);

/* --- updates -------------------------------------------------------------------------------- */

void qv_counter_add(qv_counter *counter, uint64_t n);
void qv_gauge_set(qv_gauge *gauge, double value);
void qv_gauge_add(qv_gauge *gauge, double delta);
void qv_histogram_observe(qv_histogram *histogram, double value); /* NaN is ignored */

uint64_t qv_counter_value(const qv_counter *counter);
double qv_gauge_value(const qv_gauge *gauge);
uint64_t qv_histogram_count(const qv_histogram *histogram);

/* --- text and server ------------------------------------------------------------------------ */

/* The Prometheus text exposition format 0.0.4: families in order of registration. The caller frees
 * *text. Errors: NOMEM. */
qv_status qv_metrics_render(qv_metrics *metrics, char **text, size_t *size);

typedef struct qv_metrics_server qv_metrics_server;

typedef struct {
    const char *address; /* IPv4 or IPv6 address to listen on; NULL = 127.0.0.1 */
    uint16_t port;       /* 0 = a free one; see qv_metrics_port */

    /* Whether the process can take work. On false it writes why into reason[size]. NULL = always.
     * Runs on the server's thread. */
    bool (*ready)(void *user, char *reason, size_t size);
    void *user;
} qv_metrics_server_options;

/* Serve on a thread of its own: GET and HEAD of /metrics, /healthz (200 while the process lives)
 * and /readyz (200, or 503 with the reason); 404 and 405 otherwise. Connections, their number per
 * address and their idle time are bounded. Errors: ARG (address), IO (cannot listen), NOMEM. */
qv_status qv_metrics_serve(qv_metrics *metrics, const qv_metrics_server_options *options,
                           qv_metrics_server **out);

/* The port it listens on. */
uint16_t qv_metrics_port(const qv_metrics_server *server);

/* Stop and join the thread. NULL is fine. */
void qv_metrics_stop(qv_metrics_server *server);

#endif
