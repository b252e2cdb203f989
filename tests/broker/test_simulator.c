/* The promises of the broker in a short simulation: nothing lost or repeated under faults, adapters
 * where the demand is, shares that hold. bench/simulate runs the same for longer. */
#include "bench/simulator.h"

#include <criterion/criterion.h>

static qv_sim_result simulate(const qv_sim_options *options)
{
    qv_sim_result r;
    cr_assert_eq(qv_simulate(options, &r), QV_OK, "%s", qv_error());
    cr_assert_eq(r.lost + r.duplicated + r.wrong, 0, "%llu lost, %llu repeated, %llu wrong",
                 (unsigned long long)r.lost, (unsigned long long)r.duplicated,
                 (unsigned long long)r.wrong);
    cr_assert_eq(r.unanswered, 0, "%llu of %llu accepted requests were never answered",
                 (unsigned long long)r.unanswered, (unsigned long long)r.accepted);
    cr_assert_eq(r.accepted, r.done + r.failed);
    cr_assert_leq(r.service_gap, r.gap_bound);
    return r;
}

Test(simulator, every_policy_loses_nothing_under_faults_and_every_workload)
{
    uint64_t moved = 0, lost = 0;
    for (size_t i = 0; qv_route_policies[i] != NULL; i++)
        for (qv_sim_workload workload = 0; workload < QV_SIM_WORKLOADS; workload++) {
            qv_sim_options o = qv_sim_default_options();
            o.policy = qv_route_policies[i];
            o.workload = workload;
            o.n_requests = 8000;
            o.n_workers = 6;
            o.seed = 10 * i + workload + 1;
            qv_sim_result r = simulate(&o);
            moved += r.moved;
            lost += r.workers_lost;
            cr_expect_eq(r.failed, 0, "%s, %s: %llu failed", o.policy->name,
                         qv_sim_workload_names[workload], (unsigned long long)r.failed);
        }
    cr_assert_gt(moved, 20, "the faults really happened");
    cr_assert_gt(lost, 5);
}

Test(simulator, gives_the_same_figures_for_the_same_seed)
{
    qv_sim_options o = qv_sim_default_options();
    o.n_requests = 5000;
    o.n_workers = 4;
    qv_sim_result a = simulate(&o), b = simulate(&o);
    cr_assert_eq(a.events, b.events);
    cr_assert_eq(a.loads, b.loads);
    cr_assert_float_eq(a.first_token[QV_SIM_TAIL].p99, b.first_token[QV_SIM_TAIL].p99, 0);
    o.seed++;
    cr_assert_neq(simulate(&o).events, a.events);
}

Test(simulator, a_flash_crowd_on_the_coldest_adapter_gets_replicas)
{
    qv_sim_options o = qv_sim_default_options();
    o.workload = QV_SIM_FLASH;
    o.n_requests = 30000;
    o.faults = false;
    qv_sim_result r = simulate(&o);
    cr_assert_gt(r.growth_loads + r.demand_loads, 3);
    cr_assert_lt(r.first_token[QV_SIM_TAIL].p50, 1000, "%g ms", r.first_token[QV_SIM_TAIL].p50);
}

Test(simulator, at_rest_adapters_stay_where_they_are)
{
    qv_sim_options o = qv_sim_default_options();
    o.n_requests = 30000;
    o.n_adapters = 60; /* they all fit */
    o.faults = false;
    qv_sim_result r = simulate(&o);
    cr_assert_gt(r.hit_rate, 0.98, "%g", r.hit_rate);
    cr_assert_lt(r.balance_loads, 60, "%llu moves", (unsigned long long)r.balance_loads);
    cr_assert_lt(r.unloads, 200, "%llu unloads", (unsigned long long)r.unloads);
}

Test(simulator, score_finds_cached_prompts_and_beats_least_loaded_on_loads)
{
    qv_sim_options o = qv_sim_default_options();
    o.n_requests = 30000;
    o.faults = false;
    qv_sim_result score = simulate(&o);
    o.policy = &qv_route_least_loaded;
    qv_sim_result least = simulate(&o);
    cr_assert_gt(score.prefix_hit_rate, least.prefix_hit_rate + 0.05, "%g and %g",
                 score.prefix_hit_rate, least.prefix_hit_rate);
    cr_assert_lt(score.loads, least.loads);
}

Test(simulator, tenants_that_all_want_more_than_their_share_get_equal_ones)
{
    qv_sim_options o = qv_sim_default_options();
    o.n_requests = 40000;
    o.n_adapters = 4; /* so that every worker can serve everybody */
    o.load = 3;
    o.flood = 1;
    o.faults = false;
    qv_sim_result r = simulate(&o);
    cr_assert_gt(r.jain, 0.99, "%g", r.jain);
}
