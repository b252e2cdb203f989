/* Safetensors files: named, typed arrays in one file or in shards listed by an index.
 *
 * The files are mapped, not read; tensors point into the maps. Everything in a header is checked
 * before a tensor is handed out: sizes, dtypes, bounds, overlaps, duplicates. Files are untrusted
 * input. An open set is immutable: any thread may read it. Files must not be truncated while they
 * are mapped.
 */
#ifndef QV_MODELS_SAFETENSORS_H
#define QV_MODELS_SAFETENSORS_H

#include "common/dtype.h"
#include "common/status.h"

#include <stdint.h>

typedef struct qv_safetensors qv_safetensors;

#define QV_SAFETENSORS_MAX_DIMS 8
/* The same limit as other readers have; a header of 200,000 tensors takes about 25 MB. */
#define QV_SAFETENSORS_MAX_HEADER UINT64_C(100000000)

typedef struct {
    const char *name;
    const char *file; /* for messages */
    qv_dtype dtype;
    int32_t n_dims;
    int64_t shape[QV_SAFETENSORS_MAX_DIMS];
    int64_t n_elems;
    const void *data; /* little-endian; not necessarily aligned to its elements */
    uint64_t bytes;
} qv_stored_tensor;

/* Open a model directory: `dir`/model.safetensors, else the shards of
 * `dir`/model.safetensors.index.json. Errors: NOT_FOUND, IO, FORMAT, UNSUPPORTED, LIMIT, NOMEM. */
qv_status qv_safetensors_open_dir(const char *dir, qv_safetensors **out);

/* The same for `dir`/STEM.safetensors or the shards of its index, of at most `max_bytes` together
 * (0 = no limit); read or mapped as below. */
qv_status qv_safetensors_open_set(const char *dir, const char *stem, uint64_t max_bytes,
                                  qv_safetensors **out);

/* Open one file of at most `max_bytes`, which is read into memory and may then change on disk; or
 * with 0 one of any size, which is mapped and must not. Errors: as above. */
qv_status qv_safetensors_open_file(const char *path, uint64_t max_bytes, qv_safetensors **out);

/* The same from memory, which must outlive *out; `where` stands for the file in messages. */
qv_status qv_safetensors_open_memory(const void *data, size_t size, const char *where,
                                     qv_safetensors **out);

void qv_safetensors_close(qv_safetensors *st);

/* Tensors in the order of their files and, within a file, of their data. */
size_t qv_safetensors_count(const qv_safetensors *st);
const qv_stored_tensor *qv_safetensors_at(const qv_safetensors *st, size_t i);

/* NULL if absent. */
const qv_stored_tensor *qv_safetensors_find(const qv_safetensors *st, const char *name);

/* Sum over all tensors. */
uint64_t qv_safetensors_bytes(const qv_safetensors *st);

/* Elements [first, first + n) as float32. `out` holds n floats.
 * Errors: UNSUPPORTED (not a float dtype; names the tensor). */
qv_status qv_stored_tensor_f32(const qv_stored_tensor *tensor, int64_t first, int64_t n,
                               float *out);

/* Whether elements [first, first + n) are finite. Errors: FORMAT (names the tensor and the first
 * element that is not), UNSUPPORTED (not a float dtype). */
qv_status qv_stored_tensor_require_finite(const qv_stored_tensor *tensor, int64_t first, int64_t n);

/* "BF16[4, 192]" into buf. Returns buf. */
const char *qv_stored_tensor_describe(const qv_stored_tensor *tensor, char *buf, size_t size);

#endif
