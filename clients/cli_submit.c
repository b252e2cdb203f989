/* quiver submit: jobs from arguments, files or standard input. */
#include "clients/cli_jobs.h"

#include "common/json.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INPUT_MAX ((size_t)64 << 20)

typedef struct {
    cli_common common;
    const char *adapter, *id, *file, *jobs, *system, *tenant;
    bool durable, raw, no_stream, ignore_eos, verbose;
    int64_t max_tokens, top_k, seed, n, logprobs, prompt_logprobs, priority, deadline_ms,
        concurrency;
    double temperature, top_p, min_p, presence, frequency, repetition;
    qv_string_list stop;
} settings;

#define JOB      "Job"
#define SAMPLING "Sampling (left to the model where not given)"

static const qv_option table[] = {
    QV_OPTION(settings, adapter, STRING, "adapter", "NAME", NULL,
              "The LoRA adapter to answer with; none is the base model.", .section = JOB,
              .short_name = 'a'),
    QV_OPTION(
        settings, id, STRING, "id", "ID", NULL,
        "Id of the request, unique among yours in flight; made up when not given. With several "
        "prompts a number is added.",
        .section = JOB),
    QV_OPTION(settings, file, STRING, "file", "FILE", NULL,
              "Read the prompt from a file; - is standard input.", .section = JOB,
              .short_name = 'f'),
    QV_OPTION(settings, jobs, STRING, "jobs", "FILE", NULL,
              "Publish many jobs: one JSON object a line with the fields of `submit` "
              "(docs/protocol.md); - is standard input.",
              .section = JOB),
    QV_OPTION(settings, raw, FLAG, "raw", NULL, NULL,
              "Take the prompt as it is instead of as a user's chat message.", .section = JOB),
    QV_OPTION(settings, system, STRING, "system", "TEXT", NULL,
              "A system message before the prompt.", .section = JOB),
    QV_OPTION(settings, max_tokens, INT, "max-tokens", "N", "256",
              "Longest answer in tokens; 0 only scores the prompt.", .section = JOB, .min = 0,
              .max = 16777216),
    QV_OPTION(settings, n, INT, "n", "N", "1", "Number of answers.", .section = JOB, .min = 1,
              .max = 64),
    QV_OPTION(settings, stop, LIST, "stop", "TEXT", NULL,
              "End the answer before this text (repeat the option).", .section = JOB),
    QV_OPTION(settings, ignore_eos, FLAG, "ignore-eos", NULL, NULL,
              "Go on after the model's end of text.", .section = JOB),
    QV_OPTION(settings, logprobs, INT, "logprobs", "N", NULL,
              "Report log probabilities with N alternatives (shown with --json).", .section = JOB,
              .min = 0, .max = 32),
    QV_OPTION(settings, prompt_logprobs, INT, "prompt-logprobs", "N", NULL,
              "The same for the tokens of the prompt.", .section = JOB, .min = 0, .max = 32),
    QV_OPTION(settings, priority, INT, "priority", "N", "0", "Higher goes first.", .section = JOB,
              .min = -100, .max = 100),
    QV_OPTION(settings, deadline_ms, DURATION, "deadline", "TIME", NULL,
              "Give the answer up after this long.", .section = JOB, .min = 1, .max = 86400000),
    QV_OPTION(settings, tenant, STRING, "tenant", "NAME", NULL, "On whose account.",
              .section = JOB),
    QV_OPTION(
        settings, durable, FLAG, "durable", NULL, NULL,
        "Keep the job in Redis until it is answered; with --id the same command gets the same "
        "job, also after a crash.",
        .section = JOB),
    QV_OPTION(settings, no_stream, FLAG, "whole", NULL, NULL,
              "Wait for whole answers instead of streaming.", .section = JOB),
    QV_OPTION(settings, concurrency, INT, "concurrency", "N", "64",
              "With --jobs: most jobs in flight at once.", .section = JOB, .min = 1, .max = 100000),
    QV_OPTION(settings, temperature, DOUBLE, "temperature", "T", NULL,
              "0 always takes the likeliest token.", .section = SAMPLING, .min = 0, .max = 100),
    QV_OPTION(settings, top_p, DOUBLE, "top-p", "P", NULL,
              "Sample from the likeliest tokens that add up to P.", .section = SAMPLING, .min = 0,
              .max = 1),
    QV_OPTION(settings, top_k, INT, "top-k", "K", NULL,
              "Sample from the K likeliest tokens; 0 is all.", .section = SAMPLING, .min = 0,
              .max = 16777216),
    QV_OPTION(settings, min_p, DOUBLE, "min-p", "P", NULL,
              "Leave out tokens below P times the likeliest.", .section = SAMPLING, .min = 0,
              .max = 1),
    QV_OPTION(settings, presence, DOUBLE, "presence-penalty", "X", NULL,
              "Taken off the logits of tokens that the answer has.", .section = SAMPLING, .min = -2,
              .max = 2),
    QV_OPTION(settings, frequency, DOUBLE, "frequency-penalty", "X", NULL,
              "The same, for each time.", .section = SAMPLING, .min = -2, .max = 2),
    QV_OPTION(settings, repetition, DOUBLE, "repetition-penalty", "X", NULL,
              "Divides the logits of tokens that prompt or answer have.", .section = SAMPLING,
              .min = 0.01, .max = 100),
    QV_OPTION(settings, seed, INT, "seed", "N", NULL, "The same seed gives the same answer.",
              .section = SAMPLING, .min = 0, .max = 9.2e18),
    CLI_COMMON_OPTIONS(settings),
    QV_OPTION(settings, verbose, FLAG, "verbose", NULL, NULL,
              "Say on stderr what each answer took and who gave it.", .section = "Output",
              .short_name = 'v'),
};

static const qv_program program = {
    .name = "quiver submit",
    .summary =
        "Publish jobs and print the answers as they arrive. Each argument is one prompt; without "
        "arguments the prompt is read from --file or standard input.",
    .args = "[PROMPT...]",
    .max_args = 4096,
    .epilog =
        "Examples:\n"
        "  quiver submit -a french \"Ines carried two black shoes at the station.\"\n"
        "  quiver submit --raw --temperature 0 \"Once upon a time\"\n"
        "  quiver submit --jobs jobs.jsonl --json > answers.jsonl\n"
        "\n"
        "Ctrl-C cancels what is in flight and waits for the broker to confirm; a second one leaves "
        "at\n"
        "once. Exit codes: 0 every answer arrived, 1 a job failed, 2 usage, 130 interrupted.\n",
};

typedef struct {
    qv_arena arena; /* all strings and messages of the jobs */
    qv_msg_submit *jobs;
    size_t n, capacity;
} job_list;

static qv_status add_job(job_list *list, const qv_msg_submit *job)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 64;
        qv_msg_submit *jobs = realloc(list->jobs, capacity * sizeof *jobs);
        if (!jobs)
            return qv_fail(QV_ERR_NOMEM, "out of memory for %zu jobs", capacity);
        list->jobs = jobs;
        list->capacity = capacity;
    }
    list->jobs[list->n++] = *job;
    return QV_OK;
}

/* --- input
 * --------------------------------------------------------------------------------------------*/

/* Read a whole file or standard input ("-") into the arena, terminated. */
static qv_status read_input(const char *path, qv_arena *arena, char **text, size_t *size)
{
    bool standard = strcmp(path, "-") == 0;
    FILE *f = standard ? stdin : fopen(path, "rb");
    if (!f)
        return qv_fail(QV_ERR_IO, "cannot read %s: %s", path, strerror(errno));
    size_t capacity = 1 << 16, used = 0;
    char *buffer = malloc(capacity);
    while (buffer) {
        used += fread(buffer + used, 1, capacity - used, f);
        if (used < capacity || capacity > INPUT_MAX)
            break;
        char *larger = realloc(buffer, capacity *= 2);
        if (!larger)
            free(buffer);
        buffer = larger;
    }
    bool failed = ferror(f);
    if (!standard)
        fclose(f);
    *text = buffer && used <= INPUT_MAX ? qv_arena_strndup(arena, buffer, used) : NULL;
    *size = used;
    free(buffer);
    if (failed)
        return qv_fail(QV_ERR_IO, "cannot read %s: %s", path, strerror(errno));
    return *text ? QV_OK : qv_fail(QV_ERR_LIMIT, "%s: larger than %zu MiB", path, INPUT_MAX >> 20);
}

/* --- one prompt
 * -----------------------------------------------------------------------------------------*/

static qv_status set_messages(qv_msg_submit *job, const settings *set, const char *prompt,
                              qv_arena *arena)
{
    json_t *messages = json_array();
    if (set->system)
        json_array_append_new(messages,
                              json_pack("{s:s, s:s}", "role", "system", "content", set->system));
    json_array_append_new(messages, json_pack("{s:s, s:s}", "role", "user", "content", prompt));
    qv_str raw;
    qv_status status = json_array_size(messages) == (set->system ? 2 : 1)
                           ? qv_json_to_msgpack(messages, arena, &raw)
                           : qv_fail(QV_ERR_FORMAT, "the prompt is not valid UTF-8");
    json_decref(messages);
    QV_TRY(status);
    qv_set(job, submit, messages, raw);
    return QV_OK;
}

/* Copy what the user gave; what was not given stays absent, so that the model's defaults hold. */
static void set_fields(qv_msg_submit *job, const settings *set, const qv_options *options,
                       qv_arena *arena)
{
#define GIVEN(name) (qv_options_source(options, name) != QV_OPTION_FROM_DEFAULT)
#define COPY(name, field, value)                                                                   \
    if (GIVEN(name))                                                                               \
    qv_set(job, submit, field, value)
    qv_set(job, submit, max_tokens, set->max_tokens);
    qv_set(job, submit, n, set->n);
    COPY("temperature", temperature, set->temperature);
    COPY("top-p", top_p, set->top_p);
    COPY("top-k", top_k, set->top_k);
    COPY("min-p", min_p, set->min_p);
    COPY("presence-penalty", presence_penalty, set->presence);
    COPY("frequency-penalty", frequency_penalty, set->frequency);
    COPY("repetition-penalty", repetition_penalty, set->repetition);
    COPY("seed", seed, (uint64_t)set->seed);
    COPY("logprobs", logprobs, set->logprobs);
    COPY("prompt-logprobs", prompt_logprobs, set->prompt_logprobs);
    COPY("priority", priority, set->priority);
    COPY("deadline", deadline_ms, set->deadline_ms);
#undef COPY
#undef GIVEN
    if (set->adapter)
        qv_set(job, submit, adapter, qv_str_from(set->adapter));
    if (set->tenant)
        qv_set(job, submit, tenant, qv_str_from(set->tenant));
    if (set->durable)
        qv_set(job, submit, durable, true);
    if (set->ignore_eos)
        qv_set(job, submit, ignore_eos, true);
    if (set->no_stream)
        qv_set(job, submit, stream, false);
    if (set->stop.n) {
        qv_strs stop = {QV_ARENA_ARRAY(arena, qv_str, set->stop.n), (uint32_t)set->stop.n};
        for (size_t i = 0; stop.data && i < set->stop.n; i++)
            stop.data[i] = qv_str_from(set->stop.items[i]);
        qv_set(job, submit, stop, stop);
    }
}

static qv_status add_prompt(job_list *list, const settings *set, const qv_options *options,
                            const char *prompt, bool numbered)
{
    qv_msg_submit job = {0};
    char made_up[QV_CLIENT_ID_SIZE];
    qv_client_new_id(made_up);
    if (!set->durable)
        made_up[8] = '\0'; /* unique per connection is enough, and people can type it */
    const char *base = set->id ? set->id : made_up;
    char *id = set->id && numbered ? qv_arena_printf(&list->arena, "%s-%zu", base, list->n + 1)
                                   : qv_arena_strdup(&list->arena, base);
    qv_set(&job, submit, id, qv_str_from(id));
    if (set->raw)
        qv_set(&job, submit, prompt, qv_str_from(prompt));
    else
        QV_TRY(set_messages(&job, set, prompt, &list->arena));
    set_fields(&job, set, options, &list->arena);
    return add_job(list, &job);
}

/* --- a file of jobs
 * -----------------------------------------------------------------------------------------*/

static qv_status add_line(job_list *list, const char *line, size_t size, const char *where)
{
    json_t *object;
    QV_TRY(qv_json_load(line, size, where, &object));
    if (json_is_object(object) && !json_object_get(object, "type"))
        json_object_set_new(object, "type", json_string("submit"));
    if (json_is_object(object) && !json_object_get(object, "id")) {
        char id[32];
        snprintf(id, sizeof id, "%zu", list->n + 1);
        json_object_set_new(object, "id", json_string(id));
    }
    qv_message message;
    qv_status status = qv_message_from_json(object, QV_FROM_CLIENT, &list->arena, &message);
    if (status == QV_OK && message.type != QV_MSG_SUBMIT)
        status = qv_fail(QV_ERR_ARG, "only submit can be published");
    if (status == QV_OK)
        status = qv_submit_check(&message.submit);
    if (status == QV_OK)
        status = add_job(list, &message.submit);
    json_decref(object); /* the message was copied into the arena */
    return status == QV_OK ? QV_OK : qv_fail_prefix(status, "%s", where);
}

static qv_status add_file(job_list *list, const char *path)
{
    char *text;
    size_t size, number = 0;
    QV_TRY(read_input(path, &list->arena, &text, &size));
    for (char *line = text; line < text + size;) {
        char *end = memchr(line, '\n', (size_t)(text + size - line));
        size_t length = end ? (size_t)(end - line) : (size_t)(text + size - line);
        number++;
        if (length > strspn(line, " \t\r")) {
            char where[PATH_MAX];
            snprintf(where, sizeof where, "%.400s, line %zu", path, number);
            QV_TRY(add_line(list, line, length, where));
        }
        line += length + 1;
    }
    return list->n ? QV_OK : qv_fail(QV_ERR_ARG, "%s holds no job", path);
}

/* --- the command
 * ---------------------------------------------------------------------------------------------*/

static qv_status collect(job_list *list, const settings *set, const qv_options *options)
{
    const qv_string_list *prompts = qv_options_args(options);
    if (set->jobs)
        return prompts->n || set->file ? qv_fail(QV_ERR_ARG, "--jobs takes no other prompt")
                                       : add_file(list, set->jobs);
    if (set->file && prompts->n)
        return qv_fail(QV_ERR_ARG, "--file and a prompt on the command line: give one of them");
    if (prompts->n == 0) {
        char *text;
        size_t size;
        QV_TRY(read_input(set->file ? set->file : "-", &list->arena, &text, &size));
        if (strlen(text) != size)
            return qv_fail(QV_ERR_FORMAT, "the prompt has a zero byte");
        return add_prompt(list, set, options, text, false);
    }
    for (size_t i = 0; i < prompts->n; i++)
        QV_TRY(add_prompt(list, set, options, prompts->items[i], prompts->n > 1));
    return QV_OK;
}

int cli_submit(int argc, char **argv)
{
    settings set;
    qv_options *options;
    if (qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv, &set,
                         &options) != QV_OK)
        return cli_fail(CLI_USAGE);
    int code = CLI_OK;
    job_list list = {0};
    qv_client *client = NULL;
    qv_arena_init(&list.arena, 0, 8 * INPUT_MAX);
    if (qv_options_printed(options))
        goto end;
    if (collect(&list, &set, options) != QV_OK) {
        code = cli_fail(CLI_USAGE);
        goto end;
    }
    if (cli_connect(&set.common, &client) != QV_OK) {
        code = cli_fail(CLI_FAILED);
        goto end;
    }
    code = cli_jobs_run(client, &(cli_jobs_options){.jobs = list.jobs,
                                                    .n_jobs = list.n,
                                                    .concurrency = (size_t)set.concurrency,
                                                    .timeout_ms = set.common.timeout_ms,
                                                    .json = set.common.json,
                                                    .verbose = set.verbose});
end:
    qv_client_close(client);
    free(list.jobs);
    qv_arena_deinit(&list.arena);
    qv_options_free(options);
    return code;
}
