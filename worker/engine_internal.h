/* What the parts of the engine share:
 *
 *   engine.c        requests in, adapters
 *   engine_step.c   the step, and the one before whose results are not read yet
 *   engine_prefix.c what sequences take from the prefix cache and leave in it
 *   engine_emit.c   how streams and requests end, and the deltas that say so
 *   engine_open.c   opening and closing, facts, metrics
 */
#ifndef QV_WORKER_ENGINE_INTERNAL_H
#define QV_WORKER_ENGINE_INTERNAL_H

#include "common/map.h"
#include "worker/adapter_cache.h"
#include "worker/batch_build.h"
#include "worker/engine_dump.h"
#include "worker/engine_ranks.h"
#include "worker/memory_plan.h"
#include "worker/outbox.h"
#include "worker/request.h"
#include "worker/scheduler.h"

/* finish_reason in deltas and metrics: "stop", "length", "cancelled", "deadline". */
enum { QV_N_FINISH_REASONS = 4 };
extern const char *const qv_finish_reasons[QV_N_FINISH_REASONS];

typedef struct {
    qv_counter *steps, *prefilled, *generated, *preemptions;
    qv_counter *finished[QV_N_FINISH_REASONS]; /* streams */
    qv_counter *failed;                        /* requests that ended in an error */
    qv_counter *prefix_lookups, *prefix_hits, *prefix_tokens;
    qv_counter *prefix_snapshots_evicted, *prefix_pages_evicted;
    qv_counter *slot_hits, *host_hits, *misses; /* requests, by where their adapter was */
    qv_counter *reads, *installs, *slot_evictions, *host_evictions;
    qv_gauge *running, *waiting, *free_pages, *empty_slots, *adapters, *host_bytes;
    qv_gauge *prefix_snapshots, *prefix_pages;
    qv_histogram *step_seconds, *step_tokens;
} qv_engine_metrics;

/* A step that was enqueued, until its results are read. */
typedef struct {
    qv_plan_item *items; /* [max_running] seq NULL: ended meanwhile, or read */
    int32_t n_items;     /* 0: there is none */
    int32_t n_logits;    /* 0: nothing was sampled */
    bool is_sampled;     /* its results are there already, and `sampled` is what sampling said */
    qv_status sampled;
    bool taken; /* its sequences are as after it, but for the tokens it chose */
} qv_flight;

struct qv_engine {
    qv_engine_options options; /* its strings are owned, defaults resolved */
    qv_engine_sizes sizes;
    qv_engine_ranks ranks;
    qv_backend *backend; /* rank 0's: where logits are */
    qv_model *model;
    qv_engine_dump *dump; /* NULL: none, or done */
    qv_tokenizer *tokenizer;
    qv_chat_template *chat;          /* NULL: the model has none, or */
    char chat_refusal[QV_ERROR_MAX]; /* why it was refused; "": it was not */
    qv_request_context context;

    qv_kv_cache *pages;
    qv_state_cache *states;
    qv_prefix_cache *prefix; /* NULL: switched off */
    qv_adapter_cache *adapters;
    bool adapters_changed; /* since the prefix cache last heard which are known */
    qv_scheduler *scheduler;
    qv_batch_builder *builder;
    qv_sample_row *rows;       /* [max_logits] */
    qv_sample_result *results; /* [max_logits] */
    bool overlap;              /* a step is enqueued before the one before is read */
    qv_flight flights[2];      /* in turn */
    qv_flight *unread;         /* the last step, if its results are not read */

    qv_map *requests;                 /* by number: every request that has not ended */
    qv_request *parked, *last_parked; /* of those, the ones whose adapter is being loaded for the
                                       * first time; a list, oldest first */
    int64_t n_sequences;              /* not finished, of all requests */
    qv_outbox outbox;

    qv_engine_stats stats;
    qv_adapter_stats adapter_stats; /* as the metrics have them */
    qv_engine_metrics metrics;
};

/* --- engine_emit.c ---------------------------------------------------------------------------- */

/* Put a request into the list of those that wait for a load, and take it out (if it is there). */
void qv_engine_park(qv_engine *engine, qv_request *request);
void qv_engine_unpark(qv_engine *engine, qv_request *request);

/* Forget a request all of whose streams have ended. Its memory outlives its last deltas. */
void qv_engine_end_request(qv_engine *engine, qv_request *request);

/* End a stream without a word. With the last one the request ends. */
void qv_engine_end_stream(qv_engine *engine, qv_request_stream *stream);

/* Report an error of a whole request, which may be in no table. */
void qv_engine_report_error(qv_engine *engine, uint64_t number, qv_code code, const char *message);

/* Report an error and end every stream of the request. */
void qv_engine_fail_request(qv_engine *engine, qv_request *request, qv_code code,
                            const char *message);

/* The delta of a token that was chosen; the stream ends if that ends its answer. */
void qv_engine_emit_token(qv_engine *engine, qv_request_stream *stream,
                          const qv_sample_result *result);

/* The delta of a stream that ends without another token. Text that was held back comes with it. */
void qv_engine_emit_end(qv_engine *engine, qv_request_stream *stream, const char *reason);

/* --- engine_prefix.c -------------------------------------------------------------------------- */

/* Hold the scope that the request shares beginnings in, and give it back. */
void qv_engine_join_prefixes(qv_engine *engine, qv_request *request);
void qv_engine_leave_prefixes(qv_engine *engine, qv_request *request);

/* Drop the beginnings of adapters that have no name any more. */
void qv_engine_forget_prefixes(qv_engine *engine);

/* Carry out the loads of a plan. Errors: DEVICE. */
qv_status qv_engine_load_prefixes(qv_engine *engine, const qv_plan *plan);

/* A sequence ran some tokens: keep its pages if that finished its prompt, and a snapshot if one is
 * due. Errors: DEVICE. */
qv_status qv_engine_keep_prefix(qv_engine *engine, qv_sequence *seq, bool prompt_done);

/* A stream ends well: keep the pages of its prompt and answer. */
void qv_engine_keep_answer(qv_engine *engine, qv_sequence *seq);

/* --- engine_step.c ---------------------------------------------------------------------------- */

/* A sequence ends: what it has in a step that is under way is dropped, and it is as it was before
 * that step. */
void qv_engine_leave_flights(qv_engine *engine, const qv_sequence *seq);

/* --- engine.c --------------------------------------------------------------------------------- */

/* Take in what loaders have done. Errors: DEVICE. */
qv_status qv_engine_poll_adapters(qv_engine *engine);

/* If other streams wait for this sequence and it has come to where they begin, queue them. Errors:
 * DEVICE. */
qv_status qv_engine_fork(qv_engine *engine, qv_sequence *seq);

/* --- engine.c, for the caches ----------------------------------------------------------------- */

/* What the scheduler asks about adapters, and where the adapter cache reports; `user` is the
 * engine. */
extern const qv_adapter_slots qv_engine_adapter_slots;
void qv_engine_on_adapter_event(void *user, const qv_adapter_event *event);

#endif
