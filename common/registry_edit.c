#include "common/protocol.h"
#include "common/registry_internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    void (*done)(qv_status status, bool existed, void *user);
    void *user;
} edit;

/* The answer to DEL, or to EXEC of EXISTS and HSET. */
static void on_edited(qv_status status, const redisReply *reply, void *user)
{
    edit *e = user;
    const redisReply *deleted = reply;
    if (status == QV_OK && reply->type == REDIS_REPLY_ARRAY)
        deleted = reply->elements > 0 ? reply->element[0] : NULL;
    if (e->done != NULL)
        e->done(status, status == QV_OK && deleted != NULL && deleted->integer > 0, e->user);
    free(e);
}

/* "a,b": names of up to QV_ID_MAX bytes, up to QV_WANT_MAX_WORKERS of them. */
typedef struct {
    char text[QV_WANT_MAX_WORKERS * (QV_ID_MAX + 1) + 1];
} name_list;

static const char *join_names(name_list *list, const char *const *names, size_t n)
{
    size_t used = 0;
    list->text[0] = 0;
    for (size_t i = 0; i < n && used < sizeof list->text; i++)
        used += (size_t)snprintf(list->text + used, sizeof list->text - used, "%s%s",
                                 i > 0 ? "," : "", names[i]);
    return list->text;
}

/* What the caller has no say in stays as people wrote it: who may use it above all. */
static void send_want(qv_redis *redis, const char *key, const qv_want *want, edit *e)
{
    name_list list;
    qv_redis_commandf(redis, NULL, NULL, "MULTI");
    qv_redis_commandf(redis, NULL, NULL, "EXISTS %s", key);
    qv_redis_commandf(redis, NULL, NULL, "HSET %s path %s replicas %lld pin %d", key, want->path,
                      (long long)want->replicas, want->pin ? 1 : 0);
    if (want->n_workers > 0)
        qv_redis_commandf(redis, NULL, NULL, "HSET %s workers %s", key,
                          join_names(&list, want->workers, want->n_workers));
    else
        qv_redis_commandf(redis, NULL, NULL, "HDEL %s workers", key);
    if (want->n_tenants > 0)
        qv_redis_commandf(redis, NULL, NULL, "HSET %s tenants %s", key,
                          join_names(&list, want->tenants, want->n_tenants));
    if (want->max_replicas > 0)
        qv_redis_commandf(redis, NULL, NULL, "HSET %s max_replicas %lld", key,
                          (long long)want->max_replicas);
    qv_redis_commandf(redis, on_edited, e, "EXEC");
}

static qv_status check_want(const qv_want *want)
{
    if (want->path == NULL || want->path[0] == 0 || strlen(want->path) > QV_WANT_MAX_PATH)
        return qv_fail(QV_ERR_ARG, "a want needs a path of 1 to %d bytes", QV_WANT_MAX_PATH);
    if (want->replicas < 0 || want->replicas > QV_WANT_MAX_REPLICAS)
        return qv_fail(QV_ERR_ARG, "replicas is %" PRId64 ", not 0 to %d", want->replicas,
                       QV_WANT_MAX_REPLICAS);
    if (want->max_replicas > 0 && want->max_replicas < want->replicas)
        return qv_fail(QV_ERR_ARG, "max_replicas is %" PRId64 ", below replicas, %" PRId64,
                       want->max_replicas, want->replicas);
    for (size_t i = 0; i < want->n_tenants; i++)
        if (strlen(want->tenants[i]) == 0 || strlen(want->tenants[i]) > QV_ID_MAX ||
            strpbrk(want->tenants[i], ", \t") != NULL)
            return qv_fail(QV_ERR_ARG, "'%s' is no name of a tenant in a list", want->tenants[i]);
    if (want->n_tenants > QV_WANT_MAX_TENANTS)
        return qv_fail(QV_ERR_ARG, "%zu tenants, more than %d", want->n_tenants,
                       QV_WANT_MAX_TENANTS);
    if (want->n_workers > QV_WANT_MAX_WORKERS)
        return qv_fail(QV_ERR_ARG, "%zu workers, more than %d", want->n_workers,
                       QV_WANT_MAX_WORKERS);
    for (size_t i = 0; i < want->n_workers; i++)
        QV_TRY(qv_check_id(want->workers[i], strlen(want->workers[i])));
    return QV_OK;
}

qv_status qv_registry_set_want(qv_registry *registry, const char *name, const qv_want *want,
                               void (*done)(qv_status status, bool existed, void *user), void *user)
{
    char key[QV_REGISTRY_MAX_KEY];
    QV_TRY(qv_watch_check_name(QV_WATCH_WANT, name, strlen(name)));
    if (want != NULL)
        QV_TRY(check_want(want));
    edit *e = malloc(sizeof *e);
    if (e == NULL)
        return qv_fail(QV_ERR_NOMEM, "out of memory for an edit");
    *e = (edit){.done = done, .user = user};
    qv_registry_key(key, QV_KEY_WANT, name);
    if (want == NULL)
        qv_redis_commandf(registry->redis, on_edited, e, "DEL %s", key);
    else if (qv_redis_room(registry->redis) < 7)
        on_edited(qv_fail(QV_ERR_BUSY, "redis: the link is down"), NULL, e);
    else
        send_want(registry->redis, key, want, e);
    return QV_OK;
}
