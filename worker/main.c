/* quiver-worker: options, signals, exit code. */
#include "common/log.h"
#include "common/status.h"
#include "worker/engine_options.h"
#include "worker/worker.h"

#include <czmq.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    EXIT_ENGINE = 1, /* the model does not load, or the engine failed or hung */
    EXIT_USAGE = 2,  /* options that make no sense */
    EXIT_DRAIN = 3   /* the drain ran out of time; what was left went elsewhere */
};

typedef struct {
    qv_worker_options worker;
    int log_level;
    bool log_json;
} settings;

static const qv_option table[] = {
    QV_OPTION(
        settings, worker.brokers, LIST, "broker", "ENDPOINT", NULL,
        "Where workers register: the broker's --backend, such as tcp://host:5556. Repeat it "
        "for several brokers of one pool. Without one, Redis is asked for brokers; without Redis "
        "either, it is " QV_WORKER_DEFAULT_BROKER ".",
        .max = 64, .section = "Pool"),
    QV_OPTION(
        settings, worker.redis, STRING, "redis", "URLS", "none",
        "Redis that gets this worker's lease and knows brokers: "
        "redis://[[user]:password@]host[:port][/db] or unix:///path[?db=n]; several parted by "
        "commas are a server and its replicas. none: no Redis.",
        .secret = true, .section = "Pool"),
    QV_OPTION(settings, worker.key, STRING, "key", "FILE", NULL,
              "This worker's key pair (`quiver keys new`), for brokers that ask for keys.",
              .section = "Pool"),
    QV_OPTION(settings, worker.broker_key, STRING, "broker-key", "KEY", NULL,
              "The brokers' public key, or the file that has it.", .section = "Pool"),
    QV_OPTION(settings, worker.adapter_roots, LIST, "adapter-root", "DIR", NULL,
              "Load adapters only from below this folder, links resolved; repeat it for several. "
              "Without one: from anywhere.",
              .max = 64, .section = "Pool"),
    QV_OPTION(settings, worker.id, STRING, "id", "ID", NULL,
              "Name of this worker in the pool, unique. Default: host name, process id and random "
              "digits.",
              .section = "Pool"),
    QV_OPTION(settings, worker.drain_timeout_ms, DURATION, "drain-timeout", "TIME", "60s",
              "How long requests may run on after the first SIGTERM or SIGINT. What is left then "
              "goes on at another worker.",
              .min = 0, .max = 86400000, .section = "Pool"),
    QV_OPTION(settings, worker.register_timeout_ms, DURATION, "register-timeout", "TIME", "2s",
              "How long one broker may take to accept the worker before the next is tried.",
              .min = 100, .max = 600000, .section = "Pool"),
    QV_OPTION(settings, worker.stall_timeout_ms, DURATION, "stall-timeout", "TIME", "2m",
              "A step that takes longer counts as hung: heartbeats stop, so that the broker gives "
              "the requests to others. After ten times as long the worker exits. 0: never.",
              .min = 0, .max = 86400000, .section = "Pool"),
    QV_OPTION(settings, worker.lease_ms, DURATION, "lease", "TIME", "6s",
              "Life of quiver:worker:ID in Redis after the last sign of life.", .min = 300,
              .max = 3600000, .section = "Pool"),
    QV_OPTION(settings, worker.max_message_bytes, SIZE, "max-message-bytes", "SIZE", "32M",
              "Largest message from or to the broker; not above the broker's own limit.",
              .min = 65536, .max = 1073741824, .section = "Pool"),
    QV_ENGINE_OPTIONS(settings, worker.engine),
    QV_OPTION(settings, worker.model_name, STRING, "model-name", "NAME", NULL,
              "What the pool calls the model; all workers of a pool serve the same. Default: the "
              "last part of the model directory.",
              .section = "Model"),
    QV_OPTION(settings, worker.adapters, LIST, "adapter", "NAME=DIR", NULL,
              "Load an adapter at the start and keep it, whatever the pool wants. Repeatable.",
              .max = 4096, .section = "Adapters"),
    QV_OPTION(settings, worker.metrics_port, INT, "metrics-port", "PORT", "0",
              "Port of /metrics, /healthz and /readyz. 0: a free one, told in the log. -1: none.",
              .min = -1, .max = 65535, .section = "Observation"),
    QV_OPTION(settings, worker.metrics_address, STRING, "metrics-address", "ADDRESS", "127.0.0.1",
              "Address that the metrics listen on.", .section = "Observation"),
    QV_OPTION(settings, log_level, ENUM, "log-level", "LEVEL", "info",
              "Lines to write: error, warn, info or debug.", .choices = qv_log_level_names,
              .section = "Observation"),
    QV_OPTION(settings, log_json, FLAG, "log-json", NULL, NULL, "Write each line as a JSON object.",
              .section = "Observation"),
};

static const qv_program program = {
    .name = "quiver-worker",
    .summary = "Serve one model and its LoRA adapters to a Quiver pool.",
    .epilog =
        "The first SIGTERM or SIGINT drains: nothing new is taken, what runs is finished, "
        "the exit code\nis 0. The second stops at once; what ran goes on at another worker.\n"
        "\nExit codes: 0 drained or stopped; 1 the model does not load, or the engine failed; "
        "2 usage;\n3 the drain ran out of time.\n"
        "\nExample:\n  quiver-worker --model /models/qwen3.5-4b --broker tcp://10.0.0.1:5556 "
        "\\\n      --redis redis://10.0.0.1:6379 --adapter sql=/adapters/sql\n",
};

/* Signals are counted into an eventfd. A handler and not a signalfd: OpenBLAS starts threads before
 * main, which do not block what main blocks. write() is safe in a handler. */
static int signal_fd = -1;

static void on_signal(int number)
{
    (void)number;
    int saved = errno;
    uint64_t one = 1;
    ssize_t ignored = write(signal_fd, &one, sizeof one);
    (void)ignored;
    errno = saved;
}

static qv_status catch_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    signal_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);
    if (signal_fd < 0)
        return qv_fail(QV_ERR_IO, "eventfd: %s", strerror(errno));
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    return QV_OK;
}

/* Until the worker ends: one signal drains, the next stops. */
static void serve(qv_worker *worker)
{
    struct pollfd fds[] = {{.fd = signal_fd, .events = POLLIN},
                           {.fd = qv_worker_fd(worker), .events = POLLIN}};
    bool draining = false;
    while (!(fds[1].revents & POLLIN)) {
        uint64_t one;
        if (poll(fds, 2, -1) < 0)
            continue;
        while (read(signal_fd, &one, sizeof one) == sizeof one) {
            qv_info("signal: %s", draining ? "stopping" : "draining");
            if (draining)
                qv_worker_stop(worker);
            else
                qv_worker_drain(worker);
            draining = true;
        }
    }
}

static int exit_code(qv_status status)
{
    return status == QV_OK ? 0 : status == QV_ERR_BUSY ? EXIT_DRAIN : EXIT_ENGINE;
}

int main(int argc, char **argv)
{
    settings s;
    qv_options *options;
    qv_worker *worker;
    if (qv_options_parse(table, sizeof table / sizeof *table, &program, argc, argv, &s, &options) !=
        QV_OK) {
        fprintf(stderr, "quiver-worker: %s\n", qv_error());
        return EXIT_USAGE;
    }
    if (qv_options_printed(options)) {
        qv_options_free(options);
        return 0;
    }
    qv_log_init(&(qv_log_options){
        .level = (qv_log_level)s.log_level, .program = "quiver-worker", .json = s.log_json});
    zsys_handler_set(NULL); /* before CZMQ would take the signals over */
    zsys_init();

    qv_status status = catch_signals();
    if (status == QV_OK)
        status = qv_worker_start(&s.worker, &worker);
    if (status != QV_OK) {
        qv_err("%s", qv_error());
        qv_options_free(options);
        return status == QV_ERR_ARG ? EXIT_USAGE : EXIT_ENGINE;
    }
    qv_info("worker %s starts", qv_worker_id(worker));
    if (qv_worker_metrics_port(worker) != 0)
        qv_info("metrics at http://%s:%u/metrics", s.worker.metrics_address,
                qv_worker_metrics_port(worker));
    serve(worker);
    int code = exit_code(qv_worker_wait(worker));
    if (!qv_worker_free(worker)) { /* inside a load or a hung step: nothing can be waited for */
        qv_warn("the engine is still busy; leaving without it");
        _exit(code);
    }
    qv_options_free(options);
    return code;
}
