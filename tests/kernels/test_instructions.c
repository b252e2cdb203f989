/* What the instructions of kernels/ptx*.cuh mean, against plain loops: on a device it says that we
 * read its manual well, on the emulated one that this is the same. Numbers are small integers, so
 * that every sum is exact.
 */
#include "tests/kernels/test_instructions.h"

#include "common/dtype.h"

#include <criterion/criterion.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#define ROWS(table) (sizeof(table) / sizeof *(table))
#define DONE(expr)  cr_assert_eq(expr, cudaSuccess, "%s", #expr)

/* Integers in [-4, 4] that follow from the index. */
static float number(int seed, int i)
{
    return (float)((i * 7 + i / 13 * 5 + i / 64 * 3 + seed) % 9 - 4);
}

/* `n` of them on the device as BF16, as float32 in *host. */
static void *numbers(int seed, int n, float *host)
{
    uint16_t *bits = malloc((size_t)n * sizeof *bits);
    void *dev;
    for (int i = 0; i < n; i++) {
        host[i] = number(seed, i);
        bits[i] = qv_f32_to_bf16(host[i]);
    }
    DONE(cudaMalloc(&dev, (size_t)n * sizeof *bits));
    DONE(cudaMemcpy(dev, bits, (size_t)n * sizeof *bits, cudaMemcpyHostToDevice));
    free(bits);
    return dev;
}

static void *room(size_t bytes)
{
    void *dev;
    DONE(cudaMalloc(&dev, bytes));
    return dev;
}

static void fetch(void *host, const void *dev, size_t bytes)
{
    DONE(cudaMemcpy(host, dev, bytes, cudaMemcpyDeviceToHost));
}

/* Skips the test on what is not at least of this compute capability. */
static void need(int major)
{
    int n = 0, found = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0)
        cr_skip_test("no CUDA device");
    DONE(cudaDeviceGetAttribute(&found, cudaDevAttrComputeCapabilityMajor, 0));
    if (found < major)
        cr_skip_test("a device of compute capability %d", found);
}

#define LAUNCH(expr) cr_assert_eq(expr, QV_OK, "%s", qv_error())

Test(kernels_instructions, mma_takes_tiles_either_way_round)
{
    need(8);
    static float a[1024], b[1024], c[256];
    void *a_dev = numbers(1, 1024, a), *b_dev = numbers(2, 1024, b);
    float *c_dev = room(sizeof c);
    for (int form = 0; form < 4; form++) {
        int a_cols = form & 1, b_cols = form >> 1;
        LAUNCH(test_mma(a_dev, a_cols, b_dev, b_cols, c_dev));
        fetch(c, c_dev, sizeof c);
        for (int i = 0; i < 256; i++) {
            float sum = 0;
            for (int k = 0; k < 64; k++)
                sum += a[a_cols ? k * 16 + i / 16 : i / 16 * 64 + k] *
                       b[b_cols ? i % 16 * 64 + k : k * 16 + i % 16];
            cr_assert_eq(c[i], sum, "form %d, row %d, column %d: %g, not %g", form, i / 16, i % 16,
                         c[i], sum);
        }
    }
}

static const struct {
    wgmma_form form;
    int n;
} products[] = {
    {WGMMA_ROWS, 32},    {WGMMA_ROWS, 64},    {WGMMA_ROWS, 144},   {WGMMA_ROWS, 96},
    {WGMMA_ROWS, 176},   {WGMMA_ROWS, 128},   {WGMMA_COLUMNS, 64}, {WGMMA_VALUES, 64},
    {WGMMA_VALUES, 128}, {WGMMA_VALUES, 256}, {WGMMA_ROWS, 16},    {WGMMA_ROWS, 72},
    {WGMMA_ROWS, 104},   {WGMMA_ROWS, 136},
};

/* b [k][col] of the form. */
static int b_at(wgmma_form form, int k, int col)
{
    return form == WGMMA_VALUES ? (col / 64 * 64 + k) * 64 + col % 64 : col * 64 + k;
}

Test(kernels_instructions, wgmma_takes_the_tiles_that_the_copy_engine_brings)
{
    need(9);
    static float a[64 * 64], b[256 * 64], d[64 * 256];
    void *a_dev = numbers(3, 64 * 64, a), *b_dev = numbers(4, 256 * 64, b);
    float *d_dev = room(sizeof d);
    for (size_t p = 0; p < ROWS(products); p++) {
        wgmma_form form = products[p].form;
        int n = products[p].n;
        LAUNCH(test_wgmma(form, n, a_dev, b_dev, d_dev));
        fetch(d, d_dev, sizeof d);
        for (int i = 0; i < 64 * n; i++) {
            int row = i / n, col = i % n;
            float sum = 0;
            for (int k = 0; k < 64; k++)
                sum +=
                    a[form == WGMMA_COLUMNS ? k * 64 + row : row * 64 + k] * b[b_at(form, k, col)];
            cr_assert_eq(d[i], sum, "form %d, %d columns, row %d, column %d: %g, not %g", (int)form,
                         n, row, col, d[i], sum);
        }
    }
}

Test(kernels_instructions, lanes_exchange_what_the_manual_says)
{
    need(8);
    int32_t in[32], out[8][32];
    for (int i = 0; i < 32; i++)
        in[i] = i * i % 37 - 11;
    void *in_dev = room(sizeof in), *out_dev = room(sizeof out);
    DONE(cudaMemcpy(in_dev, in, sizeof in, cudaMemcpyHostToDevice));
    LAUNCH(test_shuffles(in_dev, out_dev));
    fetch(out, out_dev, sizeof out);
    uint32_t odd = 0;
    int32_t sum = 0;
    for (int i = 0; i < 32; i++) {
        odd |= (uint32_t)(in[i] & 1) << i;
        sum += in[i];
    }
    for (int i = 0; i < 32; i++) {
        uint32_t same = 0;
        for (int k = 0; k < 32; k++)
            same |= (uint32_t)((in[k] & 3) == (in[i] & 3)) << k;
        const int32_t want[8] = {in[i * 7 % 32],
                                 i < 3 ? in[i] : in[i - 3],
                                 i % 8 + 5 < 8 ? in[i + 5] : in[i],
                                 in[i ^ 9],
                                 (int32_t)odd,
                                 (int32_t)same,
                                 sum,
                                 i % 3 == 1 ? in[31] : 0};
        for (int k = 0; k < 8; k++)
            cr_assert_eq(out[k][i], want[k], "exchange %d, lane %d: %d, not %d", k, i, out[k][i],
                         want[k]);
    }
}

Test(kernels_instructions, copies_of_threads_come_through_a_ring)
{
    need(8);
    enum { N = 13 };
    static float in[N * 128], out[128];
    for (int i = 0; i < N * 128; i++)
        in[i] = number(5, i);
    void *in_dev = room(sizeof in), *out_dev = room(sizeof out);
    DONE(cudaMemcpy(in_dev, in, sizeof in, cudaMemcpyHostToDevice));
    LAUNCH(test_ring(in_dev, N, out_dev));
    fetch(out, out_dev, sizeof out);
    for (int i = 0; i < 128; i++) {
        float sum = 0;
        for (int row = 0; row < N; row++)
            sum += in[row * 128 + i];
        cr_assert_eq(out[i], sum, "column %d: %g, not %g", i, out[i], sum);
    }
}

Test(kernels_instructions, blocks_of_a_cluster_share_boxes_and_barriers)
{
    need(9);
    enum { N = 19 };
    static float in[N * 64], out[2 * 64];
    void *in_dev = numbers(6, N * 64, in), *out_dev = room(sizeof out);
    LAUNCH(test_cluster(in_dev, N, out_dev));
    fetch(out, out_dev, sizeof out);
    for (int i = 0; i < 2 * 64; i++) {
        float sum = 0;
        for (int row = 0; row < N; row++)
            sum += in[row * 64 + i % 64];
        cr_assert_eq(out[i], sum, "block %d, column %d: %g, not %g", i / 64, i % 64, out[i], sum);
    }
}
