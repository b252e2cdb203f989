/* Any bytes, as a stored answer from Redis and as a stored request that is taken over. */
#include "broker/core.h"

#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static qv_status send_any(void *user, const qv_mq_peer *peer, const qv_message *message)
{
    (void)user, (void)peer, (void)message;
    return QV_OK;
}

static void publish(void *user, const qv_group *group)
{
    (void)user, (void)group;
}

static void retract(void *user, const char *adapter)
{
    (void)user, (void)adapter;
}

static void event(void *user, const char *what, const char *adapter, const char *worker,
                  const char *why)
{
    (void)user, (void)what, (void)adapter, (void)worker, (void)why;
}

static void observe(void *user, qv_core_duration duration, uint64_t us)
{
    (void)user, (void)duration, (void)us;
}

static qv_status count(void *user, const qv_message *message)
{
    QV_ASSERT(message->type == QV_MSG_TOKENS || message->type == QV_MSG_DONE ||
              message->type == QV_MSG_ERROR);
    ++*(size_t *)user;
    return QV_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static qv_arena arena = {.limit_bytes = 64 << 20};
    static const int32_t have[] = {0, -1};
    size_t n = 0;
    qv_arena_reset(&arena);
    (void)qv_answer_unpack(data, size, have, 2, &arena, count, &n);

    qv_core_options options = qv_core_default_options();
    options.max_explained = 0;
    const qv_core_actions actions = {.send_client = send_any,
                                     .send_worker = send_any,
                                     .publish = publish,
                                     .retract = retract,
                                     .event = event,
                                     .observe = observe};
    qv_core *core;
    QV_ASSERT(qv_core_new(&options, &actions, 1, &core) == QV_OK);
    qv_core_wants_known(core);
    qv_str bytes = {(const char *)data, (uint32_t)size};
    const qv_mq_peer peer = {.size = 1, .id = "c"};
    const qv_msg_resume_request request = {.id = qv_str_from("a"), .seq = 0};
    qv_core_looked_up(core, &peer, &request, QV_STORED_FINISHED, bytes, 2);
    const qv_durable durable = {.id = qv_str_from("a"), .submit = bytes, .seed = 1};
    (void)qv_core_adopt(core, &durable, 10, 3);
    qv_core_tick(core, 20000);
    QV_ASSERT(qv_core_check(core) == QV_OK);
    qv_core_free(core);
    return 0;
}
