/* What the broker shows to Prometheus: the names, and how they follow from the core's counts.
 * Updated by the broker's thread about once a second, durations as they happen.
 */
#ifndef QV_BROKER_BROKER_METRICS_H
#define QV_BROKER_BROKER_METRICS_H

#include "broker/access.h"
#include "broker/core.h"
#include "common/metrics.h"

typedef struct {
    qv_metrics *registry; /* NULL: nothing is counted */
    qv_gauge *queued, *in_flight, *redis_up, *spill_bytes, *request_bytes;
    qv_gauge *workers[QV_MEMBER_STATE_COUNT];
    qv_counter *accepted, *done, *failed, *cancelled, *deadline;
    qv_counter *errors[QV_CODE_COUNT];
    qv_counter *tokens, *dispatched, *moved, *ghosts, *resumed, *choked, *quarantined, *adopted,
        *unauthorized, *refused_unknown, *refused_rights, *refused_other, *late, *gaps,
        *workers_lost, *clients_lost;
    qv_counter *malformed_client, *malformed_worker;
    qv_histogram *durations[QV_CORE_DURATION_COUNT];
    qv_histogram *handle_client, *handle_worker;
    qv_map *depth; /* adapter → qv_gauge of its queue */
    qv_gauge *service_gap;
    qv_counter *adapter_hits, *adapter_misses, *loads, *unloads;
    qv_map *tenants; /* name → tenant_metrics, of broker_metrics.c */
    qv_core_stats last;
    qv_access_stats last_access;
} qv_broker_metrics;

/* Errors: as qv_metrics_counter. */
qv_status qv_broker_metrics_init(qv_broker_metrics *metrics, qv_metrics *registry);
void qv_broker_metrics_deinit(qv_broker_metrics *metrics);

/* Bring everything up to date. */
void qv_broker_metrics_update(qv_broker_metrics *metrics, const qv_core *core, bool redis_up);

/* Show what access control refused. */
void qv_broker_metrics_access(qv_broker_metrics *metrics, const qv_access_stats *stats);

#endif
