#include "broker/controller.h"

#include <math.h>

#define MS        UINT64_C(1000)
#define NEW_SHARE 0.3  /* of this second in the smoothed demand */
#define BUSY      0.7  /* of a worker's capacity */
#define SLACK     0.8  /* demand must fall so far below a smaller goal */
#define NOISE     0.05 /* requests at once that ask for nothing */
#define LITTLE    0.1  /* of the demand of a replica */

/* --- Demand -----------------------------------------------------------------------------------*/

int64_t qv_controller_goal(double demand, double capacity, int64_t goal)
{
    if (capacity <= 0 || demand < NOISE)
        return goal > 0 ? goal - 1 : 0;
    double need = demand / (capacity * BUSY);
    int64_t up = (int64_t)ceil(need);
    if (up > goal)
        return goal > 0 && up > 2 * goal ? 2 * goal : up;
    return goal > 1 && need < SLACK * (double)(goal - 1) ? goal - 1 : goal;
}

static double mean_capacity(const qv_pool *pool)
{
    double capacity = 0, n = 0;
    QV_LIST_EACH(&pool->members, qv_member, link, member)
    {
        if (member->state != QV_MEMBER_READY)
            continue;
        capacity += (double)member->capacity;
        n++;
    }
    return n > 0 ? capacity / n : 0;
}

static int64_t clamp_goal(const qv_group *group, int64_t goal)
{
    if (!group->wanted || group->path == NULL)
        return 0;
    int64_t n = (int64_t)group->pool->n_members[QV_MEMBER_READY];
    if (group->max_replicas > 0 && goal > group->max_replicas)
        goal = group->max_replicas;
    return goal < n ? goal : n;
}

static void update_goal(qv_placement *placement, qv_group *group, double capacity, uint64_t now_us)
{
    group->demand += NEW_SHARE * ((double)group->n_jobs - group->demand);
    double demand = group->demand + group->others_demand;
    int64_t goal = clamp_goal(group, qv_controller_goal(demand, capacity, group->goal));
    if (goal >= group->goal) {
        group->low_us = 0;
    } else if (group->low_us == 0) {
        group->low_us = now_us;
        return;
    } else if (now_us - group->low_us < (uint64_t)placement->options.grow_down_ms * MS) {
        return;
    } else {
        group->low_us = now_us; /* the next one has its own time */
    }
    if (goal == group->goal)
        return;
    char why[96];
    bool is_news = goal > group->replicas || group->goal > group->replicas;
    snprintf(why, sizeof why, "%.1f requests at once ask for %lld replicas, before %lld", demand,
             (long long)goal, (long long)group->goal);
    group->goal = goal;
    if (is_news && (goal > 1 || group->replicas > 0))
        placement->actions.event(placement->actions.user, "replicas_changed", group, NULL, why);
    qv_group_touch(group);
}

/* --- Moves ------------------------------------------------------------------------------------*/

static void move_to(qv_placement *placement, qv_group *group, qv_member *member, const char *why,
                    uint64_t now_us)
{
    qv_placement_load(placement, group, member, why, now_us);
    qv_resident *resident = qv_resident_find(group, member);
    if (resident != NULL)
        resident->is_move = true;
}

static int64_t count_moves(const qv_group *group)
{
    int64_t n = 0;
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    n += resident->state == QV_RESIDENT_LOADING && resident->is_move;
    return n;
}

/* --- Room -------------------------------------------------------------------------------------*/

/* Whether an adapter may make room for a replica of the group: idle, and with more replicas than it
 * should have, or loaded on request only and in much less demand than a replica of the group. */
static bool may_leave(const qv_resident *resident, const qv_group *group)
{
    const qv_group *other = resident->group;
    if (resident->state != QV_RESIDENT_READY || resident->pin || other->pin || other->n_jobs > 0 ||
        !other->wanted || other == group)
        return false;
    double share =
        (group->demand + group->others_demand) / (double)(group->n_ready > 0 ? group->n_ready : 1);
    return other->n_ready > other->replicas &&
           ((int64_t)other->n_ready > other->goal ||
            other->demand + other->others_demand < LITTLE * share);
}

/* The adapter missed least that may make room for the group, or NULL. */
static qv_resident *find_spare(const qv_group *group)
{
    qv_resident *spare = NULL;
    QV_LIST_EACH(&group->pool->members, qv_member, link, member)
    {
        if (member->state != QV_MEMBER_READY || !qv_group_allows(group, member) ||
            qv_resident_find(group, member) != NULL)
            continue;
        QV_LIST_EACH(&member->residents, qv_resident, member_link, resident)
        if (may_leave(resident, group) &&
            (spare == NULL || resident->group->demand < spare->group->demand))
            spare = resident;
    }
    return spare;
}

/* --- Balance ----------------------------------------------------------------------------------*/

/* Move one replica to a member that suits better and is emptier. */
static bool balance(qv_placement *placement, qv_group *group, uint64_t now_us)
{
    if (!group->wanted || group->path == NULL || group->n_loading > 0 || group->surplus_us != 0 ||
        qv_group_target(group) == 0 || qv_group_count_replicas(group) != qv_group_target(group))
        return false;
    const qv_resident *worst = NULL;
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    {
        if (resident->state != QV_RESIDENT_READY || resident->pin)
            continue;
        if (worst == NULL || qv_placement_weight(group, resident->member) <
                                 qv_placement_weight(group, worst->member))
            worst = resident;
    }
    qv_member *best = NULL;
    QV_LIST_EACH(&group->pool->members, qv_member, link, member)
    if (qv_placement_has_room(group, member, now_us) &&
        (best == NULL || qv_placement_weight(group, member) > qv_placement_weight(group, best)))
        best = member;
    if (worst == NULL || best == NULL || best->n_slots >= worst->member->n_slots ||
        qv_placement_weight(group, best) <= qv_placement_weight(group, worst->member))
        return false;
    move_to(placement, group, best, "it suits better, and has more room", now_us);
    return true;
}

/* --- The second -------------------------------------------------------------------------------*/

void qv_controller_tick(qv_placement *placement, uint64_t now_us)
{
    qv_pool *pool = placement->pool;
    double capacity = mean_capacity(pool);
    int64_t moves = placement->options.max_moves;
    QV_LIST_EACH(&pool->groups, qv_group, link, group)
    {
        if (group == pool->base)
            continue;
        moves -= group->n_loading > 0 ? count_moves(group) : 0;
        update_goal(placement, group, capacity, now_us);
    }
    bool is_calm = now_us - placement->changed_us >= (uint64_t)placement->options.rebalance_ms * MS;
    QV_LIST_EACH(&pool->groups, qv_group, link, group)
    {
        if (moves <= 0 || placement->follows)
            break;
        int64_t n = qv_group_count_replicas(group), target = qv_group_target(group);
        if (n >= group->replicas && n > 0 && n < target) {
            qv_member *member = qv_placement_find_room(group, now_us);
            qv_resident *spare = member == NULL ? find_spare(group) : NULL;
            if (member == NULL && spare != NULL) {
                member = spare->member;
                qv_placement_unload(placement, spare, "its slot is needed for more demand", now_us);
            }
            if (member != NULL)
                move_to(placement, group, member, "demand asks for it", now_us);
            moves -= member != NULL || spare != NULL;
        } else if (is_calm && group != pool->base && balance(placement, group, now_us)) {
            moves--;
        }
    }
}
