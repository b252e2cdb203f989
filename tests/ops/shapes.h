/* Shapes that the op tests walk through, as rows in tables: sizes of the bundled tiny model, of a
 * layer like Qwen3.5-4B's, and odd ones that end in the middle of a vector, a tile or a block. The
 * CUDA backend's tests and bench/bench_ops.c use the same rows.
 */
#ifndef QV_TESTS_OPS_SHAPES_H
#define QV_TESTS_OPS_SHAPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QV_ROWS(table) (sizeof(table) / sizeof *(table))

/* qv_op_linear */
typedef struct {
    const char *name;
    int64_t n_out, n_in;
} qv_linear_shape;

static const qv_linear_shape qv_linear_shapes[] = {
    {"one", 1, 1},           {"narrow", 4, 192},         {"odd", 37, 129},
    {"tile edge", 65, 257},  {"tiny in_proj", 712, 192}, {"tiny gate_up", 896, 192},
    {"tiny down", 192, 448}, {"tall", 1000, 3},          {"wide", 3, 1000},
};

/* Rows of norms, gates and other pointwise ops: [T, n, d] */
typedef struct {
    int64_t n_tokens, n, d;
} qv_row_shape;

static const qv_row_shape qv_row_shapes[] = {
    {1, 1, 1},   {1, 1, 15},   {3, 1, 17},    {5, 4, 64},  {2, 3, 48},
    {7, 1, 192}, {2, 32, 128}, {64, 1, 2560}, {9, 3, 512},
};

/* qv_op_attention and qv_op_rope_kv_write */
typedef struct {
    int64_t n_heads, n_kv_heads, head_dim;
    int rotary_dim, page_tokens;
} qv_attention_shape;

static const qv_attention_shape qv_attention_shapes[] = {
    {4, 2, 64, 16, 16},   /* tiny-qwen3.5 */
    {16, 4, 256, 64, 16}, /* Qwen3.5-4B */
    {32, 2, 128, 0, 32},  /* Nemotron-3 Nano */
    {3, 3, 20, 10, 5},    /* nothing is a multiple of anything */
    {5, 1, 7, 6, 1},
};

/* qv_op_conv1d */
typedef struct {
    int64_t n_channels, n_taps;
} qv_conv_shape;

static const qv_conv_shape qv_conv_shapes[] = {
    {448, 4}, {8192, 4}, {129, 4}, {17, 2}, {5, 1}, {33, 7},
};

/* qv_op_gdn */
typedef struct {
    int64_t n_k_heads, n_v_heads, d_k, d_v;
} qv_gdn_shape;

static const qv_gdn_shape qv_gdn_shapes[] = {
    {2, 4, 48, 64},   /* tiny-qwen3.5 */
    {4, 8, 128, 128}, /* a quarter of Qwen3.5-4B */
    {1, 3, 5, 7},
    {2, 2, 33, 80},
};

/* qv_op_lora: slices of unequal rows */
typedef struct {
    const char *name;
    int64_t n_in;
    int32_t n_slices;
    int64_t slice_rows[5];
} qv_lora_shape;

static const qv_lora_shape qv_lora_shapes[] = {
    {"one slice", 192, 1, {192}},
    {"gate_up", 192, 2, {448, 448}},
    {"q, k, v", 64, 3, {512, 96, 96}},
    {"in_proj", 192, 4, {448, 256, 4, 4}},
    {"fused_qkv_a_proj_with_mqa", 160, 2, {96, 37}}, /* replicated: q_a, kv_a */
    {"five odd ones", 129, 5, {1, 33, 7, 260, 31}},
};

/* qv_op_ssd */
typedef struct {
    int64_t n_heads, d, n_groups, n_state;
} qv_ssd_shape;

static const qv_ssd_shape qv_ssd_shapes[] = {
    {8, 32, 2, 32},   /* tiny-nemotron3 */
    {16, 64, 2, 128}, /* a quarter of Nemotron-3 Nano */
    {4, 80, 4, 128},  /* heads of Nemotron-3 Nano-4B */
    {3, 5, 1, 7},     {2, 67, 2, 33},
};

/* Routed experts: k of n_experts, from a row of `d` through `ffn` and back; two slices with a gate
 */
typedef struct {
    const char *name;
    int32_t n_experts, top_k;
    int64_t d, ffn;
    bool gated;
} qv_moe_shape;

static const qv_moe_shape qv_moe_shapes[] = {
    {"tiny-qwen3.5-moe", 16, 4, 160, 64, true},
    {"tiny-nemotron3-super", 16, 4, 64, 80, false},
    {"odd", 5, 2, 37, 19, true},
    {"one expert", 1, 1, 33, 70, false},
};

#endif
