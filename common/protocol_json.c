/* Messages as JSON. JSON is turned into msgpack and goes through the decoder, and the encoder's
 * bytes are turned into JSON: one set of checks, one table. */
#include "common/msgpack_io.h"
#include "common/protocol.h"

#include <math.h>
#include <string.h>

/* --- msgpack to JSON ------------------------------------------------------------------------- */

static qv_status read_json(qv_reader *reader, json_t **out);

static qv_status read_json_array(qv_reader *reader, uint32_t count, json_t *array)
{
    for (uint32_t i = 0; i < count; i++) {
        json_t *value;
        QV_TRY(read_json(reader, &value));
        if (json_array_append_new(array, value) != 0)
            return qv_fail(QV_ERR_NOMEM, "no memory for a JSON array");
    }
    return QV_OK;
}

/* jansson's keys are C strings; its objects silently keep the last of two equal keys. */
static qv_status read_json_object(qv_reader *reader, uint32_t count, json_t *object)
{
    for (uint32_t i = 0; i < count; i++) {
        qv_item key;
        json_t *value;
        QV_TRY(qv_reader_next(reader, &key));
        if (memchr(key.data, 0, key.size) != NULL)
            return qv_fail(QV_ERR_FORMAT, "a key with a zero byte cannot be written as JSON");
        char *name = strndup(key.data, key.size);
        if (name == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for a key of %u bytes", key.size);
        qv_status status = QV_OK;
        if (json_object_get(object, name) != NULL)
            status = qv_fail(QV_ERR_FORMAT, "the key '%.40s' is there twice", name);
        else if ((status = read_json(reader, &value)) == QV_OK &&
                 json_object_set_new(object, name, value) != 0)
            status = qv_fail(QV_ERR_NOMEM, "no memory for a JSON object");
        free(name);
        QV_TRY(status);
    }
    return QV_OK;
}

static qv_status read_json(qv_reader *reader, json_t **out)
{
    qv_item item;
    qv_status status = QV_OK;
    json_t *value = NULL;
    QV_TRY(qv_reader_next(reader, &item));
    switch (item.kind) {
    case QV_ITEM_NIL:
        value = json_null();
        break;
    case QV_ITEM_BOOL:
        value = json_boolean(item.boolean);
        break;
    case QV_ITEM_UINT:
        if (item.uint > INT64_MAX)
            return qv_fail(QV_ERR_LIMIT, "%llu is too large for an integer in JSON",
                           (unsigned long long)item.uint);
        value = json_integer((json_int_t)item.uint);
        break;
    case QV_ITEM_INT:
        value = json_integer(item.integer);
        break;
    case QV_ITEM_FLOAT:
        if (!isfinite(item.real))
            return qv_fail(QV_ERR_FORMAT, "%g cannot be written as JSON", item.real);
        value = json_real(item.real);
        break;
    case QV_ITEM_STR:
        value = json_stringn(item.data, item.size);
        break;
    case QV_ITEM_BIN:
        return qv_fail(QV_ERR_FORMAT, "binary data cannot be written as JSON");
    case QV_ITEM_ARRAY:
        value = json_array();
        if (value != NULL)
            status = read_json_array(reader, item.size, value);
        break;
    case QV_ITEM_MAP:
        value = json_object();
        if (value != NULL)
            status = read_json_object(reader, item.size, value);
        break;
    }
    if (value == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a JSON value");
    if (status != QV_OK)
        json_decref(value);
    else
        *out = value;
    return status;
}

qv_status qv_msgpack_to_json(qv_str raw, json_t **out)
{
    qv_msgpack_limits limits = {qv_protocol_default_limits.max_depth,
                                qv_protocol_default_limits.max_nodes};
    if (raw.size == 0)
        return qv_fail(QV_ERR_FORMAT, "there are no bytes of a value");
    QV_TRY(qv_msgpack_scan(raw.data, raw.size, limits, NULL, 0));
    qv_reader reader = qv_reader_init(raw.data, raw.size);
    return read_json(&reader, out);
}

/* --- JSON to msgpack ------------------------------------------------------------------------- */

static qv_status write_json(qv_msgpack_writer *w, const json_t *value, uint32_t depth)
{
    if (depth > QV_MSGPACK_MAX_DEPTH)
        return qv_fail(QV_ERR_LIMIT, "objects and arrays are nested deeper than %d",
                       QV_MSGPACK_MAX_DEPTH);
    switch (json_typeof(value)) {
    case JSON_OBJECT: {
        const char *key;
        json_t *inner;
        msgpack_pack_map(&w->packer, json_object_size(value));
        json_object_foreach((json_t *)value, key, inner)
        {
            qv_msgpack_writer_str(w, key, strlen(key));
            QV_TRY(write_json(w, inner, depth + 1));
        }
        break;
    }
    case JSON_ARRAY: {
        size_t n = json_array_size(value);
        msgpack_pack_array(&w->packer, n);
        for (size_t i = 0; i < n; i++)
            QV_TRY(write_json(w, json_array_get(value, i), depth + 1));
        break;
    }
    case JSON_STRING:
        qv_msgpack_writer_str(w, json_string_value(value), json_string_length(value));
        break;
    case JSON_INTEGER:
        msgpack_pack_int64(&w->packer, json_integer_value(value));
        break;
    case JSON_REAL:
        msgpack_pack_double(&w->packer, json_real_value(value));
        break;
    case JSON_TRUE:
        msgpack_pack_true(&w->packer);
        break;
    case JSON_FALSE:
        msgpack_pack_false(&w->packer);
        break;
    case JSON_NULL:
        msgpack_pack_nil(&w->packer);
        break;
    }
    return QV_OK;
}

qv_status qv_json_to_msgpack(const json_t *value, qv_arena *arena, qv_str *out)
{
    qv_msgpack_writer w;
    qv_msgpack_writer_init(&w, arena);
    QV_TRY(write_json(&w, value, 0));
    QV_TRY(qv_msgpack_writer_finish(&w));
    if (w.size > UINT32_MAX)
        return qv_fail(QV_ERR_LIMIT, "a value of %zu bytes is too large", w.size);
    *out = (qv_str){w.data, (uint32_t)w.size};
    return QV_OK;
}

/* --- whole messages -------------------------------------------------------------------------- */

qv_status qv_message_from_json(const json_t *object, qv_direction direction, qv_arena *arena,
                               qv_message *out)
{
    qv_str raw;
    memset(out, 0, sizeof(*out));
    out->type = QV_MSG_COUNT;
    QV_TRY(qv_json_to_msgpack(object, arena, &raw));
    return qv_message_decode(raw.data, raw.size, direction, NULL, arena, out);
}

qv_status qv_message_to_json(const qv_message *message, json_t **out)
{
    qv_arena arena;
    const void *data;
    size_t size;
    qv_arena_init(&arena, 0, 0);
    qv_status status = qv_message_encode(message, &arena, &data, &size);
    if (status == QV_OK)
        status = qv_msgpack_to_json((qv_str){data, (uint32_t)size}, out);
    qv_arena_deinit(&arena);
    return status;
}
