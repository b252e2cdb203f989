/* qv_model_config: what a model directory's config.json says, as one struct of plain numbers.
 *
 * One struct serves every architecture; a field that an architecture does not have is 0. Reading is
 * strict: whatever would change the result and is not supported is refused by name and value, and
 * every number is checked against a bound, so that sizes computed from a config never overflow
 * int64. A config owns nothing and may be copied; once read it is constant, so any thread may use
 * it.
 */
#ifndef QV_MODELS_MODEL_CONFIG_H
#define QV_MODELS_MODEL_CONFIG_H

#include "common/dtype.h"
#include "common/status.h"

#include <stdint.h>

#define QV_MAX_LAYERS     512
#define QV_MAX_EOS        16
#define QV_MODEL_TYPE_MAX 64

typedef struct qv_arch qv_arch;

/* What a layer is made of, as a set of bits. A Qwen3.5 layer has a mixer and a feed-forward part, a
 * Nemotron-3 layer one of them. Rows of the tables in models/proj.h belong to one part. */
typedef enum {
    QV_PART_GLOBAL = 1 << 0,    /* not a layer: embedding, final norm, head */
    QV_PART_LAYER = 1 << 1,     /* what every layer has: its norms */
    QV_PART_ATTENTION = 1 << 2, /* full attention, with KV pages */
    QV_PART_GDN = 1 << 3,       /* Gated DeltaNet, with a convolution tail and a recurrent state */
    QV_PART_MLP = 1 << 4,       /* dense feed-forward */
    QV_PART_SSM = 1 << 5,       /* Mamba-2, with a convolution tail and a recurrent state */
    QV_PART_CONV_BIAS = 1 << 6, /* its convolution has a bias */
    QV_PART_MOE = 1 << 7,       /* a router and its experts */
    QV_PART_SHARED = 1 << 8,    /* experts that every token goes through */
    QV_PART_LATENT = 1 << 9,    /* projections around the routed experts, which are narrower */
} qv_part;

/* Sampling settings of generation_config.json; where the file is silent, the neutral value. */
typedef struct {
    bool given;               /* the file exists and sets at least one of the fields below */
    bool do_sample;           /* as written; false when absent */
    float temperature;        /* 1 */
    float top_p;              /* 1 */
    float min_p;              /* 0 */
    float repetition_penalty; /* 1 */
    int32_t top_k;            /* 0 = all */
} qv_generation_defaults;

typedef struct {
    const qv_arch *arch;                /* models/arch.h; static */
    char model_type[QV_MODEL_TYPE_MAX]; /* as written at the top of config.json */
    qv_dtype dtype;                     /* of the checkpoint's matrices: BF16, F16 or F32 */

    int64_t vocab;  /* rows of the embedding and of the head, padding rows included */
    int64_t hidden; /* width of the residual stream */
    int64_t n_layers;
    int64_t max_positions;               /* longest sequence that the model was made for */
    uint16_t layer_parts[QV_MAX_LAYERS]; /* [n_layers] sets of qv_part */
    double norm_eps;
    bool tied_head; /* the head is the embedding */

    /* Full attention */
    int64_t n_heads, n_kv_heads, head_dim;
    int64_t rotary_dim; /* first dimensions of a head that rotate; even */
    double rope_theta;

    /* Gated DeltaNet */
    int64_t gdn_k_heads, gdn_v_heads; /* v heads are a multiple of k heads */
    int64_t gdn_k_dim, gdn_v_dim;     /* of one head */
    int64_t conv_kernel;              /* taps of the causal convolution; Mamba-2's too */

    /* Mamba-2 */
    int64_t ssm_heads, ssm_head_dim;
    int64_t ssm_groups, ssm_state; /* heads of a group share B and C, [ssm_state] each */
    double dt_min, dt_max;         /* limits of the time step; 0 and INFINITY: none */

    /* Dense MLP */
    int64_t ffn;

    /* Mixture of experts */
    int64_t n_experts, moe_top_k;
    int64_t moe_ffn;    /* of one routed expert */
    int64_t shared_ffn; /* of all shared experts together */
    int64_t moe_latent; /* width that routed experts read and write; 0 = hidden */
    int64_t router_groups, router_topk_groups;
    bool router_normalize; /* weights of a token are divided by their sum */
    double router_scale;   /* and multiplied by this */

    /* Tokens that end an answer: the union of config.json and generation_config.json, in the order
     * found, each once. */
    int32_t n_eos;
    int32_t eos[QV_MAX_EOS];
    int32_t bos; /* -1 = none */
    int32_t pad; /* -1 = none */
    qv_generation_defaults generation;
} qv_model_config;

/* Read `dir`/config.json and, if it is there, `dir`/generation_config.json. Any thread.
 * Errors: NOT_FOUND (no config.json), IO, FORMAT (a field missing, of the wrong type or out of its
 * bounds), LIMIT, UNSUPPORTED (an architecture or setting that Quiver does not implement). */
qv_status qv_model_config_load(const char *dir, qv_model_config *out);

/* The same from the text of the two files; `generation` may be NULL. `where` names the source in
 * errors. */
qv_status qv_model_config_parse(const char *config, size_t config_size, const char *generation,
                                size_t generation_size, const char *where, qv_model_config *out);

/* "qwen3_5": the architecture's name in Quiver. */
const char *qv_model_config_arch_name(const qv_model_config *config);

/* Whether `token` ends an answer. */
bool qv_model_config_is_eos(const qv_model_config *config, int32_t token);

/* How many layers contain `part`. */
int64_t qv_model_config_count(const qv_model_config *config, qv_part part);

#endif
