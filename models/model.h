/* The border between the engine and a model: open a Hugging Face model directory on a backend, run
 * steps, hold adapters in slots, save and restore the state of a sequence. Opaque; no model name or
 * layer kind is known above this header.
 *
 * A qv_model belongs to the engine thread. Functions marked "any thread" may run beside a step.
 */
#ifndef QV_MODELS_MODEL_H
#define QV_MODELS_MODEL_H

#include "models/model_config.h"
#include "ops/batch.h"
#include "ops/ops.h"

typedef struct qv_model qv_model;
typedef struct qv_adapter qv_adapter;

typedef struct {
    int32_t max_tokens;  /* tokens of one step */
    int32_t max_seqs;    /* sequences of one step */
    int32_t max_logits;  /* rows of logits of one step */
    int32_t page_tokens; /* tokens of one KV page */
    int32_t n_pages;     /* KV pages */
    int32_t n_state_slots;
    int32_t n_adapter_slots; /* 0 = no adapters */
    int32_t max_lora_rank;
    bool made_up_weights;       /* from a fixed seed, in place of the checkpoint, of which only
                                 * config.json       is read: to measure sizes whose weights are not at
                                 * hand */
    int32_t max_seq_pages;      /* of one sequence; 0: no recorded steps */
    int32_t max_recorded;       /* record decode steps of up to so many sequences; 0: none */
    uint64_t max_adapter_bytes; /* largest adapter file; 0 = QV_ADAPTER_MAX_BYTES */
    /* Most memory that all adapter slots together get on demand, for pairs of routed experts and of
     * the embedding; 0 = enough for a full adapter in every slot. */
    uint64_t adapter_memory;
} qv_model_limits;

/* Default limit of an adapter file: beyond the largest adapter of any released size at rank 64. */
#define QV_ADAPTER_MAX_BYTES (UINT64_C(8) << 30)

/* Where the memory goes, in bytes, from a config and limits alone. */
typedef struct {
    uint64_t weights, kv, state, adapters, activations, total;
    uint64_t kv_page, state_slot, adapter_slot; /* one of each */
    /* What adapters takes beside the slots: the bound of what slots get on demand, and what one
     * adapter of the slots' rank on every expert and the embedding would get. */
    uint64_t adapter_memory, adapter_parts;
} qv_memory_plan;

/* Several ranks share a model: a backend and a thread each. `backends[0]` belongs to the caller's
 * thread. Backends stay the caller's and outlive the model. */
typedef struct {
    qv_backend *const *backends; /* [n_ranks] of one kind */
    int32_t n_ranks;             /* 1: no splitting */
    int32_t expert_groups;       /* as in qv_shard of models/proj.h; 1: inside every expert */
} qv_model_ranks;

/* The plan of one rank (they differ little: rank 0 has the logits). Any thread. Errors: UNSUPPORTED
 * (names what cannot be shared out), LIMIT. */
qv_status qv_model_plan_rank(const qv_model_config *config, const qv_model_ranks *ranks,
                             int32_t rank, const qv_model_limits *limits, qv_memory_plan *out);
/* The same for a model on one backend. */
qv_status qv_model_plan(const qv_model_config *config, const qv_backend *be,
                        const qv_model_limits *limits, qv_memory_plan *out);

/* Called now and then while weights load, with done and total bytes. */
typedef void qv_progress_fn(uint64_t done, uint64_t total, void *user);

/* Load every weight. Strict: a tensor that is missing, unexpected, or of the wrong shape or dtype
 * stops the load with one message that names it. Errors: NOT_FOUND, IO, FORMAT, SHAPE, UNSUPPORTED,
 * NOMEM. */
qv_status qv_model_open(const char *dir, qv_backend *be, const qv_model_limits *limits,
                        qv_progress_fn *progress, void *user, qv_model **out);
/* The same over several ranks, each of which loads its part. */
qv_status qv_model_open_ranks(const char *dir, const qv_model_ranks *ranks,
                              const qv_model_limits *limits, qv_progress_fn *progress, void *user,
                              qv_model **out);
void qv_model_close(qv_model *model);

const qv_model_config *qv_model_get_config(const qv_model *model);
const qv_model_limits *qv_model_get_limits(const qv_model *model);
/* Of rank 0, where the logits are. Borrowed. */
qv_backend *qv_model_get_backend(const qv_model *model);

/* Run one step. *logits becomes [batch->n_logits, vocab] F32 in memory of the model on the first
 * backend, valid until the next step. When a rank fails, all end, and the model is of no further
 * use. Errors: SHAPE, LIMIT, DEVICE. */
qv_status qv_model_forward(qv_model *model, const qv_batch *batch, qv_tensor *logits);

/* The same, and sample its rows: rows and results [batch->n_logits] on the host, n_valid as for
 * qv_op_sample, whose results these are. Over several ranks only rows that need all logits are
 * gathered. *sampled: QV_OK, or what qv_op_sample says of the first row that could not be sampled.
 * Errors: as forward; ARG (a parameter; names the row). */
qv_status qv_model_step(qv_model *model, const qv_batch *batch, int32_t n_valid,
                        const qv_sample_row *rows, qv_sample_result *results, qv_status *sampled);

/* Called with every named intermediate of a step (of rank 0), in order, before the next op runs: to
 * compare a pass with a reference. `layer` is -1 outside of layers; the tensor is valid during the
 * call. */
typedef void qv_probe_fn(int64_t layer, const char *name, const qv_tensor *value, void *user);

/* NULL: none, the default, which costs nothing. */
void qv_model_set_probe(qv_model *model, qv_probe_fn *probe, void *user);

/* Let rank `rank` fail at the `at_step`-th step from now (1: the next), as if its device had: for
 * tests of what happens then. Errors: ARG (no such rank, no such step). */
qv_status qv_model_break_rank(qv_model *model, int64_t rank, int64_t at_step);

/* --- Sequence state: pages and a state slot, as bytes on the host ----------------------------- */

/* Bytes that save writes for a sequence of n_tokens in n_pages pages. */
size_t qv_model_state_bytes(const qv_model *model, int32_t n_pages);
qv_status qv_model_state_save(qv_model *model, const int32_t *pages, int32_t n_pages, int32_t slot,
                              void *out);
qv_status qv_model_state_restore(qv_model *model, const int32_t *pages, int32_t n_pages,
                                 int32_t slot, const void *in);

/* Copy what slot `from` holds to slot `to`, another one, on the device and in the order of steps.
 * Pages are not touched. Errors: DEVICE. */
qv_status qv_model_state_copy(qv_model *model, int32_t from, int32_t to);

/* --- Adapters --------------------------------------------------------------------------------- */

/* Read and check an adapter directory (PEFT) against the model: every tensor must find its place,
 * every field of adapter_config.json that changes the result is honoured or refused. Any thread.
 * Errors: NOT_FOUND, IO, FORMAT, SHAPE, UNSUPPORTED, LIMIT (rank above the pool's, file too large,
 * more memory on demand than all slots may have).
 */
qv_status qv_adapter_open(const qv_model *model, const char *dir, qv_adapter **out);
void qv_adapter_close(qv_adapter *adapter);

/* 32 hex digits over the canonical content (config fields that matter and every tensor). */
const char *qv_adapter_digest(const qv_adapter *adapter);
int32_t qv_adapter_max_rank(const qv_adapter *adapter);
uint64_t qv_adapter_bytes(const qv_adapter *adapter);

/* Copy an adapter into a slot, or zero the slot. Any thread, provided that no step in flight and no
 * step to come names the slot until this has returned. Errors: DEVICE. */
qv_status qv_model_adapter_install(qv_model *model, int32_t slot, const qv_adapter *adapter);
qv_status qv_model_adapter_clear(qv_model *model, int32_t slot);
/* Made-up adapters of `rank` in every slot, on every linear layer but routers, routed experts and
 * the head: for benchmarks. */
qv_status qv_model_make_up_adapters(qv_model *model, int32_t rank);

#endif
