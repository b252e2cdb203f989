#include "common/clock.h"
#include "common/log.h"
#include "common/registry_internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* --- publishing ------------------------------------------------------------------------------ */

/* Decimal text of a number that is not negative, else NULL. */
typedef struct {
    char text[24];
} number;

static const char *show(number *n, int64_t value)
{
    if (value < 0)
        return NULL;
    snprintf(n->text, sizeof n->text, "%" PRId64, value);
    return n->text;
}

void qv_registry_put(qv_registry *registry, qv_key_kind kind, const char *name,
                     const qv_mirror_field *fields, size_t n, int64_t lease_ms)
{
    char key[QV_REGISTRY_MAX_KEY];
    if (!registry->left)
        qv_mirror_put(registry->mirror, qv_registry_key(key, kind, name), fields, n, lease_ms);
}

#define FIELDS(fields) fields, sizeof fields / sizeof *fields

void qv_registry_put_adapter(qv_registry *registry, const char *name,
                             const qv_adapter_record *record)
{
    number rank, bytes, replicas, wanted, goal;
    if (record == NULL) {
        qv_registry_put(registry, QV_KEY_ADAPTER, name, NULL, 0, 0);
        return;
    }
    const qv_mirror_field fields[] = {
        {"state", record->state},
        {"path", record->path},
        {"digest", record->digest},
        {"rank", show(&rank, record->rank)},
        {"bytes", show(&bytes, record->bytes)},
        {"replicas", show(&replicas, record->replicas)},
        {"replicas_wanted", show(&wanted, record->replicas_wanted)},
        {"replicas_goal", show(&goal, record->replicas_goal > 0 ? record->replicas_goal : -1)},
        {"split", record->split},
        {"reason", record->reason},
    };
    qv_registry_put(registry, QV_KEY_ADAPTER, name, FIELDS(fields), 0);
}

void qv_registry_put_place(qv_registry *registry, const char *adapter, const qv_place_row *rows,
                           size_t n)
{
    qv_mirror_field *fields = calloc(n + 1, sizeof *fields);
    if (fields == NULL)
        return;
    for (size_t i = 0; i < n; i++)
        fields[i] = (qv_mirror_field){rows[i].worker, rows[i].tier};
    qv_registry_put(registry, QV_KEY_PLACE, adapter, fields, n, 0);
    free(fields);
}

void qv_registry_put_broker(qv_registry *registry, const qv_broker_record *record)
{
    number workers, in_flight, queued, heartbeat;
    const qv_mirror_field fields[] = {
        {"frontend", record->frontend},
        {"backend", record->backend},
        {"version", record->version},
        {"workers", show(&workers, record->workers)},
        {"in_flight", show(&in_flight, record->in_flight)},
        {"queued", show(&queued, record->queued)},
        {"demand", record->demand},
        {"heartbeat_ms", show(&heartbeat, (int64_t)qv_wall_ms())},
    };
    qv_registry_put(registry, QV_KEY_BROKER, registry->who, FIELDS(fields),
                    registry->options.lease_ms);
}

void qv_registry_put_worker(qv_registry *registry, const qv_worker_record *record)
{
    number capacity, slots, free_slots, pages, free_pages, running, waiting, heartbeat;
    const qv_mirror_field fields[] = {
        {"state", record->state},
        {"model", record->model},
        {"backend", record->backend},
        {"devices", record->devices},
        {"version", record->version},
        {"broker", record->broker},
        {"capacity", show(&capacity, record->capacity)},
        {"slots", show(&slots, record->adapter_slots)},
        {"free_slots", show(&free_slots, record->free_slots)},
        {"pages", show(&pages, record->total_pages)},
        {"free_pages", show(&free_pages, record->free_pages)},
        {"running", show(&running, record->running)},
        {"waiting", show(&waiting, record->waiting)},
        {"adapters", record->adapters},
        {"heartbeat_ms", show(&heartbeat, (int64_t)qv_wall_ms())},
    };
    qv_registry_put(registry, QV_KEY_WORKER, registry->who, FIELDS(fields),
                    registry->options.lease_ms);
}

/* --- pruning --------------------------------------------------------------------------------- */

static void on_stale_key(qv_registry *registry, const char *key, size_t size, void *user)
{
    (void)user;
    if (!qv_mirror_holds(registry->mirror, key, size))
        qv_redis_commandf(registry->redis, NULL, NULL, "DEL %b", key, size);
}

static void on_pruned(qv_registry *registry, qv_status status, void *user)
{
    (void)registry, (void)user;
    if (status == QV_ERR_STATE)
        qv_warn("cannot prune stale keys: %s", qv_error());
}

/* Only for the one broker: another one's records are not stale. */
static void on_brokers_to_prune(qv_status status, const qv_broker_address *brokers, size_t n,
                                void *user)
{
    qv_registry *registry = user;
    for (size_t i = 0; i < n; i++)
        if (strcmp(brokers[i].id, registry->who) != 0)
            return;
    if (status != QV_OK)
        return;
    for (int kind = QV_KEY_ADAPTER; kind <= QV_KEY_PLACE; kind++)
        qv_key_scan_start(&(qv_key_scan){.registry = registry,
                                         .head = qv_registry_key_head(kind),
                                         .each = on_stale_key,
                                         .end = on_pruned});
}

void qv_registry_prune(qv_registry *registry)
{
    qv_registry_find_brokers(registry, on_brokers_to_prune, registry);
}
