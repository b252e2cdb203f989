/* Any bytes, as a chat template that is rendered with a conversation of every kind of value. Bounds
 * are small, so that an input ends soon whatever it asks for. What renders is text. */
#include "common/status.h"
#include "models/chat_template.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char conversation[] =
    "[{\"role\": \"system\", \"content\": \"Be b\\u00e9 \\ud83d\\ude00.\"},"
    " {\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"a <b> 'c' "
    "\\\"d\\\"\\n\"}]},"
    " {\"role\": \"assistant\", \"content\": \"<think>x</think>y\", \"tool_calls\": [{\"function\":"
    "  {\"name\": \"f\", \"arguments\": {\"i\": 1, \"f\": -2.5e10, \"n\": null, \"l\": [true, "
    "{}]}}}]},"
    " {\"role\": \"tool\", \"content\": \"\"}]";

static const char variables[] = "{\"x\": 5, \"s\": \"Hello World\", \"l\": [3, 1, 2], \"n\": null,"
                                " \"d\": {\"b\": 1, \"a\": \"z\"}, \"f\": 1.5, \"t\": true}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static json_t *messages, *kwargs;
    static const qv_chat_limits limits = {.max_steps = 50000,
                                          .max_output_bytes = 1 << 16,
                                          .max_memory_bytes = 4 << 20,
                                          .now_s = 1700000000};
    if (!messages) {
        messages = json_loads(conversation, 0, NULL);
        kwargs = json_loads(variables, 0, NULL);
        QV_ASSERT(messages && kwargs);
    }
    qv_chat_template *tmpl;
    if (qv_chat_template_compile((const char *)data, size, "fuzz", &tmpl) != QV_OK)
        return 0;
    for (int round = 0; round < 2; round++) {
        char *text;
        size_t len;
        const json_t *tools = round ? messages : NULL;
        if (qv_chat_template_render(tmpl, messages, tools, kwargs, round, &limits, &text, &len) !=
            QV_OK)
            continue;
        QV_ASSERT(len <= limits.max_output_bytes && text[len] == '\0');
        json_t *string = json_stringn(text, len); /* refuses what is not UTF-8 */
        QV_ASSERT(string);
        json_decref(string);
        free(text);
    }
    qv_chat_template_free(tmpl);
    return 0;
}
