/* bench_experts: a routed layer of released models at few tokens, piece by piece and whole. Each
 * line has the bytes that cannot be avoided, the time these take at the rate of a large copy
 * measured in the same run, the time measured, both in microseconds, and the ratio of the two.
 *
 *   bench_experts [MODEL...]    35B Nano Super; all without arguments
 *
 * Times are medians over replays of a graph of many layers, so that neither launches nor the host
 * are in them; layers go round over copies, more than the L2 cache holds.
 */
#include "bench/gpu_bench.h"
#include "ops/cuda/cuda.h"

#include <stdio.h>

enum { ROUNDS = 24, COPIES = 4, TOKENS = 8 };

/* --- A layer ------------------------------------------------------------------------------ */

typedef struct {
    const char *name;
    int64_t d, shared_ffn, ffn, latent; /* latent 0: experts read d */
    int32_t n_experts, top_k;
    bool gated; /* SwiGLU and a gate of the shared expert; else squared ReLU and a sigmoid router */
} model;

static const model models[] = {
    {"35B", 2048, 512, 512, 0, 256, 8, true},
    {"Nano", 2688, 3712, 1856, 0, 128, 6, false},
    {"Super", 4096, 5376, 2688, 1024, 512, 22, false},
};

typedef struct {
    qv_weight *shared_in, *shared_out, *gate, *router, *latent, *up, *down;
} weights;

typedef struct {
    const model *m;
    qv_backend *be;
    weights w[COPIES];
    qv_router how;
    qv_moe_list list;
    void *list_memory;
    qv_tensor x, rest, wide, hidden, shared, gate, logits, latent, ids, chosen, pairs_wide, pairs,
        out, residual, delta, gain;
} layer;

static qv_tensor rows(qv_dtype dtype, int64_t n, int64_t d)
{
    return qv_tensor_2d(bench_made_up(dtype, n * d, 1), dtype, n, d);
}

static qv_weight *matrix(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in)
{
    static uint64_t seed = 1000;
    qv_weight *w;
    bench_pass(n_experts > 0 ? qv_weight_new_experts(be, n_experts, n_out, n_in, QV_BF16, &w)
                             : qv_weight_new(be, n_out, n_in, QV_BF16, &w));
    bench_pass(qv_weight_fill(be, w, 0.05f, ++seed));
    return w;
}

static void open_layer(layer *l, const model *m, int64_t n)
{
    int64_t in = m->latent > 0 ? m->latent : m->d, wide = m->gated ? 2 : 1;
    int64_t n_pairs = n * m->top_k;
    l->m = m;
    for (int i = 0; i < COPIES; i++)
        l->w[i] = (weights){
            .shared_in = matrix(l->be, 0, wide * m->shared_ffn, m->d),
            .shared_out = matrix(l->be, 0, m->d, m->shared_ffn),
            .gate = m->gated ? matrix(l->be, 0, 1, m->d) : NULL,
            .router = matrix(l->be, 0, m->n_experts, m->d),
            .latent = m->latent > 0 ? matrix(l->be, 0, m->latent, m->d) : NULL,
            .up = matrix(l->be, m->n_experts, wide * m->ffn, in),
            .down = matrix(l->be, m->n_experts, in, m->ffn),
        };
    l->how = (qv_router){.kind = m->gated ? QV_ROUTER_SOFTMAX : QV_ROUTER_SIGMOID,
                         .top_k = m->top_k,
                         .normalize = true,
                         .scale = 1,
                         .n_groups = 1,
                         .topk_groups = 1};
    l->list_memory = bench_alloc(qv_moe_list_bytes(m->n_experts, m->top_k, TOKENS));
    bench_pass(qv_moe_list_init(&l->list, m->n_experts, m->top_k, TOKENS, l->list_memory));
    l->x = rows(QV_BF16, n, m->d);
    l->rest = rows(QV_BF16, n, m->d);
    l->wide = rows(QV_BF16, n, wide * m->shared_ffn);
    l->hidden = rows(QV_BF16, n, m->shared_ffn);
    l->shared = rows(QV_F32, n, m->d);
    l->gate = rows(QV_BF16, n, 1);
    l->logits = rows(QV_F32, n, m->n_experts);
    l->latent = rows(QV_BF16, n, in);
    l->ids = rows(QV_I32, n, m->top_k);
    l->chosen = rows(QV_F32, n, m->top_k);
    l->pairs_wide = rows(QV_BF16, n_pairs, wide * m->ffn);
    l->pairs = rows(QV_BF16, n_pairs, m->ffn);
    l->out = rows(QV_BF16, n_pairs, in);
    l->residual = rows(QV_F32, n, m->d);
    l->delta = rows(QV_F32, n, m->d);
    l->gain = qv_tensor_1d(bench_made_up(QV_F32, m->d, 1), QV_F32, m->d);
}

static void close_layer(layer *l)
{
    qv_tensor *const all[] = {&l->x,          &l->rest,     &l->wide,   &l->hidden,
                              &l->shared,     &l->gate,     &l->logits, &l->latent,
                              &l->ids,        &l->chosen,   &l->pairs,  &l->out,
                              &l->pairs_wide, &l->residual, &l->delta,  &l->gain};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        bench_free(all[i]->data);
    bench_free(l->list_memory);
    for (int i = 0; i < COPIES; i++) {
        const weights *w = &l->w[i];
        qv_weight *const of[] = {w->shared_in, w->shared_out, w->gate, w->router,
                                 w->latent,    w->up,         w->down};
        for (size_t j = 0; j < sizeof of / sizeof *of; j++)
            qv_weight_free(l->be, of[j]);
    }
}

static void call_products(void *ctx, int round)
{
    layer *l = ctx;
    const weights *w = &l->w[round % COPIES];
    qv_linear_part parts[QV_MAX_LINEAR_PARTS] = {
        {.w = w->shared_in,
         .act = l->m->gated ? QV_ACT_SWIGLU : QV_ACT_RELU2,
         .wide = l->wide,
         .y = l->hidden},
        {.w = w->router, .f32 = true, .rest = l->rest, .y = l->logits}};
    int32_t n = 2;
    if (w->gate != NULL)
        parts[n++] = (qv_linear_part){.w = w->gate, .y = l->gate};
    if (w->latent != NULL)
        parts[n++] = (qv_linear_part){.w = w->latent, .y = l->latent};
    bench_pass(qv_op_linears(l->be, l->x, n, parts));
}

static void choose(layer *l, const qv_beside *beside)
{
    bench_pass(qv_op_choose(l->be, &l->how, l->logits, l->ids, l->chosen, 0, NULL, NULL, &l->list,
                            beside));
}

static void call_choose(void *ctx, int round)
{
    (void)round;
    choose(ctx, NULL);
}

static void call_sum(void *ctx, int round)
{
    layer *l = ctx;
    (void)round;
    const qv_moe_sum sum = {.list = &l->list,
                            .weights = l->chosen,
                            .o = l->out,
                            .shared = l->shared,
                            .gate = l->m->gated ? l->gate : (qv_tensor){.data = NULL}};
    if (l->m->latent > 0) { /* it has a product between the two */
        bench_pass(qv_op_moe_combine(l->be, &l->list, l->chosen, l->out, NULL,
                                     (qv_tensor){.data = NULL}, l->latent));
        bench_pass(
            qv_op_add_rms_norm(l->be, l->residual, l->delta, l->gain, 1e-6f, false, l->x, l->rest));
        return;
    }
    bench_pass(qv_op_combine_add_rms_norm(l->be, &sum, l->residual, l->delta, l->gain, 1e-6f, false,
                                          l->x, l->rest));
}

static void call_layer(void *ctx, int round)
{
    layer *l = ctx;
    const weights *w = &l->w[round % COPIES];
    qv_act act = l->m->gated ? QV_ACT_SWIGLU : QV_ACT_RELU2;
    call_products(l, round);
    choose(l, &(qv_beside){.w = w->shared_out, .x = l->hidden, .y = l->shared});
    bench_pass(qv_op_moe_linear_act(l->be, w->up, &l->list, l->m->latent > 0 ? l->latent : l->x,
                                    QV_MOE_TOKENS, act, l->pairs_wide, l->pairs));
    bench_pass(qv_op_moe_linear(l->be, w->down, &l->list, l->pairs, QV_MOE_PAIRS, l->out));
    call_sum(l, round);
}

/* --- Tables ------------------------------------------------------------------------------- */

enum { PRODUCTS, CHOOSE, SUM, LAYER, N_PIECES };

static const struct {
    const char *name;
    bench_call *call;
} pieces[N_PIECES] = {{"products of the input", call_products},
                      {"router and list", call_choose},
                      {"sum and norm", call_sum},
                      {"layer", call_layer}};

/* Bytes of a piece, weights counted once; experts that tokens share are not known here, so that a
 * layer counts those of one token. */
static double bytes_of(const model *m, int piece, int64_t n)
{
    double in = m->latent > 0 ? (double)m->latent : (double)m->d, wide = m->gated ? 2 : 1;
    double d = (double)m->d, t = (double)n, k = m->top_k;
    double first =
        2 * d *
        (wide * (double)m->shared_ffn + m->n_experts + (m->gated ? 1 : 0) + (double)m->latent);
    double sum = t * (k * in * 2 + d * 20);
    switch (piece) {
    case PRODUCTS:
        return first;
    case CHOOSE:
        return t * (m->n_experts * 4.0 + k * 16);
    case SUM:
        return sum;
    default:
        return first + 2 * d * (double)m->shared_ffn + sum +
               2 * k * in * (double)m->ffn * (wide + 1);
    }
}

static void run_model(const model *m, int64_t n, const bench_rates *rates)
{
    layer l = {.be = NULL};
    bench_pass(qv_backend_open(&(qv_backend_options){.name = "cuda"}, &l.be));
    open_layer(&l, m, n);
    call_layer(&l, 0);
    for (int i = 0; i < N_PIECES; i++) {
        double bytes = bytes_of(m, i, n), floor = bench_floor(rates, bytes, 0);
        double time = bench_time(qv_cuda(l.be)->stream, pieces[i].call, &l, ROUNDS);
        printf("%-6s %lld tokens  %-22s %8.2f MB  floor %7.2f  %7.2f us  %5.2f\n", m->name,
               (long long)n, pieces[i].name, bytes * 1e-6, floor * 1e6, time * 1e6, time / floor);
        fflush(stdout);
    }
    close_layer(&l);
    qv_backend_close(l.be);
}

/* Copies alone: no piece has FLOP that count. */
static bench_rates measure_rates(void)
{
    qv_backend *be;
    bench_pass(qv_backend_open(&(qv_backend_options){.name = "cuda"}, &be));
    bench_rates rates = {.copy = bench_copy_rate(qv_cuda(be)->stream)};
    printf("%s, copies run at %.2f TB/s read and written\n", qv_backend_describe(be),
           rates.copy * 1e-12);
    qv_backend_close(be);
    return rates;
}

int main(int argc, char **argv)
{
    enum { N_MODELS = sizeof models / sizeof *models };
    static const int64_t sizes[] = {1, 2, 4, TOKENS};
    const char *known[N_MODELS + 1] = {NULL};
    for (size_t i = 0; i < N_MODELS; i++)
        known[i] = models[i].name;
    bench_know(argc - 1, argv + 1, known);
    const bench_rates rates = measure_rates();
    for (size_t i = 0; i < N_MODELS; i++)
        for (size_t j = 0; j < sizeof sizes / sizeof *sizes; j++)
            if (bench_wanted(argc - 1, argv + 1, models[i].name))
                run_model(&models[i], sizes[j], &rates);
    return 0;
}
