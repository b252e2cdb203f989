/* v16: sixteen float lanes on any instruction set. The CPU's op files are compiled once per
 * instruction set (see ops/CMakeLists.txt) and written in v16 throughout, so that every one of them
 * adds in the same order: AVX2 and AVX-512 give the same bits, the baseline differs only where it
 * has no fused multiply-add.
 *
 * The op files are compiled with -ffp-contract=off: a product is fused with a sum where v_fma says
 * so and nowhere else, whatever the compiler does with the loop around it. That is what makes a
 * full tile and an edge tile agree bit for bit.
 */
#ifndef QV_OPS_CPU_SIMD_H
#define QV_OPS_CPU_SIMD_H

#include "common/dtype.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* clang-format off: a simple function is one line here */

#define QV_INLINE static inline __attribute__((always_inline, unused))

/* --- AVX-512: one register ---------------------------------------------------------------- */

#if defined(__AVX512F__)
#include <immintrin.h>

#define QV_SIMD_NAME      "avx512"
#define QV_SIMD_REGISTERS 32 /* of QV_VN_LANES lanes */

typedef __m512 v16;
typedef __mmask16 v16m; /* a mask: one bit, or all bits of a lane */
typedef v16 vn;         /* one register, whatever it holds */
#define QV_VN_LANES 16

QV_INLINE v16 v_zero(void)
{
    return _mm512_setzero_ps();
}
QV_INLINE v16 v_set1(float x)
{
    return _mm512_set1_ps(x);
}
QV_INLINE v16 v_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
QV_INLINE void v_store(float *p, v16 a)
{
    _mm512_storeu_ps(p, a);
}
QV_INLINE v16 v_add(v16 a, v16 b)
{
    return a + b;
}
QV_INLINE v16 v_sub(v16 a, v16 b)
{
    return a - b;
}
QV_INLINE v16 v_mul(v16 a, v16 b)
{
    return a * b;
}
QV_INLINE v16 v_div(v16 a, v16 b)
{
    return a / b;
}
QV_INLINE v16 v_max(v16 a, v16 b)
{
    return _mm512_max_ps(a, b);
}
QV_INLINE v16 v_min(v16 a, v16 b)
{
    return _mm512_min_ps(a, b);
}
QV_INLINE v16 v_fma(v16 a, v16 b, v16 c)
{
    return _mm512_fmadd_ps(a, b, c);
}
QV_INLINE v16m v_gt(v16 a, v16 b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}
QV_INLINE v16m v_ge(v16 a, v16 b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
/* Lanes of a where the mask says so, else of b. */
QV_INLINE v16 v_select(v16m m, v16 a, v16 b)
{
    return _mm512_mask_blend_ps(m, b, a);
}
QV_INLINE unsigned v_bits(v16m m)
{
    return m;
}
/* p * 2^n for integral n in [-126, 128] */
QV_INLINE v16 v_scale2(v16 p, v16 n)
{
    return _mm512_scalef_ps(p, n);
}
QV_INLINE v16 v_round(v16 a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT);
}
QV_INLINE v16 v_load_n(const float *p, int64_t n)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
QV_INLINE void v_store_n(float *p, v16 a, int64_t n)
{
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a);
}
QV_INLINE v16 v_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

QV_INLINE vn vn_set1(float x)
{
    return v_set1(x);
}
QV_INLINE vn vn_load(const float *p)
{
    return v_load(p);
}
QV_INLINE void vn_store(float *p, vn a)
{
    v_store(p, a);
}
QV_INLINE vn vn_fma(vn a, vn b, vn c)
{
    return v_fma(a, b, c);
}
QV_INLINE vn vn_load_bf16(const uint16_t *p)
{
    return v_load_bf16(p);
}

/* The lanes of a vector added, or their maximum taken, by halves: i with i + 8, then i + 4, i + 2,
 * i + 1. */
#define QV_SIMD_FOLD(name, op4, op8)                                                               \
    QV_INLINE float name(v16 a)                                                                    \
    {                                                                                              \
        __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));            \
        __m256 b = op8(_mm512_castps512_ps256(a), high);                                           \
        __m128 c = op4(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));                    \
        c = op4(c, _mm_movehl_ps(c, c));                                                           \
        return _mm_cvtss_f32(op4(c, _mm_movehdup_ps(c)));                                          \
    }
QV_SIMD_FOLD(v_sum, _mm_add_ps, _mm256_add_ps)
QV_SIMD_FOLD(v_max_lane, _mm_max_ps, _mm256_max_ps)
#undef QV_SIMD_FOLD

/* out[j * out_stride + i] = row[i * stride + j]: 16 rows of four floats become four of 16. */
QV_INLINE void v_transpose_16x4(const float *row, int64_t stride, float *out, int64_t out_stride)
{
    v16 q[4]; /* q[i]: four floats each of rows i, i + 4, i + 8, i + 12 */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const float *p = row + i * stride;
        q[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
        q[i] = _mm512_insertf32x4(q[i], _mm_loadu_ps(p + 4 * stride), 1);
        q[i] = _mm512_insertf32x4(q[i], _mm_loadu_ps(p + 8 * stride), 2);
        q[i] = _mm512_insertf32x4(q[i], _mm_loadu_ps(p + 12 * stride), 3);
    }
    v16 low01 = _mm512_unpacklo_ps(q[0], q[1]), low23 = _mm512_unpacklo_ps(q[2], q[3]);
    v16 high01 = _mm512_unpackhi_ps(q[0], q[1]), high23 = _mm512_unpackhi_ps(q[2], q[3]);
    v_store(out, _mm512_shuffle_ps(low01, low23, 0x44));
    v_store(out + out_stride, _mm512_shuffle_ps(low01, low23, 0xEE));
    v_store(out + 2 * out_stride, _mm512_shuffle_ps(high01, high23, 0x44));
    v_store(out + 3 * out_stride, _mm512_shuffle_ps(high01, high23, 0xEE));
}

/* Lane 4 i + j of the result is v_sum(a[i][j]): the same halves added in the same order, but two
 * vectors share a register as soon as each has lost a half, so that it takes 45 operations, not
 * 128. */
QV_INLINE v16 v_sum_4x4(v16 (*a)[4])
{
    v16 eight[8], four[4], two[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8;
         i++) { /* vectors in the order a[0][0], a[1][0], a[2][0], a[3][0], a[0][1] */
        v16 x = a[2 * i % 4][i / 2], y = a[2 * i % 4 + 1][i / 2];
        eight[i] = _mm512_shuffle_f32x4(x, y, 0x44) + _mm512_shuffle_f32x4(x, y, 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v16 x = eight[2 * i], y = eight[2 * i + 1];
        four[i] = _mm512_shuffle_f32x4(x, y, 0x88) + _mm512_shuffle_f32x4(x, y, 0xDD);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        v16 x = four[2 * i], y = four[2 * i + 1];
        two[i] = _mm512_shuffle_ps(x, y, 0x44) + _mm512_shuffle_ps(x, y, 0xEE);
    }
    return _mm512_shuffle_ps(two[0], two[1], 0x88) + _mm512_shuffle_ps(two[0], two[1], 0xDD);
}

/* --- AVX2: two registers; any other: four GCC vectors ------------------------------------- */

#else

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define QV_SIMD_NAME       "avx2"
#define QV_SIMD_REGISTERS  16
#define QV_VN_LANES        8
typedef __m256 vn;
#define QV_VN_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#else
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#define QV_SIMD_NAME       "baseline"
#define QV_SIMD_REGISTERS  8 /* half of what x86-64 has: a product needs a register of its own */
#define QV_VN_LANES        4
typedef float vn __attribute__((vector_size(16)));
#define QV_VN_FMA(a, b, c) ((a) * (b) + (c))
#endif

#define QV_PARTS (16 / QV_VN_LANES)
typedef int32_t vn_mask __attribute__((vector_size(4 * QV_VN_LANES)));

typedef struct {
    vn part[QV_PARTS];
} v16;

typedef struct {
    vn_mask part[QV_PARTS];
} v16m;

QV_INLINE vn vn_set1(float x)
{
    return x - (vn){0};
}
QV_INLINE vn vn_load(const float *p)
{
    vn a;
    memcpy(&a, p, sizeof a);
    return a;
}
QV_INLINE void vn_store(float *p, vn a)
{
    memcpy(p, &a, sizeof a);
}
QV_INLINE vn vn_fma(vn a, vn b, vn c)
{
    return QV_VN_FMA(a, b, c);
}
QV_INLINE vn vn_load_bf16(const uint16_t *p)
{
#if QV_VN_LANES == 8
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#elif defined(__SSE2__)
    return _mm_castsi128_ps(
        _mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)p)));
#else
    float wide[4];
    for (int i = 0; i < 4; i++)
        wide[i] = qv_bf16_to_f32(p[i]);
    return vn_load(wide);
#endif
}
/* Lanes of a where the mask is all ones, else of b. */
QV_INLINE vn vn_select(vn_mask m, vn a, vn b)
{
    return (vn)((m & (vn_mask)a) | (~m & (vn_mask)b));
}

/* Returns a v16 or v16m whose part i is expr. */
#define QV_SIMD_EACH_OF(type, expr)                                                                \
    type r;                                                                                        \
    _Pragma("GCC unroll 4") for (int i = 0; i < QV_PARTS; i++) r.part[i] = (expr);                 \
    return r
#define QV_SIMD_EACH(expr) QV_SIMD_EACH_OF(v16, expr)

QV_INLINE v16 v_zero(void)
{
    QV_SIMD_EACH((vn){0});
}
QV_INLINE v16 v_set1(float x)
{
    QV_SIMD_EACH(vn_set1(x));
}
QV_INLINE v16 v_load(const float *p)
{
    QV_SIMD_EACH(vn_load(p + i * QV_VN_LANES));
}
QV_INLINE void v_store(float *p, v16 a)
{
    memcpy(p, &a, sizeof a);
}
QV_INLINE v16 v_add(v16 a, v16 b)
{
    QV_SIMD_EACH(a.part[i] + b.part[i]);
}
QV_INLINE v16 v_sub(v16 a, v16 b)
{
    QV_SIMD_EACH(a.part[i] - b.part[i]);
}
QV_INLINE v16 v_mul(v16 a, v16 b)
{
    QV_SIMD_EACH(a.part[i] * b.part[i]);
}
QV_INLINE v16 v_div(v16 a, v16 b)
{
    QV_SIMD_EACH(a.part[i] / b.part[i]);
}
QV_INLINE v16 v_max(v16 a, v16 b)
{
    QV_SIMD_EACH(vn_select(a.part[i] > b.part[i], a.part[i], b.part[i]));
}
QV_INLINE v16 v_min(v16 a, v16 b)
{
    QV_SIMD_EACH(vn_select(a.part[i] < b.part[i], a.part[i], b.part[i]));
}
QV_INLINE v16 v_fma(v16 a, v16 b, v16 c)
{
    QV_SIMD_EACH(QV_VN_FMA(a.part[i], b.part[i], c.part[i]));
}
QV_INLINE v16m v_gt(v16 a, v16 b)
{
    QV_SIMD_EACH_OF(v16m, a.part[i] > b.part[i]);
}
QV_INLINE v16m v_ge(v16 a, v16 b)
{
    QV_SIMD_EACH_OF(v16m, a.part[i] >= b.part[i]);
}
QV_INLINE v16 v_select(v16m m, v16 a, v16 b)
{
    QV_SIMD_EACH(vn_select(m.part[i], a.part[i], b.part[i]));
}
QV_INLINE unsigned vn_bits(vn_mask m)
{
#if QV_VN_LANES == 8
    return (unsigned)_mm256_movemask_ps((__m256)m);
#elif defined(__SSE2__)
    return (unsigned)_mm_movemask_ps((__m128)m);
#else
    return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
#endif
}
QV_INLINE unsigned v_bits(v16m m)
{
    unsigned bits = 0;
    for (int i = 0; i < QV_PARTS; i++)
        bits |= vn_bits(m.part[i]) << (i * QV_VN_LANES);
    return bits;
}
/* Adding and taking away 1.5 * 2^23 rounds to nearest even while |a| < 2^22. */
QV_INLINE v16 v_round(v16 a)
{
    const float magic = 12582912.0f;
    QV_SIMD_EACH((a.part[i] + magic) - magic);
}
QV_INLINE v16 v_load_n(const float *p, int64_t n)
{
    v16 a = v_zero();
    memcpy(&a, p, (size_t)n * sizeof *p);
    return a;
}
QV_INLINE void v_store_n(float *p, v16 a, int64_t n)
{
    memcpy(p, &a, (size_t)n * sizeof *p);
}
QV_INLINE v16 v_load_bf16(const uint16_t *p)
{
    QV_SIMD_EACH(vn_load_bf16(p + i * QV_VN_LANES));
}
/* 2^n in two factors, because 2^128 itself has no exponent. */
QV_INLINE vn vn_scale2(vn p, vn n)
{
    vn_mask whole = __builtin_convertvector(n, vn_mask), half = whole >> 1;
    return p * (vn)((half + 127) << 23) * (vn)((whole - half + 127) << 23);
}
QV_INLINE v16 v_scale2(v16 p, v16 n)
{
    QV_SIMD_EACH(vn_scale2(p.part[i], n.part[i]));
}
QV_INLINE void v_transpose_16x4(const float *row, int64_t stride, float *out, int64_t out_stride)
{
    typedef float four __attribute__((vector_size(16)));
    for (int i = 0; i < 16; i += 4) {
        four q[4];
        for (int j = 0; j < 4; j++)
            memcpy(&q[j], row + (i + j) * stride, sizeof q[j]);
        four low01 = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5);
        four low23 = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5);
        four high01 = __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7);
        four high23 = __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
        q[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
        q[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
        q[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
        q[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
        for (int j = 0; j < 4; j++)
            memcpy(out + j * out_stride + i, &q[j], sizeof q[j]);
    }
}
/* As above: by halves. What is left of four lanes is written out. */
#if QV_VN_LANES == 8
#define QV_SIMD_FOLD_TO_4(f, a)                                                                    \
    vn b = f(a.part[0], a.part[1]);                                                                \
    float c[8];                                                                                    \
    vn_store(c, f(b, _mm256_permute2f128_ps(b, b, 1)))
#else
#define QV_SIMD_FOLD_TO_4(f, a)                                                                    \
    float c[4];                                                                                    \
    vn_store(c, f(f(a.part[0], a.part[2]), f(a.part[1], a.part[3])))
#endif
QV_INLINE vn vn_add(vn a, vn b)
{
    return a + b;
}
QV_INLINE vn vn_max(vn a, vn b)
{
    return vn_select(a > b, a, b);
}
QV_INLINE float v_sum(v16 a)
{
    QV_SIMD_FOLD_TO_4(vn_add, a);
    return (c[0] + c[2]) + (c[1] + c[3]);
}
QV_INLINE float v_max_lane(v16 a)
{
    QV_SIMD_FOLD_TO_4(vn_max, a);
    float x = c[0] > c[2] ? c[0] : c[2], y = c[1] > c[3] ? c[1] : c[3];
    return x > y ? x : y;
}
#undef QV_SIMD_FOLD_TO_4
#undef QV_SIMD_EACH
#undef QV_SIMD_EACH_OF

#endif

/* --- On top of either --------------------------------------------------------------------- */

QV_INLINE v16 v_load_bf16_n(const uint16_t *p, int64_t n)
{
    uint16_t whole[16] = {0};
    memcpy(whole, p, (size_t)n * sizeof *p);
    return v_load_bf16(whole);
}

/* e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 P(r), P fitted at
 * the Chebyshev nodes of that range (relative error 1.1e-8). ln 2 is taken away in two parts, the
 * first short enough for n times it to be exact. Below the smallest normal number the result is 0,
 * above the largest infinity; NaN stays NaN. */
QV_INLINE v16 v_exp(v16 x)
{
    const v16 low = v_set1(-87.33654f), high = v_set1(88.72283f);
    v16 in = v_min(v_max(x, low), high);
    v16 n = v_round(v_mul(in, v_set1(1.44269504f)));
    v16 r = v_fma(n, v_set1(-0.693359375f), in);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    v16 p = v_set1(1.39262131e-3f);
    p = v_fma(p, r, v_set1(8.36320315e-3f));
    p = v_fma(p, r, v_set1(4.16665561e-2f));
    p = v_fma(p, r, v_set1(1.66665763e-1f));
    p = v_fma(p, r, v_set1(0.5f));
    p = v_fma(p, v_mul(r, r), r);
    v16 y = v_scale2(v_add(p, v_set1(1.0f)), n);
    y = v_select(v_ge(x, low), y, v_zero());
    y = v_select(v_gt(x, high), v_set1(INFINITY), y);
    return v_select(v_ge(x, x), y, x);
}

QV_INLINE v16 v_neg(v16 x)
{
    return v_sub(v_zero(), x);
}

/* 1 / (1 + e^-x) */
QV_INLINE v16 v_sigmoid(v16 x)
{
    const v16 one = v_set1(1.0f);
    return v_div(one, v_add(one, v_exp(v_neg(x))));
}

/* x / (1 + e^-x) */
QV_INLINE v16 v_silu(v16 x)
{
    return v_div(x, v_add(v_set1(1.0f), v_exp(v_neg(x))));
}

/* Walk [0, n) by sixteen; `lanes` is 16, or what is left at the end. */
#define QV_FOR_LANES(i, lanes, n)                                                                  \
    for (int64_t i = 0, lanes; i < (n) && (lanes = (n)-i < 16 ? (n)-i : 16); i += 16)

/* Whole vectors take the short way; both ways give the same lanes. */
QV_INLINE v16 v_load_lanes(const float *p, int64_t lanes)
{
    return lanes == 16 ? v_load(p) : v_load_n(p, lanes);
}
QV_INLINE void v_store_lanes(float *p, v16 a, int64_t lanes)
{
    if (lanes == 16)
        v_store(p, a);
    else
        v_store_n(p, a, lanes);
}

#endif
