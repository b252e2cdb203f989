/* A name for what is in a model directory, so that a pool notices workers with different models. */
#ifndef QV_WORKER_MODEL_DIGEST_H
#define QV_WORKER_MODEL_DIGEST_H

#include "common/status.h"

#define QV_MODEL_DIGEST_SIZE 33 /* 32 hex digits and the terminator */

/* Hash the JSON files of a model directory whole, and of its weight files name, size and the first
 * MiB, which holds the table of tensors: cheap, and different for any two models that are not made
 * to collide. Any thread. Errors: NOT_FOUND (no such directory, or nothing of a model in it), IO,
 * NOMEM. */
qv_status qv_model_digest(const char *model_dir, char digest[QV_MODEL_DIGEST_SIZE]);

#endif
