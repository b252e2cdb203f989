/* A step allocates nothing: this program's malloc and its relatives count while steps run. */
#include "tests/support.h"
#include "worker/engine.h"

#include "common/log.h"

#include <criterion/criterion.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Sanitizers bring a malloc of their own. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CAN_COUNT 0
#else
#define CAN_COUNT 1
#endif

static atomic_bool counting;
static atomic_int n_allocations;

#if CAN_COUNT
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *ptr, size_t size);
extern void *__libc_memalign(size_t align, size_t size);

static void count(void)
{
    if (atomic_load_explicit(&counting, memory_order_relaxed))
        atomic_fetch_add_explicit(&n_allocations, 1, memory_order_relaxed);
}

void *malloc(size_t size)
{
    count();
    return __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    count();
    return __libc_calloc(n, size);
}

void *realloc(void *ptr, size_t size)
{
    count();
    return __libc_realloc(ptr, size);
}

void *aligned_alloc(size_t align, size_t size)
{
    count();
    return __libc_memalign(align, size);
}

int posix_memalign(void **out, size_t align, size_t size)
{
    count();
    *out = __libc_memalign(align, size);
    return *out != NULL ? 0 : 12;
}
#endif

static void submit(qv_engine *engine, uint64_t number)
{
    static const char *const adapters[] = {"", "json", "french"};
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    qv_msg_submit *m = &message.submit;
    qv_set(m, submit, id, qv_str_from("t"));
    qv_set(m, submit, prompt, qv_str_from("Ines carried two black shoes at the station."));
    qv_set(m, submit, adapter, qv_str_from(adapters[number % 3]));
    qv_set(m, submit, max_tokens, 12 + (int64_t)number % 5);
    qv_set(m, submit, temperature, 0.8);
    qv_set(m, submit, top_p, 0.9);
    qv_set(m, submit, frequency_penalty, 0.5);
    qv_set(m, submit, logprobs, 3);
    if (number % 4 == 0)
        qv_set(m, submit, prompt_logprobs, 2);
    qv_request *request;
    qv_code code;
    cr_assert_eq(qv_request_new(engine, m, number, number, NULL, 0, &request, &code), QV_OK, "%s",
                 qv_error());
    cr_assert_eq(qv_engine_submit(engine, request), QV_OK, "%s", qv_error());
}

/* Run until nothing is left; what the steps allocated. */
static int run(qv_engine *engine)
{
    atomic_store(&n_allocations, 0);
    while (qv_engine_has_work(engine)) {
        qv_step_result result;
        atomic_store(&counting, true);
        qv_status status = qv_engine_step(engine, &result);
        atomic_store(&counting, false);
        cr_assert_eq(status, QV_OK, "%s", qv_error());
    }
    return atomic_load(&n_allocations);
}

Test(engine, a_warm_step_allocates_nothing)
{
    if (!CAN_COUNT)
        cr_skip_test("a sanitizer owns malloc");
    const char *dir = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(dir);
    qv_log_set_level(QV_LOG_ERROR);
    qv_engine_options options = {.model_dir = dir,
                                 .backend = "cpu",
                                 .gemm = "exact",
                                 .threads = 2,
                                 .max_running = 8,
                                 .max_waiting = 100,
                                 .step_tokens = 64,
                                 .prefill_chunk = 5,
                                 .page_tokens = 4,
                                 .adapter_slots = 2,
                                 .max_lora_rank = 16,
                                 .max_adapter_bytes = 64 << 20,
                                 .adapter_cache_bytes = 64 << 20,
                                 .prefix_cache = true,
                                 .prefix_snapshots = 4,
                                 .prefix_every = 8};
    qv_engine *engine;
    cr_assert_eq(qv_engine_open(&options, NULL, &engine), QV_OK, "%s", qv_error());
    const char *const adapters[] = {"json", "french"};
    for (int i = 0; i < 2; i++) {
        const char *adapter = qv_demo_path(qv_path("tiny-qwen3.5", "adapters/%s", adapters[i]));
        cr_assert_eq(qv_engine_load_adapter(engine, adapters[i], adapter, false), QV_OK);
    }
    for (uint32_t n_ready = 0; n_ready < 2;) {
        qv_step_result result;
        cr_assert_eq(qv_engine_step(engine, &result), QV_OK, "%s", qv_error());
        n_ready += result.n_adapters;
    }
    uint64_t number = 0;
    for (int round = 0; round < 3; round++) {
        atomic_store(&counting, true);
        for (int i = 0; i < 24; i++)
            submit(engine, number++);
        atomic_store(&counting, false);
        cr_assert_geq(atomic_load(&n_allocations), 24, "the count works");
        int n = run(engine);
        if (round > 0) /* the first round warms arenas up */
            cr_expect_eq(n, 0, "round %d: %d allocations", round, n);
    }
    qv_engine_close(engine);
}
