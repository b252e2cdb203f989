/* Launchers of the ops that treat rows and elements by themselves: norms, gates, embedding, RoPE
 * with the page write. Activations BF16, the residual and what is added to it float32. Any stride
 * and alignment; 16-byte aligned rows whose length is a multiple of 8 take the fast way.
 */
#ifndef QV_KERNELS_KERNELS_DENSE_H
#define QV_KERNELS_KERNELS_DENSE_H

#include "common/status.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* [tokens, heads, d]: element (t, h, i) at data[t * token + h * head + i]. */
typedef struct {
    void *data;
    int64_t token, head;
} qv_k_rows;

/* How many: rows are [n_tokens, n], d numbers each. */
typedef struct {
    int64_t n_tokens, n, d;
} qv_k_extent;

typedef enum {
    QV_K_NORM,           /* y = norm(x) * g */
    QV_K_NORM_THEN_GATE, /* y = norm(x) * w * silu(z) */
    QV_K_GATE_THEN_NORM, /* y = norm(x * silu(z)) * w, w [n, d] */
} qv_k_norm_kind;

/* norm(x) = x * rsqrt(mean(x^2) + eps) over d; g = w, or 1 + w with plus_one. w [d] F32. y may be
 * x. */
qv_status qv_k_norm(qv_k_norm_kind kind, qv_k_extent extent, qv_k_rows x, qv_k_rows z, qv_k_rows y,
                    const float *w, float eps, bool plus_one, void *stream);

/* Rows of d numbers, each with its own distance to the next. */
typedef struct {
    float *residual;
    const float *delta; /* NULL: nothing is added */
    void *y;            /* BF16 */
    void *rest;         /* BF16, or NULL */
    const float *w;     /* [d] */
    int64_t residual_stride, delta_stride, y_stride, rest_stride;
    int64_t n_tokens, d;
    float eps;
    bool plus_one;
} qv_k_add_norm_args;

/* residual += delta; y = norm(residual) * g, rounded; rest = what that took from it, rounded. */
qv_status qv_k_add_norm(const qv_k_add_norm_args *args, void *stream);

/* One number of a row of y. */
typedef struct {
    const void *w; /* BF16 [d] */
    void *out;     /* BF16 [n_tokens], stride apart: w . y */
    int64_t stride;
} qv_k_norm_gate;

/* qv_k_add_norm without a delta, and a product of y with one row, of up to 8192 numbers in vectors
 * of 8. */
bool qv_k_norm_gate_can(const qv_k_add_norm_args *args, const qv_k_norm_gate *gate);
qv_status qv_k_norm_with_gate(const qv_k_add_norm_args *args, const qv_k_norm_gate *gate,
                              void *stream);

typedef enum {
    QV_K_SWIGLU,       /* y = silu(a) * b */
    QV_K_SIGMOID_GATE, /* y = b * sigmoid(a) */
    QV_K_RELU2,        /* y = max(a, 0)^2 */
} qv_k_pointwise_kind;

/* y may be a or b; b is ignored by RELU2. */
qv_status qv_k_pointwise(qv_k_pointwise_kind kind, qv_k_extent extent, qv_k_rows a, qv_k_rows b,
                         qv_k_rows y, void *stream);

/* x[t] += delta[t], times sigmoid(gate[t]) where there is a gate: x and delta float32, gate BF16 or
 * NULL; n is 1. */
qv_status qv_k_add(qv_k_extent extent, qv_k_rows x, qv_k_rows delta, qv_k_rows gate, void *stream);

/* y[t] = table[ids[t] - first], 0 where that is not in [0, n_rows). table BF16 or, with `f32`,
 * float32, rows table_stride apart. y float32, or BF16 of a BF16 table with `as_stored`. */
qv_status qv_k_embed(const void *table, bool f32, int64_t table_stride, int64_t n_rows,
                     int64_t first, const int32_t *ids, int64_t n, int64_t d, void *y,
                     bool as_stored, int64_t y_stride, void *stream);

/* dst[i] = mean + scale * qv_made_up(seed, i), BF16 or, with `f32`, float32. */
qv_status qv_k_fill(void *dst, bool f32, int64_t n, float mean, float scale, uint64_t seed,
                    void *stream);

typedef struct {
    const int32_t *pos;        /* [n_tokens] */
    const int32_t *seq_start;  /* [n_seqs + 1]; tokens from its last entry on are left alone */
    const int32_t *page_table; /* [n_seqs, page_stride] */
    int32_t n_tokens, n_seqs, page_stride;
    int32_t n_heads, n_kv_heads, head_dim, rotary_dim;
    double theta;
    qv_k_rows q, k, v;       /* q is rotated in place */
    void *k_pages, *v_pages; /* BF16 [n_pages, page_tokens, n_kv_heads, head_dim] */
    int32_t page_tokens;
} qv_k_rope_args;

/* Rotate q and k by their positions and write k and v into their pages. Angles in double. */
qv_status qv_k_rope_kv_write(const qv_k_rope_args *args, void *stream);

typedef struct {
    qv_k_rope_args rope;
    const float *q_norm, *k_norm; /* [head_dim] */
    float eps;
    bool plus_one;
} qv_k_norm_rope_args;

/* qv_k_norm of the heads of q and of k in front of that: the same bits as by three launches, but k
 * is left as it was. Heads of up to 256 and a multiple of 8, a rotary_dim that is a multiple of 16,
 * everything on 16 bytes. */
bool qv_k_norm_rope_can(const qv_k_norm_rope_args *args);
qv_status qv_k_norm_rope_kv_write(const qv_k_norm_rope_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
