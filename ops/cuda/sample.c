/* Sampling, from whole rows and from parts of the vocabulary: parameters of the rows through pinned
 * memory, the kernels, results back. */
#include "ops/cuda/cuda.h"
#include "ops/philox.h"

#include <stdlib.h>
#include <string.h>

static bool has_penalties(const qv_sample_row *row)
{
    return row->target < 0 && row->tokens != NULL && row->n_tokens > 0 &&
           (row->repetition_penalty != 1.0f || row->presence_penalty != 0.0f ||
            row->frequency_penalty != 0.0f);
}

/* The parts of one block of parameters. */
typedef struct {
    size_t seen, banned, total; /* offsets in bytes; the rows are at 0 */
} layout;

static layout lay_out(const qv_sample_row *rows, int64_t n_rows)
{
    size_t n_seen = 0, n_banned = 0;
    for (int64_t i = 0; i < n_rows; i++) {
        n_seen += has_penalties(&rows[i]) ? (size_t)rows[i].n_tokens : 0;
        n_banned += rows[i].target < 0 ? (size_t)rows[i].n_banned : 0;
    }
    layout l;
    l.seen = ((size_t)n_rows * sizeof(qv_k_sample_row) + 15) / 16 * 16;
    l.banned = l.seen + n_seen * sizeof(qv_k_sample_seen);
    l.total = l.banned + n_banned * sizeof(int32_t);
    return l;
}

/* The columns that the kernels see: all, or a part. */
typedef struct {
    int64_t first, n;
    int32_t n_valid; /* of the whole */
    bool short_only; /* rows that are not short are left out */
} columns;

/* The column of an id; negative or n and more: not here. */
static int64_t column_of(const columns *c, int32_t id)
{
    return id - c->first;
}

static bool is_here(const columns *c, int32_t id)
{
    return id >= c->first && id < c->first + c->n;
}

/* Each distinct token that is here once, with how often it was generated. `place` [n_vocab] is all
 * -1 between calls. Returns how many there are. */
static int32_t list_seen(const qv_sample_row *row, const columns *c, int32_t *place,
                         qv_k_sample_seen *seen)
{
    int32_t n = 0;
    for (int32_t i = 0; i < row->n_tokens; i++) {
        int32_t token = (int32_t)column_of(c, row->tokens[i]);
        if (!is_here(c, row->tokens[i]))
            continue;
        if (place[token] < 0) {
            place[token] = n;
            seen[n++] = (qv_k_sample_seen){.token = token};
        }
        seen[place[token]].count += i >= row->n_prompt;
    }
    for (int32_t i = 0; i < n; i++)
        place[seen[i].token] = -1;
    return n;
}

/* Most rows of a step that get a list of candidates; 128 KiB each. */
#define MAX_LISTS 512

/* What a row is to a shortlist: see qv_k_sample_row. */
static int32_t keep_of(const qv_sample_row *r, int32_t n_valid)
{
    if (!qv_sample_row_is_short(r, n_valid))
        return -1;
    return r->target >= 0 ? 0 : r->temperature > 0 ? r->top_k : 1;
}

/* Returns how many lists the rows share out. */
static int32_t fill_rows(const qv_sample_row *rows, int64_t n_rows, const columns *c,
                         int32_t *place, const layout *l, char *block)
{
    qv_k_sample_row *out = (qv_k_sample_row *)(void *)block;
    qv_k_sample_seen *seen = (qv_k_sample_seen *)(void *)(block + l->seen);
    int32_t *banned = (int32_t *)(void *)(block + l->banned), n_seen = 0, n_banned = 0, n_lists = 0;
    for (int64_t i = 0; i < n_rows; i++) {
        const qv_sample_row *r = &rows[i];
        bool elsewhere = r->target >= 0 && !is_here(c, r->target);
        out[i] = (qv_k_sample_row){.target = r->target < 0 ? r->target
                                             : elsewhere   ? -1
                                                           : (int32_t)column_of(c, r->target),
                                   .top_k = r->top_k,
                                   .n_top = r->n_top,
                                   .temperature = r->temperature,
                                   .top_p = r->top_p,
                                   .min_p = r->min_p,
                                   .presence_penalty = r->presence_penalty,
                                   .frequency_penalty = r->frequency_penalty,
                                   .repetition_penalty = r->repetition_penalty,
                                   .list = -1,
                                   .keep = keep_of(r, c->n_valid),
                                   .seen = n_seen,
                                   .banned = n_banned};
        if (r->target >= 0 || (c->short_only && out[i].keep < 0))
            continue;
        if (r->temperature > 0 && (r->top_k > 0 || r->top_p < 1.0f) && n_lists < MAX_LISTS)
            out[i].list = n_lists++;
        out[i].u = qv_philox_uniform(r->seed, r->stream, r->draw);
        if (has_penalties(r))
            n_seen += out[i].n_seen = list_seen(r, c, place, seen + n_seen);
        for (int32_t j = 0; j < r->n_banned; j++)
            if (is_here(c, r->banned[j]))
                banned[n_banned + out[i].n_banned++] = (int32_t)column_of(c, r->banned[j]);
        n_banned += out[i].n_banned;
    }
    return n_lists;
}

static void take_result(const qv_k_sample_result *from, qv_sample_result *to)
{
    to->token = from->token;
    to->logprob = from->logprob;
    to->n_top = from->n_top;
    memcpy(to->top_token, from->top_token, (size_t)from->n_top * sizeof(int32_t));
    memcpy(to->top_logprob, from->top_logprob, (size_t)from->n_top * sizeof(float));
}

qv_status qv_cuda_sample(qv_backend *be, qv_tensor logits, int32_t n_valid,
                         const qv_sample_row *rows, qv_sample_result *results)
{
    _Static_assert(QV_K_MAX_TOP == QV_MAX_TOP_LOGPROBS, "results have room for as many");
    _Static_assert(QV_K_SAMPLE_NOT_FINITE == (int)QV_SAMPLE_NOT_FINITE &&
                       QV_K_SAMPLE_ALL_BANNED == (int)QV_SAMPLE_ALL_BANNED,
                   "kernels and results mean the same");
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    int64_t n_rows = logits.shape[0], n_vocab = logits.shape[1];
    if (n_vocab > cuda->limits.n_vocab)
        return qv_fail(QV_ERR_LIMIT, "sample: rows of %lld logits, but %d are reserved",
                       (long long)n_vocab, cuda->limits.n_vocab);
    layout l = lay_out(rows, n_rows);
    size_t result_bytes = (size_t)n_rows * sizeof(qv_k_sample_result);
    QV_TRY(qv_cuda_mirror_require(cuda, &cuda->sample, l.total));
    QV_TRY(qv_cuda_mirror_require(cuda, &cuda->result, result_bytes));
    const columns all = {.n = n_vocab, .n_valid = n_valid};
    int32_t n_lists = fill_rows(rows, n_rows, &all, cuda->seen_place, &l, cuda->sample.host);
    char *params = cuda->sample.device;
    qv_k_sample_args args = {.logits = logits.data,
                             .stride = logits.stride[0],
                             .n_rows = (int32_t)n_rows,
                             .n_vocab = (int32_t)n_vocab,
                             .n_valid = n_valid,
                             .rows = (const qv_k_sample_row *)(void *)params,
                             .seen = (qv_k_sample_seen *)(void *)(params + l.seen),
                             .banned = (const int32_t *)(void *)(params + l.banned),
                             .n_lists = n_lists,
                             .results = cuda->result.device};
    QV_TRY(qv_cuda_scratch_require(cuda, qv_k_sample_scratch(args.n_rows, args.n_vocab, n_lists),
                                   &args.scratch));
    QV_CUDA_TRY(
        cudaMemcpyAsync(params, cuda->sample.host, l.total, cudaMemcpyHostToDevice, cuda->stream));
    QV_TRY(qv_k_sample(&args, cuda->stream));
    QV_CUDA_TRY(cudaMemcpyAsync(cuda->result.host, cuda->result.device, result_bytes,
                                cudaMemcpyDeviceToHost, cuda->stream));
    QV_TRY(qv_cuda_wait(cuda));
    const qv_k_sample_result *from = cuda->result.host;
    for (int64_t i = 0; i < n_rows; i++)
        take_result(&from[i], &results[i]);
    return qv_sample_check_results(results, n_rows);
}

/* --- Parts of the vocabulary -------------------------------------------------------------- */

qv_status qv_cuda_shortlist(qv_backend *be, qv_tensor part, const qv_shortlist_part *where,
                            const qv_sample_row *rows, qv_tensor lists)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    int64_t n_rows = part.shape[0], n = part.shape[1], n_valid = where->n_valid - where->first;
    if (n > cuda->limits.n_vocab)
        return qv_fail(QV_ERR_LIMIT, "shortlist: rows of %lld logits, but %d are reserved",
                       (long long)n, cuda->limits.n_vocab);
    n_valid = n_valid < 0 ? 0 : n_valid > n ? n : n_valid;
    layout l = lay_out(rows, n_rows);
    QV_TRY(qv_cuda_mirror_require(cuda, &cuda->sample, l.total));
    const columns here = {
        .first = where->first, .n = n, .n_valid = where->n_valid, .short_only = true};
    (void)fill_rows(rows, n_rows, &here, cuda->seen_place, &l, cuda->sample.host);
    char *params = cuda->sample.device;
    qv_k_shortlist_args args = {.part = {.logits = part.data,
                                         .stride = part.stride[0],
                                         .n_rows = (int32_t)n_rows,
                                         .n_vocab = (int32_t)n,
                                         .n_valid = (int32_t)n_valid,
                                         .rows = (const qv_k_sample_row *)(void *)params,
                                         .seen = (qv_k_sample_seen *)(void *)(params + l.seen),
                                         .banned = (const int32_t *)(void *)(params + l.banned)},
                                .first = where->first,
                                .k = where->shape.k,
                                .n_top = where->shape.n_top,
                                .lists = lists.data};
    QV_TRY(qv_cuda_scratch_require(
        cuda, qv_k_sample_scratch(args.part.n_rows, args.part.n_vocab, 0), &args.part.scratch));
    QV_CUDA_TRY(
        cudaMemcpyAsync(params, cuda->sample.host, l.total, cudaMemcpyHostToDevice, cuda->stream));
    return qv_k_shortlist(&args, cuda->stream);
}

qv_status qv_cuda_merge_shortlists(qv_backend *be, qv_tensor lists, int32_t n_parts,
                                   const qv_shortlist_part *where, const qv_sample_row *rows,
                                   qv_sample_result *results)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    int64_t n_rows = lists.shape[0];
    size_t row_bytes = (size_t)n_rows * sizeof(qv_k_sample_row);
    size_t result_bytes = (size_t)n_rows * sizeof(qv_k_sample_result);
    QV_TRY(qv_cuda_mirror_require(cuda, &cuda->merge, row_bytes));
    QV_TRY(qv_cuda_mirror_require(cuda, &cuda->result, result_bytes));
    qv_k_sample_row *params = cuda->merge.host;
    for (int64_t i = 0; i < n_rows; i++)
        params[i] =
            (qv_k_sample_row){.target = rows[i].target,
                              .top_k = rows[i].top_k,
                              .n_top = rows[i].n_top,
                              .temperature = rows[i].temperature,
                              .top_p = rows[i].top_p,
                              .min_p = rows[i].min_p,
                              .list = -1,
                              .keep = keep_of(&rows[i], where->n_valid),
                              .u = qv_philox_uniform(rows[i].seed, rows[i].stream, rows[i].draw)};
    qv_k_merge_args args = {.lists = lists.data,
                            .rows = cuda->merge.device,
                            .n_rows = (int32_t)n_rows,
                            .n_parts = n_parts,
                            .k = where->shape.k,
                            .n_top = where->shape.n_top,
                            .results = cuda->result.device};
    QV_TRY(qv_cuda_scratch_require(cuda, qv_k_merge_scratch(args.n_rows, n_parts, args.k),
                                   &args.scratch));
    QV_CUDA_TRY(cudaMemcpyAsync(cuda->merge.device, params, row_bytes, cudaMemcpyHostToDevice,
                                cuda->stream));
    QV_TRY(qv_k_merge_shortlists(&args, cuda->stream));
    QV_CUDA_TRY(cudaMemcpyAsync(cuda->result.host, cuda->result.device, result_bytes,
                                cudaMemcpyDeviceToHost, cuda->stream));
    QV_TRY(qv_cuda_wait(cuda));
    const qv_k_sample_result *from = cuda->result.host;
    for (int64_t i = 0; i < n_rows; i++)
        if (params[i].keep >= 0)
            take_result(&from[i], &results[i]);
    return QV_OK;
}
