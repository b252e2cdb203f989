/* Any bytes, as a line of JSON that stands for a message (job files, quiver-run). What is taken
 * encodes, and decodes to the same message. */
#include "common/json.h"
#include "common/protocol.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static qv_arena arena = {.limit_bytes = 64 << 20};
    json_t *root;
    if (qv_json_load((const char *)data, size, "fuzz", &root) != QV_OK)
        return 0;
    for (qv_direction direction = QV_FROM_CLIENT; direction <= QV_TO_WORKER; direction++) {
        qv_message message, again;
        const void *bytes;
        size_t n;
        qv_arena_reset(&arena);
        if (qv_message_from_json(root, direction, &arena, &message) != QV_OK)
            continue;
        if (message.type == QV_MSG_SUBMIT)
            (void)qv_submit_check(&message.submit);
        if (qv_message_encode(&message, &arena, &bytes, &n) != QV_OK)
            continue;
        QV_ASSERT(qv_message_decode(bytes, n, direction, NULL, &arena, &again) == QV_OK);
        QV_ASSERT(again.type == message.type);
    }
    json_decref(root);
    return 0;
}
