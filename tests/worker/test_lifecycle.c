/* Adapters under traffic: requests that finish, are cancelled, run out of time, fail, are preempted
 * or lose their client, while adapters are loaded, replaced, overwritten on disk, unloaded and fail
 * to load, with fewer slots and less host memory than adapters. Whatever the order, a request is
 * answered by the version that its adapter's name pointed at when it came, or with a sentence, and
 * in the end nothing holds anything.
 */
#include "common/json.h"
#include "common/log.h"
#include "tests/support.h"
#include "worker/engine.h"

#include <criterion/criterion.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DEMO "tiny-qwen3.5"

enum {
    N_CONTENTS = 6, /* different adapters that load */
    N_NAMES = 8,
    N_DIRS = N_CONTENTS + 4,
    HUGE = N_CONTENTS, /* loads, but its answers are not finite */
    BROKEN,            /* does not load */
    MISSING,           /* is not there */
    LIVE,              /* is overwritten in place with one content after another */
    MAX_REQUESTS = 2000,
    MAX_HISTORY = 400,
};

/* --- Folders --------------------------------------------------------------------------------- */

typedef struct {
    const char *dir[N_DIRS];
    char digest[N_CONTENTS + 1][40]; /* of what loads */
    uint64_t bytes;                  /* host memory of one */
} folders;

static json_t *config_of(int content)
{
    static const char *const from[] = {"json", "french", "emoji"};
    json_t *config;
    const char *path =
        qv_demo_path(qv_path(DEMO, "adapters/%s/adapter_config.json", from[content % 3]));
    cr_assert_eq(qv_json_load_file(path, 1 << 20, &config), QV_OK, "%s", qv_error());
    int64_t alpha = json_integer_value(json_object_get(config, "lora_alpha"));
    json_object_set_new(config, "lora_alpha", json_integer(alpha + content / 3));
    return config;
}

/* An absolute path, to link to; from qv_path's ring. */
static const char *weights_of(int content)
{
    static const char *const from[] = {"json", "french", "emoji"};
    char *path = realpath(
        qv_demo_path(qv_path(DEMO, "adapters/%s/adapter_model.safetensors", from[content % 3])),
        NULL);
    cr_assert_not_null(path);
    const char *out = qv_path("/", "%s", path + 1);
    free(path);
    return out;
}

/* Put a content into a folder, atomically file by file, whatever was there. */
static void write_content(const char *dir, int content)
{
    json_t *config = config_of(content);
    mkdir(dir, 0700);
    unlink(qv_path(dir, "new"));
    cr_assert_eq(symlink(weights_of(content), qv_path(dir, "new")), 0);
    cr_assert_eq(rename(qv_path(dir, "new"), qv_path(dir, "adapter_model.safetensors")), 0);
    cr_assert_eq(json_dump_file(config, qv_path(dir, "new"), 0), 0);
    cr_assert_eq(rename(qv_path(dir, "new"), qv_path(dir, "adapter_config.json")), 0);
    json_decref(config);
}

/* Finite weights, so large that the logits are not. */
static void write_huge(const char *dir)
{
    write_content(dir, 0);
    FILE *in = fopen(weights_of(0), "rb");
    cr_assert_not_null(in);
    uint64_t header;
    cr_assert_eq(fread(&header, sizeof header, 1, in), 1);
    fseek(in, 0, SEEK_END);
    size_t size = (size_t)ftell(in);
    char *data = malloc(size);
    rewind(in);
    cr_assert_eq(fread(data, size, 1, in), 1);
    fclose(in);
    memset(data + 8 + header, 0x7F, size - 8 - header);
    unlink(qv_path(dir, "adapter_model.safetensors"));
    FILE *out = fopen(qv_path(dir, "adapter_model.safetensors"), "wb");
    cr_assert_not_null(out);
    cr_assert_eq(fwrite(data, size, 1, out), 1);
    fclose(out);
    free(data);
}

static void write_folders(folders *f)
{
    const char *top = qv_temp_dir();
    for (int i = 0; i < N_DIRS; i++)
        f->dir[i] = strdup(qv_path(top, "%d", i));
    for (int i = 0; i < N_CONTENTS; i++)
        write_content(f->dir[i], i);
    write_huge(f->dir[HUGE]);
    write_content(f->dir[BROKEN], 0);
    qv_write_text(qv_path(f->dir[BROKEN], "adapter_config.json"), "{\"r\": ");
    write_content(f->dir[LIVE], 0);
}

/* --- The world -------------------------------------------------------------------------------- */

typedef struct {
    bool is_there, is_loading;
    int dir;          /* of the load in progress */
    int history;      /* of the live folder, when that load was ordered */
    char digest[40];  /* of what it points at; "" = nothing */
    bool may_be_lost; /* that came from the live folder */
} name_state;

typedef struct {
    bool open, aborted;
    int name;        /* -1: the base model */
    bool parked;     /* came while its adapter was loaded for the first time */
    char digest[40]; /* that must answer; "" while it is parked */
    int n_left;      /* streams */
} request_state;

typedef struct {
    const folders *folders;
    qv_engine *engine;
    qv_rng rng;
    name_state names[N_NAMES];
    request_state *requests; /* [MAX_REQUESTS] */
    int n_requests, n_open;
    int live[MAX_HISTORY], n_live; /* contents of the live folder, in order */
    int n_finished, n_aborted, n_not_finite, n_refused, n_lost, n_replaced;
} world;

static const char *name_text(int name)
{
    static const char *const texts[N_NAMES] = {"a", "b", "c", "d", "e", "f", "g", "h"};
    return texts[name];
}

static int name_of(const char *text)
{
    return text[0] - 'a';
}

static qv_engine *open_engine(int64_t slots, int64_t host_bytes, int64_t preempt_every,
                              int64_t kv_bytes)
{
    qv_engine_options options = {
        .model_dir = qv_demo_path(DEMO),
        .backend = "cpu",
        .overlap = getenv("QV_OVERLAP"),
        .gemm = "exact",
        .threads = 1,
        .max_running = 6,
        .max_waiting = 400,
        .step_tokens = 48,
        .prefill_chunk = 16,
        .page_tokens = 16,
        .kv_bytes = kv_bytes,
        .max_context = 128,
        .adapter_slots = slots,
        .max_lora_rank = 16,
        .max_adapter_bytes = 64 << 20,
        .adapter_cache_bytes = host_bytes,
        .swap_bytes = 4 << 20,
        .preempt_every = preempt_every,
    };
    qv_engine *engine;
    qv_log_set_level(QV_LOG_ERROR);
    cr_assert_eq(qv_engine_open(&options, NULL, &engine), QV_OK, "%s", qv_error());
    return engine;
}

/* --- What comes back -------------------------------------------------------------------------- */

/* Whether a digest is one that the order for this name may have found. */
static bool is_expected(const world *w, const name_state *name, const char *digest)
{
    if (name->dir <= HUGE)
        return strcmp(w->folders->digest[name->dir], digest) == 0;
    for (int i = name->history; name->dir == LIVE && i < w->n_live; i++)
        if (strcmp(w->folders->digest[w->live[i]], digest) == 0)
            return true;
    return false;
}

/* Requests that waited for the first load of a name are bound by it. */
static void bind_parked(world *w, int name)
{
    for (int i = 0; i < w->n_requests; i++) {
        request_state *r = &w->requests[i];
        if (r->open && r->parked && !r->aborted && r->name == name) {
            snprintf(r->digest, sizeof r->digest, "%s", w->names[name].digest);
            r->parked = false;
        }
    }
}

static void take_event(world *w, const qv_adapter_event *event)
{
    name_state *name = &w->names[name_of(event->name)];
    switch (event->phase) {
    case QV_ADAPTER_READY:
        cr_assert(name->is_loading, "%s is ready, but nobody asked", event->name);
        cr_assert(is_expected(w, name, event->digest), "%s of folder %d has digest %s", event->name,
                  name->dir, event->digest);
        w->n_replaced += name->digest[0] != '\0' && strcmp(name->digest, event->digest) != 0;
        snprintf(name->digest, sizeof name->digest, "%s", event->digest);
        name->may_be_lost = name->dir == LIVE;
        name->is_loading = false;
        break;
    case QV_ADAPTER_FAILED:
        cr_assert_not_null(event->reason);
        if (name->is_loading && strcmp(event->digest, name->digest) == 0)
            name->is_loading = false; /* the load failed, and what it had stays */
        else
            cr_assert(name->may_be_lost, "%s is lost: %s", event->name, event->reason);
        if (event->digest[0] == '\0')
            name->digest[0] = '\0';
        break;
    default:
        break;
    }
}

/* Whether the live folder ever had this content: then its last copy may have been there. */
static bool was_live(const world *w, const char *digest)
{
    for (int i = 0; i < w->n_live; i++)
        if (strcmp(w->folders->digest[w->live[i]], digest) == 0)
            return true;
    return false;
}

static void take_delta(world *w, const qv_msg_delta *delta)
{
    request_state *r = &w->requests[delta->request];
    cr_assert(r->open, "a delta after the end");
    if (qv_has(delta, delta, error_code)) {
        qv_code code;
        cr_assert(qv_code_find(delta->error_code, &code));
        if (code == QV_CODE_INTERNAL) {
            cr_assert(r->name >= 0 && strcmp(r->digest, w->folders->digest[HUGE]) == 0, "%.*s",
                      (int)delta->error_message.size, delta->error_message.data);
            w->n_not_finite++;
        } else {
            cr_assert(code == QV_CODE_ADAPTER_INVALID || code == QV_CODE_ADAPTER_NOT_FOUND);
            cr_assert(r->parked || r->digest[0] == '\0' || was_live(w, r->digest), "%.*s",
                      (int)delta->error_message.size, delta->error_message.data);
            *(r->digest[0] != '\0' ? &w->n_lost : &w->n_refused) += 1;
        }
        r->open = false;
        w->n_open--;
        return;
    }
    if (!qv_has(delta, delta, finish_reason))
        return;
    if (r->name >= 0 && !(r->aborted && r->parked)) {
        cr_assert_eq(delta->digest.size, strlen(r->digest));
        cr_assert_eq(memcmp(delta->digest.data, r->digest, delta->digest.size), 0,
                     "answered by %.*s, not by %s", (int)delta->digest.size, delta->digest.data,
                     r->digest);
    }
    if (--r->n_left == 0) {
        r->open = false;
        w->n_open--;
        *(r->aborted ? &w->n_aborted : &w->n_finished) += 1;
    }
}

static void step(world *w, bool wait)
{
    struct pollfd pfd = {.fd = qv_engine_fd(w->engine), .events = POLLIN};
    if (!qv_engine_has_work(w->engine)) {
        int n = poll(&pfd, 1, wait ? 20000 : 0);
        cr_assert(n == 1 || !wait, "nothing to do, and nothing comes");
    }
    qv_step_result result;
    cr_assert_eq(qv_engine_step(w->engine, &result), QV_OK, "%s", qv_error());
    for (uint32_t i = 0; i < result.n_adapters; i++)
        take_event(w, &result.adapters[i]);
    for (uint32_t i = 0; i < result.n_adapters; i++)
        if (result.adapters[i].phase == QV_ADAPTER_READY)
            bind_parked(w, name_of(result.adapters[i].name));
    for (uint32_t i = 0; i < result.n_deltas; i++)
        take_delta(w, &result.deltas[i]);
}

/* --- What is done ----------------------------------------------------------------------------- */

static void submit_to(world *w, int to)
{
    if (w->n_requests == MAX_REQUESTS || w->n_open >= 60)
        return;
    int number = w->n_requests++, n_streams = qv_rng_uniform(&w->rng) < 0.2 ? 3 : 1;
    request_state *r = &w->requests[number];
    *r = (request_state){
        .open = true, .name = to, .n_left = n_streams};
    if (r->name >= 0) {
        const name_state *name = &w->names[r->name];
        snprintf(r->digest, sizeof r->digest, "%s", name->digest);
        r->parked = name->digest[0] == '\0' && name->is_loading;
    }
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    qv_msg_submit *m = &message.submit;
    int32_t tokens[40];
    qv_ints ints = {tokens, (uint32_t)qv_rng_range(&w->rng, 1, 41)};
    for (uint32_t i = 0; i < ints.count; i++)
        tokens[i] = 300 + (int32_t)qv_rng_range(&w->rng, 0, 600);
    qv_set(m, submit, id, qv_str_from("t"));
    qv_set(m, submit, tokens, ints);
    if (r->name >= 0)
        qv_set(m, submit, adapter, qv_str_from(name_text(r->name)));
    qv_set(m, submit, max_tokens, qv_rng_range(&w->rng, 1, 20));
    qv_set(m, submit, n, n_streams);
    qv_set(m, submit, ignore_eos, true);
    qv_set(m, submit, priority, qv_rng_range(&w->rng, 0, 3));
    qv_request *request;
    qv_code code;
    w->n_open++;
    cr_assert_eq(qv_request_new(w->engine, m, (uint64_t)number, 1, NULL, 0, &request, &code), QV_OK,
                 "%s", qv_error());
    qv_engine_submit(w->engine, request); /* a refusal comes as a delta */
}

static void submit(world *w)
{
    submit_to(w, (int)qv_rng_range(&w->rng, -1, N_NAMES));
}

static void end_one(world *w, int number, const char *reason)
{
    request_state *r = &w->requests[number];
    if (!r->open)
        return;
    r->aborted = true;
    qv_engine_abort(w->engine, (uint64_t)number, reason);
}

/* A client cancels or is lost, or a deadline passes: the broker says which. */
static void end_some(world *w)
{
    if (w->n_requests == 0)
        return;
    int first = w->n_requests > 40 ? w->n_requests - 40 : 0;
    end_one(w, (int)qv_rng_range(&w->rng, first, w->n_requests),
            qv_rng_uniform(&w->rng) < 0.5 ? "cancelled" : "deadline");
}

/* The broker is lost, and with it everything that runs. */
static void end_all(world *w)
{
    for (int i = 0; i < w->n_requests; i++)
        end_one(w, i, "cancelled");
}

static void load(world *w, int n, int dir)
{
    name_state *name = &w->names[n];
    name->is_there = name->is_loading = true;
    name->dir = dir;
    name->history = w->n_live - 1;
    cr_assert_eq(qv_engine_load_adapter(w->engine, name_text(n), w->folders->dir[dir],
                                        qv_rng_uniform(&w->rng) < 0.2),
                 QV_OK, "%s", qv_error());
}

static void unload(world *w, int n)
{
    qv_status status = qv_engine_unload_adapter(w->engine, name_text(n));
    cr_assert_eq(status, w->names[n].is_there ? QV_OK : QV_ERR_NOT_FOUND);
    w->names[n] = (name_state){0};
}

static void overwrite_with(world *w, int content)
{
    if (w->n_live == MAX_HISTORY)
        return;
    /* In between it is a mixture, which may load: of two contents of the same weights it is one. */
    w->live[w->n_live++] = content;
    const char *config = qv_path(w->folders->dir[LIVE], "adapter_config.json");
    unlink(config);
    write_content(w->folders->dir[LIVE], content);
}

static void overwrite(world *w)
{
    overwrite_with(w, (int)qv_rng_range(&w->rng, 0, N_CONTENTS));
}

static void act(world *w)
{
    double u = qv_rng_uniform(&w->rng);
    int name = (int)qv_rng_range(&w->rng, 0, N_NAMES);
    if (u < 0.30)
        submit(w);
    else if (u < 0.36)
        end_some(w);
    else if (u < 0.42)
        load(w, name, (int)qv_rng_range(&w->rng, 0, N_DIRS));
    else if (u < 0.44)
        unload(w, name);
    else if (u < 0.47)
        overwrite(w);
    else if (u < 0.472)
        end_all(w);
    else
        step(w, false);
}

/* --- The end ---------------------------------------------------------------------------------- */

static qv_adapter_stats stats(const world *w)
{
    qv_adapter_stats out;
    qv_engine_get_adapter_stats(w->engine, &out);
    return out;
}

static void expect_nothing_is_held(world *w, int64_t slots)
{
    qv_adapter_stats s = stats(w);
    cr_assert_eq(s.refs, 0, "%d requests hold adapters", (int)s.refs);
    cr_assert_eq(s.users, 0, "%d sequences hold slots", (int)s.users);
    for (int i = 0; i < N_NAMES; i++)
        if (w->names[i].is_there)
            unload(w, i);
    qv_engine_stats e;
    for (;;) { /* slots are cleared, reads that nobody wants end */
        s = stats(w);
        qv_engine_get_stats(w->engine, &e);
        if (s.n_versions == 0 && e.free_adapter_slots == slots && !qv_engine_has_work(w->engine))
            break;
        step(w, true);
    }
    cr_assert_eq(s.n_names, 0);
    cr_assert_eq(s.host_copies, 0);
    cr_assert_eq(s.host_bytes, 0);
    cr_assert_eq(e.running, 0);
    cr_assert_eq(e.waiting, 0);
    cr_assert_eq(e.free_pages, qv_engine_total_pages(w->engine));
    cr_assert_eq(e.free_state_slots, qv_engine_get_options(w->engine)->max_running);
}

static void run_until_idle(world *w)
{
    for (int steps = 0; w->n_open > 0; steps++) {
        cr_assert_lt(steps, 50000, "%d requests do not end", w->n_open);
        step(w, true);
    }
}

static void load_and_use(world *w, int name, int dir)
{
    load(w, name, dir);
    while (w->names[name].is_loading)
        step(w, true);
    submit_to(w, name);
    run_until_idle(w);
}

/* A version whose folder has other content by now is pushed out by others, and asked for again: it
 * is lost where slots and host memory are too few for all of these, and else answers. */
static void ask_for_what_was_overwritten(world *w)
{
    for (int i = 0; i < N_NAMES; i++)
        if (w->names[i].is_there)
            unload(w, i);
    overwrite_with(w, 0);
    load_and_use(w, 0, LIVE);
    overwrite_with(w, 1);
    for (int content = 1; content < N_CONTENTS; content++)
        load_and_use(w, content, content);
    submit_to(w, 0);
    run_until_idle(w);
}

/* Load every content once, to learn their digests. */
static void learn_digests(folders *f)
{
    world w = {.folders = f, .engine = open_engine(2, 1 << 30, 0, 0)};
    for (int i = 0; i <= HUGE; i++) {
        cr_assert_eq(qv_engine_load_adapter(w.engine, "a", f->dir[i], false), QV_OK);
        qv_adapter_event event = {.phase = QV_ADAPTER_LOADING};
        while (!qv_engine_find_adapter(w.engine, "a", &event) ||
               (i > 0 && strcmp(event.digest, f->digest[i - 1]) == 0) || event.digest[0] == '\0') {
            struct pollfd pfd = {.fd = qv_engine_fd(w.engine), .events = POLLIN};
            if (!qv_engine_has_work(w.engine))
                poll(&pfd, 1, 20000);
            qv_step_result result;
            cr_assert_eq(qv_engine_step(w.engine, &result), QV_OK);
            for (uint32_t k = 0; k < result.n_adapters; k++)
                cr_assert_eq(result.adapters[k].phase, QV_ADAPTER_READY, "%s",
                             result.adapters[k].reason);
        }
        snprintf(f->digest[i], sizeof f->digest[i], "%s", event.digest);
        f->bytes = event.bytes > f->bytes ? event.bytes : f->bytes;
        for (int k = 0; k < i; k++)
            cr_assert_str_neq(f->digest[k], f->digest[i]);
    }
    qv_engine_close(w.engine);
}

Test(lifecycle, every_request_gets_its_version_or_a_sentence_and_nothing_is_held_in_the_end,
     .timeout = 500)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    enum { N_SEEDS = 12, N_ACTIONS = 700 };
    folders f = {0};
    write_folders(&f);
    learn_digests(&f);
    world total = {0};
    qv_adapter_stats counts = {0};
    for (uint64_t seed = 0; seed < N_SEEDS; seed++) {
        qv_rng rng = qv_rng_seed(seed);
        int64_t slots = qv_rng_range(&rng, 1, 5);
        int64_t host_bytes = qv_rng_range(&rng, 1, 6) * (int64_t)f.bytes + 4096;
        int64_t preempt_every = seed % 2 == 0 ? qv_rng_range(&rng, 2, 9) : 0;
        world w = {.folders = &f,
                   .engine =
                       open_engine(slots, host_bytes, preempt_every, seed % 3 == 0 ? 300 << 10 : 0),
                   .rng = rng,
                   .requests = calloc(MAX_REQUESTS, sizeof *w.requests),
                   .n_live = 1};
        write_content(f.dir[LIVE], 0);
        for (int i = 0; i < 4; i++)
            load(&w, i, i);
        for (int i = 0; i < N_ACTIONS; i++) {
            act(&w);
            cr_assert_leq(stats(&w).host_bytes, (uint64_t)host_bytes);
        }
        if (seed % 4 == 3)
            end_all(&w);
        run_until_idle(&w);
        ask_for_what_was_overwritten(&w);
        expect_nothing_is_held(&w, slots);
        qv_engine_stats e;
        qv_engine_get_stats(w.engine, &e);
        qv_adapter_stats s = stats(&w);
        counts.slot_hits += s.slot_hits;
        counts.host_hits += s.host_hits;
        counts.misses += s.misses;
        counts.slot_evictions += s.slot_evictions;
        counts.host_evictions += s.host_evictions;
        total.n_finished += w.n_finished;
        total.n_aborted += w.n_aborted;
        total.n_not_finite += w.n_not_finite;
        total.n_refused += w.n_refused;
        total.n_lost += w.n_lost;
        total.n_replaced += w.n_replaced;
        total.n_open += (int)e.preemptions; /* for the check below */
        qv_engine_close(w.engine);
        free(w.requests);
    }
    /* Every path was taken. */
    fprintf(stderr, "finished %d, aborted %d, not finite %d, refused %d, lost %d, replaced %d\n",
            total.n_finished, total.n_aborted, total.n_not_finite, total.n_refused, total.n_lost,
            total.n_replaced);
    cr_expect_gt(total.n_finished, 100);
    cr_expect_gt(total.n_aborted, 20);
    cr_expect_gt(total.n_not_finite, 5);
    cr_expect_gt(total.n_refused, 5);
    cr_expect_gt(total.n_lost, 0);
    cr_expect_gt(total.n_replaced, 20);
    cr_expect_gt(total.n_open, 20, "preempted %d times", total.n_open);
    cr_expect_gt(counts.slot_hits, 50);
    cr_expect_gt(counts.host_hits, 50);
    cr_expect_gt(counts.misses, 20);
    cr_expect_gt(counts.slot_evictions, 50);
    cr_expect_gt(counts.host_evictions, 50);
    for (int i = 0; i < N_DIRS; i++)
        free((char *)f.dir[i]);
}
