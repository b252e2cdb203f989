/* The table of policies, and what they share. */
#include "broker/route.h"

#include "broker/measure.h"

#include <string.h>

const qv_route_policy *const qv_route_policies[] = {
    &qv_route_score,
    &qv_route_affinity,
    &qv_route_least_loaded,
    NULL,
};

qv_status qv_route_find(const char *name, const qv_route_policy **out)
{
    char names[256] = "";
    for (size_t i = 0; qv_route_policies[i] != NULL; i++) {
        if (strcmp(qv_route_policies[i]->name, name) == 0) {
            *out = qv_route_policies[i];
            return QV_OK;
        }
        strncat(names, i > 0 ? ", " : "", sizeof names - strlen(names) - 1);
        strncat(names, qv_route_policies[i]->name, sizeof names - strlen(names) - 1);
    }
    return qv_fail(QV_ERR_NOT_FOUND, "no routing policy is named '%s'; there are: %s", name, names);
}

bool qv_route_better(const qv_member *a, const qv_member *b)
{
    /* a.n / a.capacity against b.n / b.capacity, without the division. */
    int64_t load_a = a->n_attempts * b->capacity, load_b = b->n_attempts * a->capacity;
    if (load_a != load_b)
        return load_a < load_b;
    if (a->free_pages != b->free_pages)
        return a->free_pages > b->free_pages;
    return a->n_dispatched < b->n_dispatched;
}

bool qv_route_serves(const qv_route_query *query, const qv_resident *resident)
{
    return qv_resident_serves(resident) &&
           (query->digest[0] == '\0' || strcmp(resident->digest, query->digest) == 0);
}

void qv_route_note(const qv_route_query *query, const qv_route_row *row)
{
    qv_route_trace *trace = query->trace;
    if (trace == NULL)
        return;
    if (trace->n < QV_ROUTE_MAX_ROWS)
        trace->n++;
    trace->rows[trace->n - 1] = *row;
}

qv_route_row qv_route_score_of(const qv_route_query *query, const qv_member *member)
{
    const qv_group *group = query->group;
    qv_route_row row = {.member = member, .has_credit = qv_member_credit(member) > 0};
    double rate = qv_expect_rate(member), prefill_rate = qv_expect_prefill_rate(member);
    if (rate > 0)
        row.queue_ms = member->work * 1000 / rate;
    const qv_resident *resident =
        group != query->pool->base ? qv_resident_find(group, member) : NULL;
    if (group != query->pool->base && (resident == NULL || resident->state != QV_RESIDENT_READY))
        row.load_ms = qv_expect_load_ms(group);
    if (query->prompt_tokens > 0 && prefill_rate > 0) {
        double known = query->prefix != NULL
                           ? qv_expect_tokens(qv_prefix_match(member->prefix, query->prefix))
                           : 0;
        double missing = known < query->prompt_tokens ? query->prompt_tokens - known : 0;
        row.prefill_ms = missing * 1000 / prefill_rate;
    }
    return row;
}

qv_member *qv_route_best_member(const qv_route_query *query)
{
    qv_member *best = NULL;
    QV_LIST_EACH(&query->pool->members, qv_member, link, member)
    if (qv_member_credit(member) > 0 && (best == NULL || qv_route_better(member, best)))
        best = member;
    return best;
}

qv_member *qv_route_best_holder(const qv_route_query *query)
{
    qv_member *best = NULL;
    QV_LIST_EACH(&query->group->residents, qv_resident, group_link, resident)
    {
        qv_member *member = resident->member;
        if (qv_route_serves(query, resident) && qv_member_credit(member) > 0 &&
            (best == NULL || qv_route_better(member, best)))
            best = member;
    }
    return best;
}
