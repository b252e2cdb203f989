/* adapter_config.json of PEFT: every field is honoured, refused or known to change nothing.
 *
 * Used by models/lora.c alone, on whatever thread reads the adapter.
 */
#ifndef QV_MODELS_LORA_CONFIG_H
#define QV_MODELS_LORA_CONFIG_H

#include "common/status.h"

#include <jansson.h>
#include <stdint.h>
#include <stdio.h>

typedef struct qv_lora_pattern qv_lora_pattern;

typedef struct {
    int64_t rank;      /* "r" */
    double alpha;      /* "lora_alpha" */
    bool rslora;       /* scale alpha / sqrt(rank) instead of alpha / rank */
    bool weight_tying; /* a pair of the head or the embedding stands for both */
    qv_lora_pattern *rank_patterns, *alpha_patterns; /* owned lists, in the order of the file */
} qv_lora_config;

/* Check every field. Notes about ignored ones are printed to `notes`, one a line.
 * Errors: FORMAT, UNSUPPORTED, LIMIT, NOMEM. Deinit also after a failure. */
qv_status qv_lora_config_parse(const json_t *root, const char *where, FILE *notes,
                               qv_lora_config *out);
void qv_lora_config_deinit(qv_lora_config *config);

/* The scale of a pair of `rank`; `module` is the module's name as PEFT knows it (without
 * "base_model.model."). Errors: FORMAT (another rank than the config says), LIMIT (a pattern that
 * takes too long). */
qv_status qv_lora_config_scale(const qv_lora_config *config, const char *where, const char *module,
                               int32_t rank, float *out);

#endif
