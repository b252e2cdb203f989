/* quiver-broker: options, signals, start, exit code. */
#include "broker/broker.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/options.h"
#include "common/redis.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

typedef struct {
    const char *id, *frontend, *backend, *redis, *policy, *metrics_address;
    const char *key, *access;
    bool allow_remote;
    int64_t metrics_port, io_threads;
    int64_t heartbeat_ms, timeout_ms, drain_timeout_ms, max_worker_losses;
    int64_t max_message_bytes, max_queued, max_queued_per_adapter, max_queue_wait_ms;
    int64_t max_client_requests, max_client_bytes, max_bytes, max_answer_bytes;
    int64_t resume_ms, max_kept_bytes, durable_keep_ms, max_spill_messages;
    int64_t client_queue, max_spill_bytes, max_total_spill_bytes, stalled_client_ms,
        cancel_confirm_ms;
    int64_t load_backoff_ms, load_timeout_ms, surplus_ms, adapter_grace_ms, startup_grace_ms;
    int64_t max_explained, rebalance_ms, grow_down_ms, max_moves;
    int log_level;
    bool log_json;
} settings;

#define SOCKETS   "Sockets"
#define WORKERS   "Workers"
#define LIMITS    "Limits (beyond them a request is answered OVERLOADED)"
#define CLIENTS   "Slow clients"
#define PLACEMENT "Placement"
#define LOGGING   "Log and metrics"

static const qv_option table[] = {
    QV_OPTION(settings, id, STRING, "id", "ID", NULL,
              "Name of this broker in events, status and the registry. Default: host and process."),
    QV_OPTION(settings, frontend, STRING, "frontend", "ENDPOINTS", "tcp://127.0.0.1:5555",
              "Where clients connect: tcp:// or ipc://, several parted by commas.",
              .section = SOCKETS),
    QV_OPTION(settings, backend, STRING, "backend", "ENDPOINTS", "tcp://127.0.0.1:5556",
              "Where workers connect.", .section = SOCKETS),
    QV_OPTION(settings, allow_remote, FLAG, "allow-remote", NULL, NULL,
              "Bind addresses that other machines can reach although there is no --key: whoever "
              "reaches them can submit requests and pose as a worker.",
              .section = SOCKETS),
    QV_OPTION(
        settings, key, STRING, "key", "FILE", NULL,
        "This broker's key pair (`quiver keys new`): both sockets then encrypt, and take only "
        "peers whose key is in --access. Brokers of one pool share a pair.",
        .section = SOCKETS),
    QV_OPTION(
        settings, access, STRING, "access", "FILE", NULL,
        "Who may connect: a public key a line, with tenant=NAME and rights=submit,operate,worker "
        "behind it. Read again when it changes.",
        .section = SOCKETS),
    QV_OPTION(settings, max_message_bytes, SIZE, "max-message", "SIZE", "8M",
              "Largest message from a client; a larger one is answered TOO_LARGE, and one of four "
              "times that size cuts the connection.",
              .section = SOCKETS, .min = 1024, .max = 1 << 30),
    QV_OPTION(settings, io_threads, INT, "io-threads", "N", "1",
              "Threads that move bytes between sockets and the network.", .section = SOCKETS,
              .min = 1, .max = 64),
    QV_OPTION(settings, redis, STRING, "redis", "URLS", "redis://127.0.0.1:6379",
              "Registry of wanted adapters: redis://[[user]:password@]host[:port][/db], "
              "unix:///path, or none. Several parted by commas are a server and its replicas: the "
              "one that takes writes is used. Without it only the adapters that workers bring are "
              "served.",
              .secret = true, .section = PLACEMENT),
    QV_OPTION(settings, policy, STRING, "policy", "NAME", "score",
              "Which worker gets a request: score (the one whose first token comes soonest, by its "
              "queue, the part of the prompt that it has not cached, and a load if the adapter is "
              "not there), affinity (one that holds the adapter, the least loaded of those with "
              "room) or least-loaded (the one with the most room, loading the adapter there "
              "first).",
              .section = PLACEMENT),
    QV_OPTION(settings, load_backoff_ms, DURATION, "load-backoff", "TIME", "10s",
              "After a failed load the same worker is not asked again for this time, doubled with "
              "each failure.",
              .section = PLACEMENT, .min = 1),
    QV_OPTION(settings, load_timeout_ms, DURATION, "load-timeout", "TIME", "2m",
              "A load that a worker has not answered by then has failed.", .section = PLACEMENT,
              .min = 1),
    QV_OPTION(settings, surplus_ms, DURATION, "surplus-after", "TIME", "5s",
              "More replicas than wanted are unloaded after this time.", .section = PLACEMENT),
    QV_OPTION(settings, rebalance_ms, DURATION, "rebalance-after", "TIME", "2s",
              "When no worker has come or gone for this time, adapters move to workers that suit "
              "them better and are emptier.",
              .section = PLACEMENT),
    QV_OPTION(settings, grow_down_ms, DURATION, "shrink-after", "TIME", "30s",
              "An adapter loses a replica that demand asked for when demand has asked for fewer "
              "for this time.",
              .section = PLACEMENT),
    QV_OPTION(settings, max_moves, INT, "max-moves", "N", "4",
              "Loads at once for demand and balance, beyond those that make up wanted replicas; 0 "
              "= adapters are only where they are wanted.",
              .section = PLACEMENT, .min = 0, .max = 65536),
    QV_OPTION(settings, adapter_grace_ms, DURATION, "adapter-grace", "TIME", "30s",
              "An adapter that only lost workers brought is remembered for this time, and requests "
              "for it wait.",
              .section = PLACEMENT),
    QV_OPTION(settings, startup_grace_ms, DURATION, "startup-grace", "TIME", "3s",
              "After the start an unknown adapter is answered OVERLOADED with a hint to retry, as "
              "long as no worker is there, instead of ADAPTER_NOT_FOUND.",
              .section = PLACEMENT),
    QV_OPTION(settings, heartbeat_ms, DURATION, "heartbeat", "TIME", "1s",
              "How often workers and broker speak to each other at least.", .section = WORKERS,
              .min = 10, .max = 600000),
    QV_OPTION(settings, timeout_ms, DURATION, "worker-timeout", "TIME", "5s",
              "A worker that is silent for this time is lost: its requests go on elsewhere. For "
              "half of it, it gets no new ones.",
              .section = WORKERS, .min = 20, .max = 6000000),
    QV_OPTION(
        settings, max_worker_losses, INT, "max-worker-losses", "N", "2",
        "A request under which so many workers were lost is quarantined: it fails, and so does "
        "whatever asks for the same, until it is deleted from quiver:quarantine.",
        .section = WORKERS, .min = 1, .max = 1000),
    QV_OPTION(settings, cancel_confirm_ms, DURATION, "cancel-confirm", "TIME", "2s",
              "A cancel or deadline that the worker does not confirm by then is confirmed by the "
              "broker.",
              .section = WORKERS, .min = 1),
    QV_OPTION(settings, drain_timeout_ms, DURATION, "drain-timeout", "TIME", "30s",
              "On SIGTERM or SIGINT requests in flight have this time to finish; a second signal "
              "ends at once.",
              .section = WORKERS),
    QV_OPTION(settings, max_queued, INT, "max-queued", "N", "16384",
              "Requests that wait for a worker.", .section = LIMITS, .min = 1, .max = 1 << 24),
    QV_OPTION(settings, max_queued_per_adapter, INT, "max-queued-per-adapter", "N", "4096",
              "Of them for one adapter; the base model counts as one.", .section = LIMITS, .min = 1,
              .max = 1 << 24),
    QV_OPTION(settings, max_queue_wait_ms, DURATION, "max-queue-wait", "TIME", "5m",
              "A request that waited so long for a worker fails.", .section = LIMITS, .min = 1),
    QV_OPTION(settings, max_client_requests, INT, "max-client-requests", "N", "4096",
              "Requests in flight for one client connection.", .section = LIMITS, .min = 1,
              .max = 1 << 24),
    QV_OPTION(settings, max_client_bytes, SIZE, "max-client-bytes", "SIZE", "512M",
              "Memory held by the requests of one client connection.", .section = LIMITS,
              .min = 4096),
    QV_OPTION(settings, max_bytes, SIZE, "max-bytes", "SIZE", "2G",
              "Memory held by all requests: what was submitted and what was answered so far.",
              .section = LIMITS, .min = 4096),
    QV_OPTION(settings, max_answer_bytes, SIZE, "max-answer", "SIZE", "64M",
              "One answer that is delivered whole (stream false).", .section = LIMITS, .min = 1024),
    QV_OPTION(settings, client_queue, INT, "client-queue", "N", "4096",
              "Messages that the socket holds for one client before it counts as slow.",
              .section = CLIENTS, .min = 1, .max = 1 << 24),
    QV_OPTION(
        settings, max_spill_bytes, SIZE, "max-spill", "SIZE", "8M",
        "Messages kept for one client that does not read. At half of it the client's requests "
        "stop, and go on when it reads.",
        .section = CLIENTS, .min = 4096),
    QV_OPTION(settings, max_spill_messages, INT, "max-spill-messages", "N", "16384",
              "The same in messages.", .section = CLIENTS, .min = 16, .max = 1 << 24),
    QV_OPTION(settings, max_total_spill_bytes, SIZE, "max-total-spill", "SIZE", "512M",
              "The same for all clients together.", .section = CLIENTS, .min = 4096),
    QV_OPTION(settings, stalled_client_ms, DURATION, "client-timeout", "TIME", "1m",
              "A client that reads nothing for this time while messages wait for it is given up.",
              .section = CLIENTS, .min = 1),
    QV_OPTION(
        settings, resume_ms, DURATION, "resume-window", "TIME", "30s",
        "A client that lost its connection can come back for its requests (`resume`) for this "
        "time; so long ended answers are kept too. 0 = not at all.",
        .section = CLIENTS),
    QV_OPTION(settings, max_kept_bytes, SIZE, "max-kept", "SIZE", "256M",
              "Memory for that; beyond it the oldest goes.", .section = CLIENTS, .min = 4096),
    QV_OPTION(settings, durable_keep_ms, DURATION, "durable-keep", "TIME", "1h",
              "The answer of a durable request stays in Redis for this time.", .section = CLIENTS,
              .min = 1000),
    QV_OPTION(settings, metrics_port, INT, "metrics-port", "PORT", "0",
              "Serve /metrics, /healthz and /readyz over HTTP on this port; 0 = not at all.",
              .section = LOGGING, .min = 0, .max = 65535),
    QV_OPTION(settings, metrics_address, STRING, "metrics-address", "ADDRESS", "127.0.0.1",
              "Address of that port.", .section = LOGGING),
    QV_OPTION(settings, max_explained, INT, "explain", "N", "4096",
              "Requests that `quiver explain` remembers, of about 3 KB each.", .section = LOGGING,
              .min = 0, .max = 1 << 20),
    QV_OPTION(settings, log_level, ENUM, "log-level", "LEVEL", "info", "What is logged to stderr.",
              .section = LOGGING, .choices = qv_log_level_names),
    QV_OPTION(settings, log_json, FLAG, "log-json", NULL, NULL, "One JSON object per line.",
              .section = LOGGING),
};

static const qv_program program = {
    .name = "quiver-broker",
    .summary = "Takes inference requests from clients and sends each to a worker that holds its "
               "LoRA adapter; moves adapters to where they are wanted.",
    .epilog = "Examples:\n"
              "  quiver-broker --redis none\n"
              "  quiver-broker --frontend tcp://127.0.0.1:5555,ipc:///run/quiver.sock\n"
              "  redis-cli HSET quiver:want:french path /adapters/french replicas 2\n",
};

/* --- Settings ---------------------------------------------------------------------------------*/

/* Whether other machines can reach an endpoint: tcp on anything but the loopback addresses. */
static bool is_remote(const char *endpoint, size_t size)
{
    static const char *const local[] = {"ipc://",           "inproc://",    "tcp://127.",
                                        "tcp://localhost:", "tcp://[::1]:", "tcp://lo:"};
    for (size_t i = 0; i < sizeof local / sizeof local[0]; i++)
        if (size >= strlen(local[i]) && strncmp(endpoint, local[i], strlen(local[i])) == 0)
            return false;
    return true;
}

/* libzmq takes any number for a port and cuts it to 16 bits. */
static qv_status check_port(const char *option, const char *endpoint, size_t size)
{
    if (size < 6 || strncmp(endpoint, "tcp://", 6) != 0)
        return QV_OK;
    const char *end = endpoint + size, *port = end;
    while (port > endpoint && port[-1] != ':')
        port--;
    char *rest;
    unsigned long number = strtoul(port, &rest, 10);
    bool is_any = end - port == 1 && *port == '*';
    if (is_any || (rest == end && *port >= '0' && *port <= '9' && number <= UINT16_MAX))
        return QV_OK;
    return qv_fail(QV_ERR_ARG, "--%s %.*s: the port is neither a number up to 65535 nor *", option,
                   (int)size, endpoint);
}

static qv_status check_endpoints(const char *option, const char *endpoints, bool allow_remote)
{
    for (const char *next = endpoints; *next != '\0';) {
        size_t size = strcspn(next, ",");
        QV_TRY(check_port(option, next, size));
        if (!allow_remote && size > 0 && is_remote(next, size))
            return qv_fail(QV_ERR_ARG,
                           "--%s %.*s can be reached from other machines, and there is no "
                           "authentication; give --key and --access, or say --allow-remote if that "
                           "is meant",
                           option, (int)size, next);
        next += size + (next[size] == ',');
    }
    return QV_OK;
}

static qv_status check(const settings *set)
{
    if ((set->key != NULL) != (set->access != NULL))
        return qv_fail(QV_ERR_ARG, "--key and --access go together: --%s is missing",
                       set->key == NULL ? "key" : "access");
    bool remote = set->allow_remote || set->key != NULL;
    QV_TRY(check_endpoints("frontend", set->frontend, remote));
    QV_TRY(check_endpoints("backend", set->backend, remote));
    if (strcmp(set->redis, "none") != 0)
        QV_TRY(qv_redis_check_url(set->redis));
    if (set->timeout_ms < 2 * set->heartbeat_ms)
        return qv_fail(QV_ERR_ARG,
                       "--worker-timeout %lld ms is less than two heartbeats of %lld ms",
                       (long long)set->timeout_ms, (long long)set->heartbeat_ms);
    return QV_OK;
}

/* "host-pid", of characters that an id may have. */
static const char *make_id(char *buffer, size_t size)
{
    char host[40] = "";
    gethostname(host, sizeof host - 1);
    for (char *c = host; *c != '\0'; c++)
        if (strchr("._-", *c) == NULL && !((*c | 32) >= 'a' && (*c | 32) <= 'z') &&
            !(*c >= '0' && *c <= '9'))
            *c = '-';
    snprintf(buffer, size, "%s-%ld", host[0] != '\0' ? host : "broker", (long)getpid());
    return buffer;
}

static qv_status fill(const settings *set, const char *id, qv_metrics *metrics, qv_key_pair *key,
                      qv_broker_options *out)
{
    if (set->key != NULL)
        QV_TRY(qv_key_pair_read(set->key, key));
    qv_core_options core = qv_core_default_options();
    QV_TRY(qv_check_id(id, strlen(id)));
    QV_TRY(qv_route_find(set->policy, &core.policy));
    core.id = id;
    if (getrandom(&core.seed, sizeof core.seed, 0) != sizeof core.seed)
        core.seed = qv_wall_ms() ^ (uint64_t)getpid() << 48;
    core.requests = (qv_requests_limits){.max_queued = set->max_queued,
                                         .max_queued_per_adapter = set->max_queued_per_adapter,
                                         .max_bytes = set->max_bytes,
                                         .max_client_requests = set->max_client_requests,
                                         .max_client_bytes = set->max_client_bytes,
                                         .max_answer_bytes = set->max_answer_bytes};
    core.placement = (qv_placement_options){.load_backoff_ms = set->load_backoff_ms,
                                            .load_timeout_ms = set->load_timeout_ms,
                                            .surplus_ms = set->surplus_ms,
                                            .rebalance_ms = set->rebalance_ms,
                                            .grow_down_ms = set->grow_down_ms,
                                            .max_moves = set->max_moves,
                                            .orphan_ms = set->adapter_grace_ms};
    core.client_limits.max_bytes = (size_t)set->max_message_bytes;
    core.heartbeat_ms = set->heartbeat_ms;
    core.timeout_ms = set->timeout_ms;
    core.max_worker_losses = set->max_worker_losses;
    core.max_queue_wait_ms = set->max_queue_wait_ms;
    core.cancel_confirm_ms = set->cancel_confirm_ms;
    core.resume_ms = set->resume_ms;
    core.max_kept_bytes = set->max_kept_bytes;
    core.max_spill_messages = set->max_spill_messages;
    core.max_spill_bytes = set->max_spill_bytes;
    core.max_total_spill_bytes = set->max_total_spill_bytes;
    core.stalled_client_ms = set->stalled_client_ms;
    core.startup_grace_ms = set->startup_grace_ms;
    core.max_explained = set->max_explained;
    size_t worker_bytes = core.worker_limits.max_bytes;
    int64_t cut_off = 4 * set->max_message_bytes;
    *out = (qv_broker_options){
        .core = core,
        .frontend = set->frontend,
        .backend = set->backend,
        .redis = strcmp(set->redis, "none") == 0 ? NULL : set->redis,
        .key = set->key != NULL ? key : NULL,
        .access = set->access,
        .durable_keep_ms = set->durable_keep_ms,
        .drain_timeout_ms = set->drain_timeout_ms,
        .max_message_bytes = cut_off > (int64_t)worker_bytes ? cut_off : (int64_t)worker_bytes,
        .client_queue = set->client_queue,
        .metrics = metrics,
    };
    return QV_OK;
}

/* --- Running ----------------------------------------------------------------------------------*/

static qv_broker *running; /* for the signal handler; set before it is installed */

static void on_signal(int number)
{
    (void)number;
    qv_broker_stop(running);
}

static void catch_signals(qv_broker *broker)
{
    running = broker;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

static qv_status serve(const settings *set, qv_metrics *metrics, const qv_broker_options *options)
{
    qv_broker *broker = NULL;
    qv_metrics_server *server = NULL;
    QV_TRY(qv_broker_open(options, &broker));
    catch_signals(broker);
    qv_status status = QV_OK;
    if (set->metrics_port > 0) {
        qv_metrics_server_options http = {.address = set->metrics_address,
                                          .port = (uint16_t)set->metrics_port,
                                          .ready = qv_broker_is_ready,
                                          .user = broker};
        status = qv_metrics_serve(metrics, &http, &server);
    }
    if (status == QV_OK) {
        char url[256];
        qv_log_event(QV_LOG_INFO, NULL, "broker serves", QV_KV("id", options->core.id),
                     QV_KV("clients", qv_broker_frontend(broker)),
                     QV_KV("workers", qv_broker_backend(broker)),
                     QV_KV("redis", qv_log_mask_url(set->redis, url, sizeof url)),
                     QV_KV("policy", options->core.policy->name));
        status = qv_broker_run(broker);
    }
    qv_metrics_stop(server);
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    qv_broker_close(broker);
    return status;
}

int main(int argc, char **argv)
{
    settings set;
    qv_options *parsed = NULL;
    qv_metrics *metrics = NULL;
    char id[QV_ID_MAX + 1];
    qv_key_pair key = {0};
    qv_broker_options options;
    qv_status status = qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv,
                                        &set, &parsed);
    if (status == QV_OK && qv_options_printed(parsed)) {
        qv_options_free(parsed);
        return 0;
    }
    if (status == QV_OK) {
        qv_log_init(&(qv_log_options){
            .level = (qv_log_level)set.log_level, .program = program.name, .json = set.log_json});
        status = check(&set);
    }
    if (status == QV_OK)
        status = qv_metrics_new(&metrics);
    if (status == QV_OK)
        status =
            fill(&set, set.id != NULL ? set.id : make_id(id, sizeof id), metrics, &key, &options);
    if (status != QV_OK) {
        fprintf(stderr, "quiver-broker: %s\n", qv_error());
        qv_metrics_free(metrics);
        qv_options_free(parsed);
        return 2;
    }
    zsys_set_io_threads((size_t)set.io_threads);
    status = serve(&set, metrics, &options);
    if (status != QV_OK)
        qv_err("%s", qv_error());
    qv_metrics_free(metrics);
    qv_options_free(parsed);
    return status == QV_OK ? 0 : 1;
}
