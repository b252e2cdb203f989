/* One answer being made: a sequence is the record of one of a request's n streams - its tokens, how
 * many of them are computed, the pages and slots it holds - and a state machine.
 *
 *     WAIT_ADAPTER <-> WAITING --> PREFILL --> DECODE
 *                                    |  ^        |  ^
 *                                    v  |        v  |
 *                                   PREEMPTED -------        every state --> FINISHED
 *
 * The scheduler moves it from state to state, the engine fills in tokens. A sequence belongs to its
 * request, which is made on any thread and then handed to the engine's thread.
 */
#ifndef QV_WORKER_SEQUENCE_H
#define QV_WORKER_SEQUENCE_H

#include "common/status.h"

#include <stdint.h>

typedef enum {
    QV_SEQ_WAIT_ADAPTER, /* queued; its adapter is not in a slot of the device yet */
    QV_SEQ_WAITING,      /* queued; needs pages and a state slot */
    QV_SEQ_PREFILL,      /* running; tokens it has are being computed, in chunks */
    QV_SEQ_DECODE,       /* running; one new token a step */
    QV_SEQ_PREEMPTED,    /* queued again; its state is saved, or will be computed again */
    QV_SEQ_FINISHED,     /* holds nothing */
    QV_SEQ_STATE_COUNT
} qv_seq_state;

typedef enum {
    QV_SEQ_ADAPTER_MISSING, /* admission found that the adapter has no slot */
    QV_SEQ_ADAPTER_READY,   /* the adapter is in a slot */
    QV_SEQ_ADMIT,           /* got pages and a state slot for the first time */
    QV_SEQ_CAUGHT_UP,       /* every token it had is computed; the next one was chosen */
    QV_SEQ_PREEMPT,         /* gives its pages and slots to others */
    QV_SEQ_RESUME_PREFILL,  /* got them back, and has several tokens to compute */
    QV_SEQ_RESUME_DECODE,   /* got them back with its state, and goes on where it was */
    QV_SEQ_FINISH,          /* finished, cancelled or failed */
    QV_SEQ_EVENT_COUNT
} qv_seq_event;

const char *qv_seq_state_name(qv_seq_state state); /* "WAIT_ADAPTER" */
const char *qv_seq_event_name(qv_seq_event event);

/* The state that `event` leads to from `state`, or -1 if it may not happen there. */
int qv_seq_next_state(qv_seq_state state, qv_seq_event event);

typedef struct qv_snapshot qv_snapshot;         /* worker/state_cache.h */
typedef struct qv_prefix_scope qv_prefix_scope; /* worker/prefix_cache.h */

typedef struct qv_sequence {
    qv_seq_state state;

    /* What it is. Set before it is queued. */
    struct qv_request *request; /* owner; the scheduler does not look inside */
    uint32_t index;             /* which of the request's n streams */
    int32_t priority;           /* higher goes first */
    bool has_adapter;           /* false: the base model */
    qv_prefix_scope *scope;     /* whom it shares beginnings with; NULL = nobody. The request's */

    /* Tokens: the prompt, then the answer. */
    int32_t *tokens; /* [max_tokens], the first n_tokens are set, the last perhaps to
                      * QV_TOKEN_OF_ROW (ops/batch.h); owned by the request */
    int32_t n_prompt;
    int32_t n_tokens;
    int32_t max_tokens; /* prompt and answer together */
    int32_t n_computed; /* tokens whose keys, values and recurrent state exist */
    int32_t fork_at;    /* a chunk ends here, so that others can go on from it; 0 = nobody does */
    int32_t branch_at;  /* the same, where it leaves a path that the prefix cache knows */
    int32_t kept_at;    /* tokens before which the prefix cache has its latest snapshot */

    /* Logits wanted while the prompt is computed: the row of position p scores prompt token p + 1.
     * Rows below next_score have been seen already, also when they are computed again. */
    bool score_prompt;
    bool score_only; /* no answer: the prompt's last token need not run */
    int32_t next_score;

    /* What it holds while it runs. */
    int32_t *pages; /* [pages of max_tokens], the first n_pages are held; owned by the request */
    int32_t n_pages;
    int32_t state_slot;    /* -1 = none */
    int32_t adapter_slot;  /* -1 = none (base, or not running) */
    qv_snapshot *snapshot; /* saved state to begin from when queued; NULL = compute it */

    /* The scheduler's: place in its lists and order. */
    struct qv_sequence *prev, *next;
    int64_t key;       /* arrival in ms, earlier by its priority: smaller goes first */
    uint64_t order;    /* arrival number; breaks ties */
    int32_t overtaken; /* sequences admitted past this one while it could not be */
    int32_t n_preempted;
} qv_sequence;

/* Apply an event. An event that the table forbids is a mistake of ours and stops the process. */
void qv_sequence_apply(qv_sequence *seq, qv_seq_event event);

/* WAIT_ADAPTER or WAITING or PREEMPTED; PREFILL or DECODE. */
bool qv_sequence_is_queued(const qv_sequence *seq);
bool qv_sequence_is_running(const qv_sequence *seq);

/* Tokens that must be computed before the next one can be chosen (for a score-only sequence: before
 * every row is there), and how many of those are not yet. */
int32_t qv_sequence_goal(const qv_sequence *seq);
int32_t qv_sequence_remaining(const qv_sequence *seq);

/* Rows of logits that running the next n tokens gives: positions [score_from, score_to) score the
 * prompt token after them, and with `choose` the last position chooses the next token. */
typedef struct {
    int32_t score_from, score_to;
    bool choose;
    int32_t count; /* of all */
} qv_logit_rows;
qv_logit_rows qv_sequence_logit_rows(const qv_sequence *seq, int32_t n);

/* Note that n more tokens were computed, and that their prompt rows were scored. */
void qv_sequence_advance(qv_sequence *seq, int32_t n);

/* Append a chosen token. There must be room (n_tokens < max_tokens). */
void qv_sequence_append(qv_sequence *seq, int32_t token);

/* The token appended last was only known to the device: here is its id. */
void qv_sequence_settle(qv_sequence *seq, int32_t token);

#endif
