#include "worker/engine_dump.h"

#include "common/log.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qv_engine_dump {
    qv_backend *be;
    qv_model *model;
    char *path;
    json_t *header; /* of the file: name to dtype, shape and offsets */
    uint8_t *data;  /* owned */
    size_t size, room;
    qv_status status; /* the first failure of a probe, which cannot return one */
    char error[QV_ERROR_MAX];
};

static void keep_failure(qv_engine_dump *dump, qv_status status)
{
    if (status == QV_OK || dump->status != QV_OK)
        return;
    dump->status = status;
    snprintf(dump->error, sizeof dump->error, "%s", qv_error());
}

/* Room for `bytes` more; NULL without memory. */
static uint8_t *extend(qv_engine_dump *dump, size_t bytes)
{
    if (dump->size + bytes > dump->room) {
        size_t room = (dump->size + bytes) * 2;
        uint8_t *larger = realloc(dump->data, room);
        if (larger == NULL)
            return NULL;
        dump->data = larger;
        dump->room = room;
    }
    uint8_t *place = dump->data + dump->size;
    dump->size += bytes;
    return place;
}

/* Ids of experts are numbers of a model, which no dtype of weights converts. */
static qv_status to_f32(qv_dtype dtype, const void *src, float *out, int64_t n)
{
    if (dtype != QV_I32)
        return qv_dtype_to_f32(dtype, src, out, n);
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)((const int32_t *)src)[i];
    return QV_OK;
}

/* One contiguous row of `n` elements from the backend, as float32. */
static qv_status copy_row(qv_engine_dump *dump, const void *src, qv_dtype dtype, int64_t n,
                          float *out)
{
    if (dtype == QV_F32)
        return qv_backend_download(dump->be, out, src, (size_t)n * sizeof *out);
    void *staging = malloc((size_t)n * qv_dtype_size(dtype));
    if (staging == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to dump a tensor");
    qv_status status =
        qv_backend_download(dump->be, staging, src, (size_t)n * qv_dtype_size(dtype));
    if (status == QV_OK)
        status = to_f32(dtype, staging, out, n);
    free(staging);
    return status;
}

static qv_status copy_tensor(qv_engine_dump *dump, const qv_tensor *t, float *out)
{
    int64_t middle = t->n_dims == 3 ? t->shape[1] : 1, n = t->shape[t->n_dims - 1];
    size_t elem = qv_dtype_size(t->dtype);
    for (int64_t i = 0; i < t->shape[0]; i++) {
        for (int64_t j = 0; j < middle; j++) {
            int64_t offset = i * t->stride[0] + (t->n_dims == 3 ? j * t->stride[1] : 0);
            QV_TRY(copy_row(dump, (const uint8_t *)t->data + (size_t)offset * elem, t->dtype, n,
                            out + (i * middle + j) * n));
        }
    }
    return QV_OK;
}

static void name_tensor(const qv_engine_dump *dump, int64_t layer, const char *name, char *buf,
                        size_t size)
{
    char owner[24] = "model";
    if (layer >= 0)
        snprintf(owner, sizeof owner, "%" PRId64, layer);
    snprintf(buf, size, "%s.%s", owner, name);
    for (int i = 2; json_object_get(dump->header, buf) != NULL; i++)
        snprintf(buf, size, "%s.%s.%d", owner, name, i);
}

static void collect(int64_t layer, const char *name, const qv_tensor *t, void *user)
{
    qv_engine_dump *dump = user;
    if (dump->status != QV_OK || (t->n_dims != 2 && t->n_dims != 3))
        return;
    int64_t n = qv_tensor_count(t);
    size_t start = dump->size;
    uint8_t *place = extend(dump, (size_t)n * sizeof(float));
    if (place == NULL) {
        keep_failure(dump, qv_fail(QV_ERR_NOMEM, "no memory to dump %s", name));
        return;
    }
    keep_failure(dump, copy_tensor(dump, t, (float *)(void *)place));
    char full[96];
    name_tensor(dump, layer, name, full, sizeof full);
    json_t *shape = json_array();
    for (int i = 0; i < t->n_dims; i++)
        json_array_append_new(shape, json_integer(t->shape[i]));
    json_object_set_new(dump->header, full,
                        json_pack("{s:s, s:o, s:[I,I]}", "dtype", "F32", "shape", shape,
                                  "data_offsets", (json_int_t)start, (json_int_t)dump->size));
}

qv_status qv_engine_dump_start(const char *path, qv_backend *be, qv_model *model,
                               qv_engine_dump **out)
{
    qv_engine_dump *dump = calloc(1, sizeof *dump);
    if (dump == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a dump");
    *dump =
        (qv_engine_dump){.be = be, .model = model, .path = strdup(path), .header = json_object()};
    if (dump->path == NULL || dump->header == NULL) {
        qv_engine_dump_free(dump);
        return qv_fail(QV_ERR_NOMEM, "no memory for a dump");
    }
    qv_model_set_probe(model, collect, dump);
    *out = dump;
    return QV_OK;
}

static qv_status write_file(const qv_engine_dump *dump)
{
    char *header = json_dumps(dump->header, JSON_COMPACT);
    FILE *file = header != NULL ? fopen(dump->path, "we") : NULL;
    if (file == NULL) {
        free(header);
        return qv_fail(QV_ERR_IO, "%s: %s", dump->path, strerror(errno));
    }
    uint64_t size = (strlen(header) + 7) / 8 * 8; /* padded with spaces, so that data is aligned */
    bool ok = fwrite(&size, sizeof size, 1, file) == 1 &&
              fprintf(file, "%-*s", (int)size, header) == (int)size &&
              fwrite(dump->data, 1, dump->size, file) == dump->size;
    ok = fclose(file) == 0 && ok;
    free(header);
    return ok ? QV_OK : qv_fail(QV_ERR_IO, "%s: could not be written", dump->path);
}

qv_status qv_engine_dump_finish(qv_engine_dump *dump)
{
    qv_model_set_probe(dump->model, NULL, NULL);
    if (dump->status != QV_OK)
        return qv_fail(dump->status, "dump: %s", dump->error);
    QV_TRY(write_file(dump));
    qv_info("wrote %zu tensors of one step to %s", json_object_size(dump->header), dump->path);
    return QV_OK;
}

void qv_engine_dump_free(qv_engine_dump *dump)
{
    if (dump == NULL)
        return;
    json_decref(dump->header);
    free(dump->data);
    free(dump->path);
    free(dump);
}
