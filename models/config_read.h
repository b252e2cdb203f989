/* Checked fields of config.json, for the config readers of models/<arch>.c.
 *
 * Every function takes the object, the key and `where` (the file, for errors). Absent and null are
 * the same. Errors are FORMAT for a field that is wrong and UNSUPPORTED for one that is valid
 * elsewhere.
 */
#ifndef QV_MODELS_CONFIG_READ_H
#define QV_MODELS_CONFIG_READ_H

#include "models/model_config.h"

#include <jansson.h>

/* As `fallback`: the field must be there. */
#define QV_CONFIG_REQUIRED INT64_MIN

/* An integer in [min, max]; `fallback` when absent. */
qv_status qv_config_int(const json_t *obj, const char *key, const char *where, int64_t fallback,
                        int64_t min, int64_t max, int64_t *out);

/* Integers in a row. */
typedef struct {
    const char *key;
    int64_t fallback, min, max;
    int64_t *out;
} qv_config_dim;

qv_status qv_config_dims(const json_t *obj, const qv_config_dim *dims, size_t n, const char *where);

/* A finite number in [min, max]; *out keeps its value when absent. */
qv_status qv_config_double(const json_t *obj, const char *key, const char *where, double min,
                           double max, double *out);

/* Fields with a single implemented value: absent, or equal to it; else UNSUPPORTED. */
qv_status qv_config_expect_bool(const json_t *obj, const char *key, const char *where, bool value);
qv_status qv_config_expect_str(const json_t *obj, const char *key, const char *where,
                               const char *value);
/* Null, false, 0, or empty. */
qv_status qv_config_expect_unset(const json_t *obj, const char *key, const char *where);

/* `a` must be a positive multiple of `b`; the names go into the error. */
qv_status qv_config_expect_multiple(int64_t a, const char *a_name, int64_t b, const char *b_name,
                                    const char *where);

#endif
