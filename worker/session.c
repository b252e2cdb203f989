#include "worker/session.h"

#include "common/clock.h"
#include "common/log.h"
#include "common/mq.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum {
    TICK_MS = 20,
    LINGER_MS = 500,
    BACKOFF_MIN_MS = 50,
    BACKOFF_MAX_MS = 2000,
    STEADY_MS = 3000, /* a session of so long: the next wait is the shortest again */
    LATE_MS = 1000,   /* a tick later than this says that we slept, not the broker */
    MESSAGES_PER_TURN = 256,
    SUBMIT_NODES = 4 << 20
};

typedef enum { SEEKING, JOINING, JOINED, CLOSED } session_state;

/* A message that the socket did not take yet. */
typedef struct backlog {
    struct backlog *next;
    void *data;
    size_t size;
} backlog;

struct qv_session {
    zloop_t *loop;
    int timer_id;
    qv_session_options options;
    qv_arena arena; /* of the message at hand */

    char **brokers; /* [n_brokers] endpoints */
    size_t n_brokers, next_broker;

    session_state state;
    qv_mq *mq;      /* JOINING, JOINED; CLOSED until it is freed */
    char *endpoint; /* that mq connects to */
    bool reading;   /* its socket is in the loop */
    bool ready_sent;
    char *lost; /* why the session is to end, found out in the middle of something; or NULL */

    uint64_t epoch, heartbeat_ms, timeout_ms; /* by `welcome` */
    uint64_t deadline_ms;                     /* SEEKING: next try; JOINING: give up */
    uint64_t joined_ms, heard_ms, told_ms, tick_ms;
    uint64_t backoff_ms;
    uint64_t n_ghosts, n_malformed;

    backlog *first, **end;
    size_t backlog_bytes;
};

static int on_socket(zloop_t *loop, zsock_t *socket, void *arg);

/* --- sending --------------------------------------------------------------------------------- */

static void drop_backlog(qv_session *s)
{
    while (s->first != NULL) {
        backlog *next = s->first->next;
        free(s->first->data);
        free(s->first);
        s->first = next;
    }
    s->end = &s->first;
    s->backlog_bytes = 0;
}

/* Note that the session is over; settle() acts on it. */
static void lose(qv_session *s, const char *why)
{
    if (s->lost == NULL)
        s->lost = strdup(why);
}

/* True when the message left. */
static bool send_now(qv_session *s, const void *data, size_t size)
{
    qv_status status = qv_mq_send(s->mq, NULL, data, size);
    if (status != QV_OK && status != QV_ERR_BUSY)
        lose(s, qv_error());
    return status == QV_OK;
}

static void flush_backlog(qv_session *s)
{
    while (s->first != NULL && send_now(s, s->first->data, s->first->size)) {
        backlog *sent = s->first;
        s->first = sent->next;
        if (s->first == NULL)
            s->end = &s->first;
        s->backlog_bytes -= sent->size;
        free(sent->data);
        free(sent);
    }
}

void qv_session_send(qv_session *session, void *data, size_t size)
{
    bool gone = session->state != JOINED;
    if (gone || (session->first == NULL && send_now(session, data, size))) {
        free(data);
        return;
    }
    backlog *item = malloc(sizeof *item);
    if (item == NULL) {
        free(data);
        lose(session, "out of memory"); /* a message is missing: the broker must start over */
        return;
    }
    *item = (backlog){.data = data, .size = size};
    *session->end = item;
    session->end = &item->next;
    session->backlog_bytes += size;
    if (session->options.max_backlog_bytes > 0 &&
        session->backlog_bytes > session->options.max_backlog_bytes)
        lose(session, "the broker does not read");
}

qv_status qv_session_send_message(qv_session *session, const qv_message *message)
{
    const void *data;
    size_t size;
    qv_arena arena;
    qv_arena_init(&arena, 0, session->options.max_message_bytes);
    qv_status status = qv_message_encode(message, &arena, &data, &size);
    void *copy = status == QV_OK ? malloc(size) : NULL;
    if (copy != NULL) {
        memcpy(copy, data, size);
        qv_session_send(session, copy, size);
    } else if (status == QV_OK) {
        status = qv_fail(QV_ERR_NOMEM, "no memory for a message of %zu bytes", size);
    }
    qv_arena_deinit(&arena);
    return status;
}

bool qv_session_has_backlog(const qv_session *session)
{
    return session->first != NULL;
}

/* Encode a message of our own and try to send it once. */
static bool send_once(qv_session *s, const qv_message *message)
{
    const void *data;
    size_t size;
    if (qv_message_encode(message, &s->arena, &data, &size) == QV_OK)
        return send_now(s, data, size);
    lose(s, qv_error());
    return false;
}

void qv_session_heartbeat(qv_session *session)
{
    qv_message message = {.type = QV_MSG_HEARTBEAT};
    message.heartbeat.epoch = session->epoch;
    if (session->state != JOINED ||
        !session->options.fill_heartbeat(&message.heartbeat, session->options.user))
        return;
    send_once(session, &message);
    session->told_ms = qv_now_ms();
}

/* --- coming and going ------------------------------------------------------------------------ */

static uint64_t jitter(uint64_t ms)
{
    uint64_t random = 0;
    if (getrandom(&random, sizeof random, GRND_NONBLOCK) != sizeof random)
        random = qv_now_ns();
    return ms / 2 + random % (ms / 2 + 1);
}

static void stop_reading(qv_session *s)
{
    if (s->reading)
        zloop_reader_end(s->loop, qv_mq_socket(s->mq));
    s->reading = false;
}

static void start_reading(qv_session *s)
{
    if (s->reading || s->mq == NULL)
        return;
    s->reading = zloop_reader(s->loop, qv_mq_socket(s->mq), on_socket, s) == 0;
    if (s->reading)
        zloop_reader_set_tolerant(s->loop, qv_mq_socket(s->mq));
}

static void close_socket(qv_session *s)
{
    if (s->mq == NULL)
        return;
    stop_reading(s);
    qv_mq_close(s->mq);
    s->mq = NULL;
}

/* Seek again, no sooner than after `min_wait_ms`. */
static void seek(qv_session *s, uint64_t min_wait_ms)
{
    uint64_t now = qv_now_ms();
    if (s->state == JOINED && now - s->joined_ms >= STEADY_MS)
        s->backoff_ms = BACKOFF_MIN_MS;
    uint64_t wait_ms = jitter(s->backoff_ms);
    s->backoff_ms = s->backoff_ms * 2 < BACKOFF_MAX_MS ? s->backoff_ms * 2 : BACKOFF_MAX_MS;
    s->deadline_ms = now + (wait_ms > min_wait_ms ? wait_ms : min_wait_ms);
    s->state = SEEKING;
    s->epoch = 0;
    drop_backlog(s);
    close_socket(s);
}

static void leave(qv_session *s, const char *why, uint64_t min_wait_ms)
{
    bool was_joined = s->state == JOINED;
    if (was_joined)
        qv_warn("session with the broker at %s is over: %s", s->endpoint, why);
    else
        QV_LOG_EVERY(30000, 3, QV_LOG_WARN, NULL, "not registered with the broker at %s: %s",
                     s->endpoint, why);
    seek(s, min_wait_ms);
    if (was_joined)
        s->options.left(why, s->options.user);
}

/* Act on what was found out on the way. Only where no message is in hand. */
static void settle(qv_session *s)
{
    if (s->lost == NULL)
        return;
    char *why = s->lost;
    s->lost = NULL;
    if (s->state == JOINING || s->state == JOINED)
        leave(s, why, 0);
    free(why);
}

static void connect_to_next(qv_session *s, uint64_t now)
{
    const char *endpoint = s->brokers[s->next_broker % s->n_brokers];
    s->next_broker = (s->next_broker + 1) % s->n_brokers;
    free(s->endpoint);
    s->endpoint = strdup(endpoint);
    qv_mq_options options = qv_mq_default_options(QV_MQ_DEALER, endpoint);
    options.linger_ms = LINGER_MS;
    options.max_message_bytes = s->options.max_message_bytes;
    options.curve = s->options.curve;
    s->state = JOINING;
    s->ready_sent = false;
    s->deadline_ms = now + (uint64_t)s->options.register_timeout_ms;
    if (s->endpoint == NULL || qv_mq_open(&options, &s->mq) != QV_OK)
        lose(s, s->endpoint == NULL ? "out of memory" : qv_error());
    else
        start_reading(s);
}

static void send_ready(qv_session *s)
{
    qv_message message = {.type = QV_MSG_READY};
    qv_arena_reset(&s->arena);
    s->options.fill_ready(&message.ready, &s->arena, s->options.user);
    s->ready_sent = send_once(s, &message);
}

/* --- messages of the broker ------------------------------------------------------------------ */

static void on_welcome(qv_session *s, const qv_msg_welcome *welcome)
{
    if (s->state != JOINING) {
        s->n_ghosts++;
        return;
    }
    s->state = JOINED;
    s->epoch = welcome->epoch;
    s->heartbeat_ms = (uint64_t)welcome->heartbeat_ms;
    s->timeout_ms = (uint64_t)welcome->timeout_ms;
    s->joined_ms = s->heard_ms = qv_now_ms();
    char name[QV_ERROR_MAX];
    snprintf(name, sizeof name, "%.*s", (int)welcome->broker.size, welcome->broker.data);
    qv_info("registered with broker %s at %s, epoch %" PRIu64, name, s->endpoint, s->epoch);
    s->options.joined(name, s->options.user);
    qv_session_heartbeat(s);
}

static void on_refused(qv_session *s, const qv_msg_refused *refused)
{
    char why[QV_ERROR_MAX];
    snprintf(why, sizeof why, "refused: %.*s", (int)refused->reason.size, refused->reason.data);
    leave(s, why, refused->retry_after_ms > 0 ? (uint64_t)refused->retry_after_ms : 0);
}

/* The session that a message is of; false for the kinds that are of none. */
static bool message_epoch(const qv_message *message, uint64_t *epoch)
{
    switch (message->type) {
    case QV_MSG_RUN:
        *epoch = message->run.epoch;
        return true;
    case QV_MSG_ABORT:
        *epoch = message->abort.epoch;
        return true;
    case QV_MSG_LOAD_ADAPTER:
        *epoch = message->load_adapter.epoch;
        return true;
    case QV_MSG_UNLOAD_ADAPTER:
        *epoch = message->unload_adapter.epoch;
        return true;
    case QV_MSG_PING:
        *epoch = message->ping.epoch;
        return true;
    default:
        return false;
    }
}

static void on_message(qv_session *s, const qv_message *message)
{
    uint64_t epoch;
    if (message_epoch(message, &epoch)) {
        if (s->state != JOINED || epoch != s->epoch) {
            s->n_ghosts++;
            return;
        }
        s->heard_ms = qv_now_ms();
        if (message->type != QV_MSG_PING)
            s->options.message(message, s->options.user);
    } else if (message->type == QV_MSG_WELCOME) {
        on_welcome(s, &message->welcome);
    } else if (message->type == QV_MSG_REFUSED) {
        on_refused(s, &message->refused);
    } else {
        leave(s, "the broker does not know this session", 0);
    }
}

/* Take one message from the socket. False: there is none, or none can be taken. */
static bool take_message(qv_session *s)
{
    qv_mq_message frame;
    qv_message message;
    if (s->mq == NULL || s->lost != NULL)
        return false;
    if (!s->options.has_room(s->options.user)) {
        stop_reading(s); /* the tick looks again */
        return false;
    }
    qv_status status = qv_mq_recv(s->mq, &frame);
    if (status == QV_ERR_BUSY)
        return false;
    if (status != QV_OK && status != QV_ERR_FORMAT) {
        lose(s, qv_error());
        return false;
    }
    bool received = status == QV_OK;
    if (received) {
        qv_protocol_limits limits = {.max_bytes = s->options.max_message_bytes,
                                     .max_depth = qv_protocol_default_limits.max_depth,
                                     .max_nodes = SUBMIT_NODES};
        qv_arena_reset(&s->arena);
        status =
            qv_message_decode(frame.data, frame.size, QV_TO_WORKER, &limits, &s->arena, &message);
    }
    if (status == QV_OK) {
        on_message(s, &message);
    } else {
        s->n_malformed++;
        QV_LOG_EVERY(1000, 5, QV_LOG_WARN, NULL, "malformed message from the broker at %s: %s",
                     s->endpoint, qv_error());
    }
    if (received)
        qv_mq_message_release(&frame);
    return true;
}

static void read_socket(qv_session *s)
{
    for (int i = 0; i < MESSAGES_PER_TURN && take_message(s); i++)
        ;
    settle(s);
}

static int on_socket(zloop_t *loop, zsock_t *socket, void *arg)
{
    (void)loop, (void)socket;
    read_socket(arg);
    return 0;
}

/* --- time ------------------------------------------------------------------------------------ */

static void tick_joining(qv_session *s, uint64_t now)
{
    if (!s->ready_sent)
        send_ready(s); /* false until there is a connection */
    if (now >= s->deadline_ms)
        lose(s, s->ready_sent ? "it does not answer" : "no connection");
}

static void tick_joined(qv_session *s, uint64_t now)
{
    if (now - s->heard_ms >= s->timeout_ms) {
        char why[64];
        snprintf(why, sizeof why, "it was silent for %" PRIu64 " ms", now - s->heard_ms);
        lose(s, why);
        return;
    }
    if (now - s->told_ms >= s->heartbeat_ms) {
        qv_arena_reset(&s->arena);
        qv_session_heartbeat(s);
    }
    flush_backlog(s);
}

static int on_tick(zloop_t *loop, int timer_id, void *arg)
{
    (void)loop, (void)timer_id;
    qv_session *s = arg;
    uint64_t now = qv_now_ms();
    bool late = now - s->tick_ms > LATE_MS; /* hear first what waits at the socket */
    s->tick_ms = now;
    if (late)
        return 0;
    switch (s->state) {
    case SEEKING:
        if (s->n_brokers > 0 && now >= s->deadline_ms)
            connect_to_next(s, now);
        break;
    case JOINING:
        tick_joining(s, now);
        break;
    case JOINED:
        tick_joined(s, now);
        break;
    case CLOSED:
        return 0;
    }
    settle(s);
    if (!s->reading && s->mq != NULL && s->options.has_room(s->options.user))
        start_reading(s);
    return 0;
}

/* --- life ------------------------------------------------------------------------------------ */

qv_status qv_session_new(zloop_t *loop, const qv_session_options *options, qv_session **out)
{
    qv_session *s = calloc(1, sizeof *s);
    if (s == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a session");
    s->loop = loop;
    s->options = *options;
    s->end = &s->first;
    s->backoff_ms = BACKOFF_MIN_MS;
    s->tick_ms = qv_now_ms();
    qv_arena_init(&s->arena, 0, 8 * options->max_message_bytes);
    s->timer_id = zloop_timer(loop, TICK_MS, 0, on_tick, s);
    if (s->timer_id < 0) {
        qv_session_free(s);
        return qv_fail(QV_ERR_NOMEM, "the loop takes no more timers");
    }
    *out = s;
    return QV_OK;
}

static void free_brokers(char **brokers, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(brokers[i]);
    free(brokers);
}

void qv_session_free(qv_session *session)
{
    if (session == NULL)
        return;
    close_socket(session);
    drop_backlog(session);
    if (session->timer_id >= 0)
        zloop_timer_end(session->loop, session->timer_id);
    free_brokers(session->brokers, session->n_brokers);
    qv_arena_deinit(&session->arena);
    free(session->endpoint);
    free(session->lost);
    free(session);
}

qv_status qv_session_set_brokers(qv_session *session, const char *const *endpoints, size_t n)
{
    char **copies = calloc(n + 1, sizeof *copies);
    bool ok = copies != NULL;
    for (size_t i = 0; ok && i < n; i++)
        ok = (copies[i] = strdup(endpoints[i])) != NULL;
    if (!ok) {
        if (copies != NULL)
            free_brokers(copies, n);
        return qv_fail(QV_ERR_NOMEM, "no memory for %zu brokers", n);
    }
    free_brokers(session->brokers, session->n_brokers);
    session->brokers = copies;
    session->n_brokers = n;
    return QV_OK;
}

bool qv_session_is_seeking(const qv_session *session)
{
    return session->state == SEEKING;
}

uint64_t qv_session_epoch(const qv_session *session)
{
    return session->state == JOINED ? session->epoch : 0;
}

uint64_t qv_session_silence_ms(const qv_session *session)
{
    return session->state == JOINED ? qv_now_ms() - session->heard_ms : 0;
}

uint64_t qv_session_n_ghosts(const qv_session *session)
{
    return session->n_ghosts;
}

uint64_t qv_session_n_malformed(const qv_session *session)
{
    return session->n_malformed;
}

void qv_session_close(qv_session *session, const char *reason)
{
    if (session->state == JOINED) {
        qv_message message = {.type = QV_MSG_GOODBYE};
        message.goodbye.epoch = session->epoch;
        qv_set(&message.goodbye, goodbye, reason, qv_str_from(reason));
        qv_arena_reset(&session->arena);
        flush_backlog(session);
        if (session->first == NULL)
            send_once(session, &message);
    }
    if (session->mq != NULL)
        stop_reading(session);
    drop_backlog(session);
    session->state = CLOSED;
    session->epoch = 0;
}
