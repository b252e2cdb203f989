#include "common/protocol.h"
#include "common/registry_internal.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    qv_registry *registry;
    void (*found)(qv_status, const qv_broker_address *, size_t, void *);
    void *user;
    qv_status status;
    size_t pending; /* commands without an answer, the scan counted as one */
    qv_broker_address *rows;
    size_t n, capacity;
} lookup;

typedef struct {
    lookup *lookup;
    char id[QV_ID_MAX + 1];
} broker_fetch;

static int compare_brokers(const void *a, const void *b)
{
    return strcmp(((const qv_broker_address *)a)->id, ((const qv_broker_address *)b)->id);
}

static void lookup_settle(lookup *l, qv_status status)
{
    if (status != QV_OK)
        l->status = status;
    if (--l->pending > 0)
        return;
    if (l->n > 0)
        qsort(l->rows, l->n, sizeof *l->rows, compare_brokers);
    l->found(l->status, l->status == QV_OK ? l->rows : NULL, l->status == QV_OK ? l->n : 0,
             l->user);
    for (size_t i = 0; i < l->n; i++) {
        free((char *)l->rows[i].id);
        free((char *)l->rows[i].frontend);
        free((char *)l->rows[i].backend);
        free((char *)l->rows[i].demand);
    }
    free(l->rows);
    free(l);
}

static void lookup_add(lookup *l, const char *id, const char *frontend, const char *backend,
                       const char *demand, const char *workers)
{
    if (l->n == l->capacity) {
        size_t capacity = l->capacity > 0 ? 2 * l->capacity : 4;
        qv_broker_address *rows = realloc(l->rows, capacity * sizeof *rows);
        if (rows == NULL)
            return;
        l->rows = rows;
        l->capacity = capacity;
    }
    qv_broker_address row = {strdup(id), strdup(frontend), strdup(backend),
                             strdup(demand != NULL ? demand : ""),
                             workers != NULL ? strtoll(workers, NULL, 10) : 0};
    l->rows[l->n++] = row;
}

static void on_broker(qv_status status, const redisReply *reply, void *user)
{
    broker_fetch *fetch = user;
    if (status == QV_OK && qv_reply_is_hash(reply)) {
        const char *frontend = qv_reply_get(reply, "frontend"),
                   *backend = qv_reply_get(reply, "backend");
        if (frontend != NULL && backend != NULL) /* else its lease ran out, or it is not one */
            lookup_add(fetch->lookup, fetch->id, frontend, backend, qv_reply_get(reply, "demand"),
                       qv_reply_get(reply, "workers"));
    }
    lookup_settle(fetch->lookup, status == QV_ERR_STATE ? QV_OK : status);
    free(fetch);
}

static void on_broker_key(qv_registry *registry, const char *key, size_t size, void *user)
{
    lookup *l = user;
    size_t head = strlen(qv_registry_key_head(QV_KEY_BROKER));
    if (size < head || qv_check_id(key + head, size - head) != QV_OK)
        return;
    broker_fetch *fetch = malloc(sizeof *fetch);
    if (fetch == NULL)
        return;
    fetch->lookup = l;
    memcpy(fetch->id, key + head, size - head);
    fetch->id[size - head] = 0;
    l->pending++;
    qv_redis_commandf(registry->redis, on_broker, fetch, "HGETALL %s%s",
                      qv_registry_key_head(QV_KEY_BROKER), fetch->id);
}

static void on_broker_keys(qv_registry *registry, qv_status status, void *user)
{
    (void)registry;
    lookup_settle(user, status);
}

void qv_registry_find_brokers(qv_registry *registry,
                              void (*found)(qv_status status, const qv_broker_address *brokers,
                                            size_t n, void *user),
                              void *user)
{
    lookup *l = calloc(1, sizeof *l);
    if (l == NULL) {
        found(qv_fail(QV_ERR_NOMEM, "out of memory for a look-up"), NULL, 0, user);
        return;
    }
    *l = (lookup){.registry = registry, .found = found, .user = user, .pending = 1};
    qv_key_scan_start(&(qv_key_scan){.registry = registry,
                                     .head = qv_registry_key_head(QV_KEY_BROKER),
                                     .each = on_broker_key,
                                     .end = on_broker_keys,
                                     .user = l});
}
