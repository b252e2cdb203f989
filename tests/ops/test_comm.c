/* Collectives of ranks that meet in memory: what they compute, and how they end when one fails. */
#include "ops/backend.h"
#include "tests/ops/ops_test.h"

#include <pthread.h>
#include <stdatomic.h>

enum { MAX_GROUP = 5 };

typedef struct {
    qv_tensor delta, residual, y, w;
} norm_args;

/* A rank of a test: its backend, what it works on, how it ended. */
typedef struct {
    int32_t rank;
    qv_backend *be;
    qv_tensor x, whole;
    norm_args norms[2]; /* of sum_norms: by one op, by two */
    bool fails;         /* says so instead of taking part */
    qv_status status;
    char error[QV_ERROR_MAX];
} rank_job;

typedef struct {
    qv_comm *comm;
    int32_t n;
    rank_job jobs[MAX_GROUP];
} group;

static group open_group(int32_t n, const char *arithmetic)
{
    group g = {.n = n};
    PASS(qv_comm_new(n, &g.comm));
    for (int32_t r = 0; r < n; r++) {
        qv_backend_options options = {.name = "cpu", .n_threads = 1, .arithmetic = arithmetic};
        g.jobs[r].rank = r;
        PASS(qv_backend_open(&options, &g.jobs[r].be));
        qv_backend_join(g.jobs[r].be, g.comm, r);
    }
    return g;
}

static void close_group(group *g)
{
    for (int32_t r = 0; r < g->n; r++)
        qv_backend_close(g->jobs[r].be);
    qv_comm_free(g->comm);
}

static void *reduce(void *arg)
{
    rank_job *job = arg;
    if (job->fails) {
        qv_comm_fail(job->be->comm, job->rank, "it was told to");
        return NULL;
    }
    for (int i = 0; i < 3 && job->status == QV_OK; i++) /* sums of sums: rounds must not mix */
        job->status = qv_op_all_reduce(job->be, job->x);
    snprintf(job->error, sizeof job->error, "%s", job->status == QV_OK ? "" : qv_error());
    return NULL;
}

static void *gather(void *arg)
{
    rank_job *job = arg;
    job->status = qv_op_gather_cols(job->be, job->x, job->whole);
    return NULL;
}

static qv_status sum_both_ways(rank_job *job)
{
    const norm_args *one = &job->norms[0], *two = &job->norms[1];
    QV_TRY(qv_op_sum_add_rms_norm(job->be, one->residual, one->delta, one->w, 1e-6f, true, one->y,
                                  (qv_tensor){.data = NULL}));
    QV_TRY(qv_op_all_reduce(job->be, two->delta));
    return qv_op_add_rms_norm(job->be, two->residual, two->delta, two->w, 1e-6f, true, two->y,
                              (qv_tensor){.data = NULL});
}

static void *sum_norms(void *arg)
{
    rank_job *job = arg;
    job->status = sum_both_ways(job);
    snprintf(job->error, sizeof job->error, "%s", job->status == QV_OK ? "" : qv_error());
    return NULL;
}

static void run_group(group *g, void *(*fn)(void *))
{
    pthread_t threads[MAX_GROUP];
    for (int32_t r = 0; r < g->n; r++)
        cr_assert_eq(pthread_create(&threads[r], NULL, fn, &g->jobs[r]), 0);
    for (int32_t r = 0; r < g->n; r++)
        pthread_join(threads[r], NULL);
}

/* What three all-reduces make of the ranks' values: sums in the order of ranks, in float32. */
static float reduced(const float *values, int32_t n)
{
    float x[MAX_GROUP];
    memcpy(x, values, (size_t)n * sizeof *x);
    float sum = 0;
    for (int i = 0; i < 3; i++) {
        sum = 0;
        for (int32_t r = 0; r < n; r++)
            sum += x[r];
        for (int32_t r = 0; r < n; r++)
            x[r] = sum;
    }
    return sum;
}

Test(comm, all_reduce_gives_every_rank_the_same_sum_in_the_order_of_ranks)
{
    static const struct {
        int64_t rows, cols, stride;
    } shapes[] = {{1, 1, 1}, {1, 3, 5}, {7, 160, 160}, {33, 65, 70}, {0, 8, 8}};
    static const char *const arithmetics[] = {"f32", "bf16"};
    qv_rng rng = qv_rng_seed(11);
    for (int32_t n = 1; n <= MAX_GROUP; n++) {
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            int64_t rows = shapes[s].rows, cols = shapes[s].cols, stride = shapes[s].stride;
            bool bf16 = s % 2 == 1;
            group g = open_group(n, arithmetics[bf16]);
            float *inputs[MAX_GROUP];
            for (int32_t r = 0; r < n; r++) {
                inputs[r] = random_floats(&rng, rows * stride + 1, 1);
                g.jobs[r].x =
                    qv_tensor_2d(copied_floats(inputs[r], rows * stride + 1), QV_F32, rows, cols);
                g.jobs[r].x.stride[0] = stride;
            }
            run_group(&g, reduce);
            for (int32_t r = 0; r < n; r++) {
                cr_assert_eq(g.jobs[r].status, QV_OK, "%s", g.jobs[r].error);
                for (int64_t i = 0; i < rows * stride; i++) {
                    float values[MAX_GROUP];
                    for (int32_t q = 0; q < n; q++)
                        values[q] = inputs[q][i];
                    float expected = inputs[r][i]; /* between rows nothing changes */
                    if (i % stride < cols && n > 1)
                        expected = reduced(values, n); /* whatever the arithmetic */
                    cr_assert_eq(((float *)g.jobs[r].x.data)[i], expected,
                                 "%d ranks, shape %zu, rank %d, element %ld", n, s, r, (long)i);
                }
                free(g.jobs[r].x.data);
            }
            for (int32_t r = 0; r < n; r++)
                free(inputs[r]);
            close_group(&g);
        }
    }
}

Test(comm, gather_puts_the_columns_of_all_ranks_side_by_side_on_the_first)
{
    enum { ROWS = 3, N = 4 };
    group g = open_group(N, "f32");
    float whole[ROWS * 16], parts[N][ROWS * 8];
    int64_t total = 0;
    for (int32_t r = 0; r < N; r++) {
        for (int i = 0; i < ROWS * 8; i++)
            parts[r][i] = (float)(100 * r + i);
        g.jobs[r].x = qv_tensor_2d(parts[r], QV_F32, ROWS, r + 1);
        g.jobs[r].x.stride[0] = 8;
        total += r + 1;
    }
    g.jobs[0].whole = qv_tensor_2d(whole, QV_F32, ROWS, total);
    run_group(&g, gather);
    for (int64_t row = 0; row < ROWS; row++) {
        int64_t col = 0;
        for (int32_t r = 0; r < N; r++)
            for (int64_t i = 0; i < r + 1; i++)
                cr_expect_eq(whole[row * total + col++], parts[r][row * 8 + i], "rank %d", r);
    }
    close_group(&g);
}

Test(comm, a_rank_that_fails_ends_the_others_with_its_reason)
{
    for (int32_t loser = 0; loser < 3; loser++) {
        group g = open_group(3, "f32");
        float values[3][8] = {{0}};
        for (int32_t r = 0; r < 3; r++)
            g.jobs[r].x = qv_tensor_2d(values[r], QV_F32, 2, 4);
        g.jobs[loser].fails = true;
        run_group(&g, reduce);
        char expected[64];
        snprintf(expected, sizeof expected, "rank %d failed: it was told to", loser);
        for (int32_t r = 0; r < 3; r++) {
            if (r == loser)
                continue;
            cr_expect_eq(g.jobs[r].status, QV_ERR_DEVICE);
            cr_expect_str_eq(g.jobs[r].error, expected);
        }
        cr_expect_eq(qv_comm_first_failed(g.comm), loser);
        /* Later collectives fail too: nobody waits for a group that is broken. */
        FAIL_WITH(QV_ERR_DEVICE, "it was told to",
                  qv_op_all_reduce(g.jobs[(loser + 1) % 3].be, g.jobs[0].x));
        close_group(&g);
    }
}

Test(comm, a_failure_raises_the_flags_of_all_ranks_that_left_one)
{
    qv_comm *comm;
    volatile int32_t flags[4] = {0};
    PASS(qv_comm_new(3, &comm));
    for (int32_t r = 0; r < 3; r++)
        qv_comm_flag_failure(comm, r, &flags[r]);
    qv_comm_flag_failure(comm, 1, NULL);
    qv_comm_fail(comm, 2, "it was told to");
    cr_expect(flags[0] == 1 && flags[2] == 1, "%d %d", flags[0], flags[2]);
    cr_expect_eq(flags[1], 0, "a flag that was taken back is not touched");
    qv_comm_flag_failure(comm, 1, &flags[3]);
    cr_expect_eq(flags[3], 1, "one that comes late is raised at once");
    qv_comm_free(comm);
}

Test(comm, sum_add_and_norm_are_the_bits_of_the_three_one_after_the_other)
{
    enum { ROWS = 3, COLS = 20, N = 3 };
    group g = open_group(N, "f32");
    float deltas[N][2][ROWS * COLS], residuals[N][2][ROWS * COLS], y[N][2][ROWS * COLS];
    float gain[COLS];
    qv_rng rng = qv_rng_seed(3);
    qv_fill_uniform(&rng, gain, COLS, 0, 1);
    for (int32_t r = 0; r < N; r++) {
        qv_fill_uniform(&rng, deltas[r][0], ROWS * COLS, -1, 1);
        memcpy(deltas[r][1], deltas[r][0], sizeof deltas[r][0]);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < ROWS * COLS; j++)
                residuals[r][i][j] = (float)j;
        for (int i = 0; i < 2; i++)
            g.jobs[r].norms[i] =
                (norm_args){.delta = qv_tensor_2d(deltas[r][i], QV_F32, ROWS, COLS),
                            .residual = qv_tensor_2d(residuals[r][i], QV_F32, ROWS, COLS),
                            .y = qv_tensor_2d(y[r][i], QV_F32, ROWS, COLS),
                            .w = qv_tensor_1d(gain, QV_F32, COLS)};
    }
    run_group(&g, sum_norms);
    for (int32_t r = 0; r < N; r++) {
        cr_expect_eq(g.jobs[r].status, QV_OK, "%s", g.jobs[r].error);
        cr_expect_eq(memcmp(residuals[r][0], residuals[r][1], sizeof residuals[r][0]), 0);
        cr_expect_eq(memcmp(y[r][0], y[r][1], sizeof y[r][0]), 0);
        cr_expect_eq(memcmp(y[r][0], y[0][0], sizeof y[r][0]), 0, "rank %d differs", r);
    }
    close_group(&g);
}

Test(comm, refuses_groups_of_an_impossible_size)
{
    qv_comm *comm;
    FAIL_WITH(QV_ERR_ARG, "0 ranks", qv_comm_new(0, &comm));
    FAIL_WITH(QV_ERR_ARG, "65 ranks", qv_comm_new(65, &comm));
}
