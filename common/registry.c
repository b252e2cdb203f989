#include "common/clock.h"
#include "common/log.h"
#include "common/protocol.h"
#include "common/registry_internal.h"

#include <czmq.h>
#include <stdlib.h>
#include <string.h>

enum {
    TICK_MS = 100,
    RETRY_MS = 1000,
    CHECK_MS = 30000, /* between looks at whether our hashes are complete */
};

/* --- keys ------------------------------------------------------------------------------------ */

static const char *const key_heads[] = {
    [QV_KEY_WANT] = QV_REGISTRY_PREFIX "want:",
    [QV_KEY_TENANT] = QV_REGISTRY_PREFIX "tenant:",
    [QV_KEY_DRAIN] = QV_REGISTRY_PREFIX "drain:",
    [QV_KEY_ADAPTER] = QV_REGISTRY_PREFIX "adapter:",
    [QV_KEY_PLACE] = QV_REGISTRY_PREFIX "place:",
    [QV_KEY_WORKER] = QV_REGISTRY_PREFIX "worker:",
    [QV_KEY_BROKER] = QV_REGISTRY_PREFIX "broker:",
    [QV_KEY_EVENTS] = QV_REGISTRY_PREFIX "events",
    [QV_KEY_SCHEMA] = QV_REGISTRY_PREFIX "schema",
    [QV_KEY_DOC] = QV_REGISTRY_PREFIX "doc",
};

const char *qv_registry_key_head(qv_key_kind kind)
{
    return key_heads[kind];
}

const char *qv_registry_key(char *key, qv_key_kind kind, const char *name)
{
    snprintf(key, QV_REGISTRY_MAX_KEY, "%s%s", key_heads[kind],
             kind < QV_KEY_EVENTS && name != NULL ? name : "");
    return key;
}

/* --- functions ------------------------------------------------------------------------------- */

static void on_functions(qv_status status, const redisReply *reply, void *user)
{
    (void)reply, (void)user;
    if (status == QV_ERR_STATE)
        qv_info("redis: no functions (%s); quiver_move and the like cannot be called", qv_error());
}

static void load_functions(qv_registry *registry)
{
    const char *argv[] = {"FUNCTION", "LOAD", "REPLACE", registry->options.functions};
    qv_redis_command(registry->redis, 4, argv, NULL, on_functions, registry);
}

/* --- life ------------------------------------------------------------------------------------ */

static void on_up(void *user)
{
    qv_registry *registry = user;
    const char *evicts = qv_redis_evicts(registry->redis);
    if (evicts != NULL)
        qv_warn("redis: maxmemory-policy is %s, so Redis may drop what is wanted; use noeviction",
                evicts);
    registry->synced = registry->scanning = registry->scan_again = registry->confirming = false;
    qv_mirror_resend(registry->mirror);
    qv_registry_send_events(registry);
    if (registry->options.watch) {
        qv_registry_write_doc(registry);
        if (registry->options.functions != NULL)
            load_functions(registry);
        qv_registry_ask_for_notifications(registry);
    }
    if (registry->options.up != NULL)
        registry->options.up(registry->options.user);
    qv_registry_scan(registry);
}

static void on_down(const char *reason, void *user)
{
    qv_registry *registry = user;
    registry->synced = registry->scanning = false;
    registry->prune_ms = 0;
    if (registry->options.down != NULL)
        registry->options.down(reason, registry->options.user);
}

/* True once each time that *due has come; the next time is `period` later. */
static bool is_due(uint64_t *due, uint64_t now, uint64_t period)
{
    if (now < *due)
        return false;
    *due = now + period;
    return true;
}

static int on_tick(zloop_t *loop, int timer_id, void *arg)
{
    (void)loop, (void)timer_id;
    qv_registry *registry = arg;
    uint64_t now = qv_now_ms();
    if (!qv_redis_is_up(registry->redis))
        return 0;
    if (!registry->scanning && now >= registry->scan_ms)
        qv_registry_scan(registry);
    if (is_due(&registry->renew_ms, now, (uint64_t)registry->options.lease_ms / 3))
        qv_mirror_renew(registry->mirror);
    if (is_due(&registry->retry_ms, now, RETRY_MS)) {
        qv_mirror_retry(registry->mirror);
        qv_registry_send_events(registry);
    }
    if (is_due(&registry->check_ms, now, CHECK_MS))
        qv_mirror_check(registry->mirror);
    if (registry->prune_ms != 0 && now >= registry->prune_ms) {
        registry->prune_ms = 0;
        qv_registry_prune(registry);
    }
    return 0;
}

qv_status qv_registry_new(zloop_t *loop, const qv_registry_options *options, qv_registry **out)
{
    if (options->who == NULL || qv_check_id(options->who, strlen(options->who)) != QV_OK)
        return qv_fail_prefix(QV_ERR_ARG, "who");
    qv_registry *registry = calloc(1, sizeof *registry);
    if (registry == NULL)
        return qv_fail(QV_ERR_NOMEM, "out of memory for a registry");
    registry->loop = loop;
    registry->timer_id = -1;
    registry->options = *options;
    registry->options.url = registry->options.who = NULL; /* theirs */
    if (options->scan_ms <= 0)
        registry->options.scan_ms = 2000;
    if (options->lease_ms <= 0)
        registry->options.lease_ms = 6000;
    if (options->prune_ms <= 0)
        registry->options.prune_ms = 10000;
    registry->events_end = &registry->events;
    registry->who = strdup(options->who);
    bool has_maps = true;
    for (qv_watch_kind kind = 0; kind < QV_WATCH_COUNT; kind++)
        has_maps = (registry->wants[kind] = qv_map_new(0)) != NULL && has_maps;

    qv_status status = QV_OK;
    qv_redis_options redis = {.url = options->url,
                              .name = options->who,
                              .on_up = on_up,
                              .on_down = on_down,
                              .user = registry};
    char pattern[64];
    if (registry->who == NULL || !has_maps)
        status = qv_fail(QV_ERR_NOMEM, "out of memory for a registry");
    if (status == QV_OK)
        status = qv_redis_new(loop, &redis, &registry->redis);
    if (status == QV_OK)
        status = qv_mirror_new(registry->redis, &registry->mirror);
    if (status == QV_OK && options->watch) {
        for (qv_watch_kind kind = 0; kind < QV_WATCH_COUNT && status == QV_OK; kind++) {
            snprintf(pattern, sizeof pattern, "__keyspace@%d__:%s*", qv_redis_db(registry->redis),
                     qv_watch_head(kind));
            status =
                qv_redis_subscribe(registry->redis, pattern, qv_registry_on_notification, registry);
        }
    }
    if (status == QV_OK &&
        (registry->timer_id = zloop_timer(loop, TICK_MS, 0, on_tick, registry)) < 0)
        status = qv_fail(QV_ERR_NOMEM, "the loop takes no more timers");
    if (status != QV_OK) {
        qv_registry_free(registry);
        return status;
    }
    *out = registry;
    return QV_OK;
}

void qv_registry_free(qv_registry *registry)
{
    if (registry == NULL)
        return;
    registry->closing = true;
    if (registry->timer_id >= 0)
        zloop_timer_end(registry->loop, registry->timer_id);
    qv_redis_free(registry->redis);
    qv_mirror_free(registry->mirror);
    for (qv_watch_kind kind = 0; kind < QV_WATCH_COUNT; kind++)
        qv_map_free(registry->wants[kind], qv_want_entry_free);
    qv_registry_free_events(registry);
    free(registry->who);
    free(registry);
}

typedef struct {
    void (*done)(void *user);
    void *user;
} leaving;

static void on_left(qv_status status, const redisReply *reply, void *user)
{
    (void)status, (void)reply;
    leaving *l = user;
    if (l->done != NULL)
        l->done(l->user);
    free(l);
}

void qv_registry_leave(qv_registry *registry, void (*done)(void *user), void *user)
{
    char worker[QV_REGISTRY_MAX_KEY], broker[QV_REGISTRY_MAX_KEY];
    leaving *l = malloc(sizeof *l);
    if (l == NULL) {
        if (done != NULL)
            done(user);
        return;
    }
    *l = (leaving){.done = done, .user = user};
    qv_registry_put(registry, QV_KEY_WORKER, registry->who, NULL, 0, 0);
    qv_registry_put(registry, QV_KEY_BROKER, registry->who, NULL, 0, 0);
    registry->left = true;
    qv_redis_commandf(registry->redis, on_left, l, "DEL %s %s",
                      qv_registry_key(worker, QV_KEY_WORKER, registry->who),
                      qv_registry_key(broker, QV_KEY_BROKER, registry->who));
}

bool qv_registry_is_up(const qv_registry *registry)
{
    return qv_redis_is_up(registry->redis);
}
