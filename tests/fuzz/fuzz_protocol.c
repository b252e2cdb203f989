/* Any bytes, as a message of each side. What decodes must encode, and decode again to the same
 * bytes; what turns into JSON must come back. */
#include "common/protocol.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const qv_protocol_limits limits = {
    .max_bytes = 1 << 20, .max_depth = 32, .max_nodes = 1 << 16};

static void check_json(const qv_message *message, qv_direction direction, qv_arena *arena)
{
    json_t *object;
    qv_message back;
    if (qv_message_to_json(message, &object) != QV_OK)
        return; /* bin, integers above 2^63, keys that repeat */
    QV_ASSERT(qv_message_from_json(object, direction, arena, &back) == QV_OK);
    QV_ASSERT(back.type == message->type);
    json_decref(object);
}

static void check_message(const qv_message *message, qv_direction direction, qv_arena *arena)
{
    qv_message again;
    const void *first, *second;
    size_t first_size, second_size;
    QV_ASSERT(qv_message_encode(message, arena, &first, &first_size) == QV_OK);
    QV_ASSERT(qv_message_decode(first, first_size, direction, NULL, arena, &again) == QV_OK);
    QV_ASSERT(qv_message_encode(&again, arena, &second, &second_size) == QV_OK);
    QV_ASSERT(first_size == second_size && memcmp(first, second, first_size) == 0);
    if (message->type == QV_MSG_SUBMIT)
        qv_submit_check(&message->submit);
    check_json(message, direction, arena);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static qv_arena arena = {.limit_bytes = 64 << 20};
    for (qv_direction direction = QV_FROM_CLIENT; direction <= QV_TO_WORKER; direction++) {
        qv_message message;
        qv_arena_reset(&arena);
        if (qv_message_decode(data, size, direction, &limits, &arena, &message) == QV_OK)
            check_message(&message, direction, &arena);
    }
    return 0;
}
