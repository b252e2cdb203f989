#include "common/msgpack_io.h"
#include "common/protocol.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

/* --- helpers --------------------------------------------------------------------------------- */

static const qv_direction all_directions[] = {QV_FROM_CLIENT, QV_TO_CLIENT, QV_FROM_WORKER,
                                              QV_TO_WORKER};

/* Where the helpers below decode to; what they return lives until the next call. */
static qv_arena shared_arena;

/* Decode bytes that lie alone in a block of their size, so that a read past the end is noticed. */
static qv_status decode(const void *data, size_t size, qv_direction direction, qv_message *out)
{
    static void *copy;
    free(copy);
    copy = malloc(size > 0 ? size : 1);
    memcpy(copy, data, size);
    qv_arena_reset(&shared_arena);
    return qv_message_decode(copy, size, direction, NULL, &shared_arena, out);
}

/* A message of the client written as JSON, with ' for ". */
static qv_status decode_json(const char *text, qv_direction direction, qv_message *out)
{
    char *quoted = strdup(text);
    for (char *c = quoted; *c != 0; c++)
        if (*c == '\'')
            *c = '"';
    json_error_t error;
    json_t *object = json_loads(quoted, 0, &error);
    cr_assert_not_null(object, "%s: %s", quoted, error.text);
    qv_arena_reset(&shared_arena);
    qv_status status = qv_message_from_json(object, direction, &shared_arena, out);
    json_decref(object);
    free(quoted);
    return status;
}

static qv_str str(const char *text)
{
    return qv_str_from(text);
}

#define assert_bytes(got, got_size, want, what)                                                    \
    do {                                                                                           \
        cr_assert_eq(got_size, sizeof(want) - 1, "%s: %zu bytes", what, (size_t)(got_size));       \
        cr_assert_arr_eq(got, want, sizeof(want) - 1, "%s", what);                                 \
    } while (0)

/* --- golden bytes ---------------------------------------------------------------------------- */

Test(protocol, writes_a_submit_as_these_bytes)
{
    qv_arena arena = {0};
    qv_message m;
    const void *data;
    size_t size;
    int32_t tokens[] = {1, 300, -1};
    qv_message_init(&m, QV_MSG_SUBMIT);
    qv_set(&m.submit, submit, id, str("r1"));
    qv_set(&m.submit, submit, adapter, str("json"));
    qv_set(&m.submit, submit, tokens, ((qv_ints){tokens, 3}));
    qv_set(&m.submit, submit, temperature, 0.5);
    qv_set(&m.submit, submit, seed, UINT64_MAX);
    qv_set(&m.submit, submit, stream, false);
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_OK, "%s", qv_error());
    static const char want[] = "\x87"
                               "\xa4type\xa6submit"
                               "\xa2id\xa2r1"
                               "\xa7"
                               "adapter\xa4json"
                               "\xa6tokens\x93\x01\xcd\x01\x2c\xff"
                               "\xabtemperature\xcb\x3f\xe0\x00\x00\x00\x00\x00\x00"
                               "\xa4seed\xcf\xff\xff\xff\xff\xff\xff\xff\xff"
                               "\xa6stream\xc2";
    assert_bytes(data, size, want, "submit");
    qv_arena_deinit(&arena);
}

Test(protocol, writes_tokens_and_done_as_these_bytes)
{
    qv_arena arena = {0};
    qv_message m;
    const void *data;
    size_t size;
    int32_t token = 7, alternatives[] = {7, 9};
    uint32_t start[] = {0, 2};
    double logprob = -0.5, alternative_logprobs[] = {-0.5, NAN};
    qv_message_init(&m, QV_MSG_TOKENS);
    m.tokens.id = str("r1");
    m.tokens.index = 1;
    m.tokens.seq = 200;
    m.tokens.text = str("\xc3\xa9");
    m.tokens.tokens = (qv_ints){&token, 1};
    qv_set(&m.tokens, tokens, logprobs, ((qv_reals){&logprob, 1}));
    qv_set(&m.tokens, tokens, top_logprobs,
           ((qv_tops){1, start, alternatives, alternative_logprobs}));
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_OK, "%s", qv_error());
    static const char want_tokens[] = "\x88"
                                      "\xa4type\xa6tokens"
                                      "\xa2id\xa2r1"
                                      "\xa5index\x01"
                                      "\xa3seq\xcc\xc8"
                                      "\xa4text\xa2\xc3\xa9"
                                      "\xa6tokens\x91\x07"
                                      "\xa8logprobs\x91\xcb\xbf\xe0\x00\x00\x00\x00\x00\x00"
                                      "\xactop_logprobs\x91\x92"
                                      "\x92\x07\xcb\xbf\xe0\x00\x00\x00\x00\x00\x00"
                                      "\x92\x09\xc0";
    assert_bytes(data, size, want_tokens, "tokens");

    qv_message_init(&m, QV_MSG_DONE);
    m.done.id = str("r1");
    m.done.seq = 3;
    m.done.finish_reason = str("stop");
    m.done.usage = (qv_msg_usage){.prompt_tokens = 5, .completion_tokens = 2};
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_OK, "%s", qv_error());
    static const char want_done[] = "\x86"
                                    "\xa4type\xa4"
                                    "done"
                                    "\xa2id\xa2r1"
                                    "\xa5index\x00"
                                    "\xa3seq\x03"
                                    "\xad"
                                    "finish_reason\xa4stop"
                                    "\xa5usage\x83"
                                    "\xadprompt_tokens\x05"
                                    "\xb1"
                                    "completion_tokens\x02"
                                    "\xad"
                                    "cached_tokens\x00";
    assert_bytes(data, size, want_done, "done");
    qv_arena_deinit(&arena);
}

Test(protocol, writes_a_step_and_a_run_as_these_bytes)
{
    qv_arena arena = {0};
    qv_message m;
    const void *data;
    size_t size;
    int32_t token = 65;
    qv_msg_delta delta = {0};
    qv_message_init(&m, QV_MSG_STEP);
    m.step.epoch = 9;
    delta.request = 258;
    qv_set(&delta, delta, text, str("A"));
    qv_set(&delta, delta, tokens, ((qv_ints){&token, 1}));
    m.step.deltas.data = &delta;
    m.step.deltas.count = 1;
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_OK, "%s", qv_error());
    static const char want_step[] = "\x83"
                                    "\xa4type\xa4step"
                                    "\xa5"
                                    "epoch\x09"
                                    "\xa6"
                                    "deltas\x91\x83"
                                    "\xa7request\xcd\x01\x02"
                                    "\xa4text\xa1"
                                    "A"
                                    "\xa6tokens\x91"
                                    "A";
    assert_bytes(data, size, want_step, "step");

    qv_message_init(&m, QV_MSG_RUN);
    m.run.epoch = 9;
    m.run.request = 258;
    m.run.submit = (qv_str){"\x80", 1};
    m.run.seed = 1;
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_OK, "%s", qv_error());
    static const char want_run[] = "\x85"
                                   "\xa4type\xa3run"
                                   "\xa5"
                                   "epoch\x09"
                                   "\xa7request\xcd\x01\x02"
                                   "\xa6submit\xc4\x01\x80"
                                   "\xa4seed\x01";
    assert_bytes(data, size, want_run, "run");
    qv_arena_deinit(&arena);
}

Test(protocol, reads_every_form_in_which_a_client_may_write_a_value)
{
    /* max_tokens as float 64, top_k as int 32, temperature as integer, top_p as float 32, tokens as
     * packed little-endian int32, stop as one string, seed nil, and a key from the future. */
    static const char bytes[] = "\x8a"
                                "\xabtemperature\x02"
                                "\xa2id\xd9\x02r1"
                                "\xaamax_tokens\xcb\x40\x08\x00\x00\x00\x00\x00\x00"
                                "\xa5top_k\xd2\xff\xff\xff\xff"
                                "\xa5top_p\xca\x3f\x00\x00\x00"
                                "\xa6tokens\xc4\x08\x2c\x01\x00\x00\xff\xff\xff\xff"
                                "\xa4stop\xa1\n"
                                "\xa4seed\xc0"
                                "\xa6"
                                "future\x81\x01\x02" /* replaced below: keys are strings */
                                "\xa4type\xda\x00\x06submit";
    char fixed[sizeof(bytes)];
    memcpy(fixed, bytes, sizeof(bytes));
    char *odd = memmem(fixed, sizeof(fixed), "\x81\x01\x02", 3);
    memcpy(odd, "\x92\x01\x02", 3);
    qv_message m;
    cr_assert_eq(decode(fixed, sizeof(bytes) - 1, QV_FROM_CLIENT, &m), QV_OK, "%s", qv_error());
    cr_assert_eq(m.type, QV_MSG_SUBMIT);
    cr_assert(qv_str_equal(m.id, "r1") && qv_str_equal(m.submit.id, "r1"));
    cr_assert_eq(m.submit.max_tokens, 3);
    cr_assert_eq(m.submit.temperature, 2.0);
    cr_assert_eq(m.submit.top_p, 0.5);
    cr_assert_eq(m.submit.top_k, -1);
    cr_assert(m.submit.tokens.count == 2 && m.submit.tokens.data[0] == 300 &&
              m.submit.tokens.data[1] == -1);
    cr_assert(m.submit.stop.count == 1 && qv_str_equal(m.submit.stop.data[0], "\n"));
    cr_assert_not(qv_has(&m.submit, submit, seed));
    cr_assert(m.unknown_keys.count == 1 && qv_str_equal(m.unknown_keys.data[0], "future"));
}

Test(protocol, absent_fields_hold_their_defaults)
{
    qv_message m;
    cr_assert_eq(decode_json("{'type':'submit','id':'a','prompt':'x'}", QV_FROM_CLIENT, &m), QV_OK,
                 "%s", qv_error());
    const qv_msg_submit *s = &m.submit;
    cr_assert_eq(s->max_tokens, 256);
    cr_assert_eq(s->temperature, 1.0);
    cr_assert_eq(s->top_p, 1.0);
    cr_assert_eq(s->top_k, 0);
    cr_assert_eq(s->min_p, 0.0);
    cr_assert_eq(s->repetition_penalty, 1.0);
    cr_assert_eq(s->n, 1);
    cr_assert(s->stream);
    cr_assert(s->adapter.size == 0 && s->tokens.count == 0 && s->stop.count == 0);
    cr_assert(qv_has(s, submit, prompt) && !qv_has(s, submit, max_tokens) &&
              !qv_has(s, submit, logprobs));
    qv_message fresh;
    qv_message_init(&fresh, QV_MSG_SUBMIT);
    cr_assert(fresh.submit.max_tokens == 256 && fresh.submit.stream && fresh.submit.has == 0);
}

/* --- round trips, generated from the table ---------------------------------------------------- */

typedef struct {
    const char *st, *kind, *name;
    bool required;
    double min, max;
} row;

static const row rows[] = {
#define IS_REQ                                        true
#define IS_OPT                                        false
#define QV_FIELD(st, kind, name, need, min, max, def) {#st, #kind, #name, IS_##need, min, max},
#include "common/protocol.def"
};

static const struct {
    const char *type, *st, *who;
} message_rows[] = {
#define QV_MESSAGE(NAME, wire, st, who) {wire, #st, who},
#include "common/protocol.def"
};

static const char *const direction_of[] = {"client to broker", "broker to client",
                                           "worker to broker", "broker to worker"};

typedef struct {
    qv_rng rng;
    msgpack_packer packer;
    bool all;  /* every optional field, else each with one chance in two */
    bool json; /* only what JSON can say */
} generator;

static int64_t pick(generator *g, int64_t low, int64_t high)
{
    return qv_rng_range(&g->rng, low, high + 1);
}

static void generate_str(generator *g, int64_t low, int64_t high)
{
    static const char *const characters[] = {
        "a", "Z", " ", "\n", "\"", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x99\x82"};
    char text[512];
    size_t size = 0, wanted = (size_t)pick(g, low, high);
    while (size < wanted) {
        const char *c = characters[pick(g, 0, 7)];
        if (size + strlen(c) > wanted)
            c = "x";
        memcpy(text + size, c, strlen(c));
        size += strlen(c);
    }
    msgpack_pack_str(&g->packer, size);
    msgpack_pack_str_body(&g->packer, text, size);
}

static int64_t any_int(generator *g)
{
    int shift = (int)pick(g, 0, 63);
    int64_t value = (int64_t)(qv_rng_u64(&g->rng) >> shift);
    return pick(g, 0, 1) ? value : -(value >> 1);
}

static void generate_any(generator *g, int depth)
{
    switch (pick(g, 0, depth < 4 ? 6 : 4)) {
    case 0:
        msgpack_pack_nil(&g->packer);
        break;
    case 1:
        msgpack_pack_true(&g->packer);
        break;
    case 2:
        msgpack_pack_int64(&g->packer, any_int(g));
        break;
    case 3:
        msgpack_pack_double(&g->packer, qv_rng_normal(&g->rng));
        break;
    case 4:
        generate_str(g, 0, 40);
        break;
    case 5: {
        int64_t n = pick(g, 0, 5);
        msgpack_pack_array(&g->packer, (size_t)n);
        for (int64_t i = 0; i < n; i++)
            generate_any(g, depth + 1);
        break;
    }
    default: {
        int64_t n = pick(g, 0, 5);
        msgpack_pack_map(&g->packer, (size_t)n);
        for (int64_t i = 0; i < n; i++) {
            char key[2] = {(char)('a' + i), 0};
            msgpack_pack_str(&g->packer, 1);
            msgpack_pack_str_body(&g->packer, key, 1);
            generate_any(g, depth + 1);
        }
        break;
    }
    }
}

static void generate_struct(generator *g, const char *st, const char *type);

static void generate_tops(generator *g, int64_t n)
{
    msgpack_pack_array(&g->packer, (size_t)n);
    for (int64_t i = 0; i < n; i++) {
        int64_t pairs = pick(g, 0, 3);
        msgpack_pack_array(&g->packer, (size_t)pairs);
        for (int64_t k = 0; k < pairs; k++) {
            msgpack_pack_array(&g->packer, 2);
            msgpack_pack_int32(&g->packer, (int32_t)pick(g, 0, 100000));
            msgpack_pack_double(&g->packer, -qv_rng_uniform(&g->rng));
        }
    }
}

/* Lengths and counts: inside the bounds, and small where there is none. */
static int64_t pick_length(generator *g, const row *r)
{
    int64_t high = r->max > r->min ? (int64_t)r->max : 200;
    return pick(g, (int64_t)r->min, high > 200 ? 200 : high);
}

static void generate_value(generator *g, const row *r)
{
    bool bounded = r->min != 0 || r->max != 0;
    msgpack_packer *p = &g->packer;
    if (strcmp(r->kind, "BOOL") == 0) {
        if (pick(g, 0, 1))
            msgpack_pack_true(p);
        else
            msgpack_pack_false(p);
    } else if (strcmp(r->kind, "INT") == 0) {
        int64_t high = r->max >= r->min ? (int64_t)r->max : INT32_MAX;
        msgpack_pack_int64(p, bounded ? pick(g, (int64_t)r->min, high) : any_int(g));
    } else if (strcmp(r->kind, "UINT") == 0) {
        msgpack_pack_uint64(p, qv_rng_u64(&g->rng) >> (g->json ? 1 : 0));
    } else if (strcmp(r->kind, "REAL") == 0) {
        double u = qv_rng_uniform(&g->rng);
        msgpack_pack_double(p, bounded ? r->min + u * (r->max - r->min) : 1000 * u);
    } else if (strcmp(r->kind, "STR") == 0) {
        int64_t n = pick_length(g, r);
        generate_str(g, n, n);
    } else if (strcmp(r->kind, "BIN") == 0) {
        msgpack_pack_bin(p, 3);
        msgpack_pack_bin_body(p, "\x00\xff\x80", 3);
    } else if (strcmp(r->kind, "ANY") == 0) {
        msgpack_pack_array(p, 1); /* not nil, which stands for an absent field */
        generate_any(g, 0);
    } else if (strcmp(r->kind, "INTS") == 0 || strcmp(r->kind, "REALS") == 0 ||
               strcmp(r->kind, "STRS") == 0) {
        int64_t n = pick_length(g, r);
        msgpack_pack_array(p, (size_t)n);
        for (int64_t i = 0; i < n; i++) {
            if (r->kind[0] == 'I')
                msgpack_pack_int32(p, (int32_t)any_int(g));
            else if (r->kind[0] == 'S')
                generate_str(g, 0, 20);
            else if (pick(g, 0, 9) == 0)
                msgpack_pack_nil(p);
            else
                msgpack_pack_double(p, -qv_rng_uniform(&g->rng));
        }
    } else if (strcmp(r->kind, "TOPS") == 0) {
        generate_tops(g, pick(g, 0, 5));
    } else if (strncmp(r->kind, "OBJ_", 4) == 0) {
        generate_struct(g, r->kind + 4, NULL);
    } else {
        cr_assert(strncmp(r->kind, "OBJS_", 5) == 0, "unknown kind %s", r->kind);
        int64_t n = pick(g, 0, 3);
        msgpack_pack_array(p, (size_t)n);
        for (int64_t i = 0; i < n; i++)
            generate_struct(g, r->kind + 5, NULL);
    }
}

static void pack_text(msgpack_packer *packer, const char *text)
{
    msgpack_pack_str(packer, strlen(text));
    msgpack_pack_str_body(packer, text, strlen(text));
}

static void generate_struct(generator *g, const char *st, const char *type)
{
    const row *chosen[64];
    size_t n = 0;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++)
        if (strcmp(rows[i].st, st) == 0 && (rows[i].required || g->all || pick(g, 0, 1)))
            chosen[n++] = &rows[i];
    msgpack_pack_map(&g->packer, n + (type != NULL));
    if (type != NULL) {
        pack_text(&g->packer, "type");
        pack_text(&g->packer, type);
    }
    for (size_t i = 0; i < n; i++) {
        pack_text(&g->packer, chosen[i]->name);
        generate_value(g, chosen[i]);
    }
}

/* One random message of a type, packed by msgpack-c from the rows alone. */
static qv_direction generate(size_t type, uint64_t seed, bool all, bool json, msgpack_sbuffer *out)
{
    generator g = {.rng = qv_rng_seed(seed), .all = all, .json = json};
    msgpack_sbuffer_init(out);
    msgpack_packer_init(&g.packer, out, msgpack_sbuffer_write);
    generate_struct(&g, message_rows[type].st, message_rows[type].type);
    for (int d = 0; d < 4; d++)
        if (strcmp(message_rows[type].who, direction_of[d]) == 0)
            return all_directions[d];
    cr_assert_fail("%s: nobody sends it", message_rows[type].type);
    return QV_FROM_CLIENT;
}

Test(protocol, every_message_with_any_fields_survives_decoding_and_encoding_bit_for_bit)
{
    for (size_t type = 0; type < QV_MSG_COUNT; type++)
        for (uint64_t seed = 0; seed < 40; seed++) {
            msgpack_sbuffer bytes;
            qv_arena arena = {0};
            qv_message m;
            const void *data;
            size_t size;
            const char *name = message_rows[type].type;
            qv_direction direction = generate(type, seed, seed == 0, false, &bytes);
            cr_assert_eq(qv_message_decode(bytes.data, bytes.size, direction, NULL, &arena, &m),
                         QV_OK, "%s, seed %d: %s", name, (int)seed, qv_error());
            cr_assert_eq((size_t)m.type, type);
            cr_assert_eq(m.unknown_keys.count, 0);
            cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_OK, "%s, seed %d: %s",
                         name, (int)seed, qv_error());
            cr_assert_eq(size, bytes.size, "%s, seed %d", name, (int)seed);
            cr_assert_arr_eq(data, bytes.data, size, "%s, seed %d", name, (int)seed);
            msgpack_sbuffer_destroy(&bytes);
            qv_arena_deinit(&arena);
        }
}

Test(protocol, every_message_but_run_survives_a_trip_through_json_text)
{
    for (size_t type = 0; type < QV_MSG_COUNT; type++)
        for (uint64_t seed = 0; seed < 20; seed++) {
            msgpack_sbuffer bytes;
            qv_arena arena = {0};
            qv_message m, back;
            const void *data;
            size_t size;
            json_t *object;
            const char *name = message_rows[type].type;
            qv_direction direction = generate(type, seed, seed == 0, true, &bytes);
            cr_assert_eq(qv_message_decode(bytes.data, bytes.size, direction, NULL, &arena, &m),
                         QV_OK, "%s: %s", name, qv_error());
            qv_status status = qv_message_to_json(&m, &object);
            if (type == QV_MSG_RUN) {
                cr_assert_eq(status, QV_ERR_FORMAT, "run holds binary data");
            } else {
                cr_assert_eq(status, QV_OK, "%s: %s", name, qv_error());
                char *text = json_dumps(object, JSON_REAL_PRECISION(17));
                json_decref(object);
                object = json_loads(text, 0, NULL);
                cr_assert_eq(qv_message_from_json(object, direction, &arena, &back), QV_OK,
                             "%s: %s", name, qv_error());
                cr_assert_eq(qv_message_encode(&back, &arena, &data, &size), QV_OK);
                cr_assert_eq(size, bytes.size, "%s, seed %d: %s", name, (int)seed, text);
                cr_assert_arr_eq(data, bytes.data, size, "%s, seed %d", name, (int)seed);
                json_decref(object);
                free(text);
            }
            msgpack_sbuffer_destroy(&bytes);
            qv_arena_deinit(&arena);
        }
}

Test(protocol, refuses_every_truncation_of_every_message)
{
    for (size_t type = 0; type < QV_MSG_COUNT; type++) {
        msgpack_sbuffer bytes;
        qv_direction direction = generate(type, 1, true, false, &bytes);
        for (size_t size = 0; size < bytes.size; size++) {
            qv_arena arena = {0};
            qv_message m;
            char *copy = malloc(size + 1) /* malloc(0) may be NULL */;
            copy = realloc(copy, size > 0 ? size : 1);
            memcpy(copy, bytes.data, size);
            cr_assert_eq(qv_message_decode(copy, size, direction, NULL, &arena, &m), QV_ERR_FORMAT,
                         "%s cut to %zu of %zu bytes", message_rows[type].type, size, bytes.size);
            free(copy);
            qv_arena_deinit(&arena);
        }
        msgpack_sbuffer_destroy(&bytes);
    }
}

Test(protocol, no_side_accepts_what_another_side_sends)
{
    for (size_t type = 0; type < QV_MSG_COUNT; type++) {
        msgpack_sbuffer bytes;
        qv_direction direction = generate(type, 2, true, false, &bytes);
        for (int d = 0; d < 4; d++) {
            qv_message m;
            bool is_twin = strcmp(message_rows[type].type, "status") == 0 ||
                           strcmp(message_rows[type].type, "explain") == 0;
            bool twin = is_twin && all_directions[d] <= 1;
            if (all_directions[d] == direction || twin)
                continue;
            cr_assert_eq(decode(bytes.data, bytes.size, all_directions[d], &m), QV_ERR_ARG,
                         "%s from %s", message_rows[type].type, direction_of[d]);
            cr_assert_eq(m.type, QV_MSG_COUNT);
        }
        msgpack_sbuffer_destroy(&bytes);
    }
}

/* --- bad input ------------------------------------------------------------------------------- */

#define BYTES(s) s, sizeof(s) - 1
#define SUBMIT   "\x83\xa4type\xa6submit\xa2id\xa2r1" /* and one more pair */

Test(protocol, refuses_malformed_bytes_with_a_sentence)
{
    static const struct {
        const char *bytes;
        size_t size;
        qv_status status;
        const char *sentence;
    } cases[] = {
        {BYTES(""), QV_ERR_FORMAT, "the message is empty"},
        {BYTES("\x81"), QV_ERR_FORMAT, "announces 1 pairs"},
        {BYTES("\x80"), QV_ERR_ARG, "type: missing"},
        {BYTES("\x80\x80"), QV_ERR_FORMAT, "1 bytes follow"},
        {BYTES("\x90"), QV_ERR_FORMAT, "this is an array, a map was expected"},
        {BYTES("\xa5hello"), QV_ERR_FORMAT, "'hello' is a string, a map was expected"},
        {BYTES("\xc1"), QV_ERR_FORMAT, "0xc1"},
        /* lengths that are not there */
        {BYTES("\xdd\xff\xff\xff\xff"), QV_ERR_FORMAT, "4294967295 entries"},
        {BYTES("\xdf\xff\xff\xff\xff"), QV_ERR_FORMAT, "4294967295 pairs"},
        {BYTES("\xdb\xff\xff\xff\xff"), QV_ERR_FORMAT, "4294967295 bytes"},
        {BYTES("\xc6\xff\xff\xff\xff"), QV_ERR_FORMAT, "4294967295 bytes"},
        {BYTES("\xdd\x01\x00\x00\x00"), QV_ERR_FORMAT, "16777216 entries"},
        {BYTES(SUBMIT "\xa8messages\xdd\x01\x00\x00\x00"), QV_ERR_FORMAT, "messages: the array"},
        {BYTES(SUBMIT "\xa6prompt\xdb\x7f\xff\xff\xff"), QV_ERR_FORMAT, "prompt: the string"},
        {BYTES(SUBMIT "\xa6prompt\xd9"), QV_ERR_FORMAT, "prompt: the message ends"},
        /* keys */
        {BYTES("\x81\x01\x02"), QV_ERR_FORMAT, "keys of a map must be strings, and 1 is"},
        {BYTES("\x81\xc4\x04type\xa6submit"), QV_ERR_FORMAT, "keys of a map must be strings"},
        {BYTES("\x81\xa2\xff\xfe\x01"), QV_ERR_FORMAT, "a key is not valid UTF-8"},
        {BYTES("\x83\xa4type\xa6submit\xa2id\xa1"
               "a\xa2id\xa1"
               "b"),
         QV_ERR_FORMAT, "id: the key is there twice"},
        {BYTES("\x83\xa4type\xa6submit\xa4type\xa6submit\xa2id\xa1"
               "a"),
         QV_ERR_FORMAT, "type: the key is there twice"},
        {BYTES("\x84\xa4type\xa6submit\xa2id\xa1"
               "a\xa1x\x01\xa1x\x02"),
         QV_ERR_FORMAT, "'x' is a string that is there twice as a key"},
        /* values that no field takes */
        {BYTES(SUBMIT "\xa6prompt\xa1\xff"), QV_ERR_FORMAT,
         "prompt: the string is not valid UTF-8"},
        {BYTES(SUBMIT "\xa6prompt\xa3\xed\xa0\x80"), QV_ERR_FORMAT, "not valid UTF-8"},
        {BYTES(SUBMIT "\xa6prompt\xc4\x01x"), QV_ERR_FORMAT,
         "prompt: this is binary data, a string was expected"},
        {BYTES(SUBMIT "\xa6prompt\xd4\x01x"), QV_ERR_FORMAT, "prompt: the value at byte"},
        {BYTES(SUBMIT "\xa1x\xc7\x00\x05"), QV_ERR_FORMAT, "extension type"},
        {BYTES(SUBMIT "\xa1x\xd6\xff\x00\x00\x00\x00"), QV_ERR_FORMAT, "extension type"},
        {BYTES(SUBMIT "\xa6tokens\xc4\x03"
                      "abc"),
         QV_ERR_FORMAT, "tokens: 3 bytes of binary data"},
        {BYTES(SUBMIT "\xabtemperature\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00"), QV_ERR_ARG,
         "temperature: nan is not a finite number"},
        {BYTES(SUBMIT "\xa5min_p\xcb\xff\xf0\x00\x00\x00\x00\x00\x00"), QV_ERR_ARG,
         "min_p: -inf is not a finite number"},
        {BYTES(SUBMIT "\xa4seed\xcb\x43\xf0\x00\x00\x00\x00\x00\x00"), QV_ERR_FORMAT,
         "seed: 1.84467440737096e+19 is a floating-point number, an integer was expected"},
        {BYTES(SUBMIT "\xaamax_tokens\xcf\x80\x00\x00\x00\x00\x00\x00\x00"), QV_ERR_ARG,
         "max_tokens: 9223372036854775808 is above"},
        {BYTES(SUBMIT "\xaamax_tokens\xcb\xc3\xe0\x00\x00\x00\x00\x00\x01"), QV_ERR_FORMAT,
         "max_tokens: "},
        {BYTES("\x82\xa4type\x05\xa2id\xa1"
               "a"),
         QV_ERR_FORMAT, "type: 5 is an integer, a string was expected"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        qv_message m;
        qv_status status = decode(cases[i].bytes, cases[i].size, QV_FROM_CLIENT, &m);
        cr_assert_eq(status, cases[i].status, "case %zu: %s %s", i, qv_status_name(status),
                     qv_error());
        cr_assert_not_null(strstr(qv_error(), cases[i].sentence), "case %zu: \"%s\", not \"%s\"", i,
                           qv_error(), cases[i].sentence);
    }
}

Test(protocol, refuses_wrong_values_with_the_key_and_the_value)
{
    static const struct {
        const char *pairs;
        qv_status status;
        const char *sentence;
    } cases[] = {
        {"'temperature':'hot'", QV_ERR_FORMAT,
         "temperature: 'hot' is a string, a number was expected"},
        {"'temperature':-0.1", QV_ERR_ARG, "temperature: -0.1 is below 0"},
        {"'temperature':101", QV_ERR_ARG, "temperature: 101 is above 100"},
        {"'max_tokens':-3", QV_ERR_ARG, "max_tokens: -3 is below 0"},
        {"'max_tokens':16777217", QV_ERR_ARG, "max_tokens: 16777217 is above 16777216"},
        {"'max_tokens':1.5", QV_ERR_FORMAT,
         "max_tokens: 1.5 is a floating-point number, an integer was expected"},
        {"'max_tokens':true", QV_ERR_FORMAT, "max_tokens: true is a boolean"},
        {"'stream':1", QV_ERR_FORMAT, "stream: 1 is an integer, true or false was expected"},
        {"'seed':-1", QV_ERR_ARG, "seed: -1 is below 0"},
        {"'seed':-1.0", QV_ERR_ARG, "seed: -1 is below 0"},
        {"'top_p':1.01", QV_ERR_ARG, "top_p: 1.01 is above 1"},
        {"'top_k':-2", QV_ERR_ARG, "top_k: -2 is below -1"},
        {"'repetition_penalty':0", QV_ERR_ARG, "repetition_penalty: 0 is below 0.01"},
        {"'n':0", QV_ERR_ARG, "n: 0 is below 1"},
        {"'n':65", QV_ERR_ARG, "n: 65 is above 64"},
        {"'prompt':['a']", QV_ERR_FORMAT, "prompt: this is an array, a string was expected"},
        {"'tokens':'abc'", QV_ERR_FORMAT,
         "tokens: 'abc' is a string, an array of integers was expected"},
        {"'tokens':[1,'b']", QV_ERR_FORMAT, "tokens[1]: 'b' is a string, an integer was expected"},
        {"'tokens':[3000000000]", QV_ERR_ARG, "tokens[0]: 3000000000 does not fit 32 bits"},
        {"'stop':['a',7]", QV_ERR_FORMAT, "stop[1]: 7 is an integer, a string was expected"},
        {"'stop':{'a':1}", QV_ERR_FORMAT, "stop: this is a map, an array of strings was expected"},
        {"'stop':['','','','','','','','','','','','','','','','','']", QV_ERR_ARG,
         "stop: 17 entries, at most 16 allowed"},
        {"'adapter':7", QV_ERR_FORMAT, "adapter: 7 is an integer, a string was expected"},
        {"'deadline_ms':0", QV_ERR_ARG, "deadline_ms: 0 is below 1"},
        {"'logprobs':33", QV_ERR_ARG, "logprobs: 33 is above 32"},
        {"'tenant':'a\\nb\\u007f0012345678901234567890123456789012345678901234567890123456789'",
         QV_ERR_ARG, "tenant: 65 bytes, at most 64 allowed"},
        {"'prompt':{'a\\nb':1}", QV_ERR_FORMAT, "prompt: this is a map"},
        {"'max_tokens':'a\\nb'", QV_ERR_FORMAT, "max_tokens: 'a?b' is a string"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        qv_message m;
        char text[512];
        snprintf(text, sizeof(text), "{'type':'submit','id':'r1',%s}", cases[i].pairs);
        qv_status status = decode_json(text, QV_FROM_CLIENT, &m);
        cr_assert_eq(status, cases[i].status, "%s: %s %s", text, qv_status_name(status),
                     qv_error());
        cr_assert_eq(strncmp(qv_error(), cases[i].sentence, strlen(cases[i].sentence)), 0,
                     "\"%s\", not \"%s\"", qv_error(), cases[i].sentence);
        cr_assert_eq(m.type, QV_MSG_SUBMIT, "%s", text);
        cr_assert(qv_str_equal(m.id, "r1"), "%s", text);
    }
}

Test(protocol, names_the_place_inside_nested_values)
{
    static const struct {
        const char *text;
        qv_direction direction;
        const char *sentence;
    } cases[] = {
        {"{'type':'step','epoch':1,'deltas':[{'request':1},{'request':2,'tokens':[1,'x']}]}",
         QV_FROM_WORKER, "deltas[1].tokens[1]: 'x' is a string, an integer was expected"},
        {"{'type':'step','epoch':1,'deltas':[{'request':1,'request_':2},{'index':3}]}",
         QV_FROM_WORKER, "deltas[1].request: missing"},
        {"{'type':'step','epoch':1,'deltas':[7]}", QV_FROM_WORKER, "deltas: 1 entries cannot be"},
        {"{'type':'step','epoch':1,'deltas':['abcdefghijkl']}", QV_FROM_WORKER,
         "deltas[0]: 'abcdefghijkl' is a string, a map was expected"},
        {"{'type':'done','id':'a','index':0,'seq':0,'finish_reason':'stop','usage':"
         "{'prompt_tokens':1,'completion_tokens':'2','cached_tokens':0}}",
         QV_TO_CLIENT, "usage.completion_tokens: '2' is a string, an integer was expected"},
        {"{'type':'done','id':'a','index':0,'seq':0,'finish_reason':'stop'}", QV_TO_CLIENT,
         "usage: missing"},
        {"{'type':'tokens','id':'a','index':0,'seq':0,'text':'','tokens':[1],"
         "'top_logprobs':[[[1,-0.5],[2]]]}",
         QV_TO_CLIENT, "top_logprobs[0][1]: this is an array, [token, logprob] was expected"},
        {"{'type':'tokens','id':'a','index':0,'seq':0,'text':'','tokens':[1],"
         "'top_logprobs':[[[1,'x']]]}",
         QV_TO_CLIENT, "top_logprobs[0][0][1]: 'x' is a string, a number was expected"},
        {"{'type':'tokens','id':'a','index':64,'seq':0,'text':'','tokens':[]}", QV_TO_CLIENT,
         "index: 64 is above 63"},
        {"{'type':'foo'}", QV_FROM_CLIENT, "type: 'foo' is not a message from client to broker"},
        {"{'type':'submit'}", QV_FROM_CLIENT, "id: missing"},
        {"{'type':'submit','id':''}", QV_FROM_CLIENT, "id: 0 bytes, at least 1 expected"},
        {"{'type':'cancel','id':null}", QV_FROM_CLIENT, "id: nil is no value"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        qv_message m;
        cr_assert_neq(decode_json(cases[i].text, cases[i].direction, &m), QV_OK, "%s",
                      cases[i].text);
        cr_assert_eq(strncmp(qv_error(), cases[i].sentence, strlen(cases[i].sentence)), 0,
                     "%s: \"%s\"", cases[i].text, qv_error());
    }
}

/* {"type": "submit", "id": "r1", "messages": [[[...]]]} with arrays nested `depth` deep in all. */
static size_t deep_message(char *out, size_t depth)
{
    static const char head[] = SUBMIT "\xa8messages";
    memcpy(out, head, sizeof(head) - 1);
    size_t size = sizeof(head) - 1;
    for (size_t level = 2; level <= depth; level++)
        out[size++] = (char)(level == depth ? 0x90 : 0x91);
    return size;
}

Test(protocol, limits_are_kept_and_answered_with_the_id)
{
    static char bytes[100000];
    qv_message m;
    size_t size = deep_message(bytes, qv_protocol_default_limits.max_depth);
    cr_assert_eq(decode(bytes, size, QV_FROM_CLIENT, &m), QV_OK, "%s", qv_error());

    size = deep_message(bytes, qv_protocol_default_limits.max_depth + 1);
    cr_assert_eq(decode(bytes, size, QV_FROM_CLIENT, &m), QV_ERR_LIMIT);
    cr_assert_str_eq(qv_error(), "messages: maps and arrays are nested deeper than 32");
    cr_assert(m.type == QV_MSG_SUBMIT && qv_str_equal(m.id, "r1"));
    size = deep_message(bytes, 90000);
    cr_assert_eq(decode(bytes, size, QV_FROM_CLIENT, &m), QV_ERR_LIMIT);

    qv_arena arena = {0};
    qv_protocol_limits limits = {.max_bytes = 64, .max_depth = 1000, .max_nodes = 1000};
    size = deep_message(bytes, 200);
    cr_assert_eq(qv_message_decode(bytes, size, QV_FROM_CLIENT, &limits, &arena, &m), QV_ERR_LIMIT);
    cr_assert_not_null(strstr(qv_error(), "at most 64 are allowed"));
    cr_assert(m.type == QV_MSG_SUBMIT && qv_str_equal(m.id, "r1"));
    limits.max_bytes = 1000;
    cr_assert_eq(qv_message_decode(bytes, size, QV_FROM_CLIENT, &limits, &arena, &m), QV_ERR_LIMIT);
    cr_assert_str_eq(qv_error(), "messages: maps and arrays are nested deeper than 64");

    limits.max_nodes = 7;
    memcpy(bytes, BYTES(SUBMIT "\xa6tokens\x92\x01\x02"));
    size = sizeof(SUBMIT "\xa6tokens\x92\x01\x02") - 1;
    cr_assert_eq(qv_message_decode(bytes, size, QV_FROM_CLIENT, &limits, &arena, &m), QV_ERR_LIMIT);
    cr_assert_str_eq(qv_error(), "tokens: the message has more than 7 values");
    limits.max_nodes = 9;
    cr_assert_eq(qv_message_decode(bytes, size, QV_FROM_CLIENT, &limits, &arena, &m), QV_OK, "%s",
                 qv_error());
    qv_arena_deinit(&arena);
}

Test(protocol, memory_is_bounded_by_the_arena_and_by_what_can_be_there)
{
    static char bytes[1 << 20];
    static const char head[] = "\x83\xa4type\xa4step\xa5"
                               "epoch\x01\xa6"
                               "deltas\xdd\x00\x00\xff\xff";
    qv_message m;
    qv_arena arena;
    qv_arena_init(&arena, 4096, 1 << 20);
    memset(bytes, 0x80, sizeof(bytes)); /* 65535 empty maps: none can be a delta */
    memcpy(bytes, head, sizeof(head) - 1);
    cr_assert_eq(
        qv_message_decode(bytes, sizeof(head) - 1 + 65535, QV_FROM_WORKER, NULL, &arena, &m),
        QV_ERR_FORMAT);
    cr_assert_str_eq(qv_error(),
                     "deltas: 65535 entries cannot be complete in the 65535 bytes left");
    cr_assert_eq(qv_arena_held(&arena), 0);

    /* Honest, but more than the owner of the arena allows. */
    static const char tokens[] = SUBMIT "\xa6tokens\xdd\x00\x0f\x00\x00";
    memset(bytes, 1, sizeof(bytes));
    memcpy(bytes, tokens, sizeof(tokens) - 1);
    cr_assert_eq(
        qv_message_decode(bytes, sizeof(tokens) - 1 + 0xf0000, QV_FROM_CLIENT, NULL, &arena, &m),
        QV_ERR_LIMIT);
    cr_assert_str_eq(qv_error(), "tokens: 983040 entries need more memory than a message may use");
    qv_arena_deinit(&arena);
}

Test(protocol, unknown_keys_are_named_but_bounded)
{
    char bytes[8192];
    qv_message m;
    qv_msgpack_writer w;
    qv_arena arena = {0};
    for (int n = 250; n <= 257; n += 7) {
        qv_msgpack_writer_init(&w, &arena);
        msgpack_pack_map(&w.packer, (size_t)n);
        qv_msgpack_writer_str(&w, "type", 4);
        qv_msgpack_writer_str(&w, "status", 6);
        for (int i = 1; i < n; i++) {
            int size = snprintf(bytes, sizeof(bytes), "%090d", i);
            qv_msgpack_writer_str(&w, bytes, (size_t)size);
            msgpack_pack_nil(&w.packer);
        }
        qv_status status = decode(w.data, w.size, QV_FROM_CLIENT, &m);
        if (n > 256) {
            cr_assert_eq(status, QV_ERR_LIMIT);
            continue;
        }
        cr_assert_eq(status, QV_OK, "%s", qv_error());
        cr_assert_eq(m.type, QV_MSG_STATUS_REQUEST);
        cr_assert_eq(m.unknown_keys.count, 16);
        cr_assert_eq(m.unknown_keys.data[15].size, 64);
    }
    qv_arena_deinit(&arena);
}

/* --- encoding what is not right --------------------------------------------------------------- */

Test(protocol, what_it_writes_the_other_side_accepts)
{
    qv_arena arena = {0};
    qv_message m, back;
    const void *data;
    size_t size;
    qv_message_init(&m, QV_MSG_ERROR);
    m.error.code = str("INTERNAL");
    m.error.message = str("/models/\xff\xc3/a \xe2\x82");
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_OK);
    cr_assert_eq(qv_message_decode(data, size, QV_TO_CLIENT, NULL, &arena, &back), QV_OK, "%s",
                 qv_error());
    cr_assert(qv_str_equal(back.error.message, "/models/\xef\xbf\xbd\xef\xbf\xbd/a "
                                               "\xef\xbf\xbd\xef\xbf\xbd"));

    qv_message_init(&m, QV_MSG_SUBMIT);
    m.submit.id = str("a");
    qv_set(&m.submit, submit, max_tokens, -5);
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_ERR_ARG);
    cr_assert_str_eq(qv_error(), "max_tokens: -5 is below 0");

    qv_message_init(&m, QV_MSG_SUBMIT);
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_ERR_ARG);
    cr_assert_str_eq(qv_error(), "id: 0 bytes, at least 1 expected");

    m.submit.id = str("a");
    qv_set(&m.submit, submit, messages, ((qv_str){"\x92\x01", 2}));
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_ERR_FORMAT);
    qv_set(&m.submit, submit, messages, ((qv_str){"\x01\x01", 2}));
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_ERR_FORMAT);
    qv_set(&m.submit, submit, messages, ((qv_str){NULL, 0}));
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_ERR_FORMAT);

    qv_message_init(&m, QV_MSG_HEARTBEAT);
    qv_set(&m.heartbeat, heartbeat, tokens_per_second, NAN);
    cr_assert_eq(qv_message_encode(&m, &arena, &data, &size), QV_ERR_ARG);

    qv_arena small;
    qv_arena_init(&small, 256, 1024);
    char text[4096] = {0};
    qv_message_init(&m, QV_MSG_ERROR);
    m.error.code = str("INTERNAL");
    m.error.message = (qv_str){text, sizeof(text)};
    cr_assert_eq(qv_message_encode(&m, &small, &data, &size), QV_ERR_LIMIT);
    qv_arena_deinit(&small);
    qv_arena_deinit(&arena);
}

/* --- JSON ------------------------------------------------------------------------------------ */

Test(protocol, json_keeps_values_and_writes_nan_as_null)
{
    qv_arena arena = {0};
    qv_message m;
    json_t *object;
    double logprobs[] = {NAN, -1.5};
    qv_message_init(&m, QV_MSG_DONE);
    m.done.id = str("a");
    m.done.finish_reason = str("length");
    qv_set(&m.done, done, prompt_logprobs, ((qv_reals){logprobs, 2}));
    cr_assert_eq(qv_message_to_json(&m, &object), QV_OK, "%s", qv_error());
    char *text = json_dumps(object, JSON_COMPACT);
    cr_assert_str_eq(text, "{\"type\":\"done\",\"id\":\"a\",\"index\":0,\"seq\":0,"
                           "\"finish_reason\":\"length\",\"usage\":{\"prompt_tokens\":0,"
                           "\"completion_tokens\":0,\"cached_tokens\":0},"
                           "\"prompt_logprobs\":[null,-1.5]}");
    qv_message back;
    cr_assert_eq(qv_message_from_json(object, QV_TO_CLIENT, &arena, &back), QV_OK);
    cr_assert(isnan(back.done.prompt_logprobs.data[0]));
    free(text);
    json_decref(object);

    qv_message_init(&m, QV_MSG_SUBMIT);
    m.submit.id = str("a");
    qv_set(&m.submit, submit, seed, UINT64_C(1) << 63);
    cr_assert_eq(qv_message_to_json(&m, &object), QV_ERR_LIMIT);
    qv_arena_deinit(&arena);
}

Test(protocol, json_refuses_what_it_cannot_say)
{
    static const struct {
        const char *bytes;
        size_t size;
        const char *sentence;
    } cases[] = {
        {BYTES(""), "there are no bytes"},
        {BYTES("\x82\xa1"
               "a\x01\xa1"
               "a\x02"),
         "the key 'a' is there twice"},
        {BYTES("\x81\xa3"
               "a\x00"
               "b\x01"),
         "a key with a zero byte"},
        {BYTES("\xc4\x01x"), "binary data"},
        {BYTES("\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00"), "nan cannot be written"},
        {BYTES("\x91"), "announces 1 entries"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        json_t *value = NULL;
        qv_str raw = {cases[i].bytes, (uint32_t)cases[i].size};
        cr_assert_neq(qv_msgpack_to_json(raw, &value), QV_OK, "case %zu", i);
        cr_assert_not_null(strstr(qv_error(), cases[i].sentence), "case %zu: %s", i, qv_error());
    }

    json_t *deep = json_array();
    for (int i = 0; i < 1000; i++) {
        json_t *outer = json_array();
        json_array_append_new(outer, deep);
        deep = outer;
    }
    qv_arena arena = {0};
    qv_str raw;
    qv_message m;
    cr_assert_eq(qv_json_to_msgpack(deep, &arena, &raw), QV_ERR_LIMIT);
    cr_assert_eq(qv_message_from_json(deep, QV_FROM_CLIENT, &arena, &m), QV_ERR_LIMIT);
    cr_assert(m.type == QV_MSG_COUNT && m.id.size == 0);
    json_decref(deep);
    json_t *text = json_string("not a map");
    cr_assert_eq(qv_message_from_json(text, QV_FROM_CLIENT, &arena, &m), QV_ERR_FORMAT);
    json_decref(text);
    qv_arena_deinit(&arena);
}

/* --- checks of a submit ----------------------------------------------------------------------- */

Test(protocol, submit_check_refuses_what_no_model_can_serve)
{
    static const struct {
        const char *pairs;
        const char *sentence; /* NULL: fine */
    } cases[] = {
        {"'prompt':'x'", NULL},
        {"'tokens':[0,1]", NULL},
        {"'messages':[{'role':'user','content':'x'},{'content':null,'role':'assistant'}]", NULL},
        {"'messages':[{'role':'user','content':'x'}],'tools':[],'chat_template_kwargs':{}", NULL},
        {"'prompt':'x','adapter':''", NULL},
        {"'prompt':'x','adapter':'team/a'", "adapter: 'team/a' is a string that names no adapter"},
        {"'prompt':'x','n':2", NULL},
        {"'prompt':'x','max_tokens':0", NULL},
        {"'adapter':'json'", "exactly one of prompt, tokens and messages is needed, there is none"},
        {"'prompt':'x','tokens':[1]", "exactly one of prompt, tokens and messages is needed, "
                                      "there are prompt tokens"},
        {"'prompt':'','messages':[]", "there are prompt messages"},
        {"'prompt':''", "prompt: empty"},
        {"'tokens':[]", "tokens: empty"},
        {"'messages':[]", "messages: empty"},
        {"'tokens':[1,-2]", "tokens[1]: -2 is below 0"},
        {"'prompt':'x','stop_token_ids':[-1]", "stop_token_ids[0]: -1 is below 0"},
        {"'prompt':'x','stop':['a','']", "stop[1]: empty"},
        {"'prompt':'x','n':2,'temperature':0", "n: 2 answers at temperature 0"},
        {"'prompt':'x','n':2,'max_tokens':0", "n: 2 answers, but max_tokens 0"},
        {"'prompt':'x','tools':[]", "tools: only goes with messages"},
        {"'tokens':[1],'chat_template_kwargs':{}", "chat_template_kwargs: only goes with messages"},
        {"'messages':{'role':'user'}", "messages: this is a map, an array of maps was expected"},
        {"'messages':['hello']", "messages[0]: 'hello' is a string, a map was expected"},
        {"'messages':[{'role':'user'},{'content':'x'}]", "messages[1]: there is no 'role'"},
        {"'messages':[{'role':7}]", "messages[0].role: 7 is an integer, a string was expected"},
        {"'messages':[{'role':'user'}],'tools':{}", "tools: this is a map"},
        {"'messages':[{'role':'user'}],'chat_template_kwargs':[]",
         "chat_template_kwargs: this is an array, a map was expected"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        qv_message m;
        char text[512];
        snprintf(text, sizeof(text), "{'type':'submit','id':'r1',%s}", cases[i].pairs);
        cr_assert_eq(decode_json(text, QV_FROM_CLIENT, &m), QV_OK, "%s: %s", text, qv_error());
        qv_status status = qv_submit_check(&m.submit);
        if (cases[i].sentence == NULL) {
            cr_assert_eq(status, QV_OK, "%s: %s", text, qv_error());
        } else {
            cr_assert_neq(status, QV_OK, "%s", text);
            cr_assert_eq(qv_code_of_status(status), QV_CODE_BAD_REQUEST, "%s", text);
            cr_assert_not_null(strstr(qv_error(), cases[i].sentence), "%s: \"%s\"", text,
                               qv_error());
        }
    }
}

Test(protocol, adapter_names_are_safe_everywhere)
{
    static const char *const good[] = {"a",         "json",   "sql-v3", "Team.a_1+x",
                                       "user@host", "base:x", "0"};
    static const char *const bad[] = {"",     "-a",          ".",  "..",   "a b", "a/b",
                                      "a\nb", "caf\xc3\xa9", "a*", "a{b}", ":a",  "a\\b"};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++)
        cr_assert_eq(qv_adapter_name_check(str(good[i])), QV_OK, "%s: %s", good[i], qv_error());
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        cr_assert_eq(qv_adapter_name_check(str(bad[i])), QV_ERR_ARG, "%s", bad[i]);
    cr_assert_eq(qv_adapter_name_check((qv_str){"a\0b", 3}), QV_ERR_ARG);
    char name[130];
    memset(name, 'a', sizeof(name));
    cr_assert_eq(qv_adapter_name_check((qv_str){name, 128}), QV_OK);
    cr_assert_eq(qv_adapter_name_check((qv_str){name, 129}), QV_ERR_ARG);
}

Test(protocol, codes_have_names_and_statuses_have_codes)
{
    for (int code = 0; code < QV_CODE_COUNT; code++) {
        qv_code found;
        cr_assert(qv_code_find(str(qv_code_name((qv_code)code)), &found) && found == (qv_code)code);
    }
    qv_code found;
    cr_assert_not(qv_code_find(str("NOPE"), &found));
    cr_assert_str_eq(qv_code_name(QV_CODE_COUNT), "?");
    cr_assert_str_eq(qv_message_type_name(QV_MSG_COUNT), "?");
    cr_assert_eq(qv_code_of_status(QV_ERR_LIMIT), QV_CODE_TOO_LARGE);
    cr_assert_eq(qv_code_of_status(QV_ERR_BUSY), QV_CODE_OVERLOADED);
    cr_assert_eq(qv_code_of_status(QV_ERR_DEVICE), QV_CODE_INTERNAL);
}
