/* Any bytes, as what a Redis server answers: every answer is well formed (hiredis sees to that, or
 * aborts), and of any type, size and content where the registry and the store of a broker expect
 * theirs. The server is a socket on the same loop; bytes of the input choose its answers.
 *
 * An answer is drawn from one byte, and more where it has contents: nil, a number, a status, an
 * error, text of the input, a word that Quiver knows, an array of answers. */
#include "broker/store.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/redis.h"
#include "common/registry.h"
#include "tests/support.h"

#include <czmq.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum {
    MAX_PEERS = 16,
    MAX_DEPTH = 3,
    OUT_MAX = 1 << 16, /* bytes of one answer */
    IN_MAX = 1 << 16,
    MAX_COMMANDS = 400,
    HASTY = 3,   /* milliseconds without a command that end an input, */
    PATIENT = 70 /* and where the link of subscriptions, which begins at a tick, is waited for */
};

static const char *const words[] = {
    "quiver:want:a",
    "quiver:want:b",
    "quiver:tenant:acme",
    "quiver:drain:w1",
    "quiver:broker:b1",
    "quiver:broker:b2",
    "quiver:jobs:b2",
    "b1",
    "b2",
    "path",
    "/adapters/a",
    "replicas",
    "2",
    "pin",
    "1",
    "split",
    "a=1 b=2",
    "workers",
    "w1,w2",
    "weight",
    "frontend",
    "tcp://h:1",
    "backend",
    "demand",
    "a=1.5 b=2",
    "state",
    "running",
    "done",
    "broker",
    "entry",
    "0-1",
    "answer",
    "submit",
    "seed",
    "tenant",
    "id",
    "acme",
    "0",
    "hash",
    "OK",
    "master",
    "notify-keyspace-events",
    "Kghx",
    "000102030405060708090a0b0c0d0e0f",
};

/* --- Answers --------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *data;
    size_t size, at;
} input;

typedef struct {
    char data[OUT_MAX];
    size_t size;
} output;

static uint8_t draw(input *in)
{
    return in->at < in->size ? in->data[in->at++] : 0;
}

static void put(output *out, const void *data, size_t size)
{
    QV_ASSERT(size <= sizeof out->data - out->size);
    memcpy(out->data + out->size, data, size);
    out->size += size;
}

__attribute__((format(printf, 2, 3))) static void putf(output *out, const char *format, ...)
{
    char text[128];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    put(out, text, (size_t)n);
}

static void put_bulk(output *out, const void *data, size_t size)
{
    putf(out, "$%zu\r\n", size);
    put(out, data, size);
    put(out, "\r\n", 2);
}

static void put_text(input *in, output *out)
{
    size_t size = draw(in) % 48;
    size = size < in->size - in->at ? size : in->size - in->at;
    put_bulk(out, in->data + in->at, size);
    in->at += size;
}

static void put_word(input *in, output *out)
{
    const char *word = words[draw(in) % (sizeof words / sizeof *words)];
    put_bulk(out, word, strlen(word));
}

static void put_answer(input *in, output *out, int depth)
{
    switch (draw(in) % 9) {
    case 0:
        putf(out, "$-1\r\n");
        break;
    case 1:
        putf(out, ":%d\r\n", (int8_t)draw(in));
        break;
    case 2:
        putf(out, "+OK\r\n");
        break;
    case 3:
        putf(out, draw(in) % 2 == 0 ? "-ERR no\r\n" : "-READONLY no\r\n");
        break;
    case 4:
        put_text(in, out);
        break;
    case 5:
    case 6:
        put_word(in, out);
        break;
    default: {
        int n = depth < MAX_DEPTH ? draw(in) % 9 : 0;
        putf(out, "*%d\r\n", n);
        for (int i = 0; i < n; i++)
            put_answer(in, out, depth + 1);
    }
    }
}

/* What SCAN and HGETALL answer when all is well, with words. */
static void put_row(input *in, output *out, bool is_scan)
{
    int n = is_scan ? draw(in) % 4 : 2 * (draw(in) % 5);
    if (is_scan) {
        putf(out, "*2\r\n");
        put_bulk(out, "0", 1);
    }
    putf(out, "*%d\r\n", n);
    for (int i = 0; i < n; i++)
        put_word(in, out);
}

static void put_info(output *out)
{
    static const char info[] = "role:master\r\nloading:0\r\nmaxmemory:1\r\n"
                               "maxmemory_policy:allkeys-lru\r\n"
                               "run_id:0123456789012345678901234567890123456789\r\n";
    put_bulk(out, info, sizeof info - 1);
}

/* --- The server ------------------------------------------------------------------------------ */

typedef struct {
    int fd;
    bool subscribes;
    char in[IN_MAX];
    size_t size;
} peer;

typedef struct {
    peer *peers[MAX_PEERS];
    size_t n_peers;
    input script;
    int n_commands, n_seen, n_quiet, patience;
} server;

/* One command at the start of the text, all bytes of it; 0 = it is not whole. Its name goes to
 * `name`, in capitals as we write it, and its second word to `word`. */
static size_t take_command(const char *text, size_t size, char name[32], char word[256])
{
    const char *end = memchr(text, '\n', size);
    if (end == NULL)
        return 0;
    long n = strtol(text + 1, NULL, 10);
    size_t at = (size_t)(end - text) + 1;
    name[0] = word[0] = '\0';
    for (long i = 0; i < n; i++) {
        end = memchr(text + at, '\n', size - at);
        if (end == NULL)
            return 0;
        size_t length = strtoul(text + at + 1, NULL, 10);
        at = (size_t)(end - text) + 1;
        if (size - at < length + 2)
            return 0;
        if (i == 0)
            snprintf(name, 32, "%.*s", (int)length, text + at);
        if (i == 1)
            snprintf(word, 256, "%.*s", (int)length, text + at);
        at += length + 2;
    }
    return at;
}

/* What hiredis takes on a link that subscribes is little: a confirmation, and messages. */
static void answer_subscribe(server *s, const char *pattern, output *out)
{
    putf(out, "*3\r\n");
    put_bulk(out, "psubscribe", 10);
    put_bulk(out, pattern, strlen(pattern));
    putf(out, ":1\r\n");
    for (int n = draw(&s->script) % 4; n > 0; n--) {
        putf(out, "*4\r\n");
        put_bulk(out, "pmessage", 8);
        put_bulk(out, pattern, strlen(pattern));
        put_text(&s->script, out);
        put_text(&s->script, out);
    }
}

static void answer(server *s, peer *p, const char *name, const char *word)
{
    static output out;
    out.size = 0;
    s->n_commands++;
    if (strcmp(name, "PSUBSCRIBE") == 0) {
        p->subscribes = true;
        answer_subscribe(s, word, &out);
    } else if (p->subscribes) {
        return;
    } else if (strcmp(name, "CLIENT") == 0) {
        putf(&out, "+OK\r\n");
    } else if (strcmp(name, "INFO") == 0 && draw(&s->script) % 8 != 7) {
        put_info(&out);
    } else if ((strcmp(name, "SCAN") == 0 || strcmp(name, "HGETALL") == 0) &&
               draw(&s->script) % 4 != 3) {
        put_row(&s->script, &out, name[0] == 'S');
    } else if (strcmp(name, "MULTI") == 0) {
        putf(&out, "+OK\r\n");
    } else {
        put_answer(&s->script, &out, 0);
    }
    (void)!send(p->fd, out.data, out.size, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static int on_command(zloop_t *loop, zmq_pollitem_t *item, void *arg)
{
    server *s = arg;
    peer *p = NULL;
    for (size_t i = 0; i < s->n_peers; i++)
        if (s->peers[i]->fd == item->fd)
            p = s->peers[i];
    ssize_t n = recv(p->fd, p->in + p->size, sizeof p->in - p->size, MSG_DONTWAIT);
    if (n <= 0) {
        zloop_poller_end(loop, item);
        return 0;
    }
    p->size += (size_t)n;
    char name[32], word[256];
    size_t at = 0;
    for (size_t size; (size = take_command(p->in + at, p->size - at, name, word)) > 0; at += size)
        answer(s, p, name, word);
    memmove(p->in, p->in + at, p->size - at);
    p->size -= at;
    return 0;
}

static int on_connection(zloop_t *loop, zmq_pollitem_t *item, void *arg)
{
    server *s = arg;
    int fd = accept4(item->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0 || s->n_peers == MAX_PEERS) {
        if (fd >= 0)
            close(fd);
        return 0;
    }
    peer *p = s->peers[s->n_peers++] = calloc(1, sizeof *p);
    QV_ASSERT(p != NULL);
    p->fd = fd;
    zmq_pollitem_t reader = {.fd = fd, .events = ZMQ_POLLIN};
    QV_ASSERT(zloop_poller(loop, &reader, on_command, s) == 0);
    return 0;
}

static int open_listener(char url[128])
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s/r", qv_temp_dir());
    snprintf(url, 128, "unix://%s", address.sun_path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    QV_ASSERT(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0 &&
              listen(fd, MAX_PEERS) == 0);
    return fd;
}

/* --- The broker's side ----------------------------------------------------------------------- */

typedef struct {
    qv_core *core;
    qv_store *store;
    qv_registry *registry;
} broker;

static void on_want(const char *name, const qv_want *want, void *user)
{
    (void)user;
    QV_ASSERT(name != NULL && (want == NULL || want->path != NULL || want->n_split > 0));
}

static void on_invalid(const char *name, const char *reason, void *user)
{
    (void)user;
    QV_ASSERT(name != NULL && reason != NULL);
}

static void on_tenant(const char *name, const qv_tenant_want *want, void *user)
{
    (void)user;
    QV_ASSERT(name != NULL && (want == NULL || want->weight > 0));
}

static void on_drain(const char *id, bool drain, void *user)
{
    (void)drain, (void)user;
    QV_ASSERT(id != NULL);
}

static void on_brokers(qv_status status, const qv_broker_address *brokers, size_t n, void *user)
{
    (void)user;
    for (size_t i = 0; status == QV_OK && i < n; i++)
        QV_ASSERT(brokers[i].id != NULL && brokers[i].demand != NULL);
}

static qv_status send_any(void *user, const qv_mq_peer *to, const qv_message *message)
{
    (void)user, (void)to, (void)message;
    return QV_OK;
}

static void publish(void *user, const qv_group *group)
{
    (void)user, (void)group;
}

static void retract(void *user, const char *adapter)
{
    (void)user, (void)adapter;
}

static void event(void *user, const char *what, const char *adapter, const char *worker,
                  const char *why)
{
    (void)user, (void)what, (void)adapter, (void)worker, (void)why;
}

static void observe(void *user, qv_core_duration duration, uint64_t us)
{
    (void)user, (void)duration, (void)us;
}

static qv_status put_durable(void *user, const qv_durable *durable)
{
    return qv_store_put(((broker *)user)->store, durable);
}

static void finish(void *user, const qv_durable *durable, const void *data, size_t size)
{
    qv_store_finish(((broker *)user)->store, durable, data, size);
}

static bool look_up(void *user, const qv_mq_peer *to, const qv_msg_resume_request *request)
{
    return qv_store_look_up(((broker *)user)->store, to, request);
}

static void say(broker *b, const qv_message *message)
{
    static qv_arena arena = {.limit_bytes = 1 << 20};
    const qv_mq_peer client = {.size = 1, .id = "c"};
    const void *data;
    size_t size;
    qv_arena_reset(&arena);
    QV_ASSERT(qv_message_encode(message, &arena, &data, &size) == QV_OK);
    qv_core_from_client(b->core, &client, data, size, qv_now_us());
}

/* The registry's link is up: a client submits a durable request and asks for another one. */
static void on_up(void *user)
{
    broker *b = user;
    qv_message submit, resume;
    qv_registry_find_brokers(b->registry, on_brokers, NULL);
    qv_message_init(&submit, QV_MSG_SUBMIT);
    submit.submit.id = qv_str_from("a");
    qv_set(&submit.submit, submit, prompt, qv_str_from("x"));
    qv_set(&submit.submit, submit, durable, true);
    say(b, &submit);
    qv_message_init(&resume, QV_MSG_RESUME);
    resume.resume_request.id = qv_str_from("z");
    say(b, &resume);
}

static void open_broker(broker *b, zloop_t *loop, const char *url)
{
    qv_core_options core_options = qv_core_default_options();
    core_options.max_explained = 0;
    const qv_core_actions actions = {.user = b,
                                     .send_client = send_any,
                                     .send_worker = send_any,
                                     .publish = publish,
                                     .retract = retract,
                                     .event = event,
                                     .observe = observe,
                                     .store = put_durable,
                                     .finish = finish,
                                     .look_up = look_up};
    QV_ASSERT(qv_core_new(&core_options, &actions, 1, &b->core) == QV_OK);
    qv_core_wants_known(b->core);
    const qv_store_options store_options = {.url = url,
                                            .broker = "b1",
                                            .frontend = "tcp://h:1",
                                            .lease_ms = 1500,
                                            .keep_ms = 1000,
                                            .core = b->core};
    QV_ASSERT(qv_store_new(loop, &store_options, &b->store) == QV_OK);
    const qv_registry_options registry_options = {.url = url,
                                                  .who = "b1",
                                                  .watch = true,
                                                  .up = on_up,
                                                  .want_changed = on_want,
                                                  .want_invalid = on_invalid,
                                                  .tenant_changed = on_tenant,
                                                  .drain_changed = on_drain,
                                                  .user = b};
    QV_ASSERT(qv_registry_new(loop, &registry_options, &b->registry) == QV_OK);
}

/* --- One input ------------------------------------------------------------------------------- */

/* Once a millisecond: the input is at its end when nothing was asked for some time. */
static int on_quiet(zloop_t *loop, int timer, void *user)
{
    (void)loop, (void)timer;
    server *s = user;
    s->n_quiet = s->n_commands == s->n_seen ? s->n_quiet + 1 : 0;
    s->n_seen = s->n_commands;
    return s->n_quiet >= s->patience || s->n_commands > MAX_COMMANDS ? -1 : 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char url[128];
    static int listener = -1;
    if (listener < 0) {
        listener = open_listener(url);
        qv_log_set_level(QV_LOG_ERROR);
        zsys_handler_set(NULL);
    }
    server s = {.script = {data, size, 0}};
    broker b = {0};
    zloop_t *loop = zloop_new();
    zmq_pollitem_t item = {.fd = listener, .events = ZMQ_POLLIN};
    QV_ASSERT(loop != NULL && zloop_poller(loop, &item, on_connection, &s) == 0);
    s.patience = draw(&s.script) % 16 == 0 ? PATIENT : HASTY;
    open_broker(&b, loop, url);
    zloop_timer(loop, 1, 0, on_quiet, &s);
    zloop_start(loop);
    qv_registry_free(b.registry);
    qv_store_free(b.store);
    qv_core_tick(b.core, qv_now_us());
    QV_ASSERT(qv_core_check(b.core) == QV_OK);
    qv_core_free(b.core);
    zloop_destroy(&loop);
    for (size_t i = 0; i < s.n_peers; i++) {
        close(s.peers[i]->fd);
        free(s.peers[i]);
    }
    return 0;
}
