#include "common/status.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <string.h>

Test(status, has_a_name_and_a_text_for_every_code)
{
    for (int i = 0; i < QV_STATUS_COUNT; i++) {
        cr_assert(strlen(qv_status_name(i)) > 0, "%d", i);
        cr_assert(strlen(qv_status_text(i)) > 0, "%d", i);
    }
    cr_assert_str_eq(qv_status_name(QV_ERR_FORMAT), "ERR_FORMAT");
    cr_assert_str_eq(qv_status_name((qv_status)99), "ERR_UNKNOWN");
    cr_assert_str_eq(qv_status_text((qv_status)-1), "unknown status");
}

static qv_status read_rank(const char *name, int rank)
{
    if (rank > 64)
        return qv_fail(QV_ERR_LIMIT, "%s: rank %d is above 64", name, rank);
    return QV_OK;
}

static qv_status load(const char *name, int rank)
{
    QV_TRY(read_rank(name, rank));
    return QV_OK;
}

Test(status, try_passes_the_code_up_and_keeps_the_sentence)
{
    cr_assert_eq(load("json", 16), QV_OK);
    cr_assert_eq(load("json", 128), QV_ERR_LIMIT);
    cr_assert_str_eq(qv_error(), "json: rank 128 is above 64");
}

Test(status, prefix_goes_in_front_of_the_sentence)
{
    qv_fail(QV_ERR_IO, "disk full");
    cr_assert_eq(qv_fail_prefix(QV_ERR_IO, "adapter %s", "json"), QV_ERR_IO);
    cr_assert_str_eq(qv_error(), "adapter json: disk full");
}

Test(status, may_quote_its_own_last_sentence)
{
    qv_fail(QV_ERR_ARG, "inner");
    qv_fail(QV_ERR_ARG, "outer (%s)", qv_error());
    cr_assert_str_eq(qv_error(), "outer (inner)");
}

Test(status, cuts_a_long_sentence_between_characters)
{
    /* Euro signs have 3 bytes; each offset puts the cut at another byte of one. */
    for (int offset = 0; offset < 3; offset++) {
        char text[QV_ERROR_MAX * 2] = "";
        memset(text, 'x', (size_t)offset);
        for (size_t at = (size_t)offset; at + 4 < sizeof text; at += 3)
            memcpy(text + at, "\xE2\x82\xAC", 4);
        qv_fail(QV_ERR_FORMAT, "%s", text);
        size_t len = strlen(qv_error());
        cr_assert(len < QV_ERROR_MAX && len >= QV_ERROR_MAX - 4, "offset %d: %zu", offset, len);
        cr_assert_eq((len - (size_t)offset) % 3, 0, "offset %d: %zu", offset, len);
    }
}

static void *fail_elsewhere(void *unused)
{
    (void)unused;
    qv_fail(QV_ERR_IO, "other thread");
    return NULL;
}

Test(status, keeps_one_sentence_per_thread)
{
    pthread_t thread;
    qv_fail(QV_ERR_ARG, "this thread");
    cr_assert_eq(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
    pthread_join(thread, NULL);
    cr_assert_str_eq(qv_error(), "this thread");
}
