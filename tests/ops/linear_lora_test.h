/* A product with adapters on the CPU and on the device: what the tests of it share. */
#ifndef QV_TESTS_OPS_LINEAR_LORA_TEST_H
#define QV_TESTS_OPS_LINEAR_LORA_TEST_H

#include "tests/ops/pair.h"

#define N_SLOTS    4
#define MAX_SLICES 5
#define MAX_TOKENS 700

/* A weight, a site and rows x of up to MAX_TOKENS tokens, on both sides. */
typedef struct {
    const qv_lora_shape *shape;
    int64_t n_out, slice_start[MAX_SLICES + 1];
    int32_t max_rank;
    uint8_t active[N_SLOTS];
    qv_weight *w[2];
    qv_lora_site site[2];
    both x, scratch;
} rig;

/* Adapters of the ranks in slots 0 to 2, NaN in all that lies above them and in slot 3; a slot's
 * last slice has none where there are several. Plane i is slice i's. */
static inline void fill_site(pair *p, rig *r, qv_rng *rng, const int32_t ranks[3])
{
    int32_t n = r->shape->n_slices, spacing = r->max_rank;
    int64_t n_in = r->shape->n_in, n_a = (int64_t)N_SLOTS * n * spacing * n_in;
    float *a = filled_floats(n_a, NAN), *b = filled_floats(N_SLOTS * spacing * r->n_out, NAN);
    qv_lora_slice slices[N_SLOTS * MAX_SLICES] = {0};
    for (int32_t slot = 0; slot < 3; slot++) {
        memset(a + slot * n * spacing * n_in, 0, (size_t)(n * spacing * n_in) * sizeof *a);
        memset(b + slot * spacing * r->n_out, 0, (size_t)(spacing * r->n_out) * sizeof *b);
        for (int32_t i = 0; i < n; i++) {
            int32_t rank = slot == 1 && n > 1 && i == n - 1 ? 0 : ranks[slot];
            slices[slot * n + i] =
                (qv_lora_slice){.plane = i, .rank = rank, .scale = 0.5f + 0.25f * (float)slot};
            for (int64_t k = 0; k < rank; k++) {
                float *row = a + (((int64_t)slot * n + i) * spacing + k) * n_in;
                for (int64_t j = 0; j < n_in; j++)
                    row[j] = (float)(qv_rng_uniform(rng) * 2 - 1);
                for (int64_t j = r->slice_start[i]; j < r->slice_start[i + 1]; j++)
                    b[(slot * spacing + k) * r->n_out + j] =
                        0.1f * (float)(qv_rng_uniform(rng) * 2 - 1);
            }
        }
        r->active[slot] = 1;
    }
    both ta = tensor_both(p, a, QV_BF16, QV_BF16, n_a, 1, 1);
    both tb = tensor_both(p, b, QV_BF16, QV_BF16, N_SLOTS * spacing * r->n_out, 1, 1);
    both_memory memory = upload_both(p, slices, (size_t)(N_SLOTS * n) * sizeof *slices);
    for (int side = 0; side < 2; side++)
        r->site[side] =
            (qv_lora_site){.n_in = n_in,
                           .n_out = r->n_out,
                           .n_slices = n,
                           .n_slots = N_SLOTS,
                           .max_rank = spacing,
                           .slice_start = r->slice_start,
                           .a = qv_tensor_4d(ta.t[side].data, QV_BF16, N_SLOTS, n, spacing, n_in),
                           .b = qv_tensor_3d(tb.t[side].data, QV_BF16, N_SLOTS, spacing, r->n_out),
                           .slices = memory.at[side],
                           .slot_active = r->active};
    free(a);
    free(b);
}

static inline rig *new_rig(pair *p, const qv_lora_shape *shape, int32_t max_rank,
                           const int32_t ranks[3])
{
    rig *r = must(calloc(1, sizeof *r));
    qv_rng rng = qv_rng_seed(3);
    r->shape = shape;
    r->max_rank = max_rank;
    for (int32_t i = 0; i < shape->n_slices; i++)
        r->slice_start[i + 1] = r->slice_start[i] + shape->slice_rows[i];
    r->n_out = r->slice_start[shape->n_slices];
    float *w = random_floats(&rng, r->n_out * shape->n_in, 1);
    round_to_bf16(w, r->n_out * shape->n_in);
    for (int side = 0; side < 2; side++) {
        PASS(qv_weight_new(p->be[side], r->n_out, shape->n_in, QV_BF16, &r->w[side]));
        PASS(qv_weight_load(p->be[side], r->w[side], 0, r->n_out, w, QV_F32, shape->n_in));
    }
    free(w);
    fill_site(p, r, &rng, ranks);
    r->x = random_act(p, &rng, MAX_TOKENS, shape->n_in, 1);
    r->scratch = nan_f32(p, MAX_TOKENS, shape->n_slices * max_rank);
    return r;
}

static inline void free_rig(pair *p, rig *r)
{
    for (int side = 0; side < 2; side++)
        qv_weight_free(p->be[side], r->w[side]);
    free(r);
}

#endif
