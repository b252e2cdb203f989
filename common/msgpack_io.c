#include "common/msgpack_io.h"

#include "common/utf8.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* --- UTF-8 ----------------------------------------------------------------------------------- */

size_t qv_utf8_valid_prefix(const char *text, size_t size)
{
    size_t at = 0;
    while (at < size) {
        /* Most text is ASCII: eight bytes at a time. */
        uint64_t block;
        for (; at + sizeof(block) <= size; at += sizeof(block)) {
            memcpy(&block, text + at, sizeof(block));
            if (block & UINT64_C(0x8080808080808080))
                break;
        }
        while (at < size && (unsigned char)text[at] < 0x80)
            at++;
        if (at == size)
            break;
        uint32_t code;
        size_t length = qv_utf8_decode(text + at, size - at, &code);
        if (length == 0)
            break;
        at += length;
    }
    return at;
}

size_t qv_utf8_cut(const char *text, size_t size, size_t max)
{
    if (size <= max)
        return size;
    while (max > 0 && ((unsigned char)text[max] & 0xc0) == 0x80)
        max--;
    return max;
}

/* --- reading --------------------------------------------------------------------------------- */

qv_reader qv_reader_init(const void *data, size_t size)
{
    const unsigned char *bytes = data;
    return (qv_reader){bytes, bytes, bytes + size};
}

/* What can be wrong with the bytes at a place. */
typedef enum { READ_OK, READ_END, READ_CUT, READ_TOO_LONG, READ_EXT, READ_RESERVED } read_result;

static uint64_t load_big_endian(const unsigned char *p, size_t n)
{
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++)
        value = value << 8 | p[i];
    return value;
}

static void set_signed(qv_item *out, int64_t value)
{
    out->kind = value < 0 ? QV_ITEM_INT : QV_ITEM_UINT;
    out->integer = value;
}

static void set_float(qv_item *out, uint64_t bits, size_t width)
{
    out->kind = QV_ITEM_FLOAT;
    if (width == 8) {
        memcpy(&out->real, &bits, sizeof(out->real));
    } else {
        uint32_t low = (uint32_t)bits;
        float value;
        memcpy(&value, &low, sizeof(value));
        out->real = value;
    }
}

/* How the type bytes 0xc0 to 0xdf go on: the kind, and the width of the number or size after them.
 */
typedef enum { FORM_KIND, FORM_SIGNED, FORM_EXT, FORM_RESERVED } form;

static const struct {
    uint8_t form, kind, width, value;
} type_bytes[32] = {
    [0x00] = {FORM_KIND, QV_ITEM_NIL, 0, 0},
    [0x01] = {FORM_RESERVED, 0, 0, 0},
    [0x02] = {FORM_KIND, QV_ITEM_BOOL, 0, 0},
    [0x03] = {FORM_KIND, QV_ITEM_BOOL, 0, 1},
    [0x04] = {FORM_KIND, QV_ITEM_BIN, 1, 0},
    [0x05] = {FORM_KIND, QV_ITEM_BIN, 2, 0},
    [0x06] = {FORM_KIND, QV_ITEM_BIN, 4, 0},
    [0x07] = {FORM_EXT, 0, 0, 0},
    [0x08] = {FORM_EXT, 0, 0, 0},
    [0x09] = {FORM_EXT, 0, 0, 0},
    [0x0a] = {FORM_KIND, QV_ITEM_FLOAT, 4, 0},
    [0x0b] = {FORM_KIND, QV_ITEM_FLOAT, 8, 0},
    [0x0c] = {FORM_KIND, QV_ITEM_UINT, 1, 0},
    [0x0d] = {FORM_KIND, QV_ITEM_UINT, 2, 0},
    [0x0e] = {FORM_KIND, QV_ITEM_UINT, 4, 0},
    [0x0f] = {FORM_KIND, QV_ITEM_UINT, 8, 0},
    [0x10] = {FORM_SIGNED, QV_ITEM_INT, 1, 0},
    [0x11] = {FORM_SIGNED, QV_ITEM_INT, 2, 0},
    [0x12] = {FORM_SIGNED, QV_ITEM_INT, 4, 0},
    [0x13] = {FORM_SIGNED, QV_ITEM_INT, 8, 0},
    [0x14] = {FORM_EXT, 0, 0, 0},
    [0x15] = {FORM_EXT, 0, 0, 0},
    [0x16] = {FORM_EXT, 0, 0, 0},
    [0x17] = {FORM_EXT, 0, 0, 0},
    [0x18] = {FORM_EXT, 0, 0, 0},
    [0x19] = {FORM_KIND, QV_ITEM_STR, 1, 0},
    [0x1a] = {FORM_KIND, QV_ITEM_STR, 2, 0},
    [0x1b] = {FORM_KIND, QV_ITEM_STR, 4, 0},
    [0x1c] = {FORM_KIND, QV_ITEM_ARRAY, 2, 0},
    [0x1d] = {FORM_KIND, QV_ITEM_ARRAY, 4, 0},
    [0x1e] = {FORM_KIND, QV_ITEM_MAP, 2, 0},
    [0x1f] = {FORM_KIND, QV_ITEM_MAP, 4, 0},
};

/* The header at p[0]; sets kind, value and size. *used is its length in bytes. */
static read_result read_header(const unsigned char *p, size_t left, qv_item *out, size_t *used)
{
    unsigned char byte = p[0];
    *used = 1;
    if (byte < 0x80 || byte >= 0xe0) {
        set_signed(out, (int8_t)byte);
    } else if (byte < 0xc0) {
        out->kind = byte < 0x90 ? QV_ITEM_MAP : byte < 0xa0 ? QV_ITEM_ARRAY : QV_ITEM_STR;
        out->size = byte < 0xa0 ? byte & 0x0f : byte & 0x1f;
    } else {
        size_t width = type_bytes[byte - 0xc0].width;
        if (left < 1 + width)
            return READ_CUT;
        *used += width;
        uint64_t value = load_big_endian(p + 1, width);
        switch ((form)type_bytes[byte - 0xc0].form) {
        case FORM_EXT:
            return READ_EXT;
        case FORM_RESERVED:
            return READ_RESERVED;
        case FORM_SIGNED: /* extend the sign from `width` bytes */
            set_signed(out, (int64_t)(value << (64 - 8 * width)) >> (64 - 8 * width));
            break;
        case FORM_KIND:
            out->kind = (qv_item_kind)type_bytes[byte - 0xc0].kind;
            if (out->kind == QV_ITEM_BOOL)
                out->boolean = type_bytes[byte - 0xc0].value;
            else if (out->kind == QV_ITEM_FLOAT)
                set_float(out, value, width);
            else if (out->kind == QV_ITEM_UINT)
                out->uint = value;
            else
                out->size = (uint32_t)value;
            break;
        }
    }
    return READ_OK;
}

/* Read one value; on failure the reader stays, and `out` may tell what was announced. Inlined where
 * it is called: it is most of the time that decoding takes. */
__attribute__((always_inline)) static inline read_result read_item(qv_reader *reader, qv_item *out)
{
    size_t left = (size_t)(reader->end - reader->next), used;
    *out = (qv_item){0};
    if (left == 0)
        return READ_END;
    read_result result = read_header(reader->next, left, out, &used);
    if (result != READ_OK)
        return result;
    left -= used;
    bool is_bytes = out->kind == QV_ITEM_STR || out->kind == QV_ITEM_BIN;
    /* Each entry needs a byte at least, each pair two. */
    if (out->size > (out->kind == QV_ITEM_MAP ? left / 2 : left))
        return READ_TOO_LONG;
    reader->next += used;
    if (is_bytes) {
        out->data = (const char *)reader->next;
        reader->next += out->size;
    }
    return READ_OK;
}

bool qv_reader_try(qv_reader *reader, qv_item *out)
{
    return read_item(reader, out) == READ_OK;
}

/* Say what is wrong. */
__attribute__((cold, noinline)) static qv_status fail_read(const qv_reader *reader,
                                                           const qv_item *out, read_result result)
{
    size_t at = (size_t)(reader->next - reader->start);
    size_t total = (size_t)(reader->end - reader->start);
    switch (result) {
    case READ_OK:
        break;
    case READ_END:
        return qv_fail(QV_ERR_FORMAT, "the message ends at byte %zu, where a value should be", at);
    case READ_CUT:
        return qv_fail(QV_ERR_FORMAT, "the message ends within the value at byte %zu", at);
    case READ_TOO_LONG:
        return qv_fail(QV_ERR_FORMAT,
                       "the %s at byte %zu announces %u %s, but the message ends at byte %zu",
                       out->kind == QV_ITEM_STR     ? "string"
                       : out->kind == QV_ITEM_BIN   ? "binary data"
                       : out->kind == QV_ITEM_ARRAY ? "array"
                                                    : "map",
                       at, out->size,
                       out->kind == QV_ITEM_ARRAY ? "entries"
                       : out->kind == QV_ITEM_MAP ? "pairs"
                                                  : "bytes",
                       total);
    case READ_EXT:
        return qv_fail(QV_ERR_FORMAT,
                       "the value at byte %zu is of an extension type, "
                       "which is not supported",
                       at);
    case READ_RESERVED:
        return qv_fail(QV_ERR_FORMAT, "byte %zu is 0xc1, which msgpack never uses", at);
    }
    return qv_fail(QV_ERR_INTERNAL, "unknown result %d of the msgpack reader", (int)result);
}

qv_status qv_reader_next(qv_reader *reader, qv_item *out)
{
    read_result result = read_item(reader, out);
    return result == READ_OK ? QV_OK : fail_read(reader, out, result);
}

qv_status qv_reader_skip(qv_reader *reader)
{
    qv_item item;
    for (uint64_t left = 1; left > 0; left--) {
        QV_TRY(qv_reader_next(reader, &item));
        if (item.kind == QV_ITEM_ARRAY)
            left += item.size;
        else if (item.kind == QV_ITEM_MAP)
            left += 2 * (uint64_t)item.size;
    }
    return QV_OK;
}

/* Copy text for people: cut at a character, control bytes as '?'. */
static void printable(char *out, size_t out_size, const char *text, size_t size)
{
    size_t shown = qv_utf8_valid_prefix(text, qv_utf8_cut(text, size, out_size - 4));
    for (size_t i = 0; i < shown; i++)
        out[i] = (unsigned char)text[i] < 0x20 || text[i] == 0x7f ? '?' : text[i];
    strcpy(out + shown, shown < size ? "..." : "");
}

const char *qv_item_describe(const qv_item *item, char text[QV_ITEM_TEXT_MAX])
{
    char quoted[48];
    switch (item->kind) {
    case QV_ITEM_NIL:
        return strcpy(text, "nil is no value");
    case QV_ITEM_BOOL:
        return strcpy(text, item->boolean ? "true is a boolean" : "false is a boolean");
    case QV_ITEM_UINT:
        snprintf(text, QV_ITEM_TEXT_MAX, "%llu is an integer", (unsigned long long)item->uint);
        return text;
    case QV_ITEM_INT:
        snprintf(text, QV_ITEM_TEXT_MAX, "%lld is an integer", (long long)item->integer);
        return text;
    case QV_ITEM_FLOAT:
        snprintf(text, QV_ITEM_TEXT_MAX, "%.15g is a floating-point number", item->real);
        return text;
    case QV_ITEM_STR:
        printable(quoted, sizeof(quoted), item->data, item->size);
        snprintf(text, QV_ITEM_TEXT_MAX, "'%s' is a string", quoted);
        return text;
    case QV_ITEM_BIN:
        return strcpy(text, "this is binary data");
    case QV_ITEM_ARRAY:
        return strcpy(text, "this is an array");
    case QV_ITEM_MAP:
        return strcpy(text, "this is a map");
    }
    return strcpy(text, "this is an unknown value");
}

/* --- scanning -------------------------------------------------------------------------------- */

typedef struct {
    qv_reader reader;
    uint32_t depth, max_depth;
    uint32_t nodes, max_nodes;
    struct {
        uint64_t left; /* values still to come; keys and values of a map count one each */
        bool is_map;
    } open[QV_MSGPACK_MAX_DEPTH]; /* the containers around the next value; [0] the outermost */
    const char *key;              /* the latest key of the outermost map */
    uint32_t key_size;
} scan;

static qv_status scan_string(const qv_item *item, const char *what)
{
    size_t valid = qv_utf8_valid_prefix(item->data, item->size);
    if (valid != item->size)
        return qv_fail(QV_ERR_FORMAT, "%s is not valid UTF-8 (byte %zu of it)", what, valid);
    return QV_OK;
}

/* A key of the outermost map: remember it for errors, and where its value begins for the probes. */
static void scan_outer_key(scan *s, const qv_item *key, qv_msgpack_probe *probes, size_t n_probes)
{
    s->key = key->data;
    s->key_size = key->size;
    for (size_t i = 0; i < n_probes; i++)
        if (probes[i].value == 0 && key->size > 0 && probes[i].key[0] == key->data[0] &&
            strlen(probes[i].key) == key->size && memcmp(probes[i].key, key->data, key->size) == 0)
            probes[i].value = (size_t)(s->reader.next - s->reader.start);
}

/* Take one value, a key where one is due. */
static qv_status scan_value(scan *s, qv_msgpack_probe *probes, size_t n_probes)
{
    bool is_key = false;
    if (s->depth > 0) {
        uint64_t *left = &s->open[s->depth - 1].left;
        is_key = s->open[s->depth - 1].is_map && *left % 2 == 0;
        (*left)--;
    }
    if (s->depth == 1 && is_key)
        s->key = NULL;

    qv_item item;
    read_result result = read_item(&s->reader, &item);
    if (result != READ_OK)
        return fail_read(&s->reader, &item, result);
    if (++s->nodes > s->max_nodes)
        return qv_fail(QV_ERR_LIMIT, "the message has more than %u values", s->max_nodes);

    if (is_key) {
        if (item.kind != QV_ITEM_STR) {
            char text[QV_ITEM_TEXT_MAX];
            return qv_fail(QV_ERR_FORMAT, "the keys of a map must be strings, and %s",
                           qv_item_describe(&item, text));
        }
        QV_TRY(scan_string(&item, "a key"));
        if (s->depth == 1)
            scan_outer_key(s, &item, probes, n_probes);
    } else if (item.kind == QV_ITEM_STR) {
        QV_TRY(scan_string(&item, "the string"));
    } else if (item.kind == QV_ITEM_ARRAY || item.kind == QV_ITEM_MAP) {
        if (s->depth == s->max_depth)
            return qv_fail(QV_ERR_LIMIT, "maps and arrays are nested deeper than %u", s->max_depth);
        s->open[s->depth].is_map = item.kind == QV_ITEM_MAP;
        s->open[s->depth].left = (uint64_t)item.size * (item.kind == QV_ITEM_MAP ? 2 : 1);
        s->depth++;
    }
    while (s->depth > 0 && s->open[s->depth - 1].left == 0)
        s->depth--;
    return QV_OK;
}

qv_status qv_msgpack_scan(const void *data, size_t size, qv_msgpack_limits limits,
                          qv_msgpack_probe *probes, size_t n_probes)
{
    scan s; /* `open` is not cleared: a kilobyte for each message */
    s.reader = qv_reader_init(data, size);
    s.depth = s.nodes = s.key_size = 0;
    s.max_depth = limits.max_depth < QV_MSGPACK_MAX_DEPTH ? limits.max_depth : QV_MSGPACK_MAX_DEPTH;
    s.max_nodes = limits.max_nodes;
    s.key = NULL;
    do {
        qv_status status = scan_value(&s, probes, n_probes);
        if (status != QV_OK) {
            char key[64];
            if (s.key == NULL)
                return status;
            printable(key, sizeof(key), s.key, s.key_size);
            return qv_fail_prefix(status, "%s", key);
        }
    } while (s.depth > 0);

    if (s.reader.next != s.reader.end)
        return qv_fail(QV_ERR_FORMAT, "%zu bytes follow after the end of the message",
                       (size_t)(s.reader.end - s.reader.next));
    return QV_OK;
}

/* --- writing --------------------------------------------------------------------------------- */

/* Make room for `size` more bytes, of which there are too few. */
static bool writer_grow(qv_msgpack_writer *w, size_t size)
{
    size_t capacity = w->capacity == 0 ? 512 : 2 * w->capacity;
    while (capacity - w->size < size)
        capacity *= 2;
    char *grown = w->full ? NULL : qv_arena_alloc(w->arena, capacity, 1);
    if (grown == NULL) {
        w->full = true;
        return false;
    }
    if (w->size > 0)
        memcpy(grown, w->data, w->size);
    w->data = grown;
    w->capacity = capacity;
    return true;
}

static int writer_append(void *user, const char *data, size_t size)
{
    qv_msgpack_writer *w = user;
    if (w->full || (size > w->capacity - w->size && !writer_grow(w, size)))
        return -1;
    memcpy(w->data + w->size, data, size);
    w->size += size;
    return 0;
}

void qv_msgpack_writer_init(qv_msgpack_writer *writer, qv_arena *arena)
{
    *writer = (qv_msgpack_writer){.arena = arena};
    msgpack_packer_init(&writer->packer, writer, writer_append);
}

void qv_msgpack_writer_raw(qv_msgpack_writer *writer, const void *data, size_t size)
{
    if (size > 0)
        writer_append(writer, data, size);
}

void qv_msgpack_writer_key(qv_msgpack_writer *w, const char *text, size_t size)
{
    QV_ASSERT(size < 32);
    if (w->full || (size + 1 > w->capacity - w->size && !writer_grow(w, size + 1)))
        return;
    w->data[w->size] = (char)(0xa0 | size); /* fixstr */
    memcpy(w->data + w->size + 1, text, size);
    w->size += size + 1;
}

void qv_msgpack_writer_str(qv_msgpack_writer *writer, const char *text, size_t size)
{
    static const char replacement[3] = "\xef\xbf\xbd"; /* U+FFFD, for one byte */
    size_t valid = size > 0 ? qv_utf8_valid_prefix(text, size) : 0;
    size_t packed = size;
    for (size_t at = valid; at < size; at += qv_utf8_valid_prefix(text + at, size - at)) {
        packed += sizeof(replacement) - 1;
        at++;
    }
    msgpack_pack_str(&writer->packer, packed);
    qv_msgpack_writer_raw(writer, text, valid);
    for (size_t at = valid; at < size;) {
        qv_msgpack_writer_raw(writer, replacement, sizeof(replacement));
        at++;
        valid = qv_utf8_valid_prefix(text + at, size - at);
        qv_msgpack_writer_raw(writer, text + at, valid);
        at += valid;
    }
}

qv_status qv_msgpack_writer_finish(qv_msgpack_writer *writer)
{
    qv_arena_shrink(writer->arena, writer->data, writer->capacity, writer->size);
    writer->capacity = writer->size;
    if (writer->full)
        return qv_fail(QV_ERR_LIMIT, "a message needs more memory than the %zu bytes of its arena",
                       writer->arena->limit_bytes);
    return QV_OK;
}
