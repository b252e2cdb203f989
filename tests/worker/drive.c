#include "tests/worker/drive.h"

#include "common/json.h"
#include "common/log.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* --- Text that grows ------------------------------------------------------------------------- */

static void append(char **text, const char *format, ...)
{
    char *more, *joined;
    va_list args;
    va_start(args, format);
    cr_assert_geq(vasprintf(&more, format, args), 0);
    va_end(args);
    cr_assert_geq(asprintf(&joined, "%s%s", *text != NULL ? *text : "", more), 0);
    free(*text);
    free(more);
    *text = joined;
}

static void append_tops(char **text, const qv_tops *tops, uint32_t i)
{
    append(text, "[");
    for (uint32_t k = tops->start[i]; k < tops->start[i + 1]; k++)
        append(text, " %d:%a", tops->token[k], tops->logprob[k]);
    append(text, " ]");
}

/* --- Life ------------------------------------------------------------------------------------ */

qv_engine_options drive_options(const char *model_dir)
{
    return (qv_engine_options){
        .model_dir = model_dir,
        .backend = "cpu",
        .overlap = getenv("QV_OVERLAP"), /* tests run once with and once without it */
        .gemm = "exact",
        .threads = 2,
        .max_running = 16,
        .max_waiting = 200,
        .step_tokens = 128,
        .prefill_chunk = 0,
        .page_tokens = 16,
        .kv_bytes = 0,
        .max_context = 0,
        .adapter_slots = 6,
        .max_lora_rank = 16,
        .max_adapter_bytes = 64 << 20,
        .adapter_cache_bytes = 256 << 20,
        .swap_bytes = 256 << 20,
        .prefix_cache = true,
        .prefix_snapshots = 8,
        .prefix_every = 64,
    };
}

drive *drive_open_metrics(const qv_engine_options *options, qv_metrics *metrics)
{
    drive *d = calloc(1, sizeof *d);
    qv_log_set_level(QV_LOG_ERROR);
    cr_assert_eq(qv_engine_open(options, metrics, &d->engine), QV_OK, "%s", qv_error());
    return d;
}

drive *drive_open(const qv_engine_options *options)
{
    return drive_open_metrics(options, NULL);
}

void drive_close(drive *d)
{
    cr_expect_eq(d->n_open, 0, "%d requests have not ended", (int)d->n_open);
    qv_engine_stats stats;
    qv_engine_get_stats(d->engine, &stats);
    const qv_engine_options *o = qv_engine_get_options(d->engine);
    cr_expect_eq(stats.running, 0);
    cr_expect_eq(stats.waiting, 0);
    cr_expect_eq(stats.free_pages, qv_engine_total_pages(d->engine));
    cr_expect_eq(stats.free_state_slots, o->max_running);
    qv_adapter_stats adapters;
    qv_engine_get_adapter_stats(d->engine, &adapters);
    cr_expect_eq(adapters.refs, 0, "%d requests hold adapters", (int)adapters.refs);
    cr_expect_eq(adapters.users, 0, "%d sequences hold adapter slots", (int)adapters.users);
    qv_engine_close(d->engine);
    for (uint64_t i = 0; i < d->n_requests; i++) {
        drive_request *request = &d->requests[i];
        for (int k = 0; request->streams != NULL && k < DRIVE_MAX_STREAMS; k++) {
            free(request->streams[k].scores);
            free(request->streams[k].tops);
        }
        free(request->streams);
    }
    free(d);
}

void drive_load(drive *d, const char *name, const char *dir)
{
    int n = d->n_events;
    cr_assert_eq(qv_engine_load_adapter(d->engine, name, dir, false), QV_OK, "%s", qv_error());
    while (d->n_events == n)
        drive_step(d);
    cr_assert_eq(d->events[n].phase, QV_ADAPTER_READY, "%s: %s", name, d->events[n].reason);
}

/* --- Requests -------------------------------------------------------------------------------- */

static json_t *parse_submit(const char *json)
{
    char *text, *full;
    cr_assert_not_null(text = strdup(json));
    for (char *c = text; *c != '\0'; c++)
        if (*c == '\'')
            *c = '"';
    cr_assert_geq(asprintf(&full, "{\"type\":\"submit\",\"id\":\"t\",%s}", text), 0);
    json_t *out;
    cr_assert_eq(qv_json_load(full, strlen(full), "test", &out), QV_OK, "%s", qv_error());
    free(text);
    free(full);
    return out;
}

uint64_t drive_resume(drive *d, const char *json, uint64_t seed, const qv_msg_resume *resume,
                      uint32_t n_resume)
{
    uint64_t number = d->n_requests++;
    cr_assert_lt(number, DRIVE_MAX_REQUESTS);
    drive_request *out = &d->requests[number];
    *out = (drive_request){.streams = calloc(DRIVE_MAX_STREAMS, sizeof *out->streams)};

    qv_arena arena;
    qv_message message;
    qv_request *request;
    qv_arena_init(&arena, 0, 0);
    json_t *object = parse_submit(json);
    qv_status status = qv_message_from_json(object, QV_FROM_CLIENT, &arena, &message);
    out->code = qv_code_of_status(status);
    if (status == QV_OK)
        status = qv_request_new(d->engine, &message.submit, number, seed, resume, n_resume,
                                &request, &out->code);
    if (status == QV_OK) {
        out->n_left = message.submit.n;
        for (uint32_t i = 0; i < n_resume; i++)
            out->n_left -= resume[i].finished;
        d->n_open += out->n_left > 0;
        qv_engine_submit(d->engine, request); /* a refusal comes as a delta too */
    } else {
        out->failed = true;
        snprintf(out->message, sizeof out->message, "%s", qv_error());
    }
    json_decref(object);
    qv_arena_deinit(&arena);
    return number;
}

uint64_t drive_submit(drive *d, const char *json)
{
    return drive_resume(d, json, 1234, NULL, 0);
}

drive_request *drive_get(drive *d, uint64_t number)
{
    return &d->requests[number];
}

drive_stream *drive_stream_of(drive *d, uint64_t number, int index)
{
    return &d->requests[number].streams[index];
}

/* --- Steps ----------------------------------------------------------------------------------- */

static void take_finish(drive_stream *stream, const qv_msg_delta *delta)
{
    snprintf(stream->finish, sizeof stream->finish, "%.*s", (int)delta->finish_reason.size,
             delta->finish_reason.data);
    stream->usage = delta->usage;
    snprintf(stream->digest, sizeof stream->digest, "%.*s", (int)delta->digest.size,
             delta->digest.data);
    for (uint32_t i = 0; i < delta->prompt_logprobs.count; i++) {
        append(&stream->scores, " %a", delta->prompt_logprobs.data[i]);
        if (qv_has(delta, delta, prompt_top_logprobs))
            append_tops(&stream->scores, &delta->prompt_top_logprobs, i);
    }
}

static void take_delta(drive *d, const qv_msg_delta *delta)
{
    cr_assert_lt(delta->request, d->n_requests);
    drive_request *request = &d->requests[delta->request];
    cr_assert_not(request->failed, "a delta after the error");
    if (qv_has(delta, delta, error_code)) {
        request->failed = true;
        cr_assert(qv_code_find(delta->error_code, &request->code));
        snprintf(request->message, sizeof request->message, "%.*s", (int)delta->error_message.size,
                 delta->error_message.data);
        d->n_open--;
        return;
    }
    drive_stream *stream = &request->streams[delta->index];
    cr_assert_str_empty(stream->finish, "a delta after the last one");
    cr_assert_leq(delta->tokens.count, 1);
    cr_assert_lt(stream->n_deltas, DRIVE_MAX_DELTAS);
    stream->deltas[stream->n_deltas++] = (drive_delta){
        .seq = delta->seq,
        .token = delta->tokens.count > 0 ? delta->tokens.data[0] : -1,
        .text_size = delta->text.size,
        .logprob = delta->logprobs.count > 0 ? delta->logprobs.data[0] : NAN,
    };
    cr_assert_lt(stream->text_size + delta->text.size, sizeof stream->text);
    if (delta->text.size > 0)
        memcpy(stream->text + stream->text_size, delta->text.data, delta->text.size);
    stream->text_size += delta->text.size;
    if (qv_has(delta, delta, top_logprobs))
        append_tops(&stream->tops, &delta->top_logprobs, 0);
    if (qv_has(delta, delta, finish_reason)) {
        take_finish(stream, delta);
        d->n_open -= --request->n_left == 0;
    }
}

void drive_step(drive *d)
{
    if (!qv_engine_has_work(d->engine)) {
        struct pollfd pfd = {.fd = qv_engine_fd(d->engine), .events = POLLIN};
        cr_assert_eq(poll(&pfd, 1, 20000), 1, "nothing to do, and nothing comes");
    }
    qv_step_result result;
    cr_assert_eq(qv_engine_step(d->engine, &result), QV_OK, "%s", qv_error());
    for (uint32_t i = 0; i < result.n_adapters; i++) {
        const qv_adapter_event *event = &result.adapters[i];
        cr_assert_lt(d->n_events, 64);
        snprintf(d->events[d->n_events].name, 64, "%s", event->name);
        snprintf(d->events[d->n_events].reason, QV_ERROR_MAX, "%s",
                 event->reason != NULL ? event->reason : "");
        d->events[d->n_events].phase = event->phase;
        d->events[d->n_events].code = event->code;
        d->events[d->n_events++].pin = event->pin;
    }
    for (uint32_t i = 0; i < result.n_deltas; i++)
        take_delta(d, &result.deltas[i]);
}

void drive_run(drive *d)
{
    for (int steps = 0; d->n_open > 0; steps++) {
        cr_assert_lt(steps, 100000, "it does not come to an end");
        drive_step(d);
    }
}

/* --- Comparison ------------------------------------------------------------------------------ */

char *drive_signature(drive *d, uint64_t number)
{
    char *out = NULL;
    const drive_request *request = &d->requests[number];
    if (request->failed)
        append(&out, "error %s %s\n", qv_code_name(request->code), request->message);
    for (int i = 0; i < DRIVE_MAX_STREAMS; i++) {
        const drive_stream *stream = &request->streams[i];
        if (stream->n_deltas == 0)
            continue;
        append(&out, "%d %s prompt %d answer %d digest '%s' text '%.*s'\n", i, stream->finish,
               (int)stream->usage.prompt_tokens, (int)stream->usage.completion_tokens,
               stream->digest, (int)stream->text_size, stream->text);
        for (int32_t k = 0; k < stream->n_deltas; k++)
            append(&out, "%d/%d/%zu/%a ", (int)stream->deltas[k].seq, stream->deltas[k].token,
                   stream->deltas[k].text_size, stream->deltas[k].logprob);
        append(&out, "\n%s\n%s\n", stream->tops != NULL ? stream->tops : "",
               stream->scores != NULL ? stream->scores : "");
    }
    return out != NULL ? out : strdup("");
}
