/* The format: 8 bytes of header length (little-endian), a JSON object from tensor names to
 * {dtype, shape, data_offsets: [begin, end]}, and the data that the offsets count from. The tensors
 * must cover the data exactly: no gap, no overlap, nothing left over. */
#include "models/safetensors.h"

#include "common/json.h"
#include "common/map.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are used as stored");

#define INDEX_MAX_BYTES (64u << 20)
#define MAX_SHARDS      4096

typedef struct {
    char *path; /* owned: for messages */
    const uint8_t *data;
    size_t size;
    bool mapped; /* unmap when closed */
} shard;

struct qv_safetensors {
    shard *shards;
    size_t n_shards;
    qv_stored_tensor *tensors; /* names are owned */
    size_t n_tensors, room;
    qv_map *by_name; /* name to index + 1 */
    uint64_t bytes;
};

/* --- Life ------------------------------------------------------------------------------------- */

static qv_status new_set(size_t n_shards, qv_safetensors **out)
{
    qv_safetensors *st = calloc(1, sizeof *st);
    if (st != NULL) {
        st->shards = calloc(n_shards, sizeof *st->shards);
        st->by_name = qv_map_new(1024);
    }
    if (st == NULL || st->shards == NULL || st->by_name == NULL) {
        qv_safetensors_close(st);
        return qv_fail(QV_ERR_NOMEM, "no memory for a list of tensors");
    }
    *out = st;
    return QV_OK;
}

void qv_safetensors_close(qv_safetensors *st)
{
    if (st == NULL)
        return;
    for (size_t i = 0; i < st->n_shards; i++) {
        if (st->shards[i].mapped)
            munmap((void *)st->shards[i].data, st->shards[i].size);
        free(st->shards[i].path);
    }
    for (size_t i = 0; i < st->n_tensors; i++)
        free((char *)st->tensors[i].name);
    qv_map_free(st->by_name, NULL);
    free(st->tensors);
    free(st->shards);
    free(st);
}

/* --- One tensor of a header ------------------------------------------------------------------- */

static qv_status parse_shape(const json_t *list, const char *path, const char *name,
                             qv_stored_tensor *out)
{
    if (!json_is_array(list))
        return qv_fail(QV_ERR_FORMAT, "%s: %.200s: shape is not a list", path, name);
    if (json_array_size(list) > QV_SAFETENSORS_MAX_DIMS)
        return qv_fail(QV_ERR_LIMIT, "%s: %.200s: %zu dimensions; the most is %d", path, name,
                       json_array_size(list), QV_SAFETENSORS_MAX_DIMS);
    out->n_dims = (int32_t)json_array_size(list);
    out->n_elems = 1;
    for (int32_t i = 0; i < out->n_dims; i++) {
        const json_t *item = json_array_get(list, (size_t)i);
        int64_t n = json_integer_value(item);
        if (!json_is_integer(item) || n < 0)
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s: shape[%d] is not a size", path, name, i);
        out->shape[i] = n;
        if (__builtin_mul_overflow(out->n_elems, n, &out->n_elems))
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s: shape overflows", path, name);
    }
    return QV_OK;
}

/* Set data and bytes from data_offsets, checked against the file and the shape. */
static qv_status parse_offsets(const json_t *list, const shard *file, size_t data_start,
                               qv_stored_tensor *out)
{
    const json_t *first = json_array_get(list, 0), *last = json_array_get(list, 1);
    if (json_array_size(list) != 2 || !json_is_integer(first) || !json_is_integer(last))
        return qv_fail(QV_ERR_FORMAT, "%s: %.200s: data_offsets is not a pair of integers",
                       file->path, out->name);
    int64_t begin = json_integer_value(first), end = json_integer_value(last);
    if (begin < 0 || end < begin || (uint64_t)end > file->size - data_start)
        return qv_fail(QV_ERR_FORMAT,
                       "%s: %.200s: data_offsets [%" PRId64 ", %" PRId64
                       "] are outside of the %zu bytes of data",
                       file->path, out->name, begin, end, file->size - data_start);
    uint64_t expected;
    if (__builtin_mul_overflow((uint64_t)out->n_elems, qv_dtype_size(out->dtype), &expected) ||
        expected != (uint64_t)(end - begin)) {
        char text[128];
        return qv_fail(QV_ERR_FORMAT,
                       "%s: %.200s: %s does not fill data_offsets of %" PRId64 " bytes", file->path,
                       out->name, qv_stored_tensor_describe(out, text, sizeof text), end - begin);
    }
    out->data = file->data + data_start + begin;
    out->bytes = expected;
    return QV_OK;
}

static qv_status parse_tensor(const char *name, const json_t *value, const shard *file,
                              size_t data_start, qv_stored_tensor *out)
{
    *out = (qv_stored_tensor){.name = name, .file = file->path};
    const char *dtype = json_string_value(json_object_get(value, "dtype"));
    if (dtype == NULL)
        return qv_fail(QV_ERR_FORMAT, "%s: %.200s: no dtype", file->path, name);
    qv_status status = qv_dtype_parse(dtype, &out->dtype);
    if (status != QV_OK)
        return qv_fail_prefix(status, "%s: %.200s", file->path, name);
    QV_TRY(parse_shape(json_object_get(value, "shape"), file->path, name, out));
    return parse_offsets(json_object_get(value, "data_offsets"), file, data_start, out);
}

/* --- One file --------------------------------------------------------------------------------- */

static qv_status add_tensor(qv_safetensors *st, const qv_stored_tensor *tensor)
{
    if (st->n_tensors == st->room) {
        size_t room = st->room ? st->room * 2 : 256;
        qv_stored_tensor *larger = realloc(st->tensors, room * sizeof *larger);
        if (larger == NULL)
            return qv_fail(QV_ERR_NOMEM, "%s: no memory for %zu tensors", tensor->file, room);
        st->tensors = larger;
        st->room = room;
    }
    char *name = strdup(tensor->name);
    if (name == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for a tensor name", tensor->file);
    st->tensors[st->n_tensors] = *tensor;
    st->tensors[st->n_tensors++].name = name;
    return QV_OK;
}

static int by_address(const void *a, const void *b)
{
    const qv_stored_tensor *x = a, *y = b;
    if (x->data != y->data)
        return (const char *)x->data < (const char *)y->data ? -1 : 1;
    if (x->bytes != y->bytes) /* empty tensors stand before the one that begins where they do */
        return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* Sort a file's tensors by address and check that they cover its data exactly. */
static qv_status check_cover(qv_stored_tensor *tensors, size_t n, const shard *file,
                             size_t data_start)
{
    if (n > 0)
        qsort(tensors, n, sizeof *tensors, by_address);
    const uint8_t *reached = file->data + data_start;
    for (size_t i = 0; i < n; i++) {
        const uint8_t *begin = tensors[i].data;
        if (begin < reached)
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s overlaps %.200s", file->path, tensors[i].name,
                           tensors[i - 1].name);
        if (begin > reached)
            return qv_fail(QV_ERR_FORMAT, "%s: %td bytes in front of %.200s belong to no tensor",
                           file->path, begin - reached, tensors[i].name);
        reached = begin + tensors[i].bytes;
    }
    if (reached != file->data + file->size)
        return qv_fail(QV_ERR_FORMAT, "%s: %td bytes at the end belong to no tensor", file->path,
                       file->data + file->size - reached);
    return QV_OK;
}

static qv_status parse_header(qv_safetensors *st, const json_t *header, const shard *file,
                              size_t data_start)
{
    if (!json_is_object(header))
        return qv_fail(QV_ERR_FORMAT, "%s: the header is not a JSON object", file->path);
    size_t first = st->n_tensors;
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)header, name, value)
    {
        if (strcmp(name, "__metadata__") == 0) {
            if (!json_is_object(value))
                return qv_fail(QV_ERR_FORMAT, "%s: __metadata__ is not an object", file->path);
            continue;
        }
        qv_stored_tensor tensor;
        QV_TRY(parse_tensor(name, value, file, data_start, &tensor));
        QV_TRY(add_tensor(st, &tensor));
    }
    QV_TRY(check_cover(st->tensors + first, st->n_tensors - first, file, data_start));
    for (size_t i = first; i < st->n_tensors; i++) {
        const char *key = st->tensors[i].name;
        uintptr_t other = (uintptr_t)qv_map_get_str(st->by_name, key);
        if (other != 0)
            return qv_fail(QV_ERR_FORMAT, "%.200s is in %s and in %s", key,
                           st->tensors[other - 1].file, file->path);
        QV_TRY(qv_map_set_str(st->by_name, key, (void *)(uintptr_t)(i + 1)));
        st->bytes += st->tensors[i].bytes;
    }
    return QV_OK;
}

static qv_status read_shard(qv_safetensors *st, const shard *file)
{
    if (file->size < 8)
        return qv_fail(QV_ERR_FORMAT, "%s: %zu bytes are too few for a safetensors file",
                       file->path, file->size);
    uint64_t length;
    memcpy(&length, file->data, 8);
    if (length > file->size - 8)
        return qv_fail(QV_ERR_FORMAT,
                       "%s: a header of %" PRIu64 " bytes in a file of %zu: truncated, or not a "
                       "safetensors file",
                       file->path, length, file->size);
    if (length > QV_SAFETENSORS_MAX_HEADER)
        return qv_fail(QV_ERR_LIMIT, "%s: a header of %" PRIu64 " bytes; the most is %" PRIu64,
                       file->path, length, QV_SAFETENSORS_MAX_HEADER);
    json_t *header;
    QV_TRY(qv_json_load((const char *)file->data + 8, length, file->path, &header));
    qv_status status = parse_header(st, header, file, 8 + (size_t)length);
    json_decref(header);
    return status;
}

/* The bytes of an open file in memory that munmap gives back. With `copy` they are read at once: a
 * mapped file that somebody shortens or overwrites in place would change, or stop the process,
 * under whoever reads it. */
static qv_status take_bytes(int fd, const char *path, size_t size, bool copy, void **out)
{
    void *data = mmap(NULL, size, PROT_READ | (copy ? PROT_WRITE : 0),
                      MAP_PRIVATE | (copy ? MAP_ANONYMOUS : 0), copy ? -1 : fd, 0);
    if (data == MAP_FAILED)
        return qv_fail(QV_ERR_IO, "%s: mmap: %s", path, strerror(errno));
    for (size_t done = 0; copy && done < size;) {
        ssize_t n = read(fd, (char *)data + done, size - done);
        if (n > 0) {
            done += (size_t)n;
        } else if (n == 0 || errno != EINTR) {
            qv_status status =
                qv_fail(QV_ERR_IO, "%s: %s", path,
                        n == 0 ? "it became shorter while it was read" : strerror(errno));
            munmap(data, size);
            return status;
        }
    }
    *out = data;
    return QV_OK;
}

/* Map `path` as the set's next shard, or read it if its size is limited. */
static qv_status map_shard(qv_safetensors *st, const char *path, uint64_t max_bytes,
                           const shard **out)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO does not block */
    if (fd < 0)
        return qv_fail(errno == ENOENT ? QV_ERR_NOT_FOUND : QV_ERR_IO, "%s: %s", path,
                       strerror(errno));
    struct stat info;
    qv_status status = QV_OK;
    void *data = NULL;
    if (fstat(fd, &info) != 0)
        status = qv_fail(QV_ERR_IO, "%s: %s", path, strerror(errno));
    else if (!S_ISREG(info.st_mode))
        status = qv_fail(QV_ERR_FORMAT, "%s: not a regular file", path);
    else if (max_bytes != 0 && (uint64_t)info.st_size > max_bytes)
        status = qv_fail(QV_ERR_LIMIT, "%s: %" PRId64 " bytes; the limit is %" PRIu64, path,
                         (int64_t)info.st_size, max_bytes);
    else if (info.st_size < 8)
        status = qv_fail(QV_ERR_FORMAT, "%s: %" PRId64 " bytes are too few for a safetensors file",
                         path, (int64_t)info.st_size);
    if (status == QV_OK)
        status = take_bytes(fd, path, (size_t)info.st_size, max_bytes != 0, &data);
    close(fd);
    QV_TRY(status);

    shard *file = &st->shards[st->n_shards++];
    *file =
        (shard){.path = strdup(path), .data = data, .size = (size_t)info.st_size, .mapped = true};
    *out = file;
    return file->path ? QV_OK : qv_fail(QV_ERR_NOMEM, "%s: no memory for its name", path);
}

/* --- Shards ----------------------------------------------------------------------------------- */

/* A shard is a plain file name: an index cannot point out of its directory. */
static bool is_plain_name(const char *name)
{
    return name != NULL && name[0] != '\0' && strchr(name, '/') == NULL && strcmp(name, ".") != 0 &&
           strcmp(name, "..") != 0;
}

/* All shards together count. */
static qv_status check_bytes(const qv_safetensors *st, const char *index_path, uint64_t max_bytes)
{
    if (max_bytes > 0 && st->bytes > max_bytes)
        return qv_fail(QV_ERR_LIMIT, "%s: its shards hold %" PRIu64 " bytes, more than %" PRIu64,
                       index_path, st->bytes, max_bytes);
    return QV_OK;
}

/* Open each file that the index names, in the order of first mention. */
static qv_status open_shards(qv_safetensors *st, const json_t *weight_map, const char *dir,
                             const char *index_path, uint64_t max_bytes)
{
    qv_map *seen = qv_map_new(64);
    qv_status status = seen ? QV_OK : qv_fail(QV_ERR_NOMEM, "%s: no memory", index_path);
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)weight_map, name, value)
    {
        const char *file = json_string_value(value);
        if (status != QV_OK)
            break;
        if (!is_plain_name(file)) {
            status = qv_fail(QV_ERR_FORMAT, "%s: %.200s is in \"%.200s\", which is not a file name",
                             index_path, name, file ? file : "(not a string)");
        } else if (qv_map_find_str(seen, file) == NULL) {
            char path[PATH_MAX];
            const shard *opened;
            status = qv_map_set_str(seen, file, NULL);
            if (status == QV_OK && st->n_shards == MAX_SHARDS)
                status = qv_fail(QV_ERR_LIMIT, "%s: more than %d files", index_path, MAX_SHARDS);
            if (status == QV_OK &&
                snprintf(path, sizeof path, "%s/%s", dir, file) >= (int)sizeof path)
                status = qv_fail(QV_ERR_ARG, "%.80s...: path too long", dir);
            if (status == QV_OK)
                status = map_shard(st, path, max_bytes, &opened);
            if (status == QV_OK)
                status = read_shard(st, opened);
            if (status == QV_OK)
                status = check_bytes(st, index_path, max_bytes);
        }
    }
    qv_map_free(seen, NULL);
    return status;
}

/* The index and the files must agree on where every tensor is. */
static qv_status check_index(const qv_safetensors *st, const json_t *weight_map,
                             const char *index_path)
{
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)weight_map, name, value)
    {
        const qv_stored_tensor *tensor = qv_safetensors_find(st, name);
        const char *base = tensor ? strrchr(tensor->file, '/') : NULL;
        if (tensor == NULL || strcmp(base ? base + 1 : tensor->file, json_string_value(value)) != 0)
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s is not in %.200s", index_path, name,
                           json_string_value(value));
    }
    for (size_t i = 0; i < st->n_tensors; i++) {
        if (json_object_get(weight_map, st->tensors[i].name) == NULL)
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s of %s is not listed", index_path,
                           st->tensors[i].name, st->tensors[i].file);
    }
    return QV_OK;
}

static qv_status open_index(const char *dir, const char *index_path, uint64_t max_bytes,
                            qv_safetensors **out)
{
    json_t *index;
    QV_TRY(qv_json_load_file(index_path, INDEX_MAX_BYTES, &index));
    const json_t *weight_map = json_object_get(index, "weight_map");
    qv_safetensors *st = NULL;
    qv_status status = json_is_object(weight_map)
                           ? new_set(MAX_SHARDS, &st)
                           : qv_fail(QV_ERR_FORMAT, "%s: no weight_map", index_path);
    if (status == QV_OK)
        status = open_shards(st, weight_map, dir, index_path, max_bytes);
    if (status == QV_OK)
        status = check_index(st, weight_map, index_path);
    json_decref(index);
    if (status != QV_OK) {
        qv_safetensors_close(st);
        return status;
    }
    *out = st;
    return QV_OK;
}

/* --- Public ----------------------------------------------------------------------------------- */

qv_status qv_safetensors_open_file(const char *path, uint64_t max_bytes, qv_safetensors **out)
{
    qv_safetensors *st;
    QV_TRY(new_set(1, &st));
    const shard *file;
    qv_status status = map_shard(st, path, max_bytes, &file);
    if (status == QV_OK)
        status = read_shard(st, file);
    if (status != QV_OK) {
        qv_safetensors_close(st);
        return status;
    }
    *out = st;
    return QV_OK;
}

qv_status qv_safetensors_open_memory(const void *data, size_t size, const char *where,
                                     qv_safetensors **out)
{
    qv_safetensors *st;
    QV_TRY(new_set(1, &st));
    shard *file = &st->shards[st->n_shards++];
    *file = (shard){.path = strdup(where), .data = data, .size = size};
    qv_status status = file->path ? read_shard(st, file)
                                  : qv_fail(QV_ERR_NOMEM, "%s: no memory for its name", where);
    if (status != QV_OK) {
        qv_safetensors_close(st);
        return status;
    }
    *out = st;
    return QV_OK;
}

qv_status qv_safetensors_open_set(const char *dir, const char *stem, uint64_t max_bytes,
                                  qv_safetensors **out)
{
    char single[PATH_MAX], index[PATH_MAX];
    if (snprintf(index, sizeof index, "%s/%s.safetensors.index.json", dir, stem) >=
        (int)sizeof index)
        return qv_fail(QV_ERR_ARG, "%.80s...: path too long", dir);
    snprintf(single, sizeof single, "%s/%s.safetensors", dir, stem);
    if (access(single, F_OK) == 0)
        return qv_safetensors_open_file(single, max_bytes, out);
    qv_status status = open_index(dir, index, max_bytes, out);
    if (status == QV_ERR_NOT_FOUND && access(index, F_OK) != 0)
        return qv_fail(QV_ERR_NOT_FOUND, "%s: neither %s.safetensors nor %s.safetensors.index.json",
                       dir, stem, stem);
    return status;
}

qv_status qv_safetensors_open_dir(const char *dir, qv_safetensors **out)
{
    return qv_safetensors_open_set(dir, "model", 0, out);
}

size_t qv_safetensors_count(const qv_safetensors *st)
{
    return st->n_tensors;
}

const qv_stored_tensor *qv_safetensors_at(const qv_safetensors *st, size_t i)
{
    QV_ASSERT(i < st->n_tensors);
    return &st->tensors[i];
}

const qv_stored_tensor *qv_safetensors_find(const qv_safetensors *st, const char *name)
{
    uintptr_t index = (uintptr_t)qv_map_get_str(st->by_name, name);
    return index != 0 ? &st->tensors[index - 1] : NULL;
}

uint64_t qv_safetensors_bytes(const qv_safetensors *st)
{
    return st->bytes;
}

/* --- Elements --------------------------------------------------------------------------------- */

qv_status qv_stored_tensor_f32(const qv_stored_tensor *tensor, int64_t first, int64_t n, float *out)
{
    QV_ASSERT(first >= 0 && n >= 0 && first + n <= tensor->n_elems);
    size_t size = qv_dtype_size(tensor->dtype);
    const uint8_t *src = (const uint8_t *)tensor->data + (size_t)first * size;
    if (!qv_dtype_is_float(tensor->dtype))
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: %.200s is %s, not floating point", tensor->file,
                       tensor->name, qv_dtype_name(tensor->dtype));
    if ((uintptr_t)src % size == 0)
        return qv_dtype_to_f32(tensor->dtype, src, out, n);
    for (int64_t done = 0; done < n;) { /* headers need not align the data */
        _Alignas(8) uint8_t block[4096];
        int64_t count = (int64_t)(sizeof block / size);
        if (count > n - done)
            count = n - done;
        memcpy(block, src + (size_t)done * size, (size_t)count * size);
        QV_TRY(qv_dtype_to_f32(tensor->dtype, block, out + done, count));
        done += count;
    }
    return QV_OK;
}

/* Whether any of n numbers of 16 bits has all of the exponent bits `mask` set. */
static bool any_special_16(const uint8_t *data, int64_t n, uint16_t mask)
{
    uint16_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, data + 2 * i, 2);
        found |= (uint16_t)((bits & mask) == mask);
    }
    return found != 0;
}

static bool any_special_32(const uint8_t *data, int64_t n)
{
    uint32_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, data + 4 * i, 4);
        found |= (bits & UINT32_C(0x7F800000)) == UINT32_C(0x7F800000);
    }
    return found != 0;
}

/* The usual case at the speed of memory: which element it is matters only when there is one. */
static bool is_all_finite(const qv_stored_tensor *tensor, int64_t first, int64_t n)
{
    const uint8_t *data =
        (const uint8_t *)tensor->data + (size_t)first * qv_dtype_size(tensor->dtype);
    return (tensor->dtype == QV_BF16 && !any_special_16(data, n, 0x7F80)) ||
           (tensor->dtype == QV_F16 && !any_special_16(data, n, 0x7C00)) ||
           (tensor->dtype == QV_F32 && !any_special_32(data, n));
}

qv_status qv_stored_tensor_require_finite(const qv_stored_tensor *tensor, int64_t first, int64_t n)
{
    if (is_all_finite(tensor, first, n))
        return QV_OK;
    float block[1024];
    for (int64_t done = 0; done < n; done += 1024) {
        int64_t count = n - done < 1024 ? n - done : 1024;
        QV_TRY(qv_stored_tensor_f32(tensor, first + done, count, block));
        for (int64_t i = 0; i < count; i++) {
            if (!isfinite(block[i]))
                return qv_fail(QV_ERR_FORMAT, "%s: %.200s: element %" PRId64 " is %s", tensor->file,
                               tensor->name, first + done + i,
                               isnan(block[i]) ? "NaN" : "infinite");
        }
    }
    return QV_OK;
}

const char *qv_stored_tensor_describe(const qv_stored_tensor *tensor, char *buf, size_t size)
{
    int used = snprintf(buf, size, "%s[", qv_dtype_name(tensor->dtype));
    for (int32_t i = 0; i < tensor->n_dims && used >= 0 && (size_t)used < size; i++)
        used += snprintf(buf + used, size - (size_t)used, "%s%" PRId64, i ? ", " : "",
                         tensor->shape[i]);
    if (used >= 0 && (size_t)used < size)
        snprintf(buf + used, size - (size_t)used, "]");
    return buf;
}
