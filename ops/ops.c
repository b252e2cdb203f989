#include "ops/ops.h"

#include "common/dtype.h"
#include "ops/checks.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- Registry ----------------------------------------------------------------------------- */

static const qv_backend_table *const backends[] = {
    &qv_cpu_backend_table,
#ifdef QV_WITH_CUDA
    &qv_cuda_backend_table,
#endif
};

#define N_BACKENDS (sizeof backends / sizeof *backends)

static const char *backend_names(char *buf, size_t size)
{
    size_t used = 0;
    buf[0] = '\0';
    for (size_t i = 0; i < N_BACKENDS && used < size; i++)
        used += (size_t)snprintf(buf + used, size - used, "%s%s", i ? ", " : "", backends[i]->name);
    return buf;
}

/* A name that no backend knows is refused by all, also by one that does not need it. */
static qv_status check_all_reduce(const char *name)
{
    static const char *const names[] = {"", "nccl", "direct", "auto"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name != NULL ? name : "", names[i]) == 0)
            return QV_OK;
    return qv_fail(QV_ERR_ARG, "all-reduce '%s' is none of nccl, direct and auto", name);
}

qv_status qv_backend_open(const qv_backend_options *options, qv_backend **out)
{
    char names[128];
    QV_TRY(check_all_reduce(options->all_reduce));
    const char *name = options->name ? options->name : "";
    for (size_t i = 0; i < N_BACKENDS; i++)
        if (strcmp(backends[i]->name, name) == 0)
            return backends[i]->open(options, out);
    return qv_fail(QV_ERR_NOT_FOUND, "backend '%s' is not in this build; it has: %s", name,
                   backend_names(names, sizeof names));
}

void qv_backend_close(qv_backend *be)
{
    if (be)
        be->table->close(be);
}

const char *qv_backend_name(const qv_backend *be)
{
    return be->table->name;
}

const char *qv_backend_describe(const qv_backend *be)
{
    return be->description;
}

qv_dtype qv_backend_activation_dtype(const qv_backend *be)
{
    return be->table->activation_dtype;
}

qv_dtype qv_backend_lora_dtype(const qv_backend *be)
{
    return be->table->lora_dtype;
}

qv_dtype qv_backend_kv_dtype(const qv_backend *be)
{
    return be->table->kv_dtype;
}

qv_status qv_backend_reserve(qv_backend *be, const qv_backend_limits *limits)
{
    if (limits->max_tokens < 0 || limits->max_logits < 0 || limits->n_vocab < 0)
        return qv_fail(QV_ERR_ARG, "reserve: %d tokens, %d rows of %d logits", limits->max_tokens,
                       limits->max_logits, limits->n_vocab);
    return be->table->reserve(be, limits);
}

/* --- Memory ------------------------------------------------------------------------------- */

qv_status qv_backend_alloc(qv_backend *be, size_t bytes, void **out)
{
    return be->table->alloc(be, bytes, out);
}

void qv_backend_free(qv_backend *be, void *ptr)
{
    if (ptr)
        be->table->free(be, ptr);
}

uint64_t qv_backend_free_memory(const qv_backend *be)
{
    return be->table->free_memory != NULL ? be->table->free_memory(be) : UINT64_MAX;
}

qv_status qv_backend_upload(qv_backend *be, void *dst, const void *src, size_t bytes)
{
    return bytes ? be->table->upload(be, dst, src, bytes) : QV_OK;
}

qv_status qv_backend_download(qv_backend *be, void *dst, const void *src, size_t bytes)
{
    return bytes ? be->table->download(be, dst, src, bytes) : QV_OK;
}

qv_status qv_backend_zero(qv_backend *be, void *dst, size_t bytes)
{
    return bytes ? be->table->zero(be, dst, bytes) : QV_OK;
}

/* --- Uploads of many pieces --------------------------------------------------------------- */

qv_status qv_upload_begin(qv_backend *be, qv_upload *out)
{
    *out = (qv_upload){.be = be};
    return be->table->upload_begin ? be->table->upload_begin(be, &out->lane) : QV_OK;
}

qv_status qv_upload_piece(qv_upload *u, void *dst, size_t bytes, void **out)
{
    QV_ASSERT(bytes > 0 && bytes <= QV_MAX_UPLOAD_PIECE);
    *out = dst;
    return u->lane ? u->be->table->upload_piece(u->be, u->lane, dst, bytes, out) : QV_OK;
}

qv_status qv_upload_copy(qv_upload *u, void *dst, const void *src, size_t bytes)
{
    for (size_t done = 0; done < bytes; done += QV_MAX_UPLOAD_PIECE) {
        size_t n = bytes - done < QV_MAX_UPLOAD_PIECE ? bytes - done : QV_MAX_UPLOAD_PIECE;
        void *piece;
        QV_TRY(qv_upload_piece(u, (char *)dst + done, n, &piece));
        memcpy(piece, (const char *)src + done, n);
    }
    return QV_OK;
}

qv_status qv_upload_zero(qv_upload *u, void *dst, size_t bytes)
{
    if (bytes == 0)
        return QV_OK;
    return u->lane ? u->be->table->upload_zero(u->be, u->lane, dst, bytes)
                   : u->be->table->zero(u->be, dst, bytes);
}

qv_status qv_upload_end(qv_upload *u)
{
    return u->lane ? u->be->table->upload_end(u->be, u->lane) : QV_OK;
}

qv_status qv_backend_copy(qv_backend *be, void *dst, const void *src, size_t bytes)
{
    return bytes ? be->table->copy(be, dst, src, bytes) : QV_OK;
}

qv_status qv_backend_sync(qv_backend *be)
{
    return be->table->sync(be);
}

bool qv_backend_can_record(const qv_backend *be)
{
    return be->table->record != NULL && !be->not_recordable && be->times == NULL;
}

qv_status qv_backend_record(qv_backend *be, const qv_recording_shape *shape, qv_record_fn *fn,
                            void *ctx, qv_recording **out)
{
    if (be->table->record == NULL)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: steps cannot be recorded", be->table->name);
    if (shape->n_seqs < 1 || shape->n_segs < 0 || shape->page_stride < 1)
        return qv_fail(QV_ERR_ARG, "record: %d sequences of %d pages, %d segments", shape->n_seqs,
                       shape->page_stride, shape->n_segs);
    return be->table->record(be, shape, fn, ctx, out);
}

void qv_recording_free(qv_backend *be, qv_recording *recording)
{
    if (recording != NULL)
        be->table->recording_free(be, recording);
}

qv_status qv_backend_replay(qv_backend *be, qv_recording *recording, const qv_batch *host)
{
    return be->table->replay(be, recording, host);
}

/* The made-up number at place i of a stream. */
static float made_up(uint64_t seed, int64_t i, float mean, float scale)
{
    return mean + scale * qv_made_up(seed, (uint64_t)i);
}

enum { FILL_CHUNK = 1 << 16 };

qv_status qv_backend_fill(qv_backend *be, void *dst, qv_dtype dtype, int64_t n, float mean,
                          float scale, uint64_t seed)
{
    if (!qv_is_weight_dtype(dtype))
        return qv_fail(QV_ERR_UNSUPPORTED, "fill: F32 or BF16, not %s", qv_dtype_name(dtype));
    if (be->table->fill != NULL)
        return n > 0 ? be->table->fill(be, dst, dtype, n, mean, scale, seed) : QV_OK;
    float *values = malloc(2 * FILL_CHUNK * sizeof *values);
    if (values == NULL)
        return qv_fail(QV_ERR_NOMEM, "fill: no memory");
    void *stored = values + FILL_CHUNK;
    qv_status status = QV_OK;
    for (int64_t first = 0; first < n && status == QV_OK; first += FILL_CHUNK) {
        int64_t now = n - first < FILL_CHUNK ? n - first : FILL_CHUNK;
        for (int64_t i = 0; i < now; i++)
            values[i] = made_up(seed, first + i, mean, scale);
        status = qv_dtype_from_f32(dtype, values, stored, now);
        if (status == QV_OK)
            status = qv_backend_upload(be, (char *)dst + (size_t)first * qv_dtype_size(dtype),
                                       stored, (size_t)now * qv_dtype_size(dtype));
    }
    free(values);
    return status;
}

qv_status qv_weight_fill(qv_backend *be, qv_weight *w, float scale, uint64_t seed)
{
    if (be->table->weight_fill != NULL)
        return be->table->weight_fill(be, w, scale, seed);
    float *row = malloc((size_t)w->n_in * sizeof *row);
    if (row == NULL)
        return qv_fail(QV_ERR_NOMEM, "fill: no memory");
    qv_status status = QV_OK;
    int64_t n_experts = w->n_experts > 0 ? w->n_experts : 1;
    for (int64_t i = 0; i < n_experts * w->n_out && status == QV_OK; i++) {
        for (int64_t j = 0; j < w->n_in; j++)
            row[j] = made_up(seed, i * w->n_in + j, 0, scale);
        status = be->table->weight_load(be, w, i / w->n_out, i % w->n_out, 1, row, QV_F32, w->n_in);
    }
    free(row);
    return status;
}

void qv_backend_watch_gaps(qv_backend *be, bool on)
{
    be->watching = on;
}

double qv_backend_gap(const qv_backend *be)
{
    return be->watching ? be->gap : NAN;
}

qv_status qv_backend_put_batch(qv_backend *be, const qv_batch *host, qv_batch *out)
{
    return be->table->put_batch(be, host, out);
}

/* --- Checks ------------------------------------------------------------------------------- */

/* "f32[4, *]" */
static const char *describe_wanted(qv_dtype dtype, int n_dims, const int64_t *shape, char *buf,
                                   size_t size)
{
    qv_tensor t = {.dtype = dtype, .n_dims = 0};
    qv_tensor_describe(&t, buf, size);
    size_t used = strlen(buf) - 1; /* write over the bracket that closes */
    for (int i = 0; i < n_dims && used < size; i++) {
        const char *comma = i ? ", " : "";
        used += (size_t)(shape[i] == ANY ? snprintf(buf + used, size - used, "%s*", comma)
                                         : snprintf(buf + used, size - used, "%s%lld", comma,
                                                    (long long)shape[i]));
    }
    if (used < size)
        snprintf(buf + used, size - used, "]");
    return buf;
}

qv_status qv_expect(const char *op, const char *arg, const qv_tensor *t, qv_dtype dtype, int n_dims,
                    const int64_t *shape)
{
    bool fits = t->dtype == dtype && t->n_dims == n_dims;
    for (int i = 0; fits && i < n_dims; i++)
        fits = t->shape[i] >= 0 && (shape[i] == ANY || t->shape[i] == shape[i]);
    if (!fits) {
        char have[128], want[128];
        return qv_fail(QV_ERR_SHAPE, "%s: %s is %s, but needs %s", op, arg,
                       qv_tensor_describe(t, have, sizeof have),
                       describe_wanted(dtype, n_dims, shape, want, sizeof want));
    }
    if (t->shape[n_dims - 1] > 1 && t->stride[n_dims - 1] != 1)
        return qv_fail(QV_ERR_SHAPE, "%s: %s has stride %lld in its last dimension, but needs 1",
                       op, arg, (long long)t->stride[n_dims - 1]);
    if (!t->data && qv_tensor_count(t) > 0)
        return qv_fail(QV_ERR_ARG, "%s: %s has no memory", op, arg);
    return QV_OK;
}

qv_status qv_expect_contiguous(const char *op, const char *arg, const qv_tensor *t)
{
    char have[128];
    if (qv_tensor_is_contiguous(t))
        return QV_OK;
    return qv_fail(QV_ERR_SHAPE, "%s: %s %s is not contiguous", op, arg,
                   qv_tensor_describe(t, have, sizeof have));
}

/* --- Weights ------------------------------------------------------------------------------ */

static qv_status new_weight(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in,
                            qv_dtype dtype, qv_weight **out)
{
    const int64_t most = INT64_C(1) << 31;
    if (n_out <= 0 || n_in <= 0 || n_out > most || n_in > most)
        return qv_fail(QV_ERR_SHAPE, "weight: [%lld, %lld] is not a size of a matrix",
                       (long long)n_out, (long long)n_in);
    if (!qv_is_weight_dtype(dtype))
        return qv_fail(QV_ERR_UNSUPPORTED, "weight: stored as F32 or BF16, not %s",
                       qv_dtype_name(dtype));
    return be->table->weight_new(be, n_experts, n_out, n_in, dtype, out);
}

qv_status qv_weight_new(qv_backend *be, int64_t n_out, int64_t n_in, qv_dtype dtype,
                        qv_weight **out)
{
    return new_weight(be, 0, n_out, n_in, dtype, out);
}

qv_status qv_weight_new_experts(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in,
                                qv_dtype dtype, qv_weight **out)
{
    if (n_experts <= 0 || n_experts > INT32_MAX)
        return qv_fail(QV_ERR_SHAPE, "weight: %lld experts", (long long)n_experts);
    return new_weight(be, n_experts, n_out, n_in, dtype, out);
}

void qv_weight_free(qv_backend *be, qv_weight *w)
{
    if (w)
        be->table->weight_free(be, w);
}

static qv_status load_weight(qv_backend *be, qv_weight *w, int64_t expert, int64_t row,
                             int64_t n_rows, const void *src, qv_dtype src_dtype,
                             int64_t src_stride)
{
    if (row < 0 || n_rows < 0 || row > w->n_out - n_rows)
        return qv_fail(QV_ERR_SHAPE, "weight: rows %lld to %lld of a matrix of %lld rows",
                       (long long)row, (long long)row + (long long)n_rows - 1, (long long)w->n_out);
    if (src_stride < w->n_in)
        return qv_fail(QV_ERR_SHAPE,
                       "weight: stride %lld of the source is less than the %lld columns",
                       (long long)src_stride, (long long)w->n_in);
    if (src_dtype != QV_F32 && src_dtype != QV_BF16 && src_dtype != QV_F16)
        return qv_fail(QV_ERR_UNSUPPORTED, "weight: loads from F32, BF16 or F16, not %s",
                       qv_dtype_name(src_dtype));
    return n_rows ? be->table->weight_load(be, w, expert, row, n_rows, src, src_dtype, src_stride)
                  : QV_OK;
}

qv_status qv_weight_load(qv_backend *be, qv_weight *w, int64_t row, int64_t n_rows, const void *src,
                         qv_dtype src_dtype, int64_t src_stride)
{
    QV_ASSERT(w->n_experts == 0);
    return load_weight(be, w, 0, row, n_rows, src, src_dtype, src_stride);
}

qv_status qv_weight_load_expert(qv_backend *be, qv_weight *w, int64_t expert, int64_t row,
                                int64_t n_rows, const void *src, qv_dtype src_dtype,
                                int64_t src_stride)
{
    if (expert < 0 || expert >= w->n_experts)
        return qv_fail(QV_ERR_SHAPE, "weight: expert %lld of %lld", (long long)expert,
                       (long long)w->n_experts);
    return load_weight(be, w, expert, row, n_rows, src, src_dtype, src_stride);
}

bool qv_backend_keeps_rows(const qv_backend *be)
{
    return be->table->weight_rows != NULL;
}

qv_tensor qv_weight_rows(const qv_weight *w)
{
    QV_ASSERT(w->n_experts == 0 && qv_backend_keeps_rows(w->backend));
    return qv_tensor_2d(w->backend->table->weight_rows(w), w->dtype, w->n_out, w->n_in);
}

int64_t qv_weight_n_experts(const qv_weight *w)
{
    return w->n_experts;
}

int64_t qv_weight_n_out(const qv_weight *w)
{
    return w->n_out;
}

int64_t qv_weight_n_in(const qv_weight *w)
{
    return w->n_in;
}

size_t qv_weight_bytes(int64_t n_out, int64_t n_in, qv_dtype dtype)
{
    size_t padded_rows = ((size_t)n_out + 15) / 16 * 16; /* backends pad rows to tiles of 16 */
    size_t row_bytes = (size_t)n_in * qv_dtype_size(dtype), bytes;
    return __builtin_mul_overflow(padded_rows, row_bytes, &bytes) ? SIZE_MAX : bytes;
}
