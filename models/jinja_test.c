/* Tests: what stands behind `is`.
 */
#include "models/jinja.h"
#include "models/unicode.h"

#include <utf8proc.h>

#define TEST(name) static qv_status name(qv_jrun *run, qv_jcall *call, qv_jvalue *out)

/* Tests that ask for the type alone; `run` is there for the table. */
#define TYPE_TEST(name, condition)                                                                 \
    TEST(name)                                                                                     \
    {                                                                                              \
        qv_jvalue v = call->self;                                                                  \
        *out = qv_j_bool(condition);                                                               \
        return qv_j_charge(run, 0);                                                                \
    }

TYPE_TEST(is_defined, v.type != QV_J_UNDEFINED)
TYPE_TEST(is_undefined, v.type == QV_J_UNDEFINED)
TYPE_TEST(is_none, v.type == QV_J_NONE)
TYPE_TEST(is_boolean, v.type == QV_J_BOOL)
TYPE_TEST(is_true, v.type == QV_J_BOOL && v.boolean)
TYPE_TEST(is_false, v.type == QV_J_BOOL && !v.boolean)
TYPE_TEST(is_integer, v.type == QV_J_INT)
TYPE_TEST(is_float, v.type == QV_J_FLOAT)
TYPE_TEST(is_number, v.type == QV_J_BOOL || v.type == QV_J_INT || v.type == QV_J_FLOAT)
TYPE_TEST(is_string, v.type == QV_J_STR)
TYPE_TEST(is_mapping, v.type == QV_J_DICT)
/* Undefined values count: calling one is what fails. */
TYPE_TEST(is_callable, v.type == QV_J_MACRO || v.type == QV_J_FUNCTION || v.type == QV_J_METHOD ||
                           v.type == QV_J_UNDEFINED)
TYPE_TEST(is_escaped, v.type == QV_J_STR && v.safe)

/* What has a length and items by index or key. */
TYPE_TEST(is_sequence, v.type == QV_J_STR || v.type == QV_J_LIST || v.type == QV_J_TUPLE ||
                           v.type == QV_J_DICT || v.type == QV_J_RANGE || v.type == QV_J_UNDEFINED)

TYPE_TEST(is_iterable, v.type == QV_J_STR || v.type == QV_J_LIST || v.type == QV_J_TUPLE ||
                           v.type == QV_J_DICT || v.type == QV_J_RANGE || v.type == QV_J_VIEW ||
                           v.type == QV_J_ITER || v.type == QV_J_UNDEFINED || v.type == QV_J_LOOP)

/* ---- Numbers --------------------------------------------------------------------------------- */

/* v % divisor == expected */
static qv_status has_remainder(qv_jrun *run, qv_jvalue v, qv_jvalue divisor, int64_t expected,
                               qv_jvalue *out)
{
    qv_jvalue rest;
    bool equal;
    QV_TRY(qv_j_binary(run, QV_JT_MOD, v, divisor, &rest));
    QV_TRY(qv_j_equal(run, rest, qv_j_int(expected), &equal));
    *out = qv_j_bool(equal);
    return QV_OK;
}

TEST(is_odd)
{
    return has_remainder(run, call->self, qv_j_int(2), 1, out);
}

TEST(is_even)
{
    return has_remainder(run, call->self, qv_j_int(2), 0, out);
}

TEST(is_divisible)
{
    return has_remainder(run, call->self, call->args[0], 0, out);
}

/* ---- Comparisons ----------------------------------------------------------------------------- */

TEST(is_equal)
{
    bool equal;
    QV_TRY(qv_j_equal(run, call->self, call->args[0], &equal));
    *out = qv_j_bool(equal != call->negate);
    return QV_OK;
}

static qv_status is_ordered(qv_jrun *run, qv_jcall *call, const char *op, qv_jvalue *out)
{
    int order;
    bool unordered, or_equal = op[1] == '=';
    QV_TRY(qv_j_compare(run, call->self, call->args[0], op, &order, &unordered));
    bool holds = op[0] == '<' ? order < 0 : order > 0;
    *out = qv_j_bool(!unordered && (holds || (or_equal && order == 0)));
    return QV_OK;
}

TEST(is_less)
{
    return is_ordered(run, call, "<", out);
}

TEST(is_less_or_equal)
{
    return is_ordered(run, call, "<=", out);
}

TEST(is_greater)
{
    return is_ordered(run, call, ">", out);
}

TEST(is_greater_or_equal)
{
    return is_ordered(run, call, ">=", out);
}

TEST(is_in)
{
    bool found;
    QV_TRY(qv_j_contains(run, call->args[0], call->self, &found));
    *out = qv_j_bool(found);
    return QV_OK;
}

/* The same object: of one type, and either equal and without parts or one and the same. */
TEST(is_same)
{
    qv_jvalue a = call->self, b = call->args[0];
    bool same = a.type == b.type;
    if (same && a.type <= QV_J_STR)
        QV_TRY(qv_j_equal(run, a, b, &same));
    else if (same)
        same = a.seq == b.seq;
    *out = qv_j_bool(same);
    return QV_OK;
}

/* ---- Text and names -------------------------------------------------------------------------- */

/* Whether the text has letters with case, and all of them have the one. */
static qv_status has_case(qv_jrun *run, qv_jvalue v, utf8proc_category_t wanted, qv_jvalue *out)
{
    qv_jstr s;
    bool some = false, all = true;
    QV_TRY(qv_j_to_str(run, v, &s));
    for (size_t i = 0, size; i < s.len; i += size) {
        uint32_t cp = qv_unicode_get(s.data + i, &size);
        if (!qv_j_is_cased(cp))
            continue;
        some = true;
        all &= utf8proc_category((utf8proc_int32_t)cp) == wanted;
    }
    *out = qv_j_bool(some && all);
    return qv_j_charge(run, s.len);
}

TEST(is_lower)
{
    return has_case(run, call->self, UTF8PROC_CATEGORY_LL, out);
}

TEST(is_upper)
{
    return has_case(run, call->self, UTF8PROC_CATEGORY_LU, out);
}

TEST(is_filter)
{
    *out = qv_j_bool(call->self.type == QV_J_STR && qv_j_find_filter(qv_j_text(call->self)));
    return qv_j_charge(run, 0);
}

TEST(is_test)
{
    *out = qv_j_bool(call->self.type == QV_J_STR && qv_j_find_test(qv_j_text(call->self)));
    return qv_j_charge(run, 0);
}

/* ---- The table ------------------------------------------------------------------------------- */

static const qv_jcallable tests[] = {
    {.name = "boolean", .fn = is_boolean},
    {.name = "callable", .fn = is_callable},
    {.name = "defined", .fn = is_defined},
    {.name = "divisibleby", .fn = is_divisible, .params = {"num"}, .n_required = 1},
    {.name = "eq", .fn = is_equal, .params = {"other"}, .n_required = 1, .positional = true},
    {.name = "equalto", .fn = is_equal, .params = {"other"}, .n_required = 1, .positional = true},
    {.name = "==", .fn = is_equal, .params = {"other"}, .n_required = 1, .positional = true},
    {.name = "escaped", .fn = is_escaped},
    {.name = "even", .fn = is_even},
    {.name = "false", .fn = is_false},
    {.name = "filter", .fn = is_filter},
    {.name = "float", .fn = is_float},
    {.name = "ge",
     .fn = is_greater_or_equal,
     .params = {"other"},
     .n_required = 1,
     .positional = true},
    {.name = ">=",
     .fn = is_greater_or_equal,
     .params = {"other"},
     .n_required = 1,
     .positional = true},
    {.name = "greaterthan",
     .fn = is_greater,
     .params = {"other"},
     .n_required = 1,
     .positional = true},
    {.name = "gt", .fn = is_greater, .params = {"other"}, .n_required = 1, .positional = true},
    {.name = ">", .fn = is_greater, .params = {"other"}, .n_required = 1, .positional = true},
    {.name = "in", .fn = is_in, .params = {"seq"}, .n_required = 1},
    {.name = "integer", .fn = is_integer},
    {.name = "iterable", .fn = is_iterable},
    {.name = "le",
     .fn = is_less_or_equal,
     .params = {"other"},
     .n_required = 1,
     .positional = true},
    {.name = "<=",
     .fn = is_less_or_equal,
     .params = {"other"},
     .n_required = 1,
     .positional = true},
    {.name = "lessthan", .fn = is_less, .params = {"other"}, .n_required = 1, .positional = true},
    {.name = "lower", .fn = is_lower},
    {.name = "lt", .fn = is_less, .params = {"other"}, .n_required = 1, .positional = true},
    {.name = "<", .fn = is_less, .params = {"other"}, .n_required = 1, .positional = true},
    {.name = "mapping", .fn = is_mapping},
    {.name = "ne",
     .fn = is_equal,
     .params = {"other"},
     .n_required = 1,
     .positional = true,
     .negate = true},
    {.name = "!=",
     .fn = is_equal,
     .params = {"other"},
     .n_required = 1,
     .positional = true,
     .negate = true},
    {.name = "none", .fn = is_none},
    {.name = "number", .fn = is_number},
    {.name = "odd", .fn = is_odd},
    {.name = "sameas", .fn = is_same, .params = {"other"}, .n_required = 1},
    {.name = "sequence", .fn = is_sequence},
    {.name = "string", .fn = is_string},
    {.name = "test", .fn = is_test},
    {.name = "true", .fn = is_true},
    {.name = "undefined", .fn = is_undefined},
    {.name = "upper", .fn = is_upper},
};

const qv_jcallable *qv_j_find_test(qv_jstr name)
{
    return qv_j_find_in(tests, sizeof tests / sizeof tests[0], name);
}
