/* The quick path is one call of `send`. What spills is encoded, so that it outlives the event that
 * made it, and decoded again when it is sent or joined: slow clients pay for being slow. */
#include "broker/callers.h"

#include <stdlib.h>
#include <string.h>

#define MS             UINT64_C(1000)
#define JOIN_MAX_BYTES 4096 /* of a waiting `tokens` message; then another one is begun */
#define JOIN_LOOK_BACK 256  /* waiting messages that are looked at for one to join */

const qv_protocol_limits qv_callers_own_limits = {
    .max_bytes = UINT32_MAX, .max_depth = 32, .max_nodes = UINT32_MAX};

typedef struct {
    qv_list link;
    uint64_t job;
    int64_t index; /* of the stream; -1 for what is not `tokens` */
    size_t size;
    char data[]; /* [size] encoded */
} spilled;

static int64_t cost(size_t size)
{
    return (int64_t)(sizeof(spilled) + size);
}

/* --- Table ------------------------------------------------------------------------------------*/

static void init_caller(qv_callers *callers, qv_caller *caller)
{
    caller->callers = callers;
    qv_list_init(&caller->jobs);
    qv_list_init(&caller->spill);
    qv_list_append(&callers->all, &caller->link);
}

qv_status qv_callers_init(qv_callers *callers, int64_t max_spill_bytes,
                          int64_t max_total_spill_bytes, qv_caller_send_fn *send, void *user)
{
    *callers = (qv_callers){.max_spill_bytes = max_spill_bytes,
                            .max_total_spill_bytes = max_total_spill_bytes,
                            .max_spill_messages = INT64_MAX,
                            .next_serial = 1,
                            .send = send,
                            .user = user};
    qv_list_init(&callers->all);
    qv_list_init(&callers->spilling);
    qv_list_init(&callers->gone);
    qv_list_init(&callers->flow);
    qv_arena_init(&callers->scratch, 0, 0);
    callers->by_peer = qv_map_new(0);
    callers->nobody = calloc(1, sizeof *callers->nobody);
    if (callers->by_peer == NULL || callers->nobody == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for clients");
    init_caller(callers, callers->nobody);
    return QV_OK;
}

void qv_callers_deinit(qv_callers *callers)
{
    if (callers->all.next == NULL)
        return;
    QV_LIST_EACH(&callers->all, qv_caller, link, caller)
    qv_caller_free(caller);
    qv_map_free(callers->by_peer, NULL);
    qv_arena_deinit(&callers->scratch);
    *callers = (qv_callers){0};
}

/* The key is the id with the delimiter flag behind it. */
static size_t make_key(const qv_mq_peer *peer, unsigned char key[QV_MQ_ID_MAX + 1])
{
    memcpy(key, peer->id, peer->size);
    key[peer->size] = peer->delimiter;
    return (size_t)peer->size + 1;
}

qv_caller *qv_callers_find(const qv_callers *callers, const qv_mq_peer *peer)
{
    unsigned char key[QV_MQ_ID_MAX + 1];
    return qv_map_get(callers->by_peer, key, make_key(peer, key));
}

qv_caller *qv_callers_require(qv_callers *callers, const qv_mq_peer *peer)
{
    unsigned char key[QV_MQ_ID_MAX + 1];
    qv_map_entry *entry = qv_map_require(callers->by_peer, key, make_key(peer, key));
    if (entry == NULL || entry->value != NULL)
        return entry != NULL ? entry->value : NULL;
    qv_caller *caller = calloc(1, sizeof *caller);
    if (caller == NULL) {
        qv_map_remove_entry(callers->by_peer, entry);
        return NULL;
    }
    init_caller(callers, caller);
    caller->peer = *peer;
    caller->serial = callers->next_serial++;
    entry->value = caller;
    return caller;
}

void qv_caller_release(qv_caller *caller)
{
    bool is_used = caller->n_jobs + caller->n_dead > 0 || !qv_list_is_empty(&caller->spill);
    if (!is_used && !caller->gone && !qv_list_has(&caller->flow_link) && caller->serial != 0)
        qv_caller_free(caller);
}

/* --- Spill ------------------------------------------------------------------------------------*/

static void drop(qv_caller *caller, spilled *message)
{
    qv_list_remove(&message->link);
    caller->spill_bytes -= cost(message->size);
    caller->n_spilled--;
    caller->callers->spill_bytes -= cost(message->size);
    free(message);
    if (qv_list_is_empty(&caller->spill))
        qv_list_remove(&caller->spill_link);
}

void qv_caller_drop_spill(qv_caller *caller, uint64_t job)
{
    if (caller->spill_bytes == 0)
        return;
    QV_LIST_EACH(&caller->spill, spilled, link, message)
    if (message->job == job)
        drop(caller, message);
}

void qv_caller_free(qv_caller *caller)
{
    QV_ASSERT(caller->n_jobs + caller->n_dead == 0);
    qv_callers *callers = caller->callers;
    QV_LIST_EACH(&caller->spill, spilled, link, message)
    drop(caller, message);
    unsigned char key[QV_MQ_ID_MAX + 1];
    qv_map_remove(callers->by_peer, key, make_key(&caller->peer, key));
    qv_list_remove(&caller->link);
    qv_list_remove(&caller->gone_link);
    qv_list_remove(&caller->flow_link);
    free(caller);
}

void qv_caller_lose(qv_caller *caller)
{
    if (caller->gone)
        return;
    caller->gone = true;
    qv_list_append(&caller->callers->gone, &caller->gone_link);
    QV_LIST_EACH(&caller->spill, spilled, link, message)
    drop(caller, message);
}

static qv_status decode(qv_callers *callers, const spilled *message, qv_message *out)
{
    return qv_message_decode(message->data, message->size, QV_TO_CLIENT, &qv_callers_own_limits,
                             &callers->scratch, out);
}

static void note_flow(qv_caller *caller)
{
    if (!qv_list_has(&caller->flow_link))
        qv_list_append(&caller->callers->flow, &caller->flow_link);
}

static void choke(qv_caller *caller)
{
    const qv_callers *callers = caller->callers;
    bool is_full = caller->spill_bytes > callers->max_spill_bytes / 2 ||
                   caller->n_spilled > callers->max_spill_messages / 2;
    if (!is_full || caller->choked)
        return;
    caller->choked = true;
    note_flow(caller);
}

static void unchoke(qv_caller *caller)
{
    const qv_callers *callers = caller->callers;
    if (!caller->choked || caller->spill_bytes > callers->max_spill_bytes / 8 ||
        caller->n_spilled > callers->max_spill_messages / 8)
        return;
    caller->choked = false;
    note_flow(caller);
}

/* Encode behind what waits. */
static qv_status append(qv_caller *caller, uint64_t job, const qv_message *message, bool must,
                        uint64_t now_us)
{
    qv_callers *callers = caller->callers;
    const void *data;
    size_t size;
    QV_TRY(qv_message_encode(message, &callers->scratch, &data, &size));
    bool is_over = caller->spill_bytes + cost(size) > callers->max_spill_bytes ||
                   caller->n_spilled >= callers->max_spill_messages ||
                   callers->spill_bytes + cost(size) > callers->max_total_spill_bytes;
    if (is_over && !must)
        return qv_fail(QV_ERR_BUSY,
                       "the client does not read: %lld messages of %lld bytes wait for it",
                       (long long)caller->n_spilled, (long long)caller->spill_bytes);
    spilled *entry = malloc(sizeof *entry + size);
    if (entry == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a message of %zu bytes", size);
    *entry = (spilled){.job = job, .size = size};
    entry->index = message->type == QV_MSG_TOKENS ? message->tokens.index : -1;
    memcpy(entry->data, data, size);
    if (qv_list_is_empty(&caller->spill)) {
        qv_list_append(&callers->spilling, &caller->spill_link);
        caller->stalled_us = now_us;
    }
    qv_list_append(&caller->spill, &entry->link);
    caller->n_spilled++;
    caller->spill_bytes += cost(size);
    callers->spill_bytes += cost(size);
    choke(caller);
    return QV_OK;
}

/* --- Joining ----------------------------------------------------------------------------------*/

/* One array behind another, in the arena. */
static void *concat(qv_arena *arena, const void *a, size_t n_a, const void *b, size_t n_b,
                    size_t size)
{
    char *out = qv_arena_alloc(arena, (n_a + n_b) * size, _Alignof(max_align_t));
    if (out == NULL)
        return NULL;
    if (n_a > 0)
        memcpy(out, a, n_a * size);
    if (n_b > 0)
        memcpy(out + n_a * size, b, n_b * size);
    return out;
}

static bool concat_tops(qv_arena *arena, qv_tops *a, const qv_tops *b)
{
    uint32_t pairs_a = a->start[a->count] - a->start[0];
    uint32_t pairs_b = b->start[b->count] - b->start[0];
    qv_tops out = {.count = a->count + b->count};
    out.start = qv_arena_alloc(arena, (out.count + 1) * sizeof *out.start, _Alignof(uint32_t));
    out.token = concat(arena, a->token + a->start[0], pairs_a, b->token + b->start[0], pairs_b,
                       sizeof *out.token);
    out.logprob = concat(arena, a->logprob + a->start[0], pairs_a, b->logprob + b->start[0],
                         pairs_b, sizeof *out.logprob);
    if (out.start == NULL || out.token == NULL || out.logprob == NULL)
        return false;
    for (uint32_t i = 0; i <= a->count; i++)
        out.start[i] = a->start[i] - a->start[0];
    for (uint32_t i = 0; i <= b->count; i++)
        out.start[a->count + i] = pairs_a + b->start[i] - b->start[0];
    *a = out;
    return true;
}

/* a and then b as one message; false when they do not fit together or memory is out. */
static bool join(qv_arena *arena, qv_msg_tokens *a, const qv_msg_tokens *b)
{
    if (qv_has(a, tokens, logprobs) != qv_has(b, tokens, logprobs) ||
        qv_has(a, tokens, top_logprobs) != qv_has(b, tokens, top_logprobs))
        return false;
    a->text.data = concat(arena, a->text.data, a->text.size, b->text.data, b->text.size, 1);
    a->text.size += b->text.size;
    a->tokens.data = concat(arena, a->tokens.data, a->tokens.count, b->tokens.data, b->tokens.count,
                            sizeof *a->tokens.data);
    a->tokens.count += b->tokens.count;
    if (a->text.data == NULL || a->tokens.data == NULL)
        return false;
    if (qv_has(a, tokens, logprobs)) {
        a->logprobs.data = concat(arena, a->logprobs.data, a->logprobs.count, b->logprobs.data,
                                  b->logprobs.count, sizeof *a->logprobs.data);
        a->logprobs.count += b->logprobs.count;
        if (a->logprobs.data == NULL)
            return false;
    }
    return !qv_has(a, tokens, top_logprobs) ||
           concat_tops(arena, &a->top_logprobs, &b->top_logprobs);
}

/* The waiting `tokens` message that one more of the stream may be joined to, or NULL. */
static spilled *find_join(qv_caller *caller, uint64_t job, int64_t index)
{
    qv_list *node = caller->spill.prev;
    for (int i = 0; i < JOIN_LOOK_BACK && node != &caller->spill; i++, node = node->prev) {
        spilled *message = QV_LIST_ITEM(node, spilled, link);
        if (message->job == job && message->index == index)
            return message->size < JOIN_MAX_BYTES ? message : NULL;
    }
    return NULL;
}

/* Join a `tokens` message to one that waits. */
static bool join_spilled(qv_caller *caller, uint64_t job, const qv_msg_tokens *tokens)
{
    qv_callers *callers = caller->callers;
    spilled *old = find_join(caller, job, tokens->index);
    qv_message message;
    const void *data;
    size_t size;
    if (old == NULL || decode(callers, old, &message) != QV_OK ||
        !join(&callers->scratch, &message.tokens, tokens) ||
        qv_message_encode(&message, &callers->scratch, &data, &size) != QV_OK)
        return false;
    int64_t more = (int64_t)size - (int64_t)old->size;
    if (caller->spill_bytes + more > callers->max_spill_bytes ||
        callers->spill_bytes + more > callers->max_total_spill_bytes)
        return false;
    spilled *joined = malloc(sizeof *joined + size);
    if (joined == NULL)
        return false;
    *joined = (spilled){.job = job, .index = tokens->index, .size = size};
    memcpy(joined->data, data, size);

    /* It takes the place of the old one. */
    joined->link = old->link;
    joined->link.prev->next = &joined->link;
    joined->link.next->prev = &joined->link;
    free(old);
    caller->spill_bytes += more;
    callers->spill_bytes += more;
    choke(caller);
    return true;
}

/* --- Sending ----------------------------------------------------------------------------------*/

qv_status qv_caller_send(qv_caller *caller, uint64_t job, const qv_message *message, bool must,
                         uint64_t now_us, bool *joined)
{
    qv_callers *callers = caller->callers;
    if (joined != NULL)
        *joined = false;
    if (caller->serial == 0)
        return QV_OK;
    if (caller->gone)
        return QV_ERR_NOT_FOUND;
    if (qv_list_is_empty(&caller->spill)) {
        qv_status status = callers->send(callers->user, &caller->peer, message);
        if (status == QV_OK)
            return QV_OK;
        if (status != QV_ERR_BUSY) {
            qv_caller_lose(caller);
            return QV_ERR_NOT_FOUND;
        }
    }
    qv_arena_reset(&callers->scratch);
    if (joined != NULL && message->type == QV_MSG_TOKENS &&
        join_spilled(caller, job, &message->tokens)) {
        *joined = true;
        return QV_OK;
    }
    return append(caller, job, message, must, now_us);
}

qv_status qv_caller_keep(qv_caller *caller, uint64_t job, const qv_message *message, bool must,
                         uint64_t now_us)
{
    qv_arena_reset(&caller->callers->scratch);
    return append(caller, job, message, must, now_us);
}

/* True when something was sent. */
static bool flush(qv_caller *caller)
{
    qv_callers *callers = caller->callers;
    bool progress = false;
    QV_LIST_EACH(&caller->spill, spilled, link, waiting)
    {
        qv_message message;
        qv_arena_reset(&callers->scratch);
        qv_status status = decode(callers, waiting, &message);
        QV_ASSERT(status == QV_OK);
        status = callers->send(callers->user, &caller->peer, &message);
        if (status == QV_ERR_BUSY)
            return progress;
        if (status != QV_OK) {
            qv_caller_lose(caller);
            return progress;
        }
        drop(caller, waiting);
        progress = true;
    }
    return progress;
}

void qv_callers_flush(qv_callers *callers, int64_t stalled_ms, uint64_t now_us)
{
    QV_LIST_EACH(&callers->spilling, qv_caller, spill_link, caller)
    {
        if (flush(caller)) {
            caller->stalled_us = now_us;
            caller->stalled = false;
        }
        if (caller->gone)
            continue;
        unchoke(caller);
        if (qv_list_is_empty(&caller->spill)) {
            qv_caller_release(caller);
        } else if (now_us - caller->stalled_us >= (uint64_t)stalled_ms * MS) {
            caller->stalled_us = now_us;
            if (caller->stalled || caller->n_jobs == 0)
                qv_caller_lose(caller);
            else
                note_flow(caller);
            caller->stalled = true;
        }
    }
}
