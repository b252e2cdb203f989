/* simulate: policies against each other in virtual time; see bench/simulator.h. */
#include "bench/simulator.h"
#include "common/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *policy;
    int workload;
    int64_t seed, n_requests, n_workers, capacity, slots, n_adapters, n_tenants;
    double load, zipf, flood;
    bool no_faults;
} settings;

static const qv_option table[] = {
    QV_OPTION(settings, policy, STRING, "policy", "NAME", "all",
              "Routing policy, or all of them one after the other."),
    QV_OPTION(settings, workload, ENUM, "workload", "NAME", "steady",
              "steady, diurnal (two days of a sine), or flash (for a fifth of the time two of five "
              "requests are for the coldest adapter).",
              .choices = qv_sim_workload_names),
    QV_OPTION(settings, n_requests, INT, "requests", "N", "100000", "Requests.", .min = 1,
              .max = 1 << 28),
    QV_OPTION(settings, load, DOUBLE, "load", "X", "0.75", "Of what the workers can do, 1 = all.",
              .min = 0, .max = 10),
    QV_OPTION(settings, n_workers, INT, "workers", "N", "16", "Workers.", .min = 1, .max = 256),
    QV_OPTION(settings, capacity, INT, "capacity", "N", "32", "Requests that each takes at once.",
              .min = 1, .max = 256),
    QV_OPTION(settings, slots, INT, "slots", "N", "12", "Adapters that each holds.", .min = 1,
              .max = 4096),
    QV_OPTION(settings, n_adapters, INT, "adapters", "N", "150", "Adapters.", .min = 1,
              .max = 4096),
    QV_OPTION(settings, zipf, DOUBLE, "zipf", "X", "1", "Exponent of their popularity.", .min = 0,
              .max = 4),
    QV_OPTION(settings, n_tenants, INT, "tenants", "N", "4", "Tenants.", .min = 1,
              .max = QV_SIM_MAX_TENANTS),
    QV_OPTION(settings, flood, DOUBLE, "flood", "X", "2",
              "What the first tenant sends, against all others together.", .min = 0, .max = 1000),
    QV_OPTION(settings, seed, INT, "seed", "N", "1", "Everything follows from it.", .min = 0),
    QV_OPTION(settings, no_faults, FLAG, "no-faults", NULL, NULL,
              "Nobody dies, freezes or joins, and all loads succeed."),
};

static const qv_program program = {
    .name = "simulate",
    .summary = "Run the broker's core among simulated clients and workers in virtual time.",
};

static void print_head(void)
{
    printf("%-13s %5s %6s %6s %6s %7s  %15s  %15s  %15s\n", "", "", "prefix", "max /", "loads",
           "unloads", "head", "middle", "tail");
    printf("%-13s %5s %6s %6s %6s %7s  %15s  %15s  %15s\n", "policy", "hit %", "hit %", "mean",
           "/min", "/min", "p50 p99 ms", "p50 p99 ms", "p50 p99 ms");
}

static void print_result(const char *name, const qv_sim_result *r)
{
    double minutes = r->virtual_s / 60;
    printf("%-13s %5.1f %6.1f %6.2f %6.0f %7.0f ", name, r->hit_rate * 100,
           r->prefix_hit_rate * 100, r->imbalance, (double)r->loads / minutes,
           (double)r->unloads / minutes);
    for (int i = 0; i < QV_SIM_CLASSES; i++)
        printf(" %7.0f %7.0f ", r->first_token[i].p50, r->first_token[i].p99);
    putchar('\n');
}

static void print_details(const qv_sim_result *r)
{
    printf("    lost %llu, duplicated %llu, wrong %llu, unanswered %llu; %llu done, %llu failed, "
           "%llu refused, %llu moved, %llu workers lost\n",
           (unsigned long long)r->lost, (unsigned long long)r->duplicated,
           (unsigned long long)r->wrong, (unsigned long long)r->unanswered,
           (unsigned long long)r->done, (unsigned long long)r->failed,
           (unsigned long long)r->refused, (unsigned long long)r->moved,
           (unsigned long long)r->workers_lost);
    printf(
        "    loads: %llu wanted, %llu on request, %llu by demand, %llu for balance, %llu failed\n",
        (unsigned long long)r->wanted_loads, (unsigned long long)r->demand_loads,
        (unsigned long long)r->growth_loads, (unsigned long long)r->balance_loads,
        (unsigned long long)r->failed_loads);
    printf("    service gap %.0f of at most %.0f tokens, Jain %.3f; first token p99 by tenant:",
           r->service_gap, r->gap_bound, r->jain);
    for (int i = 0; i < QV_SIM_MAX_TENANTS && r->by_tenant[i].n > 0; i++)
        printf(" %.0f", r->by_tenant[i].p99);
    printf(" ms\n    %llu events in %.1f s, %.0f s of virtual time\n",
           (unsigned long long)r->events, r->wall_s, r->virtual_s);
}

static qv_status run_all(const settings *set)
{
    qv_sim_options o = qv_sim_default_options();
    bool all = strcmp(set->policy, "all") == 0;
    o.seed = (uint64_t)set->seed;
    o.workload = (qv_sim_workload)set->workload;
    o.n_requests = (uint64_t)set->n_requests;
    o.load = set->load;
    o.n_workers = (int32_t)set->n_workers;
    o.capacity = (int32_t)set->capacity;
    o.slots = (int32_t)set->slots;
    o.n_adapters = (int32_t)set->n_adapters;
    o.zipf = set->zipf;
    o.n_tenants = (int32_t)set->n_tenants;
    o.flood = set->flood;
    o.faults = !set->no_faults;
    if (!all)
        QV_TRY(qv_route_find(set->policy, &o.policy));
    printf(
        "%lld requests, %s, load %.2f, %lld workers of %lld with %lld slots, %lld adapters, zipf "
        "%.2f, seed %lld%s\n\n",
        (long long)set->n_requests, qv_sim_workload_names[set->workload], set->load,
        (long long)set->n_workers, (long long)set->capacity, (long long)set->slots,
        (long long)set->n_adapters, set->zipf, (long long)set->seed,
        set->no_faults ? "" : ", with faults");
    print_head();
    for (size_t i = 0; qv_route_policies[i] != NULL; i++) {
        if (!all && qv_route_policies[i] != o.policy)
            continue;
        o.policy = qv_route_policies[i];
        qv_sim_result result;
        QV_TRY(qv_simulate(&o, &result));
        print_result(o.policy->name, &result);
        print_details(&result);
        if (result.lost + result.duplicated + result.wrong + result.unanswered > 0)
            return qv_fail(QV_ERR_INTERNAL, "tokens or requests were lost");
    }
    return QV_OK;
}

int main(int argc, char **argv)
{
    settings set;
    qv_options *options = NULL;
    qv_status status = qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv,
                                        &set, &options);
    if (status == QV_OK && !qv_options_printed(options))
        status = run_all(&set);
    if (status != QV_OK)
        fprintf(stderr, "simulate: %s\n", qv_error());
    qv_options_free(options);
    return status == QV_OK ? 0 : 1;
}
