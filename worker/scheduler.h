/* The scheduler: which sequences run in the next step, and how many tokens of each.
 *
 * Continuous batching. Sequences that decode go first, one token each; what is left of the token
 * budget computes prompts in chunks; what is left after that admits sequences from the queue, as
 * long as pages, state slots and adapter slots last. Neither side starves the other: an eighth of
 * the budget is kept for prompts when there are any, and decoding sequences that do not fit take
 * turns.
 *
 * The queue is ordered by arrival, where one level of priority counts as aging_ms of waiting: a low
 * priority waits longer, never for ever. A sequence that cannot be admitted is skipped, so those
 * behind it go on; after max_overtakes of them it closes the door it waits at (pages: nobody behind
 * it is admitted; adapter slots: it may take an idle one that others wait for, or the one that will
 * be free soonest takes no new sequences). Adapters of sequences that wait for something else are
 * brought in meanwhile.
 *
 * When pages run out, the last in that same order is preempted: lowest priority, youngest. Pages
 * are taken for the whole prompt at admission, so only answers that grow can run out.
 *
 * With a prefix cache, a sequence that is admitted takes the pages of the longest beginning that it
 * can go on from, and chunks end at pages, so that snapshots can be taken there. What the cache
 * keeps counts as free: it gives way to sequences.
 *
 * Data in, data out: no tensors, no clock, no threads. It calls the page and slot tables and, for
 * adapters, the functions it is given. Nothing here allocates after qv_scheduler_new. Engine
 * thread.
 */
#ifndef QV_WORKER_SCHEDULER_H
#define QV_WORKER_SCHEDULER_H

#include "worker/kv_cache.h"
#include "worker/prefix_cache.h"
#include "worker/sequence.h"
#include "worker/state_cache.h"

typedef struct qv_scheduler qv_scheduler;

typedef struct {
    int32_t max_running;   /* sequences of one step, and state slots */
    int32_t step_tokens;   /* tokens of one step, at least 2 */
    int32_t prefill_chunk; /* most tokens of one prompt in a step; 0 = the budget */
    int32_t max_logits;    /* rows of logits of one step, at least max_running */
    int32_t adapter_slots;
    int32_t max_overtakes; /* admissions past a sequence before it closes its door */
    int64_t aging_ms;      /* what one level of priority is worth */
    int64_t
        preempt_every; /* preempt a running sequence every so many plans; 0 = only when needed */
    qv_prefix_cache *prefix; /* NULL: none */
} qv_scheduler_options;

/* What qv_adapter_slots.acquire says instead of a slot. */
#define QV_NO_SLOT_YET  (-2) /* on its way; ask again later */
#define QV_NO_SLOT_FREE (-3) /* every slot is in use, wanted or pinned */

/* Where adapters come from. `acquire` holds the slot of the sequence's adapter, and starts to bring
 * it there if it must; with `must` also in place of an idle one that other queued sequences want.
 * `prefetch` starts to bring in the adapter of a sequence that cannot be admitted yet, if that
 * costs nobody anything; false: there is no place for any. `release` gives one hold back. */
typedef struct {
    int32_t (*acquire)(void *user, qv_sequence *seq, bool must);
    bool (*prefetch)(void *user, qv_sequence *seq);
    void (*release)(void *user, qv_sequence *seq);
    bool (*is_pinned)(void *user, int32_t slot);
    void *user;
} qv_adapter_slots;

/* The caches are borrowed and outlive the scheduler; options->prefix may be NULL. Errors: ARG,
 * NOMEM.
 */
qv_status qv_scheduler_new(const qv_scheduler_options *options, qv_kv_cache *pages,
                           qv_state_cache *states, const qv_adapter_slots *adapters,
                           qv_scheduler **out);

/* free(NULL) is fine. Every sequence has been finished. */
void qv_scheduler_free(qv_scheduler *s);

/* Queue a sequence (WAIT_ADAPTER or WAITING); n_computed is what its snapshot holds, if it has one.
 * It must be able to fit: its max_tokens need at most all pages. `now_ms` is its arrival. */
void qv_scheduler_add(qv_scheduler *s, qv_sequence *seq, uint64_t now_ms);

/* An adapter was loaded, or failed: sequences that wait for one may go on now. */
void qv_scheduler_notify(qv_scheduler *s);

/* --- Plan ------------------------------------------------------------------------------------ */

typedef struct {
    qv_sequence *seq;
    int32_t n_tokens;   /* run positions [n_computed, n_computed + n_tokens) */
    qv_logit_rows rows; /* of them, those that need logits */
} qv_plan_item;

/* A sequence that lost its place. Its first n_pages pages and its slot still hold its state until
 * the step writes; whoever carries out the plan saves it into seq->snapshot, or sets
 * seq->n_computed to 0. */
typedef struct {
    qv_sequence *seq;
    int32_t n_pages;
    int32_t state_slot;
} qv_preemption;

/* A sequence was admitted with a beginning that was known: its first n_computed tokens are in pages
 * that it holds, and the state after them is to be copied into its slot. */
typedef struct {
    qv_sequence *seq;
    int32_t from_slot; /* may be its own: then there is nothing to copy */
} qv_plan_load;

typedef struct {
    const qv_plan_item *items; /* [n_items] by adapter slot, base first */
    int32_t n_items;
    int32_t n_tokens, n_logits; /* of all items */
    const qv_preemption *preempted;
    int32_t n_preempted;
    const qv_plan_load *loads; /* in order: a slot is read before a later load writes it */
    int32_t n_loads;
    qv_sequence *const *restored; /* admitted: load seq->snapshot into its pages and slot */
    int32_t n_restored;
} qv_plan;

/* Whether the next plan may preempt. To plan a step before the one before has been read, all tokens
 * of running sequences but the last must be known, and of those that are preempted the last too. */
bool qv_scheduler_will_preempt(const qv_scheduler *s);

/* Plan the next step. To be carried out in the order: save what is preempted, load, restore, run
 * the items, then commit or finish each item's sequence. Borrowed until the next call. */
const qv_plan *qv_scheduler_plan(qv_scheduler *s);

/* The step ran this item. `token` is what was chosen, or stands for it until it is settled
 * (worker/sequence.h): a sequence whose answer has its full length then is not planned any more. */
#define QV_NO_TOKEN INT32_MIN /* its rows chose none */
void qv_scheduler_commit(qv_scheduler *s, const qv_plan_item *item, int32_t token);

/* End a sequence in whatever state; what it holds is given back. */
void qv_scheduler_finish(qv_scheduler *s, qv_sequence *seq);

/* --- Facts ----------------------------------------------------------------------------------- */

/* False when planning again would change nothing until something is added, finished or notified. */
bool qv_scheduler_has_work(const qv_scheduler *s);
int32_t qv_scheduler_n_running(const qv_scheduler *s);
int32_t qv_scheduler_n_queued(const qv_scheduler *s);
uint64_t qv_scheduler_n_preemptions(const qv_scheduler *s);

#endif
