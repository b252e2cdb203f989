/* Arithmetic and comparisons of values: what operators do once their operands are known.
 */
#include "models/jinja.h"

#include <math.h>
#include <string.h>

/* ---- Arithmetic ------------------------------------------------------------------------------ */

static qv_status unsupported_operands(qv_jrun *run, int op, qv_jvalue a, qv_jvalue b)
{
    return qv_j_fail(run, "unsupported operand type(s) for %s: '%s' and '%s'",
                     qv_j_token_name((qv_jtoken_type)op), qv_j_type_name(a), qv_j_type_name(b));
}

static qv_status overflow(qv_jrun *run)
{
    return qv_j_limit(run, "a number is beyond 64 bits");
}

static int64_t floor_div(int64_t a, int64_t b)
{
    return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

/* a to the power of b >= 0; false on overflow. */
static bool int_power(int64_t a, int64_t b, int64_t *out)
{
    *out = 1;
    while (b > 0) {
        if ((b & 1) && __builtin_mul_overflow(*out, a, out))
            return false;
        b >>= 1;
        if (b > 0 && __builtin_mul_overflow(a, a, &a))
            return false;
    }
    return true;
}

static qv_status int_binary(qv_jrun *run, int op, int64_t a, int64_t b, qv_jvalue *out)
{
    int64_t r = 0;
    bool fits = true;
    if (b == 0 && (op == QV_JT_DIV || op == QV_JT_FLOORDIV || op == QV_JT_MOD))
        return qv_j_fail(run, op == QV_JT_DIV        ? "division by zero"
                              : op == QV_JT_FLOORDIV ? "integer division or modulo by zero"
                                                     : "integer modulo by zero");
    switch (op) {
    case QV_JT_ADD:
        fits = !__builtin_add_overflow(a, b, &r);
        break;
    case QV_JT_SUB:
        fits = !__builtin_sub_overflow(a, b, &r);
        break;
    case QV_JT_MUL:
        fits = !__builtin_mul_overflow(a, b, &r);
        break;
    case QV_JT_DIV:
        *out = qv_j_float((double)a / (double)b);
        return QV_OK;
    case QV_JT_FLOORDIV:
        fits = a != INT64_MIN || b != -1;
        r = fits ? floor_div(a, b) : 0;
        break;
    case QV_JT_MOD:
        r = b == -1 ? 0 : a - floor_div(a, b) * b;
        break;
    default:
        if (b < 0 && a == 0)
            return qv_j_fail(run, "0.0 cannot be raised to a negative power");
        if (b < 0) {
            *out = qv_j_float(pow((double)a, (double)b));
            return QV_OK;
        }
        fits = int_power(a, b, &r);
    }
    *out = qv_j_int(r);
    return fits ? QV_OK : overflow(run);
}

static qv_status float_binary(qv_jrun *run, int op, double a, double b, qv_jvalue *out)
{
    double r;
    if (b == 0 && (op == QV_JT_DIV || op == QV_JT_FLOORDIV || op == QV_JT_MOD))
        return qv_j_fail(run, op == QV_JT_DIV        ? "float division by zero"
                              : op == QV_JT_FLOORDIV ? "float floor division by zero"
                                                     : "float modulo");
    switch (op) {
    case QV_JT_ADD:
        r = a + b;
        break;
    case QV_JT_SUB:
        r = a - b;
        break;
    case QV_JT_MUL:
        r = a * b;
        break;
    case QV_JT_DIV:
        r = a / b;
        break;
    case QV_JT_POW:
        r = pow(a, b);
        if (isinf(r) && isfinite(a) && isfinite(b))
            return qv_j_fail(run, a == 0 ? "0.0 cannot be raised to a negative power"
                                         : "numerical result out of range");
        if (isnan(r) && !isnan(a) && !isnan(b))
            return qv_j_fail(run, "complex numbers are not supported");
        break;
    default: {
        /* The remainder has the sign of b; the quotient goes with it. */
        double rest = fmod(a, b), quotient = (a - rest) / b;
        if (rest != 0 && (b < 0) != (rest < 0)) {
            rest += b;
            quotient -= 1;
        }
        double whole = floor(quotient);
        r = op == QV_JT_MOD ? (rest == 0 ? copysign(0.0, b) : rest)
                            : whole + (quotient - whole > 0.5);
    }
    }
    *out = qv_j_float(r);
    return QV_OK;
}

/* Text or a list, n times. */
static qv_status repeat(qv_jrun *run, qv_jvalue v, int64_t times, qv_jvalue *out)
{
    uint64_t n = times > 0 ? (uint64_t)times : 0;
    uint64_t size = v.type == QV_J_STR ? v.len : v.seq->n, total;
    if (__builtin_mul_overflow(n, size, &total) || total > run->limits.max_memory_bytes)
        return qv_j_limit(run, "the chat template needs more than %zu bytes of memory",
                          run->limits.max_memory_bytes);
    if (size == 0)
        n = 0;
    if (v.type == QV_J_STR) {
        qv_jbuilder b = {.run = run};
        for (uint64_t i = 0; i < n; i++)
            QV_TRY(qv_j_add_text(&b, qv_j_text(v)));
        *out = qv_j_built(&b);
        out->safe = v.safe;
        return QV_OK;
    }
    QV_TRY(qv_j_seq(run, (qv_jtype)v.type, total, out));
    for (uint64_t i = 0; i < n; i++)
        memcpy(out->seq->items + i * size, v.seq->items, size * sizeof(qv_jvalue));
    return QV_OK;
}

/* a + b of two strings. One that is safe makes the other so by escaping it. */
static qv_status join_text(qv_jrun *run, qv_jvalue a, qv_jvalue b, qv_jvalue *out)
{
    qv_jstr left = qv_j_text(a), right = qv_j_text(b);
    qv_jbuilder joined = {.run = run};
    if (a.safe && !b.safe)
        QV_TRY(qv_j_escape(run, right, &right));
    if (b.safe && !a.safe)
        QV_TRY(qv_j_escape(run, left, &left));
    QV_TRY(qv_j_add_text(&joined, left));
    QV_TRY(qv_j_add_text(&joined, right));
    *out = qv_j_built(&joined);
    out->safe = a.safe || b.safe;
    return QV_OK;
}

static qv_status join_seqs(qv_jrun *run, qv_jvalue a, qv_jvalue b, qv_jvalue *out)
{
    QV_TRY(qv_j_seq(run, (qv_jtype)a.type, a.seq->n + b.seq->n, out));
    if (a.seq->n > 0)
        memcpy(out->seq->items, a.seq->items, a.seq->n * sizeof(qv_jvalue));
    if (b.seq->n > 0)
        memcpy(out->seq->items + a.seq->n, b.seq->items, b.seq->n * sizeof(qv_jvalue));
    return QV_OK;
}

static bool is_repeatable(qv_jvalue v)
{
    return v.type == QV_J_STR || v.type == QV_J_LIST || v.type == QV_J_TUPLE;
}

/* a + b where they are not both numbers. */
static qv_status add_others(qv_jrun *run, qv_jvalue a, qv_jvalue b, qv_jvalue *out)
{
    if (a.type == QV_J_STR && b.type == QV_J_STR)
        return join_text(run, a, b, out);
    if (a.type == b.type && (a.type == QV_J_LIST || a.type == QV_J_TUPLE))
        return join_seqs(run, a, b, out);
    if (is_repeatable(a))
        return qv_j_fail(run, "can only concatenate %s (not \"%s\") to %s", qv_j_type_name(a),
                         qv_j_type_name(b), qv_j_type_name(a));
    return unsupported_operands(run, QV_JT_ADD, a, b);
}

qv_status qv_j_binary(qv_jrun *run, int op, qv_jvalue a, qv_jvalue b, qv_jvalue *out)
{
    int64_t i, j;
    double x, y;
    if (a.type == QV_J_UNDEFINED || b.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, a.type == QV_J_UNDEFINED ? a : b);
    bool int_a = qv_j_as_int(a, &i), int_b = qv_j_as_int(b, &j);
    if (int_a && int_b)
        return int_binary(run, op, i, j, out);
    if (qv_j_as_float(a, &x) && qv_j_as_float(b, &y))
        return float_binary(run, op, x, y, out);
    if (op == QV_JT_ADD)
        return add_others(run, a, b, out);
    if (op == QV_JT_MUL && is_repeatable(a) && int_b)
        return repeat(run, a, j, out);
    if (op == QV_JT_MUL && is_repeatable(b) && int_a)
        return repeat(run, b, i, out);
    if (op == QV_JT_MOD && a.type == QV_J_STR)
        return qv_j_fail(run, "formatting with '%%' is not supported");
    return unsupported_operands(run, op, a, b);
}

qv_status qv_j_sign(qv_jrun *run, bool negate, qv_jvalue v, qv_jvalue *out)
{
    int64_t i;
    if (v.type == QV_J_UNDEFINED)
        return qv_j_fail_undefined(run, v);
    if (v.type == QV_J_FLOAT) {
        *out = qv_j_float(negate ? -v.real : v.real);
        return QV_OK;
    }
    if (!qv_j_as_int(v, &i))
        return qv_j_fail(run, "bad operand type for unary %c: '%s'", negate ? '-' : '+',
                         qv_j_type_name(v));
    if (negate && i == INT64_MIN)
        return overflow(run);
    *out = qv_j_int(negate ? -i : i);
    return QV_OK;
}

/* ---- Comparisons ----------------------------------------------------------------------------- */

qv_status qv_j_relation(qv_jrun *run, int op, qv_jvalue a, qv_jvalue b, bool *out)
{
    int order;
    bool unordered;
    switch (op) {
    case QV_JT_EQ:
    case QV_JT_NE:
        QV_TRY(qv_j_equal(run, a, b, out));
        *out ^= op == QV_JT_NE;
        return QV_OK;
    case QV_JT_IN:
    case QV_JT_NOT_IN:
        QV_TRY(qv_j_contains(run, b, a, out));
        *out ^= op == QV_JT_NOT_IN;
        return QV_OK;
    default:
        QV_TRY(qv_j_compare(run, a, b, qv_j_token_name((qv_jtoken_type)op), &order, &unordered));
        *out = !unordered && (op == QV_JT_LT   ? order < 0
                              : op == QV_JT_LE ? order <= 0
                              : op == QV_JT_GT ? order > 0
                                               : order >= 0);
        return QV_OK;
    }
}
