/* Tokenizer: text to token ids and back, from a Hugging Face `tokenizer.json`.
 *
 * Byte-level BPE with the added tokens, normalizers, pre-tokenizers, post-processor and decoder
 * that Qwen3.5 and Nemotron-3 use, giving the same ids as the Hugging Face tokenizers library. What
 * the file asks for beyond that is refused at open, by name.
 *
 * A tokenizer is immutable after open: any thread may use it, all at once. Each stream of output
 * tokens has a qv_detok of its own, which belongs to one thread at a time.
 */
#ifndef QV_MODELS_TOKENIZER_H
#define QV_MODELS_TOKENIZER_H

#include "common/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct qv_tokenizer qv_tokenizer;

/* A growing list of token ids. Zero-initialise; the owner calls qv_tokens_deinit. */
typedef struct {
    int32_t *data; /* [capacity], the first `count` are set */
    size_t count;
    size_t capacity;
} qv_tokens;

/* Free the list and leave it empty and usable. */
void qv_tokens_deinit(qv_tokens *tokens);

/* How qv_tokenizer_encode reads its text. */
enum {
    /* Add what the post-processor adds around a single text (a BOS token, say). */
    QV_ENCODE_ADD_SPECIAL = 1u << 0,
    /* Text that spells a special token becomes that token. Set for prompts and for rendered chats;
     * without it such text is encoded like any other, so that content cannot inject a control
     * token. Added tokens that are not special (`<think>`) match either way, as they do there. */
    QV_ENCODE_PARSE_SPECIAL = 1u << 1,
};

/* One entry of `added_tokens`. */
typedef struct {
    int32_t id;
    const char *content; /* UTF-8, zero-terminated, owned by the tokenizer */
    size_t len;          /* bytes of content */
    bool special;        /* dropped by skip_special */
    bool lstrip, rstrip; /* also takes the white space before, after */
    bool single_word;    /* only where no word character touches it */
    bool normalized;     /* matches the normalised text, not the raw one */
} qv_added_token;

/* Open `path`: a tokenizer.json or a model directory that holds one. In a directory,
 * tokenizer_config.json also names the BOS, EOS and padding tokens.
 * Errors: NOT_FOUND, IO, LIMIT, FORMAT, UNSUPPORTED (naming what the file asks for), NOMEM. */
qv_status qv_tokenizer_open(const char *path, qv_tokenizer **out);
void qv_tokenizer_close(qv_tokenizer *tok);

/* Encode `len` bytes of UTF-8 (zero bytes are text too) into `out`, replacing its contents.
 * `flags` are QV_ENCODE_*. Time is O(len log len).
 * Errors: FORMAT (invalid UTF-8, naming the byte offset), LIMIT (more than `max_tokens`, or a text
 * that the split pattern cannot be matched against within bounds), NOMEM. On error `out` is empty.
 */
qv_status qv_tokenizer_encode(const qv_tokenizer *tok, const char *text, size_t len, unsigned flags,
                              size_t max_tokens, qv_tokens *out);

/* The text of `n` tokens: their bytes in a row, every broken UTF-8 sequence replaced by U+FFFD (one
 * per maximal part of a well-formed sequence). Ids outside the vocabulary add nothing.
 * *text is zero-terminated, *len bytes long, and free()d by the caller. Errors: NOMEM. */
qv_status qv_tokenizer_decode(const qv_tokenizer *tok, const int32_t *tokens, size_t n,
                              bool skip_special, char **text, size_t *len);

/* Incremental decoding of one stream. Plain data: copy it to fork the stream. All that was returned
 * by push for a sequence of tokens, then by flush, is what qv_tokenizer_decode gives for it. */
typedef struct {
    bool skip_special;
    uint8_t n_held;
    uint8_t held[3]; /* the bytes of a character that is not complete yet */
} qv_detok;

void qv_detok_init(qv_detok *d, bool skip_special);

/* Add one token and write the text that became complete (whole characters only, maybe none) to
 * `out`, which has room for qv_tokenizer_max_text(tok) bytes. Returns the number of bytes written;
 * no terminator. */
size_t qv_detok_push(qv_detok *d, const qv_tokenizer *tok, int32_t token, char *out);

/* End the stream: an incomplete character becomes U+FFFD. Writes at most 3 bytes to `out`, returns
 * how many, and leaves the state as after init. */
size_t qv_detok_flush(qv_detok *d, char *out);

/* The most bytes that one qv_detok_push of this tokenizer can write. */
size_t qv_tokenizer_max_text(const qv_tokenizer *tok);

/* One more than the highest id; ids below it may be unused (qv_tokenizer_token gives NULL). */
size_t qv_tokenizer_vocab_size(const qv_tokenizer *tok);

/* The token as tokenizer.json spells it (in the byte-level alphabet: a space is `Ġ`), and its
 * length in bytes. Borrowed; NULL if `id` is not in the vocabulary. `len` may be NULL. */
const char *qv_tokenizer_token(const qv_tokenizer *tok, int32_t id, size_t *len);

/* The bytes that the token stands for, maybe not whole characters. Borrowed, not zero-terminated;
 * NULL if `id` is not in the vocabulary. */
const char *qv_tokenizer_bytes(const qv_tokenizer *tok, int32_t id, size_t *len);

/* The id of the token that tokenizer.json spells like this (`<|im_end|>`, `Ġthe`), or -1. */
int32_t qv_tokenizer_find(const qv_tokenizer *tok, const char *text, size_t len);

/* Whether skip_special drops the token; false for ids outside the vocabulary. */
bool qv_tokenizer_is_special(const qv_tokenizer *tok, int32_t id);

/* The added tokens, in the order of the file. Borrowed. */
const qv_added_token *qv_tokenizer_added(const qv_tokenizer *tok, size_t *count);

/* The tokens that tokenizer_config.json names; -1 where it names none or was not there. */
int32_t qv_tokenizer_bos(const qv_tokenizer *tok);
int32_t qv_tokenizer_eos(const qv_tokenizer *tok);
int32_t qv_tokenizer_pad(const qv_tokenizer *tok);

#endif
