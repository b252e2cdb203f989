/* Byte-level BPE: the vocabulary (ids, spellings, bytes) and the merges that turn the bytes of one
 * piece of text into ids.
 *
 * Filled once by the tokenizer's open and then only read, so any thread may encode; what an encode
 * changes is in a qv_bpe_scratch of the caller.
 */
#ifndef QV_MODELS_BPE_H
#define QV_MODELS_BPE_H

#include "common/arena.h"
#include "common/status.h"
#include "models/tokenizer.h"

/* Ids are below this; no released vocabulary comes near. */
#define QV_VOCAB_MAX (1 << 22)

enum {
    QV_TOKEN_SPECIAL = 1, /* dropped by skip_special */
    QV_TOKEN_UTF8 = 2,    /* its bytes are whole characters */
    QV_TOKEN_WHOLE = 4,   /* a piece of exactly these bytes encodes to this one token */
};

typedef struct {
    const char *text;  /* as tokenizer.json spells it, terminated; NULL: the id is not used */
    const char *bytes; /* what it stands for */
    uint32_t text_len, bytes_len;
    uint32_t flags; /* QV_TOKEN_* */
} qv_vocab_entry;

/* Open addressing; both tables have a power of two slots and are at most half full. */
typedef struct {
    uint32_t tag; /* upper half of the key's hash */
    int32_t id;   /* -1: free */
} qv_vocab_slot;

typedef struct {
    uint64_t pair; /* left id << 32 | right id */
    uint32_t rank; /* lower merges first */
    int32_t id;    /* what the pair becomes; -1: free */
} qv_merge_slot;

typedef struct {
    qv_vocab_entry *entries; /* [n_ids] */
    size_t n_ids;            /* one more than the highest id */
    size_t max_bytes;        /* the longest entry's bytes_len */
    qv_vocab_slot *by_text;  /* every entry, by spelling */
    qv_vocab_slot *by_bytes; /* the model's entries, by what they stand for */
    size_t slot_mask;
    qv_merge_slot *merges;
    size_t merge_mask;
    int32_t byte_id[256]; /* the token of a single byte; -1: none */
} qv_bpe;

/* Working memory of encodes, grown as needed. Zero-initialise; the owner calls deinit. */
typedef struct {
    void *data;
    size_t size;
} qv_bpe_scratch;

void qv_bpe_scratch_deinit(qv_bpe_scratch *scratch);

/* Reserve an empty vocabulary for `n_ids` ids (with `n_entries` spellings) and `n_merges` merges.
 * The memory is the arena's. Errors: NOMEM. */
qv_status qv_bpe_init(qv_bpe *bpe, qv_arena *arena, size_t n_ids, size_t n_entries,
                      size_t n_merges);

/* Add an entry: spelling `text`, copied into the arena. `in_model` entries can come out of merges,
 * others only match as added tokens. Errors: FORMAT (an id or a spelling that is taken), NOMEM. */
qv_status qv_bpe_add(qv_bpe *bpe, qv_arena *arena, const char *text, size_t len, int32_t id,
                     bool in_model);

/* Add a merge of two spellings, which with its result are in the vocabulary already. When a pair
 * comes twice the later one counts. Errors: FORMAT (naming what is not in the vocabulary), NOMEM.
 */
qv_status qv_bpe_add_merge(qv_bpe *bpe, const char *left, size_t left_len, const char *right,
                           size_t right_len, uint32_t rank);

/* Mark the entries that a piece of their bytes encodes to; after all entries and merges, before the
 * first encode. `ignore_merges`: a piece that is in the vocabulary is taken whole, merges or not
 * (special tokens excepted: only added-token matching gives those).
 * Errors: UNSUPPORTED (a byte that text can hold has no token), NOMEM. */
qv_status qv_bpe_finish(qv_bpe *bpe, bool ignore_merges);

/* The id of a spelling, or -1. */
int32_t qv_bpe_find(const qv_bpe *bpe, const char *text, size_t len);

/* Append the ids of one piece to `out`, which may grow to `max_tokens`. Errors: LIMIT, NOMEM. */
qv_status qv_bpe_encode(const qv_bpe *bpe, const char *bytes, size_t len, qv_bpe_scratch *scratch,
                        size_t max_tokens, qv_tokens *out);

/* Append one id. Errors: LIMIT, NOMEM. */
qv_status qv_tokens_push(qv_tokens *tokens, int32_t id, size_t max_tokens);

#endif
