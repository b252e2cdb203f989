/* Shortlists of a part of the vocabulary, and their merging into what sample.c does with the whole:
 * the same functions over the same numbers, so tokens and alternatives are the same bit for bit. */
#include "kernels/shortlist.h"
#include "common/clock.h"
#include "ops/cpu/sample_row.h"

#include <string.h>

static float as_float(int32_t word)
{
    return qv_f32_from_bits((uint32_t)word);
}

static int32_t as_word(float x)
{
    return (int32_t)qv_f32_bits(x);
}

/* --- One part ----------------------------------------------------------------------------- */

/* A row of a part, and what of the row's ids falls into it. */
typedef struct {
    const qv_sample_row *row;
    int64_t first; /* id of column 0 */
    int64_t n, n_valid;
    float *logit;
    qv_cpu_sample_scratch *s;
} part_row;

static bool is_here(const part_row *p, int32_t id)
{
    return id >= p->first && id < p->first + p->n;
}

/* As apply_penalties, for the tokens that are here. */
static void penalise_part(const part_row *p)
{
    const qv_sample_row *row = p->row;
    qv_cpu_sample_scratch *s = p->s;
    for (int32_t i = 0; i < row->n_tokens; i++)
        if (is_here(p, row->tokens[i]))
            s->mark[row->tokens[i] - p->first] |= MARK_SEEN;
    for (int32_t i = row->n_prompt; i < row->n_tokens; i++)
        if (is_here(p, row->tokens[i]))
            s->mark[row->tokens[i] - p->first]++;
    for (int32_t i = 0; i < row->n_tokens; i++) {
        int64_t token = row->tokens[i] - p->first;
        if (!is_here(p, row->tokens[i]) || s->mark[token] & MARK_APPLIED)
            continue;
        s->raw[token] = p->logit[token];
        p->logit[token] = penalise(p->logit[token], row, s->mark[token] & MARK_COUNT);
        s->mark[token] |= MARK_APPLIED;
    }
}

static void clear_part_marks(const part_row *p)
{
    for (int32_t i = 0; i < p->row->n_tokens; i++)
        if (is_here(p, p->row->tokens[i]))
            p->s->mark[p->row->tokens[i] - p->first] = 0;
}

/* Sort by id the few that were found by rank. Banned ones are dropped. Returns how many are left.
 */
static int32_t order_by_id(float *logit, int32_t *id, int32_t n)
{
    while (n > 0 && logit[n - 1] == -INFINITY)
        n--;
    for (int32_t i = 1; i < n; i++) {
        float x = logit[i];
        int32_t own = id[i], at = i;
        for (; at > 0 && id[at - 1] > own; at--) {
            id[at] = id[at - 1];
            logit[at] = logit[at - 1];
        }
        id[at] = own;
        logit[at] = x;
    }
    return n;
}

static void list_choices(const part_row *p, int32_t room, int32_t *list)
{
    float logit[QV_MAX_SHORTLIST];
    int32_t id[QV_MAX_SHORTLIST], k = p->row->temperature > 0 ? p->row->top_k : 1;
    bool penalties = has_penalties(p->row);
    if (penalties)
        penalise_part(p);
    for (int32_t i = 0; i < p->row->n_banned; i++)
        if (is_here(p, p->row->banned[i]))
            p->logit[p->row->banned[i] - p->first] = -INFINITY;
    int32_t n = order_by_id(logit, id, find_highest(p->logit, p->n_valid, k, logit, id));
    list[QV_SHORT_N] = n;
    for (int32_t i = 0; i < n; i++) {
        bool changed = p->s->mark[id[i]] != 0;
        list[QV_SHORT_LOGIT(room) + i] = as_word(logit[i]);
        list[QV_SHORT_ID(room) + i] = (int32_t)(p->first + id[i]);
        list[QV_SHORT_RAW(room) + i] = as_word(changed ? p->s->raw[id[i]] : logit[i]);
    }
    if (penalties)
        clear_part_marks(p);
}

static void list_part(const part_row *p, qv_shortlist_shape shape, int32_t *list)
{
    const qv_sample_row *row = p->row;
    bool finite;
    float max = scan(p->logit, p->n, &finite), top[QV_MAX_TOP_LOGPROBS];
    list[QV_SHORT_BAD] = !finite;
    if (!finite)
        return;
    double sum = sum_exp(p->logit, p->n, max, 1.0f, NULL, NULL);
    list[QV_SHORT_MAX] = as_word(max);
    list[QV_SHORT_SUM] = as_word((float)sum);
    list[QV_SHORT_SUM_REST] = as_word((float)(sum - (double)(float)sum));
    int32_t *top_id = list + QV_SHORT_TOP_ID(shape.k, shape.n_top);
    list[QV_SHORT_N_TOP] = find_highest(p->logit, p->n_valid, row->n_top, top, top_id);
    for (int32_t i = 0; i < list[QV_SHORT_N_TOP]; i++) {
        list[QV_SHORT_TOP(shape.k) + i] = as_word(top[i]);
        top_id[i] += (int32_t)p->first;
    }
    if (row->target < 0) {
        list_choices(p, shape.k, list);
    } else if (is_here(p, row->target)) {
        list[QV_SHORT_HAS_TARGET] = 1;
        list[QV_SHORT_TARGET] = as_word(p->logit[row->target - p->first]);
    }
}

typedef struct {
    qv_cpu_backend *cpu;
    qv_tensor part, lists;
    const qv_shortlist_part *where;
    int32_t n_parts;
    const qv_sample_row *rows;
    qv_sample_result *results;
} context;

static void list_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    const context *c = ctx;
    const qv_shortlist_part *where = c->where;
    int64_t n = c->part.shape[1], n_words = c->lists.shape[1];
    int64_t n_valid = where->n_valid - where->first;
    n_valid = n_valid < 0 ? 0 : n_valid > n ? n : n_valid;
    for (int64_t i = begin; i < end; i++) {
        int32_t *list = (int32_t *)c->lists.data + i * n_words;
        memset(list, 0, (size_t)n_words * sizeof *list);
        const part_row p = {.row = &c->rows[i],
                            .first = where->first,
                            .n = n,
                            .n_valid = n_valid,
                            .logit = qv_row2(c->part, i),
                            .s = &c->cpu->sample[thread]};
        if (qv_sample_row_is_short(p.row, where->n_valid))
            list_part(&p, where->shape, list);
    }
}

qv_status QV_ISA(qv_cpu_shortlist)(qv_backend *be, qv_tensor part, const qv_shortlist_part *where,
                                   const qv_sample_row *rows, qv_tensor lists)
{
    qv_cpu_backend *cpu = qv_cpu(be);
    if (part.shape[1] > cpu->n_vocab)
        return qv_fail(QV_ERR_LIMIT, "shortlist: rows of %lld logits, but %d are reserved",
                       (long long)part.shape[1], cpu->n_vocab);
    context c = {.cpu = cpu, .part = part, .lists = lists, .where = where, .rows = rows};
    qv_pool_run(cpu->pool, part.shape[0], part.shape[1], list_rows, &c);
    return QV_OK;
}

/* --- Merge -------------------------------------------------------------------------------- */

/* The lists of a row, one a part. */
typedef struct {
    const int32_t *list;
    int64_t n_words;
    int32_t n_parts;
    qv_shortlist_shape shape;
} row_lists;

static const int32_t *list_of(const row_lists *l, int32_t part)
{
    return l->list + part * l->n_words;
}

/* The logarithm of the sum of all exponentials; *finite whether all logits are. */
static double join_sums(const row_lists *l, bool *finite)
{
    float max = -INFINITY;
    double sum = 0;
    *finite = true;
    for (int32_t i = 0; i < l->n_parts; i++) {
        *finite = *finite && list_of(l, i)[QV_SHORT_BAD] == 0;
        max = fmaxf(max, as_float(list_of(l, i)[QV_SHORT_MAX]));
    }
    for (int32_t i = 0; i < l->n_parts && *finite; i++) {
        const int32_t *list = list_of(l, i);
        double own =
            (double)as_float(list[QV_SHORT_SUM]) + (double)as_float(list[QV_SHORT_SUM_REST]);
        sum += own * exp((double)as_float(list[QV_SHORT_MAX]) - (double)max);
    }
    return (double)max + log(sum);
}

/* Parts come in the order of ids and each is in order, so the first of the highest is next. */
static void merge_top(const row_lists *l, int32_t n, double log_sum, qv_sample_result *result)
{
    int32_t at[QV_MAX_RANKS] = {0};
    for (result->n_top = 0; result->n_top < n; result->n_top++) {
        int32_t best = -1;
        float highest = 0;
        for (int32_t i = 0; i < l->n_parts; i++) {
            const int32_t *list = list_of(l, i);
            if (at[i] == list[QV_SHORT_N_TOP])
                continue;
            float x = as_float(list[QV_SHORT_TOP(l->shape.k) + at[i]]);
            if (best < 0 || x > highest) {
                best = i;
                highest = x;
            }
        }
        if (best < 0)
            return;
        const int32_t *ids = list_of(l, best) + QV_SHORT_TOP_ID(l->shape.k, l->shape.n_top);
        result->top_token[result->n_top] = ids[at[best]++];
        result->top_logprob[result->n_top] = (float)((double)highest - log_sum);
    }
}

/* All choices in the order of ids into the scratch. Returns how many. */
static int64_t join_choices(const row_lists *l, qv_cpu_sample_scratch *s)
{
    int64_t n = 0;
    for (int32_t i = 0; i < l->n_parts; i++) {
        const int32_t *list = list_of(l, i);
        for (int32_t j = 0; j < list[QV_SHORT_N]; j++) {
            s->id[n] = list[QV_SHORT_ID(l->shape.k) + j];
            s->id_logit[n++] = as_float(list[QV_SHORT_LOGIT(l->shape.k) + j]);
        }
    }
    return n;
}

/* The logit, before penalties, of a token that is in one of the lists. */
static float raw_logit(const row_lists *l, int32_t token)
{
    for (int32_t i = 0; i < l->n_parts; i++) {
        const int32_t *list = list_of(l, i);
        for (int32_t j = 0; j < list[QV_SHORT_N]; j++)
            if (list[QV_SHORT_ID(l->shape.k) + j] == token)
                return as_float(list[QV_SHORT_RAW(l->shape.k) + j]);
    }
    return -INFINITY;
}

static int32_t choose_merged(const row_lists *l, const qv_sample_row *row, qv_cpu_sample_scratch *s)
{
    int64_t n = join_choices(l, s);
    if (n == 0)
        return QV_SAMPLE_ALL_BANNED;
    bool finite;
    float max = scan(s->id_logit, n, &finite);
    if (row->temperature == 0)
        return s->id[first_at_least(s->id_logit, n, max)];
    (void)sum_exp(s->id_logit, n, max, row->temperature, s->id_prob, NULL);
    double u = qv_philox_uniform(row->seed, row->stream, row->draw);
    return draw_candidates(row, n, true, 0, u, s);
}

static void merge_row(const row_lists *l, const qv_sample_row *row, qv_cpu_sample_scratch *s,
                      qv_sample_result *result)
{
    bool finite;
    double log_sum = join_sums(l, &finite);
    result->n_top = 0;
    result->token = QV_SAMPLE_NOT_FINITE;
    if (!finite)
        return;
    merge_top(l, row->n_top, log_sum, result);
    if (row->target < 0) {
        result->token = choose_merged(l, row, s);
        if (result->token >= 0)
            result->logprob = (float)((double)raw_logit(l, result->token) - log_sum);
        return;
    }
    result->token = row->target;
    for (int32_t i = 0; i < l->n_parts; i++)
        if (list_of(l, i)[QV_SHORT_HAS_TARGET])
            result->logprob = (float)((double)as_float(list_of(l, i)[QV_SHORT_TARGET]) - log_sum);
}

static void merge_rows(void *ctx, int64_t begin, int64_t end, int thread)
{
    const context *c = ctx;
    for (int64_t i = begin; i < end; i++) {
        const row_lists l = {.list = (const int32_t *)c->lists.data + i * c->lists.shape[1],
                             .n_words = c->lists.shape[1] / c->n_parts,
                             .n_parts = c->n_parts,
                             .shape = c->where->shape};
        if (qv_sample_row_is_short(&c->rows[i], c->where->n_valid))
            merge_row(&l, &c->rows[i], &c->cpu->sample[thread], &c->results[i]);
    }
}

qv_status QV_ISA(qv_cpu_merge_shortlists)(qv_backend *be, qv_tensor lists, int32_t n_parts,
                                          const qv_shortlist_part *where, const qv_sample_row *rows,
                                          qv_sample_result *results)
{
    qv_cpu_backend *cpu = qv_cpu(be);
    if (where->n_vocab > cpu->n_vocab || n_parts > QV_MAX_RANKS)
        return qv_fail(QV_ERR_LIMIT,
                       "merge_shortlists: %d parts of %lld logits, but %d are "
                       "reserved",
                       n_parts, (long long)where->n_vocab, cpu->n_vocab);
    context c = {.cpu = cpu,
                 .lists = lists,
                 .where = where,
                 .n_parts = n_parts,
                 .rows = rows,
                 .results = results};
    qv_pool_run(cpu->pool, lists.shape[0], lists.shape[1], merge_rows, &c);
    be->gap = qv_cpu_gap(cpu);
    cpu->sampled_ns = qv_now_ns();
    return QV_OK;
}
