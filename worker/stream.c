#include "worker/stream.h"

#include <string.h>

/* --- Stop strings ---------------------------------------------------------------------------- */

/* The length of the match after one more byte. */
static uint32_t match_byte(const qv_stop_string *stop, uint32_t matched, char byte)
{
    while (matched > 0 && (matched == stop->size || stop->text[matched] != byte))
        matched = stop->failure[matched - 1];
    return stop->text[matched] == byte ? matched + 1 : 0;
}

void qv_stop_string_prepare(qv_stop_string *stop)
{
    stop->failure[0] = 0;
    for (uint32_t i = 1; i < stop->size; i++)
        stop->failure[i] = match_byte(stop, stop->failure[i - 1], stop->text[i]);
}

/* Run the stop strings over pending[from, n_pending). When one ends there, *cut is where it began:
 * at the first byte that completes one, the longest of them. Otherwise *cut is where the longest
 * beginning of a stop string starts that the text ends with. */
static bool find_stop(qv_stream *stream, uint32_t from, uint32_t *cut)
{
    const qv_stream_rules *rules = stream->rules;
    for (uint32_t i = from; i < stream->n_pending; i++) {
        uint32_t complete = 0;
        for (uint32_t s = 0; s < rules->n_strings; s++) {
            const qv_stop_string *stop = &rules->strings[s];
            stream->matched[s] = match_byte(stop, stream->matched[s], stream->pending[i]);
            if (stream->matched[s] == stop->size && stop->size > complete)
                complete = stop->size;
        }
        if (complete > 0) {
            *cut = i + 1 - complete;
            return true;
        }
    }
    uint32_t longest = 0;
    for (uint32_t s = 0; s < rules->n_strings; s++)
        if (stream->matched[s] > longest)
            longest = stream->matched[s];
    *cut = stream->n_pending - longest;
    return false;
}

/* --- Stream ---------------------------------------------------------------------------------- */

size_t qv_stream_max_text(const qv_stream_rules *rules)
{
    size_t longest = 0;
    for (uint32_t s = 0; s < rules->n_strings; s++)
        if (rules->strings[s].size > longest)
            longest = rules->strings[s].size;
    return longest + qv_tokenizer_max_text(rules->tokenizer) + 4; /* and what flush adds */
}

void qv_stream_init(qv_stream *stream, const qv_stream_rules *rules, uint32_t *matched,
                    char *pending)
{
    *stream = (qv_stream){.rules = rules, .matched = matched, .pending = pending};
    qv_detok_init(&stream->detok, true);
    for (uint32_t s = 0; s < rules->n_strings; s++)
        matched[s] = 0;
}

static bool is_stop_token(const qv_stream_rules *rules, int32_t token)
{
    for (uint32_t i = 0; i < rules->n_tokens; i++)
        if (rules->tokens[i] == token)
            return true;
    return false;
}

/* What the last call emitted is gone; what it held back moves to the front. */
static void drop_emitted(qv_stream *stream)
{
    stream->n_pending -= stream->n_emitted;
    memmove(stream->pending, stream->pending + stream->n_emitted, stream->n_pending);
    stream->n_emitted = 0;
}

static void emit(qv_stream *stream, uint32_t n, const char **text, size_t *size)
{
    stream->n_emitted = n;
    *text = stream->pending;
    *size = n;
}

qv_stream_status qv_stream_push(qv_stream *stream, int32_t token, const char **text, size_t *size)
{
    const qv_stream_rules *rules = stream->rules;
    QV_ASSERT(stream->status == QV_STREAM_RUNS);
    drop_emitted(stream);
    stream->n_tokens++;

    uint32_t held = stream->n_pending, cut = held;
    if (is_stop_token(rules, token)) {
        stream->status = QV_STREAM_STOP;
    } else {
        char *end = stream->pending + held;
        stream->n_pending += (uint32_t)qv_detok_push(&stream->detok, rules->tokenizer, token, end);
        if (find_stop(stream, held, &cut)) {
            stream->status = QV_STREAM_STOP;
            emit(stream, cut, text, size);
            return stream->status;
        }
        if (stream->n_tokens >= rules->max_answer)
            stream->status = QV_STREAM_LENGTH;
    }
    if (stream->status == QV_STREAM_RUNS)
        emit(stream, cut, text, size);
    else
        qv_stream_end(stream, text, size);
    return stream->status;
}

void qv_stream_end(qv_stream *stream, const char **text, size_t *size)
{
    drop_emitted(stream);
    stream->n_pending +=
        (uint32_t)qv_detok_flush(&stream->detok, stream->pending + stream->n_pending);
    emit(stream, stream->n_pending, text, size);
}
