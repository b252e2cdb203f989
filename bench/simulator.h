/* Simulator: the broker's core, as it is, among clients and workers that are models, in virtual
 * time. Everything follows from the options and their seed. bench/simulate.c is the program around
 * it; a short run is a test.
 *
 * A worker model batches continuously: a step takes a fixed time, some more per sequence and per
 * prompt token, and gives each sequence a few tokens; it has adapter slots, loads that take time,
 * and remembers prompt prefixes. Tokens follow from the request's seed, so each client can check
 * that none was lost, repeated or invented, whatever happened on the way.
 */
#ifndef QV_BENCH_SIMULATOR_H
#define QV_BENCH_SIMULATOR_H

#include "broker/core.h"

#define QV_SIM_MAX_TENANTS 8

typedef enum { QV_SIM_STEADY, QV_SIM_DIURNAL, QV_SIM_FLASH, QV_SIM_WORKLOADS } qv_sim_workload;

extern const char *const qv_sim_workload_names[]; /* ends with NULL */

typedef struct {
    uint64_t seed;
    const qv_route_policy *policy;
    qv_sim_workload workload;
    uint64_t n_requests;
    double rate; /* requests a second on average; 0 = as `load` says */
    double load; /* of what the workers can do, 1 = all */
    int32_t n_workers, capacity, slots;
    int32_t n_adapters;
    double zipf;       /* exponent of the popularity of adapters */
    int32_t n_tenants; /* the first one sends as much as all others together, times `flood` */
    double flood;
    bool faults; /* workers die, freeze, come back and join; loads are slow or fail */
} qv_sim_options;

qv_sim_options qv_sim_default_options(void);

/* Adapters by popularity: the first tenth, the last half, and those between. */
typedef enum { QV_SIM_HEAD, QV_SIM_MIDDLE, QV_SIM_TAIL, QV_SIM_CLASSES } qv_sim_class;

typedef struct {
    double p50, p99;
    uint64_t n;
} qv_sim_times; /* milliseconds */

typedef struct {
    uint64_t events; /* that were simulated: messages, steps, arrivals, ticks */
    double virtual_s, wall_s;
    uint64_t submitted, accepted, refused, done, failed;
    uint64_t unanswered;              /* accepted and never ended: must be 0 */
    uint64_t lost, duplicated, wrong; /* tokens: must be 0 */
    uint64_t moved;                   /* requests that went on elsewhere */
    uint64_t workers_lost;

    uint64_t loads, wanted_loads, demand_loads, growth_loads, balance_loads, failed_loads;
    uint64_t unloads;
    double hit_rate;        /* of requests with an adapter: some worker held it on arrival */
    double prefix_hit_rate; /* of prompts that had been seen: computed from a cached prefix */
    double imbalance;       /* greatest load of a worker over the mean, averaged over time */

    qv_sim_times first_token[QV_SIM_CLASSES]; /* by popularity of the adapter */
    qv_sim_times by_tenant[QV_SIM_MAX_TENANTS];
    double service_gap, gap_bound; /* greatest, and what it may be by construction */
    double jain; /* of the service of tenants while all wait and all workers are full; 1 = equal */
} qv_sim_result;

/* Errors: NOMEM, INTERNAL (the core's books do not add up). */
qv_status qv_simulate(const qv_sim_options *options, qv_sim_result *out);

#endif
