/* Chains from buckets whose number grows by one with each entry beyond them (linear hashing: Litwin
 * 1980): a bucket is split at a time, so that no insertion has to move the whole table, and a
 * broker that holds a million keys never pauses to make room for one more.
 */
#include "common/map.h"

#include "common/clock.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

#define MIN_BUCKETS 16

struct qv_map {
    qv_map_entry **buckets; /* [n_buckets] of [capacity]: chains, NULL = empty */
    size_t n_buckets, capacity;
    size_t level; /* the greatest power of two up to n_buckets */
    size_t count;
    qv_map_entry *first, *last;
};

/* --- hash ----------------------------------------------------------------------------------- */

static uint64_t seed;
static pthread_once_t seed_once = PTHREAD_ONCE_INIT;

static void draw_seed(void)
{
    if (getrandom(&seed, sizeof seed, GRND_NONBLOCK) != (ssize_t)sizeof seed)
        seed =
            qv_clock_read_ns(CLOCK_REALTIME) ^ (uintptr_t)&seed; /* early boot: the best there is */
}

static uint64_t hash_key(const void *key, size_t size)
{
    return XXH3_64bits_withSeed(key, size, seed);
}

/* --- buckets --------------------------------------------------------------------------------- */

/* Buckets from n_buckets - level to level are not split yet: they hold what belongs to those behind
 * n_buckets as well. */
static qv_map_entry **bucket_of(const qv_map *map, uint64_t hash)
{
    size_t i = (size_t)hash & (2 * map->level - 1);
    return &map->buckets[i < map->n_buckets ? i : i - map->level];
}

/* The link to the entry of a key, or the one at the end of the chain where it would go. */
static qv_map_entry **probe(const qv_map *map, const void *key, size_t size, uint64_t hash)
{
    qv_map_entry **link = bucket_of(map, hash);
    for (; *link != NULL; link = &(*link)->chain)
        if ((*link)->hash == hash && (*link)->key_size == size &&
            (size == 0 || memcmp((*link)->key, key, size) == 0))
            break;
    return link;
}

/* Add a bucket, with its entries from the one that held them so far. Without memory chains just
 * become longer. */
static void split(qv_map *map)
{
    if (map->n_buckets == map->capacity) {
        if (map->capacity > SIZE_MAX / 4 / sizeof(qv_map_entry *))
            return;
        size_t capacity = 2 * map->capacity;
        qv_map_entry **grown = realloc(map->buckets, capacity * sizeof *grown);
        if (grown == NULL)
            return;
        map->buckets = grown;
        map->capacity = capacity;
    }
    qv_map_entry **from = &map->buckets[map->n_buckets - map->level];
    qv_map_entry **to = &map->buckets[map->n_buckets++];
    *to = NULL;
    while (*from != NULL) {
        qv_map_entry *entry = *from;
        if ((entry->hash & map->level) == 0) {
            from = &entry->chain;
            continue;
        }
        *from = entry->chain;
        entry->chain = *to;
        *to = entry;
    }
    if (map->n_buckets == 2 * map->level)
        map->level = map->n_buckets;
}

/* --- map ------------------------------------------------------------------------------------ */

qv_map *qv_map_new(size_t expected)
{
    pthread_once(&seed_once, draw_seed);
    qv_map *map = calloc(1, sizeof *map);
    if (map == NULL)
        return NULL;
    map->level = MIN_BUCKETS;
    while (map->level < expected && map->level <= SIZE_MAX / 4 / sizeof(qv_map_entry *))
        map->level *= 2;
    map->n_buckets = map->capacity = map->level;
    map->buckets = calloc(map->capacity, sizeof(qv_map_entry *));
    if (map->buckets == NULL) {
        free(map);
        return NULL;
    }
    return map;
}

void qv_map_free(qv_map *map, void (*free_value)(void *value))
{
    if (map == NULL)
        return;
    qv_map_clear(map, free_value);
    free(map->buckets);
    free(map);
}

void qv_map_clear(qv_map *map, void (*free_value)(void *value))
{
    for (qv_map_entry *entry = map->first, *next; entry != NULL; entry = next) {
        next = entry->next;
        if (free_value != NULL && entry->value != NULL)
            free_value(entry->value);
        free(entry);
    }
    memset(map->buckets, 0, map->n_buckets * sizeof(qv_map_entry *));
    map->first = map->last = NULL;
    map->count = 0;
}

size_t qv_map_count(const qv_map *map)
{
    return map->count;
}

qv_map_entry *qv_map_first(const qv_map *map)
{
    return map->first;
}

qv_map_entry *qv_map_find(const qv_map *map, const void *key, size_t size)
{
    return *probe(map, key, size, hash_key(key, size));
}

qv_map_entry *qv_map_require(qv_map *map, const void *key, size_t size)
{
    uint64_t hash = hash_key(key, size);
    qv_map_entry *found = *probe(map, key, size, hash);
    if (found != NULL)
        return found;
    if (size > SIZE_MAX - sizeof(qv_map_entry) - 1)
        return NULL;
    qv_map_entry *entry = malloc(sizeof *entry + size + 1);
    if (entry == NULL)
        return NULL;
    *entry = (qv_map_entry){.prev = map->last, .hash = hash, .key_size = size};
    if (size != 0)
        memcpy(entry->key, key, size);
    entry->key[size] = '\0';
    if (map->last != NULL)
        map->last->next = entry;
    else
        map->first = entry;
    map->last = entry;
    if (++map->count > map->n_buckets)
        split(map);
    qv_map_entry **bucket = bucket_of(map, hash);
    entry->chain = *bucket;
    *bucket = entry;
    return entry;
}

void *qv_map_get(const qv_map *map, const void *key, size_t size)
{
    const qv_map_entry *entry = qv_map_find(map, key, size);
    return entry != NULL ? entry->value : NULL;
}

qv_status qv_map_set(qv_map *map, const void *key, size_t size, void *value)
{
    qv_map_entry *entry = qv_map_require(map, key, size);
    if (entry == NULL)
        return qv_fail(QV_ERR_NOMEM, "map: no memory for a key of %zu bytes", size);
    entry->value = value;
    return QV_OK;
}

void *qv_map_remove_entry(qv_map *map, qv_map_entry *entry)
{
    qv_map_entry **link = bucket_of(map, entry->hash);
    while (*link != NULL && *link != entry)
        link = &(*link)->chain;
    QV_ASSERT(*link == entry);
    *link = entry->chain;
    if (entry->prev != NULL)
        entry->prev->next = entry->next;
    else
        map->first = entry->next;
    if (entry->next != NULL)
        entry->next->prev = entry->prev;
    else
        map->last = entry->prev;
    map->count--;
    void *value = entry->value;
    free(entry);
    return value;
}

void *qv_map_remove(qv_map *map, const void *key, size_t size)
{
    qv_map_entry *entry = qv_map_find(map, key, size);
    return entry != NULL ? qv_map_remove_entry(map, entry) : NULL;
}

/* --- keys of other types -------------------------------------------------------------------- */

qv_map_entry *qv_map_find_str(const qv_map *map, const char *key)
{
    return qv_map_find(map, key, strlen(key));
}

qv_map_entry *qv_map_require_str(qv_map *map, const char *key)
{
    return qv_map_require(map, key, strlen(key));
}

void *qv_map_get_str(const qv_map *map, const char *key)
{
    return qv_map_get(map, key, strlen(key));
}

qv_status qv_map_set_str(qv_map *map, const char *key, void *value)
{
    return qv_map_set(map, key, strlen(key), value);
}

void *qv_map_remove_str(qv_map *map, const char *key)
{
    return qv_map_remove(map, key, strlen(key));
}

qv_map_entry *qv_map_find_u64(const qv_map *map, uint64_t key)
{
    return qv_map_find(map, &key, sizeof key);
}

qv_map_entry *qv_map_require_u64(qv_map *map, uint64_t key)
{
    return qv_map_require(map, &key, sizeof key);
}

void *qv_map_get_u64(const qv_map *map, uint64_t key)
{
    return qv_map_get(map, &key, sizeof key);
}

qv_status qv_map_set_u64(qv_map *map, uint64_t key, void *value)
{
    return qv_map_set(map, &key, sizeof key, value);
}

void *qv_map_remove_u64(qv_map *map, uint64_t key)
{
    return qv_map_remove(map, &key, sizeof key);
}

uint64_t qv_map_key_u64(const qv_map_entry *entry)
{
    uint64_t key;
    QV_ASSERT(entry->key_size == sizeof key);
    memcpy(&key, entry->key, sizeof key);
    return key;
}
