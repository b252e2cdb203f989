/* quiver-run as its users have it: a process, JSON lines in and out. */
#include "common/json.h"
#include "models/safetensors.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEMO     "tiny-qwen3.5"
#define QUESTION "\"prompt\":\"<|im_start|>user\\nHi.<|im_end|>\\n<|im_start|>assistant\\n\""

/* --- The process ----------------------------------------------------------------------------- */

typedef struct {
    pid_t pid;
    int in;    /* to its standard input */
    FILE *out; /* from its standard output */
} process;

/* Start with the bundled model and further arguments, which end with NULL. */
static process start(const char *const *more)
{
    const char *args[32] = {qv_path(qv_build_dir(), "bin/quiver-run"), "--quiet", "--model",
                            qv_demo_path(DEMO)};
    int n = 4;
    for (; more != NULL && *more != NULL; more++)
        args[n++] = *more;
    int in[2], out[2];
    cr_assert_eq(pipe2(in, O_CLOEXEC), 0);
    cr_assert_eq(pipe2(out, O_CLOEXEC), 0);
    pid_t pid = fork();
    cr_assert_geq(pid, 0);
    if (pid == 0) {
        dup2(in[0], STDIN_FILENO);
        dup2(out[1], STDOUT_FILENO);
        execv(args[0], (char *const *)args);
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    return (process){.pid = pid, .in = in[1], .out = fdopen(out[0], "r")};
}

static void put(const process *p, const char *text)
{
    size_t size = strlen(text);
    while (size > 0) {
        ssize_t n = write(p->in, text, size);
        cr_assert(n > 0 || errno == EINTR, "%s", strerror(errno));
        text += n;
        size -= (size_t)n;
    }
}

/* The next reply, or NULL at the end. The caller json_decref()s it. */
static json_t *get(const process *p)
{
    static char *line;
    static size_t capacity;
    ssize_t size = getline(&line, &capacity, p->out);
    if (size < 0)
        return NULL;
    json_t *json;
    cr_assert_eq(line[size - 1], '\n');
    cr_assert_eq(qv_json_load(line, (size_t)size, "reply", &json), QV_OK, "%s", line);
    return json;
}

static int wait_exit(process *p)
{
    int status;
    fclose(p->out);
    cr_assert_eq(waitpid(p->pid, &status, 0), p->pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Run with `input` as all of its input. Replies as an array. */
static json_t *run(const char *const *args, const char *input, int *exit_code)
{
    process p = start(args);
    put(&p, input);
    close(p.in);
    json_t *replies = json_array(), *reply;
    while ((reply = get(&p)) != NULL)
        json_array_append_new(replies, reply);
    *exit_code = wait_exit(&p);
    return replies;
}

static const char *str(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text != NULL ? text : "";
}

static int64_t num(const json_t *object, const char *key)
{
    return json_integer_value(json_object_get(object, key));
}

/* The reply of a type for an id; NULL if there is none. */
static json_t *find(const json_t *replies, const char *type, const char *id)
{
    size_t i;
    json_t *reply;
    json_array_foreach(replies, i, reply) if (strcmp(str(reply, "type"), type) == 0 &&
                                              strcmp(str(reply, "id"), id) == 0) return reply;
    return NULL;
}

/* --- Tests ----------------------------------------------------------------------------------- */

Test(quiver_run, answers_a_mixed_batch)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    char json[256], french[256];
    snprintf(json, sizeof json, "json=%s", qv_demo_path(DEMO "/adapters/json"));
    snprintf(french, sizeof french, "french=%s", qv_demo_path(DEMO "/adapters/french"));
    const char *const args[] = {"--adapter", json, "--adapter", french, NULL};
    int code;
    json_t *replies = run(args,
                          "{\"type\":\"submit\",\"id\":\"a\"," QUESTION ",\"temperature\":0}\n"
                          "{\"type\":\"submit\",\"id\":\"b\"," QUESTION
                          ",\"adapter\":\"json\",\"temperature\":0,\"logprobs\":2}\n"
                          "{\"type\":\"submit\",\"id\":\"c\"," QUESTION
                          ",\"adapter\":\"french\",\"n\":2,\"max_tokens\":5,\"ignore_eos\":true}\n"
                          "{\"type\":\"submit\",\"id\":\"d\",\"tokens\":[386,327],\"max_tokens\":0,"
                          "\"prompt_logprobs\":1}", /* no newline at the end */
                          &code);
    cr_assert_eq(code, 0);
    cr_assert_eq(json_array_size(replies), 5);
    const json_t *a = find(replies, "done", "a"), *b = find(replies, "done", "b"),
                 *d = find(replies, "done", "d");
    cr_assert_str_eq(str(a, "finish_reason"), "stop");
    cr_assert_str_eq(str(a, "worker"), "quiver-run");
    cr_assert_eq(num(a, "seq"), 0);
    cr_assert_null(json_object_get(a, "logprobs"));
    cr_assert_not_null(json_object_get(json_object_get(a, "timing"), "total_ms"));
    cr_assert_eq(str(b, "text")[0], '{');
    cr_assert_str_eq(str(b, "adapter"), "json");
    size_t n_tokens = json_array_size(json_object_get(b, "tokens"));
    cr_assert_eq(json_array_size(json_object_get(b, "logprobs")), n_tokens);
    cr_assert_eq(json_array_size(json_object_get(b, "top_logprobs")), n_tokens);
    cr_assert_eq(num(json_object_get(b, "usage"), "completion_tokens"), n_tokens);
    const json_t *scores = json_object_get(d, "prompt_logprobs");
    cr_assert_eq(json_array_size(scores), 2);
    cr_assert(json_is_null(json_array_get(scores, 0)));
    cr_assert(json_is_real(json_array_get(scores, 1)));
    cr_assert_eq(json_array_size(json_object_get(d, "prompt_top_logprobs")), 2);
    json_decref(replies);
}

Test(quiver_run, says_how_much_of_a_prompt_was_cached)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    static const struct {
        const char *option;
        int64_t cached; /* of 50 tokens: whole pages of 16 before the last token */
    } rows[] = {{"--prefix-cache", 48}, {"--no-prefix-cache", 0}};
    char submit[512] = "{\"type\":\"submit\",\"id\":\"a\",\"max_tokens\":1,\"tokens\":[300";
    for (int i = 1; i < 50; i++)
        sprintf(submit + strlen(submit), ",%d", 300 + i);
    strcat(submit, "]}\n");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const char *const args[] = {rows[i].option, NULL};
        process p = start(args);
        for (int round = 0; round < 3; round++) {
            put(&p, submit);
            json_t *reply = get(&p);
            const json_t *usage = json_object_get(reply, "usage");
            cr_expect_eq(num(usage, "prompt_tokens"), 50);
            cr_expect_eq(num(usage, "cached_tokens"), round == 2 ? rows[i].cached : 0,
                         "%s: %d cached at the %d. time", rows[i].option,
                         (int)num(usage, "cached_tokens"), round + 1);
            json_decref(reply);
        }
        close(p.in);
        cr_expect_eq(wait_exit(&p), 0);
    }
}

Test(quiver_run, streams_when_asked)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    int code;
    json_t *replies =
        run(NULL,
            "{\"type\":\"submit\",\"id\":\"s\"," QUESTION
            ",\"temperature\":0,\"max_tokens\":12,\"stream\":true}\n"
            "{\"type\":\"submit\",\"id\":\"w\"," QUESTION ",\"temperature\":0,\"max_tokens\":12}\n",
            &code);
    cr_assert_eq(code, 0);
    char text[512] = "";
    int64_t seq = 0;
    size_t i;
    json_t *reply;
    json_array_foreach(replies, i, reply) if (strcmp(str(reply, "type"), "tokens") == 0)
    {
        cr_assert_str_eq(str(reply, "id"), "s");
        cr_assert_eq(num(reply, "seq"), seq++);
        strcat(text, str(reply, "text"));
    }
    const json_t *streamed = find(replies, "done", "s"), *whole = find(replies, "done", "w");
    cr_assert_gt(seq, 0);
    cr_assert_eq(num(streamed, "seq"), seq);
    cr_assert_null(json_object_get(streamed, "text"));
    cr_assert_str_eq(str(whole, "text"), text);
    json_decref(replies);
}

Test(quiver_run, answers_bad_lines_and_goes_on)
{
    static const struct {
        const char *line, *id, *code, *words;
    } rows[] = {
        {"{", "", "BAD_REQUEST", "line 1"},
        {"[1,2]", "", "BAD_REQUEST", "line 2"},
        {"{\"id\":\"x\"}", "x", "BAD_REQUEST", "type"},
        {"{\"type\":\"dance\",\"id\":\"y\"}", "y", "BAD_REQUEST", "dance"},
        {"{\"type\":\"submit\",\"id\":\"z\",\"prompt\":5}", "z", "BAD_REQUEST", "prompt"},
        {"{\"type\":\"submit\",\"id\":\"u\",\"prompt\":\"\xFF\"}", "", "BAD_REQUEST", "line 6"},
        {"{\"type\":\"submit\",\"id\":\"d\",\"id\":\"d\"}", "", "BAD_REQUEST", "line 7"},
        {"{\"type\":\"submit\",\"id\":\"n\",\"prompt\":\"a\",\"adapter\":\"nobody\"}", "n",
         "ADAPTER_NOT_FOUND", "nobody"},
        {"{\"type\":\"submit\",\"id\":\"t\",\"tokens\":[99999]}", "t", "BAD_REQUEST", "99999"},
        {"{\"type\":\"status\"}", "", "BAD_REQUEST", "broker"},
        {"{\"type\":\"cancel\",\"id\":\"q\"}", "q", "BAD_REQUEST", "q"},
    };
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    char input[4096] = "";
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        sprintf(input + strlen(input), "%s\n", rows[i].line);
    strcat(input, "\n  \n{\"type\":\"submit\",\"id\":\"good\"," QUESTION
                  ",\"max_tokens\":2,\"surprise\":1}\n");
    int code;
    json_t *replies = run(NULL, input, &code);
    cr_assert_eq(code, 0);
    size_t n_errors = sizeof rows / sizeof *rows;
    cr_assert_eq(json_array_size(replies), n_errors + 1);
    for (size_t i = 0; i < n_errors; i++) {
        bool found = false;
        size_t k;
        json_t *reply;
        json_array_foreach(replies, k, reply) found =
            found || (strcmp(str(reply, "type"), "error") == 0 &&
                      strcmp(str(reply, "id"), rows[i].id) == 0 &&
                      strcmp(str(reply, "code"), rows[i].code) == 0 &&
                      strstr(str(reply, "message"), rows[i].words) != NULL);
        cr_expect(found, "no error for %s", rows[i].line);
    }
    const json_t *good = find(replies, "done", "good");
    cr_assert_not_null(good);
    const char *warning = json_string_value(json_array_get(json_object_get(good, "warnings"), 0));
    cr_assert_not_null(strstr(warning, "surprise"));
    json_decref(replies);
}

Test(quiver_run, refuses_an_id_that_is_in_use)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    int code;
    json_t *replies = run(NULL,
                          "{\"type\":\"submit\",\"id\":\"a\"," QUESTION
                          ",\"max_tokens\":50,\"ignore_eos\":true}\n"
                          "{\"type\":\"submit\",\"id\":\"a\"," QUESTION ",\"max_tokens\":50}\n",
                          &code);
    cr_assert_not_null(find(replies, "error", "a"));
    cr_assert_not_null(find(replies, "done", "a"));
    json_decref(replies);
}

Test(quiver_run, waits_with_reading_when_the_engine_is_full)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    static const char *const args[] = {"--max-running", "2", "--max-waiting", "1", NULL};
    char *input = calloc(40, 256);
    for (int i = 0; i < 40; i++)
        sprintf(input + strlen(input),
                "{\"type\":\"submit\",\"id\":\"%d\"," QUESTION ",\"max_tokens\":3,\"n\":%d}\n", i,
                1 + i % 3);
    int code;
    json_t *replies = run(args, input, &code);
    free(input);
    cr_assert_eq(code, 0);
    size_t i;
    json_t *reply;
    json_array_foreach(replies, i, reply)
        cr_expect_str_eq(str(reply, "type"), "done", "%s", str(reply, "message"));
    json_decref(replies);
}

Test(quiver_run, ends_requests_at_their_deadline_and_on_cancel)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    process p = start(NULL);
    put(&p, "{\"type\":\"submit\",\"id\":\"late\"," QUESTION
            ",\"max_tokens\":4000,\"ignore_eos\":true,\"deadline_ms\":50}\n");
    json_t *late = get(&p);
    cr_assert_str_eq(str(late, "finish_reason"), "deadline");
    put(&p, "{\"type\":\"submit\",\"id\":\"gone\"," QUESTION
            ",\"max_tokens\":4000,\"ignore_eos\":true,\"stream\":true}\n");
    json_t *first = get(&p);
    cr_assert_str_eq(str(first, "type"), "tokens");
    put(&p, "{\"type\":\"cancel\",\"id\":\"gone\"}\n");
    json_t *reply = NULL;
    do {
        json_decref(reply);
        reply = get(&p);
        cr_assert_not_null(reply);
    } while (strcmp(str(reply, "type"), "tokens") == 0);
    cr_assert_str_eq(str(reply, "finish_reason"), "cancelled");
    close(p.in);
    cr_assert_eq(wait_exit(&p), 0);
    json_decref(late);
    json_decref(first);
    json_decref(reply);
}

Test(quiver_run, ends_cleanly_on_interrupt)
{
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    process p = start(NULL);
    put(&p, "{\"type\":\"submit\",\"id\":\"a\"," QUESTION
            ",\"max_tokens\":4000,\"ignore_eos\":true,\"stream\":true}\n"
            "{\"type\":\"submit\",\"id\":\"b\"," QUESTION
            ",\"max_tokens\":4000,\"ignore_eos\":true}\n");
    json_decref(get(&p)); /* it runs */
    kill(p.pid, SIGINT);
    json_t *replies = json_array(), *reply;
    while ((reply = get(&p)) != NULL)
        json_array_append_new(replies, reply);
    cr_assert_str_eq(str(find(replies, "done", "a"), "finish_reason"), "cancelled");
    cr_assert_str_eq(str(find(replies, "done", "b"), "finish_reason"), "cancelled");
    close(p.in);
    cr_assert_eq(wait_exit(&p), 130);
    json_decref(replies);
}

Test(quiver_run, exits_with_what_went_wrong)
{
    static const struct {
        const char *args[6];
        const char *input;
        int code;
    } rows[] = {
        {{NULL}, "", 0},
        {{NULL}, "not json\n", 1},
        {{"--no-such-option", NULL}, "", 2},
        {{"--adapter", "nameless", NULL}, "", 2},
        {{"--max-running", "0", NULL}, "", 2},
        {{"--model", "/nowhere/at/all", NULL}, "", 3},
        {{"--input", "/nowhere/at/all", NULL}, "", 3},
        {{"--help", NULL}, "", 0},
    };
    QV_SKIP_WITHOUT(qv_demo_path(DEMO));
    signal(SIGPIPE, SIG_IGN);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        process p = start(rows[i].args);
        if (rows[i].input[0] != '\0')
            put(&p, rows[i].input);
        close(p.in);
        while (fgetc(p.out) != EOF) {
        }
        cr_expect_eq(wait_exit(&p), rows[i].code, "row %zu", i);
    }
}

/* --- Dump ------------------------------------------------------------------------------------ */

Test(quiver_run, dump_writes_the_intermediates_of_the_first_step)
{
    const char *file = qv_path(qv_temp_dir(), "step.safetensors");
    const char *args[] = {"--dump", file, NULL};
    const char *input = "{\"type\":\"submit\",\"id\":\"a\",\"tokens\":[5,6,7,8],\"max_tokens\":0,"
                        "\"prompt_logprobs\":0}\n";
    int code;
    json_t *replies = run(args, input, &code);
    cr_assert_eq(code, 0);
    qv_safetensors *st;
    cr_assert_eq(qv_safetensors_open_file(file, 0, &st), QV_OK, "%s", qv_error());

    /* The logits are those that the reply's logprobs come from. */
    const qv_stored_tensor *logits = qv_safetensors_find(st, "model.logits");
    cr_assert(logits != NULL && logits->n_dims == 2 && logits->shape[0] == 3);
    const float *row = logits->data;
    double sum = 0;
    for (int64_t i = 0; i < logits->shape[1]; i++)
        sum += exp((double)row[i]);
    json_t *reply = find(replies, "done", "a");
    double logprob =
        json_number_value(json_array_get(json_object_get(reply, "prompt_logprobs"), 1));
    cr_expect_float_eq(row[6] - log(sum), logprob, 1e-4);
    static const char *const names[] = {"model.embed",     "0.mixer_norm", "0.gdn_out",
                                        "3.attn_q_normed", "3.mlp_out",    "model.final_norm"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        cr_expect_not_null(qv_safetensors_find(st, names[i]), "%s", names[i]);
    qv_safetensors_close(st);
    json_decref(replies);

    args[1] = "/nonexistent/step.safetensors";
    replies = run(args, input, &code);
    cr_expect_neq(code, 0);
    json_decref(replies);
}

Test(quiver_run, dump_has_the_experts_that_a_router_chose)
{
    QV_SKIP_WITHOUT(qv_golden_path("tiny-qwen3.5-moe/config.json"));
    const char *file = qv_path(qv_temp_dir(), "step.safetensors");
    const char *args[] = {"--model", qv_golden_path("tiny-qwen3.5-moe"), "--dump", file,
                          NULL};
    int code;
    json_t *replies = run(args,
                          "{\"type\":\"submit\",\"id\":\"a\",\"tokens\":[5,6,7],"
                          "\"max_tokens\":0,\"prompt_logprobs\":0}\n",
                          &code);
    cr_assert_eq(code, 0);
    json_decref(replies);
    qv_safetensors *st;
    cr_assert_eq(qv_safetensors_open_file(file, 0, &st), QV_OK, "%s", qv_error());
    const qv_stored_tensor *ids = qv_safetensors_find(st, "0.experts");
    const qv_stored_tensor *logits = qv_safetensors_find(st, "0.router_logits");
    cr_assert(ids != NULL && logits != NULL && ids->shape[0] == 2);
    for (int64_t t = 0; t < ids->shape[0]; t++) {
        const float *row = (const float *)logits->data + t * logits->shape[1];
        float first = ((const float *)ids->data)[t * ids->shape[1]];
        for (int64_t e = 0; e < logits->shape[1]; e++)
            cr_expect_leq(row[e], row[(int64_t)first], "token %d", (int)t);
    }
    qv_safetensors_close(st);
}
