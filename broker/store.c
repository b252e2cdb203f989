#include "broker/store.h"

#include "common/clock.h"
#include "common/log.h"
#include "common/redis.h"

#include <czmq.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum {
    TICK_MS = 100,
    SCAN_MS = 250,     /* between looks for brokers that are gone, and at the quarantine */
    ENSURE_MS = 2000,  /* between looks whether our stream is there */
    ADOPT_ROWS = 128,  /* taken over at once */
    MAX_ADOPTED = 4096 /* taken over and not yet with the core */
};

#define JOBS       "quiver:jobs"
#define LEASE      "quiver:broker:"
#define QUARANTINE "quiver:quarantine"

/* --- Scripts ----------------------------------------------------------------------------------*/

/* KEYS job, stream, set, lease; ARGV broker, tenant, id, seed, submit, now, frontend, lease_ms, and
 * whether it is new. A lease that is not written yet would invite others to take the request. */
static const char put_script[] =
    "local s = redis.call('HMGET', KEYS[1], 'state', 'broker', 'answer')\n"
    "if s[1] == 'done' then return {'done', s[3]} end\n"
    "if s[1] and s[2] ~= ARGV[1] then\n"
    "  local f = redis.call('HGET', 'quiver:broker:' .. s[2], 'frontend')\n"
    "  if f then return {'elsewhere', f} end\n"
    "  return {'lost', ''}\n"
    "end\n"
    "if s[1] and ARGV[9] == '1' then return {'lost', ''} end\n"
    "if s[1] then return {'new', ''} end\n"
    "if redis.call('EXISTS', KEYS[4]) == 0 then\n"
    "  redis.call('HSET', KEYS[4], 'frontend', ARGV[7])\n"
    "  redis.call('PEXPIRE', KEYS[4], ARGV[8])\n"
    "end\n"
    "local e = redis.call('XADD', KEYS[2], '*', 'key', KEYS[1], 'tenant', ARGV[2], 'id', ARGV[3],\n"
    "  'seed', ARGV[4], 'submit', ARGV[5], 'at', ARGV[6])\n"
    "redis.call('HSET', KEYS[1], 'state', 'running', 'broker', ARGV[1], 'entry', e, 'at', "
    "ARGV[6])\n"
    "redis.call('SADD', KEYS[3], ARGV[1])\n"
    "return {'new', ''}\n";

/* KEYS job; ARGV broker. */
static const char look_script[] =
    "local s = redis.call('HMGET', KEYS[1], 'state', 'broker', 'answer')\n"
    "if not s[1] then return {'none', ''} end\n"
    "if s[1] == 'done' then return {'done', s[3]} end\n"
    "if s[2] == ARGV[1] then return {'lost', ''} end\n"
    "local f = redis.call('HGET', 'quiver:broker:' .. s[2], 'frontend')\n"
    "if f then return {'elsewhere', f} end\n"
    "return {'lost', ''}\n";

/* KEYS job, stream; ARGV broker, answer, keep_ms, and whether there is an answer. */
static const char finish_script[] =
    "local s = redis.call('HMGET', KEYS[1], 'broker', 'entry', 'state')\n"
    "if s[3] == 'done' or (s[1] and s[1] ~= ARGV[1]) then return 0 end\n"
    "if s[2] then redis.call('XDEL', KEYS[2], s[2]) end\n"
    "if ARGV[4] == '0' then redis.call('DEL', KEYS[1]) return 1 end\n"
    "redis.call('HSET', KEYS[1], 'state', 'done', 'broker', ARGV[1], 'answer', ARGV[2])\n"
    "redis.call('HDEL', KEYS[1], 'entry')\n"
    "redis.call('PEXPIRE', KEYS[1], ARGV[3])\n"
    "return 1\n";

/* KEYS their stream, our stream, set, their lease; ARGV us, them, rows. Of our own stream (after a
 * restart) the rows are only read, from the entry ARGV[4] on. */
static const char adopt_script[] =
    "if ARGV[1] == ARGV[2] then\n"
    "  return redis.call('XRANGE', KEYS[1], ARGV[4], '+', 'COUNT', ARGV[3])\n"
    "end\n"
    "if redis.call('EXISTS', KEYS[4]) == 1 then return {} end\n"
    "local rows = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', ARGV[3])\n"
    "for _, row in ipairs(rows) do\n"
    "  local e = redis.call('XADD', KEYS[2], '*', unpack(row[2]))\n"
    "  redis.call('XDEL', KEYS[1], row[1])\n"
    "  if row[2][1] == 'key' and redis.call('HGET', row[2][2], 'broker') == ARGV[2] then\n"
    "    redis.call('HSET', row[2][2], 'broker', ARGV[1], 'entry', e)\n"
    "  end\n"
    "end\n"
    "if #rows > 0 then redis.call('SADD', KEYS[3], ARGV[1])\n"
    "else redis.call('DEL', KEYS[1]) redis.call('SREM', KEYS[3], ARGV[2]) end\n"
    "return rows\n";

/* --- State ------------------------------------------------------------------------------------*/

/* Something asked of Redis, with what its answer is about; one block with its texts. */
typedef struct ask {
    struct ask *next;
    qv_store *store;
    qv_durable durable; /* texts point behind the struct */
    uint64_t at_ms;
    bool is_new;
    qv_mq_peer peer; /* of a look-up */
    qv_msg_resume_request request;
    bool has_answer;
    qv_str answer;
    char texts[];
} ask;

typedef struct {
    bool confirmed; /* Redis has it */
    char *text;     /* what it is; owned */
} poison_entry;

struct qv_store {
    zloop_t *loop;
    int timer_id;
    qv_store_options options;
    char *broker, *frontend;
    qv_redis *redis;
    ask *finishing, **finishing_end; /* answers that Redis does not have; oldest first */
    bool finish_sent;                /* the first of them is on its way */
    ask *adopted, **adopted_end;     /* taken over, the core cannot take them yet */
    size_t n_adopted;
    char own_from[48]; /* our stream was read up to here at the start */
    bool own_read, adopting;
    qv_map *poison; /* fingerprint -> poison_entry */
    uint64_t scan_ms, ensure_ms;
};

static char *put_bytes(char **at, const void *data, size_t size)
{
    char *copy = *at;
    if (size > 0)
        memcpy(copy, data, size);
    *at += size;
    return copy;
}

static qv_str put_str(char **at, qv_str text)
{
    return (qv_str){put_bytes(at, text.data, text.size), text.size};
}

static ask *new_ask(qv_store *store, const qv_durable *durable, size_t more, char **at)
{
    size_t size = durable->tenant.size + durable->id.size + durable->submit.size;
    ask *a = calloc(1, sizeof *a + size + more);
    if (a == NULL)
        return NULL;
    a->store = store;
    *at = a->texts;
    a->durable = (qv_durable){.tenant = put_str(at, durable->tenant),
                              .id = put_str(at, durable->id),
                              .submit = put_str(at, durable->submit),
                              .seed = durable->seed,
                              .serial = durable->serial};
    return a;
}

const char *qv_store_job_key(char key[QV_STORE_KEY_MAX], qv_str tenant, qv_str id)
{
    static const char safe[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    size_t used = (size_t)snprintf(key, QV_STORE_KEY_MAX, "quiver:job:");
    const qv_str parts[] = {tenant, id};
    for (int p = 0; p < 2; p++) {
        for (uint32_t i = 0; i < parts[p].size && used + 8 < QV_STORE_KEY_MAX; i++) {
            char c = parts[p].data[i];
            used += c != 0 && strchr(safe, c) != NULL
                        ? (size_t)snprintf(key + used, 8, "%c", c)
                        : (size_t)snprintf(key + used, 8, "%%%02X", (unsigned char)c);
        }
        if (p == 0)
            key[used++] = '/', key[used] = '\0';
    }
    return key;
}

/* --- Commands ---------------------------------------------------------------------------------*/

#define MAX_WORDS 20

/* The words of a command: texts with their sizes. */
typedef struct {
    int n;
    const char *data[MAX_WORDS];
    size_t size[MAX_WORDS];
} words;

static void add(words *w, const char *data, size_t size)
{
    QV_ASSERT(w->n < MAX_WORDS);
    w->data[w->n] = data != NULL ? data : "";
    w->size[w->n++] = size;
}

static void add_text(words *w, const char *text)
{
    add(w, text, strlen(text));
}

static words begin_script(const char *script, const char *n_keys)
{
    words w = {0};
    add_text(&w, "EVAL");
    add_text(&w, script);
    add_text(&w, n_keys);
    return w;
}

static void send_words(qv_store *store, const words *w, qv_redis_fn *fn, void *user)
{
    qv_redis_command(store->redis, w->n, w->data, w->size, fn, user);
}

static const char *stream_key(char key[QV_STORE_KEY_MAX], const char *broker)
{
    snprintf(key, QV_STORE_KEY_MAX, JOBS ":%s", broker);
    return key;
}

static const char *lease_key(char key[QV_STORE_KEY_MAX], const char *broker)
{
    snprintf(key, QV_STORE_KEY_MAX, LEASE "%s", broker);
    return key;
}

/* What a script says: {word, detail}. */
static qv_stored read_stored(qv_status status, const redisReply *reply, qv_str *detail)
{
    static const struct {
        const char *word;
        qv_stored how;
    } rows[] = {{"new", QV_STORED_NEW},
                {"elsewhere", QV_STORED_ELSEWHERE},
                {"done", QV_STORED_FINISHED},
                {"lost", QV_STORED_LOST},
                {"none", QV_STORED_NONE}};
    *detail = qv_str_from("Redis is away");
    if (status == QV_ERR_STATE)
        *detail = qv_str_from(qv_error());
    if (status != QV_OK)
        return QV_STORED_FAILED;
    *detail = qv_str_from("Redis gave an answer that makes no sense");
    if (reply->type != REDIS_REPLY_ARRAY || reply->elements < 1 ||
        reply->element[0]->type != REDIS_REPLY_STRING)
        return QV_STORED_FAILED;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (strcmp(reply->element[0]->str, rows[i].word) != 0)
            continue;
        const redisReply *more = reply->elements > 1 ? reply->element[1] : NULL;
        *detail = more != NULL && more->type == REDIS_REPLY_STRING
                      ? (qv_str){more->str, (uint32_t)more->len}
                      : (qv_str){0};
        return rows[i].how;
    }
    return QV_STORED_FAILED;
}

/* --- Storing ----------------------------------------------------------------------------------*/

static void on_put(qv_status status, const redisReply *reply, void *user)
{
    ask *a = user;
    qv_str detail;
    qv_stored how = read_stored(status, reply, &detail);
    if (status != QV_ERR_CANCELLED && a->is_new)
        qv_core_stored(a->store->options.core, &a->durable, how, detail, qv_now_us());
    free(a);
}

static qv_status send_put(qv_store *store, const qv_durable *durable, bool is_new)
{
    char job[QV_STORE_KEY_MAX], stream[QV_STORE_KEY_MAX], lease[QV_STORE_KEY_MAX];
    char seed[24], now[24], lease_ms[24], *at;
    ask *a = new_ask(store, durable, 0, &at);
    if (a == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory to store a request");
    a->is_new = is_new;
    snprintf(seed, sizeof seed, "%" PRIu64, durable->seed);
    snprintf(now, sizeof now, "%" PRIu64, qv_wall_ms());
    snprintf(lease_ms, sizeof lease_ms, "%" PRId64, store->options.lease_ms);
    words w = begin_script(put_script, "4");
    add_text(&w, qv_store_job_key(job, durable->tenant, durable->id));
    add_text(&w, stream_key(stream, store->broker));
    add_text(&w, JOBS);
    add_text(&w, lease_key(lease, store->broker));
    add_text(&w, store->broker);
    add(&w, durable->tenant.data, durable->tenant.size);
    add(&w, durable->id.data, durable->id.size);
    add_text(&w, seed);
    add(&w, durable->submit.data, durable->submit.size);
    add_text(&w, now);
    add_text(&w, store->frontend);
    add_text(&w, lease_ms);
    add_text(&w, is_new ? "1" : "0");
    send_words(store, &w, on_put, a);
    return QV_OK;
}

qv_status qv_store_put(void *user, const qv_durable *durable)
{
    qv_store *store = user;
    /* What is in our stream from before must not be taken for what is written now. */
    if (!qv_redis_is_up(store->redis) || qv_redis_room(store->redis) == 0 || !store->own_read)
        return qv_fail(QV_ERR_BUSY, "Redis is away: durable requests cannot be accepted");
    return send_put(store, durable, true);
}

static void ensure(void *user, const qv_durable *durable)
{
    qv_store *store = user;
    if (qv_redis_room(store->redis) > 0)
        send_put(store, durable, false);
}

static void on_exists(qv_status status, const redisReply *reply, void *user)
{
    qv_store *store = user;
    if (status == QV_OK && reply->type == REDIS_REPLY_INTEGER && reply->integer == 0)
        qv_core_each_durable(store->options.core, ensure, store);
}

/* --- Finishing --------------------------------------------------------------------------------*/

static void send_finish(qv_store *store);

static void on_finish(qv_status status, const redisReply *reply, void *user)
{
    (void)reply;
    qv_store *store = user;
    store->finish_sent = false;
    if (status == QV_ERR_BUSY || status == QV_ERR_CANCELLED)
        return; /* again when Redis is up */
    ask *a = store->finishing;
    if (status == QV_ERR_STATE)
        qv_warn("the answer of a durable request is not stored: %s", qv_error());
    store->finishing = a->next;
    if (store->finishing == NULL)
        store->finishing_end = &store->finishing;
    free(a);
    send_finish(store);
}

/* One at a time: the script's answer says which one it was. */
static void send_finish(qv_store *store)
{
    ask *a = store->finishing;
    if (a == NULL || store->finish_sent || !qv_redis_is_up(store->redis) ||
        qv_redis_room(store->redis) == 0)
        return;
    char job[QV_STORE_KEY_MAX], stream[QV_STORE_KEY_MAX], keep_ms[24];
    snprintf(keep_ms, sizeof keep_ms, "%" PRId64, store->options.keep_ms);
    words w = begin_script(finish_script, "2");
    add_text(&w, qv_store_job_key(job, a->durable.tenant, a->durable.id));
    add_text(&w, stream_key(stream, store->broker));
    add_text(&w, store->broker);
    add(&w, a->answer.data, a->answer.size);
    add_text(&w, keep_ms);
    add_text(&w, a->has_answer ? "1" : "0");
    store->finish_sent = true;
    send_words(store, &w, on_finish, store);
}

void qv_store_finish(void *user, const qv_durable *durable, const void *answer, size_t size)
{
    qv_store *store = user;
    qv_durable named = *durable;
    named.submit = (qv_str){0};
    char *at;
    ask *a = new_ask(store, &named, size, &at);
    if (a == NULL) {
        qv_err("no memory for the answer of a durable request: it will run again");
        return;
    }
    a->has_answer = answer != NULL;
    if (answer != NULL)
        a->answer = (qv_str){put_bytes(&at, answer, size), (uint32_t)size};
    *store->finishing_end = a;
    store->finishing_end = &a->next;
    send_finish(store);
}

/* --- Looking up -------------------------------------------------------------------------------*/

static void on_look(qv_status status, const redisReply *reply, void *user)
{
    ask *a = user;
    qv_str detail;
    qv_stored how = read_stored(status, reply, &detail);
    if (status != QV_ERR_CANCELLED)
        qv_core_looked_up(a->store->options.core, &a->peer, &a->request, how, detail, qv_now_us());
    free(a);
}

bool qv_store_look_up(void *user, const qv_mq_peer *peer, const qv_msg_resume_request *request)
{
    qv_store *store = user;
    size_t seqs = request->seqs.count * sizeof *request->seqs.data;
    qv_durable named = {.tenant = request->tenant, .id = request->id};
    char job[QV_STORE_KEY_MAX], *at;
    ask *a = new_ask(store, &named, seqs + _Alignof(int32_t), &at);
    if (a == NULL)
        return false;
    a->peer = *peer;
    a->request = *request;
    a->request.id = a->durable.id;
    a->request.tenant = a->durable.tenant;
    at += -(uintptr_t)at % _Alignof(int32_t);
    if (seqs > 0)
        a->request.seqs.data = (int32_t *)(void *)put_bytes(&at, request->seqs.data, seqs);
    words w = begin_script(look_script, "1");
    add_text(&w, qv_store_job_key(job, request->tenant, request->id));
    add_text(&w, store->broker);
    send_words(store, &w, on_look, a);
    return true;
}

/* --- Taking over ------------------------------------------------------------------------------*/

static const redisReply *field(const redisReply *fields, const char *name)
{
    for (size_t i = 0; i + 1 < fields->elements; i += 2)
        if (fields->element[i]->type == REDIS_REPLY_STRING &&
            strcmp(fields->element[i]->str, name) == 0 &&
            fields->element[i + 1]->type == REDIS_REPLY_STRING)
            return fields->element[i + 1];
    return NULL;
}

static qv_str str_of(const redisReply *reply)
{
    return reply != NULL ? (qv_str){reply->str, (uint32_t)reply->len} : (qv_str){0};
}

static void take_row(qv_store *store, const redisReply *row)
{
    if (row->type != REDIS_REPLY_ARRAY || row->elements != 2 ||
        row->element[0]->type != REDIS_REPLY_STRING || row->element[1]->type != REDIS_REPLY_ARRAY)
        return;
    const redisReply *fields = row->element[1];
    const redisReply *seed = field(fields, "seed"), *at_ms = field(fields, "at");
    qv_durable durable = {.tenant = str_of(field(fields, "tenant")),
                          .id = str_of(field(fields, "id")),
                          .submit = str_of(field(fields, "submit")),
                          .seed = seed != NULL ? strtoull(seed->str, NULL, 10) : 0};
    char *at;
    ask *a = durable.tenant.size <= QV_TENANT_MAX_NAME && durable.id.size > 0 &&
                     durable.id.size <= QV_JOB_ID_MAX
                 ? new_ask(store, &durable, 0, &at)
                 : NULL;
    if (a == NULL) {
        qv_warn("entry %s of a stream of durable requests makes no sense", row->element[0]->str);
        return;
    }
    a->at_ms = at_ms != NULL ? strtoull(at_ms->str, NULL, 10) : 0;
    *store->adopted_end = a;
    store->adopted_end = &a->next;
    store->n_adopted++;
}

/* Give the core what was taken over, as far as it can take it now. */
static void give_adopted(qv_store *store)
{
    uint64_t wall_ms = qv_wall_ms();
    while (store->adopted != NULL) {
        ask *a = store->adopted;
        uint64_t age_ms = a->at_ms != 0 && a->at_ms < wall_ms ? wall_ms - a->at_ms : 0;
        qv_status status = qv_core_adopt(store->options.core, &a->durable, age_ms, qv_now_us());
        if (status == QV_ERR_BUSY)
            return;
        if (status != QV_OK) {
            qv_warn("durable request '%.*s' cannot run again: %s", (int)a->durable.id.size,
                    a->durable.id.data, qv_error());
            qv_store_finish(store, &a->durable, NULL, 0);
        }
        store->adopted = a->next;
        if (store->adopted == NULL)
            store->adopted_end = &store->adopted;
        store->n_adopted--;
        free(a);
    }
}

static void on_own_rows(qv_status status, const redisReply *reply, void *user)
{
    qv_store *store = user;
    store->adopting = false;
    if (status != QV_OK || reply->type != REDIS_REPLY_ARRAY)
        return;
    for (size_t i = 0; i < reply->elements; i++)
        take_row(store, reply->element[i]);
    store->own_read = reply->elements < ADOPT_ROWS;
    const redisReply *last = reply->elements > 0 ? reply->element[reply->elements - 1] : NULL;
    if (last != NULL && last->type == REDIS_REPLY_ARRAY && last->elements > 0 &&
        last->element[0]->type == REDIS_REPLY_STRING)
        snprintf(store->own_from, sizeof store->own_from, "(%s", last->element[0]->str);
    give_adopted(store);
}

static void on_their_rows(qv_status status, const redisReply *reply, void *user)
{
    qv_store *store = user;
    store->adopting = false;
    if (status != QV_OK || reply->type != REDIS_REPLY_ARRAY)
        return;
    for (size_t i = 0; i < reply->elements; i++)
        take_row(store, reply->element[i]);
    if (reply->elements > 0) {
        qv_info("took %zu durable requests over from a broker that is gone", reply->elements);
        store->scan_ms = 0; /* there may be more */
    }
    give_adopted(store);
}

static void send_adopt(qv_store *store, const char *from, qv_redis_fn *fn)
{
    char theirs[QV_STORE_KEY_MAX], ours[QV_STORE_KEY_MAX], lease[QV_STORE_KEY_MAX], rows[24];
    if (store->adopting || store->n_adopted >= MAX_ADOPTED)
        return;
    snprintf(rows, sizeof rows, "%d", ADOPT_ROWS);
    words w = begin_script(adopt_script, "4");
    add_text(&w, stream_key(theirs, from));
    add_text(&w, stream_key(ours, store->broker));
    add_text(&w, JOBS);
    add_text(&w, lease_key(lease, from));
    add_text(&w, store->broker);
    add_text(&w, from);
    add_text(&w, rows);
    add_text(&w, store->own_from);
    store->adopting = true;
    send_words(store, &w, fn, store);
}

static void on_brokers(qv_status status, const redisReply *reply, void *user)
{
    qv_store *store = user;
    if (status != QV_OK || reply->type != REDIS_REPLY_ARRAY)
        return;
    for (size_t i = 0; i < reply->elements; i++) {
        const redisReply *id = reply->element[i];
        if (id->type != REDIS_REPLY_STRING || strcmp(id->str, store->broker) == 0 ||
            qv_check_id(id->str, id->len) != QV_OK)
            continue;
        send_adopt(store, id->str, on_their_rows); /* the script looks at the lease */
        store->adopting = false;                   /* several may be on their way */
    }
}

/* --- Quarantine -------------------------------------------------------------------------------*/

static void free_poison(void *value)
{
    poison_entry *entry = value;
    free(entry->text);
    free(entry);
}

typedef struct {
    qv_store *store;
    char fingerprint[QV_FINGERPRINT_SIZE];
} poison_ask;

/* From here on its absence says that people cleared it. */
static void on_poison(qv_status status, const redisReply *reply, void *user)
{
    (void)reply;
    poison_ask *a = user;
    poison_entry *entry = status == QV_OK ? qv_map_get_str(a->store->poison, a->fingerprint) : NULL;
    if (entry != NULL)
        entry->confirmed = true;
    free(a);
}

static void send_poison(qv_store *store, const char *fingerprint, const poison_entry *entry)
{
    poison_ask *a = qv_redis_is_up(store->redis) ? malloc(sizeof *a) : NULL;
    if (a == NULL)
        return; /* again with the next look at the quarantine */
    a->store = store;
    snprintf(a->fingerprint, sizeof a->fingerprint, "%s", fingerprint);
    qv_redis_commandf(store->redis, on_poison, a, "HSET " QUARANTINE " %s %s", fingerprint,
                      entry->text);
}

static poison_entry *require_poison(qv_store *store, const char *fingerprint)
{
    poison_entry *entry = qv_map_get_str(store->poison, fingerprint);
    if (entry != NULL)
        return entry;
    entry = calloc(1, sizeof *entry);
    if (entry == NULL || qv_map_set_str(store->poison, fingerprint, entry) != QV_OK) {
        free(entry);
        return NULL;
    }
    return entry;
}

void qv_store_quarantine(void *user, const qv_poison *poison)
{
    qv_store *store = user;
    poison_entry *entry = require_poison(store, poison->fingerprint);
    if (entry == NULL)
        return;
    free(entry->text);
    entry->text = NULL;
    if (asprintf(&entry->text,
                 "id=%s tenant=%s adapter=%s workers_lost=%u workers=%s broker=%s at_ms=%" PRIu64,
                 poison->id, poison->tenant, poison->adapter, poison->n_losses, poison->workers,
                 store->broker, qv_wall_ms()) < 0)
        entry->text = NULL;
    entry->confirmed = false;
    if (entry->text != NULL)
        send_poison(store, poison->fingerprint, entry);
}

static bool is_fingerprint(const redisReply *reply)
{
    return reply->type == REDIS_REPLY_STRING && reply->len == QV_FINGERPRINT_SIZE - 1 &&
           strspn(reply->str, "0123456789abcdef") == reply->len;
}

static bool has_field(const redisReply *reply, const char *name)
{
    for (size_t i = 0; i + 1 < reply->elements; i += 2)
        if (is_fingerprint(reply->element[i]) && strcmp(reply->element[i]->str, name) == 0)
            return true;
    return false;
}

static void on_quarantine(qv_status status, const redisReply *reply, void *user)
{
    qv_store *store = user;
    if (status != QV_OK || reply->type != REDIS_REPLY_ARRAY)
        return;
    for (size_t i = 0; i + 1 < reply->elements; i += 2) {
        const redisReply *name = reply->element[i];
        poison_entry *entry = is_fingerprint(name) ? require_poison(store, name->str) : NULL;
        if (entry == NULL)
            continue;
        if (!entry->confirmed || entry->text == NULL)
            qv_core_poison(store->options.core, name->str, true, qv_now_us());
        entry->confirmed = true;
    }
    QV_MAP_EACH(store->poison, entry)
    {
        poison_entry *poison = entry->value;
        if (has_field(reply, entry->key))
            continue;
        if (!poison->confirmed && poison->text != NULL) {
            send_poison(store, entry->key, poison);
            continue;
        }
        qv_info("quarantine of %s was cleared", entry->key);
        qv_core_poison(store->options.core, entry->key, false, qv_now_us());
        qv_map_remove_entry(store->poison, entry);
        free_poison(poison);
    }
}

/* --- Time and life ----------------------------------------------------------------------------*/

static void on_up(void *user)
{
    qv_store *store = user;
    store->scan_ms = 0;
    send_finish(store);
    qv_core_each_durable(store->options.core, ensure, store);
}

static int on_tick(zloop_t *loop, int timer, void *user)
{
    (void)loop, (void)timer;
    qv_store *store = user;
    uint64_t now_ms = qv_now_ms();
    give_adopted(store);
    if (!qv_redis_is_up(store->redis))
        return 0;
    send_finish(store);
    if (!store->own_read) {
        send_adopt(store, store->broker, on_own_rows);
        return 0;
    }
    if (now_ms >= store->scan_ms) {
        store->scan_ms = now_ms + SCAN_MS;
        qv_redis_commandf(store->redis, on_brokers, store, "SMEMBERS " JOBS);
        qv_redis_commandf(store->redis, on_quarantine, store, "HGETALL " QUARANTINE);
    }
    if (now_ms >= store->ensure_ms) {
        store->ensure_ms = now_ms + ENSURE_MS;
        qv_redis_commandf(store->redis, on_exists, store, "EXISTS " JOBS ":%s", store->broker);
    }
    return 0;
}

qv_status qv_store_new(zloop_t *loop, const qv_store_options *options, qv_store **out)
{
    qv_store *store = calloc(1, sizeof *store);
    if (store == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for the store");
    store->loop = loop;
    store->timer_id = -1;
    store->options = *options;
    store->broker = strdup(options->broker);
    store->frontend = strdup(options->frontend);
    store->finishing_end = &store->finishing;
    store->adopted_end = &store->adopted;
    store->poison = qv_map_new(0);
    strcpy(store->own_from, "-");
    qv_redis_options redis = {
        .url = options->url, .name = "quiver-store", .on_up = on_up, .user = store};
    qv_status status = store->broker != NULL && store->frontend != NULL && store->poison != NULL
                           ? qv_redis_new(loop, &redis, &store->redis)
                           : qv_fail(QV_ERR_NOMEM, "no memory for the store");
    if (status == QV_OK) {
        store->timer_id = zloop_timer(loop, TICK_MS, 0, on_tick, store);
        if (store->timer_id < 0)
            status = qv_fail(QV_ERR_NOMEM, "no memory for the event loop");
    }
    if (status != QV_OK) {
        qv_store_free(store);
        return status;
    }
    *out = store;
    return QV_OK;
}

static void free_asks(ask *a)
{
    while (a != NULL) {
        ask *next = a->next;
        free(a);
        a = next;
    }
}

void qv_store_free(qv_store *store)
{
    if (store == NULL)
        return;
    if (store->timer_id >= 0)
        zloop_timer_end(store->loop, store->timer_id);
    qv_redis_free(store->redis);
    free_asks(store->finishing);
    free_asks(store->adopted);
    qv_map_free(store->poison, free_poison);
    free(store->broker);
    free(store->frontend);
    free(store);
}

bool qv_store_is_idle(const qv_store *store)
{
    return store->finishing == NULL;
}
