/* What the tests of the CUDA backend share: the same op on the CPU backend with BF16 arithmetic,
 * which is the oracle, and on the device, over the same numbers.
 *
 * A twin is a tensor in both memories: float32 that BF16 can hold on the host (or plain float32, or
 * int32), BF16 (float32, int32) on the device. Tests build twins, call the op on both halves and
 * compare. Outputs are poisoned with NaN first, so that what is not written is found. Without a
 * device, or in a build without CUDA, every test skips itself and says so.
 */
#ifndef QV_TESTS_OPS_CUDA_TEST_H
#define QV_TESTS_OPS_CUDA_TEST_H

#include "tests/ops/ops_test.h"

/* --- The two backends --------------------------------------------------------------------- */

typedef struct {
    qv_backend *cpu, *dev;
    qv_rng rng;
} duo;

/* Skips the test where there is no device. */
static inline duo open_duo(uint64_t seed)
{
    duo d = {.rng = qv_rng_seed(seed)};
    qv_backend_options dev = {.name = "cuda"};
    qv_backend_options cpu = {.name = "cpu", .n_threads = 0, .arithmetic = "bf16"};
    qv_status status = qv_backend_open(&dev, &d.dev);
    if (status == QV_ERR_NOT_FOUND || status == QV_ERR_DEVICE)
        cr_skip_test("no CUDA device: %s", qv_error());
    cr_assert(status == QV_OK, "%s", qv_error());
    PASS(qv_backend_open(&cpu, &d.cpu));
    return d;
}

static inline void close_duo(duo *d)
{
    qv_backend_close(d->dev);
    qv_backend_close(d->cpu);
}

/* --- Twins -------------------------------------------------------------------------------- */

typedef struct {
    qv_tensor cpu, dev;
    int64_t n; /* numbers in the blocks behind them */
} twin;

/* A dense twin of `n_dims` dimensions over new blocks; see fill_twin and poison_twin. */
static inline twin new_twin(duo *d, qv_dtype dev_dtype, int n_dims, const int64_t *shape)
{
    twin t = {.n = 1};
    qv_dtype cpu_dtype = dev_dtype == QV_BF16 ? QV_F32 : dev_dtype;
    t.cpu = (qv_tensor){.dtype = cpu_dtype, .n_dims = n_dims};
    for (int i = n_dims - 1; i >= 0; i--) {
        t.cpu.shape[i] = shape[i];
        t.cpu.stride[i] = t.n;
        t.n *= shape[i];
    }
    t.dev = t.cpu;
    t.dev.dtype = dev_dtype;
    PASS(qv_backend_alloc(d->cpu, (size_t)t.n * qv_dtype_size(cpu_dtype) + 64, &t.cpu.data));
    PASS(qv_backend_alloc(d->dev, (size_t)t.n * qv_dtype_size(dev_dtype) + 64, &t.dev.data));
    return t;
}

#define NEW_TWIN(d, dtype, ...)                                                                    \
    new_twin(d, dtype, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                  \
             (int64_t[]){__VA_ARGS__})

static inline void free_twin(duo *d, twin *t)
{
    qv_backend_free(d->cpu, t->cpu.data);
    qv_backend_free(d->dev, t->dev.data);
}

/* The host's numbers to the device, rounded on both sides alike. The whole block. */
static inline void send_twin(duo *d, twin *t)
{
    if (t->n == 0)
        return;
    if (t->dev.dtype != QV_BF16) {
        PASS(qv_backend_upload(d->dev, t->dev.data, t->cpu.data,
                               (size_t)t->n * qv_dtype_size(t->dev.dtype)));
        return;
    }
    round_to_bf16(t->cpu.data, t->n);
    uint16_t *bits = to_bf16(t->cpu.data, t->n);
    PASS(qv_backend_upload(d->dev, t->dev.data, bits, (size_t)t->n * sizeof *bits));
    free(bits);
}

/* Uniform in [-scale, scale) everywhere in the block. */
static inline void fill_twin(duo *d, twin *t, float scale)
{
    qv_fill_uniform(&d->rng, t->cpu.data, t->n, -scale, scale);
    send_twin(d, t);
}

static inline void poison_twin(duo *d, twin *t)
{
    float *x = t->cpu.data;
    for (int64_t i = 0; i < t->n; i++)
        x[i] = NAN;
    send_twin(d, t);
}

/* A filled twin [rows, cols] in the middle of wider rows: `pad` numbers before and after each. */
static inline twin wide_twin(duo *d, int64_t rows, int64_t cols, int64_t pad, float scale)
{
    twin t = NEW_TWIN(d, QV_BF16, rows, cols + 2 * pad);
    fill_twin(d, &t, scale);
    return t;
}

static inline twin cols_of(twin t, int64_t start, int64_t n)
{
    t.cpu = qv_tensor_cols(t.cpu, start, n);
    t.dev = qv_tensor_cols(t.dev, start, n);
    return t;
}

static inline twin split_of(twin t, int64_t a, int64_t b)
{
    t.cpu = qv_tensor_split(t.cpu, a, b);
    t.dev = qv_tensor_split(t.dev, a, b);
    return t;
}

static inline twin last_of(twin t, int64_t start, int64_t n)
{
    t.cpu = qv_tensor_last(t.cpu, start, n);
    t.dev = qv_tensor_last(t.dev, start, n);
    return t;
}

/* A host array on the device; free with qv_backend_free. */
static inline void *to_device(duo *d, const void *host, size_t bytes)
{
    void *dev;
    PASS(qv_backend_alloc(d->dev, bytes, &dev));
    PASS(qv_backend_upload(d->dev, dev, host, bytes));
    return dev;
}

/* The numbers of a tensor on the device, in the order of its indices, as float32; owned. */
static inline float *fetch(duo *d, const qv_tensor *t)
{
    int64_t last = 0, count = qv_tensor_count(t);
    for (int i = 0; i < t->n_dims; i++)
        last += (t->shape[i] - 1) * t->stride[i];
    size_t size = qv_dtype_size(t->dtype);
    char *raw = must(malloc((size_t)(last + 1) * size));
    float *out = must(malloc((size_t)(count + 1) * sizeof *out));
    PASS(qv_backend_download(d->dev, raw, t->data, (size_t)(last + 1) * size));
    for (int64_t i = 0; i < count; i++) {
        int64_t at = 0, rest = i;
        for (int k = t->n_dims - 1; k >= 0; k--) {
            at += rest % t->shape[k] * t->stride[k];
            rest /= t->shape[k];
        }
        PASS(qv_dtype_to_f32(t->dtype, raw + (size_t)at * size, &out[i], 1));
    }
    free(raw);
    return out;
}

static inline float *host_numbers(const qv_tensor *t)
{
    int64_t count = qv_tensor_count(t);
    float *out = must(malloc((size_t)(count + 1) * sizeof *out));
    for (int64_t i = 0; i < count; i++) {
        int64_t at = 0, rest = i;
        for (int k = t->n_dims - 1; k >= 0; k--) {
            at += rest % t->shape[k] * t->stride[k];
            rest /= t->shape[k];
        }
        out[i] = ((const float *)t->data)[at];
    }
    return out;
}

/* Compare: each element within `ulps` BF16 roundings (2^-8 of its size) plus `noise` times the root
 * mean square of the whole, and the whole within `relative` by norm. Says the worst element. */
static inline void check_numbers(const char *what, const float *got, const float *want, int64_t n,
                                 double relative, double ulps, double noise)
{
    double error = 0, norm = 0, most = 0;
    int64_t worst = 0;
    for (int64_t i = 0; i < n; i++)
        norm += (double)want[i] * want[i];
    double rms = sqrt(norm / (double)(n > 0 ? n : 1));
    for (int64_t i = 0; i < n; i++) {
        double diff = fabs((double)got[i] - want[i]);
        double bound = ulps * fabs((double)want[i]) / 256 + noise * rms + 1e-30;
        error += diff * diff;
        if (!(diff / bound <= most)) {
            most = diff / bound;
            worst = i;
        }
        if (isnan(got[i]) != isnan(want[i])) {
            most = INFINITY;
            worst = i;
            break;
        }
    }
    double ratio = norm > 0 ? sqrt(error / norm) : sqrt(error);
    cr_assert(n == 0 || (most <= 1.0 && ratio <= relative),
              "%s: element %lld of %lld is %.9g, wanted %.9g (%.2f times the bound); "
              "norm of the error %.3g of %.3g allowed",
              what, (long long)worst, (long long)n, (double)got[worst], (double)want[worst], most,
              ratio, relative);
}

static inline void check_twin(duo *d, const char *what, const twin *t, double relative, double ulps,
                              double noise)
{
    float *got = fetch(d, &t->dev), *want = host_numbers(&t->cpu);
    check_numbers(what, got, want, qv_tensor_count(&t->cpu), relative, ulps, noise);
    free(got);
    free(want);
}

/* Results rounded once from float32 sums that differ only in their order: one BF16 rounding may go
 * the other way. */
#define CLOSE_RELATIVE 4e-3
#define CLOSE_ULPS     2.0
#define CLOSE_NOISE    2e-3

/* Run the op on both halves: BOTH(&d, be, side, qv_op_add(be, side(r), side(x))). */
#define ON_CPU(t) ((t).cpu)
#define ON_DEV(t) ((t).dev)

#endif
