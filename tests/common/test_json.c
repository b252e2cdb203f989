#include "common/json.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <float.h>
#include <string.h>

static json_t *parse(const char *text)
{
    json_t *value = NULL;
    cr_assert_eq(qv_json_load(text, strlen(text), "test.json", &value), QV_OK, "%s: %s", text,
                 qv_error());
    return value;
}

Test(json, reads_fields_of_the_right_type)
{
    json_t *obj = parse("{\"n\": 7, \"x\": 0.5, \"whole\": 3.0, \"yes\": true, \"s\": \"hi\"}");
    int64_t n;
    double x;
    bool yes;
    const char *s;
    cr_assert(qv_json_get_int(obj, "n", "t", &n) == QV_OK && n == 7);
    cr_assert(qv_json_get_int(obj, "whole", "t", &n) == QV_OK && n == 3);
    cr_assert(qv_json_get_double(obj, "x", "t", &x) == QV_OK && x == 0.5);
    cr_assert(qv_json_get_double(obj, "n", "t", &x) == QV_OK && x == 7);
    cr_assert(qv_json_get_bool(obj, "yes", "t", &yes) == QV_OK && yes);
    cr_assert_eq(qv_json_get_str(obj, "s", "t", &s), QV_OK);
    cr_assert_str_eq(s, "hi");
    json_decref(obj);
}

Test(json, reads_a_bare_infinity_as_the_largest_number_and_leaves_strings_alone)
{
    json_t *obj =
        parse("{\"limit\": [0.0, Infinity, -Infinity], \"s\": \"to Infinity \\\" Infinity\"}");
    const json_t *limit = json_object_get(obj, "limit");
    const char *s;
    cr_expect_eq(json_real_value(json_array_get(limit, 1)), DBL_MAX);
    cr_expect_eq(json_real_value(json_array_get(limit, 2)), -DBL_MAX);
    cr_assert_eq(qv_json_get_str(obj, "s", "t", &s), QV_OK);
    cr_expect_str_eq(s, "to Infinity \" Infinity");
    json_decref(obj);

    json_t *none = NULL;
    const char *wrong = "{\"a\": Infinit, \"b\": Infinity}";
    cr_expect_eq(qv_json_load(wrong, strlen(wrong), "t", &none), QV_ERR_FORMAT);
}

Test(json, says_which_field_of_which_file_is_wrong)
{
    json_t *obj = parse("{\"n\": \"7\", \"x\": [], \"b\": 1, \"s\": {}, \"z\": null, \"f\": 1.5, "
                        "\"big\": 1e19}");
    int64_t n;
    double x;
    bool b;
    const char *s;
    cr_assert_eq(qv_json_get_int(obj, "n", "config.json", &n), QV_ERR_FORMAT);
    cr_assert_str_eq(qv_error(), "config.json: \"n\" is a string, expected an integer");
    cr_assert_eq(qv_json_get_int(obj, "f", "config.json", &n), QV_ERR_FORMAT);
    cr_assert_str_eq(qv_error(), "config.json: \"f\" is 1.5, expected an integer");
    cr_assert_eq(qv_json_get_int(obj, "big", "config.json", &n), QV_ERR_FORMAT);
    cr_assert_eq(qv_json_get_double(obj, "x", "config.json", &x), QV_ERR_FORMAT);
    cr_assert_str_eq(qv_error(), "config.json: \"x\" is an array, expected a number");
    cr_assert_eq(qv_json_get_bool(obj, "b", "config.json", &b), QV_ERR_FORMAT);
    cr_assert_str_eq(qv_error(), "config.json: \"b\" is an integer, expected true or false");
    cr_assert_eq(qv_json_get_str(obj, "s", "config.json", &s), QV_ERR_FORMAT);
    cr_assert_str_eq(qv_error(), "config.json: \"s\" is an object, expected a string");
    cr_assert_eq(qv_json_get_str(obj, "z", "config.json", &s), QV_ERR_FORMAT);
    cr_assert_str_eq(qv_error(), "config.json: \"z\" is missing");
    cr_assert_eq(qv_json_get_str(obj, "absent", "config.json", &s), QV_ERR_FORMAT);
    cr_assert_eq(qv_json_get_str(json_object_get(obj, "x"), "a", "config.json", &s), QV_ERR_FORMAT);
    cr_assert_eq(qv_json_get_str(NULL, "a", "config.json", &s), QV_ERR_FORMAT);
    json_decref(obj);
}

Test(json, optional_fields_keep_their_default_when_absent_or_null)
{
    json_t *obj = parse("{\"null\": null, \"wrong\": []}");
    static const char *const keys[] = {"null", "absent"};
    for (int i = 0; i < 2; i++) {
        int64_t n = 5;
        double x = 0.25;
        bool b = true;
        const char *s = "default";
        cr_assert(qv_json_opt_int(obj, keys[i], "t", &n) == QV_OK && n == 5);
        cr_assert(qv_json_opt_double(obj, keys[i], "t", &x) == QV_OK && x == 0.25);
        cr_assert(qv_json_opt_bool(obj, keys[i], "t", &b) == QV_OK && b);
        cr_assert_eq(qv_json_opt_str(obj, keys[i], "t", &s), QV_OK);
        cr_assert_str_eq(s, "default");
    }
    int64_t n = 5;
    cr_assert_eq(qv_json_opt_int(obj, "wrong", "t", &n), QV_ERR_FORMAT);
    json_decref(obj);
}

Test(json, refuses_what_is_not_one_value)
{
    static const char *const texts[] = {
        "",           "{",   "{\"a\": 1,}", "{\"a\": 1} {}", "[1 2]",
        "{'a': 1}",   "nul", "\"\xff\"",    "\"\\ud800\"",   "{\"a\": 1, \"a\": 2}",
        "[1e999]",    "01",  "+1",          "\"tab\t\"",     "{\"a\\u0000\": 1}",
        "[1, // c\n", "NaN", "[Infinite]",  "\"\\u0000\"",   "{\"a\": 1, \"\\u0061\": 2}",
    };
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        json_t *value = NULL;
        cr_assert_eq(qv_json_load(texts[i], strlen(texts[i]), "bad.json", &value), QV_ERR_FORMAT,
                     "%s", texts[i]);
        cr_assert_eq(strncmp(qv_error(), "bad.json: line ", 15), 0, "%s", qv_error());
        cr_assert_null(value);
    }
}

Test(json, refuses_deep_nesting_without_running_out_of_stack)
{
    enum { DEPTH = 1000000 };
    static char text[DEPTH];
    json_t *value = NULL;
    memset(text, '[', sizeof text);
    cr_assert_eq(qv_json_load(text, sizeof text, "deep.json", &value), QV_ERR_FORMAT);
}

Test(json, reads_integers_beyond_64_bits_as_reals_and_the_others_exactly)
{
    json_t *obj = parse("{\"max\": 9223372036854775807, \"min\": -9223372036854775808,\n"
                        " \"limit\": 1000000000000000019884624838656, \"over\": "
                        "9223372036854775808, \"s\": \"99999999999999999999 \\\" "
                        "99999999999999999999\", \"f\": 0.10000000000000000000001}");
    int64_t n;
    double x;
    const char *s;
    cr_assert(qv_json_get_int(obj, "max", "t", &n) == QV_OK && n == INT64_MAX);
    cr_assert(qv_json_get_int(obj, "min", "t", &n) == QV_OK && n == INT64_MIN);
    cr_assert(qv_json_get_double(obj, "limit", "t", &x) == QV_OK && x == 1e30);
    cr_assert(qv_json_get_double(obj, "over", "t", &x) == QV_OK && x == 0x1p63);
    cr_assert_eq(qv_json_get_int(obj, "limit", "t", &n), QV_ERR_FORMAT);
    cr_assert(qv_json_get_double(obj, "f", "t", &x) == QV_OK && x == 0.1);
    cr_assert_eq(qv_json_get_str(obj, "s", "t", &s), QV_OK);
    cr_assert_str_eq(s, "99999999999999999999 \" 99999999999999999999");
    json_decref(obj);
}

Test(json, loads_files_up_to_a_limit)
{
    const char *dir = qv_temp_dir();
    const char *path = qv_path(dir, "a.json");
    json_t *value = NULL;
    cr_assert_eq(qv_json_load_file(path, 100, &value), QV_ERR_NOT_FOUND);
    cr_assert_not_null(strstr(qv_error(), "a.json"));
    cr_assert_eq(qv_json_load_file(dir, 100, &value), QV_ERR_IO); /* a folder */
    qv_write_text(path, "{\"a\": 1}");
    cr_assert_eq(qv_json_load_file(path, 8, &value), QV_OK);
    cr_assert_eq(json_object_size(value), 1);
    json_decref(value);
    cr_assert_eq(qv_json_load_file(path, 7, &value), QV_ERR_LIMIT);
    qv_write_text(path, "{\n\"a\": }");
    cr_assert_eq(qv_json_load_file(path, 100, &value), QV_ERR_FORMAT);
    cr_assert_not_null(strstr(qv_error(), "a.json: line 2, column"), "%s", qv_error());
    qv_write_text(path, "");
    cr_assert_eq(qv_json_load_file(path, 100, &value), QV_ERR_FORMAT);
}
