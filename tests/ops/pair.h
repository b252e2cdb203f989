/* Two backends side by side: the CPU computing in BF16, which is the definition, and CUDA.
 * Everything is uploaded to both, goes through the same op of each, and is compared.
 *
 * A test opens a pair, which skips it where there is no device. QV_PAIR=cpu puts the CPU's baseline
 * instruction set in CUDA's place, so that the tests themselves can be checked without a device.
 */
#ifndef QV_TESTS_OPS_PAIR_H
#define QV_TESTS_OPS_PAIR_H

#include "tests/ops/ops_test.h"

#ifdef QV_WITH_CUDA
#include "ops/cuda/cuda.h"
#endif

enum { CPU, GPU };

#define PAIR_BLOCKS 4096

typedef struct {
    qv_backend *be[2];
    void *block[2][PAIR_BLOCKS]; /* all that was uploaded, freed by close_pair */
    int n_blocks;
} pair;

/* Whether the device has the kernels of 9.0; says so if not. */
static inline bool is_hopper(const pair *p)
{
#ifdef QV_WITH_CUDA
    if (strcmp(qv_backend_name(p->be[GPU]), "cuda") == 0 && qv_cuda(p->be[GPU])->major == 9)
        return true;
#endif
    fprintf(stderr, "%s is not a device of 9.0\n", qv_backend_name(p->be[GPU]));
    return false;
}

/* A tensor on both sides: activations are F32 on the CPU, BF16 on the device. */
typedef struct {
    qv_tensor t[2];
} both;

/* Plain memory on both sides. */
typedef struct {
    void *at[2];
} both_memory;

static inline pair *open_pair_as(bool deterministic)
{
    const char *want = getenv("QV_PAIR");
    pair *p = must(calloc(1, sizeof *p));
    qv_backend_options cpu = {.name = "cpu", .arithmetic = "bf16"},
                       gpu = {.name = "cuda", .deterministic = deterministic};
    PASS(qv_backend_open(&cpu, &p->be[CPU]));
    if (want && strcmp(want, "cpu") == 0)
        gpu = (qv_backend_options){
            .name = "cpu", .n_threads = 1, .arithmetic = "bf16", .isa = "baseline"};
    if (qv_backend_open(&gpu, &p->be[GPU]) != QV_OK) {
        fprintf(stderr, "no second backend: %s\n", qv_error());
        cr_skip_test();
    }
    return p;
}

static inline pair *open_pair(void)
{
    return open_pair_as(false);
}

static inline void close_pair(pair *p)
{
    for (int side = 0; side < 2; side++) {
        for (int i = 0; i < p->n_blocks; i++)
            qv_backend_free(p->be[side], p->block[side][i]);
        qv_backend_close(p->be[side]);
    }
    free(p);
}

/* Forget what was uploaded since `mark` (p->n_blocks then). */
static inline void release_to(pair *p, int mark)
{
    while (p->n_blocks > mark) {
        p->n_blocks--;
        for (int side = 0; side < 2; side++)
            qv_backend_free(p->be[side], p->block[side][p->n_blocks]);
    }
}

static inline both_memory alloc_both(pair *p, size_t bytes_cpu, size_t bytes_gpu)
{
    both_memory m;
    cr_assert(p->n_blocks < PAIR_BLOCKS, "too many blocks");
    PASS(qv_backend_alloc(p->be[CPU], bytes_cpu ? bytes_cpu : 1, &m.at[CPU]));
    PASS(qv_backend_alloc(p->be[GPU], bytes_gpu ? bytes_gpu : 1, &m.at[GPU]));
    p->block[CPU][p->n_blocks] = m.at[CPU];
    p->block[GPU][p->n_blocks++] = m.at[GPU];
    return m;
}

static inline both_memory upload_both(pair *p, const void *data, size_t bytes)
{
    both_memory m = alloc_both(p, bytes, bytes);
    for (int side = 0; side < 2; side++)
        PASS(qv_backend_upload(p->be[side], m.at[side], data, bytes));
    return m;
}

/* Floats in the dtype of one side. */
static inline void upload_floats(pair *p, int side, qv_dtype dtype, void *to, const float *x,
                                 int64_t n)
{
    size_t bytes = (size_t)n * qv_dtype_size(dtype);
    void *host = must(malloc(bytes ? bytes : 1));
    PASS(qv_dtype_from_f32(dtype, x, host, n));
    PASS(qv_backend_upload(p->be[side], to, host, bytes));
    free(host);
}

static inline both tensor_both(pair *p, const float *x, qv_dtype cpu, qv_dtype gpu, int64_t n0,
                               int64_t n1, int64_t n2)
{
    both b;
    const qv_dtype dtype[2] = {cpu, gpu};
    int64_t n = n0 * n1 * n2;
    both_memory m = alloc_both(p, (size_t)n * qv_dtype_size(cpu), (size_t)n * qv_dtype_size(gpu));
    for (int side = 0; side < 2; side++) {
        b.t[side] = n2 == 1 ? qv_tensor_2d(m.at[side], dtype[side], n0, n1)
                            : qv_tensor_3d(m.at[side], dtype[side], n0, n1, n2);
        upload_floats(p, side, dtype[side], m.at[side], x, n);
    }
    return b;
}

/* Activations [n0, n1] from floats, which are rounded to BF16 on both sides. */
static inline both act_2d(pair *p, const float *x, int64_t n0, int64_t n1)
{
    float *rounded = copied_floats(x, n0 * n1);
    round_to_bf16(rounded, n0 * n1);
    both b = tensor_both(p, rounded, qv_backend_activation_dtype(p->be[CPU]),
                         qv_backend_activation_dtype(p->be[GPU]), n0, n1, 1);
    free(rounded);
    return b;
}

static inline both random_act(pair *p, qv_rng *rng, int64_t n0, int64_t n1, float scale)
{
    float *x = random_floats(rng, n0 * n1, scale);
    both b = act_2d(p, x, n0, n1);
    free(x);
    return b;
}

/* Activations that no one has written: NaN. */
static inline both nan_act(pair *p, int64_t n0, int64_t n1)
{
    float *x = filled_floats(n0 * n1, NAN);
    both b = act_2d(p, x, n0, n1);
    free(x);
    return b;
}

static inline both f32_2d(pair *p, const float *x, int64_t n0, int64_t n1)
{
    return tensor_both(p, x, QV_F32, QV_F32, n0, n1, 1);
}

static inline both random_f32(pair *p, qv_rng *rng, int64_t n0, int64_t n1, float scale)
{
    float *x = random_floats(rng, n0 * n1, scale);
    both b = f32_2d(p, x, n0, n1);
    free(x);
    return b;
}

static inline both nan_f32(pair *p, int64_t n0, int64_t n1)
{
    float *x = filled_floats(n0 * n1, NAN);
    both b = f32_2d(p, x, n0, n1);
    free(x);
    return b;
}

/* The numbers of a 2-D tensor of one side, rows together. */
static inline float *fetch(pair *p, int side, qv_tensor t)
{
    int64_t rows = t.shape[0], n = t.shape[1], row = t.stride[0];
    size_t size = qv_dtype_size(t.dtype),
           bytes = (size_t)(rows > 0 ? (rows - 1) * row + n : 0) * size;
    char *host = must(malloc(bytes ? bytes : 1));
    float *x = must(malloc((size_t)(rows * n + 1) * sizeof *x));
    PASS(qv_backend_sync(p->be[side]));
    if (bytes)
        PASS(qv_backend_download(p->be[side], host, t.data, bytes));
    for (int64_t i = 0; i < rows; i++)
        PASS(qv_dtype_to_f32(t.dtype, host + (size_t)(i * row) * size, x + i * n, n));
    free(host);
    return x;
}

/* |gpu - cpu| <= relative |cpu| + absolute times the root mean square of all, for each element; NaN
 * where the CPU has NaN. One BF16 rounding either way is 2^-8 of a number. */
static inline void compare(pair *p, const char *what, both b, double relative, double absolute)
{
    float *want = fetch(p, CPU, b.t[CPU]), *got = fetch(p, GPU, b.t[GPU]);
    int64_t n = b.t[CPU].shape[0] * b.t[CPU].shape[1], worst = -1;
    double sum = 0, most = 0;
    for (int64_t i = 0; i < n; i++)
        sum += isfinite(want[i]) ? (double)want[i] * want[i] : 0;
    double rms = n ? sqrt(sum / (double)n) : 0;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(want[i]) && isnan(got[i]))
            continue;
        double ratio = fabs((double)got[i] - want[i]) /
                       (relative * fabs((double)want[i]) + absolute * rms + 1e-30);
        if (!(ratio <= most)) {
            most = ratio;
            worst = i;
        }
        if (isnan(ratio))
            break;
    }
    if (getenv("QV_PAIR_VERBOSE"))
        printf("    %-60s worst %.3f of its bound\n", what, most);
    cr_assert(most <= 1.0,
              "%s: row %lld, column %lld is %.9g, wanted %.9g (rms %.3g): %.2f times the bound",
              what, worst < 0 ? -1LL : (long long)(worst / b.t[CPU].shape[1]),
              worst < 0 ? -1LL : (long long)(worst % b.t[CPU].shape[1]), worst < 0 ? 0 : got[worst],
              worst < 0 ? 0 : want[worst], rms, most);
    free(want);
    free(got);
}

/* For outputs that were rounded to BF16 once. */
#define ROUNDED_ONCE 0.0079, 0.002

/* Integers are equal. */
static inline void compare_i32(pair *p, const char *what, const int32_t *cpu, const int32_t *gpu,
                               int64_t n)
{
    int32_t *got = must(malloc((size_t)(n + 1) * sizeof *got));
    if (n)
        PASS(qv_backend_download(p->be[GPU], got, gpu, (size_t)n * sizeof *got));
    for (int64_t i = 0; i < n; i++)
        cr_assert(got[i] == cpu[i], "%s: number %lld is %d, wanted %d", what, (long long)i, got[i],
                  cpu[i]);
    free(got);
}

#endif
