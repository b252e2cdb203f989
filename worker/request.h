/* A request inside the engine: what was asked, prepared so that a step has nothing left to check or
 * allocate, and its n streams.
 *
 * qv_request_new (worker/engine.h) makes one on any thread from immutable facts of the engine; from
 * qv_engine_submit on it belongs to the engine's thread. Everything in it lives in one arena.
 */
#ifndef QV_WORKER_REQUEST_H
#define QV_WORKER_REQUEST_H

#include "worker/adapter_cache.h"
#include "worker/sequence.h"
#include "worker/stream.h"

/* What qv_request_new needs to know; immutable. */
typedef struct {
    const qv_tokenizer *tokenizer;
    const qv_chat_template *chat; /* NULL: the model has none, or */
    const char *chat_refusal;     /* why it was refused at load; NULL: it was not */
    const qv_model_config *config;
    int32_t n_valid;     /* token ids below it may be used and chosen */
    int32_t max_context; /* prompt and answer together */
    int32_t page_tokens;
} qv_request_context;

/* Of an engine (in engine.c). Any thread. */
const qv_request_context *qv_engine_request_context(const qv_engine *engine);

/* One of the n answers. */
typedef struct {
    qv_sequence sequence;
    qv_stream stream;
    int64_t next_seq; /* number of its next message */
    int32_t n_cached; /* prompt tokens that it did not have to compute */
    bool queued;      /* the scheduler has it, or had it */
    bool finished;    /* its last delta is out, here or on an earlier worker */
} qv_request_stream;

struct qv_request {
    qv_request *prev, *next; /* in the engine's list of requests that wait for a load */
    qv_arena arena;          /* owns all that follows */
    uint64_t number;
    qv_str adapter;              /* empty: the base model */
    qv_adapter_version *version; /* held while the engine has the request and it is loaded */
    qv_prefix_scope *scope;      /* held likewise; NULL: it shares no beginnings */
    bool parked;                 /* in the list above; its sequences are in no queue yet */
    uint64_t arrival_ms;

    qv_sample_row sampling; /* what every row of the request shares */
    int32_t n_top_prompt;   /* alternatives per prompt token; -1 = do not score the prompt */
    qv_stream_rules rules;

    int32_t n_prompt;
    double *prompt_logprobs; /* [n_prompt], the first NaN; NULL unless asked. All streams write the
                              * same numbers */
    qv_tops prompt_tops;     /* [n_prompt]; no entries unless asked */

    qv_request_stream *streams; /* [n_streams] */
    uint32_t n_streams, n_unfinished;

    /* The stream that computes the prompt for all: the others are queued when it has come to the
     * prompt's last token. NULL: nobody waits. */
    qv_request_stream *leader;
};

#endif
