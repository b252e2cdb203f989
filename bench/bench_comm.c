/* bench_comm: collectives of CUDA ranks, as steps use them: recorded, many in a row, without
 * waiting for the host in between.
 *
 *   bench_comm [--ranks N] [--one-device] [--ways nccl,direct,auto] [--hidden N]
 *
 * A row is a number of tokens. "sum" is the all-reduce of [tokens, hidden], "sum+norm" that with
 * the addition to the residual stream and the norm behind it, "apart" the two one after the other,
 * all in microseconds; "floor" is the message at 450 GB/s, what a GPU of an H100 board sends over
 * NVLink one way. The last columns are a copy within the first device before the ranks met and
 * after, in TB/s read and written: what meeting costs everything else.
 */
#include "common/clock.h"
#include "ops/comm.h"
#include "ops/ops.h"

#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 8, IN_A_ROW = 32, REPLAYS = 20, COPY_MIB = 1024 };

static const int64_t tokens[] = {1, 4, 16, 64, 128, 512, 4096};
enum { N_TOKENS = sizeof tokens / sizeof *tokens };
typedef enum { SUM, FUSED, APART, N_KINDS } kind;

typedef struct {
    int32_t rank;
    qv_backend *be;
    void *delta, *residual, *y, *w, *copy[2];
    kind kind;
    int64_t n;
    double us[N_TOKENS][N_KINDS], before, after; /* bytes a second */
    pthread_barrier_t *together;
} rank;

static int64_t hidden = 2688;

static void check(qv_status status, const char *what)
{
    if (status == QV_OK)
        return;
    fprintf(stderr, "bench_comm: %s: %s\n", what, qv_error());
    exit(1);
}

static qv_status run_kind(void *ctx, const qv_batch *batch)
{
    rank *r = ctx;
    (void)batch;
    qv_tensor delta = qv_tensor_2d(r->delta, QV_F32, r->n, hidden);
    qv_tensor residual = qv_tensor_2d(r->residual, QV_F32, r->n, hidden);
    qv_tensor y = qv_tensor_2d(r->y, QV_BF16, r->n, hidden);
    qv_tensor w = qv_tensor_1d(r->w, QV_F32, hidden), none = {.data = NULL};
    for (int i = 0; i < IN_A_ROW; i++) {
        if (r->kind == FUSED) {
            QV_TRY(qv_op_sum_add_rms_norm(r->be, residual, delta, w, 1e-6f, true, y, none));
            continue;
        }
        QV_TRY(qv_op_all_reduce(r->be, delta));
        if (r->kind == APART)
            QV_TRY(qv_op_add_rms_norm(r->be, residual, delta, w, 1e-6f, true, y, none));
    }
    return QV_OK;
}

static double copy_rate(rank *r)
{
    size_t bytes = (size_t)COPY_MIB << 20;
    double best = 0;
    for (int i = 0; i < 5; i++) {
        check(qv_backend_sync(r->be), "copy");
        uint64_t start = qv_now_ns();
        check(qv_backend_copy(r->be, r->copy[1], r->copy[0], bytes), "copy");
        check(qv_backend_sync(r->be), "copy");
        double rate = 2 * (double)bytes / ((double)(qv_now_ns() - start) * 1e-9);
        best = rate > best ? rate : best;
    }
    return best;
}

static double time_kind(rank *r)
{
    qv_recording *recording = NULL;
    qv_recording_shape shape = {.n_seqs = 1, .page_stride = 1};
    if (qv_backend_can_record(r->be))
        check(qv_backend_record(r->be, &shape, run_kind, r, &recording), "record");
    double best = 1e9;
    for (int i = 0; i < REPLAYS; i++) {
        check(qv_backend_sync(r->be), "sync");
        pthread_barrier_wait(r->together);
        uint64_t start = qv_now_ns();
        check(recording != NULL ? qv_backend_replay(r->be, recording, &qv_empty_batch)
                                : run_kind(r, NULL),
              "run");
        check(qv_backend_sync(r->be), "sync");
        double us = (double)(qv_now_ns() - start) * 1e-3 / IN_A_ROW;
        best = us < best ? us : best;
    }
    if (recording != NULL)
        qv_recording_free(r->be, recording);
    pthread_barrier_wait(r->together);
    return best;
}

static void *run(void *arg)
{
    rank *r = arg;
    r->before = copy_rate(r);
    pthread_barrier_wait(r->together);
    check(qv_backend_connect(r->be), "connect");
    for (int t = 0; t < N_TOKENS; t++) {
        for (kind k = 0; k < N_KINDS; k++) {
            r->kind = k;
            r->n = tokens[t];
            r->us[t][k] = time_kind(r);
        }
    }
    r->after = copy_rate(r);
    return NULL;
}

static void alloc_rank(rank *r)
{
    size_t bytes = (size_t)(tokens[N_TOKENS - 1] * hidden) * sizeof(float);
    void **blocks[] = {&r->delta, &r->residual, &r->y};
    for (int i = 0; i < 3; i++)
        check(qv_backend_alloc(r->be, bytes, blocks[i]), "memory");
    check(qv_backend_alloc(r->be, (size_t)hidden * sizeof(float), &r->w), "memory");
    for (int i = 0; i < 2; i++)
        check(qv_backend_alloc(r->be, (size_t)COPY_MIB << 20, &r->copy[i]), "memory");
}

static void measure(const char *way, int32_t n_ranks, bool one_device)
{
    static rank ranks[MAX_RANKS];
    pthread_t threads[MAX_RANKS];
    pthread_barrier_t together;
    qv_comm *comm;
    check(qv_comm_new(n_ranks, &comm), "group");
    pthread_barrier_init(&together, NULL, (unsigned)n_ranks);
    for (int32_t i = 0; i < n_ranks; i++) {
        qv_backend_options options = {
            .name = "cuda", .device = one_device ? 0 : i, .all_reduce = way};
        ranks[i] = (rank){.rank = i, .together = &together};
        check(qv_backend_open(&options, &ranks[i].be), "backend");
        qv_backend_join(ranks[i].be, comm, i);
        alloc_rank(&ranks[i]);
    }
    for (int32_t i = 0; i < n_ranks; i++)
        pthread_create(&threads[i], NULL, run, &ranks[i]);
    for (int32_t i = 0; i < n_ranks; i++)
        pthread_join(threads[i], NULL);
    for (int t = 0; t < N_TOKENS; t++) {
        const double *us = ranks[0].us[t];
        printf("%-8s %6lld %10.1f %9.1f %9.1f %9.1f", way, (long long)tokens[t],
               (double)(tokens[t] * hidden) * 4 / 450e9 * 1e6, us[SUM], us[FUSED], us[APART]);
        if (t == 0)
            printf("   %.2f %.2f", ranks[0].before * 1e-12, ranks[0].after * 1e-12);
        printf("\n");
        fflush(stdout);
    }
    for (int32_t i = 0; i < n_ranks; i++)
        qv_backend_leave(ranks[i].be);
    for (int32_t i = 0; i < n_ranks; i++)
        qv_backend_close(ranks[i].be);
    pthread_barrier_destroy(&together);
    qv_comm_free(comm);
}

int main(int argc, char **argv)
{
    static const struct option table[] = {{"ranks", required_argument, NULL, 'r'},
                                          {"one-device", no_argument, NULL, 'o'},
                                          {"ways", required_argument, NULL, 'w'},
                                          {"hidden", required_argument, NULL, 'h'},
                                          {0}};
    char ways[64] = "nccl,direct,auto";
    int32_t n_ranks = 2;
    bool one_device = false;
    for (int c; (c = getopt_long(argc, argv, "", table, NULL)) != -1;) {
        switch (c) {
        case 'r':
            n_ranks = atoi(optarg);
            break;
        case 'o':
            one_device = true;
            break;
        case 'w':
            snprintf(ways, sizeof ways, "%s", optarg);
            break;
        case 'h':
            hidden = atoll(optarg);
            break;
        default:
            return 2;
        }
    }
    if (n_ranks < 2 || n_ranks > MAX_RANKS || hidden < 1) {
        fprintf(stderr, "bench_comm: between 2 and %d ranks, hidden at least 1\n", MAX_RANKS);
        return 2;
    }
    printf("%d ranks%s, hidden %lld\n", n_ranks, one_device ? " on one device" : "",
           (long long)hidden);
    printf("%-8s %6s %10s %9s %9s %9s   copy before, after\n", "way", "tokens", "floor us", "sum",
           "sum+norm", "apart");
    for (char *way = strtok(ways, ","); way != NULL; way = strtok(NULL, ","))
        measure(way, n_ranks, one_device);
    return 0;
}
