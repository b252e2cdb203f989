/* Merging follows the definition of BPE: of all neighbouring pairs, the one of lowest rank is
 * replaced first, the leftmost of equals. Most pieces of ordinary text are a token by themselves,
 * found with one lookup; short ones are merged by scanning, long ones with a heap, so that a piece
 * of n bytes costs O(n log n) whatever it holds.
 */
#include "models/bpe.h"

#include "models/unicode.h"

#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* ---- Lists of tokens ------------------------------------------------------------------------- */

void qv_tokens_deinit(qv_tokens *tokens)
{
    free(tokens->data);
    *tokens = (qv_tokens){0};
}

qv_status qv_tokens_push(qv_tokens *tokens, int32_t id, size_t max_tokens)
{
    if (tokens->count >= max_tokens)
        return qv_fail(QV_ERR_LIMIT, "the text has more than %zu tokens", max_tokens);
    if (tokens->count == tokens->capacity) {
        size_t capacity = tokens->capacity ? tokens->capacity * 2 : 64;
        int32_t *data = realloc(tokens->data, capacity * sizeof *data);
        if (!data)
            return qv_fail(QV_ERR_NOMEM, "no memory for %zu tokens", capacity);
        tokens->data = data;
        tokens->capacity = capacity;
    }
    tokens->data[tokens->count++] = id;
    return QV_OK;
}

/* ---- The byte-level alphabet ----------------------------------------------------------------- */

/* Each byte is spelled as one printable character: itself where that is printable in Latin-1, else
 * U+0100 onwards in order. */
static bool byte_is_printable(unsigned byte)
{
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

/* The byte that a character spells, or -1. */
static int byte_of_char(uint32_t cp)
{
    if (cp < 0x100)
        return byte_is_printable(cp) ? (int)cp : -1;
    uint32_t next = 0x100;
    for (unsigned byte = 0; byte < 0x100 && next <= cp; byte++) {
        if (byte_is_printable(byte))
            continue;
        if (next == cp)
            return (int)byte;
        next++;
    }
    return -1;
}

/* Turn a spelling into bytes (at most as many). A spelling with any character outside the alphabet
 * stands for itself; returns false then. */
static bool spelled_bytes(const char *text, size_t len, char *bytes, size_t *bytes_len)
{
    size_t n = 0;
    for (size_t i = 0, size; i < len; i += size) {
        int byte = byte_of_char(qv_unicode_get(text + i, &size));
        if (byte < 0) {
            memcpy(bytes, text, len);
            *bytes_len = len;
            return false;
        }
        bytes[n++] = (char)byte;
    }
    *bytes_len = n;
    return true;
}

/* ---- Tables ---------------------------------------------------------------------------------- */

static size_t table_size(size_t n)
{
    size_t size = 16;
    while (size < 2 * n)
        size *= 2;
    return size;
}

/* The slot that holds the string, or the free one where it belongs. `bytes` picks the table. */
static qv_vocab_slot *vocab_slot(const qv_bpe *bpe, bool by_bytes, const char *key, size_t len)
{
    qv_vocab_slot *slots = by_bytes ? bpe->by_bytes : bpe->by_text;
    uint64_t hash = XXH3_64bits(key, len);
    uint32_t tag = (uint32_t)(hash >> 32);
    for (size_t i = hash & bpe->slot_mask;; i = (i + 1) & bpe->slot_mask) {
        qv_vocab_slot *slot = &slots[i];
        if (slot->id < 0) {
            slot->tag = tag;
            return slot;
        }
        if (slot->tag != tag)
            continue;
        const qv_vocab_entry *e = &bpe->entries[slot->id];
        size_t other_len = by_bytes ? e->bytes_len : e->text_len;
        if (other_len == len && memcmp(by_bytes ? e->bytes : e->text, key, len) == 0)
            return slot;
    }
}

/* The same for reading. */
static int32_t vocab_find(const qv_bpe *bpe, const qv_vocab_slot *slots, const char *key,
                          size_t len)
{
    uint64_t hash = XXH3_64bits(key, len);
    uint32_t tag = (uint32_t)(hash >> 32);
    bool by_bytes = slots == bpe->by_bytes;
    for (size_t i = hash & bpe->slot_mask; slots[i].id >= 0; i = (i + 1) & bpe->slot_mask) {
        if (slots[i].tag != tag)
            continue;
        const qv_vocab_entry *e = &bpe->entries[slots[i].id];
        size_t other_len = by_bytes ? e->bytes_len : e->text_len;
        if (other_len == len && memcmp(by_bytes ? e->bytes : e->text, key, len) == 0)
            return slots[i].id;
    }
    return -1;
}

static uint64_t pair_of(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

/* Spreads pairs over the table; the multiplier is 2^64 divided by the golden ratio. */
static size_t pair_hash(uint64_t pair)
{
    pair ^= pair >> 29;
    pair *= 0x9E3779B97F4A7C15u;
    return (size_t)(pair ^ pair >> 32);
}

/* The merge of a pair, or NULL. */
static const qv_merge_slot *merge_find(const qv_bpe *bpe, int32_t left, int32_t right)
{
    uint64_t pair = pair_of(left, right);
    for (size_t i = pair_hash(pair) & bpe->merge_mask;; i = (i + 1) & bpe->merge_mask) {
        const qv_merge_slot *slot = &bpe->merges[i];
        if (slot->id < 0)
            return NULL;
        if (slot->pair == pair)
            return slot;
    }
}

qv_status qv_bpe_init(qv_bpe *bpe, qv_arena *arena, size_t n_ids, size_t n_entries, size_t n_merges)
{
    size_t n_slots = table_size(n_entries), n_merge_slots = table_size(n_merges);
    *bpe = (qv_bpe){
        .entries = QV_ARENA_ARRAY(arena, qv_vocab_entry, n_ids),
        .n_ids = n_ids,
        .by_text = QV_ARENA_ARRAY(arena, qv_vocab_slot, n_slots),
        .by_bytes = QV_ARENA_ARRAY(arena, qv_vocab_slot, n_slots),
        .slot_mask = n_slots - 1,
        .merges = QV_ARENA_ARRAY(arena, qv_merge_slot, n_merge_slots),
        .merge_mask = n_merge_slots - 1,
    };
    if (!bpe->entries || !bpe->by_text || !bpe->by_bytes || !bpe->merges)
        return qv_fail(QV_ERR_NOMEM, "no memory for a vocabulary of %zu", n_ids);
    for (size_t i = 0; i < n_slots; i++)
        bpe->by_text[i].id = bpe->by_bytes[i].id = -1;
    for (size_t i = 0; i < n_merge_slots; i++)
        bpe->merges[i].id = -1;
    memset(bpe->byte_id, 0xFF, sizeof bpe->byte_id);
    return QV_OK;
}

qv_status qv_bpe_add(qv_bpe *bpe, qv_arena *arena, const char *text, size_t len, int32_t id,
                     bool in_model)
{
    QV_ASSERT(id >= 0 && (size_t)id < bpe->n_ids);
    qv_vocab_entry *e = &bpe->entries[id];
    if (e->text)
        return qv_fail(QV_ERR_FORMAT, "id %d belongs to both '%s' and '%s'", id, e->text, text);
    qv_vocab_slot *slot = vocab_slot(bpe, false, text, len);
    if (slot->id >= 0)
        return qv_fail(QV_ERR_FORMAT, "token '%s' has ids %d and %d", text, slot->id, id);
    char *copy = qv_arena_strndup(arena, text, len);
    char *bytes = qv_arena_alloc(arena, len, 1);
    if (!copy || !bytes)
        return qv_fail(QV_ERR_NOMEM, "no memory for token %d", id);
    size_t bytes_len;
    bool is_bytes = spelled_bytes(text, len, bytes, &bytes_len);
    *e = (qv_vocab_entry){.text = copy,
                          .bytes = bytes,
                          .text_len = (uint32_t)len,
                          .bytes_len = (uint32_t)bytes_len,
                          .flags =
                              qv_unicode_valid(bytes, bytes_len) == bytes_len ? QV_TOKEN_UTF8 : 0};
    slot->id = id;
    if (bytes_len > bpe->max_bytes)
        bpe->max_bytes = bytes_len;
    /* A spelling in the alphabet is the only one of its bytes. */
    if (in_model && is_bytes && bytes_len > 0) {
        vocab_slot(bpe, true, bytes, bytes_len)->id = id;
        if (bytes_len == 1)
            bpe->byte_id[(uint8_t)bytes[0]] = id;
    }
    return QV_OK;
}

qv_status qv_bpe_add_merge(qv_bpe *bpe, const char *left, size_t left_len, const char *right,
                           size_t right_len, uint32_t rank)
{
    int32_t left_id = qv_bpe_find(bpe, left, left_len);
    int32_t right_id = qv_bpe_find(bpe, right, right_len);
    char *joined = malloc(left_len + right_len + 1);
    if (!joined)
        return qv_fail(QV_ERR_NOMEM, "no memory for a merge");
    memcpy(joined, left, left_len);
    memcpy(joined + left_len, right, right_len);
    int32_t id = qv_bpe_find(bpe, joined, left_len + right_len);
    free(joined);
    if (left_id < 0 || right_id < 0 || id < 0)
        return qv_fail(QV_ERR_FORMAT,
                       "merge %u: '%.*s' + '%.*s' has a part or a result that is not "
                       "in the vocabulary",
                       rank, (int)left_len, left, (int)right_len, right);
    uint64_t pair = pair_of(left_id, right_id);
    size_t i = pair_hash(pair) & bpe->merge_mask;
    while (bpe->merges[i].id >= 0 && bpe->merges[i].pair != pair)
        i = (i + 1) & bpe->merge_mask;
    bpe->merges[i] = (qv_merge_slot){.pair = pair, .rank = rank, .id = id};
    return QV_OK;
}

int32_t qv_bpe_find(const qv_bpe *bpe, const char *text, size_t len)
{
    return vocab_find(bpe, bpe->by_text, text, len);
}

/* ---- Merging --------------------------------------------------------------------------------- */

#define NO_MERGE UINT32_MAX

/* Pieces up to this length are merged by scanning for the lowest rank. */
enum { SCAN_MAX = 32 };

/* Merge `n` <= SCAN_MAX symbols in place; returns how many are left. */
static size_t merge_short(const qv_bpe *bpe, int32_t *ids, size_t n)
{
    uint32_t rank[SCAN_MAX];  /* of the pair that starts at i */
    int32_t result[SCAN_MAX]; /* what that pair becomes */
    for (size_t i = 0; i + 1 < n; i++) {
        const qv_merge_slot *m = merge_find(bpe, ids[i], ids[i + 1]);
        rank[i] = m ? m->rank : NO_MERGE;
        result[i] = m ? m->id : -1;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) {
            if (rank[i] < rank[best])
                best = i;
        }
        if (rank[best] == NO_MERGE)
            break;
        ids[best] = result[best];
        n--;
        for (size_t i = best + 1; i < n; i++) {
            ids[i] = ids[i + 1];
            rank[i - 1] = rank[i];
            result[i - 1] = result[i];
        }
        for (size_t i = best > 0 ? best - 1 : 0; i <= best && i + 1 < n; i++) {
            const qv_merge_slot *m = merge_find(bpe, ids[i], ids[i + 1]);
            rank[i] = m ? m->rank : NO_MERGE;
            result[i] = m ? m->id : -1;
        }
    }
    return n;
}

/* A symbol of a long piece, at the position of its first byte. */
typedef struct {
    int32_t id;          /* -1: merged into the symbol on its left */
    int32_t result;      /* what it becomes with its right neighbour */
    uint32_t rank;       /* of that merge */
    uint32_t prev, next; /* neighbours; NONE at the ends */
} symbol;

#define NONE UINT32_MAX

/* Candidates as rank << 32 | position: the least is the next merge. Entries whose symbol has
 * changed since stay in the heap and are skipped when they come up. */
typedef struct {
    uint64_t *keys;
    size_t n;
} candidates;

static void candidates_push(candidates *heap, uint64_t key)
{
    size_t i = heap->n++;
    while (i > 0 && heap->keys[(i - 1) / 2] > key) {
        heap->keys[i] = heap->keys[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap->keys[i] = key;
}

static uint64_t candidates_pop(candidates *heap)
{
    uint64_t top = heap->keys[0], last = heap->keys[--heap->n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < heap->n; i = child) {
        if (child + 1 < heap->n && heap->keys[child + 1] < heap->keys[child])
            child++;
        if (heap->keys[child] >= last)
            break;
        heap->keys[i] = heap->keys[child];
    }
    heap->keys[i] = last;
    return top;
}

/* Find the merge of a symbol with its right neighbour and make it a candidate. */
static void consider(const qv_bpe *bpe, symbol *symbols, candidates *heap, uint32_t pos)
{
    symbol *s = &symbols[pos];
    const qv_merge_slot *m = s->next == NONE ? NULL : merge_find(bpe, s->id, symbols[s->next].id);
    s->rank = m ? m->rank : NO_MERGE;
    s->result = m ? m->id : -1;
    if (m)
        candidates_push(heap, (uint64_t)s->rank << 32 | pos);
}

/* Merge `n` symbols, linked in order. */
static void merge_long(const qv_bpe *bpe, symbol *symbols, size_t n, candidates *heap)
{
    for (size_t i = 0; i + 1 < n; i++)
        consider(bpe, symbols, heap, (uint32_t)i);
    while (heap->n > 0) {
        uint64_t key = candidates_pop(heap);
        uint32_t pos = (uint32_t)key;
        symbol *s = &symbols[pos];
        if (s->id < 0 || s->rank != (uint32_t)(key >> 32))
            continue;
        symbol *right = &symbols[s->next];
        s->id = s->result;
        s->next = right->next;
        right->id = -1;
        if (s->next != NONE)
            symbols[s->next].prev = pos;
        consider(bpe, symbols, heap, pos);
        if (s->prev != NONE)
            consider(bpe, symbols, heap, s->prev);
    }
}

static qv_status encode_long(const qv_bpe *bpe, const char *bytes, size_t len,
                             qv_bpe_scratch *scratch, size_t max_tokens, qv_tokens *out)
{
    /* Each of the at most len - 1 merges adds two candidates to the len - 1 of the start. */
    size_t need = len * (sizeof(symbol) + 3 * sizeof(uint64_t));
    if (scratch->size < need) {
        void *data = realloc(scratch->data, need);
        if (!data)
            return qv_fail(QV_ERR_NOMEM, "no memory to encode a piece of %zu bytes", len);
        *scratch = (qv_bpe_scratch){.data = data, .size = need};
    }
    candidates heap = {.keys = scratch->data};
    symbol *symbols = (symbol *)(heap.keys + 3 * len);
    for (size_t i = 0; i < len; i++)
        symbols[i] = (symbol){.id = bpe->byte_id[(uint8_t)bytes[i]],
                              .rank = NO_MERGE,
                              .result = -1,
                              .prev = i == 0 ? NONE : (uint32_t)i - 1,
                              .next = i + 1 == len ? NONE : (uint32_t)i + 1};
    merge_long(bpe, symbols, len, &heap);
    for (uint32_t i = 0; i != NONE; i = symbols[i].next)
        QV_TRY(qv_tokens_push(out, symbols[i].id, max_tokens));
    return QV_OK;
}

/* Merge a piece that is not taken whole. */
static qv_status encode_by_merging(const qv_bpe *bpe, const char *bytes, size_t len,
                                   qv_bpe_scratch *scratch, size_t max_tokens, qv_tokens *out)
{
    if (len > SCAN_MAX)
        return encode_long(bpe, bytes, len, scratch, max_tokens, out);
    int32_t ids[SCAN_MAX];
    for (size_t i = 0; i < len; i++)
        ids[i] = bpe->byte_id[(uint8_t)bytes[i]];
    size_t n = merge_short(bpe, ids, len);
    for (size_t i = 0; i < n; i++)
        QV_TRY(qv_tokens_push(out, ids[i], max_tokens));
    return QV_OK;
}

qv_status qv_bpe_encode(const qv_bpe *bpe, const char *bytes, size_t len, qv_bpe_scratch *scratch,
                        size_t max_tokens, qv_tokens *out)
{
    if (len == 0)
        return QV_OK;
    if (len <= bpe->max_bytes) {
        int32_t id = vocab_find(bpe, bpe->by_bytes, bytes, len);
        if (id >= 0 && (bpe->entries[id].flags & QV_TOKEN_WHOLE))
            return qv_tokens_push(out, id, max_tokens);
    }
    return encode_by_merging(bpe, bytes, len, scratch, max_tokens, out);
}

void qv_bpe_scratch_deinit(qv_bpe_scratch *scratch)
{
    free(scratch->data);
    *scratch = (qv_bpe_scratch){0};
}

qv_status qv_bpe_finish(qv_bpe *bpe, bool ignore_merges)
{
    for (unsigned byte = 0; byte < 0x100; byte++) {
        bool in_text = byte != 0xC0 && byte != 0xC1 && byte < 0xF5; /* occurs in UTF-8 */
        if (in_text && bpe->byte_id[byte] < 0)
            return qv_fail(QV_ERR_UNSUPPORTED, "the vocabulary has no token for byte 0x%02X", byte);
    }
    qv_tokens ids = {0};
    qv_bpe_scratch scratch = {0};
    qv_status status = QV_OK;
    for (size_t i = 0; i <= bpe->slot_mask && status == QV_OK; i++) {
        int32_t id = bpe->by_bytes[i].id;
        if (id < 0)
            continue;
        qv_vocab_entry *e = &bpe->entries[id];
        bool whole = ignore_merges && !(e->flags & QV_TOKEN_SPECIAL);
        if (!whole) {
            ids.count = 0;
            status = encode_by_merging(bpe, e->bytes, e->bytes_len, &scratch, SIZE_MAX, &ids);
            whole = ids.count == 1 && ids.data[0] == id;
        }
        if (whole)
            e->flags |= QV_TOKEN_WHOLE;
    }
    qv_tokens_deinit(&ids);
    qv_bpe_scratch_deinit(&scratch);
    return status;
}
