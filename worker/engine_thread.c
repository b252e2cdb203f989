#include "worker/engine_thread.h"

#include "common/arena.h"
#include "common/confine.h"
#include "common/log.h"
#include "common/map.h"
#include "common/ring.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum {
    COMMANDS = 65536,   /* more than the requests and loads that a broker has on one worker */
    RESERVED = 64,      /* of them, for commands that are not RUN */
    REPORTS = 256,      /* steps that may wait for the I/O thread */
    MAX_DELTAS = 65536, /* of one message, by protocol.def */
    BLOCKED_MS = 100    /* between looks at whether to stop, while reports have no room */
};

/* A request in the engine. */
typedef struct {
    uint64_t number, own_number, epoch;
    uint32_t session;
    uint32_t n_streams; /* that have not ended */
} running;

struct qv_engine_thread {
    qv_engine_thread_options options;
    pthread_t thread;
    qv_ring *commands, *reports;
    int room_fd; /* eventfd: the I/O thread made room among the reports */

    /* Set by the engine before it looks for room a last time and cleared by the I/O thread after it
     * made some (both sequentially consistent), so that one of them sees the other. */
    atomic_bool starved;
    atomic_bool stopping;     /* release by stop, acquire by the engine */
    atomic_size_t n_requests; /* up by the I/O thread; down (release) by the engine after the last
                                 report of a request is in the ring */
    qv_engine_view view;
    const qv_engine *opened; /* the I/O thread's; set when it pops OPENED */

    /* The engine thread's. */
    qv_engine *engine;
    uint64_t epochs[QV_MAX_SESSIONS];   /* 0 = no session */
    qv_map *by_number[QV_MAX_SESSIONS]; /* -> running, of the session's epoch only */
    qv_map *by_own_number;              /* -> running; owned */
    uint32_t session;                   /* that `deltas` are for */
    size_t n_ghosts[QV_MAX_SESSIONS];   /* of epochs before, aborted and not yet ended */
    qv_msg_delta *deltas;               /* [deltas_capacity] of the message that is being made */
    size_t n_deltas, deltas_capacity;
    qv_arena arena; /* of one message */
    qv_counter *errors[QV_CODE_COUNT];
};

void qv_command_deinit(qv_command *command)
{
    qv_request_free(command->request);
    free(command->name);
    free(command->path);
    free(command->digest);
}

void qv_report_deinit(qv_report *report)
{
    free(report->data);
    free(report->adapter);
    free(report->text);
}

/* --- reporting ------------------------------------------------------------------------------- */

static void set_activity(qv_engine_thread *t, qv_activity activity)
{
    atomic_store_explicit(&t->view.activity, (int)activity, memory_order_relaxed);
    atomic_fetch_add_explicit(&t->view.turns, 1, memory_order_relaxed);
}

static bool is_stopping(qv_engine_thread *t)
{
    return atomic_load_explicit(&t->stopping, memory_order_acquire);
}

/* Hand a report over, waiting for room; one that nobody will take any more is freed. */
static void report(qv_engine_thread *t, qv_report r)
{
    if (qv_ring_push(t->reports, &r))
        return;
    set_activity(t, QV_ACTIVITY_BLOCKED);
    for (;;) {
        uint64_t ignored;
        atomic_store(&t->starved, true);
        if (qv_ring_push(t->reports, &r))
            break;
        if (is_stopping(t)) {
            qv_report_deinit(&r);
            break;
        }
        poll(&(struct pollfd){.fd = t->room_fd, .events = POLLIN}, 1, BLOCKED_MS);
        if (read(t->room_fd, &ignored, sizeof ignored) < 0)
            continue; /* it was the time */
    }
    set_activity(t, QV_ACTIVITY_WORKING);
}

static char *put_text(char **at, const char *text)
{
    if (text == NULL)
        return NULL;
    char *copy = *at;
    *at = stpcpy(copy, text) + 1;
    return copy;
}

static size_t text_size(const char *text)
{
    return text != NULL ? strlen(text) + 1 : 0;
}

static void report_adapter(qv_engine_thread *t, const qv_adapter_event *event)
{
    size_t size = sizeof *event + text_size(event->name) + text_size(event->path) +
                  text_size(event->digest) + text_size(event->reason);
    qv_adapter_event *copy = malloc(size);
    if (copy == NULL) {
        qv_err("out of memory: the state of adapter %s is not reported", event->name);
        return;
    }
    char *at = (char *)(copy + 1);
    *copy = *event;
    copy->name = put_text(&at, event->name);
    copy->path = put_text(&at, event->path);
    copy->digest = put_text(&at, event->digest);
    copy->reason = put_text(&at, event->reason);
    report(t, (qv_report){.type = QV_REPORT_ADAPTER, .adapter = copy});
}

static void report_failure(qv_engine_thread *t, qv_status status)
{
    report(t, (qv_report){.type = QV_REPORT_FAILED, .status = status, .text = strdup(qv_error())});
}

/* --- step messages --------------------------------------------------------------------------- */

/* Encode deltas as one message into memory of its own. Errors: LIMIT (too large), NOMEM. */
static qv_status encode(qv_engine_thread *t, qv_msg_delta *deltas, size_t n, qv_report *out)
{
    qv_message message = {.type = QV_MSG_STEP};
    const void *data;
    size_t size;
    message.step.epoch = t->epochs[t->session];
    message.step.deltas.data = deltas;
    message.step.deltas.count = (uint32_t)n;
    qv_arena_reset(&t->arena);
    QV_TRY(qv_message_encode(&message, &t->arena, &data, &size));
    if (size > t->options.max_message_bytes)
        return qv_fail(QV_ERR_LIMIT, "a step has %zu bytes, more than %zu", size,
                       t->options.max_message_bytes);
    *out = (qv_report){.type = QV_REPORT_STEP,
                       .session = t->session,
                       .epoch = t->epochs[t->session],
                       .data = malloc(size),
                       .size = size};
    if (out->data == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a step of %zu bytes", size);
    memcpy(out->data, data, size);
    return QV_OK;
}

/* What takes the place of a delta that does not fit into a message. */
static qv_msg_delta too_large(const qv_msg_delta *delta)
{
    qv_msg_delta error = {.request = delta->request};
    qv_set(&error, delta, error_code, qv_str_from(qv_code_name(QV_CODE_TOO_LARGE)));
    qv_set(&error, delta, error_message,
           qv_str_from("the answer is too large for one message: ask for fewer logprobs"));
    return error;
}

static void forget(qv_engine_thread *t, running *r)
{
    if (qv_map_get_u64(t->by_number[r->session], r->number) == r)
        qv_map_remove_u64(t->by_number[r->session], r->number);
    qv_map_remove_u64(t->by_own_number, r->own_number);
    free(r);
}

/* A request of this session gets an error of ours: end what still runs of it, without a word. */
static void drop_request(qv_engine_thread *t, uint64_t number)
{
    running *r = qv_map_get_u64(t->by_number[t->session], number);
    if (r == NULL)
        return; /* that was its last delta */
    qv_engine_abort(t->engine, r->own_number, "cancelled");
    forget(t, r);
    atomic_fetch_sub_explicit(&t->n_requests, 1, memory_order_release);
}

/* Send deltas in as few messages as their size allows. */
static void send_deltas(qv_engine_thread *t, qv_msg_delta *deltas, size_t n)
{
    qv_report r;
    if (n <= MAX_DELTAS) {
        qv_status status = encode(t, deltas, n, &r);
        if (status == QV_OK) {
            report(t, r);
            return;
        }
        if (n == 1 && deltas->error_code.size > 0) {
            qv_err("a step is lost: %s", qv_error());
            return;
        }
    }
    if (n == 1) {
        qv_msg_delta error = too_large(deltas);
        drop_request(t, deltas->request);
        send_deltas(t, &error, 1);
        return;
    }
    send_deltas(t, deltas, n / 2);
    send_deltas(t, deltas + n / 2, n - n / 2);
}

static bool add_delta(qv_engine_thread *t, const qv_msg_delta *delta)
{
    if (t->n_deltas == t->deltas_capacity) {
        size_t capacity = t->deltas_capacity > 0 ? 2 * t->deltas_capacity : 256;
        qv_msg_delta *grown = realloc(t->deltas, capacity * sizeof *grown);
        if (grown == NULL)
            return false;
        t->deltas = grown;
        t->deltas_capacity = capacity;
    }
    t->deltas[t->n_deltas++] = *delta;
    return true;
}

/* Count an error code; all are registered at the start. */
static void count_error(qv_engine_thread *t, qv_str code)
{
    for (int i = 0; i < QV_CODE_COUNT; i++)
        if (qv_str_equal(code, qv_code_name((qv_code)i)))
            qv_counter_add(t->errors[i], 1);
}

/* Take one delta of the engine into the message that is being made for t->session. True when its
 * request ended with it. */
static bool take_delta(qv_engine_thread *t, const qv_msg_delta *delta, running **out)
{
    running *r = qv_map_get_u64(t->by_own_number, delta->request);
    *out = r;
    if (r == NULL || r->session != t->session) /* it ended before, with an error of ours */
        return false;
    if (r->epoch == t->epochs[r->session]) {
        qv_msg_delta renamed = *delta;
        renamed.request = r->number;
        if (!add_delta(t, &renamed))
            qv_err("out of memory: a delta is lost");
    }
    if (delta->error_code.size > 0) {
        count_error(t, delta->error_code);
        r->n_streams = 0;
    } else if (delta->finish_reason.size > 0) {
        r->n_streams -= r->n_streams > 0;
    }
    return r->n_streams == 0;
}

/* Report what a step gave. */
static void send_result(qv_engine_thread *t, const qv_step_result *result)
{
    size_t n_ended = 0;
    for (uint32_t i = 0; i < result->n_adapters; i++)
        report_adapter(t, &result->adapters[i]);
    for (t->session = 0; t->session < QV_MAX_SESSIONS; t->session++) {
        if (qv_map_count(t->by_number[t->session]) == 0 && t->n_ghosts[t->session] == 0)
            continue;
        t->n_deltas = 0;
        for (uint32_t i = 0; i < result->n_deltas; i++) {
            running *r;
            if (take_delta(t, &result->deltas[i], &r)) {
                t->n_ghosts[t->session] -= r->epoch != t->epochs[t->session];
                forget(t, r);
                n_ended++;
            }
        }
        if (t->n_deltas > 0)
            send_deltas(t, t->deltas, t->n_deltas);
    }
    atomic_fetch_sub_explicit(&t->n_requests, n_ended, memory_order_release);
}

/* --- commands -------------------------------------------------------------------------------- */

static void begin_session(qv_engine_thread *t, uint32_t session, uint64_t epoch)
{
    QV_MAP_EACH(t->by_number[session], entry)
    {
        const running *r = entry->value;
        qv_engine_abort(t->engine, r->own_number, "cancelled");
        t->n_ghosts[session]++;
    }
    qv_map_clear(t->by_number[session], NULL);
    t->epochs[session] = epoch;
}

/* Whether the engine has this version of an adapter (digest NULL: any, also none yet). */
static bool has_version(const qv_engine_thread *t, const char *name, const char *digest)
{
    qv_adapter_event adapter;
    return qv_engine_find_adapter(t->engine, name, &adapter) &&
           (digest == NULL || strcmp(adapter.digest, digest) == 0);
}

/* A request that does not reach the engine ends here. */
static void refuse(qv_engine_thread *t, const qv_command *c, qv_code code, const char *text)
{
    qv_msg_delta error = {.request = c->number};
    qv_set(&error, delta, error_code, qv_str_from(qv_code_name(code)));
    qv_set(&error, delta, error_message, qv_str_from(text));
    qv_counter_add(t->errors[code], 1);
    t->session = c->session;
    send_deltas(t, &error, 1);
    atomic_fetch_sub_explicit(&t->n_requests, 1, memory_order_release);
}

static bool remember(qv_engine_thread *t, const qv_command *c)
{
    running *r = malloc(sizeof *r);
    if (r == NULL)
        return false;
    *r = (running){.number = c->number,
                   .own_number = c->own_number,
                   .epoch = c->epoch,
                   .session = c->session,
                   .n_streams = c->n_streams};
    if (qv_map_set_u64(t->by_own_number, r->own_number, r) != QV_OK) {
        free(r);
        return false;
    }
    if (qv_map_set_u64(t->by_number[r->session], r->number, r) != QV_OK) {
        qv_map_remove_u64(t->by_own_number, r->own_number);
        free(r);
        return false;
    }
    return true;
}

static void run(qv_engine_thread *t, qv_command *c)
{
    if (c->epoch != t->epochs[c->session]) { /* the session ended while it was in the ring */
        atomic_fetch_sub_explicit(&t->n_requests, 1, memory_order_release);
    } else if (qv_map_get_u64(t->by_number[c->session], c->number) != NULL) {
        qv_warn("request %" PRIu64 " came twice, the second is ignored", c->number);
        atomic_fetch_sub_explicit(&t->n_requests, 1, memory_order_release);
    } else if (c->name != NULL && !has_version(t, c->name, c->digest)) {
        refuse(t, c, QV_CODE_WORKER_LOST,
               "the version of the adapter that began this answer is not here");
    } else if (!remember(t, c)) {
        refuse(t, c, QV_CODE_INTERNAL, "out of memory");
    } else {
        qv_engine_submit(t->engine, c->request); /* an error comes out as a delta */
        c->request = NULL;
    }
}

static void load_adapter(qv_engine_thread *t, const qv_command *c)
{
    if (c->name == NULL || c->path == NULL) {
        qv_err("out of memory: an adapter is not loaded");
        return;
    }
    qv_status status = c->trusted ? QV_OK
                                  : qv_confine(c->path, t->options.adapter_roots.items,
                                               t->options.adapter_roots.n);
    if (status == QV_OK)
        status = qv_engine_load_adapter(t->engine, c->name, c->path, c->pin);
    if (status == QV_OK)
        return;
    qv_code code = status == QV_ERR_NOMEM       ? QV_CODE_INTERNAL
                   : status == QV_ERR_NOT_FOUND ? QV_CODE_ADAPTER_NOT_FOUND
                                                : QV_CODE_ADAPTER_INVALID;
    report_adapter(t, &(qv_adapter_event){.name = c->name,
                                          .path = c->path,
                                          .reason = qv_error(),
                                          .phase = QV_ADAPTER_FAILED,
                                          .code = code});
}

/* What the broker believes may be out of date: then it is told how things are instead. */
static void unload_adapter(qv_engine_thread *t, const qv_command *c)
{
    if (c->name == NULL) {
        qv_err("out of memory: an adapter is not unloaded");
        return;
    }
    qv_adapter_event adapter;
    if (!qv_engine_find_adapter(t->engine, c->name, &adapter))
        report_adapter(t, &(qv_adapter_event){.name = c->name, .phase = QV_ADAPTER_UNLOADED});
    else if (!has_version(t, c->name, c->digest))
        report_adapter(t, &adapter);
    else
        qv_engine_unload_adapter(t->engine, c->name);
}

static void obey(qv_engine_thread *t, qv_command *c)
{
    switch (c->type) {
    case QV_COMMAND_SESSION:
        begin_session(t, c->session, c->epoch);
        break;
    case QV_COMMAND_RUN:
        run(t, c);
        break;
    case QV_COMMAND_ABORT: {
        const running *r = qv_map_get_u64(t->by_number[c->session], c->number);
        if (r != NULL && c->epoch == t->epochs[c->session])
            qv_engine_abort(t->engine, r->own_number, c->reason);
        break;
    }
    case QV_COMMAND_LOAD:
        load_adapter(t, c);
        break;
    case QV_COMMAND_UNLOAD:
        unload_adapter(t, c);
        break;
    }
    qv_command_deinit(c);
}

/* --- the loop -------------------------------------------------------------------------------- */

static void publish_view(qv_engine_thread *t)
{
    qv_engine_stats stats;
    qv_engine_get_stats(t->engine, &stats);
    atomic_store_explicit(&t->view.steps, stats.steps, memory_order_relaxed);
    atomic_store_explicit(&t->view.generated, stats.tokens_generated, memory_order_relaxed);
    atomic_store_explicit(&t->view.running, stats.running, memory_order_relaxed);
    atomic_store_explicit(&t->view.waiting, stats.waiting, memory_order_relaxed);
    atomic_store_explicit(&t->view.free_pages, stats.free_pages, memory_order_relaxed);
    atomic_store_explicit(&t->view.free_slots, stats.free_adapter_slots, memory_order_relaxed);
}

static void sleep_until_woken(qv_engine_thread *t)
{
    struct pollfd fds[] = {{.fd = qv_ring_fd(t->commands), .events = POLLIN},
                           {.fd = qv_engine_fd(t->engine), .events = POLLIN}};
    set_activity(t, QV_ACTIVITY_IDLE);
    poll(fds, 2, -1);
    set_activity(t, QV_ACTIVITY_WORKING);
}

/* Commands, a step, its results; again. */
static qv_status serve(qv_engine_thread *t)
{
    while (!is_stopping(t)) {
        qv_command command;
        qv_step_result result;
        set_activity(t, QV_ACTIVITY_WORKING);
        while (!is_stopping(t) && qv_ring_pop(t->commands, &command))
            obey(t, &command);
        if (is_stopping(t))
            break;
        if (!qv_engine_has_work(t->engine)) {
            publish_view(t);
            sleep_until_woken(t);
            continue;
        }
        QV_TRY(qv_engine_step(t->engine, &result));
        publish_view(t);
        send_result(t, &result);
    }
    return QV_OK;
}

static void *engine_main(void *arg)
{
    qv_engine_thread *t = arg;
    qv_status status = qv_engine_open(&t->options.engine, t->options.metrics, &t->engine);
    if (status == QV_OK) {
        publish_view(t);
        report(t, (qv_report){.type = QV_REPORT_OPENED});
        status = serve(t);
    }
    if (status != QV_OK)
        report_failure(t, status);
    set_activity(t, QV_ACTIVITY_ENDED);
    return NULL;
}

/* --- life ------------------------------------------------------------------------------------ */

static qv_status register_errors(qv_engine_thread *t)
{
    for (int i = 0; t->options.metrics != NULL && i < QV_CODE_COUNT; i++)
        QV_TRY(qv_metrics_counter(t->options.metrics, "quiver_worker_errors_total",
                                  "Requests that ended in an error, by code.",
                                  QV_LABELS({"code", qv_code_name((qv_code)i)}), &t->errors[i]));
    return QV_OK;
}

static void free_thread(qv_engine_thread *t)
{
    qv_command command;
    qv_report r;
    while (t->commands != NULL && qv_ring_pop(t->commands, &command))
        qv_command_deinit(&command);
    while (t->reports != NULL && qv_ring_pop(t->reports, &r))
        qv_report_deinit(&r);
    qv_engine_close(t->engine);
    for (int i = 0; i < QV_MAX_SESSIONS; i++)
        qv_map_free(t->by_number[i], NULL);
    qv_map_free(t->by_own_number, free);
    qv_ring_free(t->commands);
    qv_ring_free(t->reports);
    qv_arena_deinit(&t->arena);
    free(t->deltas);
    if (t->room_fd >= 0)
        close(t->room_fd);
    free(t);
}

static qv_status init_thread(qv_engine_thread *t)
{
    QV_TRY(qv_ring_new(COMMANDS, sizeof(qv_command), &t->commands));
    QV_TRY(qv_ring_new(REPORTS, sizeof(qv_report), &t->reports));
    t->by_own_number = qv_map_new(256);
    bool has_maps = t->by_own_number != NULL;
    for (int i = 0; i < QV_MAX_SESSIONS; i++)
        has_maps = (t->by_number[i] = qv_map_new(0)) != NULL && has_maps;
    if (!has_maps)
        return qv_fail(QV_ERR_NOMEM, "no memory for the engine thread");
    t->room_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (t->room_fd < 0)
        return qv_fail(QV_ERR_IO, "engine thread: eventfd: %s", strerror(errno));
    return register_errors(t);
}

/* Signals are for the thread that asked for them: none in the engine and what it starts. */
static int spawn(qv_engine_thread *t)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&t->thread, NULL, engine_main, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0)
        pthread_setname_np(t->thread, "engine");
    return rc;
}

qv_status qv_engine_thread_start(const qv_engine_thread_options *options, qv_engine_thread **out)
{
    qv_engine_thread *t = calloc(1, sizeof *t);
    if (t == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the engine thread");
    t->options = *options;
    t->room_fd = -1;
    /* A message that is too large is encoded before it is known to be. */
    qv_arena_init(&t->arena, 1 << 20, 4 * options->max_message_bytes);
    qv_status status = init_thread(t);
    int rc = status == QV_OK ? spawn(t) : 0;
    if (rc != 0)
        status = qv_fail(QV_ERR_IO, "engine thread: %s", strerror(rc));
    if (status != QV_OK) {
        free_thread(t);
        return status;
    }
    *out = t;
    return QV_OK;
}

const qv_engine *qv_engine_thread_engine(const qv_engine_thread *thread)
{
    return thread->opened;
}

const qv_engine_view *qv_engine_thread_view(const qv_engine_thread *thread)
{
    return &thread->view;
}

bool qv_engine_thread_has_room(const qv_engine_thread *thread)
{
    return qv_ring_count(thread->commands) + RESERVED < qv_ring_capacity(thread->commands);
}

bool qv_engine_thread_push(qv_engine_thread *thread, const qv_command *command)
{
    bool is_run = command->type == QV_COMMAND_RUN;
    if (is_run && !qv_engine_thread_has_room(thread))
        return false;
    if (is_run) /* before the engine can count it down */
        atomic_fetch_add_explicit(&thread->n_requests, 1, memory_order_relaxed);
    if (qv_ring_push(thread->commands, command))
        return true;
    if (is_run)
        atomic_fetch_sub_explicit(&thread->n_requests, 1, memory_order_relaxed);
    return false;
}

bool qv_engine_thread_pop(qv_engine_thread *thread, qv_report *out)
{
    if (!qv_ring_pop(thread->reports, out))
        return false;
    if (atomic_exchange(&thread->starved, false))
        eventfd_write(thread->room_fd, 1);
    if (out->type == QV_REPORT_OPENED)
        thread->opened = thread->engine; /* written before the report was pushed */
    return true;
}

int qv_engine_thread_fd(const qv_engine_thread *thread)
{
    return qv_ring_fd(thread->reports);
}

size_t qv_engine_thread_n_requests(const qv_engine_thread *thread)
{
    return atomic_load_explicit(&thread->n_requests, memory_order_acquire);
}

void qv_engine_thread_stop(qv_engine_thread *thread)
{
    atomic_store_explicit(&thread->stopping, true, memory_order_release);
    qv_ring_wake(thread->commands);
    eventfd_write(thread->room_fd, 1);
}

bool qv_engine_thread_join(qv_engine_thread *thread, int64_t timeout_ms)
{
    if (thread == NULL)
        return true;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    if (pthread_timedjoin_np(thread->thread, NULL, &until) != 0)
        return false;
    free_thread(thread);
    return true;
}
