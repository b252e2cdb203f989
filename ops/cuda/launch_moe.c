/* Routed experts: tensors, lists and sites to raw pointers. */
#include "kernels/kernels_moe.h"
#include "ops/cuda/launch_lora.h"

#include <stddef.h>

/* The structs of ops.h go to kernels as they are. */
_Static_assert(sizeof(qv_moe_run) == sizeof(qv_k_run) &&
                   offsetof(qv_moe_run, slot) == offsetof(qv_k_run, slot),
               "runs");
_Static_assert(sizeof(qv_moe_lora_slot) == sizeof(qv_k_moe_lora_slot) &&
                   offsetof(qv_moe_lora_slot, b_shared) == offsetof(qv_k_moe_lora_slot, b_shared),
               "slots");

static qv_k_router_args router_args(qv_backend *be, const qv_router *router, qv_tensor logits,
                                    qv_tensor ids, qv_tensor weights)
{
    return (qv_k_router_args){.logits = logits.data,
                              .bias = router->bias.data,
                              .ids = ids.data,
                              .weights = weights.data,
                              .logits_stride = logits.stride[0],
                              .n_tokens = (int32_t)logits.shape[0],
                              .n_experts = (int32_t)logits.shape[1],
                              .top_k = router->top_k,
                              .n_groups = router->n_groups,
                              .topk_groups = router->topk_groups,
                              .scale = router->scale,
                              .sigmoid = router->kind == QV_ROUTER_SIGMOID,
                              .normalize = router->normalize,
                              .one_form = qv_cuda(be)->deterministic};
}

qv_status qv_cuda_router(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                         qv_tensor weights)
{
    qv_k_router_args args = router_args(be, router, logits, ids, weights);
    return qv_k_router(&args, qv_cuda(be)->stream);
}

static qv_k_list list_of(qv_backend *be, const qv_moe_list *list)
{
    return (qv_k_list){.n_experts = list->n_experts,
                       .first_expert = list->first_expert,
                       .top_k = list->top_k,
                       .n_tokens = list->n_tokens,
                       .n_segs = list->n_segs,
                       .seg_start = list->seg_start,
                       .seg_slot = list->seg_slot,
                       .expert_start = list->expert_start,
                       .pair = list->pair,
                       .place = list->place,
                       .n_runs = list->n_runs,
                       .next_item = list->next_item,
                       .runs = (qv_k_run *)list->runs,
                       .work = (int32_t *)list->work,
                       .one_form = qv_cuda(be)->deterministic};
}

qv_status qv_cuda_moe_route(qv_backend *be, qv_tensor ids, qv_moe_list *list)
{
    qv_k_list l = list_of(be, list);
    qv_cuda(be)->list_is_new = true;
    return qv_k_moe_route(ids.data, &l, qv_cuda(be)->stream);
}

/* A product whose x was there before the launch in front of it began. */
static qv_status product_beside(qv_cuda_backend *cuda, const qv_beside *beside)
{
    const qv_tensor none = {.data = NULL};
    qv_k_linear_args c = qv_cuda_linear_args(beside->w, beside->x, none, beside->y);
    if (c.n_out <= QV_K_FEW_ROWS || !qv_cuda_streams(cuda, &c) || !qv_k_stream_linear_can(&c, NULL))
        return qv_cuda_linear_f32(&cuda->base, beside->w, beside->x, none, beside->y);
    c.x_is_there = true;
    return qv_k_stream_linear(&c, NULL, cuda->n_sms, cuda->stream);
}

/* What comes from memory while one token's experts are chosen. The experts' own 50 MB pass through
 * the cache before the rest of it is read, and more than this it does not keep
 * (docs/performance.md). */
#define CHOICE_BYTES ((int64_t)16 << 20)

static int64_t bytes_of(const qv_weight *w)
{
    return w->n_out * w->n_in * (int64_t)qv_dtype_size(w->dtype);
}

static const void *call(const qv_weight *w, int64_t most, int64_t *bytes)
{
    int64_t all = bytes_of(w);
    *bytes = (all < most ? all : most) / 16 * 16;
    return qv_cuda_weight_of(w)->data;
}

/* The part of the next weight that there is time for; in front of it the product's own, which would
 * have to wait for all of that. */
static qv_k_ahead ahead_of(const qv_beside *beside)
{
    int64_t most = CHOICE_BYTES - (beside->w != NULL ? bytes_of(beside->w) : 0);
    qv_k_ahead ahead = {.bytes = {0}};
    if (beside->next == NULL || most <= 0)
        return ahead;
    if (beside->w != NULL)
        ahead.data[0] = call(beside->w, CHOICE_BYTES, &ahead.bytes[0]);
    ahead.data[1] = call(beside->next, most, &ahead.bytes[1]);
    return ahead;
}

qv_status qv_cuda_choose(qv_backend *be, const qv_router *router, qv_tensor logits, qv_tensor ids,
                         qv_tensor weights, qv_moe_list *list, const qv_beside *beside)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    qv_k_router_args args = router_args(be, router, logits, ids, weights);
    qv_k_list l = list_of(be, list);
    cuda->list_is_new = true;
    if (qv_k_choose_can(&args)) {
        QV_TRY(qv_k_choose(&args, &l, ahead_of(beside), cuda->stream));
    } else {
        QV_TRY(qv_k_router(&args, cuda->stream));
        QV_TRY(qv_k_moe_route(ids.data, &l, cuda->stream));
    }
    return beside->w != NULL ? product_beside(cuda, beside) : QV_OK;
}

static bool has_vectors(qv_tensor x)
{
    return x.shape[1] % 8 == 0 && x.stride[0] % 8 == 0 && (uintptr_t)x.data % 16 == 0;
}

bool qv_cuda_wants_pairs(qv_backend *be, const qv_moe_list *list, qv_tensor x, qv_tensor room)
{
    qv_k_list l = list_of(be, list);
    return has_vectors(x) && has_vectors(room) && qv_k_moe_wants_pairs(&l);
}

qv_status qv_cuda_moe_gather(qv_backend *be, const qv_moe_list *list, qv_tensor x, qv_tensor y)
{
    qv_k_list l = list_of(be, list);
    return qv_k_moe_gather(&l, x.data, x.stride[0], y.data, y.stride[0], x.shape[1],
                           qv_cuda(be)->stream);
}

static qv_k_moe_linear_args linear_args(const qv_weight *w, qv_tensor x, qv_moe_rows rows,
                                        qv_k_moe_act act, qv_tensor y)
{
    return (qv_k_moe_linear_args){.w = qv_cuda_weight_of(w)->data,
                                  .x = x.data,
                                  .y = y.data,
                                  .w_expert = w->n_out * w->n_in,
                                  .n_out = w->n_out,
                                  .n_in = w->n_in,
                                  .x_stride = x.stride[0],
                                  .y_stride = y.stride[0],
                                  .x_pairs = rows == QV_MOE_PAIRS,
                                  .act = act};
}

static qv_status run_linear(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                            qv_tensor x, qv_moe_rows rows, qv_k_moe_act act, qv_tensor y)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    qv_k_list l = list_of(be, list);
    if (w->dtype != QV_BF16)
        return qv_fail(QV_ERR_UNSUPPORTED, "moe_linear: on CUDA experts are BF16, not %s",
                       qv_dtype_name(w->dtype));
    qv_k_moe_linear_args args = linear_args(w, x, rows, act, y);
    args.list_is_there = !cuda->list_is_new;
    cuda->list_is_new = false; /* a launch the ordinary way: it waits for the list */
    return qv_k_moe_linear(&l, &args, cuda->stream);
}

qv_status qv_cuda_moe_linear(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                             qv_tensor x, qv_moe_rows rows, qv_tensor y)
{
    return run_linear(be, w, list, x, rows, QV_K_MOE_PLAIN, y);
}

/* At once, but for SwiGLU whose halves do not end where vectors do. */
qv_status qv_cuda_moe_linear_act(qv_backend *be, const qv_weight *w, const qv_moe_list *list,
                                 qv_tensor x, qv_moe_rows rows, qv_act act, qv_tensor wide,
                                 qv_tensor y)
{
    int64_t f = y.shape[1];
    if (act == QV_ACT_RELU2)
        return run_linear(be, w, list, x, rows, QV_K_MOE_RELU2, y);
    if (f % 8 == 0)
        return run_linear(be, w, list, x, rows, QV_K_MOE_SWIGLU, y);
    QV_TRY(qv_cuda_moe_linear(be, w, list, x, rows, wide));
    return qv_cuda_swiglu(be, qv_tensor_cols(wide, 0, f), qv_tensor_cols(wide, f, f), y);
}

/* One token's experts, chosen where they are used. */
typedef struct {
    qv_k_router_args router;
    qv_k_list list;
    qv_k_moe_linear_args in, out;
} one_token;

static qv_k_moe_one_args one_args(qv_backend *be, qv_k_router_args router, const qv_moe_list *list,
                                  const qv_experts *e, one_token *room)
{
    qv_k_moe_act act = e->act == QV_ACT_SWIGLU ? QV_K_MOE_SWIGLU : QV_K_MOE_RELU2;
    room->router = router;
    room->list = list_of(be, list);
    room->in = linear_args(e->in, e->x, QV_MOE_TOKENS, act, e->inner);
    room->out = linear_args(e->out, e->inner, QV_MOE_PAIRS, QV_K_MOE_PLAIN, e->y);
    return (qv_k_moe_one_args){
        .router = &room->router, .list = &room->list, .in = &room->in, .out = &room->out};
}

bool qv_cuda_takes_experts(qv_backend *be, const qv_router *router, qv_tensor logits,
                           const qv_moe_list *list, const qv_experts *experts)
{
    const qv_tensor none = {.data = NULL};
    one_token room;
    qv_k_moe_one_args args =
        one_args(be, router_args(be, router, logits, none, none), list, experts, &room);
    return experts->in->dtype == QV_BF16 && experts->out->dtype == QV_BF16 &&
           experts->act != QV_ACT_NONE && qv_k_moe_one_can(&args);
}

/* What stands beside is summed in an order of its own there, or else comes last: by then what it
 * reads is there. */
qv_status qv_cuda_choose_experts(qv_backend *be, const qv_router *router, qv_tensor logits,
                                 qv_tensor ids, qv_tensor weights, qv_moe_list *list,
                                 const qv_beside *beside, const qv_experts *experts)
{
    qv_cuda_backend *cuda = qv_cuda(be);
    const qv_tensor none = {.data = NULL};
    one_token room;
    qv_k_linear_args c;
    qv_k_moe_one_args args =
        one_args(be, router_args(be, router, logits, ids, weights), list, experts, &room);
    args.ahead = ahead_of(beside);
    if (beside->w != NULL && !cuda->deterministic) {
        c = qv_cuda_linear_args(beside->w, beside->x, none, beside->y);
        args.beside = qv_k_moe_one_can_beside(&c) ? &c : NULL;
    }
    QV_TRY(qv_k_moe_one(&args, cuda->stream));
    cuda->list_is_new = false;
    return beside->w != NULL && args.beside == NULL ? product_beside(cuda, beside) : QV_OK;
}

static qv_status site_of(const char *op, const qv_moe_lora_site *site, qv_k_moe_lora_site *out)
{
    *out = (qv_k_moe_lora_site){.slots = (const qv_k_moe_lora_slot *)site->slots,
                                .n_in = site->n_in,
                                .n_out = site->n_out,
                                .max_rank = site->max_rank};
    QV_TRY(qv_cuda_lora_is_bf16(op, site->dtype));
    return qv_cuda_slices(op, site->n_slices, site->slice_start, &out->ranges);
}

qv_status qv_cuda_moe_lora(qv_backend *be, const qv_moe_lora_site *site, const qv_moe_list *list,
                           qv_tensor x, qv_moe_rows rows, qv_tensor scratch, qv_tensor y)
{
    qv_k_list l = list_of(be, list);
    qv_k_moe_lora_site s;
    QV_TRY(site_of("moe_lora", site, &s));
    return qv_k_moe_lora(&l, &s, x.data, x.stride[0], rows == QV_MOE_PAIRS, scratch.data, y.data,
                         y.stride[0], qv_cuda(be)->stream);
}

static qv_status combine(qv_backend *be, const qv_moe_list *list, qv_tensor weights, qv_tensor o,
                         const qv_moe_lora_site *site, qv_tensor scratch,
                         const qv_k_shared_rows *shared, qv_tensor y)
{
    qv_k_list l = list_of(be, list);
    qv_k_moe_lora_site s;
    if (site)
        QV_TRY(site_of("moe_combine", site, &s));
    return qv_k_moe_combine(&l, weights.data, o.data, o.stride[0], site ? &s : NULL, scratch.data,
                            shared, y.data, y.dtype == QV_F32, y.stride[0], y.shape[1],
                            qv_cuda(be)->stream);
}

qv_status qv_cuda_moe_combine(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                              qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                              qv_tensor y)
{
    return combine(be, list, weights, o, site, scratch, NULL, y);
}

qv_status qv_cuda_moe_combine_f32(qv_backend *be, const qv_moe_list *list, qv_tensor weights,
                                  qv_tensor o, const qv_moe_lora_site *site, qv_tensor scratch,
                                  qv_tensor shared, qv_tensor gate, qv_tensor y)
{
    const qv_k_shared_rows more = {.data = shared.data,
                                   .gate = gate.data,
                                   .stride = shared.stride[0],
                                   .gate_stride = gate.stride[0]};
    return combine(be, list, weights, o, site, scratch, &more, y);
}

qv_status qv_cuda_combine_add_rms_norm(qv_backend *be, const qv_moe_sum *sum, qv_tensor residual,
                                       qv_tensor delta, qv_tensor w, float eps, bool plus_one,
                                       qv_tensor y, qv_tensor rest)
{
    qv_k_list l = list_of(be, sum->list);
    qv_k_moe_lora_site s;
    if (sum->site)
        QV_TRY(site_of("moe_combine", sum->site, &s));
    const qv_k_shared_rows more = {.data = sum->shared.data,
                                   .gate = sum->gate.data,
                                   .stride = sum->shared.stride[0],
                                   .gate_stride = sum->gate.stride[0]};
    const qv_k_moe_sum_args args = {
        .list = &l,
        .weights = sum->weights.data,
        .o = sum->o.data,
        .o_stride = sum->o.stride[0],
        .site = sum->site ? &s : NULL,
        .scratch = sum->scratch.data,
        .shared = &more,
        .norm = qv_cuda_add_norm_args(residual, delta, w, eps, plus_one, y, rest),
    };
    return qv_k_moe_sum_add_norm(&args, qv_cuda(be)->stream);
}
