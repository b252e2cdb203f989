/* Tiny seeded models of the families with experts and of Nemotron-3, beside the dense Qwen3.5 of
 * fixtures.h: config and checkpoint written on the spot, in every form that checkpoints take. The
 * same seed gives the same numbers in every form.
 */
#ifndef QV_TESTS_MODELS_FIXTURES_MOE_H
#define QV_TESTS_MODELS_FIXTURES_MOE_H

#include "tests/models/fixtures.h"

/* Qwen MoE: linear, full, linear; 6 experts of width 10, of which 2; a shared one of 14.
 * Nano:     Mamba-2, experts, attention, MLP, experts, Mamba-2; 6 experts of 10, 2 of them; 14.
 * Super:    Mamba-2, experts, attention, experts; 8 experts of 10 that read 16 numbers, in 4 groups
 *           of which 2, 3 experts of them; 14. */
typedef enum { FX_DENSE, FX_MOE, FX_NANO, FX_SUPER, FX_N_FAMILIES } fx_family;

/* How a checkpoint holds its experts: all in one tensor, one by one, or one way in even layers and
 * the other in odd ones. */
typedef enum { FX_FUSED, FX_ONE_BY_ONE, FX_BY_LAYER } fx_experts;

/* "qwen3.5-moe" and so on, for messages. */
const char *fx_family_name(fx_family family);

/* config.json of a family, all with hidden 24. The caller frees. */
char *fx_family_config(fx_family family, int64_t vocab);

/* The checkpoint that it describes. `prefix` NULL is the one of the releases of that family. */
void fx_family_model(fx_file *file, fx_family family, const char *prefix, fx_experts experts,
                     qv_dtype dtype, int64_t vocab, uint64_t seed);

/* Both in a fresh folder, BF16, experts as released; its path. */
const char *fx_family_write(fx_family family, int64_t vocab, uint64_t seed);

/* Convert a tensor, or every tensor whose name ends in `suffix`, to `dtype`. At least one. */
void fx_retype(fx_file *file, const char *suffix, qv_dtype dtype);
void fx_rename(fx_file *file, const char *from, const char *to);

/* `text` with the field `key` (a path of names with dots between them) set to the JSON `value`, or
 * removed when that is NULL. The caller frees. */
char *fx_edit_json(const char *text, const char *key, const char *value);

#endif
