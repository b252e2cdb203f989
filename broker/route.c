/* The table of policies, and what they share. */
#include "broker/route.h"

#include <string.h>

const qv_route_policy *const qv_route_policies[] = {
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

qv_member *qv_route_best_member(const qv_pool *pool)
{
    qv_member *best = NULL;
    QV_LIST_EACH(&pool->members, qv_member, link, member)
    if (qv_member_credit(member) > 0 && (best == NULL || qv_route_better(member, best)))
        best = member;
    return best;
}

qv_member *qv_route_best_holder(const qv_group *group, const char *digest)
{
    qv_member *best = NULL;
    QV_LIST_EACH(&group->residents, qv_resident, group_link, resident)
    {
        qv_member *member = resident->member;
        if (qv_resident_serves(resident) && qv_member_credit(member) > 0 &&
            (digest[0] == '\0' || strcmp(resident->digest, digest) == 0) &&
            (best == NULL || qv_route_better(member, best)))
            best = member;
    }
    return best;
}
