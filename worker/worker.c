#include "common/clock.h"
#include "common/log.h"
#include "common/mq.h"
#include "common/redis.h"
#include "common/utf8.h"
#include "worker/worker_internal.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

/* For the step in hand to end, and the engine to close. */
#define JOIN_MS 30000

/* --- start: what the options mean ------------------------------------------------------------ */

static qv_status set_id(qv_worker *w)
{
    uint64_t drawn = 0;
    if (getrandom(&drawn, sizeof drawn, 0) != sizeof drawn)
        drawn = qv_now_ns();
    w->instance = (int64_t)(drawn >> 1) | 1;
    if (w->options.id != NULL && w->options.id[0] != 0) {
        qv_status status = qv_check_id(w->options.id, strlen(w->options.id));
        if (status != QV_OK)
            return qv_fail_prefix(status, "id '%s'", w->options.id);
        snprintf(w->id, sizeof w->id, "%s", w->options.id);
        return QV_OK;
    }
    char host[33] = "";
    uint32_t random = 0;
    gethostname(host, sizeof host - 1);
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        random = (uint32_t)qv_now_ns();
    snprintf(w->id, sizeof w->id, "%s-%d-%08x", host, (int)getpid(), random);
    for (char *p = w->id; *p != 0; p++)
        if (qv_check_id(p, 1) != QV_OK)
            *p = '-';
    return QV_OK;
}

/* The last part of the model's path, or the name that was given. */
static void set_model_name(qv_worker *w)
{
    char *real = realpath(w->options.engine.model_dir, NULL);
    const char *name = w->options.model_name;
    if (name == NULL || name[0] == 0) {
        const char *path = real != NULL ? real : w->options.engine.model_dir;
        const char *slash = strrchr(path, '/');
        name = slash != NULL && slash[1] != 0 ? slash + 1 : path;
    }
    snprintf(w->model, sizeof w->model, "%s", name);
    for (char *p = w->model; !qv_utf8_valid(w->model, strlen(w->model)); p++)
        if ((unsigned char)*p >= 0x80) /* a path may have any bytes, and be cut in any place */
            *p = '?';
    free(real);
    if (qv_model_digest(w->options.engine.model_dir, w->model_digest) != QV_OK)
        w->model_digest[0] = 0; /* the engine says what is wrong with the folder */
}

bool qv_worker_has_redis(const qv_worker_options *options)
{
    return options->redis != NULL && options->redis[0] != 0 && strcmp(options->redis, "none") != 0;
}

/* Endpoints that can never be connected to are mistakes; those where nobody listens are not. */
static qv_status check_endpoint(const char *endpoint)
{
    qv_mq *mq;
    qv_mq_options options = qv_mq_default_options(QV_MQ_DEALER, endpoint);
    QV_TRY(qv_mq_open(&options, &mq));
    qv_mq_close(mq);
    return QV_OK;
}

static qv_status check_options(const qv_worker_options *o)
{
    if ((o->key != NULL) != (o->broker_key != NULL))
        return qv_fail(QV_ERR_ARG, "a key and the brokers' public key go together");
    if (o->engine.model_dir == NULL || o->engine.model_dir[0] == 0)
        return qv_fail(QV_ERR_ARG, "no model directory");
    if (qv_worker_has_redis(o))
        QV_TRY(qv_redis_check_url(o->redis));
    for (size_t i = 0; i < o->brokers.n; i++)
        QV_TRY(check_endpoint(o->brokers.items[i]));
    for (size_t i = 0; i < o->adapters.n; i++) {
        const char *text = o->adapters.items[i], *sep = strchr(text, '=');
        if (sep == NULL || sep[1] == 0)
            return qv_fail(QV_ERR_ARG, "adapter '%s' is not NAME=DIR", text);
        if (!qv_utf8_valid(text, strlen(text)))
            return qv_fail(QV_ERR_ARG, "adapter number %zu: its path is not UTF-8", i + 1);
        QV_TRY(qv_adapter_name_check((qv_str){text, (uint32_t)(sep - text)}));
    }
    return QV_OK;
}

/* --- start: metrics -------------------------------------------------------------------------- */

static bool is_ready(void *user, char *reason, size_t size)
{
    const qv_worker *w = user;
    const char *why =
        !atomic_load_explicit(&w->is_open, memory_order_relaxed)      ? "the model is being loaded"
        : atomic_load_explicit(&w->is_draining, memory_order_relaxed) ? "draining"
        : atomic_load_explicit(&w->is_stalled, memory_order_relaxed)  ? "the engine hangs"
        : !atomic_load_explicit(&w->is_registered, memory_order_relaxed)
            ? "not registered with a broker"
            : NULL;
    if (why != NULL)
        snprintf(reason, size, "%s", why);
    return why == NULL;
}

static qv_status serve_metrics(qv_worker *w)
{
    worker_metrics *m = &w->counts;
    const struct {
        qv_counter **counter;
        const char *name, *help;
    } counters[] = {
        {&m->requests, "quiver_worker_requests_total", "Requests that the broker sent."},
        {&m->refused, "quiver_worker_refused_total", "Of these, refused before the engine."},
        {&m->registrations, "quiver_worker_registrations_total", "Sessions with a broker."},
        {&m->loads, "quiver_worker_adapter_loads_total", "Adapters loaded."},
        {&m->failed_loads, "quiver_worker_adapter_load_failures_total", "Loads that failed."},
    };
    const struct {
        qv_gauge **gauge;
        const char *name, *help;
    } gauges[] = {
        {&m->registered, "quiver_worker_registered", "1 while there is a session with a broker."},
        {&m->silence, "quiver_worker_broker_silence_seconds", "Since the broker was last heard."},
        {&m->in_flight, "quiver_worker_in_flight", "Requests that have not ended."},
        {&m->redis_up, "quiver_worker_redis_up", "1 while Redis is usable."},
    };
    QV_TRY(qv_metrics_new(&w->metrics));
    for (size_t i = 0; i < sizeof counters / sizeof *counters; i++)
        QV_TRY(qv_metrics_counter(w->metrics, counters[i].name, counters[i].help, QV_NO_LABELS,
                                  counters[i].counter));
    for (size_t i = 0; i < sizeof gauges / sizeof *gauges; i++)
        QV_TRY(qv_metrics_gauge(w->metrics, gauges[i].name, gauges[i].help, QV_NO_LABELS,
                                gauges[i].gauge));
    if (w->options.metrics_port < 0)
        return QV_OK;
    qv_metrics_server_options server = {.address = w->options.metrics_address,
                                        .port = (uint16_t)w->options.metrics_port,
                                        .ready = is_ready,
                                        .user = w};
    return qv_metrics_serve(w->metrics, &server, &w->server);
}

/* --- life ------------------------------------------------------------------------------------ */

static qv_status spawn(qv_worker *w)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&w->thread, NULL, qv_worker_io_main, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0)
        return qv_fail(QV_ERR_IO, "I/O thread: %s", strerror(rc));
    pthread_setname_np(w->thread, "io");
    w->thread_started = true;
    return QV_OK;
}

static qv_status start(qv_worker *w)
{
    static const char *default_broker = QV_WORKER_DEFAULT_BROKER;
    qv_engine_thread_options engine = {.engine = w->options.engine,
                                       .max_message_bytes = (size_t)w->options.max_message_bytes,
                                       .adapter_roots = w->options.adapter_roots};
    QV_TRY(check_options(&w->options));
    if (w->options.key != NULL) {
        QV_TRY(qv_key_pair_read(w->options.key, &w->curve.own));
        QV_TRY(qv_public_key_get(w->options.broker_key, w->curve.server_key));
    }
    if (w->options.brokers.n == 0 && !qv_worker_has_redis(&w->options))
        w->options.brokers = (qv_string_list){.items = &default_broker, .n = 1};
    QV_TRY(set_id(w));
    set_model_name(w);
    w->order_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    w->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->order_fd < 0 || w->ended_fd < 0)
        return qv_fail(QV_ERR_IO, "eventfd: %s", strerror(errno));
    QV_TRY(serve_metrics(w));
    engine.metrics = w->metrics;
    QV_TRY(qv_engine_thread_start(&engine, &w->engine));
    return spawn(w);
}

qv_status qv_worker_start(const qv_worker_options *options, qv_worker **out)
{
    qv_worker *w = calloc(1, sizeof *w);
    if (w == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a worker");
    w->options = *options;
    w->order_fd = w->ended_fd = -1;
    qv_arena_init(&w->arena, 0, 8 * (size_t)options->max_message_bytes);
    w->turned_ms = w->tick_ms = w->rate_ms = qv_now_ms();
    qv_status status = start(w);
    if (status != QV_OK) {
        qv_worker_free(w);
        return status;
    }
    *out = w;
    return QV_OK;
}

static void give_order(qv_worker *w, worker_order what)
{
    int none = ORDER_NONE;
    if (what == ORDER_STOP)
        atomic_store_explicit(&w->order, what, memory_order_relaxed);
    else
        atomic_compare_exchange_strong(&w->order, &none, (int)what);
    eventfd_write(w->order_fd, 1);
}

void qv_worker_drain(qv_worker *worker)
{
    give_order(worker, ORDER_DRAIN);
}

void qv_worker_stop(qv_worker *worker)
{
    give_order(worker, ORDER_STOP);
}

int qv_worker_fd(const qv_worker *worker)
{
    return worker->ended_fd;
}

qv_status qv_worker_wait(qv_worker *worker)
{
    if (worker->thread_started && !worker->thread_joined) {
        pthread_join(worker->thread, NULL);
        worker->thread_joined = true;
    }
    return worker->status == QV_OK
               ? QV_OK
               : qv_fail(worker->status, "%s", worker->text != NULL ? worker->text : "it failed");
}

bool qv_worker_free(qv_worker *worker)
{
    if (worker == NULL)
        return true;
    if (worker->thread_started) {
        qv_worker_stop(worker);
        qv_worker_wait(worker);
    } else if (worker->engine != NULL) {
        qv_engine_thread_stop(worker->engine);
    }
    if (!qv_engine_thread_join(worker->engine, JOIN_MS))
        return false;
    qv_metrics_stop(worker->server);
    qv_metrics_free(worker->metrics);
    if (worker->order_fd >= 0)
        close(worker->order_fd);
    if (worker->ended_fd >= 0)
        close(worker->ended_fd);
    free(worker->text);
    free(worker);
    return true;
}

const char *qv_worker_id(const qv_worker *worker)
{
    return worker->id;
}

uint16_t qv_worker_metrics_port(const qv_worker *worker)
{
    return worker->server != NULL ? qv_metrics_port(worker->server) : 0;
}
