#include "broker/explain.h"

#include <stdlib.h>
#include <string.h>

const char *const qv_wait_names[QV_WAIT_COUNT] = {
    [QV_WAIT_TURN] = "turn",
    [QV_WAIT_CREDIT] = "credit",
    [QV_WAIT_LOAD] = "load",
    [QV_WAIT_WORKER] = "worker",
};

qv_status qv_explain_init(qv_explain *explain, uint32_t n)
{
    *explain = (qv_explain){.n = n};
    explain->records = n > 0 ? calloc(n, sizeof *explain->records) : NULL;
    if (n > 0 && explain->records == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to explain %u requests", n);
    return QV_OK;
}

void qv_explain_deinit(qv_explain *explain)
{
    free(explain->records);
    *explain = (qv_explain){0};
}

const qv_explain_record *qv_explain_find(const qv_explain *explain, const char *id, size_t size)
{
    for (uint32_t i = 0; i < explain->n; i++) {
        uint32_t slot = (explain->next + explain->n - 1 - i) % explain->n;
        const qv_explain_record *record = &explain->records[slot];
        if (record->serial == 0)
            return NULL;
        if (record->id_size == size && memcmp(record->id, id, size) == 0)
            return record;
    }
    return NULL;
}

static qv_explain_record *record_of(const qv_explain *explain, const qv_job *job)
{
    if (explain->n == 0 || job->explain >= explain->n)
        return NULL;
    qv_explain_record *record = &explain->records[job->explain];
    return record->serial == job->serial ? record : NULL;
}

/* Into an array. */
#define copy(out, text) qv_text_copy(out, sizeof(out), text, strlen(text))

void qv_explain_accepted(qv_explain *explain, qv_job *job, qv_str asked)
{
    if (explain->n == 0)
        return;
    qv_explain_record *record = &explain->records[explain->next];
    job->explain = explain->next;
    explain->next = (explain->next + 1) % explain->n;
    /* What is behind counts says itself how much of it holds. */
    memset(record, 0, offsetof(qv_explain_record, first));
    record->first.at_us = record->last.at_us = 0;
    record->serial = job->serial;
    record->id_size = job->id_size;
    record->priority = job->priority;
    record->received_us = record->waits_since_us = job->received_us;
    record->state = qv_job_state_name(job->state);
    memcpy(record->id, job->id, job->id_size);
    copy(record->tenant, job->tenant->name);
    qv_text_copy(record->asked, sizeof record->asked, asked.data, asked.size);
    copy(record->adapter, job->group->name);
}

/* Count the time of the wait that is over. */
static void end_wait(qv_explain_record *record, uint64_t now_us)
{
    if (record->waits_since_us != 0)
        record->waited_us[record->waits_for] += now_us - record->waits_since_us;
    record->waits_since_us = 0;
}

void qv_explain_waits(qv_explain *explain, const qv_job *job, qv_wait reason, uint64_t now_us)
{
    qv_explain_record *record = record_of(explain, job);
    if (record == NULL)
        return;
    end_wait(record, now_us);
    record->waits_for = reason;
    record->waits_since_us = now_us;
}

void qv_explain_decided(qv_explain *explain, const qv_job *job, const qv_route *route,
                        const qv_route_trace *trace, uint64_t now_us)
{
    qv_explain_record *record = record_of(explain, job);
    if (record == NULL)
        return;
    qv_explain_decision *decision = record->n_decisions++ == 0 ? &record->first : &record->last;
    decision->at_us = now_us;
    decision->verdict = route->verdict;
    copy(decision->worker, route->member != NULL ? route->member->id : "");
    decision->n_rows = trace->n;
    for (uint32_t i = 0; i < trace->n; i++) {
        const qv_route_row *from = &trace->rows[i];
        qv_explain_row *to = &decision->rows[i];
        copy(to->worker, from->member->id);
        to->has_credit = from->has_credit;
        to->queue_ms = (float)from->queue_ms;
        to->load_ms = (float)from->load_ms;
        to->prefill_ms = (float)from->prefill_ms;
    }
}

static qv_explain_attempt *latest_attempt(qv_explain_record *record)
{
    uint32_t n = record->n_attempts;
    if (n == 0)
        return NULL;
    return &record->attempts[n < QV_EXPLAIN_ATTEMPTS ? n - 1 : QV_EXPLAIN_ATTEMPTS - 1];
}

void qv_explain_sent(qv_explain *explain, const qv_job *job, const qv_member *member,
                     uint64_t now_us)
{
    qv_explain_record *record = record_of(explain, job);
    if (record == NULL)
        return;
    end_wait(record, now_us);
    if (record->n_attempts++ >= QV_EXPLAIN_ATTEMPTS) /* the second makes room */
        memmove(&record->attempts[1], &record->attempts[2],
                (QV_EXPLAIN_ATTEMPTS - 2) * sizeof record->attempts[0]);
    qv_explain_attempt *attempt = latest_attempt(record);
    *attempt = (qv_explain_attempt){.sent_us = now_us};
    copy(attempt->worker, member->id);
    record->state = "running";
    if (record->dispatched_us == 0)
        record->dispatched_us = now_us;
}

void qv_explain_returned(qv_explain *explain, const qv_job *job, const char *how, uint64_t now_us)
{
    qv_explain_record *record = record_of(explain, job);
    qv_explain_attempt *attempt = record != NULL ? latest_attempt(record) : NULL;
    if (attempt == NULL || attempt->end != NULL)
        return;
    attempt->end = how;
    attempt->ended_us = now_us;
    record->state = "queued";
    record->waits_for = QV_WAIT_TURN;
    record->waits_since_us = now_us;
}

void qv_explain_ended(qv_explain *explain, const qv_job *job, const char *error, uint64_t now_us)
{
    qv_explain_record *record = record_of(explain, job);
    if (record == NULL)
        return;
    end_wait(record, now_us);
    record->state = qv_job_state_name(job->state);
    record->ended_us = now_us;
    record->first_token_us = job->first_token_us;
    copy(record->error, error != NULL ? error : "");
    qv_explain_attempt *attempt = latest_attempt(record);
    if (attempt == NULL || attempt->end != NULL)
        return;
    attempt->end = record->state;
    attempt->ended_us = now_us;
}
