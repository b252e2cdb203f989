/* The prefix cache: which beginnings of sequences are still in KV pages, and of which of them the
 * recurrent state was kept.
 *
 * A tree of full pages. A page's place in it is its tokens and everything before them, down to a
 * root per scope: the base model, or one content of an adapter, for keys, values and states depend
 * on both. A sequence goes on from a node only if the node has a snapshot, a copy of the state slot
 * at its end, because layers with a recurrent state cannot begin from pages alone. Pages beyond a
 * snapshot are still worth knowing: where a new sequence leaves a path that is known, others will
 * too, and a snapshot is taken there.
 *
 * Pages belong to the page table (worker/kv_cache.h), which this cache asks to keep them; a kept
 * page is full and never written again. Snapshots sit in state slots that no sequence needs
 * (worker/state_cache.h). Both are given back, least recently used first, when running sequences
 * want them. Hashes find nodes, tokens prove them.
 *
 * Accounting only: whoever is told a slot copies the state. Nothing allocates after _new but a
 * scope's first join. Engine thread.
 */
#ifndef QV_WORKER_PREFIX_CACHE_H
#define QV_WORKER_PREFIX_CACHE_H

#include "worker/kv_cache.h"
#include "worker/state_cache.h"

typedef struct qv_prefix_cache qv_prefix_cache;

/* The caches are borrowed and outlive this one. Errors: NOMEM. */
qv_status qv_prefix_cache_new(qv_kv_cache *pages, qv_state_cache *states, qv_prefix_cache **out);

/* Gives back every page and slot. Every scope has been left. free(NULL) is fine. */
void qv_prefix_cache_free(qv_prefix_cache *cache);

/* --- Scopes ---------------------------------------------------------------------------------- */

/* Sequences that may share: those of the base model, or of one content of an adapter. */
typedef struct qv_prefix_scope qv_prefix_scope;

/* Hold the scope of an adapter's digest; NULL is the base model. Errors: NOMEM. */
qv_status qv_prefix_cache_join(qv_prefix_cache *cache, const char *digest, qv_prefix_scope **out);
void qv_prefix_cache_leave(qv_prefix_cache *cache, qv_prefix_scope *scope);

/* Forget every adapter scope whose digest `is_known` denies. Those who hold one find and keep
 * nothing in it any more; who joins the digest later gets another scope. */
void qv_prefix_cache_retain(qv_prefix_cache *cache,
                            bool (*is_known)(void *user, const char *digest), void *user);

/* Forget everything in a scope, which stays open. */
void qv_prefix_cache_clear(qv_prefix_cache *cache, qv_prefix_scope *scope);

/* --- Beginnings ------------------------------------------------------------------------------ */

typedef struct {
    int32_t n_pages;    /* pages that may be taken; 0 = none */
    int32_t n_held;     /* of them, held by sequences: taking these uses up no room */
    int32_t n_known;    /* pages whose tokens are known, at least n_pages */
    int32_t state_slot; /* holds the state at the end of n_pages; -1 = none */
    int32_t node;       /* private */
} qv_prefix_match;

/* The longest beginning of tokens[n_known] that is known, and the longest of tokens[n_take] that
 * can be gone on from. n_take <= n_known. */
qv_prefix_match qv_prefix_cache_find(const qv_prefix_cache *cache, const qv_prefix_scope *scope,
                                     const int32_t *tokens, int32_t n_take, int32_t n_known);

/* Hold the pages of a match just found, into pages[n_pages]. The state must be copied out of
 * state_slot before anything else writes a slot: from here on the slot may be given to others. */
void qv_prefix_cache_take(qv_prefix_cache *cache, const qv_prefix_match *match, int32_t *pages);

/* Remember the full pages of tokens[n_tokens], which are in pages[]. A page that is known already
 * in another copy is exchanged for that one, which the caller then holds. With `snapshot` the state
 * at the end is wanted too (n_tokens is a multiple of the page): the slot to copy it into, or -1 if
 * it is there or no slot can be had. */
int32_t qv_prefix_cache_insert(qv_prefix_cache *cache, qv_prefix_scope *scope,
                               const int32_t *tokens, int32_t n_tokens, int32_t *pages,
                               bool snapshot);

/* --- Room ------------------------------------------------------------------------------------ */

/* Forget what was used least recently, until n pages are free; false if so many are held. */
bool qv_prefix_cache_free_pages(qv_prefix_cache *cache, int32_t n);

/* The same for one state slot; false if no snapshot is left. */
bool qv_prefix_cache_free_slot(qv_prefix_cache *cache);

/* --- Facts ----------------------------------------------------------------------------------- */

typedef struct {
    uint64_t lookups, hits, hit_tokens; /* takes, those that got something, tokens they got */
    uint64_t snapshots_taken, snapshots_evicted, pages_evicted; /* evicted: for want of room */
    int32_t n_snapshots, n_pages, n_scopes;                     /* now */
} qv_prefix_stats;

qv_prefix_stats qv_prefix_cache_stats(const qv_prefix_cache *cache);

#endif
