/* Keys: CURVE key pairs in files, and the list of keys that a broker knows.
 *
 * A key file has the lines `public <key>` and `secret <key>`, a file to hand out only the first;
 * each key is 40 characters of Z85. A list has one key a line with what it may do:
 *
 *     <public key> tenant=acme rights=submit
 *     <public key> rights=worker            # whatever is behind a # is for people
 *
 * Secrets are never part of an error or a log line. Pure but for reading and writing files: any
 * thread.
 */
#ifndef QV_COMMON_KEYS_H
#define QV_COMMON_KEYS_H

#include "common/status.h"

#include <stddef.h>

#define QV_KEY_SIZE 41 /* with the terminator */

typedef struct {
    char public_key[QV_KEY_SIZE];
    char secret_key[QV_KEY_SIZE]; /* "" in a file to hand out */
} qv_key_pair;

/* Make a pair. Errors: UNSUPPORTED (this libzmq has no CURVE). */
qv_status qv_key_pair_make(qv_key_pair *out);

/* Write the pair for its owner's eyes only, and the public half beside it as `<path>.pub`. Errors:
 * EXISTS (nothing is overwritten), IO. */
qv_status qv_key_pair_write(const qv_key_pair *pair, const char *path);

/* Read a pair, which must have a secret that nobody but the owner can read. Errors: NOT_FOUND, IO,
 * FORMAT, ARG (others can read it). */
qv_status qv_key_pair_read(const char *path, qv_key_pair *out);

/* A public key as text, or the path of a file that has one. Errors: ARG, IO, FORMAT. */
qv_status qv_public_key_get(const char *text_or_path, char out[QV_KEY_SIZE]);

/* Whether a text is a key: 40 characters of Z85. */
bool qv_key_is_valid(const char *text, size_t size);

/* --- Lists ------------------------------------------------------------------------------------ */

#define QV_KEY_TENANT_MAX 64

typedef struct {
    char key[QV_KEY_SIZE];
    char tenant[QV_KEY_TENANT_MAX + 1];
    bool submit, operate, worker;
} qv_key_rights;

/* Parse a list. Rows are malloc'ed, the caller's; a key may be there once. Errors: FORMAT with the
 * line's number, LIMIT (65536 keys), NOMEM. */
qv_status qv_key_list_parse(const char *text, size_t size, qv_key_rights **out, size_t *n);

#endif
