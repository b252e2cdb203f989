/* The adapter cache over a source of its own: loads that the test holds up, fails and counts. */
#include "worker/adapter_cache.h"
#include "worker/scheduler.h"

#include "tests/support.h"

#include <criterion/criterion.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* --- A source ---------------------------------------------------------------------------------
 * A directory "content:rank:bytes" is an adapter with that content; "missing" is not there,
 * "broken" does not parse. While the gate is shut, open waits at it, but for as many as are let
 * through; folders named "slow..." wait at one of their own. */

struct qv_adapter {
    char digest[40];
    int32_t rank;
    uint64_t bytes;
};

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool shut, slow_shut;
    int n_let;        /* may pass the gate although it is shut */
    uint64_t dawdles; /* loaders take their time, drawn from this; 0 = they do not */
    bool install_fails;
    int device_room;        /* adapters that the device has memory for; 0 = as many as slots */
    bool unsettled;         /* stamps say that the files were just written */
    uint64_t generation;    /* of all files: part of their stamps */
    const char *content[2]; /* folder and what is in it now, if it is not what its name says */
    char opened[4096];      /* folders in the order they were read, each with a blank */
    int n_waiting, n_opened, n_closed, n_installs, n_clears;
    char slot[8][40]; /* digest of what is in each slot, "" = cleared */
} source;

/* Between the loaders' steps anything may happen on the engine's side. */
static void dawdle(source *s)
{
    pthread_mutex_lock(&s->lock);
    s->dawdles = s->dawdles * UINT64_C(6364136223846793005) + (s->dawdles != 0);
    long us = (long)(s->dawdles >> 56); /* up to a quarter of a millisecond */
    pthread_mutex_unlock(&s->lock);
    if (us > 64)
        nanosleep(&(struct timespec){.tv_nsec = us * 1000}, NULL);
}

static qv_adapter_stamp source_stamp(void *user, const char *dir)
{
    source *s = user;
    dawdle(s);
    pthread_mutex_lock(&s->lock);
    qv_adapter_stamp out = {.hash = {s->generation}, .settled = !s->unsettled};
    for (const char *c = dir; *c != '\0'; c++)
        out.hash[1] = out.hash[1] * 31 + (uint64_t)*c;
    pthread_mutex_unlock(&s->lock);
    return out;
}

static qv_status source_open(void *user, const char *dir, qv_adapter **out)
{
    source *s = user;
    const char *name = dir;
    pthread_mutex_lock(&s->lock);
    snprintf(s->opened + strlen(s->opened), sizeof s->opened - strlen(s->opened), "%s ", dir);
    s->n_waiting++;
    pthread_cond_broadcast(&s->changed);
    while (strncmp(dir, "slow", 4) == 0 ? s->slow_shut : s->shut && s->n_let == 0)
        pthread_cond_wait(&s->changed, &s->lock);
    s->n_let -= s->n_let > 0;
    s->n_waiting--;
    if (s->content[0] != NULL && strcmp(s->content[0], dir) == 0)
        name = s->content[1];
    pthread_mutex_unlock(&s->lock);
    if (strcmp(name, "missing") == 0)
        return qv_fail(QV_ERR_NOT_FOUND, "%s: no such directory", dir);
    if (strcmp(name, "broken") == 0)
        return qv_fail(QV_ERR_FORMAT, "%s: truncated", dir);
    qv_adapter *adapter = calloc(1, sizeof *adapter);
    adapter->rank = 8;
    adapter->bytes = 100;
    sscanf(name, "%39[^:]:%d:%lu", adapter->digest, &adapter->rank, &adapter->bytes);
    pthread_mutex_lock(&s->lock);
    s->n_opened++;
    pthread_mutex_unlock(&s->lock);
    *out = adapter;
    return QV_OK;
}

static qv_status source_install(void *user, int32_t slot, const qv_adapter *adapter)
{
    source *s = user;
    dawdle(s);
    pthread_mutex_lock(&s->lock);
    s->n_installs++;
    s->slot[slot][0] = '\0';
    int n_held = 1;
    for (int i = 0; i < 8; i++)
        n_held += s->slot[i][0] != '\0';
    bool fails = s->install_fails, full = s->device_room != 0 && n_held > s->device_room;
    if (!full)
        memcpy(s->slot[slot], adapter->digest, sizeof s->slot[slot]);
    pthread_mutex_unlock(&s->lock);
    if (full)
        return qv_fail(QV_ERR_LIMIT, "no memory of the device is left for it");
    return fails ? qv_fail(QV_ERR_DEVICE, "the device is gone") : QV_OK;
}

static qv_status source_clear(void *user, int32_t slot)
{
    source *s = user;
    pthread_mutex_lock(&s->lock);
    s->n_clears++;
    s->slot[slot][0] = '\0';
    pthread_mutex_unlock(&s->lock);
    return QV_OK;
}

static void source_close(void *user, qv_adapter *adapter)
{
    source *s = user;
    pthread_mutex_lock(&s->lock);
    s->n_closed++;
    pthread_mutex_unlock(&s->lock);
    free(adapter);
}

static const char *source_digest(void *user, const qv_adapter *adapter)
{
    (void)user;
    return adapter->digest;
}

static int32_t source_rank(void *user, const qv_adapter *adapter)
{
    (void)user;
    return adapter->rank;
}

static uint64_t source_bytes(void *user, const qv_adapter *adapter)
{
    (void)user;
    return adapter->bytes;
}

/* --- The cache under test -------------------------------------------------------------------- */

typedef struct {
    qv_adapter_phase phase;
    char name[64], digest[40], reason[256];
    qv_code code;
    bool pin;
} event;

typedef struct {
    source source;
    int32_t n_slots;
    uint64_t host_bytes;
    qv_adapter_cache *cache;
    event events[64];
    int n_events;
} world;

static void on_event(void *user, const qv_adapter_event *e)
{
    world *w = user;
    event *out = &w->events[w->n_events++];
    *out = (event){.phase = e->phase, .code = e->code, .pin = e->pin};
    snprintf(out->name, sizeof out->name, "%s", e->name);
    snprintf(out->digest, sizeof out->digest, "%s", e->digest);
    snprintf(out->reason, sizeof out->reason, "%s", e->reason != NULL ? e->reason : "");
}

static world *world_of(int32_t n_slots, uint64_t host_bytes)
{
    world *w = calloc(1, sizeof *w);
    w->n_slots = n_slots;
    w->host_bytes = host_bytes;
    pthread_mutex_init(&w->source.lock, NULL);
    pthread_cond_init(&w->source.changed, NULL);
    qv_adapter_source functions = {
        .stamp = source_stamp,
        .open = source_open,
        .install = source_install,
        .clear = source_clear,
        .close = source_close,
        .digest = source_digest,
        .rank = source_rank,
        .bytes = source_bytes,
        .user = &w->source,
    };
    qv_adapter_cache_options options = {
        .n_slots = n_slots, .host_bytes = host_bytes, .on_event = on_event, .user = w};
    cr_assert_eq(qv_adapter_cache_new(&options, &functions, &w->cache), QV_OK, "%s", qv_error());
    return w;
}

static world *world_new(int32_t n_slots)
{
    return world_of(n_slots, 1000);
}

static qv_adapter_stats stats(const world *w)
{
    qv_adapter_stats out;
    qv_adapter_cache_get_stats(w->cache, &out);
    return out;
}

/* Every adapter that was opened is closed. */
static void world_free(world *w)
{
    cr_expect_eq(stats(w).refs, 0);
    qv_adapter_cache_free(w->cache);
    cr_expect_eq(w->source.n_opened, w->source.n_closed);
    pthread_mutex_destroy(&w->source.lock);
    pthread_cond_destroy(&w->source.changed);
    free(w);
}

static void shut_gate(world *w, bool shut)
{
    pthread_mutex_lock(&w->source.lock);
    w->source.shut = shut;
    pthread_cond_broadcast(&w->source.changed);
    pthread_mutex_unlock(&w->source.lock);
}

/* Wait until n readers stand at the gate. */
static void await_readers(world *w, int n)
{
    pthread_mutex_lock(&w->source.lock);
    while (w->source.n_waiting - w->source.n_let < n)
        pthread_cond_wait(&w->source.changed, &w->source.lock);
    pthread_mutex_unlock(&w->source.lock);
}

static void await_gate(world *w)
{
    await_readers(w, 1);
}

/* Let one reader through the gate. */
static void let_one_pass(world *w)
{
    pthread_mutex_lock(&w->source.lock);
    w->source.n_let = 1;
    pthread_cond_broadcast(&w->source.changed);
    pthread_mutex_unlock(&w->source.lock);
}

/* Whether a folder was opened by now. */
static bool is_opened(world *w, const char *dir_and_blank)
{
    pthread_mutex_lock(&w->source.lock);
    bool is = strstr(w->source.opened, dir_and_blank) != NULL;
    pthread_mutex_unlock(&w->source.lock);
    return is;
}

static void poll_once(world *w)
{
    struct pollfd pfd = {.fd = qv_adapter_cache_fd(w->cache), .events = POLLIN};
    if (!qv_adapter_cache_has_results(w->cache))
        cr_assert_eq(poll(&pfd, 1, 10000), 1, "the loader has no news");
    bool changed;
    cr_assert_eq(qv_adapter_cache_poll(w->cache, &changed), QV_OK, "%s", qv_error());
}

static void await_events(world *w, int n)
{
    while (w->n_events < n)
        poll_once(w);
}

static void await_state(world *w, int32_t slot, qv_slot_state state)
{
    while (qv_adapter_cache_slot_state(w->cache, slot) != state)
        poll_once(w);
}

static qv_status acquire(world *w, const char *name, qv_adapter_version **out, qv_code *code)
{
    return qv_adapter_cache_acquire(w->cache, qv_str_from(name), out, code);
}

static qv_adapter_version *must_acquire(world *w, const char *name)
{
    qv_adapter_version *version = NULL;
    qv_code code;
    cr_assert_eq(acquire(w, name, &version, &code), QV_OK, "%s", qv_error());
    return version;
}

static bool is_lost(const qv_adapter_version *version)
{
    qv_code code;
    const char *reason;
    return qv_adapter_version_is_lost(version, &code, &reason);
}

static bool is_any_moving(const world *w)
{
    for (int32_t slot = 0; slot < w->n_slots; slot++)
        if (qv_adapter_cache_slot_state(w->cache, slot) == QV_SLOT_LOADING ||
            qv_adapter_cache_slot_state(w->cache, slot) == QV_SLOT_EVICTING)
            return true;
    return false;
}

/* Enter a version, waiting for its slot. */
static int32_t must_enter(world *w, qv_adapter_version *version)
{
    int32_t slot;
    while ((slot = qv_adapter_cache_enter(w->cache, version, true)) == QV_NO_SLOT_YET ||
           (slot == QV_NO_SLOT_FREE && is_any_moving(w)))
        poll_once(w);
    cr_assert_geq(slot, 0);
    cr_assert_str_eq(w->source.slot[slot], qv_adapter_version_digest(version));
    return slot;
}

static void must_load(world *w, const char *name, const char *dir)
{
    int n = w->n_events;
    cr_assert_eq(qv_adapter_cache_load(w->cache, name, dir, false), QV_OK, "%s", qv_error());
    await_events(w, n + 1);
    cr_assert_eq(w->events[n].phase, QV_ADAPTER_READY, "%s", w->events[n].reason);
}

/* --- Slots as a state machine ---------------------------------------------------------------- */

/* By load, loaded, failed, pin, unpin, evict, cleared. */
static const int expected[QV_SLOT_STATE_COUNT][QV_SLOT_EVENT_COUNT] = {
    [QV_SLOT_EMPTY] = {QV_SLOT_LOADING, -1, -1, -1, -1, -1, -1},
    [QV_SLOT_LOADING] = {-1, QV_SLOT_READY, QV_SLOT_EMPTY, -1, -1, -1, -1},
    [QV_SLOT_READY] = {-1, -1, -1, QV_SLOT_PINNED, -1, QV_SLOT_EVICTING, -1},
    [QV_SLOT_PINNED] = {-1, -1, -1, -1, QV_SLOT_READY, -1, -1},
    [QV_SLOT_EVICTING] = {QV_SLOT_LOADING, -1, -1, -1, -1, -1, QV_SLOT_EMPTY},
};

Test(adapter_slot, takes_every_edge_and_no_other)
{
    for (int state = 0; state < QV_SLOT_STATE_COUNT; state++)
        for (int e = 0; e < QV_SLOT_EVENT_COUNT; e++)
            cr_expect_eq(qv_slot_next_state(state, e), expected[state][e], "%s on %s",
                         qv_slot_event_name(e), qv_slot_state_name(state));
}

/* --- Loads ----------------------------------------------------------------------------------- */

Test(adapter_cache, loads_and_says_so)
{
    world *w = world_new(2);
    must_load(w, "a", "A:16");
    cr_assert_str_eq(w->events[0].name, "a");
    cr_assert_str_eq(w->events[0].digest, "A");
    await_state(w, 0, QV_SLOT_READY); /* and is brought into an empty slot without being asked */
    cr_assert_eq(qv_adapter_cache_n_empty(w->cache), 1);
    cr_assert_eq(stats(w).host_bytes, 100);
    world_free(w);
}

Test(adapter_cache, says_why_a_load_failed)
{
    static const struct {
        const char *dir;
        qv_code code;
        const char *words;
    } rows[] = {
        {"missing", QV_CODE_ADAPTER_NOT_FOUND, "no such directory"},
        {"broken", QV_CODE_ADAPTER_INVALID, "truncated"},
        {"big:8:1001", QV_CODE_ADAPTER_INVALID, "adapter-cache-bytes"},
    };
    world *w = world_new(2);
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(qv_adapter_cache_load(w->cache, "x", rows[i].dir, false), QV_OK);
        await_events(w, i + 1);
        cr_expect_eq(w->events[i].phase, QV_ADAPTER_FAILED);
        cr_expect_eq(w->events[i].code, rows[i].code);
        cr_expect_not_null(strstr(w->events[i].reason, rows[i].words), "%s", w->events[i].reason);
        qv_adapter_version *version;
        qv_code code;
        cr_expect_neq(acquire(w, "x", &version, &code), QV_OK);
        cr_expect_eq(code, rows[i].code);
        cr_expect_not_null(strstr(qv_error(), rows[i].words), "%s", qv_error());
    }
    world_free(w);
}

Test(adapter_cache, refuses_what_cannot_be_loaded)
{
    world *w = world_new(0);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", false), QV_ERR_UNSUPPORTED);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "", "A", false), QV_ERR_ARG);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a b", "A", false), QV_ERR_ARG);
    cr_assert_eq(qv_adapter_cache_unload(w->cache, "a"), QV_ERR_NOT_FOUND);
    qv_adapter_version *version;
    qv_code code;
    cr_assert_eq(acquire(w, "a", &version, &code), QV_ERR_NOT_FOUND);
    cr_assert_eq(code, QV_CODE_ADAPTER_NOT_FOUND);
    world_free(w);
}

Test(adapter_cache, collapses_concurrent_loads_of_one_directory)
{
    world *w = world_new(2);
    shut_gate(w, true);
    static const char *const names[] = {"a", "b", "a", "c"};
    for (int i = 0; i < 4; i++)
        cr_assert_eq(qv_adapter_cache_load(w->cache, names[i], "A", false), QV_OK);
    await_gate(w);
    qv_adapter_version *version;
    qv_code code;
    cr_assert_eq(acquire(w, "b", &version, &code), QV_ERR_BUSY);
    shut_gate(w, false);
    await_events(w, 3);
    cr_assert_eq(w->source.n_opened, 1);
    cr_assert_eq(stats(w).host_bytes, 100);
    world_free(w);
}

Test(adapter_cache, names_with_the_same_content_share_it)
{
    world *w = world_new(4);
    must_load(w, "a", "A:8");
    must_load(w, "b", "A:8:100"); /* another path, the same digest */
    qv_adapter_version *a = must_acquire(w, "a"), *b = must_acquire(w, "b");
    cr_assert_eq(a, b);
    cr_assert_eq(stats(w).host_bytes, 100);
    cr_assert_eq(must_enter(w, a), must_enter(w, b));
    qv_adapter_cache_leave(w->cache, a);
    qv_adapter_cache_leave(w->cache, b);
    qv_adapter_cache_release(w->cache, a);
    qv_adapter_cache_release(w->cache, b);
    world_free(w);
}

/* --- Versions -------------------------------------------------------------------------------- */

Test(adapter_cache, a_replaced_version_lives_until_its_last_request)
{
    world *w = world_new(2);
    must_load(w, "a", "A1");
    qv_adapter_version *old = must_acquire(w, "a");
    int32_t slot = must_enter(w, old);
    must_load(w, "a", "A2");
    qv_adapter_version *new = must_acquire(w, "a");
    cr_assert_str_eq(qv_adapter_version_digest(new), "A2");
    cr_assert_neq(must_enter(w, new), slot);
    cr_assert_str_eq(w->source.slot[slot], "A1", "the old one still runs");
    cr_assert_eq(w->source.n_closed, 0);
    qv_adapter_cache_leave(w->cache, old);
    qv_adapter_cache_release(w->cache, old);
    cr_assert_eq(w->source.n_closed, 1);
    await_state(w, slot, QV_SLOT_EMPTY);
    cr_assert_str_eq(w->source.slot[slot], "");
    qv_adapter_cache_leave(w->cache, new);
    qv_adapter_cache_release(w->cache, new);
    world_free(w);
}

Test(adapter_cache, keeps_the_version_it_has_while_and_if_a_reload_fails)
{
    world *w = world_new(2);
    must_load(w, "a", "A1");
    shut_gate(w, true);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "broken", false), QV_OK);
    await_gate(w);
    qv_adapter_version *during = must_acquire(w, "a");
    shut_gate(w, false);
    await_events(w, 2);
    cr_assert_eq(w->events[1].phase, QV_ADAPTER_FAILED);
    qv_adapter_version *after = must_acquire(w, "a");
    cr_assert_eq(during, after);
    qv_adapter_cache_release(w->cache, during);
    qv_adapter_cache_release(w->cache, after);
    world_free(w);
}

Test(adapter_cache, the_last_of_two_loads_of_a_name_wins)
{
    world *w = world_new(2);
    shut_gate(w, true);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A1", false), QV_OK);
    await_gate(w);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A2", false), QV_OK);
    shut_gate(w, false);
    await_events(w, 1);
    cr_assert_str_eq(w->events[0].digest, "A2");
    while (w->source.n_closed == 0) /* nobody wants A1 any more */
        poll_once(w);
    world_free(w);
}

Test(adapter_cache, an_unloaded_name_refuses_new_requests_and_keeps_old_ones)
{
    world *w = world_new(2);
    must_load(w, "a", "A");
    qv_adapter_version *running = must_acquire(w, "a");
    int32_t slot = must_enter(w, running);
    cr_assert_eq(qv_adapter_cache_unload(w->cache, "a"), QV_OK);
    cr_assert_eq(w->events[1].phase, QV_ADAPTER_UNLOADED);
    qv_adapter_version *version;
    qv_code code;
    cr_assert_eq(acquire(w, "a", &version, &code), QV_ERR_NOT_FOUND);
    cr_assert_str_eq(w->source.slot[slot], "A");
    qv_adapter_cache_leave(w->cache, running);
    cr_assert_eq(must_enter(w, running), slot, "a preempted one may come back to it");
    qv_adapter_cache_leave(w->cache, running);
    qv_adapter_cache_release(w->cache, running);
    await_state(w, slot, QV_SLOT_EMPTY);
    cr_assert_eq(stats(w).host_bytes, 0);
    world_free(w);
}

Test(adapter_cache, unload_while_loading_drops_the_result)
{
    world *w = world_new(2);
    shut_gate(w, true);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", false), QV_OK);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "b", "B", false), QV_OK);
    await_gate(w);
    cr_assert_eq(qv_adapter_cache_unload(w->cache, "a"), QV_OK);
    cr_assert_eq(qv_adapter_cache_unload(w->cache, "b"), QV_OK);
    shut_gate(w, false);
    while (w->source.n_closed < 2)
        poll_once(w);
    cr_assert_eq(w->n_events, 2, "two times unloaded, never ready");
    cr_assert_eq(stats(w).host_bytes, 0);
    world_free(w);
}

Test(adapter_cache, ends_while_the_loader_is_at_work)
{
    world *w = world_new(2);
    shut_gate(w, true);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", false), QV_OK);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "b", "B", false), QV_OK);
    await_gate(w);
    shut_gate(w, false);
    world_free(w);
}

/* --- Slots ----------------------------------------------------------------------------------- */

Test(adapter_cache, takes_the_least_recently_used_slot_that_nobody_runs_on)
{
    world *w = world_new(2);
    must_load(w, "a", "A");
    must_load(w, "b", "B");
    must_load(w, "c", "C");
    qv_adapter_version *a = must_acquire(w, "a"), *b = must_acquire(w, "b"),
                       *c = must_acquire(w, "c");
    int32_t slot_a = must_enter(w, a), slot_b = must_enter(w, b);
    cr_assert_eq(qv_adapter_cache_enter(w->cache, c, false), QV_NO_SLOT_FREE);
    qv_adapter_cache_leave(w->cache, a);
    qv_adapter_cache_leave(w->cache, b);
    must_enter(w, a); /* now b is the least recently used */
    qv_adapter_cache_leave(w->cache, a);
    cr_assert_eq(must_enter(w, c), slot_b);
    qv_adapter_cache_leave(w->cache, c);
    cr_assert_eq(must_enter(w, b), slot_a);
    qv_adapter_cache_leave(w->cache, b);
    cr_assert_eq(w->source.n_opened, 3, "host copies are read once");
    qv_adapter_cache_release(w->cache, a);
    qv_adapter_cache_release(w->cache, b);
    qv_adapter_cache_release(w->cache, c);
    world_free(w);
}

Test(adapter_cache, a_pinned_version_keeps_its_slot_and_one_is_left_for_others)
{
    world *w = world_new(2);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", true), QV_OK);
    await_events(w, 1);
    await_state(w, 0, QV_SLOT_PINNED);
    cr_assert(w->events[0].pin);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "b", "B", true), QV_OK);
    await_events(w, 2);
    cr_assert_eq(w->events[1].phase, QV_ADAPTER_READY);
    cr_assert_not(w->events[1].pin);
    cr_assert_not_null(strstr(w->events[1].reason, "not pinned"), "%s", w->events[1].reason);
    must_load(w, "c", "C");
    qv_adapter_version *b = must_acquire(w, "b"), *c = must_acquire(w, "c");
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(must_enter(w, b), 1);
        qv_adapter_cache_leave(w->cache, b);
        cr_assert_eq(must_enter(w, c), 1);
        qv_adapter_cache_leave(w->cache, c);
    }
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", false), QV_OK); /* no longer pinned */
    await_events(w, 4);
    cr_assert_eq(qv_adapter_cache_slot_state(w->cache, 0), QV_SLOT_READY);
    qv_adapter_cache_release(w->cache, b);
    qv_adapter_cache_release(w->cache, c);
    world_free(w);
}

Test(adapter_cache, brings_a_pinned_version_in_when_a_slot_becomes_free)
{
    world *w = world_new(2);
    must_load(w, "a", "A");
    must_load(w, "b", "B");
    qv_adapter_version *a = must_acquire(w, "a"), *b = must_acquire(w, "b");
    must_enter(w, a);
    int32_t slot_b = must_enter(w, b);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "p", "P", true), QV_OK);
    await_events(w, 3);
    qv_adapter_cache_leave(w->cache, b);
    await_state(w, slot_b, QV_SLOT_PINNED);
    qv_adapter_cache_leave(w->cache, a);
    qv_adapter_cache_release(w->cache, a);
    qv_adapter_cache_release(w->cache, b);
    world_free(w);
}

Test(adapter_cache, a_failed_copy_is_fatal)
{
    world *w = world_new(1);
    w->source.install_fails = true;
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", false), QV_OK);
    bool changed;
    qv_status status = QV_OK;
    while (status == QV_OK) {
        struct pollfd pfd = {.fd = qv_adapter_cache_fd(w->cache), .events = POLLIN};
        poll(&pfd, 1, 1000);
        status = qv_adapter_cache_poll(w->cache, &changed);
    }
    cr_assert_eq(status, QV_ERR_DEVICE);
    cr_assert_not_null(strstr(qv_error(), "the device is gone"));
    world_free(w);
}

/* --- Host memory and disk -------------------------------------------------------------------- */

static void leave_and_release(world *w, qv_adapter_version *version)
{
    qv_adapter_cache_leave(w->cache, version);
    qv_adapter_cache_release(w->cache, version);
}

/* Serve one request, start to end. */
static void serve(world *w, const char *name)
{
    qv_adapter_version *version = must_acquire(w, name);
    must_enter(w, version);
    leave_and_release(w, version);
}

static void overwrite(world *w, const char *dir, const char *content)
{
    pthread_mutex_lock(&w->source.lock);
    w->source.generation++;
    w->source.content[0] = dir;
    w->source.content[1] = content;
    pthread_mutex_unlock(&w->source.lock);
}

Test(adapter_cache, reads_again_what_host_memory_had_no_room_for)
{
    world *w = world_of(2, 300);
    char name[2] = "a", dir[2] = "A";
    for (int i = 0; i < 10; i++, name[0]++, dir[0]++) {
        w->n_events = 0;
        must_load(w, name, dir);
        cr_assert_leq(stats(w).host_bytes, 300);
    }
    cr_assert_eq(stats(w).host_copies, 3);
    for (int round = 0; round < 3; round++)
        for (name[0] = 'a'; name[0] <= 'j'; name[0]++) {
            serve(w, name);
            cr_assert_leq(stats(w).host_bytes, 300);
        }
    int n_opened = w->source.n_opened;
    cr_assert_gt(n_opened, 10);
    for (int round = 0; round < 10; round++) /* three that fit take turns in two slots */
        for (name[0] = 'h'; name[0] <= 'j'; name[0]++)
            serve(w, name);
    cr_assert_eq(w->source.n_opened, n_opened, "no read for what is in host memory");
    world_free(w);
}

Test(adapter_cache, drops_the_copy_that_was_used_longest_ago)
{
    world *w = world_of(1, 300);
    must_load(w, "a", "A");
    must_load(w, "b", "B");
    must_load(w, "c", "C");
    serve(w, "b");
    serve(w, "a");
    must_load(w, "d", "D"); /* C goes */
    w->source.opened[0] = '\0';
    serve(w, "b");
    serve(w, "a");
    cr_assert_str_empty(w->source.opened);
    serve(w, "c");
    cr_assert_str_eq(w->source.opened, "C ");
    world_free(w);
}

Test(adapter_cache, loses_a_version_whose_files_are_no_longer_what_they_were)
{
    static const struct {
        const char *content;
        qv_code code;
        const char *words;
    } rows[] = {
        {"missing", QV_CODE_ADAPTER_NOT_FOUND, "no such directory"},
        {"broken", QV_CODE_ADAPTER_INVALID, "truncated"},
        {"Z", QV_CODE_ADAPTER_INVALID, "have changed since they were loaded"},
    };
    for (int i = 0; i < 3; i++) {
        world *w = world_of(1, 100);
        must_load(w, "a", "A");
        must_load(w, "a2", "A");
        must_load(w, "b", "B");
        serve(w, "b"); /* A is on disk only */
        cr_assert_eq(stats(w).host_copies, 1);
        overwrite(w, "A", rows[i].content);
        w->n_events = 0;
        qv_adapter_version *version = must_acquire(w, "a");
        await_events(w, 2);
        for (int k = 0; k < 2; k++) {
            cr_expect_eq(w->events[k].phase, QV_ADAPTER_FAILED);
            cr_expect_eq(w->events[k].code, rows[i].code);
            cr_expect_str_empty(w->events[k].digest, "the name has no version any more");
            cr_expect_not_null(strstr(w->events[k].reason, rows[i].words), "%s",
                               w->events[k].reason);
        }
        qv_code code;
        const char *reason;
        cr_assert_eq(qv_adapter_cache_n_lost(w->cache), 1);
        cr_assert(qv_adapter_version_is_lost(version, &code, &reason));
        cr_expect_eq(code, rows[i].code);
        cr_expect_not_null(strstr(reason, rows[i].words), "%s", reason);
        qv_adapter_version *other;
        cr_expect_neq(acquire(w, "a", &other, &code), QV_OK, "new requests are refused");
        cr_expect_eq(code, rows[i].code);
        qv_adapter_cache_release(w->cache, version);
        cr_assert_eq(qv_adapter_cache_n_lost(w->cache), 0);
        overwrite(w, "A", "A"); /* and it can be loaded again */
        must_load(w, "a", "A");
        serve(w, "a");
        world_free(w);
    }
}

Test(adapter_cache, keeps_the_last_copy_of_a_replaced_version_while_requests_hold_it)
{
    world *w = world_of(1, 200);
    must_load(w, "a", "A");
    qv_adapter_version *old = must_acquire(w, "a");
    overwrite(w, "A", "A2"); /* in place */
    must_load(w, "a", "A");
    for (int i = 0; i < 3; i++) { /* others want its slot and its memory */
        must_load(w, "b", i % 2 == 0 ? "B" : "C");
        serve(w, "a");
        serve(w, "b");
    }
    cr_assert_eq(must_enter(w, old), 0);
    cr_assert_str_eq(w->source.slot[0], "A");
    leave_and_release(w, old);
    world_free(w);
}

Test(adapter_cache, a_copy_that_waits_for_its_slot_is_not_dropped)
{
    world *w = world_of(1, 100);
    must_load(w, "a", "A");
    must_load(w, "b", "B");
    must_load(w, "c", "C");
    qv_adapter_version *a = must_acquire(w, "a"), *b = must_acquire(w, "b"),
                       *c = must_acquire(w, "c");
    must_enter(w, a); /* and the others must be read, one at a time: there is room for one */
    while (qv_adapter_cache_enter(w->cache, b, false) != QV_NO_SLOT_FREE)
        poll_once(w);
    cr_assert_eq(qv_adapter_cache_enter(w->cache, c, false), QV_NO_SLOT_YET);
    cr_assert_not(qv_adapter_cache_has_results(w->cache));
    leave_and_release(w, a);
    must_enter(w, b);
    leave_and_release(w, b); /* which makes room */
    must_enter(w, c);
    leave_and_release(w, c);
    world_free(w);
}

Test(adapter_cache, does_not_read_a_folder_that_has_not_changed)
{
    world *w = world_new(2);
    must_load(w, "a", "A");
    must_load(w, "b", "A");
    must_load(w, "a", "A");
    cr_assert_eq(w->source.n_opened, 1);
    overwrite(w, "A", "A2");
    must_load(w, "a", "A");
    cr_assert_eq(w->source.n_opened, 2);
    cr_assert_str_eq(w->events[3].digest, "A2");
    w->source.unsettled = true; /* its files may change without a trace */
    overwrite(w, "A", "A3");
    must_load(w, "a", "A");
    must_load(w, "a", "A");
    cr_assert_eq(w->source.n_opened, 4);
    world_free(w);
}

Test(adapter_cache, a_load_that_comes_during_a_read_gets_what_is_there_then)
{
    world *w = world_new(2);
    shut_gate(w, true);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", false), QV_OK);
    await_gate(w);
    pthread_mutex_lock(&w->source.lock); /* what the read finds is decided behind the gate */
    w->source.content[0] = "A";
    w->source.content[1] = "A1";
    pthread_mutex_unlock(&w->source.lock);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "b", "A", false), QV_OK);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", false), QV_OK);
    shut_gate(w, false);
    await_events(w, 2);
    cr_assert_eq(w->source.n_opened, 1, "a look is enough");
    cr_assert_str_eq(w->events[0].digest, "A1");
    cr_assert_str_eq(w->events[1].digest, "A1");

    shut_gate(w, true);
    overwrite(w, "A", "A2");
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", false), QV_OK);
    await_gate(w);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "b", "A", false), QV_OK);
    w->source.unsettled = true;
    shut_gate(w, false);
    await_events(w, 4);
    cr_assert_eq(w->source.n_opened, 2, "before and after are the same, and settled");
    world_free(w);
}

Test(adapter_cache, refuses_files_that_change_while_they_are_read)
{
    world *w = world_new(2);
    shut_gate(w, true);
    cr_assert_eq(qv_adapter_cache_load(w->cache, "a", "A", false), QV_OK);
    await_gate(w);
    overwrite(w, "A", "A2");
    shut_gate(w, false);
    await_events(w, 1);
    cr_assert_eq(w->events[0].phase, QV_ADAPTER_FAILED);
    cr_assert_not_null(strstr(w->events[0].reason, "changed while they were read"), "%s",
                       w->events[0].reason);
    world_free(w);
}

Test(adapter_cache, a_version_is_read_where_a_name_that_is_left_says)
{
    world *w = world_of(1, 100);
    must_load(w, "a", "A");
    must_load(w, "b", "A:8"); /* the same content elsewhere */
    must_load(w, "c", "C");
    cr_assert_eq(qv_adapter_cache_unload(w->cache, "b"), QV_OK);
    serve(w, "c");
    w->source.opened[0] = '\0';
    serve(w, "a");
    cr_assert_str_eq(w->source.opened, "A ");
    world_free(w);
}

Test(adapter_cache, a_version_that_is_gone_from_one_folder_is_read_in_another)
{
    world *w = world_of(1, 100);
    must_load(w, "a", "A");
    must_load(w, "b", "A:8"); /* the same content elsewhere, where it was read last */
    must_load(w, "c", "C");
    serve(w, "c");
    overwrite(w, "A:8", "broken");
    w->n_events = 0;
    serve(w, "a");
    cr_assert_eq(w->n_events, 1);
    cr_assert_str_eq(w->events[0].name, "b");
    cr_assert_eq(w->events[0].phase, QV_ADAPTER_FAILED);
    cr_assert_eq(qv_adapter_cache_n_lost(w->cache), 0);
    world_free(w);
}

Test(adapter_cache, a_version_that_another_name_brought_in_while_its_folder_broke_is_not_lost)
{
    world *w = world_of(1, 300);
    overwrite(w, "slow", "A");
    must_load(w, "a", "slow");
    must_load(w, "c", "C:8:250"); /* leaves no room for the copy of A */
    serve(w, "c");
    w->source.slow_shut = true;
    qv_adapter_version *version = must_acquire(w, "a");
    await_gate(w); /* A is being read again */
    must_load(w, "b", "A");
    must_enter(w, version);
    must_load(w, "d", "D:8:150"); /* the copy goes again, for the slot has it */
    cr_assert_eq(qv_adapter_cache_unload(w->cache, "b"), QV_OK);
    overwrite(w, "slow", "broken");
    int n_events = w->n_events;
    pthread_mutex_lock(&w->source.lock);
    w->source.slow_shut = false;
    pthread_cond_broadcast(&w->source.changed);
    pthread_mutex_unlock(&w->source.lock);
    await_events(w, n_events + 1);
    cr_expect_str_eq(w->events[n_events].name, "a");
    cr_expect_eq(w->events[n_events].phase, QV_ADAPTER_FAILED);
    cr_expect(!is_lost(version), "the request that holds it goes on");
    cr_expect_eq(qv_adapter_cache_n_lost(w->cache), 0);
    leave_and_release(w, version);
    world_free(w);
}

Test(adapter_cache, a_slow_folder_holds_up_nobody_else)
{
    world *w = world_of(1, 200);
    must_load(w, "a", "A");
    must_load(w, "b", "B");
    w->source.slow_shut = true;
    cr_assert_eq(qv_adapter_cache_load(w->cache, "s", "slow", false), QV_OK);
    await_gate(w);
    serve(w, "b"); /* from host memory */
    must_load(w, "c", "C");
    serve(w, "c");
    serve(w, "a"); /* from disk */
    pthread_mutex_lock(&w->source.lock);
    w->source.slow_shut = false;
    pthread_cond_broadcast(&w->source.changed);
    pthread_mutex_unlock(&w->source.lock);
    await_events(w, 4);
    world_free(w);
}

Test(adapter_cache, what_a_request_waits_for_is_read_before_what_none_does)
{
    world *w = world_of(1, 100);
    must_load(w, "a", "A");
    must_load(w, "b", "B");
    shut_gate(w, true);
    char name[8], dir[8];
    for (int i = 0; i < 20; i++) {
        snprintf(name, sizeof name, "n%d", i);
        snprintf(dir, sizeof dir, "N%d", i);
        cr_assert_eq(qv_adapter_cache_load(w->cache, name, dir, false), QV_OK);
    }
    await_readers(w, 2);
    w->n_events = 0;
    qv_adapter_version *a = must_acquire(w, "a"), *b = must_acquire(w, "b"), *version;
    qv_code code;
    cr_assert_eq(acquire(w, "n19", &version, &code), QV_ERR_BUSY);
    /* One reader at a time, and only when the other stands there too: the order in which they come
     * is then the order in which they were sent, but for one. */
    while (!is_opened(w, "N19 ")) {
        uint64_t n_begun = stats(w).reads;
        let_one_pass(w);
        while (stats(w).reads == n_begun)
            poll_once(w);
        await_readers(w, 2);
    }
    shut_gate(w, false);
    await_events(w, 20);
    int n_before = 0;
    for (const char *c = w->source.opened; strncmp(c, "N19 ", 4) != 0; c++)
        n_before += *c == ' ';
    cr_assert_leq(n_before, 7, "%s", w->source.opened); /* a, b, b again, two in hand, two by age */
    qv_adapter_cache_release(w->cache, a);
    qv_adapter_cache_release(w->cache, b);
    world_free(w);
}

Test(adapter_cache, leaves_slots_that_queued_requests_want_unless_one_has_waited_long)
{
    world *w = world_new(2);
    must_load(w, "a", "A");
    must_load(w, "b", "B");
    must_load(w, "c", "C");
    qv_adapter_version *a = must_acquire(w, "a"), *b = must_acquire(w, "b"),
                       *c = must_acquire(w, "c");
    await_state(w, 0, QV_SLOT_READY);
    await_state(w, 1, QV_SLOT_READY);
    cr_assert_eq(qv_adapter_cache_enter(w->cache, c, false), QV_NO_SLOT_FREE);
    cr_assert_not(qv_adapter_cache_prefetch(w->cache, c));
    qv_adapter_cache_release(w->cache, b); /* nobody wants it now, though it was used last */
    must_enter(w, a);
    qv_adapter_cache_leave(w->cache, a);
    cr_assert(qv_adapter_cache_prefetch(w->cache, c));
    int32_t slot_c = must_enter(w, c);
    cr_assert_eq(slot_c, 1);
    b = must_acquire(w, "b");
    cr_assert_eq(qv_adapter_cache_enter(w->cache, b, false), QV_NO_SLOT_FREE);
    cr_assert_eq(qv_adapter_cache_enter(w->cache, b, true), QV_NO_SLOT_YET);
    cr_assert_eq(must_enter(w, b), 0);
    leave_and_release(w, b);
    leave_and_release(w, c);
    qv_adapter_cache_release(w->cache, a);
    world_free(w);
}

Test(adapter_cache, counts_where_adapters_were_when_requests_came)
{
    world *w = world_of(1, 100);
    must_load(w, "a", "A");
    await_state(w, 0, QV_SLOT_READY); /* so that its copy may go */
    must_load(w, "b", "B");
    serve(w, "b"); /* from host memory */
    serve(w, "b"); /* in its slot */
    serve(w, "a"); /* from disk */
    qv_adapter_stats s = stats(w);
    cr_assert_eq(s.host_hits, 1);
    cr_assert_eq(s.slot_hits, 1);
    cr_assert_eq(s.misses, 1);
    world_free(w);
}

Test(adapter_cache, holds_thousands_of_names_in_little_memory)
{
    enum { N = 2000 };
    world *w = world_of(4, 1000);
    char name[16], dir[16];
    for (int i = 0; i < N; i++) {
        w->n_events = 0;
        snprintf(name, sizeof name, "n%d", i);
        snprintf(dir, sizeof dir, "N%d", i);
        must_load(w, name, dir);
    }
    cr_assert_eq(stats(w).n_names, N);
    cr_assert_eq(stats(w).n_versions, N);
    cr_assert_leq(stats(w).host_bytes, 1000);
    for (int i = 0; i < N; i += 61) {
        snprintf(name, sizeof name, "n%d", i);
        serve(w, name);
    }
    for (int i = 0; i < N; i++) {
        w->n_events = 0;
        snprintf(name, sizeof name, "n%d", i);
        cr_assert_eq(qv_adapter_cache_unload(w->cache, name), QV_OK);
    }
    cr_assert_eq(stats(w).n_versions, 0);
    world_free(w);
}

Test(adapter_cache, an_adapter_that_the_device_has_no_memory_for_waits_for_others_to_go)
{
    world *w = world_new(3);
    w->source.device_room = 1;
    must_load(w, "a", "A");
    await_state(w, 0, QV_SLOT_READY);
    must_load(w, "b", "B"); /* idle adapters give way */
    serve(w, "b");
    serve(w, "a");
    qv_adapter_version *a = must_acquire(w, "a"), *b = must_acquire(w, "b");
    must_enter(w, a);
    int32_t slot;
    while ((slot = qv_adapter_cache_enter(w->cache, b, true)) == QV_NO_SLOT_YET)
        poll_once(w);
    cr_assert_eq(slot, QV_NO_SLOT_FREE);
    int n_installs = w->source.n_installs;
    cr_assert_eq(qv_adapter_cache_enter(w->cache, b, true), QV_NO_SLOT_FREE);
    cr_assert_eq(w->source.n_installs, n_installs, "it is not tried in vain");
    leave_and_release(w, a);
    must_enter(w, b);
    leave_and_release(w, b);

    w->n_events = 0;
    cr_assert_eq(qv_adapter_cache_unload(w->cache, "a"), QV_OK);
    cr_assert_eq(qv_adapter_cache_unload(w->cache, "b"), QV_OK);
    while (qv_adapter_cache_n_empty(w->cache) < 3)
        poll_once(w);
    w->source.device_room = -1; /* and one that does not fit alone says so */
    cr_assert_eq(qv_adapter_cache_load(w->cache, "c", "C", false), QV_OK);
    await_events(w, 4);
    cr_assert_eq(w->events[2].phase, QV_ADAPTER_READY);
    cr_assert_eq(w->events[3].phase, QV_ADAPTER_FAILED);
    cr_assert_not_null(strstr(w->events[3].reason, "no memory of the device"), "%s",
                       w->events[3].reason);
    cr_assert_eq(stats(w).n_versions, 0);
    world_free(w);
}

/* --- Everything at once ---------------------------------------------------------------------- */

Test(adapter_cache, keeps_its_counts_on_drawn_events)
{
    enum { HELD = 24 };
    static const char *const names[] = {"a", "b", "c", "d", "e"};
    static const char *const dirs[] = {"A", "B", "C", "D", "E", "F", "missing", "broken"};
    for (uint64_t seed = 0; seed < 30; seed++) {
        qv_rng rng = qv_rng_seed(seed);
        int32_t n_slots = (int32_t)qv_rng_range(&rng, 1, 5);
        world *w = world_of(n_slots, (uint64_t)qv_rng_range(&rng, 1, 8) * 100);
        struct {
            qv_adapter_version *version;
            bool running;
        } held[HELD] = {0};
        w->source.unsettled = seed % 2 == 0;
        w->source.dawdles = seed % 3;
        for (int i = 0; i < 400; i++) {
            int h = (int)qv_rng_range(&rng, 0, HELD);
            const char *name = names[qv_rng_range(&rng, 0, 5)];
            w->n_events = 0;
            if (qv_rng_uniform(&rng) < 0.02) { /* the files of one folder are overwritten */
                pthread_mutex_lock(&w->source.lock);
                w->source.generation++;
                w->source.content[0] = dirs[qv_rng_range(&rng, 0, 6)];
                w->source.content[1] = dirs[qv_rng_range(&rng, 0, 8)];
                pthread_mutex_unlock(&w->source.lock);
            }
            switch (qv_rng_range(&rng, 0, 7)) {
            case 0:
                cr_assert_eq(qv_adapter_cache_load(w->cache, name, dirs[qv_rng_range(&rng, 0, 8)],
                                                   qv_rng_uniform(&rng) < 0.3),
                             QV_OK);
                break;
            case 1:
                if (qv_rng_uniform(&rng) < 0.3)
                    qv_adapter_cache_unload(w->cache, name);
                break;
            case 2: {
                qv_code code;
                if (held[h].version == NULL && acquire(w, name, &held[h].version, &code) != QV_OK)
                    held[h].version = NULL;
                break;
            }
            case 3:
                if (held[h].version != NULL && !held[h].running && !is_lost(held[h].version))
                    held[h].running = qv_adapter_cache_enter(w->cache, held[h].version,
                                                             qv_rng_uniform(&rng) < 0.5) >= 0;
                break;
            case 4:
                if (held[h].running)
                    qv_adapter_cache_leave(w->cache, held[h].version);
                held[h].running = false;
                break;
            case 5:
                if (held[h].version != NULL && !held[h].running) {
                    qv_adapter_cache_release(w->cache, held[h].version);
                    held[h].version = NULL;
                }
                break;
            default: {
                bool changed;
                cr_assert_eq(qv_adapter_cache_poll(w->cache, &changed), QV_OK);
            }
            }
            cr_assert_leq(stats(w).host_bytes, w->host_bytes);
            int32_t n_pinned = 0;
            for (int32_t s = 0; s < n_slots; s++)
                n_pinned += qv_adapter_cache_slot_state(w->cache, s) == QV_SLOT_PINNED;
            cr_assert_lt(n_pinned, n_slots > 1 ? n_slots : 1);
        }
        for (int h = 0; h < HELD; h++)
            if (held[h].version != NULL) {
                if (held[h].running)
                    qv_adapter_cache_leave(w->cache, held[h].version);
                qv_adapter_cache_release(w->cache, held[h].version);
            }
        w->n_events = 0;
        for (int i = 0; i < 5; i++)
            qv_adapter_cache_unload(w->cache, names[i]);
        w->n_events = 0;
        while (qv_adapter_cache_n_empty(w->cache) < n_slots || stats(w).host_bytes > 0)
            poll_once(w);
        world_free(w);
    }
}
