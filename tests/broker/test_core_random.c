/* The core under random events: clients that submit, cancel, stall and vanish; workers that crash,
 * freeze and come back as ghosts, lose messages, refuse, and send what they should not; wishes that
 * come and go.
 *
 * A fake worker answers with tokens that follow from the request's seed, so that each client can
 * check that nothing was lost, repeated or invented, and that an answer stays with one version of
 * its adapter wherever it runs. After each event the books are checked; at the end everything must
 * have ended.
 *
 * QV_RANDOM_SEEDS and QV_RANDOM_EVENTS make it longer; a failure names its seed.
 */
#include "broker/core.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define N_CLIENTS  4
#define N_WORKERS  4
#define N_ADAPTERS 5
#define MAX_N      3
#define INBOX_MAX  100000

/* --- Messages under way -----------------------------------------------------------------------*/

typedef struct {
    size_t size;
    unsigned char data[];
} parcel;

typedef struct {
    parcel **items;
    size_t first, n, capacity;
} inbox;

static void inbox_put(inbox *box, const void *data, size_t size)
{
    if (box->n == box->capacity) {
        box->capacity = box->capacity ? 2 * box->capacity : 64;
        box->items = realloc(box->items, box->capacity * sizeof *box->items);
    }
    parcel *p = malloc(sizeof *p + size);
    p->size = size;
    memcpy(p->data, data, size);
    box->items[box->n++] = p;
}

static parcel *inbox_take(inbox *box)
{
    if (box->first == box->n) {
        box->first = box->n = 0;
        return NULL;
    }
    return box->items[box->first++];
}

static void inbox_clear(inbox *box)
{
    parcel *p;
    while ((p = inbox_take(box)) != NULL)
        free(p);
    free(box->items);
    *box = (inbox){0};
}

/* --- The simulation ---------------------------------------------------------------------------*/

/* A request as its client sees it. */
typedef struct {
    char id[48];
    uint64_t seed;
    uint32_t n, n_done;
    bool stream, delimiter, accepted, ended;
    int n_duplicates; /* refusals of the same id that are still to come */
    struct {
        int64_t next_seq;
        uint32_t n_tokens;
        int32_t version;
        bool done;
    } streams[MAX_N];
    const char *tenant; /* a literal */
} ticket;

typedef struct {
    char name[24];
    uint32_t generation;
    bool gone, busy;
    inbox box;
    qv_map *tickets; /* id → ticket, owned */
    uint32_t n_ids;
} client;

/* An attempt as the worker sees it. */
typedef struct {
    uint64_t request, seed;
    uint32_t n, n_left;
    int32_t version;
    bool aborted;
    char reason[16];
    struct {
        int64_t seq;
        uint32_t n_tokens;
        bool finished;
    } streams[MAX_N];
} attempt;

typedef struct {
    char name[24]; /* of the connection */
    char id[8];
    uint32_t generation;
    bool dead;          /* its connection is gone */
    uint64_t frozen_us; /* says and reads nothing before this */
    bool registered;
    uint64_t epoch, beat_us, ready_us;
    int64_t capacity, slots;
    bool draining;
    inbox box;
    attempt attempts[64];
    uint32_t n_attempts;
    int32_t versions[N_ADAPTERS]; /* held; 0 = not */
    int32_t loading[N_ADAPTERS];  /* asked for; 0 = not */
    uint64_t load_us[N_ADAPTERS];
    parcel *history; /* an old message to repeat */
} worker;

typedef struct {
    qv_core *core;
    qv_rng rng;
    uint64_t now_us;
    qv_arena arena, out;
    client clients[N_CLIENTS];
    worker workers[N_WORKERS];
    int32_t wanted[N_ADAPTERS]; /* version; 0 = not wanted */
    bool calm;                  /* no more faults */
    bool repeats_ids; /* not where the broker may have forgotten an id before its client */
    uint64_t n_submitted, n_ended, n_accepted, n_done, n_moved_tokens;
} sim;

static const char *const adapters[N_ADAPTERS] = {"ada", "bob", "cid", "dot", "eve"};

static bool chance(sim *s, double p)
{
    return qv_rng_uniform(&s->rng) < p;
}

static int64_t pick(sim *s, int64_t n)
{
    return qv_rng_range(&s->rng, 0, n);
}

/* The answer to a request: so many tokens, and which. The version of the adapter is in each. */
static uint64_t mix(uint64_t a, uint64_t b)
{
    qv_rng rng = qv_rng_seed(a * 31 + b);
    return qv_rng_u64(&rng);
}

static uint32_t answer_length(uint64_t seed, uint32_t index)
{
    return 1 + (uint32_t)(mix(seed, index) % 12);
}

static int32_t answer_token(uint64_t seed, uint32_t index, uint32_t pos, int32_t version)
{
    return (int32_t)(mix(seed + index, pos + 1000) & 0xffff) | version << 16;
}

/* --- What the core sends ----------------------------------------------------------------------*/

static qv_status put(sim *s, inbox *box, const qv_message *message)
{
    const void *data;
    size_t size;
    qv_arena_reset(&s->out);
    cr_assert_eq(qv_message_encode(message, &s->out, &data, &size), QV_OK, "%s", qv_error());
    cr_assert_lt(box->n, INBOX_MAX);
    inbox_put(box, data, size);
    return QV_OK;
}

static bool has_name(const qv_mq_peer *peer, const char *name)
{
    return peer->size == strlen(name) && memcmp(peer->id, name, peer->size) == 0;
}

static qv_status send_client(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    sim *s = user;
    for (int i = 0; i < N_CLIENTS; i++) {
        client *c = &s->clients[i];
        if (!has_name(peer, c->name))
            continue;
        return c->gone ? QV_ERR_NOT_FOUND : c->busy ? QV_ERR_BUSY : put(s, &c->box, message);
    }
    return QV_ERR_NOT_FOUND;
}

static qv_status send_worker(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    sim *s = user;
    for (int i = 0; i < N_WORKERS; i++) {
        worker *w = &s->workers[i];
        if (has_name(peer, w->name))
            return w->dead ? QV_ERR_NOT_FOUND : put(s, &w->box, message);
    }
    return QV_ERR_NOT_FOUND;
}

static void publish(void *user, const qv_group *group)
{
    (void)user;
    cr_assert_neq(qv_group_state(group)[0], '\0');
}

static void retract(void *user, const char *adapter)
{
    (void)user;
    cr_assert_neq(adapter[0], '\0');
}

static void event(void *user, const char *what, const char *adapter, const char *worker_id,
                  const char *why)
{
    (void)user, (void)what, (void)adapter, (void)worker_id, (void)why;
}

static void observe(void *user, qv_core_duration duration, uint64_t us)
{
    (void)user, (void)duration, (void)us;
}

static qv_mq_peer make_peer(const char *name, bool delimiter)
{
    qv_mq_peer peer = {.size = (uint8_t)strlen(name), .delimiter = delimiter};
    memcpy(peer.id, name, peer.size);
    return peer;
}

/* --- Clients ----------------------------------------------------------------------------------*/

static void from_client(sim *s, client *c, bool delimiter, const qv_message *message)
{
    const void *data;
    size_t size;
    qv_arena_reset(&s->arena);
    cr_assert_eq(qv_message_encode(message, &s->arena, &data, &size), QV_OK, "%s", qv_error());
    qv_mq_peer peer = make_peer(c->name, delimiter);
    qv_core_from_client(s->core, &peer, data, size, s->now_us);
}

static void client_connect(client *c, int i)
{
    qv_map_free(c->tickets, free);
    inbox_clear(&c->box);
    c->tickets = qv_map_new(0);
    c->gone = c->busy = false;
    snprintf(c->name, sizeof c->name, "client%d-%u", i, ++c->generation);
}

/* Come back over a new connection and ask for what was not read of the old one. */
static void client_return(sim *s, client *c, int i)
{
    inbox_clear(&c->box);
    c->gone = c->busy = false;
    snprintf(c->name, sizeof c->name, "client%d-%u", i, ++c->generation);
    c->n_ids = 0;
    QV_MAP_EACH(c->tickets, entry)
    {
        ticket *t = entry->value;
        if (t->ended || t->delimiter || t->n_duplicates > 0) {
            qv_map_remove_entry(c->tickets, entry);
            free(t);
            continue;
        }
        int32_t have[MAX_N];
        for (uint32_t k = 0; k < t->n; k++)
            have[k] = (int32_t)t->streams[k].next_seq - 1 + t->streams[k].done;
        qv_message message;
        qv_message_init(&message, QV_MSG_RESUME);
        message.resume_request.id = qv_str_from(t->id);
        qv_set(&message.resume_request, resume_request, seqs, ((qv_ints){have, t->n}));
        qv_set(&message.resume_request, resume_request, tenant, qv_str_from(t->tenant));
        from_client(s, c, false, &message);
    }
}

static ticket *any_ticket(sim *s, const client *c)
{
    int64_t n = (int64_t)qv_map_count(c->tickets);
    if (n == 0)
        return NULL;
    int64_t k = pick(s, n);
    QV_MAP_EACH(c->tickets, entry)
    if (k-- == 0)
        return entry->value;
    return NULL;
}

static void client_submit(sim *s, client *c)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    qv_msg_submit *submit = &message.submit;
    ticket *again = s->repeats_ids && chance(s, 0.03) ? any_ticket(s, c) : NULL;
    ticket *t = again;
    if (again == NULL) {
        t = calloc(1, sizeof *t);
        snprintf(t->id, sizeof t->id, "%s.%u", c->name, c->n_ids++);
        t->seed = qv_rng_u64(&s->rng) >> 1;
        t->n = chance(s, 0.2) ? (uint32_t)(1 + pick(s, MAX_N)) : 1;
        t->stream = chance(s, 0.7);
        t->delimiter = t->n == 1 && chance(s, 0.2);
        qv_map_set_str(c->tickets, t->id, t);
        s->n_submitted++;
    } else {
        t->n_duplicates++;
    }
    submit->id = qv_str_from(t->id);
    qv_set(submit, submit, prompt, qv_str_from(t->id)); /* none is like another that was poison */
    qv_set(submit, submit, seed, t->seed);
    qv_set(submit, submit, n, t->n);
    qv_set(submit, submit, stream, t->stream);
    if (chance(s, 0.6))
        qv_set(submit, submit, adapter, qv_str_from(adapters[pick(s, N_ADAPTERS)]));
    if (chance(s, 0.1))
        qv_set(submit, submit, deadline_ms, 1 + pick(s, 3000));
    if (chance(s, 0.2))
        qv_set(submit, submit, priority, pick(s, 5) - 2);
    static const char *const tenants[] = {"", "acme", "zeta"};
    if (t->tenant == NULL)
        t->tenant = tenants[pick(s, 3)];
    qv_set(submit, submit, tenant, qv_str_from(t->tenant));
    from_client(s, c, t->delimiter, &message);
}

static void client_cancel(sim *s, client *c)
{
    client *owner = chance(s, 0.9) ? c : &s->clients[pick(s, N_CLIENTS)];
    const ticket *t = any_ticket(s, owner);
    if (t == NULL)
        return;
    qv_message message;
    qv_message_init(&message, QV_MSG_CANCEL);
    message.cancel.id = qv_str_from(t->id);
    from_client(s, c, t->delimiter, &message);
}

static void client_garbage(sim *s, client *c)
{
    unsigned char bytes[64];
    size_t n = (size_t)pick(s, sizeof bytes);
    for (size_t i = 0; i < n; i++)
        bytes[i] = (unsigned char)qv_rng_u64(&s->rng);
    qv_mq_peer peer = make_peer(c->name, false);
    qv_core_from_client(s->core, &peer, bytes, n, s->now_us);
}

static void check_tokens(const ticket *t, uint32_t index, qv_ints tokens, uint32_t from,
                         int32_t *version)
{
    for (uint32_t k = 0; k < tokens.count; k++) {
        int32_t got = tokens.data[k];
        if (*version < 0)
            *version = got >> 16;
        int32_t want = answer_token(t->seed, index, from + k, *version);
        cr_assert_eq(got, want, "%s[%u]: token %u is %x, not %x", t->id, index, from + k,
                     (unsigned)got, (unsigned)want);
    }
}

static void on_tokens(ticket *t, const qv_msg_tokens *tokens)
{
    uint32_t index = (uint32_t)tokens->index;
    cr_assert(t->stream && t->accepted && index < t->n && !t->streams[index].done, "%s", t->id);
    cr_assert_eq(tokens->seq, t->streams[index].next_seq, "%s[%u]: seq %lld, not %lld", t->id,
                 index, (long long)tokens->seq, (long long)t->streams[index].next_seq);
    t->streams[index].next_seq++;
    check_tokens(t, index, tokens->tokens, t->streams[index].n_tokens, &t->streams[index].version);
    t->streams[index].n_tokens += tokens->tokens.count;
}

static void on_done(sim *s, ticket *t, const qv_msg_done *done)
{
    uint32_t index = (uint32_t)done->index;
    cr_assert(index < t->n && !t->streams[index].done && !t->ended, "%s[%u] ended twice", t->id,
              index);
    cr_assert_eq(done->seq, t->streams[index].next_seq, "%s[%u]: done has seq %lld, not %lld",
                 t->id, index, (long long)done->seq, (long long)t->streams[index].next_seq);
    if (!t->stream) {
        check_tokens(t, index, done->tokens, 0, &t->streams[index].version);
        t->streams[index].n_tokens = done->tokens.count;
    }
    if (qv_str_equal(done->finish_reason, "stop"))
        cr_assert_eq(t->streams[index].n_tokens, answer_length(t->seed, index), "%s[%u]: %u tokens",
                     t->id, index, t->streams[index].n_tokens);
    t->streams[index].done = true;
    s->n_done++;
    if (++t->n_done == t->n) {
        t->ended = true;
        s->n_ended++;
    }
}

static void on_error(sim *s, ticket *t, const qv_msg_error *error)
{
    bool is_duplicate = memmem(error->message.data, error->message.size, "in flight", 9) != NULL &&
                        qv_str_equal(error->code, "BAD_REQUEST");
    if (is_duplicate) /* or a cancel that came too late */
        return;
    if (t->ended && t->n_duplicates > 0) {
        t->n_duplicates--; /* the same id again, which was refused for another reason */
        return;
    }
    if (t->n_duplicates == 0)
        cr_assert(!t->ended, "%s ended twice: %.*s", t->id, (int)error->message.size,
                  error->message.data);
    t->ended = true;
    s->n_ended++;
}

static void client_read(sim *s, client *c)
{
    parcel *p = inbox_take(&c->box);
    if (p == NULL)
        return;
    qv_message message;
    qv_arena_reset(&s->arena);
    cr_assert_eq(qv_message_decode(p->data, p->size, QV_TO_CLIENT, NULL, &s->arena, &message),
                 QV_OK, "%s", qv_error());
    ticket *t =
        message.id.size > 0 ? qv_map_get(c->tickets, message.id.data, message.id.size) : NULL;
    switch (message.type) {
    case QV_MSG_ACCEPTED:
        cr_assert_not_null(t);
        if (t->ended && t->n_duplicates > 0) {
            /* The id was free again: the same request anew. */
            t->n_duplicates--;
            t->ended = false;
            t->n_done = 0;
            memset(t->streams, 0, sizeof t->streams);
        }
        cr_assert(!t->ended, "%s accepted after its end", t->id);
        if (message.accepted.resumed && t->accepted)
            break;
        t->accepted = true;
        for (uint32_t i = 0; i < t->n; i++)
            t->streams[i].version = -1;
        s->n_accepted++;
        break;
    case QV_MSG_TOKENS:
        cr_assert_not_null(t);
        on_tokens(t, &message.tokens);
        break;
    case QV_MSG_DONE:
        cr_assert_not_null(t);
        if (!t->accepted) { /* one reply only */
            cr_assert(t->delimiter && !t->stream, "%s", t->id);
            if (t->ended)
                t->ended = t->streams[0].done = false, t->n_done = 0;
            t->streams[0].version = -1;
        }
        on_done(s, t, &message.done);
        break;
    case QV_MSG_ERROR:
        if (t != NULL)
            on_error(s, t, &message.error);
        break;
    case QV_MSG_CANCELLED:
        break;
    default:
        cr_assert_fail("a client got `%s`", qv_message_type_name(message.type));
    }
    free(p);
}

/* --- Workers ----------------------------------------------------------------------------------*/

static void from_worker(sim *s, worker *w, const qv_message *message)
{
    const void *data;
    size_t size;
    qv_arena_reset(&s->arena);
    cr_assert_eq(qv_message_encode(message, &s->arena, &data, &size), QV_OK, "%s", qv_error());
    if (!s->calm && chance(s, 0.002))
        return; /* lost on the way */
    if (chance(s, 0.02)) {
        free(w->history);
        w->history = malloc(sizeof *w->history + size);
        w->history->size = size;
        memcpy(w->history->data, data, size);
    }
    qv_mq_peer peer = make_peer(w->name, false);
    qv_core_from_worker(s->core, &peer, data, size, s->now_us);
}

static void worker_connect(worker *w, int i)
{
    inbox_clear(&w->box);
    snprintf(w->name, sizeof w->name, "worker%d-%u", i, ++w->generation);
    snprintf(w->id, sizeof w->id, "w%d", i);
    w->dead = w->registered = w->draining = false;
    w->frozen_us = w->ready_us = 0;
    w->n_attempts = 0;
    memset(w->versions, 0, sizeof w->versions);
    memset(w->loading, 0, sizeof w->loading);
}

static const char *digest_of(int32_t version)
{
    static char text[16];
    snprintf(text, sizeof text, "v%d", version);
    return text;
}

static void worker_register(sim *s, worker *w)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_READY);
    qv_msg_ready *ready = &message.ready;
    qv_msg_held_adapter held[N_ADAPTERS] = {0};
    char digests[N_ADAPTERS][16];
    ready->worker = qv_str_from(w->id);
    ready->protocol = QV_PROTOCOL_VERSION;
    ready->model = qv_str_from("tiny");
    ready->backend = qv_str_from("cpu");
    ready->capacity = w->capacity;
    ready->adapter_slots = w->slots;
    ready->max_context = 1;
    if (w->id[1] != '0') /* one does not say which process it is */
        qv_set(ready, ready, instance, w->generation);
    ready->adapters.data = held;
    for (int i = 0; i < N_ADAPTERS; i++) {
        if (w->versions[i] == 0)
            continue;
        strcpy(digests[i], digest_of(w->versions[i]));
        qv_msg_held_adapter *h = &held[ready->adapters.count++];
        h->name = qv_str_from(adapters[i]);
        h->digest = qv_str_from(digests[i]);
        h->state = qv_str_from("ready");
    }
    w->n_attempts = 0; /* whatever it ran is forgotten */
    w->registered = false;
    w->ready_us = s->now_us;
    from_worker(s, w, &message);
}

static void worker_say(sim *s, worker *w, const qv_msg_delta *deltas, uint32_t n)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_STEP);
    message.step.epoch = w->epoch;
    message.step.deltas.data = (qv_msg_delta *)deltas;
    message.step.deltas.count = n;
    from_worker(s, w, &message);
}

static void worker_error(sim *s, worker *w, uint64_t request, const char *code)
{
    qv_msg_delta delta = {.request = request};
    qv_set(&delta, delta, error_code, qv_str_from(code));
    qv_set(&delta, delta, error_message, qv_str_from("refused"));
    worker_say(s, w, &delta, 1);
}

static int32_t find_version(const worker *w, qv_str adapter)
{
    for (int i = 0; i < N_ADAPTERS; i++)
        if (qv_str_equal(adapter, adapters[i]))
            return w->versions[i];
    return 0;
}

static void on_run(sim *s, worker *w, const qv_msg_run *run)
{
    qv_message submit;
    qv_arena arena = {0};
    cr_assert_eq(qv_message_decode(run->submit.data, run->submit.size, QV_FROM_CLIENT, NULL, &arena,
                                   &submit),
                 QV_OK);
    cr_assert_lt(w->n_attempts, w->capacity, "%s is overrun", w->id);
    bool is_base = submit.submit.adapter.size == 0;
    qv_str asked = run->adapter.size > 0 ? run->adapter : submit.submit.adapter;
    int32_t version = is_base ? 0 : find_version(w, asked);
    uint64_t request = run->request;
    if (!is_base && (version == 0 || !qv_str_equal(run->digest, digest_of(version)))) {
        worker_error(s, w, request, "ADAPTER_NOT_FOUND");
        goto end;
    }
    if (!s->calm && chance(s, 0.02)) {
        worker_error(s, w, request, chance(s, 0.5) ? "OVERLOADED" : "INTERNAL");
        goto end;
    }
    cr_assert_eq(run->seed, submit.submit.seed);
    attempt *a = &w->attempts[w->n_attempts++];
    *a = (attempt){.request = request,
                   .seed = run->seed,
                   .n = (uint32_t)submit.submit.n,
                   .n_left = (uint32_t)submit.submit.n,
                   .version = version};
    for (uint32_t i = 0; i < run->resume.count; i++) {
        const qv_msg_resume *resume = &run->resume.data[i];
        for (uint32_t k = 0; k < resume->tokens.count; k++)
            cr_assert_eq(resume->tokens.data[k],
                         answer_token(a->seed, (uint32_t)resume->index, k, version));
        a->streams[i].seq = resume->seq;
        a->streams[i].n_tokens = resume->tokens.count;
        a->streams[i].finished = resume->finished;
        a->n_left -= resume->finished;
        s->n_moved_tokens += resume->tokens.count;
    }
    cr_assert_gt(a->n_left, 0);
end:
    qv_arena_deinit(&arena);
}

static void drop_attempt(worker *w, uint32_t i)
{
    w->attempts[i] = w->attempts[--w->n_attempts];
}

static void report_adapter(sim *s, worker *w, int i, const char *state, const char *text)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_ADAPTER_STATE);
    message.adapter_state.epoch = w->epoch;
    message.adapter_state.name = qv_str_from(adapters[i]);
    message.adapter_state.state = qv_str_from(state);
    if (strcmp(state, "ready") == 0)
        qv_set(&message.adapter_state, adapter_state, digest, qv_str_from(text));
    if (strcmp(state, "failed") == 0) {
        qv_set(&message.adapter_state, adapter_state, error_code, qv_str_from(text));
        qv_set(&message.adapter_state, adapter_state, reason, qv_str_from("cannot"));
    }
    from_worker(s, w, &message);
}

/* One token of one stream, or its end; true when the attempt is over. */
static bool advance(sim *s, worker *w, attempt *a)
{
    for (uint32_t i = 0; i < a->n; i++) {
        if (a->streams[i].finished || (chance(s, 0.3) && i + 1 < a->n))
            continue;
        uint32_t length = answer_length(a->seed, i);
        uint32_t n = (uint32_t)(1 + pick(s, 3));
        if (n > length - a->streams[i].n_tokens)
            n = length - a->streams[i].n_tokens;
        int32_t tokens[4];
        for (uint32_t k = 0; k < n; k++)
            tokens[k] = answer_token(a->seed, i, a->streams[i].n_tokens + k, a->version);
        qv_msg_delta delta = {.request = a->request};
        qv_set(&delta, delta, index, i);
        qv_set(&delta, delta, seq, a->streams[i].seq);
        bool ends = a->streams[i].n_tokens + n == length && chance(s, 0.7);
        if (a->aborted) {
            n = 0;
            ends = true;
        }
        if (n > 0) {
            qv_set(&delta, delta, tokens, ((qv_ints){tokens, n}));
            qv_set(&delta, delta, text, qv_str_from("word "));
        } else {
            ends = true;
        }
        if (ends)
            qv_set(&delta, delta, finish_reason, qv_str_from(a->aborted ? a->reason : "stop"));
        a->streams[i].n_tokens += n;
        a->streams[i].seq += n > 0;
        a->streams[i].finished = ends;
        a->n_left -= ends;
        bool is_over = a->n_left == 0; /* the attempt may move while it is told */
        if (!s->calm && chance(s, 0.003))
            return is_over; /* a delta that gets lost */
        worker_say(s, w, &delta, 1);
        return is_over;
    }
    return false;
}

static void worker_read(sim *s, worker *w)
{
    parcel *p = inbox_take(&w->box);
    if (p == NULL)
        return;
    qv_message m;
    qv_arena arena = {0};
    cr_assert_eq(qv_message_decode(p->data, p->size, QV_TO_WORKER, NULL, &arena, &m), QV_OK, "%s",
                 qv_error());
    switch (m.type) {
    case QV_MSG_WELCOME:
        w->registered = true;
        w->draining = false;
        w->epoch = m.welcome.epoch;
        w->n_attempts = 0;
        break;
    case QV_MSG_UNKNOWN_SESSION:
        if (w->registered || s->now_us - w->ready_us > 500000)
            worker_register(s, w);
        break;
    case QV_MSG_RUN:
        if (m.run.epoch == w->epoch && w->registered)
            on_run(s, w, &m.run);
        break;
    case QV_MSG_ABORT:
        for (uint32_t i = 0; i < w->n_attempts; i++) {
            if (w->attempts[i].request != m.abort.request || m.abort.epoch != w->epoch)
                continue;
            w->attempts[i].aborted = true;
            snprintf(w->attempts[i].reason, sizeof w->attempts[i].reason, "%.*s",
                     (int)m.abort.reason.size, m.abort.reason.data);
        }
        break;
    case QV_MSG_LOAD_ADAPTER:
        for (int i = 0; i < N_ADAPTERS; i++) {
            if (m.load_adapter.epoch != w->epoch || !qv_str_equal(m.load_adapter.name, adapters[i]))
                continue;
            w->loading[i] = atoi(m.load_adapter.path.data + 2); /* "/v12" */
            w->versions[i] = 0;
            w->load_us[i] = s->now_us + (uint64_t)pick(s, 300000);
        }
        break;
    case QV_MSG_UNLOAD_ADAPTER:
        for (int i = 0; i < N_ADAPTERS; i++) {
            if (m.unload_adapter.epoch != w->epoch ||
                !qv_str_equal(m.unload_adapter.name, adapters[i]))
                continue;
            w->versions[i] = w->loading[i] = 0;
            report_adapter(s, w, i, "unloaded", NULL);
        }
        break;
    default:
        break;
    }
    qv_arena_deinit(&arena);
    free(p);
}

static void worker_live(sim *s, worker *w)
{
    if (w->dead || s->now_us < w->frozen_us)
        return;
    for (int64_t i = pick(s, 4); i >= 0; i--)
        worker_read(s, w);
    if (!w->registered) {
        if (s->now_us - w->ready_us > 500000)
            worker_register(s, w);
        return;
    }
    if (s->now_us - w->beat_us > 1000000) {
        qv_message message;
        qv_message_init(&message, QV_MSG_HEARTBEAT);
        message.heartbeat.epoch = w->epoch;
        if (s->calm)
            w->draining = false;
        qv_set(&message.heartbeat, heartbeat, draining, w->draining);
        qv_set(&message.heartbeat, heartbeat, running, w->n_attempts);
        qv_set(&message.heartbeat, heartbeat, waiting, 0);
        w->beat_us = s->now_us;
        from_worker(s, w, &message);
    }
    for (int i = 0; i < N_ADAPTERS; i++) {
        if (w->loading[i] == 0 || s->now_us < w->load_us[i])
            continue;
        int32_t version = w->loading[i];
        w->loading[i] = 0;
        if (!s->calm && chance(s, 0.1)) {
            report_adapter(s, w, i, "failed", chance(s, 0.5) ? "ADAPTER_INVALID" : "INTERNAL");
        } else {
            w->versions[i] = version;
            report_adapter(s, w, i, "ready", digest_of(version));
        }
    }
    for (uint32_t i = 0; i < w->n_attempts;) {
        if (advance(s, w, &w->attempts[i]))
            drop_attempt(w, i);
        else
            i++;
    }
}

static void worker_fault(sim *s, worker *w, int i)
{
    qv_message message;
    qv_mq_peer peer = make_peer(w->name, false);
    switch (pick(s, 8)) {
    case 0: /* killed, and started again */
        if (chance(s, 0.5)) {
            w->dead = true;
        } else {
            worker_connect(w, i);
            worker_register(s, w);
        }
        break;
    case 1: /* started again after a while */
        if (w->dead) {
            worker_connect(w, i);
            worker_register(s, w);
        }
        break;
    case 2: /* stopped, for long or not so long, and then a ghost */
        w->frozen_us = s->now_us + (uint64_t)pick(s, 12000000);
        break;
    case 3:
        if (w->history != NULL && !w->dead)
            qv_core_from_worker(s->core, &peer, w->history->data, w->history->size, s->now_us);
        break;
    case 4:
        if (w->registered && !w->dead && chance(s, 0.3)) {
            qv_message_init(&message, QV_MSG_GOODBYE);
            message.goodbye.epoch = w->epoch;
            w->registered = false;
            w->n_attempts = 0;
            w->ready_us = s->now_us;
            from_worker(s, w, &message);
        }
        break;
    case 5:
        w->draining = !w->draining;
        break;
    case 6:
        if (!w->dead && chance(s, 0.1))
            qv_core_from_worker(s->core, &peer, "\x81\xa4type", 6, s->now_us);
        break;
    case 7: /* it throws an adapter out by itself */
        for (int k = 0; k < N_ADAPTERS && w->registered && !w->dead; k++) {
            if (w->versions[k] == 0 || !chance(s, 0.2))
                continue;
            w->versions[k] = 0;
            report_adapter(s, w, k, "unloaded", NULL);
        }
        break;
    }
}

/* --- Wishes -----------------------------------------------------------------------------------*/

static void change_want(sim *s)
{
    int64_t i = pick(s, N_ADAPTERS);
    if (s->wanted[i] != 0 && chance(s, 0.3)) {
        s->wanted[i] = 0;
        qv_core_want(s->core, adapters[i], NULL, s->now_us);
        return;
    }
    if (chance(s, 0.1)) {
        qv_core_invalid_want(s->core, adapters[i], "replicas: no number", s->now_us);
        return;
    }
    if (s->wanted[i] == 0 || chance(s, 0.3))
        s->wanted[i] = (int32_t)(1 + pick(s, 200));
    char path[16];
    snprintf(path, sizeof path, "/v%d", s->wanted[i]);
    const char *only[] = {"w0", "w2"};
    qv_want want = {.path = path, .replicas = pick(s, 4), .pin = chance(s, 0.1)};
    qv_want_share shares[] = {{adapters[i], 1}, {adapters[pick(s, N_ADAPTERS)], 2}};
    if (chance(s, 0.2)) {
        want.split = shares;
        want.n_split = 2;
    }
    if (chance(s, 0.1))
        want.max_replicas = want.replicas + 1;
    if (chance(s, 0.1)) {
        want.workers = only;
        want.n_workers = 2;
    }
    qv_core_want(s->core, adapters[i], &want, s->now_us);
}

/* --- Runs -------------------------------------------------------------------------------------*/

static void check(const sim *s, uint64_t seed, uint64_t i)
{
    cr_assert_eq(qv_core_check(s->core), QV_OK, "seed %llu, event %llu: %s",
                 (unsigned long long)seed, (unsigned long long)i, qv_error());
}

static void one_event(sim *s)
{
    client *c = &s->clients[pick(s, N_CLIENTS)];
    int64_t i = pick(s, N_WORKERS);
    worker *w = &s->workers[i];
    int64_t dice = pick(s, 1000);
    if (dice < 150)
        client_submit(s, c);
    else if (dice < 170)
        client_cancel(s, c);
    else if (dice < 400)
        client_read(s, c);
    else if (dice < 650)
        worker_live(s, w);
    else if (dice < 660)
        worker_fault(s, w, (int)i);
    else if (dice < 664)
        change_want(s);
    else if (dice < 665)
        qv_core_order_drain(s->core, w->id, !s->calm && chance(s, 0.3), s->now_us);
    else if (dice < 670)
        c->busy = !c->busy;
    else if (dice < 671)
        c->gone = true;
    else if (dice < 680)
        client_garbage(s, c);
    else {
        s->now_us += (uint64_t)(1 + pick(s, dice < 690 ? 500 : 20)) * 1000;
        qv_core_tick(s->core, s->now_us);
    }
    if (c->gone && chance(s, 0.02)) {
        if (chance(s, 0.5))
            client_return(s, c, (int)(c - s->clients));
        else
            client_connect(c, (int)(c - s->clients));
    }
}

static int64_t total_capacity(const sim *s)
{
    int64_t capacity = 0;
    for (int i = 0; i < N_WORKERS; i++)
        capacity += s->workers[i].capacity;
    return capacity;
}

/* No more faults: everything that was accepted must end. */
static void calm_down(sim *s, uint64_t seed)
{
    s->calm = true;
    for (int i = 0; i < N_WORKERS; i++)
        qv_core_order_drain(s->core, s->workers[i].id, false, s->now_us);
    for (int i = 0; i < N_CLIENTS; i++)
        s->clients[i].busy = false;
    for (int i = 0; i < N_WORKERS; i++) {
        worker *w = &s->workers[i];
        w->frozen_us = 0;
        w->draining = false;
        if (w->dead) {
            worker_connect(w, i);
            worker_register(s, w);
        }
    }
    for (int round = 0; round < 20000; round++) {
        for (int i = 0; i < N_WORKERS; i++)
            worker_live(s, &s->workers[i]);
        for (int i = 0; i < N_CLIENTS; i++)
            while (s->clients[i].box.first < s->clients[i].box.n)
                client_read(s, &s->clients[i]);
        s->now_us += 10000;
        qv_core_tick(s->core, s->now_us);
        check(s, seed, 1000000 + (uint64_t)round);
        const qv_requests *requests = qv_core_requests(s->core);
        if (qv_core_n_jobs(s->core) == 0 && requests->n_orphans == 0 &&
            qv_core_spill_bytes(s->core) == 0 &&
            qv_core_pool(s->core)->free_credit == total_capacity(s))
            break;
    }
    for (int i = 0; i < N_CLIENTS; i++)
        while (s->clients[i].box.first < s->clients[i].box.n)
            client_read(s, &s->clients[i]);
}

/* With these seeds the broker gives clients up that do not read for long. */
static bool gives_up_clients(uint64_t seed)
{
    return seed % 2 == 1;
}

static void check_end(const sim *s, uint64_t seed)
{
    const qv_requests *requests = qv_core_requests(s->core);
    int64_t capacity = total_capacity(s);
    cr_assert_eq(qv_core_n_jobs(s->core), 0, "seed %llu: %lld requests never end",
                 (unsigned long long)seed, (long long)qv_core_n_jobs(s->core));
    cr_assert_eq(requests->bytes, 0);
    cr_assert_eq(requests->n_orphans, 0);
    cr_assert_eq(qv_core_spill_bytes(s->core), 0);
    cr_assert_eq(qv_core_pool(s->core)->free_credit, capacity, "seed %llu: credit %lld of %lld",
                 (unsigned long long)seed, (long long)qv_core_pool(s->core)->free_credit,
                 (long long)capacity);
    for (int i = 0; i < N_CLIENTS; i++) {
        if (s->clients[i].gone || gives_up_clients(seed))
            continue;
        QV_MAP_EACH(s->clients[i].tickets, entry)
        {
            const ticket *t = entry->value;
            cr_assert(t->ended || !t->accepted, "seed %llu: %s was never answered",
                      (unsigned long long)seed, t->id);
        }
    }
}

static void run(uint64_t seed, uint64_t n_events, qv_core_stats *total)
{
    sim s = {.rng = qv_rng_seed(seed), .now_us = 1000000};
    s.repeats_ids = !gives_up_clients(seed);
    qv_core_options options = qv_core_default_options();
    options.seed = seed;
    options.policy = seed % 4 == 3 ? &qv_route_least_loaded : &qv_route_affinity;
    options.requests.max_queued = 200;
    options.requests.max_queued_per_adapter = 60;
    options.requests.max_client_requests = 100;
    options.max_spill_bytes = 20000;
    options.max_total_spill_bytes = 60000;
    options.stalled_client_ms = gives_up_clients(seed) ? 3000 : INT32_MAX;
    options.max_queue_wait_ms = 20000;
    options.orphan_timeout_ms = 10000;
    options.placement.load_backoff_ms = 200;
    options.placement.load_timeout_ms = 3000;
    options.placement.surplus_ms = 500;
    options.placement.orphan_ms = 2000;
    const qv_core_actions actions = {.user = &s,
                                     .send_client = send_client,
                                     .send_worker = send_worker,
                                     .publish = publish,
                                     .retract = retract,
                                     .event = event,
                                     .observe = observe};
    cr_assert_eq(qv_core_new(&options, &actions, s.now_us, &s.core), QV_OK);
    qv_core_wants_known(s.core);
    for (int i = 0; i < N_CLIENTS; i++)
        client_connect(&s.clients[i], i);
    for (int i = 0; i < N_WORKERS; i++) {
        s.workers[i].capacity = 1 + pick(&s, 8);
        s.workers[i].slots = pick(&s, 4);
        worker_connect(&s.workers[i], i);
    }
    for (uint64_t i = 0; i < n_events; i++) {
        one_event(&s);
        check(&s, seed, i);
    }
    calm_down(&s, seed);
    check_end(&s, seed);

    const qv_core_stats *stats = qv_core_get_stats(s.core);
    total->accepted += stats->accepted;
    total->moved += stats->moved;
    total->ghosts += stats->ghosts;
    total->late += stats->late;
    total->gaps += stats->gaps;
    total->workers_lost += stats->workers_lost;
    total->clients_lost += stats->clients_lost;
    total->resumed += stats->resumed;
    total->choked += stats->choked;
    total->quarantined += stats->quarantined;
    total->tokens += s.n_moved_tokens;
    for (int i = 0; i < QV_JOB_STATE_COUNT; i++)
        total->ended[i] += stats->ended[i];
    cr_assert_eq(stats->accepted, stats->ended[QV_JOB_DONE] + stats->ended[QV_JOB_FAILED] +
                                      stats->ended[QV_JOB_CANCELLED]);
    qv_core_free(s.core);
    for (int i = 0; i < N_CLIENTS; i++) {
        inbox_clear(&s.clients[i].box);
        qv_map_free(s.clients[i].tickets, free);
    }
    for (int i = 0; i < N_WORKERS; i++) {
        inbox_clear(&s.workers[i].box);
        free(s.workers[i].history);
    }
    qv_arena_deinit(&s.arena);
    qv_arena_deinit(&s.out);
}

static uint64_t setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text != NULL ? strtoull(text, NULL, 10) : otherwise;
}

Test(core, keeps_its_promises_under_random_events, .timeout = 3600)
{
    uint64_t first = setting("QV_RANDOM_FIRST", 1);
    uint64_t n_seeds = setting("QV_RANDOM_SEEDS", 24);
    uint64_t n_events = setting("QV_RANDOM_EVENTS", 8000);
    qv_core_stats total = {0};
    for (uint64_t seed = first; seed < first + n_seeds; seed++)
        run(seed, n_events, &total);
    fprintf(stderr,
            "%llu events: %llu accepted, %llu done, %llu failed, %llu cancelled, %llu moved with "
            "%llu tokens, %llu ghosts, %llu late, %llu gaps, %llu workers and %llu clients lost, "
            "%llu resumed, %llu clients choked, %llu quarantined\n",
            (unsigned long long)(n_seeds * n_events), (unsigned long long)total.accepted,
            (unsigned long long)total.ended[QV_JOB_DONE],
            (unsigned long long)total.ended[QV_JOB_FAILED],
            (unsigned long long)total.ended[QV_JOB_CANCELLED], (unsigned long long)total.moved,
            (unsigned long long)total.tokens, (unsigned long long)total.ghosts,
            (unsigned long long)total.late, (unsigned long long)total.gaps,
            (unsigned long long)total.workers_lost, (unsigned long long)total.clients_lost,
            (unsigned long long)total.resumed, (unsigned long long)total.choked,
            (unsigned long long)total.quarantined);

    /* The faults really happened. */
    cr_assert_gt(total.moved, 10);
    cr_assert_gt(total.tokens, 10);
    cr_assert_gt(total.ghosts, 10);
    cr_assert_gt(total.late, 10);
    cr_assert_gt(total.gaps, 3);
    cr_assert_gt(total.ended[QV_JOB_DONE], 1000);
    cr_assert_gt(total.ended[QV_JOB_CANCELLED], 50);
}
