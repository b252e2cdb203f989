#include "bench/simulator.h"

#include "common/clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MS            UINT64_C(1000)
#define SECOND        UINT64_C(1000000)
#define TICK_US       (10 * MS)
#define MAX_WORKERS   256
#define MAX_CAPACITY  256
#define MAX_ADAPTERS  4096
#define STEP_TOKENS   8 /* of each sequence, a step */
#define STEP_US       (60 * MS)
#define STEP_SEQ_US   700  /* more for each sequence */
#define STEP_TOKEN_US 25   /* more for each prompt token */
#define CHUNK         2048 /* prompt tokens of a step */
#define ANSWER_MEAN   48
#define PREFIX_BYTES  1024 /* shared beginning of half of the prompts */
#define N_PREFIXES    16   /* of each adapter */
#define CACHED        512  /* prefixes that a worker keeps */
#define LOAD_US       (250 * MS)

const char *const qv_sim_workload_names[] = {"steady", "diurnal", "flash", NULL};

qv_sim_options qv_sim_default_options(void)
{
    return (qv_sim_options){.seed = 1,
                            .policy = &qv_route_score,
                            .n_requests = 100000,
                            .load = 0.75,
                            .n_workers = 16,
                            .capacity = 32,
                            .slots = 12,
                            .n_adapters = 150,
                            .zipf = 1.0,
                            .n_tenants = 4,
                            .flood = 2,
                            .faults = true};
}

/* --- Chance -----------------------------------------------------------------------------------*/

static uint64_t mix(uint64_t z)
{
    z += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* --- State ------------------------------------------------------------------------------------*/

typedef struct {
    uint64_t at_us;
    uint32_t kind, index;
    uint64_t extra;
} sim_event;

enum { EVENT_TICK, EVENT_ARRIVAL, EVENT_STEP, EVENT_BEAT, EVENT_LOADED, EVENT_FAULT, EVENT_JOIN };

/* A request as its client sees it. */
typedef struct {
    uint64_t seed, submitted_us;
    uint32_t n_tokens, next_seq;
    uint16_t adapter;
    uint8_t tenant;
    bool accepted, ended;
} ticket;

/* An attempt as its worker sees it. */
typedef struct {
    uint64_t request, seed;
    int64_t seq;
    uint32_t n_tokens, length, prompt_left, prompt, cached;
    bool in_step; /* of the step that runs; later ones wait for the next */
    bool aborted;
} attempt;

typedef struct {
    char id[16], peer[24];
    uint32_t generation;
    bool dead, vanished, registered, stepping;
    uint64_t epoch, frozen_us;
    uint32_t n_attempts;
    attempt attempts[MAX_CAPACITY];
    unsigned char held[MAX_ADAPTERS]; /* 0, loading = 1, ready = 2 */
    uint64_t cache[CACHED];           /* prefixes, by hash */
} worker;

typedef struct {
    float *data;
    size_t n, capacity;
} samples;

typedef struct {
    qv_sim_options options;
    qv_sim_result *result;
    qv_core *core;
    uint64_t random[3]; /* of arrivals, faults and loads: each policy meets the same ones */
    uint64_t now_us, end_us;
    qv_arena arena, in;
    sim_event *heap;
    size_t n_heap, heap_capacity;
    ticket *tickets; /* [n_requests] */
    uint64_t n_tickets;
    double *popularity; /* [n_adapters] cumulative */
    double rate;
    worker *workers; /* [MAX_WORKERS] */
    int32_t n_workers, n_dead;
    samples by_class[QV_SIM_CLASSES], by_tenant[QV_SIM_MAX_TENANTS];
    uint64_t n_with_adapter, n_hits, n_repeated, n_prefix_hits;
    double imbalance, n_imbalance;
    double served[QV_SIM_MAX_TENANTS];  /* at the last second */
    double backlog[QV_SIM_MAX_TENANTS]; /* served while all waited */
    double contended_s;
    bool all_waited;
    uint64_t ended, second_us;
    bool calm; /* no more faults */
    bool out_of_memory;
} sim;

typedef enum { CHANCE_ARRIVALS, CHANCE_FAULTS, CHANCE_LOADS } sim_chance;

static uint64_t draw(sim *s, sim_chance chance)
{
    return mix(++s->random[chance]);
}

static double uniform(sim *s, sim_chance chance)
{
    return (double)(draw(s, chance) >> 11) * 0x1.0p-53;
}

static uint64_t pick(sim *s, sim_chance chance, uint64_t n)
{
    return draw(s, chance) % n;
}

/* --- Events -----------------------------------------------------------------------------------*/

static void schedule(sim *s, uint64_t at_us, uint32_t kind, uint32_t index, uint64_t extra)
{
    if (s->n_heap == s->heap_capacity) {
        size_t capacity = s->heap_capacity ? 2 * s->heap_capacity : 1024;
        sim_event *heap = realloc(s->heap, capacity * sizeof *heap);
        if (heap == NULL) {
            s->out_of_memory = true;
            return;
        }
        s->heap = heap;
        s->heap_capacity = capacity;
    }
    size_t i = s->n_heap++;
    for (; i > 0 && s->heap[(i - 1) / 2].at_us > at_us; i = (i - 1) / 2)
        s->heap[i] = s->heap[(i - 1) / 2];
    s->heap[i] = (sim_event){at_us, kind, index, extra};
}

static sim_event next_event(sim *s)
{
    sim_event first = s->heap[0], last = s->heap[--s->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= s->n_heap)
            break;
        if (child + 1 < s->n_heap && s->heap[child + 1].at_us < s->heap[child].at_us)
            child++;
        if (s->heap[child].at_us >= last.at_us)
            break;
        s->heap[i] = s->heap[child];
        i = child;
    }
    if (s->n_heap > 0)
        s->heap[i] = last;
    return first;
}

static void add_sample(sim *s, samples *list, double value)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 1024;
        float *data = realloc(list->data, capacity * sizeof *data);
        if (data == NULL) {
            s->out_of_memory = true;
            return;
        }
        list->data = data;
        list->capacity = capacity;
    }
    list->data[list->n++] = (float)value;
}

/* --- Answers ----------------------------------------------------------------------------------*/

static uint32_t answer_length(uint64_t seed)
{
    return 1 + (uint32_t)(mix(seed) % (2 * ANSWER_MEAN));
}

static int32_t answer_token(uint64_t seed, uint32_t pos)
{
    return (int32_t)(mix(seed + pos) & 0x7fffffff);
}

/* --- Clients ----------------------------------------------------------------------------------*/

static qv_sim_class class_of(const sim *s, uint16_t adapter)
{
    int32_t n = s->options.n_adapters;
    return adapter < (n + 9) / 10 ? QV_SIM_HEAD : adapter < n / 2 ? QV_SIM_MIDDLE : QV_SIM_TAIL;
}

static void end_ticket(sim *s, ticket *t)
{
    if (t->ended) {
        s->result->duplicated++;
        return;
    }
    t->ended = true;
    s->ended++;
}

static void on_tokens(sim *s, ticket *t, const qv_msg_tokens *tokens)
{
    if (t->n_tokens == 0 && tokens->tokens.count > 0) {
        double ms = (double)(s->now_us - t->submitted_us) / MS;
        add_sample(s, &s->by_class[class_of(s, t->adapter)], ms);
        add_sample(s, &s->by_tenant[t->tenant], ms);
    }
    if (tokens->seq < t->next_seq || t->ended)
        s->result->duplicated += tokens->tokens.count;
    else if (tokens->seq > t->next_seq)
        s->result->lost++;
    t->next_seq = (uint32_t)tokens->seq + 1;
    for (uint32_t i = 0; i < tokens->tokens.count; i++)
        s->result->wrong += tokens->tokens.data[i] != answer_token(t->seed, t->n_tokens + i);
    t->n_tokens += tokens->tokens.count;
}

static qv_status send_client(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    (void)peer;
    sim *s = user;
    const qv_str *id = message->type == QV_MSG_ACCEPTED ? &message->accepted.id
                       : message->type == QV_MSG_TOKENS ? &message->tokens.id
                       : message->type == QV_MSG_DONE   ? &message->done.id
                                                        : &message->error.id;
    char text[24];
    snprintf(text, sizeof text, "%.*s", (int)id->size, id->data);
    ticket *t = &s->tickets[strtoull(text, NULL, 10)];
    switch (message->type) {
    case QV_MSG_ACCEPTED:
        t->accepted = true;
        break;
    case QV_MSG_TOKENS:
        on_tokens(s, t, &message->tokens);
        break;
    case QV_MSG_DONE: {
        uint32_t length = answer_length(t->seed);
        if (t->n_tokens < length)
            s->result->lost += length - t->n_tokens;
        s->result->done++;
        end_ticket(s, t);
        break;
    }
    default:
        s->result->failed += t->accepted;
        s->result->refused += !t->accepted;
        end_ticket(s, t);
        break;
    }
    return QV_OK;
}

static double rate_now(const sim *s)
{
    double part = (double)s->now_us / (double)s->end_us;
    if (s->options.workload == QV_SIM_DIURNAL)
        return s->rate * (1 + 0.6 * sin(part * 4 * 3.14159265358979));
    return s->rate;
}

static uint16_t pick_adapter(sim *s)
{
    double part = (double)s->now_us / (double)s->end_us;
    bool is_flash = s->options.workload == QV_SIM_FLASH && part > 0.4 && part < 0.6;
    if (is_flash && uniform(s, CHANCE_ARRIVALS) < 0.4)
        return (uint16_t)(s->options.n_adapters - 1); /* the coldest of all */
    double u = uniform(s, CHANCE_ARRIVALS) * s->popularity[s->options.n_adapters - 1];
    int32_t low = 0, high = s->options.n_adapters - 1;
    while (low < high) {
        int32_t middle = (low + high) / 2;
        if (s->popularity[middle] < u)
            low = middle + 1;
        else
            high = middle;
    }
    return (uint16_t)low;
}

static qv_mq_peer make_peer(const char *name)
{
    qv_mq_peer peer = {.size = (uint8_t)strlen(name)};
    memcpy(peer.id, name, peer.size);
    return peer;
}

static void to_core(sim *s, const char *from, bool is_client, const qv_message *message)
{
    const void *data;
    size_t size;
    qv_arena_reset(&s->arena);
    if (qv_message_encode(message, &s->arena, &data, &size) != QV_OK) {
        s->out_of_memory = true;
        return;
    }
    qv_mq_peer peer = make_peer(from);
    s->result->events++;
    if (is_client)
        qv_core_from_client(s->core, &peer, data, size, s->now_us);
    else
        qv_core_from_worker(s->core, &peer, data, size, s->now_us);
}

/* A prompt is the number of its prefix (0 = none of its own) and, behind that, bytes. */
static size_t make_prompt(sim *s, char *out, size_t size, uint16_t adapter, uint64_t serial)
{
    uint64_t prefix =
        uniform(s, CHANCE_ARRIVALS) < 0.5 ? 1 + pick(s, CHANCE_ARRIVALS, N_PREFIXES) : 0;
    size_t n = (size_t)snprintf(out, size, "%02llu", (unsigned long long)prefix);
    memset(out + n, 'a' + (int)(mix(adapter * 100 + prefix) % 26), PREFIX_BYTES - n);
    if (prefix == 0) /* nobody sees it again */
        snprintf(out + n, size - n, "%llu", (unsigned long long)serial);
    return PREFIX_BYTES + pick(s, CHANCE_ARRIVALS, 512);
}

static void submit(sim *s)
{
    char id[24], adapter[16], tenant[16], prompt[PREFIX_BYTES + 1024];
    uint64_t serial = s->n_tickets++;
    ticket *t = &s->tickets[serial];
    t->adapter = pick_adapter(s);
    double others = (double)(s->options.n_tenants - 1);
    bool floods =
        others == 0 || uniform(s, CHANCE_ARRIVALS) < s->options.flood / (1 + s->options.flood);
    t->tenant = floods ? 0 : (uint8_t)(1 + pick(s, CHANCE_ARRIVALS, (uint64_t)others));
    t->seed = draw(s, CHANCE_ARRIVALS) >> 1;
    t->submitted_us = s->now_us;
    snprintf(id, sizeof id, "%llu", (unsigned long long)serial);
    snprintf(adapter, sizeof adapter, "a%u", t->adapter);
    snprintf(tenant, sizeof tenant, "t%u", t->tenant);
    memset(prompt, 'x', sizeof prompt);
    size_t n = make_prompt(s, prompt, sizeof prompt, t->adapter, serial);

    const qv_group *group = qv_pool_find_group(qv_core_pool(s->core), adapter, strlen(adapter));
    s->n_with_adapter++;
    s->n_hits += group != NULL && group->n_ready > 0;
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    message.submit.id = qv_str_from(id);
    qv_set(&message.submit, submit, prompt, ((qv_str){prompt, (uint32_t)n}));
    qv_set(&message.submit, submit, adapter, qv_str_from(adapter));
    qv_set(&message.submit, submit, tenant, qv_str_from(tenant));
    qv_set(&message.submit, submit, seed, t->seed);
    qv_set(&message.submit, submit, max_tokens, 2 * ANSWER_MEAN);
    s->result->submitted++;
    to_core(s, tenant, true, &message);
}

/* --- Workers ----------------------------------------------------------------------------------*/

static worker *find_worker(sim *s, const qv_mq_peer *peer)
{
    char name[24];
    snprintf(name, sizeof name, "%.*s", (int)peer->size, (const char *)peer->id);
    uint64_t i = strtoull(name + 1, NULL, 10); /* "w3-2" */
    worker *w = i < MAX_WORKERS ? &s->workers[i] : NULL;
    return w != NULL && strcmp(w->peer, name) == 0 ? w : NULL;
}

static void start_step(sim *s, worker *w)
{
    if (w->stepping || w->n_attempts == 0)
        return;
    uint32_t prompt = 0, sequences = 0;
    for (uint32_t i = 0; i < w->n_attempts; i++) {
        prompt += w->attempts[i].prompt_left;
        w->attempts[i].in_step = true;
        sequences++;
    }
    prompt = prompt < CHUNK ? prompt : CHUNK;
    uint64_t us = STEP_US + STEP_SEQ_US * (uint64_t)sequences + STEP_TOKEN_US * (uint64_t)prompt;
    uint64_t from = w->frozen_us > s->now_us ? w->frozen_us : s->now_us;
    w->stepping = true;
    schedule(s, from + us, EVENT_STEP, (uint32_t)(w - s->workers), w->generation);
}

static uint32_t read_number(qv_str text)
{
    char buffer[16];
    snprintf(buffer, sizeof buffer, "%.*s", (int)text.size, text.data);
    return (uint32_t)strtoul(buffer, NULL, 10);
}

static uint32_t adapter_number(qv_str name)
{
    return name.size > 1 ? read_number((qv_str){name.data + 1, name.size - 1}) : MAX_ADAPTERS;
}

/* Whether the worker has the prompt's beginning; it does from now on. */
static bool is_cached(sim *s, worker *w, uint32_t adapter, qv_str prompt)
{
    uint32_t prefix = read_number((qv_str){prompt.data, 2});
    if (prefix == 0)
        return false;
    uint64_t hash = mix((uint64_t)adapter << 32 | prefix);
    uint64_t *slot = &w->cache[hash % CACHED];
    bool is_hit = *slot == hash;
    *slot = hash;
    s->n_repeated++;
    s->n_prefix_hits += is_hit;
    return is_hit;
}

static void on_run(sim *s, worker *w, const qv_msg_run *run)
{
    qv_message message;
    qv_arena_reset(&s->in);
    if (qv_message_decode(run->submit.data, run->submit.size, QV_FROM_CLIENT, NULL, &s->in,
                          &message) != QV_OK ||
        w->n_attempts == MAX_CAPACITY)
        return;
    const qv_msg_submit *submitted = &message.submit;
    uint32_t adapter = adapter_number(submitted->adapter);
    uint32_t prompt = submitted->prompt.size / 4;
    attempt *a = &w->attempts[w->n_attempts++];
    *a = (attempt){.request = run->request,
                   .seed = run->seed,
                   .length = answer_length(run->seed),
                   .prompt = prompt};
    a->cached = is_cached(s, w, adapter, submitted->prompt) ? PREFIX_BYTES / 4 : 0;
    a->prompt_left = prompt - a->cached;
    if (run->resume.count > 0) {
        a->seq = run->resume.data[0].seq;
        a->n_tokens = run->resume.data[0].tokens.count;
    }
    start_step(s, w);
}

static void on_load(sim *s, worker *w, const qv_msg_load_adapter *load)
{
    uint32_t adapter = adapter_number(load->name);
    if (adapter >= MAX_ADAPTERS)
        return;
    double slow =
        s->options.faults && uniform(s, CHANCE_LOADS) < 0.05 ? 12 : 0.5 + uniform(s, CHANCE_LOADS);
    w->held[adapter] = 1;
    schedule(s, s->now_us + (uint64_t)(slow * LOAD_US), EVENT_LOADED, (uint32_t)(w - s->workers),
             (uint64_t)w->generation << 16 | adapter);
}

/* No answer at once: the core may not be called from its actions. */
static qv_status send_worker(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    sim *s = user;
    worker *w = find_worker(s, peer);
    if (w == NULL || w->dead)
        return w != NULL && w->vanished ? QV_OK : QV_ERR_NOT_FOUND;
    switch (message->type) {
    case QV_MSG_WELCOME:
        w->epoch = message->welcome.epoch;
        w->registered = true;
        break;
    case QV_MSG_UNKNOWN_SESSION: /* it was given up: it starts over */
        w->registered = false;
        w->n_attempts = 0;
        break;
    case QV_MSG_RUN:
        if (w->registered && message->run.epoch == w->epoch)
            on_run(s, w, &message->run);
        break;
    case QV_MSG_ABORT:
        for (uint32_t i = 0; i < w->n_attempts; i++)
            if (w->attempts[i].request == message->abort.request)
                w->attempts[i].aborted = true;
        break;
    case QV_MSG_LOAD_ADAPTER:
        on_load(s, w, &message->load_adapter);
        break;
    case QV_MSG_UNLOAD_ADAPTER: {
        uint32_t adapter = adapter_number(message->unload_adapter.name);
        if (adapter < MAX_ADAPTERS)
            w->held[adapter] = 0;
        schedule(s, s->now_us + MS, EVENT_LOADED, (uint32_t)(w - s->workers),
                 (uint64_t)w->generation << 16 | adapter);
        break;
    }
    default:
        break;
    }
    return QV_OK;
}

static void register_worker(sim *s, worker *w)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_READY);
    qv_msg_ready *ready = &message.ready;
    qv_msg_held_adapter *held = calloc((size_t)s->options.n_adapters, sizeof *held);
    char(*names)[16] = calloc((size_t)s->options.n_adapters, sizeof *names);
    if (held == NULL || names == NULL) {
        s->out_of_memory = true;
        free(held);
        free(names);
        return;
    }
    ready->worker = qv_str_from(w->id);
    ready->protocol = QV_PROTOCOL_VERSION;
    ready->model = qv_str_from("simulated");
    ready->backend = qv_str_from("cpu");
    ready->capacity = s->options.capacity;
    ready->adapter_slots = s->options.slots;
    ready->max_context = 1 << 20;
    ready->adapters.data = held;
    for (int32_t i = 0; i < s->options.n_adapters; i++) {
        if (w->held[i] != 2)
            continue;
        snprintf(names[i], sizeof names[i], "a%d", i);
        qv_msg_held_adapter *h = &held[ready->adapters.count++];
        h->name = qv_str_from(names[i]);
        h->digest = qv_str_from(names[i]);
        h->state = qv_str_from("ready");
    }
    w->n_attempts = 0;
    to_core(s, w->peer, false, &message);
    free(held);
    free(names);
}

static void start_worker(sim *s, uint32_t i)
{
    worker *w = &s->workers[i];
    uint32_t generation = w->generation + 1;
    *w = (worker){.generation = generation};
    snprintf(w->id, sizeof w->id, "w%u", i);
    snprintf(w->peer, sizeof w->peer, "w%u-%u", i, generation);
    register_worker(s, w);
    schedule(s, s->now_us + SECOND / 2, EVENT_BEAT, i, generation);
}

static void on_beat(sim *s, worker *w, uint32_t i)
{
    if (s->now_us < w->frozen_us) {
        schedule(s, w->frozen_us, EVENT_BEAT, i, w->generation);
        return;
    }
    if (!w->registered) {
        register_worker(s, w);
    } else {
        qv_message message;
        qv_message_init(&message, QV_MSG_HEARTBEAT);
        message.heartbeat.epoch = w->epoch;
        qv_set(&message.heartbeat, heartbeat, running, w->n_attempts);
        qv_set(&message.heartbeat, heartbeat, waiting, 0);
        to_core(s, w->peer, false, &message);
    }
    schedule(s, s->now_us + SECOND, EVENT_BEAT, i, w->generation);
}

static void on_loaded(sim *s, worker *w, uint32_t adapter)
{
    char name[16];
    if (!w->registered || adapter >= MAX_ADAPTERS)
        return;
    snprintf(name, sizeof name, "a%u", adapter);
    qv_message message;
    qv_message_init(&message, QV_MSG_ADAPTER_STATE);
    qv_msg_adapter_state *state = &message.adapter_state;
    state->epoch = w->epoch;
    state->name = qv_str_from(name);
    bool fails =
        w->held[adapter] == 1 && s->options.faults && !s->calm && uniform(s, CHANCE_LOADS) < 0.01;
    if (fails) {
        w->held[adapter] = 0;
        s->result->failed_loads++;
        state->state = qv_str_from("failed");
        qv_set(state, adapter_state, error_code, qv_str_from("INTERNAL"));
        qv_set(state, adapter_state, reason, qv_str_from("the disk is slow"));
    } else if (w->held[adapter] == 0) {
        state->state = qv_str_from("unloaded");
    } else {
        w->held[adapter] = 2;
        state->state = qv_str_from("ready");
        qv_set(state, adapter_state, digest, qv_str_from(name));
    }
    to_core(s, w->peer, false, &message);
}

/* What a step does to one sequence: the delta, if there is one. */
static bool step_attempt(attempt *a, uint32_t *chunk, int32_t *tokens, qv_msg_delta *delta)
{
    *delta = (qv_msg_delta){.request = a->request};
    uint32_t n = 0;
    if (a->prompt_left > 0 && !a->aborted) {
        uint32_t part = a->prompt_left < *chunk ? a->prompt_left : *chunk;
        a->prompt_left -= part;
        *chunk -= part;
        if (a->prompt_left > 0)
            return false;
        n = 1;
    } else if (!a->aborted) {
        n = STEP_TOKENS;
    }
    n = n < a->length - a->n_tokens ? n : a->length - a->n_tokens;
    for (uint32_t k = 0; k < n; k++)
        tokens[k] = answer_token(a->seed, a->n_tokens + k);
    a->n_tokens += n;
    qv_set(delta, delta, seq, a->seq);
    if (n > 0) {
        qv_set(delta, delta, tokens, ((qv_ints){tokens, n}));
        a->seq++;
    }
    if (a->aborted || a->n_tokens == a->length) {
        qv_set(delta, delta, finish_reason, qv_str_from(a->aborted ? "cancelled" : "stop"));
        qv_set(delta, delta, usage,
               ((qv_msg_usage){.prompt_tokens = a->prompt,
                               .completion_tokens = a->n_tokens,
                               .cached_tokens = a->cached}));
    }
    return true;
}

static void on_step(sim *s, worker *w, uint32_t index)
{
    static qv_msg_delta deltas[MAX_CAPACITY];
    static int32_t tokens[MAX_CAPACITY][STEP_TOKENS];
    if (s->now_us < w->frozen_us) { /* frozen in the middle of a step */
        schedule(s, w->frozen_us, EVENT_STEP, index, w->generation);
        return;
    }
    w->stepping = false;
    uint32_t n = 0, chunk = CHUNK;
    for (uint32_t i = 0; i < w->n_attempts;) {
        attempt *a = &w->attempts[i];
        if (!a->in_step) {
            i++;
            continue;
        }
        bool has_delta = step_attempt(a, &chunk, tokens[n], &deltas[n]);
        bool is_over = a->n_tokens == a->length || a->aborted;
        n += has_delta;
        if (is_over)
            *a = w->attempts[--w->n_attempts];
        else
            i++;
    }
    qv_message message;
    qv_message_init(&message, QV_MSG_STEP);
    message.step.epoch = w->epoch;
    message.step.deltas.data = deltas;
    message.step.deltas.count = n;
    if (n > 0) {
        s->result->events += n;
        to_core(s, w->peer, false, &message);
    }
    start_step(s, w);
}

/* --- Faults -----------------------------------------------------------------------------------*/

static void on_fault(sim *s)
{
    schedule(s, s->now_us + 2 * SECOND + pick(s, CHANCE_FAULTS, 8 * SECOND), EVENT_FAULT, 0, 0);
    uint32_t i = (uint32_t)pick(s, CHANCE_FAULTS, (uint64_t)s->n_workers);
    worker *w = &s->workers[i];
    uint64_t kind = pick(s, CHANCE_FAULTS, 4), rest_us = pick(s, CHANCE_FAULTS, 20 * SECOND);
    if (s->calm || w->dead)
        return;
    switch (kind) {
    case 0:
    case 1: /* killed; its connection breaks, or just falls silent */
        if (s->n_dead >= s->n_workers / 4)
            return;
        w->dead = true;
        w->vanished = rest_us % 2 == 0;
        s->n_dead++;
        schedule(s, s->now_us + 5 * SECOND + rest_us, EVENT_JOIN, i, 0);
        break;
    case 2: /* stopped for a while; beyond the timeout it comes back as a ghost */
        w->frozen_us = s->now_us + rest_us % (12 * SECOND);
        break;
    default: /* one more */
        if (s->n_workers < s->options.n_workers + s->options.n_workers / 4 &&
            s->n_workers < MAX_WORKERS)
            schedule(s, s->now_us, EVENT_JOIN, (uint32_t)s->n_workers++, 0);
        break;
    }
}

/* --- Measures ---------------------------------------------------------------------------------*/

/* What each tenant was served in a second in which all of them waited and all workers were full. */
static void measure_shares(sim *s, const qv_fair *fair)
{
    double served[QV_SIM_MAX_TENANTS] = {0};
    int n_waiting = 0;
    QV_LIST_EACH(&fair->all, qv_tenant, link, tenant)
    {
        int i = tenant->name[0] == 't' ? tenant->name[1] - '0' : -1;
        if (i < 0 || i >= s->options.n_tenants)
            continue;
        n_waiting += tenant->n_queued > 0;
        served[i] = tenant->served;
    }
    bool all_wait = n_waiting == s->options.n_tenants && qv_core_pool(s->core)->free_credit == 0;
    for (int i = 0; i < s->options.n_tenants; i++) {
        if (all_wait && s->all_waited)
            s->backlog[i] += served[i] - s->served[i];
        s->served[i] = served[i];
    }
    s->contended_s += all_wait && s->all_waited;
    s->all_waited = all_wait;
}

static void measure_second(sim *s)
{
    const qv_fair *fair = &qv_core_requests(s->core)->fair;
    double gap = qv_fair_gap(fair);
    s->result->service_gap = gap > s->result->service_gap ? gap : s->result->service_gap;
    double bound = QV_FAIR_MAX_LAG + 2 * fair->largest;
    QV_LIST_EACH(&fair->all, qv_tenant, link, tenant)
    bound += (double)tenant->n_running * fair->largest; /* as if their estimates had been 0 */
    QV_LIST_EACH(&qv_core_pool(s->core)->groups, qv_group, link, group)
    bound += (double)group->n_loading * fair->largest_load;
    s->result->gap_bound = bound > s->result->gap_bound ? bound : s->result->gap_bound;
    measure_shares(s, fair);
    double most = 0, sum = 0, n = 0;
    QV_LIST_EACH(&qv_core_pool(s->core)->members, qv_member, link, member)
    {
        if (member->state != QV_MEMBER_READY)
            continue;
        most = (double)member->n_attempts > most ? (double)member->n_attempts : most;
        sum += (double)member->n_attempts;
        n++;
    }
    if (sum > 0) {
        s->imbalance += most / (sum / n);
        s->n_imbalance++;
    }
}

static int compare_floats(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static qv_sim_times summarize(samples *list)
{
    qv_sim_times times = {.n = list->n};
    if (list->n == 0)
        return times;
    qsort(list->data, list->n, sizeof *list->data, compare_floats);
    times.p50 = (double)list->data[list->n / 2];
    times.p99 = (double)list->data[list->n * 99 / 100];
    return times;
}

static double jain_index(const sim *s)
{
    double sum = 0, squares = 0, n = 0;
    for (int i = 0; i < s->options.n_tenants; i++) {
        sum += s->backlog[i];
        squares += s->backlog[i] * s->backlog[i];
        n++;
    }
    return s->contended_s >= 10 && squares > 0 ? sum * sum / (n * squares) : 1;
}

static void count_event(void *user, const char *what, const char *adapter, const char *id,
                        const char *why)
{
    (void)adapter, (void)id;
    qv_sim_result *r = ((sim *)user)->result;
    if (strcmp(what, "adapter_unloading") == 0)
        r->unloads++;
    if (strcmp(what, "adapter_loading") != 0)
        return;
    r->loads++;
    r->wanted_loads += strcmp(why, "wanted") == 0;
    r->demand_loads += strcmp(why, "a request waits for it") == 0;
    r->growth_loads += strcmp(why, "demand asks for it") == 0;
    r->balance_loads += strncmp(why, "it suits", 8) == 0;
}

static void ignore_group(void *user, const qv_group *group)
{
    (void)user, (void)group;
}

static void ignore_name(void *user, const char *adapter)
{
    (void)user, (void)adapter;
}

static void ignore_duration(void *user, qv_core_duration duration, uint64_t us)
{
    (void)user, (void)duration, (void)us;
}

/* --- The run ----------------------------------------------------------------------------------*/

/* Requests a second that the workers can do when they are full. */
static double capacity_rate(const qv_sim_options *o)
{
    double per_step = (double)o->capacity;
    double steps = 1 + (double)ANSWER_MEAN / STEP_TOKENS;
    double prompt = (PREFIX_BYTES + 256) / 4.0 * 0.75;
    double step_us =
        (double)STEP_US + STEP_SEQ_US * per_step + STEP_TOKEN_US * prompt * per_step / steps;
    return (double)o->n_workers * per_step / (steps * step_us * 1e-6);
}

static qv_status set_up(sim *s)
{
    const qv_sim_options *o = &s->options;
    if (o->n_workers > MAX_WORKERS || o->capacity > MAX_CAPACITY || o->n_adapters > MAX_ADAPTERS ||
        o->n_tenants > QV_SIM_MAX_TENANTS)
        return qv_fail(QV_ERR_ARG, "at most %d workers of capacity %d, %d adapters, %d tenants",
                       MAX_WORKERS, MAX_CAPACITY, MAX_ADAPTERS, QV_SIM_MAX_TENANTS);
    s->rate = o->rate > 0 ? o->rate : o->load * capacity_rate(o);
    s->end_us = (uint64_t)((double)o->n_requests / s->rate * 1e6);
    s->n_workers = o->n_workers;
    s->tickets = calloc(o->n_requests + 1, sizeof *s->tickets);
    s->popularity = calloc((size_t)o->n_adapters, sizeof *s->popularity);
    s->workers = calloc(MAX_WORKERS, sizeof *s->workers);
    if (s->tickets == NULL || s->popularity == NULL || s->workers == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the simulation");
    for (int32_t i = 0; i < o->n_adapters; i++)
        s->popularity[i] = (i > 0 ? s->popularity[i - 1] : 0) + pow(i + 1, -o->zipf);

    qv_core_options options = qv_core_default_options();
    options.seed = o->seed;
    options.policy = o->policy;
    options.requests.max_queued = options.requests.max_queued_per_adapter = 1 << 20;
    options.requests.max_client_requests = 1 << 20;
    options.requests.max_bytes = options.requests.max_client_bytes = INT64_C(1) << 36;
    options.max_worker_losses = 8;
    options.max_queue_wait_ms = INT64_C(3600) * 1000;
    options.placement.load_backoff_ms = 2000;
    const qv_core_actions actions = {.user = s,
                                     .send_client = send_client,
                                     .send_worker = send_worker,
                                     .publish = ignore_group,
                                     .retract = ignore_name,
                                     .event = count_event,
                                     .observe = ignore_duration};
    QV_TRY(qv_core_new(&options, &actions, s->now_us, &s->core));
    qv_core_wants_known(s->core);
    for (int32_t i = 0; i < o->n_workers; i++)
        start_worker(s, (uint32_t)i);
    /* Half of the slots hold popular adapters always, the others come and go on demand. */
    for (int32_t i = 0; i < o->n_adapters; i++) {
        char name[16], path[16];
        snprintf(name, sizeof name, "a%d", i);
        snprintf(path, sizeof path, "/a%d", i);
        qv_want want = {.path = path, .replicas = i < o->n_workers * o->slots / 4};
        qv_core_want(s->core, name, &want, s->now_us);
    }
    return QV_OK;
}

static void on_arrival(sim *s)
{
    submit(s);
    if (s->n_tickets < s->options.n_requests) {
        double wait_s = -log(1 - uniform(s, CHANCE_ARRIVALS)) / rate_now(s);
        schedule(s, s->now_us + 1 + (uint64_t)(wait_s * 1e6), EVENT_ARRIVAL, 0, 0);
    }
}

static void on_event(sim *s, const sim_event *e)
{
    worker *w = &s->workers[e->index];
    uint32_t generation = (uint32_t)(e->kind == EVENT_LOADED ? e->extra >> 16 : e->extra);
    bool is_here = !w->dead && w->generation == generation;
    switch (e->kind) {
    case EVENT_TICK:
        qv_core_tick(s->core, s->now_us);
        schedule(s, s->now_us + TICK_US, EVENT_TICK, 0, 0);
        if (s->now_us - s->second_us >= SECOND) {
            s->second_us = s->now_us;
            measure_second(s);
        }
        break;
    case EVENT_ARRIVAL:
        on_arrival(s);
        break;
    case EVENT_STEP:
        if (is_here)
            on_step(s, w, e->index);
        break;
    case EVENT_BEAT:
        if (is_here)
            on_beat(s, w, e->index);
        break;
    case EVENT_LOADED:
        if (is_here)
            on_loaded(s, w, (uint32_t)(e->extra & 0xffff));
        break;
    case EVENT_FAULT:
        on_fault(s);
        break;
    default:
        s->n_dead -= w->dead;
        start_worker(s, e->index);
        break;
    }
}

/* Until every request has ended: arrivals, then as long as it takes, faults included at first. */
static qv_status run(sim *s)
{
    const uint64_t patience_us = 600 * SECOND;
    schedule(s, TICK_US, EVENT_TICK, 0, 0);
    schedule(s, 3 * SECOND, EVENT_ARRIVAL, 0, 0);
    if (s->options.faults)
        schedule(s, 10 * SECOND, EVENT_FAULT, 0, 0);
    uint64_t last_us = 0;
    while (!s->out_of_memory) {
        sim_event e = next_event(s);
        s->now_us = e.at_us;
        s->result->events++;
        on_event(s, &e);
        if (s->n_tickets < s->options.n_requests) {
            last_us = s->now_us;
        } else if (s->ended >= s->n_tickets || s->now_us - last_us > patience_us) {
            break;
        } else {
            s->calm = true;
        }
    }
    if (s->out_of_memory)
        return qv_fail(QV_ERR_NOMEM, "no memory for the simulation");
    return qv_core_check(s->core);
}

static void fill_result(sim *s)
{
    qv_sim_result *r = s->result;
    const qv_core_stats *stats = qv_core_get_stats(s->core);
    r->virtual_s = (double)s->now_us * 1e-6;
    r->moved = stats->moved;
    r->workers_lost = stats->workers_lost;
    for (uint64_t i = 0; i < s->n_tickets; i++) {
        r->accepted += s->tickets[i].accepted;
        r->unanswered += s->tickets[i].accepted && !s->tickets[i].ended;
    }
    r->hit_rate = s->n_with_adapter > 0 ? (double)s->n_hits / (double)s->n_with_adapter : 1;
    r->prefix_hit_rate = s->n_repeated > 0 ? (double)s->n_prefix_hits / (double)s->n_repeated : 0;
    r->imbalance = s->n_imbalance > 0 ? s->imbalance / s->n_imbalance : 1;
    r->jain = jain_index(s);
    for (int i = 0; i < QV_SIM_CLASSES; i++)
        r->first_token[i] = summarize(&s->by_class[i]);
    for (int i = 0; i < s->options.n_tenants; i++)
        r->by_tenant[i] = summarize(&s->by_tenant[i]);
}

qv_status qv_simulate(const qv_sim_options *options, qv_sim_result *out)
{
    uint64_t began_us = qv_now_us();
    *out = (qv_sim_result){0};
    sim *s = calloc(1, sizeof *s);
    if (s == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the simulation");
    s->options = *options;
    s->result = out;
    for (int i = 0; i < 3; i++)
        s->random[i] = mix(options->seed * 3 + (uint64_t)i);
    s->now_us = 1;
    qv_status status = set_up(s);
    if (status == QV_OK)
        status = run(s);
    if (status == QV_OK)
        fill_result(s);
    out->wall_s = (double)(qv_now_us() - began_us) * 1e-6;
    qv_core_free(s->core);
    for (int i = 0; i < QV_SIM_CLASSES; i++)
        free(s->by_class[i].data);
    for (int i = 0; i < QV_SIM_MAX_TENANTS; i++)
        free(s->by_tenant[i].data);
    qv_arena_deinit(&s->arena);
    qv_arena_deinit(&s->in);
    free(s->heap);
    free(s->tickets);
    free(s->popularity);
    free(s->workers);
    free(s);
    return status;
}
