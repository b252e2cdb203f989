/* Models, adapters and batches for the tests of models/: files written on the spot, golden cases,
 * and steps put together from sequences. Helpers abort when they cannot do their own work. */
#ifndef QV_TESTS_MODELS_FIXTURES_H
#define QV_TESTS_MODELS_FIXTURES_H

#include "models/lora.h"
#include "models/model.h"
#include "models/safetensors.h"
#include "tests/support.h"

/* --- Files ------------------------------------------------------------------------------------ */

typedef struct {
    const char *name;
    qv_dtype dtype;
    int n_dims;
    int64_t shape[3];
    void *data; /* owned by the file below */
} fx_tensor;

/* A safetensors file being put together. */
typedef struct {
    fx_tensor tensors[512];
    int n;
} fx_file;

/* Add a tensor of these float32 values, stored as `dtype`. */
void fx_add(fx_file *file, const char *name, qv_dtype dtype, int n_dims, const int64_t *shape,
            const float *values);
/* Add a tensor of normal numbers times `scale`. */
void fx_add_random(fx_file *file, const char *name, qv_dtype dtype, int n_dims,
                   const int64_t *shape, qv_rng *rng, float scale);
fx_tensor *fx_find(fx_file *file, const char *name);
void fx_remove(fx_file *file, const char *name);
/* The bytes of the file; the caller frees. */
uint8_t *fx_bytes(const fx_file *file, size_t *size);
void fx_write(const fx_file *file, const char *path);
void fx_free(fx_file *file);
/* Every tensor of an open file. */
void fx_copy(fx_file *file, const qv_safetensors *st);

/* --- Models ----------------------------------------------------------------------------------- */

/* A config of odd sizes: 3 layers (linear, full, linear), vocab 50, hidden 24; `tied` or not. */
const char *fx_config_text(bool tied);
/* The checkpoint that it describes, random, names under `prefix`. */
void fx_random_model(fx_file *file, const char *prefix, bool tied, qv_dtype dtype, uint64_t seed);
/* Tiny mixtures of experts: Qwen3.5 (a linear and a full layer, 5 experts of 10 with a gate, 2 a
 * token) and Nemotron-3 (M, E, *, E and -; 6 experts of 10 in a latent space of 16, 2 a token);
 * vocab 50, hidden 24, untied. */
typedef enum { FX_QWEN_MOE, FX_NEMOTRON } fx_moe_kind;

typedef struct {
    const char *config;
    const char *prefix;  /* of tensors in the checkpoint */
    const char *experts; /* "mlp.experts", below a layer */
    int64_t n_experts, n_in, n_ffn;
    bool gated;
    int layers[2]; /* with experts */
} fx_moe;

fx_moe fx_moe_model(fx_moe_kind kind);
/* Its checkpoint, random: experts in one tensor (Qwen3.5) or one by one. */
void fx_random_moe(fx_file *file, fx_moe_kind kind, qv_dtype dtype, uint64_t seed);

/* Write both into a fresh folder; its path. */
const char *fx_write_model(const char *config, const fx_file *file);

/* A CPU backend with two threads. */
qv_backend *fx_backend(void);
/* Limits that fit the tests: 4 adapter slots of rank 16, pages of 16 tokens. */
qv_model_limits fx_limits(void);
qv_model *fx_open(qv_backend *be, const char *dir, const qv_model_limits *limits);

/* --- Steps ------------------------------------------------------------------------------------ */

/* A sequence as a step sees it. */
typedef struct {
    const int32_t *tokens; /* all of its tokens */
    int32_t start, n;      /* this step runs [start, start + n) */
    const int32_t *pages;
    int32_t state_slot;
    int32_t adapter; /* slot, -1 = base */
    int32_t logits;  /* how many of the step's last tokens need logits */
} fx_seq;

/* Run one step; rows of logits [rows, vocab] come sequence by sequence, in the order given. The
 * caller frees. Sequences may be given in any order of adapters. */
float *fx_step(qv_model *model, const fx_seq *seqs, int n_seqs);

/* Logits [n, vocab] of every token of one sequence, run in chunks of `chunk` tokens (0 = one), from
 * page `first_page` on and in `state_slot`. The caller frees. */
float *fx_run(qv_model *model, const int32_t *tokens, int32_t n, int32_t chunk, int32_t adapter,
              int32_t first_page, int32_t state_slot);

/* Log softmax of row [vocab] at `token`, in double. */
double fx_logprob(const float *row, int64_t vocab, int32_t token);

/* --- Golden cases ----------------------------------------------------------------------------- */

typedef struct {
    char name[32], adapter[32]; /* adapter "" = base */
    int32_t n;                  /* tokens, prompt and answer */
    int32_t n_prompt;
    int32_t *tokens;
    float *logprobs; /* [n - 1] of tokens 1.. */
    float *bf16;     /* the same, of the reference in BF16; NULL if the case has none */
    int32_t n_greedy;
    int32_t *greedy; /* continuation of the prompt; NULL if the case has none */
} fx_case;

/* All cases of a golden folder. The caller frees through fx_cases_free. */
fx_case *fx_cases(const char *dir, int *n);
void fx_cases_free(fx_case *cases, int n);

#define FX_MAX_ADAPTERS 16

/* A golden folder being tested: its model, its cases, and its adapters, each in the slot of its
 * index. */
typedef struct {
    const char *dir;
    qv_backend *be;         /* of the first rank */
    qv_backend *others[15]; /* of further ranks */
    int32_t n_others;
    qv_model *model;
    int64_t vocab;
    fx_case *cases;
    int n;
    char adapters[FX_MAX_ADAPTERS][32];
    int n_adapters;
} fx_golden;

/* Open golden folder `name` on a backend of these options. False: the data is not here. */
bool fx_golden_open(fx_golden *golden, const char *name, const qv_backend_options *options);
/* The same, split over ranks that are all on the first device, or on devices of their own. False
 * also when there are too few. */
typedef struct {
    int32_t n_ranks, expert_groups;
    bool own_devices;
} fx_split;
bool fx_golden_open_split(fx_golden *golden, const char *name, const qv_backend_options *options,
                          const fx_split *split);
void fx_golden_close(fx_golden *golden);
/* Whether the folder has the adapter; "" always. */
bool fx_golden_has(const fx_golden *golden, const char *adapter);
/* The slot of an adapter; -1 for "". */
int32_t fx_golden_slot(const fx_golden *golden, const char *adapter);
/* Logprobs [n - 1] of tokens 1.. of a case, computed in chunks with the adapter in `slot`. The
 * caller frees. */
float *fx_golden_logprobs(fx_golden *golden, const fx_case *c, int32_t slot, int32_t chunk);

#endif
