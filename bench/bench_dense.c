/* bench_dense: the dense ops of the CUDA backend at shapes of released models, each with the bytes
 * and FLOP that it cannot do without, the time these take at the rates of a large copy and a large
 * matrix product measured in the same run, the time measured, and the ratio of the two.
 *
 *   bench_dense [TABLE...]    linear norm rope attention sample decode; all without arguments
 *   bench_dense forms         products of decode by each form of the kernel for them, best first
 *
 * Times are medians over replays of a graph of many calls, so that neither launches nor the host
 * are in them; calls go round over copies of what a step would have to read from memory.
 */
#include "bench/gpu_bench.h"
#include "ops/cuda/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROUNDS = 32, MAX_COPIES = ROUNDS };

static qv_backend *be;
static bench_rates rates;

/* Median seconds of one call. */
static double measure(bench_call *call, void *ctx)
{
    return bench_time(qv_cuda(be)->stream, call, ctx, ROUNDS);
}

static void report(const char *name, double bytes, double flop, double t)
{
    double floor = bench_floor(&rates, bytes, flop);
    printf("%-44s %9.2f MB %9.2f GFLOP  floor %8.2f us  time %8.2f us  ratio %5.2f\n", name,
           bytes * 1e-6, flop * 1e-9, floor * 1e6, t * 1e6, t / floor);
    fflush(stdout);
}

/* --- Linear ------------------------------------------------------------------------------- */

typedef struct {
    qv_weight *w[MAX_COPIES];
    int n;
    qv_tensor x, y;
    bool ours;
} linear_ctx;

static void call_linear(void *ctx, int round)
{
    linear_ctx *c = ctx;
    const qv_weight *w = c->w[round % c->n];
    if (!c->ours) {
        bench_pass(c->y.dtype == QV_F32 ? qv_op_linear_f32(be, w, c->x, (qv_tensor){0}, c->y)
                                        : qv_op_linear(be, w, c->x, c->y));
        return;
    }
    const qv_k_linear_args args = {.w = qv_cuda_weight_of(w)->data,
                                   .x = c->x.data,
                                   .y = c->y.data,
                                   .n_tokens = c->x.shape[0],
                                   .n_out = w->n_out,
                                   .n_in = w->n_in,
                                   .x_stride = c->x.stride[0],
                                   .y_stride = c->y.stride[0],
                                   .y_f32 = c->y.dtype == QV_F32};
    bench_pass(qv_k_skinny_linear(&args, qv_cuda(be)->stream));
}

static void bench_linear(void)
{
    static const struct {
        const char *name;
        int64_t n_out, n_in;
        bool f32;
    } shapes[] = {{"4B in_proj", 12352, 2560, false},  {"4B qkv", 10240, 2560, false},
                  {"4B out", 2560, 4096, false},       {"4B gate_up", 18432, 2560, false},
                  {"4B down", 2560, 9216, false},      {"4B head", 248320, 2560, true},
                  {"35B in_proj", 12352, 2048, false}, {"35B router", 256, 2048, true}};
    static const int64_t counts[] = {1, 8, 16, 32, 64, 128, 256, 8192};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (size_t j = 0; j < sizeof counts / sizeof *counts; j++) {
            int64_t n = counts[j], n_out = shapes[i].n_out, n_in = shapes[i].n_in;
            if (shapes[i].f32 && n > 256)
                continue;
            qv_dtype y_dtype = shapes[i].f32 ? QV_F32 : QV_BF16;
            double w_bytes = 2.0 * (double)(n_out * n_in);
            linear_ctx c = {.n = n > 256 ? 1 : bench_copies(w_bytes, MAX_COPIES)};
            for (int k = 0; k < c.n; k++) {
                bench_pass(qv_weight_new(be, n_out, n_in, QV_BF16, &c.w[k]));
                bench_pass(qv_weight_fill(be, c.w[k], 0.02f, (uint64_t)k));
            }
            c.x = qv_tensor_2d(bench_made_up(QV_BF16, n * n_in, 1), QV_BF16, n, n_in);
            c.y = qv_tensor_2d(bench_made_up(y_dtype, n * n_out, 1), y_dtype, n, n_out);
            double bytes = w_bytes + 2.0 * (double)(n * n_in) +
                           (double)(n * n_out) * (double)qv_dtype_size(y_dtype);
            double flop = 2.0 * (double)(n * n_out) * (double)n_in;
            for (int ours = 0; ours <= (n <= QV_K_SKINNY_TOKENS); ours++) {
                char name[96];
                c.ours = ours;
                snprintf(name, sizeof name, "linear %s, %lld tokens%s", shapes[i].name,
                         (long long)n, ours ? ", skinny" : "");
                report(name, bytes, flop, measure(call_linear, &c));
            }
            for (int k = 0; k < c.n; k++)
                qv_weight_free(be, c.w[k]);
            bench_free(c.x.data);
            bench_free(c.y.data);
        }
}

/* --- Norms, gates, RoPE ------------------------------------------------------------------- */

typedef struct {
    qv_tensor x[MAX_COPIES], y[MAX_COPIES], w;
    qv_tensor residual[MAX_COPIES], delta[MAX_COPIES]; /* F32 */
    int n, what;
} norm_ctx;

enum { RMS_NORM, ADD_RMS_NORM, ADD_WITH_REST, SWIGLU, SIGMOID_GATE, RELU2 };

static void call_norm(void *ctx, int round)
{
    norm_ctx *c = ctx;
    qv_tensor x = c->x[round % c->n], y = c->y[round % c->n];
    switch (c->what) {
    case RMS_NORM:
        bench_pass(qv_op_rms_norm(be, x, c->w, 1e-6f, true, y));
        break;
    case ADD_RMS_NORM:
    case ADD_WITH_REST:
        bench_pass(qv_op_add_rms_norm(be, c->residual[round % c->n], c->delta[round % c->n], c->w,
                                      1e-6f, true, y,
                                      c->what == ADD_WITH_REST ? x : (qv_tensor){0}));
        break;
    case SWIGLU:
        bench_pass(qv_op_swiglu(be, x, y, y));
        break;
    case SIGMOID_GATE:
        bench_pass(qv_op_sigmoid_gate(be, qv_tensor_split(y, 1, y.shape[1]),
                                      qv_tensor_split(x, 1, x.shape[1])));
        break;
    default:
        bench_pass(qv_op_relu2(be, x, y));
        break;
    }
}

/* Rows of the 4B, of the 35B (2048), of Nano (2688) and of a 9B (4096). */
static void bench_norm(void)
{
    static const struct {
        const char *name;
        int what;
        double streams; /* of 2 bytes a number */
        int64_t width;
    } ops[] = {
        {"rms_norm", RMS_NORM, 2, 2560},
        {"add_rms_norm", ADD_RMS_NORM, 7, 2560},
        {"add_rms_norm", ADD_RMS_NORM, 7, 2048},
        {"add_rms_norm", ADD_RMS_NORM, 7, 2688},
        {"add_rms_norm", ADD_RMS_NORM, 7, 4096},
        {"add_rms_norm with a rest", ADD_WITH_REST, 8, 2048},
        {"add_rms_norm with a rest", ADD_WITH_REST, 8, 2688},
        {"swiglu", SWIGLU, 3, 9216},
        {"sigmoid_gate", SIGMOID_GATE, 3, 4096},
        {"relu2", RELU2, 2, 3712},
    };
    static const int64_t counts[] = {1, 64, 256, 8192};
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        for (size_t j = 0; j < sizeof counts / sizeof *counts; j++) {
            int64_t n = counts[j], d = ops[i].width;
            norm_ctx c = {.what = ops[i].what, .n = n > 1024 ? 4 : 8};
            c.w = qv_tensor_1d(bench_made_up(QV_F32, d, 1), QV_F32, d);
            for (int k = 0; k < c.n; k++) {
                c.x[k] = qv_tensor_2d(bench_made_up(QV_BF16, n * d, 1), QV_BF16, n, d);
                c.y[k] = qv_tensor_2d(bench_made_up(QV_BF16, n * d, 1), QV_BF16, n, d);
                c.residual[k] = qv_tensor_2d(bench_made_up(QV_F32, n * d, 1), QV_F32, n, d);
                c.delta[k] = qv_tensor_2d(bench_made_up(QV_F32, n * d, 0), QV_F32, n, d);
            }
            char name[96];
            snprintf(name, sizeof name, "%s [%lld, %lld]", ops[i].name, (long long)n, (long long)d);
            report(name, ops[i].streams * 2 * (double)(n * d), 0, measure(call_norm, &c));
            for (int k = 0; k < c.n; k++) {
                bench_free(c.x[k].data);
                bench_free(c.y[k].data);
                bench_free(c.residual[k].data);
                bench_free(c.delta[k].data);
            }
            bench_free(c.w.data);
        }
}

/* --- Attention ---------------------------------------------------------------------------- */

typedef enum { ROPE, NORM_ROPE, ATTENTION, GATED } attention_kind;

typedef struct {
    qv_batch batch;
    qv_kv_layer kv[MAX_COPIES];
    int n;
    qv_tensor q, o, k, v, gate;
    qv_norm_rope how;
    attention_kind kind;
} attention_ctx;

static void call_attention(void *ctx, int round)
{
    attention_ctx *c = ctx;
    const qv_kv_layer *kv = &c->kv[round % c->n];
    switch (c->kind) {
    case ROPE:
        bench_pass(qv_op_rope_kv_write(be, &c->batch, 64, 1e7, c->q, c->k, c->v, kv));
        break;
    case NORM_ROPE:
        bench_pass(qv_op_norm_rope_kv_write(be, &c->batch, &c->how, c->q, c->k, c->v, kv));
        break;
    case ATTENTION:
        bench_pass(qv_op_attention(be, &c->batch, kv, 0.0625f, c->q, c->o));
        break;
    case GATED:
        bench_pass(qv_op_gated_attention(be, &c->batch, kv, 0.0625f, c->q, c->gate, c->o));
        break;
    }
}

/* One step of a model by one kind of op. */
static void report_attention(const char *step, attention_ctx *c, double kv_bytes, double pairs)
{
    static const char *const names[] = {"rope", "norms and rope", "attention", "gated attention"};
    int64_t n = c->q.shape[0], d = c->q.shape[2], q = n * c->q.shape[1] * d,
            kv = n * c->k.shape[1] * d;
    double bytes[] = {4.0 * (double)q * 64 / (double)d + 8.0 * (double)kv,
                      4.0 * (double)q + 8.0 * (double)kv, 4.0 * (double)q + kv_bytes,
                      6.0 * (double)q + kv_bytes};
    double flop = c->kind < ATTENTION ? 0 : 4 * pairs * (double)(c->q.shape[1] * d);
    char name[128];
    snprintf(name, sizeof name, "%s %s", names[c->kind], step);
    report(name, bytes[c->kind], flop, measure(call_attention, c));
}

static void bench_attention(bool rope)
{
    static const struct {
        const char *name;
        int64_t heads, kv, d;
    } models[] = {{"4B", 16, 4, 256}, {"35B", 16, 2, 256}, {"Nano", 32, 2, 128}};
    static const struct {
        int32_t n_seqs, before, now;
    } steps[] = {{1, 2047, 1},  {16, 2047, 1}, {64, 2047, 1}, {256, 2047, 1},
                 {1, 65535, 1}, {1, 0, 8192},  {8, 0, 1024},  {1, 8192, 2048}};
    for (size_t m = 0; m < sizeof models / sizeof *models; m++)
        for (size_t s = 0; s < sizeof steps / sizeof *steps; s++) {
            int32_t n_seqs = steps[s].n_seqs, now = steps[s].now, n = n_seqs * now;
            int32_t context = steps[s].before + now, pages = (context + 15) / 16;
            int64_t heads = models[m].heads, kv = models[m].kv, d = models[m].d;
            int32_t *host = calloc((size_t)(n + n_seqs + 1 + n_seqs * pages), sizeof *host);
            int32_t *pos = host, *start = host + n, *table = start + n_seqs + 1;
            for (int32_t i = 0; i < n; i++)
                pos[i] = steps[s].before + i % now;
            for (int32_t i = 0; i <= n_seqs; i++)
                start[i] = i * now;
            for (int32_t i = 0; i < n_seqs * pages; i++)
                table[i] = (int32_t)((int64_t)i * 7919 % (n_seqs * pages));
            qv_batch batch = {.n_tokens = n,
                              .n_seqs = n_seqs,
                              .pos = pos,
                              .seq_start = start,
                              .page_table = table,
                              .page_stride = pages};
            attention_ctx c = {.kind = rope ? ROPE : ATTENTION};
            bench_pass(qv_backend_put_batch(be, &batch, &c.batch));
            int64_t pool = (int64_t)n_seqs * pages * 16 * kv * d;
            double kv_bytes = 4.0 * (double)pool;
            c.n = bench_copies(kv_bytes, 8);
            for (int k = 0; k < c.n; k++)
                c.kv[k] = (qv_kv_layer){qv_tensor_4d(bench_made_up(QV_BF16, pool, 1), QV_BF16,
                                                     n_seqs * pages, 16, kv, d),
                                        qv_tensor_4d(bench_made_up(QV_BF16, pool, 1), QV_BF16,
                                                     n_seqs * pages, 16, kv, d),
                                        16};
            c.q = qv_tensor_3d(bench_made_up(QV_BF16, n * heads * d, 1), QV_BF16, n, heads, d);
            c.o = qv_tensor_3d(bench_made_up(QV_BF16, n * heads * d, 1), QV_BF16, n, heads, d);
            c.k = qv_tensor_3d(bench_made_up(QV_BF16, n * kv * d, 1), QV_BF16, n, kv, d);
            c.v = qv_tensor_3d(bench_made_up(QV_BF16, n * kv * d, 1), QV_BF16, n, kv, d);
            c.gate = qv_tensor_3d(bench_made_up(QV_BF16, n * heads * d, 1), QV_BF16, n, heads, d);
            qv_tensor w = qv_tensor_1d(bench_made_up(QV_F32, d, 1), QV_F32, d);
            c.how = (qv_norm_rope){w, w, 1e-6f, true, 64, 1e7};
            char name[96];
            snprintf(name, sizeof name, "%s, %d x %d tokens after %d", models[m].name, n_seqs, now,
                     steps[s].before);
            double seen = ((double)steps[s].before + 0.5 * (now + 1)) * n; /* (query, key) pairs */
            report_attention(name, &c, kv_bytes, seen);
            c.kind++; /* the other kind of the table */
            report_attention(name, &c, kv_bytes, seen);
            for (int k = 0; k < c.n; k++) {
                bench_free(c.kv[k].k.data);
                bench_free(c.kv[k].v.data);
            }
            bench_free(c.q.data);
            bench_free(c.o.data);
            bench_free(c.k.data);
            bench_free(c.v.data);
            bench_free(c.gate.data);
            bench_free(w.data);
            free(host);
        }
}

/* --- Sampling ----------------------------------------------------------------------------- */

/* A row like a model's: bell-shaped, with a few favourites. */
static void upload_logits(qv_tensor t)
{
    int64_t n = t.shape[1];
    float *row = malloc((size_t)n * sizeof *row);
    for (int64_t i = 0; i < t.shape[0]; i++) {
        for (int64_t j = 0; j < n && i == 0; j++) {
            float sum = 0;
            for (uint64_t k = 0; k < 6; k++)
                sum += qv_made_up(7, (uint64_t)j * 6 + k);
            row[j] = 1.8f * sum;
        }
        for (int64_t j = 0; j < 40; j++)
            row[(i * 977 + j * 6007) % n] = 10 + 0.2f * (float)j;
        bench_pass(qv_backend_upload(be, (float *)t.data + i * n, row, (size_t)n * sizeof *row));
    }
    free(row);
}

/* Timed with its copies and the host's part, since that is how a step has it. */
static double time_sample(qv_tensor logits, const qv_sample_row *rows, qv_sample_result *results)
{
    enum { REPS = 15 };
    double times[REPS];
    for (int i = -2; i < REPS; i++) {
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        bench_pass(qv_op_sample(be, logits, (int32_t)logits.shape[1], rows, results));
        clock_gettime(CLOCK_MONOTONIC, &b);
        if (i >= 0)
            times[i] = (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) * 1e-9;
    }
    return bench_median(times, REPS);
}

static void bench_sample(void)
{
    static const int64_t counts[] = {1, 4, 16, 64, 256};
    enum { VOCAB = 248320 };
    bench_pass(qv_backend_reserve(be, &(qv_backend_limits){.max_logits = 256, .n_vocab = VOCAB}));
    for (int kind = 0; kind < 3; kind++)
        for (size_t j = 0; j < sizeof counts / sizeof *counts; j++) {
            static const char *const names[] = {"greedy", "temperature", "top-k 50, top-p 0.9"};
            int64_t n = counts[j];
            qv_tensor logits = qv_tensor_2d(bench_made_up(QV_F32, n * VOCAB, 10), QV_F32, n, VOCAB);
            upload_logits(logits);
            qv_sample_row *rows = calloc((size_t)n, sizeof *rows);
            qv_sample_result *results = calloc((size_t)n, sizeof *results);
            for (int64_t i = 0; i < n; i++)
                rows[i] = (qv_sample_row){.target = -1,
                                          .temperature = kind > 0,
                                          .top_k = kind > 1 ? 50 : 0,
                                          .top_p = kind > 1 ? 0.9f : 1.0f,
                                          .repetition_penalty = 1,
                                          .seed = (uint64_t)i,
                                          .n_top = -1};
            char name[96];
            snprintf(name, sizeof name, "sample %s, %lld rows", names[kind], (long long)n);
            report(name, 4.0 * (double)n * VOCAB, 0, time_sample(logits, rows, results));
            free(rows);
            free(results);
            bench_free(logits.data);
        }
}

/* --- Products of decode with their adapters ------------------------------------------------- */

typedef struct {
    const char *name;
    int64_t n_in;
    int32_t n_slices, n_planes; /* slices of one module share a plane: the first ones do */
    int64_t rows[6];
} decode_shape;

static const decode_shape decode_shapes[] = {
    {"4B in_proj", 2560, 6, 4, {2048, 2048, 4096, 4096, 32, 32}},
    {"4B qkv", 2560, 3, 3, {8192, 1024, 1024}},
    {"4B out", 4096, 1, 1, {2560}},
    {"4B gate_up", 2560, 2, 2, {9216, 9216}},
    {"4B down", 9216, 1, 1, {2560}},
    {"35B in_proj", 2048, 6, 4, {2048, 2048, 4096, 4096, 32, 32}},
    {"Nano in_proj", 2688, 5, 5, {4096, 4096, 1024, 1024, 64}},
};

typedef struct {
    qv_weight *w[MAX_COPIES];
    qv_lora_site site[MAX_COPIES];
    int n;
    int32_t n_adapters; /* 0: the product alone */
    int32_t *segments;  /* starts, then slots */
    int64_t slice_start[7];
    qv_tensor x, scratch, y;
    double bytes, flop;
} decode_ctx;

static void call_decode(void *ctx, int round)
{
    decode_ctx *c = ctx;
    const qv_weight *w = c->w[round % c->n];
    if (c->n_adapters == 0)
        bench_pass(qv_op_linear(be, w, c->x, c->y));
    else
        bench_pass(qv_op_linear_lora(be, w, &c->site[round % c->n], c->n_adapters, c->segments,
                                     c->segments + c->n_adapters + 1, c->x, c->scratch, c->y,
                                     false));
}

/* Adapters of one rank in every slot of a pool, tokens shared out evenly. */
static void make_adapters(decode_ctx *c, const decode_shape *s, int64_t n, int64_t rank)
{
    int32_t n_slots = c->n_adapters, host[2 * 64 + 1];
    qv_lora_slice *slices = calloc((size_t)(n_slots * s->n_slices), sizeof *slices);
    for (int32_t i = 0; i < n_slots * s->n_slices; i++) {
        int32_t plane = i % s->n_slices - (s->n_slices - s->n_planes);
        slices[i] =
            (qv_lora_slice){.plane = plane < 0 ? 0 : plane, .rank = (int32_t)rank, .scale = 1};
    }
    for (int32_t i = 0; i <= n_slots; i++)
        host[i] = (int32_t)(n * i / n_slots);
    for (int32_t i = 0; i < n_slots; i++)
        host[n_slots + 1 + i] = i;
    c->segments = bench_sent(host, (size_t)(2 * n_slots + 1) * sizeof *host);
    c->scratch = qv_tensor_3d(bench_made_up(QV_F32, n * s->n_slices * rank, 1), QV_F32, n,
                              s->n_slices, rank);
    int64_t n_out = c->slice_start[s->n_slices];
    for (int k = 0; k < c->n; k++)
        c->site[k] = (qv_lora_site){
            .n_in = s->n_in,
            .n_out = n_out,
            .n_slices = s->n_slices,
            .n_slots = n_slots,
            .max_rank = (int32_t)rank,
            .slice_start = c->slice_start,
            .a = qv_tensor_4d(bench_made_up(QV_BF16, n_slots * s->n_slices * rank * s->n_in, 1),
                              QV_BF16, n_slots, s->n_slices, rank, s->n_in),
            .b = qv_tensor_3d(bench_made_up(QV_BF16, n_slots * rank * n_out, 1), QV_BF16, n_slots,
                              rank, n_out),
            .slices = bench_sent(slices, (size_t)(n_slots * s->n_slices) * sizeof *slices)};
    double weights = (double)(n_slots * rank) * (double)(s->n_planes * s->n_in + n_out);
    c->bytes += 2 * weights;
    c->flop += 2 * (double)(n * rank) * (double)(s->n_planes * s->n_in + n_out);
    free(slices);
}

/* In place: sites point at slice_start. */
static void make_decode(const decode_shape *s, int64_t n, int32_t n_adapters, int64_t rank,
                        decode_ctx *c)
{
    *c = (decode_ctx){.n_adapters = n_adapters};
    for (int32_t i = 0; i < s->n_slices; i++)
        c->slice_start[i + 1] = c->slice_start[i] + s->rows[i];
    int64_t n_out = c->slice_start[s->n_slices];
    double w_bytes = 2.0 * (double)(n_out * s->n_in);
    c->bytes = w_bytes + 2.0 * (double)(n * (s->n_in + n_out));
    c->flop = 2.0 * (double)(n * n_out) * (double)s->n_in;
    c->n = bench_copies(w_bytes, MAX_COPIES);
    for (int k = 0; k < c->n; k++) {
        bench_pass(qv_weight_new(be, n_out, s->n_in, QV_BF16, &c->w[k]));
        bench_pass(qv_weight_fill(be, c->w[k], 0.02f, (uint64_t)k));
    }
    c->x = qv_tensor_2d(bench_made_up(QV_BF16, n * s->n_in, 1), QV_BF16, n, s->n_in);
    c->y = qv_tensor_2d(bench_made_up(QV_BF16, n * n_out, 1), QV_BF16, n, n_out);
    if (n_adapters > 0)
        make_adapters(c, s, n, rank);
}

static void free_decode(decode_ctx *c)
{
    for (int k = 0; k < c->n; k++) {
        qv_weight_free(be, c->w[k]);
        bench_free(c->site[k].a.data);
        bench_free(c->site[k].b.data);
        bench_free(c->site[k].slices);
    }
    bench_free(c->x.data);
    bench_free(c->y.data);
    bench_free(c->scratch.data);
    bench_free(c->segments);
}

typedef struct {
    qv_k_decode_tuning tuning;
    double time;
} timed_form;

static int by_time(const void *a, const void *b)
{
    double x = ((const timed_form *)a)->time, y = ((const timed_form *)b)->time;
    return (x > y) - (x < y);
}

/* Every form with room for the tokens and every number of blocks that share k; prints the best. */
static void try_forms(const char *name, decode_ctx *c)
{
    enum { MAX_TIMED = 64, MAX_SHARES = 8, BEST = 4 };
    timed_form timed[MAX_TIMED];
    int n_forms, n = 0;
    const qv_k_decode_form *forms = qv_k_decode_forms(&n_forms);
    for (int form = 1; form <= n_forms; form++)
        for (int shares = 1; shares <= MAX_SHARES && n < MAX_TIMED; shares++) {
            if (forms[form - 1].tokens < c->x.shape[0])
                continue;
            timed[n].tuning = (qv_k_decode_tuning){form, shares};
            qv_cuda(be)->decode_tuning = timed[n].tuning;
            timed[n].time = measure(call_decode, c);
            n++;
        }
    qsort(timed, (size_t)n, sizeof *timed, by_time);
    for (int i = 0; i < n && i < BEST; i++) {
        char what[160];
        const qv_k_decode_form *f = &forms[timed[i].tuning.form - 1];
        snprintf(what, sizeof what, "%s: %d stages, %d shares", name, f->stages,
                 timed[i].tuning.shares);
        report(what, c->bytes, c->flop, timed[i].time);
    }
}

/* As it is chosen; by cuBLASLt, with shrink and expand behind it; with `forms` by the best of all
 * forms of the kernel for decode. */
static void bench_decode(bool forms)
{
    static const int64_t counts[] = {16, 32, 64};
    static const struct {
        int32_t n;
        int64_t rank;
    } adapters[] = {{0, 0}, {8, 16}, {8, 32}, {16, 16}, {64, 16}, {8, 64}};
    for (size_t i = 0; i < sizeof decode_shapes / sizeof *decode_shapes; i++)
        for (size_t j = 0; j < sizeof counts / sizeof *counts; j++)
            for (size_t k = 0; k < sizeof adapters / sizeof *adapters; k++) {
                if (adapters[k].n > counts[j] || (forms && k > 1))
                    continue;
                char name[96], what[128];
                decode_ctx c;
                make_decode(&decode_shapes[i], counts[j], adapters[k].n, adapters[k].rank, &c);
                int length = snprintf(name, sizeof name, "%s, %lld tokens", decode_shapes[i].name,
                                      (long long)counts[j]);
                if (adapters[k].n > 0)
                    snprintf(name + length, sizeof name - (size_t)length, ", %d of rank %lld",
                             adapters[k].n, (long long)adapters[k].rank);
                report(name, c.bytes, c.flop, measure(call_decode, &c));
                qv_cuda(be)->decode_tuning.form = -1;
                snprintf(what, sizeof what, "%s, cuBLASLt", name);
                report(what, c.bytes, c.flop, measure(call_decode, &c));
                if (forms)
                    try_forms(name, &c);
                qv_cuda(be)->decode_tuning = (qv_k_decode_tuning){0, 0};
                free_decode(&c);
            }
}

/* --- Main --------------------------------------------------------------------------------- */

static void measure_ceilings(void)
{
    const int64_t n = 8192;
    linear_ctx c = {.n = 1};
    rates.copy = bench_copy_rate(qv_cuda(be)->stream);
    bench_pass(qv_weight_new(be, n, n, QV_BF16, &c.w[0]));
    bench_pass(qv_weight_fill(be, c.w[0], 0.02f, 1));
    c.x = qv_tensor_2d(bench_made_up(QV_BF16, n * n, 1), QV_BF16, n, n);
    c.y = qv_tensor_2d(bench_made_up(QV_BF16, n * n, 1), QV_BF16, n, n);
    rates.gemm = 2.0 * (double)(n * n) * (double)n / measure(call_linear, &c);
    qv_weight_free(be, c.w[0]);
    bench_free(c.x.data);
    bench_free(c.y.data);
    printf("%s: copy %.2f TB/s, GEMM %.0f TFLOP/s\n", qv_backend_describe(be), rates.copy * 1e-12,
           rates.gemm * 1e-12);
}

int main(int argc, char **argv)
{
    static const char *const tables[] = {"linear", "norm",   "rope",  "attention",
                                         "sample", "decode", "forms", NULL};
    bench_know(argc - 1, argv + 1, tables);
    bench_pass(qv_backend_open(&(qv_backend_options){.name = "cuda"}, &be));
    measure_ceilings();
    if (bench_wanted(argc - 1, argv + 1, "linear"))
        bench_linear();
    if (bench_wanted(argc - 1, argv + 1, "norm"))
        bench_norm();
    if (bench_wanted(argc - 1, argv + 1, "rope"))
        bench_attention(true);
    if (bench_wanted(argc - 1, argv + 1, "attention"))
        bench_attention(false);
    if (bench_wanted(argc - 1, argv + 1, "sample"))
        bench_sample();
    bool forms = argc > 1 && bench_wanted(argc - 1, argv + 1, "forms");
    if (forms || bench_wanted(argc - 1, argv + 1, "decode"))
        bench_decode(forms);
    qv_backend_close(be);
    return 0;
}
