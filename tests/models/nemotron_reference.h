/* A tiny Nemotron-3 in double precision, straight from the formulas of docs/models.md: token by
 * token, one loop for each sum. */
#ifndef QV_TESTS_MODELS_NEMOTRON_REFERENCE_H
#define QV_TESTS_MODELS_NEMOTRON_REFERENCE_H

#include "models/model_config.h"
#include "tests/models/fixtures.h"

/* Logits [n, vocab] of every token of one sequence. `file` holds the checkpoint under "backbone.",
 * experts one by one. The caller frees. */
double *nemotron_reference(const qv_model_config *config, fx_file *file, const int32_t *tokens,
                           int32_t n);

#endif
