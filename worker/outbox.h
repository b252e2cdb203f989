/* Outbox: what the engine has to say, until its caller has read it.
 *
 * There are two boxes. One is being filled; qv_outbox_flip hands it out and empties the other,
 * which was handed out before. So deltas and events, and requests that ended, whose memory deltas
 * point into, live until the next flip but one. Arrays and arenas keep their size: once warm,
 * nothing is allocated. Engine thread.
 */
#ifndef QV_WORKER_OUTBOX_H
#define QV_WORKER_OUTBOX_H

#include "worker/request.h"

typedef struct {
    qv_arena arena; /* texts and small arrays of the deltas and events */
    qv_msg_delta *deltas;
    uint32_t n_deltas, deltas_capacity;
    qv_adapter_event *events;
    uint32_t n_events, events_capacity;
    qv_request *ended; /* list through `next`; freed when the box is emptied */
    qv_msg_delta lost; /* where a delta goes that has no room */
    bool failed;       /* something did not fit into memory */
} qv_outbox_side;

typedef struct {
    qv_outbox_side sides[2];
    int filling;
} qv_outbox;

void qv_outbox_init(qv_outbox *box);
void qv_outbox_deinit(qv_outbox *box);

/* Empty the box that was handed out; what was borrowed from it is gone. */
void qv_outbox_begin(qv_outbox *box);

/* Hand out the box that was filled. Errors: NOMEM (something is missing from it). */
qv_status qv_outbox_flip(qv_outbox *box, const qv_outbox_side **out);

/* Whether there is anything to hand out. */
bool qv_outbox_is_empty(const qv_outbox *box);

/* A zeroed delta to fill in; valid until the next one is added. */
qv_msg_delta *qv_outbox_delta(qv_outbox *box);

/* Copy an event. */
void qv_outbox_event(qv_outbox *box, const qv_adapter_event *event);

/* Keep an ended request until its deltas have been read. */
void qv_outbox_keep(qv_outbox *box, qv_request *request);

/* Memory that lives as long as the deltas. NULL (and a failed flip) when there is none. */
void *qv_outbox_alloc(qv_outbox *box, size_t size, size_t align);
qv_str qv_outbox_text(qv_outbox *box, const char *text, size_t size);

#endif
