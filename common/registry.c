/* What is wanted (quiver:want, tenant and drain: kinds of one machine) is known by scans of the key
 * space: every scan_ms, whenever the link came up, and
 * whenever a keyspace notification hints at a deletion. Notifications of changes only fetch the one
 * hash, so that an HSET acts within milliseconds; with notifications refused by the server all
 * still works, a scan later. A deletion is only ever concluded at the end of a scan, after a look
 * at quiver:schema, which tells an operator's DEL from a data set that was flushed or replaced.
 */
#include "common/registry.h"

#include "common/clock.h"
#include "common/log.h"
#include "common/map.h"
#include "common/mirror.h"
#include "common/protocol.h"
#include "common/redis.h"
#include "common/utf8.h"

#include <czmq.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum {
    TICK_MS = 100,
    RETRY_MS = 1000,
    CHECK_MS = 30000,     /* between looks at whether our hashes are complete */
    SCAN_SHARE = 10,      /* scanning takes at most a tenth of the time */
    MAX_WANTS = 65536,    /* more are ignored, with a line in the log */
    MAX_EVENTS = 1000,    /* kept while Redis is down */
    EVENT_STREAM = 10000, /* entries of quiver:events, about */
    WHY_MAX = 512,
    RUN_ID_MAX = 64
};

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

/* A hash as Redis had it: name, value, name, value ... */
typedef struct {
    size_t n; /* words */
    char **data;
    size_t *sizes;
} words;

/* What people write. */
typedef enum { WATCH_WANT, WATCH_TENANT, WATCH_DRAIN, WATCH_COUNT } watch_kind;

static const qv_key_kind watch_keys[WATCH_COUNT] = {QV_KEY_WANT, QV_KEY_TENANT, QV_KEY_DRAIN};

typedef struct {
    words raw;            /* the hash last seen; to write it back after a loss */
    qv_want_box *want;    /* in force; NULL: none was ever valid. Of a WATCH_WANT */
    bool valid;           /* one is in force. Of the others */
    char *invalid;        /* why the hash last seen makes no sense; NULL: it does */
    uint64_t born, seen;  /* scans that saw it first and last */
    bool fetching, again; /* a fetch is under way; the hash changed since */
} want_entry;

typedef struct event {
    struct event *next;
    qv_registry *registry;
    char *what, *adapter, *worker, *why; /* adapter, worker may be NULL */
    uint64_t at_ms;
} event;

struct qv_registry {
    zloop_t *loop;
    int timer_id;
    qv_registry_options options;
    char *who;
    qv_redis *redis;
    qv_mirror *mirror; /* of all that we publish */
    bool closing, left;

    qv_map *wants[WATCH_COUNT]; /* name -> want_entry */
    watch_kind scan_kind;       /* what is scanned now */
    uint64_t scan;              /* number of the scan that runs or ran last */
    bool scanning;
    bool scan_failed; /* a hash could not be read, so nothing is concluded */
    bool scan_again;  /* asked for while one ran */
    bool confirming;  /* schema was gone: this scan lies wholly after that */
    bool synced;      /* since the link came up */
    bool schema_seen; /* quiver:schema was there, so its absence means a loss */
    size_t restoring; /* wants being written back */
    bool restore_failed;
    uint64_t scan_began_ms;
    char run_id[RUN_ID_MAX]; /* of the server that the wants in force come from */

    event *events, **events_end; /* not sent yet; oldest first */
    size_t n_events;

    uint64_t scan_ms, renew_ms, retry_ms, check_ms, prune_ms; /* when due next; prune 0 = never */
};

static void scan_wants(qv_registry *registry);

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

static const char *watch_head(watch_kind kind)
{
    return key_heads[watch_keys[kind]];
}

const char *qv_registry_key(char *key, qv_key_kind kind, const char *name)
{
    snprintf(key, QV_REGISTRY_MAX_KEY, "%s%s", key_heads[kind],
             kind < QV_KEY_EVENTS && name != NULL ? name : "");
    return key;
}

/* "?" for what would not print. out[size], cut to fit. */
static const char *printable(const char *text, size_t text_size, char *out, size_t size)
{
    size_t used = 0;
    for (size_t i = 0, n; i < text_size; i += n) {
        uint32_t code;
        n = qv_utf8_decode(text + i, text_size - i, &code);
        bool good = n > 0 && code > ' ' && (code < 0x7F || code > 0xA0);
        n = n > 0 ? n : 1;
        if (used + (good ? n : 1) >= size)
            break;
        memcpy(out + used, good ? text + i : "?", good ? n : 1);
        used += good ? n : 1;
    }
    out[used] = 0;
    return out;
}

/* Keys come from outside: any bytes, any length. */
static qv_status check_name(watch_kind kind, const char *name, size_t size)
{
    uint32_t capped = size < UINT32_MAX ? (uint32_t)size : UINT32_MAX;
    if (kind == WATCH_WANT)
        return qv_adapter_name_check((qv_str){.data = name, .size = capped});
    if (kind == WATCH_DRAIN)
        return qv_check_id(name, size);
    if (size > QV_ID_MAX || !qv_utf8_valid(name, size) || memchr(name, 0, size) != NULL)
        return qv_fail(QV_ERR_ARG, "a tenant's name is up to %d bytes of UTF-8", QV_ID_MAX);
    return QV_OK;
}

/* --- hashes ---------------------------------------------------------------------------------- */

static void words_free(words *w)
{
    for (size_t i = 0; i < w->n; i++)
        free(w->data[i]);
    free(w->data);
    free(w->sizes);
    *w = (words){0};
}

/* A copy of an array of strings; empty when out of memory. */
static words words_copy(const redisReply *reply)
{
    words w = {.data = calloc(reply->elements + 1, sizeof *w.data),
               .sizes = calloc(reply->elements + 1, sizeof *w.sizes)};
    for (size_t i = 0; w.data != NULL && w.sizes != NULL && i < reply->elements; i++) {
        w.sizes[i] = (size_t)reply->element[i]->len;
        if ((w.data[i] = malloc(w.sizes[i] + 1)) == NULL)
            break;
        memcpy(w.data[i], reply->element[i]->str, w.sizes[i]);
        w.data[i][w.sizes[i]] = 0;
        w.n++;
    }
    if (w.n < reply->elements)
        words_free(&w);
    return w;
}

static bool is_hash(const redisReply *reply)
{
    if (reply->type != REDIS_REPLY_ARRAY || reply->elements % 2 != 0)
        return false;
    for (size_t i = 0; i < reply->elements; i++)
        if (reply->element[i]->type != REDIS_REPLY_STRING)
            return false;
    return true;
}

static const char *hash_get(const redisReply *hash, const char *name)
{
    for (size_t i = 0; i + 1 < hash->elements; i += 2)
        if (strcmp(hash->element[i]->str, name) == 0)
            return hash->element[i + 1]->str;
    return NULL;
}

/* --- key scans ------------------------------------------------------------------------------- */

/* A walk over all keys of a pattern by SCAN, a page at a time. */
typedef struct {
    qv_registry *registry;
    const char *head; /* keys that start so */
    void (*each)(qv_registry *registry, const char *key, size_t size, void *user);
    void (*end)(qv_registry *registry, qv_status status, void *user);
    void *user;
} key_scan;

static void on_page(qv_status status, const redisReply *reply, void *user);

static void next_page(key_scan *scan, const char *cursor)
{
    qv_redis_commandf(scan->registry->redis, on_page, scan, "SCAN %s MATCH %s* COUNT 1000", cursor,
                      scan->head);
}

static void on_page(qv_status status, const redisReply *reply, void *user)
{
    key_scan *scan = user;
    if (status == QV_OK && (reply->type != REDIS_REPLY_ARRAY || reply->elements != 2 ||
                            reply->element[0]->type != REDIS_REPLY_STRING ||
                            reply->element[1]->type != REDIS_REPLY_ARRAY))
        status = qv_fail(QV_ERR_FORMAT, "redis: SCAN has no cursor and keys");
    if (status == QV_OK) {
        const redisReply *keys = reply->element[1];
        for (size_t i = 0; i < keys->elements; i++)
            if (keys->element[i]->type == REDIS_REPLY_STRING)
                scan->each(scan->registry, keys->element[i]->str, (size_t)keys->element[i]->len,
                           scan->user);
        if (strcmp(reply->element[0]->str, "0") != 0) {
            next_page(scan, reply->element[0]->str);
            return;
        }
    }
    scan->end(scan->registry, status, scan->user);
    free(scan);
}

static void scan_keys(const key_scan *what)
{
    key_scan *scan = malloc(sizeof *scan);
    if (scan == NULL) {
        what->end(what->registry, qv_fail(QV_ERR_NOMEM, "out of memory for a scan"), what->user);
        return;
    }
    *scan = *what;
    next_page(scan, "0");
}

/* --- events ---------------------------------------------------------------------------------- */

static void event_free(event *e)
{
    free(e->what);
    free(e->adapter);
    free(e->worker);
    free(e->why);
    free(e);
}

/* To the end of the queue; the oldest makes room. */
static void event_keep(qv_registry *registry, event *e)
{
    if (registry->n_events == MAX_EVENTS) {
        event *oldest = registry->events;
        registry->events = oldest->next;
        if (registry->events == NULL)
            registry->events_end = &registry->events;
        registry->n_events--;
        event_free(oldest);
    }
    e->next = NULL;
    *registry->events_end = e;
    registry->events_end = &e->next;
    registry->n_events++;
}

static void on_event(qv_status status, const redisReply *reply, void *user)
{
    (void)reply;
    event *e = user;
    if (status == QV_ERR_BUSY) {
        event_keep(e->registry, e); /* with the link; it may appear twice then, never not at all */
        return;
    }
    if (status == QV_ERR_STATE)
        QV_LOG_EVERY(10000, 1, QV_LOG_WARN, NULL, "cannot write quiver:events: %s", qv_error());
    event_free(e);
}

static void event_send(event *e)
{
    char key[QV_REGISTRY_MAX_KEY], limit[16], at[24];
    const char *argv[20];
    int argc = 0;
    snprintf(limit, sizeof limit, "%d", EVENT_STREAM);
    snprintf(at, sizeof at, "%" PRIu64, e->at_ms);
    const char *const head[] = {
        "XADD", qv_registry_key(key, QV_KEY_EVENTS, NULL), "MAXLEN", "~", limit, "*"};
    const char *const pairs[][2] = {{"who", e->registry->who}, {"what", e->what},
                                    {"adapter", e->adapter},   {"worker", e->worker},
                                    {"why", e->why},           {"at_ms", at}};
    for (size_t i = 0; i < sizeof head / sizeof *head; i++)
        argv[argc++] = head[i];
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        if (pairs[i][1] == NULL)
            continue;
        argv[argc++] = pairs[i][0];
        argv[argc++] = pairs[i][1];
    }
    qv_redis_command(e->registry->redis, argc, argv, NULL, on_event, e);
}

static void send_events(qv_registry *registry)
{
    size_t n = registry->n_events; /* those that fail come back to the end */
    while (n-- > 0 && qv_redis_room(registry->redis) > 0) {
        event *e = registry->events;
        registry->events = e->next;
        if (registry->events == NULL)
            registry->events_end = &registry->events;
        registry->n_events--;
        event_send(e);
    }
}

void qv_registry_event(qv_registry *registry, const char *what, const char *adapter,
                       const char *worker, const char *why, ...)
{
    char text[WHY_MAX];
    va_list args;
    va_start(args, why);
    vsnprintf(text, sizeof text, why, args);
    va_end(args);
    event *e = calloc(1, sizeof *e);
    if (e == NULL)
        return;
    *e = (event){.registry = registry,
                 .what = strdup(what),
                 .adapter = adapter != NULL ? strdup(adapter) : NULL,
                 .worker = worker != NULL ? strdup(worker) : NULL,
                 .why = strdup(text),
                 .at_ms = qv_wall_ms()};
    if (qv_redis_room(registry->redis) > 0)
        event_send(e);
    else
        event_keep(registry, e);
}

/* --- wants: one hash ------------------------------------------------------------------------- */

static void want_entry_free(void *value)
{
    want_entry *entry = value;
    words_free(&entry->raw);
    qv_want_free(entry->want);
    free(entry->invalid);
    free(entry);
}

static want_entry *require_want(qv_registry *registry, watch_kind kind, const char *name,
                                size_t size)
{
    qv_map *wants = registry->wants[kind];
    qv_map_entry *slot = qv_map_find(wants, name, size);
    if (slot != NULL)
        return slot->value;
    if (qv_map_count(wants) >= MAX_WANTS) {
        QV_LOG_EVERY(60000, 1, QV_LOG_ERROR, NULL, "more than %d %s keys, some are ignored",
                     MAX_WANTS, watch_head(kind));
        return NULL;
    }
    want_entry *entry = calloc(1, sizeof *entry);
    if (entry == NULL || qv_map_set(wants, name, size, entry) != QV_OK) {
        free(entry);
        return NULL;
    }
    entry->born = registry->scan;
    return entry;
}

/* The hash is invalid, once for the same reason. */
static void report_invalid(qv_registry *registry, watch_kind kind, want_entry *entry,
                           const char *name, size_t size, const char *reason)
{
    static const char *const whats[WATCH_COUNT] = {"want_invalid", "tenant_invalid",
                                                   "drain_invalid"};
    char shown[QV_ADAPTER_NAME_MAX + 1];
    if (entry->invalid != NULL && strcmp(entry->invalid, reason) == 0)
        return;
    char *copy = strdup(reason);
    free(entry->invalid);
    entry->invalid = copy;
    printable(name, size, shown, sizeof shown);
    qv_warn("%s%s is invalid: %s", watch_head(kind), shown, reason);
    if (kind == WATCH_WANT)
        qv_registry_event(registry, whats[kind], shown, NULL, "%s", reason);
    else
        qv_registry_event(registry, whats[kind], NULL, kind == WATCH_DRAIN ? shown : NULL,
                          "%s%s: %s", watch_head(kind), shown, reason);
    if (kind == WATCH_WANT && registry->options.want_invalid != NULL)
        registry->options.want_invalid(shown, reason, registry->options.user);
}

/* A valid want takes force. */
static void report_want(qv_registry *registry, want_entry *entry, const char *name,
                        qv_want_box *want)
{
    bool changed = entry->want == NULL || entry->invalid != NULL ||
                   !qv_want_equal(qv_want_get(entry->want), qv_want_get(want));
    qv_want_free(entry->want);
    free(entry->invalid);
    entry->invalid = NULL;
    entry->want = want;
    if (changed && registry->options.want_changed != NULL)
        registry->options.want_changed(name, qv_want_get(want), registry->options.user);
}

/* A valid hash of another kind takes force. */
static void report_setting(qv_registry *registry, watch_kind kind, want_entry *entry,
                           const char *name, const qv_tenant_want *tenant, bool is_same)
{
    const qv_registry_options *options = &registry->options;
    bool changed = !entry->valid || entry->invalid != NULL || !is_same;
    free(entry->invalid);
    entry->invalid = NULL;
    entry->valid = true;
    if (changed && kind == WATCH_TENANT && options->tenant_changed != NULL)
        options->tenant_changed(name, tenant, options->user);
    if (changed && kind == WATCH_DRAIN && options->drain_changed != NULL)
        options->drain_changed(name, true, options->user);
}

static bool same_words(const words *w, const redisReply *hash)
{
    for (size_t i = 0; w->n == hash->elements && i < w->n; i++)
        if (w->sizes[i] != (size_t)hash->element[i]->len ||
            memcmp(w->data[i], hash->element[i]->str, w->sizes[i]) != 0)
            return false;
    return w->n == hash->elements;
}

/* Redis has this hash for a name. */
static void apply_hash(qv_registry *registry, watch_kind kind, const char *name, size_t size,
                       const redisReply *hash)
{
    want_entry *entry = require_want(registry, kind, name, size);
    qv_want_field *fields = calloc(hash->elements / 2 + 1, sizeof *fields);
    qv_want_box *want = NULL;
    if (entry == NULL || fields == NULL) {
        free(fields);
        return;
    }
    for (size_t i = 0; i < hash->elements / 2; i++)
        fields[i] = (qv_want_field){.name = hash->element[2 * i]->str,
                                    .name_size = (size_t)hash->element[2 * i]->len,
                                    .value = hash->element[2 * i + 1]->str,
                                    .value_size = (size_t)hash->element[2 * i + 1]->len};
    bool is_same = same_words(&entry->raw, hash);
    qv_tenant_want tenant;
    entry->seen = registry->scan;
    words_free(&entry->raw);
    entry->raw = words_copy(hash);
    if (kind == WATCH_WANT && qv_want_parse(fields, hash->elements / 2, &want) == QV_OK)
        report_want(registry, entry, name, want);
    else if (kind == WATCH_DRAIN ||
             (kind == WATCH_TENANT &&
              qv_tenant_want_parse(fields, hash->elements / 2, &tenant) == QV_OK))
        report_setting(registry, kind, entry, name, &tenant, is_same);
    else
        report_invalid(registry, kind, entry, name, size, qv_error());
    free(fields);
}

/* A HGETALL of a want under way. */
typedef struct {
    qv_registry *registry;
    watch_kind kind;
    bool hinted; /* by a notification, not as part of a scan */
    size_t size;
    char name[];
} want_fetch;

static void fetch_want(qv_registry *registry, watch_kind kind, const char *name, size_t size,
                       bool hinted);

static void on_want(qv_status status, const redisReply *reply, void *user)
{
    want_fetch *fetch = user;
    qv_registry *registry = fetch->registry;
    watch_kind kind = fetch->kind;
    want_entry *entry = qv_map_get(registry->wants[kind], fetch->name, fetch->size);
    bool again = fetch->hinted && entry != NULL && entry->again;
    if (fetch->hinted && entry != NULL)
        entry->fetching = entry->again = false;

    if (status == QV_ERR_STATE) { /* a key of another type */
        char reason[WHY_MAX];
        snprintf(reason, sizeof reason, "it cannot be read as a hash (%s)", reply->str);
        entry = require_want(registry, kind, fetch->name, fetch->size);
        if (entry != NULL) {
            entry->seen = registry->scan;
            report_invalid(registry, kind, entry, fetch->name, fetch->size, reason);
        }
    } else if (status == QV_OK && is_hash(reply) && reply->elements > 0) {
        apply_hash(registry, kind, fetch->name, fetch->size, reply);
    } else if (status == QV_OK && fetch->hinted && entry != NULL) {
        scan_wants(registry); /* it is gone: why, is for a scan to say */
    } else if (status != QV_OK) {
        registry->scan_failed = true;
    }
    if (again && status != QV_ERR_CANCELLED)
        fetch_want(registry, kind, fetch->name, fetch->size, true);
    free(fetch);
}

/* Read one hash and apply it. The name is that of a key, so it may be anything. */
static void fetch_want(qv_registry *registry, watch_kind kind, const char *name, size_t size,
                       bool hinted)
{
    want_entry *entry;
    if (check_name(kind, name, size) != QV_OK) {
        char reason[QV_ERROR_MAX];
        snprintf(reason, sizeof reason, "%s", qv_error());
        if (!hinted && (entry = require_want(registry, kind, name, size)) != NULL) {
            entry->seen = registry->scan;
            report_invalid(registry, kind, entry, name, size, reason);
        }
        return;
    }
    entry = qv_map_get(registry->wants[kind], name, size);
    if (hinted && entry != NULL && entry->fetching) {
        entry->again = true;
        return;
    }
    want_fetch *fetch = malloc(sizeof *fetch + size + 1);
    if (fetch == NULL) {
        registry->scan_failed = true;
        return;
    }
    *fetch = (want_fetch){.registry = registry, .kind = kind, .hinted = hinted, .size = size};
    memcpy(fetch->name, name, size);
    fetch->name[size] = 0;
    if (hinted && entry != NULL)
        entry->fetching = true;
    qv_redis_commandf(registry->redis, on_want, fetch, "HGETALL %s%b", watch_head(kind),
                      fetch->name, fetch->size);
}

/* --- wants: the end of a scan ---------------------------------------------------------------- */

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
                      key_heads[QV_KEY_SCHEMA], QV_REGISTRY_SCHEMA);
}

static void write_doc(qv_registry *registry)
{
    qv_redis_commandf(registry->redis, NULL, NULL, "SET %s %s NX", key_heads[QV_KEY_DOC], doc);
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
    write_doc(registry);
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
static void restore_want(qv_registry *registry, watch_kind kind, const char *name,
                         const want_entry *entry)
{
    qv_redis *redis = registry->redis;
    registry->restoring++;
    if (qv_redis_room(redis) < entry->raw.n / 2 + 2) {
        on_restored(qv_fail(QV_ERR_BUSY, "too many commands without an answer"), NULL, registry);
        return;
    }
    qv_redis_commandf(redis, NULL, NULL, "MULTI");
    for (size_t i = 0; i + 1 < entry->raw.n; i += 2)
        qv_redis_commandf(redis, NULL, NULL, "HSETNX %s%s %b %b", watch_head(kind), name,
                          entry->raw.data[i], entry->raw.sizes[i], entry->raw.data[i + 1],
                          entry->raw.sizes[i + 1]);
    qv_redis_commandf(redis, on_restored, registry, "EXEC");
    qv_registry_event(registry, "want_restored", kind == WATCH_WANT ? name : NULL, NULL,
                      "the data set was lost: %s%s is written back", watch_head(kind), name);
}

static void restore_wants(qv_registry *registry, size_t n_missing)
{
    qv_warn("redis: the data set was lost; writing back %zu wants and all that is published",
            n_missing);
    qv_registry_event(registry, "data_lost", NULL, NULL, "%zu wants are written back", n_missing);
    qv_mirror_resend(registry->mirror);
    registry->restore_failed = false;
    registry->restoring = 1; /* until all are sent */
    for (watch_kind kind = 0; kind < WATCH_COUNT; kind++)
        QV_MAP_EACH(registry->wants[kind], slot)
        {
            const want_entry *entry = slot->value;
            if (entry->seen != registry->scan && entry->raw.n > 0)
                restore_want(registry, kind, slot->key, entry);
        }
    if (--registry->restoring == 0)
        restore_finished(registry);
}

/* What was in force is not wanted any more. */
static void report_deleted(qv_registry *registry, watch_kind kind, const char *name)
{
    const qv_registry_options *options = &registry->options;
    if (kind == WATCH_WANT && options->want_changed != NULL)
        options->want_changed(name, NULL, options->user);
    if (kind == WATCH_TENANT && options->tenant_changed != NULL)
        options->tenant_changed(name, NULL, options->user);
    if (kind == WATCH_DRAIN && options->drain_changed != NULL)
        options->drain_changed(name, false, options->user);
}

static void delete_missing(qv_registry *registry)
{
    for (watch_kind kind = 0; kind < WATCH_COUNT; kind++)
        QV_MAP_EACH(registry->wants[kind], slot)
        {
            want_entry *entry = slot->value;
            char shown[QV_ADAPTER_NAME_MAX + 1];
            if (entry->seen == registry->scan || entry->fetching)
                continue;
            bool is_text = kind == WATCH_TENANT && slot->key_size < sizeof shown;
            if (is_text) /* a tenant's name may have blanks */
                snprintf(shown, sizeof shown, "%.*s", (int)slot->key_size, slot->key);
            else
                printable(slot->key, slot->key_size, shown, sizeof shown);
            want_entry_free(qv_map_remove_entry(registry->wants[kind], slot));
            report_deleted(registry, kind, shown);
        }
}

/* All hashes of this scan were applied: conclude what is missing, and why. */
static void conclude(qv_registry *registry, bool has_schema)
{
    const char *run_id = qv_redis_run_id(registry->redis);
    bool other_server = registry->run_id[0] != 0 && strcmp(registry->run_id, run_id) != 0;
    size_t n_known = 0, n_missing = 0;
    for (watch_kind kind = 0; kind < WATCH_COUNT; kind++)
        QV_MAP_EACH(registry->wants[kind], slot)
        {
            const want_entry *entry = slot->value;
            n_known += entry->born < registry->scan;
            n_missing += entry->seen != registry->scan;
        }
    bool lost = !has_schema && registry->schema_seen;
    if (lost && !registry->confirming) { /* the scan may have begun before the loss */
        registry->confirming = true;
        registry->scanning = false;
        scan_wants(registry);
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
    size_t head = strlen(watch_head(registry->scan_kind));
    if (size >= head)
        fetch_want(registry, registry->scan_kind, key + head, size - head, false);
}

static void scan_kind(qv_registry *registry, watch_kind kind);

/* All keys of a kind are known and their HGETALLs are on the way: the next kind, and behind the
 * last one GET, which is answered behind them. */
static void on_want_keys(qv_registry *registry, qv_status status, void *user)
{
    (void)user;
    if (status == QV_OK && registry->scan_kind + 1 < WATCH_COUNT) {
        scan_kind(registry, registry->scan_kind + 1);
        return;
    }
    if (status == QV_OK) {
        qv_redis_commandf(registry->redis, on_schema, registry, "GET %s", key_heads[QV_KEY_SCHEMA]);
        return;
    }
    if (status == QV_ERR_STATE)
        QV_LOG_EVERY(60000, 1, QV_LOG_WARN, NULL, "cannot scan %s: %s",
                     watch_head(registry->scan_kind), qv_error());
    scan_finished(registry);
}

static void scan_kind(qv_registry *registry, watch_kind kind)
{
    registry->scan_kind = kind;
    scan_keys(&(key_scan){
        .registry = registry, .head = watch_head(kind), .each = on_want_key, .end = on_want_keys});
}

static void scan_wants(qv_registry *registry)
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
    scan_kind(registry, WATCH_WANT);
}

void qv_registry_scan(qv_registry *registry)
{
    scan_wants(registry);
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
    if (status != QV_OK || !is_hash(reply) || reply->elements < 2) {
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

/* __keyspace@0__:quiver:want:<name>, with the event as payload. NULL: the subscription holds since
 * now, so whatever happened before went unnoticed. */
static void on_notification(const char *channel, const char *payload, size_t payload_size,
                            void *user)
{
    (void)payload, (void)payload_size;
    qv_registry *registry = user;
    for (watch_kind kind = 0; channel != NULL && kind < WATCH_COUNT; kind++) {
        const char *key = strstr(channel, "__:");
        size_t head = strlen(watch_head(kind));
        if (key == NULL || strncmp(key + 3, watch_head(kind), head) != 0)
            continue;
        if (qv_redis_is_up(registry->redis))
            fetch_want(registry, kind, key + 3 + head, strlen(key + 3 + head), true);
        return;
    }
    scan_wants(registry);
}

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

static void put(qv_registry *registry, qv_key_kind kind, const char *name,
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
        put(registry, QV_KEY_ADAPTER, name, NULL, 0, 0);
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
    put(registry, QV_KEY_ADAPTER, name, FIELDS(fields), 0);
}

void qv_registry_put_place(qv_registry *registry, const char *adapter, const qv_place_row *rows,
                           size_t n)
{
    qv_mirror_field *fields = calloc(n + 1, sizeof *fields);
    if (fields == NULL)
        return;
    for (size_t i = 0; i < n; i++)
        fields[i] = (qv_mirror_field){rows[i].worker, rows[i].tier};
    put(registry, QV_KEY_PLACE, adapter, fields, n, 0);
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
    put(registry, QV_KEY_BROKER, registry->who, FIELDS(fields), registry->options.lease_ms);
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
    put(registry, QV_KEY_WORKER, registry->who, FIELDS(fields), registry->options.lease_ms);
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
        scan_keys(&(key_scan){
            .registry = registry, .head = key_heads[kind], .each = on_stale_key, .end = on_pruned});
}

/* --- discovery ------------------------------------------------------------------------------- */

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
    if (status == QV_OK && is_hash(reply)) {
        const char *frontend = hash_get(reply, "frontend"), *backend = hash_get(reply, "backend");
        if (frontend != NULL && backend != NULL) /* else its lease ran out, or it is not one */
            lookup_add(fetch->lookup, fetch->id, frontend, backend, hash_get(reply, "demand"),
                       hash_get(reply, "workers"));
    }
    lookup_settle(fetch->lookup, status == QV_ERR_STATE ? QV_OK : status);
    free(fetch);
}

static void on_broker_key(qv_registry *registry, const char *key, size_t size, void *user)
{
    lookup *l = user;
    size_t head = strlen(key_heads[QV_KEY_BROKER]);
    if (size < head || qv_check_id(key + head, size - head) != QV_OK)
        return;
    broker_fetch *fetch = malloc(sizeof *fetch);
    if (fetch == NULL)
        return;
    fetch->lookup = l;
    memcpy(fetch->id, key + head, size - head);
    fetch->id[size - head] = 0;
    l->pending++;
    qv_redis_commandf(registry->redis, on_broker, fetch, "HGETALL %s%s", key_heads[QV_KEY_BROKER],
                      fetch->id);
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
    scan_keys(&(key_scan){.registry = registry,
                          .head = key_heads[QV_KEY_BROKER],
                          .each = on_broker_key,
                          .end = on_broker_keys,
                          .user = l});
}

/* --- editing --------------------------------------------------------------------------------- */

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
    QV_TRY(check_name(WATCH_WANT, name, strlen(name)));
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
    send_events(registry);
    if (registry->options.watch) {
        write_doc(registry);
        if (registry->options.functions != NULL)
            load_functions(registry);
        qv_redis_commandf(registry->redis, on_notify_flags, registry,
                          "CONFIG GET notify-keyspace-events");
    }
    if (registry->options.up != NULL)
        registry->options.up(registry->options.user);
    scan_wants(registry);
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
        scan_wants(registry);
    if (is_due(&registry->renew_ms, now, (uint64_t)registry->options.lease_ms / 3))
        qv_mirror_renew(registry->mirror);
    if (is_due(&registry->retry_ms, now, RETRY_MS)) {
        qv_mirror_retry(registry->mirror);
        send_events(registry);
    }
    if (is_due(&registry->check_ms, now, CHECK_MS))
        qv_mirror_check(registry->mirror);
    if (registry->prune_ms != 0 && now >= registry->prune_ms) {
        registry->prune_ms = 0;
        qv_registry_find_brokers(registry, on_brokers_to_prune, registry);
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
    for (watch_kind kind = 0; kind < WATCH_COUNT; kind++)
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
        for (watch_kind kind = 0; kind < WATCH_COUNT && status == QV_OK; kind++) {
            snprintf(pattern, sizeof pattern, "__keyspace@%d__:%s*", qv_redis_db(registry->redis),
                     watch_head(kind));
            status = qv_redis_subscribe(registry->redis, pattern, on_notification, registry);
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
    for (watch_kind kind = 0; kind < WATCH_COUNT; kind++)
        qv_map_free(registry->wants[kind], want_entry_free);
    while (registry->events != NULL) {
        event *next = registry->events->next;
        event_free(registry->events);
        registry->events = next;
    }
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
    put(registry, QV_KEY_WORKER, registry->who, NULL, 0, 0);
    put(registry, QV_KEY_BROKER, registry->who, NULL, 0, 0);
    registry->left = true;
    qv_redis_commandf(registry->redis, on_left, l, "DEL %s %s",
                      qv_registry_key(worker, QV_KEY_WORKER, registry->who),
                      qv_registry_key(broker, QV_KEY_BROKER, registry->who));
}

bool qv_registry_is_up(const qv_registry *registry)
{
    return qv_redis_is_up(registry->redis);
}
