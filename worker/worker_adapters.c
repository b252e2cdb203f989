/* Which adapters the worker has, as the broker and Redis are told. The engine has the truth; this
 * is what its events made of it so far. */
#include "common/log.h"
#include "worker/worker_internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* An adapter as the broker was told. */
typedef struct {
    char *path, *digest; /* owned; digest NULL: no version was ever ready */
    int64_t rank, bytes;
    bool loading; /* for the first time */
    bool pin;
} held_adapter;

void qv_worker_free_held(void *value)
{
    held_adapter *held = value;
    free(held->path);
    free(held->digest);
    free(held);
}

static held_adapter *require_held(qv_worker *w, const char *name)
{
    held_adapter *held = qv_map_get_str(w->held, name);
    if (held != NULL)
        return held;
    held = calloc(1, sizeof *held);
    if (held == NULL || qv_map_set_str(w->held, name, held) != QV_OK) {
        free(held);
        return NULL;
    }
    return held;
}

static void set_text(char **text, const char *value)
{
    free(*text);
    *text = value != NULL ? strdup(value) : NULL;
}

/* Whether the name still has a version after a failure. */
static bool keeps_version(const qv_adapter_event *event)
{
    return event->digest != NULL && event->digest[0] != '\0';
}

/* Keep the list that `ready` gives: a name with a version stays through a load that fails. */
static void note_adapter(qv_worker *w, const qv_adapter_event *event)
{
    held_adapter *held = event->phase == QV_ADAPTER_LOADING || event->phase == QV_ADAPTER_READY
                             ? require_held(w, event->name)
                             : qv_map_get_str(w->held, event->name);
    if (held == NULL)
        return;
    held->loading = event->phase == QV_ADAPTER_LOADING && held->digest == NULL;
    if (event->phase == QV_ADAPTER_READY) {
        set_text(&held->path, event->path);
        set_text(&held->digest, event->digest != NULL ? event->digest : "");
        held->rank = event->rank;
        held->bytes = (int64_t)event->bytes;
        held->pin = event->pin;
    } else if (held->loading) {
        set_text(&held->path, event->path);
    } else if (event->phase == QV_ADAPTER_UNLOADED || !keeps_version(event)) {
        qv_map_remove_str(w->held, event->name);
        qv_worker_free_held(held);
    }
}

static const char *const phase_words[] = {
    [QV_ADAPTER_LOADING] = "loading",
    [QV_ADAPTER_READY] = "ready",
    [QV_ADAPTER_FAILED] = "failed",
    [QV_ADAPTER_UNLOADED] = "unloaded",
};

static void tell_adapter(qv_session *session, const qv_adapter_event *event)
{
    qv_message message = {.type = QV_MSG_ADAPTER_STATE};
    qv_msg_adapter_state *state = &message.adapter_state;
    state->epoch = qv_session_epoch(session);
    state->name = qv_str_from(event->name);
    state->state = qv_str_from(phase_words[event->phase]);
    if (event->path != NULL)
        qv_set(state, adapter_state, path, qv_str_from(event->path));
    if (event->digest != NULL)
        qv_set(state, adapter_state, digest, qv_str_from(event->digest));
    if (event->reason != NULL)
        qv_set(state, adapter_state, reason, qv_str_from(event->reason));
    if (event->phase == QV_ADAPTER_READY) {
        qv_set(state, adapter_state, rank, event->rank);
        qv_set(state, adapter_state, bytes, (int64_t)event->bytes);
        qv_set(state, adapter_state, load_ms, (int64_t)event->load_ms);
    }
    if (event->phase == QV_ADAPTER_FAILED)
        qv_set(state, adapter_state, error_code, qv_str_from(qv_code_name(event->code)));
    if (qv_session_send_message(session, &message) != QV_OK)
        qv_err("the state of adapter %s is not reported: %s", event->name, qv_error());
}

static void log_adapter(qv_worker *w, const qv_adapter_event *event)
{
    if (event->phase == QV_ADAPTER_READY) {
        qv_info("adapter %s is loaded: rank %d, %" PRIu64 " bytes, %" PRIu64
                " ms, digest %.12s%s%s",
                event->name, event->rank, event->bytes, event->load_ms,
                event->digest != NULL ? event->digest : "", event->reason != NULL ? "; " : "",
                event->reason != NULL ? event->reason : "");
        qv_counter_add(w->counts.loads, 1);
    } else if (event->phase == QV_ADAPTER_FAILED) {
        qv_warn("adapter %s is not loaded: %s", event->name,
                event->reason != NULL ? event->reason : "no reason given");
        qv_counter_add(w->counts.failed_loads, 1);
    } else if (event->phase == QV_ADAPTER_UNLOADED) {
        qv_info("adapter %s is unloaded", event->name);
    }
}

void qv_worker_on_adapter(qv_worker *worker, const qv_adapter_event *event)
{
    note_adapter(worker, event);
    log_adapter(worker, event);
    for (size_t i = 0; i < worker->n_links; i++)
        if (qv_session_epoch(worker->links[i].session) != 0)
            tell_adapter(worker->links[i].session, event);
}

void qv_worker_fill_adapters(const qv_worker *worker, qv_msg_ready *ready, qv_arena *arena)
{
    qv_msg_held_adapter *rows =
        QV_ARENA_ARRAY(arena, qv_msg_held_adapter, qv_map_count(worker->held) + 1);
    uint32_t n = 0;
    if (rows == NULL)
        return;
    QV_MAP_EACH(worker->held, entry)
    {
        const held_adapter *held = entry->value;
        qv_msg_held_adapter *row = &rows[n++];
        row->name = (qv_str){entry->key, (uint32_t)entry->key_size};
        row->digest = qv_str_from(held->digest != NULL ? held->digest : "");
        row->state =
            qv_str_from(phase_words[held->loading ? QV_ADAPTER_LOADING : QV_ADAPTER_READY]);
        if (held->path != NULL)
            qv_set(row, held_adapter, path, qv_str_from(held->path));
        if (!held->loading) {
            qv_set(row, held_adapter, rank, held->rank);
            qv_set(row, held_adapter, bytes, held->bytes);
        }
        qv_set(row, held_adapter, pin, held->pin);
    }
    ready->adapters.data = rows;
    ready->adapters.count = n;
}

void qv_worker_list_adapters(const qv_worker *worker, char *out, size_t size)
{
    size_t used = 0;
    out[0] = 0;
    QV_MAP_EACH(worker->held, entry)
    {
        const held_adapter *held = entry->value;
        if (held->loading || used + entry->key_size + 2 > size)
            continue;
        used += (size_t)snprintf(out + used, size - used, "%s%s", used > 0 ? " " : "", entry->key);
    }
}
