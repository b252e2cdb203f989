/* One function per question: where may it go, where should it go, what has to leave. Reconciling
 * looks at one group at a time and is cheap enough to run at each change. */
#include "broker/placement.h"

#include "broker/measure.h"

#include <stdlib.h>
#include <string.h>

#define MS                UINT64_C(1000)
#define DEMAND_RETRY_US   (50 * MS) /* between looks for room for the same waiting group */
#define BACKOFF_SHIFT_MAX 5

/* --- Helpers ----------------------------------------------------------------------------------*/

static void say(const qv_placement *placement, const char *what, const qv_group *group,
                const qv_member *member, const char *why)
{
    placement->actions.event(placement->actions.user, what, group, member, why);
}

/* A member that stays: what is there counts as a replica. */
static bool is_usable(const qv_member *member)
{
    return member->state == QV_MEMBER_READY || member->state == QV_MEMBER_SUSPECT;
}

static bool is_there(const qv_resident *resident)
{
    return resident->state == QV_RESIDENT_READY || resident->state == QV_RESIDENT_LOADING;
}

/* Members that could ever hold the adapter; and its replicas on such members, loading ones too. */
static int64_t count_candidates(const qv_group *group)
{
    int64_t n = 0;
    QV_LIST_EACH(&group->pool->members, qv_member, link, member)
    n += is_usable(member) && member->adapter_slots > 0 && qv_group_allows(group, member);
    return n;
}

int64_t qv_group_count_replicas(const qv_group *group)
{
    int64_t n = 0;
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    n += is_usable(resident->member) && is_there(resident) &&
         qv_group_allows(group, resident->member);
    return n;
}

/* --- Actions ----------------------------------------------------------------------------------*/

void qv_placement_load(qv_placement *placement, qv_group *group, qv_member *member, const char *why,
                       uint64_t now_us)
{
    qv_resident *resident = qv_resident_require(group, member);
    if (resident == NULL)
        return; /* no memory: the next look tries again */
    if (!qv_same_text(resident->path, group->path)) {
        free(resident->old_path);
        resident->old_path = resident->path;
        resident->path = NULL;
        qv_text_set(&resident->path, group->path, strlen(group->path));
    }
    resident->digest[0] = '\0';
    resident->pin = false;
    resident->asked = true;
    resident->is_move = resident->is_caused = false;
    qv_resident_set(resident, QV_RESIDENT_LOADING, now_us);
    say(placement, "adapter_loading", group, member, why);
    placement->actions.load(placement->actions.user, resident);
}

void qv_placement_unload(qv_placement *placement, qv_resident *resident, const char *why,
                         uint64_t now_us)
{
    qv_resident_set(resident, QV_RESIDENT_UNLOADING, now_us);
    say(placement, "adapter_unloading", resident->group, resident->member, why);
    placement->actions.unload(placement->actions.user, resident);
}

static void fail_load(qv_placement *placement, qv_resident *resident, qv_code code,
                      const char *reason, size_t size, uint64_t now_us)
{
    uint32_t shift =
        resident->n_failures < BACKOFF_SHIFT_MAX ? resident->n_failures : BACKOFF_SHIFT_MAX;
    resident->is_caused = false;
    resident->n_failures++;
    resident->retry_us = now_us + ((uint64_t)placement->options.load_backoff_ms * MS << shift);
    resident->code = code;
    resident->digest[0] = '\0';
    qv_text_set(&resident->reason, reason, size);
    qv_resident_set(resident, QV_RESIDENT_FAILED, now_us);
    say(placement, "adapter_load_failed", resident->group, resident->member, resident->reason);
}

/* --- Where to ---------------------------------------------------------------------------------*/

/* Whether the adapter can be asked for there now, room aside. */
static bool may_load(const qv_group *group, const qv_member *member, uint64_t now_us)
{
    if (member->state != QV_MEMBER_READY || member->adapter_slots == 0 ||
        !qv_group_allows(group, member))
        return false;
    const qv_resident *resident = qv_resident_find(group, member);
    return resident == NULL || resident->state == QV_RESIDENT_UNLOADING ||
           (resident->state == QV_RESIDENT_FAILED && resident->retry_us <= now_us);
}

bool qv_group_may_grow(const qv_group *group)
{
    int64_t n = group->n_ready + group->n_loading;
    return group->wanted && !group->deleted && group->path != NULL &&
           (group->max_replicas == 0 || n < group->max_replicas);
}

static bool has_room(const qv_group *group, const qv_member *member)
{
    const qv_resident *resident = qv_resident_find(group, member);
    bool is_leaving = resident != NULL && resident->state == QV_RESIDENT_UNLOADING;
    return member->n_slots - is_leaving <
           member->adapter_slots; /* its own slot is as good as free */
}

bool qv_placement_has_room(const qv_group *group, const qv_member *member, uint64_t now_us)
{
    return may_load(group, member, now_us) && has_room(group, member);
}

/* FNV-1a over both names, then mixed. */
uint64_t qv_placement_weight(const qv_group *group, const qv_member *member)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (const char *c = group->name; *c != '\0'; c++)
        hash = (hash ^ (unsigned char)*c) * UINT64_C(0x100000001b3);
    hash = (hash ^ 0xff) * UINT64_C(0x100000001b3);
    for (const char *c = member->id; *c != '\0'; c++)
        hash = (hash ^ (unsigned char)*c) * UINT64_C(0x100000001b3);
    hash ^= hash >> 32;
    hash *= UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ hash >> 29;
}

/* Slots that a member may have filled before others come first: a quarter above the mean. */
static int64_t fair_fill(const qv_pool *pool)
{
    int64_t n_slots = 0, n = 0;
    QV_LIST_EACH(&pool->members, qv_member, link, member)
    {
        if (!is_usable(member) || member->adapter_slots == 0)
            continue;
        n_slots += member->n_slots;
        n++;
    }
    return n > 0 ? (n_slots + 1) * 5 / (n * 4) + 1 : 1;
}

qv_member *qv_placement_find_room(const qv_group *group, uint64_t now_us)
{
    int64_t fill = fair_fill(group->pool);
    qv_member *best = NULL;
    bool best_is_full = false;
    QV_LIST_EACH(&group->pool->members, qv_member, link, member)
    {
        if (!qv_placement_has_room(group, member, now_us))
            continue;
        bool is_full = member->n_slots >= fill;
        bool is_better =
            best == NULL || (is_full != best_is_full ? !is_full
                                                     : qv_placement_weight(group, member) >
                                                           qv_placement_weight(group, best));
        if (is_better) {
            best = member;
            best_is_full = is_full;
        }
    }
    return best;
}

static bool is_spare(const qv_group *group)
{
    return group->n_ready > group->replicas && group->n_ready > group->goal;
}

/* Whether `a` is missed less than `b`: more replicas than should be, less demand, used longer ago.
 */
static bool is_missed_less(const qv_resident *a, const qv_resident *b)
{
    bool spare_a = is_spare(a->group), spare_b = is_spare(b->group);
    if (spare_a != spare_b)
        return spare_a;
    double demand_a = a->group->demand, demand_b = b->group->demand;
    if (demand_a > 2 * demand_b + 0.01 || demand_b > 2 * demand_a + 0.01)
        return demand_a < demand_b;
    return a->group->used_us < b->group->used_us;
}

/* An idle, unpinned adapter, the one missed least, on a member that may hold the group; `only`,
 * if given, is the one member to look at. */
static qv_resident *find_victim(const qv_group *group, const qv_member *only, uint64_t now_us)
{
    qv_resident *victim = NULL;
    QV_LIST_EACH(&group->pool->members, qv_member, link, member)
    {
        if ((only != NULL && member != only) || !may_load(group, member, now_us))
            continue;
        QV_LIST_EACH(&member->residents, qv_resident, member_link, resident)
        {
            const qv_group *other = resident->group;
            if (resident->state == QV_RESIDENT_READY && !resident->pin && !other->pin &&
                other->n_jobs == 0 && (victim == NULL || is_missed_less(resident, victim)))
                victim = resident;
        }
    }
    return victim;
}

/* The replica that is missed least: where it may not be, else the one of the least weight. */
static qv_resident *find_surplus(const qv_group *group)
{
    qv_resident *worst = NULL;
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    {
        if (!is_there(resident) || !is_usable(resident->member) || resident->pin)
            continue;
        if (worst != NULL) {
            bool allowed = qv_group_allows(group, resident->member);
            bool worst_allowed = qv_group_allows(group, worst->member);
            bool weighs_more = qv_placement_weight(group, resident->member) >
                               qv_placement_weight(group, worst->member);
            if (allowed != worst_allowed ? allowed : weighs_more)
                continue;
        }
        worst = resident;
    }
    return worst;
}

/* --- Reconcile --------------------------------------------------------------------------------*/

static void unload_everywhere(qv_placement *placement, qv_group *group, uint64_t now_us)
{
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    {
        if (is_there(resident))
            qv_placement_unload(placement, resident, "not wanted any more", now_us);
        else if (resident->state == QV_RESIDENT_FAILED)
            qv_resident_free(resident);
    }
}

/* The wish names another folder than the one that was loaded. */
static void reload_changed(qv_placement *placement, qv_group *group, uint64_t now_us)
{
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    {
        if (resident->path == NULL || qv_same_text(resident->path, group->path))
            continue;
        if (resident->state == QV_RESIDENT_FAILED) {
            qv_resident_free(resident); /* its failures were the other folder's */
        } else if (is_there(resident) && is_usable(resident->member)) {
            resident->n_failures = 0;
            qv_placement_load(placement, group, resident->member, "path changed", now_us);
        }
    }
}

static void drop_surplus(qv_placement *placement, qv_group *group, uint64_t now_us)
{
    int64_t n_disallowed = 0, n = 0;
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    {
        bool here = is_there(resident) && is_usable(resident->member) && !resident->pin;
        n += here;
        n_disallowed += here && !qv_group_allows(group, resident->member);
    }
    int64_t target = qv_group_target(group);
    bool is_on_demand = group->replicas == 0 && group->path != NULL;
    if (is_on_demand && target == 0)
        target = 1; /* it stays until its slot is needed */
    bool is_surplus = (!is_on_demand || n > 1) && n > target &&
                      (n_disallowed == 0 || (int64_t)group->n_ready > n_disallowed || target == 0);
    if (!is_surplus || placement->follows) {
        group->surplus_us = 0;
        return;
    }
    if (group->surplus_us == 0)
        group->surplus_us = now_us;
    bool is_due = n_disallowed > 0 ||
                  now_us - group->surplus_us >= (uint64_t)placement->options.surplus_ms * MS;
    if (!is_due)
        return;
    qv_resident *surplus;
    for (; n > target && (surplus = find_surplus(group)) != NULL; n--)
        qv_placement_unload(placement, surplus, "more replicas than wanted", now_us);
    group->surplus_us = 0; /* what comes later has its own time */
}

void qv_placement_reconcile(qv_placement *placement, qv_group *group, uint64_t now_us)
{
    if (group == group->pool->base)
        return;
    if (group->deleted) {
        unload_everywhere(placement, group, now_us);
        return;
    }
    bool is_held = qv_group_count_replicas(group) > 0;
    if (!group->wanted) {
        if (is_held)
            group->orphan_us = 0;
        else if (group->orphan_us == 0)
            group->orphan_us = now_us;
        return;
    }
    if (group->path == NULL) { /* an alias only */
        unload_everywhere(placement, group, now_us);
        return;
    }
    reload_changed(placement, group, now_us);
    int64_t floor = qv_group_target(group);
    floor = floor < group->replicas ? floor : group->replicas; /* more is the controller's */
    for (int64_t n = qv_group_count_replicas(group); n < floor; n++) {
        qv_member *member = qv_placement_find_room(group, now_us);
        if (member == NULL)
            break;
        qv_placement_load(placement, group, member, "wanted", now_us);
    }
    if (group->n_queued > 0 && group->n_ready + group->n_loading == 0)
        qv_placement_demand(placement, group, NULL, qv_fair_tenant_waiting(group), now_us);
    drop_surplus(placement, group, now_us);
}

void qv_placement_demand(qv_placement *placement, qv_group *group, qv_member *member,
                         const char *tenant, uint64_t now_us)
{
    if (group->path == NULL || group->deleted || now_us < group->demand_us)
        return;
    bool is_held = group->n_ready + group->n_loading > 0;
    if (is_held && (member == NULL || !may_load(group, member, now_us)))
        return;
    if (member != NULL && !may_load(group, member, now_us))
        member = NULL;
    qv_member *room = member != NULL && has_room(group, member) ? member : NULL;
    if (room == NULL && !is_held)
        room = qv_placement_find_room(group, now_us);
    if (room == NULL && !is_held) {
        qv_resident *victim = find_victim(group, member, now_us);
        if (victim != NULL) {
            room = victim->member;
            qv_placement_unload(placement, victim, "its slot is needed for an adapter in demand",
                                now_us);
        }
    }
    if (room == NULL) {
        group->demand_us = now_us + DEMAND_RETRY_US;
        return;
    }
    qv_placement_load(placement, group, room, "a request waits for it", now_us);
    qv_resident *resident = qv_resident_find(group, room);
    if (resident == NULL || tenant == NULL)
        return;
    resident->is_caused = true;
    qv_text_copy(resident->cause, sizeof resident->cause, tenant, strlen(tenant));
}

bool qv_placement_is_forgotten(const qv_placement *placement, const qv_group *group,
                               uint64_t now_us)
{
    return group->orphan_us != 0 &&
           now_us - group->orphan_us >= (uint64_t)placement->options.orphan_ms * MS;
}

/* A slot has become free: look at the groups that may need it, and at no others. */
static void touch_hungry(qv_placement *placement)
{
    QV_LIST_EACH(&placement->pool->groups, qv_group, link, group)
    {
        bool waits = group->n_queued > 0 && group->n_ready == 0;
        if (!waits && (int64_t)group->n_ready + group->n_loading >= group->replicas)
            continue;
        group->demand_us = 0;
        qv_group_touch(group);
    }
}

void qv_placement_members_changed(qv_placement *placement, uint64_t now_us)
{
    placement->changed_us = now_us;
    qv_placement_touch_all(placement);
}

void qv_placement_touch_all(qv_placement *placement)
{
    QV_LIST_EACH(&placement->pool->groups, qv_group, link, group)
    {
        group->demand_us = 0;
        qv_group_touch(group);
    }
}

void qv_placement_tick(qv_placement *placement, uint64_t now_us)
{
    uint64_t timeout_us = (uint64_t)placement->options.load_timeout_ms * MS;
    QV_LIST_EACH(&placement->pool->groups, qv_group, link, group)
    {
        QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
        {
            bool is_late = now_us - resident->since_us >= timeout_us;
            if (resident->state == QV_RESIDENT_LOADING && is_late) {
                static const char why[] = "the worker did not say in time how the load went";
                fail_load(placement, resident, QV_CODE_INTERNAL, why, sizeof why - 1, now_us);
            } else if (resident->state == QV_RESIDENT_UNLOADING && is_late) {
                qv_resident_free(resident);
            } else if (resident->state == QV_RESIDENT_FAILED && resident->retry_us <= now_us) {
                qv_group_touch(group);
            }
        }
        if (group->surplus_us != 0 || (group->n_queued > 0 && group->n_ready == 0))
            qv_group_touch(group);
        qv_group_wake(group); /* whatever it waits for: never for longer than this */
        if (qv_placement_is_forgotten(placement, group, now_us))
            qv_group_touch(group);
    }
}

/* --- What is ----------------------------------------------------------------------------------*/

/* The words of a worker for the state of an adapter. */
typedef enum { WORD_LOADING, WORD_READY, WORD_FAILED, WORD_UNLOADED, WORD_COUNT } state_word;

static const char *const state_words[WORD_COUNT] = {"loading", "ready", "failed", "unloaded"};

static qv_status read_state(qv_str text, qv_str name, state_word *out)
{
    for (state_word word = 0; word < WORD_COUNT; word++) {
        if (qv_str_equal(text, state_words[word])) {
            *out = word;
            return QV_OK;
        }
    }
    return qv_fail(QV_ERR_ARG,
                   "adapter %.*s: state '%.*s' is none of loading, ready, failed, unloaded",
                   (int)name.size, name.data, (int)text.size, text.data);
}

static qv_code read_code(qv_str text)
{
    qv_code code;
    return qv_code_find(text, &code) ? code : QV_CODE_INTERNAL;
}

static void set_digest(qv_resident *resident, qv_str digest)
{
    size_t size = digest.size <= QV_POOL_DIGEST_MAX ? digest.size : QV_POOL_DIGEST_MAX;
    memset(resident->digest, 0, sizeof resident->digest);
    if (size > 0)
        memcpy(resident->digest, digest.data, size);
}

qv_status qv_placement_joined(qv_placement *placement, qv_member *member,
                              const qv_msg_held_adapter *held, uint32_t n, uint64_t now_us)
{
    for (uint32_t i = 0; i < n; i++) {
        state_word word;
        QV_TRY(qv_adapter_name_check(held[i].name));
        QV_TRY(read_state(held[i].state, held[i].name, &word));
        if (word == WORD_UNLOADED || word == WORD_FAILED)
            continue;
        qv_group *group =
            qv_pool_require_group(placement->pool, held[i].name.data, held[i].name.size);
        qv_resident *resident = group != NULL ? qv_resident_require(group, member) : NULL;
        if (resident == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for the adapters of worker %s", member->id);
        set_digest(resident, held[i].digest);
        qv_text_set(&resident->path, held[i].path.data, held[i].path.size);
        resident->rank = held[i].rank;
        resident->bytes = held[i].bytes;
        resident->pin = held[i].pin;
        qv_resident_set(resident, word == WORD_READY ? QV_RESIDENT_READY : QV_RESIDENT_LOADING,
                        now_us);
    }
    qv_placement_members_changed(placement, now_us);
    return QV_OK;
}

static void report_ready(qv_placement *placement, qv_resident *resident,
                         const qv_msg_adapter_state *report, uint64_t now_us)
{
    set_digest(resident, report->digest);
    if (resident->path == NULL)
        qv_text_set(&resident->path, report->path.data, report->path.size);
    resident->rank = report->rank;
    resident->bytes = report->bytes;
    resident->n_failures = 0;
    qv_text_set(&resident->reason, NULL, 0);
    bool is_news = resident->state != QV_RESIDENT_READY;
    if (resident->state == QV_RESIDENT_LOADING && resident->asked)
        qv_measure_load(resident->group, (double)(now_us - resident->since_us) / MS);
    if (resident->is_caused)
        placement->actions.caused(placement->actions.user, resident);
    resident->asked = resident->is_caused = false;
    qv_resident_set(resident, QV_RESIDENT_READY, now_us);
    if (is_news)
        say(placement, "adapter_loaded", resident->group, resident->member, resident->digest);
}

qv_status qv_placement_report(qv_placement *placement, qv_member *member,
                              const qv_msg_adapter_state *report, uint64_t now_us)
{
    state_word word;
    QV_TRY(qv_adapter_name_check(report->name));
    QV_TRY(read_state(report->state, report->name, &word));
    qv_group *group =
        word == WORD_UNLOADED || word == WORD_FAILED
            ? qv_pool_find_group(placement->pool, report->name.data, report->name.size)
            : qv_pool_require_group(placement->pool, report->name.data, report->name.size);
    if (group == NULL)
        return word == WORD_UNLOADED || word == WORD_FAILED
                   ? QV_OK
                   : qv_fail(QV_ERR_NOMEM, "no memory for adapter %.*s", (int)report->name.size,
                             report->name.data);
    qv_resident *resident = qv_resident_find(group, member);
    if (resident == NULL && (word == WORD_READY || word == WORD_LOADING)) {
        resident = qv_resident_require(group, member);
        if (resident == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for adapter %s", group->name);
    }
    if (resident == NULL)
        return QV_OK;

    /* Reports that were overtaken by a later order of ours. */
    bool is_old = resident->old_path != NULL && report->path.size > 0 &&
                  qv_str_equal(report->path, resident->old_path);
    if (is_old || (resident->state == QV_RESIDENT_UNLOADING && word != WORD_UNLOADED) ||
        (resident->state == QV_RESIDENT_LOADING && word == WORD_UNLOADED))
        return QV_OK;

    switch (word) {
    case WORD_LOADING:
        if (resident->state != QV_RESIDENT_LOADING)
            qv_resident_set(resident, QV_RESIDENT_LOADING, now_us);
        break;
    case WORD_READY:
        report_ready(placement, resident, report, now_us);
        break;
    case WORD_FAILED:
        fail_load(placement, resident, read_code(report->error_code), report->reason.data,
                  report->reason.size, now_us);
        break;
    default:
        say(placement, "adapter_unloaded", group, member, NULL);
        qv_resident_free(resident);
        touch_hungry(placement); /* a slot is free */
        break;
    }
    return QV_OK;
}

void qv_placement_missing(qv_placement *placement, qv_resident *resident, uint64_t now_us)
{
    static const char why[] = "the worker says that it does not hold it";
    fail_load(placement, resident, QV_CODE_ADAPTER_NOT_FOUND, why, sizeof why - 1, now_us);
}

/* --- Views ------------------------------------------------------------------------------------*/

int64_t qv_group_target(const qv_group *group)
{
    if (!group->wanted || group->path == NULL)
        return 0;
    int64_t n = count_candidates(group);
    int64_t most = group->max_replicas > 0 ? group->max_replicas : QV_WANT_MAX_REPLICAS;
    int64_t target = group->goal > group->replicas ? group->goal : group->replicas;
    target = target < most ? target : most;
    return target < n ? target : n;
}

/* The failure to show: of a member that is still here, the latest. */
static const qv_resident *find_failure(const qv_group *group)
{
    const qv_resident *latest = NULL;
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    if (resident->state == QV_RESIDENT_FAILED && resident->n_failures > 0 &&
        (latest == NULL || resident->since_us > latest->since_us))
        latest = resident;
    return latest;
}

void qv_group_show_split(const qv_group *group, char *out, size_t size)
{
    size_t used = 0;
    out[0] = '\0';
    for (size_t i = 0; i < group->n_split && used < size; i++)
        used += (size_t)snprintf(out + used, size - used, "%s%s=%lld", i > 0 ? " " : "",
                                 group->split[i].adapter, (long long)group->split[i].weight);
}

bool qv_group_allows_tenant(const qv_group *group, const char *tenant)
{
    for (size_t i = 0; i < group->n_tenants; i++)
        if (strcmp(group->tenants[i], tenant) == 0)
            return true;
    return group->n_tenants == 0;
}

/* It stands for others and has no files of its own. */
static bool is_alias(const qv_group *group)
{
    return group->wanted && group->path == NULL && group->n_split > 0;
}

const char *qv_group_state(const qv_group *group)
{
    if (group->deleted)
        return "unloading";
    if (is_alias(group))
        return "alias";
    if (group->n_ready > 0)
        return group->n_ready >= group->replicas ? "ready" : "partial";
    if (group->n_loading > 0)
        return "loading";
    if (!group->wanted && group->invalid != NULL)
        return "invalid";
    const qv_resident *failure = find_failure(group);
    if (failure != NULL)
        return failure->code == QV_CODE_ADAPTER_INVALID ? "invalid" : "failed";
    return "wanted";
}

const char *qv_group_reason(const qv_group *group)
{
    if (group->invalid != NULL)
        return group->invalid;
    if (group->deleted)
        return "not wanted any more";
    if (!group->wanted)
        return group->n_ready + group->n_loading > 0 ? NULL : "no worker holds it";
    if (is_alias(group))
        return NULL;
    int64_t wanted = group->replicas > 0 ? group->replicas : 1;
    if (group->n_ready >= wanted)
        return NULL;
    const qv_resident *failure = find_failure(group);
    if (failure != NULL)
        return failure->reason != NULL ? failure->reason : "the load failed";
    if (group->n_ready + group->n_loading >= wanted)
        return NULL;
    if (group->replicas == 0)
        return "loaded when a request asks for it";
    int64_t candidates = count_candidates(group);
    if (candidates == 0)
        return group->n_workers > 0 ? "none of the workers that may hold it is here"
                                    : "no worker is here";
    return candidates < wanted ? "more replicas wanted than workers are here"
                               : "no worker has a free adapter slot";
}

bool qv_group_accepts(const qv_group *group, uint64_t now_us, qv_code *code, const char **why,
                      int64_t *retry_ms)
{
    *retry_ms = 0;
    *code = QV_CODE_ADAPTER_NOT_FOUND;
    *why = qv_group_reason(group);
    if (group->deleted)
        return false;
    if (group == group->pool->base || group->n_ready + group->n_loading > 0)
        return true;
    if (is_alias(group)) {
        *why = "none of the adapters that it stands for is known";
        return false;
    }
    if (!group->wanted) {
        if (group->invalid != NULL) {
            *code = QV_CODE_ADAPTER_INVALID;
            return false;
        }
        return group->orphan_us != 0; /* its worker may come back */
    }

    /* In vain only if it failed, and there is nowhere left to try now. */
    const qv_resident *failure = find_failure(group);
    if (failure == NULL)
        return true;
    uint64_t retry_us = UINT64_MAX;
    QV_LIST_EACH(&group->pool->members, qv_member, link, member)
    {
        if (may_load(group, member, now_us))
            return true;
        const qv_resident *resident = qv_resident_find(group, member);
        if (resident != NULL && resident->retry_us < retry_us)
            retry_us = resident->retry_us;
    }
    *code = failure->code;
    if (failure->code != QV_CODE_ADAPTER_INVALID && retry_us != UINT64_MAX)
        *retry_ms = retry_us > now_us ? (int64_t)((retry_us - now_us) / MS) + 1 : 1;
    return false;
}
