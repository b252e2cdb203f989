#include "common/clock.h"
#include "common/log.h"
#include "worker/adapter_cache.h"
#include "worker/worker_internal.h"

#include <czmq.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

enum {
    TICK_MS = 20,
    RECORD_MS = 1000,   /* between writes of the lease's fields */
    DISCOVER_MS = 500,  /* between look-ups of brokers */
    RATE_MS = 400,      /* over which tokens per second are measured at least */
    LEAVE_MS = 1000,    /* for Redis to confirm that the lease is gone */
    LATE_MS = 1000,     /* a tick later than this says that we slept, not the engine */
    STALLS_TO_DIE = 10, /* a step of so many stall timeouts ends the worker */
};

/* --- the end --------------------------------------------------------------------------------- */

static void on_left(void *user)
{
    qv_worker *w = user;
    w->left = true;
}

/* Say goodbye everywhere; the tick ends the loop when that has gone out. The first reason counts.
 */
static void end_with(qv_worker *w, qv_status status, const char *reason)
{
    if (w->leaving)
        return;
    w->leaving = true;
    w->status = status;
    w->text = strdup(reason);
    w->leave_until_ms = qv_now_ms() + LEAVE_MS;
    qv_log_level level = status == QV_OK         ? QV_LOG_INFO
                         : status == QV_ERR_BUSY ? QV_LOG_WARN
                                                 : QV_LOG_ERROR;
    QV_LOG_PRINTF(level, NULL, "worker %s ends: %s", w->id, reason);
    atomic_store_explicit(&w->is_registered, false, memory_order_relaxed);
    for (size_t i = 0; i < w->n_links; i++)
        qv_session_close(w->links[i].session, reason);
    qv_engine_thread_stop(w->engine);
    if (w->registry == NULL) {
        w->left = true;
        return;
    }
    qv_registry_event(w->registry, "worker_ended", NULL, w->id, "%s", reason);
    qv_registry_leave(w->registry, on_left, w);
}

/* --- the session's questions ----------------------------------------------------------------- */

/* Adapters that the worker can hold: many more than have a slot on the device, since those without
 * one wait in host memory or on disk and take turns. */
static int64_t most_adapters(const qv_engine *engine)
{
    return qv_engine_get_options(engine)->adapter_slots > 0 ? QV_MAX_ADAPTER_NAMES : 0;
}

static void fill_ready(qv_msg_ready *ready, qv_arena *arena, void *user)
{
    qv_worker *w = ((worker_link *)user)->worker;
    const qv_engine *engine = qv_engine_thread_engine(w->engine);
    const qv_engine_options *options = qv_engine_get_options(engine);
    ready->worker = qv_str_from(w->id);
    ready->protocol = QV_PROTOCOL_VERSION;
    ready->model = qv_str_from(w->model);
    ready->backend = qv_str_from(options->backend);
    ready->capacity = options->max_running;
    ready->adapter_slots = most_adapters(engine);
    ready->max_rank = options->adapter_slots > 0 ? options->max_lora_rank : 0;
    ready->max_context = options->max_context;
    ready->total_pages = qv_engine_total_pages(engine);
    qv_set(ready, ready, instance, w->instance);
    qv_set(ready, ready, version, qv_str_from(QV_VERSION));
    qv_set(ready, ready, devices, qv_str_from(qv_engine_device(engine)));
    if (w->model_digest[0] != 0)
        qv_set(ready, ready, model_digest, qv_str_from(w->model_digest));
    qv_worker_fill_adapters(w, ready, arena);
}

static int load_int(const atomic_int *value)
{
    return atomic_load_explicit(value, memory_order_relaxed);
}

static uint64_t load_u64(const atomic_ullong *value)
{
    return atomic_load_explicit(value, memory_order_relaxed);
}

/* Tokens per second of late. */
static double token_rate(qv_worker *w)
{
    uint64_t now = qv_now_ms();
    if (now - w->rate_ms < RATE_MS)
        return w->rate;
    uint64_t tokens = load_u64(&qv_engine_thread_view(w->engine)->generated);
    w->rate = (double)(tokens - w->rate_tokens) * 1e3 / (double)(now - w->rate_ms);
    w->rate_ms = now;
    w->rate_tokens = tokens;
    return w->rate;
}

static bool fill_heartbeat(qv_msg_heartbeat *heartbeat, void *user)
{
    qv_worker *w = ((worker_link *)user)->worker;
    const qv_engine_view *view = qv_engine_thread_view(w->engine);
    if (atomic_load_explicit(&w->is_stalled, memory_order_relaxed))
        return false;
    qv_set(heartbeat, heartbeat, steps, load_u64(&view->steps));
    qv_set(heartbeat, heartbeat, running, load_int(&view->running));
    qv_set(heartbeat, heartbeat, waiting, load_int(&view->waiting));
    qv_set(heartbeat, heartbeat, free_pages, load_int(&view->free_pages));
    qv_set(heartbeat, heartbeat, free_slots, load_int(&view->free_slots));
    qv_set(heartbeat, heartbeat, tokens_per_second, token_rate(w));
    qv_set(heartbeat, heartbeat, draining, w->draining);
    return true;
}

/* Commands that are not RUN have places of their own, so one always fits. */
static void command(qv_worker *w, qv_command c)
{
    if (qv_engine_thread_push(w->engine, &c))
        return;
    qv_command_deinit(&c);
    end_with(w, QV_ERR_INTERNAL, "the engine takes no commands");
}

static size_t n_registered(const qv_worker *w)
{
    size_t n = 0;
    for (size_t i = 0; i < w->n_links; i++)
        n += qv_session_epoch(w->links[i].session) != 0;
    return n;
}

static void begin_session(const char *broker, void *user)
{
    worker_link *link = user;
    qv_worker *w = link->worker;
    snprintf(link->broker, sizeof link->broker, "%s", broker);
    command(w, (qv_command){.type = QV_COMMAND_SESSION,
                            .session = link->number,
                            .epoch = qv_session_epoch(link->session)});
    qv_counter_add(w->counts.registrations, 1);
    atomic_store_explicit(&w->is_registered, true, memory_order_relaxed);
    w->record_ms = 0;
}

/* Nobody waits any more for what runs: the broker gives it to others, or is gone itself. */
static void end_session(const char *why, void *user)
{
    (void)why;
    worker_link *link = user;
    qv_worker *w = link->worker;
    link->broker[0] = 0;
    command(w, (qv_command){.type = QV_COMMAND_SESSION, .session = link->number, .epoch = 0});
    atomic_store_explicit(&w->is_registered, n_registered(w) > 0, memory_order_relaxed);
    w->record_ms = 0;
}

static bool has_room(void *user)
{
    const qv_worker *w = ((worker_link *)user)->worker;
    return qv_engine_thread_has_room(w->engine);
}

/* --- the broker's messages ------------------------------------------------------------------- */

/* A request that does not reach the engine. */
static void refuse(worker_link *link, uint64_t number, qv_code code, const char *text)
{
    qv_message message = {.type = QV_MSG_STEP};
    qv_msg_delta delta = {.request = number};
    qv_set(&delta, delta, error_code, qv_str_from(qv_code_name(code)));
    qv_set(&delta, delta, error_message, qv_str_from(text));
    message.step.epoch = qv_session_epoch(link->session);
    message.step.deltas.data = &delta;
    message.step.deltas.count = 1;
    qv_counter_add(link->worker->counts.refused, 1);
    if (qv_session_send_message(link->session, &message) != QV_OK)
        qv_err("request %" PRIu64 ": the refusal is not reported: %s", number, qv_error());
}

/* Decode the client's message inside a `run`. Errors: as qv_message_decode. */
static qv_status decode_submit(qv_worker *w, const qv_msg_run *run, qv_message *out)
{
    qv_protocol_limits limits = qv_protocol_default_limits;
    limits.max_bytes = (size_t)w->options.max_message_bytes;
    qv_arena_reset(&w->arena);
    QV_TRY(qv_message_decode(run->submit.data, run->submit.size, QV_FROM_CLIENT, &limits, &w->arena,
                             out));
    if (out->type != QV_MSG_SUBMIT)
        return qv_fail(QV_ERR_FORMAT, "what is to run is not a submit");
    return QV_OK;
}

static uint32_t count_streams(const qv_msg_submit *submit, const qv_msg_run *run)
{
    int64_t n = submit->n;
    for (uint32_t i = 0; i < run->resume.count; i++)
        n -= run->resume.data[i].finished;
    return n > 0 ? (uint32_t)n : 1;
}

static char *dup_str(qv_str text)
{
    return text.size > 0 ? strndup(text.data, text.size) : NULL;
}

static void on_run(worker_link *link, const qv_msg_run *run)
{
    qv_worker *w = link->worker;
    qv_message message;
    qv_request *request = NULL;
    qv_code code;
    qv_counter_add(w->counts.requests, 1);
    qv_status status = decode_submit(w, run, &message);
    if (status != QV_OK) {
        refuse(link, run->request, qv_code_of_status(status), qv_error());
        return;
    }
    qv_msg_submit *submit = &message.submit;
    if (run->adapter.size > 0) /* the submit names an alias */
        qv_set(submit, submit, adapter, run->adapter);
    uint64_t number = ++w->next_number;
    status = qv_request_new(qv_engine_thread_engine(w->engine), submit, number, run->seed,
                            run->resume.data, run->resume.count, &request, &code);
    if (status != QV_OK) {
        refuse(link, run->request, code, qv_error());
        return;
    }
    qv_command c = {.type = QV_COMMAND_RUN,
                    .session = link->number,
                    .epoch = run->epoch,
                    .number = run->request,
                    .own_number = number,
                    .n_streams = count_streams(submit, run),
                    .request = request};
    if (run->resume.count > 0 && run->digest.size > 0) { /* it goes on with what it began with */
        c.name = dup_str(submit->adapter);
        c.digest = dup_str(run->digest);
    }
    if (!qv_engine_thread_push(w->engine, &c)) {
        qv_command_deinit(&c);
        refuse(link, run->request, QV_CODE_OVERLOADED,
               "the worker has no room for another request");
    }
}

static void on_abort(worker_link *link, const qv_msg_abort *abort)
{
    bool deadline = qv_str_equal(abort->reason, "deadline");
    command(link->worker, (qv_command){.type = QV_COMMAND_ABORT,
                                       .session = link->number,
                                       .epoch = abort->epoch,
                                       .number = abort->request,
                                       .reason = deadline ? "deadline" : "cancelled"});
}

static void on_broker_message(const qv_message *message, void *user)
{
    worker_link *link = user;
    qv_worker *w = link->worker;
    switch (message->type) {
    case QV_MSG_RUN:
        on_run(link, &message->run);
        break;
    case QV_MSG_ABORT:
        on_abort(link, &message->abort);
        break;
    case QV_MSG_LOAD_ADAPTER:
        command(w, (qv_command){.type = QV_COMMAND_LOAD,
                                .name = dup_str(message->load_adapter.name),
                                .path = dup_str(message->load_adapter.path),
                                .pin = message->load_adapter.pin});
        break;
    case QV_MSG_UNLOAD_ADAPTER:
        command(w, (qv_command){.type = QV_COMMAND_UNLOAD,
                                .name = dup_str(message->unload_adapter.name),
                                .digest = dup_str(message->unload_adapter.digest)});
        break;
    default:
        break;
    }
}

/* --- brokers --------------------------------------------------------------------------------- */

/* A place for another session. NULL: there are too many, or no memory. */
static worker_link *new_link(qv_worker *w)
{
    for (size_t i = 0; i < w->n_links; i++)
        if (w->links[i].endpoint == NULL && qv_session_is_seeking(w->links[i].session))
            return &w->links[i];
    if (w->n_links == QV_MAX_SESSIONS) {
        qv_fail(QV_ERR_LIMIT, "more than %d brokers", QV_MAX_SESSIONS);
        return NULL;
    }
    worker_link *link = &w->links[w->n_links];
    *link = (worker_link){.worker = w, .number = (uint32_t)w->n_links};
    qv_session_options options = {.register_timeout_ms = w->options.register_timeout_ms,
                                  .curve = w->options.key != NULL ? &w->curve : NULL,
                                  .max_message_bytes = (size_t)w->options.max_message_bytes,
                                  .max_backlog_bytes = 2 * (size_t)w->options.max_message_bytes,
                                  .fill_ready = fill_ready,
                                  .fill_heartbeat = fill_heartbeat,
                                  .joined = begin_session,
                                  .left = end_session,
                                  .message = on_broker_message,
                                  .has_room = has_room,
                                  .user = link};
    if (qv_session_new(w->loop, &options, &link->session) != QV_OK)
        return NULL;
    w->n_links++;
    return link;
}

static bool is_among(const char *endpoint, const char *const *endpoints, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(endpoint, endpoints[i]) == 0)
            return true;
    return false;
}

static bool is_linked(const qv_worker *w, const char *endpoint)
{
    for (size_t i = 0; i < w->n_links; i++)
        if (w->links[i].endpoint != NULL && strcmp(w->links[i].endpoint, endpoint) == 0)
            return true;
    return false;
}

/* Register with all of these brokers. One that is not among them any more is let go of once there
 * is no session with it. Errors: NOMEM, LIMIT. */
static qv_status connect_to(qv_worker *w, const char *const *endpoints, size_t n)
{
    for (size_t i = 0; i < w->n_links; i++) {
        worker_link *link = &w->links[i];
        if (link->endpoint == NULL || qv_session_epoch(link->session) != 0 ||
            is_among(link->endpoint, endpoints, n))
            continue;
        free(link->endpoint);
        link->endpoint = NULL;
        QV_TRY(qv_session_set_brokers(link->session, NULL, 0));
    }
    for (size_t i = 0; i < n; i++) {
        if (is_linked(w, endpoints[i]))
            continue;
        worker_link *link = new_link(w);
        if (link == NULL || (link->endpoint = strdup(endpoints[i])) == NULL)
            return link != NULL ? qv_fail(QV_ERR_NOMEM, "no memory for a broker") : QV_ERR_LIMIT;
        QV_TRY(qv_session_set_brokers(link->session, &endpoints[i], 1));
    }
    return QV_OK;
}

/* --- the engine's reports -------------------------------------------------------------------- */

static void load_first_adapters(qv_worker *w)
{
    for (size_t i = 0; i < w->options.adapters.n; i++) {
        const char *text = w->options.adapters.items[i], *sep = strchr(text, '=');
        command(w, (qv_command){.type = QV_COMMAND_LOAD,
                                .name = strndup(text, (size_t)(sep - text)),
                                .path = strdup(sep + 1),
                                .trusted = true,
                                .pin = true});
    }
}

static void on_opened(qv_worker *w)
{
    atomic_store_explicit(&w->is_open, true, memory_order_relaxed);
    if (w->registry != NULL)
        qv_registry_event(w->registry, "worker_started", NULL, w->id, "%s", w->model);
    load_first_adapters(w);
    if (w->options.brokers.n > 0 &&
        connect_to(w, w->options.brokers.items, w->options.brokers.n) != QV_OK)
        end_with(w, QV_ERR_NOMEM, qv_error());
}

static void send_step(qv_worker *w, qv_report *report)
{
    if (report->session >= w->n_links)
        return;
    qv_session *session = w->links[report->session].session;
    if (report->epoch == 0 || report->epoch != qv_session_epoch(session))
        return;
    qv_session_send(session, report->data, report->size);
    report->data = NULL;
}

static void on_report(qv_worker *w, qv_report *report)
{
    switch (report->type) {
    case QV_REPORT_OPENED:
        on_opened(w);
        break;
    case QV_REPORT_STEP:
        send_step(w, report);
        break;
    case QV_REPORT_ADAPTER:
        qv_worker_on_adapter(w, report->adapter);
        break;
    case QV_REPORT_FAILED:
        end_with(w, report->status, report->text != NULL ? report->text : "the engine failed");
        break;
    }
    qv_report_deinit(report);
}

static int on_reports(zloop_t *loop, zmq_pollitem_t *item, void *arg);

/* Poll the engine's reports, or not: one that is not taken would keep the loop spinning. */
static void poll_reports(qv_worker *w, bool wanted)
{
    zmq_pollitem_t item = {.fd = qv_engine_thread_fd(w->engine), .events = ZMQ_POLLIN};
    if (wanted && !w->takes_reports)
        w->takes_reports = zloop_poller(w->loop, &item, on_reports, w) == 0;
    else if (!wanted && w->takes_reports) {
        zloop_poller_end(w->loop, &item);
        w->takes_reports = false;
    }
}

static bool has_backlog(const qv_worker *w)
{
    bool has = false;
    for (size_t i = 0; i < w->n_links; i++)
        has = has || qv_session_has_backlog(w->links[i].session);
    return has;
}

/* One broker that does not read makes the engine wait; of several none may hold up the others. */
static bool has_to_wait(const qv_worker *w)
{
    return n_registered(w) == 1 && has_backlog(w);
}

/* Pass on what the engine says. While the broker does not take it, the engine has to wait. */
static void take_reports(qv_worker *w)
{
    qv_report report;
    while (!w->leaving && !has_to_wait(w) && qv_engine_thread_pop(w->engine, &report))
        on_report(w, &report);
    poll_reports(w, !w->leaving && !has_to_wait(w));
}

static int end_or_go_on(qv_worker *w)
{
    bool gone = w->leaving && (w->left || qv_now_ms() >= w->leave_until_ms);
    w->ended = w->ended || gone;
    return w->ended ? -1 : 0;
}

static int on_reports(zloop_t *loop, zmq_pollitem_t *item, void *arg)
{
    (void)loop, (void)item;
    take_reports(arg);
    return end_or_go_on(arg);
}

/* --- Redis ----------------------------------------------------------------------------------- */

static void on_brokers(qv_status status, const qv_broker_address *brokers, size_t n, void *user)
{
    qv_worker *w = user;
    w->discovering = false;
    if (status != QV_OK || n == 0)
        return;
    const char **endpoints = calloc(n, sizeof *endpoints);
    for (size_t i = 0; endpoints != NULL && i < n; i++)
        endpoints[i] = brokers[i].backend;
    if (endpoints != NULL && connect_to(w, endpoints, n) != QV_OK)
        qv_err("the brokers in Redis are not used: %s", qv_error());
    free(endpoints);
}

static void discover(qv_worker *w, uint64_t now)
{
    bool wanted = w->registry != NULL && w->options.brokers.n == 0 &&
                  atomic_load_explicit(&w->is_open, memory_order_relaxed) &&
                  qv_registry_is_up(w->registry);
    if (!wanted || w->discovering || now < w->discover_ms)
        return;
    w->discover_ms = now + DISCOVER_MS;
    w->discovering = true;
    qv_registry_find_brokers(w->registry, on_brokers, w);
}

static const char *state_word(const qv_worker *w)
{
    return w->draining                                                      ? "draining"
           : !atomic_load_explicit(&w->is_open, memory_order_relaxed)       ? "loading"
           : atomic_load_explicit(&w->is_stalled, memory_order_relaxed)     ? "stalled"
           : !atomic_load_explicit(&w->is_registered, memory_order_relaxed) ? "seeking"
                                                                            : "ready";
}

static void write_record(qv_worker *w)
{
    const qv_engine *engine = qv_engine_thread_engine(w->engine);
    const qv_engine_view *view = qv_engine_thread_view(w->engine);
    char adapters[4096], brokers[QV_MAX_SESSIONS * (QV_ID_MAX + 1)] = "";
    for (size_t i = 0, used = 0; i < w->n_links; i++)
        if (w->links[i].broker[0] != 0)
            used += (size_t)snprintf(brokers + used, sizeof brokers - used, "%s%s",
                                     used > 0 ? " " : "", w->links[i].broker);
    qv_worker_list_adapters(w, adapters, sizeof adapters);
    qv_worker_record record = {.state = state_word(w),
                               .model = w->model,
                               .backend = w->options.engine.backend,
                               .version = QV_VERSION,
                               .broker = brokers[0] != 0 ? brokers : NULL,
                               .capacity = -1,
                               .adapter_slots = -1,
                               .free_slots = -1,
                               .total_pages = -1,
                               .free_pages = -1,
                               .running = load_int(&view->running),
                               .waiting = load_int(&view->waiting),
                               .adapters = adapters};
    if (engine != NULL) {
        record.devices = qv_engine_device(engine);
        record.capacity = qv_engine_get_options(engine)->max_running;
        record.adapter_slots = qv_engine_get_options(engine)->adapter_slots;
        record.total_pages = qv_engine_total_pages(engine);
        record.free_slots = load_int(&view->free_slots);
        record.free_pages = load_int(&view->free_pages);
    }
    qv_registry_put_worker(w->registry, &record);
}

/* --- time ------------------------------------------------------------------------------------ */

/* The engine must prove progress while it works; sleeping, loading and waiting for us are none of
 * its faults. */
static void watch_engine(qv_worker *w, uint64_t now)
{
    const qv_engine_view *view = qv_engine_thread_view(w->engine);
    uint64_t limit = (uint64_t)w->options.stall_timeout_ms;
    unsigned long long turns = load_u64(&view->turns);
    bool works = load_int(&view->activity) == QV_ACTIVITY_WORKING;
    bool late = now - w->tick_ms > LATE_MS;
    if (turns != w->turns || !works || late) {
        w->turns = turns;
        w->turned_ms = now;
    }
    bool stalled = limit > 0 && now - w->turned_ms >= limit;
    if (stalled != atomic_load_explicit(&w->is_stalled, memory_order_relaxed)) {
        atomic_store_explicit(&w->is_stalled, stalled, memory_order_relaxed);
        if (stalled)
            qv_err("the engine hangs: one step takes longer than %" PRIu64
                   " ms; heartbeats stop until it goes on",
                   limit);
        else
            qv_warn("the engine goes on after a step that took very long");
    }
    if (stalled && now - w->turned_ms >= STALLS_TO_DIE * limit)
        end_with(w, QV_ERR_TIMEOUT, "the engine hangs");
}

static void begin_drain(qv_worker *w)
{
    if (w->draining)
        return;
    w->draining = true;
    atomic_store_explicit(&w->is_draining, true, memory_order_relaxed);
    w->drain_until_ms = qv_now_ms() + (uint64_t)w->options.drain_timeout_ms;
    qv_info("draining, requests in flight: %zu", qv_engine_thread_n_requests(w->engine));
    for (size_t i = 0; i < w->n_links; i++)
        qv_session_heartbeat(w->links[i].session);
    w->record_ms = 0;
}

static void check_drain(qv_worker *w, uint64_t now)
{
    size_t n = qv_engine_thread_n_requests(w->engine);
    if (n == 0)
        take_reports(w); /* all there are: the last ones were pushed before the count fell */
    if (n == 0 && !has_backlog(w)) {
        end_with(w, QV_OK, "drained");
    } else if (now >= w->drain_until_ms) {
        char reason[128];
        snprintf(reason, sizeof reason, "draining took too long; requests given back: %zu", n);
        end_with(w, QV_ERR_BUSY, reason);
    }
}

static void update_gauges(qv_worker *w)
{
    uint64_t silence_ms = 0;
    for (size_t i = 0; i < w->n_links; i++) {
        uint64_t ms = qv_session_silence_ms(w->links[i].session);
        silence_ms = ms > silence_ms ? ms : silence_ms;
    }
    qv_gauge_set(w->counts.registered, (double)n_registered(w));
    qv_gauge_set(w->counts.silence, (double)silence_ms * 1e-3);
    qv_gauge_set(w->counts.in_flight, (double)qv_engine_thread_n_requests(w->engine));
    qv_gauge_set(w->counts.redis_up, w->registry != NULL && qv_registry_is_up(w->registry));
}

static int on_tick(zloop_t *loop, int timer_id, void *arg)
{
    (void)loop, (void)timer_id;
    qv_worker *w = arg;
    uint64_t now = qv_now_ms();
    if (!w->leaving) {
        watch_engine(w, now);
        w->tick_ms = now;
        take_reports(w);
        discover(w, now);
        update_gauges(w);
        if (w->registry != NULL && now >= w->record_ms) {
            w->record_ms = now + RECORD_MS;
            write_record(w);
        }
        if (w->draining)
            check_drain(w, now);
    }
    return end_or_go_on(w);
}

static int on_order(zloop_t *loop, zmq_pollitem_t *item, void *arg)
{
    (void)loop, (void)item;
    qv_worker *w = arg;
    eventfd_t ignored;
    eventfd_read(w->order_fd, &ignored);
    if (atomic_load_explicit(&w->order, memory_order_relaxed) == ORDER_STOP)
        end_with(w, QV_OK, "stopped");
    else
        begin_drain(w);
    return end_or_go_on(w);
}

/* --- the I/O thread -------------------------------------------------------------------------- */

static qv_status open_io(qv_worker *w)
{
    w->loop = zloop_new();
    w->held = qv_map_new(0);
    if (w->loop == NULL || w->held == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the I/O thread");
    zloop_set_nonstop(w->loop, true); /* signals are the program's */
    if (qv_worker_has_redis(&w->options)) {
        qv_registry_options registry = {
            .url = w->options.redis, .who = w->id, .lease_ms = w->options.lease_ms};
        QV_TRY(qv_registry_new(w->loop, &registry, &w->registry));
    }
    zmq_pollitem_t order = {.fd = w->order_fd, .events = ZMQ_POLLIN};
    if (zloop_poller(w->loop, &order, on_order, w) != 0 ||
        zloop_timer(w->loop, TICK_MS, 0, on_tick, w) < 0)
        return qv_fail(QV_ERR_NOMEM, "no memory for the loop of the I/O thread");
    return QV_OK;
}

void *qv_worker_io_main(void *arg)
{
    qv_worker *w = arg;
    qv_status status = open_io(w);
    if (status == QV_OK) {
        while (!w->ended)
            zloop_start(w->loop);
    } else {
        w->status = status;
        w->text = strdup(qv_error());
    }
    qv_registry_free(w->registry);
    for (size_t i = 0; i < w->n_links; i++) {
        qv_session_free(w->links[i].session);
        free(w->links[i].endpoint);
    }
    zloop_destroy(&w->loop);
    qv_map_free(w->held, qv_worker_free_held);
    qv_arena_deinit(&w->arena);
    qv_engine_thread_stop(w->engine);
    eventfd_write(w->ended_fd, 1);
    return NULL;
}
