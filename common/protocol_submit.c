/* What a submit must be beyond what the table says of each field. */
#include "common/msgpack_io.h"
#include "common/protocol.h"

#include <string.h>

/* --- names ----------------------------------------------------------------------------------- */

static bool is_name_byte(char c, bool first)
{
    bool alphanumeric = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
    return alphanumeric || (!first && c != 0 && strchr("._-+@:", c) != NULL);
}

qv_status qv_adapter_name_check(qv_str name)
{
    if (name.size == 0 || name.size > 128)
        return qv_fail(QV_ERR_ARG, "adapter: a name has 1 to 128 bytes, this one has %u",
                       name.size);
    for (uint32_t i = 0; i < name.size; i++) {
        char text[QV_ITEM_TEXT_MAX];
        qv_item item = {.kind = QV_ITEM_STR, .size = name.size, .data = name.data};
        if (!is_name_byte(name.data[i], i == 0))
            return qv_fail(QV_ERR_ARG,
                           "adapter: %s that names no adapter: names have ASCII letters, digits "
                           "and ._-+@: and begin with a letter or a digit",
                           qv_item_describe(&item, text));
    }
    return QV_OK;
}

/* --- chat messages --------------------------------------------------------------------------- */

/* Read the header of an ANY field and check its kind. */
static qv_status open_any(qv_str raw, const char *name, qv_item_kind kind, const char *expected,
                          qv_reader *reader, qv_item *item)
{
    char text[QV_ITEM_TEXT_MAX];
    *reader = qv_reader_init(raw.data, raw.size);
    QV_TRY(qv_reader_next(reader, item));
    if (item->kind != kind)
        return qv_fail(QV_ERR_ARG, "%s: %s, %s was expected", name, qv_item_describe(item, text),
                       expected);
    return QV_OK;
}

/* One chat message is a map with a role. What else it holds is up to the model's template. */
static qv_status check_chat_message(qv_reader *reader, uint32_t index)
{
    char text[QV_ITEM_TEXT_MAX];
    qv_item map, key, role;
    bool has_role = false;
    QV_TRY(qv_reader_next(reader, &map));
    if (map.kind != QV_ITEM_MAP)
        return qv_fail(QV_ERR_ARG, "messages[%u]: %s, a map was expected", index,
                       qv_item_describe(&map, text));
    for (uint32_t i = 0; i < map.size; i++) {
        QV_TRY(qv_reader_next(reader, &key));
        qv_reader value = *reader;
        if (qv_str_equal((qv_str){key.data, key.size}, "role")) {
            QV_TRY(qv_reader_next(&value, &role));
            if (role.kind != QV_ITEM_STR)
                return qv_fail(QV_ERR_ARG, "messages[%u].role: %s, a string was expected", index,
                               qv_item_describe(&role, text));
            has_role = true;
        }
        QV_TRY(qv_reader_skip(reader));
    }
    if (!has_role)
        return qv_fail(QV_ERR_ARG, "messages[%u]: there is no 'role'", index);
    return QV_OK;
}

static qv_status check_chat(const qv_msg_submit *submit)
{
    qv_reader reader;
    qv_item item;
    QV_TRY(
        open_any(submit->messages, "messages", QV_ITEM_ARRAY, "an array of maps", &reader, &item));
    if (item.size == 0)
        return qv_fail(QV_ERR_ARG, "messages: empty");
    for (uint32_t i = 0; i < item.size; i++)
        QV_TRY(check_chat_message(&reader, i));
    if (qv_has(submit, submit, tools))
        QV_TRY(open_any(submit->tools, "tools", QV_ITEM_ARRAY, "an array of maps", &reader, &item));
    if (qv_has(submit, submit, chat_template_kwargs))
        QV_TRY(open_any(submit->chat_template_kwargs, "chat_template_kwargs", QV_ITEM_MAP, "a map",
                        &reader, &item));
    return QV_OK;
}

/* --- the request as a whole ------------------------------------------------------------------ */

static qv_status check_input(const qv_msg_submit *submit)
{
    bool prompt = qv_has(submit, submit, prompt), tokens = qv_has(submit, submit, tokens);
    bool chat = qv_has(submit, submit, messages);
    int given = prompt + tokens + chat;
    if (given != 1)
        return qv_fail(QV_ERR_ARG,
                       "exactly one of prompt, tokens and messages is needed, there %s%s%s%s",
                       given == 0 ? "is none" : "are", prompt ? " prompt" : "",
                       tokens ? " tokens" : "", chat ? " messages" : "");
    if (chat)
        return check_chat(submit);
    if (qv_has(submit, submit, tools) || qv_has(submit, submit, chat_template_kwargs))
        return qv_fail(QV_ERR_ARG, "%s: only goes with messages",
                       qv_has(submit, submit, tools) ? "tools" : "chat_template_kwargs");
    if (prompt && submit->prompt.size == 0)
        return qv_fail(QV_ERR_ARG, "prompt: empty");
    if (tokens && submit->tokens.count == 0)
        return qv_fail(QV_ERR_ARG, "tokens: empty");
    return QV_OK;
}

static qv_status check_token_ids(const char *name, qv_ints ids)
{
    for (uint32_t i = 0; i < ids.count; i++)
        if (ids.data[i] < 0)
            return qv_fail(QV_ERR_ARG, "%s[%u]: %d is below 0", name, i, ids.data[i]);
    return QV_OK;
}

static qv_status check_n(const qv_msg_submit *submit)
{
    long long n = (long long)submit->n;
    if (n > 1 && submit->max_tokens == 0)
        return qv_fail(QV_ERR_ARG, "n: %lld answers, but max_tokens 0 only scores the prompt", n);
    if (n > 1 && submit->temperature == 0)
        return qv_fail(QV_ERR_ARG, "n: %lld answers at temperature 0 would all be the same", n);
    return QV_OK;
}

/* A request that goes on names each of its streams once. */
static qv_status check_resume(const qv_msg_submit *submit)
{
    uint64_t seen = 0;
    if (submit->resume.count == 0)
        return QV_OK;
    if (submit->resume.count != (uint64_t)submit->n)
        return qv_fail(QV_ERR_ARG, "resume: %u streams of %lld", submit->resume.count,
                       (long long)submit->n);
    if (!qv_has(submit, submit, seed))
        return qv_fail(QV_ERR_ARG, "resume: an answer can only go on with its seed");
    if (submit->durable)
        return qv_fail(QV_ERR_ARG, "resume: a durable request goes on by itself");
    for (uint32_t i = 0; i < submit->resume.count; i++) {
        const qv_msg_resume *row = &submit->resume.data[i];
        if (row->index >= submit->n || (seen >> row->index & 1) != 0)
            return qv_fail(QV_ERR_ARG, "resume[%u].index: %lld is no stream, or named twice", i,
                           (long long)row->index);
        seen |= UINT64_C(1) << row->index;
        if (row->seq > INT32_MAX || (submit->max_tokens > 0 && !row->finished &&
                                     row->tokens.count >= (uint64_t)submit->max_tokens))
            return qv_fail(QV_ERR_ARG, "resume[%u]: %u tokens of at most %lld, seq %lld", i,
                           row->tokens.count, (long long)submit->max_tokens, (long long)row->seq);
        QV_TRY(check_token_ids("resume.tokens", row->tokens));
    }
    return QV_OK;
}

qv_status qv_submit_check(const qv_msg_submit *submit)
{
    if (submit->adapter.size > 0)
        QV_TRY(qv_adapter_name_check(submit->adapter));
    QV_TRY(check_input(submit));
    QV_TRY(check_token_ids("tokens", submit->tokens));
    QV_TRY(check_token_ids("stop_token_ids", submit->stop_token_ids));
    for (uint32_t i = 0; i < submit->stop.count; i++)
        if (submit->stop.data[i].size == 0)
            return qv_fail(QV_ERR_ARG, "stop[%u]: empty", i);
    QV_TRY(check_n(submit));
    return check_resume(submit);
}
