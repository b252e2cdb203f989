#include "common/log.h"
#include "common/protocol.h"
#include "common/registry_internal.h"
#include "common/utf8.h"

#include <stdlib.h>
#include <string.h>

enum {
    MAX_WANTS = 65536, /* more are ignored, with a line in the log */
    WHY_MAX = 512,
};

static const qv_key_kind watch_keys[QV_WATCH_COUNT] = {QV_KEY_WANT, QV_KEY_TENANT, QV_KEY_DRAIN};

const char *qv_watch_head(qv_watch_kind kind)
{
    return qv_registry_key_head(watch_keys[kind]);
}

/* --- names ----------------------------------------------------------------------------------- */

const char *qv_printable(const char *text, size_t text_size, char *out, size_t size)
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

qv_status qv_watch_check_name(qv_watch_kind kind, const char *name, size_t size)
{
    uint32_t capped = size < UINT32_MAX ? (uint32_t)size : UINT32_MAX;
    if (kind == QV_WATCH_WANT)
        return qv_adapter_name_check((qv_str){.data = name, .size = capped});
    if (kind == QV_WATCH_DRAIN)
        return qv_check_id(name, size);
    if (size > QV_ID_MAX || !qv_utf8_valid(name, size) || memchr(name, 0, size) != NULL)
        return qv_fail(QV_ERR_ARG, "a tenant's name is up to %d bytes of UTF-8", QV_ID_MAX);
    return QV_OK;
}

/* --- words ----------------------------------------------------------------------------------- */

static void qv_words_free(qv_words *w)
{
    for (size_t i = 0; i < w->n; i++)
        free(w->data[i]);
    free(w->data);
    free(w->sizes);
    *w = (qv_words){0};
}

/* A copy of an array of strings; empty when out of memory. */
static qv_words qv_words_copy(const redisReply *reply)
{
    qv_words w = {.data = calloc(reply->elements + 1, sizeof *w.data),
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
        qv_words_free(&w);
    return w;
}

/* --- one hash -------------------------------------------------------------------------------- */

void qv_want_entry_free(void *value)
{
    qv_want_entry *entry = value;
    qv_words_free(&entry->raw);
    qv_want_free(entry->want);
    free(entry->invalid);
    free(entry);
}

static qv_want_entry *require_want(qv_registry *registry, qv_watch_kind kind, const char *name,
                                   size_t size)
{
    qv_map *wants = registry->wants[kind];
    qv_map_entry *slot = qv_map_find(wants, name, size);
    if (slot != NULL)
        return slot->value;
    if (qv_map_count(wants) >= MAX_WANTS) {
        QV_LOG_EVERY(60000, 1, QV_LOG_ERROR, NULL, "more than %d %s keys, some are ignored",
                     MAX_WANTS, qv_watch_head(kind));
        return NULL;
    }
    qv_want_entry *entry = calloc(1, sizeof *entry);
    if (entry == NULL || qv_map_set(wants, name, size, entry) != QV_OK) {
        free(entry);
        return NULL;
    }
    entry->born = registry->scan;
    return entry;
}

/* The hash is invalid, once for the same reason. */
static void report_invalid(qv_registry *registry, qv_watch_kind kind, qv_want_entry *entry,
                           const char *name, size_t size, const char *reason)
{
    static const char *const whats[QV_WATCH_COUNT] = {"want_invalid", "tenant_invalid",
                                                      "drain_invalid"};
    char shown[QV_ADAPTER_NAME_MAX + 1];
    if (entry->invalid != NULL && strcmp(entry->invalid, reason) == 0)
        return;
    char *copy = strdup(reason);
    free(entry->invalid);
    entry->invalid = copy;
    qv_printable(name, size, shown, sizeof shown);
    qv_warn("%s%s is invalid: %s", qv_watch_head(kind), shown, reason);
    if (kind == QV_WATCH_WANT)
        qv_registry_event(registry, whats[kind], shown, NULL, "%s", reason);
    else
        qv_registry_event(registry, whats[kind], NULL, kind == QV_WATCH_DRAIN ? shown : NULL,
                          "%s%s: %s", qv_watch_head(kind), shown, reason);
    if (kind == QV_WATCH_WANT && registry->options.want_invalid != NULL)
        registry->options.want_invalid(shown, reason, registry->options.user);
}

/* A valid want takes force. */
static void report_want(qv_registry *registry, qv_want_entry *entry, const char *name,
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
static void report_setting(qv_registry *registry, qv_watch_kind kind, qv_want_entry *entry,
                           const char *name, const qv_tenant_want *tenant, bool is_same)
{
    const qv_registry_options *options = &registry->options;
    bool changed = !entry->valid || entry->invalid != NULL || !is_same;
    free(entry->invalid);
    entry->invalid = NULL;
    entry->valid = true;
    if (changed && kind == QV_WATCH_TENANT && options->tenant_changed != NULL)
        options->tenant_changed(name, tenant, options->user);
    if (changed && kind == QV_WATCH_DRAIN && options->drain_changed != NULL)
        options->drain_changed(name, true, options->user);
}

static bool same_words(const qv_words *w, const redisReply *hash)
{
    for (size_t i = 0; w->n == hash->elements && i < w->n; i++)
        if (w->sizes[i] != (size_t)hash->element[i]->len ||
            memcmp(w->data[i], hash->element[i]->str, w->sizes[i]) != 0)
            return false;
    return w->n == hash->elements;
}

/* Redis has this hash for a name. */
static void apply_hash(qv_registry *registry, qv_watch_kind kind, const char *name, size_t size,
                       const redisReply *hash)
{
    qv_want_entry *entry = require_want(registry, kind, name, size);
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
    qv_words_free(&entry->raw);
    entry->raw = qv_words_copy(hash);
    if (kind == QV_WATCH_WANT && qv_want_parse(fields, hash->elements / 2, &want) == QV_OK)
        report_want(registry, entry, name, want);
    else if (kind == QV_WATCH_DRAIN ||
             (kind == QV_WATCH_TENANT &&
              qv_tenant_want_parse(fields, hash->elements / 2, &tenant) == QV_OK))
        report_setting(registry, kind, entry, name, &tenant, is_same);
    else
        report_invalid(registry, kind, entry, name, size, qv_error());
    free(fields);
}

/* A HGETALL of a want under way. */
typedef struct {
    qv_registry *registry;
    qv_watch_kind kind;
    bool hinted; /* by a notification, not as part of a scan */
    size_t size;
    char name[];
} want_fetch;

static void on_want(qv_status status, const redisReply *reply, void *user)
{
    want_fetch *fetch = user;
    qv_registry *registry = fetch->registry;
    qv_watch_kind kind = fetch->kind;
    qv_want_entry *entry = qv_map_get(registry->wants[kind], fetch->name, fetch->size);
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
    } else if (status == QV_OK && qv_reply_is_hash(reply) && reply->elements > 0) {
        apply_hash(registry, kind, fetch->name, fetch->size, reply);
    } else if (status == QV_OK && fetch->hinted && entry != NULL) {
        qv_registry_scan(registry); /* it is gone: why, is for a scan to say */
    } else if (status != QV_OK) {
        registry->scan_failed = true;
    }
    if (again && status != QV_ERR_CANCELLED)
        qv_registry_fetch_want(registry, kind, fetch->name, fetch->size, true);
    free(fetch);
}

void qv_registry_fetch_want(qv_registry *registry, qv_watch_kind kind, const char *name,
                            size_t size, bool hinted)
{
    qv_want_entry *entry;
    if (qv_watch_check_name(kind, name, size) != QV_OK) {
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
    qv_redis_commandf(registry->redis, on_want, fetch, "HGETALL %s%b", qv_watch_head(kind),
                      fetch->name, fetch->size);
}
