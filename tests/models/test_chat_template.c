/* Chat templates: the released ones against what transformers renders (golden), the language
 * against what jinja2 makes of some hundred small templates (chat_template_facts.h), and what is
 * refused. */
#include "models/chat_template.h"

#include "common/json.h"
#include "tests/models/chat_template_facts.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static json_t *parse(const char *text)
{
    json_error_t error;
    json_t *json = json_loads(text, JSON_DECODE_ANY, &error);
    cr_assert(json, "%s: %s", text, error.text);
    return json;
}

static qv_chat_template *compile(const char *text)
{
    qv_chat_template *tmpl;
    cr_assert_eq(qv_chat_template_compile(text, strlen(text), "t", &tmpl), QV_OK, "%s: %s", text,
                 qv_error());
    return tmpl;
}

/* Compile and render with variables and no messages. On success the text, which the caller frees;
 * else NULL, and the status. */
static char *try_render(const char *source, const char *variables, const qv_chat_limits *limits,
                        qv_status *status)
{
    qv_chat_template *tmpl;
    char *text = NULL;
    size_t len;
    *status = qv_chat_template_compile(source, strlen(source), "t", &tmpl);
    if (*status != QV_OK)
        return NULL;
    json_t *messages = json_array(), *kwargs = parse(variables);
    *status = qv_chat_template_render(tmpl, messages, NULL, kwargs, false, limits, &text, &len);
    if (*status == QV_OK)
        cr_assert_eq(text[len], '\0');
    json_decref(messages);
    json_decref(kwargs);
    qv_chat_template_free(tmpl);
    return *status == QV_OK ? text : NULL;
}

static void expect_text(const char *source, const char *variables, const char *want)
{
    qv_status status;
    char *text = try_render(source, variables, NULL, &status);
    cr_expect_eq(status, QV_OK, "%s: %s", source, qv_error());
    if (text)
        cr_expect_str_eq(text, want, "%s gives '%s', not '%s'", source, text, want);
    free(text);
}

static void expect_failure(const char *source, const char *variables, qv_status want,
                           const char *words)
{
    qv_status status;
    char *text = try_render(source, variables, NULL, &status);
    cr_expect_null(text, "%s gives '%s'", source, text);
    cr_expect_eq(status, want, "%s: %s (%s)", source, qv_status_name(status), qv_error());
    cr_expect(strstr(qv_error(), words), "%s: '%s' lacks '%s'", source, qv_error(), words);
    free(text);
}

/* ---- Released templates ---------------------------------------------------------------------- */

static void check_golden_case(const qv_chat_template *tmpl, size_t i, const json_t *one)
{
    json_t *options = json_deep_copy(json_object_get(one, "options"));
    json_t *tools = json_incref(json_object_get(options, "tools"));
    bool prompt = json_is_true(json_object_get(options, "add_generation_prompt"));
    const json_t *want = json_object_get(one, "text"), *error = json_object_get(one, "error");
    char *text;
    size_t len;
    json_object_del(options, "tools");
    json_object_del(options, "add_generation_prompt");
    qv_status status = qv_chat_template_render(tmpl, json_object_get(one, "messages"), tools,
                                               options, prompt, NULL, &text, &len);
    if (error) {
        /* The words of raise_exception alone; jinja2's own with the line behind them. */
        const char *words = json_string_value(error), *rest = qv_error() + strlen(words);
        cr_expect_eq(status, QV_ERR_ARG, "case %zu: %s", i, qv_error());
        cr_expect_eq(strncmp(qv_error(), words, strlen(words)), 0, "case %zu: '%s', not '%s'", i,
                     qv_error(), words);
        cr_expect(*rest == '\0' || strncmp(rest, " (", 2) == 0, "case %zu: '%s'", i, qv_error());
    } else {
        cr_assert_eq(status, QV_OK, "case %zu: %s", i, qv_error());
        cr_expect_eq(len, json_string_length(want), "case %zu", i);
        cr_expect_str_eq(text, json_string_value(want), "case %zu", i);
        free(text);
    }
    json_decref(tools);
    json_decref(options);
}

static void check_golden_family(const char *family)
{
    const char *template = qv_golden_path(qv_path("chat", "%s.jinja", family));
    const char *path = qv_golden_path(qv_path("chat", "%s.json", family));
    QV_SKIP_WITHOUT(template);
    QV_SKIP_WITHOUT(path);
    size_t size, i;
    char *source = qv_read_file(template, &size);
    json_t *cases, *one;
    qv_chat_template *tmpl;
    cr_assert_eq(qv_json_load_file(path, 64 << 20, &cases), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_chat_template_compile(source, size, family, &tmpl), QV_OK, "%s", qv_error());
    cr_assert_gt(json_array_size(cases), 0);
    json_array_foreach(cases, i, one) check_golden_case(tmpl, i, one);
    qv_chat_template_free(tmpl);
    json_decref(cases);
    free(source);
}

Test(chat_template, renders_every_case_of_qwen_like_transformers)
{
    check_golden_family("qwen3.5");
}

Test(chat_template, renders_every_case_of_nemotron_like_transformers)
{
    check_golden_family("nemotron3");
}

Test(chat_template, renders_the_bundled_model)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    qv_chat_template *tmpl;
    cr_assert_eq(qv_chat_template_open(dir, &tmpl), QV_OK, "%s", qv_error());
    json_t *messages = parse("[{\"role\": \"user\", \"content\": \"Hi \\ud83d\\ude00\"}]");
    char *text;
    size_t len;
    cr_assert_eq(qv_chat_template_render(tmpl, messages, NULL, NULL, true, NULL, &text, &len),
                 QV_OK, "%s", qv_error());
    cr_assert(strstr(text, "<|im_start|>user\nHi \U0001F600<|im_end|>\n<|im_start|>assistant\n"),
              "%s", text);
    free(text);
    json_decref(messages);
    qv_chat_template_free(tmpl);
}

/* ---- The language ---------------------------------------------------------------------------- */

Test(chat_template, evaluates_expressions_like_jinja2)
{
    for (size_t i = 0; i < COUNT(expressions); i++) {
        char source[512];
        snprintf(source, sizeof source, "{{ %s }}", expressions[i].source);
        expect_text(source, fact_variables, expressions[i].want);
    }
}

Test(chat_template, runs_statements_like_jinja2)
{
    for (size_t i = 0; i < COUNT(templates); i++)
        expect_text(templates[i].source, fact_variables, templates[i].want);
}

Test(chat_template, fails_in_the_words_of_jinja2)
{
    for (size_t i = 0; i < COUNT(failures); i++)
        expect_failure(failures[i].source, fact_variables, QV_ERR_ARG, failures[i].want);
}

Test(chat_template, passes_on_the_words_of_raise_exception_alone)
{
    qv_status status;
    cr_assert_null(try_render("{{ raise_exception('No \"x\"; é') }}", "{}", NULL, &status));
    cr_assert_eq(status, QV_ERR_ARG);
    cr_assert_str_eq(qv_error(), "No \"x\"; é");
    /* Longer than an error can be: cut between characters. */
    cr_assert_null(try_render("{{ raise_exception('é' * 5000) }}", "{}", NULL, &status));
    cr_assert_eq(status, QV_ERR_ARG);
    cr_assert_eq(strlen(qv_error()) % 2, 0);
}

Test(chat_template, names_the_line_where_it_fails)
{
    expect_failure("a\nb\n{{ x.y.z }}", "{\"x\": {}}", QV_ERR_ARG,
                   "'dict object' has no attribute 'y' (t, line 3)");
    expect_failure("{% macro m(a) %}\n\n{{ a.b }}{% endmacro %}\n\n{{ m() }}", "{}", QV_ERR_ARG,
                   "parameter 'a' was not provided (t, line 3)");
}

Test(chat_template, tells_the_time_it_is_given)
{
    qv_status status;
    setenv("TZ", "UTC", 1);
    qv_chat_limits limits = {.now_s = 1700000000};
    char *text = try_render("{{ strftime_now('%d %b %Y %H:%M') }}", "{}", &limits, &status);
    cr_assert_eq(status, QV_OK, "%s", qv_error());
    cr_assert_str_eq(text, "14 Nov 2023 22:13");
    free(text);
    expect_failure("{{ strftime_now('%300000000Y') }}", "{}", QV_ERR_ARG, "strftime_now");
}

Test(chat_template, keeps_data_apart_from_the_template)
{
    /* What comes in as text is never read as template, and functions cannot come in. */
    expect_text("{{ a }}", "{\"a\": \"{{ b }}{% if %}\"}", "{{ b }}{% if %}");
    expect_text("{{ range(2)|list }}", "{\"other\": 1}", "[0, 1]");
    expect_failure("{{ x.__class__.y }}", "{\"x\": 1}", QV_ERR_ARG, "is unsafe");
}

/* ---- What is refused ------------------------------------------------------------------------- */

static const struct {
    const char *source;
    qv_status status;
    const char *words;
} malformed[] = {
    {"{% if x %}", QV_ERR_FORMAT,
     "line 1: unexpected end of template, looking for 'elif', 'else' or 'endif'"},
    {"a\n{% if x %}\n{% for y in z %}\n", QV_ERR_FORMAT, "line 3: unexpected end of template"},
    {"\n\n{% endif %}", QV_ERR_FORMAT, "line 3: unknown tag 'endif'"},
    {"{% if x %}{% endfor %}", QV_ERR_FORMAT, "unknown tag 'endfor', looking for"},
    {"{% foo %}", QV_ERR_FORMAT, "unknown tag 'foo'"},
    {"{% %}", QV_ERR_FORMAT, "tag name expected"},
    {"{{ }}", QV_ERR_FORMAT, "expected an expression"},
    {"{{ x", QV_ERR_FORMAT, "expected 'end of print statement', got 'end of template'"},
    {"{{ x\n | }}", QV_ERR_FORMAT, "line 2: expected 'name'"},
    {"{{ 'abc }}", QV_ERR_FORMAT, "string without end"},
    {"{{ 1 + }}", QV_ERR_FORMAT, "unexpected 'end of print statement'"},
    {"{{ (1 }}", QV_ERR_FORMAT, "unexpected '}', expected ')'"},
    {"{{ 1) }}", QV_ERR_FORMAT, "unexpected ')'"},
    {"{{ @ }}", QV_ERR_FORMAT, "unexpected character '@'"},
    {"{# abc", QV_ERR_FORMAT, "comment without end"},
    {"\n{% raw %}abc", QV_ERR_FORMAT, "line 2: raw block without end"},
    {"{% set 1 = 2 %}", QV_ERR_FORMAT, "expected 'name', got 'integer'"},
    {"{% set true = 1 %}", QV_ERR_FORMAT, "can't assign to 'true'"},
    {"{% set x.y.z = 1 %}", QV_ERR_FORMAT, "got '.'"},
    {"{% macro m(a=1, b) %}{% endmacro %}", QV_ERR_FORMAT, "non-default argument"},
    {"{% break %}", QV_ERR_FORMAT, "'break' outside of a loop"},
    {"{% for x in y %}{% macro m() %}{% continue %}{% endmacro %}{% endfor %}", QV_ERR_FORMAT,
     "'continue' outside of a loop"},
    {"{{ f(a=1, 2) }}", QV_ERR_FORMAT, "invalid syntax"},
    {"{{ dict(a=1, a=2) }}", QV_ERR_FORMAT, "'a' is given twice"},
    {"{{ '\\u12' }}", QV_ERR_FORMAT, "malformed escape"},
    {"{{ '\\ud800' }}", QV_ERR_FORMAT, "malformed escape"},
    {"{{ 99999999999999999999 }}", QV_ERR_LIMIT, "beyond 64 bits"},
    {"{{ x is a is b }}", QV_ERR_UNSUPPORTED, "test 'a'"},
    {"{% call x %}{% endcall %}", QV_ERR_FORMAT, "expected a call"},
    {"\xFF", QV_ERR_FORMAT, "not valid UTF-8 at byte 0"},
    {"{{ x\n|nofilter }}", QV_ERR_UNSUPPORTED, "line 2: filter 'nofilter' is not supported"},
    {"{{ x|batch(2) }}", QV_ERR_UNSUPPORTED, "filter 'batch'"},
    {"{{ x is\nnotest }}", QV_ERR_UNSUPPORTED, "test 'notest' is not supported"},
    {"{{ nofunc(1) }}", QV_ERR_UNSUPPORTED, "function 'nofunc' is not supported"},
    {"{% if false %}{{ nofunc(1) }}{% endif %}", QV_ERR_UNSUPPORTED, "function 'nofunc'"},
    {"{{ s.nomethod() }}", QV_ERR_UNSUPPORTED, "method 'nomethod' is not supported"},
    {"{{ '{}'.format(1) }}", QV_ERR_UNSUPPORTED, "method 'format'"},
    {"{{ x|trim(1, 2, 3) }}", QV_ERR_UNSUPPORTED, "filter 'trim' takes at most 1"},
    {"{{ x|trim(foo=1) }}", QV_ERR_UNSUPPORTED, "filter 'trim' takes no argument 'foo'"},
    {"{{ x|replace('a') }}", QV_ERR_UNSUPPORTED, "lacks argument 'new'"},
    {"{{ 5 is divisibleby }}", QV_ERR_UNSUPPORTED, "lacks argument 'num'"},
    {"{{ m(*l) }}", QV_ERR_UNSUPPORTED, "argument lists"},
    {"{% for i in l recursive %}{% endfor %}", QV_ERR_UNSUPPORTED, "recursive loops"},
    {"{% for i in l %}{{ loop(i) }}{% endfor %}", QV_ERR_UNSUPPORTED, "recursive loops"},
    {"{% include 'a' %}", QV_ERR_UNSUPPORTED, "tag 'include'"},
    {"{% block a %}{% endblock %}", QV_ERR_UNSUPPORTED, "tag 'block'"},
    {"{% do x %}", QV_ERR_UNSUPPORTED, "tag 'do'"},
};

Test(chat_template, refuses_malformed_templates_with_the_line)
{
    for (size_t i = 0; i < COUNT(malformed); i++)
        expect_failure(malformed[i].source, "{}", malformed[i].status, malformed[i].words);
}

/* A string of n units. */
static char *repeated(const char *unit, size_t n)
{
    size_t len = strlen(unit);
    char *text = malloc(n * len + 1);
    for (size_t i = 0; i < n; i++)
        memcpy(text + i * len, unit, len);
    text[n * len] = '\0';
    return text;
}

Test(chat_template, refuses_templates_that_nest_too_deep_or_are_too_long)
{
    static const char *const units[] = {"(",
                                        "[",
                                        "{1:",
                                        "-",
                                        "not ",
                                        "x[",
                                        "a+",
                                        "a if ",
                                        "a|d(",
                                        "{% if x %}",
                                        "{% for i in l %}",
                                        "x.y.",
                                        "a or ",
                                        "{{ {% "};
    for (size_t i = 0; i < COUNT(units); i++) {
        char *deep = repeated(units[i], 20000);
        bool tag = strstr(units[i], "{%") != NULL;
        char *source;
        cr_assert_gt(asprintf(&source, tag ? "%s" : "{{ %s", deep), 0);
        qv_chat_template *tmpl;
        qv_status status = qv_chat_template_compile(source, strlen(source), "t", &tmpl);
        cr_expect(status == QV_ERR_LIMIT || status == QV_ERR_FORMAT, "%s: %s", units[i],
                  qv_error());
        if (status == QV_OK)
            qv_chat_template_free(tmpl);
        free(source);
        free(deep);
    }
    char *longest = repeated("x", QV_CHAT_TEMPLATE_MAX + 1);
    qv_chat_template *tmpl;
    cr_assert_eq(qv_chat_template_compile(longest, QV_CHAT_TEMPLATE_MAX + 1, "t", &tmpl),
                 QV_ERR_LIMIT);
    cr_assert_eq(qv_chat_template_compile(longest, QV_CHAT_TEMPLATE_MAX, "t", &tmpl), QV_OK);
    qv_chat_template_free(tmpl);
    free(longest);
}

static const struct {
    const char *source, *words;
} endless[] = {
    {"{% for i in 'x' * 9999 %}{% for j in 'x' * 9999 %}{% endfor %}{% endfor %}", "memory"},
    {"{% set l = range(9999) %}{% for i in l %}{% for j in l %}{% endfor %}{% endfor %}", "steps"},
    {"{% set l = range(9999) %}{% for i in l if l|sort|length < 0 %}{% endfor %}", "steps"},
    {"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nests deeper"},
    {"{% macro m(x) %}{{ m([x]) }}{% endmacro %}{{ m(1) }}", "nests deeper"},
    {"{% set ns = namespace(a=[]) %}{% for i in range(5000) %}{% set ns.a = [ns.a] %}{% endfor %}"
     "{{ ns.a }}",
     "nests deeper"},
    {"{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ ns }}", "nests deeper"},
    {"{% set ns = namespace(a=[]) %}{% for i in range(5000) %}{% set ns.a = [ns.a] %}{% endfor %}"
     "{{ ns.a|tojson }}",
     "nests deeper"},
    {"{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor "
     "%}",
     "memory"},
    {"{{ 'x' * 99999999999 }}", "memory"},
    {"{{ [1] * 99999999999 }}", "memory"},
    {"{{ 'x'.ljust(9999999999) }}", "longer"},
    {"{% set ns = namespace(a='xxxxxxxx') %}{% for i in range(20) %}{% set ns.a = ns.a + ns.a %}"
     "{% endfor %}{% for i in range(9) %}{{ ns.a }}{% endfor %}",
     "prints more"},
    {"{{ range(100001) }}", "100000"},
    {"{{ 9 ** 99 }}", "64 bits"},
    {"{{ 1e20|int }}", "64 bits"},
    {"{{ '99999999999999999999'|int }}", "64 bits"},
    {"{{ 9223372036854775807 + 1 }}", "64 bits"},
    {"{{ -9223372036854775807 - 2 }}", "64 bits"},
    {"{{ 4611686018427387904 * 2 }}", "64 bits"},
};

Test(chat_template, ends_what_would_not_end)
{
    for (size_t i = 0; i < COUNT(endless); i++)
        expect_failure(endless[i].source, "{}", QV_ERR_LIMIT, endless[i].words);
}

Test(chat_template, keeps_to_the_limits_of_the_caller)
{
    static const struct {
        qv_chat_limits limits;
        const char *words;
    } rows[] = {
        {{.max_steps = 10}, "10 steps"},
        {{.max_depth = 3}, "deeper than 3"},
        {{.max_output_bytes = 5}, "more than 5 bytes"},
        {{.max_memory_bytes = 100}, "100 bytes of memory"},
    };
    qv_status status;
    const char *source = "{% for i in [1, 2, 3] %}{{ (i * (2 + i)) ~ 'abc' }}{% endfor %}";
    for (size_t i = 0; i < COUNT(rows); i++) {
        cr_expect_null(try_render(source, "{}", &rows[i].limits, &status));
        cr_expect_eq(status, QV_ERR_LIMIT, "%s", qv_error());
        cr_expect(strstr(qv_error(), rows[i].words), "%s", qv_error());
    }
    qv_chat_limits exact = {.max_output_bytes = 14};
    char *text = try_render(source, "{}", &exact, &status);
    cr_assert_eq(status, QV_OK, "%s", qv_error());
    cr_assert_str_eq(text, "3abc8abc15abc");
    free(text);
}

Test(chat_template, takes_only_deep_messages_that_it_can_walk)
{
    qv_chat_template *tmpl = compile("{{ messages|tojson }}");
    static const struct {
        size_t depth;
        qv_status status;
    } rows[] = {{100, QV_OK}, {400, QV_OK}, {1000, QV_ERR_LIMIT}, {2000, QV_ERR_LIMIT}};
    for (size_t i = 0; i < COUNT(rows); i++) {
        json_t *value = json_integer(1), *messages = json_array();
        for (size_t d = 0; d < rows[i].depth; d++)
            value = json_pack("[o]", value);
        json_array_append_new(messages, json_pack("{s:o}", "content", value));
        char *text;
        size_t len;
        cr_expect_eq(qv_chat_template_render(tmpl, messages, NULL, NULL, false, NULL, &text, &len),
                     rows[i].status, "depth %zu: %s", rows[i].depth, qv_error());
        if (rows[i].status == QV_OK)
            free(text);
        json_decref(messages);
    }
    qv_chat_template_free(tmpl);
}

static const struct {
    const char *messages, *tools, *kwargs, *words;
} arguments[] = {
    {"{}", NULL, NULL, "messages is not an array"},
    {"[1]", NULL, NULL, "messages[0] is not an object"},
    {"[]", "{}", NULL, "tools is not an array"},
    {"[]", NULL, "[]", "chat_template_kwargs is not an object"},
    {"[]", NULL, "{\"messages\": []}", "'messages'"},
    {"[]", NULL, "{\"tools\": []}", "'tools'"},
    {"[]", NULL, "{\"add_generation_prompt\": true}", "'add_generation_prompt'"},
};

Test(chat_template, refuses_arguments_of_the_wrong_type)
{
    qv_chat_template *tmpl = compile("x");
    for (size_t i = 0; i < COUNT(arguments); i++) {
        json_t *messages = parse(arguments[i].messages);
        json_t *tools = arguments[i].tools ? parse(arguments[i].tools) : NULL;
        json_t *kwargs = arguments[i].kwargs ? parse(arguments[i].kwargs) : NULL;
        char *text;
        size_t len;
        cr_expect_eq(
            qv_chat_template_render(tmpl, messages, tools, kwargs, false, NULL, &text, &len),
            QV_ERR_ARG);
        cr_expect(strstr(qv_error(), arguments[i].words), "%s", qv_error());
        json_decref(messages);
        json_decref(tools);
        json_decref(kwargs);
    }
    qv_chat_template_free(tmpl);
}

/* ---- Model directories ----------------------------------------------------------------------- */

/* Open the directory's template and render one user message, with or without tools. */
static char *render_dir(const char *dir, bool with_tools)
{
    qv_chat_template *tmpl;
    cr_assert_eq(qv_chat_template_open(dir, &tmpl), QV_OK, "%s", qv_error());
    json_t *messages = parse("[{\"role\": \"user\", \"content\": \"Hi\"}]");
    json_t *tools = with_tools ? parse("[{\"name\": \"f\"}]") : NULL;
    char *text;
    size_t len;
    cr_assert_eq(qv_chat_template_render(tmpl, messages, tools, NULL, true, NULL, &text, &len),
                 QV_OK, "%s", qv_error());
    json_decref(messages);
    json_decref(tools);
    qv_chat_template_free(tmpl);
    return text;
}

static void expect_dir(const char *dir, bool with_tools, const char *want)
{
    char *text = render_dir(dir, with_tools);
    cr_expect_str_eq(text, want);
    free(text);
}

Test(chat_template, is_found_where_models_keep_it)
{
    qv_chat_template *tmpl;
    const char *dir = qv_temp_dir(), *config = qv_path(dir, "tokenizer_config.json");
    cr_assert_eq(qv_chat_template_open(dir, &tmpl), QV_ERR_NOT_FOUND);

    qv_write_text(config, "{\"eos_token\": {\"content\": \"</s>\"}}");
    cr_assert_eq(qv_chat_template_open(dir, &tmpl), QV_ERR_NOT_FOUND);
    cr_assert(strstr(qv_error(), "no chat_template"), "%s", qv_error());

    qv_write_text(config, "{\"bos_token\": \"<s>\", \"eos_token\": {\"content\": \"</s>\"}, "
                          "\"chat_template\": \"{{ bos_token }}{{ messages[0].content }}"
                          "{{ eos_token }}{{ pad_token is defined }}{{ tools is none }}\"}");
    expect_dir(dir, false, "<s>Hi</s>FalseTrue");

    qv_write_text(config, "{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"T\"}, "
                          "{\"name\": \"default\", \"template\": \"D{{ tools }}\"}]}");
    expect_dir(dir, false, "DNone");
    expect_dir(dir, true, "T");

    qv_write_text(config, "{\"chat_template\": [{\"name\": \"rag\", \"template\": \"R\"}]}");
    cr_assert_eq(qv_chat_template_open(dir, &tmpl), QV_ERR_FORMAT);
    qv_write_text(config, "{\"chat_template\": 7}");
    cr_assert_eq(qv_chat_template_open(dir, &tmpl), QV_ERR_FORMAT);
    qv_write_text(config, "{\"chat_template\": \"{{\"}");
    cr_assert_eq(qv_chat_template_open(dir, &tmpl), QV_ERR_FORMAT);
    cr_assert(strstr(qv_error(), "tokenizer_config.json, line 1"), "%s", qv_error());

    /* The file of its own comes first; special tokens still come from the other. */
    qv_write_text(config, "{\"bos_token\": \"<s>\", \"chat_template\": \"old\"}");
    qv_write_text(qv_path(dir, "chat_template.jinja"), "{{ bos_token }}new\n");
    expect_dir(dir, false, "<s>new");
}

/* ---- Threads --------------------------------------------------------------------------------- */

static void *render_often(void *user)
{
    json_t *messages = parse("[{\"role\": \"user\", \"content\": \"Hi\"}]");
    size_t different = 0;
    for (int i = 0; i < 300; i++) {
        char *text;
        size_t len;
        if (qv_chat_template_render(user, messages, NULL, NULL, true, NULL, &text, &len) != QV_OK) {
            different++;
            continue;
        }
        different += strcmp(text, "[user:Hi!]2") != 0;
        free(text);
    }
    json_decref(messages);
    return (void *)different;
}

Test(chat_template, serves_threads_at_once)
{
    qv_chat_template *tmpl = compile(
        "{% macro m(x) %}{{ x.role ~ ':' ~ x.content }}!{% endmacro %}"
        "{% set ns = namespace(n=1) %}"
        "{% for x in messages %}[{{ m(x) }}]{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}");
    pthread_t threads[4];
    for (size_t i = 0; i < COUNT(threads); i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, render_often, tmpl), 0);
    for (size_t i = 0; i < COUNT(threads); i++) {
        void *different;
        pthread_join(threads[i], &different);
        cr_assert_null(different);
    }
    qv_chat_template_free(tmpl);
}
