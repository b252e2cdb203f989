/* Explain: why the latest requests went where they went, for `quiver explain ID`. A ring of records
 * of fixed size: who was considered with which scores, what a request waited for and how long, and
 * its attempts. A record outlives its request until as many newer ones have come. Pure; one thread.
 */
#ifndef QV_BROKER_EXPLAIN_H
#define QV_BROKER_EXPLAIN_H

#include "broker/requests.h"
#include "broker/route.h"

#define QV_EXPLAIN_ATTEMPTS 4 /* kept of a request: the first, and the latest others */

/* What a request waits for. */
typedef enum {
    QV_WAIT_TURN,   /* others of its adapter or tenant before it, or its tenant's limit */
    QV_WAIT_CREDIT, /* the workers that hold its adapter are full */
    QV_WAIT_LOAD,   /* its adapter is being loaded, or there is no room for it */
    QV_WAIT_WORKER, /* there is no worker at all */
    QV_WAIT_COUNT
} qv_wait;

extern const char *const qv_wait_names[QV_WAIT_COUNT]; /* "turn" */

typedef struct {
    char worker[QV_POOL_ID_MAX + 1];
    bool has_credit;
    float queue_ms, load_ms, prefill_ms;
} qv_explain_row;

/* One look at where to send it. */
typedef struct {
    uint64_t at_us; /* 0 = there was none */
    qv_route_verdict verdict;
    char worker[QV_POOL_ID_MAX + 1]; /* chosen, to run or to load; "" = none */
    uint32_t n_rows;
    qv_explain_row rows[QV_ROUTE_MAX_ROWS];
} qv_explain_decision;

typedef struct {
    char worker[QV_POOL_ID_MAX + 1];
    uint64_t sent_us, ended_us; /* 0 = not yet */
    const char *end;            /* a literal: "done", "worker lost" ...; NULL = not yet */
} qv_explain_attempt;

typedef struct {
    uint64_t serial; /* of the job; 0 = no record */
    char id[QV_JOB_ID_MAX + 1];
    uint8_t id_size;
    char tenant[QV_TENANT_MAX_NAME + 1];
    char asked[QV_ADAPTER_NAME_MAX + 1];   /* the name in the submit */
    char adapter[QV_ADAPTER_NAME_MAX + 1]; /* the same, or what it stands for */
    int32_t priority;
    uint64_t received_us, dispatched_us, first_token_us, ended_us;
    const char *state; /* a literal */
    char error[160];   /* how it failed; "" = it did not */

    qv_wait waits_for;
    uint64_t waits_since_us; /* 0 = it does not wait */
    uint64_t waited_us[QV_WAIT_COUNT];
    uint32_t n_decisions, n_attempts; /* in all */
    qv_explain_decision first, last;  /* the first look, and the latest after it */
    qv_explain_attempt attempts[QV_EXPLAIN_ATTEMPTS];
} qv_explain_record;

typedef struct {
    qv_explain_record *records; /* [n], owned; NULL: nothing is kept */
    uint32_t n, next;
} qv_explain;

/* Keep the latest n (0 = none). Errors: NOMEM. */
qv_status qv_explain_init(qv_explain *explain, uint32_t n);
void qv_explain_deinit(qv_explain *explain);

/* The latest record with this id, or NULL. */
const qv_explain_record *qv_explain_find(const qv_explain *explain, const char *id, size_t size);

/* What happens to a job; each is fine for one whose record is gone. Texts called literals are kept
 * as pointers. */
void qv_explain_accepted(qv_explain *explain, qv_job *job, qv_str asked);
void qv_explain_waits(qv_explain *explain, const qv_job *job, qv_wait reason, uint64_t now_us);
void qv_explain_decided(qv_explain *explain, const qv_job *job, const qv_route *route,
                        const qv_route_trace *trace, uint64_t now_us);
void qv_explain_sent(qv_explain *explain, const qv_job *job, const qv_member *member,
                     uint64_t now_us);
void qv_explain_returned(qv_explain *explain, const qv_job *job, const char *how, uint64_t now_us);
void qv_explain_ended(qv_explain *explain, const qv_job *job, const char *error, uint64_t now_us);

#endif
