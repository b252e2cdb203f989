/* Two links to one server, of those that are named the one that takes writes: the link for commands
 * looks for it, the other goes where that is. A link is a state and, while it is connecting or up,
 * one hiredis context:
 *
 *   WAITING -> RESOLVING -> CONNECTING -> UP
 *      ^___________|_____________|_________|   lost: wait, twice as long each time
 *
 * hiredis frees a context from inside its own read and write handlers, and every callback of ours
 * may run there. So contexts are dropped by us at two places only, neither below hiredis: the end
 * of the event handler and the tick. A callback that finds a link unusable only dooms it.
 *
 * The sockets sit in an epoll set of our own and the zloop polls that one descriptor for as long as
 * the object lives. Changes of interest then cost the loop nothing (each would make it rebuild its
 * poll set and skip the rest of a turn), and the loop never holds a descriptor that hiredis closed.
 */
#include "common/redis.h"

#include "common/clock.h"
#include "common/log.h"
#include "common/redis_url.h"
#include "common/resolver.h"

#include <czmq.h>
#include <errno.h>
#include <hiredis/async.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <unistd.h>

enum {
    TICK_MS = 50,
    STEADY_MS = 1000, /* up for so long: the next loss starts with the shortest wait again */
    LATE_MS = 1000,   /* a tick later than this says that the process slept, not the server */
    MAX_SUBSCRIPTIONS = 8,
    REASON_MAX = 256,
    TIMEOUT_MAX_MS = 3600 * 1000
};

typedef enum { LINK_WAITING, LINK_RESOLVING, LINK_CONNECTING, LINK_UP } link_state;

typedef struct {
    qv_redis *redis;
    const char *purpose; /* "commands" or "subscriptions", for logs */
    link_state state;
    size_t server;              /* which of redis->urls it is at, or goes to */
    redisAsyncContext *context; /* CONNECTING and UP; hiredis frees it, cleanup_event tells us */
    qv_resolver *resolver;      /* RESOLVING; owned */
    uint32_t interest;          /* epoll events that hiredis wants */
    uint64_t deadline_ms;       /* WAITING: next try; CONNECTING: give up */
    uint64_t backoff_ms;        /* the next wait */
    uint64_t up_ms;             /* since when it is up */
    uint64_t heard_ms;          /* last answer or message */
    uint64_t asked_ms;          /* last ping */
    char doom[REASON_MAX];      /* not empty: drop it at the next safe place, for this reason */
} redis_link;

/* A command without an answer, in the order of sending. */
typedef struct redis_call {
    struct redis_call *prev, *next;
    qv_redis *redis;
    qv_redis_fn *fn;
    void *user;
    uint64_t sent_ms;
} redis_call;

typedef struct {
    char *pattern;
    qv_redis_message_fn *fn;
    void *user;
    bool held; /* confirmed on the connection that there is */
} subscription;

struct qv_redis {
    zloop_t *loop;
    int timer_id;
    int epoll_fd;
    bool dispatching; /* inside hiredis */
    bool closing;
    uint64_t tick_ms; /* of the last tick */

    qv_redis_options options;
    char *name;
    qv_redis_url urls[QV_REDIS_MAX_SERVERS];
    size_t n_urls;
    size_t n_refused; /* servers tried in a row that would not do */

    redis_link main, sub;
    redis_call calls; /* list head */
    size_t n_calls;
    subscription subscriptions[MAX_SUBSCRIPTIONS];
    size_t n_subscriptions;

    uint64_t n_connects;
    char run_id[64];
    char evicts[32]; /* eviction policy, or empty */
};

/* --- calls ----------------------------------------------------------------------------------- */

static void call_unlink(redis_call *call)
{
    call->prev->next = call->next;
    call->next->prev = call->prev;
    call->redis->n_calls--;
}

/* Tell the owner and forget the call. */
static void call_finish(redis_call *call, qv_status status, const redisReply *reply)
{
    call_unlink(call);
    if (call->fn != NULL)
        call->fn(status, reply, call->user);
    free(call);
}

static void doom(redis_link *link, const char *reason)
{
    if (link->doom[0] == 0)
        snprintf(link->doom, sizeof link->doom, "%s", reason);
}

static bool starts_with(const redisReply *reply, const char *word)
{
    return reply->str != NULL && strncmp(reply->str, word, strlen(word)) == 0;
}

static void on_reply(redisAsyncContext *context, void *data, void *arg)
{
    (void)context;
    redis_call *call = arg;
    const redisReply *reply = data;
    qv_redis *redis = call->redis;
    if (reply == NULL) {
        qv_status status = redis->closing ? QV_ERR_CANCELLED : QV_ERR_BUSY;
        call_finish(call, qv_fail(status, "redis: the link was lost before the answer"), NULL);
        return;
    }
    redis->main.heard_ms = qv_now_ms();
    if (reply->type == REDIS_REPLY_ERROR) {
        if (starts_with(reply, "READONLY"))
            doom(&redis->main, "it became a read-only replica");
        call_finish(call, qv_fail(QV_ERR_STATE, "redis: %s", reply->str), reply);
        return;
    }
    call_finish(call, QV_OK, reply);
}

static void fail_at_once(qv_redis_fn *fn, void *user, const char *why)
{
    if (fn != NULL)
        fn(qv_fail(QV_ERR_BUSY, "redis: %s", why), NULL, user);
}

/* A call on the list, or NULL after `fn` was told why not. */
static redis_call *call_new(qv_redis *redis, qv_redis_fn *fn, void *user)
{
    if (redis->main.state != LINK_UP || redis->main.context == NULL || redis->closing) {
        fail_at_once(fn, user, "the link is down");
        return NULL;
    }
    if (redis->n_calls >= (size_t)redis->options.max_outstanding) {
        fail_at_once(fn, user, "too many commands without an answer");
        return NULL;
    }
    redis_call *call = malloc(sizeof *call);
    if (call == NULL) { /* perhaps in the middle of a transaction: end that with the link */
        doom(&redis->main, "out of memory");
        fail_at_once(fn, user, "out of memory");
        return NULL;
    }
    *call = (redis_call){.prev = redis->calls.prev,
                         .next = &redis->calls,
                         .redis = redis,
                         .fn = fn,
                         .user = user,
                         .sent_ms = qv_now_ms()};
    call->prev->next = call->next->prev = call;
    redis->n_calls++;
    return call;
}

void qv_redis_command(qv_redis *redis, int argc, const char *const *argv, const size_t *sizes,
                      qv_redis_fn *fn, void *user)
{
    redis_call *call = call_new(redis, fn, user);
    if (call == NULL)
        return;
    /* hiredis only reads argv; its prototype lacks a const. */
    if (redisAsyncCommandArgv(redis->main.context, on_reply, call, argc, (const char **)argv,
                              sizes) != REDIS_OK)
        call_finish(call, qv_fail(QV_ERR_BUSY, "redis: the link is closing"), NULL);
}

void qv_redis_commandf(qv_redis *redis, qv_redis_fn *fn, void *user, const char *format, ...)
{
    redis_call *call = call_new(redis, fn, user);
    if (call == NULL)
        return;
    va_list args;
    va_start(args, format);
    int rc = redisvAsyncCommand(redis->main.context, on_reply, call, format, args);
    va_end(args);
    if (rc != REDIS_OK)
        call_finish(call, qv_fail(QV_ERR_BUSY, "redis: the link is closing"), NULL);
}

/* --- hiredis on epoll ------------------------------------------------------------------------ */

static void set_interest(redis_link *link, uint32_t interest)
{
    if (link->context == NULL || link->interest == interest)
        return;
    struct epoll_event event = {.events = interest, .data.ptr = link};
    epoll_ctl(link->redis->epoll_fd, EPOLL_CTL_MOD, link->context->c.fd, &event);
    link->interest = interest;
}

static void add_read_event(void *arg)
{
    set_interest(arg, ((redis_link *)arg)->interest | EPOLLIN);
}

static void del_read_event(void *arg)
{
    set_interest(arg, ((redis_link *)arg)->interest & ~(uint32_t)EPOLLIN);
}

static void add_write_event(void *arg)
{
    set_interest(arg, ((redis_link *)arg)->interest | EPOLLOUT);
}

static void del_write_event(void *arg)
{
    set_interest(arg, ((redis_link *)arg)->interest & ~(uint32_t)EPOLLOUT);
}

/* hiredis is about to close the descriptor and free the context. */
static void cleanup_event(void *arg)
{
    redis_link *link = arg;
    if (link->context == NULL)
        return;
    epoll_ctl(link->redis->epoll_fd, EPOLL_CTL_DEL, link->context->c.fd, NULL);
    link->context = NULL;
    link->interest = 0;
}

static void on_connect(const redisAsyncContext *context, int status)
{
    if (status != REDIS_OK)
        doom(context->data, context->errstr);
}

static void on_disconnect(const redisAsyncContext *context, int status)
{
    if (status != REDIS_OK)
        doom(context->data, context->errstr);
}

static bool attach(redis_link *link, redisAsyncContext *context)
{
    struct epoll_event event = {.events = 0, .data.ptr = link};
    if (epoll_ctl(link->redis->epoll_fd, EPOLL_CTL_ADD, context->c.fd, &event) != 0)
        return false;
    link->context = context;
    link->interest = 0;
    context->data = link;
    context->ev.data = link;
    context->ev.addRead = add_read_event;
    context->ev.delRead = del_read_event;
    context->ev.addWrite = add_write_event;
    context->ev.delWrite = del_write_event;
    context->ev.cleanup = cleanup_event;
    redisAsyncSetConnectCallback(context, on_connect); /* also asks for the first write event */
    redisAsyncSetDisconnectCallback(context, on_disconnect);
    return true;
}

/* --- links: loss ----------------------------------------------------------------------------- */

static uint64_t jitter(uint64_t ms)
{
    uint64_t random = 0;
    if (getrandom(&random, sizeof random, GRND_NONBLOCK) != sizeof random)
        random = qv_now_ns();
    return ms / 2 + random % (ms / 2 + 1);
}

/* When to try again, and where: at the server that was lost first, as it may be back at once, and
 * then at one after the other. Only a round without success makes the pause longer. */
static void plan_next_try(redis_link *link, bool was_up, uint64_t now)
{
    qv_redis *redis = link->redis;
    uint64_t shortest = (uint64_t)redis->options.backoff_min_ms;
    uint64_t longest = (uint64_t)redis->options.backoff_max_ms;
    bool is_round = true;
    if (link == &redis->main) {
        redis->n_refused = was_up ? 0 : redis->n_refused + 1;
        is_round = redis->n_refused % redis->n_urls == 0;
        if (!was_up)
            link->server = (link->server + 1) % redis->n_urls;
    }
    if (was_up && now - link->up_ms >= STEADY_MS)
        link->backoff_ms = shortest;
    link->state = LINK_WAITING;
    link->deadline_ms = now + jitter(is_round ? link->backoff_ms : shortest);
    if (is_round)
        link->backoff_ms = link->backoff_ms * 2 < longest ? link->backoff_ms * 2 : longest;
}

/* The link is of no use now: fail its calls, tell the owner, plan the next try. Never below
 * hiredis. */
static void link_lost(redis_link *link, const char *why)
{
    qv_redis *redis = link->redis;
    const char *shown = redis->urls[link->server].shown;
    bool was_up = link->state == LINK_UP;
    char reason[REASON_MAX];
    snprintf(reason, sizeof reason, "%s", why);

    plan_next_try(link, was_up, qv_now_ms());
    if (link->context != NULL) {
        redis->dispatching = true; /* unanswered calls fail in here */
        redisAsyncFree(link->context);
        redis->dispatching = false;
    }
    link->doom[0] = 0;
    for (size_t i = 0; link == &redis->sub && i < redis->n_subscriptions; i++)
        redis->subscriptions[i].held = false;

    if (was_up)
        qv_warn("redis %s: lost the link for %s: %s", shown, link->purpose, reason);
    else
        QV_LOG_EVERY(30000, 2, QV_LOG_WARN, NULL, "redis %s: no link for %s: %s", shown,
                     link->purpose, reason);
    if (was_up && link == &redis->main && redis->options.on_down != NULL)
        redis->options.on_down(reason, redis->options.user);
}

/* After hiredis ran: the place where a doomed link goes. */
static void link_settle(redis_link *link)
{
    bool open = link->state == LINK_CONNECTING || link->state == LINK_UP;
    if (open && (link->doom[0] != 0 || link->context == NULL))
        link_lost(link, link->doom[0] != 0 ? link->doom : "the server closed the connection");
}

/* --- links: coming up ------------------------------------------------------------------------ */

static void link_up(redis_link *link)
{
    link->state = LINK_UP;
    link->up_ms = link->heard_ms = link->asked_ms = qv_now_ms();
    qv_info("redis %s: link for %s is up", link->redis->urls[link->server].shown, link->purpose);
}

/* An answer to AUTH, SELECT or CLIENT SETNAME. */
static void on_greeting(redisAsyncContext *context, void *data, void *arg)
{
    redis_link *link = context->data;
    const redisReply *reply = data;
    const char *step = arg;
    if (reply == NULL || reply->type != REDIS_REPLY_ERROR)
        return;
    if (strcmp(step, "CLIENT") == 0) { /* a name is a courtesy */
        qv_debug("redis: no name for this connection: %s", reply->str);
        return;
    }
    char reason[REASON_MAX];
    snprintf(reason, sizeof reason, "%s: %s", step, reply->str);
    doom(link, reason);
}

/* The value of "name:value\r\n" in the text of INFO, "" if it is not there. */
static void info_field(const redisReply *info, const char *name, char *value, size_t size)
{
    size_t n = strlen(name);
    const char *p = info->str, *end = info->str + info->len;
    value[0] = 0;
    while (p < end) {
        const char *eol = memchr(p, '\n', (size_t)(end - p));
        eol = eol != NULL ? eol : end;
        if ((size_t)(eol - p) > n && memcmp(p, name, n) == 0 && p[n] == ':') {
            size_t len = (size_t)(eol - p) - n - 1;
            if (len > 0 && p[n + len] == '\r')
                len--;
            snprintf(value, size, "%.*s", (int)len, p + n + 1);
            return;
        }
        p = eol + 1;
    }
}

/* INFO is the last step: only a server that has its data and takes writes is up. */
static void on_info(redisAsyncContext *context, void *data, void *arg)
{
    (void)arg;
    redis_link *link = context->data;
    qv_redis *redis = link->redis;
    const redisReply *reply = data;
    if (reply == NULL || link->doom[0] != 0)
        return;
    redis->run_id[0] = redis->evicts[0] = 0;
    if (reply->type == REDIS_REPLY_ERROR && !starts_with(reply, "NOPERM")) {
        doom(link, reply->str);
        return;
    }
    if (reply->type == REDIS_REPLY_STRING) {
        char role[16], loading[8], read_only[8], maxmemory[32];
        info_field(reply, "role", role, sizeof role);
        info_field(reply, "loading", loading, sizeof loading);
        info_field(reply, "slave_read_only", read_only, sizeof read_only);
        info_field(reply, "maxmemory", maxmemory, sizeof maxmemory);
        info_field(reply, "run_id", redis->run_id, sizeof redis->run_id);
        if (maxmemory[0] != 0 && strcmp(maxmemory, "0") != 0)
            info_field(reply, "maxmemory_policy", redis->evicts, sizeof redis->evicts);
        if (strncmp(redis->evicts, "allkeys", 7) != 0)
            redis->evicts[0] = 0;
        if (strcmp(loading, "1") == 0)
            doom(link, "it is loading its data set");
        else if (strcmp(role, "slave") == 0 && strcmp(read_only, "0") != 0)
            doom(link, "it is a read-only replica");
        if (link->doom[0] != 0)
            return;
    }
    link_up(link);
    redis->n_refused = 0;
    redis->n_connects++;
    if (redis->options.on_up != NULL)
        redis->options.on_up(redis->options.user);
}

static void on_message(redisAsyncContext *context, void *data, void *arg)
{
    (void)context;
    subscription *sub = arg;
    const redisReply *reply = data;
    if (reply == NULL || reply->type != REDIS_REPLY_ARRAY || reply->elements < 3)
        return;
    redis_link *link = context->data;
    link->heard_ms = qv_now_ms();
    const char *kind = reply->element[0]->str;
    if (strcasecmp(kind, "psubscribe") == 0) {
        if (link->state != LINK_UP)
            link_up(link);
        if (!sub->held) { /* else it is the answer to a ping */
            sub->held = true;
            sub->fn(NULL, NULL, 0, sub->user);
        }
    } else if (strcasecmp(kind, "pmessage") == 0 && reply->elements == 4 &&
               reply->element[2]->str != NULL && reply->element[3]->str != NULL) {
        sub->fn(reply->element[2]->str, reply->element[3]->str, (size_t)reply->element[3]->len,
                sub->user);
    }
}

static void psubscribe(redis_link *link, subscription *sub)
{
    if (redisAsyncCommand(link->context, on_message, sub, "PSUBSCRIBE %s", sub->pattern) !=
        REDIS_OK)
        doom(link, "cannot subscribe");
}

/* What is sent first; hiredis keeps it until the connection is there. */
static void greet(redis_link *link)
{
    qv_redis *redis = link->redis;
    const qv_redis_url *url = &redis->urls[link->server];
    if (url->user != NULL)
        redisAsyncCommand(link->context, on_greeting, "AUTH", "AUTH %s %s", url->user,
                          url->password);
    else if (url->password != NULL)
        redisAsyncCommand(link->context, on_greeting, "AUTH", "AUTH %s", url->password);
    if (redis->name != NULL)
        redisAsyncCommand(link->context, on_greeting, "CLIENT", "CLIENT SETNAME %s", redis->name);
    if (link == &redis->main) {
        if (url->db != 0)
            redisAsyncCommand(link->context, on_greeting, "SELECT", "SELECT %d", url->db);
        redisAsyncCommand(link->context, on_info, NULL, "INFO");
    } else {
        for (size_t i = 0; i < redis->n_subscriptions; i++)
            psubscribe(link, &redis->subscriptions[i]);
    }
}

/* Connect to a numeric address or a socket. */
static void link_connect(redis_link *link, const char *address)
{
    qv_redis *redis = link->redis;
    const qv_redis_url *url = &redis->urls[link->server];
    redisAsyncContext *context =
        url->port == 0 ? redisAsyncConnectUnix(url->host) : redisAsyncConnect(address, url->port);
    if (context == NULL || context->err != 0 || !attach(link, context)) {
        char reason[REASON_MAX];
        snprintf(reason, sizeof reason, "%s",
                 context != NULL && context->err != 0 ? context->errstr : "out of resources");
        if (context != NULL)
            redisAsyncFree(context);
        link_lost(link, reason);
        return;
    }
    link->state = LINK_CONNECTING;
    greet(link);
}

static void link_start(redis_link *link, uint64_t now)
{
    qv_redis *redis = link->redis;
    if (link == &redis->sub)
        link->server = redis->main.server;
    const qv_redis_url *url = &redis->urls[link->server];
    link->doom[0] = 0;
    link->deadline_ms = now + (uint64_t)redis->options.connect_timeout_ms;
    if (url->port == 0 || qv_is_numeric_address(url->host)) {
        link_connect(link, url->host);
        return;
    }
    link->resolver = qv_resolver_start(url->host);
    if (link->resolver != NULL)
        link->state = LINK_RESOLVING;
    else
        link_lost(link, "cannot start a thread to look up its address");
}

static void link_resolved(redis_link *link)
{
    qv_resolver *r = link->resolver;
    link->resolver = NULL;
    if (r->address[0] != 0)
        link_connect(link, r->address);
    else
        link_lost(link, r->error);
    qv_resolver_abandon(r);
}

/* --- time ------------------------------------------------------------------------------------ */

/* An answer is due: ping when it is quiet, and give up when it stays so. */
static void check_alive(redis_link *link, uint64_t now)
{
    qv_redis *redis = link->redis;
    uint64_t timeout = (uint64_t)redis->options.command_timeout_ms;
    bool asked = link->asked_ms > link->heard_ms;
    bool overdue = asked && now - link->asked_ms > timeout;
    if (link == &redis->main && redis->n_calls > 0)
        overdue = overdue || now - redis->calls.next->sent_ms > timeout;
    if (overdue) {
        char reason[REASON_MAX];
        snprintf(reason, sizeof reason, "no answer for %llu ms", (unsigned long long)timeout);
        link_lost(link, reason);
        return;
    }
    if (asked || now - link->heard_ms < (uint64_t)redis->options.ping_ms)
        return;
    link->asked_ms = now;
    if (link == &redis->main)
        qv_redis_commandf(redis, NULL, NULL, "PING"); /* on_reply notes that it was heard */
    else /* the one command that hiredis handles well on a link with subscriptions */
        psubscribe(link, &redis->subscriptions[0]);
}

static void link_tick(redis_link *link, uint64_t now)
{
    const redis_link *main = &link->redis->main;
    if (link != main && link->context != NULL && main->state == LINK_UP &&
        link->server != main->server)
        doom(link, "commands go to another server now");
    switch (link->state) {
    case LINK_WAITING:
        if (now >= link->deadline_ms)
            link_start(link, now);
        break;
    case LINK_RESOLVING:
        if (atomic_load(&link->resolver->state) == QV_RESOLVER_DONE)
            link_resolved(link);
        break;
    case LINK_CONNECTING:
        if (now >= link->deadline_ms)
            link_lost(link, "cannot connect in time");
        break;
    case LINK_UP:
        check_alive(link, now);
        break;
    }
    link_settle(link);
}

static int on_tick(zloop_t *loop, int timer_id, void *arg)
{
    (void)loop, (void)timer_id;
    qv_redis *redis = arg;
    uint64_t now = qv_now_ms();
    bool late = now - redis->tick_ms > LATE_MS; /* let answers that wait be read first */
    redis->tick_ms = now;
    if (late)
        return 0;
    link_tick(&redis->main, now);
    if (redis->n_subscriptions > 0)
        link_tick(&redis->sub, now);
    return 0;
}

static int on_epoll(zloop_t *loop, zmq_pollitem_t *item, void *arg)
{
    (void)loop, (void)item;
    qv_redis *redis = arg;
    struct epoll_event events[2];
    int n = epoll_wait(redis->epoll_fd, events, 2, 0);
    for (int i = 0; i < n; i++) {
        redis_link *link = events[i].data.ptr;
        uint32_t failed = events[i].events & (EPOLLERR | EPOLLHUP);
        redis->dispatching = true;
        if (link->context != NULL && (failed || events[i].events & EPOLLIN))
            redisAsyncHandleRead(link->context);
        if (link->context != NULL && link->doom[0] == 0 && events[i].events & EPOLLOUT)
            redisAsyncHandleWrite(link->context);
        redis->dispatching = false;
        link_settle(link);
    }
    return 0;
}

/* --- life ------------------------------------------------------------------------------------ */

static int64_t or_default(int64_t value, int64_t fallback)
{
    return value <= 0 ? fallback : value < TIMEOUT_MAX_MS ? value : TIMEOUT_MAX_MS;
}

static void set_options(qv_redis *redis, const qv_redis_options *options)
{
    qv_redis_options *o = &redis->options;
    *o = *options;
    o->connect_timeout_ms = or_default(o->connect_timeout_ms, 3000);
    o->command_timeout_ms = or_default(o->command_timeout_ms, 5000);
    o->ping_ms = or_default(o->ping_ms, 2000);
    o->backoff_min_ms = or_default(o->backoff_min_ms, 100);
    o->backoff_max_ms = or_default(o->backoff_max_ms, 5000);
    if (o->backoff_max_ms < o->backoff_min_ms)
        o->backoff_max_ms = o->backoff_min_ms;
    o->max_outstanding = o->max_outstanding > 0 ? o->max_outstanding : 65536;
    o->url = o->name = NULL; /* ours are redis->urls and redis->name */
}

/* hiredis writes with write(2): a server that goes away would end the process. */
static void ignore_sigpipe(void)
{
    struct sigaction now;
    if (sigaction(SIGPIPE, NULL, &now) == 0 && now.sa_handler == SIG_DFL)
        signal(SIGPIPE, SIG_IGN);
}

qv_status qv_redis_new(zloop_t *loop, const qv_redis_options *options, qv_redis **out)
{
    qv_redis *redis = calloc(1, sizeof *redis);
    if (redis == NULL)
        return qv_fail(QV_ERR_NOMEM, "redis: out of memory");
    qv_status status = qv_redis_urls_parse(options->url, redis->urls, &redis->n_urls);
    if (status != QV_OK) {
        free(redis);
        return status;
    }
    ignore_sigpipe();
    redis->loop = loop;
    redis->timer_id = redis->epoll_fd = -1;
    redis->tick_ms = qv_now_ms();
    redis->calls.prev = redis->calls.next = &redis->calls;
    set_options(redis, options);
    uint64_t backoff = (uint64_t)redis->options.backoff_min_ms;
    redis->main = (redis_link){.redis = redis, .purpose = "commands", .backoff_ms = backoff};
    redis->sub = (redis_link){.redis = redis, .purpose = "subscriptions", .backoff_ms = backoff};

    if (options->name != NULL && (redis->name = strdup(options->name)) == NULL) {
        status = qv_fail(QV_ERR_NOMEM, "redis: out of memory");
        goto fail;
    }
    redis->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (redis->epoll_fd < 0) {
        status = qv_fail(QV_ERR_IO, "redis: epoll_create: %s", strerror(errno));
        goto fail;
    }
    zmq_pollitem_t item = {.fd = redis->epoll_fd, .events = ZMQ_POLLIN};
    if (zloop_poller(loop, &item, on_epoll, redis) != 0 ||
        (redis->timer_id = zloop_timer(loop, TICK_MS, 0, on_tick, redis)) < 0) {
        status = qv_fail(QV_ERR_NOMEM, "redis: the loop takes no more pollers or timers");
        goto fail;
    }
    link_tick(&redis->main, qv_now_ms());
    *out = redis;
    return QV_OK;

fail:
    qv_redis_free(redis);
    return status;
}

static void link_close(redis_link *link)
{
    qv_resolver_abandon(link->resolver);
    if (link->context != NULL)
        redisAsyncFree(link->context);
}

void qv_redis_free(qv_redis *redis)
{
    if (redis == NULL)
        return;
    QV_ASSERT(!redis->dispatching);
    redis->closing = true;
    link_close(&redis->main);
    link_close(&redis->sub);
    if (redis->epoll_fd >= 0) {
        zmq_pollitem_t item = {.fd = redis->epoll_fd, .events = ZMQ_POLLIN};
        zloop_poller_end(redis->loop, &item);
        close(redis->epoll_fd);
    }
    if (redis->timer_id >= 0)
        zloop_timer_end(redis->loop, redis->timer_id);
    for (size_t i = 0; i < redis->n_subscriptions; i++)
        free(redis->subscriptions[i].pattern);
    qv_redis_urls_deinit(redis->urls, redis->n_urls);
    free(redis->name);
    free(redis);
}

qv_status qv_redis_subscribe(qv_redis *redis, const char *pattern, qv_redis_message_fn *fn,
                             void *user)
{
    if (redis->n_subscriptions == MAX_SUBSCRIPTIONS)
        return qv_fail(QV_ERR_LIMIT, "redis: more than %d subscriptions", MAX_SUBSCRIPTIONS);
    char *copy = strdup(pattern);
    if (copy == NULL)
        return qv_fail(QV_ERR_NOMEM, "redis: out of memory");
    subscription *sub = &redis->subscriptions[redis->n_subscriptions++];
    *sub = (subscription){.pattern = copy, .fn = fn, .user = user};
    if (redis->sub.context != NULL) /* else the next connection does it */
        psubscribe(&redis->sub, sub);
    return QV_OK;
}

bool qv_redis_is_up(const qv_redis *redis)
{
    return redis->main.state == LINK_UP;
}

int qv_redis_db(const qv_redis *redis)
{
    return redis->urls[0].db;
}

const char *qv_redis_run_id(const qv_redis *redis)
{
    return redis->run_id;
}

const char *qv_redis_evicts(const qv_redis *redis)
{
    return redis->evicts[0] != 0 ? redis->evicts : NULL;
}

uint64_t qv_redis_connects(const qv_redis *redis)
{
    return redis->n_connects;
}

size_t qv_redis_room(const qv_redis *redis)
{
    size_t limit = (size_t)redis->options.max_outstanding;
    return redis->main.state == LINK_UP && redis->n_calls < limit ? limit - redis->n_calls : 0;
}
