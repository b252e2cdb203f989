/* Every tensor of an adapter into its pair: what it is, where it belongs, or why it has no place.
 */
#include "models/arch.h"
#include "models/lora_reader.h"
#include "models/weights.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 4096 /* numbers compared at a time */

/* --- Pairs ------------------------------------------------------------------------------------ */

/* What identifies a pair whatever its spelling; the key of the map of pairs. */
typedef struct {
    int64_t layer;
    int32_t proj, first, n, expert, inner, zero;
} pair_key;

static void add_misfit(qv_lora_reader *r, const char *name, const char *reason)
{
    size_t used = strlen(r->misfits);
    if (r->n_misfits++ < 3)
        snprintf(r->misfits + used, sizeof r->misfits - used, "%s%.120s (%s)", used ? ", " : "",
                 name, reason);
}

static qv_status add_to_pair(qv_lora_reader *r, const qv_lora_place *found, bool is_a,
                             const qv_stored_tensor *tensor)
{
    bool wrapper = found->kind == QV_PLACE_WRAPPER;
    pair_key key = {.layer = found->layer,
                    .proj = wrapper ? -1 : (int32_t)found->target.proj,
                    .first = found->target.first,
                    .n = found->target.n,
                    .expert = found->expert,
                    .inner = found->inner};
    qv_map_entry *entry = qv_map_require(r->by_key, &key, sizeof key);
    if (entry != NULL && entry->value == NULL) {
        qv_lora_pair *fresh = QV_ARENA_NEW(&r->adapter->arena, qv_lora_pair);
        if (fresh != NULL)
            *fresh = (qv_lora_pair){.place = *found};
        entry->value = fresh;
    }
    if (entry == NULL || entry->value == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for a list of pairs", r->where);
    qv_lora_pair *p = entry->value;
    const qv_stored_tensor **part = is_a ? &p->a : &p->b;
    if (*part != NULL)
        return qv_fail(QV_ERR_FORMAT, "%s: %.200s and %.200s are the same matrix twice", r->where,
                       (*part)->name, tensor->name);
    *part = tensor;
    return QV_OK;
}

/* A pair of a part that is not served may be skipped when it does nothing: when its B is zero. */
static qv_status skip_not_served(qv_lora_reader *r, const qv_lora_key *key,
                                 const qv_stored_tensor *tensor)
{
    bool is_b = key->kind == QV_KEY_B || key->kind == QV_KEY_EMBEDDING_B;
    for (int64_t first = 0; is_b && first < tensor->n_elems; first += BLOCK) {
        float block[BLOCK];
        int64_t n = tensor->n_elems - first < BLOCK ? tensor->n_elems - first : BLOCK;
        QV_TRY(qv_stored_tensor_f32(tensor, first, n, block));
        for (int64_t i = 0; i < n; i++) {
            if (block[i] != 0) /* NaN too */
                return qv_fail(QV_ERR_UNSUPPORTED,
                               "%s: %.200s changes a part of the model that is not served",
                               r->where, tensor->name);
        }
    }
    r->n_not_served++;
    return QV_OK;
}

/* --- Copies of base weights ------------------------------------------------------------------- */

/* The base tensor behind a copy of the head or the embedding; NULL if it cannot be found. */
static const qv_stored_tensor *find_base(const qv_lora_reader *r, bool head)
{
    const qv_layout *layout = r->spec->layout;
    if (head && !layout->config->tied_head)
        return qv_safetensors_find(r->base, "lm_head.weight");
    char name[256];
    for (const char *const *prefix = layout->config->arch->prefixes; *prefix != NULL; prefix++) {
        const qv_stored_tensor *tensor =
            qv_safetensors_find(r->base, qv_tensor_name(name, sizeof name, *prefix, QV_GLOBAL,
                                                        layout->vec[QV_VEC_EMBED].tensor, ""));
        if (tensor != NULL)
            return tensor;
    }
    return NULL;
}

static qv_status same_numbers(const qv_stored_tensor *x, const qv_stored_tensor *y, bool *same)
{
    *same = x->n_elems == y->n_elems;
    for (int64_t first = 0; *same && first < x->n_elems; first += BLOCK) {
        float a[BLOCK], b[BLOCK];
        int64_t n = x->n_elems - first < BLOCK ? x->n_elems - first : BLOCK;
        QV_TRY(qv_stored_tensor_f32(x, first, n, a));
        QV_TRY(qv_stored_tensor_f32(y, first, n, b));
        *same = memcmp(a, b, (size_t)n * sizeof *a) == 0;
    }
    return QV_OK;
}

/* PEFT saves the base embedding and head beside pairs that target them. Such a copy may be skipped
 * when it equals the model's own. */
static qv_status check_base_copy(qv_lora_reader *r, const qv_lora_place *found,
                                 const qv_stored_tensor *tensor)
{
    bool head = found->kind == QV_PLACE_LINEAR && found->target.proj == QV_PROJ_LM_HEAD;
    if (found->kind != QV_PLACE_EMBEDDING && !head) {
        add_misfit(r, tensor->name, "a full copy of a weight, which is not supported");
        return QV_OK;
    }
    bool same = false;
    if (r->spec->model_dir != NULL && r->base == NULL)
        QV_TRY(qv_safetensors_open_dir(r->spec->model_dir, &r->base));
    const qv_stored_tensor *base = r->base != NULL ? find_base(r, head) : NULL;
    if (base != NULL)
        QV_TRY(same_numbers(base, tensor, &same));
    if (!same)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: %.200s is not the same as the base model's: changed base weights are "
                       "not supported",
                       r->where, tensor->name);
    fprintf(r->notes, "%s equals the base model's and was skipped\n", tensor->name);
    return QV_OK;
}

/* --- Sort every tensor into its place --------------------------------------------------------- */

static qv_status place_tensor(qv_lora_reader *r, const qv_stored_tensor *tensor)
{
    if (tensor->n_elems == 0) { /* some writers use these to say "no such module" */
        r->n_empty++;
        return QV_OK;
    }
    qv_lora_key key = qv_lora_key_parse(tensor->name);
    if (key.kind == QV_KEY_REFUSED)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: %.200s: %s", r->where, tensor->name, key.reason);
    if (key.kind == QV_KEY_UNKNOWN) {
        add_misfit(r, tensor->name, "neither a lora_A nor a lora_B that is known");
        return QV_OK;
    }
    qv_lora_place found = qv_lora_place_find(r->spec->layout, key.module, key.size);
    bool embedding_key = key.kind == QV_KEY_EMBEDDING_A || key.kind == QV_KEY_EMBEDDING_B;
    if (found.kind == QV_PLACE_NOT_SERVED && key.kind != QV_KEY_BASE_COPY)
        return skip_not_served(r, &key, tensor);
    if (key.kind == QV_KEY_BASE_COPY)
        return check_base_copy(r, &found, tensor);
    if (found.kind == QV_PLACE_NONE || (embedding_key && found.layer != QV_GLOBAL)) {
        add_misfit(r, tensor->name, found.reason ? found.reason : "not an embedding");
        return QV_OK;
    }
    return add_to_pair(r, &found, key.kind == QV_KEY_A || key.kind == QV_KEY_EMBEDDING_A, tensor);
}

/* --- Order ------------------------------------------------------------------------------------ */

static int compare(int64_t x, int64_t y)
{
    return (x > y) - (x < y);
}

static int by_place(const void *x, const void *y)
{
    const qv_lora_place *a = &(*(qv_lora_pair *const *)x)->place;
    const qv_lora_place *b = &(*(qv_lora_pair *const *)y)->place;
    int order = compare(a->layer, b->layer);
    order = order != 0 ? order : compare(a->target.proj, b->target.proj);
    order = order != 0 ? order : compare(a->target.first, b->target.first);
    return order != 0 ? order : compare(a->expert, b->expert);
}

/* Of one projection: the last pair of each expert so far, in the order of slices. Matrices without
 * experts are the expert 0 here. */
typedef struct {
    int64_t n_experts;
    const qv_lora_pair **last;
} coverage;

static qv_status cover(const qv_lora_reader *r, coverage *c, const qv_lora_pair *p)
{
    bool all = p->place.expert == QV_ALL_EXPERTS;
    int64_t first = all ? 0 : p->place.expert, end = all ? c->n_experts : first + 1;
    for (int64_t e = first; e < end; e++) {
        const qv_lora_pair *before = c->last[e];
        if (before != NULL &&
            before->place.target.first + before->place.target.n > p->place.target.first)
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s and %.200s change the same rows", r->where,
                           before->b->name, p->b->name);
        c->last[e] = p;
    }
    return QV_OK;
}

/* Pairs that change the same rows cannot both be meant. */
static qv_status check_overlaps(const qv_lora_reader *r)
{
    int64_t n = r->spec->layout->config->n_experts;
    coverage c = {.n_experts = n > 0 ? n : 1};
    size_t bytes = (size_t)c.n_experts * sizeof(qv_lora_pair *);
    c.last = malloc(bytes);
    qv_status status = c.last ? QV_OK : qv_fail(QV_ERR_NOMEM, "%s: no memory to check", r->where);
    for (size_t i = 0; i < r->n_pairs && status == QV_OK; i++) {
        const qv_lora_place *place = &r->pairs[i]->place;
        const qv_lora_place *before = i > 0 ? &r->pairs[i - 1]->place : NULL;
        if (before == NULL || before->layer != place->layer ||
            before->target.proj != place->target.proj)
            memset(c.last, 0, bytes);
        status = cover(r, &c, r->pairs[i]);
    }
    free(c.last);
    return status;
}

/* List the pairs in order. */
static qv_status list_pairs(qv_lora_reader *r)
{
    r->pairs = QV_ARENA_ARRAY(&r->adapter->arena, qv_lora_pair *, qv_map_count(r->by_key) + 1);
    if (r->pairs == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for a list of pairs", r->where);
    QV_MAP_EACH(r->by_key, entry)
    {
        qv_lora_pair *p = entry->value;
        if (p->a == NULL || p->b == NULL)
            return qv_fail(QV_ERR_FORMAT, "%s: %.200s has no lora_%c beside it", r->where,
                           (p->a ? p->a : p->b)->name, p->a ? 'B' : 'A');
        r->pairs[r->n_pairs++] = p;
    }
    QV_TRY(qv_lora_resolve_wrappers(r));
    qsort(r->pairs, r->n_pairs, sizeof *r->pairs, by_place);
    return check_overlaps(r);
}

qv_status qv_lora_gather_pairs(qv_lora_reader *r)
{
    for (size_t i = 0; i < qv_safetensors_count(r->st); i++)
        QV_TRY(place_tensor(r, qv_safetensors_at(r->st, i)));
    if (r->n_misfits > 0)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: %zu tensor%s no place in this model: %s%s",
                       r->where, r->n_misfits, r->n_misfits == 1 ? " has" : "s have", r->misfits,
                       r->n_misfits > 3 ? ", and more" : "");
    if (r->n_not_served > 0)
        fprintf(r->notes, "%zu tensors of parts that are not served are zero and were skipped\n",
                r->n_not_served);
    if (r->n_empty > 0)
        fprintf(r->notes, "%zu tensors without elements were skipped\n", r->n_empty);
    QV_TRY(list_pairs(r));
    return r->n_pairs > 0 ? QV_OK
                          : qv_fail(QV_ERR_FORMAT, "%s: no pair of lora_A and lora_B", r->where);
}

/* --- One pair for the embedding and the head -------------------------------------------------- */

static qv_lora_pair *find_vocabulary(const qv_lora_reader *r, qv_lora_place_kind kind)
{
    for (size_t i = 0; i < r->n_pairs && r->pairs[i]->place.layer == QV_GLOBAL; i++) {
        if (r->pairs[i]->place.kind == kind)
            return r->pairs[i];
    }
    return NULL;
}

/* Whether a view has the same numbers as another, transposed. */
static qv_status same_view(const qv_lora_view *x, const qv_lora_view *y, bool *same)
{
    qv_lora_view z = qv_lora_view_transpose(*y);
    *same = x->rows == z.rows && x->cols == z.cols;
    size_t n = (size_t)(x->rows * x->cols);
    float *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b);
    qv_status status =
        a && b ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory to compare %.200s", x->tensor->name);
    if (status == QV_OK && *same)
        status = qv_lora_view_f32(x, a);
    if (status == QV_OK && *same)
        status = qv_lora_view_f32(&z, b);
    if (status == QV_OK && *same)
        *same = memcmp(a, b, n * sizeof *a) == 0;
    free(a);
    free(b);
    return status;
}

/* Both pairs are in the file: they must say the same. */
static qv_status check_tied(const qv_lora_reader *r, const qv_lora_pair *x, const qv_lora_pair *y)
{
    bool same_a, same_b;
    QV_TRY(same_view(&x->a_view, &y->b_view, &same_a));
    QV_TRY(same_view(&x->b_view, &y->a_view, &same_b));
    return same_a && same_b && qv_f32_bits(x->scale) == qv_f32_bits(y->scale)
               ? QV_OK
               : qv_fail(QV_ERR_FORMAT,
                         "%s: ensure_weight_tying is true, but %.200s and %.200s are not the same "
                         "pair",
                         r->config_where, x->a->name, y->a->name);
}

/* The change of a matrix that is both, seen from the other side: B^T A^T. */
qv_status qv_lora_tie_vocabulary(qv_lora_reader *r)
{
    const qv_layout *layout = r->spec->layout;
    qv_lora_pair *embedding = find_vocabulary(r, QV_PLACE_EMBEDDING);
    qv_lora_pair *head = find_vocabulary(r, QV_PLACE_LINEAR);
    if (!r->config.weight_tying || (embedding == NULL && head == NULL))
        return QV_OK;
    if (!layout->config->tied_head) {
        fprintf(r->notes, "ensure_weight_tying changes nothing: the model's head is not tied\n");
        return QV_OK;
    }
    if (embedding != NULL && head != NULL)
        return check_tied(r, embedding, head);
    const qv_lora_pair *one = embedding != NULL ? embedding : head;
    qv_lora_pair *other = QV_ARENA_NEW(&r->adapter->arena, qv_lora_pair);
    if (other == NULL)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for a pair", r->where);
    *other = *one;
    const char *name = embedding != NULL ? "lm_head" : "embed_tokens";
    other->place = qv_lora_place_find(layout, name, strlen(name));
    other->a_view = qv_lora_view_transpose(one->b_view);
    other->b_view = qv_lora_view_transpose(one->a_view);
    r->pairs[r->n_pairs++] = other; /* the list has room for one more */
    qsort(r->pairs, r->n_pairs, sizeof *r->pairs, by_place);
    return QV_OK;
}
