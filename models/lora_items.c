/* From pairs of tensors to items: shapes, ranks and scales first, for all pairs, then the numbers.
 */
#include "models/lora_reader.h"
#include "models/weights.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define BLOCK 4096 /* numbers converted and hashed at a time */

/* --- Shapes ----------------------------------------------------------------------------------- */

qv_status qv_lora_check_dims(const qv_lora_reader *r, const qv_stored_tensor *tensor, int n_dims,
                             const char *shape)
{
    char text[128];
    qv_stored_tensor_describe(tensor, text, sizeof text);
    if (tensor->dtype != QV_F32 && tensor->dtype != QV_BF16 && tensor->dtype != QV_F16)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: %.200s is %s: only F32, BF16 and F16 are implemented", r->where,
                       tensor->name, text);
    if (tensor->n_dims != n_dims)
        return qv_fail(QV_ERR_SHAPE, "%s: %.200s is %s; the model makes it %s", r->where,
                       tensor->name, text, shape);
    return QV_OK;
}

/* Dimension `dim` of a tensor must be `expected`; `shape` is what the model makes of all of them.
 */
static qv_status check_matrix(const qv_lora_reader *r, const qv_stored_tensor *tensor, int n_dims,
                              int dim, int64_t expected, const char *shape)
{
    QV_TRY(qv_lora_check_dims(r, tensor, n_dims, shape));
    char text[128];
    qv_stored_tensor_describe(tensor, text, sizeof text);
    return tensor->shape[dim] == expected
               ? QV_OK
               : qv_fail(QV_ERR_SHAPE, "%s: %.200s is %s; the model makes it %s", r->where,
                         tensor->name, text, shape);
}

/* One matrix: A [rank, n_in], B [n_rows, rank]. */
static qv_status view_matrix(const qv_lora_reader *r, qv_lora_pair *p)
{
    const qv_lora_target *target = &p->place.target;
    char shape[64];
    snprintf(shape, sizeof shape, "[rank, %" PRId64 "]", target->n_in);
    QV_TRY(check_matrix(r, p->a, 2, 1, target->n_in, shape));
    snprintf(shape, sizeof shape, "[%" PRId64 ", rank]", target->n_rows);
    QV_TRY(check_matrix(r, p->b, 2, 0, target->n_rows, shape));
    p->a_view = qv_lora_view_plain(p->a, 1, p->a->shape[0], target->n_in);
    p->b_view = qv_lora_view_plain(p->b, 1, target->n_rows, p->b->shape[1]);
    return QV_OK;
}

/* The head and the embedding are one matrix and its transpose, and so are their pairs; files have
 * either under the names of both. */
static qv_status view_vocabulary(const qv_lora_reader *r, qv_lora_pair *p)
{
    const qv_lora_target *target = &p->place.target;
    bool transposed = p->a->n_dims == 2 && p->b->n_dims == 2 && p->a->shape[1] == target->n_rows &&
                      p->b->shape[0] == target->n_in && p->a->shape[1] != target->n_in;
    if (!transposed)
        return view_matrix(r, p);
    QV_TRY(qv_lora_check_dims(r, p->a, 2, "a matrix"));
    QV_TRY(qv_lora_check_dims(r, p->b, 2, "a matrix"));
    p->a_view = qv_lora_view_transpose(qv_lora_view_plain(p->b, 1, target->n_in, p->b->shape[1]));
    p->b_view = qv_lora_view_transpose(qv_lora_view_plain(p->a, 1, p->a->shape[0], target->n_rows));
    return QV_OK;
}

/* All experts: A [experts, rank, n_in], B [experts, n_rows, rank], or 1 in place of experts for a
 * matrix that they share. */
static qv_status view_experts(const qv_lora_reader *r, qv_lora_pair *p)
{
    const qv_lora_target *target = &p->place.target;
    int64_t n = r->spec->layout->config->n_experts;
    const qv_stored_tensor *parts[] = {p->a, p->b};
    char shapes[2][96];
    snprintf(shapes[0], sizeof shapes[0], "[%" PRId64 " or 1, rank, %" PRId64 "]", n, target->n_in);
    snprintf(shapes[1], sizeof shapes[1], "[%" PRId64 " or 1, %" PRId64 ", rank]", n,
             target->n_rows);
    for (int i = 0; i < 2; i++)
        QV_TRY(check_matrix(r, parts[i], 3, 0, parts[i]->shape[0] == 1 ? 1 : n, shapes[i]));
    QV_TRY(check_matrix(r, p->a, 3, 2, target->n_in, shapes[0]));
    QV_TRY(check_matrix(r, p->b, 3, 1, target->n_rows, shapes[1]));
    p->a_view = qv_lora_view_plain(p->a, p->a->shape[0], p->a->shape[1], p->a->shape[2]);
    p->b_view = qv_lora_view_plain(p->b, p->b->shape[0], p->b->shape[1], p->b->shape[2]);
    return QV_OK;
}

/* The name that patterns match: of the module, or of the parameter where that is what was targeted,
 * as experts always are. */
static void name_module(const qv_lora_reader *r, const qv_lora_pair *p, char *buf, size_t size)
{
    qv_lora_key key = qv_lora_key_parse(p->a->name);
    if (p->place.kind != QV_PLACE_WRAPPER) {
        snprintf(buf, size, "%.*s.weight", (int)key.size, key.module);
        if (!qv_lora_config_targets(&r->config, buf))
            snprintf(buf, size, "%.*s", (int)key.size, key.module);
        return;
    }
    const qv_proj_shape *shape = &r->spec->layout->proj[p->place.target.proj];
    size_t n = key.size - (p->place.inner ? strlen(".base_layer") : 0);
    snprintf(buf, size, "%.*s.%s", (int)n, key.module, shape->slices[0].row->fused);
}

static qv_status measure_pair(const qv_lora_reader *r, qv_lora_pair *p)
{
    const qv_lora_place *place = &p->place;
    bool vocabulary = place->kind == QV_PLACE_EMBEDDING || place->layer == QV_GLOBAL;
    if (vocabulary)
        QV_TRY(view_vocabulary(r, p));
    else if (place->kind == QV_PLACE_EXPERT && place->expert == QV_ALL_EXPERTS)
        QV_TRY(view_experts(r, p));
    else if (place->kind != QV_PLACE_WRAPPER) /* resolved already */
        QV_TRY(view_matrix(r, p));
    int64_t rank = p->a_view.rows;
    if (rank != p->b_view.cols)
        return qv_fail(QV_ERR_SHAPE,
                       "%s: %.200s has rank %" PRId64 ", but its lora_B has rank %" PRId64,
                       r->where, p->a->name, rank, p->b_view.cols);
    if (rank > r->spec->max_rank)
        return qv_fail(QV_ERR_LIMIT,
                       "%s: %.200s has rank %" PRId64 "; the adapter slots have room for %d",
                       r->where, p->a->name, rank, r->spec->max_rank);
    p->rank = (int32_t)rank;
    char module[512];
    name_module(r, p, module, sizeof module);
    return qv_lora_config_scale(&r->config, r->config_where, module, p->rank, &p->scale);
}

qv_status qv_lora_measure_pairs(qv_lora_reader *r)
{
    for (size_t i = 0; i < r->n_pairs; i++)
        QV_TRY(measure_pair(r, r->pairs[i]));
    return QV_OK;
}

/* --- Numbers ---------------------------------------------------------------------------------- */

/* Matrices being read: straight from the file, or unpacked first where they do not stand one after
 * the other there. */
typedef struct {
    const qv_lora_view *view;
    float *unpacked; /* NULL: straight */
    uint8_t *out;    /* the same numbers in the pool's dtype, memory of the adapter */
} source;

static qv_status open_source(qv_lora_reader *r, const qv_lora_view *view, source *out)
{
    const qv_stored_tensor *tensor = view->tensor;
    size_t bytes = (size_t)tensor->n_elems * qv_dtype_size(r->spec->dtype);
    *out = (source){.view = view, .out = qv_arena_alloc(&r->adapter->arena, bytes, 64)};
    if (out->out == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for %.200s", r->where, tensor->name);
    r->adapter->bytes += bytes;
    QV_TRY(qv_stored_tensor_require_finite(tensor, 0, tensor->n_elems));
    if (qv_lora_view_is_plain(view))
        return QV_OK;
    out->unpacked = malloc((size_t)tensor->n_elems * sizeof(float));
    if (out->unpacked == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for %.200s", r->where, tensor->name);
    return qv_lora_view_f32(view, out->unpacked);
}

/* Convert matrices [first, first + n); hash their float32 values. Returns where they are. */
static qv_status read_matrices(const qv_lora_reader *r, const source *s, int64_t first, int64_t n,
                               XXH3_state_t *hash, const void **out)
{
    size_t elem = qv_dtype_size(r->spec->dtype);
    int64_t size = s->view->rows * s->view->cols, end = (first + n) * size;
    *out = s->out + (size_t)(first * size) * elem;
    for (int64_t i = first * size; i < end; i += BLOCK) {
        float block[BLOCK];
        const float *numbers = s->unpacked != NULL ? s->unpacked + i : block;
        int64_t count = end - i < BLOCK ? end - i : BLOCK;
        if (s->unpacked == NULL)
            QV_TRY(qv_stored_tensor_f32(s->view->tensor, i, count, block));
        XXH3_128bits_update(hash, numbers, (size_t)count * sizeof *numbers);
        QV_TRY(qv_dtype_from_f32(r->spec->dtype, numbers, s->out + (size_t)i * elem, count));
    }
    return QV_OK;
}

/* What of an item besides its numbers makes it what it is. */
static void hash_item(const qv_lora_reader *r, const qv_lora_item *item, XXH3_state_t *hash)
{
    const qv_lora_target *target = &item->target;
    const char *module = "embed_tokens";
    int64_t row = 0;
    if (!item->embedding) {
        const qv_proj_shape *shape = &r->spec->layout->proj[target->proj];
        module = shape->slices[target->first].row->module;
        row = shape->slices[target->first].dst_row;
    }
    char text[256];
    int n = snprintf(text, sizeof text,
                     "%" PRId64 " %s %" PRId64 "+%" PRId64 " e%d a%d b%d r%d s%08x\n", item->layer,
                     module, row, target->n_rows, item->expert, item->n_a, item->n_b, item->rank,
                     qv_f32_bits(item->scale));
    XXH3_128bits_update(hash, text, (size_t)n);
}

/* A pair of all experts in which no matrix is shared becomes an item for each. */
static bool is_split(const qv_lora_reader *r, const qv_lora_pair *p)
{
    int64_t n = r->spec->layout->config->n_experts;
    bool experts = p->place.kind == QV_PLACE_WRAPPER || p->place.kind == QV_PLACE_EXPERT;
    return experts && p->place.expert == QV_ALL_EXPERTS && p->a_view.n == n && p->b_view.n == n;
}

static qv_status read_item(qv_lora_reader *r, const qv_lora_pair *p, const source *a,
                           const source *b, int32_t i, XXH3_state_t *hash)
{
    bool split = is_split(r, p);
    qv_lora_item *item = &r->adapter->items[r->adapter->n_items];
    *item = (qv_lora_item){.layer = p->place.layer,
                           .embedding = p->place.kind == QV_PLACE_EMBEDDING,
                           .target = p->place.target,
                           .expert = split ? i : p->place.expert,
                           .n_a = split ? 1 : (int32_t)p->a_view.n,
                           .n_b = split ? 1 : (int32_t)p->b_view.n,
                           .rank = p->rank,
                           .scale = p->scale};
    hash_item(r, item, hash);
    QV_TRY(read_matrices(r, a, i, item->n_a, hash, &item->a));
    QV_TRY(read_matrices(r, b, i, item->n_b, hash, &item->b));
    r->adapter->n_items++;
    return QV_OK;
}

static int64_t n_items_of(const qv_lora_reader *r, const qv_lora_pair *p)
{
    return is_split(r, p) ? p->a_view.n : 1;
}

static qv_status read_pair(qv_lora_reader *r, const qv_lora_pair *p, source *a, source *b,
                           XXH3_state_t *hash)
{
    QV_TRY(open_source(r, &p->a_view, a));
    QV_TRY(open_source(r, &p->b_view, b));
    for (int64_t i = 0; i < n_items_of(r, p); i++)
        QV_TRY(read_item(r, p, a, b, (int32_t)i, hash));
    return QV_OK;
}

static qv_status read_pairs(qv_lora_reader *r, XXH3_state_t *hash)
{
    XXH3_128bits_reset(hash);
    XXH3_128bits_update(hash, "quiver lora 2\n", 14);
    qv_status status = QV_OK;
    for (size_t i = 0; i < r->n_pairs && status == QV_OK; i++) {
        source a = {.view = NULL}, b = {.view = NULL};
        status = read_pair(r, r->pairs[i], &a, &b, hash);
        free(a.unpacked);
        free(b.unpacked);
    }
    if (status != QV_OK)
        return status;
    XXH128_hash_t digest = XXH3_128bits_digest(hash);
    snprintf(r->adapter->digest, sizeof r->adapter->digest, "%016" PRIx64 "%016" PRIx64,
             (uint64_t)digest.high64, (uint64_t)digest.low64);
    return QV_OK;
}

qv_status qv_lora_read_items(qv_lora_reader *r)
{
    size_t n = 0;
    for (size_t i = 0; i < r->n_pairs; i++) {
        n += (size_t)n_items_of(r, r->pairs[i]);
        if (r->pairs[i]->rank > r->adapter->max_rank)
            r->adapter->max_rank = r->pairs[i]->rank;
    }
    r->adapter->items = QV_ARENA_ARRAY(&r->adapter->arena, qv_lora_item, n);
    XXH3_state_t *hash = XXH3_createState();
    qv_status status = r->adapter->items != NULL && hash != NULL
                           ? read_pairs(r, hash)
                           : qv_fail(QV_ERR_NOMEM, "%s: no memory for a list of pairs", r->where);
    XXH3_freeState(hash);
    return status;
}
