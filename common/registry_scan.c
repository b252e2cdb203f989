#include "common/registry_internal.h"

#include <stdlib.h>
#include <string.h>

/* --- walks ----------------------------------------------------------------------------------- */

static void on_page(qv_status status, const redisReply *reply, void *user);

static void next_page(qv_key_scan *scan, const char *cursor)
{
    qv_redis_commandf(scan->registry->redis, on_page, scan, "SCAN %s MATCH %s* COUNT 1000", cursor,
                      scan->head);
}

static void on_page(qv_status status, const redisReply *reply, void *user)
{
    qv_key_scan *scan = user;
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

void qv_key_scan_start(const qv_key_scan *what)
{
    qv_key_scan *scan = malloc(sizeof *scan);
    if (scan == NULL) {
        what->end(what->registry, qv_fail(QV_ERR_NOMEM, "out of memory for a scan"), what->user);
        return;
    }
    *scan = *what;
    next_page(scan, "0");
}

/* --- hashes ---------------------------------------------------------------------------------- */

bool qv_reply_is_hash(const redisReply *reply)
{
    if (reply->type != REDIS_REPLY_ARRAY || reply->elements % 2 != 0)
        return false;
    for (size_t i = 0; i < reply->elements; i++)
        if (reply->element[i]->type != REDIS_REPLY_STRING)
            return false;
    return true;
}

const char *qv_reply_get(const redisReply *hash, const char *name)
{
    for (size_t i = 0; i + 1 < hash->elements; i += 2)
        if (strcmp(hash->element[i]->str, name) == 0)
            return hash->element[i + 1]->str;
    return NULL;
}
