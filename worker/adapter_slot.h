/* The states of an adapter slot on the device (worker/adapter_cache.h):
 *
 *     EMPTY <-> LOADING --> READY <--> PINNED
 *       ^          ^          |
 *       +------ EVICTING <----+
 *
 * Any thread.
 */
#ifndef QV_WORKER_ADAPTER_SLOT_H
#define QV_WORKER_ADAPTER_SLOT_H

typedef enum {
    QV_SLOT_EMPTY,    /* zero */
    QV_SLOT_LOADING,  /* the loader copies a version into it */
    QV_SLOT_READY,    /* sequences may run on it */
    QV_SLOT_PINNED,   /* the same, and it is kept */
    QV_SLOT_EVICTING, /* taken from its version; about to be cleared or filled again */
    QV_SLOT_STATE_COUNT
} qv_slot_state;

typedef enum {
    QV_SLOT_LOAD,   /* copying starts */
    QV_SLOT_LOADED, /* copying is done */
    QV_SLOT_FAILED, /* the device had no memory for it; the slot is clear */
    QV_SLOT_PIN,
    QV_SLOT_UNPIN,
    QV_SLOT_EVICT,
    QV_SLOT_CLEARED,
    QV_SLOT_EVENT_COUNT
} qv_slot_event;

const char *qv_slot_state_name(qv_slot_state state); /* "EVICTING" */
const char *qv_slot_event_name(qv_slot_event event);

/* The state that `event` leads to from `state`, or -1 if it may not happen there. */
int qv_slot_next_state(qv_slot_state state, qv_slot_event event);

#endif
