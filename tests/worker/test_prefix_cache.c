/* The index of the prefix cache: what is found is what was kept, under the same scope and nowhere
 * else, and whatever it keeps comes back. */
#include "worker/prefix_cache.h"

#include "tests/support.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 2 }; /* tokens of a page in all of these tests */

typedef struct {
    qv_kv_cache *pages;
    qv_state_cache *states;
    qv_prefix_cache *prefix;
    qv_prefix_scope *base;
} world;

static world world_new(int32_t n_pages, int32_t n_slots)
{
    world w;
    cr_assert_eq(qv_kv_cache_new(n_pages, PAGE, &w.pages), QV_OK);
    cr_assert_eq(qv_state_cache_new(n_slots, 0, &w.states), QV_OK);
    cr_assert_eq(qv_prefix_cache_new(w.pages, w.states, &w.prefix), QV_OK);
    cr_assert_eq(qv_prefix_cache_join(w.prefix, NULL, &w.base), QV_OK);
    return w;
}

/* Everything that sequences held has been given back: with the cache gone, all is free. */
static void world_free(world *w)
{
    int32_t n = qv_kv_cache_n_pages(w->pages);
    cr_expect_eq(qv_kv_cache_n_free(w->pages) + qv_kv_cache_n_idle(w->pages), n);
    qv_prefix_cache_leave(w->prefix, w->base);
    qv_prefix_cache_free(w->prefix);
    cr_expect_eq(qv_kv_cache_n_free(w->pages), n);
    cr_expect_eq(qv_kv_cache_n_kept(w->pages), 0);
    cr_expect_eq(qv_state_cache_n_free(w->states), qv_state_cache_n_slots(w->states));
    qv_kv_cache_free(w->pages);
    qv_state_cache_free(w->states);
}

/* Tokens of a text, one a letter. */
static int32_t to_tokens(const char *text, int32_t *tokens)
{
    int32_t n = 0;
    for (; text[n] != '\0'; n++)
        tokens[n] = text[n];
    return n;
}

/* A sequence that computes a text from nothing, keeps it and ends. The slot of its snapshot. */
static int32_t keep(world *w, qv_prefix_scope *scope, const char *text, bool snapshot)
{
    int32_t tokens[64], pages[32], n = to_tokens(text, tokens);
    int32_t n_pages = qv_kv_cache_pages_for(w->pages, n);
    cr_assert(qv_prefix_cache_free_pages(w->prefix, n_pages), "%s", text);
    cr_assert(qv_kv_cache_acquire(w->pages, n_pages, pages));
    int32_t slot = qv_prefix_cache_insert(w->prefix, scope, tokens, n, pages, snapshot);
    qv_kv_cache_release(w->pages, pages, n_pages);
    return slot;
}

static qv_prefix_match find(const world *w, const qv_prefix_scope *scope, const char *text)
{
    int32_t tokens[64], n = to_tokens(text, tokens);
    return qv_prefix_cache_find(w->prefix, scope, tokens, n, n);
}

/* --- What is found --------------------------------------------------------------------------- */

Test(prefix_cache, finds_the_longest_beginning_that_ends_in_a_snapshot)
{
    static const struct {
        const char *text;
        int32_t n_pages, n_known;
    } rows[] = {
        {"aabbccdd", 4, 4}, {"aabbccddee", 4, 4}, {"aabbccd", 2, 3}, {"aabb", 2, 2},
        {"aabbxx", 2, 2},   {"aab", 0, 1},        {"aaxx", 0, 1},    {"", 0, 0},
        {"a", 0, 0},        {"xxbbcc", 0, 0},     {"bb", 0, 0},      {"aabbggg", 2, 3},
    };
    world w = world_new(16, 4);
    int32_t whole = keep(&w, w.base, "aabbccdd", true), half = keep(&w, w.base, "aabb", true);
    cr_assert_geq(whole, 0);
    cr_assert_geq(half, 0);
    cr_assert_neq(whole, half);
    cr_assert_eq(keep(&w, w.base, "aabbggh", false), -1, "pages alone");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_prefix_match match = find(&w, w.base, rows[i].text);
        cr_expect_eq(match.n_pages, rows[i].n_pages, "'%s'", rows[i].text);
        cr_expect_eq(match.n_known, rows[i].n_known, "'%s'", rows[i].text);
        cr_expect_eq(match.state_slot, rows[i].n_pages == 4   ? whole
                                       : rows[i].n_pages == 2 ? half
                                                              : -1);
    }
    world_free(&w);
}

Test(prefix_cache, takes_no_more_than_it_may)
{
    world w = world_new(16, 4);
    int32_t tokens[64], n = to_tokens("aabbccdd", tokens);
    keep(&w, w.base, "aabbccdd", true);
    keep(&w, w.base, "aabb", true);
    static const struct {
        int32_t n_take, n_pages;
    } rows[] = {{8, 4}, {7, 2}, {4, 2}, {3, 0}, {0, 0}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_prefix_match match = qv_prefix_cache_find(w.prefix, w.base, tokens, rows[i].n_take, n);
        cr_expect_eq(match.n_pages, rows[i].n_pages, "%d tokens", rows[i].n_take);
        cr_expect_eq(match.n_known, 4);
    }
    world_free(&w);
}

Test(prefix_cache, keeps_scopes_apart)
{
    world w = world_new(16, 8);
    qv_prefix_scope *a, *b, *again, *unnamed;
    cr_assert_eq(qv_prefix_cache_join(w.prefix, "aa11", &a), QV_OK);
    cr_assert_eq(qv_prefix_cache_join(w.prefix, "bb22", &b), QV_OK);
    cr_assert_eq(qv_prefix_cache_join(w.prefix, "aa11", &again), QV_OK);
    cr_assert_eq(qv_prefix_cache_join(w.prefix, "", &unnamed), QV_OK);
    cr_assert_eq(a, again, "one content, one scope");
    cr_assert_neq(unnamed, w.base, "an empty digest is not the base model");
    keep(&w, a, "aabb", true);
    cr_expect_eq(find(&w, a, "aabb").n_pages, 2);
    cr_expect_eq(find(&w, b, "aabb").n_known, 0);
    cr_expect_eq(find(&w, w.base, "aabb").n_known, 0);
    cr_expect_eq(find(&w, unnamed, "aabb").n_known, 0);
    keep(&w, w.base, "aabb", true);
    cr_expect_neq(find(&w, a, "aabb").node, find(&w, w.base, "aabb").node);
    qv_prefix_scope *const held[] = {a, b, again, unnamed};
    for (int i = 0; i < 4; i++)
        qv_prefix_cache_leave(w.prefix, held[i]);
    world_free(&w);
}

static bool is_bb22(void *user, const char *digest)
{
    (void)user;
    return strcmp(digest, "bb22") == 0;
}

Test(prefix_cache, forgets_a_scope_that_is_gone_while_it_is_held)
{
    world w = world_new(16, 8);
    qv_prefix_scope *old, *other, *new;
    cr_assert_eq(qv_prefix_cache_join(w.prefix, "aa11", &old), QV_OK);
    cr_assert_eq(qv_prefix_cache_join(w.prefix, "bb22", &other), QV_OK);
    keep(&w, old, "aabbcc", true);
    keep(&w, old, "aabbdd", true);
    keep(&w, old, "aabb", true);
    keep(&w, other, "aabb", true);
    keep(&w, w.base, "aabb", true);
    qv_prefix_cache_retain(w.prefix, is_bb22, NULL);
    cr_expect_eq(qv_prefix_cache_stats(w.prefix).n_pages, 4);
    cr_expect_eq(qv_prefix_cache_stats(w.prefix).n_snapshots, 2);
    cr_expect_eq(find(&w, other, "aabb").n_pages, 2);
    cr_expect_eq(find(&w, w.base, "aabb").n_pages, 2);

    cr_assert_eq(qv_prefix_cache_join(w.prefix, "aa11", &new), QV_OK);
    cr_assert_neq(old, new);
    cr_expect_eq(keep(&w, old, "aabb", true), -1, "nothing is kept for what is gone");
    cr_expect_eq(find(&w, old, "aabb").n_known, 0);
    cr_expect_eq(find(&w, new, "aabb").n_known, 0);
    qv_prefix_cache_leave(w.prefix, old);
    qv_prefix_cache_leave(w.prefix, new);
    qv_prefix_cache_leave(w.prefix, other);
    world_free(&w);
}

Test(prefix_cache, exchanges_pages_that_it_knows_for_its_own)
{
    world w = world_new(8, 2);
    int32_t tokens[64], n = to_tokens("aabbcc", tokens), first[3], second[3];
    cr_assert(qv_kv_cache_acquire(w.pages, 3, first));
    cr_assert(qv_kv_cache_acquire(w.pages, 3, second));
    qv_prefix_cache_insert(w.prefix, w.base, tokens, 4, first, false);
    qv_prefix_cache_insert(w.prefix, w.base, tokens, n, second, false);
    cr_expect_eq(second[0], first[0]);
    cr_expect_eq(second[1], first[1]);
    cr_expect_neq(second[2], first[2], "it was not known");
    cr_expect_eq(qv_kv_cache_refs(w.pages, first[0]), 2);
    cr_expect_eq(qv_kv_cache_n_free(w.pages), 8 - 4);
    qv_kv_cache_release(w.pages, first, 3);
    qv_kv_cache_release(w.pages, second, 3);
    cr_expect_eq(qv_kv_cache_n_idle(w.pages), 3);
    world_free(&w);
}

/* --- Room ------------------------------------------------------------------------------------ */

Test(prefix_cache, forgets_what_was_used_least_recently)
{
    world w = world_new(6, 8);
    keep(&w, w.base, "aabb", true);
    keep(&w, w.base, "ccdd", true);
    keep(&w, w.base, "eeff", true);
    int32_t pages[2];
    qv_prefix_match match = find(&w, w.base, "aabb");
    qv_prefix_cache_take(w.prefix, &match, pages);
    qv_kv_cache_release(w.pages, pages, 2);

    cr_assert(qv_prefix_cache_free_pages(w.prefix, 1));
    cr_expect_eq(find(&w, w.base, "ccdd").n_known, 0, "a branch goes as a whole");
    cr_expect_eq(find(&w, w.base, "eeff").n_pages, 2);
    cr_expect_eq(find(&w, w.base, "aabb").n_pages, 2);
    cr_assert(qv_prefix_cache_free_pages(w.prefix, 3));
    cr_expect_eq(find(&w, w.base, "eeff").n_known, 0);
    cr_expect_eq(find(&w, w.base, "aabb").n_pages, 2);
    cr_expect_eq(qv_prefix_cache_stats(w.prefix).pages_evicted, 4);
    world_free(&w);
}

Test(prefix_cache, forgets_branches_before_what_they_share)
{
    world w = world_new(8, 8);
    keep(&w, w.base, "aabb", true);
    keep(&w, w.base, "aabbcc", false);
    keep(&w, w.base, "aabbdd", false);
    keep(&w, w.base, "aabbeeff", false);
    cr_assert(qv_prefix_cache_free_pages(w.prefix, 4));
    cr_expect_eq(find(&w, w.base, "aabbcc").n_known, 2);
    cr_expect_eq(find(&w, w.base, "aabbdd").n_known, 2);
    cr_expect_eq(find(&w, w.base, "aabbeeff").n_known, 4);
    cr_assert(qv_prefix_cache_free_pages(w.prefix, 6));
    cr_expect_eq(find(&w, w.base, "aabbeeff").n_pages, 2, "its snapshot keeps it");
    cr_assert(qv_prefix_cache_free_pages(w.prefix, 8));
    cr_expect_eq(qv_prefix_cache_stats(w.prefix).n_snapshots, 0);
    world_free(&w);
}

Test(prefix_cache, leaves_what_is_held_alone)
{
    world w = world_new(6, 8);
    keep(&w, w.base, "aabb", true);
    keep(&w, w.base, "ccdd", true);
    int32_t pages[2];
    qv_prefix_match match = find(&w, w.base, "aabb");
    cr_expect_eq(match.n_held, 0);
    qv_prefix_cache_take(w.prefix, &match, pages);
    cr_expect_eq(find(&w, w.base, "aabb").n_held, 2);
    cr_assert_not(qv_prefix_cache_free_pages(w.prefix, 5));
    cr_expect_eq(qv_kv_cache_n_free(w.pages), 4, "all that can be had");
    cr_expect_eq(find(&w, w.base, "aabb").n_pages, 2);
    qv_kv_cache_release(w.pages, pages, 2);
    world_free(&w);
}

Test(prefix_cache, gives_the_stalest_snapshot_to_the_next)
{
    world w = world_new(16, 2);
    cr_assert_geq(keep(&w, w.base, "aabb", true), 0);
    int32_t second = keep(&w, w.base, "aabbcc", true);
    cr_assert_geq(second, 0);
    int32_t pages[2];
    qv_prefix_match match = find(&w, w.base, "aabb");
    qv_prefix_cache_take(w.prefix, &match, pages);
    qv_kv_cache_release(w.pages, pages, 2);
    cr_expect_eq(keep(&w, w.base, "eeff", true), second);
    cr_expect_eq(keep(&w, w.base, "eeff", true), -1, "it is there");
    cr_expect_eq(find(&w, w.base, "aabbcc").n_pages, 2);
    cr_expect_eq(find(&w, w.base, "aabbcc").n_known, 3, "its pages are still known");
    cr_expect_eq(find(&w, w.base, "eeff").n_pages, 2);
    cr_assert(qv_prefix_cache_free_slot(w.prefix));
    cr_assert(qv_prefix_cache_free_slot(w.prefix));
    cr_assert_not(qv_prefix_cache_free_slot(w.prefix));
    cr_expect_eq(qv_state_cache_n_free(w.states), 2);
    cr_expect_eq(qv_prefix_cache_stats(w.prefix).snapshots_evicted, 3);
    world_free(&w);
}

Test(prefix_cache, takes_no_snapshot_without_a_slot)
{
    world w = world_new(8, 1);
    int32_t slot = qv_state_cache_acquire(w.states);
    cr_expect_eq(keep(&w, w.base, "aabb", true), -1);
    cr_expect_eq(find(&w, w.base, "aabb").n_pages, 0);
    cr_expect_eq(find(&w, w.base, "aabb").n_known, 2);
    qv_state_cache_release(w.states, slot);
    world_free(&w);
}

/* --- Drawn operations against a plain model --------------------------------------------------- */

enum { N_PAGES = 40, N_SLOTS = 9, N_SEQS = 6, N_NAMES = 3, MAX_TOKENS = 24 };

/* A sequence of the drawn test, as an engine runs one. */
typedef struct {
    qv_prefix_scope *scope; /* NULL: not running */
    uint64_t who;           /* the content that computes it */
    int32_t tokens[MAX_TOKENS], n_tokens, n_computed;
    int32_t pages[MAX_TOKENS], n_pages, slot;
} runner;

/* The plain model: what the memory of each page and slot holds, as a number that names the content
 * and all tokens up to its end. */
typedef struct {
    world w;
    qv_rng rng;
    uint64_t page_holds[N_PAGES], slot_holds[N_SLOTS];
    runner seqs[N_SEQS];
    char digest[N_NAMES][32]; /* of each name now */
    uint64_t n_digests, n_hits;
} drawn;

static int draw(drawn *t, int n)
{
    return (int)qv_rng_range(&t->rng, 0, n);
}

static uint64_t value_of(uint64_t who, const int32_t *tokens, int32_t n)
{
    uint64_t value = 1469598103934665603u ^ who;
    for (int32_t i = 0; i < n; i++)
        value = (value ^ (uint64_t)tokens[i]) * 1099511628211u;
    return value;
}

static void check_pages(const drawn *t, const runner *r)
{
    for (int32_t i = 0; (i + 1) * PAGE <= r->n_computed; i++)
        cr_assert_eq(t->page_holds[r->pages[i]], value_of(r->who, r->tokens, (i + 1) * PAGE),
                     "page %d of a sequence holds something else", i);
}

static void rename_one(drawn *t)
{
    snprintf(t->digest[draw(t, N_NAMES)], sizeof *t->digest, "%d", (int)++t->n_digests);
}

static bool is_known(void *user, const char *digest)
{
    const drawn *t = user;
    for (int i = 0; i < N_NAMES; i++)
        if (strcmp(t->digest[i], digest) == 0)
            return true;
    return false;
}

static void begin(drawn *t, runner *r)
{
    int name = draw(t, N_NAMES + 1); /* the last one is the base model */
    *r = (runner){.n_tokens = 1 + draw(t, MAX_TOKENS - 1)};
    r->who = name < N_NAMES ? strtoull(t->digest[name], NULL, 10) + 1 : 0;
    for (int32_t i = 0; i < r->n_tokens; i++)
        r->tokens[i] = draw(t, 8) == 0;
    qv_prefix_cache_join(t->w.prefix, name < N_NAMES ? t->digest[name] : NULL, &r->scope);

    qv_prefix_match match =
        qv_prefix_cache_find(t->w.prefix, r->scope, r->tokens, r->n_tokens - 1, r->n_tokens - 1);
    int32_t n_pages = qv_kv_cache_pages_for(t->w.pages, r->n_tokens);
    int32_t room = qv_kv_cache_n_free(t->w.pages) + qv_kv_cache_n_idle(t->w.pages);
    if (n_pages - match.n_held > room) {
        qv_prefix_cache_leave(t->w.prefix, r->scope);
        r->scope = NULL;
        return;
    }
    qv_prefix_cache_take(t->w.prefix, &match, r->pages);
    uint64_t state = match.n_pages > 0 ? t->slot_holds[match.state_slot] : 0;
    r->n_computed = match.n_pages * PAGE;
    r->n_pages = n_pages;
    cr_assert(qv_prefix_cache_free_pages(t->w.prefix, n_pages - match.n_pages));
    cr_assert(qv_kv_cache_acquire(t->w.pages, n_pages - match.n_pages, r->pages + match.n_pages));
    if (qv_state_cache_n_free(t->w.states) == 0)
        cr_assert(qv_prefix_cache_free_slot(t->w.prefix));
    r->slot = qv_state_cache_acquire(t->w.states);
    if (match.n_pages > 0)
        cr_assert_eq(state, value_of(r->who, r->tokens, r->n_computed), "another state");
    t->n_hits += match.n_pages > 0;
    check_pages(t, r);
}

/* Compute some tokens; write what they leave behind. */
static void go_on(drawn *t, runner *r)
{
    int32_t n = 1 + draw(t, 6);
    for (; n > 0 && r->n_computed < r->n_tokens; n--) {
        int32_t page = r->pages[r->n_computed / PAGE];
        cr_assert_eq(qv_kv_cache_refs(t->w.pages, page), 1, "a shared page is written");
        cr_assert_not(qv_kv_cache_is_kept(t->w.pages, page), "a kept page is written");
        r->n_computed++;
        t->page_holds[page] = value_of(r->who, r->tokens, r->n_computed);
        t->slot_holds[r->slot] = value_of(r->who, r->tokens, r->n_computed);
    }
    if (draw(t, 2) == 0)
        return;
    bool snapshot = r->n_computed % PAGE == 0 && draw(t, 2) == 0;
    int32_t slot =
        qv_prefix_cache_insert(t->w.prefix, r->scope, r->tokens, r->n_computed, r->pages, snapshot);
    if (slot >= 0) {
        cr_assert_neq(slot, r->slot);
        t->slot_holds[slot] = t->slot_holds[r->slot];
    }
    check_pages(t, r);
}

static void end(drawn *t, runner *r)
{
    qv_kv_cache_release(t->w.pages, r->pages, r->n_pages);
    qv_state_cache_release(t->w.states, r->slot);
    qv_prefix_cache_leave(t->w.prefix, r->scope);
    r->scope = NULL;
}

Test(prefix_cache, agrees_with_a_plain_model_under_drawn_operations, .timeout = 120)
{
    for (uint64_t seed = 0; seed < 40; seed++) {
        drawn *t = calloc(1, sizeof *t);
        t->w = world_new(N_PAGES, N_SLOTS);
        t->rng = qv_rng_seed(seed);
        for (int i = 0; i < N_NAMES; i++)
            snprintf(t->digest[i], sizeof *t->digest, "%d", (int)++t->n_digests);
        for (int round = 0; round < 20000; round++) {
            runner *r = &t->seqs[draw(t, N_SEQS)];
            if (r->scope == NULL)
                begin(t, r);
            else if (draw(t, 4) == 0)
                end(t, r);
            else
                go_on(t, r);
            if (draw(t, 200) == 0) {
                rename_one(t);
                qv_prefix_cache_retain(t->w.prefix, is_known, t);
            }
            if (draw(t, 500) == 0)
                qv_prefix_cache_clear(t->w.prefix, t->w.base);
        }
        qv_prefix_stats stats = qv_prefix_cache_stats(t->w.prefix);
        cr_expect_gt(t->n_hits, 100, "seed %d: it is used", (int)seed);
        cr_expect_eq(stats.hits, t->n_hits);
        cr_expect_gt(stats.pages_evicted, 0);
        cr_expect_gt(stats.snapshots_evicted, 0);
        for (int i = 0; i < N_SEQS; i++)
            if (t->seqs[i].scope != NULL)
                end(t, &t->seqs[i]);
        world_free(&t->w);
        free(t);
    }
}
