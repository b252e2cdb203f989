#include "common/mirror.h"

#include "common/log.h"
#include "common/map.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    char *name, *value;
} field;

/* One hash. Without fields it is a deletion that Redis has not confirmed. */
typedef struct {
    qv_mirror *mirror;
    qv_map_entry *entry; /* its key */
    field *fields;       /* [n] */
    size_t n;
    int64_t lease_ms; /* 0 = none */
    bool stale;       /* Redis may have something else: send in full */
    size_t pending;   /* commands without an answer; a record with any is not freed */
} record;

struct qv_mirror {
    qv_redis *redis;
    qv_map *records; /* key -> record */
};

/* --- fields ---------------------------------------------------------------------------------- */

static void free_fields(field *fields, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        free(fields[i].name);
        free(fields[i].value);
    }
    free(fields);
}

/* Copies of those that have a value. False when out of memory. */
static bool copy_fields(const qv_mirror_field *from, size_t n, field **out, size_t *n_out)
{
    field *fields = calloc(n + 1, sizeof *fields);
    size_t used = 0;
    for (size_t i = 0; fields != NULL && i < n; i++) {
        if (from[i].value == NULL)
            continue;
        fields[used].name = strdup(from[i].name);
        fields[used].value = strdup(from[i].value);
        used++;
        if (fields[used - 1].name == NULL || fields[used - 1].value == NULL) {
            free_fields(fields, used);
            fields = NULL;
        }
    }
    *out = fields;
    *n_out = used;
    return fields != NULL;
}

static const field *find_field(const field *fields, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(fields[i].name, name) == 0)
            return &fields[i];
    return NULL;
}

/* --- answers --------------------------------------------------------------------------------- */

static void free_record(void *value)
{
    record *r = value;
    free_fields(r->fields, r->n);
    free(r);
}

static bool reply_has_error(const redisReply *reply)
{
    for (size_t i = 0; reply->type == REDIS_REPLY_ARRAY && i < reply->elements; i++)
        if (reply->element[i]->type == REDIS_REPLY_ERROR)
            return true;
    return false;
}

/* Account for an answer; the record may be gone afterwards. */
static void settle(record *r, qv_status status)
{
    r->pending--;
    if (status != QV_OK)
        r->stale = true;
    if (status == QV_ERR_STATE)
        QV_LOG_EVERY(10000, 3, QV_LOG_WARN, NULL, "cannot write %s: %s", r->entry->key, qv_error());
    if (r->n == 0 && r->pending == 0 && !r->stale) {
        qv_map_remove_entry(r->mirror->records, r->entry);
        free_record(r);
    }
}

static void on_exec(qv_status status, const redisReply *reply, void *user)
{
    if (status == QV_OK && reply_has_error(reply))
        status = qv_fail(QV_ERR_STATE, "redis refused a part of it");
    settle(user, status);
}

static void on_deleted(qv_status status, const redisReply *reply, void *user)
{
    (void)reply;
    settle(user, status);
}

/* --- sending --------------------------------------------------------------------------------- */

static void send_full(record *r)
{
    qv_redis *redis = r->mirror->redis;
    const char *key = r->entry->key;
    r->stale = false;
    r->pending++;
    if (r->n == 0) {
        qv_redis_command(redis, 2, (const char *[]){"DEL", key}, (size_t[]){3, r->entry->key_size},
                         on_deleted, r);
        return;
    }
    const char **argv = malloc((2 + 2 * r->n) * sizeof *argv);
    if (argv == NULL || qv_redis_room(redis) < 5) { /* a transaction goes out whole or not at all */
        free(argv);
        settle(r, QV_ERR_BUSY);
        return;
    }
    int argc = 0;
    argv[argc++] = "HSET";
    argv[argc++] = key;
    for (size_t i = 0; i < r->n; i++) {
        argv[argc++] = r->fields[i].name;
        argv[argc++] = r->fields[i].value;
    }
    qv_redis_commandf(redis, NULL, NULL, "MULTI");
    qv_redis_commandf(redis, NULL, NULL, "DEL %s", key);
    qv_redis_command(redis, argc, argv, NULL, NULL, NULL);
    if (r->lease_ms > 0)
        qv_redis_commandf(redis, NULL, NULL, "PEXPIRE %s %lld", key, (long long)r->lease_ms);
    free(argv);
    qv_redis_commandf(redis, on_exec, r, "EXEC");
}

/* What an HSET of a difference should answer: how many of its fields are new. */
typedef struct {
    record *record;
    long long n_new;
} difference;

static void on_changed(qv_status status, const redisReply *reply, void *user)
{
    difference *d = user;
    record *r = d->record;
    bool repaired = status == QV_OK && reply->integer != d->n_new; /* not what we knew it to be */
    free(d);
    if (repaired)
        r->stale = true;
    settle(r, status);
}

static void send_difference(record *r, const field *old, size_t n_old)
{
    qv_redis *redis = r->mirror->redis;
    difference *d = malloc(sizeof *d);
    const char **set = malloc((2 + 2 * r->n) * sizeof *set);
    const char **drop = malloc((2 + n_old) * sizeof *drop);
    if (d == NULL || set == NULL || drop == NULL) {
        free(d);
        free(set);
        free(drop);
        r->stale = true; /* the next retry sends all of it */
        return;
    }
    int n_set = 0, n_drop = 0;
    *d = (difference){.record = r};
    set[n_set++] = "HSET";
    set[n_set++] = r->entry->key;
    drop[n_drop++] = "HDEL";
    drop[n_drop++] = r->entry->key;
    for (size_t i = 0; i < r->n; i++) {
        const field *before = find_field(old, n_old, r->fields[i].name);
        if (before != NULL && strcmp(before->value, r->fields[i].value) == 0)
            continue;
        d->n_new += before == NULL;
        set[n_set++] = r->fields[i].name;
        set[n_set++] = r->fields[i].value;
    }
    for (size_t i = 0; i < n_old; i++)
        if (find_field(r->fields, r->n, old[i].name) == NULL)
            drop[n_drop++] = old[i].name;
    r->pending++; /* across both, so that the record stays */
    if (n_drop > 2) {
        r->pending++;
        qv_redis_command(redis, n_drop, drop, NULL, on_deleted, r);
    }
    if (n_set > 2) {
        r->pending++;
        qv_redis_command(redis, n_set, set, NULL, on_changed, d);
    } else {
        free(d);
    }
    settle(r, QV_OK);
    free(set);
    free(drop);
}

/* --- public ---------------------------------------------------------------------------------- */

qv_status qv_mirror_new(qv_redis *redis, qv_mirror **out)
{
    qv_mirror *mirror = calloc(1, sizeof *mirror);
    if (mirror == NULL || (mirror->records = qv_map_new(0)) == NULL) {
        free(mirror);
        return qv_fail(QV_ERR_NOMEM, "out of memory for a mirror");
    }
    mirror->redis = redis;
    *out = mirror;
    return QV_OK;
}

void qv_mirror_free(qv_mirror *mirror)
{
    if (mirror == NULL)
        return;
    qv_map_free(mirror->records, free_record);
    free(mirror);
}

static record *require_record(qv_mirror *mirror, const char *key)
{
    qv_map_entry *entry = qv_map_require_str(mirror->records, key);
    if (entry == NULL || entry->value != NULL)
        return entry != NULL ? entry->value : NULL;
    record *r = calloc(1, sizeof *r);
    if (r == NULL) {
        qv_map_remove_entry(mirror->records, entry);
        return NULL;
    }
    *r = (record){.mirror = mirror, .entry = entry, .stale = true};
    entry->value = r;
    return r;
}

void qv_mirror_put(qv_mirror *mirror, const char *key, const qv_mirror_field *fields, size_t n,
                   int64_t lease_ms)
{
    field *copies;
    size_t n_copies;
    if (n == 0 && qv_map_get_str(mirror->records, key) == NULL)
        return; /* nothing to delete */
    record *r = require_record(mirror, key);
    if (r == NULL || !copy_fields(fields, n, &copies, &n_copies)) {
        qv_err("out of memory: %s is not written", key);
        return;
    }
    field *old = r->fields;
    size_t n_old = r->n;
    r->fields = copies;
    r->n = n_copies;
    r->lease_ms = lease_ms;
    if (!qv_redis_is_up(mirror->redis))
        r->stale = true;
    else if (r->stale || n_copies == 0 || n_old == 0)
        send_full(r);
    else
        send_difference(r, old, n_old);
    free_fields(old, n_old);
}

bool qv_mirror_holds(const qv_mirror *mirror, const char *key, size_t size)
{
    const record *r = qv_map_get(mirror->records, key, size);
    return r != NULL && r->n > 0;
}

void qv_mirror_resend(qv_mirror *mirror)
{
    QV_MAP_EACH(mirror->records, entry)
    send_full(entry->value);
}

void qv_mirror_retry(qv_mirror *mirror)
{
    if (!qv_redis_is_up(mirror->redis))
        return;
    QV_MAP_EACH(mirror->records, entry)
    {
        record *r = entry->value;
        if (r->stale && r->pending == 0)
            send_full(r);
    }
}

static void on_renewed(qv_status status, const redisReply *reply, void *user)
{
    record *r = user;
    if (status == QV_OK && reply->integer == 0 && r->n > 0)
        r->stale = true; /* it had run out */
    bool resend = r->stale && r->n > 0 && r->pending == 1 && status == QV_OK;
    if (resend)
        send_full(r);
    settle(r, status);
}

void qv_mirror_renew(qv_mirror *mirror)
{
    if (!qv_redis_is_up(mirror->redis))
        return;
    QV_MAP_EACH(mirror->records, entry)
    {
        record *r = entry->value;
        if (r->lease_ms <= 0 || r->n == 0)
            continue;
        r->pending++;
        qv_redis_commandf(mirror->redis, on_renewed, r, "PEXPIRE %s %lld", entry->key,
                          (long long)r->lease_ms);
    }
}

static void on_length(qv_status status, const redisReply *reply, void *user)
{
    record *r = user;
    /* With other commands of ours behind it the answer is old news. */
    if (r->pending == 1 && r->n > 0 &&
        (status == QV_ERR_STATE || (status == QV_OK && (size_t)reply->integer != r->n)))
        r->stale = true;
    settle(r, status == QV_ERR_STATE ? QV_OK : status);
}

void qv_mirror_check(qv_mirror *mirror)
{
    if (!qv_redis_is_up(mirror->redis))
        return;
    QV_MAP_EACH(mirror->records, entry)
    {
        record *r = entry->value;
        if (r->stale || r->pending > 0 || r->n == 0)
            continue;
        r->pending++;
        qv_redis_command(mirror->redis, 2, (const char *[]){"HLEN", entry->key},
                         (size_t[]){4, entry->key_size}, on_length, r);
    }
}
