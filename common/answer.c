#include "common/answer.h"

#include <stdlib.h>
#include <string.h>

/* The content of one message, whatever its type; absent arrays have count 0. */
typedef struct {
    qv_str text;
    qv_ints tokens;
    qv_reals logprobs;
    qv_tops tops;
} content;

void qv_answer_init(qv_answer *answer, size_t max_bytes)
{
    *answer = (qv_answer){.max_bytes = max_bytes};
}

void qv_answer_deinit(qv_answer *answer)
{
    free(answer->text);
    free(answer->tokens);
    free(answer->logprobs);
    free(answer->top_start);
    free(answer->top_tokens);
    free(answer->top_logprobs);
    qv_answer_init(answer, answer->max_bytes);
}

/* Make room for `more` elements of `size` bytes after `used`. `array` is the address of the
 * pointer. */
static qv_status reserve(void *array, size_t used, size_t more, size_t size, size_t *capacity)
{
    void *old;
    memcpy(&old, array, sizeof(old));
    if (more <= *capacity - used)
        return QV_OK;
    size_t wanted = *capacity == 0 ? 16 : *capacity * 2; /* most answers held are young */
    if (wanted < used + more)
        wanted = used + more;
    void *grown = realloc(old, wanted * size);
    if (grown == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for %zu bytes of an answer", wanted * size);
    memcpy(array, &grown, sizeof(grown));
    *capacity = wanted;
    return QV_OK;
}

static size_t content_bytes(const content *c)
{
    size_t pairs = c->tops.count > 0 ? c->tops.start[c->tops.count] - c->tops.start[0] : 0;
    return c->text.size + c->tokens.count * sizeof(int32_t) + c->logprobs.count * sizeof(double) +
           c->tops.count * sizeof(uint32_t) + pairs * (sizeof(int32_t) + sizeof(double));
}

/* Per-token arrays are there for every token of an answer or for none, or they could not be lined
 * up. */
static qv_status check_aligned(const char *name, size_t held, size_t held_tokens, uint32_t count,
                               uint32_t n_tokens)
{
    if (count != 0 && count != n_tokens)
        return qv_fail(QV_ERR_FORMAT, "%u %s for %u tokens", count, name, n_tokens);
    if (n_tokens > 0 && held_tokens > 0 && (count > 0) != (held > 0))
        return qv_fail(QV_ERR_FORMAT, "some messages of the stream have %s, others do not", name);
    return QV_OK;
}

static qv_status check_seq(const qv_answer *a, int64_t seq)
{
    if (seq < a->next_seq)
        return qv_fail(QV_ERR_EXISTS, "message %lld of the stream was already there",
                       (long long)seq);
    if (seq > a->next_seq)
        return qv_fail(QV_ERR_STATE, "message %lld of the stream came where %lld is the next",
                       (long long)seq, (long long)a->next_seq);
    return QV_OK;
}

static qv_status reserve_all(qv_answer *a, const content *c, size_t n_pairs)
{
    QV_TRY(reserve(&a->text, a->text_size, c->text.size, 1, &a->text_capacity));
    QV_TRY(
        reserve(&a->tokens, a->n_tokens, c->tokens.count, sizeof(*a->tokens), &a->tokens_capacity));
    QV_TRY(reserve(&a->logprobs, a->n_logprobs, c->logprobs.count, sizeof(*a->logprobs),
                   &a->logprobs_capacity));
    if (c->tops.count == 0)
        return QV_OK;
    QV_TRY(reserve(&a->top_start, a->n_tops, (size_t)c->tops.count + 1, sizeof(*a->top_start),
                   &a->top_start_capacity));
    QV_TRY(reserve(&a->top_tokens, a->n_pairs, n_pairs, sizeof(*a->top_tokens),
                   &a->top_tokens_capacity));
    return reserve(&a->top_logprobs, a->n_pairs, n_pairs, sizeof(*a->top_logprobs),
                   &a->top_logprobs_capacity);
}

/* memcpy that takes NULL with a size of 0. */
static void append(void *to, const void *from, size_t bytes)
{
    if (bytes > 0)
        memcpy(to, from, bytes);
}

static void append_tops(qv_answer *a, const qv_tops *tops, size_t n_pairs)
{
    uint32_t base = tops->start[0];
    for (uint32_t i = 0; i <= tops->count; i++)
        a->top_start[a->n_tops + i] = (uint32_t)a->n_pairs + (tops->start[i] - base);
    append(a->top_tokens + a->n_pairs, tops->token + base, n_pairs * sizeof(*a->top_tokens));
    append(a->top_logprobs + a->n_pairs, tops->logprob + base, n_pairs * sizeof(*a->top_logprobs));
    a->n_tops += tops->count;
    a->n_pairs += n_pairs;
}

static qv_status add_content(qv_answer *a, const content *c)
{
    QV_TRY(
        check_aligned("logprobs", a->n_logprobs, a->n_tokens, c->logprobs.count, c->tokens.count));
    QV_TRY(check_aligned("alternatives", a->n_tops, a->n_tokens, c->tops.count, c->tokens.count));
    size_t bytes = content_bytes(c);
    if (a->max_bytes > 0 && bytes > a->max_bytes - a->used_bytes)
        return qv_fail(QV_ERR_LIMIT, "the answer is larger than the limit of %zu bytes",
                       a->max_bytes);
    size_t n_pairs = c->tops.count > 0 ? c->tops.start[c->tops.count] - c->tops.start[0] : 0;
    QV_TRY(reserve_all(a, c, n_pairs));

    append(a->text + a->text_size, c->text.data, c->text.size);
    append(a->tokens + a->n_tokens, c->tokens.data, c->tokens.count * sizeof(*a->tokens));
    append(a->logprobs + a->n_logprobs, c->logprobs.data, c->logprobs.count * sizeof(*a->logprobs));
    a->text_size += c->text.size;
    a->n_tokens += c->tokens.count;
    a->n_logprobs += c->logprobs.count;
    if (c->tops.count > 0)
        append_tops(a, &c->tops, n_pairs);
    a->used_bytes += bytes;
    return QV_OK;
}

qv_status qv_answer_add_tokens(qv_answer *answer, const qv_msg_tokens *message)
{
    content c = {message->text, message->tokens, message->logprobs, message->top_logprobs};
    QV_TRY(check_seq(answer, message->seq));
    QV_TRY(add_content(answer, &c));
    answer->next_seq++;
    return QV_OK;
}

qv_status qv_answer_add_delta(qv_answer *answer, const qv_msg_delta *delta)
{
    content c = {delta->text, delta->tokens, delta->logprobs, delta->top_logprobs};
    QV_TRY(check_seq(answer, delta->seq));
    QV_TRY(add_content(answer, &c));
    if (delta->text.size > 0 || delta->tokens.count > 0)
        answer->next_seq++;
    return QV_OK;
}

qv_status qv_answer_add_done(qv_answer *answer, const qv_msg_done *done)
{
    content c = {done->text, done->tokens, done->logprobs, done->top_logprobs};
    QV_TRY(check_seq(answer, done->seq));
    if ((c.text.size > 0 || c.tokens.count > 0) && answer->next_seq > 0)
        return qv_fail(QV_ERR_FORMAT, "a streamed answer ends in a message with the whole answer");
    QV_TRY(add_content(answer, &c));
    answer->next_seq++;
    return QV_OK;
}

void qv_answer_fill_done(const qv_answer *answer, qv_msg_done *done)
{
    qv_set(done, done, text, qv_answer_text(answer));
    qv_set(done, done, tokens, qv_answer_tokens(answer));
    if (answer->n_logprobs > 0)
        qv_set(done, done, logprobs, ((qv_reals){answer->logprobs, (uint32_t)answer->n_logprobs}));
    if (answer->n_tops > 0)
        qv_set(done, done, top_logprobs,
               ((qv_tops){(uint32_t)answer->n_tops, answer->top_start, answer->top_tokens,
                          answer->top_logprobs}));
}

qv_str qv_answer_text(const qv_answer *answer)
{
    return (qv_str){answer->text, (uint32_t)answer->text_size};
}

qv_ints qv_answer_tokens(const qv_answer *answer)
{
    return (qv_ints){answer->tokens, (uint32_t)answer->n_tokens};
}
