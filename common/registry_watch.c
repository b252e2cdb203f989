/* What is wanted (quiver:want, tenant and drain: kinds of one machine) is known by scans of the key
 * space: every scan_ms, whenever the link came up, and whenever a keyspace notification hints at a
 * deletion. Notifications of changes only fetch the one hash, so that an HSET acts within
 * milliseconds; with notifications refused by the server all still works, a scan later. A deletion
 * is only ever concluded at the end of a scan, after a look at quiver:schema, which tells an
 * operator's DEL from a data set that was flushed or replaced.
 */
#include "common/clock.h"
#include "common/log.h"
#include "common/registry_internal.h"

#include <stdlib.h>
#include <string.h>

enum { SCAN_SHARE = 10 }; /* scanning takes at most a tenth of the time */

static const char doc[] =
    "Quiver keeps here what people want and what is, as text to be read and edited.\n"
    "\n"
    "quiver:want:<adapter>     hash, yours: path (folder of the adapter), replicas (at least;\n"
    "                          default 1; 0 = on demand), max_replicas (0 = as demand asks), pin\n"
    "                          (0/1), workers, tenants (lists), split (adapters with weights that\n"
    "                          requests for this name go to: v1=95 v2=5). HSET acts at once, DEL\n"
    "                          unloads the adapter everywhere.\n"
    "quiver:tenant:<name>      hash, yours: weight (share of the pool), max_queued, max_running.\n"
    "quiver:drain:<id>         hash, yours: a worker or broker that takes nothing new; any field,\n"
    "                          why say. DEL ends it.\n"
    "quiver:adapter:<adapter>  hash, broker: state, rank, digest, bytes, replicas and, when it is\n"
    "                          not as wanted, reason.\n"
    "quiver:place:<adapter>    hash, broker: worker id -> gpu, cpu or loading.\n"
    "quiver:worker:<id>        hash, worker, expires: model, slots, free pages, running, waiting.\n"
    "quiver:broker:<id>        hash, broker, expires: frontend and backend to connect to.\n"
    "quiver:events             stream: who did what and why. XREVRANGE quiver:events + - COUNT 20\n"
    "quiver:schema             version of these keys. Leave it: its absence says that data was\n"
    "                          lost, and what was wanted is then written back.\n"
    "\n"
    "HSET quiver:want:sql path /adapters/sql replicas 2\n"
    "HGETALL quiver:adapter:sql\n"
    "DEL quiver:want:sql\n"
    "FCALL quiver_move 0 sql w1 w2    FCALL quiver_drain 0 w1    FCALL quiver_pin 0 sql\n"
    "FCALL quiver_split 0 sql v1 95 v2 5    FCALL quiver_help 0\n";

/* --- the end of a scan ----------------------------------------------------------------------- */

static void scan_finished(qv_registry *registry)
{
    uint64_t now = qv_now_ms();
    uint64_t pause = (now - registry->scan_began_ms) * SCAN_SHARE;
    if (pause < (uint64_t)registry->options.scan_ms)
        pause = (uint64_t)registry->options.scan_ms;
    registry->scanning = false;
    registry->scan_ms = registry->scan_again ? now : now + pause;
    registry->scan_again = false;
}

/* What is wanted is known and comes from this server. */
static void wants_synced(qv_registry *registry)
{
    snprintf(registry->run_id, sizeof registry->run_id, "%s", qv_redis_run_id(registry->redis));
    scan_finished(registry);
    if (registry->synced)
        return;
    registry->synced = true;
    registry->prune_ms = qv_now_ms() + (uint64_t)registry->options.prune_ms;
    if (registry->options.synced != NULL)
        registry->options.synced(registry->options.user);
}

static void on_schema_set(qv_status status, const redisReply *reply, void *user)
{
    (void)reply;
    qv_registry *registry = user;
    if (status == QV_OK)
        registry->schema_seen = true;
    else if (status == QV_ERR_STATE)
        QV_LOG_EVERY(60000, 1, QV_LOG_WARN, NULL, "cannot write quiver:schema: %s", qv_error());
}

static void write_schema(qv_registry *registry)
{
    qv_redis_commandf(registry->redis, on_schema_set, registry, "SET %s %s NX",
                      qv_registry_key_head(QV_KEY_SCHEMA), QV_REGISTRY_SCHEMA);
}

void qv_registry_write_doc(qv_registry *registry)
{
    qv_redis_commandf(registry->redis, NULL, NULL, "SET %s %s NX", qv_registry_key_head(QV_KEY_DOC),
                      doc);
}

/* All wants were written back, or not. Without success nothing is concluded: the next scan finds
 * the same loss and tries again. */
static void restore_finished(qv_registry *registry)
{
    if (registry->restore_failed) {
        scan_finished(registry);
        return;
    }
    write_schema(registry);
    qv_registry_write_doc(registry);
    wants_synced(registry);
}

static void on_restored(qv_status status, const redisReply *reply, void *user)
{
    qv_registry *registry = user;
    bool failed = status != QV_OK || reply->type != REDIS_REPLY_ARRAY;
    for (size_t i = 0; !failed && i < reply->elements; i++)
        failed = reply->element[i]->type == REDIS_REPLY_ERROR;
    if (failed && !registry->closing)
        QV_LOG_EVERY(10000, 3, QV_LOG_ERROR, NULL, "cannot write a quiver:want back: %s",
                     status != QV_OK ? qv_error() : "refused");
    registry->restore_failed = registry->restore_failed || failed;
    if (--registry->restoring == 0 && !registry->closing && qv_redis_is_up(registry->redis))
        restore_finished(registry);
}

/* Write a lost want back, but nothing that people wrote meanwhile. */
static void restore_want(qv_registry *registry, qv_watch_kind kind, const char *name,
                         const qv_want_entry *entry)
{
    qv_redis *redis = registry->redis;
    registry->restoring++;
    if (qv_redis_room(redis) < entry->raw.n / 2 + 2) {
        on_restored(qv_fail(QV_ERR_BUSY, "too many commands without an answer"), NULL, registry);
        return;
    }
    qv_redis_commandf(redis, NULL, NULL, "MULTI");
    for (size_t i = 0; i + 1 < entry->raw.n; i += 2)
        qv_redis_commandf(redis, NULL, NULL, "HSETNX %s%s %b %b", qv_watch_head(kind), name,
                          entry->raw.data[i], entry->raw.sizes[i], entry->raw.data[i + 1],
                          entry->raw.sizes[i + 1]);
    qv_redis_commandf(redis, on_restored, registry, "EXEC");
    qv_registry_event(registry, "want_restored", kind == QV_WATCH_WANT ? name : NULL, NULL,
                      "the data set was lost: %s%s is written back", qv_watch_head(kind), name);
}

static void restore_wants(qv_registry *registry, size_t n_missing)
{
    qv_warn("redis: the data set was lost; writing back %zu wants and all that is published",
            n_missing);
    qv_registry_event(registry, "data_lost", NULL, NULL, "%zu wants are written back", n_missing);
    qv_mirror_resend(registry->mirror);
    registry->restore_failed = false;
    registry->restoring = 1; /* until all are sent */
    for (qv_watch_kind kind = 0; kind < QV_WATCH_COUNT; kind++)
        QV_MAP_EACH(registry->wants[kind], slot)
        {
            const qv_want_entry *entry = slot->value;
            if (entry->seen != registry->scan && entry->raw.n > 0)
                restore_want(registry, kind, slot->key, entry);
        }
    if (--registry->restoring == 0)
        restore_finished(registry);
}

/* What was in force is not wanted any more. */
static void report_deleted(qv_registry *registry, qv_watch_kind kind, const char *name)
{
    const qv_registry_options *options = &registry->options;
    if (kind == QV_WATCH_WANT && options->want_changed != NULL)
        options->want_changed(name, NULL, options->user);
    if (kind == QV_WATCH_TENANT && options->tenant_changed != NULL)
        options->tenant_changed(name, NULL, options->user);
    if (kind == QV_WATCH_DRAIN && options->drain_changed != NULL)
        options->drain_changed(name, false, options->user);
}

static void delete_missing(qv_registry *registry)
{
    for (qv_watch_kind kind = 0; kind < QV_WATCH_COUNT; kind++)
        QV_MAP_EACH(registry->wants[kind], slot)
        {
            qv_want_entry *entry = slot->value;
            char shown[QV_ADAPTER_NAME_MAX + 1];
            if (entry->seen == registry->scan || entry->fetching)
                continue;
            bool is_text = kind == QV_WATCH_TENANT && slot->key_size < sizeof shown;
            if (is_text) /* a tenant's name may have blanks */
                snprintf(shown, sizeof shown, "%.*s", (int)slot->key_size, slot->key);
            else
                qv_printable(slot->key, slot->key_size, shown, sizeof shown);
            qv_want_entry_free(qv_map_remove_entry(registry->wants[kind], slot));
            report_deleted(registry, kind, shown);
        }
}

/* All hashes of this scan were applied: conclude what is missing, and why. */
static void conclude(qv_registry *registry, bool has_schema)
{
    const char *run_id = qv_redis_run_id(registry->redis);
    bool other_server = registry->run_id[0] != 0 && strcmp(registry->run_id, run_id) != 0;
    size_t n_known = 0, n_missing = 0;
    for (qv_watch_kind kind = 0; kind < QV_WATCH_COUNT; kind++)
        QV_MAP_EACH(registry->wants[kind], slot)
        {
            const qv_want_entry *entry = slot->value;
            n_known += entry->born < registry->scan;
            n_missing += entry->seen != registry->scan;
        }
    bool lost = !has_schema && registry->schema_seen;
    if (lost && !registry->confirming) { /* the scan may have begun before the loss */
        registry->confirming = true;
        registry->scanning = false;
        qv_registry_scan(registry);
        return;
    }
    registry->confirming = false;
    lost = lost || (other_server && n_known > 0 && n_missing == n_known);
    if (lost) {
        restore_wants(registry, n_missing);
        return;
    }
    if (has_schema)
        registry->schema_seen = true;
    else
        write_schema(registry);
    delete_missing(registry);
    wants_synced(registry);
}

static void on_schema(qv_status status, const redisReply *reply, void *user)
{
    qv_registry *registry = user;
    if (status == QV_OK && reply->type == REDIS_REPLY_STRING &&
        strcmp(reply->str, QV_REGISTRY_SCHEMA) != 0)
        QV_LOG_EVERY(60000, 1, QV_LOG_WARN, NULL, "quiver:schema is '%.32s', this program knows %s",
                     reply->str, QV_REGISTRY_SCHEMA);
    if (status == QV_OK && !registry->scan_failed) {
        conclude(registry, reply->type != REDIS_REPLY_NIL);
        return;
    }
    if (status == QV_ERR_STATE)
        QV_LOG_EVERY(60000, 1, QV_LOG_WARN, NULL, "cannot read quiver:schema: %s", qv_error());
    scan_finished(registry);
}

static void on_want_key(qv_registry *registry, const char *key, size_t size, void *user)
{
    (void)user;
    size_t head = strlen(qv_watch_head(registry->scan_kind));
    if (size >= head)
        qv_registry_fetch_want(registry, registry->scan_kind, key + head, size - head, false);
}

static void scan_kind(qv_registry *registry, qv_watch_kind kind);

/* All keys of a kind are known and their HGETALLs are on the way: the next kind, and behind the
 * last one GET, which is answered behind them. */
static void on_want_keys(qv_registry *registry, qv_status status, void *user)
{
    (void)user;
    if (status == QV_OK && registry->scan_kind + 1 < QV_WATCH_COUNT) {
        scan_kind(registry, registry->scan_kind + 1);
        return;
    }
    if (status == QV_OK) {
        qv_redis_commandf(registry->redis, on_schema, registry, "GET %s",
                          qv_registry_key_head(QV_KEY_SCHEMA));
        return;
    }
    if (status == QV_ERR_STATE)
        QV_LOG_EVERY(60000, 1, QV_LOG_WARN, NULL, "cannot scan %s: %s",
                     qv_watch_head(registry->scan_kind), qv_error());
    scan_finished(registry);
}

static void scan_kind(qv_registry *registry, qv_watch_kind kind)
{
    registry->scan_kind = kind;
    qv_key_scan_start(&(qv_key_scan){.registry = registry,
                                     .head = qv_watch_head(kind),
                                     .each = on_want_key,
                                     .end = on_want_keys});
}

void qv_registry_scan(qv_registry *registry)
{
    if (registry->scanning) {
        registry->scan_again = true;
        return;
    }
    if (!qv_redis_is_up(registry->redis) || !registry->options.watch)
        return;
    registry->scanning = true;
    registry->scan_failed = false;
    registry->scan++;
    registry->scan_began_ms = qv_now_ms();
    scan_kind(registry, QV_WATCH_WANT);
}

/* --- notifications --------------------------------------------------------------------------- */

static void on_notify_set(qv_status status, const redisReply *reply, void *user)
{
    (void)reply, (void)user;
    if (status == QV_ERR_STATE)
        qv_info("redis: no keyspace notifications (%s); changes are found by scanning", qv_error());
}

/* Add what we need to the flags that are set: K, keyspace channels; g, DEL and the like; h, hashes;
 * x, expiry. */
static void on_notify_flags(qv_status status, const redisReply *reply, void *user)
{
    qv_registry *registry = user;
    if (status != QV_OK || !qv_reply_is_hash(reply) || reply->elements < 2) {
        on_notify_set(status, reply, user);
        return;
    }
    const char *now = reply->element[1]->str;
    char flags[64];
    int used = snprintf(flags, sizeof flags, "%.48s", now);
    bool all = strchr(now, 'A') != NULL;
    for (const char *need = "Kghx"; *need != 0; need++)
        if (strchr(now, *need) == NULL && (*need == 'K' || !all))
            flags[used++] = *need;
    flags[used] = 0;
    if (strcmp(flags, now) != 0)
        qv_redis_commandf(registry->redis, on_notify_set, registry,
                          "CONFIG SET notify-keyspace-events %s", flags);
}

void qv_registry_ask_for_notifications(qv_registry *registry)
{
    qv_redis_commandf(registry->redis, on_notify_flags, registry,
                      "CONFIG GET notify-keyspace-events");
}

/* __keyspace@0__:quiver:want:<name>, with the event as payload. NULL: the subscription holds since
 * now, so whatever happened before went unnoticed. */
void qv_registry_on_notification(const char *channel, const char *payload, size_t payload_size,
                                 void *user)
{
    (void)payload, (void)payload_size;
    qv_registry *registry = user;
    for (qv_watch_kind kind = 0; channel != NULL && kind < QV_WATCH_COUNT; kind++) {
        const char *key = strstr(channel, "__:");
        size_t head = strlen(qv_watch_head(kind));
        if (key == NULL || strncmp(key + 3, qv_watch_head(kind), head) != 0)
            continue;
        if (qv_redis_is_up(registry->redis))
            qv_registry_fetch_want(registry, kind, key + 3 + head, strlen(key + 3 + head), true);
        return;
    }
    qv_registry_scan(registry);
}
