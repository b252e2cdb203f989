#include "common/arena.h"
#include "common/map.h"
#include "common/ring.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- arena ------------------------------------------------------------------------------------ */

Test(arena, gives_disjoint_aligned_memory)
{
    qv_arena arena;
    qv_arena_init(&arena, 256, 0);
    qv_rng rng = qv_rng_seed(1);
    unsigned char *blocks[500];
    size_t sizes[500];
    for (int i = 0; i < 500; i++) {
        size_t align = (size_t)1 << qv_rng_range(&rng, 0, 9);
        sizes[i] = (size_t)qv_rng_range(&rng, 0, 700);
        blocks[i] = qv_arena_alloc(&arena, sizes[i], align);
        cr_assert_not_null(blocks[i]);
        cr_assert_eq((uintptr_t)blocks[i] % align, 0, "block %d align %zu", i, align);
        memset(blocks[i], i & 0xFF, sizes[i]);
    }
    for (int i = 0; i < 500; i++)
        for (size_t j = 0; j < sizes[i]; j++)
            cr_assert_eq(blocks[i][j], i & 0xFF, "block %d byte %zu", i, j);
    qv_arena_deinit(&arena);
}

Test(arena, works_from_a_zeroed_struct_and_gives_unique_empty_blocks)
{
    qv_arena arena = {0};
    void *a = qv_arena_alloc(&arena, 0, 1), *b = qv_arena_alloc(&arena, 0, 1);
    cr_assert(a != NULL && b != NULL && a != b);
    qv_arena_deinit(&arena);
    cr_assert_eq(qv_arena_held(&arena), 0);
}

Test(arena, repeats_a_step_without_new_memory_after_reset)
{
    qv_arena arena;
    qv_arena_init(&arena, 1024, 0);
    size_t held = 0;
    for (int step = 0; step < 50; step++) {
        /* Small and large blocks in a changing order: large ones leave chunks behind the current.
         */
        for (int i = 0; i < 8; i++) {
            size_t size = (i + step) % 4 == 0 ? 5000 : 700;
            cr_assert_not_null(qv_arena_alloc(&arena, size, 16));
        }
        if (step == 8) /* twice through all orders */
            held = qv_arena_held(&arena);
        if (step > 8)
            cr_assert_eq(qv_arena_held(&arena), held, "step %d", step);
        cr_assert(qv_arena_used(&arena) > 0);
        qv_arena_reset(&arena);
        cr_assert_eq(qv_arena_used(&arena), 0);
    }
    qv_arena_deinit(&arena);
}

Test(arena, refuses_beyond_its_limit_and_serves_again_after_reset)
{
    qv_arena arena;
    qv_arena_init(&arena, 1024, 10000);
    int n = 0;
    while (qv_arena_alloc(&arena, 100, 8) != NULL)
        n++;
    cr_assert(n >= 60 && n <= 100, "%d", n);
    cr_assert_leq(qv_arena_held(&arena), 10000);
    cr_assert_null(qv_arena_alloc(&arena, 20000, 8));
    qv_arena_reset(&arena);
    for (int i = 0; i < n; i++)
        cr_assert_not_null(qv_arena_alloc(&arena, 100, 8));
    qv_arena_deinit(&arena);
}

Test(arena, refuses_sizes_that_overflow)
{
    qv_arena arena = {0};
    volatile size_t half = SIZE_MAX / 2, eighth = SIZE_MAX / 8; /* hidden from the compiler */
    cr_assert_null(qv_arena_calloc(&arena, half, 3, 8));
    cr_assert_null(qv_arena_calloc(&arena, eighth, 8, 8));
    cr_assert_null(qv_arena_strndup(&arena, "", (size_t)-1));
    cr_assert_eq(qv_arena_held(&arena), 0);
    qv_arena_deinit(&arena);
}

Test(arena, zeroes_copies_and_prints)
{
    qv_arena arena;
    qv_arena_init(&arena, 64, 0);
    memset(qv_arena_alloc(&arena, 50, 1), 0xAA, 50);
    qv_arena_reset(&arena);
    const int64_t *zeros = QV_ARENA_ARRAY(&arena, int64_t, 6);
    for (int i = 0; i < 6; i++)
        cr_assert_eq(zeros[i], 0);
    cr_assert_str_eq(qv_arena_strdup(&arena, "hello"), "hello");
    cr_assert_str_eq(qv_arena_strdup(&arena, ""), "");
    cr_assert_str_eq(qv_arena_strndup(&arena, "hello", 4), "hell");
    cr_assert_str_eq(qv_arena_printf(&arena, "%s-%d-%080d", "a", 7, 1) + 70, "00000000000001");
    cr_assert_arr_eq(qv_arena_memdup(&arena, "\0\1\2", 3, 1), "\0\1\2", 3);
    qv_arena_deinit(&arena);
}

Test(arena, rewinds_to_a_mark_and_keeps_what_was_before)
{
    qv_arena arena;
    qv_arena_init(&arena, 128, 0);
    qv_arena_mark empty = qv_arena_get_mark(&arena);
    char *kept = qv_arena_strdup(&arena, "kept");
    qv_arena_mark mark = qv_arena_get_mark(&arena);
    size_t used = qv_arena_used(&arena);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < 20; i++)
            cr_assert_not_null(qv_arena_alloc(&arena, 60, 8));
        qv_arena_rewind(&arena, mark);
        cr_assert_eq(qv_arena_used(&arena), used);
        cr_assert_str_eq(kept, "kept");
    }
    qv_arena_rewind(&arena, empty);
    cr_assert_eq(qv_arena_used(&arena), 0);
    qv_arena_deinit(&arena);
}

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>

Test(arena, poisons_what_is_not_handed_out)
{
    qv_arena arena;
    qv_arena_init(&arena, 1024, 0);
    char *block = qv_arena_alloc(&arena, 10, 1);
    cr_assert(!__asan_address_is_poisoned(block + 9));
    cr_assert(__asan_address_is_poisoned(block + 16));
    char *second = qv_arena_alloc(&arena, 10, 8);
    cr_assert(!__asan_address_is_poisoned(second));
    qv_arena_reset(&arena);
    cr_assert(__asan_address_is_poisoned(block) && __asan_address_is_poisoned(second));
    qv_arena_deinit(&arena);
}
#endif

/* --- map -------------------------------------------------------------------------------------- */

Test(map, finds_what_was_set_and_only_that)
{
    qv_map *map = qv_map_new(0);
    int one, two;
    cr_assert_null(qv_map_get_str(map, "a"));
    cr_assert_eq(qv_map_set_str(map, "a", &one), QV_OK);
    cr_assert_eq(qv_map_set(map, "a\0b", 3, &two), QV_OK);
    cr_assert_eq(qv_map_get_str(map, "a"), &one);
    cr_assert_eq(qv_map_get(map, "a\0b", 3), &two);
    cr_assert_null(qv_map_get(map, "a\0c", 3));
    cr_assert_eq(qv_map_set(map, NULL, 0, &two), QV_OK); /* the empty key is a key */
    cr_assert_eq(qv_map_get_str(map, ""), &two);
    cr_assert_eq(qv_map_count(map), 3);
    cr_assert_eq(qv_map_set_str(map, "a", NULL), QV_OK); /* NULL is a value, seen by find */
    cr_assert_not_null(qv_map_find_str(map, "a"));
    cr_assert_eq(qv_map_count(map), 3);
    cr_assert_null(qv_map_remove_str(map, "absent"));
    cr_assert_eq(qv_map_remove(map, "a\0b", 3), &two);
    cr_assert_null(qv_map_find(map, "a\0b", 3));
    qv_map_free(map, NULL);
}

Test(map, copies_keys_and_terminates_them)
{
    qv_map *map = qv_map_new(0);
    char key[] = "worker-1";
    qv_map_set_str(map, key, key);
    memset(key, 'x', sizeof key);
    cr_assert_str_eq(qv_map_find_str(map, "worker-1")->key, "worker-1");
    qv_map_free(map, NULL);
}

/* The map against a plain array with the same operations. */
Test(map, agrees_with_a_list_over_random_operations)
{
    enum { KEYS = 3000, STEPS = 60000 };
    static uintptr_t values[KEYS]; /* 0 = absent */
    static uint64_t born[KEYS];
    qv_map *map = qv_map_new(0);
    qv_rng rng = qv_rng_seed(7);
    size_t count = 0;
    for (int step = 1; step <= STEPS; step++) {
        uint64_t key = (uint64_t)qv_rng_range(&rng, 0, step < STEPS / 2 ? KEYS : KEYS / 10);
        if (qv_rng_u64(&rng) % 5 < 3) {
            count += values[key] == 0;
            if (values[key] == 0)
                born[key] = (uint64_t)step;
            values[key] = (uintptr_t)step;
            cr_assert_eq(qv_map_set_u64(map, key, (void *)(uintptr_t)step), QV_OK);
        } else {
            cr_assert_eq((uintptr_t)qv_map_remove_u64(map, key), values[key]);
            count -= values[key] != 0;
            values[key] = 0;
        }
        cr_assert_eq(qv_map_count(map), count);
    }
    for (uint64_t key = 0; key < KEYS; key++)
        cr_assert_eq((uintptr_t)qv_map_get_u64(map, key), values[key], "key %" PRIu64, key);
    uint64_t last = 0;
    size_t seen = 0;
    QV_MAP_EACH(map, entry)
    {
        uint64_t key = qv_map_key_u64(entry);
        cr_assert(born[key] > last, "order of insertion at key %" PRIu64, key);
        last = born[key];
        seen++;
    }
    cr_assert_eq(seen, count);
    qv_map_free(map, NULL);
}

Test(map, may_lose_the_current_entry_while_iterating)
{
    qv_map *map = qv_map_new(100);
    for (uint64_t i = 0; i < 100; i++)
        qv_map_set_u64(map, i, malloc(8));
    uint64_t seen = 0;
    QV_MAP_EACH(map, entry)
    {
        cr_assert_eq(qv_map_key_u64(entry), seen++);
        if (seen % 3 == 0)
            free(qv_map_remove_entry(map, entry));
    }
    cr_assert_eq(seen, 100);
    cr_assert_eq(qv_map_count(map), 67);
    QV_MAP_EACH(map, entry)
    cr_assert_neq(qv_map_key_u64(entry) % 3, 2);
    qv_map_clear(map, free);
    cr_assert_eq(qv_map_count(map), 0);
    cr_assert_null(qv_map_first(map));
    cr_assert_not_null(qv_map_require_str(map, "again"));
    qv_map_free(map, free);
    qv_map_free(NULL, free);
}

Test(map, keeps_entries_where_they_are_while_it_grows)
{
    qv_map *map = qv_map_new(0);
    qv_map_entry *first = qv_map_require_u64(map, 0);
    for (uint64_t i = 1; i < 5000; i++)
        qv_map_require_u64(map, i);
    cr_assert_eq(qv_map_find_u64(map, 0), first);
    cr_assert_eq(qv_map_require_u64(map, 0), first);
    qv_map_free(map, NULL);
}

/* --- ring ------------------------------------------------------------------------------------- */

static bool is_readable(int fd)
{
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    return poll(&poller, 1, 0) == 1;
}

Test(ring, keeps_order_and_says_when_it_is_full_or_empty)
{
    qv_ring *ring = NULL;
    cr_assert_eq(qv_ring_new(5, sizeof(int), &ring), QV_OK);
    cr_assert_eq(qv_ring_capacity(ring), 8);
    int out;
    for (int round = 0; round < 20; round++) { /* the counters wrap around the places */
        for (int i = 0; i < 8; i++)
            cr_assert(qv_ring_push(ring, &(int){round * 8 + i}));
        cr_assert(!qv_ring_push(ring, &(int){-1}));
        cr_assert_eq(qv_ring_count(ring), 8);
        for (int i = 0; i < 8; i++) {
            cr_assert(qv_ring_pop(ring, &out));
            cr_assert_eq(out, round * 8 + i);
        }
        cr_assert(!qv_ring_pop(ring, &out));
        cr_assert_eq(qv_ring_count(ring), 0);
    }
    qv_ring_free(ring);
    qv_ring_free(NULL);
}

Test(ring, refuses_sizes_that_are_none)
{
    qv_ring *ring = NULL;
    cr_assert_eq(qv_ring_new(0, 8, &ring), QV_ERR_ARG);
    cr_assert_eq(qv_ring_new(8, 0, &ring), QV_ERR_ARG);
    cr_assert_eq(qv_ring_new(SIZE_MAX, 8, &ring), QV_ERR_ARG);
    cr_assert_eq(qv_ring_new(SIZE_MAX / 4, 64, &ring), QV_ERR_ARG);
}

Test(ring, fd_is_readable_from_the_first_push_until_it_was_popped_empty)
{
    qv_ring *ring = NULL;
    qv_ring_new(8, sizeof(int), &ring);
    int fd = qv_ring_fd(ring), out;
    cr_assert(!is_readable(fd));
    for (int round = 0; round < 3; round++) {
        qv_ring_push(ring, &round);
        qv_ring_push(ring, &round);
        cr_assert(is_readable(fd));
        cr_assert(qv_ring_pop(ring, &out));
        cr_assert(is_readable(fd)); /* one is left */
        cr_assert(qv_ring_pop(ring, &out));
        cr_assert(!qv_ring_pop(ring, &out));
        cr_assert(!is_readable(fd));
    }
    qv_ring_free(ring);
}

Test(ring, wait_ends_by_item_timeout_or_wake)
{
    qv_ring *ring = NULL;
    int out;
    qv_ring_new(8, sizeof(int), &ring);
    cr_assert(!qv_ring_wait(ring, 0));
    uint64_t start = qv_now_ms();
    cr_assert(!qv_ring_wait(ring, 20));
    cr_assert_geq(qv_now_ms() - start, 20);
    qv_ring_wake(ring);
    cr_assert(is_readable(qv_ring_fd(ring)));
    cr_assert(!qv_ring_wait(ring, -1));
    cr_assert(!qv_ring_wait(ring, 0));
    cr_assert(!is_readable(qv_ring_fd(ring)));
    qv_ring_push(ring, &(int){1});
    cr_assert(qv_ring_wait(ring, -1));
    cr_assert(qv_ring_wait(ring, -1)); /* it looks, it does not take */
    cr_assert(qv_ring_pop(ring, &out));
    cr_assert(!qv_ring_wait(ring, 0));
    qv_ring_free(ring);
}

typedef struct {
    qv_ring *there, *back;
    uint64_t n;
    bool polls; /* through the fd rather than qv_ring_wait */
    atomic_bool stop;
} relay;

/* Pop until the relay ends; send each item back. Not NULL: a wake-up was lost. An item is a pointer
 * to memory that the other thread wrote, so that the thread sanitizer sees whether the ring orders
 * it. */
static void *relay_main(void *user)
{
    relay *r = user;
    uint64_t *item;
    for (uint64_t done = 0; done < r->n;) {
        if (qv_ring_pop(r->there, &item)) {
            *item += 1;
            while (!qv_ring_push(r->back, &item))
                sched_yield();
            done++;
        } else if (r->polls) {
            struct pollfd poller = {.fd = qv_ring_fd(r->there), .events = POLLIN};
            if (poll(&poller, 1, 10000) != 1)
                return r; /* an assertion belongs to the main thread */
        } else if (!qv_ring_wait(r->there, 10000)) {
            return r;
        }
    }
    return NULL;
}

static void run_relay(uint64_t n, uint64_t in_flight, bool polls)
{
    relay r = {.n = n, .polls = polls};
    cr_assert_eq(qv_ring_new(16, sizeof(uint64_t *), &r.there), QV_OK);
    cr_assert_eq(qv_ring_new(16, sizeof(uint64_t *), &r.back), QV_OK);
    pthread_t thread;
    cr_assert_eq(pthread_create(&thread, NULL, relay_main, &r), 0);
    uint64_t sent = 0, received = 0;
    while (received < n) {
        if (sent < n && sent - received < in_flight) {
            uint64_t *item = malloc(sizeof *item);
            *item = sent;
            if (qv_ring_push(r.there, &item)) {
                sent++;
                continue;
            }
            free(item);
        }
        uint64_t *item;
        cr_assert(qv_ring_wait(r.back, 10000), "a wake-up was lost after %" PRIu64, received);
        cr_assert(qv_ring_pop(r.back, &item));
        cr_assert_eq(*item, ++received);
        free(item);
    }
    void *lost = NULL;
    pthread_join(thread, &lost);
    cr_assert_null(lost, "a wake-up was lost");
    qv_ring_free(r.there);
    qv_ring_free(r.back);
}

Test(ring, loses_nothing_between_two_threads)
{
    /* One in flight makes both sides sleep all the time; many fill the rings. */
    for (int polls = 0; polls < 2; polls++) {
        run_relay(2000, 1, polls);
        run_relay(20000, 1000, polls);
    }
}

static void *wait_for_wake(void *user)
{
    relay *r = user;
    while (!atomic_load(&r->stop))
        qv_ring_wait(r->there, -1);
    return NULL;
}

Test(ring, wake_stops_a_thread_that_waits_for_ever)
{
    for (int i = 0; i < 200; i++) {
        relay r = {0};
        qv_ring_new(4, sizeof(int), &r.there);
        pthread_t thread;
        pthread_create(&thread, NULL, wait_for_wake, &r);
        atomic_store(&r.stop, true);
        qv_ring_wake(r.there);
        pthread_join(thread, NULL);
        qv_ring_free(r.there);
    }
}
