/* Answer: one stream's messages put together again: text, tokens, logprobs and alternatives.
 *
 * The broker uses it for requests with `stream` false, quiver-run and the client library for whole
 * answers. It proves that no message was lost or repeated: each must carry the next `seq`. Its
 * memory is bounded by the limit its owner gives. One thread at a time.
 */
#ifndef QV_COMMON_ANSWER_H
#define QV_COMMON_ANSWER_H

#include "common/protocol.h"
#include "common/status.h"

typedef struct {
    int64_t next_seq;  /* the seq that the next message must carry */
    size_t max_bytes;  /* most bytes of content held; 0 = no limit */
    size_t used_bytes; /* bytes of content held */

    char *text; /* [text_size], not terminated; owned, as are the arrays below */
    size_t text_size, text_capacity;
    int32_t *tokens; /* [n_tokens] */
    size_t n_tokens, tokens_capacity;
    double *logprobs; /* [n_logprobs]: n_tokens of them, or none */
    size_t n_logprobs, logprobs_capacity;
    uint32_t *top_start; /* [n_tops + 1]: n_tops is n_tokens, or 0 */
    size_t n_tops, top_start_capacity;
    int32_t *top_tokens; /* [n_pairs] */
    double *top_logprobs;
    size_t n_pairs, top_tokens_capacity, top_logprobs_capacity;
} qv_answer;

/* A zeroed struct is an empty answer without a limit. */
void qv_answer_init(qv_answer *answer, size_t max_bytes);
void qv_answer_deinit(qv_answer *answer);

/* Add one message's content, which is copied; arrays that are absent are NULL pointers or count 0.
 * Nothing changes on failure. Errors: EXISTS (a seq seen before), STATE (a seq is missing in
 * between), FORMAT (logprobs or alternatives that do not match the tokens one to one), LIMIT,
 * NOMEM. */
qv_status qv_answer_add_tokens(qv_answer *answer, const qv_msg_tokens *message);

/* The same for what a worker reports. A delta that only ends the stream (no text, no tokens) has no
 * number of its own: it carries the next one, which the client's `done` then takes. */
qv_status qv_answer_add_delta(qv_answer *answer, const qv_msg_delta *delta);

/* Take the last message of a stream: checks its seq and, if it holds a whole answer (`stream`
 * false), takes its content. Afterwards the answer is complete, however it was delivered. Errors:
 * as above. */
qv_status qv_answer_add_done(qv_answer *answer, const qv_msg_done *done);

/* The content as fields of a `done`: text and tokens, and logprobs and top_logprobs where there are
 * any. Pointers are borrowed: valid until the next add or deinit. The other fields are the
 * caller's; note that `seq` counts the messages that the client got, so it is 0 for one that was
 * not streamed to. */
void qv_answer_fill_done(const qv_answer *answer, qv_msg_done *done);

/* What the answer holds, as borrowed views. */
qv_str qv_answer_text(const qv_answer *answer);
qv_ints qv_answer_tokens(const qv_answer *answer);

#endif
