/* bench_kernels: the recurrent, expert and LoRA kernels at the shapes of released models, each with
 * the bytes and FLOP that it cannot do without, the time these take at 3.0 TB/s or 798 TFLOP/s (an
 * H100's memory and tensor cores at their best in large copies and matrix products), the time
 * measured and the ratio of the two.
 *
 *   bench_kernels [TABLE...]    conv gdn ssd route moe lora moe_lora; all without arguments
 *
 * Times are medians of replays of a graph of many launches, so that neither launches nor the host
 * are in them; launches go round over copies of what a step would have to read from memory, more
 * than the L2 cache holds.
 */
#include "bench/gpu_bench.h"
#include "kernels/kernels_moe.h"
#include "kernels/kernels_recurrent.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MB 1e6

static const bench_rates rates = {.copy = 3.0e12, .gemm = 798e12};
static cudaStream_t stream;

/* --- Memory: one arena, filled with random numbers, emptied between cases ------------------- */

static char *arena;
static size_t arena_size, arena_used;

static void *take(double bytes)
{
    size_t n = ((size_t)bytes + 255) / 256 * 256;
    if (arena_used + n > arena_size) {
        fprintf(stderr, "bench_kernels: no room for %.0f MB\n", bytes / MB);
        exit(1);
    }
    void *p = arena + arena_used;
    arena_used += n;
    return p;
}

static void *upload(const void *data, size_t bytes)
{
    void *p = take((double)bytes);
    bench_check(cudaMemcpy(p, data, bytes, cudaMemcpyHostToDevice), "upload");
    return p;
}

static uint32_t random_state = 1;

static uint32_t random_u32(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}

/* The whole arena: BF16 numbers in (-1, 1), which as float32 are ordinary numbers too. */
static void fill_arena(void)
{
    const size_t block = (size_t)64 << 20;
    uint16_t *host = malloc(block);
    for (size_t i = 0; i < block / 2; i++) {
        float x = (float)(int32_t)random_u32() / 2147483648.0f;
        uint32_t bits;
        memcpy(&bits, &x, 4);
        host[i] = (uint16_t)(bits >> 16);
    }
    bench_check(cudaMemcpy(arena, host, block, cudaMemcpyHostToDevice), "fill");
    for (size_t at = block; at < arena_size; at += at)
        bench_check(cudaMemcpy(arena + at, arena, at + at < arena_size ? at : arena_size - at,
                               cudaMemcpyDeviceToDevice),
                    "fill");
    free(host);
}

/* --- Rows --------------------------------------------------------------------------------- */

/* Microseconds of one launch, by a graph of n. */
static double time_us(bench_call *launch, void *ctx, int n)
{
    return bench_time(stream, launch, ctx, n) * 1e6;
}

static void print_row(const char *name, double bytes, double flop, double us)
{
    double floor = bench_floor(&rates, bytes, flop) * 1e6;
    printf("%-52s %9.2f %9.2f %9.2f %9.2f %7.2f\n", name, bytes / MB, flop / 1e9, floor, us,
           us / floor);
    fflush(stdout);
    arena_used = 0;
}

static void print_head(const char *title)
{
    printf("\n%-52s %9s %9s %9s %9s %7s\n", title, "MB", "GFLOP", "floor us", "us", "ratio");
}

/* --- Steps -------------------------------------------------------------------------------- */

static const int decode_sizes[] = {1, 16, 64, 256};

#define ROWS(table) (sizeof(table) / sizeof *(table))

/* n_seqs sequences of n_each tokens that began earlier; slots from `first_slot`. */
static qv_k_steps new_steps(int n_seqs, int n_each, int first_slot)
{
    int n = n_seqs * n_each, *host = malloc((size_t)(2 * n + 2 * n_seqs + 2) * sizeof *host);
    for (int i = 0; i < n; i++)
        host[i] = 2048 + i % n_each;
    for (int i = 0; i <= n_seqs; i++)
        host[n + i] = i * n_each;
    for (int i = 0; i < n_seqs; i++)
        host[n + n_seqs + 1 + i] = first_slot + i;
    int32_t *p = upload(host, (size_t)(n + 2 * n_seqs + 1) * sizeof *host);
    free(host);
    return (qv_k_steps){.n_tokens = n,
                        .n_seqs = n_seqs,
                        .max_seq_tokens = n_each,
                        .pos = p,
                        .seq_start = p + n,
                        .state_slot = p + n + n_seqs + 1};
}

/* Copies of a step whose states lie beside each other. */
#define MAX_COPIES 512

typedef struct {
    qv_k_steps steps[MAX_COPIES];
    int n;
    qv_k_conv1d_args conv;
    qv_k_recurrent_args recurrent;
    void *scratch;
    size_t scratch_bytes;
    int is_gdn;
} steps_ctx;

static steps_ctx ctx_steps;

static void launch_conv(void *ctx, int i)
{
    steps_ctx *c = ctx;
    bench_pass(qv_k_conv1d(&c->steps[i % c->n], &c->conv, stream));
}

static void conv_case(const char *model, int64_t channels, int n_seqs, int n_each)
{
    steps_ctx *c = &ctx_steps;
    double n = (double)n_seqs * n_each, state = (double)n_seqs * channels * 3 * 2;
    double bytes = n * channels * 4 + 2 * state;
    c->n = bench_copies(bytes, MAX_COPIES);
    if (n_each > 1)
        c->n = 1;
    c->conv = (qv_k_conv1d_args){.x = take(n * channels * 2),
                                 .y = take(n * channels * 2),
                                 .state = take(state * c->n),
                                 .w = take((double)channels * 16),
                                 .x_stride = channels,
                                 .y_stride = channels,
                                 .n_channels = channels,
                                 .n_taps = 4};
    for (int i = 0; i < c->n; i++)
        c->steps[i] = new_steps(n_seqs, n_each, i * n_seqs);
    char name[96];
    snprintf(name, sizeof name, "%s, %lld channels, %d x %d", model, (long long)channels, n_seqs,
             n_each);
    print_row(name, bytes, 0, time_us(launch_conv, c, n_each > 1 ? 10 : 200));
}

static void table_conv(void)
{
    print_head("conv1d: sequences x tokens");
    for (size_t i = 0; i < ROWS(decode_sizes); i++)
        conv_case("4B", 8192, decode_sizes[i], 1);
    conv_case("4B", 8192, 1, 2048);
    conv_case("4B", 8192, 1, 8192);
    conv_case("Super", 10240, 64, 1);
}

static void launch_recurrent(void *ctx, int i)
{
    steps_ctx *c = ctx;
    bench_pass((c->is_gdn ? qv_k_gdn : qv_k_ssd)(&c->steps[i % c->n], &c->recurrent, c->scratch,
                                                 c->scratch_bytes, stream));
}

/* Shapes of a recurrence: GDN keys and values, or SSD state and head. */
typedef struct {
    const char *model;
    int is_gdn, n_k, n_v, d_k, d_v;
} recurrent_shape;

static void recurrent_case(const recurrent_shape *s, int n_seqs, int n_each)
{
    steps_ctx *c = &ctx_steps;
    double n = (double)n_seqs * n_each, cells = (double)s->n_v * s->d_k * s->d_v;
    double state = n_seqs * cells * 4;
    double io = n * (2.0 * s->n_k * s->d_k + 2.0 * s->n_v * s->d_v + 2 * s->n_v) * 2;
    int64_t d = 2 * s->n_k * s->d_k + s->n_v * s->d_v, out = (int64_t)s->n_v * s->d_v;
    c->is_gdn = s->is_gdn;
    c->n = n_each > 1 ? 1 : bench_copies(2 * state + io, MAX_COPIES);
    uint16_t *x = take(n * (double)d * 2), *gates = take(n * 2 * s->n_v * 2);
    c->recurrent = (qv_k_recurrent_args){
        .q = {x, d, s->d_k},
        .k = {x + s->n_k * s->d_k, d, s->d_k},
        .v = {x + 2 * s->n_k * s->d_k, d, s->d_v},
        .o = {take(n * (double)out * 2), out, s->d_v},
        .a = {gates, 2 * s->n_v, 1},
        .b = {gates + s->n_v, 2 * s->n_v, 1},
        .a_log = take(s->n_v * 4.0),
        .dt_bias = take(s->n_v * 4.0),
        .d_skip = take(s->n_v * 4.0),
        .dt_max = INFINITY,
        .state = take(state * c->n),
        .n_k_heads = s->n_k,
        .n_v_heads = s->n_v,
        .d_k = s->d_k,
        .d_v = s->d_v,
    };
    bench_check(cudaMemset(c->recurrent.state, 0, (size_t)(state * c->n)), "state");
    c->scratch_bytes = n_each > 1 ? qv_k_recurrent_scratch((int64_t)n, n_seqs, s->n_v) : 0;
    c->scratch = take((double)c->scratch_bytes + 1);
    for (int i = 0; i < c->n; i++)
        c->steps[i] = new_steps(n_seqs, n_each, i * n_seqs);
    char name[96];
    snprintf(name, sizeof name, "%s %s, %d heads, %d x %d", s->model, s->is_gdn ? "gdn" : "ssd",
             s->n_v, n_seqs, n_each);
    /* Chunks of 64 in the delta rule, whatever is best for SSD: 5 products of C x d a token and
     * head, and 3 of d x d; SSD has one of them less and no inverse. */
    double flop = n_each > 1
                      ? n * s->n_v *
                            (s->is_gdn ? 5 * 2.0 * 64 * 128 + 3 * 2.0 * 128 * 128
                                       : 2 * 2.0 * 64 * (s->d_v + 32) + 2 * 2.0 * s->d_k * s->d_v)
                      : 0;
    print_row(name, 2 * state + io, flop, time_us(launch_recurrent, c, n_each > 1 ? 5 : 100));
}

static void table_recurrent(const recurrent_shape *s, const char *title)
{
    print_head(title);
    for (size_t i = 0; i < ROWS(decode_sizes); i++)
        recurrent_case(s, decode_sizes[i], 1);
    recurrent_case(s, 1, 2048);
    recurrent_case(s, 1, 8192);
    recurrent_case(s, 4, 2048);
}

static void table_gdn(void)
{
    table_recurrent(&(recurrent_shape){"4B", 1, 16, 32, 128, 128},
                    "Gated DeltaNet (35B-A3B has the same heads)");
}

static void table_ssd(void)
{
    table_recurrent(&(recurrent_shape){"Nano", 0, 8, 64, 128, 64}, "Mamba-2");
    recurrent_case(&(recurrent_shape){"Super", 0, 8, 128, 128, 64}, 64, 1);
    recurrent_case(&(recurrent_shape){"Super", 0, 8, 128, 128, 64}, 1, 8192);
}

/* --- Experts ------------------------------------------------------------------------------ */

typedef struct {
    const char *model;
    int n_experts, top_k;
    int64_t d, ffn;
    int gated;
} moe_shape;

static const moe_shape moe_shapes[] = {
    {"35B", 256, 8, 2048, 512, 1},
    {"Nano", 128, 6, 2688, 1856, 0},
    {"Super", 512, 22, 1024, 2688, 0},
};

/* top_k different experts for each token, uniformly. */
static int32_t *new_ids(const moe_shape *s, int n)
{
    int32_t *ids = malloc((size_t)n * (size_t)s->top_k * sizeof *ids);
    for (int t = 0; t < n; t++)
        for (int j = 0; j < s->top_k; j++) {
            int taken = 1;
            while (taken) {
                ids[t * s->top_k + j] = (int32_t)(random_u32() % (uint32_t)s->n_experts);
                taken = 0;
                for (int i = 0; i < j; i++)
                    taken |= ids[t * s->top_k + i] == ids[t * s->top_k + j];
            }
        }
    return ids;
}

static int count_active(const int32_t *ids, int n, int n_experts)
{
    char seen[4096] = {0};
    int active = 0;
    for (int i = 0; i < n; i++) {
        active += !seen[ids[i]];
        seen[ids[i]] = 1;
    }
    (void)n_experts;
    return active;
}

/* n tokens in n_adapters equal segments of slots 0..; 0: one segment of base tokens. */
static qv_k_list new_list(const moe_shape *s, int n, int n_adapters)
{
    size_t n_pairs = (size_t)n * (size_t)s->top_k, most = n_pairs;
    int n_segs = n_adapters ? n_adapters : 1;
    int32_t *host = malloc((size_t)(2 * n_segs + 1) * sizeof *host);
    for (int i = 0; i <= n_segs; i++)
        host[i] = (int32_t)((int64_t)n * i / n_segs);
    for (int i = 0; i < n_segs; i++)
        host[n_segs + 1 + i] = n_adapters ? i : -1;
    if (most < (size_t)s->n_experts)
        most = (size_t)s->n_experts;
    qv_k_list l = {.n_experts = s->n_experts, .top_k = s->top_k, .n_tokens = n, .n_segs = n_segs};
    int32_t *segments = upload(host, (size_t)(2 * n_segs + 1) * sizeof *host);
    l.seg_start = segments;
    l.seg_slot = segments + n_segs + 1;
    l.expert_start = take((s->n_experts + 1) * 4.0);
    l.pair = take((double)n_pairs * 4);
    l.place = take((double)n_pairs * 4);
    l.n_runs = take(4);
    l.next_item = take(4);
    l.runs = take((double)n_pairs * 16);
    l.work = take((double)(most + n_pairs / 512 + 2) * 8);
    free(host);
    return l;
}

typedef struct {
    qv_k_list list;
    qv_k_router_args router;
    int32_t *ids;
    qv_k_moe_linear_args linear[MAX_COPIES];
    int n;
    float *weights;
    void *o, *y;
    int64_t d;
    qv_k_moe_lora_site up, down;
    float *scratch;
    void *x, *h;
} moe_ctx;

static moe_ctx ctx_moe;

static void launch_router(void *ctx, int i)
{
    moe_ctx *c = ctx;
    (void)i;
    bench_pass(qv_k_router(&c->router, stream));
}

static void launch_route(void *ctx, int i)
{
    moe_ctx *c = ctx;
    (void)i;
    bench_pass(qv_k_moe_route(c->ids, &c->list, stream));
}

static void launch_moe_linear(void *ctx, int i)
{
    moe_ctx *c = ctx;
    bench_pass(qv_k_moe_linear(&c->list, &c->linear[i % c->n], stream));
}

static void launch_combine(void *ctx, int i)
{
    moe_ctx *c = ctx;
    (void)i;
    bench_pass(qv_k_moe_combine(&c->list, c->weights, c->o, c->d, NULL, NULL, NULL, c->y, false,
                                c->d, c->d, stream));
}

static void route_case(const moe_shape *s, int n)
{
    moe_ctx *c = &ctx_moe;
    char name[96];
    int32_t *ids = new_ids(s, n);
    c->list = new_list(s, n, 8 < n ? 8 : n);
    c->ids = upload(ids, (size_t)n * (size_t)s->top_k * sizeof *ids);
    c->weights = take((double)n * s->top_k * 4);
    c->router = (qv_k_router_args){.logits = take((double)n * s->n_experts * 4),
                                   .logits_stride = s->n_experts,
                                   .ids = take((double)n * s->top_k * 4),
                                   .weights = c->weights,
                                   .n_tokens = n,
                                   .n_experts = s->n_experts,
                                   .top_k = s->top_k,
                                   .n_groups = 1,
                                   .topk_groups = 1,
                                   .scale = 1,
                                   .sigmoid = !s->gated,
                                   .normalize = 1};
    double router = time_us(launch_router, c, 50), route = time_us(launch_route, c, 20);
    c->d = s->d;
    c->o = take((double)n * s->top_k * (double)s->d * 2);
    c->y = take((double)n * (double)s->d * 2);
    double combine = time_us(launch_combine, c, 20);
    snprintf(name, sizeof name, "%s router, %d tokens", s->model, n);
    print_row(name, (double)n * (s->n_experts * 4 + s->top_k * 8), 0, router);
    snprintf(name, sizeof name, "%s list, %d tokens, 8 adapters", s->model, n);
    print_row(name, (double)n * s->top_k * 12, 0, route);
    snprintf(name, sizeof name, "%s weighted sum, %d tokens", s->model, n);
    print_row(name, (double)n * (s->top_k + 1) * (double)s->d * 2, 0, combine);
    free(ids);
}

static void table_route(void)
{
    static const int sizes[] = {1, 64, 256, 8192};
    print_head("router, list of pairs, weighted sum");
    for (size_t m = 0; m < ROWS(moe_shapes); m++)
        for (size_t i = 0; i < ROWS(sizes); i++)
            route_case(&moe_shapes[m], sizes[i]);
}

static void moe_case(const moe_shape *s, int n, int down)
{
    moe_ctx *c = &ctx_moe;
    int64_t n_in = down ? s->ffn : s->d, n_out = down ? s->d : s->gated ? 2 * s->ffn : s->ffn;
    int32_t *ids = new_ids(s, n);
    int active = count_active(ids, n * s->top_k, s->n_experts);
    double pairs = (double)n * s->top_k, matrix = (double)n_out * (double)n_in * 2;
    double all = matrix * s->n_experts;
    c->list = new_list(s, n, 0);
    bool pairs_rows = down || qv_k_moe_wants_pairs(&c->list);
    double rows = pairs_rows ? pairs : n;
    double bytes = active * matrix + rows * (double)n_in * 2 + pairs * (double)n_out * 2;
    c->ids = upload(ids, (size_t)n * (size_t)s->top_k * sizeof *ids);
    c->n = bench_copies(active * matrix, (int)fmax(1, 8e9 / all));
    void *x = take(rows * (double)n_in * 2), *y = take(pairs * (double)n_out * 2);
    for (int i = 0; i < c->n; i++)
        c->linear[i] = (qv_k_moe_linear_args){.w = take(all),
                                              .x = x,
                                              .y = y,
                                              .w_expert = n_out * n_in,
                                              .n_out = n_out,
                                              .n_in = n_in,
                                              .x_stride = n_in,
                                              .y_stride = n_out,
                                              .x_pairs = (uint8_t)pairs_rows};
    bench_pass(qv_k_moe_route(c->ids, &c->list, stream));
    char name[96];
    snprintf(name, sizeof name, "%s %s, %d tokens, %d experts", s->model, down ? "down" : "up", n,
             active);
    print_row(name, bytes, 2 * pairs * (double)n_out * (double)n_in,
              time_us(launch_moe_linear, c, n > 1000 ? 4 : 24));
    free(ids);
}

static void table_moe(void)
{
    static const int sizes[] = {1, 16, 64, 256, 2048, 8192};
    print_head("grouped GEMM");
    for (size_t m = 0; m < ROWS(moe_shapes); m++)
        for (int down = 0; down < 2; down++)
            for (size_t i = 0; i < ROWS(sizes); i++)
                moe_case(&moe_shapes[m], sizes[i], down);
}

/* --- LoRA --------------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    int64_t n_in;
    int n_slices, n_planes; /* slices of one module share a plane: the first ones do */
    int64_t rows[6];
} lora_shape;

static const lora_shape lora_shapes[] = {
    {"4B gdn in", 2560, 6, 4, {2048, 2048, 4096, 4096, 32, 32}},
    {"4B gate_up", 2560, 2, 2, {9216, 9216}},
    {"4B down", 9216, 1, 1, {2560}},
    {"35B gdn in", 2048, 6, 4, {2048, 2048, 4096, 4096, 32, 32}},
};

typedef struct {
    qv_k_segments segments;
    qv_k_lora_site site[MAX_COPIES];
    int n;
    void *x, *y;
    float *scratch;
    int64_t x_stride, y_stride;
} lora_ctx;

static lora_ctx ctx_lora;

static void launch_lora(void *ctx, int i)
{
    lora_ctx *c = ctx;
    bench_pass(qv_k_lora(&c->segments, &c->site[i % c->n], c->x, c->x_stride, c->scratch, c->y,
                         c->y_stride, 0, stream));
}

static void lora_case(const lora_shape *s, int n, int n_adapters, int rank, int max_rank)
{
    lora_ctx *c = &ctx_lora;
    qv_k_lora_slice *slices = calloc((size_t)(n_adapters * s->n_slices), sizeof *slices);
    int32_t *host = malloc((size_t)(2 * n_adapters + 1) * sizeof *host);
    qv_k_slices ranges = {.n = s->n_slices};
    for (int i = 0; i < s->n_slices; i++)
        ranges.start[i + 1] = ranges.start[i] + (int32_t)s->rows[i];
    for (int i = 0; i < n_adapters * s->n_slices; i++) {
        int plane = i % s->n_slices - (s->n_slices - s->n_planes);
        slices[i] = (qv_k_lora_slice){.plane = plane < 0 ? 0 : plane, .rank = rank, .scale = 1};
    }
    for (int i = 0; i <= n_adapters; i++)
        host[i] = (int32_t)((int64_t)n * i / n_adapters);
    for (int i = 0; i < n_adapters; i++)
        host[n_adapters + 1 + i] = i;
    int32_t *segments = upload(host, (size_t)(2 * n_adapters + 1) * sizeof *host);
    void *device_slices = upload(slices, (size_t)(n_adapters * s->n_slices) * sizeof *slices);
    int64_t n_out = ranges.start[s->n_slices];
    double a = (double)n_adapters * s->n_slices * max_rank * (double)s->n_in * 2;
    double b = (double)n_adapters * max_rank * (double)n_out * 2;
    double weights = 2.0 * n_adapters * rank * (double)(s->n_planes * s->n_in + n_out);
    double io = n * 2.0 * (double)(s->n_in + 2 * n_out);
    c->segments = (qv_k_segments){.n_tokens = n,
                                  .n_segs = n_adapters,
                                  .seg_start = segments,
                                  .seg_slot = segments + n_adapters + 1};
    c->n = (int)fmin(bench_copies(weights, MAX_COPIES), fmax(1, 8e9 / (a + b)));
    c->x_stride = s->n_in;
    c->y_stride = n_out;
    c->x = take(n * (double)s->n_in * 2);
    c->y = take(n * (double)n_out * 2);
    c->scratch = take((double)n * s->n_slices * max_rank * 4);
    for (int i = 0; i < c->n; i++)
        c->site[i] = (qv_k_lora_site){.a = take(a),
                                      .b = take(b),
                                      .slices = device_slices,
                                      .n_in = s->n_in,
                                      .n_out = n_out,
                                      .max_rank = max_rank,
                                      .ranges = ranges};
    char name[96];
    snprintf(name, sizeof name, "%s, %d tokens, %d adapters, rank %d of %d", s->name, n, n_adapters,
             rank, max_rank);
    /* At decode x and y stay in the L2 cache. */
    print_row(name, weights + (n > 1000 ? io : 0), 0, time_us(launch_lora, c, n > 1000 ? 5 : 100));
    free(slices);
    free(host);
}

static void table_lora(void)
{
    static const int adapters[] = {1, 8, 64}, ranks[] = {8, 16, 64, 128};
    print_head("SGMV: shrink and expand");
    for (size_t i = 0; i < ROWS(decode_sizes); i++)
        for (size_t j = 0; j < ROWS(adapters); j++)
            for (size_t r = 0; r < ROWS(ranks); r++)
                if (adapters[j] <= decode_sizes[i])
                    lora_case(&lora_shapes[0], decode_sizes[i], adapters[j], ranks[r],
                              ranks[r] <= 64 ? 64 : 128);
    for (size_t s = 1; s < ROWS(lora_shapes); s++)
        for (size_t j = 0; j < ROWS(adapters); j++)
            lora_case(&lora_shapes[s], 64, adapters[j], 16, 64);
    for (size_t s = 0; s < ROWS(lora_shapes); s++) {
        lora_case(&lora_shapes[s], 8192, 1, 16, 64);
        lora_case(&lora_shapes[s], 8192, 8, 64, 64);
    }
}

/* --- LoRA of experts ---------------------------------------------------------------------- */

static void launch_moe_lora(void *ctx, int i)
{
    moe_ctx *c = ctx;
    (void)i;
    bench_pass(qv_k_moe_lora(&c->list, &c->up, c->x, c->up.n_in, 0, c->scratch, c->h, c->up.n_out,
                             stream));
    bench_pass(qv_k_moe_lora(&c->list, &c->down, c->h, c->down.n_in, 1, c->scratch, c->o,
                             c->down.n_out, stream));
    bench_pass(qv_k_moe_combine(&c->list, c->weights, c->o, c->d, &c->down, c->scratch, NULL, c->y,
                                false, c->d, c->d, stream));
}

static qv_k_moe_lora_site new_site(const moe_shape *s, int down, int n_adapters, int rank,
                                   int shared)
{
    int n_slices = !down && s->gated ? 2 : 1, n_entries = s->n_experts * n_slices;
    int64_t n_in = down ? s->ffn : s->d, n_out = down ? s->d : n_slices * s->ffn;
    qv_k_moe_lora_site site = {.n_in = n_in, .n_out = n_out, .max_rank = rank};
    qv_k_lora_slice *slices = calloc((size_t)n_entries, sizeof *slices);
    qv_k_moe_lora_slot slots[64];
    site.ranges.n = n_slices;
    for (int i = 0; i < n_slices; i++)
        site.ranges.start[i + 1] = (int32_t)(n_out / n_slices * (i + 1));
    for (int i = 0; i < n_entries; i++)
        slices[i] = (qv_k_lora_slice){.plane = i % n_slices, .rank = rank, .scale = 1};
    void *device_slices = upload(slices, (size_t)n_entries * sizeof *slices);
    int a_shared = shared && !down, b_shared = shared && down;
    for (int i = 0; i < n_adapters; i++)
        slots[i] = (qv_k_moe_lora_slot){
            .a = take((a_shared ? 1.0 : s->n_experts) * n_slices * rank * (double)n_in * 2),
            .b = take((b_shared ? 1.0 : s->n_experts) * rank * (double)n_out * 2),
            .slices = device_slices,
            .max_rank = rank,
            .a_shared = (uint8_t)a_shared,
            .b_shared = (uint8_t)b_shared};
    site.slots = upload(slots, (size_t)n_adapters * sizeof *slots);
    free(slices);
    return site;
}

static void moe_lora_case(const moe_shape *s, int n, int n_adapters, int rank, int shared)
{
    moe_ctx *c = &ctx_moe;
    int32_t *ids = new_ids(s, n);
    int n_slices = s->gated ? 2 : 1, n_pairs = n * s->top_k, touched = 0;
    for (int i = 0; i < n_adapters; i++) {
        int from = (int)((int64_t)n * i / n_adapters),
            to = (int)((int64_t)n * (i + 1) / n_adapters);
        touched += count_active(ids + from * s->top_k, (to - from) * s->top_k, s->n_experts);
    }
    double per_pair = shared ? (double)(n_slices * s->ffn + s->ffn)
                             : (double)(n_slices * s->d + n_slices * s->ffn + s->ffn + s->d);
    double per_adapter = shared ? (double)(n_slices * s->d + s->d) : 0;
    double bytes = 2.0 * rank * (touched * per_pair + n_adapters * per_adapter);
    if (n > 1000)
        bytes += 2.0 * n_pairs * (double)(2 * n_slices * s->ffn + s->ffn + 3 * s->d);
    else
        bytes += 2.0 * n_pairs * (double)s->d;
    c->list = new_list(s, n, n_adapters);
    c->ids = upload(ids, (size_t)n_pairs * sizeof *ids);
    c->weights = take(n_pairs * 4.0);
    c->d = s->d;
    c->x = take(n * (double)s->d * 2);
    c->h = take(n_pairs * (double)n_slices * (double)s->ffn * 2);
    c->o = take(n_pairs * (double)s->d * 2);
    c->y = take(n * (double)s->d * 2);
    c->scratch = take((double)n_pairs * n_slices * rank * 4);
    c->up = new_site(s, 0, n_adapters, rank, shared);
    c->down = new_site(s, 1, n_adapters, rank, shared);
    bench_pass(qv_k_moe_route(c->ids, &c->list, stream));
    char name[96];
    snprintf(name, sizeof name, "%s %s, %d tokens, %d adapters, rank %d", s->model,
             shared ? "shared outer" : "per expert", n, n_adapters, rank);
    print_row(name, bytes, 0, time_us(launch_moe_lora, c, n > 1000 ? 3 : 20));
    free(ids);
}

static void table_moe_lora(void)
{
    static const int sizes[] = {1, 16, 64, 256, 8192};
    print_head("LoRA of experts: up, down and weighted sum");
    for (size_t m = 0; m < ROWS(moe_shapes); m++)
        for (int shared = 0; shared < 2; shared++)
            for (size_t i = 0; i < ROWS(sizes); i++)
                for (int adapters = 1; adapters <= 8 && adapters <= sizes[i]; adapters += 7)
                    moe_lora_case(&moe_shapes[m], sizes[i], adapters, 16, shared);
}

/* --- Main --------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    void (*run)(void);
} tables[] = {
    {"conv", table_conv},         {"gdn", table_gdn}, {"ssd", table_ssd},
    {"route", table_route},       {"moe", table_moe}, {"lora", table_lora},
    {"moe_lora", table_moe_lora},
};

int main(int argc, char **argv)
{
    const char *known[ROWS(tables) + 1] = {NULL};
    struct cudaDeviceProp device;
    size_t left, whole;
    for (size_t t = 0; t < ROWS(tables); t++)
        known[t] = tables[t].name;
    bench_know(argc - 1, argv + 1, known);
    bench_check(cudaGetDeviceProperties(&device, 0), "no device that can be used");
    bench_check(cudaStreamCreate(&stream), "stream");
    double copy_rate = bench_copy_rate(stream);
    bench_check(cudaMemGetInfo(&left, &whole), "memory");
    arena_size = left > (size_t)34 << 30 ? (size_t)32 << 30 : left / 16 * 15;
    arena = bench_alloc(arena_size);
    fill_arena();
    printf("%s, copies run at %.2f TB/s read and written\n", device.name, copy_rate * 1e-12);
    for (size_t t = 0; t < ROWS(tables); t++)
        if (bench_wanted(argc - 1, argv + 1, tables[t].name))
            tables[t].run();
    return 0;
}
