/* Requests from the door to their end: what is refused and with which words, and that every way to
 * end gives everything back and disturbs nobody else.
 */
#include "tests/support.h"
#include "tests/worker/drive.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEMO     "tiny-qwen3.5"
#define QUESTION "'prompt':'<|im_start|>user\\nHi.<|im_end|>\\n<|im_start|>assistant\\n'"

static const char *demo_adapter(const char *name)
{
    return qv_demo_path(qv_path(DEMO, "adapters/%s", name));
}

static drive *open_demo(void)
{
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    return drive_open(&options);
}

static void expect_answer(drive *d, uint64_t number, const char *finish)
{
    cr_expect_not(drive_get(d, number)->failed, "%s", drive_get(d, number)->message);
    cr_expect_str_eq(drive_stream_of(d, number, 0)->finish, finish);
}

static void expect_error(drive *d, uint64_t number, qv_code code, const char *words)
{
    const drive_request *request = drive_get(d, number);
    cr_expect(request->failed);
    cr_expect_eq(request->code, code, "%s: %s", qv_code_name(request->code), request->message);
    cr_expect_not_null(strstr(request->message, words), "'%s' lacks '%s'", request->message, words);
}

/* --- At the door ----------------------------------------------------------------------------- */

static const struct {
    const char *json;
    qv_code code;
    const char *words;
} refused[] = {
    {"'max_tokens':1", QV_CODE_BAD_REQUEST, "prompt"},
    {"'prompt':'a','tokens':[1]", QV_CODE_BAD_REQUEST, "prompt"},
    {"'prompt':''", QV_CODE_BAD_REQUEST, "empty"},
    {"'tokens':[]", QV_CODE_BAD_REQUEST, "empty"},
    {"'tokens':[5,-1]", QV_CODE_BAD_REQUEST, "-1"},
    {"'tokens':[1600]", QV_CODE_BAD_REQUEST, "1600"},
    {"'tokens':[2147483647]", QV_CODE_BAD_REQUEST, "2147483647"},
    {"'prompt':'a','stop_token_ids':[1600]", QV_CODE_BAD_REQUEST, "stop_token_ids"},
    {"'prompt':'a','stop':['']", QV_CODE_BAD_REQUEST, "stop"},
    {"'prompt':'a','temperature':-1", QV_CODE_BAD_REQUEST, "temperature"},
    {"'prompt':'a','n':2,'temperature':0", QV_CODE_BAD_REQUEST, "n"},
    {"'prompt':'a','logprobs':33", QV_CODE_BAD_REQUEST, "logprobs"},
    {"'prompt':'a','adapter':'a b'", QV_CODE_BAD_REQUEST, "adapter"},
};

Test(requests, are_refused_with_a_code_and_a_sentence)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        expect_error(d, drive_submit(d, refused[i].json), refused[i].code, refused[i].words);
    cr_assert_not(qv_engine_has_work(d->engine), "nothing of them reached the engine");
    drive_close(d);
}

Test(requests, with_invalid_utf8_are_refused)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    static const char *const texts[] = {"\xFF", "a\xC3", "\xED\xA0\x80", "\xF5\x80\x80\x80"};
    for (int i = 0; i < 4; i++) {
        qv_message message;
        qv_message_init(&message, QV_MSG_SUBMIT);
        qv_set(&message.submit, submit, id, qv_str_from("t"));
        qv_set(&message.submit, submit, prompt, qv_str_from(texts[i]));
        qv_request *request;
        qv_code code;
        cr_expect_neq(qv_request_new(d->engine, &message.submit, 1, 0, NULL, 0, &request, &code),
                      QV_OK);
        cr_expect_eq(code, QV_CODE_BAD_REQUEST);
        cr_expect_not_null(strstr(qv_error(), "UTF-8"), "%s", qv_error());
    }
    drive_close(d);
}

/* A prompt of n tokens. */
static char *prompt_of(int n, const char *rest)
{
    char *out = malloc((size_t)n * 4 + strlen(rest) + 64), *end = out;
    end += sprintf(end, "'tokens':[");
    for (int i = 0; i < n; i++)
        end += sprintf(end, "%s386", i > 0 ? "," : "");
    sprintf(end, "],%s", rest);
    return out;
}

Test(requests, longer_than_the_context_are_told_both_numbers)
{
    static const struct {
        int n_prompt;
        const char *rest;
        bool fits;
    } rows[] = {
        {63, "'max_tokens':1", true},
        {64, "'max_tokens':1", false},
        {64, "'max_tokens':0", true},
        {65, "'max_tokens':0", false},
        {64, "'max_tokens':0,'prompt_logprobs':0", true},
    };
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    options.max_context = 64;
    drive *d = drive_open(&options);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *json = prompt_of(rows[i].n_prompt, rows[i].rest), words[32];
        uint64_t number = drive_submit(d, json);
        drive_run(d);
        snprintf(words, sizeof words, "%d tokens", rows[i].n_prompt);
        if (rows[i].fits) {
            expect_answer(d, number, "length");
        } else {
            expect_error(d, number, QV_CODE_CONTEXT_TOO_LONG, words);
            expect_error(d, number, QV_CODE_CONTEXT_TOO_LONG, "64");
        }
        free(json);
    }
    drive_close(d);
}

/* A fresh folder with links to some of the bundled model's files. */
static const char *link_model(const char *const *files)
{
    const char *dir = qv_temp_dir();
    for (; *files != NULL; files++)
        cr_assert_eq(symlink(qv_demo_path(qv_path(DEMO, "%s", *files)), qv_path(dir, "%s", *files)),
                     0);
    return dir;
}

static char *replaced(char *text, size_t *size, const char *from, const char *to)
{
    char *at = memmem(text, *size, from, strlen(from));
    cr_assert_not_null(at, "no '%s' in the file", from);
    size_t grown = *size - strlen(from) + strlen(to);
    char *out = malloc(grown + 1);
    size_t head = (size_t)(at - text);
    memcpy(out, text, head);
    memcpy(out + head, to, strlen(to));
    memcpy(out + head + strlen(to), at + strlen(from), *size - head - strlen(from));
    out[grown] = '\0';
    free(text);
    *size = grown;
    return out;
}

Test(requests, whose_scores_would_not_fit_a_reply_are_too_large)
{
    static const char *const files[] = {"model.safetensors", "tokenizer.json", NULL};
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    const char *dir = link_model(files);
    size_t size;
    char *config = qv_read_file(qv_demo_path(DEMO "/config.json"), &size);
    config = replaced(config, &size, "\"max_position_embeddings\": 4096",
                      "\"max_position_embeddings\": 65536");
    qv_write_file(qv_path(dir, "config.json"), config, size);
    free(config);
    qv_engine_options options = drive_options(dir);
    drive *d = drive_open(&options);
    char *json = prompt_of(20000, "'max_tokens':0,'prompt_logprobs':32");
    expect_error(d, drive_submit(d, json), QV_CODE_TOO_LARGE, "prompt_logprobs");
    free(json);
    drive_close(d);
}

Test(requests, that_resume_the_impossible_are_refused)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    int32_t tokens[] = {386, 327, 368}, bad[] = {386, 5000}, ended[] = {386, 2, 327};
    const struct {
        qv_msg_resume resume[2];
        uint32_t n;
        const char *words;
    } rows[] = {
        {{{.index = 1}}, 1, "stream 1"},
        {{{.index = 0, .seq = -1}}, 1, "-1"},
        {{{.tokens = {bad, 2}}}, 1, "5000"},
        {{{.tokens = {ended, 3}}}, 1, "ends after 2"},
        {{{.tokens = {tokens, 3}}, {.tokens = {tokens, 3}}}, 2, "twice"},
        {{{.finished = true}, {.finished = true}}, 2, "twice"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        expect_error(d, drive_resume(d, QUESTION ",'max_tokens':9", 1, rows[i].resume, rows[i].n),
                     QV_CODE_BAD_REQUEST, rows[i].words);
    drive_close(d);
}

Test(requests, beyond_the_queue_are_overloaded_and_the_others_go_on)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    options.max_running = 2;
    options.max_waiting = 3;
    drive *d = drive_open(&options);
    uint64_t taken[5];
    for (int i = 0; i < 5; i++)
        taken[i] = drive_submit(d, QUESTION ",'max_tokens':4,'ignore_eos':true");
    uint64_t over = drive_submit(d, QUESTION ",'max_tokens':4");
    uint64_t many = drive_submit(d, QUESTION ",'max_tokens':4,'n':6,'temperature':1");
    drive_run(d);
    expect_error(d, over, QV_CODE_OVERLOADED, "5 answers");
    expect_error(d, many, QV_CODE_OVERLOADED, "limit");
    for (int i = 0; i < 5; i++)
        expect_answer(d, taken[i], "length");
    drive_close(d);
}

Test(requests, with_a_number_that_runs_are_refused_without_ending_it)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    uint64_t number = drive_submit(d, QUESTION ",'max_tokens':4,'ignore_eos':true");
    qv_message message;
    qv_message_init(&message, QV_MSG_SUBMIT);
    qv_set(&message.submit, submit, id, qv_str_from("t"));
    qv_set(&message.submit, submit, prompt, qv_str_from("a"));
    qv_request *request;
    qv_code code;
    cr_assert_eq(qv_request_new(d->engine, &message.submit, number, 0, NULL, 0, &request, &code),
                 QV_OK);
    cr_assert_eq(qv_engine_submit(d->engine, request), QV_ERR_EXISTS);
    drive_run(d);
    expect_answer(d, number, "length");
    drive_close(d);
}

/* --- Messages -------------------------------------------------------------------------------- */

Test(requests, with_messages_are_rendered_by_the_models_template)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    uint64_t chat = drive_submit(d, "'messages':[{'role':'user','content':'Hi.'}],"
                                    "'temperature':0,'max_tokens':8,'logprobs':0");
    uint64_t plain = drive_submit(d, QUESTION ",'temperature':0,'max_tokens':8,'logprobs':0");
    uint64_t bad = drive_submit(d, "'messages':[{'role':'user'}]");
    drive_run(d);
    char *a = drive_signature(d, chat), *b = drive_signature(d, plain);
    cr_expect_str_eq(a, b);
    cr_expect(drive_get(d, bad)->failed);
    cr_expect_eq(drive_get(d, bad)->code, QV_CODE_BAD_REQUEST);
    free(a);
    free(b);
    drive_close(d);
}

Test(requests, with_messages_need_a_template)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    static const char *const files[] = {"config.json", "model.safetensors", "tokenizer.json", NULL};
    const char *dir = link_model(files);
    qv_engine_options options = drive_options(dir);
    drive *d = drive_open(&options);
    uint64_t chat = drive_submit(d, "'messages':[{'role':'user','content':'Hi.'}]");
    expect_error(d, chat, QV_CODE_BAD_REQUEST, "no chat template");
    drive_close(d);
}

/* The bundled model with another template. */
static const char *model_with_template(const char *template)
{
    static const char *const files[] = {"config.json", "model.safetensors", "tokenizer.json", NULL};
    const char *dir = link_model(files);
    qv_write_text(qv_path(dir, "chat_template.jinja"), template);
    return dir;
}

Test(requests, bring_tools_and_options_to_the_template)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(model_with_template(
        "{% for t in tools or [] %}tool {{ t.name }} {% endfor %}"
        "{% if enable_thinking is defined and enable_thinking %}think {% endif %}"
        "{{ style | default('plain') }} {{ messages[0].content }}"
        "{% if add_generation_prompt %} answer{% endif %}"));
    static const struct {
        const char *fields, *prompt;
    } rows[] = {
        {"", "plain Hi. answer"},
        {",'tools':[{'name':'f'},{'name':'g'}]", "tool f tool g plain Hi. answer"},
        {",'tools':null", "plain Hi. answer"},
        {",'chat_template_kwargs':{'enable_thinking':true}", "think plain Hi. answer"},
        {",'chat_template_kwargs':{'enable_thinking':false}", "plain Hi. answer"},
        {",'tools':[{'name':'f'}],'chat_template_kwargs':{'enable_thinking':true,'style':'odd'}",
         "tool f think odd Hi. answer"},
    };
    drive *d = drive_open(&options);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *json, *plain;
        cr_assert_gt(asprintf(&json,
                              "'messages':[{'role':'user','content':'Hi.'}]%s,'temperature':0,"
                              "'max_tokens':0,'prompt_logprobs':1",
                              rows[i].fields),
                     0);
        cr_assert_gt(asprintf(&plain,
                              "'prompt':'%s','temperature':0,'max_tokens':0,'prompt_logprobs':1",
                              rows[i].prompt),
                     0);
        uint64_t chat = drive_submit(d, json), want = drive_submit(d, plain);
        drive_run(d);
        char *a = drive_signature(d, chat), *b = drive_signature(d, want);
        cr_expect_str_eq(a, b, "row %zu: %s\n%s", i, a, b);
        free(a), free(b), free(json), free(plain);
    }
    drive_close(d);
}

Test(requests, that_a_template_refuses_or_does_not_end_are_told_in_its_words)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(model_with_template(
        "{% set l = range(9999) %}"
        "{% if messages[0].role == 'loop' %}{% for i in l %}{% for j in l %}"
        "{% endfor %}{% endfor %}{% elif messages[0].role == 'long' %}"
        "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxx' * 99 }}{% endfor %}"
        "{% elif messages[0].role == 'deep' %}{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"
        "{% elif messages[0].role != 'user' %}"
        "{{ raise_exception('No turns of ' ~ messages[0].role ~ ', please.') }}{% endif %}"
        "{{ messages[0].content }}{{ messages[0].name.first }}"));
    static const struct {
        const char *json, *words;
        qv_code code;
    } rows[] = {
        {"'messages':[{'role':'pirate','content':'a'}]", "No turns of pirate, please.",
         QV_CODE_BAD_REQUEST},
        {"'messages':[{'role':'user','content':'a'}]", "has no attribute 'name'",
         QV_CODE_BAD_REQUEST},
        {"'messages':[]", "messages: empty", QV_CODE_BAD_REQUEST},
        {"'messages':[7]", "messages[0]: 7 is an integer", QV_CODE_BAD_REQUEST},
        {"'messages':[{'role':'user'}],'tools':[7],'chat_template_kwargs':{'messages':[]}",
         "'messages'", QV_CODE_BAD_REQUEST},
        {"'messages':[{'role':'loop','content':'a'}]", "steps", QV_CODE_TOO_LARGE},
        {"'messages':[{'role':'long','content':'a'}]", "bytes", QV_CODE_TOO_LARGE},
        {"'messages':[{'role':'deep','content':'a'}]", "nests deeper", QV_CODE_TOO_LARGE},
    };
    drive *d = drive_open(&options);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        expect_error(d, drive_submit(d, rows[i].json), rows[i].code, rows[i].words);
    drive_close(d);
}

Test(requests, are_told_what_of_a_template_was_refused_when_the_model_was_loaded)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    const char *log = qv_path(qv_temp_dir(), "log");
    cr_assert_not_null(freopen(log, "w", stderr));
    qv_engine_options options = drive_options(model_with_template(
        "{{ messages[0].content }}\n{% if messages[0].rare %}{{ 'a' | xmlattr }}{% endif %}"));
    drive *d = calloc(1, sizeof *d);
    cr_assert_eq(qv_engine_open(&options, NULL, &d->engine), QV_OK);
    fflush(stderr);
    size_t size;
    char *text = qv_read_file(log, &size);
    cr_expect_not_null(strstr(text, "filter 'xmlattr'"), "the log has: %s", text);
    free(text);
    expect_error(d, drive_submit(d, "'messages':[{'role':'user','content':'Hi.'}]"),
                 QV_CODE_BAD_REQUEST, "line 2: filter 'xmlattr' is not supported");
    uint64_t plain = drive_submit(d, QUESTION ",'max_tokens':2,'ignore_eos':true");
    drive_run(d);
    expect_answer(d, plain, "length");
    drive_close(d);
}

/* --- Ends from outside ----------------------------------------------------------------------- */

Test(requests, are_ended_at_the_next_step_wherever_they_are)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    for (int after = 0; after < 12; after++) {
        qv_engine_options options = drive_options(qv_demo_path(DEMO));
        options.prefill_chunk = 2;
        options.preempt_every = 3;
        options.max_running = 3;
        drive *d = drive_open(&options);
        cr_assert_eq(qv_engine_load_adapter(d->engine, "json", demo_adapter("json"), false), QV_OK);
        uint64_t victim[4], other;
        for (int i = 0; i < 4; i++)
            victim[i] = drive_submit(d, i % 2 ? QUESTION ",'max_tokens':90,'ignore_eos':true,'n':2"
                                              : QUESTION ",'max_tokens':90,'adapter':'json'");
        other = drive_submit(d, QUESTION ",'max_tokens':20,'ignore_eos':true");
        for (int i = 0; i < after; i++)
            drive_step(d);
        for (int i = 0; i < 4; i++) {
            qv_engine_abort(d->engine, victim[i], i < 2 ? "cancelled" : "deadline");
            qv_engine_abort(d->engine, victim[i], "cancelled"); /* twice is once */
        }
        qv_engine_abort(d->engine, 9999, "cancelled");
        drive_step(d);
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 1 + i % 2; k++) {
                const drive_stream *stream = drive_stream_of(d, victim[i], k);
                cr_expect_str_eq(stream->finish, i < 2 ? "cancelled" : "deadline", "after %d: %s",
                                 after, drive_get(d, victim[i])->message);
                cr_expect_eq(stream->usage.completion_tokens, stream->n_deltas - 1);
            }
        drive_run(d);
        expect_answer(d, other, "length");
        drive_close(d);
    }
}

/* --- Adapters -------------------------------------------------------------------------------- */

Test(requests, wait_only_for_the_adapter_they_need)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    cr_assert_eq(qv_engine_load_adapter(d->engine, "json", demo_adapter("json"), false), QV_OK);
    uint64_t needs = drive_submit(d, QUESTION ",'adapter':'json','max_tokens':4");
    uint64_t scores = drive_submit(d, QUESTION ",'adapter':'json','max_tokens':0");
    uint64_t base = drive_submit(d, QUESTION ",'max_tokens':4,'ignore_eos':true");
    cr_assert(qv_engine_has_work(d->engine), "the base request can run");
    drive_run(d);
    expect_answer(d, base, "length");
    expect_answer(d, needs, drive_stream_of(d, needs, 0)->finish);
    expect_answer(d, scores, "length");
    cr_assert_eq(strlen(drive_stream_of(d, needs, 0)->digest), 32);
    cr_assert_str_eq(drive_stream_of(d, needs, 0)->digest, drive_stream_of(d, scores, 0)->digest);
    cr_assert_str_empty(drive_stream_of(d, base, 0)->digest);
    drive_close(d);
}

Test(requests, for_unknown_adapters_are_told_so)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    uint64_t unknown = drive_submit(d, QUESTION ",'adapter':'nobody'");
    drive_load(d, "json", demo_adapter("json"));
    cr_assert_eq(qv_engine_unload_adapter(d->engine, "json"), QV_OK);
    cr_assert_eq(qv_engine_unload_adapter(d->engine, "json"), QV_ERR_NOT_FOUND);
    uint64_t gone = drive_submit(d, QUESTION ",'adapter':'json'");
    drive_run(d);
    expect_error(d, unknown, QV_CODE_ADAPTER_NOT_FOUND, "nobody");
    expect_error(d, gone, QV_CODE_ADAPTER_NOT_FOUND, "json");
    drive_close(d);
}

Test(requests, keep_the_adapter_they_began_with)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    drive_load(d, "a", demo_adapter("json"));
    uint64_t alone = drive_submit(d, QUESTION ",'adapter':'a','temperature':0,'logprobs':0");
    drive_run(d);
    char *want = drive_signature(d, alone);
    uint64_t replaced = drive_submit(d, QUESTION ",'adapter':'a','temperature':0,'logprobs':0");
    drive_step(d);
    drive_load(d, "a", demo_adapter("french"));
    uint64_t later = drive_submit(d, QUESTION ",'adapter':'a','temperature':0,'logprobs':0");
    drive_step(d);
    cr_assert_eq(qv_engine_unload_adapter(d->engine, "a"), QV_OK);
    drive_run(d);
    char *got = drive_signature(d, replaced), *other = drive_signature(d, later);
    cr_expect_str_eq(got, want);
    cr_expect_str_neq(other, want);
    free(want);
    free(got);
    free(other);

    /* Nobody holds either version: their slots are cleared. */
    qv_engine_stats stats;
    do {
        qv_engine_get_stats(d->engine, &stats);
        if (stats.free_adapter_slots < 6)
            drive_step(d);
    } while (stats.free_adapter_slots < 6);
    drive_close(d);
}

Test(requests, that_wait_for_a_load_get_its_end)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    cr_assert_eq(qv_engine_load_adapter(d->engine, "x", "/nowhere/at/all", false), QV_OK);
    uint64_t failed = drive_submit(d, QUESTION ",'adapter':'x','n':2,'temperature':1");
    drive_run(d);
    expect_error(d, failed, QV_CODE_ADAPTER_NOT_FOUND, "/nowhere/at/all");
    uint64_t again = drive_submit(d, QUESTION ",'adapter':'x'");
    drive_run(d);
    expect_error(d, again, QV_CODE_ADAPTER_NOT_FOUND, "/nowhere/at/all");

    cr_assert_eq(qv_engine_load_adapter(d->engine, "y", demo_adapter("json"), false), QV_OK);
    uint64_t unloaded = drive_submit(d, QUESTION ",'adapter':'y'");
    cr_assert_eq(qv_engine_unload_adapter(d->engine, "y"), QV_OK);
    drive_run(d);
    expect_error(d, unloaded, QV_CODE_ADAPTER_NOT_FOUND, "y");
    drive_close(d);
}

/* --- Broken adapters -------------------------------------------------------------------------- */

typedef struct {
    const char *what;
    const char *config_from, *config_to; /* replaced in adapter_config.json; NULL = as it is */
    const char *header_from, *header_to; /* replaced in the header, same length */
    uint16_t fill;                       /* written over all data; 0 = as it is */
    int64_t keep;                        /* bytes of the file that are left; 0 = all */
    qv_code code;
    const char *words;
} broken_adapter;

static void write_broken(const broken_adapter *b, const char *dir)
{
    size_t size;
    char *config = qv_read_file(qv_path(demo_adapter("json"), "adapter_config.json"), &size);
    if (b->config_from != NULL)
        config = replaced(config, &size, b->config_from, b->config_to);
    qv_write_file(qv_path(dir, "adapter_config.json"), config, size);
    free(config);

    char *data = qv_read_file(qv_path(demo_adapter("json"), "adapter_model.safetensors"), &size);
    uint64_t header;
    memcpy(&header, data, sizeof header);
    if (b->header_from != NULL) {
        cr_assert_eq(strlen(b->header_from), strlen(b->header_to));
        data = replaced(data, &size, b->header_from, b->header_to);
    }
    for (size_t i = 8 + header; b->fill != 0 && i + 1 < size; i += 2)
        memcpy(data + i, &b->fill, sizeof b->fill);
    qv_write_file(qv_path(dir, "adapter_model.safetensors"), data,
                  b->keep > 0 ? (size_t)b->keep : size);
    free(data);
}

static const broken_adapter broken[] = {
    {"truncated", .keep = 20000, .code = QV_CODE_ADAPTER_INVALID, .words = "adapter_model"},
    {"empty file", .keep = 1, .code = QV_CODE_ADAPTER_INVALID, .words = "adapter_model"},
    {"config that is not JSON", "\"r\": 8", "\"r\": ,", .code = QV_CODE_ADAPTER_INVALID,
     .words = "adapter_config.json"},
    {"DoRA", "\"use_dora\": false", "\"use_dora\": true", .code = QV_CODE_ADAPTER_INVALID,
     .words = "dora"},
    {"NaN", .fill = 0x7FC0, .code = QV_CODE_ADAPTER_INVALID, .words = "NaN"},
    {"unknown module", .header_from = "layers.0.linear_attn.in_proj_a.lora_A",
     .header_to = "layers.0.linear_attn.in_proj_q.lora_A", .code = QV_CODE_ADAPTER_INVALID,
     .words = "in_proj_q"},
    {"no such layer", .header_from = "layers.0.linear_attn.in_proj_a.lora_A",
     .header_to = "layers.9.linear_attn.in_proj_a.lora_A", .code = QV_CODE_ADAPTER_INVALID,
     .words = "layers.9"},
    {"wrong shape", .header_from = "\"shape\":[8,192]", .header_to = "\"shape\":[192,8]",
     .code = QV_CODE_ADAPTER_INVALID, .words = "192"},
};

Test(requests, for_broken_adapters_are_told_what_is_wrong)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        const char *dir = qv_temp_dir();
        write_broken(&broken[i], dir);
        cr_assert_eq(qv_engine_load_adapter(d->engine, "x", dir, false), QV_OK);
        uint64_t number = drive_submit(d, QUESTION ",'adapter':'x'");
        uint64_t base = drive_submit(d, QUESTION ",'max_tokens':2,'ignore_eos':true");
        drive_run(d);
        expect_error(d, number, broken[i].code, broken[i].words);
        expect_answer(d, base, "length");
    }
    drive_close(d);
}

Test(requests, for_adapters_beyond_the_limits_are_told_the_limit)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    static const struct {
        int64_t rank, file_bytes, cache_bytes;
        const char *words;
    } rows[] = {
        {4, 64 << 20, 64 << 20, "rank"},
        {16, 10000, 64 << 20, "10000"},
        {16, 64 << 20, 10000, "adapter-cache-bytes"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_engine_options options = drive_options(qv_demo_path(DEMO));
        options.max_lora_rank = rows[i].rank;
        options.max_adapter_bytes = rows[i].file_bytes;
        options.adapter_cache_bytes = rows[i].cache_bytes;
        drive *d = drive_open(&options);
        cr_assert_eq(qv_engine_load_adapter(d->engine, "x", demo_adapter("json"), false), QV_OK);
        uint64_t number = drive_submit(d, QUESTION ",'adapter':'x'");
        drive_run(d);
        expect_error(d, number, QV_CODE_ADAPTER_INVALID, rows[i].words);
        drive_close(d);
    }
}

Test(requests, whose_logits_are_not_finite_fail_alone)
{
    /* Finite weights, so large that the logits are not. */
    static const broken_adapter huge = {.fill = 0x7F7F};
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    drive *d = open_demo();
    const char *dir = qv_temp_dir();
    write_broken(&huge, dir);
    drive_load(d, "huge", dir);
    uint64_t base = drive_submit(d, QUESTION ",'max_tokens':9,'ignore_eos':true,'logprobs':0");
    drive_run(d);
    char *want = drive_signature(d, base);
    uint64_t bad = drive_submit(d, QUESTION ",'adapter':'huge','n':3,'temperature':1");
    uint64_t good = drive_submit(d, QUESTION ",'max_tokens':9,'ignore_eos':true,'logprobs':0");
    uint64_t scored = drive_submit(d, QUESTION ",'adapter':'huge','max_tokens':0,"
                                               "'prompt_logprobs':1");
    drive_run(d);
    expect_error(d, bad, QV_CODE_INTERNAL, "not finite");
    expect_error(d, scored, QV_CODE_INTERNAL, "not finite");
    char *got = drive_signature(d, good);
    cr_assert_str_eq(got, want);
    free(want);
    free(got);
    drive_close(d);
}

/* --- Opening --------------------------------------------------------------------------------- */

static void set_context(qv_engine_options *o)
{
    o->max_context = 5000;
}

static void set_small_cache(qv_engine_options *o)
{
    o->kv_bytes = 64 << 10;
    o->max_context = 4096;
}

static void set_too_much(qv_engine_options *o)
{
    o->kv_bytes = INT64_C(1) << 50;
}

static void set_backend(qv_engine_options *o)
{
    o->backend = "abacus";
}

static void set_dir(qv_engine_options *o)
{
    o->model_dir = "/nowhere/at/all";
}

Test(engine_open, says_what_is_wrong)
{
    static const struct {
        void (*set)(qv_engine_options *);
        qv_status status;
        const char *words;
    } rows[] = {
        {set_context, QV_ERR_ARG, "4096"},
        {set_small_cache, QV_ERR_LIMIT, "kv-bytes"},
        {set_too_much, QV_ERR_LIMIT, ""},
        {set_backend, QV_ERR_NOT_FOUND, "abacus"},
        {set_dir, QV_ERR_NOT_FOUND, "/nowhere/at/all"},
    };
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qv_engine_options options = drive_options(qv_demo_path(DEMO));
        qv_engine *engine = NULL;
        rows[i].set(&options);
        cr_expect_eq(qv_engine_open(&options, NULL, &engine), rows[i].status, "row %zu: %s", i,
                     qv_error());
        cr_expect_not_null(strstr(qv_error(), rows[i].words), "row %zu: %s", i, qv_error());
        cr_expect_null(engine);
    }
}

Test(engine_open, fits_the_context_to_the_pages)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    options.kv_bytes = 1 << 20;
    drive *d = drive_open(&options);
    const qv_engine_options *resolved = qv_engine_get_options(d->engine);
    cr_assert_eq(resolved->max_context, qv_engine_total_pages(d->engine) * 16);
    cr_assert_leq(resolved->kv_bytes, 1 << 20);
    drive_close(d);
}

Test(engine_open, counts_in_its_metrics)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    qv_engine_options options = drive_options(qv_demo_path(DEMO));
    qv_metrics *metrics;
    cr_assert_eq(qv_metrics_new(&metrics), QV_OK);
    drive *d = drive_open_metrics(&options, metrics);
    drive_submit(d, QUESTION ",'max_tokens':3,'ignore_eos':true");
    drive_submit(d, QUESTION ",'adapter':'nobody'");
    drive_run(d);
    char *text;
    size_t size;
    cr_assert_eq(qv_metrics_render(metrics, &text, &size), QV_OK);
    static const char *const lines[] = {
        "quiver_engine_generated_tokens_total 3\n",
        "quiver_engine_failed_requests_total 1\n",
        "quiver_engine_finished_total{reason=\"length\"} 1\n",
        "quiver_engine_running 0\n",
    };
    for (int i = 0; i < 4; i++)
        cr_expect_not_null(strstr(text, lines[i]), "no %s in\n%s", lines[i], text);
    free(text);
    drive_close(d);
    qv_metrics_free(metrics);
}
