/* msgpack, the bytes: a reader that walks untrusted input without allocating, and a writer that
 * packs into an arena (over msgpack-c). What the values mean is protocol.h's business.
 *
 * qv_msgpack_scan goes over a whole input first and bounds everything: nesting, the number of
 * values, every length against the bytes that are left, UTF-8 in strings, strings as map keys. A
 * five-byte header that announces four billion entries costs a comparison. Extension types are
 * refused. Pure functions on the caller's data: any thread.
 */
#ifndef QV_COMMON_MSGPACK_IO_H
#define QV_COMMON_MSGPACK_IO_H

#include "common/arena.h"
#include "common/status.h"

#include <msgpack.h>
#include <stdint.h>

/* --- reading --------------------------------------------------------------------------------- */

typedef enum {
    QV_ITEM_NIL,
    QV_ITEM_BOOL,
    QV_ITEM_UINT,  /* an integer from 0 */
    QV_ITEM_INT,   /* an integer below 0 */
    QV_ITEM_FLOAT, /* 32 or 64 bits */
    QV_ITEM_STR,
    QV_ITEM_BIN,
    QV_ITEM_ARRAY,
    QV_ITEM_MAP
} qv_item_kind;

/* One value; of an array or a map only its header, what is inside follows. */
typedef struct {
    qv_item_kind kind;
    union {
        bool boolean;
        uint64_t uint;
        int64_t integer;
        double real;
    };
    uint32_t size;    /* bytes of a STR or BIN, entries of an ARRAY, pairs of a MAP */
    const char *data; /* STR, BIN: points into the input */
} qv_item;

typedef struct {
    const unsigned char *start, *next, *end;
} qv_reader;

qv_reader qv_reader_init(const void *data, size_t size);

/* Read the next value. The size of what it announces is checked against the bytes that are left.
 * Errors: FORMAT, with the offset. */
qv_status qv_reader_next(qv_reader *reader, qv_item *out);

/* The same without an error text: false where qv_reader_next fails. */
bool qv_reader_try(qv_reader *reader, qv_item *out);

/* Pass over one value with everything inside it. Errors: FORMAT. */
qv_status qv_reader_skip(qv_reader *reader);

/* "'hot' is a string", "-3 is an integer", "this is an array": for error sentences. Strings are cut
 * short and made printable. Returns text. */
#define QV_ITEM_TEXT_MAX 96
const char *qv_item_describe(const qv_item *item, char text[QV_ITEM_TEXT_MAX]);

typedef struct {
    uint32_t max_depth; /* at most QV_MSGPACK_MAX_DEPTH; more counts as that */
    uint32_t max_nodes; /* values in all, keys included */
} qv_msgpack_limits;

#define QV_MSGPACK_MAX_DEPTH 64

/* A key of the outermost map whose value the scan looks for. */
typedef struct {
    const char *key;
    size_t
        value; /* out: offset of the value, 0 if the key was not met; filled on failure as well */
} qv_msgpack_probe;

/* Check that the input is exactly one well-formed value within the limits. Errors name the key of
 * the outermost map in which they are. Errors: FORMAT, LIMIT. */
qv_status qv_msgpack_scan(const void *data, size_t size, qv_msgpack_limits limits,
                          qv_msgpack_probe *probes, size_t n_probes);

/* --- UTF-8 ----------------------------------------------------------------------------------- */

/* Bytes of the longest prefix that is valid UTF-8 (no surrogates, no overlong forms); `size` if all
 * of it is. */
size_t qv_utf8_valid_prefix(const char *text, size_t size);

/* The largest length <= max at which the text can be cut without splitting a character. */
size_t qv_utf8_cut(const char *text, size_t size, size_t max);

/* --- writing --------------------------------------------------------------------------------- */

/* Use the msgpack_pack_* functions on &writer.packer; they fail only when the arena is full. */
typedef struct {
    msgpack_packer packer;
    qv_arena *arena;
    char *data; /* [size] of [capacity], in the arena */
    size_t size, capacity;
    bool full; /* the arena refused: the output is incomplete */
} qv_msgpack_writer;

/* Do not move the writer afterwards. */
void qv_msgpack_writer_init(qv_msgpack_writer *writer, qv_arena *arena);

/* Append bytes that are packed already. */
void qv_msgpack_writer_raw(qv_msgpack_writer *writer, const void *data, size_t size);

/* Pack a str of less than 32 bytes that is known to be UTF-8, as the names of fields are. */
void qv_msgpack_writer_key(qv_msgpack_writer *writer, const char *text, size_t size);

/* Pack a str; bytes that are not UTF-8 become U+FFFD. */
void qv_msgpack_writer_str(qv_msgpack_writer *writer, const char *text, size_t size);

/* Give room that was not needed back to the arena. LIMIT if the arena refused at any point. */
qv_status qv_msgpack_writer_finish(qv_msgpack_writer *writer);

#endif
