#include "worker/scheduler.h"

#include <stdlib.h>
#include <string.h>

/* Sequences that a plan looks up in the prefix cache although pages are short: sharing may make one
 * fit, but a lookup reads the whole prompt, and every sequence of a long queue may ask. */
#define MAX_PROBES 8

/* Tokens that a known path must have beyond what can be gone on from, to be worth a step that ends
 * where the sequence leaves it. */
#define MIN_BRANCH_TOKENS 32

/* A list linked through the sequences. */
typedef struct {
    qv_sequence *head, *tail;
    int32_t count;
} seq_list;

struct qv_scheduler {
    qv_scheduler_options options;
    qv_kv_cache *pages;
    qv_state_cache *states;
    qv_adapter_slots adapters;

    seq_list queue;   /* by key and order */
    seq_list prefill; /* by key and order */
    seq_list decode;  /* least recently run first */
    uint64_t n_added;
    uint64_t n_plans, n_forced, n_preemptions;
    bool retry;       /* something changed since the queue was scanned */
    int32_t n_probes; /* sequences of this plan that were looked up although pages are short */

    /* The plan, and what it is made in. */
    qv_plan plan;
    qv_plan_item *items, *sorted; /* [max_running] */
    qv_preemption *preempted;     /* [max_running] */
    qv_plan_load *loads;          /* [max_running] */
    qv_sequence **restored;       /* [max_running] */
    int32_t *slot_count;          /* [adapter_slots + 2] for the sort by slot */
    int64_t *slot_remaining; /* [adapter_slots] tokens until a slot may be free; -1 = not used */
    bool *slot_draining;     /* [adapter_slots] takes no new sequences in this plan */
};

/* --- Lists ----------------------------------------------------------------------------------- */

static void list_remove(seq_list *list, qv_sequence *seq)
{
    *(seq->prev != NULL ? &seq->prev->next : &list->head) = seq->next;
    *(seq->next != NULL ? &seq->next->prev : &list->tail) = seq->prev;
    seq->prev = seq->next = NULL;
    list->count--;
}

/* Insert behind `after`; NULL = at the head. */
static void list_insert(seq_list *list, qv_sequence *after, qv_sequence *seq)
{
    seq->prev = after;
    seq->next = after != NULL ? after->next : list->head;
    *(seq->prev != NULL ? &seq->prev->next : &list->head) = seq;
    *(seq->next != NULL ? &seq->next->prev : &list->tail) = seq;
    list->count++;
}

static void list_append(seq_list *list, qv_sequence *seq)
{
    list_insert(list, list->tail, seq);
}

/* Whether a goes before b: the order of admission, and backwards that of preemption. */
static bool goes_before(const qv_sequence *a, const qv_sequence *b)
{
    return a->key != b->key ? a->key < b->key : a->order < b->order;
}

/* Insert in order. From the tail: newcomers mostly belong there. */
static void list_insert_sorted(seq_list *list, qv_sequence *seq)
{
    qv_sequence *after = list->tail;
    while (after != NULL && goes_before(seq, after))
        after = after->prev;
    list_insert(list, after, seq);
}

/* --- Life ------------------------------------------------------------------------------------ */

static qv_status check_options(const qv_scheduler_options *o)
{
    if (o->max_running < 1 || o->step_tokens < 2 || o->prefill_chunk < 0 ||
        o->max_logits < o->max_running || o->adapter_slots < 0 || o->max_overtakes < 0 ||
        o->aging_ms < 0 || o->preempt_every < 0)
        return qv_fail(QV_ERR_ARG,
                       "scheduler: max_running %d (at least 1), step_tokens %d (at least 2), "
                       "max_logits %d (at least max_running), or a negative setting",
                       o->max_running, o->step_tokens, o->max_logits);
    return QV_OK;
}

qv_status qv_scheduler_new(const qv_scheduler_options *options, qv_kv_cache *pages,
                           qv_state_cache *states, const qv_adapter_slots *adapters,
                           qv_scheduler **out)
{
    QV_TRY(check_options(options));
    qv_scheduler *s = calloc(1, sizeof *s);
    if (s == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the scheduler");
    s->options = *options;
    s->pages = pages;
    s->states = states;
    s->adapters = *adapters;

    size_t n = (size_t)options->max_running, n_slots = (size_t)options->adapter_slots;
    s->items = calloc(n, sizeof *s->items);
    s->sorted = calloc(n, sizeof *s->sorted);
    s->preempted = calloc(n, sizeof *s->preempted);
    s->loads = calloc(n, sizeof *s->loads);
    s->restored = calloc(n, sizeof *s->restored);
    s->slot_count = calloc(n_slots + 2, sizeof *s->slot_count);
    s->slot_remaining = calloc(n_slots + 1, sizeof *s->slot_remaining);
    s->slot_draining = calloc(n_slots + 1, sizeof *s->slot_draining);
    if (s->items == NULL || s->sorted == NULL || s->preempted == NULL || s->loads == NULL ||
        s->restored == NULL || s->slot_count == NULL || s->slot_remaining == NULL ||
        s->slot_draining == NULL) {
        qv_scheduler_free(s);
        return qv_fail(QV_ERR_NOMEM, "no memory for plans of %d sequences", options->max_running);
    }
    *out = s;
    return QV_OK;
}

void qv_scheduler_free(qv_scheduler *s)
{
    if (s == NULL)
        return;
    QV_ASSERT(s->queue.count == 0 && qv_scheduler_n_running(s) == 0);
    free(s->items);
    free(s->sorted);
    free(s->preempted);
    free(s->loads);
    free(s->restored);
    free(s->slot_count);
    free(s->slot_remaining);
    free(s->slot_draining);
    free(s);
}

void qv_scheduler_add(qv_scheduler *s, qv_sequence *seq, uint64_t now_ms)
{
    QV_ASSERT(seq->state == QV_SEQ_WAIT_ADAPTER || seq->state == QV_SEQ_WAITING);
    QV_ASSERT(qv_sequence_remaining(seq) > 0);
    QV_ASSERT(qv_kv_cache_pages_for(s->pages, seq->max_tokens) <= qv_kv_cache_n_pages(s->pages));
    seq->key = (int64_t)now_ms - seq->priority * s->options.aging_ms;
    seq->order = s->n_added++;
    seq->overtaken = 0;
    list_insert_sorted(&s->queue, seq);
    s->retry = true;
}

void qv_scheduler_notify(qv_scheduler *s)
{
    s->retry = true;
}

/* --- Holdings -------------------------------------------------------------------------------- */

static seq_list *list_of(qv_scheduler *s, const qv_sequence *seq)
{
    return seq->state == QV_SEQ_PREFILL  ? &s->prefill
           : seq->state == QV_SEQ_DECODE ? &s->decode
                                         : &s->queue;
}

static void release_holdings(qv_scheduler *s, qv_sequence *seq)
{
    qv_kv_cache_release(s->pages, seq->pages, seq->n_pages);
    seq->n_pages = 0;
    qv_state_cache_release(s->states, seq->state_slot);
    seq->state_slot = -1;
    if (seq->has_adapter)
        s->adapters.release(s->adapters.user, seq);
    seq->adapter_slot = -1;
    s->retry = true;
}

void qv_scheduler_finish(qv_scheduler *s, qv_sequence *seq)
{
    list_remove(list_of(s, seq), seq);
    if (qv_sequence_is_running(seq))
        release_holdings(s, seq);
    qv_state_cache_drop(s->states, seq->snapshot);
    seq->snapshot = NULL;
    qv_sequence_apply(seq, QV_SEQ_FINISH);
}

/* --- Room ------------------------------------------------------------------------------------ */

/* Free pages and slots, and those that the prefix cache can give back. */
static int32_t n_free_pages(const qv_scheduler *s)
{
    return qv_kv_cache_n_free(s->pages) + qv_kv_cache_n_idle(s->pages);
}

static bool has_free_slot(const qv_scheduler *s)
{
    if (qv_scheduler_n_running(s) >= s->options.max_running)
        return false;
    return qv_state_cache_n_free(s->states) > 0 ||
           (s->options.prefix != NULL && qv_prefix_cache_stats(s->options.prefix).n_snapshots > 0);
}

/* Give a sequence n more pages, which are known to be free. */
static void take_pages(qv_scheduler *s, qv_sequence *seq, int32_t n)
{
    if (n > qv_kv_cache_n_free(s->pages))
        qv_prefix_cache_free_pages(s->options.prefix, n);
    bool got = qv_kv_cache_acquire(s->pages, n, seq->pages + seq->n_pages);
    QV_ASSERT(got);
    seq->n_pages += n;
}

static void take_slot(qv_scheduler *s, qv_sequence *seq)
{
    if (qv_state_cache_n_free(s->states) == 0)
        qv_prefix_cache_free_slot(s->options.prefix);
    seq->state_slot = qv_state_cache_acquire(s->states);
    QV_ASSERT(seq->state_slot >= 0);
}

/* --- Preemption ------------------------------------------------------------------------------ */

static void preempt(qv_scheduler *s, qv_sequence *seq)
{
    s->preempted[s->plan.n_preempted++] =
        (qv_preemption){.seq = seq,
                        .n_pages = qv_kv_cache_pages_for(s->pages, seq->n_computed),
                        .state_slot = seq->state_slot};
    list_remove(list_of(s, seq), seq);
    release_holdings(s, seq); /* the page numbers stay readable in seq->pages */
    qv_sequence_apply(seq, QV_SEQ_PREEMPT);
    list_insert_sorted(&s->queue, seq);
    seq->n_preempted++;
    s->n_preemptions++;
}

/* The last running sequence in the order of admission. */
static qv_sequence *last_running(const qv_scheduler *s)
{
    qv_sequence *last = s->prefill.tail;
    for (qv_sequence *seq = s->decode.head; seq != NULL; seq = seq->next)
        if (last == NULL || goes_before(last, seq))
            last = seq;
    return last;
}

/* Whether a sequence may be preempted without need. One that computes its prompt only once, or
 * computing it again could go on for ever. */
static bool can_practice_on(const qv_sequence *seq)
{
    return seq->state == QV_SEQ_DECODE || seq->n_preempted == 0;
}

/* Whether plan number n_plans is one that preempts needed or not. */
static bool is_practice(const qv_scheduler *s, uint64_t n_plans)
{
    return s->options.preempt_every > 0 && n_plans % (uint64_t)s->options.preempt_every == 0;
}

/* Preempt running sequences in turn. */
static void preempt_for_practice(qv_scheduler *s)
{
    if (!is_practice(s, s->n_plans))
        return;
    const seq_list *const running[] = {&s->decode, &s->prefill};
    int32_t n = 0;
    for (int i = 0; i < 2; i++)
        for (qv_sequence *seq = running[i]->head; seq != NULL; seq = seq->next)
            n += can_practice_on(seq);
    if (n == 0)
        return;
    int32_t victim = (int32_t)(s->n_forced++ % (uint64_t)n);
    for (int i = 0; i < 2; i++)
        for (qv_sequence *seq = running[i]->head; seq != NULL; seq = seq->next)
            if (can_practice_on(seq) && victim-- == 0) {
                preempt(s, seq);
                return;
            }
}

/* Whether an answer is as long as it may be: its last token is only not told yet. */
static bool is_complete(const qv_sequence *seq)
{
    return seq->n_tokens == seq->max_tokens;
}

/* Pages that a decoding sequence needs for its next token. */
static int32_t pages_wanted(const qv_scheduler *s, const qv_sequence *seq)
{
    if (is_complete(seq))
        return 0;
    return qv_kv_cache_pages_for(s->pages, qv_sequence_goal(seq)) - seq->n_pages;
}

static bool answers_have_room(const qv_scheduler *s)
{
    int32_t wanted = 0;
    for (const qv_sequence *seq = s->decode.head; seq != NULL; seq = seq->next)
        wanted += pages_wanted(s, seq);
    return wanted <= n_free_pages(s);
}

/* Give every decoding sequence the page that its next token needs, preempting until that works. The
 * first in order always gets it: alone, it fits. */
static void grow_answers(qv_scheduler *s)
{
    while (!answers_have_room(s))
        preempt(s, last_running(s));
    for (qv_sequence *seq = s->decode.head; seq != NULL; seq = seq->next)
        take_pages(s, seq, pages_wanted(s, seq));
}

/* --- Items ----------------------------------------------------------------------------------- */

static int32_t tokens_left(const qv_scheduler *s)
{
    return s->options.step_tokens - s->plan.n_tokens;
}

static void plan_item(qv_scheduler *s, qv_sequence *seq, int32_t n_tokens, qv_logit_rows rows)
{
    int32_t first_written = seq->pages[seq->n_computed / qv_kv_cache_page_tokens(s->pages)];
    QV_ASSERT(qv_kv_cache_refs(s->pages, first_written) == 1 &&
              !qv_kv_cache_is_kept(s->pages, first_written));
    s->items[s->plan.n_items++] = (qv_plan_item){.seq = seq, .n_tokens = n_tokens, .rows = rows};
    s->plan.n_tokens += n_tokens;
    s->plan.n_logits += rows.count;
}

/* Cut n tokens short where a chunk has to end: at a fork, at a branch and, unless the prompt ends
 * with it, at a page. */
static int32_t cut_chunk(const qv_scheduler *s, const qv_sequence *seq, int32_t n)
{
    int32_t begin = seq->n_computed, end = begin + n;
    if (s->options.prefix != NULL && seq->scope != NULL && n < qv_sequence_remaining(seq)) {
        int32_t page_end = end - end % qv_kv_cache_page_tokens(s->pages);
        if (page_end > begin)
            end = page_end;
    }
    if (begin < seq->fork_at && end > seq->fork_at)
        end = seq->fork_at;
    if (begin < seq->branch_at && end > seq->branch_at)
        end = seq->branch_at;
    return end - begin;
}

/* The next chunk of a prompt, as far as tokens and rows of logits last; 0 tokens: nothing fits. */
static void plan_chunk(qv_scheduler *s, qv_sequence *seq)
{
    int32_t n = qv_sequence_remaining(seq);
    if (s->options.prefill_chunk > 0 && n > s->options.prefill_chunk)
        n = s->options.prefill_chunk;
    if (n > tokens_left(s))
        n = tokens_left(s);
    n = cut_chunk(s, seq, n);
    int32_t max_rows = s->options.max_logits - s->plan.n_logits;
    qv_logit_rows rows = {0};
    while (n > 0 && (rows = qv_sequence_logit_rows(seq, n)).count > max_rows)
        n -= rows.count - max_rows;
    if (n > 0)
        plan_item(s, seq, n, rows);
}

/* Decoding sequences, one token each. Each goes to the end of the line, so that when they do not
 * all fit, the others are next. */
static void plan_decodes(qv_scheduler *s)
{
    bool others = s->prefill.count > 0 || s->queue.count > 0;
    int32_t share = s->options.step_tokens;
    if (others)
        share -= share / 8 > 0 ? share / 8 : 1;
    int32_t n = s->decode.count < share ? s->decode.count : share;
    for (int32_t i = 0; i < n; i++) {
        qv_sequence *seq = s->decode.head;
        if (!is_complete(seq))
            plan_item(s, seq, 1, qv_sequence_logit_rows(seq, 1));
        list_remove(&s->decode, seq);
        list_append(&s->decode, seq);
    }
}

static void plan_prefills(qv_scheduler *s)
{
    for (qv_sequence *seq = s->prefill.head; seq != NULL && tokens_left(s) > 0; seq = seq->next)
        plan_chunk(s, seq);
}

/* --- Admission ------------------------------------------------------------------------------- */

typedef enum {
    ADMITTED,
    NO_ADAPTER,      /* still loading, or its slot takes no new sequences */
    NO_ADAPTER_SLOT, /* none is free for it */
    NO_PAGES,
} admission;

/* Pages kept back from newcomers while others run, so that an answer's next page does not at once
 * preempt what was just admitted. */
static int32_t spare_pages(const qv_scheduler *s)
{
    if (qv_scheduler_n_running(s) == 0)
        return 0;
    int32_t share = qv_kv_cache_n_pages(s->pages) / 64;
    return share > 0 ? share : 1;
}

/* Hold the slot of the sequence's adapter and keep its state in step with the answer. */
static admission acquire_adapter(qv_scheduler *s, qv_sequence *seq, bool must)
{
    if (!seq->has_adapter) {
        seq->adapter_slot = -1;
        return ADMITTED;
    }
    int32_t slot = s->adapters.acquire(s->adapters.user, seq, must);
    if (slot >= 0 && s->slot_draining[slot]) {
        s->adapters.release(s->adapters.user, seq);
        return NO_ADAPTER;
    }
    if (slot < 0) {
        if (seq->state == QV_SEQ_WAITING)
            qv_sequence_apply(seq, QV_SEQ_ADAPTER_MISSING);
        return slot == QV_NO_SLOT_FREE ? NO_ADAPTER_SLOT : NO_ADAPTER;
    }
    if (seq->state == QV_SEQ_WAIT_ADAPTER)
        qv_sequence_apply(seq, QV_SEQ_ADAPTER_READY);
    seq->adapter_slot = slot;
    return ADMITTED;
}

/* What the prefix cache has of a sequence that begins from nothing. Prompt tokens whose rows are
 * still to be scored must run, and so must the last token. */
static qv_prefix_match find_prefix(const qv_scheduler *s, const qv_sequence *seq)
{
    int32_t n_known = qv_sequence_goal(seq) - 1, n_take = n_known;
    if (s->options.prefix == NULL || seq->scope == NULL || seq->n_computed > 0)
        return (qv_prefix_match){.state_slot = -1};
    if (seq->score_prompt && seq->next_score < n_take)
        n_take = seq->next_score;
    return qv_prefix_cache_find(s->options.prefix, seq->scope, seq->tokens, n_take, n_known);
}

/* Whether there is room for the sequence, given what it can share. */
static bool has_room(qv_scheduler *s, const qv_sequence *seq)
{
    int32_t n_pages = qv_kv_cache_pages_for(s->pages, qv_sequence_goal(seq));
    int32_t lacking = n_pages + spare_pages(s) - n_free_pages(s);
    if (lacking <= 0)
        return true;
    if (s->options.prefix == NULL || lacking >= n_pages || s->n_probes == MAX_PROBES)
        return false;
    s->n_probes++;
    return find_prefix(s, seq).n_held >= lacking;
}

/* Pages for the sequence: those of its beginning that are known, and free ones for the rest. */
static void begin_sequence(qv_scheduler *s, qv_sequence *seq)
{
    int32_t page_tokens = qv_kv_cache_page_tokens(s->pages);
    qv_prefix_match match = find_prefix(s, seq);
    bool looked = s->options.prefix != NULL && seq->scope != NULL && seq->n_computed == 0;
    if (looked) {
        qv_prefix_cache_take(s->options.prefix, &match, seq->pages);
        seq->n_pages = match.n_pages;
        seq->n_computed = seq->kept_at = match.n_pages * page_tokens;
        bool branches = (match.n_known - match.n_pages) * page_tokens >= MIN_BRANCH_TOKENS;
        seq->branch_at = branches ? match.n_known * page_tokens : 0;
    }
    take_pages(s, seq, qv_kv_cache_pages_for(s->pages, qv_sequence_goal(seq)) - seq->n_pages);
    take_slot(s, seq);
    if (match.n_pages > 0)
        s->loads[s->plan.n_loads++] = (qv_plan_load){.seq = seq, .from_slot = match.state_slot};
}

static admission admit(qv_scheduler *s, qv_sequence *seq, bool must)
{
    if (!has_room(s, seq))
        return NO_PAGES;
    admission adapter = acquire_adapter(s, seq, must);
    if (adapter != ADMITTED)
        return adapter;
    begin_sequence(s, seq);
    list_remove(&s->queue, seq);
    if (seq->state == QV_SEQ_WAITING) {
        qv_sequence_apply(seq, QV_SEQ_ADMIT);
    } else {
        bool decode = qv_sequence_remaining(seq) == 1 && seq->n_tokens > seq->n_prompt;
        qv_sequence_apply(seq, decode ? QV_SEQ_RESUME_DECODE : QV_SEQ_RESUME_PREFILL);
    }
    if (seq->snapshot != NULL)
        s->restored[s->plan.n_restored++] = seq;
    if (seq->state == QV_SEQ_DECODE)
        list_append(&s->decode, seq);
    else
        list_insert_sorted(&s->prefill, seq);
    return ADMITTED;
}

/* A sequence was overtaken too often while every slot was in use: let the slot that will be free
 * soonest run dry. Slots that drain already are passed over, so that two such sequences get two. */
static void drain_a_slot(qv_scheduler *s)
{
    int32_t best = -1;
    for (int32_t slot = 0; slot < s->options.adapter_slots; slot++) {
        int64_t remaining = s->slot_remaining[slot];
        if (remaining < 0 || s->slot_draining[slot] ||
            s->adapters.is_pinned(s->adapters.user, slot))
            continue;
        if (best < 0 || remaining < s->slot_remaining[best])
            best = slot;
    }
    if (best >= 0)
        s->slot_draining[best] = true;
}

static void measure_slots(qv_scheduler *s)
{
    for (int32_t slot = 0; slot < s->options.adapter_slots; slot++) {
        s->slot_remaining[slot] = -1;
        s->slot_draining[slot] = false;
    }
    const seq_list *const running[] = {&s->prefill, &s->decode};
    for (int i = 0; i < 2; i++)
        for (const qv_sequence *seq = running[i]->head; seq != NULL; seq = seq->next) {
            int64_t remaining = seq->max_tokens - seq->n_computed;
            if (seq->adapter_slot >= 0 && remaining > s->slot_remaining[seq->adapter_slot])
                s->slot_remaining[seq->adapter_slot] = remaining;
        }
}

/* Nobody can be admitted now: bring in the adapters of those who are next, so that copying them
 * overlaps with the steps until then. */
static void prefetch_adapters(qv_scheduler *s, qv_sequence *seq)
{
    for (int32_t n = s->options.adapter_slots; seq != NULL && n > 0; seq = seq->next, n--)
        if (seq->has_adapter && !s->adapters.prefetch(s->adapters.user, seq))
            return;
}

/* Scan the queue: admit what fits, skip what does not, and plan the first chunk of what came in. */
static void plan_admissions(qv_scheduler *s)
{
    bool may_prefetch = true;
    s->retry = false;
    if (s->queue.count == 0)
        return;
    measure_slots(s);
    for (qv_sequence *seq = s->queue.head, *next; seq != NULL; seq = next) {
        next = seq->next;
        if (tokens_left(s) == 0 || !has_free_slot(s)) {
            prefetch_adapters(s, seq);
            return; /* something runs, so there is a next plan */
        }
        qv_sequence *ahead = seq->prev;
        bool starving = seq->overtaken >= s->options.max_overtakes;
        switch (admit(s, seq, starving)) {
        case ADMITTED:
            for (; ahead != NULL; ahead = ahead->prev)
                ahead->overtaken++;
            plan_chunk(s, seq);
            break;
        case NO_PAGES:
            if (starving) {
                prefetch_adapters(s, seq);
                return;
            }
            if (may_prefetch && seq->has_adapter)
                may_prefetch = s->adapters.prefetch(s->adapters.user, seq);
            break;
        case NO_ADAPTER_SLOT:
            if (starving)
                drain_a_slot(s);
            break;
        case NO_ADAPTER:
            break;
        }
    }
}

/* --- Plan ------------------------------------------------------------------------------------ */

/* Stable counting sort of the items by adapter slot, base (-1) first. */
static void sort_items(qv_scheduler *s)
{
    int32_t n_slots = s->options.adapter_slots;
    memset(s->slot_count, 0, ((size_t)n_slots + 2) * sizeof *s->slot_count);
    for (int32_t i = 0; i < s->plan.n_items; i++)
        s->slot_count[s->items[i].seq->adapter_slot + 2]++;
    for (int32_t slot = 1; slot < n_slots + 2; slot++)
        s->slot_count[slot] += s->slot_count[slot - 1];
    for (int32_t i = 0; i < s->plan.n_items; i++)
        s->sorted[s->slot_count[s->items[i].seq->adapter_slot + 1]++] = s->items[i];
}

bool qv_scheduler_will_preempt(const qv_scheduler *s)
{
    return is_practice(s, s->n_plans + 1) || !answers_have_room(s);
}

const qv_plan *qv_scheduler_plan(qv_scheduler *s)
{
    s->plan = (qv_plan){
        .items = s->sorted, .preempted = s->preempted, .loads = s->loads, .restored = s->restored};
    s->n_plans++;
    s->n_probes = 0;
    preempt_for_practice(s);
    grow_answers(s);
    plan_decodes(s);
    plan_prefills(s);
    /* What was preempted must be saved before it comes back: nothing is admitted beside it. */
    if (s->plan.n_preempted == 0)
        plan_admissions(s);
    sort_items(s);
    return &s->plan;
}

void qv_scheduler_commit(qv_scheduler *s, const qv_plan_item *item, int32_t token)
{
    qv_sequence *seq = item->seq;
    qv_sequence_advance(seq, item->n_tokens);
    if (token == QV_NO_TOKEN)
        return;
    qv_sequence_append(seq, token);
    if (seq->state == QV_SEQ_PREFILL) {
        list_remove(&s->prefill, seq);
        qv_sequence_apply(seq, QV_SEQ_CAUGHT_UP);
        list_append(&s->decode, seq);
    }
}

/* --- Facts ----------------------------------------------------------------------------------- */

bool qv_scheduler_has_work(const qv_scheduler *s)
{
    return qv_scheduler_n_running(s) > 0 || (s->queue.count > 0 && s->retry);
}

int32_t qv_scheduler_n_running(const qv_scheduler *s)
{
    return s->prefill.count + s->decode.count;
}

int32_t qv_scheduler_n_queued(const qv_scheduler *s)
{
    return s->queue.count;
}

uint64_t qv_scheduler_n_preemptions(const qv_scheduler *s)
{
    return s->n_preemptions;
}
