/* The engine: requests in, token deltas out, one step at a time. It owns the model, the caches, the
 * scheduler and the adapters, and knows nothing of sockets or brokers: quiver-run drives it
 * directly, quiver-worker from its engine thread.
 *
 * One thread calls qv_engine_* (the engine's thread); functions marked "any thread" are the
 * exception. Adapter loads run on a loader thread of the engine's own and are picked up between
 * steps; qv_engine_fd becomes readable when one has finished, so a caller without work can sleep on
 * it.
 */
#ifndef QV_WORKER_ENGINE_H
#define QV_WORKER_ENGINE_H

#include "common/metrics.h"
#include "common/protocol.h"
#include "models/chat_template.h"
#include "models/model.h"
#include "models/tokenizer.h"
#include "worker/prefix_cache.h"

typedef struct qv_engine qv_engine;

/* Settings; the rows of worker/engine_options.h document and fill them for every program. */
typedef struct {
    const char *model_dir;
    const char *load_format; /* "safetensors", or "dummy": weights made up from config.json alone */
    const char *backend;     /* "cpu" or "cuda" */
    const char *gemm;        /* CPU: "exact" or "openblas" */
    const char *arithmetic;  /* CPU: "f32" or "bf16" */
    int64_t threads;         /* 0 = all cores */
    int64_t tp;              /* ranks that share the model, a device each */
    int64_t ep;              /* groups of ranks that experts are shared out to; divides tp */
    int64_t recorded;      /* CUDA: decode steps of up to so many sequences are recorded at start */
    const char *overlap;   /* "on", "off" or "auto" (NULL too): enqueue a step before the last one's
                            * results are read */
    bool deterministic;    /* CUDA: a token's bits follow from its sequence and adapter alone */
    const char *devices;   /* "0,1": of the ranks; empty = the first tp */
    int64_t max_running;   /* sequences that hold pages and a state slot at once */
    int64_t max_waiting;   /* sequences queued in the engine; beyond it submit says BUSY */
    int64_t step_tokens;   /* token budget of a step (chunked prefill) */
    int64_t prefill_chunk; /* at most so many prompt tokens of one sequence a step; 0 = budget */
    int64_t page_tokens;   /* tokens of a KV page */
    int64_t kv_bytes;      /* memory for KV pages; 0 = planned from max_running and what is free */
    int64_t max_context;   /* longest prompt + answer; 0 = the model's own */
    int64_t adapter_slots; /* adapters on the device at once; 0 = base model only */
    int64_t max_lora_rank; /* rank that a slot has room for */
    int64_t adapter_memory;      /* on demand, for experts and embedding; 0 = planned */
    int64_t max_adapter_bytes;   /* largest adapter file */
    int64_t adapter_cache_bytes; /* host copies of adapters; beyond it they are read again */
    int64_t swap_bytes; /* host memory for states of preempted sequences; beyond it recompute */
    bool prefix_cache;  /* begin from what earlier prompts left in pages and snapshots */
    int64_t prefix_snapshots; /* state slots for snapshots, beside those of running sequences */
    int64_t prefix_every;     /* tokens from one snapshot of a sequence to the next */
    int64_t preempt_every;  /* preempt a running sequence every so many steps (tests); 0 = never */
    const char *all_reduce; /* CUDA: how ranks add up, as qv_backend_options has it */
    const char *dump;       /* file for the intermediates of the first step; empty = none */
    const char *break_rank; /* "RANK@STEP": that rank fails at that step (tests); empty = none */
} qv_engine_options;

/* A request as the engine takes it: decoded, rendered, tokenised. Made by qv_request_new on any
 * thread (the I/O thread, so that long prompts never hold up a step), then given to the engine. */
typedef struct qv_request qv_request;

/* Check a submit against the model and prepare it: chat template, tokenizer, limits, defaults from
 * generation_config.json, stop strings. `number` is the caller's name for it in every delta. `seed`
 * is used when the submit has none; sampling settings it leaves out come from
 * generation_config.json, and from the protocol where that is silent. `resume` (may be NULL):
 * streams that already delivered tokens elsewhere; each goes on after them with message number
 * `seq`, one more than the last delivered. The request copies what it needs. Any thread. On failure
 * *code is what to tell the client. Errors: ARG, FORMAT, LIMIT, UNSUPPORTED (messages without a
 * chat template), NOMEM. */
qv_status qv_request_new(const qv_engine *engine, const qv_msg_submit *submit, uint64_t number,
                         uint64_t seed, const qv_msg_resume *resume, uint32_t n_resume,
                         qv_request **out, qv_code *code);
void qv_request_free(qv_request *request);

/* --- Life ------------------------------------------------------------------------------------- */

/* Loads the model (progress through the log at info level), plans and allocates all memory, starts
 * the loader. Errors: all of qv_model_open's; LIMIT when the plan does not fit. */
qv_status qv_engine_open(const qv_engine_options *options, qv_metrics *metrics, qv_engine **out);
void qv_engine_close(qv_engine *engine);

/* Immutable facts: any thread. */
const qv_model_config *qv_engine_config(const qv_engine *engine);
/* With defaults resolved: max_context and kv_bytes are what was planned. */
const qv_engine_options *qv_engine_get_options(const qv_engine *engine);
const qv_tokenizer *qv_engine_tokenizer(const qv_engine *engine);
const qv_memory_plan *qv_engine_plan(const qv_engine *engine);
int64_t qv_engine_total_pages(const qv_engine *engine);
const char *qv_engine_device(const qv_engine *engine); /* "cpu, 2 threads, avx512, exact gemm" */

/* --- Requests --------------------------------------------------------------------------------- */

/* Take a request (ownership passes in any case). Errors are also reported as a delta with
 * error_code, so that a caller need only forward deltas. A request whose adapter is being loaded
 * waits for it. Errors: BUSY (max_running + max_waiting answers are there), NOT_FOUND (adapter),
 * FORMAT (the adapter could not be loaded), NOMEM; EXISTS (the number runs already; no delta, as it
 * would end that one). */
qv_status qv_engine_submit(qv_engine *engine, qv_request *request);

/* End a request: the next step's result ends its streams with finish_reason `reason` ("cancelled"
 * or "deadline"), and that step runs no token of them; unknown numbers are ignored. */
void qv_engine_abort(qv_engine *engine, uint64_t number, const char *reason);

/* --- Adapters --------------------------------------------------------------------------------- */

/* Load (or replace) an adapter by name: returns at once; an event tells the end. The same path
 * loading already is joined. While a name is loaded again, requests get what it named before, also
 * if that load fails. With `pin` it keeps its slot, unless that left no slot for others: the event
 * says why not. Unload: requests that run keep theirs until they end, new ones are refused. Errors:
 * ARG (name, path), UNSUPPORTED (no slots), LIMIT (too many), NOMEM; NOT_FOUND (unload). */
qv_status qv_engine_load_adapter(qv_engine *engine, const char *name, const char *dir, bool pin);
qv_status qv_engine_unload_adapter(qv_engine *engine, const char *name);

typedef enum {
    QV_ADAPTER_LOADING,
    QV_ADAPTER_READY, /* in a slot of the device, or one copy away from it */
    QV_ADAPTER_FAILED,
    QV_ADAPTER_UNLOADED
} qv_adapter_phase;

typedef struct {
    const char *name, *path, *digest, *reason; /* borrowed until the next call of qv_engine_step */
    qv_adapter_phase phase;
    qv_code code; /* of a failure */
    int32_t rank;
    uint64_t bytes, load_ms;
    bool pin;
} qv_adapter_event;

/* The adapter of this name as it is now; false: there is none. Borrowed until the next call of
 * qv_engine_step. */
bool qv_engine_find_adapter(const qv_engine *engine, const char *name, qv_adapter_event *out);

/* Every adapter known now; `each` is called once per adapter. */
void qv_engine_each_adapter(const qv_engine *engine, void (*each)(const qv_adapter_event *, void *),
                            void *user);

/* --- Steps ------------------------------------------------------------------------------------ */

/* What came of a step. Borrowed from the engine until the next step. */
typedef struct {
    const qv_msg_delta *deltas;
    uint32_t n_deltas;
    const qv_adapter_event *adapters;
    uint32_t n_adapters;
    uint32_t n_tokens; /* tokens that the step ran */
} qv_step_result;

/* Admit, plan, run, sample, commit. With nothing to run it returns at once (n_tokens 0) with
 * whatever deltas and events there are. Errors: DEVICE, INTERNAL - fatal to the process. */
qv_status qv_engine_step(qv_engine *engine, qv_step_result *result);

/* How long the device had nothing to do before the step whose results the last call gave, in
 * seconds: for benchmarks, which switch it on. NaN: not known. */
void qv_engine_watch_gaps(qv_engine *engine, bool on);
double qv_engine_gap(const qv_engine *engine);

/* True when a step would do something. False: sleep until new input or until qv_engine_fd is
 * readable. */
bool qv_engine_has_work(const qv_engine *engine);
int qv_engine_fd(const qv_engine *engine);

typedef struct {
    uint64_t steps, tokens_prefilled, tokens_decoded; /* run by steps: of prompts, of answers */
    uint64_t tokens_generated;                        /* chosen */
    uint64_t preemptions;
    int32_t running, waiting;             /* sequences */
    int32_t free_pages, free_state_slots; /* with what the prefix cache would give back */
    int32_t free_adapter_slots;           /* that hold nothing; idle adapters give way too */
    qv_prefix_stats prefix;               /* zero: switched off */
} qv_engine_stats;
void qv_engine_get_stats(const qv_engine *engine, qv_engine_stats *out);

/* Of adapters: what there is now, and what has happened since the engine was opened. */
typedef struct {
    int64_t n_names, n_versions;
    int64_t refs;        /* requests that hold a version, all versions */
    int64_t users;       /* running sequences that hold a slot */
    int64_t host_copies; /* versions with a copy in host memory */
    uint64_t host_bytes; /* of those copies */
    uint64_t slot_hits;  /* requests whose adapter was in a slot when they came; */
    uint64_t host_hits;  /* on its way there, or in host memory; */
    uint64_t misses;     /* on disk only */
    uint64_t reads;      /* of folders that began */
    uint64_t installs;   /* copies into slots that began */
    uint64_t slot_evictions, host_evictions;
} qv_adapter_stats;
void qv_engine_get_adapter_stats(const qv_engine *engine, qv_adapter_stats *out);

#endif
