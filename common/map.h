/* Map: bytes to a pointer, iterated in the order of insertion.
 *
 * Keys are copied; values are the caller's. Hashes are seeded at random per process, so that input
 * from the network cannot make chains on purpose; the order of iteration does not depend on it.
 * Entries keep their address until they are removed. One thread at a time.
 */
#ifndef QV_COMMON_MAP_H
#define QV_COMMON_MAP_H

#include "common/status.h"

#include <stdint.h>

typedef struct qv_map qv_map;

typedef struct qv_map_entry {
    struct qv_map_entry *prev, *next; /* order of insertion; read through QV_MAP_EACH */
    struct qv_map_entry *chain;       /* of its bucket */
    void *value;                      /* the caller's; may be changed in place */
    uint64_t hash;
    size_t key_size;
    char key[]; /* key_size bytes, then a 0 that does not count, so a string key prints */
} qv_map_entry;

/* An empty map; NULL when out of memory. `expected` entries fit without growing (0 is fine). */
qv_map *qv_map_new(size_t expected);

/* free(NULL) is fine. `free_value`, if given, gets each value that is not NULL. */
void qv_map_free(qv_map *map, void (*free_value)(void *value));

/* Remove every entry, in order of insertion; the table is kept. */
void qv_map_clear(qv_map *map, void (*free_value)(void *value));

size_t qv_map_count(const qv_map *map);

/* The entry of a key, or NULL. Borrowed. */
qv_map_entry *qv_map_find(const qv_map *map, const void *key, size_t size);

/* The entry of a key, created with the value NULL if it was not there. NULL when out of memory. */
qv_map_entry *qv_map_require(qv_map *map, const void *key, size_t size);

/* The value of a key, or NULL. */
void *qv_map_get(const qv_map *map, const void *key, size_t size);

/* Set the value of a key. A value that was there is overwritten, not freed, and keeps its place in
 * the order. Errors: NOMEM. */
qv_status qv_map_set(qv_map *map, const void *key, size_t size, void *value);

/* Remove a key and return its value; NULL if it was absent. */
void *qv_map_remove(qv_map *map, const void *key, size_t size);

/* Remove an entry of this map and return its value. */
void *qv_map_remove_entry(qv_map *map, qv_map_entry *entry);

/* Each entry in order of insertion. The body may remove the current entry and no other; entries
 * added by the body may or may not be visited.
 *
 *     QV_MAP_EACH (map, entry) {
 *         qv_worker *worker = entry->value;
 *     } */
#define QV_MAP_EACH(map, entry)                                                                    \
    for (qv_map_entry *entry = qv_map_first(map), *entry##_next_ = entry ? entry->next : NULL;     \
         entry != NULL; entry = entry##_next_, entry##_next_ = entry ? entry->next : NULL)

qv_map_entry *qv_map_first(const qv_map *map);

/* The same with a string as the key (its bytes without the terminator). */
qv_map_entry *qv_map_find_str(const qv_map *map, const char *key);
qv_map_entry *qv_map_require_str(qv_map *map, const char *key);
void *qv_map_get_str(const qv_map *map, const char *key);
qv_status qv_map_set_str(qv_map *map, const char *key, void *value);
void *qv_map_remove_str(qv_map *map, const char *key);

/* The same with a number as the key (its 8 bytes). A map should hold one kind of key only. */
qv_map_entry *qv_map_find_u64(const qv_map *map, uint64_t key);
qv_map_entry *qv_map_require_u64(qv_map *map, uint64_t key);
void *qv_map_get_u64(const qv_map *map, uint64_t key);
qv_status qv_map_set_u64(qv_map *map, uint64_t key, void *value);
void *qv_map_remove_u64(qv_map *map, uint64_t key);
uint64_t qv_map_key_u64(const qv_map_entry *entry);

#endif
