/* The few helpers around jansson that config files, safetensors headers and JSON lines need.
 *
 * Reading is bounded (size) and strict: duplicate keys are refused. The typed getters below take an
 * object and a key, and their errors name `where` (a file, say) and the key. Values are borrowed
 * from the object. Thread safe as long as one json_t stays on one thread.
 */
#ifndef QV_COMMON_JSON_H
#define QV_COMMON_JSON_H

#include "common/status.h"

#include <jansson.h>
#include <stdint.h>

/* Parse a whole file of at most `max_bytes`. The caller json_decref()s *out.
 * Errors: NOT_FOUND, IO, LIMIT, FORMAT (with line and column). */
qv_status qv_json_load_file(const char *path, size_t max_bytes, json_t **out);

/* Parse `size` bytes; `where` goes into errors. Errors: FORMAT. */
qv_status qv_json_load(const char *text, size_t size, const char *where, json_t **out);

/* Required fields: absent, null or of another type is an error. Errors: FORMAT. */
qv_status qv_json_get_int(const json_t *obj, const char *key, const char *where, int64_t *out);
qv_status qv_json_get_double(const json_t *obj, const char *key, const char *where, double *out);
qv_status qv_json_get_bool(const json_t *obj, const char *key, const char *where, bool *out);
qv_status qv_json_get_str(const json_t *obj, const char *key, const char *where, const char **out);

/* Optional fields: absent or null leaves *out at what the caller set (the default); another type is
 * an error. Integral floats count as ints. Errors: FORMAT. */
qv_status qv_json_opt_int(const json_t *obj, const char *key, const char *where, int64_t *out);
qv_status qv_json_opt_double(const json_t *obj, const char *key, const char *where, double *out);
qv_status qv_json_opt_bool(const json_t *obj, const char *key, const char *where, bool *out);
qv_status qv_json_opt_str(const json_t *obj, const char *key, const char *where, const char **out);

#endif
