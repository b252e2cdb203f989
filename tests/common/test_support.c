/* The helpers of the tests themselves: a wrong metric would make every numeric test worthless. */
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

Test(support, random_numbers_are_the_same_everywhere)
{
    qv_rng rng = qv_rng_seed(0);
    cr_assert_eq(qv_rng_u64(&rng), UINT64_C(0xE220A8397B1DCDAF));
    cr_assert_eq(qv_rng_u64(&rng), UINT64_C(0x6E789E6AA1B965F4));
    double sum = 0, square = 0;
    for (int i = 0; i < 100000; i++) {
        double x = qv_rng_normal(&rng);
        sum += x;
        square += x * x;
        int64_t n = qv_rng_range(&rng, -3, 4);
        cr_assert(n >= -3 && n < 4);
    }
    cr_assert_float_eq(sum / 100000, 0, 0.02);
    cr_assert_float_eq(square / 100000, 1, 0.02);
}

Test(support, comparison_finds_the_worst_element)
{
    const float want[] = {3, -4, 0, 0}, got[] = {3, -4, 0.5f, -1};
    qv_error_stats stats = qv_compare_f32(got, want, 4);
    cr_assert_eq(stats.worst, 3);
    cr_assert_eq(stats.max_abs, 1);
    cr_assert_float_eq(stats.max_norm, 1 / 2.5, 1e-12);
    cr_assert_float_eq(stats.rms_norm, sqrt(1.25 / 4) / 2.5, 1e-12);
    cr_assert(qv_close_f32("close", got, want, 4, 0.4));
    cr_assert(!qv_close_f32("expected line", got, want, 4, 0.39));
    cr_assert(qv_close_f32("empty", got, want, 0, 0));
}

Test(support, comparison_never_accepts_a_nan_that_was_not_wanted)
{
    const float got[] = {1, NAN, INFINITY};
    const double same[] = {1, NAN, INFINITY}, other[] = {1, 2, INFINITY},
                 sign[] = {1, NAN, -INFINITY};
    cr_assert(qv_close_f64("same", got, same, 3, 0));
    cr_assert(!qv_close_f64("expected line", got, other, 3, 1e9));
    cr_assert_eq(qv_compare_f64(got, other, 3).worst, 1);
    cr_assert(!qv_close_f64("expected line", got, sign, 3, 1e9));
}

Test(support, temporary_folders_go_away_with_their_process)
{
    int pipe_fds[2];
    char path[128] = "";
    cr_assert_eq(pipe(pipe_fds), 0);
    pid_t child = fork();
    if (child == 0) {
        const char *dir = qv_temp_dir();
        qv_write_text(qv_path(dir, "file-%d", 1), "x");
        char *text = qv_read_file(qv_path(dir, "file-1"), NULL);
        ssize_t n = strcmp(text, "x") == 0 ? write(pipe_fds[1], dir, strlen(dir)) : -1;
        free(text);
        exit(n > 0 ? 0 : 1);
    }
    int status = 0;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert_eq(status, 0);
    cr_assert_gt(read(pipe_fds[0], path, sizeof path - 1), 0);
    cr_assert_eq(access(path, F_OK), -1);
}

Test(support, absent_data_is_null)
{
    cr_assert_null(qv_golden_path("no/such/file"));
    cr_assert_null(qv_demo_path("no/such/file"));
}

static bool count_down(void *user)
{
    return --*(int *)user == 0;
}

Test(support, waits_until_true_or_the_deadline)
{
    int n = 3;
    cr_assert(qv_wait_until(count_down, &n, 10000));
    n = -1;
    cr_assert(!qv_wait_until(count_down, &n, 5));
}

Test(support, a_fake_clock_moves_only_by_hand)
{
    qv_clock fake = qv_clock_fake(100), real = qv_clock_real();
    cr_assert_eq(qv_clock_now_ms(&fake), 100);
    qv_clock_advance_ms(&fake, 50);
    cr_assert_eq(qv_clock_now_ms(&fake), 150);
    uint64_t now = qv_now_ns();
    cr_assert_geq(qv_clock_now_ns(&real), now);
    cr_assert_geq(qv_clock_now_ns(NULL), now);
    cr_assert_gt(qv_wall_ms(), UINT64_C(1700000000000));
}
