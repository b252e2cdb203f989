#include "common/metrics.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static qv_metrics *new_metrics(void)
{
    qv_metrics *metrics = NULL;
    cr_assert_eq(qv_metrics_new(&metrics), QV_OK);
    return metrics;
}

static char *render(qv_metrics *metrics)
{
    char *text = NULL;
    size_t size = 0;
    cr_assert_eq(qv_metrics_render(metrics, &text, &size), QV_OK);
    cr_assert_eq(strlen(text), size);
    return text;
}

Test(metrics, renders_the_exposition_format)
{
    static const double bounds[] = {0.1, 1, 2.5};
    qv_metrics *m = new_metrics();
    qv_counter *plain = NULL, *labelled = NULL;
    qv_gauge *gauge = NULL;
    qv_histogram *h = NULL;
    qv_metrics_counter(m, "quiver_requests_total", "Requests\nwith a \\ and \"quotes\".",
                       QV_NO_LABELS, &plain);
    qv_metrics_counter(m, "quiver_errors_total", "Errors.",
                       QV_LABELS({"code", "A\\B\n\"C\""}, {"adapter", "caf\xC3\xA9"}), &labelled);
    qv_metrics_gauge(m, "quiver_running", "Running.", QV_NO_LABELS, &gauge);
    qv_metrics_histogram(m, "quiver_wait_seconds", "Waits.", bounds, 3, QV_LABELS({"adapter", "x"}),
                         &h);
    qv_counter_add(plain, 3);
    qv_counter_add(labelled, UINT64_C(1) << 60);
    qv_gauge_set(gauge, 0.1);
    qv_gauge_add(gauge, 1);
    static const double values[] = {0.1, 0.10001, 2, 99, INFINITY, NAN};
    for (int i = 0; i < 6; i++)
        qv_histogram_observe(h, i == 4 ? 3 : values[i]);
    char *text = render(m);
    cr_assert_str_eq(text,
                     "# HELP quiver_requests_total Requests\\nwith a \\\\ and \"quotes\".\n"
                     "# TYPE quiver_requests_total counter\n"
                     "quiver_requests_total 3\n"
                     "# HELP quiver_errors_total Errors.\n"
                     "# TYPE quiver_errors_total counter\n"
                     "quiver_errors_total{adapter=\"caf\xC3\xA9\",code=\"A\\\\B\\n\\\"C\\\"\"} "
                     "1152921504606846976\n"
                     "# HELP quiver_running Running.\n"
                     "# TYPE quiver_running gauge\n"
                     "quiver_running 1.1\n"
                     "# HELP quiver_wait_seconds Waits.\n"
                     "# TYPE quiver_wait_seconds histogram\n"
                     "quiver_wait_seconds_bucket{adapter=\"x\",le=\"0.1\"} 1\n"
                     "quiver_wait_seconds_bucket{adapter=\"x\",le=\"1\"} 2\n"
                     "quiver_wait_seconds_bucket{adapter=\"x\",le=\"2.5\"} 3\n"
                     "quiver_wait_seconds_bucket{adapter=\"x\",le=\"+Inf\"} 5\n"
                     "quiver_wait_seconds_sum{adapter=\"x\"} 104.20001\n"
                     "quiver_wait_seconds_count{adapter=\"x\"} 5\n");
    cr_assert_eq(qv_histogram_count(h), 5);
    free(text);
    qv_metrics_free(m);
    qv_metrics_free(NULL);
}

Test(metrics, the_same_name_and_labels_are_the_same_metric)
{
    qv_metrics *m = new_metrics();
    qv_counter *a = NULL, *b = NULL, *c = NULL;
    cr_assert_eq(qv_metrics_counter(m, "x_total", "X.", QV_LABELS({"p", "1"}, {"q", "2"}), &a),
                 QV_OK);
    cr_assert_eq(qv_metrics_counter(m, "x_total", "X.", QV_LABELS({"q", "2"}, {"p", "1"}), &b),
                 QV_OK);
    cr_assert_eq(qv_metrics_counter(m, "x_total", "X.", QV_LABELS({"p", "2"}, {"q", "1"}), &c),
                 QV_OK);
    cr_assert_eq(a, b);
    cr_assert_neq(a, c);
    qv_metrics_free(m);
}

Test(metrics, refuses_names_that_prometheus_would_refuse)
{
    qv_metrics *m = new_metrics();
    qv_counter *c = NULL;
    qv_gauge *g = NULL;
    qv_histogram *h = NULL;
    static const double up[] = {1, 2}, down[] = {2, 1}, nan_bound[] = {NAN};
    static const char *const bad_names[] = {"", "1x", "a-b", "a b", "\xC3\xA9", "a\n"};
    for (size_t i = 0; i < sizeof bad_names / sizeof bad_names[0]; i++) {
        cr_assert_eq(qv_metrics_counter(m, bad_names[i], "X.", QV_NO_LABELS, &c), QV_ERR_ARG,
                     "\"%s\"", bad_names[i]);
        cr_assert_eq(qv_metrics_counter(m, "x", "X.", QV_LABELS({bad_names[i], "v"}), &c),
                     QV_ERR_ARG, "\"%s\"", bad_names[i]);
    }
    cr_assert_eq(qv_metrics_counter(m, "x", "X.", QV_LABELS({"__a", "v"}), &c), QV_ERR_ARG);
    cr_assert_eq(qv_metrics_counter(m, "x", "X.", QV_LABELS({"a:b", "v"}), &c), QV_ERR_ARG);
    cr_assert_eq(qv_metrics_counter(m, "x", "X.", QV_LABELS({"a", "1"}, {"a", "2"}), &c),
                 QV_ERR_ARG);
    cr_assert_eq(qv_metrics_counter(m, "x", "X.", QV_LABELS({"a", "\xff"}), &c), QV_ERR_ARG);
    cr_assert_eq(qv_metrics_histogram(m, "h", "H.", up, 2, QV_LABELS({"le", "v"}), &h), QV_ERR_ARG);
    cr_assert_eq(qv_metrics_histogram(m, "h", "H.", down, 2, QV_NO_LABELS, &h), QV_ERR_ARG);
    cr_assert_eq(qv_metrics_histogram(m, "h", "H.", nan_bound, 1, QV_NO_LABELS, &h), QV_ERR_ARG);
    cr_assert_eq(qv_metrics_histogram(m, "h", "H.", up, 0, QV_NO_LABELS, &h), QV_ERR_ARG);

    cr_assert_eq(qv_metrics_histogram(m, "h", "H.", up, 2, QV_NO_LABELS, &h), QV_OK);
    cr_assert_eq(qv_metrics_histogram(m, "h", "H.", up, 1, QV_NO_LABELS, &h), QV_ERR_EXISTS);
    cr_assert_eq(qv_metrics_counter(m, "x:y", "X.", QV_LABELS({"a", "v"}), &c), QV_OK);
    cr_assert_eq(qv_metrics_gauge(m, "x:y", "X.", QV_LABELS({"a", "v"}), &g), QV_ERR_EXISTS);
    cr_assert_str_eq(qv_error(), "metric x:y is a counter, not a gauge");
    cr_assert_eq(qv_metrics_counter(m, "x:y", "X.", QV_LABELS({"b", "v"}), &c), QV_ERR_EXISTS);
    qv_metrics_free(m);
}

Test(metrics, folds_label_sets_beyond_the_bound_into_one)
{
    qv_metrics *m = new_metrics();
    qv_counter *c = NULL, *first = NULL, *other = NULL;
    char name[32];
    for (int i = 0; i < 2 * QV_METRICS_MAX_SERIES; i++) {
        snprintf(name, sizeof name, "adapter-%d", i);
        cr_assert_eq(qv_metrics_counter(m, "n_total", "N.", QV_LABELS({"adapter", name}), &c),
                     QV_OK);
        qv_counter_add(c, 1);
        first = i == 0 ? c : first;
    }
    qv_metrics_counter(m, "n_total", "N.", QV_LABELS({"adapter", "other"}), &other);
    cr_assert_eq(other, c);
    cr_assert_eq(qv_counter_value(other), QV_METRICS_MAX_SERIES);
    qv_metrics_counter(m, "n_total", "N.", QV_LABELS({"adapter", "adapter-0"}), &c);
    cr_assert_eq(c, first);
    qv_metrics_free(m);
}

Test(metrics, updates_of_nothing_do_nothing)
{
    qv_counter_add(NULL, 1);
    qv_gauge_set(NULL, 1);
    qv_gauge_add(NULL, 1);
    qv_histogram_observe(NULL, 1);
    cr_assert_eq(qv_counter_value(NULL), 0);
    cr_assert_eq(qv_gauge_value(NULL), 0);
    cr_assert_eq(qv_histogram_count(NULL), 0);
}

#define N_UPDATES 20000

typedef struct {
    qv_metrics *metrics;
    qv_counter *counter;
    qv_gauge *gauge;
    qv_histogram *histogram;
} shared;

static void *update(void *user)
{
    shared *s = user;
    for (int i = 0; i < N_UPDATES; i++) {
        qv_counter *same = NULL;
        qv_counter_add(s->counter, 1);
        qv_gauge_add(s->gauge, 1);
        qv_histogram_observe(s->histogram, 0.5);
        if (i % 1000 == 0)
            qv_metrics_counter(s->metrics, "c_total", "C.", QV_LABELS({"k", "v"}), &same);
    }
    return NULL;
}

Test(metrics, threads_lose_no_update_while_scrapes_run)
{
    shared s = {.metrics = new_metrics()};
    pthread_t threads[3];
    qv_metrics_counter(s.metrics, "c_total", "C.", QV_LABELS({"k", "v"}), &s.counter);
    qv_metrics_gauge(s.metrics, "g", "G.", QV_NO_LABELS, &s.gauge);
    qv_metrics_histogram(s.metrics, "h", "H.", qv_metrics_seconds, qv_metrics_n_seconds,
                         QV_NO_LABELS, &s.histogram);
    for (int i = 0; i < 3; i++)
        pthread_create(&threads[i], NULL, update, &s);
    for (int i = 0; i < 50; i++)
        free(render(s.metrics));
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    cr_assert_eq(qv_counter_value(s.counter), 3 * N_UPDATES);
    cr_assert_eq(qv_gauge_value(s.gauge), 3 * N_UPDATES);
    cr_assert_eq(qv_histogram_count(s.histogram), 3 * N_UPDATES);
    qv_metrics_free(s.metrics);
}

/* --- server ----------------------------------------------------------------------------------- */

typedef struct {
    atomic_bool ready;
    atomic_int scrapes;
    qv_gauge *gauge;
} state;

static bool is_ready(void *user, char *reason, size_t size)
{
    state *s = user;
    snprintf(reason, size, "no workers");
    return atomic_load(&s->ready);
}

static void refresh(void *user)
{
    state *s = user;
    qv_gauge_set(s->gauge, atomic_fetch_add(&s->scrapes, 1) + 1);
}

static void expect(uint16_t port, const char *request, const char *status, const char *part)
{
    char text[512];
    snprintf(text, sizeof text, "%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
             request);
    char *answer = qv_http_exchange(port, text);
    cr_assert_not_null(answer, "%s", request);
    cr_assert_eq(strncmp(answer, status, strlen(status)), 0, "%s: %s", request, answer);
    cr_assert_not_null(strstr(answer, part), "%s: %s", request, answer);
    free(answer);
}

Test(metrics, serves_pages_over_http)
{
    state s = {.ready = false};
    qv_metrics *m = new_metrics();
    qv_metrics_gauge(m, "scrapes", "Scrapes.", QV_NO_LABELS, &s.gauge);
    qv_metrics_on_scrape(m, refresh, &s);
    qv_metrics_server *server = NULL;
    cr_assert_eq(
        qv_metrics_serve(m, &(qv_metrics_server_options){.ready = is_ready, .user = &s}, &server),
        QV_OK, "%s", qv_error());
    uint16_t port = qv_metrics_port(server);
    cr_assert_gt(port, 0);
    expect(port, "GET /metrics", "HTTP/1.1 200", "\nscrapes 1\n");
    expect(port, "GET /metrics?x=1", "HTTP/1.1 200", "\nscrapes 2\n");
    expect(port, "GET /metrics", "HTTP/1.1 200",
           "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n");
    expect(port, "GET /healthz", "HTTP/1.1 200", "\r\n\r\nok\n");
    expect(port, "GET /readyz", "HTTP/1.1 503", "\r\n\r\nnot ready: no workers\n");
    atomic_store(&s.ready, true);
    expect(port, "GET /readyz", "HTTP/1.1 200", "\r\n\r\nready\n");
    expect(port, "HEAD /healthz", "HTTP/1.1 200", "Content-Length: 3\r\n");
    expect(port, "GET /", "HTTP/1.1 404", "/metrics");
    expect(port, "GET /metrics/x", "HTTP/1.1 404", "not found");
    expect(port, "POST /metrics", "HTTP/1.1 405", "Allow: GET, HEAD\r\n");
    expect(port, "DELETE /nothing", "HTTP/1.1 405", "Allow: GET, HEAD\r\n");
    qv_metrics_stop(server);
    cr_assert_null(qv_http_exchange(port, "GET / HTTP/1.0\r\n\r\n"));
    qv_metrics_free(m);
}

Test(metrics, survives_clients_that_talk_nonsense)
{
    static char huge[40000];
    qv_metrics *m = new_metrics();
    qv_metrics_server *server = NULL;
    cr_assert_eq(qv_metrics_serve(m, &(qv_metrics_server_options){0}, &server), QV_OK);
    uint16_t port = qv_metrics_port(server);
    memset(huge, 'a', sizeof huge - 1);
    memcpy(huge, "GET /", 5);
    const char *const requests[] = {
        "",    "\r\n\r\n", "\x16\x03\x01\x02",
        "GET", huge,       "GET /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"};
    enum { N_REQUESTS = sizeof requests / sizeof requests[0] };
    int fds[N_REQUESTS];
    for (int i = 0; i < N_REQUESTS; i++)
        cr_assert_geq(fds[i] = qv_http_send(port, requests[i]), 0, "request %d", i);
    expect(port, "GET /healthz", "HTTP/1.1 200", "ok\n"); /* while they all linger */
    for (int i = 0; i < N_REQUESTS; i++)
        close(fds[i]);
    expect(port, "GET /readyz", "HTTP/1.1 200", "ready\n");
    qv_metrics_stop(server);
    qv_metrics_free(m);
}

Test(metrics, says_why_it_cannot_listen)
{
    qv_metrics *m = new_metrics();
    qv_metrics_server *server = NULL, *second = NULL;
    cr_assert_eq(
        qv_metrics_serve(m, &(qv_metrics_server_options){.address = "not-an-address"}, &server),
        QV_ERR_ARG);
    cr_assert_not_null(strstr(qv_error(), "\"not-an-address\" is not an IP address"));
    cr_assert_eq(qv_metrics_serve(m, &(qv_metrics_server_options){0}, &server), QV_OK);
    uint16_t port = qv_metrics_port(server);
    cr_assert_eq(qv_metrics_serve(m, &(qv_metrics_server_options){.port = port}, &second),
                 QV_ERR_IO);
    char want[100];
    snprintf(want, sizeof want,
             "metrics: cannot listen on 127.0.0.1 port %u: Address already in use", port);
    cr_assert_str_eq(qv_error(), want);
    qv_metrics_stop(server);
    qv_metrics_stop(NULL);
    qv_metrics_free(m);
}
