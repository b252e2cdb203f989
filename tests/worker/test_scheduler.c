/* The scheduler on scripted and drawn lists of events: no model, no clock, plan by plan. */
#include "worker/scheduler.h"

#include "tests/support.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

/* --- A pool of sequences and a table of adapters to schedule with ---------------------------- */

enum { MAX_SEQS = 256, MAX_SLOTS = 8, MAX_ADAPTERS = 16 };

/* Adapters as the scheduler sees them: which slot each is in, how many run on it. */
typedef struct {
    int32_t slot[MAX_ADAPTERS]; /* -1 = in none */
    int32_t users[MAX_ADAPTERS];
    bool loading[MAX_ADAPTERS];
    bool prefetched[MAX_ADAPTERS], must[MAX_ADAPTERS];
    bool pinned[MAX_SLOTS];
    int32_t n_slots;
} adapter_table;

typedef struct {
    qv_scheduler *scheduler;
    qv_kv_cache *pages;
    qv_state_cache *states;
    qv_prefix_cache *prefix; /* NULL: none */
    qv_prefix_scope *scope;  /* of all sequences; their tokens are all 0 */
    adapter_table adapters;
    qv_sequence seqs[MAX_SEQS];
    int32_t adapter[MAX_SEQS]; /* -1 = base */
    int32_t n_seqs;
    bool saves; /* preempted state is kept */
} world;

static world *the_world;

static int32_t adapter_of(const qv_sequence *seq)
{
    return the_world->adapter[seq - the_world->seqs];
}

/* Takes a free slot or one that nobody runs on, as an adapter cache does; a copy into it takes no
 * time unless `loading` says so. */
static int32_t acquire(void *user, qv_sequence *seq, bool must)
{
    adapter_table *t = user;
    int32_t a = adapter_of(seq);
    t->must[a] = must;
    if (t->loading[a])
        return QV_NO_SLOT_YET;
    if (t->slot[a] < 0) {
        for (int32_t slot = 0; slot < t->n_slots && t->slot[a] < 0; slot++) {
            int32_t holder = -1;
            for (int32_t other = 0; other < MAX_ADAPTERS; other++)
                if (t->slot[other] == slot)
                    holder = other;
            if (holder < 0 || (t->users[holder] == 0 && !t->pinned[slot])) {
                if (holder >= 0)
                    t->slot[holder] = -1;
                t->slot[a] = slot;
            }
        }
        if (t->slot[a] < 0)
            return QV_NO_SLOT_FREE;
    }
    t->users[a]++;
    return t->slot[a];
}

static bool prefetch(void *user, qv_sequence *seq)
{
    adapter_table *t = user;
    t->prefetched[adapter_of(seq)] = true;
    return true;
}

static void release(void *user, qv_sequence *seq)
{
    adapter_table *t = user;
    cr_assert_gt(t->users[adapter_of(seq)], 0);
    t->users[adapter_of(seq)]--;
}

static bool is_pinned(void *user, int32_t slot)
{
    adapter_table *t = user;
    return t->pinned[slot];
}

static const qv_scheduler_options defaults = {
    .max_running = 8,
    .step_tokens = 32,
    .max_logits = 32,
    .adapter_slots = 2,
    .max_overtakes = 4,
    .aging_ms = 1000,
};

static world *world_open(const qv_scheduler_options *options, int32_t n_pages, int32_t page_tokens,
                         bool with_prefix)
{
    qv_scheduler_options o = *options;
    world *w = calloc(1, sizeof *w);
    the_world = w;
    w->saves = true;
    w->adapters.n_slots = options->adapter_slots;
    for (int i = 0; i < MAX_ADAPTERS; i++)
        w->adapters.slot[i] = -1;
    cr_assert_eq(qv_kv_cache_new(n_pages, page_tokens, &w->pages), QV_OK);
    cr_assert_eq(qv_state_cache_new(options->max_running, 1 << 30, &w->states), QV_OK);
    if (with_prefix) {
        cr_assert_eq(qv_prefix_cache_new(w->pages, w->states, &w->prefix), QV_OK);
        cr_assert_eq(qv_prefix_cache_join(w->prefix, NULL, &w->scope), QV_OK);
        o.prefix = w->prefix;
    }
    qv_adapter_slots slots = {acquire, prefetch, release, is_pinned, &w->adapters};
    cr_assert_eq(qv_scheduler_new(&o, w->pages, w->states, &slots, &w->scheduler), QV_OK);
    return w;
}

static world *world_new(const qv_scheduler_options *options, int32_t n_pages, int32_t page_tokens)
{
    return world_open(options, n_pages, page_tokens, false);
}

/* Everything has ended: nothing is held any more. */
static void world_free(world *w)
{
    if (w->prefix != NULL)
        qv_prefix_cache_leave(w->prefix, w->scope);
    qv_prefix_cache_free(w->prefix);
    cr_expect_eq(qv_kv_cache_n_free(w->pages), qv_kv_cache_n_pages(w->pages));
    cr_expect_eq(qv_state_cache_n_free(w->states), qv_state_cache_n_slots(w->states));
    cr_expect_eq(qv_state_cache_swapped(w->states), 0);
    for (int i = 0; i < MAX_ADAPTERS; i++)
        cr_expect_eq(w->adapters.users[i], 0, "adapter %d", i);
    qv_scheduler_free(w->scheduler);
    qv_kv_cache_free(w->pages);
    qv_state_cache_free(w->states);
    for (int32_t i = 0; i < w->n_seqs; i++) {
        free(w->seqs[i].tokens);
        free(w->seqs[i].pages);
    }
    free(w);
}

static qv_sequence *add(world *w, int32_t n_prompt, int32_t n_answer, int32_t adapter,
                        int32_t priority, uint64_t now_ms)
{
    int32_t i = w->n_seqs++;
    cr_assert_lt(i, MAX_SEQS);
    int32_t max_tokens = n_prompt + n_answer;
    w->adapter[i] = adapter;
    w->seqs[i] = (qv_sequence){
        .state = QV_SEQ_WAITING,
        .priority = priority,
        .has_adapter = adapter >= 0,
        .scope = w->scope,
        .tokens = calloc((size_t)max_tokens, sizeof(int32_t)),
        .n_prompt = n_prompt,
        .n_tokens = n_prompt,
        .max_tokens = max_tokens,
        .pages = calloc((size_t)max_tokens, sizeof(int32_t)),
        .state_slot = -1,
        .adapter_slot = -1,
    };
    qv_scheduler_add(w->scheduler, &w->seqs[i], now_ms);
    return &w->seqs[i];
}

/* What must hold of every plan. */
static void check_plan(const world *w, const qv_plan *plan, const qv_scheduler_options *o)
{
    int32_t n_tokens = 0, n_logits = 0;
    for (int32_t i = 0; i < plan->n_items; i++) {
        const qv_plan_item *item = &plan->items[i];
        const qv_sequence *seq = item->seq;
        cr_assert(qv_sequence_is_running(seq));
        cr_assert_gt(item->n_tokens, 0);
        cr_assert_leq(item->n_tokens, qv_sequence_remaining(seq));
        cr_assert_leq(qv_kv_cache_pages_for(w->pages, seq->n_computed + item->n_tokens),
                      seq->n_pages);
        cr_assert_geq(seq->state_slot, 0);
        cr_assert_eq(seq->has_adapter, seq->adapter_slot >= 0);
        if (seq->state == QV_SEQ_PREFILL && o->prefill_chunk > 0)
            cr_assert_leq(item->n_tokens, o->prefill_chunk);
        if (i > 0)
            cr_assert_leq(plan->items[i - 1].seq->adapter_slot, seq->adapter_slot,
                          "items are sorted by adapter slot");
        n_tokens += item->n_tokens;
        n_logits += item->rows.count;
    }
    cr_assert_eq(n_tokens, plan->n_tokens);
    cr_assert_eq(n_logits, plan->n_logits);
    cr_assert_leq(n_tokens, o->step_tokens);
    cr_assert_leq(n_logits, o->max_logits);
    cr_assert_leq(plan->n_items, o->max_running);
}

/* Carry a plan out as the engine does; answers end at their full length. Returns the tokens run. */
static int32_t step(world *w, const qv_scheduler_options *o)
{
    const qv_plan *plan = qv_scheduler_plan(w->scheduler);
    check_plan(w, plan, o);
    for (int32_t i = 0; i < plan->n_preempted; i++) {
        qv_sequence *seq = plan->preempted[i].seq;
        if (w->saves && seq->n_computed > 0)
            seq->snapshot =
                qv_state_cache_save(w->states, 64, seq->n_computed, plan->preempted[i].n_pages);
        else
            seq->n_computed = 0;
    }
    for (int32_t i = 0; i < plan->n_restored; i++) {
        qv_sequence *seq = plan->restored[i];
        cr_assert_eq(seq->snapshot->n_tokens, seq->n_computed);
        qv_state_cache_drop(w->states, seq->snapshot);
        seq->snapshot = NULL;
    }
    for (int32_t i = 0; i < plan->n_loads; i++)
        cr_assert_gt(plan->loads[i].seq->n_computed, 0);
    int32_t n_tokens = plan->n_tokens;
    for (int32_t i = 0; i < plan->n_items; i++) {
        const qv_plan_item *item = &plan->items[i];
        qv_sequence *seq = item->seq;
        qv_scheduler_commit(w->scheduler, item, item->rows.choose ? 1 : QV_NO_TOKEN);
        if (w->prefix != NULL)
            qv_prefix_cache_insert(w->prefix, w->scope, seq->tokens, seq->n_computed, seq->pages,
                                   seq->n_computed % qv_kv_cache_page_tokens(w->pages) == 0);
        if (seq->n_tokens == seq->max_tokens || (seq->score_only && !qv_sequence_remaining(seq)))
            qv_scheduler_finish(w->scheduler, seq);
    }
    return n_tokens;
}

static void run_to_end(world *w, const qv_scheduler_options *o)
{
    for (int steps = 0; qv_scheduler_has_work(w->scheduler); steps++) {
        cr_assert_lt(steps, 200000, "the scheduler does not come to an end");
        step(w, o);
    }
    for (int32_t i = 0; i < w->n_seqs; i++)
        cr_expect_eq(w->seqs[i].state, QV_SEQ_FINISHED, "sequence %d is %s", i,
                     qv_seq_state_name(w->seqs[i].state));
}

/* Tokens of one sequence in the plan; 0 if it is not in it. */
static int32_t planned(const qv_plan *plan, const qv_sequence *seq)
{
    for (int32_t i = 0; i < plan->n_items; i++)
        if (plan->items[i].seq == seq)
            return plan->items[i].n_tokens;
    return 0;
}

/* --- Budget ---------------------------------------------------------------------------------- */

Test(scheduler, refuses_impossible_options)
{
    qv_scheduler *s = NULL;
    qv_adapter_slots none = {0};
    qv_scheduler_options o = defaults;
    o.step_tokens = 1;
    cr_assert_eq(qv_scheduler_new(&o, NULL, NULL, &none, &s), QV_ERR_ARG);
    o = defaults;
    o.max_logits = o.max_running - 1;
    cr_assert_eq(qv_scheduler_new(&o, NULL, NULL, &none, &s), QV_ERR_ARG);
    qv_scheduler_free(NULL);
}

Test(scheduler, has_no_work_when_empty)
{
    world *w = world_new(&defaults, 16, 16);
    cr_assert_not(qv_scheduler_has_work(w->scheduler));
    cr_assert_eq(step(w, &defaults), 0);
    world_free(w);
}

Test(scheduler, computes_a_prompt_in_chunks_and_then_decodes)
{
    qv_scheduler_options o = defaults;
    o.prefill_chunk = 7;
    world *w = world_new(&o, 16, 16);
    qv_sequence *seq = add(w, 20, 3, -1, 0, 0);
    static const int32_t tokens[] = {7, 7, 6, 1, 1};
    static const qv_seq_state states[] = {QV_SEQ_PREFILL, QV_SEQ_PREFILL, QV_SEQ_DECODE,
                                          QV_SEQ_DECODE, QV_SEQ_FINISHED};
    for (int i = 0; i < 5; i++) {
        cr_assert_eq(step(w, &o), tokens[i], "step %d", i);
        cr_assert_eq(seq->state, states[i], "step %d: %s", i, qv_seq_state_name(seq->state));
    }
    world_free(w);
}

Test(scheduler, puts_decodes_before_prompts_in_the_budget)
{
    world *w = world_new(&defaults, 64, 16);
    qv_sequence *a = add(w, 1, 50, -1, 0, 0), *b = add(w, 1, 50, -1, 0, 0);
    step(w, &defaults);
    qv_sequence *prompt = add(w, 100, 1, -1, 0, 1);
    const qv_plan *plan = qv_scheduler_plan(w->scheduler);
    cr_assert_eq(planned(plan, a), 1);
    cr_assert_eq(planned(plan, b), 1);
    cr_assert_eq(planned(plan, prompt), 30, "what is left of 32");
    for (int32_t i = 0; i < plan->n_items; i++)
        qv_scheduler_commit(w->scheduler, &plan->items[i],
                            plan->items[i].rows.choose ? 1 : QV_NO_TOKEN);
    run_to_end(w, &defaults);
    world_free(w);
}

Test(scheduler, decodes_never_starve_prompts_nor_prompts_decodes)
{
    qv_scheduler_options o = defaults;
    o.step_tokens = 4; /* fewer than the sequences that decode */
    o.max_logits = 8;
    world *w = world_new(&o, 64, 16);
    qv_sequence *decoding[6];
    for (int i = 0; i < 6; i++)
        decoding[i] = add(w, 1, 40, -1, 0, 0);
    for (int i = 0; i < 12; i++)
        step(w, &o);
    qv_sequence *prompt = add(w, 20, 1, -1, 0, 1);
    for (int i = 0; i < 20; i++)
        step(w, &o);
    cr_assert_eq(prompt->state, QV_SEQ_FINISHED, "one token of each step is kept for prompts");
    int32_t least = INT32_MAX, most = 0;
    for (int i = 0; i < 6; i++) {
        least = decoding[i]->n_tokens < least ? decoding[i]->n_tokens : least;
        most = decoding[i]->n_tokens > most ? decoding[i]->n_tokens : most;
    }
    cr_assert_leq(most - least, 2, "decoding sequences take turns: %d to %d tokens", least, most);
    run_to_end(w, &o);
    world_free(w);
}

Test(scheduler, bounds_rows_of_logits)
{
    qv_scheduler_options o = defaults;
    o.max_logits = 8;
    world *w = world_new(&o, 64, 16);
    qv_sequence *scored = add(w, 30, 2, -1, 0, 0), *plain = add(w, 20, 2, -1, 0, 0);
    scored->score_prompt = true;
    const qv_plan *plan = qv_scheduler_plan(w->scheduler);
    cr_assert_eq(planned(plan, scored), 8, "a row for each token");
    cr_assert_eq(planned(plan, plain), 19, "no row left for the last token");
    cr_assert_eq(plan->n_logits, 8);
    for (int32_t i = 0; i < plan->n_items; i++)
        qv_scheduler_commit(w->scheduler, &plan->items[i],
                            plan->items[i].rows.choose ? 1 : QV_NO_TOKEN);
    run_to_end(w, &o);
    world_free(w);
}

Test(scheduler, scores_a_prompt_without_its_last_token)
{
    world *w = world_new(&defaults, 64, 16);
    qv_sequence *seq = add(w, 10, 0, -1, 0, 0);
    seq->score_prompt = seq->score_only = true;
    cr_assert_eq(step(w, &defaults), 9);
    cr_assert_eq(seq->state, QV_SEQ_FINISHED);
    world_free(w);
}

/* --- Order ----------------------------------------------------------------------------------- */

Test(scheduler, admits_by_priority_then_arrival)
{
    qv_scheduler_options o = defaults;
    o.max_running = 1;
    static const struct {
        int32_t priority;
        uint64_t now_ms;
        int32_t rank;
    } rows[] = {
        {0, 100, 2}, {0, 200, 3}, {1, 300, 1}, {-1, 0, 4}, {5, 4000, 0}, {-1, 1, 5},
    };
    world *w = world_new(&o, 64, 16);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        add(w, 4, 1, -1, rows[i].priority, rows[i].now_ms);
    for (int32_t rank = 0; rank < w->n_seqs; rank++) {
        step(w, &o);
        for (int32_t i = 0; i < w->n_seqs; i++)
            cr_expect_eq(w->seqs[i].state == QV_SEQ_FINISHED, rows[i].rank <= rank,
                         "sequence %d at step %d", i, rank);
    }
    world_free(w);
}

Test(scheduler, a_low_priority_waits_longer_but_not_for_ever)
{
    qv_scheduler_options o = defaults;
    o.max_running = 1;
    world *w = world_new(&o, 64, 16);
    qv_sequence *low = add(w, 4, 1, -1, -10, 0);
    uint64_t now_ms = 0;
    while (low->state != QV_SEQ_FINISHED && now_ms < 100000) {
        now_ms += 500;
        add(w, 4, 1, -1, 0, now_ms); /* as many as one can run */
        step(w, &o);
    }
    cr_assert_leq(now_ms, 11000, "ten levels are worth ten seconds, it took %d ms", (int)now_ms);
    run_to_end(w, &o);
    world_free(w);
}

/* --- Admission ------------------------------------------------------------------------------- */

Test(scheduler, skips_what_does_not_fit_and_admits_what_does)
{
    world *w = world_new(&defaults, 10, 16);
    qv_sequence *running = add(w, 16, 40, -1, 0, 0);
    step(w, &defaults);
    qv_sequence *large = add(w, 150, 1, -1, 0, 1), *small = add(w, 8, 1, -1, 0, 2);
    step(w, &defaults);
    cr_assert_eq(large->state, QV_SEQ_WAITING);
    cr_assert_eq(small->state, QV_SEQ_FINISHED);
    cr_assert_eq(running->state, QV_SEQ_DECODE);
    run_to_end(w, &defaults);
    world_free(w);
}

Test(scheduler, a_large_request_is_not_overtaken_for_ever)
{
    world *w = world_new(&defaults, 10, 16);
    add(w, 16, 20, -1, 0, 0);
    step(w, &defaults);
    qv_sequence *large = add(w, 150, 1, -1, 0, 1);
    for (int i = 0; i < 40; i++) { /* small ones keep coming */
        add(w, 8, 6, -1, 0, (uint64_t)i + 2);
        step(w, &defaults);
    }
    cr_assert_leq(large->overtaken, defaults.max_overtakes + defaults.max_running);
    cr_assert_neq(large->state, QV_SEQ_WAITING, "it got its turn");
    run_to_end(w, &defaults);
    world_free(w);
}

Test(scheduler, only_what_needs_a_loading_adapter_waits)
{
    world *w = world_new(&defaults, 64, 16);
    w->adapters.loading[3] = true;
    qv_sequence *needs = add(w, 8, 2, 3, 0, 0), *base = add(w, 8, 2, -1, 0, 1),
                *other = add(w, 8, 2, 1, 0, 2);
    step(w, &defaults);
    cr_assert_eq(needs->state, QV_SEQ_WAIT_ADAPTER);
    cr_assert_eq(base->state, QV_SEQ_DECODE);
    cr_assert_eq(other->state, QV_SEQ_DECODE);
    step(w, &defaults);
    step(w, &defaults); /* the others have ended: did that help? */
    cr_assert_not(qv_scheduler_has_work(w->scheduler), "nothing to do until the load ends");
    w->adapters.loading[3] = false;
    qv_scheduler_notify(w->scheduler);
    cr_assert(qv_scheduler_has_work(w->scheduler));
    run_to_end(w, &defaults);
    world_free(w);
}

Test(scheduler, serves_more_adapters_than_slots)
{
    world *w = world_new(&defaults, 64, 16);
    for (int i = 0; i < 40; i++)
        add(w, 5 + i % 7, 1 + i % 9, i % 10, 0, (uint64_t)i);
    run_to_end(w, &defaults);
    world_free(w);
}

Test(scheduler, a_slot_drains_for_an_adapter_that_was_overtaken)
{
    qv_scheduler_options o = defaults;
    o.max_overtakes = 3;
    world *w = world_new(&o, 64, 16);
    qv_sequence *cold = NULL;
    for (int i = 0; i < 60; i++) { /* two adapters in two slots, always with something to do */
        add(w, 4, 8, i % 2, 0, (uint64_t)i);
        if (i == 4)
            cold = add(w, 4, 1, 7, 0, 4);
        step(w, &o);
    }
    cr_assert_eq(cold->state, QV_SEQ_FINISHED, "it is %s, overtaken %d times",
                 qv_seq_state_name(cold->state), cold->overtaken);
    run_to_end(w, &o);
    world_free(w);
}

Test(scheduler, only_who_was_overtaken_often_may_take_a_slot_that_others_want)
{
    qv_scheduler_options o = defaults;
    o.max_overtakes = 2;
    world *w = world_new(&o, 64, 16);
    w->adapters.loading[3] = true;
    add(w, 4, 1, 3, 0, 0);
    for (int i = 0; i < 4; i++) {
        add(w, 4, 1, -1, 0, 1);
        step(w, &o);
        cr_assert_eq(w->adapters.must[3], i >= 2, "overtaken %d times", i);
    }
    w->adapters.loading[3] = false;
    run_to_end(w, &o);
    world_free(w);
}

Test(scheduler, brings_in_the_adapters_of_those_who_are_next)
{
    static const struct {
        int32_t n_pages, n_running, n_prompt; /* of what runs, one token of an answer at a time */
        const char *what;
    } rows[] = {{64, 8, 4, "no state slot"}, {4, 1, 40, "no pages"}, {64, 1, 400, "no tokens"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        world *w = world_new(&defaults, rows[i].n_pages, 16);
        for (int k = 0; k < rows[i].n_running; k++)
            add(w, rows[i].n_prompt, 8, -1, 0, 0);
        qv_sequence *next = add(w, 20, 1, 5, 0, 1);
        add(w, 20, 1, 6, 0, 1);
        add(w, 20, 1, 7, 0, 1);
        step(w, &defaults);
        cr_expect(qv_sequence_is_queued(next), "%s", rows[i].what);
        cr_expect(w->adapters.prefetched[5], "%s", rows[i].what);
        cr_expect(w->adapters.prefetched[6], "%s", rows[i].what);
        run_to_end(w, &defaults);
        world_free(w);
    }
}

Test(scheduler, does_not_drain_a_pinned_slot)
{
    qv_scheduler_options o = defaults;
    o.max_overtakes = 0;
    world *w = world_new(&o, 64, 16);
    w->adapters.pinned[0] = true;
    add(w, 4, 4, 0, 0, 0);   /* slot 0: soon free, but pinned */
    add(w, 4, 100, 1, 0, 0); /* slot 1 */
    step(w, &o);
    add(w, 4, 1, 2, 0, 1);                        /* wants a slot and starves at once */
    qv_sequence *pinned = add(w, 4, 1, 0, 0, 2);  /* behind it, on the pinned slot */
    qv_sequence *drained = add(w, 4, 1, 1, 0, 3); /* behind it, on the one that drains */
    step(w, &o);
    cr_assert_eq(pinned->state, QV_SEQ_FINISHED);
    cr_assert_eq(drained->state, QV_SEQ_WAITING);
    run_to_end(w, &o);
    world_free(w);
}

/* --- Preemption ------------------------------------------------------------------------------ */

Test(scheduler, preempts_the_youngest_when_pages_run_out)
{
    world *w = world_new(&defaults, 4, 4);
    qv_sequence *old = add(w, 4, 8, -1, 0, 0), *young = add(w, 4, 8, -1, 0, 1);
    while (old->state != QV_SEQ_FINISHED) {
        step(w, &defaults);
        cr_assert_neq(old->state, QV_SEQ_PREEMPTED);
    }
    cr_assert_eq(qv_scheduler_n_preemptions(w->scheduler), 1);
    cr_assert_eq(young->n_preempted, 1);
    run_to_end(w, &defaults);
    world_free(w);
}

Test(scheduler, preempts_a_low_priority_before_a_young_one)
{
    world *w = world_new(&defaults, 5, 4);
    qv_sequence *low = add(w, 4, 8, -1, -5, 0), *young = add(w, 4, 8, -1, 0, 1);
    while (qv_scheduler_n_preemptions(w->scheduler) == 0 && qv_scheduler_has_work(w->scheduler))
        step(w, &defaults);
    cr_assert_eq(young->n_preempted, 0);
    cr_assert_eq(low->n_preempted, 1);
    run_to_end(w, &defaults);
    world_free(w);
}

Test(scheduler, computes_again_what_was_not_saved)
{
    world *w = world_new(&defaults, 4, 4);
    w->saves = false;
    add(w, 4, 8, -1, 0, 0);
    qv_sequence *young = add(w, 4, 8, -1, 0, 1);
    while (young->n_preempted == 0)
        step(w, &defaults);
    cr_assert_eq(young->state, QV_SEQ_PREEMPTED);
    cr_assert_eq(young->n_computed, 0);
    while (young->state == QV_SEQ_PREEMPTED)
        step(w, &defaults);
    cr_assert_eq(young->state, QV_SEQ_DECODE, "its prompt and answer ran again in one chunk");
    run_to_end(w, &defaults);
    world_free(w);
}

Test(scheduler, practises_preemption_on_everyone_and_still_ends)
{
    for (int every = 1; every <= 3; every++)
        for (int saves = 0; saves < 2; saves++) {
            qv_scheduler_options o = defaults;
            o.preempt_every = every;
            o.prefill_chunk = 3;
            world *w = world_new(&o, 64, 4);
            w->saves = saves;
            for (int i = 0; i < 12; i++)
                add(w, 1 + i, 4 + i % 5, i % 3 - 1, 0, (uint64_t)i);
            run_to_end(w, &o);
            cr_expect_geq(qv_scheduler_n_preemptions(w->scheduler), 5);
            world_free(w);
        }
}

/* --- Forks ----------------------------------------------------------------------------------- */

Test(scheduler, ends_a_chunk_where_others_fork_off_and_starts_them_there)
{
    world *w = world_new(&defaults, 64, 16);
    qv_sequence *leader = add(w, 20, 2, -1, 0, 0);
    leader->fork_at = 19;
    cr_assert_eq(step(w, &defaults), 19);

    qv_sequence *other = add(w, 20, 2, -1, 0, 0);
    other->n_computed = 19;
    other->snapshot = qv_state_cache_save(w->states, 64, 19, 2);
    const qv_plan *plan = qv_scheduler_plan(w->scheduler);
    cr_assert_eq(plan->n_restored, 1);
    cr_assert_eq(plan->restored[0], other);
    cr_assert_eq(planned(plan, leader), 1);
    cr_assert_eq(planned(plan, other), 1);
    cr_assert_eq(plan->n_logits, 2);
    qv_state_cache_drop(w->states, other->snapshot);
    other->snapshot = NULL;
    for (int32_t i = 0; i < plan->n_items; i++)
        qv_scheduler_commit(w->scheduler, &plan->items[i], 1);
    run_to_end(w, &defaults);
    world_free(w);
}

/* --- Ends in every state --------------------------------------------------------------------- */

Test(scheduler, gives_everything_back_whatever_state_a_sequence_ends_in)
{
    for (int state = 0; state < QV_SEQ_FINISHED; state++) {
        qv_scheduler_options o = defaults;
        o.prefill_chunk = 2;
        world *w = world_new(&o, 4, 4);
        qv_sequence *other = NULL, *seq;
        if (state == QV_SEQ_PREEMPTED) {
            other = add(w, 4, 8, -1, 0, 0);
            seq = add(w, 4, 8, 1, 0, 1);
            for (int i = 0; seq->state != QV_SEQ_PREEMPTED && i < 100; i++)
                step(w, &o);
        } else {
            w->adapters.loading[1] = state == QV_SEQ_WAIT_ADAPTER;
            seq = add(w, 6, 4, 1, 0, 0);
            for (int i = 0; (int)seq->state != state && i < 100; i++)
                step(w, &o);
        }
        cr_assert_eq((int)seq->state, state, "cannot reach %s", qv_seq_state_name(state));
        qv_scheduler_finish(w->scheduler, seq);
        if (other != NULL)
            qv_scheduler_finish(w->scheduler, other);
        cr_assert_eq(qv_scheduler_n_running(w->scheduler), 0);
        cr_assert_eq(qv_scheduler_n_queued(w->scheduler), 0);
        world_free(w);
    }
}

/* --- Known beginnings ------------------------------------------------------------------------ */

Test(scheduler, ends_chunks_at_pages_and_begins_where_a_snapshot_is)
{
    qv_scheduler_options o = defaults;
    o.prefill_chunk = 21;
    world *w = world_open(&o, 40, 8, true);
    qv_sequence *first = add(w, 50, 1, -1, 0, 0);
    static const int32_t chunks[] = {16, 16, 18}; /* the last one ends the prompt */
    for (int i = 0; i < 3; i++) {
        cr_expect_eq(planned(qv_scheduler_plan(w->scheduler), first), chunks[i], "chunk %d", i);
        qv_plan_item item = {.seq = first, .n_tokens = chunks[i]};
        qv_scheduler_commit(w->scheduler, &item, i < 2 ? QV_NO_TOKEN : 1);
        if (i == 1) /* of the prompt's six full pages, four end in a snapshot */
            cr_expect_geq(
                qv_prefix_cache_insert(w->prefix, w->scope, first->tokens, 32, first->pages, true),
                0);
    }
    qv_prefix_cache_insert(w->prefix, w->scope, first->tokens, 50, first->pages, false);
    qv_scheduler_finish(w->scheduler, first);

    qv_sequence *second = add(w, 90, 1, -1, 0, 0);
    const qv_plan *plan = qv_scheduler_plan(w->scheduler);
    cr_assert_eq(plan->n_loads, 1);
    cr_expect_eq(plan->loads[0].seq, second);
    cr_expect_eq(second->n_computed, 32);
    cr_expect_eq(second->pages[0], first->pages[0]);
    cr_expect_neq(second->pages[4], first->pages[4], "it writes this one");
    cr_expect_eq(planned(plan, second), 16);
    qv_scheduler_finish(w->scheduler, second);
    world_free(w);
}

Test(scheduler, ends_a_chunk_where_a_prompt_leaves_a_known_path)
{
    static const struct {
        int32_t n_same, chunk; /* tokens as before, tokens of the first chunk */
    } rows[] = {{43, 40}, {40, 40}, {39, 32}, {32, 32}, {31, 50}, {0, 50}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_scheduler_options o = defaults;
        o.step_tokens = 64;
        world *w = world_open(&o, 40, 8, true);
        qv_sequence *first = add(w, 50, 1, -1, 0, 0);
        run_to_end(w, &o);
        while (qv_prefix_cache_free_slot(w->prefix)) {
        }
        qv_sequence *second = add(w, 50, 1, -1, 0, 0);
        for (int32_t k = rows[i].n_same; k < 50; k++)
            second->tokens[k] = 7;
        cr_expect_eq(planned(qv_scheduler_plan(w->scheduler), second), rows[i].chunk,
                     "%d tokens as before", rows[i].n_same);
        cr_expect_eq(first->state, QV_SEQ_FINISHED);
        qv_scheduler_finish(w->scheduler, second);
        world_free(w);
    }
}

/* --- Drawn loads ----------------------------------------------------------------------------- */

Test(scheduler, comes_to_an_end_on_drawn_loads)
{
    uint64_t n_hits = 0; /* half of the loads run with a prefix cache */
    for (uint64_t seed = 0; seed < 60; seed++) {
        qv_rng rng = qv_rng_seed(seed);
        qv_scheduler_options o = {
            .max_running = (int32_t)qv_rng_range(&rng, 1, 12),
            .step_tokens = (int32_t)qv_rng_range(&rng, 2, 40),
            .prefill_chunk = (int32_t)qv_rng_range(&rng, 0, 10),
            .adapter_slots = (int32_t)qv_rng_range(&rng, 1, MAX_SLOTS),
            .max_overtakes = (int32_t)qv_rng_range(&rng, 0, 6),
            .aging_ms = 10,
            .preempt_every = qv_rng_range(&rng, 0, 3) * 5,
        };
        o.max_logits = o.max_running + (int32_t)qv_rng_range(&rng, 0, 8);
        int32_t page_tokens = (int32_t)qv_rng_range(&rng, 1, 9);
        world *w = world_open(&o, 60 / page_tokens + 1, page_tokens, seed % 2 > 0);
        w->saves = qv_rng_uniform(&rng) < 0.5;
        for (int i = 0; i < 120; i++) {
            if (qv_rng_uniform(&rng) < 0.6) {
                int32_t n_prompt = (int32_t)qv_rng_range(&rng, 1, 40);
                qv_sequence *seq = add(w, n_prompt, (int32_t)qv_rng_range(&rng, 1, 20),
                                       (int32_t)qv_rng_range(&rng, -1, MAX_ADAPTERS),
                                       (int32_t)qv_rng_range(&rng, -2, 3), (uint64_t)i);
                seq->score_prompt = qv_rng_uniform(&rng) < 0.3;
            }
            if (qv_rng_uniform(&rng) < 0.05) { /* cancel someone */
                qv_sequence *seq = &w->seqs[qv_rng_range(&rng, 0, w->n_seqs + 1)];
                if (seq < w->seqs + w->n_seqs && seq->state != QV_SEQ_FINISHED)
                    qv_scheduler_finish(w->scheduler, seq);
            }
            step(w, &o);
        }
        run_to_end(w, &o);
        n_hits += w->prefix != NULL ? qv_prefix_cache_stats(w->prefix).hits : 0;
        world_free(w);
    }
    cr_expect_gt(n_hits, 100);
}
