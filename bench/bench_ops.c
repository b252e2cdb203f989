/* Times every op of the CPU backend at the shapes of the bundled tiny model and of one layer like
 * Qwen3.5-4B's, beside the floor that this machine allows: the bytes an op must move at the
 * bandwidth, or its arithmetic at the multiply-add rate, both measured first in the same run. GEMM
 * has a peer as well, OpenBLAS, run through the same op.
 */
#include "ops/cpu/pool.h"
#include "ops/ops.h"
#include "tests/ops/shapes.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static const char usage[] =
    "usage: bench_ops [--quick] [--threads N] [--isa NAME] [--only OP]\n"
    "\n"
    "  --quick      shorter measurements: a few seconds altogether\n"
    "  --threads N  threads of the backend (default: all cores)\n"
    "  --isa NAME   avx512, avx2 or baseline (default: the widest)\n"
    "  --only OP    only ops whose name starts with OP\n"
    "\n"
    "Columns: time is the median of the runs; floor is the larger of bytes / bandwidth and flop / "
    "rate,\n"
    "with the bandwidth of the L2 cache for what fits there; the peer is OpenBLAS.\n";

static struct {
    double seconds; /* of one measurement */
    int n_threads;
    const char *isa, *only;
} settings = {.seconds = 0.3};

static qv_backend *be, *blas;
static qv_pool *pool;

static void check(qv_status status)
{
    if (status == QV_OK)
        return;
    fprintf(stderr, "bench_ops: %s: %s\n", qv_status_name(status), qv_error());
    exit(1);
}

static void *alloc(int64_t bytes)
{
    void *p;
    check(qv_backend_alloc(be, (size_t)bytes, &p));
    return p;
}

/* Numbers in [-0.5, 0.5): a fixed sequence. */
static float *numbers(int64_t n)
{
    static uint32_t state = 1;
    float *x = alloc(n * (int64_t)sizeof *x);
    for (int64_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)(state >> 8) / (1 << 24) - 0.5f;
    }
    return x;
}

static qv_tensor tensor_2d(int64_t a, int64_t b)
{
    return qv_tensor_2d(numbers(a * b), QV_F32, a, b);
}

static qv_tensor tensor_3d(int64_t a, int64_t b, int64_t c)
{
    return qv_tensor_3d(numbers(a * b * c), QV_F32, a, b, c);
}

static void release(qv_tensor t)
{
    qv_backend_free(be, t.data);
}

/* --- Measuring ---------------------------------------------------------------------------- */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

typedef void run_fn(void *ctx);

/* Median seconds of one run. */
static double measure(run_fn *run, void *ctx)
{
    enum { MOST = 2000, LEAST = 5 };
    static double times[MOST];
    int n = 0;
    run(ctx);
    for (double start = now(); n < LEAST || (n < MOST && now() - start < settings.seconds); n++) {
        double t = now();
        run(ctx);
        times[n] = now() - t;
    }
    qsort(times, (size_t)n, sizeof *times, by_size);
    return times[n / 2];
}

/* --- The machine -------------------------------------------------------------------------- */

static double bandwidth_memory, bandwidth_cache, rate; /* bytes/s, bytes/s, flop/s; all threads */

enum { CHAINS = 10, ROUNDS = 200000 };

/* What this machine can do at best, once per instruction set: add up n floats in four chains; and
 * ROUNDS multiply-adds in each of CHAINS chains, which fill two pipelines of a latency of four. */
#define MACHINE_LOOPS(name, target_isa, type, load, set1, add, fma)                                \
    __attribute__((target_isa, optimize("O3"))) static float read_##name(const float *x,           \
                                                                         int64_t n)                \
    {                                                                                              \
        enum { LANES = sizeof(type) / sizeof(float) };                                             \
        type sum[4] = {set1(0), set1(0), set1(0), set1(0)};                                        \
        for (int64_t i = 0; i < n; i += 4 * LANES)                                                 \
            for (int j = 0; j < 4; j++)                                                            \
                sum[j] = add(sum[j], load(x + i + j * LANES));                                     \
        sum[0] = add(add(sum[0], sum[1]), add(sum[2], sum[3]));                                    \
        return ((const float *)&sum[0])[0];                                                        \
    }                                                                                              \
    __attribute__((target_isa, optimize("O3"))) static float multiply_##name(void)                 \
    {                                                                                              \
        type acc[CHAINS], a = set1(1.0000001f), b = set1(1e-9f);                                   \
        for (int i = 0; i < CHAINS; i++)                                                           \
            acc[i] = set1(0.5f);                                                                   \
        for (int round = 0; round < ROUNDS; round++)                                               \
            for (int i = 0; i < CHAINS; i++)                                                       \
                acc[i] = fma(acc[i], a, b);                                                        \
        for (int i = 1; i < CHAINS; i++)                                                           \
            acc[0] = add(acc[0], acc[i]);                                                          \
        return ((const float *)&acc[0])[0];                                                        \
    }

#if defined(__x86_64__)
MACHINE_LOOPS(avx512, target("avx512f"), __m512, _mm512_loadu_ps, _mm512_set1_ps, _mm512_add_ps,
              _mm512_fmadd_ps)
MACHINE_LOOPS(avx2, target("avx2,fma"), __m256, _mm256_loadu_ps, _mm256_set1_ps, _mm256_add_ps,
              _mm256_fmadd_ps)
#endif

typedef float v4 __attribute__((vector_size(16)));
#define V4_LOAD(p)      (*(const v4 *)(p))
#define V4_SET1(x)      ((v4){x, x, x, x})
#define V4_ADD(a, b)    ((a) + (b))
#define V4_FMA(a, b, c) ((a) * (b) + (c))
MACHINE_LOOPS(baseline, unused, v4, V4_LOAD, V4_SET1, V4_ADD, V4_FMA)

static const struct {
    const char *name;
    int lanes;
    float (*read)(const float *x, int64_t n);
    float (*multiply)(void);
} machines[] = {
    {"baseline", 4, read_baseline, multiply_baseline},
#if defined(__x86_64__)
    {"avx2", 8, read_avx2, multiply_avx2},
    {"avx512", 16, read_avx512, multiply_avx512},
#endif
};

typedef struct {
    size_t machine;
    const float *x;
    int64_t n_each; /* floats of one thread */
    int n_rounds;
    volatile float sink;
} machine_ctx;

static void read_parts(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    machine_ctx *c = ctx;
    for (int64_t part = begin; part < end; part++)
        for (int round = 0; round < c->n_rounds; round++)
            c->sink = machines[c->machine].read(c->x + part * c->n_each, c->n_each);
}

static void multiply_parts(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    machine_ctx *c = ctx;
    for (int64_t i = begin; i < end; i++)
        c->sink = machines[c->machine].multiply();
}

#define LONG_NS 1000000000 /* an estimate that makes every thread take one part */

static void run_read(void *ctx)
{
    qv_pool_run(pool, qv_pool_n_threads(pool), LONG_NS, read_parts, ctx);
}

static void run_multiply(void *ctx)
{
    qv_pool_run(pool, qv_pool_n_threads(pool), LONG_NS, multiply_parts, ctx);
}

static double measure_bandwidth(size_t machine, int64_t bytes_each, int n_rounds)
{
    int n = qv_pool_n_threads(pool);
    float *x = numbers(bytes_each / 4 * n);
    machine_ctx c = {.machine = machine, .x = x, .n_each = bytes_each / 4, .n_rounds = n_rounds};
    double seconds = measure(run_read, &c);
    qv_backend_free(be, x);
    return (double)bytes_each * n_rounds * n / seconds;
}

static void measure_machine(void)
{
    machine_ctx c = {0};
    for (size_t i = 0; i < QV_ROWS(machines); i++)
        if (strstr(qv_backend_describe(be), machines[i].name))
            c.machine = i;
    double n_floats = (double)machines[c.machine].lanes * CHAINS * ROUNDS * qv_pool_n_threads(pool);
    rate = 2 * n_floats / measure(run_multiply, &c);
    bandwidth_memory = measure_bandwidth(c.machine, INT64_C(128) << 20, 1);
    bandwidth_cache = measure_bandwidth(c.machine, INT64_C(512) << 10, 50);
    printf("%s\nreads %.1f GB/s from memory, %.1f GB/s from the L2 cache; %.0f GFLOP/s\n\n",
           qv_backend_describe(be), bandwidth_memory * 1e-9, bandwidth_cache * 1e-9, rate * 1e-9);
    printf("%-16s %-38s %9s %9s %7s %9s %9s %9s %7s\n", "op", "shape", "floor us", "time us",
           "x floor", "GB/s", "GFLOP/s", "peer us", "x peer");
}

/* --- One line ----------------------------------------------------------------------------- */

static bool wanted(const char *op)
{
    return !settings.only || strncmp(op, settings.only, strlen(settings.only)) == 0;
}

typedef struct {
    const char *op;
    double bytes, flop;
    run_fn *run, *peer; /* peer may be NULL */
    void *ctx;
} line;

__attribute__((format(printf, 2, 3))) static void report(const line *l, const char *format, ...)
{
    char shape[64];
    va_list args;
    va_start(args, format);
    vsnprintf(shape, sizeof shape, format, args);
    va_end(args);
    bool in_cache = l->bytes < 1e6 * qv_pool_n_threads(pool);
    double by_bytes = l->bytes / (in_cache ? bandwidth_cache : bandwidth_memory);
    double by_flop = l->flop / rate, floor = by_bytes > by_flop ? by_bytes : by_flop;
    double seconds = measure(l->run, l->ctx);
    printf("%-16s %-38s %9.1f %9.1f %7.1f %9.1f %9.1f", l->op, shape, floor * 1e6, seconds * 1e6,
           seconds / floor, l->bytes / seconds * 1e-9, l->flop / seconds * 1e-9);
    if (l->peer) {
        double peer = measure(l->peer, l->ctx);
        printf(" %9.1f %7.2f", peer * 1e6, seconds / peer);
    }
    printf("\n");
    fflush(stdout);
}

/* --- linear ------------------------------------------------------------------------------- */

typedef struct {
    qv_weight *w, *w_blas;
    qv_tensor x, y;
} linear_ctx;

static void run_linear(void *ctx)
{
    linear_ctx *c = ctx;
    check(qv_op_linear(be, c->w, c->x, c->y));
}

static void run_linear_blas(void *ctx)
{
    linear_ctx *c = ctx;
    check(qv_op_linear(blas, c->w_blas, c->x, c->y));
}

static void bench_linear(const char *name, int64_t n_out, int64_t n_in, qv_dtype dtype)
{
    static const int64_t token_counts[] = {1, 2, 4, 8, 16, 64, 512};
    linear_ctx c;
    float *w = numbers(n_out * n_in);
    check(qv_weight_new(be, n_out, n_in, dtype, &c.w));
    check(qv_weight_new(blas, n_out, n_in, dtype, &c.w_blas));
    check(qv_weight_load(be, c.w, 0, n_out, w, QV_F32, n_in));
    check(qv_weight_load(blas, c.w_blas, 0, n_out, w, QV_F32, n_in));
    qv_backend_free(be, w);
    for (size_t i = 0; i < QV_ROWS(token_counts); i++) {
        int64_t n = token_counts[i];
        c.x = tensor_2d(n, n_in);
        c.y = tensor_2d(n, n_out);
        line l = {.op = "linear", .run = run_linear, .peer = run_linear_blas, .ctx = &c};
        l.bytes = (double)n_out * (double)n_in * (double)qv_dtype_size(dtype) +
                  4.0 * (double)n * (double)(n_in + n_out);
        l.flop = 2.0 * (double)n * (double)n_out * (double)n_in;
        report(&l, "%s [%lld,%lld] %s, %lld tok", name, (long long)n_out, (long long)n_in,
               qv_dtype_name(dtype), (long long)n);
        release(c.x);
        release(c.y);
    }
    qv_weight_free(be, c.w);
    qv_weight_free(blas, c.w_blas);
}

static void bench_linears(void)
{
    if (!wanted("linear"))
        return;
    bench_linear("tiny gate_up", 896, 192, QV_BF16);
    bench_linear("tiny down", 192, 448, QV_BF16);
    bench_linear("4B o_proj", 2560, 4096, QV_BF16);
    bench_linear("4B down", 2560, 9216, QV_BF16);
    bench_linear("4B o_proj", 2560, 4096, QV_F32);
}

/* --- Rows --------------------------------------------------------------------------------- */

typedef struct {
    qv_tensor x, z, w, y;
} rows_ctx;

static void run_rms_norm(void *ctx)
{
    rows_ctx *c = ctx;
    check(qv_op_rms_norm(be, c->x, c->w, 1e-6f, true, c->y));
}

static void run_add_rms_norm(void *ctx)
{
    rows_ctx *c = ctx;
    check(qv_op_add_rms_norm(be, c->x, c->z, c->w, 1e-6f, true, c->y, (qv_tensor){0}));
}

static void run_gated_rms_norm(void *ctx)
{
    rows_ctx *c = ctx;
    check(qv_op_gated_rms_norm(be, c->x, c->z, c->w, 1e-6f, false, c->y));
}

static void run_swiglu(void *ctx)
{
    rows_ctx *c = ctx;
    check(qv_op_swiglu(be, c->x, c->z, c->y));
}

static void run_add(void *ctx)
{
    rows_ctx *c = ctx;
    check(qv_op_add(be, c->x, c->z, (qv_tensor){0}));
}

static void run_sigmoid_gate(void *ctx)
{
    rows_ctx *c = ctx;
    check(qv_op_sigmoid_gate(be, c->x, c->z));
}

static void run_relu2(void *ctx)
{
    rows_ctx *c = ctx;
    check(qv_op_relu2(be, c->x, c->y));
}

/* n_arrays: how many arrays of [T, n, d] are read or written */
static void bench_rows(const char *op, run_fn *run, int n_dims, int64_t n_tokens, int64_t n,
                       int64_t d, int n_arrays)
{
    if (!wanted(op))
        return;
    rows_ctx c = {.x = tensor_3d(n_tokens, n, d),
                  .z = tensor_3d(n_tokens, n, d),
                  .y = tensor_3d(n_tokens, n, d),
                  .w = qv_tensor_1d(numbers(d), QV_F32, d)};
    float *x = c.x.data, *z = c.z.data, *y = c.y.data;
    for (int64_t i = 0; i < n_tokens * n * d; i++)
        z[i] +=
            20.0f; /* a sigmoid of 1: the op works in place, and x must not fade over the runs */
    if (n_dims == 2) {
        c.x = qv_tensor_2d(x, QV_F32, n_tokens, n * d);
        c.z = qv_tensor_2d(z, QV_F32, n_tokens, n * d);
        c.y = qv_tensor_2d(y, QV_F32, n_tokens, n * d);
    }
    line l = {.op = op, .run = run, .ctx = &c};
    l.bytes = 4.0 * n_arrays * (double)(n_tokens * n * d);
    report(&l, "[%lld, %lld, %lld]", (long long)n_tokens, (long long)n, (long long)d);
    release(c.x);
    release(c.z);
    release(c.y);
    release(c.w);
}

static void bench_all_rows(void)
{
    static const int64_t token_counts[] = {1, 64, 512};
    for (size_t i = 0; i < QV_ROWS(token_counts); i++) {
        int64_t n = token_counts[i];
        bench_rows("rms_norm", run_rms_norm, 2, n, 1, 2560, 2);
        bench_rows("add_rms_norm", run_add_rms_norm, 2, n, 1, 2560, 4);
        bench_rows("gated_rms_norm", run_gated_rms_norm, 3, n, 32, 128, 3);
        bench_rows("swiglu", run_swiglu, 2, n, 1, 9216, 3);
        bench_rows("sigmoid_gate", run_sigmoid_gate, 3, n, 16, 256, 3);
        bench_rows("relu2", run_relu2, 2, n, 1, 9216, 2);
        bench_rows("add", run_add, 2, n, 1, 2560, 3);
    }
}

/* --- Attention ---------------------------------------------------------------------------- */

typedef struct {
    qv_batch batch;
    qv_kv_layer kv;
    qv_attention_shape shape;
    qv_tensor q, k, v, o;
} attention_ctx;

static void run_attention(void *ctx)
{
    attention_ctx *c = ctx;
    check(qv_op_attention(be, &c->batch, &c->kv, 0.0625f, c->q, c->o));
}

static void run_rope(void *ctx)
{
    attention_ctx *c = ctx;
    check(qv_op_rope_kv_write(be, &c->batch, c->shape.rotary_dim, 1e7, c->q, c->k, c->v, &c->kv));
}

/* n_seqs sequences of n_past tokens get n_new more each. */
static void bench_attention(const qv_attention_shape *s, int32_t n_seqs, int32_t n_past,
                            int32_t n_new)
{
    if (!wanted("attention") && !wanted("rope_kv_write"))
        return;
    int32_t n = n_seqs * n_new, per_seq = (n_past + n_new + s->page_tokens - 1) / s->page_tokens;
    int32_t *pos = alloc(n * 4), *table = alloc(n_seqs * per_seq * 4),
            *start = alloc((n_seqs + 1) * 4);
    for (int32_t i = 0; i < n; i++)
        pos[i] = n_past + i % n_new;
    for (int32_t i = 0; i < n_seqs * per_seq; i++)
        table[i] = i;
    for (int32_t i = 0; i <= n_seqs; i++)
        start[i] = i * n_new;
    int64_t n_pages = (int64_t)n_seqs * per_seq, d = s->head_dim;
    int64_t pool_size = n_pages * s->page_tokens * s->n_kv_heads * d;
    attention_ctx c = {
        .batch = {.n_tokens = n,
                  .n_seqs = n_seqs,
                  .pos = pos,
                  .seq_start = start,
                  .page_table = table,
                  .page_stride = per_seq},
        .kv = {.k = qv_tensor_4d(numbers(pool_size), QV_F32, n_pages, s->page_tokens, s->n_kv_heads,
                                 d),
               .v = qv_tensor_4d(numbers(pool_size), QV_F32, n_pages, s->page_tokens, s->n_kv_heads,
                                 d),
               .page_tokens = s->page_tokens},
        .shape = *s,
        .q = tensor_3d(n, s->n_heads, d),
        .o = tensor_3d(n, s->n_heads, d),
        .k = tensor_3d(n, s->n_kv_heads, d),
        .v = tensor_3d(n, s->n_kv_heads, d),
    };
    double context = n_past + (n_new + 1) / 2.0;
    line l = {.op = "attention", .run = run_attention, .ctx = &c};
    l.flop = 4.0 * n * context * (double)(s->n_heads * d);
    l.bytes = 8.0 * n_seqs * (n_past + n_new) * (double)(s->n_kv_heads * d) +
              8.0 * n * (double)(s->n_heads * d);
    if (wanted(l.op))
        report(&l, "%lld/%lld heads of %lld, %d x %d+%d", (long long)s->n_heads,
               (long long)s->n_kv_heads, (long long)d, n_seqs, n_past, n_new);
    l = (line){.op = "rope_kv_write", .run = run_rope, .ctx = &c};
    l.bytes = 8.0 * n * (double)((s->n_heads + 2 * s->n_kv_heads) * d);
    if (wanted(l.op))
        report(&l, "%lld/%lld heads of %lld, %d tokens", (long long)s->n_heads,
               (long long)s->n_kv_heads, (long long)d, n);
    release(c.q);
    release(c.k);
    release(c.v);
    release(c.o);
    release(c.kv.k);
    release(c.kv.v);
    qv_backend_free(be, pos);
    qv_backend_free(be, table);
    qv_backend_free(be, start);
}

static void bench_attentions(void)
{
    for (int i = 0; i < 2; i++) { /* tiny, and 4B-like */
        const qv_attention_shape *s = &qv_attention_shapes[i];
        bench_attention(s, 1, 1023, 1);
        bench_attention(s, 16, 1023, 1);
        bench_attention(s, 1, 0, 512);
    }
    bench_attention(&qv_attention_shapes[1], 1, 8191, 1);
}

/* --- Recurrent layers --------------------------------------------------------------------- */

typedef struct {
    qv_batch batch;
    qv_tensor x, y, w, state;
    qv_gdn_args gdn;
    qv_ssd_args ssd;
} recurrent_ctx;

static void run_conv1d(void *ctx)
{
    recurrent_ctx *c = ctx;
    check(qv_op_conv1d(be, &c->batch, c->x, c->w, (qv_tensor){0}, c->state, c->y));
}

static void run_gdn(void *ctx)
{
    recurrent_ctx *c = ctx;
    check(qv_op_gdn(be, &c->batch, &c->gdn));
}

static void run_ssd(void *ctx)
{
    recurrent_ctx *c = ctx;
    check(qv_op_ssd(be, &c->batch, &c->ssd));
}

static qv_batch sequences(int32_t n_seqs, int32_t n_new)
{
    int32_t *pos = alloc(n_seqs * n_new * 4), *start = alloc((n_seqs + 1) * 4),
            *slot = alloc(n_seqs * 4);
    for (int32_t i = 0; i < n_seqs * n_new; i++)
        pos[i] = 100 + i % n_new;
    for (int32_t i = 0; i <= n_seqs; i++)
        start[i] = i * n_new;
    for (int32_t i = 0; i < n_seqs; i++)
        slot[i] = i;
    return (qv_batch){.n_tokens = n_seqs * n_new,
                      .n_seqs = n_seqs,
                      .pos = pos,
                      .seq_start = start,
                      .state_slot = slot};
}

static void release_batch(const qv_batch *b)
{
    qv_backend_free(be, (void *)b->pos);
    qv_backend_free(be, (void *)b->seq_start);
    qv_backend_free(be, (void *)b->state_slot);
}

static void bench_conv(const qv_conv_shape *s, int32_t n_seqs, int32_t n_new)
{
    if (!wanted("conv1d"))
        return;
    int64_t n = n_seqs * n_new, n_channels = s->n_channels;
    recurrent_ctx c = {.batch = sequences(n_seqs, n_new),
                       .x = tensor_2d(n, n_channels),
                       .y = tensor_2d(n, n_channels),
                       .w = tensor_2d(n_channels, s->n_taps),
                       .state = tensor_3d(n_seqs, n_channels, s->n_taps - 1)};
    line l = {.op = "conv1d", .run = run_conv1d, .ctx = &c};
    l.bytes =
        8.0 * (double)(n * n_channels) + 8.0 * (double)(n_seqs * n_channels * (s->n_taps - 1));
    report(&l, "%lld channels, %d x %d tokens", (long long)n_channels, n_seqs, n_new);
    release(c.x);
    release(c.y);
    release(c.w);
    release(c.state);
    release_batch(&c.batch);
}

static void bench_gdn(const qv_gdn_shape *s, int32_t n_seqs, int32_t n_new)
{
    if (!wanted("gdn"))
        return;
    int64_t n = n_seqs * n_new;
    recurrent_ctx c = {.batch = sequences(n_seqs, n_new)};
    float *gates = numbers(s->n_v_heads);
    c.gdn = (qv_gdn_args){
        .q = tensor_3d(n, s->n_k_heads, s->d_k),
        .k = tensor_3d(n, s->n_k_heads, s->d_k),
        .v = tensor_3d(n, s->n_v_heads, s->d_v),
        .a = tensor_2d(n, s->n_v_heads),
        .b = tensor_2d(n, s->n_v_heads),
        .a_log = qv_tensor_1d(gates, QV_F32, s->n_v_heads),
        .o = tensor_3d(n, s->n_v_heads, s->d_v),
        .dt_bias = qv_tensor_1d(gates, QV_F32, s->n_v_heads),
    };
    c.gdn.state = qv_tensor_4d(numbers(n_seqs * s->n_v_heads * s->d_k * s->d_v), QV_F32, n_seqs,
                               s->n_v_heads, s->d_k, s->d_v);
    double cells = (double)(s->n_v_heads * s->d_k * s->d_v);
    line l = {.op = "gdn", .run = run_gdn, .ctx = &c};
    l.bytes = 8.0 * n_seqs * cells;
    l.flop = 7.0 * (double)n * cells; /* S^T k, decay and update, S^T q */
    report(&l, "%lld heads %lldx%lld, %d x %d tokens", (long long)s->n_v_heads, (long long)s->d_k,
           (long long)s->d_v, n_seqs, n_new);
    release(c.gdn.q);
    release(c.gdn.k);
    release(c.gdn.v);
    release(c.gdn.a);
    release(c.gdn.b);
    release(c.gdn.o);
    release(c.gdn.state);
    qv_backend_free(be, gates);
    release_batch(&c.batch);
}

static void bench_ssd(const qv_ssd_shape *s, int32_t n_seqs, int32_t n_new)
{
    if (!wanted("ssd"))
        return;
    int64_t n = n_seqs * n_new;
    recurrent_ctx c = {.batch = sequences(n_seqs, n_new)};
    qv_tensor head = qv_tensor_1d(numbers(s->n_heads), QV_F32, s->n_heads);
    c.ssd = (qv_ssd_args){
        .x = tensor_3d(n, s->n_heads, s->d),
        .b = tensor_3d(n, s->n_groups, s->n_state),
        .c = tensor_3d(n, s->n_groups, s->n_state),
        .dt = tensor_2d(n, s->n_heads),
        .a_log = head,
        .dt_bias = head,
        .d_skip = head,
        .dt_max = INFINITY,
        .y = tensor_3d(n, s->n_heads, s->d),
    };
    int64_t cells = s->n_heads * s->d * s->n_state;
    c.ssd.state =
        qv_tensor_4d(numbers(n_seqs * cells), QV_F32, n_seqs, s->n_heads, s->d, s->n_state);
    line l = {.op = "ssd", .run = run_ssd, .ctx = &c};
    l.bytes = 8.0 * n_seqs * (double)cells;
    l.flop = 5.0 * (double)(n * cells); /* decay, update, S C */
    report(&l, "%lld heads %lldx%lld, %d x %d tokens", (long long)s->n_heads, (long long)s->d,
           (long long)s->n_state, n_seqs, n_new);
    release(c.ssd.x);
    release(c.ssd.b);
    release(c.ssd.c);
    release(c.ssd.dt);
    release(c.ssd.y);
    release(c.ssd.state);
    release(head);
    release_batch(&c.batch);
}

static void bench_recurrent(void)
{
    for (int i = 0; i < 2; i++) { /* tiny, and 4B-like */
        bench_conv(&qv_conv_shapes[i], 1, 1);
        bench_conv(&qv_conv_shapes[i], 16, 1);
        bench_conv(&qv_conv_shapes[i], 1, 512);
        bench_gdn(&qv_gdn_shapes[i], 1, 1);
        bench_gdn(&qv_gdn_shapes[i], 16, 1);
        bench_gdn(&qv_gdn_shapes[i], 1, 512);
        bench_ssd(&qv_ssd_shapes[i], 1, 1);
        bench_ssd(&qv_ssd_shapes[i], 16, 1);
        bench_ssd(&qv_ssd_shapes[i], 1, 512);
    }
}

/* --- LoRA --------------------------------------------------------------------------------- */

enum { LORA_SLOTS = 4, LORA_RANK = 16 };

typedef struct {
    qv_lora_site site;
    qv_tensor x, y, scratch;
    int32_t seg_start[LORA_SLOTS + 1], seg_slot[LORA_SLOTS];
} lora_ctx;

static void run_lora(void *ctx)
{
    lora_ctx *c = ctx;
    check(qv_op_lora(be, &c->site, LORA_SLOTS, c->seg_start, c->seg_slot, c->x, c->scratch, c->y));
}

/* n_tokens split evenly over four adapters of rank 16 on every slice. */
static void bench_lora(const char *name, int64_t n_in, int32_t n_slices, const int64_t *slice_rows,
                       int32_t n_tokens)
{
    static uint8_t active[LORA_SLOTS] = {1, 1, 1, 1};
    int64_t slice_start[6] = {0};
    if (!wanted("lora"))
        return;
    for (int32_t i = 0; i < n_slices; i++)
        slice_start[i + 1] = slice_start[i] + slice_rows[i];
    int64_t n_out = slice_start[n_slices];
    qv_lora_slice *slices = alloc(LORA_SLOTS * n_slices * (int64_t)sizeof *slices);
    for (int32_t i = 0; i < LORA_SLOTS * n_slices; i++)
        slices[i] = (qv_lora_slice){.plane = i % n_slices, .rank = LORA_RANK, .scale = 0.5f};
    lora_ctx c = {
        .site = {.n_in = n_in,
                 .n_out = n_out,
                 .n_slices = n_slices,
                 .n_slots = LORA_SLOTS,
                 .max_rank = LORA_RANK,
                 .slice_start = slice_start,
                 .slices = slices,
                 .slot_active = active,
                 .a = qv_tensor_4d(numbers(LORA_SLOTS * n_slices * LORA_RANK * n_in), QV_F32,
                                   LORA_SLOTS, n_slices, LORA_RANK, n_in),
                 .b = tensor_3d(LORA_SLOTS, LORA_RANK, n_out)},
        .x = tensor_2d(n_tokens, n_in),
        .y = tensor_2d(n_tokens, n_out),
        .scratch = tensor_3d(n_tokens, n_slices, LORA_RANK),
    };
    int32_t n_used = 0;
    for (int32_t i = 0; i < LORA_SLOTS; i++) {
        c.seg_slot[i] = i;
        c.seg_start[i + 1] = (i + 1) * n_tokens / LORA_SLOTS;
        n_used += c.seg_start[i + 1] > c.seg_start[i];
    }
    double pair = LORA_RANK * (double)(n_slices * n_in + n_out);
    line l = {.op = "lora", .run = run_lora, .ctx = &c};
    l.flop = 2.0 * n_tokens * pair;
    l.bytes = 4.0 * n_used * pair + 4.0 * n_tokens * (double)(n_in + 2 * n_out);
    report(&l, "%s [%lld,%lld], %d tok", name, (long long)n_out, (long long)n_in, n_tokens);
    release(c.site.a);
    release(c.site.b);
    release(c.x);
    release(c.y);
    release(c.scratch);
    qv_backend_free(be, slices);
}

static void bench_loras(void)
{
    static const int32_t token_counts[] = {1, 4, 64, 512};
    static const int64_t tiny[] = {448, 448}, large[] = {9216, 9216}, out[] = {2560};
    for (size_t i = 0; i < QV_ROWS(token_counts); i++) {
        bench_lora("tiny gate_up", 192, 2, tiny, token_counts[i]);
        bench_lora("4B gate_up", 2560, 2, large, token_counts[i]);
        bench_lora("4B o_proj", 4096, 1, out, token_counts[i]);
    }
}

/* --- Mixture of experts ------------------------------------------------------------------- */

enum { MOE_EXPERTS = 64, MOE_K = 8, MOE_D = 2048, MOE_UP = 1024 };

/* The up-projection of 64 experts like Qwen3.5-35B-A3B's, and the weighted sum of as many rows as
 * its down-projection gives; all tokens have one adapter of rank 16, per expert or sharing A. */
typedef struct {
    qv_router router;
    qv_weight *w;
    void *memory;
    qv_moe_list list;
    qv_moe_lora_slot slot;
    qv_moe_lora_site site;
    qv_tensor logits, ids, weights, x, h, o, scratch, y;
    int32_t seg_start[2], seg_slot[1];
} moe_ctx;

static void run_router(void *ctx)
{
    moe_ctx *c = ctx;
    check(qv_op_router(be, &c->router, c->logits, c->ids, c->weights));
}

static void run_moe_route(void *ctx)
{
    moe_ctx *c = ctx;
    check(qv_op_moe_route(be, c->ids, 1, c->seg_start, c->seg_slot, &c->list));
}

static void run_moe_linear(void *ctx)
{
    moe_ctx *c = ctx;
    check(qv_op_moe_linear(be, c->w, &c->list, c->x, QV_MOE_TOKENS, c->h));
}

static void run_moe_lora(void *ctx)
{
    moe_ctx *c = ctx;
    check(qv_op_moe_lora(be, &c->site, &c->list, c->x, QV_MOE_TOKENS, c->scratch, c->h));
}

static void run_moe_combine(void *ctx)
{
    moe_ctx *c = ctx;
    check(qv_op_moe_combine(be, &c->list, c->weights, c->o, NULL, (qv_tensor){0}, c->y));
}

static void report_moe(const char *op, run_fn *run, moe_ctx *c, double bytes, double flop)
{
    line l = {.op = op, .run = run, .ctx = c, .bytes = bytes, .flop = flop};
    if (wanted(op))
        report(&l, "%d of %d experts, %lld tok%s", MOE_K, MOE_EXPERTS, (long long)c->x.shape[0],
               c->slot.a_shared ? ", A shared" : "");
}

static void bench_moe(moe_ctx *c, int64_t n)
{
    int64_t n_pairs = n * MOE_K;
    c->seg_start[1] = (int32_t)n;
    c->logits = tensor_2d(n, MOE_EXPERTS);
    c->ids = qv_tensor_2d(alloc(n_pairs * 4), QV_I32, n, MOE_K);
    c->weights = tensor_2d(n, MOE_K);
    c->x = tensor_2d(n, MOE_D);
    c->h = tensor_2d(n_pairs, MOE_UP);
    c->o = tensor_2d(n_pairs, MOE_D);
    c->scratch = tensor_3d(n_pairs, 2, LORA_RANK);
    c->y = tensor_2d(n, MOE_D);
    run_router(c);
    run_moe_route(c);
    double n_used = 0;
    for (int32_t e = 0; e < MOE_EXPERTS; e++)
        n_used += c->list.expert_start[e + 1] > c->list.expert_start[e];
    report_moe("router", run_router, c, 4.0 * (double)n * (MOE_EXPERTS + 2 * MOE_K), 0);
    report_moe("moe_route", run_moe_route, c, 12.0 * (double)n_pairs, 0);
    report_moe("moe_linear", run_moe_linear, c,
               2.0 * n_used * MOE_UP * MOE_D + 4.0 * (double)(n * MOE_D + n_pairs * MOE_UP),
               2.0 * (double)n_pairs * MOE_UP * MOE_D);
    for (c->slot.a_shared = 0; c->slot.a_shared < 2; c->slot.a_shared++) {
        double n_a = c->slot.a_shared ? 1 : n_used,
               n_shrinks = (double)(c->slot.a_shared ? n : n_pairs);
        report_moe("moe_lora", run_moe_lora, c,
                   4.0 * LORA_RANK * (2 * n_a * MOE_D + n_used * MOE_UP) +
                       4.0 * (double)(n * MOE_D + 2 * n_pairs * MOE_UP),
                   2.0 * LORA_RANK * (2 * n_shrinks * MOE_D + (double)n_pairs * MOE_UP));
    }
    c->slot.a_shared = 0;
    report_moe("moe_combine", run_moe_combine, c, 4.0 * (double)((n_pairs + n) * MOE_D),
               2.0 * (double)n_pairs * MOE_D);
    qv_tensor all[] = {c->logits, c->ids, c->weights, c->x, c->h, c->o, c->scratch, c->y};
    for (size_t i = 0; i < QV_ROWS(all); i++)
        release(all[i]);
}

static void bench_moes(void)
{
    static const int64_t token_counts[] = {1, 16, 512}, slice_start[] = {0, MOE_UP / 2, MOE_UP};
    static const uint8_t active[] = {1};
    static moe_ctx c;
    if (!wanted("router") && !wanted("moe"))
        return;
    float *w = numbers(MOE_UP * MOE_D);
    check(qv_weight_new_experts(be, MOE_EXPERTS, MOE_UP, MOE_D, QV_BF16, &c.w));
    for (int64_t e = 0; e < MOE_EXPERTS; e++)
        check(qv_weight_load_expert(be, c.w, e, 0, MOE_UP, w, QV_F32, MOE_D));
    qv_backend_free(be, w);
    qv_lora_slice *slices = alloc(MOE_EXPERTS * 2 * (int64_t)sizeof *slices);
    for (int32_t i = 0; i < MOE_EXPERTS * 2; i++)
        slices[i] = (qv_lora_slice){.plane = i % 2, .rank = LORA_RANK, .scale = 0.5f};
    c.router = (qv_router){.kind = QV_ROUTER_SOFTMAX,
                           .top_k = MOE_K,
                           .normalize = true,
                           .scale = 1,
                           .n_groups = 1,
                           .topk_groups = 1};
    c.slot = (qv_moe_lora_slot){.a = numbers(MOE_EXPERTS * 2 * LORA_RANK * MOE_D),
                                .b = numbers(MOE_EXPERTS * MOE_UP * LORA_RANK),
                                .slices = slices,
                                .max_rank = LORA_RANK};
    c.site = (qv_moe_lora_site){.n_in = MOE_D,
                                .n_out = MOE_UP,
                                .n_experts = MOE_EXPERTS,
                                .n_slices = 2,
                                .n_slots = 1,
                                .max_rank = LORA_RANK,
                                .slice_start = slice_start,
                                .slots = &c.slot,
                                .slot_active = active};
    c.memory = alloc((int64_t)qv_moe_list_bytes(MOE_EXPERTS, MOE_K, 512));
    check(qv_moe_list_init(&c.list, MOE_EXPERTS, MOE_K, 512, c.memory));
    for (size_t i = 0; i < QV_ROWS(token_counts); i++)
        bench_moe(&c, token_counts[i]);
    qv_weight_free(be, c.w);
    qv_backend_free(be, c.memory);
    qv_backend_free(be, c.slot.a);
    qv_backend_free(be, c.slot.b);
    qv_backend_free(be, slices);
}

/* --- Sampling ----------------------------------------------------------------------------- */

typedef struct {
    qv_tensor logits;
    qv_sample_row rows[16];
    qv_sample_result results[16];
} sample_ctx;

static void run_sample(void *ctx)
{
    sample_ctx *c = ctx;
    check(qv_op_sample(be, c->logits, (int32_t)c->logits.shape[1], c->rows, c->results));
}

static void bench_samples(void)
{
    static const struct {
        const char *name;
        float temperature, top_p;
        int32_t top_k, n_top;
    } kinds[] = {
        {"greedy", 0, 1, 0, -1},         {"greedy, 20 alternatives", 0, 1, 0, 20},
        {"temperature", 1, 1, 0, -1},    {"top-k 20, top-p 0.95", 0.7f, 0.95f, 20, -1},
        {"top-p 0.95", 1, 0.95f, 0, -1},
    };
    static const int32_t vocabs[] = {1600, 248320};
    if (!wanted("sample"))
        return;
    for (int v = 0; v < 2; v++)
        for (size_t k = 0; k < QV_ROWS(kinds); k++)
            for (int32_t n = 1; n <= 16; n += 15) {
                static sample_ctx c;
                c.logits = tensor_2d(n, vocabs[v]);
                float *x = c.logits.data; /* a long tail below a few likely tokens */
                for (int64_t i = 0; i < n * (int64_t)vocabs[v]; i++)
                    x[i] = -logf(x[i] + 0.5000001f) * 1.5f;
                for (int32_t i = 0; i < n; i++)
                    c.rows[i] = (qv_sample_row){.target = -1,
                                                .temperature = kinds[k].temperature,
                                                .top_k = kinds[k].top_k,
                                                .top_p = kinds[k].top_p,
                                                .repetition_penalty = 1,
                                                .n_top = kinds[k].n_top,
                                                .seed = (uint64_t)i};
                line l = {.op = "sample", .run = run_sample, .ctx = &c};
                l.bytes = 4.0 * n * vocabs[v];
                report(&l, "%s [%d, %d]", kinds[k].name, n, vocabs[v]);
                release(c.logits);
            }
}

/* --- Program ------------------------------------------------------------------------------ */

static void parse(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--help") == 0) {
            fputs(usage, stdout);
            exit(0);
        } else if (strcmp(argv[i], "--quick") == 0) {
            settings.seconds = 0.03;
        } else if (strcmp(argv[i], "--threads") == 0 && value) {
            settings.n_threads = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--isa") == 0 && value) {
            settings.isa = argv[++i];
        } else if (strcmp(argv[i], "--only") == 0 && value) {
            settings.only = argv[++i];
        } else {
            fprintf(stderr, "bench_ops: what is '%s'?\n\n%s", argv[i], usage);
            exit(2);
        }
    }
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    qv_backend_options options = {
        .name = "cpu", .n_threads = settings.n_threads, .isa = settings.isa};
    check(qv_backend_open(&options, &be));
    options.gemm = "openblas";
    check(qv_backend_open(&options, &blas));
    check(qv_pool_new(settings.n_threads, &pool));
    check(qv_backend_reserve(be, &(qv_backend_limits){.max_logits = 16, .n_vocab = 248320}));
    measure_machine();
    bench_linears();
    bench_all_rows();
    bench_attentions();
    bench_recurrent();
    bench_loras();
    bench_moes();
    bench_samples();
    qv_pool_free(pool);
    qv_backend_close(blas);
    qv_backend_close(be);
    return 0;
}
