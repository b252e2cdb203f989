#include "worker/engine_internal.h"

#include "common/clock.h"
#include "common/log.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A sequence that others overtook so often makes them wait (worker/scheduler.h). */
#define MAX_OVERTAKES 32

/* What one level of priority is worth, in ms of waiting. */
#define AGING_MS 1000

/* --- Facts ----------------------------------------------------------------------------------- */

const qv_model_config *qv_engine_config(const qv_engine *engine)
{
    return engine->context.config;
}

const qv_engine_options *qv_engine_get_options(const qv_engine *engine)
{
    return &engine->options;
}

const qv_tokenizer *qv_engine_tokenizer(const qv_engine *engine)
{
    return engine->tokenizer;
}

const qv_memory_plan *qv_engine_plan(const qv_engine *engine)
{
    return &engine->sizes.plan;
}

int64_t qv_engine_total_pages(const qv_engine *engine)
{
    return engine->sizes.limits.n_pages;
}

const char *qv_engine_device(const qv_engine *engine)
{
    return engine->ranks.device;
}

const qv_request_context *qv_engine_request_context(const qv_engine *engine)
{
    return &engine->context;
}

void qv_engine_get_stats(const qv_engine *engine, qv_engine_stats *out)
{
    *out = engine->stats;
    out->running = qv_scheduler_n_running(engine->scheduler);
    out->waiting = (int32_t)(engine->n_sequences - out->running);
    out->free_pages = qv_kv_cache_n_free(engine->pages) + qv_kv_cache_n_idle(engine->pages);
    out->free_state_slots = (int32_t)engine->options.max_running - out->running;
    out->free_adapter_slots = qv_adapter_cache_n_empty(engine->adapters);
}

void qv_engine_get_adapter_stats(const qv_engine *engine, qv_adapter_stats *out)
{
    qv_adapter_cache_get_stats(engine->adapters, out);
}

/* --- Life ------------------------------------------------------------------------------------ */

static qv_status register_metrics(qv_metrics *metrics, qv_engine_metrics *m)
{
    if (metrics == NULL)
        return QV_OK;
    const struct {
        qv_counter **counter;
        const char *name, *help;
    } counters[] = {
        {&m->steps, "quiver_engine_steps_total", "Steps that ran tokens."},
        {&m->prefilled, "quiver_engine_prefill_tokens_total", "Prompt tokens computed."},
        {&m->generated, "quiver_engine_generated_tokens_total", "Tokens chosen."},
        {&m->preemptions, "quiver_engine_preemptions_total", "Answers that lost their place."},
        {&m->failed, "quiver_engine_failed_requests_total", "Requests that ended in an error."},
        {&m->prefix_lookups, "quiver_engine_prefix_lookups_total",
         "Answers that were looked up in the prefix cache."},
        {&m->prefix_hits, "quiver_engine_prefix_hits_total", "Those that found a beginning."},
        {&m->prefix_tokens, "quiver_engine_prefix_hit_tokens_total",
         "Tokens that were found and not computed."},
        {&m->prefix_snapshots_evicted, "quiver_engine_prefix_evicted_snapshots_total",
         "Snapshots dropped from the prefix cache to make room."},
        {&m->prefix_pages_evicted, "quiver_engine_prefix_evicted_pages_total",
         "KV pages dropped from the prefix cache to make room."},
        {&m->reads, "quiver_adapter_reads_total", "Adapter folders looked at or read."},
        {&m->installs, "quiver_adapter_installs_total", "Adapters copied into a slot."},
        {&m->slot_evictions, "quiver_adapter_slot_evictions_total", "Adapters that lost a slot."},
        {&m->host_evictions, "quiver_adapter_host_evictions_total",
         "Adapters that lost their copy in host memory."},
    };
    const struct {
        qv_gauge **gauge;
        const char *name, *help;
    } gauges[] = {
        {&m->running, "quiver_engine_running", "Answers that hold pages and a state slot."},
        {&m->waiting, "quiver_engine_waiting", "Answers queued."},
        {&m->free_pages, "quiver_engine_free_pages", "KV pages no answer holds."},
        {&m->prefix_snapshots, "quiver_engine_prefix_snapshots", "Snapshots of the prefix cache."},
        {&m->prefix_pages, "quiver_engine_prefix_pages", "KV pages that the prefix cache knows."},
        {&m->empty_slots, "quiver_engine_empty_adapter_slots", "Adapter slots that are empty."},
        {&m->adapters, "quiver_adapters", "Adapter names that are known."},
        {&m->host_bytes, "quiver_adapter_host_bytes", "Host memory of copies of adapters."},
    };
    for (size_t i = 0; i < sizeof counters / sizeof *counters; i++)
        QV_TRY(qv_metrics_counter(metrics, counters[i].name, counters[i].help, QV_NO_LABELS,
                                  counters[i].counter));
    for (size_t i = 0; i < sizeof gauges / sizeof *gauges; i++)
        QV_TRY(qv_metrics_gauge(metrics, gauges[i].name, gauges[i].help, QV_NO_LABELS,
                                gauges[i].gauge));
    const struct {
        qv_counter **counter;
        const char *where;
    } found[] = {{&m->slot_hits, "slot"}, {&m->host_hits, "host"}, {&m->misses, "disk"}};
    for (size_t i = 0; i < sizeof found / sizeof *found; i++)
        QV_TRY(qv_metrics_counter(metrics, "quiver_adapter_requests_total",
                                  "Requests with an adapter, by where it was when they came.",
                                  QV_LABELS({"found", found[i].where}), found[i].counter));
    for (size_t i = 0; i < QV_N_FINISH_REASONS; i++)
        QV_TRY(qv_metrics_counter(metrics, "quiver_engine_finished_total",
                                  "Answers that ended, by reason.",
                                  QV_LABELS({"reason", qv_finish_reasons[i]}), &m->finished[i]));
    QV_TRY(qv_metrics_histogram(metrics, "quiver_engine_step_tokens", "Tokens of a step.",
                                qv_metrics_tokens, qv_metrics_n_tokens, QV_NO_LABELS,
                                &m->step_tokens));
    return qv_metrics_histogram(metrics, "quiver_engine_step_seconds", "Duration of a step.",
                                qv_metrics_seconds, qv_metrics_n_seconds, QV_NO_LABELS,
                                &m->step_seconds);
}

/* Say now and then how far a long load has come. */
static void log_progress(uint64_t done, uint64_t total, void *user)
{
    uint64_t *last_ms = user, now_ms = qv_now_ms();
    if (now_ms - *last_ms < 2000 || total == 0)
        return;
    *last_ms = now_ms;
    qv_info("loading weights: %" PRIu64 " of %" PRIu64 " MiB", done >> 20, total >> 20);
}

/* What the ranks may take: of their devices where they have memory of their own, a twentieth of it
 * left for what libraries and recorded steps need; else of the host. */
static uint64_t available_to(const qv_model_ranks *ranks)
{
    uint64_t of_devices = 0;
    for (int32_t i = 0; i < ranks->n_ranks; i++) {
        uint64_t bytes = qv_backend_free_memory(ranks->backends[i]);
        if (bytes == UINT64_MAX)
            return qv_available_memory();
        of_devices += bytes - bytes / 20;
    }
    return of_devices;
}

static qv_status check_load_format(const char *name)
{
    if (name == NULL || strcmp(name, "safetensors") == 0 || strcmp(name, "dummy") == 0)
        return QV_OK;
    return qv_fail(QV_ERR_ARG, "load-format '%s' is neither 'safetensors' nor 'dummy'", name);
}

static qv_status open_model(qv_engine *engine)
{
    qv_engine_options *o = &engine->options;
    QV_TRY(check_load_format(o->load_format));
    QV_TRY(qv_engine_ranks_open(o, &engine->ranks));
    const qv_model_ranks *ranks = &engine->ranks.ranks;
    engine->backend = ranks->backends[0];
    qv_model_config config;
    QV_TRY(qv_model_config_load(o->model_dir, &config));
    QV_TRY(qv_engine_sizes_plan(o, &config, ranks, available_to(ranks), &engine->sizes));
    qv_engine_sizes_log(&engine->sizes);
    o->max_context = engine->sizes.max_context;
    o->kv_bytes = (int64_t)engine->sizes.plan.kv;
    uint64_t start_ms = qv_now_ms(), last_ms = start_ms;
    QV_TRY(qv_model_open_ranks(o->model_dir, ranks, &engine->sizes.limits, log_progress, &last_ms,
                               &engine->model));
    qv_info("model loaded: %s in %" PRIu64 " ms on %s", o->model_dir, qv_now_ms() - start_ms,
            engine->ranks.device);
    return QV_OK;
}

/* "1@20" of the tests: rank 1 fails at step 20. */
static qv_status plan_break(qv_engine *engine)
{
    const char *text = engine->options.break_rank;
    int64_t rank, step;
    int end = 0;
    if (text == NULL || text[0] == '\0')
        return QV_OK;
    if (sscanf(text, "%" SCNd64 "@%" SCNd64 "%n", &rank, &step, &end) != 2 || text[end] != '\0')
        return qv_fail(QV_ERR_ARG, "break-rank \"%s\" is not RANK@STEP, such as 1@20", text);
    return qv_model_break_rank(engine->model, rank, step);
}

/* The tokenizer and the chat template. A template that this interpreter refuses costs the requests
 * with messages, not the model. */
static qv_status open_text(qv_engine *engine)
{
    const char *dir = engine->options.model_dir;
    QV_TRY(qv_tokenizer_open(dir, &engine->tokenizer));
    qv_status status = qv_chat_template_open(dir, &engine->chat);
    if (status == QV_ERR_NOMEM)
        return status;
    if (status != QV_OK && status != QV_ERR_NOT_FOUND) {
        snprintf(engine->chat_refusal, sizeof engine->chat_refusal, "%s", qv_error());
        qv_warn("requests with messages will be refused: %s", engine->chat_refusal);
    }
    const qv_model_config *config = qv_model_get_config(engine->model);
    int64_t vocab = (int64_t)qv_tokenizer_vocab_size(engine->tokenizer);
    engine->context = (qv_request_context){
        .tokenizer = engine->tokenizer,
        .chat = engine->chat,
        .chat_refusal = engine->chat_refusal[0] != '\0' ? engine->chat_refusal : NULL,
        .config = config,
        .n_valid = (int32_t)(vocab < config->vocab ? vocab : config->vocab),
        .max_context = engine->sizes.max_context,
        .page_tokens = engine->sizes.limits.page_tokens,
    };
    return QV_OK;
}

static qv_status open_caches(qv_engine *engine)
{
    const qv_engine_options *o = &engine->options;
    const qv_model_limits *limits = &engine->sizes.limits;
    QV_TRY(qv_kv_cache_new(limits->n_pages, limits->page_tokens, &engine->pages));
    QV_TRY(qv_state_cache_new(limits->n_state_slots, (uint64_t)o->swap_bytes, &engine->states));

    if (o->prefix_cache)
        QV_TRY(qv_prefix_cache_new(engine->pages, engine->states, &engine->prefix));

    qv_adapter_source source = qv_adapter_source_of_model(engine->model);
    qv_adapter_cache_options adapters = {
        .n_slots = limits->n_adapter_slots,
        .host_bytes = (uint64_t)o->adapter_cache_bytes,
        .on_event = qv_engine_on_adapter_event,
        .user = engine,
    };
    QV_TRY(qv_adapter_cache_new(&adapters, &source, &engine->adapters));

    qv_scheduler_options scheduler = {
        .max_running = limits->max_seqs,
        .step_tokens = limits->max_tokens,
        .prefill_chunk = (int32_t)o->prefill_chunk,
        .max_logits = limits->max_logits,
        .adapter_slots = limits->n_adapter_slots,
        .max_overtakes = MAX_OVERTAKES,
        .aging_ms = AGING_MS,
        .preempt_every = o->preempt_every,
        .prefix = engine->prefix,
    };
    qv_adapter_slots slots = qv_engine_adapter_slots;
    slots.user = engine;
    QV_TRY(qv_scheduler_new(&scheduler, engine->pages, engine->states, &slots, &engine->scheduler));

    qv_batch_limits batch = {
        .max_tokens = limits->max_tokens,
        .max_seqs = limits->max_seqs,
        .max_logits = limits->max_logits,
        .max_seq_pages = qv_kv_cache_pages_for(engine->pages, engine->sizes.max_context),
    };
    QV_TRY(qv_batch_builder_new(&batch, &engine->builder));
    engine->requests = qv_map_new((size_t)o->max_running);
    engine->rows = calloc((size_t)limits->max_logits, sizeof *engine->rows);
    engine->results = calloc((size_t)limits->max_logits, sizeof *engine->results);
    bool ok = engine->requests != NULL && engine->rows != NULL && engine->results != NULL;
    for (int i = 0; i < 2; i++) {
        qv_flight *flight = &engine->flights[i];
        flight->items = calloc((size_t)limits->max_seqs, sizeof *flight->items);
        ok = ok && flight->items != NULL;
    }
    engine->unread = &engine->flights[0];
    if (!ok)
        return qv_fail(QV_ERR_NOMEM, "no memory for the tables of the engine");
    return QV_OK;
}

/* Own the strings of the options. */
static qv_status keep_strings(qv_engine_options *o)
{
    const char **strings[] = {&o->model_dir,  &o->backend,    &o->gemm, &o->arithmetic,
                              &o->devices,    &o->break_rank, &o->dump, &o->load_format,
                              &o->all_reduce, &o->overlap};
    bool ok = true;
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++)
        if (*strings[i] != NULL)
            ok = (*strings[i] = strdup(*strings[i])) != NULL && ok;
    return ok ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory for the engine's options");
}

/* Whether steps overlap: where the host would leave a device waiting. Ranks other than the first
 * have no way to what that one chose but through the host. */
static qv_status choose_overlap(qv_engine *engine)
{
    const qv_engine_options *o = &engine->options;
    const char *how = o->overlap != NULL && o->overlap[0] != '\0' ? o->overlap : "auto";
    bool is_on = strcmp(how, "on") == 0, is_auto = strcmp(how, "auto") == 0;
    if (!is_on && !is_auto && strcmp(how, "off") != 0)
        return qv_fail(QV_ERR_ARG, "overlap is '%s'; it can be on, off or auto", how);
    if (is_on && o->tp > 1)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "overlap is on with %d ranks; steps of several ranks go one at a time",
                       (int)o->tp);
    engine->overlap = is_on || (is_auto && o->tp <= 1 && strcmp(o->backend, "cuda") == 0);
    return QV_OK;
}

static qv_status open_all(qv_engine *engine, qv_metrics *metrics)
{
    QV_TRY(keep_strings(&engine->options));
    QV_TRY(choose_overlap(engine));
    QV_TRY(register_metrics(metrics, &engine->metrics));
    QV_TRY(open_model(engine));
    QV_TRY(plan_break(engine));
    if (engine->options.dump != NULL && engine->options.dump[0] != '\0')
        QV_TRY(qv_engine_dump_start(engine->options.dump, engine->backend, engine->model,
                                    &engine->dump));
    QV_TRY(open_text(engine));
    return open_caches(engine);
}

qv_status qv_engine_open(const qv_engine_options *options, qv_metrics *metrics, qv_engine **out)
{
    qv_engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the engine");
    engine->options = *options;
    qv_outbox_init(&engine->outbox);
    qv_status status = open_all(engine, metrics);
    if (status != QV_OK) {
        qv_engine_close(engine);
        return status;
    }
    *out = engine;
    return QV_OK;
}

/* End what still runs, without a word: nobody listens any more. */
static void drop_requests(qv_engine *engine)
{
    if (engine->requests == NULL)
        return;
    QV_MAP_EACH(engine->requests, entry)
    {
        qv_request *request = entry->value;
        for (uint32_t i = 0, n = request->n_streams; i < n; i++)
            if (!request->streams[i].finished)
                qv_engine_end_stream(engine, &request->streams[i]);
    }
    qv_map_free(engine->requests, NULL);
}

void qv_engine_close(qv_engine *engine)
{
    if (engine == NULL)
        return;
    drop_requests(engine);
    qv_outbox_deinit(&engine->outbox);
    qv_batch_builder_free(engine->builder);
    qv_scheduler_free(engine->scheduler);
    qv_adapter_cache_free(engine->adapters);
    qv_prefix_cache_free(engine->prefix);
    qv_state_cache_free(engine->states);
    qv_kv_cache_free(engine->pages);
    free(engine->rows);
    free(engine->results);
    for (int i = 0; i < 2; i++)
        free(engine->flights[i].items);
    qv_chat_template_free(engine->chat);
    qv_tokenizer_close(engine->tokenizer);
    qv_engine_dump_free(engine->dump);
    qv_model_close(engine->model);
    qv_engine_ranks_close(&engine->ranks);
    free((char *)engine->options.model_dir);
    free((char *)engine->options.backend);
    free((char *)engine->options.gemm);
    free((char *)engine->options.arithmetic);
    free((char *)engine->options.devices);
    free((char *)engine->options.all_reduce);
    free((char *)engine->options.break_rank);
    free((char *)engine->options.dump);
    free((char *)engine->options.load_format);
    free((char *)engine->options.overlap);
    free(engine);
}
