/* The processes of bench_broker. */
#include "bench/broker_bench.h"

#include "broker/broker.h"
#include "common/clock.h"
#include "common/log.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

const char *const bench_transports[] = {"tcp", "ipc", NULL};

_Noreturn void bench_die(const char *what)
{
    fprintf(stderr, "bench_broker: %s: %s\n", what, qv_error());
    exit(1);
}

/* --- Messages ---------------------------------------------------------------------------------*/

static bench_template encode(const qv_message *message, const char *mark, size_t mark_size)
{
    qv_arena arena = {0};
    const void *data;
    size_t size;
    if (qv_message_encode(message, &arena, &data, &size) != QV_OK)
        bench_die("encode");
    bench_template t = {malloc(size), size, 0};
    memcpy(t.data, data, size);
    const unsigned char *found = memmem(t.data, size, mark, mark_size);
    if (found == NULL)
        bench_die("template");
    t.patch = (size_t)(found - t.data) + mark_size;
    qv_arena_deinit(&arena);
    return t;
}

bench_template bench_make_submit(const bench_settings *set, bool stream, int64_t n_tokens)
{
    char *prompt = malloc((size_t)set->prompt_bytes + 1);
    memset(prompt, 'x', (size_t)set->prompt_bytes);
    prompt[set->prompt_bytes] = '\0';
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    message.submit.id = qv_str_from("00000000");
    qv_set(&message.submit, submit, prompt, qv_str_from(prompt));
    qv_set(&message.submit, submit, max_tokens, n_tokens);
    qv_set(&message.submit, submit, stream, stream);
    bench_template t = encode(&message, "\xa2id\xa8", 4);
    free(prompt);
    return t;
}

static qv_msg_usage usage_of(int64_t n)
{
    return (qv_msg_usage){.prompt_tokens = 48, .completion_tokens = n, .cached_tokens = 0};
}

/* The number is encoded in its longest form, so that any fits. */
static bench_template make_step(uint64_t epoch)
{
    int32_t token = 1234;
    qv_msg_delta delta = {.request = UINT64_MAX};
    qv_set(&delta, delta, seq, 0);
    qv_set(&delta, delta, text, qv_str_from("word"));
    qv_set(&delta, delta, tokens, ((qv_ints){&token, 1}));
    qv_set(&delta, delta, finish_reason, qv_str_from("stop"));
    qv_set(&delta, delta, usage, usage_of(1));
    qv_message message;
    qv_message_init(&message, QV_MSG_STEP);
    message.step.epoch = epoch;
    message.step.deltas.data = &delta;
    message.step.deltas.count = 1;
    return encode(&message, "\xa7request\xcf", 9);
}

/* The msgpack unsigned integer behind a key within the first `size` bytes. */
static uint64_t read_uint(const unsigned char *data, size_t size, const char *key)
{
    const unsigned char *at = memmem(data, size, key, strlen(key));
    if (at == NULL)
        return 0;
    at += strlen(key);
    int n = *at == 0xcc ? 1 : *at == 0xcd ? 2 : *at == 0xce ? 4 : *at == 0xcf ? 8 : 0;
    uint64_t value = n == 0 ? *at : 0;
    for (int i = 1; i <= n; i++)
        value = value << 8 | at[i];
    return value;
}

static uint64_t request_of(const qv_mq_message *run)
{
    return read_uint(run->data, run->size < 96 ? run->size : 96, "\xa7request");
}

/* --- Keys -------------------------------------------------------------------------------------*/

void bench_make_keys(bench_keys *keys)
{
    snprintf(keys->list, sizeof keys->list, "/tmp/bench_broker-%ld.keys", (long)getpid());
    FILE *file = fopen(keys->list, "w");
    if (file == NULL || qv_key_pair_make(&keys->broker) != QV_OK ||
        qv_key_pair_make(&keys->client) != QV_OK || qv_key_pair_make(&keys->worker) != QV_OK)
        bench_die(keys->list);
    fprintf(file, "%s tenant=bench rights=submit\n%s rights=worker\n", keys->client.public_key,
            keys->worker.public_key);
    if (fclose(file) != 0)
        bench_die(keys->list);
}

/* --- Starting ---------------------------------------------------------------------------------*/

static void begin_child(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_IGN);
    zsys_handler_set(NULL);
}

static const char *any_endpoint(const bench_settings *set, const char *name, char *out, size_t size)
{
    if (set->transport == 0)
        snprintf(out, size, "tcp://127.0.0.1:*");
    else
        snprintf(out, size, "ipc:///tmp/bench_broker-%ld-%s", (long)getpid(), name);
    return out;
}

/* Start a broker in a process of its own; it says where it listens. */
static bench_broker start_broker(const bench_settings *set, const bench_keys *keys,
                                 void (*run)(const bench_settings *set, const bench_keys *keys,
                                             FILE *say))
{
    int pipes[2];
    bench_broker broker = {.keys = keys};
    if (pipe(pipes) != 0 || (broker.pid = fork()) < 0)
        bench_die("fork");
    if (broker.pid == 0) {
        close(pipes[0]);
        begin_child();
        run(set, keys, fdopen(pipes[1], "w"));
        _exit(0);
    }
    close(pipes[1]);
    FILE *from = fdopen(pipes[0], "r");
    if (fscanf(from, "%255s %255s", broker.frontend, broker.backend) != 2)
        bench_die("a broker did not start");
    fclose(from);
    return broker;
}

static pid_t fork_worker(void)
{
    pid_t pid = fork();
    if (pid < 0)
        bench_die("fork");
    if (pid == 0)
        begin_child();
    return pid;
}

void bench_stop(const bench_broker *broker)
{
    const pid_t pids[] = {broker->worker, broker->pid};
    for (size_t i = 0; i < sizeof pids / sizeof pids[0]; i++) {
        kill(pids[i], SIGKILL);
        waitpid(pids[i], NULL, 0);
    }
}

static qv_mq *open_mq(qv_mq_type type, const char *endpoint, const qv_key_pair *own,
                      const bench_keys *keys)
{
    qv_mq_options options = qv_mq_default_options(type, endpoint);
    qv_curve curve = {.domain = "bench"};
    if (keys != NULL) {
        curve.own = *own;
        memcpy(curve.server_key, keys->broker.public_key, sizeof curve.server_key);
        options.curve = &curve;
    }
    qv_mq *mq;
    if (qv_mq_open(&options, &mq) != QV_OK)
        bench_die(endpoint);
    return mq;
}

qv_mq *bench_connect(const bench_broker *broker)
{
    const bench_keys *keys = broker->keys;
    return open_mq(QV_MQ_DEALER, broker->frontend, keys != NULL ? &keys->client : NULL, keys);
}

static qv_mq *connect_worker(const bench_broker *broker)
{
    const bench_keys *keys = broker->keys;
    return open_mq(QV_MQ_DEALER, broker->backend, keys != NULL ? &keys->worker : NULL, keys);
}

bool bench_wait(qv_mq *mq, long ms)
{
    zmq_pollitem_t item = {.socket = zsock_resolve(qv_mq_socket(mq)), .events = ZMQ_POLLIN};
    return zmq_poll(&item, 1, ms) > 0;
}

double bench_cpu_us(pid_t pid)
{
    clockid_t clock;
    struct timespec ts = {0};
    if (clock_getcpuclockid(pid, &clock) == 0)
        clock_gettime(clock, &ts);
    return (double)ts.tv_sec * 1e6 + (double)ts.tv_nsec * 1e-3;
}

double bench_rss_bytes(pid_t pid)
{
    char path[64];
    long total = 0, resident = 0;
    snprintf(path, sizeof path, "/proc/%ld/statm", (long)pid);
    FILE *file = fopen(path, "r");
    if (file == NULL || fscanf(file, "%ld %ld", &total, &resident) != 2)
        bench_die(path);
    fclose(file);
    return (double)resident * (double)sysconf(_SC_PAGESIZE);
}

/* --- Quiver -----------------------------------------------------------------------------------*/

static void run_quiver(const bench_settings *set, const bench_keys *keys, FILE *say)
{
    char frontend[128], backend[128];
    qv_metrics *metrics;
    if (qv_metrics_new(&metrics) != QV_OK)
        bench_die("metrics");
    qv_log_init(&(qv_log_options){.level = QV_LOG_WARN, .program = "bench_broker"});
    qv_broker_options options = {.core = qv_core_default_options(),
                                 .frontend = any_endpoint(set, "f", frontend, sizeof frontend),
                                 .backend = any_endpoint(set, "b", backend, sizeof backend),
                                 .max_message_bytes = 64 << 20,
                                 .metrics = metrics};
    if (keys != NULL) {
        options.key = &keys->broker;
        options.access = keys->list;
    }
    qv_broker *broker;
    if (qv_broker_open(&options, &broker) != QV_OK)
        bench_die("broker");
    fprintf(say, "%s %s\n", qv_broker_frontend(broker), qv_broker_backend(broker));
    fclose(say);
    qv_broker_run(broker);
}

static void send_message(qv_mq *mq, const qv_message *message)
{
    static qv_arena arena;
    const void *data;
    size_t size;
    qv_arena_reset(&arena);
    if (qv_message_encode(message, &arena, &data, &size) != QV_OK)
        bench_die("encode");
    while (qv_mq_send(mq, NULL, data, size) == QV_ERR_BUSY)
        zclock_sleep(1);
}

/* Register and return the epoch. */
static uint64_t join(qv_mq *mq, uint32_t number, int64_t capacity)
{
    char name[32];
    snprintf(name, sizeof name, "bench-%u", number);
    qv_message message;
    qv_message_init(&message, QV_MSG_READY);
    message.ready.worker = qv_str_from(name);
    message.ready.protocol = QV_PROTOCOL_VERSION;
    message.ready.model = qv_str_from("bench");
    message.ready.backend = qv_str_from("cpu");
    message.ready.capacity = capacity;
    message.ready.max_context = 4096;
    send_message(mq, &message);
    qv_mq_message received;
    while (!bench_wait(mq, 10000) || qv_mq_recv(mq, &received) != QV_OK)
        ;
    qv_arena arena = {0};
    if (qv_message_decode(received.data, received.size, QV_TO_WORKER, NULL, &arena, &message) !=
            QV_OK ||
        message.type != QV_MSG_WELCOME)
        bench_die("no welcome");
    uint64_t epoch = message.welcome.epoch;
    qv_mq_message_release(&received);
    qv_arena_deinit(&arena);
    return epoch;
}

/* A sign of life, if it is time for one. */
static void beat(qv_mq *mq, uint64_t epoch, uint64_t *beat_ms)
{
    uint64_t now_ms = qv_now_ms();
    if (now_ms - *beat_ms < 500)
        return;
    *beat_ms = now_ms;
    qv_message heartbeat;
    qv_message_init(&heartbeat, QV_MSG_HEARTBEAT);
    heartbeat.heartbeat.epoch = epoch;
    send_message(mq, &heartbeat);
}

static void answer(qv_mq *mq, const bench_template *step, const qv_mq_message *run)
{
    uint64_t number = request_of(run);
    if (number == 0)
        return; /* a ping */
    for (int i = 0; i < 8; i++)
        step->data[step->patch + (size_t)i] = (unsigned char)(number >> (56 - 8 * i));
    while (qv_mq_send(mq, NULL, step->data, step->size) == QV_ERR_BUSY)
        ;
}

static void run_quick_worker(const bench_broker *broker)
{
    qv_mq *mq = connect_worker(broker);
    uint64_t epoch = join(mq, 0, 2 * BENCH_MAX_OPEN);
    bench_template step = make_step(epoch);
    uint64_t beat_ms = 0;
    for (;;) {
        qv_mq_message received;
        if (bench_wait(mq, 200))
            while (qv_mq_recv(mq, &received) == QV_OK) {
                answer(mq, &step, &received);
                qv_mq_message_release(&received);
            }
        beat(mq, epoch, &beat_ms);
    }
}

bench_broker bench_start_quiver(const bench_settings *set, const bench_keys *keys)
{
    bench_broker broker = start_broker(set, keys, run_quiver);
    if ((broker.worker = fork_worker()) == 0)
        run_quick_worker(&broker);
    return broker;
}

/* --- Workers with streams ---------------------------------------------------------------------*/

typedef struct {
    uint64_t number;
    int64_t seq, n_tokens;
} stream;

typedef struct {
    qv_mq *mq;
    uint64_t epoch, beat_ms, next_us;
    uint32_t n;
    stream streams[BENCH_STREAM_CAPACITY];
} stream_worker;

static void take_runs(stream_worker *w)
{
    qv_mq_message received;
    while (qv_mq_recv(w->mq, &received) == QV_OK) {
        uint64_t number = request_of(&received);
        int64_t n = (int64_t)read_uint(received.data, received.size, "\xaamax_tokens");
        if (number != 0 && n > 0 && w->n < BENCH_STREAM_CAPACITY)
            w->streams[w->n++] = (stream){number, 0, n};
        qv_mq_message_release(&received);
    }
}

/* One message with a token for each stream. */
static void step_streams(stream_worker *w)
{
    static qv_msg_delta deltas[BENCH_STREAM_CAPACITY];
    int32_t token = 1234;
    char text[24];
    snprintf(text, sizeof text, "%016llu", (unsigned long long)qv_now_us());
    uint32_t n = w->n;
    w->n = 0;
    for (uint32_t i = 0; i < n; i++) {
        stream s = w->streams[i];
        qv_msg_delta *delta = &deltas[i];
        *delta = (qv_msg_delta){.request = s.number};
        qv_set(delta, delta, seq, s.seq);
        qv_set(delta, delta, text, qv_str_from(text));
        qv_set(delta, delta, tokens, ((qv_ints){&token, 1}));
        if (++s.seq < s.n_tokens) {
            w->streams[w->n++] = s;
            continue;
        }
        qv_set(delta, delta, finish_reason, qv_str_from("length"));
        qv_set(delta, delta, usage, usage_of(s.seq));
    }
    qv_message message;
    qv_message_init(&message, QV_MSG_STEP);
    message.step.epoch = w->epoch;
    message.step.deltas.data = deltas;
    message.step.deltas.count = n;
    send_message(w->mq, &message);
}

static void run_stream_workers(const bench_broker *broker, uint32_t n, uint64_t step_us)
{
    stream_worker *workers = calloc(n, sizeof *workers);
    zmq_pollitem_t *items = calloc(n, sizeof *items);
    for (uint32_t i = 0; i < n; i++) {
        workers[i].mq = connect_worker(broker);
        workers[i].epoch = join(workers[i].mq, i, BENCH_STREAM_CAPACITY);
        workers[i].next_us = qv_now_us() + step_us * i / n; /* one after the other */
        items[i] = (zmq_pollitem_t){.socket = zsock_resolve(qv_mq_socket(workers[i].mq)),
                                    .events = ZMQ_POLLIN};
    }
    bool is_busy = false;
    for (;;) {
        zmq_poll(items, (int)n, is_busy ? 0 : 1);
        is_busy = false;
        for (uint32_t i = 0; i < n; i++) {
            stream_worker *w = &workers[i];
            if (items[i].revents != 0)
                take_runs(w);
            if (w->n > 0 && qv_now_us() >= w->next_us) {
                step_streams(w);
                while (step_us > 0 && w->next_us <= qv_now_us()) /* it may have been idle */
                    w->next_us += step_us;
            }
            is_busy = is_busy || (w->n > 0 && step_us == 0);
            beat(w->mq, w->epoch, &w->beat_ms);
        }
    }
}

bench_broker bench_start_streams(const bench_settings *set, uint32_t n_workers, uint64_t step_us)
{
    bench_broker broker = start_broker(set, NULL, run_quiver);
    if ((broker.worker = fork_worker()) == 0)
        run_stream_workers(&broker, n_workers, step_us);
    return broker;
}

/* --- Bare: the least a broker can do ----------------------------------------------------------*/

/* The one worker and the one client are remembered, bodies pass untouched. */
static void run_bare(const bench_settings *set, const bench_keys *keys, FILE *say)
{
    char name[128];
    const qv_key_pair *own = keys != NULL ? &keys->broker : NULL;
    const char *endpoint = any_endpoint(set, "bf", name, sizeof name);
    qv_mq *front = open_mq(QV_MQ_ROUTER, endpoint, own, keys);
    endpoint = any_endpoint(set, "bb", name, sizeof name);
    qv_mq *back = open_mq(QV_MQ_ROUTER, endpoint, own, keys);
    fprintf(say, "%s %s\n", qv_mq_endpoint(front), qv_mq_endpoint(back));
    fclose(say);
    zmq_pollitem_t items[] = {
        {.socket = zsock_resolve(qv_mq_socket(front)), .events = ZMQ_POLLIN},
        {.socket = zsock_resolve(qv_mq_socket(back)), .events = ZMQ_POLLIN},
    };
    qv_mq *const from[] = {front, back}, *const to[] = {back, front};
    qv_mq_peer peers[2] = {0}; /* of front, of back */
    for (;;) {
        zmq_poll(items, 2, -1);
        for (int side = 0; side < 2; side++) {
            qv_mq_message message;
            for (int i = 0; i < 256 && qv_mq_recv(from[side], &message) == QV_OK; i++) {
                peers[side] = message.peer;
                if (message.size > 1 && peers[!side].size > 0)
                    qv_mq_send(to[side], &peers[!side], message.data, message.size);
                qv_mq_message_release(&message);
            }
        }
    }
}

/* Answer each request with a body of the size of a `done`, which begins with the request's id. */
static void run_bare_worker(const bench_broker *broker)
{
    qv_mq *mq = connect_worker(broker);
    unsigned char reply[200] = {0};
    while (qv_mq_send(mq, NULL, "!", 1) == QV_ERR_BUSY) /* makes itself known */
        zclock_sleep(1);
    for (;;) {
        qv_mq_message received;
        if (!bench_wait(mq, -1))
            continue;
        while (qv_mq_recv(mq, &received) == QV_OK) {
            const unsigned char *id = memmem(received.data, received.size, "\xa2id\xa8", 4);
            memcpy(reply, id, 4 + BENCH_ID_DIGITS);
            qv_mq_message_release(&received);
            while (qv_mq_send(mq, NULL, reply, sizeof reply) == QV_ERR_BUSY)
                ;
        }
    }
}

bench_broker bench_start_bare(const bench_settings *set, const bench_keys *keys)
{
    bench_broker broker = start_broker(set, keys, run_bare);
    if ((broker.worker = fork_worker()) == 0)
        run_bare_worker(&broker);
    return broker;
}
