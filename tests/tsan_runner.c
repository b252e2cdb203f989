/* Runs Criterion tests under ThreadSanitizer, in place of the Criterion library: the sandbox of the
 * library maps memory where the sanitizer keeps its own, and neither works then. This file defines
 * what a test program takes from the library, and a main that runs each test in a forked child, one
 * after the other. Arguments are names, "suite" or "suite/test"; those that start with '-' (and the
 * value of --jobs) are ignored; names that select no test are an error. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define EXIT_FAILED  91 /* an assertion failed */
#define EXIT_SKIPPED 92

extern struct criterion_test *__start_cr_tst[], *__stop_cr_tst[];
extern struct criterion_suite *__start_cr_sts[] __attribute__((weak));
extern struct criterion_suite *__stop_cr_sts[] __attribute__((weak));

struct criterion_options criterion_options;

/* libzmq and czmq are not instrumented: what they hand from thread to thread looks like a race. */
const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "called_from_lib:libzmq.so\ncalled_from_lib:libczmq.so\nrace:libzmq.so\n";
}

const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "ignore_noninstrumented_modules=1";
}

static const struct criterion_test *current;
static _Atomic bool failed; /* in the child: an assertion failed and the test went on */

/* --- what assertions call -----------------------------------------------------------------------
 */

int cr_asprintf(char **out, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vasprintf(out, format, args);
    va_end(args);
    return n;
}

void cr_asprintf_free(char *text)
{
    free(text);
}

/* The first argument is the text of the condition. */
char *cr_translate_assert_msg(int index, ...)
{
    (void)index;
    va_list args;
    va_start(args, index);
    char *text = strdup(va_arg(args, const char *));
    va_end(args);
    return text;
}

void criterion_send_assert(struct criterion_assert_stats *stats)
{
    if (!stats->passed)
        fprintf(stderr, "%s:%u: assertion failed: %s\n", stats->file, stats->line, stats->message);
}

void cri_asserts_passed_incr(void) {}

void criterion_abort_test(void)
{
    exit(EXIT_FAILED);
}

void criterion_continue_test(void)
{
    failed = true;
}

void criterion_skip_test(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(EXIT_SKIPPED);
}

/* --- what the body of a test calls --------------------------------------------------------------
 */

static const struct criterion_test_extra_data *suite_data(void)
{
    for (struct criterion_suite **suite = __start_cr_sts; suite != __stop_cr_sts; suite++)
        if (*suite != NULL && strcmp((*suite)->name, current->category) == 0)
            return (*suite)->data;
    return NULL;
}

void criterion_internal_test_setup(void)
{
    const struct criterion_test_extra_data *suite = suite_data();
    if (suite != NULL && suite->init != NULL)
        suite->init();
    if (current->data->init != NULL)
        current->data->init();
}

void criterion_internal_test_main(void (*body)(void))
{
    body();
}

void criterion_internal_test_teardown(void)
{
    const struct criterion_test_extra_data *suite = suite_data();
    if (current->data->fini != NULL)
        current->data->fini();
    if (suite != NULL && suite->fini != NULL)
        suite->fini();
}

/* --- the runner ---------------------------------------------------------------------------------
 */

/* Run one test in a child; its exit status as waitpid gives it. */
static int run_in_child(const struct criterion_test *test)
{
    int status = 0;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        current = test;
        if (test->data->timeout > 0)
            alarm((unsigned)ceil(test->data->timeout));
        test->test();
        exit(failed ? EXIT_FAILED : 0);
    }
    if (child < 0 || waitpid(child, &status, 0) != child) {
        perror("cannot run a test in a child");
        exit(1);
    }
    return status;
}

static bool is_selected(const struct criterion_test *test, int argc, char **argv)
{
    bool any = false;
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] == '-') {
            i += strcmp(argv[i], "--jobs") == 0;
            continue;
        }
        size_t size = strcspn(argv[i], "/");
        any = true;
        if (strlen(test->category) == size && strncmp(argv[i], test->category, size) == 0 &&
            (argv[i][size] == '\0' || strcmp(argv[i] + size + 1, test->name) == 0))
            return true;
    }
    return !any;
}

int main(int argc, char **argv)
{
    int n_tests = 0, n_failed = 0, n_skipped = 0;
    for (struct criterion_test **at = __start_cr_tst; at != __stop_cr_tst; at++) {
        const struct criterion_test *test = *at;
        if (test == NULL || test->data->disabled || !is_selected(test, argc, argv))
            continue;
        int status = run_in_child(test);
        bool skipped = WIFEXITED(status) && WEXITSTATUS(status) == EXIT_SKIPPED;
        bool passed = test->data->signal != 0
                          ? WIFSIGNALED(status) && WTERMSIG(status) == test->data->signal
                          : WIFEXITED(status) && WEXITSTATUS(status) == test->data->exit_code;
        n_tests++;
        n_skipped += skipped;
        n_failed += !passed && !skipped;
        printf("[%s] %s::%s\n",
               skipped  ? "SKIP"
               : passed ? "PASS"
                        : "FAIL",
               test->category, test->name);
    }
    if (n_tests == 0) {
        fprintf(stderr, "%s: none of the tests has such a name\n", argv[0]);
        return 2;
    }
    printf("[====] Tested: %d | Passing: %d | Failing: %d | Skipped: %d\n", n_tests,
           n_tests - n_failed - n_skipped, n_failed, n_skipped);
    return n_failed == 0 ? 0 : 1;
}
