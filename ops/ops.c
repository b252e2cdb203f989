#include "ops/ops.h"

#include "common/dtype.h"
#include "kernels/shortlist.h"
#include "ops/backend.h"
#include "ops/op_times.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* An op of the backend; with the clock on, timed under its name and the shape of its matrix. */
#define CALL_ON(table_, op, n_out, n_in, ...)                                                      \
    (be->times == NULL ? (table_)->op(__VA_ARGS__)                                                 \
                       : qv_op_times_note(be->times, #op, n_out, n_in, (table_)->op(__VA_ARGS__)))
#define CALL_SHAPED(op, n_out, n_in, ...) CALL_ON(be->ops, op, n_out, n_in, __VA_ARGS__)
#define CALL(op, ...)                     CALL_ON(be->ops, op, 0, 0, __VA_ARGS__)
#define COLLECT(op, ...)                  CALL_ON(be->table, op, 0, 0, be, __VA_ARGS__)

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

static bool is_weight_dtype(qv_dtype dtype)
{
    return dtype == QV_F32 || dtype == QV_BF16;
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
    if (!is_weight_dtype(dtype))
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

#define ANY (-1) /* a size that may be anything */

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

static qv_status expect(const char *op, const char *arg, const qv_tensor *t, qv_dtype dtype,
                        int n_dims, const int64_t *shape)
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

static qv_status expect_contiguous(const char *op, const char *arg, const qv_tensor *t)
{
    char have[128];
    if (qv_tensor_is_contiguous(t))
        return QV_OK;
    return qv_fail(QV_ERR_SHAPE, "%s: %s %s is not contiguous", op, arg,
                   qv_tensor_describe(t, have, sizeof have));
}

/* The sizes follow the dtype: EXPECT("add", delta, QV_F32, n_tokens, ANY). */
#define EXPECT(op, t, dtype, ...)                                                                  \
    QV_TRY(expect(op, #t, &(t), dtype, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),  \
                  (int64_t[]){__VA_ARGS__}))
#define EXPECT_CONTIGUOUS(op, t, dtype, ...)                                                       \
    do {                                                                                           \
        EXPECT(op, t, dtype, __VA_ARGS__);                                                         \
        QV_TRY(expect_contiguous(op, #t, &(t)));                                                   \
    } while (0)

/* [T, d] as [T, 1, d]. */
static qv_tensor as_3d(qv_tensor t)
{
    return t.n_dims == 2 ? qv_tensor_split(t, 1, t.shape[1]) : t;
}

/* --- Weights ------------------------------------------------------------------------------ */

static qv_status new_weight(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in,
                            qv_dtype dtype, qv_weight **out)
{
    const int64_t most = INT64_C(1) << 31;
    if (n_out <= 0 || n_in <= 0 || n_out > most || n_in > most)
        return qv_fail(QV_ERR_SHAPE, "weight: [%lld, %lld] is not a size of a matrix",
                       (long long)n_out, (long long)n_in);
    if (!is_weight_dtype(dtype))
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

/* --- Dense ops ---------------------------------------------------------------------------- */

qv_status qv_op_embed(qv_backend *be, qv_tensor table, int64_t first, const int32_t *ids,
                      qv_tensor y)
{
    EXPECT("embed", table, table.dtype == QV_BF16 ? QV_BF16 : QV_F32, ANY, ANY);
    EXPECT("embed", y, QV_F32, ANY, table.shape[1]);
    return y.shape[0] ? CALL(embed, be, table, first, ids, y) : QV_OK;
}

/* Whether a collective has anybody to meet. */
static bool has_peers(const qv_backend *be)
{
    return be->comm != NULL && qv_comm_n_ranks(be->comm) > 1;
}

static qv_status check_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y,
                              qv_dtype y_dtype)
{
    QV_ASSERT(w->backend == be && w->n_experts == 0);
    EXPECT("linear", x, be->table->activation_dtype, ANY, w->n_in);
    EXPECT("linear", y, y_dtype, x.shape[0], w->n_out);
    return QV_OK;
}

qv_status qv_op_linear(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    QV_TRY(check_linear(be, w, x, y, be->table->activation_dtype));
    return x.shape[0] ? CALL_SHAPED(linear, w->n_out, w->n_in, be, w, x, y) : QV_OK;
}

qv_status qv_op_linear_f32(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor rest,
                           qv_tensor y)
{
    QV_TRY(check_linear(be, w, x, y, QV_F32));
    if (rest.data)
        EXPECT("linear", rest, be->table->activation_dtype, x.shape[0], w->n_in);
    return x.shape[0] ? CALL_SHAPED(linear_f32, w->n_out, w->n_in, be, w, x, rest, y) : QV_OK;
}

typedef bool takes_add_fn(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y);

static bool takes_add(takes_add_fn *takes, qv_backend *be, const qv_weight *w, qv_tensor x,
                      qv_tensor y)
{
    return x.shape[0] > 0 && !has_peers(be) && takes != NULL && takes(be, w, x, y);
}

qv_status qv_op_linear_add(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y, bool *done)
{
    QV_TRY(check_linear(be, w, x, y, QV_F32));
    *done = takes_add(be->table->takes_linear_add, be, w, x, y);
    return *done ? CALL_ON(be->table, linear_add, w->n_out, w->n_in, be, w, x, y) : QV_OK;
}

static qv_status check_linear_part(qv_backend *be, qv_tensor x, const qv_linear_part *part)
{
    qv_dtype act = be->table->activation_dtype;
    const qv_weight *w = part->w;
    const qv_tensor rest = part->rest;
    QV_ASSERT(part->act == QV_ACT_NONE || !part->f32);
    if (part->act == QV_ACT_NONE)
        QV_TRY(check_linear(be, w, x, part->y, part->f32 ? QV_F32 : act));
    else
        QV_TRY(check_linear(be, w, x, part->wide, act));
    if (rest.data)
        EXPECT("linear", rest, act, x.shape[0], w->n_in);
    return QV_OK;
}

static qv_status run_linear_part(qv_backend *be, qv_tensor x, const qv_linear_part *part)
{
    if (part->f32)
        return qv_op_linear_f32(be, part->w, x, part->rest, part->y);
    if (part->act == QV_ACT_NONE)
        return qv_op_linear(be, part->w, x, part->y);
    QV_TRY(qv_op_linear(be, part->w, x, part->wide));
    return qv_op_activate(be, part->act, part->wide, part->y);
}

/* The activated half or whole of a part's rows. */
static qv_status check_act(const qv_backend *be, const qv_linear_part *part)
{
    const qv_tensor y = part->y;
    int64_t n = part->w->n_out;
    if (part->act == QV_ACT_NONE)
        return QV_OK;
    if (part->act == QV_ACT_SWIGLU && n % 2 != 0)
        return qv_fail(QV_ERR_SHAPE, "linears: swiglu of %lld columns", (long long)n);
    EXPECT("linears", y, be->table->activation_dtype, part->wide.shape[0],
           part->act == QV_ACT_SWIGLU ? n / 2 : n);
    return QV_OK;
}

static qv_status check_linears(qv_backend *be, qv_tensor x, int32_t n_parts,
                               const qv_linear_part *parts, int64_t *n_out)
{
    *n_out = 0;
    QV_ASSERT(n_parts >= 1 && n_parts <= QV_MAX_LINEAR_PARTS);
    for (int32_t i = 0; i < n_parts; i++) {
        QV_TRY(check_linear_part(be, x, &parts[i]));
        QV_TRY(check_act(be, &parts[i]));
        *n_out += parts[i].w->n_out;
    }
    return QV_OK;
}

qv_status qv_op_linears(qv_backend *be, qv_tensor x, int32_t n_parts, const qv_linear_part *parts)
{
    int64_t n_out;
    QV_TRY(check_linears(be, x, n_parts, parts, &n_out));
    if (x.shape[0] > 0 && be->table->takes_linears != NULL &&
        be->table->takes_linears(be, x, n_parts, parts))
        return CALL_ON(be->table, linears, n_out, x.shape[1], be, x, n_parts, parts);
    for (int32_t i = 0; i < n_parts; i++)
        QV_TRY(run_linear_part(be, x, &parts[i]));
    return QV_OK;
}

qv_status qv_op_rms_norm(qv_backend *be, qv_tensor x, qv_tensor w, float eps, bool plus_one,
                         qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    if (x.n_dims == 2)
        EXPECT("rms_norm", y, act, x.shape[0], x.shape[1]);
    x = as_3d(x);
    y = as_3d(y);
    EXPECT("rms_norm", x, act, ANY, ANY, ANY);
    EXPECT("rms_norm", y, act, x.shape[0], x.shape[1], x.shape[2]);
    EXPECT("rms_norm", w, QV_F32, x.shape[2]);
    return qv_tensor_count(&x)
               ? CALL_SHAPED(rms_norm, x.shape[1], x.shape[2], be, x, w, eps, plus_one, y)
               : QV_OK;
}

static qv_status check_add_rms_norm(const qv_backend *be, qv_tensor residual, qv_tensor delta,
                                    qv_tensor w, qv_tensor y, qv_tensor rest)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("add_rms_norm", residual, QV_F32, ANY, ANY);
    if (delta.data)
        EXPECT("add_rms_norm", delta, QV_F32, residual.shape[0], residual.shape[1]);
    if (rest.data)
        EXPECT("add_rms_norm", rest, act, residual.shape[0], residual.shape[1]);
    EXPECT("add_rms_norm", y, act, residual.shape[0], residual.shape[1]);
    EXPECT("add_rms_norm", w, QV_F32, residual.shape[1]);
    return QV_OK;
}

qv_status qv_op_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                             float eps, bool plus_one, qv_tensor y, qv_tensor rest)
{
    QV_TRY(check_add_rms_norm(be, residual, delta, w, y, rest));
    return qv_tensor_count(&residual)
               ? CALL(add_rms_norm, be, residual, delta, w, eps, plus_one, y, rest)
               : QV_OK;
}

static bool takes_gate(qv_backend *be, const qv_stream_norm *norm, const qv_linear_part *part)
{
    return norm->y.shape[0] > 0 && part->w->n_out == 1 && part->act == QV_ACT_NONE && !part->f32 &&
           be->table->takes_norm_gate != NULL && be->table->takes_norm_gate(be, norm, part);
}

qv_status qv_op_norm_linears(qv_backend *be, const qv_stream_norm *norm, int32_t n_parts,
                             const qv_linear_part *parts)
{
    const qv_tensor none = {.data = NULL};
    int64_t n_out;
    QV_TRY(check_add_rms_norm(be, norm->residual, none, norm->w, norm->y, norm->rest));
    QV_TRY(check_linears(be, norm->y, n_parts, parts, &n_out));
    if (norm->y.shape[0] > 0 && be->table->takes_norm_linears != NULL &&
        be->table->takes_norm_linears(be, norm, n_parts, parts))
        return CALL_ON(be->table, norm_linears, n_out, norm->y.shape[1], be, norm, n_parts, parts);
    qv_linear_part left[QV_MAX_LINEAR_PARTS];
    int32_t n_left = 0;
    bool normed = false;
    for (int32_t i = 0; i < n_parts; i++) {
        if (normed || !takes_gate(be, norm, &parts[i])) {
            left[n_left++] = parts[i];
            continue;
        }
        QV_TRY(CALL_ON(be->table, norm_gate, 1, norm->y.shape[1], be, norm, &parts[i]));
        normed = true;
    }
    if (!normed)
        QV_TRY(qv_op_add_rms_norm(be, norm->residual, none, norm->w, norm->eps, norm->plus_one,
                                  norm->y, norm->rest));
    return n_left > 0 ? qv_op_linears(be, norm->y, n_left, left) : QV_OK;
}

static qv_status check_gated_norm(const qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w,
                                  bool gate_first, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("gated_rms_norm", x, act, ANY, ANY, ANY);
    EXPECT("gated_rms_norm", z, act, x.shape[0], x.shape[1], x.shape[2]);
    EXPECT("gated_rms_norm", y, act, x.shape[0], x.shape[1], x.shape[2]);
    EXPECT("gated_rms_norm", w, QV_F32, gate_first ? x.shape[1] * x.shape[2] : x.shape[2]);
    return QV_OK;
}

qv_status qv_op_gated_rms_norm(qv_backend *be, qv_tensor x, qv_tensor z, qv_tensor w, float eps,
                               bool gate_first, qv_tensor y)
{
    QV_TRY(check_gated_norm(be, x, z, w, gate_first, y));
    return qv_tensor_count(&x) ? CALL_SHAPED(gated_rms_norm, x.shape[1], x.shape[2], be, x, z, w,
                                             eps, gate_first, y)
                               : QV_OK;
}

qv_status qv_op_swiglu(qv_backend *be, qv_tensor gate, qv_tensor up, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("swiglu", gate, act, ANY, ANY);
    EXPECT("swiglu", up, act, gate.shape[0], gate.shape[1]);
    EXPECT("swiglu", y, act, gate.shape[0], gate.shape[1]);
    return qv_tensor_count(&y) ? CALL_SHAPED(swiglu, 1, y.shape[1], be, gate, up, y) : QV_OK;
}

qv_status qv_op_sigmoid_gate(qv_backend *be, qv_tensor x, qv_tensor gate)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("sigmoid_gate", x, act, ANY, ANY, ANY);
    EXPECT("sigmoid_gate", gate, act, x.shape[0], x.shape[1], x.shape[2]);
    return qv_tensor_count(&x) ? CALL(sigmoid_gate, be, x, gate) : QV_OK;
}

qv_status qv_op_relu2(qv_backend *be, qv_tensor x, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("relu2", x, act, ANY, ANY);
    EXPECT("relu2", y, act, x.shape[0], x.shape[1]);
    return qv_tensor_count(&y) ? CALL_SHAPED(relu2, 1, y.shape[1], be, x, y) : QV_OK;
}

qv_status qv_op_activate(qv_backend *be, qv_act act, qv_tensor wide, qv_tensor y)
{
    int64_t f = y.shape[1];
    QV_ASSERT(act != QV_ACT_NONE);
    return act == QV_ACT_RELU2
               ? qv_op_relu2(be, wide, y)
               : qv_op_swiglu(be, qv_tensor_cols(wide, 0, f), qv_tensor_cols(wide, f, f), y);
}

/* What qv_op_add adds: delta [n, d] F32, gate [n, 1] or empty. */
static qv_status check_delta(qv_backend *be, const char *op, qv_tensor delta, qv_tensor gate,
                             int64_t n, int64_t d)
{
    EXPECT(op, delta, QV_F32, n, d);
    if (gate.data)
        EXPECT(op, gate, be->table->activation_dtype, n, 1);
    return QV_OK;
}

qv_status qv_op_add(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor gate)
{
    EXPECT("add", residual, QV_F32, ANY, ANY);
    QV_TRY(check_delta(be, "add", delta, gate, residual.shape[0], residual.shape[1]));
    return qv_tensor_count(&delta) ? CALL(add, be, residual, delta, gate) : QV_OK;
}

qv_status qv_backend_connect(qv_backend *be)
{
    return has_peers(be) && be->table->connect != NULL ? be->table->connect(be) : QV_OK;
}

qv_status qv_op_all_reduce(qv_backend *be, qv_tensor x)
{
    EXPECT("all_reduce", x, QV_F32, ANY, ANY);
    return has_peers(be) ? COLLECT(all_reduce, x) : QV_OK;
}

qv_status qv_op_sum_add_rms_norm(qv_backend *be, qv_tensor residual, qv_tensor delta, qv_tensor w,
                                 float eps, bool plus_one, qv_tensor y, qv_tensor rest)
{
    if (has_peers(be) && be->table->sum_add_rms_norm != NULL) {
        QV_TRY(check_add_rms_norm(be, residual, delta, w, y, rest));
        return qv_tensor_count(&y)
                   ? COLLECT(sum_add_rms_norm, residual, delta, w, eps, plus_one, y, rest)
                   : QV_OK;
    }
    QV_TRY(qv_op_all_reduce(be, delta));
    return qv_op_add_rms_norm(be, residual, delta, w, eps, plus_one, y, rest);
}

qv_status qv_op_gather_cols(qv_backend *be, qv_tensor part, qv_tensor whole)
{
    EXPECT("gather_cols", part, QV_F32, ANY, ANY);
    if (!has_peers(be)) {
        QV_ASSERT(part.data == whole.data);
        return QV_OK;
    }
    if (be->rank == 0)
        EXPECT("gather_cols", whole, QV_F32, part.shape[0], ANY);
    return COLLECT(gather_cols, part, whole);
}

qv_status qv_op_gather_rows(qv_backend *be, qv_tensor x, const int32_t *rows, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("gather_rows", x, act, ANY, ANY);
    EXPECT("gather_rows", y, act, ANY, x.shape[1]);
    return qv_tensor_count(&y) ? CALL(gather_rows, be, x, rows, y) : QV_OK;
}

/* --- LoRA --------------------------------------------------------------------------------- */

static qv_status check_slices(const char *op, int32_t n_slices, const int64_t *start, int64_t n_out)
{
    int64_t last = 0;
    for (int32_t i = 0; i <= n_slices; i++) {
        if (start[i] < last || start[i] > n_out)
            return qv_fail(QV_ERR_SHAPE, "%s: slice %d starts at row %lld, after row %lld of %lld",
                           op, i, (long long)start[i], (long long)last, (long long)n_out);
        last = start[i];
    }
    return QV_OK;
}

static qv_status check_scratch(const char *op, qv_tensor scratch, const char *rows, int64_t n_rows,
                               int32_t n_slices, int32_t max_rank)
{
    EXPECT_CONTIGUOUS(op, scratch, QV_F32, ANY, n_slices, max_rank);
    if (scratch.shape[0] < n_rows)
        return qv_fail(QV_ERR_LIMIT, "%s: scratch for %lld %s, but there are %lld", op,
                       (long long)scratch.shape[0], rows, (long long)n_rows);
    return QV_OK;
}

static qv_status check_lora(qv_backend *be, const qv_lora_site *site, qv_tensor x,
                            qv_tensor scratch, qv_tensor y, qv_dtype y_dtype)
{
    qv_dtype dtype = site->a.dtype == QV_BF16 ? QV_BF16 : QV_F32;
    const qv_tensor a = site->a, b = site->b;
    EXPECT_CONTIGUOUS("lora", a, dtype, site->n_slots, site->n_slices, site->max_rank, site->n_in);
    EXPECT_CONTIGUOUS("lora", b, dtype, site->n_slots, site->max_rank, site->n_out);
    QV_TRY(check_slices("lora", site->n_slices, site->slice_start, site->n_out));
    EXPECT("lora", x, be->table->activation_dtype, ANY, site->n_in);
    EXPECT("lora", y, y_dtype, x.shape[0], site->n_out);
    return check_scratch("lora", scratch, "tokens", x.shape[0], site->n_slices, site->max_rank);
}

qv_status qv_op_lora(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                     const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                     qv_tensor scratch, qv_tensor y)
{
    QV_TRY(check_lora(be, site, x, scratch, y, be->table->activation_dtype));
    return x.shape[0] && n_segs > 0 ? CALL_SHAPED(lora, site->n_out, site->n_in, be, site, n_segs,
                                                  seg_start, seg_slot, x, scratch, y)
                                    : QV_OK;
}

qv_status qv_op_lora_f32(qv_backend *be, const qv_lora_site *site, int32_t n_segs,
                         const int32_t *seg_start, const int32_t *seg_slot, qv_tensor x,
                         qv_tensor scratch, qv_tensor y)
{
    QV_TRY(check_lora(be, site, x, scratch, y, QV_F32));
    return x.shape[0] && n_segs > 0 ? CALL_SHAPED(lora_f32, site->n_out, site->n_in, be, site,
                                                  n_segs, seg_start, seg_slot, x, scratch, y)
                                    : QV_OK;
}

qv_status qv_op_linear_lora(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                            int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                            qv_tensor x, qv_tensor scratch, qv_tensor y, bool f32)
{
    qv_dtype y_dtype = f32 ? QV_F32 : be->table->activation_dtype;
    QV_TRY(check_linear(be, w, x, y, y_dtype));
    QV_TRY(check_lora(be, site, x, scratch, y, y_dtype));
    if (x.shape[0] > 0 && n_segs > 0 && be->table->linear_lora != NULL)
        return CALL_ON(be->table, linear_lora, w->n_out, w->n_in, be, w, site, n_segs, seg_start,
                       seg_slot, x, scratch, y);
    QV_TRY(f32 ? qv_op_linear_f32(be, w, x, (qv_tensor){.data = NULL}, y)
               : qv_op_linear(be, w, x, y));
    return (f32 ? qv_op_lora_f32 : qv_op_lora)(be, site, n_segs, seg_start, seg_slot, x, scratch,
                                               y);
}

qv_status qv_op_linear_lora_add(qv_backend *be, const qv_weight *w, const qv_lora_site *site,
                                int32_t n_segs, const int32_t *seg_start, const int32_t *seg_slot,
                                qv_tensor x, qv_tensor scratch, qv_tensor y, bool *done)
{
    QV_TRY(check_linear(be, w, x, y, QV_F32));
    QV_TRY(check_lora(be, site, x, scratch, y, QV_F32));
    *done = n_segs > 0 && takes_add(be->table->takes_linear_lora_add, be, w, x, y);
    return *done ? CALL_ON(be->table, linear_lora_add, w->n_out, w->n_in, be, w, site, n_segs,
                           seg_start, seg_slot, x, scratch, y)
                 : QV_OK;
}

qv_status qv_op_embed_lora(qv_backend *be, const qv_embed_lora_site *site, int32_t n_segs,
                           const int32_t *seg_start, const int32_t *seg_slot, const int32_t *ids,
                           qv_tensor y)
{
    EXPECT("embed_lora", y, QV_F32, ANY, site->n_out);
    if (!is_weight_dtype(site->dtype))
        return qv_fail(QV_ERR_UNSUPPORTED, "embed_lora: A and B are F32 or BF16, not %s",
                       qv_dtype_name(site->dtype));
    return y.shape[0] && n_segs > 0
               ? CALL(embed_lora, be, site, n_segs, seg_start, seg_slot, ids, y)
               : QV_OK;
}

/* --- Attention ---------------------------------------------------------------------------- */

static qv_status check_kv(const char *op, const qv_backend *be, const qv_kv_layer *kv)
{
    qv_dtype dtype = be->table->kv_dtype;
    const qv_tensor k = kv->k, v = kv->v;
    EXPECT_CONTIGUOUS(op, k, dtype, ANY, kv->page_tokens, ANY, ANY);
    EXPECT_CONTIGUOUS(op, v, dtype, k.shape[0], k.shape[1], k.shape[2], k.shape[3]);
    if (kv->page_tokens <= 0)
        return qv_fail(QV_ERR_ARG, "%s: pages of %d tokens", op, kv->page_tokens);
    return QV_OK;
}

static qv_status check_head_groups(const char *op, int64_t n_heads, int64_t n_groups)
{
    if (n_groups <= 0 || n_heads % n_groups != 0)
        return qv_fail(QV_ERR_SHAPE, "%s: %lld heads do not share %lld heads evenly", op,
                       (long long)n_heads, (long long)n_groups);
    return QV_OK;
}

static qv_status check_rope(const char *op, const qv_backend *be, const qv_batch *batch,
                            int rotary_dim, double theta, qv_tensor q, qv_tensor k, qv_tensor v,
                            const qv_kv_layer *kv)
{
    qv_dtype act = be->table->activation_dtype;
    QV_TRY(check_kv(op, be, kv));
    int64_t n_tokens = batch->n_tokens, n_kv = kv->k.shape[2], d = kv->k.shape[3];
    EXPECT(op, q, act, n_tokens, ANY, d);
    EXPECT(op, k, act, n_tokens, n_kv, d);
    EXPECT(op, v, act, n_tokens, n_kv, d);
    if (rotary_dim < 0 || rotary_dim > d || rotary_dim % 2 != 0)
        return qv_fail(QV_ERR_SHAPE, "%s: %d rotary dimensions of %lld", op, rotary_dim,
                       (long long)d);
    if (rotary_dim > 0 && !(theta > 0 && isfinite(theta)))
        return qv_fail(QV_ERR_ARG, "%s: theta %g", op, theta);
    return QV_OK;
}

qv_status qv_op_rope_kv_write(qv_backend *be, const qv_batch *batch, int rotary_dim, double theta,
                              qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv)
{
    QV_TRY(check_rope("rope_kv_write", be, batch, rotary_dim, theta, q, k, v, kv));
    return batch->n_tokens ? CALL(rope_kv_write, be, batch, rotary_dim, theta, q, k, v, kv) : QV_OK;
}

qv_status qv_op_norm_rope_kv_write(qv_backend *be, const qv_batch *batch, const qv_norm_rope *how,
                                   qv_tensor q, qv_tensor k, qv_tensor v, const qv_kv_layer *kv)
{
    const char *op = "norm_rope_kv_write";
    if (be->table->norm_rope_kv_write == NULL) {
        QV_TRY(qv_op_rms_norm(be, q, how->q_norm, how->eps, how->plus_one, q));
        QV_TRY(qv_op_rms_norm(be, k, how->k_norm, how->eps, how->plus_one, k));
        return qv_op_rope_kv_write(be, batch, how->rotary_dim, how->theta, q, k, v, kv);
    }
    QV_TRY(check_rope(op, be, batch, how->rotary_dim, how->theta, q, k, v, kv));
    EXPECT(op, how->q_norm, QV_F32, q.shape[2]);
    EXPECT(op, how->k_norm, QV_F32, k.shape[2]);
    return batch->n_tokens
               ? CALL_ON(be->table, norm_rope_kv_write, 0, 0, be, batch, how, q, k, v, kv)
               : QV_OK;
}

static qv_status check_attention(const char *op, const qv_backend *be, const qv_batch *batch,
                                 const qv_kv_layer *kv, qv_tensor q, qv_tensor o)
{
    qv_dtype act = be->table->activation_dtype;
    QV_TRY(check_kv(op, be, kv));
    EXPECT(op, q, act, batch->n_tokens, ANY, kv->k.shape[3]);
    EXPECT(op, o, act, batch->n_tokens, q.shape[1], q.shape[2]);
    return check_head_groups(op, q.shape[1], kv->k.shape[2]);
}

qv_status qv_op_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv, float scale,
                          qv_tensor q, qv_tensor o)
{
    QV_TRY(check_attention("attention", be, batch, kv, q, o));
    return qv_tensor_count(&q) ? CALL(attention, be, batch, kv, scale, q, o) : QV_OK;
}

qv_status qv_op_gated_attention(qv_backend *be, const qv_batch *batch, const qv_kv_layer *kv,
                                float scale, qv_tensor q, qv_tensor gate, qv_tensor o)
{
    const char *op = "gated_attention";
    if (be->table->gated_attention == NULL) {
        QV_TRY(qv_op_attention(be, batch, kv, scale, q, o));
        return qv_op_sigmoid_gate(be, o, gate);
    }
    QV_TRY(check_attention(op, be, batch, kv, q, o));
    EXPECT(op, gate, be->table->activation_dtype, q.shape[0], q.shape[1], q.shape[2]);
    return qv_tensor_count(&q)
               ? CALL_ON(be->table, gated_attention, 0, 0, be, batch, kv, scale, q, gate, o)
               : QV_OK;
}

/* --- Recurrent layers --------------------------------------------------------------------- */

static qv_status check_conv(const qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                            qv_tensor bias, qv_tensor state, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("conv1d", x, act, batch->n_tokens, ANY);
    EXPECT("conv1d", y, act, batch->n_tokens, x.shape[1]);
    EXPECT_CONTIGUOUS("conv1d", w, QV_F32, x.shape[1], ANY);
    if (w.shape[1] < 1)
        return qv_fail(QV_ERR_SHAPE, "conv1d: a kernel without taps");
    EXPECT_CONTIGUOUS("conv1d", state, act, ANY, x.shape[1], w.shape[1] - 1);
    if (bias.data)
        EXPECT("conv1d", bias, QV_F32, x.shape[1]);
    return QV_OK;
}

qv_status qv_op_conv1d(qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                       qv_tensor bias, qv_tensor state, qv_tensor y)
{
    QV_TRY(check_conv(be, batch, x, w, bias, state, y));
    return qv_tensor_count(&x) ? CALL(conv1d, be, batch, x, w, bias, state, y) : QV_OK;
}

static qv_status check_gdn(const qv_backend *be, const qv_batch *batch, const qv_gdn_args *args)
{
    qv_dtype act = be->table->activation_dtype;
    int64_t n_tokens = batch->n_tokens;
    const qv_tensor q = args->q, k = args->k, v = args->v, a = args->a, b = args->b, o = args->o;
    const qv_tensor a_log = args->a_log, dt_bias = args->dt_bias, state = args->state;
    EXPECT("gdn", q, act, n_tokens, ANY, ANY);
    EXPECT("gdn", k, act, n_tokens, q.shape[1], q.shape[2]);
    EXPECT("gdn", v, act, n_tokens, ANY, ANY);
    EXPECT("gdn", o, act, n_tokens, v.shape[1], v.shape[2]);
    EXPECT("gdn", a, act, n_tokens, v.shape[1]);
    EXPECT("gdn", b, act, n_tokens, v.shape[1]);
    EXPECT("gdn", a_log, QV_F32, v.shape[1]);
    EXPECT("gdn", dt_bias, QV_F32, v.shape[1]);
    EXPECT_CONTIGUOUS("gdn", state, QV_F32, ANY, v.shape[1], q.shape[2], v.shape[2]);
    return check_head_groups("gdn", v.shape[1], q.shape[1]);
}

qv_status qv_op_gdn(qv_backend *be, const qv_batch *batch, const qv_gdn_args *args)
{
    QV_TRY(check_gdn(be, batch, args));
    return qv_tensor_count(&args->v) ? CALL(gdn, be, batch, args) : QV_OK;
}

static qv_status check_ssd(const qv_backend *be, const qv_batch *batch, const qv_ssd_args *args)
{
    qv_dtype act = be->table->activation_dtype;
    int64_t n_tokens = batch->n_tokens;
    const qv_tensor x = args->x, b = args->b, c = args->c, dt = args->dt, y = args->y;
    const qv_tensor a_log = args->a_log, dt_bias = args->dt_bias, d_skip = args->d_skip;
    const qv_tensor state = args->state;
    EXPECT("ssd", x, act, n_tokens, ANY, ANY);
    EXPECT("ssd", y, act, n_tokens, x.shape[1], x.shape[2]);
    EXPECT("ssd", b, act, n_tokens, ANY, ANY);
    EXPECT("ssd", c, act, n_tokens, b.shape[1], b.shape[2]);
    EXPECT("ssd", dt, act, n_tokens, x.shape[1]);
    EXPECT("ssd", a_log, QV_F32, x.shape[1]);
    EXPECT("ssd", dt_bias, QV_F32, x.shape[1]);
    EXPECT("ssd", d_skip, QV_F32, x.shape[1]);
    EXPECT_CONTIGUOUS("ssd", state, QV_F32, ANY, x.shape[1], x.shape[2], b.shape[2]);
    QV_TRY(check_head_groups("ssd", x.shape[1], b.shape[1]));
    if (!(args->dt_min >= 0 && args->dt_min <= args->dt_max))
        return qv_fail(QV_ERR_ARG, "ssd: dt from %g to %g", (double)args->dt_min,
                       (double)args->dt_max);
    return QV_OK;
}

qv_status qv_op_ssd(qv_backend *be, const qv_batch *batch, const qv_ssd_args *args)
{
    QV_TRY(check_ssd(be, batch, args));
    return qv_tensor_count(&args->x) ? CALL(ssd, be, batch, args) : QV_OK;
}

/* What stands around a recurrence. */
static qv_status check_around(const qv_backend *be, const qv_batch *batch, const qv_around *a,
                              bool gate_first)
{
    QV_TRY(check_conv(be, batch, a->x, a->w, a->bias, a->state, a->mixed));
    return check_gated_norm(be, a->groups, a->z, a->norm, gate_first, a->groups);
}

qv_status qv_op_conv_gdn_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                              const qv_gdn_args *args)
{
    const qv_around *a = around;
    QV_TRY(check_around(be, batch, a, false));
    QV_TRY(check_gdn(be, batch, args));
    if (batch->n_tokens > 0 && be->table->takes_conv_gdn_norm != NULL &&
        be->table->takes_conv_gdn_norm(be, batch, a, args))
        return CALL_ON(be->table, conv_gdn_norm, 0, 0, be, batch, a, args);
    QV_TRY(qv_op_conv1d(be, batch, a->x, a->w, a->bias, a->state, a->mixed));
    QV_TRY(qv_op_gdn(be, batch, args));
    return qv_op_gated_rms_norm(be, a->groups, a->z, a->norm, a->eps, false, a->groups);
}

qv_status qv_op_conv_ssd_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                              const qv_ssd_args *args)
{
    const qv_around *a = around;
    QV_TRY(check_around(be, batch, a, true));
    QV_TRY(check_ssd(be, batch, args));
    if (batch->n_tokens > 0 && be->table->takes_conv_ssd_norm != NULL &&
        be->table->takes_conv_ssd_norm(be, batch, a, args))
        return CALL_ON(be->table, conv_ssd_norm, 0, 0, be, batch, a, args);
    QV_TRY(qv_op_conv1d(be, batch, a->x, a->w, a->bias, a->state, a->mixed));
    QV_TRY(qv_op_ssd(be, batch, args));
    return qv_op_gated_rms_norm(be, a->groups, a->z, a->norm, a->eps, true, a->groups);
}

/* --- Mixture of experts ------------------------------------------------------------------- */

static qv_status check_router(const qv_router *r, int64_t n_experts)
{
    if (r->top_k < 1 || r->top_k > n_experts)
        return qv_fail(QV_ERR_ARG, "router: %d of %lld experts", r->top_k, (long long)n_experts);
    if (r->n_groups < 1 || n_experts % r->n_groups != 0)
        return qv_fail(QV_ERR_ARG, "router: %lld experts in %d groups", (long long)n_experts,
                       r->n_groups);
    if (r->topk_groups < 1 || r->topk_groups > r->n_groups ||
        r->topk_groups * (n_experts / r->n_groups) < r->top_k)
        return qv_fail(QV_ERR_ARG, "router: %d experts from %d of %d groups of %lld", r->top_k,
                       r->topk_groups, r->n_groups, (long long)(n_experts / r->n_groups));
    return QV_OK;
}

static qv_status check_router_op(const qv_router *router, qv_tensor logits, qv_tensor ids,
                                 qv_tensor weights)
{
    EXPECT("router", logits, QV_F32, ANY, ANY);
    QV_TRY(check_router(router, logits.shape[1]));
    EXPECT_CONTIGUOUS("router", ids, QV_I32, logits.shape[0], router->top_k);
    EXPECT_CONTIGUOUS("router", weights, QV_F32, logits.shape[0], router->top_k);
    const qv_tensor bias = router->bias;
    if (bias.data)
        EXPECT("router", bias, QV_F32, logits.shape[1]);
    return QV_OK;
}

qv_status qv_op_router(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                       qv_tensor weights)
{
    QV_TRY(check_router_op(router, logits, ids, weights));
    return logits.shape[0] ? CALL(router, be, router, logits, ids, weights) : QV_OK;
}

/* Bytes of a list's arrays, each on a boundary of 64; with memory, the list points into it. */
static size_t lay_out_list(qv_moe_list *list, char *memory)
{
    size_t n_pairs = (size_t)list->max_tokens * (size_t)list->top_k;
    size_t n_experts = (size_t)list->n_experts, used = 0;
#define TAKE(field, n)                                                                             \
    do {                                                                                           \
        list->field = memory ? (void *)(memory + used) : NULL;                                     \
        used += ((n) * sizeof *list->field + 63) / 64 * 64;                                        \
    } while (0)
    TAKE(expert_start, n_experts + 1);
    TAKE(pair, n_pairs);
    TAKE(place, n_pairs);
    TAKE(n_runs, 1);
    TAKE(next_item, 1);
    TAKE(runs, n_pairs);
    TAKE(work, (n_pairs > n_experts ? n_pairs : n_experts) + n_pairs / 512 + 2);
#undef TAKE
    return used;
}

static bool is_list_size(int32_t n_experts, int32_t top_k, int32_t max_tokens)
{
    return n_experts >= 1 && top_k >= 1 && max_tokens >= 0 &&
           (int64_t)max_tokens * top_k <= INT32_MAX;
}

size_t qv_moe_list_bytes(int32_t n_experts, int32_t top_k, int32_t max_tokens)
{
    if (!is_list_size(n_experts, top_k, max_tokens))
        return SIZE_MAX;
    qv_moe_list list = {.n_experts = n_experts, .top_k = top_k, .max_tokens = max_tokens};
    return lay_out_list(&list, NULL);
}

qv_status qv_moe_list_init(qv_moe_list *list, int32_t n_experts, int32_t top_k, int32_t max_tokens,
                           void *memory)
{
    if (!is_list_size(n_experts, top_k, max_tokens))
        return qv_fail(QV_ERR_LIMIT, "moe list: %d of %d experts for %d tokens", top_k, n_experts,
                       max_tokens);
    *list = (qv_moe_list){.n_experts = n_experts, .top_k = top_k, .max_tokens = max_tokens};
    lay_out_list(list, memory);
    return QV_OK;
}

/* The list is for these tokens from here on. */
static qv_status begin_list(qv_moe_list *list, qv_tensor ids, int32_t n_segs,
                            const int32_t *seg_start, const int32_t *seg_slot)
{
    EXPECT_CONTIGUOUS("moe_route", ids, QV_I32, ANY, list->top_k);
    if (ids.shape[0] > list->max_tokens)
        return qv_fail(QV_ERR_LIMIT, "moe_route: %lld tokens in a list for %d",
                       (long long)ids.shape[0], list->max_tokens);
    list->n_tokens = (int32_t)ids.shape[0];
    list->n_segs = n_segs;
    list->seg_start = seg_start;
    list->seg_slot = seg_slot;
    return QV_OK;
}

qv_status qv_op_moe_route(qv_backend *be, qv_tensor ids, int32_t n_segs, const int32_t *seg_start,
                          const int32_t *seg_slot, qv_moe_list *list)
{
    QV_TRY(begin_list(list, ids, n_segs, seg_start, seg_slot));
    return CALL(moe_route, be, ids, list);
}

static qv_status check_choice(qv_backend *be, const qv_router *router, qv_tensor logits,
                              qv_tensor ids, qv_tensor weights, const qv_beside *beside)
{
    QV_TRY(check_router_op(router, logits, ids, weights));
    return beside->w != NULL ? check_linear(be, beside->w, beside->x, beside->y, QV_F32) : QV_OK;
}

qv_status qv_op_choose(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                       qv_tensor weights, int32_t n_segs, const int32_t *seg_start,
                       const int32_t *seg_slot, qv_moe_list *list, const qv_beside *beside)
{
    const qv_beside nothing = {.w = NULL}, *b = beside != NULL ? beside : &nothing;
    if (be->table->choose != NULL && logits.shape[0] == 1) {
        QV_TRY(check_choice(be, router, logits, ids, weights, b));
        QV_TRY(begin_list(list, ids, n_segs, seg_start, seg_slot));
        return CALL_ON(be->table, choose, 0, 0, be, router, logits, ids, weights, list, b);
    }
    QV_TRY(qv_op_router(be, router, logits, ids, weights));
    QV_TRY(qv_op_moe_route(be, ids, n_segs, seg_start, seg_slot, list));
    return b->w != NULL ? qv_op_linear_f32(be, b->w, b->x, (qv_tensor){.data = NULL}, b->y) : QV_OK;
}

static int64_t n_pairs_of(const qv_moe_list *list)
{
    return (int64_t)list->n_tokens * list->top_k;
}

static int64_t n_rows_of(const qv_moe_list *list, qv_moe_rows rows)
{
    return rows == QV_MOE_TOKENS ? list->n_tokens : n_pairs_of(list);
}

qv_status qv_op_moe_gather(qv_backend *be, const qv_moe_list *list, qv_tensor room, qv_tensor *x,
                           qv_moe_rows *rows)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT("moe_gather", *x, act, n_rows_of(list, QV_MOE_TOKENS), room.shape[1]);
    EXPECT("moe_gather", room, act, n_pairs_of(list), x->shape[1]);
    *rows = QV_MOE_TOKENS;
    if (list->n_tokens == 0 || be->table->wants_pairs == NULL ||
        !be->table->wants_pairs(be, list, *x, room))
        return QV_OK;
    QV_TRY(CALL_ON(be->table, moe_gather, 0, 0, be, list, *x, room));
    *x = room;
    *rows = QV_MOE_PAIRS;
    return QV_OK;
}

static qv_status check_moe_linear(const qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                                  qv_tensor x, qv_moe_rows rows, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    QV_ASSERT(w->backend == be);
    if (w->n_experts != list->n_experts)
        return qv_fail(QV_ERR_SHAPE, "moe_linear: a weight of %lld experts, a list of %d",
                       (long long)w->n_experts, list->n_experts);
    EXPECT("moe_linear", x, act, n_rows_of(list, rows), w->n_in);
    EXPECT("moe_linear", y, act, n_pairs_of(list), w->n_out);
    return QV_OK;
}

qv_status qv_op_moe_linear(qv_backend *be, const qv_weight *w, const qv_moe_list *list, qv_tensor x,
                           qv_moe_rows rows, qv_tensor y)
{
    QV_TRY(check_moe_linear(be, w, list, x, rows, y));
    return list->n_tokens ? CALL_SHAPED(moe_linear, w->n_out, w->n_in, be, w, list, x, rows, y)
                          : QV_OK;
}

qv_status qv_op_moe_linear_act(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                               qv_tensor x, qv_moe_rows rows, qv_act act, qv_tensor wide,
                               qv_tensor y)
{
    int64_t f = act == QV_ACT_SWIGLU ? w->n_out / 2 : w->n_out;
    QV_TRY(check_moe_linear(be, w, list, x, rows, wide));
    EXPECT("moe_linear", y, be->table->activation_dtype, n_pairs_of(list), f);
    if (be->table->moe_linear_act != NULL)
        return list->n_tokens ? CALL_ON(be->table, moe_linear_act, w->n_out, w->n_in, be, w, list,
                                        x, rows, act, wide, y)
                              : QV_OK;
    QV_TRY(qv_op_moe_linear(be, w, list, x, rows, wide));
    return qv_op_activate(be, act, wide, y);
}

/* Both products, from the list on. */
static qv_status run_experts(qv_backend *be, const qv_moe_list *list, const qv_experts *e)
{
    qv_tensor x = e->x;
    qv_moe_rows rows;
    QV_TRY(qv_op_moe_gather(be, list, e->y, &x, &rows)); /* as wide as what goes in */
    QV_TRY(qv_op_moe_linear_act(be, e->in, list, x, rows, e->act, e->wide, e->inner));
    return qv_op_moe_linear(be, e->out, list, e->inner, QV_MOE_PAIRS, e->y);
}

static qv_status check_experts(const qv_backend *be, const qv_moe_list *list, const qv_experts *e)
{
    QV_TRY(check_moe_linear(be, e->in, list, e->x, QV_MOE_TOKENS, e->wide));
    QV_TRY(check_moe_linear(be, e->out, list, e->inner, QV_MOE_PAIRS, e->y));
    if (e->out->n_in != (e->act == QV_ACT_SWIGLU ? e->in->n_out / 2 : e->in->n_out))
        return qv_fail(QV_ERR_SHAPE, "choose_experts: %lld rows, then %lld columns",
                       (long long)e->in->n_out, (long long)e->out->n_in);
    return QV_OK;
}

qv_status qv_op_choose_experts(qv_backend *be, const qv_router *router, qv_tensor logits,
                               qv_tensor ids, qv_tensor weights, int32_t n_segs,
                               const int32_t *seg_start, const int32_t *seg_slot, qv_moe_list *list,
                               const qv_beside *beside, const qv_experts *experts)
{
    const qv_beside nothing = {.w = NULL}, *b = beside != NULL ? beside : &nothing;
    if (be->table->takes_experts != NULL && logits.shape[0] == 1) {
        QV_TRY(check_choice(be, router, logits, ids, weights, b));
        QV_TRY(begin_list(list, ids, n_segs, seg_start, seg_slot));
        QV_TRY(check_experts(be, list, experts));
        if (be->table->takes_experts(be, router, logits, list, experts))
            return CALL_ON(be->table, choose_experts, experts->in->n_out, experts->in->n_in, be,
                           router, logits, ids, weights, list, b, experts);
    }
    QV_TRY(qv_op_choose(be, router, logits, ids, weights, n_segs, seg_start, seg_slot, list, b));
    return run_experts(be, list, experts);
}

static qv_status check_moe_site(const char *op, const qv_moe_lora_site *site,
                                const qv_moe_list *list, qv_tensor scratch)
{
    if (site->n_experts != list->n_experts)
        return qv_fail(QV_ERR_SHAPE, "%s: a site of %d experts, a list of %d", op, site->n_experts,
                       list->n_experts);
    if (!is_weight_dtype(site->dtype))
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: A and B are F32 or BF16, not %s", op,
                       qv_dtype_name(site->dtype));
    QV_TRY(check_slices(op, site->n_slices, site->slice_start, site->n_out));
    return check_scratch(op, scratch, "pairs", n_pairs_of(list), site->n_slices, site->max_rank);
}

qv_status qv_op_moe_lora(qv_backend *be, const qv_moe_lora_site *site, const qv_moe_list *list,
                         qv_tensor x, qv_moe_rows rows, qv_tensor scratch, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    QV_TRY(check_moe_site("moe_lora", site, list, scratch));
    EXPECT("moe_lora", x, act, n_rows_of(list, rows), site->n_in);
    EXPECT("moe_lora", y, act, n_pairs_of(list), site->n_out);
    return list->n_tokens
               ? CALL_SHAPED(moe_lora, site->n_out, site->n_in, be, site, list, x, rows, scratch, y)
               : QV_OK;
}

static qv_status check_combine(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                               qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                               qv_tensor y, qv_dtype y_dtype)
{
    qv_dtype act = be->table->activation_dtype;
    EXPECT_CONTIGUOUS("moe_combine", weights, QV_F32, list->n_tokens, list->top_k);
    EXPECT("moe_combine", o, act, n_pairs_of(list), ANY);
    EXPECT("moe_combine", y, y_dtype, list->n_tokens, site ? site->n_out : o.shape[1]);
    if (o.shape[1] != y.shape[1])
        return qv_fail(QV_ERR_SHAPE, "moe_combine: rows of %lld into rows of %lld",
                       (long long)o.shape[1], (long long)y.shape[1]);
    return site ? check_moe_site("moe_combine", site, list, scratch) : QV_OK;
}

qv_status qv_op_moe_combine(qv_backend *be, const qv_moe_list *list, qv_tensor weights, qv_tensor o,
                            const qv_moe_lora_site *site, qv_tensor scratch, qv_tensor y)
{
    qv_dtype act = be->table->activation_dtype;
    QV_TRY(check_combine(be, list, weights, o, site, scratch, y, act));
    return qv_tensor_count(&y) ? CALL(moe_combine, be, list, weights, o, site, scratch, y) : QV_OK;
}

static qv_status check_combine_f32(qv_backend *be, const qv_moe_sum *sum, qv_tensor y)
{
    QV_TRY(check_combine(be, sum->list, sum->weights, sum->o, sum->site, sum->scratch, y, QV_F32));
    return sum->shared.data
               ? check_delta(be, "moe_combine", sum->shared, sum->gate, y.shape[0], y.shape[1])
               : QV_OK;
}

qv_status qv_op_moe_combine_f32(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                                qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                                qv_tensor shared, qv_tensor gate, qv_tensor y)
{
    const qv_moe_sum sum = {list, weights, o, site, scratch, shared, gate};
    QV_TRY(check_combine_f32(be, &sum, y));
    return qv_tensor_count(&y)
               ? CALL(moe_combine_f32, be, list, weights, o, site, scratch, shared, gate, y)
               : QV_OK;
}

qv_status qv_op_combine_add_rms_norm(qv_backend *be, const qv_moe_sum *sum, qv_tensor residual,
                                     qv_tensor delta, qv_tensor w, float eps, bool plus_one,
                                     qv_tensor y, qv_tensor rest)
{
    if (be->table->combine_add_rms_norm != NULL && !has_peers(be) && residual.shape[0] > 0) {
        QV_TRY(check_combine_f32(be, sum, delta));
        QV_TRY(check_add_rms_norm(be, residual, delta, w, y, rest));
        return CALL_ON(be->table, combine_add_rms_norm, 0, 0, be, sum, residual, delta, w, eps,
                       plus_one, y, rest);
    }
    QV_TRY(qv_op_moe_combine_f32(be, sum->list, sum->weights, sum->o, sum->site, sum->scratch,
                                 sum->shared, sum->gate, delta));
    return qv_op_sum_add_rms_norm(be, residual, delta, w, eps, plus_one, y, rest);
}

/* --- Sampling ----------------------------------------------------------------------------- */

static qv_status check_ids(const char *what, int64_t row, const int32_t *ids, int32_t n,
                           int64_t n_vocab)
{
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= n_vocab)
            return qv_fail(QV_ERR_ARG, "sample: row %lld: %s %d is not below %lld", (long long)row,
                           what, ids[i], (long long)n_vocab);
    return QV_OK;
}

/* Of a row that chooses: the last of its tokens may be one that a row of another sampling chose. */
static qv_status check_tokens(int64_t i, const qv_sample_row *row, int64_t n_vocab)
{
    int32_t n = row->tokens ? row->n_tokens : 0;
    return check_ids("token", i, row->tokens, n > 0 && row->tokens[n - 1] < 0 ? n - 1 : n, n_vocab);
}

static qv_status check_sample_row(int64_t i, const qv_sample_row *row, int64_t n_vocab)
{
#define CHECK(cond, format, value)                                                                 \
    if (!(cond))                                                                                   \
    return qv_fail(QV_ERR_ARG, "sample: row %lld: " format, (long long)i, value)
    CHECK(row->target < n_vocab, "target %d is not in the vocabulary", row->target);
    CHECK(row->n_top <= QV_MAX_TOP_LOGPROBS, "%d alternatives", row->n_top);
    if (row->target >= 0)
        return QV_OK;
    CHECK(row->temperature >= 0 && isfinite(row->temperature), "temperature %g",
          (double)row->temperature);
    CHECK(row->top_k >= 0, "top_k %d", row->top_k);
    CHECK(row->top_p >= 0, "top_p %g", (double)row->top_p);
    CHECK(row->min_p >= 0, "min_p %g", (double)row->min_p);
    CHECK(row->repetition_penalty > 0, "repetition_penalty %g", (double)row->repetition_penalty);
    CHECK(isfinite(row->presence_penalty), "presence_penalty %g", (double)row->presence_penalty);
    CHECK(isfinite(row->frequency_penalty), "frequency_penalty %g", (double)row->frequency_penalty);
    CHECK(row->n_prompt >= 0 && row->n_prompt <= row->n_tokens, "%d prompt tokens", row->n_prompt);
    CHECK(row->n_banned >= 0, "%d banned tokens", row->n_banned);
#undef CHECK
    QV_TRY(check_tokens(i, row, n_vocab));
    return check_ids("banned token", i, row->banned, row->n_banned, n_vocab);
}

qv_status qv_sample_check_rows(const qv_sample_row *rows, int64_t n_rows, int64_t n_vocab)
{
    for (int64_t i = 0; i < n_rows; i++)
        QV_TRY(check_sample_row(i, &rows[i], n_vocab));
    return QV_OK;
}

qv_status qv_op_sample_begin(qv_backend *be, qv_tensor logits, int32_t n_valid,
                             const qv_sample_row *rows)
{
    EXPECT("sample", logits, QV_F32, ANY, ANY);
    if (n_valid <= 0 || n_valid > logits.shape[1])
        return qv_fail(QV_ERR_SHAPE, "sample: %d valid tokens of %lld columns", n_valid,
                       (long long)logits.shape[1]);
    if (be->n_samplings == QV_MAX_SAMPLINGS)
        return qv_fail(QV_ERR_LIMIT, "sample: %d samplings have not ended", QV_MAX_SAMPLINGS);
    QV_TRY(qv_sample_check_rows(rows, logits.shape[0], logits.shape[1]));
    QV_TRY(CALL(sample_begin, be, logits, n_valid, rows));
    be->n_samplings++;
    return QV_OK;
}

qv_status qv_op_sample_end(qv_backend *be, qv_sample_result *results)
{
    QV_ASSERT(be->n_samplings > 0);
    be->n_samplings--;
    return CALL(sample_end, be, results);
}

qv_status qv_op_sample(qv_backend *be, qv_tensor logits, int32_t n_valid, const qv_sample_row *rows,
                       qv_sample_result *results)
{
    EXPECT("sample", logits, QV_F32, ANY, ANY);
    if (logits.shape[0] == 0)
        return QV_OK;
    if (be->n_samplings > 0)
        return qv_fail(QV_ERR_LIMIT, "sample: a sampling that was begun has not ended");
    QV_TRY(qv_op_sample_begin(be, logits, n_valid, rows));
    return qv_op_sample_end(be, results);
}

/* The first of the rows, or of those that are short with `n_valid`, that could not be sampled. */
static qv_status check_results(const qv_sample_result *results, int64_t n_rows,
                               const qv_sample_row *rows, int32_t n_valid)
{
    for (int64_t i = 0; i < n_rows; i++) {
        if (rows != NULL && !qv_sample_row_is_short(&rows[i], n_valid))
            continue;
        if (results[i].token == QV_SAMPLE_NOT_FINITE)
            return qv_fail(QV_ERR_INTERNAL, "sample: row %lld has logits that are not finite",
                           (long long)i);
        if (results[i].token == QV_SAMPLE_ALL_BANNED)
            return qv_fail(QV_ERR_ARG, "sample: row %lld has every token banned", (long long)i);
    }
    return QV_OK;
}

qv_status qv_sample_check_results(const qv_sample_result *results, int64_t n_rows)
{
    return check_results(results, n_rows, NULL, 0);
}

bool qv_sample_row_is_short(const qv_sample_row *row, int32_t n_valid)
{
    return row->target >= 0 || row->temperature == 0 ||
           (row->top_k > 0 && row->top_k <= QV_MAX_SHORTLIST && row->top_k < n_valid);
}

qv_shortlist_shape qv_shortlist_shape_of(const qv_sample_row *rows, int64_t n_rows, int32_t n_valid)
{
    qv_shortlist_shape shape = {0};
    for (int64_t i = 0; i < n_rows; i++) {
        if (!qv_sample_row_is_short(&rows[i], n_valid))
            continue;
        int32_t k = rows[i].target >= 0 ? 0 : rows[i].temperature > 0 ? rows[i].top_k : 1;
        shape.k = k > shape.k ? k : shape.k;
        shape.n_top = rows[i].n_top > shape.n_top ? rows[i].n_top : shape.n_top;
    }
    return shape;
}

int64_t qv_shortlist_words(qv_shortlist_shape shape)
{
    return QV_SHORT_WORDS(shape.k, shape.n_top);
}

static qv_status check_shortlist(const qv_shortlist_part *where, const qv_sample_row *rows,
                                 int64_t n_rows)
{
    if (where->shape.k < 0 || where->shape.k > QV_MAX_SHORTLIST || where->shape.n_top < 0 ||
        where->shape.n_top > QV_MAX_TOP_LOGPROBS)
        return qv_fail(QV_ERR_LIMIT, "shortlist: %d tokens, %d alternatives", where->shape.k,
                       where->shape.n_top);
    if (where->n_valid <= 0 || where->n_valid > where->n_vocab)
        return qv_fail(QV_ERR_SHAPE, "shortlist: %d valid tokens of %lld columns", where->n_valid,
                       (long long)where->n_vocab);
    for (int64_t i = 0; i < n_rows; i++)
        if (rows[i].target < 0 && rows[i].tokens != NULL && rows[i].n_tokens > 0 &&
            rows[i].tokens[rows[i].n_tokens - 1] < 0)
            return qv_fail(QV_ERR_ARG, "shortlist: the last token of row %lld is not known",
                           (long long)i);
    return qv_sample_check_rows(rows, n_rows, where->n_vocab);
}

qv_status qv_op_shortlist(qv_backend *be, qv_tensor part, const qv_shortlist_part *where,
                          const qv_sample_row *rows, qv_tensor lists)
{
    EXPECT("shortlist", part, QV_F32, ANY, ANY);
    EXPECT_CONTIGUOUS("shortlist", lists, QV_F32, part.shape[0], qv_shortlist_words(where->shape));
    if (part.shape[0] == 0)
        return QV_OK;
    if (where->first < 0 || where->first + part.shape[1] > where->n_vocab)
        return qv_fail(QV_ERR_SHAPE, "shortlist: columns %lld to %lld of %lld",
                       (long long)where->first, (long long)(where->first + part.shape[1]),
                       (long long)where->n_vocab);
    QV_TRY(check_shortlist(where, rows, part.shape[0]));
    return CALL(shortlist, be, part, where, rows, lists);
}

qv_status qv_op_merge_shortlists(qv_backend *be, qv_tensor lists, int32_t n_parts,
                                 const qv_shortlist_part *where, const qv_sample_row *rows,
                                 qv_sample_result *results)
{
    EXPECT_CONTIGUOUS("merge_shortlists", lists, QV_F32, ANY,
                      n_parts * qv_shortlist_words(where->shape));
    if (lists.shape[0] == 0)
        return QV_OK;
    QV_TRY(check_shortlist(where, rows, lists.shape[0]));
    QV_TRY(CALL(merge_shortlists, be, lists, n_parts, where, rows, results));
    return check_results(results, lists.shape[0], rows, where->n_valid);
}
