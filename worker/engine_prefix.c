#include "worker/engine_internal.h"

#include <string.h>

/* Whether to take a snapshot where the sequence is now: where it leaves a known path or others go
 * on from it, every so many tokens, and once more shortly before the end of its prompt, at the end
 * of a chunk that there is in any case. */
static bool snapshot_is_due(const qv_engine *engine, const qv_sequence *seq)
{
    const qv_engine_options *o = &engine->options;
    int32_t n = seq->n_computed;
    if (n % engine->sizes.limits.page_tokens != 0 || n <= seq->kept_at)
        return false;
    int64_t chunk = o->prefill_chunk > 0 ? o->prefill_chunk : o->step_tokens;
    int32_t left = seq->n_prompt - n;
    bool near_end = left > 0 && left <= chunk && n - seq->kept_at >= chunk / 2;
    return n == seq->branch_at || n == seq->fork_at || n - seq->kept_at >= o->prefix_every ||
           near_end;
}

qv_status qv_engine_keep_prefix(qv_engine *engine, qv_sequence *seq, bool prompt_done)
{
    if (seq->scope == NULL)
        return QV_OK;
    bool snapshot = snapshot_is_due(engine, seq);
    if (!snapshot && !prompt_done)
        return QV_OK;
    int32_t slot = qv_prefix_cache_insert(engine->prefix, seq->scope, seq->tokens, seq->n_computed,
                                          seq->pages, snapshot);
    if (snapshot)
        seq->kept_at = seq->n_computed;
    return slot < 0 ? QV_OK : qv_model_state_copy(engine->model, seq->state_slot, slot);
}

void qv_engine_keep_answer(qv_engine *engine, qv_sequence *seq)
{
    if (seq->scope != NULL && qv_sequence_is_running(seq))
        qv_prefix_cache_insert(engine->prefix, seq->scope, seq->tokens, seq->n_computed, seq->pages,
                               false);
}

qv_status qv_engine_load_prefixes(qv_engine *engine, const qv_plan *plan)
{
    for (int32_t i = 0; i < plan->n_loads; i++) {
        qv_sequence *seq = plan->loads[i].seq;
        qv_request_stream *stream = &seq->request->streams[seq->index];
        if (plan->loads[i].from_slot != seq->state_slot)
            QV_TRY(qv_model_state_copy(engine->model, plan->loads[i].from_slot, seq->state_slot));
        if (seq->n_preempted == 0) /* later it only gets back what it had computed */
            stream->n_cached = seq->n_computed < seq->n_prompt ? seq->n_computed : seq->n_prompt;
    }
    return QV_OK;
}

/* --- Scopes ---------------------------------------------------------------------------------- */

void qv_engine_join_prefixes(qv_engine *engine, qv_request *request)
{
    if (engine->prefix == NULL)
        return;
    const char *digest =
        request->version != NULL ? qv_adapter_version_digest(request->version) : NULL;
    if (qv_prefix_cache_join(engine->prefix, digest, &request->scope) != QV_OK)
        return; /* no memory: the request shares nothing */
    for (uint32_t i = 0; i < request->n_streams; i++)
        request->streams[i].sequence.scope = request->scope;
}

void qv_engine_leave_prefixes(qv_engine *engine, qv_request *request)
{
    if (request->scope != NULL)
        qv_prefix_cache_leave(engine->prefix, request->scope);
    request->scope = NULL;
}

typedef struct {
    const char *digest;
    bool found;
} digest_search;

static void compare_digest(const qv_adapter_event *adapter, void *user)
{
    digest_search *search = user;
    if (adapter->digest != NULL && strcmp(adapter->digest, search->digest) == 0)
        search->found = true;
}

static bool digest_is_known(void *user, const char *digest)
{
    digest_search search = {.digest = digest};
    qv_adapter_cache_each(user, compare_digest, &search);
    return search.found;
}

void qv_engine_forget_prefixes(qv_engine *engine)
{
    if (engine->prefix != NULL && engine->adapters_changed)
        qv_prefix_cache_retain(engine->prefix, digest_is_known, engine->adapters);
    engine->adapters_changed = false;
}
