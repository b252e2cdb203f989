/* The memory plan over ranks: what each takes, and what all take together. */
#include "tests/support.h"
#include "worker/memory_plan.h"

#include <criterion/criterion.h>
#include <string.h>

#define DEMO "tiny-qwen3.5"

static qv_engine_options some_options(void)
{
    return (qv_engine_options){.model_dir = qv_demo_path(DEMO),
                               .max_running = 4,
                               .step_tokens = 64,
                               .page_tokens = 16,
                               .adapter_slots = 3,
                               .max_lora_rank = 16,
                               .max_adapter_bytes = 1 << 20};
}

static qv_engine_sizes plan_for(int32_t n_ranks, const qv_engine_options *options,
                                uint64_t available, qv_status *status)
{
    qv_model_config config;
    qv_backend *be, *all[4];
    qv_engine_sizes sizes;
    cr_assert_eq(qv_backend_open(&(qv_backend_options){.name = "cpu", .n_threads = 1}, &be), QV_OK);
    for (int i = 0; i < 4; i++)
        all[i] = be;
    qv_model_ranks ranks = {.backends = all, .n_ranks = n_ranks, .expert_groups = 1};
    cr_assert_eq(qv_model_config_load(options->model_dir, &config), QV_OK, "%s", qv_error());
    *status = qv_engine_sizes_plan(options, &config, &ranks, available, &sizes);
    qv_backend_close(be);
    return sizes;
}

Test(memory_plan, ranks_add_up_to_all_and_each_has_its_part)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = some_options();
    for (int32_t n = 1; n <= 4; n *= 2) {
        qv_status status;
        qv_engine_sizes sizes = plan_for(n, &options, UINT64_C(1) << 40, &status);
        cr_assert_eq(status, QV_OK, "%s", qv_error());
        cr_expect_eq(sizes.n_ranks, n);
        qv_memory_plan sum = {.total = 0};
        for (int32_t i = 0; i < n; i++) {
            const qv_memory_plan *one = &sizes.of_rank[i];
            sum.weights += one->weights, sum.kv += one->kv, sum.state += one->state;
            sum.adapters += one->adapters, sum.activations += one->activations;
            sum.total += one->total;
            cr_expect_eq(one->total,
                         one->weights + one->kv + one->state + one->adapters + one->activations);
            cr_expect_eq(one->state, sizes.of_rank[0].state, "rank %d of %d", i, n);
        }
        cr_expect_eq(sum.weights, sizes.plan.weights);
        cr_expect_eq(sum.kv, sizes.plan.kv);
        cr_expect_eq(sum.state, sizes.plan.state);
        cr_expect_eq(sum.adapters, sizes.plan.adapters);
        cr_expect_eq(sum.activations, sizes.plan.activations);
        cr_expect_eq(sum.total, sizes.plan.total);
    }
}

/* What slots get on demand was once counted in full on every rank. */
Test(memory_plan, ranks_share_the_memory_that_adapters_get_on_demand)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = some_options();
    qv_status status;
    uint64_t one = plan_for(1, &options, UINT64_C(1) << 40, &status).plan.adapter_memory;
    uint64_t two = plan_for(2, &options, UINT64_C(1) << 40, &status).plan.adapter_memory;
    cr_expect_leq(two, 2 * one, "the embedding's pairs are whole on both: %zu, %zu for one rank",
                  (size_t)two, (size_t)one);
    options.adapter_memory = 1 << 20;
    two = plan_for(2, &options, UINT64_C(1) << 40, &status).plan.adapter_memory;
    cr_expect_eq(two, 1 << 20, "%zu", (size_t)two);
}

Test(memory_plan, says_what_does_not_fit)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = some_options();
    qv_status status;
    (void)plan_for(2, &options, 1 << 20, &status);
    cr_expect_eq(status, QV_ERR_LIMIT);
    cr_expect_not_null(strstr(qv_error(), "does not fit the 1 MiB that are available"), "%s",
                       qv_error());
}
