/* Least loaded: the worker with the most room gets the request, and has to load the adapter first
 * if it does not hold it. It spreads every adapter over every worker, so it is right where each
 * worker has a slot for each adapter, and the baseline to compare with elsewhere.
 */
#include "broker/route.h"

static qv_route choose(const qv_route_query *query)
{
    const qv_group *group = query->group;
    qv_member *member = qv_route_best_member(query);
    if (member == NULL)
        return (qv_route){QV_ROUTE_WAIT, NULL};
    qv_route_row row = qv_route_score_of(query, member);
    qv_route_note(query, &row);
    if (group == query->pool->base)
        return (qv_route){QV_ROUTE_SEND, member};
    const qv_resident *resident = qv_resident_find(group, member);
    if (resident != NULL && qv_route_serves(query, resident))
        return (qv_route){QV_ROUTE_SEND, member};
    if (resident != NULL && resident->state == QV_RESIDENT_LOADING)
        return (qv_route){QV_ROUTE_WAIT, NULL};

    /* It cannot serve this one, or not yet: a holder is better than an idle wait. */
    qv_member *holder = qv_route_best_holder(query);
    bool can_load = resident == NULL && group->path != NULL && qv_group_allows(group, member) &&
                    member->n_slots < member->adapter_slots;
    if (holder != NULL && !can_load)
        return (qv_route){QV_ROUTE_SEND, holder};
    return (qv_route){QV_ROUTE_LOAD, member};
}

const qv_route_policy qv_route_least_loaded = {
    .name = "least-loaded",
    .summary = "the worker with the most room, loading the adapter there first if need be",
    .choose = choose,
};
