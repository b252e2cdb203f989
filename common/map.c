/* A table of pointers to entries, open addressing with linear probing. Removal shifts the entries
 * behind the hole back, so there are no tombstones and a map that churns for ever does not decay.
 */
#include "common/map.h"

#include "common/clock.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

#define MIN_SLOTS 16

struct qv_map {
    qv_map_entry **slots; /* [n_slots], NULL = empty */
    size_t n_slots;       /* a power of two */
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

/* --- slots ---------------------------------------------------------------------------------- */

static size_t home(const qv_map *map, uint64_t hash)
{
    return (size_t)hash & (map->n_slots - 1);
}

/* The slot of a key, or the empty slot where it would go. */
static qv_map_entry **probe(const qv_map *map, const void *key, size_t size, uint64_t hash)
{
    for (size_t i = home(map, hash);; i = (i + 1) & (map->n_slots - 1)) {
        qv_map_entry *entry = map->slots[i];
        if (entry == NULL || (entry->hash == hash && entry->key_size == size &&
                              (size == 0 || memcmp(entry->key, key, size) == 0)))
            return &map->slots[i];
    }
}

static bool resize(qv_map *map, size_t n_slots)
{
    qv_map_entry **slots = calloc(n_slots, sizeof(qv_map_entry *));
    if (slots == NULL)
        return false;
    free(map->slots);
    map->slots = slots;
    map->n_slots = n_slots;
    for (qv_map_entry *entry = map->first; entry != NULL; entry = entry->next) {
        size_t i = home(map, entry->hash);
        while (slots[i] != NULL)
            i = (i + 1) & (n_slots - 1);
        slots[i] = entry;
    }
    return true;
}

/* Empty slot `hole`, then move back each follower whose probe path crosses it. */
static void close_gap(qv_map *map, size_t hole)
{
    size_t mask = map->n_slots - 1;
    for (size_t i = (hole + 1) & mask; map->slots[i] != NULL; i = (i + 1) & mask) {
        size_t distance = (i - home(map, map->slots[i]->hash)) & mask;
        if (distance >= ((i - hole) & mask)) {
            map->slots[hole] = map->slots[i];
            hole = i;
        }
    }
    map->slots[hole] = NULL;
}

/* --- map ------------------------------------------------------------------------------------ */

qv_map *qv_map_new(size_t expected)
{
    pthread_once(&seed_once, draw_seed);
    qv_map *map = calloc(1, sizeof *map);
    if (map == NULL)
        return NULL;
    size_t n_slots = MIN_SLOTS;
    while (n_slots / 4 * 3 < expected && n_slots <= SIZE_MAX / 2 / sizeof(qv_map_entry *))
        n_slots *= 2;
    if (!resize(map, n_slots)) {
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
    free(map->slots);
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
    memset(map->slots, 0, map->n_slots * sizeof(qv_map_entry *));
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
    qv_map_entry **slot = probe(map, key, size, hash);
    if (*slot != NULL)
        return *slot;
    if (map->count + 1 > map->n_slots / 4 * 3) {
        if (map->n_slots > SIZE_MAX / 2 / sizeof(qv_map_entry *) || !resize(map, map->n_slots * 2))
            return NULL;
        slot = probe(map, key, size, hash);
    }
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
    map->count++;
    *slot = entry;
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
    qv_map_entry **slot = probe(map, entry->key, entry->key_size, entry->hash);
    QV_ASSERT(*slot == entry);
    close_gap(map, (size_t)(slot - map->slots));
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
