#include "common/dtype.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

Test(dtype, names_and_sizes_are_those_of_safetensors)
{
    static const struct {
        const char *name;
        qv_dtype dtype;
        size_t bytes;
        bool is_float;
    } rows[] = {
        {"F64", QV_F64, 8, true},         {"F32", QV_F32, 4, true},
        {"F16", QV_F16, 2, true},         {"BF16", QV_BF16, 2, true},
        {"F8_E4M3", QV_F8_E4M3, 1, true}, {"F8_E5M2", QV_F8_E5M2, 1, true},
        {"I64", QV_I64, 8, false},        {"I32", QV_I32, 4, false},
        {"I16", QV_I16, 2, false},        {"I8", QV_I8, 1, false},
        {"U64", QV_U64, 8, false},        {"U32", QV_U32, 4, false},
        {"U16", QV_U16, 2, false},        {"U8", QV_U8, 1, false},
        {"BOOL", QV_BOOL, 1, false},
    };
    cr_assert_eq(sizeof rows / sizeof rows[0], QV_DTYPE_COUNT);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        qv_dtype dtype;
        cr_assert_eq(qv_dtype_parse(rows[i].name, &dtype), QV_OK, "%s", rows[i].name);
        cr_assert_eq(dtype, rows[i].dtype, "%s", rows[i].name);
        cr_assert_str_eq(qv_dtype_name(dtype), rows[i].name);
        cr_assert_eq(qv_dtype_size(dtype), rows[i].bytes, "%s", rows[i].name);
        cr_assert_eq(qv_dtype_is_float(dtype), rows[i].is_float, "%s", rows[i].name);
    }
}

Test(dtype, refuses_unknown_names)
{
    static const char *const names[] = {"", "f32", "F32 ", "BF17", "F4", "QV_F32"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        qv_dtype dtype;
        cr_assert_eq(qv_dtype_parse(names[i], &dtype), QV_ERR_UNSUPPORTED, "%s", names[i]);
        cr_assert_not_null(strstr(qv_error(), names[i]));
    }
    cr_assert_str_eq(qv_dtype_name((qv_dtype)77), "unknown");
    cr_assert_eq(qv_dtype_size((qv_dtype)-1), 0);
}

/* --- the small floats against their definition ------------------------------------------------ */

/* A type by its numbers: value = (-1)^s * 2^(e - bias) * 1.m, subnormals below. */
typedef struct {
    const char *name;
    qv_dtype dtype;
    int exp_bits, man_bits;
    bool has_inf;
    uint32_t max_code; /* largest finite magnitude */
} small_float;

static const small_float types[] = {
    {"F16", QV_F16, 5, 10, true, 0x7BFF},
    {"BF16", QV_BF16, 8, 7, true, 0x7F7F},
    {"F8_E4M3", QV_F8_E4M3, 4, 3, false, 0x7E},
    {"F8_E5M2", QV_F8_E5M2, 5, 2, true, 0x7B},
};
#define N_TYPES (sizeof types / sizeof types[0])

static double value_of(const small_float *t, uint32_t magnitude)
{
    int bias = (1 << (t->exp_bits - 1)) - 1;
    int exp = (int)(magnitude >> t->man_bits);
    double man = magnitude & ((1u << t->man_bits) - 1);
    return exp == 0 ? ldexp(man, 1 - bias - t->man_bits)
                    : ldexp(man + (1 << t->man_bits), exp - bias - t->man_bits);
}

static float widen(const small_float *t, uint32_t code)
{
    float out;
    uint8_t byte = (uint8_t)code;
    uint16_t half = (uint16_t)code;
    const void *src = qv_dtype_size(t->dtype) == 1 ? (const void *)&byte : &half;
    cr_assert_eq(qv_dtype_to_f32(t->dtype, src, &out, 1), QV_OK);
    return out;
}

static uint32_t narrow(const small_float *t, float x)
{
    uint8_t byte;
    uint16_t half;
    bool is_byte = qv_dtype_size(t->dtype) == 1;
    cr_assert_eq(qv_dtype_from_f32(t->dtype, &x, is_byte ? (void *)&byte : &half, 1), QV_OK);
    return is_byte ? byte : half;
}

static uint32_t sign_bit(const small_float *t)
{
    return 1u << (t->exp_bits + t->man_bits);
}

Test(dtype, widens_every_code_exactly_and_narrows_it_back)
{
    for (size_t k = 0; k < N_TYPES; k++) {
        const small_float *t = &types[k];
        for (uint32_t code = 0; code <= t->max_code; code++) {
            double want = value_of(t, code);
            cr_assert_eq(widen(t, code), want, "%s %#x", t->name, code);
            cr_assert_eq(widen(t, code | sign_bit(t)), -want, "%s %#x", t->name, code);
            cr_assert_eq(narrow(t, (float)want), code, "%s %#x", t->name, code);
            cr_assert_eq(narrow(t, (float)-want), code | sign_bit(t), "%s %#x", t->name, code);
        }
    }
}

Test(dtype, rounds_to_nearest_and_ties_to_even)
{
    for (size_t k = 0; k < N_TYPES; k++) {
        const small_float *t = &types[k];
        for (uint32_t code = 0; code < t->max_code; code++) {
            /* Between two neighbours: the tie, and the floats just beside it. */
            float tie = (float)((value_of(t, code) + value_of(t, code + 1)) / 2);
            uint32_t even = code % 2 == 0 ? code : code + 1;
            cr_assert_eq(narrow(t, tie), even, "%s tie above %#x", t->name, code);
            cr_assert_eq(narrow(t, nextafterf(tie, 0)), code, "%s below the tie %#x", t->name,
                         code);
            cr_assert_eq(narrow(t, nextafterf(tie, INFINITY)), code + 1, "%s above the tie %#x",
                         t->name, code);
        }
    }
}

Test(dtype, maps_infinities_overflow_and_nan)
{
    for (size_t k = 0; k < N_TYPES; k++) {
        const small_float *t = &types[k];
        uint32_t beyond = t->has_inf ? t->max_code + 1 : t->max_code; /* infinity or saturation */
        cr_assert_eq(narrow(t, INFINITY), beyond, "%s", t->name);
        cr_assert_eq(narrow(t, -INFINITY), beyond | sign_bit(t), "%s", t->name);
        double max = value_of(t, t->max_code);
        double step = max - value_of(t, t->max_code - 1);
        cr_assert_eq(narrow(t, (float)(max + step * 0.499)), t->max_code, "%s", t->name);
        if (max + step < 0x1p127)
            cr_assert_eq(narrow(t, (float)(max + step * 0.501)), beyond, "%s", t->name);
        cr_assert_eq(narrow(t, 3.4e38f), beyond, "%s", t->name);
        if (t->has_inf) {
            cr_assert(isinf(widen(t, beyond)) && widen(t, beyond) > 0, "%s", t->name);
            cr_assert(widen(t, beyond | sign_bit(t)) < 0, "%s", t->name);
        }
        /* Every NaN stays one, with its sign, whatever its payload. */
        static const uint32_t nans[] = {0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7F801000, 0x7FBFFFFF};
        for (size_t i = 0; i < sizeof nans / sizeof nans[0]; i++) {
            uint32_t code = narrow(t, qv_f32_from_bits(nans[i]));
            cr_assert(isnan(widen(t, code)), "%s %#x", t->name, nans[i]);
            cr_assert_eq(code & sign_bit(t), 0, "%s", t->name);
            code = narrow(t, qv_f32_from_bits(nans[i] | 0x80000000));
            cr_assert(isnan(widen(t, code)) && (code & sign_bit(t)) != 0, "%s", t->name);
        }
        for (uint32_t code = beyond + 1; code < sign_bit(t); code++)
            cr_assert(isnan(widen(t, code)), "%s %#x", t->name, code);
    }
}

Test(dtype, flushes_what_is_below_half_of_the_least)
{
    for (size_t k = 0; k < N_TYPES; k++) {
        const small_float *t = &types[k];
        cr_assert_eq(narrow(t, 1e-45f), 0, "%s", t->name);
        cr_assert_eq(narrow(t, -0.0f), sign_bit(t), "%s", t->name);
        cr_assert_eq(narrow(t, (float)(value_of(t, 1) * 0.499)), 0, "%s", t->name);
        cr_assert_eq(narrow(t, (float)(value_of(t, 1) * 0.501)), 1, "%s", t->name);
    }
}

Test(dtype, converts_unaligned_arrays_and_refuses_integers)
{
    unsigned char bytes[1 + 8 * 3];
    const double values[3] = {1.5, -2, 1e300};
    float out[3];
    memcpy(bytes + 1, values, sizeof values);
    cr_assert_eq(qv_dtype_to_f32(QV_F64, bytes + 1, out, 3), QV_OK);
    cr_assert(out[0] == 1.5f && out[1] == -2 && isinf(out[2]));
    cr_assert_eq(qv_dtype_from_f32(QV_F64, out, bytes + 1, 2), QV_OK);
    cr_assert_eq(memcmp(bytes + 1, values, 16), 0);
    cr_assert_eq(qv_dtype_to_f32(QV_BF16, bytes, out, 0), QV_OK);
    cr_assert_eq(qv_dtype_to_f32(QV_I32, bytes, out, 1), QV_ERR_UNSUPPORTED);
    cr_assert_eq(qv_dtype_from_f32(QV_BOOL, out, bytes, 1), QV_ERR_UNSUPPORTED);
}
