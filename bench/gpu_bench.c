#include "bench/gpu_bench.h"

#include "kernels/kernels_dense.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REPLAYS = 9, UNTIMED_REPLAYS = 2 };

#define ROTATE_BYTES 256e6 /* five times the L2 cache of an H100 */

/* --- Errors ------------------------------------------------------------------------------- */

void bench_pass(qv_status status)
{
    if (status == QV_OK)
        return;
    fprintf(stderr, "%s: %s\n", program_invocation_short_name, qv_error());
    exit(1);
}

void bench_check(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, cudaGetErrorString(error));
    exit(1);
}

/* --- The command line --------------------------------------------------------------------- */

static bool is_known(const char *argument, const char *const *known)
{
    for (; *known != NULL; known++)
        if (strcmp(argument, *known) == 0)
            return true;
    return false;
}

void bench_know(int n, char **arguments, const char *const *known)
{
    for (int i = 0; i < n; i++) {
        if (is_known(arguments[i], known))
            continue;
        fprintf(stderr, "%s: unknown argument '%s'; there are", program_invocation_short_name,
                arguments[i]);
        for (; *known != NULL; known++)
            fprintf(stderr, " %s", *known);
        fputc('\n', stderr);
        exit(2);
    }
}

bool bench_wanted(int n, char **arguments, const char *name)
{
    for (int i = 0; i < n; i++)
        if (strcmp(arguments[i], name) == 0)
            return true;
    return n == 0;
}

/* --- Device memory ------------------------------------------------------------------------ */

void *bench_alloc(size_t bytes)
{
    char what[64];
    void *block;
    snprintf(what, sizeof what, "memory for %.0f MB", (double)bytes * 1e-6);
    bench_check(cudaMalloc(&block, bytes > 0 ? bytes : 1), what);
    bench_check(cudaMemset(block, 0, bytes), "clearing memory");
    bench_check(cudaStreamSynchronize(NULL), "clearing memory");
    return block;
}

void *bench_sent(const void *host, size_t bytes)
{
    void *block = bench_alloc(bytes);
    bench_check(cudaMemcpy(block, host, bytes, cudaMemcpyHostToDevice), "upload");
    return block;
}

void *bench_made_up(qv_dtype dtype, int64_t n, float scale)
{
    static uint64_t seed;
    void *block = bench_alloc((size_t)n * qv_dtype_size(dtype));
    if (dtype == QV_I32)
        return block;
    bench_pass(qv_k_fill(block, dtype == QV_F32, n, 0, scale, ++seed, NULL));
    bench_check(cudaStreamSynchronize(NULL), "making up numbers");
    return block;
}

void bench_free(void *block)
{
    bench_check(cudaFree(block), "freeing memory");
}

/* --- Time --------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return values[n / 2];
}

/* The first replays are not counted: the device may have to wake up. */
static double time_replays(cudaStream_t stream, cudaGraphExec_t graph)
{
    cudaEvent_t start, stop;
    double times[REPLAYS];
    bench_check(cudaEventCreate(&start), "event");
    bench_check(cudaEventCreate(&stop), "event");
    for (int i = -UNTIMED_REPLAYS; i < REPLAYS; i++) {
        float ms;
        bench_check(cudaEventRecord(start, stream), "event");
        bench_check(cudaGraphLaunch(graph, stream), "replay");
        bench_check(cudaEventRecord(stop, stream), "event");
        bench_check(cudaStreamSynchronize(stream), "replay");
        bench_check(cudaEventElapsedTime(&ms, start, stop), "event");
        if (i >= 0)
            times[i] = ms * 1e-3;
    }
    bench_check(cudaEventDestroy(start), "event");
    bench_check(cudaEventDestroy(stop), "event");
    return bench_median(times, REPLAYS);
}

/* What a call makes when it first sees a shape or a copy cannot be made in a capture, so that every
 * round runs before. */
double bench_time(cudaStream_t stream, bench_call *call, void *ctx, int rounds)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    for (int i = 0; i < rounds; i++)
        call(ctx, i);
    bench_check(cudaStreamSynchronize(stream), "run");
    bench_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < rounds; i++)
        call(ctx, i);
    bench_check(cudaStreamEndCapture(stream, &graph), "capture");
    bench_check(cudaGraphInstantiate(&exec, graph, 0), "graph");
    double seconds = time_replays(stream, exec) / rounds;
    bench_check(cudaGraphExecDestroy(exec), "graph");
    bench_check(cudaGraphDestroy(graph), "graph");
    return seconds;
}

int bench_copies(double bytes, int most)
{
    double n = ceil(ROTATE_BYTES / bytes);
    return n < 1 ? 1 : n > most ? most : (int)n;
}

/* --- Floors ------------------------------------------------------------------------------- */

double bench_floor(const bench_rates *rates, double bytes, double flop)
{
    return fmax(bytes / rates->copy, flop > 0 ? flop / rates->gemm : 0);
}

enum { COPY_ROWS = 1 << 16, COPY_COLS = 8192 }; /* of BF16: 1 GiB */

typedef struct {
    cudaStream_t stream;
    const int32_t *rows; /* [COPY_ROWS]: each its own number */
    void *from, *to;     /* BF16 [COPY_ROWS, COPY_COLS] */
} copy_ctx;

static void call_copy(void *ctx, int round)
{
    const copy_ctx *c = ctx;
    (void)round;
    bench_pass(qv_k_embed(c->from, false, COPY_COLS, COPY_ROWS, 0, c->rows, COPY_ROWS, COPY_COLS,
                          c->to, true, COPY_COLS, c->stream));
}

double bench_copy_rate(cudaStream_t stream)
{
    static int32_t rows[COPY_ROWS];
    for (int32_t i = 0; i < COPY_ROWS; i++)
        rows[i] = i;
    const int64_t n = (int64_t)COPY_ROWS * COPY_COLS;
    void *ids = bench_sent(rows, sizeof rows);
    copy_ctx c = {.stream = stream,
                  .rows = ids,
                  .from = bench_made_up(QV_BF16, n, 1),
                  .to = bench_made_up(QV_BF16, n, 1)};
    double seconds = bench_time(stream, call_copy, &c, 16);
    bench_free(c.from);
    bench_free(c.to);
    bench_free(ids);
    return 4.0 * (double)n / seconds;
}
