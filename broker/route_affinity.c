/* Affinity: a request goes to a worker that holds its adapter, the least loaded of those with room.
 * If all of them are full it waits for one of them rather than spread the adapter over the pool,
 * which would push others out just when the load is highest; how many hold it is placement's
 * business. Base requests go to the least loaded worker of all.
 */
#include "broker/route.h"

static qv_route choose(const qv_route_query *query)
{
    const qv_group *group = query->group;
    bool is_base = group == query->pool->base;
    qv_member *member = is_base ? qv_route_best_member(query) : qv_route_best_holder(query);
    if (member != NULL) {
        qv_route_row row = qv_route_score_of(query, member);
        qv_route_note(query, &row);
        return (qv_route){QV_ROUTE_SEND, member};
    }
    bool held = is_base || group->n_ready + group->n_loading > 0;
    return (qv_route){held ? QV_ROUTE_WAIT : QV_ROUTE_LOAD, NULL};
}

const qv_route_policy qv_route_affinity = {
    .name = "affinity",
    .summary = "a worker that holds the adapter, the least loaded of those with room",
    .choose = choose,
};
