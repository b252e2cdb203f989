/* Pages and state slots: every hold is given back once, nothing is handed out twice. */
#include "worker/kv_cache.h"
#include "worker/state_cache.h"

#include "tests/support.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <string.h>

/* --- Pages ----------------------------------------------------------------------------------- */

Test(kv_cache, refuses_to_be_empty)
{
    qv_kv_cache *cache = NULL;
    cr_assert_eq(qv_kv_cache_new(0, 16, &cache), QV_ERR_ARG);
    cr_assert_eq(qv_kv_cache_new(4, 0, &cache), QV_ERR_ARG);
    qv_kv_cache_free(NULL);
}

Test(kv_cache, counts_pages_for_tokens)
{
    static const struct {
        int32_t page_tokens, n_tokens, pages;
    } rows[] = {{16, 0, 0},  {16, 1, 1}, {16, 16, 1},
                {16, 17, 2}, {1, 7, 7},  {4096, INT32_MAX, 524288}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_kv_cache *cache;
        cr_assert_eq(qv_kv_cache_new(4, rows[i].page_tokens, &cache), QV_OK);
        cr_expect_eq(qv_kv_cache_pages_for(cache, rows[i].n_tokens), rows[i].pages, "%d tokens",
                     rows[i].n_tokens);
        qv_kv_cache_free(cache);
    }
}

Test(kv_cache, gives_all_or_nothing)
{
    qv_kv_cache *cache;
    int32_t pages[4];
    cr_assert_eq(qv_kv_cache_new(4, 16, &cache), QV_OK);
    cr_assert(qv_kv_cache_acquire(cache, 3, pages));
    cr_assert_not(qv_kv_cache_acquire(cache, 2, pages + 2));
    cr_assert_eq(qv_kv_cache_n_free(cache), 1);
    cr_assert(qv_kv_cache_acquire(cache, 0, pages), "nothing can always be had");
    qv_kv_cache_release(cache, pages, 3);
    cr_assert_eq(qv_kv_cache_n_free(cache), 4);
    qv_kv_cache_free(cache);
}

Test(kv_cache, frees_a_shared_page_with_its_last_hold)
{
    qv_kv_cache *cache;
    int32_t page;
    cr_assert_eq(qv_kv_cache_new(2, 16, &cache), QV_OK);
    cr_assert(qv_kv_cache_acquire(cache, 1, &page));
    qv_kv_cache_share(cache, page);
    cr_assert_eq(qv_kv_cache_refs(cache, page), 2);
    qv_kv_cache_release(cache, &page, 1);
    cr_assert_eq(qv_kv_cache_n_free(cache), 1);
    qv_kv_cache_release(cache, &page, 1);
    cr_assert_eq(qv_kv_cache_n_free(cache), 2);
    qv_kv_cache_free(cache);
}

Test(kv_cache, keeps_a_page_beyond_its_last_hold)
{
    qv_kv_cache *cache;
    int32_t page;
    cr_assert_eq(qv_kv_cache_new(2, 16, &cache), QV_OK);
    cr_assert(qv_kv_cache_acquire(cache, 1, &page));
    qv_kv_cache_keep(cache, page);
    cr_assert_eq(qv_kv_cache_n_idle(cache), 0, "it is held");
    qv_kv_cache_release(cache, &page, 1);
    cr_assert_eq(qv_kv_cache_n_free(cache), 1);
    cr_assert_eq(qv_kv_cache_n_idle(cache), 1);
    qv_kv_cache_share(cache, page);
    cr_assert_eq(qv_kv_cache_n_idle(cache), 0);
    qv_kv_cache_drop(cache, page);
    cr_assert_eq(qv_kv_cache_n_free(cache), 1, "it is held");
    qv_kv_cache_release(cache, &page, 1);
    cr_assert_eq(qv_kv_cache_n_free(cache), 2);
    cr_assert_eq(qv_kv_cache_n_kept(cache), 0);
    qv_kv_cache_free(cache);
}

Test(kv_cache, stops_the_process_on_a_double_release, .signal = SIGABRT)
{
    qv_kv_cache *cache;
    int32_t page;
    cr_assert_eq(qv_kv_cache_new(2, 16, &cache), QV_OK);
    cr_assert(qv_kv_cache_acquire(cache, 1, &page));
    qv_kv_cache_release(cache, &page, 1);
    qv_kv_cache_release(cache, &page, 1);
}

Test(kv_cache, never_hands_out_a_held_page)
{
    enum { PAGES = 37, HOLDERS = 8, MAX_HELD = 12 };
    qv_kv_cache *cache;
    cr_assert_eq(qv_kv_cache_new(PAGES, 16, &cache), QV_OK);
    qv_rng rng = qv_rng_seed(7);
    int32_t held[HOLDERS][MAX_HELD], n_held[HOLDERS] = {0}, owner[PAGES];
    memset(owner, -1, sizeof owner);
    for (int round = 0; round < 20000; round++) {
        int who = (int)qv_rng_range(&rng, 0, HOLDERS);
        int n = (int)qv_rng_range(&rng, 0, 5);
        if (qv_rng_uniform(&rng) < 0.5 && n_held[who] + n <= MAX_HELD) {
            int32_t *pages = held[who] + n_held[who];
            if (!qv_kv_cache_acquire(cache, n, pages))
                continue;
            for (int i = 0; i < n; i++) {
                cr_assert_eq(owner[pages[i]], -1, "page %d is held by %d", pages[i],
                             owner[pages[i]]);
                owner[pages[i]] = who;
            }
            n_held[who] += n;
        } else if (n <= n_held[who]) {
            n_held[who] -= n;
            for (int i = 0; i < n; i++)
                owner[held[who][n_held[who] + i]] = -1;
            qv_kv_cache_release(cache, held[who] + n_held[who], n);
        }
    }
    int32_t total = 0;
    for (int who = 0; who < HOLDERS; who++)
        total += n_held[who];
    cr_assert_eq(qv_kv_cache_n_free(cache), PAGES - total);
    qv_kv_cache_free(cache);
}

/* --- State slots ----------------------------------------------------------------------------- */

Test(state_cache, hands_out_each_slot_once)
{
    qv_state_cache *cache;
    cr_assert_eq(qv_state_cache_new(3, 0, &cache), QV_OK);
    cr_assert_eq(qv_state_cache_acquire(cache), 0);
    cr_assert_eq(qv_state_cache_acquire(cache), 1);
    cr_assert_eq(qv_state_cache_acquire(cache), 2);
    cr_assert_eq(qv_state_cache_acquire(cache), -1);
    qv_state_cache_release(cache, 1);
    cr_assert_eq(qv_state_cache_n_free(cache), 1);
    cr_assert_eq(qv_state_cache_acquire(cache), 1);
    qv_state_cache_free(cache);
}

Test(state_cache, stops_the_process_on_a_double_release, .signal = SIGABRT)
{
    qv_state_cache *cache;
    cr_assert_eq(qv_state_cache_new(2, 0, &cache), QV_OK);
    qv_state_cache_release(cache, 0);
}

Test(state_cache, keeps_snapshots_within_the_budget)
{
    qv_state_cache *cache;
    cr_assert_eq(qv_state_cache_new(2, 1000, &cache), QV_OK);
    qv_snapshot *a = qv_state_cache_save(cache, 600, 32, 2);
    cr_assert_not_null(a);
    cr_assert_eq((uintptr_t)a->data % 64, 0);
    memset(a->data, 1, a->bytes);
    cr_assert_eq(a->n_tokens, 32);
    cr_assert_null(qv_state_cache_save(cache, 401, 1, 1), "401 more than 400 left");
    qv_snapshot *b = qv_state_cache_save(cache, 400, 1, 1);
    cr_assert_not_null(b);
    cr_assert_eq(qv_state_cache_swapped(cache), 1000);
    qv_state_cache_drop(cache, a);
    qv_state_cache_drop(cache, b);
    qv_state_cache_drop(cache, NULL);
    cr_assert_eq(qv_state_cache_swapped(cache), 0);
    qv_state_cache_free(cache);
}

Test(state_cache, keeps_a_shared_snapshot_until_its_last_hold)
{
    qv_state_cache *cache;
    cr_assert_eq(qv_state_cache_new(1, 1000, &cache), QV_OK);
    qv_snapshot *snapshot = qv_state_cache_save(cache, 600, 1, 1);
    cr_assert_eq(qv_state_cache_share(snapshot), snapshot);
    qv_state_cache_drop(cache, snapshot);
    cr_assert_eq(qv_state_cache_swapped(cache), 600, "counted once, and still there");
    qv_state_cache_drop(cache, snapshot);
    cr_assert_eq(qv_state_cache_swapped(cache), 0);
    qv_state_cache_free(cache);
}

Test(state_cache, without_a_budget_saves_nothing)
{
    qv_state_cache *cache;
    cr_assert_eq(qv_state_cache_new(1, 0, &cache), QV_OK);
    cr_assert_null(qv_state_cache_save(cache, 1, 1, 1));
    qv_state_cache_free(cache);
}
