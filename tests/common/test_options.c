#include "common/options.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

enum { LEVEL_LOW, LEVEL_MIDDLE, LEVEL_HIGH };
static const char *const levels[] = {"low", "middle", "high", NULL};

typedef struct {
    int64_t max_running, cache_bytes, timeout_ms;
    double rate;
    const char *bind, *model, *password;
    bool json, prefix_cache;
    int level;
    qv_string_list adapters;
    int untouched;
} settings;

static const qv_option table[] = {
    QV_OPTION(settings, max_running, INT, "max-running", "N", "64",
              "Most requests that run at once. More wait.", .min = 1, .max = 4096,
              .short_name = 'n', .section = "Limits"),
    QV_OPTION(settings, cache_bytes, SIZE, "cache", "BYTES", "256M", "Memory of the cache.",
              .min = 4096, .max = 0x1p40, .section = "Limits"),
    QV_OPTION(settings, timeout_ms, DURATION, "timeout", "TIME", "30s", "Time of a request.",
              .max = 3600000, .section = "Limits"),
    QV_OPTION(settings, rate, DOUBLE, "rate", "X", "0.5", "Requests per second.", .max = 10),
    QV_OPTION(settings, bind, STRING, "bind", "ENDPOINT", "tcp://127.0.0.1:5555",
              "Where clients connect."),
    QV_OPTION(settings, model, STRING, "model", "DIR", NULL, "Folder of the model.",
              .short_name = 'm'),
    QV_OPTION(settings, password, STRING, "password", "TEXT", NULL, "Secret of Redis.",
              .secret = true),
    QV_OPTION(settings, json, FLAG, "log-json", NULL, NULL, "Log as JSON.", .short_name = 'j'),
    QV_OPTION(settings, prefix_cache, FLAG, "prefix-cache", NULL, "true", "Share prefixes."),
    QV_OPTION(settings, level, ENUM, "level", "LEVEL", "middle", "How much.", .choices = levels),
    QV_OPTION(settings, adapters, LIST, "adapter", "NAME=DIR", NULL, "An adapter to load.",
              .short_name = 'a', .max = 3),
};
#define N_OPTIONS (sizeof table / sizeof table[0])

static const qv_program program = {.name = "quiver-test",
                                   .summary = "A program for the tests of options.",
                                   .args = "[FILE...]",
                                   .max_args = 3};

#define MAX_ARGS 32

/* Parse the arguments in `line`, parted by single spaces. */
static qv_status parse(const char *line, settings *s, qv_options **options)
{
    static char copy[1024];
    char *argv[MAX_ARGS + 1] = {"quiver-test"}, *rest = copy;
    int argc = 1;
    snprintf(copy, sizeof copy, "%s", line);
    while (*line != '\0' && rest != NULL && argc < MAX_ARGS)
        argv[argc++] = strsep(&rest, " ");
    memset(s, 0xA5, sizeof *s);
    return qv_options_parse(table, N_OPTIONS, &program, argc, argv, s, options);
}

static qv_options *parse_ok(const char *line, settings *s)
{
    qv_options *options = NULL;
    cr_assert_eq(parse(line, s, &options), QV_OK, "%s: %s", line, qv_error());
    return options;
}

static void expect_error(const char *line, qv_status status, const char *sentence)
{
    settings s;
    qv_options *options = (qv_options *)&s;
    cr_assert_eq(parse(line, &s, &options), status, "%s: %s", line, qv_error());
    cr_assert_str_eq(qv_error(), sentence, "%s", line);
    cr_assert_null(options);
}

Test(options, come_from_the_table_when_nobody_sets_them)
{
    settings s;
    qv_options *options = parse_ok("", &s);
    cr_assert_eq(s.max_running, 64);
    cr_assert_eq(s.cache_bytes, 256 << 20);
    cr_assert_eq(s.timeout_ms, 30000);
    cr_assert_eq(s.rate, 0.5);
    cr_assert_str_eq(s.bind, "tcp://127.0.0.1:5555");
    cr_assert_null(s.model);
    cr_assert(!s.json && s.prefix_cache);
    cr_assert_eq(s.level, LEVEL_MIDDLE);
    cr_assert_eq(s.adapters.n, 0);
    cr_assert_eq(s.untouched, (int)0xA5A5A5A5);
    cr_assert(!qv_options_printed(options));
    cr_assert_eq(qv_options_source(options, "rate"), QV_OPTION_FROM_DEFAULT);
    qv_options_free(options);
    qv_options_free(NULL);
}

Test(options, accept_every_spelling_of_the_command_line)
{
    settings s;
    qv_options *options = parse_ok("--max-running 5 a --cache=64K -m/models -j --no-prefix-cache "
                                   "--level high --adapter x=1 -a y=2 --timeout=1.5m -- --b -c",
                                   &s);
    cr_assert_eq(s.max_running, 5);
    cr_assert_eq(s.cache_bytes, 65536);
    cr_assert_eq(s.timeout_ms, 90000);
    cr_assert_str_eq(s.model, "/models");
    cr_assert(s.json && !s.prefix_cache);
    cr_assert_eq(s.level, LEVEL_HIGH);
    cr_assert_eq(s.adapters.n, 2);
    cr_assert_str_eq(s.adapters.items[0], "x=1");
    cr_assert_str_eq(s.adapters.items[1], "y=2");
    const qv_string_list *args = qv_options_args(options);
    cr_assert_eq(args->n, 3);
    cr_assert_str_eq(args->items[0], "a");
    cr_assert_str_eq(args->items[1], "--b");
    cr_assert_str_eq(args->items[2], "-c");
    cr_assert_eq(qv_options_source(options, "level"), QV_OPTION_FROM_COMMAND_LINE);
    qv_options_free(options);

    options = parse_ok("-jn 7 --log-json=no --max-running 8 --model= --bind - -", &s);
    cr_assert(!s.json);
    cr_assert_eq(s.max_running, 8); /* the last one counts */
    cr_assert_str_eq(s.model, "");
    cr_assert_str_eq(s.bind, "-");
    cr_assert_str_eq(qv_options_args(options)->items[0], "-");
    qv_options_free(options);

    options = parse_ok("-jjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjjj", &s);
    cr_assert(s.json);
    qv_options_free(options);
}

Test(options, later_sources_win)
{
    settings s;
    const char *path = qv_path(qv_temp_dir(), "test.cfg");
    qv_write_text(path, "max-running = 1\ncache = 1M\nbind = \"a # b\" # note\nadapter = f=1\n"
                        "adapter = f=2\nlog\n    json = yes\nprefix\n    cache = off\n");
    setenv("QUIVER_CACHE", "2M", 1);
    setenv("QUIVER_TIMEOUT", "2s", 1);
    setenv("QUIVER_MODEL", "", 1); /* empty is not set */
    char line[300];
    snprintf(line, sizeof line, "--config %s --timeout 3s", path);
    qv_options *options = parse_ok(line, &s);
    cr_assert_eq(s.max_running, 1);
    cr_assert_eq(s.cache_bytes, 2 << 20);
    cr_assert_eq(s.timeout_ms, 3000);
    cr_assert_str_eq(s.bind, "a # b");
    cr_assert_null(s.model);
    cr_assert(s.json && !s.prefix_cache);
    cr_assert_eq(s.adapters.n, 2);
    cr_assert_str_eq(s.adapters.items[1], "f=2");
    cr_assert_eq(qv_options_source(options, "max-running"), QV_OPTION_FROM_FILE);
    cr_assert_eq(qv_options_source(options, "cache"), QV_OPTION_FROM_ENVIRONMENT);
    cr_assert_eq(qv_options_source(options, "timeout"), QV_OPTION_FROM_COMMAND_LINE);
    cr_assert_eq(qv_options_source(options, "rate"), QV_OPTION_FROM_DEFAULT);
    qv_options_free(options);

    setenv("QUIVER_CONFIG", path, 1);
    setenv("QUIVER_ADAPTER", "e=1,,e=2,e=3", 1);
    options = parse_ok("", &s); /* a list is replaced as a whole */
    cr_assert_eq(s.max_running, 1);
    cr_assert_eq(s.adapters.n, 3);
    cr_assert_str_eq(s.adapters.items[2], "e=3");
    qv_options_free(options);
    options = parse_ok("-a c=1", &s);
    cr_assert_eq(s.adapters.n, 1);
    qv_options_free(options);
}

Test(options, errors_name_the_option_the_value_and_the_remedy)
{
    static const struct {
        const char *line, *sentence;
    } rows[] = {
        {"--max-running x", "--max-running: \"x\" is not an integer"},
        {"--max-running 12x", "--max-running: \"12x\" is not an integer"},
        {"--max-running=", "--max-running: \"\" is not an integer"},
        {"--max-running 99999999999999999999",
         "--max-running: \"99999999999999999999\" does not fit in 64 bits"},
        {"--max-running 0", "--max-running: 0 is not between 1 and 4096"},
        {"-n 5000", "--max-running: 5000 is not between 1 and 4096"},
        {"--max-running", "--max-running needs a value (N)"},
        {"--max-running --log-json", "--max-running needs a value (N)"},
        {"-n", "-n needs a value (N)"},
        {"--cache 1X", "--cache: \"1X\" is not a size such as 4096, 64K, 2M or 1.5G"},
        {"--cache 1K", "--cache: 1K is not between 4K and 1T"},
        {"--cache -5", "--cache: \"-5\" is not a size such as 4096, 64K, 2M or 1.5G"},
        {"--timeout 5x", "--timeout: \"5x\" is not a duration such as 250ms, 30s, 5m or 2h"},
        {"--timeout 2h", "--timeout: 2h is not between 0 and 1h"},
        {"--rate nan", "--rate: \"nan\" is not a number"},
        {"--rate 11", "--rate: 11 is not between 0 and 10"},
        {"--level top", "--level: \"top\" is not one of low, middle or high"},
        {"--log-json=maybe", "--log-json: \"maybe\" is not true or false"},
        {"--max-runing 5", "no option --max-runing, did you mean --max-running?"},
        {"--timeuot=5", "no option --timeuot, did you mean --timeout?"},
        {"--max", "no option --max, did you mean --max-running?"},
        {"--hepl", "no option --hepl, did you mean --help?"},
        {"--zzzzzzzzz", "no option --zzzzzzzzz (see --help)"},
        {"--no-bind", "no option --no-bind (see --help)"},
        {"-q", "no option -q (see --help)"},
        {"--adapter 1 --adapter 2 --adapter 3 --adapter 4",
         "--adapter: given 4 times, not between 0 and 3"},
        {"a b c d", "unexpected argument \"d\""},
        {"--config", "--config needs a value (FILE)"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        expect_error(rows[i].line, QV_ERR_ARG, rows[i].sentence);
    setenv("QUIVER_MAX_RUNNING", "many", 1);
    expect_error("", QV_ERR_ARG, "QUIVER_MAX_RUNNING: \"many\" is not an integer");
}

Test(options, secrets_do_not_show_in_errors)
{
    static const char *const choices[] = {"none", NULL};
    typedef struct {
        int key;
    } secret_settings;
    static const qv_option secret[] = {QV_OPTION(secret_settings, key, ENUM, "key", "KEY", NULL,
                                                 "A key.", .choices = choices, .secret = true)};
    secret_settings s;
    qv_options *options;
    char *argv[] = {"x", "--key", "hunter2"};
    cr_assert_eq(qv_options_parse(secret, 1, &program, 3, argv, &s, &options), QV_ERR_ARG);
    cr_assert_str_eq(qv_error(), "--key: the value is not accepted");
}

Test(options, may_have_only_a_lower_bound)
{
    typedef struct {
        int64_t n;
    } open_settings;
    static const qv_option open_table[] = {
        QV_OPTION(open_settings, n, SIZE, "n", "BYTES", "1G", "Bytes.", .min = 2048)};
    open_settings s;
    qv_options *options;
    char *argv[] = {"x", "--n", "1K"};
    cr_assert_eq(qv_options_parse(open_table, 1, &program, 3, argv, &s, &options), QV_ERR_ARG);
    cr_assert_str_eq(qv_error(), "--n: 1K is not at least 2K");
    argv[2] = "8000000T";
    cr_assert_eq(qv_options_parse(open_table, 1, &program, 3, argv, &s, &options), QV_OK);
    qv_options_free(options);
}

Test(options, required_ones_are_missed)
{
    typedef struct {
        const char *model;
    } required_settings;
    static const qv_option required[] = {QV_OPTION(required_settings, model, STRING, "model", "DIR",
                                                   NULL, "Folder.", .required = true)};
    required_settings s;
    qv_options *options;
    char *argv[] = {"x", "--model=m", NULL};
    cr_assert_eq(qv_options_parse(required, 1, &program, 1, argv, &s, &options), QV_ERR_ARG);
    cr_assert_str_eq(qv_error(), "--model is required (or QUIVER_MODEL in the environment)");
    cr_assert_eq(qv_options_parse(required, 1, &program, 2, argv, &s, &options), QV_OK);
    qv_options_free(options);
}

Test(options, files_with_mistakes_are_refused_and_named)
{
    const char *path = qv_path(qv_temp_dir(), "bad.cfg");
    char line[300], want[400], long_line[1200] = "bind = ";
    snprintf(line, sizeof line, "--config=%s", path);
    snprintf(want, sizeof want, "%s: No such file or directory", path);
    expect_error(line, QV_ERR_NOT_FOUND, want);
    memset(long_line + 7, 'x', sizeof long_line - 8);
    static const struct {
        const char *text;
        qv_status status;
        const char *sentence;
    } rows[] = {
        {"max-runing = 5\n", QV_ERR_ARG, "no option \"max-runing\", did you mean \"max-running\"?"},
        {"log\n    level = 5\n", QV_ERR_ARG, "no option \"log-level\""},
        {"max-running = lots\n", QV_ERR_ARG, "max-running: \"lots\" is not an integer"},
        {"level = low\nlevel = high\n", QV_ERR_ARG, "\"level\" is set twice"},
        {"config = other\n", QV_ERR_ARG, "no option \"config\""},
        {"rate = 1\n  indent = 2\n", QV_ERR_FORMAT, "not a valid ZPL file"},
        {"bind = \"open\n", QV_ERR_FORMAT, "not a valid ZPL file"},
        {"max-running =\n", QV_ERR_ARG, "max-running: \"\" is not an integer"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        qv_write_text(path, rows[i].text);
        snprintf(want, sizeof want, "%s: %s", path, rows[i].sentence);
        expect_error(line, rows[i].status, want);
    }
    qv_write_text(path, long_line);
    snprintf(want, sizeof want, "%s: line 1 is longer than 1000 bytes", path);
    expect_error(line, QV_ERR_LIMIT, want);
    qv_write_file(path, "rate = 1\0\n", 10);
    snprintf(want, sizeof want, "%s: holds a zero byte, this is not a text file", path);
    expect_error(line, QV_ERR_FORMAT, want);
}

Test(options, help_lists_every_option_in_its_section)
{
    char *text = NULL;
    size_t size;
    qv_program to_memory = program;
    to_memory.out = open_memstream(&text, &size);
    settings s;
    qv_options *options = NULL;
    char *argv[] = {"x", "-j", "--help", "--nonsense"};
    cr_assert_eq(qv_options_parse(table, N_OPTIONS, &to_memory, 4, argv, &s, &options), QV_OK);
    cr_assert(qv_options_printed(options));
    cr_assert(!s.json);
    qv_options_free(options);
    fclose(to_memory.out);
    static const char *const parts[] = {
        /* in this order */
        "Usage: quiver-test [OPTION...] [FILE...]\n\nA program for the tests of options.\n",
        "\nLimits:\n  -n, --max-running N\n          Most requests that run at once. More wait.\n"
        "          [default: 64; between 1 and 4096; QUIVER_MAX_RUNNING]\n",
        "[default: 256M; between 4K and 1T; QUIVER_CACHE]",
        "[default: 30s; between 0 and 1h; QUIVER_TIMEOUT]",
        "\nOptions:\n      --rate X\n",
        "      --password TEXT\n          Secret of Redis.\n          [QUIVER_PASSWORD]\n",
        "      --[no-]prefix-cache\n          Share prefixes.\n          [default: true; QUIVER_",
        "[default: middle; low, middle or high; QUIVER_LEVEL]",
        "  -a, --adapter NAME=DIR\n          An adapter to load.\n          [between 0 and 3 "
        "times; ",
        "\nGeneral:\n      --config FILE\n",
        "  -h, --help\n",
        "      --version\n",
    };
    const char *at = text;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        const char *found = strstr(at, parts[i]);
        cr_assert_not_null(found, "missing behind the parts before it: %s\nin\n%s", parts[i], text);
        at = found;
    }
    for (const char *row = text; *row != '\0'; row += strcspn(row, "\n") + 1)
        cr_assert_leq(strcspn(row, "\n"), 96, "%s", row);
    free(text);
}

Test(options, version_is_one_line)
{
    char *text = NULL;
    size_t size;
    qv_program to_memory = program;
    to_memory.out = open_memstream(&text, &size);
    settings s;
    qv_options *options = NULL;
    char *argv[] = {"x", "--version"};
    cr_assert_eq(qv_options_parse(table, N_OPTIONS, &to_memory, 2, argv, &s, &options), QV_OK);
    cr_assert(qv_options_printed(options));
    qv_options_free(options);
    fclose(to_memory.out);
    cr_assert_str_eq(text, "quiver-test " QV_VERSION "\n");
    free(text);
}

Test(options, values_parse_exactly)
{
    static const struct {
        const char *text;
        int64_t want; /* -1: refused */
    } sizes[] = {{"0", 0},
                 {"4096", 4096},
                 {"64k", 65536},
                 {"64KB", 65536},
                 {"64 KiB", 65536},
                 {"1.5G", INT64_C(1610612736)},
                 {".5M", 524288},
                 {"0.1K", 102},
                 {"8388607T", INT64_C(8388607) << 40},
                 {"8388608T", -1},
                 {"9223372036854775807", INT64_MAX},
                 {"9223372036854775808", -1},
                 {"1.5", -1},
                 {"", -1},
                 {".", -1},
                 {"K", -1},
                 {"1KK", -1},
                 {"0x10", -1},
                 {" 1", -1},
                 {"-1", -1},
                 {"1 K ", -1}},
      times[] = {{"250", 250},     {"250ms", 250}, {"1s", 1000},      {"0.001s", 1},
                 {"1.234s", 1234}, {"5m", 300000}, {"1.5h", 5400000}, {"1d", 86400000},
                 {"1w", -1},       {"1e3", -1},    {"inf", -1},       {"1.5ms", -1}};
    int64_t out;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        qv_status status = qv_parse_size(sizes[i].text, &out);
        cr_assert_eq(status, sizes[i].want < 0 ? QV_ERR_ARG : QV_OK, "\"%s\"", sizes[i].text);
        cr_assert(status != QV_OK || out == sizes[i].want, "\"%s\"", sizes[i].text);
    }
    for (size_t i = 0; i < sizeof times / sizeof times[0]; i++) {
        qv_status status = qv_parse_duration(times[i].text, &out);
        cr_assert_eq(status, times[i].want < 0 ? QV_ERR_ARG : QV_OK, "\"%s\"", times[i].text);
        cr_assert(status != QV_OK || out == times[i].want, "\"%s\"", times[i].text);
    }
    double x;
    cr_assert(qv_parse_double("-2.5e-1", &x) == QV_OK && x == -0.25);
    static const char *const bad[] = {"", "inf", "nan", "0x1p3", "1e999", "1,5", " 1", "1 "};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        cr_assert_eq(qv_parse_double(bad[i], &x), QV_ERR_ARG, "\"%s\"", bad[i]);
}
