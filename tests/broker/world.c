/* See world.h. */
#include "tests/broker/world.h"

#include <criterion/criterion.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define STEP_US 10000

/* --- What the core says -----------------------------------------------------------------------*/

static qv_status record(world *w, const qv_mq_peer *peer, const qv_message *message,
                        qv_direction direction)
{
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)peer->size, (const char *)peer->id);
    uintptr_t reply = (uintptr_t)qv_map_get_str(w->replies, name);
    if (reply != 0)
        return (qv_status)(reply - 1);
    const void *data;
    size_t size;
    qv_protocol_limits limits = qv_protocol_default_limits;
    limits.max_bytes = 1 << 30;
    cr_assert_eq(qv_message_encode(message, &w->arena, &data, &size), QV_OK, "%s", qv_error());
    if (w->n_sent == w->sent_capacity) {
        w->sent_capacity = w->sent_capacity ? 2 * w->sent_capacity : 64;
        w->sent = realloc(w->sent, w->sent_capacity * sizeof *w->sent);
    }
    world_sent *sent = &w->sent[w->n_sent++];
    memset(sent, 0, sizeof *sent);
    memcpy(sent->to, name, sizeof name);
    cr_assert_eq(qv_message_decode(data, size, direction, &limits, &w->arena, &sent->message),
                 QV_OK, "%s", qv_error());
    return QV_OK;
}

static qv_status send_client(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    return record(user, peer, message, QV_TO_CLIENT);
}

static qv_status send_worker(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    return record(user, peer, message, QV_TO_WORKER);
}

typedef struct {
    char state[32];
    char reason[256];
} published;

static void publish(void *user, const qv_group *group)
{
    world *w = user;
    published *p = qv_map_get_str(w->published, group->name);
    if (p == NULL) {
        p = calloc(1, sizeof *p);
        qv_map_set_str(w->published, group->name, p);
    }
    const char *reason = qv_group_reason(group);
    snprintf(p->state, sizeof p->state, "%s", qv_group_state(group));
    snprintf(p->reason, sizeof p->reason, "%s", reason != NULL ? reason : "");
}

static void retract(void *user, const char *adapter)
{
    world *w = user;
    free(qv_map_remove_str(w->published, adapter));
}

static void event(void *user, const char *what, const char *adapter, const char *worker,
                  const char *why)
{
    world *w = user;
    char *all = NULL;
    if (asprintf(&all, "%s%s %s %s %s\n", w->events ? w->events : "", what, adapter ? adapter : "-",
                 worker ? worker : "-", why ? why : "") < 0)
        abort();
    free(w->events);
    w->events = all;
}

static qv_str keep(world *w, qv_str text)
{
    return (qv_str){qv_arena_strndup(&w->arena, text.data, text.size), text.size};
}

static qv_durable keep_durable(world *w, const qv_durable *durable)
{
    return (qv_durable){.tenant = keep(w, durable->tenant),
                        .id = keep(w, durable->id),
                        .submit = keep(w, durable->submit),
                        .seed = durable->seed,
                        .serial = durable->serial};
}

static qv_status store(void *user, const qv_durable *durable)
{
    world *w = user;
    if (w->store_reply != QV_OK)
        return qv_fail(w->store_reply, "Redis is away");
    w->stored = keep_durable(w, durable);
    w->n_stored++;
    return QV_OK;
}

static void finish(void *user, const qv_durable *durable, const void *answer, size_t size)
{
    world *w = user;
    w->finished = keep_durable(w, durable);
    w->answer = answer != NULL ? keep(w, (qv_str){answer, (uint32_t)size}) : (qv_str){0};
    w->n_finished++;
}

static bool look_up(void *user, const qv_mq_peer *peer, const qv_msg_resume_request *request)
{
    (void)peer, (void)request;
    ((world *)user)->n_looked_up++;
    return true;
}

static void quarantine(void *user, const qv_poison *poison)
{
    world *w = user;
    snprintf(w->fingerprint, sizeof w->fingerprint, "%s", poison->fingerprint);
    w->n_quarantined++;
}

static void observe(void *user, qv_core_duration duration, uint64_t us)
{
    (void)user, (void)duration, (void)us;
}

/* --- Life -------------------------------------------------------------------------------------*/

world *world_new(const qv_core_options *options)
{
    world *w = calloc(1, sizeof *w);
    qv_core_options defaults = qv_core_default_options();
    w->now_us = 1000000000;
    w->replies = qv_map_new(0);
    w->published = qv_map_new(0);
    const qv_core_actions actions = {.user = w,
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
    if (qv_core_new(options ? options : &defaults, &actions, w->now_us, &w->core) != QV_OK)
        abort();
    qv_core_wants_known(w->core);
    return w;
}

void world_free(world *w)
{
    qv_core_free(w->core);
    qv_map_free(w->replies, NULL);
    qv_map_free(w->published, free);
    qv_arena_deinit(&w->arena);
    free(w->sent);
    free(w->events);
    free(w);
}

void world_check(world *w)
{
    cr_assert_eq(qv_core_check(w->core), QV_OK, "%s", qv_error());
}

void world_pass(world *w, int64_t ms)
{
    for (int64_t us = 0; us < ms * 1000; us += STEP_US) {
        w->now_us += STEP_US;
        qv_core_tick(w->core, w->now_us);
    }
    world_check(w);
}

void world_set_reply(world *w, const char *name, qv_status status)
{
    if (status == QV_OK)
        qv_map_remove_str(w->replies, name);
    else
        qv_map_set_str(w->replies, name, (void *)((uintptr_t)status + 1));
}

/* --- Messages in ------------------------------------------------------------------------------*/

qv_mq_peer world_peer(const char *name)
{
    qv_mq_peer peer = {.size = (uint8_t)strlen(name)};
    memcpy(peer.id, name, peer.size);
    peer.delimiter = strncmp(name, "req", 3) == 0; /* names tell who is a REQ socket */
    return peer;
}

void world_client_bytes(world *w, const char *client, const void *data, size_t size)
{
    qv_mq_peer peer = world_peer(client);
    qv_core_from_client(w->core, &peer, data, size, w->now_us);
    world_check(w);
}

void world_client_json(world *w, const char *client, const char *json)
{
    json_error_t error;
    json_t *object = json_loads(json, 0, &error);
    cr_assert_not_null(object, "%s: %s", json, error.text);
    qv_str raw;
    cr_assert_eq(qv_json_to_msgpack(object, &w->arena, &raw), QV_OK, "%s", qv_error());
    json_decref(object);
    world_client_bytes(w, client, raw.data, raw.size);
}

void world_submit(world *w, const char *client, const char *id, const char *adapter, ...)
{
    char json[4096];
    int n =
        snprintf(json, sizeof json, "{\"type\":\"submit\",\"id\":\"%s\",\"prompt\":\"hello\"", id);
    if (adapter != NULL)
        n += snprintf(json + n, sizeof json - (size_t)n, ",\"adapter\":\"%s\"", adapter);
    va_list args;
    va_start(args, adapter);
    const char *name;
    while ((name = va_arg(args, const char *)) != NULL)
        n += snprintf(json + n, sizeof json - (size_t)n, ",\"%s\":%s", name,
                      va_arg(args, const char *));
    va_end(args);
    snprintf(json + n, sizeof json - (size_t)n, "}");
    world_client_json(w, client, json);
}

void world_cancel(world *w, const char *client, const char *id)
{
    char json[256];
    snprintf(json, sizeof json, "{\"type\":\"cancel\",\"id\":\"%s\"}", id);
    world_client_json(w, client, json);
}

void world_worker_message(world *w, const char *worker, const qv_message *message)
{
    const void *data;
    size_t size;
    qv_mq_peer peer = world_peer(worker);
    cr_assert_eq(qv_message_encode(message, &w->arena, &data, &size), QV_OK, "%s", qv_error());
    qv_core_from_worker(w->core, &peer, data, size, w->now_us);
    world_check(w);
}

/* --- Messages out -----------------------------------------------------------------------------*/

const qv_message *world_take(world *w, const char *name)
{
    for (size_t i = 0; i < w->n_sent; i++) {
        if (w->sent[i].taken || strcmp(w->sent[i].to, name) != 0)
            continue;
        w->sent[i].taken = true;
        /* Later messages may move the array. */
        return qv_arena_memdup(&w->arena, &w->sent[i].message, sizeof w->sent[i].message, 16);
    }
    return NULL;
}

const qv_message *world_expect(world *w, const char *name, qv_msg_type type)
{
    const qv_message *message = world_take(w, name);
    while (message != NULL && message->type == QV_MSG_PING && type != QV_MSG_PING)
        message = world_take(w, name);
    cr_assert_not_null(message, "%s got nothing, not a `%s`", name, qv_message_type_name(type));
    cr_assert_eq(message->type, type, "%s got `%s`%s%.*s, not `%s`", name,
                 qv_message_type_name(message->type), message->type == QV_MSG_ERROR ? ": " : "",
                 message->type == QV_MSG_ERROR ? (int)message->error.message.size : 0,
                 message->type == QV_MSG_ERROR ? message->error.message.data : "",
                 qv_message_type_name(type));
    return message;
}

bool world_is_silent(const world *w, const char *name)
{
    for (size_t i = 0; i < w->n_sent; i++) {
        if (w->sent[i].taken || strcmp(w->sent[i].to, name) != 0)
            continue;
        fprintf(stderr, "%s has a `%s` left\n", name,
                qv_message_type_name(w->sent[i].message.type));
        return false;
    }
    return true;
}

/* --- Workers ----------------------------------------------------------------------------------*/

void world_ready(world *w, const char *connection, const char *id, const char *model,
                 int64_t capacity, int64_t slots, const char *adapters)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_READY);
    qv_msg_ready *ready = &message.ready;
    qv_msg_held_adapter held[16] = {0};
    ready->worker = qv_str_from(id);
    ready->protocol = QV_PROTOCOL_VERSION;
    ready->model = qv_str_from(model);
    ready->backend = qv_str_from("cpu");
    ready->capacity = capacity;
    ready->adapter_slots = slots;
    ready->max_rank = 64;
    ready->max_context = 4096;
    ready->total_pages = 1000;
    if (w->instance != 0)
        qv_set(ready, ready, instance, w->instance);
    char *list = qv_arena_strdup(&w->arena, adapters ? adapters : "");
    for (char *name = strtok(list, " "); name != NULL; name = strtok(NULL, " ")) {
        char *digest = strchr(name, ':');
        *digest++ = '\0';
        qv_msg_held_adapter *h = &held[ready->adapters.count++];
        h->name = qv_str_from(name);
        h->digest = qv_str_from(digest);
        h->state = qv_str_from("ready");
    }
    ready->adapters.data = held;
    world_worker_message(w, connection, &message);
}

uint64_t world_join(world *w, const char *worker, int64_t capacity, int64_t slots,
                    const char *adapters)
{
    world_ready(w, worker, worker, "tiny", capacity, slots, adapters);
    return world_expect(w, worker, QV_MSG_WELCOME)->welcome.epoch;
}

void world_beat(world *w, const char *worker, uint64_t epoch, bool draining)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_HEARTBEAT);
    message.heartbeat.epoch = epoch;
    qv_set(&message.heartbeat, heartbeat, draining, draining);
    world_worker_message(w, worker, &message);
}

void world_goodbye(world *w, const char *worker, uint64_t epoch)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_GOODBYE);
    message.goodbye.epoch = epoch;
    world_worker_message(w, worker, &message);
}

void world_adapter_state(world *w, const char *worker, uint64_t epoch, const char *name,
                         const char *state, const char *digest_or_reason)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_ADAPTER_STATE);
    qv_msg_adapter_state *m = &message.adapter_state;
    m->epoch = epoch;
    m->name = qv_str_from(name);
    m->state = qv_str_from(state);
    if (strcmp(state, "ready") == 0)
        qv_set(m, adapter_state, digest, qv_str_from(digest_or_reason));
    if (strcmp(state, "failed") == 0) {
        qv_set(m, adapter_state, error_code, qv_str_from("ADAPTER_INVALID"));
        qv_set(m, adapter_state, reason, qv_str_from(digest_or_reason));
    }
    world_worker_message(w, worker, &message);
}

static void send_delta(world *w, const char *worker, uint64_t epoch, qv_msg_delta *delta)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_STEP);
    message.step.epoch = epoch;
    message.step.deltas.data = delta;
    message.step.deltas.count = 1;
    world_worker_message(w, worker, &message);
}

void world_delta(world *w, const char *worker, uint64_t epoch, uint64_t request, int64_t index,
                 int64_t seq, const char *text, const char *finish)
{
    int32_t token = (int32_t)(100 + seq);
    qv_msg_delta delta = {.request = request};
    qv_set(&delta, delta, index, index);
    qv_set(&delta, delta, seq, seq);
    if (text != NULL) {
        qv_set(&delta, delta, text, qv_str_from(text));
        qv_set(&delta, delta, tokens, ((qv_ints){&token, 1}));
    }
    if (finish != NULL) {
        qv_set(&delta, delta, finish_reason, qv_str_from(finish));
        qv_set(&delta, delta, usage, ((qv_msg_usage){.prompt_tokens = 3}));
    }
    send_delta(w, worker, epoch, &delta);
}

void world_delta_error(world *w, const char *worker, uint64_t epoch, uint64_t request,
                       const char *code, const char *text)
{
    qv_msg_delta delta = {.request = request};
    qv_set(&delta, delta, error_code, qv_str_from(code));
    qv_set(&delta, delta, error_message, qv_str_from(text));
    send_delta(w, worker, epoch, &delta);
}

/* --- Registry ---------------------------------------------------------------------------------*/

void world_want(world *w, const char *name, const char *path, int64_t replicas)
{
    qv_want want = {.path = path, .replicas = replicas};
    qv_core_want(w->core, name, path != NULL ? &want : NULL, w->now_us);
    world_check(w);
}

const char *world_state(world *w, const char *name)
{
    const published *p = qv_map_get_str(w->published, name);
    return p != NULL ? p->state : "";
}

const char *world_reason(world *w, const char *name)
{
    const published *p = qv_map_get_str(w->published, name);
    return p != NULL ? p->reason : "";
}
