/* qv_op_sample: parameters of the rows through pinned memory, the kernels, results back. */
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

/* Each distinct token once, with how often it was generated. `place` [n_vocab] is all -1 between
 * calls. Returns how many there are. */
static int32_t list_seen(const qv_sample_row *row, int32_t *place, qv_k_sample_seen *seen)
{
    int32_t n = 0;
    for (int32_t i = 0; i < row->n_tokens; i++) {
        int32_t token = row->tokens[i];
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

/* Returns how many lists the rows share out. */
static int32_t fill_rows(const qv_sample_row *rows, int64_t n_rows, int32_t *place, const layout *l,
                         char *block)
{
    qv_k_sample_row *out = (qv_k_sample_row *)(void *)block;
    qv_k_sample_seen *seen = (qv_k_sample_seen *)(void *)(block + l->seen);
    int32_t *banned = (int32_t *)(void *)(block + l->banned), n_seen = 0, n_banned = 0, n_lists = 0;
    for (int64_t i = 0; i < n_rows; i++) {
        const qv_sample_row *r = &rows[i];
        out[i] = (qv_k_sample_row){.target = r->target,
                                   .top_k = r->top_k,
                                   .n_top = r->n_top,
                                   .temperature = r->temperature,
                                   .top_p = r->top_p,
                                   .min_p = r->min_p,
                                   .presence_penalty = r->presence_penalty,
                                   .frequency_penalty = r->frequency_penalty,
                                   .repetition_penalty = r->repetition_penalty,
                                   .list = -1,
                                   .seen = n_seen,
                                   .banned = n_banned};
        if (r->target >= 0)
            continue;
        if (r->temperature > 0 && (r->top_k > 0 || r->top_p < 1.0f) && n_lists < MAX_LISTS)
            out[i].list = n_lists++;
        out[i].u = qv_philox_uniform(r->seed, r->stream, r->draw);
        if (has_penalties(r))
            n_seen += out[i].n_seen = list_seen(r, place, seen + n_seen);
        memcpy(banned + n_banned, r->banned, (size_t)r->n_banned * sizeof *banned);
        n_banned += out[i].n_banned = r->n_banned;
    }
    return n_lists;
}

static void take_results(const qv_k_sample_result *from, int64_t n_rows, qv_sample_result *results)
{
    for (int64_t i = 0; i < n_rows; i++) {
        results[i].token = from[i].token;
        results[i].logprob = from[i].logprob;
        results[i].n_top = from[i].n_top;
        memcpy(results[i].top_token, from[i].top_token, (size_t)from[i].n_top * sizeof(int32_t));
        memcpy(results[i].top_logprob, from[i].top_logprob, (size_t)from[i].n_top * sizeof(float));
    }
}

static qv_status check_results(const qv_sample_result *results, int64_t n_rows)
{
    for (int64_t i = 0; i < n_rows; i++) {
        if (results[i].token == QV_K_SAMPLE_NOT_FINITE)
            return qv_fail(QV_ERR_INTERNAL, "sample: row %lld has logits that are not finite",
                           (long long)i);
        if (results[i].token == QV_K_SAMPLE_ALL_BANNED)
            return qv_fail(QV_ERR_ARG, "sample: row %lld has every token banned", (long long)i);
    }
    return QV_OK;
}

qv_status qv_cuda_sample(qv_backend *be, qv_tensor logits, int32_t n_valid,
                         const qv_sample_row *rows, qv_sample_result *results)
{
    _Static_assert(QV_K_MAX_TOP == QV_MAX_TOP_LOGPROBS, "results have room for as many");
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
    int32_t n_lists = fill_rows(rows, n_rows, cuda->seen_place, &l, cuda->sample.host);
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
    take_results(cuda->result.host, n_rows, results);
    return check_results(results, n_rows);
}
