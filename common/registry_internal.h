/* What the parts of the registry share (registry.h is for everybody else):
 *
 *   registry.c          keys, life, what is due when
 *   registry_scan.c     walks over keys, replies that are hashes
 *   registry_events.c   quiver:events
 *   registry_wants.c    one hash that people write: read, checked, in force
 *   registry_watch.c    all of them: scans, notifications, what is missing and why
 *   registry_publish.c  records that we write, and stale ones that go
 *   registry_find.c     brokers
 *   registry_edit.c     wants that a program writes for people
 */
#ifndef QV_COMMON_REGISTRY_INTERNAL_H
#define QV_COMMON_REGISTRY_INTERNAL_H

#include "common/map.h"
#include "common/mirror.h"
#include "common/redis.h"
#include "common/registry.h"

/* A hash as Redis had it: name, value, name, value ... */
typedef struct {
    size_t n; /* words */
    char **data;
    size_t *sizes;
} qv_words;

/* What people write. */
typedef enum { QV_WATCH_WANT, QV_WATCH_TENANT, QV_WATCH_DRAIN, QV_WATCH_COUNT } qv_watch_kind;

typedef struct {
    qv_words raw;         /* the hash last seen; to write it back after a loss */
    qv_want_box *want;    /* in force; NULL: none was ever valid. Of a QV_WATCH_WANT */
    bool valid;           /* one is in force. Of the others */
    char *invalid;        /* why the hash last seen makes no sense; NULL: it does */
    uint64_t born, seen;  /* scans that saw it first and last */
    bool fetching, again; /* a fetch is under way; the hash changed since */
} qv_want_entry;

typedef struct qv_event qv_event; /* of quiver:events */

enum { QV_RUN_ID_MAX = 64 };

struct qv_registry {
    zloop_t *loop;
    int timer_id;
    qv_registry_options options;
    char *who;
    qv_redis *redis;
    qv_mirror *mirror; /* of all that we publish */
    bool closing, left;

    qv_map *wants[QV_WATCH_COUNT]; /* name -> qv_want_entry */
    qv_watch_kind scan_kind;       /* what is scanned now */
    uint64_t scan;                 /* number of the scan that runs or ran last */
    bool scanning;
    bool scan_failed; /* a hash could not be read, so nothing is concluded */
    bool scan_again;  /* asked for while one ran */
    bool confirming;  /* schema was gone: this scan lies wholly after that */
    bool synced;      /* since the link came up */
    bool schema_seen; /* quiver:schema was there, so its absence means a loss */
    size_t restoring; /* wants being written back */
    bool restore_failed;
    uint64_t scan_began_ms;
    char run_id[QV_RUN_ID_MAX]; /* of the server that the wants in force come from */

    qv_event *events, **events_end; /* not sent yet; oldest first */
    size_t n_events;

    uint64_t scan_ms, renew_ms, retry_ms, check_ms, prune_ms; /* when due next; prune 0 = never */
};

/* --- keys, registry.c ------------------------------------------------------------------------ */

/* "quiver:want:" and the like; of a key without a name, the key. */
const char *qv_registry_key_head(qv_key_kind kind);

/* --- walks and hashes, registry_scan.c -------------------------------------------------------- */

/* A walk over all keys of a pattern by SCAN, a page at a time. */
typedef struct {
    qv_registry *registry;
    const char *head; /* keys that start so */
    void (*each)(qv_registry *registry, const char *key, size_t size, void *user);
    void (*end)(qv_registry *registry, qv_status status, void *user);
    void *user;
} qv_key_scan;

/* `end` is called once, also when there is no memory to begin. */
void qv_key_scan_start(const qv_key_scan *what);

bool qv_reply_is_hash(const redisReply *reply);
const char *qv_reply_get(const redisReply *hash, const char *name); /* borrowed; NULL: not in it */

/* --- events, registry_events.c ---------------------------------------------------------------- */

void qv_registry_send_events(qv_registry *registry); /* those that wait for the link */
void qv_registry_free_events(qv_registry *registry);

/* --- wants, registry_wants.c ------------------------------------------------------------------ */

const char *qv_watch_head(qv_watch_kind kind);

/* Whether a key of the kind may end so. Keys come from outside: any bytes, any length. */
qv_status qv_watch_check_name(qv_watch_kind kind, const char *name, size_t size);

/* "?" for what would not print. out[size], cut to fit. */
const char *qv_printable(const char *text, size_t text_size, char *out, size_t size);

/* Read one hash and apply it. The name is that of a key, so it may be anything. hinted: by a
 * notification, not as part of a scan. */
void qv_registry_fetch_want(qv_registry *registry, qv_watch_kind kind, const char *name,
                            size_t size, bool hinted);
void qv_want_entry_free(void *entry);

/* --- all wants, registry_watch.c -------------------------------------------------------------- */

void qv_registry_write_doc(qv_registry *registry); /* quiver:doc, unless it is there */

/* Ask for the notifications that qv_registry_on_notification hears. */
void qv_registry_ask_for_notifications(qv_registry *registry);
void qv_registry_on_notification(const char *channel, const char *payload, size_t payload_size,
                                 void *registry);

/* --- records, registry_publish.c -------------------------------------------------------------- */

/* n 0: no such record. lease_ms 0: it does not expire. */
void qv_registry_put(qv_registry *registry, qv_key_kind kind, const char *name,
                     const qv_mirror_field *fields, size_t n, int64_t lease_ms);

/* Delete the records of adapters that are not ours, if no other broker is there. */
void qv_registry_prune(qv_registry *registry);

#endif
