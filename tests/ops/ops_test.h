/* What the op tests share: random data, an open backend, and the comparison with a formula in
 * double precision.
 */
#ifndef QV_TESTS_OPS_OPS_TEST_H
#define QV_TESTS_OPS_OPS_TEST_H

#include "ops/ops.h"
#include "tests/ops/shapes.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Half the distance between 1 and the next float: the largest relative error of one rounding. */
#define U32 5.9604644775390625e-8

/* --- Random data -------------------------------------------------------------------------- */

static inline void *must(void *p)
{
    cr_assert_not_null(p, "no memory");
    return p;
}

/* Whether the device is the emulated one (tests/emulate/), some thousand times slower than any
 * other: cases that repeat at a larger size what smaller ones show are left out there. */
static inline bool is_emulated(const qv_backend *be)
{
    return strstr(qv_backend_describe(be), "emulated") != NULL;
}

/* Uniform in [-scale, scale). */
static inline float *random_floats(qv_rng *rng, int64_t n, float scale)
{
    float *x = must(malloc((size_t)(n > 0 ? n : 1) * sizeof *x));
    qv_fill_uniform(rng, x, n, -scale, scale);
    return x;
}

static inline float *filled_floats(int64_t n, float value)
{
    float *x = must(malloc((size_t)(n > 0 ? n : 1) * sizeof *x));
    for (int64_t i = 0; i < n; i++)
        x[i] = value;
    return x;
}

static inline float *copied_floats(const float *src, int64_t n)
{
    float *x = must(malloc((size_t)(n > 0 ? n : 1) * sizeof *x));
    memcpy(x, src, (size_t)n * sizeof *x);
    return x;
}

/* Round to what BF16 can hold. */
static inline void round_to_bf16(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = qv_bf16_to_f32(qv_f32_to_bf16(x[i]));
}

static inline uint16_t *to_bf16(const float *x, int64_t n)
{
    uint16_t *y = must(malloc((size_t)n * sizeof *y));
    for (int64_t i = 0; i < n; i++)
        y[i] = qv_f32_to_bf16(x[i]);
    return y;
}

static inline double *new_doubles(int64_t n)
{
    return must(calloc((size_t)(n > 0 ? n : 1), sizeof(double)));
}

/* --- Backend ------------------------------------------------------------------------------ */

static const char *const isas[] = {"avx512", "avx2", "baseline"};

/* Ops must pass; the message is the op's own sentence. */
#define PASS(expr)                                                                                 \
    do {                                                                                           \
        qv_status pass_status = (expr);                                                            \
        cr_assert(pass_status == QV_OK, "%s: %s: %s", #expr, qv_status_name(pass_status),          \
                  qv_error());                                                                     \
    } while (0)

/* Must fail with `status` and a sentence that contains `text`. */
#define FAIL_WITH(want, text, expr)                                                                \
    do {                                                                                           \
        qv_status fail_status = (expr);                                                            \
        cr_assert(fail_status == (want), "%s: %s: %s", #expr, qv_status_name(fail_status),         \
                  qv_error());                                                                     \
        cr_assert(strstr(qv_error(), text), "'%s' does not say '%s'", qv_error(), text);           \
    } while (0)

/* NULL if this processor has no such instruction set. */
static inline qv_backend *open_isa(const char *isa, int n_threads)
{
    qv_backend *be;
    qv_backend_options options = {.name = "cpu", .n_threads = n_threads, .isa = isa};
    if (qv_backend_open(&options, &be) != QV_OK)
        return NULL;
    return be;
}

static inline qv_backend *open_cpu(int n_threads)
{
    qv_backend *be = open_isa(NULL, n_threads);
    cr_assert_not_null(be, "%s", qv_error());
    return be;
}

/* For every instruction set of this processor; closes the backend behind itself. */
#define FOR_EACH_ISA(be, n_threads)                                                                \
    for (size_t isa_ = 0; isa_ < QV_ROWS(isas); isa_++)                                            \
        for (qv_backend *be = open_isa(isas[isa_], n_threads); be; qv_backend_close(be), be = NULL)

/* --- Comparison --------------------------------------------------------------------------- */

/* |got - want| <= bound for each element; says which one is worst. */
static inline void check_bound(const char *what, const float *got, const double *want,
                               const double *bound, int64_t n)
{
    int64_t worst = 0;
    double most = 0;
    for (int64_t i = 0; i < n; i++) {
        double ratio = fabs(got[i] - want[i]) / (bound[i] > 0 ? bound[i] : 1e-300);
        if (!(ratio <= most)) {
            most = ratio;
            worst = i;
        }
        if (isnan(got[i]) || isnan(want[i]))
            break;
    }
    cr_assert(most <= 1.0, "%s: element %lld is %.9g, wanted %.9g +- %.3g (%.2f times the bound)",
              what, (long long)worst, got[worst], want[worst], bound[worst], most);
}

/* The same with one bound per element of |want| * relative + absolute. */
static inline void check_close(const char *what, const float *got, const double *want, int64_t n,
                               double relative, double absolute)
{
    double *bound = new_doubles(n);
    for (int64_t i = 0; i < n; i++)
        bound[i] = fabs(want[i]) * relative + absolute;
    check_bound(what, got, want, bound, n);
    free(bound);
}

/* Bit for bit; NaN equals the same NaN. */
static inline void check_same(const char *what, const float *got, const float *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        cr_assert(qv_f32_bits(got[i]) == qv_f32_bits(want[i]),
                  "%s: element %lld is %.9g, wanted %.9g", what, (long long)i, got[i], want[i]);
}

static inline double silu_d(double x)
{
    return x / (1.0 + exp(-x));
}

static inline double softplus_d(double x)
{
    return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
}

static inline double sigmoid_d(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

#endif
