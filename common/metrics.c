#include "common/metrics.h"

#include "common/log.h"
#include "common/map.h"
#include "common/utf8.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CACHE_LINE   64 /* series stand on lines of their own: threads update different ones */
#define NAME_MAX_LEN 200

typedef enum { COUNTER, GAUGE, HISTOGRAM } metric_type;

static const char *const type_names[] = {"counter", "gauge", "histogram"};

/* The atomics below are relaxed: each is a number by itself and orders nothing else. */
struct qv_counter {
    _Atomic uint64_t value;
};

struct qv_gauge {
    _Atomic uint64_t bits; /* of a double */
};

struct qv_histogram {
    const double *bounds; /* [n_bounds], the family's */
    size_t n_bounds;
    _Atomic uint64_t sum_bits;
    _Atomic uint64_t counts[]; /* [n_bounds + 1], not cumulative; the last is +Inf */
};

/* One set of labels of a name. The object that users hold is the last member. */
typedef struct {
    char *labels; /* adapter="x",code="OK"; owned, "" without labels */
    _Alignas(CACHE_LINE) union {
        qv_counter counter;
        qv_gauge gauge;
        qv_histogram histogram;
    };
} series;

typedef struct {
    char *name, *help, *label_names; /* owned; label names joined by ',' */
    metric_type type;
    double *bounds; /* [n_bounds], owned */
    size_t n_bounds;
    qv_map *series; /* labels text -> series, owned */
} family;

typedef struct hook {
    struct hook *next;
    void (*refresh)(void *user);
    void *user;
} hook;

struct qv_metrics {
    pthread_mutex_t scrape_lock; /* one scrape at a time; taken before `lock` */
    pthread_mutex_t lock;        /* families, their series, hooks */
    qv_map *families;            /* name -> family */
    hook *first_hook, **last_hook;
};

const double qv_metrics_seconds[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
                                     0.5,   1,      2.5,   5,    10,    30,   60};
const size_t qv_metrics_n_seconds = sizeof qv_metrics_seconds / sizeof qv_metrics_seconds[0];
const double qv_metrics_tokens[] = {1,    4,    16,   64,    256,   512,   1024,
                                    2048, 4096, 8192, 16384, 32768, 65536, 131072};
const size_t qv_metrics_n_tokens = sizeof qv_metrics_tokens / sizeof qv_metrics_tokens[0];

/* --- registry ------------------------------------------------------------------------------- */

static void free_series(void *value)
{
    series *s = value;
    free(s->labels);
    free(s);
}

static void free_family(void *value)
{
    family *f = value;
    qv_map_free(f->series, free_series);
    free(f->name);
    free(f->help);
    free(f->label_names);
    free(f->bounds);
    free(f);
}

static qv_status no_memory(void)
{
    return qv_fail(QV_ERR_NOMEM, "metrics: no memory");
}

qv_status qv_metrics_new(qv_metrics **out)
{
    qv_metrics *metrics = calloc(1, sizeof *metrics);
    if (metrics == NULL)
        return no_memory();
    metrics->families = qv_map_new(64);
    if (metrics->families == NULL) {
        free(metrics);
        return no_memory();
    }
    pthread_mutex_init(&metrics->lock, NULL);
    pthread_mutex_init(&metrics->scrape_lock, NULL);
    metrics->last_hook = &metrics->first_hook;
    *out = metrics;
    return QV_OK;
}

void qv_metrics_free(qv_metrics *metrics)
{
    if (metrics == NULL)
        return;
    for (hook *h = metrics->first_hook, *next; h != NULL; h = next) {
        next = h->next;
        free(h);
    }
    qv_map_free(metrics->families, free_family);
    pthread_mutex_destroy(&metrics->scrape_lock);
    pthread_mutex_destroy(&metrics->lock);
    free(metrics);
}

/* --- checks --------------------------------------------------------------------------------- */

#define LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
#define DIGITS  "0123456789"

static bool is_name(const char *name, const char *first, const char *rest)
{
    size_t size = strlen(name);
    return size > 0 && size <= NAME_MAX_LEN && strchr(first, name[0]) != NULL &&
           strspn(name, rest) == size;
}

static qv_status check_labels(const char *name, metric_type type, const qv_label *labels, size_t n)
{
    if (n > QV_METRICS_MAX_LABELS)
        return qv_fail(QV_ERR_ARG, "metric %s: %zu labels, at most %d", name, n,
                       QV_METRICS_MAX_LABELS);
    for (size_t i = 0; i < n; i++) {
        const char *label = labels[i].name;
        if (!is_name(label, LETTERS, LETTERS DIGITS) || strncmp(label, "__", 2) == 0 ||
            (type == HISTOGRAM && strcmp(label, "le") == 0))
            return qv_fail(QV_ERR_ARG, "metric %s: \"%.200s\" cannot name a label", name, label);
        if (!qv_utf8_valid(labels[i].value, strlen(labels[i].value)))
            return qv_fail(QV_ERR_ARG, "metric %s: the value of label %s is not UTF-8", name,
                           label);
        for (size_t j = 0; j < i; j++)
            if (strcmp(labels[j].name, label) == 0)
                return qv_fail(QV_ERR_ARG, "metric %s: label %s is given twice", name, label);
    }
    return QV_OK;
}

static qv_status check_bounds(const char *name, const double *bounds, size_t n)
{
    if (n == 0 || n > QV_METRICS_MAX_BUCKETS)
        return qv_fail(QV_ERR_ARG, "metric %s: %zu buckets, expected 1 to %d", name, n,
                       QV_METRICS_MAX_BUCKETS);
    for (size_t i = 0; i < n; i++)
        if (!isfinite(bounds[i]) || (i > 0 && bounds[i] <= bounds[i - 1]))
            return qv_fail(QV_ERR_ARG, "metric %s: bucket bound %zu (%g) is not above the last",
                           name, i, bounds[i]);
    return QV_OK;
}

/* --- registration --------------------------------------------------------------------------- */

static void print_escaped(FILE *out, const char *text, bool quoted)
{
    for (; *text != '\0'; text++) {
        if (*text == '\n')
            fputs("\\n", out);
        else if (*text == '\\' || (*text == '"' && quoted))
            fprintf(out, "\\%c", *text);
        else
            fputc(*text, out);
    }
}

/* What a caller asks for: labels come sorted, so that their order does not matter. */
typedef struct {
    const char *name, *help;
    metric_type type;
    const double *bounds;
    size_t n_bounds;
    qv_label labels[QV_METRICS_MAX_LABELS];
    size_t n_labels;
} request;

static int compare_labels(const void *a, const void *b)
{
    return strcmp(((const qv_label *)a)->name, ((const qv_label *)b)->name);
}

/* The labels as they stand between braces, or only their names joined by ','. With `other` every
 * value is "other". The caller frees; NULL without memory. */
static char *labels_text(const request *r, bool only_names, bool other)
{
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL)
        return NULL;
    for (size_t i = 0; i < r->n_labels; i++) {
        fprintf(out, "%s%s", i > 0 ? "," : "", r->labels[i].name);
        if (only_names)
            continue;
        fputs("=\"", out);
        print_escaped(out, other ? "other" : r->labels[i].value, true);
        fputc('"', out);
    }
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

static family *new_family(const request *r)
{
    family *f = calloc(1, sizeof *f);
    if (f == NULL)
        return NULL;
    f->type = r->type;
    f->n_bounds = r->n_bounds;
    f->name = strdup(r->name);
    f->help = strdup(r->help);
    f->label_names = labels_text(r, true, false);
    f->bounds = malloc((r->n_bounds + 1) * sizeof(double));
    f->series = qv_map_new(0);
    if (f->name == NULL || f->help == NULL || f->label_names == NULL || f->bounds == NULL ||
        f->series == NULL) {
        free_family(f);
        return NULL;
    }
    if (r->n_bounds > 0)
        memcpy(f->bounds, r->bounds, r->n_bounds * sizeof(double));
    return f;
}

/* The family of a name, made if needed and then equal in all that must be the same. */
static qv_status require_family(qv_metrics *metrics, const request *r, family **out)
{
    qv_map_entry *entry = qv_map_require_str(metrics->families, r->name);
    if (entry == NULL)
        return no_memory();
    if (entry->value == NULL && (entry->value = new_family(r)) == NULL) {
        qv_map_remove_entry(metrics->families, entry);
        return no_memory();
    }
    family *f = entry->value;
    if (f->type != r->type)
        return qv_fail(QV_ERR_EXISTS, "metric %s is a %s, not a %s", r->name, type_names[f->type],
                       type_names[r->type]);
    char *names = labels_text(r, true, false);
    if (names == NULL)
        return no_memory();
    bool same = strcmp(names, f->label_names) == 0;
    qv_status status = same ? QV_OK
                            : qv_fail(QV_ERR_EXISTS, "metric %s has labels (%s), not (%s)", r->name,
                                      f->label_names, names);
    free(names);
    QV_TRY(status);
    if (f->n_bounds != r->n_bounds ||
        (r->n_bounds > 0 && memcmp(f->bounds, r->bounds, r->n_bounds * sizeof(double)) != 0))
        return qv_fail(QV_ERR_EXISTS, "metric %s has other buckets", r->name);
    *out = f;
    return QV_OK;
}

/* Takes ownership of `labels`. */
static series *new_series(const family *f, char *labels)
{
    size_t size = sizeof(series) + (f->n_bounds + 1) * sizeof(uint64_t);
    size = (size + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    series *s = aligned_alloc(CACHE_LINE, size);
    if (s == NULL) {
        free(labels);
        return NULL;
    }
    memset(s, 0, size);
    s->labels = labels;
    if (f->type == HISTOGRAM) {
        s->histogram.bounds = f->bounds;
        s->histogram.n_bounds = f->n_bounds;
    }
    return s;
}

static qv_status require_series(family *f, const request *r, series **out)
{
    bool full = r->n_labels > 0 && qv_map_count(f->series) >= QV_METRICS_MAX_SERIES;
    char *labels = labels_text(r, false, false);
    if (labels != NULL && full && qv_map_find_str(f->series, labels) == NULL) {
        free(labels);
        labels = labels_text(r, false, true);
    }
    qv_map_entry *entry = labels != NULL ? qv_map_require_str(f->series, labels) : NULL;
    if (entry == NULL || entry->value != NULL) {
        free(labels);
        if (entry == NULL)
            return no_memory();
    } else if ((entry->value = new_series(f, labels)) == NULL) {
        qv_map_remove_entry(f->series, entry);
        return no_memory();
    }
    *out = entry->value;
    return QV_OK;
}

static qv_status require(qv_metrics *metrics, request *r, const qv_label *labels, size_t n_labels,
                         series **out)
{
    if (!is_name(r->name, LETTERS ":", LETTERS DIGITS ":"))
        return qv_fail(QV_ERR_ARG, "\"%.200s\" cannot name a metric", r->name);
    QV_TRY(check_labels(r->name, r->type, labels, n_labels));
    if (r->type == HISTOGRAM)
        QV_TRY(check_bounds(r->name, r->bounds, r->n_bounds));
    if (n_labels > 0)
        memcpy(r->labels, labels, n_labels * sizeof *labels);
    r->n_labels = n_labels;
    qsort(r->labels, n_labels, sizeof(qv_label), compare_labels);

    family *f = NULL;
    pthread_mutex_lock(&metrics->lock);
    qv_status status = require_family(metrics, r, &f);
    if (status == QV_OK)
        status = require_series(f, r, out);
    pthread_mutex_unlock(&metrics->lock);
    return status;
}

qv_status qv_metrics_counter(qv_metrics *metrics, const char *name, const char *help,
                             const qv_label *labels, size_t n_labels, qv_counter **out)
{
    request r = {.name = name, .help = help, .type = COUNTER};
    series *s = NULL;
    QV_TRY(require(metrics, &r, labels, n_labels, &s));
    *out = &s->counter;
    return QV_OK;
}

qv_status qv_metrics_gauge(qv_metrics *metrics, const char *name, const char *help,
                           const qv_label *labels, size_t n_labels, qv_gauge **out)
{
    request r = {.name = name, .help = help, .type = GAUGE};
    series *s = NULL;
    QV_TRY(require(metrics, &r, labels, n_labels, &s));
    *out = &s->gauge;
    return QV_OK;
}

qv_status qv_metrics_histogram(qv_metrics *metrics, const char *name, const char *help,
                               const double *bounds, size_t n_bounds, const qv_label *labels,
                               size_t n_labels, qv_histogram **out)
{
    request r = {name, help, HISTOGRAM, bounds, n_bounds, .n_labels = 0};
    series *s = NULL;
    QV_TRY(require(metrics, &r, labels, n_labels, &s));
    *out = &s->histogram;
    return QV_OK;
}

qv_status qv_metrics_on_scrape(qv_metrics *metrics, void (*refresh)(void *user), void *user)
{
    hook *h = malloc(sizeof *h);
    if (h == NULL)
        return no_memory();
    *h = (hook){NULL, refresh, user};
    pthread_mutex_lock(&metrics->lock);
    *metrics->last_hook = h;
    metrics->last_hook = &h->next;
    pthread_mutex_unlock(&metrics->lock);
    return QV_OK;
}

/* --- updates -------------------------------------------------------------------------------- */

static double double_of(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint64_t bits_of(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static void add_double(_Atomic uint64_t *sum, double delta)
{
    uint64_t old = atomic_load_explicit(sum, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(sum, &old, bits_of(double_of(old) + delta),
                                                  memory_order_relaxed, memory_order_relaxed))
        ;
}

void qv_counter_add(qv_counter *counter, uint64_t n)
{
    if (counter != NULL)
        atomic_fetch_add_explicit(&counter->value, n, memory_order_relaxed);
}

void qv_gauge_set(qv_gauge *gauge, double value)
{
    if (gauge != NULL)
        atomic_store_explicit(&gauge->bits, bits_of(value), memory_order_relaxed);
}

void qv_gauge_add(qv_gauge *gauge, double delta)
{
    if (gauge != NULL)
        add_double(&gauge->bits, delta);
}

void qv_histogram_observe(qv_histogram *histogram, double value)
{
    if (histogram == NULL || isnan(value))
        return;
    size_t low = 0, high = histogram->n_bounds; /* the first bound that is not below the value */
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (histogram->bounds[mid] < value)
            low = mid + 1;
        else
            high = mid;
    }
    atomic_fetch_add_explicit(&histogram->counts[low], 1, memory_order_relaxed);
    add_double(&histogram->sum_bits, value);
}

uint64_t qv_counter_value(const qv_counter *counter)
{
    return counter != NULL ? atomic_load_explicit(&counter->value, memory_order_relaxed) : 0;
}

double qv_gauge_value(const qv_gauge *gauge)
{
    return gauge != NULL ? double_of(atomic_load_explicit(&gauge->bits, memory_order_relaxed)) : 0;
}

uint64_t qv_histogram_count(const qv_histogram *histogram)
{
    uint64_t count = 0;
    for (size_t i = 0; histogram != NULL && i <= histogram->n_bounds; i++)
        count += atomic_load_explicit(&histogram->counts[i], memory_order_relaxed);
    return count;
}

/* --- text ----------------------------------------------------------------------------------- */

/* The shortest text that reads back as the same number. */
static const char *number_text(double value, char *out, size_t size)
{
    if (isnan(value))
        return "NaN";
    if (isinf(value))
        return value > 0 ? "+Inf" : "-Inf";
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(out, size, "%.*g", digits, value);
        if (strtod(out, NULL) == value)
            break;
    }
    return out;
}

/* name_suffix{labels,le="bound"} - the part of a sample before its value. */
static void print_sample(FILE *out, const family *f, const char *suffix, const series *s,
                         const char *bound)
{
    fprintf(out, "%s%s", f->name, suffix);
    if (s->labels[0] != '\0' || bound != NULL)
        fprintf(out, "{%s%s%s%s%s}", s->labels, s->labels[0] != '\0' && bound != NULL ? "," : "",
                bound != NULL ? "le=\"" : "", bound != NULL ? bound : "",
                bound != NULL ? "\"" : "");
    fputc(' ', out);
}

static void print_histogram(FILE *out, const family *f, const series *s)
{
    const qv_histogram *h = &s->histogram;
    char number[40];
    uint64_t count = 0; /* summed from the buckets, so that _count and +Inf always agree */
    for (size_t i = 0; i <= h->n_bounds; i++) {
        count += atomic_load_explicit(&h->counts[i], memory_order_relaxed);
        double bound = i < h->n_bounds ? h->bounds[i] : INFINITY;
        print_sample(out, f, "_bucket", s, number_text(bound, number, sizeof number));
        fprintf(out, "%" PRIu64 "\n", count);
    }
    double sum = double_of(atomic_load_explicit(&h->sum_bits, memory_order_relaxed));
    print_sample(out, f, "_sum", s, NULL);
    fprintf(out, "%s\n", number_text(sum, number, sizeof number));
    print_sample(out, f, "_count", s, NULL);
    fprintf(out, "%" PRIu64 "\n", count);
}

static void print_family(FILE *out, const family *f)
{
    char number[40];
    fprintf(out, "# HELP %s ", f->name);
    print_escaped(out, f->help, false);
    fprintf(out, "\n# TYPE %s %s\n", f->name, type_names[f->type]);
    QV_MAP_EACH(f->series, entry)
    {
        const series *s = entry->value;
        if (f->type == HISTOGRAM) {
            print_histogram(out, f, s);
            continue;
        }
        print_sample(out, f, "", s, NULL);
        if (f->type == COUNTER)
            fprintf(out, "%" PRIu64 "\n", qv_counter_value(&s->counter));
        else
            fprintf(out, "%s\n", number_text(qv_gauge_value(&s->gauge), number, sizeof number));
    }
}

qv_status qv_metrics_render(qv_metrics *metrics, char **text, size_t *size)
{
    char *data = NULL;
    FILE *out = open_memstream(&data, size);
    if (out == NULL)
        return no_memory();

    pthread_mutex_lock(&metrics->scrape_lock);
    pthread_mutex_lock(&metrics->lock);
    hook *h = metrics->first_hook;
    pthread_mutex_unlock(&metrics->lock);
    while (h != NULL) { /* without the lock, so that a hook may register */
        h->refresh(h->user);
        pthread_mutex_lock(&metrics->lock);
        h = h->next;
        pthread_mutex_unlock(&metrics->lock);
    }
    pthread_mutex_lock(&metrics->lock);
    QV_MAP_EACH(metrics->families, entry)
    print_family(out, entry->value);
    pthread_mutex_unlock(&metrics->lock);
    pthread_mutex_unlock(&metrics->scrape_lock);

    bool failed = ferror(out) != 0;
    if (fclose(out) != 0 || failed) {
        free(data);
        return no_memory();
    }
    *text = data;
    return QV_OK;
}

/* --- server --------------------------------------------------------------------------------- */

#define MAX_CONNECTIONS       64
#define MAX_CONNECTIONS_OF_IP 32
#define IDLE_TIMEOUT_S        15
#define CONNECTION_BYTES      ((size_t)16 << 10) /* headers and buffers of one connection */

struct qv_metrics_server {
    qv_metrics *metrics;
    qv_metrics_server_options options;
    struct MHD_Daemon *daemon;
    uint16_t port;
};

/* Answer with a text; `mode` says who frees it. */
static enum MHD_Result respond(struct MHD_Connection *connection, unsigned code, const char *type,
                               char *text, size_t size, enum MHD_ResponseMemoryMode mode)
{
    struct MHD_Response *response = MHD_create_response_from_buffer(size, text, mode);
    if (response == NULL) {
        if (mode == MHD_RESPMEM_MUST_FREE)
            free(text);
        return MHD_NO;
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
    if (code == MHD_HTTP_METHOD_NOT_ALLOWED)
        MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
    enum MHD_Result result = MHD_queue_response(connection, code, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result respond_text(struct MHD_Connection *connection, unsigned code,
                                    const char *text)
{
    return respond(connection, code, "text/plain; charset=utf-8", (char *)text, strlen(text),
                   MHD_RESPMEM_MUST_COPY);
}

static enum MHD_Result get_metrics(qv_metrics_server *server, struct MHD_Connection *connection)
{
    char *text = NULL;
    size_t size = 0;
    if (qv_metrics_render(server->metrics, &text, &size) != QV_OK)
        return respond_text(connection, MHD_HTTP_INTERNAL_SERVER_ERROR, "out of memory\n");
    return respond(connection, MHD_HTTP_OK, "text/plain; version=0.0.4; charset=utf-8", text, size,
                   MHD_RESPMEM_MUST_FREE);
}

static enum MHD_Result get_healthz(qv_metrics_server *server, struct MHD_Connection *connection)
{
    (void)server;
    return respond_text(connection, MHD_HTTP_OK, "ok\n");
}

static enum MHD_Result get_readyz(qv_metrics_server *server, struct MHD_Connection *connection)
{
    char reason[256] = "", text[300];
    if (server->options.ready == NULL ||
        server->options.ready(server->options.user, reason, sizeof reason))
        return respond_text(connection, MHD_HTTP_OK, "ready\n");
    snprintf(text, sizeof text, "not ready: %s\n", reason);
    return respond_text(connection, MHD_HTTP_SERVICE_UNAVAILABLE, text);
}

static const struct {
    const char *path;
    enum MHD_Result (*get)(qv_metrics_server *server, struct MHD_Connection *connection);
} pages[] = {{"/metrics", get_metrics}, {"/healthz", get_healthz}, {"/readyz", get_readyz}};

static enum MHD_Result handle(void *user, struct MHD_Connection *connection, const char *url,
                              const char *method, const char *version, const char *upload,
                              size_t *upload_size, void **state)
{
    static char seen;
    (void)version;
    (void)upload;
    if (strcmp(method, MHD_HTTP_METHOD_GET) != 0 && strcmp(method, MHD_HTTP_METHOD_HEAD) != 0)
        return respond_text(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET and HEAD\n");
    if (*state == NULL) { /* the first call has only the headers; a body may follow */
        *state = &seen;
        return MHD_YES;
    }
    if (*upload_size != 0) { /* nobody wants it */
        *upload_size = 0;
        return MHD_YES;
    }
    for (size_t i = 0; i < sizeof pages / sizeof pages[0]; i++)
        if (strcmp(url, pages[i].path) == 0)
            return pages[i].get(user, connection);
    return respond_text(connection, MHD_HTTP_NOT_FOUND,
                        "not found; there are /metrics, /healthz and /readyz\n");
}

static void log_from_library(void *user, const char *format, va_list args)
{
    char text[512];
    (void)user;
    vsnprintf(text, sizeof text, format, args);
    text[strcspn(text, "\n")] = '\0';
    qv_debug("metrics server: %s", text);
}

/* A listening socket, and the port it got. */
static qv_status listen_on(const char *address, uint16_t port, int *out_fd, uint16_t *out_port)
{
    char service[8];
    snprintf(service, sizeof service, "%u", port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE};
    struct addrinfo *info;
    int error = getaddrinfo(address, service, &hints, &info);
    if (error != 0)
        return qv_fail(QV_ERR_ARG, "metrics: \"%.100s\" is not an IP address (%s)", address,
                       gai_strerror(error));

    struct sockaddr_storage bound;
    socklen_t bound_size = sizeof bound;
    int on = 1, fd = socket(info->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool ok = fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0 &&
              bind(fd, info->ai_addr, info->ai_addrlen) == 0 && listen(fd, MAX_CONNECTIONS) == 0 &&
              getsockname(fd, (struct sockaddr *)&bound, &bound_size) == 0;
    freeaddrinfo(info);
    if (!ok) {
        qv_status status = qv_fail(QV_ERR_IO, "metrics: cannot listen on %s port %u: %s", address,
                                   port, strerror(errno));
        if (fd >= 0)
            close(fd);
        return status;
    }
    *out_fd = fd;
    *out_port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                  : ((struct sockaddr_in *)&bound)->sin_port);
    return QV_OK;
}

qv_status qv_metrics_serve(qv_metrics *metrics, const qv_metrics_server_options *options,
                           qv_metrics_server **out)
{
    const char *address = options->address != NULL ? options->address : "127.0.0.1";
    int fd = -1;
    qv_metrics_server *server = calloc(1, sizeof *server);
    if (server == NULL)
        return no_memory();
    server->metrics = metrics;
    server->options = *options;
    qv_status status = listen_on(address, options->port, &fd, &server->port);
    if (status == QV_OK) {
        server->daemon = MHD_start_daemon(
            MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_AUTO | MHD_USE_ERROR_LOG, 0, NULL, NULL,
            handle, server, MHD_OPTION_EXTERNAL_LOGGER, log_from_library, NULL,
            MHD_OPTION_LISTEN_SOCKET, fd, MHD_OPTION_CONNECTION_LIMIT, MAX_CONNECTIONS,
            MHD_OPTION_PER_IP_CONNECTION_LIMIT, MAX_CONNECTIONS_OF_IP,
            MHD_OPTION_CONNECTION_TIMEOUT, IDLE_TIMEOUT_S, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
            CONNECTION_BYTES, MHD_OPTION_END);
        if (server->daemon == NULL) {
            status = qv_fail(QV_ERR_IO, "metrics: cannot start the server on %s port %u", address,
                             server->port);
            close(fd);
        }
    }
    if (status != QV_OK) {
        free(server);
        return status;
    }
    *out = server;
    return QV_OK;
}

uint16_t qv_metrics_port(const qv_metrics_server *server)
{
    return server->port;
}

void qv_metrics_stop(qv_metrics_server *server)
{
    if (server == NULL)
        return;
    MHD_stop_daemon(server->daemon); /* closes the socket, joins the thread */
    free(server);
}
