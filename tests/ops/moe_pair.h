/* Routed experts on two backends, for the tests that compare them: lists, weights of experts, and
 * adapters of several forms.
 */
#ifndef QV_TESTS_OPS_MOE_PAIR_H
#define QV_TESTS_OPS_MOE_PAIR_H

#include "tests/ops/moe_test.h"
#include "tests/ops/pair.h"

#define N_SLOTS 4

/* --- Lists -------------------------------------------------------------------------------- */

typedef struct {
    qv_moe_list list[2];
    both_memory ids, start, slot;
} lists;

static inline lists route_both(pair *p, const int32_t *ids, int32_t n_experts, int32_t first,
                               int32_t top_k, int32_t n, int32_t n_segs, const int32_t *start,
                               const int32_t *slot)
{
    lists l;
    size_t bytes = qv_moe_list_bytes(n_experts, top_k, n);
    char *garbage = must(malloc(bytes));
    memset(garbage, 0xA5, bytes);
    both_memory m = upload_both(p, garbage, bytes);
    l.ids = upload_both(p, ids, (size_t)(n * top_k) * 4);
    l.start = upload_both(p, start, (size_t)(n_segs + 1) * 4);
    l.slot = upload_both(p, slot, (size_t)n_segs * 4);
    for (int side = 0; side < 2; side++) {
        PASS(qv_moe_list_init(&l.list[side], n_experts, top_k, n, m.at[side]));
        l.list[side].first_expert = first;
        PASS(qv_op_moe_route(p->be[side], qv_tensor_2d(l.ids.at[side], QV_I32, n, top_k), n_segs,
                             l.start.at[side], l.slot.at[side], &l.list[side]));
    }
    free(garbage);
    return l;
}

/* --- Weights ------------------------------------------------------------------------------ */

static inline void load_both(pair *p, qv_rng *rng, int64_t n_experts, int64_t n_out, int64_t n_in,
                             qv_weight *w[2])
{
    float *values = random_floats(rng, n_experts * n_out * n_in, 1.7f / sqrtf((float)n_in));
    round_to_bf16(values, n_experts * n_out * n_in);
    for (int side = 0; side < 2; side++)
        w[side] = load_experts(p->be[side], values, n_experts, n_out, n_in, QV_BF16);
    free(values);
}

/* --- Adapters ----------------------------------------------------------------------------- */

/* One projection's site on both sides: what slots hold is made by `add_part`. */
typedef struct {
    qv_moe_lora_site site[2];
    qv_moe_lora_slot slots[2][N_SLOTS];
    both_memory slot_memory;
    int64_t slice_start[3];
    uint8_t active[N_SLOTS];
} part_pool;

static inline part_pool *new_pool(pair *p, const qv_moe_shape *s, bool up, int32_t max_rank)
{
    part_pool *l = must(calloc(1, sizeof *l));
    int32_t n_slices = up && s->gated ? 2 : 1;
    l->slice_start[1] = up ? s->ffn : s->d;
    l->slice_start[2] = 2 * s->ffn;
    l->slot_memory = alloc_both(p, sizeof l->slots[0], sizeof l->slots[0]);
    for (int side = 0; side < 2; side++)
        l->site[side] = (qv_moe_lora_site){.n_in = up ? s->d : s->ffn,
                                           .n_out = l->slice_start[n_slices],
                                           .n_experts = s->n_experts,
                                           .n_slices = n_slices,
                                           .n_slots = N_SLOTS,
                                           .max_rank = max_rank,
                                           .dtype = QV_BF16,
                                           .slice_start = l->slice_start,
                                           .slots = l->slot_memory.at[side],
                                           .slot_active = l->active};
    return l;
}

/* A slot of `rank`, planes `spacing` apart, NaN above the rank; experts that are multiples of
 * `missing` have none. */
static inline void add_part(pair *p, part_pool *l, qv_rng *rng, int32_t slot, int32_t rank,
                            int32_t spacing, bool a_shared, bool b_shared, int32_t missing)
{
    const qv_moe_lora_site *s = &l->site[CPU];
    int64_t n_a = a_shared ? 1 : s->n_experts, n_b = b_shared ? 1 : s->n_experts;
    float *a = random_floats(rng, n_a * s->n_slices * spacing * s->n_in, 1 / sqrtf((float)s->n_in));
    float *b = random_floats(rng, n_b * spacing * s->n_out, 1);
    for (int64_t i = 0; i < n_a * s->n_slices * spacing; i++)
        for (int64_t k = 0; i % spacing >= rank && k < s->n_in; k++)
            a[i * s->n_in + k] = NAN;
    for (int64_t i = 0; i < n_b * spacing; i++)
        for (int64_t k = 0; i % spacing >= rank && k < s->n_out; k++)
            b[i * s->n_out + k] = NAN;
    qv_lora_slice *slices = must(calloc((size_t)(s->n_experts * s->n_slices), sizeof *slices));
    for (int32_t i = 0; i < s->n_experts * s->n_slices; i++)
        slices[i] = (qv_lora_slice){.plane = i % s->n_slices,
                                    .rank = missing && i / s->n_slices % missing == 0 ? 0 : rank,
                                    .scale = 0.5f + (float)(i % s->n_slices)};
    both ta = tensor_both(p, a, QV_BF16, QV_BF16, n_a * s->n_slices * spacing, s->n_in, 1);
    both tb = tensor_both(p, b, QV_BF16, QV_BF16, n_b * spacing, s->n_out, 1);
    both_memory ts = upload_both(p, slices, (size_t)(s->n_experts * s->n_slices) * sizeof *slices);
    for (int side = 0; side < 2; side++)
        l->slots[side][slot] = (qv_moe_lora_slot){.a = ta.t[side].data,
                                                  .b = tb.t[side].data,
                                                  .slices = ts.at[side],
                                                  .max_rank = spacing,
                                                  .a_shared = a_shared,
                                                  .b_shared = b_shared};
    l->active[slot] = 1;
    free(a);
    free(b);
    free(slices);
}

static inline void upload_slots(pair *p, part_pool *l)
{
    for (int side = 0; side < 2; side++)
        PASS(qv_backend_upload(p->be[side], l->slot_memory.at[side], l->slots[side],
                               sizeof l->slots[side]));
}

/* Three adapters of different forms, base tokens, and a slot without experts: A of the
 * up-projection and B of the down-projection shared or not, and the other way round, which nothing
 * forbids. */
static const struct {
    int32_t rank, spacing, missing;
    bool up_a, up_b, down_a, down_b;
} forms[][3] = {
    {{7, 16, 0, false, false, false, false},
     {16, 16, 3, false, false, false, false},
     {1, 4, 0, false, false, false, false}},
    {{7, 9, 0, true, false, false, true},
     {16, 16, 2, false, false, false, false},
     {1, 1, 0, true, false, false, true}},
    {{40, 48, 0, true, true, true, true},
     {33, 33, 0, false, true, true, false},
     {48, 48, 0, true, false, false, true}},
};

/* The three adapters of a form into slots 0 to 2 of both projections. */
static inline void add_form(pair *p, part_pool *up, part_pool *down, qv_rng *rng, size_t form)
{
    for (int i = 0; i < 3; i++) {
        add_part(p, up, rng, i, forms[form][i].rank, forms[form][i].spacing, forms[form][i].up_a,
                 forms[form][i].up_b,
                 forms[form][i].up_a || forms[form][i].up_b ? 0 : forms[form][i].missing);
        add_part(p, down, rng, i, forms[form][i].rank, forms[form][i].spacing,
                 forms[form][i].down_a, forms[form][i].down_b,
                 forms[form][i].down_a || forms[form][i].down_b ? 0 : forms[form][i].missing);
    }
    upload_slots(p, up);
    upload_slots(p, down);
}

#endif
