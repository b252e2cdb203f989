/* Sampling, from whole rows and from parts of the vocabulary: parameters of the rows through pinned
 * memory, the kernels, results back. Two samplings of whole rows may be under way, each with memory
 * of its own; what the later one and the next step need to know of the earlier one's choices they
 * read on the device.
 */
#include "ops/cuda/cuda.h"
#include "ops/philox.h"

#include <math.h>
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

/* What row of the sampling before chose the row's last token; -1: its id is known. */
static int32_t row_before(const qv_sample_row *row)
{
    int32_t last = row->tokens[row->n_tokens - 1];
    return last < 0 ? QV_ROW_OF_TOKEN(last) : -1;
}

/* Each distinct token that is here once, with how often it was generated; one that is not known
 * (never in a part: see qv_op_shortlist) comes last, for the device to fill in. `place` [n_vocab]
 * is all -1 between calls. Returns how many there are. */
static int32_t list_seen(const qv_sample_row *row, const columns *c, int32_t *place,
                         qv_k_sample_seen *seen)
{
    int32_t n = 0, n_known = row->n_tokens - (row_before(row) >= 0);
    for (int32_t i = 0; i < n_known; i++) {
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
    if (n_known < row->n_tokens)
        seen[n++] = (qv_k_sample_seen){.token = 0};
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
                                   .after = -1,
                                   .keep = keep_of(r, c->n_valid),
                                   .seen = n_seen,
                                   .banned = n_banned};
        if (r->target >= 0 || (c->short_only && out[i].keep < 0))
            continue;
        if (r->temperature > 0 && (r->top_k > 0 || r->top_p < 1.0f) && n_lists < MAX_LISTS)
            out[i].list = n_lists++;
        out[i].u = qv_philox_uniform(r->seed, r->stream, r->draw);
        if (has_penalties(r)) {
            out[i].after = row_before(r);
            n_seen += out[i].n_seen = list_seen(r, c, place, seen + n_seen);
        }
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

qv_status qv_cuda_sampling_require(qv_cuda_backend *cuda, qv_cuda_sampling *s, int64_t n_rows,
                                   size_t param_bytes)
{
    QV_TRY(qv_cuda_mirror_require(cuda, &s->params, param_bytes));
    return qv_cuda_mirror_require(cuda, &s->results, (size_t)n_rows * sizeof(qv_k_sample_result));
}

/* Whether a row counts a token that only the device knows, and whether that can be: *any. */
static qv_status check_before(const qv_sample_row *rows, int64_t n_rows, int64_t n_before,
                              bool *any)
{
    *any = false;
    for (int64_t i = 0; i < n_rows; i++) {
        int32_t row = has_penalties(&rows[i]) ? row_before(&rows[i]) : -1;
        *any = *any || row >= 0;
        if (row >= n_before)
            return qv_fail(QV_ERR_ARG,
                           "sample: the last token of row %lld is what row %d chose, of a sampling "
                           "of %lld rows",
                           (long long)i, row, (long long)n_before);
    }
    return QV_OK;
}

static qv_cuda_sampling *last_sampling(qv_cuda_backend *cuda)
{
    return &cuda->samplings[(cuda->n_begun + QV_MAX_SAMPLINGS - 1) % QV_MAX_SAMPLINGS];
}

qv_status qv_cuda_take_chosen(qv_cuda_backend *cuda, const int32_t *host, int32_t n,
                              int32_t *device)
{
    const qv_cuda_sampling *last = last_sampling(cuda);
    bool any = false;
    for (int32_t i = 0; i < n; i++) {
        any = any || host[i] < 0;
        if (host[i] < 0 && QV_ROW_OF_TOKEN(host[i]) >= last->n_rows)
            return qv_fail(QV_ERR_ARG,
                           "cuda: token %d is what row %d chose, of a sampling of %lld rows", i,
                           QV_ROW_OF_TOKEN(host[i]), (long long)last->n_rows);
    }
    return any ? qv_k_take_chosen(device, n, last->results.device, cuda->stream) : QV_OK;
}

/* --- Gaps --------------------------------------------------------------------------------- */

qv_status qv_cuda_mark_start(qv_cuda_backend *cuda)
{
    qv_cuda_step *mark = &cuda->steps[++cuda->n_steps % QV_CUDA_STEPS];
    if (!cuda->base.watching)
        return QV_OK;
    if (mark->start == NULL) {
        QV_CUDA_TRY(cudaEventCreate(&mark->start));
        QV_CUDA_TRY(cudaEventCreate(&mark->stop));
    }
    QV_CUDA_TRY(cudaEventRecord(mark->start, cuda->stream));
    return QV_OK;
}

static qv_status mark_stop(qv_cuda_backend *cuda)
{
    qv_cuda_step *mark = &cuda->steps[cuda->n_steps % QV_CUDA_STEPS];
    if (!cuda->base.watching || mark->stop == NULL)
        return QV_OK;
    QV_CUDA_TRY(cudaEventRecord(mark->stop, cuda->stream));
    mark->stopped = cuda->n_steps;
    return QV_OK;
}

/* The gap before a step that is done. */
static qv_status measure_gap(qv_cuda_backend *cuda, uint64_t step)
{
    const qv_cuda_step *before = &cuda->steps[(step - 1) % QV_CUDA_STEPS];
    const qv_cuda_step *mark = &cuda->steps[step % QV_CUDA_STEPS];
    float ms = NAN;
    if (step > 1 && mark->stopped == step && before->stopped == step - 1)
        QV_CUDA_TRY(cudaEventElapsedTime(&ms, before->stop, mark->start));
    cuda->base.gap = (double)ms * 1e-3;
    return QV_OK;
}

/* --- Begin and end ------------------------------------------------------------------------ */

/* The kernels of one sampling, its parameters being in pinned memory, and its results back. */
static qv_status enqueue(qv_cuda_backend *cuda, qv_cuda_sampling *s, const layout *l,
                         const qv_k_sample_args *args, bool settle)
{
    QV_CUDA_TRY(cudaMemcpyAsync(s->params.device, s->params.host, l->total, cudaMemcpyHostToDevice,
                                cuda->stream));
    if (settle)
        QV_TRY(qv_k_sample_settle(s->params.device, args->n_rows, args->seen,
                                  last_sampling(cuda)->results.device, cuda->stream));
    QV_TRY(qv_k_sample(args, cuda->stream));
    QV_TRY(mark_stop(cuda));
    QV_CUDA_TRY(cudaMemcpyAsync(s->results.host, s->results.device,
                                (size_t)args->n_rows * sizeof *args->results,
                                cudaMemcpyDeviceToHost, cuda->stream));
    QV_CUDA_TRY(cudaEventRecord(s->done, cuda->stream));
    return QV_OK;
}

static int32_t count_drawn(const qv_sample_row *rows, int64_t n_rows)
{
    int32_t n = 0;
    for (int64_t i = 0; i < n_rows; i++)
        n += rows[i].target < 0 && rows[i].temperature > 0;
    return n;
}

qv_status qv_cuda_sample_begin(qv_backend *be, qv_tensor logits, int32_t n_valid,
                               const qv_sample_row *rows)
{
    _Static_assert(QV_K_MAX_TOP == QV_MAX_TOP_LOGPROBS, "results have room for as many");
    _Static_assert(QV_K_SAMPLE_NOT_FINITE == (int)QV_SAMPLE_NOT_FINITE &&
                       QV_K_SAMPLE_ALL_BANNED == (int)QV_SAMPLE_ALL_BANNED,
                   "kernels and results mean the same");
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    int64_t n_rows = logits.shape[0], n_vocab = logits.shape[1];
    qv_cuda_sampling *s = &cuda->samplings[cuda->n_begun % QV_MAX_SAMPLINGS];
    bool settle;
    if (n_vocab > cuda->limits.n_vocab)
        return qv_fail(QV_ERR_LIMIT, "sample: rows of %lld logits, but %d are reserved",
                       (long long)n_vocab, cuda->limits.n_vocab);
    QV_TRY(check_before(rows, n_rows, last_sampling(cuda)->n_rows, &settle));
    layout l = lay_out(rows, n_rows);
    QV_TRY(qv_cuda_sampling_require(cuda, s, n_rows, l.total));
    const columns all = {.n = n_vocab, .n_valid = n_valid};
    int32_t n_lists = fill_rows(rows, n_rows, &all, cuda->seen_place, &l, s->params.host);
    char *params = s->params.device;
    qv_k_sample_args args = {.logits = logits.data,
                             .stride = logits.stride[0],
                             .n_rows = (int32_t)n_rows,
                             .n_vocab = (int32_t)n_vocab,
                             .n_valid = n_valid,
                             .rows = (const qv_k_sample_row *)(void *)params,
                             .seen = (qv_k_sample_seen *)(void *)(params + l.seen),
                             .banned = (const int32_t *)(void *)(params + l.banned),
                             .n_lists = n_lists,
                             .n_drawn = count_drawn(rows, n_rows),
                             .results = s->results.device};
    QV_TRY(qv_cuda_scratch_require(cuda, qv_k_sample_scratch(args.n_rows, args.n_vocab, n_lists),
                                   &args.scratch));
    if (n_rows > 0)
        QV_TRY(enqueue(cuda, s, &l, &args, settle));
    s->n_rows = n_rows;
    s->step = cuda->n_steps;
    cuda->n_begun++;
    return QV_OK;
}

qv_status qv_cuda_sample_end(qv_backend *be, qv_sample_result *results)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    qv_cuda_sampling *s = &cuda->samplings[cuda->n_ended++ % QV_MAX_SAMPLINGS];
    if (s->n_rows > 0)
        QV_TRY(qv_cuda_wait(cuda, s->done));
    if (cuda->base.watching)
        QV_TRY(measure_gap(cuda, s->step));
    const qv_k_sample_result *from = s->results.host;
    for (int64_t i = 0; i < s->n_rows; i++)
        take_result(&from[i], &results[i]);
    return qv_sample_check_results(results, s->n_rows);
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
    QV_TRY(mark_stop(cuda));
    QV_CUDA_TRY(cudaMemcpyAsync(cuda->result.host, cuda->result.device, result_bytes,
                                cudaMemcpyDeviceToHost, cuda->stream));
    QV_TRY(qv_cuda_wait(cuda, NULL));
    if (cuda->base.watching)
        QV_TRY(measure_gap(cuda, cuda->n_steps));
    const qv_k_sample_result *from = cuda->result.host;
    for (int64_t i = 0; i < n_rows; i++)
        if (params[i].keep >= 0)
            take_result(&from[i], &results[i]);
    return QV_OK;
}
