/* Score: the worker on which the first token comes soonest, by what was measured: the work that it
 * has over its rate, the part of the prompt that its cache does not hold over its prefill rate, and
 * a load where the adapter is not there.
 *
 * Up to a handful of holders are all looked at. Of more, two are drawn by lot (the power of two
 * choices: Mitzenmacher 2001), so that several brokers with the same view do not all choose the
 * same one, and the one whose cache holds the longest beginning of the prompt joins them.
 *
 * A request stays with the holders while they have room. When all are full, they are full by more
 * than the pool is on average (consistent hashing with bounded loads: Mirrokni, Thorup,
 * Zadimoghaddam 2018), and what waits for them takes longer than a load, the adapter spills over to
 * another worker with a free slot.
 */
#include "broker/measure.h"
#include "broker/placement.h"
#include "broker/route.h"

#define ALL_UP_TO    4    /* holders that are all looked at */
#define PREFIX_UP_TO 32   /* holders whose prompts are compared */
#define SPILL_LOAD   0.25 /* above the mean load of the pool */

typedef struct {
    const qv_route_query *query;
    qv_member *best;
    double best_ms;
} search;

static void consider(search *s, qv_member *member)
{
    qv_route_row row = qv_route_score_of(s->query, member);
    qv_route_note(s->query, &row);
    double ms = qv_route_total_ms(&row);
    bool is_better = s->best == NULL || ms < s->best_ms ||
                     (ms == s->best_ms && qv_route_better(member, s->best));
    if (is_better) {
        s->best = member;
        s->best_ms = ms;
    }
}

/* The next member with credit that may serve: of the base group any member, else a holder. */
static const qv_list *next_choice(const qv_route_query *query, const qv_list *node,
                                  qv_member **member)
{
    bool is_base = query->group == query->pool->base;
    const qv_list *end = is_base ? &query->pool->members : &query->group->residents;
    for (node = node != NULL ? node->next : end->next; node != end; node = node->next) {
        const qv_resident *resident = is_base ? NULL : QV_LIST_ITEM(node, qv_resident, group_link);
        *member = is_base ? QV_LIST_ITEM(node, qv_member, link) : resident->member;
        if (qv_member_credit(*member) > 0 && (is_base || qv_route_serves(query, resident)))
            return node;
    }
    return NULL;
}

static qv_member *choose_holder(const qv_route_query *query)
{
    search s = {.query = query};
    qv_member *member, *known = NULL;
    uint32_t n = 0, most = 0;
    for (const qv_list *node = NULL; (node = next_choice(query, node, &member)) != NULL; n++) {
        uint32_t bytes = query->prefix != NULL && query->prefix->n > 0 && n < PREFIX_UP_TO
                             ? qv_prefix_match(member->prefix, query->prefix)
                             : 0;
        if (bytes > most) {
            most = bytes;
            known = member;
        }
    }
    if (n == 0)
        return NULL;
    uint32_t first = (uint32_t)(query->random % n);
    uint32_t second = n > 1 ? (first + 1 + (uint32_t)((query->random >> 32) % (n - 1))) % n : first;
    uint32_t i = 0;
    for (const qv_list *node = NULL; (node = next_choice(query, node, &member)) != NULL; i++)
        if (n <= ALL_UP_TO || i == first || i == second || member == known)
            consider(&s, member);
    return s.best;
}

/* How long what waits for the group takes on its holders; 0 = not known. */
static double wait_ms(const qv_group *group)
{
    double rate = 0;
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    if (qv_resident_serves(resident))
        rate += qv_expect_rate(resident->member);
    return rate > 0 ? group->queued_cost * 1000 / rate : 0;
}

static double mean_load(const qv_pool *pool)
{
    double n = 0, capacity = 0;
    QV_LIST_EACH(&pool->members, qv_member, link, member)
    {
        if (member->state != QV_MEMBER_READY)
            continue;
        n += (double)member->n_attempts;
        capacity += (double)member->capacity;
    }
    return capacity > 0 ? n / capacity : 1;
}

/* Another worker for an adapter whose holders are all full, or NULL. */
static qv_member *choose_spill(const qv_route_query *query)
{
    const qv_group *group = query->group;
    if (query->digest[0] != '\0' || group->n_loading > 0 || !qv_group_may_grow(group) ||
        query->now_us < group->demand_us || mean_load(query->pool) * (1 + SPILL_LOAD) > 1 ||
        wait_ms(group) < qv_expect_load_ms(group))
        return NULL;
    search s = {.query = query};
    QV_LIST_EACH(&query->pool->members, qv_member, link, member)
    if (qv_member_credit(member) > 0 && qv_placement_has_room(group, member, query->now_us))
        consider(&s, member);
    return s.best;
}

static qv_route choose(const qv_route_query *query)
{
    const qv_group *group = query->group;
    qv_member *member = choose_holder(query);
    if (member != NULL)
        return (qv_route){QV_ROUTE_SEND, member};
    if (group == query->pool->base)
        return (qv_route){QV_ROUTE_WAIT, NULL};
    if (group->n_ready + group->n_loading == 0)
        return (qv_route){QV_ROUTE_LOAD, NULL};
    member = choose_spill(query);
    return (qv_route){member != NULL ? QV_ROUTE_LOAD : QV_ROUTE_WAIT, member};
}

const qv_route_policy qv_route_score = {
    .name = "score",
    .summary = "the worker whose first token comes soonest: queue, missing prompt, load",
    .choose = choose,
};
