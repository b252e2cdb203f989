#include "common/log.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Lines go to a temporary file; read_lines gives all that were written so far. */
static FILE *log_file;

static void start(qv_log_level level, bool json)
{
    log_file = tmpfile();
    qv_log_init(
        &(qv_log_options){.level = level, .program = "test", .json = json, .fd = fileno(log_file)});
}

static const char *read_lines(void)
{
    static char text[1 << 20];
    ssize_t n = pread(fileno(log_file), text, sizeof text - 1, 0);
    cr_assert_geq(n, 0);
    text[n] = '\0';
    return text;
}

/* The line without its time: "2025-03-01T12:00:00.123Z ". */
static const char *read_after_time(void)
{
    const char *line = read_lines();
    int y, mo, d, h, mi, s, ms, used = 0;
    cr_assert_eq(
        sscanf(line, "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ %n", &y, &mo, &d, &h, &mi, &s, &ms, &used), 7,
        "%s", line);
    cr_assert(used == 25 && y >= 2024 && mo <= 12 && d <= 31 && h < 24 && mi < 60 && s <= 60);
    return line + used;
}

Test(log, writes_time_level_program_request_and_message)
{
    start(QV_LOG_DEBUG, false);
    qv_warn_req("req-1", "adapter %s has rank %d", "json", 16);
    cr_assert_str_eq(read_after_time(), "WARN  test req=req-1 adapter json has rank 16\n");
}

Test(log, drops_what_is_below_its_level)
{
    start(QV_LOG_WARN, false);
    qv_debug("debug");
    qv_info("info");
    qv_warn("warn");
    qv_err("error");
    qv_log_set_level(QV_LOG_ERROR);
    qv_warn("warn again");
    const char *text = read_lines();
    cr_assert_null(strstr(text, "info"));
    cr_assert_null(strstr(text, "debug"));
    cr_assert_null(strstr(text, "again"));
    cr_assert_not_null(strstr(text, "WARN  test warn\n"));
    cr_assert_not_null(strstr(text, "ERROR test error\n"));
}

Test(log, prints_fields_by_type_and_quotes_when_needed)
{
    start(QV_LOG_INFO, false);
    const char *none = NULL;
    char name[] = "my adapter";
    bool yes = true;
    qv_log_event(QV_LOG_INFO, NULL, "loaded", QV_KV("adapter", name), QV_KV("path", "/a/b"),
                 QV_KV("rank", -3), QV_KV("bytes", UINT64_MAX), QV_KV("scale", 0.5),
                 QV_KV("ok", yes), QV_KV("reason", none), QV_KV("empty", ""),
                 QV_KV("fake", "x y=1 \"z\" \\"));
    cr_assert_str_eq(read_after_time(),
                     "INFO  test loaded adapter=\"my adapter\" path=/a/b rank=-3 "
                     "bytes=18446744073709551615 scale=0.5 ok=true reason=null empty=\"\" "
                     "fake=\"x y=1 \\\"z\\\" \\\\\"\n");
}

Test(log, escapes_whatever_could_forge_a_line)
{
    start(QV_LOG_INFO, false);
    qv_info_req("a\nb", "x\r\n2025 ERROR\ttest \x1b[31m\x7f \xff\xc0\xaf \xe2\x82\xac \xc2\x9b "
                        "\xe2\x80\xae \xe2\x80\xa8 \\n end");
    cr_assert_str_eq(read_after_time(),
                     "INFO  test req=\"a\\nb\" x\\r\\n2025 ERROR\\ttest \\u001b[31m\\u007f "
                     "\\xff\\xc0\\xaf \xe2\x82\xac \\u009b \\u202e \\u2028 \\\\n end\n");
}

Test(log, json_lines_parse_and_hold_the_same_facts)
{
    start(QV_LOG_INFO, true);
    qv_log_event(QV_LOG_ERROR, "id\"\n", "a \"b\" \\ \x01\xff", QV_KV("s", "x\ny"), QV_KV("i", -1),
                 QV_KV("d", 1.0 / 0.0), QV_KV("n", (const char *)NULL));
    json_t *line = json_loads(read_lines(), JSON_REJECT_DUPLICATES, NULL);
    cr_assert_not_null(line, "%s", read_lines());
    cr_assert_str_eq(json_string_value(json_object_get(line, "level")), "error");
    cr_assert_str_eq(json_string_value(json_object_get(line, "program")), "test");
    cr_assert_str_eq(json_string_value(json_object_get(line, "req")), "id\"\n");
    cr_assert_str_eq(json_string_value(json_object_get(line, "message")),
                     "a \"b\" \\ \x01\xef\xbf\xbd");
    cr_assert_str_eq(json_string_value(json_object_get(line, "s")), "x\ny");
    cr_assert_eq(json_integer_value(json_object_get(line, "i")), -1);
    cr_assert_str_eq(json_string_value(json_object_get(line, "d")), "inf");
    cr_assert(json_is_null(json_object_get(line, "n")));
    cr_assert_eq(strlen(json_string_value(json_object_get(line, "time"))), 24);
    json_decref(line);
}

Test(log, cuts_long_lines_at_a_character_and_keeps_json_whole)
{
    static char text[3 * QV_LOG_LINE_MAX];
    for (int json = 0; json < 2; json++) {
        for (int offset = 0; offset < 12;
             offset++) { /* the cut moves through \u0001 and the euro */
            size_t at = (size_t)offset;
            memset(text, 'x', at);
            while (at + 5 < sizeof text) {
                memcpy(text + at, "\x01\xE2\x82\xAC", 5);
                at += 4;
            }
            start(QV_LOG_INFO, json);
            qv_log_event(QV_LOG_INFO, "r", "long", QV_KV("short", 1), QV_KV("text", text),
                         QV_KV("lost", 2));
            const char *line = read_lines();
            size_t size = strlen(line);
            cr_assert(size <= QV_LOG_LINE_MAX && size > QV_LOG_LINE_MAX - 24, "%zu", size);
            cr_assert_eq(strchr(line, '\n'), line + size - 1);
            cr_assert_str_eq(line + size - (json ? 6 : 5), json ? "...\"}\n" : "...\"\n");
            json_t *value = json ? json_loads(line, 0, NULL) : NULL;
            cr_assert(!json || value != NULL, "%s", line);
            json_decref(value);
            fclose(log_file);
        }
    }
    start(QV_LOG_INFO, true);
    qv_info("%s", text);
    json_t *value = json_loads(read_lines(), 0, NULL);
    cr_assert_not_null(value);
    json_decref(value);
}

Test(log, keeps_errno)
{
    start(QV_LOG_INFO, false);
    errno = ENOENT;
    qv_info("cannot open: %m");
    cr_assert_eq(errno, ENOENT);
    cr_assert_str_eq(read_after_time(), "INFO  test cannot open: No such file or directory\n");
    qv_log_init(&(qv_log_options){.level = QV_LOG_INFO, .fd = 9999}); /* nobody listens */
    qv_info("lost");
    cr_assert_eq(errno, ENOENT);
}

static void *write_many(void *user)
{
    for (int i = 0; i < 200; i++)
        qv_info("thread %d line %d ------------------------------", *(int *)user, i);
    return NULL;
}

Test(log, lines_of_threads_do_not_mix)
{
    start(QV_LOG_INFO, false);
    pthread_t threads[4];
    int ids[4] = {0, 1, 2, 3}, next[4] = {0}, n = 0;
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, write_many, &ids[i]);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (const char *line = read_lines(); *line != '\0'; line = strchr(line, '\n') + 1, n++) {
        int id, i;
        cr_assert_eq(sscanf(line, "%*s INFO test thread %d line %d ----", &id, &i), 2, "%s", line);
        cr_assert_eq(i, next[id]++);
    }
    cr_assert_eq(n, 800);
}

Test(log, limiter_passes_a_burst_then_one_per_interval_and_counts_the_rest)
{
    qv_log_limiter limiter = {0};
    uint64_t second = 1000000000, now = 50 * second, suppressed = 99;
    for (int i = 0; i < 3; i++)
        cr_assert(qv_log_limiter_pass_at(&limiter, now, 1000, 3, &suppressed));
    cr_assert_eq(suppressed, 0);
    for (int i = 0; i < 5; i++)
        cr_assert(!qv_log_limiter_pass_at(&limiter, now + second / 2, 1000, 3, &suppressed));
    cr_assert(qv_log_limiter_pass_at(&limiter, now + second, 1000, 3, &suppressed));
    cr_assert_eq(suppressed, 5);
    cr_assert(!qv_log_limiter_pass_at(&limiter, now + second, 1000, 3, &suppressed));
    now += 1000 * second; /* the bucket fills, but not beyond its size */
    for (int i = 0; i < 3; i++)
        cr_assert(qv_log_limiter_pass_at(&limiter, now, 1000, 3, &suppressed));
    cr_assert(!qv_log_limiter_pass_at(&limiter, now, 1000, 3, &suppressed));
}

static void hot_path(int i)
{
    QV_LOG_EVERY(3600000, 2, QV_LOG_WARN, NULL, "dropped %d", i);
}

Test(log, each_call_site_has_its_own_limit)
{
    start(QV_LOG_INFO, false);
    for (int i = 0; i < 100; i++) {
        hot_path(i);
        QV_LOG_EVERY(3600000, 1, QV_LOG_WARN, "r", "other %d", i);
    }
    const char *text = read_lines();
    cr_assert_not_null(strstr(text, "dropped 0\n"));
    cr_assert_not_null(strstr(text, "dropped 1\n"));
    cr_assert_null(strstr(text, "dropped 2"));
    cr_assert_not_null(strstr(text, "req=r other 0\n"));
    cr_assert_null(strstr(text, "other 1"));
}

Test(log, says_how_many_lines_were_suppressed)
{
    start(QV_LOG_INFO, false);
    qv_log_write(QV_LOG_WARN, NULL, 41, "queue full");
    cr_assert_str_eq(read_after_time(), "WARN  test queue full suppressed=41\n");
}

Test(log, masks_passwords_in_urls)
{
    static const char *const rows[][2] = {
        {"redis://user:secret@host:6379/0", "redis://user:***@host:6379/0"},
        {"redis://:secret@host", "redis://:***@host"},
        {"redis://host:6379", "redis://host:6379"},
        {"redis://user@host:6379", "redis://user@host:6379"},
        {"redis://u:p@ss/w:o@rd@host", "redis://u:***@host"},
        {"user:secret@host", "user:***@host"},
        {"tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"},
        {"redis://u:@host", "redis://u:***@host"},
        {"", ""},
    };
    char out[64];
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        cr_assert_str_eq(qv_log_mask_url(rows[i][0], out, sizeof out), rows[i][1]);
    cr_assert_str_eq(qv_log_mask_url("redis://user:secret@host", out, 15), "redis://user:*");
}
