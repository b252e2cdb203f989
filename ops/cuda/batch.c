/* A step's batch on the device: all arrays of qv_batch in one pinned block and one copy. */
#include "ops/cuda/cuda.h"

#include <string.h>

/* The arrays of a batch: where they are, and how many numbers each has. */
typedef struct {
    const int32_t **array; /* in the batch that is handed out */
    size_t n;
} part;

#define N_PARTS 10

static void list_parts(qv_batch *b, part parts[N_PARTS])
{
    size_t n_tokens = (size_t)b->n_tokens, n_seqs = (size_t)b->n_seqs;
    size_t n_segs = (size_t)b->n_segs, n_logit_segs = (size_t)b->n_logit_segs;
    const part all[N_PARTS] = {
        {&b->token, n_tokens},
        {&b->pos, n_tokens},
        {&b->seq_start, n_seqs + 1},
        {&b->page_table, n_seqs * (size_t)b->page_stride},
        {&b->state_slot, n_seqs},
        {&b->seg_start, n_segs + 1},
        {&b->seg_slot, n_segs},
        {&b->logit_row, (size_t)b->n_logits},
        {&b->logit_seg_start, n_logit_segs + 1},
        {&b->logit_seg_slot, n_logit_segs},
    };
    memcpy(parts, all, sizeof all);
}

/* Each array on a boundary of 16 bytes. */
static size_t part_bytes(const part *p)
{
    return *p->array != NULL ? (p->n * sizeof(int32_t) + 15) / 16 * 16 : 0;
}

static void summarise(const qv_batch *host, qv_batch *out)
{
    out->max_seq_tokens = 1;
    out->max_context = 1;
    for (int32_t i = 0; i < host->n_seqs; i++) {
        int32_t n = host->seq_start[i + 1] - host->seq_start[i];
        int32_t context = n > 0 ? host->pos[host->seq_start[i + 1] - 1] + 1 : 0;
        out->max_seq_tokens = n > out->max_seq_tokens ? n : out->max_seq_tokens;
        out->max_context = context > out->max_context ? context : out->max_context;
    }
}

qv_status qv_cuda_put_batch(qv_backend *be, const qv_batch *host, qv_batch *out)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    qv_batch batch = *host;
    part parts[N_PARTS];
    list_parts(&batch, parts);
    size_t bytes = 0;
    for (int i = 0; i < N_PARTS; i++)
        bytes += part_bytes(&parts[i]);
    QV_TRY(qv_cuda_mirror_require(cuda, &cuda->batch, bytes));
    QV_CUDA_TRY(cudaEventSynchronize(cuda->batch_sent)); /* the copy of the step before */
    size_t at = 0;
    for (int i = 0; i < N_PARTS; i++) {
        size_t size = part_bytes(&parts[i]);
        if (size == 0)
            continue;
        memcpy((char *)cuda->batch.host + at, *parts[i].array, parts[i].n * sizeof(int32_t));
        *parts[i].array = (const int32_t *)((char *)cuda->batch.device + at);
        at += size;
    }
    QV_CUDA_TRY(cudaMemcpyAsync(cuda->batch.device, cuda->batch.host, bytes, cudaMemcpyHostToDevice,
                                cuda->stream));
    QV_CUDA_TRY(cudaEventRecord(cuda->batch_sent, cuda->stream));
    if (host->token != NULL)
        QV_TRY(qv_cuda_take_chosen(cuda, host->token, host->n_tokens, (int32_t *)batch.token));
    QV_TRY(qv_cuda_mark_start(cuda));
    if (batch.seq_start != NULL && batch.pos != NULL)
        summarise(host, &batch);
    *out = batch;
    return QV_OK;
}
