#include "clients/cli_jobs.h"

#include "common/answer.h"
#include "common/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <wchar.h>

/* How long answers may take to confirm that they were cancelled. */
#define CANCEL_WAIT_MS 5000
#define LABEL_SIZE     24

typedef enum { SHOW_TEXT, SHOW_LINES, SHOW_LIVE, SHOW_JSON } show_mode;

/* One answer to come: stream `index` of job `job`. Also a line of the display. */
typedef struct {
    size_t job;
    int64_t index;
    qv_answer answer;
    bool done;
    char label[LABEL_SIZE];
    char outcome[256]; /* finish reason or error; empty while it runs */
} stream;

typedef struct {
    qv_client *client;
    const cli_jobs_options *options;
    show_mode mode;
    stream *streams; /* [n_streams], those of one job in a row */
    size_t n_streams;
    size_t *first; /* [n_jobs + 1] first stream of each job */
    size_t next_job, open_jobs, drawn;
    bool *finished; /* [n_jobs] */
    bool any_failed, cancelling;
} run;

/* --- display
 * --------------------------------------------------------------------------------------*/

static int terminal_columns(void)
{
    struct winsize size;
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 80;
}

/* Print at most `columns` columns of a text, line breaks as spaces, the end of the text if it is
 * longer. */
static void print_tail(const char *text, size_t size, int columns)
{
    wchar_t *wide = calloc(size + 1, sizeof *wide);
    if (!wide)
        return;
    size_t n = 0;
    mbstate_t state = {0};
    for (size_t i = 0; i < size;) {
        size_t used = mbrtowc(&wide[n], text + i, size - i, &state);
        if (used == (size_t)-1 || used == (size_t)-2 || used == 0) {
            wide[n] = L'?';
            used = 1;
            memset(&state, 0, sizeof state);
        }
        if (wide[n] < 32)
            wide[n] = L' ';
        n++;
        i += used;
    }
    size_t start = n;
    int width = 0;
    while (start > 0) {
        int w = wcwidth(wide[start - 1]);
        if (width + (w > 0 ? w : 0) > columns)
            break;
        width += w > 0 ? w : 0;
        start--;
    }
    printf("%.*ls", (int)(n - start), wide + start);
    free(wide);
}

static void print_line(const stream *s)
{
    printf("%-*s ", LABEL_SIZE - 1, s->label);
    qv_str text = qv_answer_text(&s->answer);
    fwrite(text.data, 1, text.size, stdout);
    if (s->outcome[0])
        printf("%s[%s]", text.size ? "  " : "", s->outcome);
    putchar('\n');
    fflush(stdout);
}

/* Redraw all lines in place. */
static void draw(run *r)
{
    int columns = terminal_columns() - LABEL_SIZE - 1;
    if (r->drawn)
        printf("\x1b[%zuA", r->drawn);
    for (size_t i = 0; i < r->n_streams; i++) {
        const stream *s = &r->streams[i];
        qv_str text = qv_answer_text(&s->answer);
        printf("\r\x1b[K%-*s ", LABEL_SIZE - 1, s->label);
        int room = columns - (s->outcome[0] ? (int)strlen(s->outcome) + 4 : 0);
        print_tail(text.data, text.size, room > 8 ? room : 8);
        if (s->outcome[0])
            printf("  \x1b[2m[%s]\x1b[0m", s->outcome);
        putchar('\n');
    }
    r->drawn = r->n_streams;
    fflush(stdout);
}

static void show_json(const qv_message *message)
{
    json_t *json;
    if (qv_message_to_json(message, &json) != QV_OK) {
        cli_fail(CLI_FAILED);
        return;
    }
    json_dumpf(json, stdout, JSON_COMPACT);
    putchar('\n');
    fflush(stdout);
    json_decref(json);
}

static void show_summary(const run *r, const stream *s, const qv_msg_done *done)
{
    if (!r->options->verbose)
        return;
    fprintf(
        stderr,
        "%s: %lld prompt tokens, %lld generated, first after %.0f ms, %.0f ms in all, worker %.*s, "
        "adapter %.*s, %s\n",
        s->label, (long long)done->usage.prompt_tokens, (long long)done->usage.completion_tokens,
        done->timing.first_token_ms, done->timing.total_ms, (int)done->worker.size,
        done->worker.size ? done->worker.data : "",
        done->adapter.size ? (int)done->adapter.size : 4,
        done->adapter.size ? done->adapter.data : "base", s->outcome);
}

/* --- streams
 * ----------------------------------------------------------------------------------------*/

static qv_status make_streams(run *r)
{
    const cli_jobs_options *o = r->options;
    r->first = calloc(o->n_jobs + 1, sizeof *r->first);
    r->finished = calloc(o->n_jobs + 1, sizeof *r->finished);
    if (!r->first || !r->finished)
        return qv_fail(QV_ERR_NOMEM, "out of memory");
    for (size_t j = 0; j < o->n_jobs; j++)
        r->first[j + 1] = r->first[j] + (size_t)(qv_has(&o->jobs[j], submit, n) ? o->jobs[j].n : 1);
    r->n_streams = r->first[o->n_jobs];
    r->streams = calloc(r->n_streams + 1, sizeof *r->streams);
    if (!r->streams)
        return qv_fail(QV_ERR_NOMEM, "out of memory");
    for (size_t j = 0; j < o->n_jobs; j++)
        for (size_t i = r->first[j]; i < r->first[j + 1]; i++) {
            stream *s = &r->streams[i];
            const qv_str adapter = o->jobs[j].adapter;
            s->job = j;
            s->index = (int64_t)(i - r->first[j]);
            qv_answer_init(&s->answer, 0);
            snprintf(s->label, sizeof s->label, "%.*s %.*s", adapter.size ? (int)adapter.size : 4,
                     adapter.size ? adapter.data : "base", (int)o->jobs[j].id.size,
                     o->jobs[j].id.data);
        }
    return QV_OK;
}

static void free_streams(run *r)
{
    for (size_t i = 0; r->streams && i < r->n_streams; i++)
        qv_answer_deinit(&r->streams[i].answer);
    free(r->streams);
    free(r->first);
    free(r->finished);
}

static bool find_job(const run *r, qv_str id, size_t *job)
{
    for (size_t j = 0; j < r->next_job; j++) {
        const qv_str have = r->options->jobs[j].id;
        if (have.size == id.size && memcmp(have.data, id.data, id.size) == 0) {
            *job = j;
            return true;
        }
    }
    return false;
}

static stream *find_stream(run *r, size_t job, int64_t index)
{
    bool there = index >= 0 && (size_t)index < r->first[job + 1] - r->first[job];
    return there ? &r->streams[r->first[job] + (size_t)index] : NULL;
}

static void finish_job(run *r, size_t job)
{
    if (!r->finished[job]) {
        r->finished[job] = true;
        r->open_jobs--;
    }
}

/* A stream has ended: print it if it was not printed as it came, and close its job with the last.
 */
static void end_stream(run *r, stream *s)
{
    s->done = true;
    if (r->mode == SHOW_LINES)
        print_line(s);
    else if (r->mode == SHOW_TEXT)
        putchar('\n');
    for (size_t i = r->first[s->job]; i < r->first[s->job + 1]; i++)
        if (!r->streams[i].done)
            return;
    finish_job(r, s->job);
}

/* --- messages
 * -----------------------------------------------------------------------------------------*/

static qv_status on_tokens(run *r, const qv_msg_tokens *tokens)
{
    size_t job;
    stream *s;
    if (!find_job(r, tokens->id, &job) || !(s = find_stream(r, job, tokens->index)))
        return QV_OK;
    QV_TRY(qv_answer_add_tokens(&s->answer, tokens));
    if (r->mode == SHOW_TEXT) {
        fwrite(tokens->text.data, 1, tokens->text.size, stdout);
        fflush(stdout);
    }
    return QV_OK;
}

static qv_status on_done(run *r, const qv_msg_done *done)
{
    size_t job;
    stream *s;
    if (!find_job(r, done->id, &job) || !(s = find_stream(r, job, done->index)))
        return QV_OK;
    QV_TRY(qv_answer_add_done(&s->answer, done));
    if (r->mode == SHOW_TEXT && qv_has(done, done, text))
        fwrite(done->text.data, 1, done->text.size, stdout);
    if (!qv_str_equal(done->finish_reason, "stop") || r->mode == SHOW_LIVE)
        snprintf(s->outcome, sizeof s->outcome, "%.*s", (int)done->finish_reason.size,
                 done->finish_reason.data);
    end_stream(r, s);
    show_summary(r, s, done);
    return QV_OK;
}

static void on_error(run *r, const qv_msg_error *error)
{
    size_t job;
    r->any_failed = true;
    fprintf(stderr, "quiver: %.*s%s%.*s: %.*s\n", (int)error->id.size,
            error->id.size ? error->id.data : "", error->id.size ? ": " : "", (int)error->code.size,
            error->code.data, (int)error->message.size, error->message.data);
    r->drawn = 0; /* the line above moved the display */
    if (!find_job(r, error->id, &job))
        return;
    for (size_t i = r->first[job]; i < r->first[job + 1]; i++) {
        snprintf(r->streams[i].outcome, sizeof r->streams[i].outcome, "%.*s", (int)error->code.size,
                 error->code.data);
        if (!r->streams[i].done && r->mode == SHOW_LINES)
            print_line(&r->streams[i]);
        r->streams[i].done = true;
    }
    finish_job(r, job);
}

static qv_status on_message(run *r, const qv_message *message)
{
    qv_status status = QV_OK;
    if (r->mode == SHOW_JSON)
        show_json(message);
    if (message->type == QV_MSG_TOKENS)
        status = on_tokens(r, &message->tokens);
    else if (message->type == QV_MSG_DONE)
        status = on_done(r, &message->done);
    else if (message->type == QV_MSG_ERROR)
        on_error(r, &message->error);
    if (r->mode == SHOW_LIVE)
        draw(r);
    return status;
}

/* --- the loop
 * -------------------------------------------------------------------------------------------*/

static qv_status submit_more(run *r)
{
    while (!r->cancelling && r->next_job < r->options->n_jobs &&
           r->open_jobs < r->options->concurrency) {
        QV_TRY(qv_client_submit(r->client, &r->options->jobs[r->next_job]));
        r->next_job++;
        r->open_jobs++;
    }
    return QV_OK;
}

static void cancel_all(run *r)
{
    r->cancelling = true;
    for (size_t j = 0; j < r->next_job; j++) {
        char id[65];
        if (r->finished[j])
            continue;
        snprintf(id, sizeof id, "%.*s", (int)r->options->jobs[j].id.size,
                 r->options->jobs[j].id.data);
        qv_client_cancel(r->client, id);
    }
}

static int follow(run *r)
{
    while (r->open_jobs || r->next_job < r->options->n_jobs) {
        if (cli_interrupts > 1 || (cli_interrupts && !r->open_jobs))
            return CLI_INTERRUPTED;
        if (cli_interrupts && !r->cancelling)
            cancel_all(r);
        const qv_message *message;
        qv_status status = submit_more(r);
        if (status == QV_OK)
            status = qv_client_poll(
                r->client, r->cancelling ? CANCEL_WAIT_MS : r->options->timeout_ms, &message);
        if (status == QV_OK)
            status = on_message(r, message);
        if (status == QV_ERR_CANCELLED)
            continue; /* a signal: looked at above */
        if (status != QV_OK)
            return cli_fail(r->cancelling ? CLI_INTERRUPTED : CLI_FAILED);
    }
    return r->cancelling ? CLI_INTERRUPTED : r->any_failed ? CLI_FAILED : CLI_OK;
}

int cli_jobs_run(qv_client *client, const cli_jobs_options *options)
{
    run r = {.client = client, .options = options};
    int code = CLI_FAILED;
    if (make_streams(&r) == QV_OK) {
        r.mode = options->json                               ? SHOW_JSON
                 : r.n_streams <= 1                          ? SHOW_TEXT
                 : isatty(STDOUT_FILENO) && r.n_streams < 40 ? SHOW_LIVE
                                                             : SHOW_LINES;
        cli_catch_signals();
        code = follow(&r);
    } else {
        cli_fail(code);
    }
    free_streams(&r);
    return code;
}
