/* Chat templates: messages to prompt text, by the model's own Jinja template.
 *
 * An interpreter of the Jinja that released chat templates use, set up as Hugging Face transformers
 * sets up jinja2: trim_blocks and lstrip_blocks on, no HTML escaping, lists and dicts that cannot
 * be changed, `tojson` that keeps Unicode. It has
 *
 * - tags: if, for (with `if` and `else`), set (also as a block), macro, call, filter, with, raw,
 *   print, break, continue, generation (its body passes through);
 * - operators: all of jinja2's, slices, inline if, keyword arguments;
 * - functions: range, dict, namespace, raise_exception, strftime_now, macros and their caller;
 * - filters, tests and methods: the tables at the end of jinja_filter.c, jinja_test.c and
 *   jinja_method.c.
 *
 * It has no inheritance or inclusion, recursive loops, argument lists (`*a`, `**b`), string
 * formatting or integers beyond 64 bits. What a template uses beyond this is refused when it is
 * compiled, by name and line; what shows only when it runs is an error of the render.
 *
 * A template is immutable after compile: any thread may render, all at once. A render works in
 * memory of its own, and it is bounded: a template is data that came with a model, and messages
 * come from anyone.
 */
#ifndef QV_MODELS_CHAT_TEMPLATE_H
#define QV_MODELS_CHAT_TEMPLATE_H

#include "common/status.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct qv_chat_template qv_chat_template;

/* Bounds of one render. A zero field means its default. */
typedef struct {
    uint64_t max_steps;      /* nodes run, plus one per 64 bytes worked on; default 20 million */
    uint32_t max_depth;      /* nesting of nodes, calls and values; default 600 */
    size_t max_output_bytes; /* default 16 MiB */
    size_t max_memory_bytes; /* everything a render holds; default 256 MiB */
    int64_t now_s;           /* the time strftime_now shows, Unix seconds; default the clock */
} qv_chat_limits;

/* Longest template, in bytes. */
#define QV_CHAT_TEMPLATE_MAX ((size_t)1 << 20)

/* Compile `len` bytes of template; `name` goes into errors. The whole text is checked here.
 * Errors: FORMAT (not Jinja, or not UTF-8; names the line), UNSUPPORTED (a tag, filter, test,
 * function or method that this interpreter does not have; names it and the line), LIMIT, NOMEM. */
qv_status qv_chat_template_compile(const char *text, size_t len, const char *name,
                                   qv_chat_template **out);

/* Compile the template of a model directory: `chat_template.jinja`, else `chat_template` in
 * tokenizer_config.json (a string, or a list of named templates, of which "default" and, when a
 * request has tools, "tool_use"). The special tokens that tokenizer_config.json names (`bos_token`,
 * `eos_token`, `pad_token`, ...) become variables of the template.
 * Errors: NOT_FOUND when the directory has no template, else those of compile, IO. */
qv_status qv_chat_template_open(const char *model_dir, qv_chat_template **out);

void qv_chat_template_free(qv_chat_template *tmpl);

/* Render `messages` (an array of objects) to *text, zero-terminated, *len bytes, free()d by the
 * caller. `tools` is an array or NULL (the template then sees none). `kwargs` is an object or NULL:
 * further variables such as enable_thinking, which take precedence over special tokens; they may
 * not replace messages, tools or add_generation_prompt. `limits` may be NULL. The json values are
 * only read. Errors: ARG (the template refuses the input by raise_exception, whose words are then
 * the whole error; or it fails on the input, in jinja2's words followed by the line; or an argument
 * of the wrong type), LIMIT, NOMEM. */
qv_status qv_chat_template_render(const qv_chat_template *tmpl, const json_t *messages,
                                  const json_t *tools, const json_t *kwargs,
                                  bool add_generation_prompt, const qv_chat_limits *limits,
                                  char **text, size_t *len);

#endif
