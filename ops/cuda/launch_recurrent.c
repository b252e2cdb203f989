/* Ops with a state: tensors to raw pointers and strides. */
#include "kernels/kernels_recurrent.h"
#include "ops/cuda/cuda.h"

static qv_k_steps steps_of(qv_backend *be, const qv_batch *batch)
{
    return (qv_k_steps){.n_tokens = batch->n_tokens,
                        .n_seqs = batch->n_seqs,
                        .max_seq_tokens = batch->max_seq_tokens,
                        .pos = batch->pos,
                        .seq_start = batch->seq_start,
                        .state_slot = batch->state_slot,
                        .one_form = qv_cuda(be)->deterministic};
}

/* [T, heads, d] */
static qv_k_heads heads_of(qv_tensor t)
{
    return (qv_k_heads){.data = t.data, .token = t.stride[0], .head = t.stride[1]};
}

/* [T, heads]: a number a head. */
static qv_k_heads numbers_of(qv_tensor t)
{
    return (qv_k_heads){.data = t.data, .token = t.stride[0], .head = 1};
}

static qv_k_conv1d_args conv_args(qv_tensor x, qv_tensor w, qv_tensor bias, qv_tensor state,
                                  qv_tensor y)
{
    return (qv_k_conv1d_args){.x = x.data,
                              .y = y.data,
                              .state = state.data,
                              .w = w.data,
                              .bias = bias.data,
                              .x_stride = x.stride[0],
                              .y_stride = y.stride[0],
                              .n_channels = x.shape[1],
                              .n_taps = (int32_t)w.shape[1]};
}

static qv_k_recurrent_args gdn_args(const qv_gdn_args *args)
{
    return (qv_k_recurrent_args){
        .q = heads_of(args->q),
        .k = heads_of(args->k),
        .v = heads_of(args->v),
        .o = heads_of(args->o),
        .a = numbers_of(args->a),
        .b = numbers_of(args->b),
        .a_log = args->a_log.data,
        .dt_bias = args->dt_bias.data,
        .state = args->state.data,
        .n_k_heads = (int32_t)args->q.shape[1],
        .n_v_heads = (int32_t)args->v.shape[1],
        .d_k = (int32_t)args->q.shape[2],
        .d_v = (int32_t)args->v.shape[2],
    };
}

static qv_k_recurrent_args ssd_args(const qv_ssd_args *args)
{
    return (qv_k_recurrent_args){
        .q = heads_of(args->c),
        .k = heads_of(args->b),
        .v = heads_of(args->x),
        .o = heads_of(args->y),
        .a = numbers_of(args->dt),
        .a_log = args->a_log.data,
        .dt_bias = args->dt_bias.data,
        .d_skip = args->d_skip.data,
        .dt_min = args->dt_min,
        .dt_max = args->dt_max,
        .state = args->state.data,
        .n_k_heads = (int32_t)args->b.shape[1],
        .n_v_heads = (int32_t)args->x.shape[1],
        .d_k = (int32_t)args->b.shape[2],
        .d_v = (int32_t)args->x.shape[2],
    };
}

qv_status qv_cuda_conv1d(qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                         qv_tensor bias, qv_tensor state, qv_tensor y)
{
    qv_k_steps steps = steps_of(be, batch);
    qv_k_conv1d_args args = conv_args(x, w, bias, state, y);
    return qv_k_conv1d(&steps, &args, qv_cuda(be)->stream);
}

/* Chunks take what scratch there is; it grows only to what one chunk of every head needs. */
static qv_status require_scratch(qv_cuda_backend *cuda, int32_t n_heads, void **out)
{
    return qv_cuda_scratch_require(cuda, qv_k_recurrent_scratch(1, 1, n_heads), out);
}

qv_status qv_cuda_gdn(qv_backend *be, const qv_batch *batch, const qv_gdn_args *args)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    qv_k_steps steps = steps_of(be, batch);
    qv_k_recurrent_args a = gdn_args(args);
    void *scratch;
    QV_TRY(require_scratch(cuda, a.n_v_heads, &scratch));
    return qv_k_gdn(&steps, &a, scratch, cuda->scratch_bytes, cuda->stream);
}

qv_status qv_cuda_ssd(qv_backend *be, const qv_batch *batch, const qv_ssd_args *args)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    qv_k_steps steps = steps_of(be, batch);
    qv_k_recurrent_args a = ssd_args(args);
    void *scratch;
    QV_TRY(require_scratch(cuda, a.n_v_heads, &scratch));
    return qv_k_ssd(&steps, &a, scratch, cuda->scratch_bytes, cuda->stream);
}

/* --- A layer between its products --------------------------------------------------------- */

static qv_k_mixer_args mixer_args(const qv_around *a, qv_k_recurrent_args layer)
{
    return (qv_k_mixer_args){.conv = conv_args(a->x, a->w, a->bias, a->state, a->mixed),
                             .layer = layer,
                             .z = heads_of(a->z),
                             .y = heads_of(a->groups),
                             .w = a->norm.data,
                             .eps = a->eps};
}

bool qv_cuda_takes_conv_gdn_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                 const qv_gdn_args *args)
{
    qv_k_steps steps = steps_of(be, batch);
    qv_k_mixer_args mixer = mixer_args(around, gdn_args(args));
    return qv_k_conv_gdn_norm_can(&steps, &mixer);
}

qv_status qv_cuda_conv_gdn_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                const qv_gdn_args *args)
{
    qv_k_steps steps = steps_of(be, batch);
    qv_k_mixer_args mixer = mixer_args(around, gdn_args(args));
    return qv_k_conv_gdn_norm(&steps, &mixer, qv_cuda(be)->stream);
}

bool qv_cuda_takes_conv_ssd_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                 const qv_ssd_args *args)
{
    qv_k_steps steps = steps_of(be, batch);
    qv_k_mixer_args mixer = mixer_args(around, ssd_args(args));
    return qv_k_conv_ssd_norm_can(&steps, &mixer);
}

qv_status qv_cuda_conv_ssd_norm(qv_backend *be, const qv_batch *batch, const qv_around *around,
                                const qv_ssd_args *args)
{
    qv_k_steps steps = steps_of(be, batch);
    qv_k_mixer_args mixer = mixer_args(around, ssd_args(args));
    return qv_k_conv_ssd_norm(&steps, &mixer, qv_cuda(be)->stream);
}
