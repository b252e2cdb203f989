#include "common/arena.h"

#include "common/status.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#define QV_HAS_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define QV_HAS_ASAN 1
#endif
#endif

#ifdef QV_HAS_ASAN
#include <sanitizer/asan_interface.h>
#define POISON(data, size)   ASAN_POISON_MEMORY_REGION(data, size)
#define UNPOISON(data, size) ASAN_UNPOISON_MEMORY_REGION(data, size)
#define RED_ZONE             8 /* poisoned bytes after each allocation, so overruns are seen */
#else
#define POISON(data, size)   ((void)(data), (void)(size))
#define UNPOISON(data, size) ((void)(data), (void)(size))
#define RED_ZONE             0
#endif

#define DEFAULT_CHUNK_BYTES ((size_t)64 << 10)

struct qv_arena_chunk {
    qv_arena_chunk *next;
    size_t size; /* bytes in data */
    size_t used; /* bytes handed out */
    _Alignas(max_align_t) unsigned char data[];
};

void qv_arena_init(qv_arena *arena, size_t chunk_bytes, size_t limit_bytes)
{
    *arena = (qv_arena){.chunk_bytes = chunk_bytes, .limit_bytes = limit_bytes};
}

void qv_arena_deinit(qv_arena *arena)
{
    for (qv_arena_chunk *chunk = arena->first, *next; chunk != NULL; chunk = next) {
        next = chunk->next;
        UNPOISON(chunk->data, chunk->size);
        free(chunk);
    }
    qv_arena_init(arena, arena->chunk_bytes, arena->limit_bytes);
}

static void truncate_chunk(qv_arena_chunk *chunk, size_t used)
{
    POISON(chunk->data + used, chunk->size - used);
    chunk->used = used;
}

void qv_arena_reset(qv_arena *arena)
{
    qv_arena_rewind(arena, (qv_arena_mark){NULL, 0});
}

qv_arena_mark qv_arena_get_mark(const qv_arena *arena)
{
    return (qv_arena_mark){arena->current, arena->current != NULL ? arena->current->used : 0};
}

void qv_arena_rewind(qv_arena *arena, qv_arena_mark mark)
{
    /* A mark taken before the first allocation names no chunk: it means the very start. */
    qv_arena_chunk *target = mark.chunk != NULL ? mark.chunk : arena->first;
    if (target == NULL)
        return;
    truncate_chunk(target, mark.used);
    for (qv_arena_chunk *chunk = target; chunk != arena->current;) {
        chunk = chunk->next;
        truncate_chunk(chunk, 0);
    }
    arena->current = target;
}

size_t qv_arena_used(const qv_arena *arena)
{
    size_t used = 0;
    for (const qv_arena_chunk *chunk = arena->first; chunk != NULL; chunk = chunk->next)
        used += chunk->used;
    return used;
}

size_t qv_arena_held(const qv_arena *arena)
{
    return arena->held_bytes;
}

/* Take `size` aligned bytes from a chunk, or NULL if they do not fit. */
static void *chunk_take(qv_arena_chunk *chunk, size_t size, size_t align)
{
    uintptr_t at = (uintptr_t)chunk->data + chunk->used;
    size_t padding = (size_t)(-at & (align - 1));
    size_t room = chunk->size - chunk->used;
    if (padding > room || size > room - padding)
        return NULL;
    unsigned char *data = chunk->data + chunk->used + padding;
    chunk->used += padding + size;
    return data;
}

static qv_arena_chunk *new_chunk(qv_arena *arena, size_t need)
{
    size_t size = arena->chunk_bytes != 0 ? arena->chunk_bytes : DEFAULT_CHUNK_BYTES;
    if (size < need)
        size = need;
    size_t room = (arena->limit_bytes != 0 ? arena->limit_bytes : SIZE_MAX) - arena->held_bytes;
    if (room < sizeof(qv_arena_chunk) || need > room - sizeof(qv_arena_chunk))
        return NULL;
    if (size > room - sizeof(qv_arena_chunk))
        size = room - sizeof(qv_arena_chunk); /* the last chunk is as small as the limit says */

    qv_arena_chunk *chunk = malloc(sizeof *chunk + size);
    if (chunk == NULL)
        return NULL;
    chunk->size = size;
    truncate_chunk(chunk, 0);
    arena->held_bytes += sizeof *chunk + size;
    return chunk;
}

/* Make a chunk with room for `need` bytes the current one: the smallest that fits of the empty ones
 * behind the current, so that large ones are left for large requests, else a new one. False beyond
 * the limit. */
static bool advance(qv_arena *arena, size_t need)
{
    qv_arena_chunk **behind = arena->current != NULL ? &arena->current->next : &arena->first;
    qv_arena_chunk **best = NULL;
    for (qv_arena_chunk **link = behind; *link != NULL; link = &(*link)->next)
        if ((*link)->size >= need && (best == NULL || (*link)->size < (*best)->size))
            best = link;
    qv_arena_chunk *chunk = best != NULL ? *best : new_chunk(arena, need);
    if (chunk == NULL)
        return false;
    if (best != NULL)
        *best = chunk->next;
    chunk->next = *behind;
    *behind = chunk;
    arena->current = chunk;
    return true;
}

void *qv_arena_alloc(qv_arena *arena, size_t size, size_t align)
{
    QV_ASSERT(align != 0 && (align & (align - 1)) == 0);
    /* At least one byte keeps pointers unique; `need` is the worst case of a fresh chunk. */
    size_t take = (size != 0 ? size : 1) + RED_ZONE;
    size_t need = take + align - 1;
    if (take < size || need < take)
        return NULL;

    void *data = arena->current != NULL ? chunk_take(arena->current, take, align) : NULL;
    if (data == NULL) {
        if (!advance(arena, need))
            return NULL;
        data = chunk_take(arena->current, take, align);
    }
    UNPOISON(data, size);
    return data;
}

void qv_arena_shrink(qv_arena *arena, const void *data, size_t size, size_t needed)
{
    qv_arena_chunk *chunk = arena->current;
    const unsigned char *begin = data;
    if (chunk == NULL || needed == 0 || needed >= size ||
        begin + size + RED_ZONE != chunk->data + chunk->used)
        return;
    truncate_chunk(chunk, (size_t)(begin - chunk->data) + needed + RED_ZONE);
}

void *qv_arena_calloc(qv_arena *arena, size_t n, size_t size, size_t align)
{
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes))
        return NULL;
    void *data = qv_arena_alloc(arena, bytes, align);
    if (data != NULL)
        memset(data, 0, bytes);
    return data;
}

void *qv_arena_memdup(qv_arena *arena, const void *data, size_t size, size_t align)
{
    void *copy = qv_arena_alloc(arena, size, align);
    if (copy != NULL && size != 0)
        memcpy(copy, data, size);
    return copy;
}

char *qv_arena_strndup(qv_arena *arena, const char *text, size_t size)
{
    if (size == SIZE_MAX)
        return NULL;
    char *copy = qv_arena_alloc(arena, size + 1, 1);
    if (copy != NULL) {
        if (size != 0)
            memcpy(copy, text, size);
        copy[size] = '\0';
    }
    return copy;
}

char *qv_arena_strdup(qv_arena *arena, const char *text)
{
    return qv_arena_strndup(arena, text, strlen(text));
}

char *qv_arena_vprintf(qv_arena *arena, const char *format, va_list args)
{
    va_list again;
    va_copy(again, args);
    int size = vsnprintf(NULL, 0, format, args);
    char *text = size >= 0 ? qv_arena_alloc(arena, (size_t)size + 1, 1) : NULL;
    if (text != NULL)
        vsnprintf(text, (size_t)size + 1, format, again);
    va_end(again);
    return text;
}

char *qv_arena_printf(qv_arena *arena, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    char *text = qv_arena_vprintf(arena, format, args);
    va_end(args);
    return text;
}
