#include "worker/request.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- Errors ---------------------------------------------------------------------------------- */

/* Fail with a code for the client that the status alone does not tell. */
#define REFUSE(code_out, client_code, status, ...)                                                 \
    (*(code_out) = QV_CODE_##client_code, qv_fail(QV_ERR_##status, __VA_ARGS__))

/* The code of a failure below us. NOT_FOUND says nothing about adapters here. */
static qv_status pass_up(qv_status status, qv_code *code)
{
    *code = status == QV_ERR_NOT_FOUND ? QV_CODE_BAD_REQUEST : qv_code_of_status(status);
    return status;
}

static qv_status no_memory(qv_code *code)
{
    return REFUSE(code, OVERLOADED, NOMEM, "no memory for the request");
}

/* --- Prompt ---------------------------------------------------------------------------------- */

/* An ANY field as JSON; absent is NULL. */
static qv_status read_any(qv_str raw, const char *name, json_t **out, qv_code *code)
{
    *out = NULL;
    if (raw.size == 0)
        return QV_OK;
    qv_status status = qv_msgpack_to_json(raw, out);
    if (status != QV_OK)
        return pass_up(qv_fail_prefix(status, "%s", name), code);
    if (json_is_null(*out)) {
        json_decref(*out);
        *out = NULL;
    }
    return QV_OK;
}

/* Messages to the text of the prompt, which the caller frees. */
static qv_status render_chat(const qv_request_context *context, const qv_msg_submit *submit,
                             char **text, size_t *size, qv_code *code)
{
    if (context->chat_refusal != NULL)
        return REFUSE(code, BAD_REQUEST, UNSUPPORTED,
                      "messages: the chat template of this model was refused when it was loaded: "
                      "%s; send prompt or tokens",
                      context->chat_refusal);
    if (context->chat == NULL)
        return REFUSE(code, BAD_REQUEST, UNSUPPORTED,
                      "messages: this model has no chat template; send prompt or tokens");
    json_t *messages = NULL, *tools = NULL, *kwargs = NULL;
    qv_status status = read_any(submit->messages, "messages", &messages, code);
    if (status == QV_OK)
        status = read_any(submit->tools, "tools", &tools, code);
    if (status == QV_OK)
        status = read_any(submit->chat_template_kwargs, "chat_template_kwargs", &kwargs, code);
    if (status == QV_OK) {
        status =
            qv_chat_template_render(context->chat, messages, tools, kwargs, true, NULL, text, size);
        if (status != QV_OK)
            pass_up(qv_fail_prefix(status, "messages"), code);
    }
    json_decref(messages);
    json_decref(tools);
    json_decref(kwargs);
    return status;
}

static qv_status check_ids(const qv_request_context *context, const char *name, qv_ints ids,
                           qv_code *code)
{
    for (uint32_t i = 0; i < ids.count; i++)
        if (ids.data[i] < 0 || ids.data[i] >= context->n_valid)
            return REFUSE(code, BAD_REQUEST, ARG,
                          "%s: id %d at %u is not a token of this model (0 to %d)", name,
                          ids.data[i], i, context->n_valid - 1);
    return QV_OK;
}

static qv_status tokenize(const qv_request_context *context, const char *name, const char *text,
                          size_t size, unsigned flags, qv_tokens *out, qv_code *code)
{
    qv_status status =
        qv_tokenizer_encode(context->tokenizer, text, size, flags, (size_t)INT32_MAX, out);
    if (status != QV_OK)
        return pass_up(qv_fail_prefix(status, "%s", name), code);
    return QV_OK;
}

/* The prompt's tokens, whichever way they were given. */
static qv_status read_prompt(const qv_request_context *context, const qv_msg_submit *submit,
                             qv_tokens *out, qv_code *code)
{
    if (qv_has(submit, submit, messages)) {
        char *text = NULL;
        size_t size = 0;
        QV_TRY(render_chat(context, submit, &text, &size, code));
        qv_status status =
            tokenize(context, "messages", text, size, QV_ENCODE_PARSE_SPECIAL, out, code);
        free(text);
        return status;
    }
    if (qv_has(submit, submit, prompt))
        return tokenize(context, "prompt", submit->prompt.data, submit->prompt.size,
                        QV_ENCODE_ADD_SPECIAL | QV_ENCODE_PARSE_SPECIAL, out, code);

    QV_TRY(check_ids(context, "tokens", submit->tokens, code));
    size_t n = submit->tokens.count;
    out->data = malloc((n + 1) * sizeof *out->data);
    if (out->data == NULL)
        return no_memory(code);
    if (n > 0)
        memcpy(out->data, submit->tokens.data, n * sizeof *out->data);
    out->count = out->capacity = n;
    return QV_OK;
}

/* An answer needs room for one token at least; scoring needs none. */
static qv_status check_length(const qv_request_context *context, const qv_msg_submit *submit,
                              size_t n_prompt, qv_code *code)
{
    if (n_prompt == 0)
        return REFUSE(code, BAD_REQUEST, ARG, "the prompt is empty: it has no tokens");
    size_t n = n_prompt + (submit->max_tokens > 0 ? 1 : 0);
    if (n > (size_t)context->max_context)
        return REFUSE(code, CONTEXT_TOO_LONG, LIMIT,
                      "the prompt has %zu tokens, but prompt and answer together may have %d",
                      n_prompt, context->max_context);
    /* A reply that cannot be sent is better refused before the work than after it. */
    if (qv_has(submit, submit, prompt_logprobs)) {
        size_t bytes = n_prompt * (9 + 16 * (size_t)submit->prompt_logprobs);
        size_t limit = qv_protocol_default_limits.max_bytes / 4 * 3;
        if (bytes > limit)
            return REFUSE(code, TOO_LARGE, LIMIT,
                          "prompt_logprobs: %d alternatives for each of %zu prompt tokens take "
                          "about %zu bytes, and a reply has room for %zu",
                          (int)submit->prompt_logprobs, n_prompt, bytes, limit);
    }
    return QV_OK;
}

/* --- Settings -------------------------------------------------------------------------------- */

/* Alternatives to report: no more than there are tokens. */
static int32_t clamp_top(int64_t n, const qv_request_context *context)
{
    return (int32_t)(n < context->n_valid ? n : context->n_valid);
}

/* What the submit says; where it is silent, what the model's generation_config.json says, which is
 * the protocol's default where that is silent too. */
static void read_sampling(qv_request *request, const qv_request_context *context,
                          const qv_msg_submit *submit, uint64_t seed)
{
    const qv_generation_defaults *model = &context->config->generation;
#define PICK(field) (qv_has(submit, submit, field) ? (float)submit->field : model->field)
    int64_t top_k = qv_has(submit, submit, top_k) ? submit->top_k : model->top_k;
    request->sampling = (qv_sample_row){
        .target = -1,
        .temperature = PICK(temperature),
        .top_k = top_k > 0 ? (int32_t)top_k : 0,
        .top_p = PICK(top_p),
        .min_p = PICK(min_p),
        .repetition_penalty = PICK(repetition_penalty),
        .presence_penalty = (float)submit->presence_penalty,
        .frequency_penalty = (float)submit->frequency_penalty,
        .seed = qv_has(submit, submit, seed) ? submit->seed : seed,
        .n_top = -1,
    };
#undef PICK
    request->n_top_prompt = -1;
    if (qv_has(submit, submit, logprobs))
        request->sampling.n_top = clamp_top(submit->logprobs, context);
    if (qv_has(submit, submit, prompt_logprobs))
        request->n_top_prompt = clamp_top(submit->prompt_logprobs, context);
}

/* Longest stop string, in bytes: every stream holds back up to that much text. */
#define MAX_STOP_BYTES 1024

static qv_status read_stop_strings(qv_request *request, const qv_msg_submit *submit, qv_code *code)
{
    qv_stop_string *strings = QV_ARENA_ARRAY(&request->arena, qv_stop_string, submit->stop.count);
    if (strings == NULL)
        return no_memory(code);
    for (uint32_t i = 0; i < submit->stop.count; i++) {
        qv_str text = submit->stop.data[i];
        if (text.size > MAX_STOP_BYTES)
            return REFUSE(code, TOO_LARGE, LIMIT,
                          "stop: string %u has %u bytes, and %d is the most", i, text.size,
                          MAX_STOP_BYTES);
        strings[i] = (qv_stop_string){
            .text = qv_arena_strndup(&request->arena, text.data, text.size),
            .failure = QV_ARENA_ARRAY(&request->arena, uint32_t, text.size),
            .size = text.size,
        };
        if (strings[i].text == NULL || strings[i].failure == NULL)
            return no_memory(code);
        qv_stop_string_prepare(&strings[i]);
    }
    request->rules.strings = strings;
    request->rules.n_strings = submit->stop.count;
    return QV_OK;
}

static qv_status read_stop_tokens(qv_request *request, const qv_request_context *context,
                                  const qv_msg_submit *submit, qv_code *code)
{
    QV_TRY(check_ids(context, "stop_token_ids", submit->stop_token_ids, code));
    const qv_model_config *config = context->config;
    uint32_t n = submit->stop_token_ids.count;
    int32_t *tokens = QV_ARENA_ARRAY(&request->arena, int32_t, n + (uint32_t)config->n_eos + 1);
    if (tokens == NULL)
        return no_memory(code);
    if (n > 0)
        memcpy(tokens, submit->stop_token_ids.data, n * sizeof *tokens);
    if (!submit->ignore_eos) {
        for (int32_t i = 0; i < config->n_eos; i++)
            tokens[n++] = config->eos[i];
        int32_t eos = qv_tokenizer_eos(context->tokenizer);
        if (eos >= 0)
            tokens[n++] = eos;
    }
    request->rules.tokens = tokens;
    request->rules.n_tokens = n;
    return QV_OK;
}

/* --- Streams --------------------------------------------------------------------------------- */

static bool make_prompt_scores(qv_request *request)
{
    size_t n = (size_t)request->n_prompt;
    if (request->n_top_prompt < 0)
        return true;
    request->prompt_logprobs = QV_ARENA_ARRAY(&request->arena, double, n);
    if (request->prompt_logprobs == NULL)
        return false;
    request->prompt_logprobs[0] = NAN;
    if (request->n_top_prompt == 0)
        return true;
    /* Token 0 has no alternatives, every other one n_top_prompt. */
    size_t n_pairs = (n - 1) * (size_t)request->n_top_prompt;
    qv_tops *tops = &request->prompt_tops;
    tops->count = (uint32_t)n;
    tops->start = QV_ARENA_ARRAY(&request->arena, uint32_t, n + 1);
    tops->token = QV_ARENA_ARRAY(&request->arena, int32_t, n_pairs);
    tops->logprob = QV_ARENA_ARRAY(&request->arena, double, n_pairs);
    if (tops->start == NULL || tops->token == NULL || tops->logprob == NULL)
        return false;
    for (uint32_t i = 1; i < tops->count; i++)
        tops->start[i + 1] = tops->start[i] + (uint32_t)request->n_top_prompt;
    return true;
}

static bool make_stream(qv_request *request, const qv_request_context *context,
                        const qv_tokens *prompt, uint32_t index, bool score_only)
{
    qv_arena *arena = &request->arena;
    qv_request_stream *out = &request->streams[index];
    int32_t n_prompt = request->n_prompt;
    int32_t max_tokens = n_prompt + (score_only ? 0 : request->rules.max_answer);
    int32_t n_pages = (max_tokens + context->page_tokens - 1) / context->page_tokens;
    uint32_t *matched = QV_ARENA_ARRAY(arena, uint32_t, request->rules.n_strings);
    char *pending = qv_arena_alloc(arena, qv_stream_max_text(&request->rules), 1);
    out->sequence = (qv_sequence){
        .state = QV_SEQ_WAITING,
        .request = request,
        .index = index,
        .has_adapter = request->adapter.size > 0,
        .tokens = qv_arena_alloc(arena, (size_t)max_tokens * sizeof(int32_t), sizeof(int32_t)),
        .n_prompt = n_prompt,
        .n_tokens = n_prompt,
        .max_tokens = max_tokens,
        .score_prompt = request->n_top_prompt >= 0,
        .score_only = score_only,
        .pages = qv_arena_alloc(arena, (size_t)n_pages * sizeof(int32_t), sizeof(int32_t)),
        .state_slot = -1,
        .adapter_slot = -1,
    };
    if (matched == NULL || pending == NULL || out->sequence.tokens == NULL ||
        out->sequence.pages == NULL)
        return false;
    memcpy(out->sequence.tokens, prompt->data, (size_t)n_prompt * sizeof(int32_t));
    qv_stream_init(&out->stream, &request->rules, matched, pending);
    return true;
}

/* Take up a stream where another worker left it: its tokens are replayed for what they leave behind
 * - held text, progress of stop strings, penalties, the number of draws - and add no output. */
static qv_status resume_stream(qv_request *request, const qv_request_context *context,
                               const qv_msg_resume *resume, qv_code *code)
{
    if (resume->index < 0 || resume->index >= request->n_streams || resume->seq < 0)
        return REFUSE(code, BAD_REQUEST, ARG, "resume: stream %lld at %lld of a request with n %u",
                      (long long)resume->index, (long long)resume->seq, request->n_streams);
    QV_TRY(check_ids(context, "resume", resume->tokens, code));
    qv_request_stream *out = &request->streams[resume->index];
    qv_sequence *seq = &out->sequence;
    if (out->finished || seq->n_tokens > seq->n_prompt)
        return REFUSE(code, BAD_REQUEST, ARG, "resume: stream %lld is there twice",
                      (long long)resume->index);
    out->next_seq = resume->seq;
    if (resume->finished) {
        out->finished = true;
        request->n_unfinished--;
        return QV_OK;
    }
    for (uint32_t i = 0; i < resume->tokens.count; i++) {
        const char *text;
        size_t size;
        if (seq->score_only || out->stream.status != QV_STREAM_RUNS)
            return REFUSE(code, BAD_REQUEST, ARG,
                          "resume: stream %lld has %u tokens, but its answer ends after %u",
                          (long long)resume->index, resume->tokens.count, i);
        qv_sequence_append(seq, resume->tokens.data[i]);
        qv_stream_push(&out->stream, resume->tokens.data[i], &text, &size);
    }
    return QV_OK;
}

/* --- Request --------------------------------------------------------------------------------- */

static qv_status fill(qv_request *request, const qv_request_context *context,
                      const qv_msg_submit *submit, const qv_tokens *prompt, uint64_t seed,
                      qv_code *code)
{
    request->n_prompt = (int32_t)prompt->count;
    request->adapter = (qv_str){
        .data = qv_arena_strndup(&request->arena, submit->adapter.data, submit->adapter.size),
        .size = submit->adapter.size,
    };
    read_sampling(request, context, submit, seed);

    bool score_only = submit->max_tokens == 0;
    int64_t room = context->max_context - request->n_prompt;
    request->rules.tokenizer = context->tokenizer;
    request->rules.max_answer = (int32_t)(submit->max_tokens < room ? submit->max_tokens : room);
    QV_TRY(read_stop_strings(request, submit, code));
    QV_TRY(read_stop_tokens(request, context, submit, code));

    request->n_streams = request->n_unfinished = (uint32_t)submit->n;
    request->streams = QV_ARENA_ARRAY(&request->arena, qv_request_stream, request->n_streams);
    if (request->adapter.data == NULL || request->streams == NULL || !make_prompt_scores(request))
        return no_memory(code);
    for (uint32_t i = 0; i < request->n_streams; i++) {
        if (!make_stream(request, context, prompt, i, score_only))
            return no_memory(code);
        request->streams[i].sequence.priority = (int32_t)submit->priority;
    }
    return QV_OK;
}

qv_status qv_request_new(const qv_engine *engine, const qv_msg_submit *submit, uint64_t number,
                         uint64_t seed, const qv_msg_resume *resume, uint32_t n_resume,
                         qv_request **out, qv_code *code)
{
    const qv_request_context *context = qv_engine_request_context(engine);
    qv_status status = qv_submit_check(submit);
    if (status != QV_OK)
        return pass_up(status, code);

    qv_tokens prompt = {0};
    qv_request *request = calloc(1, sizeof *request);
    if (request == NULL)
        return no_memory(code);
    request->number = number;
    qv_arena_init(&request->arena, 4096, 0);

    status = read_prompt(context, submit, &prompt, code);
    if (status == QV_OK)
        status = check_length(context, submit, prompt.count, code);
    if (status == QV_OK)
        status = fill(request, context, submit, &prompt, seed, code);
    for (uint32_t i = 0; status == QV_OK && i < n_resume; i++)
        status = resume_stream(request, context, &resume[i], code);
    qv_tokens_deinit(&prompt);
    if (status != QV_OK) {
        qv_request_free(request);
        return status;
    }
    *out = request;
    return QV_OK;
}

void qv_request_free(qv_request *request)
{
    if (request == NULL)
        return;
    qv_arena_deinit(&request->arena);
    free(request);
}
