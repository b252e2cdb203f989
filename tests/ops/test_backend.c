/* The backend itself: options, memory, and that a step allocates nothing. */
#include "tests/ops/upload_test.h"

#include <stdatomic.h>

/* --- Counting allocations -----------------------------------------------------------------------
 *
 * This program defines malloc and its kin itself, on top of the C library's own, so that calls from
 * anywhere are counted. The sanitizers want that place for themselves, and there is nothing to
 * count then. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__GLIBC__)
#define COUNTS_ALLOCATIONS 0
static atomic_long n_allocations;
#else
#define COUNTS_ALLOCATIONS 1

static atomic_long n_allocations;

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

void *malloc(size_t size)
{
    atomic_fetch_add(&n_allocations, 1);
    return __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    atomic_fetch_add(&n_allocations, 1);
    return __libc_calloc(n, size);
}

void *realloc(void *p, size_t size)
{
    atomic_fetch_add(&n_allocations, 1);
    return __libc_realloc(p, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    atomic_fetch_add(&n_allocations, 1);
    return __libc_memalign(alignment, size);
}

int posix_memalign(void **out, size_t alignment, size_t size)
{
    atomic_fetch_add(&n_allocations, 1);
    *out = __libc_memalign(alignment, size);
    return *out ? 0 : 12;
}
#endif

/* --- Options ------------------------------------------------------------------------------ */

Test(backend, describes_what_was_chosen)
{
    qv_backend *be = open_isa("baseline", 1);
    cr_assert_str_eq(qv_backend_name(be), "cpu");
    cr_assert_str_eq(qv_backend_describe(be), "cpu, 1 thread, baseline, exact gemm");
    cr_assert_eq(qv_backend_activation_dtype(be), QV_F32);
    cr_assert_eq(qv_backend_lora_dtype(be), QV_F32);
    cr_assert_eq(qv_backend_kv_dtype(be), QV_F32);
    qv_backend_close(be);
    PASS(qv_backend_open(
        &(qv_backend_options){.name = "cpu", .n_threads = 3, .gemm = "openblas", .isa = "baseline"},
        &be));
    cr_assert_str_eq(qv_backend_describe(be), "cpu, 3 threads, baseline, openblas gemm");
    qv_backend_close(be);
    qv_backend_close(NULL);
}

Test(backend, refuses_unknown_options)
{
    qv_backend *be;
    FAIL_WITH(QV_ERR_NOT_FOUND, "backend 'abacus' is not in this build; it has: cpu",
              qv_backend_open(&(qv_backend_options){.name = "abacus"}, &be));
    FAIL_WITH(QV_ERR_NOT_FOUND, "backend ''", qv_backend_open(&(qv_backend_options){0}, &be));
    FAIL_WITH(QV_ERR_ARG, "gemm 'fast'",
              qv_backend_open(&(qv_backend_options){.name = "cpu", .gemm = "fast"}, &be));
    FAIL_WITH(QV_ERR_ARG, "-3 threads",
              qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = -3}, &be));
    FAIL_WITH(QV_ERR_ARG, "all-reduce 'sum'",
              qv_backend_open(&(qv_backend_options){.name = "cpu", .all_reduce = "sum"}, &be));
    FAIL_WITH(QV_ERR_UNSUPPORTED, "instruction set 'z80'",
              qv_backend_open(&(qv_backend_options){.name = "cpu", .isa = "z80"}, &be));
    be = open_cpu(1);
    FAIL_WITH(QV_ERR_ARG, "-1 rows",
              qv_backend_reserve(be, &(qv_backend_limits){.max_logits = -1}));
    qv_backend_close(be);
}

/* --- Memory ------------------------------------------------------------------------------- */

Test(backend, memory_is_zero_and_aligned_whatever_its_size)
{
    static const size_t sizes[] = {0, 1, 63, 64, 65, 4096, 2097087, 2097088, 2097089, 5000000};
    qv_backend *be = open_cpu(1);
    for (int turn = 0; turn < 2; turn++) /* the second time, freed memory comes again */
        for (size_t i = 0; i < QV_ROWS(sizes); i++) {
            void *p;
            PASS(qv_backend_alloc(be, sizes[i], &p));
            cr_assert_eq((uintptr_t)p % 64, 0);
            for (size_t j = 0; j < sizes[i]; j++)
                cr_assert_eq(((char *)p)[j], 0);
            memset(p, 0xFF, sizes[i]);
            qv_backend_free(be, p);
        }
    qv_backend_free(be, NULL);
    qv_backend_close(be);
}

Test(backend, impossible_sizes_are_out_of_memory)
{
    static const size_t sizes[] = {SIZE_MAX, SIZE_MAX - 63, SIZE_MAX - 64, SIZE_MAX - 200,
                                   SIZE_MAX / 2};
    qv_backend *be = open_cpu(1);
    for (size_t i = 0; i < QV_ROWS(sizes); i++) {
        void *p;
        char text[32];
        snprintf(text, sizeof text, "%zu bytes", sizes[i]);
        FAIL_WITH(QV_ERR_NOMEM, text, qv_backend_alloc(be, sizes[i], &p));
    }
    qv_weight *w;
    cr_assert_eq(qv_weight_new(be, INT64_C(1) << 31, INT64_C(1) << 31, QV_F32, &w), QV_ERR_NOMEM);
    qv_backend_close(be);
}

Test(backend, uploads_and_downloads_are_complete_when_they_return)
{
    qv_backend *be = open_cpu(1);
    static const char text[] = "sixteen bytes.";
    char back[sizeof text] = {0};
    void *p;
    PASS(qv_backend_alloc(be, sizeof text, &p));
    PASS(qv_backend_upload(be, p, text, sizeof text));
    PASS(qv_backend_download(be, back, p, sizeof text));
    cr_assert_str_eq(back, text);
    PASS(qv_backend_zero(be, p, sizeof text));
    PASS(qv_backend_download(be, back, p, sizeof text));
    cr_assert_eq(back[0], 0);
    PASS(qv_backend_upload(be, NULL, NULL, 0));
    PASS(qv_backend_zero(be, NULL, 0));
    PASS(qv_backend_sync(be));
    qv_backend_free(be, p);
    qv_backend_close(be);
}

Test(backend, takes_pieces_of_an_upload_where_they_belong)
{
    qv_backend *be = open_isa(NULL, 2);
    check_upload(be);
    check_upload_order(be);
    qv_backend_close(be);
}

Test(backend, reserving_again_grows_and_never_shrinks)
{
    qv_backend *be = open_cpu(2);
    qv_sample_row row = {.target = 0, .n_top = -1};
    qv_sample_result result;
    float *logits = filled_floats(5000, 0);
    static const int32_t steps[] = {10, 5000, 100};
    for (size_t i = 0; i < QV_ROWS(steps); i++)
        PASS(qv_backend_reserve(be, &(qv_backend_limits){.n_vocab = steps[i]}));
    PASS(qv_op_sample(be, qv_tensor_2d(logits, QV_F32, 1, 5000), 5000, &row, &result));
    free(logits);
    qv_backend_close(be);
}

Test(weight, bytes_cover_the_padding_to_tiles)
{
    cr_assert_eq(qv_weight_bytes(16, 10, QV_F32), 640);
    cr_assert_eq(qv_weight_bytes(17, 10, QV_BF16), 640);
    cr_assert_eq(qv_weight_bytes(1, 1, QV_BF16), 32);
}

/* --- A step allocates nothing ------------------------------------------------------------- */

enum { T = 70, D = 64, HEADS = 4, KV_HEADS = 2, PAGE = 16, VOCAB = 500, RANK = 8, D_V = 16 };

static const int32_t pages[] = {0, 1, 2, 3, 4}, zeros[T], ones[] = {1};

static void run_dense(qv_backend *be, const qv_weight *w, qv_tensor x, qv_tensor y)
{
    float gain[D] = {0}, table[10 * D] = {0};
    qv_tensor g = qv_tensor_1d(gain, QV_F32, D);
    PASS(qv_op_embed(be, qv_tensor_2d(table, QV_F32, 10, D), 0, zeros, x));
    PASS(qv_op_linear(be, w, x, y));
    PASS(qv_op_linear(be, w, qv_tensor_rows(x, 0, 1), qv_tensor_rows(y, 0, 1)));
    PASS(qv_op_rms_norm(be, x, g, 1e-6f, true, y));
    PASS(qv_op_add_rms_norm(be, x, y, g, 1e-6f, true, y, (qv_tensor){0}));
    PASS(qv_op_gated_rms_norm(be, qv_tensor_split(x, 1, D), qv_tensor_split(y, 1, D), g, 1e-6f,
                              false, qv_tensor_split(y, 1, D)));
    PASS(qv_op_swiglu(be, x, y, y));
    PASS(qv_op_sigmoid_gate(be, qv_tensor_split(x, 1, D), qv_tensor_split(y, 1, D)));
    PASS(qv_op_add(be, x, y, qv_tensor_cols(y, 0, 1)));
    PASS(qv_op_gather_rows(be, x, zeros, y));
}

static void run_sequence(qv_backend *be, const qv_batch *batch, float *m)
{
    qv_kv_layer kv = {
        .k = qv_tensor_4d(m, QV_F32, 5, PAGE, KV_HEADS, D / HEADS),
        .v = qv_tensor_4d(m + 5 * PAGE * KV_HEADS * D, QV_F32, 5, PAGE, KV_HEADS, D / HEADS),
        .page_tokens = PAGE};
    float *next = m + 10 * PAGE * KV_HEADS * D;
    qv_tensor q = qv_tensor_3d(next, QV_F32, T, HEADS, D / HEADS);
    qv_tensor k = qv_tensor_3d(next + T * D, QV_F32, T, KV_HEADS, D / HEADS);
    PASS(qv_op_rope_kv_write(be, batch, 8, 1e4, q, k, k, &kv));
    PASS(qv_op_attention(be, batch, &kv, 0.1f, q, q));
    qv_tensor x = qv_tensor_2d(next, QV_F32, T, D), none = {0};
    PASS(qv_op_conv1d(be, batch, x, qv_tensor_2d(next + T * D, QV_F32, D, 4), none,
                      qv_tensor_3d(next + 2 * T * D, QV_F32, 1, D, 3), x));
    qv_tensor heads = qv_tensor_split(x, HEADS, D_V);
    qv_tensor gates = qv_tensor_2d(next + 2 * T * D, QV_F32, T, HEADS);
    qv_tensor head = qv_tensor_1d(next + 3 * T * D, QV_F32, HEADS);
    qv_gdn_args gdn = {.q = heads,
                       .k = heads,
                       .v = heads,
                       .a = gates,
                       .b = gates,
                       .a_log = head,
                       .dt_bias = head,
                       .o = heads,
                       .state = qv_tensor_4d(next + 4 * T * D, QV_F32, 1, HEADS, D_V, D_V)};
    PASS(qv_op_gdn(be, batch, &gdn));
    qv_ssd_args ssd = {.x = heads,
                       .b = heads,
                       .c = heads,
                       .dt = gates,
                       .a_log = head,
                       .dt_bias = head,
                       .d_skip = head,
                       .dt_max = INFINITY,
                       .state = gdn.state,
                       .y = heads};
    PASS(qv_op_ssd(be, batch, &ssd));
}

static void run_lora(qv_backend *be, float *m)
{
    static const int64_t slices[] = {0, D};
    static const uint8_t active[] = {1};
    static const int32_t seg[] = {0, T};
    qv_lora_slice slice = {.rank = 5, .scale = 1};
    qv_lora_site site = {.n_in = D,
                         .n_out = D,
                         .n_slices = 1,
                         .n_slots = 1,
                         .max_rank = RANK,
                         .slice_start = slices,
                         .slices = &slice,
                         .slot_active = active,
                         .a = qv_tensor_4d(m, QV_F32, 1, 1, RANK, D),
                         .b = qv_tensor_3d(m + RANK * D, QV_F32, 1, RANK, D)};
    float *next = m + 2 * RANK * D;
    PASS(qv_op_lora(be, &site, 1, seg, zeros, qv_tensor_2d(next, QV_F32, T, D),
                    qv_tensor_3d(next + T * D, QV_F32, T, 1, RANK),
                    qv_tensor_2d(next + T * D + T * RANK, QV_F32, T, D)));
}

/* Experts of D x D, two of four for each token, with an adapter whose B is shared. */
static void run_moe(qv_backend *be, const qv_weight *experts, qv_moe_list *list, float *m)
{
    static const int64_t slices[] = {0, D};
    static const uint8_t active[] = {1};
    static const int32_t seg[] = {0, T};
    qv_lora_slice slice[4] = {{.rank = 5}, {.rank = 5}, {.rank = 5}, {.rank = 5}};
    qv_moe_lora_slot slot = {
        .a = m, .b = m, .slices = slice, .max_rank = RANK, .a_shared = 1, .b_shared = 1};
    qv_moe_lora_site site = {.n_in = D,
                             .n_out = D,
                             .n_experts = 4,
                             .n_slices = 1,
                             .n_slots = 1,
                             .max_rank = RANK,
                             .slice_start = slices,
                             .slots = &slot,
                             .slot_active = active};
    qv_router router = {.top_k = 2, .scale = 1, .n_groups = 1, .topk_groups = 1};
    qv_tensor x = qv_tensor_2d(m, QV_F32, T, D), logits = qv_tensor_cols(x, 0, 4);
    int32_t id[T * 2];
    qv_tensor ids = qv_tensor_2d(id, QV_I32, T, 2), weights = qv_tensor_2d(m + T * D, QV_F32, T, 2);
    qv_tensor scratch = qv_tensor_3d(m + T * D + T * 2, QV_F32, 2 * T, 1, RANK);
    qv_tensor pairs = qv_tensor_2d(m + 2 * T * D, QV_F32, 2 * T, D);
    PASS(qv_op_router(be, &router, logits, ids, weights));
    PASS(qv_op_moe_route(be, ids, 1, seg, zeros, list));
    PASS(qv_op_moe_linear(be, experts, list, x, QV_MOE_TOKENS, pairs));
    PASS(qv_op_moe_lora(be, &site, list, x, QV_MOE_TOKENS, scratch, pairs));
    PASS(qv_op_relu2(be, pairs, pairs));
    PASS(qv_op_moe_lora(be, &site, list, pairs, QV_MOE_PAIRS, scratch, pairs));
    PASS(qv_op_moe_combine(be, list, weights, pairs, &site, scratch, x));
    PASS(qv_op_moe_combine_f32(be, list, weights, pairs, &site, scratch,
                               qv_tensor_rows(pairs, 0, T), (qv_tensor){0}, x));
}

static void run_sample(qv_backend *be, float *m)
{
    qv_sample_row rows[4];
    qv_sample_result results[4];
    for (int i = 0; i < 4; i++)
        rows[i] = (qv_sample_row){.target = -1,
                                  .temperature = (float)i,
                                  .top_k = i == 2 ? 20 : 0,
                                  .top_p = i == 3 ? 0.5f : 1,
                                  .repetition_penalty = 1.5f,
                                  .n_top = 5,
                                  .tokens = ones,
                                  .n_tokens = 1};
    PASS(qv_op_sample(be, qv_tensor_2d(m, QV_F32, 4, VOCAB), VOCAB, rows, results));
}

static void check_step(const char *gemm, const char *arithmetic)
{
    qv_backend *be;
    qv_backend_options options = {
        .name = "cpu", .n_threads = 3, .gemm = gemm, .arithmetic = arithmetic};
    PASS(qv_backend_open(&options, &be));
    PASS(qv_backend_reserve(
        be, &(qv_backend_limits){.max_tokens = T, .max_logits = 4, .n_vocab = VOCAB}));
    qv_weight *w;
    PASS(qv_weight_new(be, D, D, QV_BF16, &w));
    qv_weight *experts;
    PASS(qv_weight_new_experts(be, 4, D, D, QV_BF16, &experts));
    void *list_memory = must(malloc(qv_moe_list_bytes(4, 2, T)));
    qv_moe_list list;
    PASS(qv_moe_list_init(&list, 4, 2, T, list_memory));
    int32_t pos[T], seq_start[] = {0, T};
    for (int32_t t = 0; t < T; t++)
        pos[t] = t;
    qv_batch batch = {.n_tokens = T,
                      .n_seqs = 1,
                      .pos = pos,
                      .seq_start = seq_start,
                      .page_table = pages,
                      .page_stride = 5,
                      .state_slot = zeros};
    float *m = filled_floats(200000, 0.5f);
    qv_tensor x = qv_tensor_2d(m, QV_F32, T, D), y = qv_tensor_2d(m + T * D, QV_F32, T, D);
    if (strcmp(gemm, "openblas") == 0) /* it makes buffers of its own at a thread's first use */
        run_dense(be, w, x, y);

    long before = atomic_load(&n_allocations);
    run_dense(be, w, x, y);
    run_sequence(be, &batch, m);
    run_lora(be, m);
    run_moe(be, experts, &list, m);
    run_sample(be, m);
    long after = atomic_load(&n_allocations);
    cr_assert_eq(after - before, 0, "%s, %s: %ld allocations", gemm, arithmetic, after - before);
    free(m);
    free(list_memory);
    qv_weight_free(be, experts);
    qv_weight_free(be, w);
    qv_backend_close(be);
}

Test(backend, a_step_allocates_nothing)
{
    if (!COUNTS_ALLOCATIONS)
        cr_skip_test("a sanitizer owns malloc");
    long before = atomic_load(&n_allocations);
    free(filled_floats(3, 0));
    cr_assert_eq(atomic_load(&n_allocations) - before, 1, "malloc is not counted");
    check_step("exact", "f32");
    check_step("openblas", "f32");
    check_step("exact", "bf16");
}
