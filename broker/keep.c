#include "broker/keep.h"

#include "common/msgpack_io.h"

#include <stdlib.h>
#include <string.h>

#define PACKED_LIMITS                                                                              \
    ((qv_protocol_limits){.max_bytes = UINT32_MAX, .max_depth = 32, .max_nodes = UINT32_MAX})

qv_status qv_keep_init(qv_keep *keep, int64_t max_bytes)
{
    *keep = (qv_keep){.max_bytes = max_bytes, .by_name = qv_map_new(0)};
    qv_list_init(&keep->all);
    return keep->by_name != NULL ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory for kept requests");
}

void qv_keep_deinit(qv_keep *keep)
{
    if (keep->by_name == NULL)
        return;
    QV_LIST_EACH(&keep->all, qv_kept, link, kept)
    qv_keep_drop(keep, kept);
    qv_map_free(keep->by_name, NULL);
    *keep = (qv_keep){0};
}

void qv_keep_drop(qv_keep *keep, qv_kept *kept)
{
    keep->bytes -= (int64_t)kept->bytes;
    qv_list_remove(&kept->link);
    qv_map_remove_entry(keep->by_name, kept->entry);
    free(kept);
}

qv_kept *qv_keep_find(const qv_keep *keep, qv_str tenant, qv_str id)
{
    qv_job_name name = qv_job_name_of(tenant, id);
    return qv_map_get(keep->by_name, name.bytes, name.size);
}

/* Copies one array behind another: first only counted, then into the block. A kept answer is
 * touched twice, when it is made and when it is dropped, a long time after; so it is one piece of
 * memory. */
typedef struct {
    char *block; /* NULL: count */
    size_t size;
} packing;

static void *pack(packing *p, const void *data, size_t n, size_t size)
{
    if (n == 0)
        return NULL;
    size_t at = p->size, align = _Alignof(max_align_t);
    p->size += (n * size + align - 1) & ~(align - 1);
    if (p->block == NULL)
        return NULL;
    if (data != NULL)
        memcpy(p->block + at, data, n * size);
    return p->block + at;
}

#define PACK(p, array, n) pack(p, array, n, sizeof *(array))

/* A stream's part of what is kept. */
static qv_job_stream pack_stream(packing *p, const qv_job_stream *from)
{
    const qv_answer *a = &from->answer;
    qv_job_stream to = {.base_seq = from->base_seq,
                        .n_bounds = from->n_bounds,
                        .bounds = PACK(p, from->bounds, from->n_bounds),
                        .done_size = from->done_size,
                        .done = PACK(p, from->done, from->done_size)};
    to.answer = (qv_answer){.text_size = a->text_size,
                            .text = PACK(p, a->text, a->text_size),
                            .n_tokens = a->n_tokens,
                            .tokens = PACK(p, a->tokens, a->n_tokens),
                            .n_logprobs = a->n_logprobs,
                            .logprobs = PACK(p, a->logprobs, a->n_logprobs),
                            .n_tops = a->n_tops,
                            .top_start = PACK(p, a->top_start, a->n_tops > 0 ? a->n_tops + 1 : 0),
                            .n_pairs = a->n_pairs,
                            .top_tokens = PACK(p, a->top_tokens, a->n_pairs),
                            .top_logprobs = PACK(p, a->top_logprobs, a->n_pairs)};
    return to;
}

/* All of a job; returns it if there is a block to pack it into. */
static qv_kept *pack_job(packing *p, const qv_job *job)
{
    qv_kept *kept = pack(p, NULL, 1, sizeof *kept);
    qv_job_stream *streams = pack(p, NULL, job->n, sizeof *streams);
    for (uint32_t i = 0; i < job->n; i++) {
        qv_job_stream stream = pack_stream(p, &job->streams[i]);
        if (streams != NULL)
            streams[i] = stream;
    }
    char *error = PACK(p, job->error, job->error_size);
    if (kept == NULL)
        return NULL;
    *kept = (qv_kept){.bytes = p->size,
                      .stream = job->stream,
                      .durable = job->durable,
                      .id_size = job->id_size,
                      .n = job->n,
                      .streams = streams,
                      .error = error,
                      .error_size = job->error_size};
    memcpy(kept->digest, job->digest, sizeof kept->digest);
    memcpy(kept->id, job->id, sizeof kept->id);
    return kept;
}

void qv_keep_add(qv_keep *keep, const qv_job *job, uint64_t until_us)
{
    qv_job_name name =
        qv_job_name_of((qv_str){job->owner, job->owner_size}, (qv_str){job->id, job->id_size});
    qv_map_entry *entry = qv_map_require(keep->by_name, name.bytes, name.size);
    if (entry == NULL)
        return;
    qv_kept *old = entry->value;
    if (old != NULL) {
        keep->bytes -= (int64_t)old->bytes;
        qv_list_remove(&old->link);
        free(old);
    }
    packing counted = {0};
    pack_job(&counted, job);
    packing packed = {.block = malloc(counted.size)};
    if (packed.block == NULL) {
        qv_map_remove_entry(keep->by_name, entry);
        return;
    }
    qv_kept *kept = pack_job(&packed, job);
    kept->bytes += sizeof *entry + name.size;
    kept->until_us = until_us;
    kept->entry = entry;
    entry->value = kept;
    keep->bytes += (int64_t)kept->bytes;
    qv_list_append(&keep->all, &kept->link);
    while (keep->bytes > keep->max_bytes)
        qv_keep_drop(keep, QV_LIST_ITEM(keep->all.next, qv_kept, link));
}

void qv_keep_tick(qv_keep *keep, uint64_t now_us)
{
    QV_LIST_EACH(&keep->all, qv_kept, link, kept)
    {
        if (kept->until_us > now_us)
            break;
        qv_keep_drop(keep, kept);
    }
}

/* --- Messages of an answer --------------------------------------------------------------------*/

void qv_stream_message(const qv_job_stream *stream, qv_str id, const char *digest, uint32_t index,
                       uint32_t i, qv_message *out)
{
    const qv_answer *answer = &stream->answer;
    qv_bound from = i > 0 ? stream->bounds[i - 1] : (qv_bound){0}, to = stream->bounds[i];
    uint32_t n = to.n_tokens - from.n_tokens;
    *out = (qv_message){.type = QV_MSG_TOKENS};
    qv_msg_tokens *tokens = &out->tokens;
    tokens->id = id;
    tokens->index = index;
    tokens->seq = stream->base_seq + i;
    if (tokens->seq == 0 && digest[0] != '\0')
        qv_set(tokens, tokens, digest, qv_str_from(digest));
    tokens->text = (qv_str){answer->text + from.text_size, to.text_size - from.text_size};
    tokens->tokens = (qv_ints){answer->tokens + from.n_tokens, n};
    if (answer->n_logprobs > 0 && n > 0)
        qv_set(tokens, tokens, logprobs, ((qv_reals){answer->logprobs + from.n_tokens, n}));
    if (answer->n_tops > 0 && n > 0)
        qv_set(tokens, tokens, top_logprobs,
               ((qv_tops){.count = n,
                          .start = answer->top_start + from.n_tokens,
                          .token = answer->top_tokens,
                          .logprob = answer->top_logprobs}));
}

static uint32_t count_messages(const qv_job *job)
{
    uint32_t n = job->error != NULL;
    for (uint32_t i = 0; i < job->n; i++)
        n += (job->stream ? job->streams[i].n_bounds : 0) + (job->streams[i].done != NULL);
    return n;
}

static void pack_bytes(qv_msgpack_writer *writer, const void *data, size_t size)
{
    msgpack_pack_bin(&writer->packer, size);
    msgpack_pack_bin_body(&writer->packer, data, size);
}

qv_status qv_answer_pack(const qv_job *job, qv_arena *arena, const void **data, size_t *size)
{
    qv_str id = {job->id, job->id_size};
    qv_arena scratch;
    qv_arena_init(&scratch, 0, 0);
    qv_msgpack_writer writer;
    qv_msgpack_writer_init(&writer, arena);
    msgpack_pack_array(&writer.packer, count_messages(job));
    qv_status status = QV_OK;
    for (uint32_t i = 0; i < job->n && status == QV_OK; i++) {
        const qv_job_stream *stream = &job->streams[i];
        for (uint32_t k = 0; job->stream && k < stream->n_bounds && status == QV_OK; k++) {
            qv_message message;
            const void *bytes;
            size_t n;
            qv_arena_reset(&scratch);
            qv_stream_message(stream, id, job->digest, i, k, &message);
            status = qv_message_encode(&message, &scratch, &bytes, &n);
            if (status == QV_OK)
                pack_bytes(&writer, bytes, n);
        }
        if (stream->done != NULL)
            pack_bytes(&writer, stream->done, stream->done_size);
    }
    if (job->error != NULL)
        pack_bytes(&writer, job->error, job->error_size);
    qv_arena_deinit(&scratch);
    QV_TRY(status);
    QV_TRY(qv_msgpack_writer_finish(&writer));
    *data = writer.data;
    *size = writer.size;
    return QV_OK;
}

/* Whether the client has it; an error is always told. */
static bool is_had(const qv_message *message, const int32_t *have, uint32_t n_have)
{
    bool is_tokens = message->type == QV_MSG_TOKENS;
    if (!is_tokens && message->type != QV_MSG_DONE)
        return false;
    uint64_t index = (uint64_t)(is_tokens ? message->tokens.index : message->done.index);
    int64_t seq = is_tokens ? message->tokens.seq : message->done.seq;
    return index < n_have && seq <= have[index];
}

qv_status qv_answer_unpack(const void *data, size_t size, const int32_t *have, uint32_t n_have,
                           qv_arena *arena,
                           qv_status (*each)(void *user, const qv_message *message), void *user)
{
    qv_reader reader = qv_reader_init(data, size);
    qv_item item;
    QV_TRY(qv_reader_next(&reader, &item));
    if (item.kind != QV_ITEM_ARRAY)
        return qv_fail(QV_ERR_FORMAT, "a stored answer is no array");
    qv_protocol_limits limits = PACKED_LIMITS;
    for (uint32_t i = 0, n = item.size; i < n; i++) {
        QV_TRY(qv_reader_next(&reader, &item));
        if (item.kind != QV_ITEM_BIN)
            return qv_fail(QV_ERR_FORMAT, "message %u of a stored answer is no bytes", i);
        qv_arena_mark mark = qv_arena_get_mark(arena);
        qv_message message = {0};
        QV_TRY(qv_message_decode(item.data, item.size, QV_TO_CLIENT, &limits, arena, &message));
        if (message.type != QV_MSG_TOKENS && message.type != QV_MSG_DONE &&
            message.type != QV_MSG_ERROR)
            return qv_fail(QV_ERR_FORMAT, "message %u of a stored answer is a '%s'", i,
                           qv_message_type_name(message.type));
        if (!is_had(&message, have, n_have))
            QV_TRY(each(user, &message));
        qv_arena_rewind(arena, mark);
    }
    return QV_OK;
}
