#include "clients/client_flow.h"

#include "common/map.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GRACE_MS 500 /* a broker that was lost may come back, before another is asked */
#define RETRY_MS 200 /* between attempts where a broker asked for patience */
#define NO_LINK  (-1)

typedef struct {
    int64_t next_seq;
    bool ended;
    int32_t *tokens; /* [n_tokens] received; owned */
    size_t n_tokens, capacity;
} flow_stream;

typedef struct {
    char *submit; /* [submit_size] encoded; NULL: we do not know what it asks; owned */
    size_t submit_size;
    char *id, *tenant; /* owned */
    char digest[65];   /* of the adapter that answers; "" = not known, or none */
    bool durable, resumed, resuming, sent;
    bool has_seed;
    uint64_t seed;
    int link;
    uint64_t due_ms;
    uint32_t tried; /* bit per connection that does not have it */
    uint32_t n, n_ended;
    flow_stream *streams; /* [n]; owned */
} flow_entry;

struct qv_flow {
    qv_flow_actions actions;
    char *endpoints[QV_FLOW_MAX_LINKS]; /* [n]; owned */
    uint32_t n, turn;
    uint32_t up;     /* bit per connection */
    qv_map *entries; /* id -> flow_entry; owned */
    qv_arena arena;  /* of what is being sent */
};

static uint32_t bit(int link)
{
    return UINT32_C(1) << link;
}

/* --- Life -------------------------------------------------------------------------------------*/

static void free_entry(void *value)
{
    flow_entry *entry = value;
    for (uint32_t i = 0; entry->streams != NULL && i < entry->n; i++)
        free(entry->streams[i].tokens);
    free(entry->streams);
    free(entry->submit);
    free(entry->id);
    free(entry->tenant);
    free(entry);
}

qv_status qv_flow_new(const char *const *endpoints, uint32_t n, const qv_flow_actions *actions,
                      qv_flow **out)
{
    if (n > QV_FLOW_MAX_LINKS)
        return qv_fail(QV_ERR_LIMIT, "%u brokers, at most %d", n, QV_FLOW_MAX_LINKS);
    qv_flow *flow = calloc(1, sizeof *flow);
    if (flow == NULL)
        return qv_fail(QV_ERR_NOMEM, "client: out of memory");
    flow->actions = *actions;
    flow->entries = qv_map_new(0);
    bool ok = flow->entries != NULL;
    for (uint32_t i = 0; ok && i < n; i++, flow->n++)
        ok = (flow->endpoints[i] = strdup(endpoints[i])) != NULL;
    if (!ok) {
        qv_flow_free(flow);
        return qv_fail(QV_ERR_NOMEM, "client: out of memory");
    }
    *out = flow;
    return QV_OK;
}

void qv_flow_free(qv_flow *flow)
{
    if (flow == NULL)
        return;
    for (uint32_t i = 0; i < flow->n; i++)
        free(flow->endpoints[i]);
    if (flow->entries != NULL)
        qv_map_free(flow->entries, free_entry);
    qv_arena_deinit(&flow->arena);
    free(flow);
}

static flow_entry *find(const qv_flow *flow, qv_str id)
{
    return id.size > 0 ? qv_map_get(flow->entries, id.data, id.size) : NULL;
}

static void forget(qv_flow *flow, flow_entry *entry)
{
    qv_map_remove_str(flow->entries, entry->id);
    free_entry(entry);
}

static qv_status new_entry(qv_flow *flow, qv_str id, qv_str tenant, uint32_t n, flow_entry **out)
{
    if (find(flow, id) != NULL)
        return qv_fail(QV_ERR_EXISTS, "id '%.*s' is in flight already", (int)id.size, id.data);
    flow_entry *entry = calloc(1, sizeof *entry);
    if (entry == NULL)
        return qv_fail(QV_ERR_NOMEM, "client: out of memory");
    entry->id = strndup(id.data, id.size);
    entry->tenant = tenant.size > 0 ? strndup(tenant.data, tenant.size) : strdup("");
    entry->streams = calloc(n, sizeof *entry->streams);
    entry->n = n;
    entry->link = NO_LINK;
    if (entry->id == NULL || entry->tenant == NULL || entry->streams == NULL ||
        qv_map_set_str(flow->entries, entry->id, entry) != QV_OK) {
        free_entry(entry);
        return qv_fail(QV_ERR_NOMEM, "client: out of memory");
    }
    *out = entry;
    return QV_OK;
}

/* --- Placing ----------------------------------------------------------------------------------*/

int qv_flow_any_link(qv_flow *flow)
{
    for (uint32_t i = 0; i < flow->n; i++) {
        uint32_t link = (flow->turn + i) % flow->n;
        if (flow->up & bit((int)link)) {
            flow->turn = link + 1;
            return (int)link;
        }
    }
    return NO_LINK;
}

bool qv_flow_is_up(const qv_flow *flow, uint32_t link)
{
    return (flow->up & bit((int)link)) != 0;
}

static void send_to(qv_flow *flow, flow_entry *entry, int link, const qv_message *message,
                    uint64_t now_ms)
{
    entry->link = link;
    entry->sent = true;
    if (!flow->actions.send(flow->actions.user, (uint32_t)link, message))
        qv_flow_disconnected(flow, (uint32_t)link, now_ms);
}

static void send_resume(qv_flow *flow, flow_entry *entry, int link, uint64_t now_ms)
{
    int32_t seqs[64];
    for (uint32_t i = 0; i < entry->n && i < 64; i++)
        seqs[i] = (int32_t)entry->streams[i].next_seq - 1;
    qv_message message;
    qv_message_init(&message, QV_MSG_RESUME);
    message.resume_request.id = qv_str_from(entry->id);
    qv_set(&message.resume_request, resume_request, seqs, ((qv_ints){seqs, entry->n}));
    if (entry->tenant[0] != '\0')
        qv_set(&message.resume_request, resume_request, tenant, qv_str_from(entry->tenant));
    if (entry->digest[0] != '\0')
        qv_set(&message.resume_request, resume_request, digest, qv_str_from(entry->digest));
    entry->resuming = entry->resumed = true;
    send_to(flow, entry, link, &message, now_ms);
}

/* The submit, going on from what was received where that can be said. */
static void send_submit(qv_flow *flow, flow_entry *entry, int link, uint64_t now_ms)
{
    qv_message message = {0};
    qv_protocol_limits limits = {.max_bytes = UINT32_MAX, .max_depth = 64, .max_nodes = UINT32_MAX};
    qv_arena_reset(&flow->arena);
    if (qv_message_decode(entry->submit, entry->submit_size, QV_FROM_CLIENT, &limits, &flow->arena,
                          &message) != QV_OK)
        return;
    bool has_begun = false;
    for (uint32_t i = 0; i < entry->n; i++)
        has_begun = has_begun || entry->streams[i].next_seq > 0;
    qv_msg_resume *rows = has_begun && entry->has_seed && !entry->durable
                              ? QV_ARENA_ARRAY(&flow->arena, qv_msg_resume, entry->n)
                              : NULL;
    for (uint32_t i = 0; rows != NULL && i < entry->n; i++) {
        const flow_stream *stream = &entry->streams[i];
        rows[i].index = i;
        rows[i].seq = stream->next_seq - stream->ended;
        rows[i].tokens = (qv_ints){stream->tokens, (uint32_t)stream->n_tokens};
        qv_set(&rows[i], resume, finished, stream->ended);
    }
    if (rows != NULL) {
        qv_set(&message.submit, submit, seed, entry->seed);
        if (entry->digest[0] != '\0')
            qv_set(&message.submit, submit, digest, qv_str_from(entry->digest));
        message.submit.resume.data = rows;
        message.submit.resume.count = entry->n;
        qv_mark(&message.submit, submit, resume);
    }
    send_to(flow, entry, link, &message, now_ms);
}

static void place(qv_flow *flow, flow_entry *entry, uint64_t now_ms)
{
    uint32_t may = flow->up & ~entry->tried;
    if (may == 0 && entry->tried != 0 && flow->up != 0 && entry->submit != NULL) {
        entry->tried = 0; /* nobody has it: begin again, with what there is */
        send_submit(flow, entry, qv_flow_any_link(flow), now_ms);
        return;
    }
    if (may == 0) {
        entry->due_ms = now_ms + RETRY_MS;
        return;
    }
    int link = qv_flow_any_link(flow);
    while (!(may & bit(link)))
        link = qv_flow_any_link(flow);
    if (entry->sent)
        send_resume(flow, entry, link, now_ms);
    else
        send_submit(flow, entry, link, now_ms);
}

uint64_t qv_flow_poll(qv_flow *flow, uint64_t now_ms)
{
    uint64_t later = 0;
    QV_MAP_EACH(flow->entries, map_entry)
    {
        flow_entry *entry = map_entry->value;
        if (entry->link != NO_LINK)
            continue;
        if (entry->due_ms <= now_ms)
            place(flow, entry, now_ms);
        if (entry->link == NO_LINK && (later == 0 || entry->due_ms < later))
            later = entry->due_ms;
    }
    return later;
}

/* --- What the owner says ----------------------------------------------------------------------*/

qv_status qv_flow_submit(qv_flow *flow, const qv_msg_submit *submit, const void *data, size_t size,
                         uint64_t now_ms)
{
    flow_entry *entry;
    uint32_t n = qv_has(submit, submit, n) && submit->n > 0 ? (uint32_t)submit->n : 1;
    QV_TRY(new_entry(flow, submit->id, submit->tenant, n, &entry));
    entry->submit = malloc(size);
    if (entry->submit == NULL) {
        forget(flow, entry);
        return qv_fail(QV_ERR_NOMEM, "client: out of memory");
    }
    memcpy(entry->submit, data, size);
    entry->submit_size = size;
    entry->durable = submit->durable;
    entry->has_seed = qv_has(submit, submit, seed);
    entry->seed = submit->seed;
    place(flow, entry, now_ms);
    return QV_OK;
}

qv_status qv_flow_resume(qv_flow *flow, qv_str id, qv_str tenant, const int32_t *have, uint32_t n,
                         uint64_t now_ms)
{
    flow_entry *entry;
    if (n < 1 || n > 64)
        return qv_fail(QV_ERR_ARG, "resume: %u streams, a request has 1 to 64", n);
    QV_TRY(new_entry(flow, id, tenant, n, &entry));
    for (uint32_t i = 0; i < n; i++)
        entry->streams[i].next_seq = (int64_t)have[i] + 1;
    entry->sent = true;
    place(flow, entry, now_ms);
    return QV_OK;
}

bool qv_flow_cancel(qv_flow *flow, qv_str id)
{
    const flow_entry *entry = find(flow, id);
    int link = entry != NULL ? entry->link : qv_flow_any_link(flow);
    qv_message message = {.type = QV_MSG_CANCEL};
    message.cancel.id = id;
    return link != NO_LINK && flow->actions.send(flow->actions.user, (uint32_t)link, &message);
}

void qv_flow_connected(qv_flow *flow, uint32_t link, uint64_t now_ms)
{
    flow->up |= bit((int)link);
    QV_MAP_EACH(flow->entries, map_entry)
    {
        flow_entry *entry = map_entry->value;
        entry->tried &= ~bit((int)link);
        if (entry->link == (int)link) { /* it was lost and is back: what was sent may not be */
            entry->link = NO_LINK;
            entry->due_ms = now_ms;
        }
    }
    qv_flow_poll(flow, now_ms);
}

void qv_flow_disconnected(qv_flow *flow, uint32_t link, uint64_t now_ms)
{
    if (!qv_flow_is_up(flow, link))
        return;
    flow->up &= ~bit((int)link);
    QV_MAP_EACH(flow->entries, map_entry)
    {
        flow_entry *entry = map_entry->value;
        if (entry->link != (int)link)
            continue;
        entry->link = NO_LINK;
        entry->due_ms = now_ms + (flow->n > 1 ? GRACE_MS : 0);
    }
}

/* --- Messages ---------------------------------------------------------------------------------*/

/* The connection whose endpoint an error names, if it is up. */
static int find_named(const qv_flow *flow, qv_str broker)
{
    for (uint32_t i = 0; i < flow->n; i++)
        if (qv_flow_is_up(flow, i) && broker.size > 0 &&
            memmem(broker.data, broker.size, flow->endpoints[i], strlen(flow->endpoints[i])) !=
                NULL)
            return (int)i;
    return NO_LINK;
}

static void wait_until(flow_entry *entry, uint64_t at_ms)
{
    entry->link = NO_LINK;
    entry->resuming = false;
    entry->due_ms = at_ms;
}

/* Whether an error only says that the request has to be looked for elsewhere, or later. */
static bool retry(qv_flow *flow, flow_entry *entry, int link, const qv_msg_error *error,
                  uint64_t now_ms)
{
    if (qv_str_equal(error->code, "NOT_FOUND") && (entry->resuming || entry->durable)) {
        int named = find_named(flow, error->broker);
        entry->tried |= bit(link);
        if (named != NO_LINK)
            entry->tried = ~bit(named);
        else if (error->broker.size > 0)
            entry->tried = 0; /* at one that we are not connected to: it may be lost soon */
        else if (entry->submit == NULL && (flow->up & ~entry->tried) == 0)
            return false;
        wait_until(entry, named == NO_LINK && error->broker.size > 0 ? now_ms + RETRY_MS : now_ms);
        qv_flow_poll(flow, now_ms);
        return true;
    }
    bool is_patience =
        qv_str_equal(error->code, "OVERLOADED") && qv_has(error, error, retry_after_ms);
    if (is_patience && (entry->resuming || (entry->durable && entry->resumed))) {
        uint64_t ms = (uint64_t)error->retry_after_ms;
        wait_until(entry, now_ms + (ms > RETRY_MS ? ms : RETRY_MS));
        return true;
    }
    if (is_patience && qv_str_equal(error->message, "the broker is stopping") &&
        (flow->up & ~bit(link)) != 0) {
        wait_until(entry, now_ms);
        entry->tried = bit(link);
        qv_flow_poll(flow, now_ms);
        return true;
    }
    return false;
}

static bool keep_tokens(flow_stream *stream, qv_ints tokens)
{
    if (stream->n_tokens + tokens.count > stream->capacity) {
        size_t capacity = 2 * stream->capacity + tokens.count + 64;
        int32_t *grown = realloc(stream->tokens, capacity * sizeof *grown);
        if (grown == NULL)
            return false;
        stream->tokens = grown;
        stream->capacity = capacity;
    }
    if (tokens.count > 0)
        memcpy(stream->tokens + stream->n_tokens, tokens.data,
               tokens.count * sizeof *stream->tokens);
    stream->n_tokens += tokens.count;
    return true;
}

/* A piece or an end of a stream: false where it was received before. */
static bool take_piece(flow_entry *entry, int64_t index, int64_t seq, qv_ints tokens, bool ends)
{
    if (index < 0 || index >= entry->n)
        return true; /* the user finds it wrong */
    flow_stream *stream = &entry->streams[index];
    if (seq < stream->next_seq && entry->resumed)
        return false;
    stream->next_seq = seq + 1;
    if (!keep_tokens(stream, tokens))
        entry->has_seed = false; /* it cannot go on elsewhere any more */
    if (ends && !stream->ended) {
        stream->ended = true;
        entry->n_ended++;
    }
    return true;
}

bool qv_flow_take(qv_flow *flow, uint32_t link, const qv_message *message, uint64_t now_ms)
{
    flow_entry *entry = find(flow, message->id);
    if (entry == NULL)
        return true;
    bool is_resumed = message->type == QV_MSG_ACCEPTED && message->accepted.resumed;
    if (entry->link != (int)link && !is_resumed)
        return message->type == QV_MSG_EXPLAIN || message->type == QV_MSG_CANCELLED;
    bool is_shown = true;
    switch (message->type) {
    case QV_MSG_ERROR:
        if (entry->sent && retry(flow, entry, (int)link, &message->error, now_ms))
            return false;
        forget(flow, entry);
        return true;
    case QV_MSG_ACCEPTED:
        if (qv_has(&message->accepted, accepted, seed)) {
            entry->has_seed = true;
            entry->seed = message->accepted.seed;
        }
        break;
    case QV_MSG_TOKENS:
        if (message->tokens.digest.size > 0 && message->tokens.digest.size < sizeof entry->digest)
            snprintf(entry->digest, sizeof entry->digest, "%.*s", (int)message->tokens.digest.size,
                     message->tokens.digest.data);
        is_shown = take_piece(entry, message->tokens.index, message->tokens.seq,
                              message->tokens.tokens, false);
        break;
    case QV_MSG_DONE:
        is_shown = take_piece(entry, message->done.index, message->done.seq, (qv_ints){0}, true);
        break;
    default:
        return true;
    }
    entry->resuming = false;
    entry->tried = 0;
    if (entry->n_ended == entry->n)
        forget(flow, entry);
    return is_shown;
}
