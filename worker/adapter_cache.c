#include "worker/adapter_cache.h"

#include "common/clock.h"
#include "common/map.h"
#include "worker/scheduler.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- Types ----------------------------------------------------------------------------------- */

/* One directory being read, for one or more names. */
typedef struct load {
    struct load *next;
    char *dir;
    uint64_t start_ms;
    bool pushed; /* the loader has it */
    qv_loader_job job;
} load;

/* One content. Lives while a name, a request or a slot being filled needs it. */
struct qv_adapter_version {
    struct qv_adapter_version *prev, *next;
    qv_adapter *adapter;
    const char *digest; /* the adapter's */
    int32_t rank;
    uint64_t bytes;
    int32_t n_names; /* names that point at it */
    int32_t n_pins;  /* of those, names that pin it */
    int32_t refs;    /* requests that hold it */
    int32_t users;   /* running sequences that hold its slot */
    int32_t slot;    /* -1 = none */
};

typedef struct {
    qv_slot_state state;
    qv_adapter_version *version; /* LOADING, READY, PINNED */
    uint64_t last_used;
    qv_loader_job job;
} cache_slot;

/* One name. */
typedef struct {
    const char *name; /* the map's key */
    char *dir;        /* of the version; while there is none, of the load */
    char *reason;     /* why the last load failed, or why it is not pinned; NULL = it is as asked */
    qv_adapter_version *version; /* NULL until the first load has ended well */
    load *load;                  /* in progress; NULL = none */
    qv_code code;                /* of the failure */
    bool want_pin;               /* asked for */
    bool pinned;                 /* counted in version->n_pins */
    uint64_t load_ms;
} adapter_name;

struct qv_adapter_cache {
    qv_adapter_cache_options options;
    qv_adapter_source source;
    qv_map *names;                /* of adapter_name */
    qv_adapter_version *versions; /* list, newest first */
    cache_slot *slots;            /* [n_slots] */
    load *loads;                  /* oldest first; at most the first is pushed */
    uint64_t ticks;               /* orders uses of slots */
    uint64_t host_bytes;

    qv_adapter_loader *loader;
};

/* --- Slots ----------------------------------------------------------------------------------- */

static void apply(cache_slot *sl, qv_slot_event event)
{
    int next = qv_slot_next_state(sl->state, event);
    QV_ASSERT(next >= 0);
    sl->state = (qv_slot_state)next;
}

/* Take a slot from its version, on which nobody runs. */
static void evict(cache_slot *sl)
{
    QV_ASSERT(sl->version->users == 0);
    apply(sl, QV_SLOT_EVICT);
    sl->version->slot = -1;
    sl->version = NULL;
}

/* Start to copy a version into a slot that is EMPTY or EVICTING. */
static void fill(qv_adapter_cache *cache, cache_slot *sl, qv_adapter_version *version)
{
    apply(sl, QV_SLOT_LOAD);
    sl->version = version;
    sl->last_used = ++cache->ticks;
    version->slot = (int32_t)(sl - cache->slots);
    sl->job = (qv_loader_job){
        .kind = QV_LOADER_INSTALL, .slot = version->slot, .adapter = version->adapter, .owner = sl};
    qv_adapter_loader_push(cache->loader, &sl->job);
}

static cache_slot *find_empty(qv_adapter_cache *cache)
{
    for (int32_t i = 0; i < cache->options.n_slots; i++)
        if (cache->slots[i].state == QV_SLOT_EMPTY)
            return &cache->slots[i];
    return NULL;
}

/* The least recently used slot that may be taken. */
static cache_slot *find_idle(qv_adapter_cache *cache)
{
    cache_slot *best = NULL;
    for (int32_t i = 0; i < cache->options.n_slots; i++) {
        cache_slot *sl = &cache->slots[i];
        if (sl->state == QV_SLOT_READY && sl->version->users == 0 &&
            (best == NULL || sl->last_used < best->last_used))
            best = sl;
    }
    return best;
}

/* Find the version a slot: an empty one, or with `may_evict` one that nobody uses. */
static bool bring_in(qv_adapter_cache *cache, qv_adapter_version *version, bool may_evict)
{
    cache_slot *sl = find_empty(cache);
    if (sl == NULL && may_evict && (sl = find_idle(cache)) != NULL)
        evict(sl);
    if (sl != NULL)
        fill(cache, sl, version);
    return sl != NULL;
}

/* Pinned versions that found no slot yet try again. */
static void bring_in_pinned(qv_adapter_cache *cache)
{
    for (qv_adapter_version *v = cache->versions; v != NULL; v = v->next)
        if (v->n_pins > 0 && v->slot < 0 && !bring_in(cache, v, true))
            return;
}

/* --- Versions -------------------------------------------------------------------------------- */

static void version_free(qv_adapter_cache *cache, qv_adapter_version *version)
{
    *(version->prev != NULL ? &version->prev->next : &cache->versions) = version->next;
    if (version->next != NULL)
        version->next->prev = version->prev;
    cache->host_bytes -= version->bytes;
    cache->source.close(cache->source.user, version->adapter);
    free(version);
}

/* Give up what nobody wants: clear its slot, free its host copy. A slot that is being filled is
 * waited for. */
static void version_settle(qv_adapter_cache *cache, qv_adapter_version *version)
{
    if (version->n_names > 0 || version->refs > 0)
        return;
    if (version->slot >= 0) {
        cache_slot *sl = &cache->slots[version->slot];
        if (sl->state == QV_SLOT_LOADING)
            return;
        evict(sl);
        sl->job = (qv_loader_job){
            .kind = QV_LOADER_CLEAR, .slot = (int32_t)(sl - cache->slots), .owner = sl};
        qv_adapter_loader_push(cache->loader, &sl->job);
    }
    version_free(cache, version);
}

static qv_adapter_version *version_find(const qv_adapter_cache *cache, const char *digest)
{
    for (qv_adapter_version *v = cache->versions; v != NULL; v = v->next)
        if (strcmp(v->digest, digest) == 0)
            return v;
    return NULL;
}

/* The version of an adapter that was just read, which is taken over: one that is there already, or
 * a new one. Errors: LIMIT, NOMEM (the adapter is closed). */
static qv_status version_require(qv_adapter_cache *cache, qv_adapter *adapter,
                                 qv_adapter_version **out)
{
    const qv_adapter_source *source = &cache->source;
    *out = version_find(cache, source->digest(source->user, adapter));
    if (*out != NULL) {
        source->close(source->user, adapter);
        return QV_OK;
    }
    uint64_t bytes = source->bytes(source->user, adapter);
    if (bytes > cache->options.host_bytes - cache->host_bytes) {
        source->close(source->user, adapter);
        return qv_fail(QV_ERR_LIMIT,
                       "needs %llu bytes of host memory, and of the %llu for adapters %llu are "
                       "used: unload some, or raise adapter-cache-bytes",
                       (unsigned long long)bytes, (unsigned long long)cache->options.host_bytes,
                       (unsigned long long)cache->host_bytes);
    }
    qv_adapter_version *version = calloc(1, sizeof *version);
    if (version == NULL) {
        source->close(source->user, adapter);
        return qv_fail(QV_ERR_NOMEM, "no memory for one more adapter");
    }
    *version = (qv_adapter_version){
        .next = cache->versions,
        .adapter = adapter,
        .digest = source->digest(source->user, adapter),
        .rank = source->rank(source->user, adapter),
        .bytes = bytes,
        .slot = -1,
    };
    if (cache->versions != NULL)
        cache->versions->prev = version;
    cache->versions = version;
    cache->host_bytes += bytes;
    *out = version;
    return QV_OK;
}

static int32_t n_pinned_versions(const qv_adapter_cache *cache)
{
    int32_t n = 0;
    for (const qv_adapter_version *v = cache->versions; v != NULL; v = v->next)
        n += v->n_pins > 0;
    return n;
}

/* --- Names ----------------------------------------------------------------------------------- */

static void set_reason(adapter_name *name, const char *reason)
{
    free(name->reason);
    name->reason = reason != NULL ? strdup(reason) : NULL;
}

static void unpin(qv_adapter_cache *cache, adapter_name *name)
{
    if (!name->pinned)
        return;
    name->pinned = false;
    qv_adapter_version *version = name->version;
    if (--version->n_pins == 0 && version->slot >= 0 &&
        cache->slots[version->slot].state == QV_SLOT_PINNED)
        apply(&cache->slots[version->slot], QV_SLOT_UNPIN);
}

/* Pin the name's version as asked, if a slot is left for the others. */
static void pin(qv_adapter_cache *cache, adapter_name *name)
{
    qv_adapter_version *version = name->version;
    int32_t n_pinned = n_pinned_versions(cache);
    if (version->n_pins == 0 && n_pinned + 1 >= cache->options.n_slots) {
        char reason[128];
        snprintf(reason, sizeof reason,
                 "not pinned: %d of %d adapter slots are pinned, and one must stay free for others",
                 n_pinned, cache->options.n_slots);
        set_reason(name, reason);
        return;
    }
    name->pinned = true;
    version->n_pins++;
    if (version->slot >= 0 && cache->slots[version->slot].state == QV_SLOT_READY)
        apply(&cache->slots[version->slot], QV_SLOT_PIN);
}

/* Point a name at a version, or at none (NULL), and let go of what it pointed at. */
static void bind(qv_adapter_cache *cache, adapter_name *name, qv_adapter_version *version)
{
    qv_adapter_version *old = name->version;
    unpin(cache, name);
    name->version = version;
    if (version != NULL) {
        version->n_names++;
        if (name->want_pin)
            pin(cache, name);
        if (version->slot < 0)
            bring_in(cache, version, name->pinned);
    }
    if (old != NULL) {
        old->n_names--;
        version_settle(cache, old);
    }
}

static qv_adapter_event event_of(const adapter_name *name, qv_adapter_phase phase)
{
    const qv_adapter_version *version = name->version;
    return (qv_adapter_event){
        .name = name->name,
        .path = name->dir,
        .digest = version != NULL ? version->digest : "",
        .reason = name->reason,
        .phase = phase,
        .code = name->code,
        .rank = version != NULL ? version->rank : 0,
        .bytes = version != NULL ? version->bytes : 0,
        .load_ms = name->load_ms,
        .pin = name->pinned,
    };
}

static void emit(qv_adapter_cache *cache, const adapter_name *name, qv_adapter_phase phase)
{
    qv_adapter_event event = event_of(name, phase);
    cache->options.on_event(cache->options.user, &event);
}

static void name_free(void *value)
{
    adapter_name *name = value;
    if (name == NULL)
        return;
    free(name->dir);
    free(name->reason);
    free(name);
}

/* --- Loads ----------------------------------------------------------------------------------- */

static void load_free(load *l)
{
    if (l == NULL)
        return;
    free(l->dir);
    free(l);
}

/* Hand the oldest load to the loader. One at a time, so that copies into slots, which sequences
 * wait for, never queue behind more than one file. */
static void push_load(qv_adapter_cache *cache)
{
    load *l = cache->loads;
    if (l == NULL || l->pushed)
        return;
    l->pushed = true;
    l->start_ms = qv_now_ms();
    l->job = (qv_loader_job){.kind = QV_LOADER_OPEN, .dir = l->dir, .owner = l};
    qv_adapter_loader_push(cache->loader, &l->job);
}

/* Drop a load that no name waits for, unless the loader has it: then its result is dropped. */
static void load_settle(qv_adapter_cache *cache, load *l)
{
    QV_MAP_EACH(cache->names, entry)
    if (((adapter_name *)entry->value)->load == l)
        return;
    if (l->pushed)
        return;
    load **link = &cache->loads;
    while (*link != l)
        link = &(*link)->next;
    *link = l->next;
    load_free(l);
}

/* The load of a directory: one that has not ended, or a new one at the end of the line. */
static load *load_require(qv_adapter_cache *cache, const char *dir)
{
    load **link = &cache->loads;
    for (; *link != NULL; link = &(*link)->next)
        if (strcmp((*link)->dir, dir) == 0)
            return *link;
    load *l = calloc(1, sizeof *l);
    if (l == NULL || (l->dir = strdup(dir)) == NULL) {
        load_free(l);
        return NULL;
    }
    return *link = l;
}

static qv_status check_load(const qv_adapter_cache *cache, const char *name, const char *dir)
{
    QV_TRY(qv_adapter_name_check(qv_str_from(name)));
    if (dir[0] == '\0')
        return qv_fail(QV_ERR_ARG, "adapter %s: the path is empty", name);
    if (cache->options.n_slots == 0)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "adapter %s: this worker has no adapter slots (adapter-slots is 0)", name);
    if (qv_map_get_str(cache->names, name) == NULL &&
        qv_map_count(cache->names) >= QV_MAX_ADAPTER_NAMES)
        return qv_fail(QV_ERR_LIMIT, "adapter %s: %d adapters are loaded, which is the limit", name,
                       QV_MAX_ADAPTER_NAMES);
    return QV_OK;
}

static adapter_name *name_require(qv_adapter_cache *cache, const char *text)
{
    qv_map_entry *entry = qv_map_require_str(cache->names, text);
    if (entry == NULL)
        return NULL;
    if (entry->value == NULL) {
        adapter_name *name = calloc(1, sizeof *name);
        if (name == NULL) {
            qv_map_remove_entry(cache->names, entry);
            return NULL;
        }
        name->name = entry->key;
        entry->value = name;
    }
    return entry->value;
}

qv_status qv_adapter_cache_load(qv_adapter_cache *cache, const char *name_text, const char *dir,
                                bool want_pin)
{
    QV_TRY(check_load(cache, name_text, dir));
    load *l = load_require(cache, dir);
    adapter_name *name = l != NULL ? name_require(cache, name_text) : NULL;
    char *copy = name != NULL && name->version == NULL ? strdup(dir) : NULL;
    if (name == NULL || (name->version == NULL && copy == NULL)) {
        if (l != NULL)
            load_settle(cache, l);
        return qv_fail(QV_ERR_NOMEM, "adapter %s: no memory", name_text);
    }
    if (copy != NULL) {
        free(name->dir);
        name->dir = copy;
    }
    load *before = name->load;
    name->load = l;
    name->want_pin = want_pin;
    if (before != NULL && before != l)
        load_settle(cache, before);
    push_load(cache);
    return QV_OK;
}

qv_status qv_adapter_cache_unload(qv_adapter_cache *cache, const char *name_text)
{
    adapter_name *name = qv_map_get_str(cache->names, name_text);
    if (name == NULL)
        return qv_fail(QV_ERR_NOT_FOUND, "adapter %s is not loaded here", name_text);
    set_reason(name, NULL);
    emit(cache, name, QV_ADAPTER_UNLOADED);
    load *l = name->load;
    bind(cache, name, NULL);
    qv_map_remove_str(cache->names, name_text);
    name_free(name);
    if (l != NULL)
        load_settle(cache, l);
    bring_in_pinned(cache);
    return QV_OK;
}

static qv_adapter_phase phase_of(const adapter_name *name)
{
    if (name->version != NULL)
        return QV_ADAPTER_READY;
    return name->load != NULL ? QV_ADAPTER_LOADING : QV_ADAPTER_FAILED;
}

void qv_adapter_cache_each(const qv_adapter_cache *cache,
                           void (*each)(const qv_adapter_event *, void *), void *user)
{
    QV_MAP_EACH(cache->names, entry)
    {
        const adapter_name *name = entry->value;
        qv_adapter_event event = event_of(name, phase_of(name));
        each(&event, user);
    }
}

/* --- Results --------------------------------------------------------------------------------- */

/* A load of this name failed: it keeps the version it has, if any. */
static void fail_name(qv_adapter_cache *cache, adapter_name *name, qv_status status,
                      const char *reason)
{
    name->code = status == QV_ERR_NOT_FOUND ? QV_CODE_ADAPTER_NOT_FOUND
                 : status == QV_ERR_NOMEM   ? QV_CODE_INTERNAL
                                            : QV_CODE_ADAPTER_INVALID;
    set_reason(name, reason);
    emit(cache, name, QV_ADAPTER_FAILED);
}

static void succeed_name(qv_adapter_cache *cache, adapter_name *name, const char *dir,
                         qv_adapter_version *version)
{
    char *copy = strdup(dir);
    if (copy == NULL) {
        fail_name(cache, name, QV_ERR_NOMEM, "no memory");
        return;
    }
    free(name->dir);
    name->dir = copy;
    set_reason(name, NULL);
    bind(cache, name, version);
    emit(cache, name, QV_ADAPTER_READY);
}

/* A directory was read: tell every name that waited for it. */
static void take_load(qv_adapter_cache *cache, load *l)
{
    QV_ASSERT(l == cache->loads);
    cache->loads = l->next;

    qv_status status = l->job.status;
    const char *reason = l->job.reason;
    qv_adapter_version *version = NULL;
    if (status == QV_OK) {
        status = version_require(cache, l->job.adapter, &version);
        reason = qv_error();
    }
    if (version != NULL)
        version->refs++; /* while names come and go */
    uint64_t load_ms = qv_now_ms() - l->start_ms;
    QV_MAP_EACH(cache->names, entry)
    {
        adapter_name *name = entry->value;
        if (name->load != l)
            continue;
        name->load = NULL;
        name->load_ms = load_ms;
        if (status == QV_OK)
            succeed_name(cache, name, l->dir, version);
        else
            fail_name(cache, name, status, reason);
    }
    if (version != NULL)
        qv_adapter_cache_release(cache, version);
    load_free(l);
    push_load(cache);
}

/* A slot was filled or cleared. */
static qv_status take_slot(qv_adapter_cache *cache, cache_slot *sl)
{
    if (sl->job.status != QV_OK)
        return qv_fail(QV_ERR_DEVICE, "adapter slot %d: %s", sl->job.slot, sl->job.reason);
    if (sl->job.kind == QV_LOADER_CLEAR) {
        apply(sl, QV_SLOT_CLEARED);
        return QV_OK;
    }
    apply(sl, QV_SLOT_LOADED);
    if (sl->version->n_pins > 0)
        apply(sl, QV_SLOT_PIN);
    version_settle(cache, sl->version);
    return QV_OK;
}

qv_status qv_adapter_cache_poll(qv_adapter_cache *cache, bool *changed)
{
    *changed = false;
    for (qv_loader_job *job; (job = qv_adapter_loader_pop(cache->loader)) != NULL;) {
        *changed = true;
        if (job->kind == QV_LOADER_OPEN)
            take_load(cache, job->owner);
        else
            QV_TRY(take_slot(cache, job->owner));
    }
    if (*changed)
        bring_in_pinned(cache);
    return QV_OK;
}

int qv_adapter_cache_fd(const qv_adapter_cache *cache)
{
    return qv_adapter_loader_fd(cache->loader);
}

bool qv_adapter_cache_has_results(const qv_adapter_cache *cache)
{
    return qv_adapter_loader_has_results(cache->loader);
}

/* --- Requests and sequences ------------------------------------------------------------------ */

qv_status qv_adapter_cache_acquire(qv_adapter_cache *cache, qv_str text, qv_adapter_version **out,
                                   qv_code *code)
{
    const adapter_name *name = qv_map_get(cache->names, text.data, text.size);
    *code = QV_CODE_ADAPTER_NOT_FOUND;
    if (name == NULL)
        return qv_fail(QV_ERR_NOT_FOUND, "adapter '%.*s' is not loaded here", (int)text.size,
                       text.data);
    if (name->version != NULL) {
        name->version->refs++;
        *out = name->version;
        return QV_OK;
    }
    if (name->load != NULL)
        return qv_fail(QV_ERR_BUSY, "adapter '%s' is being loaded", name->name);
    *code = name->code;
    return qv_fail(name->code == QV_CODE_ADAPTER_NOT_FOUND ? QV_ERR_NOT_FOUND : QV_ERR_FORMAT,
                   "adapter '%s': %s", name->name,
                   name->reason != NULL ? name->reason : "it could not be loaded");
}

void qv_adapter_cache_release(qv_adapter_cache *cache, qv_adapter_version *version)
{
    QV_ASSERT(version->refs > 0);
    version->refs--;
    version_settle(cache, version);
}

const char *qv_adapter_version_digest(const qv_adapter_version *version)
{
    return version->digest;
}

int32_t qv_adapter_cache_enter(qv_adapter_cache *cache, qv_adapter_version *version)
{
    if (version->slot < 0)
        return bring_in(cache, version, true) ? QV_NO_SLOT_YET : QV_NO_SLOT_FREE;
    cache_slot *sl = &cache->slots[version->slot];
    if (sl->state == QV_SLOT_LOADING)
        return QV_NO_SLOT_YET;
    sl->last_used = ++cache->ticks;
    version->users++;
    return version->slot;
}

void qv_adapter_cache_leave(qv_adapter_cache *cache, qv_adapter_version *version)
{
    QV_ASSERT(version->users > 0);
    if (--version->users == 0)
        bring_in_pinned(cache);
}

/* --- Facts ----------------------------------------------------------------------------------- */

qv_slot_state qv_adapter_cache_slot_state(const qv_adapter_cache *cache, int32_t i)
{
    QV_ASSERT(i >= 0 && i < cache->options.n_slots);
    return cache->slots[i].state;
}

int32_t qv_adapter_cache_n_empty(const qv_adapter_cache *cache)
{
    int32_t n = 0;
    for (int32_t i = 0; i < cache->options.n_slots; i++)
        n += cache->slots[i].state == QV_SLOT_EMPTY;
    return n;
}

int64_t qv_adapter_cache_refs(const qv_adapter_cache *cache)
{
    int64_t n = 0;
    for (const qv_adapter_version *v = cache->versions; v != NULL; v = v->next)
        n += v->refs;
    return n;
}

uint64_t qv_adapter_cache_host_bytes(const qv_adapter_cache *cache)
{
    return cache->host_bytes;
}

/* --- Life ------------------------------------------------------------------------------------ */

static qv_status start(qv_adapter_cache *cache)
{
    int32_t n_slots = cache->options.n_slots;
    cache->names = qv_map_new(0);
    cache->slots = calloc((size_t)n_slots + 1, sizeof *cache->slots);
    if (cache->names == NULL || cache->slots == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for %d adapter slots", n_slots);
    /* One job of each slot and one load at most. */
    return qv_adapter_loader_new((size_t)n_slots + 1, &cache->source, &cache->loader);
}

qv_status qv_adapter_cache_new(const qv_adapter_cache_options *options,
                               const qv_adapter_source *source, qv_adapter_cache **out)
{
    qv_adapter_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the adapter cache");
    cache->options = *options;
    cache->source = *source;
    qv_status status = start(cache);
    if (status != QV_OK) {
        qv_adapter_cache_free(cache);
        return status;
    }
    *out = cache;
    return QV_OK;
}

void qv_adapter_cache_free(qv_adapter_cache *cache)
{
    if (cache == NULL)
        return;
    qv_adapter_loader_free(cache->loader);
    qv_map_free(cache->names, name_free);
    for (load *l = cache->loads, *next; l != NULL; l = next) {
        next = l->next;
        load_free(l);
    }
    while (cache->versions != NULL) {
        QV_ASSERT(cache->versions->refs == 0);
        version_free(cache, cache->versions);
    }
    free(cache->slots);
    free(cache);
}
