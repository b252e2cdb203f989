/* The matrix product of prefill that is on trial, against the CPU: through the ops, and every form
 * of it, with and without adapters.
 */
#include "tests/ops/linear_lora_test.h"

#ifdef QV_WITH_CUDA
#include "ops/cuda/cuda.h"
#endif

/* Tiles are 128 or 256 tokens by 128 to 256 rows of the matrix, two by two in clusters, and k goes
 * by 64 in rings of 4 to 6: shapes that end everywhere in these. */
static const struct {
    int64_t n_tokens, n_out, n_in;
} shapes[] = {
    {257, 8, 8},     {300, 264, 72},  {384, 256, 256}, {513, 136, 64},  {511, 400, 200},
    {260, 512, 328}, {640, 392, 128}, {385, 24, 640},  {700, 776, 136}, {1, 40, 64},
    {129, 136, 96},  {1030, 200, 72}, {300, 37, 64},
};

/* A product on both sides; rows of y are apart and what is between them must stay. */
typedef struct {
    int64_t n, n_out, n_in, stride;
    qv_weight *w[2];
    both x;
} product;

static product new_product(pair *p, qv_rng *rng, int64_t n, int64_t n_out, int64_t n_in)
{
    product r = {.n = n, .n_out = n_out, .n_in = n_in, .stride = (n_out + 7) / 8 * 8 + 8};
    float *w = random_floats(rng, n_out * n_in, 1);
    round_to_bf16(w, n_out * n_in);
    for (int side = 0; side < 2; side++) {
        PASS(qv_weight_new(p->be[side], n_out, n_in, QV_BF16, &r.w[side]));
        PASS(qv_weight_load(p->be[side], r.w[side], 0, n_out, w, QV_F32, n_in));
    }
    free(w);
    r.x = random_act(p, rng, n, n_in + 8, 1);
    for (int side = 0; side < 2; side++)
        r.x.t[side] = qv_tensor_cols(r.x.t[side], 8, n_in);
    return r;
}

static void free_product(pair *p, product *r)
{
    for (int side = 0; side < 2; side++)
        qv_weight_free(p->be[side], r->w[side]);
}

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

/* y by the CPU, and by `gpu`: in BF16, in float32, and in float32 with a rest. */
typedef void gpu_product(pair *p, const product *r, qv_tensor rest, qv_tensor y, int form);

static void check_product(pair *p, const product *r, const char *name, gpu_product *gpu, int form)
{
    for (int kind = 0; kind < 3; kind++) {
        char what[160];
        int mark = p->n_blocks;
        qv_tensor none = {.data = NULL};
        qv_rng rng = qv_rng_seed(23);
        both rest = random_act(p, &rng, r->n, r->n_in + 8, 1.0f / 512); /* it is used up */
        both whole = kind == 0 ? nan_act(p, r->n, r->stride) : nan_f32(p, r->n, r->stride), y;
        for (int side = 0; side < 2; side++) {
            y.t[side] = qv_tensor_cols(whole.t[side], 0, r->n_out);
            rest.t[side] = qv_tensor_cols(rest.t[side], 0, r->n_in);
        }
        if (kind == 0)
            PASS(qv_op_linear(p->be[CPU], r->w[CPU], r->x.t[CPU], y.t[CPU]));
        else
            PASS(qv_op_linear_f32(p->be[CPU], r->w[CPU], r->x.t[CPU],
                                  kind == 2 ? rest.t[CPU] : none, y.t[CPU]));
        gpu(p, r, kind == 2 ? rest.t[GPU] : none, y.t[GPU], form);
        snprintf(what, sizeof what, "gemm [%lld, %lld] of %lld tokens, %s, %s", (long long)r->n_out,
                 (long long)r->n_in, (long long)r->n, name,
                 kind == 0   ? "bf16"
                 : kind == 1 ? "f32"
                             : "f32 with a rest");
        compare(p, what, y, kind == 0 ? 0.008 : 1e-5, kind == 0 ? 0.002 : 2e-5);
        check_between(p, what, whole.t[GPU], r->n_out);
        release_to(p, mark);
    }
}

static void by_op(pair *p, const product *r, qv_tensor rest, qv_tensor y, int form)
{
    (void)form;
    if (y.dtype == QV_F32)
        PASS(qv_op_linear_f32(p->be[GPU], r->w[GPU], r->x.t[GPU], rest, y));
    else
        PASS(qv_op_linear(p->be[GPU], r->w[GPU], r->x.t[GPU], y));
}

Test(cuda_gemm, products_on_trial_agree_with_the_cpu, .timeout = 600)
{
    pair *p = open_pair_with(false, "gemm");
    qv_rng rng = qv_rng_seed(21);
    for (size_t i = 0; i < QV_ROWS(shapes); i++) {
        int mark = p->n_blocks;
        product r = new_product(p, &rng, shapes[i].n_tokens, shapes[i].n_out, shapes[i].n_in);
        check_product(p, &r, "on trial", by_op, 0);
        free_product(p, &r);
        release_to(p, mark);
    }
    close_pair(p);
}

/* --- Adapters ----------------------------------------------------------------------------- */

/* Slices that end at multiples of 8 anywhere in a tile; ranks that are no multiples of the 32 of a
 * step; one slot's last slice has none. */
static const qv_lora_shape lora_shapes[] = {
    {"one slice", 136, 1, {264}},
    {"three slices", 64, 3, {200, 64, 40}},
    {"small slices", 72, 5, {128, 8, 8, 8, 256}},
};

static const struct {
    int32_t max_rank, ranks[3];
} lora_pools[] = {{16, {16, 3, 7}}, {72, {33, 72, 17}}, {256, {8, 256, 130}}};

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

static void check_adapters(const char *trials, gpu_lora *gpu, int n_forms,
                           const char *(*name_of)(int))
{
    for (size_t i = 0; i < QV_ROWS(lora_shapes); i++)
        for (size_t j = 0; j < QV_ROWS(lora_pools); j++) {
            pair *p = open_pair_with(false, trials);
            rig *r = new_rig(p, &lora_shapes[i], lora_pools[j].max_rank, lora_pools[j].ranks);
            for (size_t k = 0; k < QV_ROWS(lora_batches); k++)
                for (int form = 0; form < n_forms; form++)
                    if (n_forms == 1 || !is_emulated(p->be[GPU]) ||
                        (i + j + k + (size_t)form) % 4 == 0)
                        check_batch(p, r, &lora_batches[k], name_of(form), gpu, form,
                                    (i + k + (size_t)form / 2) % 2);
            free_rig(p, r);
            close_pair(p);
        }
}

static const char *on_trial(int form)
{
    (void)form;
    return "on trial";
}

Test(cuda_gemm, adapters_on_trial_agree_with_the_cpu, .timeout = 600)
{
    check_adapters("gemm", lora_by_op, 1, on_trial);
}

#ifdef QV_WITH_CUDA

/* --- Every form --------------------------------------------------------------------------- */

static bool is_hopper(const pair *p)
{
    if (strcmp(qv_backend_name(p->be[GPU]), "cuda") == 0 && qv_cuda(p->be[GPU])->major == 9)
        return true;
    fprintf(stderr, "not a device of 9.0\n");
    return false;
}

/* A block has many tiles where there are few multiprocessors. */
static int n_sms_for(const qv_cuda_backend *cuda, int64_t n_tokens)
{
    return n_tokens % 2 == 0 ? 2 : cuda->n_sms;
}

static void by_form(pair *p, const product *r, qv_tensor rest, qv_tensor y, int form)
{
    const qv_cuda_backend *cuda = qv_cuda(p->be[GPU]);
    const qv_k_linear_args args = qv_cuda_linear_args(r->w[GPU], r->x.t[GPU], rest, y);
    cr_assert(qv_k_gemm_can(&args, NULL));
    PASS(qv_k_gemm(&args, NULL, form, n_sms_for(cuda, r->n), cuda->stream));
}

Test(cuda_gemm, every_form_of_a_product_agrees_with_the_cpu, .timeout = 600)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(22);
    for (size_t i = 0; i < QV_ROWS(shapes) && is_hopper(p); i++) {
        if (shapes[i].n_out % 8 != 0) /* not taken */
            continue;
        int mark = p->n_blocks;
        product r = new_product(p, &rng, shapes[i].n_tokens, shapes[i].n_out, shapes[i].n_in);
        for (int form = 0; form < QV_K_GEMM_FORMS; form++)
            check_product(p, &r, qv_k_gemm_form_name(form), by_form, form);
        free_product(p, &r);
        release_to(p, mark);
    }
    close_pair(p);
}

/* Without the trial sums are in another order. */
Test(cuda_gemm, products_on_trial_have_the_bits_of_this_kernel, .timeout = 600)
{
    pair *p = open_pair_with(false, "gemm");
    const qv_tensor none = {.data = NULL};
    qv_rng rng = qv_rng_seed(24);
    for (size_t i = 0; i < QV_ROWS(shapes) && is_hopper(p); i++) {
        if (shapes[i].n_tokens <= 256 || shapes[i].n_out % 8 != 0)
            continue;
        int mark = p->n_blocks;
        product r = new_product(p, &rng, shapes[i].n_tokens, shapes[i].n_out, shapes[i].n_in);
        both chosen = nan_f32(p, r.n, r.n_out), own = nan_f32(p, r.n, r.n_out);
        by_op(p, &r, none, chosen.t[GPU], 0);
        by_form(p, &r, none, own.t[GPU], QV_K_GEMM_ANY);
        float *got = fetch(p, GPU, chosen.t[GPU]), *want = fetch(p, GPU, own.t[GPU]);
        check_same("on trial", got, want, r.n * r.n_out);
        free(got);
        free(want);
        free_product(p, &r);
        release_to(p, mark);
    }
    close_pair(p);
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
                                      .ranges = {.n = site->n_slices}},
                             .x1 = scratch.data};
    for (int32_t i = 0; i <= site->n_slices; i++)
        lora.site.ranges.start[i] = (int32_t)site->slice_start[i];
    cr_assert(qv_k_gemm_can(&args, &lora));
    PASS(qv_k_lora_shrink(&lora.segments, &lora.site, args.x, args.x_stride, scratch.data,
                          cuda->stream));
    PASS(qv_k_gemm(&args, &lora, form, n_sms_for(cuda, b->n_tokens), cuda->stream));
}

Test(cuda_gemm, every_form_with_adapters_agrees_with_the_cpu, .timeout = 600)
{
    pair *p = open_pair();
    bool can = is_hopper(p);
    close_pair(p);
    if (can)
        check_adapters(NULL, lora_by_form, QV_K_GEMM_FORMS, qv_k_gemm_form_name);
}

/* The copy engine stores 16 bytes at a time. */
Test(cuda_gemm, rows_that_end_within_16_bytes_are_not_taken)
{
    pair *p = open_pair();
    qv_rng rng = qv_rng_seed(25);
    const qv_tensor none = {.data = NULL};
    for (int64_t n_out = 36; n_out <= 40 && is_hopper(p); n_out++) {
        int mark = p->n_blocks;
        product r = new_product(p, &rng, 300, n_out, 64);
        both y[2] = {nan_act(p, r.n, r.stride), nan_f32(p, r.n, r.stride)};
        for (int f32 = 0; f32 < 2; f32++) {
            qv_tensor part = qv_tensor_cols(y[f32].t[GPU], 0, n_out);
            const qv_k_linear_args args = qv_cuda_linear_args(r.w[GPU], r.x.t[GPU], none, part);
            cr_assert_eq(qv_k_gemm_can(&args, NULL), n_out % (f32 ? 4 : 8) == 0,
                         "%lld columns, f32: %d", (long long)n_out, f32);
        }
        free_product(p, &r);
        release_to(p, mark);
    }
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
