#include "worker/adapter_cache_internal.h"

#include "common/clock.h"
#include "worker/scheduler.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

/* --- Names ----------------------------------------------------------------------------------- */

static void set_reason(qv_adapter_name *name, const char *reason)
{
    free(name->reason);
    name->reason = reason != NULL ? strdup(reason) : NULL;
}

static void unpin(qv_adapter_cache *cache, qv_adapter_name *name)
{
    if (!name->pinned)
        return;
    name->pinned = false;
    qv_cache_unpin(cache, name->version);
}

/* Pin the name's version as asked, if a slot is left for the others. */
static void pin(qv_adapter_cache *cache, qv_adapter_name *name)
{
    qv_adapter_version *version = name->version;
    if (version->n_pins == 0 && cache->n_pinned + 1 >= cache->options.n_slots) {
        char reason[128];
        snprintf(reason, sizeof reason,
                 "not pinned: %d of %d adapter slots are pinned, and one must stay free for others",
                 cache->n_pinned, cache->options.n_slots);
        set_reason(name, reason);
        return;
    }
    name->pinned = true;
    qv_cache_pin(cache, version);
}

/* A name of the version that led to `dir` is gone: it is read where another name says. */
static void leave_dir(qv_adapter_cache *cache, qv_adapter_version *version, const char *dir)
{
    if (version->n_names == 0 || version->dir == NULL || strcmp(version->dir, dir) != 0)
        return;
    const char *other_dir = NULL;
    QV_MAP_EACH(cache->names, entry)
    {
        const qv_adapter_name *other = entry->value;
        if (other->version != version)
            continue;
        if (strcmp(other->dir, dir) == 0)
            return;
        other_dir = other->dir;
    }
    if (other_dir != NULL)
        qv_cache_move_version(cache, version, other_dir);
}

/* Point a name at a version, or at none (NULL), and let go of what it pointed at at name->dir. */
static void bind(qv_adapter_cache *cache, qv_adapter_name *name, qv_adapter_version *version)
{
    qv_adapter_version *old = name->version;
    unpin(cache, name);
    name->version = version;
    if (version != NULL) {
        version->n_names++;
        if (name->want_pin)
            pin(cache, name);
        if (version->slot < 0 && version->adapter != NULL)
            qv_cache_bring_in(cache, version, name->pinned, name->pinned);
        else if (version->slot < 0 && name->pinned)
            qv_cache_require_copy(cache, version);
    }
    if (old == NULL)
        return;
    old->n_names--;
    if (old != version)
        leave_dir(cache, old, name->dir);
    qv_cache_settle(cache, old);
}

static qv_adapter_event event_of(const qv_adapter_name *name, qv_adapter_phase phase)
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

static void emit(qv_adapter_cache *cache, const qv_adapter_name *name, qv_adapter_phase phase)
{
    qv_adapter_event event = event_of(name, phase);
    cache->options.on_event(cache->options.user, &event);
}

static void name_free(void *value)
{
    qv_adapter_name *name = value;
    if (name == NULL)
        return;
    free(name->dir);
    free(name->reason);
    free(name);
}

/* --- Orders ---------------------------------------------------------------------------------- */

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

static qv_adapter_name *name_require(qv_adapter_cache *cache, const char *text)
{
    qv_map_entry *entry = qv_map_require_str(cache->names, text);
    if (entry == NULL)
        return NULL;
    if (entry->value == NULL) {
        qv_adapter_name *name = calloc(1, sizeof *name);
        if (name == NULL) {
            qv_map_remove_entry(cache->names, entry);
            return NULL;
        }
        name->name = entry->key;
        entry->value = name;
    }
    return entry->value;
}

/* Make a name wait for another read, or for none. */
static void wait_for(qv_adapter_cache *cache, qv_adapter_name *name, qv_adapter_read *read)
{
    qv_adapter_read *before = name->read;
    name->read = read;
    if (read != NULL)
        read->n_names++;
    if (before != NULL) {
        before->n_names--;
        qv_cache_settle_read(cache, before);
    }
}

qv_status qv_adapter_cache_load(qv_adapter_cache *cache, const char *name_text, const char *dir,
                                bool want_pin)
{
    QV_TRY(check_load(cache, name_text, dir));
    qv_adapter_read *read = qv_cache_require_read(cache, dir);
    qv_adapter_name *name = read != NULL ? name_require(cache, name_text) : NULL;
    char *copy = name != NULL && name->version == NULL ? strdup(dir) : NULL;
    if (name == NULL || (name->version == NULL && copy == NULL)) {
        if (read != NULL)
            qv_cache_settle_read(cache, read);
        return qv_fail(QV_ERR_NOMEM, "adapter %s: no memory", name_text);
    }
    if (copy != NULL) {
        free(name->dir);
        name->dir = copy;
    }
    if (name->read != NULL)
        read->wanted |= name->read->wanted && name->version == NULL;
    wait_for(cache, name, read);
    name->want_pin = want_pin;
    qv_cache_start_reads(cache);
    return QV_OK;
}

qv_status qv_adapter_cache_unload(qv_adapter_cache *cache, const char *name_text)
{
    qv_adapter_name *name = qv_map_get_str(cache->names, name_text);
    if (name == NULL)
        return qv_fail(QV_ERR_NOT_FOUND, "adapter %s is not loaded here", name_text);
    set_reason(name, NULL);
    emit(cache, name, QV_ADAPTER_UNLOADED);
    bind(cache, name, NULL);
    wait_for(cache, name, NULL);
    qv_map_remove_str(cache->names, name_text);
    name_free(name);
    qv_cache_bring_in_pinned(cache);
    qv_cache_start_reads(cache);
    return QV_OK;
}

static qv_adapter_phase phase_of(const qv_adapter_name *name)
{
    if (name->version != NULL)
        return QV_ADAPTER_READY;
    return name->read != NULL ? QV_ADAPTER_LOADING : QV_ADAPTER_FAILED;
}

bool qv_adapter_cache_find(const qv_adapter_cache *cache, const char *text, qv_adapter_event *out)
{
    const qv_adapter_name *name = qv_map_get_str(cache->names, text);
    if (name == NULL)
        return false;
    *out = event_of(name, phase_of(name));
    return true;
}

void qv_adapter_cache_each(const qv_adapter_cache *cache,
                           void (*each)(const qv_adapter_event *, void *), void *user)
{
    QV_MAP_EACH(cache->names, entry)
    {
        const qv_adapter_name *name = entry->value;
        qv_adapter_event event = event_of(name, phase_of(name));
        each(&event, user);
    }
}

/* --- Results --------------------------------------------------------------------------------- */

static qv_code code_of_failure(qv_status status)
{
    return status == QV_ERR_NOT_FOUND ? QV_CODE_ADAPTER_NOT_FOUND
           : status == QV_ERR_NOMEM   ? QV_CODE_INTERNAL
                                      : QV_CODE_ADAPTER_INVALID;
}

/* A load of this name failed: it keeps the version it has, if any. */
static void fail_name(qv_adapter_cache *cache, qv_adapter_name *name, qv_status status,
                      const char *reason)
{
    name->code = code_of_failure(status);
    set_reason(name, reason);
    emit(cache, name, QV_ADAPTER_FAILED);
}

static void succeed_name(qv_adapter_cache *cache, qv_adapter_name *name, const char *dir,
                         qv_adapter_version *version)
{
    char *copy = strdup(dir);
    if (copy == NULL) {
        fail_name(cache, name, QV_ERR_NOMEM, "no memory");
        return;
    }
    set_reason(name, NULL);
    bind(cache, name, version);
    free(name->dir);
    name->dir = copy;
    emit(cache, name, QV_ADAPTER_READY);
}

/* A folder was read: tell every name that waited for it. */
static void take_load(qv_adapter_cache *cache, qv_adapter_read *read)
{
    qv_status status = read->job.status;
    const char *reason = read->job.reason;
    qv_adapter_version *version = NULL;
    if (read->job.unchanged) {
        version = qv_map_get_str(cache->by_dir, read->dir);
    } else if (status == QV_OK) {
        status = qv_cache_require_version(cache, read, read->job.adapter, &version);
        reason = qv_error();
    }
    if (version != NULL)
        version->refs++; /* while names come and go */
    uint64_t load_ms = qv_now_ms() - read->start_ms;
    QV_MAP_EACH(cache->names, entry)
    {
        qv_adapter_name *name = entry->value;
        if (read->n_names == 0)
            break;
        if (name->read != read)
            continue;
        name->read = NULL;
        read->n_names--;
        name->load_ms = load_ms;
        if (status == QV_OK)
            succeed_name(cache, name, read->dir, version);
        else
            fail_name(cache, name, status, reason);
    }
    if (version != NULL) {
        version->refs--;
        qv_cache_settle(cache, version);
    }
}

void qv_cache_unload_version(qv_adapter_cache *cache, qv_adapter_version *version, qv_status status,
                             const char *reason)
{
    version->refs++; /* while names go */
    QV_MAP_EACH(cache->names, entry)
    {
        qv_adapter_name *name = entry->value;
        if (name->version != version)
            continue;
        bind(cache, name, NULL);
        fail_name(cache, name, status, reason);
    }
    version->refs--;
    qv_cache_lose_version(cache, version, code_of_failure(status), reason);
}

/* A folder has no longer what a version needs to be read again. Names that point there have nothing
 * now. If one that points elsewhere is left, the version is read there. Else it is lost, unless a
 * name that has gone since brought the same files in from elsewhere while the read went on: then
 * those that hold it have what they need. */
static void take_loss(qv_adapter_cache *cache, qv_adapter_version *version,
                      const qv_adapter_read *read)
{
    const char *other_dir = NULL;
    version->refs++; /* while names go */
    QV_MAP_EACH(cache->names, entry)
    {
        qv_adapter_name *name = entry->value;
        if (name->version != version)
            continue;
        if (strcmp(name->dir, read->dir) != 0) {
            other_dir = name->dir;
            continue;
        }
        bind(cache, name, NULL);
        fail_name(cache, name, read->job.status, read->job.reason);
    }
    version->refs--;
    if (other_dir == NULL) {
        if (version->slot < 0 && version->adapter == NULL)
            qv_cache_lose_version(cache, version, code_of_failure(read->job.status),
                                  read->job.reason);
        else
            qv_cache_settle(cache, version);
        return;
    }
    qv_cache_move_version(cache, version, other_dir);
    if (version->refs > 0 || version->n_pins > 0)
        qv_cache_require_copy(cache, version);
}

/* A reader has come to the end of a read. */
static void take_read(qv_adapter_cache *cache, qv_adapter_read *read)
{
    if (!qv_cache_end_read(cache, read))
        return;
    qv_adapter_version *version = read->version;
    qv_cache_unlink_read(cache, read);
    if (version != NULL) {
        if (!qv_cache_take_copy(cache, read))
            take_loss(cache, version, read);
    } else if (read->n_names > 0) {
        take_load(cache, read);
    } else if (read->job.adapter != NULL) { /* nobody waits for it any more */
        cache->source.close(cache->source.user, read->job.adapter);
    }
    qv_cache_free_read(read);
}

qv_status qv_adapter_cache_poll(qv_adapter_cache *cache, bool *changed)
{
    *changed = false;
    for (int i = 0; i < QV_ADAPTER_READERS; i++)
        for (qv_loader_job *job; (job = qv_adapter_loader_pop(cache->readers[i])) != NULL;) {
            *changed = true;
            take_read(cache, job->owner);
        }
    for (qv_loader_job *job; (job = qv_adapter_loader_pop(cache->copier)) != NULL;) {
        *changed = true;
        QV_TRY(qv_cache_take_slot(cache, job->owner));
    }
    if (*changed) {
        qv_cache_bring_in_pinned(cache);
        qv_cache_start_reads(cache);
    }
    return QV_OK;
}

int qv_adapter_cache_fd(const qv_adapter_cache *cache)
{
    return cache->epoll_fd;
}

bool qv_adapter_cache_has_results(const qv_adapter_cache *cache)
{
    bool any = qv_adapter_loader_has_results(cache->copier);
    for (int i = 0; i < QV_ADAPTER_READERS; i++)
        any = any || qv_adapter_loader_has_results(cache->readers[i]);
    return any;
}

/* --- Requests and sequences ------------------------------------------------------------------ */

/* A request takes a version: where was it? What must be read again begins to be. */
static void hold(qv_adapter_cache *cache, qv_adapter_version *version)
{
    qv_adapter_stats *stats = &cache->stats;
    bool is_in_slot = version->slot >= 0 && cache->slots[version->slot].state != QV_SLOT_LOADING;
    *(is_in_slot                 ? &stats->slot_hits
      : version->adapter != NULL ? &stats->host_hits
                                 : &stats->misses) += 1;
    version->refs++;
    stats->refs++;
    qv_cache_touch(cache, version);
    if (version->slot < 0)
        qv_cache_require_copy(cache, version);
}

qv_status qv_adapter_cache_acquire(qv_adapter_cache *cache, qv_str text, qv_adapter_version **out,
                                   qv_code *code)
{
    const qv_adapter_name *name = qv_map_get(cache->names, text.data, text.size);
    *code = QV_CODE_ADAPTER_NOT_FOUND;
    if (name == NULL)
        return qv_fail(QV_ERR_NOT_FOUND, "adapter '%.*s' is not loaded here", (int)text.size,
                       text.data);
    if (name->version != NULL) {
        hold(cache, name->version);
        *out = name->version;
        return QV_OK;
    }
    if (name->read != NULL) {
        name->read->wanted = true;
        return qv_fail(QV_ERR_BUSY, "adapter '%s' is being loaded", name->name);
    }
    *code = name->code;
    return qv_fail(name->code == QV_CODE_ADAPTER_NOT_FOUND ? QV_ERR_NOT_FOUND : QV_ERR_FORMAT,
                   "adapter '%s': %s", name->name,
                   name->reason != NULL ? name->reason : "it could not be loaded");
}

void qv_adapter_cache_release(qv_adapter_cache *cache, qv_adapter_version *version)
{
    QV_ASSERT(version->refs > 0);
    version->refs--;
    cache->stats.refs--;
    qv_cache_settle(cache, version);
    qv_cache_start_reads(cache); /* a host copy may have to go now, or be able to */
}

const char *qv_adapter_version_digest(const qv_adapter_version *version)
{
    return version->digest;
}

bool qv_adapter_version_is_lost(const qv_adapter_version *version, qv_code *code,
                                const char **reason)
{
    *code = version->code;
    *reason = version->reason != NULL ? version->reason : "its files are gone";
    return version->lost;
}

int32_t qv_adapter_cache_n_lost(const qv_adapter_cache *cache)
{
    return cache->n_lost;
}

int32_t qv_adapter_cache_enter(qv_adapter_cache *cache, qv_adapter_version *version, bool must)
{
    if (version->slot < 0 && version->adapter == NULL) {
        qv_cache_require_copy(cache, version);
        return QV_NO_SLOT_YET;
    }
    if (version->slot < 0)
        return qv_cache_bring_in(cache, version, true, must) ? QV_NO_SLOT_YET : QV_NO_SLOT_FREE;
    qv_cache_slot *slot = &cache->slots[version->slot];
    if (slot->state == QV_SLOT_LOADING)
        return QV_NO_SLOT_YET;
    slot->last_used = ++cache->ticks;
    qv_cache_touch(cache, version);
    version->users++;
    cache->stats.users++;
    return version->slot;
}

bool qv_adapter_cache_prefetch(qv_adapter_cache *cache, qv_adapter_version *version)
{
    return version->slot >= 0 || version->adapter == NULL ||
           qv_cache_bring_in(cache, version, true, false);
}

void qv_adapter_cache_leave(qv_adapter_cache *cache, qv_adapter_version *version)
{
    QV_ASSERT(version->users > 0);
    cache->stats.users--;
    if (--version->users > 0)
        return;
    cache->n_leaves++;
    qv_cache_bring_in_pinned(cache);
}

/* --- Facts ----------------------------------------------------------------------------------- */

void qv_adapter_cache_get_stats(const qv_adapter_cache *cache, qv_adapter_stats *out)
{
    *out = cache->stats;
    out->n_names = (int64_t)qv_map_count(cache->names);
}

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

/* --- Life ------------------------------------------------------------------------------------ */

/* Start a loader, and watch it. */
static qv_status start_loader(qv_adapter_cache *cache, size_t max_jobs, qv_adapter_loader **out)
{
    QV_TRY(qv_adapter_loader_new(max_jobs, &cache->source, out));
    struct epoll_event event = {.events = EPOLLIN};
    if (epoll_ctl(cache->epoll_fd, EPOLL_CTL_ADD, qv_adapter_loader_fd(*out), &event) != 0)
        return qv_fail(QV_ERR_IO, "adapter cache: epoll: %s", strerror(errno));
    return QV_OK;
}

static qv_status start(qv_adapter_cache *cache)
{
    int32_t n_slots = cache->options.n_slots;
    cache->names = qv_map_new(0);
    cache->by_digest = qv_map_new(0);
    cache->by_dir = qv_map_new(0);
    cache->slots = calloc((size_t)n_slots + 1, sizeof *cache->slots);
    if (cache->names == NULL || cache->by_digest == NULL || cache->by_dir == NULL ||
        cache->slots == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for %d adapter slots", n_slots);
    cache->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (cache->epoll_fd < 0)
        return qv_fail(QV_ERR_IO, "adapter cache: epoll: %s", strerror(errno));
    for (int i = 0; i < QV_ADAPTER_READERS; i++)
        QV_TRY(start_loader(cache, 1, &cache->readers[i]));
    return start_loader(cache, (size_t)n_slots + 1, &cache->copier); /* one job a slot at most */
}

qv_status qv_adapter_cache_new(const qv_adapter_cache_options *options,
                               const qv_adapter_source *source, qv_adapter_cache **out)
{
    qv_adapter_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the adapter cache");
    cache->options = *options;
    cache->source = *source;
    cache->epoll_fd = -1;
    cache->n_leaves = 1;
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
    QV_ASSERT(cache->stats.refs == 0 && cache->stats.users == 0);
    for (int i = 0; i < QV_ADAPTER_READERS; i++)
        qv_adapter_loader_free(cache->readers[i]);
    qv_adapter_loader_free(cache->copier);
    if (cache->epoll_fd >= 0)
        close(cache->epoll_fd);
    for (qv_adapter_read *read = cache->reads, *next; read != NULL; read = next) {
        next = read->next;
        if (read->version != NULL)
            read->version->read = NULL;
        read->version = NULL;
        read->n_names = 0;
        read->reader = -1;
        qv_cache_settle_read(cache, read);
    }
    qv_map_free(cache->names, name_free);
    if (cache->by_digest != NULL)
        QV_MAP_EACH(cache->by_digest, entry)
    qv_cache_free_version(cache, entry->value);
    qv_map_free(cache->by_digest, NULL);
    qv_map_free(cache->by_dir, NULL);
    free(cache->slots);
    free(cache);
}
