/* bench_model: steps of a whole model on one device or split over several, each beside its floor:
 * decode at several numbers of sequences and the prefill of a long prompt. Weights are made up
 * unless the folder has them, so a config.json alone is enough (bench/configs/ has those of
 * released sizes). Adapters are made up too, of one rank on every linear layer but routers, routed
 * experts and the head, in a pool of that rank unless --pool-rank gives a larger one.
 *
 *   bench_model DIR [--backend cuda] [--context N] [--prompt N] [--sizes 1,16,64] [--adapters N]
 *               [--rank R] [--pool-rank R] [--eager] [--ops] [--tp N] [--ep N]
 *               [--one-device] [--all-reduce nccl|direct|auto] [--deterministic]
 *
 * The floor of a decode step are its bytes (weights once, keys and values, recurrent state twice)
 * at the rate of a large copy; of a prompt the sum over its stages of the larger of that and of
 * their FLOP at the rate of a large matrix product; both measured in the same run on the first
 * device, shared out evenly over ranks. The product is measured twice: first, while the device is
 * cool, and behind the prompt's steps for as long as one takes. Steps go as the engine's do: a
 * decode step is enqueued before the results of the one before are read, its tokens being what that
 * one chose (with several ranks, one at a time). Times are medians over steps, from the host's
 * clock from result to result; the gap is how long the device had nothing to do between two steps.
 *
 * --ops adds what each op takes in such steps on rank 0, run op by op with marks on the device in
 * between: all ops of a name and matrix in one row. No op begins before the one in front of it has
 * ended then, and each pays for its mark (1 to 2 us), so the sum is above the step.
 */
#include "common/clock.h"
#include "models/model.h"
#include "models/proj.h"
#include "ops/op_times.h"
#include "ops/ops.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_SIZES = 16, PAGE_TOKENS = 16 };

static struct {
    const char *dir, *backend;
    int32_t context, prompt, sizes[MAX_SIZES], n_sizes, max_size, adapters, rank, pool_rank;
    bool eager, ops, deterministic;
    int32_t tp, ep;  /* ranks that share the model; groups of them that share out the experts */
    bool one_device; /* all ranks on the first device */
    const char *all_reduce;
} args = {.backend = "cuda", .context = 2048, .prompt = 8192, .rank = 16, .tp = 1, .ep = 1};

static void check(qv_status status, const char *what)
{
    if (status == QV_OK)
        return;
    fprintf(stderr, "bench_model: %s: %s\n", what, qv_error());
    exit(1);
}

static double now(void)
{
    return (double)qv_now_ns() * 1e-9;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return values[n / 2];
}

/* --- Ceilings ----------------------------------------------------------------------------- */

static double copy_rate, gemm_rate; /* bytes/s, read and written; FLOP/s */

/* A copy as the add of two large tensors would do it has three streams; y = gather of rows has two.
 */
static void measure_copy(qv_backend *be)
{
    int64_t rows = 1 << 17, cols = 8192; /* 2 GiB each way */
    if (strcmp(args.backend, "cpu") == 0)
        rows = 1 << 11;
    qv_dtype act = qv_backend_activation_dtype(be);
    size_t bytes = (size_t)(rows * cols) * qv_dtype_size(act);
    void *x, *y, *ids;
    check(qv_backend_alloc(be, bytes, &x), "copy");
    check(qv_backend_alloc(be, bytes, &y), "copy");
    check(qv_backend_alloc(be, (size_t)rows * 4, &ids), "copy");
    int32_t *host = malloc((size_t)rows * sizeof *host);
    for (int64_t i = 0; i < rows; i++)
        host[i] = (int32_t)i;
    check(qv_backend_upload(be, ids, host, (size_t)rows * 4), "copy");
    check(qv_backend_fill(be, x, act, rows * cols, 0, 1, 1), "copy");
    double times[7];
    for (int i = -1; i < 7; i++) {
        check(qv_backend_sync(be), "copy");
        double start = now();
        check(qv_op_gather_rows(be, qv_tensor_2d(x, act, rows, cols), ids,
                                qv_tensor_2d(y, act, rows, cols)),
              "copy");
        check(qv_backend_sync(be), "copy");
        if (i >= 0)
            times[i] = now() - start;
    }
    copy_rate = 2 * (double)bytes / median(times, 7);
    qv_backend_free(be, x);
    qv_backend_free(be, y);
    qv_backend_free(be, ids);
    free(host);
}

/* FLOP/s of a large product, repeated until it has taken `seconds`: at its limit of power a device
 * is slower than while it is cool. */
static double measure_gemm(qv_backend *be, double seconds)
{
    int64_t n = strcmp(args.backend, "cpu") == 0 ? 512 : 8192;
    qv_dtype act = qv_backend_activation_dtype(be);
    qv_weight *w;
    void *x, *y;
    check(qv_weight_new(be, n, n, QV_BF16, &w), "gemm");
    check(qv_weight_fill(be, w, 0.02f, 1), "gemm");
    check(qv_backend_alloc(be, (size_t)(n * n) * qv_dtype_size(act), &x), "gemm");
    check(qv_backend_alloc(be, (size_t)(n * n) * qv_dtype_size(act), &y), "gemm");
    check(qv_backend_fill(be, x, act, n * n, 0, 1, 2), "gemm");
    double times[7];
    int each = 4;
    for (int i = -2; i < 7; i++) {
        check(qv_backend_sync(be), "gemm");
        double start = now();
        for (int j = 0; j < each; j++)
            check(qv_op_linear(be, w, qv_tensor_2d(x, act, n, n), qv_tensor_2d(y, act, n, n)),
                  "gemm");
        check(qv_backend_sync(be), "gemm");
        double one = (now() - start) / each;
        if (i >= 0)
            times[i] = one;
        else if (seconds > 4 * one)
            each = (int)(seconds / one);
    }
    qv_weight_free(be, w);
    qv_backend_free(be, x);
    qv_backend_free(be, y);
    return 2.0 * (double)n * (double)n * (double)n / median(times, 7);
}

/* --- Steps -------------------------------------------------------------------------------- */

typedef struct {
    qv_backend *be; /* rank 0's */
    qv_backend *backends[QV_MAX_RANKS];
    qv_model *model;
    qv_memory_plan plan;
    int64_t vocab, embed_bytes;
    int32_t pages_each, pages_of_context, n_pages;
    int32_t *ints; /* all arrays of a batch, one after the other */
} bench;

/* n sequences, each with `now_tokens` tokens after `before`; sequence i uses adapter i % adapters.
 */
static qv_batch make_batch(const bench *b, int32_t n, int32_t before, int32_t now_tokens)
{
    int32_t n_tokens = n * now_tokens, *next = b->ints;
#define TAKE(count) (next += (count), next - (count))
    int32_t *token = TAKE(n_tokens), *pos = TAKE(n_tokens), *seq_start = TAKE(n + 1);
    int32_t *slot = TAKE(n), *seg_start = TAKE(n + 1), *seg_slot = TAKE(n), *row = TAKE(n);
    int32_t *logit_start = TAKE(n + 1), *logit_slot = TAKE(n), *table = TAKE(n * b->pages_each);
#undef TAKE
    for (int32_t i = 0; i < n; i++) {
        for (int32_t j = 0; j < now_tokens; j++) {
            token[i * now_tokens + j] = (int32_t)((i * 7919 + j * 104729 + 17) % b->vocab);
            pos[i * now_tokens + j] = before + j;
        }
        seq_start[i] = i * now_tokens;
        slot[i] = i;
        row[i] = (i + 1) * now_tokens - 1;
        for (int32_t j = 0; j < b->pages_each; j++)
            table[i * b->pages_each + j] = (i * b->pages_of_context + j) % b->n_pages;
    }
    seq_start[n] = n_tokens;
    int32_t segs = args.adapters == 0 ? 1 : args.adapters < n ? args.adapters : n;
    for (int32_t i = 0; i <= segs; i++) {
        int32_t first = (int32_t)((int64_t)n * i / segs);
        seg_start[i] = first * now_tokens;
        logit_start[i] = first;
        if (i < segs)
            seg_slot[i] = logit_slot[i] = args.adapters == 0 ? -1 : i;
    }
    return (qv_batch){.n_tokens = n_tokens,
                      .n_seqs = n,
                      .token = token,
                      .pos = pos,
                      .seq_start = seq_start,
                      .page_table = table,
                      .page_stride = b->pages_each,
                      .state_slot = slot,
                      .n_segs = segs,
                      .seg_start = seg_start,
                      .seg_slot = seg_slot,
                      .n_logits = n,
                      .logit_row = row,
                      .n_logit_segs = segs,
                      .logit_seg_start = logit_start,
                      .logit_seg_slot = logit_slot};
}

typedef struct {
    double step;   /* median seconds from result to result, greedy sampling included */
    double device; /* of the forward pass alone, by passes enqueued without waiting in between */
    double gap;    /* median seconds that the device had nothing to do between steps */
} timing;

/* Over several ranks there are no halves: all of a step is in its end. */
static void begin_step(const bench *b, const qv_batch *batch, const qv_sample_row *rows)
{
    qv_tensor logits;
    if (args.tp > 1)
        return;
    check(qv_model_forward(b->model, batch, &logits), "step");
    check(qv_op_sample_begin(b->be, logits, (int32_t)b->vocab, rows), "sample");
}

static void end_step(const bench *b, const qv_batch *batch, const qv_sample_row *rows,
                     qv_sample_result *results)
{
    qv_status sampled;
    if (args.tp > 1)
        check(qv_model_step(b->model, batch, (int32_t)b->vocab, rows, results, &sampled), "step");
    else
        sampled = qv_op_sample_end(b->be, results);
    check(sampled, "sample");
}

/* `next` is the batch of steps after the first, which may have tokens that the one before chose;
 * `ahead` whether it is enqueued before that one's results are read. */
static timing time_step(const bench *b, const qv_batch *batch, const qv_batch *next, bool ahead,
                        int reps)
{
    int32_t n = batch->n_logits;
    qv_sample_row *rows = calloc((size_t)n, sizeof *rows);
    qv_sample_result *results = calloc((size_t)n, sizeof *results);
    for (int32_t i = 0; i < n; i++)
        rows[i] = (qv_sample_row){.target = -1, .top_p = 1, .repetition_penalty = 1, .n_top = -1};
    double times[64], gaps[64];
    qv_backend_watch_gaps(b->be, true);
    begin_step(b, batch, rows);
    double start = now();
    for (int i = -2; i < reps; i++) {
        if (ahead)
            begin_step(b, next, rows);
        end_step(b, batch, rows, results);
        double end = now();
        if (i >= 0) {
            times[i] = end - start;
            gaps[i] = qv_backend_gap(b->be);
        }
        start = end;
        if (!ahead)
            begin_step(b, next, rows);
    }
    end_step(b, batch, rows, results);
    qv_backend_watch_gaps(b->be, false);
    check(qv_backend_sync(b->be), "sync");
    start = now();
    for (int i = 0; i < reps; i++) {
        qv_tensor logits;
        check(qv_model_forward(b->model, batch, &logits), "step");
    }
    check(qv_backend_sync(b->be), "sync");
    timing t = {.device = (now() - start) / reps};
    t.step = median(times, reps);
    t.gap = median(gaps, reps);
    free(rows);
    free(results);
    return t;
}

static double expert_bytes(const bench *b)
{
    const qv_model_config *c = qv_model_get_config(b->model);
    if (c->n_experts == 0)
        return 0;
    qv_layout layout;
    check(qv_layout_init(&layout, c, 0, 1), "layout");
    const qv_proj_shape *in = &layout.proj[QV_PROJ_EXPERT_IN];
    const qv_proj_shape *out = &layout.proj[QV_PROJ_EXPERT_OUT];
    double each = 2.0 * (double)(in->n_in * in->n_out + out->n_in * out->n_out);
    return (double)qv_model_config_count(c, QV_PART_MOE) * (double)c->n_experts * each;
}

/* Of as many as uniform routing hits. */
static double hit_bytes(const bench *b, int32_t n_tokens)
{
    const qv_model_config *c = qv_model_get_config(b->model);
    double all = expert_bytes(b), share = (double)c->moe_top_k / (double)c->n_experts;
    return all > 0 ? all * (1 - pow(1 - share, n_tokens)) : 0;
}

/* Bytes of all matrices but those of experts and the embedding's table, of which a step reads some
 * rows. */
static double dense_bytes(const bench *b)
{
    return (double)b->plan.weights - (double)b->embed_bytes - expert_bytes(b);
}

static double step_bytes(const bench *b, int32_t n, int32_t context)
{
    double kv = (double)b->plan.kv_page / PAGE_TOKENS;
    return dense_bytes(b) + hit_bytes(b, n) +
           (double)n * (context * kv + 2.0 * (double)b->plan.state_slot);
}

/* What the ops of a step take: medians make no sense over so many, so means over `reps` steps. */
static void ops_table(const bench *b, const qv_batch *batch, int reps)
{
    const double head_start = 8e-3; /* to enqueue a decode step takes the host less */
    qv_op_times *times;
    qv_tensor logits;
    check(qv_op_times_new(b->be, &times), "ops");
    for (int i = 0; i < reps; i++) {
        check(qv_op_times_begin(times, head_start), "ops");
        check(qv_model_forward(b->model, batch, &logits), "step");
        check(qv_op_times_end(times), "ops");
    }
    int n;
    const qv_op_time *kinds = qv_op_times_sorted(times, &n);
    double all = 0;
    int64_t calls = 0;
    for (int i = 0; i < n; i++) {
        all += kinds[i].seconds / reps;
        calls += kinds[i].calls / reps;
    }
    printf("  %-16s %15s %6s %9s %9s %6s\n", "op", "matrix", "calls", "us each", "us all", "share");
    for (int i = 0; i < n; i++) {
        char matrix[48] = "";
        double us = kinds[i].seconds / reps * 1e6;
        if (kinds[i].n_in > 0)
            snprintf(matrix, sizeof matrix, "%lld x %lld", (long long)kinds[i].n_out,
                     (long long)kinds[i].n_in);
        printf("  %-16s %15s %6lld %9.1f %9.0f %5.1f%%\n", kinds[i].name, matrix,
               (long long)kinds[i].calls / reps, us * reps / (double)kinds[i].calls, us,
               us * 1e-4 / all);
    }
    printf("  %-16s %15s %6lld %9s %9.0f\n", "all", "", (long long)calls, "", all * 1e6);
    qv_op_times_free(times);
}

static void decode_table(bench *b)
{
    printf("\ndecode, context %d%s\n", args.context, args.eager ? ", op by op" : "");
    printf("%6s %10s %10s %10s %10s %8s %8s %10s\n", "seqs", "GB", "floor ms", "step ms",
           "device ms", "gap us", "ratio", "tokens/s");
    int32_t *chosen = calloc((size_t)args.max_size, sizeof *chosen);
    for (int32_t i = 0; i < args.max_size; i++)
        chosen[i] = QV_TOKEN_OF_ROW(i);
    for (int i = 0; i < args.n_sizes; i++) {
        int32_t n = args.sizes[i];
        qv_batch batch = make_batch(b, n, args.context - 1, 1);
        qv_batch next = batch;
        next.token = args.tp == 1 ? chosen : batch.token;
        double bytes = step_bytes(b, n, args.context), floor = bytes / copy_rate / args.tp;
        timing t = time_step(b, &batch, &next, args.tp == 1, 20);
        printf("%6d %10.2f %10.3f %10.3f %10.3f %8.1f %8.2f %10.0f\n", n, bytes * 1e-9, floor * 1e3,
               t.step * 1e3, t.device * 1e3, t.gap * 1e6, t.step / floor, n / t.step);
        if (args.ops)
            ops_table(b, &batch, 10);
        fflush(stdout);
    }
    free(chosen);
}

/* Seconds of a prompt's stages at the rates of a copy and of a product. */
typedef struct {
    double dense, experts, attention, recurrent;
} prefill_floor;

/* By stage, the larger of 2 FLOP a weight and token and the bytes of the weights; half of the
 * square of attention; FLOP of the recurrent layers by chunks of 64 tokens. The head sees one row.
 */
static prefill_floor floor_of(const bench *b, double n, double gemm)
{
    const double chunk = 64;
    const qv_model_config *c = qv_model_get_config(b->model);
    double head = (double)(c->vocab * c->hidden), dense = dense_bytes(b);
    double share = c->n_experts > 0 ? (double)c->moe_top_k / (double)c->n_experts : 0;
    double dk = (double)c->gdn_k_dim, dv = (double)c->gdn_v_dim;
    double gdn = (double)c->gdn_v_heads * (10 * chunk * dv + 6 * dk * dv);
    double state = (double)c->ssm_state, dim = (double)c->ssm_head_dim;
    double ssm = (double)c->ssm_groups * 2 * chunk * state +
                 (double)c->ssm_heads * (2 * chunk * dim + 4 * state * dim);
    double recurrent = gdn * (double)qv_model_config_count(c, QV_PART_GDN) +
                       ssm * (double)qv_model_config_count(c, QV_PART_SSM);
    double scores = 4 * n * n / 2 * (double)(c->n_heads * c->head_dim);
    prefill_floor f = {
        .dense = fmax(2 * n * (dense / 2 - head) / gemm, dense / copy_rate),
        .experts = fmax(n * share * expert_bytes(b) / gemm, hit_bytes(b, (int32_t)n) / copy_rate),
        .attention = scores * (double)qv_model_config_count(c, QV_PART_ATTENTION) / gemm,
        .recurrent = n * recurrent / gemm};
    f.dense /= args.tp;
    f.experts /= args.tp;
    f.attention /= args.tp;
    f.recurrent /= args.tp;
    return f;
}

static double sum_of(prefill_floor f)
{
    return f.dense + f.experts + f.attention + f.recurrent;
}

/* The floor is at the rate of a product that is measured right behind the steps and for as long as
 * one takes, so that both meet the same device. */
static void prefill_table(bench *b)
{
    qv_batch batch = make_batch(b, 1, 0, args.prompt);
    timing time = time_step(b, &batch, &batch, false, 5);
    double t = time.step;
    double beside = strcmp(args.backend, "cpu") == 0 ? gemm_rate : measure_gemm(b->be, t * args.tp);
    prefill_floor f = floor_of(b, args.prompt, beside);
    printf("\nprefill of %d tokens: step %.1f ms, device %.1f ms, %.0f tokens/s\n", args.prompt,
           t * 1e3, time.device * 1e3, args.prompt / t);
    printf("  floor %.1f ms: matrices %.1f, experts %.1f, attention %.1f, recurrent %.1f, at %.3g "
           "TFLOP/s behind it; ratio %.2f (%.2f at %.3g)\n",
           sum_of(f) * 1e3, f.dense * 1e3, f.experts * 1e3, f.attention * 1e3, f.recurrent * 1e3,
           beside * 1e-12, t / sum_of(f), t / sum_of(floor_of(b, args.prompt, gemm_rate)),
           gemm_rate * 1e-12);
    if (args.ops)
        ops_table(b, &batch, 3);
}

/* --- Main --------------------------------------------------------------------------------- */

static int32_t number(const char *text)
{
    char *end;
    long n = strtol(text, &end, 10);
    if (*end != '\0' || n < 0 || n > 1 << 24) {
        fprintf(stderr, "bench_model: '%s' is not a number of something\n", text);
        exit(2);
    }
    return (int32_t)n;
}

static void parse_sizes(char *text)
{
    args.n_sizes = 0;
    for (char *part = strtok(text, ","); part != NULL && args.n_sizes < MAX_SIZES;
         part = strtok(NULL, ","))
        args.sizes[args.n_sizes++] = number(part);
}

static const char usage[] =
    "usage: bench_model [OPTION...] DIR\n"
    "Steps of a model beside their floors. DIR: a model, or a config.json alone (bench/configs/).\n"
    "  --backend NAME     cuda (default) or cpu\n"
    "  --sizes N,N,...    sequences of decode steps (default 1,16,64)\n"
    "  --context N        tokens of each of them (default 2048)\n"
    "  --prompt N         tokens of a prompt (default 8192); 0: none\n"
    "  --adapters N       made-up adapters, shared out over sequences (default 0)\n"
    "  --rank R           their rank (default 16)\n"
    "  --pool-rank R      the pool's rank, if it is larger\n"
    "  --eager            decode op by op, no recorded steps\n"
    "  --ops              what each op takes besides\n"
    "  --deterministic    the same bits whatever else is in a batch\n"
    "  --tp N             ranks that share the model (default 1)\n"
    "  --ep N             groups of ranks that share out the experts (default 1)\n"
    "  --one-device       all ranks on the first device\n"
    "  --all-reduce NAME  nccl, direct or auto (default)\n"
    "  --help             this\n";

static void parse(int argc, char **argv)
{
    static const struct option table[] = {
        {"backend", required_argument, NULL, 'b'},  {"context", required_argument, NULL, 'c'},
        {"prompt", required_argument, NULL, 'p'},   {"sizes", required_argument, NULL, 's'},
        {"adapters", required_argument, NULL, 'a'}, {"rank", required_argument, NULL, 'r'},
        {"eager", no_argument, NULL, 'e'},          {"ops", no_argument, NULL, 'i'},
        {"tp", required_argument, NULL, 't'},       {"ep", required_argument, NULL, 'x'},
        {"one-device", no_argument, NULL, 'o'},     {"all-reduce", required_argument, NULL, 'm'},
        {"deterministic", no_argument, NULL, 'd'},  {"pool-rank", required_argument, NULL, 'l'},
        {"help", no_argument, NULL, 'h'},           {0},
    };
    char sizes[] = "1,16,64";
    parse_sizes(sizes);
    for (int c; (c = getopt_long(argc, argv, "", table, NULL)) != -1;) {
        switch (c) {
        case 'b':
            args.backend = optarg;
            break;
        case 'c':
            args.context = number(optarg);
            break;
        case 'p':
            args.prompt = number(optarg);
            break;
        case 's':
            parse_sizes(optarg);
            break;
        case 'a':
            args.adapters = number(optarg);
            break;
        case 'r':
            args.rank = number(optarg);
            break;
        case 'l':
            args.pool_rank = number(optarg);
            break;
        case 'e':
            args.eager = true;
            break;
        case 'i':
            args.ops = true;
            break;
        case 't':
            args.tp = number(optarg);
            break;
        case 'x':
            args.ep = number(optarg);
            break;
        case 'o':
            args.one_device = true;
            break;
        case 'm':
            args.all_reduce = optarg;
            break;
        case 'd':
            args.deterministic = true;
            break;
        case 'h':
            fputs(usage, stdout);
            exit(0);
        default:
            fputs(usage, stderr);
            exit(2);
        }
    }
    if (optind + 1 != argc || args.n_sizes == 0 || args.tp < 1 || args.tp > QV_MAX_RANKS) {
        fputs(usage, stderr);
        exit(2);
    }
    args.dir = argv[optind];
    for (int i = 0; i < args.n_sizes; i++)
        args.max_size = args.sizes[i] > args.max_size ? args.sizes[i] : args.max_size;
}

static void open_model(bench *b)
{
    char weights[4096];
    snprintf(weights, sizeof weights, "%s/model.safetensors", args.dir);
    int32_t longest = args.context > args.prompt ? args.context : args.prompt;
    b->pages_each = (longest + PAGE_TOKENS - 1) / PAGE_TOKENS;
    int32_t per_seq = (args.context + PAGE_TOKENS - 1) / PAGE_TOKENS;
    int32_t pages = args.max_size * per_seq;
    qv_model_limits limits = {
        .max_tokens = args.prompt > args.max_size ? args.prompt : args.max_size,
        .max_seqs = args.max_size,
        .max_logits = args.max_size,
        .page_tokens = PAGE_TOKENS,
        .n_pages = pages > b->pages_each ? pages : b->pages_each,
        .n_state_slots = args.max_size,
        .n_adapter_slots = args.adapters,
        .max_lora_rank = args.adapters == 0           ? 0
                         : args.pool_rank > args.rank ? args.pool_rank
                                                      : args.rank,
        .made_up_weights = access(weights, R_OK) != 0,
        .max_seq_pages = b->pages_each,
        .max_recorded = args.eager ? 0 : args.max_size,
    };
    b->pages_of_context = per_seq;
    b->n_pages = limits.n_pages;
    double start = now();
    qv_model_ranks ranks = {.backends = b->backends, .n_ranks = args.tp, .expert_groups = args.ep};
    check(qv_model_open_ranks(args.dir, &ranks, &limits, NULL, NULL, &b->model), "open");
    if (args.adapters > 0)
        check(qv_model_make_up_adapters(b->model, args.rank), "adapters");
    const qv_model_config *c = qv_model_get_config(b->model);
    check(qv_model_plan(c, b->be, &limits, &b->plan), "plan");
    b->vocab = c->vocab;
    bool one_memory = c->tied_head && qv_backend_keeps_rows(b->be);
    b->embed_bytes = one_memory ? 0 : c->vocab * c->hidden * 2;
    b->ints = calloc((size_t)limits.max_tokens * 2 + (size_t)args.max_size * 16 +
                         (size_t)args.max_size * (size_t)b->pages_each + 64,
                     sizeof *b->ints);
    printf("opened in %.2f s: weights %.2f GB%s, KV %.2f, state %.2f, adapters %.2f, activations "
           "%.2f\n",
           now() - start, (double)b->plan.weights * 1e-9,
           limits.made_up_weights ? " (made up)" : "", (double)b->plan.kv * 1e-9,
           (double)b->plan.state * 1e-9, (double)b->plan.adapters * 1e-9,
           (double)b->plan.activations * 1e-9);
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    bench b = {.model = NULL};
    for (int32_t i = 0; i < args.tp; i++) {
        qv_backend_options options = {.name = args.backend,
                                      .device = args.one_device ? 0 : i,
                                      .deterministic = args.deterministic,
                                      .all_reduce = args.all_reduce};
        check(qv_backend_open(&options, &b.backends[i]), "backend");
    }
    b.be = b.backends[0];
    measure_copy(b.be);
    gemm_rate = measure_gemm(b.be, 0);
    printf("%s on %s", args.dir, qv_backend_describe(b.be));
    if (args.tp > 1)
        printf(", %d ranks%s, experts in %d groups, sums %s", args.tp,
               args.one_device ? " on it" : "", args.ep,
               args.all_reduce != NULL ? args.all_reduce : "auto");
    if (args.deterministic)
        printf(", deterministic");
    printf(": copy %.2f TB/s, GEMM %.0f TFLOP/s\n", copy_rate * 1e-12, gemm_rate * 1e-12);
    open_model(&b);
    decode_table(&b);
    if (args.prompt > 0)
        prefill_table(&b);
    qv_model_close(b.model);
    for (int32_t i = 0; i < args.tp; i++)
        qv_backend_close(b.backends[i]);
    free(b.ints);
    return 0;
}
