/* What the parts of the adapter cache share:
 *
 *   adapter_cache.c   names, what is ordered for them, requests and sequences, facts, life
 *   adapter_tiers.c   versions and where they are: slots, host copies, reads
 */
#ifndef QV_WORKER_ADAPTER_CACHE_INTERNAL_H
#define QV_WORKER_ADAPTER_CACHE_INTERNAL_H

#include "common/map.h"
#include "worker/adapter_cache.h"

/* Folders read at once: one that is slow to read does not hold up the others. */
enum { QV_ADAPTER_READERS = 2 };

/* A folder being read, or in line for it: for one or more names, or to bring back the host copy of
 * a version. */
typedef struct qv_adapter_read {
    struct qv_adapter_read *next;
    char *dir;
    qv_adapter_version
        *version;       /* whose copy it brings back; NULL: for names, or nobody any more */
    int32_t n_names;    /* that wait for it */
    bool wanted;        /* a request waits for it: it goes ahead of others */
    bool again;         /* somebody asked while it was read: look once more */
    qv_adapter *before; /* owned: what it gave before it was to look once more, or NULL */
    qv_adapter_stamp before_stamp;
    int32_t reader;    /* at work on it; -1 = it is in line */
    uint64_t reserved; /* host bytes set aside for it */
    uint64_t start_ms;
    qv_loader_job job;
} qv_adapter_read;

/* One content. Lives while a name, a request or a slot being filled needs it. */
struct qv_adapter_version {
    qv_adapter_version *prev, *next; /* host copies, most recently used first */
    qv_adapter *adapter;             /* the host copy; NULL: it must be read again */
    qv_adapter_read *read;           /* on its way to be one; NULL = none */
    char *digest, *dir;              /* owned; where it was last read */
    qv_adapter_stamp stamp;          /* of dir then */
    int32_t rank;
    uint64_t bytes;   /* of a host copy */
    int32_t n_names;  /* names that point at it */
    int32_t n_pins;   /* of those, names that pin it */
    int32_t refs;     /* requests that hold it */
    int32_t users;    /* running sequences that hold its slot */
    int32_t slot;     /* -1 = none */
    uint64_t full_at; /* cache->n_leaves when the device had no memory for it */
    bool lost;        /* its files are gone, and so is the copy: no request can run on it */
    qv_code code;     /* of `lost` */
    char *reason;     /* of `lost`; owned */
};

typedef struct {
    qv_slot_state state;
    qv_adapter_version *version; /* LOADING, READY, PINNED */
    uint64_t last_used;
    qv_loader_job job;
} qv_cache_slot;

/* One name. */
typedef struct {
    const char *name; /* the map's key */
    char *dir;        /* of the version; while there is none, of the read */
    char *reason;     /* why the last load failed, or why it is not pinned; NULL = it is as asked */
    qv_adapter_version *version; /* NULL until the first load has ended well */
    qv_adapter_read *read;       /* a load in progress; NULL = none */
    qv_code code;                /* of the failure */
    bool want_pin;               /* asked for */
    bool pinned;                 /* counted in version->n_pins */
    uint64_t load_ms;
} qv_adapter_name;

struct qv_adapter_cache {
    qv_adapter_cache_options options;
    qv_adapter_source source;
    qv_map *names;            /* of qv_adapter_name */
    qv_map *by_digest;        /* of versions, owned; those that are lost belong to their requests */
    qv_map *by_dir;           /* the same: what was last read there */
    qv_cache_slot *slots;     /* [n_slots] */
    qv_adapter_version *host; /* those with a host copy: a list, most recently used first, */
    qv_adapter_version *coldest; /* and its end */
    qv_adapter_read *reads;      /* oldest first */
    qv_adapter_read *in_hand[QV_ADAPTER_READERS];
    uint64_t ticks;         /* orders uses of slots */
    uint64_t n_leaves;      /* times that memory of the device may have become free, from 1 */
    uint64_t host_reserved; /* for reads in hand */
    int32_t n_pinned;       /* versions */
    int32_t n_waiting_pins; /* of those, without a slot */
    int32_t n_lost;         /* versions that requests still hold */
    qv_adapter_stats stats;

    qv_adapter_loader *readers[QV_ADAPTER_READERS], *copier;
    int epoll_fd; /* of the loaders' fds */
};

/* --- adapter_tiers.c: slots --------------------------------------------------------------------
 */

/* Find a version that has a host copy and no slot a slot, and start to fill it: an empty one; with
 * `may_evict` one of a version that no request holds; with `must` one on which nobody runs. */
bool qv_cache_bring_in(qv_adapter_cache *cache, qv_adapter_version *version, bool may_evict,
                       bool must);

/* Pinned versions without a slot try again. */
void qv_cache_bring_in_pinned(qv_adapter_cache *cache);

/* Count a pin of a name, or take it back. */
void qv_cache_pin(qv_adapter_cache *cache, qv_adapter_version *version);
void qv_cache_unpin(qv_adapter_cache *cache, qv_adapter_version *version);

/* A slot was filled or cleared. Errors: DEVICE. */
qv_status qv_cache_take_slot(qv_adapter_cache *cache, qv_cache_slot *slot);

/* --- adapter_cache.c ---------------------------------------------------------------------------
 */

/* Take a version that cannot be installed from its names, with the reason, and lose it. */
void qv_cache_unload_version(qv_adapter_cache *cache, qv_adapter_version *version, qv_status status,
                             const char *reason);

/* --- adapter_tiers.c: versions and host copies -------------------------------------------------
 */

/* The version of an adapter that was just read at `dir`, which is taken over: one that is there
 * already, or a new one. Errors: LIMIT, NOMEM (the adapter is closed). */
qv_status qv_cache_require_version(qv_adapter_cache *cache, const qv_adapter_read *read,
                                   qv_adapter *adapter, qv_adapter_version **out);

/* Give up what nobody wants: clear its slot, free its host copy. A slot that is being filled is
 * waited for. */
void qv_cache_settle(qv_adapter_cache *cache, qv_adapter_version *version);

/* From now on the version is read at another folder. */
void qv_cache_move_version(qv_adapter_cache *cache, qv_adapter_version *version, const char *dir);

/* Give up a version that is nowhere any more and that no name points at; requests may hold it. */
void qv_cache_lose_version(qv_adapter_cache *cache, qv_adapter_version *version, qv_code code,
                           const char *reason);

/* Free a version that nobody holds, whatever it has. */
void qv_cache_free_version(qv_adapter_cache *cache, qv_adapter_version *version);

/* The version was used now: its host copy is the last to go. */
void qv_cache_touch(qv_adapter_cache *cache, qv_adapter_version *version);

/* Have a version's files read again unless it has a host copy, or a read on its way. */
void qv_cache_require_copy(qv_adapter_cache *cache, qv_adapter_version *version);

/* --- adapter_tiers.c: reads --------------------------------------------------------------------
 */

/* The read of a folder for names: one that has not ended, or a new one at the end of the line. One
 * that has begun may have seen what was there before, so it will look once more. NULL: no memory.
 */
qv_adapter_read *qv_cache_require_read(qv_adapter_cache *cache, const char *dir);

/* Drop a read that nobody waits for, unless a reader has it: then its result is dropped. */
void qv_cache_settle_read(qv_adapter_cache *cache, qv_adapter_read *read);

/* A reader has come to the end of a read. False: the read is in line once more. */
bool qv_cache_end_read(qv_adapter_cache *cache, qv_adapter_read *read);

/* Take a read that has ended out of the list; free it. */
void qv_cache_unlink_read(qv_adapter_cache *cache, qv_adapter_read *read);
void qv_cache_free_read(qv_adapter_read *read);

/* Give readers that are idle something to do. */
void qv_cache_start_reads(qv_adapter_cache *cache);

/* A read for a version has ended. False: it failed, and the version is lost, for which `read` has
 * the reason. */
bool qv_cache_take_copy(qv_adapter_cache *cache, qv_adapter_read *read);

#endif
