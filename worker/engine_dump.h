/* Every named intermediate of one step in a safetensors file, to compare with another engine:
 * `--dump FILE`. Engine thread only.
 *
 * Tensors are float32 and named "LAYER.NAME", "model.NAME" outside of layers; a name that comes
 * twice in a layer gets ".2" and so on. A one-request run has its prompt in the first step as long
 * as step-tokens and prefill-chunk allow. With several ranks, what rank 0 sees.
 */
#ifndef QV_WORKER_ENGINE_DUMP_H
#define QV_WORKER_ENGINE_DUMP_H

#include "models/model.h"

typedef struct qv_engine_dump qv_engine_dump;

/* Collect from the model's next step on. `path` is copied. Errors: NOMEM. */
qv_status qv_engine_dump_start(const char *path, qv_backend *be, qv_model *model,
                               qv_engine_dump **out);
/* After that step: write the file and stop collecting. Errors: IO, DEVICE, NOMEM. */
qv_status qv_engine_dump_finish(qv_engine_dump *dump);
void qv_engine_dump_free(qv_engine_dump *dump);

#endif
