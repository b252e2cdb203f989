#include "common/clock.h"
#include "common/log.h"
#include "common/registry_internal.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_EVENTS = 1000,    /* kept while Redis is down */
    EVENT_STREAM = 10000, /* entries of quiver:events, about */
    WHY_MAX = 512,
};

struct qv_event {
    struct qv_event *next;
    qv_registry *registry;
    char *what, *adapter, *worker, *why; /* adapter, worker may be NULL */
    uint64_t at_ms;
};

static void event_free(qv_event *e)
{
    free(e->what);
    free(e->adapter);
    free(e->worker);
    free(e->why);
    free(e);
}

/* To the end of the queue; the oldest makes room. */
static void event_keep(qv_registry *registry, qv_event *e)
{
    if (registry->n_events == MAX_EVENTS) {
        qv_event *oldest = registry->events;
        registry->events = oldest->next;
        if (registry->events == NULL)
            registry->events_end = &registry->events;
        registry->n_events--;
        event_free(oldest);
    }
    e->next = NULL;
    *registry->events_end = e;
    registry->events_end = &e->next;
    registry->n_events++;
}

static void on_event(qv_status status, const redisReply *reply, void *user)
{
    (void)reply;
    qv_event *e = user;
    if (status == QV_ERR_BUSY) {
        event_keep(e->registry, e); /* with the link; it may appear twice then, never not at all */
        return;
    }
    if (status == QV_ERR_STATE)
        QV_LOG_EVERY(10000, 1, QV_LOG_WARN, NULL, "cannot write quiver:events: %s", qv_error());
    event_free(e);
}

static void event_send(qv_event *e)
{
    char key[QV_REGISTRY_MAX_KEY], limit[16], at[24];
    const char *argv[20];
    int argc = 0;
    snprintf(limit, sizeof limit, "%d", EVENT_STREAM);
    snprintf(at, sizeof at, "%" PRIu64, e->at_ms);
    const char *const head[] = {
        "XADD", qv_registry_key(key, QV_KEY_EVENTS, NULL), "MAXLEN", "~", limit, "*"};
    const char *const pairs[][2] = {{"who", e->registry->who}, {"what", e->what},
                                    {"adapter", e->adapter},   {"worker", e->worker},
                                    {"why", e->why},           {"at_ms", at}};
    for (size_t i = 0; i < sizeof head / sizeof *head; i++)
        argv[argc++] = head[i];
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        if (pairs[i][1] == NULL)
            continue;
        argv[argc++] = pairs[i][0];
        argv[argc++] = pairs[i][1];
    }
    qv_redis_command(e->registry->redis, argc, argv, NULL, on_event, e);
}

void qv_registry_send_events(qv_registry *registry)
{
    size_t n = registry->n_events; /* those that fail come back to the end */
    while (n-- > 0 && qv_redis_room(registry->redis) > 0) {
        qv_event *e = registry->events;
        registry->events = e->next;
        if (registry->events == NULL)
            registry->events_end = &registry->events;
        registry->n_events--;
        event_send(e);
    }
}

void qv_registry_event(qv_registry *registry, const char *what, const char *adapter,
                       const char *worker, const char *why, ...)
{
    char text[WHY_MAX];
    va_list args;
    va_start(args, why);
    vsnprintf(text, sizeof text, why, args);
    va_end(args);
    qv_event *e = calloc(1, sizeof *e);
    if (e == NULL)
        return;
    *e = (qv_event){.registry = registry,
                    .what = strdup(what),
                    .adapter = adapter != NULL ? strdup(adapter) : NULL,
                    .worker = worker != NULL ? strdup(worker) : NULL,
                    .why = strdup(text),
                    .at_ms = qv_wall_ms()};
    if (qv_redis_room(registry->redis) > 0)
        event_send(e);
    else
        event_keep(registry, e);
}

void qv_registry_free_events(qv_registry *registry)
{
    while (registry->events != NULL) {
        qv_event *next = registry->events->next;
        event_free(registry->events);
        registry->events = next;
    }
}
