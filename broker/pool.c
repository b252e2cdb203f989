/* The books of workers and adapters. Counts are recomputed from the lists at each change of a
 * group, so that they cannot drift; credit is kept as a difference, because every message asks for
 * it. */
#include "broker/pool.h"

#include <stdlib.h>
#include <string.h>

/* --- Member states ----------------------------------------------------------------------------*/

#define NO_CHANGE QV_MEMBER_STATE_COUNT

static const unsigned char transitions[QV_MEMBER_STATE_COUNT][QV_MEMBER_EVENT_COUNT] = {
    /* WELCOMED, HEARD, QUIET, DRAINS, RESUMES, LOST */
    [QV_MEMBER_JOINING] = {QV_MEMBER_READY, NO_CHANGE, NO_CHANGE, NO_CHANGE, NO_CHANGE,
                           QV_MEMBER_GONE},
    [QV_MEMBER_READY] = {NO_CHANGE, NO_CHANGE, QV_MEMBER_SUSPECT, QV_MEMBER_DRAINING, NO_CHANGE,
                         QV_MEMBER_GONE},
    [QV_MEMBER_SUSPECT] = {NO_CHANGE, QV_MEMBER_READY, NO_CHANGE, QV_MEMBER_DRAINING, NO_CHANGE,
                           QV_MEMBER_GONE},
    [QV_MEMBER_DRAINING] = {NO_CHANGE, NO_CHANGE, NO_CHANGE, NO_CHANGE, QV_MEMBER_READY,
                            QV_MEMBER_GONE},
    [QV_MEMBER_GONE] = {NO_CHANGE, NO_CHANGE, NO_CHANGE, NO_CHANGE, NO_CHANGE, NO_CHANGE},
};

static const char *const state_names[QV_MEMBER_STATE_COUNT] = {
    [QV_MEMBER_JOINING] = "joining",   [QV_MEMBER_READY] = "ready", [QV_MEMBER_SUSPECT] = "suspect",
    [QV_MEMBER_DRAINING] = "draining", [QV_MEMBER_GONE] = "gone",
};

const char *qv_member_state_name(qv_member_state state)
{
    return state_names[state];
}

bool qv_member_next(qv_member_state state, qv_member_event event, qv_member_state *next)
{
    unsigned char to = transitions[state][event];
    if (to == NO_CHANGE)
        return false;
    *next = to;
    return true;
}

/* --- Helpers ----------------------------------------------------------------------------------*/

void qv_text_copy(char *out, size_t out_size, const char *text, size_t size)
{
    size_t n = size < out_size ? size : out_size - 1;
    if (n > 0)
        memcpy(out, text, n);
    out[n] = '\0';
}

void qv_text_set(char **text, const char *value, size_t size)
{
    char *copy = value != NULL && size > 0 ? strndup(value, size) : NULL;
    free(*text);
    *text = copy;
}

static void set_str(char **text, qv_str value)
{
    qv_text_set(text, value.data, value.size);
}

/* Whoever waits for this member. */
static void wake_groups_of(qv_member *member)
{
    qv_group_wake(member->pool->base);
    QV_LIST_EACH(&member->residents, qv_resident, member_link, resident)
    if (resident->state == QV_RESIDENT_READY)
        qv_group_wake(resident->group);
}

static void update_credit(qv_member *member)
{
    int64_t credit = member->state == QV_MEMBER_READY && !member->paused
                         ? member->capacity - member->n_attempts
                         : 0;
    bool was_full = member->credit == 0;
    member->pool->free_credit += credit - member->credit;
    member->credit = credit;
    if (was_full && credit > 0)
        wake_groups_of(member);
}

void qv_member_wake(qv_member *member)
{
    wake_groups_of(member);
}

static void recount(qv_group *group)
{
    group->n_ready = group->n_loading = 0;
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    {
        qv_member_state state = resident->member->state;
        bool usable = state == QV_MEMBER_READY || state == QV_MEMBER_SUSPECT;
        group->n_ready += usable && resident->state == QV_RESIDENT_READY;
        group->n_loading += usable && resident->state == QV_RESIDENT_LOADING;
    }
    qv_group_touch(group);
}

static bool takes_slot(qv_resident_state state)
{
    return state != QV_RESIDENT_FAILED;
}

/* --- Pool -------------------------------------------------------------------------------------*/

qv_status qv_pool_init(qv_pool *pool, uint64_t first_epoch)
{
    *pool = (qv_pool){.next_epoch = first_epoch};
    qv_list_init(&pool->members);
    qv_list_init(&pool->groups);
    qv_list_init(&pool->woken);
    qv_list_init(&pool->dirty);
    pool->by_peer = qv_map_new(0);
    pool->by_id = qv_map_new(0);
    pool->by_name = qv_map_new(0);
    if (pool->by_peer != NULL && pool->by_id != NULL && pool->by_name != NULL)
        pool->base = qv_pool_require_group(pool, "", 0);
    if (pool->base == NULL) {
        qv_pool_deinit(pool);
        return qv_fail(QV_ERR_NOMEM, "no memory for the pool of workers");
    }
    return QV_OK;
}

void qv_pool_deinit(qv_pool *pool)
{
    if (pool->members.next == NULL)
        return;
    QV_LIST_EACH(&pool->members, qv_member, link, member)
    {
        qv_member_apply(member, QV_MEMBER_LOST);
        qv_member_free(member);
    }
    QV_LIST_EACH(&pool->groups, qv_group, link, group)
    qv_group_free(group);
    qv_map_free(pool->by_peer, NULL);
    qv_map_free(pool->by_id, NULL);
    qv_map_free(pool->by_name, NULL);
    *pool = (qv_pool){0};
}

/* --- Members ----------------------------------------------------------------------------------*/

static qv_status check_ready(const qv_pool *pool, const qv_msg_ready *ready)
{
    if (ready->protocol != QV_PROTOCOL_VERSION)
        return qv_fail(QV_ERR_ARG, "worker %.*s speaks protocol %lld, this broker %d",
                       (int)ready->worker.size, ready->worker.data, (long long)ready->protocol,
                       QV_PROTOCOL_VERSION);
    QV_TRY(qv_check_id(ready->worker.data, ready->worker.size));
    if (qv_list_is_empty(&pool->members))
        return QV_OK;
    const qv_member *first = QV_LIST_ITEM(pool->members.next, qv_member, link);
    bool same = first->model_digest != NULL && ready->model_digest.size > 0
                    ? qv_str_equal(ready->model_digest, first->model_digest)
                    : qv_str_equal(ready->model, first->model);
    if (!same)
        return qv_fail(
            QV_ERR_UNSUPPORTED, "worker %.*s serves model %.*s (%.*s), the pool serves %s (%s)",
            (int)ready->worker.size, ready->worker.data, (int)ready->model.size, ready->model.data,
            (int)ready->model_digest.size, ready->model_digest.size ? ready->model_digest.data : "",
            first->model, first->model_digest ? first->model_digest : "");
    return QV_OK;
}

qv_status qv_pool_join(qv_pool *pool, const qv_mq_peer *peer, const qv_msg_ready *ready,
                       uint64_t now_us, qv_member **out)
{
    QV_TRY(check_ready(pool, ready));
    QV_ASSERT(qv_pool_find_peer(pool, peer) == NULL);
    qv_member *member = calloc(1, sizeof *member);
    if (member == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for worker %.*s", (int)ready->worker.size,
                       ready->worker.data);
    member->pool = pool;
    memcpy(member->id, ready->worker.data, ready->worker.size);
    QV_ASSERT(qv_pool_find_id(pool, member->id) == NULL);
    member->peer = *peer;
    member->epoch = pool->next_epoch++;
    member->joined_us = member->heard_us = member->told_us = now_us;
    set_str(&member->model, ready->model);
    set_str(&member->model_digest, ready->model_digest);
    set_str(&member->backend, ready->backend);
    set_str(&member->devices, ready->devices);
    set_str(&member->version, ready->version);
    member->capacity = ready->capacity;
    member->adapter_slots = ready->adapter_slots;
    member->max_rank = ready->max_rank;
    member->max_context = ready->max_context;
    member->total_pages = member->free_pages = ready->total_pages;
    member->instance = qv_has(ready, ready, instance) ? ready->instance : 0;
    member->prefix = calloc(1, sizeof *member->prefix);
    qv_list_init(&member->attempts);
    qv_list_init(&member->residents);
    if (member->model == NULL || qv_map_set(pool->by_peer, peer->id, peer->size, member) != QV_OK ||
        qv_map_set_str(pool->by_id, member->id, member) != QV_OK) {
        qv_map_remove(pool->by_peer, peer->id, peer->size);
        member->state = QV_MEMBER_GONE;
        qv_member_free(member);
        return qv_fail(QV_ERR_NOMEM, "no memory for worker %.*s", (int)ready->worker.size,
                       ready->worker.data);
    }
    qv_list_append(&pool->members, &member->link);
    pool->n_members[QV_MEMBER_JOINING]++;
    *out = member;
    return QV_OK;
}

bool qv_member_apply(qv_member *member, qv_member_event event)
{
    qv_pool *pool = member->pool;
    qv_member_state next;
    if (!qv_member_next(member->state, event, &next))
        return false;
    pool->n_members[member->state]--;
    pool->n_members[next]++;
    member->state = next;
    update_credit(member);
    QV_LIST_EACH(&member->residents, qv_resident, member_link, resident)
    {
        if (next == QV_MEMBER_GONE)
            qv_resident_free(resident);
        else
            recount(resident->group);
    }
    if (next == QV_MEMBER_GONE) {
        qv_map_remove(pool->by_peer, member->peer.id, member->peer.size);
        qv_map_remove_str(pool->by_id, member->id);
        qv_list_remove(&member->link);
        pool->n_members[QV_MEMBER_GONE]--;
    }
    return true;
}

void qv_member_free(qv_member *member)
{
    QV_ASSERT(member->state == QV_MEMBER_GONE && qv_list_is_empty(&member->attempts));
    free(member->model);
    free(member->model_digest);
    free(member->backend);
    free(member->devices);
    free(member->version);
    free(member->prefix);
    free(member);
}

qv_member *qv_pool_find_peer(const qv_pool *pool, const qv_mq_peer *peer)
{
    return qv_map_get(pool->by_peer, peer->id, peer->size);
}

qv_member *qv_pool_find_id(const qv_pool *pool, const char *id)
{
    return qv_map_get_str(pool->by_id, id);
}

void qv_member_add_attempt(qv_member *member, int64_t n)
{
    member->n_attempts += n;
    QV_ASSERT(member->n_attempts >= 0 && member->n_attempts <= member->capacity);
    update_credit(member);
}

void qv_member_pause(qv_member *member, bool paused)
{
    member->paused = paused;
    update_credit(member);
}

/* --- Groups -----------------------------------------------------------------------------------*/

qv_group *qv_pool_find_group(const qv_pool *pool, const char *name, size_t size)
{
    return size == 0 ? pool->base : qv_map_get(pool->by_name, name, size);
}

qv_group *qv_pool_require_group(qv_pool *pool, const char *name, size_t size)
{
    qv_map_entry *entry = qv_map_require(pool->by_name, name, size);
    if (entry == NULL || entry->value != NULL)
        return entry != NULL ? entry->value : NULL;
    qv_group *group = calloc(1, sizeof *group);
    char *copy = group != NULL ? strndup(size ? name : "", size) : NULL;
    if (copy == NULL) {
        free(group);
        qv_map_remove_entry(pool->by_name, entry);
        return NULL;
    }
    group->pool = pool;
    group->name = copy;
    group->name_size = size;
    qv_list_init(&group->residents);
    qv_list_init(&group->lanes);
    qv_list_append(&pool->groups, &group->link);
    entry->value = group;
    return group;
}

bool qv_group_is_idle(const qv_group *group)
{
    return group != group->pool->base && !group->wanted && group->n_jobs == 0 &&
           group->invalid == NULL && qv_list_is_empty(&group->residents);
}

void qv_group_free(qv_group *group)
{
    qv_pool *pool = group->pool;
    qv_map_remove(pool->by_name, group->name, group->name_size);
    qv_list_remove(&group->link);
    qv_list_remove(&group->woken);
    qv_list_remove(&group->dirty_link);
    qv_fair_forget_group(group);
    for (size_t i = 0; i < group->n_workers; i++)
        free(group->workers[i]);
    for (size_t i = 0; i < group->n_tenants; i++)
        free(group->tenants[i]);
    for (size_t i = 0; i < group->n_split; i++)
        free((char *)group->split[i].adapter);
    free(group->workers);
    free(group->tenants);
    free(group->split);
    free(group->path);
    free(group->invalid);
    free(group->reason);
    free(group->name);
    free(group);
}

void qv_group_wake(qv_group *group)
{
    if (group->n_queued > 0 && !qv_list_has(&group->woken))
        qv_list_append(&group->pool->woken, &group->woken);
}

void qv_group_touch(qv_group *group)
{
    if (!qv_list_has(&group->dirty_link) && group != group->pool->base)
        qv_list_append(&group->pool->dirty, &group->dirty_link);
}

bool qv_group_allows(const qv_group *group, const qv_member *member)
{
    for (size_t i = 0; i < group->n_workers; i++)
        if (strcmp(group->workers[i], member->id) == 0)
            return true;
    return group->n_workers == 0;
}

/* --- Residents --------------------------------------------------------------------------------*/

qv_resident *qv_resident_find(const qv_group *group, const qv_member *member)
{
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    if (resident->member == member)
        return resident;
    return NULL;
}

qv_resident *qv_resident_require(qv_group *group, qv_member *member)
{
    qv_resident *resident = qv_resident_find(group, member);
    if (resident != NULL)
        return resident;
    resident = calloc(1, sizeof *resident);
    if (resident == NULL)
        return NULL;
    resident->member = member;
    resident->group = group;
    resident->state = QV_RESIDENT_FAILED;
    qv_list_append(&member->residents, &resident->member_link);
    qv_list_append(&group->residents, &resident->group_link);
    return resident;
}

void qv_resident_set(qv_resident *resident, qv_resident_state state, uint64_t now_us)
{
    resident->member->n_slots += takes_slot(state) - takes_slot(resident->state);
    resident->state = state;
    resident->since_us = now_us;
    recount(resident->group);
    if (state == QV_RESIDENT_READY)
        qv_group_wake(resident->group);
}

void qv_resident_free(qv_resident *resident)
{
    qv_group *group = resident->group;
    resident->member->n_slots -= takes_slot(resident->state);
    qv_list_remove(&resident->member_link);
    qv_list_remove(&resident->group_link);
    free(resident->path);
    free(resident->old_path);
    free(resident->reason);
    free(resident);
    recount(group);
}

bool qv_resident_serves(const qv_resident *resident)
{
    return resident->state == QV_RESIDENT_READY && resident->member->state == QV_MEMBER_READY;
}
