/* Overlapped steps: the same answers as one step at a time, to the bit, over many random requests
 * with every way to end, whatever else makes steps differ. */
#include "tests/support.h"
#include "tests/worker/drive.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEMO "tiny-qwen3.5"

#define N_ROWS(table) (sizeof(table) / sizeof *(table))

enum { N_REQUESTS = 60, MAX_JSON = 4096 };

/* A request, when it comes, and when it is cancelled: after so many messages to its client. */
typedef struct {
    char json[MAX_JSON];
    int at_step;
    int cancel_after; /* 0: never */
} drawn;

static void draw_request(qv_rng *rng, drawn *out)
{
    static const char *const words[] = {"Lena counted five black shoes at the market. ",
                                        "Tara lost seven yellow bikes at the station. ",
                                        "Ines was there on Tuesday. "};
    static const char *const adapters[] = {"", "", "json", "french"};
    static const char *const extras[] = {
        "",
        "",
        ",'repetition_penalty':1.3",
        ",'frequency_penalty':0.7,'presence_penalty':0.4",
        ",'prompt_logprobs':1",
        ",'stop':['the','station']",
        ",'stop_token_ids':[18,40,41,42,43]",
        ",'n':3",
        ",'ignore_eos':true",
        ",'top_k':5,'logprobs':4",
        ",'top_p':0.8,'logprobs':0,'frequency_penalty':-0.5",
        ",'min_p':0.05,'n':2,'repetition_penalty':1.1",
    };
    char *end = out->json;
    end += sprintf(end, "'prompt':'");
    for (int n = (int)qv_rng_range(rng, 1, 8); n > 0; n--)
        end += sprintf(end, "%s", words[qv_rng_range(rng, 0, 3)]);
    int extra = (int)qv_rng_range(rng, 0, N_ROWS(extras));
    bool many = strstr(extras[extra], "'n':") != NULL;
    end += sprintf(end, "','adapter':'%s','seed':%d,'temperature':%s,'max_tokens':%d%s",
                   adapters[qv_rng_range(rng, 0, 4)], (int)qv_rng_range(rng, 0, 100),
                   many || qv_rng_range(rng, 0, 3) > 0 ? "1.1" : "0",
                   (int)qv_rng_range(rng, 0, 8) == 0 ? 1 : (int)qv_rng_range(rng, 1, 40),
                   extras[extra]);
    out->at_step = (int)qv_rng_range(rng, 0, 80);
    /* The answers of one request may be in other places when one of them has come so far. */
    out->cancel_after = many || qv_rng_range(rng, 0, 4) > 0 ? 0 : (int)qv_rng_range(rng, 1, 12);
}

typedef struct {
    char *signatures[N_REQUESTS];
    uint64_t steps, preemptions;
    int n_cancelled;
    bool saw_gap;
} outcome;

static void cancel_those_due(drive *d, const drawn *requests, const uint64_t *numbers, int n)
{
    for (int i = 0; i < n; i++)
        if (requests[i].cancel_after > 0 &&
            drive_stream_of(d, numbers[i], 0)->n_deltas == requests[i].cancel_after)
            qv_engine_abort(d->engine, numbers[i], "cancelled");
}

static int by_step(const void *a, const void *b)
{
    return ((const drawn *)a)->at_step - ((const drawn *)b)->at_step;
}

static void run_all(const qv_engine_options *options, const drawn *requests, outcome *out)
{
    uint64_t numbers[N_REQUESTS];
    drive *d = drive_open(options);
    drive_load(d, "json", qv_demo_path(qv_path(DEMO, "adapters/json")));
    drive_load(d, "french", qv_demo_path(qv_path(DEMO, "adapters/french")));
    qv_engine_watch_gaps(d->engine, true);
    int n = 0;
    for (int step = 0; n < N_REQUESTS || d->n_open > 0; step++) {
        cr_assert_lt(step, 100000, "it does not come to an end");
        for (; n < N_REQUESTS && requests[n].at_step <= step; n++)
            numbers[n] = drive_submit(d, requests[n].json);
        if (d->n_open > 0)
            drive_step(d);
        out->saw_gap = out->saw_gap || !isnan(qv_engine_gap(d->engine));
        cancel_those_due(d, requests, numbers, n);
    }
    while (qv_engine_has_work(d->engine)) /* rows that nobody wants any more */
        drive_step(d);
    qv_engine_stats stats;
    qv_engine_get_stats(d->engine, &stats);
    out->steps = stats.steps;
    out->preemptions = stats.preemptions;
    for (int i = 0; i < N_REQUESTS; i++) {
        out->signatures[i] = drive_signature(d, numbers[i]);
        out->n_cancelled += strcmp(drive_stream_of(d, numbers[i], 0)->finish, "cancelled") == 0;
    }
    drive_close(d);
}

static const struct {
    const char *what;
    int64_t max_running, prefill_chunk, step_tokens, kv_pages, preempt_every, swap_bytes;
    bool prefix_cache, preempts;
} settings[] = {
    {"plenty of everything", 16, 0, 128, 0, 0, 64 << 20, true, false},
    {"no prefix cache", 16, 0, 128, 0, 0, 64 << 20, false, false},
    {"small chunks and steps", 8, 7, 12, 0, 0, 64 << 20, true, false},
    {"few pages", 16, 32, 64, 28, 0, 64 << 20, true, true},
    {"preempted for practice", 8, 16, 64, 0, 3, 64 << 20, true, true},
    {"preempted and computed again", 8, 16, 64, 0, 5, 0, false, true},
    {"one at a time", 1, 0, 64, 0, 0, 64 << 20, true, false},
};

Test(overlap, gives_the_same_answers_as_one_step_at_a_time)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    static drawn requests[N_REQUESTS];
    for (size_t s = 0; s < N_ROWS(settings); s++) {
        qv_rng rng = qv_rng_seed(17 + s);
        for (int i = 0; i < N_REQUESTS; i++)
            draw_request(&rng, &requests[i]);
        qsort(requests, N_REQUESTS, sizeof *requests, by_step);
        outcome outcomes[2] = {{.steps = 0}};
        for (int on = 0; on < 2; on++) {
            qv_engine_options options = drive_options(qv_demo_path(DEMO));
            options.overlap = on ? "on" : "off";
            options.max_running = settings[s].max_running;
            options.prefill_chunk = settings[s].prefill_chunk;
            options.step_tokens = settings[s].step_tokens;
            options.preempt_every = settings[s].preempt_every;
            options.swap_bytes = settings[s].swap_bytes;
            options.prefix_cache = settings[s].prefix_cache;
            options.page_tokens = 8;
            options.max_context = 160;
            if (settings[s].kv_pages > 0) {
                qv_memory_plan plan;
                drive *probe = drive_open(&options);
                plan = *qv_engine_plan(probe->engine);
                drive_close(probe);
                options.kv_bytes = (int64_t)plan.kv_page * settings[s].kv_pages;
            }
            run_all(&options, requests, &outcomes[on]);
        }
        for (int i = 0; i < N_REQUESTS; i++) {
            cr_expect_str_eq(outcomes[0].signatures[i], outcomes[1].signatures[i],
                             "%s, request %d: %s", settings[s].what, i, requests[i].json);
            free(outcomes[0].signatures[i]);
            free(outcomes[1].signatures[i]);
        }
        cr_expect_gt(outcomes[1].n_cancelled, 3, "%s", settings[s].what);
        cr_expect_eq(outcomes[1].n_cancelled, outcomes[0].n_cancelled);
        cr_expect(outcomes[0].saw_gap && outcomes[1].saw_gap);
        for (int on = 0; on < 2; on++)
            cr_expect_eq(outcomes[on].preemptions > 0, settings[s].preempts, "%s: %d preemptions",
                         settings[s].what, (int)outcomes[on].preemptions);
    }
}

/* Each answer costs one row that is dropped at most, and one at full length none. */
Test(overlap, computes_no_more_than_a_row_too_many)
{
    static const struct {
        const char *rest;
        int n_steps[2]; /* one at a time, overlapped */
    } rows[] = {
        {"'max_tokens':10,'ignore_eos':true", {10, 10}},
        {"'max_tokens':40", {22, 23}}, /* ends with EOS */
        {"'max_tokens':1", {1, 1}},
    };
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    for (size_t i = 0; i < N_ROWS(rows); i++)
        for (int on = 0; on < 2; on++) {
            qv_engine_options options = drive_options(qv_demo_path(DEMO));
            options.overlap = on ? "on" : "off";
            drive *d = drive_open(&options);
            char json[512];
            snprintf(json, sizeof json,
                     "'prompt':'<|im_start|>user\\nInes carried two black shoes at the station on "
                     "Tuesday.<|im_end|>\\n<|im_start|>assistant\\n','temperature':0,%s",
                     rows[i].rest);
            drive_submit(d, json);
            drive_run(d);
            while (qv_engine_has_work(d->engine))
                drive_step(d);
            qv_engine_stats stats;
            qv_engine_get_stats(d->engine, &stats);
            cr_expect_eq((int)stats.steps, rows[i].n_steps[on], "%s: %d steps", rows[i].rest,
                         (int)stats.steps);
            drive_close(d);
        }
}

Test(overlap, is_refused_where_it_cannot_be)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    static const struct {
        const char *overlap;
        int64_t tp;
        qv_status status;
        const char *words;
    } rows[] = {
        {"maybe", 1, QV_ERR_ARG, "'maybe'"},
        {"on", 2, QV_ERR_UNSUPPORTED, "2 ranks"},
        {"auto", 2, QV_OK, ""},
    };
    for (size_t i = 0; i < N_ROWS(rows); i++) {
        qv_engine_options options = drive_options(qv_demo_path(DEMO));
        options.overlap = rows[i].overlap;
        options.tp = rows[i].tp;
        qv_engine *engine;
        cr_expect_eq(qv_engine_open(&options, NULL, &engine), rows[i].status, "%s",
                     rows[i].overlap);
        if (rows[i].status == QV_OK)
            qv_engine_close(engine);
        else
            cr_expect_not_null(strstr(qv_error(), rows[i].words), "%s", qv_error());
    }
}
