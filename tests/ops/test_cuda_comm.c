/* Collectives of CUDA ranks against sums on the host: all on one device, and each on its own where
 * the machine has several. */
#include "ops/backend.h"
#include "tests/ops/cuda_test.h"
#ifdef QV_WITH_CUDA
#include "ops/cuda/cuda.h"
#include "ops/cuda/nccl.h"
#endif

#include <pthread.h>

enum { MAX_GROUP = 4 };

typedef struct {
    qv_backend *be;
    qv_tensor x, part, whole;
    bool fails; /* says so instead of taking part in the second round */
    qv_status status;
    char error[QV_ERROR_MAX];
} rank_job;

typedef struct {
    qv_comm *comm;
    int32_t n;
    rank_job jobs[MAX_GROUP];
} group;

/* False: there are not so many devices. */
static bool open_group(group *g, int32_t n, bool own_devices)
{
    *g = (group){.n = n};
    PASS(qv_comm_new(n, &g->comm));
    for (int32_t r = 0; r < n; r++) {
        qv_backend_options options = {.name = "cuda", .device = own_devices ? r : 0};
        qv_status status = qv_backend_open(&options, &g->jobs[r].be);
        if (status == QV_ERR_ARG && own_devices)
            return false;
        if (status == QV_ERR_NOT_FOUND || status == QV_ERR_DEVICE)
            cr_skip_test("no CUDA device: %s", qv_error());
        cr_assert(status == QV_OK, "%s", qv_error());
        qv_backend_join(g->jobs[r].be, g->comm, r);
    }
    return true;
}

static void close_group(group *g)
{
    for (int32_t r = 0; r < g->n; r++)
        qv_backend_close(g->jobs[r].be);
    qv_comm_free(g->comm);
}

static qv_status work(rank_job *job)
{
    QV_TRY(qv_backend_connect(job->be));
    for (int i = 0; i < 3; i++)
        QV_TRY(qv_op_all_reduce(job->be, job->x));
    QV_TRY(qv_op_gather_cols(job->be, job->part, job->whole));
    QV_TRY(qv_backend_sync(job->be));
    if (job->fails)
        return qv_fail(QV_ERR_DEVICE, "it was told to");
    for (int i = 0; i < 2; i++)
        QV_TRY(qv_op_all_reduce(job->be, job->x));
    return qv_backend_sync(job->be);
}

static void *run(void *arg)
{
    rank_job *job = arg;
    job->status = work(job);
    if (job->status != QV_OK) {
        snprintf(job->error, sizeof job->error, "%s", qv_error());
        qv_comm_fail(job->be->comm, job->be->rank, job->error);
    }
    return NULL;
}

static void run_group(group *g)
{
    pthread_t threads[MAX_GROUP];
    for (int32_t r = 0; r < g->n; r++)
        cr_assert_eq(pthread_create(&threads[r], NULL, run, &g->jobs[r]), 0);
    for (int32_t r = 0; r < g->n; r++)
        pthread_join(threads[r], NULL);
}

/* Small whole numbers, so that sums are exact whatever their order. */
static void give_numbers(rank_job *job, int32_t rank, int64_t rows, int64_t cols)
{
    float *x = must(malloc((size_t)(rows * cols) * sizeof *x));
    float *part = must(malloc((size_t)(rows * 8) * sizeof *part));
    for (int64_t i = 0; i < rows * cols; i++)
        x[i] = (float)((i + rank) % 2);
    for (int64_t i = 0; i < rows * 8; i++)
        part[i] = (float)(1000 * rank + i);
    void *data;
    PASS(qv_backend_alloc(job->be, (size_t)(rows * cols) * 4, &data));
    PASS(qv_backend_upload(job->be, data, x, (size_t)(rows * cols) * 4));
    job->x = qv_tensor_2d(data, QV_F32, rows, cols);
    PASS(qv_backend_alloc(job->be, (size_t)(rows * 8) * 4, &data));
    PASS(qv_backend_upload(job->be, data, part, (size_t)(rows * 8) * 4));
    job->part = qv_tensor_2d(data, QV_F32, rows, 8);
    PASS(qv_backend_alloc(job->be, (size_t)(rows * 8 * MAX_GROUP) * 4, &data));
    job->whole = qv_tensor_2d(data, QV_F32, rows, 8 * MAX_GROUP);
    free(x), free(part);
}

static void check_group_numbers(const group *g, int64_t rows, int64_t cols, int rounds)
{
    float *x = must(malloc((size_t)(rows * cols) * sizeof *x));
    for (int32_t r = 0; r < g->n; r++) {
        PASS(qv_backend_download(g->jobs[r].be, x, g->jobs[r].x.data, (size_t)(rows * cols) * 4));
        for (int64_t i = 0; i < rows * cols; i++) {
            double sum = 0;
            for (int32_t q = 0; q < g->n; q++)
                sum += (double)((i + q) % 2);
            for (int k = 1; k < rounds; k++)
                sum *= g->n;
            cr_assert_eq(x[i], sum, "rank %d, element %ld", r, (long)i);
        }
    }
    float *whole = must(malloc((size_t)(rows * 8 * MAX_GROUP) * sizeof *whole));
    PASS(qv_backend_download(g->jobs[0].be, whole, g->jobs[0].whole.data,
                             (size_t)(rows * 8 * MAX_GROUP) * 4));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < 8 * g->n; j++)
            cr_assert_eq(whole[i * 8 * MAX_GROUP + j], (float)(1000 * (j / 8) + i * 8 + j % 8));
    free(x), free(whole);
}

static void check_group(int32_t n, bool own_devices)
{
    static const int64_t shapes[][2] = {{1, 160}, {5, 33}, {64, 4096}, {1, 1}};
    for (size_t s = 0; s < QV_ROWS(shapes); s++) {
        group g;
        if (!open_group(&g, n, own_devices)) {
            close_group(&g);
            cr_skip_test("this machine has fewer than %d devices", n);
        }
        for (int32_t r = 0; r < n; r++)
            give_numbers(&g.jobs[r], r, shapes[s][0], shapes[s][1]);
        run_group(&g);
        for (int32_t r = 0; r < n; r++)
            cr_assert_eq(g.jobs[r].status, QV_OK, "rank %d: %s", r, g.jobs[r].error);
        check_group_numbers(&g, shapes[s][0], shapes[s][1], 5);
        close_group(&g);
    }
}

Test(cuda_comm, ranks_on_one_device_sum_and_gather)
{
    for (int32_t n = 2; n <= MAX_GROUP; n++)
        check_group(n, false);
}

#ifdef QV_WITH_CUDA
Test(cuda_comm, nccl_with_one_rank_gives_its_own_numbers)
{
    duo d = open_duo(3);
    const qv_nccl *nccl;
    if (qv_nccl_load(&nccl) != QV_OK)
        cr_skip_test("%s", qv_error());
    qv_nccl_id id;
    qv_nccl_comm *comm;
    PASS(qv_nccl_check(nccl, nccl->get_unique_id(&id), "id"));
    PASS(qv_nccl_check(nccl, nccl->comm_init_rank(&comm, 1, id, 0), "init"));
    twin t = NEW_TWIN(&d, QV_F32, 7, 33);
    fill_twin(&d, &t, 1);
    qv_cuda_backend *cuda = qv_cuda(d.dev);
    PASS(qv_nccl_check(nccl,
                       nccl->all_reduce(t.dev.data, t.dev.data, 7 * 33, QV_NCCL_FLOAT32,
                                        QV_NCCL_SUM, comm, cuda->stream),
                       "all_reduce"));
    PASS(qv_backend_sync(d.dev));
    float got[7 * 33];
    PASS(qv_backend_download(d.dev, got, t.dev.data, sizeof got));
    for (int i = 0; i < 7 * 33; i++)
        cr_assert_eq(got[i], ((float *)t.cpu.data)[i], "element %d", i);
    (void)nccl->comm_destroy(comm);
    free_twin(&d, &t);
    close_duo(&d);
}
#endif

Test(cuda_comm, two_devices_sum_and_gather_through_nccl)
{
    check_group(2, true);
}

Test(cuda_comm, four_devices_sum_and_gather_through_nccl)
{
    check_group(4, true);
}

static void check_failure(bool own_devices)
{
    group g;
    if (!open_group(&g, 2, own_devices)) {
        close_group(&g);
        cr_skip_test("this machine has one device");
    }
    for (int32_t r = 0; r < 2; r++)
        give_numbers(&g.jobs[r], r, 64, 4096);
    g.jobs[1].fails = true;
    run_group(&g);
    cr_expect_eq(g.jobs[0].status, QV_ERR_DEVICE);
    cr_expect_str_eq(g.jobs[0].error, "rank 1 failed: it was told to");
    close_group(&g);
}

Test(cuda_comm, a_rank_that_fails_ends_the_other_on_one_device, .timeout = 60)
{
    check_failure(false);
}

Test(cuda_comm, a_rank_that_fails_ends_the_other_in_nccl, .timeout = 60)
{
    check_failure(true);
}
