/* The matrix product of prefill with adapters inside, against the CPU: through the op, and every
 * form of it.
 */
#include "tests/ops/linear_lora_test.h"

static void check_between(pair *p, const char *what, qv_tensor whole, int64_t n_out)
{
    int64_t n = whole.shape[0], d = whole.shape[1];
    float *all = fetch(p, GPU, whole);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = n_out; j < d; j++)
            cr_assert(isnan(all[i * d + j]), "%s: row %lld wrote column %lld", what, (long long)i,
                      (long long)j);
    free(all);
}

/* Tiles are 128 tokens by 128, 192 or 256 rows of the matrix, in clusters of two or alone, and k
 * goes by 64 in rings of 4 or 6. Slices end at multiples of 8 anywhere in a tile; ranks are no
 * multiples of the 32 of a step; one slot's last slice has none. */
static const qv_lora_shape lora_shapes[] = {
    {"one slice", 136, 1, {264}},
    {"three slices", 64, 3, {200, 64, 40}},
    {"small slices", 72, 5, {128, 8, 8, 8, 256}},
    {"long k", 648, 1, {24}},
    {"little of all", 8, 1, {8}},
    {"many tiles", 328, 2, {136, 640}},
};

static const struct {
    int32_t max_rank, ranks[3];
} lora_pools[] = {{16, {16, 3, 7}}, {80, {33, 72, 17}}, {256, {8, 256, 130}}};

/* Segments: {slot, tokens} each; the last has what is left. */
typedef struct {
    int32_t n_tokens, n_segs;
    struct {
        int32_t slot, n;
    } segs[40];
} lora_batch;

static const lora_batch lora_batches[] = {
    {300, 1, {{0, 0}}},
    {260, 2, {{-1, 130}, {1, 0}}},
    {700, 6, {{-1, 100}, {0, 28}, {1, 1}, {2, 200}, {3, 0}, {0, 0}}},
    {640, 5, {{2, 128}, {1, 128}, {0, 256}, {-1, 0}, {-1, 0}}},
    {513, 8, {{0, 5}, {1, 300}, {-1, 60}, {2, 3}, {0, 17}, {-1, 0}, {1, 120}, {2, 0}}},
    {257, 2, {{2, 256}, {0, 0}}},
};

/* seg_start and seg_slot on both sides; slot 3 holds NaN and has no tokens. */
static void send_batch(pair *p, const lora_batch *b, both_memory *start, both_memory *slot)
{
    int32_t starts[41] = {0}, slots[40];
    for (int32_t i = 0; i < b->n_segs; i++) {
        slots[i] = b->segs[i].slot;
        starts[i + 1] = i + 1 == b->n_segs ? b->n_tokens : starts[i] + b->segs[i].n;
    }
    *start = upload_both(p, starts, (size_t)(b->n_segs + 1) * 4);
    *slot = upload_both(p, slots, (size_t)b->n_segs * 4);
}

typedef void gpu_lora(pair *p, const rig *r, const lora_batch *b, const both_memory *start,
                      const both_memory *slot, qv_tensor scratch, qv_tensor y, int form);

static void check_batch(pair *p, const rig *r, const lora_batch *b, const char *name, gpu_lora *gpu,
                        int form, bool f32)
{
    char what[160];
    int mark = p->n_blocks;
    int64_t n = b->n_tokens, stride = r->n_out + 8;
    both_memory start, slot;
    send_batch(p, b, &start, &slot);
    both whole = f32 ? nan_f32(p, n, stride) : nan_act(p, n, stride), y;
    qv_tensor scratch[2];
    for (int side = 0; side < 2; side++) {
        y.t[side] = qv_tensor_cols(whole.t[side], 0, r->n_out);
        scratch[side] =
            qv_tensor_3d(r->scratch.t[side].data, QV_F32, n, r->shape->n_slices, r->max_rank);
    }
    PASS(qv_op_linear_lora(p->be[CPU], r->w[CPU], &r->site[CPU], b->n_segs, start.at[CPU],
                           slot.at[CPU], qv_tensor_rows(r->x.t[CPU], 0, n), scratch[CPU], y.t[CPU],
                           f32));
    gpu(p, r, b, &start, &slot, scratch[GPU], y.t[GPU], form);
    snprintf(what, sizeof what, "gemm with adapters, %s, %d tokens, %d segments, pool of %d, %s%s",
             r->shape->name, b->n_tokens, b->n_segs, r->max_rank, name, f32 ? ", f32" : "");
    /* The CPU rounds the product first. */
    compare(p, what, y, f32 ? 1e-4 : 0.008, f32 ? 2e-4 : 0.008);
    check_between(p, what, whole.t[GPU], r->n_out);
    release_to(p, mark);
}

static void lora_by_op(pair *p, const rig *r, const lora_batch *b, const both_memory *start,
                       const both_memory *slot, qv_tensor scratch, qv_tensor y, int form)
{
    (void)form;
    PASS(qv_op_linear_lora(p->be[GPU], r->w[GPU], &r->site[GPU], b->n_segs, start->at[GPU],
                           slot->at[GPU], qv_tensor_rows(r->x.t[GPU], 0, b->n_tokens), scratch, y,
                           y.dtype == QV_F32));
}

static const char *chosen(int form)
{
    (void)form;
    return "chosen";
}

static void check_all(gpu_lora *gpu, int n_forms, const char *(*name_of)(int))
{
    for (size_t i = 0; i < QV_ROWS(lora_shapes); i++)
        for (size_t j = 0; j < QV_ROWS(lora_pools); j++) {
            pair *p = open_pair();
            rig *r = new_rig(p, &lora_shapes[i], lora_pools[j].max_rank, lora_pools[j].ranks);
            for (size_t k = 0; k < QV_ROWS(lora_batches); k++)
                for (int form = 0; form < n_forms; form++)
                    if (!is_emulated(p->be[GPU]) || (i + j + k + (size_t)form) % 3 == 0)
                        check_batch(p, r, &lora_batches[k], name_of(form), gpu, form,
                                    (i + k + (size_t)form / 2) % 2);
            free_rig(p, r);
            close_pair(p);
        }
}

Test(cuda_gemm, agrees_with_the_cpu, .timeout = 600)
{
    check_all(lora_by_op, 1, chosen);
}

#ifdef QV_WITH_CUDA

/* --- Every form --------------------------------------------------------------------------- */

/* A block has many tiles where there are few multiprocessors. */
static int n_sms_for(const qv_cuda_backend *cuda, int64_t n_tokens, int form)
{
    return form != QV_K_GEMM_ANY && n_tokens % 2 == 0 ? 2 : cuda->n_sms;
}

static void lora_by_form(pair *p, const rig *r, const lora_batch *b, const both_memory *start,
                         const both_memory *slot, qv_tensor scratch, qv_tensor y, int form)
{
    const qv_cuda_backend *cuda = qv_cuda(p->be[GPU]);
    const qv_lora_site *site = &r->site[GPU];
    const qv_k_linear_args args = qv_cuda_linear_args(
        r->w[GPU], qv_tensor_rows(r->x.t[GPU], 0, b->n_tokens), (qv_tensor){0}, y);
    qv_k_stream_lora lora = {.segments = {.n_tokens = b->n_tokens,
                                          .n_segs = b->n_segs,
                                          .seg_start = start->at[GPU],
                                          .seg_slot = slot->at[GPU]},
                             .site = {.a = site->a.data,
                                      .b = site->b.data,
                                      .slices = (const qv_k_lora_slice *)site->slices,
                                      .n_in = site->n_in,
                                      .n_out = site->n_out,
                                      .max_rank = site->max_rank,
                                      .n_slots = site->n_slots,
                                      .ranges = {.n = site->n_slices}},
                             .x1 = scratch.data};
    for (int32_t i = 0; i <= site->n_slices; i++)
        lora.site.ranges.start[i] = (int32_t)site->slice_start[i];
    cr_assert(qv_k_gemm_can(&args, &lora));
    int n_sms = n_sms_for(cuda, b->n_tokens, form);
    PASS(qv_k_gemm_shrink(&args, &lora, n_sms, cuda->stream));
    PASS(qv_k_gemm(&args, &lora, false, form, n_sms, cuda->stream));
}

Test(cuda_gemm, every_form_agrees_with_the_cpu, .timeout = 600)
{
    pair *p = open_pair();
    bool can = is_hopper(p);
    close_pair(p);
    if (can)
        check_all(lora_by_form, QV_K_GEMM_FORMS, qv_k_gemm_form_name);
}

/* y [n_tokens, n_out] F32 of a batch. */
static both product_of(pair *p, const rig *r, const lora_batch *b, gpu_lora *gpu, int form)
{
    both_memory start, slot;
    send_batch(p, b, &start, &slot);
    both y = nan_f32(p, b->n_tokens, r->n_out);
    gpu(p, r, b, &start, &slot,
        qv_tensor_3d(r->scratch.t[GPU].data, QV_F32, b->n_tokens, r->shape->n_slices, r->max_rank),
        y.t[GPU], form);
    return y;
}

/* Other kernels add up in another order. */
Test(cuda_gemm, the_op_has_the_bits_of_this_kernel)
{
    pair *p = open_pair();
    for (size_t i = 0; i < QV_ROWS(lora_shapes) && is_hopper(p); i++) {
        int mark = p->n_blocks;
        const lora_batch *b = &lora_batches[i % QV_ROWS(lora_batches)];
        rig *r = new_rig(p, &lora_shapes[i], 16, (int32_t[]){16, 5, 7});
        both by_op = product_of(p, r, b, lora_by_op, 0);
        both own = product_of(p, r, b, lora_by_form, QV_K_GEMM_ANY);
        float *got = fetch(p, GPU, by_op.t[GPU]), *want = fetch(p, GPU, own.t[GPU]);
        check_same(r->shape->name, got, want, b->n_tokens * r->n_out);
        free(got);
        free(want);
        free_rig(p, r);
        release_to(p, mark);
    }
    close_pair(p);
}

/* Where a block adds to the stream, with adapters: y is what it was and the product. */
Test(cuda_gemm, a_product_with_adapters_can_add_to_its_y)
{
    pair *p = open_pair();
    for (size_t i = 0; i < QV_ROWS(lora_shapes); i++) {
        int mark = p->n_blocks;
        const lora_batch *b = &lora_batches[i % QV_ROWS(lora_batches)];
        rig *r = new_rig(p, &lora_shapes[i], 16, (int32_t[]){16, 5, 7});
        both_memory start, slot;
        qv_rng rng = qv_rng_seed(5);
        bool done;
        send_batch(p, b, &start, &slot);
        int64_t n = b->n_tokens * r->n_out;
        float *before = random_floats(&rng, n, 1);
        both y = tensor_both(p, before, QV_F32, QV_F32, b->n_tokens, r->n_out, 1);
        both delta = product_of(p, r, b, lora_by_op, 0);
        PASS(qv_op_linear_lora_add(
            p->be[GPU], r->w[GPU], &r->site[GPU], b->n_segs, start.at[GPU], slot.at[GPU],
            qv_tensor_rows(r->x.t[GPU], 0, b->n_tokens),
            qv_tensor_3d(r->scratch.t[GPU].data, QV_F32, b->n_tokens, r->shape->n_slices, 16),
            y.t[GPU], &done));
        cr_assert(done);
        float *got = fetch(p, GPU, y.t[GPU]), *add = fetch(p, GPU, delta.t[GPU]);
        for (int64_t j = 0; j < n && is_hopper(p); j++)
            cr_assert_eq(got[j], before[j] + add[j], "%s: element %lld", r->shape->name,
                         (long long)j);
        free(got), free(add), free(before);
        free_rig(p, r);
        release_to(p, mark);
    }
    close_pair(p);
}

/* The copy engine stores 16 bytes at a time. */
Test(cuda_gemm, rows_that_end_within_16_bytes_are_not_taken)
{
    pair *p = open_pair();
    rig *r = new_rig(p, &lora_shapes[0], 16, (int32_t[]){16, 5, 7});
    const qv_k_stream_lora lora = {.site = {.b = r->site[GPU].b.data, .max_rank = 16},
                                   .x1 = r->scratch.t[GPU].data};
    both y = nan_act(p, 300, 272);
    for (int64_t n_out = 256; n_out <= 264 && is_hopper(p); n_out++) {
        qv_k_linear_args args = qv_cuda_linear_args(r->w[GPU], qv_tensor_rows(r->x.t[GPU], 0, 300),
                                                    (qv_tensor){0}, y.t[GPU]);
        args.n_out = n_out;
        cr_assert_eq(qv_k_gemm_can(&args, &lora), n_out % 8 == 0, "%lld columns", (long long)n_out);
    }
    free_rig(p, r);
    close_pair(p);
}

/* An adapter of NaNs, with tokens in the tiles of others. */
Test(cuda_gemm, an_adapter_of_nans_harms_none_but_its_own_tokens)
{
    static const lora_batch batch = {300, 4, {{0, 70}, {3, 60}, {-1, 40}, {1, 0}}};
    pair *p = open_pair();
    for (int form = 0; form < QV_K_GEMM_FORMS && is_hopper(p); form++) {
        int mark = p->n_blocks;
        rig *r = new_rig(p, &lora_shapes[0], 16, (int32_t[]){16, 5, 7});
        qv_lora_slice bad = {.plane = 0, .rank = 16, .scale = 1};
        PASS(qv_backend_upload(p->be[GPU], r->site[GPU].slices + 3, &bad, sizeof bad));
        both_memory start, slot;
        send_batch(p, &batch, &start, &slot);
        both y = nan_act(p, batch.n_tokens, r->n_out);
        qv_tensor scratch = qv_tensor_3d(r->scratch.t[GPU].data, QV_F32, batch.n_tokens, 1, 16);
        lora_by_form(p, r, &batch, &start, &slot, scratch, y.t[GPU], form);
        float *got = fetch(p, GPU, y.t[GPU]);
        for (int64_t t = 0; t < batch.n_tokens; t++)
            for (int64_t j = 0; j < r->n_out; j++)
                cr_assert((t >= 70 && t < 130) == !isfinite(got[t * r->n_out + j]),
                          "%s: token %lld, column %lld is %g", qv_k_gemm_form_name(form),
                          (long long)t, (long long)j, (double)got[t * r->n_out + j]);
        free(got);
        free_rig(p, r);
        release_to(p, mark);
    }
    close_pair(p);
}

#endif
