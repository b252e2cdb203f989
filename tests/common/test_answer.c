#include "common/answer.h"

#include <criterion/criterion.h>
#include <string.h>

/* One message of a stream as the tests write it. */
typedef struct {
    int64_t seq;
    const char *text;
    int32_t tokens[3];
    uint32_t n_tokens;
    bool logprobs, tops; /* -0.5 each; the token itself and the next one */
} part;

/* Fill in a message; its arrays live until the next call. */
static qv_msg_tokens message_of(const part *p)
{
    static int32_t tokens[3], top_tokens[6];
    static double logprobs[3] = {-0.5, -0.5, -0.5},
                  top_logprobs[6] = {-0.5, -2, -0.5, -2, -0.5, -2};
    static uint32_t start[4] = {0, 2, 4, 6};
    memcpy(tokens, p->tokens, sizeof(tokens));
    for (int i = 0; i < 6; i++)
        top_tokens[i] = tokens[i / 2] + i % 2;
    qv_msg_tokens m = {
        .seq = p->seq, .text = qv_str_from(p->text), .tokens = {tokens, p->n_tokens}};
    if (p->logprobs)
        m.logprobs = (qv_reals){logprobs, p->n_tokens};
    if (p->tops)
        m.top_logprobs = (qv_tops){p->n_tokens, start, top_tokens, top_logprobs};
    return m;
}

static qv_status add(qv_answer *answer, part p)
{
    qv_msg_tokens m = message_of(&p);
    return qv_answer_add_tokens(answer, &m);
}

Test(answer, joins_the_messages_of_a_stream)
{
    qv_answer answer;
    qv_answer_init(&answer, 0);
    cr_assert_eq(add(&answer, (part){0, "Hel", {10}, 1, true, true}), QV_OK);
    cr_assert_eq(add(&answer, (part){1, "", {20}, 1, true, true}), QV_OK);
    cr_assert_eq(add(&answer, (part){2, "lo", {30, 40, 50}, 3, true, true}), QV_OK);
    cr_assert_eq(add(&answer, (part){3, "!", {0}, 0, false, false}), QV_OK, "%s", qv_error());
    cr_assert(qv_str_equal(qv_answer_text(&answer), "Hello!"));

    qv_msg_done done = {0};
    qv_answer_fill_done(&answer, &done);
    static const int32_t tokens[] = {10, 20, 30, 40, 50};
    cr_assert_eq(done.tokens.count, 5);
    cr_assert_arr_eq(done.tokens.data, tokens, sizeof(tokens));
    cr_assert(qv_has(&done, done, text) && qv_has(&done, done, tokens) &&
              qv_has(&done, done, logprobs) && qv_has(&done, done, top_logprobs));
    cr_assert(done.logprobs.count == 5 && done.logprobs.data[4] == -0.5);
    cr_assert_eq(done.top_logprobs.count, 5);
    for (uint32_t i = 0; i < 5; i++) {
        uint32_t first = done.top_logprobs.start[i];
        cr_assert_eq(done.top_logprobs.start[i + 1] - first, 2);
        cr_assert_eq(done.top_logprobs.token[first], tokens[i]);
        cr_assert_eq(done.top_logprobs.token[first + 1], tokens[i] + 1);
        cr_assert_eq(done.top_logprobs.logprob[first + 1], -2.0);
    }
    qv_answer_deinit(&answer);
}

Test(answer, an_empty_answer_has_text_and_tokens_but_no_logprobs)
{
    qv_answer answer = {0};
    qv_msg_done done = {0};
    qv_answer_fill_done(&answer, &done);
    cr_assert(qv_has(&done, done, text) && qv_has(&done, done, tokens));
    cr_assert_not(qv_has(&done, done, logprobs) || qv_has(&done, done, top_logprobs));
    qv_answer_deinit(&answer);
}

Test(answer, notices_lost_and_repeated_messages)
{
    qv_answer answer = {0};
    cr_assert_eq(add(&answer, (part){1, "b", {1}, 1, false, false}), QV_ERR_STATE);
    cr_assert_str_eq(qv_error(), "message 1 of the stream came where 0 is the next");
    cr_assert_eq(add(&answer, (part){0, "a", {1}, 1, false, false}), QV_OK);
    cr_assert_eq(add(&answer, (part){0, "a", {1}, 1, false, false}), QV_ERR_EXISTS);
    cr_assert_eq(add(&answer, (part){2, "c", {1}, 1, false, false}), QV_ERR_STATE);
    cr_assert_eq(add(&answer, (part){-1, "c", {1}, 1, false, false}), QV_ERR_EXISTS);
    cr_assert_eq(add(&answer, (part){1, "b", {2}, 1, false, false}), QV_OK);
    cr_assert(qv_str_equal(qv_answer_text(&answer), "ab"));
    cr_assert_eq(qv_answer_tokens(&answer).count, 2);
    qv_msg_done done = {.seq = 3};
    cr_assert_eq(qv_answer_add_done(&answer, &done), QV_ERR_STATE);
    done.seq = 2;
    cr_assert_eq(qv_answer_add_done(&answer, &done), QV_OK);
    cr_assert_eq(qv_answer_add_done(&answer, &done), QV_ERR_EXISTS);
    qv_answer_deinit(&answer);
}

Test(answer, takes_a_whole_answer_from_done)
{
    static int32_t tokens[] = {5, 6};
    qv_answer answer = {0};
    qv_msg_done done = {.text = qv_str_from("whole"), .tokens = {tokens, 2}};
    cr_assert_eq(qv_answer_add_done(&answer, &done), QV_OK);
    cr_assert(qv_str_equal(qv_answer_text(&answer), "whole"));
    cr_assert_eq(qv_answer_tokens(&answer).count, 2);
    qv_answer_deinit(&answer);

    cr_assert_eq(add(&answer, (part){0, "a", {1}, 1, false, false}), QV_OK);
    done.seq = 1;
    cr_assert_eq(qv_answer_add_done(&answer, &done), QV_ERR_FORMAT);
    qv_answer_deinit(&answer);
}

Test(answer, a_delta_without_content_takes_no_number)
{
    static int32_t token = 3;
    qv_answer answer = {0};
    qv_msg_delta delta = {.seq = 0, .text = qv_str_from("x"), .tokens = {&token, 1}};
    cr_assert_eq(qv_answer_add_delta(&answer, &delta), QV_OK);
    qv_msg_delta end = {.seq = 1, .finish_reason = qv_str_from("stop")};
    cr_assert_eq(qv_answer_add_delta(&answer, &end), QV_OK);
    cr_assert_eq(answer.next_seq, 1);
    delta.seq = 1;
    cr_assert_eq(qv_answer_add_delta(&answer, &delta), QV_OK);
    cr_assert_eq(answer.next_seq, 2);
    qv_answer_deinit(&answer);
}

Test(answer, refuses_arrays_that_do_not_match_the_tokens)
{
    qv_answer answer = {0};
    part p = {0, "ab", {1, 2}, 2, true, true};
    qv_msg_tokens m = message_of(&p);
    m.logprobs.count = 1;
    cr_assert_eq(qv_answer_add_tokens(&answer, &m), QV_ERR_FORMAT);
    cr_assert_str_eq(qv_error(), "1 logprobs for 2 tokens");
    m = message_of(&p);
    m.top_logprobs.count = 1;
    cr_assert_eq(qv_answer_add_tokens(&answer, &m), QV_ERR_FORMAT);
    cr_assert_eq(add(&answer, p), QV_OK);
    cr_assert_eq(add(&answer, (part){1, "c", {3}, 1, false, true}), QV_ERR_FORMAT);
    cr_assert_eq(add(&answer, (part){1, "c", {3}, 1, true, false}), QV_ERR_FORMAT);
    cr_assert_eq(add(&answer, (part){1, "c", {3}, 1, true, true}), QV_OK);
    cr_assert(qv_str_equal(qv_answer_text(&answer), "abc"));
    qv_answer_deinit(&answer);
}

Test(answer, holds_no_more_than_its_limit)
{
    qv_answer answer;
    qv_answer_init(&answer, 100);
    int64_t seq = 0;
    while (add(&answer, (part){seq, "12345678", {1}, 1, false, false}) == QV_OK)
        seq++;
    cr_assert_eq(seq, 8); /* 12 bytes each */
    cr_assert_eq(add(&answer, (part){seq, "12345678", {1}, 1, false, false}), QV_ERR_LIMIT);
    cr_assert_eq(answer.used_bytes, 96);
    cr_assert_eq(add(&answer, (part){seq, "1234", {0}, 0, false, false}), QV_OK);
    qv_answer_deinit(&answer);
    cr_assert_eq(answer.max_bytes, 100);
}
