#include "worker/prefix_cache.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

/* A place in one of the two orders of use. */
typedef struct {
    int32_t prev, next; /* towards the most recent, towards the least recent; -1 = none */
} links;

typedef struct {
    int32_t head, tail; /* most and least recently used; -1 = empty */
} order;

/* A page in the tree. Its number is the page's. */
typedef struct {
    qv_prefix_scope *scope; /* NULL: the page is in no tree */
    uint64_t hash;          /* of its tokens and all before them, scope included */
    int32_t parent;         /* -1: the first page of a sequence */
    int32_t depth;          /* pages from the root, itself included */
    int32_t n_children;
    int32_t state_slot; /* the snapshot at its end; -1 = none */
    int32_t next;       /* in its bucket */
    links leaf;         /* in `leaves` while n_children is 0 */
    links kept;         /* in `snapshots` while state_slot is not -1 */
} node;

struct qv_prefix_scope {
    qv_prefix_scope *next;
    uint64_t seed;   /* where the hashes of its nodes begin */
    int64_t refs;    /* holds of sequences */
    int32_t n_nodes; /* freed when both are 0 */
    bool is_base;
    bool closed;   /* forgotten; in no list, without nodes */
    char digest[]; /* empty for the base model */
};

struct qv_prefix_cache {
    qv_kv_cache *pages;
    qv_state_cache *states;
    int32_t page_tokens;
    int32_t n_pages;
    node *nodes;        /* [n_pages] */
    int32_t *tokens;    /* [n_pages, page_tokens] of the pages in trees */
    int32_t *buckets;   /* [n_buckets] first node of each; -1 = empty */
    uint32_t n_buckets; /* a power of two */
    order leaves, snapshots;
    qv_prefix_scope *scopes; /* those that are not closed */
    uint64_t seed;           /* random, so that chosen tokens do not collide on purpose */
    qv_prefix_stats stats;
};

/* --- Orders ---------------------------------------------------------------------------------- */

/* The links of node i in an order: the two differ in the field alone. */
static links *links_of(qv_prefix_cache *cache, const order *o, int32_t i)
{
    return o == &cache->leaves ? &cache->nodes[i].leaf : &cache->nodes[i].kept;
}

static void order_remove(qv_prefix_cache *cache, order *o, int32_t i)
{
    links *at = links_of(cache, o, i);
    *(at->prev >= 0 ? &links_of(cache, o, at->prev)->next : &o->head) = at->next;
    *(at->next >= 0 ? &links_of(cache, o, at->next)->prev : &o->tail) = at->prev;
    *at = (links){-1, -1};
}

static void order_push_recent(qv_prefix_cache *cache, order *o, int32_t i)
{
    *links_of(cache, o, i) = (links){-1, o->head};
    *(o->head >= 0 ? &links_of(cache, o, o->head)->prev : &o->tail) = i;
    o->head = i;
}

static void order_push_stale(qv_prefix_cache *cache, order *o, int32_t i)
{
    *links_of(cache, o, i) = (links){o->tail, -1};
    *(o->tail >= 0 ? &links_of(cache, o, o->tail)->next : &o->head) = i;
    o->tail = i;
}

static void order_touch(qv_prefix_cache *cache, order *o, int32_t i)
{
    order_remove(cache, o, i);
    order_push_recent(cache, o, i);
}

/* --- Nodes ----------------------------------------------------------------------------------- */

static uint64_t hash_page(const qv_prefix_cache *cache, uint64_t before, const int32_t *tokens)
{
    return XXH3_64bits_withSeed(tokens, (size_t)cache->page_tokens * sizeof *tokens, before);
}

static int32_t *bucket_of(const qv_prefix_cache *cache, uint64_t hash)
{
    return &cache->buckets[hash & (cache->n_buckets - 1)];
}

static int32_t *tokens_of(const qv_prefix_cache *cache, int32_t i)
{
    return cache->tokens + (int64_t)i * cache->page_tokens;
}

/* The node below `parent` with these tokens; -1 = none. */
static int32_t find_child(const qv_prefix_cache *cache, const qv_prefix_scope *scope,
                          int32_t parent, uint64_t hash, const int32_t *tokens)
{
    size_t bytes = (size_t)cache->page_tokens * sizeof *tokens;
    int32_t i = *bucket_of(cache, hash);
    for (; i >= 0; i = cache->nodes[i].next) {
        const node *n = &cache->nodes[i];
        if (n->hash == hash && n->parent == parent && n->scope == scope &&
            memcmp(tokens_of(cache, i), tokens, bytes) == 0)
            break;
    }
    return i;
}

static void add_node(qv_prefix_cache *cache, qv_prefix_scope *scope, int32_t parent, uint64_t hash,
                     const int32_t *tokens, int32_t page)
{
    int32_t *bucket = bucket_of(cache, hash);
    cache->nodes[page] = (node){
        .scope = scope,
        .hash = hash,
        .parent = parent,
        .depth = 1,
        .state_slot = -1,
        .next = *bucket,
    };
    *bucket = page;
    memcpy(tokens_of(cache, page), tokens, (size_t)cache->page_tokens * sizeof *tokens);
    if (parent >= 0) {
        node *above = &cache->nodes[parent];
        cache->nodes[page].depth = above->depth + 1;
        if (above->n_children++ == 0)
            order_remove(cache, &cache->leaves, parent);
    }
    order_push_recent(cache, &cache->leaves, page);
    scope->n_nodes++;
    qv_kv_cache_keep(cache->pages, page);
}

static void drop_snapshot(qv_prefix_cache *cache, int32_t i)
{
    node *n = &cache->nodes[i];
    qv_state_cache_release(cache->states, n->state_slot);
    n->state_slot = -1;
    order_remove(cache, &cache->snapshots, i);
    cache->stats.n_snapshots--;
}

/* Take a node without children out of the tree, and nothing else. */
static void remove_node(qv_prefix_cache *cache, int32_t i)
{
    node *n = &cache->nodes[i];
    if (n->state_slot >= 0)
        drop_snapshot(cache, i);
    order_remove(cache, &cache->leaves, i);
    int32_t *at = bucket_of(cache, n->hash);
    while (*at != i)
        at = &cache->nodes[*at].next;
    *at = n->next;
    n->scope->n_nodes--;
    n->scope = NULL;
    qv_kv_cache_drop(cache->pages, i);
}

/* Remove a leaf, and the nodes above it that only led there. */
static void remove_branch(qv_prefix_cache *cache, int32_t i)
{
    while (i >= 0) {
        int32_t parent = cache->nodes[i].parent;
        remove_node(cache, i);
        if (parent >= 0 && --cache->nodes[parent].n_children == 0)
            /* Whoever went on from the parent left a branch below it that was used later: with the
             * last branch gone, the parent is the stalest of all. */
            order_push_stale(cache, &cache->leaves, parent);
        if (parent < 0 || cache->nodes[parent].n_children > 0 ||
            cache->nodes[parent].state_slot >= 0)
            return;
        i = parent;
    }
}

/* --- Life ------------------------------------------------------------------------------------ */

static uint64_t random_seed(void)
{
    uint64_t seed = 0;
    if (getrandom(&seed, sizeof seed, GRND_NONBLOCK) != sizeof seed)
        seed = (uint64_t)(uintptr_t)&seed;
    return seed;
}

qv_status qv_prefix_cache_new(qv_kv_cache *pages, qv_state_cache *states, qv_prefix_cache **out)
{
    qv_prefix_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the prefix cache");
    int32_t n_pages = qv_kv_cache_n_pages(pages);
    cache->pages = pages;
    cache->states = states;
    cache->page_tokens = qv_kv_cache_page_tokens(pages);
    cache->n_pages = n_pages;
    cache->leaves = cache->snapshots = (order){-1, -1};
    cache->seed = random_seed();
    cache->n_buckets = 1;
    while (cache->n_buckets < (uint32_t)n_pages)
        cache->n_buckets *= 2;
    cache->nodes = calloc((size_t)n_pages, sizeof *cache->nodes);
    cache->tokens = calloc((size_t)n_pages, (size_t)cache->page_tokens * sizeof *cache->tokens);
    cache->buckets = malloc(cache->n_buckets * sizeof *cache->buckets);
    if (cache->nodes == NULL || cache->tokens == NULL || cache->buckets == NULL) {
        qv_prefix_cache_free(cache);
        return qv_fail(QV_ERR_NOMEM, "no memory for a prefix cache of %d pages", n_pages);
    }
    memset(cache->buckets, 0xff, cache->n_buckets * sizeof *cache->buckets);
    *out = cache;
    return QV_OK;
}

void qv_prefix_cache_free(qv_prefix_cache *cache)
{
    if (cache == NULL)
        return;
    while (cache->leaves.tail >= 0)
        remove_branch(cache, cache->leaves.tail);
    while (cache->scopes != NULL) {
        qv_prefix_scope *scope = cache->scopes;
        QV_ASSERT(scope->refs == 0 && scope->n_nodes == 0);
        cache->scopes = scope->next;
        free(scope);
    }
    free(cache->nodes);
    free(cache->tokens);
    free(cache->buckets);
    free(cache);
}

/* --- Scopes ---------------------------------------------------------------------------------- */

static void unlink_scope(qv_prefix_cache *cache, qv_prefix_scope *scope)
{
    qv_prefix_scope **at = &cache->scopes;
    while (*at != scope)
        at = &(*at)->next;
    *at = scope->next;
    cache->stats.n_scopes--;
}

/* Free the scopes that nobody holds and nothing is in. */
static void sweep_scopes(qv_prefix_cache *cache)
{
    for (qv_prefix_scope *scope = cache->scopes, *next; scope != NULL; scope = next) {
        next = scope->next;
        if (scope->refs > 0 || scope->n_nodes > 0)
            continue;
        unlink_scope(cache, scope);
        free(scope);
    }
}

qv_status qv_prefix_cache_join(qv_prefix_cache *cache, const char *digest, qv_prefix_scope **out)
{
    bool is_base = digest == NULL;
    const char *name = is_base ? "" : digest;
    qv_prefix_scope *scope = cache->scopes;
    while (scope != NULL && (scope->is_base != is_base || strcmp(scope->digest, name) != 0))
        scope = scope->next;
    if (scope == NULL) {
        sweep_scopes(cache);
        scope = calloc(1, sizeof *scope + strlen(name) + 1);
        if (scope == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for the prefixes of an adapter");
        scope->is_base = is_base;
        scope->seed = XXH3_64bits_withSeed(name, strlen(name), cache->seed + is_base);
        strcpy(scope->digest, name);
        scope->next = cache->scopes;
        cache->scopes = scope;
        cache->stats.n_scopes++;
    }
    scope->refs++;
    *out = scope;
    return QV_OK;
}

void qv_prefix_cache_leave(qv_prefix_cache *cache, qv_prefix_scope *scope)
{
    (void)cache;
    QV_ASSERT(scope->refs > 0);
    if (--scope->refs == 0 && scope->closed)
        free(scope);
}

void qv_prefix_cache_clear(qv_prefix_cache *cache, qv_prefix_scope *scope)
{
    int32_t leaf = cache->leaves.head;
    while (scope->n_nodes > 0) {
        int32_t next = cache->nodes[leaf].leaf.next;
        if (cache->nodes[leaf].scope == scope)
            remove_branch(cache, leaf); /* may make a leaf of another, behind the last */
        leaf = next >= 0 ? next : cache->leaves.head;
    }
}

static void close_scope(qv_prefix_cache *cache, qv_prefix_scope *scope)
{
    qv_prefix_cache_clear(cache, scope);
    unlink_scope(cache, scope);
    scope->closed = true;
    if (scope->refs == 0)
        free(scope);
}

void qv_prefix_cache_retain(qv_prefix_cache *cache,
                            bool (*is_known)(void *user, const char *digest), void *user)
{
    for (qv_prefix_scope *scope = cache->scopes, *next; scope != NULL; scope = next) {
        next = scope->next;
        if (!scope->is_base && !is_known(user, scope->digest))
            close_scope(cache, scope);
    }
}

/* --- Beginnings ------------------------------------------------------------------------------ */

qv_prefix_match qv_prefix_cache_find(const qv_prefix_cache *cache, const qv_prefix_scope *scope,
                                     const int32_t *tokens, int32_t n_take, int32_t n_known)
{
    qv_prefix_match match = {.state_slot = -1, .node = -1};
    uint64_t hash = scope->seed;
    int32_t at = -1, n_held = 0;
    for (int32_t end = cache->page_tokens; end <= n_known; end += cache->page_tokens) {
        const int32_t *page = tokens + end - cache->page_tokens;
        hash = hash_page(cache, hash, page);
        at = find_child(cache, scope, at, hash, page);
        if (at < 0)
            break;
        match.n_known++;
        n_held += qv_kv_cache_refs(cache->pages, at) > 0;
        if (cache->nodes[at].state_slot >= 0 && end <= n_take) {
            match.n_pages = match.n_known;
            match.n_held = n_held;
            match.state_slot = cache->nodes[at].state_slot;
            match.node = at;
        }
    }
    return match;
}

void qv_prefix_cache_take(qv_prefix_cache *cache, const qv_prefix_match *match, int32_t *pages)
{
    cache->stats.lookups++;
    if (match->n_pages == 0)
        return;
    cache->stats.hits++;
    cache->stats.hit_tokens += (uint64_t)match->n_pages * (uint64_t)cache->page_tokens;
    for (int32_t at = match->node; at >= 0; at = cache->nodes[at].parent) {
        pages[cache->nodes[at].depth - 1] = at;
        qv_kv_cache_share(cache->pages, at);
    }
    order_touch(cache, &cache->snapshots, match->node);
    if (cache->nodes[match->node].n_children == 0)
        order_touch(cache, &cache->leaves, match->node);
}

/* A slot for the snapshot at the end of a node, taken from the stalest snapshot if none is free. */
static int32_t take_slot(qv_prefix_cache *cache, int32_t i)
{
    if (qv_state_cache_n_free(cache->states) == 0)
        qv_prefix_cache_free_slot(cache);
    int32_t slot = qv_state_cache_acquire(cache->states);
    if (slot < 0)
        return -1;
    cache->nodes[i].state_slot = slot;
    order_push_recent(cache, &cache->snapshots, i);
    cache->stats.n_snapshots++;
    cache->stats.snapshots_taken++;
    return slot;
}

int32_t qv_prefix_cache_insert(qv_prefix_cache *cache, qv_prefix_scope *scope,
                               const int32_t *tokens, int32_t n_tokens, int32_t *pages,
                               bool snapshot)
{
    QV_ASSERT(!snapshot || n_tokens % cache->page_tokens == 0);
    int32_t n_pages = n_tokens / cache->page_tokens;
    if (scope->closed || n_pages == 0)
        return -1;
    uint64_t hash = scope->seed;
    int32_t at = -1;
    for (int32_t i = 0; i < n_pages; i++) {
        const int32_t *page = tokens + (int64_t)i * cache->page_tokens;
        int32_t parent = at;
        hash = hash_page(cache, hash, page);
        at = find_child(cache, scope, parent, hash, page);
        if (at < 0) {
            at = pages[i];
            add_node(cache, scope, parent, hash, page, at);
        } else if (at != pages[i]) {
            qv_kv_cache_share(cache->pages, at);
            qv_kv_cache_release(cache->pages, &pages[i], 1);
            pages[i] = at;
        }
    }
    if (cache->nodes[at].n_children == 0)
        order_touch(cache, &cache->leaves, at);
    if (!snapshot)
        return -1;
    if (cache->nodes[at].state_slot < 0)
        return take_slot(cache, at);
    order_touch(cache, &cache->snapshots, at);
    return -1;
}

/* --- Room ------------------------------------------------------------------------------------ */

bool qv_prefix_cache_free_pages(qv_prefix_cache *cache, int32_t n)
{
    /* Who holds a page holds all before it, so below an idle page there are only idle ones: as long
     * as one is idle, so is a leaf. */
    int32_t leaf = cache->leaves.tail;
    int32_t n_kept = qv_kv_cache_n_kept(cache->pages);
    while (qv_kv_cache_n_free(cache->pages) < n && leaf >= 0) {
        int32_t newer = cache->nodes[leaf].leaf.prev;
        if (qv_kv_cache_refs(cache->pages, leaf) == 0) {
            remove_branch(cache, leaf); /* may put another leaf behind the last */
            int32_t last = cache->leaves.tail;
            if (last >= 0 && qv_kv_cache_refs(cache->pages, last) == 0)
                newer = last;
        }
        leaf = newer;
    }
    cache->stats.pages_evicted += (uint64_t)(n_kept - qv_kv_cache_n_kept(cache->pages));
    return qv_kv_cache_n_free(cache->pages) >= n;
}

bool qv_prefix_cache_free_slot(qv_prefix_cache *cache)
{
    if (cache->snapshots.tail < 0)
        return false;
    drop_snapshot(cache, cache->snapshots.tail);
    cache->stats.snapshots_evicted++;
    return true;
}

/* --- Facts ----------------------------------------------------------------------------------- */

qv_prefix_stats qv_prefix_cache_stats(const qv_prefix_cache *cache)
{
    qv_prefix_stats stats = cache->stats;
    stats.n_pages = qv_kv_cache_n_kept(cache->pages);
    return stats;
}
