/* Launchers of routed experts: router, the list of pairs, the grouped GEMM, the weighted sum.
 * Meanings are those of ops/ops.h. Device memory, BF16 activations; nothing waits, allocates or
 * reads device memory on the host.
 */
#ifndef QV_KERNELS_KERNELS_MOE_H
#define QV_KERNELS_KERNELS_MOE_H

#include "common/status.h"
#include "kernels/kernels_dense.h"
#include "kernels/kernels_linear.h"
#include "kernels/kernels_lora.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const float *logits; /* [n_tokens, n_experts], rows logits_stride apart */
    const float *bias;   /* [n_experts] or NULL */
    int32_t *ids;        /* [n_tokens, top_k] */
    float *weights;      /* [n_tokens, top_k] */
    int64_t logits_stride;
    int32_t n_tokens, n_experts, top_k, n_groups, topk_groups;
    float scale;
    uint8_t sigmoid, normalize; /* sigmoid 0: softmax */
    uint8_t one_form;           /* 1: the same kernel however many tokens there are */
} qv_k_router_args;

/* Errors: LIMIT (4096 experts, 256 groups), DEVICE. */
qv_status qv_k_router(const qv_k_router_args *args, void *stream);

/* As qv_moe_run. */
typedef struct {
    int32_t first, n, expert, slot;
} qv_k_run;

/* As qv_moe_list: what of it the device needs. `work` holds what the grouped GEMM walks: number of
 * experts that have pairs, number of tiles of QV_K_MOE_TILE pairs, then for each such expert its
 * index, with the tiles of four times that size before it in the bits above, and the tiles before
 * it. `next_item` counts what a product has handed out; zero between launches. */
#define QV_K_MOE_TILE        64
#define QV_K_MOE_EXPERT_BITS 11

typedef struct {
    int32_t n_experts, first_expert, top_k, n_tokens, n_segs;
    const int32_t *seg_start, *seg_slot;
    int32_t *expert_start, *pair, *place, *n_runs, *next_item;
    qv_k_run *runs;
    int32_t *work;    /* the int64_t of qv_moe_list, two in each */
    uint8_t one_form; /* 1: a pair is summed in the same order however many there are */
} qv_k_list;

/* Make the list from ids [n_tokens, top_k]. Errors: LIMIT (2048 experts), DEVICE. */
qv_status qv_k_moe_route(const int32_t *ids, const qv_k_list *list, void *stream);

/* Memory that later kernels read, in the order in which they do. */
typedef struct {
    const void *data[2]; /* on 16 */
    int64_t bytes[2];    /* multiples of 16; 0: none */
} qv_k_ahead;

/* Both at once for one token and up to 1024 experts. Meanwhile, on devices of 9.0, what is `ahead`
 * is called into the L2 cache. Errors: DEVICE. */
bool qv_k_choose_can(const qv_k_router_args *args);
qv_status qv_k_choose(const qv_k_router_args *args, const qv_k_list *list, qv_k_ahead ahead,
                      void *stream);

/* What is done to a row's results; SWIGLU: the first half of the matrix's rows is the gate. */
typedef enum {
    QV_K_MOE_PLAIN,  /* y [pairs, n_out] */
    QV_K_MOE_SWIGLU, /* y [pairs, n_out / 2] */
    QV_K_MOE_RELU2,  /* y [pairs, n_out] */
} qv_k_moe_act;

typedef struct {
    const void *w; /* BF16 [n_experts, n_out, n_in], experts w_expert elements apart */
    const void *x; /* BF16 [n_tokens or pairs, n_in], rows x_stride apart */
    void *y;       /* BF16 [pairs, n_out], rows y_stride apart */
    int64_t w_expert, n_out, n_in, x_stride, y_stride;
    uint8_t x_pairs;    /* 1: x has a row per place, 0: per token */
    bool list_is_there; /* before the launch in front of this one began */
    qv_k_moe_act act;   /* of products that were rounded to BF16, as if it were an op of its own */
} qv_k_moe_linear_args;

/* Whether there are so many pairs that qv_k_moe_linear is faster if x has a row for each, gathered
 * by qv_k_moe_gather. */
bool qv_k_moe_wants_pairs(const qv_k_list *list);

/* y [pairs, n] = rows of x [n_tokens, n], both BF16, rows at multiples of 16 bytes. Errors: DEVICE.
 */
qv_status qv_k_moe_gather(const qv_k_list *list, const void *x, int64_t x_stride, void *y,
                          int64_t y_stride, int64_t n, void *stream);

/* Errors: DEVICE. */
qv_status qv_k_moe_linear(const qv_k_list *list, const qv_k_moe_linear_args *args, void *stream);

/* All of it of one token: qv_k_choose, and the products `in`, of the token's row, and `out`, of
 * what that leaves for each pair; bit for bit. */
typedef struct {
    const qv_k_router_args *router;
    const qv_k_list *list;
    const qv_k_moe_linear_args *in, *out;
    /* A product of one token whose x was there before the launch in front of this one began, summed
     * in an order of its own; NULL: none. */
    const qv_k_linear_args *beside;
    qv_k_ahead ahead;
} qv_k_moe_one_args;

bool qv_k_moe_one_can(const qv_k_moe_one_args *args);
bool qv_k_moe_one_can_beside(const qv_k_linear_args *c);
/* Errors: DEVICE. */
qv_status qv_k_moe_one(const qv_k_moe_one_args *args, void *stream);

/* What combine adds last: rows [n_tokens, d] float32, times sigmoid(gate[t]) where there is one. */
typedef struct {
    const float *data; /* NULL: nothing */
    const void *gate;  /* BF16, or NULL */
    int64_t stride, gate_stride;
} qv_k_shared_rows;

/* y[t] = sum over j of weights[t, j] o[place], plus what experts share of the adapters' B (site
 * NULL: none), whose A x stands in `scratch`, plus
 * `shared` (NULL: none). Rounded once, or with y_f32 not at all. Errors: LIMIT
 * (slices, rank), DEVICE.
 */
qv_status qv_k_moe_combine(const qv_k_list *list, const float *weights, const void *o,
                           int64_t o_stride, const qv_k_moe_lora_site *site, const float *scratch,
                           const qv_k_shared_rows *shared, void *y, bool y_f32, int64_t y_stride,
                           int64_t d, void *stream);

typedef struct {
    const qv_k_list *list;
    const float *weights;
    const void *o; /* as for qv_k_moe_combine, as are site, scratch and shared */
    int64_t o_stride;
    const qv_k_moe_lora_site *site;
    const float *scratch;
    const qv_k_shared_rows *shared;
    qv_k_add_norm_args norm; /* of the list's tokens; its delta is room for the sum */
} qv_k_moe_sum_args;

/* qv_k_moe_combine into the delta, then qv_k_add_norm: in one launch that leaves the delta alone,
 * where rows can be read in vectors. Errors: those of the two. */
qv_status qv_k_moe_sum_add_norm(const qv_k_moe_sum_args *args, void *stream);

/* qv_op_moe_lora. scratch [pairs, n_slices, max_rank]. Errors: LIMIT (slices, rank), DEVICE. */
qv_status qv_k_moe_lora(const qv_k_list *list, const qv_k_moe_lora_site *site, const void *x,
                        int64_t x_stride, bool x_pairs, float *scratch, void *y, int64_t y_stride,
                        void *stream);

#ifdef __cplusplus
}
#endif
#endif
