/* bench_gemm: the matrix products of prefill with adapters, at the matrices of released models: as
 * product by cuBLASLt, shrink and expand in a row, beside shrink and every form of the product that
 * adds them; and cuBLASLt's product alone.
 *
 *   bench_gemm [--tokens N,N,...] [--adapters N] [--rank R] [MODEL...]
 *
 * Without adapters (0), what the form itself costs. Models: 4B, 35B, Nano, square; all without
 * arguments. A row has TFLOP/s of the product alone (the adapters' own FLOP are not counted), each
 * the median over replays of a graph of several calls, which go round over copies of W; `any` is
 * the form that is chosen without a name.
 */
#include "bench/gpu_bench.h"
#include "ops/cuda/cuda.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROUNDS = 8, MAX_COPIES = ROUNDS, MAX_COUNTS = 8 };

static const struct {
    const char *model, *name;
    int64_t n_out, n_in;
    bool f32;
} matrices[] = {
    {"4B", "in_proj", 12352, 2560, false},
    {"4B", "qkv", 10240, 2560, false},
    {"4B", "out", 2560, 4096, true},
    {"4B", "gate_up", 18432, 2560, false},
    {"4B", "down", 2560, 9216, true},
    {"35B", "in_proj", 12352, 2048, false},
    {"35B", "qkv", 9216, 2048, false},
    {"35B", "out", 2048, 4096, true},
    {"35B", "shared gate_up", 1024, 2048, false},
    {"35B", "shared down", 2048, 512, true},
    {"35B", "router", 256, 2048, true},
    {"Nano", "in_proj", 10304, 2688, false},
    {"Nano", "qkv", 4608, 2688, false},
    {"Nano", "out", 2688, 4096, true},
    {"Nano", "shared up", 3712, 2688, false},
    {"Nano", "shared down", 2688, 3712, true},
    {"Nano", "router", 128, 2688, true},
    {"square", "8192", 8192, 8192, false},
};

static const char *const models[] = {"4B", "35B", "Nano", "square", NULL};

static qv_backend *be;

/* One matrix, its x and y, and a pool of adapters of one slice. */
typedef struct {
    qv_weight *w[MAX_COPIES];
    int n_w;
    int64_t n, n_out, n_in;
    qv_tensor x, y, scratch;
    qv_lora_site site;
    int64_t slice_start[2];
    int32_t n_segs, *seg_start, *seg_slot; /* on the device */
} product;

typedef enum { BLAS, BLAS_LORA, OURS } what_to_do;

static qv_k_linear_args args_of(const product *p, const qv_weight *w)
{
    return (qv_k_linear_args){.w = qv_weight_rows(w).data,
                              .x = p->x.data,
                              .y = p->y.data,
                              .n_tokens = p->n,
                              .n_out = p->n_out,
                              .n_in = p->n_in,
                              .x_stride = p->x.stride[0],
                              .y_stride = p->y.stride[0],
                              .y_f32 = p->y.dtype == QV_F32};
}

static qv_k_stream_lora lora_of(const product *p)
{
    return (qv_k_stream_lora){.segments = {.n_tokens = (int32_t)p->n,
                                           .n_segs = p->n_segs,
                                           .seg_start = p->seg_start,
                                           .seg_slot = p->seg_slot},
                              .site = {.a = p->site.a.data,
                                       .b = p->site.b.data,
                                       .slices = (const qv_k_lora_slice *)p->site.slices,
                                       .n_in = p->n_in,
                                       .n_out = p->n_out,
                                       .max_rank = p->site.max_rank,
                                       .n_slots = p->site.n_slots,
                                       .ranges = {.n = 1, .start = {0, (int32_t)p->n_out}}},
                              .x1 = p->scratch.data};
}

typedef struct {
    const product *p;
    what_to_do what;
    int form; /* of OURS */
} timed_call;

static void call(void *ctx, int round)
{
    const timed_call *c = ctx;
    const product *p = c->p;
    const qv_weight *w = p->w[round % p->n_w];
    const qv_cuda_backend *cuda = qv_cuda(be);
    const qv_k_linear_args args = args_of(p, w);
    const qv_k_stream_lora lora = lora_of(p);
    if (c->what == OURS) {
        bench_pass(qv_k_gemm_shrink(&args, &lora, cuda->n_sms, cuda->stream));
        bench_pass(qv_k_gemm(&args, &lora, false, c->form, cuda->n_sms, cuda->stream));
        return;
    }
    bench_pass(args.y_f32 ? qv_op_linear_f32(be, w, p->x, (qv_tensor){0}, p->y)
                          : qv_op_linear(be, w, p->x, p->y));
    if (c->what == BLAS_LORA)
        bench_pass(qv_k_lora(&lora.segments, &lora.site, args.x, args.x_stride, p->scratch.data,
                             args.y, args.y_stride, args.y_f32, cuda->stream));
}

/* Median seconds of one call. */
static double measure(const product *p, what_to_do what, int form)
{
    timed_call c = {p, what, form};
    return bench_time(qv_cuda(be)->stream, call, &c, ROUNDS);
}

/* Adapters with as many tokens each; of 0, tokens without one. */
static void add_adapters(product *p, int n, int rank)
{
    int n_adapters = n > 0 ? n : 1;
    int32_t *start = calloc((size_t)n_adapters + 1, sizeof *start),
            *slot = calloc((size_t)n_adapters, sizeof *slot);
    qv_lora_slice *slices = calloc((size_t)n_adapters, sizeof *slices);
    for (int i = 0; i < n_adapters; i++) {
        start[i + 1] = (int32_t)(p->n * (i + 1) / n_adapters);
        slot[i] = n > 0 ? i : -1;
        slices[i] = (qv_lora_slice){.rank = rank, .scale = 1};
    }
    int32_t spacing = (rank + 15) / 16 * 16;
    int64_t a = (int64_t)n_adapters * spacing * p->n_in,
            b = (int64_t)n_adapters * spacing * p->n_out;
    p->slice_start[1] = p->n_out;
    p->n_segs = n_adapters;
    p->seg_start = bench_sent(start, (size_t)(n_adapters + 1) * sizeof *start);
    p->seg_slot = bench_sent(slot, (size_t)n_adapters * sizeof *slot);
    p->site = (qv_lora_site){
        .n_in = p->n_in,
        .n_out = p->n_out,
        .n_slices = 1,
        .n_slots = n_adapters,
        .max_rank = spacing,
        .slice_start = p->slice_start,
        .a = qv_tensor_4d(bench_made_up(QV_BF16, a, 0.02f), QV_BF16, n_adapters, 1, spacing,
                          p->n_in),
        .b = qv_tensor_3d(bench_made_up(QV_BF16, b, 0.02f), QV_BF16, n_adapters, spacing, p->n_out),
        .slices = bench_sent(slices, (size_t)n_adapters * sizeof *slices)};
    p->scratch = qv_tensor_3d(bench_made_up(QV_F32, p->n * spacing, 0), QV_F32, p->n, 1, spacing);
    free(start);
    free(slot);
    free(slices);
}

static void run(size_t i, int64_t n, int n_adapters, int rank)
{
    product p = {.n = n, .n_out = matrices[i].n_out, .n_in = matrices[i].n_in};
    qv_dtype y = matrices[i].f32 ? QV_F32 : QV_BF16;
    double w_bytes = 2.0 * (double)(p.n_out * p.n_in), flop = (double)n * w_bytes;
    p.n_w = bench_copies(w_bytes, MAX_COPIES);
    for (int k = 0; k < p.n_w; k++) {
        bench_pass(qv_weight_new(be, p.n_out, p.n_in, QV_BF16, &p.w[k]));
        bench_pass(qv_weight_fill(be, p.w[k], 0.02f, (uint64_t)k + 1));
    }
    p.x = qv_tensor_2d(bench_made_up(QV_BF16, n * p.n_in, 1), QV_BF16, n, p.n_in);
    p.y = qv_tensor_2d(bench_made_up(y, n * p.n_out, 1), y, n, p.n_out);
    add_adapters(&p, n_adapters, rank);
    char name[48];
    snprintf(name, sizeof name, "%s %s", matrices[i].model, matrices[i].name);
    printf("%-24s %5lld %6.0f %6.0f |", name, (long long)n, flop / measure(&p, BLAS, 0) * 1e-12,
           flop / measure(&p, BLAS_LORA, 0) * 1e-12);
    for (int form = 0; form < QV_K_GEMM_FORMS; form++)
        printf(" %5.0f", flop / measure(&p, OURS, form) * 1e-12);
    double t = measure(&p, OURS, QV_K_GEMM_ANY);
    printf(" | %5.0f %8.1f us\n", flop / t * 1e-12, t * 1e6);
    fflush(stdout);
    for (int k = 0; k < p.n_w; k++)
        qv_weight_free(be, p.w[k]);
    void *const memory[] = {p.x.data,      p.y.data,      p.scratch.data, p.site.a.data,
                            p.site.b.data, p.site.slices, p.seg_start,    p.seg_slot};
    for (size_t k = 0; k < sizeof memory / sizeof *memory; k++)
        bench_free(memory[k]);
}

static int read_counts(const char *text, int64_t counts[MAX_COUNTS])
{
    int n = 0;
    for (char *end; n < MAX_COUNTS && *text != 0; text = *end == ',' ? end + 1 : end) {
        counts[n++] = strtoll(text, &end, 10);
        if (end == text || counts[n - 1] <= 0)
            return 0;
    }
    return n;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"tokens", required_argument, NULL, 't'},
                                            {"adapters", required_argument, NULL, 'a'},
                                            {"rank", required_argument, NULL, 'r'},
                                            {0}};
    int64_t counts[MAX_COUNTS] = {512, 2048, 8192};
    int n_counts = 3, n_adapters = 8, rank = 16;
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (c == 't')
            n_counts = read_counts(optarg, counts);
        else if (c == 'a')
            n_adapters = atoi(optarg);
        else if (c == 'r')
            rank = atoi(optarg);
        if (c == '?' || n_counts == 0 || n_adapters < 0 || rank < 1 || rank > 256) {
            fprintf(stderr, "usage: bench_gemm [--tokens N,...] [--adapters N] [--rank 1..256]"
                            " [MODEL...]\n");
            return 2;
        }
    }
    bench_know(argc - optind, argv + optind, models);
    bench_pass(qv_backend_open(&(qv_backend_options){.name = "cuda"}, &be));
    printf("%s; TFLOP/s; all but the first with %d adapters of rank %d\n", qv_backend_describe(be),
           n_adapters, rank);
    for (int form = 0; form < QV_K_GEMM_FORMS; form++)
        printf("form %d: %s\n", form, qv_k_gemm_form_name(form));
    printf("%-24s %5s %6s %6s |", "matrix", "T", "alone", "apart");
    for (int form = 0; form < QV_K_GEMM_FORMS; form++)
        printf(" %5d", form);
    printf(" | %5s\n", "any");
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) {
        bool wanted = bench_wanted(argc - optind, argv + optind, matrices[i].model);
        for (int k = 0; wanted && k < n_counts; k++)
            run(i, counts[k], n_adapters, rank);
    }
    qv_backend_close(be);
    return 0;
}
