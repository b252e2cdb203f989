/* Names, help texts and labels are here and nowhere else. */
#include "broker/broker_metrics.h"

#include <stdlib.h>
#include <string.h>

#define MAX_ADAPTERS 128 /* with a queue depth of their own; the rest is "other" */
#define MAX_TENANTS  128 /* the same */

/* What the broker adds to a request: well below a millisecond, or something is wrong. */
static const double handle_bounds[] = {10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6,
                                       1e-3,  2e-3,  5e-3,  10e-3,  100e-3};

#define N_HANDLE_BOUNDS (sizeof handle_bounds / sizeof handle_bounds[0])

static qv_status init_gauges(qv_broker_metrics *m, qv_metrics *r)
{
    QV_TRY(qv_metrics_gauge(r, "quiver_broker_queued", "Requests that wait for a worker.",
                            QV_NO_LABELS, &m->queued));
    QV_TRY(qv_metrics_gauge(r, "quiver_broker_in_flight", "Requests that workers run.",
                            QV_NO_LABELS, &m->in_flight));
    QV_TRY(qv_metrics_gauge(r, "quiver_broker_request_bytes", "Memory held by requests.",
                            QV_NO_LABELS, &m->request_bytes));
    QV_TRY(qv_metrics_gauge(r, "quiver_broker_spill_bytes",
                            "Memory held by messages that wait for slow clients.", QV_NO_LABELS,
                            &m->spill_bytes));
    QV_TRY(qv_metrics_gauge(r, "quiver_broker_service_gap_tokens",
                            "How far apart in served tokens, by weight, the tenants that wait are.",
                            QV_NO_LABELS, &m->service_gap));
    QV_TRY(qv_metrics_gauge(r, "quiver_broker_redis_up", "Whether the registry can be reached.",
                            QV_NO_LABELS, &m->redis_up));
    for (qv_member_state state = 0; state < QV_MEMBER_GONE; state++)
        QV_TRY(qv_metrics_gauge(r, "quiver_broker_workers", "Workers by state.",
                                QV_LABELS({"state", qv_member_state_name(state)}),
                                &m->workers[state]));
    return QV_OK;
}

static qv_status init_counters(qv_broker_metrics *m, qv_metrics *r)
{
    const char *requests = "quiver_broker_requests_total";
    const char *help = "Requests that were accepted and have ended, by outcome.";
    QV_TRY(qv_metrics_counter(r, "quiver_broker_accepted_total", "Requests that were accepted.",
                              QV_NO_LABELS, &m->accepted));
    QV_TRY(qv_metrics_counter(r, requests, help, QV_LABELS({"outcome", "done"}), &m->done));
    QV_TRY(qv_metrics_counter(r, requests, help, QV_LABELS({"outcome", "deadline"}), &m->deadline));
    QV_TRY(
        qv_metrics_counter(r, requests, help, QV_LABELS({"outcome", "cancelled"}), &m->cancelled));
    QV_TRY(qv_metrics_counter(r, requests, help, QV_LABELS({"outcome", "failed"}), &m->failed));
    for (qv_code code = 0; code < QV_CODE_COUNT; code++)
        QV_TRY(qv_metrics_counter(r, "quiver_broker_errors_total", "Errors sent to clients.",
                                  QV_LABELS({"code", qv_code_name(code)}), &m->errors[code]));
    const struct {
        const char *name, *help;
        qv_counter **counter;
    } rows[] = {
        {"quiver_broker_tokens_total", "Tokens that workers delivered.", &m->tokens},
        {"quiver_broker_dispatched_total", "Attempts: requests sent to workers.", &m->dispatched},
        {"quiver_broker_moved_total", "Requests that went on after their worker was lost.",
         &m->moved},
        {"quiver_broker_workers_lost_total", "Workers that were lost.", &m->workers_lost},
        {"quiver_broker_clients_lost_total", "Clients lost with requests in flight.",
         &m->clients_lost},
        {"quiver_broker_resumed_total", "Requests that a client came back for.", &m->resumed},
        {"quiver_broker_clients_choked_total",
         "Times that requests gave their place up since their client did not read.", &m->choked},
        {"quiver_broker_quarantined_total", "Requests under which too many workers died.",
         &m->quarantined},
        {"quiver_broker_adopted_total", "Durable requests taken over, also from before a restart.",
         &m->adopted},
        {"quiver_broker_unauthorized_total", "Messages beyond the rights of their sender.",
         &m->unauthorized},
        {"quiver_broker_ghosts_total", "Messages of sessions that are over.", &m->ghosts},
        {"quiver_broker_late_deltas_total", "Deltas of attempts that are over.", &m->late},
        {"quiver_broker_missing_deltas_total", "Gaps in what workers delivered.", &m->gaps},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        QV_TRY(qv_metrics_counter(r, rows[i].name, rows[i].help, QV_NO_LABELS, rows[i].counter));
    const char *resident = "quiver_broker_adapter_requests_total";
    const char *resident_help = "Requests for an adapter, by whether a worker had it ready.";
    QV_TRY(qv_metrics_counter(r, resident, resident_help, QV_LABELS({"ready", "yes"}),
                              &m->adapter_hits));
    QV_TRY(qv_metrics_counter(r, resident, resident_help, QV_LABELS({"ready", "no"}),
                              &m->adapter_misses));
    QV_TRY(qv_metrics_counter(r, "quiver_broker_loads_total",
                              "Loads of adapters that workers were asked for.", QV_NO_LABELS,
                              &m->loads));
    QV_TRY(qv_metrics_counter(r, "quiver_broker_unloads_total",
                              "Unloads of adapters that workers were asked for.", QV_NO_LABELS,
                              &m->unloads));
    const struct {
        const char *reason;
        qv_counter **counter;
    } refused[] = {{"unknown_key", &m->refused_unknown},
                   {"no_right", &m->refused_rights},
                   {"no_key", &m->refused_other}};
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++)
        QV_TRY(qv_metrics_counter(r, "quiver_broker_refused_connections_total",
                                  "Connections that access control refused.",
                                  QV_LABELS({"reason", refused[i].reason}), refused[i].counter));
    const char *malformed = "quiver_broker_malformed_total";
    const char *malformed_help = "Messages that were no messages of the protocol.";
    QV_TRY(qv_metrics_counter(r, malformed, malformed_help, QV_LABELS({"from", "client"}),
                              &m->malformed_client));
    return qv_metrics_counter(r, malformed, malformed_help, QV_LABELS({"from", "worker"}),
                              &m->malformed_worker);
}

static qv_status init_histograms(qv_broker_metrics *m, qv_metrics *r)
{
    const struct {
        const char *name, *help;
    } rows[QV_CORE_DURATION_COUNT] = {
        [QV_CORE_QUEUE] = {"quiver_broker_queue_seconds", "Receipt of a request to its dispatch."},
        [QV_CORE_FIRST_TOKEN] = {"quiver_broker_first_token_seconds",
                                 "Receipt of a request to its first token."},
        [QV_CORE_TOTAL] = {"quiver_broker_request_seconds", "Receipt of a request to its end."},
    };
    for (int i = 0; i < QV_CORE_DURATION_COUNT; i++)
        QV_TRY(qv_metrics_histogram(r, rows[i].name, rows[i].help, qv_metrics_seconds,
                                    qv_metrics_n_seconds, QV_NO_LABELS, &m->durations[i]));
    const char *name = "quiver_broker_handle_seconds";
    const char *help = "A message taken off its socket until all that follows from it was sent.";
    QV_TRY(qv_metrics_histogram(r, name, help, handle_bounds, N_HANDLE_BOUNDS,
                                QV_LABELS({"from", "client"}), &m->handle_client));
    return qv_metrics_histogram(r, name, help, handle_bounds, N_HANDLE_BOUNDS,
                                QV_LABELS({"from", "worker"}), &m->handle_worker);
}

qv_status qv_broker_metrics_init(qv_broker_metrics *metrics, qv_metrics *registry)
{
    *metrics = (qv_broker_metrics){.registry = registry};
    if (registry == NULL)
        return QV_OK;
    metrics->depth = qv_map_new(0);
    metrics->tenants = qv_map_new(0);
    if (metrics->depth == NULL || metrics->tenants == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for metrics");
    QV_TRY(init_gauges(metrics, registry));
    QV_TRY(init_counters(metrics, registry));
    return init_histograms(metrics, registry);
}

void qv_broker_metrics_deinit(qv_broker_metrics *metrics)
{
    qv_map_free(metrics->depth, NULL);
    qv_map_free(metrics->tenants, free);
    *metrics = (qv_broker_metrics){0};
}

/* The gauge of an adapter's queue; adapters beyond the bound share one. */
static qv_gauge *find_depth(qv_broker_metrics *m, const qv_group *group)
{
    const char *name = group->name_size > 0 ? group->name : "(base)";
    qv_gauge *gauge = qv_map_get_str(m->depth, name);
    if (gauge != NULL)
        return gauge;
    if (qv_map_count(m->depth) >= MAX_ADAPTERS)
        name = "(other)";
    if (qv_metrics_gauge(m->registry, "quiver_broker_queue_depth",
                         "Requests that wait for a worker, by adapter.",
                         QV_LABELS({"adapter", name}), &gauge) != QV_OK ||
        qv_map_set_str(m->depth, name, gauge) != QV_OK)
        return NULL;
    return gauge;
}

static void update_depths(qv_broker_metrics *m, const qv_core *core)
{
    QV_MAP_EACH(m->depth, entry)
    qv_gauge_set(entry->value, 0);
    QV_LIST_EACH(&qv_core_pool(core)->groups, qv_group, link, group)
    qv_gauge_add(find_depth(m, group), group->n_queued);
}

typedef struct {
    qv_gauge *queued, *running, *tokens, *loads;
} tenant_metrics;

/* The metrics of a tenant; tenants beyond the bound share one set. */
static tenant_metrics *find_tenant(qv_broker_metrics *m, const char *name)
{
    name = name[0] != '\0' ? name : "(none)";
    tenant_metrics *found = qv_map_get_str(m->tenants, name);
    if (found != NULL)
        return found;
    if (qv_map_count(m->tenants) >= MAX_TENANTS) {
        name = "(other)";
        if ((found = qv_map_get_str(m->tenants, name)) != NULL)
            return found;
    }
    found = calloc(1, sizeof *found);
    if (found == NULL ||
        qv_metrics_gauge(m->registry, "quiver_broker_tenant_queued",
                         "Requests that wait for a worker, by tenant.", QV_LABELS({"tenant", name}),
                         &found->queued) != QV_OK ||
        qv_metrics_gauge(m->registry, "quiver_broker_tenant_running",
                         "Requests that workers run, by tenant.", QV_LABELS({"tenant", name}),
                         &found->running) != QV_OK ||
        qv_metrics_gauge(m->registry, "quiver_broker_tenant_tokens",
                         "Tokens that a tenant was served, those of answers twice, since it came.",
                         QV_LABELS({"tenant", name}), &found->tokens) != QV_OK ||
        qv_metrics_gauge(m->registry, "quiver_broker_tenant_load_tokens",
                         "Tokens that loads of adapters for a tenant's requests are charged as.",
                         QV_LABELS({"tenant", name}), &found->loads) != QV_OK ||
        qv_map_set_str(m->tenants, name, found) != QV_OK) {
        free(found);
        return NULL;
    }
    return found;
}

static void update_tenants(qv_broker_metrics *m, const qv_fair *fair)
{
    QV_MAP_EACH(m->tenants, entry)
    {
        tenant_metrics *tenant = entry->value;
        qv_gauge_set(tenant->queued, 0);
        qv_gauge_set(tenant->running, 0);
        qv_gauge_set(tenant->tokens, 0);
        qv_gauge_set(tenant->loads, 0);
    }
    QV_LIST_EACH(&fair->all, qv_tenant, link, tenant)
    {
        tenant_metrics *row = find_tenant(m, tenant->name);
        if (row == NULL)
            continue;
        qv_gauge_add(row->queued, (double)tenant->n_queued);
        qv_gauge_add(row->running, (double)tenant->n_running);
        qv_gauge_add(row->tokens, tenant->served);
        qv_gauge_add(row->loads, tenant->loads);
    }
    qv_gauge_set(m->service_gap, qv_fair_gap(fair));
}

void qv_broker_metrics_update(qv_broker_metrics *m, const qv_core *core, bool redis_up)
{
    if (m->registry == NULL)
        return;
    const qv_core_stats *now = qv_core_get_stats(core), *last = &m->last;
    const qv_requests *requests = qv_core_requests(core);
    qv_gauge_set(m->queued, (double)requests->n_queued);
    qv_gauge_set(m->in_flight, (double)requests->n_running);
    qv_gauge_set(m->request_bytes, (double)requests->bytes);
    qv_gauge_set(m->spill_bytes, (double)qv_core_spill_bytes(core));
    qv_gauge_set(m->redis_up, redis_up);
    for (qv_member_state state = 0; state < QV_MEMBER_GONE; state++)
        qv_gauge_set(m->workers[state], qv_core_pool(core)->n_members[state]);
    update_depths(m, core);
    update_tenants(m, &requests->fair);

    uint64_t deadline = now->finished_deadline - last->finished_deadline;
    qv_counter_add(m->accepted, now->accepted - last->accepted);
    qv_counter_add(m->deadline, deadline);
    qv_counter_add(m->done, now->ended[QV_JOB_DONE] - last->ended[QV_JOB_DONE] - deadline);
    qv_counter_add(m->failed, now->ended[QV_JOB_FAILED] - last->ended[QV_JOB_FAILED]);
    qv_counter_add(m->cancelled, now->ended[QV_JOB_CANCELLED] - last->ended[QV_JOB_CANCELLED]);
    for (qv_code code = 0; code < QV_CODE_COUNT; code++)
        qv_counter_add(m->errors[code], now->errors[code] - last->errors[code]);
    qv_counter_add(m->tokens, now->tokens - last->tokens);
    qv_counter_add(m->dispatched, now->dispatched - last->dispatched);
    qv_counter_add(m->moved, now->moved - last->moved);
    qv_counter_add(m->adapter_hits, now->adapter_hits - last->adapter_hits);
    qv_counter_add(m->adapter_misses, now->adapter_misses - last->adapter_misses);
    qv_counter_add(m->loads, now->loads - last->loads);
    qv_counter_add(m->unloads, now->unloads - last->unloads);
    qv_counter_add(m->workers_lost, now->workers_lost - last->workers_lost);
    qv_counter_add(m->clients_lost, now->clients_lost - last->clients_lost);
    qv_counter_add(m->resumed, now->resumed - last->resumed);
    qv_counter_add(m->choked, now->choked - last->choked);
    qv_counter_add(m->quarantined, now->quarantined - last->quarantined);
    qv_counter_add(m->adopted, now->adopted - last->adopted);
    qv_counter_add(m->unauthorized, now->unauthorized - last->unauthorized);
    qv_counter_add(m->ghosts, now->ghosts - last->ghosts);
    qv_counter_add(m->late, now->late - last->late);
    qv_counter_add(m->gaps, now->gaps - last->gaps);
    qv_counter_add(m->malformed_client, now->malformed_client - last->malformed_client);
    qv_counter_add(m->malformed_worker, now->malformed_worker - last->malformed_worker);
    m->last = *now;
}

void qv_broker_metrics_access(qv_broker_metrics *m, const qv_access_stats *now)
{
    if (m->registry == NULL)
        return;
    const qv_access_stats *last = &m->last_access;
    qv_counter_add(m->refused_unknown, now->refused_unknown - last->refused_unknown);
    qv_counter_add(m->refused_rights, now->refused_rights - last->refused_rights);
    qv_counter_add(m->refused_other, now->refused_other - last->refused_other);
    m->last_access = *now;
}
