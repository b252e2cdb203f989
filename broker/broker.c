/* The loop: drain a socket in batches, hand each message to the core, send what the core says at
 * the end of the batch; tick. */
#include "broker/broker.h"

#include "broker/access.h"
#include "broker/broker_metrics.h"
#include "broker/functions.h"
#include "broker/outgoing.h"
#include "broker/peers.h"
#include "broker/store.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/registry.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define BATCH          256  /* messages of a socket before the other has its turn */
#define ROUNDS         8    /* such turns before timers and Redis have theirs */
#define TICK_MS        10   /* how fine deadlines are */
#define REPORT_MS      1000 /* metrics, the lease of quiver:broker */
#define LINGER_MS      1000 /* last messages to clients and workers */
#define LEASE_MS       1500 /* of quiver:broker: others take over after that */
#define LEAVE_MS       500  /* for Redis to take our leases back */
#define MAX_PLACE_ROWS 256
#define MAX_PEERS      64 /* other brokers that count */

struct qv_broker {
    qv_broker_options options;
    qv_core *core;
    zloop_t *loop;
    qv_mq *frontend, *backend;
    qv_registry *registry; /* NULL without Redis */
    qv_store *store;       /* the same */
    qv_access *access;     /* NULL: nobody is asked who he is */
    qv_outgoing outgoing;  /* of the batch at hand */
    qv_arena arena;        /* of a message that is sent outside of batches */
    bool in_batch;
    bool looks_for_peers; /* the answer is under way */
    qv_broker_metrics metrics;
    qv_status status; /* how the loop ended */
    uint64_t reported_ms;
    uint64_t drain_until_ms; /* 0 = not draining */
    bool leaving;            /* everything has ended; only Redis is waited for */
    int stop_fd;             /* eventfd; counts the calls of qv_broker_stop */
    uint64_t n_stops;

    /* For /readyz on another thread; relaxed: each stands for itself. */
    _Atomic uint32_t n_ready;
    _Atomic bool draining;
};

/* --- What the core asks for -------------------------------------------------------------------*/

/* In a batch OK means that it will be sent; see flush. Elsewhere it is sent at once, above all what
 * slow clients are offered again and again. */
static qv_status send_message(qv_broker *broker, qv_mq *mq, const qv_mq_peer *peer,
                              const qv_message *message)
{
    if (broker->in_batch)
        return qv_outgoing_add(&broker->outgoing, mq, peer, message);
    const void *data;
    size_t size;
    qv_arena_reset(&broker->arena);
    QV_TRY(qv_message_encode(message, &broker->arena, &data, &size));
    return qv_mq_send(mq, peer, data, size);
}

static qv_status send_client(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    qv_broker *broker = user;
    return send_message(broker, broker->frontend, peer, message);
}

static qv_status send_worker(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    qv_broker *broker = user;
    return send_message(broker, broker->backend, peer, message);
}

static const char *tier_of(const qv_resident *resident)
{
    if (resident->state == QV_RESIDENT_LOADING)
        return "loading";
    const char *backend = resident->member->backend;
    return backend != NULL && strcmp(backend, "cpu") == 0 ? "cpu" : "gpu";
}

static void publish(void *user, const qv_group *group)
{
    qv_broker *broker = user;
    if (broker->registry == NULL)
        return;
    qv_place_row rows[MAX_PLACE_ROWS];
    char split[1024];
    size_t n = 0;
    qv_group_show_split(group, split, sizeof split);
    qv_adapter_record record = {.state = qv_group_state(group),
                                .path = group->path,
                                .reason = qv_group_reason(group),
                                .rank = -1,
                                .bytes = -1,
                                .replicas = group->n_ready,
                                .replicas_wanted = group->wanted ? group->replicas : -1,
                                .replicas_goal = group->goal,
                                .split = split[0] != '\0' ? split : NULL};
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    {
        bool is_ready = resident->state == QV_RESIDENT_READY;
        if (is_ready && record.digest == NULL) {
            record.digest = resident->digest;
            record.rank = resident->rank;
            record.bytes = resident->bytes;
            record.path = record.path != NULL ? record.path : resident->path;
        }
        if ((is_ready || resident->state == QV_RESIDENT_LOADING) && n < MAX_PLACE_ROWS)
            rows[n++] = (qv_place_row){resident->member->id, tier_of(resident)};
    }
    qv_registry_put_adapter(broker->registry, group->name, &record);
    qv_registry_put_place(broker->registry, group->name, rows, n);
}

static void retract(void *user, const char *adapter)
{
    qv_broker *broker = user;
    if (broker->registry == NULL)
        return;
    qv_registry_put_adapter(broker->registry, adapter, NULL);
    qv_registry_put_place(broker->registry, adapter, NULL, 0);
}

/* Events that a person may have to act on. */
static bool is_warning(const char *what)
{
    static const char *const warnings[] = {
        "worker_lost",         "worker_refused", "worker_suspect",    "worker_malformed",
        "adapter_load_failed", "want_ignored",   "attempt_abandoned", "report_ignored"};
    for (size_t i = 0; i < sizeof warnings / sizeof warnings[0]; i++)
        if (strcmp(what, warnings[i]) == 0)
            return true;
    return false;
}

static void event(void *user, const char *what, const char *adapter, const char *worker,
                  const char *why)
{
    qv_broker *broker = user;
    QV_LOG_EVERY(10, 200, is_warning(what) ? QV_LOG_WARN : QV_LOG_INFO, NULL, "%s%s%s%s%s%s%s",
                 what, adapter != NULL ? " adapter=" : "", adapter != NULL ? adapter : "",
                 worker != NULL ? " worker=" : "", worker != NULL ? worker : "",
                 why != NULL ? ": " : "", why != NULL ? why : "");
    if (broker->registry != NULL)
        qv_registry_event(broker->registry, what, adapter, worker, "%s", why != NULL ? why : "");
}

static qv_status store(void *user, const qv_durable *durable)
{
    qv_broker *broker = user;
    return broker->store != NULL ? qv_store_put(broker->store, durable)
                                 : qv_fail(QV_ERR_UNSUPPORTED,
                                           "durable: this broker has no Redis to keep requests in");
}

static void finish(void *user, const qv_durable *durable, const void *answer, size_t size)
{
    qv_broker *broker = user;
    if (broker->store != NULL)
        qv_store_finish(broker->store, durable, answer, size);
}

static bool look_up(void *user, const qv_mq_peer *peer, const qv_msg_resume_request *request)
{
    qv_broker *broker = user;
    return broker->store != NULL && qv_store_look_up(broker->store, peer, request);
}

static void quarantine(void *user, const qv_poison *poison)
{
    qv_broker *broker = user;
    if (broker->store != NULL)
        qv_store_quarantine(broker->store, poison);
}

static void observe(void *user, qv_core_duration duration, uint64_t us)
{
    qv_broker *broker = user;
    qv_histogram_observe(broker->metrics.durations[duration], (double)us * 1e-6);
}

/* --- Sockets ----------------------------------------------------------------------------------*/

static int end_loop(qv_broker *broker, qv_status status)
{
    if (broker->status == QV_OK)
        broker->status = status;
    return -1;
}

typedef struct {
    qv_mq *mq;
    void (*take)(qv_core *core, const qv_mq_peer *peer, const void *data, size_t size,
                 uint64_t now_us);
    void (*garbage)(qv_core *core, const qv_mq_peer *peer, uint64_t now_us);
    qv_histogram *handle; /* how long one took */
} source;

static void on_failed_send(void *user, const qv_mq_peer *peer, const qv_outgoing_message *message)
{
    qv_broker *broker = user;
    uint64_t now_us = qv_now_us();
    if (message->mq == broker->backend)
        qv_core_worker_gone(broker->core, peer, now_us);
    else if (message->status == QV_ERR_BUSY)
        qv_core_client_busy(broker->core, peer, message->data, message->size, now_us);
    else
        qv_core_client_gone(broker->core, peer, now_us);
}

static void flush(qv_broker *broker)
{
    qv_outgoing_flush(&broker->outgoing, on_failed_send, broker);
}

/* Whether a message is taken at all; the core is told whose it is. */
static bool may_speak(qv_broker *broker, const source *from, const qv_mq_message *message)
{
    if (broker->access == NULL)
        return true;
    if (from->mq == broker->backend)
        return qv_access_is_worker(broker->access, message->user);
    qv_core_set_sender(broker->core, qv_access_identity(broker->access, message->user));
    return true;
}

/* Take up to a batch of messages; *n counts them. What one took is measured to the start of the
 * next. */
static qv_status take_batch(qv_broker *broker, const source *from, size_t *n)
{
    uint64_t now_us = qv_now_us();
    for (int i = 0; i < BATCH; i++) {
        qv_mq_message message;
        qv_status status = qv_mq_recv(from->mq, &message);
        if (status == QV_ERR_BUSY)
            return QV_OK;
        if (status == QV_OK) {
            if (may_speak(broker, from, &message))
                from->take(broker->core, &message.peer, message.data, message.size, now_us);
            qv_mq_message_release(&message);
        } else if (status == QV_ERR_FORMAT) {
            from->garbage(broker->core, &message.peer, now_us);
        } else {
            return status;
        }
        if (qv_outgoing_is_full(&broker->outgoing))
            flush(broker);
        uint64_t then_us = qv_now_us();
        qv_histogram_observe(from->handle, (double)(then_us - now_us) * 1e-6);
        now_us = then_us;
        ++*n;
    }
    return QV_OK;
}

/* One of the sockets is readable. While there is work on either, the next round follows without
 * asking the loop, which costs several system calls; the rounds are few, so that timers are on
 * time. */
static int on_readable(zloop_t *loop, zsock_t *socket, void *user)
{
    (void)loop, (void)socket;
    qv_broker *broker = user;
    const source clients = {broker->frontend, qv_core_from_client, qv_core_client_garbage,
                            broker->metrics.handle_client};
    const source workers = {broker->backend, qv_core_from_worker, qv_core_worker_garbage,
                            broker->metrics.handle_worker};
    qv_status status = QV_OK;
    size_t n = 1;
    broker->in_batch = true;
    for (int round = 0; round < ROUNDS && n > 0 && status == QV_OK; round++) {
        n = 0;
        status = take_batch(broker, &clients, &n);
        flush(broker);
        if (status == QV_OK)
            status = take_batch(broker, &workers, &n);
        flush(broker);
    }
    broker->in_batch = false;
    return status == QV_OK ? 0 : end_loop(broker, status);
}

/* --- Registry ---------------------------------------------------------------------------------*/

static void on_redis_up(void *user)
{
    qv_broker *broker = user;
    qv_core_set_redis(broker->core, "up");
    qv_info("redis is up");
}

static void on_redis_down(const char *reason, void *user)
{
    qv_broker *broker = user;
    char text[64];
    snprintf(text, sizeof text, "down: %s", reason);
    qv_core_set_redis(broker->core, text);
    qv_warn("redis is down: %s; requests go on, changes of placement wait", reason);
}

static void on_want(const char *name, const qv_want *want, void *user)
{
    qv_broker *broker = user;
    qv_core_want(broker->core, name, want, qv_now_us());
}

static void on_invalid_want(const char *name, const char *reason, void *user)
{
    qv_broker *broker = user;
    qv_core_invalid_want(broker->core, name, reason, qv_now_us());
}

static void on_tenant(const char *name, const qv_tenant_want *want, void *user)
{
    qv_broker *broker = user;
    qv_core_tenant(broker->core, name, want, qv_now_us());
}

static void on_drain(const char *id, bool drain, void *user)
{
    qv_broker *broker = user;
    qv_core_order_drain(broker->core, id, drain, qv_now_us());
}

static void on_synced(void *user)
{
    qv_broker *broker = user;
    qv_core_wants_known(broker->core);
}

static qv_status open_registry(qv_broker *broker)
{
    if (broker->options.redis == NULL) {
        qv_core_wants_known(broker->core);
        return QV_OK;
    }
    qv_core_set_redis(broker->core, "connecting");
    qv_registry_options options = {.url = broker->options.redis,
                                   .who = broker->options.core.id,
                                   .lease_ms = LEASE_MS,
                                   .watch = true,
                                   .up = on_redis_up,
                                   .down = on_redis_down,
                                   .want_changed = on_want,
                                   .want_invalid = on_invalid_want,
                                   .tenant_changed = on_tenant,
                                   .drain_changed = on_drain,
                                   .functions = qv_redis_functions,
                                   .synced = on_synced,
                                   .user = broker};
    QV_TRY(qv_registry_new(broker->loop, &options, &broker->registry));
    const qv_store_options store_options = {.url = broker->options.redis,
                                            .broker = broker->options.core.id,
                                            .frontend = qv_broker_frontend(broker),
                                            .lease_ms = LEASE_MS,
                                            .keep_ms = broker->options.durable_keep_ms,
                                            .core = broker->core};
    return qv_store_new(broker->loop, &store_options, &broker->store);
}

/* --- Time -------------------------------------------------------------------------------------*/

static void on_peers(qv_status status, const qv_broker_address *brokers, size_t n, void *user)
{
    qv_broker *broker = user;
    qv_peer_broker rows[MAX_PEERS];
    size_t n_rows = n < MAX_PEERS ? n : MAX_PEERS;
    broker->looks_for_peers = false;
    if (status != QV_OK) /* who leads stays as it was while Redis is away */
        return;
    for (size_t i = 0; i < n_rows; i++)
        rows[i] = (qv_peer_broker){brokers[i].id, brokers[i].demand, brokers[i].workers};
    qv_peers_update(broker->core, rows, n_rows);
}

static void report(qv_broker *broker)
{
    char demand[QV_PEERS_MAX_TEXT];
    const qv_pool *pool = qv_core_pool(broker->core);
    const qv_requests *requests = qv_core_requests(broker->core);
    uint32_t n_ready = pool->n_members[QV_MEMBER_READY];
    atomic_store_explicit(&broker->n_ready, n_ready, memory_order_relaxed);
    bool redis_up = broker->registry != NULL && qv_registry_is_up(broker->registry);
    if (broker->access != NULL)
        qv_access_check(broker->access);
    qv_broker_metrics_update(&broker->metrics, broker->core, redis_up);
    if (broker->access != NULL)
        qv_broker_metrics_access(&broker->metrics, qv_access_get_stats(broker->access));
    if (broker->registry == NULL || broker->leaving)
        return;
    qv_registry_put_broker(
        broker->registry,
        &(qv_broker_record){.frontend = qv_broker_frontend(broker),
                            .backend = qv_broker_backend(broker),
                            .version = broker->options.core.version,
                            .workers = n_ready,
                            .in_flight = requests->n_running,
                            .queued = requests->n_queued,
                            .demand = qv_peers_show(broker->core, demand, sizeof demand)});
    if (!broker->looks_for_peers && qv_registry_is_up(broker->registry)) {
        broker->looks_for_peers = true;
        qv_registry_find_brokers(broker->registry, on_peers, broker);
    }
}

static void on_left(void *user)
{
    qv_broker *broker = user;
    broker->drain_until_ms = qv_now_ms(); /* nothing to wait for any more */
}

/* Everything has ended, or has to: say so to whom it concerns, and leave. */
static void leave(qv_broker *broker)
{
    qv_core_fail_all(broker->core, qv_now_us());
    event(broker, "broker_stopped", NULL, NULL, NULL);
    broker->leaving = true;
    broker->drain_until_ms = qv_now_ms() + LEAVE_MS;
    if (broker->registry != NULL)
        qv_registry_leave(broker->registry, on_left, broker);
    else
        on_left(broker);
}

static int on_tick(zloop_t *loop, int timer, void *user)
{
    (void)loop, (void)timer;
    qv_broker *broker = user;
    uint64_t now_us = qv_now_us(), now_ms = now_us / 1000;
    qv_core_tick(broker->core, now_us);
    if (now_ms - broker->reported_ms >= REPORT_MS) {
        broker->reported_ms = now_ms;
        report(broker);
    }
    atomic_store_explicit(&broker->n_ready, qv_core_pool(broker->core)->n_members[QV_MEMBER_READY],
                          memory_order_relaxed);
    if (broker->drain_until_ms == 0)
        return 0;
    bool is_over = now_ms >= broker->drain_until_ms;
    if (!broker->leaving && (is_over || qv_core_n_jobs(broker->core) == 0))
        leave(broker);
    else if (broker->leaving && is_over)
        return end_loop(broker, QV_OK);
    return 0;
}

/* --- Stopping ---------------------------------------------------------------------------------*/

void qv_broker_stop(qv_broker *broker)
{
    int saved = errno;
    uint64_t one = 1;
    ssize_t n = write(broker->stop_fd, &one, sizeof one);
    (void)n; /* it can only be full of stops */
    errno = saved;
}

static int on_stop(zloop_t *loop, zmq_pollitem_t *item, void *user)
{
    (void)loop, (void)item;
    qv_broker *broker = user;
    uint64_t n = 0;
    if (read(broker->stop_fd, &n, sizeof n) != sizeof n)
        return 0;
    broker->n_stops += n;
    if (broker->n_stops > 1) {
        qv_warn("stopped at once with %lld requests in flight",
                (long long)qv_core_n_jobs(broker->core));
        return end_loop(broker, QV_OK);
    }
    qv_info("stopping: %lld requests in flight have %lld ms to finish",
            (long long)qv_core_n_jobs(broker->core), (long long)broker->options.drain_timeout_ms);
    atomic_store_explicit(&broker->draining, true, memory_order_relaxed);
    qv_core_drain(broker->core);
    broker->drain_until_ms = qv_now_ms() + (uint64_t)broker->options.drain_timeout_ms;
    return 0;
}

bool qv_broker_is_ready(void *user, char *reason, size_t size)
{
    const qv_broker *broker = user;
    if (atomic_load_explicit(&broker->draining, memory_order_relaxed)) {
        snprintf(reason, size, "the broker is stopping");
        return false;
    }
    if (atomic_load_explicit(&broker->n_ready, memory_order_relaxed) == 0) {
        snprintf(reason, size, "no worker is ready");
        return false;
    }
    return true;
}

/* --- Life -------------------------------------------------------------------------------------*/

/* `queue` 0: the default, for workers, whose credit keeps queues short. */
static qv_status open_socket(const qv_broker *broker, const char *endpoint, const char *domain,
                             int64_t queue, qv_mq **out)
{
    qv_mq_options options = qv_mq_default_options(QV_MQ_ROUTER, endpoint);
    if (queue > 0)
        options.high_water_mark = (int)queue;
    options.max_message_bytes = (size_t)broker->options.max_message_bytes;
    options.linger_ms = LINGER_MS;
    qv_curve curve = {.domain = domain};
    if (broker->options.key != NULL) {
        curve.own = *broker->options.key;
        options.curve = &curve;
    }
    qv_status status = qv_mq_open(&options, out);
    explicit_bzero(&curve, sizeof curve);
    return status;
}

static qv_status open_loop(qv_broker *broker)
{
    zsys_handler_set(NULL); /* signals belong to the program */
    broker->loop = zloop_new();
    broker->stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (broker->loop == NULL || broker->stop_fd < 0)
        return qv_fail(QV_ERR_IO, "cannot make the event loop: %s", strerror(errno));
    zloop_set_nonstop(broker->loop, true);
    return QV_OK;
}

static qv_status attach(qv_broker *broker)
{
    zmq_pollitem_t stop = {.fd = broker->stop_fd, .events = ZMQ_POLLIN};
    if (zloop_reader(broker->loop, qv_mq_socket(broker->frontend), on_readable, broker) != 0 ||
        zloop_reader(broker->loop, qv_mq_socket(broker->backend), on_readable, broker) != 0 ||
        zloop_poller(broker->loop, &stop, on_stop, broker) != 0 ||
        zloop_timer(broker->loop, TICK_MS, 0, on_tick, broker) < 0)
        return qv_fail(QV_ERR_NOMEM, "no memory for the event loop");
    return QV_OK;
}

qv_status qv_broker_open(const qv_broker_options *options, qv_broker **out)
{
    qv_broker *broker = calloc(1, sizeof *broker);
    if (broker == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the broker");
    broker->options = *options;
    broker->stop_fd = -1;
    qv_arena_init(&broker->arena, 0, 0);
    const qv_core_actions actions = {.user = broker,
                                     .send_client = send_client,
                                     .send_worker = send_worker,
                                     .publish = publish,
                                     .retract = retract,
                                     .event = event,
                                     .store = store,
                                     .finish = finish,
                                     .look_up = look_up,
                                     .quarantine = quarantine,
                                     .observe = observe};
    qv_status status = qv_broker_metrics_init(&broker->metrics, options->metrics);
    if (status == QV_OK)
        status = qv_core_new(&options->core, &actions, qv_now_us(), &broker->core);
    if (status == QV_OK)
        status = open_loop(broker);
    if (status == QV_OK && options->key != NULL)
        status = qv_access_open(broker->loop, options->access, &broker->access);
    if (status == QV_OK)
        status = open_socket(broker, options->frontend, QV_ACCESS_CLIENTS, options->client_queue,
                             &broker->frontend);
    if (status == QV_OK)
        status = open_socket(broker, options->backend, QV_ACCESS_WORKERS, 0, &broker->backend);
    if (status == QV_OK)
        status = attach(broker);
    if (status == QV_OK)
        status = open_registry(broker);
    if (status != QV_OK) {
        qv_broker_close(broker);
        return status;
    }
    event(broker, "broker_started", NULL, NULL, options->core.version);
    report(broker);
    *out = broker;
    return QV_OK;
}

qv_status qv_broker_run(qv_broker *broker)
{
    zloop_start(broker->loop);
    return broker->status;
}

void qv_broker_close(qv_broker *broker)
{
    if (broker == NULL)
        return;
    qv_store_free(broker->store);
    broker->store = NULL;
    qv_registry_free(broker->registry);
    qv_access_close(broker->access);
    broker->access = NULL;
    zloop_destroy(&broker->loop);
    broker->registry = NULL;
    qv_core_free(broker->core);
    qv_mq_close(broker->frontend);
    qv_mq_close(broker->backend);
    qv_broker_metrics_deinit(&broker->metrics);
    qv_outgoing_deinit(&broker->outgoing);
    qv_arena_deinit(&broker->arena);
    if (broker->stop_fd >= 0)
        close(broker->stop_fd);
    free(broker);
}

const char *qv_broker_frontend(const qv_broker *broker)
{
    return qv_mq_endpoint(broker->frontend);
}

const char *qv_broker_backend(const qv_broker *broker)
{
    return qv_mq_endpoint(broker->backend);
}
