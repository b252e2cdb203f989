#include "models/chat_template.h"

#include "common/json.h"
#include "models/jinja.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#define CONFIG_JSON_MAX ((size_t)16 << 20)

struct qv_chat_template {
    qv_jprogram program;
    qv_chat_template *tool_use; /* the template for requests with tools, or NULL; owned */
    json_t *variables;          /* special tokens by name, or NULL; owned */
};

/* ---- Compiling ------------------------------------------------------------------------------- */

qv_status qv_chat_template_compile(const char *text, size_t len, const char *name,
                                   qv_chat_template **out)
{
    qv_chat_template *tmpl = calloc(1, sizeof *tmpl);
    if (!tmpl)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for the template", name);
    qv_status status = qv_jprogram_parse(&tmpl->program, text, len, name);
    if (status != QV_OK) {
        qv_chat_template_free(tmpl);
        return status;
    }
    *out = tmpl;
    return QV_OK;
}

void qv_chat_template_free(qv_chat_template *tmpl)
{
    if (!tmpl)
        return;
    qv_chat_template_free(tmpl->tool_use);
    json_decref(tmpl->variables);
    qv_jprogram_deinit(&tmpl->program);
    free(tmpl);
}

/* ---- Model directories ----------------------------------------------------------------------- */

/* Read a file of at most QV_CHAT_TEMPLATE_MAX bytes. Errors: NOT_FOUND, IO, LIMIT, NOMEM. */
static qv_status read_template(const char *path, char **text, size_t *len)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return qv_fail(errno == ENOENT ? QV_ERR_NOT_FOUND : QV_ERR_IO, "%s: %s", path,
                       strerror(errno));
    *text = malloc(QV_CHAT_TEMPLATE_MAX + 1);
    *len = *text ? fread(*text, 1, QV_CHAT_TEMPLATE_MAX + 1, file) : 0;
    bool failed = ferror(file) != 0;
    fclose(file);
    if (!*text)
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for the template", path);
    if (failed) {
        free(*text);
        return qv_fail(QV_ERR_IO, "%s: cannot be read", path);
    }
    return QV_OK;
}

static qv_status compile_file(const char *path, qv_chat_template **out)
{
    char *text = NULL;
    size_t len = 0;
    QV_TRY(read_template(path, &text, &len));
    qv_status status = qv_chat_template_compile(text, len, path, out);
    free(text);
    return status;
}

static qv_status compile_string(const json_t *text, const char *name, qv_chat_template **out)
{
    return qv_chat_template_compile(json_string_value(text), json_string_length(text), name, out);
}

/* The template of a list of {"name": ..., "template": ...}, or NULL. */
static const json_t *find_named(const json_t *list, const char *name)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *entry = json_array_get(list, i);
        const char *entry_name = json_string_value(json_object_get(entry, "name"));
        const json_t *text = json_object_get(entry, "template");
        if (entry_name && strcmp(entry_name, name) == 0 && json_is_string(text))
            return text;
    }
    return NULL;
}

/* `chat_template` of tokenizer_config.json: a string, or a list of named ones. */
static qv_status compile_config(const json_t *config, const char *path, qv_chat_template **out)
{
    const json_t *value = json_object_get(config, "chat_template");
    if (json_is_string(value))
        return compile_string(value, path, out);
    if (value && !json_is_array(value) && !json_is_null(value))
        return qv_fail(QV_ERR_FORMAT, "%s: chat_template is neither a string nor a list", path);
    const json_t *text = find_named(value, "default"), *tool_use = find_named(value, "tool_use");
    if (!text && json_array_size(value) > 0)
        return qv_fail(QV_ERR_FORMAT, "%s: chat_template has no template named default", path);
    if (!text)
        return qv_fail(QV_ERR_NOT_FOUND, "%s: there is no chat_template", path);
    QV_TRY(compile_string(text, path, out));
    qv_status status = tool_use ? compile_string(tool_use, path, &(*out)->tool_use) : QV_OK;
    if (status != QV_OK)
        qv_chat_template_free(*out);
    return status;
}

/* The special tokens that tokenizer_config.json names, as strings. */
static json_t *special_tokens(const json_t *config)
{
    static const char *const names[] = {"bos_token", "eos_token", "pad_token", "unk_token",
                                        "sep_token", "cls_token", "mask_token"};
    json_t *tokens = json_object();
    for (size_t i = 0; tokens && i < sizeof names / sizeof names[0]; i++) {
        json_t *token = json_object_get(config, names[i]);
        if (json_is_object(token))
            token = json_object_get(token, "content");
        if (json_is_string(token))
            json_object_set(tokens, names[i], token);
    }
    return tokens;
}

static qv_status join_path(char *out, size_t size, const char *dir, const char *file)
{
    if (snprintf(out, size, "%s/%s", dir, file) >= (int)size)
        return qv_fail(QV_ERR_LIMIT, "%s: path too long", dir);
    return QV_OK;
}

qv_status qv_chat_template_open(const char *model_dir, qv_chat_template **out)
{
    char path[PATH_MAX];
    json_t *config = NULL;
    QV_TRY(join_path(path, sizeof path, model_dir, "tokenizer_config.json"));
    qv_status status = qv_json_load_file(path, CONFIG_JSON_MAX, &config);
    if (status != QV_OK && status != QV_ERR_NOT_FOUND)
        return status;
    char file[PATH_MAX];
    status = join_path(file, sizeof file, model_dir, "chat_template.jinja");
    if (status == QV_OK)
        status = compile_file(file, out);
    if (status == QV_ERR_NOT_FOUND && config)
        status = compile_config(config, path, out);
    else if (status == QV_ERR_NOT_FOUND)
        status = qv_fail(QV_ERR_NOT_FOUND, "%s: there is no chat template", model_dir);
    if (status == QV_OK)
        (*out)->variables = special_tokens(config);
    json_decref(config);
    return status;
}

/* ---- Rendering ------------------------------------------------------------------------------- */

static void set_default_u64(uint64_t *field, uint64_t value)
{
    *field = *field ? *field : value;
}

static qv_chat_limits with_defaults(const qv_chat_limits *limits)
{
    qv_chat_limits l = limits ? *limits : (qv_chat_limits){0};
    set_default_u64(&l.max_steps, 20000000);
    l.max_depth = l.max_depth ? l.max_depth : 600;
    l.max_output_bytes = l.max_output_bytes ? l.max_output_bytes : (size_t)16 << 20;
    l.max_memory_bytes = l.max_memory_bytes ? l.max_memory_bytes : (size_t)256 << 20;
    return l;
}

/* Give the template a variable, if it mentions it at all. */
static qv_status set_variable(qv_jrun *run, const char *name, size_t len, const json_t *json)
{
    uint32_t index = qv_jprogram_find_name(run->program, (qv_jstr){name, len});
    qv_jvalue value = qv_j_none();
    if (index == UINT32_MAX)
        return QV_OK;
    if (json)
        QV_TRY(qv_j_from_json(run, json, &value));
    return qv_j_set(run, run->globals, index, value);
}

static qv_status set_variables(qv_jrun *run, const json_t *object)
{
    const char *name;
    size_t len;
    json_t *value;
    /* The iteration does not change the object, though its signature says it might. */
    json_object_keylen_foreach((json_t *)object, name, len, value)
        QV_TRY(set_variable(run, name, len, value));
    return QV_OK;
}

static qv_status check_arguments(const json_t *messages, const json_t *tools, const json_t *kwargs)
{
    static const char *const fixed[] = {"messages", "tools", "add_generation_prompt"};
    size_t i;
    json_t *message;
    if (!json_is_array(messages))
        return qv_fail(QV_ERR_ARG, "messages is not an array");
    json_array_foreach(messages, i, message)
    {
        if (!json_is_object(message))
            return qv_fail(QV_ERR_ARG, "messages[%zu] is not an object", i);
    }
    if (tools && !json_is_array(tools) && !json_is_null(tools))
        return qv_fail(QV_ERR_ARG, "tools is not an array");
    if (kwargs && !json_is_object(kwargs) && !json_is_null(kwargs))
        return qv_fail(QV_ERR_ARG, "chat_template_kwargs is not an object");
    for (i = 0; i < sizeof fixed / sizeof fixed[0]; i++) {
        if (json_object_get(kwargs, fixed[i]))
            return qv_fail(QV_ERR_ARG, "chat_template_kwargs may not hold '%s'", fixed[i]);
    }
    return QV_OK;
}

/* Like Hugging Face transformers, `tools` and `documents` are there, as none, when not given. */
static qv_status set_globals(qv_jrun *run, const qv_chat_template *tmpl, const json_t *messages,
                             const json_t *tools, const json_t *kwargs, bool add_generation_prompt)
{
    void *scope;
    QV_TRY(qv_j_alloc(run, 1, sizeof(qv_jscope), &scope));
    run->globals = scope;
    *run->globals = (qv_jscope){0};
    QV_TRY(set_variable(run, "documents", strlen("documents"), NULL));
    QV_TRY(set_variables(run, tmpl->variables));
    QV_TRY(set_variables(run, kwargs));
    QV_TRY(set_variable(run, "messages", strlen("messages"), messages));
    QV_TRY(set_variable(run, "tools", strlen("tools"), tools));
    return set_variable(run, "add_generation_prompt", strlen("add_generation_prompt"),
                        add_generation_prompt ? json_true() : json_false());
}

qv_status qv_chat_template_render(const qv_chat_template *tmpl, const json_t *messages,
                                  const json_t *tools, const json_t *kwargs,
                                  bool add_generation_prompt, const qv_chat_limits *limits,
                                  char **text, size_t *len)
{
    QV_TRY(check_arguments(messages, tools, kwargs));
    bool use_tools = tmpl->tool_use && json_array_size(tools) > 0;
    qv_jrun run = {.program = use_tools ? &tmpl->tool_use->program : &tmpl->program,
                   .limits = with_defaults(limits),
                   .line = 1};
    /* A seed that nobody can foresee, or at least not easily. */
    if (getrandom(&run.hash_seed, sizeof run.hash_seed, GRND_NONBLOCK) < 0)
        run.hash_seed = (uintptr_t)&run;
    qv_arena_init(&run.arena, 0, run.limits.max_memory_bytes);
    qv_status status = set_globals(&run, tmpl, messages, tools, kwargs, add_generation_prompt);
    if (status == QV_OK)
        status = qv_j_run(&run);
    qv_arena_deinit(&run.arena);
    if (status != QV_OK) {
        free(run.out);
        return status;
    }
    run.out[run.out_len] = '\0';
    *text = run.out;
    *len = run.out_len;
    return QV_OK;
}
