/* The CUDA backend's object: device, streams, what is reserved. */
#include "ops/cuda/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- Reserve ------------------------------------------------------------------------------ */

static qv_status cuda_reserve(qv_backend *be, const qv_backend_limits *limits)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    qv_backend_limits *have = &cuda->limits;
#define GROW(field)                                                                                \
    if (limits->field > have->field)                                                               \
    have->field = limits->field
    GROW(max_tokens);
    GROW(max_logits);
    if (limits->n_vocab > have->n_vocab) {
        size_t n = (size_t)limits->n_vocab;
        int32_t *place = realloc(cuda->seen_place, n * sizeof *place);
        if (place == NULL)
            return qv_fail(QV_ERR_NOMEM, "cuda: no memory for marks of %zu tokens", n);
        memset(place, 0xFF, n * sizeof *place);
        cuda->seen_place = place;
        have->n_vocab = limits->n_vocab;
    }
#undef GROW
    void *scratch;
    /* All chunks of 8192 tokens of 32 heads of a recurrent layer at once. */
    QV_TRY(qv_cuda_scratch_require(cuda, (size_t)80 << 20, &scratch));
    for (int i = 0; i < QV_MAX_SAMPLINGS; i++) /* with some tokens to penalise each */
        QV_TRY(qv_cuda_sampling_require(cuda, &cuda->samplings[i], have->max_logits,
                                        (size_t)have->max_logits * 1024));
    /* What a batch of this size needs, with pages for 4 Ki tokens of a page of 16 each. */
    return qv_cuda_mirror_require(cuda, &cuda->batch, (size_t)have->max_tokens * 12 + (1 << 20));
}

/* --- Open and close ----------------------------------------------------------------------- */

static void cuda_close(qv_backend *be)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    (void)cudaSetDevice(cuda->device);
    if (be->comm != NULL)
        qv_cuda_leave(be);
    if (cuda->stream != NULL)
        (void)cudaStreamSynchronize(cuda->stream);
    qv_cuda_plans_free(cuda->plans);
    qv_cuda_marks_free(cuda);
    (void)cudaFree(cuda->counters);
    if (cuda->blas != NULL)
        (void)cublasLtDestroy(cuda->blas);
    (void)cudaFree(cuda->blas_workspace);
    (void)cudaFree(cuda->scratch);
    for (int i = 0; i < cuda->n_retired; i++)
        (void)cudaFree(cuda->retired[i]);
    qv_cuda_mirror_deinit(&cuda->batch);
    qv_cuda_mirror_deinit(&cuda->sample);
    qv_cuda_mirror_deinit(&cuda->merge);
    qv_cuda_mirror_deinit(&cuda->result);
    for (int i = 0; i < QV_MAX_SAMPLINGS; i++) {
        qv_cuda_mirror_deinit(&cuda->samplings[i].params);
        qv_cuda_mirror_deinit(&cuda->samplings[i].results);
        if (cuda->samplings[i].done != NULL)
            (void)cudaEventDestroy(cuda->samplings[i].done);
    }
    for (int i = 0; i < QV_CUDA_STEPS; i++) {
        if (cuda->steps[i].start != NULL)
            (void)cudaEventDestroy(cuda->steps[i].start);
        if (cuda->steps[i].stop != NULL)
            (void)cudaEventDestroy(cuda->steps[i].stop);
    }
    if (cuda->batch_sent != NULL)
        (void)cudaEventDestroy(cuda->batch_sent);
    for (int i = 0; i < QV_CUDA_LANES; i++) {
        (void)cudaFreeHost(cuda->lanes[i].host);
        (void)cudaFree(cuda->lanes[i].device);
        for (int half = 0; half < 2; half++)
            if (cuda->lanes[i].free[half] != NULL)
                (void)cudaEventDestroy(cuda->lanes[i].free[half]);
        if (cuda->lanes[i].ready != NULL)
            (void)cudaEventDestroy(cuda->lanes[i].ready);
        if (cuda->lanes[i].stream != NULL)
            (void)cudaStreamDestroy(cuda->lanes[i].stream);
    }
    if (cuda->stream != NULL)
        (void)cudaStreamDestroy(cuda->stream);
    free(cuda->seen_place);
    pthread_cond_destroy(&cuda->lane_free);
    pthread_mutex_destroy(&cuda->lock);
    free(cuda);
}

static qv_status open_device(qv_cuda_backend *cuda)
{
    int n = 0;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess || n == 0) {
        (void)cudaGetLastError();
        return qv_fail(QV_ERR_DEVICE, "cuda: this machine has no device that can be used: %s",
                       error == cudaSuccess ? "there is none" : cudaGetErrorString(error));
    }
    if (cuda->device < 0 || cuda->device >= n)
        return qv_fail(QV_ERR_ARG, "cuda: device %d of %d", cuda->device, n);
    QV_CUDA_TRY(cudaSetDevice(cuda->device));
    struct cudaDeviceProp prop;
    QV_CUDA_TRY(cudaGetDeviceProperties(&prop, cuda->device));
    cuda->n_sms = prop.multiProcessorCount;
    cuda->major = prop.major;
    cuda->minor = prop.minor;
    if (prop.major < 8)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "cuda: device %d, %s, has compute capability %d.%d; 8.0 is the least",
                       cuda->device, prop.name, prop.major, prop.minor);
    snprintf(cuda->base.description, sizeof cuda->base.description,
             "cuda %d, %.64s, %d SMs, %.0f GiB, bf16", cuda->device, prop.name, cuda->n_sms,
             (double)prop.totalGlobalMem / (1 << 30));
    return QV_OK;
}

static qv_status open_parts(qv_cuda_backend *cuda)
{
    QV_TRY(open_device(cuda));
    QV_CUDA_TRY(cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
    QV_CUDA_TRY(cudaEventCreateWithFlags(&cuda->batch_sent, cudaEventDisableTiming));
    for (int i = 0; i < QV_MAX_SAMPLINGS; i++)
        QV_CUDA_TRY(cudaEventCreateWithFlags(&cuda->samplings[i].done, cudaEventDisableTiming));
    for (int i = 0; i < QV_CUDA_LANES; i++) {
        QV_CUDA_TRY(cudaStreamCreateWithFlags(&cuda->lanes[i].stream, cudaStreamNonBlocking));
        QV_CUDA_TRY(cudaEventCreateWithFlags(&cuda->lanes[i].ready, cudaEventDisableTiming));
        for (int half = 0; half < 2; half++)
            QV_CUDA_TRY(
                cudaEventCreateWithFlags(&cuda->lanes[i].free[half], cudaEventDisableTiming));
    }
    cublasStatus_t status = cublasLtCreate(&cuda->blas);
    if (status != CUBLAS_STATUS_SUCCESS)
        return qv_fail(QV_ERR_DEVICE, "cuda: cuBLASLt does not start: %s",
                       cublasLtGetStatusString(status));
    QV_CUDA_TRY(cudaMalloc(&cuda->blas_workspace, QV_CUDA_BLAS_WORKSPACE));
    void *counters;
    QV_TRY(qv_cuda_alloc(&cuda->base, (QV_CUDA_COUNTERS + 1) * sizeof *cuda->counters, &counters));
    cuda->counters = counters;
    cuda->lora_arrivals = cuda->counters + QV_CUDA_COUNTERS;
    return QV_OK;
}

/* `name` is one of the three, or none, as qv_backend_open has seen to. */
static qv_cuda_sums read_sums(const char *name)
{
    if (name == NULL || *name == '\0')
        return QV_CUDA_SUMS_AUTO;
    if (strcmp(name, "nccl") == 0)
        return QV_CUDA_SUMS_NCCL;
    return strcmp(name, "direct") == 0 ? QV_CUDA_SUMS_DIRECT : QV_CUDA_SUMS_AUTO;
}

static qv_status cuda_open(const qv_backend_options *options, qv_backend **out)
{
    qv_cuda_backend *cuda = calloc(1, sizeof *cuda);
    if (cuda == NULL)
        return qv_fail(QV_ERR_NOMEM, "cuda: no memory");
    cuda->base.table = &qv_cuda_backend_table;
    cuda->base.ops = &qv_cuda_ops;
    cuda->device = options->device;
    cuda->deterministic = options->deterministic;
    cuda->sums = read_sums(options->all_reduce);
    pthread_mutex_init(&cuda->lock, NULL);
    pthread_cond_init(&cuda->lane_free, NULL);
    qv_status status = open_parts(cuda);
    if (status != QV_OK) {
        cuda_close(&cuda->base);
        return status;
    }
    *out = &cuda->base;
    return QV_OK;
}

const qv_backend_table qv_cuda_backend_table = {
    .name = "cuda",
    .activation_dtype = QV_BF16,
    .lora_dtype = QV_BF16,
    .kv_dtype = QV_BF16,
    .open = cuda_open,
    .close = cuda_close,
    .reserve = cuda_reserve,
    .alloc = qv_cuda_alloc,
    .free = qv_cuda_free,
    .free_memory = qv_cuda_free_memory,
    .upload = qv_cuda_upload,
    .download = qv_cuda_download,
    .zero = qv_cuda_zero,
    .upload_begin = qv_cuda_upload_begin,
    .upload_piece = qv_cuda_upload_piece,
    .upload_zero = qv_cuda_upload_zero,
    .upload_end = qv_cuda_upload_end,
    .copy = qv_cuda_copy,
    .sync = qv_cuda_sync,
    .put_batch = qv_cuda_put_batch,
    .fill = qv_cuda_fill,
    .weight_fill = qv_cuda_weight_fill,
    .record = qv_cuda_record,
    .recording_free = qv_cuda_recording_free,
    .replay = qv_cuda_replay,
    .connect = qv_cuda_connect,
    .leave = qv_cuda_leave,
    .all_reduce = qv_cuda_all_reduce,
    .gather_cols = qv_cuda_gather_cols,
    .sum_add_rms_norm = qv_cuda_sum_add_rms_norm,
    .norm_rope_kv_write = qv_cuda_norm_rope_kv_write,
    .gated_attention = qv_cuda_gated_attention,
    .takes_conv_gdn_norm = qv_cuda_takes_conv_gdn_norm,
    .conv_gdn_norm = qv_cuda_conv_gdn_norm,
    .takes_conv_ssd_norm = qv_cuda_takes_conv_ssd_norm,
    .conv_ssd_norm = qv_cuda_conv_ssd_norm,
    .moe_linear_act = qv_cuda_moe_linear_act,
    .wants_pairs = qv_cuda_wants_pairs,
    .moe_gather = qv_cuda_moe_gather,
    .takes_linear_add = qv_cuda_takes_linear_add,
    .takes_linear_lora_add = qv_cuda_takes_linear_lora_add,
    .linear_add = qv_cuda_linear_add,
    .linear_lora_add = qv_cuda_linear_lora_add,
    .takes_linears = qv_cuda_takes_linears,
    .linears = qv_cuda_linears,
    .takes_norm_linears = qv_cuda_takes_norm_linears,
    .norm_linears = qv_cuda_norm_linears,
    .takes_norm_gate = qv_cuda_takes_norm_gate,
    .norm_gate = qv_cuda_norm_gate,
    .choose = qv_cuda_choose,
    .takes_experts = qv_cuda_takes_experts,
    .choose_experts = qv_cuda_choose_experts,
    .combine_add_rms_norm = qv_cuda_combine_add_rms_norm,
    .mark = qv_cuda_mark,
    .between = qv_cuda_between,
    .hold = qv_cuda_hold,
    .linear_lora = qv_cuda_linear_lora,
    .weight_new = qv_cuda_weight_new,
    .weight_free = qv_cuda_weight_free,
    .weight_load = qv_cuda_weight_load,
    .weight_rows = qv_cuda_weight_rows,
};
