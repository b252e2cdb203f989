/* What a request will need, whether it can be in time, and the story of one that was. */
#include "broker/core_internal.h"

#include <string.h>

/* --- Estimates --------------------------------------------------------------------------------*/

void qv_core_estimate(qv_core *core, qv_job *job, const qv_msg_submit *submit, qv_str adapter)
{
    (void)core;
    double bytes = submit->tokens.count > 0
                       ? (double)submit->tokens.count * sizeof *submit->tokens.data
                       : (double)(submit->prompt.size + submit->messages.size + submit->tools.size);
    job->n_prompt = qv_expect_tokens(bytes);
    if (job->n_prompt < 1)
        job->n_prompt = 1;
    job->n_answer = qv_expect_answer(job->group, (double)submit->max_tokens) * (double)submit->n;
    job->cost = qv_fair_cost(job->n_prompt, job->n_answer);
    qv_prefix_of(submit, adapter, &job->prefix);
}

/* Milliseconds until the request's turn comes; below 0: not known. What a worker does when it is
 * not full says little about what it can do, so only rates of full ones count. */
static double expect_wait_ms(const qv_core *core, const qv_job *job)
{
    const qv_group *group = job->group;
    bool is_base = group == core->pool.base, has_credit = false;
    double rate = 0, own_rate = 0;
    QV_LIST_EACH(&core->pool.members, qv_member, link, member)
    {
        if (member->state != QV_MEMBER_READY)
            continue;
        const qv_resident *resident = is_base ? NULL : qv_resident_find(group, member);
        bool serves = is_base || (resident != NULL && qv_resident_serves(resident));
        has_credit =
            has_credit || (qv_member_credit(member) > 0 && (serves || group->n_ready == 0));
        rate += qv_expect_full_rate(member);
        if (serves || group->n_ready == 0)
            own_rate += qv_expect_full_rate(member);
    }
    if (has_credit && group->n_queued == 0)
        return 0;
    if (rate <= 0 || own_rate <= 0)
        return -1;
    double all = qv_fair_cost_ahead(&core->requests.fair, job->tenant) * 1000 / rate;
    double own = group->queued_cost * 1000 / own_rate;
    double ahead = job->tenant->queued_cost * 1000 / rate;
    own = own < ahead ? own : ahead; /* of its own adapter's queue what is its tenant's */
    return all > own ? all : own;
}

static double best_prefill_ms(const qv_core *core, const qv_job *job)
{
    double rate = 0;
    QV_LIST_EACH(&core->pool.members, qv_member, link, member)
    if (qv_expect_prefill_rate(member) > rate)
        rate = qv_expect_prefill_rate(member);
    uint32_t known = 0;
    QV_LIST_EACH(&core->pool.members, qv_member, link, member)
    {
        uint32_t bytes = qv_prefix_match(member->prefix, &job->prefix);
        known = bytes > known ? bytes : known;
    }
    double missing = job->n_prompt - qv_expect_tokens(known);
    return rate > 0 && missing > 0 ? missing * 1000 / rate : 0;
}

const char *qv_core_is_hopeless(qv_core *core, const qv_job *job, int64_t *retry_ms,
                                uint64_t now_us)
{
    const qv_group *group = job->group;
    if (job->deadline_us == 0 || core->pool.n_members[QV_MEMBER_READY] == 0)
        return NULL;
    double left_ms = (double)(job->deadline_us - now_us) / QV_MS;
    double wait_ms = expect_wait_ms(core, job);
    bool is_there = group == core->pool.base || group->n_ready > 0;
    double load_ms = is_there ? 0 : qv_expect_load_ms(group);
    double prefill_ms = best_prefill_ms(core, job);
    double estimate_ms = (wait_ms > load_ms ? wait_ms : load_ms) + prefill_ms;
    if (wait_ms < 0 || estimate_ms <= left_ms)
        return NULL;
    *retry_ms = (int64_t)(wait_ms > load_ms ? wait_ms : load_ms) + 1;
    const char *text = qv_arena_printf(
        &core->arena,
        "the deadline of %.0f ms cannot be met: the first token is expected in %.0f ms (%.0f ms "
        "until its turn behind %lld waiting requests, %.0f ms to load the adapter meanwhile, %.0f "
        "ms for the prompt)",
        left_ms, estimate_ms, wait_ms, (long long)core->requests.fair.n_queued, load_ms,
        prefill_ms);
    return text != NULL ? text : "the deadline cannot be met";
}

/* --- explain ----------------------------------------------------------------------------------*/

static const char *const verdict_names[] = {
    [QV_ROUTE_SEND] = "send", [QV_ROUTE_LOAD] = "load", [QV_ROUTE_WAIT] = "wait"};

static double ms_between(uint64_t from_us, uint64_t to_us)
{
    return to_us > from_us ? (double)(to_us - from_us) / QV_MS : 0;
}

static qv_status fill_decision(qv_core *core, const qv_explain_record *record,
                               const qv_explain_decision *from, qv_msg_explain_decision *to)
{
    qv_msg_explain_candidate *rows =
        QV_ARENA_ARRAY(&core->arena, qv_msg_explain_candidate, from->n_rows + 1);
    if (rows == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to explain a request");
    to->at_ms = ms_between(record->received_us, from->at_us);
    to->verdict = qv_str_from(verdict_names[from->verdict]);
    if (from->worker[0] != '\0')
        qv_set(to, explain_decision, worker, qv_str_from(from->worker));
    for (uint32_t i = 0; i < from->n_rows; i++) {
        const qv_explain_row *row = &from->rows[i];
        double total = (double)row->queue_ms + (double)row->load_ms + (double)row->prefill_ms;
        rows[i] = (qv_msg_explain_candidate){.worker = qv_str_from(row->worker),
                                             .score_ms = total,
                                             .queue_ms = (double)row->queue_ms,
                                             .load_ms = (double)row->load_ms,
                                             .prefill_ms = (double)row->prefill_ms,
                                             .credit = row->has_credit};
    }
    to->candidates.data = rows;
    to->candidates.count = from->n_rows;
    return QV_OK;
}

static qv_status fill_decisions(qv_core *core, const qv_explain_record *record, qv_msg_explain *out)
{
    const qv_explain_decision *all[] = {&record->first, &record->last};
    qv_msg_explain_decision *rows = QV_ARENA_ARRAY(&core->arena, qv_msg_explain_decision, 2);
    if (rows == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to explain a request");
    memset(rows, 0, 2 * sizeof *rows);
    out->decisions.data = rows;
    for (size_t i = 0; i < 2; i++)
        if (all[i]->at_us != 0)
            QV_TRY(fill_decision(core, record, all[i], &rows[out->decisions.count++]));
    return QV_OK;
}

static qv_status fill_waits(qv_core *core, const qv_explain_record *record, qv_msg_explain *out,
                            uint64_t now_us)
{
    qv_msg_explain_wait *rows = QV_ARENA_ARRAY(&core->arena, qv_msg_explain_wait, QV_WAIT_COUNT);
    if (rows == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to explain a request");
    out->waits.data = rows;
    for (int reason = 0; reason < QV_WAIT_COUNT; reason++) {
        bool is_waiting = record->waits_since_us != 0 && (int)record->waits_for == reason;
        double ms = (double)record->waited_us[reason] / QV_MS;
        if (is_waiting)
            ms += ms_between(record->waits_since_us, now_us);
        if (ms > 0 || is_waiting)
            rows[out->waits.count++] =
                (qv_msg_explain_wait){.reason = qv_str_from(qv_wait_names[reason]), .ms = ms};
    }
    return QV_OK;
}

static qv_status fill_attempts(qv_core *core, const qv_explain_record *record, qv_msg_explain *out,
                               uint64_t now_us)
{
    uint32_t n =
        record->n_attempts < QV_EXPLAIN_ATTEMPTS ? record->n_attempts : QV_EXPLAIN_ATTEMPTS;
    qv_msg_explain_attempt *rows = QV_ARENA_ARRAY(&core->arena, qv_msg_explain_attempt, n + 1);
    if (rows == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to explain a request");
    for (uint32_t i = 0; i < n; i++) {
        const qv_explain_attempt *from = &record->attempts[i];
        uint64_t end_us = from->ended_us != 0 ? from->ended_us : now_us;
        rows[i] =
            (qv_msg_explain_attempt){.worker = qv_str_from(from->worker),
                                     .at_ms = ms_between(record->received_us, from->sent_us),
                                     .ms = ms_between(from->sent_us, end_us),
                                     .end = qv_str_from(from->end != NULL ? from->end : "running")};
    }
    out->attempts.data = rows;
    out->attempts.count = n;
    return QV_OK;
}

qv_status qv_core_fill_explain(qv_core *core, const qv_explain_record *record, qv_msg_explain *out,
                               uint64_t now_us)
{
    out->id = (qv_str){record->id, record->id_size};
    out->state = qv_str_from(record->state);
    out->tenant = qv_str_from(record->tenant);
    out->asked = qv_str_from(record->asked);
    out->adapter = qv_str_from(record->adapter);
    out->priority = record->priority;
    out->age_ms = ms_between(record->received_us, now_us);
    if (record->dispatched_us != 0)
        qv_set(out, explain, queue_ms, ms_between(record->received_us, record->dispatched_us));
    if (record->first_token_us != 0)
        qv_set(out, explain, first_token_ms,
               ms_between(record->received_us, record->first_token_us));
    if (record->ended_us != 0)
        qv_set(out, explain, total_ms, ms_between(record->received_us, record->ended_us));
    if (record->error[0] != '\0')
        qv_set(out, explain, error, qv_str_from(record->error));
    out->n_decisions = record->n_decisions;
    out->n_attempts = record->n_attempts;
    QV_TRY(fill_waits(core, record, out, now_us));
    QV_TRY(fill_decisions(core, record, out));
    return fill_attempts(core, record, out, now_us);
}
