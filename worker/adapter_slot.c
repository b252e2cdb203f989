#include "worker/adapter_slot.h"

#include <stddef.h>

static const char *const state_names[QV_SLOT_STATE_COUNT] = {
    [QV_SLOT_EMPTY] = "EMPTY",   [QV_SLOT_LOADING] = "LOADING",   [QV_SLOT_READY] = "READY",
    [QV_SLOT_PINNED] = "PINNED", [QV_SLOT_EVICTING] = "EVICTING",
};

static const char *const event_names[QV_SLOT_EVENT_COUNT] = {
    [QV_SLOT_LOAD] = "LOAD",       [QV_SLOT_LOADED] = "LOADED", [QV_SLOT_FAILED] = "FAILED",
    [QV_SLOT_PIN] = "PIN",         [QV_SLOT_UNPIN] = "UNPIN",   [QV_SLOT_EVICT] = "EVICT",
    [QV_SLOT_CLEARED] = "CLEARED",
};

static const struct {
    qv_slot_state from;
    qv_slot_event event;
    qv_slot_state to;
} transitions[] = {
    {QV_SLOT_EMPTY, QV_SLOT_LOAD, QV_SLOT_LOADING},
    {QV_SLOT_LOADING, QV_SLOT_LOADED, QV_SLOT_READY},
    {QV_SLOT_LOADING, QV_SLOT_FAILED, QV_SLOT_EMPTY},
    {QV_SLOT_READY, QV_SLOT_PIN, QV_SLOT_PINNED},
    {QV_SLOT_PINNED, QV_SLOT_UNPIN, QV_SLOT_READY},
    {QV_SLOT_READY, QV_SLOT_EVICT, QV_SLOT_EVICTING},
    {QV_SLOT_EVICTING, QV_SLOT_LOAD, QV_SLOT_LOADING},
    {QV_SLOT_EVICTING, QV_SLOT_CLEARED, QV_SLOT_EMPTY},
};

const char *qv_slot_state_name(qv_slot_state state)
{
    return state_names[state];
}

const char *qv_slot_event_name(qv_slot_event event)
{
    return event_names[event];
}

int qv_slot_next_state(qv_slot_state state, qv_slot_event event)
{
    for (size_t i = 0; i < sizeof transitions / sizeof transitions[0]; i++)
        if (transitions[i].from == state && transitions[i].event == event)
            return (int)transitions[i].to;
    return -1;
}
