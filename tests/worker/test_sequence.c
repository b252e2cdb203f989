/* Sequences: the state machine edge by edge, and the arithmetic of tokens and rows of logits. */
#include "worker/sequence.h"

#include <criterion/criterion.h>
#include <signal.h>

#define WAIT_ADAPTER QV_SEQ_WAIT_ADAPTER
#define WAITING      QV_SEQ_WAITING
#define PREFILL      QV_SEQ_PREFILL
#define DECODE       QV_SEQ_DECODE
#define PREEMPTED    QV_SEQ_PREEMPTED
#define FINISHED     QV_SEQ_FINISHED

/* The whole table: rows are states, columns events in the order of the enum; -1 is refused. */
static const int expected[QV_SEQ_STATE_COUNT][QV_SEQ_EVENT_COUNT] = {
    /*                missing       ready    admit    caught_up preempt    prefill  decode  finish
     */
    [WAIT_ADAPTER] = {-1, WAITING, -1, -1, -1, -1, -1, FINISHED},
    [WAITING] = {WAIT_ADAPTER, -1, PREFILL, -1, -1, -1, -1, FINISHED},
    [PREFILL] = {-1, -1, -1, DECODE, PREEMPTED, -1, -1, FINISHED},
    [DECODE] = {-1, -1, -1, -1, PREEMPTED, -1, -1, FINISHED},
    [PREEMPTED] = {-1, -1, -1, -1, -1, PREFILL, DECODE, FINISHED},
    [FINISHED] = {-1, -1, -1, -1, -1, -1, -1, -1},
};

Test(sequence, takes_every_edge_and_no_other)
{
    for (int state = 0; state < QV_SEQ_STATE_COUNT; state++)
        for (int event = 0; event < QV_SEQ_EVENT_COUNT; event++)
            cr_expect_eq(qv_seq_next_state(state, event), expected[state][event], "%s on %s",
                         qv_seq_event_name(event), qv_seq_state_name(state));
}

Test(sequence, walks_from_queue_to_end)
{
    static const struct {
        qv_seq_event event;
        qv_seq_state state;
    } walk[] = {
        {QV_SEQ_ADAPTER_MISSING, WAIT_ADAPTER},
        {QV_SEQ_ADAPTER_READY, WAITING},
        {QV_SEQ_ADMIT, PREFILL},
        {QV_SEQ_PREEMPT, PREEMPTED},
        {QV_SEQ_RESUME_PREFILL, PREFILL},
        {QV_SEQ_CAUGHT_UP, DECODE},
        {QV_SEQ_PREEMPT, PREEMPTED},
        {QV_SEQ_RESUME_DECODE, DECODE},
        {QV_SEQ_FINISH, FINISHED},
    };
    qv_sequence seq = {.state = WAITING};
    for (size_t i = 0; i < sizeof walk / sizeof *walk; i++) {
        qv_sequence_apply(&seq, walk[i].event);
        cr_assert_eq(seq.state, walk[i].state, "step %zu: %s", i, qv_seq_state_name(seq.state));
    }
}

Test(sequence, stops_the_process_on_a_forbidden_event, .signal = SIGABRT)
{
    qv_sequence seq = {.state = FINISHED};
    qv_sequence_apply(&seq, QV_SEQ_ADMIT);
}

Test(sequence, tells_which_rows_need_logits)
{
    static const struct {
        const char *what;
        int32_t n_prompt, n_tokens, n_computed, next_score;
        bool score, score_only;
        int32_t n; /* tokens run */
        int32_t from, to;
        bool choose;
        int32_t count;
    } rows[] = {
        {"a chunk that is not the last", 10, 10, 0, 0, false, false, 4, 0, 0, false, 0},
        {"the last chunk", 10, 10, 4, 0, false, false, 6, 0, 0, true, 1},
        {"one decode", 10, 13, 12, 0, false, false, 1, 0, 0, true, 1},
        {"a prompt of one token", 1, 1, 0, 0, false, false, 1, 0, 0, true, 1},
        {"a first scored chunk", 10, 10, 0, 0, true, false, 4, 0, 4, false, 4},
        {"a last scored chunk", 10, 10, 4, 4, true, false, 6, 4, 9, true, 6},
        {"scored alone", 10, 10, 0, 0, true, true, 9, 0, 9, false, 9},
        {"scored alone, a later chunk", 10, 10, 5, 5, true, true, 2, 5, 7, false, 2},
        {"a scored prompt of one token", 1, 1, 0, 0, true, false, 1, 0, 0, true, 1},
        {"computed again, scored in part before", 10, 10, 0, 6, true, false, 8, 6, 8, false, 2},
        {"computed again, all scored before", 10, 12, 0, 9, true, false, 12, 9, 9, true, 1},
        {"resumed with an answer", 10, 14, 0, 0, true, false, 14, 0, 9, true, 10},
        {"resumed, chunk within the answer", 10, 14, 10, 9, true, false, 2, 10, 10, false, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_sequence seq = {
            .n_prompt = rows[i].n_prompt,
            .n_tokens = rows[i].n_tokens,
            .n_computed = rows[i].n_computed,
            .next_score = rows[i].next_score,
            .score_prompt = rows[i].score,
            .score_only = rows[i].score_only,
        };
        qv_logit_rows got = qv_sequence_logit_rows(&seq, rows[i].n);
        cr_expect_eq(got.count, rows[i].count, "%s: count %d", rows[i].what, got.count);
        cr_expect_eq(got.choose, rows[i].choose, "%s", rows[i].what);
        cr_expect_eq(got.score_to - got.score_from, rows[i].to - rows[i].from, "%s: [%d, %d)",
                     rows[i].what, got.score_from, got.score_to);
        if (rows[i].to > rows[i].from)
            cr_expect_eq(got.score_from, rows[i].from, "%s: from %d", rows[i].what, got.score_from);
    }
}

Test(sequence, advances_to_its_goal)
{
    int32_t tokens[6] = {5, 6, 7};
    qv_sequence seq = {
        .tokens = tokens, .n_prompt = 3, .n_tokens = 3, .max_tokens = 6, .score_prompt = true};
    cr_assert_eq(qv_sequence_remaining(&seq), 3);
    qv_sequence_advance(&seq, 1);
    cr_assert_eq(seq.next_score, 1);
    qv_sequence_advance(&seq, 2);
    cr_assert_eq(seq.next_score, 2, "the prompt's last token scores nothing");
    cr_assert_eq(qv_sequence_remaining(&seq), 0);
    qv_sequence_append(&seq, 8);
    cr_assert_eq(qv_sequence_remaining(&seq), 1);
    cr_assert_eq(tokens[3], 8);

    qv_sequence score = {.n_prompt = 3, .n_tokens = 3, .score_only = true};
    cr_assert_eq(qv_sequence_goal(&score), 2, "the last token of a scored prompt need not run");
}
