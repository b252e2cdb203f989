#include "worker/outbox.h"

#include <stdlib.h>
#include <string.h>

static qv_outbox_side *side(qv_outbox *box)
{
    return &box->sides[box->filling];
}

void qv_outbox_init(qv_outbox *box)
{
    *box = (qv_outbox){0};
    for (int i = 0; i < 2; i++)
        qv_arena_init(&box->sides[i].arena, 0, 0);
}

static void empty(qv_outbox_side *s)
{
    for (qv_request *request = s->ended, *next; request != NULL; request = next) {
        next = request->next;
        qv_request_free(request);
    }
    s->ended = NULL;
    s->n_deltas = s->n_events = 0;
    s->failed = false;
    qv_arena_reset(&s->arena);
}

void qv_outbox_deinit(qv_outbox *box)
{
    for (int i = 0; i < 2; i++) {
        qv_outbox_side *s = &box->sides[i];
        empty(s);
        qv_arena_deinit(&s->arena);
        free(s->deltas);
        free(s->events);
    }
}

void qv_outbox_begin(qv_outbox *box)
{
    empty(&box->sides[!box->filling]);
}

qv_status qv_outbox_flip(qv_outbox *box, const qv_outbox_side **out)
{
    *out = side(box);
    box->filling = !box->filling;
    if ((*out)->failed)
        return qv_fail(QV_ERR_NOMEM, "no memory for the results of a step");
    return QV_OK;
}

bool qv_outbox_is_empty(const qv_outbox *box)
{
    const qv_outbox_side *s = &box->sides[box->filling];
    return s->n_deltas == 0 && s->n_events == 0;
}

/* Room for one more item in an array that doubles. */
static bool reserve(void **array, uint32_t count, uint32_t *capacity, size_t item_size)
{
    if (count < *capacity)
        return true;
    uint32_t larger = *capacity > 0 ? *capacity * 2 : 64;
    void *grown = realloc(*array, larger * item_size);
    if (grown == NULL)
        return false;
    *array = grown;
    *capacity = larger;
    return true;
}

qv_msg_delta *qv_outbox_delta(qv_outbox *box)
{
    qv_outbox_side *s = side(box);
    if (!reserve((void **)&s->deltas, s->n_deltas, &s->deltas_capacity, sizeof *s->deltas)) {
        s->failed = true;
        return &s->lost;
    }
    qv_msg_delta *delta = &s->deltas[s->n_deltas++];
    memset(delta, 0, sizeof *delta);
    return delta;
}

void *qv_outbox_alloc(qv_outbox *box, size_t size, size_t align)
{
    void *memory = qv_arena_alloc(&side(box)->arena, size, align);
    if (memory == NULL)
        side(box)->failed = true;
    return memory;
}

qv_str qv_outbox_text(qv_outbox *box, const char *text, size_t size)
{
    char *copy = qv_outbox_alloc(box, size, 1);
    if (copy == NULL)
        return (qv_str){0};
    if (size > 0)
        memcpy(copy, text, size);
    return (qv_str){.data = copy, .size = (uint32_t)size};
}

static const char *copy_string(qv_outbox *box, const char *text)
{
    if (text == NULL)
        return NULL;
    char *copy = qv_arena_strdup(&side(box)->arena, text);
    if (copy == NULL)
        side(box)->failed = true;
    return copy;
}

void qv_outbox_event(qv_outbox *box, const qv_adapter_event *event)
{
    qv_outbox_side *s = side(box);
    if (!reserve((void **)&s->events, s->n_events, &s->events_capacity, sizeof *s->events)) {
        s->failed = true;
        return;
    }
    qv_adapter_event *copy = &s->events[s->n_events++];
    *copy = *event;
    copy->name = copy_string(box, event->name);
    copy->path = copy_string(box, event->path);
    copy->digest = copy_string(box, event->digest);
    copy->reason = copy_string(box, event->reason);
}

void qv_outbox_keep(qv_outbox *box, qv_request *request)
{
    request->next = side(box)->ended;
    side(box)->ended = request;
}
