#include "worker/kv_cache.h"

#include <stdlib.h>

struct qv_kv_cache {
    int32_t n_pages, page_tokens;
    int32_t n_free, n_idle, n_kept;
    int32_t *free_list; /* [n_pages] a stack; the first n_free are free pages */
    int32_t *refs;      /* [n_pages] holds of each page */
    bool *kept;         /* [n_pages] */
};

qv_status qv_kv_cache_new(int32_t n_pages, int32_t page_tokens, qv_kv_cache **out)
{
    if (n_pages < 1 || page_tokens < 1)
        return qv_fail(QV_ERR_ARG, "a KV cache of %d pages of %d tokens", n_pages, page_tokens);
    qv_kv_cache *cache = calloc(1, sizeof *cache);
    if (cache != NULL) {
        cache->free_list = calloc((size_t)n_pages, sizeof *cache->free_list);
        cache->refs = calloc((size_t)n_pages, sizeof *cache->refs);
        cache->kept = calloc((size_t)n_pages, sizeof *cache->kept);
    }
    if (cache == NULL || cache->free_list == NULL || cache->refs == NULL || cache->kept == NULL) {
        qv_kv_cache_free(cache);
        return qv_fail(QV_ERR_NOMEM, "no memory for a table of %d KV pages", n_pages);
    }
    cache->n_pages = cache->n_free = n_pages;
    cache->page_tokens = page_tokens;
    for (int32_t i = 0; i < n_pages; i++)
        cache->free_list[i] = n_pages - 1 - i; /* page 0 on top */
    *out = cache;
    return QV_OK;
}

void qv_kv_cache_free(qv_kv_cache *cache)
{
    if (cache == NULL)
        return;
    free(cache->free_list);
    free(cache->refs);
    free(cache->kept);
    free(cache);
}

int32_t qv_kv_cache_page_tokens(const qv_kv_cache *cache)
{
    return cache->page_tokens;
}

int32_t qv_kv_cache_pages_for(const qv_kv_cache *cache, int32_t n_tokens)
{
    return (int32_t)(((int64_t)n_tokens + cache->page_tokens - 1) / cache->page_tokens);
}

bool qv_kv_cache_acquire(qv_kv_cache *cache, int32_t n, int32_t *pages)
{
    QV_ASSERT(n >= 0);
    if (n > cache->n_free)
        return false;
    for (int32_t i = 0; i < n; i++) {
        pages[i] = cache->free_list[--cache->n_free];
        cache->refs[pages[i]] = 1;
    }
    return true;
}

void qv_kv_cache_share(qv_kv_cache *cache, int32_t page)
{
    QV_ASSERT(page >= 0 && page < cache->n_pages);
    QV_ASSERT(cache->refs[page] > 0 || cache->kept[page]);
    cache->n_idle -= cache->refs[page]++ == 0;
}

void qv_kv_cache_release(qv_kv_cache *cache, const int32_t *pages, int32_t n)
{
    /* Backwards, so that the next acquire gets the same pages in the same order. */
    for (int32_t i = n - 1; i >= 0; i--) {
        int32_t page = pages[i];
        QV_ASSERT(page >= 0 && page < cache->n_pages && cache->refs[page] > 0);
        if (--cache->refs[page] > 0)
            continue;
        if (cache->kept[page])
            cache->n_idle++;
        else
            cache->free_list[cache->n_free++] = page;
    }
}

void qv_kv_cache_keep(qv_kv_cache *cache, int32_t page)
{
    QV_ASSERT(page >= 0 && page < cache->n_pages && cache->refs[page] > 0 && !cache->kept[page]);
    cache->kept[page] = true;
    cache->n_kept++;
}

void qv_kv_cache_drop(qv_kv_cache *cache, int32_t page)
{
    QV_ASSERT(page >= 0 && page < cache->n_pages && cache->kept[page]);
    cache->kept[page] = false;
    cache->n_kept--;
    if (cache->refs[page] > 0)
        return;
    cache->n_idle--;
    cache->free_list[cache->n_free++] = page;
}

int32_t qv_kv_cache_n_free(const qv_kv_cache *cache)
{
    return cache->n_free;
}

int32_t qv_kv_cache_n_idle(const qv_kv_cache *cache)
{
    return cache->n_idle;
}

int32_t qv_kv_cache_n_kept(const qv_kv_cache *cache)
{
    return cache->n_kept;
}

int32_t qv_kv_cache_n_pages(const qv_kv_cache *cache)
{
    return cache->n_pages;
}

int32_t qv_kv_cache_refs(const qv_kv_cache *cache, int32_t page)
{
    QV_ASSERT(page >= 0 && page < cache->n_pages);
    return cache->refs[page];
}

bool qv_kv_cache_is_kept(const qv_kv_cache *cache, int32_t page)
{
    QV_ASSERT(page >= 0 && page < cache->n_pages);
    return cache->kept[page];
}
