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

/* How the pairs of a parameter that holds all experts are stored (docs/lora.md). */
typedef enum {
    QV_EXPERT_LAYOUT_UNSAID,
    QV_EXPERT_LAYOUT_STANDARD, /* A reads the matrix's input */
    QV_EXPERT_LAYOUT_SWAPPED,  /* A reads its output: the pair is that of the transpose */
} qv_expert_layout;

typedef struct {
    int64_t rank;      /* "r" */
    double alpha;      /* "lora_alpha" */
    bool rslora;       /* scale alpha / sqrt(rank) instead of alpha / rank */
    bool weight_tying; /* a pair of the head or the embedding stands for both */
    qv_lora_pattern *rank_patterns, *alpha_patterns; /* owned lists, in the order of the file */
    const json_t *target_parameters; /* list of strings, of the parsed text; NULL: none */
    qv_expert_layout expert_layout; /* Quiver's own field of that name: for files that do not say */
    bool grouped_b;      /* expert_b_packing "grouped": B is [out, experts, rank], not [out, rank,
                          * experts] */
    bool knows_standard; /* written by a PEFT that stores the standard layout, 0.19.1 or later */
} qv_lora_config;

/* Check every field. Notes about ignored ones are printed to `notes`, one a line.
 * `root` must outlive the config. Errors: FORMAT, UNSUPPORTED, LIMIT, NOMEM. Deinit also after a
 * failure. */
qv_status qv_lora_config_parse(const json_t *root, const char *where, FILE *notes,
                               qv_lora_config *out);
void qv_lora_config_deinit(qv_lora_config *config);

/* Whether target_parameters names `parameter`, wholly or by its end after a dot. */
bool qv_lora_config_targets(const qv_lora_config *config, const char *parameter);

/* The scale of a pair of `rank`; `module` is the module's name as PEFT knows it (without
 * "base_model.model."). Errors: FORMAT (another rank than the config says), LIMIT (a pattern that
 * takes too long). */
qv_status qv_lora_config_scale(const qv_lora_config *config, const char *where, const char *module,
                               int32_t rank, float *out);

#endif
