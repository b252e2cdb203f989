/* quiver-run: the engine without a broker. Requests come as JSON lines, replies leave as JSON
 * lines; both are the maps of the wire protocol (docs/protocol.md).
 *
 *     quiver-run --model DIR [--adapter NAME=DIR ...] < requests.jsonl > replies.jsonl
 *
 * Everything that can be read runs as one mixed batch. When the engine is full, reading waits. A
 * line that is wrong gets an `error` line and the rest goes on. One thread: this file's loop reads,
 * steps the engine and writes.
 */
#include "common/answer.h"
#include "common/clock.h"
#include "common/json.h"
#include "common/log.h"
#include "common/map.h"
#include "worker/engine_options.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

/* --- Settings -------------------------------------------------------------------------------- */

typedef struct {
    qv_engine_options engine;
    qv_string_list adapters;
    const char *input;
    bool quiet;
} settings;

static const qv_option option_table[] = {
    QV_OPTION(settings, adapters, LIST, "adapter", "NAME=DIR", NULL,
              "Load a LoRA adapter under a name; repeat for more.", .section = "Requests"),
    QV_OPTION(settings, input, STRING, "input", "FILE", NULL,
              "Read requests from a file; default: standard input.", .section = "Requests"),
    QV_OPTION(settings, quiet, FLAG, "quiet", NULL, NULL,
              "No progress and no notices on standard error, errors only.", .section = "Requests"),
    QV_ENGINE_OPTIONS(settings, engine),
};

static const qv_program program = {
    .name = "quiver-run",
    .summary = "Run requests through the engine, without a broker: JSON lines in, JSON lines out. "
               "Replies are `done` and `error` lines; a request with \"stream\": true also gets "
               "`tokens` lines.",
    .epilog =
        "Example:\n"
        "  echo '{\"type\":\"submit\",\"id\":\"1\",\"prompt\":\"Once\",\"max_tokens\":20}' |\n"
        "      quiver-run --model DIR\n",
};

/* Exit codes. */
enum { EXIT_BAD_INPUT = 1, EXIT_USAGE = 2, EXIT_ENGINE = 3, EXIT_INTERRUPTED = 130 };

/* Longest line of input. */
#define MAX_LINE ((size_t)64 << 20)

/* --- State ----------------------------------------------------------------------------------- */

/* A request that has not ended. */
typedef struct {
    uint64_t number;
    char *id;
    char *adapter;
    json_t *warnings; /* array of strings, or NULL */
    bool stream;
    uint64_t read_ns, submit_ns, deadline_ns; /* monotonic; deadline 0 = none */
    int64_t n_streams, n_left;
    struct {
        qv_answer answer;
        uint64_t first_ns; /* of its first token; 0 = none yet */
    } streams[];
} job;

typedef struct {
    settings settings;
    qv_engine *engine;

    int input;      /* file descriptor */
    char *buffer;   /* bytes that were read */
    size_t used;    /* of them: lines that are done with */
    size_t scanned; /* of them: known to hold no newline, from `used` on */
    size_t n_bytes, capacity;
    bool skipping; /* inside a line that is too long */
    bool end_of_input;
    uint64_t line_number;

    qv_arena arena;   /* of the line that is being read */
    qv_map *jobs;     /* of job *, by number */
    qv_map *ids;      /* the same by id */
    qv_request *held; /* read, but the engine has no room yet */
    job *held_job;
    uint64_t n_submitted; /* also the next number */
    int64_t n_in_engine;  /* streams */

    bool cancelled; /* Ctrl-C was seen */
    uint64_t n_lines, n_parsed, n_done, n_errors, n_tokens;
    uint64_t start_ns, progress_ns;
    bool progress_shown; /* an unfinished line of progress is on the terminal */
} runner;

/* In whole microseconds, so that it prints short. */
static double ms_between(uint64_t from_ns, uint64_t to_ns)
{
    return to_ns > from_ns ? (double)((to_ns - from_ns) / 1000) / 1000 : 0;
}

/* --- Interrupts ------------------------------------------------------------------------------ */

static int interrupt_fd = -1;              /* readable after Ctrl-C; only the handler writes */
static volatile sig_atomic_t n_interrupts; /* the second one exits at once */

static void on_signal(int signal_number)
{
    (void)signal_number;
    if (n_interrupts++ > 0)
        _exit(EXIT_INTERRUPTED);
    uint64_t one = 1;
    int saved = errno;
    if (write(interrupt_fd, &one, sizeof one) < 0) {
        /* The counter cannot be full after one write; there is nobody to tell in a handler. */
    }
    errno = saved;
}

static qv_status catch_signals(void)
{
    interrupt_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (interrupt_fd < 0)
        return qv_fail(QV_ERR_IO, "eventfd: %s", strerror(errno));
    struct sigaction action = {.sa_handler = on_signal};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    return QV_OK;
}

/* --- Progress -------------------------------------------------------------------------------- */

static void clear_progress(runner *r)
{
    if (r->progress_shown)
        fputs("\r\033[K", stderr);
    r->progress_shown = false;
}

/* On a terminal one line that changes four times a second, else a line every ten seconds. */
static void show_progress(runner *r)
{
    if (r->settings.quiet)
        return;
    bool tty = isatty(STDERR_FILENO);
    uint64_t now_ns = qv_now_ns(), interval_ns = tty ? 250000000u : 10000000000u;
    if (now_ns - r->progress_ns < interval_ns)
        return;
    r->progress_ns = now_ns;
    qv_engine_stats stats;
    qv_engine_get_stats(r->engine, &stats);
    double seconds = (double)(now_ns - r->start_ns) * 1e-9;
    fprintf(stderr,
            "%s%" PRIu64 " of %" PRIu64
            " requests answered, %d running, %d waiting, %.0f tokens/s%s",
            tty ? "\r\033[K" : "", r->n_done, r->n_lines, stats.running, stats.waiting,
            (double)stats.tokens_generated / seconds, tty ? "" : "\n");
    fflush(stderr);
    r->progress_shown = tty;
}

static void show_summary(runner *r)
{
    clear_progress(r);
    if (r->settings.quiet)
        return;
    qv_engine_stats stats;
    qv_engine_get_stats(r->engine, &stats);
    double seconds = (double)(qv_now_ns() - r->start_ns) * 1e-9;
    fprintf(stderr,
            "%" PRIu64 " requests: %" PRIu64 " answered, %" PRIu64 " errors; %" PRIu64
            " prompt tokens and %" PRIu64 " new ones in %.2f s (%.0f new tokens/s)\n",
            r->n_lines, r->n_done, r->n_errors, stats.tokens_prefilled, stats.tokens_generated,
            seconds, (double)stats.tokens_generated / seconds);
}

/* --- Replies --------------------------------------------------------------------------------- */

/* Print a message as one line. */
static qv_status put(const qv_message *message)
{
    json_t *json;
    QV_TRY(qv_message_to_json(message, &json));
    int rc = json_dumpf(json, stdout, JSON_COMPACT | JSON_ENCODE_ANY);
    json_decref(json);
    if (rc != 0 || putchar('\n') == EOF)
        return qv_fail(QV_ERR_IO, "cannot write replies: %s", strerror(errno));
    return QV_OK;
}

static qv_status put_error(runner *r, qv_str id, qv_code code, const char *text)
{
    r->n_errors++;
    qv_message message;
    qv_message_init(&message, QV_MSG_ERROR);
    if (id.size > 0)
        qv_set(&message.error, error, id, id);
    qv_set(&message.error, error, code, qv_str_from(qv_code_name(code)));
    qv_set(&message.error, error, message, qv_str_from(text));
    return put(&message);
}

static qv_status put_tokens(const job *j, const qv_msg_delta *delta)
{
    qv_message message;
    qv_message_init(&message, QV_MSG_TOKENS);
    qv_msg_tokens *out = &message.tokens;
    qv_set(out, tokens, id, qv_str_from(j->id));
    qv_set(out, tokens, index, delta->index);
    qv_set(out, tokens, seq, delta->seq);
    qv_set(out, tokens, text, delta->text);
    qv_set(out, tokens, tokens, delta->tokens);
    if (qv_has(delta, delta, logprobs))
        qv_set(out, tokens, logprobs, delta->logprobs);
    if (qv_has(delta, delta, top_logprobs))
        qv_set(out, tokens, top_logprobs, delta->top_logprobs);
    return put(&message);
}

/* The warnings of a request as the protocol has them; the strings stay in the json. */
static qv_strs warnings_of(const job *j, qv_str *strings)
{
    qv_strs out = {strings, (uint32_t)json_array_size(j->warnings)};
    for (uint32_t i = 0; i < out.count; i++)
        strings[i] = qv_str_from(json_string_value(json_array_get(j->warnings, i)));
    return out;
}

static qv_status put_done(const job *j, const qv_msg_delta *delta)
{
    uint64_t now_ns = qv_now_ns(), first_ns = j->streams[delta->index].first_ns;
    const qv_answer *answer = &j->streams[delta->index].answer;
    qv_message message;
    qv_str strings[16];
    qv_message_init(&message, QV_MSG_DONE);
    qv_msg_done *out = &message.done;
    qv_set(out, done, id, qv_str_from(j->id));
    qv_set(out, done, index, delta->index);
    qv_set(out, done, seq, j->stream ? answer->next_seq : 0);
    qv_set(out, done, finish_reason, delta->finish_reason);
    qv_set(out, done, usage, delta->usage);
    if (!j->stream)
        qv_answer_fill_done(answer, out);
    if (qv_has(delta, delta, prompt_logprobs))
        qv_set(out, done, prompt_logprobs, delta->prompt_logprobs);
    if (qv_has(delta, delta, prompt_top_logprobs))
        qv_set(out, done, prompt_top_logprobs, delta->prompt_top_logprobs);
    qv_set(out, done, worker, qv_str_from("quiver-run"));
    qv_set(out, done, adapter, qv_str_from(j->adapter));
    qv_msg_timing timing = {
        .queue_ms = ms_between(j->read_ns, j->submit_ns),
        .first_token_ms = ms_between(j->read_ns, first_ns > 0 ? first_ns : now_ns),
        .total_ms = ms_between(j->read_ns, now_ns),
    };
    qv_set(out, done, timing, timing);
    if (j->warnings != NULL)
        qv_set(out, done, warnings, warnings_of(j, strings));
    return put(&message);
}

/* --- Jobs ------------------------------------------------------------------------------------ */

static void job_free(job *j)
{
    if (j == NULL)
        return;
    for (int64_t i = 0; i < j->n_streams; i++)
        qv_answer_deinit(&j->streams[i].answer);
    json_decref(j->warnings);
    free(j->id);
    free(j->adapter);
    free(j);
}

static job *job_new(const qv_message *message, uint64_t number)
{
    const qv_msg_submit *submit = &message->submit;
    size_t n = (size_t)submit->n;
    job *j = calloc(1, sizeof *j + n * sizeof j->streams[0]);
    if (j == NULL)
        return NULL;
    j->number = number;
    j->id = strndup(submit->id.data, submit->id.size);
    j->adapter =
        submit->adapter.size > 0 ? strndup(submit->adapter.data, submit->adapter.size) : strdup("");
    j->stream = qv_has(submit, submit, stream) && submit->stream;
    j->read_ns = qv_now_ns();
    if (qv_has(submit, submit, deadline_ms))
        j->deadline_ns = j->read_ns + (uint64_t)submit->deadline_ms * 1000000;
    j->n_streams = j->n_left = submit->n;
    if (message->unknown_keys.count > 0)
        j->warnings = json_array();
    for (uint32_t i = 0; i < message->unknown_keys.count; i++) {
        qv_str key = message->unknown_keys.data[i];
        json_array_append_new(j->warnings,
                              json_sprintf("unknown key '%.*s'", (int)key.size, key.data));
    }
    if (j->id == NULL || j->adapter == NULL) {
        job_free(j);
        return NULL;
    }
    return j;
}

static void job_end(runner *r, job *j)
{
    qv_map_remove_u64(r->jobs, j->number);
    qv_map_remove_str(r->ids, j->id);
    job_free(j);
}

/* --- Requests -------------------------------------------------------------------------------- */

static qv_status put_last_error(runner *r, qv_str id, qv_code code)
{
    char text[QV_ERROR_MAX];
    snprintf(text, sizeof text, "%s", qv_error());
    return put_error(r, id, code, text);
}

/* The engine takes the held request if it has room. */
static void submit_held(runner *r)
{
    const qv_engine_options *o = qv_engine_get_options(r->engine);
    int64_t room = o->max_running + o->max_waiting - r->n_in_engine;
    if (r->held == NULL || (r->held_job->n_streams > room && r->n_in_engine > 0))
        return;
    r->n_in_engine += r->held_job->n_streams;
    r->held_job->submit_ns = qv_now_ns();
    /* A refusal comes back as a delta, as every other end does. */
    qv_engine_submit(r->engine, r->held);
    r->held = NULL;
    r->held_job = NULL;
}

static qv_status read_submit(runner *r, const qv_message *message)
{
    const qv_msg_submit *submit = &message->submit;
    if (qv_map_get(r->ids, submit->id.data, submit->id.size) != NULL) {
        qv_fail(QV_ERR_EXISTS, "id '%.*s' belongs to a request that has not ended",
                (int)submit->id.size, submit->id.data);
        return put_last_error(r, submit->id, QV_CODE_BAD_REQUEST);
    }
    uint64_t seed;
    if (getrandom(&seed, sizeof seed, 0) != sizeof seed)
        return qv_fail(QV_ERR_IO, "getrandom: %s", strerror(errno));
    qv_request *request;
    qv_code code;
    uint64_t number = ++r->n_submitted;
    if (qv_request_new(r->engine, submit, number, seed, NULL, 0, &request, &code) != QV_OK)
        return put_last_error(r, submit->id, code);
    job *j = job_new(message, number);
    if (j == NULL || qv_map_set_u64(r->jobs, number, j) != QV_OK ||
        qv_map_set_str(r->ids, j->id, j) != QV_OK) {
        qv_request_free(request);
        if (j != NULL)
            job_end(r, j);
        return qv_fail(QV_ERR_NOMEM, "no memory for one more request");
    }
    r->held = request;
    r->held_job = j;
    submit_held(r);
    return QV_OK;
}

static qv_status read_cancel(runner *r, const qv_msg_cancel *cancel)
{
    const job *j = qv_map_get(r->ids, cancel->id.data, cancel->id.size);
    if (j == NULL) {
        qv_fail(QV_ERR_NOT_FOUND, "no request with id '%.*s' is running", (int)cancel->id.size,
                cancel->id.data);
        return put_last_error(r, cancel->id, QV_CODE_BAD_REQUEST);
    }
    submit_held(r);
    qv_engine_abort(r->engine, j->number, "cancelled");
    return QV_OK;
}

static bool is_blank(const char *text, size_t size)
{
    return strspn(text, " \t\r") >= size;
}

/* One line of input, terminated by the caller. */
static qv_status read_line(runner *r, const char *text, size_t size)
{
    r->line_number++;
    if (is_blank(text, size))
        return QV_OK;
    r->n_lines++;
    qv_arena_reset(&r->arena);
    char where[40];
    snprintf(where, sizeof where, "line %" PRIu64, r->line_number);
    json_t *json;
    if (qv_json_load(text, size, where, &json) != QV_OK)
        return put_last_error(r, (qv_str){0}, QV_CODE_BAD_REQUEST);
    r->n_parsed++;
    qv_message message;
    qv_status status = qv_message_from_json(json, QV_FROM_CLIENT, &r->arena, &message);
    if (status != QV_OK) {
        qv_fail_prefix(status, "%s", where);
        status = put_last_error(r, message.id, qv_code_of_status(status));
    } else if (message.type == QV_MSG_SUBMIT) {
        status = read_submit(r, &message);
    } else if (message.type == QV_MSG_CANCEL) {
        status = read_cancel(r, &message.cancel);
    } else {
        qv_fail(QV_ERR_UNSUPPORTED, "%s: '%s' needs a broker; quiver-run takes submit and cancel",
                where, qv_message_type_name(message.type));
        status = put_last_error(r, message.id, QV_CODE_BAD_REQUEST);
    }
    json_decref(json);
    return status;
}

/* --- Input ----------------------------------------------------------------------------------- */

static bool wants_input(const runner *r)
{
    return !r->end_of_input && !r->cancelled && r->held == NULL;
}

/* The next whole line in the buffer, terminated; false if there is none yet. The last line of the
 * input needs no newline. */
static bool next_line(runner *r, char **text, size_t *size)
{
    char *start = r->buffer + r->used, *end = NULL;
    if (r->n_bytes > r->scanned)
        end = memchr(r->buffer + r->scanned, '\n', r->n_bytes - r->scanned);
    if (end == NULL && (!r->end_of_input || r->used == r->n_bytes)) {
        r->scanned = r->n_bytes;
        return false;
    }
    if (end == NULL)
        end = r->buffer + r->n_bytes;
    *end = '\0';
    *text = start;
    *size = (size_t)(end - start);
    r->used += *size < r->n_bytes - r->used ? *size + 1 : *size;
    r->scanned = r->used;
    return true;
}

/* Use the lines that are in the buffer, until the engine is full. */
static qv_status use_lines(runner *r)
{
    char *text;
    size_t size;
    while (r->held == NULL && !r->cancelled && next_line(r, &text, &size)) {
        if (!r->skipping)
            QV_TRY(read_line(r, text, size));
        r->skipping = false;
    }
    return QV_OK;
}

/* Drop what was used, and make room for more and for a terminator. A line beyond the limit is
 * refused and skipped. */
static qv_status reserve_input(runner *r)
{
    r->n_bytes -= r->used;
    if (r->n_bytes > 0)
        memmove(r->buffer, r->buffer + r->used, r->n_bytes);
    r->scanned -= r->used;
    r->used = 0;
    if (r->n_bytes > MAX_LINE) {
        r->n_bytes = r->scanned = 0;
        if (!r->skipping) {
            r->skipping = true;
            r->n_lines++;
            qv_fail(QV_ERR_LIMIT, "line %" PRIu64 " is longer than %zu bytes", ++r->line_number,
                    MAX_LINE);
            QV_TRY(put_last_error(r, (qv_str){0}, QV_CODE_TOO_LARGE));
        }
    }
    if (r->capacity - r->n_bytes > (1 << 16))
        return QV_OK;
    size_t capacity = r->capacity * 2 + (1 << 18);
    char *grown = realloc(r->buffer, capacity);
    if (grown == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a line of %zu bytes", r->n_bytes);
    r->buffer = grown;
    r->capacity = capacity;
    return QV_OK;
}

/* Read once; the descriptor is readable. */
static qv_status read_input(runner *r)
{
    QV_TRY(reserve_input(r));
    ssize_t n = read(r->input, r->buffer + r->n_bytes, r->capacity - r->n_bytes - 1);
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return QV_OK;
    if (n < 0)
        return qv_fail(QV_ERR_IO, "cannot read requests: %s", strerror(errno));
    r->end_of_input = n == 0;
    r->n_bytes += (size_t)n;
    return QV_OK;
}

/* Wait up to `timeout_ms` for input, the loader or Ctrl-C, and read what is there. *got_input: the
 * input was ready. */
static qv_status wait_and_read(runner *r, int timeout_ms, bool *got_input)
{
    struct pollfd fds[] = {
        {.fd = interrupt_fd, .events = POLLIN},
        {.fd = qv_engine_fd(r->engine), .events = POLLIN},
        {.fd = wants_input(r) ? r->input : -1, .events = POLLIN},
    };
    int n = poll(fds, 3, timeout_ms);
    if (n < 0 && errno != EINTR)
        return qv_fail(QV_ERR_IO, "poll: %s", strerror(errno));
    *got_input = n > 0 && fds[2].revents != 0;
    return *got_input ? read_input(r) : QV_OK;
}

/* Read and submit as much as there is and the engine takes, without waiting. */
static qv_status take_input(runner *r)
{
    bool more = true;
    submit_held(r);
    while (more) {
        QV_TRY(use_lines(r));
        more = false;
        if (wants_input(r))
            QV_TRY(wait_and_read(r, 0, &more));
    }
    return QV_OK;
}

/* --- Steps ----------------------------------------------------------------------------------- */

static qv_status take_delta(runner *r, const qv_msg_delta *delta)
{
    job *j = qv_map_get_u64(r->jobs, delta->request);
    if (j == NULL)
        return QV_OK;
    if (qv_has(delta, delta, error_code)) {
        qv_code code = QV_CODE_INTERNAL;
        qv_code_find(delta->error_code, &code);
        char *text = strndup(delta->error_message.data, delta->error_message.size);
        qv_status status = put_error(r, qv_str_from(j->id), code, text != NULL ? text : "");
        free(text);
        r->n_in_engine -= j->n_left;
        job_end(r, j);
        return status;
    }
    bool has_content = delta->tokens.count > 0 || delta->text.size > 0;
    if (delta->tokens.count > 0 && j->streams[delta->index].first_ns == 0)
        j->streams[delta->index].first_ns = qv_now_ns();
    QV_TRY(qv_answer_add_delta(&j->streams[delta->index].answer, delta));
    if (j->stream && has_content)
        QV_TRY(put_tokens(j, delta));
    if (!qv_has(delta, delta, finish_reason))
        return QV_OK;
    QV_TRY(put_done(j, delta));
    r->n_in_engine--;
    if (--j->n_left == 0) {
        r->n_done++;
        job_end(r, j);
    }
    return QV_OK;
}

static void report_adapter(runner *r, const qv_adapter_event *event)
{
    clear_progress(r);
    if (event->phase == QV_ADAPTER_FAILED)
        qv_err("adapter %s: %s", event->name, event->reason);
    else if (event->phase == QV_ADAPTER_READY)
        qv_info("adapter %s: rank %d, digest %s, loaded in %" PRIu64 " ms", event->name,
                event->rank, event->digest, event->load_ms);
}

static qv_status step(runner *r)
{
    qv_step_result result;
    QV_TRY(qv_engine_step(r->engine, &result));
    for (uint32_t i = 0; i < result.n_adapters; i++)
        report_adapter(r, &result.adapters[i]);
    for (uint32_t i = 0; i < result.n_deltas; i++)
        QV_TRY(take_delta(r, &result.deltas[i]));
    if (result.n_deltas > 0 && fflush(stdout) != 0)
        return qv_fail(QV_ERR_IO, "cannot write replies: %s", strerror(errno));
    show_progress(r);
    return QV_OK;
}

/* End requests whose time is up. Returns ms until the next deadline, -1 if there is none. */
static int check_deadlines(runner *r)
{
    uint64_t now_ns = qv_now_ns(), next_ns = UINT64_MAX;
    QV_MAP_EACH(r->jobs, entry)
    {
        job *j = entry->value;
        if (j->deadline_ns == 0 || j == r->held_job)
            continue;
        if (j->deadline_ns <= now_ns) {
            qv_engine_abort(r->engine, j->number, "deadline");
            j->deadline_ns = 0;
        } else if (j->deadline_ns < next_ns) {
            next_ns = j->deadline_ns;
        }
    }
    if (next_ns == UINT64_MAX)
        return -1;
    uint64_t ms = (next_ns - now_ns) / 1000000 + 1;
    return ms < 60000 ? (int)ms : 60000;
}

/* The first Ctrl-C: read no more, end what runs with `done` lines. */
static void cancel_all(runner *r)
{
    r->cancelled = true;
    if (r->held != NULL) {
        qv_request_free(r->held);
        job_end(r, r->held_job);
        r->held = NULL;
        r->held_job = NULL;
    }
    QV_MAP_EACH(r->jobs, entry)
    qv_engine_abort(r->engine, ((job *)entry->value)->number, "cancelled");
}

static qv_status run(runner *r)
{
    for (;;) {
        if (n_interrupts > 0 && !r->cancelled)
            cancel_all(r);
        QV_TRY(take_input(r));
        int timeout_ms = check_deadlines(r);
        if (qv_engine_has_work(r->engine)) {
            QV_TRY(step(r));
            continue;
        }
        if (qv_map_count(r->jobs) == 0 && (r->cancelled || r->end_of_input))
            return QV_OK;
        if (fflush(stdout) != 0)
            return qv_fail(QV_ERR_IO, "cannot write replies: %s", strerror(errno));
        bool got_input;
        QV_TRY(wait_and_read(r, timeout_ms, &got_input));
    }
}

/* --- Main ------------------------------------------------------------------------------------ */

static qv_status load_adapters(runner *r)
{
    const qv_string_list *list = &r->settings.adapters;
    for (size_t i = 0; i < list->n; i++) {
        const char *equals = strchr(list->items[i], '=');
        if (equals == NULL || equals[1] == '\0')
            return qv_fail(QV_ERR_ARG, "--adapter %s: give NAME=DIR", list->items[i]);
        char *name = strndup(list->items[i], (size_t)(equals - list->items[i]));
        if (name == NULL)
            return qv_fail(QV_ERR_NOMEM, "no memory for the name of an adapter");
        qv_status status = qv_engine_load_adapter(r->engine, name, equals + 1, false);
        free(name);
        QV_TRY(status);
    }
    return QV_OK;
}

static qv_status open_input(runner *r)
{
    r->input = STDIN_FILENO;
    if (r->settings.input == NULL)
        return QV_OK;
    r->input = open(r->settings.input, O_RDONLY | O_CLOEXEC);
    if (r->input < 0)
        return qv_fail(QV_ERR_NOT_FOUND, "--input %s: %s", r->settings.input, strerror(errno));
    return QV_OK;
}

static qv_status start(runner *r)
{
    qv_arena_init(&r->arena, 0, 0);
    r->jobs = qv_map_new(0);
    r->ids = qv_map_new(0);
    if (r->jobs == NULL || r->ids == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to start");
    QV_TRY(open_input(r));
    QV_TRY(catch_signals());
    QV_TRY(qv_engine_open(&r->settings.engine, NULL, &r->engine));
    QV_TRY(load_adapters(r));
    r->start_ns = r->progress_ns = qv_now_ns();
    return QV_OK;
}

static void free_job(void *j)
{
    job_free(j);
}

static void finish(runner *r)
{
    qv_request_free(r->held);
    qv_engine_close(r->engine);
    qv_map_free(r->ids, NULL);
    qv_map_free(r->jobs, free_job);
    qv_arena_deinit(&r->arena);
    free(r->buffer);
    if (r->input > STDIN_FILENO)
        close(r->input);
    if (interrupt_fd >= 0)
        close(interrupt_fd);
}

int main(int argc, char **argv)
{
    runner r = {.input = -1};
    qv_options *options;
    qv_log_init(&(qv_log_options){.level = QV_LOG_INFO, .program = "quiver-run"});
    if (qv_options_parse(option_table, sizeof option_table / sizeof *option_table, &program, argc,
                         argv, &r.settings, &options) != QV_OK) {
        fprintf(stderr, "quiver-run: %s\n", qv_error());
        return EXIT_USAGE;
    }
    if (qv_options_printed(options)) {
        qv_options_free(options);
        return EXIT_SUCCESS;
    }
    if (r.settings.quiet)
        qv_log_set_level(QV_LOG_ERROR);

    qv_status status = start(&r);
    if (status == QV_OK) {
        status = run(&r);
        show_summary(&r);
    }
    if (status != QV_OK)
        qv_err("%s", qv_error());
    int code = status == QV_ERR_ARG               ? EXIT_USAGE
               : status != QV_OK                  ? EXIT_ENGINE
               : r.cancelled                      ? EXIT_INTERRUPTED
               : r.n_lines > 0 && r.n_parsed == 0 ? EXIT_BAD_INPUT
                                                  : EXIT_SUCCESS;
    finish(&r);
    qv_options_free(options);
    return code;
}
