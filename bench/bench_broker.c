/* What the broker costs: client → broker → echo worker → client, against the least that any ZeroMQ
 * broker can do, a ROUTER–ROUTER echo that passes bodies of the same sizes on without looking at
 * them.
 *
 * Broker, bare broker and their workers are processes of their own, each with one ZeroMQ I/O
 * thread, as in production; all over loopback. The workers answer each request at once with one
 * token that ends it, from a template, and the client looks only at types and ids, so that what is
 * measured is the broker. Rounds of the variants are interleaved. Latency is of a round trip at the
 * client: from `submit` to `done`.
 */
#include "broker/broker.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/options.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_WINDOW  1024
#define ID_DIGITS   8
#define SAMPLES_MAX (1 << 21)

typedef struct {
    bool quick;
    int64_t rounds, round_ms, prompt_bytes;
    int transport;
} settings;

static const char *const transports[] = {"tcp", "ipc", NULL};

static const qv_option table[] = {
    QV_OPTION(settings, quick, FLAG, "quick", NULL, NULL, "Shorter rounds: figures are rougher."),
    QV_OPTION(settings, rounds, INT, "rounds", "N", "5", "Rounds of each variant and window.",
              .min = 1, .max = 1000),
    QV_OPTION(settings, round_ms, DURATION, "time", "TIME", "1s", "Length of a round.", .min = 10),
    QV_OPTION(settings, prompt_bytes, SIZE, "prompt", "SIZE", "192", "Size of the prompts.",
              .min = 1, .max = 1 << 20),
    QV_OPTION(settings, transport, ENUM, "transport", "NAME", "tcp", "How processes are connected.",
              .choices = transports),
};

static const qv_program program = {
    .name = "bench_broker",
    .summary = "Throughput and round-trip latency of the broker against a bare ROUTER-ROUTER echo.",
};

static void die(const char *what)
{
    fprintf(stderr, "bench_broker: %s: %s\n", what, qv_error());
    exit(1);
}

/* --- Messages ---------------------------------------------------------------------------------*/

typedef struct {
    unsigned char *data;
    size_t size;
    size_t patch; /* where the id, or the number of the request, is */
} template;

static template encode(const qv_message *message, const char *mark, size_t mark_size)
{
    qv_arena arena = {0};
    const void *data;
    size_t size;
    if (qv_message_encode(message, &arena, &data, &size) != QV_OK)
        die("encode");
    template t = {malloc(size), size, 0};
    memcpy(t.data, data, size);
    const unsigned char *found = memmem(t.data, size, mark, mark_size);
    if (found == NULL)
        die("template");
    t.patch = (size_t)(found - t.data) + mark_size;
    qv_arena_deinit(&arena);
    return t;
}

static template make_submit(const settings *set, bool stream)
{
    char *prompt = malloc((size_t)set->prompt_bytes + 1);
    memset(prompt, 'x', (size_t)set->prompt_bytes);
    prompt[set->prompt_bytes] = '\0';
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    message.submit.id = qv_str_from("00000000");
    qv_set(&message.submit, submit, prompt, qv_str_from(prompt));
    qv_set(&message.submit, submit, max_tokens, 1);
    qv_set(&message.submit, submit, stream, stream);
    template t = encode(&message, "\xa2id\xa8", 4);
    free(prompt);
    return t;
}

/* The number is encoded in its longest form, so that any fits. */
static template make_step(uint64_t epoch)
{
    int32_t token = 1234;
    qv_msg_delta delta = {.request = UINT64_MAX};
    qv_set(&delta, delta, seq, 0);
    qv_set(&delta, delta, text, qv_str_from("word"));
    qv_set(&delta, delta, tokens, ((qv_ints){&token, 1}));
    qv_set(&delta, delta, finish_reason, qv_str_from("stop"));
    qv_set(&delta, delta, usage,
           ((qv_msg_usage){.prompt_tokens = 48, .completion_tokens = 1, .cached_tokens = 0}));
    qv_message message;
    qv_message_init(&message, QV_MSG_STEP);
    message.step.epoch = epoch;
    message.step.deltas.data = &delta;
    message.step.deltas.count = 1;
    return encode(&message, "\xa7request\xcf", 9);
}

/* The msgpack unsigned integer behind a key. */
static uint64_t read_uint(const unsigned char *data, size_t size, const char *key)
{
    const unsigned char *at = memmem(data, size < 96 ? size : 96, key, strlen(key));
    if (at == NULL)
        return 0;
    at += strlen(key);
    int n = *at == 0xcc ? 1 : *at == 0xcd ? 2 : *at == 0xce ? 4 : *at == 0xcf ? 8 : 0;
    uint64_t value = n == 0 ? *at : 0;
    for (int i = 1; i <= n; i++)
        value = value << 8 | at[i];
    return value;
}

/* --- Processes --------------------------------------------------------------------------------*/

typedef struct {
    pid_t pid;
    char frontend[256], backend[256];
} process;

static void limit_to_parent(void)
{
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_IGN);
    zsys_handler_set(NULL);
}

static const char *any_endpoint(const settings *set, const char *name, char *out, size_t size)
{
    if (set->transport == 0)
        snprintf(out, size, "tcp://127.0.0.1:*");
    else
        snprintf(out, size, "ipc:///tmp/bench_broker-%ld-%s", (long)getpid(), name);
    return out;
}

/* Start a broker in a process of its own; it says where it listens. */
static process start_broker(const settings *set, void (*run)(const settings *set, FILE *say))
{
    int pipes[2];
    process p = {0};
    if (pipe(pipes) != 0 || (p.pid = fork()) < 0)
        die("fork");
    if (p.pid == 0) {
        close(pipes[0]);
        limit_to_parent();
        run(set, fdopen(pipes[1], "w"));
        _exit(0);
    }
    close(pipes[1]);
    FILE *from = fdopen(pipes[0], "r");
    if (fscanf(from, "%255s %255s", p.frontend, p.backend) != 2)
        die("a broker did not start");
    fclose(from);
    return p;
}

static pid_t start_worker(const char *backend, void (*run)(const char *backend))
{
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        limit_to_parent();
        run(backend);
        _exit(0);
    }
    return pid;
}

static qv_mq *open_mq(qv_mq_type type, const char *endpoint)
{
    qv_mq_options options = qv_mq_default_options(type, endpoint);
    qv_mq *mq;
    if (qv_mq_open(&options, &mq) != QV_OK)
        die(endpoint);
    return mq;
}

/* Wait until something can be read; false after the time. */
static bool wait_readable(qv_mq *mq, long ms)
{
    zmq_pollitem_t item = {.socket = zsock_resolve(qv_mq_socket(mq)), .events = ZMQ_POLLIN};
    return zmq_poll(&item, 1, ms) > 0;
}

/* --- Quiver: broker and worker ----------------------------------------------------------------*/

static void run_quiver(const settings *set, FILE *say)
{
    char frontend[128], backend[128];
    qv_metrics *metrics;
    if (qv_metrics_new(&metrics) != QV_OK)
        die("metrics");
    qv_log_init(&(qv_log_options){.level = QV_LOG_ERROR, .program = "bench_broker"});
    qv_broker_options options = {.core = qv_core_default_options(),
                                 .frontend = any_endpoint(set, "f", frontend, sizeof frontend),
                                 .backend = any_endpoint(set, "b", backend, sizeof backend),
                                 .max_message_bytes = 64 << 20,
                                 .metrics = metrics};
    qv_broker *broker;
    if (qv_broker_open(&options, &broker) != QV_OK)
        die("broker");
    fprintf(say, "%s %s\n", qv_broker_frontend(broker), qv_broker_backend(broker));
    fclose(say);
    qv_broker_run(broker);
}

static void send_message(qv_mq *mq, const qv_message *message)
{
    qv_arena arena = {0};
    const void *data;
    size_t size;
    if (qv_message_encode(message, &arena, &data, &size) != QV_OK)
        die("encode");
    while (qv_mq_send(mq, NULL, data, size) == QV_ERR_BUSY)
        zclock_sleep(1);
    qv_arena_deinit(&arena);
}

/* Register and return the epoch. */
static uint64_t join(qv_mq *mq)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_READY);
    message.ready.worker = qv_str_from("echo");
    message.ready.protocol = QV_PROTOCOL_VERSION;
    message.ready.model = qv_str_from("echo");
    message.ready.backend = qv_str_from("cpu");
    message.ready.capacity = 4 * MAX_WINDOW;
    message.ready.max_context = 4096;
    send_message(mq, &message);
    qv_mq_message received;
    while (!wait_readable(mq, 10000) || qv_mq_recv(mq, &received) != QV_OK)
        ;
    qv_arena arena = {0};
    if (qv_message_decode(received.data, received.size, QV_TO_WORKER, NULL, &arena, &message) !=
            QV_OK ||
        message.type != QV_MSG_WELCOME)
        die("no welcome");
    uint64_t epoch = message.welcome.epoch;
    qv_mq_message_release(&received);
    qv_arena_deinit(&arena);
    return epoch;
}

static void answer(qv_mq *mq, const template *step, const qv_mq_message *run)
{
    uint64_t number = read_uint(run->data, run->size, "\xa7request");
    if (number == 0)
        return; /* a ping */
    for (int i = 0; i < 8; i++)
        step->data[step->patch + (size_t)i] = (unsigned char)(number >> (56 - 8 * i));
    while (qv_mq_send(mq, NULL, step->data, step->size) == QV_ERR_BUSY)
        ;
}

static void run_quiver_worker(const char *backend)
{
    qv_mq *mq = open_mq(QV_MQ_DEALER, backend);
    uint64_t epoch = join(mq);
    template step = make_step(epoch);
    qv_message heartbeat;
    qv_message_init(&heartbeat, QV_MSG_HEARTBEAT);
    heartbeat.heartbeat.epoch = epoch;
    uint64_t beat_ms = 0;
    for (;;) {
        qv_mq_message received;
        if (wait_readable(mq, 200))
            while (qv_mq_recv(mq, &received) == QV_OK) {
                answer(mq, &step, &received);
                qv_mq_message_release(&received);
            }
        if (qv_now_ms() - beat_ms > 500) {
            beat_ms = qv_now_ms();
            send_message(mq, &heartbeat);
        }
    }
}

/* --- Bare: the least a broker can do ----------------------------------------------------------*/

/* The one worker and the one client are remembered, bodies pass untouched. */
static void run_bare(const settings *set, FILE *say)
{
    char name[128];
    qv_mq *front = open_mq(QV_MQ_ROUTER, any_endpoint(set, "bf", name, sizeof name));
    qv_mq *back = open_mq(QV_MQ_ROUTER, any_endpoint(set, "bb", name, sizeof name));
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
static void run_bare_worker(const char *backend)
{
    qv_mq *mq = open_mq(QV_MQ_DEALER, backend);
    unsigned char reply[200] = {0};
    while (qv_mq_send(mq, NULL, "!", 1) == QV_ERR_BUSY) /* makes itself known */
        zclock_sleep(1);
    for (;;) {
        qv_mq_message received;
        if (!wait_readable(mq, -1))
            continue;
        while (qv_mq_recv(mq, &received) == QV_OK) {
            const unsigned char *id = memmem(received.data, received.size, "\xa2id\xa8", 4);
            memcpy(reply, id, 4 + ID_DIGITS);
            qv_mq_message_release(&received);
            while (qv_mq_send(mq, NULL, reply, sizeof reply) == QV_ERR_BUSY)
                ;
        }
    }
}

/* --- The client -------------------------------------------------------------------------------*/

typedef struct {
    const char *name;
    bool is_bare;
    pid_t broker;
    qv_mq *mq;
    template submit;
} variant;

typedef struct {
    uint32_t *us; /* [n] round trips */
    size_t n;
    uint64_t done;
    double seconds;
    double cpu_us; /* that the broker's process used, all threads */
} samples;

/* CPU time that a process has used. */
static double cpu_us(pid_t pid)
{
    clockid_t clock;
    struct timespec ts = {0};
    if (clock_getcpuclockid(pid, &clock) == 0)
        clock_gettime(clock, &ts);
    return (double)ts.tv_sec * 1e6 + (double)ts.tv_nsec * 1e-3;
}

static uint64_t started_us[MAX_WINDOW];

static void submit_one(variant *v, uint32_t slot)
{
    char digits[ID_DIGITS + 1];
    snprintf(digits, sizeof digits, "%08u", slot);
    memcpy(v->submit.data + v->submit.patch, digits, ID_DIGITS);
    started_us[slot] = qv_now_us();
    while (qv_mq_send(v->mq, NULL, v->submit.data, v->submit.size) == QV_ERR_BUSY)
        ;
}

/* The slot of the request that this message ends, or -1. */
static int32_t ended_slot(const variant *v, const qv_mq_message *message)
{
    const unsigned char *data = message->data;
    size_t head = message->size < 40 ? message->size : 40;
    if (!v->is_bare && memmem(data, head,
                              "\xa4"
                              "done",
                              5) == NULL) {
        if (memmem(data, head,
                   "\xa5"
                   "error",
                   6) != NULL)
            die("the broker answered with an error");
        return -1;
    }
    const char *id = memmem(data, head, "\xa2id\xa8", 4);
    return id != NULL ? (int32_t)strtoul(id + 4, NULL, 10) % MAX_WINDOW : -1;
}

/* Keep `window` requests in flight for a while. */
static void run_round(variant *v, uint32_t window, int64_t ms, samples *out)
{
    uint64_t begin = qv_now_us(), end = begin + (uint64_t)ms * 1000, now = begin;
    uint32_t in_flight = 0;
    double cpu_begin_us = cpu_us(v->broker);
    for (uint32_t slot = 0; slot < window; slot++, in_flight++)
        submit_one(v, slot);
    while (in_flight > 0) {
        if (!wait_readable(v->mq, 10000))
            die("no answer within 10 s");
        qv_mq_message message;
        while (qv_mq_recv(v->mq, &message) == QV_OK) {
            int32_t slot = ended_slot(v, &message);
            qv_mq_message_release(&message);
            if (slot < 0)
                continue;
            now = qv_now_us();
            if (out != NULL && out->n < SAMPLES_MAX)
                out->us[out->n++] = (uint32_t)(now - started_us[slot]);
            if (out != NULL)
                out->done++;
            if (now < end)
                submit_one(v, (uint32_t)slot);
            else
                in_flight--;
        }
    }
    if (out == NULL)
        return;
    out->seconds += (double)(now - begin) * 1e-6;
    out->cpu_us += cpu_us(v->broker) - cpu_begin_us;
}

static int compare_u32(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double percentile(samples *s, double p)
{
    qsort(s->us, s->n, sizeof *s->us, compare_u32);
    return s->n > 0 ? s->us[(size_t)(p * (double)(s->n - 1))] : 0;
}

/* --- The table --------------------------------------------------------------------------------*/

#define N_VARIANTS 3

static void bench_window(const settings *set, variant *variants, uint32_t window)
{
    samples all[N_VARIANTS] = {0};
    for (int i = 0; i < N_VARIANTS; i++) {
        all[i].us = malloc(SAMPLES_MAX * sizeof *all[i].us);
        run_round(&variants[i], window, set->round_ms / 5, NULL); /* warm up */
    }
    for (int64_t round = 0; round < set->rounds; round++)
        for (int i = 0; i < N_VARIANTS; i++)
            run_round(&variants[i], window, set->round_ms, &all[i]);
    double bare_p50 = percentile(&all[0], 0.5);
    double bare_rate = (double)all[0].done / all[0].seconds;
    for (int i = 0; i < N_VARIANTS; i++) {
        double p50 = percentile(&all[i], 0.5), p99 = percentile(&all[i], 0.99);
        double rate = (double)all[i].done / all[i].seconds;
        printf("%6u  %-14s %9.0f  %9.3f  %9.3f  %9.1f", window, variants[i].name, rate, p50 / 1e3,
               p99 / 1e3, all[i].cpu_us / (double)all[i].done);
        if (i == 0)
            printf("\n");
        else
            printf("  %+10.3f  %8.0f%%\n", (p50 - bare_p50) / 1e3, 100 * rate / bare_rate);
        free(all[i].us);
    }
    fflush(stdout);
}

static void bench(const settings *set, const process *bare, const process *quiver)
{
    variant variants[N_VARIANTS] = {
        {.name = "bare echo", .is_bare = true},
        {.name = "quiver, whole"},
        {.name = "quiver, stream"},
    };
    for (int i = 0; i < N_VARIANTS; i++) {
        variants[i].mq = open_mq(QV_MQ_DEALER, i == 0 ? bare->frontend : quiver->frontend);
        variants[i].broker = i == 0 ? bare->pid : quiver->pid;
        variants[i].submit = make_submit(set, i == 2);
    }
    zclock_sleep(300); /* connections */
    printf("submit of %zu bytes over %s; bare echo and broker are processes of their own\n\n",
           variants[0].submit.size, transports[set->transport]);
    printf("%6s  %-14s %9s  %9s  %9s  %9s  %10s  %9s\n", "window", "variant", "req/s", "p50 ms",
           "p99 ms", "cpu us", "added p50", "of bare");
    static const uint32_t windows[] = {1, 16, 64, 256, 1024};
    for (size_t i = 0; i < sizeof windows / sizeof windows[0]; i++)
        bench_window(set, variants, windows[i]);
    for (int i = 0; i < N_VARIANTS; i++) {
        qv_mq_close(variants[i].mq);
        free(variants[i].submit.data);
    }
}

int main(int argc, char **argv)
{
    settings set;
    qv_options *options;
    if (qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv, &set,
                         &options) != QV_OK) {
        fprintf(stderr, "bench_broker: %s\n", qv_error());
        return 2;
    }
    if (qv_options_printed(options)) {
        qv_options_free(options);
        return 0;
    }
    if (set.quick) {
        set.rounds = 3;
        set.round_ms = 250;
    }
    /* All processes start before this one touches ZeroMQ. */
    process bare = start_broker(&set, run_bare), quiver = start_broker(&set, run_quiver);
    pid_t bare_worker = start_worker(bare.backend, run_bare_worker);
    pid_t quiver_worker = start_worker(quiver.backend, run_quiver_worker);
    zsys_handler_set(NULL);
    bench(&set, &bare, &quiver);
    const pid_t pids[] = {quiver_worker, bare_worker, quiver.pid, bare.pid};
    for (size_t i = 0; i < sizeof pids / sizeof pids[0]; i++) {
        kill(pids[i], SIGKILL);
        waitpid(pids[i], NULL, 0);
    }
    qv_options_free(options);
    return 0;
}
