/* What people want of an adapter, as the group keeps it. */
#include "broker/placement.h"

#include <stdlib.h>
#include <string.h>

/* --- What is wanted ---------------------------------------------------------------------------*/

static void free_texts(char **texts, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(texts[i]);
    free(texts);
}

/* Owned copies of texts. Errors: NOMEM. */
static qv_status copy_texts(const char *const *from, size_t n, char ***out)
{
    *out = NULL;
    if (n == 0)
        return QV_OK;
    char **copy = calloc(n, sizeof *copy);
    for (size_t i = 0; copy != NULL && i < n; i++) {
        copy[i] = strdup(from[i]);
        if (copy[i] == NULL) {
            free_texts(copy, i);
            copy = NULL;
        }
    }
    *out = copy;
    return copy != NULL ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory for what is wanted");
}

static void free_split(qv_want_share *split, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free((char *)split[i].adapter);
    free(split);
}

static qv_status copy_split(const qv_want *want, qv_want_share **out)
{
    *out = NULL;
    if (want->n_split == 0)
        return QV_OK;
    qv_want_share *copy = calloc(want->n_split, sizeof *copy);
    for (size_t i = 0; copy != NULL && i < want->n_split; i++) {
        copy[i] = (qv_want_share){strdup(want->split[i].adapter), want->split[i].weight};
        if (copy[i].adapter == NULL) {
            free_split(copy, i);
            copy = NULL;
        }
    }
    *out = copy;
    return copy != NULL ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory for what is wanted");
}

static void free_lists(qv_group *group)
{
    free_texts(group->workers, group->n_workers);
    free_texts(group->tenants, group->n_tenants);
    free_split(group->split, group->n_split);
    group->workers = group->tenants = NULL;
    group->split = NULL;
    group->n_workers = group->n_tenants = group->n_split = 0;
}

static qv_status copy_lists(qv_group *group, const qv_want *want)
{
    char **workers = NULL, **tenants = NULL;
    qv_want_share *split = NULL;
    qv_status status = copy_texts(want->workers, want->n_workers, &workers);
    if (status == QV_OK)
        status = copy_texts(want->tenants, want->n_tenants, &tenants);
    if (status == QV_OK)
        status = copy_split(want, &split);
    if (status != QV_OK) {
        free_texts(workers, workers != NULL ? want->n_workers : 0);
        free_texts(tenants, tenants != NULL ? want->n_tenants : 0);
        return status;
    }
    free_lists(group);
    group->workers = workers;
    group->n_workers = want->n_workers;
    group->tenants = tenants;
    group->n_tenants = want->n_tenants;
    group->split = split;
    group->n_split = want->n_split;
    return QV_OK;
}

static void forget_want(qv_placement *placement, qv_group *group)
{
    group->wanted = false;
    group->deleted = true;
    qv_text_set(&group->path, NULL, 0);
    qv_text_set(&group->invalid, NULL, 0);
    qv_text_set(&group->reason, NULL, 0);
    free_lists(group);
    group->replicas = group->max_replicas = group->goal = 0;
    group->low_us = 0;
    group->pin = false;
    group->surplus_us = 0;
    placement->actions.event(placement->actions.user, "want_deleted", group, NULL, NULL);
    qv_group_touch(group);
}

qv_status qv_placement_set_want(qv_placement *placement, const char *name, const qv_want *want)
{
    if (want == NULL) {
        qv_group *known = qv_pool_find_group(placement->pool, name, strlen(name));
        if (known == NULL || known == placement->pool->base)
            return QV_OK;
        if (known->wanted)
            forget_want(placement, known);
        else if (known->invalid != NULL)
            known->deleted = qv_list_is_empty(&known->residents);
        qv_text_set(&known->invalid, NULL, 0);
        qv_group_touch(known);
        return QV_OK;
    }
    qv_group *group = qv_pool_require_group(placement->pool, name, strlen(name));
    if (group == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for adapter %s", name);
    QV_TRY(copy_lists(group, want));
    if (!qv_same_text(group->path, want->path)) {
        qv_text_set(&group->path, want->path, want->path != NULL ? strlen(want->path) : 0);
        if (group->path == NULL && want->path != NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for the path of adapter %s", name);
    }
    /* A person who asks for fewer does not wait for the surplus to prove itself. */
    bool fewer = group->wanted && want->replicas < group->replicas;
    group->surplus_us = fewer ? 1 : 0;
    group->wanted = true;
    group->deleted = false;
    group->replicas = want->replicas;
    group->max_replicas = want->max_replicas;
    group->pin = want->pin;
    if (fewer)
        group->goal = 0; /* demand may ask again */
    group->orphan_us = 0;
    group->demand_us = 0;
    qv_text_set(&group->invalid, NULL, 0);
    char split[256];
    qv_group_show_split(group, split, sizeof split);
    placement->actions.event(placement->actions.user, "want_changed", group, NULL,
                             split[0] != '\0' ? split : group->path);
    qv_group_touch(group);
    return QV_OK;
}

qv_status qv_placement_invalid_want(qv_placement *placement, const char *name, const char *reason)
{
    qv_group *group = qv_pool_require_group(placement->pool, name, strlen(name));
    if (group == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for adapter %s", name);
    qv_text_set(&group->invalid, reason, strlen(reason));
    qv_group_touch(group);
    return QV_OK;
}
