/* The wire protocol: enums, structs, encode and decode made from protocol.def. One message is one
 * msgpack map with string keys, `type` among them. No sockets here.
 *
 * Decoding never trusts the bytes: a scan without allocation bounds depth, counts and sizes before
 * anything is built; duplicate keys, wrong types, invalid UTF-8 and bytes after the map are refused
 * with a sentence that names the key. Strings and bins of a decoded message point into the input,
 * arrays live in the arena that the caller gives; both must outlive the message. Everything here is
 * pure: any thread.
 */
#ifndef QV_COMMON_PROTOCOL_H
#define QV_COMMON_PROTOCOL_H

#include "common/arena.h"
#include "common/status.h"

#include <jansson.h>
#include <stdint.h>

/* Version of the broker-worker part; `ready` carries it and the broker refuses another. */
#define QV_PROTOCOL_VERSION 1

/* Bounds of one message. */
typedef struct {
    size_t max_bytes;   /* default 8 MiB */
    uint32_t max_depth; /* maps and arrays inside each other; default 32, never above 64 */
    uint32_t max_nodes; /* values in all, default 4 Mi */
} qv_protocol_limits;

extern const qv_protocol_limits qv_protocol_default_limits;

/* --- value kinds ----------------------------------------------------------------------------- */

typedef struct {
    const char *data; /* not terminated */
    uint32_t size;
} qv_str; /* also BIN and ANY (raw msgpack) */

typedef struct {
    int32_t *data;
    uint32_t count;
} qv_ints;

typedef struct {
    double *data; /* nil on the wire is NaN here */
    uint32_t count;
} qv_reals;

typedef struct {
    qv_str *data;
    uint32_t count;
} qv_strs;

/* Alternatives per token: those of token i are [start[i], start[i + 1]) of the two arrays. */
typedef struct {
    uint32_t count;  /* tokens */
    uint32_t *start; /* [count + 1] */
    int32_t *token;
    double *logprob; /* nil on the wire is NaN here */
} qv_tops;

qv_str qv_str_from(const char *text); /* borrowed; NULL is the empty string */
bool qv_str_equal(qv_str a, const char *text);
char *qv_str_dup(qv_arena *arena, qv_str s); /* terminated copy; NULL beyond the arena's limit */

/* --- error codes ----------------------------------------------------------------------------- */

typedef enum {
#define QV_CODE(name) QV_CODE_##name,
#include "common/protocol.def"
    QV_CODE_COUNT
} qv_code;

const char *qv_code_name(qv_code code); /* "BAD_REQUEST" */

/* The code with this name; false if there is none. */
bool qv_code_find(qv_str name, qv_code *out);

/* The code that tells a client about a status:
 *   FORMAT, ARG, SHAPE, UNSUPPORTED, EXISTS -> BAD_REQUEST    LIMIT -> TOO_LARGE
 *   NOT_FOUND -> ADAPTER_NOT_FOUND    BUSY, NOMEM -> OVERLOADED    TIMEOUT -> DEADLINE
 *   CANCELLED -> CANCELLED            anything else -> INTERNAL */
qv_code qv_code_of_status(qv_status status);

/* --- structs --------------------------------------------------------------------------------- */

/* C types of the kinds. A nested struct is by value, an array of them is pointer and count. */
#define QV_CTYPE_BOOL       bool
#define QV_CTYPE_INT        int64_t
#define QV_CTYPE_UINT       uint64_t
#define QV_CTYPE_REAL       double
#define QV_CTYPE_STR        qv_str
#define QV_CTYPE_BIN        qv_str
#define QV_CTYPE_ANY        qv_str
#define QV_CTYPE_INTS       qv_ints
#define QV_CTYPE_REALS      qv_reals
#define QV_CTYPE_STRS       qv_strs
#define QV_CTYPE_TOPS       qv_tops
#define QV_CTYPE_OBJ_usage  qv_msg_usage
#define QV_CTYPE_OBJ_timing qv_msg_timing
#define QV_OBJS(st)                                                                                \
    struct {                                                                                       \
        struct qv_msg_##st *data;                                                                  \
        uint32_t count;                                                                            \
    }
#define QV_CTYPE_OBJS_worker_status     QV_OBJS(worker_status)
#define QV_CTYPE_OBJS_adapter_status    QV_OBJS(adapter_status)
#define QV_CTYPE_OBJS_held_adapter      QV_OBJS(held_adapter)
#define QV_CTYPE_OBJS_delta             QV_OBJS(delta)
#define QV_CTYPE_OBJS_resume            QV_OBJS(resume)
#define QV_CTYPE_OBJS_explain_wait      QV_OBJS(explain_wait)
#define QV_CTYPE_OBJS_explain_candidate QV_OBJS(explain_candidate)
#define QV_CTYPE_OBJS_explain_decision  QV_OBJS(explain_decision)
#define QV_CTYPE_OBJS_explain_attempt   QV_OBJS(explain_attempt)

/* struct qv_msg_submit { uint64_t has; qv_str id; ... }: bit QV_BIT_submit_id of `has` says that
 * the field was on the wire (decoder) or is to be written (encoder). Absent OPT fields hold their
 * default after decoding and after qv_message_init. */
/* clang-format off */
#define QV_STRUCT(name) typedef struct qv_msg_##name { uint64_t has;
#define QV_FIELD(st, kind, name, need, min, max, def) QV_CTYPE_##kind name;
#define QV_STRUCT_END(name) } qv_msg_##name;
#include "common/protocol.def"

#define QV_STRUCT(name) enum { QV_BEFORE_##name = -1,
#define QV_FIELD(st, kind, name, need, min, max, def) QV_BIT_##st##_##name,
#define QV_STRUCT_END(name) QV_N_FIELDS_##name };
#include "common/protocol.def"
/* clang-format on */

/* Read and write fields with their bits; `m` points to the struct: qv_set(&message.submit, submit,
 * seed, 42). */
#define qv_has(m, st, field)        (((m)->has >> QV_BIT_##st##_##field) & 1)
#define qv_mark(m, st, field)       ((m)->has |= UINT64_C(1) << QV_BIT_##st##_##field)
#define qv_set(m, st, field, value) ((void)((m)->field = (value)), (void)qv_mark(m, st, field))

/* --- messages -------------------------------------------------------------------------------- */

typedef enum {
#define QV_MESSAGE(NAME, wire, st, who) QV_MSG_##NAME,
#include "common/protocol.def"
    QV_MSG_COUNT
} qv_msg_type;

typedef struct {
    qv_msg_type type;
    union {
#define QV_MESSAGE(NAME, wire, st, who) qv_msg_##st st;
#include "common/protocol.def"
    };
    qv_str id;            /* decoded: the request's id once it could be read, also on failure */
    qv_strs unknown_keys; /* decoded: keys that no row names (the first 16, each cut to 64 bytes),
                           * to be reported in `warnings` */
    qv_str encoded;       /* its bytes, where they are there already: encoding copies them. Whoever
                           * changes a field clears them */
} qv_message;

/* Which side's messages a decoder accepts ("status" means different things to each). */
typedef enum { QV_FROM_CLIENT, QV_TO_CLIENT, QV_FROM_WORKER, QV_TO_WORKER } qv_direction;

/* Name on the wire: "submit". "?" for QV_MSG_COUNT. */
const char *qv_message_type_name(qv_msg_type type);

/* Zero the message, set its type and fill in the defaults: what to start from before encoding. */
void qv_message_init(qv_message *message, qv_msg_type type);

/* Decode one message. On failure out->type (else QV_MSG_COUNT) and out->id (else empty) are set if
 * they could be read, so that the error can name the request; nothing else of *out may be used.
 * `limits` NULL means the defaults. Errors: FORMAT (bytes, types), ARG (values out of range,
 * missing keys, unknown type), LIMIT (size, depth, counts, arena). */
qv_status qv_message_decode(const void *data, size_t size, qv_direction direction,
                            const qv_protocol_limits *limits, qv_arena *arena, qv_message *out);

/* Encode into a buffer owned by the arena. OPT fields whose `has` bit is clear are left out; REQ
 * ones are always written. What it writes the decoder accepts: bounds are checked, bytes of a STR
 * that are not UTF-8 become U+FFFD, logprobs that are not finite become nil.
 * Errors: ARG (out of bounds), FORMAT (an ANY that is not one msgpack value), LIMIT (arena). */
qv_status qv_message_encode(const qv_message *message, qv_arena *arena, const void **data,
                            size_t *size);

/* The same maps as JSON, for quiver-run and --json: one object with `type`. TOPS become arrays of
 * [token, logprob], NaN becomes null, BIN is refused, ANY is converted. The caller json_decref()s
 * *out. Errors: as decode; FORMAT, LIMIT (an integer above 2^63 - 1). */
qv_status qv_message_from_json(const json_t *object, qv_direction direction, qv_arena *arena,
                               qv_message *out);
qv_status qv_message_to_json(const qv_message *message, json_t **out);

/* Raw msgpack (an ANY field) to JSON and back; the former refuses what JSON cannot say (bin, NaN,
 * keys that repeat or hold a zero byte). Errors: FORMAT, LIMIT. */
qv_status qv_msgpack_to_json(qv_str raw, json_t **out);
qv_status qv_json_to_msgpack(const json_t *value, qv_arena *arena, qv_str *out);

/* --- checks ---------------------------------------------------------------------------------- */

/* Checks of a submit that go beyond single fields and need no model: exactly one of prompt, tokens
 * and messages, and not empty; messages, tools and chat_template_kwargs of the right shape; n above
 * 1 only with sampling; stop strings not empty; the adapter's name. Errors: ARG with the sentence
 * for the client. */
qv_status qv_submit_check(const qv_msg_submit *submit);

/* An adapter's name: 1 to 128 ASCII letters, digits and . _ - + @ :, the first a letter or a digit,
 * so that it is safe in Redis keys, logs and file names. Errors: ARG. */
qv_status qv_adapter_name_check(qv_str name);

#endif
