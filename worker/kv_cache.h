/* The KV cache's pages as numbers: who holds which page of every layer's key and value tensors.
 *
 * A page holds page_tokens positions of one sequence in every attention layer at once; the tensors
 * are the model's. Pages are counted: a page that several sequences read is held once by each, and
 * returns to the free list with the last. A page may be kept for its content (the prefix cache does
 * that): without holders it is then idle, not free, until it is held again or dropped. Pure
 * accounting, engine thread.
 */
#ifndef QV_WORKER_KV_CACHE_H
#define QV_WORKER_KV_CACHE_H

#include "common/status.h"

#include <stdint.h>

typedef struct qv_kv_cache qv_kv_cache;

/* Errors: ARG (fewer than one page), NOMEM. */
qv_status qv_kv_cache_new(int32_t n_pages, int32_t page_tokens, qv_kv_cache **out);

/* free(NULL) is fine. */
void qv_kv_cache_free(qv_kv_cache *cache);

int32_t qv_kv_cache_page_tokens(const qv_kv_cache *cache);

/* Pages that `n_tokens` positions need. */
int32_t qv_kv_cache_pages_for(const qv_kv_cache *cache, int32_t n_tokens);

/* Take n free pages, each held once, into pages[n]; all or none. The order is fixed by what was
 * acquired and released before. */
bool qv_kv_cache_acquire(qv_kv_cache *cache, int32_t n, int32_t *pages);

/* Hold a page that is held or kept once more. */
void qv_kv_cache_share(qv_kv_cache *cache, int32_t page);

/* Give up n holds; a page nobody holds any more is free. */
void qv_kv_cache_release(qv_kv_cache *cache, const int32_t *pages, int32_t n);

/* Keep a page that is held, beyond its last hold; drop it again. A page is kept once. */
void qv_kv_cache_keep(qv_kv_cache *cache, int32_t page);
void qv_kv_cache_drop(qv_kv_cache *cache, int32_t page);

int32_t qv_kv_cache_n_free(const qv_kv_cache *cache);
int32_t qv_kv_cache_n_idle(const qv_kv_cache *cache); /* kept, and held by nobody */
int32_t qv_kv_cache_n_kept(const qv_kv_cache *cache);
int32_t qv_kv_cache_n_pages(const qv_kv_cache *cache);
int32_t qv_kv_cache_refs(const qv_kv_cache *cache, int32_t page);
bool qv_kv_cache_is_kept(const qv_kv_cache *cache, int32_t page);

#endif
