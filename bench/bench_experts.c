/* bench_experts: a routed layer of released models at few tokens, piece by piece and whole, by the
 * CUDA backend's usual kernels and by those on trial (--trials experts) in one run. Each line has
 * the bytes that cannot be avoided, the time these take at the rate of a large copy measured in the
 * same run, both times in microseconds and their ratio to that floor.
 *
 *   bench_experts [MODEL...]    35B Nano Super; all without arguments
 *
 * Times are medians over replays of a graph of many layers, so that neither launches nor the host
 * are in them; layers go round over copies, more than the L2 cache holds.
 */
#include "ops/cuda/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 24, REPLAYS = 9, COPIES = 4, TOKENS = 8 };

static void pass(qv_status status)
{
    if (status == QV_OK)
        return;
    fprintf(stderr, "bench_experts: %s\n", qv_error());
    exit(1);
}

static void check(cudaError_t error)
{
    pass(error == cudaSuccess ? QV_OK : qv_cuda_fail(error, "bench"));
}

/* --- Timing ------------------------------------------------------------------------------- */

typedef void call_fn(void *ctx, int round);

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median seconds of one call. */
static double measure(qv_backend *be, call_fn *call, void *ctx, int rounds)
{
    cudaStream_t stream = qv_cuda(be)->stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t start, stop;
    double times[REPLAYS];
    for (int i = 0; i < COPIES; i++)
        call(ctx, i);
    check(cudaStreamSynchronize(stream));
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < rounds; i++)
        call(ctx, i);
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&exec, graph, 0));
    check(cudaEventCreate(&start));
    check(cudaEventCreate(&stop));
    for (int i = -2; i < REPLAYS; i++) {
        float ms;
        check(cudaEventRecord(start, stream));
        check(cudaGraphLaunch(exec, stream));
        check(cudaEventRecord(stop, stream));
        check(cudaStreamSynchronize(stream));
        check(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 0)
            times[i] = ms * 1e-3 / rounds;
    }
    check(cudaGraphExecDestroy(exec));
    check(cudaGraphDestroy(graph));
    check(cudaEventDestroy(start));
    check(cudaEventDestroy(stop));
    qsort(times, REPLAYS, sizeof *times, by_value);
    return times[REPLAYS / 2];
}

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

static void *made_up(qv_backend *be, qv_dtype dtype, int64_t n, float scale)
{
    static uint64_t seed;
    void *p;
    pass(qv_backend_alloc(be, (size_t)n * qv_dtype_size(dtype), &p));
    if (dtype != QV_I32)
        pass(qv_backend_fill(be, p, dtype, n, 0, scale, ++seed));
    return p;
}

static qv_tensor rows(layer *l, qv_dtype dtype, int64_t n, int64_t d)
{
    return qv_tensor_2d(made_up(l->be, dtype, n * d, 1), dtype, n, d);
}

static qv_weight *matrix(qv_backend *be, int64_t n_experts, int64_t n_out, int64_t n_in)
{
    static uint64_t seed = 1000;
    qv_weight *w;
    pass(n_experts > 0 ? qv_weight_new_experts(be, n_experts, n_out, n_in, QV_BF16, &w)
                       : qv_weight_new(be, n_out, n_in, QV_BF16, &w));
    pass(qv_weight_fill(be, w, 0.05f, ++seed));
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
    pass(qv_backend_alloc(l->be, qv_moe_list_bytes(m->n_experts, m->top_k, TOKENS),
                          &l->list_memory));
    pass(qv_moe_list_init(&l->list, m->n_experts, m->top_k, TOKENS, l->list_memory));
    l->x = rows(l, QV_BF16, n, m->d);
    l->rest = rows(l, QV_BF16, n, m->d);
    l->wide = rows(l, QV_BF16, n, wide * m->shared_ffn);
    l->hidden = rows(l, QV_BF16, n, m->shared_ffn);
    l->shared = rows(l, QV_F32, n, m->d);
    l->gate = rows(l, QV_BF16, n, 1);
    l->logits = rows(l, QV_F32, n, m->n_experts);
    l->latent = rows(l, QV_BF16, n, in);
    l->ids = rows(l, QV_I32, n, m->top_k);
    l->chosen = rows(l, QV_F32, n, m->top_k);
    l->pairs_wide = rows(l, QV_BF16, n_pairs, wide * m->ffn);
    l->pairs = rows(l, QV_BF16, n_pairs, m->ffn);
    l->out = rows(l, QV_BF16, n_pairs, in);
    l->residual = rows(l, QV_F32, n, m->d);
    l->delta = rows(l, QV_F32, n, m->d);
    l->gain = qv_tensor_1d(made_up(l->be, QV_F32, m->d, 1), QV_F32, m->d);
}

static void close_layer(layer *l)
{
    qv_tensor *const all[] = {&l->x,          &l->rest,     &l->wide,   &l->hidden,
                              &l->shared,     &l->gate,     &l->logits, &l->latent,
                              &l->ids,        &l->chosen,   &l->pairs,  &l->out,
                              &l->pairs_wide, &l->residual, &l->delta,  &l->gain};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        qv_backend_free(l->be, all[i]->data);
    qv_backend_free(l->be, l->list_memory);
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
    pass(qv_op_linears(l->be, l->x, n, parts));
}

static void call_choose(void *ctx, int round)
{
    layer *l = ctx;
    (void)round;
    pass(qv_op_choose(l->be, &l->how, l->logits, l->ids, l->chosen, 0, NULL, NULL, &l->list));
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
        pass(qv_op_moe_combine(l->be, &l->list, l->chosen, l->out, NULL, (qv_tensor){.data = NULL},
                               l->latent));
        pass(
            qv_op_add_rms_norm(l->be, l->residual, l->delta, l->gain, 1e-6f, false, l->x, l->rest));
        return;
    }
    pass(qv_op_combine_add_rms_norm(l->be, &sum, l->residual, l->delta, l->gain, 1e-6f, false, l->x,
                                    l->rest));
}

static void call_layer(void *ctx, int round)
{
    layer *l = ctx;
    const weights *w = &l->w[round % COPIES];
    qv_act act = l->m->gated ? QV_ACT_SWIGLU : QV_ACT_RELU2;
    call_products(l, round);
    pass(qv_op_linear_f32(l->be, w->shared_out, l->hidden, (qv_tensor){.data = NULL}, l->shared));
    call_choose(l, round);
    pass(qv_op_moe_linear_act(l->be, w->up, &l->list, l->m->latent > 0 ? l->latent : l->x,
                              QV_MOE_TOKENS, act, l->pairs_wide, l->pairs));
    pass(qv_op_moe_linear(l->be, w->down, &l->list, l->pairs, QV_MOE_PAIRS, l->out));
    call_sum(l, round);
}

/* --- Tables ------------------------------------------------------------------------------- */

enum { PRODUCTS, CHOOSE, SUM, LAYER, N_PIECES };

static const struct {
    const char *name;
    call_fn *call;
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

static void run_model(const model *m, int64_t n, double copy_rate)
{
    double times[2][N_PIECES];
    for (int trial = 0; trial < 2; trial++) {
        layer l = {.be = NULL};
        pass(qv_backend_open(
            &(qv_backend_options){.name = "cuda", .trials = trial ? "experts" : NULL}, &l.be));
        open_layer(&l, m, n);
        call_layer(&l, 0);
        for (int i = 0; i < N_PIECES; i++)
            times[trial][i] = measure(l.be, pieces[i].call, &l, ROUNDS);
        close_layer(&l);
        qv_backend_close(l.be);
    }
    for (int i = 0; i < N_PIECES; i++) {
        double bytes = bytes_of(m, i, n), floor = bytes / copy_rate;
        printf("%-6s %lld tokens  %-22s %8.2f MB  floor %7.2f  usual %7.2f (%5.2f)  on trial %7.2f "
               "(%5.2f)\n",
               m->name, (long long)n, pieces[i].name, bytes * 1e-6, floor * 1e6, times[0][i] * 1e6,
               times[0][i] / floor, times[1][i] * 1e6, times[1][i] / floor);
        fflush(stdout);
    }
}

typedef struct {
    qv_backend *be;
    void *from, *to;
    size_t bytes;
} copy_ctx;

static void call_copy(void *ctx, int round)
{
    copy_ctx *c = ctx;
    (void)round;
    pass(qv_backend_copy(c->be, c->to, c->from, c->bytes));
}

/* Bytes a second, read and written. */
static double measure_copy(void)
{
    copy_ctx c = {.bytes = (size_t)1 << 30};
    pass(qv_backend_open(&(qv_backend_options){.name = "cuda"}, &c.be));
    pass(qv_backend_alloc(c.be, c.bytes, &c.from));
    pass(qv_backend_alloc(c.be, c.bytes, &c.to));
    double rate = 2.0 * (double)c.bytes / measure(c.be, call_copy, &c, 4);
    printf("%s, copies run at %.2f TB/s read and written\n", qv_backend_describe(c.be),
           rate / 1e12);
    qv_backend_free(c.be, c.from);
    qv_backend_free(c.be, c.to);
    qv_backend_close(c.be);
    return rate;
}

int main(int argc, char **argv)
{
    static const int64_t sizes[] = {1, 2, 4, TOKENS};
    double copy_rate = measure_copy();
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        bool wanted = argc < 2;
        for (int j = 1; j < argc; j++)
            wanted |= strcmp(argv[j], models[i].name) == 0;
        for (size_t j = 0; wanted && j < sizeof sizes / sizeof *sizes; j++)
            run_model(&models[i], sizes[j], copy_rate);
    }
    return 0;
}
