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

/* Where the ranks of a group are and how they add up. */
typedef struct {
    const char *what;
    bool own_devices;
    const char *all_reduce;
} way;

static const way by_events = {"one device, events", false, "nccl"};
static const way by_nccl = {"NCCL", true, "nccl"};
static const way directly = {"directly", true, "direct"};
static const way by_size = {"directly or NCCL", true, "auto"};
static const way directly_on_one = {"one device, directly", false, "direct"};

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
static bool open_group(group *g, int32_t n, const way *w)
{
    *g = (group){.n = n};
    PASS(qv_comm_new(n, &g->comm));
    for (int32_t r = 0; r < n; r++) {
        qv_backend_options options = {
            .name = "cuda", .device = w->own_devices ? r : 0, .all_reduce = w->all_reduce};
        qv_status status = qv_backend_open(&options, &g->jobs[r].be);
        if (status == QV_ERR_ARG && w->own_devices)
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

/* --- The sum with the norm behind it ------------------------------------------------------ */

enum { NORM_ROUNDS = 6 };

/* One rank's tensors: `fused` goes through qv_op_sum_add_rms_norm, `apart` through its two parts.
 */
typedef struct {
    qv_backend *be;
    qv_tensor delta, residual[2], y[2], rest[2], w;
    float *numbers; /* of delta, which each round uses up */
    bool replay;    /* record the fused one, and replay it */
    qv_status status;
    char error[QV_ERROR_MAX];
} norm_job;

static qv_status fused(void *ctx, const qv_batch *batch)
{
    norm_job *job = ctx;
    (void)batch;
    return qv_op_sum_add_rms_norm(job->be, job->residual[0], job->delta, job->w, 1e-6f, true,
                                  job->y[0], job->rest[0]);
}

/* The residual grows round by round, so a message that arrives late or twice shows. Afterwards what
 * one way and the other left must be the same bits. */
static qv_status run_norms(norm_job *job)
{
    qv_recording *recording = NULL;
    int start = 0;
    QV_TRY(qv_backend_connect(job->be));
    if (job->replay) {
        qv_recording_shape shape = {.n_seqs = 1, .page_stride = 1};
        QV_TRY(qv_backend_record(job->be, &shape, fused, job, &recording));
        start = 1; /* recording has run it once */
    }
    size_t bytes = (size_t)(job->delta.shape[0] * job->delta.shape[1]) * sizeof *job->numbers;
    for (int i = start; i < NORM_ROUNDS; i++) {
        QV_TRY(qv_backend_upload(job->be, job->delta.data, job->numbers, bytes));
        QV_TRY(recording != NULL ? qv_backend_replay(job->be, recording, &qv_empty_batch)
                                 : fused(job, NULL));
    }
    QV_TRY(qv_backend_sync(job->be));
    if (recording != NULL)
        qv_recording_free(job->be, recording);
    QV_TRY(qv_backend_upload(job->be, job->delta.data, job->numbers, bytes));
    QV_TRY(qv_op_all_reduce(job->be, job->delta));
    for (int i = 0; i < NORM_ROUNDS; i++)
        QV_TRY(qv_op_add_rms_norm(job->be, job->residual[1], job->delta, job->w, 1e-6f, true,
                                  job->y[1], job->rest[1]));
    return qv_backend_sync(job->be);
}

static void *run_norm_job(void *arg)
{
    norm_job *job = arg;
    job->status = run_norms(job);
    if (job->status != QV_OK) {
        snprintf(job->error, sizeof job->error, "%s", qv_error());
        qv_comm_fail(job->be->comm, job->be->rank, job->error);
    }
    return NULL;
}

static qv_tensor upload(qv_backend *be, const void *x, qv_dtype dtype, int64_t rows, int64_t cols)
{
    void *data;
    size_t bytes = (size_t)(rows * cols) * qv_dtype_size(dtype);
    PASS(qv_backend_alloc(be, bytes, &data));
    PASS(qv_backend_upload(be, data, x, bytes));
    return qv_tensor_2d(data, dtype, rows, cols);
}

static void give_norm(norm_job *job, int32_t rank, int64_t rows, int64_t cols)
{
    qv_rng rng = qv_rng_seed((uint64_t)(100 + rank)), same = qv_rng_seed(7);
    float *x = random_floats(&same, rows * cols, 1);
    uint16_t *bits = to_bf16(x, rows * cols);
    job->numbers = random_floats(&rng, rows * cols, 1);
    job->delta = upload(job->be, job->numbers, QV_F32, rows, cols);
    for (int i = 0; i < 2; i++) {
        job->residual[i] = upload(job->be, x, QV_F32, rows, cols);
        job->y[i] = upload(job->be, bits, QV_BF16, rows, cols);
        job->rest[i] = upload(job->be, bits, QV_BF16, rows, cols);
    }
    job->w = qv_tensor_1d(upload(job->be, x, QV_F32, 1, cols).data, QV_F32, cols);
    free(x), free(bits);
}

static void same_bits(qv_backend *be, qv_tensor a, qv_tensor b, const char *what)
{
    size_t size = qv_dtype_size(a.dtype), n = (size_t)(a.shape[0] * a.shape[1]);
    char *x = must(malloc(n * size)), *y = must(malloc(n * size));
    PASS(qv_backend_download(be, x, a.data, n * size));
    PASS(qv_backend_download(be, y, b.data, n * size));
    for (size_t i = 0; i < n; i++)
        cr_assert_eq(memcmp(x + i * size, y + i * size, size), 0, "%s: number %zu differs", what,
                     i);
    free(x), free(y);
}

static void check_norms(int32_t n, const way *w, bool replay)
{
    static const int64_t shapes[][2] = {{1, 160},   {3, 2048},   {200, 256}, {1, 4096},
                                        {40, 2688}, {160, 5120}, {7, 40}};
    for (size_t s = 0; s < QV_ROWS(shapes); s++) {
        group g;
        norm_job jobs[MAX_GROUP] = {{NULL}};
        pthread_t threads[MAX_GROUP];
        if (!open_group(&g, n, w)) {
            close_group(&g);
            cr_skip_test("this machine has fewer than %d devices", n);
        }
        for (int32_t r = 0; r < n; r++) {
            jobs[r] = (norm_job){.be = g.jobs[r].be, .replay = replay};
            give_norm(&jobs[r], r, shapes[s][0], shapes[s][1]);
        }
        for (int32_t r = 0; r < n; r++)
            cr_assert_eq(pthread_create(&threads[r], NULL, run_norm_job, &jobs[r]), 0);
        for (int32_t r = 0; r < n; r++)
            pthread_join(threads[r], NULL);
        for (int32_t r = 0; r < n; r++) {
            cr_assert_eq(jobs[r].status, QV_OK, "%s, rank %d: %s", w->what, r, jobs[r].error);
            char what[64];
            snprintf(what, sizeof what, "%s, residual", w->what);
            same_bits(jobs[r].be, jobs[r].residual[0], jobs[r].residual[1], what);
            snprintf(what, sizeof what, "%s, y", w->what);
            same_bits(jobs[r].be, jobs[r].y[0], jobs[r].y[1], what);
            snprintf(what, sizeof what, "%s, rest", w->what);
            same_bits(jobs[r].be, jobs[r].rest[0], jobs[r].rest[1], what);
            free(jobs[r].numbers);
        }
        close_group(&g);
    }
}

Test(cuda_comm, sum_add_and_norm_in_one_kernel_are_the_bits_of_two_on_one_device, .timeout = 120)
{
    check_norms(2, &directly_on_one, false);
    check_norms(2, &directly_on_one, true);
    check_norms(3, &directly_on_one, false);
}

Test(cuda_comm, sum_add_and_norm_in_one_kernel_are_the_bits_of_two_on_two_devices, .timeout = 120)
{
    check_norms(2, &directly, false);
    check_norms(2, &directly, true);
    check_norms(2, &by_size, true);
}

Test(cuda_comm, sum_add_and_norm_in_one_kernel_are_the_bits_of_two_on_four_devices, .timeout = 120)
{
    check_norms(4, &directly, true);
}

/* --- Sums --------------------------------------------------------------------------------- */

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

static void check_group(int32_t n, const way *w)
{
    static const int64_t shapes[][2] = {{1, 160}, {5, 33}, {64, 4096}, {1, 1}, {500, 2688}};
    for (size_t s = 0; s < QV_ROWS(shapes); s++) {
        group g;
        if (!open_group(&g, n, w)) {
            close_group(&g);
            cr_skip_test("this machine has fewer than %d devices", n);
        }
        for (int32_t r = 0; r < n; r++)
            give_numbers(&g.jobs[r], r, shapes[s][0], shapes[s][1]);
        run_group(&g);
        for (int32_t r = 0; r < n; r++)
            cr_assert_eq(g.jobs[r].status, QV_OK, "%s, rank %d: %s", w->what, r, g.jobs[r].error);
        check_group_numbers(&g, shapes[s][0], shapes[s][1], 5);
        close_group(&g);
    }
}

Test(cuda_comm, ranks_on_one_device_sum_and_gather)
{
    for (int32_t n = 2; n <= MAX_GROUP; n++)
        check_group(n, &by_events);
}

Test(cuda_comm, ranks_on_one_device_write_to_each_other, .timeout = 120)
{
    for (int32_t n = 2; n <= MAX_GROUP; n++)
        check_group(n, &directly_on_one);
}

#ifdef QV_WITH_CUDA
Test(cuda_comm, nccl_with_one_rank_gives_its_own_numbers)
{
    duo d = open_duo(3);
    const qv_nccl *nccl;
    if (is_emulated(d.dev))
        cr_skip_test("NCCL does not know the emulated device");
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
    check_group(2, &by_nccl);
}

Test(cuda_comm, two_devices_write_to_each_other, .timeout = 120)
{
    check_group(2, &directly);
    check_group(2, &by_size);
}

Test(cuda_comm, four_devices_write_to_each_other, .timeout = 120)
{
    check_group(4, &directly);
    check_group(4, &by_size);
}

Test(cuda_comm, four_devices_sum_and_gather_through_nccl)
{
    check_group(4, &by_nccl);
}

static void check_failure(const way *w)
{
    group g;
    if (!open_group(&g, 2, w)) {
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
    check_failure(&by_events);
}

Test(cuda_comm, a_rank_that_fails_ends_the_wait_of_a_kernel_for_it, .timeout = 60)
{
    check_failure(&directly_on_one);
}

Test(cuda_comm, a_rank_that_fails_ends_the_wait_of_a_kernel_on_another_device, .timeout = 60)
{
    check_failure(&directly);
}

Test(cuda_comm, a_rank_that_fails_ends_the_other_in_nccl, .timeout = 60)
{
    check_failure(&by_nccl);
}
