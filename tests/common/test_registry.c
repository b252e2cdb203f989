/* Redis client, mirror and registry against a real redis-server that each test starts for itself on
 * a socket in a temporary folder. */
#include "common/registry.h"

#include "common/clock.h"
#include "common/mirror.h"
#include "common/redis.h"
#include "tests/support.h"

#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <czmq.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEADLINE_MS 15000

/* --- a server -------------------------------------------------------------------------------- */

typedef struct {
    pid_t pid;
    const char *dir;
    char socket[128];
    char url[160];
    uint16_t port;       /* 0: no TCP */
    const char *args[8]; /* further arguments */
    redisContext *admin; /* the operator's blocking connection */
} server;

static bool have_redis(void)
{
    return system("command -v redis-server >/dev/null 2>&1") == 0;
}

#define NEEDS_REDIS()                                                                              \
    do {                                                                                           \
        if (!have_redis())                                                                         \
            cr_skip_test("redis-server is not installed");                                         \
    } while (0)

static bool answers(void *user)
{
    server *s = user;
    if (s->admin != NULL)
        redisFree(s->admin);
    s->admin = redisConnectUnix(s->socket);
    if (s->admin == NULL || s->admin->err != 0)
        return false;
    redisReply *reply = redisCommand(s->admin, "PING");
    bool ok = reply != NULL && (reply->type == REDIS_REPLY_STATUS ||
                                (reply->str != NULL && strstr(reply->str, "NOAUTH") != NULL));
    freeReplyObject(reply);
    return ok;
}

static void server_spawn(server *s)
{
    char port[8];
    snprintf(port, sizeof port, "%u", s->port);
    const char *argv[32] = {
        "redis-server", "--port", port, "--unixsocket", s->socket,  "--dir", s->dir, "--bind",
        "127.0.0.1",    "--save", "",   "--logfile",    "redis.log"};
    int argc = 13;
    for (size_t i = 0; i < 8 && s->args[i] != NULL; i++)
        argv[argc++] = s->args[i];
    s->pid = fork();
    cr_assert_neq(s->pid, -1);
    if (s->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves no server behind */
        execvp(argv[0], (char **)argv);
        _exit(127);
    }
}

static void server_start(server *s)
{
    s->dir = s->dir != NULL ? s->dir : qv_temp_dir();
    snprintf(s->socket, sizeof s->socket, "%s/r.sock", s->dir);
    snprintf(s->url, sizeof s->url, "unix://%s", s->socket);
    server_spawn(s);
    cr_assert(qv_wait_until(answers, s, DEADLINE_MS), "redis-server does not start");
}

static void server_stop(server *s)
{
    if (s->admin != NULL)
        redisFree(s->admin);
    s->admin = NULL;
    if (s->pid > 0) {
        kill(s->pid, SIGKILL);
        waitpid(s->pid, NULL, 0);
    }
    s->pid = 0;
}

/* Run a command as an operator; the integer of the answer, -1 for an error or nil. */
__attribute__((format(printf, 2, 3))) static long long op(server *s, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    redisReply *reply = redisvCommand(s->admin, format, args);
    va_end(args);
    cr_assert(reply != NULL, "%s: %s", format, s->admin->errstr);
    long long value = reply->type == REDIS_REPLY_INTEGER ? reply->integer
                      : reply->type == REDIS_REPLY_ERROR || reply->type == REDIS_REPLY_NIL ? -1
                                                                                           : 0;
    freeReplyObject(reply);
    return value;
}

/* The text of an answer, "" for nil; static. */
__attribute__((format(printf, 2, 3))) static const char *ask(server *s, const char *format, ...)
{
    static char text[4][512];
    static int turn;
    char *out = text[turn++ % 4];
    va_list args;
    va_start(args, format);
    redisReply *reply = redisvCommand(s->admin, format, args);
    va_end(args);
    cr_assert_not_null(reply);
    snprintf(out, sizeof text[0], "%s", reply->str != NULL ? reply->str : "");
    freeReplyObject(reply);
    return out;
}

/* --- a loop that runs until something is true ------------------------------------------------ */

typedef struct {
    bool (*done)(void *user);
    void *user;
    uint64_t deadline_ms;
    bool ok;
} pump;

static int on_pump(zloop_t *loop, int timer_id, void *arg)
{
    (void)loop, (void)timer_id;
    pump *p = arg;
    p->ok = p->done(p->user);
    return p->ok || qv_now_ms() >= p->deadline_ms ? -1 : 0;
}

static bool run_until(zloop_t *loop, bool (*done)(void *user), void *user, uint64_t ms)
{
    pump p = {.done = done, .user = user, .deadline_ms = qv_now_ms() + ms};
    int timer_id = zloop_timer(loop, 2, 0, on_pump, &p);
    zloop_start(loop);
    zloop_timer_end(loop, timer_id);
    return p.ok;
}

static bool never(void *user)
{
    (void)user;
    return false;
}

/* --- the client ------------------------------------------------------------------------------ */

typedef struct {
    server server;
    zloop_t *loop;
    qv_redis *redis;
    int n_up, n_down, n_answers, n_busy, n_busy_at_down;
    qv_status status;
    char answer[256], reason[256];
    int n_held, n_messages;
    char channel[128], payload[128];
} client;

static void on_up(void *user)
{
    ((client *)user)->n_up++;
}

static void on_down(const char *reason, void *user)
{
    client *c = user;
    c->n_down++;
    c->n_busy_at_down = c->n_busy;
    snprintf(c->reason, sizeof c->reason, "%s", reason);
}

static void on_answer(qv_status status, const redisReply *reply, void *user)
{
    client *c = user;
    c->n_answers++;
    c->n_busy += status == QV_ERR_BUSY;
    c->status = status;
    if (status == QV_OK && reply->type == REDIS_REPLY_INTEGER)
        snprintf(c->answer, sizeof c->answer, "%lld", reply->integer);
    else if (reply != NULL && reply->str != NULL)
        snprintf(c->answer, sizeof c->answer, "%s", reply->str);
}

static void on_message(const char *channel, const char *payload, size_t size, void *user)
{
    client *c = user;
    if (channel == NULL) {
        c->n_held++;
        return;
    }
    c->n_messages++;
    snprintf(c->channel, sizeof c->channel, "%s", channel);
    snprintf(c->payload, sizeof c->payload, "%.*s", (int)size, payload);
}

static bool is_up(void *user)
{
    return qv_redis_is_up(((client *)user)->redis);
}

static bool is_down(void *user)
{
    return !is_up(user);
}

static bool has_answer(void *user)
{
    return ((client *)user)->n_answers > 0;
}

static void client_open(client *c, const char *url)
{
    qv_redis_options options = {.url = url,
                                .name = "tester",
                                .connect_timeout_ms = 400,
                                .command_timeout_ms = 400,
                                .ping_ms = 200,
                                .backoff_min_ms = 20,
                                .backoff_max_ms = 200,
                                .max_outstanding = 8,
                                .on_up = on_up,
                                .on_down = on_down,
                                .user = c};
    c->loop = zloop_new();
    cr_assert_eq(qv_redis_new(c->loop, &options, &c->redis), QV_OK, "%s", qv_error());
}

static void client_close(client *c)
{
    qv_redis_free(c->redis);
    zloop_destroy(&c->loop);
    server_stop(&c->server);
}

static const char *client_ask(client *c, const char *format, const char *word)
{
    c->n_answers = 0;
    c->answer[0] = 0;
    qv_redis_commandf(c->redis, on_answer, c, format, word);
    cr_assert(run_until(c->loop, has_answer, c, DEADLINE_MS));
    return c->answer;
}

Test(redis, refuses_malformed_urls_without_telling_the_password)
{
    static const struct {
        const char *url;
        bool good;
    } rows[] = {
        {"redis://localhost", true},
        {"redis://127.0.0.1:6380/3", true},
        {"redis://[::1]:6379", true},
        {"redis://:geheim@host:1", true},
        {"redis://me:geh%65im@host", true},
        {"redis://me:p@ss@host", true},
        {"unix:///run/redis.sock", true},
        {"unix:///run/redis.sock?db=2", true},
        {"unix://:geheim@/run/redis.sock", true},
        {"redis://a,redis://:geheim@b:1,unix:///c", true},
        {"redis://:a,b@host", true},
        {"redis://a/2,unix:///c?db=2", true},
        {"redis://a/2,redis://:geheim@b/3", false},
        {"redis://a,rediss://:geheim@b", false},
        {"redis://a,redis://", false},
        {"redis://a,b", false},
        {"redis://a,redis://a,redis://a,redis://a,redis://a,redis://a,redis://a,redis://a", true},
        {"redis://a,redis://a,redis://a,redis://a,redis://a,redis://a,redis://a,redis://a,redis://"
         "a",
         false},
        {"", false},
        {"localhost:6379", false},
        {"rediss://host", false},
        {"redis://", false},
        {"redis://:geheim@", false},
        {"redis://:geheim@:6379", false},
        {"redis://geheim@host", false},
        {"redis://me:geheim%4@host", false},
        {"redis://me:geheim%00@host", false},
        {"redis://:geheim@host:", false},
        {"redis://:geheim@host:0", false},
        {"redis://:geheim@host:65536", false},
        {"redis://:geheim@host:12x", false},
        {"redis://:geheim@host/x", false},
        {"redis://:geheim@host/-1", false},
        {"redis://:geheim@[::1", false},
        {"redis://:geheim@[::1]x", false},
        {"unix://", false},
        {"unix:///", false},
        {"unix://relative", false},
        {"unix://:geheim@host/path", false},
        {"unix://:geheim@/path?db=", false},
        {"unix://:geheim@/path?x=1", false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_status status = qv_redis_check_url(rows[i].url);
        cr_expect_eq(status, rows[i].good ? QV_OK : QV_ERR_ARG, "row %zu: '%s'", i, rows[i].url);
        if (status != QV_OK && strstr(rows[i].url, "geheim@host/") == NULL &&
            strncmp(rows[i].url, "redis://geheim", 14) != 0)
            cr_expect(strstr(qv_error(), "geheim") == NULL, "row %zu: %s", i, qv_error());
    }
    cr_expect_eq(qv_redis_check_url(NULL), QV_ERR_ARG);
    cr_expect_eq(qv_redis_check_url("redis://a:1,foo://:geheim@b"), QV_ERR_ARG);
    cr_expect_str_eq(qv_error(), "'foo://:***@b' is no Redis url (redis://host:port/db or "
                                 "unix:///path)");
}

Test(redis, answers_commands_in_order_with_binary_words)
{
    NEEDS_REDIS();
    client c = {0};
    server_start(&c.server);
    client_open(&c, c.server.url);
    cr_assert_eq(qv_redis_room(c.redis), 0);
    cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS));
    cr_expect_eq(c.n_up, 1);
    cr_expect_eq(strlen(qv_redis_run_id(c.redis)), 40);
    qv_redis_command(c.redis, 3, (const char *[]){"SET", "k", "a\0 b\r\n"}, (size_t[]){3, 1, 6},
                     NULL, NULL);
    cr_expect_str_eq(client_ask(&c, "STRLEN %s", "k"), "6");
    cr_expect(strstr(ask(&c.server, "CLIENT LIST"), "name=tester") != NULL);
    client_ask(&c, "INCR %s", "k");
    cr_expect_eq(c.status, QV_ERR_STATE);
    cr_expect(strstr(c.answer, "not an integer") != NULL, "%s", c.answer);
    client_close(&c);
}

Test(redis, fails_commands_at_once_while_down_or_full)
{
    NEEDS_REDIS();
    client c = {0};
    server_start(&c.server);
    client_open(&c, c.server.url);
    qv_redis_commandf(c.redis, on_answer, &c, "PING");
    cr_expect_eq(c.n_busy, 1);
    cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS));
    for (int i = 0; i < 10; i++)
        qv_redis_commandf(c.redis, on_answer, &c, "PING");
    cr_expect_eq(c.n_busy, 3, "8 of 10 fit");
    cr_expect_eq(qv_redis_room(c.redis), 0);
    qv_redis_free(c.redis);
    cr_expect_eq(c.status, QV_ERR_CANCELLED);
    cr_expect_eq(c.n_answers, 11);
    cr_expect_eq(c.n_down, 0);
    c.redis = NULL;
    client_close(&c);
}

Test(redis, comes_back_after_a_restart_and_fails_what_was_open)
{
    NEEDS_REDIS();
    client c = {0};
    server_start(&c.server);
    client_open(&c, c.server.url);
    cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS));
    for (int round = 1; round <= 3; round++) {
        c.n_busy = 0;
        server_stop(&c.server);
        qv_redis_commandf(c.redis, on_answer, &c, "PING");
        cr_assert(run_until(c.loop, is_down, &c, DEADLINE_MS));
        cr_expect_eq(c.n_down, round);
        cr_expect_eq(c.n_busy_at_down, 1, "the open command fails before on_down");
        server_start(&c.server);
        cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS));
        cr_expect_eq(c.n_up, round + 1);
        cr_expect_str_eq(client_ask(&c, "ECHO %s", "again"), "again");
    }
    client_close(&c);
}

Test(redis, gives_a_silent_server_up)
{
    NEEDS_REDIS();
    client c = {0};
    server_start(&c.server);
    client_open(&c, c.server.url);
    cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS));
    cr_assert(!run_until(c.loop, is_down, &c, 800), "an idle link is kept by pings");
    kill(c.server.pid, SIGSTOP);
    uint64_t start = qv_now_ms();
    cr_assert(run_until(c.loop, is_down, &c, DEADLINE_MS));
    cr_expect_lt(qv_now_ms() - start, 5000);
    cr_expect(strstr(c.reason, "no answer") != NULL, "%s", c.reason);
    cr_assert(!run_until(c.loop, is_up, &c, 700), "connecting to it times out as well");
    kill(c.server.pid, SIGCONT);
    cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS));
    client_close(&c);
}

Test(redis, survives_servers_that_are_something_else)
{
    static const char *const greetings[] = {"", "HTTP/1.1 400 Bad Request\r\n\r\n",
                                            "-ERR max number of clients reached\r\n", "\xff\xfe"};
    for (size_t i = 0; i < sizeof greetings / sizeof *greetings; i++) {
        client c = {0};
        struct sockaddr_in address = {.sin_family = AF_INET,
                                      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t size = sizeof address;
        int listener = socket(AF_INET, SOCK_STREAM, 0);
        cr_assert_eq(bind(listener, (struct sockaddr *)&address, size), 0);
        cr_assert_eq(listen(listener, 8), 0);
        cr_assert_eq(getsockname(listener, (struct sockaddr *)&address, &size), 0);
        snprintf(c.server.url, sizeof c.server.url, "redis://127.0.0.1:%u",
                 ntohs(address.sin_port));
        client_open(&c, c.server.url);
        run_until(c.loop, never, NULL, 60);
        int peer = accept(listener, NULL, NULL);
        cr_assert_neq(peer, -1);
        cr_assert_eq(write(peer, greetings[i], strlen(greetings[i])),
                     (ssize_t)strlen(greetings[i]));
        cr_expect(!run_until(c.loop, is_up, &c, 600), "greeting %zu", i);
        close(peer);
        close(listener);
        run_until(c.loop, never, NULL, 60);
        client_close(&c);
    }
}

Test(redis, authenticates_and_selects_a_database)
{
    NEEDS_REDIS();
    client c = {.server.args = {"--requirepass", "se cret"}};
    char url[256];
    server_start(&c.server);
    op(&c.server, "AUTH %s", "se cret");
    op(&c.server, "ACL SETUSER bob on >pw ~* +@all");

    snprintf(url, sizeof url, "unix://:wrong@%s", c.server.socket);
    client_open(&c, url);
    cr_expect(!run_until(c.loop, is_up, &c, 300));
    qv_redis_free(c.redis);
    zloop_destroy(&c.loop);

    snprintf(url, sizeof url, "unix://:se%%20cret@%s?db=3", c.server.socket);
    client_open(&c, url);
    cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS));
    cr_expect_eq(qv_redis_db(c.redis), 3);
    client_ask(&c, "SET three %s", "x");
    op(&c.server, "SELECT 3");
    cr_expect_str_eq(ask(&c.server, "GET three"), "x");
    qv_redis_free(c.redis);
    zloop_destroy(&c.loop);

    snprintf(url, sizeof url, "unix://bob:pw@%s", c.server.socket);
    client_open(&c, url);
    cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS));
    cr_expect_str_eq(client_ask(&c, "ACL WHOAMI%s", ""), "bob");
    client_close(&c);
}

Test(redis, looks_host_names_up)
{
    NEEDS_REDIS();
    client c = {.server.port = qv_free_port()};
    char url[64];
    server_start(&c.server);
    snprintf(url, sizeof url, "redis://localhost:%u", c.server.port);
    client_open(&c, url);
    cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS));
    client_close(&c);

    client lost = {0};
    client_open(&lost, "redis://no-such-host.invalid");
    cr_expect(!run_until(lost.loop, is_up, &lost, 200));
    client_close(&lost);
}

Test(redis, refuses_a_read_only_replica)
{
    NEEDS_REDIS();
    client c = {.server.args = {"--replicaof", "127.0.0.1 1"}};
    server_start(&c.server);
    client_open(&c, c.server.url);
    cr_expect(!run_until(c.loop, is_up, &c, 400));
    op(&c.server, "REPLICAOF NO ONE");
    cr_assert(run_until(c.loop, is_up, &c, DEADLINE_MS), "promoted");
    op(&c.server, "REPLICAOF 127.0.0.1 1");
    client_ask(&c, "SET k %s", "v");
    cr_assert(run_until(c.loop, is_down, &c, DEADLINE_MS), "demoted");
    client_close(&c);
}

static bool is_held(void *user)
{
    return ((client *)user)->n_held > 0;
}

static bool has_message(void *user)
{
    return ((client *)user)->n_messages > 0;
}

/* The link is up and its subscription with it, at this server and no other. */
static void expect_at(client *c, server *where, const char *case_name)
{
    cr_assert(run_until(c->loop, is_up, c, DEADLINE_MS), "%s", case_name);
    c->n_messages = 0;
    for (int i = 0; i < 200 && op(where, "PUBLISH news.today hello") < 1; i++)
        run_until(c->loop, never, NULL, 20);
    cr_assert(run_until(c->loop, has_message, c, DEADLINE_MS), "%s", case_name);
    client_ask(c, "SET here %s", case_name);
    cr_expect_str_eq(ask(where, "GET here"), case_name);
}

Test(redis, follows_the_server_that_takes_writes)
{
    NEEDS_REDIS();
    client c = {.server.args = {"--replicaof", "127.0.0.1 1"}};
    server other = {0};
    char urls[400];
    server_start(&c.server);
    server_start(&other);
    snprintf(urls, sizeof urls, "redis://127.0.0.1:1,%s,%s", c.server.url, other.url);
    client_open(&c, urls);
    cr_assert_eq(qv_redis_subscribe(c.redis, "news.*", on_message, &c), QV_OK);
    expect_at(&c, &other, "one is away, one a replica");

    op(&c.server, "REPLICAOF NO ONE");
    op(&other, "REPLICAOF 127.0.0.1 1");
    client_ask(&c, "SET k %s", "v");
    expect_at(&c, &c.server, "the first was demoted");

    op(&other, "REPLICAOF NO ONE");
    server_stop(&c.server);
    cr_assert(run_until(c.loop, is_down, &c, DEADLINE_MS));
    expect_at(&c, &other, "the second was killed");
    server_stop(&other);
    client_close(&c);
}

Test(redis, subscribes_again_after_a_restart)
{
    NEEDS_REDIS();
    client c = {0};
    server_start(&c.server);
    client_open(&c, c.server.url);
    cr_assert_eq(qv_redis_subscribe(c.redis, "news.*", on_message, &c), QV_OK);
    for (int round = 0; round < 2; round++) {
        cr_assert(run_until(c.loop, is_held, &c, DEADLINE_MS));
        cr_assert(!run_until(c.loop, has_message, &c, 700), "pings are no messages");
        cr_expect_eq(c.n_held, 1);
        op(&c.server, "PUBLISH news.today hello");
        cr_assert(run_until(c.loop, has_message, &c, DEADLINE_MS));
        cr_expect_str_eq(c.channel, "news.today");
        cr_expect_str_eq(c.payload, "hello");
        server_stop(&c.server);
        cr_assert(run_until(c.loop, is_down, &c, DEADLINE_MS));
        c.n_held = c.n_messages = 0;
        server_start(&c.server);
    }
    client_close(&c);
}

/* --- wants ----------------------------------------------------------------------------------- */

Test(want, parses_what_people_write)
{
    static const struct {
        const char *fields[8]; /* name, value, ... */
        const char *path;      /* NULL: an error ... */
        const char *error;     /* ... that says this */
        int replicas, pin, workers;
    } rows[] = {
        {{"path", "/a"}, "/a", NULL, 1, 0, 0},
        {{"path", " /a b\t", "replicas", " 2 ", "pin", "1"}, "/a b", NULL, 2, 1, 0},
        {{"replicas", "0", "path", "/a", "pin", "false"}, "/a", NULL, 0, 0, 0},
        {{"path", "/a", "workers", "w1, w2,,w-3"}, "/a", NULL, 1, 0, 3},
        {{"path", "/a", "workers", ""}, "/a", NULL, 1, 0, 0},
        {{"path", "/a", "note", "\xff"}, "/a", NULL, 1, 0, 0},
        {.fields = {"replicas", "2"}, .error = "no path"},
        {.fields = {NULL}, .error = "no path"},
        {.fields = {"path", ""}, .error = "path is empty"},
        {.fields = {"path", "  "}, .error = "path is empty"},
        {.fields = {"path", "/\xff"}, .error = "UTF-8"},
        {.fields = {"path", "/a", "replicas", "two"}, .error = "'two'"},
        {.fields = {"path", "/a", "replicas", "-1"}, .error = "'-1'"},
        {.fields = {"path", "/a", "replicas", "1.5"}, .error = "'1.5'"},
        {.fields = {"path", "/a", "replicas", ""}, .error = "replicas"},
        {.fields = {"path", "/a", "replicas", "1025"}, .error = "1025"},
        {.fields = {"path", "/a", "replicas", "99999999999999999999"}, .error = "replicas"},
        {.fields = {"path", "/a", "pin", "2"}, .error = "pin is '2'"},
        {.fields = {"path", "/a", "workers", "w1,w/2"}, .error = "workers: an id"},
        {{"path", "/a", "replicas", "2", "max_replicas", "3"}, "/a", NULL, 2, 0, 0},
        {.fields = {"path", "/a", "replicas", "3", "max_replicas", "2"}, .error = "below replicas"},
        {.fields = {"path", "/a", "tenants", "acme,\xff"}, .error = "tenant"},
        {.fields = {"split", ""}, .error = "no path"},
        {.fields = {"split", "a=0 b=0"}, .error = "all weights are 0"},
        {.fields = {"split", "a=1x"}, .error = "'1x'"},
        {.fields = {"split", "a b/c"}, .error = "split: "},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_want_field fields[4];
        size_t n = 0;
        for (; n < 4 && rows[i].fields[2 * n] != NULL; n++)
            fields[n] = (qv_want_field){.name = rows[i].fields[2 * n],
                                        .value = rows[i].fields[2 * n + 1],
                                        .name_size = strlen(rows[i].fields[2 * n]),
                                        .value_size = strlen(rows[i].fields[2 * n + 1])};
        qv_want_box *box = NULL;
        qv_status status = qv_want_parse(fields, n, &box);
        if (rows[i].path == NULL) {
            cr_expect_eq(status, QV_ERR_ARG, "row %zu", i);
            cr_expect(strstr(qv_error(), rows[i].error) != NULL, "row %zu: %s", i, qv_error());
            continue;
        }
        cr_assert_eq(status, QV_OK, "row %zu: %s", i, qv_error());
        const qv_want *want = qv_want_get(box);
        cr_expect_str_eq(want->path, rows[i].path);
        cr_expect_eq(want->replicas, rows[i].replicas, "row %zu", i);
        cr_expect_eq(want->pin, rows[i].pin, "row %zu", i);
        cr_expect_eq(want->n_workers, (size_t)rows[i].workers, "row %zu", i);
        cr_expect(qv_want_equal(want, want));
        qv_want_free(box);
    }
    qv_want_free(NULL);
}

static qv_want_field field(const char *name, const char *value)
{
    return (qv_want_field){name, value, strlen(name), strlen(value)};
}

Test(want, reads_splits_and_tenants)
{
    qv_want_field fields[] = {field("split", "sql-v1=95, sql-v2"), field("tenants", "acme zeta")};
    qv_want_box *box, *other;
    cr_assert_eq(qv_want_parse(fields, 2, &box), QV_OK, "%s", qv_error());
    const qv_want *want = qv_want_get(box);
    cr_assert_null(want->path);
    cr_assert_eq(want->n_split, 2);
    cr_assert_str_eq(want->split[0].adapter, "sql-v1");
    cr_assert_eq(want->split[0].weight, 95);
    cr_assert_eq(want->split[1].weight, 1);
    cr_assert_eq(want->n_tenants, 2);
    cr_assert_str_eq(want->tenants[1], "zeta");
    fields[0] = field("split", "sql-v1=94, sql-v2");
    cr_assert_eq(qv_want_parse(fields, 2, &other), QV_OK);
    cr_assert_not(qv_want_equal(want, qv_want_get(other)));
    qv_want_free(box);
    qv_want_free(other);
}

Test(want, of_a_tenant_has_a_weight_and_limits)
{
    static const struct {
        const char *name, *value, *error;
    } rows[] = {{"weight", "2.5", NULL},
                {"max_queued", "10", NULL},
                {"note", "x", NULL},
                {"weight", "0", "weight"},
                {"weight", "nan", "weight"},
                {"weight", "", "weight"},
                {"weight", "1e9", "weight"},
                {"max_running", "-1", "'-1'"},
                {"max_queued", "many", "'many'"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_want_field one = field(rows[i].name, rows[i].value);
        qv_tenant_want want;
        qv_status status = qv_tenant_want_parse(&one, 1, &want);
        cr_expect_eq(status, rows[i].error != NULL ? QV_ERR_ARG : QV_OK, "row %zu", i);
        if (rows[i].error != NULL)
            cr_expect(strstr(qv_error(), rows[i].error), "row %zu: %s", i, qv_error());
    }
}

/* --- the registry ---------------------------------------------------------------------------- */

typedef struct {
    server server;
    zloop_t *loop;
    qv_registry *registry;
    int n_up, n_down, n_synced, n_changed, n_deleted, n_invalid;
    char last[160];    /* "name path replicas pin workers" or "name -" */
    char invalid[256]; /* "name: reason" */
    bool done, existed;
    qv_status status;
    char brokers[256]; /* "id=frontend,backend;" */
    int n_settings;
    char setting[160]; /* "tenant name weight", "tenant name -", "drain id 1" */
} watcher;

static void watch_up(void *user)
{
    ((watcher *)user)->n_up++;
}

static void watch_down(const char *reason, void *user)
{
    (void)reason;
    ((watcher *)user)->n_down++;
}

static void watch_synced(void *user)
{
    ((watcher *)user)->n_synced++;
}

static void watch_changed(const char *name, const qv_want *want, void *user)
{
    watcher *w = user;
    if (want == NULL) {
        w->n_deleted++;
        snprintf(w->last, sizeof w->last, "%s -", name);
        return;
    }
    w->n_changed++;
    snprintf(w->last, sizeof w->last, "%s %s %d %d %zu", name, want->path, (int)want->replicas,
             want->pin, want->n_workers);
}

static void watch_tenant(const char *name, const qv_tenant_want *want, void *user)
{
    watcher *w = user;
    w->n_settings++;
    if (want != NULL)
        snprintf(w->setting, sizeof w->setting, "tenant %s %g", name, want->weight);
    else
        snprintf(w->setting, sizeof w->setting, "tenant %s -", name);
}

static void watch_drain(const char *id, bool drain, void *user)
{
    watcher *w = user;
    w->n_settings++;
    snprintf(w->setting, sizeof w->setting, "drain %s %d", id, drain);
}

static void watch_invalid(const char *name, const char *reason, void *user)
{
    watcher *w = user;
    w->n_invalid++;
    snprintf(w->invalid, sizeof w->invalid, "%s: %s", name, reason);
}

static void watcher_open(watcher *w, const char *url, const char *who, int64_t scan_ms)
{
    qv_registry_options options = {.url = url,
                                   .who = who,
                                   .watch = true,
                                   .scan_ms = scan_ms,
                                   .lease_ms = 1500,
                                   .prune_ms = 200,
                                   .up = watch_up,
                                   .down = watch_down,
                                   .synced = watch_synced,
                                   .want_changed = watch_changed,
                                   .want_invalid = watch_invalid,
                                   .tenant_changed = watch_tenant,
                                   .drain_changed = watch_drain,
                                   .user = w};
    w->loop = zloop_new();
    cr_assert_eq(qv_registry_new(w->loop, &options, &w->registry), QV_OK, "%s", qv_error());
}

static void watcher_close(watcher *w)
{
    qv_registry_free(w->registry);
    zloop_destroy(&w->loop);
    server_stop(&w->server);
}

static bool synced(void *user)
{
    return ((watcher *)user)->n_synced > 0;
}

static bool was_down(void *user)
{
    return ((watcher *)user)->n_down > 0;
}

static void watcher_start(watcher *w, int64_t scan_ms)
{
    server_start(&w->server);
    watcher_open(w, w->server.url, "broker-1", scan_ms);
    cr_assert(run_until(w->loop, synced, w, DEADLINE_MS));
}

/* Wait for n calls in all. */
typedef struct {
    const int *count;
    int n;
} counted;

static bool reached(void *user)
{
    counted *c = user;
    return *c->count >= c->n;
}

static bool await_count(watcher *w, const int *count, int n)
{
    return run_until(w->loop, reached, &(counted){count, n}, DEADLINE_MS);
}

/* Wait for a text that an operator sees. */
typedef struct {
    server *server;
    const char *key, *field, *value; /* field NULL: a string; value NULL: absent */
} seen;

static bool is_seen(void *user)
{
    seen *s = user;
    if (s->value == NULL)
        return s->field != NULL ? op(s->server, "HEXISTS %s %s", s->key, s->field) == 0
                                : op(s->server, "EXISTS %s", s->key) == 0;
    const char *text = s->field != NULL ? ask(s->server, "HGET %s %s", s->key, s->field)
                                        : ask(s->server, "GET %s", s->key);
    return strcmp(text, s->value) == 0;
}

static bool await_seen(watcher *w, const char *key, const char *field, const char *value)
{
    return run_until(w->loop, is_seen, &(seen){&w->server, key, field, value}, DEADLINE_MS);
}

/* Whether quiver:events has an entry with what and adapter. */
static bool has_event(server *s, const char *what, const char *adapter)
{
    redisReply *reply = redisCommand(s->admin, "XRANGE quiver:events - +");
    bool found = false;
    for (size_t i = 0; i < reply->elements; i++) {
        const redisReply *fields = reply->element[i]->element[1];
        bool what_is = false, adapter_is = adapter == NULL;
        for (size_t j = 0; j + 1 < fields->elements; j += 2) {
            const char *name = fields->element[j]->str, *value = fields->element[j + 1]->str;
            what_is = what_is || (strcmp(name, "what") == 0 && strcmp(value, what) == 0);
            adapter_is = adapter_is || (adapter != NULL && strcmp(name, "adapter") == 0 &&
                                        strcmp(value, adapter) == 0);
        }
        found = found || (what_is && adapter_is);
    }
    freeReplyObject(reply);
    return found;
}

Test(registry, sees_an_hset_and_a_del_at_once)
{
    NEEDS_REDIS();
    watcher w = {0};
    server_start(&w.server);
    op(&w.server, "CONFIG SET notify-keyspace-events El");
    watcher_open(&w, w.server.url, "broker-1", 600000);
    cr_assert(run_until(w.loop, synced, &w, DEADLINE_MS));
    run_until(w.loop, never, NULL, 200); /* let the subscription's own scan pass */

    op(&w.server, "HSET quiver:want:sql path /adapters/sql replicas 2");
    uint64_t start = qv_now_ms();
    cr_assert(await_count(&w, &w.n_changed, 1));
    cr_expect_str_eq(w.last, "sql /adapters/sql 2 0 0");
    cr_expect_lt(qv_now_ms() - start, 2000, "no scan comes for ten minutes");
    op(&w.server, "HSET quiver:want:sql pin 1 workers w1,w2");
    cr_assert(await_count(&w, &w.n_changed, 2));
    cr_expect_str_eq(w.last, "sql /adapters/sql 2 1 2");
    op(&w.server, "HSET quiver:want:sql note mine");
    op(&w.server, "DEL quiver:want:sql");
    cr_assert(await_count(&w, &w.n_deleted, 1));
    cr_expect_str_eq(w.last, "sql -");
    cr_expect_eq(w.n_changed, 2, "a field of people's own is no change");
    redisReply *flags = redisCommand(w.server.admin, "CONFIG GET notify-keyspace-events");
    for (const char *p = "ElKghx"; *p != 0; p++)
        cr_expect(strchr(flags->element[1]->str, *p) != NULL, "%c in %s", *p,
                  flags->element[1]->str);
    freeReplyObject(flags);
    watcher_close(&w);
}

Test(registry, sees_tenants_and_drains_and_writes_them_back_after_a_loss)
{
    NEEDS_REDIS();
    watcher w = {0};
    watcher_start(&w, 100);
    op(&w.server, "HSET %s weight 3", "quiver:tenant:big one");
    cr_assert(await_count(&w, &w.n_settings, 1));
    cr_expect_str_eq(w.setting, "tenant big one 3");
    op(&w.server, "HSET quiver:drain:w1 why kernel");
    cr_assert(await_count(&w, &w.n_settings, 2));
    cr_expect_str_eq(w.setting, "drain w1 1");
    op(&w.server, "HSET %s weight none", "quiver:tenant:bad");
    op(&w.server, "HSET %s why x", "quiver:drain:w/1");
    run_until(w.loop, never, NULL, 300);
    cr_expect_eq(w.n_settings, 2, "%s", w.setting);
    cr_expect(has_event(&w.server, "tenant_invalid", NULL));
    cr_expect(has_event(&w.server, "drain_invalid", NULL));
    op(&w.server, "DEL %s quiver:drain:w/1", "quiver:tenant:bad");
    run_until(w.loop, never, NULL, 300);
    w.n_settings = 0;

    op(&w.server, "FLUSHALL");
    cr_assert(await_seen(&w, "quiver:drain:w1", "why", "kernel"));
    cr_assert(await_seen(&w, "quiver:schema", NULL, QV_REGISTRY_SCHEMA));
    cr_expect_str_eq(ask(&w.server, "HGET %s weight", "quiver:tenant:big one"), "3");
    run_until(w.loop, never, NULL, 300);
    cr_expect_eq(w.n_settings, 0, "a loss is no order: %s", w.setting);

    op(&w.server, "DEL quiver:drain:w1");
    cr_assert(await_count(&w, &w.n_settings, 1));
    cr_expect_str_eq(w.setting, "drain w1 0");
    op(&w.server, "DEL %s", "quiver:tenant:big one");
    cr_assert(await_count(&w, &w.n_settings, 2));
    cr_expect_str_eq(w.setting, "tenant big one -");
    watcher_close(&w);
}

Test(registry, finds_changes_by_scanning_without_notifications)
{
    NEEDS_REDIS();
    watcher w = {0};
    char url[256];
    server_start(&w.server);
    op(&w.server,
       "ACL SETUSER plain on >pw ~quiver:* +@all -config -psubscribe -info resetchannels");
    snprintf(url, sizeof url, "unix://plain:pw@%s", w.server.socket);
    watcher_open(&w, url, "broker-1", 100);
    cr_assert(run_until(w.loop, synced, &w, DEADLINE_MS));
    op(&w.server, "HSET quiver:want:a path /a");
    cr_assert(await_count(&w, &w.n_changed, 1));
    op(&w.server, "HSET quiver:want:a replicas 3");
    cr_assert(await_count(&w, &w.n_changed, 2));
    cr_expect_str_eq(w.last, "a /a 3 0 0");
    op(&w.server, "DEL quiver:want:a");
    cr_assert(await_count(&w, &w.n_deleted, 1));
    watcher_close(&w);
}

Test(registry, reads_many_wants_in_pages)
{
    NEEDS_REDIS();
    watcher w = {0};
    server_start(&w.server);
    for (int i = 0; i < 2500; i++)
        op(&w.server, "HSET quiver:want:a%d path /a", i);
    for (int i = 0; i < 500; i++)
        op(&w.server, "SET other:%d x", i);
    watcher_open(&w, w.server.url, "broker-1", 200);
    cr_assert(run_until(w.loop, synced, &w, DEADLINE_MS));
    cr_expect_eq(w.n_changed, 2500);
    for (int i = 0; i < 2500; i++)
        op(&w.server, "DEL quiver:want:a%d", i);
    cr_assert(await_count(&w, &w.n_deleted, 2500));
    watcher_close(&w);
}

Test(registry, reports_malformed_wants_and_keeps_what_held)
{
    NEEDS_REDIS();
    watcher w = {0};
    watcher_start(&w, 100);
    op(&w.server, "HSET quiver:want:a path /a");
    cr_assert(await_count(&w, &w.n_changed, 1));
    op(&w.server, "HSET quiver:want:a replicas many");
    cr_assert(await_count(&w, &w.n_invalid, 1));
    cr_expect(strstr(w.invalid, "a: replicas is 'many'") != NULL, "%s", w.invalid);
    run_until(w.loop, never, NULL, 400);
    cr_expect_eq(w.n_invalid, 1, "said once");
    cr_expect_eq(w.n_deleted, 0);
    op(&w.server, "HSET quiver:want:a replicas 1");
    cr_assert(await_count(&w, &w.n_changed, 2), "valid again is said, though it is what held");

    op(&w.server, "SET quiver:want:text x");
    cr_assert(await_count(&w, &w.n_invalid, 2));
    cr_expect(strncmp(w.invalid, "text: it cannot be read as a hash", 32) == 0, "%s", w.invalid);
    redisReply *reply =
        redisCommand(w.server.admin, "HSET %b path /b", "quiver:want:x\0\n y", (size_t)17);
    freeReplyObject(reply);
    cr_assert(await_count(&w, &w.n_invalid, 3));
    cr_expect(strncmp(w.invalid, "x???y: ", 7) == 0, "%s", w.invalid);
    op(&w.server, "HSET quiver:want: path /c");
    cr_assert(await_count(&w, &w.n_invalid, 4));
    op(&w.server, "DEL quiver:want:text quiver:want:");
    cr_assert(await_count(&w, &w.n_deleted, 2), "an invalid one goes as well");
    cr_expect(has_event(&w.server, "want_invalid", "text"));
    watcher_close(&w);
}

Test(registry, reports_nothing_as_deleted_while_redis_is_down)
{
    NEEDS_REDIS();
    watcher w = {0};
    watcher_start(&w, 100);
    op(&w.server, "HSET quiver:want:a path /a");
    op(&w.server, "HSET quiver:want:b path /b");
    cr_assert(await_count(&w, &w.n_changed, 2));
    op(&w.server, "SAVE");
    server_stop(&w.server);
    cr_assert(run_until(w.loop, was_down, &w, DEADLINE_MS));
    run_until(w.loop, never, NULL, 300);
    cr_expect_eq(w.n_deleted, 0);

    /* Edited while we cannot see it: another server, the same data. */
    server elsewhere = {.dir = qv_temp_dir()};
    char command[512];
    snprintf(command, sizeof command, "cp %s/dump.rdb %s/", w.server.dir, elsewhere.dir);
    cr_assert_eq(system(command), 0);
    server_start(&elsewhere);
    op(&elsewhere, "DEL quiver:want:b");
    op(&elsewhere, "HSET quiver:want:c path /c");
    op(&elsewhere, "SAVE");
    server_stop(&elsewhere);
    snprintf(command, sizeof command, "cp %s/dump.rdb %s/", elsewhere.dir, w.server.dir);
    cr_assert_eq(system(command), 0);
    w.n_synced = 0;
    server_start(&w.server);
    cr_assert(run_until(w.loop, synced, &w, DEADLINE_MS));
    cr_expect_eq(w.n_changed, 3);
    cr_expect_eq(w.n_deleted, 1);
    cr_expect_eq(op(&w.server, "EXISTS quiver:want:b"), 0);
    watcher_close(&w);
}

Test(registry, writes_wants_back_when_the_data_set_is_lost)
{
    NEEDS_REDIS();
    watcher w = {0};
    watcher_start(&w, 100);
    op(&w.server, "HSET quiver:want:a path /a replicas 2 note mine");
    op(&w.server, "HSET quiver:want:b path /b");
    cr_assert(await_count(&w, &w.n_changed, 2));
    qv_registry_put_adapter(
        w.registry, "a",
        &(qv_adapter_record){
            .state = "ready", .rank = 8, .bytes = -1, .replicas = 2, .replicas_wanted = 2});
    cr_assert(await_seen(&w, "quiver:adapter:a", "rank", "8"));

    op(&w.server, "FLUSHALL");
    cr_assert(await_seen(&w, "quiver:schema", NULL, QV_REGISTRY_SCHEMA));
    cr_expect(await_seen(&w, "quiver:want:a", "note", "mine"));
    cr_expect(await_seen(&w, "quiver:want:b", "path", "/b"));
    cr_expect(await_seen(&w, "quiver:adapter:a", "rank", "8"));
    cr_expect(has_event(&w.server, "data_lost", NULL));
    cr_expect(has_event(&w.server, "want_restored", "b"));

    w.n_synced = 0; /* a new, empty server in its place */
    server_stop(&w.server);
    cr_assert(run_until(w.loop, was_down, &w, DEADLINE_MS));
    server_start(&w.server);
    cr_assert(run_until(w.loop, synced, &w, DEADLINE_MS));
    cr_expect(await_seen(&w, "quiver:want:a", "replicas", "2"));
    cr_expect(await_seen(&w, "quiver:adapter:a", "state", "ready"));
    cr_expect(op(&w.server, "EXISTS quiver:doc") == 1);

    w.n_synced = w.n_down = 0; /* an older copy of the data: everything wanted came later */
    op(&w.server, "DEL quiver:want:a quiver:want:b");
    op(&w.server, "SAVE");
    server_stop(&w.server);
    server_start(&w.server);
    run_until(w.loop, was_down, &w, DEADLINE_MS);
    cr_assert(run_until(w.loop, synced, &w, DEADLINE_MS));
    cr_expect(await_seen(&w, "quiver:want:b", "path", "/b"));

    run_until(w.loop, never, NULL, 400);
    cr_expect_eq(w.n_deleted, 0);
    cr_expect_eq(w.n_changed, 2, "%s", w.last);
    op(&w.server, "DEL quiver:want:a quiver:want:b");
    cr_assert(await_count(&w, &w.n_deleted, 2), "an operator's DEL is one, also of all");
    watcher_close(&w);
}

Test(registry, publishes_what_changed_and_repairs_what_others_changed)
{
    NEEDS_REDIS();
    watcher w = {0};
    watcher_start(&w, 1000);
    qv_adapter_record record = {.state = "loading",
                                .path = "/a",
                                .rank = -1,
                                .bytes = -1,
                                .replicas = 0,
                                .replicas_wanted = 2,
                                .reason = "a b\n\"c\""};
    qv_registry_put_adapter(w.registry, "a", &record);
    cr_assert(await_seen(&w, "quiver:adapter:a", "reason", record.reason));
    record.state = "ready";
    record.rank = 16;
    record.reason = NULL;
    qv_registry_put_adapter(w.registry, "a", &record);
    cr_assert(await_seen(&w, "quiver:adapter:a", "state", "ready"));
    cr_expect(await_seen(&w, "quiver:adapter:a", "rank", "16"));
    cr_expect(await_seen(&w, "quiver:adapter:a", "reason", NULL));
    cr_expect_eq(op(&w.server, "HLEN quiver:adapter:a"), 5);

    op(&w.server, "DEL quiver:adapter:a");
    record.state = "partial";
    qv_registry_put_adapter(w.registry, "a", &record);
    cr_assert(await_seen(&w, "quiver:adapter:a", "path", "/a"), "sent in full again");

    const qv_place_row rows[] = {{"w1", "gpu"}, {"w2", "loading"}};
    qv_registry_put_place(w.registry, "a", rows, 2);
    cr_assert(await_seen(&w, "quiver:place:a", "w2", "loading"));
    qv_registry_put_place(w.registry, "a", rows, 1);
    cr_assert(await_seen(&w, "quiver:place:a", "w2", NULL));
    cr_expect_str_eq(ask(&w.server, "HGET quiver:place:a w1"), "gpu");
    qv_registry_put_place(w.registry, "a", NULL, 0);
    qv_registry_put_adapter(w.registry, "a", NULL);
    cr_assert(await_seen(&w, "quiver:place:a", NULL, NULL));
    cr_assert(await_seen(&w, "quiver:adapter:a", NULL, NULL));

    server_stop(&w.server); /* puts while it is down */
    cr_assert(run_until(w.loop, was_down, &w, DEADLINE_MS));
    qv_registry_put_adapter(w.registry, "b", &record);
    qv_registry_put_adapter(w.registry, "c", &record);
    qv_registry_put_adapter(w.registry, "c", NULL);
    qv_registry_event(w.registry, "adapter_loaded", "b", "w1", "in %d ms", 5);
    server_start(&w.server);
    op(&w.server, "HSET quiver:adapter:c state ghost");
    cr_assert(await_seen(&w, "quiver:adapter:b", "state", "partial"));
    cr_assert(await_seen(&w, "quiver:adapter:c", NULL, NULL));
    cr_expect(has_event(&w.server, "adapter_loaded", "b"));
    watcher_close(&w);
}

Test(registry, prunes_what_an_earlier_broker_left)
{
    NEEDS_REDIS();
    watcher w = {0};
    server_start(&w.server);
    op(&w.server, "HSET quiver:adapter:old state ready");
    op(&w.server, "HSET quiver:place:old w9 gpu");
    op(&w.server, "HSET quiver:place:mine w9 gpu");
    watcher_open(&w, w.server.url, "broker-1", 100);
    const qv_place_row row = {"w1", "cpu"};
    qv_registry_put_place(w.registry, "mine", &row, 1);
    cr_assert(await_seen(&w, "quiver:adapter:old", NULL, NULL));
    cr_assert(await_seen(&w, "quiver:place:old", NULL, NULL));
    cr_expect_eq(op(&w.server, "HLEN quiver:place:mine"), 1);
    watcher_close(&w);
}

static bool is_done(void *user)
{
    return ((watcher *)user)->done;
}

static void note_done(void *user)
{
    ((watcher *)user)->done = true;
}

Test(registry, leases_expire_are_renewed_and_end_with_leave)
{
    NEEDS_REDIS();
    watcher w = {0};
    watcher_start(&w, 200);
    const qv_worker_record worker = {
        .state = "ready", .model = "m", .adapters = "a b", .running = 3, .waiting = -1};
    qv_registry_put_worker(w.registry, &worker);
    qv_registry_put_broker(w.registry,
                           &(qv_broker_record){.frontend = "tcp://h:1", .backend = "tcp://h:2"});
    cr_assert(await_seen(&w, "quiver:worker:broker-1", "running", "3"));
    cr_expect_eq(op(&w.server, "HEXISTS quiver:worker:broker-1 waiting"), 0);
    run_until(w.loop, never, NULL, 2000); /* longer than a lease */
    long long ttl = op(&w.server, "PTTL quiver:worker:broker-1");
    cr_expect(ttl > 0 && ttl <= 1500, "%lld", ttl);
    op(&w.server, "DEL quiver:worker:broker-1");
    cr_assert(await_seen(&w, "quiver:worker:broker-1", "model", "m"), "renewed in full");
    cr_expect_gt(op(&w.server, "PTTL quiver:worker:broker-1"), 0);

    qv_registry_leave(w.registry, note_done, &w);
    cr_assert(run_until(w.loop, is_done, &w, DEADLINE_MS));
    qv_registry_put_worker(w.registry, &worker);
    run_until(w.loop, never, NULL, 700);
    cr_expect_eq(op(&w.server, "EXISTS quiver:worker:broker-1 quiver:broker:broker-1"), 0);
    watcher_close(&w);

    watcher down = {0}; /* without a server it does not wait */
    watcher_open(&down, "unix:///nonexistent/r.sock", "w", 100);
    qv_registry_leave(down.registry, note_done, &down);
    cr_expect(down.done);
    watcher_close(&down);
}

static void note_brokers(qv_status status, const qv_broker_address *brokers, size_t n, void *user)
{
    watcher *w = user;
    size_t used = 0;
    w->done = true;
    w->status = status;
    w->brokers[0] = 0;
    for (size_t i = 0; i < n; i++)
        used += (size_t)snprintf(w->brokers + used, sizeof w->brokers - used, "%s=%s,%s;",
                                 brokers[i].id, brokers[i].frontend, brokers[i].backend);
}

Test(registry, finds_brokers)
{
    NEEDS_REDIS();
    watcher w = {0};
    qv_registry *finder;
    server_start(&w.server);
    w.loop = zloop_new();
    qv_registry_options options = {
        .url = w.server.url, .who = "worker-1", .up = watch_up, .user = &w};
    cr_assert_eq(qv_registry_new(w.loop, &options, &finder), QV_OK);
    qv_registry_find_brokers(finder, note_brokers, &w);
    cr_expect(w.done && w.status == QV_ERR_BUSY, "down: told at once");
    cr_assert(await_count(&w, &w.n_up, 1));
    w.done = false;
    qv_registry_find_brokers(finder, note_brokers, &w);
    cr_assert(run_until(w.loop, is_done, &w, DEADLINE_MS));
    cr_expect_eq(w.status, QV_OK);
    cr_expect_str_eq(w.brokers, "");
    op(&w.server, "HSET quiver:broker:b2 frontend tcp://h:3 backend tcp://h:4");
    op(&w.server, "HSET quiver:broker:b1 frontend tcp://h:1 backend tcp://h:2");
    op(&w.server, "HSET quiver:broker:half frontend tcp://h:1");
    op(&w.server, "SET quiver:broker:text x");
    w.done = false;
    qv_registry_find_brokers(finder, note_brokers, &w);
    cr_assert(run_until(w.loop, is_done, &w, DEADLINE_MS));
    cr_expect_str_eq(w.brokers, "b1=tcp://h:1,tcp://h:2;b2=tcp://h:3,tcp://h:4;");
    cr_expect_eq(op(&w.server, "EXISTS quiver:schema quiver:doc"), 0, "only brokers write these");

    w.done = false;
    qv_registry_find_brokers(finder, note_brokers, &w);
    qv_registry_free(finder);
    cr_expect(w.done && w.status == QV_ERR_CANCELLED);
    watcher_close(&w);
}

static void note_edit(qv_status status, bool existed, void *user)
{
    watcher *w = user;
    w->done = true;
    w->status = status;
    w->existed = existed;
}

Test(registry, edits_what_is_wanted)
{
    NEEDS_REDIS();
    watcher w = {0};
    watcher_start(&w, 5000);
    const char *workers[] = {"w1", "w2"};
    qv_want want = {.path = "/a b", .replicas = 2, .pin = true, .workers = workers, .n_workers = 2};
    for (int round = 0; round < 2; round++) {
        w.done = false;
        cr_assert_eq(qv_registry_set_want(w.registry, "a", &want, note_edit, &w), QV_OK);
        cr_assert(run_until(w.loop, is_done, &w, DEADLINE_MS));
        cr_expect_eq(w.status, QV_OK);
        cr_expect_eq(w.existed, round == 1);
        cr_assert(await_count(&w, &w.n_changed, 1 + round));
        want.n_workers = 0;
        cr_expect_str_eq(w.last, round == 0 ? "a /a b 2 1 2" : "a /a b 2 1 0");
    }
    const char *tenants[] = {"acme", "zeta"};
    want.tenants = tenants;
    want.n_tenants = 2;
    want.max_replicas = 4;
    for (int round = 0; round < 2; round++) { /* what is not said again stays */
        w.done = false;
        cr_assert_eq(qv_registry_set_want(w.registry, "a", &want, note_edit, &w), QV_OK);
        cr_assert(run_until(w.loop, is_done, &w, DEADLINE_MS));
        cr_expect_str_eq(ask(&w.server, "HGET quiver:want:a tenants"), "acme,zeta");
        cr_expect_str_eq(ask(&w.server, "HGET quiver:want:a max_replicas"), "4");
        want.n_tenants = 0;
        want.max_replicas = 0;
    }
    w.done = false;
    cr_assert_eq(qv_registry_set_want(w.registry, "a", NULL, note_edit, &w), QV_OK);
    cr_assert(await_count(&w, &w.n_deleted, 1));
    cr_expect(w.done && w.existed);

    want.path = "";
    cr_expect_eq(qv_registry_set_want(w.registry, "a", &want, note_edit, &w), QV_ERR_ARG);
    want.path = "/a";
    want.replicas = -1;
    cr_expect_eq(qv_registry_set_want(w.registry, "a", &want, note_edit, &w), QV_ERR_ARG);
    cr_expect_eq(qv_registry_set_want(w.registry, "a b", NULL, note_edit, &w), QV_ERR_ARG);
    watcher_close(&w);
}

Test(registry, refuses_bad_options)
{
    zloop_t *loop = zloop_new();
    qv_registry *registry = NULL;
    static const struct {
        const char *url, *who;
    } rows[] = {
        {"redis://h", NULL}, {"redis://h", ""}, {"redis://h", "a b"}, {"h", "a"}, {NULL, "a"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_registry_options options = {.url = rows[i].url, .who = rows[i].who};
        cr_expect_eq(qv_registry_new(loop, &options, &registry), QV_ERR_ARG, "row %zu", i);
    }
    qv_registry_free(NULL);
    qv_redis_free(NULL);
    qv_mirror_free(NULL);
    zloop_destroy(&loop);
}
