/* A world for the broker's core: scripted clients and workers with names for ids, a clock set by
 * hand, and a record of everything that the core sent, published and reported. Messages go in as
 * bytes, as from a socket; what comes out is copied through encoder and decoder, so the wire is
 * tested along the way.
 */
#ifndef QV_TESTS_BROKER_WORLD_H
#define QV_TESTS_BROKER_WORLD_H

#include "broker/core.h"

typedef struct world world;

/* A message that the core sent. */
typedef struct {
    char to[64]; /* name of the client or worker */
    qv_message message;
    bool taken;
} world_sent;

struct world {
    qv_core *core;
    uint64_t now_us;
    qv_arena arena; /* holds all messages; never reset */
    world_sent *sent;
    size_t n_sent, sent_capacity;
    qv_map *replies;   /* name → qv_status + 1 of sends to it; absent = OK */
    qv_map *published; /* adapter → state, reason and replicas as text, owned */
    char *events;      /* one a line: "what adapter worker why" */

    /* What was said to Redis last; texts live in the arena. */
    qv_status store_reply;
    qv_durable stored, finished;
    qv_str answer; /* packed; data NULL: it was forgotten */
    int n_stored, n_finished, n_looked_up, n_quarantined;
    int64_t instance; /* of the processes that register from now on; 0 = they do not say */
    char fingerprint[QV_FINGERPRINT_SIZE];
};

/* A world with default options, or what `options` says. Aborts without memory. */
world *world_new(const qv_core_options *options);
void world_free(world *w);

/* Let time pass in steps of 10 ms, with a tick each; the books are checked at each. Workers do not
 * speak by themselves: see world_beat. */
void world_pass(world *w, int64_t ms);

/* What sends to this name answer from now on. */
void world_set_reply(world *w, const char *name, qv_status status);

/* Fail the test unless the books are right. */
void world_check(world *w);

/* --- Clients ----------------------------------------------------------------------------------*/

qv_mq_peer world_peer(const char *name);

/* A submit with a prompt and what `fields` adds: name and value in turns, ends with NULL; values
 * are read as JSON ("5", "true", "\"x\""). */
void world_submit(world *w, const char *client, const char *id, const char *adapter, ...);

/* Any message to the core, as JSON, from a client; and raw bytes. */
void world_client_json(world *w, const char *client, const char *json);
void world_client_bytes(world *w, const char *client, const void *data, size_t size);
void world_cancel(world *w, const char *client, const char *id);

/* The next message to this client (or worker) that was not taken yet; NULL if there is none. */
const qv_message *world_take(world *w, const char *name);

/* The same, which must be of this type; pings before it are skipped. */
const qv_message *world_expect(world *w, const char *name, qv_msg_type type);

/* That nothing is left to take. */
bool world_is_silent(const world *w, const char *name);

/* --- Workers ----------------------------------------------------------------------------------*/

/* Register as a worker: `adapters` is "name:digest name:digest", or NULL. Takes the welcome and
 * returns its epoch. */
uint64_t world_join(world *w, const char *worker, int64_t capacity, int64_t slots,
                    const char *adapters);

/* The same with the id apart from the connection, and a model; the welcome is left to take. */
void world_ready(world *w, const char *connection, const char *id, const char *model,
                 int64_t capacity, int64_t slots, const char *adapters);

void world_beat(world *w, const char *worker, uint64_t epoch, bool draining);
void world_goodbye(world *w, const char *worker, uint64_t epoch);
void world_adapter_state(world *w, const char *worker, uint64_t epoch, const char *name,
                         const char *state, const char *digest_or_reason);
void world_worker_message(world *w, const char *worker, const qv_message *message);

/* A step with one delta: text of one token, or NULL; finish and error may be NULL. */
void world_delta(world *w, const char *worker, uint64_t epoch, uint64_t request, int64_t index,
                 int64_t seq, const char *text, const char *finish);
void world_delta_error(world *w, const char *worker, uint64_t epoch, uint64_t request,
                       const char *code, const char *text);

/* --- Registry ---------------------------------------------------------------------------------*/

void world_want(world *w, const char *name, const char *path, int64_t replicas);

/* "state" of an adapter as last published, or "" if it is not. */
const char *world_state(world *w, const char *name);
const char *world_reason(world *w, const char *name);

#endif
