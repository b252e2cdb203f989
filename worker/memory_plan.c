#include "worker/memory_plan.h"

#include "common/log.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Tokens that each running answer gets room for, unless told otherwise. */
#define PLANNED_CONTEXT 2048

/* Most memory for the logits of one step. */
#define MAX_LOGITS_BYTES (INT64_C(64) << 20)

/* --- What there is --------------------------------------------------------------------------- */

/* A number from a file that holds one, such as memory.max ("max" is none). */
static bool read_number(const char *path, uint64_t *out)
{
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return false;
    bool ok = fscanf(file, "%" SCNu64, out) == 1;
    fclose(file);
    return ok;
}

static uint64_t system_available(void)
{
    uint64_t kib = 0;
    char line[256];
    FILE *file = fopen("/proc/meminfo", "re");
    if (file == NULL)
        return UINT64_MAX;
    bool found = false;
    while (!found && fgets(line, sizeof line, file) != NULL)
        found = sscanf(line, "MemAvailable: %" SCNu64 " kB", &kib) == 1;
    fclose(file);
    return found ? kib * 1024 : UINT64_MAX;
}

uint64_t qv_available_memory(void)
{
    uint64_t available = system_available(), limit, used;
    if (read_number("/sys/fs/cgroup/memory.max", &limit) &&
        read_number("/sys/fs/cgroup/memory.current", &used)) {
        uint64_t left = limit > used ? limit - used : 0;
        if (left < available)
            available = left;
    }
    return available;
}

/* --- The plan -------------------------------------------------------------------------------- */

static int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static double mib(uint64_t bytes)
{
    return (double)bytes / (1 << 20);
}

static qv_status plan_context(const qv_engine_options *o, const qv_model_config *config,
                              int64_t *out)
{
    *out = config->max_positions;
    if (o->max_context > config->max_positions)
        return qv_fail(QV_ERR_ARG,
                       "max-context is %" PRId64 ", but the model has %" PRId64 " positions",
                       o->max_context, config->max_positions);
    if (o->max_context > 0)
        *out = o->max_context;
    return QV_OK;
}

/* Pages for the KV cache, at least one. `fixed` is what everything else takes. */
static int64_t plan_pages(const qv_engine_options *o, int64_t max_context, uint64_t page_bytes,
                          uint64_t fixed, uint64_t available)
{
    int64_t per_context = (max_context + o->page_tokens - 1) / o->page_tokens;
    int64_t per_answer =
        (min_i64(max_context, PLANNED_CONTEXT) + o->page_tokens - 1) / o->page_tokens;
    int64_t pages = max_i64(o->max_running * per_answer, per_context);
    if (page_bytes == 0) /* a model without attention */
        return pages;
    if (o->kv_bytes > 0)
        pages = o->kv_bytes / (int64_t)page_bytes;
    else if (available > fixed)
        pages = min_i64(pages, (int64_t)((available - fixed) / 2 / page_bytes));
    else
        pages = 1; /* the check of the whole plan says what is wrong */
    return min_i64(max_i64(pages, 1), INT32_MAX);
}

/* Bound of the memory that adapter slots get on demand. `plan` has room for a full adapter in each,
 * which few adapters are. */
static uint64_t plan_adapter_memory(const qv_engine_options *o, const qv_memory_plan *plan,
                                    uint64_t available)
{
    uint64_t fixed = plan->total - plan->kv - plan->adapter_memory;
    uint64_t quarter = available > fixed ? (available - fixed) / 4 : 0;
    if (o->adapter_memory > 0)
        return (uint64_t)o->adapter_memory;
    if (plan->adapter_memory <= quarter)
        return plan->adapter_memory;
    return quarter > 0 ? quarter : 1; /* 0 would be no bound */
}

/* One rank's bound, of what all may take together: enough for a full adapter in each slot there, or
 * its share. */
static uint64_t adapter_memory_of_rank(const qv_engine_sizes *sizes, uint64_t together)
{
    uint64_t n = (uint64_t)sizes->n_ranks, most = 0;
    for (int32_t i = 0; i < sizes->n_ranks; i++)
        if (sizes->of_rank[i].adapter_memory > most)
            most = sizes->of_rank[i].adapter_memory;
    return together == sizes->plan.adapter_memory && most > 0 ? most : (together + n - 1) / n;
}

/* What each rank takes, and all together. */
static qv_status plan_ranks(const qv_model_config *config, const qv_model_ranks *ranks,
                            qv_engine_sizes *out)
{
    qv_memory_plan *sum = &out->plan;
    *sum = (qv_memory_plan){.total = 0};
    out->n_ranks = ranks->n_ranks;
    for (int32_t i = 0; i < ranks->n_ranks; i++) {
        qv_memory_plan *one = &out->of_rank[i];
        QV_TRY(qv_model_plan_rank(config, ranks, i, &out->limits, one));
        sum->weights += one->weights;
        sum->kv += one->kv;
        sum->state += one->state;
        sum->adapters += one->adapters;
        sum->activations += one->activations;
        sum->total += one->total;
        sum->kv_page += one->kv_page;
        sum->state_slot += one->state_slot;
        sum->adapter_slot += one->adapter_slot;
        sum->adapter_memory += one->adapter_memory;
        sum->adapter_parts += one->adapter_parts;
    }
    return QV_OK;
}

#define LOWER                                                                                      \
    "lower max-running, kv-bytes, prefix-snapshots, adapter-slots, adapter-memory, max-lora-rank " \
    "or step-tokens"

static qv_status check_fit(const qv_memory_plan *plan, uint64_t available, const char *whose)
{
    if (plan->total <= available)
        return QV_OK;
    return qv_fail(QV_ERR_LIMIT,
                   "the memory plan %sof %.0f MiB (weights %.0f, KV %.0f, state %.0f, adapters "
                   "%.0f, activations %.0f) does not fit the %.0f MiB that are available: " LOWER,
                   whose, mib(plan->total), mib(plan->weights), mib(plan->kv), mib(plan->state),
                   mib(plan->adapters), mib(plan->activations), mib(available));
}

/* Each rank's part in its own memory, where it has some. */
static qv_status check_ranks(const qv_engine_sizes *sizes, const qv_model_ranks *ranks)
{
    for (int32_t i = 0; i < ranks->n_ranks && ranks->n_ranks > 1; i++) {
        char whose[32];
        snprintf(whose, sizeof whose, "of rank %d, ", i);
        QV_TRY(check_fit(&sizes->of_rank[i], qv_backend_free_memory(ranks->backends[i]), whose));
    }
    return QV_OK;
}

qv_status qv_engine_sizes_plan(const qv_engine_options *o, const qv_model_config *config,
                               const qv_model_ranks *ranks, uint64_t available,
                               qv_engine_sizes *out)
{
    int64_t context;
    QV_TRY(plan_context(o, config, &context));
    int64_t logits = min_i64(o->step_tokens, MAX_LOGITS_BYTES / (config->vocab * 4));
    out->limits = (qv_model_limits){
        .max_tokens = (int32_t)o->step_tokens,
        .max_seqs = (int32_t)o->max_running,
        .max_logits = (int32_t)max_i64(logits, o->max_running),
        .page_tokens = (int32_t)o->page_tokens,
        .n_pages = 1,
        .n_state_slots = (int32_t)(o->max_running + (o->prefix_cache ? o->prefix_snapshots : 0)),
        .n_adapter_slots = (int32_t)o->adapter_slots,
        .max_lora_rank = (int32_t)o->max_lora_rank,
        .max_adapter_bytes = (uint64_t)o->max_adapter_bytes,
        .made_up_weights = o->load_format != NULL && strcmp(o->load_format, "dummy") == 0,
        .max_recorded = (int32_t)o->recorded,
    };
    qv_memory_plan *plan = &out->plan;
    QV_TRY(plan_ranks(config, ranks, out));
    out->limits.adapter_memory =
        adapter_memory_of_rank(out, plan_adapter_memory(o, plan, available));
    QV_TRY(plan_ranks(config, ranks, out));
    uint64_t fixed = plan->total - plan->kv;
    out->limits.n_pages = (int32_t)plan_pages(o, context, plan->kv_page, fixed, available);
    QV_TRY(plan_ranks(config, ranks, out));

    QV_TRY(check_fit(plan, available, ""));
    QV_TRY(check_ranks(out, ranks));

    /* An answer that runs alone must find pages to its end. */
    int64_t reach = (int64_t)out->limits.n_pages * o->page_tokens;
    if (o->max_context > reach)
        return qv_fail(QV_ERR_LIMIT,
                       "max-context is %" PRId64 ", but the KV cache has %d pages of %" PRId64
                       " tokens: raise kv-bytes or lower max-context",
                       o->max_context, out->limits.n_pages, o->page_tokens);
    out->max_context = (int32_t)min_i64(min_i64(context, reach), INT32_MAX / 2);
    out->limits.max_seq_pages = (int32_t)((out->max_context + o->page_tokens - 1) / o->page_tokens);
    return QV_OK;
}

void qv_engine_sizes_log(const qv_engine_sizes *sizes)
{
    const qv_memory_plan *plan = &sizes->plan;
    const qv_model_limits *limits = &sizes->limits;
    qv_info("memory plan: %.1f MiB = weights %.1f + KV %.1f (%d pages of %d tokens) + state %.1f "
            "(%d slots, %d of them for prefixes) + adapters %.1f (%d slots, rank %d; %.1f of it on "
            "demand for experts and embedding, of which an adapter of that rank takes up to %.1f) "
            "+ activations %.1f (%d tokens); context %d tokens",
            mib(plan->total), mib(plan->weights), mib(plan->kv), limits->n_pages,
            limits->page_tokens, mib(plan->state), limits->n_state_slots,
            limits->n_state_slots - limits->max_seqs, mib(plan->adapters), limits->n_adapter_slots,
            limits->max_lora_rank, mib(plan->adapter_memory), mib(plan->adapter_parts),
            mib(plan->activations), limits->max_tokens, sizes->max_context);
    for (int32_t i = 0; i < sizes->n_ranks && sizes->n_ranks > 1; i++) {
        const qv_memory_plan *one = &sizes->of_rank[i];
        qv_info("memory plan of rank %d: %.1f MiB = weights %.1f + KV %.1f + state %.1f + adapters "
                "%.1f + activations %.1f",
                i, mib(one->total), mib(one->weights), mib(one->kv), mib(one->state),
                mib(one->adapters), mib(one->activations));
    }
}
