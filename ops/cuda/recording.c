/* Recorded steps: a CUDA graph of a forward pass over a batch of fixed size, whose arrays stand at
 * fixed places. A replay writes the batch there, padded, in one copy and one of the page tables,
 * and launches the graph.
 */
#include "ops/cuda/cuda.h"

#include <stdlib.h>
#include <string.h>

struct qv_recording {
    qv_recording_shape shape;
    qv_batch batch;   /* as the recorded ops read it */
    int32_t *host;    /* pinned: the small arrays, then n_seqs rows of pages, as wide as needed */
    int32_t *device;  /* the small arrays, then [n_seqs, page_stride] */
    size_t n_small;   /* numbers of the small arrays */
    cudaEvent_t sent; /* host may be written again */
    cudaGraphExec_t exec;
};

/* Where the arrays are, in numbers from the start of either block. */
typedef struct {
    size_t token, pos, seq_start, state_slot, seg_start, seg_slot, logit_row, logit_seg_start,
        logit_seg_slot, n_small;
} places;

static places place_arrays(const qv_recording_shape *s)
{
    size_t at = 0, n = (size_t)s->n_seqs, n_segs = (size_t)s->n_segs;
    places p;
#define TAKE(field, count)                                                                         \
    p.field = at;                                                                                  \
    at += ((count) + 3) / 4 * 4
    TAKE(token, n);
    TAKE(pos, n);
    TAKE(seq_start, n + 1);
    TAKE(state_slot, n);
    TAKE(seg_start, n_segs + 1);
    TAKE(seg_slot, n_segs);
    TAKE(logit_row, n);
    TAKE(logit_seg_start, n_segs + 1);
    TAKE(logit_seg_slot, n_segs);
#undef TAKE
    p.n_small = at;
    return p;
}

static void point_batch(qv_recording *r)
{
    const qv_recording_shape *s = &r->shape;
    places p = place_arrays(s);
    r->n_small = p.n_small;
    r->batch = (qv_batch){.n_tokens = s->n_seqs,
                          .n_seqs = s->n_seqs,
                          .max_seq_tokens = 1,
                          .token = r->device + p.token,
                          .pos = r->device + p.pos,
                          .seq_start = r->device + p.seq_start,
                          .page_table = r->device + p.n_small,
                          .page_stride = s->page_stride,
                          .state_slot = r->device + p.state_slot,
                          .n_segs = s->n_segs,
                          .seg_start = r->device + p.seg_start,
                          .seg_slot = r->device + p.seg_slot,
                          .n_logits = s->n_seqs,
                          .logit_row = r->device + p.logit_row,
                          .n_logit_segs = s->n_segs,
                          .logit_seg_start = r->device + p.logit_seg_start,
                          .logit_seg_slot = r->device + p.logit_seg_slot};
}

/* n numbers of `from`, then `rest` up to `room`. */
static void put(int32_t *to, const int32_t *from, int32_t n, int32_t room, int32_t rest)
{
    memcpy(to, from, (size_t)n * sizeof *to);
    for (int32_t i = n; i < room; i++)
        to[i] = rest;
}

static void put_segments(int32_t *start, int32_t *slot, const int32_t *from_start,
                         const int32_t *from_slot, int32_t n, int32_t room)
{
    if (room == 0) {
        start[0] = 0;
        return;
    }
    put(start, from_start, n + 1, room + 1, from_start[n]);
    put(slot, from_slot, n, room, -1);
}

/* The batch with padding into the host block, and on its way. */
static qv_status send(qv_cuda_backend *cuda, qv_recording *r, const qv_batch *b)
{
    const qv_recording_shape *s = &r->shape;
    places p = place_arrays(s);
    int32_t *h = r->host, n = b->n_seqs, room = s->n_seqs;
    QV_CUDA_TRY(cudaEventSynchronize(r->sent));
    put(h + p.token, b->token, n, room, 0);
    put(h + p.pos, b->pos, n, room, 0);
    put(h + p.seq_start, b->seq_start, n + 1, room + 1, b->seq_start[n]);
    put(h + p.state_slot, b->state_slot, n, room, -1);
    put(h + p.logit_row, b->logit_row, n, room, 0);
    put_segments(h + p.seg_start, h + p.seg_slot, b->seg_start, b->seg_slot, b->n_segs, s->n_segs);
    put_segments(h + p.logit_seg_start, h + p.logit_seg_slot, b->logit_seg_start, b->logit_seg_slot,
                 b->n_logit_segs, s->n_segs);
    QV_CUDA_TRY(cudaMemcpyAsync(r->device, h, r->n_small * sizeof *h, cudaMemcpyHostToDevice,
                                cuda->stream));
    if (n > 0) {
        size_t width = (size_t)b->page_stride * sizeof *h;
        memcpy(h + r->n_small, b->page_table, (size_t)n * width);
        QV_CUDA_TRY(cudaMemcpy2DAsync(r->device + r->n_small, (size_t)s->page_stride * sizeof *h,
                                      h + r->n_small, width, width, (size_t)n,
                                      cudaMemcpyHostToDevice, cuda->stream));
    }
    QV_CUDA_TRY(cudaEventRecord(r->sent, cuda->stream));
    return QV_OK;
}

static qv_status send_padding(qv_cuda_backend *cuda, qv_recording *r)
{
    return send(cuda, r, &qv_empty_batch);
}

static qv_status capture(qv_cuda_backend *cuda, qv_recording *r, qv_record_fn *fn, void *ctx)
{
    cudaGraph_t graph = NULL;
    cuda->recording_now = true;
    cudaError_t error = cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal);
    qv_status status =
        error == cudaSuccess ? fn(ctx, &r->batch) : qv_cuda_fail(error, "cudaStreamBeginCapture");
    if (error == cudaSuccess) {
        error = cudaStreamEndCapture(cuda->stream, &graph);
        if (error != cudaSuccess && status == QV_OK)
            status = qv_cuda_fail(error, "cudaStreamEndCapture");
    }
    cuda->recording_now = false;
    if (status == QV_OK) {
        error = cudaGraphInstantiate(&r->exec, graph, 0);
        if (error != cudaSuccess)
            status = qv_cuda_fail(error, "cudaGraphInstantiate");
    }
    if (graph != NULL)
        (void)cudaGraphDestroy(graph);
    return status;
}

/* Ranks record together: while one waits on the device for another, that one must not be held up in
 * a call that waits for the device, as allocating and instantiating may. */
static qv_status wait_for_ranks(qv_cuda_backend *cuda)
{
    return cuda->base.comm != NULL ? qv_comm_barrier(cuda->base.comm) : QV_OK;
}

static qv_status record(qv_cuda_backend *cuda, qv_recording *r, qv_record_fn *fn, void *ctx)
{
    const qv_recording_shape *s = &r->shape;
    size_t n = place_arrays(s).n_small + (size_t)s->n_seqs * (size_t)s->page_stride;
    void *host, *device;
    QV_CUDA_TRY(cudaHostAlloc(&host, n * sizeof(int32_t), cudaHostAllocDefault));
    r->host = host;
    QV_TRY(qv_cuda_alloc(&cuda->base, n * sizeof(int32_t), &device));
    r->device = device;
    QV_CUDA_TRY(cudaEventCreateWithFlags(&r->sent, cudaEventDisableTiming));
    point_batch(r);
    QV_TRY(send_padding(cuda, r));
    QV_TRY(wait_for_ranks(cuda));
    QV_TRY(fn(ctx, &r->batch)); /* plans are made and scratch grows here */
    QV_TRY(qv_cuda_wait(cuda, NULL));
    QV_TRY(wait_for_ranks(cuda));
    return capture(cuda, r, fn, ctx);
}

void qv_cuda_recording_free(qv_backend *be, qv_recording *r)
{
    (void)cudaSetDevice(qv_cuda(be)->device);
    if (r->exec != NULL)
        (void)cudaGraphExecDestroy(r->exec);
    if (r->sent != NULL)
        (void)cudaEventDestroy(r->sent);
    (void)cudaFreeHost(r->host);
    (void)cudaFree(r->device);
    free(r);
}

qv_status qv_cuda_record(qv_backend *be, const qv_recording_shape *shape, qv_record_fn *fn,
                         void *ctx, qv_recording **out)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    QV_TRY(qv_cuda_use(cuda));
    qv_recording *r = calloc(1, sizeof *r);
    if (r == NULL)
        return qv_fail(QV_ERR_NOMEM, "cuda: no memory for a recorded step");
    r->shape = *shape;
    qv_status status = record(cuda, r, fn, ctx);
    if (status != QV_OK) {
        qv_cuda_recording_free(be, r);
        return status;
    }
    cuda->n_recordings++;
    *out = r;
    return QV_OK;
}

qv_status qv_cuda_replay(qv_backend *be, qv_recording *r, const qv_batch *host)
{
    const qv_recording_shape *s = &r->shape;
    QV_TRY(qv_cuda_use(qv_cuda(be)));
    if (host->n_seqs > s->n_seqs || host->n_tokens != host->n_seqs ||
        host->n_logits != host->n_seqs || host->page_stride > s->page_stride ||
        (s->n_segs > 0 && host->n_segs > s->n_segs))
        return qv_fail(QV_ERR_SHAPE,
                       "cuda: a step of %d tokens of %d sequences with %d pages does not fit what "
                       "was recorded for %d with %d",
                       host->n_tokens, host->n_seqs, host->page_stride, s->n_seqs, s->page_stride);
    QV_TRY(send(qv_cuda(be), r, host));
    QV_TRY(
        qv_cuda_take_chosen(qv_cuda(be), host->token, host->n_tokens, (int32_t *)r->batch.token));
    QV_TRY(qv_cuda_mark_start(qv_cuda(be)));
    QV_CUDA_TRY(cudaGraphLaunch(r->exec, qv_cuda(be)->stream));
    return qv_cuda_meet_ranks(qv_cuda(be));
}
