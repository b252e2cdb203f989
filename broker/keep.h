/* Keep: what ended requests delivered, so that a client that lost its connection can come back for
 * it; and the same as bytes, for the answers of durable requests in Redis.
 *
 * A kept request is found by tenant and id, the latest of a name only. It lives until its time is
 * over, or until the bytes of all are more than the bound: then the oldest goes first. Pure; one
 * thread.
 */
#ifndef QV_BROKER_KEEP_H
#define QV_BROKER_KEEP_H

#include "broker/requests.h"

/* One block of memory: what it points to lies behind it. */
typedef struct {
    qv_list link;        /* in keep->all, oldest first */
    qv_map_entry *entry; /* in keep->by_name */
    uint64_t until_us;
    size_t bytes;
    bool stream, durable;
    char digest[QV_POOL_DIGEST_MAX + 1]; /* of the adapter that answered */
    uint8_t id_size;
    char id[QV_JOB_ID_MAX + 1];
    uint32_t n;
    qv_job_stream *streams; /* [n]: answers, bounds and `done`s */
    char *error;            /* [error_size] the encoded `error`; NULL: it ended otherwise */
    size_t error_size;
} qv_kept;

typedef struct {
    qv_map *by_name; /* tenant and id → qv_kept */
    qv_list all;
    int64_t bytes, max_bytes;
} qv_keep;

/* Errors: NOMEM. */
qv_status qv_keep_init(qv_keep *keep, int64_t max_bytes);
void qv_keep_deinit(qv_keep *keep);

/* Keep what a job that has ended delivered; too much for the bound is dropped. */
void qv_keep_add(qv_keep *keep, const qv_job *job, uint64_t until_us);

qv_kept *qv_keep_find(const qv_keep *keep, qv_str tenant, qv_str id);
void qv_keep_drop(qv_keep *keep, qv_kept *kept);
void qv_keep_tick(qv_keep *keep, uint64_t now_us);

/* --- Messages of an answer --------------------------------------------------------------------*/

/* The i-th message that a stream's client got, as views of its answer. */
void qv_stream_message(const qv_job_stream *stream, qv_str id, const char *digest, uint32_t index,
                       uint32_t i, qv_message *out);

/* All messages of an ended job in one block of bytes: an array of encoded messages, stream by
 * stream. Errors: NOMEM. */
qv_status qv_answer_pack(const qv_job *job, qv_arena *arena, const void **data, size_t *size);

/* Walk the messages of such a block that a client does not have: `have` [n_have] says the last seq
 * of each stream (absent: none). The bytes may come from anywhere. Errors: FORMAT, NOMEM, and what
 * `each` returns. */
qv_status qv_answer_unpack(const void *data, size_t size, const int32_t *have, uint32_t n_have,
                           qv_arena *arena,
                           qv_status (*each)(void *user, const qv_message *message), void *user);

#endif
