/* Text of one stream: tokens in, text out as soon as nothing can take it back, and the reason to
 * stop.
 *
 * Only whole UTF-8 characters leave. Text that may be the start of a stop string is held back; the
 * stop string itself never leaves. What has been emitted after k tokens is a function of those
 * tokens alone, so a stream replayed on another worker goes on at the same byte.
 *
 * A qv_stream is plain state over rules that are shared by all streams of a request. It belongs to
 * the thread that has its sequence.
 */
#ifndef QV_WORKER_STREAM_H
#define QV_WORKER_STREAM_H

#include "models/tokenizer.h"

/* A stop string with its failure table: failure[i] is the length of the longest proper prefix of
 * the string that ends its first i + 1 bytes (Knuth, Morris and Pratt). */
typedef struct {
    const char *text;
    uint32_t *failure; /* [size] */
    uint32_t size;     /* at least 1 */
} qv_stop_string;

/* Fill failure[size]. */
void qv_stop_string_prepare(qv_stop_string *stop);

/* When a stream ends by itself. Borrowed arrays; constant once made. */
typedef struct {
    const qv_tokenizer *tokenizer;
    const qv_stop_string *strings;
    uint32_t n_strings;
    const int32_t *tokens; /* that end the answer: stop_token_ids and, unless ignored, EOS */
    uint32_t n_tokens;
    int32_t max_answer; /* tokens of the answer, at least 1 */
} qv_stream_rules;

/* Bytes that one push or end can emit, and thus the size of `pending`. */
size_t qv_stream_max_text(const qv_stream_rules *rules);

typedef enum {
    QV_STREAM_RUNS,
    QV_STREAM_STOP,  /* a stop token or stop string: finish_reason "stop" */
    QV_STREAM_LENGTH /* max_answer tokens: finish_reason "length" */
} qv_stream_status;

typedef struct {
    const qv_stream_rules *rules;
    qv_detok detok;
    uint32_t *matched;  /* [n_strings] bytes of each stop string that the text ends with */
    char *pending;      /* [qv_stream_max_text] decoded text that has not left */
    uint32_t n_pending; /* bytes of it */
    uint32_t n_emitted; /* bytes at its front that the last call emitted */
    int32_t n_tokens;   /* of the answer so far */
    qv_stream_status status;
} qv_stream;

/* `matched` and `pending` are the caller's memory, of the sizes above. */
void qv_stream_init(qv_stream *stream, const qv_stream_rules *rules, uint32_t *matched,
                    char *pending);

/* Take the next token of the answer. *text (not terminated, valid until the next call) is what may
 * leave now. When the result is not QV_STREAM_RUNS, the stream is complete: held text is in *text
 * too, and nothing may be pushed any more. A stop token adds no text. */
qv_stream_status qv_stream_push(qv_stream *stream, int32_t token, const char **text, size_t *size);

/* End a stream that still runs (cancelled): the text that was held back. */
void qv_stream_end(qv_stream *stream, const char **text, size_t *size);

#endif
