/* The engine with the prefix cache: less is computed, and every answer has the same bits. */
#include "tests/support.h"
#include "tests/worker/drive.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define DEMO "tiny-qwen3.5"

/* Prompts that begin with the same 51 tokens or so, and one of each part. */
#define STORY                                                                                      \
    "<|im_start|>user\\nLena counted five black shoes at the market on Friday. Tara lost seven "   \
    "yellow bikes at the station on Saturday. Bruno carried nine black boats at the garden on "    \
    "Friday. Suki counted five red boats at the station on Saturday. "

#define ASK(question)                                                                              \
    "'prompt':'" STORY question                                                                    \
    "<|im_end|>\\n<|im_start|>assistant\\n','seed':3,'max_tokens':12,'ignore_eos':true,"           \
    "'logprobs':1"

static const char *const questions[] = {
    ASK("Which color did Lena count?"),
    ASK("Where was Bruno?"),
    ASK("Who lost seven bikes?"),
    ASK("Where was Bruno? And Tara?"),
};
enum { N_QUESTIONS = sizeof questions / sizeof *questions };

static const char *demo_adapter(const char *name)
{
    return qv_demo_path(qv_path(DEMO, "adapters/%s", name));
}

static qv_engine_options small(bool prefix_cache)
{
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    options.prefix_cache = prefix_cache;
    options.prefix_every = 4096;
    return options;
}

/* Submit and wait for the end. */
static uint64_t ask(drive *d, const char *json)
{
    uint64_t number = drive_submit(d, json);
    drive_run(d);
    cr_assert_not(drive_get(d, number)->failed, "%s", drive_get(d, number)->message);
    return number;
}

static uint64_t ask_adapter(drive *d, const char *json, const char *adapter)
{
    char text[2048];
    snprintf(text, sizeof text, "%s,'adapter':'%s'", json, adapter);
    return ask(d, text);
}

static int64_t cached(drive *d, uint64_t number)
{
    return drive_stream_of(d, number, 0)->usage.cached_tokens;
}

static int64_t n_prompt(drive *d, uint64_t number)
{
    return drive_stream_of(d, number, 0)->usage.prompt_tokens;
}

static qv_prefix_stats stats_of(drive *d)
{
    qv_engine_stats stats;
    qv_engine_get_stats(d->engine, &stats);
    return stats.prefix;
}

static uint64_t n_prefilled(drive *d)
{
    qv_engine_stats stats;
    qv_engine_get_stats(d->engine, &stats);
    return stats.tokens_prefilled;
}

/* What a request answers with the cache switched off. The caller frees. */
static char *plain_answer(const char *json, const char *adapter)
{
    qv_engine_options options = small(false);
    drive *d = drive_open(&options);
    if (adapter[0] != '\0')
        drive_load(d, adapter, demo_adapter(adapter));
    uint64_t number = adapter[0] != '\0' ? ask_adapter(d, json, adapter) : ask(d, json);
    cr_expect_eq(cached(d, number), 0);
    cr_expect_eq(stats_of(d).lookups, 0, "it is off");
    char *signature = drive_signature(d, number);
    drive_close(d);
    return signature;
}

static void expect_same(drive *d, uint64_t number, const char *want, const char *what)
{
    char *got = drive_signature(d, number);
    cr_expect_str_eq(got, want, "%s\n got %s\nwant %s", what, got, want);
    free(got);
}

/* --- What is skipped ------------------------------------------------------------------------- */

Test(prefix, is_computed_once_more_where_prompts_part_and_then_skipped)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = small(true);
    drive *d = drive_open(&options);
    uint64_t n[N_QUESTIONS], computed[N_QUESTIONS];
    for (int i = 0; i < N_QUESTIONS; i++) {
        uint64_t before = n_prefilled(d);
        n[i] = ask(d, questions[i]);
        computed[i] = n_prefilled(d) - before;
        char *want = plain_answer(questions[i], "");
        expect_same(d, n[i], want, questions[i]);
        free(want);
    }
    cr_expect_eq(cached(d, n[0]), 0);
    cr_expect_eq(cached(d, n[1]), 0, "the first of its kind showed where they part");
    int64_t shared = cached(d, n[2]);
    cr_expect_eq(shared % 16, 0);
    cr_expect_geq(shared, 32);
    cr_expect_geq(cached(d, n[3]), shared);
    for (int i = 0; i < N_QUESTIONS; i++)
        cr_expect_eq(computed[i], (uint64_t)(n_prompt(d, n[i]) - cached(d, n[i])));
    cr_expect_eq(stats_of(d).hits, 2);
    cr_expect_eq(stats_of(d).hit_tokens, (uint64_t)(cached(d, n[2]) + cached(d, n[3])));
    drive_close(d);
}

Test(prefix, the_same_prompt_is_skipped_to_its_last_page)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = small(true);
    drive *d = drive_open(&options);
    ask(d, questions[0]);
    ask(d, questions[0]);
    uint64_t third = ask(d, questions[0]);
    int64_t last = n_prompt(d, third) - 1;
    cr_expect_eq(cached(d, third), last - last % 16);
    drive_close(d);
}

Test(prefix, a_long_prompt_leaves_a_snapshot_at_its_first_sight)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    static const struct {
        const char *what;
        int64_t prefill_chunk, prefix_every, n_cached;
    } rows[] = {{"near its end", 32, 4096, 32}, {"every 32 tokens", 16, 32, 48}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_engine_options options = small(true);
        options.prefill_chunk = rows[i].prefill_chunk;
        options.prefix_every = rows[i].prefix_every;
        drive *d = drive_open(&options);
        ask(d, questions[0]);
        uint64_t second = ask(d, questions[0]);
        cr_expect_eq(cached(d, second), rows[i].n_cached, "%s: %d", rows[i].what,
                     (int)cached(d, second));
        char *want = plain_answer(questions[0], "");
        expect_same(d, second, want, rows[i].what);
        free(want);
        drive_close(d);
    }
}

Test(prefix, an_answer_is_part_of_what_the_next_turn_skips)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = small(true);
    options.prefix_every = 16;
    drive *d = drive_open(&options);
    uint64_t first = ask(d, "'tokens':[386,327,368],'temperature':0,'max_tokens':60,"
                            "'ignore_eos':true");
    char json[1024] = "'tokens':[386,327,368";
    const drive_stream *stream = drive_stream_of(d, first, 0);
    for (int i = 0; i < 60; i++)
        sprintf(json + strlen(json), ",%d", stream->deltas[i].token);
    strcat(json, ",300,301],'temperature':0,'max_tokens':8,'logprobs':0");
    uint64_t second = ask(d, json);
    cr_expect_eq(cached(d, second), 48, "%d", (int)cached(d, second));
    char *want = plain_answer(json, "");
    expect_same(d, second, want, "the next turn");
    free(want);
    drive_close(d);
}

Test(prefix, prompt_tokens_that_are_to_be_scored_are_computed)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = small(true);
    drive *d = drive_open(&options);
    for (int i = 0; i < 3; i++)
        ask(d, questions[i]);
    for (int n = 1; n <= 2; n++) {
        char json[2048];
        snprintf(json, sizeof json, "%s,'prompt_logprobs':2,'n':%d", questions[0], n);
        uint64_t scored = ask(d, json);
        cr_expect_eq(cached(d, scored), 0);
        char *want = plain_answer(json, "");
        expect_same(d, scored, want, json);
        free(want);
    }
    drive_close(d);
}

Test(prefix, n_answers_share_the_pages_of_their_prompt)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    char json[2048];
    snprintf(json, sizeof json, "%s,'n':4", questions[0]);
    char *want = plain_answer(json, "");
    for (int64_t swap_bytes = 0; swap_bytes <= 64 << 20; swap_bytes += 64 << 20) {
        qv_engine_options options = small(true);
        options.swap_bytes = swap_bytes;
        drive *d = drive_open(&options);
        for (int round = 0; round < 2; round++) { /* the second finds all of it */
            uint64_t before = n_prefilled(d), number = ask(d, json);
            int64_t last = n_prompt(d, number) - 1, shared = last - last % 16;
            for (int i = 0; i < 4; i++)
                cr_expect_eq(drive_stream_of(d, number, i)->usage.cached_tokens,
                             round > 0 || i > 0 ? shared : 0, "stream %d", i);
            cr_expect_eq(n_prefilled(d) - before,
                         (uint64_t)((round > 0 ? 0 : shared) + 4 * (last + 1 - shared)));
            expect_same(d, number, want, "four answers");
        }
        drive_close(d);
    }
    free(want);
}

Test(prefix, is_kept_by_every_rank)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    char *signature[2];
    for (int on = 0; on < 2; on++) {
        qv_engine_options options = small(on);
        options.tp = 2;
        options.overlap = "off";
        options.ep = 1;
        options.adapter_slots = 0;
        drive *d = drive_open(&options);
        ask(d, questions[0]);
        ask(d, questions[1]);
        uint64_t third = ask(d, questions[2]);
        cr_expect_eq(cached(d, third) > 0, on);
        signature[on] = drive_signature(d, third);
        drive_close(d);
    }
    cr_expect_str_eq(signature[0], signature[1]);
    free(signature[0]);
    free(signature[1]);
}

/* --- What is never skipped -------------------------------------------------------------------- */

Test(prefix, is_never_shared_across_adapters)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    static const char *const adapters[] = {"json", "french", "emoji"};
    qv_engine_options options = small(true);
    drive *d = drive_open(&options);
    for (int i = 0; i < 3; i++)
        drive_load(d, adapters[i], demo_adapter(adapters[i]));
    for (int round = 0; round < 3; round++) {
        uint64_t base = ask(d, questions[0]);
        cr_expect_eq(cached(d, base) > 0, round == 2, "base, round %d", round);
        for (int i = 0; i < 3; i++) {
            uint64_t number = ask_adapter(d, questions[0], adapters[i]);
            cr_expect_eq(cached(d, number) > 0, round == 2, "%s, round %d", adapters[i], round);
            char *want = plain_answer(questions[0], adapters[i]);
            expect_same(d, number, want, adapters[i]);
            free(want);
        }
    }
    drive_close(d);
}

Test(prefix, is_shared_by_names_of_one_content)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = small(true);
    drive *d = drive_open(&options);
    drive_load(d, "one", demo_adapter("json"));
    drive_load(d, "two", demo_adapter("json"));
    ask_adapter(d, questions[0], "one");
    ask_adapter(d, questions[0], "two");
    cr_expect_gt(cached(d, ask_adapter(d, questions[0], "one")), 0);
    drive_close(d);
}

Test(prefix, of_an_adapter_goes_when_it_is_replaced_or_unloaded)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = small(true);
    drive *d = drive_open(&options);
    for (int way = 0; way < 2; way++) {
        drive_load(d, "a", demo_adapter("json"));
        for (int i = 0; i < 3; i++)
            ask_adapter(d, questions[0], "a");
        cr_expect_eq(stats_of(d).n_scopes, 1);
        cr_expect_gt(stats_of(d).n_snapshots, 0);
        if (way == 0) {
            drive_load(d, "a", demo_adapter("french"));
            char *signature[2];
            for (int i = 0; i < 2; i++) {
                uint64_t number = ask_adapter(d, questions[0], "a");
                cr_expect_eq(cached(d, number), 0, "nothing of what it was");
                signature[i] = drive_signature(d, number);
            }
            char *want = plain_answer(questions[0], "french");
            cr_expect_str_eq(signature[0], want);
            cr_expect_str_eq(signature[1], want);
            free(signature[0]);
            free(signature[1]);
            free(want);
        }
        cr_assert_eq(qv_engine_unload_adapter(d->engine, "a"), QV_OK);
        drive_step(d);
        cr_expect_eq(stats_of(d).n_scopes, 0);
        cr_expect_eq(stats_of(d).n_pages, 0);
        cr_expect_eq(stats_of(d).n_snapshots, 0);
    }
    drive_close(d);
}

Test(prefix, of_a_request_that_outlives_its_adapter_is_not_kept)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = small(true);
    drive *d = drive_open(&options);
    drive_load(d, "a", demo_adapter("json"));
    char json[2048];
    snprintf(json, sizeof json, "%s,'adapter':'a'", questions[0]);
    uint64_t number = drive_submit(d, json);
    while (n_prefilled(d) == 0)
        drive_step(d);
    cr_assert_eq(qv_engine_unload_adapter(d->engine, "a"), QV_OK);
    drive_run(d);
    cr_expect_str_empty(drive_get(d, number)->message);
    cr_expect_eq(stats_of(d).n_pages, 0);
    char *want = plain_answer(questions[0], "json");
    expect_same(d, number, want, "what runs keeps its version");
    free(want);
    drive_close(d);
}

Test(prefix, with_numbers_that_are_not_finite_is_dropped)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    const char *dir = qv_temp_dir();
    size_t size;
    char *config = qv_read_file(qv_path(demo_adapter("json"), "adapter_config.json"), &size);
    qv_write_file(qv_path(dir, "adapter_config.json"), config, size);
    free(config);
    char *data = qv_read_file(qv_path(demo_adapter("json"), "adapter_model.safetensors"), &size);
    uint64_t header;
    memcpy(&header, data, sizeof header);
    for (size_t i = 8 + header; i + 1 < size; i += 2)
        memcpy(data + i, &(uint16_t){0x7F7F}, 2); /* finite, but their products are not */
    qv_write_file(qv_path(dir, "adapter_model.safetensors"), data, size);
    free(data);

    qv_engine_options options = small(true);
    options.prefill_chunk = 32;
    options.prefix_every = 16;
    drive *d = drive_open(&options);
    drive_load(d, "huge", dir);
    char json[2048];
    snprintf(json, sizeof json, "%s,'adapter':'huge'", questions[0]);
    uint64_t number = drive_submit(d, json);
    while (stats_of(d).n_snapshots == 0 && !drive_get(d, number)->failed)
        drive_step(d);
    cr_expect_gt(stats_of(d).n_snapshots, 0, "nothing looked wrong so far");
    drive_run(d);
    cr_expect(drive_get(d, number)->failed);
    cr_expect_eq(stats_of(d).n_snapshots, 0);
    cr_expect_eq(stats_of(d).n_pages, 0);
    drive_close(d);
}

/* --- Under pressure -------------------------------------------------------------------------- */

/* Requests that share beginnings in many ways: the same few words in drawn order, on the base model
 * and two adapters. */
enum { N_DRAWN = 32 };

static char *drawn_request(qv_rng *rng)
{
    static const char *const words[] = {"Lena counted five black shoes at the market. ",
                                        "Tara lost seven yellow bikes at the station. ",
                                        "Bruno carried nine black boats. "};
    static const char *const rest[] = {"", ",'adapter':'json'", ",'adapter':'french'", ",'n':2",
                                       ",'prompt_logprobs':0"};
    char *out = calloc(1, 4096);
    strcpy(out, "'prompt':'");
    for (int n = (int)qv_rng_range(rng, 2, 9); n > 0; n--)
        strcat(out, words[qv_rng_range(rng, 0, 8) % 3]);
    sprintf(out + strlen(out), "','temperature':1,'seed':%d,'max_tokens':%d,'logprobs':0%s",
            (int)qv_rng_range(rng, 0, 100), (int)qv_rng_range(rng, 1, 30),
            rest[qv_rng_range(rng, 0, 5)]);
    return out;
}

static drive *open_adapters(const qv_engine_options *options)
{
    drive *d = drive_open(options);
    drive_load(d, "json", demo_adapter("json"));
    drive_load(d, "french", demo_adapter("french"));
    return d;
}

static const struct {
    const char *what;
    int64_t snapshots, max_running, preempt_every, swap_bytes, prefill_chunk, prefix_every;
    int64_t kv_pages; /* of 8 tokens; 0 = enough */
    uint64_t min_hits;
    bool evicts_pages, evicts_snapshots;
} pressures[] = {
    {"room for all", 128, 16, 0, 1 << 28, 0, 16, 0, 8, false, false},
    {"no slots of its own", 0, 4, 0, 1 << 28, 16, 16, 0, 0, false, true},
    {"one running", 1, 1, 0, 1 << 28, 16, 8, 0, 0, false, true},
    {"few pages", 8, 8, 0, 1 << 28, 24, 32, 70, 3, true, true},
    {"few pages, computed again", 8, 8, 0, 0, 24, 32, 70, 3, true, true},
    {"preempted, saved", 16, 8, 2, 1 << 28, 16, 16, 0, 3, false, true},
    {"preempted, computed again", 16, 8, 3, 0, 16, 16, 0, 3, false, true},
    {"preempted, few pages", 3, 6, 3, 1 << 20, 16, 16, 90, 0, true, true},
};

Test(prefix, changes_no_bit_under_pressure, .timeout = 300)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_rng rng = qv_rng_seed(5);
    char *json[N_DRAWN], *want[N_DRAWN];
    qv_engine_options plain = small(false);
    drive *reference = open_adapters(&plain);
    for (int i = 0; i < N_DRAWN; i++) {
        json[i] = drawn_request(&rng);
        want[i] = drive_signature(reference, ask(reference, json[i]));
    }
    drive_close(reference);

    for (size_t p = 0; p < sizeof pressures / sizeof *pressures; p++) {
        qv_engine_options options = small(true);
        options.page_tokens = 8;
        options.prefix_snapshots = pressures[p].snapshots;
        options.max_running = pressures[p].max_running;
        options.preempt_every = pressures[p].preempt_every;
        options.swap_bytes = pressures[p].swap_bytes;
        options.prefill_chunk = pressures[p].prefill_chunk;
        options.prefix_every = pressures[p].prefix_every;
        if (pressures[p].kv_pages > 0) { /* 2 attention layers, k and v, 2 heads of 64 floats */
            options.kv_bytes = pressures[p].kv_pages * options.page_tokens * 2 * 2 * 2 * 64 * 4;
            options.max_context = 400;
        }
        drive *d = open_adapters(&options);
        uint64_t number[2][N_DRAWN];
        for (int round = 0; round < 2; round++) {
            for (int i = 0; i < N_DRAWN; i++)
                number[round][i] = drive_submit(d, json[i]);
            drive_run(d);
        }
        for (int i = 0; i < 2 * N_DRAWN; i++)
            expect_same(d, number[i / N_DRAWN][i % N_DRAWN], want[i % N_DRAWN], pressures[p].what);
        qv_prefix_stats stats = stats_of(d);
        cr_expect_geq(stats.hits, pressures[p].min_hits, "%s: %d hits", pressures[p].what,
                      (int)stats.hits);
        cr_expect_eq(stats.pages_evicted > 0, pressures[p].evicts_pages, "%s: %d pages evicted",
                     pressures[p].what, (int)stats.pages_evicted);
        cr_expect_eq(stats.snapshots_evicted > 0, pressures[p].evicts_snapshots,
                     "%s: %d snapshots evicted", pressures[p].what, (int)stats.snapshots_evicted);
        drive_close(d);
    }
    for (int i = 0; i < N_DRAWN; i++) {
        free(json[i]);
        free(want[i]);
    }
}

Test(prefix, survives_cancelled_requests, .timeout = 300)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    char *want[N_QUESTIONS];
    for (int i = 0; i < N_QUESTIONS; i++)
        want[i] = plain_answer(questions[i], "");
    for (int after = 0; after < 12; after++) { /* steps; the prompt takes some 6 of them */
        qv_engine_options options = small(true);
        options.prefill_chunk = 20;
        options.prefix_every = 16;
        drive *d = drive_open(&options);
        ask(d, questions[1]);
        char several[2048];
        snprintf(several, sizeof several, "%s,'n':3", questions[0]);
        uint64_t victim[] = {drive_submit(d, questions[0]), drive_submit(d, several)};
        for (int i = 0; i < after && d->n_open > 0; i++)
            drive_step(d);
        for (int i = 0; i < 2; i++)
            qv_engine_abort(d->engine, victim[i], "cancelled");
        for (int i = 0; i < N_QUESTIONS; i++)
            expect_same(d, ask(d, questions[i]), want[i], "after a cancelled one");
        drive_close(d);
    }
    for (int i = 0; i < N_QUESTIONS; i++)
        free(want[i]);
}

Test(prefix, lets_more_answers_in_than_pages_without_sharing)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = small(true);
    options.kv_bytes = (int64_t)14 * 16 * 2 * 2 * 2 * 64 * 4;
    options.max_context = 14 * 16;
    drive *d = drive_open(&options);
    for (int i = 0; i < 3; i++)
        ask(d, questions[0]); /* 6 pages each */
    for (int i = 0; i < 4; i++)
        drive_submit(d, questions[0]);
    drive_step(d);
    qv_engine_stats stats;
    qv_engine_get_stats(d->engine, &stats);
    cr_expect_eq(stats.running, 4, "%d run; alone, each takes 6 of 14 pages", stats.running);
    drive_run(d);
    drive_close(d);
}
