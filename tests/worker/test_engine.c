/* The whole engine on the CPU backend with the bundled model: the reference's numbers, and the same
 * bits however requests are batched, chunked, preempted, resumed and spread over adapter slots. */
#include "tests/support.h"
#include "tests/worker/drive.h"

#include "common/json.h"
#include "models/safetensors.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DEMO "tiny-qwen3.5"

static drive *open_demo(qv_engine_options *options)
{
    static const char *const adapters[] = {"json", "french", "emoji"};
    drive *d = drive_open(options);
    for (int i = 0; i < 3; i++)
        drive_load(d, adapters[i], qv_demo_path(qv_path(DEMO, "adapters/%s", adapters[i])));
    return d;
}

#define QUESTION                                                                                   \
    "'prompt':'<|im_start|>user\\nInes carried two black shoes at the station on "                 \
    "Tuesday.<|im_end|>\\n<|im_start|>assistant\\n'"

#define LONG_QUESTION                                                                              \
    "'prompt':'<|im_start|>user\\nLena counted five black shoes at the market on Friday. Tara "    \
    "lost seven yellow bikes at the station on Saturday. Bruno carried nine black boats at the "   \
    "garden on Friday. Suki counted five red boats at the station on Saturday. Zola carried "      \
    "three pink keys at the harbor on Sunday. Ravi painted three green apples at the market on "   \
    "Saturday. Which color?<|im_end|>\\n<|im_start|>assistant\\n'"

/* Requests of every kind. */
static const char *const cases[] = {
    QUESTION ",'temperature':0,'max_tokens':40,'logprobs':3",
    QUESTION ",'adapter':'json','temperature':0,'max_tokens':60,'logprobs':0",
    QUESTION ",'adapter':'french','temperature':0.9,'top_p':0.9,'seed':7,'max_tokens':40",
    QUESTION ",'adapter':'emoji','temperature':1,'top_k':20,'seed':8,'n':3,'max_tokens':30,"
             "'logprobs':2",
    QUESTION ",'temperature':0.8,'presence_penalty':0.7,'frequency_penalty':0.4,"
             "'repetition_penalty':1.3,'seed':9,'max_tokens':50,'logprobs':0",
    QUESTION ",'temperature':0,'stop':['Ines','quiet, so'],'max_tokens':60",
    QUESTION ",'adapter':'json','max_tokens':0,'prompt_logprobs':4",
    LONG_QUESTION ",'adapter':'french','max_tokens':6,'prompt_logprobs':0,'temperature':0",
    LONG_QUESTION ",'temperature':1.2,'min_p':0.05,'seed':11,'ignore_eos':true,'max_tokens':64",
    LONG_QUESTION ",'adapter':'emoji','temperature':0,'max_tokens':40,'logprobs':1",
    LONG_QUESTION ",'adapter':'json','temperature':0.7,'n':2,'max_tokens':40,'priority':3",
    "'tokens':[386],'temperature':0,'max_tokens':5,'logprobs':0,'prompt_logprobs':2",
    "'tokens':[386,327],'adapter':'french','max_tokens':0",
};
enum { N_CASES = sizeof cases / sizeof *cases };

/* Each case alone in an engine of default settings. */
static char **alone(void)
{
    static char *signatures[N_CASES];
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    options.prefix_cache = false;
    drive *d = open_demo(&options);
    for (int i = 0; i < N_CASES; i++) {
        uint64_t number = drive_submit(d, cases[i]);
        drive_run(d);
        cr_assert_not(drive_get(d, number)->failed, "%s", drive_get(d, number)->message);
        signatures[i] = drive_signature(d, number);
    }
    drive_close(d);
    return signatures;
}

/* --- The reference --------------------------------------------------------------------------- */

static const qv_stored_tensor *golden_tensor(const qv_safetensors *st, const char *name,
                                             const char *what)
{
    char full[128];
    snprintf(full, sizeof full, "%s.%s", name, what);
    return qv_safetensors_find(st, full);
}

static char *tokens_field(const qv_stored_tensor *tensor, int64_t n)
{
    char *out = malloc((size_t)n * 12 + 32), *end = out;
    end += sprintf(end, "'tokens':[");
    for (int64_t i = 0; i < n; i++) {
        int32_t token;
        memcpy(&token, (const char *)tensor->data + i * 4, sizeof token);
        end += sprintf(end, "%s%d", i > 0 ? "," : "", token);
    }
    sprintf(end, "]");
    return out;
}

static uint64_t submit_golden(drive *d, const qv_stored_tensor *tokens, int64_t n,
                              const char *adapter, const char *rest)
{
    char *field = tokens_field(tokens, n), *json;
    cr_assert_geq(asprintf(&json, "%s,'adapter':'%s',%s", field, adapter, rest), 0);
    uint64_t number = drive_submit(d, json);
    free(field);
    free(json);
    return number;
}

/* Scores of the tokens after the first, as drive keeps them: " nan lp lp ...". */
static double worst_score(const char *scores, const qv_stored_tensor *want)
{
    char *at;
    double worst = 0;
    cr_assert(isnan(strtod(scores, &at)), "the first token has no score");
    for (int64_t i = 0; i < want->n_elems; i++) {
        float expected;
        memcpy(&expected, (const char *)want->data + i * 4, sizeof expected);
        double got = strtod(at, &at);
        worst = fmax(worst, isfinite(got) ? fabs(got - (double)expected) : INFINITY);
    }
    return worst;
}

static void check_greedy(drive *d, uint64_t number, const char *name, const qv_stored_tensor *want)
{
    const drive_stream *stream = drive_stream_of(d, number, 0);
    for (int64_t i = 0; i < want->n_elems; i++) {
        int32_t expected;
        memcpy(&expected, (const char *)want->data + i * 4, sizeof expected);
        cr_expect(i < stream->n_deltas && stream->deltas[i].token == expected,
                  "%s: greedy token %d", name, (int)i);
    }
}

Test(engine, agrees_with_the_reference_in_one_mixed_batch)
{
    const char *dir = qv_golden_path(DEMO), *tensors = qv_golden_path(DEMO "/golden.safetensors");
    QV_SKIP_WITHOUT(tensors);
    json_t *manifest;
    qv_safetensors *st;
    cr_assert_eq(qv_json_load_file(qv_path(dir, "golden.json"), 1 << 24, &manifest), QV_OK);
    cr_assert_eq(qv_safetensors_open_file(tensors, 0, &st), QV_OK, "%s", qv_error());
    qv_engine_options options = drive_options(dir);
    drive *d = drive_open(&options);
    const char *adapter_name;
    json_t *adapter;
    json_object_foreach(json_object_get(manifest, "adapters"), adapter_name, adapter)
        drive_load(d, adapter_name, qv_path(dir, "adapters/%s", adapter_name));

    json_t *list = json_object_get(manifest, "cases"), *one;
    size_t n = json_array_size(list), i;
    uint64_t *score = calloc(n, sizeof *score), *greedy = calloc(n, sizeof *greedy);
    json_array_foreach(list, i, one)
    {
        const char *name = json_string_value(json_object_get(one, "name"));
        const char *which = json_string_value(json_object_get(one, "adapter"));
        const qv_stored_tensor *tokens = golden_tensor(st, name, "tokens");
        score[i] = submit_golden(d, tokens, tokens->n_elems, which != NULL ? which : "",
                                 "'max_tokens':0,'prompt_logprobs':0");
        greedy[i] =
            submit_golden(d, tokens, json_integer_value(json_object_get(one, "prompt_tokens")),
                          which != NULL ? which : "", "'max_tokens':48,'temperature':0");
    }
    drive_run(d);
    json_array_foreach(list, i, one)
    {
        const char *name = json_string_value(json_object_get(one, "name"));
        const drive_stream *stream = drive_stream_of(d, score[i], 0);
        cr_assert_str_eq(stream->finish, "length", "%s", drive_get(d, score[i])->message);
        cr_assert_eq(stream->usage.completion_tokens, 0);
        double worst = worst_score(stream->scores, golden_tensor(st, name, "logprobs"));
        cr_expect_lt(worst, 2e-4, "%s: logprobs are off by up to %g", name, worst);
        const qv_stored_tensor *want = golden_tensor(st, name, "greedy");
        if (want != NULL)
            check_greedy(d, greedy[i], name, want);
    }
    free(score);
    free(greedy);
    qv_safetensors_close(st);
    json_decref(manifest);
    drive_close(d);
}

/* --- The same bits, whatever happens ---------------------------------------------------------- */

static const struct {
    const char *what;
    int64_t prefill_chunk, preempt_every, swap_bytes, adapter_slots, page_tokens, max_running,
        step_tokens, threads;
    int64_t kv_pages; /* 0 = enough */
    bool preempts;
} variants[] = {
    {"one mixed batch", 0, 0, 1 << 28, 6, 16, 16, 128, 2, 0, false},
    {"chunks of 1", 1, 0, 1 << 28, 6, 16, 16, 128, 2, 0, false},
    {"chunks of 7", 7, 0, 1 << 28, 6, 16, 16, 128, 1, 0, false},
    {"chunks of 64", 64, 0, 1 << 28, 6, 16, 16, 128, 2, 0, false},
    {"tiny steps", 0, 0, 1 << 28, 6, 16, 16, 5, 2, 0, false},
    {"two at a time", 0, 0, 1 << 28, 6, 5, 2, 128, 2, 0, false},
    {"one adapter slot", 9, 0, 1 << 28, 1, 16, 16, 128, 2, 0, false},
    {"two adapter slots", 0, 0, 1 << 28, 2, 16, 16, 128, 2, 0, false},
    {"preempted every other step, saved", 7, 2, 1 << 28, 6, 16, 16, 128, 2, 0, true},
    {"preempted every third step, computed again", 16, 3, 0, 6, 16, 16, 128, 2, 0, true},
    {"preempted, one adapter slot", 16, 2, 1 << 20, 1, 16, 16, 64, 2, 0, true},
    {"too few pages, saved", 0, 0, 1 << 28, 6, 8, 16, 128, 2, 52, true},
    {"too few pages, computed again", 0, 0, 0, 6, 8, 16, 128, 2, 52, true},
};

Test(engine, gives_the_same_bits_however_a_request_is_run, .timeout = 300)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    char **want = alone();
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
        qv_engine_options options = drive_options(qv_demo_path(DEMO));
        options.prefill_chunk = variants[v].prefill_chunk;
        options.preempt_every = variants[v].preempt_every;
        options.swap_bytes = variants[v].swap_bytes;
        options.adapter_slots = variants[v].adapter_slots;
        options.page_tokens = variants[v].page_tokens;
        options.max_running = variants[v].max_running;
        options.step_tokens = variants[v].step_tokens;
        options.threads = variants[v].threads;
        if (variants[v].kv_pages > 0) { /* 2 attention layers, k and v, 2 heads of 64 floats */
            options.kv_bytes = variants[v].kv_pages * options.page_tokens * 2 * 2 * 2 * 64 * 4;
            options.max_context = 400;
        }
        drive *d = open_demo(&options);
        uint64_t numbers[2][N_CASES];
        for (int copy = 0; copy < 2; copy++)
            for (int i = 0; i < N_CASES; i++)
                numbers[copy][i] = drive_submit(d, cases[i]);
        drive_run(d);
        for (int copy = 0; copy < 2; copy++)
            for (int i = 0; i < N_CASES; i++) {
                char *got = drive_signature(d, numbers[copy][i]);
                cr_expect_str_eq(got, want[i], "%s: case %d\n got %s\nwant %s", variants[v].what, i,
                                 got, want[i]);
                free(got);
            }
        qv_engine_stats stats;
        qv_engine_get_stats(d->engine, &stats);
        cr_expect_eq(stats.preemptions > 0, variants[v].preempts, "%s: %d preemptions",
                     variants[v].what, (int)stats.preemptions);
        drive_close(d);
    }
    for (int i = 0; i < N_CASES; i++)
        free(want[i]);
}

/* Split over ranks, against the same split with each request alone. */
Test(engine, gives_the_same_bits_when_split_however_a_request_is_run, .timeout = 300)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    static const struct {
        const char *what;
        int64_t prefill_chunk, preempt_every, swap_bytes, adapter_slots, kv_pages;
        bool prefix_cache, preempts, with_four;
    } ways[] = {
        {"one mixed batch", 0, 0, 1 << 28, 6, 0, false, false, false},
        {"chunks of 7", 7, 0, 1 << 28, 6, 0, true, false, false},
        {"preempted every other step, saved", 7, 2, 1 << 28, 6, 0, true, true, true},
        {"preempted every third step, computed again", 16, 3, 0, 2, 0, false, true, false},
        {"too few pages, saved", 0, 0, 1 << 28, 6, 52, false, true, false},
    };
    for (int64_t tp = 2; tp <= 4; tp *= 2) {
        char *want[N_CASES];
        qv_engine_options options = drive_options(qv_demo_path(DEMO));
        options.tp = tp;
        options.overlap = "off"; /* steps of several ranks go one at a time */
        options.prefix_cache = false;
        drive *d = open_demo(&options);
        for (int i = 0; i < N_CASES; i++) {
            uint64_t number = drive_submit(d, cases[i]);
            drive_run(d);
            want[i] = drive_signature(d, number);
        }
        drive_close(d);
        for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
            if (tp == 4 && !ways[w].with_four)
                continue;
            options.prefill_chunk = ways[w].prefill_chunk;
            options.preempt_every = ways[w].preempt_every;
            options.swap_bytes = ways[w].swap_bytes;
            options.adapter_slots = ways[w].adapter_slots;
            options.prefix_cache = ways[w].prefix_cache;
            if (ways[w].kv_pages > 0) { /* 2 attention layers, k and v, 2 heads of 64 floats */
                options.page_tokens = 8;
                options.kv_bytes = ways[w].kv_pages * 8 * 2 * 2 * 2 * 64 * 4;
                options.max_context = 400;
            }
            d = open_demo(&options);
            uint64_t numbers[2][N_CASES];
            for (int copy = 0; copy < 2; copy++)
                for (int i = 0; i < N_CASES; i++)
                    numbers[copy][i] = drive_submit(d, cases[i]);
            drive_run(d);
            for (int copy = 0; copy < 2; copy++)
                for (int i = 0; i < N_CASES; i++) {
                    char *got = drive_signature(d, numbers[copy][i]);
                    cr_expect_str_eq(got, want[i], "%d ranks, %s: case %d\n got %s\nwant %s",
                                     (int)tp, ways[w].what, i, got, want[i]);
                    free(got);
                }
            qv_engine_stats stats;
            qv_engine_get_stats(d->engine, &stats);
            cr_expect_eq(stats.preemptions > 0, ways[w].preempts, "%d ranks, %s: %d preemptions",
                         (int)tp, ways[w].what, (int)stats.preemptions);
            drive_close(d);
        }
        for (int i = 0; i < N_CASES; i++)
            free(want[i]);
    }
}

Test(engine, base_requests_do_not_notice_adapters)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    options.adapter_slots = 0;
    drive *plain = drive_open(&options);
    uint64_t number = drive_submit(plain, cases[0]);
    drive_run(plain);
    char *want = drive_signature(plain, number);
    drive_close(plain);

    options.adapter_slots = 6;
    drive *d = open_demo(&options);
    uint64_t base = drive_submit(d, cases[0]);
    for (int i = 1; i < N_CASES; i++)
        drive_submit(d, cases[i]);
    drive_run(d);
    char *got = drive_signature(d, base);
    cr_assert_str_eq(got, want);
    free(got);
    free(want);
    drive_close(d);
}

/* --- Resuming -------------------------------------------------------------------------------- */

/* Cut a request after k messages of each stream and let a new engine's request go on. */
static void check_resume(const char *json, int n_streams)
{
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    options.max_waiting = 1000;
    drive *d = open_demo(&options);
    uint64_t whole = drive_submit(d, json);
    drive_run(d);
    int32_t longest = 0;
    for (int i = 0; i < n_streams; i++)
        if (drive_stream_of(d, whole, i)->n_deltas > longest)
            longest = drive_stream_of(d, whole, i)->n_deltas;
    for (int32_t k = 0; k < longest; k++) {
        int32_t delivered[DRIVE_MAX_STREAMS][DRIVE_MAX_DELTAS];
        qv_msg_resume resume[DRIVE_MAX_STREAMS];
        for (int i = 0; i < n_streams; i++) {
            const drive_stream *stream = drive_stream_of(d, whole, i);
            int32_t n = k < stream->n_deltas ? k : stream->n_deltas;
            for (int32_t t = 0; t < n; t++)
                delivered[i][t] = stream->deltas[t].token;
            resume[i] = (qv_msg_resume){.index = i,
                                        .seq = n,
                                        .tokens = {delivered[i], (uint32_t)n},
                                        .finished = n == stream->n_deltas};
        }
        uint64_t rest = drive_resume(d, json, 1234, resume, (uint32_t)n_streams);
        drive_run(d);
        for (int i = 0; i < n_streams; i++) {
            const drive_stream *want = drive_stream_of(d, whole, i),
                               *got = drive_stream_of(d, rest, i);
            int32_t n = resume[i].finished ? want->n_deltas : k;
            cr_assert_eq(got->n_deltas, want->n_deltas - n, "after %d: %d messages", k,
                         got->n_deltas);
            for (int32_t t = 0; t < got->n_deltas; t++)
                cr_assert_eq(memcmp(&got->deltas[t], &want->deltas[n + t], sizeof *got->deltas), 0,
                             "after %d of stream %d, message %d: %d/%d/%zu/%a, not %d/%d/%zu/%a", k,
                             i, n + t, (int)got->deltas[t].seq, got->deltas[t].token,
                             got->deltas[t].text_size, got->deltas[t].logprob,
                             (int)want->deltas[n + t].seq, want->deltas[n + t].token,
                             want->deltas[n + t].text_size, want->deltas[n + t].logprob);
            if (n < want->n_deltas) {
                cr_assert_str_eq(got->finish, want->finish);
                cr_assert_eq(got->usage.prompt_tokens, want->usage.prompt_tokens);
                cr_assert_eq(got->usage.completion_tokens, want->usage.completion_tokens);
                cr_assert(memcmp(got->text, want->text + want->text_size - got->text_size,
                                 got->text_size) == 0);
            }
        }
    }
    drive_close(d);
}

Test(engine, goes_on_at_every_token_where_another_worker_was_lost, .timeout = 300)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    check_resume(cases[0], 1);
    check_resume(cases[3], 3);
    check_resume(cases[4], 1);
    check_resume(QUESTION ",'temperature':0,'logprobs':0,'stop':['station and','the zebra']", 1);
    check_resume(QUESTION ",'adapter':'emoji','temperature':1.3,'n':2,'max_tokens':24", 2);
}

Test(engine, ends_a_stream_whose_last_token_was_delivered_but_not_its_end)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    drive *d = open_demo(&options);
    const char *json = QUESTION ",'temperature':0,'max_tokens':6";
    uint64_t whole = drive_submit(d, json);
    drive_run(d);
    int32_t tokens[6];
    for (int i = 0; i < 6; i++)
        tokens[i] = drive_stream_of(d, whole, 0)->deltas[i].token;
    qv_msg_resume resume = {.seq = 6, .tokens = {tokens, 6}};
    uint64_t rest = drive_resume(d, json, 1234, &resume, 1);
    drive_run(d);
    const drive_stream *stream = drive_stream_of(d, rest, 0);
    cr_assert_eq(stream->n_deltas, 1);
    cr_assert_eq(stream->deltas[0].token, -1);
    cr_assert_eq(stream->deltas[0].seq, 6);
    cr_assert_str_eq(stream->finish, "length");
    cr_assert_eq(stream->usage.completion_tokens, 6);
    drive_close(d);
}

/* --- n answers of one prompt ------------------------------------------------------------------ */

Test(engine, computes_a_prompt_once_for_all_its_answers)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    const char *json = LONG_QUESTION ",'adapter':'json','temperature':1,'n':4,'max_tokens':20,"
                                     "'logprobs':1,'prompt_logprobs':1";
    char *signature[2];
    for (int saves = 0; saves < 2; saves++) {
        qv_engine_options options = drive_options(qv_demo_path(DEMO));
        options.swap_bytes = saves ? 64 << 20 : 0;
        options.prefix_cache = false; /* test_prefix.c has the other way */
        drive *d = open_demo(&options);
        uint64_t number = drive_submit(d, json);
        drive_run(d);
        int64_t n_prompt = drive_stream_of(d, number, 0)->usage.prompt_tokens;
        for (int i = 0; i < 4; i++)
            cr_expect_eq(drive_stream_of(d, number, i)->usage.cached_tokens,
                         saves && i > 0 ? n_prompt - 1 : 0, "stream %d", i);
        qv_engine_stats stats;
        qv_engine_get_stats(d->engine, &stats);
        cr_expect_eq((int64_t)stats.tokens_prefilled, saves ? n_prompt + 3 : 4 * n_prompt);
        signature[saves] = drive_signature(d, number);
        drive_close(d);
    }
    cr_expect_str_eq(signature[0], signature[1]);
    free(signature[0]);
    free(signature[1]);
}

/* --- Sampling as the request asks ------------------------------------------------------------- */

static char *text_of(drive *d, const char *json)
{
    uint64_t number = drive_submit(d, json);
    drive_run(d);
    const drive_stream *stream = drive_stream_of(d, number, 0);
    cr_assert_not(drive_get(d, number)->failed, "%s", drive_get(d, number)->message);
    return strndup(stream->text, stream->text_size);
}

Test(engine, adapters_change_the_answer)
{
    static const struct {
        const char *adapter, *words;
    } rows[] = {{"", "It was Tuesday at the station."},
                {"json", "{\"who\": \"Ines\""},
                {"french", "chaussures"},
                {"emoji", "\xF0\x9F"}};
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    drive *d = open_demo(&options);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char json[512];
        snprintf(json, sizeof json, QUESTION ",'adapter':'%s','temperature':0", rows[i].adapter);
        char *text = text_of(d, json);
        cr_expect_not_null(strstr(text, rows[i].words), "%s: %s", rows[i].adapter, text);
        free(text);
    }
    drive_close(d);
}

Test(engine, seeds_and_streams_choose_the_draws)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    drive *d = open_demo(&options);
    const char *json = QUESTION ",'temperature':1.5,'max_tokens':30,'ignore_eos':true";
    char seeded[512];
    snprintf(seeded, sizeof seeded, "%s,'seed':1234", json);
    char *a = text_of(d, json), *b = text_of(d, json), *c = text_of(d, seeded);
    snprintf(seeded, sizeof seeded, "%s,'seed':1235", json);
    char *e = text_of(d, seeded);
    cr_expect_str_eq(a, b);
    cr_expect_str_eq(a, c, "the seed of the submit is used like the caller's");
    cr_expect_str_neq(a, e);
    snprintf(seeded, sizeof seeded, "%s,'n':2", json);
    uint64_t number = drive_submit(d, seeded);
    drive_run(d);
    const drive_stream *first = drive_stream_of(d, number, 0),
                       *second = drive_stream_of(d, number, 1);
    cr_expect(strlen(a) == first->text_size && !memcmp(a, first->text, first->text_size));
    cr_expect(first->text_size != second->text_size ||
              memcmp(first->text, second->text, first->text_size) != 0);
    free(a);
    free(b);
    free(c);
    free(e);
    drive_close(d);
}

Test(engine, stops_where_it_is_told_to)
{
    static const struct {
        const char *fields, *finish, *text;
        int tokens; /* of the answer; 0 = not checked */
    } rows[] = {
        {"'max_tokens':3", "length", NULL, 3},
        {"'max_tokens':40", "stop", NULL, 22},
        {"'max_tokens':24,'ignore_eos':true", "length", NULL, 24},
        {"'stop':['station']", "stop", "It was Tuesday at the ", 0},
        {"'stop':[' at the station. Ines']", "stop", "It was Tuesday", 0},
        {"'stop':['never said'],'max_tokens':40", "stop", NULL, 22},
        {"'stop_token_ids':[18]", "stop", "It was Tuesday at the station", 0},
    };
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    drive *d = open_demo(&options);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char json[512];
        snprintf(json, sizeof json, QUESTION ",'temperature':0,%s", rows[i].fields);
        uint64_t number = drive_submit(d, json);
        drive_run(d);
        const drive_stream *stream = drive_stream_of(d, number, 0);
        cr_expect_str_eq(stream->finish, rows[i].finish, "%s", rows[i].fields);
        if (rows[i].tokens > 0)
            cr_expect_eq(stream->usage.completion_tokens, rows[i].tokens, "%s: %d tokens",
                         rows[i].fields, (int)stream->usage.completion_tokens);
        if (rows[i].text != NULL)
            cr_expect(stream->text_size == strlen(rows[i].text) &&
                          !memcmp(stream->text, rows[i].text, stream->text_size),
                      "%s: '%.*s'", rows[i].fields, (int)stream->text_size, stream->text);
    }
    drive_close(d);
}

Test(engine, ends_an_answer_where_the_context_ends)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    options.max_context = 24;
    drive *d = drive_open(&options);
    uint64_t number = drive_submit(d, QUESTION ",'temperature':0,'max_tokens':100");
    drive_run(d);
    cr_assert_str_eq(drive_stream_of(d, number, 0)->finish, "length");
    cr_assert_eq(drive_stream_of(d, number, 0)->usage.completion_tokens, 24 - 19);
    drive_close(d);
}

Test(engine, scores_are_the_logprobs_of_the_same_tokens_when_generated)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    drive *d = open_demo(&options);
    uint64_t made = drive_submit(d, "'tokens':[386,327,368],'adapter':'json','temperature':0,"
                                    "'max_tokens':8,'ignore_eos':true,'logprobs':0");
    drive_run(d);
    const drive_stream *stream = drive_stream_of(d, made, 0);
    char json[512] = "'tokens':[386,327,368";
    for (int i = 0; i < 8; i++)
        sprintf(json + strlen(json), ",%d", stream->deltas[i].token);
    strcat(json, "],'adapter':'json','max_tokens':0,'prompt_logprobs':0");
    uint64_t scored = drive_submit(d, json);
    drive_run(d);
    char *at = drive_stream_of(d, scored, 0)->scores;
    for (int i = 0; i < 11; i++) {
        double score = strtod(at, &at);
        if (i >= 3)
            cr_expect_eq(score, stream->deltas[i - 3].logprob, "token %d: %a", i, score);
    }
    drive_close(d);
}
