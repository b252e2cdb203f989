#include "worker/sequence.h"

/* --- State machine --------------------------------------------------------------------------- */

static const char *const state_names[QV_SEQ_STATE_COUNT] = {
    [QV_SEQ_WAIT_ADAPTER] = "WAIT_ADAPTER", [QV_SEQ_WAITING] = "WAITING",
    [QV_SEQ_PREFILL] = "PREFILL",           [QV_SEQ_DECODE] = "DECODE",
    [QV_SEQ_PREEMPTED] = "PREEMPTED",       [QV_SEQ_FINISHED] = "FINISHED",
};

static const char *const event_names[QV_SEQ_EVENT_COUNT] = {
    [QV_SEQ_ADAPTER_MISSING] = "ADAPTER_MISSING",
    [QV_SEQ_ADAPTER_READY] = "ADAPTER_READY",
    [QV_SEQ_ADMIT] = "ADMIT",
    [QV_SEQ_CAUGHT_UP] = "CAUGHT_UP",
    [QV_SEQ_PREEMPT] = "PREEMPT",
    [QV_SEQ_RESUME_PREFILL] = "RESUME_PREFILL",
    [QV_SEQ_RESUME_DECODE] = "RESUME_DECODE",
    [QV_SEQ_FINISH] = "FINISH",
};

/* One row per edge; what is not here may not happen. */
static const struct {
    qv_seq_state from;
    qv_seq_event event;
    qv_seq_state to;
} transitions[] = {
    {QV_SEQ_WAIT_ADAPTER, QV_SEQ_ADAPTER_READY, QV_SEQ_WAITING},
    {QV_SEQ_WAIT_ADAPTER, QV_SEQ_FINISH, QV_SEQ_FINISHED},
    {QV_SEQ_WAITING, QV_SEQ_ADAPTER_MISSING, QV_SEQ_WAIT_ADAPTER},
    {QV_SEQ_WAITING, QV_SEQ_ADMIT, QV_SEQ_PREFILL},
    {QV_SEQ_WAITING, QV_SEQ_FINISH, QV_SEQ_FINISHED},
    {QV_SEQ_PREFILL, QV_SEQ_CAUGHT_UP, QV_SEQ_DECODE},
    {QV_SEQ_PREFILL, QV_SEQ_PREEMPT, QV_SEQ_PREEMPTED},
    {QV_SEQ_PREFILL, QV_SEQ_FINISH, QV_SEQ_FINISHED},
    {QV_SEQ_DECODE, QV_SEQ_PREEMPT, QV_SEQ_PREEMPTED},
    {QV_SEQ_DECODE, QV_SEQ_FINISH, QV_SEQ_FINISHED},
    {QV_SEQ_PREEMPTED, QV_SEQ_RESUME_PREFILL, QV_SEQ_PREFILL},
    {QV_SEQ_PREEMPTED, QV_SEQ_RESUME_DECODE, QV_SEQ_DECODE},
    {QV_SEQ_PREEMPTED, QV_SEQ_FINISH, QV_SEQ_FINISHED},
};

const char *qv_seq_state_name(qv_seq_state state)
{
    return state_names[state];
}

const char *qv_seq_event_name(qv_seq_event event)
{
    return event_names[event];
}

int qv_seq_next_state(qv_seq_state state, qv_seq_event event)
{
    for (size_t i = 0; i < sizeof transitions / sizeof transitions[0]; i++)
        if (transitions[i].from == state && transitions[i].event == event)
            return (int)transitions[i].to;
    return -1;
}

void qv_sequence_apply(qv_sequence *seq, qv_seq_event event)
{
    int next = qv_seq_next_state(seq->state, event);
    QV_ASSERT(next >= 0);
    seq->state = (qv_seq_state)next;
}

bool qv_sequence_is_queued(const qv_sequence *seq)
{
    return seq->state == QV_SEQ_WAIT_ADAPTER || seq->state == QV_SEQ_WAITING ||
           seq->state == QV_SEQ_PREEMPTED;
}

bool qv_sequence_is_running(const qv_sequence *seq)
{
    return seq->state == QV_SEQ_PREFILL || seq->state == QV_SEQ_DECODE;
}

/* --- Tokens ---------------------------------------------------------------------------------- */

int32_t qv_sequence_goal(const qv_sequence *seq)
{
    return seq->score_only ? seq->n_prompt - 1 : seq->n_tokens;
}

int32_t qv_sequence_remaining(const qv_sequence *seq)
{
    return qv_sequence_goal(seq) - seq->n_computed;
}

qv_logit_rows qv_sequence_logit_rows(const qv_sequence *seq, int32_t n)
{
    int32_t end = seq->n_computed + n;
    qv_logit_rows rows = {.choose = !seq->score_only && end == seq->n_tokens};
    if (seq->score_prompt) {
        int32_t last = seq->n_prompt - 1; /* its row scores nothing */
        rows.score_from = seq->next_score > seq->n_computed ? seq->next_score : seq->n_computed;
        rows.score_to = end < last ? end : last;
        if (rows.score_to < rows.score_from)
            rows.score_to = rows.score_from;
    }
    rows.count = rows.score_to - rows.score_from + (rows.choose ? 1 : 0);
    return rows;
}

void qv_sequence_advance(qv_sequence *seq, int32_t n)
{
    QV_ASSERT(n > 0 && n <= qv_sequence_remaining(seq));
    seq->n_computed += n;
    int32_t n_scored = seq->n_computed < seq->n_prompt - 1 ? seq->n_computed : seq->n_prompt - 1;
    if (seq->score_prompt && n_scored > seq->next_score)
        seq->next_score = n_scored;
}

void qv_sequence_append(qv_sequence *seq, int32_t token)
{
    QV_ASSERT(seq->n_tokens < seq->max_tokens);
    seq->tokens[seq->n_tokens++] = token;
}

void qv_sequence_settle(qv_sequence *seq, int32_t token)
{
    QV_ASSERT(seq->n_tokens > seq->n_prompt && seq->tokens[seq->n_tokens - 1] < 0);
    seq->tokens[seq->n_tokens - 1] = token;
}
