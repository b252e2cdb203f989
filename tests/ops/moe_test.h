/* What the tests of routed experts share: a list in memory of its own, routings to make it from,
 * and experts' weights.
 */
#ifndef QV_TESTS_OPS_MOE_TEST_H
#define QV_TESTS_OPS_MOE_TEST_H

#include "tests/ops/ops_test.h"

typedef struct {
    qv_moe_list list;
    void *memory;
} test_list;

/* Its memory is full of garbage, because nothing in it may be read before it is written. */
static inline test_list new_list(int32_t n_experts, int32_t top_k, int32_t max_tokens)
{
    test_list l = {0};
    size_t bytes = qv_moe_list_bytes(n_experts, top_k, max_tokens);
    l.memory = must(malloc(bytes));
    memset(l.memory, 0xA5, bytes);
    PASS(qv_moe_list_init(&l.list, n_experts, top_k, max_tokens, l.memory));
    return l;
}

/* top_k different experts for each of n tokens. */
static inline int32_t *random_ids(qv_rng *rng, int64_t n, int32_t n_experts, int32_t top_k)
{
    int32_t *ids = must(malloc((size_t)(n * top_k + 1) * sizeof *ids));
    for (int64_t t = 0; t < n; t++)
        for (int32_t j = 0; j < top_k; j++) {
            bool taken = true;
            while (taken) {
                ids[t * top_k + j] = (int32_t)qv_rng_range(rng, 0, n_experts);
                taken = false;
                for (int32_t i = 0; i < j; i++)
                    taken |= ids[t * top_k + i] == ids[t * top_k + j];
            }
        }
    return ids;
}

static inline void route(qv_backend *be, qv_moe_list *list, int32_t *ids, int64_t n, int32_t n_segs,
                         const int32_t *seg_start, const int32_t *seg_slot)
{
    PASS(qv_op_moe_route(be, qv_tensor_2d(ids, QV_I32, n, list->top_k), n_segs, seg_start, seg_slot,
                         list));
}

/* A weight of all experts from values [n_experts, n_out, n_in]. */
static inline qv_weight *load_experts(qv_backend *be, const float *values, int64_t n_experts,
                                      int64_t n_out, int64_t n_in, qv_dtype dtype)
{
    qv_weight *w;
    PASS(qv_weight_new_experts(be, n_experts, n_out, n_in, dtype, &w));
    for (int64_t e = 0; e < n_experts; e++)
        PASS(qv_weight_load_expert(be, w, e, 0, n_out, values + e * n_out * n_in, QV_F32, n_in));
    return w;
}

#endif
