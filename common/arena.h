/* Arena: a bump allocator for things that die together (a load, a request, a step).
 *
 * The owner sets a limit in bytes; beyond it, and when the system has no memory, allocations return
 * NULL and the caller reports it. Reset keeps the memory, so that a step that resets its arena
 * allocates nothing once it is warm. Under AddressSanitizer, memory that was not handed out or was
 * reset is poisoned. One thread at a time.
 */
#ifndef QV_COMMON_ARENA_H
#define QV_COMMON_ARENA_H

#include <stdarg.h>
#include <stddef.h>

typedef struct qv_arena_chunk qv_arena_chunk;

typedef struct {
    qv_arena_chunk *first;   /* chunks in the order of their use; owned */
    qv_arena_chunk *current; /* the one that serves; those after it are empty */
    size_t chunk_bytes;      /* size of a normal chunk */
    size_t limit_bytes;      /* most bytes held in chunks; 0 = no limit */
    size_t held_bytes;       /* in chunks now, headers included */
} qv_arena;

/* A place to come back to. Valid until the arena is reset or rewound before it. */
typedef struct {
    qv_arena_chunk *chunk;
    size_t used;
} qv_arena_mark;

/* Nothing is allocated until the first use. `chunk_bytes` 0 means 64 KiB; `limit_bytes` 0 means no
 * limit. A zeroed struct is an arena with both defaults. */
void qv_arena_init(qv_arena *arena, size_t chunk_bytes, size_t limit_bytes);

/* Give all memory back; the arena is empty and usable again. */
void qv_arena_deinit(qv_arena *arena);

/* Forget everything allocated, keep the memory. */
void qv_arena_reset(qv_arena *arena);

/* Forget what was allocated since the mark, keep the memory. */
qv_arena_mark qv_arena_get_mark(const qv_arena *arena);
void qv_arena_rewind(qv_arena *arena, qv_arena_mark mark);

/* Bytes handed out since the last reset, padding included; bytes held from the system. */
size_t qv_arena_used(const qv_arena *arena);
size_t qv_arena_held(const qv_arena *arena);

/* `size` bytes at a multiple of `align` (a power of two), not initialised. Size 0 gives a unique
 * pointer. NULL beyond the limit. */
void *qv_arena_alloc(qv_arena *arena, size_t size, size_t align)
    __attribute__((malloc, alloc_size(2), alloc_align(3)));

/* n * size bytes set to zero; NULL also when the product overflows. */
void *qv_arena_calloc(qv_arena *arena, size_t n, size_t size, size_t align)
    __attribute__((malloc, alloc_size(2, 3), alloc_align(4)));

/* One zeroed object, and an array of n zeroed objects, of a type. */
#define QV_ARENA_NEW(arena, type) ((type *)qv_arena_calloc(arena, 1, sizeof(type), _Alignof(type)))
#define QV_ARENA_ARRAY(arena, type, n)                                                             \
    ((type *)qv_arena_calloc(arena, n, sizeof(type), _Alignof(type)))

/* Give back what was not needed of the latest allocation, which had `size` bytes; nothing happens
 * to an earlier one. */
void qv_arena_shrink(qv_arena *arena, const void *data, size_t size, size_t needed);

/* Copies; strings come back terminated. NULL beyond the limit. */
void *qv_arena_memdup(qv_arena *arena, const void *data, size_t size, size_t align);
char *qv_arena_strdup(qv_arena *arena, const char *text);
char *qv_arena_strndup(qv_arena *arena, const char *text, size_t size); /* exactly size bytes + 0 */
char *qv_arena_printf(qv_arena *arena, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
char *qv_arena_vprintf(qv_arena *arena, const char *format, va_list args)
    __attribute__((format(printf, 2, 0)));

#endif
