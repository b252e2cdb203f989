#include "worker/adapter_cache_internal.h"

#include "common/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- Slots ----------------------------------------------------------------------------------- */

static void apply(qv_cache_slot *slot, qv_slot_event event)
{
    int next = qv_slot_next_state(slot->state, event);
    QV_ASSERT(next >= 0);
    slot->state = (qv_slot_state)next;
}

static int32_t slot_number(const qv_adapter_cache *cache, const qv_cache_slot *slot)
{
    return (int32_t)(slot - cache->slots);
}

static void clear(qv_adapter_cache *cache, qv_cache_slot *slot)
{
    slot->job =
        (qv_loader_job){.kind = QV_LOADER_CLEAR, .slot = slot_number(cache, slot), .owner = slot};
    qv_adapter_loader_push(cache->copier, &slot->job);
}

/* Take a slot from its version, on which nobody runs. */
static void evict(qv_adapter_cache *cache, qv_cache_slot *slot)
{
    QV_ASSERT(slot->version->users == 0);
    apply(slot, QV_SLOT_EVICT);
    slot->version->slot = -1;
    slot->version = NULL;
    cache->stats.slot_evictions++;
}

/* Start to copy a version into a slot that is EMPTY or EVICTING. */
static void fill(qv_adapter_cache *cache, qv_cache_slot *slot, qv_adapter_version *version)
{
    apply(slot, QV_SLOT_LOAD);
    slot->version = version;
    slot->last_used = ++cache->ticks;
    version->slot = slot_number(cache, slot);
    cache->n_waiting_pins -= version->n_pins > 0;
    cache->stats.installs++;
    slot->job = (qv_loader_job){.kind = QV_LOADER_INSTALL,
                                .slot = version->slot,
                                .adapter = version->adapter,
                                .owner = slot};
    qv_adapter_loader_push(cache->copier, &slot->job);
}

static qv_cache_slot *find_empty(qv_adapter_cache *cache)
{
    for (int32_t i = 0; i < cache->options.n_slots; i++)
        if (cache->slots[i].state == QV_SLOT_EMPTY)
            return &cache->slots[i];
    return NULL;
}

/* Whether a version's slot and host copy are all that is left of it: no name leads to its files any
 * more, and they may have changed, but requests hold it. */
static bool is_only_here(const qv_adapter_version *version)
{
    return version->n_names == 0 && version->refs > 0;
}

/* The slot that is missed least of those on which nobody runs: of a version that no request holds,
 * or with `must` of any; among equals the least recently used. */
static qv_cache_slot *find_idle(qv_adapter_cache *cache, bool must)
{
    qv_cache_slot *best = NULL;
    for (int32_t i = 0; i < cache->options.n_slots; i++) {
        qv_cache_slot *slot = &cache->slots[i];
        const qv_adapter_version *version = slot->version;
        if (slot->state != QV_SLOT_READY || version->users > 0 || (version->refs > 0 && !must) ||
            (is_only_here(version) && version->adapter == NULL))
            continue;
        bool is_wanted = version->refs > 0;
        bool best_is_wanted = best != NULL && best->version->refs > 0;
        if (best == NULL || is_wanted < best_is_wanted ||
            (is_wanted == best_is_wanted && slot->last_used < best->last_used))
            best = slot;
    }
    return best;
}

bool qv_cache_bring_in(qv_adapter_cache *cache, qv_adapter_version *version, bool may_evict,
                       bool must)
{
    QV_ASSERT(version->adapter != NULL && version->slot < 0);
    if (version->full_at == cache->n_leaves) /* nobody has left since the device was full */
        return false;
    qv_cache_slot *slot = find_empty(cache);
    if (slot == NULL && (may_evict || must) && (slot = find_idle(cache, must)) != NULL)
        evict(cache, slot);
    if (slot != NULL)
        fill(cache, slot, version);
    return slot != NULL;
}

void qv_cache_bring_in_pinned(qv_adapter_cache *cache)
{
    if (cache->n_waiting_pins == 0)
        return;
    QV_MAP_EACH(cache->by_digest, entry)
    {
        qv_adapter_version *version = entry->value;
        if (version->n_pins == 0 || version->slot >= 0)
            continue;
        if (version->adapter == NULL)
            qv_cache_require_copy(cache, version);
        else if (!qv_cache_bring_in(cache, version, true, true))
            return;
    }
}

void qv_cache_pin(qv_adapter_cache *cache, qv_adapter_version *version)
{
    if (version->n_pins++ > 0)
        return;
    cache->n_pinned++;
    if (version->slot < 0)
        cache->n_waiting_pins++;
    else if (cache->slots[version->slot].state == QV_SLOT_READY)
        apply(&cache->slots[version->slot], QV_SLOT_PIN);
}

void qv_cache_unpin(qv_adapter_cache *cache, qv_adapter_version *version)
{
    if (--version->n_pins > 0)
        return;
    cache->n_pinned--;
    if (version->slot < 0)
        cache->n_waiting_pins--;
    else if (cache->slots[version->slot].state == QV_SLOT_PINNED)
        apply(&cache->slots[version->slot], QV_SLOT_UNPIN);
}

/* Slots of adapters with experts or an embedding take memory of the device as they need it, and for
 * this one there was none. It tries again when an idle slot has been cleared or somebody has left
 * one; alone on the device it never fits. */
static void take_full_device(qv_adapter_cache *cache, qv_cache_slot *slot)
{
    qv_adapter_version *version = slot->version;
    bool is_alone = true;
    apply(slot, QV_SLOT_FAILED);
    slot->version = NULL;
    version->slot = -1;
    cache->n_waiting_pins += version->n_pins > 0;
    for (int32_t i = 0; i < cache->options.n_slots; i++)
        is_alone = is_alone && cache->slots[i].state == QV_SLOT_EMPTY;
    if (is_alone) {
        qv_cache_unload_version(cache, version, slot->job.status, slot->job.reason);
        return;
    }
    version->full_at = cache->n_leaves;
    qv_cache_slot *idle = find_idle(cache, true);
    if (idle != NULL) {
        evict(cache, idle);
        clear(cache, idle);
    }
    qv_cache_settle(cache, version);
}

qv_status qv_cache_take_slot(qv_adapter_cache *cache, qv_cache_slot *slot)
{
    bool is_full = slot->job.status == QV_ERR_LIMIT || slot->job.status == QV_ERR_NOMEM;
    if (slot->job.kind == QV_LOADER_INSTALL && is_full) {
        take_full_device(cache, slot);
        return QV_OK;
    }
    if (slot->job.status != QV_OK)
        return qv_fail(QV_ERR_DEVICE, "adapter slot %d: %s", slot->job.slot, slot->job.reason);
    if (slot->job.kind == QV_LOADER_CLEAR) {
        apply(slot, QV_SLOT_CLEARED);
        cache->n_leaves++;
        return QV_OK;
    }
    apply(slot, QV_SLOT_LOADED);
    if (slot->version->n_pins > 0)
        apply(slot, QV_SLOT_PIN);
    qv_cache_settle(cache, slot->version);
    return QV_OK;
}

/* --- Host copies ----------------------------------------------------------------------------- */

static void list_remove(qv_adapter_cache *cache, qv_adapter_version *version)
{
    *(version->prev != NULL ? &version->prev->next : &cache->host) = version->next;
    *(version->next != NULL ? &version->next->prev : &cache->coldest) = version->prev;
    version->prev = version->next = NULL;
}

static void list_push(qv_adapter_cache *cache, qv_adapter_version *version)
{
    version->next = cache->host;
    *(version->next != NULL ? &version->next->prev : &cache->coldest) = version;
    cache->host = version;
}

void qv_cache_touch(qv_adapter_cache *cache, qv_adapter_version *version)
{
    if (version->adapter == NULL || cache->host == version)
        return;
    list_remove(cache, version);
    list_push(cache, version);
}

static void add_copy(qv_adapter_cache *cache, qv_adapter_version *version, qv_adapter *adapter)
{
    version->adapter = adapter;
    list_push(cache, version);
    cache->stats.host_bytes += version->bytes;
    cache->stats.host_copies++;
}

static void drop_copy(qv_adapter_cache *cache, qv_adapter_version *version)
{
    list_remove(cache, version);
    cache->stats.host_bytes -= version->bytes;
    cache->stats.host_copies--;
    cache->source.close(cache->source.user, version->adapter);
    version->adapter = NULL;
}

/* Whether a host copy may go: not while it is being copied into a slot, is on its way there, or is
 * the last of its version. */
static bool can_drop(const qv_adapter_cache *cache, const qv_adapter_version *version)
{
    if (version->slot < 0)
        return version->refs == 0 && version->n_pins == 0;
    return cache->slots[version->slot].state != QV_SLOT_LOADING && !is_only_here(version);
}

static uint64_t free_host_bytes(const qv_adapter_cache *cache)
{
    uint64_t used = cache->stats.host_bytes + cache->host_reserved;
    return used < cache->options.host_bytes ? cache->options.host_bytes - used : 0;
}

/* Make room for `bytes` by dropping the copies that were used longest ago; false, and nothing is
 * dropped, if that cannot be. */
static bool make_host_room(qv_adapter_cache *cache, uint64_t bytes)
{
    uint64_t room = free_host_bytes(cache);
    for (const qv_adapter_version *v = cache->coldest; v != NULL && room < bytes; v = v->prev)
        room += can_drop(cache, v) ? v->bytes : 0;
    if (room < bytes)
        return false;
    for (qv_adapter_version *v = cache->coldest, *prev; free_host_bytes(cache) < bytes; v = prev) {
        prev = v->prev;
        if (!can_drop(cache, v))
            continue;
        drop_copy(cache, v);
        cache->stats.host_evictions++;
    }
    return true;
}

/* --- Versions -------------------------------------------------------------------------------- */

static void forget_dir(qv_adapter_cache *cache, qv_adapter_version *version)
{
    if (version->dir != NULL && qv_map_get_str(cache->by_dir, version->dir) == version)
        qv_map_remove_str(cache->by_dir, version->dir);
}

/* Note where the version was read. Without memory for it, it is read again when next asked for. */
static void note_dir(qv_adapter_cache *cache, qv_adapter_version *version, const char *dir,
                     const qv_adapter_stamp *stamp)
{
    char *copy = strdup(dir);
    if (copy == NULL)
        return;
    forget_dir(cache, version);
    free(version->dir);
    version->dir = copy;
    version->stamp = *stamp;
    (void)qv_map_set_str(cache->by_dir, copy, version);
}

void qv_cache_move_version(qv_adapter_cache *cache, qv_adapter_version *version, const char *dir)
{
    note_dir(cache, version, dir, &(qv_adapter_stamp){0});
}

void qv_cache_lose_version(qv_adapter_cache *cache, qv_adapter_version *version, qv_code code,
                           const char *reason)
{
    QV_ASSERT(version->n_names == 0 && version->slot < 0);
    if (version->adapter != NULL)
        drop_copy(cache, version);
    forget_dir(cache, version);
    qv_map_remove_str(cache->by_digest, version->digest);
    version->lost = true;
    version->code = code;
    version->reason = strdup(reason);
    cache->n_lost++;
    qv_cache_settle(cache, version);
}

void qv_cache_free_version(qv_adapter_cache *cache, qv_adapter_version *version)
{
    if (version->read != NULL) {
        qv_adapter_read *read = version->read;
        version->read = NULL;
        read->version = NULL;
        qv_cache_settle_read(cache, read);
    }
    if (version->adapter != NULL)
        drop_copy(cache, version);
    if (version->lost)
        cache->n_lost--;
    else
        qv_map_remove_str(cache->by_digest, version->digest);
    forget_dir(cache, version);
    cache->stats.n_versions--;
    free(version->digest);
    free(version->dir);
    free(version->reason);
    free(version);
}

void qv_cache_settle(qv_adapter_cache *cache, qv_adapter_version *version)
{
    if (version->n_names > 0 || version->refs > 0)
        return;
    if (version->slot >= 0) {
        qv_cache_slot *slot = &cache->slots[version->slot];
        if (slot->state == QV_SLOT_LOADING)
            return;
        evict(cache, slot);
        clear(cache, slot);
    }
    qv_cache_free_version(cache, version);
}

static qv_adapter_version *new_version(qv_adapter_cache *cache, const qv_adapter *adapter)
{
    const qv_adapter_source *source = &cache->source;
    qv_adapter_version *version = calloc(1, sizeof *version);
    if (version == NULL)
        return NULL;
    *version = (qv_adapter_version){
        .digest = strdup(source->digest(source->user, adapter)),
        .rank = source->rank(source->user, adapter),
        .bytes = source->bytes(source->user, adapter),
        .slot = -1,
    };
    if (version->digest == NULL ||
        qv_map_set_str(cache->by_digest, version->digest, version) != QV_OK) {
        free(version->digest);
        free(version);
        return NULL;
    }
    cache->stats.n_versions++;
    return version;
}

qv_status qv_cache_require_version(qv_adapter_cache *cache, const qv_adapter_read *read,
                                   qv_adapter *adapter, qv_adapter_version **out)
{
    const qv_adapter_source *source = &cache->source;
    uint64_t bytes = source->bytes(source->user, adapter);
    qv_status status = QV_OK;
    qv_adapter_version *version =
        qv_map_get_str(cache->by_digest, source->digest(source->user, adapter));
    if (version == NULL && bytes > cache->options.host_bytes)
        status = qv_fail(QV_ERR_LIMIT,
                         "needs %llu bytes of host memory, and all adapters together have %llu: "
                         "raise adapter-cache-bytes",
                         (unsigned long long)bytes, (unsigned long long)cache->options.host_bytes);
    else if (version == NULL && (version = new_version(cache, adapter)) == NULL)
        status = qv_fail(QV_ERR_NOMEM, "no memory for one more adapter");
    if (status == QV_OK && version->adapter == NULL && make_host_room(cache, version->bytes))
        add_copy(cache, version, adapter);
    else
        source->close(source->user, adapter); /* without room it is read again when it is used */
    QV_TRY(status);
    note_dir(cache, version, read->dir, &read->job.stamp);
    *out = version;
    return QV_OK;
}

/* --- Reads ----------------------------------------------------------------------------------- */

void qv_cache_free_read(qv_adapter_read *read)
{
    if (read == NULL)
        return;
    QV_ASSERT(read->before == NULL);
    free(read->dir);
    free(read);
}

void qv_cache_unlink_read(qv_adapter_cache *cache, qv_adapter_read *read)
{
    qv_adapter_read **link = &cache->reads;
    while (*link != read)
        link = &(*link)->next;
    *link = read->next;
}

void qv_cache_settle_read(qv_adapter_cache *cache, qv_adapter_read *read)
{
    if (read->n_names > 0 || read->version != NULL || read->reader >= 0)
        return;
    if (read->before != NULL)
        cache->source.close(cache->source.user, read->before);
    read->before = NULL;
    qv_cache_unlink_read(cache, read);
    qv_cache_free_read(read);
}

/* A new read at the end of the line. NULL: no memory. */
static qv_adapter_read *add_read(qv_adapter_cache *cache, const char *dir)
{
    qv_adapter_read **link = &cache->reads;
    while (*link != NULL)
        link = &(*link)->next;
    qv_adapter_read *read = calloc(1, sizeof *read);
    if (read == NULL || (read->dir = strdup(dir)) == NULL) {
        qv_cache_free_read(read);
        return NULL;
    }
    read->reader = -1;
    return *link = read;
}

qv_adapter_read *qv_cache_require_read(qv_adapter_cache *cache, const char *dir)
{
    for (qv_adapter_read *read = cache->reads; read != NULL; read = read->next) {
        if (read->version != NULL || strcmp(read->dir, dir) != 0)
            continue;
        read->again |= read->reader >= 0;
        return read;
    }
    return add_read(cache, dir);
}

void qv_cache_require_copy(qv_adapter_cache *cache, qv_adapter_version *version)
{
    if (version->adapter != NULL || version->read != NULL || version->lost)
        return;
    qv_adapter_read *read = version->dir != NULL ? add_read(cache, version->dir) : NULL;
    if (read == NULL)
        return; /* no memory: whoever asks next tries again */
    read->version = version;
    read->wanted = true;
    version->read = read;
    qv_cache_start_reads(cache);
}

static bool is_in_hand(const qv_adapter_cache *cache, const char *dir)
{
    for (int i = 0; i < QV_ADAPTER_READERS; i++)
        if (cache->in_hand[i] != NULL && strcmp(cache->in_hand[i]->dir, dir) == 0)
            return true;
    return false;
}

/* The next read in line: those that a request waits for first, but one turn in four the oldest. One
 * of a folder that is being read waits for that, and then mostly finds that nothing has changed. A
 * host copy that must come back waits for room; none that comes back later passes it. */
static qv_adapter_read *next_read(qv_adapter_cache *cache)
{
    bool by_age = cache->stats.reads % 4 == 3, is_full = false;
    qv_adapter_read *best = NULL;
    for (qv_adapter_read *read = cache->reads; read != NULL; read = read->next) {
        if (read->reader >= 0 || is_in_hand(cache, read->dir) || (best != NULL && !read->wanted))
            continue;
        if (read->version != NULL && (is_full || !make_host_room(cache, read->version->bytes))) {
            is_full = true;
            continue;
        }
        best = read;
        if (read->wanted || by_age)
            break;
    }
    return best;
}

void qv_cache_start_reads(qv_adapter_cache *cache)
{
    for (int32_t i = 0; i < QV_ADAPTER_READERS && cache->reads != NULL; i++) {
        if (cache->in_hand[i] != NULL)
            continue;
        qv_adapter_read *read = next_read(cache);
        if (read == NULL)
            return;
        cache->stats.reads++;
        read->reader = i;
        read->start_ms = qv_now_ms();
        read->reserved = read->version != NULL ? read->version->bytes : 0;
        cache->host_reserved += read->reserved;
        cache->in_hand[i] = read;
        read->job = (qv_loader_job){.kind = QV_LOADER_OPEN, .dir = read->dir, .owner = read};
        const qv_adapter_version *known = qv_map_get_str(cache->by_dir, read->dir);
        if (read->before != NULL)
            read->job.stamp = read->before_stamp;
        else if (read->version == NULL && known != NULL)
            read->job.stamp = known->stamp;
        qv_adapter_loader_push(cache->readers[i], &read->job);
    }
}

bool qv_cache_end_read(qv_adapter_cache *cache, qv_adapter_read *read)
{
    qv_loader_job *job = &read->job;
    cache->in_hand[read->reader] = NULL;
    read->reader = -1;
    cache->host_reserved -= read->reserved;
    read->reserved = 0;
    if (read->before != NULL) {
        if (job->unchanged)
            job->adapter = read->before;
        else
            cache->source.close(cache->source.user, read->before);
        read->before = NULL;
        job->unchanged = false;
    }
    /* Where nothing has changed, the version that was there may have gone meanwhile. */
    bool again =
        read->again || (job->unchanged && qv_map_get_str(cache->by_dir, read->dir) == NULL);
    read->again = false;
    if (!again || read->n_names == 0)
        return true;
    read->before = job->adapter;
    read->before_stamp = job->stamp;
    job->adapter = NULL;
    return false;
}

/* Whether what was read is the version that was asked for. Errors: of the read; FORMAT. */
static qv_status check_copy(const qv_adapter_cache *cache, const qv_adapter_version *version,
                            const qv_loader_job *job)
{
    if (job->status != QV_OK)
        return qv_fail(job->status, "%s", job->reason);
    const char *digest = cache->source.digest(cache->source.user, job->adapter);
    if (strcmp(digest, version->digest) == 0)
        return QV_OK;
    return qv_fail(QV_ERR_FORMAT,
                   "%s: the files have changed since they were loaded (digest %.12s, it was "
                   "%.12s): load the adapter again",
                   job->dir, digest, version->digest);
}

bool qv_cache_take_copy(qv_adapter_cache *cache, qv_adapter_read *read)
{
    qv_adapter_version *version = read->version;
    version->read = NULL;
    read->version = NULL;
    qv_status status = check_copy(cache, version, &read->job);
    if (status == QV_OK && version->adapter == NULL) {
        add_copy(cache, version, read->job.adapter);
        read->job.adapter = NULL;
        note_dir(cache, version, read->dir, &read->job.stamp);
    }
    if (read->job.adapter != NULL) /* of another version, or a load was quicker */
        cache->source.close(cache->source.user, read->job.adapter);
    read->job.adapter = NULL;
    if (status == QV_OK || version->adapter != NULL) {
        if (version->n_pins > 0)
            qv_cache_bring_in_pinned(cache);
        return true;
    }
    if (read->job.status == QV_OK) {
        read->job.status = status;
        snprintf(read->job.reason, sizeof read->job.reason, "%s", qv_error());
    }
    return false;
}
